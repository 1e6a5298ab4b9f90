//! From a decoded instruction to an op: which handler, and its operands taken apart.
//!
//! Holds: what is not recognised here becomes a generic op, which is always right. An op ends its block if what follows
//! it need not be what comes next, or if it may change what the block relies on: privilege, segments, modes, flags that
//! are looked at between instructions.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::run::{FULL, NEAR, QUICK, QUICK_SEGMENTS};
use super::table::{self, Form, GENERIC};
use crate::cpu::Seg;
use crate::interp::operand::segment_of;

/// What comes after an instruction that has retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The one behind it.
    Next,
    /// The one where its branch leads, which is the next op of the block.
    There,
    /// Another block: a branch, or one whose translation must be looked for again.
    Block,
    /// Another block, and perhaps other segments, privilege, modes or control flags.
    Changed,
}

/// Stands for no register: a bit that no register's number has.
pub const NO_REGISTER: u8 = 1 << 3;
/// Where the scale is in [`Op::index`].
pub const SCALE_SHIFT: u8 = 4;

/// One instruction of a block.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// Index in the table of handlers.
    pub handler: u16,
    /// That of the op that comes next in its block.
    pub then: u16,
    /// Offset of what stands behind it, from the start of the block: less than nothing, where the block has gone back.
    pub end: i16,
    /// Bytes of the instruction.
    pub length: u8,
    /// Ops before it in its block.
    pub number: u8,
    /// What comes after it.
    pub after: After,
    /// Registers by number, of the instruction's width: operand 0 and operand 1.
    pub dst: u8,
    pub src: u8,
    /// The memory operand: segment, base and index registers ([`NO_REGISTER`] for none), displacement.
    pub seg: u8,
    pub base: u8,
    /// With log2 of the scale in the bits from [`SCALE_SHIFT`] on.
    pub index: u8,
    pub disp: u32,
    /// An immediate, a branch's displacement, or a generic op's instruction.
    pub imm: u32,
}

impl Op {
    pub fn is_generic(&self) -> bool {
        self.handler == GENERIC
    }

    /// The way to its memory operand, or to its stack.
    fn way(&self) -> u8 {
        if QUICK_SEGMENTS.iter().all(|seg| *seg as u8 != self.seg) {
            FULL
        } else if self.base != NO_REGISTER && self.index & NO_REGISTER != 0 {
            NEAR
        } else {
            QUICK
        }
    }

    /// Offset of the instruction from the start of the block.
    pub fn begin(&self) -> i16 {
        self.end - i16::from(self.length)
    }

    /// Offset of the op that comes next.
    pub fn next(&self) -> i16 {
        if self.after == After::There { self.end.wrapping_add(self.imm as i16) } else { self.end }
    }

    /// Has it do `next`, which comes behind it, too, where there is a handler for both.
    pub fn join(&mut self, next: &Op) {
        if let Some(handler) = table::joined(self.handler, next.handler) {
            self.handler = handler;
        }
    }

    /// Makes a branch that is always taken, to a place for which `fits` holds, one that the block goes on behind.
    pub fn follow(&mut self, fits: impl FnOnce(i32) -> bool) {
        let jump = self.handler == table::by_way(table::JMP, self.way());
        let call = self.handler == table::by_way(table::CALL, self.way());
        if (jump || call) && fits(i32::from(self.end).wrapping_add(self.imm as i32)) {
            self.handler = table::by_way(if jump { table::NOP } else { table::CALL_ON }, self.way());
            self.after = After::There;
        }
    }
}

/// The op of `i`, number `number` of its block, which ends `end` bytes behind its start. `instruction` is where `i` will be
/// kept if it is generic.
pub fn translate(i: &Instruction, number: u8, end: i16, instruction: u32) -> Op {
    let mut op = Op {
        handler: GENERIC,
        then: table::NOP,
        end,
        length: i.len() as u8,
        number,
        after: after(i),
        dst: 0,
        src: 0,
        seg: Seg::Ds as u8,
        base: NO_REGISTER,
        index: NO_REGISTER,
        disp: 0,
        imm: instruction,
    };
    let handler = if i.has_lock_prefix() { locked(i, &mut op) } else { specialised(i, &mut op) };
    match handler {
        Some(handler) => op.handler = table::by_way(handler, op.way()),
        None => op.imm = instruction,
    }
    op
}

/// Fills in the operands of an instruction that has a handler of its own, and says which.
fn specialised(i: &Instruction, op: &mut Op) -> Option<u16> {
    if let Some(handler) = branch(i, op).or_else(|| special(i, op)) {
        return Some(handler);
    }
    let form = operands(i, op)?;
    let width = width_of(i)?;
    use Mnemonic as M;
    let kind = |kind| table::alu(kind, form, width);
    match i.mnemonic() {
        M::Add => kind(0),
        M::Or => kind(1),
        M::Adc => kind(2),
        M::Sbb => kind(3),
        M::And => kind(4),
        M::Sub => kind(5),
        M::Xor => kind(6),
        M::Cmp => kind(7),
        M::Test => kind(8),
        M::Inc => table::unary(0, form, width),
        M::Dec => table::unary(1, form, width),
        M::Neg => table::unary(2, form, width),
        M::Not => table::unary(3, form, width),
        M::Shl | M::Sal => table::shift(0, form, width),
        M::Shr => table::shift(1, form, width),
        M::Sar => table::shift(2, form, width),
        M::Rol => table::shift(3, form, width),
        M::Ror => table::shift(4, form, width),
        M::Mov | M::Movnti => table::mov(form, width),
        M::Lea => table::lea(form, width),
        M::Movzx => table::extend(false, form, width, source_width(i)),
        M::Movsx => table::extend(true, form, width, source_width(i)),
        M::Mul => table::mul(false, form, width),
        M::Imul if i.op_count() == 1 => table::mul(true, form, width),
        M::Imul if i.op_count() == 2 => table::imul(form, width),
        M::Xchg => table::xchg(form, width),
        M::Push => table::push(form, width),
        M::Pop => table::pop(form, width),
        M::Bswap => table::bswap(form, width),
        _ => condition_of(i).and_then(|code| match i.mnemonic() {
            m if is_set(m) => table::set(code, form),
            m if is_cmov(m) => table::cmov(code, form, width),
            _ => None,
        }),
    }
}

/// The same of one with a LOCK prefix: what locks are taken by.
fn locked(i: &Instruction, op: &mut Op) -> Option<u16> {
    if i.code() != iced_x86::Code::Cmpxchg_rm32_r32 || operands(i, op)? != Form::MemReg {
        return None;
    }
    Some(table::LOCK_CMPXCHG)
}

/// Near branches with 32-bit targets, calls and returns; and what has no operand worth the name.
fn branch(i: &Instruction, op: &mut Op) -> Option<u16> {
    use iced_x86::Code as C;
    if i.op_count() > 0 && i.op0_kind() == OpKind::NearBranch32 {
        op.imm = i.near_branch32().wrapping_sub(i.next_ip32());
        return match i.mnemonic() {
            Mnemonic::Jmp => Some(table::JMP),
            Mnemonic::Call => Some(table::CALL),
            _ if i.is_jcc_short_or_near() => {
                // Not taken, it goes on inside the block.
                op.after = After::Next;
                Some(table::jcc(condition_of(i)?))
            }
            _ => None,
        };
    }
    match i.code() {
        C::Retnd => Some(table::RET),
        C::Cdq => Some(table::CDQ),
        C::Cwde => Some(table::CWDE),
        C::Nopw | C::Nopd | C::Nop_rm16 | C::Nop_rm32 => Some(table::NOP),
        C::Leaved => Some(table::LEAVE),
        C::Invlpg_m => {
            memory(i, op)?;
            // Most pages have no code.
            op.after = After::Next;
            Some(table::INVLPG)
        }
        C::Jmp_rm32 => Some(if operands(i, op)? == Form::Reg { table::JMP_REG } else { table::JMP_MEM }),
        C::Call_rm32 => Some(if operands(i, op)? == Form::Reg { table::CALL_REG } else { table::CALL_MEM }),
        _ => None,
    }
}

/// What has operands of its own kind: three of them, segment and control registers, all registers.
fn special(i: &Instruction, op: &mut Op) -> Option<u16> {
    use iced_x86::Code as C;
    match i.code() {
        C::Pushad => Some(table::PUSH_ALL),
        C::Popad => Some(table::POP_ALL),
        C::Cld => Some(table::CLD),
        C::Std => Some(table::STD),
        C::Pushd_ES | C::Pushd_CS | C::Pushd_SS | C::Pushd_DS | C::Pushd_FS | C::Pushd_GS => {
            op.dst = segment_of(i.op0_register()) as u8;
            op.after = After::Next;
            Some(table::PUSH_SEGMENT)
        }
        C::Popd_ES | C::Popd_DS | C::Popd_FS | C::Popd_GS => {
            op.dst = segment_of(i.op0_register()) as u8;
            op.after = After::Next;
            Some(table::POP_SEGMENT)
        }
        C::Mov_Sreg_r32m16 if is_loadable(i.op0_register()) => {
            op.dst = segment_of(i.op0_register()) as u8;
            op.src = general(i.op1_register())?;
            op.after = After::Next;
            Some(table::LOAD_SEGMENT)
        }
        C::Mov_r32_cr if i.op1_register() == Register::CR2 => {
            op.dst = general(i.op0_register())?;
            op.after = After::Next;
            Some(table::FAULT_ADDRESS)
        }
        C::Shld_rm32_r32_imm8 | C::Shrd_rm32_r32_imm8 => {
            op.dst = general(i.op0_register())?;
            op.src = general(i.op1_register())?;
            op.imm = i.immediate8().into();
            Some(if i.mnemonic() == Mnemonic::Shld { table::SHLD } else { table::SHRD })
        }
        C::Imul_r32_rm32_imm32 | C::Imul_r32_rm32_imm8 => {
            op.dst = general(i.op0_register())?;
            op.imm = i.try_immediate(2).ok()? as u32;
            let form = if i.op1_kind() == OpKind::Memory { Form::RegMem } else { Form::RegReg };
            match form {
                Form::RegMem => memory(i, op)?,
                _ => op.src = general(i.op1_register())?,
            }
            table::imul_by(form, 4)
        }
        _ => None,
    }
}

/// A segment register whose load changes nothing that a block relies on, nor holds interrupts off.
fn is_loadable(register: Register) -> bool {
    matches!(register, Register::ES | Register::DS | Register::FS | Register::GS)
}

/// Takes the operands apart; `None` for a combination that no handler takes.
fn operands(i: &Instruction, op: &mut Op) -> Option<Form> {
    let kind = |n| -> Option<char> {
        match i.op_kind(n) {
            OpKind::Register => general(i.op_register(n)).map(|_| 'r'),
            OpKind::Memory => Some('m'),
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32 => Some('i'),
            _ => None,
        }
    };
    let form = match (i.op_count(), kind(0)?, if i.op_count() > 1 { kind(1)? } else { ' ' }) {
        (1, 'r', _) => Form::Reg,
        (1, 'm', _) => Form::Mem,
        (1, 'i', _) => Form::Imm,
        (2, 'r', 'r') => Form::RegReg,
        (2, 'r', 'i') => Form::RegImm,
        (2, 'r', 'm') => Form::RegMem,
        (2, 'm', 'r') => Form::MemReg,
        (2, 'm', 'i') => Form::MemImm,
        _ => return None,
    };
    for n in 0..i.op_count() {
        match kind(n)? {
            'r' if n == 0 => op.dst = general(i.op_register(n))?,
            'r' => op.src = general(i.op_register(n))?,
            'i' => op.imm = i.try_immediate(n).ok()? as u32,
            _ => memory(i, op)?,
        }
    }
    Some(form)
}

/// The memory operand, with 32-bit addresses.
fn memory(i: &Instruction, op: &mut Op) -> Option<()> {
    let (base, index) = (i.memory_base(), i.memory_index());
    let fits = |register: Register| register == Register::None || register.is_gpr32();
    let narrow = base == Register::None && index == Register::None && i.memory_displ_size() == 2;
    if !fits(base) || !fits(index) || narrow {
        return None;
    }
    op.base = general(base).unwrap_or(NO_REGISTER);
    let scale = i.memory_index_scale().trailing_zeros() as u8;
    op.index = general(index).unwrap_or(NO_REGISTER) | scale << SCALE_SHIFT;
    op.disp = i.memory_displacement32();
    op.seg = segment_of(i.memory_segment()) as u8;
    Some(())
}

/// The number of a general register among those of its width.
fn general(register: Register) -> Option<u8> {
    let n = register as usize;
    let within = |first: Register, last: Register| {
        (n >= first as usize && n <= last as usize).then(|| (n - first as usize) as u8)
    };
    within(Register::EAX, Register::EDI)
        .or_else(|| within(Register::AX, Register::DI))
        .or_else(|| within(Register::AL, Register::BH))
}

/// Bytes of operand 0.
fn width_of(i: &Instruction) -> Option<u8> {
    operand_width(i, 0)
}

fn source_width(i: &Instruction) -> Option<u8> {
    operand_width(i, 1)
}

fn operand_width(i: &Instruction, n: u32) -> Option<u8> {
    match i.op_kind(n) {
        OpKind::Register => Some(i.op_register(n).size() as u8),
        OpKind::Memory => Some(i.memory_size().size() as u8),
        // PUSH of an immediate: as wide as the stack moves.
        _ => u8::try_from(i.stack_pointer_increment().unsigned_abs()).ok().filter(|width| *width > 0),
    }
}

fn condition_of(i: &Instruction) -> Option<u32> {
    let code = i.condition_code();
    (code != iced_x86::ConditionCode::None).then(|| crate::interp::data::condition_bits(code))
}

fn is_set(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(m, M::Seta | M::Setae | M::Setb | M::Setbe | M::Sete | M::Setg | M::Setge | M::Setl)
        || matches!(m, M::Setle | M::Setne | M::Setno | M::Setnp | M::Setns | M::Seto | M::Setp | M::Sets)
}

fn is_cmov(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(m, M::Cmova | M::Cmovae | M::Cmovb | M::Cmovbe | M::Cmove | M::Cmovg | M::Cmovge | M::Cmovl)
        || matches!(m, M::Cmovle | M::Cmovne | M::Cmovno | M::Cmovnp | M::Cmovns)
        || matches!(m, M::Cmovo | M::Cmovp | M::Cmovs)
}

/// What comes after `i`: where it is not known here, anything may have changed.
fn after(i: &Instruction) -> After {
    use Mnemonic as M;
    let near = (0..i.op_count()).all(|n| !matches!(i.op_kind(n), OpKind::FarBranch16 | OpKind::FarBranch32));
    match i.mnemonic() {
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Ret | M::Invlpg => After::Block,
        M::Jmp | M::Call if near && !is_far(i) => After::Block,
        _ if i.is_jcc_short_or_near() => After::Block,
        _ if goes_on(i) => After::Next,
        _ => After::Changed,
    }
}

/// A far transfer through memory.
fn is_far(i: &Instruction) -> bool {
    use iced_x86::Code as C;
    matches!(i.code(), C::Jmp_m1616 | C::Jmp_m1632 | C::Call_m1616 | C::Call_m1632)
}

/// True for what leaves privilege, segments, modes and control flags alone and falls through to the next instruction
/// (or faults).
fn goes_on(i: &Instruction) -> bool {
    use Mnemonic as M;
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && !is_data(i.op_register(n))) {
        return false;
    }
    match i.mnemonic() {
        M::Mov | M::Movzx | M::Movsx | M::Movnti | M::Lea | M::Push | M::Pop | M::Pushad | M::Popad => true,
        M::Pusha | M::Popa | M::Pushfd | M::Pushf | M::Enter | M::Leave | M::Lahf | M::Sahf | M::Salc => true,
        M::Cbw | M::Cwde | M::Cwd | M::Cdq | M::Xlatb | M::Bound | M::Nop | M::Pause => true,
        M::Add | M::Adc | M::Sub | M::Sbb | M::And | M::Or | M::Xor | M::Cmp | M::Test | M::Inc => true,
        M::Dec | M::Neg | M::Not | M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl => true,
        M::Rcr | M::Shld | M::Shrd | M::Mul | M::Imul | M::Div | M::Idiv | M::Xchg | M::Xadd => true,
        M::Cmpxchg | M::Cmpxchg8b | M::Daa | M::Das | M::Aaa | M::Aas | M::Aam | M::Aad | M::Clc => true,
        M::Stc | M::Cmc | M::Cld | M::Std | M::Bt | M::Bts | M::Btr | M::Btc | M::Bsf | M::Bsr => true,
        M::Bswap
        | M::Movsb
        | M::Movsw
        | M::Movsd
        | M::Cmpsd
        | M::Cmpsb
        | M::Cmpsw
        | M::Stosb
        | M::Stosw
        | M::Stosd => true,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Scasb | M::Scasw | M::Scasd | M::Rdtsc | M::Cpuid => true,
        m => is_set(m) || is_cmov(m) || is_fpu(i),
    }
}

/// x87, MMX, SSE and SSE2.
fn is_fpu(i: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    let known = [F::FPU, F::FPU287, F::FPU387, F::CMOV, F::FXSR, F::MMX, F::SSE, F::SSE2];
    i.cpuid_features().iter().all(|feature| known.contains(feature))
}

/// True for a register that holds data: not a segment, control or debug register.
fn is_data(register: Register) -> bool {
    general(register).is_some() || register.is_st() || register.is_mm() || register.is_xmm()
}
