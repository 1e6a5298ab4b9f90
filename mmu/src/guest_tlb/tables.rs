//! The guest's page tables as its stores have left them: what a walk finds there now, and who changed which entry when.
//!
//! Story: a table is copied when a walk first comes through it; from then on each store to its frame is compared with the copy, and
//! what is different is an [`Edit`]. Walks of the model read copies alone, so that they need nothing that is not in memory.
//!
//! Holds: a copy has A and D of its own, set where the model has used an entry: when the walker sets those of memory is its own
//! business. An entry that was entered before its table was known has an edit only if the store is remembered ([`Recent`]).
//!
//! Limits: a table is forgotten when no directory known leads to it; a root, when user code has its page as data. All changes are
//! forgotten where [`EDITED_MAX`] entries have some: of those before nothing is certain any more.

use rustc_hash::FxHashMap;

use super::{Paging, Site};
use crate::access::{Access, AccessKind};
use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE};
use crate::format::{Gpte, Mode, Rights, STATUS_BITS};

/// Changes of one entry that are remembered.
const EDITS_MAX: usize = 8;
/// Entries whose changes are remembered.
pub(super) const EDITED_MAX: usize = 1 << 15;
/// Stores that are remembered for tables to come, a power of two.
const RECENT: usize = 1 << 16;
/// P and U: what a user's entry has set.
const USER_ENTRY: u64 = 5;
/// A and D.
pub(super) const STATUS: u64 = STATUS_BITS;

/// Reads guest memory; false where it is not at hand.
pub type Memory<'a> = dyn Fn(Gpa, &mut [u8]) -> bool + 'a;

/// A change of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit {
    /// Where the entry is.
    pub entry: Gpa,
    /// What it was.
    pub old: u64,
    /// What it became.
    pub new: u64,
    /// When, in ticks of the model.
    pub tick: u64,
    /// By whom.
    pub site: Site,
    /// Events that its vCPU had been given.
    pub events: u64,
    /// When its vCPU had let go last.
    pub began: u64,
    /// Other user entries led to the old frame.
    pub shared: bool,
}

/// What a change takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Loss {
    /// Nothing.
    None,
    /// A or D.
    Status,
    /// A right.
    Right,
    /// The frame: the entry is absent, or leads to another.
    Frame,
}

/// What a walk finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walked {
    /// A page.
    Page(Walk),
    /// Nothing, by this entry; `None` where the CPU has no directory.
    Absent(Option<Gpa>),
    /// A table that is not at hand.
    Unknown,
}

/// A page as the tables have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Its frame.
    pub gfn: Gfn,
    /// What it allows.
    pub rights: Rights,
    /// D.
    pub dirty: bool,
    /// It outlives MOV CR3.
    pub global: bool,
    /// It is a part of a large page.
    pub large: bool,
    /// The entry that maps it.
    pub leaf: Gpa,
    /// The directory's.
    pub directory: Gpa,
}

/// True where a translation of these rights serves the access.
pub(super) fn allows(rights: Rights, mode: Mode, access: Access) -> bool {
    let reach = !access.user || rights.user();
    reach
        && match access.kind {
            AccessKind::Read => true,
            AccessKind::Write => rights.writable() || (!access.user && !mode.write_protect),
            AccessKind::Execute => rights.executable() && (access.user || !mode.smep || !rights.user()),
        }
}

/// One known table.
#[derive(Debug)]
struct Table {
    mode: Mode,
    entries: Box<[u64]>,
    /// A directory: the first page of what it maps.
    directory: Option<u32>,
    /// The directory entries that lead to it, and the first page of what it maps there.
    parents: FxHashMap<u64, u32>,
}

/// A store that may have been an entry's, in a table that is not known yet.
#[derive(Clone, Copy, Debug)]
struct Store {
    entry: u64,
    value: u32,
    tick: u64,
    site: Site,
}

/// What has become of a frame.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// When it became a page table.
    pub table: Option<(u64, Site)>,
    /// When a device last wrote to it.
    pub device: Option<u64>,
    /// When the guest gave it up.
    pub given_up: Option<u64>,
    /// When no user entry led to it any more.
    pub free: u64,
    /// The use by user code through the entry that was entered last.
    pub used: Option<Used>,
    /// User entries that lead to it.
    mappers: u32,
}

/// User code has come to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// When, in ticks.
    pub tick: u64,
    /// By whom.
    pub site: Site,
    /// Where.
    pub gva: Gva,
    /// Through which entry.
    pub entry: Gpa,
    /// When that was entered, 0 if nobody knows.
    pub entered: u64,
}

/// What a store's author was at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Author {
    pub site: Site,
    pub tick: u64,
    pub events: u64,
    pub began: u64,
}

/// A change that took something away, and the pages that it was for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub edit: Edit,
    pub loss: Loss,
    pub first_page: u32,
    pub pages: u32,
}

/// The tables that are known, and what happened to their entries and to frames.
#[derive(Debug)]
pub(super) struct Tables {
    pages: u32,
    known: FxHashMap<u32, Table>,
    edits: FxHashMap<u64, Vec<Edit>>,
    facts: FxHashMap<u32, Facts>,
    recent: Box<[Option<Store>]>,
    pub edits_seen: u64,
    /// Frames that have become tables, or are none any more, since it was last asked.
    pub news: Vec<(Gfn, bool)>,
}

impl Tables {
    pub fn new(pages: u32) -> Tables {
        Tables {
            pages,
            known: FxHashMap::default(),
            edits: FxHashMap::default(),
            facts: FxHashMap::default(),
            recent: vec![None; RECENT].into(),
            edits_seen: 0,
            news: Vec::new(),
        }
    }

    /// What is known of a frame.
    pub fn facts(&self, gfn: Gfn) -> Facts {
        self.facts.get(&gfn.0).copied().unwrap_or_default()
    }

    pub fn facts_mut(&mut self, gfn: Gfn) -> &mut Facts {
        self.facts.entry(gfn.0).or_default()
    }

    /// The changes of an entry, the first first.
    pub fn edits(&self, entry: Gpa) -> &[Edit] {
        self.edits.get(&entry.0).map_or(&[], Vec::as_slice)
    }

    /// Entries whose changes are remembered now.
    #[cfg(test)]
    pub fn edited(&self) -> usize {
        self.edits.len()
    }

    /// Walks the tables for `gva`, and knows them all from then on.
    pub fn walk(&mut self, memory: &Memory<'_>, paging: &Paging, gva: Gva, by: &Author) -> Walked {
        let mode = paging.mode;
        let quarter = (gva.0 >> 30) as usize;
        let Some(directory) = paging.directories[quarter] else { return Walked::Absent(None) };
        let base = if mode.pae { (quarter as u32) << 18 } else { 0 };
        if !self.learn(memory, mode, directory, by) {
            return Walked::Unknown;
        }
        let index = mode.directory_index(gva);
        let directory_entry = entry_at(mode, directory, index);
        let gpde = self.read(directory, index, base);
        if !gpde.is_present() {
            return Walked::Absent(Some(directory_entry));
        }
        let large = gpde.is_large(mode);
        let at = |gpte: Gpte, gfn, rights, leaf| {
            Walked::Page(Walk {
                gfn,
                rights,
                dirty: gpte.is_dirty(),
                global: gpte.is_global() && mode.global_pages,
                large,
                leaf,
                directory: directory_entry,
            })
        };
        if large {
            let span = span(mode);
            let gfn = Gfn(gpde.large_gfn(mode).0 + (gva.0 >> 12) % span);
            return at(gpde, gfn, gpde.rights(mode), directory_entry);
        }
        let table = gpde.gfn(mode);
        if !self.learn(memory, mode, table, by) {
            return Walked::Unknown;
        }
        if let Some(known) = self.known.get_mut(&table.0) {
            known.parents.insert(directory_entry.0, base + index * span(mode));
        }
        let index = mode.table_index(gva);
        let leaf = entry_at(mode, table, index);
        let gpte = self.known.get(&table.0).map_or(Gpte(0), |table| Gpte(table.entries[index as usize]));
        if !gpte.is_present() {
            return Walked::Absent(Some(leaf));
        }
        at(gpte, gpte.gfn(mode), gpte.rights(mode).and(gpde.rights(mode)), leaf)
    }

    /// The entries that decide about `gva`, that of the table and that of the directory, as far as there are such.
    pub fn entries_for(
        &mut self,
        memory: &Memory<'_>,
        paging: &Paging,
        gva: Gva,
        by: &Author,
    ) -> (Option<Gpa>, Option<Gpa>) {
        let quarter = (gva.0 >> 30) as usize;
        let directory = paging.directories[quarter]
            .map(|directory| entry_at(paging.mode, directory, paging.mode.directory_index(gva)));
        match self.walk(memory, paging, gva, by) {
            Walked::Page(walk) => (Some(walk.leaf), directory),
            Walked::Absent(entry) => (entry, directory),
            Walked::Unknown => (None, directory),
        }
    }

    /// What the entry of a known directory allows.
    pub fn rights_at(&self, mode: Mode, entry: Gpa) -> Rights {
        let index = (entry.0 % PAGE_SIZE) / u64::from(mode.entry_bytes());
        self.known
            .get(&entry.gfn().0)
            .map_or(Rights(0), |table| Gpte(table.entries[index as usize]).rights(mode))
    }

    fn read(&mut self, directory: Gfn, index: u32, base: u32) -> Gpte {
        self.known.get_mut(&directory.0).map_or(Gpte(0), |table| {
            table.directory = Some(base);
            Gpte(table.entries[index as usize])
        })
    }

    /// The access has set A, and D, on its way.
    pub fn mark(&mut self, mode: Mode, walk: &Walk, dirty: bool) {
        for (at, bits) in [(walk.directory, 1 << 5), (walk.leaf, if dirty { STATUS } else { 1 << 5 })] {
            let index = (at.0 % PAGE_SIZE) / u64::from(mode.entry_bytes());
            if let Some(table) = self.known.get_mut(&at.gfn().0) {
                table.entries[index as usize] |= bits;
            }
        }
    }

    /// Knows the frame as a table; false where it cannot be read.
    fn learn(&mut self, memory: &Memory<'_>, mode: Mode, gfn: Gfn, by: &Author) -> bool {
        if self.known.contains_key(&gfn.0) {
            return true;
        }
        if gfn.0 >= self.pages {
            return false;
        }
        let mut page = [0; PAGE_SIZE as usize];
        if !memory(Gpa(u64::from(gfn.0) * PAGE_SIZE), &mut page) {
            return false;
        }
        let entries: Box<[u64]> = page.chunks(mode.entry_bytes() as usize).map(word).collect();
        for (index, value) in (0..).zip(&entries) {
            self.count_mapper(mode, *value, 1, by.tick);
            let entry = entry_at(mode, gfn, index).0;
            if let Some(store) = self.recent[slot_of(entry)]
                && store.entry == entry
                && store.value & !(STATUS as u32) == *value as u32 & !(STATUS as u32)
            {
                let Store { tick, site, .. } = store;
                let edit = Edit {
                    entry: Gpa(entry),
                    old: 0,
                    new: *value,
                    tick,
                    site,
                    events: 0,
                    began: 0,
                    shared: false,
                };
                self.remember(edit);
            }
        }
        self.facts_mut(gfn).table = Some((by.tick, by.site));
        self.known.insert(gfn.0, Table { mode, entries, directory: None, parents: FxHashMap::default() });
        self.news.push((gfn, true));
        true
    }

    /// It is no table any more.
    fn forget(&mut self, gfn: Gfn, tick: u64) {
        let Some(table) = self.known.remove(&gfn.0) else { return };
        let mode = table.mode;
        table.entries.iter().for_each(|value| self.count_mapper(mode, *value, -1, tick));
        self.news.push((gfn, false));
    }

    /// User code has the page as data: whatever it was, it is no table.
    pub fn is_data(&mut self, gfn: Gfn, tick: u64) {
        self.forget(gfn, tick);
    }

    fn count_mapper(&mut self, mode: Mode, value: u64, by: i32, tick: u64) {
        let gfn = Gpte(value).gfn(mode);
        if value & USER_ENTRY == USER_ENTRY && gfn.0 < self.pages {
            let facts = self.facts_mut(gfn);
            facts.mappers = facts.mappers.saturating_add_signed(by);
            if by < 0 && facts.mappers == 0 {
                facts.free = tick;
            }
        }
    }

    fn remember(&mut self, edit: Edit) {
        if self.edits.len() == EDITED_MAX && !self.edits.contains_key(&edit.entry.0) {
            self.edits.clear();
        }
        let edits = self.edits.entry(edit.entry.0).or_default();
        if edits.len() == EDITS_MAX {
            edits.remove(0);
        }
        edits.push(edit);
    }

    /// A store that may be an entry's of a table that is not known.
    pub fn note_store(&mut self, mode: Mode, at: Gpa, value: u64, by: &Author) {
        if value & USER_ENTRY == USER_ENTRY && at.0.is_multiple_of(u64::from(mode.entry_bytes())) {
            let store = Store { entry: at.0, value: value as u32, tick: by.tick, site: by.site };
            self.recent[slot_of(at.0)] = Some(store);
        }
    }

    /// `length` bytes of a known table have been stored to. Returns what was taken away, and whether anything is different.
    pub fn refresh(
        &mut self,
        memory: &Memory<'_>,
        mode: Mode,
        at: Gpa,
        length: u32,
        by: &Author,
    ) -> (Vec<Taken>, bool) {
        let (gfn, bytes) = (at.gfn(), u64::from(mode.entry_bytes()));
        let first = at.0 % PAGE_SIZE / bytes;
        let last = ((at.0 % PAGE_SIZE + u64::from(length.max(1)) - 1) / bytes).min(PAGE_SIZE / bytes - 1);
        let mut now = [0; PAGE_SIZE as usize];
        let now = &mut now[..((last - first + 1) * bytes) as usize];
        if !self.known.contains_key(&gfn.0) || !memory(entry_at(mode, gfn, first as u32), now) {
            return (Vec::new(), false);
        }
        let (mut taken, mut changed) = (Vec::new(), false);
        for (index, value) in (first as usize..).zip(now.chunks(bytes as usize).map(word)) {
            let Some(table) = self.known.get_mut(&gfn.0) else { break };
            let old = std::mem::replace(&mut table.entries[index], value);
            if old == value {
                continue;
            }
            changed |= (old ^ value) & !STATUS != 0;
            let directory = table.directory;
            let bases: Vec<u32> = table.parents.values().copied().collect();
            self.count_mapper(mode, old, -1, by.tick);
            self.count_mapper(mode, value, 1, by.tick);
            let loss = loss(mode, old, value, directory.is_some());
            let edit = Edit {
                entry: entry_at(mode, gfn, index as u32),
                old,
                new: value,
                tick: by.tick,
                site: by.site,
                events: by.events,
                began: by.began,
                shared: self.is_shared(mode, old, loss),
            };
            self.edits_seen += 1;
            if loss == Loss::None || loss == Loss::Status {
                // Entered, or relaxed; A and D alone are no change of what it leads to.
                if (old ^ value) & !STATUS != 0 {
                    self.remember(edit);
                }
            } else {
                self.remember(edit);
            }
            if loss != Loss::None {
                let index = index as u32;
                let span = span(mode);
                taken.extend(bases.iter().map(|base| Taken {
                    edit,
                    loss,
                    first_page: base + index,
                    pages: 1,
                }));
                taken.extend(directory.map(|base| Taken {
                    edit,
                    loss,
                    first_page: base + index * span,
                    pages: span,
                }));
            }
            if directory.is_some() {
                self.unlink(mode, edit.entry, old, by.tick);
            }
        }
        (taken, changed)
    }

    /// User entries but this one led to the frame that it led to.
    fn is_shared(&self, mode: Mode, old: u64, loss: Loss) -> bool {
        let own = u32::from(loss == Loss::Right);
        self.facts(Gpte(old).gfn(mode)).mappers > own
    }

    /// The directory entry has lost the table that it had.
    fn unlink(&mut self, mode: Mode, entry: Gpa, old: u64, tick: u64) {
        let (gpde, child) = (Gpte(old), Gpte(old).gfn(mode));
        if !gpde.is_present() || gpde.is_large(mode) {
            return;
        }
        if let Some(table) = self.known.get_mut(&child.0) {
            table.parents.remove(&entry.0);
            if table.parents.is_empty() && table.directory.is_none() {
                self.forget(child, tick);
            }
        }
    }

    /// All is new: the format has changed.
    pub fn forget_all(&mut self) {
        self.news.extend(self.known.drain().map(|(gfn, _)| (Gfn(gfn), false)));
        self.edits.clear();
        self.facts.values_mut().for_each(|facts| facts.mappers = 0);
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn entry_at(mode: Mode, table: Gfn, index: u32) -> Gpa {
    Gpa(u64::from(table.0) * PAGE_SIZE + u64::from(index * mode.entry_bytes()))
}

/// Pages that a directory entry maps.
pub(super) fn span(mode: Mode) -> u32 {
    if mode.pae { 512 } else { 1024 }
}

fn slot_of(entry: u64) -> usize {
    (entry / 4).wrapping_mul(0x9e37_79b9_7f4a_7c15) as usize >> 40 & (RECENT - 1)
}

/// What the entry's change takes away from who had it.
fn loss(mode: Mode, old: u64, new: u64, directory: bool) -> Loss {
    let (was, is) = (Gpte(old), Gpte(new));
    if !was.is_present() {
        return Loss::None;
    }
    let large = |gpte: Gpte| directory && gpte.is_large(mode);
    if !is.is_present() || was.gfn(mode) != is.gfn(mode) || large(was) != large(is) {
        return Loss::Frame;
    }
    let (before, after) = (was.rights(mode).0, is.rights(mode).0);
    if before & !after != 0 {
        Loss::Right
    } else if old & !new & STATUS != 0 {
        Loss::Status
    } else {
        Loss::None
    }
}
