//! A watchdog: kicks what is being looked at once the time is up, again and again, until it is dropped.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::kvm::Kicker;

#[derive(Debug, Default)]
struct Watched {
    what: &'static str,
    kicker: Option<Kicker>,
    ended: bool,
}

/// See the module. One thread, for as long as the value lives.
#[derive(Debug)]
pub struct Watchdog {
    shared: Arc<(Mutex<Watched>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

/// The watched may be looked at whatever became of the thread that held it.
fn lock(watched: &Mutex<Watched>) -> MutexGuard<'_, Watched> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchdog {
    /// Lets `limit` pass before it kicks.
    pub fn new(limit: Duration) -> Watchdog {
        let shared = Arc::new((Mutex::new(Watched::default()), Condvar::new()));
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || guard(&shared, Instant::now() + limit)
        });
        Watchdog { shared, thread: Some(thread) }
    }

    /// From now on `what` is looked at, on the vCPU of `kicker`.
    pub fn watch(&self, what: &'static str, kicker: Kicker) {
        let mut watched = lock(&self.shared.0);
        (watched.what, watched.kicker) = (what, Some(kicker));
    }

    /// What is looked at.
    pub fn what(&self) -> &'static str {
        lock(&self.shared.0).what
    }
}

fn guard((watched, changed): &(Mutex<Watched>, Condvar), end: Instant) {
    const AGAIN: Duration = Duration::from_millis(10);
    let mut state = lock(watched);
    while !state.ended {
        let wait = end.saturating_duration_since(Instant::now()).max(AGAIN);
        state = changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        if Instant::now() >= end
            && let Some(kicker) = &state.kicker
        {
            kicker.kick();
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        lock(&self.shared.0).ended = true;
        self.shared.1.notify_one();
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: it only locks, waits and kicks.
            let _ = thread.join();
        }
    }
}
