//! The frame lists: which guest frames may be reclaimed, and in what order.
//!
//! Story: a frame that gets a page of high memory joins the *inactive* list at its head. Reclaim takes from its tail; what
//! was used since is moved to the *active* list, whose tail is looked at when the inactive one runs short: a page has to
//! be used twice to be kept from one that is used once.
//!
//! Holds: INV-LRU-1, a frame of high guest memory is on one list, or isolated by a reclaimer that is looking at it; no
//! other frame is.
//!
//! Locks: [`lock_order::LRU`], for all of it. Nothing is called with it held.
//!
//! Limits: 8 bytes a frame, once it was on a list.

use crate::addr::Mfn;
use crate::lock_order;
use crate::sync::Lock;

/// A list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// Looked at by reclaim next.
    Inactive = 1,
    /// Used again while it was inactive.
    Active = 2,
}

/// A frame that a reclaimer looks at.
const ISOLATED: u32 = 3;
const PLACE_SHIFT: u32 = 30;
const NUMBER: u32 = (1 << PLACE_SHIFT) - 1;

/// The neighbours of a frame, each one more than its number, 0 for none. The top bits of `next` say where it is.
#[derive(Debug, Default)]
struct Ends {
    /// Youngest.
    head: u32,
    /// Oldest.
    tail: u32,
    length: u32,
}

#[derive(Debug)]
struct Lists {
    /// Two words a frame: next (older), with the place in its top bits; previous (younger).
    links: Vec<u32>,
    ends: [Ends; 2],
}

/// All lists of a machine.
#[derive(Debug)]
pub struct Lru {
    lists: Lock<Lists>,
}

impl Lru {
    /// Lists for a machine of `frames` frames, all empty.
    pub fn new(frames: u32) -> Lru {
        let lists = Lists { links: vec![0; 2 * frames as usize], ends: Default::default() };
        Lru { lists: Lock::new(lock_order::LRU, lists) }
    }

    /// Frames on the inactive and on the active list.
    pub fn lengths(&self) -> (u32, u32) {
        let lists = self.lists.lock();
        (lists.ends[0].length, lists.ends[1].length)
    }

    /// A frame has got a page: it is the youngest of the inactive list.
    pub fn add(&self, mfn: Mfn) {
        let mut lists = self.lists.lock();
        lists.unlink(mfn.0);
        lists.push(List::Inactive, mfn.0);
    }

    /// Frames have lost their pages.
    pub fn remove(&self, frames: impl IntoIterator<Item = Mfn>) {
        let mut lists = self.lists.lock();
        frames.into_iter().for_each(|mfn| lists.unlink(mfn.0));
    }

    /// Takes up to `count` of the oldest frames off a list, for the caller to look at.
    pub fn isolate(&self, list: List, count: u32, into: &mut Vec<Mfn>) {
        let mut lists = self.lists.lock();
        for _ in 0..count {
            let Some(number) = lists.ends[list as usize - 1].tail.checked_sub(1) else { return };
            lists.unlink(number);
            lists.set_place(number, ISOLATED);
            into.push(Mfn(number));
        }
    }

    /// Puts isolated frames on a list, as its youngest; those that are isolated no more have lost their page meanwhile.
    pub fn put_back(&self, list: List, frames: impl IntoIterator<Item = Mfn>) {
        let mut lists = self.lists.lock();
        for mfn in frames {
            if lists.place(mfn.0) == ISOLATED {
                lists.push(list, mfn.0);
            }
        }
    }

    /// True when the frame is on a list, or isolated (audits).
    pub fn has(&self, mfn: Mfn) -> bool {
        self.lists.lock().place(mfn.0) != 0
    }
}

impl Lists {
    fn place(&self, number: u32) -> u32 {
        self.links[2 * number as usize] >> PLACE_SHIFT
    }

    fn set_place(&mut self, number: u32, place: u32) {
        self.links[2 * number as usize] = place << PLACE_SHIFT;
        self.links[2 * number as usize + 1] = 0;
    }

    fn push(&mut self, list: List, number: u32) {
        let ends = &mut self.ends[list as usize - 1];
        let old = std::mem::replace(&mut ends.head, number + 1);
        ends.length += 1;
        if old == 0 {
            ends.tail = number + 1;
        } else {
            self.links[2 * (old as usize - 1) + 1] = number + 1;
        }
        self.links[2 * number as usize] = (list as u32) << PLACE_SHIFT | old;
        self.links[2 * number as usize + 1] = 0;
    }

    /// Takes a frame off whatever list it is on.
    fn unlink(&mut self, number: u32) {
        let place = self.place(number);
        if place == List::Inactive as u32 || place == List::Active as u32 {
            let next = self.links[2 * number as usize] & NUMBER;
            let previous = self.links[2 * number as usize + 1];
            let ends = &mut self.ends[place as usize - 1];
            ends.length -= 1;
            match previous.checked_sub(1) {
                Some(at) => {
                    let word = &mut self.links[2 * at as usize];
                    *word = *word & !NUMBER | next;
                }
                None => ends.head = next,
            }
            match next.checked_sub(1) {
                Some(at) => self.links[2 * at as usize + 1] = previous,
                None => ends.tail = previous,
            }
        }
        self.set_place(number, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn isolate(lru: &Lru, list: List, count: u32) -> Vec<u32> {
        let mut taken = Vec::new();
        lru.isolate(list, count, &mut taken);
        taken.into_iter().map(|mfn| mfn.0).collect()
    }

    #[test]
    fn the_oldest_go_first() {
        let lru = Lru::new(10);
        (0..5).for_each(|n| lru.add(Mfn(n)));
        lru.remove([Mfn(0), Mfn(2), Mfn(4)]);
        lru.add(Mfn(0));
        assert_eq!(lru.lengths(), (3, 0));
        assert_eq!(isolate(&lru, List::Inactive, 9), [1, 3, 0]);
        assert_eq!(lru.lengths(), (0, 0));
    }

    #[test]
    fn isolated_frames_go_where_they_are_put_unless_they_have_gone() {
        let lru = Lru::new(10);
        (0..4).for_each(|n| lru.add(Mfn(n)));
        assert_eq!(isolate(&lru, List::Inactive, 3), [0, 1, 2]);
        lru.remove([Mfn(1)]);
        lru.put_back(List::Active, [0, 1, 2].map(Mfn));
        assert_eq!(lru.lengths(), (1, 2));
        assert!(lru.has(Mfn(0)) && !lru.has(Mfn(1)));
        assert_eq!(isolate(&lru, List::Active, 9), [0, 2]);
        assert!(isolate(&lru, List::Active, 9).is_empty());
        lru.remove([0, 2, 3].map(Mfn));
        assert_eq!(lru.lengths(), (0, 0));
    }

    #[test]
    fn a_frame_that_was_used_again_while_isolated_is_left_where_it_is() {
        let lru = Lru::new(4);
        lru.add(Mfn(1));
        assert_eq!(isolate(&lru, List::Inactive, 1), [1]);
        lru.remove([Mfn(1)]);
        lru.add(Mfn(1));
        lru.put_back(List::Active, [Mfn(1)]);
        assert_eq!(lru.lengths(), (1, 0));
    }
}
