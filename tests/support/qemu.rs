//! QEMU's `microvm` as the peer: the same image, on a board that is not ours.
//!
//! See: docs/manual.md for the board; QEMU's own docs, system/i386/microvm.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::NamedTempFile;

use super::process::{self, Outcome};

/// Long enough for the slowest workload on two busy cores.
const LIMIT: Duration = Duration::from_secs(120);

/// The disks that our guest looks for, by serial number, and their bytes.
const DISKS: [(&str, u64); 2] = [("swap", 256 << 20), ("file", 16 << 20)];

/// Boots `image` with `cmdline` on QEMU's software emulation, with two empty disks and a balloon; `mem` as QEMU writes sizes ("64M").
pub fn run(image: &Path, cmdline: &str, mem: &str) -> Result<Outcome, String> {
    run_with_disks(image, cmdline, mem, "cache=unsafe")
}

/// The same with a further option for the drives behind its disks.
pub fn run_with_disks(image: &Path, cmdline: &str, mem: &str, option: &str) -> Result<Outcome, String> {
    run_with(image, cmdline, mem, option, &[])
}

/// The same with a third disk, named `ro`, of which the guest may only read `file`.
pub fn run_with_read_only(image: &Path, cmdline: &str, mem: &str, file: &Path) -> Result<Outcome, String> {
    let drive = format!("if=none,id=ro,format=raw,readonly=on,file={}", file.display());
    let more = ["-drive", &drive, "-device", "virtio-blk-device,drive=ro,serial=ro"];
    run_with(image, cmdline, mem, "cache=unsafe,discard=unmap", &more)
}

fn run_with(image: &Path, cmdline: &str, mem: &str, option: &str, more: &[&str]) -> Result<Outcome, String> {
    let files = DISKS.map(|(_, bytes)| disk(bytes));
    let mut command = Command::new("qemu-system-i386");
    // The default CPU model has neither NX nor SMEP, which Umbra's CPU has.
    command.args(["-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", mem]);
    command.args(["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot", "-serial", "stdio"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
    // The guest's driver knows no other transport.
    command.args(["-global", "virtio-mmio.force-legacy=false"]);
    for ((serial, _), file) in DISKS.iter().zip(&files) {
        let path = file.as_ref().map_err(String::clone)?.path().display();
        command.arg("-drive").arg(format!("if=none,id={serial},format=raw,{option},file={path}"));
        command.arg("-device").arg(format!("virtio-blk-device,drive={serial},serial={serial}"));
    }
    command.args(["-device", "virtio-balloon-device,deflate-on-oom=on,free-page-reporting=on"]);
    command.args(more);
    command.arg("-kernel").arg(image).args(["-append", cmdline]);
    process::run(&mut command, LIMIT)
}

/// An empty file of that size, sparse.
fn disk(bytes: u64) -> Result<NamedTempFile, String> {
    let file = NamedTempFile::new().map_err(|error| format!("no temporary file: {error}"))?;
    file.as_file().set_len(bytes).map_err(|error| format!("sizing a disk: {error}"))?;
    Ok(file)
}
