//! Rounds over a device's rings, and what the thread that makes them sleeps on.
//!
//! Story: the thread sleeps on its [`Bell`], which rings when the board has named its slot. It makes rounds then, each with the
//! device in hand ([`Port::begin`]) and one request of each ring, until a round finds nothing. A reset by the driver so waits for
//! one request of each ring at most. A vCPU that has notified a device which is prompt makes the rounds itself, a few, where the
//! thread is not at them: to wake it costs more than most requests.
//!
//! Holds: a ring begins anew when its driver has set it up anew, and goes when it is not ready.
//!
//! Locks: the bell's, which is a leaf. A round is made with nothing held but the worker's own, for which nobody waits but its thread.

use std::sync::{Mutex, MutexGuard, PoisonError};

use umbra_mmu::sync::sim::Bed;
use umbra_mmu::sync::{Thing, Wait};
use umbra_mmu::{Mmu, Shortage};

use super::ring::{Ring, Trouble};
use super::{Device, Port, Served};
use crate::board::{QUEUES_MAX, VirtioSnapshot};

/// What a worker's thread sleeps on.
#[derive(Debug, Default)]
pub struct Bell {
    state: Mutex<BellState>,
    changed: Bed,
}

#[derive(Clone, Copy, Debug, Default)]
struct BellState {
    rung: bool,
    stopped: bool,
}

impl Bell {
    /// There is something to look at.
    pub fn ring(&self) {
        self.lock().rung = true;
        self.changed.notify_all();
    }

    /// The thread is to end.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// True once it is.
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Sleeps until there is something to look at; false if the thread is to end.
    pub fn wait(&self) -> bool {
        let mut state = self.lock();
        while !state.rung && !state.stopped {
            let thing = Thing::held("a bell", None, &self.state);
            state = self.changed.wait(&self.state, thing, state, Wait::idle("its bell"));
        }
        state.rung = false;
        !state.stopped
    }

    fn lock(&self) -> MutexGuard<'_, BellState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device and its rings.
pub struct Worker<D> {
    device: D,
    rings: [Option<Ring>; QUEUES_MAX],
    /// For the log.
    name: String,
    /// Rings were broken before: said once.
    warned: bool,
}

impl<D: Device> Worker<D> {
    /// A worker for `device`, which the log calls `name`.
    pub fn new(device: D, name: String) -> Worker<D> {
        Worker { device, rings: Default::default(), name, warned: false }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// What the log calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes rounds until one finds nothing, `most` of them at most; true if there may be more. May sleep.
    ///
    /// # Errors
    ///
    /// When a page of the guest cannot be had: the run cannot go on.
    pub fn rounds(&mut self, mmu: &Mmu, port: &impl Port, most: usize) -> Result<bool, Shortage> {
        for _ in 0..most {
            if !self.round(mmu, port)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// One request of each ring; true if there was any.
    ///
    /// # Errors
    ///
    /// As [`Worker::rounds`].
    pub fn round(&mut self, mmu: &Mmu, port: &impl Port) -> Result<bool, Shortage> {
        let Some(snapshot) = port.begin() else { return Ok(false) };
        self.adopt(&snapshot);
        self.device.begin_round(&snapshot);
        match self.serve(mmu) {
            Ok((used, more)) => {
                port.end(used, more);
                Ok(more)
            }
            Err(Trouble::Broken(why)) => {
                self.rings = Default::default();
                self.warn(&why);
                port.fail();
                Ok(false)
            }
            Err(Trouble::Short(short)) => {
                port.end(false, false);
                Err(short)
            }
        }
    }

    /// Brings the rings to what the driver has set up.
    fn adopt(&mut self, snapshot: &VirtioSnapshot) {
        for (ring, config) in self.rings.iter_mut().zip(&snapshot.queues) {
            if !config.ready {
                *ring = None;
            } else if !ring.as_ref().is_some_and(|ring| ring.is_of(config)) {
                *ring = Ring::new(config, snapshot.features);
            }
        }
    }

    /// One request of each ring: whether the driver wants an interrupt, and whether there was any.
    fn serve(&mut self, mmu: &Mmu) -> Result<(bool, bool), Trouble> {
        let (mut used, mut more) = (false, false);
        if let Some((queue, head)) = self.device.give_back()
            && let Some(ring) = &mut self.rings[queue]
        {
            used |= ring.complete(mmu, head, None, 0)?;
        }
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            let Some(chain) = ring.pop(mmu, self.device.header_bytes())? else { continue };
            more = true;
            if let Served::Done { status, length } =
                self.device.serve(mmu, queue, &chain).map_err(Trouble::Short)?
            {
                let status = status.and_then(|byte| Some((chain.status_at()?, byte)));
                used |= ring.complete(mmu, chain.head, status, length)?;
            }
        }
        Ok((used, more))
    }

    fn warn(&mut self, why: &str) {
        if !std::mem::replace(&mut self.warned, true) {
            log::warn!(
                "{}: the guest's driver has a ring that cannot be used ({why}); the device stands still until it is reset. \
                 Said once, whatever follows",
                self.name
            );
        }
    }
}
