//! The engine in step with its model over changes of privilege: exceptions and interrupts are delivered, handlers run
//! (random code as well) and return.

use super::*;
use crate::interp::flat::Page;
use crate::interp::tests::machine::{self, Machine, gate};
use crate::interp::{Delivered, Event};

/// Programs of a run that nobody asked to be longer.
const PROGRAMS: u64 = 1500;
/// Runs of the engine in one program.
const RUNS: u32 = 40;
/// An interrupt gate that users may call, a trap gate, and one to the user's own code.
const GATES: [(u16, u8); 4] = [
    (machine::KERNEL_CODE, 0xee),
    (machine::KERNEL_CODE, 0x8f),
    (machine::KERNEL_CODE, 0x86),
    (machine::USER_CODE, 0xee),
];

fn machine(random: &mut Random) -> Machine {
    let mut machine = match random.below(8) {
        0 => Machine::real(),
        1..=4 => Machine::user(),
        _ => Machine::kernel(),
    };
    let mut at = machine::CODE;
    while at < machine::DATA {
        // Handlers and returns are what this is about.
        let bytes = if random.one_in(10) { vec![0xcf] } else { instruction(random) };
        machine.bus.place(at, &bytes);
        at += bytes.len() as u32;
    }
    for vector in 0..=255 {
        if random.one_in(3) {
            let (selector, access) = random.pick(&GATES);
            let offset = machine::HANDLER + random.below(0x700);
            machine.set_gate(vector, gate(selector, offset, access, 0));
        }
    }
    let esp = machine.cpu.gpr[4];
    machine.cpu.gpr = [0; 8].map(|_| near(random));
    machine.cpu.gpr[4] = esp - random.below(64) * 4;
    machine.cpu.eflags |= random.next() & 0xed5;
    // A frame to return by, here and there.
    let frame = [near(random), u32::from(machine::USER_CODE), 0x202, machine::USER_STACK, 0x23];
    for (value, n) in frame.into_iter().zip(0..) {
        machine.bus.place(machine.cpu.gpr[4] + 4 * n, &value.to_le_bytes());
    }
    if random.one_in(4) {
        machine.bus.pages.insert(machine::DATA >> 12, Page::Supervisor);
    }
    machine
}

/// An address in code, data or a stack.
fn near(random: &mut Random) -> u32 {
    match random.below(4) {
        0 => machine::CODE + random.below(0x1000),
        1 => machine::KERNEL_STACK - random.below(0x100) * 4,
        2 => random.below(300),
        _ => machine::DATA + random.below(0x2000),
    }
}

/// What follows a run: the exception, or now and then an interrupt where it can be taken; delivered.
fn event(ran: &Ran, cpu: &CpuState, random: &mut Random) -> Option<Event> {
    match ran.last {
        Step::Exception(exception) => Some(Event::Exception(exception)),
        _ if cpu.interruptible() && random.one_in(3) => Some(Event::External(random.next() as u8)),
        _ => None,
    }
}

/// Returns the steps made, and how often the privilege had changed between two runs.
fn lockstep(seed: u64) -> (u64, u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut ours = machine(&mut random);
    let mut theirs = ours.clone();
    ours.bus.at_once = true;
    let mut engine = Engine::default();
    let (mut steps, mut changes) = (0, 0);
    for run in 0..RUNS {
        let budget = 1 + u64::from(random.below(30));
        let extent = if random.one_in(4) { Extent::Kernel } else { Extent::All };
        let waiting = Waiting { interrupt: random.one_in(3), nmi: random.one_in(16) };
        let before = ours.cpu.clone();
        let got = engine.run(&mut ours.cpu, &mut ours.bus, budget, extent, waiting);
        let want = model(&mut theirs.cpu, &mut theirs.bus, budget, extent, waiting);
        let context = || format!("seed {seed}, run {run} of {budget} from EIP {:#x}:\n{before}", before.eip);
        assert_eq!(got, want, "{}", context());
        if let Some(event) = event(&got, &ours.cpu, &mut random) {
            let delivered = ours.deliver(event);
            assert_eq!(delivered, theirs.deliver(event), "{event:?}: {}", context());
            if delivered != Delivered::Handler {
                break;
            }
        } else if got.last != Step::Done {
            break;
        }
        assert_eq!(ours.cpu, theirs.cpu, "{}", context());
        assert!(ours.bus.memory == theirs.bus.memory, "memory differs: {}", context());
        assert_eq!(ours.bus.ports, theirs.bus.ports, "{}", context());
        assert_eq!(ours.bus.paging, theirs.bus.paging, "{}", context());
        steps += got.steps;
        changes += u64::from(ours.cpu.cpl != before.cpl);
    }
    (steps, changes)
}

#[test]
fn random_programs_with_handlers_end_as_by_steps() {
    let (first, programs) = (number("UMBRA_SEED", 1), number("UMBRA_CASES", PROGRAMS));
    let made = (first..first + programs).map(lockstep);
    let (steps, changes) = made.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    println!("engine: {steps} steps alike, {changes} changes of privilege");
    assert!(steps > 30 * programs && changes > programs / 3, "too little: {steps} steps, {changes} changes");
}
