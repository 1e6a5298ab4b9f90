//! A guest of two CPUs, of which one leaves the guest for nothing while the other uses pages that are taken away (`--stress`).
//!
//! Story: flat protected mode, no interrupts. The second CPU looks at a word and does nothing else; the first one reads its pages in each
//! round, and stores the word at the end. A page that is being taken, and is read, comes when every CPU has answered for it. The guest ends
//! with 0, and with 1 where the word has not come by the second CPU's last look.

use super::image::CODE;
use super::litmus::{FLAG, MET, assemble, await_word, exit, rest, start};
use super::remap::each;

use iced_x86::code_asm::*;

/// Pages of zeros: most that may be taken.
const PAGES: u32 = 0x11_0000;
const PAGE_COUNT: u32 = 300;
/// Some times more than the first CPU has instructions.
const LOOKS: u32 = 4_000_000;

/// The code of a Multiboot image that does so in so many rounds.
pub fn guest(rounds: u32) -> Vec<u8> {
    assemble(32, CODE, |a| {
        start(a, |a| {
            let (mut look, mut there) = (a.create_label(), a.create_label());
            a.mov(dword_ptr(MET), 1)?;
            a.mov(ecx, LOOKS)?;
            a.set_label(&mut look)?;
            a.cmp(dword_ptr(FLAG), 0)?;
            a.jne(there)?;
            a.dec(ecx)?;
            a.jne(look)?;
            exit(a, 1)?;
            a.set_label(&mut there)?;
            a.nop()?;
            rest(a)
        })?;
        let mut round = a.create_label();
        a.mov(ebp, 1)?;
        await_word(a, MET)?;
        a.mov(edi, rounds)?;
        a.set_label(&mut round)?;
        each(a, PAGE_COUNT, |a| {
            a.mov(eax, ecx)?;
            a.shl(eax, 12)?;
            a.mov(eax, dword_ptr(eax + PAGES))
        })?;
        a.dec(edi)?;
        a.jne(round)?;
        a.mov(dword_ptr(FLAG), 1)?;
        exit(a, 0)
    })
}
