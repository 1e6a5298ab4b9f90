//! What the bus tells the model of the guest's own TLBs, and what it asks it (`--check-guest-tlb`).
//!
//! Story: before an access the model is asked whether the guest may still make it by what it has not flushed; stores, faults, events
//! and changes of control registers it is told, once each. Where there is no model, `judged` is false and an access costs one look
//! at that.
//!
//! Locks: the model's own; none of the MMU's is held.

use umbra_mmu::guest_tlb::{GuestTlb, Memory, Missed, Paging, Site};
use umbra_mmu::{Access, Gpa, Gva, PageFault};

use super::{GuestBus, in_one_page};
use crate::cpu::CpuState;
use crate::interp::{BusError, Width};

impl GuestBus<'_> {
    /// The guest was given an event.
    pub fn event(&self) {
        self.tell(|model, _, site| model.event(site.vcpu));
    }

    /// The guest has executed HLT.
    pub fn halted(&self) {
        self.tell(|model, memory, site| model.halted(memory, site));
    }

    /// Tells the model of the guest's own TLBs, where there is one.
    fn tell<R>(&self, call: impl FnOnce(&GuestTlb, &Memory<'_>, Site) -> R) -> Option<R> {
        let memory = |gpa, buffer: &mut [u8]| self.mmu.read_at_hand(self.vcpu.window(), gpa, buffer);
        self.mmu.guest_tlb().map(|model| call(model, &memory, self.site()))
    }

    /// Where the guest is.
    fn site(&self) -> Site {
        Site { vcpu: self.vcpu.id(), eip: self.eip, instructions: self.executed + self.step }
    }

    /// Has the guest's own flushes judged before an access of so many bytes.
    #[inline(always)]
    pub(super) fn judge(&mut self, gva: Gva, bytes: u32, access: Access) -> Result<(), BusError> {
        if self.judged { self.judge_pages(gva, bytes, access) } else { Ok(()) }
    }

    #[cold]
    #[inline(never)]
    fn judge_pages(&mut self, gva: Gva, bytes: u32, access: Access) -> Result<(), BusError> {
        let last = gva.wrapping_add(bytes.max(1) - 1);
        let pages = [Some(gva), (last.page() != gva.page()).then_some(last)];
        let finding = self.tell(|model, memory, site| {
            let certain = pages.into_iter().flatten().find_map(|at| model.access(memory, site, at, access));
            let suspect = || model.suspected().map(|suspect| Missed::Suspect(Box::new(suspect)));
            certain.map(Missed::Certain).or_else(suspect)
        });
        match finding.flatten() {
            None => Ok(()),
            finding => {
                self.aftermath.finding = finding;
                Err(BusError::Again)
            }
        }
    }

    /// A store by the TLB has been made, all of it in one page.
    #[inline(always)]
    pub(super) fn tell_of_store(&mut self, gva: Gva, bytes: u32, user: bool) {
        if self.judged {
            self.tell_place(gva, bytes, user);
        }
    }

    #[cold]
    #[inline(never)]
    fn tell_place(&mut self, gva: Gva, bytes: u32, user: bool) {
        // A TLB that forgets at random may have, since.
        let place = self.mmu.tlb_place(self.vcpu, gva, user);
        let place = place.or_else(|| self.mmu.translate(self.vcpu, gva, Access::write(user)).ok());
        place.iter().for_each(|gpa| self.tell_stored(*gpa, bytes, user));
    }

    pub(super) fn tell_stored(&self, gpa: Gpa, bytes: u32, user: bool) {
        self.tell(|model, memory, site| model.stored(memory, site, gpa, bytes, user));
    }

    /// The guest gets a page fault.
    pub(super) fn fault(&self, fault: PageFault) -> BusError {
        self.tell(|model, _, site| model.faulted(site.vcpu, fault.gva));
        fault.into()
    }

    /// INVLPG.
    pub(super) fn tell_invalidated(&self, gva: Gva) {
        self.tell(|model, _, site| model.invalidated(site, gva));
    }

    /// [`GuestTlb::epoch`], where there is one.
    pub(super) fn model_epoch(&self) -> u64 {
        self.mmu.guest_tlb().map_or(0, GuestTlb::epoch)
    }

    /// Control registers or the privilege have changed.
    pub(super) fn tell_control(&self, new: &CpuState, flush: bool) {
        let paging = || Paging::of(self.vcpu);
        self.tell(|model, memory, site| model.control(memory, site, paging(), flush, new.cpl == 3));
    }

    #[cold]
    #[inline(never)]
    pub(super) fn read_judged(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        self.judge_pages(gva, width.bytes(), access)?;
        self.read_now(gva, width, access)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn write_judged(
        &mut self,
        gva: Gva,
        width: Width,
        value: u64,
        access: Access,
    ) -> Result<(), BusError> {
        self.judge_pages(gva, width.bytes(), access)?;
        self.write_now(gva, width, value, access)?;
        if in_one_page(gva, width.bytes()) {
            self.tell_place(gva, width.bytes(), access.user);
        }
        Ok(())
    }
}
