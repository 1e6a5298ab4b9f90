//! x87: arithmetic, loads and stores on the host's FPU, one instruction at a time.
//!
//! Story: `fpu` has seen that the FPU is there; [`Core::x87`] reports a pending exception, reads a memory operand, lets
//! the host run the instruction on a copy of the guest's registers, writes a memory result, and only then keeps the
//! copy. An unmasked exception is noted in the status word and reported by the next waiting instruction.
//!
//! Limits: with CR0.NE clear an exception is not reported at all: no board connects FERR#, and IGNNE# counts as
//! asserted, so that instructions run on. FOP has the opcode of the shortest encoding of a memory operand.
//!
//! See: Intel SDM vol. 1, chapter 8; vol. 2, each instruction.

use iced_x86::Instruction;

use super::flags::ARITHMETIC;
use super::wide::Alignment;
use super::x87_forms::{Form, Place, form_of};
use super::{Bus, Core, Exception, Exec, Flow, Leave, ensure};
use crate::cpu::fpu::{Pointers, status};
use crate::cpu::{Seg, cr0};
use crate::host_fpu;

impl<B: Bus + ?Sized> Core<'_, B> {
    /// #MF where an unmasked exception is pending and CR0.NE says to report it so.
    pub(super) fn report_pending(&self) -> Exec {
        ensure(!self.cpu.fpu.pending() || self.cpu.cr0 & cr0::NE == 0, Exception::MF)
    }

    /// An instruction that computes, loads or stores.
    pub(super) fn x87(&mut self, i: &Instruction) -> Exec<Flow> {
        let Some(form) = form_of(i) else { return Err(Leave::Unknown("this x87 instruction")) };
        self.report_pending()?;
        let size = if form.place == Place::Registers { 0 } else { i.memory_size().size() };
        let alignment = Alignment::Checked(size.next_power_of_two().clamp(1, 8) as u32);
        let mut operand = [0; 16];
        if form.place == Place::Load {
            self.load_bytes(i, &mut operand[..size], alignment)?;
        }
        let mut after = self.cpu.fpu.clone();
        let flags = host_fpu::x87(form.routine, &mut after, &mut operand, self.cpu.eflags);
        let raised = after.status() & !after.control();
        if form.place == Place::Store {
            // What keeps the store from being made comes after the operand's own faults.
            match raised & status::STORE_EXCEPTIONS {
                0 => self.store_bytes(i, &operand[..size], alignment)?,
                _ => self.probe_bytes(i, size, alignment)?,
            }
        }
        self.cpu.eflags = self.cpu.eflags & !ARITHMETIC | flags;
        self.cpu.fpu.adopt(&after);
        self.point_at(i, &form);
        Ok(Flow::Next)
    }

    /// FIP and the others, after an instruction that is not a control instruction. FDP stays where there is no
    /// memory operand.
    fn point_at(&mut self, i: &Instruction, form: &Form) {
        let old = self.cpu.fpu.pointers();
        let (ds, dp) = match form.place {
            Place::Registers => (old.ds, old.dp),
            Place::Load | Place::Store => {
                let (seg, offset) = self.effective(i);
                (self.cpu.segment(seg).selector, offset)
            }
        };
        let opcode = u16::from(form.escape & 7) << 8 | u16::from(form.modrm);
        let cs = self.cpu.segment(Seg::Cs).selector;
        self.cpu.fpu.set_pointers(Pointers { opcode, ip: self.cpu.eip, cs, dp, ds });
    }
}
