//! The one door to locks, atomics and threads.
//!
//! Story: every other module takes its primitives from here, so that a model checker's stand-ins can be put in
//! one place. Holds: no other module of this crate names `std::sync` or starts, yields or parks a thread by `std` (guest
//! memory's own atomics excepted: they live in shared mappings and are reached through `vm-memory`).
//!
//! | built with | what stands here | who runs it |
//! |---|---|---|
//! | nothing | `std` | everybody |
//! | `RUSTFLAGS="--cfg loom"` | loom's, with sequentially consistent atomics as x86 has them (`sync/weak.rs`) | the small models, `interleave` modules |
//! | `RUSTFLAGS="--cfg shuttle"` | shuttle's | whole operations, `tests/interleave` |
//!
//! `Arc` and [`OnceLock`] are `std`'s always: no protocol of ours hangs on the first, and the second is made at its
//! first use without a switch of threads in between.
//!
//! Locks: [`Lock`] carries its [`Level`] and checks the order in debug builds. It spins, and yields the CPU as it does: its
//! holders never sleep, and letting go of it is a plain store, which makes it half as dear as one that can wake a sleeper. It
//! knows no poison: a panic is a bug that ends the run, and the guard's owner leaves nothing half done that matters after.

#[cfg(not(any(loom, shuttle)))]
pub mod sim;
mod wait;
#[cfg(loom)]
mod weak;

use std::ops::{Deref, DerefMut};
#[cfg(any(loom, shuttle))]
use std::sync::PoisonError;

#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(shuttle)]
use shuttle::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(any(loom, shuttle)))]
use sim::Bed as Condvar;
#[cfg(not(any(loom, shuttle)))]
use std::sync::{Mutex, MutexGuard};

#[cfg(shuttle)]
pub use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, fence};
pub use std::sync::Arc;
pub use std::sync::OnceLock;
pub use std::sync::atomic::Ordering;
#[cfg(not(any(loom, shuttle)))]
pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, fence};
pub use wait::{Having, Thing, Wait, holds, lets_go};
#[cfg(loom)]
pub use weak::{AtomicBool, AtomicU32, AtomicU64, fence};

use crate::lock_order::{self, Level};

/// Threads.
pub mod thread {
    #[cfg(loom)]
    pub use loom::thread::{JoinHandle, spawn, yield_now};
    #[cfg(shuttle)]
    pub use shuttle::thread::{JoinHandle, spawn, yield_now};
    #[cfg(not(any(loom, shuttle)))]
    pub use std::thread::{JoinHandle, spawn};

    /// Lets others run, for one who looks again then.
    #[cfg(not(any(loom, shuttle)))]
    pub fn yield_now() {
        if !super::sim::spin(super::Wait::idle("another to get on")) {
            std::thread::yield_now();
        }
    }

    /// The same, of one who looks for as long as it takes, and can say what for.
    pub fn yield_for(wait: impl FnOnce() -> super::Wait) {
        #[cfg(not(any(loom, shuttle)))]
        if super::sim::is_on() && super::sim::spin(wait()) {
            return;
        }
        #[cfg(any(loom, shuttle))]
        let _ = wait;
        yield_now();
    }

    /// Lets others run for a while, 100 microseconds or so.
    pub fn nap() {
        #[cfg(not(any(loom, shuttle)))]
        {
            const NAP: std::time::Duration = std::time::Duration::from_micros(100);
            if !super::sim::sleep(NAP, "a while to pass") {
                std::thread::sleep(NAP);
            }
        }
        #[cfg(any(loom, shuttle))]
        yield_now();
    }
}

/// Looks at `done` a few times, for about two microseconds, before the caller does anything that costs as much; says
/// whether it was so. A model checker, to which time is nothing, goes on at once.
#[inline]
pub fn spin_until(mut done: impl FnMut() -> bool) -> bool {
    const LOOKS: u32 = if cfg!(any(loom, shuttle)) { 0 } else { 64 };
    #[cfg(not(any(loom, shuttle)))]
    if sim::is_on() {
        // Nobody else runs meanwhile.
        return done();
    }
    for _ in 0..LOOKS {
        if done() {
            return true;
        }
        std::hint::spin_loop();
    }
    false
}

/// Where another thread may come in: called before words of machine memory that threads race for, which shuttle does
/// not see, and where a thread may be for long with something half done. Elsewhere it is for simulations ([`sim`]), and for
/// tests that come in by themselves (`rules::at_point`).
#[inline(always)]
pub fn point() {
    #[cfg(all(feature = "omissions", debug_assertions))]
    crate::rules::pass_point();
    #[cfg(not(any(loom, shuttle)))]
    sim::point();
    // It has no time: to sleep is to let the scheduler choose, and no hint that this thread waits for something.
    #[cfg(shuttle)]
    shuttle::thread::sleep(std::time::Duration::ZERO);
}

/// Writes a line to the log of this thread's simulation, if it is in one.
#[inline]
pub fn note(say: impl FnOnce(&mut String)) {
    #[cfg(not(any(loom, shuttle)))]
    sim::note(say);
    #[cfg(any(loom, shuttle))]
    let _ = say;
}

/// `fetch_max`, sequentially consistent, by a compare-and-exchange, which is what a CPU has too: ThreadSanitizer does not see the other.
#[cfg(not(loom))]
pub fn raise(word: &AtomicU64, to: u64) {
    let mut now = word.load(Ordering::Relaxed);
    // It stores in any case, for what that orders.
    while let Err(other) = word.compare_exchange_weak(now, now.max(to), Ordering::SeqCst, Ordering::Relaxed) {
        now = other;
    }
}

/// The same in one step: a model of two would be much larger, and no other.
#[cfg(loom)]
pub fn raise(word: &AtomicU64, to: u64) {
    word.fetch_max(to, Ordering::SeqCst);
}

/// True once in `one_in` times, where this thread's simulation says so: for failures that it injects. Never for 0, nor elsewhere.
pub fn strikes(one_in: u32) -> bool {
    #[cfg(not(any(loom, shuttle)))]
    return one_in > 0 && sim::choose(u64::from(one_in)) == Some(0);
    #[cfg(any(loom, shuttle))]
    {
        let _ = one_in;
        false
    }
}

/// A device's transfer begins: it takes its time in a simulation.
pub fn transfer() {
    #[cfg(not(any(loom, shuttle)))]
    sim::transfer();
}

/// `count` atomics, or groups of them, all zero. They cost no memory before they are touched.
#[cfg(not(any(loom, shuttle)))]
pub fn zeroed<T: bytemuck::Zeroable>(count: usize) -> Box<[T]> {
    bytemuck::zeroed_slice_box(count)
}

/// `count` atomics, or groups of them, all zero.
#[cfg(any(loom, shuttle))]
pub fn zeroed<T: Default>(count: usize) -> Box<[T]> {
    (0..count).map(|_| T::default()).collect()
}

/// A spinning lock; a model checker's is its own.
mod brief {
    #[cfg(loom)]
    pub use loom::sync::{Mutex, MutexGuard as Guard};
    #[cfg(shuttle)]
    pub use shuttle::sync::{Mutex, MutexGuard as Guard};
    #[cfg(not(any(loom, shuttle)))]
    pub type Mutex<T> = spin::mutex::SpinMutex<T, spin::relax::Yield>;
    #[cfg(not(any(loom, shuttle)))]
    pub use spin::mutex::SpinMutexGuard as Guard;

    /// Takes it.
    #[inline]
    pub fn lock<T>(mutex: &Mutex<T>, thing: super::Thing) -> Guard<'_, T> {
        #[cfg(any(loom, shuttle))]
        {
            let _ = thing;
            mutex.lock().unwrap_or_else(super::PoisonError::into_inner)
        }
        #[cfg(not(any(loom, shuttle)))]
        mutex.try_lock().unwrap_or_else(|| wait(mutex, thing))
    }

    /// Its holder never sleeps; in a simulation it may wait for its turn.
    #[cfg(not(any(loom, shuttle)))]
    #[cold]
    fn wait<T>(mutex: &Mutex<T>, thing: super::Thing) -> Guard<'_, T> {
        while super::sim::spin(super::Wait::from("a lock").of(thing)) {
            if let Some(guard) = mutex.try_lock() {
                super::sim::goes_on();
                return guard;
            }
        }
        mutex.lock()
    }
}

/// A mutual-exclusion lock with a place in the lock order.
#[derive(Debug)]
pub struct Lock<T> {
    level: Level,
    inner: brief::Mutex<T>,
}

/// Proof that the [`Lock`] is held.
#[derive(Debug)]
pub struct Guard<'a, T> {
    // The first to go: the place in the order, then the lock.
    _place: Place,
    inner: brief::Guard<'a, T>,
}

/// The guard's entry on this thread's stack of levels, for the lock at an address.
#[derive(Debug)]
struct Place(Level, usize);

impl Place {
    #[inline]
    fn take(level: Level, at: usize) -> Place {
        lock_order::taken(level, at);
        Place(level, at)
    }
}

impl Drop for Place {
    #[inline]
    fn drop(&mut self) {
        lock_order::released(self.0, self.1);
    }
}

impl<T> Lock<T> {
    /// A new lock around `value`, at `level` of the order.
    pub fn new(level: Level, value: T) -> Lock<T> {
        Lock { level, inner: brief::Mutex::new(value) }
    }

    /// Takes the lock, waiting for its holder. Holders never sleep, so the wait is short.
    #[inline]
    pub fn lock(&self) -> Guard<'_, T> {
        self.lock_as(self.level)
    }

    /// Takes the lock at another place of the order than it was made with: for things that change roles, as a
    /// slot for shadow pages does.
    #[inline]
    pub fn lock_as(&self, level: Level) -> Guard<'_, T> {
        let at = std::ptr::from_ref(self) as usize;
        let place = Place::take(level, at);
        Guard { _place: place, inner: brief::lock(&self.inner, Thing::lock(level, at)) }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Guard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// Something that threads sleep on until it has changed: a lock whose takers may sleep with it, and the way to wake them.
#[derive(Debug)]
pub struct Monitor<T> {
    level: Level,
    inner: Mutex<T>,
    changed: Condvar,
}

/// Proof that the [`Monitor`] is held.
#[derive(Debug)]
pub struct MonitorGuard<'a, T> {
    monitor: &'a Monitor<T>,
    place: Place,
    inner: MutexGuard<'a, T>,
}

impl<T> Monitor<T> {
    /// A new monitor of `value`, at `level` of the order.
    pub fn new(level: Level, value: T) -> Monitor<T> {
        Monitor { level, inner: Mutex::new(value), changed: Condvar::new() }
    }

    /// Takes the lock, waiting for its holder.
    pub fn lock(&self) -> MonitorGuard<'_, T> {
        let place = Place::take(self.level, self.at());
        MonitorGuard { monitor: self, place, inner: self.take() }
    }

    fn at(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    #[cfg(not(any(loom, shuttle)))]
    fn take(&self) -> MutexGuard<'_, T> {
        sim::lock(&self.inner, self.thing())
    }

    #[cfg(any(loom, shuttle))]
    fn take(&self) -> MutexGuard<'_, T> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(not(any(loom, shuttle)))]
    fn thing(&self) -> Thing {
        Thing::lock(self.level, self.at())
    }

    /// Sleeps until notified, with the lock let go of.
    #[cfg(not(any(loom, shuttle)))]
    fn sleep<'a>(&'a self, inner: MutexGuard<'a, T>, wait: Wait) -> MutexGuard<'a, T> {
        self.changed.wait(&self.inner, self.thing(), inner, wait)
    }

    #[cfg(any(loom, shuttle))]
    fn sleep<'a>(&'a self, inner: MutexGuard<'a, T>, _wait: Wait) -> MutexGuard<'a, T> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all who sleep here. Whoever changed what they sleep for without the lock takes it once before.
    pub fn notify_all(&self) {
        self.changed.notify_all();
    }
}

impl<'a, T> MonitorGuard<'a, T> {
    /// Lets go of the lock, sleeps until notified, and takes the lock again. It may return for no reason: look again. `wait`
    /// says what for: words are enough.
    ///
    /// # Panics
    ///
    /// In debug builds if the thread holds a lock of this crate (INV-LOCK-2).
    pub fn wait(self, wait: impl Into<Wait>) -> MonitorGuard<'a, T> {
        let MonitorGuard { monitor, place, inner } = self;
        drop(place);
        lock_order::assert_may_sleep();
        let inner = monitor.sleep(inner, wait.into());
        MonitorGuard { monitor, place: Place::take(monitor.level, monitor.at()), inner }
    }
}

impl<T> Deref for MonitorGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for MonitorGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_sleeper_lets_go_of_its_lock_and_has_it_again_after() {
        let bed = Arc::new(Monitor::new(lock_order::SLEEPERS, false));
        let other = bed.clone();
        let waker = thread::spawn(move || {
            *other.lock() = true;
            other.notify_all();
        });
        let mut said = bed.lock();
        while !*said {
            said = said.wait("a word");
        }
        drop(said);
        lock_order::assert_may_sleep();
        waker.join().expect("it panics nowhere");
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "INV-LOCK-2")]
    fn waiting_with_another_lock_held_is_caught() {
        let (outer, bed) = (Lock::new(lock_order::BUCKET, ()), Monitor::new(lock_order::SLEEPERS, ()));
        let _outer = outer.lock();
        let _ = bed.lock().wait("nothing");
    }
}
