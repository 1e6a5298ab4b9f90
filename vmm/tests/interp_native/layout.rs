//! What lies where below 4 GiB, in the native process and in its twin.
//!
//! ```text
//! STAGE   1 page   read, execute   the way in: loads a case's registers (not part of the twin)
//! CODE    2 pages  read, execute   the case, in a sea of INT3; a hole on either side
//! DATA    3 pages  two writable, the last read-only; a hole on either side
//! ```
//!
//! Holds: nothing else is mapped below 4 GiB, on either side.

pub const PAGE: usize = 4096;

pub const STAGE: u32 = 0x1000_0000;
/// Where in the stage's page the registers to load stand.
pub const STAGE_STATE: u32 = 0x800;

pub const CODE: u32 = 0x1010_0000;
pub const CODE_SIZE: usize = 2 * PAGE;
/// What code pages are full of: INT3 ends a case.
pub const CODE_FILLER: u8 = 0xcc;

pub const DATA: u32 = 0x1020_0000;
pub const DATA_SIZE: usize = 3 * PAGE;
/// The first page of the data that cannot be written.
pub const DATA_READ_ONLY: u32 = DATA + 2 * PAGE as u32;

/// Selectors of Linux: 32-bit and 64-bit user code, user data.
pub const USER32_CODE: u16 = 0x23;
pub const USER64_CODE: u16 = 0x33;
pub const USER_DATA: u16 = 0x2b;

/// Entries of the local descriptor table.
pub const LDT_ENTRIES: usize = 32;
