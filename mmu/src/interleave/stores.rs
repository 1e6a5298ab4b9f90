//! Stores to tracked tables, and a vCPU that has seen one and flushes.
//!
//! ```text
//! who stores                 who flushes
//! under way + 1              entry = new? if so
//! entry := new                 nothing under way? else wait for the phase
//! spte taken away              spte must be gone
//! under way - 1
//! ```
//!
//! Twins: who flushes waits for nobody; who stores says so too late; who stores does not look whether the phase was turned over.

use super::{Having, Stores, UnderWay};
use crate::interleave::explore;
use crate::sync::{Arc, AtomicU64, Ordering, thread};

const OLD: u64 = 1;
const NEW: u64 = 2;

/// An entry, and the spte that was made of it.
#[derive(Default)]
struct Table {
    entry: AtomicU64,
    spte: AtomicU64,
}

impl Table {
    fn store(&self) {
        self.entry.store(NEW, Ordering::Release);
        self.spte.store(0, Ordering::Release);
    }

    /// A flush by who has looked at the entry.
    fn look_and_flush(&self, wait: impl FnOnce()) {
        if self.entry.load(Ordering::Acquire) == NEW {
            wait();
            let gone = self.spte.load(Ordering::Acquire) == 0;
            assert!(gone, "what the entry says no more is there after a flush");
        }
    }
}

#[derive(Default)]
struct World {
    stores: Stores,
    tables: [Table; 2],
}

impl World {
    fn new() -> Arc<World> {
        let world = World::default();
        for table in &world.tables {
            table.entry.store(OLD, Ordering::Release);
            table.spte.store(OLD, Ordering::Release);
        }
        Arc::new(world)
    }
}

type Begin = fn(&Stores) -> UnderWay<'_>;

fn begin_unseen(stores: &Stores) -> UnderWay<'_> {
    let phase = stores.phase.load(Ordering::SeqCst);
    stores.of(phase).fetch_add(1, Ordering::SeqCst);
    UnderWay { stores, phase, _had: Having::new(stores.thing()) }
}

fn store(world: &World, table: usize, begin: Begin) {
    let _under_way = begin(&world.stores);
    world.tables[table].store();
}

fn store_and_say_so_late(world: &World) {
    world.tables[0].entry.store(NEW, Ordering::Release);
    let _under_way = world.stores.begin();
    world.tables[0].spte.store(0, Ordering::Release);
}

fn flush_after_a_look(store: fn(&World), wait: bool) {
    let world = World::new();
    let storing = {
        let world = world.clone();
        thread::spawn(move || store(&world))
    };
    world.tables[0].look_and_flush(|| {
        if wait {
            world.stores.wait();
        }
    });
    storing.join().unwrap();
}

/// Two who store, and one who flushes after a look at the one, and at the other: the phase may be turned over twice.
fn flush_while_two_store(begin: Begin) {
    let world = World::new();
    let storing = [0, 1].map(|table| {
        let world = world.clone();
        thread::spawn(move || store(&world, table, begin))
    });
    for table in &world.tables {
        table.look_and_flush(|| world.stores.wait());
    }
    storing.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn who_has_seen_a_store_and_flushes_finds_it_applied() {
    explore(None, || flush_after_a_look(|world| store(world, 0, Stores::begin), true));
}

#[test]
fn so_it_does_of_two_stores() {
    explore(4, || flush_while_two_store(Stores::begin));
}

#[test]
#[should_panic(expected = "says no more")]
fn twin_who_flushes_waits_for_nobody() {
    explore(None, || flush_after_a_look(|world| store(world, 0, Stores::begin), false));
}

#[test]
#[should_panic(expected = "says no more")]
fn twin_who_stores_says_so_too_late() {
    explore(None, || flush_after_a_look(store_and_say_so_late, true));
}

#[test]
#[should_panic(expected = "says no more")]
fn twin_who_stores_is_counted_in_a_phase_that_is_over() {
    explore(None, || flush_while_two_store(begin_unseen));
}
