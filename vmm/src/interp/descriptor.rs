//! Segment descriptors and gates, as they stand in the guest's tables.
//!
//! Holds: a `Descriptor` is the guest's claim; nothing in it has been checked. What loads one checks it.
//!
//! See: Intel SDM vol. 3A, 3.4.5 (segment descriptors), 3.5 (system descriptors), 5.8.3 (call gates), 6.11 (IDT).

use umbra_mmu::{Access, Gva};

use super::{Bus, Core, Exception, Exec, Width, ensure};
use crate::cpu::Segment;

/// The attribute bits of a descriptor's high half, shifted down, that a hidden part keeps: no limit, no L.
const ATTRIBUTES: u16 = 0xd0ff;
const PRESENT: u16 = 1 << 7;
const GRANULAR: u16 = 1 << 15;
const NOT_SYSTEM: u16 = 1 << 4;

/// What a descriptor describes, as far as transfers care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Data,
    Code,
    Ldt,
    /// An available TSS.
    Tss,
    BusyTss,
    /// Its parameters and addresses are 32 or 16 bits wide.
    CallGate(Width),
    TaskGate,
    InterruptGate(Width),
    TrapGate(Width),
    Reserved,
}

/// Eight bytes of a descriptor table, and where they were.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    low: u32,
    high: u32,
    at: Gva,
}

/// A selector as an error code has it: without RPL.
pub(super) fn error_code(selector: u16) -> u16 {
    selector & !3
}

/// True for the selectors that name no descriptor.
pub(super) fn is_null(selector: u16) -> bool {
    error_code(selector) == 0
}

/// A selector's requested privilege level.
pub(super) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

impl Descriptor {
    fn attributes(&self) -> u16 {
        (self.high >> 8) as u16
    }

    pub(super) fn kind(&self) -> Kind {
        let attributes = self.attributes();
        let width = if attributes & 8 != 0 { Width::B4 } else { Width::B2 };
        match attributes & 0x1f {
            1 | 9 => Kind::Tss,
            2 => Kind::Ldt,
            3 | 11 => Kind::BusyTss,
            4 | 12 => Kind::CallGate(width),
            5 => Kind::TaskGate,
            6 | 14 => Kind::InterruptGate(width),
            7 | 15 => Kind::TrapGate(width),
            16..=23 => Kind::Data,
            24..=31 => Kind::Code,
            _ => Kind::Reserved,
        }
    }

    pub(super) fn present(&self) -> bool {
        self.attributes() & PRESENT != 0
    }

    pub(super) fn dpl(&self) -> u8 {
        (self.attributes() >> 5 & 3) as u8
    }

    fn base(&self) -> u32 {
        self.low >> 16 | (self.high & 0xff) << 16 | self.high & 0xff00_0000
    }

    /// The limit in bytes.
    pub(super) fn limit(&self) -> u32 {
        let limit = self.low & 0xffff | self.high & 0xf_0000;
        if self.attributes() & GRANULAR != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The hidden part that this descriptor gives, under `selector`. Code and data come out accessed, as loading
    /// makes them.
    pub(super) fn segment(&self, selector: u16) -> Segment {
        let accessed = u16::from(self.attributes() & NOT_SYSTEM != 0);
        Segment {
            selector,
            base: self.base(),
            limit: self.limit(),
            attributes: self.attributes() & ATTRIBUTES | accessed,
            unusable: false,
        }
    }

    /// What LAR shows: type and attributes, and between them the limit's top (undefined to Intel, there on AMD).
    pub(super) fn access_rights(&self) -> u32 {
        self.high & 0x00ff_ff00
    }

    /// A gate's target selector.
    pub(super) fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }

    /// A gate's target offset.
    pub(super) fn gate_offset(&self, width: Width) -> u32 {
        (self.high & 0xffff_0000 | self.low & 0xffff) & width.mask()
    }

    /// How many parameters a call gate copies.
    pub(super) fn gate_parameters(&self) -> u32 {
        self.high & 0x1f
    }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// The eight bytes at `at`, read as a supervisor.
    pub(super) fn descriptor_at(&mut self, at: Gva) -> Exec<Descriptor> {
        if at.0 & 7 == 0 {
            let both = self.bus.read(at, Width::B8, Access::read(false))?;
            return Ok(Descriptor { low: both as u32, high: (both >> 32) as u32, at });
        }
        let low = self.load_implicit(at, Width::B4)?;
        let high = self.load_implicit(at.wrapping_add(4), Width::B4)?;
        Ok(Descriptor { low, high, at })
    }

    /// The descriptor that `selector` names, or None where that lies outside its table.
    pub(super) fn find_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        let local = selector & 4 != 0;
        let (base, limit) = match local {
            true if self.cpu.ldtr.unusable => return Ok(None),
            true => (self.cpu.ldtr.base, self.cpu.ldtr.limit),
            false => (self.cpu.gdtr.base, u32::from(self.cpu.gdtr.limit)),
        };
        if u32::from(selector | 7) > limit {
            return Ok(None);
        }
        self.descriptor_at(Gva(base.wrapping_add(u32::from(selector & !7)))).map(Some)
    }

    /// The descriptor that `selector` names; `outside` where that is null or outside its table.
    pub(super) fn descriptor(&mut self, selector: u16, outside: Exception) -> Exec<Descriptor> {
        ensure(!is_null(selector), outside)?;
        self.find_descriptor(selector)?.ok_or(outside.into())
    }

    /// Sets the A bit of a descriptor that is being loaded, where it is clear.
    pub(super) fn mark_accessed(&mut self, descriptor: &Descriptor) -> Exec {
        if descriptor.attributes() & 1 == 0 {
            self.set_type_bit(descriptor, 1)?;
        }
        Ok(())
    }

    /// Sets the busy bit of a TSS descriptor.
    pub(super) fn mark_busy(&mut self, descriptor: &Descriptor) -> Exec {
        self.set_type_bit(descriptor, 2)
    }

    fn set_type_bit(&mut self, descriptor: &Descriptor, bit: u64) -> Exec {
        self.bus.update(descriptor.at.wrapping_add(5), Width::B1, false, &mut |byte| byte | bit)?;
        Ok(())
    }
}
