//! Builders of images, byte by byte.

/// Offset of the Multiboot header in a built ELF image: right after the ELF header.
pub const HEADER_OFFSET: u32 = 52;
/// Where program headers are: after the longest Multiboot header.
const PROGRAM_HEADERS_OFFSET: u32 = 0x80;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// The three words of a Multiboot header.
pub fn header(flags: u32) -> Vec<u8> {
    let checksum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    words(&[0x1bad_b002, flags, checksum])
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The address fields of a header, for images that are not ELF.
#[derive(Clone, Copy, Debug)]
pub struct AddressFields {
    pub header: u32,
    pub load: u32,
    pub load_end: u32,
    pub bss_end: u32,
    pub entry: u32,
}

impl Default for AddressFields {
    /// The whole file at 1 MiB, the header at its byte 0x40.
    fn default() -> AddressFields {
        AddressFields { header: 0x10_0040, load: 0x10_0000, load_end: 0, bss_end: 0, entry: 0x10_0060 }
    }
}

impl AddressFields {
    fn header(&self, flags: u32) -> Vec<u8> {
        let fields = words(&[self.header, self.load, self.load_end, self.bss_end, self.entry]);
        [header(flags | 1 << 16), fields].concat()
    }

    /// A file of `bytes` bytes, not ELF, with its header at `offset`.
    pub fn build(&self, offset: usize, bytes: usize) -> Vec<u8> {
        let mut image: Vec<u8> = (0..bytes.max(offset + 32)).map(|at| at as u8).collect();
        image[offset..offset + 32].copy_from_slice(&self.header(0));
        image.truncate(bytes);
        image
    }
}

/// A PT_LOAD.
#[derive(Clone, Debug)]
pub struct Segment {
    pub vaddr: u32,
    pub paddr: u32,
    pub bytes: Vec<u8>,
    pub memory: u32,
}

impl Segment {
    pub fn at(address: u32, bytes: Vec<u8>) -> Segment {
        Segment { vaddr: address, paddr: address, memory: bytes.len() as u32, bytes }
    }
}

/// An ELF image.
#[derive(Clone, Debug)]
pub struct Elf {
    pub flags: u32,
    pub fields: Option<AddressFields>,
    pub segments: Vec<Segment>,
    pub entry: u32,
    /// Owner, type, descriptor.
    pub notes: Vec<(&'static str, u32, Vec<u8>)>,
}

impl Default for Elf {
    fn default() -> Elf {
        let segments = vec![Segment::at(0x10_0000, vec![0x90; 32])];
        Elf { flags: 3, fields: None, segments, entry: 0x10_0000, notes: vec![] }
    }
}

impl Elf {
    fn note_bytes(&self) -> Vec<u8> {
        let padded = |mut bytes: Vec<u8>| {
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let mut all = Vec::new();
        for (name, note, descriptor) in &self.notes {
            let name = [name.as_bytes(), b"\0"].concat();
            all.extend(words(&[name.len() as u32, descriptor.len() as u32, *note]));
            all.extend(padded(name));
            all.extend(padded(descriptor.clone()));
        }
        all
    }

    pub fn build(&self) -> Vec<u8> {
        let mut pieces: Vec<(u32, Segment)> =
            self.segments.iter().map(|segment| (PT_LOAD, segment.clone())).collect();
        if !self.notes.is_empty() {
            pieces.push((PT_NOTE, Segment::at(0, self.note_bytes())));
        }
        let mut image = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        image.extend(words(&[3 << 16 | 2, 1, self.entry, PROGRAM_HEADERS_OFFSET, 0, 0]));
        image.extend(words(&[32 << 16 | 52, pieces.len() as u32, 0]));
        assert_eq!(image.len(), HEADER_OFFSET as usize);
        image.extend(match self.fields {
            Some(fields) => fields.header(self.flags),
            None => header(self.flags),
        });
        image.resize(PROGRAM_HEADERS_OFFSET as usize, 0);
        let mut offset = PROGRAM_HEADERS_OFFSET + 32 * pieces.len() as u32;
        for (kind, segment) in &pieces {
            let size = segment.bytes.len() as u32;
            image.extend(words(&[*kind, offset, segment.vaddr, segment.paddr, size, segment.memory, 7, 4]));
            offset += size;
        }
        pieces.iter().for_each(|(_, segment)| image.extend(&segment.bytes));
        image
    }
}
