//! Guests of two CPUs that would notice if a store, a load or a locked access were not what x86 says they are.
//!
//! Story: the first CPU copies what the second one runs to [`TRAMPOLINE`] and [`AP_CODE`], starts it, and both go through rounds, in flat
//! protected mode; words that both use lie a cache line apart. Where two accesses are to race, both CPUs meet first, and each then
//! lets a number of instructions go by that differs from round to round. The first CPU ends the run: 0 when all was well, else 1.
//!
//! See: Intel SDM vol. 3A, 10.2.2 and 10.2.3 (memory ordering), 10.1.3 (cross-modifying code).

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::image::CODE;

/// Where the second CPU's descriptors are, with what LGDT reads behind them.
const DESCRIPTORS: u32 = 0x6000;
/// Nothing, flat code, flat data.
const GDT: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const POINTER: u32 = DESCRIPTORS + 0x40;
/// Where the second CPU begins, in real mode: a page below 1 MiB.
const TRAMPOLINE: u32 = 0x7000;
/// And where it goes on.
const AP_CODE: u32 = 0x8000;
const AP_STACK: u32 = 0xf000;
/// Words that both use.
const FLAG: u32 = 0x1000;
const BACK: u32 = 0x1100;
const X: u32 = 0x1200;
const Y: u32 = 0x1300;
const SEEN: u32 = 0x1400;
const MET: u32 = 0x1500;
/// Of its code too: the instruction whose number is changed, beyond a page boundary.
const PATCHED: u32 = AP_CODE + 0x2000;

/// A property, as code for either CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Litmus {
    /// What was stored before a flag is seen by who has seen the flag.
    MessagePassing,
    /// With MFENCE between, not both CPUs miss the other's store.
    StoreBuffering,
    /// The same with a locked access to another word instead.
    LockedStoreBuffering,
    /// With nothing between, both may: no property, and looked for to see whether the two above would be noticed.
    Unfenced,
    /// Locked additions of both CPUs are all made.
    Counter,
    /// The same of eight bytes by CMPXCHG8B.
    WideCounter,
    /// Code that another CPU has changed is run as it is after a serialising instruction.
    Code,
}

/// All of them.
pub const ALL: [Litmus; 6] = [
    Litmus::MessagePassing,
    Litmus::StoreBuffering,
    Litmus::LockedStoreBuffering,
    Litmus::Counter,
    Litmus::WideCounter,
    Litmus::Code,
];

impl Litmus {
    /// The code of a Multiboot image that looks for it to break, `rounds` times.
    pub fn guest(self, rounds: u32) -> Vec<u8> {
        let trampoline = assemble(16, TRAMPOLINE, enter_flat);
        let ap = assemble(32, AP_CODE, |a| self.second(a, rounds));
        let descriptors: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let pointer =
            [&(descriptors.len() as u16 - 1).to_le_bytes()[..], &DESCRIPTORS.to_le_bytes()].concat();
        assemble(32, CODE, |a| {
            copy(a, DESCRIPTORS, &descriptors)?;
            copy(a, POINTER, &pointer)?;
            copy(a, TRAMPOLINE, &trampoline)?;
            copy(a, AP_CODE, &ap)?;
            copy(a, PATCHED, &[0xb0, 0, 0xc3])?; // mov al, 0; ret
            start(a)?;
            self.first(a, rounds)
        })
    }

    /// What the first CPU does, EBP counting rounds from 1.
    fn first(self, a: &mut CodeAssembler, rounds: u32) -> Result<(), IcedError> {
        let (mut round, mut bad) = (a.create_label(), a.create_label());
        a.xor(ebp, ebp)?;
        a.set_label(&mut round)?;
        a.inc(ebp)?;
        match self {
            Litmus::MessagePassing => {
                a.mov(dword_ptr(X), ebp)?;
                a.mov(dword_ptr(FLAG), ebp)?;
                await_word(a, BACK)?;
                a.cmp(dword_ptr(SEEN), ebp)?;
                a.jne(bad)?;
            }
            Litmus::StoreBuffering | Litmus::LockedStoreBuffering | Litmus::Unfenced => {
                meet(a, FLAG, MET)?;
                delay(a, 0x9e37_79b1)?;
                a.mov(dword_ptr(X), ebp)?;
                self.fence(a)?;
                a.mov(eax, dword_ptr(Y))?;
                await_word(a, BACK)?;
                // One of them must have seen the other's.
                let mut good = a.create_label();
                a.cmp(eax, ebp)?;
                a.je(good)?;
                a.cmp(dword_ptr(SEEN), ebp)?;
                a.jne(bad)?;
                a.set_label(&mut good)?;
            }
            Litmus::Counter => a.lock().inc(dword_ptr(X))?,
            Litmus::WideCounter => add_wide(a)?,
            Litmus::Code => {
                a.mov(eax, ebp)?;
                a.mov(byte_ptr(PATCHED + 1), al)?;
                a.mov(dword_ptr(FLAG), ebp)?;
                await_word(a, BACK)?;
                a.mov(eax, ebp)?;
                a.cmp(byte_ptr(SEEN), al)?;
                a.jne(bad)?;
            }
        }
        a.cmp(ebp, rounds as i32)?;
        a.jb(round)?;
        if matches!(self, Litmus::Counter | Litmus::WideCounter) {
            await_word(a, BACK)?;
            a.cmp(dword_ptr(X), 2 * rounds as i32)?;
            a.jne(bad)?;
        }
        exit(a, 0)?;
        a.set_label(&mut bad)?;
        exit(a, 1)
    }

    /// What the second CPU does.
    fn second(self, a: &mut CodeAssembler, rounds: u32) -> Result<(), IcedError> {
        let mut round = a.create_label();
        a.mov(eax, 16)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(ss, eax)?;
        a.mov(esp, AP_STACK)?;
        a.xor(ebp, ebp)?;
        a.set_label(&mut round)?;
        a.inc(ebp)?;
        match self {
            Litmus::MessagePassing => {
                await_word(a, FLAG)?;
                a.mov(eax, dword_ptr(X))?;
                answer(a)?;
            }
            Litmus::StoreBuffering | Litmus::LockedStoreBuffering | Litmus::Unfenced => {
                meet(a, MET, FLAG)?;
                delay(a, 0x85eb_ca6b)?;
                a.mov(dword_ptr(Y), ebp)?;
                self.fence(a)?;
                a.mov(eax, dword_ptr(X))?;
                answer(a)?;
            }
            Litmus::Counter => a.lock().inc(dword_ptr(X))?,
            Litmus::WideCounter => add_wide(a)?,
            Litmus::Code => {
                await_word(a, FLAG)?;
                a.xor(eax, eax)?;
                a.cpuid()?;
                a.mov(eax, PATCHED)?;
                a.call(eax)?;
                a.movzx(eax, al)?;
                answer(a)?;
            }
        }
        a.cmp(ebp, rounds as i32)?;
        a.jb(round)?;
        a.mov(dword_ptr(BACK), ebp)?;
        let mut rest = a.create_label();
        a.set_label(&mut rest)?;
        a.cli()?;
        a.hlt()?;
        a.jmp(rest)
    }

    fn fence(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        match self {
            Litmus::LockedStoreBuffering => a.lock().add(dword_ptr(SEEN + 0x80), 1),
            Litmus::Unfenced => Ok(()),
            _ => a.mfence(),
        }
    }
}

/// From real mode into flat protected mode, and on at [`AP_CODE`].
fn enter_flat(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.cli()?;
    // Of the first 64 KiB, and this lies there.
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.lgdt(ptr(POINTER))?;
    a.mov(eax, cr0)?;
    a.or(al, 1)?;
    a.mov(cr0, eax)?;
    // JMP 8:AP_CODE, with a 32-bit offset.
    let far = [&[0x66, 0xea][..], &AP_CODE.to_le_bytes(), &[8, 0]].concat();
    a.db(&far)
}

/// Says at `own` that this CPU is here, and waits until the other has said so at `other`.
fn meet(a: &mut CodeAssembler, own: u32, other: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(dword_ptr(own), ebp)?;
    a.set_label(&mut again)?;
    a.cmp(dword_ptr(other), ebp)?;
    a.jne(again)
}

/// Counts to a number below 16 that differs from round to round.
fn delay(a: &mut CodeAssembler, factor: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.imul_3(ecx, ebp, factor as i32)?;
    a.shr(ecx, 28)?;
    a.inc(ecx)?;
    a.set_label(&mut again)?;
    a.dec(ecx)?;
    a.jne(again)
}

/// Waits for the word at `address` to be EBP.
fn await_word(a: &mut CodeAssembler, address: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(dword_ptr(address), ebp)?;
    a.jne(again)
}

/// Says what the second CPU has seen, EAX, and that the round is over.
fn answer(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dword_ptr(SEEN), eax)?;
    a.mov(dword_ptr(BACK), ebp)
}

/// Adds 1 to the eight bytes at X.
fn add_wide(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(eax, dword_ptr(X))?;
    a.mov(edx, dword_ptr(X + 4))?;
    a.set_label(&mut again)?;
    a.mov(ebx, eax)?;
    a.mov(ecx, edx)?;
    a.add(ebx, 1)?;
    a.adc(ecx, 0)?;
    a.lock().cmpxchg8b(qword_ptr(X))?;
    a.jne(again)
}

/// INIT and start-up for CPU 1.
fn start(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for (register, value) in [(0x310u32, 1u32 << 24), (0x300, 0x4500), (0x300, 0x4600 | TRAMPOLINE >> 12)] {
        a.mov(dword_ptr(0xfee0_0000u32 + register), value)?;
    }
    Ok(())
}

fn copy(a: &mut CodeAssembler, to: u32, bytes: &[u8]) -> Result<(), IcedError> {
    for (at, byte) in (to..).zip(bytes) {
        a.mov(byte_ptr(at), u32::from(*byte))?;
    }
    Ok(())
}

fn exit(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(eax, value)?;
    a.out(0xf4, eax)?;
    let mut rest = a.create_label();
    a.set_label(&mut rest)?;
    a.cli()?;
    a.hlt()?;
    a.jmp(rest)
}

/// # Panics
///
/// When an instruction is none: the code above is the same every time.
fn assemble(
    bitness: u32,
    at: u32,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bitness).expect("a known mode");
    write(&mut assembler).expect("instructions that exist");
    assembler.assemble(at.into()).expect("labels in reach")
}
