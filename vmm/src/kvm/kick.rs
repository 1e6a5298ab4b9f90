//! Kicks: how another thread makes a vCPU leave `KVM_RUN`.
//!
//! Story: whoever wants something of a vCPU writes its request first and kicks then; the vCPU's loop looks for
//! requests before each entry. No kick is lost:
//!
//! ```text
//!   kicker                            vCPU's thread
//!   request = ...                     look for requests: none
//!   immediate_exit = 1
//!   inside? no: no signal             inside = thread id
//!                                     KVM_RUN: immediate_exit is 1, EINTR at once
//!
//!   request = ...                     inside = thread id
//!   immediate_exit = 1                KVM_RUN: in the guest
//!   inside? yes: signal         ───►  EINTR
//!                                     immediate_exit = 0, inside = 0, look for requests
//! ```
//!
//! Both stores are sequentially consistent and each side stores before it loads, so that not both can miss the
//! other. A signal that arrives late interrupts the thread and does nothing.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::run_page::RunPage;
use super::sys;

/// A handle by which any thread can kick one vCPU. Cheap to clone; outlives the vCPU harmlessly.
#[derive(Clone, Debug)]
pub struct Kicker {
    door: Arc<KickDoor>,
}

/// What the vCPU and its kickers share.
#[derive(Debug)]
pub struct KickDoor {
    page: RunPage,
    /// The thread that is between its last look at the requests and the return of `KVM_RUN`, or 0.
    inside: AtomicI32,
}

impl KickDoor {
    /// A door to the vCPU whose run page is `page`.
    ///
    /// # Errors
    /// When the signal's handler cannot be installed.
    pub fn new(page: RunPage) -> io::Result<KickDoor> {
        install_handler()?;
        Ok(KickDoor { page, inside: AtomicI32::new(0) })
    }

    /// The run page.
    pub fn page(&self) -> &RunPage {
        &self.page
    }

    /// The calling thread is about to run the vCPU.
    pub fn enter(&self) {
        self.inside.store(this_thread(), Ordering::SeqCst);
    }

    /// The calling thread is back.
    pub fn leave(&self) {
        self.inside.store(0, Ordering::SeqCst);
    }
}

impl Kicker {
    /// A kicker for `door`.
    pub fn new(door: Arc<KickDoor>) -> Kicker {
        Kicker { door }
    }

    /// Makes the vCPU leave the guest, or not enter it. Returns at once; write the request before.
    pub fn kick(&self) {
        self.door.page.ask_to_leave();
        let thread = self.door.inside.load(Ordering::SeqCst);
        if thread != 0 {
            sys::signal_thread(thread, SIGRTMIN());
        }
    }

    /// True while the vCPU's thread is in `KVM_RUN` or about to be: it may use translations.
    pub fn inside(&self) -> bool {
        self.door.inside.load(Ordering::SeqCst) != 0
    }
}

fn this_thread() -> i32 {
    thread_local! { static ID: i32 = sys::thread_id(); }
    ID.with(|id| *id)
}

extern "C" fn on_signal(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), on_signal).map_err(|error| error.errno()))
        .map_err(io::Error::from_raw_os_error)
}
