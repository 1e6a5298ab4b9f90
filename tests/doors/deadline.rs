//! A kick after a while, so that a guest which never leaves ends a test instead of hanging it.

use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use umbra::kvm::Kicker;

/// Kicks a vCPU once, unless dropped before.
pub struct Deadline {
    cancel: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Deadline {
    /// Kicks after `delay`.
    pub fn new(kicker: Kicker, delay: Duration) -> Deadline {
        let (cancel, cancelled) = mpsc::channel();
        let thread = thread::spawn(move || {
            if cancelled.recv_timeout(delay) == Err(mpsc::RecvTimeoutError::Timeout) {
                kicker.kick();
            }
        });
        Deadline { cancel: Some(cancel), thread: Some(thread) }
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        drop(self.cancel.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
