//! Whether the guest is to run: an operator's `stop` and `cont`, and resets.
//!
//! Story: an operator writes down that the guest is to stand still and wakes its vCPUs. Each comes to the top of its loop,
//! outside the guest, and stays there ([`Stops::duty`]), answering questions. When the last of them stands, guest time does, and
//! no device begins a request. When none has one in hand, the guest stands, until [`Stops::release`]: a worker that ends its
//! round wakes the vCPUs, which look. Whoever wants to know that it stands waits here.
//!
//! A reset ([`Stops::want_reset`]) needs the same, but for the telling. Each vCPU then forgets its own state, and when all have,
//! the first makes the machine anew ([`Stops::has_begun_anew`]). The guest runs on, or stands on where it was to stand:
//!
//! ```text
//! want_reset --> all stand, devices quiet --> each: Duty::Forget --> the first: Duty::PowerOn --> RESET told --> run, or stand
//! ```
//!
//! Holds: STOP and RESUME are told in turn, beginning with STOP, each when it has become so. What is told and what
//! [`Stops::is_standing`] says never disagree. While the guest stands, neither a vCPU nor a device changes its memory or a disk.
//! No vCPU runs guest code from the moment that the first forgets until the machine is new. Resets that are asked for while one is
//! under way are that one.
//!
//! Locks: this one, and under it the queue of the news, the board's or a waker's.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::control::News;
use super::devices::Devices;

/// Whether the guest stands, and is to.
pub struct Stops {
    state: Mutex<State>,
    changed: Condvar,
    /// Its vCPUs, a bit for each.
    all: u64,
    devices: Arc<Devices>,
    news: Arc<News>,
}

#[derive(Clone, Copy, Default)]
struct State {
    wanted: bool,
    /// The vCPUs that stand, a bit for each.
    standing: u64,
    /// All of them, and the devices, because an operator wants it.
    stands: bool,
    ended: bool,
    /// A reset is asked for, or under way: who asks, in QMP's words.
    reset: Option<ResetCause>,
    /// The vCPUs that have forgotten their state for it.
    forgotten: u64,
    /// The guest stands, and has not run since it was reset.
    unrun: bool,
    resets: u64,
}

/// Why a machine is reset, in QMP's words (`ShutdownCause`), and whether it was the guest's doing.
pub type ResetCause = (&'static str, bool);

/// What a vCPU that is outside the guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Run the guest.
    Run,
    /// Stay outside, until it is woken.
    Stand,
    /// Forget its state, and say so ([`Stops::has_forgotten`]).
    Forget,
    /// Make the machine anew, and say so ([`Stops::has_begun_anew`]). For the first vCPU, when all have forgotten theirs.
    PowerOn,
}

/// How a guest is, in QMP's words (`RunState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gait {
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// The same, and has not run since it was reset.
    Prelaunch,
}

impl Stops {
    /// The guest with `devices` runs. Whoever listens to `news` is told when that changes.
    pub fn new(devices: Arc<Devices>, news: Arc<News>) -> Stops {
        let all = u64::MAX >> (64 - devices.vcpus());
        Stops { state: Mutex::default(), changed: Condvar::new(), all, devices, news }
    }

    /// Asks for the guest to stand still.
    pub fn want(&self) {
        self.lock().wanted = true;
        self.devices.wake_all();
    }

    /// Asks for a reset; returns at once. RESET is told when the machine is new.
    pub fn want_reset(&self, cause: ResetCause) {
        self.lock().reset.get_or_insert(cause);
        self.devices.wake_all();
    }

    /// Has the guest run on, after the reset where one is under way.
    pub fn release(&self) {
        {
            let mut state = self.lock();
            if state.stands {
                self.news.event("RESUME", None);
            }
            (state.wanted, state.stands, state.unrun) = (false, false, false);
            self.let_go(&mut state);
            self.changed.notify_all();
        }
        self.devices.wake_all();
    }

    /// Nobody has to stand any more, unless somebody wants it.
    fn let_go(&self, state: &mut State) {
        if state.wanted || state.reset.is_some() {
            return;
        }
        if state.standing == self.all {
            self.devices.thaw();
        }
        state.standing = 0;
    }

    /// Waits until the guest stands; false when it does not within `limit`. True also when somebody has let it run again, or
    /// the run has ended.
    pub fn wait(&self, limit: Duration) -> bool {
        let runs = |state: &mut State| state.wanted && !state.stands && !state.ended;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, runs);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// The guest stands still now, because an operator wants it.
    pub fn is_standing(&self) -> bool {
        self.gait() != Gait::Running
    }

    /// How the guest is.
    pub fn gait(&self) -> Gait {
        let state = self.lock();
        match (state.stands, state.unrun) {
            (false, _) => Gait::Running,
            (true, false) => Gait::Paused,
            (true, true) => Gait::Prelaunch,
        }
    }

    /// How often the machine has been reset.
    pub fn resets(&self) -> u64 {
        self.lock().resets
    }

    /// For the thread of `vcpu`, which is outside the guest: what it is to do.
    pub fn duty(&self, vcpu: u32) -> Duty {
        let mut state = self.lock();
        if !state.wanted && state.reset.is_none() {
            return Duty::Run;
        }
        if state.standing & 1 << vcpu == 0 {
            state.standing |= 1 << vcpu;
            if state.standing == self.all {
                self.devices.freeze();
                if state.reset.is_some() {
                    // Those who came before sleep, and each has its own state to forget.
                    self.devices.wake_all();
                }
            }
        }
        if state.standing != self.all || !self.devices.is_quiet() {
            return Duty::Stand;
        }
        if state.reset.is_some() {
            return match state.forgotten {
                all if all == self.all && vcpu == 0 => Duty::PowerOn,
                some if some & 1 << vcpu == 0 => Duty::Forget,
                _ => Duty::Stand,
            };
        }
        if !state.stands {
            state.stands = true;
            self.news.event("STOP", None);
            self.changed.notify_all();
        }
        Duty::Stand
    }

    /// The vCPU has forgotten its state.
    pub fn has_forgotten(&self, vcpu: u32) {
        let mut state = self.lock();
        state.forgotten |= 1 << vcpu;
        let all = state.forgotten == self.all;
        drop(state);
        if all {
            self.devices.waker(0).wake();
        }
    }

    /// For the first vCPU's thread: the machine is new.
    pub fn has_begun_anew(&self) {
        {
            let mut state = self.lock();
            let (reason, guest) = state.reset.take().unwrap_or_default();
            state.forgotten = 0;
            state.resets += 1;
            state.unrun = state.wanted;
            self.news.reset((reason, guest));
            self.let_go(&mut state);
        }
        self.devices.wake_all();
    }

    /// For a vCPU's thread: the run has ended, and nobody need wait any more.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::thread;

    use super::*;
    use crate::board::{Board, BoardConfig, MemoryMap};

    const LONG: Duration = Duration::from_secs(20);

    fn stops(vcpus: u32) -> (Stops, Arc<News>) {
        let news = Arc::new(News::default());
        news.open().expect("a descriptor");
        let memory = MemoryMap::new(2 << 20).expect("a map");
        let config =
            BoardConfig { memory, vcpus: vcpus as usize, serial: Box::new(io::sink()), epoch_seconds: 0 };
        let devices = Devices::new(Board::new(config).expect("a board")).expect("a timer");
        (Stops::new(Arc::new(devices), Arc::clone(&news)), news)
    }

    /// That the vCPU comes to the top of its loop, and stays there.
    fn stands(stops: &Stops, vcpu: u32) -> bool {
        stops.duty(vcpu) != Duty::Run
    }

    fn told(news: &News) -> Vec<String> {
        news.take().iter().map(|item| item.event_name().expect("an event").to_owned()).collect()
    }

    #[test]
    fn stop_and_resume_are_told_in_turn_and_once() {
        let (stops, news) = stops(1);
        assert!(!stands(&stops, 0));
        stops.release();
        stops.want();
        stops.want();
        assert!(!stops.is_standing() && stands(&stops, 0) && stands(&stops, 0) && stops.is_standing());
        stops.release();
        stops.release();
        assert!(!stops.is_standing() && !stands(&stops, 0));
        assert_eq!(told(&news), ["STOP", "RESUME"]);
    }

    #[test]
    fn the_guest_stands_when_its_last_vcpu_does_and_its_time_with_it() {
        let (stops, news) = stops(3);
        let moves = || {
            let before = stops.devices.now();
            thread::sleep(Duration::from_millis(2));
            stops.devices.now() > before
        };
        stops.want();
        assert!(stands(&stops, 2) && stands(&stops, 0) && stands(&stops, 2));
        assert!(!stops.is_standing() && told(&news).is_empty() && moves());
        assert!(stands(&stops, 1) && stops.is_standing() && !moves());
        stops.release();
        assert!(moves());
        // One that comes late to see that it may go on does not end the stop after it.
        stops.want();
        assert!(stands(&stops, 0) && stands(&stops, 1) && stands(&stops, 2) && !moves());
        assert_eq!(told(&news), ["STOP", "RESUME", "STOP"]);
    }

    #[test]
    fn a_stop_that_is_taken_back_before_the_guest_stands_is_not_told() {
        let (stops, news) = stops(2);
        stops.want();
        assert!(stands(&stops, 0));
        stops.release();
        assert!(!stands(&stops, 0) && stops.wait(LONG));
        assert!(told(&news).is_empty());
    }

    #[test]
    fn who_waits_sees_the_guest_stand_or_the_run_end_or_the_limit() {
        let (stops, _news) = stops(1);
        stops.want();
        assert!(!stops.wait(Duration::from_millis(5)));
        thread::scope(|scope| {
            scope.spawn(|| stands(&stops, 0));
            assert!(stops.wait(LONG) && stops.is_standing());
        });
        stops.release();
        stops.want();
        stops.end();
        assert!(stops.wait(LONG));
    }

    const CAUSE: ResetCause = ("host-qmp-system-reset", false);

    /// What each vCPU is to do now.
    fn duties(stops: &Stops) -> Vec<Duty> {
        (0..stops.devices.vcpus()).map(|vcpu| stops.duty(vcpu)).collect()
    }

    #[test]
    fn a_reset_goes_from_all_vcpus_to_the_first_and_back() {
        let (stops, news) = stops(2);
        stops.want_reset(CAUSE);
        assert_eq!(duties(&stops), [Duty::Stand, Duty::Forget], "the first has come when the second does");
        assert!(!stops.is_standing(), "it is not for an operator that it stands");
        let frozen = stops.devices.now();
        stops.has_forgotten(1);
        assert_eq!(duties(&stops), [Duty::Forget, Duty::Stand], "not before all have forgotten");
        stops.has_forgotten(0);
        stops.want_reset(CAUSE);
        assert_eq!((duties(&stops), stops.devices.now()), (vec![Duty::PowerOn, Duty::Stand], frozen));
        stops.has_begun_anew();
        assert_eq!((duties(&stops), stops.resets()), (vec![Duty::Run, Duty::Run], 1));
        thread::sleep(Duration::from_millis(2));
        assert!(stops.devices.now() > frozen, "guest time goes on");
        assert_eq!(told(&news), ["RESET"]);
    }

    #[test]
    fn a_guest_that_is_let_go_or_stopped_during_its_reset_is_so_after_it() {
        let (stops, news) = stops(1);
        stops.want();
        assert!(stands(&stops, 0) && stops.gait() == Gait::Paused);
        stops.want_reset(CAUSE);
        assert_eq!(stops.duty(0), Duty::Forget);
        stops.has_forgotten(0);
        stops.release();
        assert_eq!(stops.duty(0), Duty::PowerOn, "nobody runs a guest that is half made");
        stops.has_begun_anew();
        assert_eq!(stops.duty(0), Duty::Run);
        stops.want_reset(CAUSE);
        assert_eq!(stops.duty(0), Duty::Forget);
        stops.has_forgotten(0);
        stops.want();
        assert_eq!((stops.duty(0), stops.gait()), (Duty::PowerOn, Gait::Running));
        stops.has_begun_anew();
        assert_eq!((stops.duty(0), stops.gait()), (Duty::Stand, Gait::Prelaunch));
        assert!(stops.wait(LONG));
        stops.release();
        assert_eq!((stops.duty(0), stops.gait()), (Duty::Run, Gait::Running));
        assert_eq!(told(&news), ["STOP", "RESUME", "RESET", "RESET", "STOP", "RESUME"]);
    }
}
