//! Delivery, rule by rule.

use super::super::flat::Page;
use super::super::{Delivered, Event, Exception, Step, vector};
use super::machine::*;
use crate::cpu::eflags::{FIXED, IF, NT, RF, TF};
use crate::cpu::{Seg, TableRegister};

const GP: Event = Event::Exception(Exception::gp(0));

fn handler(vector: u8) -> u32 {
    HANDLER + u32::from(vector)
}

/// The machine after delivery, which must have reached `vector`'s handler.
fn delivered(mut machine: Machine, event: Event, vector: u8) -> Machine {
    assert_eq!(machine.deliver(event), Delivered::Handler);
    assert_eq!(machine.cpu.eip, handler(vector), "handler's EIP");
    machine
}

/// The error code that the handler of `vector` finds after a fault on `event`'s delivery.
fn error_of(machine: Machine, event: Event, vector: u8) -> u32 {
    delivered(machine, event, vector).stack(0)
}

#[test]
fn exception_same_ring_pushes_flags_cs_eip_error() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags = FIXED | IF | TF | NT;
    let machine = delivered(machine, GP, 13);
    let frame = [0, 1, 2, 3].map(|n| machine.stack(n));
    assert_eq!(frame, [0, CODE, KERNEL_CODE.into(), FIXED | IF | TF | NT | RF]);
    assert_eq!(machine.cpu.gpr[4], KERNEL_STACK - 16);
    assert_eq!(machine.cpu.eflags, FIXED);
    assert_eq!(machine.bus.paging.0, 0, "the privilege is the same");
}

#[test]
fn exception_from_user_switches_to_the_tss_stack() {
    let mut machine = Machine::user();
    machine.cpu.eflags |= IF;
    let machine = delivered(machine, GP, 13);
    let frame = [0, 1, 2, 3, 4, 5].map(|n| machine.stack(n));
    let flags = FIXED | IF | RF;
    assert_eq!(frame, [0, CODE, USER_CODE.into(), flags, USER_STACK, USER_DATA.into()]);
    assert_eq!(machine.cpu.gpr[4], KERNEL_STACK - 24);
    assert_eq!((machine.cpu.cpl, machine.bus.paging), (0, (1, 0)));
    assert_eq!(machine.selector(Seg::Cs), KERNEL_CODE);
    assert_eq!(machine.selector(Seg::Ss), KERNEL_DATA);
    assert_eq!(machine.selector(Seg::Ds), USER_DATA, "data segments stay");
}

#[test]
fn trap_gate_leaves_interrupts_open() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= IF;
    machine.set_gate(13, gate(KERNEL_CODE, handler(13), 0x8f, 0));
    assert_eq!(delivered(machine, GP, 13).cpu.eflags, FIXED | IF);
}

#[test]
fn gate_of_16_bits_pushes_words_and_cuts_the_offset() {
    let mut machine = Machine::user();
    machine.set_gate(0x30, gate(KERNEL_CODE, 0x1_0000 + handler(0x30), 0x86, 0));
    let machine = delivered(machine, Event::External(0x30), 0x30);
    assert_eq!(machine.cpu.gpr[4], KERNEL_STACK - 10);
    assert_eq!(machine.stack(0), u32::from(USER_CODE) << 16 | CODE);
}

#[test]
fn external_interrupt_has_no_error_code_and_keeps_rf_as_it_was() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= IF;
    machine.cpu.halted = true;
    machine.cpu.interrupt_shadow = true;
    let machine = delivered(machine, Event::External(0x40), 0x40);
    assert_eq!([0, 1, 2].map(|n| machine.stack(n)), [CODE, KERNEL_CODE.into(), FIXED | IF]);
    assert!(!machine.cpu.halted && !machine.cpu.interrupt_shadow);
}

#[test]
fn nmi_blocks_further_ones_until_iret() {
    let mut machine = delivered(Machine::user(), Event::Nmi, 2);
    assert!(machine.cpu.nmi_blocked);
    machine.done(&[0xcf]);
    assert!(!machine.cpu.nmi_blocked);
    assert_eq!((machine.cpu.eip, machine.cpu.cpl, machine.cpu.gpr[4]), (CODE, 3, USER_STACK));
}

#[test]
fn page_fault_sets_cr2() {
    let fault = Exception { vector: vector::PF, error: Some(6), cr2: Some(0xdead_b000) };
    let machine = delivered(Machine::user(), Event::Exception(fault), 14);
    assert_eq!((machine.cpu.cr2, machine.stack(0)), (0xdead_b000, 6));
}

#[test]
fn gate_dpl_stops_the_users_int_but_no_exception() {
    let mut machine = Machine::user();
    assert_eq!(machine.fault(&[0xcd, 0x21]), Exception::gp(0x21 * 8 + 2));
    assert_eq!(machine.fault(&[0xcc]), Exception::gp(3 * 8 + 2));
    delivered(machine, GP, 13);
}

#[test]
fn int_through_an_open_gate_returns_behind_itself() {
    let mut machine = Machine::user();
    machine.set_gate(0x80, gate(KERNEL_CODE, handler(0x80), 0xee, 0));
    machine.cpu.eflags |= TF;
    machine.done(&[0xcd, 0x80]);
    assert_eq!((machine.cpu.eip, machine.stack(0)), (handler(0x80), CODE + 2));
    assert_eq!(machine.cpu.eflags & TF, 0);
    assert_eq!(machine.stack(2), FIXED | TF, "no RF, and TF as it was");
}

#[test]
fn into_only_with_overflow() {
    let mut machine = Machine::kernel();
    machine.done(&[0xce]);
    assert_eq!(machine.cpu.eip, CODE + 1);
    machine.cpu.eflags |= crate::cpu::eflags::OF;
    machine.done(&[0xce]);
    assert_eq!((machine.cpu.eip, machine.stack(0)), (handler(4), CODE + 2));
}

#[test]
fn int1_ignores_the_gates_dpl() {
    let mut machine = Machine::user();
    machine.done(&[0xf1]);
    assert_eq!((machine.cpu.eip, machine.stack(0)), (handler(1), CODE + 1));
}

#[test]
fn software_event_is_delivered_as_the_instruction_would() {
    let event = Event::Software { vector: 0x21, next: CODE + 2 };
    let machine = error_of_software(event);
    assert_eq!(machine.stack(0), 0x21 * 8 + 2, "no EXT");
    assert_eq!(machine.stack(1), CODE, "the #GP is the instruction's");
}

fn error_of_software(event: Event) -> Machine {
    delivered(Machine::user(), event, 13)
}

#[test]
fn vector_beyond_the_idt_is_gp_with_idt_and_ext() {
    let mut machine = Machine::kernel();
    machine.cpu.idtr.limit = 0x40 * 8 + 6;
    assert_eq!(error_of(machine.clone(), Event::External(0x40), 13), 0x40 * 8 + 3);
    assert_eq!(machine.fault(&[0xcd, 0x40]), Exception::gp(0x40 * 8 + 2));
}

#[test]
fn gate_of_a_wrong_type_is_gp() {
    for access in [0x80, 0x82, 0x89, 0x8c, 0x92, 0x9a] {
        let mut machine = Machine::kernel();
        machine.set_gate(0x40, gate(KERNEL_CODE, handler(0x40), access, 0));
        assert_eq!(error_of(machine, Event::External(0x40), 13), 0x40 * 8 + 3, "access {access:#x}");
    }
}

#[test]
fn gate_not_present_is_np_after_the_dpl_check() {
    let mut machine = Machine::user();
    machine.set_gate(0x40, gate(KERNEL_CODE, handler(0x40), 0x0e, 0));
    assert_eq!(error_of(machine.clone(), Event::External(0x40), 11), 0x40 * 8 + 3);
    assert_eq!(machine.fault(&[0xcd, 0x40]), Exception::gp(0x40 * 8 + 2));
    machine.set_gate(0x40, gate(KERNEL_CODE, handler(0x40), 0x6e, 0));
    assert_eq!(machine.fault(&[0xcd, 0x40]), Exception::np(0x40 * 8 + 2));
}

#[test]
fn task_gate_is_unknown_by_name() {
    let mut machine = Machine::kernel();
    machine.set_gate(0x40, gate(TASK, 0, 0x85, 0));
    let before = machine.cpu.clone();
    match machine.deliver(Event::External(0x40)) {
        Delivered::Unknown(unknown) => assert_eq!((unknown.what, unknown.eip), ("task gate", CODE)),
        other => panic!("{other:?}"),
    }
    assert_eq!(machine.cpu, before);
}

#[test]
fn gates_code_selector_is_checked() {
    let case = |selector: u16, attributes: u16| {
        let mut machine = Machine::kernel();
        machine.set_descriptor(FREE, 0, 0xfffff, attributes);
        machine.set_gate(0x40, gate(selector, handler(0x40), 0x8e, 0));
        machine
    };
    let event = Event::External(0x40);
    assert_eq!(error_of(case(0, CODE_0), event, 13), 1, "null");
    assert_eq!(error_of(case(0x100, CODE_0), event, 13), 0x101, "outside the GDT");
    assert_eq!(error_of(case(0x104, CODE_0), event, 13), 0x105, "no LDT");
    assert_eq!(error_of(case(FREE, DATA_0), event, 13), u32::from(FREE) + 1, "data");
    assert_eq!(error_of(case(FREE, CODE_3), event, 13), u32::from(FREE) + 1, "outer ring");
    assert_eq!(error_of(case(FREE, CODE_0 & !0x80), event, 11), u32::from(FREE) + 1, "absent");
}

#[test]
fn conforming_handler_runs_at_the_interrupted_privilege() {
    let mut machine = Machine::user();
    machine.set_descriptor(FREE, 0, 0xfffff, CODE_0 | 4);
    machine.set_gate(0x40, gate(FREE, handler(0x40), 0x8e, 0));
    let machine = delivered(machine, Event::External(0x40), 0x40);
    assert_eq!((machine.cpu.cpl, machine.selector(Seg::Cs)), (3, FREE | 3));
    assert_eq!(machine.cpu.gpr[4], USER_STACK - 12);
}

#[test]
fn handler_beyond_its_segment_is_gp() {
    let mut machine = Machine::kernel();
    machine.set_descriptor(FREE, 0, 0x5000, CODE_0 & !0x8000);
    machine.set_gate(0x40, gate(FREE, handler(0x40), 0x8e, 0));
    assert_eq!(error_of(machine, Event::External(0x40), 13), 1);
}

/// A user's machine whose #TS, #SS and #GP handlers are conforming, so that they need no inner stack.
fn user_with_outer_handlers() -> Machine {
    let mut machine = Machine::user();
    machine.set_descriptor(FREE, 0, 0xfffff, CODE_0 | 4);
    for vector in [10, 12, 13, 14] {
        machine.set_gate(vector, gate(FREE, handler(vector), 0x8e, 0));
    }
    machine
}

#[test]
fn inner_stack_that_is_unusable_is_ts() {
    let other = FREE + 8;
    let case = |selector: u16, attributes: u16| {
        let mut machine = user_with_outer_handlers();
        machine.set_descriptor(other, 0, 0xfffff, attributes);
        machine.bus.place(TSS + 8, &selector.to_le_bytes());
        machine
    };
    let event = Event::External(0x40);
    let code = u32::from(other) + 1;
    assert_eq!(error_of(case(0, DATA_0), event, 10), 1, "null");
    assert_eq!(error_of(case(0x1f8, DATA_0), event, 10), 0x1f9, "outside");
    assert_eq!(error_of(case(other | 3, DATA_0), event, 10), code, "RPL");
    assert_eq!(error_of(case(other, DATA_3), event, 10), code, "DPL");
    assert_eq!(error_of(case(other, CODE_0), event, 10), code, "code");
    assert_eq!(error_of(case(other, DATA_0 & !2), event, 10), code, "read-only");
    assert_eq!(error_of(case(other, DATA_0 & !0x80), event, 12), code, "absent is #SS");
}

#[test]
fn tss_too_short_is_ts_of_the_task() {
    let mut machine = user_with_outer_handlers();
    machine.cpu.tr.limit = 8;
    assert_eq!(error_of(machine, Event::External(0x40), 10), u32::from(TASK) + 1);
}

#[test]
fn tss_of_16_bits_gives_a_16_bit_stack() {
    let mut machine = Machine::user();
    machine.cpu.tr.attributes = 0x83;
    machine.bus.place(TSS + 2, &[0x00, 0x84]);
    machine.bus.place(TSS + 4, &KERNEL_DATA.to_le_bytes());
    assert_eq!(delivered(machine, Event::External(0x40), 0x40).cpu.gpr[4], 0x8400 - 20);
}

#[test]
fn no_room_on_the_new_stack_is_ss_of_its_selector() {
    let other = FREE + 8;
    let mut machine = user_with_outer_handlers();
    machine.set_descriptor(other, 0, 0x10, DATA_0 & !0x8000);
    machine.bus.place(TSS + 4, &8_u32.to_le_bytes());
    machine.bus.place(TSS + 8, &other.to_le_bytes());
    assert_eq!(error_of(machine, Event::External(0x40), 12), u32::from(other) + 1);
}

#[test]
fn no_room_on_the_same_stack_is_a_double_fault_and_then_a_reset() {
    let mut machine = Machine::kernel();
    machine.cpu.seg[Seg::Ss as usize].limit = 0x100;
    assert_eq!(machine.deliver(GP), Delivered::TripleFault);
}

#[test]
fn frame_is_pushed_whole_or_not_at_all() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[4] = 0x8004;
    machine.bus.pages.insert(7, Page::ReadOnly);
    // The page fault's own frame meets the same page: double fault, then reset.
    let memory = machine.bus.memory.clone();
    let before = machine.cpu.clone();
    assert_eq!(machine.deliver(Event::External(0x40)), Delivered::TripleFault);
    assert!(machine.bus.memory == memory, "nothing was pushed");
    assert_eq!(machine.cpu.cr2, 0x7ffc, "the first slot of the lower page that a push would meet");
    machine.cpu.cr2 = before.cr2;
    assert_eq!(machine.cpu, before);
}

#[test]
fn page_fault_on_the_push_reaches_its_handler() {
    // The user's frame goes to an inner stack that is absent; #PF is handled on the user's own.
    let mut machine = user_with_outer_handlers();
    machine.bus.pages.insert(8, Page::Absent);
    let machine = delivered(machine, Event::External(0x40), 14);
    assert_eq!(machine.cpu.cr2, KERNEL_STACK - 4);
    assert_eq!(machine.stack(0), 2, "a supervisor's write to an absent page");
}

#[test]
fn double_fault_table() {
    // What the second fault becomes: both go to a #NP gate or an absent IDT page.
    let second_by = |first: Exception, absent_gate: u8| {
        let mut machine = Machine::kernel();
        machine.set_gate(absent_gate, gate(KERNEL_CODE, 0, 0x0e, 0));
        assert_eq!(machine.deliver(Event::Exception(first)), Delivered::Handler);
        machine.cpu.eip - HANDLER
    };
    let page_fault = Exception { vector: vector::PF, error: Some(0), cr2: Some(0) };
    assert_eq!(second_by(Exception::UD, 6), 11, "benign, then contributory");
    assert_eq!(second_by(Exception::gp(0), 13), 8, "contributory twice");
    assert_eq!(second_by(Exception::DE, 0), 8, "#DE is contributory");
    assert_eq!(second_by(page_fault, 14), 8, "page fault, then contributory");
    assert_eq!(second_by(Exception::AC, 17), 11, "#AC is benign");
}

#[test]
fn contributory_then_page_fault_is_handled_serially() {
    let mut machine = Machine::kernel();
    // The IDT's second page holds no gate below 512 bytes: #GP's gate is in the first, absent page of another IDT.
    machine.cpu.idtr = TableRegister { base: 0xbf98, limit: 0x7ff };
    machine.bus.pages.insert(0xb, Page::Absent);
    // #GP's gate lies at 0xc000, #PF's at 0xc008; #DE's on the absent page.
    machine.bus.place(0xc008, &gate(KERNEL_CODE, handler(14), 0x8e, 0));
    let machine = delivered(machine, Event::Exception(Exception::DE), 14);
    assert_eq!(machine.cpu.cr2, 0xbf98);
}

#[test]
fn page_fault_twice_is_a_double_fault_with_error_zero() {
    let mut machine = Machine::kernel();
    machine.cpu.idtr = TableRegister { base: 0xbfb8, limit: 0x7ff };
    // #DF's gate at 0xbff8 is present; #PF's at 0xc028 is not.
    machine.bus.pages.insert(0xc, Page::Absent);
    machine.bus.place(0xbff8, &gate(KERNEL_CODE, handler(8), 0x8e, 0));
    let fault = Exception { vector: vector::PF, error: Some(2), cr2: Some(0x1234) };
    let machine = delivered(machine, Event::Exception(fault), 8);
    assert_eq!((machine.stack(0), machine.cpu.cr2), (0, 0xc028));
}

#[test]
fn fault_on_the_way_to_the_double_fault_handler_is_a_triple_fault() {
    let mut machine = Machine::kernel();
    machine.cpu.idtr.limit = 0;
    let before = machine.cpu.clone();
    assert_eq!(machine.deliver(GP), Delivered::TripleFault);
    assert_eq!(machine.cpu, before);
}

#[test]
fn again_changes_nothing_and_the_retry_succeeds() {
    let whole = delivered(Machine::user(), GP, 13);
    for call in 0..whole.bus.calls {
        let mut machine = Machine::user();
        let before = machine.cpu.clone();
        machine.bus.again_at = Some(call);
        assert_eq!(machine.deliver(GP), Delivered::Again, "call {call}");
        assert_eq!(machine.cpu, before, "call {call}");
        assert_eq!(machine.bus.paging.0, 0, "call {call}");
        let machine = delivered(machine, GP, 13);
        assert_eq!(machine.cpu, whole.cpu, "call {call}");
        assert!(machine.bus.memory == whole.bus.memory, "call {call}");
    }
}

#[test]
fn accessed_bit_is_set_in_the_handlers_descriptors() {
    let mut machine = Machine::user();
    machine.set_descriptor(KERNEL_CODE, 0, 0xfffff, CODE_0);
    machine.set_descriptor(KERNEL_DATA, 0, 0xfffff, DATA_0);
    let machine = delivered(machine, GP, 13);
    let access = |selector: u16| machine.bus.memory[(GDT + u32::from(selector)) as usize + 5];
    assert_eq!((access(KERNEL_CODE), access(KERNEL_DATA)), (0x9b, 0x93));
    assert_eq!(machine.cpu.segment(Seg::Cs).attributes, CODE_0 | 1);
}

#[test]
fn real_mode_goes_by_the_vector_table() {
    let mut machine = Machine::real();
    machine.cpu.eflags |= IF | TF;
    machine.bus.place(4 * 0x40, &[0x34, 0x12, 0x00, 0x02]);
    assert_eq!(machine.deliver(Event::External(0x40)), Delivered::Handler);
    assert_eq!((machine.cpu.eip, machine.cpu.segment(Seg::Cs).base), (0x1234, 0x2000));
    assert_eq!(machine.cpu.eflags, FIXED);
    assert_eq!(machine.stack(0), CODE, "IP, and CS 0");
    machine.done(&[0xcf]);
    assert_eq!((machine.cpu.eip, machine.cpu.eflags, machine.cpu.gpr[4]), (CODE, FIXED | IF | TF, 0x7000));
}

#[test]
fn exceptions_of_a_step_restart_after_delivery() {
    // A user's store to an absent page: #PF, handler, IRET, and the store again.
    let mut machine = Machine::user();
    machine.bus.pages.insert(6, Page::Absent);
    let fault = machine.fault(&[0xa3, 0x00, 0x60, 0x00, 0x00]);
    assert_eq!((fault.vector, fault.error, fault.cr2), (14, Some(6), Some(DATA)));
    let mut machine = delivered(machine, Event::Exception(fault), 14);
    assert_eq!(machine.stack(0), 6);
    machine.bus.pages.clear();
    // add esp, 4; iret
    machine.done(&[0x83, 0xc4, 0x04]);
    machine.done(&[0xcf]);
    machine.cpu.gpr[0] = 77;
    assert_eq!((machine.cpu.eip, machine.cpu.eflags & RF), (CODE, RF), "RF holds for one instruction");
    assert_eq!(machine.run(&[0xa3, 0x00, 0x60, 0x00, 0x00]), Step::Done);
    assert_eq!((machine.bus.dword(DATA), machine.cpu.eflags & RF), (77, 0));
}
