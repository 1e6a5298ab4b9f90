//! Whether the guest is to run: an operator's `stop` and `cont`.
//!
//! Story: an operator writes down that the guest is to stand still and wakes the vCPU, which comes to the top of its loop,
//! outside the guest, and stays there ([`Stops::stand`] to [`Stops::go_on`]), answering questions. Guest time stands still
//! with it. Whoever wants to know that it stands waits here.
//!
//! Holds: STOP and RESUME are told in turn, beginning with STOP, each when it has become so. What is told and what
//! [`Stops::is_standing`] says never disagree.
//!
//! Locks: this one, and the queue of the news under it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::control::News;

/// Whether the guest stands, and is to.
pub struct Stops {
    state: Mutex<State>,
    changed: Condvar,
    news: Arc<News>,
}

#[derive(Clone, Copy, Default)]
struct State {
    wanted: bool,
    standing: bool,
    ended: bool,
}

impl Stops {
    /// The guest runs. Whoever listens to `news` is told when that changes.
    pub fn new(news: Arc<News>) -> Stops {
        Stops { state: Mutex::default(), changed: Condvar::new(), news }
    }

    /// Asks for the guest to stand still; the caller wakes the vCPU.
    pub fn want(&self) {
        self.lock().wanted = true;
    }

    /// Has the guest run on; the caller wakes the vCPU.
    pub fn release(&self) {
        let mut state = self.lock();
        if state.standing {
            self.news.event("RESUME", None);
        }
        (state.wanted, state.standing) = (false, false);
        self.changed.notify_all();
    }

    /// Waits until the guest stands; false when it does not within `limit`. True also when somebody has let it run again, or
    /// the run has ended.
    pub fn wait(&self, limit: Duration) -> bool {
        let runs = |state: &mut State| state.wanted && !state.standing && !state.ended;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, runs);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// The guest stands still now.
    pub fn is_standing(&self) -> bool {
        self.lock().standing
    }

    /// For the vCPU's thread: true when it is to stand still, and from then on it is said to.
    pub fn stand(&self) -> bool {
        let mut state = self.lock();
        if state.wanted && !state.standing {
            state.standing = true;
            self.news.event("STOP", None);
            self.changed.notify_all();
        }
        state.wanted
    }

    /// For the vCPU's thread: the run has ended, and nobody need wait any more.
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
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn stops() -> (Stops, Arc<News>) {
        let news = Arc::new(News::default());
        news.open().expect("a descriptor");
        (Stops::new(Arc::clone(&news)), news)
    }

    fn told(news: &News) -> Vec<String> {
        news.take().iter().map(|item| item.event_name().expect("an event").to_owned()).collect()
    }

    #[test]
    fn stop_and_resume_are_told_in_turn_and_once() {
        let (stops, news) = stops();
        assert!(!stops.stand());
        stops.release();
        stops.want();
        stops.want();
        assert!(!stops.is_standing() && stops.stand() && stops.stand() && stops.is_standing());
        stops.release();
        stops.release();
        assert!(!stops.is_standing() && !stops.stand());
        assert_eq!(told(&news), ["STOP", "RESUME"]);
    }

    #[test]
    fn a_stop_that_is_taken_back_before_the_guest_stands_is_not_told() {
        let (stops, news) = stops();
        stops.want();
        stops.release();
        assert!(!stops.stand() && stops.wait(LONG));
        assert!(told(&news).is_empty());
    }

    #[test]
    fn who_waits_sees_the_guest_stand_or_the_run_end_or_the_limit() {
        let (stops, _news) = stops();
        stops.want();
        assert!(!stops.wait(Duration::from_millis(5)));
        thread::scope(|scope| {
            scope.spawn(|| stops.stand());
            assert!(stops.wait(LONG) && stops.is_standing());
        });
        stops.release();
        stops.want();
        stops.end();
        assert!(stops.wait(LONG));
    }
}
