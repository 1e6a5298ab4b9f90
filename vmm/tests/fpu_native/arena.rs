//! Where cases run natively: fixed mappings below 4 GiB, the way into 32-bit code and back, and what a fault there
//! comes to.

use std::sync::{Mutex, MutexGuard, OnceLock};

use umbra::cpu::fpu::IMAGE_BYTES;

use super::{Case, Outcome};

/// Registers in and out, and the way back: one page.
const STAGE: u32 = 0x1800_0000;
const STAGE_FLAGS: u32 = STAGE + 0x20;
/// The vector of a fault, and where it was.
const STAGE_VECTOR: u32 = STAGE + 0x24;
const STAGE_FAULT: u32 = STAGE + 0x28;
/// MXCSR as the calling convention has it.
const STAGE_MXCSR: u32 = STAGE + 0x2c;
/// The 64-bit stack pointer; the trampoline has its offset.
const STAGE_RSP: u32 = STAGE + 0x80;
const STAGE_IMAGE: u32 = STAGE + 0x200;
const STAGE_IMAGE_AFTER: u32 = STAGE + 0x400;
const STAGE_STACK: u32 = STAGE + 0x800;
/// The code page: prologue, the instruction, what follows it, and the way back into 64-bit code.
const CODE: u32 = STAGE + 0x1000;
pub const INSTRUCTION: u32 = CODE + 0x100;
const EPILOGUE: u32 = CODE + 0x400;
const WAY_BACK: u32 = CODE + 0x800;
/// What memory operands lie in.
pub const DATA: u32 = STAGE + 0x2000;
pub const DATA_SIZE: usize = 0x800;
/// Where memory operands point: so that 512 bytes there and displacements of a byte stay inside.
pub const DATA_MIDDLE: u32 = DATA + 0x200;

/// No fault.
const NONE: u32 = u32::MAX;

/// Selectors of Linux: 32-bit and 64-bit user code, user data.
pub const USER32_CODE: u16 = 0x23;
const USER64_CODE: u16 = 0x33;
pub const USER_DATA: u16 = 0x2b;

std::arch::global_asm!(
    ".globl umbra_fpu_native_run",
    "umbra_fpu_native_run:",
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
    ".globl umbra_fpu_native_has_32_bit_code",
    "umbra_fpu_native_has_32_bit_code:",
    "mov eax, 0x23",
    "lar eax, eax",
    "setz al",
    "movzx eax, al",
    "ret",
);

unsafe extern "C" {
    fn umbra_fpu_native_run(stage: usize, code: usize);
    fn umbra_fpu_native_has_32_bit_code() -> u32;
}

/// Stage, code and data: one mapping at its fixed address, made once.
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
            arena.put(EPILOGUE, &epilogue());
            // mov rsp, [STAGE_RSP]; ret: in 64-bit code
            let back = [&[0x48, 0x8b, 0x24, 0x25][..], &STAGE_RSP.to_le_bytes(), &[0xc3]].concat();
            arena.put(WAY_BACK, &back);
            arena.put(STAGE_MXCSR, &0x1f80_u32.to_le_bytes());
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
        self.put(STAGE_FLAGS, &(case.flags | 2).to_le_bytes());
        self.put(STAGE_VECTOR, &NONE.to_le_bytes());
        self.put(STAGE_IMAGE, &case.fpu.image());
        self.put(STAGE_IMAGE_AFTER, &[0; IMAGE_BYTES]);
        self.put(DATA, &case.memory);
        self.put(INSTRUCTION, &case.bytes);
        let end = INSTRUCTION + case.bytes.len() as u32;
        self.put(end, &jump(end, EPILOGUE));
        // SAFETY: the code is the prologue, one FPU instruction and an epilogue, all written above; 32-bit code can
        // reach the mappings below 4 GiB alone, and the case's registers keep the instruction's operands within the
        // data. A fault of it goes to `on_fault`, which goes on at the epilogue. The trampoline saves what the calling
        // convention wants saved, on a stack that the 32-bit code has no pointer to; the epilogue gives the FPU back
        // as the convention has it.
        unsafe { umbra_fpu_native_run(STAGE as usize, CODE as usize) };
        let vector = self.dword(STAGE_VECTOR);
        let at = self.dword(STAGE_FAULT);
        assert!(vector == NONE || at == INSTRUCTION, "vector {vector} at {at:#x}: {:02x?}", case.bytes);
        let mut memory = vec![0; DATA_SIZE];
        self.get(DATA, &mut memory);
        let mut image = [0; IMAGE_BYTES];
        self.get(STAGE_IMAGE_AFTER, &mut image);
        Outcome {
            vector: (vector != NONE).then_some(vector as u8),
            gpr: std::array::from_fn(|n| self.dword(STAGE + 4 * n as u32)),
            flags: self.dword(STAGE_FLAGS),
            image,
            memory,
        }
    }
}

fn jump(from: u32, to: u32) -> Vec<u8> {
    [&[0xe9][..], &to.wrapping_sub(from + 5).to_le_bytes()].concat()
}

/// Loads flags, FPU and all registers, and goes to the instruction.
fn prologue() -> Vec<u8> {
    // mov esp, STAGE_STACK; push [STAGE_FLAGS]; popfd; fxrstor [STAGE_IMAGE]
    let mut code =
        [&[0xbc][..], &STAGE_STACK.to_le_bytes(), &[0xff, 0x35], &STAGE_FLAGS.to_le_bytes()].concat();
    code.extend([&[0x9d, 0x0f, 0xae, 0x0d][..], &STAGE_IMAGE.to_le_bytes()].concat());
    for register in 0..8_u8 {
        code.extend([0x8b, register << 3 | 5]);
        code.extend((STAGE + 4 * u32::from(register)).to_le_bytes());
    }
    let from = CODE + code.len() as u32;
    code.extend(jump(from, INSTRUCTION));
    code
}

/// Stores all registers, the FPU and the flags, makes the FPU the calling convention's, and goes back.
fn epilogue() -> Vec<u8> {
    let mut code = Vec::new();
    for register in 0..8_u8 {
        code.extend([0x89, register << 3 | 5]);
        code.extend((STAGE + 4 * u32::from(register)).to_le_bytes());
    }
    // fxsave [STAGE_IMAGE_AFTER]; mov esp, STAGE_STACK; pushfd; pop [STAGE_FLAGS]; push 2; popfd
    code.extend([&[0x0f, 0xae, 0x05][..], &STAGE_IMAGE_AFTER.to_le_bytes()].concat());
    code.extend([&[0xbc][..], &STAGE_STACK.to_le_bytes(), &[0x9c, 0x8f, 0x05]].concat());
    code.extend([&STAGE_FLAGS.to_le_bytes()[..], &[0x6a, 2, 0x9d]].concat());
    // fninit; ldmxcsr [STAGE_MXCSR]; jmp USER64_CODE:WAY_BACK
    code.extend([&[0xdb, 0xe3, 0x0f, 0xae, 0x15][..], &STAGE_MXCSR.to_le_bytes(), &[0xea]].concat());
    code.extend(WAY_BACK.to_le_bytes());
    code.extend(USER64_CODE.to_le_bytes());
    code
}

/// A fault of the instruction: notes it and goes on at the epilogue. Any other is the process's end.
extern "C" fn on_fault(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel calls this with the context of the fault, valid and unshared until the handler returns. The
    // stage is mapped, since code there is what faulted; nobody else touches it meanwhile. `signal` with the default
    // action may be called in a handler.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize];
        let ours = (i64::from(CODE)..i64::from(DATA)).contains(&rip);
        if !ours || rip >= i64::from(EPILOGUE) {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        (STAGE_VECTOR as *mut u32).write_volatile(registers[libc::REG_TRAPNO as usize] as u32);
        (STAGE_FAULT as *mut u32).write_volatile(rip as u32);
        registers[libc::REG_RIP as usize] = EPILOGUE.into();
    }
}

/// Sends faults of this thread to `on_fault`, on a stack of their own.
fn catch_faults() {
    const STACK_BYTES: usize = 1 << 17;
    let stack = Box::leak(vec![0_u8; STACK_BYTES].into_boxed_slice());
    let alternate = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK_BYTES };
    // SAFETY: the stack is leaked, so it outlives the thread. `sigaction` is plain data, all zeros being valid, and the
    // handler has the signature that SA_SIGINFO asks for and is safe to run at any point of the arena's code.
    unsafe {
        assert_eq!(libc::sigaltstack(&raw const alternate, std::ptr::null_mut()), 0);
        for signal in [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGBUS] {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fault as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            assert_eq!(libc::sigaction(signal, &raw const action, std::ptr::null_mut()), 0);
        }
    }
}

/// The arena, locked; None, said once a test, where this kernel has no 32-bit code segment.
pub fn arena() -> Option<MutexGuard<'static, Arena>> {
    // SAFETY: LAR of a selector reads a descriptor's rights or clears ZF; it has no other effect.
    if unsafe { umbra_fpu_native_has_32_bit_code() } == 0 {
        println!("skipped: this kernel has no 32-bit user code segment");
        return None;
    }
    catch_faults();
    Some(Arena::shared().lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
}
