//! Random cases that get somewhere: instructions chosen while the interpreter runs them.
//!
//! Story: [`sequence`] steps the twin; whenever it comes to the end of the code so far, an instruction is put there.
//! As the registers are known at that moment, its operands can be [`fit`](Builder::fit) to them, mostly: addresses
//! that lie in the data, selectors that can be loaded, branches that stay in the code. The finished case is then run
//! from the start on both sides, whatever the twin did while it was being made.

use iced_x86::Code;

use super::case::{Case, Start};
use super::fit::Fit;
use super::forms::{always_faults, instance};
use super::layout::*;
use super::random::Random;
use super::segments::{DATA_UP, Entry, Ldt};
use super::twin::Twin;
use super::worker::CODE_MAX;

use umbra::cpu::{Seg, eflags};

/// CF, PF, AF, ZF, SF, OF and ID.
pub const FLAGS: u32 = 0x2008d5;
/// CPUID leaves that all CPUs of a machine answer alike.
pub const STABLE_LEAVES: [u32; 5] = [0, 0x8000_0000, 0x8000_0002, 0x8000_0003, 0x8000_0004];
/// The most steps of a case; one that has not ended by then is not run natively.
pub const STEPS_MAX: u32 = 3000;

/// A case of up to `length` instructions of `forms`; those that always fault come seldom, as they end it.
pub fn sequence(random: &mut Random, ldt: &Ldt, twin: &mut Twin, forms: &[Code], length: u32) -> Case {
    let case = random_start(random, ldt);
    twin.start(&case, ldt);
    let mut builder = Builder { random, ldt, twin, case, starts: Vec::new() };
    let mut left = length;
    for _ in 0..STEPS_MAX {
        if builder.at_end() {
            if left == 0 || !builder.has_room() {
                break;
            }
            left -= 1;
            let mut code = builder.random.pick(forms);
            for _ in 0..4 {
                code = if always_faults(code) { builder.random.pick(forms) } else { code };
            }
            builder.append(code);
        }
        if builder.twin.step().is_some() {
            break;
        }
    }
    builder.case
}

/// A case of random bytes.
pub fn noise(random: &mut Random, ldt: &Ldt) -> Case {
    let mut case = random_start(random, ldt);
    let room = CODE_SIZE - case.at as usize;
    case.code.resize(room.min(1 + random.below(60) as usize), 0);
    random.fill(&mut case.code);
    case
}

/// Registers, segments and memory, no code yet.
fn random_start(random: &mut Random, ldt: &Ldt) -> Case {
    let at = match random.below(8) {
        0 => CODE_SIZE as u32 - 1 - random.below(80),
        _ => random.below(0x1000),
    };
    let linear = CODE + at;
    let selectors = random_selectors(random, ldt, linear);
    let eip = linear.wrapping_sub(base_of(selectors[Seg::Cs as usize], ldt));
    let mut gpr = [0; 8].map(|_| match random.below(5) {
        0 | 1 => DATA + random.below(DATA_SIZE as u32),
        _ => random.value(),
    });
    let ss = selectors[Seg::Ss as usize];
    gpr[4] = (DATA + 0x400 + random.below(0x1800)).wrapping_sub(base_of(ss, ldt));
    let mut flags = random.next() & FLAGS;
    flags |= if random.chance(20) { eflags::DF } else { 0 };
    flags |= if random.chance(8) { eflags::AC } else { 0 };
    flags |= if random.chance(3) { eflags::NT } else { 0 };
    Case {
        start: Start { gpr, eip, selectors, flags },
        at,
        code: Vec::new(),
        memory_seed: random.wide(),
        pokes: Vec::new(),
    }
}

/// Segments for a case at `linear`. Code of 16 bits has local data mostly: its addresses do not reach the flat one's.
fn random_selectors(random: &mut Random, ldt: &Ldt, linear: u32) -> [u16; 6] {
    let code: fn(&Entry) -> bool = |entry| entry.is_code() && !entry.absent;
    let cs = if random.chance(60) { None } else { ldt.any(random, code) };
    let cs = cs.filter(|cs| ldt.find(*cs).is_some_and(|entry| entry.contains(linear)));
    let small = cs.and_then(|cs| ldt.find(cs)).is_some_and(|entry| !entry.wide);
    [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs].map(|seg| {
        let local: fn(&Entry) -> bool = match seg {
            Seg::Cs => return cs.unwrap_or(USER32_CODE),
            Seg::Ss => |entry| entry.writable() && entry.contents == DATA_UP,
            _ if random.chance(80) => {
                |entry| entry.writable() && entry.base.wrapping_sub(DATA - 0x3000) < 0x5000
            }
            _ => Entry::readable,
        };
        let usual = match seg {
            Seg::Fs | Seg::Gs if random.chance(40) => random.below(4) as u16,
            _ => USER_DATA,
        };
        let flat = random.chance(if small { 5 } else { 70 });
        if flat { usual } else { ldt.any(random, local).unwrap_or(usual) }
    })
}

/// The base of what `selector` names, zero for global ones.
pub fn base_of(selector: u16, ldt: &Ldt) -> u32 {
    ldt.find(selector).map_or(0, |entry| entry.base)
}

/// A case in the making.
pub struct Builder<'a> {
    pub random: &'a mut Random,
    pub ldt: &'a Ldt,
    pub twin: &'a mut Twin,
    pub case: Case,
    /// Where instructions begin, as offsets in the code.
    pub starts: Vec<usize>,
}

impl Builder<'_> {
    /// The linear address behind the code so far.
    pub fn end(&self) -> u32 {
        CODE + self.case.at + self.case.code.len() as u32
    }

    fn at_end(&self) -> bool {
        let cpu = &self.twin.cpu;
        cpu.segment(Seg::Cs).base.wrapping_add(cpu.eip) == self.end()
    }

    fn has_room(&self) -> bool {
        self.case.code.len() + 64 < CODE_MAX && self.end() < CODE + CODE_SIZE as u32
    }

    /// Appends an instance of `code`, fit to the registers as they are.
    fn append(&mut self, code: Code) {
        let wide = self.twin.cpu.segment(Seg::Cs).big();
        let Some(bytes) = instance(code, wide, self.random) else { return };
        let (moves, bytes, filler) = Fit::new(self, bytes).finish();
        self.put(&moves);
        self.starts.push(self.case.code.len());
        self.put(&bytes);
        self.put(&filler);
    }

    /// Puts code at the end, as much as the pages hold.
    fn put(&mut self, bytes: &[u8]) {
        let at = self.end().wrapping_sub(CODE) as usize;
        let room = CODE_SIZE - at;
        let bytes = &bytes[..bytes.len().min(room)];
        self.twin.memory.code[at..at + bytes.len()].copy_from_slice(bytes);
        self.case.code.extend(bytes);
    }

    /// Puts bytes into memory, now and at the case's start. Outside the data that is nothing.
    pub fn poke(&mut self, linear: u32, bytes: &[u8]) {
        let offset = linear.wrapping_sub(DATA) as usize;
        if offset < DATA_SIZE && DATA_SIZE - offset >= bytes.len() {
            self.twin.memory.data[offset..offset + bytes.len()].copy_from_slice(bytes);
            self.case.pokes.push((offset as u32, bytes.to_vec()));
        }
    }
}
