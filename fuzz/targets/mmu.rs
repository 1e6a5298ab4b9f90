//! The emulated MMU under random guests: tables of noise, edited in every way there is, with little memory.
//!
//! What must hold: no panic; after each program the audit finds nothing; after each fault that was answered with
//! `Fixed` or `Spurious`, and after each flush, the shadow tables, walked here by hand, lead where the guest's lead.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use umbra_mmu::discard::Discard;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::PageState;
use umbra_mmu::spte::{Spte, l1_index, l2_index, l3_index};
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::{
    Access, AccessKind, Config, Flush, Gfn, Gva, Machine, Mfn, Mmu, Mode, NoVcpus, Outcome, Vcpu, Width,
};

/// Guest pages; entries name frames a little beyond them too.
const GUEST_PAGES: u32 = 40;
const RESERVED_FRAMES: u32 = 2;

/// A linear address with few different indices, so that programs come back to what they built.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Address {
    directory: u8,
    table: u8,
    offset: u8,
}

impl Address {
    fn gva(self) -> Gva {
        // Few of each, so that two operations often mean the same one.
        let directory = u32::from(self.directory % 4) << 21;
        let top = if self.directory & 0x80 != 0 { 0xff00_0000 } else { 0 };
        Gva(top | directory | u32::from(self.table % 8) << 12 | u32::from(self.offset & 0x38))
    }
}

/// A table entry: a frame of the guest's few, and flags that matter.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Entry {
    frame: u8,
    flags: u8,
    noise: Option<u64>,
}

impl Entry {
    fn bits(self) -> u64 {
        let frame = u64::from(self.frame % (GUEST_PAGES as u8 + 3));
        let present = u64::from(self.frame & 0x80 == 0);
        self.noise.unwrap_or(frame << 12 | u64::from(self.flags & !1) | present)
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Operation {
    Paging {
        mode: u8,
        cr3: u8,
        flush: bool,
        seen: Address,
    },
    Access {
        at: Address,
        kind: u8,
        user: bool,
    },
    /// A store of the guest by a linear address, wherever it leads.
    Store {
        at: Address,
        user: bool,
        entry: Entry,
    },
    /// A store by a guest-physical address: emulation, or a device.
    Write {
        frame: u8,
        index: u16,
        entry: Entry,
        wide: bool,
    },
    Invalidate(Address),
    Watch(u8),
    Unwatch(u8),
    Explain(Address),
    /// Pages go to swap, whatever they are used for.
    PageOut {
        frame: u8,
        count: u8,
    },
    /// Pages are thrown away, or given up.
    Discard {
        frame: u8,
        count: u8,
        balloon: bool,
    },
}

fn mode(bits: u8) -> Mode {
    let bit = |n: u8| bits >> n & 1 != 0;
    Mode {
        paging: bit(0),
        pae: bit(1),
        pse: bit(2),
        write_protect: bit(3),
        no_execute: bit(4),
        smep: bit(5),
        global_pages: bit(6),
    }
}

struct Guest {
    machine: Machine,
    mmu: Mmu,
    vcpu: Vcpu,
}

impl Guest {
    /// With `spare` frames more than the tables may take; below [`GUEST_PAGES`] the guest runs out.
    fn new(spare: u32) -> Guest {
        let config = Config { reserved_frames: RESERVED_FRAMES, ..Config::of_pages(GUEST_PAGES) };
        // The limits are raised to the least that works; ask an MMU what that is.
        let least = Mmu::new(Machine::anonymous(4), config, Box::new(NoVcpus)).config().table_frames_max();
        let machine = Machine::anonymous(RESERVED_FRAMES + least + spare);
        // Fewer slots than pages: swap runs out too.
        let swap = MemorySwap::new(GUEST_PAGES / 2);
        let mmu = Mmu::new(machine.clone(), config, Box::new(NoVcpus)).with_swap(Box::new(swap));
        let vcpu = mmu.vcpu(0);
        Guest { machine, mmu, vcpu }
    }

    /// Tables to begin with, so that a program need not build its first ones: every linear address that programs
    /// use is mapped, the tables themselves too. `bits` are the mode's; paging and the format are as it says.
    fn lay_tables(&mut self, bits: u8) {
        let mode = mode(bits);
        let bytes = mode.entry_bytes();
        let put = |table: u32, index: u32, entry: u64| {
            let width = if bytes == 8 { Width::B8 } else { Width::B4 };
            let stored = self.mmu.store(self.vcpu.window(), Gfn(table).at(index * bytes), width, entry);
            let _ = stored; // A machine with few frames has none left at some point: a shorter table.
        };
        let entry = |frame: u32, flags: u64| u64::from(frame % GUEST_PAGES) << 12 | flags;
        if mode.pae {
            put(1, 0, entry(2, 1));
            put(1, 3, entry(2, 1));
        }
        let directory = if mode.pae { 2 } else { 1 };
        for slot in 0..4 {
            for top in [0, 0xff00_0000] {
                put(directory, mode.directory_index(Gva(top | slot << 21)), entry(3 + slot, 7));
            }
            for page in 0..8 {
                let index = mode.table_index(Gva(slot << 21 | page << 12));
                put(3 + slot, index, entry(8 * slot + page, 7));
            }
        }
        let _ = self.mmu.set_paging(&mut self.vcpu, mode, 1 << 12, Flush::Yes);
    }

    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Paging { mode: bits, cr3, flush, seen } => {
                let cr3 = u32::from(cr3 % (GUEST_PAGES as u8 + 1)) << 12;
                let flush = if flush { Flush::Yes } else { Flush::No };
                let set = self.mmu.set_paging(&mut self.vcpu, mode(bits), cr3, flush);
                if set.is_ok() && flush == Flush::Yes {
                    self.expect_fresh(seen.gva());
                }
            }
            Operation::Access { at, kind, user } => {
                let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Execute][usize::from(kind % 3)];
                self.access(at.gva(), Access { kind, user });
            }
            Operation::Store { at, user, entry } => self.store(at.gva(), user, entry.bits()),
            Operation::Write { frame, index, entry, wide } => {
                let width = if wide { Width::B8 } else { Width::B4 };
                // Nearly always one of the entries that addresses come to.
                let index = if index & 0xc000 == 0 { index % 512 } else { index % 16 };
                let gpa = Gfn(u32::from(frame % GUEST_PAGES as u8)).at(u32::from(index) * width.bytes());
                let _ = self.mmu.store(self.vcpu.window(), gpa, width, entry.bits());
            }
            Operation::Invalidate(at) => {
                self.mmu.invalidate_page(&self.vcpu, at.gva());
                self.expect_fresh(at.gva());
            }
            Operation::Watch(frame) => {
                let _ = self.mmu.watch(&self.vcpu, Gfn(u32::from(frame % GUEST_PAGES as u8)));
            }
            Operation::Unwatch(frame) => self.mmu.unwatch(Gfn(u32::from(frame % GUEST_PAGES as u8))),
            Operation::PageOut { frame, count } => {
                let first = u32::from(frame) % GUEST_PAGES;
                let pages: Vec<Gfn> = (first..first + u32::from(count % 16)).map(Gfn).collect();
                self.mmu.page_out(Some(0), &pages).expect("memory does not fail");
            }
            Operation::Discard { frame, count, balloon } => {
                let first = u32::from(frame) % GUEST_PAGES;
                let what = if balloon { Discard::Balloon } else { Discard::Zero };
                // A watched page stays.
                let _ = self.mmu.discard(Some(0), first..first + u32::from(count % 4), what, May::NotSleep);
            }
            Operation::Explain(at) => drop(format!("{:?}", self.mmu.explain(&self.vcpu, at.gva()))),
        }
    }

    /// An access of guest code; afterwards the shadow must agree with the guest's tables.
    fn access(&mut self, gva: Gva, access: Access) -> Outcome {
        let mut outcome = self.mmu.fault(&self.vcpu, gva, access);
        // With a handful of frames, what is brought in may push out what was before.
        for _ in 0..16 {
            let Outcome::Need(gfn) = outcome else { break };
            if self.mmu.bring_in(Some(0), gfn).is_err() {
                break;
            }
            outcome = self.mmu.fault(&self.vcpu, gva, access);
        }
        if matches!(outcome, Outcome::Fixed | Outcome::Spurious) {
            let gpa = self.mmu.translate(&self.vcpu, gva, access).expect("what was just mapped translates");
            let spte = self.shadow_leaf(gva, access.user).expect("what was just mapped is in the shadow");
            let PageState::Resident(mfn) = self.mmu.p2m().lookup(gpa.gfn()) else {
                panic!("{gpa} is not resident")
            };
            assert_eq!(spte.mfn(), mfn, "{gva} leads to another frame than {gpa}");
            assert!(
                access.kind != AccessKind::Write || spte.is_writable(),
                "{gva} is not writable after {access:?}"
            );
            assert!(access.kind != AccessKind::Execute || spte.is_executable(), "{gva} cannot be executed");
        }
        outcome
    }

    /// Right after a flush: what the shadow holds for `gva` is what the guest's tables say now.
    fn expect_fresh(&self, gva: Gva) {
        for user in [false, true] {
            let Some(spte) = self.shadow_leaf(gva, user) else { continue };
            let access = if spte.is_writable() { Access::write(user) } else { Access::read(user) };
            let gpa = self.mmu.translate(&self.vcpu, gva, access).expect("a stale spte outlived a flush");
            assert_eq!(
                self.mmu.p2m().lookup(gpa.gfn()),
                PageState::Resident(spte.mfn()),
                "{gva} after a flush"
            );
        }
    }

    /// What a store of guest code does: by hardware where the shadow lets it, else by emulation.
    fn store(&mut self, gva: Gva, user: bool, value: u64) {
        match self.access(gva, Access::write(user)) {
            Outcome::Fixed | Outcome::Spurious => {
                let spte = self.shadow_leaf(gva, user).expect("access() has seen it");
                let word = self.machine.word64(spte.mfn().at(gva.offset()));
                word.store(value, std::sync::atomic::Ordering::Relaxed);
            }
            Outcome::Emulate(gpa) => drop(self.mmu.store(self.vcpu.window(), gpa, Width::B8, value)),
            _ => {}
        }
    }

    /// The leaf for `gva` as the hardware finds it: three levels below the PML4's first entry.
    fn shadow_leaf(&self, gva: Gva, user: bool) -> Option<Spte> {
        let entry = |table: Mfn, index: u32| {
            let word = self.machine.word64(table.at(index * 8)).load(std::sync::atomic::Ordering::Relaxed);
            Some(Spte(word)).filter(|spte| spte.is_present())
        };
        let pml4 = self.mmu.root_address(&self.vcpu, user)?.mfn();
        let pdpt = entry(pml4, 0)?.mfn();
        let directory = entry(pdpt, l3_index(gva))?.mfn();
        let table = entry(directory, l2_index(gva))?.mfn();
        entry(table, l1_index(gva))
    }
}

fuzz_target!(|program: (u8, u8, Vec<Operation>)| {
    let (spare, mode, operations) = program;
    let mut guest = Guest::new(4 + u32::from(spare) % (GUEST_PAGES + 8));
    guest.lay_tables(mode);
    for operation in operations {
        guest.apply(operation);
    }
    let findings = guest.mmu.audit();
    assert!(findings.is_empty(), "{findings:#?}");
});
