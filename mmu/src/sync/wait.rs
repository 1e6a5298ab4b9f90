//! What a thread waits for, and who has that: for reports of simulations.
//!
//! Story: a wait says what it is for ([`Wait`]). Where somebody has that, it is a [`Thing`]: a lock's holder is known by the stack of
//! levels of each thread (in debug builds), that of anything else says so ([`holds`]). A simulation that does not get on puts these
//! together ([`super::sim`], "waits"). Elsewhere nobody looks, and what is said costs a relaxed load.

#[cfg(not(any(loom, shuttle)))]
use super::sim;
use crate::lock_order::Level;

/// Something that somebody has, and another may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thing {
    pub(super) sort: Sort,
    pub(super) words: &'static str,
    /// Which one of them, where they have numbers.
    pub(super) number: Option<u32>,
    /// Which one in this process: an address.
    pub(super) key: usize,
}

/// How it is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    /// A lock.
    Lock,
    /// Whoever has it said so.
    Held,
    /// Somebody is to bring it, and said so.
    Owed,
    /// The end of a thread, which that thread owes.
    #[cfg_attr(any(loom, shuttle), expect(dead_code, reason = "simulations alone have it"))]
    End,
}

impl Thing {
    /// A lock, of that level of the order.
    #[inline]
    pub(super) fn lock(level: Level, at: usize) -> Thing {
        #[cfg(not(any(loom, shuttle)))]
        let words = level.name();
        #[cfg(any(loom, shuttle))]
        let (words, _) = ("some", level);
        Thing { sort: Sort::Lock, words, number: None, key: at }
    }

    /// Something that one has at a time, of that number: it is at the address of `of`.
    pub fn held<T>(words: &'static str, number: Option<u32>, of: &T) -> Thing {
        Thing { sort: Sort::Held, words, number, key: std::ptr::from_ref(of) as usize }
    }

    /// Something that somebody is to bring.
    pub fn owed<T>(words: &'static str, number: u32, of: &T) -> Thing {
        Thing { sort: Sort::Owed, number: Some(number), ..Thing::held(words, None, of) }
    }
}

/// What a wait is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// In words.
    pub(super) what: &'static str,
    /// Which, if somebody may be known to have it.
    pub(super) of: Option<Thing>,
    /// It may last for ever, and nothing be wrong.
    pub(super) is_idle: bool,
}

impl From<&'static str> for Wait {
    fn from(what: &'static str) -> Wait {
        Wait { what, of: None, is_idle: false }
    }
}

impl Wait {
    /// Of one who has nothing to do, or looks after its own patience.
    pub const fn idle(what: &'static str) -> Wait {
        Wait { what, of: None, is_idle: true }
    }

    /// What it is for is this.
    pub const fn of(self, thing: Thing) -> Wait {
        Wait { of: Some(thing), ..self }
    }
}

/// This thread has these things from now on, or is to bring them: each as often as it says so.
#[inline]
pub fn holds(things: impl Iterator<Item = Thing>) {
    #[cfg(not(any(loom, shuttle)))]
    sim::holds(things);
    #[cfg(any(loom, shuttle))]
    let _ = things;
}

/// It has these no longer: said before it comes to another scheduling point.
#[inline]
pub fn lets_go(things: impl Iterator<Item = Thing>) {
    #[cfg(not(any(loom, shuttle)))]
    sim::lets_go(things);
    #[cfg(any(loom, shuttle))]
    let _ = things;
}

/// A thing is this thread's, or to be brought by it, for as long as this lives.
#[derive(Debug)]
pub struct Having(Thing);

impl Having {
    /// This thread has `thing`.
    pub fn new(thing: Thing) -> Having {
        holds([thing].into_iter());
        Having(thing)
    }
}

impl Drop for Having {
    fn drop(&mut self) {
        lets_go([self.0].into_iter());
    }
}
