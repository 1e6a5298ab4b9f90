//! `umbra pressure` against a server that only plays a guest.

use std::cell::Cell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::{Level, Order, Taking, Task, Way};
use super::clock::Clock;
use super::plan::{Shape, Span};
use super::watch::run_by;
use super::{End, Report, run};
use crate::vm::ask::PATIENCE;

const MIB: u64 = 1 << 20;
/// Longer than anything takes here.
const LONG: Duration = Duration::from_secs(30);

/// A guest of 32 MiB in 24 that does at once what it is asked, unless a test has it otherwise.
#[derive(Clone, Debug)]
struct Played {
    budget: u64,
    /// Frames over it, which the next look finds gone.
    over: u64,
    target: u64,
    actual: u64,
    /// All that was to change something, in order.
    asked: Vec<(String, u64)>,
    looks: u32,
    /// Pages of guest memory.
    memory: u64,
    /// Its balloon has a driver, which does at once what it is told.
    driver: bool,
}

impl Played {
    fn new() -> Played {
        Played {
            budget: 24 * MIB,
            over: 0,
            target: 0,
            actual: 0,
            asked: Vec::new(),
            looks: 0,
            memory: 8192,
            driver: false,
        }
    }

    fn answer(&mut self, command: &str, arguments: &Value) -> Value {
        let number = |name: &str| arguments[name].as_u64().unwrap_or(0);
        match command {
            "x-frames" => {
                self.over = (self.budget.saturating_sub(number("bytes"))) / 4096;
                self.budget = number("bytes");
                self.asked.push((command.into(), self.budget));
                json!({"budget": self.budget})
            }
            "balloon" => {
                self.asked.push((command.into(), number("value")));
                self.target = (32 * MIB).saturating_sub(number("value")) / 4096;
                self.actual = if self.driver { self.target } else { self.actual };
                json!({})
            }
            "x-discard" => {
                self.asked.push((command.into(), number("gpa")));
                // Half of it in the time that there is.
                let pages = number("bytes") / 4096;
                json!({"discarded": pages.div_ceil(2), "left": pages / 2})
            }
            "x-page-out" => json!({"freed": number("bytes") / 8192, "left": 0}),
            "query-status" => json!({"status": "running"}),
            "x-counters" => {
                json!({"memory": {"swap_outs": 5, "swap_writes": 1, "zero_drops": 2, "clean_drops": 3,
                "invalidations": [{"count": 4}, {"count": 5}]}})
            }
            "x-memory" => {
                self.looks += 1;
                let over = std::mem::take(&mut self.over);
                json!({"budget": self.budget / 4096, "budget-min": 2048, "budget-max": 9000, "frames-used": self.budget / 4096 + over,
                    "frames-free": 1, "resident": 2000, "swapped": 7, "ballooned": 0, "shadow-pages": 64, "pinned": 0,
                    "dirty": 0, "guest-pages": self.memory, "swap": {"slots": 8192, "used": 7, "in-memory": true},
                    "host": {"frames": self.budget + over * 4096},
                    "balloon": {"target": self.target, "actual": self.actual, "memory": self.memory},
                    "reclaim": {"refaults": 1, "direct": 2, "gate-waits": 3, "page-waits": 4, "over-budget": over, "inactive": 500,
                        "active": 500, "failed": false, "wanted": false}})
            }
            _ => json!({}),
        }
    }
}

/// A clock that goes only while somebody sleeps by it: whatever the host does meanwhile takes no time.
#[derive(Default)]
struct TestClock(Cell<Duration>);

impl Clock for TestClock {
    fn now(&self) -> Duration {
        self.0.get()
    }

    fn sleep(&self, time: Duration) {
        self.0.set(self.0.get() + time);
    }
}

/// What a test has a guest say instead: an error, or another answer.
type Instead = fn(&mut Played, &str, &Value) -> Option<Value>;

fn serve(mut stream: UnixStream, played: &Mutex<Played>, instead: Instead) {
    let _ = stream.write_all(b"{\"QMP\":{}}\n");
    let lines = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
    for line in lines.map_while(Result::ok) {
        let call: Value = serde_json::from_str(&line).expect("JSON");
        let command = call["execute"].as_str().expect("a command");
        let mut played = played.lock().expect("no panic");
        let mut answer = match instead(&mut played, command, &call["arguments"]) {
            Some(answer) => answer,
            None if command == "x-balloon-stats" => {
                json!({"error": {"class": "GenericError", "desc": "the guest has reported no statistics"}})
            }
            None => json!({"return": played.answer(command, &call["arguments"])}),
        };
        drop(played);
        answer["id"] = call["id"].clone();
        if stream.write_all(format!("{{\"event\":\"X\"}}\n{answer}\n").as_bytes()).is_err() {
            return;
        }
    }
}

/// What becomes of a task, and of the guest; it is interrupted after so many looks.
fn pressed(task: Task, timeout: Duration, looks: u32, instead: Instead) -> (Result<Report, String>, Played) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).expect("a socket");
    let played = Arc::new(Mutex::new(Played::new()));
    let shared = Arc::clone(&played);
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        serve(stream, &shared, instead);
    });
    let interrupts = || u32::from(played.lock().expect("no panic").looks >= looks);
    let report = run_by(&TestClock::default(), &Order { socket: &path, task, timeout }, &interrupts);
    server.join().expect("the server");
    let played = played.lock().expect("no panic").clone();
    (report, played)
}

fn frames(shape: Shape) -> Task {
    Task::Level(Level::Frames, shape)
}

fn asked(values: &[u64]) -> Vec<(String, u64)> {
    values.iter().map(|mib| ("x-frames".to_owned(), mib * MIB)).collect()
}

#[test]
fn a_step_is_reached_once_the_host_has_the_frames_back() {
    let (report, played) = pressed(frames(Shape::Step(12 * MIB)), LONG, u32::MAX, |_, _, _| None);
    let report = report.expect("a report");
    assert_eq!((&report.end, report.status().code()), (&End::Reached, 0));
    assert_eq!(played.asked, asked(&[12]));
    assert_eq!(played.looks, 3, "before, over it, there");
    for words in [
        "frames: from 24M to 12M in ",
        "the host backs 12M and has back 12M; swap in Umbra's own memory holds 28K",
    ] {
        assert!(report.summary.contains(words), "{}", report.summary);
    }
    let last = report.series.samples().last().expect("a sample");
    assert_eq!((last.budget, last.invalidations, last.gate_waits), (3072, 9, 3));
}

#[test]
fn a_ramp_goes_by_steps_and_a_wave_ends_where_it_began() {
    let span = Span { from: 20 * MIB, to: 16 * MIB };
    let ramp = frames(Shape::Ramp { span, over: Duration::from_millis(400) });
    let (report, played) = pressed(ramp, LONG, u32::MAX, |_, _, _| None);
    assert_eq!(report.expect("a report").end, End::Reached);
    assert_eq!(played.asked, asked(&[20, 19, 18, 17, 16]));
    let span = Span { from: 12 * MIB, to: 16 * MIB };
    let (period, lasts) = (Duration::from_millis(400), Duration::from_millis(800));
    let wave = frames(Shape::Wave { span, period, lasts });
    let (report, played) = pressed(wave, LONG, u32::MAX, |_, _, _| None);
    let report = report.expect("a report");
    assert_eq!((report.end, played.budget), (End::Reached, 24 * MIB));
    let words = "(12M to 24M meanwhile), reached its low 2 of 2 times and its high 2 of 2 times,";
    assert!(report.summary.contains(words), "{}", report.summary);
}

fn wave(level: Level) -> Task {
    let span = Span { from: 16 * MIB, to: 24 * MIB };
    let (period, lasts) = (Duration::from_millis(400), Duration::from_millis(800));
    Task::Level(level, Shape::Wave { span, period, lasts })
}

/// In the end a wave asks for what there was before, which says nothing of what came in between.
#[test]
fn a_wave_that_was_never_followed_is_not_reached() {
    let (report, played) = pressed(wave(Level::Balloon), LONG, u32::MAX, |_, _, _| None);
    let report = report.expect("a report");
    assert!(matches!(&report.end, End::NotReached(why) if why.contains("does not answer")), "{report:?}");
    assert!(report.summary.contains("its low 0 of 2 times and its high 0 of 2 times"), "{}", report.summary);
    assert_eq!(played.asked.last().map(|(_, size)| *size), Some(32 * MIB), "and the guest is as it was");
    // The high size costs the guest nothing.
    let never_low: Instead = |played, command, _| {
        if command == "x-memory" && played.budget < 20 * MIB {
            played.over = 9;
        }
        None
    };
    let (report, _) = pressed(wave(Level::Frames), LONG, u32::MAX, never_low);
    let report = report.expect("a report");
    assert!(matches!(&report.end, End::NotReached(why) if why.contains("9 frames are")), "{report:?}");
    assert!(report.summary.contains("its low 0 of 2 times and its high 2 of 2 times"), "{}", report.summary);
    let follows: Instead = |played, _, _| {
        played.driver = true;
        None
    };
    let (report, _) = pressed(wave(Level::Balloon), LONG, u32::MAX, follows);
    assert_eq!(report.expect("a report").end, End::Reached);
}

/// The rest of its memory is in use: what it gave up at first says nothing of now.
#[test]
fn a_balloon_that_stands_still_has_stopped_however_fast_it_was() {
    let first: Instead = |played, command, _| {
        if command == "balloon" {
            played.actual = 4 << 20 >> 12;
        }
        None
    };
    let balloon = Task::Level(Level::Balloon, Shape::Step(16 * MIB));
    let (report, _) = pressed(balloon, Duration::from_millis(1600), u32::MAX, first);
    let report = report.expect("a report");
    assert!(matches!(&report.end, End::NotReached(why) if why.contains("stopped at 28M")), "{report:?}");
}

#[test]
fn what_a_guest_could_never_come_to_is_refused_before_it_is_asked() {
    for (task, words) in [
        (frames(Shape::Step(MIB)), "smallest budget of this guest is 8M"),
        (frames(Shape::Step(36 * MIB)), "frames 36M: the machine of this guest has 36000K"),
        (Task::Level(Level::Balloon, Shape::Step(64 * MIB)), "has 32M of memory"),
    ] {
        let (report, played) = pressed(task, LONG, u32::MAX, |_, _, _| None);
        assert!(report.as_ref().is_err_and(|error| error.contains(words)), "{report:?}");
        assert!(played.asked.is_empty());
    }
}

#[test]
fn a_guest_without_a_driver_does_not_answer() {
    let balloon = Task::Level(Level::Balloon, Shape::Step(16 * MIB));
    let (report, played) = pressed(balloon, Duration::from_millis(300), u32::MAX, |_, _, _| None);
    let report = report.expect("a report");
    assert_eq!(report.status().code(), 10);
    assert!(matches!(&report.end, End::NotReached(why) if why.contains("does not answer")), "{report:?}");
    assert_eq!((played.target, played.looks), (4096, 5), "before, and each 100 ms until the time is over");
}

#[test]
fn who_interrupts_it_finds_the_guest_as_it_was() {
    let never: Instead = |played, command, _| {
        // The frames stay where they are, until the budget is what it was.
        if command == "x-memory" {
            played.over = (24 * MIB - played.budget) / 4096;
        }
        None
    };
    let (report, played) = pressed(frames(Shape::Step(12 * MIB)), LONG, 3, never);
    let report = report.expect("a report");
    assert_eq!(report.status().code(), 14);
    let words = "frames set back to 24M: the guest is at 24M now;";
    assert!(matches!(&report.end, End::Interrupted(now) if now.contains(words)), "{report:?}");
    assert_eq!(played.asked, asked(&[12, 24]));
}

#[test]
fn who_interrupts_it_before_anything_is_asked_has_asked_nothing() {
    let (report, played) = pressed(frames(Shape::Step(12 * MIB)), LONG, 0, |_, _, _| None);
    let report = report.expect("a report");
    assert_eq!(report.status().code(), 14);
    assert!(
        matches!(&report.end, End::Interrupted(now) if now.contains("nothing has been asked")),
        "{report:?}"
    );
    assert_eq!(played.asked, []);
}

#[test]
fn who_interrupts_it_hears_what_is_left_asked_for_where_it_cannot_be_set_back() {
    let refuses: Instead = |_, command, arguments| {
        let back = command == "x-frames" && arguments["bytes"] == 24 * MIB;
        back.then(|| json!({"error": {"class": "GenericError", "desc": "no more"}}))
    };
    let (report, _) = pressed(frames(Shape::Step(12 * MIB)), LONG, 2, refuses);
    let report = report.expect("a report");
    let words = "could not be set back to 24M: no more; before that 12M was asked for";
    assert!(matches!(&report.end, End::Interrupted(now) if now.contains(words)), "{report:?}");
}

#[test]
fn a_refusal_in_the_middle_sets_the_guest_back() {
    let refuses: Instead = |_, command, arguments| {
        let middle = command == "x-frames" && arguments["bytes"].as_u64() < Some(18 * MIB);
        middle.then(|| json!({"error": {"class": "GenericError", "desc": "no more"}}))
    };
    let span = Span { from: 20 * MIB, to: 16 * MIB };
    let ramp = frames(Shape::Ramp { span, over: Duration::from_millis(400) });
    let (report, played) = pressed(ramp, LONG, u32::MAX, refuses);
    assert_eq!(report.err().as_deref(), Some("frames set back to 24M, because of this: no more"));
    assert_eq!(played.budget, 24 * MIB);
}

#[test]
fn discards_go_on_with_what_is_left_and_count_what_would_block() {
    let once = Taking { way: Way::Discard, gpa: MIB, bytes: 8 * 4096, atomic: false, again: None };
    let (report, played) = pressed(Task::Take(once), LONG, u32::MAX, |_, _, _| None);
    let report = report.expect("a report");
    assert_eq!(report.end, End::Reached);
    assert!(report.summary.contains("8 pages"), "{}", report.summary);
    let from: Vec<u64> = played.asked.iter().map(|(_, gpa)| (gpa - MIB) / 4096).collect();
    assert_eq!(from, [0, 4, 6, 7]);
    let out = Task::Take(Taking { way: Way::PageOut, ..once });
    let report = pressed(out, LONG, u32::MAX, |_, _, _| None).0.expect("a report");
    assert!(report.summary.starts_with("page-out: 4 pages in 1 round, "), "{}", report.summary);
    let blocks: Instead = |_, command, _| {
        ["x-discard", "x-page-out"]
            .contains(&command)
            .then(|| json!({"error": {"class": "WouldBlock", "desc": "no"}}))
    };
    let again = Some((Duration::from_millis(100), Duration::from_millis(250)));
    for (again, words) in [(None, "0 pages in 1 round, WouldBlock once"), (again, " rounds, WouldBlock ")] {
        let task = Task::Take(Taking { atomic: true, again, ..once });
        let (report, _) = pressed(task, LONG, u32::MAX, blocks);
        let report = report.expect("a report");
        assert!(matches!(&report.end, End::NotReached(why) if why.contains("WouldBlock")), "{report:?}");
        assert!(report.summary.contains(words), "{}", report.summary);
    }
    let out = Task::Take(Taking { way: Way::PageOut, atomic: true, ..once });
    let report = pressed(out, LONG, u32::MAX, blocks).0.expect("a report");
    assert!(matches!(&report.end, End::NotReached(why) if why.contains("to be written")), "{report:?}");
    let refuses: Instead = |_, command, _| {
        (command == "x-discard").then(|| json!({"error": {"class": "GenericError", "desc": "held"}}))
    };
    assert_eq!(pressed(Task::Take(once), LONG, u32::MAX, refuses).0.err().as_deref(), Some("held"));
    let (report, _) = pressed(Task::Take(Taking { again, ..once }), LONG, u32::MAX, refuses);
    let report = report.expect("a report");
    assert!(matches!(&report.end, End::NotReached(why) if why.ends_with("the last: held")), "{report:?}");
    assert!(report.summary.contains("WouldBlock 0 times, refused "), "{}", report.summary);
    let beyond = Task::Take(Taking { gpa: 32 * MIB, again, ..once });
    let (report, played) = pressed(beyond, LONG, u32::MAX, |_, _, _| None);
    assert!(report.is_err_and(|error| error.contains("ends at 0x2000000")) && played.asked.is_empty());
}

#[test]
fn a_server_that_takes_nobody_costs_no_more_than_the_time_there_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let _silent = UnixListener::bind(&path).expect("a socket");
    let begun = Instant::now();
    let timeout = Duration::from_millis(100);
    let order = Order { socket: &path, task: frames(Shape::Step(12 * MIB)), timeout };
    assert!(run(&order, &|| 0).is_err_and(|error| error.contains("in time")));
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
}

#[test]
fn a_server_that_is_none_of_ours_gets_a_sentence() {
    let step = frames(Shape::Step(12 * MIB));
    let strange: Instead =
        |_, command, _| (command == "x-memory").then(|| json!({"return": {"budget": "x"}}));
    let (report, _) = pressed(step, LONG, u32::MAX, strange);
    assert!(report.as_ref().is_err_and(|error| error.contains("is it Umbra's?")), "{report:?}");
    let order = Order { socket: Path::new("/nonexistent/s"), task: step, timeout: LONG };
    assert!(run(&order, &|| 0).is_err_and(|error| error.contains("--qmp")));
}
