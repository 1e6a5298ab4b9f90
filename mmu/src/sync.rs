//! The one door to locks, atomics and threads.
//!
//! Story: every other module takes its primitives from here, so that a model checker's stand-ins can be put in
//! one place. Holds: no other module of this crate names `std::sync` (guest memory's own atomics excepted: they
//! live in shared mappings and are reached through `vm-memory`).
//!
//! Locks: [`Lock`] carries its [`Level`] and checks the order in debug builds. It spins, and yields the CPU as it does: its
//! holders never sleep, and letting go of it is a plain store, which makes it half as dear as one that can wake a sleeper. It
//! knows no poison: a panic is a bug that ends the run, and the guard's owner leaves nothing half done that matters after.

use std::ops::{Deref, DerefMut};

use spin::mutex::{SpinMutex, SpinMutexGuard};
use spin::relax::Yield;

pub use std::sync::Arc;
pub use std::sync::OnceLock;
pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use crate::lock_order::{self, Level};

/// A mutual-exclusion lock with a place in the lock order.
#[derive(Debug)]
pub struct Lock<T> {
    level: Level,
    inner: SpinMutex<T, Yield>,
}

/// Proof that the [`Lock`] is held.
#[derive(Debug)]
pub struct Guard<'a, T> {
    level: Level,
    inner: SpinMutexGuard<'a, T>,
}

impl<T> Lock<T> {
    /// A new lock around `value`, at `level` of the order.
    pub fn new(level: Level, value: T) -> Lock<T> {
        Lock { level, inner: SpinMutex::new(value) }
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
        lock_order::taken(level);
        Guard { level, inner: self.inner.lock() }
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

impl<T> Drop for Guard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        lock_order::released(self.level);
    }
}
