//! The audit: every invariant of the shadow, re-derived from the guest's own tables.
//!
//! Story: run at the end of every test program and, in debug builds, by the VMM when a guest ends. It wants
//! nothing else to run meanwhile. Each finding names its invariant.

use std::collections::HashMap;

use crate::Mmu;
use crate::addr::{Gfn, Mfn, Mpa};
use crate::bucket::Link;
use crate::format::Gpte;
use crate::frames::{DIRTY, EXTERNAL, FOREIGN, FrameKind, SHADOWED, UNSYNC, UPPER, WATCHED, WIDE};
use crate::p2m::{PageState, Range, TABLE_ENTRIES};
use crate::shadow::role::{Key, Shape};
use crate::spte::Spte;
use crate::walk::load_gpte;

/// The most findings one audit lists.
const FINDINGS_MAX: usize = 32;

/// What was wrong, each a sentence that begins with the invariant's name.
pub type Findings = Vec<String>;

struct Audit<'a> {
    mmu: &'a Mmu,
    findings: Findings,
    /// Links that the tables call for.
    leaves: HashMap<Mpa, Gfn>,
    /// Large leaves that the tables have.
    large: Vec<Mpa>,
}

impl Mmu {
    /// Checks everything and lists what is wrong (at most 32 findings). No vCPU may run meanwhile.
    pub fn audit(&self) -> Findings {
        let mut audit = Audit { mmu: self, findings: Vec::new(), leaves: HashMap::new(), large: Vec::new() };
        audit.check_pages();
        audit.check_free_pages();
        audit.check_roots();
        audit.check_links();
        audit.check_frames();
        audit.check_ranges();
        audit.check_marks();
        audit.check_swap();
        audit.check_counts();
        audit.check_importers();
        audit.findings
    }
}

impl Audit<'_> {
    fn require(&mut self, holds: bool, finding: impl FnOnce() -> String) {
        if !holds && self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding());
        }
    }

    fn check_pages(&mut self) {
        let live = self.mmu.pages.live();
        for (slot, key) in live {
            let directory = key.role.is_directory();
            let (held, parents) = {
                let page = self.mmu.pages.lock(slot, directory);
                (page.key, page.parents.clone())
            };
            self.require(held == Some(key), || {
                format!("INV-SHADOW-1: cache says {key:?}, slot {slot} {held:?}")
            });
            for parent in parents {
                let child = self.mmu.child(parent);
                self.require(child == Some(slot), || {
                    format!("INV-SHADOW-2: slot {slot} names a parent {parent} that links to {child:?}")
                });
            }
            for index in 0..512 {
                if directory {
                    self.check_link(key, slot, index);
                } else {
                    self.check_leaf(key, slot, index);
                }
            }
        }
    }

    /// A free slot's table is all zeros: whoever takes it needs not clear it.
    fn check_free_pages(&mut self) {
        for slot in self.mmu.pages.dead() {
            let table = self.mmu.pages.mfn(slot);
            let full = (0..512).find(|index| self.mmu.spte(table.at(index * 8)) != Spte::ABSENT);
            let page = self.mmu.pages.lock(slot, false);
            let free = full.is_none() && page.key.is_none() && page.parents.is_empty();
            drop(page);
            self.require(free, || format!("INV-SHADOW-3: free slot {slot} is not empty, at entry {full:?}"));
        }
    }

    /// An entry of a directory page: linked as its child says, and justified by the guest's entry.
    fn check_link(&mut self, key: Key, slot: u32, index: u32) {
        let at = self.mmu.pages.mfn(slot).at(index * 8);
        let spte = self.mmu.spte(at);
        if !spte.is_present() {
            return;
        }
        if spte.is_large() {
            self.large.push(at);
            return self.check_large(key, index, spte);
        }
        let Some(child) = self.child_of(at, false) else { return };
        if key.role.shape != Shape::Directory {
            return;
        }
        let mode = key.role.mode;
        let gpte = self.guest_entry(key, index);
        let large = gpte.is_large(mode);
        let valid = gpte.is_present() && gpte.is_accessed() && !gpte.has_reserved_bits(mode, large);
        let same = if large {
            let base = gpte.large_gfn(mode).0;
            child.role.shape == Shape::Linear && (base..base + 1024).contains(&child.gfn.0)
        } else {
            child.role.shape == Shape::Table
                && child.gfn == gpte.gfn(mode)
                && child.role.rights == gpte.rights(mode)
        };
        self.require(valid && same, || {
            format!("INV-SYNC-3: {key:?} entry {index} links {child:?}, the guest says {gpte:?}")
        });
    }

    /// A large leaf: its range is huge, in these frames, and the guest's entry justifies it.
    fn check_large(&mut self, key: Key, index: u32, spte: Spte) {
        let first = self.mmu.frames.range_of(spte.mfn());
        let huge = first.is_some_and(|first| self.mmu.p2m.range(first) == Range::Huge(spte.mfn()));
        self.require(huge, || format!("INV-HUGE-1: {spte:?} maps a range that is not huge, {first:?}"));
        let pages = TABLE_ENTRIES as u32;
        if key.role.shape != Shape::Directory {
            let there = Gfn(key.gfn.0 + index * pages);
            return self.require(first == Some(there), || {
                format!("INV-SYNC-3: {key:?} entry {index} is {spte:?}, of {first:?} and not of {there}")
            });
        }
        let (mode, gpte) = (key.role.mode, self.guest_entry(key, index));
        let valid = gpte.is_present() && gpte.is_accessed() && gpte.is_large(mode);
        // Two entries stand for one of 4 MiB.
        let half = if mode.pae { 0 } else { index & 1 };
        let within = first == Some(Gfn(gpte.large_gfn(mode).0 + half * pages));
        let dirty = gpte.is_dirty() || !spte.is_writable();
        self.require(valid && within && dirty && !gpte.has_reserved_bits(mode, true), || {
            format!("INV-SYNC-3: {key:?} entry {index} is {spte:?}, the guest says {gpte:?}")
        });
    }

    /// The key of the page that an entry links to, checked to name the entry among its parents.
    fn child_of(&mut self, at: Mpa, directory: bool) -> Option<Key> {
        let Some(child) = self.mmu.child(at) else {
            self.require(false, || format!("INV-SHADOW-2: entry {at} links to no shadow page"));
            return None;
        };
        let page = self.mmu.pages.lock(child, directory);
        let (key, listed) = (page.key, page.parents.iter().filter(|p| **p == at).count());
        drop(page);
        self.require(listed == 1, || {
            format!("INV-SHADOW-2: slot {child} lists its parent {at} {listed} times")
        });
        key
    }

    /// An entry of a first-level page: right frame, justified by the guest's entry unless unsync.
    fn check_leaf(&mut self, key: Key, slot: u32, index: u32) {
        let at = self.mmu.pages.mfn(slot).at(index * 8);
        let spte = self.mmu.spte(at);
        if !spte.is_present() {
            return;
        }
        let Some(gfn) = self.mmu.frames.gfn(spte.mfn()) else {
            self.require(false, || format!("INV-P2M-1: {spte:?} at {at} maps no guest frame"));
            return;
        };
        self.leaves.insert(at, gfn);
        let state = self.mmu.p2m.lookup(gfn);
        self.require(state == PageState::Resident(spte.mfn()), || {
            format!("INV-P2M-1: {spte:?} at {at} maps {gfn}, which is {state:?}")
        });
        let dirty = self.mmu.frames.flags(spte.mfn()) & DIRTY != 0;
        self.require(dirty || !spte.is_writable(), || {
            format!("INV-DIRTY-1: {spte:?} at {at} lets {gfn} be written, which is clean")
        });
        let tracked = self.mmu.is_tracked(spte.mfn());
        self.require(!(tracked && spte.is_writable()), || {
            format!("INV-TRACK-1: {spte:?} at {at} lets {gfn} be written untracked")
        });
        match key.role.shape {
            Shape::Linear => self.check_linear(key, index, gfn, spte),
            _ => self.check_table_leaf(key, index, gfn, spte),
        }
    }

    fn check_linear(&mut self, key: Key, index: u32, gfn: Gfn, spte: Spte) {
        let rights = key.role.rights;
        let within =
            (!spte.is_writable() || rights.writable()) && (!spte.is_executable() || rights.executable());
        self.require(gfn.0 == key.gfn.0 + index && within, || {
            format!("INV-SYNC-2: {key:?} entry {index} is {spte:?} for {gfn}")
        });
    }

    fn check_table_leaf(&mut self, key: Key, index: u32, gfn: Gfn, spte: Spte) {
        if self.flags(key.gfn) & UNSYNC != 0 {
            return;
        }
        let gpte = self.guest_entry(key, index);
        let justified = key.role.leaf_of(gpte).is_some_and(|(want, rights)| {
            want == gfn
                && (!spte.is_writable() || rights.writable)
                && (!spte.is_executable() || rights.executable)
                && (!spte.is_global() || rights.global)
        });
        self.require(justified, || {
            format!("INV-SYNC-2: {key:?} entry {index} is {spte:?} for {gfn}, the guest says {gpte:?}")
        });
    }

    fn check_roots(&mut self) {
        for root in self.mmu.live_roots() {
            let top = self.mmu.spte(root.pml4.at(0));
            self.require(top == Spte::link(root.pdpt), || {
                format!("INV-SHADOW-4: root {root:?} has top {top:?}")
            });
            for index in 0..4 {
                let at = root.pdpt.at(index * 8);
                if self.mmu.spte(at).is_present() {
                    self.child_of(at, true);
                }
            }
        }
    }

    /// Present if and only if linked, once.
    fn check_links(&mut self) {
        let mut linked: HashMap<Mpa, Gfn> = HashMap::new();
        let mut twice = Vec::new();
        self.mmu.buckets.for_each_link(|link: Link| {
            if linked.insert(link.spte(), link.gfn).is_some() {
                twice.push(link);
            }
        });
        self.require(twice.is_empty(), || format!("INV-RMAP-1: linked twice: {twice:?}"));
        for (at, gfn) in std::mem::take(&mut self.leaves) {
            let entry = linked.remove(&at);
            self.require(entry == Some(gfn), || {
                format!("INV-RMAP-1: the spte at {at} maps {gfn} and is linked as {entry:?}")
            });
        }
        self.require(linked.is_empty(), || format!("INV-RMAP-1: linked, but not present: {linked:?}"));
    }

    /// Every frame has one owner that knows of it.
    fn check_frames(&mut self) {
        let mmu = self.mmu;
        let idle = self.check_pool();
        let (mut guest, mut free, mut pinned) = (0u32, 0u32, Vec::new());
        for number in 0..mmu.frames.total_with_areas() {
            let mfn = Mfn(number);
            match mmu.frames.kind(mfn) {
                FrameKind::Guest(gfn) => {
                    guest += 1;
                    let state = mmu.p2m.lookup(gfn);
                    self.require(state == PageState::Resident(mfn) && gfn.0 != number, || {
                        format!("INV-P2M-1: {mfn} says it is {gfn}, which is {state:?}")
                    });
                }
                FrameKind::Free => free += u32::from(number < mmu.frames.total()),
                _ => {}
            }
            let listed =
                matches!(mmu.frames.kind(mfn), FrameKind::Guest(gfn) if gfn.0 >= mmu.config.low_pages);
            self.require(mmu.lru.has(mfn) == listed, || {
                format!("INV-LRU-1: {mfn} is {:?}, and on a list: {}", mmu.frames.kind(mfn), !listed)
            });
            if mmu.frames.pins(mfn) != u32::from(idle.contains(&mfn)) {
                pinned.push(mfn);
            }
        }
        let mut resident = 0;
        mmu.p2m.for_each_resident(|_, _| resident += 1);
        self.require(guest == resident, || {
            format!("INV-FRAME-2: {guest} guest frames, {resident} resident pages")
        });
        let listed = mmu.frames.free_count();
        self.require(free == listed, || {
            format!("INV-FRAME-2: {free} free frames, {listed} on the free list")
        });
        self.require(pinned.is_empty(), || format!("INV-WINDOW-1: still pinned: {pinned:?}"));
    }

    /// What a range is said to be as a whole it is, page by page; none is being gathered. The large leaves of each are on its list.
    fn check_ranges(&mut self) {
        let mmu = self.mmu;
        let mut listed: Vec<Mpa> = mmu.larges.all().into_iter().map(|(_, at)| at).collect();
        let mut present = std::mem::take(&mut self.large);
        listed.sort_unstable();
        present.sort_unstable();
        self.require(listed == present, || {
            format!("INV-RMAP-2: large leaves at {present:?}, listed are {listed:?}")
        });
        for first in (0..mmu.p2m.pages()).step_by(TABLE_ENTRIES).map(Gfn) {
            match mmu.p2m.range(first) {
                Range::Nothing | Range::Table => {}
                Range::Moving(ticket) => {
                    self.require(false, || {
                        format!("INV-HUGE-2: the range of {first} is {ticket:?}, and nobody gathers it")
                    });
                }
                Range::Huge(base) => {
                    let whole = mmu.frames.block(first) == Some(base) && mmu.is_gathered(first, base);
                    self.require(whole, || {
                        format!("INV-HUGE-1: the range of {first} is not all in the block of {base}")
                    });
                    let tracked = (0..TABLE_ENTRIES as u32).find(|n| {
                        mmu.frames.flags(Mfn(base.0 + n))
                            & (SHADOWED | UNSYNC | UPPER | WATCHED | EXTERNAL | FOREIGN)
                            != 0
                    });
                    self.require(tracked.is_none(), || {
                        format!(
                            "INV-HUGE-1: page {tracked:?} of the range of {first} is tracked, or imported"
                        )
                    });
                    let clean =
                        (0..TABLE_ENTRIES as u32).find(|n| mmu.frames.flags(Mfn(base.0 + n)) & DIRTY == 0);
                    self.require(clean.is_none(), || {
                        format!("INV-DIRTY-1: page {clean:?} of the huge range of {first} is clean")
                    });
                }
            }
        }
    }

    /// No slot of the window's pool is taken; the frames that idle ones pin are their pages'.
    fn check_pool(&mut self) -> Vec<Mfn> {
        let held = self.mmu.pool.held();
        for (gfn, mfn, mappings) in &held {
            let state = self.mmu.p2m.lookup(*gfn);
            self.require(*mappings == 0, || format!("INV-WINDOW-1: {gfn} is still mapped {mappings} times"));
            self.require(state == PageState::Resident(*mfn), || {
                format!("INV-POOL-1: a slot holds {gfn} in {mfn}, which is {state:?}")
            });
        }
        let stats = self.mmu.window_stats();
        self.require(stats.taken + stats.idle == held.len() as u32 && stats.waiters == 0, || {
            format!("INV-POOL-1: {} slots in use, counted as {stats:?}", held.len())
        });
        held.into_iter().map(|(_, mfn, _)| mfn).collect()
    }

    /// The marks of a frame say what pages its gfn has.
    fn check_marks(&mut self) {
        let mut shapes: HashMap<Gfn, u32> = HashMap::new();
        for (_, key) in self.mmu.pages.live() {
            if key.role.shadows_table() {
                let upper = if key.role.shape == Shape::Directory { UPPER } else { 0 };
                let wide = if key.role.mode.pae { WIDE } else { 0 };
                *shapes.entry(key.gfn).or_default() |= SHADOWED | upper | wide;
            }
        }
        let listed: Vec<Gfn> = self.mmu.unsync.lock().iter().map(|u| u.gfn).collect();
        for (index, gfn) in listed.iter().enumerate() {
            let once = !listed[..index].contains(gfn);
            self.require(once && self.flags(*gfn) & UNSYNC != 0, || {
                format!("INV-SYNC-1: {gfn} is listed as unsync, and is not (or twice)")
            });
        }
        let mmu = self.mmu;
        mmu.p2m.for_each_resident(|gfn, mfn| {
            let flags = mmu.frames.flags(mfn);
            let want = shapes.get(&gfn).copied().unwrap_or(0);
            self.require(flags & (SHADOWED | UPPER | WIDE) == want, || {
                format!("INV-TRACK-2: {gfn} has marks {flags:#x}, its pages call for {want:#x}")
            });
            let unsync = flags & UNSYNC != 0;
            self.require(!unsync || listed.contains(&gfn), || {
                format!("INV-SYNC-1: {gfn} is unsync, not listed")
            });
            self.require(!(unsync && flags & UPPER != 0), || {
                format!("INV-SYNC-4: directory {gfn} is unsync")
            });
        });
    }

    /// Each slot in use is some page's, and each page's slot is its own; nothing is on its way.
    fn check_swap(&mut self) {
        let mmu = self.mmu;
        mmu.swap.discard_abandoned();
        let mut owned = 0;
        mmu.p2m.for_each(|gfn, state| {
            self.require(state != PageState::Moving, || {
                format!("INV-P2M-3: {gfn} is on its way, and nobody moves it")
            });
            let slot = match state {
                PageState::Swapped(slot) => Some(slot),
                _ => mmu.p2m.copy(gfn),
            };
            let Some(slot) = slot else { return };
            owned += 1;
            let owner = mmu.swap.owner(slot);
            self.require(owner == Some(gfn), || {
                format!("INV-SWAP-1: {gfn} has slot {}, which is {owner:?}'s", slot.0)
            });
            if let PageState::Resident(mfn) = state {
                let dirty = mmu.frames.flags(mfn) & DIRTY != 0;
                self.require(!dirty, || format!("INV-DIRTY-2: {gfn} is dirty and keeps its copy"));
            }
        });
        let used = mmu.swap.stats().slots_used;
        self.require(used == owned, || format!("INV-SWAP-1: {used} slots in use, {owned} pages have one"));
    }

    /// The p2m's counts are those of a walk over it.
    fn check_counts(&mut self) {
        let (counts, walked) = (self.mmu.p2m.counts(), self.mmu.p2m.count_all());
        self.require(counts == walked, || format!("INV-P2M-4: counted {counts:?}, there are {walked:?}"));
    }

    /// Whoever is entered for a page finds it at home; its frame says that somebody is.
    fn check_importers(&mut self) {
        let mmu = self.mmu;
        for gfn in mmu.all_imported() {
            let state = mmu.p2m.lookup(gfn);
            let home = mmu.homes_of(gfn).map(PageState::Resident);
            self.require(home == Some(state) && self.flags(gfn) & EXTERNAL != 0, || {
                format!("INV-EXT-1: {:?} may have {gfn}, which is {state:?}", mmu.importers_of(gfn))
            });
        }
        mmu.p2m.for_each_resident(|gfn, mfn| {
            let flags = mmu.frames.flags(mfn);
            self.require(flags & EXTERNAL == 0 || !mmu.importers_of(gfn).is_empty(), || {
                format!("INV-EXT-1: {gfn} is marked as imported, and nobody has it")
            });
            let at_home = mmu.homes_of(gfn) == Some(mfn);
            self.require(mmu.frames.is_home(mfn) == at_home, || format!("INV-EXT-2: {gfn} is in {mfn}"));
            let tracked = if mmu.frames.is_home(mfn) { WATCHED } else { 0 };
            let tracked = tracked | if flags & FOREIGN != 0 { SHADOWED } else { 0 };
            self.require(flags & tracked == 0, || {
                format!("INV-EXT-4: {gfn} is tracked, and importers may write to it")
            });
        });
    }

    fn guest_entry(&self, key: Key, index: u32) -> Gpte {
        let PageState::Resident(mfn) = self.mmu.p2m.lookup(key.gfn) else { return Gpte(0) };
        let (mode, index) = (key.role.mode, key.role.guest_index(index));
        self.mmu.windows.with_frame(mfn, |memory, frame| load_gpte(memory, mode, frame, index))
    }

    fn flags(&self, gfn: Gfn) -> u32 {
        match self.mmu.p2m.lookup(gfn) {
            PageState::Resident(mfn) => self.mmu.frames.flags(mfn),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests;
