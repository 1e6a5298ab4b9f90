//! Whom the exporter can reach, who has been told, and who has answered.
//!
//! Story: whoever takes pages away tells importers by [`External::tell`], from its own thread, without a wait. Each importer has
//! a line for this and for its answers, a socket of its own, so that who waits in [`External::wait`] hears the answers itself:
//! another thread between them would double the time. Who waits alone listens to the last that it has told, and looks at the
//! others once that has answered: most have by then, and it has been woken once for all. Of several that wait one listens, to all
//! lines, and the next when it goes; each looks at those that it has told before it sleeps, and again before it says that one is
//! late. The event loop sees importers' ends ([`Hub::part`]). A wait is over when nobody is left who could answer in time; what
//! happens then to those who have not is [`ExportPolicy`]'s: the page is gone from them either way.
//!
//! Holds: INV-HUB-1, who parts has answered everything. INV-HUB-2, nobody waits beyond the deadline of the last who was told.
//! INV-HUB-3, a message that finds no room parts its importer: nobody here waits for a reader. INV-HUB-4, while anybody waits one
//! of them listens, or is about to look whether it must; while several do, it listens to all.
//!
//! Locks: one, a leaf, held for look-ups; no message is sent or waited for with it held.
//!
//! Limits: [`UNANSWERED_MAX`] unanswered messages for each importer. What comes on a line while nobody waits stays there.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType};
use rustix::process::Signal;
use umbra_mmu::Gfn;
use umbra_mmu::external::{Answers, External, ImporterId};

use super::protocol::{Code, Reply, Request};
use super::refused;
use crate::cli::ExportPolicy;

/// Messages that an importer may leave unanswered, before it is taken for one that never will.
pub const UNANSWERED_MAX: usize = 256;

/// An importer that has been welcomed.
#[derive(Debug)]
struct Peer {
    socket: Arc<OwnedFd>,
    /// What it is told by, and answers.
    line: Arc<OwnedFd>,
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

/// What an importer is told by, and answers.
type Line = (ImporterId, Arc<OwnedFd>);

/// What whoever hears the lines does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Listening {
    /// Nobody does.
    #[default]
    Nobody,
    /// It listens to one line, and does not hear the others before it is called.
    One,
    /// It listens to all lines.
    All,
}

#[derive(Debug, Default)]
struct State {
    peers: BTreeMap<ImporterId, Peer>,
    rounds: BTreeMap<u64, Round>,
    listening: Listening,
    /// So many wait, whoever listens among them.
    waiters: u32,
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
    /// What those sleep on who wait and do not listen.
    answered: Condvar,
    /// Calls the one that listens.
    call: OwnedFd,
    deadline: Duration,
    policy: ExportPolicy,
    /// Each is awaited before the next one is told.
    in_turn: bool,
}

/// An importer said that it had given up what it was not asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NotAsked;

impl Hub {
    /// One that gives importers so long to answer. `in_turn`: each is awaited before the next is told, only to see what that
    /// would cost.
    ///
    /// # Errors
    ///
    /// When the host has no descriptors for it.
    pub fn new(deadline: Duration, policy: ExportPolicy, in_turn: bool) -> io::Result<Arc<Hub>> {
        let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (state, answered) = (Mutex::default(), Condvar::new());
        Ok(Arc::new(Hub { state, answered, call, deadline, policy, in_turn }))
    }

    /// How long importers have to answer.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Welcomes an importer: its number, and its end of the line.
    ///
    /// # Errors
    ///
    /// When the host has no descriptors for it.
    pub fn welcome(
        &self,
        socket: Arc<OwnedFd>,
        process: Option<OwnedFd>,
    ) -> io::Result<(ImporterId, OwnedFd)> {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (line, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
        let mut state = self.state();
        state.last += 1;
        let importer = ImporterId(state.last);
        state.counts.welcomed += 1;
        let peer = Peer { socket, line: Arc::new(line), process, unanswered: VecDeque::new() };
        state.peers.insert(importer, peer);
        let listening = state.listening;
        drop(state);
        if listening == Listening::All {
            self.call_listener();
        }
        Ok((importer, theirs))
    }

    /// Sends a message; where there is no room for it the importer is parted with. False if it was, or has gone.
    pub fn send(&self, importer: ImporterId, message: &[u8]) -> bool {
        let socket = self.socket(importer);
        socket.is_some_and(|socket| self.send_by(&socket, importer, message))
    }

    /// The same, by one of its two sockets.
    fn send_by(&self, socket: &OwnedFd, importer: ImporterId, message: &[u8]) -> bool {
        let sent = rustix::net::send(socket, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        sent.map_err(|_| self.part(importer)).is_ok()
    }

    /// The importer's socket, while it is here.
    pub fn socket(&self, importer: ImporterId) -> Option<Arc<OwnedFd>> {
        self.state().peers.get(&importer).map(|peer| Arc::clone(&peer.socket))
    }

    /// Hears what has come by the lines.
    pub(super) fn hear_all(&self) {
        let all: Vec<ImporterId> = self.state().peers.keys().copied().collect();
        for importer in all {
            self.hear(importer);
        }
    }

    /// Returns when something has come by one of these lines, with those by which it has; when the one that listens is called; or
    /// after this time.
    fn listen(&self, lines: &[Line], time: Duration) -> Vec<ImporterId> {
        let descriptors = lines.iter().map(|(_, line)| line.as_fd()).chain([self.call.as_fd()]);
        let mut polled: Vec<PollFd<'_>> =
            descriptors.map(|of| PollFd::from_borrowed_fd(of, PollFlags::IN)).collect();
        let time = Timespec::try_from(time).ok();
        // Interrupted: whoever waits comes again.
        let ready = poll(&mut polled, time.as_ref()).unwrap_or(0);
        if ready == 0 {
            return Vec::new();
        }
        let has_come = |polled: &PollFd<'_>| !polled.revents().is_empty();
        if polled.last().is_some_and(has_come) {
            let _ = rustix::io::read(&self.call, &mut [0; 8]);
        }
        let ready = lines.iter().zip(&polled).filter(|(_, polled)| has_come(polled));
        ready.map(|((importer, _), _)| *importer).collect()
    }

    /// What has come by an importer's line; true if anything has. Who says what it was not asked for is parted with, and so there is
    /// an end to it.
    fn hear(&self, importer: ImporterId) -> bool {
        (0..).take_while(|_| self.hear_one(importer)).count() > 0
    }

    /// A message of an importer's line, if there is one.
    fn hear_one(&self, importer: ImporterId) -> bool {
        let line = self.state().peers.get(&importer).map(|peer| Arc::clone(&peer.line));
        let Some(line) = line else { return false };
        let mut buffer = [0; Request::ACK_BYTES + 1];
        let why = match rustix::net::recv(&*line, &mut buffer, RecvFlags::DONTWAIT) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return false,
            Ok((0, _)) | Err(_) => {
                self.part(importer);
                return true;
            }
            Ok((read, _)) => match Request::parse(&buffer[..read]) {
                Ok((_, Request::Ack { order })) => match self.ack(importer, order) {
                    Ok(()) => return true,
                    Err(NotAsked) => "what was given up had not been asked for, or twice".to_owned(),
                },
                Ok(_) => "the line is for acknowledgements, and nothing else".to_owned(),
                Err(why) => why.to_string(),
            },
        };
        self.send(importer, &refused(Code::Malformed, &why).encode(0));
        self.part(importer);
        true
    }

    /// An importer has answered. Who waits looks by itself.
    fn ack(&self, importer: ImporterId, order: u64) -> Result<(), NotAsked> {
        let mut state = self.state();
        let peer = state.peers.get_mut(&importer).ok_or(NotAsked)?;
        let at = peer.unanswered.iter().position(|asked| *asked == order).ok_or(NotAsked)?;
        peer.unanswered.remove(at);
        state.answer(order, importer);
        Ok(())
    }

    /// An importer is gone, or is to go: it has answered everything, and nothing more is sent to it.
    pub fn part(&self, importer: ImporterId) {
        let sockets = |peer: &Peer| [Arc::clone(&peer.line), Arc::clone(&peer.socket)];
        let Some(sockets) = self.state().peers.get(&importer).map(sockets) else { return };
        // Before it is told no more: it must not take silence for leave. Who listens sees it, and so does the event loop.
        for socket in sockets {
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
        let mut state = self.state();
        let Some(peer) = state.peers.remove(&importer) else { return };
        peer.unanswered.iter().for_each(|order| state.answer(*order, importer));
        drop(state);
        self.answered.notify_all();
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

    /// Has the one that listens look whether it must. The call is full only if there has been one.
    fn call_listener(&self) {
        let _ = rustix::io::write(&self.call, &1_u64.to_ne_bytes());
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
        self.begin_waiting();
        let mut has_looked = false;
        loop {
            let mut state = self.state();
            let Some(next) = state.next_deadline(order) else { break };
            state.note_slowest(order);
            let now = Instant::now();
            let left = next.saturating_duration_since(now);
            if left.is_zero() {
                // What has come by now is in time, whoever was to hear it.
                self.look(order, state);
                let late = self.take_late(order, now);
                late.into_iter().for_each(|importer| self.punish(importer));
            } else if !has_looked {
                self.look(order, state);
                has_looked = true;
            } else if state.listening == Listening::Nobody {
                has_looked = self.hear_in_time(order, state, left);
            } else {
                let waited = self.answered.wait_timeout(state, left);
                has_looked = !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out();
            }
        }
        self.state().waiters -= 1;
    }

    /// There is one more that waits: who listens does so for all from here on.
    fn begin_waiting(&self) {
        let mut state = self.state();
        state.waiters += 1;
        let listened_to_one = state.listening == Listening::One;
        if listened_to_one {
            state.listening = Listening::All;
        }
        drop(state);
        if listened_to_one {
            self.call_listener();
        }
    }

    /// Hears those that are waited for at `order`.
    fn look(&self, order: u64, state: MutexGuard<'_, State>) {
        let waiting = state.rounds.get(&order).map(|round| round.waiting.clone()).unwrap_or_default();
        drop(state);
        let heard = waiting.into_iter().filter(|(importer, _)| self.hear(*importer)).count();
        let state = self.state();
        if heard == 0 || state.waiters == 1 {
            return;
        }
        // What was heard may have been for others.
        let listening = state.listening;
        drop(state);
        self.answered.notify_all();
        if listening != Listening::Nobody {
            self.call_listener();
        }
    }

    /// Listens for so long: where others wait too, to all, and hears them; else to the last that was told at `order` and has not
    /// answered. True if whoever had something to say has been heard.
    fn hear_in_time(&self, order: u64, mut state: MutexGuard<'_, State>, time: Duration) -> bool {
        let alone = state.waiters == 1;
        let lines = if alone { state.last_line(order).into_iter().collect() } else { state.lines() };
        state.listening = if alone { Listening::One } else { Listening::All };
        drop(state);
        let ready = self.listen(&lines, time);
        if !alone {
            for importer in ready {
                self.hear(importer);
            }
        }
        let mut state = self.state();
        state.listening = Listening::Nobody;
        if state.waiters > 1 {
            self.answered.notify_all();
        }
        !alone
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
        state.counts.late += late.len() as u64;
        late
    }
}

impl State {
    /// When the first of those that are waited for at `order` will be late; nothing if nobody is.
    fn next_deadline(&self, order: u64) -> Option<Instant> {
        self.rounds.get(&order)?.waiting.iter().map(|(_, until)| *until).min()
    }

    /// Who is waited for alone is the slowest. Which of several that are heard at once has answered last is not known.
    fn note_slowest(&mut self, order: u64) {
        if let Some(round) = self.rounds.get_mut(&order)
            && let [(alone, _)] = round.waiting[..]
        {
            round.answers.slowest = Some(alone);
        }
    }

    /// The line of the last of those that are waited for at `order`.
    fn last_line(&self, order: u64) -> Option<Line> {
        let (importer, _) = self.rounds.get(&order)?.waiting.last()?;
        Some((*importer, Arc::clone(&self.peers.get(importer)?.line)))
    }

    fn lines(&self) -> Vec<Line> {
        self.peers.iter().map(|(importer, peer)| (*importer, Arc::clone(&peer.line))).collect()
    }

    /// Counts an answer, if it is waited for.
    fn answer(&mut self, order: u64, importer: ImporterId) {
        let Some(round) = self.rounds.get_mut(&order) else { return };
        round.waiting.retain(|(other, _)| *other != importer);
    }
}

impl External for Hub {
    fn tell(&self, order: u64, importer: ImporterId, pages: &[Gfn]) {
        let mut state = self.state();
        let Some(peer) = state.peers.get_mut(&importer) else { return };
        peer.unanswered.push_back(order);
        let line = Arc::clone(&peer.line);
        state.counts.told += 1;
        let until = Instant::now() + self.deadline;
        state.rounds.entry(order).or_default().waiting.push((importer, until));
        drop(state);
        let pages = pages.iter().map(|gfn| gfn.0).collect();
        self.send_by(&line, importer, &Reply::Invalidate { order, pages }.encode(0));
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
    use rustix::net::socketpair;

    use super::*;

    /// The far ends of an importer.
    struct Far {
        importer: ImporterId,
        socket: OwnedFd,
        line: OwnedFd,
    }

    impl Far {
        fn of(hub: &Hub) -> Far {
            let kind = SocketType::SEQPACKET;
            let (ours, socket) =
                socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("sockets");
            let (importer, line) = hub.welcome(Arc::new(ours), None).expect("a line");
            Far { importer, socket, line }
        }

        /// What has come by the line.
        fn hear(&self, flags: RecvFlags) -> Option<Reply> {
            Far::hear_by(&self.line, flags)
        }

        fn hear_by(socket: &OwnedFd, flags: RecvFlags) -> Option<Reply> {
            let mut buffer = [0; 256];
            let (read, _) = rustix::net::recv(socket, &mut buffer, flags).ok()?;
            Some(Reply::parse(&buffer[..read]).expect("a message").1)
        }

        fn say(&self, bytes: &[u8]) {
            rustix::net::send(&self.line, bytes, SendFlags::NOSIGNAL).expect("room");
        }

        fn ack(&self, order: u64) {
            self.say(&Request::Ack { order }.encode(0));
        }
    }

    fn hub_for(deadline: Duration, policy: ExportPolicy) -> Arc<Hub> {
        Hub::new(deadline, policy, false).expect("descriptors")
    }

    /// One that waits for longer than a test takes.
    fn patient() -> Arc<Hub> {
        hub_for(Duration::from_secs(60), ExportPolicy::Keep)
    }

    /// Returns once it is so.
    fn until(hub: &Hub, is_so: impl Fn(&State) -> bool) {
        let patience = Instant::now() + Duration::from_secs(60);
        while !is_so(&hub.state()) {
            assert!(Instant::now() < patience, "it never is: {:?}", hub.state());
            std::thread::yield_now();
        }
    }

    #[test]
    fn whoever_is_told_is_waited_for_until_it_answers() {
        let hub = patient();
        let far = Far::of(&hub);
        hub.tell(5, far.importer, &[Gfn(7), Gfn(9)]);
        let told = far.hear(RecvFlags::empty());
        assert_eq!(told, Some(Reply::Invalidate { order: 5, pages: vec![7, 9] }));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| hub.wait(5));
            far.ack(5);
            let answers = waits.join().expect("no panic");
            assert_eq!(answers, Answers { slowest: Some(far.importer), late: 0 });
        });
        assert_eq!(hub.wait(5), Answers::default(), "nobody is left to wait for");
    }

    #[test]
    fn who_says_what_it_was_not_asked_for_is_parted_with() {
        let hub = patient();
        let ack = |order| Request::Ack { order }.encode(0);
        let other = Request::Remove { segment: 1 }.encode(0);
        for said in [&ack(6)[..], &ack(5)[..20], b"x", &[0; 300], &other] {
            let far = Far::of(&hub);
            hub.tell(5, far.importer, &[Gfn(7)]);
            far.say(said);
            assert_eq!(hub.wait(5).late, 0, "{said:?}");
            assert_eq!(hub.importers(), 0, "{said:?}");
            assert!(matches!(far.hear(RecvFlags::empty()), Some(Reply::Invalidate { .. })));
            let last = Far::hear_by(&far.socket, RecvFlags::empty());
            assert!(matches!(last, Some(Reply::Refused { code: Code::Malformed, .. })), "{last:?}");
        }
        let far = Far::of(&hub);
        hub.tell(5, far.importer, &[Gfn(7)]);
        far.ack(5);
        hub.wait(5);
        far.ack(5);
        hub.hear_all();
        assert_eq!(hub.importers(), 0, "twice");
        let far = Far::of(&hub);
        hub.tell(5, far.importer, &[Gfn(7)]);
        drop(far.line);
        assert_eq!((hub.wait(5).late, hub.importers()), (0, 0), "it can answer no more");
    }

    /// The one that listens hears answers for others; when it goes, another listens.
    #[test]
    fn many_that_wait_are_all_answered() {
        let hub = patient();
        let fars = [(); 4].map(|()| Far::of(&hub));
        std::thread::scope(|scope| {
            for order in 0..8 {
                let (hub, fars) = (&hub, &fars);
                scope.spawn(move || {
                    for round in 0..200 {
                        let order = round * 8 + order;
                        fars.iter().for_each(|far| hub.tell(order, far.importer, &[Gfn(7)]));
                        assert_eq!(hub.wait(order).late, 0, "nobody is called in vain");
                    }
                });
            }
            for far in &fars {
                scope.spawn(move || {
                    for _ in 0..1600 {
                        match far.hear(RecvFlags::empty()) {
                            Some(Reply::Invalidate { order, .. }) => far.ack(order),
                            other => panic!("told {other:?}"),
                        }
                    }
                });
            }
        });
        assert_eq!((hub.importers(), hub.state().rounds.len()), (4, 0));
    }

    #[test]
    fn in_turn_each_is_awaited_before_the_next_is_told() {
        let hub = Hub::new(Duration::from_secs(60), ExportPolicy::Keep, true).expect("descriptors");
        let fars = [(); 2].map(|()| Far::of(&hub));
        std::thread::scope(|scope| {
            let tells = scope.spawn(|| fars.iter().for_each(|far| hub.tell(5, far.importer, &[Gfn(7)])));
            for far in &fars {
                assert!(far.hear(RecvFlags::empty()).is_some());
                assert!(fars.iter().all(|far| far.hear(RecvFlags::DONTWAIT).is_none()), "one at a time");
                far.ack(5);
            }
            tells.join().expect("no panic");
        });
        assert_eq!(hub.wait(5), Answers { slowest: Some(fars[1].importer), late: 0 });
    }

    #[test]
    fn who_has_gone_has_answered() {
        let hub = patient();
        let far = Far::of(&hub);
        hub.tell(5, far.importer, &[Gfn(7)]);
        std::thread::scope(|scope| {
            // Two, of whom one listens.
            let waits = [(); 2].map(|()| scope.spawn(|| hub.wait(5)));
            until(&hub, |state| (state.waiters, state.listening) == (2, Listening::All));
            hub.part(far.importer);
            for waits in waits {
                assert_eq!(waits.join().expect("no panic").late, 0);
            }
        });
        hub.tell(6, far.importer, &[Gfn(7)]);
        assert_eq!((hub.wait(6), hub.importers()), (Answers::default(), 0));
    }

    /// Whoever waits alone listens to the last that it has told, whichever of them goes.
    #[test]
    fn one_that_waits_alone_hears_of_all() {
        let hub = patient();
        for first_goes in [true, false] {
            let fars = [(); 2].map(|()| Far::of(&hub));
            fars.iter().for_each(|far| hub.tell(5, far.importer, &[Gfn(7)]));
            let (goes, stays) = if first_goes { (0, 1) } else { (1, 0) };
            std::thread::scope(|scope| {
                let waits = scope.spawn(|| hub.wait(5));
                until(&hub, |state| state.listening == Listening::One);
                hub.part(fars[goes].importer);
                fars[stays].ack(5);
                let answers = waits.join().expect("no panic");
                assert_eq!(answers, Answers { slowest: Some(fars[stays].importer), late: 0 });
            });
        }
    }

    /// One listens to an importer that is silent; another that waits meanwhile hears its own, and so does one of an importer that
    /// came after that.
    #[test]
    fn who_waits_beside_one_that_listens_to_a_silent_importer_is_answered() {
        let hub = patient();
        let (silent, second) = (Far::of(&hub), Far::of(&hub));
        std::thread::scope(|scope| {
            hub.tell(1, silent.importer, &[Gfn(7)]);
            let first = scope.spawn(|| hub.wait(1));
            until(&hub, |state| state.listening == Listening::One);
            hub.tell(2, second.importer, &[Gfn(8)]);
            let waits = scope.spawn(|| hub.wait(2));
            until(&hub, |state| (state.waiters, state.listening) == (2, Listening::All));
            let third = Far::of(&hub);
            hub.tell(3, third.importer, &[Gfn(9)]);
            let last = scope.spawn(|| hub.wait(3));
            until(&hub, |state| state.waiters == 3);
            third.ack(3);
            assert_eq!(last.join().expect("no panic").late, 0);
            second.ack(2);
            assert_eq!(waits.join().expect("no panic").late, 0);
            assert!(!first.is_finished(), "nobody has answered it");
            silent.ack(1);
            assert_eq!(first.join().expect("no panic").late, 0);
        });
    }

    /// Whoever told it comes to wait too late, and another listens meanwhile, to one that says nothing.
    #[test]
    fn who_has_answered_in_time_is_not_late_though_nobody_has_heard_it() {
        let deadline = Duration::from_millis(50);
        let hub = hub_for(deadline, ExportPolicy::Keep);
        let (silent, prompt) = (Far::of(&hub), Far::of(&hub));
        // An old answer, which comes late, is before it.
        hub.tell(1, prompt.importer, &[Gfn(7)]);
        assert_eq!(hub.wait(1).late, 1);
        prompt.ack(1);
        hub.tell(2, prompt.importer, &[Gfn(7)]);
        prompt.ack(2);
        std::thread::sleep(deadline);
        std::thread::scope(|scope| {
            hub.tell(3, silent.importer, &[Gfn(8)]);
            let waits = scope.spawn(|| hub.wait(3));
            assert_eq!(hub.wait(2), Answers { slowest: Some(prompt.importer), late: 0 });
            assert_eq!(waits.join().expect("no panic").late, 1);
        });
    }

    /// Whoever listens has lost its CPU, and does not hear; the one that waits is woken again and again, and not by the answer.
    #[test]
    fn who_has_answered_in_time_is_not_late_though_whoever_waits_wakes_after_the_deadline() {
        let hub = hub_for(Duration::from_millis(50), ExportPolicy::Keep);
        hub.state().listening = Listening::All;
        let far = Far::of(&hub);
        hub.tell(5, far.importer, &[Gfn(7)]);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| hub.wait(5));
            until(&hub, |state| state.waiters == 1);
            // It has looked, and sleeps.
            std::thread::sleep(Duration::from_millis(10));
            far.ack(5);
            while !waits.is_finished() {
                hub.answered.notify_all();
            }
            assert_eq!(waits.join().expect("no panic").late, 0);
        });
    }

    #[test]
    fn the_slowest_is_who_is_waited_for_alone() {
        let hub = patient();
        let fars = [(); 3].map(|()| Far::of(&hub));
        // All have answered when somebody looks: nobody knows who was last.
        fars.iter().for_each(|far| hub.tell(5, far.importer, &[Gfn(7)]));
        fars.iter().for_each(|far| far.ack(5));
        assert_eq!(hub.wait(5), Answers { slowest: None, late: 0 });
        // The first to be told is seen to be the last to answer.
        fars.iter().for_each(|far| hub.tell(6, far.importer, &[Gfn(7)]));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| hub.wait(6));
            fars[1..].iter().for_each(|far| far.ack(6));
            let is_alone = |state: &State| state.rounds[&6].answers.slowest == Some(fars[0].importer);
            until(&hub, is_alone);
            fars[0].ack(6);
            assert_eq!(waits.join().expect("no panic"), Answers { slowest: Some(fars[0].importer), late: 0 });
        });
    }

    #[test]
    fn who_is_late_is_dealt_with_by_the_policy() {
        for (policy, stays) in [(ExportPolicy::Keep, 1), (ExportPolicy::Drop, 0), (ExportPolicy::Kill, 0)] {
            let hub = hub_for(Duration::from_millis(20), policy);
            let far = Far::of(&hub);
            hub.tell(5, far.importer, &[Gfn(7)]);
            assert_eq!(hub.wait(5), Answers { slowest: Some(far.importer), late: 1 }, "{policy:?}");
            assert_eq!(hub.importers(), stays, "{policy:?}");
            if stays == 1 {
                far.ack(5);
                hub.hear_all();
                assert_eq!(hub.importers(), 1, "late, and no harm");
            }
        }
    }

    #[test]
    fn who_does_not_read_is_parted_with_and_nobody_waits() {
        let hub = hub_for(Duration::from_secs(600), ExportPolicy::Keep);
        let far = Far::of(&hub);
        let pages = [Gfn(7); 512];
        let full = (0..10_000).find(|order| {
            hub.tell(*order, far.importer, &pages);
            hub.importers() == 0
        });
        assert_eq!(hub.wait(full.expect("a socket has no room for so much")).late, 0);
    }
}
