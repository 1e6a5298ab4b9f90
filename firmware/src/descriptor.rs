//! Descriptors and gates in the format of the CPU.
//!
//! See: Intel SDM vol. 3A, 3.4.5 (segment descriptors), 6.14.1 (64-bit gates), 7.2.3 (64-bit TSS descriptor).

/// Bits of a segment descriptor.
#[allow(missing_docs)]
pub mod bits {
    pub const ACCESSED: u64 = 1 << 40;
    pub const CONFORMING: u64 = 1 << 42;
    pub const CODE: u64 = 1 << 43;
    pub const SEGMENT: u64 = 1 << 44;
    pub const DPL: u64 = 3 << 45;
    pub const PRESENT: u64 = 1 << 47;
    pub const LONG: u64 = 1 << 53;
    pub const BIG: u64 = 1 << 54;
    pub const GRANULAR: u64 = 1 << 55;
}

/// A 64-bit code segment, execute-only, with privilege level `dpl` (0..=3).
pub const fn code64(dpl: u64) -> u64 {
    bits::PRESENT | bits::SEGMENT | bits::CODE | bits::ACCESSED | bits::LONG | (dpl << 45)
}

/// The two entries of a busy 64-bit TSS descriptor with DPL 0.
pub const fn tss64(base: u64, limit: u32) -> [u64; 2] {
    const BUSY_TSS: u64 = 0xb << 40;
    let limit = limit as u64;
    let low = (limit & 0xffff)
        | (limit & 0xf_0000) << 32
        | (base & 0xff_ffff) << 16
        | (base >> 24 & 0xff) << 56
        | BUSY_TSS
        | bits::PRESENT;
    [low, base >> 32]
}

/// The two entries of a 64-bit interrupt gate with DPL 0 and no stack table.
pub const fn interrupt_gate(offset: u64, selector: u16) -> [u64; 2] {
    const INTERRUPT_GATE: u64 = 0xe << 40;
    let low = (offset & 0xffff)
        | (selector as u64) << 16
        | INTERRUPT_GATE
        | bits::PRESENT
        | (offset >> 16 & 0xffff) << 48;
    [low, offset >> 32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_match_the_manual() {
        assert_eq!(code64(0), 0x0020_9900_0000_0000);
        assert_eq!(code64(3), 0x0020_f900_0000_0000);
        assert_eq!(tss64(0xffff_8000_1234_5678, 0x67), [0x1200_8b34_5678_0067, 0xffff_8000]);
        assert_eq!(tss64(0, 0xa_0001)[0], 0x000a_8b00_0000_0001);
        assert_eq!(interrupt_gate(0xffff_8000_1234_5670, 0xffe8), [0x1234_8e00_ffe8_5670, 0xffff_8000]);
    }
}
