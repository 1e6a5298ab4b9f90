//! The guest that the tests run: which frames are tables, which linear addresses it uses, and how a kernel of it
//! edits an entry.
//!
//! Frames 0..[`LOW_PAGES`] are mapped at [`LOW`] in every address space, for the kernel alone: that is how the guest
//! reaches its own tables. Both formats have tables of their own, in frames of their own:
//!
//! | frames | two-level | PAE |
//! |---|---|---|
//! | directories | 1, 2 | 9, 10; 11 at 3 GiB, shared by all |
//! | tables | 3 for LOW, 4..8 | 12 for LOW, 13..16 |
//! | PDPTEs | | 8, at 0x00, 0x20 and 0x40 |
//!
//! Frames from 16 on are data. A store may make any of them anything else.

use super::memory::Memory;
use super::walker::{self, Control, Entry, EntryAt};
use super::world::World;

/// Frames that the kernel's linear map covers.
pub const LOW_PAGES: u32 = 48;
/// Where it begins.
pub const LOW: u32 = 0xc000_0000;
/// Pages of guest memory: enough for the start of a second 4 MiB page; most are never touched.
pub const GUEST_PAGES: u32 = 1100;

/// What CR3 may be loaded with: four that work, then a table, a data page, and nothing at all.
pub const CR3S: [u32; 8] = [0x1000, 0x2000, 0x8000, 0x8020, 0x8040, 0x4000, 0x14000, 0x7fff_f000];

/// Parts of linear addresses: the 2 MiB region, and the page in it.
const REGIONS: [u32; 6] = [0, 0x20_0000, 0x40_0000, 0x4000_0000, LOW, 0xffc0_0000];
const PAGES: [u32; 6] = [0, 0x1000, 0x5000, 0x1f_f000, 0x20_0000, 0x3f_f000];
/// Of these the last three are not aligned: over two words, over two entries, over two pages.
const OFFSETS: [u32; 7] = [0, 4, 0x7f8, 0xffc, 2, 6, 0xffe];

/// Frames that an entry may point to beside the low ones: large pages, memory nobody has touched, none at all.
const FAR_FRAMES: [u64; 8] = [0, 0x200, 0x201, 0x400, 0x405, 0x44c, 0xf_ffff, 0xff_ffff];

/// The page that `n` chooses.
pub fn page(n: u8) -> u32 {
    REGIONS[usize::from(n) % 6].wrapping_add(PAGES[usize::from(n) / 6 % 6])
}

/// The byte offset in a page that `n` chooses.
pub fn offset(n: u8) -> u32 {
    OFFSETS[usize::from(n) % 7]
}

/// Entry bits as the tests name them; NX and the reserved bit are where the format has them.
pub const P: u16 = 1;
pub const W: u16 = 1 << 1;
pub const U: u16 = 1 << 2;
pub const A: u16 = 1 << 5;
pub const D: u16 = 1 << 6;
pub const PS: u16 = 1 << 7;
pub const G: u16 = 1 << 8;
pub const NX: u16 = 1 << 9;
pub const RSVD: u16 = 1 << 10;

/// An entry of either format.
pub fn entry(pae: bool, frame: u8, bits: u16) -> u64 {
    let frame = match u64::from(frame) {
        low @ 0..48 => low,
        far => FAR_FRAMES[far as usize % 8],
    };
    let set = |bit: u16, value: u64| if bits & bit != 0 { value } else { 0 };
    let low = u64::from(bits & 0x1ff);
    if pae {
        // A large page's low frame bits are reserved: keep them out unless the test asks for that.
        let frame = if bits & PS != 0 { frame & !0x1ff } else { frame };
        frame << 12 | low | set(NX, 1 << 63) | set(RSVD, 1 << 40)
    } else {
        let frame = if bits & PS != 0 { frame & !0x3ff } else { frame };
        (frame << 12 | low | set(RSVD, 1 << 21)) & 0xffff_ffff
    }
}

/// The entry of `level` (2: directory, 1: table) that decides `va` now.
pub fn entry_for(memory: &Memory, c: &Control, va: u32, level: u8) -> Option<EntryAt> {
    let directory = walker::directory_entry_at(c, va)?;
    if level == 2 {
        return Some(directory);
    }
    match walker::directory_entry(c, memory.read(directory.address, directory.size)) {
        Entry::Table { address, .. } => Some(walker::table_entry_at(c, address, va)),
        _ => None,
    }
}

/// The entry for `va` in the frame `table`, were it one of `level`.
pub fn entry_in(c: &Control, table: u32, va: u32, level: u8) -> EntryAt {
    let base = u64::from(table) << 12;
    match (c.pae, level) {
        (true, 2) => EntryAt { address: base + u64::from(va >> 21 & 511) * 8, size: 8 },
        (false, 2) => EntryAt { address: base + u64::from(va >> 22) * 4, size: 4 },
        _ => walker::table_entry_at(c, base, va),
    }
}

/// Writes the tables above into an empty world. Every data page gets a word that tells it from the others.
pub fn build(world: &mut World) {
    let mut put = |frame: u32, index: u32, size: u32, value: u64| {
        let bytes = value.to_le_bytes();
        let at = u64::from(frame) << 12 | u64::from(index * size);
        world.device_write(at, &bytes[..size as usize]);
    };
    let two = |frame, bits| entry(false, frame, bits);
    let pae = |frame, bits| entry(true, frame, bits);
    let user = P | W | U;
    for directory in [1, 2] {
        put(directory, 0, 4, two(4 + (directory == 2) as u8, user));
        put(directory, 1, 4, two(6, user));
        put(directory, 256, 4, two(7, user));
        put(directory, 768, 4, two(3, P | W));
        put(directory, 1023, 4, two(1, P | W));
    }
    for (index, directory) in [(0, 9), (4, 10), (8, 9)] {
        put(8, index, 8, pae(directory, P));
        put(8, index + 1, 8, pae(10, P));
        put(8, index + 3, 8, pae(11, P));
    }
    for directory in [9, 10] {
        put(directory, 0, 8, pae(13 + (directory == 10) as u8, user));
        put(directory, 1, 8, pae(15, user));
        put(directory, 2, 8, pae(14, user));
    }
    put(11, 0, 8, pae(12, P | W));
    put(11, 510, 8, pae(15, P | W));
    put(11, 511, 8, pae(11, P | W));
    for frame in 0..LOW_PAGES {
        put(3, frame, 4, two(frame as u8, P | W));
        put(12, frame, 8, pae(frame as u8, P | W));
    }
    for frame in 16..LOW_PAGES {
        for n in 0..4 {
            put(frame, offset(n) / 4, 4, u64::from(frame << 24 | 0xda_7a00 | u32::from(n)) & !1);
        }
    }
    for (table, first) in [(4, 16), (5, 20), (6, 24), (7, 28)] {
        put(table, 0, 4, two(first, user));
        put(table, 1, 4, two(first + 1, user | A));
        put(table, 5, 4, two(first + 2, user | A | D));
        put(table, 1023, 4, two(first + 3, P | U));
    }
    for (table, first) in [(13, 16), (14, 20), (15, 24)] {
        put(table, 0, 8, pae(first, user));
        put(table, 1, 8, pae(first + 1, user | A | NX));
        put(table, 5, 8, pae(first + 2, user | A | D));
        put(table, 511, 8, pae(first + 3, P | U));
    }
}
