//! The interpreter: one instruction on an architectural CPU state, through a bus that is the guest's MMU.
//!
//! Story: the kvm backend calls [`step`] for each instruction that trapped and [`deliver`] for each event it has to
//! inject; the soft backend runs everything by them. [`execute`] is [`step`] without the fetch, for whoever keeps
//! decoded instructions. The jobs, one file each:
//!
//! 1. `fetch` reads and decodes (iced-x86), `execute` finds the handler;
//! 2. `operand` finds operands, `segment` turns seg:offset into a linear address and checks it, `stack` pushes and
//!    pops whole frames;
//! 3. `alu` and `decimal` compute values and flags (pure functions); `arith`, `bits`, `data`, `string`, `control`
//!    are the user's instructions;
//! 4. `descriptor` and `load` are descriptor tables and segment registers; `far` and `gate` the transfers between
//!    segments and rings; `deliver` the way into a handler;
//! 5. `system`, `control_regs`, `msr`, `io`, `verify`, `debug` are the kernel's instructions;
//! 6. `fpu` is the way to x87 (`x87`, `x87_control`) and to MMX and SSE (`sse`, `sse_float`), which compute on the
//!    host's FPU (`host_fpu`).
//!
//! Holds:
//! - INV-INTERP-1: a step that ends in a fault, [`Step::Again`] or [`Step::Unknown`] has changed nothing, but for A
//!   and D bits (of pages, and of descriptors), stack space not yet in use, NMI blocking after a faulting IRET (all
//!   of which silicon changes too), the flags in MXCSR that go with a #XM, and the finished iterations of a string
//!   instruction.
//! - INV-INTERP-2: nothing is guessed: what is not implemented is `Unknown`, with its name.
//! - INV-INTERP-3: no allocation, no clock, no state of its own: the same state and bus give the same step
//!   (on the same host, where the architecture leaves the last bits of an FPU result open).
//!
//! Limits: virtual-8086 mode and task switches are `Unknown`. A data breakpoint met by MOV SS is reported at once, not after the next instruction.
//!
//! See: Intel SDM vol. 2 (each instruction), vol. 3A chapters 3, 5, 6.

mod alu;
mod arith;
mod bits;
pub mod bus;
mod control;
mod control_regs;
mod data;
mod debug;
mod decimal;
mod deliver;
mod descriptor;
pub mod engine;
pub mod exception;
mod execute;
mod far;
mod fetch;
mod flags;
pub mod flat;
mod fpu;
mod gate;
mod io;
mod load;
mod msr;
mod operand;
mod segment;
mod shuffle;
mod sse;
mod sse_float;
mod sse_unmasked;
mod stack;
mod string;
mod system;
#[cfg(test)]
mod tests;
mod verify;
mod wide;
mod x87;
mod x87_control;
mod x87_forms;

use std::fmt;

use iced_x86::Instruction;
use umbra_mmu::Gva;

pub use bus::{Bus, BusError, Width};
pub use deliver::{Delivered, Event, deliver};
pub use exception::{Exception, vector};
pub use fetch::{DecodeError, decode};

use crate::cpu::{CpuState, eflags};

/// What one step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The instruction retired, or a string instruction went some iterations further.
    Done,
    /// The CPU waits for an interrupt: HLT retired, or it was halted before.
    Halted,
    /// Deliver this ([`deliver`]). The state is what the architecture says it is before delivery: EIP at the
    /// instruction for a fault, after it for a trap, DR6 written for a #DB.
    Exception(Exception),
    /// The bus said [`BusError::Again`]: sleep, then step again. Nothing has changed.
    Again,
    /// An instruction that the interpreter does not know. Nothing has changed.
    Unknown(UnknownInstruction),
}

/// Something that the interpreter does not know: enough to say what and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownInstruction {
    /// What is missing, in a word or two.
    pub what: &'static str,
    /// EIP of the instruction, or on an event's delivery of the interrupted one.
    pub eip: u32,
    /// The same as a linear address.
    pub linear: Gva,
    /// The bytes there, as far as they could be read.
    pub bytes: [u8; 15],
    /// How many of `bytes` count. They may be more than the instruction has.
    pub length: u8,
}

impl fmt::Display for UnknownInstruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is not implemented: EIP {:#x}, linear {:#x}, bytes",
            self.what, self.eip, self.linear.0
        )?;
        self.bytes.iter().take(self.length.into()).try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}

/// Executes exactly one instruction at CS:EIP (or some thousand iterations of one string instruction).
pub fn step<B: Bus + ?Sized>(cpu: &mut CpuState, bus: &mut B) -> Step {
    Core::new(cpu, bus).step()
}

/// Executes `instruction`, which [`decode`] made of the bytes at CS:EIP. Instruction breakpoints and the CS limit are
/// [`step`]'s business.
pub fn execute<B: Bus + ?Sized>(cpu: &mut CpuState, bus: &mut B, instruction: &Instruction) -> Step {
    Core::new(cpu, bus).run(instruction)
}

/// Why an instruction did not retire.
#[derive(Clone, Copy, Debug)]
enum Leave {
    Fault(Exception),
    Again,
    Unknown(&'static str),
}

impl From<Exception> for Leave {
    fn from(exception: Exception) -> Leave {
        Leave::Fault(exception)
    }
}

impl From<BusError> for Leave {
    fn from(error: BusError) -> Leave {
        match error {
            BusError::Exception(exception) => Leave::Fault(exception),
            BusError::Again => Leave::Again,
        }
    }
}

type Exec<T = ()> = Result<T, Leave>;

/// Faults with `exception` unless `holds`.
fn ensure(holds: bool, exception: Exception) -> Exec {
    if holds { Ok(()) } else { Err(Leave::Fault(exception)) }
}

/// How an instruction that retired leaves EIP and the odd bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// On to the next instruction.
    Next,
    /// EIP is already where it should be.
    Jumped,
    /// As `Jumped`, and RF came from a stack image: keep it.
    Returned,
    /// As `Jumped`, into an interrupt handler: TF was cleared on the way, so no single-step trap follows.
    Delivered,
    /// A string instruction has iterations left: EIP stays.
    Repeat,
    /// On to the next, then wait for an interrupt.
    Halt,
    /// On to the next, with interrupts held off until after it (STI).
    Shadow,
    /// As `Shadow`, and single-step traps too (MOV SS, POP SS).
    ShadowAll,
}

/// One instruction under way.
struct Core<'a, B: Bus + ?Sized> {
    cpu: &'a mut CpuState,
    bus: &'a mut B,
    /// DR6 bits of the data breakpoints that this instruction has met.
    met: u32,
}

impl<'a, B: Bus + ?Sized> Core<'a, B> {
    fn new(cpu: &'a mut CpuState, bus: &'a mut B) -> Self {
        Core { cpu, bus, met: 0 }
    }

    fn step(&mut self) -> Step {
        if self.cpu.halted {
            return Step::Halted;
        }
        if self.cpu.eflags & eflags::VM != 0 {
            return self.stopped(Leave::Unknown("virtual-8086 mode"));
        }
        if let Some(exception) = self.instruction_breakpoint() {
            return Step::Exception(exception);
        }
        match self.fetch() {
            Ok(instruction) => self.run(&instruction),
            Err(leave) => self.stopped(leave),
        }
    }

    fn run(&mut self, instruction: &Instruction) -> Step {
        let next = self.cpu.eip.wrapping_add(instruction.len() as u32);
        let traced = self.cpu.eflags & eflags::TF != 0;
        match self.execute(instruction, next) {
            Ok(flow) => self.retire(flow, next, traced),
            Err(leave) => self.stopped(leave),
        }
    }

    fn retire(&mut self, flow: Flow, next: u32, traced: bool) -> Step {
        let cpu = &mut *self.cpu;
        if matches!(flow, Flow::Next | Flow::Halt | Flow::Shadow | Flow::ShadowAll) {
            cpu.eip = next;
        }
        let stepped = traced && !matches!(flow, Flow::Delivered | Flow::ShadowAll);
        match flow {
            // An interrupt taken now must not meet the instruction's own breakpoint again. (A trap does, on AMD.)
            Flow::Repeat if !stepped => cpu.eflags |= eflags::RF,
            Flow::Returned => {}
            _ => cpu.eflags &= !eflags::RF,
        }
        cpu.interrupt_shadow = matches!(flow, Flow::Shadow | Flow::ShadowAll);
        if stepped || self.met != 0 {
            return Step::Exception(self.debug_trap(stepped));
        }
        if flow == Flow::Halt {
            self.cpu.halted = true;
            return Step::Halted;
        }
        Step::Done
    }

    fn stopped(&mut self, leave: Leave) -> Step {
        match leave {
            Leave::Fault(exception) => Step::Exception(exception),
            Leave::Again => Step::Again,
            Leave::Unknown(what) => self.unknown_here(what).map_or(Step::Again, Step::Unknown),
        }
    }

    /// Describes what stands at CS:EIP, for the operator. None where the bus has to sleep first.
    fn unknown_here(&mut self, what: &'static str) -> Option<UnknownInstruction> {
        let (eip, user) = (self.cpu.eip, self.user());
        let linear = self.code_address(eip);
        let mut bytes = [0; 15];
        let length = match self.bus.fetch(linear, user, &mut bytes) {
            Ok(length) => length.min(bytes.len()) as u8,
            Err(BusError::Exception(_)) => 0,
            Err(BusError::Again) => return None,
        };
        Some(UnknownInstruction { what, eip, linear, bytes, length })
    }
}
