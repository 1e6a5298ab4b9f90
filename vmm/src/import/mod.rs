//! An importer: pages of a running guest's memory in this process, for as long as the guest can spare them.
//!
//! Story: [`Importer::connect`] speaks to a guest that was started with `--export SOCKET`. Segments are made or found by number,
//! accessed and attached; an [`Attachment`]'s pages are read and written by calls that have them granted first. Whoever asks waits
//! for the answer itself. A thread of the importer's own listens to the line, and gives pages up when they are asked for: whoever uses
//! an attachment only finds that it has to ask again. docs/export-protocol.md is what goes over the two sockets.
//!
//! | file | its job |
//! |---|---|
//! | area | the pages in our address space |
//! | command | `umbra import` |
//! | fuzz | the same for fuzzers |
//! | line | the pages that the guest wants back |
//!
//! Holds: INV-IMPORT-2, what [`Attachment::read`] returns was in the page while it was ours, however late we are, and whatever has become
//! of the connection. A guest that is slow, silent or hostile costs [`PATIENCE`] once: one that has left a question unanswered is asked no more.
//! Nothing that it sends is believed beyond a number's type, and that a line is a socket which can be shut down.

mod area;
pub mod command;
#[doc(hidden)]
pub mod fuzz;
mod line;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketType, shutdown};

use umbra_mmu::PAGE_SIZE;

pub use area::{PAGE, Rights};
pub use command::{ImportArgs, Report};
pub use line::{Manners, Stats};

use crate::export::protocol::{Code, FAULT_MAX, Reply, Request, VERSION};
use crate::export::receive;
use area::{Area, Granted};
use line::Line;

/// How long a question and its answer may take.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How often a page is asked for that is held where it is, or taken away before we have it, until that is an error.
const ATTEMPTS_MAX: u32 = 200;
/// Frames of the largest guest: 64 GiB, all that a 32-bit guest's page tables can name.
const FRAMES_MAX: u32 = 1 << 24;

/// Why something was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Nobody is there.
    #[error("cannot connect to {path}: {source}; is a guest running that was started with --export {path}?", path = path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The guest said no.
    #[error("{why}")]
    Refused {
        /// Why.
        code: Code,
        /// Why, in a sentence.
        why: String,
    },
    /// The connection is over.
    #[error("the guest's connection has ended: {0}")]
    Ended(String),
    /// What came makes no sense.
    #[error("the guest sent {0}; is it Umbra's export socket?")]
    Protocol(String),
    /// The page is always gone before we have it.
    #[error(
        "guest frame {0:#x} was granted {ATTEMPTS_MAX} times, and taken away each time before it was used"
    )]
    Starved(u32),
    /// The host refuses.
    #[error("mapping imported pages: {0}")]
    Host(#[from] io::Error),
}

/// What is asked, and what is answered.
#[derive(Debug)]
struct Talk {
    socket: OwnedFd,
    /// The last question's tag; held from a question until its answer.
    asking: Mutex<u64>,
    /// Held from a question about pages until its answer is in force.
    paging: Mutex<()>,
    /// Why nothing can be asked any more.
    ended: OnceLock<String>,
}

/// A connection to a guest that exports.
#[derive(Debug)]
pub struct Importer {
    talk: Arc<Talk>,
    line: Arc<Line>,
    listener: Option<JoinHandle<()>>,
    number: u32,
    deadline: Duration,
}

/// Access to a segment.
#[derive(Debug)]
pub struct Access {
    number: u32,
    file: File,
    /// Its first guest frame.
    pub first: u32,
    /// How many.
    pub pages: u32,
    /// It was asked for to write too.
    pub write: bool,
}

/// A part of a segment in our address space.
#[derive(Debug)]
pub struct Attachment {
    talk: Arc<Talk>,
    line: Arc<Line>,
    area: Arc<Area>,
    number: u32,
    /// Its first guest frame.
    pub first: u32,
    /// How many.
    pub pages: u32,
}

impl Importer {
    /// Connects to the guest behind `path`.
    ///
    /// # Errors
    ///
    /// When nobody is there, or it turns us away.
    pub fn connect(path: &Path, manners: Manners) -> Result<Importer, ImportError> {
        let socket = crate::export::connect(path)
            .map_err(|source| ImportError::Connect { path: path.to_owned(), source })?;
        Importer::greet(socket, manners)
    }

    /// The first words on a connection.
    fn greet(socket: OwnedFd, manners: Manners) -> Result<Importer, ImportError> {
        let talk = Arc::new(Talk::new(socket));
        let (number, deadline_micros, line) =
            match talk.ask(&Request::Hello { least: VERSION, most: VERSION })? {
                (Reply::Welcome { importer, deadline_micros, .. }, Some(line)) => {
                    (importer, deadline_micros, line)
                }
                (reply, _) => return Err(unexpected(&reply)),
            };
        if !is_line(&line) {
            return Err(ImportError::Protocol("a line that is no Unix socket of type SOCK_SEQPACKET".into()));
        }
        let line = Arc::new(Line::new(line, manners));
        let (listens, ends) = (Arc::clone(&line), Arc::clone(&talk));
        let listen = move || match listens.listen() {
            Ok(()) => ends.hang_up(),
            Err(error) => drop(ends.over(error.to_string())),
        };
        let listener = Some(std::thread::Builder::new().name("importer".into()).spawn(listen)?);
        Ok(Importer { talk, line, listener, number, deadline: Duration::from_micros(deadline_micros.into()) })
    }

    /// Our number, as the guest's records have it.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// How long we have to answer.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Makes a segment of `pages` guest frames from `first` on, for as long as we are connected. Its number.
    ///
    /// # Errors
    ///
    /// When the guest refuses.
    pub fn make(&self, first: u32, pages: u32, write: bool) -> Result<u32, ImportError> {
        match self.talk.ask(&Request::Make { first, pages, write })? {
            (Reply::Made { segment }, _) => Ok(segment),
            (reply, _) => Err(unexpected(&reply)),
        }
    }

    /// Removes a segment that we have made.
    ///
    /// # Errors
    ///
    /// When the guest refuses.
    pub fn remove(&self, segment: u32) -> Result<(), ImportError> {
        self.talk.do_it(&Request::Remove { segment })
    }

    /// Gets access to a segment.
    ///
    /// # Errors
    ///
    /// When the guest refuses.
    pub fn get(&self, segment: u32, write: bool) -> Result<Access, ImportError> {
        match self.talk.ask(&Request::Get { segment, write })? {
            (Reply::Got { access, first, pages, .. }, Some(file)) => {
                let file = File::from(file);
                check_segment(first, pages, file.metadata()?.len())?;
                Ok(Access { number: access, file, first, pages, write })
            }
            (reply, _) => Err(unexpected(&reply)),
        }
    }

    /// Gives it back, with all that is attached by it.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub fn release(&self, access: Access) -> Result<(), ImportError> {
        self.talk.do_it(&Request::Release { access: access.number })
    }

    /// Attaches a part of a segment. No page of it is there yet.
    ///
    /// # Errors
    ///
    /// When it is not of the segment, or there is no room for it.
    pub fn attach(&self, access: &Access, first: u32, pages: u32) -> Result<Attachment, ImportError> {
        let (reply, _) = self.talk.ask(&Request::Attach { access: access.number, first, pages })?;
        let Reply::Attached { attachment: number } = reply else { return Err(unexpected(&reply)) };
        let offset = first.checked_sub(access.first);
        let offset =
            offset.filter(|offset| pages.checked_add(*offset).is_some_and(|end| end <= access.pages));
        let offset =
            offset.ok_or_else(|| ImportError::Protocol("an attachment beyond its segment".into()))?;
        let area = Arc::new(Area::new(access.file.try_clone()?, first, offset, pages, access.write)?);
        self.line.add(&area)?;
        let (talk, line) = (Arc::clone(&self.talk), Arc::clone(&self.line));
        Ok(Attachment { talk, line, area, number, first, pages })
    }

    /// Where pages of a segment are: a byte each, as the protocol has it.
    ///
    /// # Errors
    ///
    /// When they are not of the segment, or too many.
    pub fn snapshot(&self, access: &Access, first: u32, pages: u32) -> Result<Vec<u8>, ImportError> {
        match self.talk.ask(&Request::Snapshot { access: access.number, first, pages })? {
            (Reply::States(states), _) => Ok(states),
            (reply, _) => Err(unexpected(&reply)),
        }
    }

    /// The CRC-32 of a page, as the guest's VMM reads it.
    ///
    /// # Errors
    ///
    /// When it is not of the segment, or cannot be brought in.
    pub fn sum(&self, access: &Access, page: u32) -> Result<u32, ImportError> {
        match self.talk.ask(&Request::Sum { access: access.number, page })? {
            (Reply::Summed { crc }, _) => Ok(crc),
            (reply, _) => Err(unexpected(&reply)),
        }
    }

    /// What has come to us so far.
    pub fn stats(&self) -> Stats {
        self.line.stats()
    }
}

impl Drop for Importer {
    fn drop(&mut self) {
        self.line.hang_up();
        self.talk.hang_up();
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

impl Access {
    /// The segment's memory, byte 0 being its first guest frame's, to do with what the descriptor allows: pages that were not
    /// granted read as zeros.
    pub fn into_file(self) -> File {
        self.file
    }
}

impl Attachment {
    /// Has pages granted, from `first` on: how many of `pages` were.
    ///
    /// # Errors
    ///
    /// When the first cannot be had.
    pub fn fault(&self, first: u32, pages: u32, rights: Rights) -> Result<u32, ImportError> {
        let _one_at_a_time = self.talk.paging();
        let (attachment, pages) = (self.number, pages.min(FAULT_MAX));
        let request = Request::Fault { attachment, first, pages, write: rights == Rights::Write };
        let (reply, _) = self.talk.ask(&request)?;
        let Reply::Granted { order, pages: granted } = reply else { return Err(unexpected(&reply)) };
        let granted = granted.min(pages);
        self.area.grant(first, granted, rights, order);
        Ok(granted)
    }

    /// Copies out of a page, having it granted if need be.
    ///
    /// # Errors
    ///
    /// When it cannot be had.
    pub fn read(&self, frame: u32, offset: usize, bytes: &mut [u8]) -> Result<(), ImportError> {
        self.with(frame, Rights::Read, || self.area.read(frame, offset, bytes))
    }

    /// Copies into a page, having it granted if need be.
    ///
    /// # Errors
    ///
    /// When it cannot be had to be written, or is not known to have been: the guest may see it and end before we know.
    pub fn write(&self, frame: u32, offset: usize, bytes: &[u8]) -> Result<(), ImportError> {
        self.with(frame, Rights::Write, || self.area.write(frame, offset, bytes))
    }

    /// Gives pages up before anybody asks, in all attachments of this importer.
    ///
    /// # Errors
    ///
    /// When they are not of the attachment.
    pub fn give_up(&self, first: u32, pages: u32) -> Result<(), ImportError> {
        let _one_at_a_time = self.talk.paging();
        let end = first.saturating_add(pages);
        let frames: Vec<u32> = (first..end.min(self.first + self.pages)).collect();
        self.line.take_away(&frames)?;
        self.talk.do_it(&Request::GiveUp { attachment: self.number, first, pages })
    }

    /// Pages that are granted now.
    pub fn granted(&self) -> usize {
        self.area.granted()
    }

    fn with(
        &self,
        frame: u32,
        rights: Rights,
        mut touch: impl FnMut() -> Option<Granted>,
    ) -> Result<(), ImportError> {
        for _ in 0..ATTEMPTS_MAX {
            if let Some(granted) = touch() {
                self.line.catch_up().map_err(|error| self.talk.over(error.to_string()))?;
                if self.area.stands(frame, granted) {
                    return Ok(());
                }
            }
            match self.fault(frame, 1, rights) {
                Ok(_) => {}
                Err(ImportError::Refused { code: Code::Held, .. }) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error),
            }
        }
        Err(ImportError::Starved(frame))
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // Given up before it is said; the area itself goes with the last who listens.
        let frames: Vec<u32> = (self.first..self.first + self.pages).collect();
        if self.area.take_away(&frames, 0).is_ok() {
            let _ = self.talk.do_it(&Request::Detach { attachment: self.number });
        }
    }
}

impl Talk {
    fn new(socket: OwnedFd) -> Talk {
        Talk { socket, asking: Mutex::default(), paging: Mutex::default(), ended: OnceLock::new() }
    }

    fn paging(&self) -> MutexGuard<'_, ()> {
        self.paging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn do_it(&self, request: &Request) -> Result<(), ImportError> {
        match self.ask(request)? {
            (Reply::Done, _) => Ok(()),
            (reply, _) => Err(unexpected(&reply)),
        }
    }

    /// Sends a request, and waits for what comes of it, for [`PATIENCE`] at most.
    fn ask(&self, request: &Request) -> Result<(Reply, Option<OwnedFd>), ImportError> {
        let mut last = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = self.ended.get() {
            return Err(ImportError::Ended(why.clone()));
        }
        *last += 1;
        let sent = rustix::net::send(&self.socket, &request.encode(*last), SendFlags::NOSIGNAL);
        // What was said before the end can be heard still: a failure to send says less.
        let until = Instant::now() + if sent.is_ok() { PATIENCE } else { Duration::ZERO };
        let mut was_reset = false;
        loop {
            if !self.is_talked_to(until) {
                return Err(self.over(match sent {
                    Ok(_) => format!("no answer in {PATIENCE:?}"),
                    Err(error) => error.to_string(),
                }));
            }
            return match receive(&self.socket) {
                Ok(Some((tag, Reply::Refused { code, why }, _))) if tag == *last => {
                    Err(ImportError::Refused { code, why })
                }
                Ok(Some((tag, reply, file))) if tag == *last => Ok((reply, file)),
                Ok(Some((0, Reply::Refused { why, .. }, _))) => Err(self.over(why)),
                Ok(Some((_, reply, _))) => {
                    Err(self.over(format!("it has said {reply:?}, which nobody had asked")))
                }
                Ok(None) => Err(self.over("it has hung up".into())),
                // The host says that first, and then what was said before.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset && !was_reset => {
                    was_reset = true;
                    continue;
                }
                Err(error) => Err(self.over(error.to_string())),
            };
        }
    }

    /// Returns when there is something to hear; false if there is nothing by then.
    fn is_talked_to(&self, until: Instant) -> bool {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let mut socket = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut socket, Timespec::try_from(left).ok().as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                polled => return polled.is_ok_and(|ready| ready > 0),
            }
        }
    }

    /// Nothing more is said; what was can be heard.
    fn hang_up(&self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Ends the connection. The error of it, with what was known first.
    fn over(&self, why: String) -> ImportError {
        let why = self.ended.get_or_init(|| why).clone();
        self.hang_up();
        ImportError::Ended(why)
    }
}

/// A segment is some pages of a guest's memory, and its file has them all.
fn check_segment(first: u32, pages: u32, bytes: u64) -> Result<(), ImportError> {
    let is_memory = first.checked_add(pages).is_some_and(|end| end <= FRAMES_MAX);
    if pages > 0 && is_memory && bytes / PAGE_SIZE >= u64::from(pages) {
        return Ok(());
    }
    Err(ImportError::Protocol(format!(
        "a segment of {pages} pages from guest frame {first:#x} on, in a file of {bytes} bytes"
    )))
}

/// Whether it is a socket that a thread which hears it can be called from.
fn is_line(line: &OwnedFd) -> bool {
    let domain = socket_domain(line).is_ok_and(|domain| domain == AddressFamily::UNIX);
    domain && socket_type(line).is_ok_and(|kind| kind == SocketType::SEQPACKET)
}

fn unexpected(reply: &Reply) -> ImportError {
    ImportError::Protocol(format!("{reply:?} for an answer"))
}

#[cfg(test)]
mod tests {
    use rustix::net::{RecvFlags, SocketFlags, socketpair};

    use super::*;

    fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("sockets")
    }

    /// What comes of a question and another, where the guest says this to the first and hangs up if it does at all.
    fn answered(says: &[(u64, Reply)], hangs_up: bool) -> [Result<Reply, ImportError>; 2] {
        let (ours, guest) = pair(SocketType::SEQPACKET);
        let talk = Talk { asking: Mutex::new(6), ..Talk::new(ours) };
        for (tag, reply) in says {
            rustix::net::send(&guest, &reply.encode(*tag), SendFlags::NOSIGNAL).expect("room");
        }
        if hangs_up {
            // It has not read what it was asked, which the host tells us of.
            rustix::net::send(&talk.socket, b"hello", SendFlags::NOSIGNAL).expect("room");
            drop(guest);
            return [1, 2].map(|segment| talk.ask(&Request::Remove { segment }).map(|(reply, _)| reply));
        }
        let first = talk.ask(&Request::Remove { segment: 1 }).map(|(reply, _)| reply);
        let (length, _) = rustix::net::recv(&guest, &mut [0; 64], RecvFlags::DONTWAIT).expect("a question");
        assert_eq!(length, Request::Remove { segment: 1 }.encode(7).len());
        [first, talk.ask(&Request::Remove { segment: 2 }).map(|(reply, _)| reply)]
    }

    fn ended(answer: &Result<Reply, ImportError>, why: &str) {
        assert!(matches!(answer, Err(ImportError::Ended(said)) if said.contains(why)), "{answer:?}");
    }

    #[test]
    fn an_answer_is_known_by_its_tag() {
        let made = |segment| Reply::Made { segment };
        let [first, second] = answered(&[(7, made(7)), (8, made(8))], false);
        assert_eq!((first.ok(), second.ok()), (Some(made(7)), Some(made(8))));
        let no = Reply::Refused { code: Code::Held, why: "no".into() };
        let [first, second] = answered(&[(7, no), (8, Reply::Done)], false);
        assert!(matches!(first, Err(ImportError::Refused { code: Code::Held, .. })), "{first:?}");
        assert_eq!(second.ok(), Some(Reply::Done));
    }

    #[test]
    fn what_nobody_has_asked_is_the_end() {
        let wants = Reply::Invalidate { order: 1, pages: vec![7] };
        for (tag, said) in [(3, Reply::Done), (8, Reply::Done), (0, Reply::Done), (0, wants)] {
            let [first, second] = answered(&[(tag, said), (7, Reply::Done)], false);
            ended(&first, "nobody had asked");
            ended(&second, "nobody had asked");
        }
    }

    #[test]
    fn whoever_is_turned_away_hears_why_each_time_it_asks() {
        for hangs_up in [false, true] {
            let no = Reply::Refused { code: Code::Limit, why: "there is no room".into() };
            let [first, second] = answered(&[(0, no)], hangs_up);
            ended(&first, "there is no room");
            ended(&second, "there is no room");
        }
        let [first, _] = answered(&[], true);
        ended(&first, "it has hung up");
    }

    #[test]
    fn a_segment_that_cannot_be_is_no_segment() {
        const PAGES: u64 = PAGE_SIZE;
        for (first, pages, bytes) in [(0, 1, PAGES), (16, 4, 4 * PAGES), (FRAMES_MAX - 1, 1, 9 * PAGES)] {
            assert!(check_segment(first, pages, bytes).is_ok(), "{first} {pages} {bytes}");
        }
        let wrong = [
            (0, 0, PAGES),
            (0, 2, PAGES),
            (u32::MAX, 1, PAGES),
            (1, u32::MAX, u64::MAX),
            (FRAMES_MAX, 1, PAGES),
            (16, FRAMES_MAX - 15, u64::MAX),
        ];
        for (first, pages, bytes) in wrong {
            assert!(check_segment(first, pages, bytes).is_err(), "{first} {pages} {bytes}");
        }
    }

    #[test]
    fn a_line_is_what_can_be_hung_up() {
        assert!(is_line(&pair(SocketType::SEQPACKET).0));
        assert!(!is_line(&pair(SocketType::STREAM).0));
        assert!(!is_line(&crate::machine::memory_file(c"test", 4096).expect("a file").into()));
        let netlink = rustix::net::socket(AddressFamily::NETLINK, SocketType::DGRAM, None).expect("a socket");
        assert!(!is_line(&netlink));
    }
}
