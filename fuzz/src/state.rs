//! What holds of every CPU state, and what every step hands on.

use umbra::cpu::fpu::{MXCSR_MASK, status};
use umbra::cpu::{CpuState, Fpu, Seg, Segment, cr0, cr4, efer, eflags};

/// Bits of EFLAGS that exist, beside the one that is always set.
const EFLAGS: u32 = 0x003f_7fd5;
const CR0: u32 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// Bits of CR4 that some bus offers.
pub const CR4: u32 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::SMEP
    | cr4::SMAP;
/// The top of a limit in a descriptor's attribute word, and L.
const NEVER_IN_ATTRIBUTES: u16 = 0x2f00;

/// Reserved bits are as they must be, and no segment is one of 64-bit code.
pub fn check(cpu: &CpuState) {
    assert_eq!(cpu.eflags & !(EFLAGS | eflags::FIXED), 0, "reserved flags in {:#x}", cpu.eflags);
    assert_ne!(cpu.eflags & eflags::FIXED, 0, "EFLAGS bit 1");
    assert_eq!(cpu.cr0 & !CR0, 0, "reserved bits in CR0 {:#x}", cpu.cr0);
    assert_ne!(cpu.cr0 & cr0::ET, 0, "CR0.ET");
    assert!(cpu.cr0 & cr0::PG == 0 || cpu.protected(), "paging in real mode: CR0 {:#x}", cpu.cr0);
    assert!(cpu.cr0 & cr0::NW == 0 || cpu.cr0 & cr0::CD != 0, "NW without CD: CR0 {:#x}", cpu.cr0);
    assert_eq!(cpu.cr4 & !CR4, 0, "reserved bits in CR4 {:#x}", cpu.cr4);
    assert_eq!(cpu.msrs.efer & !efer::NXE, 0, "EFER {:#x}", cpu.msrs.efer);
    assert_eq!(cpu.msrs.apic_base & !0xf_ffff_f900, 0, "APIC_BASE {:#x}", cpu.msrs.apic_base);
    assert_eq!(cpu.msrs.misc_enable & !1, 0);
    assert_eq!((cpu.dr[6] & 0xffff_1ff0, cpu.dr[7] & 0xdc00), (0xffff_0ff0, 0x400), "DR6, DR7");
    assert!(cpu.cpl <= 3);
    for segment in cpu.seg.iter().chain([&cpu.ldtr, &cpu.tr]) {
        assert_eq!(segment.attributes & NEVER_IN_ATTRIBUTES, 0, "{segment:x?}");
    }
    check_fpu(&cpu.fpu);
}

/// INV-FPU-1 and INV-FPU-2: the image is one that FXRSTOR takes as it is, and that says the same again.
fn check_fpu(fpu: &Fpu) {
    assert_eq!(fpu.control() & 0xe0c0, 0x40, "FCW {:#x}", fpu.control());
    let pending = fpu.status() & !fpu.control() & status::EXCEPTIONS != 0;
    let summary = fpu.status() & (status::ES | status::B);
    assert_eq!(summary, if pending { status::ES | status::B } else { 0 }, "FSW {:#x}", fpu.status());
    assert_eq!(fpu.mxcsr() & !MXCSR_MASK, 0, "MXCSR {:#x}", fpu.mxcsr());
    assert!((0..8).all(|n| fpu.st(n) >> 80 == 0), "the upper bits of a slot");
    assert_eq!(Fpu::from_image(&fpu.image()).as_ref(), Some(fpu), "an image that is not its own");
}

/// A data segment register that its privilege may hold.
fn may_hold(segment: &Segment, cpl: u8) -> bool {
    segment.unusable || segment.conforming() || segment.dpl() >= cpl
}

/// What is wrong between CPL and the segment registers; nothing in a state that loads of registers alone have made.
pub fn inconsistency(cpu: &CpuState) -> Option<&'static str> {
    let (cs, ss) = (cpu.segment(Seg::Cs), cpu.segment(Seg::Ss));
    if !cpu.protected() {
        return (cpu.cpl != 0).then_some("real mode runs at CPL 0");
    }
    let data = [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs].map(|seg| cpu.segment(seg));
    if cs.unusable || !cs.code() {
        Some("CS is code")
    } else if cs.selector & 3 != u16::from(cpu.cpl) {
        Some("CPL is the RPL of CS")
    } else if if cs.conforming() { cs.dpl() > cpu.cpl } else { cs.dpl() != cpu.cpl } {
        Some("CPL is the DPL of CS, or above that of conforming code")
    } else if ss.unusable || !ss.writable() || ss.dpl() != cpu.cpl {
        Some("SS is writable data of this privilege")
    } else if !data.iter().all(|segment| may_hold(segment, cpu.cpl)) {
        Some("a data segment is of this privilege, or further out")
    } else {
        None
    }
}

/// A step from a consistent state ends in one. (The first steps after PE was set are the exception: segment registers
/// are then still those of real mode.)
pub fn check_handed_on(before: &CpuState, after: &CpuState) {
    let enters_protected = after.protected() && !before.protected();
    if inconsistency(before).is_none() && !enters_protected {
        assert_eq!(inconsistency(after), None, "before: {before:x?}\nafter: {after:x?}");
    }
    check(after);
}
