//! The host probe.

#![forbid(unsafe_code)]

#[doc(hidden)]
pub mod scratch;
