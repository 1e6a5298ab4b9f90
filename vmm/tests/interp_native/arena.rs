//! Where cases run: fixed mappings below 4 GiB, the way into 32-bit code and back.

use std::sync::{Mutex, MutexGuard, OnceLock};

use super::{Case, Outcome};

/// Registers in and out, and the way back: one page.
const STAGE: u32 = 0x1000_0000;
/// The code page: prologue, [`INSTRUCTION`] with its epilogues, and the way back into 64-bit code.
const CODE: u32 = 0x1000_1000;
pub const INSTRUCTION: u32 = CODE + 0x100;
const WAY_BACK: u32 = CODE + 0x800;
/// What memory operands and the stack lie in.
pub const DATA: u32 = 0x1000_2000;
const PAGE: usize = 4096;
pub const DATA_SIZE: usize = 3 * PAGE;
/// Where memory operands point: the middle of the data, so that displacements of a byte stay inside.
pub const DATA_MIDDLE: u32 = DATA + (DATA_SIZE / 2) as u32;
pub const STACK: u32 = DATA + 0x800;
/// Where taken branches land, behind the instruction.
pub const BRANCH: u32 = 0x60;
/// Offsets in the stage: flags, EIP and the 64-bit stack pointer, after the registers.
const STAGE_FLAGS: u32 = 0x20;
const STAGE_EIP: u32 = 0x24;
const STAGE_RSP: u32 = 0x80;
const STAGE_STACK: u32 = 0x800;

/// Selectors of Linux: 32-bit and 64-bit user code, user data.
pub const USER32_CODE: u16 = 0x23;
const USER64_CODE: u16 = 0x33;
pub const USER_DATA: u16 = 0x2b;

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
pub struct Arena;

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
    pub fn run(&self, case: &Case) -> Outcome {
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

/// The arena, locked; None, said once a test, where this kernel has no 32-bit code segment.
pub fn arena() -> Option<MutexGuard<'static, Arena>> {
    // SAFETY: LAR of a selector reads a descriptor's rights or clears ZF; it has no other effect.
    if unsafe { umbra_native_has_32_bit_code() } == 0 {
        println!("skipped: this kernel has no 32-bit user code segment");
        return None;
    }
    Some(Arena::shared().lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
}
