//! Asking a guest and looking at it, to the end.
//!
//! Holds: nothing is asked of a guest once an interrupt has come, but what it was asked for before.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use super::args::{Level, Order, Taking, Task, Way};
use super::client::{Guest, Seen, Taken, bytes};
use super::clock::{Clock, HostClock};
use super::judge::{Evidence, RECENT, Reason, judge};
use super::plan::{STEP, Shape};
use super::progress::Progress;
use crate::status::Status;
use crate::units::{approximate_size, format_size};
use crate::vm::series::next_multiple;
use crate::vm::{Rates, Sample, Series};

/// How long a guest that is set back has to be as it was.
pub const SET_BACK: Duration = Duration::from_secs(2);
/// Bytes of one discard of several: without sleep, a piece is one invalidation.
const PIECE_BYTES: u64 = umbra_mmu::invalidation::BATCH_MAX as u64 * umbra_mmu::PAGE_SIZE;

/// How it came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// As asked.
    Reached,
    /// Not in time, for this reason.
    NotReached(String),
    /// It was interrupted, and how the guest is now.
    Interrupted(String),
}

/// All that there is to say in the end.
#[derive(Debug)]
pub struct Report {
    /// How it came out.
    pub end: End,
    /// All of it, in a line.
    pub summary: String,
    /// The guest over the time.
    pub series: Series,
}

impl Report {
    /// What the program ends with.
    pub fn status(&self) -> Status {
        match self.end {
            End::Reached => Status::Pass,
            End::NotReached(_) => Status::Timeout,
            End::Interrupted(_) => Status::Quit,
        }
    }
}

/// Does what `order` says. `interrupts` counts how often it is to stop.
///
/// # Errors
///
/// A sentence where it could not be done: the guest is not there, refuses, or could never come to it.
pub fn run(order: &Order, interrupts: &dyn Fn() -> u32) -> Result<Report, String> {
    run_by(&HostClock::start(), order, interrupts)
}

/// The same by another clock; answers of the server are waited for by the host's.
pub(super) fn run_by(
    clock: &dyn Clock,
    order: &Order,
    interrupts: &dyn Fn() -> u32,
) -> Result<Report, String> {
    let mut watch = Watch {
        guest: Guest::open(order.socket, order.timeout, clock)?,
        clock,
        order,
        interrupts,
        progress: Progress::on_stderr(),
        series: Series::default(),
        looks: VecDeque::new(),
        rates: Rates::default(),
        asked: None,
    };
    let (end, summary) = match order.task {
        Task::Level(level, shape) => watch.level(level, shape)?,
        Task::Take(taking) => watch.take(&taking)?,
    };
    Ok(Report { end, summary, series: watch.finish() })
}

struct Watch<'a> {
    guest: Guest<'a>,
    clock: &'a dyn Clock,
    order: &'a Order<'a>,
    interrupts: &'a dyn Fn() -> u32,
    progress: Progress,
    series: Series,
    /// The last looks: one that is [`RECENT`] old, if there is one, and all since.
    looks: VecDeque<Seen>,
    /// Between the last two.
    rates: Rates,
    /// What was last asked of the guest, in bytes.
    asked: Option<u64>,
}

/// Where a guest has come to: so much time was given, and why it is over.
struct Course {
    begun: Duration,
    last: Seen,
    /// The least and the most that the host backed, in bytes.
    backed: (u64, u64),
    /// What was asked last.
    part: Option<Part>,
    /// Of a wave: its low and its high size.
    halves: [Half; 2],
    how: How,
}

/// A time in which the same is asked of a guest. All steps of a ramp are one.
struct Part {
    /// What that is, by its shape.
    want: Option<u64>,
    /// What there is to reach.
    goal: u64,
    /// The guest before it.
    before: Seen,
    reached: bool,
}

/// What became of one size of a wave.
#[derive(Clone, Copy, Debug, Default)]
struct Half {
    /// How often it was asked for.
    times: u32,
    /// How often it was reached before the other was asked for.
    reached: u32,
    /// Why it was not, the last time.
    why: Option<Reason>,
}

enum How {
    Reached,
    NoTime,
    Interrupted,
}

impl Watch<'_> {
    fn is_interrupted(&self) -> bool {
        (self.interrupts)() > 0
    }

    fn look(&mut self) -> Result<Seen, String> {
        let seen = self.guest.look()?;
        let before = self.looks.back().map(|before| before.sample);
        self.rates = before.and_then(|before| Rates::between(&before, &seen.sample)).unwrap_or_default();
        self.series.offer(seen.sample);
        self.looks.push_back(seen);
        while self.looks.get(1).is_some_and(|next| next.sample.at + RECENT <= seen.sample.at) {
            self.looks.pop_front();
        }
        Ok(seen)
    }

    fn set(&mut self, level: Level, size: u64) -> Result<u64, String> {
        self.asked = Some(size);
        self.guest.set(level, size)
    }

    /// Until the next look is due.
    fn sleep(&self) {
        let now = self.guest.time();
        self.clock.sleep(next_multiple(now, STEP).saturating_sub(now));
    }

    fn finish(mut self) -> Series {
        if let Some(seen) = self.looks.back() {
            self.series.finish(seen.sample);
        }
        self.series
    }

    fn level(&mut self, level: Level, shape: Shape) -> Result<(End, String), String> {
        let before = self.look()?;
        let was = before.asked(level).ok_or("this guest has no balloon device")?;
        check(level, shape, &before)?;
        let course = match self.drive(level, shape, was, &before) {
            Ok(course) => course,
            Err(why) => return Err(self.undo_after(level, was, why)),
        };
        let summary = Summary { level, shape, before, course: &course }.to_string();
        let never = course.halves.iter().filter(|half| half.reached == 0).find_map(|half| half.why);
        let end = match (course.how, never, &course.part) {
            (How::Interrupted, ..) => End::Interrupted(self.set_back(level, was)),
            (How::NoTime, _, Some(part)) => {
                End::NotReached(self.reason(level, part, course.last)?.to_string())
            }
            (_, Some(why), _) => End::NotReached(why.to_string()),
            (_, None, _) => End::Reached,
        };
        Ok((end, summary))
    }

    /// Asks for what `shape` says, when it says so, and looks what comes of it.
    fn drive(&mut self, level: Level, shape: Shape, was: u64, before: &Seen) -> Result<Course, String> {
        let mut course = Course {
            begun: self.guest.time(),
            last: *before,
            backed: (before.backed(), before.backed()),
            part: None,
            halves: [Half::default(); 2],
            how: How::Interrupted,
        };
        while !self.is_interrupted() {
            let passed = self.guest.time().saturating_sub(course.begun);
            let want = shape.at(passed);
            let part = match course.part.take() {
                Some(part) if part.want == want => part,
                done => {
                    self.note_half(level, shape, done, &mut course)?;
                    let goal = self.set(level, want.unwrap_or(was))?;
                    let is_wave = matches!(shape, Shape::Wave { .. });
                    Part { want, goal, before: if is_wave { course.last } else { *before }, reached: false }
                }
            };
            let last = self.look()?;
            let is_there = is_at(&last, level, part.goal);
            course.last = last;
            course.backed = (course.backed.0.min(last.backed()), course.backed.1.max(last.backed()));
            self.show(level, shape, part.goal, passed, before);
            course.part = Some(Part { reached: part.reached || is_there, ..part });
            if passed >= shape.length() && is_there {
                course.how = How::Reached;
                return Ok(course);
            }
            if passed >= self.order.timeout {
                course.how = How::NoTime;
                return Ok(course);
            }
            self.sleep();
        }
        Ok(course)
    }

    /// Notes what became of half a period of a wave, which is over.
    fn note_half(
        &mut self,
        level: Level,
        shape: Shape,
        done: Option<Part>,
        course: &mut Course,
    ) -> Result<(), String> {
        let (Shape::Wave { span, .. }, Some(part)) = (shape, done) else { return Ok(()) };
        let half = &mut course.halves[usize::from(part.want == Some(span.to))];
        half.times += 1;
        half.reached += u32::from(part.reached);
        if !part.reached {
            half.why = Some(self.reason(level, &part, course.last)?);
        }
        Ok(())
    }

    fn show(&mut self, level: Level, shape: Shape, goal: u64, passed: Duration, before: &Seen) {
        let (Some(seen), rates) = (self.looks.back().copied(), self.rates) else { return };
        let reached = seen.reached(level);
        let done = match shape {
            Shape::Step(_) => {
                let (all, left) = (before.reached(level).abs_diff(goal), reached.abs_diff(goal));
                1.0 - left as f64 / all.max(1) as f64
            }
            _ => passed.as_secs_f64() / shape.length().as_secs_f64(),
        };
        self.progress.show(passed, done, || {
            format!(
                "{} target {}  reached {}  host backs {}  refaults {:.0}/s",
                level.name(),
                approximate_size(goal),
                approximate_size(reached),
                approximate_size(seen.backed()),
                rates.refaults
            )
        });
    }

    /// Why the goal of `part` has not been reached by now.
    fn reason(&mut self, level: Level, part: &Part, now: Seen) -> Result<Reason, String> {
        let before = part.before;
        let recent = self.looks.front().copied().filter(|seen| seen.sample.at > before.sample.at);
        Ok(judge(&Evidence {
            level,
            goal: part.goal,
            before,
            recent: recent.unwrap_or(before),
            after: now,
            paused: self.guest.is_paused()?,
            has_driver: self.guest.has_driver(),
        }))
    }

    /// Asks for what was asked for before, waits a little, and says how it is then.
    fn set_back(&mut self, level: Level, was: u64) -> String {
        let Some(asked) = self.asked else { return "nothing has been asked of the guest".into() };
        let (name, was_size) = (level.name(), format_size(was));
        let goal = match self.set(level, was) {
            Ok(goal) => goal,
            Err(why) => {
                let asked = format_size(asked);
                return format!(
                    "{name} could not be set back to {was_size}: {why}; before that {asked} was asked for"
                );
            }
        };
        self.see_back(level, goal).unwrap_or_else(|why| format!("{name} set back to {was_size}; then {why}"))
    }

    fn see_back(&mut self, level: Level, goal: u64) -> Result<String, String> {
        let end = self.guest.time() + SET_BACK;
        let seen = loop {
            let seen = self.look()?;
            if is_at(&seen, level, goal) || self.guest.time() >= end || (self.interrupts)() > 1 {
                break seen;
            }
            self.sleep();
        };
        let not_yet = if is_at(&seen, level, goal) { "" } else { ", and is not there yet" };
        Ok(format!(
            "{} set back to {}: the guest is at {} now{not_yet}; the host backs {}",
            level.name(),
            format_size(goal),
            approximate_size(seen.reached(level)),
            approximate_size(seen.backed())
        ))
    }

    /// The sentence of a failure in the middle, and what has become of the guest.
    fn undo_after(&mut self, level: Level, was: u64, why: String) -> String {
        let Some(asked) = self.asked else { return why };
        let name = level.name();
        match self.guest.set(level, was) {
            Ok(_) => format!("{name} set back to {}, because of this: {why}", format_size(was)),
            Err(_) => format!(
                "{name} could not be set back to {}: {why}; before that {} was asked for",
                format_size(was),
                format_size(asked)
            ),
        }
    }

    fn take(&mut self, taking: &Taking) -> Result<(End, String), String> {
        let before = self.look()?;
        let memory = bytes(before.guest_pages);
        if taking.gpa.saturating_add(taking.bytes) > memory {
            return Err(format!(
                "{}: the memory of this guest ends at {memory:#x}, before the pages do",
                taking.way.name()
            ));
        }
        let begun = self.guest.time();
        let mut tally = Tally::default();
        let how = loop {
            tally.rounds += 1;
            if !self.round(taking, begun, &mut tally)? {
                break if self.is_interrupted() { How::Interrupted } else { How::NoTime };
            }
            let Some((every, lasts)) = taking.again else { break How::Reached };
            let due = next_multiple(self.guest.time().saturating_sub(begun), every);
            match self.wait_until(begun, due.min(lasts), &tally)? {
                false => break How::Interrupted,
                true if due >= lasts => break How::Reached,
                true => {}
            }
        };
        let last = self.look()?;
        let took = last.sample.at.saturating_sub(begun).as_secs_f64();
        let summary = format!(
            "{}: {tally} in {took:.3}s; the host has back {}",
            taking.way.name(),
            given_back(before.backed(), last.backed())
        );
        let end = match (how, tally.refused) {
            (How::Interrupted, _) => End::Interrupted(
                match taking.way {
                    Way::Discard => "what is discarded stays so",
                    Way::PageOut => "what is in swap comes back when it is wanted",
                }
                .into(),
            ),
            (How::Reached, _) if tally.complete > 0 => End::Reached,
            (How::Reached, (refused, Some(why))) => {
                End::NotReached(format!("refused {}, the last: {why}", times(refused)))
            }
            (How::Reached, _) => {
                let written =
                    if taking.way == Way::PageOut { ", or a page would have to be written" } else { "" };
                End::NotReached(format!(
                    "WouldBlock: a vCPU is inside the guest, or somebody else has a page{written}; leave out --atomic, or try \
                     again with --every and --for"
                ))
            }
            (How::NoTime, _) => {
                End::NotReached("there was no time for all pages; give it longer, with --timeout".into())
            }
        };
        Ok((end, summary))
    }

    /// Takes all of the range once; false where it was to stop before the end.
    fn round(&mut self, taking: &Taking, begun: Duration, tally: &mut Tally) -> Result<bool, String> {
        let (mut gpa, end) = (taking.gpa, taking.gpa.saturating_add(taking.bytes));
        let mut blocked = false;
        while gpa < end {
            if self.is_interrupted() || self.guest.time().saturating_sub(begun) >= self.order.timeout {
                return Ok(false);
            }
            let in_pieces = taking.atomic || taking.again.is_some();
            let piece = if in_pieces { PIECE_BYTES.min(end - gpa) } else { end - gpa };
            match self.guest.take(taking, gpa, piece)? {
                // The server had no time for the rest.
                Taken::Pages(pages, left) => {
                    tally.pages = tally.pages.saturating_add(pages);
                    gpa = (gpa + piece).saturating_sub(left.saturating_mul(bytes(1)).min(piece));
                }
                Taken::WouldBlock => {
                    (tally.would_block, blocked) = (tally.would_block + 1, true);
                    gpa += piece;
                }
                Taken::Refused(why) if taking.again.is_none() => return Err(why),
                Taken::Refused(why) => {
                    (tally.refused, blocked) = ((tally.refused.0 + 1, Some(why)), true);
                    gpa += piece;
                }
            }
        }
        tally.complete += u64::from(!blocked);
        Ok(true)
    }

    /// Looks at the guest until `due`; false where it was to stop.
    fn wait_until(&mut self, begun: Duration, due: Duration, tally: &Tally) -> Result<bool, String> {
        loop {
            let backed = self.look()?.backed();
            let passed = self.guest.time().saturating_sub(begun);
            let done = passed.as_secs_f64() / self.order.task.length().as_secs_f64();
            self.progress.show(passed, done, || format!("{tally}  host backs {}", approximate_size(backed)));
            match due.saturating_sub(passed) {
                _ if self.is_interrupted() => return Ok(false),
                Duration::ZERO => return Ok(true),
                left => self.clock.sleep(left.min(STEP)),
            }
        }
    }
}

/// The guest has come to `goal`, in so far as it can.
fn is_at(seen: &Seen, level: Level, goal: u64) -> bool {
    seen.asked(level) == Some(goal) && seen.reached(level) == goal
}

/// What a guest could never come to is refused before it is asked for.
fn check(level: Level, shape: Shape, seen: &Seen) -> Result<(), String> {
    let (low, high) = shape.bounds();
    let (least, most) = (bytes(seen.budget_min), bytes(seen.budget_max));
    match (level, seen.balloon) {
        (Level::Frames, _) if low < least => Err(format!(
            "frames {}: the smallest budget of this guest is {}",
            format_size(low),
            format_size(least)
        )),
        (Level::Frames, _) if high > most => Err(format!(
            "frames {}: the machine of this guest has {}, which is its largest budget",
            format_size(high),
            format_size(most)
        )),
        (Level::Balloon, Some(balloon)) if high > balloon.memory => Err(format!(
            "balloon {}: this guest has {} of memory, and can keep no more",
            format_size(high),
            format_size(balloon.memory)
        )),
        _ => Ok(()),
    }
}

/// What the host has back, in words.
fn given_back(before: u64, after: u64) -> String {
    match before.checked_sub(after) {
        Some(back) => approximate_size(back),
        None => format!("nothing, and backs {} more", approximate_size(after - before)),
    }
}

/// So many of them, in words.
fn counted(count: u64, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

fn times(count: u64) -> String {
    match count {
        1 => "once".into(),
        count => format!("{count} times"),
    }
}

/// What taking pages has come to.
#[derive(Clone, Debug, Default)]
struct Tally {
    pages: u64,
    would_block: u64,
    /// Pieces that could not be had, and why, the last time.
    refused: (u64, Option<String>),
    rounds: u64,
    /// Rounds of which nothing was left.
    complete: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { pages, would_block, rounds, .. } = self;
        let (pages, rounds) = (counted(*pages, "page"), counted(*rounds, "round"));
        write!(f, "{pages} in {rounds}, WouldBlock {}", times(*would_block))?;
        match self.refused.0 {
            0 => Ok(()),
            refused => write!(f, ", refused {}", times(refused)),
        }
    }
}

/// The line at the end.
struct Summary<'a> {
    level: Level,
    shape: Shape,
    before: Seen,
    course: &'a Course,
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { level, shape, before, course } = self;
        let Sample { at, .. } = course.last.sample;
        let (from, to) = (before.reached(*level), course.last.reached(*level));
        write!(f, "{}: from {} to {}", level.name(), approximate_size(from), approximate_size(to))?;
        write!(
            f,
            " in {:.3}s; the host backs {}",
            at.saturating_sub(course.begun).as_secs_f64(),
            approximate_size(course.last.backed())
        )?;
        if let Shape::Wave { .. } = shape {
            write!(
                f,
                " ({} to {} meanwhile)",
                approximate_size(course.backed.0),
                approximate_size(course.backed.1)
            )?;
            let [low, high] = course.halves.map(|half| format!("{} of {} times", half.reached, half.times));
            write!(f, ", reached its low {low} and its high {high},")?;
        }
        write!(f, " and has back {}", given_back(before.backed(), course.last.backed()))?;
        match bytes(course.last.swap_in_memory) {
            0 => Ok(()),
            held => write!(f, "; swap in Umbra's own memory holds {}", approximate_size(held)),
        }
    }
}
