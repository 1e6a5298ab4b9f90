//! Far transfers: direct, through call gates, and back.

use super::super::{Exception, Step};
use super::machine::*;
use crate::cpu::Seg;
use crate::cpu::eflags::{AC, FIXED, ID, IF, IOPL, NT, RF, TF, VM};

fn jump(selector: u16, offset: u32) -> Vec<u8> {
    [&[0xea][..], &offset.to_le_bytes(), &selector.to_le_bytes()].concat()
}

fn call(selector: u16, offset: u32) -> Vec<u8> {
    [&[0x9a][..], &offset.to_le_bytes(), &selector.to_le_bytes()].concat()
}

/// A machine with `attributes` at FREE.
fn with(mut machine: Machine, attributes: u16) -> Machine {
    machine.set_descriptor(FREE, 0, 0xfffff, attributes);
    machine
}

#[test]
fn far_jump_loads_cs_with_the_current_privilege() {
    let mut machine = with(Machine::kernel(), CODE_0);
    machine.done(&jump(FREE, HANDLER));
    assert_eq!((machine.cpu.eip, machine.selector(Seg::Cs)), (HANDLER, FREE));
    let mut machine = with(Machine::user(), CODE_3);
    machine.done(&jump(FREE, HANDLER));
    assert_eq!(machine.selector(Seg::Cs), FREE | 3, "RPL becomes the CPL");
}

#[test]
fn far_jump_checks() {
    let bad = Exception::gp(FREE);
    assert_eq!(Machine::kernel().fault(&jump(0, 0)), Exception::gp(0));
    assert_eq!(Machine::kernel().fault(&jump(0x108, 0)), Exception::gp(0x108));
    assert_eq!(with(Machine::kernel(), DATA_0).fault(&jump(FREE, 0)), bad, "data");
    assert_eq!(with(Machine::kernel(), CODE_3).fault(&jump(FREE, 0)), bad, "outer");
    assert_eq!(with(Machine::user(), CODE_0).fault(&jump(FREE, 0)), bad, "inner");
    assert_eq!(with(Machine::kernel(), CODE_0).fault(&jump(FREE | 3, 0)), bad, "RPL");
    assert_eq!(with(Machine::kernel(), CODE_3 | 4).fault(&jump(FREE, 0)), bad, "conforming, outer");
    assert_eq!(with(Machine::kernel(), CODE_0 & !0x80).fault(&jump(FREE, 0)), Exception::np(FREE));
    let mut short = Machine::kernel();
    short.set_descriptor(FREE, 0, 0x100, CODE_0 & !0x8000);
    assert_eq!(short.fault(&jump(FREE, 0x101)), Exception::gp(0));
}

#[test]
fn conforming_code_keeps_the_privilege() {
    let mut machine = with(Machine::user(), CODE_0 | 4);
    machine.done(&jump(FREE, HANDLER));
    assert_eq!((machine.cpu.cpl, machine.selector(Seg::Cs)), (3, FREE | 3));
}

#[test]
fn far_call_and_return() {
    let mut machine = with(Machine::kernel(), CODE_0);
    machine.done(&call(FREE, HANDLER));
    assert_eq!([0, 1].map(|n| machine.stack(n)), [CODE + 7, KERNEL_CODE.into()]);
    // retf 8
    machine.done(&[0xca, 8, 0]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[4]), (CODE + 7, KERNEL_STACK + 8));
}

#[test]
fn far_call_through_memory_and_16_bit_operands() {
    let mut machine = with(Machine::kernel(), CODE_0);
    machine.bus.place(DATA, &[0x00, 0x58, FREE as u8, 0]);
    // o16 call far [DATA]
    machine.done(&[0x66, 0xff, 0x1d, 0x00, 0x60, 0x00, 0x00]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[4]), (0x5800, KERNEL_STACK - 4));
    assert_eq!(machine.stack(0), u32::from(KERNEL_CODE) << 16 | (CODE + 7));
    machine.done(&[0x66, 0xcb]);
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[4]), (CODE + 7, KERNEL_STACK));
}

#[test]
fn far_call_that_cannot_push_changes_nothing() {
    let mut machine = with(Machine::kernel(), CODE_0);
    machine.cpu.seg[Seg::Ss as usize].limit = 16;
    assert_eq!(machine.fault(&call(FREE, HANDLER)), Exception::ss(0));
}

/// A user's machine with a call gate at FREE that leads to the kernel.
fn gated(access: u8, parameters: u8) -> Machine {
    let mut machine = Machine::user();
    let bytes = gate(KERNEL_CODE, HANDLER, access, parameters);
    machine.bus.place(GDT + u32::from(FREE), &bytes);
    machine
}

#[test]
fn call_gate_switches_stacks_and_copies_parameters() {
    let mut machine = gated(0xec, 2);
    machine.bus.place(USER_STACK, &[1, 0, 0, 0, 2, 0, 0, 0]);
    machine.done(&call(FREE | 3, 0xffff_ffff));
    assert_eq!((machine.cpu.eip, machine.cpu.cpl, machine.bus.paging), (HANDLER, 0, (1, 0)));
    let frame = [0, 1, 2, 3, 4, 5].map(|n| machine.stack(n));
    assert_eq!(frame, [CODE + 7, USER_CODE.into(), 1, 2, USER_STACK, USER_DATA.into()]);
    // retf 8 takes the parameters off both stacks
    machine.done(&[0xca, 8, 0]);
    assert_eq!((machine.cpu.eip, machine.cpu.cpl), (CODE + 7, 3));
    assert_eq!((machine.cpu.gpr[4], machine.selector(Seg::Ss)), (USER_STACK + 8, USER_DATA));
}

#[test]
fn call_gate_of_16_bits_pushes_words() {
    let mut machine = gated(0xe4, 1);
    machine.bus.place(USER_STACK, &[0xcd, 0xab]);
    machine.done(&call(FREE | 3, 0));
    assert_eq!(machine.cpu.gpr[4], KERNEL_STACK - 10);
    assert_eq!(machine.stack(0), u32::from(USER_CODE) << 16 | (CODE + 7));
    assert_eq!(machine.stack(1) & 0xffff, 0xabcd);
}

#[test]
fn call_gate_checks() {
    assert_eq!(gated(0x8c, 0).fault(&call(FREE | 3, 0)), Exception::gp(FREE), "DPL");
    assert_eq!(gated(0x6c, 0).fault(&call(FREE | 3, 0)), Exception::np(FREE), "absent");
    assert_eq!(gated(0xec, 0).fault(&jump(FREE | 3, 0)), Exception::gp(KERNEL_CODE), "JMP stays");
    let mut machine = gated(0xec, 0);
    machine.bus.place(TSS + 8, &[0, 0]);
    assert_eq!(machine.fault(&call(FREE | 3, 0)), Exception::ts(0), "no EXT in a call's error code");
}

#[test]
fn jump_through_a_gate_at_the_same_privilege() {
    let mut machine = Machine::kernel();
    machine.bus.place(GDT + u32::from(FREE), &gate(KERNEL_CODE, HANDLER, 0x8c, 0));
    machine.done(&jump(FREE, 0));
    assert_eq!((machine.cpu.eip, machine.cpu.gpr[4]), (HANDLER, KERNEL_STACK));
}

#[test]
fn task_switches_are_unknown_by_name() {
    let mut machine = Machine::kernel();
    machine.set_descriptor(FREE, TSS, 0x67, TSS_32);
    match machine.run(&jump(FREE, 0)) {
        Step::Unknown(unknown) => {
            assert_eq!(unknown.what, "task switch");
            assert!(unknown.to_string().contains("EIP 0x5000, linear 0x5000, bytes ea 00 00 00 00 38 00"));
        }
        other => panic!("{other:?}"),
    }
    machine.cpu.eflags |= NT;
    assert!(matches!(machine.run(&[0xcf]), Step::Unknown(_)));
    machine.set_descriptor(FREE, TSS, 0x67, 0x8b);
    assert_eq!(machine.fault(&jump(FREE, 0)), Exception::gp(FREE), "a busy one is a fault");
}

/// A kernel about to IRET to `selector`, with SS `stack` behind.
fn returning(selector: u16, flags: u32, stack: u16) -> Machine {
    let mut machine = Machine::kernel();
    for (n, value) in [HANDLER, selector.into(), flags, USER_STACK, stack.into()].into_iter().enumerate() {
        machine.bus.place(KERNEL_STACK + 4 * n as u32, &value.to_le_bytes());
    }
    machine
}

#[test]
fn iret_outward_sets_stack_flags_and_drops_inner_segments() {
    let flags = FIXED | IF | TF | IOPL | NT | RF | AC | ID;
    let mut machine = returning(USER_CODE, flags, USER_DATA);
    machine.cpu.seg[Seg::Fs as usize].attributes |= 0x60;
    machine.done(&[0xcf]);
    assert_eq!((machine.cpu.eip, machine.cpu.cpl, machine.bus.paging), (HANDLER, 3, (1, 3)));
    assert_eq!(machine.cpu.eflags, flags, "CPL 0 may write them all");
    assert_eq!((machine.cpu.gpr[4], machine.selector(Seg::Ss)), (USER_STACK, USER_DATA));
    for seg in [Seg::Es, Seg::Ds, Seg::Gs] {
        assert!(machine.cpu.segment(seg).unusable, "{seg:?} was the kernel's");
    }
    assert!(!machine.cpu.segment(Seg::Fs).unusable, "FS was open to the user");
}

#[test]
fn iret_checks() {
    let iret = [0xcf];
    assert_eq!(returning(0, FIXED, USER_DATA).fault(&iret), Exception::gp(0), "null CS");
    assert_eq!(returning(0x10b, FIXED, USER_DATA).fault(&iret), Exception::gp(0x108), "outside");
    assert_eq!(returning(USER_DATA, FIXED, USER_DATA).fault(&iret), Exception::gp(0x20), "data");
    assert_eq!(returning(KERNEL_CODE | 3, FIXED, USER_DATA).fault(&iret), Exception::gp(8), "RPL over DPL");
    assert_eq!(returning(USER_CODE, FIXED, 0).fault(&iret), Exception::gp(0), "null SS");
    assert_eq!(returning(USER_CODE, FIXED, 0x20).fault(&iret), Exception::gp(0x20), "SS RPL");
    assert_eq!(returning(USER_CODE, FIXED, USER_CODE).fault(&iret), Exception::gp(0x18), "code in SS");
    let mut absent = returning(USER_CODE, FIXED, USER_DATA);
    absent.set_descriptor(USER_DATA, 0, 0xfffff, DATA_3 & !0x80);
    assert_eq!(absent.fault(&iret), Exception::ss(0x20), "SS absent");
    let mut inward = Machine::user();
    for (n, value) in [HANDLER, KERNEL_CODE.into(), FIXED].into_iter().enumerate() {
        inward.bus.place(USER_STACK + 4 * n as u32, &value.to_le_bytes());
    }
    assert_eq!(inward.fault(&iret), Exception::gp(8), "inward");
}

#[test]
fn iret_of_a_user_cannot_touch_privileged_flags() {
    let mut machine = Machine::user();
    for (n, value) in [HANDLER, USER_CODE.into(), FIXED | IF | IOPL | TF | VM].into_iter().enumerate() {
        machine.bus.place(USER_STACK + 4 * n as u32, &value.to_le_bytes());
    }
    machine.done(&[0xcf]);
    assert_eq!((machine.cpu.eflags, machine.cpu.eip, machine.bus.paging.0), (FIXED | TF, HANDLER, 0));
}

#[test]
fn iret_to_virtual_8086_mode_is_unknown() {
    let mut machine = returning(USER_CODE, FIXED | VM, USER_DATA);
    let before = machine.cpu.clone();
    assert!(matches!(machine.run(&[0xcf]), Step::Unknown(_)));
    assert_eq!(machine.cpu, before);
}

#[test]
fn iret_of_16_bits_keeps_the_upper_flags() {
    let mut machine = Machine::kernel();
    machine.cpu.eflags |= AC;
    for (n, value) in [HANDLER as u16, KERNEL_CODE, (FIXED | IF) as u16].into_iter().enumerate() {
        machine.bus.place(KERNEL_STACK + 2 * n as u32, &value.to_le_bytes());
    }
    machine.done(&[0x66, 0xcf]);
    assert_eq!((machine.cpu.eip, machine.cpu.eflags), (HANDLER, FIXED | IF | AC));
    assert_eq!(machine.cpu.gpr[4], KERNEL_STACK + 6);
}

#[test]
fn iret_that_faults_opens_nmis_and_again_does_not() {
    let mut machine = returning(0, FIXED, USER_DATA);
    machine.cpu.nmi_blocked = true;
    machine.bus.again_at = Some(2);
    assert_eq!(machine.run(&[0xcf]), Step::Again);
    assert!(machine.cpu.nmi_blocked);
    assert_eq!(machine.run(&[0xcf]), Step::Exception(Exception::gp(0)));
    assert!(!machine.cpu.nmi_blocked);
}

#[test]
fn return_to_a_16_bit_stack_keeps_the_upper_half_of_esp() {
    let mut machine = returning(USER_CODE, FIXED, FREE | 3);
    machine.cpu.gpr[4] = KERNEL_STACK;
    machine.set_descriptor(FREE, 0, 0xffff, 0x00f2);
    machine.bus.place(KERNEL_STACK + 12, &0x1234_5678_u32.to_le_bytes());
    machine.done(&[0xcf]);
    assert_eq!(machine.cpu.gpr[4], KERNEL_STACK & 0xffff_0000 | 0x5678);
}

#[test]
fn real_mode_far_transfers_set_bases() {
    let mut machine = Machine::real();
    // call 0x0100:0x4000 in 16-bit code
    machine.done(&[0x9a, 0x00, 0x40, 0x00, 0x01]);
    assert_eq!((machine.cpu.eip, machine.cpu.segment(Seg::Cs).base), (0x4000, 0x1000));
    machine.done(&[0xcb]);
    assert_eq!((machine.cpu.eip, machine.selector(Seg::Cs), machine.cpu.gpr[4]), (CODE + 5, 0, 0x7000));
}

#[test]
fn trampoline_from_real_mode_into_protected_mode() {
    let mut machine = Machine::real();
    machine.bus.place(0x600, &[0xff, 0x00, 0x00, 0x10, 0x00, 0x00]);
    // lgdt [0x600]; mov eax, cr0; or al, 1; mov cr0, eax; jmp dword 0x08:HANDLER
    machine.done(&[0x0f, 0x01, 0x16, 0x00, 0x06]);
    machine.done(&[0x0f, 0x20, 0xc0]);
    machine.done(&[0x0c, 0x01]);
    machine.done(&[0x0f, 0x22, 0xc0]);
    machine.done(&[0x66, 0xea, 0x00, 0x58, 0x00, 0x00, 0x08, 0x00]);
    assert_eq!((machine.cpu.eip, machine.selector(Seg::Cs), machine.cpu.gdtr.base), (HANDLER, 8, GDT));
    // mov ax, 0x10; mov ss, ax: 32-bit code by now
    machine.done(&[0x66, 0xb8, 0x10, 0x00]);
    machine.done(&[0x8e, 0xd0]);
    assert!(machine.cpu.segment(Seg::Ss).big() && machine.cpu.interrupt_shadow);
}
