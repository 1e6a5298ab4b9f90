//! The CPU under the guest: walks the shadow tables in machine memory, 4-level long mode (SDM vol. 3A, 4.5), always
//! at CPL 3, with CR0.WP, EFER.NXE and the rest as Umbra sets them.
//!
//! Its TLB is the most hostile one that is legal: entries and paging-structure entries carry the root they were made
//! under, as with process-context identifiers, and stay until a flush, or until the address faults.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{MmapRegion, VolatileMemory};

use super::walker::Kind;

/// How long the TLB keeps what it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Until it is told to forget.
    Sticky,
    /// Forgets now and then by itself.
    Lossy,
    /// Caches nothing: every access walks.
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rights {
    write: bool,
    user: bool,
    fetch: bool,
}

#[derive(Clone, Copy, Debug)]
struct Cached {
    base: u64,
    rights: Rights,
}

/// The hardware's own fault: it goes to the VMM, never to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap;

#[derive(Debug)]
pub struct Tlb {
    memory: Memory,
    pages: HashMap<(u64, u32), Cached>,
    /// Tables by (root, level of the entry that leads to it, the address bits it is for).
    tables: HashMap<(u64, u32, u32), Cached>,
    uses: u32,
}

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const XD: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The 8-byte word of machine memory at `at`.
pub fn word(machine: &MmapRegion, at: u64) -> &AtomicU64 {
    machine.get_atomic_ref(at as usize).expect("the hardware was led out of machine memory")
}

impl Tlb {
    pub fn new(memory: Memory) -> Tlb {
        Tlb { memory, pages: HashMap::new(), tables: HashMap::new(), uses: 0 }
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        self.pages.clear();
        self.tables.clear();
    }

    /// Accesses `va` under the root at `root`: the machine address, or a trap.
    pub fn access(&mut self, machine: &Arc<MmapRegion>, root: u64, va: u32, kind: Kind) -> Result<u64, Trap> {
        self.uses += 1;
        if self.memory == Memory::None || (self.memory == Memory::Lossy && self.uses.is_multiple_of(3)) {
            self.flush();
        }
        let page = match self.pages.get(&(root, va >> 12)) {
            Some(page) => Some(*page),
            None => self.walk(machine, root, va),
        };
        match page.filter(|page| allows(page.rights, kind)) {
            Some(page) => Ok(page.base | u64::from(va & 0xfff)),
            None => {
                self.forget(root, va);
                Err(Trap)
            }
        }
    }

    /// Loads what the tables say of `va` without an access, as a prefetch or a speculation may at any time.
    pub fn speculate(&mut self, machine: &Arc<MmapRegion>, root: u64, va: u32) {
        if !self.pages.contains_key(&(root, va >> 12)) {
            self.walk(machine, root, va);
        }
    }

    /// A fault forgets the translation of its address and what led to it.
    fn forget(&mut self, root: u64, va: u32) {
        self.pages.remove(&(root, va >> 12));
        for level in 2..=4 {
            self.tables.remove(&(root, level, prefix(va, level)));
        }
    }

    fn walk(&mut self, machine: &MmapRegion, root: u64, va: u32) -> Option<Cached> {
        let mut at = Cached { base: root, rights: Rights { write: true, user: true, fetch: true } };
        let mut level = 4;
        // The lowest table that a structure cache knows.
        for known in 2..=4 {
            if let Some(table) = self.tables.get(&(root, known, prefix(va, known))) {
                (at, level) = (*table, known - 1);
                break;
            }
        }
        while level > 1 {
            at = step(machine, at, va, level, A)?;
            self.tables.insert((root, level, prefix(va, level)), at);
            level -= 1;
        }
        // D goes with the store in a real CPU; here the entries have it from the start, which `step` checks. A the VMM may
        // have cleared, to see whether it comes back.
        let page = step(machine, at, va, 1, D)?;
        self.pages.insert((root, va >> 12), page);
        Some(page)
    }
}

/// The address bits that choose an entry of `level` and all above it.
fn prefix(va: u32, level: u32) -> u32 {
    match level {
        2 => va >> 21,
        3 => va >> 30,
        _ => 0,
    }
}

/// Goes through one entry; `None` where it is not present. `status`: the bits Umbra presets.
fn step(machine: &MmapRegion, at: Cached, va: u32, level: u32, status: u64) -> Option<Cached> {
    // Others may do anything between two steps of a walk; shuttle must be told.
    #[cfg(shuttle)]
    shuttle::thread::sleep(std::time::Duration::ZERO);
    let index = u64::from(va) >> (12 + 9 * (level - 1)) & 511;
    let word = word(machine, at.base + 8 * index);
    // A goes into the entry that was read or into none: where it has changed a CPU looks again, and never marks one that is absent.
    let entry = loop {
        let entry = word.load(Ordering::Acquire);
        if entry & P == 0 {
            return None;
        }
        let marked = || word.compare_exchange(entry, entry | A, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if entry & A != 0 || marked() {
            break entry;
        }
    };
    assert!(entry & PS == 0 || level == 1, "no large shadow pages yet: {entry:#x} at level {level}");
    assert_eq!(entry & status, status, "A of a link and D of a leaf are preset: {entry:#x} at level {level}");
    assert_eq!(entry & !(ADDRESS | XD) & 0xfff0_0000_0000_0000, 0, "reserved bits in {entry:#x}");
    let rights = Rights {
        write: at.rights.write && entry & RW != 0,
        user: at.rights.user && entry & US != 0,
        fetch: at.rights.fetch && entry & XD == 0,
    };
    Some(Cached { base: entry & ADDRESS, rights })
}

fn allows(rights: Rights, kind: Kind) -> bool {
    rights.user
        && match kind {
            Kind::Read => true,
            Kind::Write => rights.write,
            Kind::Fetch => rights.fetch,
        }
}
