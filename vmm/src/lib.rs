//! Umbra: a VMM whose MMU lives in userspace.
//!
//! See docs/ARCHITECTURE.md for the map.

mod barrier;
pub mod board;
pub mod boot;
#[forbid(unsafe_code)]
pub mod child;
pub mod cli;
pub mod cpu;
#[forbid(unsafe_code)]
pub mod export;
pub mod host_fpu;
#[forbid(unsafe_code)]
pub mod import;
#[forbid(unsafe_code)]
pub mod interp;
pub mod kvm;
pub mod machine;
pub mod measure;
#[forbid(unsafe_code)]
mod output;
#[forbid(unsafe_code)]
pub mod plot;
pub mod pressure;
pub mod probe;
pub mod scenario;
pub mod signals;
pub mod simulate;
mod socket;
pub mod status;
pub mod swap;
pub mod units;
pub mod virtio;
pub mod vm;
