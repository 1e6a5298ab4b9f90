//! The soft backend: a vCPU that is interpreted, whole or for a stretch.
//!
//! Story: a slice of instructions at a time, in the vCPU's own time, which is set before and which each instruction moves
//! on. The engine reads no clock: the same state, time and budget give the same run. Translations come from the same
//! shadow page tables as the hardware's, through the vCPU's software TLB.
//!
//! Holds: the vCPU is inside the guest while its bus lives, and nowhere else; a kick ends the slice at the next block.

use super::ending::End;
use super::kick::Attention;
use super::vcpu::{Backend, Core, lacking};
use crate::interp::engine::{Engine, Extent};
use crate::interp::{Event, Step};

/// Instructions of one slice: between two looks at the board.
const SLICE: u64 = 1 << 14;

/// The interpreter as a backend.
#[derive(Debug, Default)]
pub struct Soft {
    attention: Attention,
    engine: Engine,
}

impl Soft {
    /// How it is kicked.
    pub fn attention(&self) -> Attention {
        self.attention.clone()
    }

    /// Interprets at most `budget` instructions of the code that `extent` covers, from the vCPU's own time on.
    pub fn interpret(&mut self, core: &mut Core, budget: u64, extent: Extent) -> Option<End> {
        core.stats.entries += 1;
        let (engine, attention, waiting) = (&mut self.engine, self.attention.clone(), core.waiting);
        let (ran, after) = core.with_bus(Some(core.time), |cpu, bus| {
            bus.heed(attention);
            engine.run(cpu, bus, budget, extent, waiting)
        });
        core.stats.interpreted += ran.steps;
        core.stats.kicks += u64::from(self.attention.is_wanted());
        match ran.last {
            Step::Done | Step::Halted => None,
            Step::Exception(exception) => core.deliver(Event::Exception(exception)),
            Step::Again => lacking(after),
            Step::Unknown(instruction) => Some(core.unknown(instruction, None)),
        }
    }

    /// The same for a slice, beginning now.
    pub fn slice(&mut self, core: &mut Core, extent: Extent) -> Option<End> {
        core.catch_up();
        self.interpret(core, SLICE, extent)
    }
}

impl Backend for Soft {
    fn take_kick(&mut self) {
        self.attention.take();
    }

    fn run(&mut self, core: &mut Core) -> Option<End> {
        self.slice(core, Extent::All)
    }
}
