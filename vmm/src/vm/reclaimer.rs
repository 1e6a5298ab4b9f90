//! The background reclaim thread.
//!
//! Story: it sleeps until few frames are left or the budget was cut, and makes frames free a batch at a time. It touches no
//! vCPU but by shooting down.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use umbra_mmu::sync::sim;
use umbra_mmu::{Mmu, Shortage};

use super::ending::{End, Ending};
use super::simulation::Thread;

/// The running thread; dropping it ends it.
pub struct Reclaimer {
    mmu: Arc<Mmu>,
    thread: Option<Thread>,
}

impl Reclaimer {
    /// Starts it. A swap device that fails ends the run, and so does a panic.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn start(mmu: Arc<Mmu>, ending: Ending) -> io::Result<Reclaimer> {
        let own = Arc::clone(&mmu);
        let work = move || ending.watch("reclaim", || reclaim(&own, &ending));
        let thread = Thread::start("reclaim", "reclaim", work)?;
        Ok(Reclaimer { mmu, thread: Some(thread) })
    }
}

/// From one look to the next while the budget is exceeded and every page is in use.
const AGAIN: Duration = Duration::from_millis(50);

fn reclaim(mmu: &Mmu, ending: &Ending) {
    while mmu.wait_for_background_work() {
        loop {
            match mmu.background_round() {
                Ok(true) => {}
                Ok(false) => break,
                Err(failed) => return ending.set(End::Shortage(Shortage::Swap(failed))),
            }
        }
        if mmu.is_over_budget() {
            if !sim::sleep(AGAIN, "pages to be out of use") {
                thread::sleep(AGAIN);
            }
            mmu.want_background();
        }
    }
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        self.mmu.stop_background();
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::time::Instant;

    use umbra_mmu::swap::{SwapDevice, SwapSlot};
    use umbra_mmu::{Config, Context, Gfn, LocalStack, Machine, NoVcpus};

    use super::*;
    use crate::board::{Board, BoardConfig, MemoryMap};
    use crate::status::Status;
    use crate::vm::devices::Devices;
    use crate::vm::summary::judge;

    /// A swap device with a mistake in it.
    #[derive(Debug)]
    struct Mistaken;

    impl SwapDevice for Mistaken {
        fn slots(&self) -> u32 {
            1000
        }

        fn write(&self, first: SwapSlot, _pages: &[u8]) -> io::Result<()> {
            panic!("the first write is to slot {}", first.0)
        }

        fn read(&self, _first: SwapSlot, _pages: &mut [u8]) -> io::Result<()> {
            Ok(())
        }

        fn discard(&self, _slots: Range<u32>) {}
    }

    fn mmu() -> Mmu {
        let config = Config { shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(500) };
        Mmu::new(Machine::anonymous(600), config, Box::new(NoVcpus)).with_swap(Box::new(Mistaken))
    }

    fn ending() -> Ending {
        let board = Board::new(BoardConfig {
            memory: MemoryMap::new(2 << 20).expect("enough"),
            vcpus: 1,
            serial: Box::new(io::sink()),
            epoch_seconds: 0,
        });
        Ending::new(Arc::new(Devices::new(board.expect("a board")).expect("timers")))
    }

    #[test]
    fn a_panic_of_the_reclaim_thread_ends_the_run_with_what_it_said() {
        let (mmu, ending) = (Arc::new(mmu()), ending());
        for page in 0..500 {
            mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(page).at(0), &[1]).expect("a frame");
        }
        let reclaimer = Reclaimer::start(Arc::clone(&mmu), ending.clone()).expect("a thread");
        mmu.set_budget(mmu.budget_min()).expect("the least");
        let patience = Instant::now() + Duration::from_secs(20);
        while !ending.is_set() && Instant::now() < patience {
            thread::sleep(Duration::from_millis(1));
        }
        drop(reclaimer);
        let end = ending.take().expect("the run has ended");
        let words = end.to_string();
        assert!(words.contains("reclaim thread has panicked: the first write is to slot 0"), "{words}");
        assert_eq!(judge(&end, &[], None, &[]), Status::Failure);
    }
}
