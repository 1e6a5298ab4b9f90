//! Guests of noise: Multiboot images that no compiler made, grown from a seed.
//!
//! ```text
//! 1 MiB: header | code ... | +0x1000 page directory | +0x2000 page table | +0x3000 GDT, IDT, TSS | +0x4000 noise
//! ```

use super::image::{CODE, multiboot};

/// Random numbers, the same for the same seed.
pub struct Noise(u64);

/// Linear and physical address of a page of the image, counted from its start.
fn page(n: u32) -> u32 {
    (CODE & !0xfff) + (n << 12)
}

/// Bytes of code.
const CODE_BYTES: usize = 0xe00;
/// Where the parts of the tables' page are.
const GDT: u32 = 0x000;
const IDT: u32 = 0x100;
const TSS: u32 = 0x900;

/// Instructions that random bytes seldom are, for the kernel: each is followed by what its operands make of the noise.
const SYSTEM: [&[u8]; 25] = [
    &[0x0f, 0x01],
    &[0x0f, 0x00],
    &[0x0f, 0x22],
    &[0x0f, 0x20],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0xa2],
    &[0x0f, 0x31],
    &[0x0f, 0x06],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x8e],
    &[0xcd],
    &[0xcf],
    &[0xfb],
    &[0xf4],
    &[0xea],
    &[0x9a],
    &[0xcb],
    &[0x9d],
    &[0xf3, 0xab],
    &[0xf3, 0xa5],
    &[0xee],
    &[0xed],
];

impl Noise {
    /// From a seed.
    pub fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number.
    pub fn number(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as u32
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u32) -> u32 {
        self.number() % n
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }

    /// So many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.number() as u8).take(count).collect()
    }

    /// A number that means something to a guest that is laid out as above.
    fn value(&mut self) -> u32 {
        match self.below(8) {
            0..=2 => page(0) + self.below(0x8000),
            3 => self.below(0x40_0000),
            4 => self.pick(&[0x08, 0x10, 0x1b, 0x23, 0x28, 0x33, 0xc000_0080, 0x1b, 0x277]),
            5 => self.pick(&[0x20, 0x21, 0x40, 0x43, 0x70, 0x71, 0x3f8, 0x3f9, 0xfee0_0320, 0xfec0_0000]),
            6 => self.below(64),
            _ => self.number(),
        }
    }

    /// A general register, but ESP only once in a while: few guests get far without a stack.
    fn register(&mut self) -> u8 {
        match self.below(8) {
            4 if self.below(16) != 0 => 0,
            register => register as u8,
        }
    }

    /// Some instructions, the first of which are bytes as intended.
    fn instruction(&mut self) -> Vec<u8> {
        let value = self.value().to_le_bytes();
        match self.below(8) {
            // mov r32, imm32
            0..=1 => [&[0xb8 + self.register()], &value[..]].concat(),
            // mov r32, [disp32]; mov [disp32], r32
            2 => [&[self.pick(&[0x8b, 0x89]), 0x05 + 8 * self.register()], &value[..]].concat(),
            3 => [self.pick(&SYSTEM), &self.bytes(1), &value[..]].concat(),
            // A jump to somewhere near, a push or a pop.
            4 => vec![self.pick(&[0xeb, 0x74, 0x75, 0xe2]), self.number() as u8],
            5 => vec![self.pick(&[0x50, 0x58]) + self.register()],
            _ => {
                let count = 1 + self.below(6) as usize;
                self.bytes(count)
            }
        }
    }

    /// Code that sets up a stack and, most times, paging, interrupts and descriptor tables; then anything.
    fn code(&mut self) -> Vec<u8> {
        let word = |value: u32| value.to_le_bytes();
        let mut code = [&[0xbc], &word(page(6))[..]].concat(); // mov esp, page 6
        if self.below(4) != 0 {
            // lgdt and lidt [the pointers behind the TSS], ltr 0x28
            code.extend([&[0x0f, 0x01, 0x15], &word(page(3) + TSS + 0x80)[..]].concat());
            code.extend([&[0x0f, 0x01, 0x1d], &word(page(3) + TSS + 0x88)[..]].concat());
            code.extend([0x66, 0xb8, 0x28, 0, 0x0f, 0, 0xd8]);
        }
        if self.below(4) != 0 {
            // mov cr4, PSE | noise that is allowed; mov cr3, page 1; mov cr0, PG | WP | PE
            let cr4 = 0x10 | self.pick(&[0, 0x80, 0x8, 0x200]);
            for (value, modrm) in [(cr4, 0xe0), (page(1), 0xd8), (0x8001_0011, 0xc0)] {
                code.extend([&[0xb8], &word(value)[..], &[0x0f, 0x22, modrm]].concat());
            }
        }
        while code.len() < CODE_BYTES {
            code.extend(self.instruction());
        }
        code.truncate(CODE_BYTES);
        code
    }

    /// A table entry: present, and of a frame that there is, mostly.
    fn entry(&mut self) -> u32 {
        match self.below(8) {
            0 => 0,
            1 => self.number(),
            2 => self.pick(&[0xfee0_0003, 0xfec0_0003]),
            _ => self.below(0x240) << 12 | self.below(0x200) & 0x1e7 | 3,
        }
    }

    fn tables(&mut self) -> Vec<u8> {
        let mut page_bytes = vec![0; 0x1000];
        let mut put = |at: u32, bytes: &[u8]| page_bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
        let flat = [
            0,
            0x00cf_9b00_0000_ffff_u64,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
        ];
        for (index, descriptor) in (0..).zip(flat) {
            put(GDT + 8 * index, &descriptor.to_le_bytes());
        }
        let tss = u64::from(page(3) + TSS);
        put(GDT + 0x28, &(0x0000_8900_0000_0067 | (tss & 0xff_ffff) << 16 | (tss >> 24) << 56).to_le_bytes());
        for index in 6..16 {
            put(GDT + 8 * index, &self.bytes(8));
        }
        for vector in 0..256 {
            let handler = page(0) + 0x20 + self.below(CODE_BYTES as u32);
            let kind = if self.below(256) == 0 { 0x85 } else { self.pick(&[0x8e, 0x8f, 0xee, 0xef]) };
            let gate = u64::from(handler & 0xffff) | 8 << 16 | kind << 40 | u64::from(handler >> 16) << 48;
            put(IDT + 8 * vector, &gate.to_le_bytes());
        }
        put(TSS + 4, &[&page(7).to_le_bytes()[..], &0x10_u32.to_le_bytes()].concat());
        put(TSS + 0x80, &[&[0x7f, 0][..], &(page(3) + GDT).to_le_bytes()].concat());
        put(TSS + 0x88, &[&[0xff, 0x07][..], &(page(3) + IDT).to_le_bytes()].concat());
        page_bytes
    }

    /// A kernel of noise, with tables of noise.
    pub fn kernel(&mut self) -> Vec<u8> {
        let mut body = self.code();
        body.resize(0x1000 - (CODE & 0xfff) as usize, 0x90);
        // The first 4 MiB are where they are, the next are what the page table says.
        let mut directory: Vec<u32> = (0..1024).map(|_| self.entry()).collect();
        directory[0] = 0x87;
        directory[1] = page(2) | 7;
        let table: Vec<u32> = (0..1024).map(|_| self.entry()).collect();
        body.extend(directory.iter().chain(&table).flat_map(|entry| entry.to_le_bytes()));
        body.extend(self.tables());
        body.extend(self.bytes(0x4000));
        multiboot(&body)
    }

    /// A sound image with some of its bytes changed, more of them near its start.
    pub fn damaged(&mut self, image: &[u8]) -> Vec<u8> {
        let mut image = image.to_vec();
        for _ in 0..1 + self.below(24) {
            let range = self.pick(&[0x400, u32::MAX, u32::MAX, u32::MAX]).min(image.len() as u32);
            let at = self.below(range) as usize;
            image[at] = if self.below(2) == 0 { self.number() as u8 } else { image[at] ^ 1 << self.below(8) };
        }
        image
    }
}
