//! A memory barrier in all threads of the process at once.
//!
//! Story: one side of a race is hot and the other rare: the rare one pays for both. The hot one needs no fence of its own,
//! but its compiler must keep the order.
//!
//! See: membarrier(2), MEMBARRIER_CMD_PRIVATE_EXPEDITED.

use std::io;

const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

/// Asks the host for the right to [`all_threads`]; once is enough, more do no harm.
///
/// # Errors
///
/// When the host's kernel has no such barrier: it is older than 4.14.
pub fn prepare() -> io::Result<()> {
    membarrier(REGISTER_PRIVATE_EXPEDITED)
        .map_err(|error| io::Error::new(error.kind(), format!("several vCPUs need membarrier(2): {error}")))
}

/// Returns after every thread of the process has passed a full barrier, or did not run. After [`prepare`].
pub fn all_threads() {
    let done = membarrier(PRIVATE_EXPEDITED);
    debug_assert!(done.is_ok(), "a barrier that is registered cannot fail: {done:?}");
}

fn membarrier(command: libc::c_int) -> io::Result<()> {
    // SAFETY: the call takes three numbers and touches no memory of ours.
    let answer = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_barrier_for_all_threads_can_be_had() {
        super::prepare().expect("a host that is younger than 2017");
        super::prepare().expect("twice");
        super::all_threads();
    }
}
