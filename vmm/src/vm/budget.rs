//! The frame budget over time: `--frames 24M@0s,8M@2s`.
//!
//! Story: the schedule is read and checked before the run. Its first step holds from the beginning; a timer in the event
//! loop takes the others.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use umbra_mmu::swap::{MemorySwap, SwapDevice};
use umbra_mmu::sync::sim;
use umbra_mmu::{Mmu, PAGE_SIZE};
use vmm_sys_util::timerfd::TimerFd;

use super::RunError;
use super::events::add;
use crate::cli::{RunArgs, Swap};
use crate::swap::{FailingSwap, SwapFile};
use crate::units::{UnitError, format_duration, format_size, parse_duration, parse_size};

/// Guest memory that never goes to swap, unless the command line says otherwise.
const LOW_DEFAULT: u64 = 8 << 20;
/// Roots kept at once: address spaces times two, of which the least recently loaded go.
const ROOTS_MAX: u32 = 128;
/// One root for so many frames, where those are few.
const ROOTS_SHARE: u64 = 64;
/// The most steps of a schedule.
pub const STEPS_MAX: usize = 1000;

/// Why a text is no schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// A size or a time.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// Not whole pages.
    #[error("'{0}' is not a whole number of 4 KiB frames")]
    NotPages(String),
    /// Not in order.
    #[error("the step at {} does not come after the one at {}; write the steps in order of time", format_duration(*later), format_duration(*earlier))]
    Order {
        /// The step before.
        earlier: Duration,
        /// The step.
        later: Duration,
    },
    /// Nothing from the beginning.
    #[error("the first step is at {}; a schedule begins at 0s", format_duration(*.0))]
    NoBeginning(Duration),
    /// Too many.
    #[error("{0} steps are too many; at most {STEPS_MAX}")]
    TooMany(usize),
}

/// A budget from some time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Since the guest was started.
    pub at: Duration,
    /// Machine memory for the guest and its tables, in bytes: whole frames.
    pub bytes: u64,
}

impl Step {
    /// The budget in frames.
    pub fn frames(self) -> u32 {
        u32::try_from(self.bytes / PAGE_SIZE).unwrap_or(u32::MAX)
    }
}

/// Budgets over time, from the beginning on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule(Vec<Step>);

impl Schedule {
    /// The steps, in order; the first is at 0.
    pub fn steps(&self) -> &[Step] {
        &self.0
    }
}

/// Reads `SIZE` or `SIZE@TIME,SIZE@TIME,..`.
///
/// # Errors
///
/// When it is no such text, or out of order.
pub fn parse_schedule(text: &str) -> Result<Schedule, ScheduleError> {
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > STEPS_MAX {
        return Err(ScheduleError::TooMany(parts.len()));
    }
    let mut steps: Vec<Step> = Vec::with_capacity(parts.len());
    for part in parts {
        let (size, at) = match part.split_once('@') {
            Some((size, at)) => (size, parse_duration(at)?),
            None => (part, Duration::ZERO),
        };
        let bytes = parse_size(size)?;
        if bytes % PAGE_SIZE != 0 {
            return Err(ScheduleError::NotPages(size.into()));
        }
        match steps.last() {
            None if at > Duration::ZERO => return Err(ScheduleError::NoBeginning(at)),
            Some(before) if before.at >= at => {
                return Err(ScheduleError::Order { earlier: before.at, later: at });
            }
            _ => steps.push(Step { at, bytes }),
        }
    }
    Ok(Schedule(steps))
}

/// Frames, low memory and swap of a guest, as the command line has them.
#[derive(Debug)]
pub struct Overcommit {
    /// Budgets; `None` where there is enough for everything.
    pub schedule: Option<Schedule>,
    /// Pages that never go to swap.
    pub low_pages: u32,
    /// Roots of the shadow at most: they are two frames each, and stay.
    pub roots_max: u32,
}

impl Overcommit {
    /// What `args` ask for.
    pub fn new(args: &RunArgs) -> Overcommit {
        let schedule = args.frames.clone();
        let smallest = schedule.iter().flat_map(Schedule::steps).map(|step| step.bytes).min();
        let low = args.low.unwrap_or(LOW_DEFAULT.min(smallest.unwrap_or(u64::MAX) / 4));
        let roots = smallest.map_or(ROOTS_MAX, |bytes| (bytes / PAGE_SIZE / ROOTS_SHARE) as u32);
        Overcommit {
            schedule,
            low_pages: (low.min(args.mem) / PAGE_SIZE) as u32,
            roots_max: roots.min(ROOTS_MAX),
        }
    }

    /// Gives `mmu` its swap, and its budget from the beginning on, having looked at all that will follow.
    ///
    /// # Errors
    ///
    /// When a budget is too small, or the swap file cannot be made.
    pub fn apply(&self, mmu: Mmu, args: &RunArgs) -> Result<Mmu, RunError> {
        let Some(schedule) = &self.schedule else { return Ok(mmu) };
        let mut swap: Box<dyn SwapDevice> = match &args.swap {
            None => Box::new(MemorySwap::new(pages(args.mem))),
            Some(Swap::Memory(bytes)) => Box::new(MemorySwap::new(pages(*bytes))),
            Some(Swap::File(path)) => Box::new(SwapFile::create(path, pages(args.mem))?),
        };
        if !args.swap_fault.is_empty() {
            swap = Box::new(FailingSwap::new(swap, args.swap_fault.clone()));
        }
        let mmu = mmu.with_swap(swap);
        for step in schedule.steps().iter().rev() {
            let set = mmu.set_budget(step.frames());
            set.map_err(|source| RunError::Budget { at: step.at, source })?;
        }
        Ok(mmu)
    }
}

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX)
}

/// Takes the steps of a schedule when their time comes.
pub struct BudgetTimer {
    mmu: Arc<Mmu>,
    timer: TimerFd,
    /// Those to come, the next one last.
    steps: Vec<Step>,
    now: Duration,
}

impl BudgetTimer {
    /// A timer for the steps after the first, from now on.
    ///
    /// # Errors
    ///
    /// When the host has no timer left.
    pub fn new(mmu: Arc<Mmu>, schedule: &Schedule) -> io::Result<BudgetTimer> {
        let mut steps = schedule.steps()[1..].to_vec();
        steps.reverse();
        let mut timer = BudgetTimer { mmu, timer: TimerFd::new()?, steps, now: Duration::ZERO };
        timer.arm()?;
        Ok(timer)
    }

    /// When the next step is, in a simulation, whose clock takes it.
    pub fn next(&self) -> Option<Duration> {
        self.steps.last().map(|step| step.at)
    }

    fn arm(&mut self) -> io::Result<()> {
        if sim::is_on() {
            return Ok(());
        }
        let Some(next) = self.steps.last() else { return Ok(()) };
        let wait = next.at.saturating_sub(self.now);
        self.timer.reset(wait, None).map_err(io::Error::from)
    }

    /// Takes it.
    pub fn step(&mut self) {
        let Some(step) = self.steps.pop() else { return };
        self.now = step.at;
        log::debug!("the budget is {} from {} on", format_size(step.bytes), format_duration(step.at));
        // The steps were checked before the run.
        if let Err(error) = self.mmu.set_budget(step.frames()) {
            log::warn!("--frames at {}: {error}", format_duration(step.at));
        }
        if let Err(error) = self.arm() {
            log::error!("the rest of --frames is lost: {error}");
        }
    }
}

impl MutEventSubscriber for BudgetTimer {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if self.timer.wait().is_ok() {
            self.step();
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        add(ops, Events::new_raw(self.timer.as_raw_fd(), EventSet::IN));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(mib: u64, millis: u64) -> Step {
        Step { at: Duration::from_millis(millis), bytes: mib << 20 }
    }

    #[test]
    fn a_schedule_is_steps_in_order_from_the_beginning() {
        assert_eq!(parse_schedule("24M").expect("one"), Schedule(vec![step(24, 0)]));
        let three = parse_schedule("24M@0s,8M@2s,16M@2500ms").expect("three");
        assert_eq!(three.steps(), [step(24, 0), step(8, 2000), step(16, 2500)]);
    }

    #[test]
    fn a_bad_schedule_says_what_is_wrong() {
        for (text, word) in [
            ("", "not a size"),
            ("24M,8M", "in order of time"),
            ("24M,8M@2s,9M@1s", "in order of time"),
            ("8M@1s", "begins at 0s"),
            ("24M@soon", "not a duration"),
            ("5000", "whole number of 4 KiB"),
            ("24M@0s,", "not a size"),
        ] {
            let error = parse_schedule(text).expect_err(text).to_string();
            assert!(error.contains(word), "'{text}': {error}");
        }
        let many = vec!["1M"; STEPS_MAX + 1].join(",");
        assert_eq!(parse_schedule(&many), Err(ScheduleError::TooMany(STEPS_MAX + 1)));
    }
}
