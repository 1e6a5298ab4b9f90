//! Arithmetic instructions: the operands around `alu`'s values and flags.

use iced_x86::Instruction;

use super::alu::{self, Binary, Outcome};
use super::flags::Flags;
use super::operand::{EAX, EBX, ECX, EDX, in_memory, is_locked, width_of};
use super::{Bus, Core, Exception, Exec, Flow, Width, decimal, ensure};
use crate::cpu::eflags::{AF, PF, SF, ZF};

impl<B: Bus + ?Sized> Core<'_, B> {
    pub(super) fn arithmetic_flags(&self) -> Flags {
        Flags::of(self.cpu.eflags)
    }

    pub(super) fn set_arithmetic_flags(&mut self, flags: Flags) {
        self.cpu.eflags = flags.within(self.cpu.eflags);
    }

    /// ADD and its kin: operand 0 is changed by operand 1.
    pub(super) fn binary(&mut self, i: &Instruction, operation: Binary) -> Exec<Flow> {
        let width = width_of(i, 0);
        let source = self.read(i, 1, width)?;
        self.apply(i, width, source, operation)
    }

    /// INC, DEC, NEG and NOT.
    pub(super) fn unary(&mut self, i: &Instruction, operation: Binary) -> Exec<Flow> {
        self.apply(i, width_of(i, 0), 0, operation)
    }

    /// Shifts and rotates: operand 1 is CL or an immediate.
    pub(super) fn shift(&mut self, i: &Instruction, operation: Binary) -> Exec<Flow> {
        let count = self.read(i, 1, Width::B1)?;
        self.apply(i, width_of(i, 0), count, operation)
    }

    fn apply(&mut self, i: &Instruction, width: Width, source: u32, operation: Binary) -> Exec<Flow> {
        let before = self.arithmetic_flags();
        let mut after = before;
        self.modify(i, 0, width, |old| {
            let outcome = operation(old, source, before, width);
            after = outcome.flags;
            outcome.value
        })?;
        self.set_arithmetic_flags(after);
        Ok(Flow::Next)
    }

    /// CMP and TEST: flags alone.
    pub(super) fn compare(&mut self, i: &Instruction, operation: Binary) -> Exec<Flow> {
        let width = width_of(i, 0);
        let source = self.read(i, 1, width)?;
        let target = self.read(i, 0, width)?;
        self.set_arithmetic_flags(operation(target, source, self.arithmetic_flags(), width).flags);
        Ok(Flow::Next)
    }

    /// SHLD and SHRD.
    pub(super) fn double_shift(
        &mut self,
        i: &Instruction,
        operation: fn(u32, u32, u32, Flags, Width) -> Outcome,
    ) -> Exec<Flow> {
        let width = width_of(i, 0);
        let source = self.read(i, 1, width)?;
        let count = self.read(i, 2, Width::B1)?;
        let before = self.arithmetic_flags();
        let mut after = before;
        self.modify(i, 0, width, |old| {
            let outcome = operation(old, source, count, before, width);
            after = outcome.flags;
            outcome.value
        })?;
        self.set_arithmetic_flags(after);
        Ok(Flow::Next)
    }

    /// XADD: the register gets the old value, the destination the sum (also where they are one register).
    pub(super) fn exchange_add(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = width_of(i, 0);
        let source = self.read(i, 1, width)?;
        let before = self.arithmetic_flags();
        if in_memory(i, 0) {
            let old = self.modify(i, 0, width, |old| alu::add(old, source, before, width).value)?;
            self.set_register(i.op1_register(), old);
            self.set_arithmetic_flags(alu::add(old, source, before, width).flags);
        } else {
            let old = self.register(i.op0_register());
            let sum = alu::add(old, source, before, width);
            self.set_register(i.op1_register(), old);
            self.set_register(i.op0_register(), sum.value);
            self.set_arithmetic_flags(sum.flags);
        }
        Ok(Flow::Next)
    }

    /// CMPXCHG. Memory is written in either case, as silicon does: write permission is always needed.
    pub(super) fn compare_exchange(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = width_of(i, 0);
        let source = self.read(i, 1, width)?;
        let expected = self.accumulator(width);
        let old = self.modify(i, 0, width, |old| if old == expected { source } else { old })?;
        self.set_arithmetic_flags(alu::sub(expected, old, self.arithmetic_flags(), width).flags);
        if old != expected {
            self.set_accumulator(width, old);
        }
        Ok(Flow::Next)
    }

    /// CMPXCHG8B.
    pub(super) fn compare_exchange_8(&mut self, i: &Instruction) -> Exec<Flow> {
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let gpr = self.cpu.gpr;
        let (expected, wanted) = (pair(gpr[EDX], gpr[EAX]), pair(gpr[ECX], gpr[EBX]));
        let (seg, offset) = self.effective(i);
        let swap = &mut |old| if old == expected { wanted } else { old };
        let old = self.update(seg, offset, Width::B8, is_locked(i), swap)?;
        if old == expected {
            self.cpu.eflags |= ZF;
        } else {
            self.cpu.eflags &= !ZF;
            self.cpu.gpr[EAX] = old as u32;
            self.cpu.gpr[EDX] = (old >> 32) as u32;
        }
        Ok(Flow::Next)
    }

    /// XCHG: with memory, locked whatever the prefix.
    pub(super) fn exchange(&mut self, i: &Instruction) -> Exec<Flow> {
        // The memory operand, if any, may stand on either side.
        let (place, register) = if in_memory(i, 1) { (1, 0) } else { (0, 1) };
        let width = width_of(i, place);
        let given = self.register(i.op_register(register));
        let old = self.modify(i, place, width, |_| given)?;
        self.set_register(i.op_register(register), old);
        Ok(Flow::Next)
    }

    /// MUL and one-operand IMUL: the double-width product goes to AX, DX:AX or EDX:EAX.
    pub(super) fn multiply(&mut self, i: &Instruction, signed: bool) -> Exec<Flow> {
        let width = width_of(i, 0);
        let source = self.read(i, 0, width)?;
        let target = self.accumulator(width);
        let (product, fits) = product(target, source, width, signed);
        self.set_wide(width, product);
        self.set_product_flags(fits);
        Ok(Flow::Next)
    }

    /// IMUL with two or three operands: the product is cut to the width.
    pub(super) fn multiply_into(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = width_of(i, 0);
        let (left, right) = if i.op_count() == 3 { (1, 2) } else { (0, 1) };
        let left = self.read(i, left, width)?;
        let right = self.read(i, right, width)?;
        let (product, fits) = product(left, right, width, true);
        let low = product as u32 & width.mask();
        self.set_register(i.op0_register(), low);
        self.set_product_flags(fits);
        Ok(Flow::Next)
    }

    /// CF and OF say that the upper half counts; the others, undefined, stay.
    fn set_product_flags(&mut self, fits: bool) {
        self.set_arithmetic_flags(product_flags(self.arithmetic_flags(), fits));
    }

    /// AX, DX:AX or EDX:EAX.
    fn wide(&self, width: Width) -> u64 {
        let (low, high) = (self.cpu.gpr[EAX], self.cpu.gpr[EDX]);
        match width {
            Width::B1 => u64::from(low & 0xffff),
            Width::B2 => u64::from(high & 0xffff) << 16 | u64::from(low & 0xffff),
            Width::B4 | Width::B8 => u64::from(high) << 32 | u64::from(low),
        }
    }

    fn set_wide(&mut self, width: Width, value: u64) {
        if width == Width::B1 {
            return self.set_accumulator(Width::B2, value as u32);
        }
        self.set_accumulator(width, value as u32);
        let high = (value >> width.bits()) as u32;
        self.cpu.gpr[EDX] = super::operand::merge(self.cpu.gpr[EDX], high, width.mask());
    }

    /// Quotient to the low half, remainder to the high one. The flags are undefined: CF and OF stay, AF is set.
    fn set_division(&mut self, width: Width, quotient: u32, remainder: u32) {
        let mask = width.mask();
        let value = u64::from(remainder & mask) << width.bits() | u64::from(quotient & mask);
        self.set_wide(width, value);
        self.cpu.eflags = self.cpu.eflags & !(SF | ZF | PF) | AF;
    }

    /// DIV.
    pub(super) fn divide(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = width_of(i, 0);
        let divisor = u64::from(self.read(i, 0, width)?);
        ensure(divisor != 0, Exception::DE)?;
        let dividend = self.wide(width);
        let quotient = dividend / divisor;
        ensure(quotient <= u64::from(width.mask()), Exception::DE)?;
        self.set_division(width, quotient as u32, (dividend % divisor) as u32);
        Ok(Flow::Next)
    }

    /// IDIV.
    pub(super) fn divide_signed(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = width_of(i, 0);
        let source = self.read(i, 0, width)?;
        let divisor = i128::from(width.extend(source) as i32);
        ensure(divisor != 0, Exception::DE)?;
        let unused = 64 - 2 * width.bits();
        let dividend = i128::from((self.wide(width) << unused) as i64 >> unused);
        let quotient = dividend / divisor;
        let limit = i128::from(width.sign());
        ensure((-limit..limit).contains(&quotient), Exception::DE)?;
        self.set_division(width, quotient as u32, (dividend % divisor) as u32);
        Ok(Flow::Next)
    }

    /// DAA, DAS, AAA and AAS.
    pub(super) fn adjust(&mut self, operation: fn(u32, Flags) -> Outcome) -> Exec<Flow> {
        let outcome = operation(self.accumulator(Width::B2), self.arithmetic_flags());
        self.finish_adjust(outcome)
    }

    /// AAM.
    pub(super) fn adjust_multiply(&mut self, i: &Instruction) -> Exec<Flow> {
        let outcome =
            decimal::aam(self.accumulator(Width::B2), u32::from(i.immediate8()), self.arithmetic_flags())?;
        self.finish_adjust(outcome)
    }

    /// AAD.
    pub(super) fn adjust_divide(&mut self, i: &Instruction) -> Exec<Flow> {
        let outcome =
            decimal::aad(self.accumulator(Width::B2), u32::from(i.immediate8()), self.arithmetic_flags());
        self.finish_adjust(outcome)
    }

    fn finish_adjust(&mut self, outcome: Outcome) -> Exec<Flow> {
        self.set_accumulator(Width::B2, outcome.value);
        self.set_arithmetic_flags(outcome.flags);
        Ok(Flow::Next)
    }
}

/// The flags after a product whose upper half counts unless it `fits`.
pub(super) fn product_flags(flags: Flags, fits: bool) -> Flags {
    flags.with_carry_and_overflow(!fits, !fits)
}

/// The double-width product, and whether its upper half is only the lower one's extension.
pub(super) fn product(a: u32, b: u32, width: Width, signed: bool) -> (u64, bool) {
    if !signed {
        let product = u64::from(a) * u64::from(b);
        return (product, product >> width.bits() == 0);
    }
    let wide = |value| i64::from(width.extend(value) as i32);
    let product = wide(a) * wide(b);
    let low = product as u32 & width.mask();
    (product as u64, product == wide(low))
}
