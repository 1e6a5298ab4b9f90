//! A stretch of blocks under way: registers, memory and stack as handlers reach them.
//!
//! A handler is compiled once for each way to memory. [`QUICK`] and [`NEAR`] are for an aligned operand that the bus has at
//! hand, where segments are flat: such a handler calls nothing, and where it cannot have its way it has done nothing
//! ([`Next::Full`]). [`FULL`] is as [`super::step`] does it.
//!
//! Holds: whether segments are flat is found out at the start and when one has been loaded ([`Run::look_at_segments`]): nothing
//! else in a stretch changes them. An access that fails has changed nothing.

use umbra_mmu::{Access, Gva, Mfn};

use super::cache::Block;
use super::translate::{NO_REGISTER, Op, SCALE_SHIFT};
use super::{CodeBus, NO_TAG};
use crate::cpu::{Seg, Segment};
use crate::interp::flags::Flags;
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
    /// The arithmetic flags. Those of EFLAGS are old, but where [`Run::put_flags`] has just been called.
    pub flags: Flags,
    /// Accesses are a user's.
    pub user: bool,
    /// CS has 32-bit operands.
    pub wide: bool,
    /// [`CodeBus::translation_version`] when the block was looked for.
    pub version: u64,
    /// Number of the op that ended a block, unless it is through.
    pub last: u8,
    /// Steps of the run before this block.
    steps: u64,
    /// DS, ES and SS are all of the linear address space, to read and write, and the stack is 32 bits wide.
    flat: bool,
    /// What the bus knows this code's accesses by, for the quick way; [`NO_TAG`] where segments are not flat.
    tag: u64,
    frame: Mfn,
    generation: u32,
    left: Option<Leave>,
}

/// An access's result: `Err(None)` where the quick way does not do.
pub type Reach<T = ()> = Result<T, Option<Leave>>;

/// The operand is reached as [`crate::interp::step`] reaches it.
pub const FULL: u8 = 0;
/// The quick way.
pub const QUICK: u8 = 1;
/// The quick way, to an address that is a register and a displacement.
pub const NEAR: u8 = 2;

/// Segments that take part in the quick way.
pub const QUICK_SEGMENTS: [Seg; 3] = [Seg::Ds, Seg::Es, Seg::Ss];

/// Offsets are linear addresses, and all of them may be read and written.
fn is_flat(segment: &Segment) -> bool {
    !segment.unusable
        && segment.base == 0
        && segment.limit == u32::MAX
        && segment.writable()
        && !segment.expand_down()
}

impl<'a, B: CodeBus> Run<'a, B> {
    /// The stretch begins in the state of `core`.
    pub fn new(core: Core<'a, B>) -> Run<'a, B> {
        let cpu = &*core.cpu;
        let mut run = Run {
            start: cpu.eip,
            flags: Flags::of(cpu.eflags),
            user: cpu.cpl == 3,
            wide: cpu.segment(Seg::Cs).big(),
            version: 0,
            last: 0,
            steps: 0,
            flat: false,
            tag: NO_TAG,
            frame: Mfn(0),
            generation: 0,
            left: None,
            core,
        };
        run.look_at_segments();
        run
    }

    /// DS, ES or SS may have changed.
    #[inline]
    pub fn look_at_segments(&mut self) {
        let cpu = &*self.core.cpu;
        // Real mode checks limits alone, and has none like these.
        self.flat = cpu.protected()
            && QUICK_SEGMENTS.iter().all(|seg| is_flat(cpu.segment(*seg)))
            && cpu.segment(Seg::Ss).big();
        self.look_at_tag();
    }

    #[inline]
    fn look_at_tag(&mut self) {
        self.tag = if self.flat { self.core.bus.quick_tag(self.user) } else { NO_TAG };
    }

    /// A block begins, after `steps` of the run.
    #[inline]
    pub fn enter(&mut self, block: &Block, steps: u64) {
        (self.start, self.steps) = (self.core.cpu.eip, steps);
        (self.frame, self.generation) = (block.frame, block.generation);
        // Once there is one, it stays for as long as paging does.
        if self.tag == NO_TAG {
            self.look_at_tag();
        }
    }

    /// EIP `offset` behind the start of the block.
    #[inline(always)]
    pub fn at(&self, offset: i16) -> u32 {
        self.start.wrapping_add(i32::from(offset) as u32)
    }

    /// Tells the bus which step it is, before anything that may ask it for the time.
    pub fn tell(&mut self, op: &Op) {
        let eip = self.at(op.begin());
        self.core.bus.begin(self.steps + u64::from(op.number) + 1, eip);
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
    pub fn offset<const M: u8>(&self, op: &Op) -> u32 {
        let gpr = &self.core.cpu.gpr;
        if M == NEAR {
            return gpr[usize::from(op.base & 7)].wrapping_add(op.disp);
        }
        let register = |n: u8| if n & NO_REGISTER == 0 { gpr[usize::from(n & 7)] } else { 0 };
        let index = register(op.index) << (op.index >> SCALE_SHIFT & 3);
        op.disp.wrapping_add(register(op.base)).wrapping_add(index)
    }

    #[inline(always)]
    pub fn load<const W: u8, const M: u8>(&mut self, op: &Op) -> Reach<u32> {
        let offset = self.offset::<M>(op);
        if M == FULL {
            return Ok(self.core.load(ALL_SEGMENTS[usize::from(op.seg)], offset, width::<W>())?);
        }
        self.quick_read::<W>(Gva(offset), Access::read(self.user))
    }

    #[inline(always)]
    pub fn store<const W: u8, const M: u8>(&mut self, op: &Op, value: u32) -> Reach {
        let offset = self.offset::<M>(op);
        if M == FULL {
            return Ok(self.core.store(ALL_SEGMENTS[usize::from(op.seg)], offset, width::<W>(), value)?);
        }
        self.quick_write::<W>(Gva(offset), value)
    }

    /// Changes the memory operand by `change`, which may be called more than once. Not atomically: no LOCK comes here.
    #[inline(always)]
    pub fn update<const W: u8, const M: u8>(&mut self, op: &Op, mut change: impl FnMut(u32) -> u32) -> Reach {
        let offset = self.offset::<M>(op);
        if M == FULL {
            let seg = ALL_SEGMENTS[usize::from(op.seg)];
            self.core.update(seg, offset, width::<W>(), false, &mut |old| u64::from(change(old as u32)))?;
            return Ok(());
        }
        let old = self.quick_read::<W>(Gva(offset), Access::write(self.user))?;
        self.quick_write::<W>(Gva(offset), change(old))
    }

    /// LOCK CMPXCHG of the memory operand: what was there.
    #[inline(always)]
    pub fn compare_exchange<const M: u8>(&mut self, op: &Op, expected: u32, new: u32) -> Reach<u32> {
        let offset = self.offset::<M>(op);
        if M == FULL {
            let seg = ALL_SEGMENTS[usize::from(op.seg)];
            let change = &mut |old| if old == u64::from(expected) { u64::from(new) } else { old };
            return Ok(self.core.update(seg, offset, Width::B4, true, change)? as u32);
        }
        if offset & 3 != 0 {
            return Err(None);
        }
        self.core.bus.quick_compare_exchange(self.tag, Gva(offset), expected, new).ok_or(None)
    }

    #[inline(always)]
    pub fn push<const M: u8>(&mut self, value: u32) -> Reach {
        if M == FULL {
            return Ok(self.core.push(Width::B4, value)?);
        }
        let pointer = self.core.cpu.gpr[ESP].wrapping_sub(4);
        self.quick_write::<4>(Gva(pointer), value)?;
        self.core.cpu.gpr[ESP] = pointer;
        Ok(())
    }

    #[inline(always)]
    pub fn pop<const M: u8>(&mut self) -> Reach<u32> {
        if M == FULL {
            let value = self.core.top(Width::B4)?;
            self.core.release(4);
            return Ok(value);
        }
        let pointer = self.core.cpu.gpr[ESP];
        let value = self.quick_read::<4>(Gva(pointer), Access::read(self.user))?;
        self.core.cpu.gpr[ESP] = pointer.wrapping_add(4);
        Ok(value)
    }

    /// Pushes `values`, the first one first. The quick way is for those that lie in one page: all can be written, or none.
    #[inline(always)]
    pub fn push_all<const M: u8>(&mut self, values: &[u32; 8]) -> Reach {
        let pointer = self.core.cpu.gpr[ESP].wrapping_sub(32);
        if M == FULL || Gva(pointer).offset() > 4096 - 32 {
            return Err(None);
        }
        for (value, n) in values.iter().rev().zip(0..) {
            self.quick_write::<4>(Gva(pointer + n * 4), *value)?;
        }
        self.core.cpu.gpr[ESP] = pointer;
        Ok(())
    }

    /// Pops as many, the top of the stack last.
    #[inline(always)]
    pub fn pop_all<const M: u8>(&mut self) -> Reach<[u32; 8]> {
        let pointer = self.core.cpu.gpr[ESP];
        if M == FULL || Gva(pointer).offset() > 4096 - 32 {
            return Err(None);
        }
        let mut values = [0; 8];
        for (value, n) in values.iter_mut().rev().zip(0..) {
            *value = self.quick_read::<4>(Gva(pointer + n * 4), Access::read(self.user))?;
        }
        self.core.cpu.gpr[ESP] = pointer.wrapping_add(32);
        Ok(values)
    }

    #[inline(always)]
    fn quick_read<const W: u8>(&self, gva: Gva, access: Access) -> Reach<u32> {
        if gva.0 & (u32::from(W) - 1) != 0 {
            return Err(None);
        }
        self.core.bus.quick_read(self.tag, gva, width::<W>(), access).map(|value| value as u32).ok_or(None)
    }

    #[inline(always)]
    fn quick_write<const W: u8>(&mut self, gva: Gva, value: u32) -> Reach {
        if gva.0 & (u32::from(W) - 1) != 0 {
            return Err(None);
        }
        let value = u64::from(value & width::<W>().mask());
        if self.core.bus.quick_write(self.tag, gva, width::<W>(), value) { Ok(()) } else { Err(None) }
    }

    /// After an op that stored. The quick way stores to no code.
    #[inline(always)]
    pub fn stored<const M: u8>(&self) -> Next {
        if M != FULL || self.is_current() { Next::On } else { Next::Stale }
    }

    #[inline(always)]
    pub fn jump_by(&mut self, op: &Op) -> Next {
        self.core.cpu.eip = self.at(op.end).wrapping_add(op.imm);
        Next::Jumped
    }

    /// Has EFLAGS tell what `flags` do.
    #[inline]
    pub fn put_flags(&mut self) {
        self.core.cpu.eflags = self.flags.within(self.core.cpu.eflags);
    }

    /// Does what looks at EFLAGS, or changes them.
    #[inline]
    pub fn with_flags<T>(&mut self, what: impl FnOnce(&mut Self) -> T) -> T {
        self.put_flags();
        let result = what(self);
        self.flags = Flags::of(self.core.cpu.eflags);
        result
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
