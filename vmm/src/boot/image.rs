//! An image that has been parsed: what goes where, and where to begin.
//!
//! Holds: every segment's bytes are in the file, and it lies below 4 GiB. Whether the guest has that memory is
//! [`Image::load`]'s question.

use super::header::{Addresses, Header};
use super::notes::Notes;
use super::{IMAGE_BYTES_MAX, ImageError, Part, elf};

/// One piece of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment<'a> {
    pub(super) part: Part,
    /// Guest-physical address of the first byte.
    pub(super) start: u64,
    pub(super) bytes: &'a [u8],
    /// Size in memory; what is beyond `bytes` is cleared.
    pub(super) memory_bytes: u64,
}

impl Segment<'_> {
    pub(super) fn end(&self) -> u64 {
        self.start + self.memory_bytes
    }
}

/// A Multiboot1 image.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    pub(super) segments: Vec<Segment<'a>>,
    pub(super) entry: u32,
    notes: Notes,
}

impl<'a> Image<'a> {
    /// Parses an image: a 32-bit i386 ELF executable, or anything with address fields in its Multiboot header.
    pub fn parse(bytes: &'a [u8]) -> Result<Image<'a>, ImageError> {
        if bytes.len() > IMAGE_BYTES_MAX {
            return Err(ImageError::TooLarge { bytes: bytes.len() });
        }
        let header = Header::find(bytes)?;
        match header.addresses {
            Some(addresses) => Image::from_addresses(bytes, header.offset, addresses),
            None if elf::is_elf(bytes) => elf::parse(bytes),
            None => Err(ImageError::NoFormat),
        }
    }

    /// Puts an image together; the entry point must lie in it.
    pub(super) fn new(segments: Vec<Segment<'a>>, entry: u32, notes: Notes) -> Result<Image<'a>, ImageError> {
        if segments.is_empty() {
            return Err(ImageError::Empty);
        }
        let entry64 = u64::from(entry);
        if !segments.iter().any(|segment| (segment.start..segment.end()).contains(&entry64)) {
            return Err(ImageError::EntryOutside { entry });
        }
        Ok(Image { segments, entry, notes })
    }

    /// An image that is loaded as its Multiboot header says. That it may be ELF as well only matters for its notes.
    fn from_addresses(bytes: &'a [u8], offset: usize, fields: Addresses) -> Result<Image<'a>, ImageError> {
        let broken = |rule| ImageError::HeaderAddresses {
            rule,
            header: fields.header,
            load: fields.load,
            load_end: fields.load_end,
            bss_end: fields.bss_end,
        };
        let before_header = fields.header.checked_sub(fields.load).ok_or(broken("load is above header"))?;
        let file_start =
            offset.checked_sub(before_header as usize).ok_or(broken("load is before the file"))?;
        let available = bytes.len() - file_start;
        let wanted = match fields.load_end {
            0 => available,
            end => end.checked_sub(fields.load).ok_or(broken("load end is below load"))? as usize,
        };
        let part = Part::Body;
        let body =
            bytes.get(file_start..).and_then(|rest| rest.get(..wanted)).ok_or(ImageError::BeyondImage {
                part,
                offset: file_start as u64,
                bytes: wanted as u64,
                image_bytes: bytes.len(),
            })?;
        let start = u64::from(fields.load);
        let loaded = body.len() as u64;
        let memory_bytes = match fields.bss_end {
            0 => loaded,
            end => u64::from(end)
                .checked_sub(start)
                .filter(|&bytes| bytes >= loaded)
                .ok_or(broken("bss end is below load end"))?,
        };
        let segment = Segment { part, start, bytes: body, memory_bytes };
        let notes = elf::notes_if_any(bytes)?;
        Image::new(vec![segment], fields.entry, notes)
    }

    /// What the image says about itself.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// The physical address at which the kernel begins.
    pub fn entry(&self) -> u32 {
        self.entry
    }
}
