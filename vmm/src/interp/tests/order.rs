//! Which of several faults comes first, and other fine points: each was once a difference from the CPU that
//! `tests/interp_native` runs on.

use umbra_mmu::FaultCode;

use super::super::flat::Page;
use super::super::{Exception, Step, vector};
use super::machine::*;
use crate::cpu::eflags::{AC, RF, TF, ZF};
use crate::cpu::{Seg, cr0};

/// The address and error code of a page fault.
fn page_fault(machine: &mut Machine, bytes: &[u8]) -> (u32, u32) {
    let fault = machine.fault(bytes);
    assert_eq!(fault.vector, vector::PF, "{fault:?}");
    (fault.cr2.unwrap(), fault.error.unwrap())
}

const READ: u32 = FaultCode::USER.bits();
const WRITE: u32 = FaultCode::USER.bits() | FaultCode::WRITE.bits();

/// At CPL 3, code of a small limit, the page below the stack's pointer absent.
fn without_stack() -> Machine {
    let mut machine = Machine::user();
    machine.cpu.seg[Seg::Cs as usize].limit = 0x5fff;
    machine.cpu.gpr[4] = 0xa000;
    machine.bus.pages.insert(9, Page::Absent);
    machine
}

#[test]
fn a_call_finds_the_fault_of_its_push_before_that_of_its_target() {
    // call near, to beyond the limit
    let near = [0xe8, 0, 0, 1, 0];
    assert_eq!(page_fault(&mut without_stack(), &near), (0x9ffc, WRITE));
    // call USER_CODE:0x6000
    let mut far = without_stack();
    far.set_descriptor(FREE, 0, 0x5fff, CODE_3 & !0x8000);
    let bytes = [0x9a, 0, 0x60, 0, 0, FREE as u8 | 3, 0];
    assert_eq!(page_fault(&mut far, &bytes), (0x9ffc, WRITE));
    far.bus.pages.clear();
    assert_eq!(far.fault(&bytes), Exception::gp(0));
}

#[test]
fn a_jump_has_no_push_to_fault() {
    assert_eq!(without_stack().fault(&[0xe9, 0, 0, 1, 0]), Exception::gp(0));
}

#[test]
fn far_returns_read_their_frame_from_its_far_end() {
    let mut machine = Machine::user();
    machine.bus.pages.insert(9, Page::Absent);
    machine.cpu.gpr[4] = 0x9ff0 - 8;
    assert_eq!(page_fault(&mut machine, &[0xcb]), (0x9fec, READ), "retf: CS first");
    assert_eq!(page_fault(&mut machine, &[0xcf]), (0x9ff0, READ), "iretd: EFLAGS first");
}

#[test]
fn a_return_to_another_ring_reads_the_outer_stack_before_it_looks_at_the_selector() {
    let mut machine = Machine::user();
    machine.bus.place(USER_STACK + 4, &KERNEL_CODE.to_le_bytes());
    assert_eq!(machine.fault(&[0xcb]), Exception::gp(KERNEL_CODE));
    machine.bus.pages.insert(0xb, Page::Absent);
    // retf 0x7f4: SS lies 8 + 0x7f4 + 4 bytes up
    assert_eq!(page_fault(&mut machine, &[0xca, 0xf4, 0x07]), (0xb000, READ));
}

#[test]
fn arpl_writes_only_what_it_changes() {
    let mut machine = Machine::user();
    machine.bus.pages.insert(DATA >> 12, Page::ReadOnly);
    machine.bus.place(DATA, &[3]);
    (machine.cpu.gpr[0], machine.cpu.gpr[1]) = (DATA, 3);
    // arpl [eax], cx
    machine.done(&[0x63, 0x08]);
    assert_eq!(machine.cpu.eflags & ZF, 0);
    machine.bus.place(DATA, &[2]);
    let protection = FaultCode::PRESENT.bits();
    assert_eq!(page_fault(&mut machine, &[0x63, 0x08]), (DATA, WRITE | protection));
    machine.bus.pages.insert(DATA >> 12, Page::Absent);
    assert_eq!(page_fault(&mut machine, &[0x63, 0x08]), (DATA, READ));
}

#[test]
fn enter_meets_its_faults_in_the_order_of_its_accesses() {
    let mut machine = Machine::user();
    machine.bus.pages.insert(8, Page::Absent);
    // The enclosing frame's pointer lies in an absent page, and the third push too.
    (machine.cpu.gpr[4], machine.cpu.gpr[5]) = (0x9008, 0x9002);
    // enter 0, 3
    assert_eq!(page_fault(&mut machine, &[0xc8, 0, 0, 3]), (0x8ffe, READ));
    machine.cpu.gpr[5] = 0x9100;
    assert_eq!(page_fault(&mut machine, &[0xc8, 0, 0, 3]), (0x8ffc, WRITE));
}

#[test]
fn enter_checks_the_alignment_of_its_room() {
    let mut machine = Machine::user();
    machine.cpu.cr0 |= cr0::AM;
    machine.cpu.eflags |= AC;
    assert_eq!(machine.fault(&[0xc8, 1, 0, 0]), Exception::AC);
    machine.done(&[0xc8, 4, 0, 0]);
}

#[test]
fn clflush_reads_code_that_cannot_be_read() {
    let mut machine = Machine::user();
    machine.cpu.seg[Seg::Cs as usize].attributes &= !2;
    // mov al, cs:[eax]; clflush cs:[eax]
    machine.cpu.gpr[0] = DATA;
    assert_eq!(machine.fault(&[0x2e, 0x8a, 0x00]), Exception::gp(0));
    machine.done(&[0x2e, 0x0f, 0xae, 0x38]);
    machine.cpu.gpr[0] = 0;
    machine.cpu.seg[Seg::Ds as usize].unusable = true;
    assert_eq!(machine.fault(&[0x0f, 0xae, 0x38]), Exception::gp(0));
}

#[test]
fn a_single_step_between_iterations_saves_no_resume_flag() {
    let mut machine = Machine::user();
    machine.cpu.eflags |= TF;
    (machine.cpu.gpr[1], machine.cpu.gpr[7]) = (3, DATA);
    // rep stosb
    assert_eq!(machine.run(&[0xf3, 0xaa]), Step::Exception(Exception::DB));
    assert_eq!((machine.cpu.gpr[1], machine.cpu.eip, machine.cpu.eflags & RF), (2, CODE, 0));
}

#[test]
fn software_interrupts_save_no_resume_flag() {
    let mut machine = Machine::user();
    machine.set_gate(0x80, gate(KERNEL_CODE, HANDLER, 0xee, 0));
    machine.cpu.eflags |= RF;
    machine.done(&[0xcd, 0x80]);
    assert_eq!((machine.cpu.cpl, machine.stack(2) & RF), (0, 0));
}
