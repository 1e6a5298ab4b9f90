//! Why a guest has not come to what was asked of it in time.
//!
//! Story: the numbers before and after are all that is looked at, and those of [`RECENT`] ago: what happens now is why it is not
//! reached now. The first reason that fits is the one that is said: what nothing can come through first, what only takes longer
//! last.

use std::fmt;
use std::time::Duration;

use super::args::Level;
use super::client::{Seen, bytes};
use crate::units::approximate_size;

/// Refaults are comparable with evictions from this share on: one of so many pages comes back.
const REFAULT_SHARE: u64 = 2;

/// What a guest did in this time, it does.
pub const RECENT: Duration = Duration::from_secs(1);

/// All that the judgement is made of.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// What was asked for.
    pub level: Level,
    /// And how much of it, in bytes.
    pub goal: u64,
    /// The guest before it was asked.
    pub before: Seen,
    /// The last look that was [`RECENT`] before the end, or the first after it was asked.
    pub recent: Seen,
    /// And when there was no more time.
    pub after: Seen,
    /// The guest stands still.
    pub paused: bool,
    /// It has sent statistics, as a driver does.
    pub has_driver: bool,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Somebody else has asked for something else since.
    Elsewhere(Option<u64>),
    /// The guest stands still.
    Paused,
    /// It has no driver for its balloon, or one that is deaf.
    NoAnswer,
    /// A driver is there, and nothing moves; so much memory is free, as it says.
    Unwilling(Option<u64>),
    /// It moves, and is not there yet: so many bytes a second.
    Slow(u64),
    /// It has moved, and does no more: so much it keeps, and so much is free, as it says.
    Stopped(u64, Option<u64>),
    /// Swap has failed.
    SwapFailed,
    /// So many frames are to go, and so many are pinned.
    Pinned(u32, u32),
    /// So many frames are to go, so many pages are dirty, and swap has so few slots for them.
    NoRoom(u32, u32, u32),
    /// So many pages a second come back, of so many that go.
    Refaulting(u64, u64),
    /// The reclaim thread has not begun.
    NotBegun,
    /// So many pages a second are written, and so many frames are to go.
    Writing(u64, u32),
    /// Nothing of the kind: so many frames are to go, and so many have gone.
    Unknown(u32, u64),
}

/// The reason for what was not reached.
pub fn judge(evidence: &Evidence) -> Reason {
    let asked = evidence.after.asked(evidence.level);
    if asked.is_some_and(|asked| asked != evidence.goal) {
        return Reason::Elsewhere(asked);
    }
    match evidence.level {
        Level::Balloon => judge_balloon(evidence),
        Level::Frames => judge_frames(evidence),
    }
}

fn judge_balloon(evidence: &Evidence) -> Reason {
    let Evidence { before, recent, after, .. } = evidence;
    let [was, lately, is] = [before, recent, after].map(|seen| seen.reached(Level::Balloon));
    let free = after.sample.guest_free.map(|pages| pages.saturating_mul(bytes(1)));
    match () {
        () if evidence.paused => Reason::Paused,
        () if lately != is => Reason::Slow(rate(lately.abs_diff(is), evidence.lately())),
        () if was != is => Reason::Stopped(is, free),
        () if evidence.has_driver => Reason::Unwilling(free),
        () => Reason::NoAnswer,
    }
}

fn judge_frames(evidence: &Evidence) -> Reason {
    let Evidence { before, recent, after, .. } = *evidence;
    let took = evidence.lately();
    let evicted = after.evicted.saturating_sub(recent.evicted);
    let refaults = after.sample.refaults.saturating_sub(recent.sample.refaults);
    let written = after.sample.swap_outs.saturating_sub(recent.sample.swap_outs);
    let can_go = after.listed.saturating_sub(after.pinned);
    // A page that swap has a copy of needs no slot, so that only those in swap alone take up room.
    let room = after.swap_slots.saturating_sub(after.sample.swapped);
    let has_room = after.dirty <= room || can_go.saturating_sub(after.dirty - room) >= after.over;
    match () {
        () if after.swap_failed => Reason::SwapFailed,
        // It may be what is in the way: what it has in hand stays pinned for as long. Room in swap it would not make.
        () if evidence.paused && evicted == 0 && has_room => Reason::Paused,
        () if after.pinned > 0 && can_go < after.over => Reason::Pinned(after.over, after.pinned),
        () if !has_room => Reason::NoRoom(after.over, after.dirty, room),
        () if refaults > 0 && refaults.saturating_mul(REFAULT_SHARE) >= evicted => {
            Reason::Refaulting(rate(refaults, took), rate(evicted, took))
        }
        () if evicted == 0 && after.wanted => Reason::NotBegun,
        () if written > 0 => Reason::Writing(rate(written, took), after.over),
        () => Reason::Unknown(after.over, after.evicted.saturating_sub(before.evicted)),
    }
}

impl Evidence {
    /// From the recent look to the last.
    fn lately(&self) -> Duration {
        self.after.sample.at.saturating_sub(self.recent.sample.at)
    }
}

/// In a second.
fn rate(count: u64, took: Duration) -> u64 {
    let millis = took.as_millis().max(1);
    u64::try_from(u128::from(count) * 1000 / millis).unwrap_or(u64::MAX)
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Reason::Elsewhere(asked) => {
                let asked = asked.map_or("something else".into(), approximate_size);
                write!(f, "somebody else asks for {asked} now: another client, or --frames of the run")
            }
            Reason::Paused => f.write_str("the guest stands still; another client has stopped it, and cont lets it run"),
            Reason::NoAnswer => f.write_str(
                "the guest does not answer: its balloon has not moved and it has sent no statistics; does it have a driver \
                 for a virtio balloon?",
            ),
            Reason::Unwilling(None) => f.write_str(
                "the guest has a driver, but its balloon has not moved; it may have no memory to spare",
            ),
            Reason::Unwilling(Some(free)) => {
                let free = approximate_size(free);
                write!(f, "the guest has a driver, but its balloon has not moved; it says that it has {free} free")
            }
            Reason::Slow(speed) => {
                let speed = approximate_size(speed);
                write!(f, "the guest's balloon moves by {speed} a second; give it longer, with --timeout")
            }
            Reason::Stopped(at, free) => {
                let at = approximate_size(at);
                write!(f, "the guest's balloon has stopped at {at}, and moves no more")?;
                match free {
                    Some(free) => write!(f, "; it says that it has {} free", approximate_size(free)),
                    None => Ok(()),
                }
            }
            Reason::SwapFailed => f.write_str("swap has failed; the run is about to end, and says why"),
            Reason::Pinned(over, pinned) => write!(
                f,
                "{over} frames are to go, but {pinned} pages are pinned: devices or windows hold them in their frames"
            ),
            Reason::NoRoom(over, dirty, room) => write!(
                f,
                "{over} frames are to go, {dirty} pages are dirty, and swap has room for {room} of them; start the guest with a \
                 larger --swap"
            ),
            Reason::Refaulting(refaults, evicted) => write!(
                f,
                "the guest takes pages back as fast as they go: {refaults} refaults a second and {evicted} evictions; \
                 it uses more than that at once"
            ),
            Reason::NotBegun => f.write_str("the reclaim thread has been woken and has not begun; is the host busy?"),
            Reason::Writing(speed, over) => write!(
                f,
                "writes to swap are under way: {speed} pages a second, and {over} frames are still to go; give it longer, \
                 with --timeout, or a faster --swap"
            ),
            Reason::Unknown(over, evicted) => {
                write!(f, "{over} frames are still to go, {evicted} pages have gone, and nothing says why there are no more")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pressure::client::Kept;
    use crate::vm::Sample;

    const MIB: u64 = 1 << 20;

    /// 12 MiB are asked for, and 100 frames are too many.
    fn frames(change: impl Fn(&mut Seen)) -> Evidence {
        let sample = Sample { budget: 3072, frames_used: 3172, resident: 3000, ..Sample::default() };
        let before = Seen { sample, swap_slots: 4096, listed: 2000, over: 100, ..Seen::default() };
        let mut after = before;
        after.sample.at = Duration::from_secs(2);
        change(&mut after);
        Evidence {
            level: Level::Frames,
            goal: 12 * MIB,
            before,
            recent: before,
            after,
            paused: false,
            has_driver: false,
        }
    }

    /// A guest that is to keep 12 MiB, and keeps so many.
    fn keeps(mib: u64) -> Kept {
        Kept { target: 12 * MIB, actual: mib * MIB, memory: 32 * MIB }
    }

    /// The same of a balloon, of which nothing has moved.
    fn balloon(change: impl Fn(&mut Evidence)) -> Evidence {
        let kept = Some(keeps(32));
        let mut evidence = frames(|_| {});
        evidence.level = Level::Balloon;
        (evidence.before.balloon, evidence.recent.balloon, evidence.after.balloon) = (kept, kept, kept);
        change(&mut evidence);
        evidence
    }

    #[test]
    fn each_reason_has_its_numbers() {
        let paused = |change: fn(&mut Seen)| Evidence { paused: true, ..frames(change) };
        let table: [(&str, Evidence, Reason); 26] = [
            ("nothing moves while the guest stands still", paused(|_| {}), Reason::Paused),
            ("pins of a guest that stands still", paused(|seen| seen.pinned = 1950), Reason::Paused),
            (
                "no room, whether it stands still or not",
                paused(|seen| (seen.sample.swapped, seen.dirty) = (4090, 1950)),
                Reason::NoRoom(100, 1950, 6),
            ),
            (
                "it stands still, and reclaim goes on",
                paused(|seen| (seen.evicted, seen.sample.swap_outs) = (1000, 900)),
                Reason::Writing(450, 100),
            ),
            ("nothing moves", frames(|_| {}), Reason::Unknown(100, 0)),
            ("another budget", frames(|seen| seen.sample.budget = 256), Reason::Elsewhere(Some(MIB))),
            (
                "swap has failed",
                frames(|seen| (seen.swap_failed, seen.pinned) = (true, 3000)),
                Reason::SwapFailed,
            ),
            ("most are pinned", frames(|seen| seen.pinned = 1950), Reason::Pinned(100, 1950)),
            ("pinned, but others are there", frames(|seen| seen.pinned = 1900), Reason::Unknown(100, 0)),
            ("none are listed, none pinned", frames(|seen| seen.listed = 0), Reason::Unknown(100, 0)),
            (
                "swap is full",
                frames(|seen| {
                    (seen.sample.swapped, seen.sample.swap_outs, seen.evicted) = (4090, 9, 9);
                    seen.dirty = 1950;
                }),
                Reason::NoRoom(100, 1950, 6),
            ),
            (
                "swap is full, but clean pages are there",
                frames(|seen| (seen.sample.swapped, seen.dirty) = (4090, 1900)),
                Reason::Unknown(100, 0),
            ),
            (
                "as many as there are come and went, a while ago",
                {
                    let mut evidence = frames(|seen| {
                        (seen.sample.refaults, seen.evicted, seen.sample.swap_outs) = (1000, 1100, 900)
                    });
                    evidence.recent = evidence.after;
                    evidence
                },
                Reason::Unknown(100, 1100),
            ),
            (
                "as many come as go",
                frames(|seen| (seen.sample.refaults, seen.evicted) = (1000, 1100)),
                Reason::Refaulting(500, 550),
            ),
            (
                "every second one comes back",
                frames(|seen| (seen.sample.refaults, seen.evicted, seen.sample.swap_outs) = (500, 1000, 900)),
                Reason::Refaulting(250, 500),
            ),
            (
                "few come back, and writes are under way",
                frames(|seen| (seen.sample.refaults, seen.evicted, seen.sample.swap_outs) = (400, 1000, 900)),
                Reason::Writing(450, 100),
            ),
            ("reclaim is not there", frames(|seen| seen.wanted = true), Reason::NotBegun),
            (
                "clean pages go",
                frames(|seen| (seen.wanted, seen.evicted) = (true, 7)),
                Reason::Unknown(100, 7),
            ),
            ("no driver", balloon(|_| {}), Reason::NoAnswer),
            ("stopped", balloon(|evidence| evidence.paused = true), Reason::Paused),
            (
                "a driver that has nothing",
                balloon(|evidence| {
                    (evidence.has_driver, evidence.after.sample.guest_free) = (true, Some(256))
                }),
                Reason::Unwilling(Some(MIB)),
            ),
            (
                "it moves",
                balloon(|evidence| {
                    (evidence.has_driver, evidence.after.balloon) = (true, Some(keeps(28)));
                }),
                Reason::Slow(2 * MIB),
            ),
            (
                "it moves more slowly now",
                balloon(|evidence| {
                    (evidence.recent.balloon, evidence.after.balloon) = (Some(keeps(21)), Some(keeps(20)));
                    evidence.recent.sample.at = Duration::from_secs(1);
                }),
                Reason::Slow(MIB),
            ),
            (
                "it stands still where the rest is in use",
                balloon(|evidence| {
                    let kept = Some(keeps(20));
                    (evidence.recent.balloon, evidence.after.balloon) = (kept, kept);
                    (evidence.has_driver, evidence.after.sample.guest_free) = (true, Some(256));
                }),
                Reason::Stopped(20 * MIB, Some(MIB)),
            ),
            (
                "it stands still and says nothing",
                balloon(|evidence| {
                    (evidence.recent.balloon, evidence.after.balloon) = (Some(keeps(20)), Some(keeps(20)));
                }),
                Reason::Stopped(20 * MIB, None),
            ),
            (
                "another target",
                balloon(|evidence| {
                    let kept = Kept { target: 20 * MIB, actual: 32 * MIB, memory: 32 * MIB };
                    (evidence.paused, evidence.after.balloon) = (true, Some(kept));
                }),
                Reason::Elsewhere(Some(20 * MIB)),
            ),
        ];
        for (name, evidence, reason) in table {
            assert_eq!(judge(&evidence), reason, "{name}");
            let words = reason.to_string();
            assert!(words.len() > 20 && !words.contains("  ") && !words.ends_with('.'), "{words}");
        }
    }

    #[test]
    fn huge_numbers_and_no_time_are_judged() {
        let evidence = frames(|seen| {
            seen.sample.at = Duration::ZERO;
            (seen.sample.refaults, seen.evicted, seen.over) = (u64::MAX, u64::MAX, u32::MAX);
            (seen.swap_slots, seen.listed) = (u32::MAX, u32::MAX);
        });
        assert_eq!(judge(&evidence), Reason::Refaulting(u64::MAX, u64::MAX));
    }
}
