//! The balloon device: memory that the guest gives up, and says how it fares.
//!
//! Story: the host sets a target ([`Balloon::set_target`]). The driver gives pages up until it has given so many (queue 0), or
//! takes some back (queue 1), and writes into the configuration how many it has given (`actual`). Pages given up lose their
//! frames and their contents (`Discard::Balloon`); one that is touched all the same is a page of zeros. By queue 2 it lends a
//! buffer with its statistics, which it gets back when newer ones are wanted; by queue 3 it reports free pages, whose frames go
//! before it may use them again.
//!
//! Holds: pages that are no memory, low, or held in their place are passed over and counted: to give up is an offer. Nothing of
//! the guest is pinned while pages go (VIRTIO-PIN-1): they could be the ones that are pinned.
//!
//! Limits: [`PFNS_MAX`] pages of one request, [`STATS_MAX`] statistics; of reported ranges as many pages as the guest has.
//!
//! See: VIRTIO 1.2, 5.5. Queues keep their numbers whatever the driver has agreed to.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use serde::Serialize;
use umbra_mmu::discard::{Discard, NotDiscarded};
use umbra_mmu::dma::NoSession;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::PageState;
use umbra_mmu::{Gfn, Mmu, PAGE_SIZE, Shortage};

use super::chain::{Chain, Part, gather};
use super::worker::Bell;
use super::{Device, Port, Served, little_endian};
use crate::board::{CONFIG_BYTES_MAX, VirtioSnapshot, VirtioSpec};

/// Pages of one request to inflate or deflate; what is beyond is passed over.
pub const PFNS_MAX: usize = 1024;
/// Statistics of one buffer; what is beyond is not looked at.
pub const STATS_MAX: usize = 64;
/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 64;

const DEVICE_ID: u32 = 5;

/// Features.
const F_MUST_TELL_HOST: u64 = 1 << 0;
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Queues.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;

/// The configuration: how many pages are wanted, how many have been given.
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const CONFIG_BYTES: usize = 8;

const STAT_BYTES: usize = 10;
/// A tag of our own.
const STAT_SWAPPED: u64 = 0xf000;

/// What a guest says of its memory. `None`: it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GuestStats {
    /// Bytes swapped in by the guest itself.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that had to wait for a disk.
    pub major_faults: Option<u64>,
    /// Others.
    pub minor_faults: Option<u64>,
    /// Bytes that nothing uses.
    pub free: Option<u64>,
    /// Bytes in all.
    pub total: Option<u64>,
    /// Bytes that programs could still have.
    pub available: Option<u64>,
    /// Bytes of caches that can be dropped.
    pub caches: Option<u64>,
    /// Huge pages allocated.
    pub huge_page_allocations: Option<u64>,
    /// Huge pages that could not be.
    pub huge_page_failures: Option<u64>,
    /// Bytes of its own swap in use. Not of VIRTIO: the built-in guest says so.
    pub swapped: Option<u64>,
}

impl GuestStats {
    /// Those that the guest says, under the names that QEMU gives them.
    pub fn named(&self) -> Vec<(&'static str, u64)> {
        let all = [
            ("stat-swap-in", self.swap_in),
            ("stat-swap-out", self.swap_out),
            ("stat-major-faults", self.major_faults),
            ("stat-minor-faults", self.minor_faults),
            ("stat-free-memory", self.free),
            ("stat-total-memory", self.total),
            ("stat-available-memory", self.available),
            ("stat-disk-caches", self.caches),
            ("stat-htlb-pgalloc", self.huge_page_allocations),
            ("stat-htlb-pgfail", self.huge_page_failures),
            ("x-stat-swapped", self.swapped),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Reads tags and values; tags that are not known are passed over.
    fn parse(bytes: &[u8]) -> GuestStats {
        let mut stats = GuestStats::default();
        for entry in bytes.chunks_exact(STAT_BYTES) {
            let (tag, value) = entry.split_at(2);
            let place = match little_endian(tag) {
                0 => &mut stats.swap_in,
                1 => &mut stats.swap_out,
                2 => &mut stats.major_faults,
                3 => &mut stats.minor_faults,
                4 => &mut stats.free,
                5 => &mut stats.total,
                6 => &mut stats.available,
                7 => &mut stats.caches,
                8 => &mut stats.huge_page_allocations,
                9 => &mut stats.huge_page_failures,
                STAT_SWAPPED => &mut stats.swapped,
                _ => continue,
            };
            *place = Some(little_endian(value));
        }
        stats
    }
}

/// A balloon as it is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BalloonState {
    /// Pages that the host wants.
    pub target: u32,
    /// Pages that the driver says it has given.
    pub actual: u32,
    /// Pages taken so far.
    pub inflated: u64,
    /// Pages that the driver has said it takes back, so far.
    pub deflated: u64,
    /// Pages reported as free and taken, so far.
    pub reported: u64,
    /// Pages that were given or reported, and not taken: no memory, low, held, or too many at once.
    pub passed_over: u64,
    /// Times that the driver has sent statistics.
    pub stats_updates: u64,
    /// The latest of them.
    pub stats: Option<GuestStats>,
}

/// Told of each change of `actual`.
pub type OnChange = Box<dyn Fn(u32) + Send + Sync>;

#[derive(Default)]
struct Shared {
    state: Mutex<BalloonState>,
    stats_wanted: AtomicBool,
    on_change: OnceLock<OnChange>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, BalloonState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, actual: u32) {
        if let Some(tell) = self.on_change.get() {
            tell(actual);
        }
    }
}

/// The host's side of a balloon.
#[derive(Clone)]
pub struct Balloon {
    shared: Arc<Shared>,
    port: Arc<dyn Port>,
    bell: Arc<Bell>,
}

impl Balloon {
    /// Asks the driver to have given up so many pages.
    pub fn set_target(&self, pages: u32) {
        self.shared.state().target = pages;
        self.port.set_config(NUM_PAGES, &pages.to_le_bytes());
    }

    /// The guest has begun anew, with all of its memory: it has given nothing, and said nothing. The board has reset the device, and
    /// its worker stands. What is asked of it stays asked.
    pub fn reset(&self) {
        let mut state = self.shared.state();
        state.stats = None;
        let before = std::mem::take(&mut state.actual);
        drop(state);
        if before != 0 {
            self.shared.tell(0);
        }
    }

    /// How it is now.
    pub fn state(&self) -> BalloonState {
        *self.shared.state()
    }

    /// Asks the driver for statistics; `stats_updates` says that there are some.
    pub fn ask_for_stats(&self) {
        self.shared.stats_wanted.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    /// Has `tell` called, on the device's thread, whenever `actual` has changed. False if something is called already.
    pub fn on_change(&self, tell: OnChange) -> bool {
        self.shared.on_change.set(tell).is_ok()
    }
}

/// The device.
#[derive(Default)]
pub struct BalloonDevice {
    shared: Arc<Shared>,
    /// The driver's buffer for statistics, and the life of its queue.
    lent: Option<(u16, u32)>,
    stats_life: u32,
}

impl BalloonDevice {
    /// An empty one.
    pub fn new() -> BalloonDevice {
        BalloonDevice::default()
    }

    /// The host's side of it; `bell` wakes its worker.
    pub fn handle(&self, port: Arc<dyn Port>, bell: Arc<Bell>) -> Balloon {
        Balloon { shared: Arc::clone(&self.shared), port, bell }
    }

    /// The page numbers of a request, in order and each once; and how many there are beyond.
    fn pfns(&self, mmu: &Mmu, chain: &Chain) -> Result<(Vec<u32>, u64), Shortage> {
        let all = chain.read_bytes() / 4;
        let count = all.min(PFNS_MAX as u64);
        let mut bytes = vec![0; 4 * count as usize];
        match gather(mmu, &chain.read, 0, &mut bytes) {
            Ok(()) => {}
            Err(NoSession::Refused(_)) => return Ok((Vec::new(), all)),
            Err(NoSession::Short(short)) => return Err(short),
        }
        let mut pfns: Vec<u32> = bytes.chunks_exact(4).map(|pfn| little_endian(pfn) as u32).collect();
        pfns.sort_unstable();
        pfns.dedup();
        Ok((pfns, all - count))
    }

    fn inflate(&mut self, mmu: &Mmu, chain: &Chain) -> Result<(), Shortage> {
        let (pfns, beyond) = self.pfns(mmu, chain)?;
        let (taken, passed) = give_up(mmu, pfns, Discard::Balloon);
        let mut state = self.shared.state();
        state.inflated += taken;
        state.passed_over += passed + beyond;
        Ok(())
    }

    /// Nothing is to be done: a page that was given up and is touched is a page of zeros.
    fn deflate(&mut self, mmu: &Mmu, chain: &Chain) -> Result<(), Shortage> {
        let (pfns, _) = self.pfns(mmu, chain)?;
        self.shared.state().deflated += pfns.len() as u64;
        Ok(())
    }

    fn report(&mut self, mmu: &Mmu, chain: &Chain) {
        let memory = mmu.p2m().pages();
        let mut pages: Vec<u32> =
            chain.write.iter().flat_map(|part| whole_pages(part, memory)).take(memory as usize).collect();
        pages.sort_unstable();
        pages.dedup();
        let (taken, passed) = give_up(mmu, pages, Discard::Zero);
        let mut state = self.shared.state();
        state.reported += taken;
        state.passed_over += passed;
    }

    /// Reads the statistics and keeps their buffer, if it has none yet.
    fn learn(&mut self, mmu: &Mmu, chain: &Chain) -> Result<Served, Shortage> {
        let count = (chain.read_bytes() as usize).min(STATS_MAX * STAT_BYTES);
        let mut bytes = vec![0; count];
        match gather(mmu, &chain.read, 0, &mut bytes) {
            Ok(()) => {
                let mut state = self.shared.state();
                state.stats = Some(GuestStats::parse(&bytes));
                state.stats_updates += 1;
                drop(state);
                // Nothing newer could be had.
                self.shared.stats_wanted.store(false, Ordering::SeqCst);
            }
            Err(NoSession::Refused(_)) => {}
            Err(NoSession::Short(short)) => return Err(short),
        }
        if self.lent.is_some() {
            return Ok(DONE);
        }
        self.lent = Some((chain.head, self.stats_life));
        Ok(Served::Kept)
    }
}

const DONE: Served = Served::Done { status: None, length: 0 };

/// The pages that lie whole in `part`, of the guest's `pages`.
fn whole_pages(part: &Part, pages: u32) -> Range<u32> {
    let end = part.at.saturating_add(part.count.into()) / PAGE_SIZE;
    let (first, end) = (part.at.div_ceil(PAGE_SIZE).min(pages.into()), end.min(pages.into()));
    first as u32..end.max(first) as u32
}

/// Has pages, in order and each once, lose their frames and contents, but those that are held in their places; how many did, and
/// how many were passed over.
fn give_up(mmu: &Mmu, pages: Vec<u32>, what: Discard) -> (u64, u64) {
    let all = pages.len();
    let is_high =
        |page: &u32| *page >= mmu.config().low_pages && mmu.p2m().lookup(Gfn(*page)) != PageState::Device;
    let pages: Vec<u32> = pages.into_iter().filter(is_high).collect();
    let (mut taken, mut first) = (0, 0);
    while first < pages.len() {
        match mmu.discard(None, pages[first..].iter().copied(), what, May::Sleep) {
            Ok(()) => {
                taken += pages.len() - first;
                break;
            }
            // Those before it are.
            Err(NotDiscarded::Held { gfn, .. }) => {
                let at = first + pages[first..].partition_point(|page| *page < gfn.0);
                taken += at - first;
                first = at + 1;
            }
            // Not of one that may sleep.
            Err(NotDiscarded::WouldBlock(_)) => break,
        }
    }
    (taken as u64, (all - taken) as u64)
}

impl Device for BalloonDevice {
    fn spec(&self) -> VirtioSpec {
        VirtioSpec {
            device_id: DEVICE_ID,
            features: F_MUST_TELL_HOST | F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING,
            queue_sizes: [QUEUE_SIZE; 4],
            config: [0; CONFIG_BYTES_MAX],
            config_bytes: CONFIG_BYTES,
            config_writable: (ACTUAL, CONFIG_BYTES),
        }
    }

    fn header_bytes(&self) -> usize {
        0
    }

    fn begin_round(&mut self, snapshot: &VirtioSnapshot) {
        let stats = &snapshot.queues[STATS];
        self.stats_life = stats.life;
        self.lent = self.lent.filter(|(_, life)| stats.ready && *life == stats.life);
        let actual = [0, 1, 2, 3].map(|n| snapshot.config[ACTUAL + n]);
        let actual = u32::from_le_bytes(actual);
        let before = std::mem::replace(&mut self.shared.state().actual, actual);
        if before != actual {
            self.shared.tell(actual);
        }
    }

    fn serve(&mut self, mmu: &Mmu, queue: usize, chain: &Chain) -> Result<Served, Shortage> {
        // What is wrong with a request costs its driver the request.
        if !chain.whole {
            return Ok(DONE);
        }
        match queue {
            INFLATE => self.inflate(mmu, chain)?,
            DEFLATE => self.deflate(mmu, chain)?,
            STATS => return self.learn(mmu, chain),
            REPORTING => self.report(mmu, chain),
            _ => {}
        }
        Ok(DONE)
    }

    fn give_back(&mut self) -> Option<(usize, u16)> {
        if self.lent.is_none() || !self.shared.stats_wanted.swap(false, Ordering::SeqCst) {
            return None;
        }
        self.lent.take().map(|(head, _)| (STATS, head))
    }
}
