//! One case: what a run begins with, and what it leaves.

use std::fmt;
use std::ops::Range;

use iced_x86::{Formatter, IntelFormatter};
use umbra::interp::decode;

use super::layout::{CODE, DATA, DATA_SIZE};
use super::random::Random;

/// The vector of an outcome by `int 0x80`, which natively is a system call that the filter refuses.
pub const SYSTEM_CALL: u32 = 0x80;
/// The vector of a native outcome that no fault has ended.
pub const ENDLESS: u32 = 0x100;

/// Registers that a case begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    pub gpr: [u32; 8],
    /// An offset in CS.
    pub eip: u32,
    /// By [`Seg`](umbra::cpu::Seg).
    pub selectors: [u16; 6],
    pub flags: u32,
}

#[derive(Clone)]
pub struct Case {
    pub start: Start,
    /// Where the code lies, from [`CODE`].
    pub at: u32,
    pub code: Vec<u8>,
    /// Memory is random bytes of this seed,
    pub memory_seed: u64,
    /// with these bytes put over them, at offsets in the data.
    pub pokes: Vec<(u32, Vec<u8>)>,
}

impl Case {
    pub fn memory(&self, into: &mut [u8; DATA_SIZE]) {
        Random::new(self.memory_seed).fill(into);
        for (offset, bytes) in &self.pokes {
            let offset = *offset as usize;
            into[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// The code as text, decoded in a row from its first byte.
    fn listing(&self, wide: bool) -> String {
        let mut text = String::new();
        let mut formatter = IntelFormatter::new();
        let mut at = 0;
        while at < self.code.len() {
            let eip = self.start.eip + at as u32;
            let bytes = &self.code[at..];
            let (length, name) = match decode(bytes, wide, eip) {
                Ok(instruction) => {
                    let mut name = String::new();
                    formatter.format(&instruction, &mut name);
                    (instruction.len(), name)
                }
                Err(error) => (1, format!("{error:?}")),
            };
            text += &format!("  {eip:8x}  {name:40} {:02x?}\n", &bytes[..length]);
            at += length;
        }
        text
    }

    /// All there is to know about a case, for a failure's report. `wide` is the D bit of the first CS.
    pub fn describe(&self, wide: bool) -> String {
        let pokes: String = self.pokes.iter().map(|(at, bytes)| format!(" {at:#x}: {bytes:02x?}")).collect();
        format!(
            "{:#x?}\ncode at {:#x}, memory seed {:#x}, pokes{pokes}\n{}",
            Hex(&self.start),
            CODE + self.at,
            self.memory_seed,
            self.listing(wide)
        )
    }
}

/// How a case ended, and what it left.
#[derive(Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The exception's vector, [`SYSTEM_CALL`] or [`ENDLESS`].
    pub vector: u32,
    /// Zero where the vector has none.
    pub error: u32,
    /// The address of a page fault.
    pub cr2: Option<u32>,
    pub gpr: [u32; 8],
    pub eip: u32,
    /// EFLAGS as the exception's frame has them.
    pub flags: u32,
    /// By [`Seg`](umbra::cpu::Seg).
    pub selectors: [u16; 6],
    pub memory: Box<[u8; DATA_SIZE]>,
}

/// Hexadecimal on one line.
pub struct Hex<'a, T>(pub &'a T);

impl fmt::Debug for Hex<'_, Start> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Start { gpr, eip, selectors, flags } = self.0;
        write!(f, "gpr {gpr:08x?} eip {eip:x} flags {flags:x} es, cs, ss, ds, fs, gs {selectors:x?}")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vector {:#x} error {:#x} cr2 {:x?}\n  ", self.vector, self.error, self.cr2)?;
        let Outcome { gpr, eip, selectors, flags, .. } = self;
        write!(f, "gpr {gpr:08x?} eip {eip:x} flags {flags:x} es, cs, ss, ds, fs, gs {selectors:x?}")
    }
}

/// What of an outcome is not compared.
#[derive(Clone, Default)]
pub struct Blind {
    /// General registers, as bits: what the time-stamp counter was read into; what POPA had popped when it met a
    /// fault. (The interpreter pops all or nothing.)
    pub gpr: u8,
    /// Flags that this CPU may set otherwise than the interpreter.
    pub flags: u32,
    /// Linear addresses below the stack pointer, where the CPU may have left a part of what a faulting instruction
    /// was to push. (The interpreter pushes all or nothing.)
    pub stack: Range<u32>,
}

impl Outcome {
    /// True where the case ended by a fault: EIP stands at an instruction that has not retired.
    pub fn faulted(&self) -> bool {
        !matches!(self.vector, 1 | 3 | 4 | SYSTEM_CALL | ENDLESS)
    }

    /// Says where `self`, ours, and `native` differ.
    pub fn difference(&self, native: &Outcome, blind: &Blind) -> Option<String> {
        let kept = |gpr: [u32; 8]| -> [u32; 8] {
            std::array::from_fn(|n| if blind.gpr >> n & 1 != 0 { 0 } else { gpr[n] })
        };
        // The return from an interrupt makes every null selector zero, and there may have been one.
        let named = |selectors: [u16; 6]| selectors.map(|s| if s < 4 { 0 } else { s });
        let same = (self.vector, self.error, self.cr2) == (native.vector, native.error, native.cr2)
            && kept(self.gpr) == kept(native.gpr)
            && self.eip == native.eip
            && (self.flags ^ native.flags) & !blind.flags == 0
            && named(self.selectors) == named(native.selectors);
        let seen = |n: &usize| !blind.stack.contains(&(DATA + *n as u32));
        let at = (0..DATA_SIZE).filter(seen).find(|n| self.memory[*n] != native.memory[*n]);
        if same && at.is_none() {
            return None;
        }
        let memory = at.map_or(String::new(), |n| {
            let piece = |o: &Outcome| o.memory[n..DATA_SIZE.min(n + 8)].to_vec();
            format!("memory at {n:#x}: {:02x?}, natively {:02x?}\n", piece(self), piece(native))
        });
        Some(format!("ours     {self}\nnatively {native}\n{memory}"))
    }
}
