//! Ways inward: call gates, and the stack switch that they share with interrupts.
//!
//! See: Intel SDM vol. 3A, 5.8.3 to 5.8.5 (call gates and stack switching), 7.2.1 (32-bit TSS).

use umbra_mmu::Gva;

use super::descriptor::{Descriptor, Kind, error_code, is_null, rpl};
use super::far::Transfer;
use super::operand::ESP;
use super::stack::Stack;
use super::{Bus, Core, Exception, Exec, Flow, Leave, Width, ensure};
use crate::cpu::{Seg, Segment};

/// The most parameters a call gate can copy.
const PARAMETERS_MAX: usize = 31;

impl<B: Bus + ?Sized> Core<'_, B> {
    /// The stack that the TSS gives for privilege `cpl`, checked. `ext` is the EXT bit of what goes wrong.
    pub(super) fn inner_stack(&mut self, cpl: u8, ext: u16) -> Exec<Stack> {
        let (pointer, selector) = self.inner_stack_pointer(cpl, ext)?;
        let segment = self.stack_segment_for(selector, cpl, Exception::ts, ext)?;
        let fault = Exception::ss(error_code(selector) | ext);
        Ok(Stack { segment, pointer, user: false, aligned: false, fault })
    }

    /// SSn:ESPn out of the TSS, 32 or 16 bits.
    fn inner_stack_pointer(&mut self, cpl: u8, ext: u16) -> Exec<(u32, u16)> {
        let tr = self.cpu.tr;
        let width = if tr.kind() & 8 != 0 { Width::B4 } else { Width::B2 };
        let offset = width.bytes() * (1 + 2 * u32::from(cpl));
        let last = offset + width.bytes() + 1;
        ensure(!tr.unusable && last <= tr.limit, Exception::ts(error_code(tr.selector) | ext))?;
        let at = Gva(tr.base.wrapping_add(offset));
        let pointer = self.load_implicit(at, width)?;
        let selector = self.load_implicit(at.wrapping_add(width.bytes()), Width::B2)?;
        Ok((pointer, selector as u16))
    }

    /// The code segment that a gate leads to, with its descriptor: code, not of a lower privilege than the caller,
    /// present. `ext` as above.
    pub(super) fn gate_target(&mut self, selector: u16, ext: u16) -> Exec<(Descriptor, Segment)> {
        ensure(!is_null(selector), Exception::gp(ext))?;
        let bad = Exception::gp(error_code(selector) | ext);
        let descriptor = self.descriptor(selector, bad)?;
        let allowed = descriptor.kind() == Kind::Code && descriptor.dpl() <= self.cpu.cpl;
        ensure(allowed, bad)?;
        ensure(descriptor.present(), Exception::np(error_code(selector) | ext))?;
        Ok((descriptor, descriptor.segment(selector)))
    }

    /// Far CALL or JMP through a call gate.
    pub(super) fn through_call_gate(
        &mut self,
        gate: &Descriptor,
        selector: u16,
        width: Width,
        return_to: Option<u32>,
    ) -> Exec<Flow> {
        let outer = self.cpu.cpl.max(rpl(selector));
        ensure(gate.dpl() >= outer, Exception::gp(error_code(selector)))?;
        ensure(gate.present(), Exception::np(error_code(selector)))?;
        let (descriptor, code) = self.gate_target(gate.gate_selector(), 0)?;
        let eip = gate.gate_offset(width);
        let inward = !code.conforming() && code.dpl() < self.cpu.cpl;
        match return_to {
            Some(next) if inward => self.call_inward(gate, &descriptor, code, width, next),
            // JMP changes no privilege.
            None if inward => Err(Leave::Fault(Exception::gp(error_code(gate.gate_selector())))),
            _ => self.enter_code(&descriptor, code, eip, return_to.map(|next| (width, next))),
        }
    }

    /// A call to an inner ring: stack switch, parameters copied, old stack and return address pushed.
    fn call_inward(
        &mut self,
        gate: &Descriptor,
        descriptor: &Descriptor,
        mut code: Segment,
        width: Width,
        next: u32,
    ) -> Exec<Flow> {
        let cpl = code.dpl();
        let stack = self.inner_stack(cpl, 0)?;
        let eip = gate.gate_offset(width);
        ensure(eip <= code.limit, Exception::gp(0))?;
        let count = gate.gate_parameters() as usize;
        let mut frame = [0; PARAMETERS_MAX + 4];
        frame[0] = self.cpu.segment(Seg::Ss).selector.into();
        frame[1] = self.cpu.gpr[ESP];
        let old = self.stack();
        for n in 0..count {
            // The parameter furthest up the old stack goes furthest up the new one.
            frame[1 + count - n] = self.peek(&old, n as u32 * width.bytes(), width)?;
        }
        frame[2 + count] = self.cpu.segment(Seg::Cs).selector.into();
        frame[3 + count] = next;
        self.mark_accessed(descriptor)?;
        let pointer = self.push_frame(&stack, &frame[..4 + count], width)?;
        code.selector = error_code(code.selector) | u16::from(cpl);
        let mut after = Transfer::of(self.cpu);
        after.seg[Seg::Cs as usize] = code;
        after.seg[Seg::Ss as usize] = stack.segment;
        after.esp = pointer;
        after.eip = eip;
        after.cpl = cpl;
        self.commit(&after)?;
        Ok(Flow::Jumped)
    }
}
