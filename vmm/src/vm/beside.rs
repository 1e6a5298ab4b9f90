//! Somebody who works on a running guest's memory in this process: what it gets, and when.
//!
//! Story: `umbra measure` takes pages from a guest that runs. Its thread begins as the vCPUs do, and they end before the run
//! does, whoever of them is the first: the companion ends the run when it has done ([`Beside::finish`]), and looks whether it
//! has ended meanwhile ([`Beside::has_ended`]).
//!
//! Holds: the thread that makes frames free runs for as long as the companion does.

use std::io;
use std::sync::Arc;
use std::thread;

use umbra_mmu::{Mmu, Shortage, SwapFailed};

use super::Guest;
use super::ending::{End, Ending};
use super::hardware::DropsRemoved;

/// A guest that comes with the program, beside the one that `umbra run` has.
#[derive(Clone, Debug)]
pub struct BuiltIn {
    /// The first word of its command line.
    pub name: &'static str,
    /// A Multiboot1 image.
    pub bytes: Vec<u8>,
}

/// Whoever works beside a running guest.
pub trait Companion: Send {
    /// Does so, until it has done or the run has ended. A panic ends the run.
    fn work(&mut self, beside: &Beside);
}

/// What a companion has of the guest.
pub struct Beside {
    /// Its memory.
    pub mmu: Arc<Mmu>,
    /// How the host takes single frames away from its vCPUs, where it can.
    pub notifier: Option<Box<dyn DropsRemoved>>,
    /// Its name on the command line.
    pub backend: &'static str,
    /// How its vCPUs are made to forget pages.
    pub shootdown: &'static str,
    ending: Ending,
}

impl Beside {
    pub(super) fn new(guest: &Guest, ending: &Ending) -> Beside {
        Beside {
            mmu: Arc::clone(&guest.mmu),
            notifier: guest.runner.notifier(),
            backend: guest.runner.name(),
            shootdown: guest.shootdown,
            ending: ending.clone(),
        }
    }

    /// True once the run has ended, for whatever reason.
    pub fn has_ended(&self) -> bool {
        self.ending.is_set()
    }

    /// Ends the run.
    pub fn finish(&self) {
        self.ending.set(End::Quit);
    }

    /// Ends it because swap has failed.
    pub fn fail(&self, failed: SwapFailed) {
        self.ending.set(End::Shortage(Shortage::Swap(failed)));
    }
}

/// Runs the vCPUs, and the companion, if there is one, on a thread beside them.
pub(super) fn work_during(
    companion: Option<&mut dyn Companion>,
    beside: &Beside,
    vcpus: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let Some(companion) = companion else { return vcpus() };
    thread::scope(|scope| {
        let work = move || beside.ending.watch("companion", || companion.work(beside));
        thread::Builder::new().name("companion".into()).spawn_scoped(scope, work)?;
        vcpus()
    })
}
