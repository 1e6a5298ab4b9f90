//! Unit tests of the interpreter, on the flat bus.
//!
//! What user instructions compute is tested against the CPU, in `tests/interp_native` and `tests/fpu_native`; here are privilege,
//! segments, delivery, restarts and whatever else has no native twin.

mod data;
mod debug;
mod decimal;
mod deliver;
mod far;
mod fetch;
mod fpu;
mod load;
pub(super) mod machine;
mod order;
mod random;
mod real;
mod restart;
mod segment;
mod string;
mod system;
