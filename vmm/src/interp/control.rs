//! Transfers within a segment: JMP, Jcc, LOOP, CALL, RET.
//!
//! Holds: the target is checked against CS's limit before anything is pushed or counted. (CALL finds a fault of its
//! push first.)

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{ECX, merge, width_of};
use super::{Bus, Core, Exception, Exec, Flow, Width, ensure};
use crate::cpu::{Seg, eflags};

impl<B: Bus + ?Sized> Core<'_, B> {
    /// Checks a target in CS.
    fn target(&self, eip: u32) -> Exec<u32> {
        ensure(eip <= self.cpu.segment(Seg::Cs).limit, Exception::gp(0))?;
        Ok(eip)
    }

    fn jump_near(&mut self, i: &Instruction, next: u32) -> Exec<Flow> {
        self.cpu.eip = self.target(near_target(i, next))?;
        Ok(Flow::Jumped)
    }

    /// JMP in all its forms.
    pub(super) fn jump(&mut self, i: &Instruction, next: u32) -> Exec<Flow> {
        match i.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 => self.jump_near(i, next),
            OpKind::FarBranch16 | OpKind::FarBranch32 => self.far_jump(i),
            _ if matches!(i.code(), Code::Jmp_m1616 | Code::Jmp_m1632) => self.far_jump(i),
            _ => {
                let eip = self.read(i, 0, width_of(i, 0))?;
                self.cpu.eip = self.target(eip)?;
                Ok(Flow::Jumped)
            }
        }
    }

    /// Jcc.
    pub(super) fn jump_conditional(&mut self, i: &Instruction, next: u32) -> Exec<Flow> {
        if self.condition(i) { self.jump_near(i, next) } else { Ok(Flow::Next) }
    }

    /// JCXZ and JECXZ.
    pub(super) fn jump_counter_zero(&mut self, i: &Instruction, next: u32, mask: u32) -> Exec<Flow> {
        if self.cpu.gpr[ECX] & mask == 0 { self.jump_near(i, next) } else { Ok(Flow::Next) }
    }

    /// LOOP, LOOPE and LOOPNE.
    pub(super) fn count_and_jump(&mut self, i: &Instruction, next: u32) -> Exec<Flow> {
        let mask = match i.code() {
            Code::Loop_rel8_16_CX
            | Code::Loop_rel8_32_CX
            | Code::Loope_rel8_16_CX
            | Code::Loope_rel8_32_CX
            | Code::Loopne_rel8_16_CX
            | Code::Loopne_rel8_32_CX => 0xffff,
            _ => u32::MAX,
        };
        let count = self.cpu.gpr[ECX].wrapping_sub(1);
        let zero = self.cpu.eflags & eflags::ZF != 0;
        let wanted = match i.mnemonic() {
            Mnemonic::Loope => zero,
            Mnemonic::Loopne => !zero,
            _ => true,
        };
        let flow = if wanted && count & mask != 0 { self.jump_near(i, next)? } else { Flow::Next };
        self.cpu.gpr[ECX] = merge(self.cpu.gpr[ECX], count, mask);
        Ok(flow)
    }

    /// CALL in all its forms.
    pub(super) fn call(&mut self, i: &Instruction, next: u32) -> Exec<Flow> {
        let (eip, width) = match i.op0_kind() {
            OpKind::NearBranch16 => (near_target(i, next), Width::B2),
            OpKind::NearBranch32 => (near_target(i, next), Width::B4),
            OpKind::FarBranch16 | OpKind::FarBranch32 => return self.far_call(i, next),
            _ if matches!(i.code(), Code::Call_m1616 | Code::Call_m1632) => return self.far_call(i, next),
            _ => {
                let width = width_of(i, 0);
                (self.read(i, 0, width)?, width)
            }
        };
        self.probe_push(width)?;
        let eip = self.target(eip)?;
        self.push(width, next)?;
        self.cpu.eip = eip;
        Ok(Flow::Jumped)
    }

    /// RET within the segment.
    pub(super) fn ret(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = match i.code() {
            Code::Retnw | Code::Retnw_imm16 => Width::B2,
            _ => Width::B4,
        };
        let eip = self.top(width)?;
        self.cpu.eip = self.target(eip)?;
        self.release(width.bytes());
        self.release(released(i));
        Ok(Flow::Jumped)
    }
}

/// The target of a relative branch: by displacement, so that a decoded instruction may be run wherever its bytes are
/// mapped.
fn near_target(i: &Instruction, next: u32) -> u32 {
    if i.op0_kind() == OpKind::NearBranch16 {
        let displacement = u32::from(i.near_branch16()).wrapping_sub(i.next_ip32());
        return next.wrapping_add(displacement) & 0xffff;
    }
    next.wrapping_add(i.near_branch32().wrapping_sub(i.next_ip32()))
}

/// The bytes of parameters that a RET or RETF drops.
pub(super) fn released(i: &Instruction) -> u32 {
    if i.op_count() == 1 { u32::from(i.immediate16()) } else { 0 }
}
