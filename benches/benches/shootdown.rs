//! Taking one page from a guest whose vCPUs run, by each way to make them forget, against that way alone.
//!
//! Each vCPU reads the page, counts, and computes a while, round and round; each figure begins when all have just counted. *Bare* is the
//! way without a page: the request, the kicks and the wait; or the madvise. All take turns, round by round, and a ratio is the
//! median of the rounds' ratios. `peers/kick.c` is a kick by the kernel's own means. Figures of one vCPU, and with `_2` behind the
//! name of two, which on two CPUs share them with whoever takes the page.
//!
//! | figure | what is timed | bar |
//! |---|---|---|
//! | shootdown_kick, _bare | KVM: the page by a kick, the kick | 1.15 x |
//! | shootdown_notifier, _bare | KVM: the page by the host's notifier, the madvise | 1.15 x |
//! | shootdown_kick_bare_over_c | the kick over that of the C program | 1.3 x |
//! | shootdown_soft, _bare | a vCPU with a software TLB, which looks at its flag every 64 loads | 1.15 x |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use umbra::cpu::{CpuState, cr0};
use umbra::kvm::shootdown::Notifier;
use umbra::kvm::{Host, Kicker, KvmExit, KvmVcpu, KvmVm, Options};
use umbra::machine::Pool;
use umbra_benches::c_peer::CPeer;
use umbra_benches::peer::quantile;
use umbra_benches::{Effort, Samples};
use umbra_mmu::discard::Discard;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::PageState;
use umbra_mmu::records::{Clock, Record};
use umbra_mmu::{
    Access, AccessKind, Config, Context, Flush, Gfn, Gpa, Gva, LocalStack, Machine, Mfn, Mmu, Mode, Outcome,
    Shootdown, TlbKind, Vcpu, Width,
};

const GUEST_PAGES: u32 = 4096;
const CODE: u32 = 0x10_0000;
const DIRECTORY: u32 = 0x20_0000;
const DATA: u32 = 0x40_0000;
/// Of the first vCPU; each has a line of its own.
const COUNTER: u32 = 0x50_0000;
const LINE: u32 = 64;
/// From one vCPU's code to the next one's.
const CODE_STEP: u32 = 0x100;
const VCPUS_MAX: u32 = 2;
/// Operations of each kind in a round.
const ROUND: u32 = 15;
/// Loads that a soft vCPU makes between two looks at its flag.
const BLOCK: u32 = 64;
/// Flat 4 GiB code and data, DPL 0, accessed.
const GDT: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const PAGE_FAULT: u8 = 14;

const CONFIG: Config = Config { shadow_pages_max: 256, roots_max: 16, ..Config::of_pages(GUEST_PAGES) };

fn main() {
    let effort = Effort { batches: Effort::from_args().batches.clamp(3, 60) };
    for vcpus in 1..=VCPUS_MAX {
        match Host::open() {
            Ok(host) => kvm(&host, effort, vcpus),
            Err(error) => println!("bench shootdown on kvm skipped: {error}"),
        }
        soft(effort, vcpus);
    }
}

/// Medians of a kind, round by round.
struct Kind {
    name: String,
    rounds: Vec<f64>,
}

impl Kind {
    fn new(name: &str, vcpus: u32) -> Kind {
        Kind { name: of_vcpus(name, vcpus), rounds: Vec::new() }
    }

    /// A round of `once`.
    fn round(&mut self, mut once: impl FnMut() -> Duration) {
        let times: Vec<f64> = (0..ROUND).map(|_| once().as_nanos() as f64).collect();
        self.rounds.push(quantile(&times, 0.5));
    }

    fn print(&self) {
        let mut samples = Samples::new();
        self.rounds.iter().for_each(|nanos| samples.add_nanos(*nanos));
        samples.print(&self.name, ROUND);
    }

    fn print_over(&self, other: &Kind, name: &str) {
        let ratios: Vec<f64> = self.rounds.iter().zip(&other.rounds).map(|(a, b)| a / b).collect();
        let (p10, p90) = (quantile(&ratios, 0.1), quantile(&ratios, 0.9));
        println!(
            "bench {name}={:.3} x p10={p10:.3} p90={p90:.3} rounds={}",
            quantile(&ratios, 0.5),
            ratios.len()
        );
    }
}

/// The name of a figure with so many vCPUs.
fn of_vcpus(name: &str, vcpus: u32) -> String {
    if vcpus == 1 { name.into() } else { format!("{name}_{vcpus}") }
}

/// Prints how long the parts of the invalidations took.
fn print_stages(records: &[Record], name: &str) {
    let median = |part: fn(&Record) -> u64| {
        quantile(&records.iter().map(|record| part(record) as f64).collect::<Vec<_>>(), 0.5)
    };
    println!(
        "bench {name}_stages gate={} unmap={} shootdown={} finish={} total={} ns batches={}",
        median(|r| r.gate),
        median(|r| r.unmap),
        median(|r| r.shootdown),
        median(|r| r.finish),
        median(|r| r.total),
        records.len()
    );
}

/// The process's time.
#[derive(Debug)]
struct HostClock(Instant);

impl Clock for HostClock {
    fn now(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
}

fn timed(call: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    call();
    begun.elapsed()
}

/// The side of whoever takes pages.
struct Taker<'a> {
    mmu: &'a Mmu,
    window: LocalStack,
    vcpus: u32,
}

impl Taker<'_> {
    fn new(mmu: &Mmu, vcpus: u32) -> Taker<'_> {
        Taker { mmu, window: LocalStack::new(Context::Host), vcpus }
    }

    fn counter(&self, vcpu: u32) -> u64 {
        let counter = Gpa((COUNTER + LINE * vcpu).into());
        self.mmu.load(&self.window, counter, Width::B4).expect("guest memory")
    }

    /// Returns when every vCPU has been round twice: all run, and have the page.
    fn wait_until_inside(&self) {
        let before: Vec<u64> = (0..self.vcpus).map(|vcpu| self.counter(vcpu)).collect();
        for (vcpu, before) in (0..).zip(before) {
            while self.counter(vcpu).wrapping_sub(before) as u32 <= 1 {
                thread::yield_now();
            }
        }
    }

    fn page(&self) -> Duration {
        self.wait_until_inside();
        let gfn = DATA >> 12;
        timed(|| self.mmu.discard(None, gfn..gfn + 1, Discard::Zero, May::Sleep).expect("it may sleep"))
    }

    fn kick(&self) -> Duration {
        self.wait_until_inside();
        timed(|| {
            self.mmu.coherence().shoot_down(None);
        })
    }

    fn frame(&self) -> Mfn {
        self.wait_until_inside();
        loop {
            if let PageState::Resident(mfn) = self.mmu.p2m().lookup(Gfn(DATA >> 12)) {
                return mfn;
            }
        }
    }
}

/// Both ways to the vCPUs of KVM.
struct Ways(Vec<Kicker>, Notifier);

impl Shootdown for Ways {
    fn kick(&self, vcpu: u32) {
        self.0[vcpu as usize].kick();
    }

    fn notify(&self, frames: &mut dyn Iterator<Item = Mfn>) -> bool {
        for frame in frames {
            if self.1.drop_frame(frame).is_err() {
                return false;
            }
        }
        true
    }
}

fn kvm(host: &Host, effort: Effort, vcpus: u32) {
    let firmware = KvmVm::firmware_frames(vcpus).expect("few vCPUs");
    let frames = firmware + u64::from(GUEST_PAGES + CONFIG.table_frames_max());
    let pool = Arc::new(Pool::new(frames).expect("a pool"));
    let options = Options { vcpus, ..Options::default() };
    let vm = Arc::new(KvmVm::new(host, Arc::clone(&pool), options).expect("a VM"));
    let config = Config {
        reserved_frames: vm.first_free_frame().0,
        firmware_entry: vm.root_entry().1,
        vcpus,
        ..CONFIG
    };
    let kvm: Vec<KvmVcpu> = (0..vcpus).map(|vcpu| vm.create_vcpu(vcpu).expect("a vCPU")).collect();
    let kickers: Vec<Kicker> = kvm.iter().map(KvmVcpu::kicker).collect();
    let notifier = Notifier::new(Arc::clone(&vm));
    let ways = Ways(kickers.clone(), notifier.clone());
    let mmu = Mmu::new(Machine::new(pool.region()), config, Box::new(ways))
        .with_clock(Box::new(HostClock(Instant::now())));
    write_guest(&mmu);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let (mmu, stop) = (&mmu, &stop);
        for (id, vcpu) in (0..).zip(kvm) {
            scope.spawn(move || run_on_kvm(mmu, id, vcpu, stop));
        }
        measure_kvm(&Taker::new(mmu, vcpus), &notifier, effort);
        stop.store(true, Ordering::SeqCst);
        kickers.iter().for_each(Kicker::kick);
    });
    assert!(mmu.audit().is_empty());
}

fn measure_kvm(taker: &Taker<'_>, notifier: &Notifier, effort: Effort) {
    let mut kinds =
        ["shootdown_kick", "shootdown_kick_bare", "shootdown_notifier", "shootdown_notifier_bare"]
            .map(|name| Kind::new(name, taker.vcpus));
    // Its kick is of one thread.
    let mut peer = if taker.vcpus == 1 { Some(CPeer::start("kick", &[])) } else { None };
    let mut theirs = Kind::new("shootdown_kick_c", 1);
    let ledger = taker.mmu.coherence();
    let (mut by_kick, mut by_notifier) = (Vec::new(), Vec::new());
    for _ in 0..effort.batches {
        ledger.prefer_notifier(false);
        kinds[0].round(|| taker.page());
        by_kick.extend(taker.mmu.records().take().0);
        kinds[1].round(|| taker.kick());
        if let Some(Ok(nanos)) = peer.as_mut().and_then(|peer| peer.as_mut().ok()).map(|peer| peer.ask(ROUND))
        {
            theirs.rounds.push(nanos);
        }
        ledger.prefer_notifier(true);
        kinds[2].round(|| taker.page());
        by_notifier.extend(taker.mmu.records().take().0);
        kinds[3].round(|| {
            let frame = taker.frame();
            timed(|| notifier.drop_frame(frame).expect("a frame of the pool"))
        });
    }
    print_stages(&by_kick, &of_vcpus("shootdown_kick", taker.vcpus));
    print_stages(&by_notifier, &of_vcpus("shootdown_notifier", taker.vcpus));
    kinds.iter().for_each(Kind::print);
    kinds[0].print_over(&kinds[1], &of_vcpus("shootdown_kick_over_bare", taker.vcpus));
    kinds[2].print_over(&kinds[3], &of_vcpus("shootdown_notifier_over_bare", taker.vcpus));
    match peer {
        Some(Ok(_)) => {
            theirs.print();
            kinds[1].print_over(&theirs, "shootdown_kick_bare_over_c");
        }
        Some(Err(why)) => println!("bench shootdown_kick_bare_over_c skipped: {why}"),
        None => {}
    }
}

/// The vCPU's thread, as the kvm backend has it.
fn run_on_kvm(mmu: &Mmu, id: u32, mut kvm: KvmVcpu, stop: &AtomicBool) {
    let vcpu = paged(mmu, mmu.vcpu(id));
    let gdt: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    kvm.set_descriptors(&gdt, None).expect("descriptor tables");
    let mut cpu = CpuState::flat_protected_mode(CODE + CODE_STEP * id);
    cpu.cr0 |= cr0::PG | cr0::WP;
    cpu.cr3 = DIRECTORY;
    let ledger = mmu.coherence();
    loop {
        kvm.take_kick();
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let root = mmu.root_address(&vcpu, false).expect("frames for a root");
        if mmu.enter(&vcpu) {
            let epoch = ledger.begin_flush();
            let kicked = kvm.flush(&cpu, root).expect("a flush");
            ledger.end_flush(id, epoch);
            if kicked {
                mmu.leave_unrun(&vcpu);
                continue;
            }
        }
        let left = kvm.run_guest(&cpu, root).expect("the guest runs");
        mmu.leave(&vcpu);
        let exit = kvm.take(&mut cpu, left).expect("the guest's state");
        if let KvmExit::Trap { vector, error, cr2 } = exit {
            assert_eq!(vector, PAGE_FAULT, "the guest only faults");
            let kind = match error & 18 {
                0 => AccessKind::Read,
                2 => AccessKind::Write,
                _ => AccessKind::Execute,
            };
            fix(mmu, &vcpu, Gva(cr2 as u32), Access { kind, user: false });
        }
    }
}

fn fix(mmu: &Mmu, vcpu: &Vcpu, gva: Gva, access: Access) {
    match mmu.fault_sleeping(vcpu, gva, access).expect("frames are plenty") {
        Outcome::Fixed | Outcome::Spurious | Outcome::Again => {}
        outcome => panic!("{outcome:?} at {gva}"),
    }
}

fn paged(mmu: &Mmu, mut vcpu: Vcpu) -> Vcpu {
    let mode = Mode { paging: true, write_protect: true, ..Mode::default() };
    mmu.set_paging(&mut vcpu, mode, DIRECTORY, Flush::Yes).expect("no PDPTEs");
    vcpu
}

/// Code, and two-level tables that map it and the data one to one.
fn write_guest(mmu: &Mmu) {
    let window = LocalStack::new(Context::Host);
    let put = |gpa: u32, value: u32| {
        mmu.store(&window, Gpa(gpa.into()), Width::B4, value.into()).expect("guest memory");
    };
    for directory in 0..2 {
        let table = DIRECTORY + 0x1000 * (directory + 1);
        put(DIRECTORY + 4 * directory, table | 0x63);
        for entry in 0..1024 {
            put(table + 4 * entry, (directory << 22 | entry << 12) | 0x63);
        }
    }
    // mov eax, [DATA]; inc ecx; mov [COUNTER], ecx; mov edx, 100; dec edx; jnz; jmp back: it has the page, and does not
    // fault on it at once, which would be timed too.
    for vcpu in 0..VCPUS_MAX {
        let mut code = vec![0xa1];
        code.extend(DATA.to_le_bytes());
        code.extend([0x41, 0x89, 0x0d]);
        code.extend((COUNTER + LINE * vcpu).to_le_bytes());
        code.extend([0xba, 100, 0, 0, 0, 0x4a, 0x75, 0xfd, 0xeb, 0xea]);
        let at = Gpa((CODE + CODE_STEP * vcpu).into());
        mmu.write_bytes(&window, at, &code).expect("guest memory");
    }
}

/// The flags of soft vCPUs.
struct Flags(Arc<[AtomicU32]>);

impl Shootdown for Flags {
    fn kick(&self, vcpu: u32) {
        self.0[vcpu as usize].store(1, Ordering::SeqCst);
    }
}

fn soft(effort: Effort, vcpus: u32) {
    let flags: Arc<[AtomicU32]> = (0..vcpus).map(|_| AtomicU32::new(0)).collect();
    let config = Config { vcpus, ..CONFIG };
    let machine = Machine::anonymous(GUEST_PAGES + config.table_frames_max());
    let mmu = Mmu::new(machine, config, Box::new(Flags(Arc::clone(&flags))))
        .with_clock(Box::new(HostClock(Instant::now())));
    write_guest(&mmu);
    let stop = AtomicBool::new(false);
    let mut kinds = ["shootdown_soft", "shootdown_soft_bare"].map(|name| Kind::new(name, vcpus));
    thread::scope(|scope| {
        let (mmu, stop) = (&mmu, &stop);
        for (id, flag) in (0..).zip(flags.iter()) {
            scope.spawn(move || run_soft(mmu, id, flag, stop));
        }
        let taker = Taker::new(mmu, vcpus);
        for _ in 0..effort.batches {
            kinds[0].round(|| taker.page());
            kinds[1].round(|| taker.kick());
        }
        stop.store(true, Ordering::SeqCst);
        flags.iter().for_each(|flag| flag.store(1, Ordering::SeqCst));
    });
    print_stages(&mmu.records().take().0, &of_vcpus("shootdown_soft", vcpus));
    kinds.iter().for_each(Kind::print);
    kinds[0].print_over(&kinds[1], &of_vcpus("shootdown_soft_over_bare", vcpus));
    assert!(mmu.audit().is_empty());
}

/// The thread of a vCPU that has its translations from a software TLB, without an interpreter around it.
fn run_soft(mmu: &Mmu, id: u32, flag: &AtomicU32, stop: &AtomicBool) {
    let vcpu = paged(mmu, mmu.soft_vcpu(id, TlbKind::Sized));
    let (counter, mut count) = (COUNTER + LINE * id, 0);
    while !stop.load(Ordering::SeqCst) {
        flag.store(0, Ordering::SeqCst);
        mmu.tlb_enter(&vcpu);
        let missed = 'inside: loop {
            for _ in 0..BLOCK {
                if mmu.tlb_load(&vcpu, Gva(DATA), Width::B4, false).is_err() {
                    break 'inside Some((DATA, Access::read(false)));
                }
            }
            count += 1;
            if mmu.tlb_store(&vcpu, Gva(counter), Width::B4, count, false).is_err() {
                break 'inside Some((counter, Access::write(false)));
            }
            if flag.load(Ordering::Relaxed) != 0 {
                break 'inside None;
            }
        };
        mmu.leave(&vcpu);
        if let Some((gva, access)) = missed {
            fix(mmu, &vcpu, Gva(gva), access);
        }
    }
}
