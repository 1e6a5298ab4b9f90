//! Shadow pages: their slots, the cache that finds them by key, and their limit.
//!
//! Story: a slot owns one machine frame and serves one shadow page after another. The cache, in shards by guest
//! frame, finds the page of a key and all pages of a guest table.
//!
//! Holds: INV-SHADOW-1, at most one live page per key, and it is in the cache. INV-SHADOW-2, a page's `parents`
//! are exactly the entries that link to it; an entry that links to a page changes only under *that page's* lock.
//! INV-SHADOW-3, a free slot's table is all zeros and is handed out again only when the ledger covers its death;
//! its life advances then (INV-TLB-3, link_cache). INV-SHADOW-5, an entry is read with its page, its shard or the bucket of
//! its leaf locked, all of which its death needs, or by a vCPU inside the guest, which the ledger waits for: else its frame
//! may have been given back.
//!
//! Locks: shard -> page (parent before child) -> bucket. A page's lock guards its key, its parents and who may
//! store into its entries; the entries themselves are atomics, since zaps come from the reverse map.
//!
//! Limits: the number of slots is fixed at start; over it the least recently used pages go, a sixteenth at once.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use crate::addr::{Gfn, Mfn, Mpa};
use crate::lock_order::{self, Level};
use crate::shadow::role::{Key, Role};
use crate::sync::{AtomicU32, AtomicU64, Guard, Lock, Ordering};

/// Loom looks at every one.
const SHARDS: usize = if cfg!(loom) { 2 } else { 64 };
const NO_FRAME: u32 = u32::MAX;

/// What a slot's lock guards.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// What the page shadows; `None` while the slot is free or the page is not ready.
    pub key: Option<Key>,
    /// Addresses of the entries that link here.
    pub parents: Vec<Mpa>,
    /// Emulated stores to the guest table since it was last used for a link.
    pub writes: u32,
}

#[derive(Debug)]
pub(crate) struct Slot {
    frame: AtomicU32,
    used: AtomicU64,
    /// How often its table has begun to serve anew, or its frame was given back.
    life: AtomicU64,
    page: Lock<Page>,
}

#[derive(Debug)]
struct FreeSlots {
    /// Slots without a frame yet.
    fresh: Vec<u32>,
    /// Slots of dead pages and the stamp of their death.
    dead: VecDeque<(u32, u64)>,
}

/// The pages of one guest table.
pub(crate) type Shard = FxHashMap<Gfn, Vec<(Role, u32)>>;

/// All slots, and the cache over them.
#[derive(Debug)]
pub(crate) struct Pages {
    slots: Box<[Slot]>,
    shards: Box<[Lock<Shard>]>,
    free: Lock<FreeSlots>,
    tick: AtomicU64,
    /// Slots that may have a frame; fewer than there are where the machine has few.
    limit: AtomicU32,
    /// Slots that have one.
    framed: AtomicU32,
    /// Pages for user code, being made or live, by [`user_place`].
    user: [AtomicU32; SHARDS],
}

/// The place in the lock order of a page, by whether it is a directory.
pub(crate) fn level(directory: bool) -> Level {
    if directory { lock_order::SHADOW_L2 } else { lock_order::SHADOW_L1 }
}

impl Pages {
    pub fn new(max: u32) -> Pages {
        let slot = |_| Slot {
            frame: AtomicU32::new(NO_FRAME),
            used: AtomicU64::new(0),
            life: AtomicU64::new(0),
            page: Lock::new(lock_order::SHADOW_L1, Page::default()),
        };
        let shard = |_| Lock::new(lock_order::SHADOW_CACHE, Shard::default());
        Pages {
            slots: (0..max).map(slot).collect(),
            shards: (0..SHARDS).map(shard).collect(),
            free: Lock::new(
                lock_order::SHADOW_FREE,
                FreeSlots { fresh: (0..max).rev().collect(), dead: VecDeque::new() },
            ),
            tick: AtomicU64::new(1),
            limit: AtomicU32::new(max),
            framed: AtomicU32::new(0),
            user: std::array::from_fn(|_| AtomicU32::new(0)),
        }
    }

    /// The most pages there can be.
    pub fn max(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Pages in use, dead ones that wait for a flush included.
    pub fn in_use(&self) -> u32 {
        let free = self.free.lock();
        self.max() - free.fresh.len() as u32 - free.dead.len() as u32
    }

    /// True while there is no page of `key`, which is for user code. False may also be for another's sake.
    pub fn has_no_user(&self, key: Key) -> bool {
        self.user[user_place(key)].load(Ordering::SeqCst) == 0
    }

    /// A page of `key` is about to be entered into the cache.
    pub fn count_in(&self, key: Key) {
        self.user[user_place(key)].fetch_add(u32::from(key.role.user), Ordering::SeqCst);
    }

    /// And has left it.
    pub fn count_out(&self, key: Key) {
        self.user[user_place(key)].fetch_sub(u32::from(key.role.user), Ordering::SeqCst);
    }

    /// Locks the page in `slot`, at the level of a directory or of a table.
    #[inline]
    pub fn lock(&self, slot: u32, directory: bool) -> Guard<'_, Page> {
        self.slots[slot as usize].page.lock_as(level(directory))
    }

    /// The frame of the table in `slot`. Meaningful once the slot was taken.
    #[inline]
    pub fn mfn(&self, slot: u32) -> Mfn {
        Mfn(self.slots[slot as usize].frame.load(Ordering::Acquire))
    }

    /// Gives a fresh slot its frame.
    pub fn set_mfn(&self, slot: u32, mfn: Mfn) {
        self.slots[slot as usize].frame.store(mfn.0, Ordering::Release);
        self.framed.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the frame of a slot that was taken off the free list: it is a fresh one again.
    pub fn take_mfn(&self, slot: u32) -> Mfn {
        self.framed.fetch_sub(1, Ordering::Relaxed);
        Mfn(self.slots[slot as usize].frame.swap(NO_FRAME, Ordering::AcqRel))
    }

    /// Which life of its table a slot is in. It changes only when the ledger covers the death of its last page.
    #[inline]
    pub fn life(&self, slot: u32) -> u64 {
        self.slots[slot as usize].life.load(Ordering::Acquire)
    }

    /// The table in a slot that was taken off the free list is about to serve again, or to lose its frame.
    pub fn begin_life(&self, slot: u32) {
        self.slots[slot as usize].life.fetch_add(1, Ordering::AcqRel);
    }

    /// Sets how many slots may have a frame, at least [`crate::SHADOW_PAGES_MIN`].
    pub fn set_limit(&self, limit: u32) {
        self.limit.store(limit.clamp(crate::SHADOW_PAGES_MIN, self.max()), Ordering::Relaxed);
    }

    /// How many slots have a frame that should not.
    pub fn over_limit(&self) -> u32 {
        self.framed.load(Ordering::Relaxed).saturating_sub(self.limit.load(Ordering::Relaxed))
    }

    /// Notes that the page was used now.
    #[inline]
    pub fn touch(&self, slot: u32) {
        let now = self.tick.load(Ordering::Relaxed);
        let used = &self.slots[slot as usize].used;
        if used.load(Ordering::Relaxed) != now {
            used.store(now, Ordering::Relaxed);
        }
    }

    /// Moves the clock of [`Pages::touch`] on: called when a page is made, so "recent" is counted in pages.
    pub fn advance_tick(&self) {
        self.tick.fetch_add(1, Ordering::Relaxed);
    }

    /// Locks the shard that has the pages of `gfn`.
    pub fn shard(&self, gfn: Gfn) -> Guard<'_, Shard> {
        self.shards[gfn.0 as usize % SHARDS].lock()
    }

    /// Takes a slot that has no frame yet, if one more may have one.
    pub fn take_fresh(&self) -> Option<u32> {
        let full = self.framed.load(Ordering::Relaxed) >= self.limit.load(Ordering::Relaxed);
        if full { None } else { self.free.lock().fresh.pop() }
    }

    /// Takes back a slot for which no frame could be had.
    pub fn put_fresh(&self, slot: u32) {
        self.free.lock().fresh.push(slot);
    }

    /// Takes the slot of the page that has been dead for longest, with the stamp of its death.
    pub fn take_dead(&self) -> Option<(u32, u64)> {
        self.free.lock().dead.pop_front()
    }

    /// Slots of dead pages; for audits.
    pub fn dead(&self) -> Vec<u32> {
        self.free.lock().dead.iter().map(|(slot, _)| *slot).collect()
    }

    /// Puts a slot (with a frame) on the free list; `stamp` is the death of its last page, 0 for none.
    pub fn put_free(&self, slot: u32, stamp: u64) {
        self.free.lock().dead.push_back((slot, stamp));
    }

    /// Every slot with a frame, the least recently used first; dead ones too.
    pub fn by_age(&self) -> Vec<u32> {
        let mut live: Vec<(u64, u32)> = (0..self.max())
            .filter(|slot| self.slots[*slot as usize].frame.load(Ordering::Relaxed) != NO_FRAME)
            .map(|slot| (self.slots[slot as usize].used.load(Ordering::Relaxed), slot))
            .collect();
        live.sort_unstable();
        live.into_iter().map(|(_, slot)| slot).collect()
    }

    /// Every live page, as (slot, key); for audits and eviction.
    pub fn live(&self) -> Vec<(u32, Key)> {
        let mut all = Vec::new();
        for shard in self.shards.iter() {
            let shard = shard.lock();
            for (gfn, pages) in shard.iter() {
                all.extend(pages.iter().map(|(role, slot)| (*slot, Key { gfn: *gfn, role: *role })));
            }
        }
        all
    }
}

/// Which count of pages for user code a key is part of: parts of one directory have their own.
fn user_place(key: Key) -> usize {
    (key.gfn.0 as usize + usize::from(key.role.quadrant) * (SHARDS / 4 + 1)) % SHARDS
}

/// The slot of `key` in its shard.
pub(crate) fn find(shard: &Shard, key: Key) -> Option<u32> {
    let pages = shard.get(&key.gfn)?;
    pages.iter().find(|(role, _)| *role == key.role).map(|(_, slot)| *slot)
}
