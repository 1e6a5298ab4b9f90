//! A measurement, beside the guest that it is of.
//!
//! Story: once the guest has its pages, the causes take their turns for the time of the warm-up, and nothing counts. Then they
//! do so for the time of the measurement, in intervals; before each a round of floors is measured. After each start the MMU's
//! records are taken: those that it left are its own. Ctrl-C, or the guest's end, ends it early, with what there is.
//!
//! Holds: records are taken at least every [`TAKE`], so that none is lost while fewer than `RECORDS_MAX` come in that time.

use std::io::{self, IsTerminal};
use std::num::NonZeroU64;
use std::thread;
use std::time::{Duration, Instant};

use umbra_mmu::Gfn;
use umbra_mmu::records::{Cause, Totals};

use super::Order;
use super::causes::{Came, Targets};
use super::collect::{Collected, Ended};
use super::floors::Floors;
use super::schedule::{Counts, Schedule};
use crate::pressure::progress::Progress;
use crate::units::format_duration;
use crate::vm::{Beside, Companion, process_start};

/// How often records are taken, if nothing ends.
pub const TAKE: Duration = Duration::from_millis(5);
/// Intervals of a measurement, at most and at least.
pub const INTERVALS_MAX: u32 = 20;
const INTERVALS_MIN: u32 = 4;
/// How long an interval is, if they are neither too many nor too few then.
const INTERVAL: Duration = Duration::from_millis(250);
/// How long a guest may take until it has its pages.
const SETTLE_MAX: Duration = Duration::from_secs(20);

/// Why a measurement ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stop {
    /// All of it is there.
    Done,
    /// Somebody has interrupted it.
    Interrupted,
    /// The guest's run has ended.
    #[default]
    GuestEnded,
    /// The guest has not come to its pages.
    NotSettled,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Why it ended.
    pub why: Stop,
    /// How long was measured, in nanoseconds, the rounds of floors not among it.
    pub lasted: u64,
    /// The histograms.
    pub all: Collected,
    /// The starts.
    pub starts: Counts,
    /// What the MMU itself has counted from beginning to end, by cause.
    pub totals: [Totals; Cause::ALL.len()],
    /// "kvm" or "soft".
    pub backend: &'static str,
    /// How vCPUs were made to forget pages.
    pub shootdown: &'static str,
}

/// A measurement that is to be made.
pub struct Session<'a> {
    order: &'a Order,
    interrupts: &'a (dyn Fn() -> u32 + Sync),
    floors: Floors,
    /// What came of it, once it has been made.
    pub findings: Option<Findings>,
}

impl<'a> Session<'a> {
    /// What `order` asks for. `interrupts` counts those who want it to end.
    ///
    /// # Errors
    ///
    /// When the host has no file in memory for the floors.
    pub fn new(order: &'a Order, interrupts: &'a (dyn Fn() -> u32 + Sync)) -> io::Result<Session<'a>> {
        Ok(Session { order, interrupts, floors: Floors::new()?, findings: None })
    }
}

impl Companion for Session<'_> {
    fn work(&mut self, beside: &Beside) {
        precise_sleep();
        let mut run = Run::new(self, beside);
        let why = run.whole();
        self.findings = Some(run.findings(why));
        beside.finish();
    }
}

/// Has this thread woken when its time has come, and not some time after. Where the host does not do so, starts are later.
fn precise_sleep() {
    if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
        log::warn!("the host's timers are as exact as they are: {error}");
    }
}

/// A measurement that is being made.
struct Run<'a> {
    session: &'a Session<'a>,
    beside: &'a Beside,
    targets: Targets,
    all: Collected,
    starts: Counts,
    /// Whose turn it is.
    turn: usize,
    lasted: u64,
    /// The MMU's totals when it began.
    before: [Totals; Cause::ALL.len()],
    progress: Option<Progress>,
    began: Instant,
}

/// Now, by the MMU's clock.
fn now() -> u64 {
    process_start().elapsed().as_nanos() as u64
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl<'a> Run<'a> {
    fn new(session: &'a Session<'a>, beside: &'a Beside) -> Run<'a> {
        // A line of `--status` has the terminal for itself.
        let shows = io::stderr().is_terminal() && !session.order.run.status;
        Run {
            session,
            beside,
            targets: session.order.targets.clone(),
            all: Collected::default(),
            starts: Counts::default(),
            turn: 0,
            lasted: 0,
            before: Default::default(),
            progress: shows.then(Progress::on_stderr),
            began: Instant::now(),
        }
    }

    fn whole(&mut self) -> Stop {
        let order = self.session.order;
        if let Err(why) = self.settle() {
            return why;
        }
        let warm_up = self.stretch(nanos(order.warm_up));
        (self.all, self.starts, self.lasted) = Default::default();
        self.before = self.beside.mmu.records().take_all().totals;
        warm_up.err().unwrap_or_else(|| self.intervals().err().unwrap_or(Stop::Done))
    }

    /// Waits until the guest has its pages.
    fn settle(&mut self) -> Result<(), Stop> {
        let end = Instant::now() + SETTLE_MAX;
        while !self.targets.are_resident(&self.beside.mmu) {
            self.look()?;
            if Instant::now() > end {
                return Err(Stop::NotSettled);
            }
            thread::sleep(TAKE);
        }
        Ok(())
    }

    fn intervals(&mut self) -> Result<(), Stop> {
        let lasts = self.session.order.lasts;
        let count = (lasts.as_millis() / INTERVAL.as_millis()) as u32;
        let count = count.clamp(INTERVALS_MIN, INTERVALS_MAX);
        let each = nanos(lasts) / u64::from(count);
        for _ in 0..count {
            self.session.floors.round(self.beside, &mut self.targets, &mut self.all);
            let (at, began) = (self.lasted, now());
            let end = self.stretch(each);
            self.end_interval(at, now() - began);
            end?;
        }
        Ok(())
    }

    fn end_interval(&mut self, at: u64, lasted: u64) {
        self.take(None);
        self.lasted += lasted;
        self.all.end_interval(at, lasted, |_, _, _| ());
    }

    /// The causes take their turns for so long.
    fn stretch(&mut self, lasts: u64) -> Result<(), Stop> {
        let mut schedule = Schedule::new(now(), self.session.order.rate, lasts);
        let over = schedule.over().max(now().saturating_add(lasts));
        let done = self.follow(&mut schedule, over);
        self.starts = self.starts.plus(schedule.counts());
        done
    }

    fn follow(&mut self, schedule: &mut Schedule, over: u64) -> Result<(), Stop> {
        while now() < over
            && let Some(start) = schedule.next()
        {
            // Found beforehand, where there is time.
            let pages = self.targets.next(&self.beside.mmu, self.session.order.pages);
            self.wait_until(start.intended)?;
            self.start(start.intended, &pages)?;
            schedule.end(now());
        }
        self.wait_until(over)
    }

    /// One start.
    fn start(&mut self, intended: u64, pages: &[Gfn]) -> Result<(), Stop> {
        let order = self.session.order;
        let asked = order.causes[self.turn % order.causes.len()];
        self.turn += 1;
        let began = now();
        let came = match pages.is_empty() {
            true => Ok(Came::Failed("no page of the guest has a frame that may go")),
            false => asked.take(self.beside, pages),
        };
        let one = Ended { asked, intended, began, ended: now() };
        self.take(Some(&one));
        match came {
            Ok(Came::Done) => self.all.start(&one, None),
            Ok(Came::Failed(why)) => self.all.start(&one, Some(why)),
            Err(failed) => {
                self.beside.fail(failed);
                return Err(Stop::GuestEnded);
            }
        }
        Ok(())
    }

    /// Sleeps until then, by the MMU's clock.
    fn wait_until(&mut self, at: u64) -> Result<(), Stop> {
        loop {
            self.look()?;
            let left = Duration::from_nanos(at.saturating_sub(now()));
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(TAKE));
            if left > TAKE {
                self.take(None);
            }
        }
    }

    fn take(&mut self, during: Option<&Ended>) {
        self.all.take(&self.beside.mmu.records().take_all(), during);
    }

    /// Is it to go on? Shows how far it is.
    fn look(&mut self) -> Result<(), Stop> {
        let order = self.session.order;
        if let Some(progress) = &mut self.progress {
            let (at, whole) = (self.began.elapsed(), order.warm_up + order.lasts);
            progress.show(at, at.as_secs_f64() / whole.as_secs_f64(), || {
                format!(
                    "{:.1}s of {}, {} starts",
                    at.as_secs_f64(),
                    format_duration(whole),
                    self.starts.begun
                )
            });
        }
        match (self.beside.has_ended(), (self.session.interrupts)()) {
            (true, _) => Err(Stop::GuestEnded),
            (false, 0) => Ok(()),
            (false, _) => Err(Stop::Interrupted),
        }
    }

    fn findings(mut self, why: Stop) -> Findings {
        // Now or never: totals that belong to exactly what was taken.
        let taken = self.beside.mmu.records().take_all();
        self.all.take(&taken, None);
        self.all.end_interval(self.lasted, 0, |_, _, _| ());
        let mut totals = taken.totals;
        for (after, before) in totals.iter_mut().zip(&self.before) {
            after.count -= before.count;
            after.pages -= before.pages;
            after.skipped -= before.skipped;
            after.kicked -= before.kicked;
            after.nanos -= before.nanos;
        }
        Findings {
            why,
            lasted: self.lasted,
            all: self.all,
            starts: self.starts,
            totals,
            backend: self.beside.backend,
            shootdown: self.beside.shootdown,
        }
    }
}
