//! The control socket: QMP, as QEMU speaks it.
//!
//! Story: a subscriber of the event loop. It greets each client, cuts what it sends into commands (`input`), answers them
//! (`session`, by the table in `commands`) in the protocol's shape, and passes on events (`news`). What may take long is done on a
//! thread of its own, which leaves its answer with the news.
//!
//! ```text
//! client --bytes--> Input --objects--> Session --AtOnce--> answer --> Output --bytes--> client
//!                                         |                             ^
//!                                         +--Apart--> thread --> News --+
//!                                              vCPU, balloon, end --^
//! ```
//!
//! Holds: a client that is slow, silent or hostile costs its own connection. Reads and writes never block; a client
//! that does not read its answers is dropped, and of events that it leaves unread it hears the latest. One that says nothing
//! costs nothing: where there is no room, the eldest that has not negotiated makes some. Each client has one command done
//! apart at most, and one that goes keeps its place until that is done. The loop's thread waits for nobody.
//!
//! Limits: [`CLIENTS_MAX`] clients, and so as many commands at once that are done apart; [`FAREWELL`] at the end for clients to
//! take what is theirs.
//!
//! See: QEMU, docs/interop/qmp-spec.rst.

mod balloon;
mod commands;
pub mod fuzz;
mod input;
mod memory;
mod news;
mod protocol;
mod session;

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicI32;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::net::SocketType;
use serde_json::Value;
use umbra_mmu::Mmu;
use vmm_sys_util::timerfd::TimerFd;

pub use balloon::BalloonControl;
pub use commands::ANSWER_WAIT;
pub use memory::WORK_MAX;
pub use news::News;
pub use session::OUTPUT_MAX;

use crate::export::Exporter;
use crate::machine::Pool;
use crate::socket::Listener;

use super::devices::Devices;
use super::ending::Ending;
use super::events::add;
use super::requests::Requests;
use super::stops::Stops;
use news::{Item, Throttle};
use protocol::{Refusal, reply};
use session::{Next, Session, Work};

/// The most clients at once; more are turned away, unless one has not negotiated.
pub const CLIENTS_MAX: usize = 8;
/// How long the end of the run waits for clients to take what is theirs, for all of them together.
pub const FAREWELL: Duration = Duration::from_millis(250);
/// Output is passed on when so much of it is there, or no more to come.
const OUTPUT_PIECE: usize = 32 << 10;

/// What commands act on.
pub struct Controls {
    /// Where an end is noted.
    pub ending: Ending,
    /// Questions to the vCPU.
    pub requests: Arc<Requests>,
    /// To wake it.
    pub devices: Arc<Devices>,
    /// The guest's memory.
    pub mmu: Arc<Mmu>,
    /// Whether the guest is to run.
    pub stops: Arc<Stops>,
    /// What the clients are to hear.
    pub news: Arc<News>,
    /// The guest's balloon, if it has one.
    pub balloon: Option<Arc<dyn BalloonControl>>,
    /// The guest's name.
    pub name: Option<String>,
    /// The threads of its vCPUs, as the kernel counts them; 0 where one has not begun yet.
    pub threads: Arc<[AtomicI32]>,
    /// The guest has swap, and so its budget may be cut.
    pub swap: bool,
    /// That swap is memory of Umbra's own.
    pub swap_in_memory: bool,
    /// What the host is asked about, where the guest's frames are of it.
    pub pool: Option<Arc<Pool>>,
    /// How long the vCPU may take to answer.
    pub answer_wait: Duration,
    /// Whoever imports guest memory, where it is exported.
    pub exporter: Option<Exporter>,
}

/// The socket and its clients.
pub struct ControlSocket {
    path: PathBuf,
    listener: Listener,
    clients: Vec<Client>,
    /// The number of the next one.
    next: u64,
    jobs: Vec<JoinHandle<()>>,
    throttle: Throttle,
    timer: TimerFd,
    controls: Arc<Controls>,
}

struct Client {
    stream: UnixStream,
    session: Session,
    number: u64,
    /// It has sent all that it will.
    closing: bool,
    /// It cannot be reached any more.
    gone: bool,
    /// Nothing is heard from it or told to it any more. It keeps its place while a command of its is being done.
    parted: bool,
    /// What the loop looks for.
    interest: EventSet,
}

impl ControlSocket {
    /// Listens at `path`. A socket that nobody listens on any more is replaced; anything else there is left alone.
    ///
    /// # Errors
    ///
    /// When the path is taken or cannot be made.
    pub fn bind(path: &Path, controls: Controls) -> io::Result<ControlSocket> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        controls.news.open()?;
        let listener = Listener::bind(path, SocketType::STREAM)?;
        controls.requests.open();
        Ok(ControlSocket {
            path: path.to_owned(),
            listener,
            clients: Vec::new(),
            next: 0,
            jobs: Vec::new(),
            throttle: Throttle::default(),
            timer,
            controls: Arc::new(controls),
        })
    }

    fn accept(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(stream) = self.listener.accept(fd, ops).map(UnixStream::from) else { return };
        if self.clients.len() >= CLIENTS_MAX && !self.make_room(ops) {
            return turn_away(stream);
        }
        add(ops, Events::new(&stream, EventSet::IN));
        let (session, interest) = (Session::new(), EventSet::IN);
        self.clients.push(Client {
            stream,
            session,
            number: self.next,
            closing: false,
            gone: false,
            parted: false,
            interest,
        });
        self.next += 1;
        self.go_on(self.clients.len() - 1, ops);
    }

    /// Parts with the client that has been silent for longest: true if there was one that has not negotiated.
    fn make_room(&mut self, ops: &mut EventOps) -> bool {
        let silent = (0..self.clients.len()).filter(|at| !self.clients[*at].session.is_negotiated());
        let Some(eldest) = silent.min_by_key(|at| self.clients[*at].number) else { return false };
        let client = self.clients.swap_remove(eldest);
        let _ = ops.remove(Events::empty(&client.stream));
        true
    }

    fn serve(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        // Of an event that was on its way when its client went: nothing is left to do.
        let here = |client: &Client| client.stream.as_raw_fd() == fd && !client.parted;
        let Some(at) = self.clients.iter().position(here) else { return };
        self.clients[at].heed(events.event_set());
        self.go_on(at, ops);
    }

    /// Passes on what there is to hear.
    fn hear(&mut self, ops: &mut EventOps) {
        self.take_news();
        // From the last on: who goes is replaced by one that was seen to.
        (0..self.clients.len()).rev().for_each(|at| self.go_on(at, ops));
    }

    fn take_news(&mut self) {
        for item in self.controls.news.take() {
            match item {
                Item::Event(event) => self.tell(&event),
                Item::Frequent(event) => match self.throttle.offer(event, Instant::now()) {
                    Ok(event) => self.tell(&event),
                    Err(wait) => self.set_timer(wait),
                },
                Item::Reply(number, reply) => {
                    // Whoever asked may have gone.
                    if let Some(client) = self.clients.iter_mut().find(|client| client.number == number) {
                        client.session.finish(&reply);
                    }
                }
            }
        }
    }

    fn tell(&mut self, event: &Value) {
        self.clients.iter_mut().for_each(|client| client.session.tell(event));
    }

    fn set_timer(&mut self, wait: Duration) {
        if let Err(error) = self.timer.reset(wait, None) {
            log::warn!("an event is late: {error}");
        }
    }

    /// The time of what was held back has come.
    fn release(&mut self, ops: &mut EventOps) {
        // Only to silence it.
        let _ = self.timer.wait();
        if let Some(event) = self.throttle.take(Instant::now()) {
            self.tell(&event);
        }
        self.hear(ops);
    }

    /// Answers what a client has asked, passes on what it is to have, and sees whether it stays.
    fn go_on(&mut self, at: usize, ops: &mut EventOps) {
        while !self.clients[at].parted {
            let client = &mut self.clients[at];
            if client.session.output().len() >= OUTPUT_PIECE && !client.flush() {
                break;
            }
            match client.session.advance(&self.controls) {
                Next::Nothing => break,
                Next::Answered => {}
                Next::Apart(work) => {
                    let number = client.number;
                    if let Err(reply) = self.start(number, work) {
                        self.clients[at].session.finish(&reply);
                    }
                }
            }
        }
        let client = &mut self.clients[at];
        if client.flush() && client.stays() {
            return client.look_for_more(ops);
        }
        client.part_with(ops);
        if !client.session.is_busy() {
            self.clients.swap_remove(at);
        }
    }

    /// Has `work` done on a thread of its own. Its reply, where that cannot be.
    fn start(&mut self, number: u64, work: Work) -> Result<(), Value> {
        self.jobs.retain(|job| !job.is_finished());
        let controls = Arc::clone(&self.controls);
        let (hand_over, taken) = std::sync::mpsc::channel::<Work>();
        let job = move || {
            controls.ending.watch("control", || {
                if let Ok(work) = taken.recv() {
                    controls.news.reply(number, work.run(&controls));
                }
            });
        };
        match std::thread::Builder::new().name("control".into()).spawn(job) {
            Ok(job) => {
                self.jobs.push(job);
                hand_over.send(work).map_err(|unsent| unsent.0.refuse("its thread has ended"))
            }
            Err(error) => Err(work.refuse(&format!("the host has no thread for it: {error}"))),
        }
    }
}

/// The end of the run: whatever has been said is passed on, as far as clients take it.
impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        for job in self.jobs.drain(..) {
            // A panic has been noted as the end of the run.
            let _ = job.join();
        }
        self.take_news();
        let deadline = Instant::now() + FAREWELL;
        self.clients.iter_mut().for_each(|client| client.part(deadline));
    }
}

impl MutEventSubscriber for ControlSocket {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.fd() {
            fd if self.listener.is_of(fd) => self.accept(fd, ops),
            fd if fd == self.timer.as_raw_fd() => self.release(ops),
            fd if Some(fd) == self.controls.news.bell() => self.hear(ops),
            _ => self.serve(events, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let bell: Option<RawFd> = self.controls.news.bell();
        self.listener.watch(ops);
        for fd in [Some(self.timer.as_raw_fd()), bell].into_iter().flatten() {
            add(ops, Events::new_raw(fd, EventSet::IN));
        }
    }
}

impl Client {
    /// What the loop has seen of its socket.
    fn heed(&mut self, seen: EventSet) {
        if self.interest.contains(EventSet::IN) {
            if seen.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
                self.read();
            }
        } else if seen.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            // Nobody is there for what it has asked.
            self.gone = true;
        }
    }

    fn read(&mut self) {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.closing = true,
            Ok(count) => self.session.feed(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.gone = true,
        }
    }

    /// Passes on what the client takes; false when it is to be dropped.
    fn flush(&mut self) -> bool {
        self.gone |= self.session.output().flush(&mut self.stream).is_err();
        !self.gone && !self.parted && self.session.output().len() <= OUTPUT_MAX
    }

    /// Has it know that nothing more comes.
    fn part_with(&mut self, ops: &mut EventOps) {
        if !std::mem::replace(&mut self.parted, true) {
            let _ = ops.remove(Events::empty(&self.stream));
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// There is something left to be done for it.
    fn stays(&mut self) -> bool {
        let last_words = self.session.is_busy() || !self.session.output().is_empty();
        last_words || !(self.closing || self.session.is_dismissed())
    }

    fn look_for_more(&mut self, ops: &mut EventOps) {
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, !(self.session.is_busy() || self.closing || self.session.is_dismissed()));
        interest.set(EventSet::OUT, !self.session.output().is_empty());
        if interest == self.interest {
            return;
        }
        self.interest = interest;
        if let Err(error) = ops.modify(Events::new(&self.stream, interest)) {
            log::error!("watching a client of the control socket: {error}");
        }
    }

    /// Waits until the client has taken everything, but not beyond `deadline`.
    fn part(&mut self, deadline: Instant) {
        while !self.session.output().is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let waits = !left.is_zero()
                && self.stream.set_nonblocking(false).is_ok()
                && self.stream.set_write_timeout(Some(left)).is_ok();
            let before = self.session.output().len();
            let failed = self.session.output().flush(&mut self.stream).is_err();
            if !waits || failed || self.session.output().len() == before {
                return;
            }
        }
    }
}

/// Says why to a client that there is no room for.
fn turn_away(mut stream: UnixStream) {
    let why = format!("{CLIENTS_MAX} clients are connected, and there is no room for more; try again later");
    let _ = stream.write_all(format!("{}\r\n", reply(Err(Refusal::generic(why)), None)).as_bytes());
}

#[cfg(test)]
mod tests;
