//! The background reclaim thread.
//!
//! Story: it sleeps until few frames are left or the budget was cut, and makes frames free a batch at a time. It touches no
//! vCPU but by shooting down.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use umbra_mmu::{Mmu, Shortage};

use super::ending::{End, Ending};

/// The running thread; dropping it ends it.
pub struct Reclaimer {
    mmu: Arc<Mmu>,
    thread: Option<JoinHandle<()>>,
}

impl Reclaimer {
    /// Starts it. A swap device that fails ends the run.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn start(mmu: Arc<Mmu>, ending: Ending) -> io::Result<Reclaimer> {
        let own = Arc::clone(&mmu);
        let thread = std::thread::Builder::new().name("reclaim".into()).spawn(move || {
            while own.wait_for_background_work() {
                loop {
                    match own.background_round() {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(failed) => {
                            ending.set(End::Shortage(Shortage::Swap(failed)));
                            return;
                        }
                    }
                }
            }
        })?;
        Ok(Reclaimer { mmu, thread: Some(thread) })
    }
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        self.mmu.stop_background();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
