//! Putting an image into guest memory.
//!
//! Story: 1. every segment claims its place; 2. modules get pages after the kernel; 3. the info block gets a place in
//! conventional memory, where QEMU's loader puts it too; 4. only then is anything written.

use std::ops::Range;

use umbra_mmu::{Gpa, PAGE_SIZE};

use crate::board::MemoryMap;
use crate::cpu::CpuState;

use super::image::{Image, Segment};
use super::info::Info;
use super::placement::Placement;
use super::{COMMAND_LINE_BYTES_MAX, ImageError, MODULES_MAX, Part};

/// What the kernel finds in EAX.
const BOOTLOADER_MAGIC: u32 = 0x2bad_b002;
/// Where the info block is put if it can be.
const INFO_START: u64 = 0x9000;

/// Index of EAX and EBX in [`CpuState::gpr`].
const EAX: usize = 0;
const EBX: usize = 3;

/// Why guest memory could not be read or written.
pub type MemoryError = Box<dyn std::error::Error + Send + Sync>;

/// Guest memory, as a loader sees it. Ranges lie within one range of [`MemoryMap::ram`].
pub trait GuestMemorySink {
    /// Writes `bytes` from `gpa` on.
    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), MemoryError>;

    /// Clears `bytes` bytes from `gpa` on.
    fn zero(&mut self, gpa: Gpa, bytes: u64) -> Result<(), MemoryError>;
}

/// A file for the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// Its command line, by custom with its name first.
    pub command_line: &'a str,
    /// Its contents.
    pub data: &'a [u8],
}

/// What to boot with.
#[derive(Clone, Copy, Debug)]
pub struct BootRequest<'a> {
    /// The guest's memory.
    pub memory: MemoryMap,
    /// The kernel's command line, given to it as it is. QEMU and GRUB put the image's name in front of it.
    pub command_line: &'a str,
    /// Files for the kernel, at most [`MODULES_MAX`].
    pub modules: &'a [Module<'a>],
}

/// Where a loaded kernel begins.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The boot processor's state at the entry point.
    pub cpu: CpuState,
    /// The Multiboot info structure.
    pub info: Gpa,
    /// From the kernel's first byte to after its last, BSS included.
    pub kernel: Range<Gpa>,
    /// Where the modules lie, in order.
    pub modules: Vec<Range<Gpa>>,
}

impl Image<'_> {
    /// Loads the image, its modules and the info block. On an error of the image or the request, nothing has been
    /// written.
    pub fn load(
        &self,
        sink: &mut dyn GuestMemorySink,
        request: &BootRequest<'_>,
    ) -> Result<Entry, ImageError> {
        check_request(request)?;
        let mut placement = Placement::new(&request.memory);
        for segment in &self.segments {
            placement.claim(segment.part, segment.start..segment.end())?;
        }
        let kernel = self.extent();
        let modules = place_modules(&mut placement, request.modules, kernel.end.0)?;
        let named: Vec<_> =
            modules.iter().cloned().zip(request.modules.iter().map(|module| module.command_line)).collect();
        let info = Info { memory: &request.memory, command_line: request.command_line, modules: &named };
        let info_start = place_info(&mut placement, info.bytes() as u64, kernel.end.0)?;

        self.segments.iter().try_for_each(|segment| write_segment(sink, segment))?;
        for (number, module) in request.modules.iter().enumerate() {
            write_segment(sink, &module_segment(number, module, modules[number].start))?;
        }
        let block = info.build(info_start as u32);
        let memory_bytes = block.len() as u64;
        write_segment(sink, &Segment { part: Part::Info, start: info_start, bytes: &block, memory_bytes })?;
        Ok(Entry { cpu: self.entry_state(info_start as u32), info: Gpa(info_start), kernel, modules })
    }

    fn extent(&self) -> Range<Gpa> {
        let start = self.segments.iter().map(|segment| segment.start).min().unwrap_or(0);
        let end = self.segments.iter().map(Segment::end).max().unwrap_or(0);
        Gpa(start)..Gpa(end)
    }

    fn entry_state(&self, info: u32) -> CpuState {
        let mut cpu = CpuState::flat_protected_mode(self.entry);
        cpu.gpr[EAX] = BOOTLOADER_MAGIC;
        cpu.gpr[EBX] = info;
        cpu
    }
}

fn check_request(request: &BootRequest<'_>) -> Result<(), ImageError> {
    if request.modules.len() > MODULES_MAX {
        return Err(ImageError::TooManyModules { count: request.modules.len() });
    }
    let lines = request.modules.iter().map(|module| module.command_line);
    for line in lines.chain([request.command_line]) {
        if line.len() > COMMAND_LINE_BYTES_MAX {
            return Err(ImageError::CommandLineTooLong { bytes: line.len() });
        }
        if let Some(at) = line.bytes().position(|byte| byte == 0) {
            return Err(ImageError::CommandLineNul { at });
        }
    }
    Ok(())
}

/// Gives each module its pages, after the kernel and in order where they fit.
fn place_modules(
    placement: &mut Placement,
    modules: &[Module<'_>],
    kernel_end: u64,
) -> Result<Vec<Range<Gpa>>, ImageError> {
    let high = placement.high();
    let mut from = kernel_end.max(high.start);
    let mut placed = Vec::with_capacity(modules.len());
    for (number, module) in modules.iter().enumerate() {
        let bytes = module.data.len() as u64;
        let part = Part::Module(number);
        // The whole last page, so that nothing else comes to lie in it.
        let pages = bytes.next_multiple_of(PAGE_SIZE);
        let start = placement.fit(part, pages, from, PAGE_SIZE);
        let start = start.ok_or(ImageError::NoRoom { part, bytes, high_end: high.end })?;
        placed.push(Gpa(start)..Gpa(start + bytes));
        from = start + pages;
    }
    Ok(placed)
}

fn place_info(placement: &mut Placement, bytes: u64, kernel_end: u64) -> Result<u64, ImageError> {
    let high = placement.high();
    let part = Part::Info;
    placement
        .fit(part, bytes, INFO_START, PAGE_SIZE)
        .or_else(|| placement.fit(part, bytes, kernel_end.max(high.start), PAGE_SIZE))
        .ok_or(ImageError::NoRoom { part, bytes, high_end: high.end })
}

fn module_segment<'a>(number: usize, module: &Module<'a>, start: Gpa) -> Segment<'a> {
    let memory_bytes = (module.data.len() as u64).next_multiple_of(PAGE_SIZE);
    Segment { part: Part::Module(number), start: start.0, bytes: module.data, memory_bytes }
}

/// Writes a segment's bytes and clears the rest of it.
fn write_segment(sink: &mut dyn GuestMemorySink, segment: &Segment<'_>) -> Result<(), ImageError> {
    let Segment { part, start, bytes, memory_bytes } = *segment;
    let failed = |gpa, bytes| move |source| ImageError::Write { part, gpa, bytes, source };
    let loaded = bytes.len() as u64;
    if loaded != 0 {
        sink.write(Gpa(start), bytes).map_err(failed(Gpa(start), loaded))?;
    }
    let rest = Gpa(start + loaded);
    if memory_bytes > loaded {
        sink.zero(rest, memory_bytes - loaded).map_err(failed(rest, memory_bytes - loaded))?;
    }
    Ok(())
}
