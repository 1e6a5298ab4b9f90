//! Loading segment registers, LDTR and TR.
//!
//! Holds: the A bit is the only thing written before all checks have passed.
//!
//! See: Intel SDM vol. 2, MOV, LDS, LLDT, LTR; vol. 3A, 5.5 to 5.7.

use iced_x86::{Instruction, Register};

use super::descriptor::{Descriptor, Kind, error_code, is_null, rpl};

use super::{Bus, Core, Exception, Exec, Flow, Width, ensure};
use crate::cpu::{Seg, Segment};

/// The busy bit of a TSS's type.
const BUSY: u16 = 2;

impl<B: Bus + ?Sized> Core<'_, B> {
    /// MOV and POP to a segment register.
    pub(super) fn load_segment_register(&mut self, seg: Seg, selector: u16) -> Exec<Flow> {
        self.cpu.seg[seg as usize] = self.segment_for(seg, selector)?;
        Ok(if seg == Seg::Ss { Flow::ShadowAll } else { Flow::Next })
    }

    /// LDS, LES, LFS, LGS and LSS.
    pub(super) fn load_far_pointer(&mut self, i: &Instruction, seg: Seg) -> Exec<Flow> {
        let width = width_of_register(i.op0_register());
        let (at, offset) = self.effective(i);
        let pointer = self.load(at, offset, width)?;
        let selector = self.load(at, offset.wrapping_add(width.bytes()), Width::B2)? as u16;
        self.cpu.seg[seg as usize] = self.segment_for(seg, selector)?;
        self.set_register(i.op0_register(), pointer);
        Ok(Flow::Next)
    }

    /// What a load of `selector` makes of `seg`, any but CS.
    fn segment_for(&mut self, seg: Seg, selector: u16) -> Exec<Segment> {
        if !self.cpu.protected() {
            return Ok(real_mode_segment(self.cpu.segment(seg), selector));
        }
        match seg {
            Seg::Ss => self.stack_segment_for(selector, self.cpu.cpl, Exception::gp, 0),
            _ => self.data_segment_for(selector),
        }
    }

    fn data_segment_for(&mut self, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Ok(null_segment(selector));
        }
        let bad = Exception::gp(error_code(selector));
        let descriptor = self.descriptor(selector, bad)?;
        let segment = descriptor.segment(selector);
        let data = match descriptor.kind() {
            Kind::Data => true,
            Kind::Code => segment.readable(),
            _ => false,
        };
        ensure(data, bad)?;
        let privileged = segment.dpl() >= rpl(selector).max(self.cpu.cpl);
        ensure(segment.conforming() || privileged, bad)?;
        ensure(descriptor.present(), Exception::np(error_code(selector)))?;
        self.mark_accessed(&descriptor)?;
        Ok(segment)
    }

    /// What a load of `selector` into SS for privilege `cpl` gives. `bad` makes the exception for a wrong one (#GP,
    /// or #TS when a gate switches stacks), `ext` is its EXT bit.
    pub(super) fn stack_segment_for(
        &mut self,
        selector: u16,
        cpl: u8,
        bad: fn(u16) -> Exception,
        ext: u16,
    ) -> Exec<Segment> {
        ensure(!is_null(selector), bad(ext))?;
        let wrong = bad(error_code(selector) | ext);
        let descriptor = self.descriptor(selector, wrong)?;
        let segment = descriptor.segment(selector);
        let right = descriptor.kind() == Kind::Data && segment.writable();
        ensure(right && rpl(selector) == cpl && segment.dpl() == cpl, wrong)?;
        ensure(descriptor.present(), Exception::ss(error_code(selector) | ext))?;
        self.mark_accessed(&descriptor)?;
        Ok(segment)
    }

    /// LLDT.
    pub(super) fn load_local_table(&mut self, i: &Instruction) -> Exec<Flow> {
        self.require_protected()?;
        self.require_supervisor()?;
        let selector = self.read_selector(i, 0)?;
        self.cpu.ldtr = if is_null(selector) {
            null_segment(selector)
        } else {
            self.system_descriptor(selector, |kind| kind == Kind::Ldt)?.segment(selector)
        };
        Ok(Flow::Next)
    }

    /// LTR: the descriptor turns busy.
    pub(super) fn load_task_register(&mut self, i: &Instruction) -> Exec<Flow> {
        self.require_protected()?;
        self.require_supervisor()?;
        let selector = self.read_selector(i, 0)?;
        ensure(!is_null(selector), Exception::gp(0))?;
        let descriptor = self.system_descriptor(selector, |kind| kind == Kind::Tss)?;
        self.mark_busy(&descriptor)?;
        let mut task = descriptor.segment(selector);
        task.attributes |= BUSY;
        self.cpu.tr = task;
        Ok(Flow::Next)
    }

    /// A present descriptor of the wanted kind, from the GDT.
    fn system_descriptor(&mut self, selector: u16, wanted: fn(Kind) -> bool) -> Exec<Descriptor> {
        let bad = Exception::gp(error_code(selector));
        ensure(selector & 4 == 0, bad)?;
        let descriptor = self.descriptor(selector, bad)?;
        ensure(wanted(descriptor.kind()), bad)?;
        ensure(descriptor.present(), Exception::np(error_code(selector)))?;
        Ok(descriptor)
    }
}

fn width_of_register(register: Register) -> Width {
    if register.is_gpr16() { Width::B2 } else { Width::B4 }
}

/// A register that was loaded with a null selector: it keeps the selector and nothing else.
pub(super) fn null_segment(selector: u16) -> Segment {
    Segment { selector, unusable: true, ..Segment::default() }
}

/// A load in real mode: the base follows the selector, limit and attributes stay.
pub(super) fn real_mode_segment(old: &Segment, selector: u16) -> Segment {
    Segment { selector, base: u32::from(selector) << 4, unusable: false, ..*old }
}
