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
//! | floors | what it could not do without |
//! | collect | histograms, by cause and phase, in all and by interval |
//! | session | all of it, beside the running guest |
//! | report | what came of it, in words and in JSON |
//! | files | where it is written |
//!
//! Holds: memory is bounded, whatever the rate and however long it takes. A start is not put off because the one before has not
//! ended: it is late, and the time that it was late is among its response time.

#![forbid(unsafe_code)]

pub mod args;
mod causes;
mod collect;
mod files;
mod floors;
mod guest;
mod report;
mod schedule;
mod session;

pub use args::{MeasureArgs, Order};
pub use files::Files;
pub use report::Report;

use crate::status::Status;
use crate::vm::{self, RunError, Screen};
use session::{Session, Stop};

/// Measures as `order` has it; `interrupts` counts those who want it to end. What came of it, and the program's status.
///
/// # Errors
///
/// When the guest could not be started.
pub fn run(
    order: &Order,
    screen: &Screen,
    interrupts: &(dyn Fn() -> u32 + Sync),
) -> Result<(Report, Status), RunError> {
    let mut session = Session::new(order, interrupts).map_err(RunError::Setup)?;
    let summary = vm::run_beside(&order.run, screen, order.guest.as_ref(), &mut session)?;
    let findings = session.findings.unwrap_or_default();
    let status = match findings.why {
        // The audit has the last word.
        _ if !summary.audit.is_empty() => Status::Failure,
        Stop::Done => Status::Pass,
        Stop::Interrupted => Status::Quit,
        Stop::NotSettled => Status::Failure,
        Stop::GuestEnded => summary.exit,
    };
    Ok((Report::new(order, &findings, &summary), status))
}
