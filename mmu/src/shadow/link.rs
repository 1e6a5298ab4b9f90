//! The structure of shadow tables: pages are made, linked below each other, killed, evicted.
//!
//! Story: a fill that finds no first-level page comes here ([`Mmu::link_table`]). A tracked store to a directory
//! unlinks; a guest table that is none any more, and the limit, kill.
//!
//! Holds: INV-SHADOW-1..3 (pages). A link is made only while the guest's directory entry still says what the
//! walk saw, checked under the lock of the directory's page, which tracked stores take too.
//!
//! Locks: shard -> directory page -> table page -> bucket. A table page is entered into the cache and its guest
//! table write-protected (and shot down) *before* its key is set: until then nobody links or fills it.
//!
//! Making a page may sleep (shoot down): its caller holds nothing.

use crate::Mmu;
use crate::addr::{Gfn, Mpa};
use crate::coherence::Removal;
use crate::frames::{Draw, FrameKind, SHADOWED, UNSYNC, UPPER, WIDE};
use crate::p2m::PageState;
use crate::records::Cause;
use crate::rules::Rule;
use crate::shadow::RootRef;
use crate::shadow::leaf::{Mapped, Protected};
use crate::shadow::pages::{Shard, find};
use crate::shadow::role::{Key, Shape, directory_key};
use crate::spte::{Spte, l2_index, l3_index};
use crate::sync::{Ordering, fence};
use crate::vcpu::Vcpu;
use crate::walk::{Step, Translation};

impl Mmu {
    /// Links the first-level page of `key` below `root` for the address of `t`; returns its slot.
    pub(crate) fn link_table(
        &self,
        vcpu: &Vcpu,
        root: RootRef,
        t: &Translation,
        key: Key,
        user: bool,
    ) -> Result<u32, Mapped> {
        let table = self.get_or_create(vcpu, key)?;
        let directory_gfn = t.directory.map_or(Gfn(0), |step| step.table);
        let directory_key = directory_key(vcpu.mode, user, directory_gfn, t.gva);
        let directory = self.link_directory(vcpu, root, t, directory_key)?;
        // The table has been evicted meanwhile, and its slot serves the directory now: there is one lock, not two.
        if directory == table {
            return Err(Mapped::Retry);
        }

        let mut parent = self.pages.lock(directory, true);
        if parent.key != Some(directory_key) {
            return Err(Mapped::Retry);
        }
        if let Some(step) = t.directory
            && !self.is_unchanged(vcpu, step)
        {
            return Err(Mapped::Retry);
        }
        parent.writes = 0;
        self.pages.touch(directory);
        let entry = self.pages.mfn(directory).at(l2_index(t.gva) * 8);
        self.link(vcpu, entry, table, key)?;
        Ok(table)
    }

    pub(crate) fn link_directory(
        &self,
        vcpu: &Vcpu,
        root: RootRef,
        t: &Translation,
        key: Key,
    ) -> Result<u32, Mapped> {
        let entry = root.pdpt.at(l3_index(t.gva) * 8);
        if let Some(slot) = self.child(entry) {
            return Ok(slot);
        }
        let slot = self.get_or_create(vcpu, key)?;
        self.link(vcpu, entry, slot, key)?;
        Ok(slot)
    }

    /// The slot that the entry links to.
    pub(crate) fn child(&self, entry: Mpa) -> Option<u32> {
        let link = self.spte(entry);
        match link.is_present().then(|| self.frames.kind(link.mfn())) {
            Some(FrameKind::Shadow(slot)) => Some(slot),
            _ => None,
        }
    }

    /// Makes `entry` link to the page of `key` in `slot`, unlinking what it linked to before. The caller keeps
    /// others from linking at `entry`: it holds the page that the entry is in, or the entry is a root's, where
    /// everybody wants the same child.
    ///
    /// An unsync table is brought up to date first: the address may never have been translated through it, so what
    /// it forgot to follow was never owed a flush here.
    fn link(&self, vcpu: &Vcpu, entry: Mpa, slot: u32, key: Key) -> Result<(), Mapped> {
        let directory = key.role.is_directory();
        if self.child(entry) != Some(slot) {
            self.unlink(entry, directory);
        }
        let mut child = self.pages.lock(slot, directory);
        if child.key != Some(key) {
            return Err(Mapped::Retry);
        }
        if !self.spte(entry).is_present() {
            // Listed, not flagged: a table that is being tracked again loses its flag before its last look.
            let unsync = key.role.shape == Shape::Table && self.is_listed(key.gfn);
            if unsync && self.rules.keep(Rule::SyncAtLink) {
                self.sync_page(vcpu, &child, slot);
            }
            child.parents.push(entry);
            let link = Spte::link(self.pages.mfn(slot));
            self.store_spte(entry, link);
        }
        Ok(())
    }

    /// Makes `entry` link to nothing; `directory` says what it links to. A large leaf goes as well.
    pub(crate) fn unlink(&self, entry: Mpa, directory: bool) {
        let Some(slot) = self.child(entry) else { return self.zap_large(entry) };
        let mut child = self.pages.lock(slot, directory);
        if self.child(entry) != Some(slot) {
            return;
        }
        let removal = self.coherence.removal();
        self.store_spte(entry, Spte::ABSENT);
        child.parents.retain(|parent| *parent != entry);
        removal.by(Rule::DebtOfUnlink).map(Removal::stamp_table);
    }

    /// The page of `key`, made if there is none. May sleep.
    pub(crate) fn get_or_create(&self, vcpu: &Vcpu, key: Key) -> Result<u32, Mapped> {
        if let Some(slot) = find(&self.pages.shard(key.gfn), key) {
            return self.ready(slot, key);
        }
        let fresh = self.take_slot(vcpu).ok_or(Mapped::Need(key.gfn))?;
        let mut shard = self.pages.shard(key.gfn);
        if let Some(slot) = find(&shard, key) {
            drop(shard);
            self.pages.put_free(fresh, 0);
            return self.ready(slot, key);
        }
        self.pages.count_in(key);
        shard.entry(key.gfn).or_default().push((key.role, fresh));
        let promoted = if key.role.shadows_table() { self.promote(key) } else { Ok(None) };
        let owed = match promoted {
            Ok(owed) => owed,
            Err(why) => {
                self.withdraw(&mut shard, key, fresh);
                return Err(why);
            }
        };
        drop(shard);
        if let Some(owed) = owed {
            self.shoot_down_protected(Cause::Track, &owed, vcpu.id);
        }
        if key.role.shape == Shape::Directory && self.rules.keep(Rule::SyncAtPromotion) {
            self.sync_table(vcpu, key.gfn);
        }
        self.pages.advance_tick();
        self.pages.touch(fresh);
        let mut page = self.pages.lock(fresh, key.role.is_directory());
        page.key = Some(key);
        page.writes = 0;
        Ok(fresh)
    }

    /// A page found in the cache, unless it is still being made.
    fn ready(&self, slot: u32, key: Key) -> Result<u32, Mapped> {
        self.pages.touch(slot);
        let page = self.pages.lock(slot, key.role.is_directory());
        if page.key == Some(key) { Ok(slot) } else { Err(Mapped::Retry) }
    }

    /// Takes back a page that was entered into the cache and never had its key.
    fn withdraw(&self, shard: &mut Shard, key: Key, slot: u32) {
        self.take_out(shard, key, slot);
        self.pages.put_free(slot, 0);
    }

    /// Marks the guest table of a new page as shadowed and write-protects it; gives what is owed for that. An unsync table
    /// stays so, unless it becomes a directory. [`Mapped::Need`] where the table has no frame, or is losing it. Caller holds
    /// the shard.
    fn promote(&self, key: Key) -> Result<Option<Protected>, Mapped> {
        let mfn = match self.resident(key.gfn) {
            PageState::Resident(mfn) => mfn,
            PageState::Device => return Ok(None),
            _ => return Err(Mapped::Need(key.gfn)),
        };
        let bucket = self.buckets.lock(key.gfn);
        // Who takes frames away looks at the marks in here, and leaves a shadowed table alone.
        if self.p2m.lookup(key.gfn) != PageState::Resident(mfn) {
            return Err(Mapped::Need(key.gfn));
        }
        if self.is_foreign(mfn) {
            return Err(Mapped::Need(key.gfn));
        }
        let upper = key.role.shape == Shape::Directory;
        let wide = if key.role.mode.pae { WIDE } else { 0 };
        if !upper && self.frames.flags(mfn) & UNSYNC != 0 {
            self.frames.change_flags(mfn, 0, wide);
            return Ok(None);
        }
        let (clear, set) = if upper { (UNSYNC, SHADOWED | UPPER) } else { (0, SHADOWED) };
        self.frames.change_flags(mfn, clear, set | wide);
        fence(Ordering::SeqCst);
        Ok(self.write_protect(&bucket, key.gfn, mfn))
    }

    /// Takes the marks of shadowing off a guest table according to the pages it still has. Caller holds the
    /// shard.
    fn demote(&self, shard: &Shard, gfn: Gfn) {
        let PageState::Resident(mfn) = self.p2m.lookup(gfn) else { return };
        let _bucket = self.buckets.lock(gfn);
        let pages = || shard.get(&gfn).into_iter().flatten();
        let roles = || pages().map(|(role, _)| role).filter(|role| role.shadows_table());
        let mut clear = 0;
        if !roles().any(|role| role.shape == Shape::Directory) {
            clear |= UPPER;
        }
        if !roles().any(|role| role.mode.pae) {
            clear |= WIDE;
        }
        if roles().next().is_none() {
            clear |= SHADOWED | UNSYNC;
        }
        let was = self.frames.flags(mfn);
        self.frames.change_flags(mfn, clear, 0);
        if was & clear & UNSYNC != 0 {
            self.forget_unsync(gfn);
        }
    }

    /// A slot for a new page: its table is all zeros and no TLB or paging-structure cache knows it. `None` when
    /// the machine has no frame and there is nothing to evict. May sleep.
    fn take_slot(&self, vcpu: &Vcpu) -> Option<u32> {
        if let Some(slot) = self.pages.take_fresh() {
            if let Some(mfn) = self.take_frame(FrameKind::Shadow(slot), Draw::Tables) {
                self.pages.set_mfn(slot, mfn);
                return Some(slot);
            }
            self.pages.put_fresh(slot);
        }
        self.take_dead_slot(vcpu)
    }

    /// The slot of a dead page; one is killed if there is none.
    fn take_dead_slot(&self, vcpu: &Vcpu) -> Option<u32> {
        loop {
            if let Some((slot, stamp)) = self.pages.take_dead() {
                if !self.coherence.covered(stamp) && self.rules.keep(Rule::ShootdownBeforeReuse) {
                    self.coherence.shoot_down(Some(vcpu.id));
                }
                self.pages.begin_life(slot);
                return Some(slot);
            }
            let some = self.pages.max().div_ceil(16) as usize;
            if self.evict(some) == 0 && self.evict(self.pages.max() as usize) == 0 {
                return None;
            }
        }
    }

    /// Kills the `count` least recently used pages; says how many went.
    pub(crate) fn evict(&self, count: usize) -> usize {
        let mut killed = 0;
        for slot in self.pages.by_age() {
            if killed == count {
                break;
            }
            // Only a look: the key may change until the shard is held, where it is looked for again.
            let Some(key) = self.pages.lock(slot, false).key else { continue };
            let mut shard = self.pages.shard(key.gfn);
            if find(&shard, key) == Some(slot) {
                self.kill(&mut shard, key, slot);
                killed += 1;
            }
        }
        self.evictions.fetch_add(killed as u64, Ordering::Relaxed);
        killed
    }

    /// Ends a page: out of the cache, unlinked from all parents, all its entries taken away. Its slot is free
    /// once the flush clock has moved on. A page that is not ready yet is left alone. Caller holds the shard.
    pub(crate) fn kill(&self, shard: &mut Shard, key: Key, slot: u32) {
        let directory = key.role.is_directory();
        let mut page = self.pages.lock(slot, directory);
        if page.key.take().is_none() {
            return;
        }
        let removal = self.coherence.removal();
        for parent in std::mem::take(&mut page.parents) {
            self.store_spte(parent, Spte::ABSENT);
        }
        let table = self.pages.mfn(slot);
        for index in 0..512 {
            let entry = table.at(index * 8);
            if !self.spte(entry).is_present() {
                continue;
            }
            if directory {
                self.unlink(entry, false);
            } else {
                self.zap_leaf(entry);
            }
        }
        debug_assert!(
            (0..512).all(|index| !self.spte(table.at(index * 8)).is_present()),
            "INV-SHADOW-3: {key:?}"
        );
        drop(page);
        let stamp = removal.by(Rule::DebtOfEviction).map_or(0, Removal::stamp_table);
        self.take_out(shard, key, slot);
        if key.role.shadows_table() {
            self.demote(shard, key.gfn);
        }
        self.pages.put_free(slot, stamp);
    }

    /// Takes a page out of the cache.
    fn take_out(&self, shard: &mut Shard, key: Key, slot: u32) {
        let Some(pages) = shard.get_mut(&key.gfn) else { return };
        pages.retain(|(_, other)| *other != slot);
        self.pages.count_out(key);
        if pages.is_empty() {
            shard.remove(&key.gfn);
        }
    }

    /// True when a leaf of the pages of a guest table was used since accessed bits were last cleared.
    pub(crate) fn is_table_in_use(&self, gfn: Gfn) -> bool {
        let shard = self.pages.shard(gfn);
        shard.get(&gfn).into_iter().flatten().filter(|(role, _)| role.shadows_table()).any(|(role, slot)| {
            let table = self.pages.mfn(*slot);
            let mut entries = (0..512).map(|index| self.spte(table.at(index * 8))).filter(|e| e.is_present());
            // A directory is in use as long as it leads anywhere.
            if role.is_directory() { entries.next().is_some() } else { entries.any(Spte::is_accessed) }
        })
    }

    /// Brings shadow pages down to their limit and gives the frames of dead ones back; says how many frames came free.
    /// May sleep.
    pub(crate) fn shrink_shadow(&self, own: Option<u32>) -> u32 {
        let over = self.pages.over_limit();
        if over == 0 {
            return 0;
        }
        self.evict(over as usize);
        (0..over).take_while(|_| self.give_back_dead(own)).count() as u32
    }

    /// Gives back the frame of the page that has been dead for longest; false where none is. May sleep.
    pub(crate) fn give_back_dead(&self, own: Option<u32>) -> bool {
        let Some((slot, stamp)) = self.pages.take_dead() else { return false };
        if !self.coherence.covered(stamp) && self.rules.keep(Rule::ShootdownBeforeGivingBack) {
            self.coherence.shoot_down(own);
        }
        self.pages.begin_life(slot);
        self.release_table(self.pages.take_mfn(slot));
        self.pages.put_fresh(slot);
        true
    }

    /// Kills every page of a guest table: it is one no more, or must change hands.
    pub(crate) fn unshadow(&self, gfn: Gfn) {
        let mut shard = self.pages.shard(gfn);
        let pages: Vec<_> = shard.get(&gfn).cloned().unwrap_or_default();
        for (role, slot) in pages.into_iter().filter(|(role, _)| role.shadows_table()) {
            self.kill(&mut shard, Key { gfn, role }, slot);
        }
    }

    /// The step's entry lies in a directory that some page shadows (explain).
    pub(crate) fn is_shadowed(&self, step: Step) -> bool {
        self.pages.shard(step.table).contains_key(&step.table)
    }
}
