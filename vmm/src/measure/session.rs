//! A measurement, beside the guest that it is of.
//!
//! Story: once the guest has its pages, the causes take their turns for the time of the warm-up, and nothing counts. Then they
//! do so for the time of the measurement, in intervals; before each a round of floors is measured. After each start the MMU's
//! records are taken: those that it left are its own. Ctrl-C, or the guest's end, ends it early, with what there is.
//!
//! Where there are importers, the time is in pieces: before each, importers have all pages that are taken in it, and as many of them as
//! it is the turn of. That is not counted, and no start is late for it.
//!
//! Holds: records are taken at least every [`TAKE`], so that none is lost while fewer than `RECORDS_MAX` come in that time.

use std::io::{self, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};

use umbra_mmu::Gfn;
use umbra_mmu::records::{Cause, Totals};

use super::Order;
use super::causes::{Came, Targets};
use super::collect::{Collected, Ended};
use super::files::IntervalLog;
use super::floors::{DEADLINE, Floors};
use super::importers::{Bare, Folder, Importers, Trouble};
use super::precise_sleep;
use super::schedule::{Counts, Pace, Schedule};
use crate::cli::{ExportPolicy, RunArgs};
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
/// Starts that importers who are stopped may leave unanswered.
const STOPPED_STARTS: u64 = 64;

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
    /// Importers could not be had.
    NoImporters,
    /// There was no time for a single start.
    NoStart,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Why it ended.
    pub why: Stop,
    /// What was wrong with importers.
    pub trouble: Option<String>,
    /// Their numbers.
    pub importers: Vec<u32>,
    /// All histograms by interval, as HdrHistogram's log has them, where somebody wants it.
    pub log: Vec<u8>,
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
    floors: Option<Floors>,
    /// Where the export socket is, if it is ours alone.
    folder: Option<Folder>,
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
        let own = !order.importers.is_empty() && order.run.export.is_none();
        let folder = own.then(Folder::new).transpose()?;
        Ok(Session { order, interrupts, floors: Some(Floors::new(order.rate)?), folder, findings: None })
    }

    /// How the guest runs.
    pub fn run(&self) -> RunArgs {
        let export = self.folder.as_ref().map(Folder::socket).or_else(|| self.order.run.export.clone());
        RunArgs { export, ..self.order.run.clone() }
    }
}

impl Companion for Session<'_> {
    fn work(&mut self, beside: &Beside) {
        precise_sleep();
        let floors = self.floors.take();
        let mut run = Run::new(self, beside, floors);
        let why = run.whole();
        self.findings = Some(run.findings(why));
        beside.finish();
    }
}

/// A measurement that is being made.
struct Run<'a> {
    session: &'a Session<'a>,
    beside: &'a Beside,
    targets: Targets,
    floors: Option<Floors>,
    importers: Importers,
    trouble: Option<String>,
    log: Option<IntervalLog>,
    all: Collected,
    starts: Counts,
    /// When they are.
    pace: Pace,
    /// Whose turn it is.
    turn: usize,
    /// And how many importers have the pages.
    step: usize,
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
    fn new(session: &'a Session<'a>, beside: &'a Beside, floors: Option<Floors>) -> Run<'a> {
        // A line of `--status` has the terminal for itself.
        let shows = io::stderr().is_terminal() && !session.order.run.status;
        Run {
            session,
            beside,
            targets: session.order.targets.clone(),
            floors,
            importers: Importers::default(),
            trouble: None,
            log: session.order.hgrm.is_some().then(IntervalLog::new),
            all: Collected::default(),
            starts: Counts::default(),
            pace: Pace::new(session.order.rate),
            turn: 0,
            step: 0,
            lasted: 0,
            before: Default::default(),
            progress: shows.then(Progress::on_stderr),
            began: Instant::now(),
        }
    }

    fn whole(&mut self) -> Stop {
        let order = self.session.order;
        if let Err(why) = self.settle().and_then(|()| self.start_importers()) {
            return why;
        }
        let warm_up = self.stretch(nanos(order.warm_up));
        (self.all, self.starts, self.lasted) = Default::default();
        self.pace = Pace::new(order.rate);
        self.all.by_told = !order.importers.is_empty();
        self.before = self.beside.mmu.records().take_all().totals;
        match warm_up.and_then(|()| self.intervals()) {
            Err(why) => why,
            Ok(()) if self.starts.begun == 0 => Stop::NoStart,
            Ok(()) => Stop::Done,
        }
    }

    /// Starts as many as have pages at once at most, and as many that have none.
    fn start_importers(&mut self) -> Result<(), Stop> {
        let order = self.session.order;
        let Some(most) = order.importers.iter().max().copied() else { return Ok(()) };
        let (Some(export), Some(range)) = (self.session.run().export, self.targets.as_range()) else {
            return Err(Stop::NoImporters);
        };
        let mut look = || self.look().is_ok();
        let started =
            Importers::start(most, &export, range, order.ack_delay, &mut look).and_then(|importers| {
                // Stopped ones answer nobody: there is nothing to compare them with.
                let bare = if order.stop_importers { 0 } else { most };
                Ok((importers, Bare::start(bare, order.ack_delay, &mut look)?))
            });
        let (importers, bare) = started.map_err(|trouble| self.lost(&trouble))?;
        self.importers = importers;
        if let Some(floors) = self.floors.as_mut().filter(|_| !order.stop_importers) {
            floors.bare = bare;
            floors.counts = order.importers.iter().copied().filter(|count| *count > 0).collect();
        }
        Ok(())
    }

    /// Importers are of no use: why it ends.
    fn lost(&mut self, trouble: &Trouble) -> Stop {
        if let Err(why) = self.look() {
            return why;
        }
        let run = &self.session.order.run;
        let records = self.beside.mmu.records();
        let late: u64 = Cause::ALL.iter().map(|cause| records.totals(*cause).late).sum();
        let parted = late > 0 && run.export_policy != ExportPolicy::Keep;
        let why = parted.then(|| {
            format!(
                "; {late} answer(s) did not come within {}, and who is late is parted with: give importers more time (--export SOCKET \
                 --export-deadline), the machine less to do, or keep them (--export-policy keep)",
                format_duration(run.export_deadline)
            )
        });
        self.trouble = Some(format!("{trouble}{}", why.unwrap_or_default()));
        Stop::NoImporters
    }

    /// Waits until the guest has its pages.
    fn settle(&mut self) -> Result<(), Stop> {
        let end = Instant::now() + SETTLE_MAX;
        while !self.session.order.settled.are_resident(&self.beside.mmu) {
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
            if let Some(floors) = &self.floors {
                // The guest's own pages: importers' are not in the way, nor taken.
                let mut targets = self.session.order.settled.clone();
                floors.round(self.beside, &mut targets, &mut self.all);
            }
            if self.session.order.stop_importers {
                self.all.floor(DEADLINE, nanos(self.session.order.run.export_deadline));
            }
            let at = self.lasted;
            let end = self.stretch(each);
            self.end_interval(at, self.lasted - at);
            end?;
        }
        Ok(())
    }

    fn end_interval(&mut self, at: u64, lasted: u64) {
        self.take(None);
        let log = &mut self.log;
        self.all.end_interval(at, lasted, |group, measure, histogram| {
            if let Some(log) = log {
                log.add(group, measure, at, lasted, histogram);
            }
        });
    }

    /// The causes take their turns for so long, which is counted.
    fn stretch(&mut self, lasts: u64) -> Result<(), Stop> {
        let mut left = lasts;
        while left > 0 {
            let piece = self.piece(left);
            self.have_pages()?;
            let began = now();
            let mut schedule = self.pace.stretch(began, piece);
            let done = self.follow(&mut schedule);
            self.importers.go_on();
            self.starts = self.starts.plus(schedule.counts());
            self.lasted += now() - began;
            done?;
            left -= piece;
        }
        Ok(())
    }

    /// How much of `left` can be done before importers must have their pages again.
    fn piece(&self, left: u64) -> u64 {
        let order = self.session.order;
        let Some((_, pages)) = self.targets.as_range().filter(|_| !order.importers.is_empty()) else {
            return left;
        };
        let starts = u64::from((pages / order.pages).max(1));
        let starts = if order.stop_importers { starts.min(STOPPED_STARTS) } else { starts };
        (starts * nanos(Duration::from_secs(1)) / u64::from(order.rate.max(1))).clamp(1, left)
    }

    /// As many importers as it is the turn of have all pages, when this returns.
    fn have_pages(&mut self) -> Result<(), Stop> {
        let order = self.session.order;
        let (Some(range), false) = (self.targets.as_range(), order.importers.is_empty()) else {
            return Ok(());
        };
        let count = order.importers[self.step % order.importers.len()];
        self.step += 1;
        let importers = std::mem::take(&mut self.importers);
        let have = importers.have(count, range, &mut || self.look().is_ok());
        self.importers = importers;
        if order.stop_importers {
            self.importers.stop();
        }
        // What that took is not ours.
        self.take(None);
        have.map_err(|trouble| self.lost(&trouble))
    }

    fn follow(&mut self, schedule: &mut Schedule) -> Result<(), Stop> {
        let over = schedule.over();
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
        let importers = self.importers.numbers();
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
            trouble: self.trouble,
            importers,
            log: self.log.map(IntervalLog::into_bytes).unwrap_or_default(),
            lasted: self.lasted,
            all: self.all,
            starts: self.starts,
            totals,
            backend: self.beside.backend,
            shootdown: self.beside.shootdown,
        }
    }
}
