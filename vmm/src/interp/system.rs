//! System instructions: descriptor-table registers, HLT, CLI and STI, caches, CPUID and the time-stamp counter.
//!
//! See: Intel SDM vol. 3A, 2.8 (system instruction summary), 5.9 (privileged instructions).

use iced_x86::{Code, Instruction};
use umbra_mmu::{Access, AccessKind};

use super::operand::{EAX, EBX, ECX, EDX};
use super::{Bus, Core, Exception, Exec, Flow, Width, ensure};
use crate::cpu::eflags::{AC, IF};
use crate::cpu::{TableRegister, cr4};

impl<B: Bus + ?Sized> Core<'_, B> {
    /// #GP(0) for everybody but ring 0.
    pub(super) fn require_supervisor(&self) -> Exec {
        ensure(self.cpu.cpl == 0, Exception::gp(0))
    }

    /// #UD in real mode.
    pub(super) fn require_protected(&self) -> Exec {
        ensure(self.cpu.protected(), Exception::UD)
    }

    /// What UMIP takes from users: SGDT, SIDT, SLDT, STR, SMSW.
    pub(super) fn require_umip(&self) -> Exec {
        ensure(self.cpu.cpl == 0 || self.cpu.cr4 & cr4::UMIP == 0, Exception::gp(0))
    }

    /// LGDT and LIDT read a limit and a base, of 24 bits with a 16-bit operand.
    pub(super) fn read_table(&mut self, i: &Instruction) -> Exec<TableRegister> {
        self.require_supervisor()?;
        let (seg, offset) = self.effective(i);
        self.range(seg, offset, 6, AccessKind::Read)?;
        let limit = self.load(seg, offset, Width::B2)? as u16;
        let base = self.load(seg, offset.wrapping_add(2), Width::B4)?;
        let small = matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
        Ok(TableRegister { base: if small { base & 0xff_ffff } else { base }, limit })
    }

    /// LGDT.
    pub(super) fn load_global_table(&mut self, i: &Instruction) -> Exec<Flow> {
        self.cpu.gdtr = self.read_table(i)?;
        Ok(Flow::Next)
    }

    /// LIDT.
    pub(super) fn load_interrupt_table(&mut self, i: &Instruction) -> Exec<Flow> {
        self.cpu.idtr = self.read_table(i)?;
        Ok(Flow::Next)
    }

    /// SGDT and SIDT: six bytes whatever the operand size.
    pub(super) fn store_table(&mut self, i: &Instruction, table: TableRegister) -> Exec<Flow> {
        self.require_umip()?;
        let (seg, offset) = self.effective(i);
        self.probe(seg, offset, 6, AccessKind::Write)?;
        // A word and a dword: the second may be misaligned where the first is not.
        self.linear(seg, offset.wrapping_add(2), Width::B4, AccessKind::Write)?;
        self.store(seg, offset, Width::B2, table.limit.into())?;
        self.store(seg, offset.wrapping_add(2), Width::B4, table.base)?;
        Ok(Flow::Next)
    }

    /// SLDT and STR.
    pub(super) fn store_selector(&mut self, i: &Instruction, selector: u16) -> Exec<Flow> {
        self.require_protected()?;
        self.require_umip()?;
        self.write_selector(i, 0, selector)
    }

    /// HLT.
    pub(super) fn halt(&mut self) -> Exec<Flow> {
        self.require_supervisor()?;
        Ok(Flow::Halt)
    }

    /// INVD and WBINVD: memory is coherent here.
    pub(super) fn flush_caches(&mut self) -> Exec<Flow> {
        self.require_supervisor()?;
        Ok(Flow::Next)
    }

    /// CLFLUSH: a load of a byte, as far as faults go, but that code need not be readable.
    pub(super) fn flush_line(&mut self, i: &Instruction) -> Exec<Flow> {
        let (seg, offset) = self.effective(i);
        let code = self.cpu.protected() && self.cpu.segment(seg).code();
        let gva = self.range(seg, offset, 1, if code { AccessKind::Execute } else { AccessKind::Read })?;
        self.bus.probe(gva, 1, Access::read(self.user()))?;
        Ok(Flow::Next)
    }

    /// INVLPG: no check of segment or page, only of privilege.
    pub(super) fn invalidate_page(&mut self, i: &Instruction) -> Exec<Flow> {
        self.require_supervisor()?;
        let gva = self.effective_linear(i);
        self.bus.invalidate_page(gva);
        Ok(Flow::Next)
    }

    /// CLI and STI: IOPL decides.
    fn set_interrupt_flag(&mut self, open: bool) -> Exec {
        ensure(!self.cpu.protected() || self.cpu.cpl <= self.cpu.iopl(), Exception::gp(0))?;
        self.cpu.eflags = self.cpu.eflags & !IF | if open { IF } else { 0 };
        Ok(())
    }

    /// CLI.
    pub(super) fn close_interrupts(&mut self) -> Exec<Flow> {
        self.set_interrupt_flag(false)?;
        Ok(Flow::Next)
    }

    /// STI: where IF was clear, interrupts wait for one more instruction.
    pub(super) fn open_interrupts(&mut self) -> Exec<Flow> {
        let was_open = self.cpu.eflags & IF != 0;
        self.set_interrupt_flag(true)?;
        Ok(if was_open { Flow::Next } else { Flow::Shadow })
    }

    /// CLAC and STAC: #UD where CPUID offers no SMAP, and for users.
    pub(super) fn set_alignment_flag(&mut self, set: bool) -> Exec<Flow> {
        let offered = self.bus.cpuid(7, 0, self.cpu)[1] & 1 << 20 != 0;
        ensure(offered && self.cpu.cpl == 0, Exception::UD)?;
        let flags = self.cpu.eflags & !AC | if set { AC } else { 0 };
        self.commit_flags(flags)?;
        Ok(Flow::Next)
    }

    /// CPUID.
    pub(super) fn cpuid(&mut self) -> Exec<Flow> {
        let [eax, ebx, ecx, edx] = self.bus.cpuid(self.cpu.gpr[EAX], self.cpu.gpr[ECX], self.cpu);
        for (register, value) in [(EAX, eax), (EBX, ebx), (ECX, ecx), (EDX, edx)] {
            self.cpu.gpr[register] = value;
        }
        Ok(Flow::Next)
    }

    /// The time-stamp counter as this CPU sees it.
    pub(super) fn time_stamp(&mut self) -> u64 {
        self.bus.tsc().wrapping_add(self.cpu.msrs.tsc_offset)
    }

    /// RDTSC.
    pub(super) fn read_time_stamp(&mut self) -> Exec<Flow> {
        ensure(self.cpu.cpl == 0 || self.cpu.cr4 & cr4::TSD == 0, Exception::gp(0))?;
        let value = self.time_stamp();
        self.set_edx_eax(value);
        Ok(Flow::Next)
    }

    pub(super) fn set_edx_eax(&mut self, value: u64) {
        self.cpu.gpr[EAX] = value as u32;
        self.cpu.gpr[EDX] = (value >> 32) as u32;
    }
}
