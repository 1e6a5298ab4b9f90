//! What the guest does to its own paging: control registers and INVLPG.

use crate::Mmu;
use crate::addr::{Gfn, Gpa, Gva};
use crate::events::Event;
use crate::format::{Mode, Pdpte};
use crate::frames::WATCHED;
use crate::p2m::PageState;
use crate::physical::Beyond;
use crate::reclaim::Shortage;
use crate::records::Cause;
use crate::rules::Rule;
use crate::shadow::leaf::Mapped;
use crate::vcpu::Vcpu;
use crate::walk::Touch;
use crate::{Access, Refusal, shadow::role};

/// A page-directory-pointer entry with reserved bits: the instruction that loads it is a #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPdpte {
    /// Which of the four.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// Why CR3 was not loaded; nothing is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotLoaded {
    /// A #GP(0).
    Bad(BadPdpte),
    /// The PDPTEs are in a page that is not in memory: [`Mmu::bring_in`], and again.
    Need(Gfn),
}

/// What a change of control registers asks for beside the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Nothing more (CLTS, a change of CPL).
    No,
    /// The architecture flushes the TLB: MOV CR3, and those changes of CR0, CR4 and EFER that say so.
    Yes,
}

impl Mmu {
    /// Sets the paging mode and CR3 of a vCPU; with `flush`, resynchronises and asks for a TLB flush where
    /// something was removed. PDPTEs are loaded (and checked) when PAE paging is on and `flush` is set: SDM 4.4.1.
    ///
    /// # Errors
    ///
    /// When the new PDPTEs have reserved bits, or are not in memory; nothing is changed then.
    pub fn set_paging(&self, vcpu: &mut Vcpu, mode: Mode, cr3: u32, flush: Flush) -> Result<(), NotLoaded> {
        if mode == vcpu.mode && cr3 == vcpu.cr3 && flush == Flush::No {
            return Ok(());
        }
        let pdptes = match flush {
            Flush::Yes if mode.paging && mode.pae => self.load_pdptes(vcpu, cr3)?,
            _ => vcpu.pdptes,
        };
        let all = mode != vcpu.mode;
        let same_roots = mode == vcpu.mode && pdptes == vcpu.pdptes && (cr3 == vcpu.cr3 || mode.pae);
        (vcpu.mode, vcpu.cr3, vcpu.pdptes) = (mode, cr3, pdptes);
        if !same_roots {
            self.unload_roots(vcpu);
        }
        // Other tables than before, though nothing was flushed: what INVLPG did under the old mode must hold there.
        if flush == Flush::Yes || !same_roots {
            self.await_stores();
            if self.rules.keep(Rule::SyncAtCr3) {
                self.sync_loaded(vcpu);
            }
            self.flush_if_owed(vcpu, Rule::HardwareFlushAtCr3);
            self.tlb_flush_if_owed(vcpu, all);
        }
        Ok(())
    }

    /// The machine address of the PML4 for code of privilege `user`: what CR3 must hold. `None` when the machine
    /// has no frame left for it. May sleep.
    pub fn root_address(&self, vcpu: &Vcpu, user: bool) -> Option<crate::Mpa> {
        self.root(vcpu, user).map(|root| root.pml4.at(0))
    }

    /// INVLPG: brings the sptes for `gva` up to date. For hardware, makes the new one at once where the guest's entry says
    /// that it has been used (A; writable only with D): a kmap then costs one trap and not two. That may sleep; for a vCPU
    /// that no hardware runs nothing does, but to wait for a store under way, and it may be in the guest.
    pub fn invalidate_page(&self, vcpu: &Vcpu, gva: Gva) {
        vcpu.events.borrow_mut().record(gva, Event::Invalidated);
        self.forget_address(vcpu, gva);
        // A page fault forgets the links to one address, INVLPG all.
        if let Some(tlb) = &vcpu.tlb
            && self.rules.keep(Rule::FlushAtInvlpg)
        {
            tlb.flush_links();
        }
        if vcpu.mode.paging && vcpu.hardware {
            self.prefill(vcpu, gva);
        }
    }

    /// Marks a guest frame whose stores the VMM wants to see (descriptor tables in native mode): they come back
    /// as [`crate::Outcome::Emulate`]. The page is brought in, and stays where it is. May sleep. False where there is no
    /// memory.
    ///
    /// # Errors
    ///
    /// When the page cannot be brought in.
    pub fn watch(&self, vcpu: &Vcpu, gfn: Gfn) -> Result<bool, Shortage> {
        loop {
            let mfn = match self.resident(gfn) {
                PageState::Resident(mfn) => mfn,
                PageState::Device => return Ok(false),
                _ => {
                    self.bring_in(Some(vcpu.id), gfn)?;
                    continue;
                }
            };
            let owed = {
                let bucket = self.buckets.lock(gfn);
                if self.p2m.lookup(gfn) != PageState::Resident(mfn) {
                    continue;
                }
                // It stays where it is while it is watched, and a home must be left when its segment goes.
                if self.frames.is_home(mfn) {
                    drop(bucket);
                    self.move_out(Some(vcpu.id), gfn)?;
                    continue;
                }
                self.frames.change_flags(mfn, 0, WATCHED);
                self.write_protect(&bucket, gfn, mfn)
            };
            if let Some(owed) = owed {
                self.shoot_down_protected(Cause::Watch, &owed, vcpu.id);
            }
            return Ok(true);
        }
    }

    /// Ends [`Mmu::watch`].
    pub fn unwatch(&self, gfn: Gfn) {
        // A watched page stays where it is.
        if let PageState::Resident(mfn) = self.p2m.lookup(gfn) {
            let _bucket = self.buckets.lock(gfn);
            self.frames.change_flags(mfn, WATCHED, 0);
        }
    }

    /// True when somebody watches the frame.
    pub fn is_watched(&self, gfn: Gfn) -> bool {
        matches!(self.p2m.lookup(gfn), PageState::Resident(mfn) if self.frames.flags(mfn) & WATCHED != 0)
    }

    fn load_pdptes(&self, vcpu: &Vcpu, cr3: u32) -> Result<[Pdpte; 4], NotLoaded> {
        let mut pdptes = [Pdpte::default(); 4];
        for (index, pdpte) in pdptes.iter_mut().enumerate() {
            let gpa = Gpa(u64::from(cr3 & !0x1f) + 8 * index as u64);
            *pdpte = Pdpte(match self.load(&vcpu.window, gpa, crate::Width::B8) {
                Ok(value) => value,
                // Outside memory reads as zeros: not present.
                Err(Beyond::Device(_)) => 0,
                Err(Beyond::Need(gfn)) => return Err(NotLoaded::Need(gfn)),
            });
            if pdpte.has_reserved_bits() {
                return Err(NotLoaded::Bad(BadPdpte { index: index as u32, value: pdpte.0 }));
            }
        }
        Ok(pdptes)
    }

    /// Makes the vCPU unable to use anything for `gva` that the guest's tables do not say now.
    pub(crate) fn forget_address(&self, vcpu: &Vcpu, gva: Gva) {
        self.await_stores();
        if self.rules.keep(Rule::DropAtInvlpg) {
            self.drop_address(vcpu, gva);
        }
        self.flush_if_owed(vcpu, Rule::HardwareFlushAtInvlpg);
        if let Some(tlb) = &vcpu.tlb
            && self.rules.keep(Rule::FlushAtInvlpg)
        {
            tlb.flush_page(gva);
        }
    }

    /// What the guest may have seen of its tables is applied to the shadow, before it flushes.
    fn await_stores(&self) {
        if self.rules.keep(Rule::AwaitStores) {
            self.stores.wait();
        }
    }

    /// Hardware flushes everything or nothing, and when it enters.
    fn flush_if_owed(&self, vcpu: &Vcpu, rule: Rule) {
        if self.rules.keep(rule) && vcpu.hardware && self.coherence.owes_flush(vcpu.id) {
            self.coherence.request_flush(vcpu.id);
        }
    }

    /// Maps the page into the root of the code that will use it: a user page for user code, else the kernel's.
    fn prefill(&self, vcpu: &Vcpu, gva: Gva) {
        let seen = self.buckets.sequence();
        let look = self.walk(vcpu, gva, Access::read(false), Touch::Look);
        let Ok(t) = look else { return };
        let used = [t.directory, t.table].into_iter().flatten().all(|step| step.gpte.is_accessed());
        if !used {
            return;
        }
        let user = t.rights.user();
        if role::leaf_rights(role::effective_mode(vcpu.mode, user), user, t.rights, t.dirty).is_none() {
            return;
        }
        if let Mapped::Done { changed: true, .. } = self.map(vcpu, &t, seen, Access::read(user)) {
            vcpu.count(|s| s.prefilled += 1);
        }
    }
}

impl Mmu {
    /// Translates for an emulated access, setting A and D as the access itself would. A fault is as
    /// [`crate::Outcome::Guest`]: for the guest to see.
    pub fn translate(&self, vcpu: &Vcpu, gva: Gva, access: Access) -> Result<Gpa, Refusal> {
        match self.walk(vcpu, gva, access, Touch::Set) {
            Ok(t) => Ok(t.gpa),
            Err(refusal) => {
                if let Refusal::Fault(fault) = refusal {
                    self.forget_address(vcpu, fault.gva);
                }
                Err(refusal)
            }
        }
    }
}
