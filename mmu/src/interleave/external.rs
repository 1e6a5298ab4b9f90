//! Loom's models of importers: attach, invalidate, fence, by the MMU's own functions. An importer is a thread and a mailbox.
//!
//! **Attach.** A page that was found at home is given to an importer, unless its gate was closed meanwhile. The number of the grant
//! is read in the same critical section, so that of a grant and a telling the importer knows which is later.
//!
//! ```text
//! import                                whoever takes the page
//! seen := sequence; at home?            close
//! lock bucket                           lock bucket, Moving, take the importers off, unlock
//!   gate closed, or closed since seen?  order := ++clock, tell them, wait for them
//!     no: enter it, order := ++clock    the contents go elsewhere; fence
//! unlock                                open
//! the importer has it, if it was told
//!   nothing with a greater number
//! ```
//!
//! Twins: the gate is not asked; it is asked before the bucket is locked; the number is read once the bucket is unlocked.
//!
//! **Fence.** Where the page comes back to its home, the fence of its last leaving is over: it would else take what has just been
//! brought in. Twin: the page moves on before the host has punched its hole.
//!
//! **Answers.** An importer that is late and answers after all has answered what it was asked then. Twin: the answer to an earlier
//! telling counts for this one.
//!
//! **Give up.** An importer gives a page up while another is entered for it. Twin: not in bucket(gfn); the mark of the frame goes with
//! the wrong one, and nobody is ever told.

use std::collections::VecDeque;

use super::*;
use crate::discard::{Discard, NotDiscarded};
use crate::frames::Host;
use crate::interleave::Frame;
use crate::rules::Rules;
use crate::swap::{MemorySwap, SwapSlot};
use crate::sync::{Arc, Monitor};
use crate::{Config, Context, LocalStack, Machine, NoVcpus};

const PAGE: Gfn = Gfn(1);
const PAGES: u32 = 2;
const ANNA: ImporterId = ImporterId(1);
const BERT: ImporterId = ImporterId(2);
/// What a page is said to be in when it is gone; nobody reads it back.
const GONE: SwapSlot = SwapSlot(0);

/// What went to and fro between the guest and an importer.
#[derive(Debug, Default)]
struct Mail {
    /// What the importer has been told and has not heard.
    tellings: VecDeque<u64>,
    /// The greatest number that it has heard with the page's name, and that of its grant.
    told: u64,
    granted: u64,
    /// What it has answered.
    answers: Vec<u64>,
    /// It has gone: it has answered everything.
    gone: bool,
}

/// Who waits for an importer goes on when it has given this answer.
type Answered = fn(&Mail, order: u64) -> bool;

#[derive(Clone, Debug)]
struct Outside {
    mail: Arc<Monitor<Mail>>,
    /// `None`: it is late at once.
    answered: Arc<Lock<Option<Answered>>>,
    /// The home that the page leaves: nobody uses it after the fence.
    home: Arc<Frame>,
    machine: Machine,
    /// The host has not taken back what it was told to.
    postponed: Option<Arc<Lock<Vec<Mfn>>>>,
}

impl External for Outside {
    fn tell(&self, order: u64, _importer: ImporterId, _pages: &[Gfn]) {
        self.mail.lock().tellings.push_back(order);
    }

    fn wait(&self, order: u64) -> Answers {
        let Some(answered) = *self.answered.lock() else { return Answers { slowest: None, late: 1 } };
        let mut mail = self.mail.lock();
        while !(mail.gone || answered(&mail, order)) {
            mail = mail.wait("a letter");
        }
        Answers::default()
    }
}

impl Host for Outside {
    fn give_back(&self, frames: &[Mfn]) -> std::io::Result<()> {
        match &self.postponed {
            Some(postponed) => postponed.lock().extend(frames),
            None => self.punch(frames),
        }
        Ok(())
    }
}

impl Outside {
    /// Loom does not see the memory: who uses a page, and who takes it, each hold the mailbox.
    fn punch(&self, frames: &[Mfn]) {
        let _seen = self.mail.lock();
        frames.iter().for_each(|mfn| self.machine.clear(*mfn));
    }
}

struct World {
    mmu: Mmu,
    outside: Outside,
    segment: SegmentId,
    home: Mfn,
}

/// The page is at home, its first byte is 1, and nobody has it.
fn world(postponed: bool, rules: Rules) -> Arc<World> {
    let machine = Machine::anonymous(8 + PAGES);
    let outside = Outside {
        mail: Arc::new(Monitor::new(lock_order::SLEEPERS, Mail::default())),
        answered: Arc::new(Lock::new(lock_order::FAILED, Some(this_one as Answered))),
        home: Arc::default(),
        machine: machine.clone(),
        postponed: postponed.then(|| Arc::new(Lock::new(lock_order::FAILED, Vec::new()))),
    };
    let mmu = Mmu::new(machine, Config { homes: true, ..Config::of_pages(PAGES) }, Box::new(NoVcpus))
        .with_rules(rules)
        .with_swap(Box::new(MemorySwap::new(PAGES)))
        .with_external(Box::new(outside.clone()))
        .with_host(Box::new(outside.clone()));
    mmu.write_bytes(&LocalStack::new(Context::Host), PAGE.at(0), &[1]).expect("memory");
    let segment = mmu.make_segment(PAGE, 1, true).expect("memory");
    mmu.import_page(BERT, segment, PAGE, false).expect("there are frames");
    mmu.give_up_page(BERT, PAGE);
    let home = mmu.homes_of(PAGE).expect("there are homes");
    Arc::new(World { mmu, outside, segment, home })
}

fn this_one(mail: &Mail, order: u64) -> bool {
    mail.answers.contains(&order)
}

fn any(mail: &Mail, _order: u64) -> bool {
    !mail.answers.is_empty()
}

/// How an importer is entered for a page at home.
type Enter = fn(&World, ImporterId, Sequence) -> Option<u64>;

impl World {
    /// One attempt of an importer to have the page: the number of its grant.
    fn attach(&self, enter: Enter) -> Option<u64> {
        let seen = self.mmu.buckets.sequence();
        if self.mmu.p2m.lookup(PAGE) != PageState::Resident(self.home) {
            return None;
        }
        enter(self, ANNA, seen)
    }

    /// The grant has come to the importer.
    fn grant(&self, order: Option<u64>) {
        let mut mail = self.outside.mail.lock();
        mail.granted = order.unwrap_or(0).max(mail.granted);
    }

    /// The importer uses the page, if it has it.
    fn touch(&self) {
        let mail = self.outside.mail.lock();
        if mail.granted > mail.told {
            self.outside.home.touch();
        }
    }

    /// The importer hears the eldest of what it was told, gives the page up, and says so.
    fn hear(&self) {
        let mut mail = self.outside.mail.lock();
        let Some(order) = mail.tellings.pop_front() else { return };
        mail.told = mail.told.max(order);
        mail.answers.push(order);
        drop(mail);
        self.outside.mail.notify_all();
    }

    /// The importer goes.
    fn part(&self) {
        let mut mail = self.outside.mail.lock();
        (mail.gone, mail.granted) = (true, 0);
        drop(mail);
        self.outside.mail.notify_all();
    }

    fn unmap(&self) -> Unmapped<'_> {
        let closed = self.mmu.begin(Cause::PageOut, &[PAGE], &mut Caller::new(None, May::Sleep));
        closed.and_then(Closed::unmap).expect("it may sleep")
    }

    /// Takes the page for good.
    fn take(&self) {
        let mut settling = self.unmap().shoot_down().expect("it may sleep");
        settling.settle(|_| {
            self.outside.home.hand_on();
            Some(Settled::Swapped(GONE))
        });
        settling.end();
    }
}

fn enter(world: &World, importer: ImporterId, seen: Sequence) -> Option<u64> {
    world.mmu.enter_importer(importer, PAGE, world.home, false, seen)
}

/// Where [`enter`] itself does not ask ([`without_the_gate`]).
fn enter_asking_before_the_lock(world: &World, importer: ImporterId, seen: Sequence) -> Option<u64> {
    let admitted = world.mmu.buckets.lock(PAGE).admits(seen);
    admitted.then(|| enter(world, importer, seen)).flatten()
}

fn enter_reading_the_clock_late(world: &World, importer: ImporterId, seen: Sequence) -> Option<u64> {
    enter(world, importer, seen).map(|_| world.mmu.exports.advance())
}

/// Words of a thread's stack: a page that is moved is copied by way of it.
const STACK: usize = 1 << 15;

fn spawn(body: impl FnOnce() + Send + 'static) -> loom::thread::JoinHandle<()> {
    loom::thread::Builder::new().stack_size(STACK).spawn(body).expect("a thread")
}

/// As [`crate::interleave::explore`] has it, on threads with room.
fn explore(preemptions: impl Into<Option<usize>>, model: impl Fn() + Clone + Send + Sync + 'static) {
    crate::interleave::explore(preemptions, move || spawn(model.clone()).join().unwrap());
}

/// Side by side with `other`, on a thread of its own.
fn beside(world: &Arc<World>, one: impl FnOnce(&World) + Send + 'static, other: impl FnOnce(&World)) {
    let theirs = world.clone();
    let thread = spawn(move || one(&theirs));
    other(world);
    thread.join().unwrap();
}

fn without_the_gate() -> Rules {
    Rules::all_but(Rule::GateAtImport)
}

fn attach_against_taker(rules: Rules, enter: Enter) {
    let world = world(false, rules);
    let importer = move |world: &World| {
        let order = world.attach(enter);
        // The telling may overtake the grant.
        world.hear();
        world.grant(order);
        world.touch();
        world.part();
    };
    beside(&world, importer, World::take);
}

#[test]
fn no_importer_has_a_page_that_goes() {
    explore(3, || attach_against_taker(Rules::default(), enter));
}

#[test]
#[should_panic(expected = "the frame is used after it was handed on")]
fn twin_attached_without_the_gate() {
    explore(3, || attach_against_taker(without_the_gate(), enter));
}

#[test]
#[should_panic(expected = "the frame is used after it was handed on")]
fn twin_attached_where_the_gate_is_asked_before_the_lock() {
    explore(3, || attach_against_taker(without_the_gate(), enter_asking_before_the_lock));
}

#[test]
#[should_panic(expected = "the frame is used after it was handed on")]
fn twin_attached_at_a_time_read_after_the_lock() {
    explore(3, || attach_against_taker(Rules::default(), enter_reading_the_clock_late));
}

/// Whoever takes the page may not sleep, and so may tell nobody.
fn attach_against_taker_that_may_not_sleep(rules: Rules) {
    let world = world(false, rules);
    let importer = |world: &World| {
        world.attach(enter);
    };
    let take = |world: &World| {
        let done = world.mmu.discard(None, [PAGE.0], Discard::Zero, May::NotSleep);
        let blocked = matches!(done, Err(NotDiscarded::WouldBlock(_)));
        assert!(blocked || world.mmu.importers_of(PAGE).is_empty(), "{done:?}, and an importer has the page");
    };
    beside(&world, importer, take);
    let findings = world.mmu.audit();
    assert!(findings.is_empty(), "{findings:?}");
}

#[test]
fn who_may_not_sleep_tells_nobody() {
    explore(3, || attach_against_taker_that_may_not_sleep(Rules::default()));
}

#[test]
#[should_panic(expected = "INV-WAIT-2: about to sleep")]
fn twin_who_may_not_sleep_and_does_not_ask() {
    explore(3, || attach_against_taker_that_may_not_sleep(Rules::all_but(Rule::AskFirst)));
}

/// The page leaves its home while somebody wants it there: what is in it is kept.
fn import_against_fence(postponed: bool) {
    let world = world(postponed, Rules::default());
    // Who has the page says nothing.
    *world.outside.answered.lock() = None;
    let importer = |world: &World| {
        let again = world.mmu.import_page(BERT, world.segment, PAGE, false);
        assert!(again.is_ok(), "{again:?}");
        drop(world.outside.mail.lock());
        world.mmu.give_up_page(BERT, PAGE);
    };
    let take = |world: &World| assert!(world.mmu.page_out(None, &[PAGE]).is_ok(), "swap has room");
    let punch = |world: &World| {
        let frames = world.outside.postponed.iter().flat_map(|frames| std::mem::take(&mut *frames.lock()));
        world.outside.punch(&frames.collect::<Vec<_>>());
    };
    if postponed {
        // The gate is open again, the hole is still to be punched, and the importer comes in between.
        take(&world);
        importer(&world);
        punch(&world);
    } else {
        beside(&world, importer, take);
    }
    let (mut byte, window) = ([0], LocalStack::new(Context::Host));
    world.mmu.read_bytes_sleeping(None, &window, PAGE.at(0), &mut byte).expect("memory");
    assert_eq!(byte, [1], "the contents are lost");
    assert_eq!(world.mmu.imported_pages(), 0);
}

#[test]
fn a_page_that_comes_home_is_not_fenced_away() {
    explore(2, || import_against_fence(false));
}

#[test]
#[should_panic(expected = "the contents are lost")]
fn twin_the_page_moves_on_before_its_hole_is_punched() {
    explore(2, || import_against_fence(true));
}

/// An importer is late, has the page again, and is asked for it again.
fn late_answer(answered: Answered) {
    let world = world(false, Rules::default());
    let first = world.attach(enter);
    world.grant(first);
    *world.outside.answered.lock() = None;
    world.mmu.revoke(&[PAGE]);
    *world.outside.answered.lock() = Some(answered);
    let importer = |world: &World| {
        let order = world.attach(enter);
        world.grant(order);
        world.hear();
        world.touch();
        world.hear();
        world.part();
    };
    beside(&world, importer, World::take);
}

#[test]
fn a_late_answer_is_one_to_what_was_asked_then() {
    explore(3, || late_answer(this_one));
}

#[test]
#[should_panic(expected = "the frame is used after it was handed on")]
fn twin_an_answer_to_an_earlier_telling_counts() {
    explore(3, || late_answer(any));
}

fn give_up(world: &World) {
    world.mmu.give_up_page(ANNA, PAGE);
}

fn give_up_without_the_bucket(world: &World) {
    let exports = &world.mmu.exports;
    let left = exports.take_holders(PAGE).len();
    assert_eq!(left, 1, "she alone has it");
    world.mmu.frames.change_flags(world.home, EXTERNAL, 0);
}

fn give_up_against_attach(give_up: fn(&World)) {
    let world = world(false, Rules::default());
    assert!(world.attach(enter).is_some());
    let enter_another = |world: &World| {
        let seen = world.mmu.buckets.sequence();
        // Where the twin has both, it would not be she alone.
        if world.mmu.importers_of(PAGE).is_empty() {
            assert!(enter(world, BERT, seen).is_some(), "no gate is closed");
        }
    };
    beside(&world, give_up, enter_another);
    let findings = world.mmu.audit();
    assert!(findings.is_empty(), "{findings:?}");
}

#[test]
fn a_page_that_one_gives_up_and_another_gets_is_marked() {
    explore(None, || give_up_against_attach(give_up));
}

#[test]
#[should_panic(expected = "INV-EXT-1")]
fn twin_given_up_without_the_bucket() {
    explore(None, || give_up_against_attach(give_up_without_the_bucket));
}
