//! Ctrl-C, as a number that is looked at.
//!
//! Holds: a handler does nothing but count, which is all that a signal may find a thread at.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

static COUNT: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_signal(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    COUNT.fetch_add(1, Ordering::Relaxed);
}

/// Has SIGINT and SIGTERM counted from now on, and end nothing.
///
/// # Errors
///
/// When the host does not take a handler.
pub fn catch() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        register_signal_handler(signal, on_signal).map_err(io::Error::from)?;
    }
    Ok(())
}

/// How many have come.
pub fn count() -> u32 {
    COUNT.load(Ordering::Relaxed)
}
