//! Measuring invalidations: `umbra measure`.
//!
//! Story: a guest runs in this process, and beside it a thread takes pages from it, at times that are settled beforehand. The
//! MMU leaves a record of each invalidation; from these, and from the clock around each call, come the numbers.
//!
//! | file | its job |
//! |---|---|
//! | args | the command line, and whether it makes sense |
//! | guest | the guest that does not mind |
//! | schedule | when to begin |
//! | causes | what is done then, and to which pages |
//! | importers | processes that have those pages too |
//! | floors | what it could not do without |
//! | collect | histograms, by cause and phase, in all and by interval |
//! | session | all of it, beside the running guest |
//! | report | what came of it, in words and in JSON |
//! | compare | two of them beside each other |
//! | page | one of them with plots, in HTML |
//! | files | where it is written |
//!
//! Holds: memory is bounded, whatever the rate and however long it takes. A start is not put off because the one before has not
//! ended: it is late, and the time that it was late is among its response time.

#![forbid(unsafe_code)]

pub mod args;
mod causes;
mod collect;
pub mod compare;
mod files;
mod floors;
mod guest;
mod importers;
mod page;
mod report;
mod schedule;
mod session;

pub use args::{MeasureArgs, Order};
pub use files::Files;
pub use importers::{COMMAND, ImporterArgs, serve};
pub use report::Report;

use std::num::NonZeroU64;

use crate::status::Status;
use crate::vm::{self, RunError, Screen};
use collect::Collected;
use session::{Session, Stop};

/// Has this thread, and those that it starts, woken when their time has come, and not some time after. Where the host does not do so,
/// they are later.
fn precise_sleep() {
    if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
        log::warn!("the host's timers are as exact as they are: {error}");
    }
}

/// All that a measurement leaves.
#[derive(Clone, Debug)]
pub struct Measured {
    /// What it came to.
    pub report: Report,
    /// The histograms.
    all: Collected,
    /// The same by interval, as they are logged.
    log: Vec<u8>,
}

/// Measures as `order` has it; `interrupts` counts those who want it to end. What came of it, and the program's status.
///
/// # Errors
///
/// When the guest could not be started.
pub fn run(
    order: &Order,
    screen: &Screen,
    interrupts: &(dyn Fn() -> u32 + Sync),
) -> Result<(Measured, Status), RunError> {
    let mut session = Session::new(order, interrupts).map_err(RunError::Setup)?;
    let run = session.run();
    let summary = vm::run_beside(&run, screen, order.guest.as_ref(), &mut session)?;
    let findings = session.findings.unwrap_or_default();
    let status = match findings.why {
        // The audit has the last word.
        _ if !summary.audit.is_empty() => Status::Failure,
        Stop::Done => Status::Pass,
        Stop::Interrupted => Status::Quit,
        Stop::NotSettled | Stop::NoImporters | Stop::NoStart => Status::Failure,
        Stop::GuestEnded => summary.exit,
    };
    let report = Report::new(order, &findings, &summary);
    Ok((Measured { report, all: findings.all, log: findings.log }, status))
}
