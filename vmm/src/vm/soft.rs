//! The soft backend: a vCPU that is interpreted, whole or for a stretch.
//!
//! Story: a slice of instructions at a time, in the vCPU's own time, which is set before and which each instruction moves
//! on; the exceptions that they raise are delivered within it. The engine reads no clock: the same state, time and budget
//! give the same run. Translations come from the same shadow page tables as the hardware's, through the vCPU's software TLB.
//!
//! Holds: the vCPU is inside the guest while its bus lives, and nowhere else; a kick ends the slice at the next block. By half of the
//! seeds of simulations the next slice begins inside the guest, as if hardware ran it: then only a kick has the vCPU look at the board.

use umbra_mmu::sync::sim;

use super::ending::End;
use super::kick::Attention;
use super::simulation;
use super::vcpu::{Backend, Core, lacking};
use crate::cpu::CpuState;
use crate::interp::engine::{CodeBus, Engine, Extent, Ran};
use crate::interp::{Delivered, Event, Exception, Step, deliver, vector};

/// The most instructions of one slice.
const SLICE: u64 = 1 << 14;

/// The interpreter as a backend.
#[derive(Debug, Default)]
pub struct Soft {
    attention: Attention,
    engine: Engine,
    last: Repeated,
}

/// How often a vCPU faults by the same instruction, for the same address and with the same registers, and by no other in between, before
/// that is taken for ever. A handler that has made the entry valid meets it once, one that finds no memory and lets others run some
/// dozens of times.
const FAULTS_MAX: u32 = 10_000;

/// The last page fault of a vCPU in a simulation, and how often it has come in a row. Limits: a program that counts in memory alone, and
/// loses the same page each time around, is taken for one that does not get on.
#[derive(Debug, Default)]
struct Repeated {
    state: [u32; 12],
    times: u32,
}

impl Repeated {
    /// One more exception.
    fn see(&mut self, cpu: &CpuState, exception: Exception) {
        let Some(address) = exception.cr2 else { return };
        let mut state = [0; 12];
        state[..8].copy_from_slice(&cpu.gpr);
        state[8..].copy_from_slice(&[cpu.eip, cpu.cr3, address, exception.error.unwrap_or(0)]);
        self.times = if self.state == state { self.times + 1 } else { 1 };
        self.state = state;
        if self.times == FAULTS_MAX {
            sim::gets_nowhere(&format!(
                "the instruction at {:#x} has faulted for {address:#x} {FAULTS_MAX} times, and nothing else has",
                cpu.eip
            ));
        }
    }
}

impl Soft {
    /// How it is kicked.
    pub fn attention(&self) -> Attention {
        self.attention.clone()
    }

    /// Interprets the code that `extent` covers, from now on: a slice of it, and in a simulation as many more as the vCPU stays inside
    /// the guest for.
    pub fn slice(&mut self, core: &mut Core, extent: Extent) -> Option<End> {
        core.catch_up();
        core.stats.entries += 1;
        let (engine, attention, waiting) = (&mut self.engine, self.attention.clone(), core.waiting);
        let mut last = sim::is_on().then_some(&mut self.last);
        let mut exceptions = 0;
        let mut user_faults = 0;
        let mut told = 0;
        let executed = core.stats.interpreted;
        let (ran, after) = core.with_bus(Some(core.time), |cpu, bus| {
            bus.heed(attention);
            bus.count_from(executed);
            let mut steps = 0;
            let mut budget = sim::slice(SLICE).unwrap_or(SLICE);
            loop {
                let ran = engine.run(cpu, bus, budget - steps, extent, waiting);
                steps += ran.steps;
                bus.settle();
                // What delivery takes apart from memory that is there is for the vCPU's loop.
                if let Step::Exception(exception) = ran.last {
                    if let Some(last) = &mut last {
                        last.see(cpu, exception);
                    }
                    let user_fault = exception.vector == vector::PF && cpu.cpl == 3;
                    if deliver(cpu, bus, Event::Exception(exception)) == Delivered::Handler {
                        exceptions += 1;
                        user_faults += u64::from(user_fault);
                        bus.event();
                        continue;
                    }
                }
                if ran.last == Step::Halted {
                    bus.halted();
                }
                let is_over = steps == budget && ran.last == Step::Done;
                if is_over && !bus.is_wanted() && sim::stays_inside() {
                    simulation::after_slice(cpu, steps - told);
                    told = steps;
                    bus.catch_up();
                    budget += sim::slice(SLICE).unwrap_or(SLICE);
                    continue;
                }
                return Ran { steps, last: ran.last };
            }
        });
        core.stats.interpreted += ran.steps;
        core.stats.exceptions += exceptions;
        core.stats.user_faults += user_faults;
        core.stats.kicks += u64::from(self.attention.is_wanted());
        let end = match ran.last {
            Step::Done | Step::Halted => None,
            Step::Exception(exception) => core.deliver(Event::Exception(exception)),
            Step::Again => lacking(after),
            Step::Unknown(instruction) => Some(core.unknown(instruction, None)),
        };
        simulation::after_slice(&core.cpu, ran.steps - told);
        end
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
