//! The temporary highmem window: the only way by which VMM code reaches guest memory.
//!
//! Story: walker, interpreter, loader and devices map a guest frame here, touch it and let go. While it is
//! mapped the frame is pinned: it cannot change hands. This is the *local* kind: a stack per execution context,
//! strictly last in first out, that never sleeps. Mappings nest (a walk inside an emulated store inside a fault).
//!
//! A context that is switched away with mappings open takes its stack along, as it takes its registers: no slot is shared,
//! so none needs saving.
//!
//! Holds: INV-WINDOW-1, a frame's pins equal the open mappings of it, and the pool's slot. INV-WINDOW-2, mappings are released in
//! reverse order, never more than [`Context::depth_max`] at once; a breach prints the stack. INV-WINDOW-3, no mapping is open
//! at a point that sleeps ([`crate::lock_order::assert_may_sleep`]). The [`Tag`] of a mapping is for diagnostics: no
//! behaviour hangs on it.
//!
//! Not here: mappings that outlive a call (pool); where a mapping shows its frame (views).

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::Mmu;
use crate::addr::{Gfn, Mfn};
use crate::frames::{DIRTY, Frames};
use crate::lock_order;
use crate::machine::Machine;
use crate::p2m::PageState;
use crate::physical::Width;
use crate::rules::Rule;
use crate::sync::point;
use crate::views::Windows;

/// The most mappings that a context of any class may have open.
const DEPTH_MAX: usize = 4;

/// Who a stack belongs to: how deep its mappings may nest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// A vCPU: fills, and whatever is emulated for it.
    Vcpu,
    /// The VMM itself: loader, witness, explain, audit.
    Host,
}

impl Context {
    /// All of them.
    pub const ALL: [Context; 2] = [Context::Vcpu, Context::Host];

    /// The most mappings of it at once: a vCPU's access to two pages with a walk inside, and one to spare.
    pub const fn depth_max(self) -> usize {
        match self {
            Context::Vcpu => DEPTH_MAX,
            Context::Host => 2,
        }
    }

    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            Context::Vcpu => "vcpu",
            Context::Host => "host",
        }
    }
}

/// Why a frame was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// A guest page-table entry is read or gets its A or D bit.
    Walk,
    /// A shadow page is compared with its guest table.
    Sync,
    /// An emulated instruction's operand, or a code byte.
    Emulate,
    /// Loader, witness, explain: the VMM itself.
    Host,
}

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// To read.
    Read,
    /// To write too: what swap has of the page is no good any more.
    Write,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    gfn: Gfn,
    tag: Tag,
}

/// The mapping stack of one execution context.
#[derive(Debug)]
pub struct LocalStack {
    context: Context,
    slots: [Cell<Option<Slot>>; DEPTH_MAX],
    depth: Cell<usize>,
}

impl LocalStack {
    /// The empty stack of a context of that class.
    pub fn new(context: Context) -> LocalStack {
        LocalStack { context, slots: std::array::from_fn(|_| Cell::new(None)), depth: Cell::new(0) }
    }

    /// Mappings open now.
    pub fn depth(&self) -> usize {
        self.depth.get()
    }

    /// Maps `mfn`, which holds `gfn` and which the caller has pinned; the mapping has the pin from here on.
    ///
    /// # Panics
    ///
    /// On overflow (INV-WINDOW-2), with the stack: depth is bounded by the code's shape, not by a guest.
    #[inline]
    pub(crate) fn map<'a>(
        &'a self,
        windows: &'a Windows,
        frames: &'a Frames,
        gfn: Gfn,
        mfn: Mfn,
        tag: Tag,
    ) -> LocalMap<'a> {
        let index = self.depth.get();
        if index >= self.context.depth_max() {
            self.overflow(gfn, tag);
        }
        self.slots[index].set(Some(Slot { gfn, tag }));
        self.depth.set(index + 1);
        if windows.deepest(self.context) <= index as u32 {
            windows.note_depth(self.context, index + 1);
        }
        lock_order::mapped();
        LocalMap { stack: self, windows, frames, mfn, shown: windows.show(mfn), index: index as u32 }
    }

    /// The open mappings, outermost first, for diagnostics.
    fn stack(&self) -> String {
        let open = self.slots.iter().take(self.depth.get()).filter_map(|slot| slot.get());
        open.map(|slot| format!("[{} for {:?}]", slot.gfn, slot.tag)).collect()
    }

    #[cold]
    fn overflow(&self, gfn: Gfn, tag: Tag) -> ! {
        let (context, most) = (self.context, self.context.depth_max());
        panic!("INV-WINDOW-2: {gfn} for {tag:?} is one more than {context:?}'s {most}: {}", self.stack())
    }

    #[inline]
    fn release(&self, index: usize) {
        let top = self.depth.get().wrapping_sub(1);
        if index != top {
            self.out_of_order(index, top);
        }
        self.depth.set(top);
    }

    #[cold]
    fn out_of_order(&self, index: usize, top: usize) {
        if !std::thread::panicking() {
            panic!("INV-WINDOW-2: slot {index} released before slot {top}: {}", self.stack());
        }
    }
}

impl Mmu {
    /// Pins the frame of a page of guest memory, giving it one if it has never had any. `Err`: where the page is instead;
    /// what is memory ([`Mmu::bring_in`]) can be had after a sleep. Never sleeps.
    ///
    /// Pinned, then looked up again; whoever takes a frame away marks the page as moving and looks for pins then. One of
    /// the two sees the other, and gives way.
    #[inline]
    pub(crate) fn pin_page(&self, gfn: Gfn) -> Result<Mfn, PageState> {
        loop {
            let state = self.resident(gfn);
            let PageState::Resident(mfn) = state else { return Err(state) };
            point();
            self.frames.pin(mfn);
            if !self.rules.keep(Rule::PageAfterPin) || self.p2m.lookup(gfn) == state {
                return Ok(mfn);
            }
            self.frames.unpin(mfn);
        }
    }

    /// Maps a page of guest memory; `Err` as for [`Mmu::pin_page`].
    #[inline]
    pub(crate) fn map_page<'a>(
        &'a self,
        window: &'a LocalStack,
        gfn: Gfn,
        tag: Tag,
        intent: Intent,
    ) -> Result<LocalMap<'a>, PageState> {
        let mfn = self.pin_page(gfn)?;
        if intent == Intent::Write {
            self.will_write(gfn, mfn);
        }
        Ok(window.map(&self.windows, &self.frames, gfn, mfn, tag))
    }

    /// What swap has of a pinned page is no good any more.
    #[inline]
    pub(crate) fn will_write(&self, gfn: Gfn, mfn: Mfn) {
        if self.frames.flags(mfn) & DIRTY == 0 {
            self.mark_dirty(&self.buckets.lock(gfn), gfn, mfn);
        }
    }
}

/// A guest frame, mapped and pinned until this is dropped.
#[derive(Debug)]
pub struct LocalMap<'a> {
    stack: &'a LocalStack,
    windows: &'a Windows,
    frames: &'a Frames,
    mfn: Mfn,
    /// Where in the windows' memory it is seen.
    shown: Mfn,
    index: u32,
}

impl LocalMap<'_> {
    /// The frame it shows.
    pub fn mfn(&self) -> Mfn {
        self.mfn
    }

    /// Where it is seen: a memory, and the frame of it.
    #[inline]
    pub(crate) fn shown(&self) -> (&Machine, Mfn) {
        (self.windows.memory(), self.shown)
    }

    /// The aligned 4-byte word at byte `offset` of the frame.
    #[inline]
    pub fn word32(&self, offset: u32) -> &AtomicU32 {
        self.windows.memory().word32(self.shown.at(offset))
    }

    /// The aligned 8-byte word at byte `offset` of the frame.
    #[inline]
    pub fn word64(&self, offset: u32) -> &AtomicU64 {
        self.windows.memory().word64(self.shown.at(offset))
    }

    /// Copies out; `offset + buffer.len()` is at most a page.
    pub fn read(&self, offset: u32, buffer: &mut [u8]) {
        self.windows.memory().read(self.shown.at(offset), buffer);
    }

    /// Copies in; `offset + data.len()` is at most a page.
    pub fn write(&self, offset: u32, data: &[u8]) {
        self.windows.memory().write(self.shown.at(offset), data);
    }

    /// [`Machine::load`] at byte `offset`.
    #[inline]
    pub fn load(&self, offset: u32, width: Width) -> u64 {
        self.windows.memory().load(self.shown.at(offset), width)
    }

    /// [`Machine::store`] at byte `offset`.
    #[inline]
    pub fn store(&self, offset: u32, width: Width, value: u64) {
        self.windows.memory().store(self.shown.at(offset), width, value);
    }

    /// [`Machine::update`] at byte `offset`.
    #[inline]
    pub fn update(&self, offset: u32, width: Width, change: &mut dyn FnMut(u64) -> u64) -> u64 {
        self.windows.memory().update(self.shown.at(offset), width, change)
    }
}

impl Drop for LocalMap<'_> {
    #[inline]
    fn drop(&mut self) {
        self.windows.hide(self.shown);
        self.frames.unpin(self.mfn);
        lock_order::unmapped();
        self.stack.release(self.index as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::{Draw, FrameKind};

    /// As [`Mmu::map_page`] does.
    fn map<'a>(stack: &'a LocalStack, windows: &'a Windows, frames: &'a Frames, mfn: Mfn) -> LocalMap<'a> {
        frames.pin(mfn);
        stack.map(windows, frames, Gfn(99), mfn, Tag::Host)
    }

    fn world() -> (Windows, Frames, LocalStack, Mfn) {
        let frames = Frames::new(8, 0, 0);
        let fresh = frames.allocate(FrameKind::Guest(Gfn(99)), Draw::Ordinary).unwrap();
        (Windows::pinned(Machine::anonymous(8)), frames, LocalStack::new(Context::Host), fresh.mfn)
    }

    #[test]
    fn a_mapping_pins_its_frame_and_nests() {
        let (windows, frames, stack, mfn) = world();
        let outer = map(&stack, &windows, &frames, mfn);
        let inner = map(&stack, &windows, &frames, mfn);
        outer.write(4090, b"abcdef");
        let mut back = [0; 6];
        inner.read(4090, &mut back);
        assert_eq!((&back, frames.pins(mfn), stack.depth()), (b"abcdef", 2, 2));
        drop(inner);
        drop(outer);
        assert_eq!((frames.pins(mfn), stack.depth()), (0, 0));
        assert_eq!(windows.deepest(Context::Host), 2);
    }

    #[test]
    fn a_context_takes_its_mappings_along_when_it_is_switched() {
        let (windows, frames, first, mfn) = world();
        let second = LocalStack::new(Context::Vcpu);
        let a = map(&first, &windows, &frames, mfn);
        let b = map(&second, &windows, &frames, mfn);
        // Back in the first, whose mapping is the older one.
        drop(a);
        assert_eq!((frames.pins(mfn), first.depth(), second.depth()), (1, 0, 1));
        drop(b);
        assert_eq!(windows.deepest(Context::Vcpu), 1);
    }

    #[test]
    #[should_panic(expected = "INV-WINDOW-2")]
    fn a_release_out_of_order_is_caught() {
        let (windows, frames, stack, mfn) = world();
        let a = map(&stack, &windows, &frames, mfn);
        let _b = map(&stack, &windows, &frames, mfn);
        drop(a);
    }

    #[test]
    #[should_panic(expected = "is one more than Host's 2")]
    fn an_overflow_is_caught() {
        let (windows, frames, stack, mfn) = world();
        let _all: Vec<_> =
            (0..=Context::Host.depth_max()).map(|_| map(&stack, &windows, &frames, mfn)).collect();
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "INV-WINDOW-3")]
    fn sleeping_with_a_mapping_open_is_caught() {
        let (windows, frames, stack, mfn) = world();
        let _map = map(&stack, &windows, &frames, mfn);
        lock_order::assert_may_sleep();
    }
}
