//! `--stress`: somebody who takes pages away all through a simulation, in ways and at times that the seed decides.
//!
//! | draws | takes |
//! |---|---|
//! | a run of pages | as `x-page-out` does, however they are used |
//! | single ones | the same |
//! | a run, without sleep | what needs no write and nobody's answer, or nothing |
//! | a batch | the least recently used, as reclaim does |
//! | tables | shadow pages, the least recently used, as a want of table frames does |
//!
//! And frames are refused once in [`REFUSED_ONE_IN`], though there are some: whoever wants one reclaims for it.
//!
//! Beside it [`IMPORTERS`] importers want pages at their homes, to read ([`umbra_mmu::twins`]). Each lives for a while, is slow to hear and
//! to answer, and dies with what it has; another comes.
//!
//! Holds: what the guest has stored stays; a page that goes without a copy is one of zeros. Importers find their pages where they are.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use umbra_mmu::external::SegmentId;
use umbra_mmu::p2m::PageState;
use umbra_mmu::records::Cause;
use umbra_mmu::swap::CLUSTER;
use umbra_mmu::sync::sim;
use umbra_mmu::twins::{Importer, Importers, Manner, Pace};
use umbra_mmu::{Gfn, Machine, Mmu, Shortage, SwapFailed};

use super::ending::{End, Ending};
use super::simulation::Thread;

/// The longest pause between two of its deeds, in virtual time; where transfers take long, so many of the longest: the guest is to get on.
const PAUSE_NANOS: u64 = 100_000;
const TRANSFERS: u64 = 24;
/// Times that a frame is wanted for one that it is refused.
const REFUSED_ONE_IN: u32 = 64;
/// Single pages that are taken at a time.
const SINGLE: u64 = 4;
/// Shadow pages that are taken at a time, at most.
const TABLES: u64 = 8;
/// Importers at a time, and how many live one after the other in each one's place.
const IMPORTERS: u32 = 2;
const LIVES: u32 = 64;
/// Steps of a life at most, and adjacent pages that it is about.
const STEPS: u64 = 96;
const WANTED: u32 = 64;
/// Memory from here on is imported: below it are devices.
const FIRST: u32 = 256;

/// Its threads; dropping it ends them.
pub struct Stress {
    stopped: Arc<AtomicBool>,
    threads: Vec<Thread>,
}

/// Importers to be, of a guest in `machine`.
pub fn importers(machine: Machine) -> Importers {
    Importers::new(IMPORTERS * LIVES, machine)
}

impl Stress {
    /// Starts it. `importers` are the MMU's.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn start(mmu: Arc<Mmu>, importers: Importers, ending: Ending) -> io::Result<Stress> {
        let stopped = Arc::new(AtomicBool::new(false));
        let mut stress = Stress { stopped, threads: Vec::new() };
        let memory = |gfn: &u32| mmu.p2m().lookup(Gfn(*gfn)) != PageState::Device;
        let end = FIRST + (FIRST..mmu.p2m().pages()).take_while(memory).count() as u32;
        // A guest that has no more memory than that exports none.
        let segment = mmu.make_segment(Gfn(FIRST), end - FIRST, false).ok();
        for (place, segment) in (0..IMPORTERS).filter_map(|place| Some((place, segment?))) {
            let outside = Outside {
                mmu: Arc::clone(&mmu),
                all: importers.clone(),
                segment,
                end,
                ending: ending.clone(),
            };
            let until = Arc::clone(&stress.stopped);
            let name = format!("importer {place}");
            let import = move || outside.import(place, &until);
            stress.threads.push(Thread::start("importer", &name, import)?);
        }
        let until = Arc::clone(&stress.stopped);
        let take = move || {
            let own = ending.clone();
            ending.watch("stress", || take(&mmu, &own, &until));
        };
        stress.threads.push(Thread::start("stress", "stress", take)?);
        Ok(stress)
    }
}

impl Drop for Stress {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(Thread::join);
    }
}

/// Where importers live.
struct Outside {
    mmu: Arc<Mmu>,
    all: Importers,
    segment: SegmentId,
    /// Its pages are those below, from [`FIRST`] on.
    end: u32,
    ending: Ending,
}

impl Outside {
    /// One importer after the other.
    fn import(&self, place: u32, stopped: &AtomicBool) {
        for id in (0..LIVES).map(|life| life * IMPORTERS + place) {
            let (mmu, all, segment) = (Arc::clone(&self.mmu), self.all.clone(), self.segment);
            let importer = Importer { mmu, all, id, segment, stores: false, manner: Manner::Honest };
            let importer = Arc::new(importer);
            let (listener, theirs) = (Arc::clone(&importer), self.ending.clone());
            let ear = move || theirs.watch("importer's ear", || listener.listen(&InTime));
            let ear = match Thread::start("importer's ear", &format!("importer {place}, its ear"), ear) {
                Ok(ear) => ear,
                Err(source) => return log::error!("--stress: no thread for an importer: {source}"),
            };
            let first = FIRST + draw(u64::from(self.end - FIRST));
            let wanted = first..self.end.min(first + WANTED);
            self.ending.watch("importer", || importer.live(wanted, u64::from(draw(STEPS)), &InTime));
            ear.join();
            if stopped.load(Ordering::Relaxed) || self.ending.is_set() {
                return;
            }
        }
    }
}

/// An importer takes its time, in virtual time.
struct InTime;

impl Pace for InTime {
    fn draw(&self, end: u32) -> u32 {
        draw(u64::from(end))
    }

    fn travel(&self) {
        sim::sleep(Duration::from_nanos(draw(PAUSE_NANOS).into()), "a message on its way");
    }

    fn rest(&self) {
        sim::sleep(Duration::from_nanos(draw(PAUSE_NANOS).into()), "its next step");
    }
}

fn draw(end: u64) -> u32 {
    sim::choose(end).unwrap_or_default() as u32
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
    let pages = mmu.p2m().pages();
    let page = || draw(u64::from(pages));
    let run = || {
        let first = page();
        (first..pages.min(first + 1 + draw(u64::from(CLUSTER)))).map(Gfn).collect::<Vec<_>>()
    };
    let (what, taken) = match draw(5) {
        0 => ("a run", mmu.page_out(None, &run())?),
        1 => ("single ones", mmu.page_out(None, &(0..SINGLE).map(|_| Gfn(page())).collect::<Vec<_>>())?),
        2 => ("without sleep", mmu.page_out_atomic(None, &run()).unwrap_or_default()),
        3 => {
            let count = 1 + draw(TABLES);
            mmu.evict_shadow(count);
            ("tables", count)
        }
        _ => ("the idle", mmu.reclaim(1 + draw(u64::from(CLUSTER)), Cause::Reclaim, None)?),
    };
    sim::note(|line| {
        use std::fmt::Write;
        let _ = write!(line, "takes {taken} pages, {what}");
    });
    Ok(())
}
