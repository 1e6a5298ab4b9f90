//! A TLB in software: what a vCPU without hardware remembers of the shadow page tables.
//!
//! Story: an interpreter's loads, stores and fetches look here first ([`Mmu::tlb_load`] and its kin). A miss walks the
//! *shadow* tables as hardware would; where those say no, the caller has [`Mmu::fault`] do what it does for hardware,
//! and tries again. The TLB is told to forget by the same calls that make hardware flush: INVLPG, MOV CR3, and the
//! ledger's requests on the way into the guest ([`Mmu::tlb_enter`]).
//!
//! ```text
//! access --> set of its page --hit--> generations still those of the fill? --> frame
//!               |                        no: Incoherent, the run ends with a report
//!              miss --> shadow root .. spte --present, allows--> fill under bucket(gfn) --> frame
//!                          no: Miss::Fault; what makes the leaf then ([`Mmu::tlb_refill`], [`Mmu::fault`]) fills too
//! ```
//!
//! Entries carry the root they were made under, as with process-context identifiers: a change of CPL or of CR3 costs
//! nothing, and nothing is forgotten by it. Three temperaments ([`TlbKind`]), of which the hostile ones find missing
//! flushes: an entry that should be gone is used. The most hostile one walks by paging-structure caches
//! ([`crate::link_cache`]): what it misses it looks for in the tables that it has known, unlinked or not.
//!
//! Holds: INV-TLB-1, the generations of an entry are those that its frame had when the spte was read, both under
//! bucket(gfn). INV-TLB-2, a hit whose generation is not that of now is never used, but reported: the frame has been
//! handed on, or its write permission taken, and this TLB was not flushed. The check is made at each hit; while no
//! generation anywhere has advanced since the entry was last checked, it is one comparison. INV-TLB-3 is link_cache's.
//!
//! Locks: a hit takes none; a fill takes its first-level page, then bucket(gfn). Nothing sleeps; a guest's flush
//! waits for stores under way (shadow::stores).
//! Generations advance when a shootdown is complete, never before: until then an entry of old may well be used.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use crate::Mmu;
use crate::access::{Access, AccessKind};
use crate::addr::{Gfn, Gva, Mfn, PAGE_SHIFT, PAGE_SIZE};
use crate::link_cache::LinkCache;
use crate::p2m::Generations;
use crate::rules::{Rule, Rules};
use crate::shadow::RootRef;
use crate::shadow::large::LargeLeaf;
use crate::shadow::leaf::Leaf;
use crate::shadow::role::Shape;
use crate::spte::{Spte, l1_index};
use crate::sync::Ordering;
use crate::vcpu::Vcpu;
use crate::violation::{Filled, StaleTranslation, Violation};

/// Sets of the cache, a power of two.
const SETS: usize = 1024;
/// Entries in a set.
const WAYS: usize = 2;
/// Regions of 4 MiB, the largest page there is.
const REGIONS: usize = 1024;
/// Entries of large pages, by the lowest bits of their number: 128 MiB of them in a row.
const LARGE_ENTRIES: usize = 64;
/// Bits of a large page's address, and its pages.
const LARGE_BITS: u32 = 21;
const PAGES_OF_LARGE: u32 = 1 << (LARGE_BITS - PAGE_SHIFT);
/// In the key of a `sticky` store, where the entry is of a large page.
const LARGE_KEY: u32 = 1 << PAGE_BITS;
/// Bits of the memory of which pages have code.
const CODE_BITS: usize = 4096;
/// Invalidations, and events, that the report of a missed flush has at most.
pub(crate) const TRAIL_MAX: usize = 8;
/// A `lossy` TLB forgets one entry in so many hits.
const LOSS: u64 = 8;

/// How a software TLB forgets of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbKind {
    /// As hardware does: set-associative, the oldest of a set goes when a new one comes.
    Sized,
    /// Never: what it has learnt it knows until it is told to forget, links to tables too (paging-structure caches). The most
    /// hostile TLB that is legal.
    Sticky,
    /// At random, seeded.
    Lossy(u64),
}

/// Why a TLB has no frame for an access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Miss {
    /// The shadow does not allow it: [`Mmu::fault`], then again.
    Fault,
    /// A translation was used that should have been flushed: a fault of the VMM's own.
    Incoherent(Box<Violation>),
}

/// Where decoded code stands: a frame, and the generation of what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeFrame {
    /// The frame.
    pub mfn: Mfn,
    /// Its code generation, never 0; any store to the frame ends it ([`Mmu::code_generation`]).
    pub generation: u32,
}

/// One translation of a page of 4 KiB, or of a large one of 2 MiB: then `gfn` is its first, and the generations are its range's.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct Entry {
    /// Valid bit, root and page; [`NO_TAG`] for no entry.
    tag: u64,
    /// The spte as it was.
    spte: Spte,
    generations: Generations,
    /// [`crate::p2m::P2m::advances`] when the generations were last compared.
    checked: u64,
    gfn: Gfn,
    /// Which of the TLB's fills it was, the lower half of its number.
    filled: u32,
    /// It is a part of a guest page that may be larger: INVLPG of any of its addresses forgets it.
    large: bool,
}

/// Entries of a `lossy` TLB are never current: each hit takes the long way, where it may be forgotten.
const NEVER: u64 = u64::MAX;

/// What kernels fill most pages with.
static ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// What no access asks for, with a root or without.
const NO_TAG: u64 = u64::MAX >> 1;

const NOTHING: Entry = Entry {
    tag: NO_TAG,
    spte: Spte::ABSENT,
    generations: Generations { mapping: 0, write: 0 },
    checked: 0,
    gfn: Gfn(0),
    filled: 0,
    large: false,
};

const VALID: u64 = 1 << 63;
const PAGE_BITS: u32 = 20;

fn tag_of(root: u32, gva: Gva) -> u64 {
    root_tag(root) | u64::from(gva.0 >> 12)
}

/// What all tags under a root have in common; never 0.
pub(crate) fn root_tag(root: u32) -> u64 {
    VALID | u64::from(root) << PAGE_BITS
}

/// The page of a tag.
fn page_of(tag: u64) -> u32 {
    (tag & ((1 << PAGE_BITS) - 1)) as u32
}

/// The region of 4 MiB that a page is in.
fn region_of(page: u32) -> usize {
    (page >> 10) as usize
}

/// The first address of the large page.
fn first_of(gva: Gva) -> Gva {
    Gva(gva.0 >> LARGE_BITS << LARGE_BITS)
}

/// Which page of its large one it is in.
fn within_large(gva: Gva) -> u32 {
    (gva.0 - first_of(gva).0) >> PAGE_SHIFT
}

#[inline(always)]
fn set_of(gva: Gva) -> usize {
    (gva.0 >> 12) as usize % SETS
}

/// The TLB of one vCPU. It belongs to the vCPU's thread.
#[derive(Debug)]
pub struct SoftTlb {
    rules: Rules,
    kind: TlbKind,
    sets: Box<[[Cell<Entry>; WAYS]; SETS]>,
    /// Those of large pages, `large` all of them.
    larges: Box<[Cell<Entry>; LARGE_ENTRIES]>,
    /// What `sticky` remembers beside the others, by page.
    store: RefCell<HashMap<u32, Vec<Entry>>>,
    /// And the links to tables, which it alone remembers.
    links: Option<LinkCache>,
    random: Cell<u64>,
    /// Sets that may hold entries, a bit each: what a flush has to look at.
    used: [Cell<u64>; SETS / 64],
    /// Regions of 4 MiB that may have entries of large pages, a bit each.
    large: [Cell<u64>; REGIONS / 64],
    /// Changes whenever a translation that code was found by is forgotten because somebody asked.
    version: Cell<u64>,
    /// Pages that code was found in since, a bit for those of one remainder.
    code: Box<[Cell<u64>; CODE_BITS / 64]>,
    /// Epoch of the last flush of all that is not global.
    local_flush: Cell<u64>,
    /// Fills before the last flush of everything.
    flushed_fills: Cell<u64>,
    stats: Cell<TlbStats>,
}

/// What a TLB did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlbStats {
    /// Entries made.
    pub fills: u64,
    /// Pages forgotten by INVLPG or a page fault.
    pub page_flushes: u64,
    /// Flushes of everything, or of everything but global pages.
    pub flushes: u64,
}

impl SoftTlb {
    /// One that knows nothing yet, and keeps `rules`.
    pub fn new(kind: TlbKind, rules: Rules) -> SoftTlb {
        let seed = if let TlbKind::Lossy(seed) = kind { seed } else { 0 };
        SoftTlb {
            rules,
            kind,
            sets: Box::new(std::array::from_fn(|_| std::array::from_fn(|_| Cell::new(NOTHING)))),
            larges: Box::new(std::array::from_fn(|_| Cell::new(NOTHING))),
            store: RefCell::default(),
            links: (kind == TlbKind::Sticky).then(LinkCache::default),
            random: Cell::new(seed | 1),
            used: std::array::from_fn(|_| Cell::new(0)),
            large: std::array::from_fn(|_| Cell::new(0)),
            version: Cell::new(1),
            code: Box::new(std::array::from_fn(|_| Cell::new(0))),
            local_flush: Cell::new(0),
            flushed_fills: Cell::new(0),
            stats: Cell::default(),
        }
    }

    /// What it did so far.
    pub fn stats(&self) -> TlbStats {
        self.stats.get()
    }

    /// Its temperament.
    pub fn kind(&self) -> TlbKind {
        self.kind
    }

    /// Its paging-structure caches, if it has any.
    pub(crate) fn links(&self) -> Option<&LinkCache> {
        self.links.as_ref()
    }

    /// Fills before the last flush of everything.
    pub(crate) fn flushed_fills(&self) -> u64 {
        self.flushed_fills.get()
    }

    /// Forgets the page of `gva` under every root, and with it every part of a large page that the address may be in, and the links
    /// that lead to it: a page fault. INVLPG asks for [`SoftTlb::flush_links`] too.
    pub fn flush_page(&self, gva: Gva) {
        self.count(|s| s.page_flushes += 1);
        let page = gva.0 >> 12;
        self.set(gva).iter().filter(|e| page_of(e.get().tag) == page).for_each(|e| e.set(NOTHING));
        if self.kind == TlbKind::Sticky {
            self.store.borrow_mut().remove(&page);
        }
        self.links.iter().for_each(|links| links.forget_address(gva));
        let region = region_of(page);
        let (word, bit) = (&self.large[region / 64], 1 << (region % 64));
        if word.get() & bit != 0 && self.rules.keep(Rule::FlushOfLargePage) {
            word.set(word.get() & !bit);
            self.retain(|entry| !(entry.large && region_of(page_of(entry.tag)) == region));
            self.change_version();
        } else if self.code[page as usize % CODE_BITS / 64].get() & 1 << (page % 64) != 0 {
            self.change_version();
        }
    }

    /// Forgets every link to a table, though not what is translated by it.
    pub fn flush_links(&self) {
        self.links.iter().for_each(LinkCache::forget_all);
    }

    /// Forgets everything.
    pub fn flush_all(&self) {
        self.count(|s| s.flushes += 1);
        self.flushed_fills.set(self.stats.get().fills);
        self.retain(|_| false);
        self.flush_links();
        self.large.iter().for_each(|word| word.set(0));
        self.change_version();
    }

    /// Forgets everything but the translations that the guest calls global; the links to their tables too.
    pub fn flush_all_but_global(&self) {
        self.count(|s| s.flushes += 1);
        self.retain(|entry| entry.spte.is_global());
        self.flush_links();
        self.change_version();
    }

    /// Forgets what leads to a frame that is `gone`, as a host does that has taken it away. The links stay.
    pub fn forget_frames(&self, gone: impl Fn(Mfn) -> bool) {
        let pages = |entry: &Entry| if entry.spte.is_large() { PAGES_OF_LARGE } else { 1 };
        self.retain(|entry| !(0..pages(entry)).any(|page| gone(Mfn(entry.spte.mfn().0 + page))));
        self.change_version();
    }

    fn retain(&self, keep: impl Fn(&Entry) -> bool) {
        for (number, word) in self.used.iter().enumerate() {
            let mut rest = word.get();
            while rest != 0 {
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                let set = &self.sets[number * 64 + bit as usize];
                set.iter().filter(|entry| !keep(&entry.get())).for_each(|entry| entry.set(NOTHING));
                if set.iter().all(|entry| entry.get().tag == NO_TAG) {
                    word.set(word.get() & !(1 << bit));
                }
            }
        }
        self.larges.iter().filter(|entry| !keep(&entry.get())).for_each(|entry| entry.set(NOTHING));
        self.store.borrow_mut().retain(|_, entries| {
            entries.retain(&keep);
            !entries.is_empty()
        });
    }

    fn change_version(&self) {
        if !self.rules.keep(Rule::CodeAtFlush) {
            return;
        }
        self.version.set(self.version.get() + 1);
        self.code.iter().for_each(|word| word.set(0));
    }

    /// Code was found in the page of `gva`, and may be found there again without asking, until the version changes.
    fn note_code(&self, gva: Gva) {
        let page = gva.0 >> 12;
        let word = &self.code[page as usize % CODE_BITS / 64];
        word.set(word.get() | 1 << (page % 64));
    }

    #[inline(always)]
    fn set(&self, gva: Gva) -> &[Cell<Entry>; WAYS] {
        &self.sets[set_of(gva)]
    }

    /// The entry of `tag`, moved to the front of its set.
    fn recall(&self, tag: u64, gva: Gva) -> Option<Entry> {
        if self.forgets_now() {
            self.drop_entry(tag, gva);
            return None;
        }
        let set = self.set(gva);
        if let Some(way) = set.iter().position(|entry| entry.get().tag == tag) {
            set[0].swap(&set[way]);
            return Some(set[0].get());
        }
        if self.kind != TlbKind::Sticky {
            return None;
        }
        let found = self.store.borrow().get(&page_of(tag))?.iter().find(|e| e.tag == tag).copied()?;
        self.put_in_set(found, gva);
        Some(found)
    }

    /// The entry of the large page that `gva` is in, under `root`.
    fn recall_large(&self, root: RootRef, gva: Gva) -> Option<Entry> {
        let first = first_of(gva);
        let (tag, place) = (tag_of(root.index, first), self.large_place(first));
        if self.forgets_now() {
            place.set(NOTHING);
            return None;
        }
        if place.get().tag == tag {
            return Some(place.get());
        }
        if self.kind != TlbKind::Sticky {
            return None;
        }
        let key = LARGE_KEY | page_of(tag);
        let found = self.store.borrow().get(&key)?.iter().find(|e| e.tag == tag).copied()?;
        place.set(found);
        Some(found)
    }

    fn large_place(&self, first: Gva) -> &Cell<Entry> {
        &self.larges[(first.0 >> LARGE_BITS) as usize % LARGE_ENTRIES]
    }

    /// Remembers a large leaf under `root`.
    pub(crate) fn learn_large(&self, root: RootRef, gva: Gva, leaf: &LargeLeaf) {
        self.count(|s| s.fills += 1);
        let first = first_of(gva);
        let LargeLeaf { spte, first: gfn, generations, checked } = *leaf;
        let (tag, filled) = (tag_of(root.index, first), self.stats.get().fills as u32);
        let entry = Entry { tag, spte, generations, checked, gfn, filled, large: true };
        let region = region_of(page_of(tag));
        let word = &self.large[region / 64];
        word.set(word.get() | 1 << (region % 64));
        self.large_place(first).set(entry);
        if self.kind == TlbKind::Sticky {
            let mut store = self.store.borrow_mut();
            let entries = store.entry(LARGE_KEY | page_of(tag)).or_default();
            entries.retain(|old| old.tag != tag);
            entries.push(entry);
        }
    }

    /// Lossy: is it time to forget?
    fn forgets_now(&self) -> bool {
        if !matches!(self.kind, TlbKind::Lossy(_)) {
            return false;
        }
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        x.is_multiple_of(LOSS)
    }

    #[inline]
    fn insert(&self, entry: Entry, gva: Gva) {
        self.count(|s| s.fills += 1);
        let entry = Entry { filled: self.stats.get().fills as u32, ..entry };
        if entry.large {
            let region = region_of(gva.0 >> 12);
            let word = &self.large[region / 64];
            word.set(word.get() | 1 << (region % 64));
        }
        self.put_in_set(entry, gva);
        if self.kind == TlbKind::Sticky {
            let mut store = self.store.borrow_mut();
            let entries = store.entry(page_of(entry.tag)).or_default();
            entries.retain(|old| old.tag != entry.tag);
            entries.push(entry);
        }
    }

    /// Remembers what a walk has found, where it allows the access: its frame.
    pub(crate) fn take_entry(&self, entry: Entry, gva: Gva, kind: AccessKind) -> Result<Mfn, Miss> {
        if !entry.spte.allows(kind) {
            return Err(Miss::Fault);
        }
        self.insert(entry, gva);
        Ok(entry.spte.mfn())
    }

    /// Remembers a leaf that has just been made under `root`; `large`: for a part of a large page.
    #[inline]
    pub(crate) fn learn(&self, root: RootRef, gva: Gva, leaf: &Leaf, large: bool) {
        let Leaf { spte, gfn, generations, checked, .. } = *leaf;
        let tag = tag_of(root.index, gva);
        self.insert(Entry { tag, spte, generations, checked, gfn, filled: 0, large }, gva);
    }

    /// Puts it in front, in the place of the one that is the same, or of none; else the last of the set goes.
    #[inline]
    fn put_in_set(&self, mut entry: Entry, gva: Gva) {
        if matches!(self.kind, TlbKind::Lossy(_)) {
            entry.checked = NEVER;
        }
        let number = set_of(gva);
        let word = &self.used[number / 64];
        word.set(word.get() | 1 << (number % 64));
        let set = &self.sets[number];
        let place = |tag| set.iter().position(|e| e.get().tag == tag);
        let last = place(entry.tag).or_else(|| place(NO_TAG)).unwrap_or(WAYS - 1);
        for way in (1..=last).rev() {
            set[way].set(set[way - 1].get());
        }
        set[0].set(entry);
    }

    /// Forgets one entry.
    fn drop_entry(&self, tag: u64, gva: Gva) {
        self.set(gva).iter().filter(|e| e.get().tag == tag).for_each(|e| e.set(NOTHING));
        if let Some(entries) = self.store.borrow_mut().get_mut(&page_of(tag)) {
            entries.retain(|entry| entry.tag != tag);
        }
    }

    #[inline]
    fn count(&self, change: impl FnOnce(&mut TlbStats)) {
        let mut stats = self.stats.get();
        change(&mut stats);
        self.stats.set(stats);
    }
}

impl Mmu {
    /// The frame that `vcpu` reaches for `access` at `gva`, as its TLB or the shadow has it. The vCPU is in the guest.
    ///
    /// # Errors
    ///
    /// [`Miss`]; always [`Miss::Fault`] for a vCPU without a software TLB.
    #[inline(always)]
    pub fn tlb_translate(&self, vcpu: &Vcpu, gva: Gva, access: Access) -> Result<Mfn, Miss> {
        match self.tlb_front(vcpu, vcpu.tlb_tag(access.user), gva, access.kind) {
            Some(mfn) => Ok(mfn),
            None => self.tlb_find(vcpu, gva, access),
        }
    }

    /// [`Mmu::tlb_load`] of an aligned operand by an entry that needs no looking for; `None` where there is none. Calls
    /// nothing. `tag` is [`Vcpu::tlb_tag`] of now. With the `kind` of a store, only where that is allowed too.
    #[inline(always)]
    pub fn tlb_quick_load(
        &self,
        vcpu: &Vcpu,
        tag: u64,
        gva: Gva,
        width: crate::Width,
        kind: AccessKind,
    ) -> Option<u64> {
        let mfn = self.tlb_front(vcpu, tag, gva, kind)?;
        Some(self.hardware.load(mfn.at(gva.offset() & !(width.bytes() - 1)), width))
    }

    /// [`Mmu::tlb_store`] likewise; false where it has not been made, as where code was decoded from the frame.
    #[inline(always)]
    pub fn tlb_quick_store(&self, vcpu: &Vcpu, tag: u64, gva: Gva, width: crate::Width, value: u64) -> bool {
        let Some(mfn) = self.tlb_front(vcpu, tag, gva, AccessKind::Write) else { return false };
        if self.frames.code(mfn) != 0 {
            return false;
        }
        self.hardware.store(mfn.at(gva.offset() & !(width.bytes() - 1)), width, value);
        // Another vCPU may have marked the frame since.
        self.frames.code_written(mfn);
        true
    }

    /// [`Mmu::tlb_update`] likewise, of an aligned word: `new` takes the place of `expected`, else nothing changes. What was there;
    /// `None` where it has not been done. The cache line is fetched once, to be owned.
    #[inline(always)]
    pub fn tlb_quick_compare_exchange(
        &self,
        vcpu: &Vcpu,
        tag: u64,
        gva: Gva,
        expected: u32,
        new: u32,
    ) -> Option<u32> {
        let mfn = self.tlb_front(vcpu, tag, gva, AccessKind::Write)?;
        if self.frames.code(mfn) != 0 {
            return None;
        }
        let word = self.hardware.word32(mfn.at(gva.offset() & !3));
        let old = word.compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire);
        self.frames.code_written(mfn);
        Some(old.unwrap_or_else(|old| old))
    }

    /// The frame by the entry in front of its set, where that is current and allows the access.
    #[inline(always)]
    fn tlb_front(&self, vcpu: &Vcpu, tag: u64, gva: Gva, kind: AccessKind) -> Option<Mfn> {
        let entry = vcpu.tlb.as_ref()?.set(gva)[0].get();
        let current = entry.tag == tag | u64::from(gva.0 >> 12) && entry.checked == self.p2m.advances();
        (current && entry.spte.allows(kind)).then(|| entry.spte.mfn())
    }

    /// The other ways of the set, the store, the generations; then the shadow.
    #[cold]
    #[inline(never)]
    fn tlb_find(&self, vcpu: &Vcpu, gva: Gva, access: Access) -> Result<Mfn, Miss> {
        let Some(tlb) = &vcpu.tlb else { return Err(Miss::Fault) };
        self.reach_by(vcpu, tlb, gva, access)
    }

    /// The frame that `vcpu` reaches for `access` at `gva`, as `tlb` or the shadow has it: its own, or that of a model of the hardware
    /// that runs it. The vCPU is in the guest.
    ///
    /// # Errors
    ///
    /// [`Miss`].
    pub fn reach_by(&self, vcpu: &Vcpu, tlb: &SoftTlb, gva: Gva, access: Access) -> Result<Mfn, Miss> {
        let user = access.user && vcpu.mode.paging;
        let root = vcpu.roots[usize::from(user)].get().ok_or(Miss::Fault)?;
        let (tag, kind) = (tag_of(root.index, gva), access.kind);
        if let Some(mut entry) = tlb.recall(tag, gva)
            && entry.spte.allows(kind)
        {
            let advances = self.p2m.advances();
            if entry.checked != advances && self.check_entry((vcpu, tlb), &entry, gva, kind)? {
                entry.checked = advances;
                tlb.put_in_set(entry, gva);
            }
            return Ok(entry.spte.mfn());
        }
        if let Some(mfn) = self.tlb_recall_large(vcpu, tlb, root, gva, kind)? {
            return Ok(mfn);
        }
        if let Some(links) = &tlb.links {
            let found = self.tlb_find_by_links(vcpu, (tlb, links), root, gva, kind);
            if found == Err(Miss::Fault) {
                links.forget_under(root, gva);
            }
            return found;
        }
        if let Some(mfn) = self.tlb_walk_large(tlb, root, gva, kind)? {
            return Ok(mfn);
        }
        let entry = self.find_link(root, gva).and_then(|link| self.tlb_walk_below(root, link, gva));
        tlb.take_entry(entry.ok_or(Miss::Fault)?, gva, kind)
    }

    /// The same in a large page that the TLB knows; `None` where it knows none there.
    fn tlb_recall_large(
        &self,
        vcpu: &Vcpu,
        tlb: &SoftTlb,
        root: RootRef,
        gva: Gva,
        kind: AccessKind,
    ) -> Result<Option<Mfn>, Miss> {
        if !self.config.blocks {
            return Ok(None);
        }
        if let Some(mut entry) = tlb.recall_large(root, gva)
            && entry.spte.allows(kind)
        {
            let advances = self.p2m.advances();
            if entry.checked != advances && self.check_entry((vcpu, tlb), &entry, gva, kind)? {
                entry.checked = advances;
                tlb.large_place(first_of(gva)).set(entry);
            }
            return Ok(Some(Mfn(entry.spte.mfn().0 + within_large(gva))));
        }
        Ok(None)
    }

    /// The same in a large page that the shadow has.
    pub(crate) fn tlb_walk_large(
        &self,
        tlb: &SoftTlb,
        root: RootRef,
        gva: Gva,
        kind: AccessKind,
    ) -> Result<Option<Mfn>, Miss> {
        if !self.config.blocks {
            return Ok(None);
        }
        let Some(leaf) = self.find_large(root, gva) else { return Ok(None) };
        if !leaf.spte.allows(kind) {
            return Err(Miss::Fault);
        }
        tlb.learn_large(root, gva, &leaf);
        Ok(Some(Mfn(leaf.spte.mfn().0 + within_large(gva))))
    }

    /// INV-TLB-2. A read or a fetch needs the mapping to be of now, a store the right to write too. True when the entry
    /// is good for any access.
    fn check_entry(
        &self,
        at: (&Vcpu, &SoftTlb),
        entry: &Entry,
        gva: Gva,
        kind: AccessKind,
    ) -> Result<bool, Miss> {
        let now = match entry.spte.is_large() {
            true => self.p2m.range_generations(entry.gfn),
            false => self.p2m.generations(entry.gfn),
        };
        let filled = entry.generations;
        let stale = filled.mapping != now.mapping || (kind == AccessKind::Write && filled.write != now.write);
        if !stale {
            return Ok(filled == now);
        }
        let stale = self.report(at, entry, gva, kind, now);
        Err(Miss::Incoherent(Box::new(Violation::Translation(stale))))
    }

    /// All that is known of the flush that was missed.
    #[cold]
    fn report(
        &self,
        (vcpu, tlb): (&Vcpu, &SoftTlb),
        entry: &Entry,
        gva: Gva,
        kind: AccessKind,
        now: Generations,
    ) -> StaleTranslation {
        // Of a large entry, the page of the access.
        let within = if entry.spte.is_large() { within_large(gva) } else { 0 };
        let (gfn, mfn) = (Gfn(entry.gfn.0 + within), Mfn(entry.spte.mfn().0 + within));
        let invalidations = self.records.about(gfn, TRAIL_MAX);
        StaleTranslation {
            vcpu: vcpu.id,
            gva,
            kind,
            gfn,
            spte: entry.spte,
            filled: Filled {
                generations: entry.generations,
                number: entry.filled,
                of: tlb.stats().fills,
                flushed: tlb.flushed_fills(),
            },
            now,
            removed_at: self.frames.debt(mfn),
            flushed_at: self.coherence.flushed(vcpu.id),
            requested: self.coherence.requested(vcpu.id),
            invalidations,
            events: vcpu.events.borrow().trail(gva).take(TRAIL_MAX).collect(),
        }
    }

    /// Walks the shadow as hardware would, from the first-level page that `link` leads to; `None` where it has no leaf.
    pub(crate) fn tlb_walk_below(&self, root: RootRef, link: Spte, gva: Gva) -> Option<Entry> {
        let slot = self.slot_of(link)?;
        let at = self.pages.mfn(slot).at(l1_index(gva) * 8);
        let spte = self.spte(at);
        let gfn = spte.is_present().then(|| self.frames.gfn(spte.mfn())).flatten()?;
        let large = {
            let page = self.pages.lock(slot, false);
            page.key?.role.shape == Shape::Linear
        };
        // INV-TLB-1: an invalidation that advances the generation takes the spte away under this lock first.
        let _bucket = self.buckets.lock(gfn);
        let checked = self.p2m.advances();
        let still = self.spte(at) == spte;
        if still && !spte.is_accessed() {
            self.machine.word64(at).fetch_or(Spte::ACCESSED, Ordering::AcqRel);
        }
        let tag = tag_of(root.index, gva);
        let generations = self.p2m.generations(gfn);
        still.then_some(Entry { tag, spte, generations, checked, gfn, filled: 0, large })
    }

    /// Into the guest: marks the vCPU as inside and makes the flush that is owed, if one is. Says whether there was one.
    pub fn tlb_enter(&self, vcpu: &Vcpu) -> bool {
        let owed = self.enter(vcpu);
        if owed {
            let epoch = self.coherence.begin_flush();
            if let Some(tlb) = &vcpu.tlb
                && self.rules.keep(Rule::FlushAtEntry)
            {
                tlb.flush_all();
            }
            self.coherence.end_flush(vcpu.id, epoch);
        }
        owed
    }

    /// What the guest's own flush of everything (`all`), or of all but global pages, asks of a software TLB. Nothing
    /// where nothing was removed since the last one.
    pub(crate) fn tlb_flush_if_owed(&self, vcpu: &Vcpu, all: bool) {
        let Some(tlb) = &vcpu.tlb else { return };
        let since = tlb.local_flush.get().max(self.coherence.flushed(vcpu.id));
        if !all && !self.coherence.removed_since(since) {
            return;
        }
        if !self.rules.keep(if all { Rule::FlushAtModeChange } else { Rule::FlushAtCr3 }) {
            return;
        }
        tlb.local_flush.set(self.coherence.begin_flush());
        if all || !vcpu.mode.global_pages {
            tlb.flush_all();
        } else {
            tlb.flush_all_but_global();
        }
    }

    /// Marks the frame behind `gva` as one that decoded code was made from, for code of privilege `user`. Read the code after
    /// that: whoever stores to the frame looks for the mark behind its store, with no fence of its own.
    ///
    /// ```text
    /// vCPU that decodes                       vCPU that stores
    /// mark                                    store
    /// all threads: a barrier (settle_stores)  mark? then it is taken off
    /// read the code
    /// ```
    ///
    /// A store that misses the mark has left its CPU by the end of the barrier, and is read. Who finds a mark whose barrier has not
    /// ended makes one too.
    ///
    /// # Errors
    ///
    /// As [`Mmu::tlb_translate`].
    pub fn code_frame(&self, vcpu: &Vcpu, gva: Gva, user: bool) -> Result<CodeFrame, Miss> {
        let mfn = self.tlb_translate(vcpu, gva, Access::execute(user))?;
        vcpu.tlb.iter().for_each(|tlb| tlb.note_code(gva));
        let generation = self.frames.generation_to_decode(mfn, || {
            if self.rules.keep(Rule::BarrierAtMark) {
                self.coherence.settle_stores();
            }
        });
        Ok(CodeFrame { mfn, generation })
    }

    /// The code generation of a frame now; 0 when its contents changed since it was last marked. A frame that is not of
    /// the machine has none.
    #[inline]
    pub fn code_generation(&self, mfn: Mfn) -> u32 {
        self.frames.code(mfn)
    }

    /// A number that changes whenever a translation of this vCPU's may have changed: what was learnt by linear address
    /// before is void.
    #[inline]
    pub fn tlb_version(&self, vcpu: &Vcpu) -> u64 {
        let version = vcpu.tlb.as_ref().map_or(0, |tlb| tlb.version.get());
        version.wrapping_add(self.p2m.advances())
    }

    /// Loads `width` bytes, zero-extended, through the TLB. The access lies within a page.
    ///
    /// # Errors
    ///
    /// As [`Mmu::tlb_translate`].
    #[inline(always)]
    pub fn tlb_load(&self, vcpu: &Vcpu, gva: Gva, width: crate::Width, user: bool) -> Result<u64, Miss> {
        let mfn = self.tlb_translate(vcpu, gva, Access::read(user))?;
        Ok(self.hardware.load(mfn.at(gva.offset()), width))
    }

    /// Stores the low `width` bytes of `value` through the TLB. The access lies within a page.
    ///
    /// # Errors
    ///
    /// As [`Mmu::tlb_translate`]; nothing is stored then.
    #[inline(always)]
    pub fn tlb_store(
        &self,
        vcpu: &Vcpu,
        gva: Gva,
        width: crate::Width,
        value: u64,
        user: bool,
    ) -> Result<(), Miss> {
        let mfn = self.tlb_translate(vcpu, gva, Access::write(user))?;
        self.hardware.store(mfn.at(gva.offset()), width, value);
        self.frames.code_written(mfn);
        Ok(())
    }

    /// Replaces the `width` bytes at `gva` by `change` of them, atomically where they lie within an aligned 8-byte word,
    /// and returns the old ones. `change` may run more than once. The access lies within a page.
    ///
    /// # Errors
    ///
    /// As [`Mmu::tlb_translate`]; nothing is stored then.
    #[inline]
    pub fn tlb_update(
        &self,
        vcpu: &Vcpu,
        gva: Gva,
        width: crate::Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Miss> {
        let mfn = self.tlb_translate(vcpu, gva, Access::write(user))?;
        let old = self.hardware.update(mfn.at(gva.offset()), width, change);
        self.frames.code_written(mfn);
        Ok(old)
    }

    /// Stores `count` copies of the low `width` bytes of `value` from `gva` on, all within a page, through the TLB.
    ///
    /// # Errors
    ///
    /// As [`Mmu::tlb_translate`]; nothing is stored then.
    pub fn tlb_fill(
        &self,
        vcpu: &Vcpu,
        gva: Gva,
        width: crate::Width,
        value: u64,
        count: u32,
        user: bool,
    ) -> Result<(), Miss> {
        let mfn = self.tlb_translate(vcpu, gva, Access::write(user))?;
        let (at, length) = (mfn.at(gva.offset()), count as usize * width.bytes() as usize);
        // A word of copies, and a page of words: the bytes begin anew with each copy.
        match (value & width.mask()).wrapping_mul(u64::MAX / width.mask()) {
            0 => self.hardware.write(at, &ZEROS[..length]),
            word => {
                let page = [word.to_le_bytes(); PAGE_SIZE as usize / 8];
                self.hardware.write(at, &page.as_flattened()[..length]);
            }
        }
        self.frames.code_written(mfn);
        Ok(())
    }

    /// Copies `length` bytes, each range within a page, through the TLB. False, and nothing is copied, where the two
    /// overlap in memory.
    ///
    /// # Errors
    ///
    /// As [`Mmu::tlb_translate`]; nothing is stored then.
    pub fn tlb_copy(&self, vcpu: &Vcpu, from: Gva, to: Gva, length: u32, user: bool) -> Result<bool, Miss> {
        let source = self.tlb_translate(vcpu, from, Access::read(user))?.at(from.offset());
        let mfn = self.tlb_translate(vcpu, to, Access::write(user))?;
        let target = mfn.at(to.offset());
        if source.0.abs_diff(target.0) < length.into() {
            return Ok(false);
        }
        let mut page = [0; PAGE_SIZE as usize];
        let copied = &mut page[..length as usize];
        self.hardware.read(source, copied);
        self.hardware.write(target, copied);
        self.frames.code_written(mfn);
        Ok(true)
    }

    /// Copies instruction bytes at `gva` out, as many as `buffer` and the page hold; returns how many.
    ///
    /// # Errors
    ///
    /// As [`Mmu::tlb_translate`].
    pub fn tlb_fetch(&self, vcpu: &Vcpu, gva: Gva, user: bool, buffer: &mut [u8]) -> Result<usize, Miss> {
        let mfn = self.tlb_translate(vcpu, gva, Access::execute(user))?;
        let here = buffer.len().min((4096 - gva.offset()) as usize);
        self.hardware.read(mfn.at(gva.offset()), &mut buffer[..here]);
        Ok(here)
    }
}

#[cfg(test)]
#[path = "tlb_tests.rs"]
mod tests;
