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

/// A type that puts its thread into a scope for as long as a value of it lives.
macro_rules! scope {
    ($(#[$docs:meta])* $name:ident, $depth:ident) => {
        $(#[$docs])*
        #[derive(Debug)]
        #[must_use]
        pub struct $name(PhantomData<*const ()>);

        impl $name {
            /// Enters the scope.
            pub fn enter() -> $name {
                change(|now| now.$depth += 1);
                $name(PhantomData)
            }

            /// True within one.
            pub fn is_entered() -> bool {
                DEPTHS.with(Cell::get).$depth > 0
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                change(|now| now.$depth -= 1);
            }
        }
    };
}

scope! {
    /// While it lives, reclaim that this thread does starts no I/O.
    NoIo, no_io
}
scope! {
    /// While it lives, this thread may take from the reserve, and does not reclaim for a frame.
    MemAlloc, mem_alloc
}
scope! {
    /// While it lives, this thread may not sleep (INV-WAIT-2).
    NoSleep, no_sleep
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
