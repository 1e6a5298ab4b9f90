//! Registers of one 32-bit x86 CPU, hidden segment parts included.
//!
//! Story: a backend fills this at each exit and is rebuilt from it at each entry; the interpreter works on
//! nothing else. Holds: values are the *guest's* (virtual CPL, virtual IF), never what the hardware runs with.
//!
//! See: Intel SDM vol. 3A, 2.5 (control registers), 3.4 (segment registers).

use super::Fpu;

/// Index of EDX in [`CpuState::gpr`].
const EDX: usize = 2;
/// IA32_APIC_BASE after reset, and its bit that says "boot processor".
const APIC_BASE_DEFAULT: u64 = 0xfee0_0800;
const APIC_BASE_BSP: u64 = 1 << 8;

/// A segment register by its encoding in ModRM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seg {
    /// ES, encoding 0.
    Es = 0,
    /// CS, encoding 1.
    Cs = 1,
    /// SS, encoding 2.
    Ss = 2,
    /// DS, encoding 3.
    Ds = 3,
    /// FS, encoding 4.
    Fs = 4,
    /// GS, encoding 5.
    Gs = 5,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u32,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Descriptor bits 40..=55 as they stand in the descriptor: type in 0..=3, S 4, DPL 5..=6, P 7, AVL 12, L 13,
    /// D/B 14, G 15. Bits 8..=11 (the limit's top) are zero, and so is L: this CPU has no long mode, and a guest's
    /// L must never reach the one that has.
    pub attributes: u16,
    /// True for a null or never loaded register: any use faults.
    pub unusable: bool,
}

impl Segment {
    /// Type field, 0..=15.
    pub fn kind(&self) -> u8 {
        (self.attributes & 0xf) as u8
    }

    /// Descriptor privilege level, 0..=3.
    pub fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }

    /// The D/B bit: 32-bit default operand and stack size.
    pub fn big(&self) -> bool {
        self.attributes & (1 << 14) != 0
    }

    /// True for a code segment (in protected mode; real mode does not care).
    pub fn code(&self) -> bool {
        self.kind() & 8 != 0
    }

    /// True for conforming code: runs at its caller's privilege.
    pub fn conforming(&self) -> bool {
        self.kind() & 0xc == 0xc
    }

    /// True where data may be read: data, or readable code.
    pub fn readable(&self) -> bool {
        !self.code() || self.kind() & 2 != 0
    }

    /// True for writable data.
    pub fn writable(&self) -> bool {
        self.kind() & 0xa == 2
    }

    /// True for data whose valid offsets lie above the limit.
    pub fn expand_down(&self) -> bool {
        self.kind() & 0xc == 4
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u32,
    /// Offset of the table's last byte.
    pub limit: u16,
}

/// The model-specific registers that have state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msrs {
    /// IA32_EFER; only NXE can ever be set.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// Added to the time-stamp counter's source; what a write to IA32_TSC changes.
    pub tsc_offset: u64,
}

/// One CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuState {
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI: the order of the encoding.
    pub gpr: [u32; 8],
    /// Instruction pointer, relative to CS.
    pub eip: u32,
    /// Flags, bit 1 always set; IF is the guest's own.
    pub eflags: u32,
    /// Segment registers by [`Seg`].
    pub seg: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table register.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u32,
    /// CR2: linear address of the last page fault.
    pub cr2: u32,
    /// CR3.
    pub cr3: u32,
    /// CR4.
    pub cr4: u32,
    /// DR0..DR7 (4 and 5 unused).
    pub dr: [u32; 8],
    /// Model-specific registers.
    pub msrs: Msrs,
    /// x87, MMX and SSE registers. Where the hardware holds them, this is only right after
    /// [`Bus::want_fpu`](crate::interp::Bus::want_fpu).
    pub fpu: Fpu,
    /// Current privilege level: the guest's, not the one the hardware runs at.
    pub cpl: u8,
    /// HLT was executed; an interrupt, NMI or reset ends it.
    pub halted: bool,
    /// Interrupts are held off for one instruction (after STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// An NMI handler is running: further NMIs wait for its IRET.
    pub nmi_blocked: bool,
}

impl CpuState {
    /// A CPU as Multiboot1 hands it to a kernel: flat 32-bit protected mode, paging and interrupts off
    /// (Multiboot specification 0.6.96, section 3.2), and otherwise as after reset.
    pub fn flat_protected_mode(eip: u32) -> CpuState {
        let segment = |selector, attributes| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            attributes,
            unusable: false,
        };
        let data = segment(0x10, 0xc093);
        CpuState {
            gpr: [0; 8],
            eip,
            eflags: eflags::FIXED,
            seg: [data, segment(0x08, 0xc09b), data, data, data, data],
            ldtr: Segment { limit: 0xffff, attributes: 0x82, unusable: true, ..Segment::default() },
            tr: Segment { limit: 0xffff, attributes: 0x8b, ..Segment::default() },
            gdtr: TableRegister { base: 0, limit: 0 },
            idtr: TableRegister { base: 0, limit: 0 },
            cr0: cr0::PE | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            msrs: Msrs {
                apic_base: APIC_BASE_DEFAULT | APIC_BASE_BSP,
                pat: 0x0007_0406_0007_0406,
                misc_enable: 1,
                ..Msrs::default()
            },
            fpu: Fpu::default(),
            cpl: 0,
            halted: false,
            interrupt_shadow: false,
            nmi_blocked: false,
        }
    }

    /// CPU `id` as RESET leaves it: in real mode at the firmware's first instruction. The first is the boot processor.
    ///
    /// See: Intel SDM vol. 3A, table 10-1.
    pub fn reset(id: u32) -> CpuState {
        let segment = |selector: u16, attributes| Segment {
            selector,
            base: u32::from(selector) << 4,
            limit: 0xffff,
            attributes,
            unusable: false,
        };
        let data = segment(0, 0x93);
        let code = Segment { base: 0xffff_0000, ..segment(0xf000, 0x9b) };
        let bsp = if id == 0 { APIC_BASE_BSP } else { 0 };
        let mut gpr = [0; 8];
        gpr[EDX] = super::cpuid::SIGNATURE;
        let after_multiboot = CpuState::flat_protected_mode(0xfff0);
        CpuState {
            gpr,
            seg: [data, code, data, data, data, data],
            ldtr: Segment { unusable: true, ..segment(0, 0x82) },
            tr: segment(0, 0x8b),
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            msrs: Msrs { apic_base: APIC_BASE_DEFAULT | bsp, ..after_multiboot.msrs },
            ..after_multiboot
        }
    }

    /// The same CPU after an INIT, which keeps the FPU, the caches' mode and the MSRs but EFER.
    pub fn after_init(&self, id: u32) -> CpuState {
        let reset = CpuState::reset(id);
        let kept = cr0::CD | cr0::NW;
        CpuState {
            cr0: reset.cr0 & !kept | self.cr0 & kept,
            msrs: Msrs { efer: 0, ..self.msrs },
            fpu: self.fpu.clone(),
            ..reset
        }
    }

    /// A start-up: the CPU begins at the first byte of the page with this number.
    pub fn start_up(&mut self, page: u8) {
        let code = &mut self.seg[Seg::Cs as usize];
        (code.selector, code.base) = (u16::from(page) << 8, u32::from(page) << 12);
        self.eip = 0;
    }

    /// One segment register.
    pub fn segment(&self, seg: Seg) -> &Segment {
        &self.seg[seg as usize]
    }

    /// True in protected mode.
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// True where an external interrupt would be taken before the next instruction.
    pub fn interruptible(&self) -> bool {
        self.eflags & eflags::IF != 0 && !self.interrupt_shadow
    }

    /// The I/O privilege level, 0..=3.
    pub fn iopl(&self) -> u8 {
        ((self.eflags & eflags::IOPL) >> 12) as u8
    }

    /// True in protected mode with paging on.
    pub fn paging(&self) -> bool {
        self.cr0 & (cr0::PE | cr0::PG) == cr0::PE | cr0::PG
    }
}

/// Bits of CR0.
#[allow(missing_docs)]
pub mod cr0 {
    pub const PE: u32 = 1 << 0;
    pub const MP: u32 = 1 << 1;
    pub const EM: u32 = 1 << 2;
    pub const TS: u32 = 1 << 3;
    pub const ET: u32 = 1 << 4;
    pub const NE: u32 = 1 << 5;
    pub const WP: u32 = 1 << 16;
    pub const AM: u32 = 1 << 18;
    pub const NW: u32 = 1 << 29;
    pub const CD: u32 = 1 << 30;
    pub const PG: u32 = 1 << 31;
}

/// Bits of CR4 that a guest may see.
#[allow(missing_docs)]
pub mod cr4 {
    pub const VME: u32 = 1 << 0;
    pub const PVI: u32 = 1 << 1;
    pub const TSD: u32 = 1 << 2;
    pub const DE: u32 = 1 << 3;
    pub const PSE: u32 = 1 << 4;
    pub const PAE: u32 = 1 << 5;
    pub const MCE: u32 = 1 << 6;
    pub const PGE: u32 = 1 << 7;
    pub const PCE: u32 = 1 << 8;
    pub const OSFXSR: u32 = 1 << 9;
    pub const OSXMMEXCPT: u32 = 1 << 10;
    pub const UMIP: u32 = 1 << 11;
    pub const SMEP: u32 = 1 << 20;
    pub const SMAP: u32 = 1 << 21;
}

/// Bits of IA32_EFER.
#[allow(missing_docs)]
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// Bits of EFLAGS.
#[allow(missing_docs)]
pub mod eflags {
    pub const CF: u32 = 1 << 0;
    pub const FIXED: u32 = 1 << 1;
    pub const PF: u32 = 1 << 2;
    pub const AF: u32 = 1 << 4;
    pub const ZF: u32 = 1 << 6;
    pub const SF: u32 = 1 << 7;
    pub const TF: u32 = 1 << 8;
    pub const IF: u32 = 1 << 9;
    pub const DF: u32 = 1 << 10;
    pub const OF: u32 = 1 << 11;
    pub const IOPL: u32 = 3 << 12;
    pub const NT: u32 = 1 << 14;
    pub const RF: u32 = 1 << 16;
    pub const VM: u32 = 1 << 17;
    pub const AC: u32 = 1 << 18;
    pub const VIF: u32 = 1 << 19;
    pub const VIP: u32 = 1 << 20;
    pub const ID: u32 = 1 << 21;
}
