//! The walker: what the guest's own page tables say of an address.
//!
//! Story: every fill, every emulated access and every prefill begins with a walk. It reads the guest's entries
//! through the window, sets A and D in them as the hardware would, and answers with a [`Translation`] or with the
//! page fault the guest must see. Our walker's error code is the one the guest gets, never the hardware's.
//!
//! Its jobs: (1) the directory entry, (2) the table entry, (3) the judgement, (4) A and D.
//!
//! Holds: a walk is restartable: where a table has no frame it returns [`Refusal::Need`] and has changed nothing
//! but A bits on the way, which the architecture allows at any time. A and D change by compare-and-swap in guest
//! memory, so that a store of another vCPU to the same entry is never lost.
//!
//! Locks: none, but where a two-level walk sets A or D in a frame that is a PAE table too: what it changes there are
//! address bits, so the shadow is told. Does not sleep.
//!
//! A of an upper entry is set when the walk goes on past it, even if it then faults; A and D of the last entry
//! only when the access is allowed. The SDM (4.8) leaves the former open; this is what QEMU does too.
//!
//! A table outside guest memory reads as zeros: not present.

use std::sync::atomic::Ordering;

use crate::Mmu;
use crate::access::{Access, AccessKind, FaultCode, PageFault};
use crate::addr::{Gfn, Gpa, Gva, Mfn};
use crate::format::{Gpte, Mode, Rights, STATUS_BITS};
use crate::frames::WIDE;
use crate::machine::Machine;
use crate::p2m::PageState;
use crate::vcpu::Vcpu;
use crate::window::{Intent, LocalMap, Tag};

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The guest must see this fault.
    Fault(PageFault),
    /// This guest frame must be made resident first; sleep holding nothing, then walk again.
    Need(Gfn),
}

/// An entry that a walk went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The table.
    pub table: Gfn,
    /// Index of the entry in it.
    pub index: u32,
    /// The entry, with A and D as the walk left them.
    pub gpte: Gpte,
}

/// The size of page a translation ended at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// Paging is off: no page at all.
    Direct,
    /// 4 KiB.
    Small,
    /// 2 MiB or 4 MiB.
    Large,
}

/// A checked translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The linear address asked for.
    pub gva: Gva,
    /// Where it leads.
    pub gpa: Gpa,
    /// Directory entry, unless paging is off.
    pub directory: Option<Step>,
    /// Table entry, for a small page.
    pub table: Option<Step>,
    /// What kind of page.
    pub size: PageSize,
    /// Rights above the page table: the directory entry's.
    pub upper: Rights,
    /// Rights of the page: all levels together.
    pub rights: Rights,
    /// D of the page's entry, after this access. True when paging is off.
    pub dirty: bool,
}

/// What a walk may do to the guest's A and D bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// Set them: a real access.
    Set,
    /// Leave everything: a look (explain, prefill). Access rights are not judged either.
    Look,
}

impl Mmu {
    /// Walks the guest's tables for `gva`.
    #[inline]
    pub fn walk(&self, vcpu: &Vcpu, gva: Gva, access: Access, touch: Touch) -> Result<Translation, Refusal> {
        if !vcpu.mode.paging {
            return Ok(untranslated(gva));
        }
        // A compare-and-swap that loses to another writer begins the walk again; each loss is a store by
        // somebody else, so somebody made progress.
        loop {
            if let Some(result) = self.try_walk(vcpu, gva, access, touch)? {
                return Ok(result);
            }
        }
    }

    /// Compiled anew for each caller, who knows what it may touch and what of the translation it looks at.
    #[inline(always)]
    fn try_walk(
        &self,
        vcpu: &Vcpu,
        gva: Gva,
        access: Access,
        touch: Touch,
    ) -> Result<Option<Translation>, Refusal> {
        let mode = vcpu.mode;
        let fault = |code| Refusal::Fault(PageFault { gva, code: fault_code(mode, access) | code });

        // (1) The directory entry.
        let Some(directory) = vcpu.directory(gva) else { return Err(fault(FaultCode::empty())) };
        let index = mode.directory_index(gva);
        let mut pde = Step { table: directory, index, gpte: self.gpte(vcpu, touch, directory, index)? };
        if !pde.gpte.is_present() {
            return Err(fault(FaultCode::empty()));
        }
        let large = pde.gpte.is_large(mode);
        if pde.gpte.has_reserved_bits(mode, large) {
            return Err(fault(FaultCode::PRESENT | FaultCode::RESERVED));
        }
        let upper = pde.gpte.rights(mode);
        if large {
            let offset_mask = if mode.pae { 0x1f_ffff } else { 0x3f_ffff };
            let base = pde.gpte.large_gfn(mode).at(0);
            let judged = self.judge(vcpu, gva, access, touch, upper, &mut pde)?;
            return Ok(judged.then(|| Translation {
                gva,
                gpa: Gpa(base.0 + u64::from(gva.0 & offset_mask)),
                directory: Some(pde),
                table: None,
                size: PageSize::Large,
                upper: Rights::ALL,
                rights: upper,
                dirty: pde.gpte.is_dirty(),
            }));
        }
        if touch == Touch::Set && !self.set_status(vcpu, &mut pde, false)? {
            return Ok(None);
        }

        // (2) The table entry.
        let table = pde.gpte.gfn(mode);
        let index = mode.table_index(gva);
        let mut pte = Step { table, index, gpte: self.gpte(vcpu, touch, table, index)? };
        if !pte.gpte.is_present() {
            return Err(fault(FaultCode::empty()));
        }
        if pte.gpte.has_reserved_bits(mode, false) {
            return Err(fault(FaultCode::PRESENT | FaultCode::RESERVED));
        }
        let rights = upper.and(pte.gpte.rights(mode));
        let judged = self.judge(vcpu, gva, access, touch, rights, &mut pte)?;
        Ok(judged.then(|| Translation {
            gva,
            gpa: pte.gpte.gfn(mode).at(gva.offset()),
            directory: Some(pde),
            table: Some(pte),
            size: PageSize::Small,
            upper,
            rights,
            dirty: pte.gpte.is_dirty(),
        }))
    }

    /// (3) and (4): may the access be made, and if so A and D. False when the entry changed under us.
    #[inline]
    fn judge(
        &self,
        vcpu: &Vcpu,
        gva: Gva,
        access: Access,
        touch: Touch,
        rights: Rights,
        last: &mut Step,
    ) -> Result<bool, Refusal> {
        if touch == Touch::Look {
            return Ok(true);
        }
        if !is_allowed(vcpu.mode, access, rights) {
            let code = fault_code(vcpu.mode, access) | FaultCode::PRESENT;
            return Err(Refusal::Fault(PageFault { gva, code }));
        }
        self.set_status(vcpu, last, access.kind == AccessKind::Write)
    }

    /// Sets A, and D if asked, in the guest's entry. False when somebody changed the entry meanwhile.
    #[inline]
    fn set_status(&self, vcpu: &Vcpu, step: &mut Step, dirty: bool) -> Result<bool, Refusal> {
        let wanted = step.gpte.0 | if dirty { STATUS_BITS } else { STATUS_BITS & 1 << 5 };
        if wanted == step.gpte.0 { Ok(true) } else { self.change_status(vcpu, step, wanted) }
    }

    fn change_status(&self, vcpu: &Vcpu, step: &mut Step, wanted: u64) -> Result<bool, Refusal> {
        let offset = step.index * vcpu.mode.entry_bytes();
        let old = std::mem::replace(&mut step.gpte, Gpte(wanted)).0;
        let map = self.map_page(&vcpu.window, step.table, Tag::Walk, Intent::Write);
        let map = map.map_err(|_| Refusal::Need(step.table))?;
        // Elsewhere A and D take nothing away.
        let _under_way = self.are_address_bits(vcpu.mode, step, &map).then(|| self.stores.begin());
        let swapped = if vcpu.mode.pae {
            let word = map.word64(offset);
            word.compare_exchange(old, wanted, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        } else {
            let word = map.word32(offset);
            word.compare_exchange(old as u32, wanted as u32, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        if swapped {
            self.status_written(vcpu.mode, step, &map, offset);
        }
        Ok(swapped)
    }

    /// A or D has been set in the entry at `offset` of the table that `map` shows.
    fn status_written(&self, mode: Mode, step: &Step, map: &LocalMap<'_>, offset: u32) {
        if self.are_address_bits(mode, step, map) {
            self.table_written(step.table, map.mfn(), offset, 4);
        } else {
            self.frames.code_written(map.mfn());
        }
    }

    /// True where A and D of the entry are bits 5 and 6 of the upper half of a PAE entry, too: address bits.
    fn are_address_bits(&self, mode: Mode, step: &Step, map: &LocalMap<'_>) -> bool {
        !mode.pae && step.index & 1 == 1 && self.frames.flags(map.mfn()) & WIDE != 0
    }

    /// Reads an entry; for a look without a pin, where the frame did not change hands meanwhile.
    #[inline(always)]
    pub(crate) fn gpte(&self, vcpu: &Vcpu, touch: Touch, table: Gfn, index: u32) -> Result<Gpte, Refusal> {
        if touch == Touch::Look
            && !self.windows.is_mapped()
            && let Some((mfn, generation)) = self.p2m.holder(table)
        {
            let gpte = load_gpte(self.windows.memory(), vcpu.mode, mfn, index);
            if self.p2m.holder(table) == Some((mfn, generation)) {
                return Ok(gpte);
            }
        }
        self.read_gpte(vcpu, table, index)
    }

    /// Reads one entry of a guest table; zero where the table lies outside memory.
    #[inline(always)]
    pub(crate) fn read_gpte(&self, vcpu: &Vcpu, table: Gfn, index: u32) -> Result<Gpte, Refusal> {
        match self.map_page(&vcpu.window, table, Tag::Walk, Intent::Read) {
            Ok(map) => {
                let (memory, frame) = map.shown();
                Ok(load_gpte(memory, vcpu.mode, frame, index))
            }
            Err(PageState::Device) => Ok(Gpte(0)),
            Err(_) => Err(Refusal::Need(table)),
        }
    }
}

/// The entry at `index` of the table in a frame of `memory`.
#[inline(always)]
pub(crate) fn load_gpte(memory: &Machine, mode: Mode, frame: Mfn, index: u32) -> Gpte {
    Gpte(if mode.pae {
        memory.word64(frame.at(index * 8)).load(Ordering::Acquire)
    } else {
        u64::from(memory.word32(frame.at(index * 4)).load(Ordering::Acquire))
    })
}

#[inline]
fn untranslated(gva: Gva) -> Translation {
    Translation {
        gva,
        gpa: Gpa(u64::from(gva.0)),
        directory: None,
        table: None,
        size: PageSize::Direct,
        upper: Rights::ALL,
        rights: Rights::ALL,
        dirty: true,
    }
}

/// The bits of an error code that the access alone decides.
#[inline]
pub(crate) fn fault_code(mode: Mode, access: Access) -> FaultCode {
    let mut code = FaultCode::empty();
    code.set(FaultCode::WRITE, access.kind == AccessKind::Write);
    code.set(FaultCode::USER, access.user);
    code.set(FaultCode::FETCH, access.kind == AccessKind::Execute && mode.reports_fetch());
    code
}

/// The access rights of SDM 4.6.1.
#[inline]
pub(crate) fn is_allowed(mode: Mode, access: Access, rights: Rights) -> bool {
    if access.user && !rights.user() {
        return false;
    }
    match access.kind {
        AccessKind::Read => true,
        AccessKind::Write => rights.writable() || (!access.user && !mode.write_protect),
        AccessKind::Execute => rights.executable() && (access.user || !(mode.smep && rights.user())),
    }
}
