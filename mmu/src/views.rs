//! How VMM code sees the frames: all of them at all times, or none but those that it has opened.
//!
//! Story: the hardware, and the software TLB that stands for it, see every frame always; that is what KVM's slot maps. VMM
//! code has views of its own. With *pinned* windows those are the same mapping, and what a window does is to count. With
//! *mapped* windows ([`Views`]) a frame of the guest has no address in the VMM but the window's, for as long as the window is
//! open: whoever reaches around the window, or holds on to it, crashes at once.
//!
//! ```text
//!                 pinned         mapped
//!   hardware      all frames     all frames
//!   tables        all frames     the frames of shadow tables; a touch of another is a crash
//!   windows       all frames     slots, each a page that shows a frame or nothing
//! ```
//!
//! Holds: INV-VIEW-1, `tables` is used for shadow tables alone, `hardware` by the software TLB alone; mapped windows crash
//! where the first is broken.
//!
//! See: the highmem debugging of kernels with 32-bit addresses, which had no mapping to fall back upon.

use std::fmt::Debug;

use crate::addr::Mfn;
use crate::lock_order;
use crate::machine::Machine;
use crate::sync::{Arc, AtomicU32, Ordering};
use crate::window::Context;

/// Mapped windows. Whoever implements this maps and unmaps pages; none of it may fail, nor sleep for long.
pub trait Views: Debug + Send + Sync {
    /// All frames; those that no table is in cannot be touched.
    fn tables(&self) -> Machine;
    /// Lets the frame be touched through [`Views::tables`], or forbids it again. At first it is forbidden.
    fn open_table(&self, frame: Mfn, open: bool);
    /// The slots, as a memory whose frames are they.
    fn slots(&self) -> Machine;
    /// Shows `frame` in a slot that shows nothing, until it is hidden. Returns the slot.
    fn show(&self, frame: Mfn) -> Mfn;
    /// Nothing is shown in the slot any more: a touch of it is a crash.
    fn hide(&self, slot: Mfn);
}

/// Where windows show frames.
#[derive(Debug)]
pub(crate) struct Windows {
    memory: Machine,
    views: Option<Arc<dyn Views>>,
    /// The most mappings that a context of each class has had open at once.
    deepest: [AtomicU32; Context::ALL.len()],
}

impl Windows {
    /// Windows upon the machine itself.
    pub fn pinned(machine: Machine) -> Windows {
        Windows { memory: machine, views: None, deepest: Default::default() }
    }

    /// Windows that have mappings of their own.
    pub fn mapped(views: Arc<dyn Views>) -> Windows {
        Windows { memory: views.slots(), views: Some(views), deepest: Default::default() }
    }

    /// What frames are shown in.
    #[inline]
    pub fn memory(&self) -> &Machine {
        &self.memory
    }

    /// True when a frame that no window shows cannot be touched.
    #[inline]
    pub fn is_mapped(&self) -> bool {
        self.views.is_some()
    }

    /// Shows a frame until it is hidden: where in [`Windows::memory`].
    #[inline]
    pub fn show(&self, frame: Mfn) -> Mfn {
        match &self.views {
            None => frame,
            Some(views) => views.show(frame),
        }
    }

    /// Ends what [`Windows::show`] began.
    #[inline]
    pub fn hide(&self, shown: Mfn) {
        if let Some(views) = &self.views {
            views.hide(shown);
        }
    }

    /// Calls `touch` with a frame that stays what it is: a fresh one, one whose page is moving, any while the guest stands.
    pub fn with_frame<T>(&self, frame: Mfn, touch: impl FnOnce(&Machine, Mfn) -> T) -> T {
        let shown = self.show(frame);
        lock_order::mapped();
        let value = touch(&self.memory, shown);
        lock_order::unmapped();
        self.hide(shown);
        value
    }

    /// Notes that a context of that class has so many mappings open.
    #[cold]
    pub fn note_depth(&self, context: Context, depth: usize) {
        self.deepest[context as usize].fetch_max(depth as u32, Ordering::Relaxed);
    }

    /// The most mappings that a context of that class has had open at once.
    #[inline]
    pub fn deepest(&self, context: Context) -> u32 {
        self.deepest[context as usize].load(Ordering::Relaxed)
    }

    /// Opens or closes a frame for a table.
    pub fn open_table(&self, frame: Mfn, open: bool) {
        if let Some(views) = &self.views {
            views.open_table(frame, open);
        }
    }
}
