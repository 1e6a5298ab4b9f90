//! The VM: its descriptor, its one memory slot, and the firmware in the first frames of the pool.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{SyncReg, VcpuFd};
use umbra_firmware::Layout;
use umbra_mmu::{Mfn, Mpa};

use super::descriptors::Tables;
use super::doors::Doors;
use super::error::KvmError;
use super::host::{self, Host};
use super::kick::KickDoor;
use super::registers::EntryPlan;
use super::run_page::RunPage;
use super::sys::MachineVm;
use super::vcpu::KvmVcpu;
use crate::machine::Pool;

/// Where the firmware's image starts in the pool.
const IMAGE: Mpa = Mpa(0);

/// The memory slot whose coming and going is a flush.
const FLUSH_SLOT: u32 = 1;

/// What a VM is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// vCPUs, from 1 to [`umbra_firmware::constants::VCPUS_MAX`].
    pub vcpus: u32,
    /// RDTSC traps, so that the time-stamp counter is the VMM's.
    pub trap_tsc: bool,
    /// Doors that stand open: none, outside tests.
    pub doors: Doors,
}

impl Default for Options {
    fn default() -> Options {
        Options { vcpus: 1, trap_tsc: true, doors: Doors::closed() }
    }
}

/// A VM with the machine pool as its memory.
#[derive(Debug)]
pub struct KvmVm {
    machine: Arc<MachineVm>,
    layout: Layout,
    cpuid: kvm_bindings::CpuId,
    options: Options,
    flush_slot: Mutex<()>,
}

impl KvmVm {
    /// The frames at the start of the pool that the firmware of `vcpus` vCPUs takes.
    ///
    /// # Errors
    /// When there cannot be so many vCPUs.
    pub fn firmware_frames(vcpus: u32) -> Result<u64, KvmError> {
        Ok(Layout::new(vcpus)?.frames())
    }

    /// Makes a VM whose memory is `pool`, and writes the firmware into the pool's first frames.
    ///
    /// # Errors
    /// When the pool is too small, or KVM refuses.
    pub fn new(host: &Host, pool: Arc<Pool>, options: Options) -> Result<KvmVm, KvmError> {
        let layout = Layout::with_doors(options.vcpus, options.doors.open().image)?;
        if pool.frames() < layout.frames() {
            let (needed, frames) = (layout.frames(), pool.frames());
            return Err(KvmError::PoolTooSmall { vcpus: options.vcpus, needed, frames });
        }
        layout.write(IMAGE.0, |offset, bytes| pool.write(Mpa(IMAGE.0 + offset), bytes))?;
        let vm = host.kvm().create_vm().map_err(|error| call("KVM_CREATE_VM", error))?;
        let machine = MachineVm::new(vm, pool)
            .map_err(|source| KvmError::Call { what: "KVM_SET_USER_MEMORY_REGION", source })?;
        Ok(KvmVm {
            machine: Arc::new(machine),
            layout,
            cpuid: host.cpuid().clone(),
            options,
            flush_slot: Mutex::new(()),
        })
    }

    /// The machine pool.
    pub fn pool(&self) -> &Arc<Pool> {
        self.machine.pool()
    }

    /// The first frame that is not the firmware's.
    pub fn first_free_frame(&self) -> Mfn {
        Mfn((IMAGE.0 / umbra_mmu::PAGE_SIZE + self.layout.frames()) as u32)
    }

    /// The index and the value of the entry that every root must hold.
    pub fn root_entry(&self) -> (usize, u64) {
        (umbra_firmware::constants::PML4_SLOT, self.layout.pml4_entry(IMAGE.0))
    }

    /// Makes vCPU `index`, below the number that the VM was made for. Each can be made once.
    ///
    /// # Errors
    /// When there is no such vCPU, or KVM refuses.
    pub fn create_vcpu(&self, index: u32) -> Result<KvmVcpu, KvmError> {
        if index >= self.options.vcpus {
            return Err(KvmError::NoSuchVcpu { index, vcpus: self.options.vcpus });
        }
        let fd = self.machine.vm().create_vcpu(u64::from(index)).map_err(|e| call("KVM_CREATE_VCPU", e))?;
        fd.set_cpuid2(&self.cpuid).map_err(|error| call("KVM_SET_CPUID2", error))?;
        let cpuid_faults = !self.options.doors.open().native_cpuid && enable_cpuid_faulting(&fd);
        self.set_entry_msrs(&fd)?;
        let page =
            RunPage::map(&fd).map_err(|source| KvmError::Call { what: "mapping a run page", source })?;
        let door = KickDoor::new(page)
            .map_err(|source| KvmError::Call { what: "installing the kick's signal handler", source })?;
        let sregs = fd.get_sregs().map_err(|error| call("KVM_GET_SREGS", error))?;
        let features = host::features(self.machine.vm(), &fd, &sregs)?;
        let options = &self.options;
        let plan = EntryPlan::new(&self.layout, IMAGE, index, features, options.doors, options.trap_tsc);
        let tables = Tables::new(self.layout.vcpu(index), IMAGE, options.doors);
        let machine = Arc::clone(&self.machine);
        KvmVcpu::new(with_sync(fd), machine, plan, tables, sregs, Arc::new(door), cpuid_faults)
    }

    /// Makes every vCPU drop every translation, whatever the host: a memory slot comes and goes, for which KVM
    /// throws away what it has of the VM. Returns when no vCPU can use an old one. Costs milliseconds where
    /// vCPUs run; needed only where KVM has no two-dimensional paging.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn flush_by_slot(&self) -> Result<(), KvmError> {
        const ALIGN: u64 = 1 << 30;
        let refused = |source| KvmError::Call { what: "KVM_SET_USER_MEMORY_REGION", source };
        let _one_at_a_time = self.flush_slot.lock().unwrap_or_else(PoisonError::into_inner);
        let beyond = self.pool().bytes_with_homes().next_multiple_of(ALIGN);
        self.machine.set_slot(FLUSH_SLOT, beyond, 0, umbra_mmu::PAGE_SIZE).map_err(refused)?;
        self.machine.set_slot(FLUSH_SLOT, beyond, 0, 0).map_err(refused)
    }

    /// Gives the homes from `first` on a memory slot of their own, number `index` of such; 0 `pages` take it away. In between no
    /// page is in them.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_homes_slot(&self, index: u32, first: Mfn, pages: u32) -> Result<(), KvmError> {
        let at = first.at(0).0;
        let length = u64::from(pages) * umbra_mmu::PAGE_SIZE;
        self.machine
            .set_slot(FLUSH_SLOT + 1 + index, at, at, length)
            .map_err(|source| KvmError::Call { what: "KVM_SET_USER_MEMORY_REGION", source })
    }

    fn set_entry_msrs(&self, fd: &VcpuFd) -> Result<(), KvmError> {
        const STAR: u32 = 0xc000_0081;
        const CSTAR: u32 = 0xc000_0083;
        const SYSENTER_CS: u32 = 0x174;
        let open = self.options.doors.open();
        let [cs, eip, esp] = open.sysenter.unwrap_or_default();
        set_msr(fd, SYSENTER_CS, cs)?;
        set_msr(fd, SYSENTER_CS + 1, esp)?;
        set_msr(fd, SYSENTER_CS + 2, eip)?;
        let [star, cstar] = open.syscall.unwrap_or_default();
        set_msr(fd, STAR, star)?;
        set_msr(fd, CSTAR, cstar)
    }
}

/// An errno of KVM's as an error of ours.
pub(super) fn call(what: &'static str, error: kvm_ioctls::Error) -> KvmError {
    KvmError::Call { what, source: error.into() }
}

fn with_sync(mut fd: VcpuFd) -> VcpuFd {
    fd.set_sync_valid_reg(SyncReg::Register);
    fd.set_sync_valid_reg(SyncReg::SystemRegister);
    fd
}

/// CPUID faulting: MSR_PLATFORM_INFO says that the CPU has it, MSR_MISC_FEATURES_ENABLES switches it on.
fn enable_cpuid_faulting(fd: &VcpuFd) -> bool {
    const PLATFORM_INFO: u32 = 0xce;
    const MISC_FEATURES_ENABLES: u32 = 0x140;
    try_msr(fd, PLATFORM_INFO, 1 << 31) && try_msr(fd, MISC_FEATURES_ENABLES, 1)
}

fn try_msr(fd: &VcpuFd, index: u32, data: u64) -> bool {
    let entry = kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    Msrs::from_entries(&[entry]).is_ok_and(|msrs| matches!(fd.set_msrs(&msrs), Ok(1)))
}

fn set_msr(fd: &VcpuFd, index: u32, data: u64) -> Result<(), KvmError> {
    if try_msr(fd, index, data) {
        return Ok(());
    }
    let source = std::io::Error::other(format!("MSR {index:#x} cannot be set to {data:#x}"));
    Err(KvmError::Call { what: "KVM_SET_MSRS", source })
}
