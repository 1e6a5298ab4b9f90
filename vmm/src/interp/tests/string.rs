//! String instructions: progress, faults half way, ports.

use super::super::flat::{Page, PortAccess};
use super::super::{Exception, Step};
use super::machine::*;
use crate::cpu::Seg;
use crate::cpu::eflags::{DF, RF, ZF};

/// A kernel with ESI, EDI and ECX set.
fn strings(from: u32, to: u32, count: u32) -> Machine {
    let mut machine = Machine::kernel();
    (machine.cpu.gpr[6], machine.cpu.gpr[7], machine.cpu.gpr[1]) = (from, to, count);
    machine
}

#[test]
fn rep_of_zero_touches_nothing() {
    let mut machine = strings(u32::MAX, u32::MAX, 0);
    machine.done(&[0xf3, 0xa5]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[7]), (CODE + 2, u32::MAX));
}

#[test]
fn rep_stops_at_the_faulting_iteration_and_goes_on_after_repair() {
    let mut machine = strings(DATA, 0x6ff0, 8);
    machine.bus.place(DATA, &[7; 64]);
    machine.bus.pages.insert(7, Page::ReadOnly);
    match machine.run(&[0xf3, 0xa5]) {
        Step::Exception(fault) => assert_eq!((fault.vector, fault.cr2), (14, Some(0x7000))),
        other => panic!("{other:?}"),
    }
    let progress = (machine.cpu.eip, machine.cpu.gpr[1], machine.cpu.gpr[6], machine.cpu.gpr[7]);
    assert_eq!(progress, (CODE, 4, DATA + 16, 0x7000));
    machine.bus.pages.clear();
    machine.done(&[0xf3, 0xa5]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[1]), (CODE + 2, 0));
    assert_eq!(machine.bus.memory[0x6ff0..0x7010], [7; 32]);
}

#[test]
fn rep_is_bounded_a_step() {
    let mut machine = strings(0, DATA, 10_000);
    machine.cpu.gpr[0] = 0x55;
    machine.done(&[0xf3, 0xaa]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[1]), (CODE, 10_000 - 4096));
    assert_eq!(machine.cpu.eflags & RF, RF, "an interrupt here finds RF");
    machine.done(&[]);
    machine.done(&[]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[1], machine.cpu.eflags & RF), (CODE + 2, 0, 0));
}

#[test]
fn again_half_way_keeps_the_progress() {
    let mut machine = strings(0, DATA, 8);
    // The fetch is call 0, each iteration one more.
    machine.bus.again_at = Some(5);
    machine.done(&[0xf3, 0xab]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[1]), (CODE, 4));
    machine.done(&[]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[1]), (CODE + 2, 0));
    let mut machine = strings(0, DATA, 8);
    machine.bus.again_at = Some(1);
    let before = machine.cpu.clone();
    assert_eq!(machine.run(&[0xf3, 0xab]), Step::Again);
    assert_eq!(machine.cpu, before);
}

#[test]
fn repe_and_repne_end_by_zf_and_a_fault_keeps_the_last_flags() {
    let mut machine = strings(DATA, DATA + 0x100, 16);
    machine.bus.place(DATA + 5, &[1]);
    machine.done(&[0xf3, 0xa6]);
    assert_eq!((machine.cpu.gpr[1], machine.cpu.gpr[6], machine.cpu.eflags & ZF), (10, DATA + 6, 0));
    let mut machine = strings(0, DATA, 16);
    machine.bus.place(DATA + 7, &[0xee]);
    machine.cpu.gpr[0] = 0xee;
    machine.done(&[0xf2, 0xae]);
    assert_eq!((machine.cpu.gpr[1], machine.cpu.gpr[7], machine.cpu.eflags & ZF), (8, DATA + 8, ZF));
    let mut machine = strings(0, 0x6ff8, 16);
    machine.bus.pages.insert(7, Page::Absent);
    assert!(matches!(machine.run(&[0xf3, 0xae]), Step::Exception(_)));
    assert_eq!((machine.cpu.gpr[1], machine.cpu.eflags & ZF), (8, ZF));
}

#[test]
fn registers_of_16_bits_wrap_and_keep_their_upper_half() {
    let mut machine = strings(0xaaaa_0000, 0xbbbb_6000, 0xcccc_0002);
    machine.cpu.eflags |= DF;
    machine.bus.place(0, &[9]);
    machine.done(&[0x67, 0xf3, 0xa4]);
    let registers = [6, 7, 1].map(|n| machine.cpu.gpr[n]);
    assert_eq!(registers, [0xaaaa_fffe, 0xbbbb_5ffe, 0xcccc_0000]);
    assert_eq!(machine.bus.memory[0x6000], 9);
}

#[test]
fn source_segment_can_be_overridden_and_the_target_is_es() {
    let mut machine = strings(0, 0, 0);
    machine.cpu.seg[Seg::Fs as usize].base = DATA;
    machine.cpu.seg[Seg::Es as usize].base = DATA + 0x100;
    machine.bus.place(DATA, &[1, 2, 3, 4]);
    machine.done(&[0x64, 0xa5]);
    assert_eq!(machine.bus.dword(DATA + 0x100), 0x0403_0201);
}

#[test]
fn ins_probes_its_target_before_it_reads_the_port() {
    let mut machine = strings(0, DATA, 2);
    machine.cpu.gpr[2] = 0x1f0;
    machine.bus.pages.insert(6, Page::ReadOnly);
    assert_eq!(machine.fault(&[0xf3, 0x6d]).vector, 14);
    assert!(machine.bus.ports.is_empty(), "nothing was taken from the device");
    machine.bus.pages.clear();
    machine.bus.port_value = 0x8765_4321;
    machine.done(&[0xf3, 0x6d]);
    assert_eq!(machine.bus.ports, [PortAccess::In(0x1f0, 4); 2]);
    assert_eq!((machine.bus.dword(DATA), machine.bus.dword(DATA + 4)), (0x8765_4321, 0x8765_4321));
}

#[test]
fn outs_writes_what_it_reads() {
    let mut machine = strings(DATA, 0, 2);
    machine.cpu.gpr[2] = 0x3f8;
    machine.bus.place(DATA, b"ok");
    machine.done(&[0xf3, 0x6e]);
    assert_eq!(machine.bus.ports, [b'o', b'k'].map(|byte| PortAccess::Out(0x3f8, 1, byte.into())));
    let mut machine = Machine::user();
    machine.cpu.gpr[1] = 0;
    assert_eq!(machine.fault(&[0xf3, 0x6e]), Exception::gp(0), "the port's permission comes first");
}

#[test]
fn movs_reads_before_it_faults_on_the_target() {
    let mut machine = strings(0x7000, DATA, 1);
    machine.bus.pages.extend([(6, Page::Absent), (7, Page::Absent)]);
    assert_eq!(machine.fault(&[0xa4]).cr2, Some(0x7000));
    machine.bus.pages.remove(&7);
    assert_eq!(machine.fault(&[0xa4]).cr2, Some(DATA));
}
