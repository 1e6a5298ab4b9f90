//! A short memory of what happened to which page: what `explain` shows as the last event, and the report of a missed flush as
//! the trail.

use std::fmt::Write;

use crate::addr::Gva;
use crate::sync::note;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A fault was fixed by a fill.
    Filled,
    /// The guest was given a page fault.
    GuestFault,
    /// A store to a tracked frame was handed to emulation.
    Emulated,
    /// INVLPG was executed.
    Invalidated,
    /// A guest table reached by this address went unsync.
    Unsynced,
}

const RING: usize = 128;

/// The last events of one vCPU, oldest overwritten first.
#[derive(Debug)]
pub struct EventRing {
    ring: [(Gva, Option<Event>); RING],
    next: usize,
}

impl EventRing {
    pub(crate) fn new() -> EventRing {
        EventRing { ring: [(Gva(0), None); RING], next: 0 }
    }

    #[inline]
    pub(crate) fn record(&mut self, gva: Gva, event: Event) {
        note(|line| {
            let _ = write!(line, "{event:?} {:#x}", gva.0);
        });
        self.ring[self.next % RING] = (gva, Some(event));
        self.next = self.next.wrapping_add(1);
    }

    /// The latest event on the page of `gva`, and how many events ago it was.
    pub fn last(&self, gva: Gva) -> Option<(Event, usize)> {
        self.trail(gva).next()
    }

    /// All events on the page of `gva`, the latest first, and how many events ago each was.
    pub fn trail(&self, gva: Gva) -> impl Iterator<Item = (Event, usize)> {
        (1..=RING).filter_map(move |ago| {
            let (at, event) = self.ring[self.next.wrapping_sub(ago) % RING];
            event.filter(|_| at.page() == gva.page()).map(|e| (e, ago))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_event_of_the_page_is_found_until_it_is_overwritten() {
        let mut ring = EventRing::new();
        assert_eq!(ring.last(Gva(0)), None, "an empty ring knows nothing, of page 0 either");
        ring.record(Gva(0x1004), Event::Filled);
        ring.record(Gva(0x2000), Event::Emulated);
        assert_eq!(ring.last(Gva(0x1ff0)), Some((Event::Filled, 2)));
        ring.record(Gva(0x1000), Event::Invalidated);
        let trail: Vec<_> = ring.trail(Gva(0x1000)).collect();
        assert_eq!(trail, [(Event::Invalidated, 1), (Event::Filled, 3)]);
        (0..RING).for_each(|_| ring.record(Gva(0x2000), Event::Filled));
        assert_eq!(ring.last(Gva(0x1000)), None);
    }
}
