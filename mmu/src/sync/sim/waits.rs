//! Who waits for whom, and whether any of them will ever go on.
//!
//! ```text
//! actor --waits for--> thing --had by--> actors
//! ```
//!
//! Some wait for each other where each waits, for no time, for a thing that somebody has, and all who have it are among them. That holds
//! however it goes on, and is looked for whenever somebody comes to a wait, or looks again: the last of them finds it.
//!
//! Holds: nobody is taken to wait for another by a look that is older than the other's own wait: what it looks for may have come since.
//! ```text
//! a                                       b
//! looks for b's answer: none
//!                                         answers
//!                                         waits for what a has       -> no cycle: a has not looked again
//! ```
//! Who sleeps needs no second look: it would have been woken, by who says that it has the thing no longer before it goes.
//!
//! Limits: who has a window slot, a frame or work is not known. Locks' holders are in debug builds alone; other builds keep no stack.

use std::fmt;

use super::super::wait::{Sort, Thing, Wait};
use super::{Inner, State, WAIT_NANOS_MAX};

/// An actor that has come to a wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stand {
    wait: Wait,
    /// In virtual nanoseconds.
    since: u64,
    /// Which look that was, of all there were, and its last one.
    came: u64,
    looked: u64,
}

/// A thing that an actor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Had {
    thing: Thing,
    by: usize,
}

/// Why a simulation cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Everybody waits, and for no time that could come.
    Everybody,
    /// Some wait for each other.
    EachOther,
    /// This actor has waited for longer than anybody does.
    TooLong(usize),
    /// This actor does the same again and again ([`super::gets_nowhere`]).
    GetsNowhere(usize),
}

/// What an actor of a simulation that cannot go on waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Its name.
    pub name: String,
    /// In words; nothing where it can go on.
    pub what: Option<String>,
    /// Who has that, or is to bring it, if anybody is known to.
    pub holders: Vec<String>,
    /// It is to be brought.
    pub is_owed: bool,
    /// Since when, and until when, in nanoseconds.
    pub since: u64,
    /// The same.
    pub until: Option<u64>,
}

impl fmt::Display for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(what) = &self.what else { return write!(f, "{} can go on", self.name) };
        write!(f, "{} waits for {what}", self.name)?;
        if let Some((last, others)) = self.holders.split_last() {
            let has = if self.is_owed { "owe" } else { "hold" };
            f.write_str(", which ")?;
            match others {
                [] => write!(f, "{last} {has}s")?,
                _ => write!(f, "{} and {last} {has}", others.join(", "))?,
            }
        }
        Ok(())
    }
}

/// Some, or all, will never go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// When, in nanoseconds.
    pub now: u64,
    /// Why.
    pub why: Why,
    /// The actors that have not ended.
    pub waiters: Vec<Waiter>,
    /// Those that wait for each other, from one to who has what it waits for, and the last for one of those before. Nobody where it is not
    /// known who has what somebody waits for.
    pub cycle: Vec<Waiter>,
    /// Who has waited for too long, or gets nowhere and how.
    about: String,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {} ns ", self.now)?;
        match self.why {
            Why::Everybody => f.write_str("everybody waits, and for no time that could come:")?,
            Why::EachOther => f.write_str("some wait for each other, and for nobody else:")?,
            Why::TooLong(_) => {
                write!(f, "{} has waited for longer than {} s:", self.about, WAIT_NANOS_MAX / 1_000_000_000)?;
            }
            Why::GetsNowhere(_) => write!(f, "{}:", self.about)?,
        }
        for waiter in &self.waiters {
            write!(f, "\n  {waiter}")?;
            match (waiter.until, &waiter.what) {
                (Some(until), _) => write!(f, ", until {until} ns")?,
                (None, Some(_)) => write!(f, ", since {} ns", waiter.since)?,
                (None, None) => {}
            }
        }
        if !self.cycle.is_empty() {
            f.write_str("\n  the cycle:")?;
            self.cycle.iter().try_for_each(|waiter| write!(f, "\n    {waiter}"))?;
        }
        Ok(())
    }
}

/// Locks of one level, in the order in which they are named: their addresses are another each time.
#[derive(Default)]
struct Names(Vec<(&'static str, usize)>);

impl Names {
    fn of(&mut self, inner: &Inner, thing: &Thing) -> String {
        match (thing.sort, thing.number) {
            (Sort::End, _) => format!("the end of {}", inner.actors[thing.key].name),
            (Sort::Lock, _) => {
                let known = self.0.iter().position(|known| *known == (thing.words, thing.key));
                let at = known.unwrap_or(self.0.len());
                if known.is_none() {
                    self.0.push((thing.words, thing.key));
                }
                let number = self.0[..=at].iter().filter(|(words, _)| *words == thing.words).count();
                format!("lock '{}' {number}", thing.words)
            }
            (_, Some(number)) => format!("{} {number}", thing.words),
            (_, None) => thing.words.into(),
        }
    }
}

impl State {
    /// What it waits for, and until when.
    fn wait(&self) -> Option<(Wait, Option<u64>)> {
        match *self {
            State::Spins { wait, .. } => Some((wait, None)),
            State::Sleeps { wait, until, .. } => Some((wait, until)),
            State::Ready | State::Ended => None,
        }
    }
}

impl Inner {
    /// An actor has come to a wait, or looks again.
    pub fn looks(&mut self, actor: usize) {
        self.looks += 1;
        let (now, look) = (self.now, self.looks);
        let actor = &mut self.actors[actor];
        let Some((wait, _)) = actor.state.wait() else { return };
        let stand = actor.stands.filter(|stand| stand.wait == wait);
        let stand = stand.unwrap_or(Stand { wait, since: now, came: look, looked: look });
        actor.stands = Some(Stand { looked: look, ..stand });
    }

    /// True where it waits, as nobody does for so long.
    pub fn is_late(&self, actor: usize) -> bool {
        let actor = &self.actors[actor];
        let Some((wait, None)) = actor.state.wait() else { return false };
        let since = actor.stands.map_or(actor.since, |stand| stand.since);
        !wait.is_idle && self.now.saturating_sub(since) > WAIT_NANOS_MAX
    }

    /// It has these things.
    pub fn holds(&mut self, actor: usize, things: impl Iterator<Item = Thing>) {
        for thing in things {
            self.had.entry(thing.key).or_default().push(Had { thing, by: actor });
        }
    }

    /// It has them no longer.
    pub fn lets_go(&mut self, actor: usize, things: impl Iterator<Item = Thing>) {
        for thing in things {
            let Some(of) = self.had.get_mut(&thing.key) else { continue };
            let at = of.iter().rposition(|had| *had == Had { thing, by: actor });
            if let Some(at) = at {
                of.swap_remove(at);
            }
            if of.is_empty() {
                self.had.remove(&thing.key);
            }
        }
    }

    /// The thing that an actor waits for, and for nothing else.
    fn wanted(&self, actor: usize) -> Option<Thing> {
        let (wait, until) = self.actors[actor].state.wait()?;
        wait.of.filter(|_| until.is_none())
    }

    /// Who has it, in order, each once.
    fn holders(&self, thing: &Thing) -> Vec<usize> {
        let mut all: Vec<usize> = match thing.sort {
            Sort::End => {
                (self.actors[thing.key].state != State::Ended).then_some(thing.key).into_iter().collect()
            }
            // Who is about to take it has it among its own already.
            Sort::Lock => (0..self.actors.len())
                .filter(|actor| self.actors[*actor].locks.contains(&thing.key))
                .filter(|actor| self.wanted(*actor).is_none_or(|wanted| wanted != *thing))
                .collect(),
            Sort::Held | Sort::Owed => {
                let of = self.had.get(&thing.key).into_iter().flatten();
                of.filter(|had| had.thing == *thing).map(|had| had.by).collect()
            }
        };
        all.sort_unstable();
        all.dedup();
        all
    }

    /// A look that costs little: who waits for an actor that does not wait will go on.
    pub fn may_be_stuck(&self, actor: usize) -> bool {
        self.wanted(actor).is_some_and(|thing| {
            let mut holders = self.holders(&thing).into_iter().peekable();
            holders.peek().is_some() && holders.all(|of| of == actor || self.wanted(of).is_some())
        })
    }

    /// True where an actor is of those that will never go on.
    pub fn is_stuck(&self, actor: usize) -> bool {
        self.for_ever().iter().any(|(stuck, ..)| *stuck == actor)
    }

    /// Those that wait for each other, each with what it waits for and who has it.
    fn for_ever(&self) -> Vec<(usize, Thing, Vec<usize>)> {
        let wants = |actor| self.wanted(actor).map(|thing| (actor, thing, self.holders(&thing)));
        let mut all: Vec<_> = (0..self.actors.len()).filter_map(wants).collect();
        // Who has it has come to its own wait before it was last looked for.
        let is_fresh = |actor: usize, of: usize| {
            let (mine, others) = (self.actors[actor].stands, self.actors[of].stands);
            let sleeps = matches!(self.actors[actor].state, State::Sleeps { .. });
            sleeps || mine.zip(others).is_some_and(|(mine, other)| actor == of || mine.looked > other.came)
        };
        loop {
            let left: Vec<usize> = all.iter().map(|(actor, ..)| *actor).collect();
            let stays = |actor: usize, of: &[usize]| {
                !of.is_empty() && of.iter().all(|of| left.contains(of) && is_fresh(actor, *of))
            };
            all.retain(|(actor, _, of)| stays(*actor, of));
            if all.len() == left.len() {
                return all;
            }
        }
    }

    /// The report; nothing where everybody has ended.
    pub fn stuck(&self, why: Why, how: &str) -> Option<Stuck> {
        let mut names = Names::default();
        let mut waiter = |actor: usize| {
            let own = &self.actors[actor];
            let wait = own.state.wait();
            let thing = wait.and_then(|(wait, _)| wait.of);
            let what = match (&thing, wait) {
                (Some(thing), _) => Some(names.of(self, thing)),
                (None, wait) => wait.map(|(wait, _)| wait.what.to_owned()),
            };
            let holders = thing.map(|thing| self.holders(&thing)).unwrap_or_default();
            Waiter {
                name: own.name.clone(),
                what,
                holders: holders.iter().map(|of| self.actors[*of].name.clone()).collect(),
                is_owed: thing.is_some_and(|thing| matches!(thing.sort, Sort::Owed | Sort::End)),
                since: own.stands.map_or(own.since, |stand| stand.since),
                until: wait.and_then(|(_, until)| until),
            }
        };
        let is_there = |actor: &usize| self.actors[*actor].state != State::Ended;
        let waiters: Vec<_> = (0..self.actors.len()).filter(is_there).map(&mut waiter).collect();
        let cycle = self.cycle().into_iter();
        let cycle = cycle.map(|(actor, holder)| Waiter {
            holders: vec![self.actors[holder].name.clone()],
            ..waiter(actor)
        });
        let about = match why {
            Why::TooLong(actor) => self.actors[actor].name.clone(),
            Why::GetsNowhere(actor) => format!("{} gets nowhere: {how}", self.actors[actor].name),
            Why::Everybody | Why::EachOther => String::new(),
        };
        let stuck = Stuck { now: self.now, why, cycle: cycle.collect(), about, waiters: Vec::new() };
        (!waiters.is_empty()).then_some(Stuck { waiters, ..stuck })
    }

    /// From one to who has what it waits for.
    fn cycle(&self) -> Vec<(usize, usize)> {
        let all = self.for_ever();
        let mut cycle: Vec<(usize, usize)> = Vec::new();
        let mut next = all.first().map(|(actor, ..)| *actor);
        while let Some((actor, _, holders)) = all.iter().find(|(actor, ..)| Some(*actor) == next) {
            // Where there are several, one that is not there yet makes the longer tale.
            let is_new = |of: &&usize| **of != *actor && cycle.iter().all(|(known, _)| known != *of);
            let holder = *holders.iter().find(is_new).unwrap_or(&holders[0]);
            cycle.push((*actor, holder));
            next = cycle.iter().all(|(known, _)| *known != holder).then_some(holder);
        }
        // Who only waits for one of the cycle is not of it.
        let first = cycle.last().and_then(|(_, last)| cycle.iter().position(|(actor, _)| actor == last));
        cycle.split_off(first.unwrap_or_default())
    }
}
