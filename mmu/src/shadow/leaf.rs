//! Leaf sptes: made in one place, taken away in one place.
//!
//! Story: [`Mmu::map`] ends every fill and prefill but refills. It finds (or builds) the first-level page for a translation
//! and sets the leaf in one critical section of bucket(gfn), where the gate is checked. [`Mmu::zap_leaf`] is its
//! opposite.
//!
//! Holds: INV-RMAP-1 and INV-GATE-1 (bucket), and INV-TRACK-1: no spte to a tracked frame is writable.
//!
//! Locks: the first-level page, then bucket(gfn). Replacing a leaf is zap, then map.

use crate::Mmu;
use crate::access::{Access, AccessKind};
use crate::addr::{Gfn, Gva, Mfn, Mpa};
use crate::bucket::{BucketGuard, Link, Sequence};
use crate::coherence::Removal;
use crate::format::STATUS_BITS;
use crate::frames::{DIRTY, FrameKind, SHADOWED, UNSYNC, WATCHED};
use crate::p2m::{Generations, PageState};
use crate::rules::Rule;
use crate::shadow::RootRef;
use crate::shadow::role::{Key, LeafRights, Shape, effective_mode, leaf_rights, table_key};
use crate::spte::{Spte, l1_index, l2_index, l3_index};
use crate::sync::{Ordering, point};
use crate::vcpu::Vcpu;
use crate::walk::{PageSize, Step, Translation};

/// How an attempt to map ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// The spte is there; `changed` unless it was before.
    Done { changed: bool, writable: bool },
    /// Code of this privilege may not touch the page at all.
    Absent,
    /// The frame is a device.
    Device,
    /// Something changed under us: walk again.
    Retry,
    /// The gate of this frame is closed.
    Gate(Gfn),
    /// This frame must be made resident first.
    Need(Gfn),
}

/// A first-level page, and the root that it was found under.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub root: RootRef,
    pub slot: u32,
    pub key: Key,
}

/// A page that was write-protected, and that a TLB may still let be written: a shootdown is owed
/// ([`Mmu::shoot_down_protected`]).
#[derive(Debug)]
#[must_use]
pub(crate) struct Protected {
    gfn: Gfn,
    mfn: Mfn,
    /// The frame's debt then.
    debt: u64,
}

impl Protected {
    /// The page.
    pub fn gfn(&self) -> Gfn {
        self.gfn
    }

    /// What is owed.
    pub fn debt(&self) -> u64 {
        self.debt
    }
}

/// A leaf as it was set, with its generations of that moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaf {
    /// It was not so before.
    pub changed: bool,
    pub spte: Spte,
    pub gfn: Gfn,
    pub generations: Generations,
    /// [`crate::p2m::P2m::advances`] then.
    pub checked: u64,
}

impl Mmu {
    /// Maps what `t` says for `access`; `seen` was read before the walk.
    pub(crate) fn map(&self, vcpu: &Vcpu, t: &Translation, seen: Sequence, access: Access) -> Mapped {
        let (user, store) = (access.user && vcpu.mode.paging, access.kind == AccessKind::Write);
        let mode = effective_mode(vcpu.mode, user);
        point();
        let (Some(key), Some(rights)) =
            (table_key(vcpu.mode, user, t), leaf_rights(mode, user, t.rights, t.dirty))
        else {
            return Mapped::Absent;
        };
        let gfn = t.gpa.gfn();
        let Some(root) = self.root(vcpu, user) else { return Mapped::Need(gfn) };
        if t.size != PageSize::Small
            && let Some(end) = self.map_large(vcpu, root, t, rights, user)
        {
            return end;
        }
        let mut slot = self.find_table(root, t.gva);
        for _ in 0..2 {
            let Some(found) = slot else {
                match self.link_table(vcpu, root, t, key, user) {
                    Ok(made) => slot = Some(made),
                    Err(end) => return end,
                }
                continue;
            };
            let page = self.pages.lock(found, false);
            if page.key != Some(key) {
                drop(page);
                slot = None;
                continue;
            }
            // The lock on the page keeps tracked stores to its table away from here on.
            let changed = t.table.is_some_and(|step| !self.is_unchanged(vcpu, step));
            if changed && self.rules.keep(Rule::EntryAtFill) {
                return Mapped::Retry;
            }
            let global = t.table.is_some_and(|step| step.gpte.is_global());
            let rights = LeafRights { global, ..rights };
            return self.map_in(vcpu, Place { root, slot: found, key }, t.gva, gfn, rights, (seen, store));
        }
        Mapped::Retry
    }

    /// Sets the leaf for `gva` in the page at `place`, which the caller has locked. A software TLB learns it at once.
    pub(crate) fn map_in(
        &self,
        vcpu: &Vcpu,
        place: Place,
        gva: Gva,
        gfn: Gfn,
        rights: LeafRights,
        (seen, store): (Sequence, bool),
    ) -> Mapped {
        self.pages.touch(place.slot);
        let at = self.pages.mfn(place.slot).at(l1_index(gva) * 8);
        let leaf = match self.set_leaf(at, gfn, rights, seen, store) {
            Ok(leaf) => leaf,
            Err(end) => return end,
        };
        self.note_filled(vcpu, gfn);
        if let Some(tlb) = &vcpu.tlb {
            tlb.learn(place.root, gva, &leaf, place.key.role.shape == Shape::Linear);
            self.learn_table(tlb, place.root, gva, place.slot);
        }
        Mapped::Done { changed: leaf.changed, writable: leaf.spte.is_writable() }
    }

    /// The first-level page that the hardware would reach for `gva`, if there is one. Holds the directory's lock, so that its
    /// frame stays what it is; the caller locks the slot and checks its key.
    #[inline]
    pub(crate) fn find_table(&self, root: RootRef, gva: Gva) -> Option<u32> {
        self.table_below(self.child(root.pdpt.at(l3_index(gva) * 8))?, gva)
    }

    /// The same below the directory in `slot`, if it still is one.
    #[inline]
    pub(crate) fn table_below(&self, slot: u32, gva: Gva) -> Option<u32> {
        let page = self.pages.lock(slot, true);
        let lives = page.key.is_some_and(|key| key.role.is_directory());
        lives.then(|| self.child(self.pages.mfn(slot).at(l2_index(gva) * 8))).flatten()
    }

    /// The entry that links to that page. Takes no lock: for a vCPU that is inside the guest, where no frame of a table that
    /// it may still reach is given back.
    #[inline]
    pub(crate) fn find_link(&self, root: RootRef, gva: Gva) -> Option<Spte> {
        let directory = self.spte(root.pdpt.at(l3_index(gva) * 8));
        if directory.is_present() { self.find_link_in(directory, gva) } else { None }
    }

    /// The same from the directory that `directory` leads to.
    #[inline]
    pub(crate) fn find_link_in(&self, directory: Spte, gva: Gva) -> Option<Spte> {
        point();
        debug_assert!(
            matches!(self.frames.kind(directory.mfn()), FrameKind::Shadow(_)),
            "INV-SHADOW-5: the frame of a directory was given back under a walk"
        );
        let table = self.spte(directory.mfn().at(l2_index(gva) * 8));
        table.is_present().then_some(table)
    }

    /// The slot of the page that `link` leads to.
    #[inline]
    pub(crate) fn slot_of(&self, link: Spte) -> Option<u32> {
        match self.frames.kind(link.mfn()) {
            FrameKind::Shadow(slot) => Some(slot),
            _ => None,
        }
    }

    /// One entry of a shadow table.
    #[inline]
    pub(crate) fn spte(&self, at: Mpa) -> Spte {
        Spte(self.machine.word64(at).load(Ordering::Acquire))
    }

    /// Stores one. Every change of a shadow entry that somebody may walk is made here.
    #[inline]
    pub(crate) fn store_spte(&self, at: Mpa, spte: Spte) {
        point();
        self.machine.word64(at).store(spte.0, Ordering::Release);
    }

    /// True when the guest's entry still is what the walk saw: A or D may have come, but not gone.
    #[inline]
    pub(crate) fn is_unchanged(&self, vcpu: &Vcpu, step: Step) -> bool {
        self.read_gpte(vcpu, step.table, step.index)
            .is_ok_and(|now| now.0 | STATUS_BITS == step.gpte.0 | STATUS_BITS && step.gpte.0 & !now.0 == 0)
    }

    /// Makes the leaf at `at` map `gfn`. Caller holds the page's lock.
    ///
    /// A page that has a good copy in swap is mapped to be read until somebody stores to it: as long as nobody does, it
    /// can go again without a write.
    fn set_leaf(
        &self,
        at: Mpa,
        gfn: Gfn,
        rights: LeafRights,
        seen: Sequence,
        store: bool,
    ) -> Result<Leaf, Mapped> {
        let old = self.spte(at);
        if old.is_present() && self.frames.gfn(old.mfn()) != Some(gfn) {
            self.zap_leaf(at);
        }
        match self.resident(gfn) {
            PageState::Resident(_) => {}
            PageState::Device => return Err(Mapped::Device),
            _ => return Err(Mapped::Need(gfn)),
        }
        // Without the rule: what was seen before is all that is looked at.
        let before = if self.rules.keep(Rule::GateAtFill) { None } else { self.p2m.resident(gfn) };
        point();
        let mut bucket = self.buckets.lock(gfn);
        if before.is_none() && !bucket.admits(seen) {
            return Err(Mapped::Gate(gfn));
        }
        let now = before.or_else(|| self.p2m.resident(gfn));
        let Some((mfn, generations)) = now else { return Err(Mapped::Retry) };
        let flags = self.frames.flags(mfn);
        let tracked = self.rules.keep(Rule::MarkAtFill) && are_tracked(flags);
        let mut writable = rights.writable && !tracked;
        if writable && flags & DIRTY == 0 {
            writable = store || self.p2m.copy(gfn).is_none();
            if writable {
                self.mark_dirty(&bucket, gfn, mfn);
            }
        }
        let new = Spte::leaf(mfn, writable, rights.executable).with_global(rights.global);
        let old = self.spte(at);
        let checked = self.p2m.advances();
        let leaf = Leaf { changed: old != new, spte: new, gfn, generations, checked };
        if old == new {
            return Ok(leaf);
        }
        let narrowing = is_narrowed(old, new).then(|| self.coherence.removal());
        self.store_spte(at, new);
        if !old.is_present() {
            bucket.link(Link::new(gfn, at));
        }
        if let Some(removal) = narrowing {
            self.note_removal(removal, mfn, Rule::DebtOfFill);
        }
        Ok(leaf)
    }

    /// Removes the leaf at `at`, if it is there. Caller holds the lock of the page it is in, so nothing is made
    /// there meanwhile; an invalidation may be faster, which is fine.
    pub(crate) fn zap_leaf(&self, at: Mpa) {
        let Some((gfn, mut bucket, old)) = self.lock_leaf(at) else { return };
        let removal = self.coherence.removal();
        self.store_spte(at, Spte::ABSENT);
        bucket.unlink(Link::new(gfn, at));
        self.note_removal(removal, old.mfn(), Rule::DebtOfZap);
    }

    /// Stamps what was removed or narrowed of the leaves to `mfn`: its debt.
    #[inline]
    fn note_removal(&self, removal: Removal<'_>, mfn: Mfn, rule: Rule) {
        if let Some(removal) = removal.by(rule) {
            self.frames.owe(mfn, removal.stamp_leaf(mfn));
        }
    }

    /// Replaces the leaf at `at`, which maps the same frame, by one of fewer rights. Caller holds its page.
    pub(crate) fn narrow_leaf(&self, at: Mpa, rights: LeafRights) {
        let Some((_, _bucket, old)) = self.lock_leaf(at) else { return };
        let (writable, executable) =
            (old.is_writable() && rights.writable, old.is_executable() && rights.executable);
        let global = old.is_global() && rights.global;
        let new = Spte::leaf(old.mfn(), writable, executable).with_global(global);
        if new != old {
            let removal = self.coherence.removal();
            self.store_spte(at, new);
            self.note_removal(removal, old.mfn(), Rule::DebtOfNarrowing);
        }
    }

    /// The frame that the leaf at `at` maps, its bucket, locked, and the leaf as it is then: whoever holds only the
    /// bucket may have removed it since the first look, or write-protected it. Caller holds the page.
    fn lock_leaf(&self, at: Mpa) -> Option<(Gfn, BucketGuard<'_>, Spte)> {
        let seen = self.spte(at);
        let gfn = seen.is_present().then(|| self.frames.gfn(seen.mfn())).flatten()?;
        let bucket = self.buckets.lock(gfn);
        let spte = self.spte(at);
        spte.is_present().then_some((gfn, bucket, spte))
    }

    /// Write-protects every spte to `gfn`, in `mfn`, whose stores must be seen from now on. What is owed for it, where some
    /// TLB may still let it be written: through an spte protected now, or through one that was removed before and not
    /// flushed since (TLB debt). Caller holds bucket(gfn) through `bucket`.
    pub(crate) fn write_protect(&self, bucket: &BucketGuard<'_>, gfn: Gfn, mfn: Mfn) -> Option<Protected> {
        if self.rules.keep(Rule::SplitAtProtection) {
            self.break_up(gfn);
        }
        let removal = self.coherence.removal();
        let mut narrowed = false;
        for link in bucket.links_of(gfn) {
            let old = self.spte(link.spte());
            if old.is_writable() {
                self.store_spte(link.spte(), old.write_protected());
                narrowed = true;
            }
        }
        if narrowed {
            self.note_removal(removal, mfn, Rule::DebtOfProtection);
        } else {
            drop(removal);
        }
        let debt = self.frames.debt(mfn);
        if !self.coherence.covered(debt) && self.rules.keep(Rule::DebtAtProtection) {
            return Some(Protected { gfn, mfn, debt });
        }
        if narrowed {
            self.p2m.advance_write_generation(gfn);
        }
        None
    }

    /// No TLB lets the page be written any more: an entry that still does is a missed flush. Nothing is said of a page that is
    /// not tracked now, or of which more was removed meanwhile that is not covered yet.
    pub(crate) fn finish_protected(&self, protected: &Protected) {
        let Protected { gfn, mfn, debt } = *protected;
        let _bucket = self.buckets.lock(gfn);
        let stays = self.p2m.lookup(gfn) == PageState::Resident(mfn) && self.is_tracked(mfn);
        let now = self.frames.debt(mfn);
        if stays && (now == debt || self.coherence.covered(now)) {
            self.p2m.advance_write_generation(gfn);
        }
    }

    /// Removes every spte to `gfn`: the unmap step of an invalidation. The TLBs may hold them on until the debt
    /// that this leaves on the frame is covered. An empty reverse map is fine.
    pub fn zap_frame(&self, gfn: Gfn) {
        let PageState::Resident(mfn) = self.p2m.lookup(gfn) else { return };
        let mut bucket = self.buckets.lock(gfn);
        let removal = self.coherence.removal();
        let mut zapped = false;
        bucket.unlink_all(gfn, |link| {
            self.store_spte(link.spte(), Spte::ABSENT);
            zapped = true;
        });
        // Within the bucket: whoever write-protects next must see the debt.
        if zapped {
            self.note_removal(removal, mfn, Rule::DebtOfZap);
        }
    }

    /// Notes that the page's contents are about to change: what swap has of it is no good any more. Caller holds
    /// bucket(gfn).
    pub(crate) fn mark_dirty(&self, _bucket: &BucketGuard<'_>, gfn: Gfn, mfn: Mfn) {
        self.frames.change_flags(mfn, 0, DIRTY);
        if let Some(slot) = self.p2m.take_copy(gfn) {
            self.swap.abandon(slot);
        }
    }

    /// Clears the accessed bit of a leaf. Caller holds the bucket of its gfn.
    pub(crate) fn clear_accessed(&self, at: Mpa) {
        self.machine.word64(at).fetch_and(!Spte::ACCESSED, Ordering::AcqRel);
    }

    /// True when stores to the frame must be seen by the VMM.
    #[inline]
    pub(crate) fn is_tracked(&self, mfn: Mfn) -> bool {
        are_tracked(self.frames.flags(mfn))
    }
}

/// The flags of a frame whose stores must be seen.
#[inline]
fn are_tracked(flags: u32) -> bool {
    flags & WATCHED != 0 || flags & (SHADOWED | UNSYNC) == SHADOWED
}

fn is_narrowed(old: Spte, new: Spte) -> bool {
    old.is_present()
        && ((old.is_writable() && !new.is_writable()) || (old.is_executable() && !new.is_executable()))
}
