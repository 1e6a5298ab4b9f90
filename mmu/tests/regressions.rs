//! Guest programs that once behaved otherwise than on a CPU, shrunk, kept for ever.

use crate::model::hardware::Memory::Sticky;
use crate::model::layout::{A, D, G, P, PS, U, W};
use crate::model::walker::Kind::{Fetch, Read, Write};
use crate::model::world::Caches;
use crate::program::Op::*;
use crate::program::{Bit, Op, Program, Then};
use umbra_mmu::{
    Access, Config, Context, FaultCode, Flush, Gpa, Gva, LocalStack, Machine, Mmu, Mode, NoVcpus, Outcome,
    Refill, TlbKind, Width,
};

const ALL: u16 = P | W | U | A | D;

fn check(pae: bool, ops: &[(u8, Op)]) {
    for tlb in [Caches::Hardware(Sticky), Caches::Soft(TlbKind::Sticky)] {
        let program = Program { tlb, pae, worn: false, ops: ops.to_vec() };
        if let Err(wrong) = program.run() {
            panic!("{tlb:?}: {}", wrong.0);
        }
    }
}

fn touch(kind: crate::model::walker::Kind, user: bool, page: u8) -> Op {
    Touch { kind, user, page, offset: 0, value: 0 }
}

/// An unsync table that is linked in a new place shows nothing older than the link.
#[test]
fn an_unsync_table_is_up_to_date_where_it_is_linked_anew() {
    check(
        false,
        &[
            (0, touch(Read, false, 0)),
            (0, Edit { page: 25, level: 1, frame: 16, bits: ALL, then: Then::Nothing }),
            (0, touch(Read, false, 0)),
            (0, touch(Read, false, 9)),
            (1, Invlpg { page: 0 }),
            (0, Wipe { frame: 3 }),
            (0, LoadCr3 { which: 1 }),
            (0, EditIn { table: 7, page: 0, level: 1, frame: 16, bits: ALL }),
            (0, Edit { page: 14, level: 1, frame: 16, bits: ALL, then: Then::Nothing }),
        ],
    );
}

/// A page fault forgets the translation of its address: a kernel owes no INVLPG after it.
#[test]
fn a_guest_page_fault_forgets_its_address() {
    check(
        true,
        &[
            (0, touch(Read, true, 30)),
            (0, Edit { page: 19, level: 1, frame: 16, bits: 0, then: Then::Nothing }),
            (0, touch(Write, false, 19)),
            (0, touch(Fetch, true, 19)),
        ],
    );
}

/// INVLPG reaches the shadow pages of a directory that no root links to at the moment.
#[test]
fn invlpg_reaches_tables_below_an_unlinked_directory() {
    check(
        true,
        &[
            (0, Switch { pae: false, which: 1 }),
            (1, touch(Read, true, 7)),
            (1, Flip { bit: Bit::Pae }),
            (0, LoadCr3 { which: 0 }),
            (1, Flip { bit: Bit::Pae }),
            (1, Emulate { kind: Read, user: false, page: 20, offset: 0, value: 0 }),
            (1, Edit { page: 7, level: 1, frame: 16, bits: 0, then: Then::Invlpg }),
            (1, Invlpg { page: 8 }),
            (1, touch(Read, true, 7)),
        ],
    );
}

/// Eviction takes an spte away without a flush; when its frame becomes a table, a TLB may still let it be written.
#[test]
fn a_frame_with_tlb_debt_is_flushed_before_it_is_tracked() {
    let evict_under = |count, page| {
        check(
            true,
            &[
                (0, Toggle { page: 23, level: 1, bits: P, then: Then::Nothing }),
                (0, Evict { count }),
                (0, touch(Read, false, page)),
                (0, Edit { page: 5, level: 1, frame: 16, bits: ALL, then: Then::Nothing }),
            ],
        );
    };
    evict_under(6, 1);
    check(
        true,
        &[
            (0, Edit { page: 12, level: 1, frame: 16, bits: ALL, then: Then::Nothing }),
            (0, Evict { count: 1 }),
            (0, touch(Write, false, 6)),
            (0, Toggle { page: 6, level: 1, bits: P, then: Then::LoadCr3 }),
        ],
    );
}

/// A two-level walk sets A in a frame that is a PAE directory too: an address bit of the PAE entry.
#[test]
fn status_bits_of_one_format_are_address_bits_of_the_other() {
    check(
        true,
        &[
            (0, Switch { pae: true, which: 0 }),
            (0, Flip { bit: Bit::WriteProtect }),
            (0, touch(Read, false, 0)),
            (0, Edit { page: 6, level: 2, frame: 55, bits: ALL | PS, then: Then::Nothing }),
            (0, Edit { page: 0, level: 1, frame: 16, bits: ALL, then: Then::Invlpg }),
            (0, Switch { pae: false, which: 0 }),
            (0, LoadCr3 { which: 2 }),
            (0, touch(Read, false, 6)),
        ],
    );
}

/// INVLPG of one address of a large page forgets all of it, whichever parts a TLB had.
#[test]
fn invlpg_forgets_every_part_of_a_large_page() {
    for pae in [false, true] {
        check(
            pae,
            &[
                (0, Edit { page: 0, level: 2, frame: 51, bits: ALL | PS, then: Then::LoadCr3 }),
                (0, touch(Read, false, 0)),
                (0, touch(Read, false, 6)),
                (0, Edit { page: 0, level: 2, frame: 0, bits: ALL | PS, then: Then::Invlpg }),
                (0, touch(Read, false, 6)),
            ],
        );
    }
}

/// A page that has lost its G, and was invalidated since, does not outlive the next MOV CR3.
#[test]
fn a_page_that_is_global_no_more_goes_with_a_cr3_load() {
    check(
        false,
        &[
            (0, Flip { bit: Bit::Global }),
            (0, Edit { page: 0, level: 1, frame: 16, bits: ALL | G, then: Then::LoadCr3 }),
            (0, touch(Read, false, 0)),
            (0, Toggle { page: 0, level: 1, bits: G, then: Then::Invlpg }),
            (0, touch(Read, false, 0)),
            (0, Edit { page: 0, level: 1, frame: 17, bits: ALL, then: Then::LoadCr3 }),
            (0, touch(Read, false, 0)),
        ],
    );
}

/// With a frame for one shadow page alone, the directory's is the one that the table has just been evicted from. Found by
/// shuttle, where another vCPU had evicted it: whoever linked the two waited for itself.
#[test]
fn a_table_whose_slot_becomes_its_directory_is_not_linked_to_itself() {
    let (reserved, guest_pages, root, shadow) = (8, 4, 2, 1);
    let config = Config {
        reserved_frames: reserved,
        shadow_pages_max: 64,
        roots_max: 8,
        ..Config::of_pages(guest_pages)
    };
    let frames = reserved + guest_pages + root + shadow;
    let mmu = Mmu::new(Machine::anonymous(frames), config, Box::new(NoVcpus));
    for (at, entry) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0), (0, 0)] {
        let entry = entry | u64::from(ALL);
        mmu.store(&LocalStack::new(Context::Host), Gpa(at), Width::B4, entry).expect("memory");
    }
    let mut vcpu = mmu.vcpu(0);
    let mode = Mode { paging: true, ..Mode::default() };
    mmu.set_paging(&mut vcpu, mode, 0x1000, Flush::Yes).expect("no PDPTEs are loaded");
    assert_eq!(mmu.fault(&vcpu, Gva(0), Access::read(false)), Outcome::Again);
}

/// A fault behind a directory entry whose A bit the guest has cleared sets it, as the CPU's walk does on its way, though the
/// tables of the shadow are there and a fault in them could be had without.
#[test]
fn a_fault_sets_a_of_the_directory_entry_that_it_is_behind() {
    let config = Config { shadow_pages_max: 64, roots_max: 8, ..Config::of_pages(16) };
    let mmu = Mmu::new(Machine::anonymous(64), config, Box::new(NoVcpus));
    let stack = LocalStack::new(Context::Host);
    let store = |at: u64, entry: u64| mmu.store(&stack, Gpa(at), Width::B4, entry).expect("memory");
    store(0x1000, 0x2000 | u64::from(ALL));
    store(0x200c, 0x3000 | u64::from(ALL));
    let mut vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    let mode = Mode { paging: true, ..Mode::default() };
    mmu.set_paging(&mut vcpu, mode, 0x1000, Flush::Yes).expect("no PDPTEs are loaded");
    assert_eq!(mmu.fault(&vcpu, Gva(0x3000), Access::read(false)), Outcome::Fixed);

    let absent = Gva(0x5123);
    assert!(matches!(mmu.tlb_refill(&vcpu, absent, Access::write(false)), Refill::Guest(fault)
        if fault.gva == absent && fault.code == FaultCode::WRITE));
    store(0x1000, 0x2000 | u64::from(ALL & !A));
    mmu.invalidate_page(&vcpu, absent);
    if mmu.tlb_refill(&vcpu, absent, Access::write(false)) == Refill::Beyond {
        assert!(matches!(mmu.fault(&vcpu, absent, Access::write(false)), Outcome::Guest(_)));
    }
    assert_eq!(mmu.load(&stack, Gpa(0x1000), Width::B4), Ok(0x2000 | u64::from(ALL)), "A is set");
}
