//! `--stress`: somebody who takes pages away all through a simulation, in ways and at times that the seed decides.
//!
//! | draws | takes |
//! |---|---|
//! | a run of pages | as `x-page-out` does, however they are used |
//! | single ones | the same |
//! | a run, without sleep | what needs no write and nobody's answer; then, where that is not all, the rest with sleep |
//! | a batch | the least recently used, as reclaim does |
//! | of the shadow | shadow pages, the least recently used, as a want of table frames does |
//! | of the importers' | a run of the pages that importers store to |
//!
//! And frames are refused once in [`REFUSED_ONE_IN`], though there are some: whoever wants one reclaims for it.
//!
//! Beside it [`PLACES`] importers at a time want pages at their homes ([`umbra_mmu::twins`]). All but the last want the guest's own, and
//! look whether they are there. The last has what lies at [`STORED`], where firmware would have its ROMs and most guests store nothing: it
//! stores words of its own and looks for them. Each lives for a while, is slow to hear and to answer, and dies with what it has; another
//! comes, [`LIVES`] times.
//!
//! Holds: what the guest has stored stays, and what importers have stored; a page that goes without a copy is one of zeros. Importers
//! find their pages where they are.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use umbra_mmu::external::SegmentId;
use umbra_mmu::invalidation::WouldBlock;
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
const PLACES: u32 = 3;
const LIVES: u32 = 64;
/// Steps of a life at most, and adjacent pages that it is about.
const STEPS: u64 = 96;
const WANTED: u32 = 64;
/// Memory from here on is imported: below it are devices.
const FIRST: u32 = 256;
/// The pages that importers store to: 0xc0000 to 0xeffff.
const STORED: Range<u32> = 0xc0..0xf0;

/// Its threads; dropping it ends them.
pub struct Stress {
    stopped: Arc<AtomicBool>,
    threads: Vec<Thread>,
}

/// Importers to be, of a guest in `machine`.
pub fn importers(machine: Machine) -> Importers {
    Importers::new(PLACES * LIVES, machine)
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
        let segment_of = |pages: &Range<u32>, stores| {
            mmu.make_segment(Gfn(pages.start), pages.len() as u32, stores).map_err(io::Error::other)
        };
        let looked_at = segment_of(&(FIRST..end), false)?;
        let stored = segment_of(&STORED, true)?;
        for number in 0..PLACES {
            let stores = number + 1 == PLACES;
            let (pages, segment) = if stores { (STORED, stored) } else { (FIRST..end, looked_at) };
            let (mmu, all, stopped) = (Arc::clone(&mmu), importers.clone(), Arc::clone(&stress.stopped));
            let ending = ending.clone();
            let place = Arc::new(Place { number, mmu, all, segment, pages, stores, stopped, ending });
            let ear = Arc::clone(&place);
            let name = format!("importer {}", place.number);
            let ear = Thread::start("importer's ear", &format!("{name}, its ear"), move || ear.listen())?;
            stress.threads.push(ear);
            stress.threads.push(Thread::start("importer", &name, move || place.live())?);
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

/// Where importers live, one after the other.
struct Place {
    number: u32,
    mmu: Arc<Mmu>,
    all: Importers,
    segment: SegmentId,
    pages: Range<u32>,
    stores: bool,
    stopped: Arc<AtomicBool>,
    ending: Ending,
}

impl Place {
    fn importers(&self) -> impl Iterator<Item = Importer<Arc<Mmu>>> {
        (0..LIVES).map(|life| Importer {
            mmu: Arc::clone(&self.mmu),
            all: self.all.clone(),
            id: life * PLACES + self.number,
            segment: self.segment,
            stores: self.stores,
            manner: Manner::Honest,
        })
    }

    fn is_over(&self) -> bool {
        self.stopped.load(Ordering::Relaxed) || self.ending.is_set()
    }

    /// The last of them does nothing: its ear may be waiting already.
    fn live(&self) {
        for importer in self.importers() {
            let is_last = self.is_over();
            let first = self.pages.start + draw(self.pages.len() as u64);
            let wanted = first..self.pages.end.min(first + WANTED);
            let steps = if is_last { 0 } else { u64::from(draw(STEPS)) };
            self.ending.watch("importer", || importer.live(wanted, steps, &InTime));
            if is_last {
                return;
            }
        }
    }

    fn listen(&self) {
        for importer in self.importers() {
            self.ending.watch("importer's ear", || importer.listen(&InTime));
            if self.is_over() {
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
    let run_from = |first: u32, end: u32| {
        (first..end.min(first + 1 + draw(u64::from(CLUSTER)))).map(Gfn).collect::<Vec<_>>()
    };
    let run = || run_from(page(), pages);
    let stored = || run_from(STORED.start + draw(STORED.len() as u64), STORED.end);
    let (what, taken) = match draw(6) {
        0 => ("a run", mmu.page_out(None, &run())?),
        1 => ("single ones", mmu.page_out(None, &(0..SINGLE).map(|_| Gfn(page())).collect::<Vec<_>>())?),
        2 => {
            let pages = run();
            match mmu.page_out_atomic(None, &pages) {
                Ok(taken) => ("without sleep", taken),
                Err(WouldBlock) => ("the rest of a run", mmu.page_out(None, &pages)?),
            }
        }
        3 => ("of the shadow", mmu.evict_shadow(1 + draw(TABLES))),
        4 => ("of the importers'", mmu.page_out(None, &stored())?),
        _ => ("the idle", mmu.reclaim(1 + draw(u64::from(CLUSTER)), Cause::Reclaim, None)?),
    };
    sim::note(|line| {
        use std::fmt::Write;
        let _ = write!(line, "takes {taken} pages, {what}");
    });
    Ok(())
}
