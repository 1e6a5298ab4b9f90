//! Kicks, flushes, shootdowns, two vCPUs: what others do to a vCPU that runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use umbra::cpu::{CpuState, eflags};
use umbra::kvm::shootdown::Notifier;
use umbra::kvm::{Host, KvmError, KvmExit, Options};
use umbra::probe::scratch::*;
use umbra::probe::watchdog::Watchdog;
use umbra_mmu::coherence::Removals;
use umbra_mmu::{Mfn, Mpa};

use crate::Body;
use crate::common::*;

/// Every test.
pub const TESTS: &[(&str, Body)] = &[
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
];

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
    let kicks = spawn_kicks(&mut scratch, Arc::clone(&stop), 300)?;
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

/// Kicks at intervals from 0 to `most_us` microseconds until told to stop, or to a few times what an entry takes where that
/// is more: under kicks that come faster, a guest gets nowhere.
fn spawn_kicks(
    scratch: &mut Scratch,
    stop: Arc<AtomicBool>,
    most_us: u64,
) -> Result<thread::JoinHandle<()>, String> {
    const BOUNCES: u32 = 16;
    let begun = Instant::now();
    for _ in 0..BOUNCES {
        scratch.vcpu.bounce(&scratch.cpu, scratch.space.root()).map_err(text)?;
    }
    let most_us = most_us.max(8 * (begun.elapsed() / BOUNCES).as_micros() as u64);
    let kicker = scratch.vcpu.kicker();
    Ok(thread::spawn(move || {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        while !stop.load(Ordering::Relaxed) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            thread::sleep(Duration::from_micros(random % most_us));
            kicker.kick();
        }
    }))
}

/// Enters; between the two halves, and in the second, the guest must not go on counting.
fn enter_by_halves(
    scratch: &mut Scratch,
    counted: impl Fn(&Scratch) -> Result<u64, String>,
) -> Result<KvmExit, String> {
    let left = scratch.vcpu.run_guest(&scratch.cpu, scratch.space.root()).map_err(text)?;
    let before = counted(scratch)?;
    let exit = scratch.vcpu.take(&mut scratch.cpu, left).map_err(text)?;
    let after = counted(scratch)?;
    check!(before == after, "guest code has run after run_guest: {before}, then {after}");
    Ok(exit)
}

/// The guest counts in EBX and in memory, and traps once a round; each trap must be seen exactly once.
fn kicks_under_traps(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // inc ebx; inc dword [esi]; cli; jmp back
    scratch.load(&[0x43, 0xff, 0x06, 0xfa, 0xeb, 0xfa], true).map_err(text)?;
    let stop = Arc::new(AtomicBool::new(false));
    let kicks = spawn_kicks(&mut scratch, Arc::clone(&stop), 200)?;
    let (mut traps, mut kicked) = (0u32, 0u32);
    let (begun, enough) = (Instant::now(), Duration::from_millis(500));
    while begun.elapsed() < enough || traps < 300 || kicked < 30 {
        check!(begun.elapsed() < Duration::from_secs(20), "{traps} traps, {kicked} kicks seen in 20 s");
        match enter_by_halves(&mut scratch, |scratch| scratch.data_word(0).map_err(text))? {
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
    println!("{traps} traps, {kicked} kicks in the guest, {} in the firmware", scratch.vcpu.late_kicks());
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
    let kicks = spawn_kicks(&mut scratch, Arc::clone(&stop), 200)?;
    let entry = scratch.space.entry(ABSENT).map_err(text)?;
    let (mut rounds, mut flush) = (0u64, false);
    let (begun, enough) = (Instant::now(), Duration::from_millis(500));
    while begun.elapsed() < enough || rounds < 100 {
        check!(begun.elapsed() < Duration::from_secs(20), "{rounds} rounds in 20 s");
        let root = scratch.space.root();
        if flush && scratch.vcpu.flush(&scratch.cpu, root).map_err(text)? {
            continue;
        }
        flush = false;
        let counted = |scratch: &Scratch| scratch.space.pool().load(frame.at(0)).map_err(text);
        match enter_by_halves(&mut scratch, counted)? {
            KvmExit::Kicked => {}
            KvmExit::Trap { vector: 14, cr2, .. } => {
                check!(cr2 == u64::from(ABSENT.0) && scratch.cpu.eip == CODE.0, "CR2 {cr2:#x}");
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
    let kicks = spawn_kicks(&mut scratch, Arc::clone(&stop), 50)?;
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
    let other = Space::new(Arc::clone(scratch.vm.pool()), Mfn(frames[1].0 + 64), scratch.vm.root_entry());
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
