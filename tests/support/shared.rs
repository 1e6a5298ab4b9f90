//! A guest of two CPUs that store to the pages that importers store to (`--stress`), each a word of its own.
//!
//! Story: flat protected mode, no interrupts. In each round a CPU finds in every page what it stored there in the last, and stores the
//! number of this one. The guest ends with 0 when both have gone through their rounds, and with 1 where the first CPU finds something
//! else, or the second has.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::image::CODE;
use super::litmus::{MET, assemble, await_word, exit, rest, start};
use super::remap::each;

/// The pages: 0xc0000 to 0xeffff.
const PAGES: u32 = 0xc_0000;
const PAGE_COUNT: u32 = 48;
/// Where each CPU's word is in a page; importers' come behind.
const FIRST: u32 = 0;
const SECOND: u32 = 8;
/// The second CPU has found something else.
const BROKEN: u32 = 0x1500;

/// The code of a Multiboot image that does so in so many rounds.
pub fn guest(rounds: u32) -> Vec<u8> {
    assemble(32, CODE, |a| {
        start(a, |a| {
            let (mut bad, mut over) = (a.create_label(), a.create_label());
            go_through(a, SECOND, rounds, bad)?;
            a.jmp(over)?;
            a.set_label(&mut bad)?;
            a.inc(dword_ptr(BROKEN))?;
            a.set_label(&mut over)?;
            a.mov(dword_ptr(MET), 1)?;
            rest(a)
        })?;
        let mut bad = a.create_label();
        go_through(a, FIRST, rounds, bad)?;
        a.mov(ebp, 1)?;
        await_word(a, MET)?;
        a.cmp(dword_ptr(BROKEN), 0)?;
        a.jne(bad)?;
        exit(a, 0)?;
        a.set_label(&mut bad)?;
        exit(a, 1)
    })
}

/// EDI is the round.
fn go_through(a: &mut CodeAssembler, word: u32, rounds: u32, bad: CodeLabel) -> Result<(), IcedError> {
    let mut round = a.create_label();
    a.xor(edi, edi)?;
    a.set_label(&mut round)?;
    each(a, PAGE_COUNT, |a| {
        a.mov(eax, ecx)?;
        a.shl(eax, 12)?;
        a.cmp(dword_ptr(eax + PAGES + word), edi)?;
        a.jne(bad)?;
        a.lea(edx, ptr(edi + 1))?;
        a.mov(dword_ptr(eax + PAGES + word), edx)
    })?;
    a.inc(edi)?;
    a.cmp(edi, rounds as i32)?;
    a.jne(round)
}
