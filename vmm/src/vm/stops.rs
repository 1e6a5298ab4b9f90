//! Whether the guest is to run: an operator's `stop` and `cont`.
//!
//! Story: an operator writes down that the guest is to stand still and wakes its vCPUs. Each comes to the top of its loop,
//! outside the guest, and stays there ([`Stops::stand`]), answering questions. When the last of them stands, guest time does, and
//! no device begins a request. When none has one in hand, the guest stands, until [`Stops::release`]: a worker that ends its
//! round wakes the vCPUs, which look. Whoever wants to know that it stands waits here.
//!
//! Holds: STOP and RESUME are told in turn, beginning with STOP, each when it has become so. What is told and what
//! [`Stops::is_standing`] says never disagree. While the guest stands, neither a vCPU nor a device changes its memory or a disk.
//!
//! Locks: this one, and under it the queue of the news or the board's.

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
    /// All of them, and the devices.
    stands: bool,
    ended: bool,
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

    /// Has the guest run on.
    pub fn release(&self) {
        {
            let mut state = self.lock();
            if state.stands {
                self.news.event("RESUME", None);
            }
            if state.standing == self.all {
                self.devices.thaw();
            }
            *state = State { ended: state.ended, ..State::default() };
            self.changed.notify_all();
        }
        self.devices.wake_all();
    }

    /// Waits until the guest stands; false when it does not within `limit`. True also when somebody has let it run again, or
    /// the run has ended.
    pub fn wait(&self, limit: Duration) -> bool {
        let runs = |state: &mut State| state.wanted && !state.stands && !state.ended;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, runs);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// The guest stands still now.
    pub fn is_standing(&self) -> bool {
        self.lock().stands
    }

    /// For the thread of `vcpu`, which is outside the guest: true when it is to stay there.
    pub fn stand(&self, vcpu: u32) -> bool {
        let mut state = self.lock();
        if state.wanted && state.standing & 1 << vcpu == 0 {
            state.standing |= 1 << vcpu;
            if state.standing == self.all {
                self.devices.freeze();
            }
        }
        if state.standing == self.all && !state.stands && self.devices.is_quiet() {
            state.stands = true;
            self.news.event("STOP", None);
            self.changed.notify_all();
        }
        state.wanted
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

    fn told(news: &News) -> Vec<String> {
        news.take().iter().map(|item| item.event_name().expect("an event").to_owned()).collect()
    }

    #[test]
    fn stop_and_resume_are_told_in_turn_and_once() {
        let (stops, news) = stops(1);
        assert!(!stops.stand(0));
        stops.release();
        stops.want();
        stops.want();
        assert!(!stops.is_standing() && stops.stand(0) && stops.stand(0) && stops.is_standing());
        stops.release();
        stops.release();
        assert!(!stops.is_standing() && !stops.stand(0));
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
        assert!(stops.stand(2) && stops.stand(0) && stops.stand(2));
        assert!(!stops.is_standing() && told(&news).is_empty() && moves());
        assert!(stops.stand(1) && stops.is_standing() && !moves());
        stops.release();
        assert!(moves());
        // One that comes late to see that it may go on does not end the stop after it.
        stops.want();
        assert!(stops.stand(0) && stops.stand(1) && stops.stand(2) && !moves());
        assert_eq!(told(&news), ["STOP", "RESUME", "STOP"]);
    }

    #[test]
    fn a_stop_that_is_taken_back_before_the_guest_stands_is_not_told() {
        let (stops, news) = stops(2);
        stops.want();
        assert!(stops.stand(0));
        stops.release();
        assert!(!stops.stand(0) && stops.wait(LONG));
        assert!(told(&news).is_empty());
    }

    #[test]
    fn who_waits_sees_the_guest_stand_or_the_run_end_or_the_limit() {
        let (stops, _news) = stops(1);
        stops.want();
        assert!(!stops.wait(Duration::from_millis(5)));
        thread::scope(|scope| {
            scope.spawn(|| stops.stand(0));
            assert!(stops.wait(LONG) && stops.is_standing());
        });
        stops.release();
        stops.want();
        stops.end();
        assert!(stops.wait(LONG));
    }
}
