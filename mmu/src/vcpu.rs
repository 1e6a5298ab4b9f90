//! What the MMU keeps for one vCPU: paging mode, CR3 and PDPTEs, loaded roots, window stack, counters.
//!
//! Story: the vCPU's own thread has it and passes it to every call. Nothing here is shared; what other threads
//! need (flush epochs, mode word) is in coherence.

use std::cell::{Cell, RefCell};

use crate::addr::{Gfn, Gpa, Gva};
use crate::events::EventRing;
use crate::format::{Mode, Pdpte};
use crate::rules::Rules;
use crate::shadow::RootRef;
use crate::tlb::{SoftTlb, TlbKind};
use crate::window::{Context, LocalStack};

/// How faults ended, counted as KVM counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultStats {
    /// Faults handed to us.
    pub taken: u64,
    /// An spte was made or widened.
    pub fixed: u64,
    /// The spte was already as it should be.
    pub spurious: u64,
    /// A store to a tracked frame: the instruction must be emulated.
    pub emulated: u64,
    /// Passed on to the guest.
    pub guest: u64,
    /// A device: the instruction must be emulated.
    pub mmio: u64,
    /// Walks begun again because something changed meanwhile.
    pub retried: u64,
    /// Sptes made by INVLPG before anybody faulted.
    pub prefilled: u64,
    /// Guest page tables that went unsync.
    pub unsynced: u64,
    /// Times that it slept at the gate of a page that was changing hands.
    pub gate_waits: u64,
    /// The longest of these sleeps, in nanoseconds.
    pub gate_nanos_max: u64,
}

impl FaultStats {
    /// The sum of two; the longer of two sleeps.
    pub fn plus(self, other: FaultStats) -> FaultStats {
        FaultStats {
            taken: self.taken + other.taken,
            fixed: self.fixed + other.fixed,
            spurious: self.spurious + other.spurious,
            emulated: self.emulated + other.emulated,
            guest: self.guest + other.guest,
            mmio: self.mmio + other.mmio,
            retried: self.retried + other.retried,
            prefilled: self.prefilled + other.prefilled,
            unsynced: self.unsynced + other.unsynced,
            gate_waits: self.gate_waits + other.gate_waits,
            gate_nanos_max: self.gate_nanos_max.max(other.gate_nanos_max),
        }
    }
}

/// How a vCPU stands with the gates.
///
/// A page that is taken between the fill and the access was of no use. So fills do not end the count of closed gates, and who
/// asks to be let through is fed when guest code has run after the fill. That the guest was entered more than once between two
/// faults says that it had something else to do: then the count begins anew.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hunger {
    /// The page whose gate it met last.
    pub gfn: Gfn,
    /// How often in a row that was closed.
    pub met: u32,
    /// How often the guest was entered since the last fault, up to [`Hunger::ELSEWHERE`].
    pub runs: u32,
    pub ask: Ask,
}

impl Hunger {
    /// So many entries without a fault: the guest does not wait for the page.
    pub const ELSEWHERE: u32 = 2;

    /// The page that it asks for.
    pub fn asks_for(self) -> Option<Gfn> {
        (self.ask != Ask::Not).then_some(self.gfn)
    }
}

/// What has become of asking to be let through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Ask {
    #[default]
    Not,
    Asked,
    /// The page is mapped now.
    Filled,
}

/// The MMU's side of one vCPU.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) id: u32,
    rules: Rules,
    pub(crate) mode: Mode,
    pub(crate) cr3: u32,
    pub(crate) pdptes: [Pdpte; 4],
    /// Loaded roots: supervisor, user.
    pub(crate) roots: [Cell<Option<RootRef>>; 2],
    /// What the tags of the software TLB begin with for accesses of a supervisor, of a user; 0 while no root is loaded.
    pub(crate) tags: [Cell<u64>; 2],
    /// A TLB in software: for a vCPU that no hardware runs, or not always.
    pub(crate) tlb: Option<SoftTlb>,
    /// Hardware runs it: what is removed must be flushed from a TLB that only forgets all at once, as it enters.
    pub(crate) hardware: bool,
    pub(crate) window: LocalStack,
    pub(crate) stats: RefCell<FaultStats>,
    pub(crate) hunger: Cell<Hunger>,
    pub(crate) events: RefCell<EventRing>,
    /// Scratch for lists of gfns, kept to spare the allocator.
    pub(crate) scratch: RefCell<Vec<Gfn>>,
}

impl Vcpu {
    pub(crate) fn new(id: u32, tlb: Option<SoftTlb>, rules: Rules) -> Vcpu {
        Vcpu {
            id,
            rules,
            mode: Mode::default(),
            cr3: 0,
            pdptes: [Pdpte::default(); 4],
            roots: [Cell::new(None), Cell::new(None)],
            tags: [Cell::new(0), Cell::new(0)],
            hardware: tlb.is_none(),
            tlb,
            window: LocalStack::new(Context::Vcpu),
            stats: RefCell::new(FaultStats::default()),
            hunger: Cell::default(),
            events: RefCell::new(EventRing::new()),
            scratch: RefCell::new(Vec::new()),
        }
    }

    /// The vCPU's number in the coherence ledger.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its paging mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Its CR3, as last loaded.
    pub fn cr3(&self) -> u32 {
        self.cr3
    }

    /// Its fault counters so far.
    pub fn stats(&self) -> FaultStats {
        *self.stats.borrow()
    }

    /// Gives a vCPU that hardware runs a software TLB too, for stretches of its code that are interpreted.
    pub fn add_tlb(&mut self, kind: TlbKind) {
        self.tlb = Some(SoftTlb::new(kind, self.rules));
    }

    /// Hardware runs it, always or at times.
    pub fn is_in_hardware(&self) -> bool {
        self.hardware
    }

    /// What entries of its software TLB are known by for accesses of privilege `user`, until its paging changes; no entry's
    /// while no root is loaded.
    #[inline]
    pub fn tlb_tag(&self, user: bool) -> u64 {
        self.tags[usize::from(user)].get()
    }

    /// Its software TLB, if it has one.
    pub fn tlb(&self) -> Option<&SoftTlb> {
        self.tlb.as_ref()
    }

    /// Its window stack, for VMM code that runs on this vCPU's thread.
    pub fn window(&self) -> &LocalStack {
        &self.window
    }

    #[inline]
    pub(crate) fn count(&self, change: impl FnOnce(&mut FaultStats)) {
        change(&mut self.stats.borrow_mut());
    }

    /// The page directory that translates `gva`, or `None` where a PDPTE is absent.
    #[inline]
    pub(crate) fn directory(&self, gva: Gva) -> Option<Gfn> {
        if !self.mode.pae {
            return Some(Gpa(u64::from(self.cr3)).gfn());
        }
        let pdpte = self.pdptes[(gva.0 >> 30) as usize];
        pdpte.is_present().then(|| pdpte.gfn())
    }
}
