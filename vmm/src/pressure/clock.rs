//! The time that the command goes by: the host's, or a test's own.

use std::thread;
use std::time::{Duration, Instant};

/// Time from some beginning, and waiting for it.
pub trait Clock {
    /// How much has passed.
    fn now(&self) -> Duration;
    /// Returns when so much more has passed.
    fn sleep(&self, time: Duration);
}

/// The host's.
#[derive(Clone, Copy, Debug)]
pub struct HostClock(Instant);

impl HostClock {
    /// One that begins now.
    pub fn start() -> HostClock {
        HostClock(Instant::now())
    }
}

impl Clock for HostClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration) {
        thread::sleep(time);
    }
}
