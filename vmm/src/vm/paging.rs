//! From control registers to the MMU's words.

use umbra_mmu::Mode;

use crate::cpu::{CpuState, cr0, cr4, efer};

/// The paging mode that the control registers of `cpu` select.
pub fn mode_of(cpu: &CpuState) -> Mode {
    Mode {
        paging: cpu.paging(),
        pae: cpu.cr4 & cr4::PAE != 0,
        pse: cpu.cr4 & cr4::PSE != 0,
        write_protect: cpu.cr0 & cr0::WP != 0,
        no_execute: cpu.msrs.efer & efer::NXE != 0,
        smep: cpu.cr4 & cr4::SMEP != 0,
        global_pages: cpu.cr4 & cr4::PGE != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protection_must_be_on_for_paging() {
        let mut cpu = CpuState::flat_protected_mode(0);
        cpu.cr0 |= cr0::PG | cr0::WP;
        assert!(mode_of(&cpu).paging && mode_of(&cpu).write_protect);
        cpu.cr0 &= !cr0::PE;
        assert!(!mode_of(&cpu).paging);
    }
}
