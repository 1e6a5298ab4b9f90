//! The soft backend: a vCPU that is interpreted, whole or for a stretch.
//!
//! Story: [`Soft::run`] interprets for a budget of instructions in the vCPU's own time, which its caller sets before and
//! which each instruction moves on by [`NANOS_PER_INSTRUCTION`]. It reads no clock: the same state, time and budget give
//! the same run. Translations come from the same shadow page tables as the hardware's, through the vCPU's software TLB.
//!
//! Holds: the vCPU is inside the guest while its bus lives, and nowhere else; a kick ends the slice at the next block.

use super::ending::End;
use super::kick::Attention;
use super::vcpu::{Backend, Core, lacking};
use crate::cpu::CpuState;
use crate::interp::{self, Event, Step};

/// Instructions of one slice: between two looks at the board.
const SLICE: u64 = 1 << 14;
/// How far an instruction moves the vCPU's own time: the guest's CPU runs at 1 GHz, and always lags behind real time,
/// with which it catches up at the next slice.
pub const NANOS_PER_INSTRUCTION: u64 = 1;

/// The interpreter as a backend.
#[derive(Debug, Default)]
pub struct Soft {
    attention: Attention,
}

impl Soft {
    /// How it is kicked.
    pub fn attention(&self) -> Attention {
        self.attention.clone()
    }

    /// Interprets a slice of guest-kernel code: until user code is reached, for one.
    pub fn run_kernel(&mut self, core: &mut Core) -> Option<End> {
        core.catch_up();
        self.interpret(core, SLICE, Extent::Kernel)
    }

    /// Interprets at most `budget` instructions.
    fn interpret(&mut self, core: &mut Core, budget: u64, extent: Extent) -> Option<End> {
        core.stats.entries += 1;
        let time = Some(core.time);
        let attention = self.attention.clone();
        let ((step, done), after) = core.with_bus(time, |cpu, bus| {
            let mut done = 0;
            while done < budget && !attention.is_wanted() && extent.covers(cpu) {
                let step = interp::step(cpu, bus);
                bus.advance(NANOS_PER_INSTRUCTION);
                done += 1;
                if step != Step::Done {
                    return (step, done);
                }
            }
            (Step::Done, done)
        });
        core.stats.interpreted += done;
        core.stats.kicks += u64::from(self.attention.is_wanted());
        match step {
            Step::Done | Step::Halted => None,
            Step::Exception(exception) => core.deliver(Event::Exception(exception)),
            Step::Again => lacking(after),
            Step::Unknown(instruction) => Some(core.unknown(instruction, None)),
        }
    }
}

/// How far the interpreter's business goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    /// All code.
    All,
    /// Code at CPL 0 to 2.
    Kernel,
}

impl Extent {
    fn covers(self, cpu: &CpuState) -> bool {
        self == Extent::All || cpu.cpl < 3
    }
}

impl Backend for Soft {
    fn take_kick(&mut self) {
        self.attention.take();
    }

    fn run(&mut self, core: &mut Core) -> Option<End> {
        core.catch_up();
        self.interpret(core, SLICE, Extent::All)
    }
}
