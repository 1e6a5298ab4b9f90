//! A request's parts, and its data to and fro.
//!
//! Story: `ring` makes a [`Chain`] of what descriptors say: addresses and lengths that the guest claims, of which nothing has been
//! checked but their order and number. [`gather`] and [`scatter`] move the data, page by page, at most [`SESSION_PAGES`] in a
//! session; that an address is no memory shows there.
//!
//! Limits: as many parts as the queue has entries, [`HEADER_BYTES_MAX`].

use umbra_mmu::dma::{NoSession, Refused, Session};
use umbra_mmu::{Gpa, Mmu, PAGE_SIZE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, Permissions};

/// Pages of one session for data; the pool keeps others for other devices.
pub const SESSION_PAGES: usize = 32;
/// The longest header.
pub const HEADER_BYTES_MAX: usize = 16;

/// Bytes of guest-physical memory, as a descriptor claims them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where.
    pub at: u64,
    /// How many; never 0.
    pub count: u32,
}

/// A request, owned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// By what the driver knows it.
    pub head: u16,
    /// What the device reads, the header among it.
    pub read: Vec<Part>,
    /// What the device writes.
    pub write: Vec<Part>,
    /// The first bytes of what it reads, where they could be read.
    pub header: Option<[u8; HEADER_BYTES_MAX]>,
    /// It ends as a chain ends, and what is written comes after what is read.
    pub whole: bool,
}

impl Chain {
    /// What the descriptors say; at most `most` of them are looked at.
    pub(super) fn of(head: u16, descriptors: impl Iterator<Item = Descriptor>, most: u16) -> Chain {
        let mut chain = Chain { head, ..Chain::default() };
        let (mut ordered, mut ended, mut left) = (true, false, most);
        for descriptor in descriptors {
            if ended || left == 0 {
                ended = false;
                break;
            }
            left -= 1;
            ended = !descriptor.has_next();
            let (to_write, count) = (descriptor.is_write_only(), descriptor.len());
            ordered &= to_write || chain.write.is_empty();
            let list = if to_write { &mut chain.write } else { &mut chain.read };
            if count != 0 {
                list.push(Part { at: descriptor.addr().0, count });
            }
        }
        chain.whole = ended && ordered;
        chain
    }

    /// Bytes that the device may read.
    pub fn read_bytes(&self) -> u64 {
        total(&self.read)
    }

    /// Bytes that the device may write.
    pub fn write_bytes(&self) -> u64 {
        total(&self.write)
    }

    /// The last byte to be written, where devices put their status.
    pub fn status_at(&self) -> Option<u64> {
        self.write.last().map(|part| part.at.wrapping_add(u64::from(part.count) - 1))
    }
}

fn total(parts: &[Part]) -> u64 {
    parts.iter().map(|part| u64::from(part.count)).sum()
}

/// A piece of a buffer and where it lies in the guest: within a page.
struct Piece {
    at: u64,
    first: usize,
    end: usize,
}

/// The pieces of `count` bytes from byte `skip` of `parts` on; fewer, where the parts end before. An address that wraps is left
/// to the session to refuse.
fn pieces(parts: &[Part], skip: u64, count: usize) -> impl Iterator<Item = Piece> {
    let mut parts = parts.iter();
    let (mut skip, mut done) = (skip, 0);
    let (mut at, mut left) = (0u64, 0u64);
    std::iter::from_fn(move || {
        if done == count {
            return None;
        }
        while left == 0 {
            let part = parts.next()?;
            let skipped = skip.min(part.count.into());
            (at, left, skip) =
                (part.at.wrapping_add(skipped), u64::from(part.count) - skipped, skip - skipped);
        }
        let within = (PAGE_SIZE - at % PAGE_SIZE).min(left).min((count - done) as u64);
        let piece = Piece { at, first: done, end: done + within as usize };
        (at, left, done) = (at.wrapping_add(within), left - within, piece.end);
        Some(piece)
    })
}

/// Reads `buffer` from the guest, from byte `skip` of `parts` on. The caller has seen to it that there is so much.
///
/// # Errors
///
/// When something of it is no memory, or cannot be brought in.
pub fn gather(mmu: &Mmu, parts: &[Part], skip: u64, buffer: &mut [u8]) -> Result<(), NoSession> {
    in_sessions(mmu, parts, skip, buffer.len(), Permissions::Read, |session, piece| {
        session.read_slice(&mut buffer[piece.first..piece.end], GuestAddress(piece.at)).is_ok()
    })
}

/// Writes `bytes` to the guest, from the first byte of `parts` on; the shadow knows when this returns.
///
/// # Errors
///
/// As [`gather`]; some of it may have been written.
pub fn scatter(mmu: &Mmu, parts: &[Part], bytes: &[u8]) -> Result<(), NoSession> {
    in_sessions(mmu, parts, 0, bytes.len(), Permissions::Write, |session, piece| {
        session.write_slice(&bytes[piece.first..piece.end], GuestAddress(piece.at)).is_ok()
    })
}

fn in_sessions(
    mmu: &Mmu,
    parts: &[Part],
    skip: u64,
    count: usize,
    access: Permissions,
    mut copy: impl FnMut(&Session<'_>, &Piece) -> bool,
) -> Result<(), NoSession> {
    let mut pieces = pieces(parts, skip, count).peekable();
    let mut batch: Vec<Piece> = Vec::with_capacity(SESSION_PAGES);
    while pieces.peek().is_some() {
        batch.clear();
        batch.extend(pieces.by_ref().take(SESSION_PAGES));
        let (mut session, ()) = mmu.session(None, |plan| {
            // All are touched, so that those that are absent are waited for together.
            for piece in &batch {
                let _ = plan.touch(GuestAddress(piece.at), piece.end - piece.first, access);
            }
        })?;
        for piece in &batch {
            if !copy(&session, piece) {
                return Err(Refused::NotPlanned(Gpa(piece.at).gfn()).into());
            }
        }
        session.tell();
    }
    Ok(())
}
