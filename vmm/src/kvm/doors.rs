//! The doors by which a guest at CPL 3 could leave its world. All are closed.
//!
//! Story: each field names one thing that the backend does to keep guest code where it belongs. A test opens one
//! door at a time and sees the attack on it succeed; with the door closed the same attack must trap.
//!
//! See: `tests/doors.rs`, which holds the attacks.

use umbra_firmware::ImageDoors;

/// Which doors stand open. The default, and the only value outside tests, is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Doors {
    open: OpenDoors,
}

/// The doors, each closed while false.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenDoors {
    /// The LDT is as KVM resets it: present, base 0, limit 64 KiB, so the guest's page 0 is a descriptor table.
    pub reset_ldt: bool,
    /// Code descriptors with L=1 are translated like others.
    pub long_code: bool,
    /// Descriptors with S=0 (call gates, TSSs) are copied as they are.
    pub system_descriptors: bool,
    /// The guest's IOPL is loaded as it is.
    pub iopl: bool,
    /// IA32_SYSENTER_CS, EIP and ESP are loaded with these.
    pub sysenter: Option<[u64; 3]>,
    /// EFER.SCE is 1, and IA32_STAR and IA32_CSTAR hold these.
    pub syscall: Option<[u64; 2]>,
    /// CR4.SMEP is 0.
    pub no_smep: bool,
    /// CR4.SMAP is 0.
    pub no_smap: bool,
    /// CR4.UMIP is 0.
    pub no_umip: bool,
    /// CPUID does not fault.
    pub native_cpuid: bool,
    /// RDTSC does not fault.
    pub native_tsc: bool,
    /// The doors of the firmware's image.
    pub image: ImageDoors,
}

impl Doors {
    /// Every door closed.
    pub fn closed() -> Doors {
        Doors::default()
    }

    /// Doors for a test that attacks them.
    #[doc(hidden)]
    pub fn opened(open: OpenDoors) -> Doors {
        Doors { open }
    }

    /// Which stand open.
    pub(super) fn open(&self) -> &OpenDoors {
        &self.open
    }
}
