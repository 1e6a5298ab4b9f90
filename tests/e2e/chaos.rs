//! Chaos: whoever is at the other end of a socket is killed, stopped, slow, floods or hangs up, at any moment; and so is Umbra.
//!
//! Story: a guest of several CPUs reclaims for its life while actors come and go, each with a part of guest memory of its own:
//! importers that behave and check what they have written, importers as processes that are killed and stopped, importers by hand that
//! hang up at each message, lie, flood or say nothing; clients of the control socket that do the same; and waves of the budget and
//! the balloon. What an actor does is drawn from its seed.
//!
//! Holds: no wrong byte, and once the actors have gone nothing is left of them: importers, segments, imported pages, pins, window
//! slots, descriptors and threads are as many as before.
//!
//! `UMBRA_SEEDS=20 UMBRA_SECONDS=60` runs so many guests, each for so long.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tempfile::TempDir;
use umbra::export::protocol::{Reply, Request, VERSION};
use umbra::import::{Attachment, ImportError, Importer, Manners};

use super::export::Raw;
use super::pressure::env;
use super::qmp::Client;
use super::umbra::program;
use crate::ensure;
use crate::support::noise::Noise;
use crate::support::{Verdict, case};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// The first guest frame that the guest does not use, and how many each actor has of those.
const FREE: u32 = 0x2000;
const OWN: u32 = 64;
/// The first of the guest's that are imported to be read, and how many each actor has.
const USED: u32 = 0x800;
const READ: u32 = 512;

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    vec![
        case("chaos_of_importers_and_pressure_leaves_nothing_behind", &[], seeds),
        case("chaos_connections_cut_at_each_message_leave_nothing_behind", &[], cut_at_each_message),
        case("chaos_umbra_killed_at_any_moment_starts_again", &[], killed_at_any_moment),
        case("chaos_importers_that_want_what_reclaim_takes_make_progress", &[], contended),
    ]
}

/// A guest in a process that can be killed. It is, at the end of the test.
pub(super) struct Guest {
    child: Child,
    folder: TempDir,
}

impl Guest {
    fn start(options: &[&str]) -> Result<Guest, Failed> {
        Guest::start_in(tempfile::tempdir()?, options)
    }

    /// With its sockets, its swap and all it says in `folder`; in a process group of its own.
    fn start_in(folder: TempDir, options: &[&str]) -> Result<Guest, Failed> {
        let path = |name| folder.path().join(name);
        let mut command = Command::new(program());
        command.arg("run").args(options).arg("--qmp").arg(path("qmp")).arg("--export").arg(path("export"));
        command.arg("--swap").arg(path("swap")).process_group(0).stdin(Stdio::null());
        let said = tempfile::tempfile()?;
        command.stdout(said.try_clone()?).stderr(File::create(path("said"))?);
        Ok(Guest { child: command.spawn()?, folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn client(&mut self) -> Result<Client, Failed> {
        let path = self.path("qmp");
        let child = &mut self.child;
        Client::connect(&path, || matches!(child.try_wait(), Ok(None)))
            .map_err(|why| format!("{}\n{}", why.message().unwrap_or_default(), said(&self.folder)).into())
    }

    /// What is held now, by the guest's own word and by the host's.
    fn holds(&self, client: &mut Client) -> Result<Holdings, Failed> {
        let answer = client.outcome("x-memory", json!({}))?;
        let memory = &answer["return"];
        ensure!(memory.is_object(), "x-memory: {answer}\n{}", said(&self.folder));
        let number = |place: &str| {
            memory.pointer(place).and_then(Value::as_u64).ok_or_else(|| format!("no {place}: {memory}"))
        };
        let count = |what: &str| -> Result<u64, Failed> {
            Ok(fs::read_dir(format!("/proc/{}/{what}", self.child.id()))?.count() as u64)
        };
        Ok(Holdings {
            importers: number("/export/importers")?,
            segments: number("/export/segments")?,
            imported: number("/export/imported")?,
            pinned: number("/pinned")?,
            taken: number("/window/taken")?,
            waiters: number("/window/waiters")?,
            over: number("/frames-used")?.saturating_sub(number("/budget")?),
            descriptors: count("fd")?,
            threads: count("task")?,
            // Of one process that the kernel maps memory for, and of no file that a segment had.
            files: fs::read_to_string(format!("/proc/{}/maps", self.child.id()))?
                .lines()
                .filter(|line| line.contains("umbra-segment"))
                .count() as u64,
        })
    }

    /// What it holds by itself: the control socket answers before all threads are there, of which the vCPUs are the last.
    fn holds_alone(&self, client: &mut Client) -> Result<Holdings, Failed> {
        let begun = Instant::now();
        loop {
            let answer = client.outcome("query-cpus-fast", json!({}))?;
            let vcpus = answer["return"].as_array().ok_or_else(|| format!("query-cpus-fast: {answer}"))?;
            if vcpus.iter().all(|vcpu| vcpu["thread-id"] != 0) {
                break;
            }
            ensure!(begun.elapsed() < PATIENCE, "a vCPU does not start: {vcpus:?}");
            thread::sleep(Duration::from_millis(1));
        }
        // The first of a command may leave something for the next.
        self.holds(client)?;
        self.holds(client)
    }

    /// Returns once it holds no more than `before`.
    fn returns_to(&self, client: &mut Client, before: Holdings) -> Verdict {
        let begun = Instant::now();
        loop {
            let now = self.holds(client)?;
            if now.is_within(before) {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "something is left: {now:?}, before {before:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait(&mut self) -> Result<ExitStatus, Failed> {
        let begun = Instant::now();
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(status),
                None => ensure!(begun.elapsed() < PATIENCE, "it does not end:\n{}", said(&self.folder)),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// An operator ends it; it has come to no harm.
    fn quit(mut self, client: &mut Client) -> Verdict {
        client.send("quit", json!({}))?;
        let status = self.wait()?;
        let said = said(&self.folder);
        ensure!(status.code() == Some(14), "it ended with {status}:\n{said}");
        for sign in ["audit:", "panicked", "INV-", "stays, though"] {
            ensure!(!said.contains(sign), "'{sign}':\n{said}");
        }
        for left in ["qmp", "export", "swap"] {
            ensure!(!self.path(left).exists(), "'{left}' is still there");
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn said(folder: &TempDir) -> String {
    fs::read_to_string(folder.path().join("said")).unwrap_or_default()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holdings {
    importers: u64,
    segments: u64,
    imported: u64,
    pinned: u64,
    taken: u64,
    waiters: u64,
    /// Frames beyond the budget.
    over: u64,
    descriptors: u64,
    threads: u64,
    files: u64,
}

impl Holdings {
    fn is_within(self, before: Holdings) -> bool {
        let nothing = [self.importers, self.segments, self.imported, self.waiters, self.over, self.files];
        // A disk's request may have its pages at any moment, and be done with them at the next.
        nothing == [0; 6]
            && self.pinned == 0
            && self.taken == 0
            && self.descriptors <= before.descriptors
            && self.threads <= before.threads
    }
}

/// What is done to a guest, by whom.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub vcpus: u32,
    pub importers: u32,
    /// Those who break the rules are among them.
    pub hostile: bool,
    pub time: Duration,
}

fn seeds() -> Verdict {
    let time = Duration::from_secs(env("UMBRA_SECONDS", 3));
    (1..=env("UMBRA_SEEDS", 1)).try_for_each(|seed| {
        run(Plan { vcpus: 2, importers: 4, hostile: true, time }, seed)
            .map_err(|why| format!("seed {seed}: {}", why.message().unwrap_or_default()).into())
    })
}

/// What all actors share.
struct Stage<'a> {
    guest: &'a Guest,
    ends: AtomicBool,
    acts: AtomicU64,
    /// What each of them has found wrong.
    wrong: Mutex<Vec<String>>,
}

impl Stage<'_> {
    fn goes_on(&self) -> bool {
        !self.ends.load(Ordering::SeqCst)
    }

    /// Waits so long, or until the end.
    fn pause(&self, millis: u32) {
        let until = Instant::now() + Duration::from_millis(millis.into());
        while self.goes_on() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Acts until the end, or something is wrong.
    fn act(&self, mut once: impl FnMut() -> Verdict) {
        while self.goes_on() {
            if let Err(why) = once() {
                let mut wrong = self.wrong.lock().expect("nobody panics with it");
                wrong.push(why.message().unwrap_or_default().to_owned());
                self.ends.store(true, Ordering::SeqCst);
            }
            self.acts.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// One guest, and everything that happens to it.
pub(super) fn run(plan: Plan, seed: u64) -> Verdict {
    // So that it does not come to its end before: 1.7 G instructions a unit.
    let work = (20 + plan.time.as_secs() / 2).min(1000);
    let (append, vcpus) =
        (format!("workload=reclaim ram=28 work={work} scale=4000 seed={seed}"), plan.vcpus.to_string());
    let mut guest = Guest::start(&[
        "--backend",
        "soft",
        "--tlb",
        "sticky",
        "--vcpus",
        &vcpus,
        "--mem",
        "64M",
        "--frames",
        "48M",
        "--low",
        "1M",
        "--export-deadline",
        "250ms",
        "--export-policy",
        "drop",
        "--append",
        &append,
    ])?;
    let mut client = guest.client()?;
    let before = guest.holds_alone(&mut client)?;
    let stage = Stage { guest: &guest, ends: false.into(), acts: 0.into(), wrong: Mutex::default() };
    let noise = |actor: u32| Noise::new(seed * 100 + u64::from(actor));
    thread::scope(|scope| {
        for actor in 0..plan.importers {
            let (stage, mut noise) = (&stage, noise(actor));
            let mut writer = Writer { first: FREE + actor * OWN, ..Writer::default() };
            scope.spawn(move || {
                stage.act(|| match noise.below(if plan.hostile { 8 } else { 4 }) {
                    0..=1 => writer.live(stage, &mut noise),
                    2 => process(stage, &mut noise, actor, &[Signal::KILL]),
                    3 => process(stage, &mut noise, actor, &[]),
                    4 => process(stage, &mut noise, actor, &[Signal::STOP, Signal::CONT, Signal::KILL]),
                    5 => cut(stage, &mut noise, actor),
                    6 => liar(stage, &mut noise, actor),
                    _ => flood(stage, &mut noise),
                });
                writer.check(stage)
            });
        }
        let (stage, mut ours) = (&stage, noise(90));
        scope.spawn(move || stage.act(|| pressure(stage, &mut ours)));
        let mut ours = noise(91);
        scope.spawn(move || stage.act(|| wave(stage, &mut ours)));
        if plan.hostile {
            let mut ours = noise(92);
            scope.spawn(move || stage.act(|| operator(stage, &mut ours)));
        }
        let until = Instant::now() + plan.time;
        while stage.goes_on() && Instant::now() < until {
            thread::sleep(Duration::from_millis(10));
        }
        stage.ends.store(true, Ordering::SeqCst);
    });
    let acts = stage.acts.load(Ordering::Relaxed);
    let wrong = std::mem::take(&mut *stage.wrong.lock().expect("nobody panics with it"));
    ensure!(wrong.is_empty(), "{wrong:#?}\n{}", said(&guest.folder));
    ensure!(acts > 0, "nothing happened");
    client.outcome("x-frames", json!({"bytes": 48 << 20}))?;
    client.outcome("balloon", json!({"value": 64 << 20}))?;
    guest.returns_to(&mut client, before)?;
    let memory = client.outcome("x-memory", json!({}))?["return"].take();
    println!(
        "chaos: seed {seed}, {acts} acts in {:?}, then {}, memory {}",
        plan.time, memory["export"], memory["host"]
    );
    guest.quit(&mut client)
}

/// An importer that behaves: each of its pages has its number and how often it was written.
#[derive(Default)]
struct Writer {
    first: u32,
    pages: BTreeMap<u32, Kept>,
}

/// What a page holds.
#[derive(Clone, Copy, Default)]
struct Kept {
    /// As was last read, or written without an error.
    sure: u64,
    /// Or this: writing it came to an error, such as the end of the connection.
    perhaps: Option<u64>,
}

impl Kept {
    /// Whether this may be read; it is what the page holds then.
    fn agrees(&mut self, found: u64) -> bool {
        let agrees = found == self.sure || Some(found) == self.perhaps;
        *self = Kept { sure: found, perhaps: None };
        agrees
    }
}

impl Writer {
    /// Comes, reads and writes, and goes.
    fn live(&mut self, stage: &Stage<'_>, noise: &mut Noise) -> Verdict {
        match self.stay(stage, noise) {
            Ok(verdict) => verdict,
            // Late, on a busy machine, or no room just now.
            Err(_) => {
                stage.pause(20);
                Ok(())
            }
        }
    }

    fn stay(&mut self, stage: &Stage<'_>, noise: &mut Noise) -> Result<Verdict, ImportError> {
        let importer = Importer::connect(&stage.guest.path("export"), Manners::default())?;
        let segment = importer.make(self.first, OWN, true)?;
        let access = importer.get(segment, true)?;
        let attachment = importer.attach(&access, self.first, OWN)?;
        for _ in 0..noise.below(400) {
            if !stage.goes_on() {
                break;
            }
            let page = self.first + noise.below(OWN);
            let kept = self.pages.entry(page).or_default();
            if let Err(why) = read(&attachment, page, kept)? {
                return Ok(Err(why));
            }
            let next = u64::from(page) << 32 | ((kept.sure & 0xffff_ffff) + 1);
            kept.perhaps = Some(next);
            attachment.write(page, 16, &next.to_le_bytes())?;
            *kept = Kept { sure: next, perhaps: None };
            if noise.below(8) == 0 {
                attachment.give_up(page, 1)?;
            }
        }
        Ok(Ok(()))
    }

    /// What it has left is there, as somebody else reads it.
    fn check(&mut self, stage: &Stage<'_>) {
        let first = self.first;
        let mut look = || -> Result<Verdict, ImportError> {
            let importer = Importer::connect(&stage.guest.path("export"), Manners::default())?;
            let segment = importer.make(first, OWN, false)?;
            let access = importer.get(segment, false)?;
            let attachment = importer.attach(&access, first, OWN)?;
            for (page, kept) in &mut self.pages {
                if let Err(why) = read(&attachment, *page, kept)? {
                    return Ok(Err(why));
                }
            }
            Ok(Ok(()))
        };
        // The last of those that had these pages may be on its way out.
        let begun = Instant::now();
        let why = loop {
            match look() {
                Ok(Ok(())) => return,
                Ok(Err(why)) => break why.message().unwrap_or_default().to_owned(),
                Err(why) if begun.elapsed() > PATIENCE => break why.to_string(),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        };
        stage.wrong.lock().expect("nobody panics with it").push(why);
    }
}

/// Reads a page: an error of the importer's, or that it is not what it is to be.
fn read(attachment: &Attachment, page: u32, kept: &mut Kept) -> Result<Verdict, ImportError> {
    let mut bytes = [0; 8];
    attachment.read(page, 16, &mut bytes)?;
    let (found, before) = (u64::from_le_bytes(bytes), *kept);
    if kept.agrees(found) {
        return Ok(Ok(()));
    }
    let Kept { sure, perhaps } = before;
    Ok(Err(format!("page {page:#x} has {found:#x}, and had {sure:#x} or {perhaps:x?}").into()))
}

/// The part of the guest's own memory that an actor may import, as `umbra import` has it.
fn range(actor: u32) -> String {
    let first = u64::from(USED + actor * READ) << 2;
    format!("{first}K..{}K", first + u64::from(READ) * 4)
}

/// A process that has a signal sent to it, one after the other, at moments of chance; without any it ends by itself.
fn process(stage: &Stage<'_>, noise: &mut Noise, actor: u32, signals: &[Signal]) -> Verdict {
    let hold = if signals.is_empty() { "100ms" } else { "50s" };
    let mut command = Command::new(program());
    command.args(["import", "--make", &range(actor), "--verify", "--hold", hold]);
    command.args(["--ack-delay", noise.pick(&["0s", "1ms", "20ms"])]);
    command.arg("--export").arg(stage.guest.path("export"));
    afflict(stage, noise, command, signals)
}

/// Runs it, does that to it, and waits for its end.
fn afflict(stage: &Stage<'_>, noise: &mut Noise, mut command: Command, signals: &[Signal]) -> Verdict {
    let errors = tempfile::NamedTempFile::new()?;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors.reopen()?).spawn()?;
    for signal in signals {
        stage.pause(noise.below(300));
        // It may have ended.
        let _ = rustix::process::kill_process(Pid::from_child(&child), *signal);
    }
    let begun = Instant::now();
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if begun.elapsed() > PATIENCE => {
                child.kill()?;
                child.wait()?;
                return Err("a client does not end".into());
            }
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    // 0, or an error that is said: it was late, there was no room, an operator ended it. Pages that are wrong are another status.
    let words = fs::read_to_string(errors.path())?;
    let sane =
        [Some(0), Some(4), Some(10), Some(14), None].contains(&status.code()) && !words.contains("panicked");
    ensure!(sane, "{command:?} ended with {status}:\n{words}");
    Ok(())
}

/// What an importer says, in order, of a segment of its own.
fn conversation(first: u32) -> Vec<Vec<u8>> {
    let requests = [
        Request::Hello { least: VERSION, most: VERSION },
        Request::Make { first, pages: OWN, write: true },
        Request::Get { segment: 1, write: false },
        Request::Attach { access: 1, first, pages: OWN },
        Request::Fault { attachment: 2, first, pages: 32, write: false },
        Request::Snapshot { access: 1, first, pages: OWN },
        Request::Sum { access: 1, page: first },
        Request::GiveUp { attachment: 2, first, pages: 8 },
        Request::Detach { attachment: 2 },
        Request::Release { access: 1 },
        Request::Remove { segment: 1 },
    ];
    requests.iter().map(|request| request.encode(1)).collect()
}

/// Says the first `count` messages and hears the answers or does not; nobody, where it was cut off.
fn converse(path: &Path, first: u32, count: usize, hears: bool) -> Result<Option<Raw>, Failed> {
    let Ok(raw) = Raw::connect(path) else { return Ok(None) };
    let mut segment = 1;
    for (at, message) in conversation(first).iter().take(count).enumerate() {
        // The number of the segment is as it was told.
        let message = match Request::parse(message) {
            Ok((tag, Request::Get { write, .. })) => Request::Get { segment, write }.encode(tag),
            Ok((tag, Request::Remove { .. })) => Request::Remove { segment }.encode(tag),
            _ => message.clone(),
        };
        if raw.send(&message).is_err() {
            return Ok(None);
        }
        if !hears && at > 0 {
            continue;
        }
        match raw.hear()? {
            None => return Ok(None),
            Some(Reply::Made { segment: number }) => segment = number,
            Some(_) => {}
        }
    }
    Ok(Some(raw))
}

/// The same, and hangs up, in the middle of one more if so wished.
fn hang_up(path: &Path, first: u32, count: usize, hears: bool, half: bool) -> Verdict {
    let raw = converse(path, first, count, hears)?;
    if half && let (Some(raw), Some(next)) = (raw, conversation(first).get(count)) {
        // It may have been turned away.
        let _ = raw.send(&next[..next.len() / 2]);
    }
    Ok(())
}

fn cut(stage: &Stage<'_>, noise: &mut Noise, actor: u32) -> Verdict {
    let count = noise.below(12) as usize;
    hang_up(
        &stage.guest.path("export"),
        FREE + (16 + actor) * OWN,
        count,
        noise.below(2) == 0,
        noise.below(2) == 0,
    )
}

/// It answers at once, whatever it is told, and keeps what it has; or says nothing at all.
fn liar(stage: &Stage<'_>, noise: &mut Noise, actor: u32) -> Verdict {
    let first = FREE + (16 + actor) * OWN;
    // Up to the fault.
    let Some(raw) = converse(&stage.guest.path("export"), first, 5, true)? else { return Ok(()) };
    if noise.below(2) == 0 {
        stage.pause(noise.below(400));
        return Ok(());
    }
    thread::scope(|scope| {
        scope.spawn(|| raw.answer_all());
        for _ in 0..noise.below(20) {
            stage.pause(5);
            let asked = raw.send(&Request::Sum { access: 1, page: first }.encode(1));
            if asked.is_err() || !matches!(raw.hear(), Ok(Some(_))) || !stage.goes_on() {
                break;
            }
        }
        raw.hang_up();
    });
    Ok(())
}

/// It sends and never listens, or fills the places of all others and says nothing.
fn flood(stage: &Stage<'_>, noise: &mut Noise) -> Verdict {
    let path = stage.guest.path("export");
    if noise.below(2) == 0 {
        let mute: Vec<_> = (0..noise.below(40)).filter_map(|_| Raw::connect(&path).ok()).collect();
        stage.pause(noise.below(50));
        drop(mute);
        return Ok(());
    }
    let Ok(raw) = Raw::hello(&path) else { return Ok(()) };
    let request = Request::Snapshot { access: 1, first: USED, pages: 1 }.encode(1);
    let cut = (0..1_000_000).any(|_| raw.send(&request).is_err());
    ensure!(cut, "who floods may do so for ever");
    Ok(())
}

/// `umbra pressure`, which is killed, stopped, interrupted or left alone.
fn pressure(stage: &Stage<'_>, noise: &mut Noise) -> Verdict {
    let mut command = Command::new(program());
    let line = noise.pick(&[
        "balloon --wave 40M..60M --period 400ms --for 1s",
        "frames --wave 24M..44M --period 300ms --for 1s",
        "frames 30M --timeout 2s",
        "discard 60M 64K --every 20ms --for 500ms",
    ]);
    command.arg("pressure").arg("--qmp").arg(stage.guest.path("qmp")).args(line.split_whitespace());
    let signals: &[&[Signal]] =
        &[&[], &[Signal::KILL], &[Signal::STOP, Signal::KILL], &[Signal::STOP, Signal::CONT], &[Signal::INT]];
    let signals = signals[noise.below(signals.len() as u32) as usize];
    afflict(stage, noise, command, signals)
}

/// The budget and the balloon, straight from the control socket.
fn wave(stage: &Stage<'_>, noise: &mut Noise) -> Verdict {
    let Ok(mut client) = Client::connect(&stage.guest.path("qmp"), || stage.goes_on()) else { return Ok(()) };
    for _ in 0..noise.below(10) {
        let _ = client.outcome("x-frames", json!({"bytes": u64::from(24 + noise.below(24)) << 20}));
        let _ = client.outcome("balloon", json!({"value": u64::from(36 + noise.below(28)) << 20}));
        let gpa = u64::from(USED + noise.below(0x1000)) << 12;
        let _ = client.outcome("x-page-out", json!({"gpa": gpa, "bytes": 64 << 12}));
        stage.pause(noise.below(60));
    }
    Ok(())
}

/// A client of the control socket that floods, hangs up in the middle of a command, or says nothing.
fn operator(stage: &Stage<'_>, noise: &mut Noise) -> Verdict {
    let Ok(mut stream) = UnixStream::connect(stage.guest.path("qmp")) else { return Ok(()) };
    stream.set_write_timeout(Some(Duration::from_millis(500)))?;
    let hello = b"{\"execute\":\"qmp_capabilities\"}";
    // It may have been cut off.
    let _ = match noise.below(4) {
        0 => stream.write_all(&hello[..noise.below(hello.len() as u32) as usize]),
        1 => stream.write_all(&noise.bytes(500)),
        2 => stream.write_all(
            &[&hello[..], b"{\"execute\":\"x-page-out\",\"arguments\":{\"gpa\":0,\"bytes\":67108864}}"]
                .concat(),
        ),
        _ => (0..2000).try_for_each(|_| stream.write_all(b"{\"execute\":\"query-commands\"}")),
    };
    stage.pause(noise.below(50));
    Ok(())
}

/// A guest that does nothing, to be talked to.
const IDLE: [&str; 10] = [
    "--backend",
    "soft",
    "--mem",
    "64M",
    "--frames",
    "64M",
    "--append",
    "workload=spin scale=4000",
    "--timeout",
    "80s",
];

fn cut_at_each_message() -> Verdict {
    let mut guest = Guest::start(&IDLE)?;
    let mut client = guest.client()?;
    let before = guest.holds_alone(&mut client)?;
    for count in 0..=conversation(FREE).len() {
        for (hears, half) in [(true, false), (true, true), (false, false), (false, true)] {
            hang_up(&guest.path("export"), FREE, count, hears, half)?;
        }
    }
    let hello = "{\"execute\":\"qmp_capabilities\"}{\"execute\":\"x-memory\"}{\"execute\":\"quit\"}";
    // All but the last byte: a whole one is a command.
    for length in 0..hello.len() {
        UnixStream::connect(guest.path("qmp"))?.write_all(&hello.as_bytes()[..length])?;
    }
    guest.returns_to(&mut client, before)?;
    guest.quit(&mut client)
}

/// `UMBRA_SEEDS` deaths.
fn killed_at_any_moment() -> Verdict {
    (1..=env("UMBRA_SEEDS", 6)).try_for_each(|seed| {
        killed(seed).map_err(|why| format!("seed {seed}: {}", why.message().unwrap_or_default()).into())
    })
}

fn killed(seed: u64) -> Verdict {
    let mut noise = Noise::new(seed);
    let options = [
        "--backend",
        "soft",
        "--mem",
        "32M",
        "--frames",
        "12M",
        "--low",
        "1M",
        "--timeout",
        "80s",
        "--append",
        "workload=reclaim ram=32 scale=4000 work=20",
    ];
    let mut guest = Guest::start(&options)?;
    let mut clients = Vec::new();
    if noise.below(3) > 0 {
        drop(guest.client()?);
        let (qmp, export) = (guest.path("qmp"), guest.path("export"));
        let mut start = |args: &[&str], socket: &Path| -> Verdict {
            let mut command = Command::new(program());
            command.args(args).arg(socket).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            clients.push(command.spawn()?);
            Ok(())
        };
        start(&["import", "--make", "8M..12M", "--hold", "50s", "--export"], &export)?;
        start(
            &["pressure", "frames", "--wave", "8M..12M", "--period", "100ms", "--for", "50s", "--qmp"],
            &qmp,
        )?;
    }
    // Half of them while it starts.
    let moment = if seed.is_multiple_of(2) { noise.below(30) } else { noise.below(500) };
    thread::sleep(Duration::from_millis(moment.into()));
    guest.child.kill()?;
    guest.child.wait()?;
    let group = Pid::from_raw(guest.child.id() as i32).ok_or("no process group")?;
    ensure!(rustix::process::test_kill_process_group(group).is_err(), "a process of its is left");
    let begun = Instant::now();
    for mut client in clients {
        // They hear of its death, and do not wait for it for ever.
        while client.try_wait()?.is_none() {
            if begun.elapsed() > PATIENCE {
                client.kill()?;
                client.wait()?;
                return Err("a client waits for a guest that is dead".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
    ensure!(!guest.path("swap").exists(), "its swap is still there after {moment} ms");
    let folder = std::mem::replace(&mut guest.folder, tempfile::tempdir()?);
    let mut again = Guest::start_in(folder, &options)?;
    let mut client = again.client()?;
    let importer = Importer::connect(&again.path("export"), Manners::default())?;
    let segment = importer.make(0x1000, 4, false)?;
    let access = importer.get(segment, false)?;
    importer.attach(&access, 0x1000, 4)?.read(0x1000, 0, &mut [0; 8])?;
    drop(importer);
    again.quit(&mut client)
}

/// Importers have all of the guest's memory, page by page, while there are frames for a part of it. The guest comes to its end, and
/// no importer waits for a page for long.
fn contended() -> Verdict {
    let scale = format!("workload=reclaim ram=32 work=8 scale={}", 4 * env("UMBRA_SECONDS", 2));
    let mut guest = Guest::start(&[
        "--backend",
        "soft",
        "--tlb",
        "sticky",
        "--vcpus",
        "2",
        "--mem",
        "32M",
        "--frames",
        "14M",
        "--low",
        "1M",
        "--export-deadline",
        "5s",
        "--append",
        &scale,
    ])?;
    drop(guest.client()?);
    let (ends, export) = (AtomicBool::new(false), guest.path("export"));
    let import = |first: u32| -> Result<(u64, Duration), Failed> {
        let importer = Importer::connect(&export, Manners::default())?;
        let segment = importer.make(first, 0x1000, false)?;
        let access = importer.get(segment, false)?;
        let attachment = importer.attach(&access, first, 0x1000)?;
        let (mut pages, mut longest) = (0, Duration::ZERO);
        while !ends.load(Ordering::SeqCst) {
            let begun = Instant::now();
            match attachment.read(first + (pages * 7 % 0x1000) as u32, 0, &mut [0; 8]) {
                Ok(()) => pages += 1,
                Err(ImportError::Ended(_)) => break,
                // A page that is used as a table all the time, or that there is no frame for just now.
                Err(ImportError::Refused { .. } | ImportError::Starved(_)) => pages += 1,
                Err(other) => return Err(other.into()),
            }
            longest = longest.max(begun.elapsed());
        }
        Ok((pages, longest))
    };
    let (status, had) = thread::scope(|scope| {
        let importers = [0, 0x1000].map(|first| scope.spawn(move || import(first)));
        let status = guest.wait();
        ends.store(true, Ordering::SeqCst);
        (status, importers.map(|importer| importer.join().expect("it does not panic")))
    });
    let (status, said) = (status?, said(&guest.folder));
    ensure!(status.code() == Some(0), "the guest ended with {status}:\n{said}");
    for importer in had {
        let (pages, longest) = importer?;
        println!("contended: {pages} pages, the longest wait {longest:?}");
        ensure!(
            pages > 1000 && longest < Duration::from_secs(10),
            "{pages} pages, the longest wait {longest:?}"
        );
    }
    Ok(())
}
