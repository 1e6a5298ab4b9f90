//! A CPU's state for people: what every report of a stopped guest ends with.

use std::fmt;

use super::CpuState;

impl fmt::Display for CpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 8] = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"];
        const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
        for (name, value) in NAMES.iter().zip(self.gpr) {
            write!(f, "{name}={value:08x} ")?;
        }
        writeln!(f, "\neip={:08x} eflags={:08x} cpl={}", self.eip, self.eflags, self.cpl)?;
        for (name, segment) in SEGMENTS.iter().zip(&self.seg) {
            write!(f, "{name}={:04x}[{:08x}+{:08x}] ", segment.selector, segment.base, segment.limit)?;
        }
        writeln!(
            f,
            "\ngdtr={:08x}+{:04x} idtr={:08x}+{:04x} ldtr={:04x} tr={:04x}",
            self.gdtr.base,
            self.gdtr.limit,
            self.idtr.base,
            self.idtr.limit,
            self.ldtr.selector,
            self.tr.selector
        )?;
        write!(
            f,
            "cr0={:08x} cr2={:08x} cr3={:08x} cr4={:08x} efer={:x}{}{}",
            self.cr0,
            self.cr2,
            self.cr3,
            self.cr4,
            self.msrs.efer,
            if self.halted { " halted" } else { "" },
            if self.nmi_blocked { " nmi-blocked" } else { "" },
        )
    }
}
