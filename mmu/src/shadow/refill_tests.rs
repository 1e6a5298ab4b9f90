use super::*;
use crate::addr::Gpa;
use crate::coherence::NoVcpus;
use crate::{Config, Flush, Machine, Miss, Mode, Outcome, TlbKind, Width};

/// The directory, its only table, and a page of it that is never anything but mapped for all.
const DIRECTORY: Gpa = Gpa(0x1000);
const TABLE: Gpa = Gpa(0x2000);
const KEPT: Gva = Gva(0x9000);
/// The page that tests write entries for.
const PAGE: Gva = Gva(0x5000);

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const ALL: u64 = P | W | U | A | D;
const RESERVED: u64 = 1 << 40;
const NX: u64 = 1 << 63;

struct Guest {
    mmu: Mmu,
    vcpu: Vcpu,
}

impl Guest {
    /// With PAE paging, in all of whose tables the page [`KEPT`] has been used by both privileges.
    fn new() -> Guest {
        let config = Config { shadow_pages_max: 64, roots_max: 8, ..Config::of_pages(64) };
        let mmu = Mmu::new(Machine::anonymous(256), config, Box::new(NoVcpus));
        let vcpu = mmu.soft_vcpu(0, TlbKind::Sized);
        let mut guest = Guest { mmu, vcpu };
        guest.put(Gpa(0x3000), DIRECTORY.0 | P);
        guest.put(DIRECTORY, TABLE.0 | P | W | U);
        guest.set_entry(KEPT, 0x6000 | ALL);
        let mode = Mode { paging: true, pae: true, no_execute: true, write_protect: true, ..Mode::default() };
        guest.mmu.set_paging(&mut guest.vcpu, mode, 0x3000, Flush::Yes).expect("good pointers");
        for access in [Access::read(false), Access::read(true)] {
            assert_eq!(guest.mmu.fault(&guest.vcpu, KEPT, access), Outcome::Fixed);
        }
        guest
    }

    fn put(&self, at: Gpa, value: u64) {
        self.mmu.store(self.vcpu.window(), at, Width::B8, value).expect("memory");
    }

    fn get(&self, at: Gpa) -> u64 {
        self.mmu.load(self.vcpu.window(), at, Width::B8).expect("memory")
    }

    fn set_entry(&self, page: Gva, entry: u64) {
        self.put(entry_of(page), entry);
    }

    fn refill(&self, access: Access) -> Refill {
        self.mmu.tlb_refill(&self.vcpu, PAGE, access)
    }
}

fn entry_of(page: Gva) -> Gpa {
    Gpa(TABLE.0 + u64::from(page.0 >> 12) * 8)
}

fn accesses() -> impl Iterator<Item = Access> {
    [false, true]
        .into_iter()
        .flat_map(|user| [Access::read(user), Access::write(user), Access::execute(user)])
}

/// Whatever the entry is, the short way says what the long one says, or nothing.
#[test]
fn matrix_a_refill_is_what_a_fault_is() {
    let bits = [P, W, U, A, D, RESERVED, NX];
    let guest = Guest::new();
    let (mut done, mut faults) = (0, 0);
    for combination in 0..1u32 << bits.len() {
        let chosen = bits.iter().enumerate().filter(|(n, _)| combination & 1 << n != 0).map(|(_, bit)| bit);
        let entry = 0x7000 | chosen.sum::<u64>();
        for access in accesses() {
            guest.set_entry(PAGE, entry);
            let short = guest.refill(access);
            assert_eq!(guest.get(entry_of(PAGE)), entry, "{access:?}: a refill changes no entry");
            let long = guest.mmu.fault(&guest.vcpu, PAGE, access);
            match short {
                Refill::Done => {
                    done += 1;
                    assert_eq!(long, Outcome::Spurious, "{entry:#x} {access:?}");
                    assert_eq!(guest.get(entry_of(PAGE)), entry, "{access:?}: an A or D bit was owed");
                }
                Refill::Guest(fault) => {
                    faults += 1;
                    assert_eq!(long, Outcome::Guest(fault), "{entry:#x} {access:?}");
                }
                Refill::Beyond => assert_eq!(long, Outcome::Fixed, "{entry:#x} {access:?}"),
            }
            guest.mmu.invalidate_page(&guest.vcpu, PAGE);
        }
    }
    assert!(done > 20 && faults > 400, "{done} leaves, {faults} faults");
    assert_eq!(guest.mmu.audit(), Vec::<String>::new());
}

/// A of the directory entry is set by a walk that goes on past it, though it then faults.
#[test]
fn a_fault_below_a_directory_entry_without_a_sets_it() {
    for access in accesses() {
        let guest = Guest::new();
        guest.set_entry(PAGE, 0);
        guest.put(DIRECTORY, TABLE.0 | P | W | U);
        assert_eq!(guest.refill(access), Refill::Beyond, "{access:?}");
        assert!(matches!(guest.mmu.fault(&guest.vcpu, PAGE, access), Outcome::Guest(_)));
        assert_eq!(guest.get(DIRECTORY), TABLE.0 | P | W | U | A);
    }
}

/// Between the look for the link and the lock on its page, somebody has changed the directory entry.
#[test]
fn a_link_that_is_gone_once_its_page_is_held_leads_nowhere() {
    let guest = Guest::new();
    guest.set_entry(PAGE, 0x7000 | ALL);
    let (mmu, seen) = (&guest.mmu, guest.mmu.buckets.sequence());
    let root = guest.vcpu.roots[0].get().expect("loaded");
    let link = mmu.find_link(root, PAGE).expect("linked");
    let go = || mmu.map_below(&guest.vcpu, (root, link), PAGE, Access::read(false), seen);
    assert!(matches!(go(), Linked::Mapped(Mapped::Done { .. })));
    guest.put(DIRECTORY, 0);
    assert_eq!(go(), Linked::Beyond);
}

/// A walk outside the guest has found a directory; before it locks it, the directory is killed and its frame given back.
#[test]
fn a_directory_whose_frame_was_given_back_leads_nowhere() {
    let guest = Guest::new();
    guest.set_entry(PAGE, 0x7000 | ALL);
    let mmu = &guest.mmu;
    let root = guest.vcpu.roots[0].get().expect("loaded");
    let directory = mmu.child(root.pdpt.at(0)).expect("linked");
    assert_eq!(mmu.table_below(directory, PAGE), mmu.find_table(root, PAGE));
    assert!(mmu.find_table(root, PAGE).is_some());
    mmu.evict(8);
    assert_eq!(mmu.table_below(directory, PAGE), None, "it is dead, and its frame is there");
    while mmu.give_back_dead(None) {}
    assert_eq!(mmu.table_below(directory, PAGE), None, "it has no frame");
}

/// SDM 4.10.4.1: a kernel that widens the entry after a fault owes no INVLPG.
#[test]
fn a_fault_of_the_guests_forgets_the_translation() {
    let guest = Guest::new();
    guest.set_entry(PAGE, 0x7000 | P | A | D);
    assert_eq!(guest.refill(Access::read(false)), Refill::Done);
    guest.mmu.tlb_enter(&guest.vcpu);
    assert_eq!(guest.mmu.tlb_load(&guest.vcpu, PAGE, Width::B4, false), Ok(0));
    let before = guest.vcpu.stats();
    assert!(matches!(guest.refill(Access::write(false)), Refill::Guest(_)));
    assert_eq!(guest.mmu.tlb_load(&guest.vcpu, PAGE, Width::B4, false), Err(Miss::Fault));
    let after = guest.vcpu.stats();
    assert_eq!((after.taken - before.taken, after.guest - before.guest), (1, 1));
}

/// Hardware that runs the vCPU too may have to flush what the fault forgets, which [`Mmu::fault`] sees to outside.
#[test]
fn a_fault_of_a_vcpu_that_hardware_runs_goes_the_long_way() {
    let mut guest = Guest::new();
    guest.set_entry(PAGE, 0);
    assert!(matches!(guest.refill(Access::read(false)), Refill::Guest(_)));
    guest.vcpu.hardware = true;
    assert_eq!(guest.refill(Access::read(false)), Refill::Beyond);
}
