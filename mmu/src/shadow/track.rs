//! Guest tables under the guest's pen: tracked stores, unsync tables, resynchronisation.
//!
//! Story: a store to a shadowed directory is trapped, emulated and then applied here: the sptes its bytes decide
//! go. A table of the last level alone may go *unsync*: from the first store on it is writable, and the shadow
//! catches up when the architecture would: INVLPG looks at one entry, a CR3 load and its kin at every unsync
//! table below the loaded roots. An spte may always go early; a TLB may forget.
//!
//! Holds: INV-SYNC-1, exactly the unsync guest tables are in the list, but for the moment of a resynchronisation. INV-SYNC-2, after a resynchronisation every spte of
//! the page is justified by the guest's entry: same frame, A set, no right that the entry lacks, W only with D.
//!
//! Locks: shard -> page -> bucket; the list alone otherwise.
//!
//! Limits: a directory that gets [`FLOOD_MAX`] stores without being used for a link in between is taken for
//! recycled memory and unshadowed; an unsync table that came through [`CLEAN_MAX`] resynchronisations without a
//! loss is write-protected again.

use crate::Mmu;
use crate::addr::{Gfn, Gva, Mfn, Mpa};
use crate::events::Event;
use crate::format::Gpte;
use crate::frames::{SHADOWED, UNSYNC, UPPER, WATCHED};
use crate::p2m::PageState;
use crate::records::Cause;
use crate::rules::Rule;
use crate::shadow::pages::{Page, Shard, find};
use crate::shadow::role::{Key, Role, Shape, directory_key};
use crate::spte::{l1_index, l3_index};
use crate::sync::{Ordering, fence};
use crate::vcpu::Vcpu;
use crate::window::{Intent, LocalMap, Tag};

/// Stores to a shadowed directory, without a use in between, after which it is unshadowed.
pub const FLOOD_MAX: u32 = 4;
/// Resynchronisations without a loss after which an unsync table is tracked again.
pub const CLEAN_MAX: u32 = 16;

/// A guest table that may be written without our knowing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unsync {
    pub gfn: Gfn,
    clean: u32,
}

/// What a resynchronisation of one guest table found.
struct Synced {
    changed: bool,
    /// No page of the table is linked anywhere.
    orphan: bool,
}

impl Mmu {
    /// Applies a store to `length` bytes at `offset` of a guest page, already made. For everybody who writes
    /// guest memory other than the guest's own native stores. The page is in `mfn`, and the caller still has it pinned
    /// there: asked for later, it may be on its way, and be put back.
    pub(crate) fn table_written(&self, gfn: Gfn, mfn: Mfn, offset: u32, length: u32) {
        // Store, then look at the mark; promotion sets the mark, then looks at the table. One of us sees the other.
        fence(Ordering::SeqCst);
        self.frames.code_written(mfn);
        if self.frames.flags(mfn) & SHADOWED == 0 || !self.rules.keep(Rule::ApplyStores) {
            return;
        }
        self.tracked_stores.fetch_add(1, Ordering::Relaxed);
        let shard = self.pages.shard(gfn);
        let mut flooded = false;
        for (role, slot) in shard.get(&gfn).into_iter().flatten() {
            if role.shadows_table() {
                flooded |= self.apply_store(Key { gfn, role: *role }, *slot, offset, length);
            }
        }
        drop(shard);
        if flooded {
            self.unshadow(gfn);
        }
    }

    /// Takes away what the bytes decide in one page. True when the page sees stores and no use.
    fn apply_store(&self, key: Key, slot: u32, offset: u32, length: u32) -> bool {
        let directory = key.role.is_directory();
        let mut page = self.pages.lock(slot, directory);
        if page.key != Some(key) {
            return false;
        }
        let bytes = key.role.mode.entry_bytes();
        let last = (offset + length.max(1) - 1).min(4095) / bytes;
        for guest_index in offset / bytes..=last {
            let (first, count) = key.role.shadow_indexes(guest_index);
            for index in first..first + count {
                let entry = self.pages.mfn(slot).at(index * 8);
                if directory {
                    self.unlink(entry, false);
                } else {
                    self.zap_leaf(entry);
                }
            }
        }
        page.writes += 1;
        directory && page.writes > FLOOD_MAX
    }

    /// Lets the guest write to a tracked table without traps, if its shadows allow: only first-level ones, and
    /// nobody watches it for another reason.
    pub(crate) fn try_unsync(&self, vcpu: &Vcpu, gfn: Gfn, gva: Gva) -> bool {
        let _shard = self.pages.shard(gfn);
        let PageState::Resident(mfn) = self.p2m.lookup(gfn) else { return false };
        let _bucket = self.buckets.lock(gfn);
        let flags = self.frames.flags(mfn);
        if flags & (UPPER | WATCHED) != 0 {
            return false;
        }
        if flags & (SHADOWED | UNSYNC) == SHADOWED {
            self.frames.change_flags(mfn, 0, UNSYNC);
            self.list_unsync(gfn);
            vcpu.count(|s| s.unsynced += 1);
            vcpu.events.borrow_mut().record(gva, Event::Unsynced);
        }
        true
    }

    /// Brings every unsync table below the loaded roots up to date: what a CR3 load, and a change of CR0 or CR4
    /// that flushes, does. May sleep.
    pub(crate) fn sync_loaded(&self, vcpu: &Vcpu) {
        let mut list = vcpu.scratch.take();
        list.clear();
        list.extend(self.unsync.lock().iter().map(|u| u.gfn));
        if !list.is_empty() {
            let directories = self.loaded_directories(vcpu);
            for gfn in &list {
                self.sync_listed(vcpu, *gfn, &directories);
            }
        }
        vcpu.scratch.replace(list);
    }

    /// Frames of the second-level pages that the vCPU's roots lead to, or will once a fault has linked them.
    fn loaded_directories(&self, vcpu: &Vcpu) -> [Option<Mfn>; 8] {
        std::array::from_fn(|n| {
            let slot = self.find_directory(vcpu, n >= 4, Gva((n as u32 % 4) << 30))?;
            Some(self.pages.mfn(slot))
        })
    }

    /// The second-level page for `gva` and code of privilege `user`, linked to the root yet or not.
    fn find_directory(&self, vcpu: &Vcpu, user: bool, gva: Gva) -> Option<u32> {
        if let Some(root) = vcpu.roots[usize::from(user)].get()
            && let Some(slot) = self.child(root.pdpt.at(l3_index(gva) * 8))
        {
            return Some(slot);
        }
        let directory = vcpu.directory(gva).filter(|_| vcpu.mode.paging)?;
        let key = directory_key(vcpu.mode, user, directory, gva);
        find(&self.pages.shard(key.gfn), key)
    }

    /// The first-level page for `gva` and code of privilege `user`, below a directory as above.
    #[inline]
    fn find_page(&self, vcpu: &Vcpu, user: bool, gva: Gva) -> Option<u32> {
        self.table_below(self.find_directory(vcpu, user, gva)?, gva)
    }

    fn sync_listed(&self, vcpu: &Vcpu, gfn: Gfn, directories: &[Option<Mfn>]) {
        let synced = {
            let shard = self.pages.shard(gfn);
            self.sync_pages(vcpu, &shard, gfn, Some(directories))
        };
        match synced {
            None => {}
            Some(Synced { orphan: true, .. }) => self.unshadow_unsync(gfn),
            Some(Synced { changed, .. }) if self.note_synced(gfn, changed) => self.track_again(vcpu, gfn),
            Some(_) => {}
        }
    }

    /// Brings one guest table up to date, whatever it is linked to. Used when it becomes a directory too.
    pub(crate) fn sync_table(&self, vcpu: &Vcpu, gfn: Gfn) {
        let shard = self.pages.shard(gfn);
        self.sync_pages(vcpu, &shard, gfn, None);
        drop(shard);
        self.drop_if_synced(gfn);
    }

    /// Compares the pages of a guest table with it. With `directories`, only if one of them links to a page;
    /// `None` when none does (and some other does).
    fn sync_pages(
        &self,
        vcpu: &Vcpu,
        shard: &Shard,
        gfn: Gfn,
        directories: Option<&[Option<Mfn>]>,
    ) -> Option<Synced> {
        let mut all = Synced { changed: false, orphan: true };
        let mut reached = directories.is_none();
        for (role, slot) in shard.get(&gfn).into_iter().flatten() {
            if role.shape != Shape::Table {
                continue;
            }
            let page = self.pages.lock(*slot, false);
            all.orphan &= page.parents.is_empty();
            let is_loaded = |parent: &Mpa| directories.is_none_or(|list| list.contains(&Some(parent.mfn())));
            let here = directories.is_none() || page.parents.iter().any(is_loaded);
            if here {
                reached = true;
                all.changed |= self.sync_page(vcpu, &page, *slot);
            }
        }
        (reached || all.orphan).then_some(all)
    }

    /// Takes away or narrows every spte of a page that its guest table does not justify. True if there was one.
    pub(crate) fn sync_page(&self, vcpu: &Vcpu, page: &Page, slot: u32) -> bool {
        let Some(key) = page.key else { return false };
        // A frame with a shadowed table stays where it is.
        let Ok(table) = self.map_page(&vcpu.window, key.gfn, Tag::Sync, Intent::Read) else { return false };
        let mut changed = false;
        for index in 0..512 {
            changed |= self.sync_entry(&table, key.role, slot, index);
        }
        changed
    }

    #[inline]
    fn sync_entry(&self, table: &LocalMap<'_>, role: Role, slot: u32, index: u32) -> bool {
        let at = self.pages.mfn(slot).at(index * 8);
        let spte = self.spte(at);
        if !spte.is_present() {
            return false;
        }
        let guest_index = role.guest_index(index);
        let gpte = Gpte(if role.mode.pae {
            table.word64(guest_index * 8).load(Ordering::Acquire)
        } else {
            u64::from(table.word32(guest_index * 4).load(Ordering::Acquire))
        });
        match role.leaf_of(gpte) {
            Some((gfn, rights)) if self.frames.gfn(spte.mfn()) == Some(gfn) => {
                let excess = (spte.is_writable() && !rights.writable)
                    || (spte.is_executable() && !rights.executable)
                    || (spte.is_global() && !rights.global);
                if excess {
                    self.narrow_leaf(at, rights);
                }
                excess
            }
            _ => {
                self.zap_leaf(at);
                true
            }
        }
    }

    /// INVLPG: takes away the spte for `gva`, the kernel's and the user's, in every place where a root of this mode will
    /// find it. It is gone though the guest's entry may still justify it: to compare costs more than to make it again.
    pub(crate) fn drop_address(&self, vcpu: &Vcpu, gva: Gva) {
        let mut fenced = false;
        for user in [false, true] {
            // The guest's store to its entry is visible by now: a page that comes to be reads the new one.
            if user && fenced && self.has_no_user_page(vcpu, gva) {
                break;
            }
            let Some(slot) = self.find_page(vcpu, user, gva) else { continue };
            let page = self.pages.lock(slot, false);
            fenced = true;
            // Under the page's lock: a fill by another vCPU comes before, and goes, or reads the guest's entry after.
            if page.key.is_some_and(|key| key.role.shape == Shape::Table) {
                self.zap_leaf(self.pages.mfn(slot).at(l1_index(gva) * 8));
            }
        }
    }

    /// True where user code reaches no first-level page by `gva`: most addresses that a kernel flushes are its own.
    fn has_no_user_page(&self, vcpu: &Vcpu, gva: Gva) -> bool {
        let directory = vcpu.directory(gva).filter(|_| vcpu.mode.paging);
        directory.is_none_or(|gfn| self.pages.has_no_user(directory_key(vcpu.mode, true, gfn, gva)))
    }

    /// Counts a resynchronisation. True when the table has been clean for long enough to be tracked again.
    fn note_synced(&self, gfn: Gfn, changed: bool) -> bool {
        let mut list = self.unsync.lock();
        let Some(entry) = list.iter_mut().find(|u| u.gfn == gfn) else { return false };
        entry.clean = if changed { 0 } else { entry.clean + 1 };
        entry.clean >= CLEAN_MAX
    }

    /// Write-protects an unsync table again: protect, shoot down, and only then compare for the last time, so
    /// that no store through an old writable translation is missed. May sleep.
    fn track_again(&self, vcpu: &Vcpu, gfn: Gfn) {
        let owed = {
            let _shard = self.pages.shard(gfn);
            let PageState::Resident(mfn) = self.p2m.lookup(gfn) else { return };
            let bucket = self.buckets.lock(gfn);
            self.frames.change_flags(mfn, UNSYNC, 0);
            self.write_protect(&bucket, gfn, mfn)
        };
        if let Some(owed) = owed {
            self.shoot_down_protected(Cause::Track, &owed, vcpu.id);
        }
        if self.rules.keep(Rule::SyncAtTracking) {
            self.sync_table(vcpu, gfn);
        } else {
            self.drop_if_synced(gfn);
        }
    }

    /// Unshadows an unsync table that nothing links to any more.
    fn unshadow_unsync(&self, gfn: Gfn) {
        self.unshadow(gfn);
        self.drop_if_synced(gfn);
    }

    /// Takes a table off the list unless it is (again) unsync. The flag and the list change together, under
    /// bucket(gfn): another vCPU may be making it unsync again right now.
    fn drop_if_synced(&self, gfn: Gfn) {
        let _bucket = self.buckets.lock(gfn);
        if !self.is_unsync(gfn) {
            self.forget_unsync(gfn);
        }
    }

    /// Puts a table on the list. It may still be there: another vCPU has begun to track it again, and will find it unsync.
    /// Caller holds bucket(gfn) and has set its flag.
    fn list_unsync(&self, gfn: Gfn) {
        let mut list = self.unsync.lock();
        match list.iter_mut().find(|u| u.gfn == gfn) {
            Some(listed) => listed.clean = 0,
            None => list.push(Unsync { gfn, clean: 0 }),
        }
    }

    /// Takes a table off the list. Caller holds bucket(gfn) and has cleared its flag.
    pub(crate) fn forget_unsync(&self, gfn: Gfn) {
        self.unsync.lock().retain(|u| u.gfn != gfn);
    }

    /// True when the table is unsync, or was and has not been brought up to date since.
    pub(crate) fn is_listed(&self, gfn: Gfn) -> bool {
        self.unsync.lock().iter().any(|u| u.gfn == gfn)
    }

    /// True when stores to the table are not tracked now.
    fn is_unsync(&self, gfn: Gfn) -> bool {
        match self.p2m.lookup(gfn) {
            PageState::Resident(mfn) => self.frames.flags(mfn) & UNSYNC != 0,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Machine, NoVcpus};

    #[test]
    fn a_table_that_becomes_unsync_while_it_is_tracked_again_is_listed_once() {
        let config = Config { shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(4) };
        let mmu = Mmu::new(Machine::anonymous(16), config, Box::new(NoVcpus));
        let (vcpu, gfn) = (mmu.vcpu(0), Gfn(1));
        let PageState::Resident(mfn) = mmu.resident(gfn) else { panic!("there are frames") };
        mmu.frames.change_flags(mfn, 0, SHADOWED);
        assert!(mmu.try_unsync(&vcpu, gfn, Gva(0)));
        // The first half of `track_again`, by another vCPU.
        mmu.frames.change_flags(mfn, UNSYNC, 0);
        assert!(mmu.try_unsync(&vcpu, gfn, Gva(0)));
        assert_eq!(mmu.usage().unsync, 1);
    }
}
