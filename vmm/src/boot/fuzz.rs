//! Entry points for fuzzers: hostile images, and hostile witness tables.
//!
//! Holds: each panics exactly if the code under test has broken its word, so that any fuzzer or property test can
//! drive it with plain bytes.

use std::ops::Range;

use umbra_mmu::{Gpa, PAGE_SIZE};

use crate::board::MemoryMap;

use super::{BootRequest, Entry, GuestMemorySink, Image, ImageError, MemoryError, Module, witness};

/// What a fuzzer calls: parses `bytes` as an image and loads it into a guest of 16 MiB whose memory checks every
/// write. Panics if the loader breaks its word.
pub fn image(bytes: &[u8]) {
    let Ok(memory) = MemoryMap::new(16 << 20) else { return };
    let module = Module { command_line: "module", data: &bytes[..bytes.len().min(10_000)] };
    image_for(bytes, &BootRequest { memory, command_line: "fuzz", modules: &[module] }, None);
}

/// The same for any guest. Memory refuses the write (or clearing) number `refused`, counted from 0, if there is one.
pub fn image_for(bytes: &[u8], request: &BootRequest<'_>, refused: Option<usize>) {
    let Ok(image) = Image::parse(bytes) else { return };
    let mut sink = CheckedSink { refused, ..CheckedSink::new(request.memory) };
    match image.load(&mut sink, request) {
        Ok(entry) => {
            assert!(!sink.has_refused(), "memory that cannot be written is an error");
            sink.check_entry(&entry, request);
        }
        Err(ImageError::Write { .. }) => assert!(sink.has_refused(), "no write was refused"),
        Err(_) => assert!(sink.is_untouched(), "an image that is refused leaves no trace"),
    }
}

/// What a fuzzer calls: takes `bytes` for guest memory with a table at its start.
pub fn witnesses(bytes: &[u8]) {
    let mut pages = 0u64;
    let result = witness::check(Gpa(0), &mut |gpa, buffer| {
        pages += u64::from(buffer.len() == PAGE_SIZE as usize);
        let start = usize::try_from(gpa.0)?;
        let source = bytes.get(start..).and_then(|rest| rest.get(..buffer.len())).ok_or("beyond memory")?;
        buffer.copy_from_slice(source);
        Ok(())
    });
    assert!(pages <= u64::from(witness::PAGES_MAX), "no more pages are read than the limit allows");
    if let Ok(witnesses) = result {
        assert!(witnesses.len() <= witness::REGIONS_MAX as usize);
    }
}

/// Guest memory that stores nothing and checks everything: each byte is in memory and written once.
pub(super) struct CheckedSink {
    memory: MemoryMap,
    written: Vec<Range<u64>>,
    /// Which write is refused.
    refused: Option<usize>,
}

impl CheckedSink {
    pub(super) fn new(memory: MemoryMap) -> CheckedSink {
        CheckedSink { memory, written: Vec::new(), refused: None }
    }

    fn is_untouched(&self) -> bool {
        self.written.is_empty()
    }

    /// True if `bytes` bytes from `gpa` on were written in one piece.
    fn holds(&self, gpa: Gpa, bytes: u64) -> bool {
        self.written.iter().any(|range| range.start <= gpa.0 && gpa.0 + bytes <= range.end)
    }

    fn has_refused(&self) -> bool {
        self.refused.is_some_and(|refused| refused < self.written.len())
    }

    /// What was promised of a kernel that is loaded.
    fn check_entry(&self, entry: &Entry, request: &BootRequest<'_>) {
        assert!(self.holds(entry.info, 4), "the info structure is in memory");
        let eip = Gpa(entry.cpu.eip.into());
        assert!(entry.kernel.contains(&eip), "the kernel begins at {eip}, outside {:?}", entry.kernel);
        assert!(entry.kernel.end.0 <= 1 << 32, "a kernel lies below 4 GiB");
        assert_eq!(entry.modules.len(), request.modules.len());
        for (range, module) in entry.modules.iter().zip(request.modules) {
            assert_eq!(range.end.0 - range.start.0, module.data.len() as u64, "a module's size");
            assert!(range.start >= entry.kernel.end && range.start.offset() == 0, "a module's place");
            assert!(range.is_empty() || self.holds(range.start, module.data.len() as u64));
        }
    }

    /// Notes a write; says whether memory takes it.
    fn note(&mut self, gpa: Gpa, bytes: u64) -> Result<(), MemoryError> {
        assert!(!self.has_refused(), "nothing is written after a refused write");
        let range = gpa.0..gpa.0.checked_add(bytes).expect("a write does not wrap");
        assert!(bytes != 0, "an empty write at {gpa}");
        let mut ram = self.memory.ram();
        assert!(
            ram.any(|ram| ram.start.0 <= range.start && range.end <= ram.end.0),
            "{range:x?} is not memory"
        );
        let twice = self.written.iter().find(|old| old.start < range.end && range.start < old.end);
        assert!(twice.is_none(), "{range:x?} overlaps {twice:x?}");
        self.written.push(range);
        if self.has_refused() { Err("refused".into()) } else { Ok(()) }
    }
}

impl GuestMemorySink for CheckedSink {
    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        self.note(gpa, bytes.len() as u64)
    }

    fn zero(&mut self, gpa: Gpa, bytes: u64) -> Result<(), MemoryError> {
        self.note(gpa, bytes)
    }
}
