//! The Multiboot1 header: finding it and judging its flags.
//!
//! Limits: the video mode that bit 2 asks for is a wish, and there is no screen: it is logged and passed over, as
//! QEMU does. The info structure then has no video fields, which tells the kernel.
//!
//! See: Multiboot specification 0.6.96, section 3.1.

use super::{HEADER_SEARCH_BYTES, ImageError};

const MAGIC: u32 = 0x1bad_b002;
/// Flags that a loader must honour or refuse.
const DEMANDS: u32 = 0xffff;
/// Those that are honoured: modules on page boundaries, memory sizes and map, and a video mode (see above).
const KNOWN_DEMANDS: u32 = 0b111;
const VIDEO: u32 = 1 << 2;
const ADDRESSES: u32 = 1 << 16;

/// The address fields, for images that are not ELF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    /// Where the header itself is to lie in memory.
    pub(super) header: u32,
    pub(super) load: u32,
    /// After the last byte from the file; 0: the file's end.
    pub(super) load_end: u32,
    /// After the last byte to be cleared; 0: none.
    pub(super) bss_end: u32,
    pub(super) entry: u32,
}

/// A header that was found and is acceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Where in the file.
    pub(super) offset: usize,
    pub(super) addresses: Option<Addresses>,
}

/// The 32-bit word at `offset`.
fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

impl Header {
    /// Finds the first header with a right checksum.
    pub(super) fn find(image: &[u8]) -> Result<Header, ImageError> {
        let area = &image[..image.len().min(HEADER_SEARCH_BYTES)];
        let mut refused = ImageError::NoHeader { searched: area.len() };
        for offset in (0..area.len()).step_by(4) {
            let words = [0, 4, 8].map(|at| word(area, offset + at));
            let [Some(MAGIC), Some(flags), Some(checksum)] = words else { continue };
            let expected = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
            if checksum == expected {
                return Header::read(area, offset, flags);
            }
            if matches!(refused, ImageError::NoHeader { .. }) {
                refused = ImageError::Checksum { offset, flags, checksum, expected };
            }
        }
        Err(refused)
    }

    fn read(area: &[u8], offset: usize, flags: u32) -> Result<Header, ImageError> {
        let unknown = flags & DEMANDS & !KNOWN_DEMANDS;
        if unknown != 0 {
            return Err(ImageError::UnknownDemands { flags, unknown });
        }
        if flags & VIDEO != 0 {
            log::warn!("the kernel asks for a video mode; there is no screen, and it is told of none");
        }
        let mut addresses = None;
        if flags & ADDRESSES != 0 {
            let fields = Addresses::read(area, offset + 12);
            addresses = Some(fields.ok_or(ImageError::HeaderCutOff { offset })?);
        }
        Ok(Header { offset, addresses })
    }
}

impl Addresses {
    fn read(area: &[u8], at: usize) -> Option<Addresses> {
        Some(Addresses {
            header: word(area, at)?,
            load: word(area, at + 4)?,
            load_end: word(area, at + 8)?,
            bss_end: word(area, at + 12)?,
            entry: word(area, at + 16)?,
        })
    }
}
