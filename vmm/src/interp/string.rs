//! String instructions, with and without REP.
//!
//! Holds: each iteration is complete before the next begins, ESI, EDI and ECX with it; a fault, an interrupt or a
//! wait between two leaves EIP at the instruction, which then goes on. The flags are those of the last iteration
//! (AMD has it so; Intel gives back those from before the instruction. They are no input of any string instruction).
//!
//! Limits: a REP does at most [`ITERATIONS_MAX`] iterations a step, and one while single-stepping or with
//! breakpoints set.
//!
//! See: Intel SDM vol. 2, REP; vol. 1, 7.3.9.

use iced_x86::{Instruction, OpKind};
use umbra_mmu::{Access, AccessKind, Gva};

use super::alu;
use super::operand::{EAX, ECX, EDI, EDX, ESI, merge, segment_of};
use super::{Bus, Core, Exec, Flow, Leave, Width};
use crate::cpu::{Seg, eflags};

/// The most iterations of one step.
const ITERATIONS_MAX: u32 = 4096;

/// Which string instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum StringKind {
    Movs,
    Cmps,
    Stos,
    Lods,
    Scas,
    Ins,
    Outs,
}

/// A string instruction, taken apart.
struct Strings {
    kind: StringKind,
    width: Width,
    /// The address size as a mask on ESI, EDI and ECX.
    mask: u32,
    /// The segment that ESI is in.
    source: Seg,
    /// What ESI and EDI move by.
    step: u32,
    /// Some(zf): REPE or REPNE goes on while ZF is `zf`.
    while_zero: Option<bool>,
}

impl StringKind {
    fn compares(self) -> bool {
        matches!(self, StringKind::Cmps | StringKind::Scas)
    }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// Runs a string instruction: once, or for a bounded number of iterations under REP.
    pub(super) fn string(&mut self, i: &Instruction, kind: StringKind, width: Width) -> Exec<Flow> {
        if matches!(kind, StringKind::Ins | StringKind::Outs) {
            self.check_port(self.cpu.gpr[EDX] as u16, width)?;
        }
        let strings = self.strings(i, kind, width);
        if i.has_rep_prefix() || i.has_repne_prefix() {
            return self.repeat(&strings);
        }
        self.iterate(&strings)?;
        Ok(Flow::Next)
    }

    fn strings(&self, i: &Instruction, kind: StringKind, width: Width) -> Strings {
        let small = |op| matches!(i.op_kind(op), OpKind::MemorySegSI | OpKind::MemoryESDI);
        let backwards = self.cpu.eflags & eflags::DF != 0;
        Strings {
            kind,
            width,
            mask: if small(0) || small(1) { 0xffff } else { u32::MAX },
            source: segment_of(i.memory_segment()),
            step: if backwards { width.bytes().wrapping_neg() } else { width.bytes() },
            while_zero: kind.compares().then_some(!i.has_repne_prefix()),
        }
    }

    /// Iterates up to the budget.
    fn repeat(&mut self, strings: &Strings) -> Exec<Flow> {
        let single = self.cpu.eflags & eflags::TF != 0 || self.breakpoints_on();
        let budget = if single { 1 } else { ITERATIONS_MAX };
        let mut done = 0;
        while self.cpu.gpr[ECX] & strings.mask != 0 {
            if let Some(count) = self.bulk(strings, budget - done) {
                done += count;
                continue;
            }
            let result = if done < budget { self.iterate(strings) } else { Err(Leave::Again) };
            if let Err(leave) = result {
                return if matches!(leave, Leave::Again) && done > 0 { Ok(Flow::Repeat) } else { Err(leave) };
            }
            done += 1;
            self.advance(ECX, u32::MAX, strings.mask);
            let zero = self.cpu.eflags & eflags::ZF != 0;
            if strings.while_zero.is_some_and(|wanted| wanted != zero) {
                break;
            }
        }
        Ok(Flow::Next)
    }

    /// Does up to `most` iterations of a forward STOS or MOVS at once, as many as lie in a page, where nothing can stop them
    /// on the way. Returns how many.
    fn bulk(&mut self, s: &Strings, most: u32) -> Option<u32> {
        let bytes = s.width.bytes();
        let plain = s.step == bytes && s.mask == u32::MAX && !self.aligned() && !self.breakpoints_on();
        if !plain || !matches!(s.kind, StringKind::Stos | StringKind::Movs) {
            return None;
        }
        let (from, to, user) = (self.cpu.gpr[ESI], self.cpu.gpr[EDI], self.user());
        let room = |gva: Gva| (4096 - gva.offset()) / bytes;
        let target = self.range(Seg::Es, to, 1, AccessKind::Write).ok()?;
        let mut count = most.min(self.cpu.gpr[ECX]).min(room(target));
        if s.kind == StringKind::Movs {
            count = count.min(room(self.range(s.source, from, 1, AccessKind::Read).ok()?));
        }
        let length = count * bytes;
        if count < 2 || self.range(Seg::Es, to, length, AccessKind::Write).is_err() {
            return None;
        }
        let made = if s.kind == StringKind::Movs {
            let source = self.range(s.source, from, length, AccessKind::Read).ok()?;
            self.bus.copy(source, target, length, user)
        } else {
            self.bus.fill(target, s.width, self.cpu.gpr[EAX].into(), count, user)
        };
        if !made {
            return None;
        }
        self.advance(EDI, length, s.mask);
        self.advance(ECX, count.wrapping_neg(), s.mask);
        if s.kind == StringKind::Movs {
            self.advance(ESI, length, s.mask);
        }
        Some(count)
    }

    /// Adds to a register within the address size.
    fn advance(&mut self, register: usize, by: u32, mask: u32) {
        let old = self.cpu.gpr[register];
        self.cpu.gpr[register] = merge(old, old.wrapping_add(by), mask);
    }

    /// One iteration: all of it or, on error, nothing.
    fn iterate(&mut self, s: &Strings) -> Exec {
        let (from, to) = (self.cpu.gpr[ESI] & s.mask, self.cpu.gpr[EDI] & s.mask);
        match s.kind {
            StringKind::Movs => {
                let target = self.probe_target(s, to);
                if let Err(Leave::Again) = target {
                    return Err(Leave::Again);
                }
                // Where both fault, the read comes first.
                let value = self.load(s.source, from, s.width)?;
                target?;
                self.store(Seg::Es, to, s.width, value)?;
            }
            StringKind::Cmps => {
                let left = self.load(s.source, from, s.width)?;
                let right = self.load(Seg::Es, to, s.width)?;
                self.set_arithmetic_flags(alu::sub(left, right, self.arithmetic_flags(), s.width).flags);
            }
            StringKind::Stos => self.store(Seg::Es, to, s.width, self.cpu.gpr[EAX])?,
            StringKind::Lods => {
                let value = self.load(s.source, from, s.width)?;
                self.set_accumulator(s.width, value);
            }
            StringKind::Scas => {
                let right = self.load(Seg::Es, to, s.width)?;
                self.set_arithmetic_flags(
                    alu::sub(self.accumulator(s.width), right, self.arithmetic_flags(), s.width).flags,
                );
            }
            StringKind::Ins => {
                self.probe_target(s, to)?;
                let value = self.read_port(self.cpu.gpr[EDX] as u16, s.width);
                self.store(Seg::Es, to, s.width, value)?;
            }
            StringKind::Outs => {
                let value = self.load(s.source, from, s.width)?;
                self.write_port(self.cpu.gpr[EDX] as u16, s.width, value);
            }
        }
        if !matches!(s.kind, StringKind::Stos | StringKind::Scas | StringKind::Ins) {
            self.advance(ESI, s.step, s.mask);
        }
        if !matches!(s.kind, StringKind::Lods | StringKind::Outs) {
            self.advance(EDI, s.step, s.mask);
        }
        Ok(())
    }

    /// Makes sure that the store to come will go through: what is read first may be a port or a device, and cannot
    /// be read twice.
    fn probe_target(&mut self, s: &Strings, to: u32) -> Exec {
        let gva = self.linear(Seg::Es, to, s.width, AccessKind::Write)?;
        let access = Access::write(self.user());
        self.bus.probe(gva, s.width.bytes(), access)?;
        Ok(())
    }
}
