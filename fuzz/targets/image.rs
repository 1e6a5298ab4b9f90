//! The loader under hostile images: ELF and a.out-style, with headers, segments, notes and modules of every kind.
//!
//! What must hold: no panic; every write goes to guest memory, once (`umbra::boot::fuzz` checks the sink's calls);
//! the heap that parsing and loading take is bounded by what was given, however large the guest.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use umbra::board::{MEMORY_BYTES_MIN, MemoryMap};
use umbra::boot::{BootRequest, COMMAND_LINE_BYTES_MAX, MODULES_MAX, Module, fuzz};
use umbra_fuzz::heap;

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

/// Guest memory, in bytes: the least, the most, and around each corner of the layout.
const SIZES: [u64; 8] = [
    MEMORY_BYTES_MIN,
    MEMORY_BYTES_MIN + 4096,
    16 << 20,
    64 << 20,
    3 << 30,
    (3 << 30) + 4096,
    4 << 30,
    16 << 30,
];

/// Addresses at which checks go wrong.
const EDGES: [u32; 14] = [
    0,
    0x1000,
    0x9000,
    0x9_fbff,
    0x9_fc00,
    0xa_0000,
    0x10_0000,
    0x20_0000,
    0x100_0000,
    0x7fff_ffff,
    0xc000_0000,
    0xc010_0000,
    0xffff_f000,
    0xffff_ffff,
];

const MAGIC: u32 = 0x1bad_b002;
/// Where a built ELF image has its Multiboot header: right after its own.
const ELF_HEADER: usize = 52;
const PROGRAM_HEADERS: usize = 0x80;
/// Zeros that follow a built image, for segments to be filled from.
const PADDING_MAX: usize = 3 << 12;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    Near { edge: u8, further: i16 },
    Any(u32),
}

impl Address {
    fn value(self) -> u32 {
        match self {
            Address::Near { edge, further } => {
                EDGES[usize::from(edge) % EDGES.len()].wrapping_add_signed(further.into())
            }
            Address::Any(value) => value,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Fields {
    header: Address,
    load: Address,
    load_end: Option<Address>,
    bss_end: Option<Address>,
    entry: Address,
    /// The fields agree with where the header is in the file.
    fits: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct ProgramHeader {
    kind: u8,
    offset: u16,
    vaddr: Address,
    /// Otherwise as `vaddr`.
    paddr: Option<Address>,
    file: u16,
    /// Beyond `file`.
    memory: Option<Address>,
    align: u8,
}

#[derive(Arbitrary, Clone, Debug)]
struct Note {
    /// Otherwise ours.
    name: Option<Vec<u8>>,
    kind: u8,
    words: Vec<u32>,
    /// Bytes that the descriptor claims more, or fewer, than it has.
    lie: i8,
}

#[derive(Arbitrary, Clone, Debug)]
enum Shape {
    Bytes(Vec<u8>),
    Addresses {
        fields: Fields,
        at: u8,
        body: Vec<u8>,
    },
    Elf {
        fields: Option<Fields>,
        entry: Address,
        headers: Vec<ProgramHeader>,
        notes: Vec<Note>,
    },
    /// The built-in guest.
    BuiltIn,
}

/// A store of four bytes anywhere in the finished image.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Damage {
    at: u16,
    value: Address,
}

#[derive(Arbitrary, Clone, Debug)]
struct Plan {
    shape: Shape,
    flags: u8,
    damage: Vec<Damage>,
    cut: Option<u16>,
    padding: u16,
    memory: u8,
    command_line: String,
    /// A command line that is too long, or nearly.
    stretch: Option<u16>,
    modules: Vec<(String, u16)>,
    refused: Option<u8>,
    witnesses: Vec<u8>,
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A Multiboot header that lies at `offset` in the file.
fn multiboot(flags: u8, fields: Option<Fields>, offset: usize) -> Vec<u8> {
    // Nearly always nothing that is refused at once.
    let flags = if flags & 0x80 != 0 { u32::from(flags) } else { u32::from(flags) & 7 };
    let flags = flags | if fields.is_some() { 1 << 16 } else { 0 };
    let mut header = words(&[MAGIC, flags, 0u32.wrapping_sub(MAGIC).wrapping_sub(flags)]);
    if let Some(fields) = fields {
        let load = fields.load.value();
        let at = if fields.fits { load.wrapping_add(offset as u32) } else { fields.header.value() };
        let entry = if fields.fits { at } else { fields.entry.value() };
        let end = |end: Option<Address>| end.map_or(0, Address::value);
        header.extend(words(&[at, load, end(fields.load_end), end(fields.bss_end), entry]));
    }
    header
}

fn note(note: &Note) -> Vec<u8> {
    let name = note.name.clone().unwrap_or_else(|| b"Umbra\0".to_vec());
    let descriptor = words(&note.words);
    let claimed = (descriptor.len() as u32).wrapping_add_signed(note.lie.into());
    let mut bytes = words(&[name.len() as u32, claimed, u32::from(note.kind % 4)]);
    bytes.extend(&name);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(descriptor);
    bytes
}

fn elf(
    plan: &Plan,
    fields: Option<Fields>,
    entry: Address,
    headers: &[ProgramHeader],
    notes: &[Note],
) -> Vec<u8> {
    let notes = notes.iter().flat_map(note).collect::<Vec<u8>>();
    let count = headers.len() + usize::from(!notes.is_empty());
    let data = PROGRAM_HEADERS + 32 * count;
    let mut image = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let entry = match (headers.first(), entry) {
        (Some(first), Address::Near { further, .. }) => {
            first.vaddr.value().wrapping_add_signed(further.into())
        }
        _ => entry.value(),
    };
    image.extend(words(&[
        3 << 16 | 2,
        1,
        entry,
        PROGRAM_HEADERS as u32,
        0,
        0,
        32 << 16 | 52,
        count as u32,
        0,
    ]));
    image.extend(multiboot(plan.flags, fields, ELF_HEADER));
    image.resize(PROGRAM_HEADERS, 0);
    for header in headers {
        let kind = [1, 1, 1, 4, u32::from(header.kind)][usize::from(header.kind) % 5];
        let (vaddr, file) = (header.vaddr.value(), u32::from(header.file));
        let paddr = header.paddr.map_or(vaddr, Address::value);
        let memory = header.memory.map_or(file, Address::value);
        let offset = data as u32 + u32::from(header.offset);
        image.extend(words(&[kind, offset, vaddr, paddr, file, memory, 7, header.align.into()]));
    }
    if !notes.is_empty() {
        let bytes = notes.len() as u32;
        image.extend(words(&[4, data as u32, 0, 0, bytes, bytes, 4, 4]));
    }
    image.extend(notes);
    image
}

fn build(plan: &Plan) -> Vec<u8> {
    let mut image = match &plan.shape {
        Shape::Bytes(bytes) => bytes.clone(),
        Shape::Addresses { fields, at, body } => {
            let mut image = vec![0; usize::from(*at)];
            image.extend(multiboot(plan.flags, Some(*fields), image.len()));
            image.extend(body);
            image
        }
        Shape::Elf { fields, entry, headers, notes } => elf(plan, *fields, *entry, headers, notes),
        Shape::BuiltIn => umbra_guest::PAGER.to_vec(),
    };
    image.resize(image.len() + usize::from(plan.padding) % PADDING_MAX, 0);
    for damage in &plan.damage {
        // The headers are where it hurts.
        let at = usize::from(damage.at) % image.len().clamp(1, 0x200);
        if let Some(place) = image.get_mut(at..at + 4) {
            place.copy_from_slice(&damage.value.value().to_le_bytes());
        }
    }
    image.truncate(plan.cut.map_or(usize::MAX, usize::from));
    image
}

fuzz_target!(|plan: Plan| {
    let image = build(&plan);
    let memory =
        MemoryMap::new(SIZES[usize::from(plan.memory) % SIZES.len()]).expect("a size that is allowed");
    let mut command_line = plan.command_line.clone();
    if let Some(stretch) = plan.stretch {
        command_line.extend(std::iter::repeat_n('x', usize::from(stretch) % (COMMAND_LINE_BYTES_MAX + 2)));
    }
    let data = vec![0x5a; usize::from(u16::MAX)];
    let module = |(line, bytes): &(String, u16)| (line.clone(), usize::from(*bytes));
    let modules: Vec<_> = plan.modules.iter().map(module).collect();
    let modules: Vec<_> =
        modules.iter().map(|(line, bytes)| Module { command_line: line, data: &data[..*bytes] }).collect();
    let request = BootRequest { memory, command_line: &command_line, modules: &modules };
    let strings = (MODULES_MAX + 1) * (COMMAND_LINE_BYTES_MAX + 1);
    let peak = heap::peak_of(|| fuzz::image_for(&image, &request, plan.refused.map(usize::from)));
    assert!(peak < 4 * strings, "loading took {peak} bytes of heap");
    let peak = heap::peak_of(|| fuzz::witnesses(&plan.witnesses));
    assert!(peak < 1 << 16, "hashing witnesses took {peak} bytes of heap");
});
