//! The page fault, from end to end.
//!
//! Story: a backend calls [`Mmu::fault`] for each page fault of guest code and acts on the [`Outcome`]. This
//! function shows every branch; its helpers are straight.

use std::sync::atomic::Ordering::Relaxed;

use crate::Mmu;
use crate::access::{Access, AccessKind, PageFault};
use crate::addr::{Gfn, Gpa, Gva};
use crate::bucket::Asker;
use crate::events::Event;
use crate::lock_order;
use crate::reclaim::Shortage;
use crate::records::GateWait;
use crate::shadow::leaf::Mapped;
use crate::vcpu::{Ask, Hunger, Vcpu};
use crate::walk::{Refusal, Touch};

/// How often in a row a vCPU meets the closed gate of one page before it asks to be let through. A fault in a range that is
/// invalidated all the time so ends within one round more than this, and the page stays until guest code has run with it or
/// those who must have it have lost patience. A vCPU asks for one page at a time: an instruction that needs several of such a
/// range has that promise for each, and none for all together.
pub const GATE_PATIENCE: u32 = 4;
/// Races a fault may lose before it goes back to the guest to fault again. Each loss is another's progress.
pub const RACES_MAX: u32 = 16;

/// What is to be done about a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Run on: the access will now succeed.
    Fixed,
    /// Run on: the spte was already right. Another vCPU was faster, or a TLB had an older one.
    Spurious,
    /// The guest must see this fault.
    Guest(PageFault),
    /// The address is a device's: emulate the instruction.
    Mmio(Gpa),
    /// A store to a frame whose stores must be seen: emulate the instruction.
    Emulate(Gpa),
    /// The frame is changing hands: sleep ([`Mmu::wait_at_gate`]) and run on.
    Gate(Gfn),
    /// No frame could be had for this page.
    Need(Gfn),
    /// Too many races lost: run on and fault again.
    Again,
}

impl Mmu {
    /// Deals with a page fault of `vcpu` at `gva`. Called with no lock held and nothing mapped; may sleep (only
    /// to shoot down shadow pages whose slots are used anew).
    pub fn fault(&self, vcpu: &Vcpu, gva: Gva, access: Access) -> Outcome {
        lock_order::assert_may_sleep();
        vcpu.count(|s| s.taken += 1);
        let outcome = self.try_fault(vcpu, gva, access);
        match outcome {
            // A page that is on its way is behind a gate too, whichever of the two was seen.
            Outcome::Gate(gfn) | Outcome::Need(gfn) => self.meet_gate(vcpu, gfn),
            Outcome::Again => self.lose_race(vcpu),
            _ => self.pass_gate(vcpu),
        }
        outcome
    }

    /// [`Mmu::fault`], and then sleep for what it asks for: the outcome is never [`Outcome::Gate`] nor [`Outcome::Need`] but
    /// [`Outcome::Again`]. All of it is one stay outside the guest: a vCPU that went in between would seem to have had
    /// something else to do than the page.
    ///
    /// # Errors
    ///
    /// When a page cannot be brought in.
    pub fn fault_sleeping(&self, vcpu: &Vcpu, gva: Gva, access: Access) -> Result<Outcome, Shortage> {
        match self.fault(vcpu, gva, access) {
            Outcome::Gate(gfn) => self.wait_at_gate(vcpu, gfn),
            Outcome::Need(gfn) => self.bring_in(Some(vcpu.id), gfn)?,
            outcome => return Ok(outcome),
        }
        Ok(Outcome::Again)
    }

    fn try_fault(&self, vcpu: &Vcpu, gva: Gva, access: Access) -> Outcome {
        for _ in 0..RACES_MAX {
            let seen = self.buckets.sequence();
            let t = match self.walk(vcpu, gva, access, Touch::Set) {
                Ok(t) => t,
                Err(Refusal::Fault(fault)) => return self.guest_fault(vcpu, fault),
                Err(Refusal::Need(gfn)) => return Outcome::Need(gfn),
            };
            match self.map(vcpu, &t, seen, access) {
                Mapped::Done { writable: false, .. } if access.kind == AccessKind::Write => {
                    if !self.try_unsync(vcpu, t.gpa.gfn(), gva) {
                        return emulate(vcpu, gva, t.gpa);
                    }
                }
                Mapped::Done { changed, .. } => return fixed(vcpu, gva, changed),
                Mapped::Device => {
                    vcpu.count(|s| s.mmio += 1);
                    return Outcome::Mmio(t.gpa);
                }
                Mapped::Gate(gfn) => return Outcome::Gate(gfn),
                Mapped::Need(gfn) => return Outcome::Need(gfn),
                // A walk that allowed the access allows the privilege; the tables changed in between.
                Mapped::Retry | Mapped::Absent => {}
            }
            vcpu.count(|s| s.retried += 1);
        }
        Outcome::Again
    }

    /// A page fault forgets the translation of its address (SDM 4.10.4.1): a kernel that then makes the entry valid
    /// owes no INVLPG.
    pub(crate) fn guest_fault(&self, vcpu: &Vcpu, fault: PageFault) -> Outcome {
        self.forget_address(vcpu, fault.gva);
        vcpu.count(|s| s.guest += 1);
        vcpu.events.borrow_mut().record(fault.gva, Event::GuestFault);
        Outcome::Guest(fault)
    }

    /// Sleeps until the gate of `gfn` is open or has been opened since. Called with no lock held and nothing mapped.
    pub fn wait_at_gate(&self, vcpu: &Vcpu, gfn: Gfn) {
        let began = self.clock.now();
        let has_slept = self.buckets.wait(gfn);
        let slept = self.clock.now() - began;
        if has_slept {
            self.records.push_wait(GateWait { vcpu: vcpu.id, gfn, at: began, nanos: slept });
        }
        self.background.counters.gate_waits.fetch_add(1, Relaxed);
        vcpu.count(|s| {
            s.gate_waits += 1;
            s.gate_nanos_max = s.gate_nanos_max.max(slept);
        });
    }

    /// Counts a closed gate; who has met that of one page too often starves.
    fn meet_gate(&self, vcpu: &Vcpu, gfn: Gfn) {
        let last = vcpu.hunger.get();
        let again = last.gfn == gfn && last.runs < Hunger::ELSEWHERE;
        let met = if again { last.met + 1 } else { 1 };
        let ask = if met < GATE_PATIENCE { Ask::Not } else { Ask::Asked };
        self.set_hunger(vcpu, Hunger { gfn, met, runs: 0, ask });
    }

    /// The fault comes again: whatever was entered in between, it is still the same.
    fn lose_race(&self, vcpu: &Vcpu) {
        vcpu.hunger.set(Hunger { runs: 0, ..vcpu.hunger.get() });
    }

    /// A leaf of the page is there.
    #[inline]
    pub(crate) fn note_filled(&self, vcpu: &Vcpu, gfn: Gfn) {
        let last = vcpu.hunger.get();
        if last.asks_for() == Some(gfn) {
            vcpu.hunger.set(Hunger { ask: Ask::Filled, ..last });
        }
    }

    /// The fault is dealt with, and with it whatever was asked for: a page that is mapped, or a table that was read.
    #[inline]
    fn pass_gate(&self, vcpu: &Vcpu) {
        let last = vcpu.hunger.get();
        if last.met > 0 {
            let ask = if last.ask == Ask::Not { Ask::Not } else { Ask::Filled };
            let elsewhere = last.runs == Hunger::ELSEWHERE;
            let new = if elsewhere { Hunger::default() } else { Hunger { runs: 0, ask, ..last } };
            self.set_hunger(vcpu, new);
        }
    }

    /// Into the guest: marks the vCPU as inside, and says whether it owes a flush, which the caller makes before guest code
    /// runs. Sleeps for one who has locked the bus ([`crate::Coherence::lock_bus`]), takes no lock. Each call counts as a chance for
    /// guest code to run with what was filled, unless [`Mmu::leave_unrun`] follows.
    #[inline]
    pub fn enter(&self, vcpu: &Vcpu) -> bool {
        let last = vcpu.hunger.get();
        if last.met > 0 && last.runs < Hunger::ELSEWHERE {
            vcpu.hunger.set(Hunger { runs: last.runs + 1, ..last });
        }
        self.coherence.enter_guest(vcpu.id)
    }

    /// Out of the guest, some of whose code has run, or none for a fault. Never sleeps; takes [`lock_order::ASKED`] where the
    /// vCPU has asked for a page.
    #[inline]
    pub fn leave(&self, vcpu: &Vcpu) {
        let last = vcpu.hunger.get();
        // It ran with the page, or it has gone on to something else.
        if last.ask == Ask::Filled && last.runs > 0
            || last.ask == Ask::Asked && last.runs == Hunger::ELSEWHERE
        {
            self.set_hunger(vcpu, Hunger { ask: Ask::Not, ..last });
        }
        self.coherence.leave_guest(vcpu.id);
    }

    /// The guest was not entered after all: what the vCPU asks for, it asks for still. Never sleeps, takes no lock.
    pub fn leave_unrun(&self, vcpu: &Vcpu) {
        let last = vcpu.hunger.get();
        vcpu.hunger.set(Hunger { runs: last.runs.saturating_sub(1), ..last });
        self.coherence.leave_guest(vcpu.id);
    }

    /// The vCPU, which is outside, will not run for a while, or not any more: it asks for nothing. Never sleeps; takes
    /// [`lock_order::ASKED`] where it had asked.
    pub fn rest(&self, vcpu: &Vcpu) {
        self.set_hunger(vcpu, Hunger::default());
    }

    /// The only place where a vCPU begins or ceases to ask for a page.
    fn set_hunger(&self, vcpu: &Vcpu, new: Hunger) {
        let (before, after) = (vcpu.hunger.replace(new).asks_for(), new.asks_for());
        if before != after {
            let asker = Asker::Fill(vcpu.id);
            before.into_iter().for_each(|gfn| self.buckets.fed(asker, gfn));
            after.into_iter().for_each(|gfn| self.buckets.starve(asker, gfn));
        }
    }
}

fn emulate(vcpu: &Vcpu, gva: Gva, gpa: Gpa) -> Outcome {
    vcpu.count(|s| s.emulated += 1);
    vcpu.events.borrow_mut().record(gva, Event::Emulated);
    Outcome::Emulate(gpa)
}

#[inline]
pub(crate) fn fixed(vcpu: &Vcpu, gva: Gva, changed: bool) -> Outcome {
    vcpu.events.borrow_mut().record(gva, Event::Filled);
    if changed {
        vcpu.count(|s| s.fixed += 1);
        Outcome::Fixed
    } else {
        vcpu.count(|s| s.spurious += 1);
        Outcome::Spurious
    }
}
