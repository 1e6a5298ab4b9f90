//! The built-in guest: a 32-bit kernel called `pager`, as ELF images.
//!
//! Story: freestanding C and a little assembly, built by `build.rs` with the system C compiler (`cc`, or what
//! `UMBRA_GUEST_CC` names). The kernel is in `src/kernel`, its user programs in `src/user`; start reading at
//! `kernel/boot.S`, `kernel/main.c` and `kernel/layout.h`. Each image is a standard Multiboot1 kernel, loaded at 1 MiB.
//! Twins are the same kernel with a mistake, which is to be found.
//!
//! # Command line
//!
//! Words of the form `key=value`; a first word without `=` is the image's name and ignored. A word that is not known is said
//! and ends the run with [`abi::STATUS_COMMAND_LINE`].
//!
//! | word | meaning | default |
//! |---|---|---|
//! | `workload=` | `all` (`hello`, `mm`, `kmap`), one of those, `access`, `spin`, `sweep`, `storm`, `mix`, `fpu`, `huge`, or `oops` (a fault in kernel code, to see its dump); docs/manual.md says what each does | `all` |
//! | `paging=` | `pae` or `legacy` (two levels, 4 MiB pages) | `pae` |
//! | `seed=` | of all patterns and samples, 0..=999999999 | 1 |
//! | `scale=` | percent of the default work, 1..=4000 | 100 |
//! | `lowmem=` | MiB of low memory, 4..=512 in steps of 4; all above is high memory | 8 |
//! | `hz=` | timer interrupts a second, 1..=1000 | 100 |
//! | `pace=` | how much `reclaim` does and compares: `slow`, `fast`, or `auto`, by the CPU's measured speed | `auto` |
//! | `allow=` | quirks that `access` (`rsvd-no-p`, `rmw-read`) and `fpu` (`no-xm`, `mxcsr-any`) are to count but not to call errors, with commas | none |
//!
//! # What it prints
//!
//! Lines on the serial port 0x3f8. Around what is there to be timed stand `time: begin <phase> <unit>=<count>` and `time: end
//! <phase> tsc1024=<n>`; no other line holds a time, or anything that differs between machines of one memory size and one
//! command line. Results are `pager: <workload> <key>=<value> ...`; the last line is always
//!
//! ```text
//! pager: verdict=PASS workload=all paging=pae checks=1020 errors=0
//! ```
//!
//! or the same with `verdict=FAIL`; then the kernel writes one of [`abi::STATUS_PASS`], [`abi::STATUS_FAIL`],
//! [`abi::STATUS_COMMAND_LINE`], [`abi::STATUS_PANIC`] to port [`abi::DEBUG_EXIT_PORT`] (QEMU ends with twice that, plus one).
//!
//! # Witnesses
//!
//! A verdict of the guest's own is one witness. The table that [`abi::NOTE_TYPE_WITNESS`] leads to names regions of
//! memory, their frames and the CRC that the guest found; whoever runs it may read the same frames and compare. From the
//! closing line on nothing changes them. [`PAGER_TWIN`] damages one byte after all of the guest's checks.
//!
//! # On QEMU
//!
//! QEMU's `microvm` loads the image by itself, with its default firmware; no other option is needed (seen with 7.2, TCG):
//!
//! ```text
//! qemu-system-i386 -M microvm -cpu max -m 64 -kernel pager.elf -append "workload=all" \
//!     -serial stdio -display none -no-reboot -device isa-debug-exit,iobase=0xf4,iosize=0x04
//! ```
//!
//! `workload=access` needs `allow=rsvd-no-p,rmw-read` to pass there: TCG reports a reserved bit without P, and the read of an
//! unlocked read-modify-write as a read. `workload=fpu` needs `allow=no-xm,mxcsr-any`: it raises no SSE exception.
//!
//! Limits: one CPU. Only workload `fpu` has an FPU; elsewhere x87 in user code is #NM. A kernel stack that overflows ends in a triple fault.
#![forbid(unsafe_code)]

pub mod abi;

/// The kernel, with its ELF notes.
pub const PAGER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager.elf"));
/// The same kernel, but that after all its own checks it damages one byte of a witnessed region.
pub const PAGER_TWIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager-twin.elf"));
/// The same kernel without the ELF notes.
pub const PAGER_PLAIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager-plain.elf"));
/// The same kernel, but that a few pages come back from swap as zeros.
pub const PAGER_ZEROS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager-zeros.elf"));
/// The same kernel, but that a few pages come back from swap as others.
pub const PAGER_OTHER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager-other.elf"));
/// The same kernel, but that it allocates under the file system's lock without the scope that keeps reclaim from wanting it.
pub const PAGER_NO_SCOPE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager-no-scope.elf"));
