//! Operands: registers, immediates and effective addresses, by position in the instruction.
//!
//! Holds: the decoder has made sure that the operand is of a kind its handler expects; an unexpected one reads as
//! zero and a write to it is dropped, which debug builds assert never to happen.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use umbra_mmu::Gva;

use super::{Bus, Core, Exec, Width};
use crate::cpu::{CpuState, Seg};

/// EAX in `CpuState::gpr`.
pub(super) const EAX: usize = 0;
/// ECX.
pub(super) const ECX: usize = 1;
/// EDX.
pub(super) const EDX: usize = 2;
/// EBX.
pub(super) const EBX: usize = 3;
/// ESP.
pub(super) const ESP: usize = 4;
/// EBP.
pub(super) const EBP: usize = 5;
/// ESI.
pub(super) const ESI: usize = 6;
/// EDI.
pub(super) const EDI: usize = 7;

/// The segment register of that name; DS for any other, which the decoder never gives.
pub(super) fn segment_of(register: Register) -> Seg {
    match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}

/// Where a general register lives: its index, how far up its bits start, and its width.
fn slot(register: Register) -> Option<(usize, u32, Width)> {
    let from = |first: Register| register as usize - first as usize;
    match register as usize {
        n if n >= Register::EAX as usize && n <= Register::EDI as usize => {
            Some((from(Register::EAX), 0, Width::B4))
        }
        n if n >= Register::AX as usize && n <= Register::DI as usize => {
            Some((from(Register::AX), 0, Width::B2))
        }
        n if n >= Register::AL as usize && n <= Register::BL as usize => {
            Some((from(Register::AL), 0, Width::B1))
        }
        n if n >= Register::AH as usize && n <= Register::BH as usize => {
            Some((from(Register::AH), 8, Width::B1))
        }
        _ => None,
    }
}

/// A general register's value, zero-extended.
pub(super) fn get_register(cpu: &CpuState, register: Register) -> u32 {
    match slot(register) {
        Some((index, shift, width)) => cpu.gpr[index] >> shift & width.mask(),
        None => {
            debug_assert!(false, "{register:?} is no general register");
            0
        }
    }
}

/// Sets a general register, leaving the rest of the full one alone.
pub(super) fn set_register(cpu: &mut CpuState, register: Register, value: u32) {
    match slot(register) {
        Some((index, shift, width)) => {
            let mask = width.mask() << shift;
            cpu.gpr[index] = cpu.gpr[index] & !mask | value << shift & mask;
        }
        None => debug_assert!(false, "{register:?} is no general register"),
    }
}

/// `new` in the low bits of `old` that `mask` covers: how SP, SI, DI and CX are written by their address size.
pub(super) fn merge(old: u32, new: u32, mask: u32) -> u32 {
    old & !mask | new & mask
}

/// The width of operand `op`.
pub(super) fn width_of(instruction: &Instruction, op: u32) -> Width {
    match instruction.op_kind(op) {
        OpKind::Register => match slot(instruction.op_register(op)) {
            Some((_, _, width)) => width,
            None => Width::B4,
        },
        OpKind::Immediate8 | OpKind::Immediate8_2nd => Width::B1,
        OpKind::Immediate16 | OpKind::Immediate8to16 | OpKind::NearBranch16 => Width::B2,
        OpKind::Immediate32 | OpKind::Immediate8to32 | OpKind::NearBranch32 => Width::B4,
        _ => match instruction.memory_size().size() {
            1 => Width::B1,
            2 => Width::B2,
            8 => Width::B8,
            _ => Width::B4,
        },
    }
}

/// True where operand `op` is in memory.
pub(super) fn in_memory(instruction: &Instruction, op: u32) -> bool {
    instruction.op_kind(op) == OpKind::Memory
}

/// True where the access to memory that it changes is locked: by its prefix, and XCHG's always.
pub(super) fn is_locked(instruction: &Instruction) -> bool {
    instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg
}

/// The mask of the memory operand's address size.
pub(super) fn address_mask(instruction: &Instruction) -> u32 {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let small = match (base, index) {
        (Register::None, Register::None) => instruction.memory_displ_size() == 2,
        (Register::None, index) => index.is_gpr16(),
        (base, _) => base.is_gpr16(),
    };
    if small { 0xffff } else { u32::MAX }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    pub(super) fn register(&self, register: Register) -> u32 {
        get_register(self.cpu, register)
    }

    pub(super) fn set_register(&mut self, register: Register, value: u32) {
        set_register(self.cpu, register, value);
    }

    /// AL, AX or EAX.
    pub(super) fn accumulator(&self, width: Width) -> u32 {
        self.cpu.gpr[EAX] & width.mask()
    }

    pub(super) fn set_accumulator(&mut self, width: Width, value: u32) {
        self.cpu.gpr[EAX] = merge(self.cpu.gpr[EAX], value, width.mask());
    }

    /// The memory operand's segment and offset.
    pub(super) fn effective(&self, instruction: &Instruction) -> (Seg, u32) {
        let part = |register| if register == Register::None { 0 } else { self.register(register) };
        let index = part(instruction.memory_index()).wrapping_mul(instruction.memory_index_scale());
        let offset = instruction
            .memory_displacement32()
            .wrapping_add(part(instruction.memory_base()))
            .wrapping_add(index);
        (segment_of(instruction.memory_segment()), offset & address_mask(instruction))
    }

    /// The memory operand's linear address, unchecked (INVLPG).
    pub(super) fn effective_linear(&self, instruction: &Instruction) -> Gva {
        let (seg, offset) = self.effective(instruction);
        Gva(self.cpu.segment(seg).base.wrapping_add(offset))
    }

    /// Reads operand `op`, zero-extended (immediates: extended as the encoding says, then cut to `width`).
    pub(super) fn read(&mut self, instruction: &Instruction, op: u32, width: Width) -> Exec<u32> {
        match instruction.op_kind(op) {
            OpKind::Register => Ok(self.register(instruction.op_register(op))),
            OpKind::Memory => {
                let (seg, offset) = self.effective(instruction);
                self.load(seg, offset, width)
            }
            _ => Ok(instruction.try_immediate(op).unwrap_or(0) as u32 & width.mask()),
        }
    }

    /// Writes operand `op`, a register or memory.
    pub(super) fn write(&mut self, instruction: &Instruction, op: u32, width: Width, value: u32) -> Exec {
        if in_memory(instruction, op) {
            let (seg, offset) = self.effective(instruction);
            self.store(seg, offset, width, value)
        } else {
            self.set_register(instruction.op_register(op), value);
            Ok(())
        }
    }

    /// Reads operand `op`, changes it and writes it back; returns what it was. Where it is in memory this is one
    /// access that needs write permission from the start, LOCK or not.
    pub(super) fn modify(
        &mut self,
        instruction: &Instruction,
        op: u32,
        width: Width,
        mut change: impl FnMut(u32) -> u32,
    ) -> Exec<u32> {
        if in_memory(instruction, op) {
            let (seg, offset) = self.effective(instruction);
            let locked = is_locked(instruction);
            let old = self.update(seg, offset, width, locked, &mut |old| u64::from(change(old as u32)))?;
            return Ok(old as u32);
        }
        let register = instruction.op_register(op);
        let old = self.register(register);
        self.set_register(register, change(old));
        Ok(old)
    }
}
