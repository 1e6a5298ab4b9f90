//! ELF32 images: segments by physical address, the entry point, the notes.
//!
//! See: System V ABI, chapter 5 (program header); the ABI's i386 supplement.

use object::LittleEndian;
use object::elf::{self, FileHeader32, ProgramHeader32};
use object::read::elf::{FileHeader, ProgramHeader};

use super::image::{Image, Segment};
use super::notes::Notes;
use super::{ImageError, PROGRAM_HEADERS_MAX, Part};

type Header = FileHeader32<LittleEndian>;
type ProgramHeaders<'a> = &'a [ProgramHeader32<LittleEndian>];

const LITTLE: LittleEndian = LittleEndian;

/// True if `bytes` begin as an ELF file does.
pub(super) fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

fn damaged(error: object::read::Error) -> ImageError {
    ImageError::ElfDamaged { reason: error.to_string() }
}

/// Parses an executable.
pub(super) fn parse(bytes: &[u8]) -> Result<Image<'_>, ImageError> {
    let header = executable(bytes)?;
    let program_headers = program_headers(header, bytes)?;
    let mut segments = Vec::new();
    for (number, program_header) in program_headers.iter().enumerate() {
        if program_header.p_type(LITTLE) == elf::PT_LOAD && program_header.p_memsz(LITTLE) != 0 {
            segments.push(segment(number, program_header, bytes)?);
        }
    }
    let entry = physical_entry(header.e_entry(LITTLE), program_headers);
    Image::new(segments, entry, notes(program_headers, bytes)?)
}

/// The header of a 32-bit i386 executable; anything else is refused by name.
fn executable(bytes: &[u8]) -> Result<&Header, ImageError> {
    let kind = |found: &str| Err(ImageError::ElfKind { found: found.into() });
    // Class and data encoding are the bytes after the magic number.
    match (bytes.get(4), bytes.get(5)) {
        (Some(2), _) => return kind("64-bit"),
        (_, Some(2)) => return kind("big-endian"),
        _ => {}
    }
    let header = Header::parse(bytes).map_err(damaged)?;
    match (header.e_machine(LITTLE), header.e_type(LITTLE)) {
        (elf::EM_386, elf::ET_EXEC) => Ok(header),
        (elf::EM_386, elf::ET_DYN) => kind("position-independent (ET_DYN)"),
        (elf::EM_386, elf::ET_REL) => kind("an object file (ET_REL)"),
        (elf::EM_386, other) => kind(&format!("of type {}", other.0)),
        (machine, _) => kind(&format!("for machine {}", machine.0)),
    }
}

fn program_headers<'a>(header: &Header, bytes: &'a [u8]) -> Result<ProgramHeaders<'a>, ImageError> {
    let count = header.phnum(LITTLE, bytes).map_err(damaged)?;
    if count as usize > PROGRAM_HEADERS_MAX {
        return Err(ImageError::TooManyProgramHeaders { count: count as usize });
    }
    header.program_headers(LITTLE, bytes).map_err(damaged)
}

fn segment<'a>(
    number: usize,
    program_header: &ProgramHeader32<LittleEndian>,
    bytes: &'a [u8],
) -> Result<Segment<'a>, ImageError> {
    let part = Part::Segment(number);
    let (offset, file_bytes) = program_header.file_range(LITTLE);
    let memory_bytes = u64::from(program_header.p_memsz(LITTLE));
    if file_bytes > memory_bytes {
        return Err(ImageError::Shrinks { part, file_bytes, memory_bytes });
    }
    let content = program_header.data(LITTLE, bytes).map_err(|()| ImageError::BeyondImage {
        part,
        offset,
        bytes: file_bytes,
        image_bytes: bytes.len(),
    })?;
    Ok(Segment { part, start: program_header.p_paddr(LITTLE).into(), bytes: content, memory_bytes })
}

/// The entry point's physical address. ELF gives a virtual one; where it is in a segment that is linked elsewhere
/// than it is loaded, as higher-half kernels are, it moves along. A kernel whose linker script gives the physical
/// address already has it in no segment's virtual range.
fn physical_entry(entry: u32, program_headers: ProgramHeaders<'_>) -> u32 {
    let holder = program_headers.iter().find(|program_header| {
        let into = entry.wrapping_sub(program_header.p_vaddr(LITTLE));
        program_header.p_type(LITTLE) == elf::PT_LOAD && into < program_header.p_memsz(LITTLE)
    });
    holder.map_or(entry, |program_header| {
        let into = entry.wrapping_sub(program_header.p_vaddr(LITTLE));
        program_header.p_paddr(LITTLE).wrapping_add(into)
    })
}

fn notes(program_headers: ProgramHeaders<'_>, bytes: &[u8]) -> Result<Notes, ImageError> {
    let mut found = Notes::default();
    for program_header in program_headers {
        // A segment of notes that cannot be read holds none of ours.
        let Ok(Some(mut notes)) = program_header.notes(LITTLE, bytes) else { continue };
        while let Ok(Some(note)) = notes.next() {
            found.add(note.name(), note.n_type(LITTLE).0, note.desc())?;
        }
    }
    Ok(found)
}

/// The notes of an image that need not be ELF, or not a sound one.
pub(super) fn notes_if_any(bytes: &[u8]) -> Result<Notes, ImageError> {
    let headers = executable(bytes).and_then(|header| program_headers(header, bytes));
    headers.map_or(Ok(Notes::default()), |headers| notes(headers, bytes))
}
