//! The model against guests of a few stores: what is certain, what is suspect, and what is neither.

use std::cell::RefCell;

use super::suspects::GRACE;
use super::tables::EDITED_MAX;
use super::*;

const DIRECTORY: u64 = 1;
const TABLE: u64 = 2;
/// Another process's.
const OTHER_DIRECTORY: u64 = 3;
const OTHER_TABLE: u64 = 4;
/// P, W, U.
const USER: u32 = 7;
/// P, W.
const KERNEL: u32 = 3;
const GLOBAL: u32 = 1 << 8;
const ACCESSED: u32 = 1 << 5;
const PAGES: u32 = 64;

/// A machine whose CPUs do what a test says.
struct Guest {
    model: GuestTlb,
    memory: RefCell<Vec<u8>>,
}

impl Guest {
    /// Two CPUs on the first process's tables: 0 in the kernel, 1 in user mode.
    fn new() -> Guest {
        let guest =
            Guest { model: GuestTlb::new(2, PAGES), memory: RefCell::new(vec![0; PAGES as usize * 4096]) };
        guest.store(0, DIRECTORY * 4096, (TABLE << 12) as u32 | USER);
        guest.store(0, OTHER_DIRECTORY * 4096, (OTHER_TABLE << 12) as u32 | USER);
        guest.load(0, DIRECTORY, false);
        guest.load(1, DIRECTORY, true);
        guest
    }

    fn site(vcpu: u32) -> Site {
        Site { vcpu, eip: 0xc010_0000 + vcpu, instructions: 7 }
    }

    fn invlpg(&self, vcpu: u32, page: u32) {
        self.model.invalidated(Guest::site(vcpu), Gva(page << 12));
    }

    fn with<R>(&self, call: impl FnOnce(&Memory<'_>) -> R) -> R {
        call(&|gpa: Gpa, buffer: &mut [u8]| {
            let (memory, at) = (self.memory.borrow(), gpa.0 as usize);
            let Some(bytes) = memory.get(at..at + buffer.len()) else { return false };
            buffer.copy_from_slice(bytes);
            true
        })
    }

    /// The kernel on `vcpu` stores a word.
    fn store(&self, vcpu: u32, at: u64, value: u32) {
        self.memory.borrow_mut()[at as usize..at as usize + 4].copy_from_slice(&value.to_le_bytes());
        self.with(|memory| self.model.stored(memory, Guest::site(vcpu), Gpa(at), 4, false));
    }

    /// It sets the entry of `page` in a table.
    fn enter(&self, vcpu: u32, table: u64, page: u32, frame: u32, bits: u32) {
        let value = if bits == 0 { 0 } else { frame << 12 | bits };
        self.store(vcpu, table * 4096 + u64::from(page) * 4, value);
    }

    /// MOV CR3, or a change of privilege where nothing else is new.
    fn load(&self, vcpu: u32, directory: u64, user: bool) {
        self.control(vcpu, directory, true, user);
    }

    fn control(&self, vcpu: u32, directory: u64, flush: bool, user: bool) {
        let mode = Mode { paging: true, write_protect: true, global_pages: true, ..Mode::default() };
        let paging = Paging { mode, directories: [Some(Gfn(directory as u32)); 4], pointers: None };
        self.with(|memory| self.model.control(memory, Guest::site(vcpu), paging, flush, user));
    }

    fn access(&self, vcpu: u32, page: u32, access: Access) -> Option<Box<Finding>> {
        self.with(|memory| self.model.access(memory, Guest::site(vcpu), Gva(page << 12), access))
    }

    /// User code reads or writes, and is not caught.
    fn uses(&self, vcpu: u32, page: u32, access: Access) {
        assert_eq!(self.access(vcpu, page, access), None, "vCPU {vcpu} at page {page}");
    }

    /// The same by another process on that vCPU, which is loaded for it, and goes on in the kernel behind it.
    fn other_uses(&self, vcpu: u32, page: u32, access: Access) {
        self.load(vcpu, OTHER_DIRECTORY, true);
        self.uses(vcpu, page, access);
        self.control(vcpu, OTHER_DIRECTORY, false, false);
    }

    /// To user mode and back.
    fn lets_go(&self, vcpu: u32, directory: u64) {
        self.control(vcpu, directory, false, true);
        self.control(vcpu, directory, false, false);
    }
}

#[test]
fn another_frame_entered_and_used_without_invlpg_is_certain() {
    let guest = Guest::new();
    guest.enter(0, TABLE, 5, 20, KERNEL);
    guest.uses(0, 5, Access::write(false));
    guest.enter(0, TABLE, 5, 0, 0);
    guest.enter(0, TABLE, 5, 21, KERNEL);
    let finding = guest.access(0, 5, Access::read(false)).expect("certain");
    assert_eq!((finding.why, finding.gfn), (Why::OwnEdit, Gfn(20)));
    let text = finding.to_string();
    for part in ["certain", "0x5000", "EIP 0xc0100000", "missing flush: INVLPG", "absent", "tick"] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    guest.model.invalidated(Guest::site(0), Gva(5 << 12));
    guest.uses(0, 5, Access::read(false));
}

#[test]
fn an_event_between_the_edit_and_the_use_makes_it_legal() {
    let guest = Guest::new();
    guest.enter(0, TABLE, 5, 20, KERNEL);
    guest.uses(0, 5, Access::read(false));
    guest.enter(0, TABLE, 5, 21, KERNEL);
    guest.model.event(0);
    guest.uses(0, 5, Access::read(false));
}

/// A page of the first process, which CPU 1 has used, is taken away; CPU 0 forgets it itself, and sends no IPI.
fn handed_to_another_process(guest: &Guest) {
    guest.enter(0, TABLE, 5, 20, USER);
    guest.uses(1, 5, Access::write(true));
    guest.enter(0, TABLE, 5, 0, 0);
    guest.invlpg(0, 5);
}

#[test]
fn a_use_is_legal_until_the_frame_is_anothers_and_the_editor_has_let_go() {
    let guest = Guest::new();
    handed_to_another_process(&guest);
    guest.uses(1, 5, Access::read(true));
    guest.lets_go(0, DIRECTORY);
    guest.uses(1, 5, Access::read(true));
    // The other process's table is known by a walk.
    guest.other_uses(0, 9, Access::read(true));
    guest.enter(0, OTHER_TABLE, 6, 20, USER);
    guest.uses(1, 5, Access::read(true));
    guest.other_uses(0, 6, Access::write(true));
    let finding = guest.access(1, 5, Access::read(true)).expect("certain");
    assert!(
        matches!(finding.why, Why::HandedOn(HandedOn::Used(used)) if used.gva == Gva(6 << 12)),
        "{finding}"
    );
    assert!(finding.to_string().contains("an IPI from vCPU 0 that makes vCPU 1 forget"), "{finding}");
}

#[test]
fn a_frame_handed_on_before_the_editor_let_go_is_legal() {
    let guest = Guest::new();
    handed_to_another_process(&guest);
    guest.model.device_wrote(Gfn(20));
    guest.model.given_up(Gfn(20));
    guest.uses(1, 5, Access::read(true));
}

#[test]
fn devices_the_balloon_and_tables_hand_a_frame_on() {
    let device = |guest: &Guest| guest.model.device_wrote(Gfn(20));
    let balloon = |guest: &Guest| guest.model.given_up(Gfn(20));
    let table = |guest: &Guest| {
        guest.store(0, DIRECTORY * 4096 + 4, 20 << 12 | USER);
        guest.uses(0, 1024, Access::read(false));
    };
    let ways: [&dyn Fn(&Guest); 3] = [&device, &balloon, &table];
    for (number, way) in ways.iter().enumerate() {
        let guest = Guest::new();
        handed_to_another_process(&guest);
        way(&guest);
        guest.lets_go(0, DIRECTORY);
        let finding = guest.access(1, 5, Access::read(true)).expect("certain");
        let right = match finding.why {
            Why::HandedOn(HandedOn::Device { .. }) => number == 0,
            Why::HandedOn(HandedOn::GivenUp { .. }) => number == 1,
            Why::HandedOn(HandedOn::Table { .. }) => number == 2,
            _ => false,
        };
        assert!(right, "{number}: {finding}");
    }
}

#[test]
fn what_the_guest_flushes_is_forgotten() {
    let invlpg = |guest: &Guest| guest.model.invalidated(Guest::site(1), Gva(5 << 12));
    let cr3 = |guest: &Guest| guest.load(1, DIRECTORY, false);
    let fault = |guest: &Guest| guest.model.faulted(1, Gva(5 << 12));
    let ways: [&dyn Fn(&Guest); 3] = [&invlpg, &cr3, &fault];
    for (number, way) in ways.iter().enumerate() {
        let also_global = number != 1;
        for global in [0, GLOBAL] {
            let guest = Guest::new();
            guest.enter(0, TABLE, 5, 20, USER | global);
            guest.uses(1, 5, Access::write(true));
            guest.enter(0, TABLE, 5, 0, 0);
            guest.model.device_wrote(Gfn(20));
            way(&guest);
            guest.lets_go(0, DIRECTORY);
            let forgotten = guest.access(1, 5, Access::read(true)).is_none();
            assert_eq!(forgotten, global == 0 || also_global, "way {number}, global {global:#x}");
        }
    }
}

#[test]
fn a_shared_frame_is_handed_on_only_by_what_comes_after_its_last_mapping() {
    let guest = Guest::new();
    guest.enter(0, TABLE, 5, 20, USER);
    guest.uses(1, 5, Access::write(true));
    guest.enter(0, TABLE, 6, 20, USER);
    guest.enter(0, TABLE, 5, 0, 0);
    guest.model.device_wrote(Gfn(20));
    guest.lets_go(0, DIRECTORY);
    guest.uses(1, 5, Access::read(true));
    guest.enter(0, TABLE, 6, 0, 0);
    guest.uses(1, 5, Access::read(true));
    guest.model.device_wrote(Gfn(20));
    assert!(guest.access(1, 5, Access::read(true)).is_some());
}

/// Fork: the child's entry is made, the parent's loses W, in a table that no walk has come through yet.
fn fork(guest: &Guest) {
    guest.enter(0, TABLE, 5, 20, USER);
    guest.uses(1, 5, Access::write(true));
    guest.enter(0, OTHER_TABLE, 5, 20, USER & !2);
    guest.enter(0, TABLE, 5, 20, USER & !2);
}

#[test]
fn a_store_of_the_parent_is_certain_once_the_child_has_used_the_page() {
    let guest = Guest::new();
    fork(&guest);
    guest.uses(1, 5, Access::write(true));
    guest.lets_go(0, DIRECTORY);
    guest.uses(1, 5, Access::write(true));
    guest.other_uses(0, 5, Access::read(true));
    guest.uses(1, 5, Access::read(true));
    assert!(guest.access(1, 5, Access::write(true)).is_some());

    let flushed = Guest::new();
    fork(&flushed);
    flushed.model.invalidated(Guest::site(1), Gva(5 << 12));
    flushed.lets_go(0, DIRECTORY);
    flushed.other_uses(0, 5, Access::read(true));
    flushed.uses(1, 5, Access::write(true));
}

#[test]
fn a_child_that_mapped_the_page_long_ago_proves_nothing() {
    let guest = Guest::new();
    guest.enter(0, OTHER_TABLE, 5, 20, USER);
    guest.enter(0, TABLE, 5, 20, USER);
    guest.uses(1, 5, Access::write(true));
    guest.lets_go(0, DIRECTORY);
    guest.enter(0, TABLE, 5, 0, 0);
    guest.lets_go(0, DIRECTORY);
    guest.other_uses(0, 5, Access::read(true));
    guest.uses(1, 5, Access::read(true));
}

#[test]
fn a_store_through_a_clean_entry_walks_anew() {
    let guest = Guest::new();
    guest.enter(0, TABLE, 5, 20, KERNEL);
    guest.uses(0, 5, Access::read(false));
    guest.enter(0, TABLE, 5, 21, KERNEL);
    guest.uses(0, 5, Access::write(false));
    guest.uses(0, 5, Access::read(false));
}

#[test]
fn an_editor_that_lets_go_while_another_holds_is_suspect() {
    let guest = Guest::new();
    handed_to_another_process(&guest);
    assert_eq!(guest.model.verdicts().suspects_all(), 0);
    guest.lets_go(0, DIRECTORY);
    let found = guest.model.verdicts();
    assert_eq!(found.suspects, [1, 0, 0, 0, 0]);
    let text = found.listed[0].to_string();
    assert!(text.contains("went to user mode") && text.contains("vCPU 1"), "{text}");
    // Once.
    guest.lets_go(0, DIRECTORY);
    assert_eq!(guest.model.verdicts().suspects_all(), 1);
}

#[test]
fn a_suspect_ends_the_run_where_the_model_is_strict_alone() {
    for strict in [false, true] {
        let Guest { model, memory } = Guest::new();
        let guest = Guest { model: if strict { model.strict() } else { model }, memory };
        handed_to_another_process(&guest);
        assert_eq!(guest.model.suspected(), None, "the editor has not let go");
        guest.lets_go(0, DIRECTORY);
        let first = guest.model.verdicts().listed.first().cloned();
        assert!(first.is_some());
        assert_eq!(guest.model.suspected(), first.filter(|_| strict));
    }
}

#[test]
fn what_is_flushed_and_what_a_window_leaves_is_not_suspect() {
    let guest = Guest::new();
    handed_to_another_process(&guest);
    guest.invlpg(1, 5);
    guest.lets_go(0, DIRECTORY);
    // The kernel's window is flushed when it is used again.
    guest.enter(0, TABLE, 8, 21, KERNEL);
    guest.uses(0, 8, Access::read(false));
    guest.enter(0, TABLE, 8, 0, 0);
    guest.lets_go(0, DIRECTORY);
    assert_eq!(guest.model.verdicts().suspects_all(), 0);
}

/// CPU 1 cannot use the page when CPU 0 lets go; what it does before it can is its own business.
fn left_to_itself(flushes: bool, away: &dyn Fn(&Guest), back: &dyn Fn(&Guest)) -> u64 {
    let guest = Guest::new();
    guest.enter(0, TABLE, 5, 20, USER);
    guest.uses(1, 5, Access::write(true));
    away(&guest);
    guest.enter(0, TABLE, 5, 0, 0);
    guest.invlpg(0, 5);
    guest.lets_go(0, DIRECTORY);
    assert_eq!(guest.model.verdicts().suspects_all(), 0);
    if flushes {
        guest.load(1, DIRECTORY, false);
    }
    back(&guest);
    guest.model.verdicts().suspects[0]
}

#[test]
fn a_cpu_in_its_kernel_or_halted_is_judged_when_it_goes_on() {
    let kernel = |guest: &Guest| guest.control(1, DIRECTORY, false, false);
    let halt = |guest: &Guest| {
        kernel(guest);
        guest.with(|memory| guest.model.halted(memory, Guest::site(1)));
    };
    let user = |guest: &Guest| guest.control(1, DIRECTORY, false, true);
    let halts_again = |guest: &Guest| {
        // An interrupt that comes before its look; then the halt after it.
        guest.model.event(1);
        guest.with(|memory| guest.model.halted(memory, Guest::site(1)));
    };
    for flushes in [false, true] {
        let suspects = u64::from(!flushes);
        assert_eq!(left_to_itself(flushes, &kernel, &user), suspects);
        assert_eq!(left_to_itself(flushes, &halt, &user), suspects);
        assert_eq!(left_to_itself(flushes, &halt, &halts_again), suspects);
    }
}

#[test]
fn an_accessed_bit_is_anothers_business_at_its_next_trap() {
    for flushes in [false, true] {
        let guest = Guest::new();
        guest.enter(0, TABLE, 5, 20, USER | ACCESSED);
        guest.uses(1, 5, Access::write(true));
        guest.enter(0, TABLE, 5, 20, USER);
        guest.invlpg(0, 5);
        guest.lets_go(0, DIRECTORY);
        // It may have been in its kernel, behind its look.
        for _ in 0..GRACE {
            guest.control(1, DIRECTORY, false, false);
            guest.control(1, DIRECTORY, false, true);
        }
        assert_eq!(guest.model.verdicts().suspects_all(), 0);
        guest.control(1, DIRECTORY, flushes, false);
        guest.control(1, DIRECTORY, false, true);
        assert_eq!(guest.model.verdicts().suspects, [0, 0, u64::from(!flushes), 0, 0]);
    }
}

#[test]
fn an_editor_may_have_loaded_an_entry_that_has_a() {
    for (bits, suspects) in [(USER | ACCESSED, 1), (USER, 0)] {
        let guest = Guest::new();
        guest.enter(0, TABLE, 5, 20, bits);
        // The table is known, and so its entries.
        guest.uses(0, 6, Access::read(false));
        guest.model.faulted(0, Gva(5 << 12));
        guest.enter(0, TABLE, 5, 21, bits);
        guest.lets_go(0, DIRECTORY);
        assert_eq!(guest.model.verdicts().suspects, [suspects, 0, 0, 0, 0]);
    }
}

#[test]
fn a_report_says_that_nobody_has_used_what_may_have_been_loaded() {
    let guest = Guest::new();
    guest.enter(0, TABLE, 5, 20, KERNEL | ACCESSED);
    guest.uses(0, 6, Access::read(false));
    guest.enter(0, TABLE, 5, 21, KERNEL | ACCESSED);
    let finding = guest.access(0, 5, Access::read(false)).expect("certain");
    assert!(finding.to_string().contains("may have been loaded, for its entry had A"), "{finding}");
}

#[test]
fn a_table_taken_out_without_any_flush_is_suspect() {
    for (loaded, flushes) in [(true, false), (true, true), (false, false)] {
        let guest = Guest::new();
        guest.uses(0, 5, Access::read(false));
        guest.other_uses(0, 5, Access::read(true));
        if loaded {
            guest.load(0, DIRECTORY, false);
        }
        let entry = DIRECTORY * 4096;
        guest.store(0, entry, (TABLE << 12) as u32 | USER | ACCESSED);
        guest.uses(0, 5, Access::read(false));
        guest.store(0, entry, 0);
        if flushes {
            // Of any page.
            guest.invlpg(0, 99);
        }
        guest.lets_go(0, if loaded { DIRECTORY } else { OTHER_DIRECTORY });
        assert_eq!(guest.model.verdicts().suspects[3], u64::from(loaded && !flushes));
    }
}

#[test]
fn an_edit_of_another_process_says_nothing_of_the_page_that_is_held() {
    let guest = Guest::new();
    guest.enter(0, TABLE, 5, 20, USER);
    guest.enter(0, OTHER_TABLE, 5, 21, USER | ACCESSED);
    guest.other_uses(0, 5, Access::read(true));
    guest.load(0, DIRECTORY, false);
    guest.uses(0, 5, Access::read(true));
    guest.enter(0, OTHER_TABLE, 5, 21, USER);
    guest.lets_go(0, DIRECTORY);
    assert_eq!(guest.model.verdicts().suspects_all(), 0);
}

#[test]
fn a_right_and_an_accessed_bit_that_are_taken_are_suspect() {
    let guest = Guest::new();
    guest.enter(0, TABLE, 5, 20, USER);
    guest.uses(0, 5, Access::write(true));
    guest.enter(0, TABLE, 5, 20, USER & !2);
    guest.lets_go(0, DIRECTORY);
    assert_eq!(guest.model.verdicts().suspects, [0, 1, 0, 0, 0]);
    guest.enter(0, TABLE, 6, 21, USER);
    guest.uses(0, 6, Access::read(true));
    // The walker has set A.
    guest.memory.borrow_mut()[TABLE as usize * 4096 + 6 * 4] |= 1 << 5;
    guest.enter(0, TABLE, 6, 21, USER);
    guest.lets_go(0, DIRECTORY);
    assert_eq!(guest.model.verdicts().suspects, [0, 1, 1, 0, 0]);
}

#[test]
fn an_entry_that_is_put_back_is_good_again() {
    let guest = Guest::new();
    handed_to_another_process(&guest);
    guest.enter(0, TABLE, 5, 20, USER);
    guest.lets_go(0, DIRECTORY);
    guest.model.device_wrote(Gfn(20));
    guest.uses(1, 5, Access::write(true));
    assert_eq!(guest.model.verdicts().suspects_all(), 0);
}

/// Its kernel's pages are global, and are there again at the same addresses, in other frames.
#[test]
fn a_guest_after_a_reset_owes_nothing_for_the_one_before() {
    for reset in [true, false] {
        let guest = Guest::new();
        guest.enter(0, TABLE, 5, 20, KERNEL | GLOBAL);
        guest.uses(0, 5, Access::write(false));
        guest.enter(0, TABLE, 5, 0, 0);
        if reset {
            guest.model.reset();
            guest.load(0, DIRECTORY, false);
        }
        guest.enter(0, TABLE, 5, 21, KERNEL | GLOBAL);
        assert_eq!(guest.access(0, 5, Access::read(false)).is_none(), reset);
        assert!(!reset || guest.model.verdicts().suspects_all() == 0);
    }
}

#[test]
fn a_guest_that_edits_without_end_costs_no_more_than_so_much() {
    let guest = Guest::new();
    let tables = EDITED_MAX as u64 / 1024 + 1;
    for table in 0..tables {
        guest.store(0, DIRECTORY * 4096 + table * 4, ((8 + table) << 12) as u32 | USER);
        guest.uses(0, table as u32 * 1024, Access::read(false));
        (0..1024).for_each(|index| guest.enter(0, 8 + table, index, 50, USER));
    }
    let edited = guest.model.tables.lock().edited();
    assert!((1..=EDITED_MAX).contains(&edited), "{edited}");
    // What is done after that is found as before.
    guest.uses(0, 5, Access::write(false));
    guest.enter(0, 8, 5, 0, 0);
    guest.enter(0, 8, 5, 51, USER);
    assert!(guest.access(0, 5, Access::read(false)).is_some());
}
