//! The balloon: pages given up, taken back and reported; statistics; what the driver says it has given.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use umbra_mmu::p2m::PageState;
use umbra_mmu::window::Intent;
use umbra_mmu::{Gfn, Mmu};

use super::super::balloon::{Balloon, BalloonDevice, GuestStats, PFNS_MAX};
use super::super::fuzz::{BUFFERS, Bench, LOW_PAGES, PAGES, Registers, WRITE};
use super::super::worker::Bell;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;

const ALL: u64 = 0x27;
const FIRST: u32 = 0x300;

struct Guest {
    bench: Bench<BalloonDevice>,
    balloon: Balloon,
    bell: Arc<Bell>,
}

fn guest() -> Guest {
    let mut bench = Bench::new(BalloonDevice::new());
    let bell = Arc::new(Bell::default());
    let balloon = bench.worker.device().handle(Arc::clone(&bench.port) as _, Arc::clone(&bell));
    bench.set_up(ALL, 0);
    Guest { bench, balloon, bell }
}

impl Guest {
    fn send(&mut self, queue: usize, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.bench.poke(BUFFERS + 2, &bytes);
        let before = self.bench.used(queue).0;
        self.bench.offer_chain(queue, 1, &[(BUFFERS + 2, bytes.len() as u32, 0)], false);
        self.bench.serve().expect("frames");
        assert_eq!(self.bench.used(queue), (before + 1, 1, 0), "used back");
    }

    fn state_of(&self, page: u32) -> PageState {
        self.bench.mmu.p2m().lookup(Gfn(page))
    }

    /// Offers statistics from descriptor `head`; true if they came back at once.
    fn tell(&mut self, head: u16, stats: &[(u16, u64)]) -> bool {
        let entry = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes: Vec<u8> = stats.iter().flat_map(entry).collect();
        self.bench.poke(BUFFERS, &bytes);
        let before = self.bench.used(STATS).0;
        self.bench.offer_chain(STATS, head, &[(BUFFERS, bytes.len() as u32, 0)], false);
        self.bench.serve().expect("frames");
        self.bench.used(STATS).0 != before
    }
}

fn touch(guest: &Guest, pages: std::ops::Range<u32>) {
    pages.for_each(|page| guest.bench.poke(u64::from(page) << 12, &[7; 8]));
}

#[test]
fn pages_that_are_given_up_lose_their_frames_and_read_as_zeros_when_they_are_touched_again() {
    let mut guest = guest();
    touch(&guest, FIRST..FIRST + 40);
    let pages: Vec<Gfn> = (FIRST + 30..FIRST + 40).map(Gfn).collect();
    guest.bench.mmu.page_out(None, &pages).expect("room");
    // In any order, some twice, some never touched.
    let mut pfns: Vec<u32> = (FIRST..FIRST + 50).rev().collect();
    pfns.extend([FIRST, FIRST + 3]);
    guest.send(INFLATE, &pfns);
    assert!((FIRST..FIRST + 50).all(|page| guest.state_of(page) == PageState::Ballooned));
    assert_eq!((guest.balloon.state().inflated, guest.balloon.state().passed_over), (50, 0));
    assert_eq!(guest.bench.mmu.usage().ballooned, 50);
    guest.send(DEFLATE, &[FIRST, FIRST + 31]);
    assert_eq!(guest.balloon.state().deflated, 2);
    for page in [FIRST, FIRST + 31] {
        assert_eq!(guest.bench.peek(u64::from(page) << 12, 8), [0; 8]);
    }
    assert_eq!(guest.bench.mmu.usage().ballooned, 48);
    assert_eq!(guest.bench.mmu.audit(), Vec::<String>::new());
}

#[test]
fn pages_that_are_no_memory_low_or_held_are_passed_over_and_the_others_taken() {
    let mut guest = guest();
    touch(&guest, FIRST..FIRST + 4);
    let mmu: &Mmu = &guest.bench.mmu;
    assert!(mmu.make_device(Gfn(FIRST + 8)));
    let held = mmu.take_page(Gfn(FIRST + 1), Intent::Read, None).expect("a frame").pass_on();
    let bytes: Vec<u8> = [FIRST, FIRST + 1, FIRST + 2, LOW_PAGES - 1, PAGES, u32::MAX, FIRST + 8]
        .iter()
        .flat_map(|p| p.to_le_bytes())
        .collect();
    guest.bench.poke(BUFFERS, &bytes);
    let port = Arc::clone(&guest.bench.port);
    guest.bench.driver.offer_chain(mmu, INFLATE, 1, &[(BUFFERS, bytes.len() as u32, 0)], false);
    while guest.bench.worker.round(mmu, &*port).expect("frames") {}
    drop(held);
    let state = guest.balloon.state();
    assert_eq!((state.inflated, state.passed_over), (2, 5));
    assert_eq!(guest.state_of(FIRST), PageState::Ballooned);
    assert_eq!(guest.state_of(FIRST + 2), PageState::Ballooned);
    assert!(matches!(guest.state_of(FIRST + 1), PageState::Resident(_)));
}

#[test]
fn what_is_more_than_a_request_may_have_is_passed_over() {
    let mut guest = guest();
    let pfns: Vec<u32> = vec![FIRST; PFNS_MAX + 3];
    guest.send(INFLATE, &pfns);
    assert_eq!((guest.balloon.state().inflated, guest.balloon.state().passed_over), (1, 3));
}

#[test]
fn requests_that_make_no_sense_are_used_back_and_change_nothing() {
    let mut guest = guest();
    for queue in [INFLATE, DEFLATE, REPORTING] {
        for (at, length, flags) in
            [(0xfee0_0000, 64, 0), (1 << 50, 0x10_0000, WRITE), (BUFFERS, 3, 0), (u64::MAX, 9, WRITE)]
        {
            let before = guest.bench.used(queue).0;
            guest.bench.offer_chain(queue, 1, &[(at, length, flags)], false);
            guest.bench.serve().expect("frames");
            assert_eq!(guest.bench.used(queue).0, before + 1, "{queue} {at:#x}");
        }
    }
    let state = guest.balloon.state();
    assert_eq!((state.inflated, state.deflated, state.reported, state.stats), (0, 0, 0, None));
    assert_eq!(guest.bench.port.read(0x70), 0xf);
}

#[test]
fn reported_pages_lose_their_frames_before_the_driver_has_them_back() {
    let mut guest = guest();
    touch(&guest, FIRST..FIRST + 20);
    let at = |page: u32| u64::from(page) << 12;
    // Ten pages and a bit at both ends, which stay; then all there is, and more.
    guest.bench.offer_chain(REPORTING, 1, &[(at(FIRST + 5) - 8, 0xa010, WRITE)], false);
    guest.bench.serve().expect("frames");
    for page in FIRST..FIRST + 20 {
        let gone = (FIRST + 5..FIRST + 15).contains(&page);
        assert_eq!(guest.state_of(page) == PageState::Zero, gone, "{page:#x}");
    }
    assert_eq!(guest.balloon.state().reported, 10);
    assert_eq!(guest.bench.used(REPORTING), (1, 1, 0));
    // A chain of 4 GiB is none.
    let everything = (at(FIRST), 0x5000_0000, WRITE);
    guest.bench.offer_chain(REPORTING, 1, &[everything; 3], false);
    guest.bench.serve().expect("frames");
    // Three times, but each page counts once.
    assert_eq!(guest.balloon.state().reported, u64::from(10 + PAGES - FIRST));
    assert_eq!(guest.bench.mmu.audit(), Vec::<String>::new());
}

#[test]
fn statistics_are_kept_until_newer_ones_are_wanted() {
    let mut guest = guest();
    assert!(!guest.tell(3, &[(4, 1000), (5, u64::MAX), (77, 5)]), "kept");
    let want = GuestStats { free: Some(1000), total: Some(u64::MAX), ..GuestStats::default() };
    assert_eq!((guest.balloon.state().stats, guest.balloon.state().stats_updates), (Some(want), 1));
    assert_eq!(guest.bench.used(STATS).0, 0);
    guest.balloon.ask_for_stats();
    assert!(guest.bell.wait());
    guest.bench.serve().expect("frames");
    assert_eq!(guest.bench.used(STATS), (1, 3, 0), "given back");
    guest.bench.serve().expect("frames");
    assert_eq!(guest.bench.used(STATS).0, 1, "once");
    assert!(!guest.tell(4, &[(0, 1), (1, 2), (2, 3), (3, 4), (6, 5), (7, 6), (8, 7), (9, 8)]));
    let stats = guest.balloon.state().stats.expect("some");
    assert_eq!((stats.swap_in, stats.free, stats.huge_page_failures), (Some(1), None, Some(8)));
    assert!(guest.tell(5, &[(4, 1)]), "a second one comes back");
    // A reset: the buffer is the driver's again.
    guest.bench.set_up(ALL, 0);
    guest.balloon.ask_for_stats();
    guest.bench.serve().expect("frames");
    assert_eq!(guest.bench.used(STATS).0, 0);
    assert!(!guest.tell(6, &[(4, 2)]));
    guest.bench.serve().expect("frames");
    assert_eq!(guest.bench.used(STATS).0, 0, "what has come is new enough");
}

#[test]
fn the_target_reaches_the_driver_and_what_it_has_given_the_host() {
    let mut guest = guest();
    let told = Arc::new(AtomicU32::new(0));
    let own = Arc::clone(&told);
    assert!(guest.balloon.on_change(Box::new(move |actual| own.store(actual, Ordering::SeqCst))));
    assert!(!guest.balloon.on_change(Box::new(|_| ())));
    guest.balloon.set_target(0x1234);
    assert_eq!((guest.bench.port.read(0x100), guest.bench.port.read(0x60)), (0x1234, 2));
    guest.bench.port.write(0x100, 1);
    guest.bench.port.write(0x104, 0x1200);
    assert_eq!(guest.bench.port.board().take_notifies(), 1);
    guest.bench.serve().expect("frames");
    let state = guest.balloon.state();
    assert_eq!((state.target, state.actual, told.load(Ordering::SeqCst)), (0x1234, 0x1200, 0x1200));
    assert_eq!(guest.bench.port.read(0x100), 0x1234, "the host's");
}
