//! INV-INTERP-1: what does not retire changes nothing, and what is run again ends the same.

use proptest::prelude::*;

use super::super::{Exception, Step, decode, step, vector};
use super::machine::*;
use super::random::start;
use crate::cpu::Seg;
use crate::cpu::eflags::RF;

/// Steps until the instruction at the start has retired or stopped: REP goes on over several steps.
fn finish(machine: &mut Machine) -> Step {
    let eip = machine.cpu.eip;
    loop {
        let result = step(&mut machine.cpu, &mut machine.bus);
        if result != Step::Done || machine.cpu.eip != eip || machine.cpu.eflags & RF == 0 {
            return result;
        }
    }
}

/// The tables, where a fault may leave A bits behind.
fn without_tables(memory: &[u8]) -> (&[u8], &[u8]) {
    (&memory[..GDT as usize], &memory[LDT as usize..])
}

fn is_string(bytes: &[u8], wide: bool) -> bool {
    decode(bytes, wide, CODE).is_ok_and(|instruction| instruction.is_string_instruction())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, ..ProptestConfig::default() })]

    #[test]
    fn faults_and_unknowns_change_nothing(start in start()) {
        let before = start.machine();
        let mut machine = before.clone();
        let result = step(&mut machine.cpu, &mut machine.bus);
        let string = is_string(&start.bytes, before.cpu.segment(Seg::Cs).big());
        match result {
            Step::Exception(Exception { vector: vector::DB, .. }) => {}
            Step::Exception(_) | Step::Unknown(_) if !string => {
                machine.cpu.nmi_blocked = before.cpu.nmi_blocked;
                // The flags of an unmasked SSE exception, which is #UD without OSXMMEXCPT.
                if matches!(result, Step::Exception(Exception { vector: vector::XM | vector::UD, .. })) {
                    prop_assert!(machine.cpu.fpu.set_mxcsr(before.cpu.fpu.mxcsr()));
                }
                prop_assert_eq!(&machine.cpu, &before.cpu);
                prop_assert!(without_tables(&machine.bus.memory) == without_tables(&before.bus.memory));
                prop_assert_eq!(machine.bus.ports.len(), 0);
                prop_assert_eq!(machine.bus.paging.0, 0);
            }
            _ => {}
        }
    }

    /// `Again` at each bus call in turn: nothing of the CPU changed (strings may have gone further), and the
    /// instruction then ends as if it had never been.
    #[test]
    fn again_at_any_point_is_invisible(start in start()) {
        let before = start.machine();
        let mut whole = before.clone();
        let result = finish(&mut whole);
        let string = is_string(&start.bytes, before.cpu.segment(Seg::Cs).big());
        // A REP that overwrites itself is another instruction when it goes on.
        let code = CODE as usize..CODE as usize + 16;
        prop_assume!(!string || whole.bus.memory[code.clone()] == before.bus.memory[code]);
        for call in 0..whole.bus.calls.min(40) {
            let mut machine = before.clone();
            machine.bus.again_at = Some(call);
            let first = step(&mut machine.cpu, &mut machine.bus);
            if first == Step::Again {
                prop_assert_eq!(&machine.cpu, &before.cpu, "call {}", call);
            } else {
                prop_assert!(string || first == result, "call {}: {:?}", call, first);
            }
            if first != result || first == Step::Done && machine.cpu.eip == before.cpu.eip {
                prop_assert_eq!(finish(&mut machine), result, "call {}", call);
            }
            // A string instruction that went on after a pause has RF set; a fault's frame has it in either case.
            machine.cpu.eflags |= if string { RF } else { 0 };
            whole.cpu.eflags |= if string { RF } else { 0 };
            prop_assert_eq!(&machine.cpu, &whole.cpu, "call {}", call);
            prop_assert!(machine.bus.memory == whole.bus.memory, "memory, call {}", call);
            prop_assert_eq!(&machine.bus.ports, &whole.bus.ports, "ports, call {}", call);
            prop_assert_eq!(machine.bus.paging, whole.bus.paging, "paging, call {}", call);
        }
    }
}
