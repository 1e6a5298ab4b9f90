//! The mmu crate's hot paths, with no hardware.
//!
//! | figure | what is timed | bar |
//! |---|---|---|
//! | fill | a fault on a page nobody has touched since its entry was written: walk, A, gate, spte, rmap | 250 ns |
//! | fill_store | the same by a store: D too | |
//! | refill | a fault on a known page whose spte an invalidation took | 120 ns |
//! | spurious | a fault on a page whose spte is there | |
//! | fill_zero | a fill that gives the page its frame, cleared | |
//! | fill_table | a fill that needs a new shadow page below a new link | |
//! | window_load | a load through the window | 15 ns |
//! | window_persistent | a page taken from the window's pool, where its slot is idle, loaded from and let go | |
//! | window_session_8 | a device's request (`mmu::dma`): eight pages whose slots are idle planned, loaded from and let go | |
//! | invlpg_unchanged, invlpg_prefill | INVLPG of a page whose spte is there, and of one whose is not | |
//! | guest_fault | a fault that is the guest's | |
//! | cr3_load | MOV CR3 between two address spaces, with the look for the root | |
//! | tracked_store | an emulated store to a page table that takes an spte away | |
//! | invalidate_batch | 512 pages of one spte each discarded in one batch, no vCPU in the guest, and no work of the host's: a page | 60 ns |
//! | invalidate_one | one such page | 1 us |
//! | fill_exported, invalidate_exported | a fill, and a page discarded in a batch, of pages that nobody has imported, where the guest exports its memory and somebody has a page of it, over the same where it does not, turn by turn | 1 |
//! | evict_refault | a dirty page to swap in memory and back, until it may be stored to: copied twice | 6 us |
//! | evict_refault_over_uffd | the same over userfaultfd and madvise, turn by turn (`peers/refault.c`) | 1 |
//! | fill_threads_2_over_1 | refills a second on two threads, in address spaces of their own, over one's | 1.8 |
//! | fill_threads_2_over_1_one_bucket | the same where all pages share one lock and one gate | |

use std::hint::black_box;
use std::io;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use umbra_benches::c_peer::CPeer;
use umbra_benches::peer::quantile;
use umbra_benches::{Effort, Samples, measure};
use umbra_mmu::discard::Discard;
use umbra_mmu::dma::Session;
use umbra_mmu::external::{Answers, External, ImporterId};
use umbra_mmu::frames::Host;
use umbra_mmu::invalidation::May;
use umbra_mmu::records::Clock;
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::window::Intent;
use umbra_mmu::{
    Access, Config, Context, Flush, Gfn, Gpa, Gva, LocalStack, Machine, Mfn, Mmu, Mode, NoVcpus, Outcome,
    Vcpu, Width,
};
use vm_memory::{Bytes, GuestAddress, Permissions};

/// Pages in the range that is mapped and unmapped: one page table's.
const PAGES: u32 = 512;
const GUEST_PAGES: u32 = 16 << 10;
/// Bits of a guest's entry: present, writable; accessed and dirty.
const PRESENT: u32 = 0x3;
const USED: u32 = 0x60;
/// Tables that `fill_table` fills by turns.
const TABLES: u32 = 64;

/// One vCPU with two-level tables of its own that map [`PAGES`] pages at 4 MiB.
struct Space<'a> {
    mmu: &'a Mmu,
    vcpu: Vcpu,
    window: LocalStack,
    number: u32,
}

fn world(vcpus: u32) -> Mmu {
    world_in(Machine::anonymous(GUEST_PAGES + 4096), vcpus)
}

fn world_in(machine: Machine, vcpus: u32) -> Mmu {
    Mmu::new(machine, Config { vcpus, ..config() }, Box::new(NoVcpus))
}

fn config() -> Config {
    Config { reserved_frames: 1, shadow_pages_max: 1024, roots_max: 64, ..Config::of_pages(GUEST_PAGES) }
}

/// A guest that exports its memory. Importer 1 has its last page, and is never told to give it up.
fn exporting() -> Mmu {
    #[derive(Debug)]
    struct Nobody;
    impl External for Nobody {
        fn tell(&self, _order: u64, importer: ImporterId, pages: &[Gfn]) {
            panic!("{importer:?} is told of {pages:?}, which it does not have");
        }

        fn wait(&self, _order: u64) -> Answers {
            Answers::default()
        }
    }
    let machine = Machine::anonymous(2 * GUEST_PAGES + 4096);
    let mmu = Mmu::new(machine, Config { homes: true, ..config() }, Box::new(NoVcpus))
        .with_clock(Box::new(HostClock(Instant::now())))
        .with_external(Box::new(Nobody));
    let last = Gfn(GUEST_PAGES - 1);
    let segment = mmu.make_segment(last, 1, false).expect("no segment is there");
    mmu.import_page(ImporterId(1), segment, last, false).expect("the page can be moved");
    mmu
}

fn gva(page: u32) -> Gva {
    Gva(0x40_0000 + (page << 12))
}

impl<'a> Space<'a> {
    fn new(mmu: &'a Mmu, number: u32) -> Space<'a> {
        let mut space = Space { mmu, vcpu: mmu.vcpu(number), window: LocalStack::new(Context::Host), number };
        space.write_entry(space.base(), 1, space.table() << 12 | PRESENT);
        space.map_all(USED);
        let mode = Mode { paging: true, write_protect: true, ..Mode::default() };
        let cr3 = space.base() << 12;
        mmu.set_paging(&mut space.vcpu, mode, cr3, Flush::Yes).expect("two-level tables have no PDPTEs");
        space
    }

    /// Its first frame in guest memory: the directory. The table and the data follow.
    fn base(&self) -> u32 {
        0x100 + self.number * 0x1000
    }

    fn table(&self) -> u32 {
        self.base() + 1
    }

    fn frame(&self, page: u32) -> u32 {
        self.base() + 0x100 + page
    }

    fn write_entry(&self, table: u32, index: u32, entry: u32) {
        let at = Gfn(table).at(4 * index);
        self.mmu.store(&self.window, at, Width::B4, u64::from(entry)).expect("guest memory");
    }

    /// Writes the whole table anew, which takes every spte of it away.
    fn map_all(&self, status: u32) {
        let entries = (0..PAGES).flat_map(|page| (self.frame(page) << 12 | PRESENT | status).to_le_bytes());
        let bytes: Vec<u8> = entries.collect();
        self.mmu.write_bytes(&self.window, Gfn(self.table()).at(0), &bytes).expect("guest memory");
    }

    #[inline]
    fn touch_all(&self, access: Access, outcome: Outcome) {
        for page in 0..PAGES {
            assert_eq!(self.mmu.fault(&self.vcpu, gva(page), access), outcome);
        }
    }

    fn fill(&self) {
        self.touch_all(Access::read(false), Outcome::Fixed);
    }

    /// Takes all sptes of the range away, as an invalidation would: each frame is unmapped through its reverse map.
    fn zap_all(&self) {
        (0..PAGES).for_each(|page| self.mmu.zap_frame(Gfn(self.frame(page))));
    }
}

/// Figures that are measured together, by name.
type Group = (&'static str, fn(Effort));

/// `cargo bench --bench mmu -- fills window` runs those groups alone.
fn main() {
    let effort = Effort::from_args();
    let groups: [Group; 11] = [
        ("fills", fills),
        ("first_touches", first_touches),
        ("new_tables", new_tables),
        ("window", window),
        ("invlpg", invlpg),
        ("guest_faults", guest_faults),
        ("control_registers", control_registers),
        ("invalidations", invalidations),
        ("exported", exported),
        ("evictions", evictions),
        ("threads", threads),
    ];
    let named: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    for (_, run) in groups.iter().filter(|(name, _)| named.is_empty() || named.iter().any(|n| n == name)) {
        run(effort);
    }
}

fn fills(effort: Effort) {
    let mmu = world(1);
    let space = Space::new(&mmu, 0);
    space.fill();
    measure(effort, PAGES, || space.map_all(0), || space.fill()).print("fill", PAGES);
    let store = || space.touch_all(Access::write(false), Outcome::Fixed);
    measure(effort, PAGES, || space.map_all(0), store).print("fill_store", PAGES);
    measure(effort, PAGES, || space.zap_all(), || space.fill()).print("refill", PAGES);
    let again = || space.touch_all(Access::read(false), Outcome::Spurious);
    measure(effort, PAGES, || {}, again).print("spurious", PAGES);
    assert!(mmu.audit().is_empty());
}

fn first_touches(effort: Effort) {
    let mut samples = Samples::new();
    for _ in 0..effort.batches.div_ceil(20) {
        let machine = Machine::anonymous(GUEST_PAGES + 4096);
        // The host's own first touch of the memory is not our cost.
        (0..machine.frames()).for_each(|mfn| machine.clear(Mfn(mfn)));
        let mmu = world_in(machine, 1);
        let space = Space::new(&mmu, 0);
        assert_eq!(mmu.fault(&space.vcpu, gva(0), Access::read(false)), Outcome::Fixed);
        mmu.zap_frame(Gfn(space.frame(0)));
        let start = Instant::now();
        space.fill();
        samples.add(start.elapsed(), PAGES);
    }
    samples.print("fill_zero", PAGES);
}

fn new_tables(effort: Effort) {
    let mmu = world(1);
    let space = Space::new(&mmu, 0);
    let table = |n: u32| space.base() + 0x400 + n;
    let at = |n: u32| Gva((n + 2) << 22);
    for n in 0..TABLES {
        space.write_entry(space.base(), n + 2, table(n) << 12 | PRESENT | USED);
        space.write_entry(table(n), 0, space.frame(n) << 12 | PRESENT | USED);
    }
    let touch = || {
        for n in 0..TABLES {
            assert_eq!(mmu.fault(&space.vcpu, at(n), Access::read(false)), Outcome::Fixed);
        }
    };
    touch();
    // The directory goes too: one of the faults makes two pages.
    let forget = || {
        mmu.evict_shadow(u32::MAX);
    };
    measure(effort, TABLES, forget, touch).print("fill_table", TABLES);
}

fn window(effort: Effort) {
    let mmu = world(1);
    let stack = LocalStack::new(Context::Host);
    let calls = 4096;
    let at = Gpa(0x10_0000);
    mmu.store(&stack, at, Width::B4, 1).expect("guest memory");
    let hit = || {
        for _ in 0..calls {
            assert_eq!(mmu.load(&stack, black_box(at), Width::B4), Ok(1));
        }
    };
    measure(effort, calls, || {}, hit).print("window_load", calls);
    let again = || {
        for _ in 0..calls {
            let map = mmu.take_page(black_box(at).gfn(), Intent::Read, None).expect("guest memory");
            assert_eq!(map.load(0, Width::B4), 1);
        }
    };
    measure(effort, calls, || {}, again).print("window_persistent", calls);
    // A device's request: eight pages, planned and read.
    let range = (GuestAddress(at.0), 8 << 12);
    let request = || {
        for _ in 0..calls {
            let touch = |plan: &Session<'_>| plan.touch(range.0, range.1, Permissions::Read).is_ok();
            let (session, planned) = mmu.session(None, touch).expect("guest memory");
            assert!(planned && session.load::<u32>(range.0, Ordering::Relaxed).is_ok_and(|word| word == 1));
        }
    };
    measure(effort, calls, || {}, request).print("window_session_8", calls);
}

fn invlpg(effort: Effort) {
    let mmu = world(1);
    let space = Space::new(&mmu, 0);
    space.fill();
    let all = || (0..PAGES).for_each(|page| mmu.invalidate_page(&space.vcpu, gva(page)));
    measure(effort, PAGES, || {}, all).print("invlpg_unchanged", PAGES);
    let before = space.vcpu.stats().prefilled;
    measure(effort, PAGES, || space.zap_all(), all).print("invlpg_prefill", PAGES);
    let made = space.vcpu.stats().prefilled - before;
    assert_eq!(made, u64::from(PAGES) * u64::from(effort.batches), "every INVLPG prefilled");
}

fn guest_faults(effort: Effort) {
    let mmu = world(1);
    let space = Space::new(&mmu, 0);
    space.fill();
    let user = || {
        for page in 0..PAGES {
            let outcome = mmu.fault(&space.vcpu, gva(page), Access::read(true));
            assert!(matches!(outcome, Outcome::Guest(_)));
        }
    };
    measure(effort, PAGES, || {}, user).print("guest_fault", PAGES);
}

fn control_registers(effort: Effort) {
    let mmu = world(2);
    let (mut space, other) = (Space::new(&mmu, 0), Space::new(&mmu, 1));
    space.fill();
    other.fill();
    let mode = space.vcpu.mode();
    let calls = 64;
    let mut switch = || {
        for n in 0..calls {
            let cr3 = if n & 1 == 0 { other.base() } else { space.base() } << 12;
            mmu.set_paging(&mut space.vcpu, mode, cr3, Flush::Yes).expect("no PDPTEs");
            assert!(black_box(mmu.root_address(&space.vcpu, false)).is_some());
        }
    };
    measure(effort, calls, || {}, &mut switch).print("cr3_load", calls);
    let stores = || {
        for page in 0..PAGES {
            space.write_entry(space.table(), page, space.frame(page) << 12 | PRESENT | USED);
        }
    };
    space.zap_all();
    measure(effort, PAGES, || space.fill(), stores).print("tracked_store", PAGES);
}

/// A clock that costs what a real one does.
#[derive(Debug)]
struct HostClock(Instant);

impl Clock for HostClock {
    fn now(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
}

/// A host that has nothing to do for frames that are given back: nobody has stored to them, and they are zeros already.
#[derive(Debug)]
struct Unwritten;

impl Host for Unwritten {
    fn give_back(&self, _frames: &[Mfn]) -> io::Result<()> {
        Ok(())
    }
}

fn invalidations(effort: Effort) {
    let clock = Box::new(HostClock(Instant::now()));
    let mmu = world(1).with_clock(clock).with_host(Box::new(Unwritten));
    let space = Space::new(&mmu, 0);
    let first = space.frame(0);
    let discard = |pages| mmu.discard(None, pages, Discard::Zero, May::Sleep).expect("no vCPU, no window");
    let all = || discard(first..first + PAGES);
    measure(effort, PAGES, || space.fill(), all).print("invalidate_batch", PAGES);
    let each = || (first..first + PAGES).for_each(|gfn| discard(gfn..gfn + 1));
    measure(effort, PAGES, || space.fill(), each).print("invalidate_one", PAGES);
    assert!(mmu.audit().is_empty());
}

/// What memory that is exported costs whoever has nothing to do with that.
fn exported(effort: Effort) {
    let worlds = [world(1).with_clock(Box::new(HostClock(Instant::now()))), exporting()];
    let spaces = worlds.each_ref().map(|mmu| Space::new(mmu, 0));
    let time = |work: &dyn Fn()| {
        let begun = Instant::now();
        work();
        begun.elapsed().as_nanos() as f64 / f64::from(PAGES)
    };
    let (mut fills, mut invalidations) = (Vec::new(), Vec::new());
    for _ in 0..effort.batches {
        let [plain, exporting] = spaces.each_ref().map(|space| {
            let pages = space.frame(0)..space.frame(0) + PAGES;
            let fill = time(&|| space.fill());
            let discard =
                || space.mmu.discard(None, pages.clone(), Discard::Zero, May::Sleep).expect("no vCPU");
            (fill, time(&discard))
        });
        fills.push(exporting.0 / plain.0);
        invalidations.push(exporting.1 / plain.1);
    }
    for (name, ratios) in [("fill_exported", fills), ("invalidate_exported", invalidations)] {
        println!("bench {name}={:.3} x batches={}", quantile(&ratios, 0.5), ratios.len());
    }
    worlds.iter().for_each(|mmu| assert!(mmu.audit().is_empty()));
}

fn evictions(effort: Effort) {
    let mmu = world(1)
        .with_clock(Box::new(HostClock(Instant::now())))
        .with_swap(Box::new(MemorySwap::new(GUEST_PAGES)));
    let space = Space::new(&mmu, 0);
    for page in 0..PAGES {
        space.write_entry(space.frame(page), 2, page + 1);
        assert_eq!(mmu.fault(&space.vcpu, gva(page), Access::write(false)), Outcome::Fixed);
    }
    let mut peer = CPeer::start("refault", &[]);
    let (mut ours, mut theirs, mut ratios) = (Samples::new(), Samples::new(), Vec::new());
    for _ in 0..effort.batches.min(500) {
        let begun = Instant::now();
        (0..PAGES).for_each(|page| evict_and_touch(&space, page));
        let nanos = begun.elapsed().as_nanos() as f64 / f64::from(PAGES);
        ours.add_nanos(nanos);
        match peer.as_mut().map_err(|why| why.clone()).and_then(|peer| peer.ask(PAGES)) {
            Ok(other) => {
                theirs.add_nanos(other);
                ratios.push(nanos / other);
            }
            Err(why) => peer = Err(why),
        }
    }
    assert!(mmu.audit().is_empty());
    ours.print("evict_refault", PAGES);
    match peer {
        Ok(_) => {
            theirs.print("evict_refault_uffd", PAGES);
            println!(
                "bench evict_refault_over_uffd={:.3} x batches={}",
                quantile(&ratios, 0.5),
                ratios.len()
            );
        }
        Err(why) => println!("bench evict_refault_over_uffd skipped: {why}"),
    }
}

/// A dirty page goes to swap, and comes back by a store to it.
fn evict_and_touch(space: &Space<'_>, page: u32) {
    let gfn = Gfn(space.frame(page));
    assert_eq!(space.mmu.page_out(None, &[gfn]), Ok(1));
    let touch = || space.mmu.fault(&space.vcpu, gva(page), Access::write(false));
    assert_eq!(touch(), Outcome::Need(gfn));
    assert_eq!(space.mmu.bring_in(None, gfn), Ok(()));
    assert_eq!(touch(), Outcome::Fixed);
}

/// Refills on two threads, each in an address space of its own, against one. Only what was measured while the other
/// thread really ran counts: the machine may have other things to do.
fn threads(effort: Effort) {
    let rounds = effort.batches.min(500);
    for (name, one_bucket) in [("fill_threads_2_over_1", false), ("fill_threads_2_over_1_one_bucket", true)] {
        let mut alone = Samples::new();
        let mut both = Samples::new();
        for _ in 0..5 {
            refills(1, rounds, one_bucket, &mut alone);
            refills(2, rounds, one_bucket, &mut both);
        }
        let (one, two) = (1e9 / alone.median(), 2e9 / both.median());
        let ratio = two / one;
        println!("bench {name}={ratio:.2} x alone={one:.0}/s both={two:.0}/s batches={}", both.count());
    }
}

/// Fills between two beats of a thread's [`Progress`].
const BEAT: u32 = 32;

/// How far a thread has come, in a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Progress(AtomicU32);

/// Nanoseconds a refill, on `count` threads at once.
fn refills(count: usize, rounds: u32, one_bucket: bool, into: &mut Samples) {
    let config = Config { vcpus: 2, one_bucket, ..config() };
    let mmu = Mmu::new(Machine::anonymous(GUEST_PAGES + 4096), config, Box::new(NoVcpus));
    let progress: [Progress; 2] = Default::default();
    let barrier = Barrier::new(count);
    let work = |n: usize| {
        let space = Space::new(&mmu, n as u32);
        space.fill();
        barrier.wait();
        let others = || progress[1 - n].0.load(Ordering::Relaxed);
        let mut times = Vec::new();
        for _ in 0..rounds {
            space.zap_all();
            let (before, start) = (others(), Instant::now());
            for page in 0..PAGES {
                assert_eq!(mmu.fault(&space.vcpu, gva(page), Access::read(false)), Outcome::Fixed);
                if page % BEAT == 0 {
                    progress[n].0.fetch_add(1, Ordering::Relaxed);
                }
            }
            let time = start.elapsed();
            // The other thread filled at the same time, for a quarter of it at least.
            if count == 1 || others() - before >= PAGES / BEAT / 4 {
                times.push(time);
            }
        }
        times
    };
    std::thread::scope(|scope| {
        let work = &work;
        let workers: Vec<_> = (0..count).map(|n| scope.spawn(move || work(n))).collect();
        for worker in workers {
            let times = worker.join().expect("a worker does not panic");
            times.into_iter().for_each(|time| into.add(time, PAGES));
        }
    });
    assert!(mmu.audit().is_empty());
}
