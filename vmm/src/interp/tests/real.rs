//! Real mode, as far as the trampoline of a second CPU needs it: it cannot run natively.

use super::super::{Delivered, Event, Exception, Step, vector};
use super::machine::*;
use crate::cpu::eflags::{CF, IF};
use crate::cpu::{Seg, cr0};

/// The selector whose segment begins at [`CODE`].
const SEGMENT: u16 = (CODE >> 4) as u16;

/// As a start-up IPI leaves a CPU: CS:IP at a page, all else from 0.
fn started() -> Machine {
    let mut machine = Machine::real();
    let cs = &mut machine.cpu.seg[Seg::Cs as usize];
    (cs.selector, cs.base, machine.cpu.eip) = (SEGMENT, CODE, 0);
    machine
}

#[test]
fn a_trampoline_leads_from_real_mode_to_32_bit_code() {
    let mut machine = started();
    let code: &[&[u8]] = &[
        &[0xfa, 0xfc],                                     // cli; cld
        &[0x8c, 0xc8, 0x8e, 0xd8, 0x8e, 0xd0],             // mov ax, cs; mov ds, ax; mov ss, ax
        &[0xbc, 0x00, 0x04],                               // mov sp, 0x400
        &[0xc7, 0x06, 0x00, 0x03, 0xef, 0xbe],             // mov word [0x300], 0xbeef
        &[0x68, 0x34, 0x12, 0x5b],                         // push 0x1234; pop bx
        &[0xcd, 0x40],                                     // int 0x40
        &[0x66, 0x0f, 0x01, 0x16, 0x80, 0x02],             // lgdt [0x280], 32 bits of base
        &[0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0], // mov eax, cr0; or al, 1; mov cr0, eax
        &[0x66, 0xea, 0x00, 0x51, 0x00, 0x00, 0x08, 0x00], // jmp KERNEL_CODE:0x5100
    ];
    machine.bus.place(CODE, &code.concat());
    // The interrupt's handler: inc cx; iret
    machine.bus.place(4 * 0x40, &[0x00, 0x02, SEGMENT as u8, (SEGMENT >> 8) as u8]);
    machine.bus.place(CODE + 0x200, &[0x41, 0xcf]);
    machine.bus.place(CODE + 0x280, &[0xff, 0, GDT as u8, (GDT >> 8) as u8, 0, 0]);
    machine.cpu.gdtr = Default::default();
    let wide: &[&[u8]] = &[
        &[0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xd0], // mov eax, KERNEL_DATA; mov ds, eax; mov ss, eax
        &[0xbc, 0x00, 0x88, 0, 0],                      // mov esp, KERNEL_STACK
        &[0xff, 0x35, 0x00, 0x53, 0, 0, 0xf4],          // push dword [0x5300]; hlt
    ];
    machine.bus.place(0x5100, &wide.concat());
    let steps = (0..100).take_while(|_| machine.go() == Step::Done).count();
    assert_eq!((steps, machine.cpu.halted), (22, true));
    assert_eq!((machine.cpu.gpr[1], machine.cpu.gpr[3]), (1, 0x1234), "handler and stack");
    assert_eq!((machine.cpu.gpr[4], machine.stack(0)), (KERNEL_STACK - 4, 0xbeef));
    assert_eq!((machine.selector(Seg::Cs), machine.cpu.cpl), (KERNEL_CODE, 0));
    assert!(machine.cpu.segment(Seg::Cs).big() && machine.cpu.protected());
}

#[test]
fn lgdt_reads_24_bits_of_base_unless_told_otherwise() {
    let mut machine = started();
    machine.bus.place(DATA, &[0x34, 0x12, 0x78, 0x56, 0x34, 0x12]);
    machine.done(&[0x0f, 0x01, 0x16, 0x00, 0x60]);
    assert_eq!((machine.cpu.gdtr.base, machine.cpu.gdtr.limit), (0x34_5678, 0x1234));
    machine.done(&[0x66, 0x0f, 0x01, 0x16, 0x00, 0x60]);
    assert_eq!(machine.cpu.gdtr.base, 0x1234_5678);
}

#[test]
fn segments_are_paragraphs_of_64_kib() {
    let mut machine = started();
    machine.cpu.gpr[0] = 0x600;
    machine.bus.place(DATA + 0x10, &[0x77]);
    // mov ds, ax; mov cl, [0x10]
    machine.done(&[0x8e, 0xd8]);
    machine.done(&[0x8a, 0x0e, 0x10, 0x00]);
    assert_eq!((machine.cpu.segment(Seg::Ds).base, machine.cpu.gpr[1]), (DATA, 0x77));
    // mov ax, [0xffff]; mov al, [eax]
    assert_eq!(machine.fault(&[0xa1, 0xff, 0xff]), Exception::gp(0));
    machine.cpu.gpr[0] = 0x1_0000;
    assert_eq!(machine.fault(&[0x67, 0x8a, 0x00]), Exception::gp(0));
    // The last segment reaches beyond 1 MiB: no address line is masked.
    machine.cpu.gpr[0] = 0xffff;
    machine.done(&[0x8e, 0xd8]);
    assert_eq!(machine.fault(&[0xa0, 0xff, 0xff]).cr2, Some(0x10_ffef));
}

#[test]
fn the_stack_wraps_at_64_kib() {
    let mut machine = started();
    machine.cpu.gpr[4] = 0xabcd_0000;
    machine.cpu.gpr[0] = 0x1234_5678;
    // push ax; push eax
    machine.done(&[0x50]);
    machine.done(&[0x66, 0x50]);
    assert_eq!((machine.cpu.gpr[4], machine.bus.dword(0xfffa)), (0xabcd_fffa, 0x1234_5678));
    machine.cpu.gpr[4] = 1;
    assert_eq!(machine.fault(&[0x50]), Exception::ss(0));
}

#[test]
fn far_calls_come_back_in_both_sizes() {
    for (prefix, bytes) in [(&[][..], 4), (&[0x66][..], 8)] {
        let mut machine = started();
        let target = if bytes == 4 { &[0, 2][..] } else { &[0, 2, 0, 0][..] };
        let call = [prefix, &[0x9a], target, &SEGMENT.to_le_bytes()].concat();
        machine.done(&call);
        assert_eq!((machine.cpu.eip, machine.cpu.gpr[4]), (0x200, 0x7000 - bytes));
        machine.done(&[prefix, &[0xcb]].concat());
        assert_eq!((machine.cpu.eip as usize, machine.cpu.gpr[4]), (call.len(), 0x7000));
    }
}

#[test]
fn an_exception_goes_through_the_vector_table_without_an_error_code() {
    let mut machine = started();
    machine.bus.place(4 * u32::from(vector::GP), &[0x00, 0x03, 0x00, 0x05]);
    machine.cpu.eflags |= IF | CF;
    let fault = machine.fault(&[0xa1, 0xff, 0xff]);
    assert_eq!(machine.deliver(Event::Exception(fault)), Delivered::Handler);
    assert_eq!((machine.selector(Seg::Cs), machine.cpu.eip), (0x500, 0x300));
    assert_eq!((machine.cpu.gpr[4], machine.cpu.eflags & IF), (0x7000 - 6, 0));
    assert_eq!(machine.stack(0), u32::from(SEGMENT) << 16, "IP at the instruction, then CS");
    machine.done(&[0xcf]);
    assert_eq!((machine.cpu.eip, machine.cpu.eflags & (IF | CF)), (0, IF | CF));
}

#[test]
fn a_limit_loaded_in_protected_mode_stays_in_real_mode() {
    let mut machine = Machine::kernel();
    // mov eax, cr0; and al, ~1; mov cr0, eax
    machine.done(&[0x0f, 0x20, 0xc0]);
    machine.done(&[0x24, 0xfe]);
    machine.done(&[0x0f, 0x22, 0xc0]);
    assert!(!machine.cpu.protected());
    machine.cpu.gpr[0] = DATA >> 4;
    machine.done(&[0x8e, 0xd8]);
    let ds = machine.cpu.segment(Seg::Ds);
    assert_eq!((ds.base, ds.limit), (DATA, u32::MAX));
    machine.bus.place(0x1000, &[9]);
    machine.cpu.gpr[3] = 0x1000_u32.wrapping_sub(DATA);
    machine.done(&[0x8a, 0x03]);
    assert_eq!(machine.cpu.gpr[0] & 0xff, 9, "beyond 64 KiB");
}

#[test]
fn protection_and_paging_can_be_switched_on_at_once() {
    let mut machine = started();
    machine.cpu.gpr[0] = cr0::PG | cr0::PE;
    machine.done(&[0x0f, 0x22, 0xc0]);
    assert!(machine.cpu.paging());
    assert_eq!(machine.bus.paging.0, 1, "the bus has heard of it");
    machine.cpu = started().cpu;
    machine.cpu.gpr[0] = cr0::PG;
    assert_eq!(machine.fault(&[0x0f, 0x22, 0xc0]), Exception::gp(0), "paging needs protection");
}

#[test]
fn a_real_mode_cpu_knows_no_descriptors_and_keeps_no_port_from_anybody() {
    // sldt, str, lldt, ltr, verr, verw; lar; arpl
    for modrm in [0xc0, 0xc8, 0xd0, 0xd8, 0xe0, 0xe8] {
        assert_eq!(started().fault(&[0x0f, 0x00, modrm]), Exception::UD);
    }
    assert_eq!(started().fault(&[0x0f, 0x02, 0xc0]), Exception::UD);
    assert_eq!(started().fault(&[0x63, 0xc0]), Exception::UD);
    let mut machine = started();
    machine.done(&[0xe6, 0x80]);
    assert_eq!(machine.bus.ports.len(), 1);
}

#[test]
fn code_ends_at_its_segments_limit() {
    let mut machine = started();
    machine.cpu.eip = 0xffff;
    // The first byte of a longer instruction, at the segment's last address.
    machine.cpu.seg[Seg::Cs as usize].base = 0;
    assert_eq!(machine.fault(&[0xb8, 1, 2]), Exception::gp(0));
    // A jump wraps in 16 bits: jmp $+4 from 0xfffe
    machine.cpu.eip = 0xfffc;
    machine.done(&[0xeb, 0x04]);
    assert_eq!(machine.cpu.eip, 2);
}
