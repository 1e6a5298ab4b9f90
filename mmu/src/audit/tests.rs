//! Every invariant broken on purpose, and found by name.

use super::*;
use crate::format::Mode;
use crate::frames::{DIRTY, Draw, WATCHED};
use crate::swap::{MemorySwap, SwapSlot};
use crate::sync::Ordering;
use crate::{Access, Config, Flush, Gpa, Gva, Machine, NoVcpus, Outcome, Vcpu, Width};

const DIRECTORY: Gfn = Gfn(1);
const TABLE: Gfn = Gfn(2);
const DATA: Gfn = Gfn(3);
const SMALL: Gva = Gva(0x3000);
const LARGE: Gva = Gva(0x40_5000);

/// A two-level guest with one small page, the table itself, and one large page mapped and touched.
struct Guest {
    mmu: Mmu,
    vcpu: Vcpu,
}

impl Guest {
    fn new() -> Guest {
        let config = Config { reserved_frames: 1, ..Config::of_pages(64) };
        let mmu = Mmu::new(Machine::anonymous(400), config, Box::new(NoVcpus))
            .with_swap(Box::new(MemorySwap::new(64)));
        let mut guest = Guest { vcpu: mmu.vcpu(0), mmu };
        guest.store(DIRECTORY.at(0), 0x2063);
        guest.store(DIRECTORY.at(4), 0x00e3);
        for page in 0..8 {
            guest.store(TABLE.at(4 * page), u64::from(page) << 12 | 0x63);
        }
        let mode = Mode { paging: true, pse: true, write_protect: true, ..Mode::default() };
        guest.mmu.set_paging(&mut guest.vcpu, mode, 0x1000, Flush::Yes).expect("no PDPTEs");
        for gva in [SMALL, Gva(0x2000), LARGE] {
            let outcome = guest.mmu.fault(&guest.vcpu, gva, Access::read(false));
            assert_eq!(outcome, Outcome::Fixed);
        }
        assert_eq!(guest.mmu.audit(), Findings::new(), "whole before it is broken");
        guest
    }

    fn store(&self, gpa: Gpa, value: u64) {
        self.mmu.store(self.vcpu.window(), gpa, Width::B4, value).expect("guest memory");
    }

    fn take(&self, kind: FrameKind) -> Mfn {
        self.mmu.take_frame(kind, Draw::Ordinary).expect("a frame")
    }

    fn mfn(&self, gfn: Gfn) -> Mfn {
        match self.mmu.p2m.lookup(gfn) {
            PageState::Resident(mfn) => mfn,
            state => panic!("{gfn} is {state:?}"),
        }
    }

    /// Slot of the shadow page of a guest table.
    fn slot(&self, gfn: Gfn, shape: Shape) -> u32 {
        let live = self.mmu.pages.live();
        let found = live.iter().find(|(_, key)| key.gfn == gfn && key.role.shape == shape);
        found.expect("the table is shadowed").0
    }

    /// Where the leaf for `gva` is, and what it is.
    fn leaf(&self, gva: Gva) -> (Mpa, Spte) {
        let root = self.mmu.root(&self.vcpu, false).expect("a root");
        let link = self.mmu.find_link(root, gva).expect("a table");
        let table = self.mmu.slot_of(link).expect("a table");
        let at = self.mmu.pages.mfn(table).at(crate::spte::l1_index(gva) * 8);
        (at, self.mmu.spte(at))
    }

    /// Stores a word of machine memory behind everybody's back.
    fn scribble(&self, at: Mpa, value: u64) {
        self.mmu.machine.word64(at).store(value, Ordering::SeqCst);
    }

    fn scribble_gpte(&self, table: Gfn, index: u32, value: u32) {
        self.mmu.machine.word32(self.mfn(table).at(4 * index)).store(value, Ordering::SeqCst);
    }

    #[track_caller]
    fn expect(&self, invariant: &str) {
        let findings = self.mmu.audit();
        assert!(findings.iter().any(|f| f.starts_with(invariant)), "{invariant} is not among {findings:#?}");
    }
}

#[test]
fn inv_shadow_1_a_page_that_has_lost_its_key() {
    let guest = Guest::new();
    let slot = guest.slot(TABLE, Shape::Table);
    guest.mmu.pages.lock(slot, false).key = None;
    guest.expect("INV-SHADOW-1");
}

#[test]
fn inv_shadow_2_a_parent_that_links_elsewhere() {
    let guest = Guest::new();
    let slot = guest.slot(TABLE, Shape::Table);
    guest.mmu.pages.lock(slot, false).parents.push(guest.leaf(SMALL).0);
    guest.expect("INV-SHADOW-2");
}

#[test]
fn inv_shadow_2_a_link_that_its_child_does_not_know() {
    let guest = Guest::new();
    let slot = guest.slot(TABLE, Shape::Table);
    guest.mmu.pages.lock(slot, false).parents.clear();
    guest.expect("INV-SHADOW-2");
}

#[test]
fn inv_shadow_2_a_link_to_what_is_no_table() {
    let guest = Guest::new();
    let directory = guest.mmu.pages.mfn(guest.slot(DIRECTORY, Shape::Directory));
    guest.scribble(directory.at(8 * 100), Spte::link(guest.mfn(DATA)).0);
    guest.expect("INV-SHADOW-2");
}

#[test]
fn inv_shadow_3_a_free_page_that_is_not_empty() {
    let guest = Guest::new();
    let table = guest.mmu.pages.mfn(guest.slot(TABLE, Shape::Table));
    guest.mmu.evict_shadow(u32::MAX);
    assert_eq!(guest.mmu.audit(), Findings::new());
    guest.scribble(table.at(8 * 7), 1);
    guest.expect("INV-SHADOW-3");
}

#[test]
fn inv_shadow_4_a_root_that_leads_elsewhere() {
    let guest = Guest::new();
    let root = guest.mmu.root(&guest.vcpu, false).expect("a root");
    guest.scribble(root.pml4.at(0), Spte::link(guest.mfn(DATA)).0);
    guest.expect("INV-SHADOW-4");
}

#[test]
fn inv_p2m_1_an_spte_to_a_frame_that_is_not_the_guests() {
    let guest = Guest::new();
    let (at, spte) = guest.leaf(SMALL);
    guest.scribble(at, Spte::leaf(Mfn(0), spte.is_writable(), true).0);
    guest.expect("INV-P2M-1");
}

#[test]
fn inv_p2m_1_a_frame_whose_page_is_elsewhere() {
    let guest = Guest::new();
    let other = guest.take(FrameKind::Guest(DATA));
    guest.expect("INV-P2M-1");
    assert!(guest.mmu.p2m.claim(DATA, PageState::Resident(guest.mfn(DATA))).is_some());
    guest.expect("INV-P2M-3");
    assert!(guest.mmu.p2m.transition(DATA, PageState::Moving, PageState::Resident(other)));
    guest.expect("INV-P2M-1");
}

#[test]
fn inv_p2m_4_a_page_that_is_counted_and_not_there() {
    let guest = Guest::new();
    guest.mmu.p2m.miscount();
    guest.expect("INV-P2M-4");
}

#[test]
fn inv_track_1_a_writable_spte_to_a_tracked_table() {
    let guest = Guest::new();
    let (at, spte) = guest.leaf(Gva(0x2000));
    assert!(!spte.is_writable());
    guest.scribble(at, Spte::leaf(spte.mfn(), true, true).0);
    guest.expect("INV-TRACK-1");
}

#[test]
fn inv_track_1_a_writable_spte_to_a_watched_page() {
    let guest = Guest::new();
    let store = guest.mmu.fault(&guest.vcpu, SMALL, Access::write(false));
    assert!(matches!(store, Outcome::Fixed | Outcome::Spurious));
    guest.mmu.frames.change_flags(guest.mfn(DATA), 0, WATCHED);
    guest.expect("INV-TRACK-1");
}

#[test]
fn inv_track_2_a_shadowed_table_without_its_mark() {
    let guest = Guest::new();
    guest.mmu.frames.change_flags(guest.mfn(TABLE), SHADOWED, 0);
    guest.expect("INV-TRACK-2");
}

#[test]
fn inv_track_2_a_mark_without_a_page() {
    let guest = Guest::new();
    guest.mmu.frames.change_flags(guest.mfn(DATA), 0, SHADOWED);
    guest.expect("INV-TRACK-2");
}

#[test]
fn inv_sync_1_an_unsync_table_that_is_not_listed() {
    let guest = Guest::new();
    guest.mmu.frames.change_flags(guest.mfn(TABLE), 0, UNSYNC);
    guest.expect("INV-SYNC-1");
}

#[test]
fn inv_sync_1_a_listed_table_that_is_not_unsync() {
    let guest = Guest::new();
    assert!(guest.mmu.try_unsync(&guest.vcpu, TABLE, SMALL));
    assert_eq!(guest.mmu.audit(), Findings::new());
    guest.mmu.frames.change_flags(guest.mfn(TABLE), UNSYNC, 0);
    guest.expect("INV-SYNC-1");
}

#[test]
fn inv_sync_2_a_leaf_that_the_table_does_not_justify() {
    // Another frame; absent; A taken away; D taken away; a reserved bit has no place in 4 bytes.
    for gpte in [0x4063, 0x3062, 0x3043, 0x3023] {
        let guest = Guest::new();
        guest.scribble_gpte(TABLE, 3, gpte);
        guest.expect("INV-SYNC-2");
    }
}

#[test]
fn inv_sync_2_a_leaf_of_a_large_page_for_another_frame() {
    let guest = Guest::new();
    let (at, spte) = guest.leaf(LARGE);
    guest.scribble(at, Spte::leaf(guest.mfn(DATA), spte.is_writable(), true).0);
    guest.expect("INV-SYNC-2");
}

#[test]
fn inv_sync_3_a_link_that_the_directory_does_not_justify() {
    // Another table; absent; A taken away; W taken away.
    for gpte in [0x5063, 0x2062, 0x2043, 0x2061] {
        let guest = Guest::new();
        guest.scribble_gpte(DIRECTORY, 0, gpte);
        guest.expect("INV-SYNC-3");
    }
}

#[test]
fn inv_sync_4_an_unsync_directory() {
    let guest = Guest::new();
    guest.mmu.frames.change_flags(guest.mfn(DIRECTORY), 0, UNSYNC);
    guest.expect("INV-SYNC-4");
}

#[test]
fn inv_rmap_1_present_and_not_linked() {
    let guest = Guest::new();
    guest.mmu.buckets.lock(DATA).unlink(Link::new(DATA, guest.leaf(SMALL).0));
    guest.expect("INV-RMAP-1");
}

#[test]
fn inv_rmap_1_linked_and_not_present() {
    let guest = Guest::new();
    guest.scribble(guest.leaf(SMALL).0, 0);
    guest.expect("INV-RMAP-1");
}

#[test]
fn inv_rmap_1_linked_twice() {
    let guest = Guest::new();
    guest.mmu.buckets.lock(Gfn(9)).link(Link::new(Gfn(9), guest.leaf(SMALL).0));
    guest.expect("INV-RMAP-1");
}

#[test]
fn inv_frame_2_a_free_frame_on_the_list_twice() {
    let guest = Guest::new();
    let mfn = guest.take(FrameKind::Reserved);
    guest.mmu.frames.release(mfn);
    assert_eq!(guest.mmu.audit(), Findings::new());
    guest.mmu.frames.release(mfn);
    guest.expect("INV-FRAME-2");
}

#[test]
fn inv_frame_2_a_guest_frame_that_no_page_has() {
    let guest = Guest::new();
    guest.take(FrameKind::Guest(Gfn(40)));
    guest.expect("INV-FRAME-2");
}

#[test]
fn inv_lru_1_a_frame_that_reclaim_cannot_find() {
    let guest = Guest::new();
    guest.mmu.lru.remove([guest.mfn(DATA)]);
    guest.expect("INV-LRU-1");
}

#[test]
fn inv_lru_1_a_frame_on_a_list_that_is_no_guests() {
    let guest = Guest::new();
    let mfn = guest.take(FrameKind::Reserved);
    guest.mmu.lru.add(mfn);
    guest.expect("INV-LRU-1");
}

#[test]
fn inv_dirty_1_a_clean_frame_that_may_be_written_to() {
    let guest = Guest::new();
    guest.mmu.frames.change_flags(guest.mfn(DATA), DIRTY, 0);
    guest.expect("INV-DIRTY-1");
}

#[test]
fn inv_swap_1_a_slot_that_its_page_does_not_know_of() {
    let guest = Guest::new();
    guest.mmu.swap.take_run(&[DATA]).expect("a slot");
    guest.expect("INV-SWAP-1");
}

#[test]
fn inv_swap_1_a_page_in_a_slot_that_another_has() {
    let guest = Guest::new();
    guest.mmu.swap.take_run(&[Gfn(41)]).expect("a slot");
    assert!(guest.mmu.p2m.transition(Gfn(40), PageState::Zero, PageState::Resident(Mfn(0))));
    assert!(guest.mmu.p2m.claim(Gfn(40), PageState::Resident(Mfn(0))).is_some());
    assert!(guest.mmu.p2m.transition(Gfn(40), PageState::Moving, PageState::Swapped(SwapSlot(0))));
    guest.expect("INV-SWAP-1");
}

#[test]
fn inv_window_1_a_frame_that_stays_pinned() {
    let guest = Guest::new();
    guest.mmu.frames.pin(guest.mfn(DATA));
    guest.expect("INV-WINDOW-1");
}

/// The second range of a guest's memory, and where the guest maps it: the second half of a page of 4 MiB.
const RANGE: Gfn = Gfn(TABLE_ENTRIES as u32);
const HUGE: Gva = Gva(0x60_5000);

/// A two-level guest whose second range is huge and mapped large; and where.
fn huge() -> (Guest, Mpa) {
    let config = Config { reserved_frames: 1, blocks: true, ..Config::of_pages(2 * RANGE.0) };
    let mmu = Mmu::new(Machine::anonymous(2000 + config.block_frames()), config, Box::new(NoVcpus));
    let mut guest = Guest { vcpu: mmu.vcpu(0), mmu };
    guest.store(DIRECTORY.at(4), 0x00e3);
    guest.store(RANGE.at(0), 7);
    let mode = Mode { paging: true, pse: true, write_protect: true, ..Mode::default() };
    guest.mmu.set_paging(&mut guest.vcpu, mode, 0x1000, Flush::Yes).expect("no PDPTEs");
    assert_eq!(guest.mmu.collapse(RANGE), Ok(()));
    assert_eq!(guest.mmu.fault(&guest.vcpu, HUGE, Access::read(false)), Outcome::Fixed);
    assert_eq!(guest.mmu.audit(), Findings::new(), "whole before it is broken");
    let directory = guest.slot(DIRECTORY, Shape::Directory);
    let at = guest.mmu.pages.mfn(directory).at(crate::spte::l2_index(HUGE) * 8);
    assert!(guest.mmu.spte(at).is_large());
    (guest, at)
}

#[test]
fn inv_huge_1_a_huge_range_with_a_page_whose_stores_must_be_seen() {
    let (guest, _) = huge();
    guest.mmu.frames.change_flags(guest.mfn(Gfn(RANGE.0 + 3)), 0, WATCHED);
    guest.expect("INV-HUGE-1");
}

#[test]
fn inv_huge_2_a_range_that_nobody_gathers() {
    let (guest, _) = huge();
    assert!(guest.mmu.p2m.begin_collapse(DIRECTORY).is_some());
    guest.expect("INV-HUGE-2");
}

#[test]
fn inv_rmap_2_a_large_leaf_that_is_not_there() {
    let (guest, at) = huge();
    guest.scribble(at, 0);
    guest.expect("INV-RMAP-2");
}

#[test]
fn inv_sync_3_a_large_leaf_of_the_other_half() {
    let (guest, at) = huge();
    guest.scribble(Mpa(at.0 - 8), guest.mmu.spte(at).0);
    guest.expect("INV-SYNC-3");
}
