//! `--stress`: somebody who takes pages away all through a simulation, in ways and at times that the seed decides.
//!
//! | draws | takes |
//! |---|---|
//! | a run of pages | as `x-page-out` does, however they are used |
//! | single ones | the same |
//! | a run, without sleep | what needs no write and nobody's answer, or nothing |
//! | a batch | the least recently used, as reclaim does |
//!
//! And frames are refused once in [`REFUSED_ONE_IN`], though there are some: whoever wants one reclaims for it.
//!
//! Holds: what the guest has stored stays; a page that goes without a copy is one of zeros.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use umbra_mmu::records::Cause;
use umbra_mmu::swap::CLUSTER;
use umbra_mmu::sync::sim;
use umbra_mmu::{Gfn, Mmu, Shortage, SwapFailed};

use super::ending::{End, Ending};
use super::simulation::Thread;

/// The longest pause between two of its deeds, in virtual time; where transfers take long, so many of the longest: the guest is to get on.
const PAUSE_NANOS: u64 = 100_000;
const TRANSFERS: u64 = 24;
/// Times that a frame is wanted for one that it is refused.
const REFUSED_ONE_IN: u32 = 64;
/// Single pages that are taken at a time.
const SINGLE: u64 = 4;

/// Its thread; dropping it ends it.
pub struct Stress {
    stopped: Arc<AtomicBool>,
    thread: Option<Thread>,
}

impl Stress {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn start(mmu: Arc<Mmu>, ending: Ending) -> io::Result<Stress> {
        let stopped = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stopped);
        let take = move || {
            let own = ending.clone();
            ending.watch("stress", || take(&mmu, &own, &until));
        };
        Ok(Stress { stopped, thread: Some(Thread::start("stress", "stress", take)?) })
    }
}

impl Drop for Stress {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

fn take(mmu: &Mmu, ending: &Ending, stopped: &AtomicBool) {
    mmu.refuse_frames(REFUSED_ONE_IN);
    let pause_max = sim::pace().map_or(0, |pace| TRANSFERS * pace.transfer_nanos_max).max(PAUSE_NANOS);
    while !stopped.load(Ordering::Relaxed) {
        let pause = sim::choose(pause_max).unwrap_or(pause_max);
        sim::sleep(Duration::from_nanos(pause), "its next deed");
        if let Err(failed) = take_some(mmu) {
            return ending.set(End::Shortage(Shortage::Swap(failed)));
        }
    }
    mmu.refuse_frames(0);
}

fn take_some(mmu: &Mmu) -> Result<(), SwapFailed> {
    let draw = |end: u64| sim::choose(end).unwrap_or_default() as u32;
    let pages = mmu.p2m().pages();
    let page = || draw(u64::from(pages));
    let run = || {
        let first = page();
        (first..pages.min(first + 1 + draw(u64::from(CLUSTER)))).map(Gfn).collect::<Vec<_>>()
    };
    let (what, taken) = match draw(4) {
        0 => ("a run", mmu.page_out(None, &run())?),
        1 => ("single ones", mmu.page_out(None, &(0..SINGLE).map(|_| Gfn(page())).collect::<Vec<_>>())?),
        2 => ("without sleep", mmu.page_out_atomic(None, &run()).unwrap_or_default()),
        _ => ("the idle", mmu.reclaim(1 + draw(u64::from(CLUSTER)), Cause::Reclaim, None)?),
    };
    sim::note(|line| {
        use std::fmt::Write;
        let _ = write!(line, "takes {taken} pages, {what}");
    });
    Ok(())
}
