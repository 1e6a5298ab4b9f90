//! The native side: a child process that runs cases in 32-bit compatibility mode.
//!
//! Story: [`Worker::run`] writes a batch of cases into memory that it shares with the child and one byte into a pipe.
//! For each case the child copies code and memory to their places below 4 GiB, and enters 32-bit code by IRET into
//! the stage, which loads all registers and jumps to the case. Every case ends in a signal (its code stands in a sea
//! of INT3): the handler, on a stack of its own, keeps what the kernel says of registers, vector, error code and CR2,
//! and goes back to where the case was entered. A second byte says that the batch is done.
//!
//! Holds:
//! - Random bytes reach no system call: a seccomp filter turns every one by 32-bit code into a signal, and lets the
//!   child's own 64-bit code read, write, set its LDT and its FS base, return from signals and exit; it has two
//!   pipes and no other file.
//! - 32-bit code can write nothing but the data pages: all else that it can address is read-only.
//! - Between the entry of a case and the end of the handler no code runs that needs FS, DS, ES or a 64-bit register
//!   to survive.
//! - The child allocates nothing and takes no lock: it was forked off a process with threads.
//!
//! Limits: what a case has done when it loops for ever is judged by processor time.

use std::arch::global_asm;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use umbra::cpu::Seg;

use super::case::{Case, ENDLESS, Outcome, SYSTEM_CALL};
use super::layout::*;
use super::segments::Ldt;

/// The most cases of one batch.
pub const BATCH_MAX: usize = 64;
/// The most bytes of code of one case.
pub const CODE_MAX: usize = 512;
const SIGNAL_STACK_SIZE: usize = 64 << 10;
/// A case that runs from one tick of processor time to the second next is an endless one.
const TICK_MICROSECONDS: libc::suseconds_t = 30_000;

/// The segment registers in the order of the stage.
const STAGE_SEGMENTS: [Seg; 6] = [Seg::Cs, Seg::Es, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];

/// What the handler keeps. The assembly knows the offsets.
#[repr(C)]
struct Raw {
    signal: u32,
    ds: u32,
    es: u32,
    fs: u32,
    gs: u32,
    unused: u32,
    /// The kernel's `gregs`.
    registers: [u64; 23],
}

#[repr(C)]
struct Slot {
    /// GPRs, EIP, CS, ES, SS, DS, FS, GS: as the stage loads them; then flags.
    stage: [u32; 16],
    code_at: u32,
    code_length: u32,
    code: [u8; CODE_MAX],
    memory: [u8; DATA_SIZE],
    raw: Raw,
}

/// The memory that both processes see, page by page.
#[repr(C)]
struct Shared {
    stage: [u8; PAGE],
    code: [u8; CODE_SIZE],
    data: [u8; DATA_SIZE],
    count: u32,
    current: u32,
    /// Set: the child has to install `ldt` first.
    new_ldt: u32,
    ldt: [[u32; 4]; LDT_ENTRIES],
    slots: [Slot; BATCH_MAX],
}

/// What the assembly keeps for itself.
#[repr(C)]
struct Anchor {
    /// The stack to come back to.
    rsp: u64,
    fs_base: u64,
    raw: u64,
    /// Cases entered, and their number at the last tick.
    entered: u64,
    ticked: u64,
}

global_asm!(
    ".pushsection .bss",
    ".balign 8",
    ".globl umbra_native_anchor",
    "umbra_native_anchor: .skip 40",
    ".popsection",
    // fn(raw, flags): runs the case that stands ready; comes back through the handler.
    ".globl umbra_native_enter",
    "umbra_native_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "lea rax, [rip + umbra_native_anchor]",
    "mov [rax], rsp",
    "mov [rax + 16], rdi",
    "inc qword ptr [rax + 24]",
    "mov eax, 0x2b",
    "push rax", // SS
    "push 0",   // RSP
    "push rsi", // flags
    "push 0x23",
    "push {stage}",
    "iretq",
    // The handler of every signal: (number, siginfo, ucontext).
    ".globl umbra_native_signal",
    "umbra_native_signal:",
    "lea rax, [rip + umbra_native_anchor]",
    "movzx ecx, word ptr [rdx + 40 + 8 * 18]", // CS
    "cmp edi, {tick}",
    "je 3f",
    "cmp ecx, {user64}",
    "jne 2f",
    // Our own code has faulted: exit_group.
    "mov edi, 99",
    "mov eax, 231",
    "syscall",
    "2:",
    "mov rbx, [rax + 16]",
    "mov [rbx], edi",
    "mov ecx, ds",
    "mov [rbx + 4], ecx",
    "mov ecx, es",
    "mov [rbx + 8], ecx",
    "mov ecx, fs",
    "mov [rbx + 12], ecx",
    "mov ecx, gs",
    "mov [rbx + 16], ecx",
    "lea rsi, [rdx + 40]",
    "lea rdi, [rbx + 24]",
    "mov ecx, 23",
    "cld",
    "rep movsq",
    "mov rsp, [rax]",
    "mov rsi, [rax + 8]",
    "push 0x202", // no AC, no NT
    "popfq",
    "mov edi, 0x1002", // ARCH_SET_FS
    "mov eax, 158",
    "syscall",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    "3:",
    "cmp ecx, {user64}",
    "je 4f",
    "mov rcx, [rax + 24]",
    "cmp rcx, [rax + 32]",
    "je 2b",
    "mov [rax + 32], rcx",
    "4:",
    "ret",
    stage = const STAGE,
    tick = const libc::SIGVTALRM,
    user64 = const USER64_CODE,
);

unsafe extern "C" {
    static mut umbra_native_anchor: Anchor;
    fn umbra_native_enter(raw: *mut Raw, flags: u64);
    fn umbra_native_signal();
}

/// The stage's code, 32 bits: loads what stands at [`STAGE_STATE`]. Flags were loaded on the way in.
fn stage_code() -> Vec<u8> {
    let at = |index: u32| (STAGE + STAGE_STATE + 4 * index).to_le_bytes();
    let mut code = Vec::new();
    let mut load = |opcode: u8, reg: u8, index: u32| {
        code.extend([0x2e, opcode, reg << 3 | 5]);
        code.extend(at(index));
    };
    // mov es, fs, gs and ss, then the general registers (ESP right behind SS), then ds
    for (reg, index) in [(0, 10), (4, 13), (5, 14), (2, 11)] {
        load(0x8e, reg, index);
    }
    for reg in [4, 0, 1, 2, 3, 5, 6, 7] {
        load(0x8b, reg, reg.into());
    }
    load(0x8e, 3, 12);
    // jmp far [eip, cs]
    load(0xff, 5, 8);
    code
}

/// A child process and what is shared with it.
pub struct Worker {
    shared: *mut Shared,
    memory: OwnedFd,
    child: Option<Child>,
    ldt: Option<Ldt>,
}

struct Child {
    pid: libc::pid_t,
    to: File,
    from: File,
}

/// Fails the test with the last system error where a call has failed.
fn check(result: libc::c_int, what: &str) -> libc::c_int {
    assert!(result >= 0, "{what}: {}", std::io::Error::last_os_error());
    result
}

fn pipe() -> [OwnedFd; 2] {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for the two descriptors that the call writes.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, "pipe");
    // SAFETY: the call has just made both, and nobody else has them.
    ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Worker {
    pub fn new() -> Worker {
        let size = size_of::<Shared>().next_multiple_of(PAGE);
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"umbra-native".as_ptr(), libc::MFD_CLOEXEC) };
        check(fd, "memfd_create");
        // SAFETY: the call has just made it, and nobody else has it.
        let memory = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the descriptor is a file of ours.
        check(unsafe { libc::ftruncate(fd, size as libc::off_t) }, "ftruncate");
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a mapping at an address of the kernel's choice touches no memory that exists.
        let shared = unsafe { libc::mmap(ptr::null_mut(), size, protection, libc::MAP_SHARED, fd, 0) };
        assert_ne!(shared, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let shared = shared.cast::<Shared>();
        let code = stage_code();
        // SAFETY: the mapping is as large as `Shared`, zeroed memory is a valid one, and no child exists yet.
        let layout = unsafe { &mut *shared };
        layout.stage[..code.len()].copy_from_slice(&code);
        layout.code.fill(CODE_FILLER);
        Worker { shared, memory, child: None, ldt: None }
    }

    fn start(&mut self) -> &mut Child {
        let ([theirs_in, ours_to], [ours_from, theirs_out]) = (pipe(), pipe());
        let stack = vec![0_u8; SIGNAL_STACK_SIZE];
        // The child has copies of all this, and only calls `serve`.
        let (shared, memory) = (self.shared, self.memory.as_raw_fd());
        // SAFETY: in the child, `serve` makes system calls and touches memory of its own and the shared one; it
        // neither allocates nor takes a lock that another thread could have held at the fork, and never returns.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            serve(shared, memory, [theirs_in.as_raw_fd(), theirs_out.as_raw_fd()], &stack);
        }
        check(pid, "fork");
        self.ldt = None;
        self.child.insert(Child { pid, to: ours_to.into(), from: ours_from.into() })
    }

    /// Runs a batch. None stands for a case that has killed the child.
    pub fn run(&mut self, ldt: &Ldt, cases: &[Case]) -> Vec<Option<Outcome>> {
        let mut outcomes = Vec::with_capacity(cases.len());
        while outcomes.len() < cases.len() {
            let rest = &cases[outcomes.len()..];
            let rest = &rest[..rest.len().min(BATCH_MAX)];
            let done = self.run_batch(ldt, rest);
            // SAFETY: the child has said that it is done, or is dead: nobody else touches the memory.
            let shared = unsafe { &*self.shared };
            outcomes.extend(shared.slots.iter().take(done).map(|slot| Some(slot.outcome())));
            if done < rest.len() {
                outcomes.push(None);
            }
        }
        outcomes
    }

    /// Returns how many cases the child has survived.
    fn run_batch(&mut self, ldt: &Ldt, cases: &[Case]) -> usize {
        if self.child.is_none() {
            self.start();
        }
        // SAFETY: the child waits at its pipe: nobody else touches the memory.
        let shared = unsafe { &mut *self.shared };
        for (slot, case) in shared.slots.iter_mut().zip(cases) {
            slot.set(case);
        }
        (shared.count, shared.current) = (cases.len() as u32, 0);
        shared.new_ldt = u32::from(self.ldt.as_ref() != Some(ldt));
        for (n, (slot, entry)) in shared.ldt.iter_mut().zip(&ldt.0).enumerate() {
            *slot = entry.user_desc(n as u32);
        }
        self.ldt = Some(ldt.clone());
        let child = self.child.as_mut().expect("started above");
        let alive = child.to.write_all(&[1]).is_ok() && child.from.read_exact(&mut [0]).is_ok();
        if alive {
            return cases.len();
        }
        let status = self.reap();
        // SAFETY: the child is dead.
        let done = unsafe { (*self.shared).current } as usize;
        println!("the native child died of case {done} of its batch, status {status:#x}");
        done
    }

    fn reap(&mut self) -> libc::c_int {
        let mut status = 0;
        if let Some(child) = self.child.take() {
            let pid = child.pid;
            drop(child);
            // SAFETY: the child is ours and has not been waited for; `status` is an integer of ours.
            unsafe { libc::waitpid(pid, &mut status, 0) };
        }
        status
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Its pipe closed, the child exits.
        self.reap();
        // SAFETY: the mapping was made in `new` with this size; no reference to it is left.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Shared>().next_multiple_of(PAGE)) };
    }
}

impl Slot {
    fn set(&mut self, case: &Case) {
        let start = &case.start;
        self.stage[..8].copy_from_slice(&start.gpr);
        self.stage[8] = start.eip;
        for (slot, seg) in self.stage[9..15].iter_mut().zip(STAGE_SEGMENTS) {
            *slot = start.selectors[seg as usize].into();
        }
        self.stage[15] = start.flags | 0x202;
        (self.code_at, self.code_length) = (case.at, case.code.len() as u32);
        self.code[..case.code.len()].copy_from_slice(&case.code);
        case.memory(&mut self.memory);
    }

    fn outcome(&self) -> Outcome {
        let raw = &self.raw;
        let register = |n: libc::c_int| raw.registers[n as usize] as u32;
        let segments = raw.registers[libc::REG_CSGSFS as usize];
        let trap = register(libc::REG_TRAPNO);
        let vector = match raw.signal as libc::c_int {
            libc::SIGSYS => SYSTEM_CALL,
            libc::SIGVTALRM => ENDLESS,
            _ => trap,
        };
        let (cs, ss) = (segments as u16, (segments >> 48) as u16);
        let selectors = [raw.es as u16, cs, ss, raw.ds as u16, raw.fs as u16, raw.gs as u16];
        use libc::{REG_RAX, REG_RBP, REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RSI, REG_RSP};
        let gpr = [REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI].map(register);
        Outcome {
            vector,
            error: if vector == trap { register(libc::REG_ERR) } else { 0 },
            cr2: (vector == 14).then(|| register(libc::REG_CR2)),
            gpr,
            eip: register(libc::REG_RIP),
            flags: register(libc::REG_EFL),
            selectors,
            memory: Box::new(self.memory),
        }
    }
}

/// The child's life. It must not panic: it says by its exit status what went wrong.
fn serve(shared: *mut Shared, memory: RawFd, pipes: [RawFd; 2], signal_stack: &[u8]) -> ! {
    // SAFETY: see each function; the process has this one thread, and the shared mapping is the parent's, inherited.
    unsafe {
        map_low(memory);
        set_signals(signal_stack);
        libc::dup2(pipes[0], 0);
        libc::dup2(pipes[1], 1);
        libc::syscall(libc::SYS_close_range, 2, u32::MAX, 0);
        libc::syscall(libc::SYS_arch_prctl, 0x1003, &raw mut umbra_native_anchor.fs_base); // ARCH_GET_FS
        let tick = libc::timeval { tv_sec: 0, tv_usec: TICK_MICROSECONDS };
        let timer = libc::itimerval { it_interval: tick, it_value: tick };
        libc::setitimer(libc::ITIMER_VIRTUAL, &timer, ptr::null_mut());
        restrict_system_calls();
        let mut byte = 0_u8;
        while libc::read(0, (&raw mut byte).cast(), 1) == 1 {
            run_slots(shared);
            libc::write(1, (&raw const byte).cast(), 1);
        }
        exit(0)
    }
}

fn exit(status: libc::c_int) -> ! {
    // SAFETY: it ends the process, running nothing.
    unsafe { libc::_exit(status) }
}

/// Maps the pages of [`Shared`] that 32-bit code sees to their places.
///
/// # Safety
/// Nothing that is in use may lie below 4 GiB; `memory` is the file behind the shared mapping.
unsafe fn map_low(memory: RawFd) {
    let read = libc::PROT_READ;
    let (execute, write) = (read | libc::PROT_EXEC, read | libc::PROT_WRITE);
    let code = std::mem::offset_of!(Shared, code);
    let data = std::mem::offset_of!(Shared, data);
    let writable = (DATA_READ_ONLY - DATA) as usize;
    for (address, size, protection, offset) in [
        (STAGE, PAGE, execute, 0),
        (CODE, CODE_SIZE, execute, code),
        (DATA, writable, write, data),
        (DATA_READ_ONLY, DATA_SIZE - writable, read, data + writable),
    ] {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
        let (at, offset) = (address as *mut libc::c_void, offset as libc::off_t);
        // SAFETY: the mapping replaces nothing.
        let mapped = unsafe { libc::mmap(at, size, protection, flags, memory, offset) };
        if mapped != at {
            exit(90);
        }
    }
}

/// Has every signal that a case can end in handled on `stack`.
///
/// # Safety
/// `stack` must stay for ever.
unsafe fn set_signals(stack: &[u8]) {
    let stack = libc::stack_t { ss_sp: stack.as_ptr() as *mut _, ss_flags: 0, ss_size: stack.len() };
    // SAFETY: both structures are whole, and the handler is one of three arguments, as SA_SIGINFO wants it. It leaves
    // the signal stack for good, which SA_NODEFER and an empty mask allow.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = umbra_native_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        let mut failed = libc::sigaltstack(&stack, ptr::null_mut());
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGSYS,
            libc::SIGVTALRM,
        ] {
            failed |= libc::sigaction(signal, &action, ptr::null_mut());
        }
        if failed != 0 {
            exit(91);
        }
    }
}

/// The filter: system calls of 32-bit code are signals, 64-bit code has the few that this file makes.
fn restrict_system_calls() {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const ALLOWED: [libc::c_long; 6] = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_rt_sigreturn,
        libc::SYS_modify_ldt,
        libc::SYS_arch_prctl,
        libc::SYS_exit_group,
    ];
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let calls = ALLOWED.len() as u8;
    let mut filter = [step(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0); ALLOWED.len() + 6];
    // seccomp_data: number at 0, architecture at 4.
    filter[0] = step(LOAD, 4, 0, 0);
    filter[1] = step(IF_EQUAL, AUDIT_ARCH_X86_64, 0, calls + 3);
    filter[2] = step(LOAD, 0, 0, 0);
    for (n, call) in ALLOWED.iter().enumerate() {
        filter[3 + n] = step(IF_EQUAL, *call as u32, calls - n as u8, 0);
    }
    // filter[3 + calls] kills
    filter[4 + ALLOWED.len()] = step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0);
    filter[5 + ALLOWED.len()] = step(RETURN, libc::SECCOMP_RET_TRAP, 0, 0);
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter are whole and outlive the calls.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    if failed != 0 {
        exit(92);
    }
}

/// Runs the cases that stand in the shared memory.
///
/// # Safety
/// The parent must wait meanwhile, the low mappings and the signals must stand.
unsafe fn run_slots(shared: *mut Shared) {
    // SAFETY: the mapping holds a `Shared`, and the parent does not touch it. The low mappings are other names of
    // its first fields, which no reference covers.
    unsafe {
        if (*shared).new_ldt != 0 {
            for entry in &(*shared).ldt {
                if libc::syscall(libc::SYS_modify_ldt, 0x11, entry.as_ptr(), 16) != 0 {
                    exit(93);
                }
            }
        }
        let stage = (&raw mut (*shared).stage).cast::<u8>().add(STAGE_STATE as usize);
        let code = (&raw mut (*shared).code).cast::<u8>();
        let data = (&raw mut (*shared).data).cast::<u8>();
        while (*shared).current < (*shared).count {
            let slot = &raw mut (*shared).slots[(*shared).current as usize];
            ptr::copy_nonoverlapping((&raw const (*slot).stage).cast(), stage, 64);
            let (at, length) = (code.add((*slot).code_at as usize), (*slot).code_length as usize);
            ptr::copy_nonoverlapping((&raw const (*slot).code).cast(), at, length);
            ptr::copy_nonoverlapping((&raw const (*slot).memory).cast(), data, DATA_SIZE);
            umbra_native_enter(&raw mut (*slot).raw, (*slot).stage[15].into());
            ptr::copy_nonoverlapping(data, (&raw mut (*slot).memory).cast(), DATA_SIZE);
            ptr::write_bytes(at, CODE_FILLER, length);
            (*shared).current += 1;
        }
    }
}
