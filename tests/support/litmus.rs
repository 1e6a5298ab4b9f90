//! Guests of two CPUs that would notice if a store, a load or a locked access were not what x86 says they are.
//!
//! Story: the first CPU copies what the second one runs to [`TRAMPOLINE`] and [`AP_CODE`], starts it, and both go through epochs, in flat
//! protected mode. They begin an epoch together, and then neither waits for the other: each goes through its rounds as fast as it
//! can, and both words of a pair move from one cache to the other all the time. What is stored is the number of the round, so that
//! what was loaded says which of the other's rounds it came after. The first CPU judges, and ends the run: 0 when all was well, else 1.
//!
//! ```text
//! store buffering: round k of the one    x := k; fence; a[k] := y
//!                  round j of the other  y := j; fence; b[j] := x      broken where a[k] < j and b[j] < k
//! load buffering:  a[k] := y; x := k     b[j] := x; y := j             broken where a[k] >= j and b[j] >= k
//! ```
//!
//! Each has a *wrong* form, without what makes it hold: a fence, a LOCK, the order of two instructions. It must be seen to break, or the
//! right one says nothing. Changed code is right in any form that a program can have; there the VMM goes without a rule of its own.
//!
//! See: Intel SDM vol. 3A, 10.2.2 and 10.2.3 (memory ordering), 10.1.2 (bus locking), 10.1.3 (cross-modifying code).

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::image::CODE;

/// Where the second CPU's descriptors are, with what LGDT reads behind them.
const DESCRIPTORS: u32 = 0x6000;
/// Nothing, flat code, flat data.
pub(super) const GDT: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const POINTER: u32 = DESCRIPTORS + 0x40;
/// Where the second CPU begins, in real mode: a page below 1 MiB.
const TRAMPOLINE: u32 = 0x7000;
/// And where it goes on.
const AP_CODE: u32 = 0x8000;
const AP_STACK: u32 = 0xf000;
/// Words that both use, for epochs.
pub(super) const FLAG: u32 = 0x1000;
pub(super) const MET: u32 = 0x1100;
const BACK: u32 = 0x1200;
/// And for rounds.
const X: u32 = 0x1300;
const Y: u32 = 0x1400;
/// Rounds that the second CPU has judged and found broken.
const BROKEN: u32 = 0x1500;
/// A word of the second CPU's own.
const OWN: u32 = 0x1600;
/// Of its code too: the instruction whose number is changed, beyond a page boundary.
const PATCHED: u32 = AP_CODE + 0x2000;
/// What either CPU has loaded, by its round.
const FIRSTS: u32 = 0x20_0000;
const SECONDS: u32 = 0x30_0000;
/// So that these have room.
pub const ROUNDS_MAX: u32 = (SECONDS - FIRSTS) / 4 - 1;
/// Looks at what it waits for before a CPU lets others run.
const LOOKS: u32 = 64;

/// A property, as code for either CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Litmus {
    /// What was stored before a flag is seen by who has seen the flag.
    MessagePassing,
    /// Two CPUs that load and then store do not both load what the other stores.
    LoadBuffering,
    /// With MFENCE between, not both CPUs miss the other's store.
    StoreBuffering,
    /// The same with a locked access to another word instead.
    LockedStoreBuffering,
    /// Locked additions of both CPUs are all made.
    Counter(Place),
    /// The same of eight bytes by CMPXCHG8B.
    WideCounter(Place),
    /// Code that another CPU has changed is run as it is after a serialising instruction, though it was decoded meanwhile.
    Code,
}

/// Where a counter lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On a multiple of its size.
    Aligned,
    /// Across 8 bytes, within a cache line.
    AcrossWords,
    /// Across a cache line.
    AcrossLines,
    /// Across a page.
    AcrossPages,
}

impl Place {
    /// The address of a counter of so many bytes.
    fn of(self, bytes: u32) -> u32 {
        match self {
            Place::Aligned => X,
            Place::AcrossWords => X + 8 - bytes / 2,
            Place::AcrossLines => X + 64 - bytes / 2,
            Place::AcrossPages => 0x2000 - bytes / 2,
        }
    }
}

/// Whether the guest does what makes the property hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As a right program does.
    Right,
    /// Without the fence, the LOCK or the order.
    Wrong,
}

/// Those that have a wrong form.
pub const PROPERTIES: [Litmus; 12] = [
    Litmus::MessagePassing,
    Litmus::LoadBuffering,
    Litmus::StoreBuffering,
    Litmus::LockedStoreBuffering,
    Litmus::Counter(Place::Aligned),
    Litmus::Counter(Place::AcrossWords),
    Litmus::Counter(Place::AcrossLines),
    Litmus::Counter(Place::AcrossPages),
    Litmus::WideCounter(Place::Aligned),
    Litmus::WideCounter(Place::AcrossWords),
    Litmus::WideCounter(Place::AcrossLines),
    Litmus::WideCounter(Place::AcrossPages),
];

impl Litmus {
    /// The code of a Multiboot image that looks for it to break in so many epochs of so many rounds.
    ///
    /// # Panics
    ///
    /// For more than [`ROUNDS_MAX`] rounds.
    pub fn guest(self, form: Form, epochs: u32, rounds: u32) -> Vec<u8> {
        assert!(rounds <= ROUNDS_MAX, "{rounds} rounds");
        assemble(32, CODE, |a| {
            copy(a, PATCHED, &[0xb8, 0, 0, 0, 0, 0xc3])?; // mov eax, 0; ret
            start(a, |a| self.second(a, form, epochs, rounds))?;
            self.first(a, form, epochs, rounds)
        })
    }

    /// True where a locked access lies in no aligned word.
    pub fn locks_the_bus(self) -> bool {
        matches!(self, Litmus::Counter(place) | Litmus::WideCounter(place) if place != Place::Aligned)
    }

    /// The words that both use in rounds.
    fn words(self) -> [u32; 4] {
        match self {
            Litmus::Counter(place) => [place.of(4), place.of(4), X, Y],
            Litmus::WideCounter(place) => [place.of(8), place.of(8) + 4, X, Y],
            Litmus::Code => [PATCHED + 1, PATCHED + 1, X, Y],
            _ => [X, Y, X, Y],
        }
    }

    /// What the first CPU does: EBP counts epochs, ESI rounds.
    fn first(self, a: &mut CodeAssembler, form: Form, epochs: u32, rounds: u32) -> Result<(), IcedError> {
        let (mut epoch, mut bad) = (a.create_label(), a.create_label());
        a.xor(ebp, ebp)?;
        a.set_label(&mut epoch)?;
        a.inc(ebp)?;
        for word in self.words() {
            a.mov(dword_ptr(word), 0)?;
        }
        meet(a, FLAG, MET)?;
        let mut round = a.create_label();
        a.xor(esi, esi)?;
        a.set_label(&mut round)?;
        a.inc(esi)?;
        match self {
            Litmus::MessagePassing => {
                let (first, last) = if form == Form::Right { (X, Y) } else { (Y, X) };
                a.mov(dword_ptr(first), esi)?;
                a.mov(dword_ptr(last), esi)?;
            }
            Litmus::Code => {
                a.mov(dword_ptr(PATCHED + 1), esi)?;
                a.mov(dword_ptr(Y), esi)?;
                delay(a)?;
            }
            _ => self.round(a, form, (X, Y), FIRSTS)?,
        }
        a.cmp(esi, rounds as i32)?;
        a.jb(round)?;
        await_word(a, BACK)?;
        self.judge(a, rounds, bad)?;
        a.cmp(ebp, epochs as i32)?;
        a.jb(epoch)?;
        exit(a, 0)?;
        a.set_label(&mut bad)?;
        exit(a, 1)
    }

    /// What the second CPU does.
    fn second(self, a: &mut CodeAssembler, form: Form, epochs: u32, rounds: u32) -> Result<(), IcedError> {
        let (mut epoch, mut round) = (a.create_label(), a.create_label());
        a.xor(ebp, ebp)?;
        a.set_label(&mut epoch)?;
        a.inc(ebp)?;
        meet(a, MET, FLAG)?;
        a.xor(esi, esi)?;
        a.set_label(&mut round)?;
        match self {
            // ESI is the first one's round, as far as is known.
            Litmus::MessagePassing => {
                a.mov(esi, dword_ptr(Y))?;
                a.mov(eax, dword_ptr(X))?;
                expect(a)?;
            }
            Litmus::Code => {
                // The old number or the new one.
                a.mov(eax, PATCHED)?;
                a.call(eax)?;
                a.mov(esi, dword_ptr(Y))?;
                a.xor(eax, eax)?;
                a.cpuid()?;
                a.mov(eax, PATCHED)?;
                a.call(eax)?;
                expect(a)?;
            }
            _ => {
                a.inc(esi)?;
                self.round(a, form, (Y, X), SECONDS)?;
            }
        }
        a.cmp(esi, rounds as i32)?;
        a.jb(round)?;
        a.mov(dword_ptr(BACK), ebp)?;
        a.cmp(ebp, epochs as i32)?;
        a.jb(epoch)?;
        rest(a)
    }

    /// A round that is the same on both CPUs, but for the words' names.
    fn round(
        self,
        a: &mut CodeAssembler,
        form: Form,
        (own, other): (u32, u32),
        loaded: u32,
    ) -> Result<(), IcedError> {
        match self {
            Litmus::Counter(place) => return increment(a, form, place),
            Litmus::WideCounter(place) => return add_wide(a, form, place),
            Litmus::LoadBuffering if form == Form::Right => {
                a.mov(eax, dword_ptr(other))?;
                a.mov(dword_ptr(own), esi)?;
            }
            _ => {
                a.mov(dword_ptr(own), esi)?;
                match self {
                    Litmus::StoreBuffering if form == Form::Right => a.mfence()?,
                    Litmus::LockedStoreBuffering if form == Form::Right => {
                        a.lock().add(dword_ptr(OWN + own - X), 1)?
                    }
                    _ => {}
                }
                a.mov(eax, dword_ptr(other))?;
            }
        }
        a.mov(dword_ptr(esi * 4 + loaded), eax)
    }

    /// Goes to `bad` where an epoch has broken the property.
    fn judge(self, a: &mut CodeAssembler, rounds: u32, bad: CodeLabel) -> Result<(), IcedError> {
        let (mut round, mut good) = (a.create_label(), a.create_label());
        match self {
            Litmus::MessagePassing | Litmus::Code => {
                a.cmp(dword_ptr(BROKEN), 0)?;
                return a.jne(bad);
            }
            Litmus::Counter(place) => {
                a.cmp(dword_ptr(place.of(4)), 2 * rounds as i32)?;
                return a.jne(bad);
            }
            Litmus::WideCounter(place) => {
                a.cmp(dword_ptr(place.of(8)), 2 * rounds as i32)?;
                return a.jne(bad);
            }
            _ => {}
        }
        a.xor(esi, esi)?;
        a.set_label(&mut round)?;
        a.inc(esi)?;
        a.mov(eax, dword_ptr(esi * 4 + FIRSTS))?;
        if self == Litmus::LoadBuffering {
            // The last of the other's rounds that was seen has not seen this one.
            a.test(eax, eax)?;
            a.je(good)?;
            a.cmp(dword_ptr(eax * 4 + SECONDS), esi)?;
            a.jae(bad)?;
        } else {
            // The first of the other's rounds that was not seen has seen this one.
            a.inc(eax)?;
            a.cmp(eax, rounds as i32)?;
            a.ja(good)?;
            a.cmp(dword_ptr(eax * 4 + SECONDS), esi)?;
            a.jb(bad)?;
        }
        a.set_label(&mut good)?;
        a.cmp(esi, rounds as i32)?;
        a.jb(round)
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
pub(super) fn meet(a: &mut CodeAssembler, own: u32, other: u32) -> Result<(), IcedError> {
    a.mov(dword_ptr(own), ebp)?;
    await_word(a, other)
}

/// Counts to a number below 1024 that differs from round (ESI) to round.
pub(super) fn delay(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.imul_3(ecx, esi, 0x9e37_79b1u32 as i32)?;
    a.shr(ecx, 22)?;
    a.inc(ecx)?;
    a.set_label(&mut again)?;
    a.dec(ecx)?;
    a.jne(again)
}

/// Notes that EAX is less than ESI, which was stored after it.
fn expect(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut good = a.create_label();
    a.cmp(eax, esi)?;
    a.jae(good)?;
    a.inc(dword_ptr(BROKEN))?;
    a.set_label(&mut good)?;
    a.nop()
}

/// Waits for the word at `address` to be EBP, or more: the other CPU may have gone on.
pub(super) fn await_word(a: &mut CodeAssembler, address: u32) -> Result<(), IcedError> {
    let (mut again, mut look, mut there) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.mov(ecx, LOOKS)?;
    a.set_label(&mut look)?;
    a.cmp(dword_ptr(address), ebp)?;
    a.jae(there)?;
    a.dec(ecx)?;
    a.jne(look)?;
    a.pause()?;
    a.jmp(again)?;
    a.set_label(&mut there)?;
    a.nop()
}

fn increment(a: &mut CodeAssembler, form: Form, place: Place) -> Result<(), IcedError> {
    match form {
        Form::Right => a.lock().inc(dword_ptr(place.of(4))),
        Form::Wrong => a.inc(dword_ptr(place.of(4))),
    }
}

/// Adds 1 to the eight bytes.
fn add_wide(a: &mut CodeAssembler, form: Form, place: Place) -> Result<(), IcedError> {
    let at = place.of(8);
    let mut again = a.create_label();
    a.mov(eax, dword_ptr(at))?;
    a.mov(edx, dword_ptr(at + 4))?;
    a.set_label(&mut again)?;
    a.mov(ebx, eax)?;
    a.mov(ecx, edx)?;
    a.add(ebx, 1)?;
    a.adc(ecx, 0)?;
    if form == Form::Wrong {
        a.mov(dword_ptr(at), ebx)?;
        return a.mov(dword_ptr(at + 4), ecx);
    }
    a.lock().cmpxchg8b(qword_ptr(at))?;
    a.jne(again)
}

/// Has CPU 1 go through `second`, in flat protected mode with a stack.
pub(super) fn start(
    a: &mut CodeAssembler,
    second: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let trampoline = assemble(16, TRAMPOLINE, enter_flat);
    let ap = assemble(32, AP_CODE, |a| {
        a.mov(eax, 16)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(ss, eax)?;
        a.mov(esp, AP_STACK)?;
        second(a)
    });
    let descriptors: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let pointer = [&(descriptors.len() as u16 - 1).to_le_bytes()[..], &DESCRIPTORS.to_le_bytes()].concat();
    copy(a, DESCRIPTORS, &descriptors)?;
    copy(a, POINTER, &pointer)?;
    copy(a, TRAMPOLINE, &trampoline)?;
    copy(a, AP_CODE, &ap)?;
    // INIT and start-up.
    for (register, value) in [(0x310u32, 1u32 << 24), (0x300, 0x4500), (0x300, 0x4600 | TRAMPOLINE >> 12)] {
        a.mov(dword_ptr(0xfee0_0000u32 + register), value)?;
    }
    Ok(())
}

pub(super) fn copy(a: &mut CodeAssembler, to: u32, bytes: &[u8]) -> Result<(), IcedError> {
    for (at, byte) in (to..).zip(bytes) {
        a.mov(byte_ptr(at), u32::from(*byte))?;
    }
    Ok(())
}

pub(super) fn exit(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(eax, value)?;
    a.out(0xf4, eax)?;
    rest(a)
}

/// For ever.
pub(super) fn rest(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.cli()?;
    a.hlt()?;
    a.jmp(again)
}

/// # Panics
///
/// When an instruction is none: the code above is the same every time.
pub(super) fn assemble(
    bitness: u32,
    at: u32,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bitness).expect("a known mode");
    write(&mut assembler).expect("instructions that exist");
    assembler.assemble(at.into()).expect("labels in reach")
}
