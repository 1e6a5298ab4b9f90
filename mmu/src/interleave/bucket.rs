//! Loom's models of the gate and of the bucket.
//!
//! **The gate.** A fill that has found a frame stores an spte to it, unless the gate was closed meanwhile.
//!
//! ```text
//! vCPU (fill)                           invalidation of gfn
//! seen := sequence                      close
//! find the frame                        lock bucket, zap every link, stamp, unlock
//! lock bucket                           shoot down
//!   gate closed, or closed since seen?  the page goes to another frame;
//!     no: store spte, link                the old one is somebody else's
//! unlock                                open
//! enter the guest, use what spte says
//! ```
//!
//! The fill of [`crate::Mmu::map`] looks the frame up once more within the bucket and does not hang on the second half of
//! the gate's verdict; this one takes the frame it found first, so that the verdict is all there is.
//!
//! Twins: the gate is asked before the bucket is locked; under some other lock; the sequence is read after the frame was
//! found; the gate does not remember when it was opened, so that what was found while it was closed counts as good.
//!
//! **Two removals of one leaf.** Who holds the page has looked at the spte, and waits for the bucket. Who holds the
//! bucket takes it away.
//!
//! ```text
//! holder of the page                    invalidation
//! spte there? whose bucket?             lock bucket
//! lock bucket                           spte := 0, unlink, stamp
//! spte still there?                     unlock
//!   store 0 (or fewer rights), unlink, stamp
//! unlock
//! ```
//!
//! Twin: no second look. One unlinks twice, or (fewer rights) brings an spte back that nobody will find.

use super::*;
use crate::addr::Mfn;
use crate::coherence::{Coherence, NoVcpus};
use crate::interleave::{Frame, explore};
use crate::sync::{Arc, thread};

const GFN: Gfn = Gfn(1);
/// Where the one spte is said to be.
const AT: Mpa = Mpa(8);

struct World {
    buckets: Buckets,
    ledger: Coherence,
    /// Frame of the page: 1, then 2.
    p2m: AtomicU32,
    /// Frame that the spte leads to, 0 for none.
    spte: AtomicU32,
    first: Frame,
    other: Lock<()>,
}

fn world(mapped: bool) -> Arc<World> {
    let world = World {
        buckets: Buckets::new(1),
        ledger: Coherence::new(1, Box::new(NoVcpus)),
        p2m: AtomicU32::new(1),
        spte: AtomicU32::new(u32::from(mapped)),
        first: Frame::default(),
        other: Lock::new(lock_order::SHADOW_L1, ()),
    };
    if mapped {
        world.buckets.lock(GFN).link(Link::new(GFN, AT));
    }
    Arc::new(world)
}

impl World {
    /// What every invalidation does under the bucket; says when.
    fn zap_all(&self) -> u64 {
        let mut bucket = self.buckets.lock(GFN);
        let removal = self.ledger.removal();
        bucket.unlink_all(GFN, |_| self.spte.store(0, Ordering::Release));
        removal.stamp_leaf(Mfn(1))
    }

    fn invalidate(&self, open: fn(&Buckets)) {
        self.buckets.close(GFN);
        let stamp = self.zap_all();
        while !self.ledger.covered(stamp) {
            self.ledger.shoot_down(None);
        }
        self.p2m.store(2, Ordering::Release);
        self.first.hand_on();
        open(&self.buckets);
    }

    fn set(&self, bucket: &mut BucketGuard<'_>, frame: u32) {
        self.spte.store(frame, Ordering::Release);
        bucket.link(Link::new(GFN, AT));
    }

    /// The guest uses the page, if it is mapped.
    fn run(&self) {
        if self.ledger.enter_guest(0) {
            let epoch = self.ledger.begin_flush();
            self.ledger.end_flush(0, epoch);
        }
        if self.spte.load(Ordering::Acquire) == 1 {
            self.first.touch();
        }
        self.ledger.leave_guest(0);
    }
}

fn fill(world: &World) {
    let seen = world.buckets.sequence();
    let frame = world.p2m.load(Ordering::Acquire);
    let mut bucket = world.buckets.lock(GFN);
    if bucket.admits(seen) {
        world.set(&mut bucket, frame);
    }
}

fn fill_that_asks_before_the_lock(world: &World) {
    let seen = world.buckets.sequence();
    let frame = world.p2m.load(Ordering::Acquire);
    let admitted = world.buckets.bucket(GFN).admits(seen);
    let mut bucket = world.buckets.lock(GFN);
    if admitted {
        world.set(&mut bucket, frame);
    }
}

fn fill_that_asks_under_another_lock(world: &World) {
    let seen = world.buckets.sequence();
    let frame = world.p2m.load(Ordering::Acquire);
    let _other = world.other.lock();
    if world.buckets.bucket(GFN).admits(seen) {
        world.set(&mut world.buckets.lock(GFN), frame);
    }
}

fn fill_that_reads_the_sequence_late(world: &World) {
    let frame = world.p2m.load(Ordering::Acquire);
    let seen = world.buckets.sequence();
    let mut bucket = world.buckets.lock(GFN);
    if bucket.admits(seen) {
        world.set(&mut bucket, frame);
    }
}

fn open(buckets: &Buckets) {
    buckets.open(GFN);
}

fn open_and_forget(buckets: &Buckets) {
    buckets.bucket(GFN).gate.fetch_sub(1, Ordering::SeqCst);
}

fn fill_against_invalidation(fill: fn(&World), open: fn(&Buckets)) {
    let world = world(false);
    let vcpu = {
        let world = world.clone();
        thread::spawn(move || {
            fill(&world);
            world.run();
        })
    };
    world.invalidate(open);
    vcpu.join().unwrap();
    assert_ne!(world.spte.load(Ordering::Relaxed), 1, "an spte leads to a frame that was handed on");
}

#[test]
fn no_spte_is_made_to_a_frame_that_goes() {
    explore(5, || fill_against_invalidation(fill, open));
}

#[test]
#[should_panic(expected = "handed on")]
fn twin_the_gate_is_asked_before_the_lock() {
    explore(None, || fill_against_invalidation(fill_that_asks_before_the_lock, open));
}

#[test]
#[should_panic(expected = "handed on")]
fn twin_the_gate_is_asked_under_another_lock() {
    explore(None, || fill_against_invalidation(fill_that_asks_under_another_lock, open));
}

#[test]
#[should_panic(expected = "handed on")]
fn twin_the_sequence_is_read_after_the_walk() {
    explore(None, || fill_against_invalidation(fill_that_reads_the_sequence_late, open));
}

#[test]
#[should_panic(expected = "handed on")]
fn twin_the_gate_forgets_when_it_was_opened() {
    explore(None, || fill_against_invalidation(fill, open_and_forget));
}

/// What the holder of the page stores: nothing is left of the spte, or (as for fewer rights) the same frame.
fn take_leaf(world: &World, looks_again: bool, left: u32) {
    let _page = world.other.lock();
    let seen = world.spte.load(Ordering::Acquire);
    if seen == 0 {
        return;
    }
    let mut bucket = world.buckets.lock(GFN);
    if looks_again && world.spte.load(Ordering::Acquire) == 0 {
        return;
    }
    let removal = world.ledger.removal();
    world.spte.store(left, Ordering::Release);
    if left == 0 {
        bucket.unlink(Link::new(GFN, AT));
    }
    removal.stamp_leaf(Mfn(1));
}

fn two_removals(looks_again: bool, left: u32) {
    let world = world(true);
    let holder = {
        let world = world.clone();
        thread::spawn(move || take_leaf(&world, looks_again, left))
    };
    world.invalidate(open);
    world.run();
    holder.join().unwrap();
    let links = world.buckets.lock(GFN).links_of(GFN).count();
    assert_eq!((world.spte.load(Ordering::Relaxed), links), (0, 0), "the frame is handed on, and mapped");
}

#[test]
fn a_leaf_is_taken_once() {
    explore(None, || two_removals(true, 0));
}

#[test]
fn a_leaf_that_is_gone_is_not_narrowed() {
    explore(None, || two_removals(true, 1));
}

#[test]
#[should_panic(expected = "INV-RMAP-1")]
fn twin_taken_without_a_second_look() {
    explore(None, || two_removals(false, 0));
}

#[test]
#[should_panic(expected = "handed on")]
fn twin_narrowed_without_a_second_look() {
    explore(None, || two_removals(false, 1));
}
