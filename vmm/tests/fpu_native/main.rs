//! The FPU's instructions in the interpreter against the CPU that runs the test: the same bytes, registers and memory
//! on both sides, every form of x87, MMX, SSE and SSE2.
//!
//! Story: a 64-bit process can run 32-bit code natively (compatibility mode). Each case is one instruction at a fixed
//! address below 4 GiB, between a prologue that loads all registers (FXRSTOR) and an epilogue that stores them
//! (FXSAVE). A fault there is a signal, whose handler notes the vector and goes on at the epilogue, so that #MF, #XM,
//! #GP and #AC are compared too, with the state that they leave.
//!
//! Holds: forms that are not compared are a list ([`NOT_COMPARED`]), each with its reason, and the test fails when it
//! is not exactly what is left out. What else may differ is in [`forgive`].
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod arena;
mod forms;
mod values;

use std::collections::BTreeMap;

use arena::{Arena, DATA, DATA_MIDDLE, DATA_SIZE, INSTRUCTION, USER_DATA, USER32_CODE, arena};
use iced_x86::Code;
use umbra::cpu::fpu::IMAGE_BYTES;
use umbra::cpu::{CpuState, Fpu, cr0, cr4};
use umbra::interp::flat::FlatBus;
use umbra::interp::{Step, decode, execute};
use values::Random;

/// Random cases for each form.
const CASES: u32 = 150;

/// Forms that are not compared, with the reason.
const NOT_COMPARED: [(&[Code], &str); 2] = [
    (
        &[
            Code::Fstenv_m14byte,
            Code::Fstenv_m28byte,
            Code::Fstcw_m2byte,
            Code::Feni,
            Code::Fdisi,
            Code::Fclex,
            Code::Finit,
            Code::Fsetpm,
            Code::Fsave_m94byte,
            Code::Fsave_m108byte,
            Code::Fstsw_m2byte,
            Code::Fstsw_AX,
            Code::Fstdw_AX,
            Code::Fstsg_AX,
        ],
        "FWAIT and the instruction without it, which the decoder gives as two",
    ),
    (&[Code::Frstpm, Code::Fnstdw_AX, Code::Fnstsg_AX], "of coprocessors before the 80487: #UD"),
];

/// One instruction and all that it starts with.
pub struct Case {
    bytes: Vec<u8>,
    gpr: [u32; 8],
    flags: u32,
    memory: Vec<u8>,
    fpu: Fpu,
}

impl Case {
    /// Where in memory the operand is.
    fn operand(&self) -> usize {
        let instruction = decode(&self.bytes, true, INSTRUCTION).expect("forms are instructions");
        (DATA_MIDDLE.wrapping_add(instruction.memory_displacement32()) - DATA) as usize
    }
}

/// What a case leaves.
pub struct Outcome {
    /// Of the fault, if any.
    vector: Option<u8>,
    gpr: [u32; 8],
    flags: u32,
    image: [u8; IMAGE_BYTES],
    memory: Vec<u8>,
}

/// The interpreter's outcome.
fn interpret(case: &Case) -> Outcome {
    let instruction = decode(&case.bytes, true, INSTRUCTION).expect("forms are instructions");
    let mut bus = FlatBus::new(DATA, DATA_SIZE);
    bus.memory.copy_from_slice(&case.memory);
    let mut cpu = CpuState::flat_protected_mode(INSTRUCTION);
    for segment in &mut cpu.seg {
        segment.attributes |= 0x60;
        segment.selector = USER_DATA;
    }
    cpu.seg[1].selector = USER32_CODE;
    cpu.cpl = 3;
    cpu.cr0 |= cr0::NE | cr0::AM | cr0::MP;
    cpu.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT;
    cpu.gpr = case.gpr;
    // Interrupts are open in a Linux process.
    cpu.eflags = case.flags | 0x202;
    cpu.fpu = case.fpu.clone();
    let vector = match execute(&mut cpu, &mut bus, &instruction) {
        Step::Done => None,
        Step::Exception(exception) => Some(exception.vector),
        other => panic!("{other:?} for {instruction:?}"),
    };
    Outcome { vector, gpr: cpu.gpr, flags: cpu.eflags, image: cpu.fpu.image(), memory: bus.memory }
}

/// True where a fault's timing, and what it leaves of TOP and tags, are those that the interpreter follows.
fn is_amd() -> bool {
    std::arch::x86_64::__cpuid(0).ecx == u32::from_le_bytes(*b"cAMD")
}

/// The fields of an image that are compared, by name.
fn fields(image: &[u8; IMAGE_BYTES]) -> Vec<(String, u128)> {
    let slot = |at: usize, length: usize| {
        image[at..at + length].iter().rev().fold(0, |value, byte| value << 8 | u128::from(*byte))
    };
    let words = [("FCW", 0, 2), ("FSW", 2, 2), ("tags", 4, 1), ("MXCSR", 24, 4)];
    let words = words.into_iter().map(|(name, at, length)| (name.to_owned(), slot(at, length)));
    let stack = (0..8).map(|n| (format!("ST({n})"), slot(32 + 16 * n, 16)));
    let xmm = (0..8).map(|n| (format!("XMM{n}"), slot(160 + 16 * n, 16)));
    words.chain(stack).chain(xmm).collect()
}

/// FOP, FIP, FCS, FDP, FDS, each where the CPU has stored it: some do only while an exception is pending, some never.
fn pointers(ours: &[u8], native: &[u8]) -> Vec<(String, u128, u128)> {
    let places = [("FOP", 6, 2), ("FIP", 8, 4), ("FCS", 12, 2), ("FDP", 16, 4), ("FDS", 20, 2)];
    let value = |image: &[u8], at: usize, length: usize| {
        image[at..at + length].iter().rev().fold(0, |value, byte| value << 8 | u128::from(*byte))
    };
    let pairs = places.map(|(name, at, n)| (name.to_owned(), value(ours, at, n), value(native, at, n)));
    pairs.into_iter().filter(|(_, _, native)| *native != 0).collect()
}

/// What differs, a line each.
fn differences(ours: &Outcome, native: &Outcome) -> Vec<String> {
    const FLAGS: u32 = 0x8d5;
    let mut lines = Vec::new();
    let mut compare = |name: &str, ours: u128, native: u128| {
        if ours != native {
            lines.push(format!("{name}: {ours:#x}, natively {native:#x}"));
        }
    };
    let vector = |outcome: &Outcome| outcome.vector.map_or(0x100, u128::from);
    compare("vector", vector(ours), vector(native));
    compare("flags", (ours.flags & FLAGS).into(), (native.flags & FLAGS).into());
    for (n, (a, b)) in ours.gpr.iter().zip(&native.gpr).enumerate() {
        compare(&format!("register {n}"), (*a).into(), (*b).into());
    }
    for ((name, a), (_, b)) in fields(&ours.image).iter().zip(fields(&native.image)) {
        compare(name, *a, b);
    }
    for (name, a, b) in pointers(&ours.image, &native.image) {
        compare(&name, a, b);
    }
    for (n, (a, b)) in ours.memory.iter().zip(&native.memory).enumerate() {
        compare(&format!("memory + {n:#x}"), (*a).into(), (*b).into());
    }
    lines
}

/// Takes out what is allowed to differ.
fn forgive(code: Code, case: &Case, ours: &mut Outcome, native: &mut Outcome) {
    match code {
        // Silicon makes the x87 stack look full before the fault; the interpreter's faults change nothing.
        Code::Maskmovq_rDI_mm_mm
        | Code::Cvtpi2ps_xmm_mmm64
        | Code::Cvtpi2pd_xmm_mmm64
        | Code::Cvtps2pi_mm_xmmm64
        | Code::Cvtpd2pi_mm_xmmm128
        | Code::Cvttps2pi_mm_xmmm64
        | Code::Cvttpd2pi_mm_xmmm128
            if ours.vector.is_some() && ours.vector == native.vector =>
        {
            for image in [&mut ours.image, &mut native.image] {
                let mut fpu = Fpu::from_image(image).expect("MXCSR is legal");
                fpu.enter_mmx();
                *image = fpu.image();
            }
        }
        // MXCSR_MASK is the CPU's own.
        Code::Fxsave_m512byte if native.vector.is_none() => {
            let at = case.operand() + 28;
            native.memory[at..at + 4].copy_from_slice(&ours.memory[at..at + 4]);
        }
        _ => {}
    }
}

/// What came of all cases of one form, or of several.
#[derive(Default)]
struct Tally {
    faults: BTreeMap<u8, u32>,
    retired: u32,
    differ: u32,
    example: String,
    /// Cases in which the CPU told where an exception was.
    pointed: u32,
}

fn compare_form(code: Code, cases: u32, arena: &Arena, random: &mut Random) -> Tally {
    let mut tally = Tally::default();
    for _ in 0..cases {
        let case = forms::case(code, random);
        let (mut ours, mut native) = (interpret(&case), arena.run(&case));
        match native.vector {
            Some(vector) => *tally.faults.entry(vector).or_default() += 1,
            None => tally.retired += 1,
        }
        tally.pointed += u32::from(!pointers(&ours.image, &native.image).is_empty());
        forgive(code, &case, &mut ours, &mut native);
        let lines = differences(&ours, &native);
        tally.differ += u32::from(!lines.is_empty());
        if !lines.is_empty() && tally.example.is_empty() {
            tally.example = describe(code, &case, &lines);
        }
    }
    tally
}

fn describe(code: Code, case: &Case, lines: &[String]) -> String {
    let from = fields(&case.fpu.image());
    let from: Vec<String> = from.iter().map(|(name, value)| format!("{name}={value:x}")).collect();
    let (bytes, lines, from) = (&case.bytes, lines.join("\n  "), from.join(" "));
    format!("{code:?} {bytes:02x?}\n  {lines}\n  from {from} flags {:x} gpr {:x?}", case.flags, case.gpr)
}

#[test]
fn what_is_not_compared_is_no_instruction_of_its_own() {
    let mut random = Random(1);
    let other = |code: &Code| {
        let case = forms::case(*code, &mut random);
        decode(&case.bytes, true, INSTRUCTION).map(|instruction| instruction.code()) != Ok(*code)
    };
    let others: Vec<Code> = forms::codes().filter(other).collect();
    let mut left_out: Vec<Code> = NOT_COMPARED.iter().flat_map(|(codes, _)| *codes).copied().collect();
    left_out.sort();
    assert_eq!(others, left_out);
}

#[test]
fn every_form_agrees() {
    let Some(arena) = arena() else { return };
    let cases = std::env::var("UMBRA_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES);
    let mut random = Random(0x1234_5678_9abc_def1);
    let left_out: Vec<Code> = NOT_COMPARED.iter().flat_map(|(codes, _)| *codes).copied().collect();
    let mut all = Tally::default();
    for code in forms::codes().filter(|code| !left_out.contains(code)) {
        let tally = compare_form(code, cases, &arena, &mut random);
        assert!(tally.retired > 0, "{code:?} never retired: {:?}", tally.faults);
        all.retired += tally.retired;
        all.pointed += tally.pointed;
        tally.faults.iter().for_each(|(vector, count)| *all.faults.entry(*vector).or_default() += count);
        if tally.differ > 0 {
            println!("{} of {cases} differ: {}", tally.differ, tally.example);
            all.differ += 1;
        }
    }
    println!("{} retired, {} with pointers, faults {:?}", all.retired, all.pointed, all.faults);
    assert_eq!(all.differ, 0, "forms that differ");
    let faults: Vec<u8> = all.faults.keys().copied().collect();
    let wanted: &[u8] = if is_amd() { &[13, 16, 17, 19] } else { &[13, 16, 19] };
    assert_eq!(faults, wanted, "#GP, #MF, #AC and #XM have all been compared, and nothing else");
}
