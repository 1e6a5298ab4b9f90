//! Who sleeps at a closed gate is woken when it opens.
//!
//! ```text
//! waiter                                opener
//! waiters += 1                          in_progress -= 1
//! lock                                  waiters > 0?
//! while in_progress > 0: sleep            lock, unlock
//! unlock                                  notify all
//! waiters -= 1
//! ```
//!
//! Each side stores before it looks, so that opening costs one load where nobody waits. The opener takes the lock so
//! that a waiter who has looked is asleep, and hears it.
//!
//! Twins: counted after the look; notified without the lock; counted or opened by a store that drains no store buffer.
//! A lost wakeup is loom's deadlock.

use super::explore;
use crate::lock_order;
use crate::sync::{Arc, AtomicU32, Monitor, Ordering, thread};

#[derive(Clone, Copy)]
struct Way {
    counts_first: bool,
    locks: bool,
    order: Ordering,
}

const RIGHT: Way = Way { counts_first: true, locks: true, order: Ordering::SeqCst };

struct Gate {
    in_progress: AtomicU32,
    waiters: AtomicU32,
    sleepers: Monitor<()>,
}

impl Gate {
    fn wait(&self, way: Way) {
        if way.counts_first {
            self.waiters.fetch_add(1, way.order);
        }
        let mut guard = self.sleepers.lock();
        while self.in_progress.load(Ordering::SeqCst) > 0 {
            if !way.counts_first {
                self.waiters.fetch_add(1, way.order);
            }
            guard = guard.wait("a gate");
            if !way.counts_first {
                self.waiters.fetch_sub(1, way.order);
            }
        }
        drop(guard);
        if way.counts_first {
            self.waiters.fetch_sub(1, way.order);
        }
    }

    fn open(&self, way: Way) {
        self.in_progress.fetch_sub(1, way.order);
        if self.waiters.load(Ordering::SeqCst) > 0 {
            if way.locks {
                drop(self.sleepers.lock());
            }
            self.sleepers.notify_all();
        }
    }
}

fn wait_and_open(way: Way, waiters: u32, closings: u32) {
    let gate = Arc::new(Gate {
        in_progress: AtomicU32::new(closings),
        waiters: AtomicU32::new(0),
        sleepers: Monitor::new(lock_order::SLEEPERS, ()),
    });
    let start = |act: fn(&Gate, Way)| {
        let gate = gate.clone();
        thread::spawn(move || act(&gate, way))
    };
    let waiting: Vec<_> = (0..waiters).map(|_| start(Gate::wait)).collect();
    let opening: Vec<_> = (1..closings).map(|_| start(Gate::open)).collect();
    gate.open(way);
    waiting.into_iter().chain(opening).for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_waiter_hears_the_opening() {
    explore(None, || wait_and_open(RIGHT, 1, 1));
}

#[test]
fn two_waiters_hear_it() {
    explore(5, || wait_and_open(RIGHT, 2, 1));
}

#[test]
fn a_waiter_hears_the_last_of_two_openings() {
    explore(5, || wait_and_open(RIGHT, 1, 2));
}

#[test]
#[should_panic(expected = "deadlock")]
fn twin_counted_after_the_look() {
    explore(None, || wait_and_open(Way { counts_first: false, ..RIGHT }, 1, 1));
}

#[test]
#[should_panic(expected = "deadlock")]
fn twin_notified_without_the_lock() {
    explore(None, || wait_and_open(Way { locks: false, ..RIGHT }, 1, 1));
}

#[test]
#[should_panic(expected = "deadlock")]
fn twin_neither_side_drains_its_store_buffer() {
    explore(None, || wait_and_open(Way { order: Ordering::AcqRel, ..RIGHT }, 1, 1));
}
