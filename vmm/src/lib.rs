//! umbra

pub mod board;
pub mod boot;
pub mod cpu;
#[forbid(unsafe_code)]
pub mod interp;
pub mod kvm;
pub mod machine;
pub mod probe;
pub mod units;
