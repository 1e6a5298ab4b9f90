//! A guest of two CPUs, of which one loads segments by a table that the other one stores to.
//!
//! Story: flat protected mode, no interrupts. In each round the first CPU goes by another table while the second stores to the one that is looked
//! at, then goes by that; the second stores to it once more, and says so; the first loads a segment, and the word at its start is the one
//! that was stored last, or the guest ends with 1. Between what is said and what is looked at neither CPU needs to leave guest code, but
//! for the store. EBP is the step, on both.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::image::CODE;
use super::litmus::{FLAG, GDT, MET, assemble, copy, exit, meet, rest, start};

/// The table that is looked at, with what LGDT reads in another page; and one by which the first CPU goes meanwhile.
const TABLE: u32 = 0x20_0000;
const POINTER: u32 = 0x20_1000;
const OTHER: u32 = 0x20_2000;
const OTHER_POINTER: u32 = 0x20_3000;
/// Where the segment begins, in turn, and the word there.
const PLACES: [(u32, u32); 2] = [(0x22_0000, 1), (0x23_0000, 2)];
/// Its selector, its descriptor but for the place: 4 KiB of data; and where bits 16 to 23 of that are.
const SELECTOR: u32 = 0x18;
const DESCRIPTOR: u64 = 0x0040_9300_0000_0fff;
const PLACE: u32 = TABLE + SELECTOR + 4;

/// The code of a Multiboot image that does so in twice so many rounds.
pub fn guest(rounds: u32) -> Vec<u8> {
    assemble(32, CODE, |a| {
        let table = [&GDT[..], &[DESCRIPTOR]].concat();
        for (at, pointer, entries) in [(TABLE, POINTER, &table[..]), (OTHER, OTHER_POINTER, &GDT)] {
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            copy(a, at, &bytes)?;
            copy(a, pointer, &(bytes.len() as u16 - 1).to_le_bytes())?;
            copy(a, pointer + 2, &at.to_le_bytes())?;
        }
        for (at, word) in PLACES {
            a.mov(dword_ptr(at), word)?;
        }
        start(a, |a| {
            each_round(a, rounds, second)?;
            rest(a)
        })?;
        let mut bad = a.create_label();
        each_round(a, rounds, |a, place, _| first(a, place, bad))?;
        exit(a, 0)?;
        a.set_label(&mut bad)?;
        exit(a, 1)
    })
}

/// Twice so many rounds, which lead to either place in turn: that, and the other one.
fn each_round(
    a: &mut CodeAssembler,
    rounds: u32,
    mut round: impl FnMut(&mut CodeAssembler, (u32, u32), (u32, u32)) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.xor(ebp, ebp)?;
    a.mov(edi, rounds)?;
    a.set_label(&mut again)?;
    let [one, two] = PLACES;
    round(a, one, two)?;
    round(a, two, one)?;
    a.dec(edi)?;
    a.jne(again)
}

fn first(a: &mut CodeAssembler, (_, word): (u32, u32), bad: CodeLabel) -> Result<(), IcedError> {
    a.lgdt(ptr(OTHER_POINTER))?;
    step(a, FLAG, MET)?;
    step(a, FLAG, MET)?;
    a.lgdt(ptr(POINTER))?;
    step(a, FLAG, MET)?;
    step(a, FLAG, MET)?;
    a.mov(eax, SELECTOR)?;
    a.mov(fs, eax)?;
    a.xor(ebx, ebx)?;
    a.cmp(dword_ptr(ebx).fs(), word as i32)?;
    a.jne(bad)
}

fn second(a: &mut CodeAssembler, place: (u32, u32), other: (u32, u32)) -> Result<(), IcedError> {
    step(a, MET, FLAG)?;
    a.mov(byte_ptr(PLACE), other.0 >> 16)?;
    step(a, MET, FLAG)?;
    step(a, MET, FLAG)?;
    a.mov(byte_ptr(PLACE), place.0 >> 16)?;
    step(a, MET, FLAG)
}

fn step(a: &mut CodeAssembler, own: u32, other: u32) -> Result<(), IcedError> {
    a.inc(ebp)?;
    meet(a, own, other)
}
