//! Breakpoints by DR0..DR3 and the single-step trap.
//!
//! Holds: with DR7's enable bits clear, the usual case, each access costs one test.
//!
//! See: Intel SDM vol. 3B, 17.2 (debug registers), 17.3 (debug exceptions).

use umbra_mmu::Gva;

use super::{Bus, Core, Exception};
use crate::cpu::{cr4, eflags};

/// DR6.BD: a debug register was touched while DR7.GD was set.
pub(super) const DR6_BD: u32 = 1 << 13;
/// DR6.BS: the single-step trap.
const DR6_BS: u32 = 1 << 14;
/// DR7.GD: touching a debug register is a #DB.
pub(super) const DR7_GD: u32 = 1 << 13;

/// What a breakpoint is asked about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Execute,
    Read,
    Write,
    Port,
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// True where a breakpoint may be met, so that string instructions stop after each iteration.
    pub(super) fn breakpoints_on(&self) -> bool {
        self.cpu.dr[7] & 0xff != 0
    }

    /// The fault of an instruction breakpoint at CS:EIP, with DR6 written.
    pub(super) fn instruction_breakpoint(&mut self) -> Option<Exception> {
        if !self.breakpoints_on() || self.cpu.eflags & eflags::RF != 0 {
            return None;
        }
        let met = self.breakpoints(self.code_address(self.cpu.eip).0, 1, Seen::Execute);
        self.cpu.dr[6] |= met;
        (met != 0).then_some(Exception::DB)
    }

    /// Remembers the data breakpoints that an access meets; the trap follows the instruction.
    pub(super) fn watch(&mut self, gva: Gva, size: u32, write: bool) {
        if self.breakpoints_on() {
            self.met |= self.breakpoints(gva.0, size, if write { Seen::Write } else { Seen::Read });
        }
    }

    /// The same for an access to an I/O port.
    pub(super) fn watch_port(&mut self, port: u16, size: u32) {
        if self.breakpoints_on() && self.cpu.cr4 & cr4::DE != 0 {
            self.met |= self.breakpoints(u32::from(port), size, Seen::Port);
        }
    }

    /// The #DB after an instruction, with DR6 written. It ends a HLT.
    pub(super) fn debug_trap(&mut self, stepped: bool) -> Exception {
        self.cpu.dr[6] |= self.met | if stepped { DR6_BS } else { 0 };
        Exception::DB
    }

    fn breakpoints(&self, address: u32, size: u32, seen: Seen) -> u32 {
        let hit = |n: &u32| self.breakpoint_meets(*n, address, size, seen);
        (0..4).filter(hit).fold(0, |bits, n| bits | 1 << n)
    }

    fn breakpoint_meets(&self, n: u32, address: u32, size: u32, seen: Seen) -> bool {
        let dr7 = self.cpu.dr[7];
        let enabled = dr7 >> (2 * n) & 3 != 0;
        let of_kind = match dr7 >> (16 + 4 * n) & 3 {
            0 => seen == Seen::Execute,
            1 => seen == Seen::Write,
            2 => seen == Seen::Port,
            _ => matches!(seen, Seen::Read | Seen::Write),
        };
        let length = [1, 2, 8, 4][(dr7 >> (18 + 4 * n) & 3) as usize];
        let base = self.cpu.dr[n as usize] & !(length - 1);
        enabled && of_kind && (address.wrapping_sub(base) < length || base.wrapping_sub(address) < size)
    }
}
