//! Entering and leaving the guest: traps, state, kicks, flushes, shootdown, two vCPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use umbra::cpu::{CpuState, Seg, Segment, cr0, eflags};
use umbra::kvm::descriptors::decode;
use umbra::kvm::shootdown::Notifier;
use umbra::kvm::{CannotRun, Host, KvmError, KvmExit, KvmVm, Options, Stop};
use umbra::machine::Pool;
use umbra::probe::scratch::*;
use umbra::probe::watchdog::Watchdog;
use umbra_mmu::coherence::Removals;
use umbra_mmu::{Gva, Mfn, Mpa};

use crate::Body;

/// Every test.
pub const TESTS: &[(&str, Body)] = &[
    ("kvm_each_kind_of_trap_has_its_vector", each_kind_of_trap),
    ("kvm_registers_survive_a_trap", registers_survive),
    ("kvm_registers_changed_by_code_are_seen", registers_change),
    ("kvm_flags_of_the_vmm_are_kept", virtual_flags),
    ("kvm_data_segments_loaded_by_code_are_the_guests", data_segments),
    ("kvm_code_segment_changed_by_a_far_jump_is_the_guests", code_segment),
    ("kvm_stale_stack_segment_reloads_by_a_trap", stale_stack),
    ("kvm_return_from_kernel_to_user_traps", return_to_user),
    ("kvm_ldt_is_the_guests_translated", ldt),
    ("kvm_page_fault_is_repaired_and_goes_on", page_fault),
    ("kvm_single_step_traps_after_one_instruction", single_step),
    ("kvm_state_that_cannot_run_is_refused", cannot_run),
    ("kvm_translation_to_no_memory_is_an_error_with_a_dump", hole),
    ("kvm_pool_too_small_is_an_error", small_pool),
    ("kvm_vcpu_beyond_the_number_is_an_error", no_such_vcpu),
    ("kvm_kick_before_the_entry_changes_nothing", kick_before),
    ("kvm_kick_in_a_loop_leaves_it_exactly", kick_in_loop),
    ("kvm_kicks_under_traps_lose_and_repeat_nothing", kicks_under_traps),
    ("kvm_kicks_under_page_faults_lose_nothing", kicks_under_faults),
    ("kvm_flush_makes_a_new_translation_seen", flush),
    ("kvm_flushes_under_kicks_report_them", flush_under_kicks),
    ("kvm_another_root_is_seen_at_once", other_root),
    ("kvm_notifier_drops_one_frame_everywhere", notifier_one),
    ("kvm_notifier_drops_everything", notifier_all),
    ("kvm_two_vcpus_count_exactly", two_vcpus),
    ("kvm_watchdog_ends_a_guest_that_never_leaves", watchdog),
    ("kvm_fpu_stays_with_the_vcpu", fpu),
];

type Test = Result<(), String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn guest(host: &Host) -> Result<Scratch, String> {
    Scratch::new(host, Options::default()).map_err(text)
}

macro_rules! check {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err(format!("{}:{}: {}", file!(), line!(), format!($($what)+)));
        }
    };
}

/// Enters; a guest that does not leave within seconds fails the test.
fn enter(scratch: &mut Scratch) -> Result<KvmExit, String> {
    let watchdog = Watchdog::new(Duration::from_secs(10));
    watchdog.watch("a test", scratch.vcpu.kicker());
    scratch.enter().map_err(text)
}

fn run(scratch: &mut Scratch, code: &[u8]) -> Result<KvmExit, String> {
    scratch.load(code, true).map_err(text)?;
    enter(scratch)
}

fn trapped(exit: KvmExit, vector: u8, error: u32) -> bool {
    matches!(exit, KvmExit::Trap { vector: v, error: e, .. } if (v, e) == (vector, error))
}

/// Whatever a host makes of `hlt` and its like: #GP(0) everywhere so far.
fn halted(exit: KvmExit) -> bool {
    trapped(exit, 13, 0)
}

const ABSENT: Gva = Gva(0x40_0000);
const HLT: u8 = 0xf4;

fn each_kind_of_trap(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    /// Its name and code, the vectors and error codes that hosts give for it, and how far EIP has gone.
    type Case = (&'static str, &'static [u8], &'static [(u8, u32)], u32);
    let cases: &[Case] = &[
        ("hlt", &[0xf4], &[(13, 0)], 0),
        ("cli", &[0xfa], &[(13, 0)], 0),
        ("sti", &[0xfb], &[(13, 0)], 0),
        ("mov eax, cr0", &[0x0f, 0x20, 0xc0], &[(13, 0)], 0),
        ("mov cr3, eax", &[0x0f, 0x22, 0xd8], &[(13, 0)], 0),
        ("invlpg [esi]", &[0x0f, 0x01, 0x3e], &[(13, 0)], 0),
        ("lgdt [esi]", &[0x0f, 0x01, 0x16], &[(13, 0)], 0),
        ("lidt [esi]", &[0x0f, 0x01, 0x1e], &[(13, 0)], 0),
        ("wrmsr", &[0x0f, 0x30], &[(13, 0)], 0),
        ("in al, 0x60", &[0xe4, 0x60], &[(13, 0)], 0),
        ("out 0x80, al", &[0xe6, 0x80], &[(13, 0)], 0),
        ("out 0xf0, al: the firmware's own port", &[0xe6, 0xf0], &[(13, 0)], 0),
        ("ud2", &[0x0f, 0x0b], &[(6, 0)], 0),
        ("div ecx, ECX 0", &[0xf7, 0xf1], &[(0, 0)], 0),
        ("mov ds, 0x08: kernel's", &[0xb8, 8, 0, 0, 0, 0x8e, 0xd8], &[(13, 8)], 5),
        ("mov ds, 0x7f8: beyond the table", &[0xb8, 0xf8, 7, 0, 0, 0x8e, 0xd8], &[(13, 0x7f8)], 5),
        // Silicon says vector * 8 + 2, TCG vector * 16 + 2, an emulator #UD.
        ("int 0x80", &[0xcd, 0x80], &[(13, 0x402), (13, 0x802), (6, 0)], 0),
        ("int3", &[0xcc], &[(13, 0x1a), (13, 0x32), (6, 0)], 0),
        ("read absent", &[0xa1, 0, 0, 0x40, 0], &[(14, 4)], 0),
        ("write absent", &[0xa3, 0, 0, 0x40, 0], &[(14, 6)], 0),
    ];
    for (name, code, wanted, gone) in cases {
        let exit = run(&mut scratch, code)?;
        let met = wanted.iter().any(|&(vector, error)| trapped(exit, vector, error));
        check!(met && scratch.cpu.eip == CODE.0 + gone, "{name}: {exit:x?} at {:#x}", scratch.cpu.eip);
    }
    let exit = run(&mut scratch, &[0xa1, 0x34, 0x12, 0x40, 0])?;
    check!(matches!(exit, KvmExit::Trap { cr2: 0x40_1234, .. }), "CR2: {exit:x?}");
    scratch.load(&[], true).map_err(text)?;
    scratch.cpu.eip = ABSENT.0;
    let exit = enter(&mut scratch)?;
    check!(trapped(exit, 14, 0x14), "fetch from an absent page: {exit:x?}");
    scratch.space.map(ABSENT, scratch.data, ALL | NO_EXECUTE).map_err(text)?;
    let exit = enter(&mut scratch)?;
    check!(trapped(exit, 14, 0x15), "fetch from an NX page: {exit:x?}");
    Ok(())
}

fn registers_survive(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    for user in [true, false] {
        scratch.load(&[HLT], user).map_err(text)?;
        scratch.cpu.gpr = [0xdead_beef, 1, 0x8000_0000, u32::MAX, STACK_END.0, 5, 6, 7];
        scratch.cpu.eflags = eflags::FIXED | eflags::CF | eflags::OF | eflags::DF | eflags::SF | eflags::IF;
        scratch.cpu.cr2 = 0x1234;
        let before = scratch.cpu.clone();
        let exit = enter(&mut scratch)?;
        // The CPU saves RF with a fault, so that returning to it does not break again.
        scratch.cpu.eflags &= !eflags::RF;
        check!(halted(exit), "user {user}: {exit:?}");
        check!(scratch.cpu == before, "user {user}: {:x?}\nwas {before:x?}", scratch.cpu);
    }
    Ok(())
}

fn registers_change(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // inc eax; xchg ecx, edx; push ebx; add esi, esi (sets CF); std; hlt
    let exit = {
        scratch.load(&[0x40, 0x87, 0xca, 0x53, 0x01, 0xf6, 0xfd, HLT], true).map_err(text)?;
        scratch.cpu.gpr = [u32::MAX, 1, 2, 3, STACK_END.0, 5, 0x8000_0000, 7];
        enter(&mut scratch)?
    };
    let cpu = &scratch.cpu;
    check!(halted(exit), "{exit:?}");
    check!(cpu.gpr == [0, 2, 1, 3, STACK_END.0 - 4, 5, 0, 7], "{:x?}", cpu.gpr);
    check!(cpu.eip == CODE.0 + 7, "{:#x}", cpu.eip);
    let set = cpu.eflags & (eflags::CF | eflags::ZF | eflags::DF | eflags::SF);
    check!(set == eflags::CF | eflags::ZF | eflags::DF, "{:#x}", cpu.eflags);
    Ok(())
}

fn virtual_flags(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    for own in [0, eflags::IF, eflags::IOPL, eflags::IF | eflags::IOPL] {
        // pushf; pop eax; or eax, IF | IOPL; push eax; popf; hlt: POPF at CPL 3 changes neither.
        let code = [0x9c, 0x58, 0x0d, 0x00, 0x32, 0, 0, 0x50, 0x9d, HLT];
        scratch.load(&code, true).map_err(text)?;
        scratch.cpu.eflags = eflags::FIXED | own;
        let exit = enter(&mut scratch)?;
        let now = scratch.cpu.eflags & (eflags::IF | eflags::IOPL | eflags::VM);
        check!(halted(exit) && now == own, "{own:#x}: {:#x} {exit:?}", scratch.cpu.eflags);
    }
    Ok(())
}

/// A writable data segment with DPL `dpl`, base 0x0020_0000 (the data page) and limit 0xfff.
fn small_data(dpl: u64) -> u64 {
    0x0040_9220_0000_0fff | dpl << 45
}

fn data_segments(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    let gdt = [&GDT[..], &[small_data(0), small_data(3)]].concat();
    scratch.set_gdt(&gdt).map_err(text)?;
    for (user, selector) in [(true, 0x33u16), (true, 0x30), (false, 0x28), (false, 0x30)] {
        let [low, high] = selector.to_le_bytes();
        // mov eax, selector; mov fs, eax; mov dword fs:[8], 7; xor eax, eax; mov gs, eax; hlt
        let code = [
            &[0xb8, low, high, 0, 0, 0x8e, 0xe0][..],
            &[0x64, 0xc7, 0x05, 8, 0, 0, 0, 7, 0, 0, 0],
            &[0x31, 0xc0, 0x8e, 0xe8, HLT],
        ]
        .concat();
        scratch.space.pool().store(scratch.data.at(8), 0).map_err(text)?;
        scratch.load(&code, user).map_err(text)?;
        let ds = *scratch.cpu.segment(Seg::Ds);
        let exit = enter(&mut scratch)?;
        check!(halted(exit), "{selector:#x}: {exit:x?}");
        check!(scratch.data_word(8).map_err(text)? == 7, "{selector:#x}: the base was not used");
        let own = decode(selector, gdt[usize::from(selector >> 3)]);
        let want = Segment { attributes: own.attributes | 1, ..own };
        check!(*scratch.cpu.segment(Seg::Fs) == want, "{selector:#x}: {:x?}", scratch.cpu.segment(Seg::Fs));
        let gs = scratch.cpu.segment(Seg::Gs);
        check!(gs.unusable && gs.selector == 0, "null: {gs:x?}");
        check!(*scratch.cpu.segment(Seg::Ds) == ds, "what nobody loaded stays");
        // And once more through an entry: the null register and the loaded one are entered as they are.
        let before = scratch.cpu.clone();
        enter(&mut scratch)?;
        scratch.cpu.eflags = before.eflags;
        check!(scratch.cpu == before, "second entry: {:x?}", scratch.cpu.seg);
    }
    Ok(())
}

fn code_segment(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // A second kernel code segment, base 0x0010_0000.
    let code_at_page = 0x00cf_9b10_0000_ffff;
    scratch.set_gdt(&[&GDT[..], &[code_at_page]].concat()).map_err(text)?;
    // jmp 0x28:7; (7) hlt
    scratch.load(&[0xea, 7, 0, 0, 0, 0x28, 0, HLT], false).map_err(text)?;
    let exit = enter(&mut scratch)?;
    check!(halted(exit), "{exit:x?}");
    let cs = scratch.cpu.segment(Seg::Cs);
    check!(*cs == decode(0x28, code_at_page), "{cs:x?}");
    check!(scratch.cpu.eip == 7 && scratch.cpu.cpl == 0, "{:#x}", scratch.cpu.eip);
    Ok(())
}

fn stale_stack(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // mov eax, 0x23; mov ss, eax; hlt, while SS holds what selector 0x23 no longer means.
    let reload = [0xb8, USER_DATA as u8, 0, 0, 0, 0x8e, 0xd0, HLT];
    scratch.load(&reload, true).map_err(text)?;
    let exit = enter(&mut scratch)?;
    check!(halted(exit) && scratch.cpu.eip == CODE.0 + 7, "fresh: {exit:x?} {:#x}", scratch.cpu.eip);
    let mut gdt = GDT;
    gdt[4] = small_data(3);
    scratch.set_gdt(&gdt).map_err(text)?;
    scratch.load(&reload, true).map_err(text)?;
    let old = *scratch.cpu.segment(Seg::Ss);
    let exit = enter(&mut scratch)?;
    check!(scratch.cpu.eip == CODE.0 + 5, "stale: {exit:x?} {:#x}", scratch.cpu.eip);
    check!(*scratch.cpu.segment(Seg::Ss) == old, "{:x?}", scratch.cpu.segment(Seg::Ss));
    // The VMM does the load; then it is fresh and goes natively.
    scratch.cpu.seg[Seg::Ss as usize] = decode(USER_DATA, gdt[4] | 1 << 40);
    let exit = enter(&mut scratch)?;
    check!(halted(exit) && scratch.cpu.eip == CODE.0 + 7, "reloaded: {exit:x?} {:#x}", scratch.cpu.eip);
    Ok(())
}

fn return_to_user(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // push USER_DATA; push STACK_END; push 0x202; push USER_CODE; push CODE; iretd, at virtual CPL 0.
    let code = [
        &[0x6a, USER_DATA as u8, 0x68, 0, 0, 9, 0, 0x68, 2, 2, 0, 0, 0x6a, USER_CODE as u8][..],
        &[0x68, 0, 0, 0x10, 0, 0xcf],
    ]
    .concat();
    scratch.load(&code, false).map_err(text)?;
    let exit = enter(&mut scratch)?;
    let selector = u32::from(USER_CODE & !3);
    let at_iret = scratch.cpu.eip == CODE.0 + code.len() as u32 - 1;
    // An emulator may name no selector; TCG pops a frame with the kernel's rights, which SMAP refuses.
    let wanted = trapped(exit, 13, selector) || trapped(exit, 13, 0) || trapped(exit, 14, 1);
    check!(at_iret && wanted, "{exit:x?} {:#x}", scratch.cpu.eip);
    // jmp 0x08:.. from user mode: the kernel's code is hidden.
    let exit = run(&mut scratch, &[0xea, 0, 0, 0x10, 0, KERNEL_CODE as u8, 0])?;
    check!(scratch.cpu.eip == CODE.0, "{exit:x?} {:#x}", scratch.cpu.eip);
    Ok(())
}

fn ldt(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    let ldt = table_bytes(&[0, small_data(3)]);
    // mov eax, 0x0f; mov es, eax; mov dword es:[8], 9; hlt
    let code = [0xb8, 0x0f, 0, 0, 0, 0x8e, 0xc0, 0x26, 0xc7, 0x05, 8, 0, 0, 0, 9, 0, 0, 0, HLT];
    let exit = run(&mut scratch, &code)?;
    check!(trapped(exit, 13, 0x0c), "without an LDT: {exit:x?}");
    scratch.vcpu.set_descriptors(&table_bytes(&GDT), Some(&ldt)).map_err(text)?;
    let exit = run(&mut scratch, &code)?;
    check!(halted(exit) && scratch.data_word(8).map_err(text)? == 9, "with one: {exit:x?}");
    check!(*scratch.cpu.segment(Seg::Es) == decode(0x0f, small_data(3) | 1 << 40), "{:x?}", scratch.cpu.seg);
    scratch.vcpu.set_descriptors(&table_bytes(&GDT), None).map_err(text)?;
    let exit = run(&mut scratch, &code)?;
    check!(trapped(exit, 13, 0x0c), "and without again: {exit:x?}");
    Ok(())
}

fn page_fault(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // mov eax, [ABSENT]; mov [esi], eax; mov [ABSENT], ebx; hlt
    let code = [0xa1, 0, 0, 0x40, 0, 0x89, 0x06, 0x89, 0x1d, 0, 0, 0x40, 0, HLT];
    let exit = run(&mut scratch, &code)?;
    check!(trapped(exit, 14, 4), "{exit:x?}");
    let frame = scratch.space.frame().map_err(text)?;
    scratch.space.pool().store(frame.at(0), 0x5555_aaaa).map_err(text)?;
    scratch.space.map(ABSENT, frame, PRESENT | USER).map_err(text)?;
    let exit = enter(&mut scratch)?;
    check!(trapped(exit, 14, 7), "then read-only: {exit:x?}");
    check!(scratch.data_word(0).map_err(text)? == 0x5555_aaaa, "what was read");
    scratch.space.map(ABSENT, frame, ALL).map_err(text)?;
    scratch.cpu.gpr[3] = 0x77;
    let exit = enter(&mut scratch)?;
    let stored = scratch.space.pool().load(frame.at(0)).map_err(text)?;
    check!(halted(exit) && stored == 0x77, "then writable: {exit:x?} {stored:#x}");
    Ok(())
}

fn single_step(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    scratch.load(&[0x40, 0x40, HLT], true).map_err(text)?;
    scratch.cpu.eflags |= eflags::TF;
    scratch.cpu.dr[6] = 0xffff_0ff0;
    for step in 1..=2 {
        let exit = enter(&mut scratch)?;
        let cpu = &scratch.cpu;
        check!(trapped(exit, 1, 0) && cpu.gpr[0] == step, "step {step}: {exit:?} eax {}", cpu.gpr[0]);
        check!(cpu.eip == CODE.0 + step, "step {step}: {:#x}", cpu.eip);
        check!(cpu.dr[6] & 1 << 14 != 0, "BS in DR6: {:#x}", cpu.dr[6]);
    }
    Ok(())
}

fn cannot_run(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    scratch.load(&[HLT], true).map_err(text)?;
    let good = scratch.cpu.clone();
    let cases = [
        (CpuState { cr0: good.cr0 & !cr0::PE, ..good.clone() }, CannotRun::RealMode),
        (CpuState { eflags: good.eflags | eflags::VM, ..good.clone() }, CannotRun::Virtual8086),
        (CpuState { cpl: 2, ..good.clone() }, CannotRun::PrivilegeLevel(2)),
    ];
    for (state, reason) in cases {
        scratch.cpu = state.clone();
        let error = scratch.enter();
        check!(matches!(error, Err(KvmError::CannotRun(r)) if r == reason), "{error:?}");
        check!(scratch.cpu == state, "the state has changed");
    }
    Ok(())
}

fn hole(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    let beyond = Mfn(scratch.space.pool().frames() as u32 + 5);
    scratch.space.map(ABSENT, beyond, ALL).map_err(text)?;
    scratch.load(&[0xa1, 8, 0, 0x40, 0, HLT], true).map_err(text)?;
    match scratch.enter() {
        Err(error @ KvmError::Stopped { .. }) => {
            let message = error.to_string();
            check!(message.contains("not in the pool") && message.contains("cr3"), "{message}");
            let KvmError::Stopped { why: Stop::Hole { address, write: false, .. }, .. } = error else {
                return Err(message);
            };
            check!(address == beyond.at(8).0, "{address:#x}");
            Ok(())
        }
        other => Err(format!("{other:?}")),
    }
}

fn small_pool(host: &Host) -> Test {
    let pool = Arc::new(Pool::new(3).map_err(text)?);
    let error = KvmVm::new(host, pool, Options::default()).err().map(text).unwrap_or_default();
    check!(error.contains("--frames"), "{error}");
    Ok(())
}

fn no_such_vcpu(host: &Host) -> Test {
    let scratch = guest(host)?;
    let error = scratch.vm.create_vcpu(1).err().map(text).unwrap_or_default();
    check!(error.contains("no vCPU 1"), "{error}");
    Ok(())
}

fn kick_before(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    scratch.load(&[0x40, HLT], true).map_err(text)?;
    scratch.cpu.eflags |= eflags::IF;
    let before = scratch.cpu.clone();
    scratch.vcpu.kicker().kick();
    let exit = enter(&mut scratch)?;
    check!(exit == KvmExit::Kicked && scratch.cpu == before, "{exit:?} {:x?}", scratch.cpu);
    let exit = enter(&mut scratch)?;
    check!(halted(exit) && scratch.cpu.gpr[0] == 1, "{exit:?}: the kick was taken once");
    scratch.vcpu.kicker().kick();
    check!(scratch.vcpu.take_kick() && !scratch.vcpu.take_kick(), "a kick can be taken back");
    scratch.cpu = before;
    let exit = enter(&mut scratch)?;
    check!(halted(exit), "{exit:?}");
    Ok(())
}

fn kick_in_loop(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // inc ecx; jmp back: ECX counts, and EIP is always one of two.
    scratch.load(&[0x41, 0xeb, 0xfd], true).map_err(text)?;
    let kicker = scratch.vcpu.kicker();
    let stop = Arc::new(AtomicBool::new(false));
    let kicks = spawn_kicks(kicker.clone(), Arc::clone(&stop), 300);
    let mut last = 0;
    for _ in 0..200 {
        let exit = enter(&mut scratch)?;
        let cpu = &scratch.cpu;
        check!(exit == KvmExit::Kicked, "{exit:?}");
        check!((CODE.0..=CODE.0 + 1).contains(&cpu.eip), "{:#x}", cpu.eip);
        check!(cpu.gpr[1] >= last, "ECX went from {last} to {}", cpu.gpr[1]);
        last = cpu.gpr[1];
        check!(
            *cpu == CpuState { gpr: cpu.gpr, eip: cpu.eip, eflags: cpu.eflags, ..state(true) },
            "{cpu:x?}"
        );
    }
    stop.store(true, Ordering::Relaxed);
    kicks.join().map_err(|_| "the kicker panicked")?;
    check!(last > 0 && !kicker.inside(), "ECX {last}");
    Ok(())
}

/// Kicks at intervals from 0 to `most_us` microseconds until told to stop.
fn spawn_kicks(kicker: umbra::kvm::Kicker, stop: Arc<AtomicBool>, most_us: u64) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        while !stop.load(Ordering::Relaxed) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            thread::sleep(Duration::from_micros(random % most_us));
            kicker.kick();
        }
    })
}

/// The guest counts in EBX and in memory, and traps once a round; each trap must be seen exactly once.
fn kicks_under_traps(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // inc ebx; inc dword [esi]; cli; jmp back
    scratch.load(&[0x43, 0xff, 0x06, 0xfa, 0xeb, 0xfa], true).map_err(text)?;
    let stop = Arc::new(AtomicBool::new(false));
    let kicks = spawn_kicks(scratch.vcpu.kicker(), Arc::clone(&stop), 200);
    let (mut traps, mut kicked) = (0u32, 0u32);
    let (begun, enough) = (Instant::now(), Duration::from_millis(500));
    while begun.elapsed() < enough || traps < 300 || kicked < 30 {
        check!(begun.elapsed() < Duration::from_secs(20), "{traps} traps, {kicked} kicks seen in 20 s");
        match enter(&mut scratch)? {
            KvmExit::Kicked => kicked += 1,
            exit if halted(exit) && scratch.cpu.eip == CODE.0 + 3 => {
                traps += 1;
                scratch.cpu.eip += 1;
                check!(scratch.cpu.gpr[3] == traps, "EBX {} after {traps} traps", scratch.cpu.gpr[3]);
            }
            exit => return Err(format!("{exit:x?} at {:#x}", scratch.cpu.eip)),
        }
    }
    stop.store(true, Ordering::Relaxed);
    kicks.join().map_err(|_| "the kicker panicked")?;
    let counted = scratch.data_word(0).map_err(text)?;
    check!(counted == u64::from(scratch.cpu.gpr[3]), "memory {counted}, EBX {}", scratch.cpu.gpr[3]);
    Ok(())
}

/// The same with page faults, whose CR2 would be lost with an exception that a kick swallowed.
fn kicks_under_faults(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    let frame = scratch.space.frame().map_err(text)?;
    scratch.space.map(ABSENT, frame, 0).map_err(text)?;
    // inc dword [ABSENT]; mov eax, cr3 (to trap once more, so that the page is unmapped again); jmp back
    let code = [0xff, 0x05, 0, 0, 0x40, 0, 0x0f, 0x20, 0xd8, 0xeb, 0xf5];
    scratch.load(&code, true).map_err(text)?;
    let stop = Arc::new(AtomicBool::new(false));
    let kicks = spawn_kicks(scratch.vcpu.kicker(), Arc::clone(&stop), 200);
    let entry = scratch.space.entry(ABSENT).map_err(text)?;
    let (mut rounds, mut flush) = (0u64, false);
    let (begun, enough) = (Instant::now(), Duration::from_millis(500));
    while begun.elapsed() < enough || rounds < 100 {
        check!(begun.elapsed() < Duration::from_secs(20), "{rounds} rounds in 20 s");
        let root = scratch.space.root();
        let exit = scratch.vcpu.enter(&mut scratch.cpu, root, flush).map_err(text)?;
        flush = false;
        match exit {
            KvmExit::Kicked => {}
            KvmExit::Trap { vector: 14, cr2, .. } => {
                check!(cr2 == u64::from(ABSENT.0) && scratch.cpu.eip == CODE.0, "{exit:x?}");
                scratch.space.pool().store(entry, frame.at(0).0 | ALL).map_err(text)?;
            }
            exit if halted(exit) && scratch.cpu.eip == CODE.0 + 6 => {
                rounds += 1;
                scratch.cpu.eip += 3;
                let counted = scratch.space.pool().load(frame.at(0)).map_err(text)?;
                check!(counted == rounds, "{counted} after {rounds} rounds");
                scratch.space.pool().store(entry, 0).map_err(text)?;
                Notifier::new(Arc::clone(&scratch.vm)).drop_frame(frame).map_err(text)?;
                flush = true;
            }
            exit => return Err(format!("{exit:x?} at {:#x}", scratch.cpu.eip)),
        }
    }
    stop.store(true, Ordering::Relaxed);
    kicks.join().map_err(|_| "the kicker panicked")?;
    Ok(())
}

/// Two frames with different first words, and a guest that reads through one page: `mov eax, [ABSENT]; hlt`.
fn two_frames(scratch: &mut Scratch) -> Result<[Mfn; 2], String> {
    let frames = [scratch.space.frame().map_err(text)?, scratch.space.frame().map_err(text)?];
    for (number, frame) in frames.iter().enumerate() {
        scratch.space.pool().store(frame.at(0), number as u64 + 1).map_err(text)?;
    }
    scratch.load(&[0xa1, 0, 0, 0x40, 0, HLT], true).map_err(text)?;
    Ok(frames)
}

fn flush(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    let frames = two_frames(&mut scratch)?;
    // From absent to present: seen with a flush on every host.
    let exit = enter(&mut scratch)?;
    check!(trapped(exit, 14, 4), "{exit:?}");
    let root = scratch.space.root();
    for round in 0..20 {
        let which = round % 2;
        scratch.space.map(ABSENT, frames[which], ALL).map_err(text)?;
        Notifier::new(Arc::clone(&scratch.vm)).drop_frame(frames[1 - which]).map_err(text)?;
        scratch.cpu = state(true);
        let exit = scratch.vcpu.enter(&mut scratch.cpu, root, true).map_err(text)?;
        check!(halted(exit) && scratch.cpu.gpr[0] == which as u32 + 1, "round {round}: {exit:?}");
        let kicked = scratch.vcpu.flush(&scratch.cpu, root).map_err(text)?;
        check!(!kicked, "nobody kicked");
    }
    Ok(())
}

fn flush_under_kicks(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    scratch.load(&[HLT], true).map_err(text)?;
    let root = scratch.space.root();
    let before = scratch.cpu.clone();
    scratch.vcpu.kicker().kick();
    let exit = scratch.vcpu.enter(&mut scratch.cpu, root, true).map_err(text)?;
    check!(exit == KvmExit::Kicked && scratch.cpu == before, "{exit:?}");
    let stop = Arc::new(AtomicBool::new(false));
    let kicks = spawn_kicks(scratch.vcpu.kicker(), Arc::clone(&stop), 50);
    for _ in 0..2000 {
        scratch.cpu = before.clone();
        match scratch.vcpu.enter(&mut scratch.cpu, root, true).map_err(text)? {
            KvmExit::Kicked => {}
            exit => check!(halted(exit), "{exit:?}"),
        }
    }
    stop.store(true, Ordering::Relaxed);
    kicks.join().map_err(|_| "the kicker panicked")?;
    Ok(())
}

fn other_root(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    let frames = two_frames(&mut scratch)?;
    let other = umbra::probe::scratch::Space::new(
        Arc::clone(scratch.vm.pool()),
        Mfn(frames[1].0 + 64),
        scratch.vm.root_entry(),
    );
    let mut other = other.map_err(text)?;
    other.map(CODE, scratch.code, ALL).map_err(text)?;
    other.map(ABSENT, frames[1], ALL).map_err(text)?;
    scratch.space.map(ABSENT, frames[0], ALL).map_err(text)?;
    let roots = [scratch.space.root(), other.root()];
    for round in 0..20 {
        scratch.cpu = state(true);
        let exit = scratch.vcpu.enter(&mut scratch.cpu, roots[round % 2], false).map_err(text)?;
        check!(halted(exit) && scratch.cpu.gpr[0] == (round % 2) as u32 + 1, "round {round}: {exit:?}");
    }
    Ok(())
}

/// A vCPU copies what it sees through one page to another, without ever leaving; the VMM exchanges the frame
/// behind the first and `drop`s; the copy must follow.
fn shot_down(host: &Host, drop: fn(&Notifier, Mfn) -> Result<(), KvmError>) -> Test {
    const ROUNDS: u32 = 40;
    let mut scratch = guest(host)?;
    let frames = two_frames(&mut scratch)?;
    // mov eax, [ABSENT]; mov [esi], eax; jmp back
    scratch.load(&[0xa1, 0, 0, 0x40, 0, 0x89, 0x06, 0xeb, 0xf7], true).map_err(text)?;
    scratch.space.map(ABSENT, frames[0], ALL).map_err(text)?;
    let (vm, data) = (Arc::clone(&scratch.vm), scratch.data);
    let (pool, notifier) = (Arc::clone(vm.pool()), Notifier::new(vm));
    let entry = scratch.space.entry(ABSENT).map_err(text)?;
    let kicker = scratch.vcpu.kicker();
    let vcpu = thread::spawn(move || enter(&mut scratch));
    let seen = |want: u64| -> Result<bool, String> {
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end {
            if pool.load(data.at(0)).map_err(text)? & 0xffff_ffff == want {
                return Ok(true);
            }
        }
        Ok(false)
    };
    let mut result = seen(1).map(|seen| if seen { 0 } else { ROUNDS });
    for round in 1..=ROUNDS {
        let which = (round % 2) as usize;
        let store = pool.store(entry, frames[which].at(0).0 | ALL).map_err(text);
        let dropped = store.and_then(|()| drop(&notifier, frames[1 - which]).map_err(text));
        let missed = dropped.and_then(|()| seen(which as u64 + 1)).map(|seen| u32::from(!seen));
        result = result.and_then(|sum| missed.map(|missed| sum + missed));
    }
    kicker.kick();
    let exit = vcpu.join().map_err(|_| "the vCPU panicked")??;
    check!(exit == KvmExit::Kicked, "{exit:?}");
    let missed = result?;
    check!(missed == 0, "{missed} of {ROUNDS} shootdowns were not seen");
    Ok(())
}

fn notifier_one(host: &Host) -> Test {
    shot_down(host, |notifier, frame| notifier.drop_removed(&Removals { pages: vec![frame], all: false }))
}

fn notifier_all(host: &Host) -> Test {
    shot_down(host, |notifier, _| notifier.drop_removed(&Removals { pages: vec![], all: true }))
}

fn two_vcpus(host: &Host) -> Test {
    let first = Scratch::new(host, Options { vcpus: 2, ..Options::default() }).map_err(text)?;
    let second = Scratch::on(Arc::clone(&first.vm), 1).map_err(text)?;
    let shared = first.data;
    let pool = Arc::clone(first.vm.pool());
    let threads = [first, second].map(|mut scratch| {
        thread::spawn(move || -> Result<u32, String> {
            scratch.space.map(DATA, shared, ALL).map_err(text)?;
            // lock inc dword [esi]; inc ebx; loop back; hlt, 5000 times
            scratch.load(&[0xf0, 0xff, 0x06, 0x43, 0xe2, 0xfa, HLT], true).map_err(text)?;
            scratch.cpu.gpr[1] = 5000;
            let exit = enter(&mut scratch)?;
            check!(halted(exit), "{exit:?}");
            Ok(scratch.cpu.gpr[3])
        })
    });
    for thread in threads {
        let counted = thread.join().map_err(|_| "a vCPU's thread panicked")??;
        check!(counted == 5000, "{counted}");
    }
    let sum = pool.load(Mpa(shared.at(0).0)).map_err(text)?;
    check!(sum == 10_000, "{sum}");
    Ok(())
}

fn fpu(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    const XMM0: std::ops::Range<usize> = 160..176;
    let mut wanted = scratch.vcpu.fpu().map_err(text)?;
    check!((&wanted[..2], &wanted[24..28]) == (&[0x7f, 3][..], &[0x80, 0x1f, 0, 0][..]), "{wanted:x?}");
    wanted[XMM0].fill(0x5a);
    scratch.vcpu.set_fpu(&wanted).map_err(text)?;
    // movups [esi], xmm0; hlt
    let exit = run(&mut scratch, &[0x0f, 0x11, 0x06, HLT])?;
    let stored = scratch.data_word(8).map_err(text)?;
    check!(halted(exit) && stored == 0x5a5a_5a5a_5a5a_5a5a, "{exit:?} {stored:#x}");
    check!(scratch.vcpu.fpu().map_err(text)?[XMM0] == [0x5a; 16], "after an exit");
    // With TS set the same instruction traps.
    scratch.load(&[0x0f, 0x11, 0x06, HLT], true).map_err(text)?;
    scratch.cpu.cr0 |= cr0::TS;
    let exit = enter(&mut scratch)?;
    check!(trapped(exit, 7, 0) && scratch.cpu.eip == CODE.0, "{exit:?}");
    Ok(())
}

fn watchdog(host: &Host) -> Test {
    const LIMIT: Duration = Duration::from_millis(50);
    let mut scratch = guest(host)?;
    // jmp to itself
    scratch.load(&[0xeb, 0xfe], true).map_err(text)?;
    let begun = Instant::now();
    let watchdog = Watchdog::new(LIMIT);
    watchdog.watch("a loop", scratch.vcpu.kicker());
    for _ in 0..3 {
        let exit = scratch.enter().map_err(text)?;
        check!(exit == KvmExit::Kicked && scratch.cpu.eip == CODE.0, "{exit:?}");
    }
    check!(begun.elapsed() >= LIMIT && watchdog.what() == "a loop", "{:?}", begun.elapsed());
    Ok(())
}
