//! Control and debug registers: MOV CRn, MOV DRn, CLTS, LMSW, SMSW.
//!
//! Holds: a CR4 bit can be set if and only if CPUID offers its feature, so that one table decides both.
//!
//! Limits: virtual-8086 extensions (VME, PVI) are never offered; nor are performance counters (PCE).
//!
//! See: Intel SDM vol. 3A, 2.5 (control registers), 4.10.4.1 (what flushes the TLB); vol. 3B, 17.2.

use iced_x86::{Instruction, Register};

use super::debug::{DR6_BD, DR7_GD};
use super::{Bus, Core, Exception, Exec, Flow, Leave, ensure};
use crate::cpu::{CpuState, cr0, cr4};

/// The bits of CR0 that exist; the others are ignored when written. ET is always set.
const CR0_BITS: u32 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// The bits of CR0 whose change flushes the TLB, or loads PAE's directory pointers again (SDM 4.4.1, 4.10.4.1).
const CR0_FLUSHING: u32 = cr0::PE | cr0::PG | cr0::CD | cr0::NW;
/// The bits of CR0 that the bus must hear of.
const CR0_PAGING: u32 = CR0_FLUSHING | cr0::WP;
/// The same of CR4. (SMEP flushes when it is set; clearing it only loads the pointers.)
const CR4_FLUSHING: u32 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP;
/// CR4 bits and the CPUID.1:EDX bits that offer them.
const CR4_OF_LEAF_1: [(u32, u32); 8] = [
    (cr4::TSD, 4),
    (cr4::DE, 2),
    (cr4::PSE, 3),
    (cr4::PAE, 6),
    (cr4::MCE, 7),
    (cr4::PGE, 13),
    (cr4::OSFXSR, 24),
    (cr4::OSXMMEXCPT, 25),
];

/// DR6 and DR7: bits that always read as one, and bits that can be written.
const DR6_ONES: u32 = 0xffff_0ff0;
const DR6_WRITABLE: u32 = 0x0000_e00f;
const DR7_ONES: u32 = 0x0000_0400;
const DR7_WRITABLE: u32 = 0xffff_23ff;

impl<B: Bus + ?Sized> Core<'_, B> {
    /// MOV r32, CRn.
    pub(super) fn mov_from_control(&mut self, i: &Instruction) -> Exec<Flow> {
        let value = match i.op1_register() {
            Register::CR0 => self.cpu.cr0,
            Register::CR2 => self.cpu.cr2,
            Register::CR3 => self.cpu.cr3,
            Register::CR4 => self.cpu.cr4,
            _ => return Err(Exception::UD.into()),
        };
        self.require_supervisor()?;
        self.set_register(i.op0_register(), value);
        Ok(Flow::Next)
    }

    /// MOV CRn, r32.
    pub(super) fn mov_to_control(&mut self, i: &Instruction) -> Exec<Flow> {
        let value = self.register(i.op1_register());
        match i.op0_register() {
            Register::CR0 => self.set_cr0(value),
            Register::CR2 => self.set_cr2(value),
            Register::CR3 => self.set_cr3(value),
            Register::CR4 => self.set_cr4(value),
            _ => Err(Exception::UD.into()),
        }
    }

    fn set_cr0(&mut self, value: u32) -> Exec<Flow> {
        self.require_supervisor()?;
        let value = value & CR0_BITS | cr0::ET;
        ensure(value & cr0::PG == 0 || value & cr0::PE != 0, Exception::gp(0))?;
        ensure(value & cr0::NW == 0 || value & cr0::CD != 0, Exception::gp(0))?;
        let changed = value ^ self.cpu.cr0;
        if changed & CR0_PAGING != 0 {
            let after = CpuState { cr0: value, ..self.cpu.clone() };
            self.bus.set_paging(&after, changed & CR0_FLUSHING != 0)?;
        }
        self.cpu.cr0 = value;
        Ok(Flow::Next)
    }

    fn set_cr2(&mut self, value: u32) -> Exec<Flow> {
        self.require_supervisor()?;
        self.cpu.cr2 = value;
        Ok(Flow::Next)
    }

    fn set_cr3(&mut self, value: u32) -> Exec<Flow> {
        self.require_supervisor()?;
        let after = CpuState { cr3: value, ..self.cpu.clone() };
        self.bus.set_paging(&after, true)?;
        self.cpu.cr3 = value;
        Ok(Flow::Next)
    }

    fn set_cr4(&mut self, value: u32) -> Exec<Flow> {
        self.require_supervisor()?;
        ensure(value & !self.cr4_offered() == 0, Exception::gp(0))?;
        let after = CpuState { cr4: value, ..self.cpu.clone() };
        self.bus.set_paging(&after, (value ^ self.cpu.cr4) & CR4_FLUSHING != 0)?;
        self.cpu.cr4 = value;
        Ok(Flow::Next)
    }

    /// The CR4 bits whose features CPUID offers.
    fn cr4_offered(&mut self) -> u32 {
        let [_, _, _, basic] = self.bus.cpuid(1, 0, self.cpu);
        let [_, extended, extended_c, _] = self.bus.cpuid(7, 0, self.cpu);
        let bit = |offered: bool, bit| if offered { bit } else { 0 };
        let leaf_1 = CR4_OF_LEAF_1.iter().fold(0, |bits, (cr4, n)| bits | bit(basic >> n & 1 != 0, *cr4));
        leaf_1
            | bit(extended >> 7 & 1 != 0, cr4::SMEP)
            | bit(extended >> 20 & 1 != 0, cr4::SMAP)
            | bit(extended_c >> 2 & 1 != 0, cr4::UMIP)
    }

    /// CLTS.
    pub(super) fn clear_task_switched(&mut self) -> Exec<Flow> {
        self.require_supervisor()?;
        self.cpu.cr0 &= !cr0::TS;
        Ok(Flow::Next)
    }

    /// LMSW: the low four bits of CR0; PE can be set by it, not cleared.
    pub(super) fn load_machine_status(&mut self, i: &Instruction) -> Exec<Flow> {
        self.require_supervisor()?;
        let word = u32::from(self.read_selector(i, 0)?);
        let low = cr0::MP | cr0::EM | cr0::TS;
        self.set_cr0(self.cpu.cr0 & !low | word & (low | cr0::PE))
    }

    /// SMSW: CR0, as much of it as the operand holds.
    pub(super) fn store_machine_status(&mut self, i: &Instruction) -> Exec<Flow> {
        self.require_umip()?;
        if i.op0_register().is_gpr32() {
            self.set_register(i.op0_register(), self.cpu.cr0);
            return Ok(Flow::Next);
        }
        self.write_selector(i, 0, self.cpu.cr0 as u16)
    }

    /// The index of a debug register, DR4 and DR5 standing for DR6 and DR7 unless CR4.DE forbids them; all the
    /// checks that every touch of one has to pass.
    fn debug_register(&mut self, register: Register) -> Exec<usize> {
        let n = register.number() & 7;
        let aliased = matches!(n, 4 | 5);
        ensure(!aliased || self.cpu.cr4 & cr4::DE == 0, Exception::UD)?;
        self.require_supervisor()?;
        if self.cpu.dr[7] & DR7_GD != 0 {
            self.cpu.dr[6] |= DR6_BD;
            return Err(Leave::Fault(Exception::DB));
        }
        Ok(if aliased { n + 2 } else { n })
    }

    /// MOV r32, DRn.
    pub(super) fn mov_from_debug(&mut self, i: &Instruction) -> Exec<Flow> {
        let n = self.debug_register(i.op1_register())?;
        self.set_register(i.op0_register(), self.cpu.dr[n]);
        Ok(Flow::Next)
    }

    /// MOV DRn, r32.
    pub(super) fn mov_to_debug(&mut self, i: &Instruction) -> Exec<Flow> {
        let n = self.debug_register(i.op0_register())?;
        let value = self.register(i.op1_register());
        self.cpu.dr[n] = match n {
            6 => value & DR6_WRITABLE | DR6_ONES,
            7 => value & DR7_WRITABLE | DR7_ONES,
            _ => value,
        };
        Ok(Flow::Next)
    }
}
