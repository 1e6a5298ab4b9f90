//! Pressure on a running guest: `umbra pressure`.
//!
//! Story: over its control socket a guest is asked for memory, by its balloon or by its budget, all at once or over time; or its
//! pages are discarded. Each 100 ms it is looked at, until it has come to what was asked of it, or there is no more time; then
//! the numbers say why.
//!
//! | file | its job |
//! |---|---|
//! | args | the command line, and whether it makes sense |
//! | plan | what is asked over time |
//! | client | the guest: what is set, what is seen |
//! | watch | asking and looking, to the end |
//! | clock | the time that it goes by |
//! | judge | why it was not reached |
//! | progress | how far it is |
//!
//! Holds: it ends in time, whatever the server does: by the time limit, the patience with one answer, and [`SET_BACK`]. Who
//! interrupts it finds the guest asked for what it was asked for before.

#![forbid(unsafe_code)]

pub mod args;
pub mod client;
pub mod clock;
pub mod judge;
pub mod plan;
pub mod progress;
#[cfg(test)]
mod tests;
mod watch;

pub use args::PressureArgs;
pub use watch::{End, Report, SET_BACK, run};
