//! The export socket: guest memory for other processes of the same user.
//!
//! Story: `umbra run --export SOCKET` listens; an importer connects, makes or finds a segment, and has pages of it in its own
//! address space until it is told to give them up. docs/export-protocol.md is for whoever writes one.
//!
//! ```text
//!   importer ---- requests ----> event loop ----> the importer's thread: Session ----> mmu: import_page
//!            <--- replies ------------------------------'
//!     its line <--- invalidate ------------------ Hub <------- whoever takes pages away: reclaim, balloon, ..
//!              ---- ack ------------------------> Hub -------> the same
//! ```
//!
//! | file | its job |
//! |---|---|
//! | protocol | messages as bytes |
//! | hub | who can be reached, who has answered: the mmu's `External` |
//! | segments | the memory of each segment |
//! | session | what one importer has |
//! | fuzz | the same for fuzzers |
//!
//! Holds: INV-EXPORT-1, the event loop's thread waits for nobody, and does a bounded piece of work for an importer at a time.
//! INV-EXPORT-2, whoever breaks the protocol, floods, or does not read is parted with; nobody else notices.
//!
//! Limits: [`IMPORTERS_MAX`] connections, [`REQUESTS_MAX`] requests under way for each.

#[doc(hidden)]
pub mod fuzz;
mod hub;
pub mod protocol;
mod segments;
mod session;

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::process::PidfdFlags;
use umbra_mmu::Mmu;
use umbra_mmu::external::{Answers, External, ImporterId};

pub use hub::{Counts, Hub};
use protocol::{Code, MESSAGE_MAX, Reply, Request, VERSION};
pub use segments::Segments;
use session::Session;

use crate::socket::Listener;
use crate::vm::{Ending, add};

/// The most connections at once; more are turned away, unless one has not said hello.
pub const IMPORTERS_MAX: usize = 32;
/// Requests of one importer that wait to be served, at most.
pub const REQUESTS_MAX: usize = 16;
/// Messages of one importer that are read before the loop looks at others.
const READS_MAX: usize = 16;

/// What requests act on.
#[derive(Clone, Debug)]
pub struct Exporter {
    /// The guest's memory.
    pub mmu: Arc<Mmu>,
    /// Its segments.
    pub segments: Arc<Segments>,
    /// Its importers.
    pub hub: Arc<Hub>,
}

/// The socket and who has connected.
pub struct ExportSocket {
    path: Option<PathBuf>,
    listener: Listener,
    clients: Vec<Client>,
    workers: Vec<JoinHandle<()>>,
    exporter: Exporter,
    ending: Ending,
}

/// A connection. Its place is free again once the thread that serves it has ended.
struct Client {
    socket: Arc<OwnedFd>,
    /// Whoever has connected, if it can be known: from the first moment on, for its number may be another's once it has ended.
    process: Option<OwnedFd>,
    stage: Stage,
}

enum Stage {
    /// It has not said hello.
    New,
    /// It is this importer, and what it asks goes there.
    Welcome(ImporterId, SyncSender<(u64, Request)>),
}

/// Why a connection ends.
enum Parting {
    /// It has gone.
    Gone,
    /// It is told this first.
    Told(Code, String),
}

impl ExportSocket {
    /// Listens at `path`. A socket that nobody listens on any more is replaced; anything else there is left alone.
    ///
    /// # Errors
    ///
    /// When the path is taken or cannot be made.
    pub fn bind(path: &Path, exporter: Exporter, ending: Ending) -> io::Result<ExportSocket> {
        let listener = Listener::bind(path, SocketType::SEQPACKET)?;
        Ok(ExportSocket {
            path: Some(path.to_owned()),
            listener,
            clients: Vec::new(),
            workers: Vec::new(),
            exporter,
            ending,
        })
    }

    fn accept(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(socket) = self.listener.accept(fd, ops) else { return };
        let process = process_of(&socket);
        self.workers.retain(|worker| !worker.is_finished());
        let serving = self.workers.len();
        let new = self.clients.iter().filter(|client| matches!(client.stage, Stage::New)).count();
        if !is_same_user(&socket) {
            return say(
                &socket,
                0,
                &refused(Code::Rights, "importers are processes of the guest's own user"),
            );
        }
        if serving + new >= IMPORTERS_MAX && !self.make_room(ops) {
            let why = format!("{IMPORTERS_MAX} importers are connected, and there is no room for more");
            return say(&socket, 0, &refused(Code::Limit, &why));
        }
        let socket = Arc::new(socket);
        add(ops, Events::new(&*socket, EventSet::IN));
        self.clients.push(Client { socket, process, stage: Stage::New });
    }

    /// Parts with the connection that has said nothing for longest; false if there is none.
    fn make_room(&mut self, ops: &mut EventOps) -> bool {
        let silent = self.clients.iter().position(|client| matches!(client.stage, Stage::New));
        silent.map(|eldest| self.part(eldest, Parting::Gone, ops)).is_some()
    }

    fn serve(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(at) = self.clients.iter().position(|client| client.socket.as_raw_fd() == fd) else { return };
        for _ in 0..READS_MAX {
            let mut buffer = [0; MESSAGE_MAX + 1];
            let socket = Arc::clone(&self.clients[at].socket);
            match rustix::net::recv(&*socket, &mut buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
                Ok((0, _)) => return self.part(at, Parting::Gone, ops),
                Ok((_, length)) => {
                    let bytes = &buffer[..length.min(buffer.len())];
                    if let Err(parting) = self.hear(at, bytes) {
                        return self.part(at, parting, ops);
                    }
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                Err(_) => return self.part(at, Parting::Gone, ops),
            }
        }
    }

    /// A message of a connection.
    fn hear(&mut self, at: usize, bytes: &[u8]) -> Result<(), Parting> {
        let malformed = |why: &dyn std::fmt::Display| Parting::Told(Code::Malformed, why.to_string());
        let (tag, request) = Request::parse(bytes).map_err(|why| malformed(&why))?;
        match (&self.clients[at].stage, request) {
            (Stage::New, Request::Hello { least, most }) => self.welcome(at, tag, least..=most),
            (Stage::New, _) => Err(malformed(&"the first message is a hello")),
            (Stage::Welcome(..), Request::Hello { .. }) => Err(malformed(&"there is one hello")),
            (Stage::Welcome(..), Request::Ack { .. }) => {
                Err(malformed(&"acknowledgements go by the line that came with the welcome"))
            }
            (Stage::Welcome(_, requests), request) => match requests.try_send((tag, request)) {
                Ok(()) => Ok(()),
                Err(TrySendError::Full(_)) => {
                    let why = format!("an importer may have {REQUESTS_MAX} requests under way");
                    Err(Parting::Told(Code::Limit, why))
                }
                Err(TrySendError::Disconnected(_)) => Err(Parting::Gone),
            },
        }
    }

    /// Agrees on a version, and gives the importer a thread.
    fn welcome(
        &mut self,
        at: usize,
        tag: u64,
        versions: std::ops::RangeInclusive<u32>,
    ) -> Result<(), Parting> {
        if !versions.contains(&VERSION) {
            let why = format!(
                "this Umbra speaks version {VERSION}, and the importer {} to {}",
                versions.start(),
                versions.end()
            );
            return Err(Parting::Told(Code::Version, why));
        }
        let socket = Arc::clone(&self.clients[at].socket);
        let hub = &self.exporter.hub;
        let no_host = |error: io::Error| {
            Parting::Told(Code::Host, format!("the host has nothing left for it: {error}"))
        };
        let process = self.clients[at].process.take();
        let (importer, line) = hub.welcome(Arc::clone(&socket), process).map_err(no_host)?;
        let deadline_micros = u32::try_from(hub.deadline().as_micros()).unwrap_or(u32::MAX);
        let requests_max = REQUESTS_MAX as u32;
        let welcome =
            Reply::Welcome { version: VERSION, importer: importer.0, deadline_micros, requests_max };
        let (requests, served) = sync_channel(REQUESTS_MAX);
        let (exporter, ending) = (self.exporter.clone(), self.ending.clone());
        let work = move || ending.watch("importer", || serve_all(&exporter, importer, &served));
        // Whatever becomes of it now, it is parted with as an importer.
        self.clients[at].stage = Stage::Welcome(importer, requests);
        let worker = std::thread::Builder::new().name(format!("importer {}", importer.0)).spawn(work);
        self.workers.push(worker.map_err(no_host)?);
        send_with(&socket, &welcome.encode(tag), &line).map(drop).map_err(|_| Parting::Gone)
    }

    /// Ends a connection. What its importer had is taken back by its thread, which ends for want of requests.
    fn part(&mut self, at: usize, parting: Parting, ops: &mut EventOps) {
        let client = self.clients.remove(at);
        let _ = ops.remove(Events::empty(&*client.socket));
        if let Parting::Told(code, why) = &parting {
            say(&client.socket, 0, &refused(*code, why));
        }
        match client.stage {
            Stage::New => drop(rustix::net::shutdown(&*client.socket, rustix::net::Shutdown::Both)),
            Stage::Welcome(importer, _) => {
                self.exporter.segments.leave(importer);
                self.exporter.hub.part(importer);
            }
        }
    }
}

/// The end of the run: nobody is waited for any more, and everything is taken back.
impl Drop for ExportSocket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
        self.exporter.segments.retire();
        self.exporter.hub.close();
        self.clients.clear();
        for worker in self.workers.drain(..) {
            // A panic has been noted as the end of the run.
            let _ = worker.join();
        }
    }
}

impl MutEventSubscriber for ExportSocket {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.fd() {
            fd if self.listener.is_of(fd) => self.accept(fd, ops),
            fd => self.serve(fd, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.listener.watch(ops);
    }
}

/// A socket that each end of [`External`] can be had from.
#[derive(Debug)]
pub struct ByHub(pub Arc<Hub>);

impl External for ByHub {
    fn tell(&self, order: u64, importer: ImporterId, pages: &[umbra_mmu::Gfn]) {
        self.0.tell(order, importer, pages);
    }

    fn wait(&self, order: u64) -> Answers {
        self.0.wait(order)
    }
}

/// An importer's thread: serves its requests until there are no more.
fn serve_all(exporter: &Exporter, importer: ImporterId, requests: &Receiver<(u64, Request)>) {
    let Exporter { mmu, segments, hub } = exporter;
    let mut session = Session::new(importer, Arc::clone(mmu), Arc::clone(segments));
    for (tag, request) in requests {
        // One that has gone wants no answer; what it left undone is not worth the work.
        let Some(socket) = hub.socket(importer) else { continue };
        let (reply, descriptor) = session.serve(request);
        let sent = match descriptor {
            None => hub.send(importer, &reply.encode(tag)),
            Some(descriptor) => send_with(&socket, &reply.encode(tag), &descriptor).is_ok(),
        };
        if !sent {
            hub.part(importer);
        }
    }
}

/// Sends a message with a descriptor.
pub(crate) fn send_with(socket: &OwnedFd, message: &[u8], descriptor: &OwnedFd) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, &[io::IoSlice::new(message)], &mut control, flags)
}

fn refused(code: Code, why: &str) -> Reply {
    Reply::Refused { code, why: why.to_owned() }
}

/// Says it, if there is room.
fn say(socket: &OwnedFd, tag: u64, reply: &Reply) {
    let _ = rustix::net::send(socket, &reply.encode(tag), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

fn is_same_user(socket: &OwnedFd) -> bool {
    let own = rustix::process::geteuid();
    rustix::net::sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == own)
}

/// The process at the other end, if it can be known.
fn process_of(socket: &OwnedFd) -> Option<OwnedFd> {
    let peer = rustix::net::sockopt::socket_peercred(socket).ok()?;
    rustix::process::pidfd_open(peer.pid, PidfdFlags::empty()).ok()
}

/// A connection to the export socket at `path`.
///
/// # Errors
///
/// What the host says.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

/// The next message at an importer's end of a connection: its tag, what it says, and the descriptor that came with it; `None` at the
/// end. Sleeps until there is one.
///
/// # Errors
///
/// What the host says, or that it is no message.
pub fn receive(socket: &OwnedFd) -> io::Result<Option<(u64, Reply, Option<OwnedFd>)>> {
    let mut buffer = [0; MESSAGE_MAX + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        let mut into = [io::IoSliceMut::new(&mut buffer)];
        match rustix::net::recvmsg(socket, &mut into, &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut descriptor = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.last();
        }
    }
    let (tag, reply) =
        Reply::parse(&buffer[..received.bytes]).map_err(|why| io::Error::other(why.to_string()))?;
    Ok(Some((tag, reply, descriptor)))
}
