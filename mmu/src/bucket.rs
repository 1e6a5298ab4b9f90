//! Buckets: the reverse map gfn -> sptes, and the gates in front of it. The place of truth.
//!
//! Story: a fill links its spte here, an invalidation finds them here. Both work under bucket(gfn), so that one
//! of them sees the other:
//!
//! ```text
//! vCPU (fill)                           invalidation of gfn
//! seen := sequence
//! walk the guest's tables
//!                                       close: in_progress += 1
//! lock bucket(gfn)                      lock bucket(gfn), zap every link, unlock
//!   gate closed, or closed_at > seen?   shoot down, finish
//!     yes: retry (sleep after a while)  open: closed_at := ++sequence, in_progress -= 1
//!     no:  store spte, link
//! unlock
//! ```
//!
//! Holds: INV-RMAP-1, a leaf spte is present if and only if it is linked once on its gfn; both change only under
//! bucket(gfn). INV-GATE-1, while a gate is closed no spte of its gfns is made.
//!
//! Whoever meets a closed gate sleeps at it ([`Buckets::wait`]). A fill that has met it too often in a row says so
//! ([`Buckets::starve`]): who can do without the page then leaves it alone, and who cannot waits a while for that fill first.
//!
//! Limits: several gfns share a bucket and its gate when there are more than [`BUCKETS_MAX`] of them: a closed
//! gate then makes a neighbour wait, which costs time and never correctness.

use crate::addr::{Gfn, Mpa};
use crate::lock_order;
use crate::rules::{Rule, Rules};
use crate::sync::{AtomicU32, AtomicU64, Guard, Lock, Monitor, Ordering, Thing, Wait, spin_until};
use crate::sync::{holds, lets_go};

/// The most buckets of one guest.
pub const BUCKETS_MAX: u32 = 1 << 16;

/// The fewest. Loom looks at every one, and a model needs no more than this.
const BUCKETS_MIN: u32 = if cfg!(loom) { 1 } else { 64 };

/// A leaf spte that maps `gfn`: where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The guest frame it maps.
    pub gfn: Gfn,
    /// The word's number in machine memory (its address over 8).
    word: u32,
}

impl Link {
    /// A link to the spte at `spte`.
    pub fn new(gfn: Gfn, spte: Mpa) -> Link {
        Link { gfn, word: (spte.0 / 8) as u32 }
    }

    /// Where the spte is.
    pub fn spte(&self) -> Mpa {
        Mpa(u64::from(self.word) * 8)
    }
}

/// On a line of the cache for itself, for the same reason as [`Traffic`].
#[derive(Debug)]
#[repr(align(64))]
struct Bucket {
    links: Lock<Vec<Link>>,
    /// Closings that were not opened yet, in the low bits; above them the highest sequence that it was opened with. While it
    /// is closed no fill looks at the latter, and sleepers see by it that it was opened meanwhile.
    gate: AtomicU64,
}

/// Who asks that a page be left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A fill of this vCPU, which has met a gate closed too often. It asks for that gate, whose page ever it is closed for.
    Fill(u32),
    /// Whoever has the turn ([`crate::pool`]): for pages, and their neighbours are no matter.
    Turn,
}

/// The part of a gate that counts closings: each thread has a few batches' worth at most.
const CLOSINGS: u64 = (1 << CLOSINGS_BITS) - 1;
const CLOSINGS_BITS: u32 = 16;

/// All buckets of a guest.
#[derive(Debug)]
pub struct Buckets {
    buckets: Box<[Bucket]>,
    mask: u32,
    /// What is asked for, and how much that is.
    asked: Lock<Vec<(Asker, Gfn)>>,
    asking: AtomicU32,
    traffic: Traffic,
    sleepers: Monitor<()>,
    rules: Rules,
}

/// What every invalidation writes and every fill reads: on a line of the cache for itself, so that one of them is all that goes
/// to and fro.
#[derive(Debug)]
#[repr(align(64))]
struct Traffic {
    sequence: AtomicU64,
    /// Calls of [`Buckets::close_all`] that were not followed by their [`Buckets::open_all`] yet.
    closings: AtomicU32,
    /// Threads that sleep at a gate, or are about to.
    waiting: AtomicU32,
}

/// What a fill read before its walk; the gate compares it in the critical section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence(u64);

/// Proof that bucket(gfn) is held.
pub struct BucketGuard<'a> {
    bucket: &'a Bucket,
    links: Guard<'a, Vec<Link>>,
}

impl Buckets {
    /// Buckets for a guest of `pages` pages: one for sixteen, whose links take two lines of a cache.
    pub fn new(pages: u32) -> Buckets {
        Buckets::of((pages / 16).next_power_of_two().clamp(BUCKETS_MIN, BUCKETS_MAX))
    }

    /// One bucket for all pages: every fill and every invalidation waits for every other.
    pub fn one() -> Buckets {
        Buckets::of(1)
    }

    fn of(count: u32) -> Buckets {
        let bucket = |_| Bucket { links: Lock::new(lock_order::BUCKET, Vec::new()), gate: AtomicU64::new(0) };
        Buckets {
            buckets: (0..count).map(bucket).collect(),
            mask: count - 1,
            asked: Lock::new(lock_order::ASKED, Vec::new()),
            asking: AtomicU32::new(0),
            traffic: Traffic {
                sequence: AtomicU64::new(1),
                closings: AtomicU32::new(0),
                waiting: AtomicU32::new(0),
            },
            sleepers: Monitor::new(lock_order::SLEEPERS, ()),
            rules: Rules::default(),
        }
    }

    pub(crate) fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// The gates' sequence: to be read before the walk that leads to a fill.
    #[inline]
    pub fn sequence(&self) -> Sequence {
        Sequence(self.traffic.sequence.load(Ordering::Acquire))
    }

    /// Takes bucket(gfn).
    #[inline]
    pub fn lock(&self, gfn: Gfn) -> BucketGuard<'_> {
        let bucket = self.bucket(gfn);
        BucketGuard { bucket, links: bucket.links.lock() }
    }

    /// Closes the gate of `gfn`. Begins may overlap: each needs its own [`Buckets::open`].
    pub fn close(&self, gfn: Gfn) {
        self.close_all(&[gfn]);
    }

    /// Closes the gates of `gfns`, each as often as it comes.
    pub fn close_all(&self, gfns: &[Gfn]) {
        self.traffic.closings.fetch_add(1, Ordering::Relaxed);
        for gfn in gfns {
            self.bucket(*gfn).gate.fetch_add(1, Ordering::SeqCst);
        }
        holds(gfns.iter().map(|gfn| self.gate(*gfn)));
    }

    /// The gate of `gfn`, for who waits for it: by its bucket's number.
    fn gate(&self, gfn: Gfn) -> Thing {
        Thing::held("gate", Some(self.place(gfn) as u32), self.bucket(gfn))
    }

    /// Ends one closing of the gate of `gfn`. What was found behind it is no good any more than what was found before:
    /// the gate counts as closed until now.
    pub fn open(&self, gfn: Gfn) {
        self.open_all(&[gfn]);
    }

    /// True while any gate is closed: somebody has pages in hand, and will have done with them.
    pub(crate) fn is_any_closed(&self) -> bool {
        self.traffic.closings.load(Ordering::Relaxed) > 0
    }

    /// Ends one closing of each of the `gfns` of a [`Buckets::close_all`], and wakes who sleeps at them.
    pub fn open_all(&self, gfns: &[Gfn]) {
        lets_go(gfns.iter().map(|gfn| self.gate(*gfn)));
        let now = self.traffic.sequence.fetch_add(1, Ordering::SeqCst) + 1;
        for gfn in gfns {
            self.bucket(*gfn).open(now, *gfn);
        }
        self.traffic.closings.fetch_sub(1, Ordering::Relaxed);
        // Opened, then looked for sleepers; they are counted, then look at the gate.
        if self.traffic.waiting.load(Ordering::SeqCst) > 0 && self.rules.keep(Rule::WakeAtOpen) {
            drop(self.sleepers.lock());
            self.sleepers.notify_all();
        }
    }

    /// Sleeps until the gate of `gfn` is open or has been opened since, once, of however many closings: who comes too late
    /// for a moment between two of them would else sleep on, and not even notice that it starves. False where it has not slept,
    /// since the gate was soon open.
    pub fn wait(&self, gfn: Gfn) -> bool {
        lock_order::assert_may_sleep();
        let bucket = self.bucket(gfn);
        let before = bucket.opened();
        let is_shut = || bucket.is_closed() && bucket.opened() == before;
        // Without a sleeper, nobody pays for waking one; a page that is not written out is soon done with.
        if spin_until(|| !is_shut()) {
            return false;
        }
        self.traffic.waiting.fetch_add(1, Ordering::SeqCst);
        let mut sleepers = self.sleepers.lock();
        while is_shut() {
            sleepers = sleepers.wait(Wait::from("a gate").of(self.gate(gfn)));
        }
        drop(sleepers);
        self.traffic.waiting.fetch_sub(1, Ordering::SeqCst);
        true
    }

    /// Asks that `gfn` be left alone until [`Buckets::fed`]: by all who can do without it, and for a while by all others.
    pub fn starve(&self, asker: Asker, gfn: Gfn) {
        let mut asked = self.asked.lock();
        asked.push((asker, gfn));
        self.asking.store(asked.len() as u32, Ordering::SeqCst);
    }

    /// It does not ask for `gfn` any more.
    pub fn fed(&self, asker: Asker, gfn: Gfn) {
        let mut asked = self.asked.lock();
        let at = asked.iter().position(|one| *one == (asker, gfn));
        debug_assert!(at.is_some(), "INV-GATE-3: {asker:?} did not ask for {gfn}");
        if let Some(at) = at {
            asked.swap_remove(at);
        }
        self.asking.store(asked.len() as u32, Ordering::SeqCst);
    }

    /// True while somebody asks that `gfn` be left alone.
    pub fn is_starving(&self, gfn: Gfn) -> bool {
        self.is_starving_beside(None, gfn)
    }

    /// The same, of anybody but the vCPU `own`.
    pub(crate) fn is_starving_beside(&self, own: Option<u32>, gfn: Gfn) -> bool {
        if self.asking.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let asks = |(asker, other): &(Asker, Gfn)| match *asker {
            Asker::Fill(vcpu) => own != Some(vcpu) && self.place(*other) == self.place(gfn),
            Asker::Turn => *other == gfn,
        };
        self.asked.lock().iter().any(asks)
    }

    /// True while an invalidation of `gfn` (or of a gfn that shares its bucket) is under way.
    pub fn is_closed(&self, gfn: Gfn) -> bool {
        self.bucket(gfn).is_closed()
    }

    /// Calls `visit` for every link there is; for audits, with nothing else running.
    pub fn for_each_link(&self, mut visit: impl FnMut(Link)) {
        for bucket in self.buckets.iter() {
            bucket.links.lock().iter().copied().for_each(&mut visit);
        }
    }

    /// True when `link` would be found in the bucket of its gfn (audits).
    pub fn is_home(&self, link: Link) -> bool {
        self.lock(link.gfn).links.contains(&link)
    }

    #[inline]
    fn bucket(&self, gfn: Gfn) -> &Bucket {
        &self.buckets[self.place(gfn)]
    }

    #[inline]
    fn place(&self, gfn: Gfn) -> usize {
        // Neighbours stay neighbours; frames that are a power of two apart do not meet in one bucket.
        let mixed = gfn.0 ^ (gfn.0 >> 12).wrapping_mul(0x9e5);
        (mixed & self.mask) as usize
    }
}

impl Bucket {
    #[inline]
    fn is_closed(&self) -> bool {
        self.gate.load(Ordering::SeqCst) & CLOSINGS != 0
    }

    /// The highest sequence that it was opened with: of two that open at once, the later may leave it as it is.
    fn opened(&self) -> u64 {
        self.gate.load(Ordering::SeqCst) >> CLOSINGS_BITS
    }

    #[inline]
    fn admits(&self, seen: Sequence) -> bool {
        let gate = self.gate.load(Ordering::SeqCst);
        gate & CLOSINGS == 0 && gate >> CLOSINGS_BITS <= seen.0
    }

    /// Ends one closing: walks that began before `now` are too old.
    #[inline]
    fn open(&self, now: u64, gfn: Gfn) {
        let mut old = self.gate.load(Ordering::Relaxed);
        loop {
            debug_assert!(old & CLOSINGS > 0, "INV-GATE-2: {gfn}'s gate opened more often than closed");
            let new = (old >> CLOSINGS_BITS).max(now) << CLOSINGS_BITS | (old & CLOSINGS).saturating_sub(1);
            match self.gate.compare_exchange_weak(old, new, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => old = now,
            }
        }
    }
}

impl BucketGuard<'_> {
    /// True when a mapping may be made by a fill that read `seen` before its walk.
    #[inline]
    pub fn admits(&self, seen: Sequence) -> bool {
        self.bucket.admits(seen)
    }

    /// True while an invalidation is under way.
    pub fn is_closed(&self) -> bool {
        self.bucket.is_closed()
    }

    /// Links an spte. The caller stores it present in this same critical section.
    #[inline]
    pub fn link(&mut self, link: Link) {
        debug_assert!(!self.links.contains(&link), "INV-RMAP-1: {link:?} linked twice");
        self.links.push(link);
    }

    /// Takes a link off. The caller has cleared the spte in this same critical section.
    #[inline]
    pub fn unlink(&mut self, link: Link) {
        let at = self.links.iter().rposition(|l| *l == link);
        debug_assert!(at.is_some(), "INV-RMAP-1: {link:?} was present and not linked");
        if let Some(at) = at {
            self.links.swap_remove(at);
        }
    }

    /// The links of `gfn`.
    pub fn links_of(&self, gfn: Gfn) -> impl Iterator<Item = Link> {
        self.links.iter().copied().filter(move |l| l.gfn == gfn)
    }

    /// Takes all links of `gfn` off, calling `zap` for each.
    pub fn unlink_all(&mut self, gfn: Gfn, mut zap: impl FnMut(Link)) {
        self.links.retain(|link| {
            if link.gfn == gfn {
                zap(*link);
            }
            link.gfn != gfn
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_admits_only_what_began_after_it_last_closed() {
        let buckets = Buckets::new(1024);
        let early = buckets.sequence();
        assert!(buckets.lock(Gfn(5)).admits(early));
        buckets.close(Gfn(5));
        let behind = buckets.sequence();
        assert!(!buckets.lock(Gfn(5)).admits(behind), "closed: nobody");
        buckets.open(Gfn(5));
        assert!(
            !buckets.lock(Gfn(5)).admits(behind),
            "walked while it was closed: what it found may be gone"
        );
        assert!(!buckets.lock(Gfn(5)).admits(early), "walked before the gate closed: not any more");
        assert!(buckets.lock(Gfn(5)).admits(buckets.sequence()));
        assert!(buckets.lock(Gfn(6)).admits(early), "other gates are not concerned");
    }

    #[test]
    fn overlapping_closings_nest() {
        let buckets = Buckets::new(1024);
        buckets.close(Gfn(1));
        buckets.close(Gfn(1));
        buckets.open(Gfn(1));
        assert!(buckets.is_closed(Gfn(1)));
        buckets.open(Gfn(1));
        assert!(!buckets.is_closed(Gfn(1)));
    }

    #[test]
    fn a_sleeper_goes_on_once_the_gate_was_opened_though_it_is_closed_still() {
        let buckets = &Buckets::new(1024);
        buckets.close(Gfn(1));
        std::thread::scope(|scope| {
            let (tell, told) = std::sync::mpsc::channel();
            scope.spawn(move || {
                buckets.wait(Gfn(1));
                tell.send(()).expect("somebody listens");
            });
            while buckets.traffic.waiting.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            buckets.close(Gfn(1));
            buckets.open(Gfn(1));
            let heard = told.recv_timeout(std::time::Duration::from_secs(10));
            let still = buckets.is_closed(Gfn(1));
            buckets.open(Gfn(1));
            assert!(heard.is_ok() && still, "{heard:?}, closed: {still}");
        });
    }

    #[test]
    fn unlink_all_takes_only_the_gfn_asked_for() {
        let buckets = Buckets::new(4);
        let (a, b) = (Gfn(1), Gfn(65));
        let mut guard = buckets.lock(a);
        for n in 0..4 {
            guard.link(Link::new(a, Mpa(n * 8)));
            guard.link(Link::new(b, Mpa(4096 + n * 8)));
        }
        let mut zapped = 0;
        guard.unlink_all(a, |_| zapped += 1);
        assert_eq!((zapped, guard.links_of(a).count(), guard.links_of(b).count()), (4, 0, 4));
    }
}

#[cfg(all(test, loom))]
#[path = "interleave/bucket.rs"]
mod interleave;
