//! Two vCPUs' worth of a guest kernel that remaps its pages and tells the other CPU, for tests by threads: real ones
//! (`threads`) and shuttle's (`interleave`).
//!
//! Each CPU has pages that both address spaces show, and private ones. It remaps them among frames of its own, poisons
//! the frame that a page has left, and checks:
//! - alone with its page it sees its own remapping after INVLPG, or a CR3 load, whatever the others do;
//! - after a TLB shootdown between the guest's CPUs nobody reads or writes the old page any more;
//! - while a gate is closed and the vCPUs have been shot down, the frame does not change ([`Guest::invalidate`]).

use std::sync::Arc;

use proptest::prelude::RngExt;
use proptest::test_runner::TestRng;
use umbra_mmu::p2m::PageState;
use umbra_mmu::sync::{AtomicBool, AtomicU64, Ordering, point, thread};
use umbra_mmu::{
    Access, AccessKind, Config, Context, Flush, Gfn, Gpa, Gva, LocalStack, Machine, Mmu, Mode, Outcome,
    Shootdown, Vcpu, Width,
};
use vm_memory::MmapRegion;

use super::hardware::{self, Tlb};
use super::walker::Kind;

const LOW: u32 = 0xc000_0000;
/// Pages of shared and of private memory that each CPU remaps.
const SLOTS: u32 = 4;
/// Frames that it remaps them among.
const POOL: u32 = 6;
const SHARED: u32 = 0x0040_0000;
const PRIVATE: u32 = 0x0080_0000;
const SHARED_TABLE: u32 = 4;
const LOW_TABLE: u32 = 5;
/// Each CPU's two.
const PRIVATE_TABLES: [[u32; 2]; 2] = [[6, 13], [7, 14]];
const FIRST_DATA: u32 = 16;
const LOW_PAGES: u32 = FIRST_DATA + 2 * 2 * POOL;
/// CR3 loads after which an unsync table that nobody wrote to is tracked again.
const CLEAN_MAX: u32 = 16;
const RESERVED: u32 = 2;
const ROOTS: u32 = 8;
/// Where in every frame its name is.
const NAME: u32 = 0xff8;
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
pub struct Kernel {
    /// Address to invalidate plus one, by the CPU asked; 0 when done.
    mail: [AtomicU64; 2],
    /// Version of each shared page that is being, and that has been mapped.
    begun: [AtomicU64; 2 * SLOTS as usize],
    pub stop: AtomicBool,
}

/// The guest, its machine and its VMM.
#[derive(Clone)]
pub struct Guest {
    pub pae: bool,
    pub mmu: Arc<Mmu>,
    pub machine: Arc<MmapRegion>,
    pub kernel: Arc<Kernel>,
    kicks: Arc<[AtomicBool; 2]>,
}

/// One CPU of it. Its own TLB keeps everything until it is told to forget.
pub struct Cpu {
    id: u32,
    guest: Guest,
    vcpu: Vcpu,
    tlb: Tlb,
    /// It does what the ledger asks of it. Without that the checks must fail.
    pub obeys: bool,
    /// How many of its shared and of its private pages it uses.
    pub slots: u32,
    running: Option<bool>,
    rng: TestRng,
    /// Where the entries of its private pages are.
    table: u32,
    /// Frame of each page: shared ones of this CPU's, then private ones.
    frames: [u32; 2 * SLOTS as usize],
    versions: [u64; 2 * SLOTS as usize],
    /// The least version of each shared page that may still be seen.
    floor: [u64; 2 * SLOTS as usize],
    pub steps: u64,
}

impl Guest {
    /// A guest that has not run yet, its tables laid and all its memory touched, with so many frames for shadow pages.
    pub fn new(pae: bool, shadow_frames: u32) -> Guest {
        let frames = RESERVED + LOW_PAGES + 2 * ROOTS + shadow_frames;
        let machine = Arc::new(MmapRegion::new(frames as usize * 4096).expect("memory"));
        let config = Config {
            reserved_frames: RESERVED,
            shadow_pages_max: 64,
            roots_max: ROOTS,
            vcpus: 2,
            ..Config::of_pages(64)
        };
        let kicks: Arc<[AtomicBool; 2]> = Arc::default();
        let shootdown = Box::new(Kick { flags: kicks.clone() });
        let mmu = Arc::new(Mmu::new(Machine::new(machine.clone()), config, shootdown));
        lay_tables(&mmu, pae);
        build_roots(&mmu, pae);
        Guest { pae, mmu, machine, kernel: Arc::default(), kicks }
    }

    /// CPU `id`, 0 or 1, outside its guest and before its first load of CR3.
    pub fn cpu(&self, id: u32, rng: TestRng) -> Cpu {
        Cpu {
            id,
            guest: self.clone(),
            vcpu: self.mmu.vcpu(id),
            tlb: Tlb::new(hardware::Memory::Sticky),
            obeys: true,
            slots: SLOTS,
            running: None,
            rng,
            table: PRIVATE_TABLES[id as usize][0],
            frames: std::array::from_fn(|n| pool(id, n as u32 >= SLOTS) + n as u32 % SLOTS),
            versions: [0; 2 * SLOTS as usize],
            floor: [0; 2 * SLOTS as usize],
            steps: 0,
        }
    }

    /// Invalidates a frame of data: while it is under invalidation, it must not change.
    pub fn invalidate(&self, rng: &mut TestRng, looks: u32) {
        let gfn = Gfn(rng.random_range(FIRST_DATA..LOW_PAGES));
        self.mmu.buckets().close(gfn);
        self.mmu.zap_frame(gfn);
        self.mmu.coherence().shoot_down(None);
        if let PageState::Resident(mfn) = self.mmu.p2m().lookup(gfn) {
            let words =
                || [0, 8].map(|at| hardware::word(&self.machine, mfn.at(at).0).load(Ordering::SeqCst));
            let before = words();
            for _ in 0..looks {
                point();
                assert_eq!(words(), before, "frame {gfn:?} changed behind its closed gate");
                std::hint::spin_loop();
            }
        }
        self.mmu.buckets().open(gfn);
    }
}

fn pool(cpu: u32, private: bool) -> u32 {
    FIRST_DATA + POOL * (2 * cpu + u32::from(private))
}

impl Cpu {
    pub fn load_cr3(&mut self, cpu: u32) {
        self.leave();
        let (mode, cr3) = (mode(self.guest.pae, true), cr3_of(self.guest.pae, cpu));
        self.guest.mmu.set_paging(&mut self.vcpu, mode, cr3, Flush::Yes).expect("good PDPTEs");
    }

    pub fn leave(&mut self) {
        self.running = None;
        self.guest.mmu.leave(&self.vcpu);
    }

    fn enter(&mut self, user: bool) -> u64 {
        if self.running != Some(user) || self.guest.kicks[self.id as usize].swap(false, Ordering::SeqCst) {
            self.leave();
        }
        let root = self.guest.mmu.root_address(&self.vcpu, user).expect("frames for roots");
        if self.running.is_none() {
            self.running = Some(user);
            if self.guest.mmu.enter(&self.vcpu) && self.obeys {
                let epoch = self.guest.mmu.coherence().begin_flush();
                self.tlb.flush();
                self.guest.mmu.coherence().end_flush(self.id, epoch);
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
            if let Ok(at) = self.tlb.access(&self.guest.machine, root, va, hardware_kind) {
                let word = hardware::word(&self.guest.machine, at);
                point();
                return match store {
                    Some(value) => word.swap(value, Ordering::SeqCst),
                    None => word.load(Ordering::SeqCst),
                };
            }
            self.leave();
            match self.guest.mmu.fault(&self.vcpu, Gva(va), Access { kind, user }) {
                Outcome::Fixed | Outcome::Spurious => {}
                // Somebody is at it: a page of the shadow is being made, say.
                Outcome::Again => thread::yield_now(),
                Outcome::Gate(gfn) => self.guest.mmu.wait_at_gate(&self.vcpu, gfn),
                Outcome::Emulate(_) => {
                    let gpa = self.guest.mmu.translate(&self.vcpu, Gva(va), Access { kind, user });
                    let gpa = gpa.expect("it has just been translated, and nobody takes kernel pages away");
                    let value = store.expect("only stores are emulated");
                    self.guest
                        .mmu
                        .store(&LocalStack::new(Context::Host), gpa, Width::B8, value)
                        .expect("memory");
                    return 0;
                }
                // The other has them, and will be done.
                Outcome::Need(_) => thread::yield_now(),
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
            (PRIVATE + (index << 12), self.table, index)
        }
    }

    fn write_entry(&mut self, table: u32, index: u32, frame: u32) {
        let entry = u64::from(frame) << 12 | ALL;
        if self.guest.pae {
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
            self.guest.kernel.begun[page].store(self.versions[slot as usize], Ordering::SeqCst);
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

    /// Forgets the translation of `va`, in one way or the other.
    fn invalidate(&mut self, va: u32) {
        self.leave();
        if self.rng.random() {
            self.guest.mmu.invalidate_page(&self.vcpu, Gva(va));
        } else {
            self.load_cr3(self.id);
        }
    }

    /// The guest's IPI: waits, halted, until the other CPU has done its INVLPG.
    fn shoot_down_other(&mut self, va: u32) {
        self.leave();
        let other = 1 - self.id as usize;
        let kernel = self.guest.kernel.clone();
        kernel.mail[other].store(u64::from(va) + 1, Ordering::SeqCst);
        while kernel.mail[other].load(Ordering::SeqCst) != 0 && !kernel.stop.load(Ordering::SeqCst) {
            self.answer_mail();
            thread::yield_now();
        }
    }

    pub fn answer_mail(&mut self) {
        let mail = self.guest.kernel.mail[self.id as usize].load(Ordering::SeqCst);
        if mail == 0 {
            return;
        }
        let va = mail as u32 - 1;
        let page = ((va - SHARED) >> 12) as usize;
        // What has begun by now is what the entry says, or older than what it says.
        let begun = self.guest.kernel.begun[page].load(Ordering::SeqCst);
        self.invalidate(va);
        self.floor[page] = begun;
        self.guest.kernel.mail[self.id as usize].store(0, Ordering::SeqCst);
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
        let begun = self.guest.kernel.begun[page as usize].load(Ordering::SeqCst);
        let version = got & 0xffff_ffff;
        let fits = got >> 32 == u64::from(va) && (self.floor[page as usize]..=begun).contains(&version);
        assert!(
            fits,
            "cpu {} read {got:#x} at {va:#x}: versions {}..={begun} are allowed",
            self.id, self.floor[page as usize]
        );
        self.word(va + 8, user, Some(0xbeef));
    }

    pub fn step(&mut self) {
        self.steps += 1;
        self.answer_mail();
        let (slot, user) = (self.rng.random_range(0..self.slots), self.rng.random());
        match self.rng.random_range(0..100) {
            0..10 => self.remap(slot),
            10..25 => self.remap(SLOTS + slot),
            25..35 => self.check_own(SLOTS + slot, user),
            35..45 => self.check_own(slot, user),
            45..60 => self.check_other(slot, user),
            60..75 => self.look_around(),
            75..78 => self.move_table(),
            78..79 => self.settle(),
            79..82 => self.load_cr3(self.id),
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
                self.guest.mmu.evict_shadow(self.rng.random_range(1..8));
            }
            96..97 => {
                self.leave();
                self.guest.mmu.explain(&self.vcpu, Gva(self.place(slot).0));
            }
            97..99 => {
                // Any frame's sptes may go at any time.
                let gfn = Gfn(self.rng.random_range(0..LOW_PAGES));
                self.guest.mmu.zap_frame(gfn);
            }
            _ => self.leave(),
        }
    }

    /// Stays in the guest for some pages of memory, which are where they were, whatever shadow pages come and go.
    fn look_around(&mut self) {
        for _ in 0..4 {
            let frame = self.rng.random_range(0..LOW_PAGES);
            let got = self.low(frame, NAME, None);
            assert_eq!(got, name(frame), "cpu {} reads frame {frame:#x}, and it is another", self.id);
        }
    }

    /// Moves this CPU's private pages below another table, and forgets the old one.
    fn move_table(&mut self) {
        let (old, new) = (self.table, PRIVATE_TABLES[self.id as usize][usize::from(!self.moved())]);
        let words = if self.guest.pae { SLOTS } else { SLOTS / 2 };
        for word in 0..words {
            let entries = self.low(old, 8 * word, None);
            self.low(new, 8 * word, Some(entries));
        }
        let (directory, index) =
            if self.guest.pae { (10 + self.id, PRIVATE >> 21) } else { (1 + self.id, PRIVATE >> 22) };
        self.write_entry(directory, index, new);
        self.table = new;
        for slot in 0..SLOTS {
            self.invalidate(PRIVATE + (slot << 12));
        }
        for word in 0..words {
            self.low(old, 8 * word, Some(0));
        }
    }

    fn moved(&self) -> bool {
        self.table != PRIVATE_TABLES[self.id as usize][0]
    }

    /// Loads CR3 until every unsync table that nobody writes to is tracked again.
    fn settle(&mut self) {
        for _ in 0..=CLEAN_MAX {
            self.load_cr3(self.id);
        }
    }

    fn flip_wp(&mut self) {
        self.leave();
        let mode = Mode { write_protect: !self.vcpu.mode().write_protect, ..self.vcpu.mode() };
        let cr3 = self.vcpu.cr3();
        self.guest.mmu.set_paging(&mut self.vcpu, mode, cr3, Flush::No).expect("no PDPTEs are loaded");
    }
}

fn put(mmu: &Mmu, pae: bool, table: u32, index: u32, value: u64) {
    let size = if pae { 8 } else { 4 };
    let width = if pae { Width::B8 } else { Width::B4 };
    let at = Gpa((u64::from(table) << 12) + u64::from(index * size));
    mmu.store(&LocalStack::new(Context::Host), at, width, value).expect("memory");
}

/// A frame's name for itself: no entry that is present, in either format.
fn name(frame: u32) -> u64 {
    u64::from(frame) << 33
}

fn mode(pae: bool, write_protect: bool) -> Mode {
    Mode { paging: true, pae, write_protect, ..Mode::default() }
}

fn cr3_of(pae: bool, cpu: u32) -> u32 {
    if pae { 0x8000 + 0x20 * cpu } else { 0x1000 * (cpu + 1) }
}

/// Makes all the roots there will be, while there are frames.
fn build_roots(mmu: &Mmu, pae: bool) {
    let mut vcpu = mmu.vcpu(0);
    for (cpu, write_protect) in [(0, false), (0, true), (1, false), (1, true)] {
        let mode = mode(pae, write_protect);
        mmu.set_paging(&mut vcpu, mode, cr3_of(pae, cpu), Flush::Yes).expect("good PDPTEs");
        for user in [false, true] {
            mmu.root_address(&vcpu, user).expect("frames for all roots");
        }
    }
    mmu.set_paging(&mut vcpu, Mode::default(), 0, Flush::Yes).expect("no PDPTEs are loaded");
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
                mmu.store(&LocalStack::new(Context::Host), at, Width::B8, u64::from(va) << 32)
                    .expect("memory");
            }
        }
    }
    for frame in 0..LOW_PAGES {
        put(mmu, pae, LOW_TABLE, frame, to(frame));
        let at = Gpa((u64::from(frame) << 12) + u64::from(NAME));
        mmu.store(&LocalStack::new(Context::Host), at, Width::B8, name(frame)).expect("memory");
    }
}
