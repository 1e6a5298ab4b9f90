//! Random cases: opcodes with their operands, registers, flags and memory.

use super::arena::{DATA, DATA_MIDDLE, DATA_SIZE, STACK};
use super::{Case, FLAGS};

/// A small generator, seeded: failures repeat.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }

    pub fn below(&mut self, n: u32) -> u32 {
        self.next() % n
    }

    /// Values at which arithmetic turns, half of the time.
    pub fn value(&mut self) -> u32 {
        const EDGES: [u32; 12] =
            [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, u32::MAX];
        match self.below(4) {
            0 => EDGES[self.below(12) as usize],
            1 => EDGES[self.below(12) as usize].wrapping_add(self.below(5)).wrapping_sub(2),
            2 => self.next() >> self.below(32),
            _ => self.next(),
        }
    }
}

/// How a template's ModRM byte is made up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// No ModRM.
    Bare,
    /// /r, register or [esi + disp8].
    Any,
    /// /digit, register or memory.
    Digit(u8),
    /// /digit, memory only.
    MemoryDigit(u8),
    /// /r, memory only.
    Memory,
}

/// An opcode and what follows it.
#[derive(Clone, Copy)]
pub struct Template {
    pub opcode: &'static [u8],
    form: Form,
    /// Immediate bytes; 4 means the operand size.
    immediate: u8,
    /// LOCK is allowed on memory.
    lock: bool,
    /// REP and REPNE are tried.
    string: bool,
    /// There is no 16-bit form.
    wide: bool,
}

pub const fn template(opcode: &'static [u8], form: Form) -> Template {
    Template { opcode, form, immediate: 0, lock: false, string: false, wide: false }
}

impl Template {
    pub const fn imm(self, immediate: u8) -> Template {
        Template { immediate, ..self }
    }

    pub const fn lock(self) -> Template {
        Template { lock: true, ..self }
    }

    pub const fn wide(self) -> Template {
        Template { wide: true, ..self }
    }

    pub const fn string(self) -> Template {
        Template { string: true, ..self }
    }

    fn register(random: &mut Random) -> u8 {
        random.below(8) as u8
    }

    fn bytes(&self, random: &mut Random) -> Vec<u8> {
        let mut bytes = Vec::new();
        let small = !self.wide && random.below(3) == 0;
        let memory = match self.form {
            Form::Memory | Form::MemoryDigit(_) => true,
            Form::Bare => false,
            _ => random.below(2) == 0,
        };
        if small {
            bytes.push(0x66);
        }
        if self.lock && memory && random.below(2) == 0 {
            bytes.push(0xf0);
        }
        if self.string {
            bytes.extend([&[][..], &[0xf3], &[0xf2]][random.below(3) as usize]);
        }
        bytes.extend(self.opcode);
        let reg = match self.form {
            Form::Digit(digit) | Form::MemoryDigit(digit) => digit,
            _ => Self::register(random),
        };
        match self.form {
            Form::Bare => {}
            _ if memory => bytes.extend([0x46 | reg << 3, random.next() as u8]),
            _ => bytes.push(0xc0 | reg << 3 | Self::register(random)),
        }
        let immediate = if self.immediate == 4 && small { 2 } else { self.immediate };
        bytes.extend(&random.value().to_le_bytes()[..immediate.into()]);
        bytes
    }
}

pub fn random_case(template: &Template, random: &mut Random) -> Case {
    let mut gpr = [0; 8].map(|_| random.value());
    let mut memory: Vec<u8> = (0..DATA_SIZE).map(|_| random.next() as u8).collect();
    gpr[4] = STACK + random.below(64);
    gpr[6] = DATA_MIDDLE;
    let mut flags = random.next() & FLAGS & !0x400;
    if template.string {
        gpr[7] = DATA_MIDDLE + random.below(64) - 32;
        gpr[1] = random.below(200);
        flags |= if random.below(2) == 0 { 0x400 } else { 0 };
    }
    let mut bytes = template.bytes(random);
    match template.opcode {
        [0xd7] => gpr[3] = DATA_MIDDLE,
        // The frame pointer of ENTER and LEAVE, and the room of ENTER.
        [0xc8] => {
            gpr[5] = STACK + random.below(256) - 128;
            let at = bytes.len() - 2;
            bytes[at] &= 1;
        }
        [0xc9] => gpr[5] = STACK + random.below(256),
        // POPF: arithmetic flags and ID, neither TF nor AC.
        [0x9d] => {
            let at = (gpr[4] - DATA) as usize;
            let popped = u32::from_le_bytes([0, 1, 2, 3].map(|n| memory[at + n])) & (FLAGS | 1 << 21);
            memory[at..at + 4].copy_from_slice(&popped.to_le_bytes());
        }
        _ => {}
    }
    if is_bit_string(template.opcode) {
        let at = bytes.len() - if bytes[bytes.len() - 2] >> 6 == 1 { 2 } else { 1 };
        // A bit index within the data, not in the base register.
        if bytes[at] >> 3 & 7 == 6 {
            bytes[at] &= !0x38;
        }
        gpr[usize::from(bytes[at] >> 3 & 7)] = random.below(16384).wrapping_sub(8192);
    }
    Case { bytes, gpr, flags, memory }
}

/// BT, BTS, BTR and BTC with a register index.
fn is_bit_string(opcode: &[u8]) -> bool {
    matches!(opcode, [0x0f, 0xa3 | 0xab | 0xb3 | 0xbb])
}

pub const fn second_opcodes(first: u8) -> [[u8; 2]; 16] {
    let mut all = [[0x0f, 0]; 16];
    let mut n = 0;
    while n < 16 {
        all[n][1] = first + n as u8;
        n += 1;
    }
    all
}

/// Opcodes from `first` on, in a row.
pub const fn opcodes<const N: usize>(first: u8) -> [[u8; 1]; N] {
    let mut all = [[0]; N];
    let mut n = 0;
    while n < N {
        all[n][0] = first + n as u8;
        n += 1;
    }
    all
}
