//! umbra

pub mod cpu;
pub mod interp;
