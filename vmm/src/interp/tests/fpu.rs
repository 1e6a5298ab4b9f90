//! The FPU's faults and their order, pending exceptions, and what of it is in memory. What the instructions compute is
//! compared with the CPU, in `tests/fpu_native`.

use super::super::flat::Page;
use super::super::{Exception, Step};
use super::machine::*;
use crate::cpu::eflags::AC;
use crate::cpu::fpu::{MXCSR_RESET, Pointers, status};
use crate::cpu::{Fpu, Segment, cr0, cr4};

const FNINIT: &[u8] = &[0xdb, 0xe3];
const FLD1: &[u8] = &[0xd9, 0xe8];
const FNOP: &[u8] = &[0xd9, 0xd0];
const WAIT: &[u8] = &[0x9b];
const EMMS: &[u8] = &[0x0f, 0x77];
/// paddb mm0, mm1
const PADDB: &[u8] = &[0x0f, 0xfc, 0xc1];
/// pshufw mm0, mm1, 0: of SSE, on MMX registers
const PSHUFW: &[u8] = &[0x0f, 0x70, 0xc1, 0];
const MOVAPS: &[u8] = &[0x0f, 0x28, 0xc1];
/// divss xmm0, xmm1
const DIVSS: &[u8] = &[0xf3, 0x0f, 0x5e, 0xc1];
/// fxsave and fxrstor [eax]
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x00];
const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x08];
/// ldmxcsr and stmxcsr [eax]
const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x10];
const STMXCSR: &[u8] = &[0x0f, 0xae, 0x18];

const ONE_SINGLE: u128 = 0x3f80_0000;

/// A kernel that has set SSE up, EAX at data, with these bits of CR0 besides.
fn with(set: u32) -> Machine {
    let mut machine = Machine::kernel();
    machine.cpu.cr0 |= cr0::NE | set;
    machine.cpu.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT;
    machine.cpu.gpr[0] = DATA;
    machine
}

/// The same with a division by zero pending.
fn pending() -> Machine {
    let mut machine = with(0);
    machine.cpu.fpu.set_words(0x037b, status::ZE);
    machine
}

fn user() -> Machine {
    let mut machine = Machine::user();
    machine.cpu.cr4 |= cr4::OSFXSR;
    machine.cpu.gpr[0] = DATA;
    machine
}

#[test]
fn fpu_that_is_away_or_emulated_faults() {
    for bytes in [FNINIT, FLD1, FNOP, FXSAVE, FXRSTOR] {
        assert_eq!(with(cr0::TS).fault(bytes), Exception::NM, "{bytes:02x?}");
        assert_eq!(with(cr0::EM).fault(bytes), Exception::NM, "{bytes:02x?}");
    }
    for bytes in [EMMS, PADDB, PSHUFW, MOVAPS, DIVSS, LDMXCSR, STMXCSR] {
        assert_eq!(with(cr0::TS).fault(bytes), Exception::NM, "{bytes:02x?}");
        assert_eq!(with(cr0::EM).fault(bytes), Exception::UD, "{bytes:02x?}");
        assert_eq!(with(cr0::EM | cr0::TS).fault(bytes), Exception::UD, "{bytes:02x?}");
    }
    with(cr0::TS).done(WAIT);
    with(cr0::EM | cr0::MP).done(WAIT);
    assert_eq!(with(cr0::TS | cr0::MP).fault(WAIT), Exception::NM);
}

#[test]
fn sse_wants_osfxsr_and_what_is_on_mmx_registers_does_not() {
    for bytes in [MOVAPS, DIVSS, LDMXCSR, STMXCSR] {
        let mut machine = with(cr0::TS);
        machine.cpu.cr4 &= !cr4::OSFXSR;
        assert_eq!(machine.fault(bytes), Exception::UD, "{bytes:02x?}");
    }
    for bytes in [EMMS, PADDB, PSHUFW, FXSAVE] {
        let mut machine = with(0);
        machine.cpu.cr4 &= !cr4::OSFXSR;
        machine.done(bytes);
    }
}

#[test]
fn pending_exception_is_reported_by_what_waits() {
    // cvtpi2ps xmm0, mm1; fld dword [absent]; fldcw; fldenv; frstor, all [absent]
    let absent = &[0x05, 0, 0, 0xf0, 0];
    let with_digit = |escape: u8, digit: u8| [&[escape, 0x05 | digit << 3][..], &absent[1..]].concat();
    let absents = [with_digit(0xd9, 0), with_digit(0xd9, 5), with_digit(0xd9, 4), with_digit(0xdd, 4)];
    let waiting = [FLD1, FNOP, WAIT, EMMS, PADDB, PSHUFW, &[0x0f, 0x2a, 0xc1]];
    for bytes in waiting.into_iter().chain(absents.iter().map(Vec::as_slice)) {
        assert_eq!(pending().fault(bytes), Exception::MF, "{bytes:02x?}");
        let mut machine = pending();
        machine.cpu.cr0 |= cr0::TS | cr0::MP;
        assert_eq!(machine.fault(bytes), Exception::NM, "{bytes:02x?}: #NM goes first");
    }
    // fnstsw ax; fnclex; fnstenv, fnsave, fnstcw, fnstsw [eax]
    let not_waiting = [
        &[0xdf, 0xe0][..],
        &[0xdb, 0xe2],
        &[0xd9, 0x30],
        &[0xdd, 0x30],
        &[0xd9, 0x38],
        &[0xdd, 0x38],
        FNINIT,
        FXSAVE,
        MOVAPS,
        DIVSS,
    ];
    for bytes in not_waiting {
        pending().done(bytes);
    }
}

#[test]
fn exception_waits_for_the_next_instruction() {
    let mut machine = with(0);
    machine.done(FNINIT);
    machine.cpu.fpu.set_control(0x037b);
    machine.done(FLD1);
    // fldz; fdivp: one by zero, unmasked.
    machine.done(&[0xd9, 0xee]);
    let at = machine.cpu.eip;
    machine.done(&[0xde, 0xf9]);
    assert!(machine.cpu.fpu.pending());
    assert_eq!(machine.cpu.fpu.pointers().ip, at);
    assert_eq!(machine.fault(WAIT), Exception::MF);
    // As FERR# is not connected, nothing is reported, and instructions run on.
    machine.cpu.cr0 &= !cr0::NE;
    machine.done(WAIT);
    machine.done(FLD1);
    assert_eq!(machine.cpu.fpu.status() & status::CLEARED, status::ES | status::B | status::ZE);
    machine.done(&[0xdb, 0xe2]);
    assert!(!machine.cpu.fpu.pending());
}

#[test]
fn unmasked_store_writes_nothing() {
    let mut machine = with(0);
    machine.cpu.fpu.set_words(0x037e, 0);
    // fist dword [eax] of an empty register.
    machine.bus.place(DATA, &[0x11; 8]);
    machine.done(&[0xdb, 0x10]);
    assert_eq!(machine.bus.dword(DATA), 0x1111_1111);
    assert_eq!(machine.cpu.fpu.status() & status::CLEARED, status::IE | status::SF | status::ES | status::B);
}

#[test]
fn pointers_name_instruction_and_operand() {
    let mut machine = with(0);
    // fld dword fs:[eax + 0x10]
    machine.done(&[0x64, 0xd9, 0x40, 0x10]);
    let (cs, ds) = (KERNEL_CODE, KERNEL_DATA);
    let loaded = Pointers { opcode: 0x140, ip: CODE, cs, dp: DATA + 0x10, ds };
    assert_eq!(machine.cpu.fpu.pointers(), loaded);
    let at = machine.cpu.eip;
    machine.done(&[0xd8, 0xc1]);
    assert_eq!(machine.cpu.fpu.pointers(), Pointers { opcode: 0x0c1, ip: at, ..loaded });
    machine.done(&[0xd9, 0x38]);
    assert_eq!(machine.cpu.fpu.pointers().ip, at, "not a control instruction's");
}

#[test]
fn environments_have_their_four_formats() {
    let pointers = Pointers { opcode: 0x123, ip: 0x000a_bcde, cs: 0x0010, dp: 0x0003_4567, ds: 0x0020 };
    let mut fpu = Fpu::default();
    fpu.set_pointers(pointers);
    let stored = |mut machine: Machine, prefix: &[u8], modrm: &[u8]| {
        machine.cpu.fpu = fpu.clone();
        machine.done(&[prefix, &[0xd9], modrm].concat());
        assert_eq!(machine.cpu.fpu.pointers(), pointers);
        machine.cpu.fpu = Fpu::default();
        machine.cpu.eip = if machine.cpu.protected() { CODE } else { 0x5000 };
        let load: Vec<u8> = [prefix, &[0xd9, modrm[0] & !0x10], &modrm[1..]].concat();
        machine.done(&load);
        (0..7)
            .map(|n| machine.bus.dword(DATA + 4 * n))
            .zip([machine.cpu.fpu.pointers(); 7])
            .collect::<Vec<_>>()
    };
    let words = |list: &[(u32, Pointers)]| list.iter().map(|(word, _)| *word).collect::<Vec<_>>();
    let wide = stored(with(0), &[], &[0x30]);
    assert_eq!(
        words(&wide),
        [0xffff_037f, 0xffff_0000, 0xffff_ffff, 0x000a_bcde, 0x0123_0010, 0x0003_4567, 0xffff_0020]
    );
    assert_eq!(wide[0].1, pointers);
    let narrow = stored(with(0), &[0x66], &[0x30]);
    assert_eq!(words(&narrow)[..4], [0x0000_037f, 0xbcde_ffff, 0x4567_0010, 0x0020]);
    assert_eq!(narrow[0].1, Pointers { opcode: 0, ip: 0xbcde, cs: 0x10, dp: 0x4567, ds: 0x20 });
    // Linear: 0xabcde + 0x100, 0x34567 + 0x200.
    let mut real = Machine::real();
    real.cpu.gpr[6] = DATA;
    let wide_real = stored(real.clone(), &[0x66], &[0x34]);
    assert_eq!(words(&wide_real)[3..], [0xffff_bdde, 0xa123, 0xffff_4767, 0x3000]);
    assert_eq!(wide_real[0].1, Pointers { opcode: 0x123, ip: 0xabdde, cs: 0, dp: 0x34767, ds: 0 });
    let narrow_real = stored(real, &[], &[0x34]);
    assert_eq!(words(&narrow_real)[1..4], [0xbdde_ffff, 0x4767_a123, 0x3000]);
}

#[test]
fn fxrstor_refuses_reserved_bits_and_misaligned_areas() {
    let mut machine = with(0);
    machine.done(FXSAVE);
    machine.bus.place(DATA + 26, &[1]);
    assert_eq!(machine.fault(FXRSTOR), Exception::gp(0));
    machine.bus.place(DATA + 24, &[0, 0, 1, 0]);
    machine.cpu.gpr[0] = DATA + 24;
    assert_eq!(machine.fault(LDMXCSR), Exception::gp(0));
    machine.cpu.gpr[0] = DATA + 8;
    for bytes in [FXSAVE, FXRSTOR, &[0x0f, 0x28, 0x00], &[0x66, 0x0f, 0xfc, 0x00]] {
        assert_eq!(machine.fault(bytes), Exception::gp(0), "{bytes:02x?}");
    }
    machine.done(&[0x0f, 0x10, 0x00]);
    machine.cpu.seg[3] = Segment { limit: DATA + 0x1ff, ..machine.cpu.seg[3] };
    machine.cpu.gpr[0] = DATA;
    machine.done(FXSAVE);
    machine.cpu.seg[3].limit -= 1;
    assert_eq!(machine.fault(FXSAVE), Exception::gp(0), "all 512 bytes");
}

#[test]
fn unmasked_sse_exception_leaves_flags_and_nothing_else() {
    let mut machine = with(0);
    machine.cpu.fpu.set_xmm(0, ONE_SINGLE);
    assert!(machine.cpu.fpu.set_mxcsr(MXCSR_RESET & !(u32::from(status::ZE) << 7)));
    let before = machine.cpu.clone();
    assert_eq!(machine.run(DIVSS), Step::Exception(Exception::XM));
    assert_eq!(machine.cpu.fpu.mxcsr(), before.fpu.mxcsr() | u32::from(status::ZE));
    assert!(machine.cpu.fpu.set_mxcsr(before.fpu.mxcsr()));
    assert_eq!(machine.cpu, before);
    machine.cpu.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(machine.run(DIVSS), Step::Exception(Exception::UD));
    // The flag that it left is no exception of the next instruction.
    machine.cpu.fpu.set_xmm(1, ONE_SINGLE);
    machine.done(DIVSS);
}

#[test]
fn exception_before_the_computation_hides_those_after() {
    // divps: one by zero, and 1/3, which is inexact.
    let (zero, precision) = (u32::from(status::ZE), u32::from(status::PE));
    let mut machine = with(0);
    machine.cpu.fpu.set_xmm(0, ONE_SINGLE << 32 | ONE_SINGLE);
    machine.cpu.fpu.set_xmm(1, 0x4040_0000 << 32);
    assert!(machine.cpu.fpu.set_mxcsr(0x1f80 & !(zero << 7)));
    assert_eq!(machine.run(&[0x0f, 0x5e, 0xc1]), Step::Exception(Exception::XM));
    assert_eq!(machine.cpu.fpu.mxcsr() & 0x3f, zero | u32::from(status::IE), "0/0 in the other lanes");
    assert!(machine.cpu.fpu.set_mxcsr(0x1f80 & !(precision << 7)));
    assert_eq!(machine.run(&[0x0f, 0x5e, 0xc1]), Step::Exception(Exception::XM));
    assert_eq!(machine.cpu.fpu.mxcsr() & 0x3f, zero | u32::from(status::IE) | precision);
}

#[test]
fn exact_tiny_result_underflows_where_unmasked() {
    let underflow = u32::from(status::UE);
    let mut machine = with(0);
    // The smallest normal by two.
    machine.cpu.fpu.set_xmm(0, 0x0080_0000);
    machine.cpu.fpu.set_xmm(1, 0x4000_0000);
    machine.done(DIVSS);
    assert_eq!(
        (machine.cpu.fpu.xmm(0), machine.cpu.fpu.mxcsr()),
        (0x0040_0000, MXCSR_RESET),
        "masked: exact"
    );
    machine.cpu.fpu.set_xmm(0, 0x0080_0000);
    // Flushing to zero does not count where underflow is unmasked.
    assert!(machine.cpu.fpu.set_mxcsr(0x9f80 & !(underflow << 7)));
    assert_eq!(machine.run(DIVSS), Step::Exception(Exception::XM));
    assert_eq!((machine.cpu.fpu.xmm(0), machine.cpu.fpu.mxcsr() & 0x3f), (0x0080_0000, underflow));
}

#[test]
fn store_across_a_bad_page_writes_nothing() {
    // fstp tbyte, movups, fnsave, maskmovdqu at the end of a page; the next one is read-only.
    let maskmovdqu = [0x66, 0x0f, 0xf7, 0xc1];
    for (bytes, size) in
        [(&[0xdb, 0x38][..], 10), (&[0x0f, 0x11, 0x00], 16), (&[0xdd, 0x30], 108), (&maskmovdqu, 16)]
    {
        let mut machine = user();
        machine.cpu.fpu.set_xmm(0, u128::MAX);
        machine.cpu.fpu.set_xmm(1, u128::MAX);
        machine.cpu.gpr[0] = DATA + 0x1000 - size + 1;
        machine.cpu.gpr[7] = machine.cpu.gpr[0];
        machine.bus.pages.insert((DATA >> 12) + 1, Page::ReadOnly);
        let memory = machine.bus.memory[DATA as usize..].to_vec();
        let fault = machine.fault(bytes);
        assert_eq!(
            (fault.vector, fault.error, fault.cr2),
            (14, Some(7), Some(DATA + 0x1000)),
            "{bytes:02x?}"
        );
        assert!(machine.bus.memory[DATA as usize..] == memory, "{bytes:02x?}");
        machine.bus.pages.clear();
        machine.done(bytes);
    }
}

#[test]
fn alignment_is_checked_for_users_who_ask() {
    // fld of 4, 8 and 10 bytes, fnstcw, movd, movq and movss of memory: the address that is misaligned for each.
    let cases = [
        (&[0xd9, 0x00][..], 2),
        (&[0xdd, 0x00], 4),
        (&[0xdb, 0x28], 4),
        (&[0xd9, 0x38], 1),
        (&[0x0f, 0x6e, 0x00], 2),
        (&[0x0f, 0x6f, 0x00], 4),
        (&[0xf3, 0x0f, 0x10, 0x00], 2),
    ];
    for (bytes, off) in cases {
        let mut machine = user();
        machine.cpu.cr0 |= cr0::AM;
        machine.cpu.eflags |= AC;
        machine.cpu.gpr[0] = DATA + off;
        assert_eq!(machine.fault(bytes), Exception::AC, "{bytes:02x?}");
        machine.cpu.gpr[0] = DATA;
        machine.done(bytes);
    }
}

#[test]
fn instructions_that_are_not_offered_are_none() {
    // fisttp, movddup, lddqu, pabsb, fnstdw, frstpm, pextrw to memory, a VEX prefix.
    let later = [
        &[0xdb, 0x08][..],
        &[0xf2, 0x0f, 0x12, 0xc1],
        &[0xf2, 0x0f, 0xf0, 0x00],
        &[0x0f, 0x38, 0x1c, 0xc1],
        &[0xdf, 0xe1],
        &[0xdb, 0xe5],
        &[0x66, 0x0f, 0x3a, 0x15, 0x00, 0],
        &[0xc5, 0xf8, 0x58, 0xc1],
    ];
    for bytes in later {
        assert_eq!(with(0).fault(bytes), Exception::UD, "{bytes:02x?}");
    }
}
