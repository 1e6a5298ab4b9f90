//! madvise on the pool and on an importer's pages: the one call about machine memory that Rust cannot check.

use std::io;

use vm_memory::VolatileSlice;

/// Drops the host's page-table entries of a page of a shared mapping, and with them KVM's.
///
/// # Errors
/// What madvise says.
pub fn drop_translations(page: &VolatileSlice<'_>) -> io::Result<()> {
    let guard = page.ptr_guard_mut();
    // SAFETY: the guard's range is mapped for as long as the guard lives, and is part of a mapping that the pool or an
    // importer made MAP_SHARED. MADV_DONTNEED on a shared mapping only drops page-table entries: the contents stay in the
    // page cache and the next access finds them, so that no Rust value changes under anybody.
    let result = unsafe { libc::madvise(guard.as_ptr().cast(), guard.len(), libc::MADV_DONTNEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives the memory of whole pages back to the host: they are zeros from now on, also for KVM.
///
/// # Errors
/// What madvise says.
pub fn give_back(pages: &VolatileSlice<'_>) -> io::Result<()> {
    let guard = pages.ptr_guard_mut();
    // SAFETY: the guard's range is mapped for as long as the guard lives, and is part of a mapping that the pool
    // made MAP_SHARED. MADV_REMOVE frees the pages behind it, which then read as zeros: the memory stays mapped, and it is
    // only ever accessed as volatile, so that no Rust value changes under anybody.
    let result = unsafe { libc::madvise(guard.as_ptr().cast(), guard.len(), libc::MADV_REMOVE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
