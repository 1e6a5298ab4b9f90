//! A stretch of blocks under way: registers, memory and stack as handlers reach them.
//!
//! Memory is reached in two ways, which a handler is compiled for once each. *Quick*: an aligned operand in a flat segment
//! that the bus has at hand; such a handler calls nothing, and where it cannot have its way it has done nothing
//! ([`Next::Full`]). *Full*: as [`super::step`] does.
//!
//! Holds: segments are checked once in advance where they are flat ([`Run::new`]): nothing in a stretch changes them. An
//! access that fails has changed nothing.

use umbra_mmu::{Access, Gva, Mfn};

use super::CodeBus;
use super::cache::Block;
use super::translate::Op;
use crate::cpu::{Seg, Segment};
use crate::interp::operand::ESP;
use crate::interp::segment::ALL_SEGMENTS;
use crate::interp::{Core, Leave, Step, Width};

/// What comes after an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The next op.
    On,
    /// There is no next op: the block is over.
    Through,
    /// Not the quick way: the full one.
    Full,
    /// EIP has been set: the block is over.
    Jumped,
    /// The block is over behind this op: its code has been stored to.
    Stale,
    /// It faulted, or must be run again: see [`Run::stopped`].
    Left,
    /// Not for a handler: execute the instruction.
    Generic,
}

/// A stretch of blocks under way, with what does not change in it.
pub struct Run<'a, B: CodeBus> {
    pub core: Core<'a, B>,
    /// EIP at the start of the block.
    pub start: u32,
    /// Accesses are a user's.
    pub user: bool,
    /// CS has 32-bit operands.
    pub wide: bool,
    /// Number of the op that ended a block, unless it is through.
    pub last: u8,
    /// Steps of the run before this block.
    steps: u64,
    /// Segments through which everything may be read, and written: a bit each.
    readable: u8,
    writable: u8,
    /// The stack is 32 bits wide, and everything may be done through it.
    stack: bool,
    bases: [u32; 8],
    frame: Mfn,
    generation: u32,
    left: Option<Leave>,
}

/// An access's result: `Err(None)` where the quick way does not do.
pub type Reach<T = ()> = Result<T, Option<Leave>>;

/// Its limit takes nothing away, and an aligned offset is an aligned address.
fn is_flat(segment: &Segment) -> bool {
    !segment.unusable
        && segment.limit == u32::MAX
        && segment.base.is_multiple_of(4)
        && (segment.code() || !segment.expand_down())
}

impl<'a, B: CodeBus> Run<'a, B> {
    /// The stretch begins in the state of `core`.
    pub fn new(core: Core<'a, B>) -> Run<'a, B> {
        let cpu = &*core.cpu;
        let protected = cpu.protected();
        let mut run = Run {
            start: cpu.eip,
            user: cpu.cpl == 3,
            wide: cpu.segment(Seg::Cs).big(),
            readable: 0,
            writable: 0,
            last: 0,
            steps: 0,
            stack: false,
            bases: [0; 8],
            frame: Mfn(0),
            generation: 0,
            left: None,
            core,
        };
        for seg in ALL_SEGMENTS {
            let segment = *run.core.cpu.segment(seg);
            run.bases[seg as usize] = segment.base;
            // Real mode checks limits alone, and has none like these; it takes the long way.
            let flat = protected && is_flat(&segment);
            run.readable |= u8::from(flat && segment.readable()) << seg as u8;
            run.writable |= u8::from(flat && segment.writable()) << seg as u8;
        }
        let ss = 1 << Seg::Ss as u8;
        run.stack = run.readable & run.writable & ss != 0 && run.core.cpu.segment(Seg::Ss).big();
        run
    }

    /// A block begins, after `steps` of the run.
    #[inline]
    pub fn enter(&mut self, block: &Block, steps: u64) {
        (self.start, self.steps) = (self.core.cpu.eip, steps);
        (self.frame, self.generation) = (block.frame, block.generation);
    }

    /// Tells the bus which step it is, before anything that may ask it for the time.
    pub fn tell(&mut self, op: &Op) {
        self.core.bus.begin(self.steps + u64::from(op.number) + 1);
    }

    /// True while nobody has stored to the frame of the block.
    #[inline(always)]
    pub fn is_current(&self) -> bool {
        self.core.bus.code_generation(self.frame) == self.generation
    }

    /// What the handler that ended with [`Next::Left`] came to.
    pub fn stopped(&mut self) -> Step {
        match self.left.take() {
            Some(leave) => self.core.stopped(leave),
            None => Step::Again,
        }
    }

    #[inline(always)]
    pub fn get<const W: u8>(&self, register: u8) -> u32 {
        let gpr = &self.core.cpu.gpr;
        match W {
            4 => gpr[usize::from(register & 7)],
            2 => gpr[usize::from(register & 7)] & 0xffff,
            _ => gpr[usize::from(register & 3)] >> ((register & 4) * 2) & 0xff,
        }
    }

    #[inline(always)]
    pub fn set<const W: u8>(&mut self, register: u8, value: u32) {
        let gpr = &mut self.core.cpu.gpr;
        match W {
            4 => gpr[usize::from(register & 7)] = value,
            2 => {
                let slot = &mut gpr[usize::from(register & 7)];
                *slot = *slot & !0xffff | value & 0xffff;
            }
            _ => {
                let (slot, shift) = (&mut gpr[usize::from(register & 3)], (register & 4) * 2);
                *slot = *slot & !(0xff << shift) | (value & 0xff) << shift;
            }
        }
    }

    /// The offset of the memory operand.
    #[inline(always)]
    pub fn offset(&self, op: &Op) -> u32 {
        let gpr = &self.core.cpu.gpr;
        let base = gpr[usize::from(op.base & 7)] & op.base_mask;
        let index = (gpr[usize::from(op.index & 7)] & op.index_mask) << (op.scale & 3);
        op.disp.wrapping_add(base).wrapping_add(index)
    }

    #[inline(always)]
    pub fn load<const W: u8, const Q: bool>(&mut self, op: &Op) -> Reach<u32> {
        let offset = self.offset(op);
        if !Q {
            return Ok(self.core.load(ALL_SEGMENTS[usize::from(op.seg)], offset, width::<W>())?);
        }
        if self.readable >> op.seg & 1 == 0 {
            return Err(None);
        }
        let gva = Gva(self.bases[usize::from(op.seg & 7)].wrapping_add(offset));
        self.quick_read::<W>(gva, Access::read(self.user))
    }

    #[inline(always)]
    pub fn store<const W: u8, const Q: bool>(&mut self, op: &Op, value: u32) -> Reach {
        let offset = self.offset(op);
        if !Q {
            return Ok(self.core.store(ALL_SEGMENTS[usize::from(op.seg)], offset, width::<W>(), value)?);
        }
        if self.writable >> op.seg & 1 == 0 {
            return Err(None);
        }
        let gva = Gva(self.bases[usize::from(op.seg & 7)].wrapping_add(offset));
        self.quick_write::<W>(gva, value)
    }

    /// Changes the memory operand by `change`, which may be called more than once. Not atomically: no LOCK comes here.
    #[inline(always)]
    pub fn update<const W: u8, const Q: bool>(
        &mut self,
        op: &Op,
        mut change: impl FnMut(u32) -> u32,
    ) -> Reach {
        let offset = self.offset(op);
        if !Q {
            let seg = ALL_SEGMENTS[usize::from(op.seg)];
            self.core.update(seg, offset, width::<W>(), &mut |old| u64::from(change(old as u32)))?;
            return Ok(());
        }
        if self.writable >> op.seg & 1 == 0 {
            return Err(None);
        }
        let gva = Gva(self.bases[usize::from(op.seg & 7)].wrapping_add(offset));
        let old = self.quick_read::<W>(gva, Access::write(self.user))?;
        self.quick_write::<W>(gva, change(old))
    }

    #[inline(always)]
    pub fn push<const Q: bool>(&mut self, value: u32) -> Reach {
        if !Q {
            return Ok(self.core.push(Width::B4, value)?);
        }
        let pointer = self.core.cpu.gpr[ESP].wrapping_sub(4);
        if !self.stack {
            return Err(None);
        }
        self.quick_write::<4>(Gva(self.bases[Seg::Ss as usize].wrapping_add(pointer)), value)?;
        self.core.cpu.gpr[ESP] = pointer;
        Ok(())
    }

    #[inline(always)]
    pub fn pop<const Q: bool>(&mut self) -> Reach<u32> {
        if !Q {
            let value = self.core.top(Width::B4)?;
            self.core.release(4);
            return Ok(value);
        }
        let pointer = self.core.cpu.gpr[ESP];
        if !self.stack {
            return Err(None);
        }
        let gva = Gva(self.bases[Seg::Ss as usize].wrapping_add(pointer));
        let value = self.quick_read::<4>(gva, Access::read(self.user))?;
        self.core.cpu.gpr[ESP] = pointer.wrapping_add(4);
        Ok(value)
    }

    #[inline(always)]
    fn quick_read<const W: u8>(&self, gva: Gva, access: Access) -> Reach<u32> {
        if gva.0 & (u32::from(W) - 1) != 0 {
            return Err(None);
        }
        self.core.bus.quick_read(gva, width::<W>(), access).map(|value| value as u32).ok_or(None)
    }

    #[inline(always)]
    fn quick_write<const W: u8>(&mut self, gva: Gva, value: u32) -> Reach {
        if gva.0 & (u32::from(W) - 1) != 0 {
            return Err(None);
        }
        let value = u64::from(value & width::<W>().mask());
        if self.core.bus.quick_write(gva, width::<W>(), value, self.user) { Ok(()) } else { Err(None) }
    }

    /// After an op that stored. The quick way stores to no code.
    #[inline(always)]
    pub fn stored<const Q: bool>(&self) -> Next {
        if Q || self.is_current() { Next::On } else { Next::Stale }
    }

    #[inline(always)]
    pub fn jump_by(&mut self, op: &Op) -> Next {
        self.core.cpu.eip = self.start.wrapping_add(op.end.into()).wrapping_add(op.imm);
        Next::Jumped
    }

    #[inline(always)]
    pub fn flags(&self) -> u32 {
        self.core.cpu.eflags
    }

    /// Out of a handler: the access did not do.
    #[inline(always)]
    pub fn without(&mut self, why: Option<Leave>) -> Next {
        match why {
            None => Next::Full,
            Some(leave) => {
                self.left = Some(leave);
                Next::Left
            }
        }
    }
}

/// A width by its bytes.
pub const fn width<const W: u8>() -> Width {
    match W {
        1 => Width::B1,
        2 => Width::B2,
        _ => Width::B4,
    }
}
