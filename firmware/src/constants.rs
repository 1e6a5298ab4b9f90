//! Layout constants: one place for the assembly, the image and the backend.
//!
//! Offsets are from the first byte of the image; the image is mapped linearly at [`UPPER_BASE`], so that an offset
//! plus `UPPER_BASE` is a linear address and an offset plus the image's machine address is a machine address.
//! (The image's own page tables come last and are not mapped.)

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// Index in every root at which the firmware's entry stands.
pub const PML4_SLOT: usize = 256;

/// Linear address of the image: what `PML4[256]` maps. 32-bit code cannot form an address up here.
pub const UPPER_BASE: u64 = 0xffff_8000_0000_0000;

/// The port to which a stub writes: the guest has trapped.
pub const TRAP_PORT: u16 = 0xf0;
/// The port to which the flush stub writes: the TLB is flushed.
pub const FLUSH_PORT: u16 = 0xf1;

/// Offset of the stub of vector 0; stub `v` is at `STUBS + v * STUB_BYTES`.
pub const STUBS: u64 = 0;
/// Bytes from one stub to the next.
pub const STUB_BYTES: u64 = 16;
/// Number of stubs, one for each vector.
pub const VECTORS: u64 = 256;
/// Offset of the flush stub.
pub const FLUSH: u64 = STUBS + VECTORS * STUB_BYTES;
/// Offset of the flush stub's end, a `nop` and its `out`: entered there, it leaves at once. (Not at the `out`: some
/// KVMs finish an `out` at the next entry by stepping over it, if that entry is where the exit was.)
pub const FLUSH_END: u64 = FLUSH + 6;
/// Bytes reserved for code.
pub const CODE_BYTES: u64 = 2 * PAGE;
/// Offset of the interrupt descriptor table, shared by all vCPUs.
pub const IDT: u64 = CODE_BYTES;
/// Bytes in the interrupt descriptor table.
pub const IDT_BYTES: u64 = VECTORS * 16;
/// Offset of the first vCPU's block; block `n` is at `VCPUS + n * VCPU_BYTES`.
pub const VCPUS: u64 = IDT + IDT_BYTES;

/// Vectors for which the CPU pushes an error code: #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP, #VC, #SX.
pub const ERROR_VECTORS: u32 =
    1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

/// Offset of the TSS within a vCPU's block.
pub const VCPU_TSS: u64 = 0;
/// Bytes in a TSS without an I/O map.
pub const TSS_BYTES: u64 = 0x68;
/// Offset of the stack's top within a vCPU's block: the stack shares a page with the TSS and grows towards it.
pub const VCPU_STACK_TOP: u64 = PAGE;
/// Offset of the first descriptor table within a vCPU's block.
pub const VCPU_TABLES: u64 = PAGE;
/// Bytes in each descriptor table: as many as a selector can reach.
pub const TABLE_BYTES: u64 = 0x1_0000;
/// Descriptor tables of a vCPU: GDT and LDT, each for guest-kernel and guest-user mode.
pub const TABLES: u64 = 4;
/// Bytes in a vCPU's block.
pub const VCPU_BYTES: u64 = VCPU_TABLES + TABLES * TABLE_BYTES;
/// Most vCPUs that an image can hold.
pub const VCPUS_MAX: u32 = 64;

/// Bytes of the frame that a stub leaves: vector, error code, RIP, CS, RFLAGS, RSP, SS.
pub const FRAME_BYTES: u64 = 7 * 8;

/// Selector of the task register's descriptor, the last two entries of each GDT.
pub const TSS_SELECTOR: u16 = 0xfff0;
/// Selector of the firmware's 64-bit code segment.
pub const CODE_SELECTOR: u16 = 0xffe8;
/// An entry kept free: it is the firmware's code segment while a test opens the door to [`CODE_SELECTOR`].
pub const SPARE_SELECTOR: u16 = 0xffe0;
/// The first byte of each GDT that is the firmware's; the guest's descriptors end here.
pub const FIRMWARE_SELECTORS: u16 = SPARE_SELECTOR;

const _: () = assert!(FLUSH + 16 <= CODE_BYTES);
const _: () = assert!(VCPU_TSS + TSS_BYTES < VCPU_STACK_TOP - 1024);
