//! Bit instructions: BT and its kin, BSF, BSR, BSWAP.

use iced_x86::{Instruction, OpKind};

use super::flags::{ARITHMETIC, Flags};
use super::operand::{address_mask, in_memory, is_locked, width_of};
use super::{Bus, Core, Exec, Flow, Width};
use crate::cpu::eflags::{CF, PF, ZF};

/// What BT's kin do to the bit that they test.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum BitChange {
    Keep,
    Set,
    Reset,
    Complement,
}

impl BitChange {
    fn apply(self, value: u32, bit: u32) -> u32 {
        match self {
            BitChange::Keep => value,
            BitChange::Set => value | bit,
            BitChange::Reset => value & !bit,
            BitChange::Complement => value ^ bit,
        }
    }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// BT, BTS, BTR, BTC.
    pub(super) fn bit_test(&mut self, i: &Instruction, change: BitChange) -> Exec<Flow> {
        let width = width_of(i, 0);
        let index = self.read(i, 1, width)?;
        let bit = 1 << (index & (width.bits() - 1));
        let old = if in_memory(i, 0) {
            self.bit_in_memory(i, width, index, bit, change)?
        } else {
            self.modify(i, 0, width, |old| change.apply(old, bit))?
        };
        self.cpu.eflags = self.cpu.eflags & !CF | if old & bit != 0 { CF } else { 0 };
        Ok(Flow::Next)
    }

    /// A register's index is signed and reaches beyond the operand: memory is a string of bits. An immediate one
    /// does not.
    fn bit_in_memory(
        &mut self,
        i: &Instruction,
        width: Width,
        index: u32,
        bit: u32,
        change: BitChange,
    ) -> Exec<u32> {
        let (seg, mut offset) = self.effective(i);
        if i.op1_kind() == OpKind::Register {
            let units = width.extend(index) as i32 >> width.bits().trailing_zeros();
            offset = offset.wrapping_add((units as u32).wrapping_mul(width.bytes())) & address_mask(i);
        }
        if change == BitChange::Keep {
            return self.load(seg, offset, width);
        }
        let change = &mut |old| u64::from(change.apply(old as u32, bit));
        let old = self.update(seg, offset, width, is_locked(i), change)?;
        Ok(old as u32)
    }

    /// BSF and BSR. Of zero they set ZF and leave the destination as it was (AMD documents it, Intel does it).
    pub(super) fn bit_scan(&mut self, i: &Instruction, find: fn(u32) -> u32) -> Exec<Flow> {
        let source = self.read(i, 1, width_of(i, 1))?;
        // ZF alone is defined; PF is the index's.
        let flags = if source == 0 {
            ZF | PF
        } else {
            let index = find(source);
            self.set_register(i.op0_register(), index);
            Flags::of_result(index, 0, Width::B4).within(0) & !ZF
        };
        self.cpu.eflags = self.cpu.eflags & !ARITHMETIC | flags;
        Ok(Flow::Next)
    }

    /// BSWAP. Of a 16-bit register it is undefined, and clears it on every CPU seen.
    pub(super) fn byte_swap(&mut self, i: &Instruction) -> Exec<Flow> {
        let register = i.op0_register();
        let value = if register.is_gpr16() { 0 } else { self.register(register).swap_bytes() };
        self.set_register(register, value);
        Ok(Flow::Next)
    }
}
