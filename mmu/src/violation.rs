//! The report of a flush that was missed: what the oracle in the software TLB says when it ends a run.
//!
//! Story: a hit's generation is not that of now, so that the page has changed hands, or lost its right to be written, and this TLB was
//! not flushed in between (INV-TLB-2, tlb). The access is not made. What is known of it is put together here: the access, the entry and
//! when it was made, the invalidation, the flush that it called for against the last one that there was, and what has happened to the
//! page. The same where a link to a table was used whose table, or root, has another life by now (INV-TLB-3, link_cache).
//!
//! Limits: an invalidation is found by its range of pages, and a batch need not have every page of its range. One that is not over yet has no record.

use std::fmt;

use crate::access::AccessKind;
use crate::addr::{Gfn, Gva};
use crate::events::Event;
use crate::link_cache::LinkLevel;
use crate::p2m::Generations;
use crate::records::{Kind, Record};
use crate::spte::Spte;

/// What a TLB still held that had been handed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A translation.
    Translation(StaleTranslation),
    /// A link to a table.
    Link(StaleLink),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::Translation(stale) => stale.fmt(f),
            Violation::Link(stale) => stale.fmt(f),
        }
    }
}

/// INV-TLB-2 broken: the TLB still held a page that had been handed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleTranslation {
    /// The vCPU whose TLB it is.
    pub vcpu: u32,
    /// The access that hit.
    pub gva: Gva,
    /// What it was to do.
    pub kind: AccessKind,
    /// The guest page that the entry is for.
    pub gfn: Gfn,
    /// The entry: the frame that it led to, and what it allowed.
    pub spte: Spte,
    /// When it was made.
    pub filled: Filled,
    /// Generations now.
    pub now: Generations,
    /// The flush clock of the last removal of an spte to that frame that the frame's debt knows of.
    pub removed_at: u64,
    /// The flush clock of this vCPU's last full flush.
    pub flushed_at: u64,
    /// The flush clock that one was last asked of it for.
    pub requested: u64,
    /// Invalidations around the page, the last first.
    pub invalidations: Vec<Record>,
    /// What this vCPU did at the page, the last first, and how many events ago.
    pub events: Vec<(Event, usize)>,
}

/// The making of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Generations then.
    pub generations: Generations,
    /// Which fill of its TLB it was, modulo 2^32.
    pub number: u32,
    /// Fills so far.
    pub of: u64,
    /// Fills before the TLB's last full flush.
    pub flushed: u64,
}

impl StaleTranslation {
    /// What the page has lost.
    fn lost(&self) -> Kind {
        match self.filled.generations.mapping == self.now.mapping {
            true => Kind::WriteProtect,
            false => Kind::Unmap,
        }
    }

    /// The last invalidation that took from the page what it has lost.
    pub fn invalidation(&self) -> Option<&Record> {
        self.invalidations.iter().find(|record| record.cause.kind() == self.lost())
    }
}

impl fmt::Display for StaleTranslation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lost = match self.lost() {
            Kind::Unmap => "frame",
            Kind::WriteProtect => "write permission",
        };
        writeln!(
            f,
            "INV-TLB-2: vCPU {} used a stale translation, {:?} at {} to guest page {} in frame {}: the page's {lost} changed \
             hands",
            self.vcpu,
            self.kind,
            self.gva,
            self.gfn,
            self.spte.mfn(),
        )?;
        let Filled { generations, number, of, flushed } = self.filled;
        writeln!(
            f,
            "  entry: {:?}, made by fill {number} of {of}, its TLB's last full flush was after fill {flushed}; generations \
             then and now: mapping {} and {}, write {} and {}",
            self.spte, generations.mapping, self.now.mapping, generations.write, self.now.write,
        )?;
        let needed = match self.invalidation() {
            Some(record) => {
                writeln!(f, "  invalidation: {}", Told(record))?;
                record.stamp
            }
            None => {
                writeln!(f, "  invalidation: no record of it yet, or no more")?;
                self.removed_at
            }
        };
        let StaleTranslation { flushed_at, requested, .. } = self;
        let why = match *flushed_at > needed {
            true => "which it says that it has made, and the entry is there all the same",
            false => "which it has not made",
        };
        write!(
            f,
            "  missed flush: one of an epoch above {needed}, {why}; the vCPU's last full one was at {flushed_at}, and the \
             last that was asked of it at {requested}",
        )?;
        for record in &self.invalidations {
            write!(f, "\n  page {}: {}", self.gfn, Told(record))?;
        }
        tell(f, self.vcpu, self.gva, &self.events)
    }
}

fn tell(f: &mut fmt::Formatter<'_>, vcpu: u32, gva: Gva, events: &[(Event, usize)]) -> fmt::Result {
    for (event, ago) in events {
        write!(f, "\n  vCPU {vcpu} at {}: {event:?}, {ago} events ago", gva.page())?;
    }
    Ok(())
}

/// What has become of what a link was part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The table serves again; now as a shadow of this guest table, if it is that of one.
    Table(Option<Gfn>),
    /// The table's frame was given back.
    Nothing,
    /// The root serves another address space.
    Root,
}

/// INV-TLB-3 broken: a paging-structure cache still led to a table that had been handed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleLink {
    /// The vCPU whose cache it is.
    pub vcpu: u32,
    /// The access that was to go by it.
    pub gva: Gva,
    /// What it was to do.
    pub kind: AccessKind,
    /// Where the link was found.
    pub level: LinkLevel,
    /// The root that it was found under.
    pub root: u32,
    /// The link.
    pub link: Spte,
    /// What has become of it.
    pub served: Served,
    /// The life of the table, or of the root, then and now.
    pub lives: (u64, u64),
    /// Fills of the TLB before the link was learnt, and so far.
    pub fills: (u64, u64),
    /// Fills before the TLB's last full flush.
    pub flushed_fills: u64,
    /// The flush clock of this vCPU's last full flush.
    pub flushed_at: u64,
    /// The flush clock that one was last asked of it for.
    pub requested: u64,
    /// What this vCPU did at the page, the last first, and how many events ago.
    pub events: Vec<(Event, usize)>,
}

impl fmt::Display for StaleLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StaleLink { vcpu, gva, kind, level, root, link, served, lives, fills, .. } = self;
        let table = match level {
            LinkLevel::Directory => "page table",
            LinkLevel::Root => "directory",
        };
        write!(
            f,
            "INV-TLB-3: vCPU {vcpu} used a stale link, {kind:?} at {gva} by the {table} in frame {}: ",
            link.mfn()
        )?;
        match served {
            Served::Table(Some(gfn)) => writeln!(f, "the table serves again, for guest table {gfn}")?,
            Served::Table(None) => writeln!(f, "the table serves again")?,
            Served::Nothing => writeln!(f, "the table's frame was given back")?,
            Served::Root => writeln!(f, "root {root} serves another address space")?,
        }
        let region = gva.0 >> level.bits() << level.bits();
        let (first, last) = (Gva(region), Gva(region + ((1 << level.bits()) - 1)));
        writeln!(
            f,
            "  link: {link:?}, for {first}..={last} under root {root}, learnt after fill {} of {}, its TLB's last full flush was \
             after fill {}; lives then and now: {} and {}",
            fills.0, fills.1, self.flushed_fills, lives.0, lives.1,
        )?;
        write!(
            f,
            "  missed flush: one since {} was taken out of use, not made or without this link; the vCPU's last full one was at {}, and \
             the last that was asked of it at {}",
            if *served == Served::Root { "the root" } else { "the table" },
            self.flushed_at,
            self.requested,
        )?;
        tell(f, *vcpu, *gva, &self.events)
    }
}

/// A record in words.
struct Told<'a>(&'a Record);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Record { cause, at, first, last, asked, pages, kicked, stamp, own, .. } = self.0;
        let kind = match cause.kind() {
            Kind::Unmap => "unmap",
            Kind::WriteProtect => "write-protect",
        };
        let micros = at / 1000;
        write!(
            f,
            "{} ({kind}) of {pages} of {asked} pages in {first}..={last}, at {micros} us, ",
            cause.name()
        )?;
        match own {
            Some(vcpu) => write!(f, "by vCPU {vcpu}")?,
            None => write!(f, "by a thread that is no vCPU's")?,
        }
        write!(f, ", removal at flush clock {stamp}, {kicked} vCPUs kicked")
    }
}
