//! Memory operands wider than a register: the FPU's, of 2 to 512 bytes.
//!
//! Holds: a store is made whole or not at all. It is probed first, then made in pieces of up to 8 bytes; a load that
//! faults in a later piece has changed nothing.
//!
//! See: Intel SDM vol. 3A, 6.15 on #AC (which operands have to be aligned on what).

use iced_x86::Instruction;
use umbra_mmu::{Access, AccessKind, Gva};

use super::{Bus, Core, Exception, Exec, Width, ensure};

/// How an operand has to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alignment {
    /// On so many bytes where alignment is checked at all, else #AC.
    Checked(u32),
    /// On 16 bytes always, else #GP.
    Always,
    /// The same, but #AC where it does not even lie on 4 and alignment is checked: FXSAVE and FXRSTOR, where the choice
    /// is the implementation's.
    Area,
}

/// The pieces of `length` bytes: offset and width, at most 8 bytes each.
fn pieces(length: usize) -> impl Iterator<Item = (usize, Width)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let width = match length - at {
            0 => return None,
            1 => Width::B1,
            2..4 => Width::B2,
            4..8 => Width::B4,
            _ => Width::B8,
        };
        at += width.bytes() as usize;
        Some((at - width.bytes() as usize, width))
    })
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// The linear address of the memory operand, `size` bytes there checked as far as segmentation and alignment go.
    pub(super) fn place(
        &self,
        i: &Instruction,
        size: usize,
        alignment: Alignment,
        kind: AccessKind,
    ) -> Exec<Gva> {
        let (seg, offset) = self.effective(i);
        let gva = self.range(seg, offset, size as u32, kind)?;
        match alignment {
            Alignment::Checked(on) => ensure(gva.0 & (on - 1) == 0 || !self.aligned(), Exception::AC)?,
            Alignment::Area if self.aligned() && gva.0 & 3 != 0 => return Err(Exception::AC.into()),
            Alignment::Always | Alignment::Area => ensure(gva.0 & 15 == 0, Exception::gp(0))?,
        }
        Ok(gva)
    }

    /// Reads the memory operand.
    pub(super) fn load_bytes(&mut self, i: &Instruction, bytes: &mut [u8], alignment: Alignment) -> Exec {
        let gva = self.place(i, bytes.len(), alignment, AccessKind::Read)?;
        let access = Access::read(self.user());
        for (at, width) in pieces(bytes.len()) {
            let value = self.bus.read(gva.wrapping_add(at as u32), width, access)?;
            let size = width.bytes() as usize;
            bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
        self.watch(gva, bytes.len() as u32, false);
        Ok(())
    }

    /// Checks that `size` bytes of the memory operand could be written.
    pub(super) fn probe_bytes(&mut self, i: &Instruction, size: usize, alignment: Alignment) -> Exec {
        let gva = self.place(i, size, alignment, AccessKind::Write)?;
        let access = Access::write(self.user());
        self.bus.probe(gva, size as u32, access)?;
        Ok(())
    }

    /// Writes the memory operand, all of it or nothing.
    pub(super) fn store_bytes(&mut self, i: &Instruction, bytes: &[u8], alignment: Alignment) -> Exec {
        let gva = self.place(i, bytes.len(), alignment, AccessKind::Write)?;
        let access = Access::write(self.user());
        if !matches!(bytes.len(), 1 | 2 | 4 | 8) {
            self.bus.probe(gva, bytes.len() as u32, access)?;
        }
        for (at, width) in pieces(bytes.len()) {
            let mut value = [0; 8];
            let size = width.bytes() as usize;
            value[..size].copy_from_slice(&bytes[at..at + size]);
            self.bus.write(gva.wrapping_add(at as u32), width, u64::from_le_bytes(value), access)?;
        }
        self.watch(gva, bytes.len() as u32, true);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_length_once() {
        for length in 0..=512 {
            let mut next = 0;
            for (at, width) in pieces(length) {
                assert_eq!(at, next, "of {length}");
                next += width.bytes() as usize;
            }
            assert_eq!(next, length);
        }
    }
}
