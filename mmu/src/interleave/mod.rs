//! The protocols between threads, in small, in every order that loom finds.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p umbra-mmu --lib interleave
//! ```
//!
//! Story: each model is a protocol's few steps on two or three threads, with the crate's own [`crate::Coherence`] and
//! [`crate::bucket::Buckets`] where they are those that are modelled, and words in place of tables and TLBs; those of `pages`
//! have the whole [`crate::Mmu`]. Each has
//! twins with one step moved or left out, which must fail: so that a model that can see nothing is seen.
//!
//! | module | protocol |
//! |---|---|
//! | `coherence::interleave` | shootdown and entry, a removal without a stamp, a stamp's fence, a locked bus |
//! | `bucket::interleave` | the gate, two removals of one leaf |
//! | `external::interleave` | an importer that attaches, and whoever takes the page; the fence; late answers |
//! | `shadow::stores::interleave` | a store to a page table, and a flush by who has seen it |
//! | pages | a page that is mapped, filled, stored to or brought in, and whoever takes it |
//! | pins | a window mapping and whoever moves the page |
//! | gate_wait | sleeping at a closed gate |
//! | marks | a store to a frame that becomes a page table |
//! | barrier | a store to a frame that code is decoded from |
//!
//! Holds: what a model asserts, in every order of its threads' steps and for every store that a load may still see. The
//! seven largest are bounded to four or five preemptions. With `LOOM_MAX_PREEMPTIONS=100` four of them too are explored to the
//! end, in about a minute; that of two vCPUs that shoot each other down is too large, and so are the two of swap in `pages`.
//!
//! Limits: loom runs one store after another, so that all threads agree on their order, as x86 does. It has no more than
//! four threads, and a model is a handful of steps of one operation each: what only three operations in a row, or a
//! whole walk, would show is `tests/interleave`'s (shuttle). What stands for a sequentially consistent access is in
//! [`crate::sync`]'s `weak`; hardware's own page walks and flushes are loads and stores here, and the flush is as strong
//! as the read-modify-write that took its epoch.

mod barrier;
mod gate_wait;
mod marks;
mod pages;
mod pins;

use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Steps of one run, at most.
const STEPS_MAX: usize = 20_000;

/// Runs `model` in every order; if there are too many, in those with at most so many preemptions.
pub(crate) fn explore(preemptions: impl Into<Option<usize>>, model: impl Fn() + Send + Sync + 'static) {
    let mut bounds = loom::model::Builder::new();
    bounds.preemption_bound = bounds.preemption_bound.or(preemptions.into());
    // Steps of one run: a model that is set up on a thread of its own has them counted from the first.
    bounds.max_branches = bounds.max_branches.max(STEPS_MAX);
    let runs = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let begun = std::time::Instant::now();
    let count = runs.clone();
    bounds.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!("{} orders in {:.1?}", runs.load(Ordering::Relaxed), begun.elapsed());
}

/// A frame that one side uses and the other hands on: says so when a use is not over before that, or comes after it.
/// All of it is relaxed, so that only the protocol orders the two.
#[derive(Debug, Default)]
pub(crate) struct Frame {
    users: AtomicU32,
    handed_on: AtomicU64,
}

impl Frame {
    /// One side reads or writes what it takes for its frame.
    pub fn touch(&self) {
        self.users.fetch_add(1, Ordering::Relaxed);
        assert_eq!(self.handed_on.load(Ordering::Relaxed), 0, "the frame is used after it was handed on");
        self.users.fetch_sub(1, Ordering::Relaxed);
    }

    /// The other side gives it to somebody else.
    pub fn hand_on(&self) {
        assert_eq!(self.users.load(Ordering::Relaxed), 0, "the frame is handed on while it is used");
        self.handed_on.store(1, Ordering::Relaxed);
    }
}
