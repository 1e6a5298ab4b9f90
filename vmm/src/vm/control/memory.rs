//! Commands about the guest's memory: `x-frames`, `x-memory`, `x-counters`, `x-discard`, `x-page-out`.
//!
//! Story: the guest's pages are the MMU's; here are an operator's ways to ask for them, in pieces that end soon, so that the
//! end of the run and the time limit are seen between two.
//!
//! Limits: [`WORK_MAX`] for a command, seen between pieces.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use umbra_mmu::discard::{Discard, NotDiscarded};
use umbra_mmu::invalidation::May;
use umbra_mmu::{BudgetRefused, Gfn, PAGE_SIZE, Shortage};

use super::Controls;
use super::commands::Arguments;
use super::protocol::{Answer, Class, Refusal};
use crate::export::Exporter;
use crate::vm::ending::End;
use crate::vm::summary::Memory;

/// How long a command may work on pages. What it has not come to by then, it leaves.
pub const WORK_MAX: Duration = Duration::from_secs(2);
/// Pages of a piece: few, for each may wait for the swap device or a gate.
const PIECE: u32 = 32;
/// Pages of a piece where nothing may be waited for: one invalidation.
const ATOMIC_PIECE: u32 = umbra_mmu::invalidation::BATCH_MAX as u32;

/// Queries the budget, or sets it.
pub fn frames(controls: &Controls, arguments: &Arguments) -> Answer {
    if let Some(bytes) = arguments.unsigned("bytes") {
        set_budget(controls, bytes)?;
    }
    let usage = controls.mmu.usage();
    Ok(json!({
        "budget": bytes(usage.budget),
        "budget-min": bytes(controls.mmu.budget_min()),
        "budget-max": bytes(controls.mmu.budget_max()),
        "used": bytes(usage.frames_used),
        "free": bytes(usage.frames_free),
    }))
}

fn set_budget(controls: &Controls, bytes: u64) -> Result<(), Refusal> {
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(Refusal::generic("Parameter 'bytes' expects a multiple of 4096"));
    }
    if !controls.swap {
        return Err(Refusal::generic(
            "this guest has no swap, and would end for want of a frame; start it with --frames, which may be as much as --mem",
        ));
    }
    let frames = u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX);
    // One that is too small anyway is refused for that.
    if frames >= controls.mmu.budget_min()
        && let Some(wanted) = more_than_swap_has_room_for(controls, frames)
    {
        return Err(Refusal::generic(wanted));
    }
    controls.mmu.set_budget(frames).map_err(|refused| {
        Refusal::generic(match refused {
            BudgetRefused::TooSmall { least, .. } => format!(
                "{bytes} bytes are too few for this guest: at least {}, for its low memory and its tables",
                self::bytes(least)
            ),
            BudgetRefused::TooLarge { most, .. } => format!(
                "{bytes} bytes are more than the machine has: at most {}, which all of this guest's memory and its tables have \
                 room in",
                self::bytes(most)
            ),
        })
    })
}

/// Why the pages in use cannot all be in so many frames and in swap: the guest would end for want of a frame.
fn more_than_swap_has_room_for(controls: &Controls, frames: u32) -> Option<String> {
    let (mmu, usage) = (&controls.mmu, controls.mmu.usage());
    let (in_use, slots) = (usage.resident + usage.swapped, mmu.pressure().swap_slots);
    let tables = mmu.budget_min() - mmu.config().low_pages.min(mmu.config().guest_pages);
    let least = in_use.saturating_sub(slots) + tables;
    (frames < least).then(|| {
        format!(
            "the guest has {in_use} pages in use, and swap has {slots} slots: {} bytes are too few; at least {} are possible now, \
             fewer with a larger --swap",
            bytes(frames),
            bytes(least)
        )
    })
}

/// Where the guest's pages are, and what reclaim is up against. It looks at every page.
pub fn memory(controls: &Controls, _: &Arguments) -> Answer {
    let mmu = &controls.mmu;
    let (pressure, usage, reclaim, window) =
        (mmu.pressure(), mmu.usage(), mmu.reclaim_stats(), mmu.window_stats());
    let backed = controls.pool.as_ref().map(|pool| pool.backed_bytes()).transpose();
    let balloon = controls.balloon.as_ref().map(|balloon| (balloon.pages(), balloon.memory_bytes()));
    Ok(json!({
        "page-size": PAGE_SIZE,
        "guest-pages": mmu.p2m().pages(),
        "resident": usage.resident,
        "swapped": usage.swapped,
        "zero": pressure.zero,
        "ballooned": usage.ballooned,
        "balloon": balloon.map(|((target, actual), memory)| {
            json!({"target": target, "actual": actual, "memory": memory / PAGE_SIZE})
        }),
        "pinned": pressure.pinned,
        "dirty": pressure.dirty,
        "shadow-pages": usage.shadow_pages,
        "frames-free": usage.frames_free,
        "frames-used": usage.frames_used,
        "budget": usage.budget,
        "budget-min": mmu.budget_min(),
        "budget-max": mmu.budget_max(),
        "reclaim": {
            "wanted": pressure.wanted,
            "short": pressure.short,
            "over-budget": pressure.over,
            "failed": pressure.failed,
            "reserve": pressure.marks.reserve,
            "low": pressure.marks.low,
            "high": pressure.marks.high,
            "inactive": pressure.inactive,
            "active": pressure.active,
            "refaults": reclaim.refaults,
            "direct": reclaim.direct,
            "gate-waits": reclaim.gate_waits,
            "page-waits": reclaim.page_waits,
            "given-back": reclaim.given_back,
            "stall-nanos-max": reclaim.stall_nanos_max,
        },
        "swap": {
            "slots": pressure.swap_slots,
            "used": pressure.swap_used,
            "in-memory": controls.swap_in_memory,
        },
        "host": {"frames": backed.map_err(Refusal::generic)?, "resident": resident_bytes()},
        "window": {
            "slots": window.slots,
            "taken": window.taken,
            "idle": window.idle,
            "waiters": window.waiters,
        },
        "export": controls.exporter.as_ref().map(exported),
    }))
}

/// Who imports, and what. May wait for a segment that is being made or removed.
fn exported(exporter: &Exporter) -> Value {
    let Exporter { mmu, segments, hub } = exporter;
    let counts = hub.counts();
    json!({
        "importers": hub.importers(),
        "segments": segments.count(),
        "imported": mmu.imported_pages(),
        "welcomed": counts.welcomed,
        "told": counts.told,
        "late": counts.late,
        "dropped": counts.dropped,
        "killed": counts.killed,
    })
}

/// Umbra's whole memory, as the host counts it; it does not say where there is no /proc.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * PAGE_SIZE)
}

/// What has been done so far.
pub fn counters(controls: &Controls, _: &Arguments) -> Answer {
    let reclaim = controls.mmu.reclaim_stats();
    let memory = serde_json::to_value(Memory::of(&controls.mmu)).map_err(Refusal::generic)?;
    Ok(json!({
        "resets": controls.stops.resets(),
        "memory": memory,
        "reclaim": {
            "scanned": reclaim.scanned,
            "reclaimed": reclaim.reclaimed,
            "unshadowed": reclaim.unshadowed,
        },
    }))
}

/// Discards pages: they read as zeros from then on.
pub fn discard(controls: &Controls, arguments: &Arguments) -> Answer {
    let pages = Pages::of(controls, arguments)?;
    let (may, piece) = match arguments.flag("atomic") {
        true => (May::NotSleep, ATOMIC_PIECE),
        false => (May::Sleep, PIECE),
    };
    let done = pages.in_pieces(controls, piece, |first, last| {
        let discarded = controls.mmu.discard(None, first..last, Discard::Zero, may);
        discarded.map(|()| last - first).map_err(|why| not_discarded(why, first))
    })?;
    Ok(json!({"discarded": done.worked, "left": done.left}))
}

fn not_discarded(why: NotDiscarded, first: u32) -> Refusal {
    let class = match why {
        NotDiscarded::WouldBlock(_) => Class::WouldBlock,
        NotDiscarded::Held { .. } => Class::Generic,
    };
    let before = u64::from(first) * PAGE_SIZE;
    Refusal { class, desc: format!("{why}; all pages before {before:#x} are discarded") }
}

/// Has pages go to swap, those that can be had.
pub fn page_out(controls: &Controls, arguments: &Arguments) -> Answer {
    let pages = Pages::of(controls, arguments)?;
    if arguments.flag("atomic") {
        return page_out_atomic(controls, &pages);
    }
    let done = pages.in_pieces(controls, PIECE, |first, last| {
        let gfns: Vec<Gfn> = (first..last).map(Gfn).collect();
        controls.mmu.page_out(None, &gfns).map_err(|failed| {
            let refusal =
                Refusal::generic(format!("{} pages could not go to swap: {}", failed.pages, failed.why));
            controls.ending.set(End::Shortage(Shortage::Swap(failed)));
            refusal
        })
    })?;
    Ok(json!({"freed": done.worked, "left": done.left}))
}

/// The same without sleep: pages that need no write.
fn page_out_atomic(controls: &Controls, pages: &Pages) -> Answer {
    let done = pages.in_pieces(controls, ATOMIC_PIECE, |first, last| {
        let gfns: Vec<Gfn> = (first..last).map(Gfn).collect();
        controls.mmu.page_out_atomic(None, &gfns).map_err(|why| {
            let [from, to] = [first, last].map(|page| u64::from(page) * PAGE_SIZE);
            let desc = format!("{why}; between {from:#x} and {to:#x} pages are left, and beyond that all");
            Refusal { class: Class::WouldBlock, desc }
        })
    })?;
    Ok(json!({"freed": done.worked, "left": done.left}))
}

fn bytes(frames: u32) -> u64 {
    u64::from(frames) * PAGE_SIZE
}

/// A range of guest memory.
struct Pages {
    first: u32,
    end: u32,
}

/// What became of a range.
struct Done {
    /// Pages of which something has come.
    worked: u32,
    /// Pages that there was no time for.
    left: u32,
}

impl Pages {
    fn of(controls: &Controls, arguments: &Arguments) -> Result<Pages, Refusal> {
        let (gpa, bytes) = (arguments.number("gpa")?, arguments.number("bytes")?);
        for (name, value) in [("gpa", gpa), ("bytes", bytes)] {
            if !value.is_multiple_of(PAGE_SIZE) {
                return Err(Refusal::generic(format!("Parameter '{name}' expects a multiple of 4096")));
            }
        }
        let all = controls.mmu.p2m().pages();
        let end = gpa.checked_add(bytes).map(|end| end / PAGE_SIZE).filter(|end| *end <= u64::from(all));
        match end {
            Some(end) => Ok(Pages { first: (gpa / PAGE_SIZE) as u32, end: end as u32 }),
            None => Err(Refusal::generic(format!(
                "guest memory ends at {:#x}; 'gpa' and 'bytes' go beyond it",
                u64::from(all) * PAGE_SIZE
            ))),
        }
    }

    /// Calls `work` for one piece after the other, until the time is over or the run ends.
    fn in_pieces(
        &self,
        controls: &Controls,
        piece: u32,
        mut work: impl FnMut(u32, u32) -> Result<u32, Refusal>,
    ) -> Result<Done, Refusal> {
        let deadline = Instant::now() + WORK_MAX;
        let (mut first, mut worked) = (self.first, 0);
        while first < self.end && Instant::now() < deadline && !controls.ending.is_set() {
            let last = self.end.min(first + piece);
            worked += work(first, last)?;
            first = last;
        }
        Ok(Done { worked, left: self.end - first })
    }
}
