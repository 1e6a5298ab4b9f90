//! Stack instructions, flags on the stack, and the moves without a native twin.

use super::super::flat::Page;
use super::super::{Exception, Step};
use super::machine::*;
use crate::cpu::Seg;
use crate::cpu::eflags::{AC, CF, DF, FIXED, ID, IF, IOPL, NT, RF, TF, VM, ZF};

#[test]
fn push_esp_pushes_the_old_value_and_pop_esp_the_popped() {
    let mut machine = Machine::kernel();
    machine.done(&[0x54]);
    assert_eq!((machine.stack(0), machine.cpu.gpr[4]), (KERNEL_STACK, KERNEL_STACK - 4));
    machine.bus.place(KERNEL_STACK - 4, &0x1234_5678_u32.to_le_bytes());
    machine.done(&[0x5c]);
    assert_eq!(machine.cpu.gpr[4], 0x1234_5678);
}

#[test]
fn pop_to_memory_computes_its_address_after_the_pop() {
    let mut machine = Machine::kernel();
    machine.bus.place(KERNEL_STACK, &[0xaa, 0xbb, 0xcc, 0xdd]);
    // pop [esp + 8]
    machine.done(&[0x8f, 0x44, 0x24, 0x08]);
    assert_eq!(machine.bus.dword(KERNEL_STACK + 12), 0xddcc_bbaa);
    // push [esp + 8]
    machine.done(&[0xff, 0x74, 0x24, 0x08]);
    assert_eq!(machine.stack(0), 0xddcc_bbaa);
}

#[test]
fn pop_to_memory_that_faults_moves_nothing() {
    let mut machine = Machine::kernel();
    machine.bus.pages.insert(6, Page::ReadOnly);
    assert_eq!(machine.fault(&[0x8f, 0x05, 0, 0x60, 0, 0]).vector, 14);
}

#[test]
fn pushes_of_immediates_are_sign_extended() {
    let mut machine = Machine::kernel();
    machine.done(&[0x6a, 0x80]);
    assert_eq!(machine.stack(0), 0xffff_ff80);
    machine.done(&[0x66, 0x6a, 0x80]);
    assert_eq!((machine.cpu.gpr[4], machine.stack(0) & 0xffff), (KERNEL_STACK - 6, 0xff80));
    machine.done(&[0x68, 1, 2, 3, 4]);
    assert_eq!(machine.stack(0), 0x0403_0201);
}

#[test]
fn stack_of_16_bits_moves_sp_alone_and_wraps() {
    let mut machine = Machine::kernel();
    let ss = &mut machine.cpu.seg[Seg::Ss as usize];
    (ss.attributes, ss.limit) = (0x0093, 0xffff);
    machine.cpu.gpr[4] = 0x1234_0000;
    machine.cpu.gpr[0] = 0xcafe_f00d;
    machine.done(&[0x50]);
    assert_eq!((machine.cpu.gpr[4], machine.bus.dword(0xfffc)), (0x1234_fffc, 0xcafe_f00d));
    machine.done(&[0x5b]);
    assert_eq!((machine.cpu.gpr[4], machine.cpu.gpr[3]), (0x1234_0000, 0xcafe_f00d));
    machine.cpu.gpr[4] = 0x1234_0002;
    assert_eq!(machine.fault(&[0x50]), Exception::ss(0), "a dword across the end");
}

#[test]
fn pusha_and_popa_skip_esp() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr = [1, 2, 3, 4, KERNEL_STACK, 6, 7, 8];
    machine.done(&[0x60]);
    assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(|n| machine.stack(n)), [8, 7, 6, KERNEL_STACK, 4, 3, 2, 1]);
    let esp = machine.cpu.gpr[4];
    machine.cpu.gpr = [0; 8];
    machine.cpu.gpr[4] = esp;
    machine.done(&[0x61]);
    assert_eq!(machine.cpu.gpr, [1, 2, 3, 4, KERNEL_STACK, 6, 7, 8]);
    machine.done(&[0x66, 0x60]);
    assert_eq!((machine.cpu.gpr[4], machine.stack(0)), (KERNEL_STACK - 16, 0x0007_0008));
    machine.cpu.gpr[7] = 0xffff_0000;
    machine.done(&[0x66, 0x61]);
    assert_eq!(machine.cpu.gpr[7], 0xffff_0008);
}

#[test]
fn pusha_across_a_bad_page_writes_nothing() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[4] = 0x8010;
    machine.bus.pages.insert(7, Page::ReadOnly);
    let memory = machine.bus.memory.clone();
    let fault = machine.fault(&[0x60]);
    assert_eq!((fault.vector, fault.cr2), (14, Some(0x7ffc)), "the first slot that a push would meet");
    machine.bus.memory[CODE as usize] = 0;
    assert!(machine.bus.memory == memory);
}

#[test]
fn enter_without_nesting_and_leave() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[5] = 0x1111_1111;
    machine.done(&[0xc8, 0x20, 0, 0]);
    assert_eq!((machine.cpu.gpr[5], machine.cpu.gpr[4]), (KERNEL_STACK - 4, KERNEL_STACK - 0x24));
    assert_eq!(machine.bus.dword(KERNEL_STACK - 4), 0x1111_1111);
    machine.done(&[0xc9]);
    assert_eq!((machine.cpu.gpr[5], machine.cpu.gpr[4]), (0x1111_1111, KERNEL_STACK));
}

#[test]
fn enter_copies_the_outer_frames_pointers() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[5] = DATA + 0x100;
    machine.bus.place(DATA + 0xf8, &[0xb2, 0, 0, 0, 0xa1, 0, 0, 0]);
    machine.done(&[0xc8, 8, 0, 3]);
    let frame = KERNEL_STACK - 4;
    let at = |n: u32| machine.bus.dword(frame - 4 * n);
    assert_eq!([at(0), at(1), at(2), at(3)], [DATA + 0x100, 0xa1, 0xb2, frame]);
    assert_eq!((machine.cpu.gpr[5], machine.cpu.gpr[4]), (frame, frame - 12 - 8));
}

#[test]
fn enter_that_cannot_make_room_changes_nothing() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[4] = 0x8010;
    machine.bus.pages.insert(7, Page::Absent);
    let memory = machine.bus.memory.clone();
    assert_eq!(machine.fault(&[0xc8, 0x20, 0, 0]).vector, 14, "the room's last page");
    machine.bus.memory[CODE as usize..CODE as usize + 4].fill(0);
    assert!(machine.bus.memory == memory);
}

#[test]
fn pushf_hides_rf_and_vm() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= RF | IF | IOPL | AC;
    machine.done(&[0x9c]);
    assert_eq!(machine.stack(0), FIXED | IF | IOPL | AC);
    assert_eq!(machine.cpu.eflags & RF, 0, "RF holds for one instruction");
}

/// EFLAGS after a POPFD of all ones at `cpl` and `iopl`.
fn popf(cpl: u8, iopl: u32) -> u32 {
    let mut machine = if cpl == 0 { Machine::kernel() } else { Machine::user() };
    machine.cpu.eflags |= iopl << 12;
    let esp = machine.cpu.gpr[4];
    machine.bus.place(esp, &[0xff; 4]);
    machine.done(&[0x9d]);
    machine.cpu.eflags
}

#[test]
fn popf_writes_what_the_privilege_covers() {
    let always = 0x8d5 | TF | DF | NT | AC | ID | FIXED;
    assert_eq!(popf(0, 0), always | IF | IOPL);
    assert_eq!(popf(3, 0), always, "IF and IOPL stay, silently");
    assert_eq!(popf(3, 3), always | IF | IOPL);
    assert_eq!(popf(0, 0) & (VM | RF), 0);
}

#[test]
fn popf_of_16_bits_keeps_the_upper_half() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= AC | ID;
    machine.done(&[0x66, 0x9d]);
    assert_eq!((machine.cpu.eflags, machine.cpu.gpr[4]), (FIXED | AC | ID, KERNEL_STACK + 2));
}

#[test]
fn near_calls_returns_and_loops() {
    let mut machine = Machine::kernel();
    machine.done(&[0xe8, 0x10, 0, 0, 0]);
    assert_eq!((machine.cpu.eip, machine.stack(0)), (CODE + 0x15, CODE + 5));
    machine.done(&[0xc2, 8, 0]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[4]), (CODE + 5, KERNEL_STACK + 8));
    machine.cpu.gpr[0] = HANDLER;
    machine.done(&[0xff, 0xd0]);
    assert_eq!((machine.cpu.eip, machine.stack(0)), (HANDLER, CODE + 7));
    machine.done(&[0xff, 0xe0]);
    assert_eq!(machine.cpu.eip, HANDLER);
    // o16 jmp: EIP is cut
    machine.done(&[0x66, 0xe9, 0x00, 0xb0]);
    assert_eq!(machine.cpu.eip, (HANDLER + 4 + 0xb000) & 0xffff);
}

#[test]
fn loops_count_by_the_address_size() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[1] = 0x1_0001;
    machine.done(&[0x67, 0xe2, 0x10]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[1]), (CODE + 3, 0x1_0000), "CX is zero");
    machine.done(&[0xe2, 0x10]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[1]), (CODE + 3 + 2 + 0x10, 0xffff));
    machine.cpu.eflags |= ZF;
    machine.done(&[0xe0, 0x10]);
    assert_eq!(machine.cpu.gpr[1], 0xfffe);
    let at = machine.cpu.eip;
    machine.done(&[0xe1, 0x10]);
    assert_eq!(machine.cpu.eip, at + 2 + 0x10);
    machine.cpu.gpr[1] = 0xffff_0000;
    let at = machine.cpu.eip;
    machine.done(&[0x67, 0xe3, 0x7f]);
    assert_eq!(machine.cpu.eip, at + 3 + 0x7f, "JCXZ looks at CX");
    let at = machine.cpu.eip;
    machine.done(&[0xe3, 0x7f]);
    assert_eq!(machine.cpu.eip, at + 2, "JECXZ at ECX");
}

#[test]
fn targets_beyond_the_limit_change_nothing() {
    let limited = || {
        let mut machine = Machine::kernel();
        machine.cpu.seg[Seg::Cs as usize].limit = 0x5fff;
        machine.cpu.gpr[0] = 0x6000;
        machine.cpu.gpr[1] = 5;
        machine.bus.place(KERNEL_STACK, &0x6000_u32.to_le_bytes());
        machine
    };
    let far = 0x1000_u32.to_le_bytes();
    for bytes in [
        &[&[0xe9][..], &far].concat()[..],
        &[&[0xe8][..], &far].concat(),
        &[&[0x0f, 0x83][..], &far].concat(),
        &[0xff, 0xe0],
        &[0xff, 0xd0],
        &[0xc3],
    ] {
        assert_eq!(limited().fault(bytes), Exception::gp(0), "{bytes:02x?}");
    }
    let mut machine = limited();
    machine.cpu.eip = 0x5ff0;
    assert_eq!(machine.fault(&[0xe2, 0x7f]), Exception::gp(0), "LOOP counts nothing");
}

#[test]
fn bound_checks_signed() {
    let mut machine = Machine::kernel();
    machine.bus.place(DATA, &[(-5_i32).to_le_bytes(), 5_i32.to_le_bytes()].concat());
    for (index, inside) in [(-5_i32, true), (5, true), (6, false), (-6, false), (i32::MIN, false)] {
        machine.cpu.gpr[0] = index as u32;
        machine.cpu.eip = CODE;
        let step = machine.run(&[0x62, 0x05, 0, 0x60, 0, 0]);
        assert_eq!(step, if inside { Step::Done } else { Step::Exception(Exception::BR) }, "{index}");
    }
}

#[test]
fn division_that_does_not_fit_is_de() {
    let with = |eax: u32, edx: u32, ecx: u32| {
        let mut machine = Machine::kernel();
        (machine.cpu.gpr[0], machine.cpu.gpr[2], machine.cpu.gpr[1]) = (eax, edx, ecx);
        machine
    };
    assert_eq!(with(1, 0, 0).fault(&[0xf7, 0xf1]), Exception::DE);
    assert_eq!(with(0, 1, 1).fault(&[0xf7, 0xf1]), Exception::DE);
    assert_eq!(with(0x8000_0000, u32::MAX, u32::MAX).fault(&[0xf7, 0xf9]), Exception::DE, "-2^31 / -1");
    assert_eq!(with(0, 0x8000_0000, u32::MAX).fault(&[0xf7, 0xf9]), Exception::DE, "-2^63 / -1");
    let mut machine = with(0x8000_0000, u32::MAX, 1);
    machine.done(&[0xf7, 0xf9]);
    assert_eq!((machine.cpu.gpr[0], machine.cpu.gpr[2]), (0x8000_0000, 0));
    assert_eq!(with(0xff80, 0, 0xff).fault(&[0xf6, 0xf9]), Exception::DE, "-128 / -1 in bytes");
}

#[test]
fn rmw_needs_write_permission_even_where_it_writes_nothing_new() {
    for bytes in [
        &[0x83, 0x05, 0, 0x60, 0, 0, 0][..], // add [DATA], 0
        &[0xc1, 0x25, 0, 0x60, 0, 0, 0],     // shl [DATA], 0
        &[0x0f, 0xb1, 0x0d, 0, 0x60, 0, 0],  // cmpxchg, unequal
        &[0x0f, 0xc7, 0x0d, 0, 0x60, 0, 0],  // cmpxchg8b
    ] {
        let mut machine = Machine::kernel();
        machine.cpu.gpr[0] = 1;
        machine.bus.pages.insert(6, Page::ReadOnly);
        assert_eq!(machine.fault(bytes).error, Some(3), "{bytes:02x?}");
    }
}

#[test]
fn short_increments_and_salc() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= CF;
    machine.done(&[0x40]);
    machine.done(&[0x66, 0x49]);
    assert_eq!((machine.cpu.gpr[0], machine.cpu.gpr[1]), (1, 0xffff));
    machine.done(&[0xd6]);
    assert_eq!(machine.cpu.gpr[0], 0xff, "CF survived");
}
