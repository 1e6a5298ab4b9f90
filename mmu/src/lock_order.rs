//! The lock order of the mmu crate: the whole of it, in one place.
//!
//! Story: every lock is made with a [`Level`]; debug builds keep, per thread, the levels held and assert that
//! each new one is higher. Holds: INV-LOCK-1, levels rise strictly along every thread's stack of locks.
//! INV-LOCK-2, nothing sleeps with one of these held ([`assert_may_sleep`]). INV-WINDOW-3, nor with a window open.
//! INV-WAIT-2, nor on behalf of a caller that may not ([`crate::scope::NoSleep`]).
//!
//! Numbers have gaps for what is still to come. Release builds compile all of it away.
//!
//! See: docs/ARCHITECTURE.md, "Threads and locks".

/// Where a lock stands in the order; a thread may only take higher ones than it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level {
    number: u16,
    /// For reports of what debug builds check: release builds have many locks, and no use for it.
    #[cfg(debug_assertions)]
    name: &'static str,
}

impl Level {
    const fn new(number: u16, name: &'static str) -> Level {
        let _ = name;
        Level {
            number,
            #[cfg(debug_assertions)]
            name,
        }
    }

    /// What a simulation calls a lock of it.
    #[cfg(not(any(loom, shuttle)))]
    pub(crate) const fn name(self) -> &'static str {
        #[cfg(debug_assertions)]
        return self.name;
        #[cfg(not(debug_assertions))]
        "some"
    }
}

/// What the model of the guest's TLBs has for one vCPU; memory is read with it held.
pub const GUEST_CPU: Level = Level::new(200, "guest TLB of a vCPU");
/// The guest's tables, as that model knows them.
pub const GUEST_TABLES: Level = Level::new(210, "guest tables known");
/// What it has found.
pub const GUEST_VERDICTS: Level = Level::new(220, "guest TLB verdicts");
/// The table of roots.
pub const ROOTS: Level = Level::new(300, "roots");
/// A shard of the shadow page cache: guest table -> its shadow pages.
pub const SHADOW_CACHE: Level = Level::new(350, "shadow cache");
/// A shadow page of the second level (page directories); parents come before children.
pub const SHADOW_L2: Level = Level::new(420, "shadow page, level 2");
/// A shadow page of the first level (page tables).
pub const SHADOW_L1: Level = Level::new(430, "shadow page, level 1");
/// The free list of shadow pages.
pub const SHADOW_FREE: Level = Level::new(450, "shadow page free list");
/// A bucket of the reverse map.
pub const BUCKET: Level = Level::new(500, "bucket");
/// The large leaves of a range.
pub const LARGE: Level = Level::new(530, "large leaves");
/// Which importers have which page.
pub const EXTERNAL: Level = Level::new(540, "importers");
/// Which pages may be imported.
pub const SEGMENTS: Level = Level::new(545, "segments");
/// Which pages somebody asks to be left alone.
pub const ASKED: Level = Level::new(560, "pages asked for");
/// Which frames may be reclaimed, in what order.
pub const LRU: Level = Level::new(580, "frame lists");
/// The frame allocator.
pub const FRAMES: Level = Level::new(600, "frames");
/// The list of unsync guest tables.
pub const UNSYNC: Level = Level::new(620, "unsync list");
/// Who has each swap slot.
pub const SWAP_MAP: Level = Level::new(630, "swap map");
/// A cluster of the swap device in memory.
pub const SWAP_CLUSTER: Level = Level::new(632, "swap cluster");
/// The log of what a notifier shootdown still owes.
pub const REMOVALS: Level = Level::new(640, "removal log");
/// The records of invalidations.
pub const RECORDS: Level = Level::new(660, "invalidation records");
/// That swap has failed.
pub const FAILED: Level = Level::new(690, "swap failure");
/// What sleepers sleep on: at a gate, for work, for a window slot.
pub const SLEEPERS: Level = Level::new(700, "sleepers");

#[cfg(debug_assertions)]
mod held {
    use std::cell::{Cell, RefCell};

    use super::Level;
    use crate::scope::NoSleep;

    // A model checker runs many threads of its own on one of the system's, and has their locals.
    #[cfg(loom)]
    use loom::thread_local;
    #[cfg(shuttle)]
    use shuttle::thread_local;
    #[cfg(not(any(loom, shuttle)))]
    use std::thread_local;

    thread_local! {
        /// Each with its lock's address.
        static HELD: RefCell<Vec<(Level, usize)>> = RefCell::default();
        static MAPPED: Cell<u32> = Cell::default();
    }

    pub fn mapped() {
        MAPPED.with(|open| open.set(open.get() + 1));
    }

    pub fn unmapped() {
        MAPPED.with(|open| open.set(open.get() - 1));
    }

    pub fn taken(level: Level, at: usize) {
        with(|held| {
            if let Some((top, _)) = held.iter().max() {
                assert!(*top < level, "INV-LOCK-1: {level:?} taken while holding {:?}", levels(held));
            }
            held.push((level, at));
        });
    }

    pub fn released(level: Level, at: usize) {
        with(|held| {
            let at = held.iter().rposition(|one| *one == (level, at)).expect("a released lock was held");
            held.remove(at);
        });
    }

    #[cfg(not(any(loom, shuttle)))]
    pub fn addresses(into: &mut Vec<usize>) {
        with(|held| into.extend(held.iter().map(|(_, at)| *at)));
    }

    fn levels(held: &[(Level, usize)]) -> Vec<Level> {
        held.iter().map(|(level, _)| *level).collect()
    }

    pub fn assert_none() {
        with(|held| assert!(held.is_empty(), "INV-LOCK-2: about to sleep holding {:?}", levels(held)));
        let open = MAPPED.with(Cell::get);
        assert!(open == 0, "INV-WINDOW-3: about to sleep with {open} local mappings open");
        assert!(!NoSleep::is_entered(), "INV-WAIT-2: about to sleep for a caller that may not");
    }

    fn with<T>(look: impl FnOnce(&mut Vec<(Level, usize)>) -> T) -> T {
        HELD.with(|held| look(&mut held.borrow_mut()))
    }
}

/// Records that this thread holds `level` now, or is about to, by the lock at that address. Panics (debug builds) when that breaks
/// the order.
#[inline]
pub(crate) fn taken(level: Level, at: usize) {
    #[cfg(debug_assertions)]
    held::taken(level, at);
    let _ = (level, at);
}

/// Records that this thread has let go of `level`.
#[inline]
pub(crate) fn released(level: Level, at: usize) {
    #[cfg(debug_assertions)]
    held::released(level, at);
    let _ = (level, at);
}

/// The addresses of the locks that this thread holds or is about to; of none where they are not recorded.
#[cfg(not(any(loom, shuttle)))]
pub(crate) fn addresses(into: &mut Vec<usize>) {
    #[cfg(debug_assertions)]
    held::addresses(into);
    let _ = into;
}

/// Records that this thread has one more local mapping open.
#[inline]
pub(crate) fn mapped() {
    #[cfg(debug_assertions)]
    held::mapped();
}

/// Records that it has let go of one.
#[inline]
pub(crate) fn unmapped() {
    #[cfg(debug_assertions)]
    held::unmapped();
}

/// Asserts (debug builds) that this thread holds no lock of this crate and no local mapping, and is not in a scope that forbids
/// it: called at every point that may sleep.
#[inline]
pub fn assert_may_sleep() {
    #[cfg(debug_assertions)]
    held::assert_none();
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;
    use crate::sync::Lock;

    #[test]
    #[should_panic(expected = "INV-LOCK-1")]
    fn taking_a_lower_lock_than_held_is_caught() {
        let bucket = Lock::new(BUCKET, ());
        let page = Lock::new(SHADOW_L1, ());
        let _bucket = bucket.lock();
        let _page = page.lock();
    }

    #[test]
    #[should_panic(expected = "INV-LOCK-1")]
    fn taking_two_of_one_level_is_caught() {
        let (a, b) = (Lock::new(BUCKET, ()), Lock::new(BUCKET, ()));
        let _a = a.lock();
        let _b = b.lock();
    }

    #[test]
    #[should_panic(expected = "INV-LOCK-2")]
    fn sleeping_with_a_lock_held_is_caught() {
        let frames = Lock::new(FRAMES, ());
        let _frames = frames.lock();
        assert_may_sleep();
    }

    #[test]
    #[should_panic(expected = "INV-WAIT-2")]
    fn sleeping_for_a_caller_that_may_not_is_caught() {
        let _scope = crate::scope::NoSleep::enter();
        assert_may_sleep();
    }

    #[test]
    fn rising_order_and_release_in_any_order_pass() {
        let (a, b) = (Lock::new(SHADOW_L1, ()), Lock::new(BUCKET, ()));
        let first = a.lock();
        let second = b.lock();
        drop(first);
        drop(second);
        assert_may_sleep();
    }
}
