//! The interpreter's side: a machine that is to a user what the native process is.
//!
//! Story: [`Twin::start`] sets a case up; the caller steps it until it ends. An exception is delivered through an IDT
//! like Linux's, into ring 0, and the frame on the kernel's stack is what the native signal frame is made of; so
//! delivery is compared too.
//!
//! Holds: descriptor tables, TSS and kernel stack lie where no user access finds anything.

use umbra::cpu::{CpuState, Seg, Segment, TableRegister, cr0, cr4};
use umbra::interp::{Bus, BusError, Delivered, Event, Step, Width, deliver, step};
use umbra_mmu::{Access, AccessKind, FaultCode, Gva, PageFault};

use super::case::{Case, Outcome};
use super::layout::*;
use super::segments::{Globals, Ldt};

/// The supervisor's memory.
const TABLES: u32 = 0xf000_0000;
const TABLES_SIZE: usize = 6 * PAGE;
const GDT: u32 = TABLES;
const IDT: u32 = TABLES + 0x1000;
const TSS: u32 = TABLES + 0x2000;
const LDT: u32 = TABLES + 0x3000;
const KERNEL_STACK: u32 = TABLES + 0x5800;
/// EIP of vector 0's handler; the other vectors' follow.
const HANDLERS: u32 = 0xe000_0000;
/// Kernel code and data as Linux has them.
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x18;

/// How a run of the interpreter ended.
pub enum End {
    /// Somewhere in ring 0: an exception or a software interrupt was delivered.
    Delivered(Outcome),
    /// Why there is nothing to compare.
    Not(String),
}

/// Memory as the native process has it.
pub struct Memory {
    pub code: Box<[u8; CODE_SIZE]>,
    pub data: Box<[u8; DATA_SIZE]>,
    tables: Box<[u8; TABLES_SIZE]>,
    strange: Vec<bool>,
    /// Something was touched that the twin has otherwise than the process.
    pub strayed: bool,
}

pub struct Twin {
    pub cpu: CpuState,
    pub memory: Memory,
}

impl Twin {
    pub fn new(globals: &Globals) -> Twin {
        let mut memory = Memory {
            code: Box::new([CODE_FILLER; CODE_SIZE]),
            data: Box::new([0; DATA_SIZE]),
            tables: Box::new([0; TABLES_SIZE]),
            strange: globals.strange.clone(),
            strayed: false,
        };
        for (n, descriptor) in globals.descriptors.iter().enumerate() {
            memory.place(GDT + 8 * n as u32, &descriptor.to_le_bytes());
        }
        memory.place(GDT + u32::from(KERNEL_CODE), &0x00cf_9b00_0000_ffff_u64.to_le_bytes());
        memory.place(GDT + u32::from(KERNEL_DATA), &0x00cf_9300_0000_ffff_u64.to_le_bytes());
        for vector in 0..=255 {
            // Ring 3 may call INT3, INTO and the system call.
            let access: u64 = if matches!(vector, 3 | 4 | 0x80) { 0xee00 } else { 0x8e00 };
            let eip = u64::from(HANDLERS + vector);
            let gate = (eip >> 16 << 16 | access) << 32 | u64::from(KERNEL_CODE) << 16 | eip & 0xffff;
            memory.place(IDT + 8 * vector, &gate.to_le_bytes());
        }
        memory.place(TSS + 4, &KERNEL_STACK.to_le_bytes());
        memory.place(TSS + 8, &KERNEL_DATA.to_le_bytes());
        // The I/O map lies behind the limit: no port is open.
        memory.place(TSS + 0x66, &0x68_u16.to_le_bytes());
        Twin { cpu: CpuState::flat_protected_mode(0), memory }
    }

    pub fn set_ldt(&mut self, ldt: &Ldt) {
        for (n, entry) in ldt.0.iter().enumerate() {
            self.memory.place(LDT + 8 * n as u32, &entry.descriptor().to_le_bytes());
        }
    }

    /// Sets a case up; its code too.
    pub fn start(&mut self, case: &Case, ldt: &Ldt) {
        self.memory.strayed = false;
        self.memory.code.fill(CODE_FILLER);
        let at = case.at as usize;
        self.memory.code[at..at + case.code.len()].copy_from_slice(&case.code);
        case.memory(&mut self.memory.data);
        let mut cpu = CpuState::flat_protected_mode(case.start.eip);
        cpu.cpl = 3;
        cpu.gpr = case.start.gpr;
        // Interrupts are open in a Linux process.
        cpu.eflags = case.start.flags | 0x202;
        cpu.cr0 |= cr0::AM;
        cpu.cr4 = cr4::UMIP | cr4::SMEP | cr4::OSFXSR;
        cpu.gdtr = TableRegister { base: GDT, limit: 0x7f };
        cpu.idtr = TableRegister { base: IDT, limit: 0x7ff };
        let system = |base, limit, attributes| Segment { base, limit, attributes, ..Segment::default() };
        cpu.ldtr = system(LDT, 8 * LDT_ENTRIES as u32 - 1, 0x82);
        cpu.tr = system(TSS, 0x67, 0x8b);
        cpu.seg = case.start.selectors.map(|selector| segment(selector, ldt));
        self.cpu = cpu;
    }

    /// The linear address of the top of the stack.
    pub fn stack_top(&self) -> u32 {
        let ss = self.cpu.segment(Seg::Ss);
        ss.base.wrapping_add(self.cpu.gpr[4] & if ss.big() { u32::MAX } else { 0xffff })
    }

    /// One step. Some(end) where the case is over.
    pub fn step(&mut self) -> Option<End> {
        match step(&mut self.cpu, &mut self.memory) {
            Step::Done => {}
            Step::Exception(exception) => {
                let event = Event::Exception(exception);
                let delivered = deliver(&mut self.cpu, &mut self.memory, event);
                if delivered != Delivered::Handler {
                    return Some(End::Not(format!("{exception:?} came to {delivered:?}")));
                }
                let cr2 = exception.cr2;
                return Some(self.end(exception.error.is_some(), cr2));
            }
            Step::Unknown(unknown) => return Some(End::Not(unknown.what.to_string())),
            other => return Some(End::Not(format!("{other:?}"))),
        }
        (self.cpu.cpl == 0).then(|| self.end(false, None))
    }

    /// What the frame on the kernel's stack says.
    fn end(&self, has_error: bool, cr2: Option<u32>) -> End {
        if self.memory.strayed {
            return End::Not("touched what the twin cannot stand for".to_string());
        }
        let pointer = self.cpu.gpr[4];
        let word = |n: u32| self.memory.table_word(pointer + 4 * n);
        let first = u32::from(has_error);
        let [eip, cs, flags, esp, ss] = [0, 1, 2, 3, 4].map(|n| word(first + n));
        let mut gpr = self.cpu.gpr;
        gpr[4] = esp;
        let mut selectors = self.cpu.seg.map(|segment| segment.selector);
        (selectors[Seg::Cs as usize], selectors[Seg::Ss as usize]) = (cs as u16, ss as u16);
        End::Delivered(Outcome {
            vector: self.cpu.eip - HANDLERS,
            error: if has_error { word(0) } else { 0 },
            cr2,
            gpr,
            eip,
            flags,
            selectors,
            memory: self.memory.data.clone(),
        })
    }
}

/// What a register loaded with `selector`, one that a case may begin with, holds.
fn segment(selector: u16, ldt: &Ldt) -> Segment {
    let flat = |attributes| Segment { selector, base: 0, limit: u32::MAX, attributes, unusable: false };
    match selector {
        USER32_CODE => flat(0xc0fb),
        USER_DATA => flat(0xc0f3),
        0..4 => Segment { selector, unusable: true, ..Segment::default() },
        _ => ldt.find(selector).expect("a case begins with known selectors").segment(selector),
    }
}

impl Memory {
    /// The bytes at `address`, as many as lie in a row.
    fn at(&mut self, address: u32) -> Option<&mut [u8]> {
        let within = |base: u32, size: usize| {
            let offset = address.wrapping_sub(base) as usize;
            (offset < size).then_some(offset)
        };
        if let Some(offset) = within(DATA, DATA_SIZE) {
            return self.data.get_mut(offset..);
        }
        if let Some(offset) = within(CODE, CODE_SIZE) {
            return self.code.get_mut(offset..);
        }
        let offset = within(TABLES, TABLES_SIZE)?;
        self.tables.get_mut(offset..)
    }

    fn place(&mut self, address: u32, bytes: &[u8]) {
        if let Some(place) = self.at(address) {
            place[..bytes.len()].copy_from_slice(bytes);
        }
    }

    fn table_word(&self, address: u32) -> u32 {
        let offset = (address - TABLES) as usize;
        u32::from_le_bytes([0, 1, 2, 3].map(|n| self.tables[offset + n]))
    }

    fn fault_at(&mut self, gva: Gva, access: Access) -> Option<PageFault> {
        let write = access.kind == AccessKind::Write;
        let present = match gva.0 {
            at if (TABLES..TABLES + TABLES_SIZE as u32).contains(&at) && !access.user => {
                self.strayed |= at < IDT && self.strange.get((at - GDT) as usize / 8) == Some(&true);
                return None;
            }
            at if (DATA..DATA + DATA_SIZE as u32).contains(&at) => true,
            at if (CODE..CODE + CODE_SIZE as u32).contains(&at) => true,
            at => {
                self.strayed |= (STAGE..STAGE + PAGE as u32).contains(&at);
                false
            }
        };
        let refused = match access.kind {
            AccessKind::Read => false,
            AccessKind::Write => !(DATA..DATA_READ_ONLY).contains(&gva.0),
            AccessKind::Execute => !(CODE..CODE + CODE_SIZE as u32).contains(&gva.0),
        };
        if present && !refused {
            return None;
        }
        let mut code = FaultCode::empty();
        code.set(FaultCode::PRESENT, present);
        code.set(FaultCode::WRITE, write);
        code.set(FaultCode::USER, access.user);
        // The host has NX.
        code.set(FaultCode::FETCH, access.kind == AccessKind::Execute);
        Some(PageFault { gva, code })
    }

    /// Checks an access of at most two pages. The second's fault is at its start.
    fn check(&mut self, gva: Gva, length: u32, access: Access) -> Result<(), BusError> {
        if let Some(fault) = self.fault_at(gva, access) {
            return Err(fault.into());
        }
        let last = gva.wrapping_add(length.max(1) - 1);
        let second = if last.page() == gva.page() { None } else { self.fault_at(last.page(), access) };
        second.map_or(Ok(()), |fault| Err(fault.into()))
    }

    /// A scalar that was checked: it lies within one of the regions, or wraps at 4 GiB and is strayed.
    fn scalar(&mut self, gva: Gva, width: Width) -> &mut [u8] {
        let bytes = width.bytes() as usize;
        self.at(gva.0).and_then(|place| place.get_mut(..bytes)).unwrap_or_default()
    }
}

fn value_of(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Bus for Memory {
    fn read(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        self.check(gva, width.bytes(), access)?;
        Ok(value_of(self.scalar(gva, width)))
    }

    fn write(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        self.check(gva, width.bytes(), access)?;
        let bytes = value.to_le_bytes();
        self.scalar(gva, width).copy_from_slice(&bytes[..width.bytes() as usize]);
        Ok(())
    }

    fn update(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        self.check(gva, width.bytes(), Access::write(user))?;
        let place = self.scalar(gva, width);
        let old = value_of(place);
        place.copy_from_slice(&change(old).to_le_bytes()[..width.bytes() as usize]);
        Ok(old)
    }

    fn probe(&mut self, gva: Gva, length: u32, access: Access) -> Result<(), BusError> {
        self.check(gva, length, access)
    }

    fn fetch(&mut self, gva: Gva, user: bool, buffer: &mut [u8]) -> Result<usize, BusError> {
        self.check(gva, 1, Access::execute(user))?;
        let place = self.at(gva.0).unwrap_or_default();
        let length = place.len().min(buffer.len());
        buffer[..length].copy_from_slice(&place[..length]);
        Ok(length)
    }

    fn port_in(&mut self, _: u16, _: Width) -> u32 {
        unreachable!("ring 3 has no ports here")
    }

    fn port_out(&mut self, _: u16, _: Width, _: u32) {
        unreachable!("ring 3 has no ports here")
    }

    fn invalidate_page(&mut self, _: Gva) {
        unreachable!("ring 3 has no INVLPG")
    }

    fn set_paging(&mut self, _: &CpuState, _: bool) -> Result<(), BusError> {
        Ok(())
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32, _: &CpuState) -> [u32; 4] {
        let leaf = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    }

    fn tsc(&mut self) -> u64 {
        0
    }
}
