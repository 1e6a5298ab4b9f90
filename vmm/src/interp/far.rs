//! Transfers between segments: far JMP and CALL, RETF, IRET.
//!
//! Story: the parent functions are `far_jump`, `far_call`, `far_return` and `interrupt_return`; each ends in `commit`,
//! which changes the CPU and tells the bus about a new privilege, both at once or neither.
//!
//! Limits: task switches (through a TSS, a task gate or NT) and returns to virtual-8086 mode are not known.
//!
//! See: Intel SDM vol. 2, CALL, JMP, RET, IRET; vol. 3A, 5.8.

use iced_x86::{Code, Instruction, OpKind};
use umbra_mmu::AccessKind;

use super::control::released;
use super::descriptor::{Descriptor, Kind, error_code, is_null, rpl};
use super::load::{null_segment, real_mode_segment};
use super::operand::{ESP, merge};
use super::{Bus, Core, Exception, Exec, Flow, Leave, Width, ensure};
use crate::cpu::eflags::{AC, FIXED, NT, VIF, VIP, VM};
use crate::cpu::{CpuState, Seg, Segment, cr4};

/// A far return under way: what was popped, and what it was popped as.
struct Return {
    eip: u32,
    selector: u16,
    /// The flags image of an IRET.
    flags: Option<u32>,
    width: Width,
    /// Bytes from the old pointer to the outer stack's own pointer, parameters included.
    popped: u32,
    /// Parameter bytes, to be dropped from the outer stack too.
    parameters: u32,
}

/// What a transfer changes of the CPU.
#[derive(Clone, Copy)]
pub(super) struct Transfer {
    pub(super) seg: [Segment; 6],
    pub(super) esp: u32,
    pub(super) eip: u32,
    pub(super) eflags: u32,
    pub(super) cpl: u8,
}

impl Transfer {
    /// None: all as it is.
    pub(super) fn of(cpu: &CpuState) -> Transfer {
        Transfer { seg: cpu.seg, esp: cpu.gpr[ESP], eip: cpu.eip, eflags: cpu.eflags, cpl: cpu.cpl }
    }

    fn put(&self, cpu: &mut CpuState) {
        (cpu.seg, cpu.gpr[ESP], cpu.eip) = (self.seg, self.esp, self.eip);
        (cpu.eflags, cpu.cpl) = (self.eflags, self.cpl);
    }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// Makes `after` the state; where paging looks different from there and the bus refuses, nothing has changed.
    pub(super) fn commit(&mut self, after: &Transfer) -> Exec {
        let before = Transfer::of(self.cpu);
        after.put(self.cpu);
        let ac = (after.eflags ^ before.eflags) & AC != 0 && self.cpu.cr4 & cr4::SMAP != 0;
        if after.cpl != before.cpl || ac {
            self.bus.set_paging(self.cpu, false).inspect_err(|_| before.put(self.cpu))?;
        }
        Ok(())
    }

    /// The selector, offset and operand size of a far JMP or CALL.
    fn far_target(&mut self, i: &Instruction) -> Exec<(u16, u32, Width)> {
        let width = match i.code() {
            Code::Jmp_ptr1616 | Code::Jmp_m1616 | Code::Call_ptr1616 | Code::Call_m1616 => Width::B2,
            _ => Width::B4,
        };
        match i.op0_kind() {
            OpKind::FarBranch16 => Ok((i.far_branch_selector(), i.far_branch16().into(), width)),
            OpKind::FarBranch32 => Ok((i.far_branch_selector(), i.far_branch32(), width)),
            _ => {
                let (seg, at) = self.effective(i);
                let offset = self.load(seg, at, width)?;
                let selector = self.load(seg, at.wrapping_add(width.bytes()), Width::B2)?;
                Ok((selector as u16, offset, width))
            }
        }
    }

    /// Far JMP.
    pub(super) fn far_jump(&mut self, i: &Instruction) -> Exec<Flow> {
        let (selector, eip, _) = self.far_target(i)?;
        self.transfer(selector, eip, None)
    }

    /// Far CALL.
    pub(super) fn far_call(&mut self, i: &Instruction, next: u32) -> Exec<Flow> {
        let (selector, eip, width) = self.far_target(i)?;
        self.transfer(selector, eip, Some((width, next)))
    }

    /// Goes to selector:eip, pushing the return address of `call` if any.
    fn transfer(&mut self, selector: u16, eip: u32, call: Option<(Width, u32)>) -> Exec<Flow> {
        if !self.cpu.protected() {
            return self.transfer_real(selector, eip, call);
        }
        ensure(!is_null(selector), Exception::gp(0))?;
        let bad = Exception::gp(error_code(selector));
        let descriptor = self.descriptor(selector, bad)?;
        match descriptor.kind() {
            Kind::Code => {
                let code = descriptor.segment(selector);
                self.check_direct(&code, bad)?;
                ensure(descriptor.present(), Exception::np(error_code(selector)))?;
                self.enter_code(&descriptor, code, eip, call)
            }
            Kind::CallGate(width) => {
                self.through_call_gate(&descriptor, selector, width, call.map(|(_, next)| next))
            }
            Kind::Tss | Kind::TaskGate => {
                let outer = self.cpu.cpl.max(rpl(selector));
                ensure(descriptor.dpl() >= outer, bad)?;
                ensure(descriptor.present(), Exception::np(error_code(selector)))?;
                Err(Leave::Unknown("task switch"))
            }
            _ => Err(bad.into()),
        }
    }

    /// A direct transfer stays at its privilege: conforming code of the same or an inner ring, else the very ring.
    fn check_direct(&self, code: &Segment, bad: Exception) -> Exec {
        let cpl = self.cpu.cpl;
        let allowed = match code.conforming() {
            true => code.dpl() <= cpl,
            false => rpl(code.selector) <= cpl && code.dpl() == cpl,
        };
        ensure(allowed, bad)
    }

    /// Enters checked code at the current privilege, pushing the return address of `call` if any.
    pub(super) fn enter_code(
        &mut self,
        descriptor: &Descriptor,
        mut code: Segment,
        eip: u32,
        call: Option<(Width, u32)>,
    ) -> Exec<Flow> {
        if let Some((width, _)) = call {
            self.probe_stack(self.stack().below(2 * width.bytes()), 2, width, AccessKind::Write)?;
        }
        ensure(eip <= code.limit, Exception::gp(0))?;
        self.mark_accessed(descriptor)?;
        let pointer = self.push_return(call)?;
        code.selector = error_code(code.selector) | u16::from(self.cpu.cpl);
        self.cpu.seg[Seg::Cs as usize] = code;
        self.cpu.gpr[ESP] = pointer;
        self.cpu.eip = eip;
        Ok(Flow::Jumped)
    }

    /// Pushes CS and EIP for a call; returns the pointer to commit.
    fn push_return(&mut self, call: Option<(Width, u32)>) -> Exec<u32> {
        let stack = self.stack();
        match call {
            None => Ok(stack.pointer),
            Some((width, next)) => {
                let selector = self.cpu.segment(Seg::Cs).selector;
                self.push_frame(&stack, &[selector.into(), next], width)
            }
        }
    }

    fn transfer_real(&mut self, selector: u16, eip: u32, call: Option<(Width, u32)>) -> Exec<Flow> {
        ensure(eip <= self.cpu.segment(Seg::Cs).limit, Exception::gp(0))?;
        self.cpu.gpr[ESP] = self.push_return(call)?;
        self.enter_real(selector, eip);
        Ok(Flow::Jumped)
    }

    /// Sets CS:EIP as real mode does.
    pub(super) fn enter_real(&mut self, selector: u16, eip: u32) {
        self.cpu.seg[Seg::Cs as usize] = real_mode_segment(self.cpu.segment(Seg::Cs), selector);
        self.cpu.eip = eip;
    }

    /// RETF.
    pub(super) fn far_return(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = match i.code() {
            Code::Retfw | Code::Retfw_imm16 => Width::B2,
            _ => Width::B4,
        };
        let parameters = released(i);
        let stack = self.stack();
        let [eip, selector] = self.peek_frame(&stack, 0, width)?;
        let popped = 2 * width.bytes() + parameters;
        let selector = selector as u16;
        self.return_to(Return { eip, selector, flags: None, width, popped, parameters })?;
        Ok(Flow::Jumped)
    }

    /// IRET. NMIs are open again even where it faults.
    pub(super) fn interrupt_return(&mut self, width: Width) -> Exec<Flow> {
        let result = self.interrupt_return_inner(width);
        if !matches!(result, Err(Leave::Again | Leave::Unknown(_))) {
            self.cpu.nmi_blocked = false;
        }
        result
    }

    fn interrupt_return_inner(&mut self, width: Width) -> Exec<Flow> {
        if self.cpu.protected() && self.cpu.eflags & NT != 0 {
            return Err(Leave::Unknown("IRET with NT set (return to another task)"));
        }
        let stack = self.stack();
        let [eip, selector, flags] = self.peek_frame(&stack, 0, width)?;
        let returns_to_vm = flags & VM != 0 && width == Width::B4 && self.cpu.cpl == 0;
        if self.cpu.protected() && returns_to_vm {
            return Err(Leave::Unknown("IRET to virtual-8086 mode"));
        }
        let (selector, popped) = (selector as u16, 3 * width.bytes());
        let parameters = 0;
        self.return_to(Return { eip, selector, flags: Some(flags), width, popped, parameters })?;
        Ok(Flow::Returned)
    }

    fn return_to(&mut self, r: Return) -> Exec {
        if !self.cpu.protected() {
            return self.return_real(&r);
        }
        let cpl = rpl(r.selector);
        // The outer stack's pointer is read before the selector is looked at, as AMD has it.
        let outer = if cpl == self.cpu.cpl { None } else { Some(self.outer_pointer(&r)?) };
        ensure(!is_null(r.selector), Exception::gp(0))?;
        let bad = Exception::gp(error_code(r.selector));
        let descriptor = self.descriptor(r.selector, bad)?;
        let code = descriptor.segment(r.selector);
        let level = if code.conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
        ensure(descriptor.kind() == Kind::Code && cpl >= self.cpu.cpl && level, bad)?;
        ensure(descriptor.present(), Exception::np(error_code(r.selector)))?;
        let mut after = Transfer::of(self.cpu);
        match outer {
            Some(pointer) => self.return_outward(&r, pointer, cpl, &mut after)?,
            None => after.esp = self.stack().above(r.popped),
        }
        ensure(r.eip <= code.limit, Exception::gp(0))?;
        self.mark_accessed(&descriptor)?;
        after.eflags = self.returned_flags(&r);
        after.seg[Seg::Cs as usize] = code;
        after.eip = r.eip;
        after.cpl = cpl;
        self.commit(&after)
    }

    /// ESP and SS of the outer ring, behind the frame.
    fn outer_pointer(&mut self, r: &Return) -> Exec<[u32; 2]> {
        let stack = self.stack();
        self.peek_frame(&stack, r.popped, r.width)
    }

    /// The outer stack, and the data segments that the outer ring may keep.
    fn return_outward(&mut self, r: &Return, outer: [u32; 2], cpl: u8, after: &mut Transfer) -> Exec {
        let [pointer, selector] = outer;
        let segment = self.stack_segment_for(selector as u16, cpl, Exception::gp, 0)?;
        // A 16-bit stack keeps the inner ESP's upper half, which the outer ring then sees.
        let pointer = pointer.wrapping_add(r.parameters);
        after.esp = merge(self.cpu.gpr[ESP], pointer, if segment.big() { u32::MAX } else { 0xffff });
        after.seg[Seg::Ss as usize] = segment;
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            let held = &mut after.seg[seg as usize];
            if !held.conforming() && held.dpl() < cpl {
                *held = null_segment(0);
            }
        }
        Ok(())
    }

    fn return_real(&mut self, r: &Return) -> Exec {
        ensure(r.eip <= self.cpu.segment(Seg::Cs).limit, Exception::gp(0))?;
        self.cpu.eflags = self.returned_flags(r);
        self.cpu.gpr[ESP] = self.stack().above(r.popped);
        self.enter_real(r.selector, r.eip);
        Ok(())
    }

    /// EFLAGS after the return, as the privilege *before* it allows.
    fn returned_flags(&self, r: &Return) -> u32 {
        let old = self.cpu.eflags;
        match r.flags {
            None => old,
            Some(image) => {
                let writable = self.writable_flags() & r.width.mask() & !(VM | VIF | VIP);
                old & !writable | image & writable | FIXED
            }
        }
    }
}
