//! RDMSR and WRMSR: the few registers that this CPU has; any other is a #GP.
//!
//! Limits: there are no MTRRs (MTRRcap is zero) and no x2APIC; IA32_MISC_ENABLE has its fast-string bit only.
//! APIC_BASE can be moved within 36 bits where the bus has a local APIC that follows.
//!
//! See: Intel SDM vol. 4.

use super::operand::{EAX, ECX, EDX};
use super::{Bus, Core, Exception, Exec, Flow, ensure};
use crate::cpu::{CpuState, efer};

const IA32_TIME_STAMP_COUNTER: u32 = 0x10;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_MTRRCAP: u32 = 0xfe;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_PAT: u32 = 0x277;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const IA32_EFER: u32 = 0xc000_0080;

/// What APIC_BASE holds: the boot-CPU bit, the enable bit, an address of 36 bits.
const APIC_BASE_BITS: u64 = 0xf_ffff_f900;
/// Fast string operations.
const MISC_ENABLE_BITS: u64 = 1;

/// True where each of the eight types is one that exists: UC, WC, WT, WP, WB, UC-.
fn is_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// RDMSR.
    pub(super) fn read_msr(&mut self) -> Exec<Flow> {
        self.require_supervisor()?;
        let msrs = self.cpu.msrs;
        let value = match self.cpu.gpr[ECX] {
            IA32_TIME_STAMP_COUNTER => self.time_stamp(),
            IA32_APIC_BASE => msrs.apic_base,
            IA32_MTRRCAP | IA32_MTRR_DEF_TYPE => 0,
            IA32_MISC_ENABLE => msrs.misc_enable,
            IA32_PAT => msrs.pat,
            IA32_EFER => msrs.efer,
            _ => return Err(Exception::gp(0).into()),
        };
        self.set_edx_eax(value);
        Ok(Flow::Next)
    }

    /// WRMSR.
    pub(super) fn write_msr(&mut self) -> Exec<Flow> {
        self.require_supervisor()?;
        let value = u64::from(self.cpu.gpr[EDX]) << 32 | u64::from(self.cpu.gpr[EAX]);
        let legal = match self.cpu.gpr[ECX] {
            IA32_TIME_STAMP_COUNTER => true,
            IA32_APIC_BASE => value & !APIC_BASE_BITS == 0 && self.bus.set_apic_base(value),
            IA32_MISC_ENABLE => value & !MISC_ENABLE_BITS == 0,
            IA32_PAT => is_pat(value),
            IA32_MTRR_DEF_TYPE => value == 0,
            IA32_EFER => value & !self.efer_offered() == 0,
            _ => false,
        };
        ensure(legal, Exception::gp(0))?;
        match self.cpu.gpr[ECX] {
            IA32_TIME_STAMP_COUNTER => self.cpu.msrs.tsc_offset = value.wrapping_sub(self.bus.tsc()),
            IA32_APIC_BASE => self.cpu.msrs.apic_base = value,
            IA32_MISC_ENABLE => self.cpu.msrs.misc_enable = value,
            IA32_PAT => self.cpu.msrs.pat = value,
            IA32_EFER => self.set_efer(value)?,
            _ => {}
        }
        Ok(Flow::Next)
    }

    /// NXE, where CPUID offers NX.
    fn efer_offered(&mut self) -> u64 {
        let [_, _, _, edx] = self.bus.cpuid(0x8000_0001, 0, self.cpu);
        if edx & 1 << 20 != 0 { efer::NXE } else { 0 }
    }

    fn set_efer(&mut self, value: u64) -> Exec {
        let mut after: CpuState = self.cpu.clone();
        after.msrs.efer = value;
        self.bus.set_paging(&after, false)?;
        self.cpu.msrs.efer = value;
        Ok(())
    }
}
