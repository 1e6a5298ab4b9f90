//! Loom's models of the flush clock and the ledger.
//!
//! **Shootdown.** A vCPU has a translation in its TLB whose spte is gone and stamped. Somebody shoots down, and somebody
//! asks the ledger and hands the frame on.
//!
//! ```text
//! vCPU                                  whoever hands the frame on
//! mode := in guest                      request := clock + 1
//! request > flushed? flush              flushed > stamp? or
//! use the frame, if the TLB has it      request > stamp, and then mode = outside?
//! mode := outside                         yes: the frame is somebody else's
//! ```
//!
//! The same with two vCPUs that shoot each other down.
//!
//! Twins: the mode is looked at before the request (it may enter in between, on an older request); the request is
//! looked at before the mode is stored; the mode's store drains no store buffer.
//!
//! **A removal without a stamp.** INVLPG finds the spte gone. Whoever took it has not stamped it yet.
//!
//! ```text
//! vCPU (INVLPG)                         remover
//! spte there? take it, stamp            removing += 1
//! removing > 0, or last removal         spte := 0
//!   > flushed? request a flush          last removal max= stamp + 1
//! (enter) the TLB has the page? wrong   removing -= 1
//! ```
//!
//! Twins: `removing` not looked at, or looked at last.
//!
//! **The stamp.** It is taken by an atomic change of the clock's word, after the spte's store.
//!
//! ```text
//! vCPU (in the guest)                   remover
//! epoch := ++clock, flush               spte := 0
//! walk: spte there? the TLB has it      stamp := clock, removing--
//! flushed := epoch                      flushed > stamp? the frame is somebody else's
//! use the frame, if the TLB has it
//! ```
//!
//! Twin: the stamp is what the clock was before the store. A flush that came between covers it, and the walk after that
//! read the old spte.
//!
//! **The bus.** One vCPU has locked it for an access that is a load and a store; another makes its own in the guest.
//!
//! ```text
//! vCPU                                  whoever locks the bus
//! mode := in guest                      bus := locked
//! bus locked? outside again; wait       mode = in guest? wait
//! word += 1                             load the word; store it + 1
//! mode := outside                       bus := free
//! ```
//!
//! Twins: the bus is not looked at, or before the mode is stored; nobody is waited for.

use super::*;
use crate::interleave::{Frame, explore};
use crate::sync::Arc;

const STAMPED: u64 = 1;

/// A ledger of one vCPU, and the one frame in question.
struct World {
    ledger: Coherence,
    spte: AtomicU32,
    frame: Frame,
}

fn world(spte: u32) -> Arc<World> {
    let ledger = Coherence::new(1, Box::new(NoVcpus));
    Arc::new(World { ledger, spte: AtomicU32::new(spte), frame: Frame::default() })
}

impl World {
    fn flush(&self, tlb: &mut bool) {
        let epoch = self.ledger.begin_flush();
        *tlb = false;
        self.ledger.end_flush(0, epoch);
    }

    /// One stay in the guest with the page in the TLB, entered by way of `enter`.
    fn stay(&self, tlb: &mut bool, enter: fn(&Coherence) -> bool) {
        if enter(&self.ledger) {
            self.flush(tlb);
        }
        if *tlb {
            self.frame.touch();
        }
        self.ledger.leave_guest(0);
    }
}

fn enter(ledger: &Coherence) -> bool {
    ledger.enter_guest(0)
}

fn enter_looking_first(ledger: &Coherence) -> bool {
    let state = &ledger.vcpus[0];
    let owes = state.requested.load(Ordering::SeqCst) > state.flushed.load(Ordering::SeqCst);
    state.mode.store(VcpuMode::InGuest as u32, Ordering::SeqCst);
    owes
}

fn enter_undrained(ledger: &Coherence) -> bool {
    let state = &ledger.vcpus[0];
    state.mode.store(VcpuMode::InGuest as u32, Ordering::Release);
    state.requested.load(Ordering::SeqCst) > state.flushed.load(Ordering::SeqCst)
}

fn covers(ledger: &Coherence) -> bool {
    ledger.covered(STAMPED)
}

fn covers_mode_first(ledger: &Coherence) -> bool {
    let state = &ledger.vcpus[0];
    let outside = state.mode.load(Ordering::SeqCst) == VcpuMode::Outside as u32;
    state.flushed.load(Ordering::SeqCst) > STAMPED
        || (outside && state.requested.load(Ordering::SeqCst) > STAMPED)
}

/// One who removes, shoots down and hands on, while the vCPU stays in the guest twice.
fn shoot_and_hand_on(enter: fn(&Coherence) -> bool) {
    let world = world(1);
    let vcpu = {
        let world = world.clone();
        thread::spawn(move || {
            let mut tlb = true;
            world.stay(&mut tlb, enter);
            world.stay(&mut tlb, enter);
        })
    };
    let removal = world.ledger.removal();
    world.spte.store(0, Ordering::Release);
    let stamp = removal.stamp_leaf(Mfn(1));
    assert_eq!(stamp, STAMPED);
    world.ledger.shoot_down(None);
    world.frame.hand_on();
    vcpu.join().unwrap();
}

/// One who asks for the flush and one who only asks the ledger, as who looks for a free slot does.
fn ask_while_another_shoots(covers: fn(&Coherence) -> bool) {
    let world = world(0);
    let stamp = world.ledger.removal().stamp_leaf(Mfn(1));
    assert_eq!(stamp, STAMPED);
    let vcpu = {
        let world = world.clone();
        thread::spawn(move || world.stay(&mut true, enter))
    };
    let shooter = {
        let world = world.clone();
        thread::spawn(move || world.ledger.request_flush(0))
    };
    if covers(&world.ledger) {
        world.frame.hand_on();
    }
    vcpu.join().unwrap();
    shooter.join().unwrap();
}

#[test]
fn nothing_is_used_after_a_shootdown() {
    explore(None, || shoot_and_hand_on(enter));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_a_request_looked_at_before_the_mode_is_stored() {
    explore(None, || shoot_and_hand_on(enter_looking_first));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_a_mode_that_waits_in_the_store_buffer() {
    explore(None, || shoot_and_hand_on(enter_undrained));
}

#[test]
fn nothing_is_used_after_the_ledger_said_so() {
    explore(None, || ask_while_another_shoots(covers));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_a_mode_looked_at_before_the_request() {
    explore(None, || ask_while_another_shoots(covers_mode_first));
}

/// Of two vCPUs each takes a page away that the other has in its TLB, from outside the guest, and then enters.
fn shoot_each_other() {
    let world = Arc::new((Coherence::new(2, Box::new(NoVcpus)), [Frame::default(), Frame::default()]));
    let run = |own: u32| {
        let world = world.clone();
        move || {
            let (ledger, frames) = &*world;
            ledger.removal().stamp_leaf(Mfn(own));
            ledger.shoot_down(Some(own));
            frames[own as usize].hand_on();
            if ledger.enter_guest(own) {
                let epoch = ledger.begin_flush();
                ledger.end_flush(own, epoch);
            } else {
                frames[1 - own as usize].touch();
            }
            ledger.leave_guest(own);
        }
    };
    let other = thread::spawn(run(1));
    run(0)();
    other.join().unwrap();
}

#[test]
fn two_that_shoot_each_other_down_both_come_through() {
    explore(4, shoot_each_other);
}

fn owes(ledger: &Coherence) -> bool {
    ledger.owes_flush(0)
}

fn owes_for_stamps_alone(ledger: &Coherence) -> bool {
    ledger.clock.last_removal.load(Ordering::SeqCst) > ledger.flushed(0)
}

fn owes_for_stamps_first(ledger: &Coherence) -> bool {
    owes_for_stamps_alone(ledger) || ledger.clock.is_removing()
}

/// An INVLPG that may find its spte gone, then an entry.
fn invalidate(owes: fn(&Coherence) -> bool) {
    let world = world(1);
    let remover = {
        let world = world.clone();
        thread::spawn(move || {
            let removal = world.ledger.removal();
            if world.spte.swap(0, Ordering::AcqRel) == 1 {
                removal.stamp_leaf(Mfn(1));
            }
        })
    };
    let mut tlb = true;
    if world.spte.load(Ordering::Acquire) == 1 {
        let removal = world.ledger.removal();
        if world.spte.swap(0, Ordering::AcqRel) == 1 {
            removal.stamp_leaf(Mfn(1));
        }
    }
    if owes(&world.ledger) {
        world.ledger.request_flush(0);
    }
    if world.ledger.enter_guest(0) {
        world.flush(&mut tlb);
    }
    assert!(!tlb, "the guest has a translation that it invalidated");
    remover.join().unwrap();
}

#[test]
fn an_invlpg_owes_the_flush_of_a_removal_without_a_stamp() {
    explore(None, || invalidate(owes));
}

#[test]
#[should_panic(expected = "that it invalidated")]
fn twin_only_stamps_are_owed() {
    explore(None, || invalidate(owes_for_stamps_alone));
}

#[test]
#[should_panic(expected = "that it invalidated")]
fn twin_stamps_looked_at_before_removals_under_way() {
    explore(None, || invalidate(owes_for_stamps_first));
}

fn stamp(removal: Removal<'_>) -> u64 {
    removal.stamp_leaf(Mfn(1))
}

fn stamp_from_before(removal: Removal<'_>) -> u64 {
    let stamp = removal.word >> REMOVING_BITS;
    removal.ledger.clock.last_removal.fetch_max(stamp + 1, Ordering::SeqCst);
    stamp
}

/// A removal, while the vCPU flushes in the guest and walks again.
fn flush_and_walk(stamp: fn(Removal<'_>) -> u64) {
    let world = world(1);
    let vcpu = {
        let world = world.clone();
        thread::spawn(move || {
            let mut tlb = true;
            let _ = world.ledger.enter_guest(0);
            let epoch = world.ledger.begin_flush();
            tlb &= world.spte.load(Ordering::Acquire) == 1;
            world.ledger.end_flush(0, epoch);
            if tlb {
                world.frame.touch();
            }
            world.ledger.leave_guest(0);
        })
    };
    let removal = world.ledger.removal();
    world.spte.store(0, Ordering::Release);
    let stamp = stamp(removal);
    if world.ledger.covered(stamp) {
        world.frame.hand_on();
    }
    vcpu.join().unwrap();
}

#[test]
fn a_flush_covers_only_what_it_came_after() {
    explore(None, || flush_and_walk(stamp));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_a_stamp_from_before_the_store() {
    explore(None, || flush_and_walk(stamp_from_before));
}

fn enter_without_the_bus(ledger: &Coherence) -> bool {
    ledger.set_inside(&ledger.vcpus[0]);
    false
}

fn enter_after_the_bus(ledger: &Coherence) -> bool {
    while ledger.bus.load(Ordering::SeqCst) {
        thread::yield_now();
    }
    enter_without_the_bus(ledger)
}

fn lock(ledger: &Coherence) -> BusLock<'_> {
    ledger.lock_bus(1)
}

fn lock_at_once(ledger: &Coherence) -> BusLock<'_> {
    ledger.bus.store(true, Ordering::SeqCst);
    BusLock::taken(ledger)
}

/// Two locked additions to a word, one of which is none to the hardware.
fn add_by_the_bus(enter: fn(&Coherence) -> bool, lock: fn(&Coherence) -> BusLock<'_>) {
    let world = Arc::new((Coherence::new(2, Box::new(NoVcpus)), AtomicU32::new(0)));
    let vcpu = {
        let world = world.clone();
        thread::spawn(move || {
            let (ledger, word) = &*world;
            let _ = enter(ledger);
            word.fetch_add(1, Ordering::SeqCst);
            ledger.leave_guest(0);
        })
    };
    let (ledger, word) = &*world;
    let bus = lock(ledger);
    let old = word.load(Ordering::Acquire);
    word.store(old + 1, Ordering::Release);
    drop(bus);
    vcpu.join().unwrap();
    assert_eq!(word.load(Ordering::SeqCst), 2, "an addition is lost");
}

#[test]
fn a_locked_bus_is_nobody_elses() {
    explore(None, || add_by_the_bus(enter, lock));
}

#[test]
#[should_panic(expected = "an addition is lost")]
fn twin_entering_without_a_look_at_the_bus() {
    explore(None, || add_by_the_bus(enter_without_the_bus, lock));
}

#[test]
#[should_panic(expected = "an addition is lost")]
fn twin_the_bus_looked_at_before_the_mode_is_stored() {
    explore(None, || add_by_the_bus(enter_after_the_bus, lock));
}

#[test]
#[should_panic(expected = "an addition is lost")]
fn twin_the_bus_taken_without_waiting() {
    explore(None, || add_by_the_bus(enter, lock_at_once));
}
