//! What the guest and whoever runs it agree on: the exit port, the ELF notes and the witness table.
//!
//! Story: this file is the one source. The crate exports it; `build.rs` turns the same constants into the C header
//! `umbra_abi.h`, so that the two sides cannot drift apart. Holds: all integers are 32-bit little endian.

/// Port of the debug exit (QEMU's `isa-debug-exit`); a 32-bit write of one of the `STATUS_*` values ends the run.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// Every check held.
pub const STATUS_PASS: u32 = 0;
/// A workload found something wrong; the closing line says `verdict=FAIL`.
pub const STATUS_FAIL: u32 = 1;
/// The command line was not understood; nothing was run.
pub const STATUS_COMMAND_LINE: u32 = 2;
/// The kernel itself faulted or lost an invariant; a dump stands before the closing line.
pub const STATUS_PANIC: u32 = 3;

/// Owner name of the ELF notes (without its closing NUL).
pub const NOTE_NAME: &str = "Umbra";
/// Note about the kernel; its descriptor is {[`NOTE_VERSION`], flags}.
pub const NOTE_TYPE_KERNEL: u32 = 1;
/// Note that holds the physical address of the witness table, one integer.
pub const NOTE_TYPE_WITNESS: u32 = 2;
/// Version of the descriptor of [`NOTE_TYPE_KERNEL`].
pub const NOTE_VERSION: u32 = 1;
/// Flag: kernel code avoids what CPL 3 shows differently, so `--supervisor native` is right for it.
pub const NOTE_FLAG_CLEAN: u32 = 1;

/// First word of the witness table: "UMBR" read as bytes in memory order.
pub const WITNESS_MAGIC: u32 = 0x5242_4d55;
/// Most regions that the table holds.
pub const WITNESS_REGIONS_MAX: u32 = 16;
/// Most pages that a region of this kernel has.
pub const WITNESS_PAGES_MAX: u32 = 32;
/// Bytes of a region's name, padded with NUL; a name of full length has none.
pub const WITNESS_NAME_BYTES: u32 = 16;

/// Table: offset of the magic.
pub const WITNESS_OFFSET_MAGIC: u32 = 0;
/// Table: offset of the number of regions published so far.
pub const WITNESS_OFFSET_COUNT: u32 = 4;
/// Table: offset of the first region.
pub const WITNESS_OFFSET_REGIONS: u32 = 8;
/// Region: bytes from one to the next.
pub const WITNESS_REGION_BYTES: u32 = 28;
/// Region: offset of the name.
pub const WITNESS_REGION_NAME: u32 = 0;
/// Region: offset of the number of pages.
pub const WITNESS_REGION_PAGES: u32 = 16;
/// Region: offset of the CRC-32 (IEEE 802.3, reflected, as zlib's) of the pages in order, as the guest computed it.
pub const WITNESS_REGION_CRC32: u32 = 20;
/// Region: offset of the physical address of an array of `pages` guest frame numbers, in the region's order.
pub const WITNESS_REGION_GFN_LIST: u32 = 24;
