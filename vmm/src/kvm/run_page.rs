//! The run page, as another thread may see it: one byte to write, a few words to read.
//!
//! Story: `KVM_RUN` shares a page with the VMM. The vCPU's own thread uses it through `VcpuFd`; a thread that
//! kicks the vCPU sets `immediate_exit` in it through this second mapping, which lives for as long as anybody
//! holds it, whatever became of the vCPU.

use std::io;
use std::mem::{offset_of, size_of};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::sys;

/// A mapping of one vCPU's run page.
#[derive(Debug)]
pub struct RunPage {
    region: MmapRegion,
}

impl RunPage {
    /// Maps the run page of `vcpu`.
    ///
    /// # Errors
    /// When the process is out of descriptors or address space.
    pub fn map(vcpu: &VcpuFd) -> io::Result<RunPage> {
        const BYTES: usize = size_of::<kvm_run>().next_multiple_of(4096);
        MmapRegionBuilder::new(BYTES)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED)
            .with_file_offset(FileOffset::new(sys::duplicate(vcpu)?, 0))
            .build()
            .map(|region| RunPage { region })
            .map_err(io::Error::other)
    }

    /// Makes a `KVM_RUN` that starts from now on return at once with EINTR.
    pub fn ask_to_leave(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Takes the request back; true where there was one.
    pub fn take_request(&self) -> bool {
        self.immediate_exit().swap(0, Ordering::SeqCst) != 0
    }

    /// What KVM_EXIT_INTERNAL_ERROR left: its suberror.
    pub fn internal_error(&self) -> u32 {
        let union = offset_of!(kvm_run, __bindgen_anon_1);
        self.region.get_atomic_ref::<AtomicU32>(union).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        self.region
            .get_atomic_ref(offset_of!(kvm_run, immediate_exit))
            .expect("the mapping is larger than a kvm_run")
    }
}
