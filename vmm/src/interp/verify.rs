//! Instructions that look at descriptors without loading them: LAR, LSL, VERR, VERW, ARPL.
//!
//! See: Intel SDM vol. 2, each instruction; vol. 3A, 5.10 (pointer validation).

use iced_x86::Instruction;

use super::descriptor::{Descriptor, Kind, is_null, rpl};
use super::operand::{merge, width_of};
use super::{Bus, Core, Exec, Flow, Width};
use crate::cpu::eflags::ZF;

impl<B: Bus + ?Sized> Core<'_, B> {
    fn set_zero_flag(&mut self, set: bool) {
        self.cpu.eflags = self.cpu.eflags & !ZF | if set { ZF } else { 0 };
    }

    /// The descriptor of a selector that this privilege may see.
    fn visible_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        if is_null(selector) {
            return Ok(None);
        }
        let Some(descriptor) = self.find_descriptor(selector)? else { return Ok(None) };
        let conforming = descriptor.kind() == Kind::Code && descriptor.segment(selector).conforming();
        let seen = conforming || descriptor.dpl() >= rpl(selector).max(self.cpu.cpl);
        Ok(seen.then_some(descriptor))
    }

    /// LAR and LSL: ZF says whether there is a descriptor that `of` has a value for.
    pub(super) fn inspect(&mut self, i: &Instruction, of: fn(&Descriptor) -> Option<u32>) -> Exec<Flow> {
        self.require_protected()?;
        let selector = self.read_selector(i, 1)?;
        let value = self.visible_descriptor(selector)?.as_ref().and_then(of);
        self.set_zero_flag(value.is_some());
        if let Some(value) = value {
            let mask = width_of(i, 0).mask();
            let register = i.op0_register();
            self.set_register(register, merge(self.register(register), value, mask));
        }
        Ok(Flow::Next)
    }

    /// VERR and VERW.
    pub(super) fn verify(&mut self, i: &Instruction, write: bool) -> Exec<Flow> {
        self.require_protected()?;
        let selector = self.read_selector(i, 0)?;
        let usable = self.visible_descriptor(selector)?.is_some_and(|descriptor| {
            let segment = descriptor.segment(selector);
            match descriptor.kind() {
                Kind::Data => !write || segment.writable(),
                Kind::Code => !write && segment.readable(),
                _ => false,
            }
        });
        self.set_zero_flag(usable);
        Ok(Flow::Next)
    }

    /// ARPL: raises the destination's RPL to the source's. Memory is written only where that changes it.
    pub(super) fn adjust_rpl(&mut self, i: &Instruction) -> Exec<Flow> {
        self.require_protected()?;
        let source = self.read_selector(i, 1)? & 3;
        let old = self.read(i, 0, Width::B2)?;
        let raise = old & 3 < source.into();
        if raise {
            self.write(i, 0, Width::B2, old & !3 | u32::from(source))?;
        }
        self.set_zero_flag(raise);
        Ok(Flow::Next)
    }
}

/// What LAR shows: all but gates of interrupts.
pub(super) fn access_rights(descriptor: &Descriptor) -> Option<u32> {
    match descriptor.kind() {
        Kind::InterruptGate(_) | Kind::TrapGate(_) | Kind::Reserved => None,
        _ => Some(descriptor.access_rights()),
    }
}

/// What LSL shows: segments and TSSs have a limit, gates do not.
pub(super) fn segment_limit(descriptor: &Descriptor) -> Option<u32> {
    match descriptor.kind() {
        Kind::Data | Kind::Code | Kind::Ldt | Kind::Tss | Kind::BusyTss => Some(descriptor.limit()),
        _ => None,
    }
}
