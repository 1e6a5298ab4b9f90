//! Refills: what most misses of a software TLB ask for, answered without a walk from the top.
//!
//! Story: a miss ([`crate::Miss::Fault`]) comes here first. [`Mmu::tlb_refill`] follows the shadow's links to the first-level
//! page, locks it and reads one entry of the guest's; that entry says what becomes of the access: a leaf, or the guest's
//! own fault. All else is [`Mmu::fault`]'s business.
//!
//! Why the directory entry needs no look: a link is there only while the guest's entry calls for it (INV-SYNC-3: present,
//! accessed, this table, these rights), whoever changes that entry takes the link away, and a link changes only under
//! the lock of the page it leads to (INV-SHADOW-2).
//!
//! Holds: no guest entry is changed: what wants an A or D bit goes the long way. Never sleeps; for a fault of the
//! guest's it waits for stores under way (stores).
//!
//! Locks: the first-level page, then bucket(gfn). The link is looked at again once the page is held: before, its slot may
//! have served another.

use crate::Mmu;
use crate::access::{Access, AccessKind, FaultCode, PageFault};
use crate::addr::{Gfn, Gva};
use crate::bucket::Sequence;
use crate::fault::fixed;
use crate::shadow::RootRef;
use crate::shadow::leaf::{Mapped, Place};
use crate::shadow::role::{Key, LeafRights, Shape, effective_mode, leaf_rights, table_key};
use crate::spte::Spte;
use crate::vcpu::Vcpu;
use crate::walk::{Touch, fault_code, is_allowed};

/// What became of a miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refill {
    /// The leaf is there, and the TLB has it.
    Done,
    /// The guest must see this fault.
    Guest(PageFault),
    /// [`Mmu::fault`] must see to it.
    Beyond,
}

/// The same, before it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Linked {
    Mapped(Mapped),
    Fault(FaultCode),
    Beyond,
}

impl Mmu {
    /// Makes a leaf for `gva`, and an entry of the TLB, or finds that the access is a fault of the guest's, where the
    /// shadow's tables are there and the guest's entry needs no A or D bit. The vCPU is inside the guest (INV-SHADOW-5), or
    /// nothing else runs. Who has asked for this page has it now, and asks until it leaves; of others a refill says nothing.
    pub fn tlb_refill(&self, vcpu: &Vcpu, gva: Gva, access: Access) -> Refill {
        let store = access.kind == AccessKind::Write;
        let refill = match self.map_linked(vcpu, gva, access) {
            Linked::Mapped(Mapped::Done { changed, writable }) if writable || !store => {
                fixed(vcpu, gva, changed);
                Refill::Done
            }
            // Where hardware runs the vCPU too, it may owe a flush for what is forgotten.
            Linked::Fault(code) if !vcpu.hardware => {
                let fault = PageFault { gva, code };
                self.guest_fault(vcpu, fault);
                Refill::Guest(fault)
            }
            _ => return Refill::Beyond,
        };
        vcpu.count(|s| s.taken += 1);
        refill
    }

    fn map_linked(&self, vcpu: &Vcpu, gva: Gva, access: Access) -> Linked {
        let user = access.user && vcpu.mode.paging;
        let seen = self.buckets.sequence();
        let Some(root) = vcpu.roots[usize::from(user)].get() else { return Linked::Beyond };
        match self.find_link(root, gva) {
            Some(link) => self.map_below(vcpu, (root, link), gva, access, seen),
            None => Linked::Beyond,
        }
    }

    /// The same by the `link` that was found below `root`.
    #[inline]
    fn map_below(
        &self,
        vcpu: &Vcpu,
        (root, link): (RootRef, Spte),
        gva: Gva,
        access: Access,
        seen: Sequence,
    ) -> Linked {
        let Some(slot) = self.slot_of(link) else { return Linked::Beyond };
        let page = self.pages.lock(slot, false);
        let Some(key) = page.key else { return Linked::Beyond };
        if key.role.shape != Shape::Table {
            return self.map_part(vcpu, Place { root, slot, key }, gva, access, seen);
        }
        if self.find_link(root, gva) != Some(link) {
            return Linked::Beyond;
        }
        match self.judge_entry(vcpu, key, gva, access) {
            Ok((gfn, rights)) => {
                let store = access.kind == AccessKind::Write;
                Linked::Mapped(self.map_in(vcpu, Place { root, slot, key }, gva, gfn, rights, (seen, store)))
            }
            Err(end) => end,
        }
    }

    /// What the guest's entry for `gva` in the table of `key`, whose page the caller has locked, says of `access`.
    #[inline]
    fn judge_entry(
        &self,
        vcpu: &Vcpu,
        key: Key,
        gva: Gva,
        access: Access,
    ) -> Result<(Gfn, LeafRights), Linked> {
        let mode = vcpu.mode;
        debug_assert_eq!(key.role.mode, crate::Mode { pse: false, ..effective_mode(mode, key.role.user) });
        let gpte =
            self.gpte(vcpu, Touch::Look, key.gfn, mode.table_index(gva)).map_err(|_| Linked::Beyond)?;
        let fault = |code| Err(Linked::Fault(fault_code(mode, access) | code));
        if !gpte.is_present() {
            return fault(FaultCode::empty());
        }
        if gpte.has_reserved_bits(mode, false) {
            return fault(FaultCode::PRESENT | FaultCode::RESERVED);
        }
        let rights = key.role.rights.and(gpte.rights(mode));
        if !is_allowed(mode, access, rights) {
            return fault(FaultCode::PRESENT);
        }
        let clean = access.kind == AccessKind::Write && !gpte.is_dirty();
        if clean || !gpte.is_accessed() {
            return Err(Linked::Beyond);
        }
        let leaf =
            leaf_rights(key.role.mode, key.role.user, rights, gpte.is_dirty()).ok_or(Linked::Beyond)?;
        Ok((gpte.gfn(mode), LeafRights { global: gpte.is_global(), ..leaf }))
    }

    /// The same for a part of a large page, or without paging: the directory entry is the last, and has to be looked at.
    #[cold]
    #[inline(never)]
    fn map_part(&self, vcpu: &Vcpu, place: Place, gva: Gva, access: Access, seen: Sequence) -> Linked {
        let (user, store) = (access.user && vcpu.mode.paging, access.kind == AccessKind::Write);
        let Ok(t) = self.walk(vcpu, gva, Access::read(user), Touch::Look) else { return Linked::Beyond };
        let used = [t.directory, t.table].into_iter().flatten().all(|step| step.gpte.is_accessed());
        let allowed = is_allowed(vcpu.mode, access, t.rights) && (t.dirty || !store);
        // One leaf for all of it, in the place of the link, is made outside.
        if self.is_huge(t.gpa.gfn()) {
            return Linked::Beyond;
        }
        if !used || !allowed || table_key(vcpu.mode, user, &t) != Some(place.key) {
            return Linked::Beyond;
        }
        match leaf_rights(effective_mode(vcpu.mode, user), user, t.rights, t.dirty) {
            Some(rights) => Linked::Mapped(self.map_in(vcpu, place, gva, t.gpa.gfn(), rights, (seen, store))),
            None => Linked::Beyond,
        }
    }
}

#[cfg(test)]
#[path = "refill_tests.rs"]
mod tests;
