//! Why an image cannot be booted: what was found where, with which numbers, and what to do.

use std::fmt;

use umbra_mmu::Gpa;

use super::load::MemoryError;
use super::{COMMAND_LINE_BYTES_MAX, HEADER_SEARCH_BYTES, IMAGE_BYTES_MAX, MODULES_MAX, PROGRAM_HEADERS_MAX};

/// Something that is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A program header's segment, by its number in the image.
    Segment(usize),
    /// The one segment of an a.out-style image.
    Body,
    /// A module, by its number on the command line.
    Module(usize),
    /// The info structure with its memory map, module list and strings.
    Info,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Segment(number) => write!(f, "segment {number}"),
            Part::Body => write!(f, "the kernel's body"),
            Part::Module(number) => write!(f, "module {number}"),
            Part::Info => write!(f, "the Multiboot info block"),
        }
    }
}

/// Why an image cannot be parsed or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Over [`IMAGE_BYTES_MAX`].
    #[error(
        "the image has {bytes} bytes, more than the {IMAGE_BYTES_MAX} that are loaded; strip it of its symbols"
    )]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// No magic number.
    #[error(
        "no Multiboot header in the first {searched} bytes (magic 0x1badb002 at a multiple of 4); \
         only Multiboot1 kernels can be booted, and their header must lie within {HEADER_SEARCH_BYTES} bytes"
    )]
    NoHeader {
        /// Bytes that were searched.
        searched: usize,
    },
    /// The magic number is there, but the three words do not add up to zero.
    #[error(
        "the Multiboot header at offset {offset:#x} has flags {flags:#x} and checksum {checksum:#x}, \
         which with the magic number must add up to 0; the checksum should be {expected:#x}"
    )]
    Checksum {
        /// Where the magic number is.
        offset: usize,
        /// The second word.
        flags: u32,
        /// The third word.
        checksum: u32,
        /// What the third word should be.
        expected: u32,
    },
    /// The header's address fields are cut off.
    #[error(
        "the Multiboot header at offset {offset:#x} promises address fields (bit 16), but ends after the image's or \
         the search area's last byte; move it further to the front"
    )]
    HeaderCutOff {
        /// Where the magic number is.
        offset: usize,
    },
    /// Bits 3..=15 ask for what no loader knows.
    #[error(
        "the Multiboot header's flags {flags:#x} demand features {unknown:#x} that are not known; clear these bits"
    )]
    UnknownDemands {
        /// All flags.
        flags: u32,
        /// Those unknown.
        unknown: u32,
    },
    /// Neither ELF nor a.out fields.
    #[error(
        "the image is not ELF, and its Multiboot header gives no load addresses (bit 16); build it as 32-bit ELF"
    )]
    NoFormat,
    /// An ELF file of another kind.
    #[error("the ELF image is {found}; it must be a 32-bit little-endian i386 executable at fixed addresses")]
    ElfKind {
        /// What it is.
        found: String,
    },
    /// An ELF file with nonsense in its headers.
    #[error("the ELF image is damaged: {reason}")]
    ElfDamaged {
        /// What the parser says.
        reason: String,
    },
    /// Over [`PROGRAM_HEADERS_MAX`].
    #[error(
        "the ELF image has {count} program headers, more than {PROGRAM_HEADERS_MAX}; link it with fewer segments"
    )]
    TooManyProgramHeaders {
        /// How many.
        count: usize,
    },
    /// Not a byte to load.
    #[error("the image has nothing to load: no PT_LOAD segment with a size")]
    Empty,
    /// A segment's bytes are not in the file.
    #[error(
        "{part} has {bytes} bytes at offset {offset:#x}, beyond the image's {image_bytes}; the image is truncated"
    )]
    BeyondImage {
        /// Which.
        part: Part,
        /// Offset in the image.
        offset: u64,
        /// Bytes from there.
        bytes: u64,
        /// Size of the image.
        image_bytes: usize,
    },
    /// More bytes in the file than in memory.
    #[error(
        "{part} has {file_bytes} bytes in the image but only {memory_bytes} in memory; the image is damaged"
    )]
    Shrinks {
        /// Which.
        part: Part,
        /// Bytes in the file.
        file_bytes: u64,
        /// Bytes in memory.
        memory_bytes: u64,
    },
    /// The header's address fields contradict each other.
    #[error(
        "the Multiboot header's addresses contradict each other: {rule} (header {header:#x}, load {load:#x} to \
         {load_end:#x}, bss to {bss_end:#x})"
    )]
    HeaderAddresses {
        /// The rule they break.
        rule: &'static str,
        /// `header_addr`.
        header: u32,
        /// `load_addr`.
        load: u32,
        /// `load_end_addr`.
        load_end: u32,
        /// `bss_end_addr`.
        bss_end: u32,
    },
    /// The entry point is in no segment.
    #[error("the entry point {entry:#x} lies in no loaded segment; check the linker script's ENTRY")]
    EntryOutside {
        /// The address as the image gives it.
        entry: u32,
    },
    /// Memory that the guest does not have, or that is reserved.
    #[error(
        "{part} wants guest-physical {start:#x} to {end:#x}, outside usable memory (0 to {low_end:#x} and {high_start:#x} \
         to {high_end:#x}); give the guest more memory or link the kernel lower"
    )]
    OutsideMemory {
        /// Which.
        part: Part,
        /// First byte.
        start: u64,
        /// After its last byte.
        end: u64,
        /// Where conventional memory ends.
        low_end: u64,
        /// Where extended memory begins.
        high_start: u64,
        /// Where it ends.
        high_end: u64,
    },
    /// Two things in one place.
    #[error("{part} at guest-physical {start:#x} to {end:#x} overlaps {other}; the image is damaged")]
    Overlap {
        /// The later.
        part: Part,
        /// First byte.
        start: u64,
        /// After its last byte.
        end: u64,
        /// The earlier.
        other: Part,
    },
    /// No gap is large enough.
    #[error("no room for {part} of {bytes} bytes below {high_end:#x}; give the guest more memory")]
    NoRoom {
        /// Which.
        part: Part,
        /// Its size.
        bytes: u64,
        /// Where low memory ends.
        high_end: u64,
    },
    /// Over [`MODULES_MAX`].
    #[error("{count} modules, more than {MODULES_MAX}; pack some into one")]
    TooManyModules {
        /// How many.
        count: usize,
    },
    /// Over [`COMMAND_LINE_BYTES_MAX`].
    #[error("a command line of {bytes} bytes is longer than {COMMAND_LINE_BYTES_MAX}; shorten it")]
    CommandLineTooLong {
        /// Its length.
        bytes: usize,
    },
    /// C strings end at their first NUL.
    #[error("a command line has a NUL character at byte {at}, where the guest would stop reading; remove it")]
    CommandLineNul {
        /// Where.
        at: usize,
    },
    /// A note of ours that we cannot read.
    #[error(
        "the image's Umbra note of type {note} is not understood: {reason}; rebuild the image for this Umbra"
    )]
    Note {
        /// Its type.
        note: u32,
        /// What is wrong.
        reason: String,
    },
    /// Guest memory did not take it.
    #[error("writing {part} of {bytes} bytes to guest-physical {gpa} failed")]
    Write {
        /// Which.
        part: Part,
        /// Where.
        gpa: Gpa,
        /// How much.
        bytes: u64,
        /// Why.
        source: MemoryError,
    },
}
