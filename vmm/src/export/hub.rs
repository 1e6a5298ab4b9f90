//! Whom the exporter can reach, who has been told, and who has answered.
//!
//! Story: whoever takes pages away tells importers by [`External::tell`], from its own thread, without a wait; the event loop
//! hears their answers ([`Hub::ack`]) and their ends ([`Hub::part`]), and [`External::wait`] returns when nobody is left who could
//! answer in time. What happens then to those who have not is [`ExportPolicy`]'s: the page is gone from them either way.
//!
//! Holds: INV-HUB-1, who parts has answered everything. INV-HUB-2, nobody waits beyond the deadline of the last who was told.
//! INV-HUB-3, a message that finds no room parts its importer: nobody here waits for a reader.
//!
//! Locks: one, a leaf, held for look-ups; no message is sent with it held.
//!
//! Limits: [`UNANSWERED_MAX`] unanswered messages for each importer.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, Shutdown};
use rustix::process::Signal;
use umbra_mmu::Gfn;
use umbra_mmu::external::{Answers, External, ImporterId};

use super::protocol::Reply;
use crate::cli::ExportPolicy;

/// Messages that an importer may leave unanswered, before it is taken for one that never will.
pub const UNANSWERED_MAX: usize = 256;

/// An importer that has been welcomed.
#[derive(Debug)]
struct Peer {
    socket: Arc<OwnedFd>,
    /// Its process, if it is known.
    process: Option<OwnedFd>,
    /// What it has been told and has not answered, in time or late.
    unanswered: VecDeque<u64>,
}

/// Who is waited for, of those told at one order.
#[derive(Debug, Default)]
struct Round {
    waiting: Vec<(ImporterId, Instant)>,
    answers: Answers,
}

#[derive(Debug, Default)]
struct State {
    peers: BTreeMap<ImporterId, Peer>,
    rounds: BTreeMap<u64, Round>,
    /// The last number given out.
    last: u32,
    counts: Counts,
}

/// What has become of importers so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Welcomed.
    pub welcomed: u64,
    /// Messages to give pages up.
    pub told: u64,
    /// Those that were not answered in time.
    pub late: u64,
    /// Importers that were parted with for it.
    pub dropped: u64,
    /// And killed.
    pub killed: u64,
}

/// All importers.
#[derive(Debug)]
pub struct Hub {
    state: Mutex<State>,
    answered: Condvar,
    deadline: Duration,
    policy: ExportPolicy,
    /// Each is awaited before the next one is told.
    in_turn: bool,
}

/// An importer said that it had given up what it was not asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAsked;

impl Hub {
    /// One that gives importers so long to answer.
    pub fn new(deadline: Duration, policy: ExportPolicy) -> Arc<Hub> {
        Arc::new(Hub { state: Mutex::default(), answered: Condvar::new(), deadline, policy, in_turn: false })
    }

    /// The same, where each importer is awaited before the next is told: only to see what that would cost.
    pub fn new_in_turn(deadline: Duration, policy: ExportPolicy) -> Arc<Hub> {
        let (state, answered) = (Mutex::default(), Condvar::new());
        Arc::new(Hub { state, answered, deadline, policy, in_turn: true })
    }

    /// How long importers have to answer.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Welcomes an importer: its number.
    pub fn welcome(&self, socket: Arc<OwnedFd>, process: Option<OwnedFd>) -> ImporterId {
        let mut state = self.state();
        state.last += 1;
        let importer = ImporterId(state.last);
        state.counts.welcomed += 1;
        state.peers.insert(importer, Peer { socket, process, unanswered: VecDeque::new() });
        importer
    }

    /// Sends a message; where there is no room for it the importer is parted with. False if it was, or has gone.
    pub fn send(&self, importer: ImporterId, message: &[u8]) -> bool {
        let socket = self.state().peers.get(&importer).map(|peer| Arc::clone(&peer.socket));
        socket.is_some_and(|socket| {
            let sent = rustix::net::send(&*socket, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            sent.map_err(|_| self.part(importer)).is_ok()
        })
    }

    /// The importer's socket, while it is here.
    pub fn socket(&self, importer: ImporterId) -> Option<Arc<OwnedFd>> {
        self.state().peers.get(&importer).map(|peer| Arc::clone(&peer.socket))
    }

    /// An importer has answered.
    ///
    /// # Errors
    ///
    /// When it was not asked, or has answered already.
    pub fn ack(&self, importer: ImporterId, order: u64) -> Result<(), NotAsked> {
        let mut state = self.state();
        let peer = state.peers.get_mut(&importer).ok_or(NotAsked)?;
        let at = peer.unanswered.iter().position(|asked| *asked == order).ok_or(NotAsked)?;
        peer.unanswered.remove(at);
        state.answer(order, importer);
        drop(state);
        self.answered.notify_all();
        Ok(())
    }

    /// An importer is gone, or is to go: it has answered everything, and nothing more is sent to it.
    pub fn part(&self, importer: ImporterId) {
        let mut state = self.state();
        let Some(peer) = state.peers.remove(&importer) else { return };
        peer.unanswered.iter().for_each(|order| state.answer(*order, importer));
        drop(state);
        self.answered.notify_all();
        // The event loop sees it, and so does the importer.
        let _ = rustix::net::shutdown(&*peer.socket, Shutdown::Both);
    }

    /// Parts with everybody.
    pub fn close(&self) {
        let all: Vec<ImporterId> = self.state().peers.keys().copied().collect();
        all.into_iter().for_each(|importer| self.part(importer));
    }

    /// What has become of importers so far.
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// How many are here.
    pub fn importers(&self) -> usize {
        self.state().peers.len()
    }

    /// What is done about an importer that is late. Its pages are taken from it in any case.
    fn punish(&self, importer: ImporterId) {
        let mut state = self.state();
        let Some(peer) = state.peers.get(&importer) else { return };
        if self.policy == ExportPolicy::Keep && peer.unanswered.len() <= UNANSWERED_MAX {
            return;
        }
        state.counts.dropped += 1;
        if self.policy == ExportPolicy::Kill {
            let process = state.peers.get_mut(&importer).and_then(|peer| peer.process.take());
            let killed = process.map(|process| rustix::process::pidfd_send_signal(&process, Signal::KILL));
            state.counts.killed += u64::from(matches!(killed, Some(Ok(()))));
            if !matches!(killed, Some(Ok(()))) {
                log::warn!("--export-policy kill: importer {} cannot be killed, and is dropped", importer.0);
            }
        }
        drop(state);
        log::info!("importer {} has not answered in {:?}, and is parted with", importer.0, self.deadline);
        self.part(importer);
    }

    /// Returns when nobody of those told at `order` so far is left who could answer in time.
    fn await_all(&self, order: u64) {
        loop {
            let state = self.state();
            let next =
                state.rounds.get(&order).and_then(|round| round.waiting.iter().map(|(_, at)| *at).min());
            let Some(next) = next else { return };
            let left = next.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                drop(self.answered.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner));
                continue;
            }
            drop(state);
            let late = self.take_late(order, Instant::now());
            late.into_iter().for_each(|importer| self.punish(importer));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes those off a round whose time is over at `now`.
    fn take_late(&self, order: u64, now: Instant) -> Vec<ImporterId> {
        let mut state = self.state();
        let Some(round) = state.rounds.get_mut(&order) else { return Vec::new() };
        let (late, waiting): (Vec<_>, Vec<_>) = round.waiting.iter().partition(|(_, until)| *until <= now);
        round.waiting = waiting;
        round.answers.late += late.len() as u32;
        let late: Vec<ImporterId> = late.into_iter().map(|(importer, _)| importer).collect();
        round.answers.slowest = late.last().copied().or(round.answers.slowest);
        state.counts.late += late.len() as u64;
        late
    }
}

impl State {
    /// Counts an answer, if it is waited for.
    fn answer(&mut self, order: u64, importer: ImporterId) {
        let Some(round) = self.rounds.get_mut(&order) else { return };
        let before = round.waiting.len();
        round.waiting.retain(|(other, _)| *other != importer);
        if round.waiting.len() < before {
            round.answers.slowest = Some(importer);
        }
    }
}

impl External for Hub {
    fn tell(&self, order: u64, importer: ImporterId, pages: &[Gfn]) {
        let mut state = self.state();
        let Some(peer) = state.peers.get_mut(&importer) else { return };
        peer.unanswered.push_back(order);
        state.counts.told += 1;
        let until = Instant::now() + self.deadline;
        state.rounds.entry(order).or_default().waiting.push((importer, until));
        drop(state);
        let pages = pages.iter().map(|gfn| gfn.0).collect();
        self.send(importer, &Reply::Invalidate { order, pages }.encode(0));
        if self.in_turn {
            self.await_all(order);
        }
    }

    fn wait(&self, order: u64) -> Answers {
        self.await_all(order);
        self.state().rounds.remove(&order).map(|round| round.answers).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (Arc<OwnedFd>, OwnedFd) {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("sockets");
        (Arc::new(ours), theirs)
    }

    fn hub(policy: ExportPolicy) -> Arc<Hub> {
        Hub::new(Duration::from_millis(20), policy)
    }

    #[test]
    fn whoever_is_told_is_waited_for_until_it_answers() {
        let hub = Hub::new(Duration::from_secs(60), ExportPolicy::Keep);
        let (ours, theirs) = pair();
        let importer = hub.welcome(ours, None);
        hub.tell(5, importer, &[Gfn(7), Gfn(9)]);
        let mut buffer = [0; 64];
        let (read, _) = rustix::net::recv(&theirs, &mut buffer, RecvFlags::empty()).expect("a message");
        let told = Reply::parse(&buffer[..read]);
        assert_eq!(told, Ok((0, Reply::Invalidate { order: 5, pages: vec![7, 9] })));
        assert_eq!(hub.ack(importer, 6), Err(NotAsked));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| hub.wait(5));
            assert_eq!(hub.ack(importer, 5), Ok(()));
            let answers = waits.join().expect("no panic");
            assert_eq!(answers, Answers { slowest: Some(importer), late: 0 });
        });
        assert_eq!(hub.ack(importer, 5), Err(NotAsked), "once");
        assert_eq!(hub.wait(5), Answers::default(), "nobody is left to wait for");
    }

    #[test]
    fn in_turn_each_is_awaited_before_the_next_is_told() {
        let hub = Hub::new_in_turn(Duration::from_secs(60), ExportPolicy::Keep);
        let pairs = [pair(), pair()];
        let importers = pairs.each_ref().map(|(ours, _)| hub.welcome(Arc::clone(ours), None));
        let is_told = |theirs: &OwnedFd, flags| rustix::net::recv(theirs, &mut [0; 64], flags).is_ok();
        std::thread::scope(|scope| {
            let tells = scope.spawn(|| importers.iter().for_each(|one| hub.tell(5, *one, &[Gfn(7)])));
            for (importer, (_, theirs)) in importers.iter().zip(&pairs) {
                assert!(is_told(theirs, RecvFlags::empty()));
                assert!(pairs.iter().all(|(_, other)| !is_told(other, RecvFlags::DONTWAIT)), "one at a time");
                assert_eq!(hub.ack(*importer, 5), Ok(()));
            }
            tells.join().expect("no panic");
        });
        assert_eq!(hub.wait(5), Answers { slowest: Some(importers[1]), late: 0 });
    }

    #[test]
    fn who_has_gone_has_answered() {
        let hub = Hub::new(Duration::from_secs(60), ExportPolicy::Keep);
        let (ours, _theirs) = pair();
        let importer = hub.welcome(ours, None);
        hub.tell(5, importer, &[Gfn(7)]);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| hub.wait(5));
            hub.part(importer);
            assert_eq!(waits.join().expect("no panic").late, 0);
        });
        hub.tell(6, importer, &[Gfn(7)]);
        assert_eq!((hub.wait(6), hub.importers()), (Answers::default(), 0));
    }

    #[test]
    fn who_is_late_is_dealt_with_by_the_policy() {
        for (policy, stays) in [(ExportPolicy::Keep, 1), (ExportPolicy::Drop, 0), (ExportPolicy::Kill, 0)] {
            let hub = hub(policy);
            let (ours, _theirs) = pair();
            let importer = hub.welcome(ours, None);
            hub.tell(5, importer, &[Gfn(7)]);
            assert_eq!(hub.wait(5), Answers { slowest: Some(importer), late: 1 }, "{policy:?}");
            assert_eq!(hub.importers(), stays, "{policy:?}");
            if stays == 1 {
                assert_eq!(hub.ack(importer, 5), Ok(()), "late, and no harm");
            }
        }
    }

    #[test]
    fn who_does_not_read_is_parted_with_and_nobody_waits() {
        let hub = Hub::new(Duration::from_secs(600), ExportPolicy::Keep);
        let (ours, _theirs) = pair();
        let importer = hub.welcome(ours, None);
        let pages = [Gfn(7); 512];
        let full = (0..10_000).find(|order| {
            hub.tell(*order, importer, &pages);
            hub.importers() == 0
        });
        assert_eq!(hub.wait(full.expect("a socket has no room for so much")).late, 0);
    }
}
