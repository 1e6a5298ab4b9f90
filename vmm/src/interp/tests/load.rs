//! Segment-register, LDTR and TR loads; LAR, LSL, VERR, VERW, ARPL.

use super::super::{Exception, Step};
use super::machine::*;
use crate::cpu::Seg;
use crate::cpu::eflags::ZF;

/// mov SEG, ax with AX = `selector`.
fn load(machine: &mut Machine, seg: Seg, selector: u16) -> Vec<u8> {
    machine.cpu.gpr[0] = selector.into();
    vec![0x8e, 0xc0 | (seg as u8) << 3]
}

fn with(mut machine: Machine, attributes: u16) -> Machine {
    machine.set_descriptor(FREE, 0x1234_5000, 0x12345, attributes);
    machine
}

fn fault(mut machine: Machine, seg: Seg, selector: u16) -> Exception {
    let bytes = load(&mut machine, seg, selector);
    machine.fault(&bytes)
}

fn loads(mut machine: Machine, seg: Seg, selector: u16) -> Machine {
    let bytes = load(&mut machine, seg, selector);
    machine.done(&bytes);
    assert_eq!(machine.selector(seg), selector);
    machine
}

#[test]
fn hidden_part_comes_from_the_descriptor() {
    let machine = loads(with(Machine::kernel(), DATA_0 | 1 << 12), Seg::Ds, FREE);
    let ds = machine.cpu.segment(Seg::Ds);
    assert_eq!((ds.base, ds.limit, ds.attributes), (0x1234_5000, 0x1234_5fff, DATA_0 | 1 << 12 | 1));
    assert_eq!(machine.bus.memory[(GDT + u32::from(FREE)) as usize + 5], 0x93, "A is set in memory");
}

#[test]
fn long_mode_bit_never_reaches_a_hidden_part() {
    let mut machine = with(Machine::kernel(), CODE_0 & !0x4000 | 1 << 13);
    machine.done(&[0xea, 0x00, 0x58, 0, 0, FREE as u8, 0]);
    assert_eq!(machine.cpu.segment(Seg::Cs).attributes & 1 << 13, 0);
}

#[test]
fn data_segment_checks() {
    let bad = Exception::gp(FREE);
    assert_eq!(fault(Machine::kernel(), Seg::Ds, 0x108), Exception::gp(0x108), "outside");
    assert_eq!(fault(Machine::kernel(), Seg::Ds, TASK), Exception::gp(TASK), "system");
    assert_eq!(fault(with(Machine::kernel(), CODE_0 & !2), Seg::Es, FREE), bad, "execute-only");
    assert_eq!(fault(with(Machine::user(), DATA_0), Seg::Es, FREE), bad, "CPL over DPL");
    assert_eq!(fault(with(Machine::kernel(), DATA_0), Seg::Fs, FREE | 3), bad, "RPL over DPL");
    assert_eq!(fault(with(Machine::kernel(), DATA_0 & !0x80), Seg::Gs, FREE), Exception::np(FREE));
    loads(with(Machine::user(), CODE_0 | 4), Seg::Ds, FREE | 3);
    loads(with(Machine::kernel(), CODE_0), Seg::Ds, FREE);
}

#[test]
fn null_selector_loads_and_then_faults_on_use() {
    let mut machine = loads(Machine::user(), Seg::Ds, 3);
    assert!(machine.cpu.segment(Seg::Ds).unusable);
    assert_eq!(machine.fault(&[0xa0, 0x00, 0x60, 0, 0]), Exception::gp(0));
}

#[test]
fn stack_segment_checks() {
    let bad = Exception::gp(FREE);
    assert_eq!(fault(Machine::kernel(), Seg::Ss, 0), Exception::gp(0), "null");
    assert_eq!(fault(with(Machine::kernel(), DATA_0), Seg::Ss, FREE | 1), bad, "RPL");
    assert_eq!(fault(with(Machine::kernel(), DATA_3), Seg::Ss, FREE), bad, "DPL");
    assert_eq!(fault(with(Machine::kernel(), DATA_0 & !2), Seg::Ss, FREE), bad, "read-only");
    assert_eq!(fault(with(Machine::kernel(), CODE_0), Seg::Ss, FREE), bad, "code");
    assert_eq!(fault(with(Machine::kernel(), DATA_0 & !0x80), Seg::Ss, FREE), Exception::ss(FREE));
    let machine = loads(with(Machine::kernel(), DATA_0), Seg::Ss, FREE);
    assert!(machine.cpu.interrupt_shadow, "interrupts wait for one instruction");
}

#[test]
fn cs_cannot_be_moved_to() {
    assert_eq!(fault(Machine::kernel(), Seg::Cs, KERNEL_CODE), Exception::UD);
    // Encodings 6 and 7 name no segment register.
    assert_eq!(Machine::kernel().fault(&[0x8e, 0xf0]), Exception::UD);
}

#[test]
fn pop_and_push_of_segment_registers_move_by_the_operand_size() {
    let mut machine = Machine::kernel();
    machine.bus.place(KERNEL_STACK - 4, &[0xff; 4]);
    machine.done(&[0x1e]);
    assert_eq!((machine.cpu.gpr[4], machine.stack(0)), (KERNEL_STACK - 4, 0x10), "zero-extended");
    machine.done(&[0x07]);
    assert_eq!((machine.cpu.gpr[4], machine.selector(Seg::Es)), (KERNEL_STACK, KERNEL_DATA));
    machine.done(&[0x66, 0x0f, 0xa0]);
    assert_eq!(machine.cpu.gpr[4], KERNEL_STACK - 2);
}

#[test]
fn lds_and_lss_load_pointer_and_segment_or_nothing() {
    let mut machine = with(Machine::kernel(), DATA_0);
    machine.bus.place(DATA, &[0x78, 0x56, 0x34, 0x12, FREE as u8, 0]);
    // lds ecx, [DATA]
    machine.done(&[0xc5, 0x0d, 0x00, 0x60, 0, 0]);
    assert_eq!((machine.cpu.gpr[1], machine.selector(Seg::Ds)), (0x1234_5678, FREE));
    let mut machine = with(Machine::kernel(), DATA_3);
    machine.bus.place(DATA, &[0x78, 0x56, 0x34, 0x12, FREE as u8, 0]);
    // lss esp, [DATA]
    assert_eq!(machine.fault(&[0x0f, 0xb2, 0x25, 0x00, 0x60, 0, 0]), Exception::gp(FREE));
}

#[test]
fn lldt_and_local_descriptors() {
    let mut machine = Machine::kernel();
    machine.set_descriptor(LOCAL, LDT, 0x0f, 0x82);
    machine.bus.place(LDT + 8, &descriptor(0x7000, 0xfff, DATA_0));
    machine.cpu.gpr[0] = LOCAL.into();
    machine.done(&[0x0f, 0x00, 0xd0]);
    assert_eq!((machine.cpu.ldtr.base, machine.cpu.ldtr.limit), (LDT, 0xf));
    let mut machine = loads(machine, Seg::Es, 0x0c);
    assert_eq!(machine.cpu.segment(Seg::Es).base, 0x7000);
    assert_eq!(fault(machine.clone(), Seg::Es, 0x14), Exception::gp(0x14), "outside the LDT");
    machine.cpu.gpr[0] = 0;
    machine.done(&[0x0f, 0x00, 0xd0]);
    assert_eq!(fault(machine, Seg::Es, 0x0c), Exception::gp(0x0c), "no LDT");
}

#[test]
fn lldt_and_ltr_checks() {
    let lldt = [0x0f, 0x00, 0xd0];
    let ltr = [0x0f, 0x00, 0xd8];
    let with_ax = |mut machine: Machine, ax: u16| {
        machine.cpu.gpr[0] = ax.into();
        machine
    };
    assert_eq!(with_ax(Machine::user(), 0).fault(&lldt), Exception::gp(0));
    assert_eq!(with_ax(Machine::user(), TASK).fault(&ltr), Exception::gp(0));
    assert_eq!(with_ax(Machine::real(), 0).fault(&ltr), Exception::UD);
    assert_eq!(with_ax(Machine::kernel(), KERNEL_DATA).fault(&lldt), Exception::gp(KERNEL_DATA));
    assert_eq!(with_ax(Machine::kernel(), 0).fault(&ltr), Exception::gp(0));
    assert_eq!(with_ax(Machine::kernel(), TASK).fault(&ltr), Exception::gp(TASK), "busy");
    assert_eq!(with_ax(Machine::kernel(), TASK | 4).fault(&ltr), Exception::gp(TASK | 4), "TI");
    let absent = with(with_ax(Machine::kernel(), FREE), TSS_32 & !0x80);
    assert_eq!(absent.clone().fault(&ltr), Exception::np(FREE));
    let mut machine = with(with_ax(Machine::kernel(), FREE), TSS_32);
    machine.done(&ltr);
    assert_eq!((machine.cpu.tr.selector, machine.cpu.tr.kind()), (FREE, 11));
    assert_eq!(machine.bus.memory[(GDT + u32::from(FREE)) as usize + 5], 0x8b, "busy in memory");
}

#[test]
fn lar_and_lsl_show_what_may_be_seen() {
    let look = |mut machine: Machine, opcode: u8, selector: u16| {
        machine.cpu.gpr[0] = selector.into();
        machine.cpu.gpr[1] = 7;
        machine.done(&[0x0f, opcode, 0xc8]);
        (machine.cpu.eflags & ZF != 0).then_some(machine.cpu.gpr[1])
    };
    let (lar, lsl) = (0x02, 0x03);
    assert_eq!(look(with(Machine::kernel(), DATA_0), lar, FREE), Some(0x00c1_9200), "the limit's top too");
    assert_eq!(look(with(Machine::kernel(), DATA_0), lsl, FREE), Some(0x1234_5fff));
    assert_eq!(look(with(Machine::user(), DATA_0), lar, FREE | 3), None);
    assert_eq!(look(with(Machine::user(), CODE_0 | 4), lar, FREE | 3), Some(0x00c1_9e00));
    assert_eq!(look(Machine::kernel(), lsl, TASK), Some(0x67));
    assert_eq!(look(with(Machine::kernel(), 0x8c), lar, FREE), Some(0x1_8c00), "a call gate has rights");
    assert_eq!(look(with(Machine::kernel(), 0x8c), lsl, FREE), None, "and no limit");
    assert_eq!(look(with(Machine::kernel(), 0x8e), lar, FREE), None, "an interrupt gate has neither");
    assert_eq!(look(Machine::kernel(), lar, 0), None);
}

#[test]
fn verr_and_verw() {
    let verify = |attributes: u16, modrm: u8| {
        let mut machine = with(Machine::kernel(), attributes);
        machine.cpu.gpr[0] = FREE.into();
        machine.done(&[0x0f, 0x00, modrm]);
        machine.cpu.eflags & ZF != 0
    };
    let both = |attributes| (verify(attributes, 0xe0), verify(attributes, 0xe8));
    assert_eq!(both(DATA_0), (true, true));
    assert_eq!(both(DATA_0 & !2), (true, false));
    assert_eq!(both(CODE_0), (true, false));
    assert_eq!(both(CODE_0 & !2), (false, false));
    assert_eq!(both(TSS_32), (false, false));
}

#[test]
fn arpl_raises_only() {
    let mut machine = Machine::kernel();
    (machine.cpu.gpr[0], machine.cpu.gpr[1]) = (0xaaaa_0010, 0x3);
    machine.done(&[0x63, 0xc8]);
    assert_eq!((machine.cpu.gpr[0], machine.cpu.eflags & ZF), (0xaaaa_0013, ZF));
    machine.cpu.gpr[1] = 1;
    machine.done(&[0x63, 0xc8]);
    assert_eq!((machine.cpu.gpr[0], machine.cpu.eflags & ZF), (0xaaaa_0013, 0));
    assert_eq!(Machine::real().run(&[0x63, 0xc8]), Step::Exception(Exception::UD));
}
