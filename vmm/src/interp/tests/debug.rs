//! Single step, breakpoints, and the debug registers.

use super::super::{Delivered, Event, Exception, Step};
use super::machine::*;
use crate::cpu::eflags::{RF, TF};
use crate::cpu::{Seg, cr4};

const TRAP: Step = Step::Exception(Exception::DB);
const BS: u32 = 1 << 14;

#[test]
fn single_step_traps_behind_the_instruction() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= TF;
    assert_eq!(machine.run(&[0x90]), TRAP);
    assert_eq!((machine.cpu.eip, machine.cpu.dr[6] & BS), (CODE + 1, BS));
    assert_eq!(machine.deliver(Event::Exception(Exception::DB)), Delivered::Handler);
    assert_eq!((machine.stack(0), machine.cpu.eflags & TF), (CODE + 1, 0));
    assert_eq!(machine.stack(2) & (RF | TF), TF, "a trap sets no RF");
}

#[test]
fn single_step_counts_from_the_flag_before_the_instruction() {
    let mut machine = Machine::kernel();
    machine.bus.place(KERNEL_STACK, &(TF | 2).to_le_bytes());
    machine.done(&[0x9d]);
    machine.bus.place(KERNEL_STACK + 4, &2_u32.to_le_bytes());
    assert_eq!(machine.run(&[0x9d]), TRAP, "POPF that clears TF still traps");
}

#[test]
fn stack_segment_loads_hold_the_trap_off() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= TF;
    machine.cpu.gpr[0] = KERNEL_DATA.into();
    machine.done(&[0x8e, 0xd0]);
    assert!(machine.cpu.interrupt_shadow);
    assert_eq!(machine.run(&[0x90]), TRAP);
}

#[test]
fn faulting_instruction_does_not_trap() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= TF;
    let dr6 = machine.cpu.dr[6];
    assert_eq!(machine.fault(&[0x0f, 0x0b]), Exception::UD);
    assert_eq!(machine.cpu.dr[6], dr6);
}

#[test]
fn single_step_of_hlt_does_not_halt() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= TF;
    assert_eq!(machine.run(&[0xf4]), TRAP);
    assert!(!machine.cpu.halted);
}

#[test]
fn single_step_goes_through_rep_one_iteration_at_a_time() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= TF;
    (machine.cpu.gpr[1], machine.cpu.gpr[7]) = (2, DATA);
    assert_eq!(machine.run(&[0xf3, 0xaa]), TRAP);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[1]), (CODE, 1));
    assert_eq!(machine.run(&[0xf3, 0xaa]), TRAP);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[1]), (CODE + 2, 0));
}

#[test]
fn instruction_breakpoint_is_a_fault_that_rf_passes() {
    let mut machine = Machine::kernel();
    (machine.cpu.dr[2], machine.cpu.dr[7]) = (CODE, 0x400 | 1 << 5);
    assert_eq!(machine.run(&[0x90]), TRAP);
    assert_eq!((machine.cpu.eip, machine.cpu.dr[6] & 0xf), (CODE, 4));
    machine.cpu.eflags |= RF;
    machine.done(&[0x90]);
    assert_eq!(machine.cpu.eflags & RF, 0);
}

/// DR7 with breakpoint 0 on for `kind` (RW bits) and `length` (LEN bits).
fn watching(kind: u32, length: u32) -> Machine {
    let mut machine = Machine::kernel();
    (machine.cpu.dr[0], machine.cpu.dr[7]) = (DATA + 4, 0x400 | 1 | kind << 16 | length << 18);
    machine
}

#[test]
fn data_breakpoints_trap_behind_what_meets_them() {
    let (load, store) = (&[0xa1, 4, 0x60, 0, 0][..], &[0xa3, 4, 0x60, 0, 0][..]);
    let mut machine = watching(1, 3);
    machine.done(load);
    assert_eq!(machine.run(store), TRAP);
    assert_eq!((machine.cpu.eip, machine.cpu.dr[6] & 0xf), (CODE + 10, 1));
    assert_eq!(watching(3, 3).run(load), TRAP);
    // A byte of it, a neighbour, and one that reaches into it.
    assert_eq!(watching(1, 3).run(&[0xa2, 7, 0x60, 0, 0]), TRAP);
    watching(1, 3).done(&[0xa2, 8, 0x60, 0, 0]);
    assert_eq!(watching(1, 0).run(&[0xa3, 1, 0x60, 0, 0]), TRAP);
    assert_eq!(watching(1, 3).run(&[0x83, 0x05, 4, 0x60, 0, 0, 1]), TRAP, "RMW");
}

#[test]
fn port_breakpoints_need_de() {
    let port = |de: u32| {
        let mut machine = watching(2, 0);
        machine.cpu.dr[0] = 0x80;
        machine.cpu.cr4 |= de;
        machine.run(&[0xe6, 0x80])
    };
    assert_eq!(port(0), Step::Done);
    assert_eq!(port(cr4::DE), TRAP);
}

#[test]
fn rep_stops_at_a_breakpoint() {
    let mut machine = watching(1, 0);
    (machine.cpu.gpr[1], machine.cpu.gpr[7]) = (10, DATA);
    for _ in 0..4 {
        machine.done(&[0xf3, 0xaa]);
    }
    assert_eq!(machine.run(&[0xf3, 0xaa]), TRAP);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[7]), (CODE, DATA + 5));
}

#[test]
fn debug_registers_have_fixed_bits_and_aliases() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[0] = u32::MAX;
    machine.done(&[0x0f, 0x23, 0xf0]);
    machine.done(&[0x0f, 0x23, 0xf8]);
    assert_eq!((machine.cpu.dr[6], machine.cpu.dr[7]), (0xffff_eff0 | 0xf, 0xffff_27ff));
    machine.cpu.dr[7] = 0x400;
    machine.cpu.gpr[0] = 0;
    machine.done(&[0x0f, 0x23, 0xe0]);
    assert_eq!(machine.cpu.dr[6], 0xffff_0ff0, "DR4 is DR6");
    machine.done(&[0x0f, 0x21, 0xe9]);
    assert_eq!(machine.cpu.gpr[1], 0x400, "DR5 is DR7");
    machine.cpu.cr4 |= cr4::DE;
    assert_eq!(machine.fault(&[0x0f, 0x23, 0xe0]), Exception::UD);
    assert_eq!(Machine::user().fault(&[0x0f, 0x23, 0xc0]), Exception::gp(0));
    assert_eq!(Machine::user().fault(&[0x0f, 0x21, 0xc0]), Exception::gp(0));
}

#[test]
fn general_detect_guards_the_debug_registers() {
    let mut machine = Machine::kernel();
    machine.cpu.dr[7] |= 1 << 13;
    assert_eq!(machine.run(&[0x0f, 0x21, 0xc0]), TRAP);
    assert_eq!((machine.cpu.eip, machine.cpu.dr[6] & 1 << 13), (CODE, 1 << 13));
    assert_eq!(machine.deliver(Event::Exception(Exception::DB)), Delivered::Handler);
    assert_eq!(machine.cpu.dr[7] & 1 << 13, 0, "the handler may look");
    assert_eq!(machine.selector(Seg::Cs), KERNEL_CODE);
}
