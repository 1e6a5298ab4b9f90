//! Guests that have more tables, or more address spaces, than the shadow has room for, and flush nothing.
//!
//! Story: two-level paging, the first 4 MiB mapped as they are, no interrupts. No entry changes once paging is on, so that the guest owes
//! no flush: what a CPU still has of a table that was taken out of use, Umbra must see to alone. In each round another page is loaded
//! from. A guest ends with 0 where it has found what its tables say in every round, else with 1. All but [`Crowd::Shared`] are of one CPU,
//! whose TLB has not the page yet in which it finds out.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::image::CODE;
use super::litmus::{FLAG, MET, assemble, exit, meet, start};
use super::remap::{each, page};

/// The table of the first 4 MiB, and the directories.
const TABLE: u32 = 0x20_0000;
const DIRECTORIES: u32 = 0x20_1000;
const STACK: u32 = 0x7_f000;
/// Page tables, and pages: the word in each, at [`WORD`], is its number.
const TABLES: u32 = 0x40_0000;
const PAGES: u32 = 0x80_0000;
const WORD: u32 = 8;
/// What the tables map, 4 MiB each.
const REGIONS: u32 = 0x1000_0000;
/// More than there are shadow pages.
const TABLE_COUNT: u32 = 200;
/// The most roots that `umbra` has, and so many address spaces, with one more for each of two CPUs.
const ROOTS: u32 = 128;
const SPACES: u32 = ROOTS + 2;
/// Turns of the loop that a rest is.
const REST: u32 = 1_000_000;
/// Present, writable, accessed, dirty.
const USED: u32 = 0x63;

/// What there is too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crowd {
    /// Page tables of one address space.
    Tables,
    /// The same, and after each round the CPU uses none of them for a while: so that they go and it does not notice.
    Rested,
    /// Address spaces, with a table each.
    Spaces,
    /// The same of two CPUs, which go through them together; the last ones, for which there is no room, are one for each CPU.
    Shared,
}

impl Crowd {
    /// The code of a Multiboot image that goes through them in so many rounds, less than 500.
    pub fn guest(self, rounds: u32) -> Vec<u8> {
        assemble(32, CODE, |a| {
            a.mov(esp, STACK)?;
            self.prepare(a)?;
            if self == Crowd::Shared {
                start(a, |a| {
                    page(a, DIRECTORIES)?;
                    rounds_of(a, rounds, |a, bad| round_of_two(a, (MET, FLAG), ROOTS + 1, bad))
                })?;
            }
            page(a, DIRECTORIES)?;
            rounds_of(a, rounds, |a, bad| match self {
                Crowd::Tables => round_of_tables(a, bad),
                Crowd::Rested => {
                    round_of_tables(a, bad)?;
                    each(a, REST, |a| a.nop())
                }
                Crowd::Spaces => round_of_spaces(a, bad),
                Crowd::Shared => round_of_two(a, (FLAG, MET), ROOTS, bad),
            })
        })
    }

    /// Each table maps its own page all over, by the address space or by all in one.
    fn prepare(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        let (tables, pages) = match self {
            Crowd::Tables | Crowd::Rested => (TABLE_COUNT, 1),
            Crowd::Spaces | Crowd::Shared => (SPACES, SPACES),
        };
        each(a, 1024, |a| {
            a.mov(eax, ecx)?;
            a.shl(eax, 12)?;
            a.or(eax, USED as i32)?;
            a.mov(dword_ptr(ecx * 4 + TABLE), eax)
        })?;
        each(a, tables * 1024, |a| {
            a.mov(eax, ecx)?;
            a.shr(eax, 10)?;
            if matches!(self, Crowd::Tables | Crowd::Rested) {
                a.xor(eax, eax)?;
            }
            a.shl(eax, 12)?;
            a.add(eax, (PAGES | USED) as i32)?;
            a.mov(dword_ptr(ecx * 4 + TABLES), eax)
        })?;
        for number in 0..pages {
            a.mov(dword_ptr(PAGES + (number << 12) + WORD), number)?;
            a.mov(dword_ptr(DIRECTORIES + (number << 12)), TABLE | USED)?;
        }
        each(a, tables, |a| {
            a.mov(eax, ecx)?;
            a.shl(eax, 12)?;
            a.mov(ebx, eax)?;
            a.add(eax, (TABLES | USED) as i32)?;
            let entry = DIRECTORIES + (REGIONS >> 22) * 4;
            match self {
                Crowd::Tables | Crowd::Rested => a.mov(dword_ptr(ecx * 4 + entry), eax),
                Crowd::Spaces | Crowd::Shared => {
                    a.mov(dword_ptr(ebx + entry), eax)?;
                    a.mov(dword_ptr(ebx + (entry + 4)), eax)
                }
            }
        })
    }
}

/// EDI is the round, from 0 on, and EBP how often two CPUs have met. Then the end of the guest.
fn rounds_of(
    a: &mut CodeAssembler,
    rounds: u32,
    body: impl FnOnce(&mut CodeAssembler, CodeLabel) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let (mut round, mut bad) = (a.create_label(), a.create_label());
    a.xor(edi, edi)?;
    a.xor(ebp, ebp)?;
    a.set_label(&mut round)?;
    body(a, bad)?;
    a.inc(edi)?;
    a.cmp(edi, rounds as i32)?;
    a.jb(round)?;
    exit(a, 0)?;
    a.set_label(&mut bad)?;
    exit(a, 1)
}

/// From every table's page of this round.
fn round_of_tables(a: &mut CodeAssembler, bad: CodeLabel) -> Result<(), IcedError> {
    each(a, TABLE_COUNT, |a| {
        a.mov(eax, ecx)?;
        a.shl(eax, 10)?;
        a.add(eax, edi)?;
        a.shl(eax, 12)?;
        a.cmp(dword_ptr(eax + (REGIONS + WORD)), 0)?;
        a.jne(bad)
    })
}

/// As many spaces as there are roots, twice: the second time nothing is taken out of use, and MOV CR3 has nothing to flush. Then one more,
/// which takes the place of the first. Each space has its table at two places: the first access finds no root, and goes the long way.
fn round_of_spaces(a: &mut CodeAssembler, bad: CodeLabel) -> Result<(), IcedError> {
    for _ in 0..2 {
        each(a, ROOTS, |a| visit(a, 0, bad))?;
    }
    visit(a, 1, bad)
}

/// The same by both CPUs, which meet before each part. The first time from the last space down, so that the few that lost their roots in the
/// round before take those of the two that made them, and not each other's. Then each CPU loads one more, `last`, from the page that its
/// TLB has of other spaces:
///
/// ```text
/// one CPU                                     the other
///                                             MOV CR3: nothing was taken out of use, nothing is flushed
/// MOV CR3, a load: no root is free
/// the first space's root is taken out of use
///                                             a load: that root would do, and its TLB has the page under it
/// shootdown
/// ```
fn round_of_two(
    a: &mut CodeAssembler,
    (own, other): (u32, u32),
    last: u32,
    bad: CodeLabel,
) -> Result<(), IcedError> {
    let next = |a: &mut CodeAssembler| {
        a.inc(ebp)?;
        meet(a, own, other)
    };
    let mut down = a.create_label();
    next(a)?;
    a.mov(ecx, ROOTS - 1)?;
    a.set_label(&mut down)?;
    visit(a, 0, bad)?;
    a.dec(ecx)?;
    a.jns(down)?;
    next(a)?;
    each(a, ROOTS, |a| visit(a, 0, bad))?;
    next(a)?;
    a.mov(ecx, last)?;
    visit(a, 0, bad)?;
    next(a)
}

/// Loads the space in ECX, and from its page of this round.
fn visit(a: &mut CodeAssembler, odd: u32, bad: CodeLabel) -> Result<(), IcedError> {
    a.mov(eax, ecx)?;
    a.shl(eax, 12)?;
    a.add(eax, DIRECTORIES as i32)?;
    a.mov(cr3, eax)?;
    a.mov(eax, edi)?;
    a.shl(eax, 13)?;
    for region in [REGIONS, REGIONS + (1 << 22)] {
        a.cmp(dword_ptr(eax + (region + (odd << 12) + WORD)), ecx)?;
        a.jne(bad)?;
    }
    Ok(())
}
