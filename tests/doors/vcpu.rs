//! Entering and leaving the guest.

use umbra::kvm::{Host, KvmExit, Options};
use umbra::probe::scratch::Scratch;

use crate::Body;

/// Every test.
pub const ALL: &[(&str, Body)] = &[("kvm_hlt_is_a_trap", hlt_is_a_trap)];

fn hlt_is_a_trap(host: &Host) -> Result<(), String> {
    let mut scratch = Scratch::new(host, Options::default()).map_err(|error| error.to_string())?;
    let exit = scratch.run(&[0xf4]).map_err(|error| error.to_string())?;
    match exit {
        KvmExit::Trap { vector: 13, error: 0, .. } => Ok(()),
        other => Err(format!("{other:?}")),
    }
}
