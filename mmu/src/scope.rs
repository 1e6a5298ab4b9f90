//! Scopes: what may be done on behalf of the thread that called.
//!
//! Story: a thread that holds something which reclaim's own I/O may want enters [`NoIo`]: reclaim then drops clean pages
//! and writes none. Who makes frames free is in [`MemAlloc`]: it may take from the reserve, and does not reclaim to make
//! room for itself, which might never end. Who may not sleep is in [`NoSleep`], and debug builds assert at every point that
//! may sleep that nobody there is. Scopes nest, and end where their guard does.
//!
//! See: the reclaim deadlocks of 1999, where a filesystem's lock was held by whoever had to wait for its own write.

use std::cell::Cell;
use std::marker::PhantomData;

#[derive(Clone, Copy, Default)]
struct Depths {
    no_io: u32,
    mem_alloc: u32,
    no_sleep: u32,
}

macro_rules! threads {
    ($path:path) => {
        $path! {
            static DEPTHS: Cell<Depths> = Cell::new(Depths::default());
        }
    };
}
#[cfg(loom)]
threads!(loom::thread_local);
#[cfg(shuttle)]
threads!(shuttle::thread_local);
#[cfg(not(any(loom, shuttle)))]
threads!(std::thread_local);

fn change(by: impl FnOnce(&mut Depths)) {
    DEPTHS.with(|depths| {
        let mut now = depths.get();
        by(&mut now);
        depths.set(now);
    });
}

/// While it lives, reclaim that this thread does starts no I/O.
#[derive(Debug)]
#[must_use]
pub struct NoIo(PhantomData<*const ()>);

impl NoIo {
    /// Enters the scope.
    pub fn enter() -> NoIo {
        change(|now| now.no_io += 1);
        NoIo(PhantomData)
    }

    /// True within one.
    pub fn is_entered() -> bool {
        DEPTHS.with(Cell::get).no_io > 0
    }
}

impl Drop for NoIo {
    fn drop(&mut self) {
        change(|now| now.no_io -= 1);
    }
}

/// While it lives, this thread may take from the reserve, and does not reclaim for a frame.
#[derive(Debug)]
#[must_use]
pub struct MemAlloc(PhantomData<*const ()>);

impl MemAlloc {
    /// Enters the scope.
    pub fn enter() -> MemAlloc {
        change(|now| now.mem_alloc += 1);
        MemAlloc(PhantomData)
    }

    /// True within one.
    pub fn is_entered() -> bool {
        DEPTHS.with(Cell::get).mem_alloc > 0
    }
}

impl Drop for MemAlloc {
    fn drop(&mut self) {
        change(|now| now.mem_alloc -= 1);
    }
}

/// While it lives, this thread may not sleep (INV-WAIT-2).
#[derive(Debug)]
#[must_use]
pub struct NoSleep(PhantomData<*const ()>);

impl NoSleep {
    /// Enters the scope.
    pub fn enter() -> NoSleep {
        change(|now| now.no_sleep += 1);
        NoSleep(PhantomData)
    }

    /// True within one.
    pub fn is_entered() -> bool {
        DEPTHS.with(Cell::get).no_sleep > 0
    }
}

impl Drop for NoSleep {
    fn drop(&mut self) {
        change(|now| now.no_sleep -= 1);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn scopes_nest_and_are_a_threads_own() {
        let outer = NoIo::enter();
        let inner = NoIo::enter();
        drop(outer);
        assert!(NoIo::is_entered() && !MemAlloc::is_entered());
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(!NoIo::is_entered()));
        });
        drop(inner);
        assert!(!NoIo::is_entered());
        let _alloc = MemAlloc::enter();
        assert!(MemAlloc::is_entered());
    }
}
