//! The interpreter: one instruction on an architectural CPU state, through a bus that is the guest's MMU.

pub mod bus;

pub use bus::{Bus, BusError, Exception, Width};
