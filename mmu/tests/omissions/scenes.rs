//! Scenes for rules that a random program of one thread does not miss: each says what went wrong, or nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use umbra_mmu::bucket::Asker;
use umbra_mmu::discard::Discard;
use umbra_mmu::external::{Answers, External, ImporterId, SegmentId};
use umbra_mmu::frames;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::{PageState, TABLE_ENTRIES};
use umbra_mmu::records::{Cause, Clock, NoClock};
use umbra_mmu::rules::at_point;
use umbra_mmu::scope::NoIo;
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::window::Intent;
use umbra_mmu::{
    Access, Config, Context, Flush, Gfn, Gpa, Gva, LocalStack, Machine, Mfn, Miss, Mmu, Mode, NoVcpus,
    Outcome, Rule, Rules, Shootdown, TlbKind, Vcpu, Width,
};
use vm_memory::MmapRegion;

use crate::model::hardware::{Memory, Tlb, word};
use crate::model::walker::Kind;

const PAGES: u32 = 64;
const PAGE: u32 = 40;
const AT: Gva = Gva(PAGE << 12);
/// How often it is looked whether something has happened that should at once; a millisecond apart.
const LOOKS: u32 = 2000;
/// Resynchronisations of a clean table after which it is tracked again.
const CLEAN_MAX: u32 = 16;

fn mmu(rules: Rules, vcpus: u32, shootdown: Box<dyn Shootdown>) -> Mmu {
    mmu_over(Machine::anonymous(512), rules, vcpus, shootdown)
}

fn mmu_over(machine: Machine, rules: Rules, vcpus: u32, shootdown: Box<dyn Shootdown>) -> Mmu {
    let config = Config { shadow_pages_max: 256, vcpus, ..Config::of_pages(PAGES) };
    Mmu::new(machine, config, shootdown).with_swap(Box::new(MemorySwap::new(PAGES))).with_rules(rules)
}

/// As a backend makes a store: inside the guest, with a fault outside where the TLB has it not. It stays inside.
fn store(mmu: &Mmu, vcpu: &Vcpu, at: Gva, value: u64) {
    for _ in 0..4 {
        mmu.tlb_enter(vcpu);
        match mmu.tlb_store(vcpu, at, Width::B8, value, false) {
            Ok(()) => return,
            Err(Miss::Fault) => {
                mmu.leave(vcpu);
                mmu.fault_sleeping(vcpu, at, Access::write(false)).expect("there is room");
            }
            Err(Miss::Incoherent(violation)) => panic!("{violation}"),
        }
    }
    panic!("no store to {at}");
}

fn load(mmu: &Mmu, vcpu: &Vcpu, at: Gva) -> Result<u64, String> {
    match mmu.tlb_load(vcpu, at, Width::B8, false) {
        Ok(value) => Ok(value),
        Err(Miss::Fault) => Err("fault".into()),
        Err(Miss::Incoherent(violation)) => Err(violation.to_string()),
    }
}

/// True once `done` says so; false where it does not in seconds.
fn comes(done: impl Fn() -> bool) -> bool {
    (0..LOOKS).any(|_| {
        let is_done = done();
        if !is_done {
            std::thread::sleep(Duration::from_millis(1));
        }
        is_done
    })
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
}

fn discard(mmu: &Mmu) {
    mmu.discard(None, PAGE..PAGE + 1, Discard::Zero, May::Sleep).expect("nothing holds it");
}

/// Notes that it was kicked.
struct Flag(Arc<AtomicBool>);

impl Shootdown for Flag {
    fn kick(&self, _vcpu: u32) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Does as it is told to with the MMU, in the place of the vCPU's thread.
struct Acts(Arc<OnceLock<Weak<Mmu>>>, fn(&Mmu));

impl Shootdown for Acts {
    fn kick(&self, _vcpu: u32) {
        self.0.get().and_then(Weak::upgrade).iter().for_each(|mmu| self.1(mmu));
    }
}

fn acting(rules: Rules, act: fn(&Mmu)) -> Arc<Mmu> {
    let back = Arc::new(OnceLock::new());
    let mmu = Arc::new(mmu(rules, 1, Box::new(Acts(back.clone(), act))));
    back.set(Arc::downgrade(&mmu)).expect("set once");
    mmu
}

/// Discards the page on a thread of its own; `release` helps it out where it does not end.
fn ends(mmu: &Mmu, release: impl FnOnce()) -> bool {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            discard(mmu);
            done.store(true, Ordering::SeqCst);
        });
        let ended = comes(|| done.load(Ordering::SeqCst));
        if !ended {
            release();
        }
        ended
    })
}

/// A vCPU that is outside, and was asked to flush, need not be waited for.
pub fn outside(rules: Rules) -> Option<String> {
    let mmu = mmu(rules, 1, Box::new(NoVcpus));
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    store(&mmu, &vcpu, AT, 1);
    mmu.leave(&vcpu);
    let ended = ends(&mmu, || mmu.coherence().request_flush(0));
    (!ended).then(|| "the ledger waits for a vCPU that was never asked".into())
}

/// A vCPU that spins on one page is made to leave.
pub fn spinning(rules: Rules) -> Option<String> {
    let kicked = Arc::new(AtomicBool::new(false));
    let mmu = mmu(rules, 1, Box::new(Flag(kicked.clone())));
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    store(&mmu, &vcpu, AT, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| discard(&mmu));
        let came = comes(|| {
            assert_eq!(load(&mmu, &vcpu, AT), Ok(1), "its frame stays until it has answered");
            kicked.load(Ordering::SeqCst)
        });
        mmu.leave(&vcpu);
        (!came).then(|| "a vCPU that runs on was never kicked, and the page never came free".into())
    })
}

/// A vCPU that takes its time is waited for.
pub fn slow_to_answer(rules: Rules) -> Option<String> {
    let kicked = Arc::new(AtomicBool::new(false));
    let mmu = mmu(rules, 1, Box::new(Flag(kicked.clone())));
    let inside = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
            store(&mmu, &vcpu, AT, 1);
            inside.store(true, Ordering::SeqCst);
            comes(|| kicked.load(Ordering::SeqCst));
            std::thread::sleep(Duration::from_millis(100));
            mmu.leave(&vcpu);
        });
        assert!(comes(|| inside.load(Ordering::SeqCst)));
        let ended = catch_unwind(AssertUnwindSafe(|| discard(&mmu)));
        ended.err().map(|panic| words_of(&*panic))
    })
}

/// A vCPU that left and came back before anybody looked has answered.
pub fn outside_for_a_moment(rules: Rules) -> Option<String> {
    let mmu = acting(rules, |mmu| {
        mmu.coherence().leave_guest(0);
        mmu.coherence().enter_guest(0);
    });
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    store(&mmu, &vcpu, AT, 1);
    let ended = ends(&mmu, || mmu.coherence().leave_guest(0));
    (!ended).then(|| "the ledger waits on for a vCPU that was outside after the request".into())
}

/// Nobody is inside: who may not sleep need not.
pub fn no_sleep(rules: Rules) -> Option<String> {
    let mmu = mmu(rules, 1, Box::new(NoVcpus));
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    store(&mmu, &vcpu, AT, 1);
    mmu.leave(&vcpu);
    mmu.discard(None, PAGE..PAGE + 1, Discard::Zero, May::NotSleep).err().map(|refused| refused.to_string())
}

/// A page that is used between two looks is not taken.
pub fn in_use(rules: Rules) -> Option<String> {
    let mmu = mmu(rules, 1, Box::new(NoVcpus));
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    let (used, idle) = (AT, Gva(AT.0 + 0x1000));
    [used, idle].iter().for_each(|at| store(&mmu, &vcpu, *at, 1));
    mmu.leave(&vcpu);
    let reclaim = || mmu.reclaim(2, Cause::Reclaim, None).expect("swap has room");
    assert_eq!(reclaim(), 0, "both have just been used");
    store(&mmu, &vcpu, used, 2);
    mmu.leave(&vcpu);
    reclaim();
    let state = mmu.p2m().lookup(Gfn(PAGE));
    (!matches!(state, PageState::Resident(_)))
        .then(|| format!("a page that was used between two looks is {state:?}"))
}

/// A vCPU that has its page and runs on is asked to say so.
pub fn fed(rules: Rules) -> Option<String> {
    let kicked = Arc::new(AtomicBool::new(false));
    let mmu = mmu(rules, 1, Box::new(Flag(kicked.clone())));
    mmu.buckets().starve(Asker::Fill(0), Gfn(PAGE));
    mmu.coherence().enter_guest(0);
    // The page has no frame: nobody has to flush for it.
    discard(&mmu);
    (!kicked.load(Ordering::SeqCst))
        .then(|| "a discard lost its patience with a vCPU that it never kicked".into())
}

const LOW: u32 = 0xc000_0000;

fn put(mmu: &Mmu, at: u64, value: u64) {
    mmu.store(&LocalStack::new(Context::Host), Gpa(at), Width::B4, value).expect("memory");
}

fn load_cr3(mmu: &Mmu, vcpu: &mut Vcpu) {
    let mode = Mode { paging: true, pse: true, write_protect: true, ..Mode::default() };
    mmu.set_paging(vcpu, mode, 0x1000, Flush::Yes).expect("no PDPTEs");
}

/// Two-level tables: the directory in frame 1, the first table in 2, which maps page 3 at 0x3000; all of memory at [`LOW`] by
/// table 4.
fn lay(mmu: &Mmu) -> Vcpu {
    put(mmu, 0x1000, 0x2067);
    put(mmu, 0x1000 + u64::from(LOW >> 22) * 4, 0x4067);
    put(mmu, 0x2000 + 3 * 4, 0x3067);
    (0..PAGES).for_each(|page| put(mmu, 0x4000 + u64::from(page) * 4, u64::from(page << 12) | 0x67));
    let mut vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    load_cr3(mmu, &mut vcpu);
    vcpu
}

fn paged(rules: Rules) -> (Arc<Mmu>, Vcpu) {
    let mmu = Arc::new(mmu(rules, 2, Box::new(NoVcpus)));
    let vcpu = lay(&mmu);
    (mmu, vcpu)
}

/// A store that is applied comes between a walk of two entries and the fill that it leads to.
pub fn edited_after_the_walk(rules: Rules) -> Option<String> {
    let (mmu, vcpu) = paged(rules);
    let at = Gva(0x3000);
    assert_eq!(mmu.fault(&vcpu, at, Access::write(false)), Outcome::Fixed);
    mmu.invalidate_page(&vcpu, at);
    let other = mmu.clone();
    at_point(3, move || put(&other, 0x200c, 0x6067));
    mmu.fault(&vcpu, at, Access::write(false));
    mmu.audit().into_iter().next()
}

/// A vCPU stores to a table that is being tracked again, by the translation that it still has.
pub fn stored_while_tracked_again(rules: Rules) -> Option<String> {
    let (back, machine) = (Arc::new(OnceLock::new()), Machine::anonymous(512));
    let mmu = Arc::new(mmu_over(machine.clone(), rules, 2, Box::new(Stores(back.clone(), machine))));
    back.set(Arc::downgrade(&mmu)).expect("set once");
    let mut vcpu = lay(&mmu);
    assert_eq!(mmu.fault(&vcpu, Gva(0x3000), Access::write(false)), Outcome::Fixed);
    mmu.fault(&vcpu, Gva(LOW + 0x2000), Access::write(false));
    assert_eq!(mmu.usage().unsync, 1);
    mmu.coherence().enter_guest(1);
    for _ in 0..=CLEAN_MAX {
        load_cr3(&mmu, &mut vcpu);
    }
    assert_eq!(mmu.usage().unsync, 0, "it is tracked again");
    mmu.audit().into_iter().next()
}

/// vCPU 1, which is inside: as it is kicked, its last store is one to the table in frame 2.
struct Stores(Arc<OnceLock<Weak<Mmu>>>, Machine);

impl Shootdown for Stores {
    fn kick(&self, vcpu: u32) {
        let mmu = self.0.get().and_then(Weak::upgrade).expect("it kicks");
        let PageState::Resident(mfn) = mmu.p2m().lookup(Gfn(2)) else { panic!("the table has a frame") };
        self.1.store(mfn.at(0xc), Width::B4, 0x6067);
        mmu.coherence().leave_guest(vcpu);
    }
}

/// A page's entry allows less, and MOV CR3 says so.
pub fn narrowed(rules: Rules) -> Option<String> {
    let (mmu, mut vcpu) = paged(rules);
    let at = Gva(0x3000);
    store(&mmu, &vcpu, at, 1);
    store(&mmu, &vcpu, Gva(LOW + 0x2008), 0x3065_0000_0000);
    mmu.leave(&vcpu);
    load_cr3(&mmu, &mut vcpu);
    mmu.tlb_enter(&vcpu);
    let stored = mmu.tlb_store(&vcpu, at, Width::B8, 2, false);
    (stored != Err(Miss::Fault)).then(|| format!("a store to a page that is read-only: {stored:?}"))
}

/// A page's entry allows less; another vCPU faults on it and makes its leaf anew; then the VMM wants to see all stores to it.
pub fn narrowed_by_a_fill(rules: Rules) -> Option<String> {
    let (mmu, vcpu) = paged(rules);
    let mut other = mmu.soft_vcpu(1, TlbKind::Sticky);
    load_cr3(&mmu, &mut other);
    let at = Gva(0x3000);
    store(&mmu, &vcpu, at, 1);
    store(&mmu, &vcpu, Gva(LOW + 0x2008), 0x3065_0000_0000);
    mmu.leave(&vcpu);
    mmu.tlb_enter(&vcpu);
    mmu.leave(&vcpu);
    mmu.fault(&other, at, Access::read(false));
    mmu.watch(&other, Gfn(3)).expect("there is room");
    mmu.tlb_enter(&vcpu);
    let stored = mmu.tlb_store(&vcpu, at, Width::B8, 2, false);
    (stored != Err(Miss::Fault)).then(|| format!("a store to a watched page: {stored:?}"))
}

/// The entry of a large page goes, and INVLPG of one of its addresses says so.
pub fn large(rules: Rules) -> Option<String> {
    let (mmu, vcpu) = paged(rules);
    put(&mmu, 0x1004, 0xe7);
    store(&mmu, &vcpu, Gva(0x40_a000), 1);
    put(&mmu, 0x1004, 0);
    mmu.invalidate_page(&vcpu, Gva(0x40_0000));
    let loaded = load(&mmu, &vcpu, Gva(0x40_a000));
    loaded.ok().map(|_| "another part of the large page is still there".into())
}

/// A page that somebody holds by the window stays.
pub fn pinned(rules: Rules) -> Option<String> {
    let mmu = mmu(rules, 1, Box::new(NoVcpus));
    let map = mmu.take_page(Gfn(PAGE), Intent::Write, None).expect("there is room");
    let before = mmu.p2m().lookup(Gfn(PAGE));
    mmu.page_out(None, &[Gfn(PAGE)]).expect("swap has room");
    let after = mmu.p2m().lookup(Gfn(PAGE));
    drop(map);
    (before != after).then(|| format!("a pinned page went from {before:?} to {after:?}"))
}

/// A page is taken between the look at where it is and the pin.
pub fn taken_before_the_pin(rules: Rules) -> Option<String> {
    let mmu = Arc::new(mmu(rules, 1, Box::new(NoVcpus)));
    mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(PAGE).at(0), &[7]).expect("there is room");
    let other = mmu.clone();
    at_point(1, move || {
        other.page_out(None, &[Gfn(PAGE)]).expect("swap has room");
    });
    let taken = mmu.try_take_page(Gfn(PAGE), Intent::Read);
    let state = mmu.p2m().lookup(Gfn(PAGE));
    let held = taken.is_ok();
    drop(taken);
    (held && !matches!(state, PageState::Resident(_)))
        .then(|| format!("a mapping shows a frame, and the page is {state:?}"))
}

const IMPORTER: ImporterId = ImporterId(1);

/// An importer with a thread of its own, which comes to hear what it was told when it is awaited: it stores to the page for the
/// last time, and gives it up. It has it until it hears otherwise.
#[derive(Clone, Debug)]
struct Importer {
    machine: Machine,
    home: Mfn,
    told: Arc<AtomicBool>,
    has: Arc<AtomicBool>,
}

impl External for Importer {
    fn tell(&self, _order: u64, _importer: ImporterId, _pages: &[Gfn]) {
        self.told.store(true, Ordering::SeqCst);
    }

    fn wait(&self, _order: u64) -> Answers {
        if self.told.load(Ordering::SeqCst) {
            self.machine.store(self.home.at(8), Width::B8, 2);
            self.has.store(false, Ordering::SeqCst);
        }
        Answers::default()
    }
}

impl frames::Host for Importer {
    fn give_back(&self, frames: &[Mfn]) -> std::io::Result<()> {
        frames.iter().for_each(|mfn| self.machine.clear(*mfn));
        Ok(())
    }
}

/// A page that [`IMPORTER`] may ask for, and is at home.
fn exporting(rules: Rules) -> (Arc<Mmu>, Importer, SegmentId) {
    let machine = Machine::anonymous(512 + PAGES);
    let config = Config { shadow_pages_max: 256, homes: true, ..Config::of_pages(PAGES) };
    let mmu = Mmu::new(machine.clone(), config, Box::new(NoVcpus));
    let home = mmu.homes_of(Gfn(PAGE)).expect("there are homes");
    let importer = Importer { machine, home, told: Arc::default(), has: Arc::default() };
    let mmu = mmu
        .with_swap(Box::new(MemorySwap::new(PAGES)))
        .with_external(Box::new(importer.clone()))
        .with_host(Box::new(importer.clone()))
        .with_rules(rules);
    mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(PAGE).at(0), &[7]).expect("there is room");
    let segment = mmu.make_segment(Gfn(PAGE), 1, true).expect("it is memory");
    mmu.import_page(IMPORTER, segment, Gfn(PAGE), true).expect("nothing holds it");
    (Arc::new(mmu), importer, segment)
}

/// A page is taken from an importer: it gives it up before the contents go, and where it was is empty.
pub fn imported(rules: Rules) -> Option<String> {
    let (mmu, importer, _) = exporting(rules);
    importer.has.store(true, Ordering::SeqCst);
    assert_eq!(mmu.page_out(None, &[Gfn(PAGE)]), Ok(1), "swap has room");
    if importer.has.load(Ordering::SeqCst) {
        return Some("an importer has a page that is gone".into());
    }
    if !importer.machine.is_zero(importer.home) {
        return Some("an importer that kept the page reads what was in it".into());
    }
    let (mut word, window) = ([0; 8], LocalStack::new(Context::Host));
    mmu.read_bytes_sleeping(None, &window, Gfn(PAGE).at(8), &mut word).expect("swap works");
    assert_eq!(u64::from_le_bytes(word), 2, "the importer's last store");
    None
}

/// A page is taken between the look at where it is and the importer's entry.
pub fn taken_before_the_import(rules: Rules) -> Option<String> {
    let (mmu, _, segment) = exporting(rules);
    mmu.give_up_page(IMPORTER, Gfn(PAGE));
    let other = mmu.clone();
    at_point(1, move || assert_eq!(other.page_out(None, &[Gfn(PAGE)]), Ok(1), "swap has room"));
    let imported = mmu.import_page(IMPORTER, segment, Gfn(PAGE), false);
    assert!(imported.is_ok(), "{imported:?}");
    mmu.audit().into_iter().next()
}

/// Has a vCPU enter the guest at its third look, and counts on.
#[derive(Debug)]
struct Enters(Arc<OnceLock<Weak<Mmu>>>, Arc<AtomicU32>);

impl Clock for Enters {
    fn now(&self) -> u64 {
        let look = self.1.fetch_add(1, Ordering::SeqCst);
        if look == 2 {
            let mmu = self.0.get().and_then(Weak::upgrade).expect("it is measured by its own MMU alone");
            mmu.coherence().enter_guest(0);
        }
        u64::from(look)
    }
}

/// A page is unmapped, a vCPU enters with the old translation, and who may not sleep puts the page back.
pub fn put_back(rules: Rules) -> Option<String> {
    let (back, looks) = (Arc::new(OnceLock::new()), Arc::new(AtomicU32::new(3)));
    let kicked = Arc::new(AtomicBool::new(false));
    let mmu = mmu(rules, 1, Box::new(Leaves(back.clone(), kicked.clone())));
    let mmu = Arc::new(mmu.with_clock(Box::new(Enters(back.clone(), looks.clone()))));
    back.set(Arc::downgrade(&mmu)).expect("set once");
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    store(&mmu, &vcpu, AT, 1);
    mmu.leave(&vcpu);
    looks.store(0, Ordering::SeqCst);
    let refused = mmu.discard(None, PAGE..PAGE + 1, Discard::Zero, May::NotSleep);
    assert!(refused.is_err(), "it entered between unmap and shootdown");
    assert_eq!(load(&mmu, &vcpu, AT), Ok(1), "the page is where it was");
    discard(&mmu);
    // One that was kicked will flush; one that was not runs on with what it has.
    if kicked.load(Ordering::SeqCst) { None } else { load(&mmu, &vcpu, AT).err() }
}

/// Leaves the guest as it is kicked.
struct Leaves(Arc<OnceLock<Weak<Mmu>>>, Arc<AtomicBool>);

impl Shootdown for Leaves {
    fn kick(&self, vcpu: u32) {
        self.1.store(true, Ordering::SeqCst);
        self.0.get().and_then(Weak::upgrade).iter().for_each(|mmu| mmu.coherence().leave_guest(vcpu));
    }
}

/// An spte is gone, and whoever took it has not said so yet.
pub fn half_removed(rules: Rules) -> Option<String> {
    let mmu = Arc::new(mmu(rules, 1, Box::new(NoVcpus)));
    let vcpu = mmu.vcpu(0);
    assert_eq!(mmu.fault(&vcpu, AT, Access::write(false)), Outcome::Fixed);
    assert!(!mmu.coherence().owes_flush(0));
    let (other, owed) = (mmu.clone(), Arc::new(AtomicBool::new(false)));
    let said = owed.clone();
    at_point(1, move || said.store(other.coherence().owes_flush(0), Ordering::SeqCst));
    mmu.zap_frame(Gfn(PAGE));
    (!owed.load(Ordering::SeqCst)).then(|| "an INVLPG meanwhile would ask for no flush".into())
}

/// The store of another vCPU, in that CPU's store buffer: it has looked for the mark, and found none.
struct Buffered(Arc<OnceLock<Weak<Mmu>>>, Machine);

impl Shootdown for Buffered {
    fn kick(&self, _vcpu: u32) {}

    fn settle_stores(&self) {
        self.0.get().and_then(Weak::upgrade).iter().for_each(|mmu| drain(mmu, &self.1));
    }
}

fn drain(mmu: &Mmu, machine: &Machine) {
    let PageState::Resident(mfn) = mmu.p2m().lookup(Gfn(PAGE)) else { panic!("the page has a frame") };
    machine.store(mfn.at(0), Width::B8, 0xcc);
}

/// Code is read after the barrier, so that it is what the store made of it.
pub fn store_on_its_way(rules: Rules) -> Option<String> {
    let (back, machine) = (Arc::new(OnceLock::new()), Machine::anonymous(512));
    let shootdown = Box::new(Buffered(back.clone(), machine.clone()));
    let mmu = Arc::new(mmu_over(machine.clone(), rules, 2, shootdown));
    back.set(Arc::downgrade(&mmu)).expect("set once");
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sized);
    store(&mmu, &vcpu, AT, 0x90);
    let code = mmu.code_frame(&vcpu, AT, false).expect("mapped");
    let decoded = load(&mmu, &vcpu, AT);
    drain(&mmu, &machine);
    let is_stale = decoded != load(&mmu, &vcpu, AT);
    (is_stale && mmu.code_generation(code.mfn) == code.generation)
        .then(|| "code of before a store counts as fresh".into())
}

/// A store ends the code of its page.
pub fn stored_code(rules: Rules) -> Option<String> {
    let mmu = mmu(rules, 1, Box::new(NoVcpus));
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sized);
    store(&mmu, &vcpu, AT, 0x90);
    let code = mmu.code_frame(&vcpu, AT, false).expect("mapped");
    store(&mmu, &vcpu, AT, 0xcc);
    (mmu.code_generation(code.mfn) == code.generation)
        .then(|| "code of before a store counts as fresh".into())
}

/// INVLPG ends what was found by the address.
pub fn moved_code(rules: Rules) -> Option<String> {
    let mmu = mmu(rules, 1, Box::new(NoVcpus));
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sized);
    store(&mmu, &vcpu, AT, 0x90);
    mmu.code_frame(&vcpu, AT, false).expect("mapped");
    let before = mmu.tlb_version(&vcpu);
    mmu.invalidate_page(&vcpu, AT);
    (mmu.tlb_version(&vcpu) == before).then(|| "code found by an address outlives its INVLPG".into())
}

/// Nothing but what takes nothing away; says whether a flush is owed for it all the same.
pub fn relaxed() -> u32 {
    let mmu = mmu(Rules::default(), 1, Box::new(NoVcpus));
    let vcpu = mmu.vcpu(0);
    let fault = |at: Gva, access| assert_eq!(mmu.fault(&vcpu, at, access), Outcome::Fixed, "{at}");
    fault(AT, Access::read(false));
    fault(Gva(0x5000), Access::write(false));
    mmu.watch(&vcpu, Gfn(6)).expect("there is room");
    fault(Gva(0x6000), Access::read(false));
    mmu.unwatch(Gfn(6));
    fault(Gva(0x6000), Access::write(false));
    u32::from(mmu.coherence().owes_flush(0))
}

/// A vCPU of the naive hardware: paging off, and what it has cached stays until it is told to flush.
struct Hard<'m> {
    mmu: &'m Mmu,
    region: Arc<MmapRegion>,
    vcpu: Vcpu,
    tlb: Tlb,
}

/// Pages in the part of memory that one shadow page is for.
const REGION: u32 = 512;

impl<'m> Hard<'m> {
    fn new(mmu: &'m Mmu, region: Arc<MmapRegion>) -> Hard<'m> {
        Hard { mmu, region, vcpu: mmu.vcpu(0), tlb: Tlb::new(Memory::Sticky) }
    }

    /// Has a page mapped.
    fn fault(&self, page: u32) {
        self.mmu.fault_sleeping(&self.vcpu, Gva(page << 12), Access::read(false)).expect("there is room");
    }

    /// The table that the shadow has for a page now.
    fn table(&self, page: u32) -> u64 {
        let root = self.mmu.root_address(&self.vcpu, false).expect("frames for a root");
        [0, 0, page / REGION].iter().fold(root.0, |at, index| {
            word(&self.region, at + u64::from(*index) * 8).load(Ordering::SeqCst) & 0xf_ffff_f000
        })
    }

    /// What it reaches by itself. Says first whether it was made to flush.
    fn reach(&mut self, page: u32) -> (bool, Option<u64>) {
        let root = self.mmu.root_address(&self.vcpu, false).expect("frames for a root");
        let owed = self.mmu.enter(&self.vcpu);
        if owed {
            let epoch = self.mmu.coherence().begin_flush();
            self.tlb.flush();
            self.mmu.coherence().end_flush(0, epoch);
        }
        let reached = self.tlb.access(&self.region, root.0, page << 12, Kind::Read).ok();
        self.mmu.leave(&self.vcpu);
        (owed, reached)
    }
}

fn hard_mmu(rules: Rules) -> (Mmu, Arc<MmapRegion>) {
    let region = Arc::new(MmapRegion::new(4096 << 12).expect("memory"));
    let config = Config { shadow_pages_max: 64, ..Config::of_pages(4 * REGION) };
    (Mmu::new(Machine::new(region.clone()), config, Box::new(NoVcpus)).with_rules(rules), region)
}

/// A shadow page dies, and its table serves for other addresses.
pub fn reused(rules: Rules) -> Option<String> {
    let (mmu, region) = hard_mmu(rules);
    let mut cpu = Hard::new(&mmu, region);
    // Every slot has served before: what is made from now on is made of dead pages' tables.
    (0..64).for_each(|n| cpu.fault(n * REGION));
    mmu.evict_shadow(u32::MAX);
    let (near, far) = (1, REGION + 1);
    [near, far].iter().for_each(|page| {
        mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(*page).at(0), &[1]).expect("there is room");
    });
    cpu.fault(0);
    cpu.reach(0);
    let table = cpu.table(0);
    for round in 0..400 {
        mmu.evict_shadow(u32::MAX);
        cpu.fault(far);
        if cpu.table(far) == table {
            let PageState::Resident(own) = mmu.p2m().lookup(Gfn(near)) else { panic!("it has a frame") };
            let (_, at) = cpu.reach(near);
            return at
                .filter(|at| *at != own.at(0).0)
                .map(|_| "a page is reached through the table of another".into());
        }
        if round % 3 == 0 {
            cpu.fault(2 * REGION);
        }
    }
    panic!("the table has never served again")
}

/// A shadow page dies, and its frame is given up: hardware that goes in next may still walk there.
pub fn given_back(rules: Rules) -> Option<String> {
    let mmu = mmu(rules, 1, Box::new(NoVcpus));
    let vcpu = mmu.vcpu(0);
    let end = 200;
    for n in 8..end {
        mmu.fault(&vcpu, Gva(n << 21), Access::read(false));
    }
    for page in 0..PAGES {
        mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(page).at(0), &[1]).expect("there is room");
    }
    mmu.enter(&vcpu);
    mmu.leave(&vcpu);
    let before = mmu.usage().frames_free;
    mmu.set_budget(mmu.budget_min()).expect("the least");
    mmu.background_round().expect("there is no swap to fail");
    assert!(mmu.usage().shadow_pages < end - 8, "{} frames free, {before} before", mmu.usage().frames_free);
    (!mmu.enter(&vcpu)).then(|| "a vCPU enters unflushed, and frames of tables that it knows are free".into())
}

/// Roots of a vCPU that has loaded more address spaces than there may be roots.
fn load_space(mmu: &Mmu, vcpu: &mut Vcpu, space: u32) {
    let mode = Mode { paging: true, write_protect: true, ..Mode::default() };
    mmu.set_paging(vcpu, mode, (8 + space) << 12, Flush::Yes).expect("no PDPTEs");
}

/// As many as there may be, each with a page of its own at 0x3000; the first is the one to go.
fn spaces(mmu: &Mmu) -> (Vcpu, u32) {
    let count = mmu.config().roots_max;
    let mut vcpu = mmu.vcpu(0);
    for space in 0..=count {
        put(mmu, u64::from(8 + space) << 12, 0x2067);
    }
    put(mmu, 0x200c, 0x3067);
    for space in 0..count {
        load_space(mmu, &mut vcpu, space);
        mmu.fault(&vcpu, Gva(0x3000), Access::read(false));
    }
    (vcpu, count)
}

/// An address space more than there are roots.
pub fn root_reused(rules: Rules) -> Option<String> {
    let mmu = mmu(rules, 1, Box::new(NoVcpus));
    let (mut vcpu, count) = spaces(&mmu);
    load_space(&mmu, &mut vcpu, count);
    let epoch = mmu.coherence().begin_flush();
    mmu.coherence().end_flush(0, epoch);
    mmu.root_address(&vcpu, false).expect("frames for a root");
    (!mmu.enter(&vcpu)).then(|| "a vCPU enters unflushed, by a root that has served another space".into())
}

/// The same, and another vCPU takes the root before the first has asked anybody to flush.
pub fn root_taken_by_another(rules: Rules) -> Option<String> {
    let mmu = Arc::new(mmu(rules, 2, Box::new(NoVcpus)));
    let (mut vcpu, count) = spaces(&mmu);
    load_space(&mmu, &mut vcpu, count);
    let mut other = mmu.vcpu(1);
    load_space(&mmu, &mut other, count);
    for id in 0..2 {
        let epoch = mmu.coherence().begin_flush();
        mmu.coherence().end_flush(id, epoch);
    }
    let (theirs, entered) = (mmu.clone(), Arc::new(AtomicBool::new(false)));
    let unflushed = entered.clone();
    // Its one directory is unlinked and that stamped at the first two points, the root's end at the next, if it is; then the
    // shootdown begins.
    let points = if rules.left_out() == Some(Rule::DebtOfRoot) { 3 } else { 4 };
    at_point(points, move || {
        theirs.root_address(&other, false).expect("frames for a root");
        unflushed.store(!theirs.enter(&other), Ordering::SeqCst);
        theirs.leave(&other);
    });
    mmu.root_address(&vcpu, false).expect("frames for a root");
    entered
        .load(Ordering::SeqCst)
        .then(|| "a vCPU enters unflushed, by a root that another has just unlinked".into())
}

/// A host that takes frames away itself, here from a software TLB that is told so after.
struct Host(Arc<AtomicBool>);

impl Shootdown for Host {
    fn kick(&self, _vcpu: u32) {}

    fn notify(&self, _frames: &mut dyn Iterator<Item = Mfn>) -> bool {
        self.0.store(true, Ordering::SeqCst);
        true
    }
}

/// What the host sees to is not used after.
pub fn notified(rules: Rules) -> Option<String> {
    let asked = Arc::new(AtomicBool::new(false));
    let mmu = mmu(rules, 1, Box::new(Host(asked.clone())));
    mmu.coherence().prefer_notifier(true);
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    store(&mmu, &vcpu, AT, 1);
    discard(&mmu);
    if asked.load(Ordering::SeqCst) {
        vcpu.tlb().iter().for_each(|tlb| tlb.flush_all());
    }
    load(&mmu, &vcpu, AT).err().filter(|why| why != "fault")
}

/// Who may not sleep wants a page that an importer has.
pub fn asked_too_late(rules: Rules) -> Option<String> {
    let (mmu, importer, _) = exporting(rules);
    importer.has.store(true, Ordering::SeqCst);
    let ask = || mmu.discard(None, PAGE..PAGE + 1, Discard::Zero, May::NotSleep);
    // Debug builds end where it would sleep, before anybody is told.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(ask)) {
        return Some(words_of(&*panic));
    }
    let told = importer.told.load(Ordering::SeqCst);
    told.then(|| "an importer was told by who may not sleep".into())
}

/// Pages that must be written to be gone, next to each other.
const WRITTEN: std::ops::Range<u32> = PAGE..PAGE + 8;

fn with_pages_to_write(rules: Rules) -> Mmu {
    let mmu = mmu(rules, 1, Box::new(NoVcpus));
    for page in WRITTEN {
        mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(page).at(0), &[7]).expect("there is room");
    }
    mmu
}

/// Reclaim by a thread that holds what the write would want.
pub fn written_in_scope(rules: Rules) -> Option<String> {
    let mmu = with_pages_to_write(rules);
    let pages: Vec<Gfn> = WRITTEN.map(Gfn).collect();
    let scope = NoIo::enter();
    mmu.page_out(None, &pages).expect("swap has room");
    drop(scope);
    let written = mmu.usage().swap_outs;
    (written > 0).then(|| format!("{written} pages were written within NoIo"))
}

/// Neighbours go to swap.
pub fn scattered(rules: Rules) -> Option<String> {
    let mmu = with_pages_to_write(rules);
    let pages: Vec<Gfn> = WRITTEN.map(Gfn).collect();
    assert_eq!(mmu.page_out(None, &pages), Ok(WRITTEN.len() as u32), "swap has room");
    let writes = mmu.usage().swap_writes;
    (writes > 1).then(|| format!("{} neighbours went to swap in {writes} writes", WRITTEN.len()))
}

/// The first page of the range that is collapsed, and one of its pages.
const RANGE: Gfn = Gfn(TABLE_ENTRIES as u32);
const GATHERED: Gfn = Gfn(RANGE.0 + 70);

/// A guest of two ranges, all of the second resident and its page full of `7`.
fn gathering(rules: Rules, clock: Box<dyn Clock>) -> Arc<Mmu> {
    let config = Config { blocks: true, ..Config::of_pages(2 * RANGE.0) };
    let mmu = Mmu::new(Machine::anonymous(2000 + config.block_frames()), config, Box::new(NoVcpus));
    let mmu = mmu.with_rules(rules).with_clock(clock);
    for page in RANGE.0..2 * RANGE.0 {
        mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(page).at(0), &[7]).expect("there is room");
    }
    Arc::new(mmu)
}

/// A page of a range that is huge is discarded.
pub fn taken_from_a_huge_range(rules: Rules) -> Option<String> {
    let mmu = gathering(rules, Box::new(NoClock));
    mmu.collapse(RANGE).expect("nobody holds a page");
    mmu.discard(None, [GATHERED.0], Discard::Zero, May::Sleep).expect("nobody holds it");
    mmu.audit().into_iter().next()
}

/// A page of one is watched.
pub fn watched_in_a_huge_range(rules: Rules) -> Option<String> {
    let mmu = gathering(rules, Box::new(NoClock));
    mmu.collapse(RANGE).expect("nobody holds a page");
    mmu.watch(&mmu.vcpu(0), GATHERED).expect("there is room");
    mmu.audit().into_iter().next()
}

/// Discards the page, without sleep, while it is on its way; notes whether it is told that this is done.
#[derive(Debug, Default)]
struct Discards(Arc<OnceLock<Weak<Mmu>>>, Arc<OnceLock<bool>>, AtomicBool);

impl Clock for Discards {
    fn now(&self) -> u64 {
        let mmu = self.0.get().and_then(Weak::upgrade);
        if let Some(mmu) = mmu.filter(|mmu| mmu.p2m().lookup(GATHERED) == PageState::Moving)
            && !self.2.swap(true, Ordering::SeqCst)
        {
            let done = mmu.discard(None, [GATHERED.0], Discard::Zero, May::NotSleep);
            let _ = self.1.set(done.is_ok());
        }
        0
    }
}

/// The race of 2024: a discard meets a page that a collapse has on its way.
pub fn discarded_while_it_is_gathered(rules: Rules) -> Option<String> {
    let (back, done) = (Arc::new(OnceLock::new()), Arc::new(OnceLock::new()));
    let mmu = gathering(rules, Box::new(Discards(back.clone(), done.clone(), AtomicBool::new(false))));
    back.set(Arc::downgrade(&mmu)).expect("set once");
    mmu.collapse(RANGE).expect("nobody holds a page");
    let (mut byte, window) = ([0], LocalStack::new(Context::Host));
    mmu.read_bytes(&window, GATHERED.at(0), &mut byte).expect("resident");
    let told = *done.get().expect("it came in");
    (told && byte == [7]).then(|| "a page was discarded, and has what it had".into())
}

/// A page of a range that a TLB has as a whole is discarded.
pub fn mapped_large_and_split(rules: Rules) -> Option<String> {
    let mmu = gathering(rules, Box::new(NoClock));
    mmu.collapse(RANGE).expect("nobody holds a page");
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    let at = Gva(GATHERED.0 << 12);
    store(&mmu, &vcpu, Gva(RANGE.0 << 12), 1);
    load(&mmu, &vcpu, at).expect("the same entry");
    mmu.leave(&vcpu);
    mmu.discard(None, [GATHERED.0], Discard::Zero, May::Sleep).expect("nobody holds it");
    mmu.tlb_enter(&vcpu);
    let found = load(&mmu, &vcpu, at);
    mmu.leave(&vcpu);
    found.err().filter(|why| why != "fault")
}
