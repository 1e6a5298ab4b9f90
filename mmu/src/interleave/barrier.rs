//! A store to a frame of code, while others decode it.
//!
//! ```text
//! vCPU that stores                     each vCPU that decodes (generation_to_decode)
//! new bytes, into its store buffer     mark, or find one
//! mark? take it off (code_written)     not settled: drain everybody's store buffer
//! (some time) they arrive              read the bytes; settled: they are of this generation
//! ```
//!
//! The one that stores has no fence: its look at the mark may pass its store. So its buffer is a word of the model's, and the
//! barrier, which the host makes on the other's CPU, is that somebody else empties it.
//!
//! Holds: whoever has decoded old bytes has a generation that is not the frame's any more.
//!
//! Twins: no barrier; one who finds a mark takes it for settled.

use super::explore;
use crate::addr::Mfn;
use crate::frames::{Frames, SETTLED};
use crate::lock_order;
use crate::sync::{Arc, AtomicU32, Lock, Ordering, thread};

const NEW: u32 = 1;
const CODE: Mfn = Mfn(1);

struct World {
    frames: Frames,
    /// What is on its way from the CPU that stores.
    buffer: Lock<Option<u32>>,
    bytes: AtomicU32,
}

impl World {
    fn drain(&self) {
        let mut buffer = self.buffer.lock();
        if let Some(bytes) = buffer.take() {
            self.bytes.store(bytes, Ordering::SeqCst);
        }
    }

    fn store(&self) {
        *self.buffer.lock() = Some(NEW);
        self.frames.code_written(CODE);
        self.drain();
    }
}

/// The generation of what is decoded, by way of the marks.
type Mark = fn(&World) -> u32;

fn mark(world: &World) -> u32 {
    world.frames.generation_to_decode(CODE, || world.drain())
}

fn mark_without_barrier(world: &World) -> u32 {
    world.frames.generation_to_decode(CODE, || {})
}

fn mark_trusting_another(world: &World) -> u32 {
    let found = world.frames.code(CODE);
    if found != 0 { found | SETTLED } else { mark(world) }
}

fn decode(world: &World, mark: Mark) -> (u32, u32) {
    let generation = mark(world);
    (generation, world.bytes.load(Ordering::SeqCst))
}

fn store_while_two_decode(mark: Mark) {
    let world = Arc::new(World {
        frames: Frames::new(2, 0, 0),
        buffer: Lock::new(lock_order::REMOVALS, None),
        bytes: AtomicU32::new(0),
    });
    let decoding = [(); 2].map(|()| {
        let world = world.clone();
        thread::spawn(move || decode(&world, mark))
    });
    world.store();
    for (generation, bytes) in decoding.map(|decoded| decoded.join().unwrap()) {
        let current = world.frames.code(CODE) == generation;
        assert!(bytes == NEW || !current, "code is run that is no more, of generation {generation}");
    }
}

#[test]
fn who_decodes_old_bytes_does_not_run_them_for_long() {
    explore(4, || store_while_two_decode(mark));
}

#[test]
#[should_panic(expected = "code is run that is no more")]
fn twin_nobody_waits_for_stores_on_their_way() {
    explore(None, || store_while_two_decode(mark_without_barrier));
}

#[test]
#[should_panic(expected = "code is run that is no more")]
fn twin_a_mark_is_taken_for_settled() {
    explore(None, || store_while_two_decode(mark_trusting_another));
}
