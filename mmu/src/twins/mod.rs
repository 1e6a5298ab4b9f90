//! What stands in for the outside in memory: for tests, model checkers and the scenes of `umbra scenario`.
//!
//! | twin | of |
//! |---|---|
//! | [`SoftCpu`] | a vCPU's thread, with a software TLB |
//! | [`Importers`] | importers' processes, and the socket between |
//!
//! The swap device's stands beside its trait ([`crate::swap::MemorySwap`]).

mod cpu;
mod importers;

pub use cpu::{Kick, SoftCpu};
pub use importers::{Importer, Importers, Manner, Pace, Yields};
