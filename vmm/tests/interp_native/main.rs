//! The interpreter against the CPU that runs the test: the same bytes, registers, flags and memory on both sides.
//!
//! Story: a 64-bit process can run 32-bit code natively (compatibility mode). Each case is one instruction at a fixed
//! address below 4 GiB, between a prologue that loads all registers and an epilogue that stores them; far transfers
//! lead there and back. What the interpreter answers with an exception is not run.
//!
//! Holds: flags that the architecture leaves undefined are compared on AMD CPUs only, whose values `alu` follows.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod arena;
mod templates;

use arena::{Arena, BRANCH, DATA, DATA_SIZE, INSTRUCTION, USER_DATA, USER32_CODE, arena};
use templates::{Form, Random, Template, opcodes, random_case, second_opcodes, template};
use umbra::cpu::CpuState;
use umbra::interp::flat::FlatBus;
use umbra::interp::{Step, decode, execute, step};

/// Random cases for each template.
const CASES: u32 = 300;

/// CF, PF, AF, ZF, SF, DF and OF.
const FLAGS: u32 = 0xcd5;

/// True where undefined flags are compared too.
fn is_amd() -> bool {
    std::arch::x86_64::__cpuid(0).ecx == u32::from_le_bytes(*b"cAMD")
}

struct Case {
    bytes: Vec<u8>,
    gpr: [u32; 8],
    flags: u32,
    memory: Vec<u8>,
}

/// What a case leaves.
struct Outcome {
    gpr: [u32; 8],
    flags: u32,
    eip: u32,
    memory: Vec<u8>,
}

/// Runs one case on both sides. Returns false where the interpreter raised an exception, so that nothing could be
/// compared.
fn agrees(case: &Case, arena: &Arena) -> bool {
    let instruction = decode(&case.bytes, true, INSTRUCTION).expect("templates are instructions");
    let Some(ours) = interpret(case, &instruction) else { return false };
    let native = arena.run(case);
    let undefined = if is_amd() { 0 } else { iced_flags(instruction.rflags_undefined()) };
    let context =
        || format!("{:02x?} {instruction:?}\nfrom {:x?} flags {:#x}", case.bytes, case.gpr, case.flags);
    assert_eq!(ours.gpr.map(Hex), native.gpr.map(Hex), "registers: {}", context());
    let mask = FLAGS & !undefined;
    assert_eq!(Hex(ours.flags & mask), Hex(native.flags & mask), "flags: {}", context());
    assert_eq!(Hex(ours.eip), Hex(native.eip), "EIP: {}", context());
    let differs = ours.memory.iter().zip(&native.memory).position(|(a, b)| a != b);
    if let Some(n) = differs {
        let bytes = |memory: &[u8]| memory[n..DATA_SIZE.min(n + 8)].to_vec();
        let (ours, native) = (bytes(&ours.memory), bytes(&native.memory));
        panic!("memory at {n:#x}: {ours:02x?}, natively {native:02x?}: {}", context());
    }
    true
}

/// The interpreter's outcome after all iterations, or None on an exception.
fn interpret(case: &Case, instruction: &iced_x86::Instruction) -> Option<Outcome> {
    let mut bus = FlatBus::new(DATA, DATA_SIZE);
    bus.memory.copy_from_slice(&case.memory);
    let mut cpu = CpuState::flat_protected_mode(INSTRUCTION);
    for segment in &mut cpu.seg {
        segment.attributes |= 0x60;
        segment.selector = USER_DATA;
    }
    cpu.seg[1].selector = USER32_CODE;
    for segment in &mut cpu.seg[4..] {
        (segment.selector, segment.unusable) = (0, true);
    }
    cpu.cpl = 3;
    cpu.gpr = case.gpr;
    // Interrupts are open in a Linux process.
    cpu.eflags = case.flags | 0x202;
    while cpu.eip == INSTRUCTION {
        match execute(&mut cpu, &mut bus, instruction) {
            Step::Done => {}
            Step::Exception(_) => return None,
            other => panic!("{other:?} for {:02x?}", case.bytes),
        }
    }
    Some(Outcome { gpr: cpu.gpr, flags: cpu.eflags, eip: cpu.eip, memory: bus.memory })
}

#[derive(PartialEq)]
struct Hex(u32);

impl std::fmt::Debug for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// iced's flag bits as EFLAGS bits.
fn iced_flags(bits: u32) -> u32 {
    use iced_x86::RflagsBits as R;
    let pairs =
        [(R::OF, 0x800), (R::SF, 0x80), (R::ZF, 0x40), (R::AF, 0x10), (R::CF, 1), (R::PF, 4), (R::DF, 0x400)];
    pairs.iter().filter(|(from, _)| bits & from != 0).fold(0, |flags, (_, to)| flags | to)
}

/// Runs every template `CASES` times; each must have been compared at least once.
fn compare_all(templates: &[Template]) {
    let Some(arena) = arena() else { return };
    let cases = std::env::var("UMBRA_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES);
    let mut random = Random(0x1234_5678_9abc_def1);
    for template in templates {
        let mut compared = 0;
        for _ in 0..cases {
            compared += u32::from(agrees(&random_case(template, &mut random), &arena));
        }
        assert!(compared > 0, "{:02x?} was never compared", template.opcode);
    }
}

#[test]
fn arithmetic_and_logic_agree() {
    let mut templates = Vec::new();
    const OPCODES: [[u8; 1]; 0x40] = opcodes(0);
    for base in (0..0x40).step_by(8) {
        let lock = |t: Template| if base == 0x38 { t } else { t.lock() };
        templates.push(lock(template(&OPCODES[base], Form::Any)));
        templates.push(lock(template(&OPCODES[base + 1], Form::Any)));
        templates.push(template(&OPCODES[base + 2], Form::Any));
        templates.push(template(&OPCODES[base + 3], Form::Any));
        templates.push(template(&OPCODES[base + 4], Form::Bare).imm(1));
        templates.push(template(&OPCODES[base + 5], Form::Bare).imm(4));
        let digit = base as u8 / 8;
        templates.push(lock(template(&[0x80], Form::Digit(digit)).imm(1)));
        templates.push(lock(template(&[0x81], Form::Digit(digit)).imm(4)));
        templates.push(lock(template(&[0x83], Form::Digit(digit)).imm(1)));
    }
    for opcode in [&[0xfe], &[0xff]] {
        templates.push(template(opcode, Form::Digit(0)).lock());
        templates.push(template(opcode, Form::Digit(1)).lock());
    }
    for opcode in [&[0xf6], &[0xf7]] {
        templates.push(template(opcode, Form::Digit(2)).lock());
        templates.push(template(opcode, Form::Digit(3)).lock());
    }
    templates.push(template(&[0xf6], Form::Digit(0)).imm(1));
    templates.push(template(&[0xf7], Form::Digit(0)).imm(4));
    templates.push(template(&[0x84], Form::Any));
    templates.push(template(&[0x85], Form::Any));
    for opcode in [&[0x0f, 0xb0], &[0x0f, 0xb1], &[0x0f, 0xc0], &[0x0f, 0xc1]] {
        templates.push(template(opcode, Form::Any).lock());
    }
    templates.push(template(&[0x0f, 0xc7], Form::MemoryDigit(1)).lock());
    compare_all(&templates);
}

#[test]
fn shifts_and_rotates_agree() {
    let mut templates = Vec::new();
    for digit in 0..8 {
        for opcode in [&[0xd0], &[0xd1], &[0xd2], &[0xd3]] {
            templates.push(template(opcode, Form::Digit(digit)));
        }
        templates.push(template(&[0xc0], Form::Digit(digit)).imm(1));
        templates.push(template(&[0xc1], Form::Digit(digit)).imm(1));
    }
    for opcode in [&[0x0f, 0xa4], &[0x0f, 0xac]] {
        templates.push(template(opcode, Form::Any).imm(1));
    }
    for opcode in [&[0x0f, 0xa5], &[0x0f, 0xad]] {
        templates.push(template(opcode, Form::Any));
    }
    compare_all(&templates);
}

#[test]
fn multiplication_and_division_agree() {
    let mut templates = vec![
        template(&[0x0f, 0xaf], Form::Any),
        template(&[0x69], Form::Any).imm(4),
        template(&[0x6b], Form::Any).imm(1),
    ];
    for digit in 4..8 {
        templates.push(template(&[0xf6], Form::Digit(digit)));
        templates.push(template(&[0xf7], Form::Digit(digit)));
    }
    compare_all(&templates);
}

#[test]
fn bit_instructions_agree() {
    let mut templates = Vec::new();
    templates.push(template(&[0x0f, 0xa3], Form::Any));
    for opcode in [&[0x0f, 0xab], &[0x0f, 0xb3], &[0x0f, 0xbb]] {
        templates.push(template(opcode, Form::Any).lock());
    }
    templates.push(template(&[0x0f, 0xba], Form::Digit(4)).imm(1));
    for digit in 5..8 {
        templates.push(template(&[0x0f, 0xba], Form::Digit(digit)).imm(1).lock());
    }
    templates.push(template(&[0x0f, 0xbc], Form::Any));
    templates.push(template(&[0x0f, 0xbd], Form::Any));
    templates.push(template(&[0x0f, 0xc9], Form::Bare));
    compare_all(&templates);
}

#[test]
fn moves_and_conditions_agree() {
    const CMOV: [[u8; 2]; 16] = second_opcodes(0x40);
    const SET: [[u8; 2]; 16] = second_opcodes(0x90);
    let mut templates = vec![
        template(&[0x86], Form::Any).lock(),
        template(&[0x87], Form::Any).lock(),
        template(&[0x88], Form::Any),
        template(&[0x89], Form::Any),
        template(&[0x8a], Form::Any),
        template(&[0x8b], Form::Any),
        template(&[0x8d], Form::Memory),
        template(&[0xc6], Form::Digit(0)).imm(1),
        template(&[0xc7], Form::Digit(0)).imm(4),
        template(&[0xb2], Form::Bare).imm(1),
        template(&[0xba], Form::Bare).imm(4),
        template(&[0x0f, 0xb6], Form::Any),
        template(&[0x0f, 0xb7], Form::Any),
        template(&[0x0f, 0xbe], Form::Any),
        template(&[0x0f, 0xbf], Form::Any),
        template(&[0x0f, 0xc3], Form::Memory).wide(),
        template(&[0xd7], Form::Bare),
    ];
    templates.extend(CMOV.iter().map(|opcode| template(opcode, Form::Any)));
    templates.extend(SET.iter().map(|opcode| template(opcode, Form::Digit(0))));
    const BARE: [[u8; 1]; 10] =
        [[0x98], [0x99], [0x9e], [0x9f], [0xf5], [0xf8], [0xf9], [0xfc], [0xfd], [0x90]];
    templates.extend(BARE.iter().map(|opcode| template(opcode, Form::Bare)));
    compare_all(&templates);
}

#[test]
fn string_instructions_agree() {
    const OPCODES: [[u8; 1]; 10] =
        [[0xa4], [0xa5], [0xa6], [0xa7], [0xaa], [0xab], [0xac], [0xad], [0xae], [0xaf]];
    let templates: Vec<Template> =
        OPCODES.iter().map(|opcode| template(opcode, Form::Bare).string()).collect();
    compare_all(&templates);
}

#[test]
fn stack_instructions_agree() {
    const ROW: [[u8; 1]; 32] = opcodes(0x40);
    let mut templates: Vec<Template> = ROW.iter().map(|opcode| template(opcode, Form::Bare)).collect();
    // PUSH of segment registers, immediates and memory; POP to memory.
    const SEGMENTS: [[u8; 1]; 4] = [[0x06], [0x0e], [0x16], [0x1e]];
    templates.extend(SEGMENTS.iter().map(|opcode| template(opcode, Form::Bare)));
    templates.extend([
        template(&[0x0f, 0xa0], Form::Bare),
        template(&[0x0f, 0xa8], Form::Bare),
        template(&[0x68], Form::Bare).imm(4),
        template(&[0x6a], Form::Bare).imm(1),
        template(&[0xff], Form::Digit(6)),
        template(&[0x8f], Form::Digit(0)),
        template(&[0x60], Form::Bare),
        template(&[0x61], Form::Bare),
        template(&[0x9c], Form::Bare),
        template(&[0x9d], Form::Bare),
        template(&[0xc8], Form::Bare).imm(3),
        template(&[0xc9], Form::Bare),
    ]);
    compare_all(&templates);
}

#[test]
fn decimal_and_odd_instructions_agree() {
    compare_all(&[
        template(&[0x27], Form::Bare),
        template(&[0x2f], Form::Bare),
        template(&[0x37], Form::Bare),
        template(&[0x3f], Form::Bare),
        template(&[0xd4], Form::Bare).imm(1),
        template(&[0xd5], Form::Bare).imm(1),
        template(&[0xd6], Form::Bare),
        template(&[0x62], Form::Memory),
        template(&[0x63], Form::Any),
        template(&[0x8c], Form::Digit(1)),
        template(&[0x8c], Form::Digit(2)),
        template(&[0x8c], Form::Digit(3)),
        template(&[0x8c], Form::Digit(5)),
        template(&[0xa8], Form::Bare).imm(1),
        template(&[0xa9], Form::Bare).imm(4),
    ]);
}

/// Branches that go [`BRANCH`] bytes on, or not.
#[test]
fn branches_agree() {
    const SHORT: [[u8; 2]; 16] = {
        let mut all = [[0, BRANCH as u8]; 16];
        let mut n = 0;
        while n < 16 {
            all[n][0] = 0x70 + n as u8;
            n += 1;
        }
        all
    };
    const NEAR: [[u8; 2]; 16] = second_opcodes(0x80);
    const LOOPS: [[u8; 2]; 5] = [
        [0xe0, BRANCH as u8],
        [0xe1, BRANCH as u8],
        [0xe2, BRANCH as u8],
        [0xe3, BRANCH as u8],
        [0xeb, BRANCH as u8],
    ];
    let Some(arena) = arena() else { return };
    let mut random = Random(99);
    let near = BRANCH.to_le_bytes();
    let mut all: Vec<Vec<u8>> = SHORT.iter().chain(&LOOPS).map(|bytes| bytes.to_vec()).collect();
    all.extend(LOOPS[..4].iter().map(|bytes| [&[0x67][..], bytes].concat()));
    all.extend(NEAR.iter().map(|bytes| [&bytes[..], &near].concat()));
    all.extend([[&[0xe8][..], &near].concat(), [&[0xe9][..], &near].concat()]);
    for bytes in all {
        for _ in 0..CASES {
            let mut case = random_case(&template(&[0x90], Form::Bare), &mut random);
            case.bytes.clone_from(&bytes);
            case.gpr[1] = [0, 1, 2, 0x1_0000, 0x1_0001][random.below(5) as usize];
            assert!(agrees(&case, &arena));
        }
    }
}

/// LEA with every form of ModRM and SIB, in both address sizes.
#[test]
fn effective_addresses_agree() {
    let Some(arena) = arena() else { return };
    let mut random = Random(77);
    for modrm in (0..0xc0_u8).flat_map(|modrm| std::iter::repeat_n(modrm, 40)) {
        let small = random.below(3) == 0;
        let mut bytes = [if small { &[0x67][..] } else { &[] }, &[0x8d, modrm]].concat();
        // As much SIB and displacement as any form has; what is too much is cut.
        bytes.extend(random.next().to_le_bytes());
        bytes.extend(random.next().to_le_bytes());
        let length = decode(&bytes, true, INSTRUCTION).expect("LEA of memory").len();
        bytes.truncate(length);
        let case = Case { bytes, gpr: [0; 8].map(|_| random.value()), flags: 0, memory: vec![0; DATA_SIZE] };
        assert!(agrees(&case, &arena));
    }
}

/// The fetch and decode path too: a short program, step by step.
#[test]
fn a_loop_runs_to_its_end() {
    let mut bus = FlatBus::new(0, 4096);
    // mov ecx, 10; xor eax, eax; again: add eax, ecx; loop again; hlt
    bus.place(0x100, &[0xb9, 10, 0, 0, 0, 0x31, 0xc0, 0x01, 0xc8, 0xe2, 0xfc, 0xf4]);
    let mut cpu = CpuState::flat_protected_mode(0x100);
    let steps = (0..100).take_while(|_| step(&mut cpu, &mut bus) == Step::Done).count();
    assert_eq!((steps, cpu.gpr[0], cpu.halted), (22, 55, true));
}
