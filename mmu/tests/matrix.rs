//! The permission matrix: every combination of entry bits at both levels, control bits and access, in both formats.
//!
//! A combination is a number; its bits are the axes. Each number that passes the legality filter is run three times
//! on entries written afresh: as a fault (and then the shadow is walked for every other access), as an emulated
//! access, and as an INVLPG that may prefill. The oracle is the naive walker. Organised after the idea of
//! kvm-unit-tests' access.c.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::model::hardware::Memory;
use crate::model::walker::{self, Control, EntryAt, Kind, Request};
use crate::model::world::{Caches, Done, Sizes, World, Wrong};
use umbra_mmu::TlbKind;

/// The axes, one bit each; control bits last, since changing them costs most.
const AXES: [&str; 23] = [
    "write", "fetch", "user", "pte.p", "pte.w", "pte.u", "pte.a", "pte.d", "pte.nx", "pte.rsvd", "pde.p",
    "pde.w", "pde.u", "pde.a", "pde.d", "pde.ps", "pde.nx", "pde.rsvd", "wp", "smep", "nxe", "pse", "pae",
];

/// Hardware without a TLB: entries are rewritten without INVLPG here, and one would rightly remember the old ones.
const HARDWARE: Caches = Caches::Hardware(Memory::None);
/// The TLB in software, flushed with each rewriting.
const SOFT: Caches = Caches::Soft(TlbKind::Sticky);

/// Frames of the guest's tables: a directory and a table of each format, and the PDPTEs.
const DIRECTORY: [u64; 2] = [1, 9];
const TABLE: [u64; 2] = [4, 13];
const POINTERS: u64 = 8;
/// The page that small mappings lead to, and the first of the large ones'.
const SMALL: u64 = 20;
const LARGE: u64 = 0x400;
/// The address under test: entry 5 of a table, page 5 of a large page.
const VA: u32 = 0x0040_5678;

#[derive(Clone, Copy)]
struct Case(u32);

/// Why a combination is not run.
type Rule = (&'static str, fn(Case) -> bool);

const RULES: [Rule; 6] = [
    ("no access is a store and a fetch", |c| c.is("write") && c.is("fetch")),
    ("entries of 4 bytes have no NX", |c| !c.is("pae") && (c.is("pte.nx") || c.is("pde.nx"))),
    ("a table entry of 4 bytes has no reserved bit", |c| !c.is("pae") && c.is("pte.rsvd")),
    ("a directory entry of 4 bytes has reserved bits only for a large page", |c| {
        !c.is("pae") && c.is("pde.rsvd") && !c.is_large()
    }),
    ("a large page has no table entry", |c| c.is_large() && c.0 & Case::level("pte.") != 0),
    ("PSE means nothing to PAE (the property test flips it)", |c| c.is("pae") && c.is("pse")),
];

impl Case {
    fn is(self, axis: &str) -> bool {
        let n = AXES.iter().position(|name| *name == axis).expect("an axis");
        self.0 >> n & 1 == 1
    }

    fn of(axes: &[&str]) -> u32 {
        (0..AXES.len()).filter(|n| axes.contains(&AXES[*n])).map(|n| 1 << n).sum()
    }

    fn level(prefix: &str) -> u32 {
        (0..AXES.len()).filter(|n| AXES[*n].starts_with(prefix)).map(|n| 1 << n).sum()
    }

    fn is_large(self) -> bool {
        self.is("pde.ps") && (self.is("pae") || self.is("pse"))
    }

    fn broken_rule(self) -> Option<&'static str> {
        RULES.iter().find(|(_, breaks)| breaks(self)).map(|(reason, _)| *reason)
    }

    fn request(self) -> Request {
        let kind = match (self.is("write"), self.is("fetch")) {
            (true, _) => Kind::Write,
            (_, true) => Kind::Fetch,
            _ => Kind::Read,
        };
        Request { kind, user: self.is("user") }
    }

    /// The entries' places and values.
    fn entries(self) -> [(EntryAt, u64); 2] {
        let pae = self.is("pae");
        let table = TABLE[usize::from(pae)] << 12;
        let leads_to = if self.is_large() { LARGE } else { TABLE[usize::from(pae)] };
        let (pde, pte) = (self.flags("pde.") | leads_to << 12, self.flags("pte.") | SMALL << 12);
        let directory = DIRECTORY[usize::from(pae)] << 12;
        let at = |address, size| EntryAt { address, size };
        if pae {
            let (pde_index, pte_index) = (u64::from(VA >> 21), u64::from(VA >> 12 & 511));
            [(at(directory + 8 * pde_index, 8), pde), (at(table + 8 * pte_index, 8), pte)]
        } else {
            let (pde_index, pte_index) = (u64::from(VA >> 22), u64::from(VA >> 12 & 1023));
            [(at(directory + 4 * pde_index, 4), pde), (at(table + 4 * pte_index, 4), pte)]
        }
    }

    fn flags(self, level: &str) -> u64 {
        let named = [("p", 0), ("w", 1), ("u", 2), ("a", 5), ("d", 6), ("ps", 7), ("nx", 63)];
        let is =
            |name: &str| AXES.contains(&&*format!("{level}{name}")) && self.is(&format!("{level}{name}"));
        let flags: u64 = named.iter().map(|(name, bit)| u64::from(is(name)) << bit).sum();
        if is("rsvd") { flags | 1 << self.reserved_bit(level) } else { flags }
    }

    /// Another reserved bit for every combination; `every_bit_of_every_entry` tries all of them.
    fn reserved_bit(self, level: &str) -> u32 {
        let turn = self.0.wrapping_mul(0x9e37_79b9) >> 8;
        match (self.is("pae"), level == "pde." && self.is_large()) {
            (true, true) if turn & 1 == 0 => 13 + turn % 8,
            (true, _) => 36 + turn % 27,
            (false, _) => 17 + turn % 5,
        }
    }

    fn name(self) -> String {
        let on: Vec<_> = AXES.iter().copied().filter(|axis| self.is(axis)).collect();
        on.join(" ")
    }
}

/// A small world with tables of both formats, and the control bits they are run under.
struct Bench {
    world: World,
    runs: u64,
}

impl Bench {
    fn new(tlb: Caches) -> Bench {
        let sizes = Sizes { guest_pages: 1100, machine_frames: 400, shadow_pages_max: 128, vcpus: 1, tlb };
        let mut world = World::new(sizes);
        world.poke(POINTERS << 12, 8, DIRECTORY[1] << 12 | 1);
        for page in [SMALL, LARGE + 5] {
            world.poke(page << 12 | 0x678, 4, page * 0x0101_0101);
        }
        Bench { world, runs: 0 }
    }

    fn set_control(&mut self, case: Case) -> Result<(), Wrong> {
        let pae = case.is("pae");
        let cr3 = if pae { POINTERS } else { DIRECTORY[0] } << 12;
        let control = Control {
            pg: true,
            pae,
            pse: case.is("pse"),
            wp: case.is("wp"),
            nxe: case.is("nxe"),
            smep: case.is("smep"),
            pge: false,
            cr3: cr3 as u32,
            pdpte: [0; 4],
        };
        self.world.set_control(0, control, true)
    }

    fn write_entries(&mut self, entries: &[(EntryAt, u64); 2]) {
        for (at, value) in entries {
            self.world.poke(at.address, at.size, *value);
        }
        self.world.forget_past();
    }

    /// All three runs of one combination.
    fn run(&mut self, r: Request, entries: &[(EntryAt, u64); 2]) -> Result<(), Wrong> {
        self.write_entries(entries);
        self.touch(r)?;
        self.expect_no_excess()?;
        self.write_entries(entries);
        self.world.emulate(0, VA, 1, r, 0x5a)?;
        self.write_entries(entries);
        self.expect_prefill(r, entries)?;
        self.runs += 3;
        Ok(())
    }

    fn touch(&mut self, r: Request) -> Result<Done, Wrong> {
        match r.kind {
            Kind::Write => self.world.write(0, VA, 1, r.user, 0xa5),
            _ => self.world.read(0, VA, 1, r),
        }
    }

    /// After an access the shadow may allow others, but none that must still set a bit, or fault.
    fn expect_no_excess(&mut self) -> Result<(), Wrong> {
        let control = self.world.cpus[0].control;
        let now = walker::look(&self.world.memory, &control, VA);
        for r in every_request() {
            let Some(address) = self.world.shadow_allows(0, VA, r) else { continue };
            let physical = self.world.physical_of(address);
            if !now.is_some_and(|t| t.serves(&control, r) && Some(t.physical) == physical) {
                return Err(self.world.wrong(0, VA, r, "the shadow allows what the guest's tables do not"));
            }
        }
        Ok(())
    }

    /// INVLPG touches no entry, and leaves nothing that the tables do not say. For hardware it maps what has been used (A
    /// at every level, D for stores) for the privilege that will use it.
    fn expect_prefill(&mut self, r: Request, entries: &[(EntryAt, u64); 2]) -> Result<(), Wrong> {
        self.world.invalidate(0, VA);
        for (at, value) in entries {
            if self.world.guest_word(at.address) >> (at.address % 8 * 8) & mask(at.size) != *value {
                return Err(self.world.wrong(0, VA, r, "INVLPG changed an entry"));
            }
        }
        let control = self.world.cpus[0].control;
        let now = walker::look(&self.world.memory, &control, VA);
        for r in every_request() {
            let is_memory = |t: &walker::Cacheable| self.world.memory.has(t.physical);
            let mapped = now.filter(is_memory).filter(|t| t.grants.user == r.user);
            let want = mapped.is_some_and(|t| t.serves(&control, r));
            let is = self.world.shadow_allows(0, VA, r).is_some();
            if is != want && (is || self.world.cpus[0].vcpu.is_in_hardware()) {
                let text =
                    format!("after INVLPG the shadow should{} allow this", if want { "" } else { " not" });
                return Err(self.world.wrong(0, VA, r, &text));
            }
        }
        Ok(())
    }
}

fn mask(size: u32) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

fn every_request() -> impl Iterator<Item = Request> {
    let kinds = [Kind::Read, Kind::Write, Kind::Fetch];
    kinds.into_iter().flat_map(|kind| [false, true].map(|user| Request { kind, user }))
}

#[test]
fn matrix_of_every_bit_at_both_levels_of_both_formats() {
    every_combination("matrix", HARDWARE);
}

#[test]
fn matrix_of_every_bit_at_both_levels_of_both_formats_by_a_soft_tlb() {
    every_combination("matrix, soft TLB", SOFT);
}

fn every_combination(name: &str, tlb: Caches) {
    let start = Instant::now();
    let mut bench = Bench::new(tlb);
    let mut skipped: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut cases, mut control) = (0u64, None);
    for case in (0..1 << AXES.len()).map(Case) {
        if let Some(reason) = case.broken_rule() {
            *skipped.entry(reason).or_default() += 1;
            continue;
        }
        let bits = case.0 >> (AXES.len() - 5);
        let ready = if control == Some(bits) { Ok(()) } else { bench.set_control(case) };
        control = Some(bits);
        if let Err(Wrong(text)) = ready.and_then(|()| bench.run(case.request(), &case.entries())) {
            panic!("combination {:#x} [{}]: {text}", case.0, case.name());
        }
        cases += 1;
    }
    bench.world.audit().unwrap_or_else(|Wrong(text)| panic!("{text}"));
    println!("{name}: {cases} combinations, {} runs, {:.1} s", bench.runs, start.elapsed().as_secs_f64());
    skipped.iter().for_each(|(reason, count)| println!("{name}: {count} not run: {reason}"));
    assert!(cases > 900_000, "the filter lets {cases} combinations pass");
}

/// Each of the bits of an entry on its own, at each level, whatever it means.
#[test]
fn matrix_of_every_bit_of_every_entry() {
    for tlb in [HARDWARE, SOFT] {
        every_single_bit(tlb);
    }
}

fn every_single_bit(tlb: Caches) {
    let mut bench = Bench::new(tlb);
    let base = Case::of(&["pde.p", "pde.w", "pde.u", "pde.a", "pte.p", "pte.w", "pte.u", "pte.a"]);
    for control in 0..32u32 {
        let case = Case(base | control << (AXES.len() - 5));
        bench.set_control(case).unwrap_or_else(|Wrong(text)| panic!("{text}"));
        for large in [0, Case::of(&["pde.ps"])] {
            let entries = Case(case.0 | large).entries();
            for (level, bit) in
                (0..2).flat_map(|level| (0..8 * entries[0].0.size).map(move |bit| (level, bit)))
            {
                let mut changed = entries;
                changed[level].1 ^= 1 << bit;
                for r in every_request() {
                    if let Err(Wrong(text)) = bench.run(r, &changed) {
                        panic!("[{}] with bit {bit} of entry {level} flipped: {text}", case.name());
                    }
                }
            }
        }
    }
    println!("matrix: {} runs with single bits", bench.runs);
    assert!(bench.runs > 50_000);
}

/// Each bit of each PDPTE: loaded, or refused by index and value; and what an absent one means to an access.
#[test]
fn matrix_of_every_bit_of_the_pdptes() {
    for tlb in [HARDWARE, SOFT] {
        every_pdpte_bit(tlb);
    }
}

fn every_pdpte_bit(tlb: Caches) {
    let mut bench = Bench::new(tlb);
    let case = Case(Case::of(&["pae", "wp", "nxe"]));
    for (index, bit) in (0..4).flat_map(|index| (0..64).map(move |bit| (index, bit))) {
        for present in [0, 1] {
            let at = (POINTERS << 12) + 8 * index;
            let old = bench.world.memory.read(at, 8);
            bench.world.poke(at, 8, DIRECTORY[1] << 12 | present | 1 << bit);
            let done = bench.set_control(case).and_then(|()| bench.touch(case.request()));
            done.map(drop).unwrap_or_else(|Wrong(text)| panic!("PDPTE {index} bit {bit}: {text}"));
            bench.world.poke(at, 8, old);
        }
    }
}
