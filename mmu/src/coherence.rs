//! TLB coherence: flush epochs, TLB debt and the ack ledger.
//!
//! Story: an spte is often removed without a flush, rightly, because the guest owes one; the TLBs may hold it
//! on. So each removal is stamped with the flush clock, and whoever hands a frame on asks the ledger whether
//! every vCPU has flushed since. Only a flush epoch excuses a vCPU, never the fact that its root is not loaded
//! or that the rmap is empty today.
//!
//! ```text
//! remover                              vCPU
//! removing++                           epoch := ++clock          (begin_flush)
//! spte := 0                            the hardware flush
//! last removal max= clock + 1          flushed := epoch          (end_flush)
//! stamp := clock, removing--
//! debt(frame) max= stamp
//!
//! covered(stamp)  <=>  every vCPU: flushed > stamp, or it has a request > stamp and is, or was once seen, outside
//! owes(vCPU)      <=>  removing > 0, or last removal > flushed
//! ```
//!
//! Where a vCPU is, its mode word says. Each side stores before it loads, so that one of them sees the other:
//!
//! ```text
//! vCPU                                      whoever shoots down
//! outside      at VMM code                  spte := 0; stamp
//! in guest     mode := in guest             request := clock + 1
//!              request > flushed? flush     mode = outside? it flushes before it runs: answered
//!              guest code                   mode = in guest? kick; wait for flushed > stamp, or for outside
//! (exiting)    the kick, or any exit: no guest code runs from here on, and the word still says in guest
//! outside      mode := outside
//!              request > flushed? seen := request - 1: answered, though nobody looked
//! ```
//!
//! The order of the two loads of whoever shoots down matters too, see `VcpuFlush::covers`. `interleave/coherence.rs` has loom try
//! all of this, and twins of each order that is wrong.
//!
//! The clock and `removing` are one word (`Clock`), and each line with either of them is one atomic change of it: a removal
//! stamped `s` was stamped, and its spte stored, before any flush took an epoch above `s`: the flush covers it. One stamped
//! later is not covered, whatever the true order was. Should the clock move on between the last two lines of a remover, it
//! begins the first of them again.
//!
//! A guest's INVLPG that finds its spte gone, by a removal of Umbra's own that is not stamped yet, owes the flush
//! all the same: hence `removing`.
//!
//! Holds: INV-COH-1, nothing is reused unless its stamp is covered. Each vCPU's `flushed` only rises.
//!
//! Locks: none taken, [`lock_order::REMOVALS`] aside. [`Coherence::shoot_down`] may sleep.

use crate::addr::Mfn;
use crate::invalidation::Held;
use crate::lock_order;
use crate::rules::{Rule, Rules};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Having, Lock, Ordering, Thing, Wait};
use crate::sync::{point, raise, spin_until, thread};

/// The most pages that are flushed one by one; past it a flush is a full one.
pub const FLUSH_PAGES_MAX: usize = 32;

/// Where a vCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuMode {
    /// Not running guest code; it looks at requests before it does again.
    Outside = 0,
    /// Running guest code, or about to.
    InGuest = 1,
}

/// How to make vCPUs that run guest code leave and look at their flush requests.
pub trait Shootdown: Send + Sync {
    /// Makes vCPU `vcpu` exit soon; returns without waiting. May be called for a vCPU that is outside.
    fn kick(&self, vcpu: u32);

    /// Returns once every store that a thread of a vCPU has made so far can be seen by all, and is ordered before whatever
    /// that thread looks at from then on. Called where there is more than one vCPU, also by one inside the guest.
    fn settle_stores(&self) {}

    /// Has the host take these frames away from every vCPU, whose contents stay, and returns once no vCPU has a translation
    /// to any of them. False where it cannot: the vCPUs are kicked then.
    fn notify(&self, frames: &mut dyn Iterator<Item = Mfn>) -> bool {
        let _ = frames;
        false
    }
}

/// A [`Shootdown`] where no vCPU ever runs guest code on its own thread: tests and simulation.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoVcpus;

impl Shootdown for NoVcpus {
    fn kick(&self, _vcpu: u32) {}
}

/// On a line of the cache for itself: its vCPU writes to it whenever it enters and leaves the guest.
#[derive(Debug, Default)]
#[repr(align(64))]
struct VcpuFlush {
    mode: AtomicU32,
    /// A flush epoch that must be reached before guest code runs again.
    requested: AtomicU64,
    /// Epoch of the last completed flush.
    flushed: AtomicU64,
    /// The highest stamp that somebody has seen it cover. It will for ever: seen outside, with a request, it flushes before
    /// it runs guest code, though for a moment it is inside and has not flushed yet.
    seen: AtomicU64,
}

/// What a notifier shootdown still has to drop: sptes that were present and have been removed or narrowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removals {
    /// Frames whose sptes changed, if they are few.
    pub pages: Vec<Mfn>,
    /// Too many to name, or a table was unlinked: everything must go.
    pub all: bool,
}

/// What every removal writes: on a line of the cache for itself, since fills read what lies around it.
#[repr(align(64))]
struct Clock {
    /// The flush clock in the upper bits, and in the lower ones how many removals are not stamped yet.
    word: AtomicU64,
    /// One past the stamp of the last removal.
    last_removal: AtomicU64,
}

/// Bits of the lower part: no more threads than that can remove at once.
const REMOVING_BITS: u32 = 16;

impl Clock {
    fn now(&self) -> u64 {
        self.word.load(Ordering::SeqCst) >> REMOVING_BITS
    }

    fn is_removing(&self) -> bool {
        self.word.load(Ordering::SeqCst) & ((1 << REMOVING_BITS) - 1) != 0
    }

    /// Moves on by one, and says to what.
    fn advance(&self) -> u64 {
        (self.word.fetch_add(1 << REMOVING_BITS, Ordering::SeqCst) >> REMOVING_BITS) + 1
    }
}

/// The flush clock, and each vCPU's place on it.
pub struct Coherence {
    rules: Rules,
    clock: Clock,
    vcpus: Box<[VcpuFlush]>,
    log_removals: AtomicBool,
    /// The host's notifier is asked first where the frames are at most so many.
    notify_max: AtomicU32,
    /// And though no vCPU runs guest code.
    notify_idle: AtomicBool,
    removals: Lock<Removals>,
    /// Somebody has locked the bus.
    bus: AtomicBool,
    shootdown: Box<dyn Shootdown>,
}

impl std::fmt::Debug for Coherence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coherence")
            .field("clock", &self.clock.now())
            .field("removing", &self.clock.is_removing())
            .field("last_removal", &self.clock.last_removal)
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

impl Coherence {
    /// A ledger for `vcpus` vCPUs, all outside and nothing owed.
    pub fn new(vcpus: u32, shootdown: Box<dyn Shootdown>) -> Coherence {
        Coherence {
            rules: Rules::default(),
            clock: Clock { word: AtomicU64::new(1 << REMOVING_BITS), last_removal: AtomicU64::new(0) },
            vcpus: (0..vcpus).map(|_| VcpuFlush::default()).collect(),
            log_removals: AtomicBool::new(false),
            notify_max: AtomicU32::new(0),
            notify_idle: AtomicBool::new(false),
            removals: Lock::new(lock_order::REMOVALS, Removals::default()),
            bus: AtomicBool::new(false),
            shootdown,
        }
    }

    pub(crate) fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Keeps the list of frames whose sptes were removed, for a backend that shoots down frame by frame
    /// ([`Coherence::take_removals`]). Off until asked for: other backends pay nothing.
    pub fn log_removals(&self) {
        self.log_removals.store(true, Ordering::Relaxed);
    }

    /// Takes the list of what was removed since the last call.
    pub fn take_removals(&self) -> Removals {
        std::mem::take(&mut *self.removals.lock())
    }

    /// Begins a removal: called before the first spte is stored to.
    #[inline]
    pub(crate) fn removal(&self) -> Removal<'_> {
        let word = self.clock.word.fetch_add(1, Ordering::SeqCst) + 1;
        Removal { ledger: self, word }
    }

    fn log(&self, mfn: Option<Mfn>) {
        let mut removals = self.removals.lock();
        match mfn {
            Some(mfn) if removals.pages.len() < FLUSH_PAGES_MAX => removals.pages.push(mfn),
            _ => removals.all = true,
        }
    }

    /// True when something was removed that `vcpu` has not flushed since: what an INVLPG or a CR3 load then owes.
    pub fn owes_flush(&self, vcpu: u32) -> bool {
        self.removed_since(self.flushed(vcpu))
    }

    /// True when something was removed, or is being, that a flush of `epoch` does not cover.
    pub(crate) fn removed_since(&self, epoch: u64) -> bool {
        let under_way = self.rules.keep(Rule::RemovalUnderWay) && self.clock.is_removing();
        under_way || self.clock.last_removal.load(Ordering::SeqCst) > epoch
    }

    /// Epoch of the last completed flush of everything on `vcpu`.
    pub fn flushed(&self, vcpu: u32) -> u64 {
        self.vcpus[vcpu as usize].flushed.load(Ordering::SeqCst)
    }

    /// The epoch that a flush of `vcpu` was last asked to have.
    pub fn requested(&self, vcpu: u32) -> u64 {
        self.vcpus[vcpu as usize].requested.load(Ordering::SeqCst)
    }

    /// Asks `vcpu` to flush before it next runs guest code. For a vCPU's own thread; others use
    /// [`Coherence::shoot_down`].
    pub fn request_flush(&self, vcpu: u32) {
        let stamp = self.clock.now();
        raise(&self.vcpus[vcpu as usize].requested, stamp + 1);
    }

    /// Makes every vCPU unable to use what was removed up to now, and returns once that is so: how many had to be
    /// kicked. Sleeps (spins, kicking once) for vCPUs in the guest. `own` is the caller's vCPU, which is outside.
    pub fn shoot_down(&self, own: Option<u32>) -> u32 {
        lock_order::assert_may_sleep();
        point();
        let stamp = match self.rules.keep(Rule::RequestAtShootdown) {
            true => self.request_flush_of_all(),
            false => self.clock.now(),
        };
        let mut kicked = 0;
        for (number, vcpu) in self.vcpus.iter().enumerate() {
            let number = number as u32;
            if own != Some(number) && !vcpu.covers(stamp) {
                if self.rules.keep(Rule::KickAtShootdown) {
                    self.shootdown.kick(number);
                }
                kicked += 1;
            }
        }
        if self.rules.keep(Rule::AwaitAnswers) && !spin_until(|| self.covered(stamp)) {
            while !self.covered(stamp) {
                thread::yield_for(|| self.for_vcpu("an answer", |vcpu| !vcpu.covers(stamp)));
            }
        }
        kicked
    }

    /// What `vcpu` owes whoever shoots it down: an answer, by flushing or by being outside.
    pub fn answer(&self, vcpu: u32) -> Thing {
        Thing::owed("the answer of vCPU", vcpu, &self.vcpus[vcpu as usize])
    }

    /// The wait for the first vCPU of which it is so.
    fn for_vcpu(&self, what: &'static str, is_so: impl Fn(&VcpuFlush) -> bool) -> Wait {
        let first = (0..).zip(self.vcpus.iter()).find(|(_, vcpu)| is_so(vcpu));
        first.map_or(what.into(), |(number, _)| Wait::from(what).of(self.answer(number)))
    }

    fn bus_lock(&self) -> Thing {
        Thing::held("the bus", None, &self.bus)
    }

    fn for_bus(&self) -> Wait {
        Wait::from("the bus").of(self.bus_lock())
    }

    /// [`Shootdown::settle_stores`], if there is another vCPU.
    pub(crate) fn settle_stores(&self) {
        if self.vcpus.len() > 1 {
            self.shootdown.settle_stores();
        }
    }

    /// Has [`Shootdown::notify`] tried first, where the frames are at most [`FLUSH_PAGES_MAX`].
    pub fn prefer_notifier(&self, prefer: bool) {
        self.notify_idle.store(prefer, Ordering::Relaxed);
        self.notify_max.store(if prefer { FLUSH_PAGES_MAX as u32 } else { 0 }, Ordering::Relaxed);
    }

    /// Has [`Shootdown::notify`] tried before vCPUs are kicked, where the frames are at most `frames` (and
    /// [`FLUSH_PAGES_MAX`]). While no vCPU runs guest code there is nobody to kick: a flush at the next entry is cheaper.
    pub fn notify_up_to(&self, frames: u32) {
        self.notify_idle.store(false, Ordering::Relaxed);
        self.notify_max.store(frames.min(FLUSH_PAGES_MAX as u32), Ordering::Relaxed);
    }

    /// Makes every vCPU unable to use what was removed of the frames of `pages`: how many vCPUs were kicked, or that the
    /// host has seen to these frames, and these alone. Sleeps as [`Coherence::shoot_down`] does.
    pub(crate) fn shoot_down_frames(&self, own: Option<u32>, pages: &[Held]) -> (u32, bool) {
        let keep = self.rules.keep(Rule::NotifyAtShootdown);
        let notify = || !keep || self.shootdown.notify(&mut pages.iter().map(|page| page.mfn));
        if self.may_notify(own, pages.len()) && notify() {
            self.unlog(pages);
            return (0, true);
        }
        (self.shoot_down(own), false)
    }

    fn may_notify(&self, own: Option<u32>, pages: usize) -> bool {
        pages <= self.notify_max.load(Ordering::Relaxed) as usize
            && (self.notify_idle.load(Ordering::Relaxed) || self.is_anyone_inside(own))
    }

    /// Takes frames that the host has seen to out of the log. Nobody removes an spte to them meanwhile: there is none.
    fn unlog(&self, pages: &[Held]) {
        if self.log_removals.load(Ordering::Relaxed) {
            self.removals.lock().pages.retain(|mfn| pages.iter().all(|page| page.mfn != *mfn));
        }
    }

    /// Asks every vCPU to flush before it next runs guest code; those that run now go on. Returns the clock of the
    /// request: what was removed up to it is covered once they have.
    pub(crate) fn request_flush_of_all(&self) -> u64 {
        let stamp = self.clock.now();
        for vcpu in self.vcpus.iter() {
            raise(&vcpu.requested, stamp + 1);
        }
        stamp
    }

    /// True when a vCPU other than `own` runs guest code now: a shootdown would have to wait for it.
    pub(crate) fn is_anyone_inside(&self, own: Option<u32>) -> bool {
        self.inside().any(|number| own != Some(number))
    }

    /// Has the vCPUs that run guest code now leave it, for no flush; does not wait for them.
    pub(crate) fn kick_out(&self) {
        self.inside().for_each(|number| self.shootdown.kick(number));
    }

    /// Keeps the vCPUs but `own`, which is outside, from every access to memory for as long as the value lives: what silicon
    /// does for a locked access that no cache line holds. Sleeps (spins, kicking once) for vCPUs in the guest and for another who
    /// has it. Whoever has it waits for no vCPU: it takes locks, which are not held by one who enters.
    ///
    /// ```text
    /// vCPU                                      whoever locks the bus
    /// mode := in guest                          bus := locked, when it is free
    /// bus locked? outside, until it is free     mode = in guest? kick; wait for outside
    /// guest code                                the access
    /// mode := outside                           bus := free
    /// ```
    pub fn lock_bus(&self, own: u32) -> BusLock<'_> {
        lock_order::assert_may_sleep();
        while self.bus.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            thread::yield_for(|| self.for_bus());
        }
        let lock = BusLock::taken(self);
        self.inside().filter(|number| *number != own).for_each(|number| self.shootdown.kick(number));
        if !spin_until(|| !self.is_anyone_inside(Some(own))) {
            while self.is_anyone_inside(Some(own)) {
                thread::yield_for(|| {
                    let mut others = self.inside().filter(|number| *number != own);
                    let wait = Wait::from("a vCPU to be outside");
                    others.next().map_or(wait, |number| wait.of(self.answer(number)))
                });
            }
        }
        lock
    }

    fn inside(&self) -> impl Iterator<Item = u32> {
        let inside = |vcpu: &VcpuFlush| vcpu.mode.load(Ordering::SeqCst) == VcpuMode::InGuest as u32;
        (0..).zip(self.vcpus.iter()).filter(move |(_, vcpu)| inside(vcpu)).map(|(number, _)| number)
    }

    /// The ack ledger: true when no vCPU can still use a translation removed at `stamp`. The clock begins at 1: a stamp
    /// of 0 is that of no removal.
    pub fn covered(&self, stamp: u64) -> bool {
        stamp == 0 || self.vcpus.iter().all(|vcpu| vcpu.covers(stamp))
    }

    /// Before guest code runs: marks `vcpu` as in the guest and says whether it must flush first. The mode is set
    /// before the request is read, so a shootdown either sees the vCPU inside and kicks it, or its request is
    /// seen here. Sleeps for one who has locked the bus.
    pub fn enter_guest(&self, vcpu: u32) -> bool {
        let state = &self.vcpus[vcpu as usize];
        self.set_inside(state);
        while self.bus.load(Ordering::SeqCst) {
            self.leave_guest(vcpu);
            lock_order::assert_may_sleep();
            while self.bus.load(Ordering::SeqCst) {
                thread::yield_for(|| self.for_bus());
            }
            self.set_inside(state);
        }
        state.requested.load(Ordering::SeqCst) > state.flushed.load(Ordering::SeqCst)
    }

    fn set_inside(&self, vcpu: &VcpuFlush) {
        if self.rules.keep(Rule::ModeAtEntry) {
            vcpu.mode.store(VcpuMode::InGuest as u32, Ordering::SeqCst);
        }
    }

    /// After guest code ran, or when it will not after all. Whoever waits for it may look too late to see it outside: what
    /// it was asked for it answers itself.
    pub fn leave_guest(&self, vcpu: u32) {
        let state = &self.vcpus[vcpu as usize];
        state.mode.store(VcpuMode::Outside as u32, Ordering::SeqCst);
        let requested = state.requested.load(Ordering::SeqCst);
        if requested > state.flushed.load(Ordering::SeqCst) && self.rules.keep(Rule::AnswerAtLeave) {
            raise(&state.seen, requested - 1);
        }
    }

    /// Takes the epoch of a flush that is about to be made.
    #[must_use]
    pub fn begin_flush(&self) -> u64 {
        self.clock.advance()
    }

    /// Notes that the flush begun with `epoch` is complete on `vcpu`.
    pub fn end_flush(&self, vcpu: u32, epoch: u64) {
        raise(&self.vcpus[vcpu as usize].flushed, epoch);
    }
}

/// Proof that no vCPU but the holder's reaches guest memory ([`Coherence::lock_bus`]).
#[must_use]
pub struct BusLock<'a> {
    ledger: &'a Coherence,
    _has: Having,
}

impl BusLock<'_> {
    /// That of who has just taken it.
    pub(crate) fn taken(ledger: &Coherence) -> BusLock<'_> {
        BusLock { ledger, _has: Having::new(ledger.bus_lock()) }
    }
}

impl Drop for BusLock<'_> {
    fn drop(&mut self) {
        self.ledger.bus.store(false, Ordering::SeqCst);
    }
}

/// A removal of sptes that is under way. Each kind of stamp ends it, and so does dropping it with nothing removed.
#[derive(Debug)]
#[must_use]
pub(crate) struct Removal<'a> {
    ledger: &'a Coherence,
    /// The clock's word as it was seen last.
    word: u64,
}

impl Removal<'_> {
    /// Stamps the removal or narrowing of leaf sptes to `mfn`, already stored. The stamp is the frame's debt.
    #[inline]
    pub fn stamp_leaf(self, mfn: Mfn) -> u64 {
        if self.ledger.log_removals.load(Ordering::Relaxed) {
            self.ledger.log(Some(mfn));
        }
        self.stamp()
    }

    /// The same for leaves to each of `frames`.
    pub fn stamp_leaves(self, frames: impl Iterator<Item = Mfn>) -> u64 {
        if self.ledger.log_removals.load(Ordering::Relaxed) {
            frames.for_each(|mfn| self.ledger.log(Some(mfn)));
        }
        self.stamp()
    }

    /// Nothing is written down where `rule` is left out: as if nothing had been removed.
    #[inline(always)]
    pub fn by(self, rule: Rule) -> Option<Self> {
        self.ledger.rules.keep(rule).then_some(self)
    }

    /// Stamps the unlinking of a table, already stored.
    pub fn stamp_table(self) -> u64 {
        if self.ledger.log_removals.load(Ordering::Relaxed) {
            self.ledger.log(None);
        }
        self.stamp()
    }

    #[inline]
    fn stamp(self) -> u64 {
        // The spte has gone, and nobody knows yet but by the count of who removes.
        point();
        let (clock, last) = (&self.ledger.clock.word, &self.ledger.clock.last_removal);
        let mut word = self.word;
        loop {
            let stamp = word >> REMOVING_BITS;
            if last.load(Ordering::SeqCst) <= stamp {
                raise(last, stamp + 1);
            }
            // The clock still stands there, and whoever moves it on sees the sptes' stores.
            match clock.compare_exchange(word, word - 1, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => {
                    std::mem::forget(self);
                    return stamp;
                }
                Err(now) => word = now,
            }
        }
    }
}

impl Drop for Removal<'_> {
    #[inline]
    fn drop(&mut self) {
        self.ledger.clock.word.fetch_sub(1, Ordering::SeqCst);
    }
}

impl VcpuFlush {
    /// The request is read before the mode: a vCPU seen outside after that has the request before it as it enters.
    /// The other way round, it could enter in between, on an older request.
    fn covers(&self, stamp: u64) -> bool {
        if self.flushed.load(Ordering::SeqCst) > stamp || self.seen.load(Ordering::SeqCst) >= stamp {
            return true;
        }
        let outside = self.requested.load(Ordering::SeqCst) > stamp
            && self.mode.load(Ordering::SeqCst) == VcpuMode::Outside as u32;
        if outside {
            raise(&self.seen, stamp);
        }
        outside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one() -> Coherence {
        Coherence::new(1, Box::new(NoVcpus))
    }

    #[test]
    fn a_removal_is_owed_until_a_later_flush() {
        let ledger = one();
        assert!(!ledger.owes_flush(0));
        let stamp = ledger.removal().stamp_leaf(Mfn(1));
        assert!(ledger.owes_flush(0) && !ledger.covered(stamp));
        let epoch = ledger.begin_flush();
        ledger.end_flush(0, epoch);
        assert!(!ledger.owes_flush(0) && ledger.covered(stamp));
    }

    #[test]
    fn a_vcpu_that_was_outside_for_a_moment_has_answered() {
        let ledger = one();
        ledger.enter_guest(0);
        let stamp = ledger.removal().stamp_table();
        ledger.request_flush_of_all();
        ledger.leave_guest(0);
        assert!(ledger.enter_guest(0), "it flushes before it runs guest code");
        assert!(ledger.covered(stamp), "though nobody has seen it outside");
        let epoch = ledger.begin_flush();
        ledger.end_flush(0, epoch);
        assert!(!ledger.covered(ledger.removal().stamp_table()), "for what comes later it has not");
    }

    #[test]
    fn a_removal_after_the_epoch_was_taken_is_not_covered() {
        let ledger = one();
        let epoch = ledger.begin_flush();
        let stamp = ledger.removal().stamp_leaf(Mfn(1));
        ledger.end_flush(0, epoch);
        assert!(!ledger.covered(stamp));
    }

    #[test]
    fn a_removal_under_way_is_owed_though_it_has_no_stamp() {
        let ledger = one();
        let removal = ledger.removal();
        assert!(ledger.owes_flush(0), "the spte may be gone already");
        drop(removal);
        assert!(!ledger.owes_flush(0), "nothing was removed after all");
    }

    #[test]
    fn a_vcpu_outside_is_excused_by_its_request_alone() {
        let ledger = one();
        let stamp = ledger.removal().stamp_table();
        assert!(!ledger.covered(stamp), "being outside is no excuse");
        ledger.shoot_down(None);
        assert!(ledger.covered(stamp));
        assert!(ledger.enter_guest(0), "and it must flush before it enters");
        assert!(ledger.covered(stamp), "for good");
        let epoch = ledger.begin_flush();
        ledger.end_flush(0, epoch);
        let later = ledger.removal().stamp_table();
        assert!(!ledger.covered(later), "inside, and unflushed since: not covered");
    }

    /// A host that can always notify, and says how often it was asked.
    struct Notifies(crate::sync::Arc<AtomicU32>);

    impl Shootdown for Notifies {
        fn kick(&self, _vcpu: u32) {}

        fn notify(&self, frames: &mut dyn Iterator<Item = Mfn>) -> bool {
            self.0.fetch_add(frames.count() as u32, Ordering::SeqCst);
            true
        }
    }

    #[test]
    fn the_notifier_is_asked_for_few_frames_and_while_somebody_would_be_kicked() {
        let asked = crate::sync::Arc::new(AtomicU32::new(0));
        let ledger = Coherence::new(1, Box::new(Notifies(asked.clone())));
        ledger.log_removals();
        let held = |n| Held { gfn: crate::Gfn(n), mfn: Mfn(n), copy: None };
        let pages: Vec<Held> = (0..3).map(held).collect();
        assert_eq!(ledger.shoot_down_frames(None, &pages), (0, false), "nobody prefers it");
        ledger.notify_up_to(2);
        assert_eq!(ledger.shoot_down_frames(None, &pages[..2]), (0, false), "nobody is inside");
        ledger.prefer_notifier(true);
        (0..4).for_each(|n| {
            ledger.removal().stamp_leaf(Mfn(n));
        });
        assert_eq!(ledger.shoot_down_frames(None, &pages), (0, true));
        assert_eq!(ledger.take_removals().pages, [Mfn(3)], "what was seen to is logged no more");
        ledger.notify_up_to(2);
        ledger.enter_guest(0);
        assert_eq!(ledger.shoot_down_frames(None, &pages[..2]), (0, true));
        assert_eq!(asked.load(Ordering::SeqCst), 5);
    }

    #[test]
    fn removals_past_the_ceiling_become_a_full_flush() {
        let ledger = one();
        ledger.log_removals();
        for n in 0..FLUSH_PAGES_MAX as u32 {
            ledger.removal().stamp_leaf(Mfn(n));
        }
        assert!(!ledger.removals.lock().all);
        ledger.removal().stamp_leaf(Mfn(99));
        let taken = ledger.take_removals();
        assert!(taken.all && taken.pages.len() == FLUSH_PAGES_MAX);
        assert_eq!(ledger.take_removals(), Removals::default());
    }
}

#[cfg(all(test, loom))]
#[path = "interleave/coherence.rs"]
mod interleave;
