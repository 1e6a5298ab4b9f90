//! Descriptors of both sides: the host's GDT as a user can see it, and local ones, random.
//!
//! Limits: Linux makes every local descriptor one of ring 3 and marks it accessed; conforming code it admits only
//! as not present.

use std::arch::asm;

use umbra::cpu::Segment;

use super::layout::{CODE, CODE_SIZE, DATA, DATA_SIZE, LDT_ENTRIES};
use super::random::Random;

/// What a local descriptor is, in the words of modify_ldt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub base: u32,
    /// 20 bits.
    pub limit: u32,
    /// 0 data, 1 expand-down data, 2 code, 3 conforming code.
    pub contents: u32,
    /// Data that cannot be written, code that cannot be read.
    pub restricted: bool,
    pub wide: bool,
    pub pages: bool,
    pub absent: bool,
}

pub const DATA_UP: u32 = 0;
pub const DATA_DOWN: u32 = 1;
pub const PLAIN_CODE: u32 = 2;
pub const CONFORMING_CODE: u32 = 3;

impl Entry {
    /// The `struct user_desc` of entry `number`. The bit for software is set: without it, an entry could be an empty
    /// one.
    pub fn user_desc(&self, number: u32) -> [u32; 4] {
        let bit = |set: bool, n: u32| u32::from(set) << n;
        let flags = bit(self.wide, 0)
            | self.contents << 1
            | bit(self.restricted, 3)
            | bit(self.pages, 4)
            | bit(self.absent, 5)
            | 1 << 6;
        [number, self.base, self.limit, flags]
    }

    /// Descriptor bits 40..=55, those of the limit zero.
    fn attributes(&self) -> u16 {
        let bit = |set: bool, n: u32| u16::from(set) << n;
        let kind = 1 | bit(!self.restricted, 1) | (self.contents as u16) << 2;
        kind | 0x70 | bit(!self.absent, 7) | 1 << 12 | bit(self.wide, 14) | bit(self.pages, 15)
    }

    /// The descriptor as it stands in the table.
    pub fn descriptor(&self) -> u64 {
        descriptor(self.base, self.limit, self.attributes())
    }

    fn limit_bytes(&self) -> u32 {
        if self.pages { self.limit << 12 | 0xfff } else { self.limit }
    }

    /// The hidden part of a register loaded with it.
    pub fn segment(&self, selector: u16) -> Segment {
        let (base, limit) = (self.base, self.limit_bytes());
        Segment { selector, base, limit, attributes: self.attributes(), unusable: false }
    }

    /// True where code of this segment can have an instruction at `linear`.
    pub fn contains(&self, linear: u32) -> bool {
        linear.wrapping_sub(self.base) <= self.limit_bytes()
    }

    pub fn is_code(&self) -> bool {
        self.contents >= PLAIN_CODE
    }

    pub fn readable(&self) -> bool {
        !(self.absent || self.is_code() && self.restricted)
    }

    pub fn writable(&self) -> bool {
        !self.absent && !self.is_code() && !self.restricted
    }
}

fn descriptor(base: u32, limit: u32, attributes: u16) -> u64 {
    let low = limit & 0xffff | base << 16;
    let high = base >> 16 & 0xff | base & 0xff00_0000 | limit & 0xf_0000 | u32::from(attributes) << 8;
    u64::from(high) << 32 | u64::from(low)
}

/// A local descriptor table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ldt(pub [Entry; LDT_ENTRIES]);

/// The selector of a local entry, for ring 3.
pub fn local(entry: usize) -> u16 {
    (entry as u16) << 3 | 7
}

impl Ldt {
    /// One entry of each kind that programs live by, bases and limits a little random; the rest anything.
    pub fn random(random: &mut Random) -> Ldt {
        let mut entries = [Entry::default(); LDT_ENTRIES];
        for (n, entry) in entries.iter_mut().enumerate() {
            *entry = match n {
                0..4 => code(random, n & 1 == 0, n & 2 != 0),
                4..6 => data(random, n & 1 == 0, false),
                6 => {
                    let wide = random.chance(50);
                    data(random, wide, true)
                }
                7..9 => expand_down(random, n & 1 == 0),
                9 => Entry { absent: true, ..data(random, true, false) },
                10 => Entry { absent: true, ..code(random, true, false) },
                11 => Entry { absent: true, contents: CONFORMING_CODE, ..code(random, true, false) },
                12..22 => {
                    let (wide, restricted) = (random.chance(50), random.chance(20));
                    data(random, wide, restricted)
                }
                _ => anything(random),
            };
        }
        Ldt(entries)
    }

    /// The entry that a selector names, if it is a local one.
    pub fn find(&self, selector: u16) -> Option<&Entry> {
        if selector & 4 == 0 { None } else { self.0.get(usize::from(selector >> 3)) }
    }

    /// A random entry that answers to `wanted`, as a selector.
    pub fn any(&self, random: &mut Random, wanted: fn(&Entry) -> bool) -> Option<u16> {
        let first = random.below(LDT_ENTRIES as u32) as usize;
        let all = (0..LDT_ENTRIES).map(|n| (first + n) % LDT_ENTRIES);
        all.into_iter().find(|n| wanted(&self.0[*n])).map(local)
    }
}

/// Code that begins at or a little before the code pages and ends with or within them.
fn code(random: &mut Random, wide: bool, restricted: bool) -> Entry {
    let before = if random.chance(50) { 0 } else { random.below(0x3000) };
    let room = before + CODE_SIZE as u32;
    let limit = if random.chance(70) { room + random.below(64) } else { room - random.below(0x800) };
    Entry { base: CODE - before, limit, contents: PLAIN_CODE, restricted, wide, ..Entry::default() }
}

/// Data that covers the data pages, or ends within them.
fn data(random: &mut Random, wide: bool, restricted: bool) -> Entry {
    let before = if random.chance(50) { 0 } else { random.below(0x3000) };
    let room = before + DATA_SIZE as u32;
    let (limit, pages) = match random.below(4) {
        0 => (room - random.below(DATA_SIZE as u32), false),
        1 => (room.div_ceil(4096) - 1 - random.below(2), true),
        2 => (0xfffff, true),
        _ => (0xffff, false),
    };
    Entry { base: DATA - before, limit, restricted, wide, pages, ..Entry::default() }
}

/// Data above a limit somewhere in the data pages.
fn expand_down(random: &mut Random, wide: bool) -> Entry {
    let within = random.below(DATA_SIZE as u32);
    let pages = random.chance(30);
    let limit = if pages { within >> 12 } else { within };
    Entry { base: DATA, limit, contents: DATA_DOWN, wide, pages, ..Entry::default() }
}

fn anything(random: &mut Random) -> Entry {
    let contents = random.below(4);
    let base = match random.below(3) {
        0 => random.next(),
        1 => DATA.wrapping_sub(random.next()),
        _ => {
            if contents >= PLAIN_CODE {
                CODE
            } else {
                DATA + random.below(DATA_SIZE as u32)
            }
        }
    };
    Entry {
        base,
        limit: random.next() >> 12 >> random.below(20),
        contents,
        restricted: random.chance(30),
        wide: random.chance(50),
        pages: random.chance(30),
        absent: contents == CONFORMING_CODE || random.chance(15),
    }
}

/// The host's global descriptors, as far as ring 3 can see them, at base zero.
#[derive(Clone, Debug)]
pub struct Globals {
    pub descriptors: Vec<u64>,
    /// Descriptors that the twin cannot stand for: 64-bit code, and what Linux keeps a CPU's number in.
    pub strange: Vec<bool>,
}

impl Globals {
    /// Reads them by LAR and LSL. What those do not show, ring 3 cannot load either: it becomes zeros.
    pub fn of_host() -> Globals {
        let shown = |n: u16| inspect(n << 3 | 3);
        let (descriptors, strange) = (0..32)
            .map(|n| match shown(n) {
                None => (0, false),
                Some((rights, limit)) => {
                    let attributes = (rights >> 8) as u16 & 0xf0ff;
                    let granular = attributes & 1 << 15 != 0;
                    let strange = attributes & 1 << 13 != 0 || limit != u32::MAX;
                    (descriptor(0, if granular { limit >> 12 } else { limit }, attributes), strange)
                }
            })
            .unzip();
        Globals { descriptors, strange }
    }
}

/// LAR and LSL of `selector`.
pub fn inspect(selector: u16) -> Option<(u32, u32)> {
    let (rights, limit, seen): (u32, u32, u32);
    // SAFETY: LAR and LSL read a descriptor's rights and limit, or clear ZF; they have no other effect.
    unsafe {
        asm!(
            "xor {rights:e}, {rights:e}",
            "xor {limit:e}, {limit:e}",
            "lar {rights:e}, {selector:e}",
            "lsl {limit:e}, {selector:e}",
            "mov {seen:e}, 0",
            "setz {seen:l}",
            selector = in(reg) u32::from(selector),
            rights = out(reg) rights,
            limit = out(reg) limit,
            seen = out(reg_abcd) seen,
            options(nostack, nomem),
        );
    }
    (seen != 0).then_some((rights, limit))
}
