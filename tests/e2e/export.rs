//! Importers of a running guest's memory: those that behave, and those that do all else they can think of.
//!
//! Story: the guest runs beside the test, and is made to give pages up by QMP. Hostile importers speak the protocol by hand. Holds:
//! whatever they do, the guest ends as it would have, and an importer that behaves is served.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, Shutdown, shutdown};
use serde_json::{Value, json};
use tempfile::TempDir;
use umbra::export::IMPORTERS_MAX;
use umbra::export::protocol::{Code, MESSAGE_MAX, Reply, Request, VERSION};
use umbra::import::{ImportError, Importer, Manners};

use super::qmp::{Client, Running};
use super::umbra::{KVM, SOFT, Way, program};
use crate::ensure;
use crate::support::host::Need;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case};

/// Longer than anything takes on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// Pages that the guest of most tests does not use: 24M to 25M.
pub(super) const FIRST: u32 = 0x1800;
pub(super) const PAGES: u32 = 256;
/// A page of them.
pub(super) const PAGE: u32 = FIRST + 3;
/// That nobody waits for, or the test fails.
pub(super) const FOREVER: &str = "60s";

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let served = [KVM, SOFT]
        .map(|way| case(format!("export_pages_are_the_guests_{}", way.name), way.needs, move || served(way)));
    let kept = [KVM, SOFT].map(|way| {
        case(format!("export_what_was_written_is_kept_{}", way.name), way.needs, move || kept(way))
    });
    type Body = fn() -> Verdict;
    let hostile: [(&str, Body); 11] = [
        ("export_mapped_windows_see_exported_pages", mapped_windows),
        ("export_silent_importer_is_fenced", silent),
        ("export_lying_importer_reads_zeros", lying),
        ("export_stopped_importer_is_dealt_with_by_the_policy", stopped),
        ("export_dead_importer_has_answered", dead),
        ("export_readers_descriptor_only_reads", reader),
        ("export_nonsense_is_cut_off", nonsense),
        ("export_flood_is_cut_off", flood),
        ("export_asks_beyond_its_segment_are_refused", beyond),
        ("export_limits_hold", limits),
        ("export_who_may_not_sleep_is_told", atomic),
    ];
    let hostile = hostile.map(|(name, body)| case(name, &[], body));
    served.into_iter().chain(kept).chain(hostile).collect()
}

/// A guest that exports, and its control socket.
pub(super) struct Exporting {
    folder: TempDir,
    pub(super) running: Running,
    pub(super) qmp: Client,
}

impl Exporting {
    /// One that does nothing for long.
    pub(super) fn start(way: Way, options: &[&str]) -> Result<Exporting, Failed> {
        let idle = ["--mem", "32M", "--frames", "32M", "--append", "workload=spin scale=4000"];
        Exporting::with(way, &[&idle, options].concat())
    }

    pub(super) fn with(way: Way, options: &[&str]) -> Result<Exporting, Failed> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("e").to_str().ok_or("a name that is not UTF-8")?.to_owned();
        let running = Running::start(way, &[&["--export", &path], options].concat())?;
        match running.client() {
            Ok(qmp) => Ok(Exporting { folder, running, qmp }),
            Err(_) if running.has_ended() => Err(format!("it has ended:\n{}", running.end()?).into()),
            Err(error) => Err(error),
        }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.folder.path().join("e")
    }

    /// One more importer, once there is a place for it.
    pub(super) fn importer(&self) -> Result<Importer, Failed> {
        self.importer_with(Manners::default())
    }

    pub(super) fn importer_with(&self, manners: Manners) -> Result<Importer, Failed> {
        let begun = Instant::now();
        loop {
            match Importer::connect(&self.path(), manners) {
                Err(ImportError::Refused { code: Code::Limit, .. } | ImportError::Ended(_))
                    if begun.elapsed() < PATIENCE => {}
                made => return Ok(made?),
            }
        }
    }

    /// Has the guest's frames of a page taken away.
    pub(super) fn page_out(&mut self, page: u32) -> Verdict {
        let gpa = u64::from(page) << 12;
        let done = self.qmp.call("x-page-out", json!({"gpa": gpa, "bytes": 4096}))?;
        ensure!(done["left"] == 0, "the page stays: {done}");
        Ok(())
    }

    pub(super) fn page_outs(&mut self) -> Result<Value, Failed> {
        let counters = self.qmp.call("x-counters", json!({}))?;
        let all = counters["memory"]["invalidations"].as_array().ok_or("no invalidations")?;
        let one = all.iter().find(|one| one["cause"] == "page-out");
        Ok(one.ok_or("no page-out")?.clone())
    }

    /// Somebody who behaves is served, and the guest has come to no harm.
    pub(super) fn end(mut self) -> Verdict {
        let (importer, begun) = (self.importer()?, Instant::now());
        // Segments of importers that have gone may be there for a moment.
        let segment = loop {
            match importer.make(FIRST - PAGES, 4, false) {
                Err(ImportError::Refused { code: Code::Limit, .. }) if begun.elapsed() < PATIENCE => {}
                made => break made?,
            }
        };
        let access = importer.get(segment, false)?;
        let attachment = importer.attach(&access, FIRST - PAGES, 4)?;
        attachment.read(FIRST - PAGES, 0, &mut [0; 8])?;
        drop(attachment);
        drop(importer);
        self.qmp.send("quit", json!({}))?;
        sane(self.running.end()?, &[End::Status(14)])
    }
}

fn sane(run: Outcome, ends: &[End]) -> Verdict {
    ensure!(ends.contains(&run.end), "the guest came to harm:\n{run}");
    ensure!(!run.stderr.contains("audit:"), "the audit has findings:\n{run}");
    Ok(())
}

/// `umbra import` beside a guest that is short of frames.
fn served(way: Way) -> Verdict {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("e").to_str().ok_or("a name that is not UTF-8")?.to_owned();
    // It lives for longer than the importer.
    let append = match way.needs.contains(&Need::Kvm) {
        true => "workload=reclaim scale=30 pace=slow",
        false => "workload=reclaim scale=30 work=80",
    };
    let guest = ["--frames", "24M", "--export", &path, "--append", append];
    let running = Running::start(way, &guest)?;
    drop(running.client()?);
    let mut import = Command::new(program());
    import.args(["import", "--export", &path, "--make", "8M..24M", "--verify", "--hold", "3s"]);
    let import = crate::support::process::run(&mut import, PATIENCE)?;
    ensure!(import.end == End::Status(0), "the import failed:\n{import}");
    let number = |name: &str| -> Result<u64, Failed> {
        let found =
            import.stderr.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        Ok(found.ok_or_else(|| format!("no {name}:\n{import}"))?.parse()?)
    };
    let agreed = number("agreed")?;
    ensure!(agreed > 0 && number("wrong")? == 0, "pages are wrong:\n{import}");
    sane(running.end()?, &[End::Status(0)])
}

/// What an importer writes, the guest's VMM reads, and swap keeps.
fn kept(way: Way) -> Verdict {
    let mut guest = Exporting::start(way, &[])?;
    let (writer, reader) = (guest.importer()?, guest.importer()?);
    let segment = writer.make(FIRST, PAGES, true)?;
    let (write, read) = (writer.get(segment, true)?, reader.get(segment, false)?);
    let (theirs, ours) = (writer.attach(&write, FIRST, PAGES)?, reader.attach(&read, FIRST, PAGES)?);
    for page in FIRST..FIRST + PAGES {
        theirs.write(page, 100, &page.to_le_bytes())?;
    }
    for round in 0..3 {
        for page in [FIRST, PAGE, FIRST + PAGES - 1] {
            guest.page_out(page)?;
            let mut bytes = [0; 4];
            ours.read(page, 100, &mut bytes)?;
            ensure!(bytes == page.to_le_bytes(), "round {round}: page {page:#x} is {bytes:?}");
        }
    }
    let stats = reader.stats();
    ensure!(stats.invalidations >= 6 && stats.pages >= 6, "nobody asked for the pages: {stats:?}");
    let totals = guest.page_outs()?;
    ensure!(totals["importers_late"] == 0 && totals["importers_told"].as_u64() >= Some(9), "{totals}");
    let refused = ours.write(PAGE, 0, b"x");
    let code = |refused| match refused {
        Err(ImportError::Refused { code, .. }) => Some(code),
        _ => None,
    };
    ensure!(code(refused) == Some(Code::Rights), "a reader wrote");
    // Its maker goes, and the segment with it; what was written is the guest's.
    drop((theirs, write));
    drop(writer);
    let begun = Instant::now();
    while let Ok(access) = reader.get(segment, false) {
        reader.release(access)?;
        ensure!(begun.elapsed() < PATIENCE, "the segment outlives its maker");
    }
    // Nobody is granted a page any more, and who has some is told of it only then.
    while ours.read(PAGE, 0, &mut [0]).is_ok() {
        ensure!(begun.elapsed() < PATIENCE, "a page outlives its segment");
    }
    let again = reader.make(FIRST, PAGES, false)?;
    let access = reader.get(again, false)?;
    let mut bytes = [0; 4];
    reader.attach(&access, FIRST, PAGES)?.read(PAGE, 100, &mut bytes)?;
    ensure!(bytes == PAGE.to_le_bytes(), "what was written is lost");
    drop((ours, read, access, reader));
    guest.end()
}

fn mapped_windows() -> Verdict {
    let mut guest = Exporting::start(SOFT, &["--window", "mapped"])?;
    let importer = guest.importer()?;
    let segment = importer.make(FIRST, PAGES, true)?;
    let access = importer.get(segment, true)?;
    let attachment = importer.attach(&access, FIRST, PAGES)?;
    attachment.write(PAGE, 0, b"mapped")?;
    guest.page_out(PAGE)?;
    let mut bytes = [0; 6];
    attachment.read(PAGE, 0, &mut bytes)?;
    ensure!(&bytes == b"mapped", "it is {bytes:?}");
    drop((attachment, access, importer));
    guest.end()
}

/// An importer by hand.
pub(super) struct Raw {
    pub(super) socket: OwnedFd,
    /// What it is told by, and answers: the first descriptor that came.
    line: OnceLock<OwnedFd>,
}

impl Raw {
    pub(super) fn connect(path: &Path) -> Result<Raw, Failed> {
        let socket = umbra::export::connect(path)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Raw { socket, line: OnceLock::new() })
    }

    pub(super) fn hello(path: &Path) -> Result<Raw, Failed> {
        let raw = Raw::connect(path)?;
        let reply = raw.ask(Request::Hello { least: 1, most: VERSION })?;
        ensure!(matches!(reply, Reply::Welcome { .. }), "no welcome: {reply:?}");
        Ok(raw)
    }

    pub(super) fn send(&self, bytes: &[u8]) -> Verdict {
        rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Says something by the line.
    pub(super) fn answer(&self, bytes: &[u8]) -> Verdict {
        let line = self.line.get().ok_or("nobody has welcomed it")?;
        rustix::net::send(line, bytes, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// What it is told by the line next; nothing if that has not come yet and `flags` are not to wait, or once it is cut off.
    pub(super) fn told(&self, flags: RecvFlags) -> Result<Option<Reply>, Failed> {
        let line = self.line.get().ok_or("nobody has welcomed it")?;
        let mut buffer = [0; MESSAGE_MAX];
        match rustix::net::recv(line, &mut buffer, flags) {
            Ok((0, _)) => Ok(None),
            Ok((length, _)) => match Reply::parse(&buffer[..length]) {
                Ok((_, told)) => Ok(Some(told)),
                Err(why) => Err(format!("it is told {why}").into()),
            },
            Err(Errno::AGAIN) if flags.contains(RecvFlags::DONTWAIT) => Ok(None),
            Err(Errno::CONNRESET | Errno::PIPE) => Ok(None),
            Err(error) => Err(format!("neither told nor cut off: {error}").into()),
        }
    }

    /// Answers whatever it is told, at once, until it is cut off or hangs up.
    pub(super) fn answer_all(&self) {
        while let Ok(Some(Reply::Invalidate { order, .. })) = self.told(RecvFlags::empty()) {
            let _ = self.answer(&Request::Ack { order }.encode(0));
        }
    }

    /// It hears nothing by its line any more.
    pub(super) fn hang_up(&self) {
        let _ = self.line.get().map(|line| shutdown(line, Shutdown::Both));
    }

    /// The next reply; `None` once it is cut off.
    pub(super) fn hear(&self) -> Result<Option<Reply>, Failed> {
        match umbra::export::receive(&self.socket) {
            Ok(message) => Ok(message.map(|(_, reply, descriptor)| {
                if let Some(descriptor) = descriptor {
                    let line = self.line.get_or_init(|| descriptor);
                    // One that is told nothing fails a test, and does not hang it.
                    let _ = set_socket_timeout(line, Timeout::Recv, Some(PATIENCE));
                }
                reply
            })),
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                Ok(None)
            }
            Err(error) => Err(format!("neither a word nor an end: {error}").into()),
        }
    }

    pub(super) fn ask(&self, request: Request) -> Result<Reply, Failed> {
        self.send(&request.encode(1))?;
        Ok(self.hear()?.ok_or("it was cut off")?)
    }

    pub(super) fn is_cut(&self) -> Verdict {
        for _ in 0..10_000 {
            if self.hear()?.is_none() {
                return Ok(());
            }
        }
        Err("it is talked to for ever".into())
    }

    /// A page of a new segment, and how to reach it whatever is asked.
    pub(super) fn page(path: &Path, write: bool) -> Result<(Raw, File), Failed> {
        let holder = Importer::connect(path, Manners::default())?;
        let raw = Raw::hello(path)?;
        let segment = match raw.ask(Request::Make { first: FIRST, pages: PAGES, write })? {
            Reply::Made { segment } => segment,
            other => return Err(format!("no segment: {other:?}").into()),
        };
        // A descriptor comes beside the message: have another get it.
        let access = holder.get(segment, write)?;
        let file = access.into_file();
        let Reply::Got { access, .. } = raw.ask(Request::Get { segment, write })? else {
            return Err("no access".into());
        };
        let attached = raw.ask(Request::Attach { access, first: FIRST, pages: PAGES })?;
        let Reply::Attached { attachment } = attached else { return Err("no attachment".into()) };
        let fault = Request::Fault { attachment, first: PAGE, pages: 1, write };
        let granted = raw.ask(fault)?;
        ensure!(matches!(granted, Reply::Granted { pages: 1, .. }), "not granted: {granted:?}");
        Ok((raw, file))
    }
}

/// What is in a page by way of its segment's file.
fn seen(file: &File) -> Result<[u8; 4], Failed> {
    let mut bytes = [0; 4];
    file.read_at(&mut bytes, u64::from(PAGE - FIRST) << 12)?;
    Ok(bytes)
}

fn put(file: &File, bytes: &[u8; 4]) -> Verdict {
    Ok(file.write_all_at(bytes, u64::from(PAGE - FIRST) << 12)?)
}

fn silent() -> Verdict {
    for (policy, stays) in [("keep", true), ("drop", false)] {
        let mut guest = Exporting::start(SOFT, &["--export-deadline", "50ms", "--export-policy", policy])?;
        let (raw, file) = Raw::page(&guest.path(), true)?;
        put(&file, b"page")?;
        let other = guest.importer()?;
        let begun = Instant::now();
        guest.page_out(PAGE)?;
        ensure!(begun.elapsed() >= Duration::from_millis(50), "{policy}: it was not given its time");
        ensure!(seen(&file)? == [0; 4], "{policy}: it still has the page");
        let told = raw.told(RecvFlags::empty())?;
        ensure!(matches!(told, Some(Reply::Invalidate { .. })), "{policy}: it was told {told:?}");
        let totals = guest.page_outs()?;
        ensure!(totals["importers_late"] == 1, "{policy}: {totals}");
        match stays {
            true => {
                let Some(Reply::Invalidate { order, .. }) = told else { return Err("not told".into()) };
                raw.answer(&Request::Ack { order }.encode(0))?;
                let again = raw.ask(Request::Remove { segment: 99 })?;
                ensure!(matches!(again, Reply::Refused { code: Code::Unknown, .. }), "{again:?}");
            }
            false => raw.is_cut()?,
        }
        drop((raw, other));
        guest.end()?;
    }
    Ok(())
}

/// It says that it has given the page up, and keeps it.
fn lying() -> Verdict {
    let mut guest = Exporting::start(SOFT, &["--export-deadline", FOREVER])?;
    let (raw, file) = Raw::page(&guest.path(), true)?;
    put(&file, b"page")?;
    let path = guest.path();
    thread::scope(|scope| {
        let liar = scope.spawn(|| -> Verdict {
            let told = raw.told(RecvFlags::empty())?;
            let Some(Reply::Invalidate { order, .. }) = told else { return Err("not told".into()) };
            raw.answer(&Request::Ack { order }.encode(0))
        });
        guest.page_out(PAGE)?;
        liar.join().map_err(|_| "the liar has panicked")?
    })?;
    ensure!(seen(&file)? == [0; 4], "it reads what is the guest's");
    // What it writes there now is nobody's.
    put(&file, b"lies")?;
    let honest = Importer::connect(&path, Manners::default())?;
    let access = honest.get(1, false)?;
    let mut bytes = [0; 4];
    honest.attach(&access, FIRST, PAGES)?.read(PAGE, 0, &mut bytes)?;
    ensure!(&bytes == b"page", "the guest has {bytes:?}");
    drop((raw, honest, access));
    guest.end()
}

/// `umbra import` in a process that can be stopped and killed.
struct Imports(Child);

impl Imports {
    fn start(path: &Path) -> Result<Imports, Failed> {
        let mut child = Command::new(program())
            .args(["import", "--make", "24M..25M", "--hold", "50s", "--export"])
            .arg(path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let out = child.stdout.take().ok_or("no pipe")?;
        let imports = Imports(child);
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        ensure!(line.starts_with("segment="), "it says '{line}'");
        Ok(imports)
    }

    /// Stops it, and waits until each of its threads stands.
    fn stop(&self) -> Verdict {
        self.signal(rustix::process::Signal::STOP)?;
        let begun = Instant::now();
        loop {
            let mut all = true;
            for task in std::fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
                let stat = std::fs::read_to_string(task?.path().join("stat"))?;
                all &= stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'));
            }
            if all {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "it does not stop");
        }
    }

    fn signal(&self, signal: rustix::process::Signal) -> Verdict {
        let id = rustix::process::Pid::from_child(&self.0);
        Ok(rustix::process::kill_process(id, signal)?)
    }
}

impl Drop for Imports {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until importers have so many of its pages, at least.
fn until_imported(guest: &Exporting, pages: usize) -> Verdict {
    let looker = guest.importer()?;
    let access = looker.get(1, false)?;
    let begun = Instant::now();
    loop {
        let states = looker.snapshot(&access, FIRST, PAGES)?;
        let imported = states.iter().filter(|state| **state & umbra::export::protocol::STATE_IMPORTED != 0);
        if imported.count() >= pages {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "nothing is imported: {states:?}");
    }
}

fn stopped() -> Verdict {
    for policy in ["keep", "kill"] {
        let mut guest = Exporting::start(SOFT, &["--export-deadline", "50ms", "--export-policy", policy])?;
        let mut imports = Imports::start(&guest.path())?;
        until_imported(&guest, PAGES as usize)?;
        imports.stop()?;
        guest.page_out(PAGE)?;
        let totals = guest.page_outs()?;
        ensure!(totals["importers_late"] == 1, "{policy}: {totals}");
        if policy == "kill" {
            let ended = imports.0.wait()?;
            ensure!(ended.signal() == Some(9), "it ended with {ended}");
        } else {
            imports.signal(rustix::process::Signal::CONT)?;
            until_imported(&guest, PAGES as usize)?;
        }
        drop(imports);
        guest.end()?;
    }
    Ok(())
}

fn dead() -> Verdict {
    let mut guest = Exporting::start(SOFT, &["--export-deadline", FOREVER])?;
    let imports = Imports::start(&guest.path())?;
    until_imported(&guest, PAGES as usize)?;
    imports.stop()?;
    let begun = Instant::now();
    thread::scope(|scope| {
        let killer = scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            imports.signal(rustix::process::Signal::KILL)
        });
        guest.page_out(PAGE)?;
        killer.join().map_err(|_| "the killer has panicked")?
    })?;
    ensure!(begun.elapsed() < PATIENCE, "its death was not noticed");
    drop(imports);
    guest.end()
}

fn reader() -> Verdict {
    let guest = Exporting::start(SOFT, &[])?;
    let (raw, file) = Raw::page(&guest.path(), false)?;
    ensure!(file.write_at(b"x", 0).is_err(), "it writes");
    ensure!(file.set_len(0).is_err() && file.set_len(1 << 30).is_err(), "it resizes");
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    ensure!(rustix::fs::fallocate(&file, punch, 0, 4096).is_err(), "it punches holes");
    drop((raw, file));
    // A writer may write and punch within its segment, and resize it no more than a reader.
    let begun = Instant::now();
    let (raw, file) = loop {
        match Raw::page(&guest.path(), true) {
            Ok(made) => break made,
            Err(why) => ensure!(begun.elapsed() < PATIENCE, "{why:?}"),
        }
    };
    ensure!(file.set_len(0).is_err() && file.set_len(1 << 30).is_err(), "a writer resizes");
    put(&file, b"page")?;
    rustix::fs::fallocate(&file, punch, 0, u64::from(PAGES) << 12)?;
    ensure!(seen(&file)? == [0; 4], "it does not lose what it punches");
    drop((raw, file));
    guest.end()
}

fn nonsense() -> Verdict {
    let guest = Exporting::start(SOFT, &[])?;
    let hello = Request::Hello { least: 1, most: VERSION }.encode(1);
    let no_version = Request::Hello { least: VERSION + 1, most: u32::MAX }.encode(1);
    let mut long = Request::Remove { segment: 1 }.encode(1);
    long.resize(MESSAGE_MAX + 1, 0);
    let ack = Request::Ack { order: 1 }.encode(1);
    let cases: [(&str, Vec<&[u8]>, Code); 8] = [
        ("a byte", vec![b"x"], Code::Malformed),
        ("another protocol", vec![b"{\"execute\":\"qmp_capabilities\"}"], Code::Malformed),
        ("no hello", vec![&ack], Code::Malformed),
        ("two hellos", vec![&hello, &hello], Code::Malformed),
        ("half a message", vec![&hello, &ack[..17]], Code::Malformed),
        ("a long message", vec![&hello, &long], Code::Malformed),
        ("an answer that is not by the line", vec![&hello, &ack], Code::Malformed),
        ("another version", vec![&no_version], Code::Version),
    ];
    for (what, messages, wants) in cases {
        let raw = Raw::connect(&guest.path())?;
        for message in messages {
            raw.send(message)?;
        }
        let mut last = None;
        while let Some(reply) = raw.hear()? {
            last = Some(reply);
        }
        let code = match &last {
            Some(Reply::Refused { code, .. }) => Some(*code),
            _ => None,
        };
        ensure!(code == Some(wants), "{what}: it heard {last:?}");
    }
    // One that hangs up in the middle of everything.
    let raw = Raw::hello(&guest.path())?;
    raw.send(&Request::Make { first: FIRST, pages: PAGES, write: true }.encode(1))?;
    drop(raw);
    guest.end()
}

fn flood() -> Verdict {
    let guest = Exporting::start(SOFT, &[])?;
    let raw = Raw::hello(&guest.path())?;
    // Nothing is read: neither the answers nor their end.
    let request = Request::Snapshot { access: 1, first: FIRST, pages: 1 }.encode(1);
    let cut = (0..1_000_000).find(|_| raw.send(&request).is_err());
    ensure!(cut.is_some(), "it may send for ever");
    raw.is_cut()?;
    guest.end()
}

fn beyond() -> Verdict {
    let guest = Exporting::start(SOFT, &[])?;
    let raw = Raw::hello(&guest.path())?;
    let refusal = |request: Request| -> Result<Code, Failed> {
        match raw.ask(request)? {
            Reply::Refused { code, .. } => Ok(code),
            other => Err(format!("{request:?} is answered by {other:?}").into()),
        }
    };
    let expect = |request: Request, wants: Code| -> Verdict {
        let code = refusal(request)?;
        ensure!(code == wants, "{request:?} is refused with {code:?}");
        Ok(())
    };
    for (first, pages) in [(0, 0), (0, u32::MAX), (u32::MAX, 1), (u32::MAX, u32::MAX), (8190, 3)] {
        expect(Request::Make { first, pages, write: true }, Code::Beyond)?;
    }
    let Reply::Made { segment } = raw.ask(Request::Make { first: FIRST, pages: PAGES, write: false })? else {
        return Err("no segment".into());
    };
    expect(Request::Make { first: FIRST + PAGES - 1, pages: 2, write: false }, Code::Beyond)?;
    expect(Request::Get { segment, write: true }, Code::Rights)?;
    expect(Request::Get { segment: segment + 1, write: false }, Code::Unknown)?;
    let Reply::Got { access, .. } = raw.ask(Request::Get { segment, write: false })? else {
        return Err("no access".into());
    };
    let outside = [(FIRST - 1, 1), (FIRST, PAGES + 1), (FIRST + PAGES, 1), (FIRST, 0), (FIRST, u32::MAX)];
    for (first, pages) in outside {
        expect(Request::Attach { access, first, pages }, Code::Beyond)?;
        expect(Request::Snapshot { access, first, pages }, Code::Beyond)?;
    }
    expect(Request::Sum { access, page: FIRST - 1 }, Code::Beyond)?;
    let Reply::Attached { attachment } = raw.ask(Request::Attach { access, first: FIRST, pages: 4 })? else {
        return Err("no attachment".into());
    };
    for (first, pages) in [(FIRST - 1, 1), (FIRST + 4, 1), (FIRST, 5), (FIRST, 0), (FIRST, u32::MAX)] {
        expect(Request::Fault { attachment, first, pages, write: false }, Code::Beyond)?;
        expect(Request::GiveUp { attachment, first, pages }, Code::Beyond)?;
    }
    expect(Request::Fault { attachment, first: FIRST, pages: 1, write: true }, Code::Rights)?;
    // Another's are not its own.
    let other = Raw::hello(&guest.path())?;
    let theirs = other.ask(Request::Fault { attachment, first: FIRST, pages: 1, write: false })?;
    ensure!(matches!(theirs, Reply::Refused { code: Code::Unknown, .. }), "{theirs:?}");
    let theirs = other.ask(Request::Remove { segment })?;
    ensure!(matches!(theirs, Reply::Refused { code: Code::Unknown, .. }), "{theirs:?}");
    drop((raw, other));
    guest.end()
}

fn limits() -> Verdict {
    let guest = Exporting::start(SOFT, &[])?;
    // Whoever says nothing gives way to who comes after.
    let mute: Vec<Raw> = (0..IMPORTERS_MAX).map(|_| Raw::connect(&guest.path())).collect::<Result<_, _>>()?;
    let all: Vec<Raw> = (0..IMPORTERS_MAX).map(|_| Raw::hello(&guest.path())).collect::<Result<_, _>>()?;
    mute[0].is_cut()?;
    let more = Raw::connect(&guest.path())?;
    let turned_away = more.hear()?;
    ensure!(matches!(turned_away, Some(Reply::Refused { code: Code::Limit, .. })), "{turned_away:?}");
    drop((mute, more));
    let raw = &all[0];
    let until_refused = |request: &dyn Fn(u32) -> Request| -> Result<(u32, Reply), Failed> {
        for count in 0..10_000 {
            let reply = raw.ask(request(count))?;
            if matches!(reply, Reply::Refused { .. }) {
                return Ok((count, reply));
            }
        }
        Err("there is no limit".into())
    };
    let is_limit = |reply: &Reply| matches!(reply, Reply::Refused { code: Code::Limit, .. });
    let (segments, reply) =
        until_refused(&|count| Request::Make { first: FIRST + count, pages: 1, write: false })?;
    ensure!(is_limit(&reply) && segments == 64, "{segments} segments, then {reply:?}");
    let (accesses, reply) = until_refused(&|_| Request::Get { segment: 1, write: false })?;
    ensure!(is_limit(&reply) && accesses == 64, "{accesses} accesses, then {reply:?}");
    let Reply::Done = raw.ask(Request::Release { access: 1 })? else { return Err("not released".into()) };
    let Reply::Got { access, first, .. } = raw.ask(Request::Get { segment: 1, write: false })? else {
        return Err("no access".into());
    };
    let (attachments, reply) = until_refused(&|_| Request::Attach { access, first, pages: 1 })?;
    ensure!(is_limit(&reply) && attachments == 256, "{attachments} attachments, then {reply:?}");
    drop(all);
    guest.end()
}

/// A discard that may not sleep, while an importer has the page.
fn atomic() -> Verdict {
    let mut guest = Exporting::start(SOFT, &[])?;
    guest.qmp.told("stop", "STOP")?;
    let importer = guest.importer()?;
    let segment = importer.make(FIRST, PAGES, true)?;
    let access = importer.get(segment, true)?;
    let attachment = importer.attach(&access, FIRST, PAGES)?;
    attachment.write(PAGE, 0, b"page")?;
    let discard = json!({"gpa": u64::from(PAGE) << 12, "bytes": 4096, "atomic": true});
    guest.qmp.send("x-discard", discard.clone())?;
    let refused = guest.qmp.receive()?;
    let words = refused["error"]["desc"].as_str().unwrap_or_default();
    ensure!(words.contains("importer"), "not refused: {refused}");
    let mut bytes = [0; 4];
    attachment.read(PAGE, 0, &mut bytes)?;
    ensure!(&bytes == b"page" && importer.stats().invalidations == 0, "something has changed: {bytes:?}");
    attachment.give_up(PAGE, 1)?;
    let done = guest.qmp.call("x-discard", discard)?;
    ensure!(done["discarded"] == 1, "{done}");
    attachment.read(PAGE, 0, &mut bytes)?;
    ensure!(bytes == [0; 4], "it is still there: {bytes:?}");
    drop((attachment, access, importer));
    guest.qmp.told("cont", "RESUME")?;
    guest.end()
}
