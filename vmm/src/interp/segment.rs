//! Segmentation: from seg:offset to a checked linear address, and the accesses made there.
//!
//! Story: every access that an instruction makes by a segment register comes through here; implicit accesses to
//! descriptor tables and the TSS go to the bus directly, as a supervisor's.
//!
//! See: Intel SDM vol. 3A, 5.3 (limits), 5.4 (types), 6.15 on #AC (alignment).

use umbra_mmu::{Access, AccessKind, Gva};

use super::{Bus, Core, Exception, Exec, Width, ensure};
use crate::cpu::{Seg, Segment, cr0, eflags};

/// The segment registers, by encoding.
pub(super) const ALL_SEGMENTS: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];

/// True where `size` bytes at `offset` lie inside the segment and its type allows the access.
pub(super) fn admits(segment: &Segment, offset: u32, size: u32, kind: AccessKind, protected: bool) -> bool {
    if protected && (segment.unusable || !type_admits(segment, kind)) {
        return false;
    }
    let last = size - 1;
    if segment.expand_down() && !segment.code() {
        let top = if segment.big() { u32::MAX } else { 0xffff };
        offset > segment.limit && offset <= top && top - offset >= last
    } else {
        offset <= segment.limit && segment.limit - offset >= last
    }
}

fn type_admits(segment: &Segment, kind: AccessKind) -> bool {
    match kind {
        AccessKind::Read => segment.readable(),
        AccessKind::Write => segment.writable(),
        AccessKind::Execute => segment.code(),
    }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// True where accesses are a user's.
    pub(super) fn user(&self) -> bool {
        self.cpu.cpl == 3
    }

    /// True where misaligned data accesses fault.
    pub(super) fn aligned(&self) -> bool {
        self.cpu.cpl == 3 && self.cpu.eflags & eflags::AC != 0 && self.cpu.cr0 & cr0::AM != 0
    }

    /// The linear address of `size` bytes at `seg`:`offset`: limit and type are checked, alignment is not.
    pub(super) fn range(&self, seg: Seg, offset: u32, size: u32, kind: AccessKind) -> Exec<Gva> {
        let segment = self.cpu.segment(seg);
        let fault = if seg == Seg::Ss { Exception::ss(0) } else { Exception::gp(0) };
        ensure(admits(segment, offset, size, kind, self.cpu.protected()), fault)?;
        Ok(Gva(segment.base.wrapping_add(offset)))
    }

    /// The linear address of a scalar at `seg`:`offset`, all checks of segmentation made.
    pub(super) fn linear(&self, seg: Seg, offset: u32, width: Width, kind: AccessKind) -> Exec<Gva> {
        let gva = self.range(seg, offset, width.bytes(), kind)?;
        ensure(gva.0 & (width.bytes() - 1) == 0 || !self.aligned(), Exception::AC)?;
        Ok(gva)
    }

    /// Reads a scalar of up to 4 bytes.
    pub(super) fn load(&mut self, seg: Seg, offset: u32, width: Width) -> Exec<u32> {
        let gva = self.linear(seg, offset, width, AccessKind::Read)?;
        let access = Access::read(self.user());
        let value = self.bus.read(gva, width, access)?;
        self.watch(gva, width.bytes(), false);
        Ok(value as u32)
    }

    /// Writes a scalar of up to 4 bytes.
    pub(super) fn store(&mut self, seg: Seg, offset: u32, width: Width, value: u32) -> Exec {
        let gva = self.linear(seg, offset, width, AccessKind::Write)?;
        let access = Access::write(self.user());
        self.bus.write(gva, width, u64::from(value & width.mask()), access)?;
        self.watch(gva, width.bytes(), true);
        Ok(())
    }

    /// Reads, changes and writes back a scalar; returns what it was. `change` may be called more than once, and
    /// is given and returns values within `width`. `locked` as [`is_locked`](super::operand::is_locked) says.
    pub(super) fn update(
        &mut self,
        seg: Seg,
        offset: u32,
        width: Width,
        locked: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Exec<u64> {
        let gva = self.linear(seg, offset, width, AccessKind::Write)?;
        let user = self.user();
        let old = match locked {
            true => self.bus.update_locked(gva, width, user, change)?,
            false => self.bus.update(gva, width, user, change)?,
        };
        self.watch(gva, width.bytes(), true);
        Ok(old)
    }

    /// Checks that `size` bytes at `seg`:`offset` can be accessed, so that accesses to them will not fault.
    pub(super) fn probe(&mut self, seg: Seg, offset: u32, size: u32, kind: AccessKind) -> Exec {
        let gva = self.range(seg, offset, size, kind)?;
        let access = Access { kind, user: self.user() };
        self.bus.probe(gva, size, access)?;
        Ok(())
    }

    /// Reads a scalar of a descriptor table or TSS.
    pub(super) fn load_implicit(&mut self, gva: Gva, width: Width) -> Exec<u32> {
        Ok(self.bus.read(gva, width, Access::read(false))? as u32)
    }
}
