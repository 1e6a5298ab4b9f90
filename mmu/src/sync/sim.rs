//! One actor at a time, in an order that a seed decides: deterministic simulation.
//!
//! Story: each thread that takes part is an *actor*, and one of them has the baton: it alone runs. At a scheduling point it may
//! hand the baton on, to whom the seed says; where it has to wait it must. Time is virtual: actors say how long their work took
//! ([`work`]), and where everybody waits, it jumps to the moment that the first of them waits for. What happens is written to a
//! log, a line each, with the time and the actor. Same seed, same program, same input: the same log.
//!
//! | actor comes to | it |
//! |---|---|
//! | [`point`], the end of a slice ([`work`]) | may hand the baton on; could go on at once. At a point it may also *stall*: it goes on after a while |
//! | [`spin()`]: a lock that another has, an answer that is not there yet | hands it on, and is looked at again when another has got on |
//! | a condition variable ([`Bed`]), [`sleep`] | hands it on until it is woken or its time has come |
//! | its end ([`ActorGuard`] dropped) | hands it on, and wakes who waits for it |
//!
//! Where the seed's choices are limited ([`Sim::limit_choices`]), all take turns after the last of them, and nobody is interrupted at a point,
//! or stalls.
//!
//! Holds: the baton is with an actor that can run, as long as there is one. Where none can, and no time is waited for, nobody will
//! ever go on. Nor will some who wait for each other, whatever others do; and who has stood at one wait for [`WAIT_NANOS_MAX`] is taken
//! for one of these. Each is reported ([`Stuck`]) and ends the simulation, with what each waits for and who has that (`waits`). To look
//! on draws nothing from the seed and takes no time.
//!
//! Threads that are no actors run as ever. In a process without a simulation each of these calls is one relaxed load.
//!
//! Locks: the simulation's own, a leaf; its log is written under it.
//!
//! Limits: an actor that waits for another in a way that this module does not know of keeps the baton, and the process hangs. What a
//! plain store changes is seen by those who spin when they are looked at next.

mod log;
mod pace;
mod waits;

use std::cell::RefCell;
use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::thread::{self, Thread};
use std::time::Duration;

use log::Log;
pub use log::Logged;
pub use pace::Pace;
use pace::Random;
use rustc_hash::FxHashMap;
pub use waits::{Stuck, Waiter, Why};

use super::wait::{Sort, Thing, Wait};
use crate::lock_order;

/// Nanoseconds of a look at something that is not there yet.
const SPIN_NANOS: u64 = 1000;
/// An actor stalls for less than two to this power of nanoseconds: short stalls as often as long ones.
const STALL_BITS_MAX: u64 = 20;
/// Rounds in which everybody spins and nobody gets on, before that is called for ever.
const IDLE_ROUNDS_MAX: u32 = 10_000;
/// The same, before time jumps to what another waits for.
const ROUNDS_A_JUMP: u32 = 16;
/// Nobody stands at one wait for longer, in virtual time, but who has nothing to do, or waits for a thread's end. A gate is closed for one
/// batch ([`crate::invalidation::BATCH_MAX`]), each page of which is a transfer at worst, of the slowest pace: 2.6 s; a lock, an answer
/// and the bus are a matter of less. Stalls are of another order: at the most frequent they add some 0.25 us a point.
pub const WAIT_NANOS_MAX: u64 = 10_000_000_000;
/// No actor has the baton.
const NOBODY: usize = usize::MAX;

/// Simulations of this process: while there is none, nobody looks further.
static SIMULATIONS: AtomicU32 = AtomicU32::new(0);
/// The same, for threads that are no actors and wake some.
static ALL: Mutex<Vec<Weak<Sim>>> = Mutex::new(Vec::new());

thread_local! {
    static ME: RefCell<Option<(Arc<Sim>, usize)>> = const { RefCell::new(None) };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It can go on.
    Ready,
    /// It looks again and again whether something is so; last when `progress` stood there.
    Spins { wait: Wait, progress: u64 },
    /// It sleeps until its key is woken, or its time has come.
    Sleeps { wait: Wait, key: usize, until: Option<u64> },
    /// It has ended.
    Ended,
}

#[derive(Debug)]
struct Actor {
    name: String,
    state: State,
    /// When it came to be so.
    since: u64,
    /// The wait that it has come to and has done nothing since but look.
    stands: Option<waits::Stand>,
    /// Addresses of the locks that it held when it last handed the baton on.
    locks: Vec<usize>,
    /// Its thread, once that has begun, which is parked unless it has the baton.
    thread: Option<Thread>,
}

struct Inner {
    random: Random,
    pace: Pace,
    /// Choices of who runs next that the seed may still make; without a limit if there is none. After the last all take turns.
    choices: Option<u64>,
    now: u64,
    current: usize,
    actors: Vec<Actor>,
    /// Goes up whenever somebody does anything but look again.
    progress: u64,
    idle_rounds: u32,
    log: Log,
    /// Who has what, by its key.
    had: FxHashMap<usize, Vec<waits::Had>>,
    /// How often somebody has come to a wait, or has looked again.
    looks: u64,
    /// Who has waited for too long.
    late: Option<usize>,
}

impl Inner {
    fn note(&mut self, actor: usize, say: impl FnOnce(&mut String)) {
        let Inner { log, actors, now, .. } = self;
        log.write(*now, &actors[actor].name, say);
    }

    fn got_on(&mut self) {
        self.progress += 1;
        self.idle_rounds = 0;
    }

    fn set(&mut self, actor: usize, state: State) {
        let now = self.now;
        let actor = &mut self.actors[actor];
        (actor.state, actor.since) = (state, now);
    }

    /// It goes on after a while, as a thread does whose CPU another has: others have time for much meanwhile.
    fn stall(&mut self, actor: usize) {
        let bits = self.random.below(STALL_BITS_MAX + 1);
        let until = self.now.saturating_add(self.random.below(1 << bits));
        self.note(actor, |line| line.push_str("stalls"));
        self.set(actor, State::Sleeps { wait: "its CPU".into(), key: NOBODY, until: Some(until) });
    }

    /// It does something else than to wait.
    fn goes_on(&mut self, actor: usize) {
        self.actors[actor].stands = None;
    }

    /// Sleepers whose time has come can go on.
    fn wake_by_time(&mut self) {
        for actor in 0..self.actors.len() {
            if let State::Sleeps { until: Some(until), .. } = self.actors[actor].state
                && until <= self.now
            {
                self.set(actor, State::Ready);
                self.got_on();
            }
            if self.is_late(actor) {
                self.late.get_or_insert(actor);
            }
        }
    }

    fn wake(&mut self, woken: usize) {
        let mut any = false;
        for actor in 0..self.actors.len() {
            if matches!(self.actors[actor].state, State::Sleeps { key, .. } if key == woken) {
                self.set(actor, State::Ready);
                any = true;
            }
        }
        if any {
            self.got_on();
        }
    }

    /// Who has the baton next; `None` where nobody ever can.
    fn choose(&mut self) -> Option<usize> {
        loop {
            self.wake_by_time();
            let progress = self.progress;
            let can = |actor: &Actor| match actor.state {
                State::Ready => true,
                State::Spins { progress: then, .. } => then != progress,
                State::Sleeps { .. } | State::Ended => false,
            };
            let count = self.actors.iter().filter(|actor| can(actor)).count();
            if count > 0 {
                let able = self.actors.iter().enumerate().filter(|(_, a)| can(a)).map(|(n, _)| n);
                if count > 1 && self.choices == Some(0) {
                    let after = able.clone().find(|n| *n > self.current);
                    return after.or_else(|| able.clone().next());
                }
                self.choices = self.choices.map(|left| left - u64::from(count > 1));
                let nth = self.random.below(count as u64) as usize;
                return able.clone().nth(nth);
            }
            let until = |actor: &Actor| match actor.state {
                State::Sleeps { until, .. } => until,
                _ => None,
            };
            // Who looks again may change something as it does.
            let spins = self.actors.iter().any(|actor| matches!(actor.state, State::Spins { .. }));
            let next = self.actors.iter().filter_map(until).min();
            let rounds_max = if next.is_some() { ROUNDS_A_JUMP } else { IDLE_ROUNDS_MAX };
            if spins && self.idle_rounds < rounds_max {
                self.idle_rounds += 1;
                self.progress += 1;
                continue;
            }
            self.now = self.now.max(next?);
        }
    }
}

/// What is done where nobody can go on, on the thread that noticed; the log is complete then. If it returns, that thread sleeps
/// for ever, as all others do.
pub type OnStuck = Box<dyn Fn(&Stuck) + Send + Sync>;

/// A simulation.
pub struct Sim {
    inner: Mutex<Inner>,
    on_stuck: OnStuck,
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sim").finish_non_exhaustive()
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        SIMULATIONS.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Sim {
    /// One that `seed` decides; what happens is written to `log`, if there is one, and counted in any case.
    pub fn new(seed: u64, log: Option<Box<dyn Write + Send>>, on_stuck: OnStuck) -> Arc<Sim> {
        let mut random = Random::new(seed);
        let pace = Pace::of(&mut random);
        let mut log = Log::new(log);
        log.write(0, "umbra", |line| {
            let _ = write!(line, "seed {seed}; {pace}");
        });
        let inner = Inner {
            random,
            pace,
            choices: None,
            now: 0,
            current: NOBODY,
            actors: Vec::new(),
            progress: 0,
            idle_rounds: 0,
            log,
            had: FxHashMap::default(),
            looks: 0,
            late: None,
        };
        let sim = Arc::new(Sim { inner: Mutex::new(inner), on_stuck });
        SIMULATIONS.fetch_add(1, Ordering::Relaxed);
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&sim));
        drop(all);
        sim
    }

    /// Has the seed choose who runs next so many times only, and all take turns from then on: to see how much of its order matters.
    pub fn limit_choices(&self, choices: u64) {
        self.lock().choices = Some(choices);
    }

    /// Makes the calling thread its first actor, with the baton, until the guard is dropped.
    pub fn enter(self: &Arc<Sim>, name: &str) -> ActorGuard {
        self.register(name).enter()
    }

    /// The log so far, all of it written.
    ///
    /// # Errors
    ///
    /// When it could not be.
    pub fn logged(&self) -> io::Result<Logged> {
        let mut inner = self.lock();
        inner.log.flush();
        inner.log.failed.take().map_or(Ok(inner.log.logged), Err)
    }

    /// How it is driven.
    pub fn pace(&self) -> Pace {
        self.lock().pace
    }

    fn register(self: &Arc<Sim>, name: &str) -> Ticket {
        let mut inner = self.lock();
        let since = inner.now;
        let name = name.into();
        let actor = Actor { name, state: State::Ready, since, stands: None, locks: Vec::new(), thread: None };
        inner.actors.push(actor);
        inner.got_on();
        let id = inner.actors.len() - 1;
        inner.note(id, |line| line.push_str("begins"));
        if inner.current == NOBODY {
            inner.current = id;
        }
        Ticket { sim: Some(Arc::clone(self)), id }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the baton to whoever is to have it next, and says who that is. Where nobody ever can have it, that is reported.
    fn hand_on(&self, mut inner: MutexGuard<'_, Inner>) -> Option<usize> {
        let next = inner.choose();
        if let Some(late) = inner.late {
            return self.give_up(inner, Why::TooLong(late), "");
        }
        let Some(next) = next else { return self.give_up(inner, Why::Everybody, "") };
        let is_other = inner.current != next;
        inner.current = next;
        inner.set(next, State::Ready);
        let thread = inner.actors[next].thread.clone();
        // So that it does not wake up to wait for this lock.
        drop(inner);
        thread.filter(|_| is_other).iter().for_each(Thread::unpark);
        Some(next)
    }

    /// Nobody has the baton any more.
    fn give_up(&self, mut inner: MutexGuard<'_, Inner>, why: Why, how: &str) -> Option<usize> {
        inner.current = NOBODY;
        let stuck = inner.stuck(why, how)?;
        inner.log.write(stuck.now, "umbra", |line| line.push_str(&stuck.to_string().replace('\n', ";")));
        inner.log.flush();
        drop(inner);
        (self.on_stuck)(&stuck);
        None
    }

    /// The same, and waits for `me` to have it again.
    fn take_turn(&self, me: usize, mut inner: MutexGuard<'_, Inner>) {
        let locks = &mut inner.actors[me].locks;
        locks.clear();
        lock_order::addresses(locks);
        if self.hand_on(inner) != Some(me) {
            self.await_turn(me);
        }
    }

    /// Hands it on until what `me` has just come to wait for may be there.
    fn take_turn_after(&self, me: usize, mut inner: MutexGuard<'_, Inner>) {
        inner.looks(me);
        if !inner.may_be_stuck(me) {
            return self.take_turn(me, inner);
        }
        let locks = &mut inner.actors[me].locks;
        locks.clear();
        lock_order::addresses(locks);
        if inner.is_stuck(me) {
            self.give_up(inner, Why::EachOther, "");
            self.await_turn(me)
        } else if self.hand_on(inner) != Some(me) {
            self.await_turn(me);
        }
    }

    fn await_turn(&self, me: usize) {
        while self.lock().current != me {
            thread::park();
        }
    }
}

/// A thread's place in a simulation, before the thread has begun. Dropped, nobody takes it.
#[derive(Debug)]
pub struct Ticket {
    sim: Option<Arc<Sim>>,
    id: usize,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(sim) = self.sim.take() {
            let mut inner = sim.lock();
            inner.set(self.id, State::Ended);
            inner.wake(key_of_end(self.id));
        }
    }
}

/// An actor, for whoever waits for its end.
#[derive(Debug)]
pub struct ActorId(usize);

impl Ticket {
    /// Whose it is.
    pub fn id(&self) -> ActorId {
        ActorId(self.id)
    }

    /// Makes the calling thread that actor, and returns once it has the baton.
    pub fn enter(mut self) -> ActorGuard {
        if let Some(sim) = self.sim.take() {
            ME.set(Some((Arc::clone(&sim), self.id)));
            sim.lock().actors[self.id].thread = Some(thread::current());
            sim.await_turn(self.id);
        }
        ActorGuard(())
    }
}

/// Being an actor; dropping it ends that.
#[derive(Debug)]
pub struct ActorGuard(());

impl Drop for ActorGuard {
    fn drop(&mut self) {
        let Some((sim, me)) = ME.take() else { return };
        let mut inner = sim.lock();
        inner.note(me, |line| line.push_str("ends"));
        inner.set(me, State::Ended);
        inner.got_on();
        inner.wake(key_of_end(me));
        sim.hand_on(inner);
    }
}

/// What its end wakes: no address of anything that is slept on, for nothing is at the end of memory.
fn key_of_end(actor: usize) -> usize {
    NOBODY - 1 - actor
}

#[inline]
fn is_any() -> bool {
    SIMULATIONS.load(Ordering::Relaxed) != 0
}

/// Calls with the simulation that this thread is an actor of.
#[inline]
fn with<R>(call: impl FnOnce(&Arc<Sim>, usize) -> R) -> Option<R> {
    if !is_any() {
        return None;
    }
    ME.with(|me| match me.try_borrow() {
        Ok(me) => me.as_ref().map(|(sim, me)| call(sim, *me)),
        Err(_) => None,
    })
}

/// True on the threads of a simulation.
#[inline]
pub fn is_on() -> bool {
    with(|_, _| ()).is_some()
}

/// Virtual nanoseconds since the simulation began, on its threads.
#[inline]
pub fn now() -> Option<u64> {
    with(|sim, _| sim.lock().now)
}

/// How this thread's simulation is driven.
pub fn pace() -> Option<Pace> {
    with(|sim, _| sim.pace())
}

/// Has the seed choose another pace for this thread's simulation, from here on.
pub fn change_pace() {
    with(|sim, _| {
        let Inner { random, pace, .. } = &mut *sim.lock();
        *pace = Pace::of(random);
    });
}

/// A number below `end` that the seed decides; `None` on other threads.
pub fn choose(end: u64) -> Option<u64> {
    with(|sim, _| sim.lock().random.below(end.max(1)))
}

/// Another actor may come in here.
#[inline]
pub fn point() {
    if is_any() {
        with(|sim, me| {
            let mut inner = sim.lock();
            inner.got_on();
            inner.goes_on(me);
            let Pace { switch_one_in, stall_one_in, .. } = inner.pace;
            let stalls = inner.random.below(stall_one_in) == 0;
            let switches = stalls || inner.random.below(switch_one_in) == 0;
            if switches && inner.choices != Some(0) {
                if stalls {
                    inner.stall(me);
                }
                sim.take_turn(me, inner);
            }
        });
    }
}

/// Work has taken so long, and others may come in.
pub fn work(nanos: u64) {
    with(|sim, me| {
        let mut inner = sim.lock();
        inner.now = inner.now.saturating_add(nanos);
        inner.got_on();
        inner.goes_on(me);
        sim.take_turn(me, inner);
    });
}

/// The caller does the same again and again, and will for ever: that ends the simulation. `how` says what it does.
pub fn gets_nowhere(how: &str) {
    with(|sim, me| {
        sim.give_up(sim.lock(), Why::GetsNowhere(me), how);
        sim.await_turn(me);
    });
}

/// So much time has passed, and nobody has come in.
pub fn pass(nanos: u64) {
    with(|sim, me| {
        let mut inner = sim.lock();
        inner.now = inner.now.saturating_add(nanos);
        inner.got_on();
        inner.goes_on(me);
    });
}

/// The caller has what it looked for.
pub(super) fn goes_on() {
    with(|sim, me| sim.lock().goes_on(me));
}

/// Looks again later, when another has got on: for loops that wait by looking. False on threads of no simulation.
pub fn spin(wait: impl Into<Wait>) -> bool {
    let wait = wait.into();
    let spins = |sim: &Arc<Sim>, me| {
        let mut inner = sim.lock();
        inner.now = inner.now.saturating_add(SPIN_NANOS);
        let progress = inner.progress;
        inner.set(me, State::Spins { wait, progress });
        sim.take_turn_after(me, inner);
    };
    with(spins).is_some()
}

/// The guest says that it looks again and again for something: others may come in. False on threads of no simulation.
pub fn pause() -> bool {
    let is_on = is_on();
    work(SPIN_NANOS);
    is_on
}

/// Sleeps until `key` is woken, or for `limit`, without `held`. What the caller sleeps for it has looked at with nothing in between:
/// it holds what a thread that is no actor needs to change that. False on threads of no simulation.
fn block(key: usize, wait: Wait, limit: Option<u64>, held: impl Sized) -> bool {
    let blocks = |sim: &Arc<Sim>, me| {
        let mut inner = sim.lock();
        inner.got_on();
        let until = limit.map(|limit| inner.now.saturating_add(limit));
        inner.note(me, |line| {
            let _ = write!(line, "waits for {}", wait.what);
        });
        inner.set(me, State::Sleeps { wait, key, until });
        drop(held);
        sim.take_turn_after(me, inner);
    };
    with(blocks).is_some()
}

/// Wakes all who sleep for `key`, whoever calls.
fn wake(key: usize) {
    if is_any() && with(|sim, _| sim.lock().wake(key)).is_none() {
        let all = ALL.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.iter().filter_map(Weak::upgrade).for_each(|sim| sim.lock().wake(key));
    }
}

/// Sleeps for so long, in virtual time. False on threads of no simulation, which have not slept.
pub fn sleep(time: Duration, what: &'static str) -> bool {
    block(NOBODY, what.into(), Some(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)), ())
}

/// A device's transfer: sleeps for as long as the seed says.
pub fn transfer() {
    if let Some(pace) = pace() {
        let nanos = choose(pace.transfer_nanos_max).unwrap_or(0);
        block(NOBODY, "a transfer".into(), Some(nanos), ());
    }
}

/// The most instructions of the next slice, `most` at most; `None` on threads of no simulation.
pub fn slice(most: u64) -> Option<u64> {
    with(|sim, _| {
        let mut inner = sim.lock();
        // Short ones as often as long ones.
        let bits = u64::from(inner.pace.slice_bits) + 1;
        let end = 1 << inner.random.below(bits);
        (1 + inner.random.below(end)).min(most)
    })
}

/// A vCPU whose slice is over goes on inside the guest, to leave it only for something. False on threads of no simulation.
pub fn stays_inside() -> bool {
    pace().is_some_and(|pace| pace.stays_inside)
}

/// Writes a line to the log.
#[inline]
pub fn note(say: impl FnOnce(&mut String)) {
    with(|sim, me| sim.lock().note(me, say));
}

/// True once that actor of this thread's simulation has ended; `None` on threads of no simulation.
pub fn has_ended(actor: &ActorId) -> Option<bool> {
    with(|sim, _| sim.lock().actors[actor.0].state == State::Ended)
}

/// A place in the simulation of this thread for one that it is about to start.
pub fn register(name: &str) -> Option<Ticket> {
    with(|sim, _| sim.register(name))
}

/// Sleeps until that actor of this thread's simulation has ended.
pub fn await_end(actor: &ActorId) {
    while has_ended(actor) == Some(false) {
        let end = Thing { sort: Sort::End, words: "", number: None, key: actor.0 };
        block(key_of_end(actor.0), Wait::idle("the end of a thread").of(end), None, ());
    }
}

/// Takes a lock whose holder may hand the baton on; `thing` is what it locks.
pub fn lock<T>(mutex: &Mutex<T>, thing: Thing) -> MutexGuard<'_, T> {
    let mut waited = false;
    while is_on() {
        let guard = match mutex.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                waited = spin(Wait::from("a lock").of(thing));
                continue;
            }
        };
        if waited {
            goes_on();
        }
        return guard;
    }
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// [`super::holds`].
#[inline]
pub(super) fn holds(things: impl Iterator<Item = Thing>) {
    if is_any() {
        with(|sim, me| sim.lock().holds(me, things));
    }
}

/// [`super::lets_go`].
#[inline]
pub(super) fn lets_go(things: impl Iterator<Item = Thing>) {
    if is_any() {
        with(|sim, me| sim.lock().lets_go(me, things));
    }
}

/// A condition variable, whose sleepers are a simulation's where there is one.
#[derive(Debug, Default)]
pub struct Bed(Condvar);

impl Bed {
    /// One that nobody sleeps in.
    pub fn new() -> Bed {
        Bed::default()
    }

    /// Lets go of the lock of `thing`, sleeps until notified (or for no reason), and takes it again.
    pub fn wait<'a, T>(
        &self,
        mutex: &'a Mutex<T>,
        thing: Thing,
        guard: MutexGuard<'a, T>,
        wait: impl Into<Wait>,
    ) -> MutexGuard<'a, T> {
        if is_on() {
            block(self.key(), wait.into(), None, guard);
            return lock(mutex, thing);
        }
        self.0.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// On a thread of a simulation: sleeps until notified or until `until`, in virtual nanoseconds, with nothing held.
    pub fn wait_until(&self, until: Option<u64>, wait: impl Into<Wait>) {
        let now = now().unwrap_or(0);
        block(self.key(), wait.into(), until.map(|until| until.saturating_sub(now)), ());
    }

    /// Wakes all who sleep here.
    pub fn notify_all(&self) {
        self.0.notify_all();
        wake(self.key());
    }

    fn key(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

#[cfg(test)]
mod tests;
