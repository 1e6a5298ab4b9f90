//! QEMU's `microvm` as the peer: the same image, on a board that is not ours.
//!
//! See: docs/manual.md for the board; QEMU's own docs, system/i386/microvm.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::process::{self, Outcome};

/// Long enough for the slowest workload on two busy cores.
const LIMIT: Duration = Duration::from_secs(120);

/// Boots `image` with `cmdline` on QEMU's software emulation; `mem` as QEMU writes sizes ("64M").
pub fn run(image: &Path, cmdline: &str, mem: &str) -> Result<Outcome, String> {
    let mut command = Command::new("qemu-system-i386");
    // The default CPU model has neither NX nor SMEP, which Umbra's CPU has.
    command.args(["-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", mem]);
    command.args(["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot", "-serial", "stdio"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
    command.arg("-kernel").arg(image).args(["-append", cmdline]);
    process::run(&mut command, LIMIT)
}
