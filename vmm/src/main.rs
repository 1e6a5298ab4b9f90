//! The `umbra` program.
fn main() {}
