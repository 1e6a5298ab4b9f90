//! A page that is used, taken and brought back, by the MMU's own functions.
//!
//! The other models have the steps of one protocol, in words of their own. These have a whole [`Mmu`] of two pages, and what
//! its callers call: twins alone are copies, with one step moved.
//!
//! | who | against whom | twins |
//! |---|---|---|
//! | a window's mapping | who takes the page | the mapping does not look again; the page is claimed after the look for pins |
//! | a fill, and the guest behind it | the same | the fill looks where the page is before it has the bucket |
//! | swap-in | another swap-in of the page | it is not claimed |
//! | a store | a swap-out | the page is written out before it is claimed |
//! | a store to decoded code | who takes the page and puts it back | the page is looked up to be told, once it is mapped no more |
//! | a taker of the pool's idle slot | who takes the page | the page is claimed after the look for pins |
//! | a taker of another page | the last mapping of the only slot | (nobody lets go of it) |
//!
//! Limits: loom sees the MMU's locks and atomics; the two of swap are bounded to four preemptions. Machine memory (sptes, guest memory)
//! is `std`'s: who stores there is seen at once, and a switch of threads comes before or after, at the next lock.

use super::{Frame, explore};
use crate::addr::{Gfn, Gva, Mfn};
use crate::bucket::Link;
use crate::invalidation::{Caller, Closed, May, Settled, Unmapped};
use crate::p2m::PageState;
use crate::records::Cause;
use crate::shadow::RootRef;
use crate::spte::{Spte, l1_index};
use crate::swap::{MemorySwap, SwapSlot};
use crate::sync::{Arc, thread};
use crate::vcpu::Vcpu;
use crate::window::{Intent, Tag};
use crate::{Access, Config, Context, LocalStack, Machine, Mmu, NoVcpus, Outcome};

/// The page in question, and another.
const PAGE: Gfn = Gfn(1);
const OTHER: Gfn = Gfn(0);
/// Paging is off.
const AT: Gva = Gva(0x1000);
/// What a page is said to be in when it is gone; nobody reads it back.
const GONE: SwapSlot = SwapSlot(0);

struct World {
    mmu: Mmu,
    /// The frame that the page has at first.
    mfn: Mfn,
    frame: Frame,
}

/// The page is in memory, and its first byte is 1.
fn world() -> Arc<World> {
    let config = Config::of_pages(2);
    let mmu = Mmu::new(Machine::anonymous(8), config, Box::new(NoVcpus));
    let mmu = mmu.with_swap(Box::new(MemorySwap::new(2))).with_window_slots(1);
    mmu.write_bytes(&LocalStack::new(Context::Host), PAGE.at(0), &[1]).expect("memory");
    let PageState::Resident(mfn) = mmu.p2m.lookup(PAGE) else { panic!("it has just been written to") };
    Arc::new(World { mmu, mfn, frame: Frame::default() })
}

/// The page is taken from whoever maps it; nobody is waited for yet.
fn unmap(mmu: &Mmu) -> Unmapped<'_> {
    let closed = mmu.begin(Cause::PageOut, &[PAGE], &mut Caller::new(None, May::Sleep));
    closed.and_then(Closed::unmap).expect("it may sleep")
}

impl World {
    /// The page's first frame is used by whoever believes that the page is in `mfn`.
    fn touch(&self, mfn: Mfn) {
        if mfn == self.mfn {
            self.frame.touch();
        }
    }

    /// Takes the page for good: no more is said of where it is.
    fn take(&self) -> bool {
        let mut settling = unmap(&self.mmu).shoot_down().expect("it may sleep");
        settling.settle(|_| {
            self.frame.hand_on();
            Some(Settled::Swapped(GONE))
        });
        settling.end() > 0
    }

    /// The same, looking for pins first.
    fn take_looking_first(&self) -> bool {
        let _bucket = self.mmu.buckets.lock(PAGE);
        let free = self.mmu.pins_of(PAGE, self.mfn) == 0;
        if free && self.mmu.p2m.claim(PAGE, PageState::Resident(self.mfn)).is_some() {
            self.frame.hand_on();
        }
        free
    }

    fn map(&self) {
        let window = LocalStack::new(Context::Host);
        if let Ok(map) = self.mmu.map_page(&window, PAGE, Tag::Host, Intent::Read) {
            self.touch(map.mfn());
        }
    }

    fn map_without_a_second_look(&self) {
        let window = LocalStack::new(Context::Host);
        if let PageState::Resident(mfn) = self.mmu.p2m.lookup(PAGE) {
            self.mmu.frames.pin(mfn);
            let _map = window.map(&self.mmu.windows, &self.mmu.frames, PAGE, mfn, Tag::Host);
            self.touch(mfn);
        }
    }

    fn take_slot(&self) {
        if let Ok(map) = self.mmu.try_take_page(PAGE, Intent::Read) {
            self.touch(self.mfn);
            drop(map);
        }
    }

    fn audit(&self) {
        let findings = self.mmu.audit();
        assert!(findings.is_empty(), "{findings:#?}");
    }
}

/// Runs the two side by side.
fn side_by_side<T: Send + 'static>(
    world: &Arc<World>,
    one: impl FnOnce(&World) + Send + 'static,
    other: impl FnOnce(&World) -> T,
) -> T {
    let theirs = world.clone();
    let thread = thread::spawn(move || one(&theirs));
    let done = other(world);
    thread.join().unwrap();
    done
}

fn map_against_taker(map: fn(&World), take: fn(&World) -> bool) {
    side_by_side(&world(), map, take);
}

#[test]
fn a_mapped_page_is_not_taken() {
    explore(None, || map_against_taker(World::map, World::take));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_mapped_without_a_second_look() {
    explore(None, || map_against_taker(World::map_without_a_second_look, World::take));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_mapped_and_claimed_after_the_look_for_pins() {
    explore(None, || map_against_taker(World::map, World::take_looking_first));
}

/// The guest uses the page that a fill has mapped.
fn fill_against_taker(fill: fn(&World, &Vcpu, RootRef)) {
    let world = world();
    let vcpu = world.mmu.vcpu(0);
    // The tables are there, the page's leaf is not.
    assert_eq!(world.mmu.fault(&vcpu, Gva(0), Access::read(false)), Outcome::Fixed);
    let root = world.mmu.root(&vcpu, false).expect("there are frames");
    let guest = move |world: &World| {
        fill(world, &vcpu, root);
        let ledger = &world.mmu.coherence;
        if ledger.enter_guest(0) {
            let epoch = ledger.begin_flush();
            ledger.end_flush(0, epoch);
        }
        let spte = world.leaf(root);
        if spte.is_present() {
            world.touch(spte.mfn());
        }
        ledger.leave_guest(0);
    };
    assert!(side_by_side(&world, guest, World::take), "nothing holds the page");
}

impl World {
    fn leaf(&self, root: RootRef) -> Spte {
        self.mmu.spte(self.place(root))
    }

    fn place(&self, root: RootRef) -> crate::Mpa {
        let slot = self.mmu.find_table(root, AT).expect("the tables are there");
        self.mmu.pages.mfn(slot).at(l1_index(AT) * 8)
    }
}

fn fill(world: &World, vcpu: &Vcpu, _: RootRef) {
    world.mmu.fault(vcpu, AT, Access::read(false));
}

fn fill_that_looks_before_the_bucket(world: &World, _: &Vcpu, root: RootRef) {
    let PageState::Resident(mfn) = world.mmu.p2m.lookup(PAGE) else { return };
    let at = world.place(root);
    let mut bucket = world.mmu.buckets.lock(PAGE);
    world.mmu.store_spte(at, Spte::leaf(mfn, false, false));
    bucket.link(Link::new(PAGE, at));
}

#[test]
fn a_page_is_filled_or_taken() {
    explore(None, || fill_against_taker(fill));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_the_fill_looks_before_it_has_the_bucket() {
    explore(None, || fill_against_taker(fill_that_looks_before_the_bucket));
}

fn swap_in_twice(bring_in: fn(&World)) {
    let world = world();
    assert_eq!(world.mmu.page_out(None, &[PAGE]), Ok(1));
    side_by_side(&world, bring_in, bring_in);
    let mut byte = [0];
    world.mmu.read_bytes(&LocalStack::new(Context::Host), PAGE.at(0), &mut byte).expect("it is in memory");
    assert_eq!((byte, world.mmu.swap.stats().pages_read), ([1], 1), "it is read once");
    world.audit();
}

fn bring_in(world: &World) {
    world.mmu.bring_in(None, PAGE).expect("there are frames");
}

fn bring_in_unclaimed(world: &World) {
    let mmu = &world.mmu;
    mmu.buckets.close(PAGE);
    if let PageState::Swapped(slot) = mmu.p2m.lookup(PAGE) {
        let kind = crate::frames::FrameKind::Guest(PAGE);
        let mfn = mmu.take_frame(kind, crate::frames::Draw::Ordinary).expect("there are frames");
        let mut page = vec![0; crate::PAGE_SIZE as usize];
        mmu.swap.read(slot, &mut page).expect("memory");
        mmu.machine.write(mfn.at(0), &page);
        mmu.lru_add(PAGE, mfn);
        let _ = mmu.p2m.claim(PAGE, PageState::Swapped(slot));
        mmu.p2m.transition_with(PAGE, PageState::Moving, PageState::Resident(mfn), Some(slot));
    }
    mmu.buckets.open(PAGE);
}

#[test]
fn a_page_is_swapped_in_once_by_two() {
    explore(4, || swap_in_twice(bring_in));
}

#[test]
#[should_panic(expected = "it is read once")]
fn twin_swapped_in_without_a_claim() {
    explore(2, || swap_in_twice(bring_in_unclaimed));
}

fn store_against_swap_out(swap_out: fn(&World)) {
    let world = world();
    side_by_side(&world, store, swap_out);
    let mut bytes = [0; 2];
    world
        .mmu
        .read_bytes_sleeping(None, &LocalStack::new(Context::Host), PAGE.at(0), &mut bytes)
        .expect("memory");
    assert_eq!(bytes, [1, 2], "a store is lost");
    world.audit();
}

fn swap_out(world: &World) {
    world.mmu.page_out(None, &[PAGE]).expect("swap has room");
}

fn swap_out_written_before_it_is_claimed(world: &World) {
    let mmu = &world.mmu;
    let slots = mmu.swap.take_run(&[PAGE]).expect("swap has room");
    let mut page = vec![0; crate::PAGE_SIZE as usize];
    mmu.machine.read(world.mfn.at(0), &mut page);
    mmu.swap.write(SwapSlot(slots.start), &page).expect("memory");
    let mut settling = unmap(mmu).shoot_down().expect("it may sleep");
    settling.settle(|_| Some(Settled::Swapped(SwapSlot(slots.start))));
    if settling.end() == 0 {
        mmu.swap.free(slots);
    }
}

#[test]
fn a_store_is_not_lost_to_a_swap_out() {
    explore(4, || store_against_swap_out(swap_out));
}

#[test]
#[should_panic(expected = "a store is lost")]
fn twin_written_out_before_it_is_claimed() {
    explore(2, || store_against_swap_out(swap_out_written_before_it_is_claimed));
}

fn store_to_code(store: fn(&World)) {
    let world = world();
    world.mmu.frames.mark_code(world.mfn);
    side_by_side(&world, store, |world| drop(unmap(&world.mmu)));
    assert_eq!(world.mmu.code_generation(world.mfn), 0, "stale code would run on");
}

fn store(world: &World) {
    let window = LocalStack::new(Context::Host);
    world.mmu.write_bytes_sleeping(None, &window, PAGE.at(1), &[2]).expect("there are frames");
}

fn store_and_look_up(world: &World) {
    let window = LocalStack::new(Context::Host);
    let Ok(map) = world.mmu.map_page(&window, PAGE, Tag::Host, Intent::Write) else { return store(world) };
    map.write(1, &[2]);
    drop(map);
    if let PageState::Resident(mfn) = world.mmu.p2m.lookup(PAGE) {
        world.mmu.table_written(PAGE, mfn, 1, 1);
    }
}

#[test]
fn a_store_to_a_page_that_is_put_back_ends_its_code() {
    explore(None, || store_to_code(store));
}

#[test]
#[should_panic(expected = "stale code")]
fn twin_told_of_once_it_is_mapped_no_more() {
    explore(None, || store_to_code(store_and_look_up));
}

fn slot_against_taker(take: fn(&World) -> bool) {
    let world = world();
    // A slot that is idle.
    drop(world.mmu.try_take_page(PAGE, Intent::Read).expect("resident"));
    let taken = side_by_side(&world, World::take_slot, take);
    let stats = world.mmu.window_stats();
    assert_eq!(stats.taken, 0);
    assert!(taken || stats.idle == 1, "a mapping kept the page, and is gone without a trace: {stats:?}");
    assert!(taken || world.take(), "an idle slot keeps the page");
    let left = (world.mmu.window_stats().idle, world.mmu.frames.pins(world.mfn));
    assert_eq!(left, (0, 0), "the frame is gone, and a slot pins it");
}

#[test]
fn an_idle_slot_is_taken_again_or_given_up() {
    explore(None, || slot_against_taker(World::take));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_the_page_is_claimed_after_its_idle_slot_was_given_up() {
    explore(None, || slot_against_taker(World::take_looking_first));
}

fn only_slot(is_let_go: bool) {
    let world = world();
    let held = world.mmu.try_take_page(PAGE, Intent::Read).expect("resident").pass_on();
    if !is_let_go {
        std::mem::forget(held);
        world.mmu.take_page(OTHER, Intent::Read, None).expect("memory");
        return;
    }
    let take = |world: &World| {
        let map = world.mmu.take_page(OTHER, Intent::Read, None).expect("memory");
        assert_eq!(map.gfn(), OTHER);
    };
    side_by_side(&world, take, move |_| drop(held));
    let stats = world.mmu.window_stats();
    assert_eq!((stats.taken, stats.idle, stats.waiters), (0, 1, 0));
    world.audit();
}

#[test]
fn who_waits_for_the_only_slot_hears_that_it_is_idle() {
    explore(None, || only_slot(true));
}

#[test]
#[should_panic(expected = "deadlock")]
fn twin_nobody_lets_go_of_the_only_slot() {
    explore(None, || only_slot(false));
}
