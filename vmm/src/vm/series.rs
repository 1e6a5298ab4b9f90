//! What the MMU held over time: for `--json`, `--plot` and `--status`.
//!
//! Story: a timer in the event loop takes a sample of the MMU's counts every [`INTERVAL`]. When [`SAMPLES_MAX`] are there,
//! every second one goes and the interval doubles, so that a run of any length has a series of bounded length.
//!
//! Holds: the samples are in order of time; the first is of the guest's start, and the last of its end. Nothing is sampled
//! unless somebody asks.

use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::ser::{Error, Serialize, SerializeMap, Serializer};
use serde_json::value::to_raw_value;
use umbra_mmu::{Mmu, PAGE_SIZE, Usage};
use vmm_sys_util::timerfd::TimerFd;

use super::events::add;
use super::live::LiveLine;
use crate::machine::Pool;
use crate::virtio::balloon::{Balloon, BalloonState};

/// From one sample to the next, at the beginning.
pub const INTERVAL: Duration = Duration::from_millis(50);
/// How often a guest with a balloon driver is asked for statistics.
const STATS_PERIOD: Duration = Duration::from_secs(1);
/// The most samples of a series.
pub const SAMPLES_MAX: usize = 2048;

/// The MMU's counts at one moment. Pages and frames are of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Since the guest was started.
    pub at: Duration,
    /// The most frames that the host may have to back.
    pub budget: u32,
    /// Those that it may be backing.
    pub frames_used: u32,
    /// Frames that an ordinary taker could still have.
    pub frames_free: u32,
    /// Guest pages that have a frame.
    pub resident: u32,
    /// Guest pages in swap.
    pub swapped: u32,
    /// Guest pages that the guest has given up.
    pub ballooned: u32,
    /// Shadow pages in use.
    pub shadow_pages: u32,
    /// Pages read back because somebody wanted them, so far; as are all that follow.
    pub refaults: u64,
    /// Pages written to swap.
    pub swap_outs: u64,
    /// Writes to swap, each of adjacent pages.
    pub swap_writes: u64,
    /// Pages dropped that were zeros.
    pub zero_drops: u64,
    /// Pages dropped that swap had a good copy of.
    pub clean_drops: u64,
    /// Invalidations.
    pub invalidations: u64,
    /// Times that somebody who may not sleep was told WouldBlock.
    pub would_blocks: u64,
    /// Times that a vCPU had to reclaim for itself.
    pub direct_reclaims: u64,
    /// Times that a vCPU slept at the gate of a page that was changing hands.
    pub gate_waits: u64,
    /// Times that a vCPU waited for a page to be brought in; to reclaim for itself is one reason.
    pub page_waits: u64,
    /// Pages of the guest's machine memory that the host says it backs. `None` where it cannot be asked.
    pub host_backs: Option<u64>,
    /// Pages that the guest's balloon driver says it has given up, at that moment.
    pub balloon_actual: u32,
    /// Pages that the guest says nothing uses. `None` where it sends no statistics, as for the next one.
    pub guest_free: Option<u64>,
    /// Pages that the guest says it has read from a swap of its own, so far.
    pub guest_swap_ins: Option<u64>,
    /// Pages of a swap of its own that it says are in use.
    pub guest_swapped: Option<u64>,
}

impl Sample {
    /// What was in use `at` that time.
    pub fn of(usage: &Usage, at: Duration) -> Sample {
        Sample {
            at,
            budget: usage.budget,
            frames_used: usage.frames_used,
            frames_free: usage.frames_free,
            resident: usage.resident,
            swapped: usage.swapped,
            ballooned: usage.ballooned,
            shadow_pages: usage.shadow_pages,
            refaults: usage.refaults,
            swap_outs: usage.swap_outs,
            swap_writes: usage.swap_writes,
            zero_drops: usage.zero_drops,
            clean_drops: usage.clean_drops,
            invalidations: usage.invalidations,
            would_blocks: usage.would_blocks,
            direct_reclaims: usage.direct_reclaims,
            gate_waits: usage.gate_waits,
            page_waits: usage.page_waits,
            ..Sample::default()
        }
    }

    /// Times that a vCPU had to wait for a page, so far.
    fn stalls(&self) -> u64 {
        self.gate_waits.saturating_add(self.page_waits)
    }

    /// With what the guest says of itself.
    fn with_balloon(self, balloon: &BalloonState) -> Sample {
        let stats = balloon.stats.unwrap_or_default();
        Sample {
            balloon_actual: balloon.actual,
            guest_free: stats.free.map(|bytes| bytes / PAGE_SIZE),
            guest_swap_ins: stats.swap_in.map(|bytes| bytes / PAGE_SIZE),
            guest_swapped: stats.swapped.map(|bytes| bytes / PAGE_SIZE),
            ..self
        }
    }
}

/// What happened in a second, between two samples.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Pages read back because somebody wanted them.
    pub refaults: f64,
    /// Pages written to swap.
    pub swap_outs: f64,
    /// Invalidations.
    pub invalidations: f64,
    /// Waits of a vCPU: at the gate of a page, or for one to be brought in.
    pub stalls: f64,
    /// WouldBlocks of whoever may not sleep.
    pub would_blocks: f64,
    /// Pages that the guest has read from a swap of its own; `None` where it does not say.
    pub guest_swap_ins: Option<f64>,
}

impl Rates {
    /// The rates from `before` to `after`; `None` where no time has passed.
    pub fn between(before: &Sample, after: &Sample) -> Option<Rates> {
        let seconds = after.at.checked_sub(before.at).filter(|time| !time.is_zero())?.as_secs_f64();
        let rate = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
        Some(Rates {
            refaults: rate(before.refaults, after.refaults),
            swap_outs: rate(before.swap_outs, after.swap_outs),
            invalidations: rate(before.invalidations, after.invalidations),
            stalls: rate(before.stalls(), after.stalls()),
            would_blocks: rate(before.would_blocks, after.would_blocks),
            guest_swap_ins: before.guest_swap_ins.zip(after.guest_swap_ins).map(|(a, b)| rate(a, b)),
        })
    }
}

/// Samples in order of time. In JSON it is an object of arrays, one for each column, all of one length.
#[derive(Clone, Debug)]
pub struct Series {
    samples: Vec<Sample>,
    interval: Duration,
    /// When the next one is due.
    due: Duration,
}

impl Default for Series {
    fn default() -> Series {
        Series { samples: Vec::new(), interval: INTERVAL, due: Duration::ZERO }
    }
}

impl Series {
    /// The samples.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// From one sample to the next, now.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Takes a sample if one is due.
    pub fn offer(&mut self, sample: Sample) {
        if sample.at >= self.due {
            self.push(sample);
            self.due = next_multiple(sample.at, self.interval);
        }
    }

    /// Takes the sample of the end, due or not.
    pub fn finish(&mut self, sample: Sample) {
        // One from just before has nothing to add, and rates over next to no time say little.
        let (several, near) = (self.samples.len() > 1, self.interval / 2);
        self.samples.pop_if(|last| match sample.at.checked_sub(last.at) {
            Some(since) => since.is_zero() || (several && since < near),
            None => true,
        });
        self.push(sample);
    }

    fn push(&mut self, sample: Sample) {
        if self.samples.len() >= SAMPLES_MAX {
            self.thin();
        }
        self.samples.push(sample);
    }

    /// Every second one goes, and the first stays.
    fn thin(&mut self) {
        let mut goes = true;
        self.samples.retain(|_| {
            goes = !goes;
            !goes
        });
        self.interval = self.interval.saturating_mul(2);
    }
}

/// The first multiple of `interval` after `at`.
pub fn next_multiple(at: Duration, interval: Duration) -> Duration {
    let interval = interval.as_nanos().max(1);
    let next = (at.as_nanos() / interval + 1).saturating_mul(interval);
    Duration::from_nanos(u64::try_from(next).unwrap_or(u64::MAX))
}

/// A column's name in JSON, and its values; what nobody knows is null.
type Column = (&'static str, fn(&Sample) -> Option<u64>);

const COLUMNS: [Column; 23] = [
    ("at_micros", |s| Some(u64::try_from(s.at.as_micros()).unwrap_or(u64::MAX))),
    ("budget", |s| Some(s.budget.into())),
    ("frames_used", |s| Some(s.frames_used.into())),
    ("host_backs", |s| s.host_backs),
    ("frames_free", |s| Some(s.frames_free.into())),
    ("resident", |s| Some(s.resident.into())),
    ("swapped", |s| Some(s.swapped.into())),
    ("ballooned", |s| Some(s.ballooned.into())),
    ("shadow_pages", |s| Some(s.shadow_pages.into())),
    ("refaults", |s| Some(s.refaults)),
    ("swap_outs", |s| Some(s.swap_outs)),
    ("swap_writes", |s| Some(s.swap_writes)),
    ("zero_drops", |s| Some(s.zero_drops)),
    ("clean_drops", |s| Some(s.clean_drops)),
    ("invalidations", |s| Some(s.invalidations)),
    ("would_blocks", |s| Some(s.would_blocks)),
    ("direct_reclaims", |s| Some(s.direct_reclaims)),
    ("gate_waits", |s| Some(s.gate_waits)),
    ("page_waits", |s| Some(s.page_waits)),
    ("balloon_actual", |s| Some(s.balloon_actual.into())),
    ("guest_free", |s| s.guest_free),
    ("guest_swap_ins", |s| s.guest_swap_ins),
    ("guest_swapped", |s| s.guest_swapped),
];

impl Serialize for Series {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(COLUMNS.len()))?;
        for (name, value) in COLUMNS {
            let column: Vec<Option<u64>> = self.samples.iter().map(value).collect();
            // Raw, so that a column is one line also where the rest has a line for each value.
            map.serialize_entry(name, &to_raw_value(&column).map_err(S::Error::custom)?)?;
        }
        map.end()
    }
}

/// Takes samples of an MMU.
#[derive(Clone)]
pub struct Recorder {
    mmu: Arc<Mmu>,
    pool: Arc<Pool>,
    balloon: Balloon,
    started: Instant,
    state: Arc<Mutex<State>>,
}

struct State {
    series: Series,
    live: Option<LiveLine>,
    /// When the guest is asked for statistics.
    ask: Duration,
}

impl Recorder {
    /// Takes the first sample. `live` is shown all of them.
    pub fn start(mmu: Arc<Mmu>, pool: Arc<Pool>, balloon: Balloon, live: Option<LiveLine>) -> Recorder {
        let state = State { series: Series::default(), live, ask: Duration::ZERO };
        let state = Arc::new(Mutex::new(state));
        let recorder = Recorder { mmu, pool, balloon, started: Instant::now(), state };
        recorder.tick();
        recorder
    }

    /// What takes the others, for the event loop.
    ///
    /// # Errors
    ///
    /// When the host has no timer left.
    pub fn timer(&self) -> io::Result<SampleTimer> {
        let mut timer = TimerFd::new()?;
        timer.reset(INTERVAL, Some(INTERVAL))?;
        Ok(SampleTimer { recorder: self.clone(), timer, period: INTERVAL })
    }

    /// Takes the last sample, and erases the live line.
    pub fn finish(&self) -> Series {
        let sample = self.sample();
        let mut state = self.lock();
        if let Some(live) = &mut state.live {
            live.erase();
        }
        state.series.finish(sample);
        mem::take(&mut state.series)
    }

    /// Takes a sample for whom one is due, and says how long it is until the next.
    fn tick(&self) -> Duration {
        let sample = self.sample();
        let mut state = self.lock();
        // Of a guest that has never sent any, none are wanted.
        if sample.at >= state.ask && sample.guest_free.or(sample.guest_swap_ins).is_some() {
            state.ask = sample.at + STATS_PERIOD;
            self.balloon.ask_for_stats();
        }
        state.series.offer(sample);
        let interval = state.series.interval();
        match &mut state.live {
            Some(live) => {
                live.show(&sample);
                interval.min(live.period())
            }
            None => interval,
        }
    }

    fn sample(&self) -> Sample {
        let sample = Sample::of(&self.mmu.usage(), self.started.elapsed());
        let host_backs = self.pool.backed_bytes().ok().map(|bytes| bytes / PAGE_SIZE);
        Sample { host_backs, ..sample.with_balloon(&self.balloon.state()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has a [`Recorder`] take its samples in time.
pub struct SampleTimer {
    recorder: Recorder,
    timer: TimerFd,
    period: Duration,
}

impl MutEventSubscriber for SampleTimer {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if self.timer.wait().is_err() {
            return;
        }
        let period = self.recorder.tick();
        if period == self.period {
            return;
        }
        self.period = period;
        if let Err(error) = self.timer.reset(period, Some(period)) {
            log::warn!("the rest of the series is lost: {error}");
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        add(ops, Events::new_raw(self.timer.as_raw_fd(), EventSet::IN));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::balloon::GuestStats;

    fn at(millis: u64) -> Sample {
        Sample { at: Duration::from_millis(millis), ..Sample::default() }
    }

    /// A series that was offered a sample every 50 ms.
    fn offered(count: u64) -> Series {
        let mut series = Series::default();
        (0..count).for_each(|n| series.offer(at(n * 50)));
        series
    }

    fn gaps(series: &Series) -> Vec<Duration> {
        let mut gaps: Vec<_> = series.samples().windows(2).map(|pair| pair[1].at - pair[0].at).collect();
        gaps.sort_unstable();
        gaps.dedup();
        gaps
    }

    #[test]
    fn a_short_series_has_everything() {
        let series = offered(SAMPLES_MAX as u64);
        assert_eq!((series.samples().len(), series.interval()), (SAMPLES_MAX, INTERVAL));
    }

    #[test]
    fn a_full_series_loses_every_second_sample_and_doubles_its_interval() {
        let series = offered(SAMPLES_MAX as u64 + 1);
        assert_eq!((series.samples().len(), series.interval()), (SAMPLES_MAX / 2 + 1, 2 * INTERVAL));
        assert_eq!(gaps(&series), [2 * INTERVAL]);
    }

    #[test]
    fn a_long_series_stays_bounded_and_even_and_keeps_both_ends() {
        let count = 20 * SAMPLES_MAX as u64 + 7;
        let mut series = offered(count);
        let end = at(count * 50 + 3);
        series.finish(end);
        let samples = series.samples();
        assert!(samples.len() <= SAMPLES_MAX, "{}", samples.len());
        assert_eq!((samples.first(), samples.last()), (Some(&at(0)), Some(&end)));
        let even = &gaps(&Series { samples: samples[..samples.len() - 1].to_vec(), ..series.clone() });
        assert_eq!(even, &[series.interval()]);
    }

    #[test]
    fn the_end_comes_in_also_when_the_series_is_full_or_has_that_moment() {
        let mut full = offered(SAMPLES_MAX as u64);
        let end = at(SAMPLES_MAX as u64 * 50);
        full.finish(end);
        assert_eq!((full.samples().len(), full.samples().last()), (SAMPLES_MAX / 2 + 1, Some(&end)));
        full.finish(Sample { refaults: 1, ..end });
        assert_eq!(full.samples().len(), SAMPLES_MAX / 2 + 1);
        assert_eq!(full.samples().last().map(|last| last.refaults), Some(1));
    }

    #[test]
    fn the_end_stands_for_a_sample_just_before_it_but_never_for_the_first() {
        for (millis, times) in [(103, vec![0, 50, 103]), (140, vec![0, 50, 100, 140])] {
            let mut series = offered(3);
            series.finish(at(millis));
            let got: Vec<_> = series.samples().iter().map(|sample| sample.at.as_millis()).collect();
            assert_eq!(got, times);
        }
        let mut short = offered(1);
        short.finish(at(1));
        assert_eq!(short.samples(), [at(0), at(1)]);
    }

    #[test]
    fn a_late_tick_costs_its_own_sample_and_no_other() {
        let mut series = Series::default();
        [0, 51, 99, 104, 390, 400].into_iter().for_each(|millis| series.offer(at(millis)));
        let times: Vec<_> = series.samples().iter().map(|sample| sample.at.as_millis()).collect();
        assert_eq!(times, [0, 51, 104, 390, 400]);
        assert_eq!(next_multiple(Duration::MAX, INTERVAL), Duration::from_nanos(u64::MAX));
        assert_eq!(next_multiple(Duration::ZERO, Duration::ZERO), Duration::from_nanos(1));
    }

    #[test]
    fn rates_are_per_second_and_need_time() {
        let before = Sample { refaults: 10, invalidations: 7, ..at(1000) };
        let after = Sample { refaults: 110, invalidations: 3, swap_outs: u64::MAX, ..at(1500) };
        let rates = Rates::between(&before, &after).expect("time has passed");
        assert_eq!((rates.refaults, rates.invalidations), (200.0, 0.0));
        assert!(rates.swap_outs.is_finite());
        assert_eq!(Rates::between(&before, &before), None);
        assert_eq!(Rates::between(&after, &before), None);
    }

    #[test]
    fn json_has_a_line_of_values_for_each_column() {
        let mut series = Series::default();
        series.offer(Sample { resident: 5, ..at(0) });
        series.finish(Sample { resident: 9, refaults: u64::MAX, ..at(70) });
        let text = serde_json::to_string_pretty(&series).expect("JSON");
        assert_eq!(text.lines().count(), COLUMNS.len() + 2, "{text}");
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["at_micros"], serde_json::json!([0, 70_000]));
        assert_eq!(value["resident"], serde_json::json!([5, 9]));
        assert_eq!(value["refaults"], serde_json::json!([0, u64::MAX]));
        assert_eq!(value["guest_free"], serde_json::json!([null, null]));
    }

    #[test]
    fn a_guests_own_words_are_in_pages_and_absent_where_it_says_none() {
        let silent = at(0).with_balloon(&BalloonState { actual: 3, ..BalloonState::default() });
        assert_eq!((silent.balloon_actual, silent.guest_free, silent.guest_swap_ins), (3, None, None));
        let swapped = Some(5 * 4096);
        let stats = GuestStats { free: Some(8192), swap_in: Some(4096), swapped, ..GuestStats::default() };
        let talks = at(0).with_balloon(&BalloonState { stats: Some(stats), ..BalloonState::default() });
        let said = (talks.guest_free, talks.guest_swap_ins, talks.guest_swapped);
        assert_eq!(said, (Some(2), Some(1), Some(5)));
    }

    #[test]
    fn waits_at_gates_and_for_frames_are_stalls() {
        let before = Sample { gate_waits: 1, ..at(0) };
        let after =
            Sample { gate_waits: 3, page_waits: 5, direct_reclaims: 4, guest_swap_ins: Some(1), ..at(500) };
        let rates = Rates::between(&before, &after).expect("time has passed");
        assert_eq!((rates.stalls, rates.guest_swap_ins), (14.0, None));
    }
}
