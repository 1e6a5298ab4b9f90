//! Handlers: one function for each operation, operand form and width that is hot, generic over all three.
//!
//! `M` is the way to memory (`run`).
//!
//! Holds: a handler that ends with [`Next::Left`] or [`Next::Full`] has changed nothing. Values and flags are `alu`'s, so that there is one
//! place that knows them.

use umbra_mmu::Gva;

use super::CodeBus;
use super::run::{FULL, Next, QUICK, Run, width};
use super::translate::Op;
use crate::cpu::eflags::DF;
use crate::interp::Width;
use crate::interp::alu::{self, Outcome};
use crate::interp::arith::{product, product_flags};
use crate::interp::flags::Flags;
use crate::interp::operand::{EAX, EBP, EDX, ESP};
use crate::interp::segment::ALL_SEGMENTS;

/// The value, or out of the handler.
macro_rules! get {
    ($run:ident, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err(why) => return $run.without(why),
        }
    };
}

#[inline(always)]
pub fn generic<B: CodeBus>(_: &mut Run<'_, B>, _: &Op) -> Next {
    Next::Generic
}

#[inline(always)]
pub fn nop<B: CodeBus>(_: &mut Run<'_, B>, _: &Op) -> Next {
    Next::On
}

#[inline(always)]
fn compute<const K: u8>(a: u32, b: u32, flags: Flags, width: Width) -> Outcome {
    match K {
        0 => alu::add(a, b, flags, width),
        1 => alu::or(a, b, flags, width),
        2 => alu::adc(a, b, flags, width),
        3 => alu::sbb(a, b, flags, width),
        4 | 8 => alu::and(a, b, flags, width),
        5 | 7 => alu::sub(a, b, flags, width),
        _ => alu::xor(a, b, flags, width),
    }
}

/// ADD, OR, ADC, SBB, AND, SUB, XOR; CMP and TEST, which write no result.
#[inline(always)]
fn to_register<const K: u8, const W: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op, source: u32) -> Next {
    let outcome = compute::<K>(run.get::<W>(op.dst), source, run.flags, width::<W>());
    if K < 7 {
        run.set::<W>(op.dst, outcome.value);
    }
    run.flags = outcome.flags;
    Next::On
}

/// CMP (`K` is 7) and TEST (8) of a register with another or an immediate, for a branch that comes next.
#[inline(always)]
pub fn compared<const K: u8, const I: bool, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Flags {
    let source = if I { op.imm } else { run.get::<4>(op.src) };
    let flags = compute::<K>(run.get::<4>(op.dst), source, run.flags, Width::B4).flags;
    run.flags = flags;
    flags
}

#[inline(always)]
fn to_memory<const K: u8, const W: u8, const M: u8, B: CodeBus>(
    run: &mut Run<'_, B>,
    op: &Op,
    source: u32,
) -> Next {
    let before = run.flags;
    if K >= 7 {
        let target = get!(run, run.load::<W, M>(op));
        run.flags = compute::<K>(target, source, before, width::<W>()).flags;
        return Next::On;
    }
    let mut after = before;
    get!(
        run,
        run.update::<W, M>(op, |old| {
            let outcome = compute::<K>(old, source, before, width::<W>());
            after = outcome.flags;
            outcome.value
        })
    );
    run.flags = after;
    run.stored::<M>()
}

#[inline(always)]
pub fn alu_rr<const K: u8, const W: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let source = run.get::<W>(op.src);
    to_register::<K, W, B>(run, op, source)
}

#[inline(always)]
pub fn alu_ri<const K: u8, const W: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    to_register::<K, W, B>(run, op, op.imm & width::<W>().mask())
}

#[inline(always)]
pub fn alu_rm<const K: u8, const W: u8, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let source = get!(run, run.load::<W, M>(op));
    to_register::<K, W, B>(run, op, source)
}

#[inline(always)]
pub fn alu_mr<const K: u8, const W: u8, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let source = run.get::<W>(op.src);
    to_memory::<K, W, M, B>(run, op, source)
}

#[inline(always)]
pub fn alu_mi<const K: u8, const W: u8, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    to_memory::<K, W, M, B>(run, op, op.imm & width::<W>().mask())
}

/// INC, DEC, NEG, NOT.
#[inline(always)]
fn single<const K: u8>(a: u32, flags: Flags, width: Width) -> Outcome {
    match K {
        0 => alu::inc(a, 0, flags, width),
        1 => alu::dec(a, 0, flags, width),
        2 => alu::neg(a, 0, flags, width),
        _ => alu::not(a, 0, flags, width),
    }
}

#[inline(always)]
pub fn unary_r<const K: u8, const W: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let outcome = single::<K>(run.get::<W>(op.dst), run.flags, width::<W>());
    run.set::<W>(op.dst, outcome.value);
    run.flags = outcome.flags;
    Next::On
}

#[inline(always)]
pub fn unary_m<const K: u8, const W: u8, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let before = run.flags;
    let mut after = before;
    get!(
        run,
        run.update::<W, M>(op, |old| {
            let outcome = single::<K>(old, before, width::<W>());
            after = outcome.flags;
            outcome.value
        })
    );
    run.flags = after;
    run.stored::<M>()
}

/// SHL, SHR, SAR, ROL, ROR of a register.
#[inline(always)]
fn shifted<const K: u8, const W: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op, count: u32) -> Next {
    let (a, flags) = (run.get::<W>(op.dst), run.flags);
    let outcome = match K {
        0 => alu::shl(a, count, flags, width::<W>()),
        1 => alu::shr(a, count, flags, width::<W>()),
        2 => alu::sar(a, count, flags, width::<W>()),
        3 => alu::rol(a, count, flags, width::<W>()),
        _ => alu::ror(a, count, flags, width::<W>()),
    };
    run.set::<W>(op.dst, outcome.value);
    run.flags = outcome.flags;
    Next::On
}

#[inline(always)]
pub fn shift_ri<const K: u8, const W: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    shifted::<K, W, B>(run, op, op.imm & 0xff)
}

/// By CL, the only register there is to shift by.
#[inline(always)]
pub fn shift_rr<const K: u8, const W: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let count = run.get::<1>(op.src);
    shifted::<K, W, B>(run, op, count)
}

#[inline(always)]
pub fn mov_rr<const W: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = run.get::<W>(op.src);
    run.set::<W>(op.dst, value);
    Next::On
}

#[inline(always)]
pub fn mov_ri<const W: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    run.set::<W>(op.dst, op.imm);
    Next::On
}

#[inline(always)]
pub fn mov_rm<const W: u8, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = get!(run, run.load::<W, M>(op));
    run.set::<W>(op.dst, value);
    Next::On
}

#[inline(always)]
pub fn mov_mr<const W: u8, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = run.get::<W>(op.src);
    get!(run, run.store::<W, M>(op, value));
    run.stored::<M>()
}

#[inline(always)]
pub fn mov_mi<const W: u8, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    get!(run, run.store::<W, M>(op, op.imm));
    run.stored::<M>()
}

/// MOVZX and MOVSX to 32 bits.
#[inline(always)]
fn extended<const S: bool, const F: u8>(value: u32) -> u32 {
    if S { width::<F>().extend(value) } else { value }
}

#[inline(always)]
pub fn extend_r<const S: bool, const F: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = run.get::<F>(op.src);
    run.set::<4>(op.dst, extended::<S, F>(value));
    Next::On
}

#[inline(always)]
pub fn extend_m<const S: bool, const F: u8, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = get!(run, run.load::<F, M>(op));
    run.set::<4>(op.dst, extended::<S, F>(value));
    Next::On
}

#[inline(always)]
pub fn load_address<B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let offset = run.offset::<QUICK>(op);
    run.set::<4>(op.dst, offset);
    Next::On
}

#[inline(always)]
pub fn push_r<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = run.get::<4>(op.dst);
    get!(run, run.push::<M>(value));
    run.stored::<M>()
}

#[inline(always)]
pub fn push_i<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    get!(run, run.push::<M>(op.imm));
    run.stored::<M>()
}

#[inline(always)]
pub fn push_m<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = get!(run, run.load::<4, M>(op));
    get!(run, run.push::<M>(value));
    run.stored::<M>()
}

#[inline(always)]
pub fn pop_r<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = get!(run, run.pop::<M>());
    run.set::<4>(op.dst, value);
    Next::On
}

#[inline(always)]
pub fn leave<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, _: &Op) -> Next {
    if M == FULL {
        get!(run, run.core.leave(Width::B4).map_err(Some));
        return Next::On;
    }
    let old = run.core.cpu.gpr[ESP];
    run.core.cpu.gpr[ESP] = run.core.cpu.gpr[EBP];
    match run.pop::<M>() {
        Ok(value) => run.core.cpu.gpr[EBP] = value,
        Err(why) => {
            run.core.cpu.gpr[ESP] = old;
            return run.without(why);
        }
    }
    Next::On
}

#[inline(always)]
pub fn jmp<B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    run.jump_by(op)
}

#[inline(always)]
pub fn jmp_reg<B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    run.core.cpu.eip = run.get::<4>(op.dst);
    Next::Jumped
}

#[inline(always)]
pub fn jmp_mem<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    run.core.cpu.eip = get!(run, run.load::<4, M>(op));
    Next::Jumped
}

#[inline(always)]
pub fn jump_if<const C: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    if run.flags.meet(C.into()) { run.jump_by(op) } else { Next::On }
}

#[inline(always)]
pub fn call<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let back = run.at(op.end);
    get!(run, run.push::<M>(back));
    run.jump_by(op)
}

/// CALL to what is the next op.
#[inline(always)]
pub fn call_on<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let back = run.at(op.end);
    get!(run, run.push::<M>(back));
    match run.stored::<M>() {
        Next::On => Next::On,
        _ => run.jump_by(op),
    }
}

#[inline(always)]
pub fn call_reg<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let (target, back) = (run.get::<4>(op.dst), run.at(op.end));
    get!(run, run.push::<M>(back));
    run.core.cpu.eip = target;
    Next::Jumped
}

#[inline(always)]
pub fn call_mem<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let target = get!(run, run.load::<4, M>(op));
    let back = run.at(op.end);
    get!(run, run.push::<M>(back));
    run.core.cpu.eip = target;
    Next::Jumped
}

#[inline(always)]
pub fn ret<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, _: &Op) -> Next {
    run.core.cpu.eip = get!(run, run.pop::<M>());
    Next::Jumped
}

#[inline(always)]
pub fn set_if<const C: u8, const R: bool, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = u32::from(run.flags.meet(C.into()));
    if R {
        run.set::<1>(op.dst, value);
        return Next::On;
    }
    get!(run, run.store::<1, M>(op, value));
    run.stored::<M>()
}

#[inline(always)]
pub fn move_if<const C: u8, const R: bool, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = if R { run.get::<4>(op.src) } else { get!(run, run.load::<4, M>(op)) };
    if run.flags.meet(C.into()) {
        run.set::<4>(op.dst, value);
    }
    Next::On
}

#[inline(always)]
pub fn multiply<const R: bool, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let source = if R { run.get::<4>(op.src) } else { get!(run, run.load::<4, M>(op)) };
    let (product, fits) = product(run.get::<4>(op.dst), source, Width::B4, true);
    run.set::<4>(op.dst, product as u32);
    run.flags = product_flags(run.flags, fits);
    Next::On
}

#[inline(always)]
pub fn exchange<B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let (a, b) = (run.get::<4>(op.dst), run.get::<4>(op.src));
    run.set::<4>(op.src, a);
    run.set::<4>(op.dst, b);
    Next::On
}

/// LOCK CMPXCHG with memory.
#[inline(always)]
pub fn compare_exchange<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let (expected, source) = (run.core.cpu.gpr[EAX], run.get::<4>(op.src));
    let old = get!(run, run.compare_exchange::<M>(op, expected, source));
    run.flags = alu::sub(expected, old, run.flags, Width::B4).flags;
    run.core.cpu.gpr[EAX] = old;
    run.stored::<M>()
}

#[inline(always)]
pub fn swap_bytes<B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let value = run.get::<4>(op.dst).swap_bytes();
    run.set::<4>(op.dst, value);
    Next::On
}

#[inline(always)]
pub fn cdq<B: CodeBus>(run: &mut Run<'_, B>, _: &Op) -> Next {
    run.core.cpu.gpr[EDX] = (run.core.cpu.gpr[EAX] as i32 >> 31) as u32;
    Next::On
}

#[inline(always)]
pub fn cwde<B: CodeBus>(run: &mut Run<'_, B>, _: &Op) -> Next {
    run.core.cpu.gpr[EAX] = Width::B2.extend(run.core.cpu.gpr[EAX] & 0xffff);
    Next::On
}

/// PUSHAD.
#[inline(always)]
pub fn push_all<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, _: &Op) -> Next {
    if M == FULL {
        get!(run, run.core.push_all(Width::B4).map_err(Some));
        return run.stored::<M>();
    }
    let values = run.core.cpu.gpr;
    get!(run, run.push_all::<M>(&values));
    Next::On
}

/// POPAD; ESP's slot is skipped.
#[inline(always)]
pub fn pop_all<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, _: &Op) -> Next {
    if M == FULL {
        get!(run, run.core.pop_all(Width::B4).map_err(Some));
        return Next::On;
    }
    let values = get!(run, run.pop_all::<M>());
    let pointer = run.core.cpu.gpr[ESP];
    run.core.cpu.gpr = values;
    run.core.cpu.gpr[ESP] = pointer;
    Next::On
}

/// PUSH of a segment register; zero-extended.
#[inline(always)]
pub fn push_segment<const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let selector = run.core.cpu.segment(ALL_SEGMENTS[usize::from(op.dst)]).selector;
    get!(run, run.push::<M>(selector.into()));
    run.stored::<M>()
}

/// POP to a segment register, any but CS and SS. It reads a descriptor, and may set its A bit.
#[inline(always)]
pub fn pop_segment<B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    run.tell(op);
    get!(run, run.core.pop_segment(ALL_SEGMENTS[usize::from(op.dst)], Width::B4).map_err(Some));
    run.look_at_segments();
    run.stored::<FULL>()
}

/// MOV from a register to a segment register, likewise.
#[inline(always)]
pub fn load_segment<B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    run.tell(op);
    let (seg, selector) = (ALL_SEGMENTS[usize::from(op.dst)], run.get::<2>(op.src) as u16);
    get!(run, run.core.load_segment_register(seg, selector).map_err(Some));
    run.look_at_segments();
    run.stored::<FULL>()
}

/// MOV from CR2.
#[inline(always)]
pub fn fault_address<B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    get!(run, run.core.require_supervisor().map_err(Some));
    let value = run.core.cpu.cr2;
    run.set::<4>(op.dst, value);
    Next::On
}

/// CLD and STD.
#[inline(always)]
pub fn set_direction<const D: u32, B: CodeBus>(run: &mut Run<'_, B>, _: &Op) -> Next {
    run.core.cpu.eflags = run.core.cpu.eflags & !DF | D;
    Next::On
}

/// SHLD and SHRD of registers, by an immediate.
#[inline(always)]
pub fn shift_double<const L: bool, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let (a, b, flags) = (run.get::<4>(op.dst), run.get::<4>(op.src), run.flags);
    let shift = if L { alu::shld } else { alu::shrd };
    let outcome = shift(a, b, op.imm & 0xff, flags, Width::B4);
    run.set::<4>(op.dst, outcome.value);
    run.flags = outcome.flags;
    Next::On
}

/// MUL and IMUL of EAX, into EDX:EAX.
#[inline(always)]
pub fn multiply_wide<const S: bool, const R: bool, const M: u8, B: CodeBus>(
    run: &mut Run<'_, B>,
    op: &Op,
) -> Next {
    let source = if R { run.get::<4>(op.dst) } else { get!(run, run.load::<4, M>(op)) };
    let (product, fits) = product(run.core.cpu.gpr[EAX], source, Width::B4, S);
    run.core.cpu.gpr[EAX] = product as u32;
    run.core.cpu.gpr[EDX] = (product >> 32) as u32;
    run.flags = product_flags(run.flags, fits);
    Next::On
}

/// IMUL by an immediate.
#[inline(always)]
pub fn multiply_by<const R: bool, const M: u8, B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    let source = if R { run.get::<4>(op.src) } else { get!(run, run.load::<4, M>(op)) };
    let (product, fits) = product(source, op.imm, Width::B4, true);
    run.set::<4>(op.dst, product as u32);
    run.flags = product_flags(run.flags, fits);
    Next::On
}

/// INVLPG. Where what was found by linear address may not be there any more, the block is over.
#[inline(always)]
pub fn invalidate_page<B: CodeBus>(run: &mut Run<'_, B>, op: &Op) -> Next {
    get!(run, run.core.require_supervisor().map_err(Some));
    let base = run.core.cpu.segment(ALL_SEGMENTS[usize::from(op.seg)]).base;
    let gva = Gva(base.wrapping_add(run.offset::<QUICK>(op)));
    run.core.bus.invalidate_page(gva);
    if run.core.bus.translation_version() == run.version {
        return Next::On;
    }
    run.core.cpu.eip = run.at(op.end);
    Next::Jumped
}
