//! Many simulations, or one that is looked at: `umbra simulate`.
//!
//! Story: a seed is a run (`umbra run --deterministic --seed N`). A sweep starts one for each seed of a range, some at a time, each in
//! a process of its own, which may end as it likes: by a status, by a signal, or not at all. The first that does not end with 0 ends
//! the sweep, and the way to run it again is said. A replay runs one and shows its event log as a timeline.
//!
//! | file | its job |
//! |---|---|
//! | args | the command line, and whether it makes sense |
//! | sweep | processes, and what came of them |
//! | timeline | an event log as columns |
//!
//! Holds: what a sweep finds hangs on its seeds alone, not on how many run at a time: of the seeds that fail it is the lowest. It leaves
//! no process behind.
//!
//! Not here: the simulation itself, which is `vm::simulation`.

#![forbid(unsafe_code)]

pub mod args;
mod sweep;
mod timeline;

pub use args::SimulateArgs;
pub use sweep::{Failed, Report, SweepError, replay, run};
