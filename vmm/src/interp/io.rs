//! Ports: IN, OUT and who may.
//!
//! See: Intel SDM vol. 1, 19.5 (protected-mode I/O).

use iced_x86::{Instruction, OpKind};
use umbra_mmu::Gva;

use super::operand::{EDX, width_of};
use super::{Bus, Core, Exception, Exec, Flow, Width, ensure};

/// Where a 32-bit TSS has the offset of its I/O map.
const TSS_IO_MAP: u32 = 0x66;

impl<B: Bus + ?Sized> Core<'_, B> {
    /// Faults unless this privilege may touch `width` bytes of ports from `port` on: IOPL, else the TSS's map.
    pub(super) fn check_port(&mut self, port: u16, width: Width) -> Exec {
        if !self.cpu.protected() || self.cpu.cpl <= self.cpu.iopl() {
            return Ok(());
        }
        let tr = self.cpu.tr;
        let has_map = !tr.unusable && matches!(tr.kind(), 9 | 11) && tr.limit > TSS_IO_MAP;
        ensure(has_map, Exception::gp(0))?;
        let map = self.load_implicit(Gva(tr.base.wrapping_add(TSS_IO_MAP)), Width::B2)?;
        let offset = map + u32::from(port) / 8;
        // Two bytes are always read, so both must be inside.
        ensure(offset < tr.limit, Exception::gp(0))?;
        let bits = self.load_implicit(Gva(tr.base.wrapping_add(offset)), Width::B2)? >> (port & 7);
        ensure(bits & ((1 << width.bytes()) - 1) == 0, Exception::gp(0))
    }

    /// Reads a port whose permission was checked.
    pub(super) fn read_port(&mut self, port: u16, width: Width) -> u32 {
        self.watch_port(port, width.bytes());
        self.bus.port_in(port, width) & width.mask()
    }

    /// Writes a port whose permission was checked.
    pub(super) fn write_port(&mut self, port: u16, width: Width, value: u32) {
        self.watch_port(port, width.bytes());
        self.bus.port_out(port, width, value & width.mask());
    }

    fn port(&self, i: &Instruction, op: u32) -> u16 {
        match i.op_kind(op) {
            OpKind::Register => self.cpu.gpr[EDX] as u16,
            _ => u16::from(i.immediate8()),
        }
    }

    /// IN.
    pub(super) fn input(&mut self, i: &Instruction) -> Exec<Flow> {
        let (port, width) = (self.port(i, 1), width_of(i, 0));
        self.check_port(port, width)?;
        let value = self.read_port(port, width);
        self.set_accumulator(width, value);
        Ok(Flow::Next)
    }

    /// OUT.
    pub(super) fn output(&mut self, i: &Instruction) -> Exec<Flow> {
        let (port, width) = (self.port(i, 0), width_of(i, 1));
        self.check_port(port, width)?;
        self.write_port(port, width, self.accumulator(width));
        Ok(Flow::Next)
    }
}
