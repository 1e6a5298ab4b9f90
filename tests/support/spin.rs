//! A guest of two CPUs, of which one leaves the guest for nothing while the other uses pages that are taken away (`--stress`).
//!
//! Story: flat protected mode, no interrupts. The first CPU reads its pages in each round, and counts. The second one looks at the count and
//! does nothing else. A page that is being taken, and is read, comes when every CPU has answered for it. The guest ends with 0 after the last
//! round, and with 1 where the count has stood still for too many looks.

use iced_x86::code_asm::*;

use super::image::CODE;
use super::litmus::{FLAG, MET, assemble, await_word, exit, start};
use super::remap::each;

/// Pages of zeros, which no disk is waited for.
const PAGES: u32 = 0x11_0000;
const PAGE_COUNT: u32 = 300;
/// 6 ms of the shortest instructions that a simulation has, for one page.
const LOOKS: u32 = 1_500_000;

/// The code of a Multiboot image that does so in so many rounds.
pub fn guest(rounds: u32) -> Vec<u8> {
    assemble(32, CODE, |a| {
        start(a, |a| {
            let (mut counted, mut look) = (a.create_label(), a.create_label());
            a.mov(dword_ptr(MET), 1)?;
            a.set_label(&mut counted)?;
            a.mov(ebx, dword_ptr(FLAG))?;
            a.mov(ecx, LOOKS)?;
            a.set_label(&mut look)?;
            a.cmp(dword_ptr(FLAG), ebx)?;
            a.jne(counted)?;
            a.dec(ecx)?;
            a.jne(look)?;
            exit(a, 1)
        })?;
        let mut round = a.create_label();
        a.mov(ebp, 1)?;
        await_word(a, MET)?;
        a.mov(edi, rounds)?;
        a.set_label(&mut round)?;
        each(a, PAGE_COUNT, |a| {
            a.mov(eax, ecx)?;
            a.shl(eax, 12)?;
            a.mov(eax, dword_ptr(eax + PAGES))?;
            a.inc(dword_ptr(FLAG))
        })?;
        a.dec(edi)?;
        a.jne(round)?;
        exit(a, 0)
    })
}
