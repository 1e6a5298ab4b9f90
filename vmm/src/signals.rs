//! Ctrl-C, as a number that is looked at, and as a descriptor that becomes readable.
//!
//! Holds: a handler does nothing but count and write to a descriptor, which is all that a signal may find a thread at.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

static COUNT: AtomicU32 = AtomicU32::new(0);
static EVENT: OnceLock<EventFd> = OnceLock::new();

extern "C" fn on_signal(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    COUNT.fetch_add(1, Ordering::Relaxed);
    if let Some(event) = EVENT.get() {
        // A write(2), which a handler may make; where the counter is full it is readable already.
        let _ = event.write(1);
    }
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

/// The same, and has them make [`event`] readable.
///
/// # Errors
///
/// When the host has no descriptor left, or does not take a handler.
pub fn catch_with_event() -> io::Result<()> {
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    // Whoever was first has made one that will do.
    let _ = EVENT.set(event);
    catch()
}

/// What becomes readable when a signal comes, where somebody has asked for that.
pub fn event() -> Option<&'static EventFd> {
    EVENT.get()
}

/// How many have come.
pub fn count() -> u32 {
    COUNT.load(Ordering::Relaxed)
}
