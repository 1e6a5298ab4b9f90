//! Ranges that are gathered while others use them: each who comes in the middle, and many at once.
//!
//! The guest has paging off, so that a page's address is its frame's; its vCPU has a software TLB that forgets nothing.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use proptest::prelude::RngExt;
use proptest::test_runner::TestRng;
use umbra_mmu::discard::Discard;
use umbra_mmu::external::ImporterId;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::{PageState, Range, TABLE_ENTRIES};
use umbra_mmu::records::{Cause, Clock};
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::sync::AtomicBool;
use umbra_mmu::window::Intent;
use umbra_mmu::{
    Access, AccessKind, Collapser, Config, Context, Flush, Gfn, Gva, LocalStack, Machine, Mfn, Miss, Mmu,
    Mode, NoVcpus, NotCollapsed, Outcome, Shootdown, TlbKind, Vcpu, Width,
};

use crate::model::run::{audit, number, rng, seconds};
use umbra_mmu::twins::{Kick, SoftCpu};

const RANGE: u32 = TABLE_ENTRIES as u32;
/// Ranges of the guest; the first is low memory.
const RANGES: u32 = 4;
/// The range that is collapsed, and a page in its third batch.
const FIRST: Gfn = Gfn(RANGE);
const PAGE: Gfn = Gfn(RANGE + 150);
/// A page in its first.
const EARLY: Gfn = Gfn(RANGE + 3);

fn config(homes: bool) -> Config {
    Config { low_pages: RANGE, blocks: true, homes, ..Config::of_pages(RANGES * RANGE) }
}

fn mmu_with(config: Config, shootdown: Box<dyn Shootdown>) -> Mmu {
    let homes = if config.homes { config.guest_pages } else { 0 };
    let machine = Machine::anonymous(RANGES * RANGE + 400 + config.block_frames() + homes);
    Mmu::new(machine, config, shootdown).with_swap(Box::new(MemorySwap::new(RANGES * RANGE)))
}

fn mmu() -> Mmu {
    mmu_with(config(false), Box::new(NoVcpus))
}

fn write(mmu: &Mmu, gfn: Gfn, value: u64) {
    let window = LocalStack::new(Context::Host);
    mmu.write_bytes_sleeping(None, &window, gfn.at(16), &value.to_le_bytes()).expect("a frame");
}

fn read(mmu: &Mmu, gfn: Gfn) -> u64 {
    let (window, mut bytes) = (LocalStack::new(Context::Host), [0; 8]);
    mmu.read_bytes_sleeping(None, &window, gfn.at(16), &mut bytes).expect("a frame");
    u64::from_le_bytes(bytes)
}

/// What the page has at first.
fn value(gfn: Gfn) -> u64 {
    0x5a5a_0000_0000 | u64::from(gfn.0)
}

fn pages() -> impl Iterator<Item = Gfn> {
    (FIRST.0..FIRST.0 + RANGE).map(Gfn)
}

fn fill(mmu: &Mmu) {
    pages().for_each(|gfn| write(mmu, gfn, value(gfn)));
}

/// All pages are in frames that follow each other, from an aligned one on.
fn is_contiguous(mmu: &Mmu) -> bool {
    let Range::Huge(base) = mmu.p2m().range(FIRST) else { return false };
    let place = |gfn: Gfn| PageState::Resident(Mfn(base.0 + gfn.0 - FIRST.0));
    base.0.is_multiple_of(RANGE) && pages().all(|gfn| mmu.p2m().lookup(gfn) == place(gfn))
}

fn check(mmu: &Mmu, but: Option<Gfn>) {
    for gfn in pages().filter(|gfn| Some(*gfn) != but) {
        assert_eq!(read(mmu, gfn), value(gfn), "{gfn}");
    }
    audit(mmu);
}

#[test]
fn a_collapsed_range_is_contiguous_and_has_what_it_had() {
    let mmu = mmu();
    fill(&mmu);
    let used = mmu.usage().frames_used;
    assert_eq!(mmu.p2m().range(FIRST), Range::Table);
    assert_eq!(mmu.collapse(PAGE), Ok(()));
    assert!(is_contiguous(&mmu));
    check(&mmu, None);
    let stats = mmu.huge_stats();
    assert_eq!((stats.huge, stats.collapsed, stats.moved, stats.filled), (1, 1, RANGE.into(), 0));
    assert_eq!(mmu.collapse(FIRST), Err(NotCollapsed::NotATable(FIRST)), "it is huge");
    assert!(mmu.split(PAGE) && !mmu.split(PAGE));
    assert_eq!(mmu.p2m().range(FIRST), Range::Table);
    check(&mmu, None);
    // Where they are is where they were to go.
    assert_eq!((mmu.collapse(FIRST), mmu.huge_stats().moved), (Ok(()), RANGE.into()));
    assert!(mmu.usage().frames_used <= used + 64, "the old frames are free");
}

#[test]
fn pages_that_are_not_there_are_filled_and_what_cannot_be_is_named() {
    let mmu = mmu();
    let absent = [FIRST, PAGE, Gfn(FIRST.0 + RANGE - 1)];
    pages().filter(|gfn| !absent.contains(gfn)).for_each(|gfn| write(&mmu, gfn, value(gfn)));
    let out: Vec<Gfn> = (10..30).map(|n| Gfn(FIRST.0 + n)).collect();
    assert_eq!(mmu.page_out(None, &out), Ok(20));
    assert_eq!(mmu.collapse(FIRST), Ok(()));
    assert!(is_contiguous(&mmu) && absent.iter().all(|gfn| read(&mmu, *gfn) == 0));
    assert_eq!((mmu.huge_stats().filled, mmu.usage().swapped), (3, 0));
    absent.iter().for_each(|gfn| write(&mmu, *gfn, value(*gfn)));
    check(&mmu, None);

    assert_eq!(mmu.collapse(Gfn(0)), Err(NotCollapsed::NoBlock(Gfn(0))), "low memory");
    let (third, fourth) = (Gfn(2 * RANGE), Gfn(3 * RANGE));
    assert_eq!(mmu.collapse(third), Err(NotCollapsed::NotATable(third)), "never touched");
    write(&mmu, third, 1);
    mmu.discard(None, [third.0 + 9], Discard::Balloon, May::Sleep).expect("nobody has it");
    assert_eq!(mmu.collapse(third), Err(NotCollapsed::Absent(Gfn(third.0 + 9))));
    assert!(mmu.make_device(Gfn(fourth.0 + 9)));
    write(&mmu, fourth, 1);
    assert_eq!(mmu.collapse(fourth), Err(NotCollapsed::Absent(Gfn(fourth.0 + 9))));
    audit(&mmu);
}

#[test]
fn a_page_that_leaves_a_huge_range_splits_it_whoever_takes_it() {
    type Take = fn(&Mmu);
    let takers: [(&str, Take, u64); 4] = [
        ("discard", |mmu| mmu.discard(None, [PAGE.0], Discard::Zero, May::Sleep).expect("nobody has it"), 0),
        (
            "balloon",
            |mmu| mmu.discard(None, [PAGE.0], Discard::Balloon, May::Sleep).expect("nobody has it"),
            0,
        ),
        ("page-out", |mmu| assert_eq!(mmu.page_out(None, &[PAGE]), Ok(1)), value(PAGE)),
        ("watch", |mmu| assert_eq!(mmu.watch(&mmu.vcpu(0), PAGE), Ok(true)), value(PAGE)),
    ];
    for (name, take, left) in takers {
        let mmu = mmu();
        fill(&mmu);
        assert_eq!(mmu.collapse(FIRST), Ok(()));
        take(&mmu);
        assert_eq!((mmu.p2m().range(FIRST), mmu.huge_stats().split), (Range::Table, 1), "{name}");
        assert_eq!(read(&mmu, PAGE), left, "{name}");
        check(&mmu, Some(PAGE));
    }
}

#[test]
fn frames_that_leave_a_block_come_back_to_it_and_no_other_page_has_them() {
    let mmu = mmu();
    for _ in 0..5 {
        fill(&mmu);
        assert_eq!(mmu.collapse(FIRST), Ok(()));
        assert!(is_contiguous(&mmu));
        mmu.discard(None, FIRST.0..FIRST.0 + RANGE, Discard::Zero, May::Sleep).expect("nobody has them");
        // Others want frames.
        (0..RANGE).for_each(|n| write(&mmu, Gfn(2 * RANGE + n), 1));
        audit(&mmu);
    }
}

#[test]
fn few_frames_are_left_to_others() {
    let mmu = mmu();
    fill(&mmu);
    (0..RANGE - 1).for_each(|n| write(&mmu, Gfn(n), 1));
    mmu.set_budget(mmu.usage().frames_used + 80).expect("enough for what is there");
    assert_eq!(mmu.collapse(FIRST), Err(NotCollapsed::Short));
    let mut by = Collapser::default();
    assert_eq!((mmu.collapse_round(&mut by), mmu.collapse_round(&mut by)), (Ok(0), Ok(0)));
    assert_eq!((mmu.huge_stats().short, mmu.p2m().range(FIRST)), (1, Range::Table));
    check(&mmu, None);
}

#[test]
fn a_range_that_is_used_all_the_time_is_found_and_one_that_is_not_is_left() {
    let mmu = mmu();
    let (hot, idle) = (2 * RANGE, 3 * RANGE);
    let mut guest = SoftCpu::new(&mmu, TlbKind::Sized, Arc::default());
    let mut by = Collapser::default();
    for round in 0..4 {
        for n in 0..RANGE {
            guest.store(hot + n, 1, u64::from(n)).expect("frames");
            if round == 0 {
                guest.store(idle + n, 1, u64::from(n)).expect("frames");
            }
        }
        guest.leave();
        mmu.collapse_round(&mut by).expect("no swap is used");
    }
    // As a whole, once each of its pages is used again by whatever way.
    let fills = guest.tlb_fills();
    (0..RANGE).for_each(|n| assert_eq!(guest.load(hot + n, 1), Ok(n.into())));
    assert!(guest.tlb_fills() - fills <= 1, "{} fills", guest.tlb_fills() - fills);
    let ranges = [hot, idle].map(|first| matches!(mmu.p2m().range(Gfn(first)), Range::Huge(_)));
    assert_eq!((ranges, mmu.huge_stats().collapsed), ([true, false], 1));
    for n in 0..RANGE {
        assert_eq!(guest.load(hot + n, 1), Ok(n.into()));
    }
    guest.rest();
    audit(&mmu);
}

/// The guest's page directory: the range by half an entry of 4 MiB, or one of 2 MiB, from linear 0x4000_0000 on.
const DIRECTORY: Gfn = Gfn(8);
const LINEAR: u32 = 0x4000_0000;

/// A vCPU with paging on, whose directory maps all of the guest's memory large.
fn paged(mmu: &Mmu, pae: bool, kind: TlbKind) -> Vcpu {
    const PRESENT_WRITABLE_LARGE: u32 = 0x83;
    let window = LocalStack::new(Context::Host);
    let put = |gpa, bytes: &[u8]| mmu.write_bytes(&window, gpa, bytes).expect("memory");
    let mode = Mode { paging: true, pae, pse: true, write_protect: true, ..Mode::default() };
    if pae {
        // A page-directory-pointer table, whose second entry is the directory.
        put(Gfn(9).at(8), &(u64::from(DIRECTORY.0) << 12 | 1).to_le_bytes());
        for n in 0..RANGES {
            let entry = u64::from(n * RANGE) << 12 | u64::from(PRESENT_WRITABLE_LARGE);
            put(DIRECTORY.at(n * 8), &entry.to_le_bytes());
        }
    } else {
        for n in 0..RANGES / 2 {
            let entry = (n * 2 * RANGE) << 12 | PRESENT_WRITABLE_LARGE;
            put(DIRECTORY.at((LINEAR >> 22) * 4 + n * 4), &entry.to_le_bytes());
        }
    }
    let mut vcpu = mmu.soft_vcpu(0, kind);
    let cr3 = if pae { 9 << 12 } else { DIRECTORY.0 << 12 };
    mmu.set_paging(&mut vcpu, mode, cr3, Flush::Yes).expect("it is memory");
    vcpu
}

fn gva(gfn: Gfn) -> Gva {
    Gva(LINEAR + (gfn.0 << 12) + 16)
}

/// Stores (`Some`) to the page, or not, and loads, as a backend does: what is there then.
fn access(mmu: &Mmu, vcpu: &Vcpu, gfn: Gfn, value: Option<u64>) -> u64 {
    let at = gva(gfn);
    for _ in 0..8 {
        mmu.tlb_enter(vcpu);
        let stored = value.map_or(Ok(()), |value| mmu.tlb_store(vcpu, at, Width::B8, value, false));
        let done = stored.and_then(|()| mmu.tlb_load(vcpu, at, Width::B8, false));
        mmu.leave(vcpu);
        match done {
            Ok(value) => return value,
            Err(Miss::Incoherent(violation)) => panic!("{violation}"),
            Err(Miss::Fault) => {}
        }
        let kind = if value.is_some() { AccessKind::Write } else { AccessKind::Read };
        let done = mmu.fault_sleeping(vcpu, at, Access { kind, user: false }).expect("frames");
        assert!(matches!(done, Outcome::Fixed | Outcome::Spurious | Outcome::Again), "{at}: {done:?}");
    }
    panic!("{at} cannot be reached");
}

fn fills(vcpu: &Vcpu) -> u64 {
    vcpu.tlb().expect("it has one").stats().fills
}

const LOSSY: TlbKind = TlbKind::Lossy(7);

fn ways() -> impl Iterator<Item = (bool, TlbKind)> {
    let kinds = [TlbKind::Sized, TlbKind::Sticky, LOSSY];
    [false, true].into_iter().flat_map(move |pae| kinds.map(|kind| (pae, kind)))
}

#[test]
fn a_huge_range_that_the_guest_maps_large_takes_one_entry_of_a_tlb() {
    for (pae, kind) in ways() {
        let mmu = mmu();
        fill(&mmu);
        let vcpu = paged(&mmu, pae, kind);
        pages().for_each(|gfn| assert_eq!(access(&mmu, &vcpu, gfn, None), value(gfn)));
        let small = fills(&vcpu);
        assert!(small >= RANGE.into());
        assert_eq!(mmu.collapse(FIRST), Ok(()));
        pages().for_each(|gfn| assert_eq!(access(&mmu, &vcpu, gfn, Some(value(gfn))), value(gfn)));
        let large = fills(&vcpu) - small;
        // A lossy one forgets it once in eight times.
        let most = if kind == LOSSY { RANGE.into() } else { 2 };
        assert!(large > 0 && large <= most, "pae {pae}, {kind:?}: {large} fills");
        audit(&mmu);
        let told = mmu.explain(&vcpu, gva(PAGE)).to_string();
        assert!(told.contains("huge range"), "{told}");

        // The directory's entry goes: so does the leaf.
        let window = LocalStack::new(Context::Host);
        let entry = if pae { DIRECTORY.at(8) } else { DIRECTORY.at((LINEAR >> 22) * 4) };
        mmu.write_bytes(&window, entry, &[0; 4]).expect("memory");
        mmu.invalidate_page(&vcpu, gva(PAGE));
        mmu.tlb_enter(&vcpu);
        assert_eq!(
            mmu.tlb_load(&vcpu, gva(EARLY), Width::B8, false),
            Err(Miss::Fault),
            "pae {pae}, {kind:?}"
        );
        mmu.leave(&vcpu);
        let done = mmu.fault_sleeping(&vcpu, gva(PAGE), Access::read(false)).expect("frames");
        assert!(matches!(done, Outcome::Guest(_)), "pae {pae}, {kind:?}: {done:?}");
        audit(&mmu);
    }
}

#[test]
fn a_range_that_is_mapped_large_is_split_by_whoever_takes_a_page_or_watches_it() {
    for (pae, kind) in ways() {
        let mmu = mmu();
        fill(&mmu);
        let vcpu = paged(&mmu, pae, kind);
        let large = |mmu: &Mmu| {
            assert_eq!(mmu.collapse(FIRST), Ok(()), "pae {pae}, {kind:?}");
            access(mmu, &vcpu, EARLY, Some(value(EARLY)));
        };
        large(&mmu);
        mmu.discard(None, [PAGE.0], Discard::Zero, May::Sleep).expect("nobody holds it");
        assert_eq!(access(&mmu, &vcpu, PAGE, None), 0, "pae {pae}, {kind:?}");
        assert_eq!(access(&mmu, &vcpu, PAGE, Some(9)), 9);
        audit(&mmu);
        large(&mmu);
        assert_eq!(mmu.page_out(None, &[PAGE]), Ok(1));
        assert_eq!(access(&mmu, &vcpu, PAGE, None), 9, "pae {pae}, {kind:?}");
        audit(&mmu);
        large(&mmu);
        assert!(mmu.split(PAGE));
        assert_eq!(access(&mmu, &vcpu, PAGE, Some(10)), 10);
        audit(&mmu);
        large(&mmu);
        assert_eq!(mmu.watch(&vcpu, PAGE), Ok(true));
        mmu.tlb_enter(&vcpu);
        assert_eq!(
            mmu.tlb_store(&vcpu, gva(PAGE), Width::B8, 11, false),
            Err(Miss::Fault),
            "pae {pae}, {kind:?}"
        );
        mmu.leave(&vcpu);
        let store = mmu.fault_sleeping(&vcpu, gva(PAGE), Access::write(false)).expect("frames");
        assert!(matches!(store, Outcome::Emulate(_)), "a watched page is written unseen: {store:?}");
        check(&mmu, Some(PAGE));
        // The shadow goes, page by page.
        mmu.unwatch(PAGE);
        large(&mmu);
        mmu.evict_shadow(1000);
        audit(&mmu);
        assert_eq!(access(&mmu, &vcpu, EARLY, None), value(EARLY));
        check(&mmu, Some(PAGE));
    }
}

type Act = Box<dyn FnOnce(&Arc<Mmu>) + Send>;

/// A clock by which somebody comes in, once: as soon as a page of the range is on its way (`in_hand`), or one is in its place.
#[derive(Clone, Default)]
struct Cue(Arc<Inner>);

#[derive(Default)]
struct Inner {
    mmu: OnceLock<Weak<Mmu>>,
    act: Mutex<Option<(Gfn, bool, Act)>>,
}

impl std::fmt::Debug for Cue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cue")
    }
}

impl Clock for Cue {
    fn now(&self) -> u64 {
        let Some(mmu) = self.0.mmu.get().and_then(Weak::upgrade) else { return 0 };
        let mut act = self.0.act.lock().expect("no panic");
        let is_due = act.as_ref().is_some_and(|(gfn, in_hand, _)| {
            let is_moving = matches!(mmu.p2m().range(*gfn), Range::Moving(_));
            is_moving && (mmu.p2m().lookup(*gfn) == PageState::Moving) == *in_hand
        });
        let due = if is_due { act.take() } else { None };
        drop(act);
        due.into_iter().for_each(|(_, _, act)| act(&mmu));
        0
    }
}

/// Collapses the range with `act` called when the page is in hand, or as soon as the first batch is done.
fn interrupted(homes: bool, gfn: Gfn, in_hand: bool, act: Act) -> (Arc<Mmu>, Result<(), NotCollapsed>) {
    let cue = Cue::default();
    let mmu = Arc::new(mmu_with(config(homes), Box::new(NoVcpus)).with_clock(Box::new(cue.clone())));
    fill(&mmu);
    cue.0.mmu.set(Arc::downgrade(&mmu)).expect("set once");
    *cue.0.act.lock().expect("no panic") = Some((gfn, in_hand, act));
    let done = mmu.collapse(FIRST);
    assert!(cue.0.act.lock().expect("no panic").is_none(), "nobody came in");
    (mmu, done)
}

const HIT: Result<(), NotCollapsed> = Err(NotCollapsed::Hit(FIRST));

#[test]
fn a_discard_in_the_middle_wins() {
    for gfn in [EARLY, PAGE] {
        let discard = move |mmu: &Arc<Mmu>| {
            mmu.discard(None, [gfn.0], Discard::Zero, May::Sleep).expect("nobody has it")
        };
        let (mmu, done) = interrupted(false, gfn, false, Box::new(discard));
        assert_eq!((done, mmu.p2m().range(FIRST), read(&mmu, gfn)), (HIT, Range::Table, 0), "{gfn}");
        check(&mmu, Some(gfn));
        // What it has left is good for the next.
        write(&mmu, gfn, value(gfn));
        assert_eq!(mmu.collapse(FIRST), Ok(()));
        check(&mmu, None);
    }
}

#[test]
fn a_discard_that_may_not_wait_for_the_batch_is_told_so() {
    let refused = Arc::new(AtomicBool::new(false));
    let told = refused.clone();
    let discard = move |mmu: &Arc<Mmu>| {
        let done = mmu.discard(None, [PAGE.0], Discard::Zero, May::NotSleep);
        told.store(done.is_err(), Ordering::SeqCst);
    };
    let (mmu, done) = interrupted(false, PAGE, true, Box::new(discard));
    assert!(refused.load(Ordering::SeqCst));
    assert_eq!((done, is_contiguous(&mmu)), (Ok(()), true), "nothing was taken");
    check(&mmu, None);
}

/// Those who wait in the middle of a collapse do so on a thread of their own, which is waited for when it is over.
fn beside<T: Send + 'static>(
    gfn: Gfn,
    act: impl FnOnce(&Mmu) -> T + Send + 'static,
) -> (Arc<Mmu>, Result<(), NotCollapsed>, T) {
    let thread = Arc::new(Mutex::new(None));
    let started = thread.clone();
    let start = move |mmu: &Arc<Mmu>| {
        let mmu = mmu.clone();
        *started.lock().expect("no panic") = Some(std::thread::spawn(move || act(&mmu)));
        // So that it is at the gate, most times; it comes out the same.
        std::thread::sleep(Duration::from_millis(2));
    };
    let (mmu, done) = interrupted(false, gfn, true, Box::new(start));
    let thread = thread.lock().expect("no panic").take().expect("it came in");
    let out = thread.join().expect("no panic");
    (mmu, done, out)
}

#[test]
fn a_discard_of_a_page_in_hand_waits_for_it_and_wins() {
    let discard = |mmu: &Mmu| mmu.discard(None, [PAGE.0], Discard::Zero, May::Sleep);
    let (mmu, _, discarded) = beside(PAGE, discard);
    assert_eq!((discarded, read(&mmu, PAGE), mmu.p2m().range(FIRST)), (Ok(()), 0, Range::Table));
    check(&mmu, Some(PAGE));
}

#[test]
fn a_store_to_a_page_in_hand_waits_for_it_and_is_kept() {
    let (mmu, done, ()) = beside(PAGE, |mmu| {
        let mut guest = SoftCpu::new(mmu, TlbKind::Sticky, Arc::default());
        guest.store(PAGE.0, 2, 7).expect("frames");
        guest.rest();
    });
    assert_eq!((done, is_contiguous(&mmu), read(&mmu, PAGE)), (Ok(()), true, 7));
    check(&mmu, Some(PAGE));
}

#[test]
fn a_store_to_a_page_that_is_not_in_hand_is_kept() {
    for gfn in [EARLY, PAGE] {
        let (mmu, done) = interrupted(false, gfn, false, Box::new(move |mmu| write(mmu, gfn, 7)));
        assert_eq!((done, is_contiguous(&mmu), read(&mmu, gfn)), (Ok(()), true, 7), "{gfn}");
        check(&mmu, Some(gfn));
    }
}

#[test]
fn a_page_that_is_pinned_stays_and_the_range_is_not_huge() {
    let mmu = mmu();
    fill(&mmu);
    // As another thread would have it.
    let map = mmu.try_take_page(PAGE, Intent::Write).expect("resident").pass_on();
    let refused = mmu.collapse(FIRST);
    assert!(matches!(refused, Err(NotCollapsed::Held { gfn: PAGE, .. })), "{refused:?}");
    drop(map);
    assert_eq!((mmu.collapse(FIRST), mmu.huge_stats().held), (Ok(()), 1));
    check(&mmu, None);
}

#[test]
fn an_eviction_in_the_middle_wins_and_reclaim_passes_the_range_by() {
    let page_out = |mmu: &Arc<Mmu>| assert_eq!(mmu.page_out(None, &[EARLY]), Ok(1));
    let (mmu, done) = interrupted(false, EARLY, false, Box::new(page_out));
    assert_eq!((done, mmu.huge_stats().hit), (HIT, 1));
    check(&mmu, None);

    // Nothing but the range can be reclaimed.
    let reclaim = |mmu: &Arc<Mmu>| {
        (0..64).for_each(|_| assert_eq!(mmu.reclaim(32, Cause::Reclaim, None), Ok(0)));
    };
    let (mmu, done) = interrupted(false, EARLY, false, Box::new(reclaim));
    assert_eq!((done, is_contiguous(&mmu)), (Ok(()), true));
    // Huge, it is a range like any other.
    let freed: u32 = (0..64).map(|_| mmu.reclaim(32, Cause::Reclaim, None).expect("swap has room")).sum();
    assert!(freed > 0 && mmu.p2m().range(FIRST) == Range::Table, "{freed} frames");
    check(&mmu, None);
}

#[test]
fn an_import_in_the_middle_wins_and_so_does_one_of_a_huge_range() {
    let import = |mmu: &Mmu| {
        let segment = mmu.make_segment(EARLY, 1, false).expect("it is memory");
        mmu.import_page(ImporterId(1), segment, EARLY, false).expect("nobody holds it");
    };
    let (mmu, done) = interrupted(true, EARLY, false, Box::new(move |mmu| import(mmu)));
    assert_eq!((done, mmu.p2m().range(FIRST)), (HIT, Range::Table));
    check(&mmu, None);
    let refused = mmu.collapse(FIRST);
    assert!(
        matches!(refused, Err(NotCollapsed::Held { gfn: EARLY, .. })),
        "it is an importer's: {refused:?}"
    );

    let mmu = mmu_with(config(true), Box::new(NoVcpus));
    fill(&mmu);
    assert_eq!(mmu.collapse(FIRST), Ok(()));
    import(&mmu);
    assert_eq!((mmu.p2m().range(FIRST), mmu.huge_stats().split), (Range::Table, 1));
    check(&mmu, None);
}

#[test]
fn a_page_that_is_watched_in_the_middle_stays_where_it_is_from_then_on() {
    for gfn in [EARLY, PAGE] {
        let watch = move |mmu: &Arc<Mmu>| assert_eq!(mmu.watch(&mmu.vcpu(0), gfn), Ok(true));
        let (mmu, done) = interrupted(false, gfn, false, Box::new(watch));
        assert_eq!((done, mmu.p2m().range(FIRST)), (HIT, Range::Table), "{gfn}");
        check(&mmu, None);
        let refused = mmu.collapse(FIRST);
        assert!(matches!(refused, Err(NotCollapsed::Held { .. })), "{refused:?}");
    }
}

#[test]
fn another_collapse_of_the_range_is_told_that_somebody_is_at_it() {
    let again = |mmu: &Arc<Mmu>| assert_eq!(mmu.collapse(FIRST), Err(NotCollapsed::NotATable(FIRST)));
    let (mmu, done) = interrupted(false, EARLY, false, Box::new(again));
    assert_eq!((done, is_contiguous(&mmu)), (Ok(()), true));
}

/// Gathers the range over and over, until it is over.
fn gather_on(mmu: &Mmu, over: &AtomicBool) {
    let _end = End(over, mmu);
    while !over.load(Ordering::Relaxed) {
        if mmu.collapse(FIRST).is_ok() {
            mmu.split(FIRST);
        }
    }
}

/// True while the range is being gathered.
fn is_gathered(mmu: &Mmu) -> bool {
    matches!(mmu.p2m().range(FIRST), Range::Moving(_))
}

/// Stores to some pages of the first half of the range, and discards them once `ready` says so: how many.
fn discard_some(mmu: &Mmu, rng: &mut TestRng, pages_max: u32, ready: impl Fn() -> bool) -> u64 {
    let (first, end) = (FIRST.0 + rng.random_range(0..RANGE / 2), FIRST.0 + RANGE / 2);
    let batch = first..end.min(first + rng.random_range(1..=pages_max));
    batch.clone().for_each(|page| write(mmu, Gfn(page), u64::from(page)));
    while !ready() {
        std::thread::yield_now();
    }
    mmu.discard(None, batch.clone(), Discard::Zero, May::Sleep).expect("nobody holds it");
    for page in batch.clone() {
        assert_eq!(read(mmu, Gfn(page)), 0, "page {page:#x}: its discard was lost");
    }
    u64::from(batch.end - batch.start)
}

/// `UMBRA_DISCARDS` says how many: a million take a minute.
#[test]
fn discards_while_their_range_is_gathered_are_never_lost() {
    let wanted: u64 = number("UMBRA_DISCARDS").unwrap_or(50_000);
    let (mmu, over) = (&mmu(), &AtomicBool::new(false));
    fill(mmu);
    let (mut done, mut rng) = (0, rng(1));
    std::thread::scope(|scope| {
        let _end = End(over, mmu);
        scope.spawn(move || gather_on(mmu, over));
        while done < wanted && !over.load(Ordering::Relaxed) {
            done += discard_some(mmu, &mut rng, 256, || is_gathered(mmu) || over.load(Ordering::Relaxed));
        }
    });
    let stats = mmu.huge_stats();
    println!("collapse: {done} pages discarded while their range was gathered; {stats:?}");
    assert!(done >= wanted && stats.hit > 0, "{done} pages, {stats:?}");
    pages().skip(RANGE as usize / 2).for_each(|gfn| assert_eq!(read(mmu, gfn), value(gfn)));
    audit(mmu);
}

#[test]
fn a_guest_that_uses_a_range_while_it_is_gathered_split_and_discarded_keeps_every_word() {
    let kicked = Arc::new(AtomicBool::new(false));
    let mmu = &mmu_with(config(false), Box::new(Kick(kicked.clone())));
    fill(mmu);
    let (over, end) = (&AtomicBool::new(false), Instant::now() + seconds(2.0));
    let mut steps = 0;
    std::thread::scope(|scope| {
        let _end = End(over, mmu);
        scope.spawn(move || gather_on(mmu, over));
        scope.spawn(move || {
            let (_end, mut rng) = (End(over, mmu), rng(1));
            while !over.load(Ordering::Relaxed) {
                discard_some(mmu, &mut rng, 8, || true);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        // The second half is its own.
        let (mut guest, mut rng) = (SoftCpu::new(mmu, TlbKind::Sticky, kicked), rng(2));
        let mut kept = [0; RANGE as usize / 2];
        while Instant::now() < end && !over.load(Ordering::Relaxed) {
            steps += 1;
            let n = rng.random_range(0..RANGE / 2);
            let page = FIRST.0 + RANGE / 2 + n;
            if rng.random_range(0..3) == 0 {
                kept[n as usize] = steps;
                guest.store(page, 5, steps).expect("frames");
            } else {
                assert_eq!(guest.load(page, 5), Ok(kept[n as usize]), "page {page:#x} at step {steps}");
            }
        }
        guest.rest();
    });
    let stats = mmu.huge_stats();
    println!("collapse: {steps} accesses; {stats:?}");
    assert!(steps > 100 && stats.moved > 100, "{steps} accesses, {stats:?}");
    audit(mmu);
}

/// Has the others end when a thread does, by a panic too.
struct End<'a>(&'a AtomicBool, &'a Mmu);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
        self.1.coherence().leave_guest(0);
    }
}
