//! Guests of one CPU that map an address anew, flush as they must, and look at what they find there.
//!
//! Story: two-level paging (PAE for [`Remap::Executable`]), the first 4 MiB mapped as they are, no interrupts. A guest ends with 0 where it
//! has found what its tables say in every round, else with 1. Nothing else goes on in it, so that no flush is made for another's sake:
//! the built-in guest, which does much at once, hides what is missed here. [`Remap::Page`] and [`Remap::Nothing`] are for runs in
//! which somebody takes their pages away (`--stress`), and have few.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::image::CODE;
use super::litmus::{assemble, exit};

/// Page directory, and the table of the first 4 MiB.
pub(super) const DIRECTORY: u32 = 0x20_0000;
const TABLE: u32 = 0x20_1000;
/// Tables of [`PAGE`]: their first entry leads to [`ONE`], to [`TWO`].
pub(super) const TABLE_ONE: u32 = 0x20_2000;
pub(super) const TABLE_TWO: u32 = 0x20_3000;
/// A page in the middle of a block, and where that is mapped.
const WITHIN: u32 = 0x5000;
/// Interrupt descriptors, code and data descriptors, and what loads them.
const IDT: u32 = 0x20_5000;
const GDT: u32 = 0x20_6000;
const POINTER: u32 = 0x20_7000;
/// Page faults so far.
const FAULTS: u32 = 0x20_8000;
const STACK: u32 = 0x7_f000;
/// Two blocks of 4 MiB: each page has the word 1, or 2, at [`WORD`]. What they begin with returns the same number where it is called.
pub(super) const ONE: u32 = 0x80_0000;
pub(super) const TWO: u32 = 0xc0_0000;
pub(super) const WORD: u32 = 8;
/// What is mapped anew: a page, and 4 MiB.
pub(super) const PAGE: u32 = 0x40_0000;
const BLOCK: u32 = 0x100_0000;
/// The memory of a guest that has little: from here on two pages with a word each, or so many of zeros.
const FEW: u32 = 0x23_0000;
const WORDS: [(u32, u32); 2] = [(FEW, 1), (FEW + 0x1000, 2)];
const ZEROS: u32 = 128;
/// A page that no round changes. Its INVLPG lets other threads run, and leaves what the TLB has of other pages.
const ASIDE: u32 = 0x5000;
const PAUSES: u32 = 16;
/// How many pages of zeros are read until the CPU leaves guest code, by a load from the page that it has flushed.
const READ: u32 = 16;
/// Times that each page of a block is used before it changes.
const USES: u32 = 1000;
pub(super) const PRESENT: u32 = 3;
const USED: u32 = 0x60;
const READ_ONLY: u32 = 1;
const LARGE: u32 = 0x83;
const GLOBAL: u32 = 0x100;
const PSE: u32 = 0x10;
const PAE: u32 = 0x20;
const PGE: u32 = 0x80;
const EFER: u32 = 0xc000_0080;
const NXE: u32 = 1 << 11;
/// In the upper half of an entry of eight bytes: no code.
const NO_EXECUTE: u32 = 1 << 31;
/// Tables with such entries: the four of the top, a directory, and the table of 2 MiB from [`PAGE`] on and of the 2 MiB behind.
const TOP: u32 = 0x20_9000;
const WIDE_DIRECTORY: u32 = 0x20_a000;
const WIDE_TABLE: u32 = 0x20_b000;
const AGAIN: u32 = PAGE + 0x20_0000;
/// The second page of [`PAGE`]'s table.
const SECOND: u32 = PAGE + 0x1000;
/// Stores to a directory, without a use in between, after which no VMM takes it for one.
const FLOOD: u32 = 16;

/// What is changed, and flushed how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remap {
    /// The page of some code; INVLPG.
    Code,
    /// A directory's entry, from table to table; MOV CR3.
    Directory,
    /// A page loses the right to be written; MOV CR3.
    Right,
    /// 4 MiB by one entry; INVLPG of one address in it.
    Block,
    /// An entry of a table in a block that was mapped as a whole before; MOV CR3.
    Within,
    /// A page that is global; global pages are switched off, and on again.
    Global,
    /// A page that could be written can be run instead, and is run by another address of the same table first; MOV CR3.
    Executable,
    /// An entry of a table that is loaded as a directory then; MOV CR3.
    Promoted,
    /// A page's entry; MOV CR3, and then for a while nothing that a TLB would forget it for.
    Page,
    /// Nothing: pages of zeros are read, and in between a page is flushed that has not changed; INVLPG.
    Nothing,
}

impl Remap {
    /// The code of a Multiboot image that does so in so many rounds.
    pub fn guest(self, rounds: u32) -> Vec<u8> {
        assemble(32, CODE, |a| {
            a.mov(esp, STACK)?;
            self.prepare(a)?;
            let (mut round, mut bad) = (a.create_label(), a.create_label());
            a.mov(edi, rounds)?;
            a.set_label(&mut round)?;
            self.round(a, bad)?;
            a.dec(edi)?;
            a.jne(round)?;
            exit(a, 0)?;
            a.set_label(&mut bad)?;
            exit(a, 1)
        })
    }

    /// Tables and contents; then paging.
    fn prepare(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        match self {
            Remap::Page | Remap::Nothing => first_tables(a, USED)?,
            _ => tables(a)?,
        }
        match self {
            Remap::Right => count_faults(a)?,
            Remap::Executable => {
                count_faults(a)?;
                widen(a)?;
            }
            // Whoever loads it finds the first 4 MiB where they are.
            Remap::Promoted => a.mov(dword_ptr(TABLE_ONE), TABLE | PRESENT)?,
            Remap::Within => a.mov(dword_ptr(DIRECTORY + 16), ONE | LARGE)?,
            Remap::Page => {
                for (page, number) in WORDS {
                    a.mov(dword_ptr(page + WORD), number)?;
                }
            }
            Remap::Nothing => each(a, ZEROS, |a| {
                a.mov(eax, ecx)?;
                a.shl(eax, 12)?;
                a.add(eax, (FEW | PRESENT | USED) as i32)?;
                a.mov(dword_ptr(ecx * 4 + TABLE_ONE), eax)
            })?,
            _ => {}
        }
        let (features, top) = match self {
            Remap::Block | Remap::Within => (PSE, DIRECTORY),
            Remap::Executable => (PAE, TOP),
            _ => (0, DIRECTORY),
        };
        a.mov(eax, features)?;
        a.mov(cr4, eax)?;
        page(a, top)?;
        if self == Remap::Within {
            // In use as a block for a while, until it is mapped by one entry.
            a.mov(ebx, USES)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            each(a, 1024, |a| {
                a.mov(eax, ecx)?;
                a.shl(eax, 12)?;
                a.inc(dword_ptr(eax + (BLOCK + 2 * WORD)))
            })?;
            a.dec(ebx)?;
            a.jne(again)?;
            a.mov(dword_ptr(DIRECTORY + 4), (ONE + WITHIN) | PRESENT)?;
        }
        a.nop()
    }

    fn round(self, a: &mut CodeAssembler, bad: CodeLabel) -> Result<(), IcedError> {
        match self {
            Remap::Code => {
                for (block, number) in [(ONE, 1), (TWO, 2)] {
                    a.mov(dword_ptr(TABLE_ONE), block | PRESENT)?;
                    a.invlpg(ptr(PAGE))?;
                    a.mov(ebx, PAGE)?;
                    a.call(ebx)?;
                    a.cmp(eax, number)?;
                    a.jne(bad)?;
                }
            }
            Remap::Directory => {
                for (table, number) in [(TABLE_ONE, 1), (TABLE_TWO, 2)] {
                    a.mov(dword_ptr(DIRECTORY + 4), table | PRESENT)?;
                    reload(a)?;
                    a.cmp(dword_ptr(PAGE + WORD), number)?;
                    a.jne(bad)?;
                }
            }
            Remap::Right => {
                for (right, faults) in [(PRESENT, 0), (READ_ONLY, 1)] {
                    a.mov(dword_ptr(TABLE_ONE), ONE | right | USED)?;
                    reload(a)?;
                    a.mov(dword_ptr(FAULTS), 0)?;
                    a.mov(dword_ptr(PAGE + 2 * WORD), 7)?;
                    a.cmp(dword_ptr(FAULTS), faults)?;
                    a.jne(bad)?;
                }
            }
            Remap::Block => {
                for (block, number) in [(ONE, 1), (TWO, 2)] {
                    a.mov(dword_ptr(DIRECTORY + 16), block | LARGE)?;
                    a.invlpg(ptr(BLOCK))?;
                    each(a, 1024, |a| {
                        a.mov(eax, ecx)?;
                        a.shl(eax, 12)?;
                        a.cmp(dword_ptr(eax + (BLOCK + WORD)), number)?;
                        a.jne(bad)
                    })?;
                }
            }
            Remap::Within => {
                for (block, number) in [(ONE, 1), (TWO, 2)] {
                    a.mov(dword_ptr(BLOCK + WITHIN), block | PRESENT)?;
                    reload(a)?;
                    a.cmp(dword_ptr(PAGE + WORD), number)?;
                    a.jne(bad)?;
                }
            }
            Remap::Global => {
                for (block, number) in [(ONE, 1), (TWO, 2)] {
                    a.mov(dword_ptr(TABLE_ONE), block | PRESENT | GLOBAL)?;
                    for pge in [0, PGE] {
                        a.mov(eax, pge)?;
                        a.mov(cr4, eax)?;
                    }
                    a.cmp(dword_ptr(PAGE + WORD), number)?;
                    a.jne(bad)?;
                }
            }
            Remap::Executable => {
                for (right, upper, faults) in [(PRESENT, NO_EXECUTE, 0), (READ_ONLY, 0, 1)] {
                    a.mov(dword_ptr(WIDE_TABLE), ONE | right | USED)?;
                    a.mov(dword_ptr(WIDE_TABLE + 4), upper)?;
                    if upper == 0 {
                        a.mov(ebx, AGAIN)?;
                        a.call(ebx)?;
                    }
                    reload(a)?;
                    a.mov(dword_ptr(FAULTS), 0)?;
                    a.mov(dword_ptr(PAGE + 2 * WORD), 7)?;
                    a.cmp(dword_ptr(FAULTS), faults)?;
                    a.jne(bad)?;
                }
            }
            Remap::Page => {
                for (page, number) in WORDS {
                    a.mov(dword_ptr(TABLE_ONE), page | PRESENT | USED)?;
                    reload(a)?;
                    a.cmp(dword_ptr(PAGE + WORD), number)?;
                    a.jne(bad)?;
                    (0..PAUSES).try_for_each(|_| a.invlpg(ptr(ASIDE)))?;
                }
            }
            Remap::Nothing => each(a, ZEROS, |a| {
                let mut inside = a.create_label();
                a.test(ecx, READ as i32 - 1)?;
                a.jne(inside)?;
                a.mov(eax, dword_ptr(ASIDE))?;
                a.set_label(&mut inside)?;
                a.invlpg(ptr(ASIDE))?;
                a.mov(eax, ecx)?;
                a.shl(eax, 12)?;
                a.cmp(dword_ptr(eax + PAGE), 0)?;
                a.jne(bad)
            })?,
            // It ends with the directory that was a table.
            Remap::Promoted => {
                for (block, number) in [(ONE, 1), (TWO, 2)] {
                    load(a, DIRECTORY)?;
                    // It is a table alone, and in use.
                    each(a, FLOOD, |a| a.mov(dword_ptr(ecx * 4 + (TABLE_ONE + 2048)), 0))?;
                    a.cmp(dword_ptr(SECOND + WORD), 3 - number)?;
                    a.jne(bad)?;
                    a.mov(dword_ptr(TABLE_ONE + 4), block | PRESENT)?;
                    load(a, TABLE_ONE)?;
                }
            }
        }
        Ok(())
    }
}

/// The contents of both blocks, and tables with entries of four bytes.
pub(super) fn tables(a: &mut CodeAssembler) -> Result<(), IcedError> {
    first_tables(a, 0)?;
    each(a, 1024, |a| {
        a.mov(eax, ecx)?;
        a.shl(eax, 12)?;
        a.mov(dword_ptr(eax + (ONE + WORD)), 1)?;
        a.mov(dword_ptr(eax + (TWO + WORD)), 2)
    })?;
    for (block, number) in [(ONE, 1), (TWO, 2)] {
        a.mov(dword_ptr(block), 0xb8 | number << 8)?; // mov eax, number; ret
        a.mov(dword_ptr(block + 4), 0xc300)?;
    }
    a.mov(dword_ptr(TABLE_ONE), ONE | PRESENT)?;
    a.mov(dword_ptr(TABLE_ONE + 4), TWO | PRESENT)?;
    a.mov(dword_ptr(TABLE_TWO), TWO | PRESENT)
}

/// Directory and table of the first 4 MiB, and the link to [`PAGE`]'s; `used` is [`USED`] or nothing.
fn first_tables(a: &mut CodeAssembler, used: u32) -> Result<(), IcedError> {
    each(a, 1024, |a| {
        a.mov(eax, ecx)?;
        a.shl(eax, 12)?;
        a.or(eax, (PRESENT | used) as i32)?;
        a.mov(dword_ptr(ecx * 4 + TABLE), eax)
    })?;
    a.mov(dword_ptr(DIRECTORY), TABLE | PRESENT | used)?;
    a.mov(dword_ptr(DIRECTORY + 4), TABLE_ONE | PRESENT | used)
}

/// Paging, by the table at `top`.
pub(super) fn page(a: &mut CodeAssembler, top: u32) -> Result<(), IcedError> {
    load(a, top)?;
    a.mov(eax, cr0)?;
    a.or(eax, 0x8001_0000u32 as i32)?; // PG, WP
    a.mov(cr0, eax)
}

/// Tables with entries of eight bytes, and code that is not to be run.
fn widen(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let table = WIDE_TABLE | PRESENT;
    let large = |number: u32| number << 21 | LARGE;
    a.mov(dword_ptr(TOP), WIDE_DIRECTORY | 1)?;
    for (entry, value) in (0..).step_by(8).zip([large(0), large(1), table, table]) {
        a.mov(dword_ptr(WIDE_DIRECTORY + entry), value)?;
    }
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.or(eax, NXE as i32)?;
    a.wrmsr()
}

/// ECX from 0 on.
pub(super) fn each(
    a: &mut CodeAssembler,
    end: u32,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.xor(ecx, ecx)?;
    a.set_label(&mut again)?;
    body(a)?;
    a.inc(ecx)?;
    a.cmp(ecx, end as i32)?;
    a.jb(again)
}

fn load(a: &mut CodeAssembler, directory: u32) -> Result<(), IcedError> {
    a.mov(eax, directory)?;
    a.mov(cr3, eax)
}

pub(super) fn reload(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, cr3)?;
    a.mov(cr3, eax)
}

/// A page fault is counted, and the store of 10 bytes that it came of passed over.
fn count_faults(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut set_up, mut return_far, mut done) = (a.create_label(), a.create_label(), a.create_label());
    // What follows the call is the handler.
    a.call(set_up)?;
    a.add(esp, 4)?;
    a.inc(dword_ptr(FAULTS))?;
    a.add(dword_ptr(esp), 10)?;
    a.iretd()?;
    a.set_label(&mut set_up)?;
    let flat = [0, 0, 0xffff, 0x00cf_9b00, 0xffff, 0x00cf_9300];
    for (at, word) in (GDT..).step_by(4).zip(flat) {
        a.mov(dword_ptr(at), word)?;
    }
    for (at, table, limit) in [(POINTER, GDT, 23), (POINTER + 8, IDT, 15 * 8 - 1)] {
        a.mov(dword_ptr(at), table << 16 | limit)?;
        a.mov(dword_ptr(at + 4), table >> 16)?;
    }
    a.pop(eax)?;
    a.mov(ebx, eax)?;
    a.and(eax, 0xffff)?;
    a.or(eax, 8 << 16)?;
    a.mov(dword_ptr(IDT + 14 * 8), eax)?;
    a.and(ebx, 0xffff_0000u32 as i32)?;
    a.or(ebx, 0x8e00)?;
    a.mov(dword_ptr(IDT + 14 * 8 + 4), ebx)?;
    a.lgdt(ptr(POINTER))?;
    a.lidt(ptr(POINTER + 8))?;
    a.mov(eax, 16)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.push(8)?;
    a.call(return_far)?;
    a.jmp(done)?;
    a.set_label(&mut return_far)?;
    a.retf()?;
    a.set_label(&mut done)?;
    a.nop()
}
