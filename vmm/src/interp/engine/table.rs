//! The numbers of handlers, and the table that has the function for a number and a bus.
//!
//! Story: an op names its handler by a number, so that blocks know no bus. The functions here compute the number of a
//! combination of operation, form and width, or `None` where it has no handler.

use super::CodeBus;
use super::ops::*;
use super::run::{FULL, NEAR, Next, QUICK, Run};
use super::translate::Op;
use crate::cpu::eflags::DF;

/// Which operands an instruction has, destination first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    RegReg,
    RegImm,
    RegMem,
    MemReg,
    MemImm,
    Reg,
    Mem,
    Imm,
}

/// A handler: does an op, then goes on with the rest of the block. It calls the next handler last, so that each kind of op has
/// a jump of its own, which the host's CPU predicts; were they calls, no more than a block's ops would be on the stack.
///
/// It gets its op with the rest behind it. What the next one's number is stands in the op (`Op::then`): whether there is a next
/// one, that looks for itself.
pub type Handler<B> = fn(&mut Run<'_, B>, &[Op]) -> Next;

/// Does `ops`, which are the rest of a block.
#[inline(always)]
pub fn go_on<B: CodeBus>(run: &mut Run<'_, B>, ops: &[Op]) -> Next {
    match ops.first() {
        Some(op) => Handlers::<B>::TABLE[usize::from(op.handler) % ALL](run, ops),
        None => Next::Through,
    }
}

/// The same for what is behind `op`.
#[inline(always)]
fn go_behind<B: CodeBus>(run: &mut Run<'_, B>, op: &Op, rest: &[Op]) -> Next {
    Handlers::<B>::TABLE[usize::from(op.then) % ALL](run, rest)
}

/// An op by one way alone.
#[inline(always)]
fn plain<B: CodeBus>(
    run: &mut Run<'_, B>,
    ops: &[Op],
    handler: impl FnOnce(&mut Run<'_, B>, &Op) -> Next,
) -> Next {
    let [op, rest @ ..] = ops else { return Next::Through };
    match handler(run, op) {
        Next::On => go_behind(run, op, rest),
        end => {
            run.last = op.number;
            end
        }
    }
}

/// An op by way `M`, else by the full one.
#[inline(always)]
fn quick<const M: u8, B: CodeBus>(
    run: &mut Run<'_, B>,
    ops: &[Op],
    handler: impl FnOnce(&mut Run<'_, B>, &Op) -> Next,
    full: impl FnOnce(&mut Run<'_, B>, &Op) -> Next,
) -> Next {
    let [op, rest @ ..] = ops else { return Next::Through };
    if M == FULL {
        return in_full(run, ops, full);
    }
    match handler(run, op) {
        Next::On => go_behind(run, op, rest),
        Next::Full => in_full(run, ops, full),
        end => {
            run.last = op.number;
            end
        }
    }
}

#[cold]
#[inline(never)]
fn in_full<B: CodeBus>(
    run: &mut Run<'_, B>,
    ops: &[Op],
    full: impl FnOnce(&mut Run<'_, B>, &Op) -> Next,
) -> Next {
    plain(run, ops, |run, op| {
        run.tell(op);
        full(run, op)
    })
}

/// CMP or TEST, and the branch behind it: two ops, one after the other, with nothing to find in between.
#[inline(always)]
fn branching<const C: u8, const K: u8, const I: bool, B: CodeBus>(run: &mut Run<'_, B>, ops: &[Op]) -> Next {
    let [op, rest @ ..] = ops else { return Next::Through };
    let flags = compared::<K, I, B>(run, op);
    // The block may have been cut between the two.
    let [branch, rest @ ..] = rest else { return Next::Through };
    if flags.meet(C.into()) {
        run.last = branch.number;
        return run.jump_by(branch);
    }
    go_behind(run, branch, rest)
}

/// The handler of an op that touches no memory.
macro_rules! plain {
    ($handler:ident $(, $rest:expr)*) => { |run, ops| plain(run, ops, $handler::<$({ $rest },)* B>) };
}

/// The handler of an op that may, by way `M`.
macro_rules! memory {
    ($handler:ident $(, $rest:expr)*) => {
        |run, ops| quick::<M, B>(run, ops, $handler::<$({ $rest },)* M, B>, $handler::<$({ $rest },)* FULL, B>)
    };
}

/// The handler of an op and the one behind it.
macro_rules! both {
    ($handler:ident $(, $rest:expr)*) => { |run, ops| $handler::<$({ $rest },)* B>(run, ops) };
}

/// An instruction without a handler of its own.
pub const GENERIC: u16 = 0;
pub const NOP: u16 = 1;
pub const JMP: u16 = 2;
pub const JMP_REG: u16 = 3;
pub const JMP_MEM: u16 = 4;
pub const CALL: u16 = 5;
pub const CALL_REG: u16 = 6;
pub const CALL_MEM: u16 = 7;
pub const RET: u16 = 8;
pub const CDQ: u16 = 9;
pub const CWDE: u16 = 10;
pub const LEAVE: u16 = 11;
const LEA: u16 = 12;
const PUSH: u16 = 13;
const POP: u16 = 16;
const XCHG: u16 = 17;
const BSWAP: u16 = 18;
const IMUL: u16 = 19;
pub const INVLPG: u16 = 21;
const EXTEND: u16 = 22;
const MOV: u16 = EXTEND + 8;
const JCC: u16 = MOV + 15;
const SET: u16 = JCC + 16;
const CMOV: u16 = SET + 32;
const ALU: u16 = CMOV + 32;
const UNARY: u16 = ALU + 9 * 15;
const SHIFT: u16 = UNARY + 4 * 6;
const MORE: u16 = SHIFT + 5 * 6;
pub const PUSH_ALL: u16 = MORE;
pub const POP_ALL: u16 = MORE + 1;
pub const PUSH_SEGMENT: u16 = MORE + 2;
pub const POP_SEGMENT: u16 = MORE + 3;
pub const LOAD_SEGMENT: u16 = MORE + 4;
pub const FAULT_ADDRESS: u16 = MORE + 5;
pub const CLD: u16 = MORE + 6;
pub const STD: u16 = MORE + 7;
pub const SHLD: u16 = MORE + 8;
pub const SHRD: u16 = MORE + 9;
pub const CALL_ON: u16 = MORE + 16;
pub const LOCK_CMPXCHG: u16 = MORE + 17;
/// CMP of two registers, CMP with an immediate, TEST likewise; sixteen conditions each.
const BRANCHING: u16 = MORE + 18;
const MUL: u16 = MORE + 10;
const IMUL_BY: u16 = MORE + 14;
/// Handlers of each way, beyond the last number; a power of two.
const HANDLERS: usize = 512;
/// And of all ways, likewise.
const ALL: usize = 4 * HANDLERS;

/// The handler `number` by way `way`.
pub const fn by_way(number: u16, way: u8) -> u16 {
    number + way as u16 * HANDLERS as u16
}

/// The place of a width among the three.
fn place(width: u8) -> Option<u16> {
    match width {
        1 => Some(0),
        2 => Some(1),
        4 => Some(2),
        _ => None,
    }
}

/// The place of a two-operand form among the five.
fn two(form: Form) -> Option<u16> {
    match form {
        Form::RegReg => Some(0),
        Form::RegImm => Some(1),
        Form::RegMem => Some(2),
        Form::MemReg => Some(3),
        Form::MemImm => Some(4),
        _ => None,
    }
}

pub fn alu(kind: u16, form: Form, width: u8) -> Option<u16> {
    Some(ALU + kind * 15 + two(form)? * 3 + place(width)?)
}

pub fn unary(kind: u16, form: Form, width: u8) -> Option<u16> {
    let form = match form {
        Form::Reg => 0,
        Form::Mem => 1,
        _ => return None,
    };
    Some(UNARY + kind * 6 + form * 3 + place(width)?)
}

pub fn shift(kind: u16, form: Form, width: u8) -> Option<u16> {
    let form = match form {
        Form::RegImm => 0,
        Form::RegReg => 1,
        _ => return None,
    };
    Some(SHIFT + kind * 6 + form * 3 + place(width)?)
}

pub fn mov(form: Form, width: u8) -> Option<u16> {
    Some(MOV + two(form)? * 3 + place(width)?)
}

pub fn lea(form: Form, width: u8) -> Option<u16> {
    (form == Form::RegMem && width == 4).then_some(LEA)
}

pub fn extend(signed: bool, form: Form, width: u8, from: Option<u8>) -> Option<u16> {
    let form = match form {
        Form::RegReg => 0,
        Form::RegMem => 1,
        _ => return None,
    };
    let from = from? - 1;
    (width == 4 && from < 2).then_some(EXTEND + u16::from(signed) * 4 + form * 2 + u16::from(from))
}

pub fn push(form: Form, width: u8) -> Option<u16> {
    let form = match form {
        Form::Reg => 0,
        Form::Imm => 1,
        Form::Mem => 2,
        _ => return None,
    };
    (width == 4).then_some(PUSH + form)
}

pub fn pop(form: Form, width: u8) -> Option<u16> {
    (form == Form::Reg && width == 4).then_some(POP)
}

pub fn xchg(form: Form, width: u8) -> Option<u16> {
    (form == Form::RegReg && width == 4).then_some(XCHG)
}

pub fn bswap(form: Form, width: u8) -> Option<u16> {
    (form == Form::Reg && width == 4).then_some(BSWAP)
}

pub fn imul(form: Form, width: u8) -> Option<u16> {
    register_or_memory(form, width, IMUL)
}

pub fn mul(signed: bool, form: Form, width: u8) -> Option<u16> {
    let first = MUL + 2 * u16::from(signed);
    match form {
        Form::Reg if width == 4 => Some(first),
        Form::Mem if width == 4 => Some(first + 1),
        _ => None,
    }
}

pub fn imul_by(form: Form, width: u8) -> Option<u16> {
    register_or_memory(form, width, IMUL_BY)
}

pub fn jcc(code: u32) -> u16 {
    JCC + code as u16
}

/// What does the op of handler `first` and then the branch of handler `second`, where there is such a thing.
pub fn joined(first: u16, second: u16) -> Option<u16> {
    let code = (second % HANDLERS as u16).checked_sub(JCC).filter(|code| *code < 16)?;
    let pair = |kind: u16, form: u16| ALU + kind * 15 + form * 3 + 2;
    let pairs = [pair(7, 0), pair(7, 1), pair(8, 0), pair(8, 1)];
    let number = pairs.iter().position(|one| *one == first % HANDLERS as u16)?;
    Some(BRANCHING + 16 * number as u16 + code)
}

pub fn set(code: u32, form: Form) -> Option<u16> {
    let form = match form {
        Form::Reg => 0,
        Form::Mem => 1,
        _ => return None,
    };
    Some(SET + form * 16 + code as u16)
}

pub fn cmov(code: u32, form: Form, width: u8) -> Option<u16> {
    let first = register_or_memory(form, width, 0)?;
    Some(CMOV + first * 16 + code as u16)
}

fn register_or_memory(form: Form, width: u8, first: u16) -> Option<u16> {
    match form {
        Form::RegReg if width == 4 => Some(first),
        Form::RegMem if width == 4 => Some(first + 1),
        _ => None,
    }
}

/// The table for a bus.
pub struct Handlers<B>(std::marker::PhantomData<B>);

impl<B: CodeBus> Handlers<B> {
    /// The handlers by number, those of one way behind those of another.
    pub const TABLE: [Handler<B>; ALL] = {
        let mut table = [plain!(generic) as Handler<B>; ALL];
        put(&mut table, by_way(0, FULL), &Self::of_way::<FULL>());
        put(&mut table, by_way(0, QUICK), &Self::of_way::<QUICK>());
        put(&mut table, by_way(0, NEAR), &Self::of_way::<NEAR>());
        table
    };

    const fn of_way<const M: u8>() -> [Handler<B>; HANDLERS] {
        let mut table = [plain!(generic) as Handler<B>; HANDLERS];
        put(
            &mut table,
            NOP,
            &[
                plain!(nop),
                plain!(jmp),
                plain!(jmp_reg),
                memory!(jmp_mem),
                memory!(call),
                memory!(call_reg),
                memory!(call_mem),
                memory!(ret),
                plain!(cdq),
                plain!(cwde),
            ],
        );
        put(
            &mut table,
            LEAVE,
            &[
                memory!(leave),
                plain!(load_address),
                memory!(push_r),
                memory!(push_i),
                memory!(push_m),
                memory!(pop_r),
                plain!(exchange),
                plain!(swap_bytes),
            ],
        );
        put(&mut table, IMUL, &[memory!(multiply, true), memory!(multiply, false)]);
        put(&mut table, INVLPG, &[plain!(invalidate_page)]);
        put(&mut table, EXTEND, &Self::extends::<false, M>());
        put(&mut table, EXTEND + 4, &Self::extends::<true, M>());
        put(&mut table, MOV, &Self::moves::<M>());
        put(&mut table, JCC, &conditions!(plain, jump_if));
        put(&mut table, SET, &conditions!(memory, set_if, true));
        put(&mut table, SET + 16, &conditions!(memory, set_if, false));
        put(&mut table, CMOV, &conditions!(memory, move_if, true));
        put(&mut table, CMOV + 16, &conditions!(memory, move_if, false));
        put(&mut table, ALU, &Self::alus::<0, M>());
        put(&mut table, ALU + 15, &Self::alus::<1, M>());
        put(&mut table, ALU + 30, &Self::alus::<2, M>());
        put(&mut table, ALU + 45, &Self::alus::<3, M>());
        put(&mut table, ALU + 60, &Self::alus::<4, M>());
        put(&mut table, ALU + 75, &Self::alus::<5, M>());
        put(&mut table, ALU + 90, &Self::alus::<6, M>());
        put(&mut table, ALU + 105, &Self::alus::<7, M>());
        put(&mut table, ALU + 120, &Self::alus::<8, M>());
        put(&mut table, UNARY, &Self::unaries::<0, M>());
        put(&mut table, UNARY + 6, &Self::unaries::<1, M>());
        put(&mut table, UNARY + 12, &Self::unaries::<2, M>());
        put(&mut table, UNARY + 18, &Self::unaries::<3, M>());
        put(&mut table, SHIFT, &Self::shifts::<0, M>());
        put(&mut table, SHIFT + 6, &Self::shifts::<1, M>());
        put(&mut table, SHIFT + 12, &Self::shifts::<2, M>());
        put(&mut table, SHIFT + 18, &Self::shifts::<3, M>());
        put(&mut table, SHIFT + 24, &Self::shifts::<4, M>());
        put(&mut table, MORE, &Self::more::<M>());
        put(&mut table, BRANCHING, &conditions!(both, branching, 7, false));
        put(&mut table, BRANCHING + 16, &conditions!(both, branching, 7, true));
        put(&mut table, BRANCHING + 32, &conditions!(both, branching, 8, false));
        put(&mut table, BRANCHING + 48, &conditions!(both, branching, 8, true));
        table
    }

    const fn more<const M: u8>() -> [Handler<B>; 18] {
        [
            memory!(push_all),
            memory!(pop_all),
            memory!(push_segment),
            plain!(pop_segment),
            plain!(load_segment),
            plain!(fault_address),
            plain!(set_direction, 0),
            plain!(set_direction, DF),
            plain!(shift_double, true),
            plain!(shift_double, false),
            memory!(multiply_wide, false, true),
            memory!(multiply_wide, false, false),
            memory!(multiply_wide, true, true),
            memory!(multiply_wide, true, false),
            memory!(multiply_by, true),
            memory!(multiply_by, false),
            memory!(call_on),
            memory!(compare_exchange),
        ]
    }

    const fn moves<const M: u8>() -> [Handler<B>; 15] {
        [
            plain!(mov_rr, 1),
            plain!(mov_rr, 2),
            plain!(mov_rr, 4),
            plain!(mov_ri, 1),
            plain!(mov_ri, 2),
            plain!(mov_ri, 4),
            memory!(mov_rm, 1),
            memory!(mov_rm, 2),
            memory!(mov_rm, 4),
            memory!(mov_mr, 1),
            memory!(mov_mr, 2),
            memory!(mov_mr, 4),
            memory!(mov_mi, 1),
            memory!(mov_mi, 2),
            memory!(mov_mi, 4),
        ]
    }

    const fn alus<const K: u8, const M: u8>() -> [Handler<B>; 15] {
        [
            plain!(alu_rr, K, 1),
            plain!(alu_rr, K, 2),
            plain!(alu_rr, K, 4),
            plain!(alu_ri, K, 1),
            plain!(alu_ri, K, 2),
            plain!(alu_ri, K, 4),
            memory!(alu_rm, K, 1),
            memory!(alu_rm, K, 2),
            memory!(alu_rm, K, 4),
            memory!(alu_mr, K, 1),
            memory!(alu_mr, K, 2),
            memory!(alu_mr, K, 4),
            memory!(alu_mi, K, 1),
            memory!(alu_mi, K, 2),
            memory!(alu_mi, K, 4),
        ]
    }

    const fn unaries<const K: u8, const M: u8>() -> [Handler<B>; 6] {
        [
            plain!(unary_r, K, 1),
            plain!(unary_r, K, 2),
            plain!(unary_r, K, 4),
            memory!(unary_m, K, 1),
            memory!(unary_m, K, 2),
            memory!(unary_m, K, 4),
        ]
    }

    const fn shifts<const K: u8, const M: u8>() -> [Handler<B>; 6] {
        [
            plain!(shift_ri, K, 1),
            plain!(shift_ri, K, 2),
            plain!(shift_ri, K, 4),
            plain!(shift_rr, K, 1),
            plain!(shift_rr, K, 2),
            plain!(shift_rr, K, 4),
        ]
    }

    const fn extends<const S: bool, const M: u8>() -> [Handler<B>; 4] {
        [plain!(extend_r, S, 1), plain!(extend_r, S, 2), memory!(extend_m, S, 1), memory!(extend_m, S, 2)]
    }
}

/// A handler for each of the sixteen conditions.
macro_rules! conditions {
    ($way:ident, $handler:ident $(, $rest:expr)*) => {
        [
            $way!($handler, 0 $(, $rest)*), $way!($handler, 1 $(, $rest)*), $way!($handler, 2 $(, $rest)*),
            $way!($handler, 3 $(, $rest)*), $way!($handler, 4 $(, $rest)*), $way!($handler, 5 $(, $rest)*),
            $way!($handler, 6 $(, $rest)*), $way!($handler, 7 $(, $rest)*), $way!($handler, 8 $(, $rest)*),
            $way!($handler, 9 $(, $rest)*), $way!($handler, 10 $(, $rest)*), $way!($handler, 11 $(, $rest)*),
            $way!($handler, 12 $(, $rest)*), $way!($handler, 13 $(, $rest)*), $way!($handler, 14 $(, $rest)*),
            $way!($handler, 15 $(, $rest)*),
        ]
    };
}
use conditions;

const fn put<B: CodeBus, const N: usize>(table: &mut [Handler<B>], at: u16, handlers: &[Handler<B>; N]) {
    let mut n = 0;
    while n < N {
        table[at as usize + n] = handlers[n];
        n += 1;
    }
}
