//! Guests of two CPUs in one address space, of which one changes an entry and both flush, as a right kernel has them do.
//!
//! Story: the tables of [`super::remap`], and as quiet. In each round a page's entry leads to the other block; who has changed it says so,
//! and no CPU looks at the page after its flush without finding what the entry says. A guest ends with 0 where that was so, else with 1.
//! EBP is the round, on both.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::image::CODE;
use super::litmus::{FLAG, MET, assemble, await_word, delay, exit, rest, start};
use super::remap::{DIRECTORY, ONE, PAGE, PRESENT, TABLE_ONE, TABLE_TWO, TWO, WORD, page, reload, tables};

/// Rounds in which the second CPU has found something else.
const BROKEN: u32 = 0x1500;
/// Where the directory is mapped as a table: its entries are the tables' own pages.
const TABLES: u32 = 0xffc0_0000;
/// A page of its own.
const OTHER: u32 = 0x1_0000;
/// What the page leads to in two rounds, and the number in it.
const BLOCKS: [(u32, u32); 2] = [(TWO, 2), (ONE, 1)];

/// Who does what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pair {
    /// The first changes an entry of a directory; the second flushes as soon as it sees the entry change, by MOV CR3 and INVLPG in turn.
    Seen,
    /// The second changes it, the first flushes by MOV CR3 all the time.
    Often,
    /// The second changes it in a directory that is its own last table; the first uses it by INVLPG all the time, and flushes by MOV CR3.
    Recursive,
}

impl Pair {
    /// The code of a Multiboot image that does so in twice so many rounds.
    pub fn guest(self, rounds: u32) -> Vec<u8> {
        let end = 2 * rounds as i32;
        assemble(32, CODE, |a| {
            tables(a)?;
            if self == Pair::Recursive {
                a.mov(dword_ptr(DIRECTORY + 4092), DIRECTORY | PRESENT)?;
            }
            start(a, |a| {
                page(a, DIRECTORY)?;
                each_round(a, end, |a, block, number| self.second(a, block, number))?;
                rest(a)
            })?;
            page(a, DIRECTORY)?;
            let mut bad = a.create_label();
            each_round(a, end, |a, block, number| self.first(a, block, number, bad))?;
            a.cmp(dword_ptr(BROKEN), 0)?;
            a.jne(bad)?;
            exit(a, 0)?;
            a.set_label(&mut bad)?;
            exit(a, 1)
        })
    }

    fn first(self, a: &mut CodeAssembler, block: u32, number: u32, bad: CodeLabel) -> Result<(), IcedError> {
        let mut again = a.create_label();
        match self {
            Pair::Seen => {
                a.mov(dword_ptr(DIRECTORY + 4), table(block) | PRESENT)?;
                return await_word(a, MET);
            }
            Pair::Often => {
                a.set_label(&mut again)?;
                reload(a)?;
                a.mov(eax, dword_ptr(PAGE + WORD))?;
            }
            Pair::Recursive => {
                a.set_label(&mut again)?;
                a.invlpg(ptr(TABLES + 0x1000))?;
                a.mov(eax, dword_ptr(TABLES + 0x1000))?;
            }
        }
        a.cmp(dword_ptr(FLAG), ebp)?;
        a.jb(again)?;
        reload(a)?;
        if self == Pair::Recursive {
            a.mov(eax, dword_ptr(TABLES + 0x1000))?;
            a.and(eax, 0xffff_f000u32 as i32)?;
            a.cmp(eax, block as i32)?;
            a.jne(bad)?;
        }
        a.cmp(dword_ptr(PAGE + WORD), number)?;
        a.jne(bad)?;
        a.mov(dword_ptr(MET), ebp)
    }

    fn second(self, a: &mut CodeAssembler, block: u32, number: u32) -> Result<(), IcedError> {
        a.mov(esi, ebp)?;
        match self {
            Pair::Seen => {
                let (mut again, mut good) = (a.create_label(), a.create_label());
                a.set_label(&mut again)?;
                a.mov(eax, dword_ptr(DIRECTORY + 4))?;
                a.and(eax, 0xffff_f000u32 as i32)?;
                a.cmp(eax, table(block) as i32)?;
                a.jne(again)?;
                if block == ONE {
                    reload(a)?
                } else {
                    a.invlpg(ptr(PAGE))?
                }
                a.cmp(dword_ptr(PAGE + WORD), number)?;
                a.je(good)?;
                a.inc(dword_ptr(BROKEN))?;
                a.set_label(&mut good)?;
                return a.mov(dword_ptr(MET), ebp);
            }
            Pair::Often => {
                delay(a)?;
                // It takes a while to come to this page.
                a.invlpg(ptr(OTHER))?;
                a.mov(eax, dword_ptr(OTHER))?;
                a.mov(dword_ptr(TABLE_ONE), block | PRESENT)?;
            }
            Pair::Recursive => {
                // The entry as it is, but not yet used.
                a.mov(dword_ptr(DIRECTORY + 4), table(ONE + TWO - block) | PRESENT)?;
                delay(a)?;
                a.mov(dword_ptr(DIRECTORY + 4), table(block) | PRESENT)?;
            }
        }
        a.mov(dword_ptr(FLAG), ebp)?;
        await_word(a, MET)
    }
}

/// The table whose first entry leads to the block.
fn table(block: u32) -> u32 {
    if block == ONE { TABLE_ONE } else { TABLE_TWO }
}

/// EBP from 1 to `end`, an even number, with what the page leads to then.
fn each_round(
    a: &mut CodeAssembler,
    end: i32,
    mut body: impl FnMut(&mut CodeAssembler, u32, u32) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.xor(ebp, ebp)?;
    a.set_label(&mut again)?;
    for (block, number) in BLOCKS {
        a.inc(ebp)?;
        body(a, block, number)?;
    }
    a.cmp(ebp, end)?;
    a.jb(again)
}
