//! The system calls of the kvm backend that Rust cannot check, each behind a safe function.
//!
//! Holds: nothing else in the backend is unsafe.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::machine::Pool;

/// A second handle on a vCPU's file, for a mapping of its run page that other threads may hold.
///
/// # Errors
/// When the process is out of file descriptors.
pub fn duplicate(vcpu: &VcpuFd) -> io::Result<File> {
    // SAFETY: the descriptor belongs to `vcpu`, which is borrowed until this function returns, so it is open and
    // stays open for as long as the borrow is used.
    let borrowed = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    borrowed.try_clone_to_owned().map(File::from)
}

/// A VM whose machine memory is the pool.
///
/// Holds: the pool lives as long as the VM's descriptor. Whoever holds a vCPU of it also holds the [`MachineVm`].
#[derive(Debug)]
pub struct MachineVm {
    vm: VmFd,
    pool: Arc<Pool>,
}

impl MachineVm {
    /// Makes all of `pool` slot 0 of `vm`, at machine address 0.
    ///
    /// # Errors
    /// What KVM says.
    pub fn new(vm: VmFd, pool: Arc<Pool>) -> io::Result<MachineVm> {
        let machine = MachineVm { vm, pool };
        machine.set_slot(0, 0, 0, machine.pool.bytes())?;
        Ok(machine)
    }

    /// The VM's descriptor.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Makes `length` bytes of the pool and its homes, from byte `from` on, slot `slot` at machine address `address`; length 0
    /// deletes the slot.
    ///
    /// # Errors
    /// What KVM says.
    pub fn set_slot(&self, slot: u32, address: u64, from: u64, length: u64) -> io::Result<()> {
        let all = self.pool.bytes_with_homes();
        assert!(from <= all && length <= all - from, "a slot is part of the pool");
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: length,
            userspace_addr: self.pool.host_address() + from,
        };
        // SAFETY: the range is mapped (checked against the sizes above), readable and writable but for homes that show nothing,
        // which KVM finds as it finds any hole. It is given
        // to volatile and atomic accesses alone, so that a guest which writes it changes no Rust value behind its
        // back. It stays mapped while a vCPU can run: `self` holds the pool, and each vCPU holds `self`.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(io::Error::from)
    }
}

/// Sets a vCPU's extended state.
///
/// # Errors
/// What KVM says.
pub fn set_xsave(vcpu: &VcpuFd, state: &kvm_xsave) -> io::Result<()> {
    // SAFETY: KVM reads as many bytes as the state of the features that this process may give to guests takes:
    // size_of::<kvm_xsave>() unless it has asked for more (arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM), which nothing
    // here does.
    unsafe { vcpu.set_xsave(state) }.map_err(io::Error::from)
}

/// The calling thread's id.
pub fn thread_id() -> i32 {
    // SAFETY: gettid takes nothing, touches no memory and cannot fail.
    unsafe { libc::gettid() }
}

/// Sends `signal` to the thread `thread` of this process. A thread that is gone by now is not an error.
pub fn signal_thread(thread: i32, signal: i32) {
    // SAFETY: tgkill takes three integers and touches no memory of ours; the signal has a handler that does
    // nothing, in every thread of this process, so whichever thread gets it is only interrupted.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
}
