//! /dev/kvm: opening it, what it must be able to do, and what to do where it cannot.
//!
//! Story: start-up, `umbra doctor` and every VM begin here. See: the kernel's Documentation/virt/kvm/api.rst.

use std::ffi::CString;
use std::io;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::cpu::cr4;

/// The device.
pub const DEVICE: &str = "/dev/kvm";

/// Why this host's KVM cannot be used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no device.
    #[error(
        "{path} does not exist: this kernel has no KVM loaded. Load it (modprobe kvm_intel or kvm_amd), switch \
         virtualization on in the machine's firmware setup, or give the container the device (--device /dev/kvm)"
    )]
    Missing {
        /// The path that was tried.
        path: String,
    },
    /// It may not be opened.
    #[error(
        "{path} may not be opened by this user. Add the user to the group that owns it \
         (sudo usermod -aG kvm $USER, then log in again)"
    )]
    Denied {
        /// The path that was tried.
        path: String,
    },
    /// It cannot be opened for another reason.
    #[error("{path} cannot be opened: {source}")]
    Open {
        /// The path that was tried.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is something else.
    #[error("{path} is not a KVM device; --backend soft needs none")]
    NotKvm {
        /// The path that was tried.
        path: String,
    },
    /// It speaks another version.
    #[error(
        "{path} speaks KVM API version {version}, but only version {KVM_API_VERSION} was ever released: is it KVM's device?"
    )]
    Version {
        /// The path that was tried.
        path: String,
        /// What it answered.
        version: i32,
    },
    /// It lacks what the backend stands on.
    #[error(
        "this host's KVM lacks {}; it needs a newer kernel (4.17 or later has all of it)",
        .0.join(", ")
    )]
    Lacks(Vec<&'static str>),
    /// A question to it failed.
    #[error("{DEVICE}: {what} failed: {source}")]
    Ask {
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What this KVM lets a vCPU have, beyond what is required. Bits of CR4 are found by trying: a KVM may accept what
/// its CPUID does not show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Features {
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.UMIP: SGDT, SIDT, SLDT, STR and SMSW trap at CPL 3.
    pub umip: bool,
    /// KVM_CAP_VCPU_EVENTS: an exception in flight at a kick can be seen.
    pub events: bool,
    /// KVM_CAP_DEBUGREGS: the guest's hardware breakpoints work natively.
    pub debug_registers: bool,
}

/// An open /dev/kvm that has what the backend needs.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Host {
    /// Opens /dev/kvm.
    ///
    /// # Errors
    /// Why it cannot be used, and what to do about it.
    pub fn open() -> Result<Host, HostError> {
        Host::open_at(DEVICE)
    }

    /// Opens a KVM device by another name.
    ///
    /// # Errors
    /// As [`Host::open`].
    pub fn open_at(path: &str) -> Result<Host, HostError> {
        let name = CString::new(path).map_err(|_| HostError::Missing { path: path.into() })?;
        let kvm = Kvm::new_with_path(name).map_err(|error| open_error(path, error.into()))?;
        let version = kvm.get_api_version();
        if version < 0 {
            return Err(HostError::NotKvm { path: path.into() });
        }
        if version != KVM_API_VERSION as i32 {
            return Err(HostError::Version { path: path.into(), version });
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| HostError::Ask { what: "KVM_GET_SUPPORTED_CPUID", source: error.into() })?;
        let lacking = lacking(&kvm, &cpuid);
        if !lacking.is_empty() {
            return Err(HostError::Lacks(lacking));
        }
        Ok(Host { kvm, cpuid: vcpu_cpuid(cpuid) })
    }

    /// The device.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The table that KVM is given for each vCPU. The guest never sees it: its CPUID traps.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }
}

fn open_error(path: &str, source: io::Error) -> HostError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => HostError::Missing { path },
        Some(libc::EACCES | libc::EPERM) => HostError::Denied { path },
        _ => HostError::Open { path, source },
    }
}

fn lacking(kvm: &Kvm, cpuid: &CpuId) -> Vec<&'static str> {
    let synced = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS) as i32;
    let needs = [
        (kvm.check_extension(Cap::UserMemory), "KVM_CAP_USER_MEMORY"),
        (kvm.check_extension(Cap::ExtCpuid), "KVM_CAP_EXT_CPUID"),
        (kvm.check_extension(Cap::SyncMmu), "KVM_CAP_SYNC_MMU"),
        (kvm.check_extension(Cap::ImmediateExit), "KVM_CAP_IMMEDIATE_EXIT"),
        (kvm.check_extension_int(Cap::SyncRegs) & synced == synced, "KVM_CAP_SYNC_REGS"),
        (extended(cpuid, 29), "long mode"),
        (extended(cpuid, 20), "NX"),
    ];
    needs.into_iter().filter(|(has, _)| !has).map(|(_, name)| name).collect()
}

/// What `vcpu` can have; its registers are left as `reset` has them.
///
/// # Errors
/// When KVM does not take back what it gave.
pub fn features(vm: &VmFd, vcpu: &VcpuFd, reset: &kvm_sregs) -> Result<Features, HostError> {
    let accepts = |bit: u32| {
        let cr4 = u64::from(cr4::PAE | bit);
        vcpu.set_sregs(&kvm_sregs { cr4, ..*reset }).is_ok()
    };
    let features = Features {
        smep: accepts(cr4::SMEP),
        smap: accepts(cr4::SMAP),
        umip: accepts(cr4::UMIP),
        events: vm.check_extension(Cap::VcpuEvents),
        debug_registers: vm.check_extension(Cap::Debugregs),
    };
    let back = vcpu.set_sregs(reset);
    back.map_err(|error| HostError::Ask { what: "KVM_SET_SREGS", source: error.into() }).map(|()| features)
}

/// A bit of EDX of CPUID leaf 0x80000001.
fn extended(cpuid: &CpuId, bit: u32) -> bool {
    cpuid.as_slice().iter().any(|entry| entry.function == 0x8000_0001 && entry.edx >> bit & 1 != 0)
}

/// The host's table without what the guest must not reach even by accident: nested virtualization, XSAVE and
/// what hangs on it, MONITOR, and KVM's own leaves.
fn vcpu_cpuid(mut cpuid: CpuId) -> CpuId {
    const KVM_LEAVES: u32 = 0x4000_0000;
    const MONITOR_VMX_XSAVE_OSXSAVE_AVX: u32 = 1 << 3 | 1 << 5 | 1 << 26 | 1 << 27 | 1 << 28;
    const SVM: u32 = 1 << 2;
    cpuid.retain(|entry| entry.function >> 28 != KVM_LEAVES >> 28 && entry.function != 0xd);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ecx &= !MONITOR_VMX_XSAVE_OSXSAVE_AVX,
            0x8000_0001 => entry.ecx &= !SVM,
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_that_is_missing_says_how_to_get_it() {
        let error = Host::open_at("/dev/no-such-kvm").unwrap_err();
        assert!(matches!(error, HostError::Missing { .. }));
        assert!(error.to_string().contains("modprobe"), "{error}");
    }

    #[test]
    fn device_that_may_not_be_opened_names_the_group() {
        for errno in [libc::EACCES, libc::EPERM] {
            let error = open_error(DEVICE, io::Error::from_raw_os_error(errno));
            assert!(matches!(error, HostError::Denied { .. }));
            assert!(error.to_string().contains("usermod -aG kvm"), "{error}");
        }
    }

    #[test]
    fn file_that_is_no_kvm_is_an_error() {
        assert!(matches!(Host::open_at("/dev/null"), Err(HostError::NotKvm { .. })));
        assert!(Host::open_at("/dev/kvm\0").is_err());
    }

    #[test]
    fn lack_of_capabilities_is_listed() {
        let error = HostError::Lacks(vec!["KVM_CAP_SYNC_REGS", "NX"]).to_string();
        assert!(error.contains("KVM_CAP_SYNC_REGS, NX") && error.contains("newer kernel"), "{error}");
    }
}
