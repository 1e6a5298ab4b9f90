//! The Multiboot information structure and all that it points to, as one block.
//!
//! ```text
//!   base: info (116 bytes) | memory map | module list | "Umbra" | command lines
//! ```
//!
//! See: Multiboot specification 0.6.96, section 3.3.

use std::ops::Range;

use umbra_mmu::Gpa;

use crate::board::MemoryMap;

/// Bytes of the structure itself, with all its optional fields.
const INFO_BYTES: usize = 116;
/// Bytes of a memory-map entry, its size field included, and of a module's.
const MMAP_ENTRY_BYTES: usize = 24;
const MODULE_BYTES: usize = 16;
const LOADER_NAME: &str = "Umbra";

/// Which fields of the structure are valid: memory sizes, command line, modules, memory map, loader's name.
const FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;

/// Offsets of the fields that are filled.
mod field {
    pub const FLAGS: usize = 0;
    pub const MEM_LOWER: usize = 4;
    pub const MEM_UPPER: usize = 8;
    pub const CMDLINE: usize = 16;
    pub const MODS_COUNT: usize = 20;
    pub const MODS_ADDR: usize = 24;
    pub const MMAP_LENGTH: usize = 44;
    pub const MMAP_ADDR: usize = 48;
    pub const LOADER_NAME: usize = 64;
}

/// What the block says.
pub(super) struct Info<'a> {
    pub(super) memory: &'a MemoryMap,
    pub(super) command_line: &'a str,
    /// Where each module lies, and its command line.
    pub(super) modules: &'a [(Range<Gpa>, &'a str)],
}

impl Info<'_> {
    /// Bytes of the block.
    pub(super) fn bytes(&self) -> usize {
        let strings = [self.command_line, LOADER_NAME].into_iter().chain(self.modules.iter().map(|m| m.1));
        self.strings_offset() + strings.map(|string| string.len() + 1).sum::<usize>()
    }

    fn modules_offset(&self) -> usize {
        INFO_BYTES + MMAP_ENTRY_BYTES * self.memory.firmware().count()
    }

    fn strings_offset(&self) -> usize {
        self.modules_offset() + MODULE_BYTES * self.modules.len()
    }

    /// The block as it lies at guest-physical `base`.
    pub(super) fn build(&self, base: u32) -> Vec<u8> {
        let mut block = Block { base, bytes: vec![0; self.strings_offset()] };
        block.put(field::FLAGS, FLAGS);
        block.put(field::MEM_LOWER, self.memory.lower_kib());
        block.put(field::MEM_UPPER, self.memory.upper_kib());
        block.put(field::MODS_COUNT, self.modules.len() as u32);
        block.put(field::MODS_ADDR, block.address(self.modules_offset()));
        block.put(field::MMAP_LENGTH, (self.modules_offset() - INFO_BYTES) as u32);
        block.put(field::MMAP_ADDR, block.address(INFO_BYTES));
        self.put_memory_map(&mut block);
        block.put_string(field::LOADER_NAME, LOADER_NAME);
        block.put_string(field::CMDLINE, self.command_line);
        for (number, (range, command_line)) in self.modules.iter().enumerate() {
            let at = self.modules_offset() + MODULE_BYTES * number;
            block.put(at, range.start.0 as u32);
            block.put(at + 4, range.end.0 as u32);
            block.put_string(at + 8, command_line);
        }
        block.bytes
    }

    fn put_memory_map(&self, block: &mut Block) {
        for (number, (range, kind)) in self.memory.firmware().enumerate() {
            let at = INFO_BYTES + MMAP_ENTRY_BYTES * number;
            let length = range.end.0 - range.start.0;
            // The size field does not count itself.
            block.put(at, MMAP_ENTRY_BYTES as u32 - 4);
            block.put(at + 4, range.start.0 as u32);
            block.put(at + 8, (range.start.0 >> 32) as u32);
            block.put(at + 12, length as u32);
            block.put(at + 16, (length >> 32) as u32);
            block.put(at + 20, kind as u32);
        }
    }
}

/// Bytes that know where they will lie.
struct Block {
    base: u32,
    bytes: Vec<u8>,
}

impl Block {
    fn address(&self, offset: usize) -> u32 {
        self.base + offset as u32
    }

    fn put(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Appends a string with its NUL and puts its address at `offset`.
    fn put_string(&mut self, offset: usize, string: &str) {
        self.put(offset, self.address(self.bytes.len()));
        self.bytes.extend(string.as_bytes());
        self.bytes.push(0);
    }
}
