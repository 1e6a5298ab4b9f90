//! A store to guest memory, while the frame becomes a page table that is shadowed.
//!
//! ```text
//! whoever stores (table_written)        whoever shadows (promote)
//! entry := new                          mark the frame
//! -- fence --                           -- fence --
//! marked? take the spte away            read the entry, make the spte of it
//! ```
//!
//! Both have the shadow page's lock where they touch the spte. Either the mark is seen, and what was made is taken away
//! or not made yet, or the new entry is seen.
//!
//! Twins: no fence on the one side, on the other.

use super::explore;
use crate::lock_order;
use crate::sync::{Arc, AtomicU32, AtomicU64, Lock, Ordering, fence, thread};

const OLD: u64 = 1;
const NEW: u64 = 2;

#[derive(Default)]
struct Table {
    entry: AtomicU64,
    marks: AtomicU32,
}

fn store_against_shadowing(storing_fence: bool, shadowing_fence: bool) {
    let table = Arc::new((Table::default(), Lock::new(lock_order::SHADOW_L1, 0)));
    table.0.entry.store(OLD, Ordering::SeqCst);
    let shadowing = {
        let table = table.clone();
        thread::spawn(move || {
            table.0.marks.store(1, Ordering::Release);
            if shadowing_fence {
                fence(Ordering::SeqCst);
            }
            let mut spte = table.1.lock();
            *spte = table.0.entry.load(Ordering::Acquire);
        })
    };
    table.0.entry.store(NEW, Ordering::Release);
    if storing_fence {
        fence(Ordering::SeqCst);
    }
    if table.0.marks.load(Ordering::Acquire) != 0 {
        *table.1.lock() = 0;
    }
    shadowing.join().unwrap();
    assert_ne!(*table.1.lock(), OLD, "the shadow has what the guest's table says no more");
}

#[test]
fn a_store_is_seen_or_sees_the_mark() {
    explore(None, || store_against_shadowing(true, true));
}

#[test]
#[should_panic(expected = "says no more")]
fn twin_the_store_has_no_fence() {
    explore(None, || store_against_shadowing(false, true));
}

#[test]
#[should_panic(expected = "says no more")]
fn twin_the_mark_has_no_fence() {
    explore(None, || store_against_shadowing(true, false));
}
