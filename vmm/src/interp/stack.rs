//! The stack: single pushes and pops, and frames that are written whole or not at all.
//!
//! Holds: ESP changes only after the last access that can fail.

use umbra_mmu::{Access, AccessKind, Gva};

use super::operand::{ESP, merge};
use super::segment::admits;
use super::{Bus, Core, Exception, Exec, Width, ensure};
use crate::cpu::{Seg, Segment};

/// A stack to push a frame on: the current one, or the one that a gate switches to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    pub(super) segment: Segment,
    pub(super) pointer: u32,
    /// The accesses are a user's.
    pub(super) user: bool,
    /// Misaligned accesses fault.
    pub(super) aligned: bool,
    /// What a frame beyond the limit raises.
    pub(super) fault: Exception,
}

impl Stack {
    /// The mask of the pointer: SP or ESP.
    pub(super) fn mask(&self) -> u32 {
        if self.segment.big() { u32::MAX } else { 0xffff }
    }

    /// The pointer `bytes` further down.
    pub(super) fn below(&self, bytes: u32) -> u32 {
        merge(self.pointer, self.pointer.wrapping_sub(bytes), self.mask())
    }

    /// The pointer `bytes` further up.
    pub(super) fn above(&self, bytes: u32) -> u32 {
        merge(self.pointer, self.pointer.wrapping_add(bytes), self.mask())
    }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// The stack at SS:ESP.
    pub(super) fn stack(&self) -> Stack {
        Stack {
            segment: *self.cpu.segment(Seg::Ss),
            pointer: self.cpu.gpr[ESP],
            user: self.user(),
            aligned: self.aligned(),
            fault: Exception::ss(0),
        }
    }

    /// SS's address size as a mask: SP or ESP, BP or EBP.
    pub(super) fn stack_mask(&self) -> u32 {
        self.stack().mask()
    }

    /// The checked linear address of a slot of `stack`.
    fn slot(&self, stack: &Stack, pointer: u32, width: Width, kind: AccessKind) -> Exec<Gva> {
        let offset = pointer & stack.mask();
        ensure(admits(&stack.segment, offset, width.bytes(), kind, self.cpu.protected()), stack.fault)?;
        let gva = Gva(stack.segment.base.wrapping_add(offset));
        ensure(gva.0 & (width.bytes() - 1) == 0 || !stack.aligned, Exception::AC)?;
        Ok(gva)
    }

    /// The linear address of `count` slots from `pointer` upwards, where they need no looking at one by one: they are in the
    /// segment, aligned as they must be, and in one page.
    fn whole(&self, stack: &Stack, pointer: u32, count: u32, width: Width, kind: AccessKind) -> Option<Gva> {
        let (offset, bytes) = (pointer & stack.mask(), count * width.bytes());
        let gva = Gva(stack.segment.base.wrapping_add(offset));
        let fits = bytes > 0
            && offset <= stack.mask() - (bytes - 1)
            && gva.offset() <= 4096 - bytes
            && (gva.0 & (width.bytes() - 1) == 0 || !stack.aligned);
        (fits && admits(&stack.segment, offset, bytes, kind, self.cpu.protected())).then_some(gva)
    }

    /// Checks `count` slots from `pointer` upwards, segment and pages, touching none. Goes from the top down, as
    /// pushes do, so that the first fault is the one that they would meet.
    fn probe_slots(
        &mut self,
        stack: &Stack,
        pointer: u32,
        count: u32,
        width: Width,
        kind: AccessKind,
    ) -> Exec {
        let bytes = width.bytes();
        let access = Access { kind, user: stack.user };
        let mut probed = None;
        for n in (0..count).rev() {
            let gva = self.slot(stack, pointer.wrapping_add(n * bytes), width, kind)?;
            let crosses = gva.wrapping_add(bytes - 1).page() != gva.page();
            if crosses || probed != Some(gva.page()) {
                self.bus.probe(gva, bytes, access)?;
                probed = Some(gva.page());
            }
        }
        Ok(())
    }

    /// Pushes `values`, the first one first, all or none. Returns the new pointer; the caller commits it.
    pub(super) fn push_frame(&mut self, stack: &Stack, values: &[u32], width: Width) -> Exec<u32> {
        let count = values.len() as u32;
        let bottom = stack.below(count * width.bytes());
        if let Some(gva) = self.whole(stack, bottom, count, width, AccessKind::Write) {
            self.push_whole(gva, stack.user, values, width)?;
            return Ok(bottom);
        }
        self.probe_slots(stack, bottom, count, width, AccessKind::Write)?;
        for (value, n) in values.iter().zip(1..) {
            let gva = self.slot(stack, stack.below(n * width.bytes()), width, AccessKind::Write)?;
            self.bus.write(gva, width, u64::from(value & width.mask()), Access::write(stack.user))?;
            self.watch(gva, width.bytes(), true);
        }
        Ok(bottom)
    }

    /// The same in one page, to `gva` and upwards; the topmost slot is what a fault is for.
    fn push_whole(&mut self, gva: Gva, user: bool, values: &[u32], width: Width) -> Exec {
        let (bytes, access) = (width.bytes(), Access::write(user));
        let slot = |n: u32| gva.wrapping_add(n * bytes);
        self.bus.probe(slot(values.len() as u32 - 1), bytes, access)?;
        for (value, n) in values.iter().zip((0..values.len() as u32).rev()) {
            self.bus.write(slot(n), width, u64::from(value & width.mask()), access)?;
            self.watch(slot(n), bytes, true);
        }
        Ok(())
    }

    /// The values of `N` slots from `skip` bytes above the pointer, the top of the stack first. They are read from the
    /// other end, as AMD has it. Moves no pointer.
    pub(super) fn peek_frame<const N: usize>(
        &mut self,
        stack: &Stack,
        skip: u32,
        width: Width,
    ) -> Exec<[u32; N]> {
        let mut values = [0; N];
        let pointer = stack.above(skip);
        if let Some(gva) = self.whole(stack, pointer, N as u32, width, AccessKind::Read) {
            for (value, n) in values.iter_mut().rev().zip((0..N as u32).rev()) {
                let slot = gva.wrapping_add(n * width.bytes());
                *value = self.bus.read(slot, width, Access::read(stack.user))? as u32;
                self.watch(slot, width.bytes(), false);
            }
            return Ok(values);
        }
        for (value, n) in values.iter_mut().rev().zip((0..N as u32).rev()) {
            *value = self.peek(stack, skip + n * width.bytes(), width)?;
        }
        Ok(values)
    }

    /// Reads the slot `skip` bytes above the pointer.
    pub(super) fn peek(&mut self, stack: &Stack, skip: u32, width: Width) -> Exec<u32> {
        let gva = self.slot(stack, stack.above(skip), width, AccessKind::Read)?;
        let value = self.bus.read(gva, width, Access::read(stack.user))?;
        self.watch(gva, width.bytes(), false);
        Ok(value as u32)
    }

    /// Pushes one value.
    pub(super) fn push(&mut self, width: Width, value: u32) -> Exec {
        let pointer = self.stack().below(width.bytes());
        self.store(Seg::Ss, pointer & self.stack_mask(), width, value)?;
        self.cpu.gpr[ESP] = pointer;
        Ok(())
    }

    /// Checks that one value can be pushed.
    pub(super) fn probe_push(&mut self, width: Width) -> Exec {
        self.probe_stack(self.stack().below(width.bytes()), 1, width, AccessKind::Write)
    }

    /// Reads the top of the stack without moving the pointer.
    pub(super) fn top(&mut self, width: Width) -> Exec<u32> {
        let offset = self.cpu.gpr[ESP] & self.stack_mask();
        self.load(Seg::Ss, offset, width)
    }

    /// Moves the pointer up: the last part of a pop.
    pub(super) fn release(&mut self, bytes: u32) {
        self.cpu.gpr[ESP] = self.stack().above(bytes);
    }

    /// Checks that `count` slots from `pointer` upwards on the current stack can be accessed.
    pub(super) fn probe_stack(&mut self, pointer: u32, count: u32, width: Width, kind: AccessKind) -> Exec {
        let stack = self.stack();
        self.probe_slots(&stack, pointer, count, width, kind)
    }
}
