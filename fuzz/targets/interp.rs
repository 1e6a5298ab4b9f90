//! The interpreter under random bytes: every mode and privilege, with tables of noise, and a bus that makes it wait.
//!
//! What must hold: no panic, and every step ends; INV-INTERP-1 (`journal`); the state's own invariants (`state`).
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use umbra::cpu::{CpuState, Seg, eflags};
use umbra::interp::flat::{FlatBus, Page};
use umbra::interp::{Delivered, Event, Step, deliver, step};
use umbra_fuzz::journal::Journal;
use umbra_fuzz::plan::{BYTES, Beginning, Code, Happening, Mode, Paging, Start};
use umbra_fuzz::state;

/// Instructions of a program.
const STEPS_MAX: usize = 64;

#[derive(Arbitrary, Clone, Debug)]
struct Turn {
    /// Begins anew in a mode, with memory as it is.
    anew: Option<Mode>,
    code: Code,
    /// The bus call that waits, if one does.
    again_in: Option<u8>,
    happening: Happening,
    /// `set_paging` is refused, as with bad directory pointers.
    refuse_paging: bool,
}

#[derive(Arbitrary, Clone, Debug)]
struct Program {
    start: Beginning,
    mode: Mode,
    /// Pages that are not open to everything.
    pages: [Option<(u8, u8)>; 3],
    turns: Vec<Turn>,
}

struct Machine {
    start: Start,
    cpu: CpuState,
    bus: FlatBus,
}

impl Machine {
    fn new(program: &Program) -> Machine {
        let mut bus = FlatBus::new(0, BYTES as usize);
        let start = program.start.clone().start();
        start.lay(&mut |at, bytes| bus.place(at, bytes));
        let cpu = start.cpu(program.mode, Paging::Free);
        state::check(&cpu);
        for (page, kind) in program.pages.into_iter().flatten() {
            let kind = [Page::Absent, Page::ReadOnly, Page::Supervisor][usize::from(kind % 3)];
            bus.pages.insert(u32::from(page) % (BYTES >> 12), kind);
        }
        Machine { start, cpu, bus }
    }

    /// Calls with a journal; then forgets what the bus has kept.
    fn journaled<R>(
        &mut self,
        again_in: Option<u32>,
        call: impl FnOnce(&mut CpuState, &mut Journal<'_, FlatBus>) -> R,
    ) -> R {
        let result = call(&mut self.cpu, &mut Journal::new(&mut self.bus, again_in));
        self.bus.ports.clear();
        self.bus.invalidated.clear();
        result
    }

    fn step(&mut self, again_in: Option<u32>) -> Step {
        let before = self.cpu.clone();
        let stepped = self.journaled(again_in, |cpu, journal| {
            let stepped = step(cpu, journal);
            journal.judge_step(&before, cpu, &stepped);
            stepped
        });
        state::check_handed_on(&before, &self.cpu);
        assert!(before.eflags & eflags::VM == 0 || self.cpu == before, "virtual-8086 mode is not known");
        stepped
    }

    fn deliver(&mut self, event: Event, again_in: Option<u32>) -> Delivered {
        let before = self.cpu.clone();
        let delivered = self.journaled(again_in, |cpu, journal| {
            let delivered = deliver(cpu, journal, event);
            journal.judge_delivery(&before, cpu, &delivered);
            delivered
        });
        state::check_handed_on(&before, &self.cpu);
        delivered
    }

    /// Delivers; where it must wait, once more without. False at the end of the run.
    fn deliver_at_last(&mut self, event: Event, again_in: Option<u32>) -> bool {
        let delivered = self.deliver(event, again_in);
        let delivered = if delivered == Delivered::Again { self.deliver(event, None) } else { delivered };
        assert_ne!(delivered, Delivered::Again, "nothing has to wait");
        delivered == Delivered::Handler
    }

    /// False at the end of the run.
    fn turn(&mut self, turn: &Turn) -> bool {
        if let Some(mode) = turn.anew {
            self.cpu = self.start.cpu(mode, Paging::Free);
        }
        let at = self.cpu.segment(Seg::Cs).base.wrapping_add(self.cpu.eip);
        self.bus.place(at, &turn.code.bytes());
        self.bus.refuse_paging = turn.refuse_paging;
        let again_in = turn.again_in.map(u32::from);
        let stepped = match self.step(again_in) {
            Step::Again => self.step(None),
            other => other,
        };
        let goes_on = match stepped {
            Step::Done => true,
            Step::Halted => self.cpu.halted,
            Step::Exception(exception) => self.deliver_at_last(Event::Exception(exception), again_in),
            Step::Again => panic!("nothing has to wait"),
            Step::Unknown(instruction) => {
                assert!(!instruction.to_string().is_empty());
                false
            }
        };
        goes_on
            && match turn.happening.event(&self.cpu) {
                Some(event) => self.deliver_at_last(event, again_in),
                None => true,
            }
    }
}

fuzz_target!(|program: Program| {
    let mut machine = Machine::new(&program);
    for turn in program.turns.iter().take(STEPS_MAX) {
        if !machine.turn(turn) {
            break;
        }
    }
});
