//! An importer: pages of a running guest's memory in this process, for as long as the guest can spare them.
//!
//! Story: [`Importer::connect`] speaks to a guest that was started with `--export SOCKET`. Segments are made or found by number,
//! accessed and attached; an [`Attachment`]'s pages are read and written by calls that have them granted first. A thread of the
//! importer's own listens, and gives pages up when they are asked for: whoever uses an attachment only finds that it has to ask
//! again. docs/export-protocol.md is what goes over the socket.
//!
//! | file | its job |
//! |---|---|
//! | area | the pages in our address space |
//! | command | `umbra import` |
//!
//! Holds: a guest that is slow, silent or hostile costs [`PATIENCE`] for each question, and nothing that it sends is believed beyond
//! a number's type.

mod area;
pub mod command;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::SendFlags;

pub use area::{PAGE, Rights};
pub use command::{ImportArgs, Report};

use crate::export::protocol::{Code, FAULT_MAX, Reply, Request, VERSION};
use crate::export::receive;
use area::Area;

/// How long a question and its answer may take.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How often a page is asked for that is held where it is, or taken away before we have it, until that is an error.
const ATTEMPTS_MAX: u32 = 200;

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

/// How an importer behaves when it is asked to give pages up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manners {
    /// It takes so long before it says that it has.
    pub ack_delay: Duration,
}

/// What has come to an importer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests to give pages up.
    pub invalidations: u64,
    /// Pages that they named and that were granted.
    pub pages: u64,
    /// The longest that an answer took, from the message's arrival on.
    pub answer_max: Duration,
    /// All answers together.
    pub answer_sum: Duration,
}

#[derive(Debug, Default)]
struct Mailbox {
    /// By tag: what is waited for, and what has come of it.
    replies: HashMap<u64, Option<(Reply, Option<OwnedFd>)>>,
    last_tag: u64,
    ended: Option<String>,
    stats: Stats,
}

#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    /// What we answer by, once we are welcome.
    line: OnceLock<OwnedFd>,
    manners: Manners,
    mailbox: Mutex<Mailbox>,
    arrived: Condvar,
    areas: Mutex<Vec<Weak<Area>>>,
}

/// A connection to a guest that exports.
#[derive(Debug)]
pub struct Importer {
    shared: Arc<Shared>,
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
    shared: Arc<Shared>,
    area: Arc<Area>,
    number: u32,
    /// Held from a question about pages until its answer is in force.
    asking: Mutex<()>,
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
        let (line, arrived) = (OnceLock::new(), Condvar::new());
        let (mailbox, areas) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { socket, line, manners, mailbox, arrived, areas });
        let listens = Arc::clone(&shared);
        let listener = std::thread::Builder::new().name("importer".into()).spawn(move || listens.listen())?;
        let mut importer = Importer { shared, listener: Some(listener), number: 0, deadline: Duration::ZERO };
        match importer.shared.ask(&Request::Hello { least: VERSION, most: VERSION })? {
            (Reply::Welcome { importer: number, deadline_micros, .. }, Some(line)) => {
                importer.shared.line.get_or_init(|| line);
                importer.number = number;
                importer.deadline = Duration::from_micros(deadline_micros.into());
                Ok(importer)
            }
            (reply, _) => Err(unexpected(&reply)),
        }
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
        match self.shared.ask(&Request::Make { first, pages, write })? {
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
        self.shared.do_it(&Request::Remove { segment })
    }

    /// Gets access to a segment.
    ///
    /// # Errors
    ///
    /// When the guest refuses.
    pub fn get(&self, segment: u32, write: bool) -> Result<Access, ImportError> {
        match self.shared.ask(&Request::Get { segment, write })? {
            (Reply::Got { access, first, pages, .. }, Some(file)) => {
                Ok(Access { number: access, file: file.into(), first, pages, write })
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
        self.shared.do_it(&Request::Release { access: access.number })
    }

    /// Attaches a part of a segment. No page of it is there yet.
    ///
    /// # Errors
    ///
    /// When it is not of the segment, or there is no room for it.
    pub fn attach(&self, access: &Access, first: u32, pages: u32) -> Result<Attachment, ImportError> {
        let (reply, _) = self.shared.ask(&Request::Attach { access: access.number, first, pages })?;
        let Reply::Attached { attachment: number } = reply else { return Err(unexpected(&reply)) };
        let offset = first.checked_sub(access.first);
        let offset =
            offset.ok_or_else(|| ImportError::Protocol("an attachment before its segment".into()))?;
        let area = Arc::new(Area::new(access.file.try_clone()?, first, offset, pages, access.write)?);
        let mut areas = self.shared.areas();
        areas.retain(|area| area.strong_count() > 0);
        areas.push(Arc::downgrade(&area));
        drop(areas);
        let asking = Mutex::default();
        Ok(Attachment { shared: Arc::clone(&self.shared), area, number, asking, first, pages })
    }

    /// Where pages of a segment are: a byte each, as the protocol has it.
    ///
    /// # Errors
    ///
    /// When they are not of the segment, or too many.
    pub fn snapshot(&self, access: &Access, first: u32, pages: u32) -> Result<Vec<u8>, ImportError> {
        match self.shared.ask(&Request::Snapshot { access: access.number, first, pages })? {
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
        match self.shared.ask(&Request::Sum { access: access.number, page })? {
            (Reply::Summed { crc }, _) => Ok(crc),
            (reply, _) => Err(unexpected(&reply)),
        }
    }

    /// What has come to us so far.
    pub fn stats(&self) -> Stats {
        self.shared.mailbox().stats
    }
}

impl Drop for Importer {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.shared.socket, rustix::net::Shutdown::Both);
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
        let _one_at_a_time = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let (attachment, pages) = (self.number, pages.min(FAULT_MAX));
        let request = Request::Fault { attachment, first, pages, write: rights == Rights::Write };
        let (reply, _) = self.shared.ask(&request)?;
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
    /// When it cannot be had to be written.
    pub fn write(&self, frame: u32, offset: usize, bytes: &[u8]) -> Result<(), ImportError> {
        self.with(frame, Rights::Write, || self.area.write(frame, offset, bytes))
    }

    /// Gives pages up before anybody asks.
    ///
    /// # Errors
    ///
    /// When they are not of the attachment.
    pub fn give_up(&self, first: u32, pages: u32) -> Result<(), ImportError> {
        let _one_at_a_time = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let end = first.saturating_add(pages);
        let frames: Vec<u32> = (first..end.min(self.first + self.pages)).collect();
        self.area.take_away(&frames, 0)?;
        self.shared.do_it(&Request::GiveUp { attachment: self.number, first, pages })
    }

    /// Pages that are granted now.
    pub fn granted(&self) -> usize {
        self.area.granted()
    }

    fn with(&self, frame: u32, rights: Rights, mut touch: impl FnMut() -> bool) -> Result<(), ImportError> {
        for _ in 0..ATTEMPTS_MAX {
            if touch() {
                return Ok(());
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
            let _ = self.shared.do_it(&Request::Detach { attachment: self.number });
        }
    }
}

impl Shared {
    fn do_it(&self, request: &Request) -> Result<(), ImportError> {
        match self.ask(request)? {
            (Reply::Done, _) => Ok(()),
            (reply, _) => Err(unexpected(&reply)),
        }
    }

    /// Sends a request, and waits for what comes of it.
    fn ask(&self, request: &Request) -> Result<(Reply, Option<OwnedFd>), ImportError> {
        let tag = {
            let mut mailbox = self.mailbox();
            mailbox.last_tag += 1;
            let tag = mailbox.last_tag;
            mailbox.replies.insert(tag, None);
            tag
        };
        // What was said before the end is read by the listener: a failure here says less.
        let sent = rustix::net::send(&self.socket, &request.encode(tag), SendFlags::NOSIGNAL);
        let until = Instant::now() + if sent.is_ok() { PATIENCE } else { Duration::from_secs(1) };
        let mut mailbox = self.mailbox();
        loop {
            if let Some(Some(_)) = mailbox.replies.get(&tag) {
                let (reply, file) = mailbox.replies.remove(&tag).flatten().unwrap_or((Reply::Done, None));
                return match reply {
                    Reply::Refused { code, why } => Err(ImportError::Refused { code, why }),
                    reply => Ok((reply, file)),
                };
            }
            if let Some(why) = &mailbox.ended {
                return Err(ImportError::Ended(why.clone()));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                mailbox.replies.remove(&tag);
                return Err(ImportError::Ended(match sent {
                    Ok(_) => format!("no answer in {PATIENCE:?}"),
                    Err(error) => error.to_string(),
                }));
            }
            let waited = self.arrived.wait_timeout(mailbox, left);
            mailbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The listener's thread.
    fn listen(&self) {
        let why = loop {
            match receive(&self.socket) {
                Ok(Some((tag, reply, file))) => {
                    if let Err(error) = self.heed(tag, reply, file) {
                        break error.to_string();
                    }
                }
                Ok(None) => break "it has hung up".into(),
                Err(error) => break error.to_string(),
            }
        };
        self.mailbox().ended.get_or_insert(why);
        self.arrived.notify_all();
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    fn heed(&self, tag: u64, reply: Reply, file: Option<OwnedFd>) -> io::Result<()> {
        match reply {
            Reply::Invalidate { order, pages } => self.give_up(order, &pages),
            Reply::Refused { why, .. } if tag == 0 => Err(io::Error::other(why)),
            reply => {
                if let Some(place) = self.mailbox().replies.get_mut(&tag) {
                    *place = Some((reply, file));
                }
                self.arrived.notify_all();
                Ok(())
            }
        }
    }

    /// Gives pages up, and says so.
    fn give_up(&self, order: u64, frames: &[u32]) -> io::Result<()> {
        let began = Instant::now();
        let areas: Vec<Arc<Area>> = self.areas().iter().filter_map(Weak::upgrade).collect();
        let mut pages = 0;
        for area in areas {
            pages += area.take_away(frames, order)?;
        }
        if !self.manners.ack_delay.is_zero() {
            std::thread::sleep(self.manners.ack_delay);
        }
        {
            // Before it is said: whoever sees what comes of it finds it counted.
            let stats = &mut self.mailbox().stats;
            stats.invalidations += 1;
            stats.pages += u64::from(pages);
        }
        let line = self.line.get().ok_or_else(|| io::Error::other("pages are wanted before a welcome"))?;
        rustix::net::send(line, &Request::Ack { order }.encode(0), SendFlags::NOSIGNAL)?;
        let took = began.elapsed();
        let stats = &mut self.mailbox().stats;
        stats.answer_sum += took;
        stats.answer_max = stats.answer_max.max(took);
        Ok(())
    }

    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn areas(&self) -> MutexGuard<'_, Vec<Weak<Area>>> {
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unexpected(reply: &Reply) -> ImportError {
    ImportError::Protocol(format!("{reply:?} for an answer"))
}
