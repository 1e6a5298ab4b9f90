//! Limits, types, expand-down, alignment.

use super::super::Exception;
use super::machine::*;
use crate::cpu::eflags::AC;
use crate::cpu::{Seg, cr0};

/// mov [disp32], eax and mov eax, [disp32].
fn store(offset: u32) -> Vec<u8> {
    [&[0xa3][..], &offset.to_le_bytes()].concat()
}

fn load(offset: u32) -> Vec<u8> {
    [&[0xa1][..], &offset.to_le_bytes()].concat()
}

fn with_ds(limit: u32, attributes: u16) -> Machine {
    let mut machine = Machine::kernel();
    let ds = &mut machine.cpu.seg[Seg::Ds as usize];
    (ds.limit, ds.attributes) = (limit, attributes);
    machine
}

#[test]
fn access_across_the_limit_is_gp() {
    with_ds(0x6003, DATA_0).done(&load(0x6000));
    assert_eq!(with_ds(0x6003, DATA_0).fault(&load(0x6001)), Exception::gp(0));
    assert_eq!(with_ds(0x6003, DATA_0).fault(&store(0x6004)), Exception::gp(0));
    assert_eq!(with_ds(0x6003, DATA_0).fault(&load(0xffff_fffe)), Exception::gp(0));
}

#[test]
fn dword_at_the_end_of_a_flat_segment_is_gp() {
    assert_eq!(Machine::kernel().fault(&load(0xffff_fffe)), Exception::gp(0));
}

#[test]
fn expand_down_admits_what_is_above_the_limit() {
    let down = DATA_0 | 4;
    with_ds(0x5fff, down).done(&load(0x6000));
    assert_eq!(with_ds(0x5fff, down).fault(&load(0x5fff)), Exception::gp(0));
    let small = down & !0x4000;
    with_ds(0x5fff, small).done(&load(0xfffc));
    assert_eq!(with_ds(0x5fff, small).fault(&load(0xfffd)), Exception::gp(0), "a small one ends at 64 KiB");
}

#[test]
fn types_are_enforced() {
    with_ds(u32::MAX, DATA_0 & !2).done(&load(DATA));
    assert_eq!(with_ds(u32::MAX, DATA_0 & !2).fault(&store(DATA)), Exception::gp(0), "read-only");
    with_ds(u32::MAX, CODE_0).done(&load(DATA));
    assert_eq!(with_ds(u32::MAX, CODE_0).fault(&store(DATA)), Exception::gp(0), "code is not written");
    assert_eq!(with_ds(u32::MAX, CODE_0 & !2).fault(&load(DATA)), Exception::gp(0), "execute-only");
}

#[test]
fn stack_segment_faults_are_ss() {
    let mut machine = Machine::kernel();
    machine.cpu.seg[Seg::Ss as usize].limit = 0x100;
    assert_eq!(machine.fault(&[0x50]), Exception::ss(0));
    assert_eq!(machine.fault(&[0x58]), Exception::ss(0));
    // mov eax, [ebp + 0]: SS by default
    machine.cpu.gpr[5] = 0x200;
    assert_eq!(machine.fault(&[0x8b, 0x45, 0x00]), Exception::ss(0));
    // the same by DS
    machine.done(&[0x3e, 0x8b, 0x45, 0x00]);
}

#[test]
fn bases_wrap() {
    let mut machine = Machine::kernel();
    machine.cpu.seg[Seg::Ds as usize].base = 0xffff_f000;
    machine.bus.place(DATA, &[1, 2, 3, 4]);
    machine.done(&load(DATA + 0x1000));
    assert_eq!(machine.cpu.gpr[0], 0x0403_0201);
}

#[test]
fn addresses_of_16_bits_wrap_within_64_kib() {
    let mut machine = Machine::kernel();
    machine.bus.place(DATA, &[1, 2, 3, 4]);
    (machine.cpu.gpr[3], machine.cpu.gpr[6]) = (0xdead_f000, 0xbeef_7000);
    // mov eax, [bx + si]
    machine.done(&[0x67, 0x8b, 0x00]);
    assert_eq!(machine.cpu.gpr[0], 0x0403_0201);
}

#[test]
fn alignment_is_checked_for_users_who_ask() {
    let mut machine = Machine::user();
    machine.done(&load(DATA + 1));
    machine.cpu.eflags |= AC;
    machine.done(&load(DATA + 1));
    machine.cpu.cr0 |= cr0::AM;
    assert_eq!(machine.fault(&load(DATA + 1)), Exception::AC);
    machine.done(&load(DATA + 4));
    machine.cpu.gpr[4] -= 2;
    assert_eq!(machine.fault(&[0x50]), Exception::AC, "push");
    assert_eq!(machine.fault(&[0x60]), Exception::AC, "pusha");
    machine.cpu.cpl = 0;
    machine.done(&load(DATA + 1));
}

#[test]
fn alignment_does_not_matter_to_delivery() {
    let mut machine = Machine::user();
    machine.cpu.eflags |= AC;
    machine.cpu.cr0 |= cr0::AM;
    machine.bus.place(TSS + 4, &(KERNEL_STACK + 1).to_le_bytes());
    let event = super::super::Event::Exception(Exception::AC);
    assert_eq!(machine.deliver(event), super::super::Delivered::Handler);
}
