//! A store to a tracked table, and a vCPU that has seen it and flushes.
//!
//! ```text
//! who stores                 who flushes
//! under way + 1              entry = new? if so
//! entry := new                 under way = 0? else wait
//! spte taken away              spte must be gone
//! under way - 1
//! ```
//!
//! Twins: who flushes waits for nobody; who stores says so too late.

use super::Stores;
use crate::interleave::explore;
use crate::sync::{Arc, AtomicU64, Ordering, thread};

const OLD: u64 = 1;
const NEW: u64 = 2;

#[derive(Default)]
struct World {
    stores: Stores,
    entry: AtomicU64,
    spte: AtomicU64,
}

fn store(world: &World) {
    let _under_way = world.stores.begin();
    world.entry.store(NEW, Ordering::Release);
    world.spte.store(0, Ordering::Release);
}

fn store_and_say_so_then(world: &World) {
    world.entry.store(NEW, Ordering::Release);
    let _under_way = world.stores.begin();
    world.spte.store(0, Ordering::Release);
}

fn flush_after_a_look(store: fn(&World), settle: bool) {
    let world = Arc::new(World::default());
    world.entry.store(OLD, Ordering::Release);
    world.spte.store(OLD, Ordering::Release);
    let storing = {
        let world = world.clone();
        thread::spawn(move || store(&world))
    };
    if world.entry.load(Ordering::Acquire) == NEW {
        if settle {
            world.stores.settle();
        }
        assert_eq!(
            world.spte.load(Ordering::Acquire),
            0,
            "what the entry says no more is there after a flush"
        );
    }
    storing.join().unwrap();
}

#[test]
fn who_has_seen_a_store_and_flushes_finds_it_applied() {
    explore(None, || flush_after_a_look(store, true));
}

#[test]
#[should_panic(expected = "says no more")]
fn twin_who_flushes_waits_for_nobody() {
    explore(None, || flush_after_a_look(store, false));
}

#[test]
#[should_panic(expected = "says no more")]
fn twin_who_stores_says_so_too_late() {
    explore(None, || flush_after_a_look(store_and_say_so_then, true));
}
