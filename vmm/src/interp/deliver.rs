//! Delivery: the way of an exception, an interrupt or an NMI into the guest's handler.
//!
//! Story: whoever runs the CPU calls [`deliver`] for what a step raised or the board asserts; INT n, INT3 and INTO
//! come here from their own step. One attempt reads the gate, finds the stack, pushes the frame and commits; a fault
//! in it becomes the next attempt's event, by the rule of double faults.
//!
//! Holds: the frame is pushed whole or not at all; until [`Delivered::Handler`] nothing of the CPU has changed, but
//! for CR2 on a triple fault.
//!
//! Limits: task gates and delivery out of virtual-8086 mode are not known.
//!
//! See: Intel SDM vol. 3A, 6.12 (IDT procedures), 6.15 on #DF and table 6-5, 20.1.4 (real mode).

use umbra_mmu::Gva;

use super::debug::DR7_GD;
use super::descriptor::{Descriptor, Kind, error_code};
use super::far::Transfer;
use super::operand::ESP;
use super::stack::Stack;
use super::{Bus, Core, Exception, Exec, Flow, Leave, UnknownInstruction, Width, ensure, vector};
use crate::cpu::eflags::{AC, IF, NT, RF, TF, VM};
use crate::cpu::{CpuState, Seg};

/// The bit of an error code that says: an event outside the program met it.
const EXT: u16 = 1;
/// The bit of an error code that says: the index is the IDT's.
const IDT: u16 = 2;

/// What is to be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// What a step raised.
    Exception(Exception),
    /// An external interrupt. The caller has seen that [`CpuState::interruptible`] holds.
    External(u8),
    /// A non-maskable interrupt. The caller has seen that NMIs are not blocked.
    Nmi,
    /// INT n, INT3 or INTO, where the caller decoded it: EIP is at the instruction, and the handler returns to
    /// `next`. ([`super::step`] does this by itself.)
    Software {
        /// The vector.
        vector: u8,
        /// EIP after the instruction.
        next: u32,
    },
}

/// What delivery came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// CS:EIP is a handler's first instruction: the event's own, or that of a fault met on the way.
    Handler,
    /// A fault on the way to the double-fault handler: the machine resets.
    TripleFault,
    /// The bus said `Again`: sleep, then deliver the same event again. Nothing has changed.
    Again,
    /// A way that is not implemented. Nothing has changed.
    Unknown(UnknownInstruction),
}

/// Delivers `event` through the guest's IDT (or, in real mode, its vector table).
pub fn deliver<B: Bus + ?Sized>(cpu: &mut CpuState, bus: &mut B, event: Event) -> Delivered {
    Core::new(cpu, bus).deliver(event)
}

/// One attempt's parameters.
#[derive(Clone, Copy)]
struct Entry {
    vector: u8,
    error: Option<u32>,
    /// [`EXT`], or 0 for the program's own INT.
    ext: u16,
    /// The gate's DPL must admit the current privilege.
    checks_dpl: bool,
    /// Where the handler returns to.
    eip: u32,
    /// What the frame has for EFLAGS.
    flags: u32,
}

impl Event {
    fn entry(&self, cpu: &CpuState) -> Entry {
        let plain = |vector| Entry {
            vector,
            error: None,
            ext: EXT,
            checks_dpl: false,
            eip: cpu.eip,
            flags: cpu.eflags,
        };
        match *self {
            Event::Exception(e) => {
                let flags = if e.is_fault() { cpu.eflags | RF } else { cpu.eflags };
                Entry { error: e.error, flags, ..plain(e.vector) }
            }
            Event::External(vector) => plain(vector),
            Event::Nmi => plain(vector::NMI),
            // The instruction is done, and RF with it.
            Event::Software { vector, next } => {
                Entry { ext: 0, checks_dpl: true, eip: next, flags: cpu.eflags & !RF, ..plain(vector) }
            }
        }
    }
}

/// What follows from exception `second` on the delivery of `first`: table 6-5. None is a triple fault.
fn escalate(first: &Event, second: Exception) -> Option<Exception> {
    let Event::Exception(first) = first else { return Some(second) };
    let serious = second.is_contributory() || second.vector == vector::PF;
    match first.vector {
        vector::DF if serious => None,
        vector::PF if serious => Some(Exception::DF),
        _ if first.is_contributory() && second.is_contributory() => Some(Exception::DF),
        _ => Some(second),
    }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    fn deliver(&mut self, event: Event) -> Delivered {
        let mut pending = event;
        // A page fault writes CR2 even where it ends as a double fault.
        let mut cr2 = match event {
            Event::Exception(Exception { cr2: Some(address), .. }) => address,
            _ => self.cpu.cr2,
        };
        loop {
            match self.enter_handler(&pending.entry(self.cpu)) {
                Ok(()) => {
                    self.delivered(&event, &pending, cr2);
                    return Delivered::Handler;
                }
                Err(Leave::Again) => return Delivered::Again,
                Err(Leave::Unknown(what)) => {
                    return self.unknown_here(what).map_or(Delivered::Again, Delivered::Unknown);
                }
                Err(Leave::Fault(fault)) => {
                    cr2 = fault.cr2.unwrap_or(cr2);
                    let Some(next) = escalate(&pending, fault) else {
                        self.cpu.cr2 = cr2;
                        return Delivered::TripleFault;
                    };
                    pending = Event::Exception(next);
                }
            }
        }
    }

    /// What a completed delivery leaves besides the handler's CS:EIP and the frame.
    fn delivered(&mut self, event: &Event, handled: &Event, cr2: u32) {
        let cpu = &mut *self.cpu;
        cpu.cr2 = cr2;
        cpu.halted = false;
        cpu.interrupt_shadow = false;
        cpu.nmi_blocked |= *event == Event::Nmi;
        if matches!(handled, Event::Exception(e) if e.vector == vector::DB) {
            cpu.dr[7] &= !DR7_GD;
        }
    }

    /// INT n, INT3 and INTO.
    pub(super) fn software_interrupt(&mut self, vector: u8, next: u32) -> Exec<Flow> {
        let entry = Event::Software { vector, next }.entry(self.cpu);
        self.enter_handler(&entry)?;
        Ok(Flow::Delivered)
    }

    /// INT1: as an exception, whatever the gate's DPL, but it returns behind itself.
    pub(super) fn debug_interrupt(&mut self, next: u32) -> Exec<Flow> {
        let entry = Entry { eip: next, ..Event::Exception(Exception::DB).entry(self.cpu) };
        self.enter_handler(&entry)?;
        Ok(Flow::Delivered)
    }

    /// One attempt.
    fn enter_handler(&mut self, entry: &Entry) -> Exec {
        if !self.cpu.protected() {
            return self.enter_real_handler(entry);
        }
        if self.cpu.eflags & VM != 0 {
            return Err(Leave::Unknown("delivery out of virtual-8086 mode"));
        }
        let gate = self.interrupt_gate(entry)?;
        let (width, masks) = match gate.kind() {
            Kind::InterruptGate(width) => (width, true),
            Kind::TrapGate(width) => (width, false),
            _ => return Err(Leave::Unknown("task gate")),
        };
        let (descriptor, mut code) = self.gate_target(gate.gate_selector(), entry.ext)?;
        let inward = !code.conforming() && code.dpl() < self.cpu.cpl;
        let stack = self.handler_stack(inward.then(|| code.dpl()), entry.ext)?;
        let eip = gate.gate_offset(width);
        ensure(eip <= code.limit, Exception::gp(entry.ext))?;
        self.mark_accessed(&descriptor)?;
        let pointer = self.push_handler_frame(&stack, entry, inward, width)?;

        let mut after = Transfer::of(self.cpu);
        after.cpl = if inward { code.dpl() } else { self.cpu.cpl };
        code.selector = error_code(code.selector) | u16::from(after.cpl);
        after.seg[Seg::Cs as usize] = code;
        after.seg[Seg::Ss as usize] = stack.segment;
        after.esp = pointer;
        after.eip = eip;
        after.eflags &= !(TF | NT | RF | VM | if masks { IF } else { 0 });
        self.commit(&after)
    }

    /// The gate of the entry's vector: of a kind that can be entered, open to the caller, present.
    fn interrupt_gate(&mut self, entry: &Entry) -> Exec<Descriptor> {
        let index = u16::from(entry.vector) * 8;
        let code = index | IDT | entry.ext;
        ensure(index + 7 <= self.cpu.idtr.limit, Exception::gp(code))?;
        let gate = self.descriptor_at(Gva(self.cpu.idtr.base.wrapping_add(index.into())))?;
        let enterable = matches!(gate.kind(), Kind::InterruptGate(_) | Kind::TrapGate(_) | Kind::TaskGate);
        ensure(enterable, Exception::gp(code))?;
        ensure(!entry.checks_dpl || gate.dpl() >= self.cpu.cpl, Exception::gp(code))?;
        ensure(gate.present(), Exception::np(code))?;
        Ok(gate)
    }

    /// The stack of the inner ring's TSS slot, or the current one.
    fn handler_stack(&mut self, inner: Option<u8>, ext: u16) -> Exec<Stack> {
        match inner {
            Some(cpl) => self.inner_stack(cpl, ext),
            None => Ok(Stack { aligned: false, fault: Exception::ss(ext), ..self.stack() }),
        }
    }

    /// Pushes the old stack (going inward), EFLAGS, CS, EIP and the error code.
    fn push_handler_frame(&mut self, stack: &Stack, entry: &Entry, inward: bool, width: Width) -> Exec<u32> {
        let cpu = &*self.cpu;
        let frame = [
            cpu.segment(Seg::Ss).selector.into(),
            cpu.gpr[ESP],
            entry.flags,
            cpu.segment(Seg::Cs).selector.into(),
            entry.eip,
            entry.error.unwrap_or(0),
        ];
        let first = if inward { 0 } else { 2 };
        let last = if entry.error.is_some() { 6 } else { 5 };
        self.push_frame(stack, &frame[first..last], width)
    }

    /// Real mode: a table of far pointers, three words on the stack, no error code.
    fn enter_real_handler(&mut self, entry: &Entry) -> Exec {
        let index = u16::from(entry.vector) * 4;
        ensure(index + 3 <= self.cpu.idtr.limit, Exception::gp(0))?;
        let at = Gva(self.cpu.idtr.base.wrapping_add(index.into()));
        let target = self.load_implicit(at, Width::B4)?;
        let stack = self.stack();
        let frame = [entry.flags, self.cpu.segment(Seg::Cs).selector.into(), entry.eip];
        self.cpu.gpr[ESP] = self.push_frame(&stack, &frame, Width::B2)?;
        self.cpu.eflags &= !(IF | TF | AC | RF);
        self.enter_real((target >> 16) as u16, target & 0xffff);
        Ok(())
    }
}
