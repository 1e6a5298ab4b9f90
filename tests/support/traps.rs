//! A guest of one CPU whose kernel traps within a trap, by instructions that are no faults: INT1, INT n and IRET.
//!
//! Story: flat protected mode. It loads a data segment that nobody has loaded before; then INT1's handler raises another interrupt, whose
//! handler returns, and returns itself. The guest ends with 3, and with 1 where it is told of a fault.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::image::CODE;
use super::litmus::{GDT, assemble, copy, exit};

const STACK: u32 = 0x9_0000;
/// Where the table may lie: on a multiple of eight, and on none; and what LGDT reads.
pub const TABLES: [u32; 2] = [0x20_0000, 0x20_0004];
/// A descriptor of data, behind the others, that is not marked as accessed.
const FRESH: u64 = 0x00cf_9200_0000_ffff;
const FRESH_SELECTOR: u32 = 0x18;
const POINTER: u32 = 0x20_1000;
/// Interrupt gates, and what LIDT reads.
const GATES: u32 = 0x20_2000;
const GATES_POINTER: u32 = 0x20_3000;
const GATE_COUNT: u32 = 32;
/// Handlers, so far from each other.
const HANDLERS: u32 = 0x20_4000;
const HANDLER_BYTES: u32 = 0x40;

/// The code of a Multiboot image that does so by a table at `table`.
pub fn guest(table: u32) -> Vec<u8> {
    assemble(32, CODE, |a| {
        let (mut return_far, mut flat) = (a.create_label(), a.create_label());
        a.mov(esp, STACK)?;
        let bytes: Vec<u8> = GDT.iter().chain(&[FRESH]).flat_map(|entry| entry.to_le_bytes()).collect();
        copy(a, table, &bytes)?;
        pointer(a, POINTER, table, bytes.len() as u32)?;
        a.lgdt(ptr(POINTER))?;
        a.push(8)?;
        a.call(return_far)?;
        a.jmp(flat)?;
        a.set_label(&mut return_far)?;
        a.retf()?;
        a.set_label(&mut flat)?;
        a.mov(eax, 0x10)?;
        a.mov(ss, eax)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(eax, FRESH_SELECTOR)?;
        a.mov(fs, eax)?;
        handler(a, 1, |a| {
            a.int(2)?;
            a.iretd()
        })?;
        handler(a, 2, |a| a.iretd())?;
        for fault in [11, 13, 14] {
            handler(a, fault, |a| exit(a, 1))?;
        }
        pointer(a, GATES_POINTER, GATES, GATE_COUNT * 8)?;
        a.lidt(ptr(GATES_POINTER))?;
        a.int1()?;
        exit(a, 3)
    })
}

/// What happens at an interrupt.
fn handler(
    a: &mut CodeAssembler,
    number: u32,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let (at, gate) = (HANDLERS + number * HANDLER_BYTES, GATES + number * 8);
    copy(a, at, &assemble(32, at, write))?;
    a.mov(dword_ptr(gate), 8 << 16 | at & 0xffff)?;
    a.mov(dword_ptr(gate + 4), at & 0xffff_0000 | 0x8e00)
}

/// What a table of so many bytes is loaded by.
fn pointer(a: &mut CodeAssembler, at: u32, table: u32, bytes: u32) -> Result<(), IcedError> {
    a.mov(word_ptr(at), bytes - 1)?;
    a.mov(dword_ptr(at + 2), table)
}
