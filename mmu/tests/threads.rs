//! Two vCPUs on two threads, and a third thread that invalidates, for some seconds (`UMBRA_SECONDS`).
//!
//! Here nothing can be compared step by step. What is checked is what guests and the VMM build on:
//! - a CPU alone with its page sees its own remapping after INVLPG, whatever the others do;
//! - after a TLB shootdown between the guest's CPUs nobody reads or writes the old page any more;
//! - while a gate is closed and the vCPUs have been shot down, the frame does not change;
//! - afterwards the audit finds nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};
use umbra_mmu::p2m::PageState;
use umbra_mmu::{
    Access, AccessKind, Config, Flush, Gfn, Gpa, Gva, LocalStack, Machine, Mmu, Mode, Outcome, Shootdown,
    Vcpu, Width,
};
use vm_memory::MmapRegion;

use crate::model::hardware::{self, Tlb};
use crate::model::walker::Kind;

const LOW: u32 = 0xc000_0000;
/// Pages of shared and of private memory that each CPU remaps.
const SLOTS: u32 = 4;
/// Frames that it remaps them among.
const POOL: u32 = 6;
const SHARED: u32 = 0x0040_0000;
const PRIVATE: u32 = 0x0080_0000;
const SHARED_TABLE: u32 = 4;
const LOW_TABLE: u32 = 5;
const FIRST_DATA: u32 = 16;
const LOW_PAGES: u32 = FIRST_DATA + 2 * 2 * POOL;
const DEAD: u64 = 0xdead_dead;
/// P, W, U, A, D.
const ALL: u64 = 0x67;

struct Kick {
    flags: Arc<[AtomicBool; 2]>,
}

impl Shootdown for Kick {
    fn kick(&self, vcpu: u32) {
        self.flags[vcpu as usize].store(true, Ordering::SeqCst);
    }
}

/// What the two CPUs' kernels share: the mailboxes of their TLB shootdown, and how far each page has come.
#[derive(Default)]
struct Kernel {
    /// Address to invalidate plus one, by the CPU asked; 0 when done.
    mail: [AtomicU64; 2],
    /// Version of each shared page that is being, and that has been mapped.
    begun: [AtomicU64; 2 * SLOTS as usize],
    stop: AtomicBool,
}

struct Cpu {
    id: u32,
    pae: bool,
    mmu: Arc<Mmu>,
    machine: Arc<MmapRegion>,
    kernel: Arc<Kernel>,
    kicks: Arc<[AtomicBool; 2]>,
    vcpu: Vcpu,
    tlb: Tlb,
    running: Option<bool>,
    rng: TestRng,
    /// Frame of each page: shared ones of this CPU's, then private ones.
    frames: [u32; 2 * SLOTS as usize],
    versions: [u64; 2 * SLOTS as usize],
    /// The least version of each shared page that may still be seen.
    floor: [u64; 2 * SLOTS as usize],
    steps: u64,
}

fn pool(cpu: u32, private: bool) -> u32 {
    FIRST_DATA + POOL * (2 * cpu + u32::from(private))
}

impl Cpu {
    fn mode(&self) -> Mode {
        Mode { paging: true, pae: self.pae, write_protect: true, ..Mode::default() }
    }

    fn cr3_of(&self, cpu: u32) -> u32 {
        if self.pae { 0x8000 + 0x20 * cpu } else { 0x1000 * (cpu + 1) }
    }

    fn load_cr3(&mut self, cpu: u32) {
        self.leave();
        let (mode, cr3) = (self.mode(), self.cr3_of(cpu));
        self.mmu.set_paging(&mut self.vcpu, mode, cr3, Flush::Yes).expect("good PDPTEs");
    }

    fn leave(&mut self) {
        self.running = None;
        self.mmu.coherence().leave_guest(self.id);
    }

    fn enter(&mut self, user: bool) -> u64 {
        if self.running != Some(user) || self.kicks[self.id as usize].swap(false, Ordering::SeqCst) {
            self.leave();
        }
        let root = self.mmu.root_address(&self.vcpu, user).expect("frames for roots");
        if self.running.is_none() {
            self.running = Some(user);
            if self.mmu.coherence().enter_guest(self.id) {
                let epoch = self.mmu.coherence().begin_flush();
                self.tlb.flush();
                self.mmu.coherence().end_flush(self.id, epoch);
            }
        }
        root.0
    }

    /// The word at `va`, read or replaced, by the hardware or (tracked tables) by the VMM.
    fn word(&mut self, va: u32, user: bool, store: Option<u64>) -> u64 {
        let kind = if store.is_some() { AccessKind::Write } else { AccessKind::Read };
        let hardware_kind = if store.is_some() { Kind::Write } else { Kind::Read };
        loop {
            let root = self.enter(user);
            if let Ok(at) = self.tlb.access(&self.machine, root, va, hardware_kind) {
                let word = hardware::word(&self.machine, at);
                return match store {
                    Some(value) => word.swap(value, Ordering::SeqCst),
                    None => word.load(Ordering::SeqCst),
                };
            }
            self.leave();
            match self.mmu.fault(&self.vcpu, Gva(va), Access { kind, user }) {
                Outcome::Fixed | Outcome::Spurious | Outcome::Again => {}
                Outcome::Gate(gfn) => self.mmu.wait_at_gate(&self.vcpu, gfn),
                Outcome::Emulate(_) => {
                    let gpa = self.mmu.translate(&self.vcpu, Gva(va), Access { kind, user });
                    let gpa = gpa.expect("it has just been translated, and nobody takes kernel pages away");
                    let value = store.expect("only stores are emulated");
                    self.mmu.store(&LocalStack::new(), gpa, Width::B8, value).expect("memory");
                    return 0;
                }
                outcome => panic!("cpu {} at {va:#x}, store {store:x?}: {outcome:?}", self.id),
            }
        }
    }

    /// The kernel's view of a word of a frame.
    fn low(&mut self, frame: u32, offset: u32, store: Option<u64>) -> u64 {
        self.word(LOW + (frame << 12) + offset, false, store)
    }

    /// Address, table and index of page `slot`: this CPU's shared ones, then its private ones.
    fn place(&self, slot: u32) -> (u32, u32, u32) {
        if slot < SLOTS {
            let index = self.id * SLOTS + slot;
            (SHARED + (index << 12), SHARED_TABLE, index)
        } else {
            let index = slot - SLOTS;
            (PRIVATE + (index << 12), 6 + self.id, index)
        }
    }

    fn write_entry(&mut self, table: u32, index: u32, frame: u32) {
        let entry = u64::from(frame) << 12 | ALL;
        if self.pae {
            self.low(table, 8 * index, Some(entry));
        } else {
            // Two entries share a word; the other one is this CPU's too, or nobody's while this one is edited.
            let at = 8 * (index / 2);
            let shift = index % 2 * 32;
            let old = self.low(table, at, None);
            self.low(table, at, Some(old & !(0xffff_ffff << shift) | entry << shift));
        }
    }

    /// Maps another frame of the pool at a page, tells the other CPU, and poisons the old frame.
    fn remap(&mut self, slot: u32) {
        let private = slot >= SLOTS;
        let (va, table, index) = self.place(slot);
        let base = pool(self.id, private);
        let old = self.frames[slot as usize];
        let free = (base..base + POOL).find(|frame| !self.frames.contains(frame)).expect("POOL > SLOTS");
        for offset in [0, 8] {
            let left = self.low(free, offset, None);
            assert!(
                left == DEAD || left == 0,
                "a store went to frame {free:#x} after its shootdown: {left:#x}"
            );
        }
        self.versions[slot as usize] += 1;
        let stamp = self.stamp(slot);
        self.low(free, 0, Some(stamp));
        if !private {
            let page = (self.id * SLOTS + slot) as usize;
            self.kernel.begun[page].store(self.versions[slot as usize], Ordering::SeqCst);
        }
        self.write_entry(table, index, free);
        self.invalidate(va);
        if !private {
            self.shoot_down_other(va);
        }
        self.low(old, 0, Some(DEAD));
        self.low(old, 8, Some(DEAD));
        self.frames[slot as usize] = free;
    }

    fn stamp(&self, slot: u32) -> u64 {
        u64::from(self.place(slot).0) << 32 | self.versions[slot as usize]
    }

    fn invalidate(&mut self, va: u32) {
        self.leave();
        self.mmu.invalidate_page(&self.vcpu, Gva(va));
    }

    /// The guest's IPI: waits, halted, until the other CPU has done its INVLPG.
    fn shoot_down_other(&mut self, va: u32) {
        self.leave();
        let other = 1 - self.id as usize;
        let kernel = self.kernel.clone();
        kernel.mail[other].store(u64::from(va) + 1, Ordering::SeqCst);
        while kernel.mail[other].load(Ordering::SeqCst) != 0 && !kernel.stop.load(Ordering::SeqCst) {
            self.answer_mail();
            std::thread::yield_now();
        }
    }

    fn answer_mail(&mut self) {
        let mail = self.kernel.mail[self.id as usize].load(Ordering::SeqCst);
        if mail == 0 {
            return;
        }
        let va = mail as u32 - 1;
        let page = ((va - SHARED) >> 12) as usize;
        // What has begun by now is what the entry says, or older than what it says.
        let begun = self.kernel.begun[page].load(Ordering::SeqCst);
        self.invalidate(va);
        self.floor[page] = begun;
        self.kernel.mail[self.id as usize].store(0, Ordering::SeqCst);
    }

    /// A page of this CPU's own: it must read what was last written.
    fn check_own(&mut self, slot: u32, user: bool) {
        let (va, ..) = self.place(slot);
        let (got, want) = (self.word(va, user, None), self.stamp(slot));
        assert_eq!(got, want, "cpu {} at its own {va:#x}: {got:#x}, wrote {want:#x}", self.id);
    }

    /// A page of the other CPU's: some version that its last shootdown allows; and a store to it.
    fn check_other(&mut self, slot: u32, user: bool) {
        let page = (1 - self.id) * SLOTS + slot;
        let va = SHARED + (page << 12);
        let got = self.word(va, user, None);
        let begun = self.kernel.begun[page as usize].load(Ordering::SeqCst);
        let version = got & 0xffff_ffff;
        let fits = got >> 32 == u64::from(va) && (self.floor[page as usize]..=begun).contains(&version);
        assert!(
            fits,
            "cpu {} read {got:#x} at {va:#x}: versions {}..={begun} are allowed",
            self.id, self.floor[page as usize]
        );
        self.word(va + 8, user, Some(0xbeef));
    }

    fn step(&mut self) {
        self.steps += 1;
        self.answer_mail();
        let (slot, user) = (self.rng.random_range(0..SLOTS), self.rng.random());
        match self.rng.random_range(0..100) {
            0..10 => self.remap(slot),
            10..25 => self.remap(SLOTS + slot),
            25..45 => self.check_own(SLOTS + slot, user),
            45..55 => self.check_own(slot, user),
            55..80 => self.check_other(slot, user),
            80..82 => self.load_cr3(self.id),
            82..84 => {
                // The other's address space; the shared pages are there too.
                self.load_cr3(1 - self.id);
                self.check_own(slot, user);
                self.check_other(slot, user);
                self.load_cr3(self.id);
            }
            84..86 => self.flip_wp(),
            86..96 => {
                self.leave();
                self.mmu.evict_shadow(self.rng.random_range(1..8));
            }
            _ => self.leave(),
        }
    }

    fn flip_wp(&mut self) {
        self.leave();
        let mode = Mode { write_protect: !self.vcpu.mode().write_protect, ..self.vcpu.mode() };
        let cr3 = self.vcpu.cr3();
        self.mmu.set_paging(&mut self.vcpu, mode, cr3, Flush::No).expect("no PDPTEs are loaded");
    }
}

fn put(mmu: &Mmu, pae: bool, table: u32, index: u32, value: u64) {
    let size = if pae { 8 } else { 4 };
    let width = if pae { Width::B8 } else { Width::B4 };
    let at = Gpa((u64::from(table) << 12) + u64::from(index * size));
    mmu.store(&LocalStack::new(), at, width, value).expect("memory");
}

fn lay_tables(mmu: &Mmu, pae: bool) {
    let to = |frame: u32| u64::from(frame) << 12 | ALL;
    for cpu in 0..2 {
        if pae {
            put(mmu, true, 8, 4 * cpu, u64::from(10 + cpu) << 12 | 1);
            put(mmu, true, 8, 4 * cpu + 3, 12 << 12 | 1);
            put(mmu, true, 10 + cpu, SHARED >> 21, to(SHARED_TABLE));
            put(mmu, true, 10 + cpu, PRIVATE >> 21, to(6 + cpu));
            put(mmu, true, 12, 0, to(LOW_TABLE));
        } else {
            put(mmu, false, 1 + cpu, SHARED >> 22, to(SHARED_TABLE));
            put(mmu, false, 1 + cpu, PRIVATE >> 22, to(6 + cpu));
            put(mmu, false, 1 + cpu, LOW >> 22, to(LOW_TABLE));
        }
        for slot in 0..SLOTS {
            put(mmu, pae, SHARED_TABLE, cpu * SLOTS + slot, to(pool(cpu, false) + slot));
            put(mmu, pae, 6 + cpu, slot, to(pool(cpu, true) + slot));
            for (private, va) in
                [(false, SHARED + ((cpu * SLOTS + slot) << 12)), (true, PRIVATE + (slot << 12))]
            {
                let at = Gpa(u64::from(pool(cpu, private) + slot) << 12);
                mmu.store(&LocalStack::new(), at, Width::B8, u64::from(va) << 32).expect("memory");
            }
        }
    }
    for frame in 0..LOW_PAGES {
        put(mmu, pae, LOW_TABLE, frame, to(frame));
    }
}

/// Invalidates frames of data: while one is under invalidation, it must not change.
fn invalidate_at_random(mmu: &Mmu, machine: &MmapRegion, kernel: &Kernel, rng: &mut TestRng) -> u64 {
    let mut rounds = 0;
    while !kernel.stop.load(Ordering::SeqCst) {
        let gfn = Gfn(rng.random_range(FIRST_DATA..LOW_PAGES));
        mmu.buckets().close(gfn);
        mmu.zap_frame(gfn);
        mmu.coherence().shoot_down(None);
        if let PageState::Resident(mfn) = mmu.p2m().lookup(gfn) {
            let words = || [0, 8].map(|at| hardware::word(machine, mfn.at(at).0).load(Ordering::SeqCst));
            let before = words();
            for _ in 0..64 {
                assert_eq!(words(), before, "frame {gfn:?} changed behind its closed gate");
                std::hint::spin_loop();
            }
        }
        mmu.buckets().open(gfn);
        rounds += 1;
        std::thread::sleep(Duration::from_micros(100));
    }
    rounds
}

fn rng(seed: u8) -> TestRng {
    TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32])
}

/// Stops everybody when a thread ends, by a panic too: the others would wait for its mail.
struct StopAll(Arc<Kernel>, Arc<Mmu>, u32);

impl Drop for StopAll {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.1.coherence().leave_guest(self.2);
    }
}

fn run(pae: bool) {
    let seconds = std::env::var("UMBRA_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let machine = Arc::new(MmapRegion::new(400 * 4096).expect("memory"));
    let config = Config {
        guest_pages: 64,
        low_pages: 0,
        reserved_frames: 2,
        shadow_pages_max: 64,
        roots_max: 8,
        firmware_entry: 0,
        vcpus: 2,
    };
    let kicks: Arc<[AtomicBool; 2]> = Arc::default();
    let shootdown = Box::new(Kick { flags: kicks.clone() });
    let mmu = Arc::new(Mmu::new(Machine::new(machine.clone()), config, shootdown));
    lay_tables(&mmu, pae);
    let kernel = Arc::new(Kernel::default());
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let cpu = |id: u32| Cpu {
        id,
        pae,
        mmu: mmu.clone(),
        machine: machine.clone(),
        kernel: kernel.clone(),
        kicks: kicks.clone(),
        vcpu: mmu.vcpu(id),
        tlb: Tlb::new(hardware::Memory::Sticky),
        running: None,
        rng: rng(id as u8 + 1),
        frames: std::array::from_fn(|n| pool(id, n as u32 >= SLOTS) + n as u32 % SLOTS),
        versions: [0; 2 * SLOTS as usize],
        floor: [0; 2 * SLOTS as usize],
        steps: 0,
    };
    let (mut steps, mut rounds) = ([0; 2], 0);
    std::thread::scope(|scope| {
        let cpus = [0, 1].map(|id| {
            let mut cpu = cpu(id);
            scope.spawn(move || {
                let _stop = StopAll(cpu.kernel.clone(), cpu.mmu.clone(), id);
                cpu.load_cr3(id);
                while !cpu.kernel.stop.load(Ordering::SeqCst) && Instant::now() < end {
                    cpu.step();
                }
                cpu.leave();
                cpu.steps
            })
        });
        rounds = invalidate_at_random(&mmu, &machine, &kernel, &mut rng(9));
        steps = cpus.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    });
    let findings = mmu.audit();
    assert!(findings.is_empty(), "{findings:#?}");
    let usage = mmu.usage();
    println!("threads: pae {pae}, {steps:?} steps, {rounds} invalidations, {} evictions", usage.evictions);
    assert!(steps.iter().all(|n| *n > 100) && rounds > 10, "{steps:?} steps, {rounds} invalidations");
}

#[test]
fn two_vcpus_and_an_invalidator_keep_every_promise_with_two_level_tables() {
    run(false);
}

#[test]
fn two_vcpus_and_an_invalidator_keep_every_promise_with_pae_tables() {
    run(true);
}
