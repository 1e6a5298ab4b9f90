//! The interpreter against the CPU that runs the test: the same bytes, registers, flags and memory on both sides.
//!
//! Story: a 64-bit process can run 32-bit code natively (compatibility mode). Each case is one instruction at a fixed
//! address below 4 GiB, between a prologue that loads all registers and an epilogue that stores them; far transfers
//! lead there and back. What the interpreter answers with an exception is not run.
//!
//! Holds: flags that the architecture leaves undefined are compared on AMD CPUs only, whose values `alu` follows.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use std::sync::{Mutex, OnceLock};

use umbra::cpu::CpuState;
use umbra::interp::flat::FlatBus;
use umbra::interp::{Step, decode, execute, step};

/// Random cases for each template.
const CASES: u32 = 300;

/// Registers in and out, and the way back: one page.
const STAGE: u32 = 0x1000_0000;
/// The code page: prologue, [`INSTRUCTION`] with its epilogues, and the way back into 64-bit code.
const CODE: u32 = 0x1000_1000;
const INSTRUCTION: u32 = CODE + 0x100;
const WAY_BACK: u32 = CODE + 0x800;
/// What memory operands and the stack lie in.
const DATA: u32 = 0x1000_2000;
const PAGE: usize = 4096;
const DATA_SIZE: usize = 3 * PAGE;
/// Where memory operands point: the middle of the data, so that displacements of a byte stay inside.
const DATA_MIDDLE: u32 = DATA + (DATA_SIZE / 2) as u32;
const STACK: u32 = DATA + 0x800;
/// Where taken branches land, behind the instruction.
const BRANCH: u32 = 0x60;
/// Offsets in the stage: flags, EIP and the 64-bit stack pointer, after the registers.
const STAGE_FLAGS: u32 = 0x20;
const STAGE_EIP: u32 = 0x24;
const STAGE_RSP: u32 = 0x80;
const STAGE_STACK: u32 = 0x800;

/// CF, PF, AF, ZF, SF, DF and OF.
const FLAGS: u32 = 0xcd5;
/// Selectors of Linux: 32-bit and 64-bit user code, user data.
const USER32_CODE: u16 = 0x23;
const USER64_CODE: u16 = 0x33;
const USER_DATA: u16 = 0x2b;

std::arch::global_asm!(
    ".globl umbra_native_run",
    "umbra_native_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov eax, 0x2b",
    "mov ds, eax",
    "mov es, eax",
    "lea rax, [rip + 2f]",
    "push rax",
    "mov [rdi + 0x80], rsp",
    "push 0x23",
    "push rsi",
    "retfq",
    "2:",
    "cld",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".globl umbra_native_has_32_bit_code",
    "umbra_native_has_32_bit_code:",
    "mov eax, 0x23",
    "lar eax, eax",
    "setz al",
    "movzx eax, al",
    "ret",
);

unsafe extern "C" {
    fn umbra_native_run(stage: usize, code: usize);
    fn umbra_native_has_32_bit_code() -> u32;
}

/// Stage, code and data: three mappings at their fixed addresses, made once.
struct Arena;

impl Arena {
    fn shared() -> &'static Mutex<Arena> {
        static ARENA: OnceLock<Mutex<Arena>> = OnceLock::new();
        ARENA.get_or_init(|| {
            let size = (DATA - STAGE) as usize + DATA_SIZE;
            let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: an anonymous mapping that may not replace another touches no memory that exists.
            let address = unsafe { libc::mmap(STAGE as *mut _, size, protection, flags, -1, 0) };
            assert_eq!(address as usize, STAGE as usize, "{}", std::io::Error::last_os_error());
            let arena = Arena;
            arena.put(CODE, &prologue());
            // mov rsp, [STAGE_RSP]; ret: in 64-bit code
            arena.put(WAY_BACK, &[&[0x48, 0x8b, 0x24, 0x25][..], &at(STAGE_RSP), &[0xc3]].concat());
            Mutex::new(arena)
        })
    }

    fn put(&self, address: u32, bytes: &[u8]) {
        assert!(address >= STAGE && address as usize + bytes.len() <= DATA as usize + DATA_SIZE);
        // SAFETY: the range lies in the mapping by the assertion, which is ours alone while the lock is held (or
        // before there is one), and no Rust object lives there.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
    }

    fn get(&self, address: u32, bytes: &mut [u8]) {
        assert!(address >= STAGE && address as usize + bytes.len() <= DATA as usize + DATA_SIZE);
        // SAFETY: as in `put`.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len()) }
    }

    fn dword(&self, address: u32) -> u32 {
        let mut bytes = [0; 4];
        self.get(address, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Runs one case; returns what it left.
    fn run(&self, case: &Case) -> Outcome {
        for (value, n) in case.gpr.iter().zip(0..) {
            self.put(STAGE + 4 * n, &value.to_le_bytes());
        }
        self.put(STAGE + STAGE_FLAGS, &(case.flags | 2).to_le_bytes());
        self.put(DATA, &case.memory);
        self.put(INSTRUCTION, &case.bytes);
        let end = INSTRUCTION + case.bytes.len() as u32;
        self.put(end, &epilogue(end));
        self.put(end + BRANCH, &epilogue(end + BRANCH));
        // SAFETY: the code is the prologue, one instruction of the templates and an epilogue, all written above; 32-bit
        // code can reach the mappings below 4 GiB alone, and the interpreter has found that this instruction stays
        // within the data. The trampoline saves what the calling convention wants saved, on a stack that the 32-bit
        // code has no pointer to.
        unsafe { umbra_native_run(STAGE as usize, CODE as usize) };
        let mut memory = vec![0; DATA_SIZE];
        self.get(DATA, &mut memory);
        Outcome {
            gpr: std::array::from_fn(|n| self.dword(STAGE + 4 * n as u32)),
            flags: self.dword(STAGE + STAGE_FLAGS),
            eip: self.dword(STAGE + STAGE_EIP),
            memory,
        }
    }
}

/// An offset in the stage as four bytes of address.
fn at(offset: u32) -> [u8; 4] {
    (STAGE + offset).to_le_bytes()
}

/// Loads the flags and all registers, and goes to the instruction.
fn prologue() -> Vec<u8> {
    // mov esp, STAGE_STACK; push [STAGE_FLAGS]; popfd
    let mut code = [&[0xbc][..], &at(STAGE_STACK), &[0xff, 0x35], &at(STAGE_FLAGS), &[0x9d]].concat();
    for register in 0..8_u8 {
        code.extend([0x8b, register << 3 | 5]);
        code.extend(at(4 * u32::from(register)));
    }
    let next = CODE + code.len() as u32 + 5;
    code.push(0xe9);
    code.extend((INSTRUCTION - next).to_le_bytes());
    code
}

/// Stores `eip`, all registers and the flags, and goes back.
fn epilogue(eip: u32) -> Vec<u8> {
    let mut code = [&[0xc7, 0x05][..], &at(STAGE_EIP), &eip.to_le_bytes()].concat();
    for register in 0..8_u8 {
        code.extend([0x89, register << 3 | 5]);
        code.extend(at(4 * u32::from(register)));
    }
    // mov esp, STAGE_STACK; pushfd; pop [STAGE_FLAGS]; jmp USER64_CODE:WAY_BACK
    code.extend([&[0xbc][..], &at(STAGE_STACK), &[0x9c, 0x8f, 0x05], &at(STAGE_FLAGS), &[0xea]].concat());
    code.extend(WAY_BACK.to_le_bytes());
    code.extend(USER64_CODE.to_le_bytes());
    code
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

    fn register(random: &mut Random) -> u8 {
        random.below(8) as u8
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

fn random_case(template: &Template, random: &mut Random) -> Case {
    let mut gpr = [0; 8].map(|_| random.value());
    let mut memory: Vec<u8> = (0..DATA_SIZE).map(|_| random.next() as u8).collect();
    gpr[4] = STACK + random.below(64);
    gpr[6] = DATA_MIDDLE;
    let mut flags = random.next() & FLAGS & !0x400;
    if template.string {
        gpr[7] = DATA_MIDDLE + random.below(64) - 32;
        gpr[1] = random.below(200);
        flags |= if random.below(2) == 0 { 0x400 } else { 0 };
    }
    let mut bytes = template.bytes(random);
    match template.opcode {
        [0xd7] => gpr[3] = DATA_MIDDLE,
        // The frame pointer of ENTER and LEAVE, and the room of ENTER.
        [0xc8] => {
            gpr[5] = STACK + random.below(256) - 128;
            let at = bytes.len() - 2;
            bytes[at] &= 1;
        }
        [0xc9] => gpr[5] = STACK + random.below(256),
        // POPF: arithmetic flags and ID, neither TF nor AC.
        [0x9d] => {
            let at = (gpr[4] - DATA) as usize;
            let popped = u32::from_le_bytes([0, 1, 2, 3].map(|n| memory[at + n])) & (FLAGS | 1 << 21);
            memory[at..at + 4].copy_from_slice(&popped.to_le_bytes());
        }
        _ => {}
    }
    if is_bit_string(template.opcode) {
        let at = bytes.len() - if bytes[bytes.len() - 2] >> 6 == 1 { 2 } else { 1 };
        // A bit index within the data, not in the base register.
        if bytes[at] >> 3 & 7 == 6 {
            bytes[at] &= !0x38;
        }
        gpr[usize::from(bytes[at] >> 3 & 7)] = random.below(16384).wrapping_sub(8192);
    }
    Case { bytes, gpr, flags, memory }
}

/// BT, BTS, BTR and BTC with a register index.
fn is_bit_string(opcode: &[u8]) -> bool {
    matches!(opcode, [0x0f, 0xa3 | 0xab | 0xb3 | 0xbb])
}

/// The arena, locked; None, said once a test, where this kernel has no 32-bit code segment.
fn arena() -> Option<std::sync::MutexGuard<'static, Arena>> {
    // SAFETY: LAR of a selector reads a descriptor's rights or clears ZF; it has no other effect.
    if unsafe { umbra_native_has_32_bit_code() } == 0 {
        println!("skipped: this kernel has no 32-bit user code segment");
        return None;
    }
    Some(Arena::shared().lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
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

/// Opcodes from `first` on, in a row.
const fn opcodes<const N: usize>(first: u8) -> [[u8; 1]; N] {
    let mut all = [[0]; N];
    let mut n = 0;
    while n < N {
        all[n][0] = first + n as u8;
        n += 1;
    }
    all
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
