//! A small protected-mode machine: descriptor tables, a TSS, stacks and a page for code.

use super::super::flat::FlatBus;
use super::super::{Delivered, Event, Exception, Step, deliver, step};
use crate::cpu::{CpuState, Seg, Segment, TableRegister};

pub const GDT: u32 = 0x1000;
pub const LDT: u32 = 0x1800;
pub const TSS: u32 = 0x2000;
pub const IDT: u32 = 0x3000;
pub const CODE: u32 = 0x5000;
pub const DATA: u32 = 0x6000;
pub const KERNEL_STACK: u32 = 0x8800;
pub const USER_STACK: u32 = 0xa800;
/// Where gates lead.
pub const HANDLER: u32 = 0x5800;
const MEMORY: usize = 0x10000;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const TASK: u16 = 0x28;
pub const LOCAL: u16 = 0x30;
/// Descriptors from here on are free for a test.
pub const FREE: u16 = 0x38;

/// Descriptor attributes (bits 40..=55, limit bits zero): present, and D/B and G where they are flat.
pub const CODE_0: u16 = 0xc09a;
pub const DATA_0: u16 = 0xc092;
pub const CODE_3: u16 = 0xc0fa;
pub const DATA_3: u16 = 0xc0f2;
pub const TSS_32: u16 = 0x0089;

/// A CPU and its bus.
#[derive(Clone)]
pub struct Machine {
    pub cpu: CpuState,
    pub bus: FlatBus,
}

/// The eight bytes of a segment descriptor.
pub fn descriptor(base: u32, limit: u32, attributes: u16) -> [u8; 8] {
    let low = limit & 0xffff | base << 16;
    let attributes = u32::from(attributes) << 8;
    let high = base >> 16 & 0xff | base & 0xff00_0000 | limit & 0xf_0000 | attributes & 0x00f0_ff00;
    (u64::from(high) << 32 | u64::from(low)).to_le_bytes()
}

/// The eight bytes of a gate; `access` is P, DPL and type.
pub fn gate(selector: u16, offset: u32, access: u8, parameters: u8) -> [u8; 8] {
    let low = u32::from(selector) << 16 | offset & 0xffff;
    let high = offset & 0xffff_0000 | u32::from(access) << 8 | u32::from(parameters);
    (u64::from(high) << 32 | u64::from(low)).to_le_bytes()
}

impl Machine {
    /// At CPL 0 with flat segments, a GDT, an IDT full of 32-bit interrupt gates of DPL 0, and a TSS.
    pub fn kernel() -> Machine {
        let mut bus = FlatBus::new(0, MEMORY);
        let mut cpu = CpuState::flat_protected_mode(CODE);
        cpu.gdtr = TableRegister { base: GDT, limit: 0xff };
        cpu.idtr = TableRegister { base: IDT, limit: 0x7ff };
        cpu.gpr[4] = KERNEL_STACK;
        for (selector, attributes) in
            [(KERNEL_CODE, CODE_0), (KERNEL_DATA, DATA_0), (USER_CODE, CODE_3), (USER_DATA, DATA_3)]
        {
            bus.place(GDT + u32::from(selector & !7), &descriptor(0, 0xfffff, attributes | 1));
        }
        bus.place(GDT + u32::from(TASK), &descriptor(TSS, 0x67, 0x8b));
        cpu.tr = Segment { selector: TASK, base: TSS, limit: 0x67, attributes: 0x8b, unusable: false };
        bus.place(TSS + 4, &KERNEL_STACK.to_le_bytes());
        bus.place(TSS + 8, &KERNEL_DATA.to_le_bytes());
        // The I/O map lies behind the limit: no port is open.
        bus.place(TSS + 0x66, &0x68_u16.to_le_bytes());
        let mut machine = Machine { cpu, bus };
        for vector in 0..=255 {
            machine.set_gate(vector, gate(KERNEL_CODE, HANDLER + u32::from(vector), 0x8e, 0));
        }
        machine
    }

    /// The same at CPL 3.
    pub fn user() -> Machine {
        let mut machine = Machine::kernel();
        let flat = |selector, attributes: u16| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            attributes: attributes | 1,
            unusable: false,
        };
        let data = flat(USER_DATA, DATA_3);
        machine.cpu.seg = [data, flat(USER_CODE, CODE_3), data, data, data, data];
        machine.cpu.gpr[4] = USER_STACK;
        machine.cpu.cpl = 3;
        machine
    }

    /// In real mode, segments at 0, vector table at 0.
    pub fn real() -> Machine {
        let mut machine = Machine::kernel();
        machine.cpu.cr0 &= !1;
        for segment in &mut machine.cpu.seg {
            *segment = Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x93, unusable: false };
        }
        machine.cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
        machine.cpu.gpr[4] = 0x7000;
        machine
    }

    /// Puts a descriptor into the GDT.
    pub fn set_descriptor(&mut self, selector: u16, base: u32, limit: u32, attributes: u16) {
        self.bus.place(GDT + u32::from(selector & !7), &descriptor(base, limit, attributes));
    }

    /// Puts a gate into the IDT.
    pub fn set_gate(&mut self, vector: u8, bytes: [u8; 8]) {
        self.bus.place(IDT + 8 * u32::from(vector), &bytes);
    }

    /// Executes one instruction, put at CS:EIP.
    pub fn run(&mut self, bytes: &[u8]) -> Step {
        let at = self.cpu.segment(Seg::Cs).base.wrapping_add(self.cpu.eip);
        self.bus.place(at, bytes);
        step(&mut self.cpu, &mut self.bus)
    }

    /// Executes the instruction that is there.
    pub fn go(&mut self) -> Step {
        step(&mut self.cpu, &mut self.bus)
    }

    /// As `run`, and says that nothing has changed where there was a fault.
    pub fn fault(&mut self, bytes: &[u8]) -> Exception {
        let before = self.cpu.clone();
        match self.run(bytes) {
            Step::Exception(exception) => {
                assert_eq!(self.cpu, before, "a fault changes nothing");
                exception
            }
            other => panic!("{other:?} instead of a fault"),
        }
    }

    /// As `run`, for what must retire.
    pub fn done(&mut self, bytes: &[u8]) {
        assert_eq!(self.run(bytes), Step::Done, "{bytes:02x?} at {:#x}", self.cpu.eip);
    }

    pub fn deliver(&mut self, event: Event) -> Delivered {
        deliver(&mut self.cpu, &mut self.bus, event)
    }

    /// The dword `n` slots above ESP.
    pub fn stack(&self, n: u32) -> u32 {
        self.bus.dword(self.cpu.gpr[4] + 4 * n)
    }

    pub fn selector(&self, seg: Seg) -> u16 {
        self.cpu.segment(seg).selector
    }
}
