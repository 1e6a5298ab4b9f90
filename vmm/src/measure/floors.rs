//! Floors: what an invalidation could not do without, measured in the same run, against the same vCPUs.
//!
//! | floor | what is timed |
//! |---|---|
//! | kick | `Coherence::shoot_down`, nothing having been removed: every vCPU that runs guest code leaves it, and flushes |
//! | notifier | `madvise(MADV_DONTNEED)` of a frame that vCPUs use, where the host knows of all their translations |
//! | punch | a hole of one page in a file in memory that nobody maps |
//! | importers-N | N processes that have nothing to do with the guest are told, then awaited; each drops a page of its own, as importers do |
//! | importers-N-in-turn | each is awaited before the next is told |
//! | deadline | not measured: how long stopped importers are waited for |
//!
//! Story: between two intervals of a measurement a few of each are timed, with a pause before, so that vCPUs are back in the
//! guest. The pause is that of the schedule: who was told a millisecond ago answers later than who has just answered, for caches
//! and the host's CPUs forget. A kick for which nobody had to be kicked does not count.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};
use umbra_mmu::PAGE_SIZE;
use umbra_mmu::p2m::PageState;

use super::causes::Targets;
use super::collect::Collected;
use super::importers::{Bare, IMPORTERS_MAX};
use crate::machine::memory_file;
use crate::vm::Beside;

/// Of each floor, in a round.
const SAMPLES: u32 = 20;
/// How long a round of one floor may take.
const ROUND_MAX: Duration = Duration::from_millis(30);
/// Before each, at least and at most.
const PAUSE_MIN: Duration = Duration::from_micros(200);
const PAUSE_MAX: Duration = Duration::from_millis(1);

/// The bare kick.
pub const KICK: &str = "kick";
/// The bare notifier.
pub const NOTIFIER: &str = "notifier";
/// The bare hole.
pub const PUNCH: &str = "punch";
/// What stopped importers are given.
pub const DEADLINE: &str = "deadline";

/// Two names for each count.
macro_rules! names {
    ($($count:literal)*) => { [$((concat!("importers-", $count), concat!("importers-", $count, "-in-turn"))),*] };
}

/// The floors of so many importers, told first and in turn.
pub const OUTSIDE: [(&str, &str); IMPORTERS_MAX as usize + 1] =
    names!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16);

/// Measures them.
#[derive(Debug)]
pub struct Floors {
    file: File,
    /// Processes that drop a page and answer.
    pub bare: Bare,
    /// How many of them are told, each measured.
    pub counts: Vec<u32>,
    /// Before each.
    pause: Duration,
}

impl Floors {
    /// With a file of its own, for `rate` invalidations a second.
    ///
    /// # Errors
    ///
    /// When the host has none.
    pub fn new(rate: u32) -> io::Result<Floors> {
        let file = memory_file(c"umbra-floor", PAGE_SIZE)?;
        let pause = (Duration::from_secs(1) / rate.max(1)).clamp(PAUSE_MIN, PAUSE_MAX);
        Ok(Floors { file, bare: Bare::default(), counts: Vec::new(), pause })
    }

    /// A round of each, into `all`.
    pub fn round(&self, beside: &Beside, targets: &mut Targets, all: &mut Collected) {
        self.rounds(beside, || {
            let (nanos, kicked) = timed(|| beside.mmu.coherence().shoot_down(None));
            if kicked > 0 {
                all.floor(KICK, nanos);
            }
        });
        if let Some(notifier) = &beside.notifier {
            self.rounds(beside, || {
                let page = targets.next(&beside.mmu, 1).first().map(|gfn| beside.mmu.p2m().lookup(*gfn));
                let Some(PageState::Resident(frame)) = page else { return };
                if let (nanos, Ok(())) = timed(|| notifier.drop_frame(frame)) {
                    all.floor(NOTIFIER, nanos);
                }
            });
        }
        self.rounds(beside, || {
            if self.file.write_all_at(&[1], 0).is_err() {
                return;
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if let (nanos, Ok(())) = timed(|| fallocate(&self.file, flags, 0, PAGE_SIZE)) {
                all.floor(PUNCH, nanos);
            }
        });
        for count in &self.counts {
            let (first, in_turn) = OUTSIDE[*count as usize];
            self.rounds(beside, || {
                if let (nanos, true) = timed(|| self.bare.round_trip(*count)) {
                    all.floor(first, nanos);
                }
            });
            self.rounds(beside, || {
                if let (nanos, true) = timed(|| self.bare.round_trip_in_turn(*count)) {
                    all.floor(in_turn, nanos);
                }
            });
        }
    }

    /// Calls `once` a few times.
    fn rounds(&self, beside: &Beside, mut once: impl FnMut()) {
        let end = Instant::now() + ROUND_MAX;
        for _ in 0..SAMPLES {
            if Instant::now() >= end || beside.has_ended() {
                return;
            }
            thread::sleep(self.pause);
            once();
        }
    }
}

/// How long a call took, and what it returned.
fn timed<T>(call: impl FnOnce() -> T) -> (u64, T) {
    let begun = Instant::now();
    let value = call();
    (begun.elapsed().as_nanos() as u64, value)
}
