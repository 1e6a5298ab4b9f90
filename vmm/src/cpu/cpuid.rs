//! The one CPUID table, for both backends.
//!
//! Story: every CPUID of the guest ends here, trapped on the kvm backend and interpreted on the soft one, so that a
//! guest sees the same CPU whatever runs it. The interpreter's limits on CR4 and EFER come from here too.
//!
//! Holds: what is offered works on every host we run on. No long mode, XSAVE, AVX, SYSENTER or SYSCALL: the first
//! cannot be had in compatibility mode, the last two would enter the host's kernel or ours. SMAP only on request,
//! since its checks need AC, whose changes by POPF nobody sees while guest-kernel code runs natively.
//!
//! Choices:
//! - The vendor is `GenuineIntel`, family 6 model 6, as QEMU's `qemu32`. Kernels switch on the vendor: an unknown one
//!   costs 32-bit Linux its "generic" path with a warning, and small kernels the local APIC or the MSRs altogether.
//!   Of those that are known, Intel's fits what we do: no SYSCALL outside 64-bit mode, and our error codes and
//!   page-fault rules are those of Intel's manual. That we are Umbra is said in the brand string and at 0x4000_0000.
//! - DE is not offered: I/O breakpoints and the fault at DR4 and DR5 are not emulated. VME, MCE, MTRR and CLFLUSH
//!   neither.
//! - MMX, SSE and SSE2 are offered since user code runs natively; FXSR comes with them.
//!
//! See: Intel SDM vol. 2A, CPUID.

#![forbid(unsafe_code)]

use super::state::{CpuState, cr4, efer};

/// Physical-address bits that guests see: PAE's classic 36.
pub const PHYSICAL_ADDRESS_BITS: u32 = umbra_mmu::PHYSICAL_BITS;
/// The signature at leaf 0x4000_0000, in EBX, ECX and EDX.
pub const HYPERVISOR_SIGNATURE: &[u8; 12] = b"UmbraUmbra  ";

const VENDOR: &[u8; 12] = b"GenuineIntel";
const BRAND: &[u8; 48] = b"Umbra shadow-paged 32-bit CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// Family 6, model 6, stepping 3.
pub const SIGNATURE: u32 = 0x663;
const BASIC_LEAF_MAX: u32 = 7;
const HYPERVISOR_LEAF_MAX: u32 = 0x4000_0000;
const EXTENDED_LEAF_MAX: u32 = 0x8000_0008;

/// The global enable in IA32_APIC_BASE.
const APIC_BASE_ENABLE: u64 = 1 << 11;

/// Leaf 1, EDX.
#[allow(missing_docs)]
pub mod leaf1_edx {
    pub const FPU: u32 = 1 << 0;
    pub const PSE: u32 = 1 << 3;
    pub const TSC: u32 = 1 << 4;
    pub const MSR: u32 = 1 << 5;
    pub const PAE: u32 = 1 << 6;
    pub const CX8: u32 = 1 << 8;
    pub const APIC: u32 = 1 << 9;
    pub const PGE: u32 = 1 << 13;
    pub const CMOV: u32 = 1 << 15;
    pub const PAT: u32 = 1 << 16;
    pub const PSE36: u32 = 1 << 17;
    pub const MMX: u32 = 1 << 23;
    pub const FXSR: u32 = 1 << 24;
    pub const SSE: u32 = 1 << 25;
    pub const SSE2: u32 = 1 << 26;
    /// All of them but APIC, which comes and goes with IA32_APIC_BASE.
    pub const OFFERED: u32 =
        FPU | PSE | TSC | MSR | PAE | CX8 | PGE | CMOV | PAT | PSE36 | MMX | FXSR | SSE | SSE2;
}

/// Leaf 1, ECX: a hypervisor is present.
pub const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 7, EBX: supervisor-mode execution prevention.
pub const LEAF7_EBX_SMEP: u32 = 1 << 7;
/// Leaf 7, EBX: supervisor-mode access prevention.
pub const LEAF7_EBX_SMAP: u32 = 1 << 20;
/// Leaf 0x8000_0001, EDX: no-execute pages.
pub const LEAF81_EDX_NX: u32 = 1 << 20;

/// What can be chosen about the guest's CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// vCPUs of the guest, 1..=255; they show as the logical processors of one package.
    pub vcpus: u8,
    /// Offer SMAP: only where the interpreter runs the guest's kernel, or the kernel is declared clean.
    pub smap: bool,
}

impl CpuModel {
    /// CPUID with EAX = `leaf`, ECX = `subleaf` on vCPU `vcpu` (its APIC ID) in `state`: EAX, EBX, ECX, EDX.
    ///
    /// A leaf beyond the last of its kind reads as the last basic one, as on Intel's CPUs; one in the hypervisor's
    /// range as zeros.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, vcpu: u8, state: &CpuState) -> [u32; 4] {
        match leaf {
            0 => named(BASIC_LEAF_MAX, VENDOR),
            1 => self.features(vcpu, state),
            // One descriptor byte that says "call me once", and no descriptors.
            2 => [1, 0, 0, 0],
            3..=6 => [0; 4],
            7 => self.structured_features(subleaf),
            0x4000_0000 => hypervisor(),
            0x4000_0001..=0x4fff_ffff => [0; 4],
            0x8000_0000 => [EXTENDED_LEAF_MAX, 0, 0, 0],
            0x8000_0001 => [0, 0, 0, LEAF81_EDX_NX],
            0x8000_0002..=0x8000_0004 => brand(leaf - 0x8000_0002),
            0x8000_0005..=0x8000_0007 => [0; 4],
            0x8000_0008 => [PHYSICAL_ADDRESS_BITS | 32 << 8, 0, 0, 0],
            _ => self.structured_features(subleaf),
        }
    }

    fn features(&self, vcpu: u8, state: &CpuState) -> [u32; 4] {
        let apic = if state.msrs.apic_base & APIC_BASE_ENABLE != 0 { leaf1_edx::APIC } else { 0 };
        let package = u32::from(vcpu) << 24 | u32::from(self.vcpus) << 16;
        // OSXSAVE would follow CR4, were there XSAVE.
        [SIGNATURE, package, LEAF1_ECX_HYPERVISOR, leaf1_edx::OFFERED | apic]
    }

    fn structured_features(&self, subleaf: u32) -> [u32; 4] {
        let smap = if self.smap { LEAF7_EBX_SMAP } else { 0 };
        match subleaf {
            0 => [0, LEAF7_EBX_SMEP | smap, 0, 0],
            _ => [0; 4],
        }
    }

    /// Bits of CR4 that the guest may set; the others are reserved and fault.
    pub fn cr4_writable(&self) -> u32 {
        let smap = if self.smap { cr4::SMAP } else { 0 };
        cr4::TSD | cr4::PSE | cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::SMEP | smap
    }

    /// Bits of IA32_EFER that the guest may set; the others are reserved and fault.
    pub fn efer_writable(&self) -> u64 {
        efer::NXE
    }
}

fn word(text: &[u8], index: usize) -> u32 {
    (0..4).fold(0, |word, byte| word | u32::from(text[4 * index + byte]) << (8 * byte))
}

/// Leaf 0: twelve characters in EBX, EDX, ECX.
fn named(eax: u32, name: &[u8; 12]) -> [u32; 4] {
    [eax, word(name, 0), word(name, 2), word(name, 1)]
}

/// Leaf 0x4000_0000: twelve characters in EBX, ECX, EDX, in order.
fn hypervisor() -> [u32; 4] {
    let name = HYPERVISOR_SIGNATURE;
    [HYPERVISOR_LEAF_MAX, word(name, 0), word(name, 1), word(name, 2)]
}

/// Sixteen characters of the brand string; `part` is 0..=2.
fn brand(part: u32) -> [u32; 4] {
    [0, 1, 2, 3].map(|index| word(BRAND, 4 * part as usize + index))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: CpuModel = CpuModel { vcpus: 4, smap: false };

    fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
        MODEL.cpuid(leaf, subleaf, 3, &CpuState::flat_protected_mode(0))
    }

    fn text(words: &[u32]) -> String {
        let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn vendor_brand_and_hypervisor_read_as_text() {
        let [max, ebx, ecx, edx] = cpuid(0, 0);
        assert_eq!((max, text(&[ebx, edx, ecx])), (7, "GenuineIntel".into()));
        let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|leaf| cpuid(leaf, 0)).collect();
        assert_eq!(text(&brand).trim_end_matches('\0'), "Umbra shadow-paged 32-bit CPU");
        let [max, ebx, ecx, edx] = cpuid(0x4000_0000, 0);
        assert_eq!((max, text(&[ebx, ecx, edx])), (0x4000_0000, "UmbraUmbra  ".into()));
    }

    #[test]
    fn features_that_would_leave_the_cage_are_absent() {
        let [_, _, ecx, edx] = cpuid(1, 0);
        // SSE3 and up, x2APIC, TSC deadline, XSAVE, OSXSAVE, AVX: everything but the hypervisor bit.
        assert_eq!(ecx, LEAF1_ECX_HYPERVISOR);
        let (vme, de, mce, sep, mtrr, mca) = (1, 2, 7, 11, 12, 14);
        for bit in [vme, de, mce, sep, mtrr, mca] {
            assert_eq!(edx & (1 << bit), 0, "bit {bit}");
        }
        let (syscall, long_mode, rdtscp, gigabyte_pages) = (11, 29, 27, 26);
        let [_, _, _, edx] = cpuid(0x8000_0001, 0);
        for bit in [syscall, long_mode, rdtscp, gigabyte_pages] {
            assert_eq!(edx & (1 << bit), 0, "extended bit {bit}");
        }
        assert_eq!(edx & (1 << 20), 1 << 20, "NX");
    }

    #[test]
    fn what_the_walker_reads_is_offered() {
        let [_, _, _, edx] = cpuid(1, 0);
        let (pse, pae, pge, pse36) = (3, 6, 13, 17);
        for bit in [pse, pae, pge, pse36] {
            assert_eq!(edx >> bit & 1, 1, "bit {bit}");
        }
        assert_eq!(cpuid(0x8000_0008, 0)[0] & 0xff, umbra_mmu::PHYSICAL_BITS);
    }

    #[test]
    fn features_that_a_32_bit_kernel_wants_are_there() {
        let [_, _, _, edx] = cpuid(1, 0);
        for bit in [0, 3, 4, 5, 6, 8, 9, 13, 15, 16, 23, 24, 25, 26] {
            assert_ne!(edx & (1 << bit), 0, "bit {bit}");
        }
        assert_eq!(cpuid(0x8000_0008, 0)[0], 36 | 32 << 8);
    }

    #[test]
    fn apic_bit_follows_the_msr() {
        let mut state = CpuState::flat_protected_mode(0);
        assert_ne!(MODEL.cpuid(1, 0, 0, &state)[3] & leaf1_edx::APIC, 0);
        state.msrs.apic_base &= !0x800;
        assert_eq!(MODEL.cpuid(1, 0, 0, &state)[3] & leaf1_edx::APIC, 0);
    }

    #[test]
    fn package_shows_its_processors() {
        assert_eq!(cpuid(1, 0)[1], 3 << 24 | 4 << 16);
    }

    #[test]
    fn smep_always_and_smap_on_request_with_their_cr4_bits() {
        assert_eq!(cpuid(7, 0), [0, LEAF7_EBX_SMEP, 0, 0]);
        assert_eq!(cpuid(7, 1), [0; 4]);
        assert_eq!(MODEL.cr4_writable() & (cr4::SMEP | cr4::SMAP), cr4::SMEP);
        let smap = CpuModel { smap: true, ..MODEL };
        let state = CpuState::flat_protected_mode(0);
        assert_eq!(smap.cpuid(7, 0, 0, &state)[1], LEAF7_EBX_SMEP | LEAF7_EBX_SMAP);
        assert_ne!(smap.cr4_writable() & cr4::SMAP, 0);
    }

    #[test]
    fn leaves_beyond_the_last_read_as_the_last_basic_one() {
        for leaf in [8, 0xb, 0xd, 0x3fff_ffff, 0x5000_0000, 0x8000_0009, u32::MAX] {
            assert_eq!(cpuid(leaf, 0), cpuid(7, 0), "{leaf:#x}");
            assert_eq!(cpuid(leaf, 1), [0; 4], "{leaf:#x}");
        }
        for leaf in [0x4000_0001, 0x4000_0100, 0x4fff_ffff] {
            assert_eq!(cpuid(leaf, 0), [0; 4], "{leaf:#x}");
        }
    }
}
