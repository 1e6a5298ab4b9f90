//! The interpreter against the CPU that runs the test: the same bytes, registers, flags and memory on both sides.
//!
//! Story: most 32-bit encodings mean the same in 64-bit code while registers hold 32-bit values, so the test calls
//! them natively; ESP is left out (it is the caller's stack), and so are the encodings that 64-bit mode has taken
//! away (INC r32, PUSHA, DAA, segment loads), which need a CPU in compatibility mode.
//!
//! Holds: flags that the architecture leaves undefined are compared on AMD CPUs only, whose values `alu` follows.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use std::sync::{Mutex, OnceLock};

use umbra::cpu::CpuState;
use umbra::interp::flat::FlatBus;
use umbra::interp::{Step, decode, step};

/// Random cases for each template.
const CASES: u32 = 300;
const CODE_SIZE: usize = 4096;
const DATA_SIZE: usize = 3 * 4096;
/// Where memory operands point: the middle of the data, so that displacements of a byte stay inside.
const DATA_MIDDLE: u32 = (DATA_SIZE / 2) as u32;
/// CF, PF, AF, ZF, SF, DF and OF.
const FLAGS: u32 = 0xcd5;
const RET: u8 = 0xc3;

/// What runs natively: registers in the order of the encoding (ESP unused), then flags.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Native {
    gpr: [u64; 8],
    flags: u64,
}

std::arch::global_asm!(
    ".globl umbra_native_run",
    "umbra_native_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "mov r12, rdi",
    "mov r13, rsi",
    "mov eax, [r12]",
    "mov ecx, [r12 + 8]",
    "mov edx, [r12 + 16]",
    "mov ebx, [r12 + 24]",
    "mov ebp, [r12 + 40]",
    "mov esi, [r12 + 48]",
    "mov edi, [r12 + 56]",
    "push [r12 + 64]",
    "popfq",
    "call r13",
    "pushfq",
    "pop [r12 + 64]",
    "cld",
    "mov [r12], rax",
    "mov [r12 + 8], rcx",
    "mov [r12 + 16], rdx",
    "mov [r12 + 24], rbx",
    "mov [r12 + 40], rbp",
    "mov [r12 + 48], rsi",
    "mov [r12 + 56], rdi",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    fn umbra_native_run(state: *mut Native, code: *const u8);
}

/// Code and data below 4 GiB, mapped once.
struct Arena {
    code: usize,
    data: usize,
}

fn map(size: usize, protection: i32) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches no memory that exists.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
    assert_ne!(address, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    address as usize
}

impl Arena {
    fn shared() -> &'static Mutex<Arena> {
        static ARENA: OnceLock<Mutex<Arena>> = OnceLock::new();
        ARENA.get_or_init(|| {
            let data = map(DATA_SIZE, libc::PROT_READ | libc::PROT_WRITE);
            let code = map(CODE_SIZE, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
            Mutex::new(Arena { code, data })
        })
    }

    /// Runs `bytes` on `state` and `memory`, in place.
    fn run(&mut self, bytes: &[u8], state: &mut Native, memory: &mut [u8]) {
        assert!(bytes.len() < 16 && memory.len() == DATA_SIZE);
        let (code, data) = (self.code as *mut u8, self.data as *mut u8);
        // SAFETY: both mappings are ours alone (the lock is held), long enough by the assertion, and disjoint from
        // every Rust object. The code is one instruction of the templates and a RET: none touches the stack pointer,
        // and memory operands stay within the data by the choice of registers. The trampoline saves what the
        // calling convention wants saved, and clears DF.
        unsafe {
            std::ptr::copy_nonoverlapping(memory.as_ptr(), data, DATA_SIZE);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), code, bytes.len());
            *code.add(bytes.len()) = RET;
            umbra_native_run(state, code);
            std::ptr::copy_nonoverlapping(data, memory.as_mut_ptr(), DATA_SIZE);
        }
    }
}

/// A small generator, seeded: failures repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }

    fn below(&mut self, n: u32) -> u32 {
        self.next() % n
    }

    /// Values at which arithmetic turns, half of the time.
    fn value(&mut self) -> u32 {
        const EDGES: [u32; 12] =
            [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, u32::MAX];
        match self.below(4) {
            0 => EDGES[self.below(12) as usize],
            1 => EDGES[self.below(12) as usize].wrapping_add(self.below(5)).wrapping_sub(2),
            2 => self.next() >> self.below(32),
            _ => self.next(),
        }
    }
}

/// How a template's ModRM byte is made up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// No ModRM.
    Bare,
    /// /r, register or [esi + disp8].
    Any,
    /// /digit, register or memory.
    Digit(u8),
    /// /digit, memory only.
    MemoryDigit(u8),
    /// /r, memory only.
    Memory,
}

/// An opcode and what follows it.
#[derive(Clone, Copy)]
struct Template {
    opcode: &'static [u8],
    form: Form,
    /// Immediate bytes; 4 means the operand size.
    immediate: u8,
    /// LOCK is allowed on memory.
    lock: bool,
    /// REP and REPNE are tried.
    string: bool,
    /// There is no 16-bit form.
    wide: bool,
}

const fn template(opcode: &'static [u8], form: Form) -> Template {
    Template { opcode, form, immediate: 0, lock: false, string: false, wide: false }
}

impl Template {
    const fn imm(self, immediate: u8) -> Template {
        Template { immediate, ..self }
    }

    const fn lock(self) -> Template {
        Template { lock: true, ..self }
    }

    const fn wide(self) -> Template {
        Template { wide: true, ..self }
    }

    const fn string(self) -> Template {
        Template { string: true, ..self }
    }

    /// A register number, ESP and AH's like excluded only where they would be ESP.
    fn register(random: &mut Random) -> u8 {
        [0, 1, 2, 3, 5, 6, 7][random.below(7) as usize]
    }

    fn bytes(&self, random: &mut Random) -> Vec<u8> {
        let mut bytes = Vec::new();
        let small = !self.wide && random.below(3) == 0;
        let memory = match self.form {
            Form::Memory | Form::MemoryDigit(_) => true,
            Form::Bare => false,
            _ => random.below(2) == 0,
        };
        if small {
            bytes.push(0x66);
        }
        if self.lock && memory && random.below(2) == 0 {
            bytes.push(0xf0);
        }
        if self.string {
            bytes.extend([&[][..], &[0xf3], &[0xf2]][random.below(3) as usize]);
        }
        bytes.extend(self.opcode);
        let reg = match self.form {
            Form::Digit(digit) | Form::MemoryDigit(digit) => digit,
            // With a byte operand 4 would be AH: fine natively too, as there is no REX.
            _ => Self::register(random),
        };
        match self.form {
            Form::Bare => {}
            _ if memory => bytes.extend([0x46 | reg << 3, random.next() as u8]),
            _ => bytes.push(0xc0 | reg << 3 | Self::register(random)),
        }
        let immediate = if self.immediate == 4 && small { 2 } else { self.immediate };
        bytes.extend(&random.value().to_le_bytes()[..immediate.into()]);
        bytes
    }
}

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

/// Runs one case on both sides. Returns false where the interpreter raised an exception, so that nothing could be
/// compared.
fn agrees(case: &Case, arena: &mut Arena) -> bool {
    let mut bus = FlatBus::new(arena.data as u32, DATA_SIZE);
    bus.memory.copy_from_slice(&case.memory);
    let code = FlatCode { bus, at: 0x1000, bytes: &case.bytes };
    let Some((cpu, memory)) = code.interpret(case) else { return false };
    let mut native = Native { gpr: case.gpr.map(u64::from), flags: u64::from(case.flags | 2) };
    let mut native_memory = case.memory.clone();
    arena.run(&case.bytes, &mut native, &mut native_memory);

    let instruction = decode(&case.bytes, true, 0).expect("templates are instructions");
    let undefined = instruction.rflags_undefined();
    let ours = if is_amd() { 0 } else { iced_flags(undefined) };
    let mut gpr = native.gpr.map(|value| value as u32);
    gpr[4] = cpu.gpr[4];
    let context =
        || format!("{:02x?} {instruction:?}\nfrom {:x?} flags {:#x}", case.bytes, case.gpr, case.flags);
    assert_eq!(cpu.gpr.map(Hex), gpr.map(Hex), "registers: {}", context());
    let mask = FLAGS & !ours;
    assert_eq!(Hex(cpu.eflags & mask), Hex(native.flags as u32 & mask), "flags: {}", context());
    assert!(memory == native_memory, "memory: {}", context());
    true
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

/// The data as the interpreter's memory, with the code fetched from elsewhere.
struct FlatCode<'a> {
    bus: FlatBus,
    at: u32,
    bytes: &'a [u8],
}

impl FlatCode<'_> {
    /// The state and memory after all iterations, or None on an exception.
    fn interpret(mut self, case: &Case) -> Option<(CpuState, Vec<u8>)> {
        let mut cpu = CpuState::flat_protected_mode(self.at);
        cpu.gpr = case.gpr;
        cpu.eflags = case.flags | 2;
        let instruction = decode(self.bytes, true, self.at).expect("templates are instructions");
        let end = self.at + self.bytes.len() as u32;
        while cpu.eip != end {
            match umbra::interp::execute(&mut cpu, &mut self.bus, &instruction) {
                Step::Done => {}
                Step::Exception(_) => return None,
                other => panic!("{other:?} for {:02x?}", self.bytes),
            }
        }
        Some((cpu, self.bus.memory))
    }
}

fn random_case(template: &Template, random: &mut Random, data: u32) -> Case {
    let mut gpr = [0; 8].map(|_| random.value());
    let memory = (0..DATA_SIZE).map(|_| random.next() as u8).collect();
    gpr[6] = data + DATA_MIDDLE;
    let mut flags = random.next() & FLAGS & !0x400;
    if template.string {
        gpr[7] = data + DATA_MIDDLE + random.below(64) - 32;
        gpr[1] = random.below(200);
        flags |= if random.below(2) == 0 { 0x400 } else { 0 };
    }
    let mut bytes = template.bytes(random);
    if template.opcode[0] == 0xd7 {
        gpr[3] = data + DATA_MIDDLE;
    }
    if is_bit_string(template.opcode) {
        // A bit index within the data.
        let index = random.below(16384) as i32 - 8192;
        let modrm = bytes[bytes.len() - 2];
        let reg = modrm >> 3 & 7;
        if reg == 6 && modrm >> 6 == 1 {
            // The index would be the base register.
            let at = bytes.len() - 2;
            bytes[at] = modrm & !0x38;
            gpr[0] = index as u32;
        } else if reg != 6 {
            gpr[reg as usize] = index as u32;
        }
    }
    Case { bytes, gpr, flags, memory }
}

/// BT, BTS, BTR and BTC with a register index.
fn is_bit_string(opcode: &[u8]) -> bool {
    matches!(opcode, [0x0f, 0xa3 | 0xab | 0xb3 | 0xbb])
}

/// Runs every template `CASES` times; each must have been compared at least once.
fn compare_all(templates: &[Template]) {
    let mut arena = Arena::shared().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut random = Random(0x1234_5678_9abc_def1);
    for template in templates {
        let mut compared = 0;
        for _ in 0..CASES {
            let case = random_case(template, &mut random, arena.data as u32);
            compared += u32::from(agrees(&case, &mut arena));
        }
        assert!(compared > 0, "{:02x?} was never compared", template.opcode);
    }
}

#[test]
fn arithmetic_and_logic_agree() {
    let mut templates = Vec::new();
    const OPCODES: [[u8; 1]; 0x40] = {
        let mut all = [[0]; 0x40];
        let mut n = 0;
        while n < 0x40 {
            all[n] = [n as u8];
            n += 1;
        }
        all
    };
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

const fn second_opcodes(first: u8) -> [[u8; 2]; 16] {
    let mut all = [[0x0f, 0]; 16];
    let mut n = 0;
    while n < 16 {
        all[n][1] = first + n as u8;
        n += 1;
    }
    all
}

#[test]
fn string_instructions_agree() {
    const OPCODES: [[u8; 1]; 10] =
        [[0xa4], [0xa5], [0xa6], [0xa7], [0xaa], [0xab], [0xac], [0xad], [0xae], [0xaf]];
    let templates: Vec<Template> =
        OPCODES.iter().map(|opcode| template(opcode, Form::Bare).string()).collect();
    compare_all(&templates);
}

/// LEA with a SIB byte: base, index, scale and displacement.
#[test]
fn effective_addresses_agree() {
    let mut arena = Arena::shared().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut random = Random(77);
    for _ in 0..4 * CASES {
        // ESP as a base would be the native stack; as an index it means none.
        let base = Template::register(&mut random);
        let sib = (random.next() as u8 & 0xf8) | base;
        let (modrm, length) = [(0x04, 0), (0x44, 1), (0x84, 4)][random.below(3) as usize];
        // Without a displacement, base 5 means a displacement alone.
        let length = if modrm == 0x04 && base == 5 { 4 } else { length };
        let mut bytes = vec![0x8d, modrm | Template::register(&mut random) << 3, sib];
        bytes.extend(&random.next().to_le_bytes()[..length]);
        let case = Case { bytes, gpr: [0; 8].map(|_| random.value()), flags: 0, memory: vec![0; DATA_SIZE] };
        assert!(agrees(&case, &mut arena));
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
