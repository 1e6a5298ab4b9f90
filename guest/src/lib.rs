//! The built-in guest: a 32-bit kernel called `pager`, as ELF images.
//!
//! Story: freestanding C and a little assembly in `src/kernel` and `src/user`, built by `build.rs` with the system C
//! compiler. Each image is a standard Multiboot1 kernel that also runs on QEMU.
#![forbid(unsafe_code)]

pub mod abi;

/// The kernel, with its ELF notes.
pub const PAGER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager.elf"));
/// The same kernel, but that after all its own checks it damages one byte of a witnessed region.
pub const PAGER_TWIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager-twin.elf"));
/// The same kernel without the ELF notes.
pub const PAGER_PLAIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager-plain.elf"));
