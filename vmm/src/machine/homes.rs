//! Memory that is mapped over part of a region, and taken away again: the homes of exported pages.
//!
//! Story: address space is reserved once, as a region that nobody can touch. What is mapped over it comes and goes, and the region's
//! end takes all of it along.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::MmapRegion;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};

/// What a part of a region shows.
#[derive(Clone, Copy, Debug)]
pub enum Shows<'a> {
    /// Nothing: a touch of it is a crash.
    Nothing,
    /// A file from this byte on, to be read and written.
    Memory(&'a File, u64),
}

/// Address space of `bytes`, which shows nothing.
///
/// # Errors
/// When the host has not so much.
pub fn reserve(bytes: usize) -> Result<MmapRegion, MmapRegionError> {
    MmapRegionBuilder::new(bytes)
        .with_mmap_prot(libc::PROT_NONE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_ANONYMOUS)
        .build()
}

/// Has `length` bytes of a region from `offset` on, all whole pages, show something else from now on.
///
/// # Errors
/// When they are not of the region, or the host refuses: they show what they did.
pub fn show(region: &MmapRegion, offset: usize, length: usize, what: Shows<'_>) -> io::Result<()> {
    let within = offset.checked_add(length).is_some_and(|end| end <= region.size());
    if !within || length == 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let anonymous = libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let (protection, flags, file, from) = match what {
        Shows::Nothing => (libc::PROT_NONE, anonymous, -1, 0),
        Shows::Memory(file, from) => (libc::PROT_READ | libc::PROT_WRITE, 0, file.as_raw_fd(), from),
    };
    let at = region.as_ptr().wrapping_add(offset).cast();
    let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | flags;
    // SAFETY: the range lies within a mapping of ours (checked above), which stays mapped, by this or by what was there. Whoever
    // reaches it does so by pointers, as volatile memory or as atomics: no Rust value lies there that could change under anybody.
    // Who reaches a part that shows nothing is killed, which breaks none either.
    let mapped = unsafe { libc::mmap(at, length, protection, flags, file, from) };
    if mapped == at { Ok(()) } else { Err(io::Error::last_os_error()) }
}
