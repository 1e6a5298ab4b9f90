//! What invalidations leave behind: a record each, and totals by cause.
//!
//! Story: every invalidation pushes its [`Record`] as it ends. Whoever measures takes the records away from time to time
//! ([`Records::take`]); the totals stay, and so do the last records, for whoever asks what has become of a page
//! ([`Records::about`]).
//!
//! Locks: [`lock_order::RECORDS`], a leaf.
//!
//! A vCPU that has slept at a gate leaves a [`GateWait`] in the same way.
//!
//! Limits: [`RECORDS_MAX`] records are kept, and as many waits; older ones go, and are counted.

use std::collections::VecDeque;
use std::fmt::Write;

use crate::addr::Gfn;
use crate::external::ImporterId;
use crate::lock_order;
use crate::sync::{Lock, note};

/// Records that wait to be taken, at most, and waits at gates.
pub const RECORDS_MAX: usize = 4096;

/// Nanoseconds from some beginning, never going back. The mmu has no clock of its own.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Now.
    fn now(&self) -> u64;
}

/// A clock that stands still.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoClock;

impl Clock for NoClock {
    fn now(&self) -> u64 {
        0
    }
}

/// Why pages were invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// By the background thread, for want of free frames.
    Reclaim,
    /// By somebody who wanted a frame.
    DirectReclaim,
    /// Somebody asked for these very pages to go to swap.
    PageOut,
    /// The contents are not wanted any more.
    Discard,
    /// The guest gives the page up.
    Balloon,
    /// The page has become a page table that is shadowed.
    Track,
    /// The VMM wants to see stores to it.
    Watch,
    /// It moves to where importers can have it.
    Import,
    /// It moves away from there.
    Revoke,
    /// It moves to where its neighbours are.
    Collapse,
}

/// What is taken from the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every translation.
    Unmap,
    /// The right to write.
    WriteProtect,
}

impl Cause {
    /// All there are.
    pub const ALL: [Cause; 10] = [
        Cause::Reclaim,
        Cause::DirectReclaim,
        Cause::PageOut,
        Cause::Discard,
        Cause::Balloon,
        Cause::Track,
        Cause::Watch,
        Cause::Import,
        Cause::Revoke,
        Cause::Collapse,
    ];

    /// What it takes.
    pub fn kind(self) -> Kind {
        match self {
            Cause::Track | Cause::Watch => Kind::WriteProtect,
            _ => Kind::Unmap,
        }
    }

    /// It can do without any one page.
    pub(crate) fn may_skip(self) -> bool {
        matches!(self, Cause::Reclaim | Cause::DirectReclaim | Cause::PageOut | Cause::Collapse)
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Reclaim => "reclaim",
            Cause::DirectReclaim => "direct-reclaim",
            Cause::PageOut => "page-out",
            Cause::Discard => "discard",
            Cause::Balloon => "balloon",
            Cause::Track => "track",
            Cause::Watch => "watch",
            Cause::Import => "import",
            Cause::Revoke => "revoke",
            Cause::Collapse => "collapse",
        }
    }
}

/// One invalidation. Times are in nanoseconds of the [`Clock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Why.
    pub cause: Cause,
    /// When it began.
    pub at: u64,
    /// The lowest page asked for.
    pub first: Gfn,
    /// The highest.
    pub last: Gfn,
    /// The vCPU that it was for, which was outside; `None` for another thread.
    pub own: Option<u32>,
    /// Flush clock of the last removal of an spte to one of its pages: what vCPUs had to flush after. 0 where there was none.
    pub stamp: u64,
    /// Pages asked for.
    pub asked: u32,
    /// Pages taken.
    pub pages: u32,
    /// Pages left alone: pinned, or a table in use.
    pub skipped: u32,
    /// Frames made free.
    pub freed: u32,
    /// vCPUs kicked.
    pub kicked: u32,
    /// Importers told.
    pub told: u32,
    /// Those of them that did not answer in their time.
    pub late: u32,
    /// See [`crate::external::Answers::slowest`].
    pub slowest: Option<ImporterId>,
    /// To close the gates.
    pub gate: u64,
    /// To take every spte away.
    pub unmap: u64,
    /// To tell importers.
    pub tell: u64,
    /// Until every vCPU had flushed.
    pub shootdown: u64,
    /// From then until every importer had answered, or was late.
    pub external: u64,
    /// To settle the pages, writing them out among it, and to open the gates; or to put back what cannot be taken.
    pub finish: u64,
    /// From first to last: the sum of the six before it.
    pub total: u64,
}

impl Record {
    /// That of an invalidation of `gfns` which has not begun.
    pub fn new(cause: Cause, gfns: &[Gfn]) -> Record {
        Record {
            cause,
            at: 0,
            first: gfns.iter().min().copied().unwrap_or_default(),
            last: gfns.iter().max().copied().unwrap_or_default(),
            own: None,
            stamp: 0,
            asked: gfns.len() as u32,
            pages: 0,
            skipped: 0,
            freed: 0,
            kicked: 0,
            told: 0,
            late: 0,
            slowest: None,
            gate: 0,
            unmap: 0,
            tell: 0,
            shootdown: 0,
            external: 0,
            finish: 0,
            total: 0,
        }
    }
}

/// A sleep of a vCPU at the gate of a page that was changing hands. Times are in nanoseconds of the [`Clock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateWait {
    /// Whose.
    pub vcpu: u32,
    /// The page.
    pub gfn: Gfn,
    /// When it met the closed gate.
    pub at: u64,
    /// How long it had to wait.
    pub nanos: u64,
}

/// What was taken at one moment: the records and waits since the last time, and the totals with exactly these among them.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    /// Records, oldest first.
    pub records: Vec<Record>,
    /// Records that were lost between.
    pub records_lost: u64,
    /// Waits at gates, oldest first.
    pub waits: Vec<GateWait>,
    /// Waits that were lost between.
    pub waits_lost: u64,
    /// Totals so far, in the order of [`Cause::ALL`].
    pub totals: [Totals; Cause::ALL.len()],
}

/// What the invalidations of one cause came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many there were.
    pub count: u64,
    /// Pages taken.
    pub pages: u64,
    /// Pages left alone.
    pub skipped: u64,
    /// Kicks.
    pub kicked: u64,
    /// Importers told.
    pub told: u64,
    /// Those of them that did not answer in their time.
    pub late: u64,
    /// Nanoseconds that importers were waited for, beyond the vCPUs.
    pub external: u64,
    /// The longest of these, and whom it was for.
    pub external_max: u64,
    /// See there.
    pub slowest: Option<ImporterId>,
    /// Nanoseconds, all together.
    pub nanos: u64,
    /// The longest.
    pub nanos_max: u64,
    /// Requests of callers that may not sleep, whatever came of them.
    pub atomic: u64,
    /// Those of them that were told [`crate::invalidation::WouldBlock`].
    pub would_block: u64,
}

#[derive(Debug, Default)]
struct Kept {
    last: VecDeque<Record>,
    /// How many of them, at the end, nobody has taken yet.
    waiting: usize,
    lost: u64,
    waits: VecDeque<GateWait>,
    waits_lost: u64,
    totals: [Totals; Cause::ALL.len()],
}

impl Kept {
    fn take_records(&mut self) -> Vec<Record> {
        let taken = self.last.len() - std::mem::take(&mut self.waiting);
        self.last.range(taken..).copied().collect()
    }
}

/// The records of one guest.
#[derive(Debug)]
pub struct Records {
    kept: Lock<Kept>,
}

impl Records {
    pub(crate) fn new() -> Records {
        Records { kept: Lock::new(lock_order::RECORDS, Kept::default()) }
    }

    pub(crate) fn push(&self, record: &Record) {
        note(|line| {
            let Record { cause, first, last, asked, pages, freed, kicked, total, .. } = record;
            let (cause, first, last) = (cause.name(), first.0, last.0);
            let _ = write!(
                line,
                "{cause} {first:#x}..={last:#x}: {pages} of {asked} pages, {freed} frames free, {kicked} kicked, {total} ns"
            );
        });
        let mut kept = self.kept.lock();
        let totals = &mut kept.totals[record.cause as usize];
        totals.count += 1;
        totals.pages += u64::from(record.pages);
        totals.skipped += u64::from(record.skipped);
        totals.kicked += u64::from(record.kicked);
        totals.told += u64::from(record.told);
        totals.late += u64::from(record.late);
        totals.external += record.external;
        if record.told > 0 && record.external >= totals.external_max {
            (totals.external_max, totals.slowest) = (record.external, record.slowest);
        }
        totals.nanos += record.total;
        totals.nanos_max = totals.nanos_max.max(record.total);
        if kept.last.len() == RECORDS_MAX {
            kept.last.pop_front();
        }
        kept.last.push_back(*record);
        match kept.waiting {
            RECORDS_MAX => kept.lost += 1,
            _ => kept.waiting += 1,
        }
    }

    /// Notes a request of a caller that may not sleep, and whether it would have had to.
    pub(crate) fn note_atomic(&self, cause: Cause, would_block: bool) {
        let mut kept = self.kept.lock();
        let totals = &mut kept.totals[cause as usize];
        totals.atomic += 1;
        totals.would_block += u64::from(would_block);
    }

    pub(crate) fn push_wait(&self, wait: GateWait) {
        note(|line| {
            let _ = write!(line, "was at the gate of {:#x} for {} ns", wait.gfn.0, wait.nanos);
        });
        let mut kept = self.kept.lock();
        if kept.waits.len() == RECORDS_MAX {
            kept.waits.pop_front();
            kept.waits_lost += 1;
        }
        kept.waits.push_back(wait);
    }

    /// Takes all there is since the last call of this or of [`Records::take`].
    pub fn take_all(&self) -> Taken {
        let mut kept = self.kept.lock();
        Taken {
            records_lost: std::mem::take(&mut kept.lost),
            waits_lost: std::mem::take(&mut kept.waits_lost),
            records: kept.take_records(),
            waits: kept.waits.drain(..).collect(),
            totals: kept.totals,
        }
    }

    /// Takes the records since the last call, oldest first, and how many were lost between.
    pub fn take(&self) -> (Vec<Record>, u64) {
        let mut kept = self.kept.lock();
        let lost = std::mem::take(&mut kept.lost);
        (kept.take_records(), lost)
    }

    /// Invalidations that took pages, `gfn` perhaps among them, taken or not: the last first, and no more than `count`.
    pub fn about(&self, gfn: Gfn, count: usize) -> Vec<Record> {
        let kept = self.kept.lock();
        let has = |record: &&Record| record.pages > 0 && (record.first..=record.last).contains(&gfn);
        kept.last.iter().rev().filter(has).take(count).copied().collect()
    }

    /// The totals of one cause.
    pub fn totals(&self, cause: Cause) -> Totals {
        self.kept.lock().totals[cause as usize]
    }

    /// WouldBlocks so far.
    pub fn would_blocks(&self) -> u64 {
        self.kept.lock().totals.iter().map(|totals| totals.would_block).sum()
    }

    /// Invalidations so far.
    pub fn count(&self) -> u64 {
        self.kept.lock().totals.iter().map(|totals| totals.count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_records_go_and_are_counted_and_totals_stay() {
        let records = Records::new();
        for n in 0..RECORDS_MAX as u64 + 3 {
            let mut record = Record::new(Cause::Discard, &[Gfn(7), Gfn(5)]);
            (record.pages, record.total) = (2, n);
            records.push(&record);
        }
        let (taken, lost) = records.take();
        assert_eq!((taken.len(), lost, taken[0].total), (RECORDS_MAX, 3, 3));
        assert_eq!((taken[0].first, taken[0].last), (Gfn(5), Gfn(7)));
        assert_eq!(records.take(), (Vec::new(), 0));
        let about = |gfn| records.about(Gfn(gfn), 2).iter().map(|record| record.total).collect::<Vec<_>>();
        let last = RECORDS_MAX as u64 + 2;
        assert_eq!((about(6), about(8)), (vec![last, last - 1], Vec::new()));
        let totals = records.totals(Cause::Discard);
        assert_eq!((totals.count, totals.nanos_max), (RECORDS_MAX as u64 + 3, RECORDS_MAX as u64 + 2));
        assert_eq!(records.count(), totals.count);
    }
    #[test]
    fn all_that_is_taken_at_once_belongs_together() {
        let records = Records::new();
        let wait = GateWait { vcpu: 1, gfn: Gfn(3), at: 10, nanos: 5 };
        for n in 0..RECORDS_MAX as u64 + 2 {
            records.push_wait(GateWait { at: n, ..wait });
        }
        records.push(&Record::new(Cause::PageOut, &[Gfn(3)]));
        let taken = records.take_all();
        assert_eq!((taken.records.len(), taken.records_lost), (1, 0));
        assert_eq!((taken.waits.len(), taken.waits_lost, taken.waits[0].at), (RECORDS_MAX, 2, 2));
        assert_eq!(taken.totals[Cause::PageOut as usize].count, 1);
        let again = records.take_all();
        assert!(again.records.is_empty() && again.waits.is_empty() && again.totals == taken.totals);
    }
}
