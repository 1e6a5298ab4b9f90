//! Facts about a vCPU that is in the guest while something is changed under it: both shootdown back ends.
//!
//! ```text
//!   the vCPU's thread                        the probe
//!   guest: mov eax, [PAGE]                   map PAGE to the other frame
//!          mov [seen], eax                   shoot down
//!          jmp back                          wait until `seen` is the other frame's word
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;
use umbra_mmu::{Mfn, Mpa};

use super::ProbeError;
use super::facts::{ABSENT, two_frames};
use super::measure::Cost;
use super::scratch::{ALL, Scratch};
use crate::kvm::shootdown::Notifier;
use crate::kvm::{Kicker, KvmError, KvmExit};
use crate::machine::Pool;

/// How one shootdown does here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ShootdownRow {
    /// Its name.
    pub name: &'static str,
    /// Times that the guest saw the new translation.
    pub seen: u32,
    /// Times that it was tried.
    pub tried: u32,
    /// What the call costs until it says that it is done.
    pub cost: Cost,
}

impl ShootdownRow {
    /// True where it never failed.
    pub fn works(&self) -> bool {
        self.seen == self.tried && self.tried > 0
    }
}

/// A vCPU that runs in a thread of its own.
#[derive(Debug)]
pub struct Live {
    pool: Arc<Pool>,
    notifier: Notifier,
    kicker: Kicker,
    shared: Arc<Shared>,
    thread: JoinHandle<Result<Scratch, ProbeError>>,
    entry: Mpa,
    data: Mpa,
    frames: [Mfn; 2],
    now: usize,
    /// Between two tries, so that the guest is well inside again before the next.
    pause: Duration,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Kicks that were answered with a flush.
    answered: AtomicU64,
    ended: AtomicBool,
}

/// A busy host gets fewer tries, so that the whole takes no longer.
const ROW_MAX: Duration = Duration::from_secs(1);
/// But not fewer than this.
const TRIES_MIN: u32 = 10;
/// After so many failures in a row it is clear.
const FAILURES_MAX: u32 = 3;

impl Live {
    /// The name of no shootdown at all.
    pub const NOTHING: &'static str = "nothing";

    /// Starts the guest of `scratch`.
    ///
    /// # Errors
    /// When the scratch pool is used up.
    pub fn start(mut scratch: Scratch) -> Result<Live, KvmError> {
        const COPY_FOR_EVER: [u8; 9] = [0xa1, 0, 0, 0x40, 0, 0x89, 0x06, 0xeb, 0xf7];
        let frames = two_frames(&mut scratch)?;
        scratch.load(&COPY_FOR_EVER, true)?;
        scratch.space.map(ABSENT, frames[0], ALL)?;
        let entry = scratch.space.entry(ABSENT)?;
        let shared = Arc::new(Shared::default());
        Ok(Live {
            pool: Arc::clone(scratch.vm.pool()),
            notifier: Notifier::new(Arc::clone(&scratch.vm)),
            kicker: scratch.vcpu.kicker(),
            entry,
            data: scratch.data.at(0),
            frames,
            now: 0,
            pause: Duration::from_micros(200),
            thread: thread::spawn({
                let shared = Arc::clone(&shared);
                move || run(scratch, &shared)
            }),
            shared,
        })
    }

    /// Stops the guest and gives it back.
    ///
    /// # Errors
    /// What the vCPU's thread ended with.
    pub fn stop(self) -> Result<Scratch, ProbeError> {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.kicker.kick();
        self.thread.join().unwrap_or(Err(ProbeError::Strange { what: "a thread", exit: KvmExit::Kicked }))
    }

    /// Shoots down nothing: times that the guest saw the change within `patience`, without any exit.
    ///
    /// # Errors
    /// When the entry is not in the pool.
    pub fn nothing(&mut self, times: u32, patience: Duration) -> Result<ShootdownRow, ProbeError> {
        self.try_out(Live::NOTHING, times, patience, |_, _| Ok(()))
    }

    /// The kick back end: kick, and wait until the vCPU has flushed.
    ///
    /// # Errors
    /// When the vCPU does not answer.
    pub fn kick(&mut self, times: u32) -> Result<ShootdownRow, ProbeError> {
        self.try_out("kick", times, PATIENCE, |live, _| live.kick_and_wait())
    }

    /// The notifier back end for one frame.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn notifier(&mut self, times: u32) -> Result<ShootdownRow, ProbeError> {
        self.try_out("notifier", times, PATIENCE, |live, old| Ok(live.notifier.drop_frame(old)?))
    }

    /// The notifier back end for everything.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn slot(&mut self, times: u32) -> Result<ShootdownRow, ProbeError> {
        self.try_out("memory slot", times, PATIENCE, |live, _| Ok(live.notifier.drop_all()?))
    }

    /// How many frames the notifier takes away in the time of one kick, by the medians of a few.
    ///
    /// # Errors
    /// As [`Live::kick`] and [`Live::notifier`].
    pub fn frames_a_kick(&mut self) -> Result<u32, ProbeError> {
        const TIMES: u32 = 11;
        self.pause = Duration::ZERO;
        let (kick, notifier) = (self.kick(TIMES)?, self.notifier(TIMES)?);
        let both = kick.works() && notifier.works();
        let ratio = kick.cost.median_ns / notifier.cost.median_ns.max(1);
        Ok(if both { ratio.min(u64::from(u32::MAX)) as u32 } else { 0 })
    }

    fn try_out(
        &mut self,
        name: &'static str,
        times: u32,
        patience: Duration,
        shoot_down: impl Fn(&Live, Mfn) -> Result<(), ProbeError>,
    ) -> Result<ShootdownRow, ProbeError> {
        let (mut seen, mut tried, mut failures, mut costs) = (0, 0, 0, Vec::new());
        self.settle()?;
        let end = Instant::now() + ROW_MAX;
        let enough = |tried| tried >= times || (tried >= TRIES_MIN && Instant::now() > end);
        while !enough(tried) && failures < FAILURES_MAX {
            let old = self.exchange()?;
            let begun = Instant::now();
            shoot_down(self, old)?;
            costs.push(begun.elapsed());
            tried += 1;
            if self.seen(patience)? {
                (seen, failures) = (seen + 1, 0);
            } else {
                failures += 1;
                self.settle()?;
            }
            thread::sleep(self.pause);
        }
        Ok(ShootdownRow { name, seen, tried, cost: Cost::of(costs) })
    }

    /// Maps the other frame; gives the one that was mapped.
    fn exchange(&mut self) -> Result<Mfn, KvmError> {
        let old = self.frames[self.now];
        self.now ^= 1;
        self.pool.store(self.entry, self.frames[self.now].at(0).0 | ALL)?;
        Ok(old)
    }

    /// Does everything that could make the guest see what is mapped.
    fn settle(&self) -> Result<(), ProbeError> {
        for frame in self.frames {
            self.notifier.drop_frame(frame)?;
        }
        self.kick_and_wait()?;
        match self.seen(Duration::from_secs(2))? {
            true => Ok(()),
            false => Err(ProbeError::OutOfTime { what: "a translation to be seen" }),
        }
    }

    fn kick_and_wait(&self) -> Result<(), ProbeError> {
        let before = self.shared.answered.load(Ordering::SeqCst);
        self.kicker.kick();
        let limit = Instant::now() + Duration::from_secs(2);
        while self.shared.answered.load(Ordering::SeqCst) == before {
            if Instant::now() > limit || self.shared.ended.load(Ordering::SeqCst) {
                return Err(ProbeError::OutOfTime { what: "a kick to be answered" });
            }
            thread::yield_now();
        }
        Ok(())
    }

    fn seen(&self, patience: Duration) -> Result<bool, KvmError> {
        let end = Instant::now() + patience;
        loop {
            if self.pool.load(self.data)? as u32 == self.now as u32 + 1 {
                return Ok(true);
            }
            if Instant::now() > end {
                return Ok(false);
            }
            thread::yield_now();
        }
    }
}

/// How long a guest may take to run a few instructions, on a host that emulates them and is busy besides.
const PATIENCE: Duration = Duration::from_millis(250);

/// The vCPU's thread: answers kicks with a flush.
fn run(mut scratch: Scratch, shared: &Shared) -> Result<Scratch, ProbeError> {
    let root = scratch.space.root();
    let result = loop {
        if shared.stop.load(Ordering::SeqCst) {
            break Ok(());
        }
        match scratch.vcpu.enter(&mut scratch.cpu, root, false) {
            Ok(KvmExit::Kicked) => {}
            Ok(exit) => break Err(ProbeError::Strange { what: "a changed translation", exit }),
            Err(error) => break Err(error.into()),
        }
        if let Err(error) = scratch.vcpu.flush(&scratch.cpu, root) {
            break Err(error.into());
        }
        shared.answered.fetch_add(1, Ordering::SeqCst);
    };
    shared.ended.store(true, Ordering::SeqCst);
    result.map(|()| scratch)
}
