use std::collections::BTreeMap;
use std::sync::{Mutex, mpsc};

use super::*;
use crate::addr::Gva;
use crate::bucket::Link;
use crate::discard::{Discard, NotDiscarded};
use crate::frames::Host;
use crate::invalidation::WouldBlock;
use crate::rules::Rules;
use crate::spte::{Spte, l1_index};
use crate::swap::MemorySwap;
use crate::sync::Arc;
use crate::{Access, Config, Context, LocalStack, Machine, NoVcpus, Outcome, Width};

const PAGES: u32 = 64;
const LOW: u32 = 4;
const FIRST: Gfn = Gfn(8);
const PAGE: Gfn = Gfn(10);
const ANNA: ImporterId = ImporterId(1);
const BERT: ImporterId = ImporterId(2);

/// What an importer of the twin does when it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// Answers.
    Honest,
    /// Never answers: it is late.
    Silent,
    /// Is dead.
    Dead,
}

/// Everything that went to and fro, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Told(ImporterId),
    Waited,
    Fenced(Mfn),
}

/// The twin: importers in memory.
#[derive(Clone, Debug, Default)]
struct Twin(Arc<Mutex<World>>);

#[derive(Debug, Default)]
struct World {
    manners: BTreeMap<ImporterId, Manner>,
    seen: Vec<Seen>,
    /// Who was told at which time, and has not answered.
    asked: Vec<(u64, ImporterId)>,
    /// The last time that each importer was told to give each page up.
    told: BTreeMap<(ImporterId, Gfn), u64>,
}

impl Twin {
    fn with<T>(&self, look: impl FnOnce(&mut World) -> T) -> T {
        look(&mut self.0.lock().expect("no test panics in here"))
    }

    fn is(&self, importer: ImporterId, manner: Manner) {
        self.with(|world| world.manners.insert(importer, manner));
    }

    fn take_seen(&self) -> Vec<Seen> {
        self.with(|world| std::mem::take(&mut world.seen))
    }
}

impl External for Twin {
    fn tell(&self, order: u64, importer: ImporterId, pages: &[Gfn]) {
        self.with(|world| {
            world.seen.push(Seen::Told(importer));
            world.asked.push((order, importer));
            world.told.extend(pages.iter().map(|gfn| ((importer, *gfn), order)));
        });
    }

    fn wait(&self, order: u64) -> Answers {
        self.with(|world| {
            world.seen.push(Seen::Waited);
            let mut answers = Answers::default();
            for (_, importer) in world.asked.extract_if(.., |(asked, _)| *asked == order) {
                let manner = world.manners.get(&importer).copied().unwrap_or(Manner::Honest);
                let late = manner == Manner::Silent;
                answers.late += u32::from(late);
                if late || answers.slowest.is_none() {
                    answers.slowest = Some(importer);
                }
            }
            answers
        })
    }
}

/// The host of the machine, which the twin hears of.
#[derive(Debug)]
struct Fences(Twin, Machine);

impl Host for Fences {
    fn give_back(&self, frames: &[Mfn]) -> std::io::Result<()> {
        for mfn in frames {
            self.0.with(|world| world.seen.push(Seen::Fenced(*mfn)));
            self.1.clear(*mfn);
        }
        Ok(())
    }
}

struct House {
    mmu: Mmu,
    twin: Twin,
    machine: Machine,
}

impl House {
    fn new() -> House {
        House::with_rules(Rules::default())
    }

    /// One whose importers are entered without a look at the gate.
    fn without_the_gate() -> House {
        House::with_rules(Rules::all_but(Rule::GateAtImport))
    }

    fn with_rules(rules: Rules) -> House {
        let twin = Twin::default();
        let machine = Machine::anonymous(256 + PAGES);
        let config = Config {
            low_pages: LOW,
            shadow_pages_max: 64,
            roots_max: 4,
            homes: true,
            ..Config::of_pages(PAGES)
        };
        let mmu = Mmu::new(machine.clone(), config, Box::new(NoVcpus))
            .with_rules(rules)
            .with_swap(Box::new(MemorySwap::new(PAGES)))
            .with_external(Box::new(twin.clone()))
            .with_host(Box::new(Fences(twin.clone(), machine.clone())));
        House { mmu, twin, machine }
    }

    fn segment(&self, writable: bool) -> SegmentId {
        self.mmu.make_segment(FIRST, 16, writable).expect("memory")
    }

    fn store(&self, gfn: Gfn, value: u64) {
        let window = LocalStack::new(Context::Host);
        self.mmu.write_bytes_sleeping(None, &window, gfn.at(16), &value.to_le_bytes()).expect("memory");
    }

    fn load(&self, gfn: Gfn) -> u64 {
        let mut bytes = [0; 8];
        let window = LocalStack::new(Context::Host);
        self.mmu.read_bytes_sleeping(None, &window, gfn.at(16), &mut bytes).expect("memory");
        u64::from_le_bytes(bytes)
    }

    fn home(&self, gfn: Gfn) -> Mfn {
        self.mmu.homes_of(gfn).expect("there are homes")
    }

    /// What an importer that has the page mapped reads, rightly or not.
    fn outside(&self, gfn: Gfn) -> u64 {
        self.machine.load(self.home(gfn).at(16), Width::B8)
    }

    fn import(&self, importer: ImporterId, segment: SegmentId, gfn: Gfn) -> u64 {
        self.mmu.import_page(importer, segment, gfn, false).expect("a page of the segment")
    }

    /// The audit of a house that stands still.
    fn audit(&self) {
        assert_eq!(self.mmu.audit(), Vec::<String>::new());
    }
}

#[test]
fn a_page_goes_home_at_its_first_import_and_keeps_its_contents() {
    let house = House::new();
    house.store(PAGE, 77);
    let segment = house.segment(false);
    assert_ne!(house.mmu.p2m().lookup(PAGE), PageState::Resident(house.home(PAGE)));
    house.import(ANNA, segment, PAGE);
    assert_eq!(house.mmu.p2m().lookup(PAGE), PageState::Resident(house.home(PAGE)));
    assert_eq!((house.outside(PAGE), house.load(PAGE)), (77, 77));
    assert_eq!(house.mmu.importers_of(PAGE), [ANNA]);
    house.import(BERT, segment, PAGE);
    assert_eq!(house.mmu.importers_of(PAGE), [ANNA, BERT]);
    let moves = house.mmu.records().totals(Cause::Import);
    assert_eq!((moves.count, moves.pages, moves.told), (1, 1, 0), "once, and nobody had it");
    house.audit();
}

#[test]
fn all_are_told_before_anybody_is_awaited_and_the_fence_comes_last() {
    let house = House::new();
    let segment = house.segment(false);
    for gfn in [PAGE, Gfn(11)] {
        house.store(gfn, 5);
        house.import(ANNA, segment, gfn);
    }
    house.import(BERT, segment, PAGE);
    house.twin.take_seen();
    assert_eq!(house.mmu.page_out(None, &[PAGE, Gfn(11)]), Ok(2));
    let seen = house.twin.take_seen();
    assert_eq!(
        seen,
        [
            Seen::Told(ANNA),
            Seen::Told(BERT),
            Seen::Waited,
            Seen::Fenced(house.home(PAGE)),
            Seen::Fenced(house.home(Gfn(11))),
        ]
    );
    assert_eq!((house.outside(PAGE), house.load(PAGE)), (0, 5), "outside zeros, inside what it was");
    assert_eq!(house.mmu.imported_pages(), 0);
    let (records, _) = house.mmu.records().take();
    let out = records.iter().find(|record| record.cause == Cause::PageOut).expect("it left a record");
    assert_eq!((out.told, out.late, out.slowest), (2, 0, Some(ANNA)));
    house.audit();
}

#[test]
fn a_silent_importer_is_late_and_fenced_and_a_dead_one_has_answered() {
    for (manner, late) in [(Manner::Silent, 1), (Manner::Dead, 0)] {
        let house = House::new();
        let segment = house.segment(false);
        house.store(PAGE, 9);
        house.import(ANNA, segment, PAGE);
        house.import(BERT, segment, PAGE);
        house.twin.is(BERT, manner);
        assert_eq!(house.mmu.page_out(None, &[PAGE]), Ok(1));
        let totals = house.mmu.records().totals(Cause::PageOut);
        assert_eq!((totals.told, totals.late), (2, late), "{manner:?}");
        assert_eq!((house.outside(PAGE), house.load(PAGE)), (0, 9), "{manner:?}");
        house.audit();
    }
}

/// A reset: an importer has no page of the guest that is gone, and has said so before the next guest has its first.
#[test]
fn a_guest_that_is_forgotten_is_gone_from_importers_and_segments_stay() {
    let house = House::new();
    let segment = house.segment(true);
    for gfn in [PAGE, Gfn(11)] {
        house.store(gfn, 5);
        house.import(ANNA, segment, gfn);
    }
    house.import(BERT, segment, PAGE);
    house.twin.take_seen();
    house.mmu.forget_guest(0).expect("nobody holds a page");
    let [first, second] = [PAGE, Gfn(11)].map(|gfn| Seen::Fenced(house.home(gfn)));
    assert_eq!(house.twin.take_seen(), [Seen::Told(ANNA), Seen::Told(BERT), Seen::Waited, first, second]);
    assert_eq!((house.mmu.imported_pages(), house.outside(PAGE)), (0, 0));
    house.audit();
    // The same segment, and another guest's zeros.
    house.import(ANNA, segment, PAGE);
    assert_eq!((house.mmu.imported_pages(), house.outside(PAGE), house.load(PAGE)), (1, 0, 0));
    house.audit();
}

#[test]
fn who_may_not_sleep_learns_before_anybody_is_told_and_nothing_has_changed() {
    let house = House::new();
    let segment = house.segment(false);
    house.store(PAGE, 3);
    house.import(ANNA, segment, PAGE);
    house.twin.take_seen();
    let discard = |what| house.mmu.discard(None, [PAGE.0], what, May::NotSleep);
    for what in [Discard::Zero, Discard::Balloon] {
        assert_eq!(discard(what), Err(NotDiscarded::WouldBlock(WouldBlock)));
    }
    assert_eq!(house.twin.take_seen(), []);
    assert_eq!((house.outside(PAGE), house.load(PAGE)), (3, 3));
    assert_eq!(house.mmu.importers_of(PAGE), [ANNA]);
    house.mmu.give_up_page(ANNA, PAGE);
    assert_eq!(discard(Discard::Zero), Ok(()));
    assert_eq!(house.twin.take_seen(), [Seen::Fenced(house.home(PAGE))]);
    assert_eq!((house.outside(PAGE), house.load(PAGE)), (0, 0));
    house.audit();
}

#[test]
fn what_an_importer_may_write_is_dirty_and_what_it_wrote_is_kept() {
    let house = House::new();
    let segment = house.segment(true);
    house.store(PAGE, 1);
    assert_eq!(house.mmu.page_out(None, &[PAGE]), Ok(1));
    assert!(house.mmu.import_page(ANNA, segment, PAGE, true).is_ok());
    house.machine.store(house.home(PAGE).at(16), Width::B8, 2);
    assert_eq!(house.mmu.page_out(None, &[PAGE]), Ok(1));
    assert_eq!((house.outside(PAGE), house.load(PAGE)), (0, 2));
    // One that nobody has ever touched, so that no copy of it is anywhere.
    assert!(house.mmu.import_page(ANNA, segment, Gfn(12), true).is_ok());
    house.machine.store(house.home(Gfn(12)).at(16), Width::B8, 4);
    assert_eq!(house.mmu.page_out(None, &[Gfn(12)]), Ok(1));
    assert_eq!(house.load(Gfn(12)), 4);
    house.audit();
}

#[test]
fn a_watched_table_leaves_its_home_and_stays_away() {
    let house = House::new();
    let segment = house.segment(false);
    house.import(ANNA, segment, PAGE);
    let vcpu = house.mmu.vcpu(0);
    assert_eq!(house.mmu.watch(&vcpu, PAGE), Ok(true));
    assert!(house.mmu.importers_of(PAGE).is_empty());
    assert_ne!(house.mmu.p2m().lookup(PAGE), PageState::Resident(house.home(PAGE)));
    let refused = house.mmu.import_page(ANNA, segment, PAGE, false);
    assert!(matches!(refused, Err(NotImported::Held { .. })), "{refused:?}");
    house.audit();
    house.mmu.unwatch(PAGE);
    house.import(ANNA, segment, PAGE);
    house.audit();
}

#[test]
fn a_segment_has_its_own_pages_and_no_others() {
    let house = House::new();
    let segment = house.segment(false);
    let import = |gfn, write| house.mmu.import_page(ANNA, segment, gfn, write);
    for gfn in [FIRST.0 - 1, FIRST.0 + 16, PAGES, u32::MAX] {
        assert!(matches!(import(Gfn(gfn), false), Err(NotImported::Beyond { .. })), "{gfn}");
    }
    assert_eq!(import(PAGE, true), Err(NotImported::ReadOnly(segment)));
    let other = SegmentId(99);
    let refused = house.mmu.import_page(ANNA, other, PAGE, false);
    assert_eq!(refused, Err(NotImported::NoSegment(other)));
    for (first, pages) in [(0, 0), (0, PAGES + 1), (PAGES, 1), (1, u32::MAX)] {
        let made = house.mmu.make_segment(Gfn(first), pages, false);
        assert!(matches!(made, Err(NoSegment::NotMemory { .. })), "{first} {pages}");
    }
    for first in [0, FIRST.0 + 15] {
        let made = house.mmu.make_segment(Gfn(first), FIRST.0 + 1, false);
        assert!(matches!(made, Err(NoSegment::Overlaps { .. })), "{first}");
    }
}

#[test]
fn a_segment_that_is_closed_has_no_page_and_no_importer() {
    let house = House::new();
    let segment = house.segment(true);
    let free = house.mmu.usage().frames_free;
    for gfn in (FIRST.0..FIRST.0 + 16).map(Gfn) {
        house.store(gfn, u64::from(gfn.0));
        house.import(ANNA, segment, gfn);
    }
    house.mmu.close_segment(segment).expect("frames are plenty");
    assert_eq!(house.mmu.imported_pages(), 0);
    for gfn in (FIRST.0..FIRST.0 + 16).map(Gfn) {
        assert_eq!((house.outside(gfn), house.load(gfn)), (0, u64::from(gfn.0)));
    }
    let refused = house.mmu.import_page(ANNA, segment, PAGE, false);
    assert_eq!(refused, Err(NotImported::NoSegment(segment)));
    house.mmu.forget_segment(segment);
    assert_ne!(house.segment(false), segment, "a number is not used again");
    assert_eq!(house.mmu.usage().frames_free, free - 16);
    house.audit();
}

#[test]
fn low_memory_goes_home_and_back_and_is_still_promised_its_frames() {
    let house = House::new();
    let segment = house.mmu.make_segment(Gfn(0), LOW, false).expect("memory");
    house.store(Gfn(1), 6);
    let before = house.mmu.usage();
    for gfn in (0..LOW).map(Gfn) {
        house.import(ANNA, segment, gfn);
    }
    assert_eq!(house.mmu.usage().frames_free, before.frames_free, "low memory's frames were promised");
    house.mmu.close_segment(segment).expect("frames are plenty");
    assert_eq!(house.mmu.usage().frames_free, before.frames_free);
    assert_eq!(house.load(Gfn(1)), 6);
    house.audit();
}

#[test]
fn a_segment_with_a_page_that_stays_is_not_closed_and_can_be_later() {
    let house = House::new();
    let segment = house.segment(true);
    house.store(PAGE, 3);
    house.import(ANNA, segment, PAGE);
    let pinned = house.mmu.pin_page(PAGE).expect("it is memory");
    let held = NotClosed::Held { gfn: PAGE, why: "pinned by a window" };
    assert_eq!(house.mmu.close_segment(segment), Err(held));
    assert!(house.mmu.import_page(ANNA, segment, FIRST, false).is_err(), "it is closed to importers");
    house.mmu.frames.unpin(pinned);
    assert_eq!(house.mmu.close_segment(segment), Ok(()));
    assert_eq!((house.outside(PAGE), house.load(PAGE)), (0, 3));
    house.audit();
}

#[test]
fn an_importer_that_goes_leaves_nothing_behind() {
    let house = House::new();
    let segment = house.segment(true);
    for gfn in (FIRST.0..FIRST.0 + 8).map(Gfn) {
        assert!(house.mmu.import_page(ANNA, segment, gfn, true).is_ok());
        house.import(BERT, segment, gfn);
    }
    house.mmu.forget_importer(ANNA);
    assert_eq!(house.mmu.importers_of(PAGE), [BERT]);
    house.mmu.forget_importer(BERT);
    assert_eq!(house.mmu.imported_pages(), 0);
    house.twin.take_seen();
    assert_eq!(house.mmu.page_out(None, &[PAGE]), Ok(1));
    assert_eq!(house.twin.take_seen(), [Seen::Fenced(house.home(PAGE))], "nobody is told, all are fenced");
    house.audit();
}

#[test]
fn a_page_that_nobody_imports_costs_no_word_to_the_outside() {
    let house = House::new();
    let _segment = house.segment(false);
    house.store(PAGE, 8);
    assert_eq!(house.mmu.page_out(None, &[PAGE]), Ok(1));
    assert_eq!(house.mmu.discard(None, [PAGE.0], Discard::Zero, May::NotSleep), Ok(()));
    assert_eq!(house.twin.take_seen(), []);
    let totals = house.mmu.records().totals(Cause::PageOut);
    assert_eq!((totals.told, totals.external, totals.slowest), (0, 0, None));
}

#[test]
fn a_vcpu_that_wants_a_frame_leaves_imported_pages_to_the_background() {
    let house = House::new();
    let segment = house.segment(false);
    house.store(PAGE, 8);
    house.import(ANNA, segment, PAGE);
    house.mmu.set_budget(house.mmu.budget_min()).expect("enough");
    house.twin.take_seen();
    let reclaim = |whose| house.mmu.reclaim_from_for_test(whose).expect("swap works");
    assert!((0..4).all(|_| reclaim(false) == 0));
    assert_eq!((house.twin.take_seen(), house.mmu.importers_of(PAGE)), (vec![], vec![ANNA]));
    assert!((0..4).any(|_| reclaim(true) == 1));
    assert!(house.twin.take_seen().contains(&Seen::Told(ANNA)));
    house.audit();
}

/// Import and page-out, interleaved as drawn in the header: the import has seen the page at home, and is entered once it is gone.
fn race(house: House) -> (House, Option<u64>) {
    let segment = house.segment(false);
    house.store(PAGE, 8);
    house.import(BERT, segment, PAGE);
    house.mmu.give_up_page(BERT, PAGE);

    let seen = house.mmu.buckets.sequence();
    assert_eq!(house.mmu.p2m().lookup(PAGE), PageState::Resident(house.home(PAGE)));
    assert_eq!(house.mmu.page_out(None, &[PAGE]), Ok(1));
    let entered = house.mmu.enter_importer(ANNA, PAGE, house.home(PAGE), false, seen);
    (house, entered)
}

#[test]
fn the_race_of_2008_is_lost_at_the_gate() {
    let (house, entered) = race(House::new());
    assert_eq!(entered, None);
    house.audit();
}

#[test]
fn without_the_gate_an_importer_has_a_page_that_is_gone_and_the_audit_says_so() {
    let (house, entered) = race(House::without_the_gate());
    assert!(entered.is_some());
    let findings = house.mmu.audit();
    assert!(findings.iter().any(|finding| finding.starts_with("INV-EXT-1")), "{findings:?}");
}

/// The whole of it: a fault maps the page and a driver hands it out, both on what they saw before, between the unmappings and the end.
fn map_and_export_between_two_unmaps(gate: bool) -> (House, [bool; 2]) {
    const AT: Gva = Gva(PAGE.0 << 12);
    let house = if gate { House::new() } else { House::without_the_gate() };
    let segment = house.segment(false);
    house.import(BERT, segment, PAGE);
    house.mmu.give_up_page(BERT, PAGE);
    let (mmu, home, vcpu) = (&house.mmu, house.home(PAGE), house.mmu.vcpu(0));
    // The tables are there, the page's leaf is not.
    assert_eq!(mmu.fault(&vcpu, Gva(0), Access::read(false)), Outcome::Fixed);
    let root = mmu.root(&vcpu, false).expect("there are frames");
    let spte = mmu.pages.mfn(mmu.find_table(root, AT).expect("it is there")).at(l1_index(AT) * 8);

    let seen = mmu.buckets.sequence();
    assert_eq!(mmu.p2m().lookup(PAGE), PageState::Resident(home));
    let closed = mmu.begin(Cause::Discard, &[PAGE], &mut Caller::new(None, May::Sleep));
    let unmapped = closed.and_then(Closed::unmap).expect("it may sleep");
    let mut bucket = mmu.buckets.lock(PAGE);
    let mapped = !gate || bucket.admits(seen);
    if mapped {
        mmu.store_spte(spte, Spte::leaf(home, false, false));
        bucket.link(Link::new(PAGE, spte));
    }
    drop(bucket);
    let exported = mmu.enter_importer(ANNA, PAGE, home, false, seen).is_some();
    let mut settling = unmapped.shoot_down().expect("it may sleep");
    settling.settle(|_| Some(Settled::Zero));
    assert_eq!(settling.end(), 1);
    (house, [mapped, exported])
}

#[test]
fn the_race_of_2008_map_and_export_between_two_unmaps_is_lost_at_the_gate() {
    let (house, done) = map_and_export_between_two_unmaps(true);
    assert_eq!(done, [false, false]);
    house.audit();
}

#[test]
fn the_race_of_2008_map_and_export_between_two_unmaps_happens_without_the_gate() {
    let (house, done) = map_and_export_between_two_unmaps(false);
    assert_eq!(done, [true, true]);
    let findings = house.mmu.audit();
    let found = |words: &str| findings.iter().any(|finding| finding.contains(words));
    assert!(found("INV-EXT-1"), "an importer has a page that is gone: {findings:?}");
    assert!(found("INV-P2M-1: Spte"), "and so has the guest: {findings:?}");
}

#[test]
fn while_a_gate_is_closed_nobody_is_entered() {
    let house = &House::new();
    let segment = house.segment(false);
    house.store(PAGE, 8);
    house.import(BERT, segment, PAGE);
    house.mmu.buckets.close(PAGE);
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || tell.send(house.import(ANNA, segment, PAGE)).expect("somebody listens"));
        let entered = told.recv_timeout(std::time::Duration::from_millis(20));
        assert!(entered.is_err() && house.mmu.importers_of(PAGE) == [BERT]);
        house.mmu.buckets.open(PAGE);
        told.recv().expect("it goes on");
    });
    assert_eq!(house.mmu.importers_of(PAGE), [BERT, ANNA]);
}

#[test]
fn of_what_was_said_to_an_importer_the_clock_tells_which_is_later() {
    let house = House::new();
    let segment = house.segment(false);
    let first = house.import(ANNA, segment, PAGE);
    assert_eq!(house.mmu.page_out(None, &[PAGE]), Ok(1));
    let second = house.import(ANNA, segment, PAGE);
    let told = house.twin.with(|world| world.told[&(ANNA, PAGE)]);
    assert!(first < told && told < second, "{first} {told} {second}");
}

#[test]
fn importers_and_reclaim_race_by_threads_and_nobody_keeps_what_is_gone() {
    let house = &House::new();
    let segment = house.segment(true);
    let pages: Vec<Gfn> = (FIRST.0..FIRST.0 + 16).map(Gfn).collect();
    std::thread::scope(|scope| {
        for importer in [ANNA, BERT] {
            let pages = &pages;
            scope.spawn(move || {
                for round in 0..400usize {
                    let gfn = pages[round * 7 % pages.len()];
                    house.mmu.import_page(importer, segment, gfn, round % 3 == 0).expect("a page");
                    if round % 5 == 0 {
                        house.mmu.give_up_page(importer, gfn);
                    }
                }
            });
        }
        scope.spawn(|| {
            for round in 0..400usize {
                let gfn = pages[round * 5 % pages.len()];
                match round % 4 {
                    0 => drop(house.mmu.discard(None, [gfn.0], Discard::Zero, May::NotSleep)),
                    _ => drop(house.mmu.page_out(None, &[gfn]).expect("swap works")),
                }
            }
        });
    });
    house.audit();
    house.mmu.close_segment(segment).expect("frames are plenty");
    assert_eq!(house.mmu.imported_pages(), 0);
    house.audit();
}
