//! The host probe: what this machine's KVM can do, how fast, and what that means for a guest.
//!
//! Story: start-up asks [`Probe::quick`] (some milliseconds) to choose a backend and a shootdown; `umbra doctor`
//! asks [`Probe::complete`] (a few seconds) and prints the report. Nothing is guessed from a name or a version:
//! each fact is found by running a few bytes of guest code (see [`scratch`]).
//!
//! Holds: neither hangs. Every entry is under a watchdog's kick, and the complete probe gives up on a KVM that does
//! not come back even then.
//!
//! Not here: acting on what was found.

#![forbid(unsafe_code)]

mod facts;
mod live;
mod measure;
mod report;
#[doc(hidden)]
pub mod scratch;
#[doc(hidden)]
pub mod watchdog;

use std::thread;
use std::time::Duration;

use crate::kvm::{Features, Host, KvmError, KvmExit, Options};

pub use facts::{Translation, TrapRow};
pub use live::ShootdownRow;
pub use measure::{Cost, Speed};
pub use report::{CostRow, DoctorReport, KvmFacts};

/// Why a probe ended early.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM cannot be used, or stopped the vCPU.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The probe's code left the guest in a way that it cannot have.
    #[error("while looking at {what}, the guest left with {exit:x?}")]
    Strange {
        /// What was looked at.
        what: &'static str,
        /// How it left.
        exit: KvmExit,
    },
    /// The time was up.
    #[error("out of time while looking at {what}: this KVM is too slow or too busy to say more")]
    OutOfTime {
        /// What was looked at.
        what: &'static str,
    },
    /// KVM did not come back.
    #[error("KVM has not come back from {what} for {} s, kicks notwithstanding: a bug of this kernel's KVM", .limit.as_secs())]
    Stuck {
        /// What was looked at.
        what: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
}

/// What start-up needs to know.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Quick {
    /// What a vCPU can have.
    pub features: Features,
    /// CPUID traps.
    pub cpuid_faults: bool,
    /// How fast 32-bit code runs.
    pub speed: Speed,
    /// Whether a flush is enough after a change of a page-table entry.
    pub translation: Translation,
    /// Frames that the notifier takes away in the time of one kick; 0 where it is not known, or the notifier not complete.
    pub frames_a_kick: u32,
}

impl Quick {
    /// True where the notifier's return means that a frame is reached no more. KVM does not wait there for a vCPU whose
    /// instruction it emulates, which has been translated and will yet be stored; so it must emulate none: run code
    /// natively, and not keep shadows, which are write-protected.
    pub fn notifier_is_complete(&self) -> bool {
        !self.speed.emulated && self.translation == Translation::FlushSuffices
    }

    /// One line for the user: whether the kvm backend is the better one here, and why.
    pub fn verdict(&self) -> String {
        let speed = self.speed;
        match speed.emulated {
            true => format!("this KVM emulates 32-bit code ({speed}); guests run slowly here"),
            false => format!("this KVM runs 32-bit code natively ({speed})"),
        }
    }
}

/// The probe.
#[derive(Clone, Copy, Debug)]
pub struct Probe;

impl Probe {
    /// Finds out what start-up needs, in some milliseconds.
    ///
    /// # Errors
    /// Why KVM cannot be used here, and what to do about it.
    pub fn quick() -> Result<Quick, ProbeError> {
        Probe::look(false)
    }

    /// The same, and compares the shootdowns where both are safe: a millisecond or two more.
    ///
    /// # Errors
    /// As [`Probe::quick`].
    pub fn quick_with_shootdowns() -> Result<Quick, ProbeError> {
        Probe::look(true)
    }

    fn look(shootdowns: bool) -> Result<Quick, ProbeError> {
        const LIMIT: Duration = Duration::from_millis(500);
        let host = Host::open().map_err(KvmError::from)?;
        let mut scratch = scratch::Scratch::new(&host, Options::default())?;
        let watchdog = watchdog::Watchdog::new(LIMIT);
        watchdog.watch("a first trap", scratch.vcpu.kicker());
        facts::expect_trap("a first trap", scratch.run(&facts::HLT)?, 13)?;
        watchdog.watch("the speed of 32-bit code", scratch.vcpu.kicker());
        let speed = measure::quick_speed(&mut scratch)?;
        watchdog.watch("a changed translation", scratch.vcpu.kicker());
        let translation = facts::translation(&mut scratch)?;
        let (features, cpuid_faults) = (scratch.vcpu.features(), scratch.vcpu.cpuid_faults());
        let mut quick = Quick { features, cpuid_faults, speed, translation, frames_a_kick: 0 };
        if shootdowns && quick.notifier_is_complete() {
            watchdog.watch("the shootdowns", scratch.vcpu.kicker());
            let mut live = live::Live::start(scratch)?;
            // No answer is one, too: kicks are right everywhere.
            quick.frames_a_kick = live.frames_a_kick().unwrap_or(0);
            scratch = live.stop()?;
        }
        // Taking a VM down can cost more than all of the above; nobody needs to wait for it.
        thread::spawn(move || drop(scratch));
        Ok(quick)
    }

    /// Finds out everything, in a few seconds.
    pub fn complete() -> DoctorReport {
        report::examine(Duration::from_secs(10))
    }
}
