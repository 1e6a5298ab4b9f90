//! The emulated MMU: everything between a guest's own page tables and the machine's frames.
//!
//! A library with no KVM, no files, no sockets and no clock. It is handed machine memory and a way to kick
//! vCPUs; it hands out roots for the hardware to walk, and answers faults.
//!
//! ```text
//!   guest's tables --walk--> Translation --map--> spte in a shadow page --hardware--> frame
//!                              gva -> gfn            under bucket(gfn)        ^
//!                                                        p2m: gfn -> mfn -----+
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | addr, access, format, spte | the words: addresses, accesses, guest entries, shadow entries |
//! | machine, frames, p2m, window, pool, views | memory: the frames, who has each, gfn -> frame, the ways to touch it |
//! | dma | the same for devices, as `vm-memory`'s traits have it |
//! | walk | the guest's tables, read and judged |
//! | bucket | reverse map and gates |
//! | invalidation, records | the one road by which a page loses its frame, and what each passage leaves behind |
//! | external | importers in other processes: who may have which page, and how they lose it |
//! | collapse | 2 MiB ranges, gathered into contiguous frames and split again |
//! | discard, power | pages that are not wanted any more; all that a guest has, at a reset |
//! | lru, reclaim, swap, scope | which pages go, where to, and how they come back |
//! | shadow | shadow pages: built, linked, filled, kept in step, evicted |
//! | coherence, tlb, link_cache, violation | flush epochs and the ack ledger; a TLB in software, and paging-structure caches; the report of a flush that was missed |
//! | guest_tlb | a model of the guest's own TLBs, which finds the flushes that the guest misses |
//! | rules | the rules of coherence and of reclaim by name, and going without one |
//! | fault, paging, physical | what a backend calls: a page fault; CR and INVLPG; memory by address |
//! | explain, pressure, audit | why an address is as it is; how short of frames the guest is; is everything as it must be |
//! | twins | what stands in for vCPUs' threads and importers in memory |
//! | lock_order, sync | the order of locks, and the one door to them |
#![forbid(unsafe_code)]

pub mod access;
pub mod addr;
pub mod audit;
pub mod bucket;
pub mod coherence;
pub mod collapse;
pub mod discard;
pub mod dma;
pub mod events;
pub mod explain;
pub mod external;
pub mod fault;
pub mod format;
pub mod frames;
pub mod guest_tlb;
#[cfg(all(test, loom))]
mod interleave;
pub mod invalidation;
pub mod link_cache;
pub mod lock_order;
pub mod lru;
pub mod machine;
pub mod p2m;
mod paging;
mod physical;
pub mod pool;
mod power;
pub mod pressure;
pub mod reclaim;
pub mod records;
pub mod rules;
pub mod scope;
pub mod shadow;
pub mod spte;
pub mod swap;
pub mod sync;
pub mod tlb;
#[cfg(not(loom))]
pub mod twins;
pub mod vcpu;
pub mod views;
pub mod violation;
pub mod walk;
pub mod window;

pub use access::{Access, AccessKind, FaultCode, PageFault};
pub use addr::{Gfn, Gpa, Gva, Mfn, Mpa, PAGE_SHIFT, PAGE_SIZE};
pub use coherence::{Coherence, NoVcpus, Shootdown};
pub use collapse::{Collapser, HugeStats, NotCollapsed};
pub use explain::Explanation;
pub use fault::Outcome;
pub use format::{Mode, PHYSICAL_BITS};
pub use machine::Machine;
pub use paging::{BadPdpte, Flush, NotLoaded};
pub use physical::{Beyond, NotReached, Width};
pub use pool::{NotTaken, PersistentMap, WindowStats};
pub use pressure::Pressure;
pub use reclaim::{Shortage, SwapFailed};
pub use rules::{Rule, Rules};
pub use shadow::refill::Refill;
pub use shadow::roots::FIRMWARE_SLOT;
pub use tlb::{CodeFrame, Miss, SoftTlb, TlbKind};
pub use vcpu::{FaultStats, Vcpu};
pub use views::Views;
pub use violation::Violation;
pub use walk::{Refusal, Touch, Translation};
pub use window::{Context, LocalStack};

use bucket::Buckets;
use collapse::Collapses;
use external::{Exports, External};
use frames::{Draw, FrameKind, Frames, Host, NoHost};
use guest_tlb::GuestTlb;
use lru::Lru;
use p2m::{P2m, PageState};
use pool::Pool;
use reclaim::Background;
use records::{Clock, NoClock, Records};
use shadow::large::Larges;
use shadow::pages::Pages;
use shadow::stores::Stores;
use shadow::{Roots, track};
use swap::{NoSwap, SwapDevice, SwapMap};
use sync::{Arc, AtomicU64, Lock, Ordering};
use views::Windows;

/// The fewest shadow pages a guest can run with: an instruction may need several at once (two operands that each
/// cross a page, code and stack, at two levels). Loom looks at every one, and a model's guest has one table.
pub const SHADOW_PAGES_MIN: u32 = if cfg!(loom) { 2 } else { 64 };
/// The fewest roots: each vCPU may have two loaded.
pub const ROOTS_MIN_PER_VCPU: u32 = 4;

/// Sizes and constants of one guest's MMU.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Pages of guest memory, from gfn 0; at most 2^24.
    pub guest_pages: u32,
    /// The first of them are low memory: never reclaimed, and served whenever they want a frame.
    pub low_pages: u32,
    /// Frames at the start of the machine that are not ours (firmware).
    pub reserved_frames: u32,
    /// The most shadow pages at once; raised to [`SHADOW_PAGES_MIN`].
    pub shadow_pages_max: u32,
    /// The most roots at once; raised to [`ROOTS_MIN_PER_VCPU`] for each vCPU.
    pub roots_max: u32,
    /// What every root holds at index [`FIRMWARE_SLOT`] of its PML4, 0 for nothing.
    pub firmware_entry: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The last [`Config::guest_pages`] frames of the machine are homes of exported pages (see external).
    pub homes: bool,
    /// The [`Config::block_frames`] before those are of blocks, in which ranges of guest memory are gathered (see collapse).
    pub blocks: bool,
    /// All pages share one bucket of the reverse map: its lock, and its gate. To see what many are good for.
    pub one_bucket: bool,
}

impl Config {
    /// A machine with so many pages of guest memory, one vCPU, and otherwise as little as can be: no low memory, no firmware, the
    /// fewest shadow pages and roots.
    pub const fn of_pages(guest_pages: u32) -> Config {
        Config {
            guest_pages,
            low_pages: 0,
            reserved_frames: 0,
            shadow_pages_max: 0,
            roots_max: 0,
            firmware_entry: 0,
            vcpus: 1,
            homes: false,
            blocks: false,
            one_bucket: false,
        }
    }

    /// Frames that the machine must have more for blocks, if it has any: one for each page of a whole range of guest memory, and as
    /// many as it takes to have them aligned.
    pub const fn block_frames(&self) -> u32 {
        let per_range = p2m::TABLE_ENTRIES as u32;
        if self.blocks { self.blocked_pages() + per_range - 1 } else { 0 }
    }

    /// Pages of guest memory that have a frame in a block.
    const fn blocked_pages(&self) -> u32 {
        let per_range = p2m::TABLE_ENTRIES as u32;
        if self.blocks { self.guest_pages / per_range * per_range } else { 0 }
    }

    /// Frames that shadow tables may take at most, roots included.
    pub fn table_frames_max(&self) -> u32 {
        let raised = self.raised();
        raised.shadow_pages_max + 2 * raised.roots_max
    }

    fn raised(mut self) -> Config {
        self.shadow_pages_max = self.shadow_pages_max.max(SHADOW_PAGES_MIN);
        self.roots_max = self.roots_max.max(ROOTS_MIN_PER_VCPU * self.vcpus.max(1));
        self
    }
}

/// The MMU of one guest. Shared by all its vCPUs' threads.
#[derive(Debug)]
pub struct Mmu {
    config: Config,
    rules: Rules,
    /// As the hardware sees it, and the software TLB.
    hardware: Machine,
    /// As VMM code sees it that reads and writes shadow tables.
    machine: Machine,
    windows: Windows,
    frames: Frames,
    p2m: P2m,
    buckets: Buckets,
    coherence: Coherence,
    pages: Pages,
    roots: Lock<Roots>,
    unsync: Lock<Vec<track::Unsync>>,
    stores: Stores,
    pool: Pool,
    lru: Lru,
    swap: SwapMap,
    records: Records,
    exports: Exports,
    background: Background,
    collapses: Collapses,
    larges: Larges,
    clock: Box<dyn Clock>,
    host: Box<dyn Host>,
    guest_tlb: Option<Box<GuestTlb>>,
    evictions: AtomicU64,
    tracked_stores: AtomicU64,
}

/// What the MMU holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Frames in the machine, reserved ones included.
    pub frames_total: u32,
    /// Frames that an ordinary taker could still have.
    pub frames_free: u32,
    /// The most frames that the host may have to back.
    pub budget: u32,
    /// Those that it may be backing.
    pub frames_used: u32,
    /// Guest pages that have a frame.
    pub resident: u32,
    /// Guest pages that are in swap.
    pub swapped: u32,
    /// Guest pages that the guest has given up.
    pub ballooned: u32,
    /// Pages read back because somebody wanted them, so far.
    pub refaults: u64,
    /// Pages written to swap so far.
    pub swap_outs: u64,
    /// Writes to swap so far, each of adjacent pages.
    pub swap_writes: u64,
    /// Pages dropped so far that were zeros.
    pub zero_drops: u64,
    /// Pages dropped so far that swap had a good copy of.
    pub clean_drops: u64,
    /// Times so far that a vCPU had to reclaim for itself.
    pub direct_reclaims: u64,
    /// Times so far that a vCPU slept at the gate of a page that was changing hands.
    pub gate_waits: u64,
    /// Times so far that a vCPU waited for a page to be brought in.
    pub page_waits: u64,
    /// Invalidations so far.
    pub invalidations: u64,
    /// Times so far that pages were not to be had by somebody who may not sleep.
    pub would_blocks: u64,
    /// Shadow pages in use.
    pub shadow_pages: u32,
    /// Shadow pages evicted so far.
    pub evictions: u64,
    /// Emulated stores to shadowed tables, applied to their shadows.
    pub tracked_stores: u64,
    /// Guest tables that are unsync.
    pub unsync: u32,
}

impl Mmu {
    /// An MMU over `machine`; `shootdown` kicks vCPUs. It has no swap, no clock, and gives nothing back to the host: see
    /// [`Mmu::with_swap`] and its kin.
    pub fn new(machine: Machine, config: Config, shootdown: Box<dyn Shootdown>) -> Mmu {
        let config = config.raised();
        let homes = if config.homes { config.guest_pages.min(machine.frames()) } else { 0 };
        let blocks = config.blocked_pages().min(machine.frames() - homes);
        let before_homes = machine.frames() - homes;
        // Blocks begin where a range would.
        let aligned = if blocks > 0 { p2m::TABLE_ENTRIES as u32 } else { 1 };
        let pool = (before_homes - blocks) / aligned * aligned;
        // Who waits for an importer keeps a gate closed for long: it is for that page alone, then.
        let gated = if config.homes { config.guest_pages.saturating_mul(16) } else { config.guest_pages };
        Mmu {
            frames: Frames::with_areas(
                pool,
                config.reserved_frames,
                config.low_pages.min(config.guest_pages),
                (before_homes - pool, homes),
            ),
            exports: Exports::new(Mfn(before_homes), homes),
            lru: Lru::new(machine.frames()),
            swap: SwapMap::new(Box::new(NoSwap)),
            records: Records::new(),
            background: Background::new(),
            collapses: Collapses::default(),
            larges: Larges::new(config.blocked_pages() / p2m::TABLE_ENTRIES as u32),
            clock: Box::new(NoClock),
            host: Box::new(NoHost(machine.clone())),
            hardware: machine.clone(),
            windows: Windows::pinned(machine.clone()),
            machine,
            p2m: if config.blocks {
                P2m::new(config.guest_pages).with_ranges()
            } else {
                P2m::new(config.guest_pages)
            },
            buckets: if config.one_bucket { Buckets::one() } else { Buckets::new(gated) },
            coherence: Coherence::new(config.vcpus, shootdown),
            pages: Pages::new(config.shadow_pages_max),
            roots: Lock::new(lock_order::ROOTS, Roots::default()),
            unsync: Lock::new(lock_order::UNSYNC, Vec::new()),
            stores: Stores::default(),
            pool: Pool::new(pool::SLOTS),
            evictions: AtomicU64::new(0),
            tracked_stores: AtomicU64::new(0),
            rules: Rules::default(),
            guest_tlb: None,
            config,
        }
    }

    /// The same, by these rules. Before anything uses it.
    pub fn with_rules(mut self, rules: Rules) -> Mmu {
        self.rules = rules;
        self.coherence.set_rules(rules);
        self.frames.set_rules(rules);
        self.buckets.set_rules(rules);
        self
    }

    /// Has actors of a simulation refused a frame once in `times` that they want one and have no right to the reserve, though there is
    /// one; never for 0.
    pub fn refuse_frames(&self, times: u32) {
        self.frames.refuse_one_in(times);
    }

    /// The rules in force.
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// The same, with a swap device.
    pub fn with_swap(self, device: Box<dyn SwapDevice>) -> Mmu {
        Mmu { swap: SwapMap::new(device), ..self }
    }

    /// The same, with a clock for its records.
    pub fn with_clock(self, clock: Box<dyn Clock>) -> Mmu {
        Mmu { clock, ..self }
    }

    /// The same, with somebody who reaches importers.
    pub fn with_external(mut self, outside: Box<dyn External>) -> Mmu {
        self.exports.outside = outside;
        self
    }

    /// The same, with mapped windows. Before anybody touched memory.
    pub fn with_views(self, views: Arc<dyn Views>) -> Mmu {
        Mmu { machine: views.tables(), windows: Windows::mapped(views), ..self }
    }

    /// The same, with a pool of so many window slots.
    pub fn with_window_slots(self, slots: u32) -> Mmu {
        Mmu { pool: Pool::new(slots.max(1)), ..self }
    }

    /// The same, with a host that takes frames back.
    pub fn with_host(self, host: Box<dyn Host>) -> Mmu {
        Mmu { host, ..self }
    }

    /// The MMU's side of vCPU `id` (below [`Config::vcpus`]), run by hardware: paging off, as after reset.
    pub fn vcpu(&self, id: u32) -> Vcpu {
        debug_assert!(id < self.config.vcpus, "vCPU {id} of {}", self.config.vcpus);
        Vcpu::new(id, None, self.rules)
    }

    /// The same for a vCPU that is interpreted, with a TLB of that kind.
    pub fn soft_vcpu(&self, id: u32, kind: TlbKind) -> Vcpu {
        debug_assert!(id < self.config.vcpus, "vCPU {id} of {}", self.config.vcpus);
        Vcpu::new(id, Some(SoftTlb::new(kind, self.rules)), self.rules)
    }

    /// The flush clock and ledger.
    pub fn coherence(&self) -> &Coherence {
        &self.coherence
    }

    /// The reverse map and the gates.
    pub fn buckets(&self) -> &Buckets {
        &self.buckets
    }

    /// The guest-physical map.
    pub fn p2m(&self) -> &P2m {
        &self.p2m
    }

    /// The limits in force.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The records of invalidations.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// What is in use now.
    pub fn usage(&self) -> Usage {
        let counts = self.frames.counts();
        let pages = self.p2m.counts();
        let (swap, reclaim) = (self.swap.stats(), self.reclaim_stats());
        Usage {
            frames_total: self.frames.total(),
            frames_free: counts.available,
            budget: counts.budget,
            frames_used: counts.backed,
            resident: pages.resident,
            swapped: pages.swapped,
            ballooned: pages.ballooned,
            refaults: reclaim.refaults,
            swap_outs: swap.pages_written,
            swap_writes: swap.writes,
            zero_drops: reclaim.zero_drops,
            clean_drops: reclaim.clean_drops,
            direct_reclaims: reclaim.direct,
            gate_waits: reclaim.gate_waits,
            page_waits: reclaim.page_waits,
            invalidations: self.records.count(),
            would_blocks: self.records.would_blocks(),
            shadow_pages: self.pages.in_use(),
            evictions: self.evictions.load(Ordering::Relaxed),
            tracked_stores: self.tracked_stores.load(Ordering::Relaxed),
            unsync: self.unsync.lock().len() as u32,
        }
    }

    /// Takes the page for a device: it is never memory. Only before anybody touched it; false otherwise.
    pub fn make_device(&self, gfn: Gfn) -> bool {
        matches!(self.p2m.lookup(gfn), PageState::Device)
            || self.p2m.transition(gfn, PageState::Zero, PageState::Device)
    }

    /// Gives up the `count` least recently used shadow pages, for memory pressure. Their frames are used for other
    /// shadow pages first. Says how many went. Called with no lock held.
    pub fn evict_shadow(&self, count: u32) -> u32 {
        lock_order::assert_may_sleep();
        self.evict(count as usize) as u32
    }

    /// Sets how many frames the guest and its tables may have at once. Over it, the background thread makes frames free
    /// and gives them back; that takes a while.
    ///
    /// # Errors
    ///
    /// When so few are not enough to run the guest, or there are not so many.
    pub fn set_budget(&self, frames: u32) -> Result<(), BudgetRefused> {
        let (asked, least, most) = (frames, self.budget_min(), self.budget_max());
        if frames < least {
            return Err(BudgetRefused::TooSmall { asked, least });
        }
        if frames > most {
            return Err(BudgetRefused::TooLarge { asked, most });
        }
        self.frames.set_budget(frames);
        // Beyond a share of it, and what low memory leaves, tables would have no pages to map.
        self.pages.set_limit((frames / TABLE_SHARE).min(frames - least + SHADOW_PAGES_MIN));
        self.background.want();
        Ok(())
    }

    /// The smallest budget: low memory, what tables cannot do without, and room for a few pages.
    pub fn budget_min(&self) -> u32 {
        let low = self.config.low_pages.min(self.config.guest_pages);
        low + SHADOW_PAGES_MIN + 2 * self.config.roots_max + BUDGET_HEADROOM
    }

    /// The largest budget: all that the machine has. It is enough for the whole guest and its tables.
    pub fn budget_max(&self) -> u32 {
        self.frames.budget_max()
    }

    /// Where a page is, giving it a zeroed frame if it has never had one. `Zero` only when no frame is left.
    #[inline]
    pub(crate) fn resident(&self, gfn: Gfn) -> PageState {
        match self.p2m.lookup(gfn) {
            PageState::Zero => self.populate(gfn),
            state => state,
        }
    }

    #[cold]
    fn populate(&self, gfn: Gfn) -> PageState {
        let draw = if scope::MemAlloc::is_entered() { Draw::Reserve } else { Draw::Ordinary };
        let Some(mfn) = self.take_frame(FrameKind::Guest(gfn), draw) else { return self.p2m.lookup(gfn) };
        self.lru_add(gfn, mfn);
        if !self.p2m.transition(gfn, PageState::Zero, PageState::Resident(mfn)) {
            self.lru.remove([mfn]);
            self.frames.release(mfn);
        }
        self.p2m.lookup(gfn)
    }

    /// A frame of zeros.
    pub(crate) fn take_frame(&self, kind: FrameKind, draw: Draw) -> Option<Mfn> {
        let fresh = self.frames.allocate(kind, draw)?;
        if matches!(kind, FrameKind::Shadow(_) | FrameKind::Root(_)) {
            self.windows.open_table(fresh.mfn, true);
        }
        if !fresh.zeroed {
            self.windows.with_frame(fresh.mfn, Machine::clear);
        }
        if fresh.low {
            self.background.want();
        }
        Some(fresh.mfn)
    }

    /// Gives back the frame of a table, as [`Frames::release`] does.
    pub(crate) fn release_table(&self, mfn: Mfn) {
        self.windows.open_table(mfn, false);
        self.frames.release(mfn);
    }

    /// The most window mappings that a context of that class has had open at once.
    pub fn window_depth(&self, context: Context) -> u32 {
        self.windows.deepest(context)
    }
}

/// Shadow tables may take one frame in so many of the budget.
const TABLE_SHARE: u32 = 4;
/// Frames that the smallest budget leaves to high memory.
const BUDGET_HEADROOM: u32 = 128;

/// A budget that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BudgetRefused {
    /// The guest could not run.
    #[error(
        "{} KiB of frames are too few for this guest: at least {} KiB, for its low memory and its tables",
        u64::from(*asked) * 4, u64::from(*least) * 4
    )]
    TooSmall {
        /// Frames asked for.
        asked: u32,
        /// The least.
        least: u32,
    },
    /// There are not so many.
    #[error(
        "{} KiB of frames are more than there are: at most {} KiB, which all of this guest's memory and its tables have room in",
        u64::from(*asked) * 4, u64::from(*most) * 4
    )]
    TooLarge {
        /// Frames asked for.
        asked: u32,
        /// All there are.
        most: u32,
    },
}
