//! The naive walker: 32-bit paging and PAE paging, chapter by chapter of the SDM (vol. 3A, 4.3, 4.4, 4.6, 4.7).
//!
//! The CPU has 36 physical address bits, PSE, PSE-36, PAE, NX and SMEP; no SMAP, no protection keys.
//!
//! Where the SDM leaves a choice, the one that Umbra documents: A of a directory entry is set as soon as the walk
//! goes on to the table, A and D of the entry that maps the page only if the access is allowed. A table that lies
//! beyond memory reads as zeros.

use super::memory::Memory;

/// The control bits and registers that paging depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    pub pg: bool,
    pub pae: bool,
    pub pse: bool,
    pub wp: bool,
    pub nxe: bool,
    pub smep: bool,
    pub pge: bool,
    pub cr3: u32,
    /// The PDPTE registers.
    pub pdpte: [u64; 4],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Fetch,
}

/// What the instruction does, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub kind: Kind,
    pub user: bool,
}

/// A page fault: the error code, and CR2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub code: u32,
    pub cr2: u32,
}

/// Where an entry is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryAt {
    pub address: u64,
    pub size: u32,
}

/// The access rights that an entry grants, or several together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grants {
    pub write: bool,
    pub user: bool,
    pub fetch: bool,
}

/// What an entry turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    NotPresent,
    Reserved,
    /// It refers to a table at this address.
    Table {
        address: u64,
        grants: Grants,
        accessed: bool,
    },
    /// It maps the page that begins at this address.
    Page {
        address: u64,
        grants: Grants,
        accessed: bool,
        dirty: bool,
    },
}

fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 == 1
}

/// Bits `high..=low` of `value`, where they are.
fn field(value: u64, high: u32, low: u32) -> u64 {
    value & (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

fn grants(c: &Control, value: u64) -> Grants {
    Grants { write: bit(value, 1), user: bit(value, 2), fetch: !(c.pae && c.nxe && bit(value, 63)) }
}

/// Tables 4-9 to 4-11: bits 62:36 are reserved in every PAE entry, and bit 63 unless NXE is set.
fn pae_reserved(c: &Control, value: u64) -> bool {
    field(value, 62, 36) != 0 || (bit(value, 63) && !c.nxe)
}

/// Reads a page-directory entry: tables 4-4, 4-5 and 4-6 (32-bit), 4-9 and 4-10 (PAE).
pub fn directory_entry(c: &Control, value: u64) -> Entry {
    let (grants, accessed, dirty) = (grants(c, value), bit(value, 5), bit(value, 6));
    if !bit(value, 0) {
        return Entry::NotPresent;
    }
    match (c.pae, bit(value, 7)) {
        (true, true) if pae_reserved(c, value) || field(value, 20, 13) != 0 => Entry::Reserved,
        (true, true) => Entry::Page { address: field(value, 35, 21), grants, accessed, dirty },
        (true, false) if pae_reserved(c, value) => Entry::Reserved,
        (true, false) => Entry::Table { address: field(value, 35, 12), grants, accessed },
        (false, true) if c.pse => {
            // PSE-36 with M = 36: bits 16:13 are address bits 35:32; 20:17 and 21 are reserved.
            if field(value, 21, 17) != 0 {
                return Entry::Reserved;
            }
            let address = field(value, 31, 22) | field(value, 16, 13) << 19;
            Entry::Page { address, grants, accessed, dirty }
        }
        (false, _) => Entry::Table { address: field(value, 31, 12), grants, accessed },
    }
}

/// Reads a page-table entry: tables 4-6 (32-bit) and 4-11 (PAE).
pub fn table_entry(c: &Control, value: u64) -> Entry {
    if !bit(value, 0) {
        return Entry::NotPresent;
    }
    if c.pae && pae_reserved(c, value) {
        return Entry::Reserved;
    }
    let address = if c.pae { field(value, 35, 12) } else { field(value, 31, 12) };
    Entry::Page { address, grants: grants(c, value), accessed: bit(value, 5), dirty: bit(value, 6) }
}

/// The directory entry for `va`, or `None` where its PDPTE is not present.
pub fn directory_entry_at(c: &Control, va: u32) -> Option<EntryAt> {
    if !c.pae {
        let address = field(u64::from(c.cr3), 31, 12) + u64::from(va >> 22) * 4;
        return Some(EntryAt { address, size: 4 });
    }
    let pdpte = c.pdpte[(va >> 30) as usize];
    let address = field(pdpte, 35, 12) + u64::from(va >> 21 & 511) * 8;
    bit(pdpte, 0).then_some(EntryAt { address, size: 8 })
}

/// The entry for `va` in the page table at `table`.
pub fn table_entry_at(c: &Control, table: u64, va: u32) -> EntryAt {
    if c.pae {
        EntryAt { address: table + u64::from(va >> 12 & 511) * 8, size: 8 }
    } else {
        EntryAt { address: table + u64::from(va >> 12 & 1023) * 4, size: 4 }
    }
}

/// Rights of the whole translation: each level must grant.
pub fn both(a: Grants, b: Grants) -> Grants {
    Grants { write: a.write && b.write, user: a.user && b.user, fetch: a.fetch && b.fetch }
}

/// Section 4.6.1. Without paging there are no rights at all.
pub fn is_allowed(c: &Control, r: Request, g: Grants) -> bool {
    if !c.pg {
        return true;
    }
    match (r.user, r.kind) {
        (false, Kind::Read) => true,
        (false, Kind::Write) => g.write || !c.wp,
        (false, Kind::Fetch) => g.fetch && !(c.smep && g.user),
        (true, Kind::Read) => g.user,
        (true, Kind::Write) => g.user && g.write,
        (true, Kind::Fetch) => g.user && g.fetch,
    }
}

/// Section 4.7: the error code, with P and RSVD as the caller found.
fn fault(c: &Control, va: u32, r: Request, present: bool, reserved: bool) -> Fault {
    let write = r.kind == Kind::Write;
    let fetch = r.kind == Kind::Fetch && (c.smep || (c.pae && c.nxe));
    let flags = [present, write, r.user, reserved, fetch];
    let code = flags.iter().enumerate().map(|(n, on)| u32::from(*on) << n).sum();
    Fault { code, cr2: va }
}

/// Offset of `va` in a page of the kind that a directory entry maps.
fn large_offset(c: &Control, va: u32) -> u64 {
    u64::from(if c.pae { va & 0x1f_ffff } else { va & 0x3f_ffff })
}

/// The physical address of `va` in a large page at `base`.
pub fn in_large_page(c: &Control, base: u64, va: u32) -> u64 {
    base + large_offset(c, va)
}

fn read(memory: &Memory, at: EntryAt) -> u64 {
    memory.read(at.address, at.size)
}

fn set_bits(memory: &mut Memory, at: EntryAt, bits: u64) {
    let old = read(memory, at);
    memory.write(at.address, at.size, old | bits);
}

const A: u64 = 1 << 5;
const D: u64 = 1 << 6;

/// Makes the access: the physical address, or the fault; A and D are set in memory on the way.
pub fn access(memory: &mut Memory, c: &Control, va: u32, r: Request) -> Result<u64, Fault> {
    if !c.pg {
        return Ok(u64::from(va));
    }
    let not_present = fault(c, va, r, false, false);
    let reserved = fault(c, va, r, true, true);
    let denied = fault(c, va, r, true, false);
    let status = if r.kind == Kind::Write { A | D } else { A };

    let pde_at = directory_entry_at(c, va).ok_or(not_present)?;
    let (table, above) = match directory_entry(c, read(memory, pde_at)) {
        Entry::NotPresent => return Err(not_present),
        Entry::Reserved => return Err(reserved),
        Entry::Page { grants, .. } if !is_allowed(c, r, grants) => return Err(denied),
        Entry::Page { address, .. } => {
            set_bits(memory, pde_at, status);
            return Ok(in_large_page(c, address, va));
        }
        Entry::Table { address, grants, .. } => (address, grants),
    };
    set_bits(memory, pde_at, A);
    let pte_at = table_entry_at(c, table, va);
    match table_entry(c, read(memory, pte_at)) {
        Entry::Page { address, grants, .. } if is_allowed(c, r, both(above, grants)) => {
            set_bits(memory, pte_at, status);
            Ok(address | u64::from(va & 0xfff))
        }
        Entry::Page { .. } => Err(denied),
        Entry::Reserved => Err(reserved),
        _ => Err(not_present),
    }
}

/// A translation as a TLB may hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cacheable {
    pub physical: u64,
    pub grants: Grants,
    pub accessed: bool,
    pub dirty: bool,
    pub global: bool,
}

impl Cacheable {
    /// True when the access may be made through a TLB entry of this: without a walk, so A is set already, and for
    /// a store D too.
    pub fn serves(&self, c: &Control, r: Request) -> bool {
        self.accessed && (self.dirty || r.kind != Kind::Write) && is_allowed(c, r, self.grants)
    }
}

/// The translation that these two values of a directory and a table entry make, without a look at memory.
pub fn combine(c: &Control, va: u32, pde: u64, pte: u64) -> Option<Cacheable> {
    match (directory_entry(c, pde), table_entry(c, pte)) {
        (Entry::Page { address, grants, accessed, dirty }, _) => {
            let global = bit(pde, 8);
            Some(Cacheable { physical: in_large_page(c, address, va), grants, accessed, dirty, global })
        }
        (
            Entry::Table { grants: above, accessed: seen, .. },
            Entry::Page { address, grants, accessed, dirty },
        ) => Some(Cacheable {
            physical: address | u64::from(va & 0xfff),
            grants: both(above, grants),
            accessed: seen && accessed,
            dirty,
            global: bit(pte, 8),
        }),
        _ => None,
    }
}

/// What memory says of `va` now, touching nothing.
pub fn look(memory: &Memory, c: &Control, va: u32) -> Option<Cacheable> {
    if !c.pg {
        let all = Grants { write: true, user: true, fetch: true };
        return Some(Cacheable {
            physical: u64::from(va),
            grants: all,
            accessed: true,
            dirty: true,
            global: false,
        });
    }
    let pde = read(memory, directory_entry_at(c, va)?);
    let pte = match directory_entry(c, pde) {
        Entry::Table { address, .. } => read(memory, table_entry_at(c, address, va)),
        _ => 0,
    };
    combine(c, va, pde, pte)
}

/// The entries on the way to `va`: the directory's, and the table's if there is one.
pub fn entries(memory: &Memory, c: &Control, va: u32) -> Vec<EntryAt> {
    let Some(pde_at) = directory_entry_at(c, va).filter(|_| c.pg) else { return Vec::new() };
    match directory_entry(c, read(memory, pde_at)) {
        Entry::Table { address, .. } => vec![pde_at, table_entry_at(c, address, va)],
        _ => vec![pde_at],
    }
}

/// Section 4.4.1: what loading CR3 under PAE paging does. `Err`: a reserved bit is set, #GP(0), and the index and
/// value of the entry.
pub fn load_pdptes(memory: &Memory, cr3: u32) -> Result<[u64; 4], (u32, u64)> {
    let mut registers = [0; 4];
    for index in 0..4u32 {
        let value = memory.read(field(u64::from(cr3), 31, 5) + 8 * u64::from(index), 8);
        let reserved = field(value, 2, 1) | field(value, 8, 5) | field(value, 63, 36);
        if bit(value, 0) && reserved != 0 {
            return Err((index, value));
        }
        registers[index as usize] = value;
    }
    Ok(registers)
}

/// The walk as text, for a failure.
pub fn dump(memory: &Memory, c: &Control, va: u32) -> String {
    let mut text = format!("naive walk of {va:#x} under {c:x?}\n");
    for at in entries(memory, c, va) {
        text += &format!("  entry at {:#x} = {:#x}\n", at.address, read(memory, at));
    }
    text + &format!("  gives {:x?}\n", look(memory, c, va))
}
