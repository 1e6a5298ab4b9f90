//! The FPU of one CPU: x87, MMX and SSE registers, laid out as FXSAVE stores them in 32-bit code.
//!
//! Story: the interpreter's FPU instructions work on this; a backend whose hardware holds the FPU fetches it when one
//! is met ([`Bus::want_fpu`](crate::interp::Bus::want_fpu)) and gives it back before it enters the guest.
//!
//! Holds:
//! - INV-FPU-1: reserved bits are as hardware has them (FCW, MXCSR and its mask, the upper 48 bits of each x87 slot),
//!   so that an FXRSTOR of the image never faults.
//! - INV-FPU-2: the summary bits ES and B say whether an exception flag is set whose mask in FCW is clear.
//! - Slots are in stack order, ST(0) first, as in the image; `tags` is by physical register, one bit each, set where
//!   the register is not empty. What changes TOP without moving the stack turns the slots ([`Fpu::set_top`]).
//! - The pointers (FIP, FCS, FDP, FDS, FOP) are the guest's, never those of the host's own FPU.
//!
//! See: Intel SDM vol. 1, 8.1 (x87), 9.6 (MMX on x87), 10.2.3 (MXCSR), 10.5.1 (the image).

use std::mem::{align_of, offset_of, size_of};

/// Bytes of an FXSAVE image.
pub const IMAGE_BYTES: usize = 512;
/// The bytes of it that 32-bit code stores and loads; the rest is left alone.
pub const IMAGE_BYTES_USED: usize = 288;
/// The bits of MXCSR that exist: all 16, denormals-are-zeros among them. What an image says as MXCSR_MASK.
pub const MXCSR_MASK: u32 = 0xffff;
/// MXCSR after reset: all exceptions masked.
pub const MXCSR_RESET: u32 = 0x1f80;
/// FCW after FNINIT: extended precision, all exceptions masked.
pub const CONTROL_RESET: u16 = 0x037f;

/// The bits of FCW that can be written: masks, precision, rounding, and the one that once was infinity control.
const CONTROL_BITS: u16 = 0x1f3f;
/// The bit of FCW that always reads as one.
const CONTROL_ONES: u16 = 0x0040;
/// The low 80 bits of a slot.
const REGISTER_BITS: u128 = (1 << 80) - 1;

/// Bits of the x87 status word.
#[allow(missing_docs)]
pub mod status {
    pub const IE: u16 = 1 << 0;
    pub const DE: u16 = 1 << 1;
    pub const ZE: u16 = 1 << 2;
    pub const OE: u16 = 1 << 3;
    pub const UE: u16 = 1 << 4;
    pub const PE: u16 = 1 << 5;
    pub const SF: u16 = 1 << 6;
    pub const ES: u16 = 1 << 7;
    pub const B: u16 = 1 << 15;
    /// The flags that FCW can mask.
    pub const EXCEPTIONS: u16 = IE | DE | ZE | OE | UE | PE;
    /// The exceptions that keep a store from being made.
    pub const STORE_EXCEPTIONS: u16 = IE | OE | UE;
    /// Everything that FNCLEX clears.
    pub const CLEARED: u16 = EXCEPTIONS | SF | ES | B;
}

/// Where the last x87 instruction that was not a control instruction stood, and its memory operand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pointers {
    /// FOP: the low three bits of the first opcode byte and all of the second.
    pub opcode: u16,
    /// FIP.
    pub ip: u32,
    /// FCS.
    pub cs: u16,
    /// FDP.
    pub dp: u32,
    /// FDS.
    pub ds: u16,
}

/// x87, MMX and SSE registers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Fpu {
    control: u16,
    status: u16,
    tags: u8,
    reserved_0: u8,
    opcode: u16,
    ip: u32,
    cs: u16,
    reserved_1: u16,
    dp: u32,
    ds: u16,
    reserved_2: u16,
    mxcsr: u32,
    mxcsr_mask: u32,
    st: [u128; 8],
    xmm: [u128; 8],
    /// XMM8 to XMM15 of 64-bit code, and bytes that nobody stores: zeros.
    rest: [u128; 14],
}

// The image that FXSAVE stores.
const _: () = assert!(size_of::<Fpu>() == IMAGE_BYTES && align_of::<Fpu>() == 16);
const _: () = assert!(offset_of!(Fpu, ip) == 8 && offset_of!(Fpu, dp) == 16 && offset_of!(Fpu, mxcsr) == 24);
const _: () =
    assert!(offset_of!(Fpu, st) == 32 && offset_of!(Fpu, xmm) == 160 && offset_of!(Fpu, rest) == 288);

impl Default for Fpu {
    /// As after reset and FNINIT.
    fn default() -> Fpu {
        Fpu {
            control: CONTROL_RESET,
            status: 0,
            tags: 0,
            reserved_0: 0,
            opcode: 0,
            ip: 0,
            cs: 0,
            reserved_1: 0,
            dp: 0,
            ds: 0,
            reserved_2: 0,
            mxcsr: MXCSR_RESET,
            mxcsr_mask: MXCSR_MASK,
            st: [0; 8],
            xmm: [0; 8],
            rest: [0; 14],
        }
    }
}

impl Fpu {
    /// The state that FXRSTOR makes of an image. None where MXCSR has reserved bits set, which is a #GP.
    pub fn from_image(image: &[u8; IMAGE_BYTES]) -> Option<Fpu> {
        let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let dword = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        let slot = |at: usize| (0..16).rev().fold(0, |value, n| value << 8 | u128::from(image[at + n]));
        let mut fpu = Fpu {
            opcode: word(6) & 0x7ff,
            ip: dword(8),
            cs: word(12),
            dp: dword(16),
            ds: word(20),
            tags: image[4],
            st: std::array::from_fn(|n| slot(32 + 16 * n) & REGISTER_BITS),
            xmm: std::array::from_fn(|n| slot(160 + 16 * n)),
            ..Fpu::default()
        };
        fpu.set_words(word(0), word(2));
        fpu.set_mxcsr(dword(24)).then_some(fpu)
    }

    /// The state in an image that hardware has stored: bits of MXCSR that this CPU does not have are dropped.
    pub fn from_hardware(image: &[u8; IMAGE_BYTES]) -> Fpu {
        let mut image = *image;
        for (byte, mask) in image[24..28].iter_mut().zip(MXCSR_MASK.to_le_bytes()) {
            *byte &= mask;
        }
        Fpu::from_image(&image).unwrap_or_default()
    }

    /// The image that FXSAVE stores.
    pub fn image(&self) -> [u8; IMAGE_BYTES] {
        let mut image = [0; IMAGE_BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.control.to_le_bytes());
        put(2, &self.status.to_le_bytes());
        put(4, &[self.tags]);
        put(6, &self.opcode.to_le_bytes());
        put(8, &self.ip.to_le_bytes());
        put(12, &self.cs.to_le_bytes());
        put(16, &self.dp.to_le_bytes());
        put(20, &self.ds.to_le_bytes());
        put(24, &self.mxcsr.to_le_bytes());
        put(28, &self.mxcsr_mask.to_le_bytes());
        for (slot, n) in self.st.iter().chain(&self.xmm).zip(0..) {
            put(32 + 16 * n, &slot.to_le_bytes());
        }
        image
    }

    /// The control word.
    pub fn control(&self) -> u16 {
        self.control
    }

    /// FLDCW.
    pub fn set_control(&mut self, control: u16) {
        self.set_words(control, self.status);
    }

    /// The status word.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Sets control and status word; the slots stay where they are. ES and B are made anew.
    pub fn set_words(&mut self, control: u16, status: u16) {
        self.control = control & CONTROL_BITS | CONTROL_ONES;
        let unmasked = status & !self.control & status::EXCEPTIONS != 0;
        let summary = if unmasked { status::ES | status::B } else { 0 };
        self.status = status & !(status::ES | status::B) | summary;
    }

    /// True where an unmasked exception waits for the next waiting instruction.
    pub fn pending(&self) -> bool {
        self.status & status::ES != 0
    }

    /// FNCLEX.
    pub fn clear_exceptions(&mut self) {
        self.status &= !status::CLEARED;
    }

    /// FNINIT: everything but the registers' contents.
    pub fn init(&mut self) {
        self.set_top(0);
        self.tags = 0;
        self.set_words(CONTROL_RESET, 0);
        self.set_pointers(Pointers::default());
    }

    /// The top of the stack: the physical register that ST(0) is.
    pub fn top(&self) -> u16 {
        self.status >> 11 & 7
    }

    /// Moves the top of the stack; the physical registers stay.
    pub fn set_top(&mut self, top: u16) {
        let down = (top & 7).wrapping_sub(self.top()) & 7;
        self.st.rotate_left(down.into());
        self.status = self.status & !0x3800 | (top & 7) << 11;
    }

    /// ST(`n`), 80 bits.
    pub fn st(&self, n: usize) -> u128 {
        self.st[n & 7]
    }

    /// Sets the contents of ST(`n`); its tag stays.
    pub fn set_st(&mut self, n: usize, value: u128) {
        self.st[n & 7] = value & REGISTER_BITS;
    }

    /// The tags, one bit for each physical register: set where it is not empty.
    pub fn tags(&self) -> u8 {
        self.tags
    }

    /// The tag word of FNSTENV: two bits for each physical register, the kind of its contents where it is not empty.
    pub fn tag_word(&self) -> u16 {
        (0..8).fold(0, |word, register| {
            let slot = (register + 8 - usize::from(self.top())) & 7;
            let tag = if self.tags >> register & 1 == 0 { 3 } else { kind(self.st[slot]) };
            word | tag << (2 * register)
        })
    }

    /// Loads a tag word; of its two bits only empty or not is kept.
    pub fn set_tag_word(&mut self, word: u16) {
        self.tags = (0..8).fold(0, |tags, n| tags | u8::from(word >> (2 * n) & 3 != 3) << n);
    }

    /// FIP and the others.
    pub fn pointers(&self) -> Pointers {
        Pointers { opcode: self.opcode, ip: self.ip, cs: self.cs, dp: self.dp, ds: self.ds }
    }

    /// Sets FIP and the others.
    pub fn set_pointers(&mut self, to: Pointers) {
        (self.opcode, self.ip, self.cs, self.dp, self.ds) = (to.opcode & 0x7ff, to.ip, to.cs, to.dp, to.ds);
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        self.mxcsr
    }

    /// Sets MXCSR. False, and nothing changed, where reserved bits are set.
    #[must_use]
    pub fn set_mxcsr(&mut self, mxcsr: u32) -> bool {
        let legal = mxcsr & !MXCSR_MASK == 0;
        if legal {
            self.mxcsr = mxcsr;
        }
        legal
    }

    /// Sets exception flags of MXCSR (its low six bits).
    pub fn raise_simd(&mut self, flags: u32) {
        self.mxcsr |= flags & 0x3f;
    }

    /// XMM`n`.
    pub fn xmm(&self, n: usize) -> u128 {
        self.xmm[n & 7]
    }

    /// Sets XMM`n`.
    pub fn set_xmm(&mut self, n: usize, value: u128) {
        self.xmm[n & 7] = value;
    }

    /// What every MMX instruction but EMMS does before its own work: TOP is 0 and no register is empty.
    pub fn enter_mmx(&mut self) {
        self.set_top(0);
        self.tags = 0xff;
    }

    /// EMMS.
    pub fn leave_mmx(&mut self) {
        self.set_top(0);
        self.tags = 0;
    }

    /// MM`n`: a physical register, wherever TOP is.
    pub fn mm(&self, n: usize) -> u64 {
        self.st[n.wrapping_sub(self.top().into()) & 7] as u64
    }

    /// Sets MM`n`: the bits above become ones.
    pub fn set_mm(&mut self, n: usize, value: u64) {
        let slot = n.wrapping_sub(self.top().into()) & 7;
        self.st[slot] = 0xffff << 64 | u128::from(value);
    }

    /// Takes the exceptions out, so that the host's FPU can load the rest without one being pending.
    pub fn without_exceptions(&self) -> Fpu {
        let mut image = self.clone();
        image.clear_exceptions();
        image
    }

    /// Takes over what an x87 instruction left in an image that started as [`Fpu::without_exceptions`]: registers,
    /// tags and the status, to which the flags from before are added. Control word, pointers and SSE stay.
    pub fn adopt(&mut self, after: &Fpu) {
        let sticky = self.status & (status::EXCEPTIONS | status::SF);
        self.st = after.st.map(|slot| slot & REGISTER_BITS);
        self.tags = after.tags;
        self.set_words(self.control, after.status | sticky);
    }
}

/// The tag of a register that is not empty: 0 valid, 1 zero, 2 anything else.
fn kind(value: u128) -> u16 {
    let (exponent, mantissa) = ((value >> 64) as u16 & 0x7fff, value as u64);
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        _ if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered() -> Fpu {
        let mut fpu = Fpu::default();
        (0..8).for_each(|n| fpu.set_st(n, n as u128 + 1));
        fpu
    }

    #[test]
    fn image_survives_the_way_there_and_back() {
        let mut image: [u8; IMAGE_BYTES] = std::array::from_fn(|n| (n * 7 + 3) as u8);
        image[24..28].copy_from_slice(&0x9fbf_u32.to_le_bytes());
        let fpu = Fpu::from_image(&image).unwrap();
        let again = Fpu::from_image(&fpu.image()).unwrap();
        assert_eq!(fpu, again);
        assert_eq!(fpu.image()[160..288], image[160..288]);
        assert_eq!((fpu.image()[41], fpu.image()[42]), (image[41], 0), "ten bytes of sixteen");
        image[26] = 1;
        assert_eq!(Fpu::from_image(&image), None, "a reserved bit of MXCSR");
    }

    #[test]
    fn bit_of_mxcsr_that_only_the_host_has_costs_nothing_else() {
        let mut image = numbered().image();
        image[24..28].copy_from_slice(&0x0002_1fa0_u32.to_le_bytes());
        let fpu = Fpu::from_hardware(&image);
        assert_eq!((fpu.mxcsr(), fpu.st(7)), (0x1fa0, 8));
    }

    #[test]
    fn summary_follows_masks_and_flags() {
        let mut fpu = Fpu::default();
        fpu.set_words(0x037e, status::IE | status::ES);
        assert_eq!(fpu.status(), status::IE | status::ES | status::B);
        fpu.set_control(0x037f);
        assert_eq!((fpu.status(), fpu.pending()), (status::IE, false));
        fpu.set_control(0);
        assert_eq!((fpu.control(), fpu.pending()), (0x40, true));
    }

    #[test]
    fn moving_the_top_leaves_physical_registers_where_they_are() {
        let mut fpu = numbered();
        fpu.set_top(3);
        assert_eq!((fpu.st(0), fpu.st(5), fpu.top()), (4, 1, 3));
        assert_eq!((fpu.mm(0), fpu.mm(3)), (1, 4));
        fpu.set_mm(7, 9);
        assert_eq!(fpu.st(4), 0xffff << 64 | 9);
        fpu.enter_mmx();
        assert_eq!((fpu.st(0), fpu.top(), fpu.tags()), (1, 0, 0xff));
    }

    #[test]
    fn tag_word_tells_the_kinds_apart() {
        let one = 0x3fff_u128 << 64 | 1 << 63;
        let mut fpu = Fpu::default();
        fpu.set_tag_word(0xfc00);
        assert_eq!(fpu.tags(), 0b0001_1111);
        for (n, value) in [one, 0, 1, 0x7fff << 64, one & !(1 << 63)].into_iter().enumerate() {
            fpu.set_st(n, value);
        }
        assert_eq!(fpu.tag_word(), 0b11_11_11_10_10_10_01_00);
        fpu.set_top(1);
        assert_eq!(fpu.tag_word(), 0b11_11_11_10_10_10_01_00, "by physical register");
    }

    #[test]
    fn flags_from_before_stay_with_those_of_an_instruction() {
        let mut fpu = numbered();
        fpu.set_words(0x037f, status::PE | 0x3800);
        let mut after = fpu.without_exceptions();
        assert_eq!(after.status(), 0x3800);
        after.set_words(0x037f, status::ZE | 0x0100);
        fpu.adopt(&after);
        assert_eq!(fpu.status(), status::PE | status::ZE | 0x0100);
    }
}
