//! A window mapping pins a frame; whoever moves the page out looks for pins.
//!
//! ```text
//! pinner                                mover
//! entry = resident in m?                entry: resident in m -> moving, or give up
//! pins(m) += 1                          pins(m) = 0?
//! entry still resident in m?              no: entry := resident in m, give up
//!   no: pins(m) -= 1, again             copy out, entry := swapped
//! touch m                               m is somebody else's
//! pins(m) -= 1
//! ```
//!
//! Each side stores before it looks: the mover sees the pin, or the pinner sees that the page is moving. All four are
//! sequentially consistent; the last `pins -= 1` releases, so that who reads 0 comes after the touch.
//!
//! Twins: the pinner does not look again; the mover looks for pins before it changes the entry; the pin is no more than
//! an acquire (on x86 it is more, for the compiler it is not); it is let go of without a release.

use super::{Frame, explore};
use crate::sync::{Arc, AtomicU32, AtomicU64, Ordering, thread};

const RESIDENT: u64 = 1;
const MOVING: u64 = 2;
const SWAPPED: u64 = 3;

struct Page {
    entry: AtomicU64,
    pins: AtomicU32,
    frame: Frame,
}

#[derive(Clone, Copy)]
struct Way {
    looks_again: bool,
    moves_first: bool,
    pin: Ordering,
    unpin: Ordering,
}

const RIGHT: Way =
    Way { looks_again: true, moves_first: true, pin: Ordering::SeqCst, unpin: Ordering::Release };

impl Page {
    fn is_resident(&self) -> bool {
        self.entry.load(Ordering::SeqCst) == RESIDENT
    }

    /// A mapping, tried twice.
    fn map(&self, way: Way) {
        for _ in 0..2 {
            if !self.is_resident() {
                return;
            }
            self.pins.fetch_add(1, way.pin);
            let stays = !way.looks_again || self.is_resident();
            if stays {
                self.frame.touch();
            }
            self.pins.fetch_sub(1, way.unpin);
            if stays {
                return;
            }
        }
    }

    fn swap_out(&self, way: Way) {
        if !way.moves_first && self.pins.load(Ordering::SeqCst) > 0 {
            return;
        }
        let moving =
            self.entry.compare_exchange(RESIDENT, MOVING, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if !moving {
            return;
        }
        if way.moves_first && self.pins.load(Ordering::SeqCst) > 0 {
            self.entry.store(RESIDENT, Ordering::SeqCst);
            return;
        }
        self.entry.store(SWAPPED, Ordering::SeqCst);
        self.frame.hand_on();
    }
}

/// Two movers too, with `movers`: the second may find the entry as the first put it back.
fn map_against_movers(way: Way, movers: u32) {
    let page =
        Arc::new(Page { entry: AtomicU64::new(RESIDENT), pins: AtomicU32::new(0), frame: Frame::default() });
    let movers: Vec<_> = (0..movers)
        .map(|_| {
            let page = page.clone();
            thread::spawn(move || page.swap_out(way))
        })
        .collect();
    page.map(way);
    movers.into_iter().for_each(|mover| mover.join().unwrap());
}

#[test]
fn a_mapped_frame_is_not_moved() {
    explore(None, || map_against_movers(RIGHT, 1));
}

#[test]
fn a_mapped_frame_is_not_moved_by_either_of_two() {
    explore(5, || map_against_movers(RIGHT, 2));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_no_second_look() {
    explore(None, || map_against_movers(Way { looks_again: false, ..RIGHT }, 1));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_pins_looked_for_before_the_entry_changes() {
    explore(None, || map_against_movers(Way { moves_first: false, ..RIGHT }, 1));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_a_pin_that_is_no_more_than_an_acquire() {
    explore(None, || map_against_movers(Way { pin: Ordering::Acquire, ..RIGHT }, 1));
}

#[test]
#[should_panic(expected = "the frame is")]
fn twin_a_pin_let_go_of_without_a_release() {
    explore(None, || map_against_movers(Way { unpin: Ordering::Relaxed, ..RIGHT }, 1));
}
