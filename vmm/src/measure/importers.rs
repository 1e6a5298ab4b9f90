//! Importers of a measurement: processes of this program's own, that have the guest's pages as any importer has.
//!
//! Story: this process starts them ([`Importers::start`]), each with one end of a socket for its standard input. Over it they are
//! asked to have pages, before those are taken ([`Importers::have`]); what is measured is how they are told to give them up, over the
//! export socket. Others that are *bare* have no page of the guest's and no export socket. They drop a page of their own at each
//! message, as they would have to with anybody's, and send it back: what N processes cost without a reverse map is the floor
//! ([`Bare::round_trip`]).
//!
//! Holds: they end with this process, however it ends, stopped ones too; and nobody waits for one of them for longer than
//! [`PATIENCE`], or than he likes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use rustix::net::sockopt::Timeout;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use umbra_mmu::PAGE_SIZE;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::precise_sleep;
use crate::export::protocol::FAULT_MAX;
use crate::import::{Attachment, ImportError, Importer, Manners, Rights};
use crate::machine::{advise::drop_translations, memory_file};

/// The most importers of a measurement.
pub const IMPORTERS_MAX: u32 = 16;
/// How long one may take for what it is asked over its own socket.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long is waited for it before somebody else is asked whether to go on.
const LOOK: Duration = Duration::from_millis(20);
/// The hidden command that they run.
pub const COMMAND: &str = "measured-importer";
/// A message between the two: two numbers.
const MESSAGE: usize = 8;

/// What an importer of a measurement is to be.
#[derive(Args, Clone, Debug)]
pub struct ImporterArgs {
    /// The guest's socket; without it, a bare one.
    #[arg(long)]
    export: Option<PathBuf>,
    /// The segment; without it one is made.
    #[arg(long)]
    segment: Option<u32>,
    /// The first guest frame of it.
    #[arg(long, default_value_t = 0)]
    first: u32,
    /// How many.
    #[arg(long, default_value_t = 0)]
    pages: u32,
    /// How long it takes to answer, in nanoseconds.
    #[arg(long, default_value_t = 0)]
    ack_delay: u64,
    /// The process that it is for.
    #[arg(long)]
    parent: u32,
}

/// Is such an importer, until the other end of standard input is closed.
///
/// # Errors
///
/// When the pages cannot be imported, or the process that it is for has gone.
pub fn serve(args: &ImporterArgs) -> Result<(), ImportError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)?;
    // Asked for too late, the signal does not come.
    if rustix::process::getppid().is_none_or(|parent| parent.as_raw_nonzero().get() as u32 != args.parent) {
        return Err(io::Error::other("the measurement that this importer was for has ended").into());
    }
    precise_sleep();
    let talk = io::stdin().as_fd().try_clone_to_owned()?;
    let delay = Duration::from_nanos(args.ack_delay);
    match &args.export {
        None => serve_bare(&talk, delay),
        Some(export) => serve_pages(args, export, &talk, delay),
    }
}

fn serve_bare(talk: &OwnedFd, delay: Duration) -> Result<(), ImportError> {
    let file = FileOffset::new(memory_file(c"umbra-bare", PAGE_SIZE)?, 0);
    let page = MmapRegion::<()>::from_file(file, PAGE_SIZE as usize).map_err(io::Error::other)?;
    let page = page.as_volatile_slice();
    let touch = || page.read_obj::<u8>(0).map_err(io::Error::other);
    touch()?;
    send(talk, [0, 0])?;
    while let Some(message) = receive(talk)? {
        drop_translations(&page)?;
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        send(talk, message)?;
        touch()?;
    }
    Ok(())
}

fn serve_pages(
    args: &ImporterArgs,
    export: &Path,
    talk: &OwnedFd,
    ack_delay: Duration,
) -> Result<(), ImportError> {
    let importer = Importer::connect(export, Manners { ack_delay })?;
    let segment = match args.segment {
        Some(segment) => segment,
        None => importer.make(args.first, args.pages, false)?,
    };
    let access = importer.get(segment, false)?;
    let attachment = importer.attach(&access, access.first, access.pages)?;
    send(talk, [importer.number(), segment])?;
    while let Some([first, pages]) = receive(talk)? {
        match pages {
            0 => attachment.give_up(access.first, access.pages)?,
            pages => have(&attachment, first, pages)?,
        }
        send(talk, [first, pages])?;
    }
    Ok(())
}

/// Has these pages, and touches each: a page that is in nobody's page tables costs nothing to take away.
fn have(attachment: &Attachment, first: u32, pages: u32) -> Result<(), ImportError> {
    let end = first.saturating_add(pages);
    for from in (first..end).step_by(FAULT_MAX as usize) {
        attachment.fault(from, FAULT_MAX.min(end - from), Rights::Read)?;
    }
    (first..end).try_for_each(|page| attachment.read(page, 0, &mut [0]))
}

fn send(talk: &OwnedFd, message: [u32; 2]) -> io::Result<()> {
    let [a, b] = message.map(u32::to_le_bytes);
    rustix::net::send(talk, &[a, b].concat(), SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next message; `None` when the other end is closed.
fn receive(talk: &OwnedFd) -> io::Result<Option<[u32; 2]>> {
    let mut bytes = [0; MESSAGE];
    let length = loop {
        match rustix::net::recv(talk, &mut bytes, RecvFlags::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?.1,
        }
    };
    let number = |at: usize| bytes[at..at + 4].iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte));
    match length {
        0 => Ok(None),
        MESSAGE => Ok(Some([number(0), number(4)])),
        other => Err(io::Error::other(format!("a message of {other} bytes"))),
    }
}

/// A process of ours, and the socket to it. It ends with this value.
#[derive(Debug)]
struct Process {
    child: Child,
    talk: OwnedFd,
    /// What it said first.
    said: [u32; 2],
}

impl Process {
    /// Starts one, and waits until it is ready.
    fn start(options: &[String], look: &mut Look<'_>) -> Result<Process, Trouble> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(io::Error::from)?;
        rustix::net::sockopt::set_socket_timeout(&ours, Timeout::Recv, Some(LOOK))
            .map_err(io::Error::from)?;
        // By this name it is the same program, whatever has become of its file.
        let child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            .args(["--parent", &std::process::id().to_string()])
            .args(options)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            // Ctrl-C is for us: what was measured is to be said first.
            .process_group(0)
            .spawn()?;
        let mut process = Process { child, talk: ours, said: [0; 2] };
        process.said = process.answer(look)?;
        Ok(process)
    }

    /// Its next message, while `look` wants it.
    fn answer(&self, look: &mut Look<'_>) -> Result<[u32; 2], Trouble> {
        let until = Instant::now() + PATIENCE;
        loop {
            match receive(&self.talk) {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => return Err(Trouble::Gone("it has ended".into())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                    if !look() {
                        return Err(Trouble::NotWanted);
                    }
                }
                Err(error) => return Err(Trouble::Gone(error.to_string())),
            }
        }
    }

    /// One that has ended is waited for only by us: the number is still its.
    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(self.child.id() as i32)
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Returns once it stands, or has ended.
    fn await_stop(&self) {
        let news = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        if let Some(pid) = self.pid() {
            let wait = || rustix::process::waitid(WaitId::Pid(pid), news);
            while matches!(wait(), Err(rustix::io::Errno::INTR)) {}
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is it still worth waiting?
pub type Look<'a> = dyn FnMut() -> bool + 'a;

/// Why importers do not do what they should.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// One has gone, or is silent.
    #[error("an importer of this measurement is of no use any more: {0}")]
    Gone(String),
    /// Whoever waited does not want to any more.
    #[error("nobody waits for importers any more")]
    NotWanted,
    /// The host refuses.
    #[error("starting an importer of this measurement: {0}")]
    Host(#[from] io::Error),
}

/// Importers that have pages.
#[derive(Debug, Default)]
pub struct Importers {
    processes: Vec<Process>,
}

impl Importers {
    /// Starts `count` of them for `pages` guest frames from `first` on.
    ///
    /// # Errors
    ///
    /// When one cannot be started, or cannot import.
    pub fn start(
        count: u32,
        export: &Path,
        (first, pages): (u32, u32),
        delay: Duration,
        look: &mut Look<'_>,
    ) -> Result<Importers, Trouble> {
        let mut importers = Importers::default();
        for _ in 0..count {
            let mut options = vec![
                format!("--export={}", export.display()),
                format!("--first={first}"),
                format!("--pages={pages}"),
                format!("--ack-delay={}", delay.as_nanos()),
            ];
            // The first one makes the segment.
            options.extend(importers.processes.first().map(|first| format!("--segment={}", first.said[1])));
            importers.processes.push(Process::start(&options, look)?);
        }
        Ok(importers)
    }

    /// Their numbers, as the guest's records have them.
    pub fn numbers(&self) -> Vec<u32> {
        self.processes.iter().map(|process| process.said[0]).collect()
    }

    /// Has the first `count` of them have these pages, and the others none, and waits until that is so.
    ///
    /// # Errors
    ///
    /// When one does not.
    pub fn have(&self, count: u32, (first, pages): (u32, u32), look: &mut Look<'_>) -> Result<(), Trouble> {
        // In turn: they would be in each other's way, and nobody counts the time.
        for (process, at) in self.processes.iter().zip(0..) {
            let pages = if at < count { pages } else { 0 };
            send(&process.talk, [first, pages]).map_err(|error| Trouble::Gone(error.to_string()))?;
            process.answer(look)?;
        }
        Ok(())
    }

    /// Stops them where they are: none of them runs when this returns.
    pub fn stop(&self) {
        self.processes.iter().for_each(|process| process.signal(Signal::STOP));
        self.processes.iter().for_each(Process::await_stop);
    }

    /// Has them go on.
    pub fn go_on(&self) {
        self.processes.iter().for_each(|process| process.signal(Signal::CONT));
    }
}

/// Processes that drop a page and answer.
#[derive(Debug, Default)]
pub struct Bare {
    processes: Vec<Process>,
}

impl Bare {
    /// Starts `count` of them, which take `delay` to answer.
    ///
    /// # Errors
    ///
    /// When one cannot be started.
    pub fn start(count: u32, delay: Duration, look: &mut Look<'_>) -> Result<Bare, Trouble> {
        let options = [format!("--ack-delay={}", delay.as_nanos())];
        let processes = (0..count).map(|_| Process::start(&options, look)).collect::<Result<_, _>>()?;
        Ok(Bare { processes })
    }

    /// Tells the first `count` of them, then awaits each. False if one did not answer.
    pub fn round_trip(&self, count: u32) -> bool {
        let told = || self.processes.iter().take(count as usize);
        told().all(|process| send(&process.talk, [1, 2]).is_ok())
            && told().all(|process| process.answer(&mut || true).is_ok())
    }

    /// The same, one after the other.
    pub fn round_trip_in_turn(&self, count: u32) -> bool {
        let mut told = self.processes.iter().take(count as usize);
        told.all(|process| send(&process.talk, [1, 2]).is_ok() && process.answer(&mut || true).is_ok())
    }
}

/// A folder of this process's own for the export socket; it goes with this value.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Makes one that only this user may enter.
    ///
    /// # Errors
    ///
    /// When the host does not let us.
    pub fn new() -> io::Result<Folder> {
        use std::os::unix::fs::DirBuilderExt;
        /// Names to try: what a process of our number has left there is not ours.
        const NAMES: u32 = 100;
        let mut last = io::Error::other("no name is free");
        for n in 0..NAMES {
            let path = std::env::temp_dir().join(format!("umbra-measure-{}-{n}", std::process::id()));
            match std::fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Folder { path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Where the socket is to be.
    pub fn socket(&self) -> PathBuf {
        self.path.join("export")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let kind = SocketType::SEQPACKET;
        rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("sockets")
    }

    #[test]
    fn a_message_arrives_as_it_was_and_the_end_is_seen() {
        let (ours, theirs) = pair();
        send(&ours, [7, u32::MAX - 1]).expect("room");
        assert_eq!(receive(&theirs).expect("a message"), Some([7, u32::MAX - 1]));
        rustix::net::send(&ours, b"abc", SendFlags::empty()).expect("room");
        assert!(receive(&theirs).is_err(), "three bytes are no message");
        drop(ours);
        assert_eq!(receive(&theirs).expect("the end"), None);
    }

    #[test]
    fn a_bare_one_sends_back_what_it_was_sent() {
        let (ours, theirs) = pair();
        std::thread::scope(|scope| {
            let bare = scope.spawn(move || serve_bare(&theirs, Duration::ZERO));
            assert_eq!(receive(&ours).expect("it is ready"), Some([0, 0]));
            for message in [[1, 2], [3, 4]] {
                send(&ours, message).expect("room");
                assert_eq!(receive(&ours).expect("an answer"), Some(message));
            }
            drop(ours);
            assert!(bare.join().expect("no panic").is_ok());
        });
    }

    #[test]
    fn a_folder_is_new_and_private_and_goes() {
        use std::os::unix::fs::PermissionsExt;
        let (first, second) = (Folder::new().expect("a folder"), Folder::new().expect("another"));
        assert_ne!(first.socket(), second.socket());
        let path = first.path.clone();
        let mode = std::fs::metadata(&path).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        drop(first);
        assert!(!path.exists());
    }
}
