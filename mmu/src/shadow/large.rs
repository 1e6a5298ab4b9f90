//! Large leaves: an spte of the second level for all of a huge range.
//!
//! Story: where the guest maps a range large (2 MiB, or half of 4 MiB), or has paging off, and the p2m says that the range is huge
//! ([`crate::collapse`]), [`Mmu::map_large`] maps it by one spte where else there would be a link to a page of 512. Whoever takes one of
//! its pages breaks the range up first ([`Mmu::break_up`]), and that takes all its large leaves away.
//!
//! Holds: INV-RMAP-2, a large leaf is present if and only if it is on the list of its range, once; both change under the list's lock. It
//! is made only while the range is huge, looked at under that lock: that is its gate. INV-HUGE-3, when a range is found not to be huge,
//! its large leaves are gone and the debt for them is on all its frames: who breaks it up does that first, and changes the word then.
//!
//! Locks: the directory's page, or a bucket; then [`lock_order::LARGE`].
//!
//! Limits: accessed bits are the range's. One that is found set counts for each of its pages once.

use crate::Mmu;
use crate::addr::{Gfn, Gva, Mfn, Mpa};
use crate::coherence::Removal;
use crate::lock_order;
use crate::p2m::{Generations, Range, TABLE_ENTRIES};
use crate::rules::Rule;
use crate::shadow::RootRef;
use crate::shadow::leaf::Mapped;
use crate::shadow::role::{LeafRights, directory_key};
use crate::spte::{Spte, l2_index, l3_index};
use crate::sync::{AtomicU32, Lock, Ordering};
use crate::vcpu::Vcpu;
use crate::walk::{PageSize, Translation};

/// Pages of a range.
const PAGES: u32 = TABLE_ENTRIES as u32;

/// What maps a range large.
#[derive(Debug)]
struct Leaves {
    list: Lock<Vec<Mpa>>,
    /// Pages for which an accessed bit that was found set still counts.
    credit: AtomicU32,
}

/// Large leaves, by range; of none where there are no blocks.
#[derive(Debug)]
pub(crate) struct Larges(Box<[Leaves]>);

impl Larges {
    pub fn new(ranges: u32) -> Larges {
        let leaves = |_| Leaves { list: Lock::new(lock_order::LARGE, Vec::new()), credit: AtomicU32::new(0) };
        Larges((0..ranges).map(leaves).collect())
    }

    fn of(&self, gfn: Gfn) -> Option<&Leaves> {
        self.0.get((gfn.0 / PAGES) as usize)
    }

    /// Every leaf on a list, for the audit.
    pub fn all(&self) -> Vec<(Gfn, Mpa)> {
        let of_one = |(n, leaves): (usize, &Leaves)| {
            let first = Gfn(n as u32 * PAGES);
            leaves.list.lock().iter().map(|at| (first, *at)).collect::<Vec<_>>()
        };
        self.0.iter().enumerate().flat_map(of_one).collect()
    }
}

/// A large leaf as it was set or found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LargeLeaf {
    pub spte: Spte,
    /// The first page of its range.
    pub first: Gfn,
    pub generations: Generations,
    /// [`crate::p2m::P2m::advances`] then.
    pub checked: u64,
}

impl Mmu {
    /// Maps what `t` says by a large leaf; `None` where that is not to be had.
    pub(crate) fn map_large(
        &self,
        vcpu: &Vcpu,
        root: RootRef,
        t: &Translation,
        rights: LeafRights,
        user: bool,
    ) -> Option<Mapped> {
        let first = Gfn(t.gpa.gfn().0 / PAGES * PAGES);
        let leaves = self.larges.of(first).filter(|_| t.size != PageSize::Small && !cfg!(loom))?;
        let Range::Huge(base) = self.p2m.range(first) else { return None };
        let directory_gfn = t.directory.map_or(Gfn(0), |step| step.table);
        let key = directory_key(vcpu.mode, user, directory_gfn, t.gva);
        let slot = match self.link_directory(vcpu, root, t, key) {
            Ok(slot) => slot,
            Err(end) => return Some(end),
        };
        let mut page = self.pages.lock(slot, true);
        let changed = t.directory.is_some_and(|step| !self.is_unchanged(vcpu, step));
        if page.key != Some(key) || (changed && self.rules.keep(Rule::EntryAtFill)) {
            return Some(Mapped::Retry);
        }
        page.writes = 0;
        self.pages.touch(slot);
        let at = self.pages.mfn(slot).at(l2_index(t.gva) * 8);
        let old = self.spte(at);
        if old.is_present() && !(old.is_large() && old.mfn() == base) {
            self.unlink(at, false);
        }
        let global = t.directory.is_some_and(|step| step.gpte.is_global());
        let new = Spte::large(base, rights.writable, rights.executable).with_global(global);
        let mut list = leaves.list.lock();
        if self.p2m.range(first) != Range::Huge(base) {
            return None;
        }
        let checked = self.p2m.advances();
        let generations = self.p2m.range_generations(first);
        let old = self.spte(at);
        if old != new {
            let narrowed = old.is_present()
                && (old.is_writable() && !new.is_writable() || old.is_executable() && !new.is_executable());
            let removal = narrowed.then(|| self.coherence.removal());
            self.store_spte(at, new);
            if !old.is_present() {
                list.push(at);
            }
            if let Some(removal) = removal {
                self.owe_range(removal, base, Rule::DebtOfFill);
            }
        }
        drop(list);
        self.note_filled(vcpu, t.gpa.gfn());
        if let Some(tlb) = &vcpu.tlb {
            tlb.learn_large(root, t.gva, &LargeLeaf { spte: new, first, generations, checked });
        }
        Some(Mapped::Done { changed: old != new, writable: new.is_writable() })
    }

    /// The large leaf of `gva`, for whoever only looks: not as hardware would, so that it is not used by that. From outside the guest.
    pub(crate) fn look_at_large(&self, root: RootRef, gva: Gva) -> Option<Spte> {
        let slot = self.child(root.pdpt.at(l3_index(gva) * 8))?;
        // Its frame stays what it is under the lock.
        let page = self.pages.lock(slot, true);
        let lives = page.key.is_some_and(|key| key.role.is_directory());
        let spte = lives.then(|| self.spte(self.pages.mfn(slot).at(l2_index(gva) * 8)))?;
        spte.is_large().then_some(spte)
    }

    /// Walks the shadow for `gva` as hardware would, to a large leaf. `None` where it has none there. From inside the guest, where no frame
    /// of a table that a vCPU may still reach is given back.
    pub(crate) fn find_large(&self, root: RootRef, gva: Gva) -> Option<LargeLeaf> {
        let directory = self.spte(root.pdpt.at(l3_index(gva) * 8));
        let at = directory.mfn().at(l2_index(gva) * 8);
        let seen = if directory.is_present() { self.spte(at) } else { Spte::ABSENT };
        let first = self.frames.range_of(seen.is_large().then(|| seen.mfn())?)?;
        let _list = self.larges.of(first)?.list.lock();
        let (checked, spte) = (self.p2m.advances(), self.spte(at));
        if !spte.is_large() || spte.mfn() != seen.mfn() {
            return None;
        }
        self.machine.word64(at).fetch_or(Spte::ACCESSED, Ordering::AcqRel);
        Some(LargeLeaf { spte, first, generations: self.p2m.range_generations(first), checked })
    }

    /// Removes the large leaf at `at`, if there is one. Caller holds the page it is in, or is about to end it.
    pub(crate) fn zap_large(&self, at: Mpa) {
        let seen = self.spte(at);
        let first = if seen.is_large() { self.frames.range_of(seen.mfn()) } else { None };
        let Some(leaves) = first.and_then(|first| self.larges.of(first)) else { return };
        let mut list = leaves.list.lock();
        let spte = self.spte(at);
        if spte.is_large() {
            let removal = self.coherence.removal();
            self.store_spte(at, Spte::ABSENT);
            list.retain(|other| *other != at);
            self.owe_range(removal, spte.mfn(), Rule::DebtOfZap);
        }
    }

    /// Breaks the range of a page up that is taken, or marked: what it was. Caller holds bucket(gfn).
    pub(crate) fn break_up(&self, gfn: Gfn) -> Range {
        loop {
            let range = self.p2m.range(gfn);
            let done = match range {
                Range::Nothing | Range::Table => true,
                Range::Moving(_) => self.p2m.break_up(gfn, range),
                Range::Huge(base) => self.split_range(gfn, base),
            };
            if done {
                return range;
            }
        }
    }

    /// Takes the large leaves of a huge range away, and makes it a table then; false where another was faster.
    fn split_range(&self, gfn: Gfn, base: Mfn) -> bool {
        let Some(leaves) = self.larges.of(gfn) else { return true };
        let mut list = leaves.list.lock();
        if !list.is_empty() {
            let removal = self.coherence.removal();
            list.drain(..).for_each(|at| self.store_spte(at, Spte::ABSENT));
            self.owe_range(removal, base, Rule::DebtOfSplit);
        }
        leaves.credit.store(0, Ordering::Relaxed);
        let split = self.p2m.break_up(gfn, Range::Huge(base));
        self.note_split(split);
        split
    }

    /// The debt of a removal of large leaves is every page's.
    fn owe_range(&self, removal: Removal<'_>, base: Mfn, rule: Rule) {
        let frames = || (base.0..base.0 + PAGES).map(Mfn);
        if let Some(stamp) = removal.by(rule).map(|removal| removal.stamp_leaves(frames())) {
            frames().for_each(|mfn| self.frames.owe(mfn, stamp));
        }
    }

    /// The page may be mapped by a large leaf.
    #[inline]
    pub(crate) fn is_huge(&self, gfn: Gfn) -> bool {
        self.config.blocks && !cfg!(loom) && matches!(self.p2m.range(gfn), Range::Huge(_))
    }

    /// Some large leaf maps the page.
    pub(crate) fn is_mapped_large(&self, gfn: Gfn) -> bool {
        self.larges.of(gfn).is_some_and(|leaves| !leaves.list.lock().is_empty())
    }

    /// Was the page, or one of its range, used through a large leaf? Clears their accessed bits; `cleared` where there was one. Caller
    /// holds bucket(gfn).
    pub(crate) fn clear_young_large(&self, gfn: Gfn, cleared: &mut bool) -> bool {
        let Some(leaves) = self.larges.of(gfn) else { return false };
        let list = leaves.list.lock();
        let young = list.iter().filter(|at| self.spte(**at).is_accessed());
        let found = young.map(|at| self.clear_accessed(*at)).count();
        drop(list);
        if found > 0 {
            *cleared = true;
            leaves.credit.store(PAGES - 1, Ordering::Relaxed);
            return true;
        }
        let spend = |credit: u32| credit.checked_sub(1);
        leaves.credit.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
    }
}
