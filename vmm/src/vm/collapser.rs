//! The thread that gathers ranges of 2 MiB (`umbra_mmu::collapse`).
//!
//! Story: it looks at some ranges, lets the guest run for a while, and collapses those that the guest has used since. It touches no vCPU
//! but by shooting down.
//!
//! Limits: it wakes up by time, so that in a simulation there is always somebody who waits for one: that threads wait for each other
//! (status 20) is not found with it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use umbra_mmu::sync::sim;
use umbra_mmu::{Collapser as Looks, Mmu};

use super::ending::{End, Ending};
use super::simulation::Thread;

/// From one look to the next.
const INTERVAL: Duration = Duration::from_millis(20);

/// The running thread; dropping it ends it.
pub struct Collapser {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<Thread>,
}

impl Collapser {
    /// Starts it. A swap device that fails ends the run, and so does a panic.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn start(mmu: Arc<Mmu>, ending: Ending) -> io::Result<Collapser> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let until = Arc::clone(&stop);
        let work = move || ending.watch("collapse", || collapse(&mmu, &ending, &until));
        Ok(Collapser { stop, thread: Some(Thread::start("collapse", "collapse", work)?) })
    }
}

fn collapse(mmu: &Mmu, ending: &Ending, stop: &(Mutex<bool>, Condvar)) {
    let mut looks = Looks::default();
    while !is_over(stop) {
        if let Err(failed) = mmu.collapse_round(&mut looks) {
            return ending.set(End::Shortage(failed));
        }
    }
}

/// Lets the guest run for a while; true when the thread is to end.
fn is_over((stop, told): &(Mutex<bool>, Condvar)) -> bool {
    let is_virtual = sim::sleep(INTERVAL, "the next look at ranges");
    let stop = stop.lock().unwrap_or_else(PoisonError::into_inner);
    if is_virtual || *stop {
        return *stop;
    }
    *told.wait_timeout(stop, INTERVAL).unwrap_or_else(PoisonError::into_inner).0
}

impl Drop for Collapser {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}
