//! What one CPU may still have in its TLB, and what it has yet to answer for.
//!
//! Story: a region of 4 MiB that a CPU uses has a table with a place for each page.

use super::report::{LetGo, Seen};
use super::tables::Taken;
use super::{FLUSHES_MAX, Paging, REGION_PAGES, REGIONS, Site};
use crate::addr::{Gfn, Gpa};
use crate::format::Rights;

/// A translation that a CPU may still use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    /// When it was loaded, in ticks; 0 for none.
    pub loaded: u64,
    /// The epoch at which it agreed with the tables.
    pub checked: u64,
    pub instructions: u64,
    /// The entries that it was loaded by.
    pub leaf: Gpa,
    pub directory: Gpa,
    pub gfn: Gfn,
    pub eip: u32,
    pub rights: Rights,
    pub dirty: bool,
    pub global: bool,
    pub large: bool,
    /// Nobody has used it: the CPU may have loaded it all the same.
    pub assumed: bool,
}

impl Held {
    pub fn came_by(&self, entry: Gpa) -> bool {
        self.leaf == entry || self.directory == entry
    }
}

pub(super) const NOTHING: Held = Held {
    loaded: 0,
    checked: 0,
    instructions: 0,
    leaf: Gpa(0),
    directory: Gpa(0),
    gfn: Gfn(0),
    eip: 0,
    rights: Rights(0),
    dirty: false,
    global: false,
    large: false,
    assumed: false,
};

/// What another CPU has taken away while this one could not use it, or need not forget it at once: this one is judged when it lets go.
#[derive(Debug)]
pub(super) struct Owed {
    pub taken: Taken,
    /// How the editor had let go.
    pub let_go: LetGo,
    /// Events that this CPU had been given.
    pub events: u64,
    /// How often it may still go to user mode with it.
    pub grace: u32,
}

/// What one CPU has.
#[derive(Debug)]
pub(super) struct Cpu {
    pub paging: Paging,
    pub regions: Box<[Option<Box<[Held; REGION_PAGES]>>]>,
    pub user: bool,
    pub pending: Vec<Taken>,
    pub owed: Vec<Owed>,
    /// Its last flush, in ticks: any of them empties its caches of directory entries.
    pub flushed: u64,
    /// It has stored to the pointers that it has loaded.
    pub pointers_stored: Option<Site>,
    pub flushes: Vec<Seen>,
}

impl Cpu {
    /// One that has nothing.
    pub fn new() -> Cpu {
        Cpu {
            paging: Paging::default(),
            regions: (0..REGIONS).map(|_| None).collect(),
            user: false,
            pending: Vec::new(),
            owed: Vec::new(),
            flushed: 0,
            pointers_stored: None,
            flushes: Vec::new(),
        }
    }

    pub fn held(&self, page: u32) -> Held {
        let region = self.regions[page as usize / REGION_PAGES].as_ref();
        region.map_or(NOTHING, |region| region[page as usize % REGION_PAGES])
    }

    pub fn hold(&mut self, page: u32, held: Held) {
        let region = &mut self.regions[page as usize / REGION_PAGES];
        region.get_or_insert_with(|| Box::new([NOTHING; REGION_PAGES]))[page as usize % REGION_PAGES] = held;
    }

    pub fn drop_page(&mut self, page: u32) {
        let Some(region) = self.regions[page as usize / REGION_PAGES].as_mut() else { return };
        let held = &mut region[page as usize % REGION_PAGES];
        if std::mem::replace(held, NOTHING).large {
            region.iter_mut().filter(|held| held.large).for_each(|held| *held = NOTHING);
        }
    }

    pub fn drop_all_but(&mut self, global: bool) {
        for held in self.regions.iter_mut().flatten().flat_map(|region| region.iter_mut()) {
            if !(global && held.global) {
                *held = NOTHING;
            }
        }
    }

    pub fn note_flush(&mut self, seen: Seen) {
        self.flushed = seen.at;
        if self.flushes.len() == FLUSHES_MAX {
            self.flushes.remove(0);
        }
        self.flushes.push(seen);
    }
}
