//! The summary of a run: Umbra's own witnesses, and the verdict they come to.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use umbra_mmu::guest_tlb::Verdicts;
use umbra_mmu::records::Cause;
use umbra_mmu::sync::sim::Logged;
use umbra_mmu::tlb::TlbStats;
use umbra_mmu::{Context, FaultStats, HugeStats, Mmu};

use super::ending::End;
use super::series::Series;
use super::vcpu::VcpuStats;
use crate::board::BoardExit;
use crate::boot::witness::Witness;
use crate::status::Status;
use crate::virtio::balloon::BalloonState;
use crate::virtio::blk::DiskSummary;

/// Memory in use at the end.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Memory {
    /// Pages of guest memory.
    pub guest_pages: u32,
    /// Those that were touched and have a frame.
    pub resident: u32,
    /// Shadow pages in use.
    pub shadow_pages: u32,
    /// Frames that the guest and its tables may have, at the end.
    pub budget: u32,
    /// Guest pages in swap.
    pub swapped: u32,
    /// Pages read back from swap because somebody wanted them.
    pub refaults: u64,
    /// Pages read back beside those.
    pub read_ahead: u64,
    /// Pages written to swap.
    pub swap_outs: u64,
    /// Writes to swap, each of adjacent pages.
    pub swap_writes: u64,
    /// Pages dropped that were zeros.
    pub zero_drops: u64,
    /// Pages dropped that swap had a good copy of.
    pub clean_drops: u64,
    /// Times that the vCPU had to reclaim for itself.
    pub direct_reclaims: u64,
    /// Frames given back to the host.
    pub given_back: u64,
    /// The longest that anybody waited for a page to be brought in, in nanoseconds.
    pub stall_nanos_max: u64,
    /// Ranges of 2 MiB that were gathered (`--huge`).
    pub huge: HugeRanges,
    /// Invalidations, by cause.
    pub invalidations: Vec<Invalidations>,
    /// Shadow pages evicted.
    pub evictions: u64,
    /// Emulated stores to shadowed tables.
    pub tracked_stores: u64,
    /// The window: its pool, and its stacks by class of context.
    pub window: Window,
}

/// [`umbra_mmu::WindowStats`] for JSON, and how deep its stacks were.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Window {
    pub slots: u32,
    pub taken: u32,
    pub idle: u32,
    pub waiters: u32,
    pub sweeps: u64,
    pub swept: u64,
    pub waits: u64,
    pub contexts: Vec<WindowContext>,
}

/// The local mappings of a class of contexts, for JSON.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct WindowContext {
    /// Which class.
    pub context: &'static str,
    /// The most that one may have open at once.
    pub depth_max: usize,
    /// The most that one has had.
    pub deepest: u32,
}

impl Window {
    fn of(mmu: &Mmu) -> Window {
        let s = mmu.window_stats();
        let contexts = Context::ALL.map(|context| WindowContext {
            context: context.name(),
            depth_max: context.depth_max(),
            deepest: mmu.window_depth(context),
        });
        Window {
            slots: s.slots,
            taken: s.taken,
            idle: s.idle,
            waiters: s.waiters,
            sweeps: s.sweeps,
            swept: s.swept,
            waits: s.waits,
            contexts: contexts.into(),
        }
    }
}

/// The invalidations of one cause.
#[derive(Clone, Debug, Serialize)]
pub struct Invalidations {
    /// Why.
    pub cause: &'static str,
    /// How many.
    pub count: u64,
    /// Pages taken.
    pub pages: u64,
    /// Pages left alone: pinned, or a table in use.
    pub skipped: u64,
    /// vCPUs kicked.
    pub kicked: u64,
    /// Importers told.
    pub importers_told: u64,
    /// Those of them that did not answer in their time.
    pub importers_late: u64,
    /// Nanoseconds that importers were waited for, beyond the vCPUs.
    pub external: u64,
    /// The longest of these.
    pub external_max: u64,
    /// The importer whom that was for.
    pub importer_slowest: Option<u32>,
    /// Nanoseconds, all together.
    pub nanos: u64,
    /// The longest.
    pub nanos_max: u64,
    /// Requests of callers that may not sleep, whatever came of them.
    pub atomic: u64,
    /// Those of them that would have had to.
    pub would_block: u64,
}

impl Invalidations {
    fn of(mmu: &Mmu, cause: Cause) -> Invalidations {
        let t = mmu.records().totals(cause);
        Invalidations {
            cause: cause.name(),
            count: t.count,
            pages: t.pages,
            skipped: t.skipped,
            kicked: t.kicked,
            importers_told: t.told,
            importers_late: t.late,
            external: t.external,
            external_max: t.external_max,
            importer_slowest: t.slowest.map(|importer| importer.0),
            nanos: t.nanos,
            nanos_max: t.nanos_max,
            atomic: t.atomic,
            would_block: t.would_block,
        }
    }
}

/// Times, in microseconds since the process started.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Times {
    /// First entry into the guest.
    pub guest_started: u64,
    /// The guest's first serial byte.
    pub first_serial_byte: Option<u64>,
    /// The end of the run.
    pub ended: u64,
}

/// Everything about a run that has ended.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Version of Umbra.
    pub version: &'static str,
    /// Backend.
    pub backend: &'static str,
    /// How vCPUs were made to forget pages: "kick" or "notifier".
    pub shootdown: &'static str,
    /// PASS, FAIL, TIMEOUT, RESET, QUIT or ERROR.
    pub verdict: &'static str,
    /// The process's exit status.
    pub status: u8,
    /// The same, with its reason.
    #[serde(skip)]
    pub exit: Status,
    /// What the guest wrote to its exit port, if it did.
    pub guest_exit: Option<u32>,
    /// The end in words.
    pub end: String,
    /// How often an operator has had the machine reset. What is counted here is counted over all of them.
    pub resets: u64,
    /// Named regions and their hashes.
    pub regions: Vec<Witness>,
    /// Why the witnesses could not be heard, if they could not.
    pub witness_error: Option<String>,
    /// What the audit of the shadow found; empty when all is well.
    pub audit: Vec<String>,
    /// Faults as the MMU counts them.
    pub faults: Faults,
    /// What the software TLBs did, all together.
    pub tlb: TlbCounts,
    /// How many vCPUs there were.
    pub vcpus: usize,
    /// What they did, all together.
    pub vcpu: Counts,
    /// Memory.
    pub memory: Memory,
    /// What `--check-guest-tlb` found, but for what ended the run.
    pub guest_tlb: Option<GuestFlushes>,
    /// Disks, in order.
    pub disks: Vec<DiskSummary>,
    /// The balloon.
    pub balloon: BalloonState,
    /// Times.
    pub times: Times,
    /// Memory over time, if anybody asked for it.
    pub series: Option<Series>,
    /// What a simulation's event log came to.
    pub event_log: Option<EventLog>,
}

/// [`umbra_mmu::sync::sim::Logged`] for JSON.
#[derive(Clone, Debug, Serialize)]
pub struct EventLog {
    /// Its lines.
    pub events: u64,
    /// A hash of them, in hexadecimal.
    pub hash: String,
    /// Virtual time of the last, in microseconds.
    pub micros: u64,
}

impl From<Logged> for EventLog {
    fn from(logged: Logged) -> EventLog {
        EventLog { events: logged.events, hash: format!("{:016x}", logged.hash), micros: logged.nanos / 1000 }
    }
}

/// [`FaultStats`] for JSON.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Faults {
    pub taken: u64,
    pub fixed: u64,
    pub spurious: u64,
    pub emulated: u64,
    pub guest: u64,
    pub mmio: u64,
    pub retried: u64,
    pub prefilled: u64,
    pub unsynced: u64,
    pub gate_waits: u64,
    pub gate_nanos_max: u64,
}

impl From<FaultStats> for Faults {
    fn from(s: FaultStats) -> Faults {
        Faults {
            taken: s.taken,
            fixed: s.fixed,
            spurious: s.spurious,
            emulated: s.emulated,
            guest: s.guest,
            mmio: s.mmio,
            retried: s.retried,
            prefilled: s.prefilled,
            unsynced: s.unsynced,
            gate_waits: s.gate_waits,
            gate_nanos_max: s.gate_nanos_max,
        }
    }
}

/// What was found of the guest's own flushes.
#[derive(Clone, Debug, Serialize)]
pub struct GuestFlushes {
    /// Changes of page-table entries that were seen.
    pub edits: u64,
    /// Edits whose CPU let go while a translation was held that had lost its frame.
    pub suspect_frames: u64,
    /// The same, that had lost a right.
    pub suspect_rights: u64,
    /// The same, whose accessed or dirty bit was taken.
    pub suspect_status: u64,
    /// A table was taken out of its directory by a CPU that has flushed nothing since.
    pub suspect_tables: u64,
    /// PAE's pointers were stored to and not loaded.
    pub suspect_pointers: u64,
    /// The first of them, in words.
    pub suspects: Vec<String>,
}

impl From<Verdicts> for GuestFlushes {
    fn from(found: Verdicts) -> GuestFlushes {
        let [suspect_frames, suspect_rights, suspect_status, suspect_tables, suspect_pointers] =
            found.suspects;
        let suspects = found.listed.iter().map(ToString::to_string).collect();
        GuestFlushes {
            edits: found.edits,
            suspect_frames,
            suspect_rights,
            suspect_status,
            suspect_tables,
            suspect_pointers,
            suspects,
        }
    }
}

impl fmt::Display for GuestFlushes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.suspects.iter().try_for_each(|suspect| writeln!(f, "suspect: {suspect}"))?;
        write!(
            f,
            "guest TLB: edits={} suspect frames={} rights={} accessed or dirty={} tables={} pointers={}",
            self.edits,
            self.suspect_frames,
            self.suspect_rights,
            self.suspect_status,
            self.suspect_tables,
            self.suspect_pointers,
        )
    }
}

/// [`VcpuStats`] for JSON.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Counts {
    pub entries: u64,
    pub page_faults: u64,
    pub traps: u64,
    pub kicks: u64,
    pub interpreted: u64,
    pub exceptions: u64,
    pub user_faults: u64,
    pub interrupts: u64,
    pub flushes: u64,
}

impl From<VcpuStats> for Counts {
    fn from(s: VcpuStats) -> Counts {
        Counts {
            entries: s.entries,
            page_faults: s.page_faults,
            traps: s.traps,
            kicks: s.kicks,
            interpreted: s.interpreted,
            exceptions: s.exceptions,
            user_faults: s.user_faults,
            interrupts: s.interrupts,
            flushes: s.flushes,
        }
    }
}

/// [`TlbStats`] for JSON.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct TlbCounts {
    /// Entries made: one for each miss that was no fault of the guest's.
    pub fills: u64,
    /// Pages forgotten by INVLPG or a page fault.
    pub page_flushes: u64,
    /// Flushes of everything, or of everything but global pages.
    pub flushes: u64,
}

impl TlbCounts {
    /// With those of another.
    pub fn plus(self, s: TlbStats) -> TlbCounts {
        TlbCounts {
            fills: self.fills + s.fills,
            page_flushes: self.page_flushes + s.page_flushes,
            flushes: self.flushes + s.flushes,
        }
    }
}

/// What has become of ranges of 2 MiB.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct HugeRanges {
    /// Those that are huge at the end.
    pub now: u32,
    /// Collapses.
    pub collapsed: u64,
    /// Huge ranges that were split again.
    pub split: u64,
    /// Collapses that gave up because a page was taken meanwhile.
    pub hit: u64,
    /// Those that did because a page was held in its place, or is no memory.
    pub held: u64,
    /// Those that did because frames were short.
    pub short: u64,
    /// Pages moved.
    pub moved: u64,
    /// Pages filled that had never been touched.
    pub filled: u64,
}

impl From<HugeStats> for HugeRanges {
    fn from(s: HugeStats) -> HugeRanges {
        HugeRanges {
            now: s.huge,
            collapsed: s.collapsed,
            split: s.split,
            hit: s.hit,
            held: s.held,
            short: s.short,
            moved: s.moved,
            filled: s.filled,
        }
    }
}

impl Memory {
    /// What `mmu` holds now.
    pub fn of(mmu: &Mmu) -> Memory {
        let usage = mmu.usage();
        let reclaim = mmu.reclaim_stats();
        Memory {
            budget: usage.budget,
            swapped: usage.swapped,
            refaults: usage.refaults,
            read_ahead: reclaim.read_ahead,
            swap_outs: usage.swap_outs,
            swap_writes: usage.swap_writes,
            zero_drops: usage.zero_drops,
            clean_drops: usage.clean_drops,
            direct_reclaims: usage.direct_reclaims,
            given_back: reclaim.given_back,
            stall_nanos_max: reclaim.stall_nanos_max,
            huge: HugeRanges::from(mmu.huge_stats()),
            invalidations: Cause::ALL.iter().map(|cause| Invalidations::of(mmu, *cause)).collect(),
            guest_pages: mmu.p2m().pages(),
            resident: usage.resident,
            shadow_pages: usage.shadow_pages,
            evictions: usage.evictions,
            tracked_stores: usage.tracked_stores,
            window: Window::of(mmu),
        }
    }
}

/// The status that the end of a run and its witnesses come to.
pub fn judge(end: &End, regions: &[Witness], witness_error: Option<&str>, audit: &[String]) -> Status {
    let status = match end {
        End::Board(BoardExit::DebugExit(0)) => Status::Pass,
        End::Board(BoardExit::DebugExit(value)) => Status::Guest(*value),
        End::Board(_) | End::TripleFault(_) | End::Init(_) | End::Stuck(_) => Status::Reset,
        End::Timeout(_) => Status::Timeout,
        End::Quit | End::Signal => Status::Quit,
        End::Unknown { .. }
        | End::Backend { .. }
        | End::Shortage(_)
        | End::NotReset(_)
        | End::Panic { .. } => Status::Failure,
        End::Incoherent(_) => Status::Incoherent,
        End::GuestTlb(_) => Status::GuestTlb,
    };
    if !audit.is_empty() && status != Status::Incoherent {
        return Status::Failure;
    }
    let contradicted = witness_error.is_some() || regions.iter().any(|r| !r.agrees());
    if status == Status::Pass && contradicted { Status::Witness } else { status }
}

/// The same where a suspect counts as a flush that the guest has missed: it has come at the end, when nothing ran any more.
pub fn strictly(status: Status, suspected: bool) -> Status {
    if status == Status::Pass && suspected { Status::GuestTlb } else { status }
}

/// What came of requests that might not sleep: a line for each cause of which there were some.
struct WithoutSleep<'a>(&'a Memory);

impl fmt::Display for WithoutSleep<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for of in self.0.invalidations.iter().filter(|of| of.atomic > 0) {
            writeln!(
                f,
                "{} without sleep: {} of {} would have blocked",
                of.cause, of.would_block, of.atomic
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(log) = &self.event_log {
            writeln!(f, "{} events in {} virtual us, hash {}", log.events, log.micros, log.hash)?;
        }
        for region in self.regions.iter().filter(|r| !r.agrees()) {
            writeln!(
                f,
                "region '{}' ({} pages): the guest says its CRC-32 is {:08x}, it is {:08x}",
                region.name, region.pages, region.claimed, region.computed
            )?;
        }
        if let Some(error) = &self.witness_error {
            writeln!(f, "the guest's witness table cannot be read: {error}")?;
        }
        for finding in &self.audit {
            writeln!(f, "audit: {finding}")?;
        }
        if let Some(found) = &self.guest_tlb {
            writeln!(f, "{found}")?;
        }
        write!(f, "{}", WithoutSleep(&self.memory))?;
        let good = self.regions.iter().filter(|r| r.agrees()).count();
        write!(
            f,
            "verdict={} status={} backend={} regions={}/{} fills={} user_faults={} frames={} time={:.3}s",
            self.verdict,
            self.status,
            self.backend,
            good,
            self.regions.len(),
            self.faults.fixed + self.faults.prefilled,
            self.vcpu.user_faults,
            self.memory.resident,
            Duration::from_micros(self.times.ended).as_secs_f64(),
        )?;
        if self.resets > 0 { write!(f, " resets={}", self.resets) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(claimed: u32, computed: u32) -> Witness {
        Witness { name: "r".into(), pages: 1, claimed, computed }
    }

    #[test]
    fn a_witness_that_disagrees_turns_a_pass_into_a_failure() {
        let pass = End::Board(BoardExit::DebugExit(0));
        assert_eq!(judge(&pass, &[region(1, 1)], None, &[]), Status::Pass);
        assert_eq!(judge(&pass, &[region(1, 2)], None, &[]), Status::Witness);
        assert_eq!(judge(&pass, &[], Some("no table"), &[]), Status::Witness);
        assert_eq!(judge(&pass, &[], None, &["INV-X".into()]), Status::Failure);
    }

    #[test]
    fn what_was_asked_without_sleep_is_in_the_summary_and_nothing_where_nobody_has() {
        let config = umbra_mmu::Config { low_pages: 1, ..umbra_mmu::Config::of_pages(600) };
        let mmu = Mmu::new(umbra_mmu::Machine::anonymous(1200), config, Box::new(umbra_mmu::NoVcpus));
        let of = |mmu: &Mmu| WithoutSleep(&Memory::of(mmu)).to_string();
        assert_eq!(of(&mmu), "");
        let stack = umbra_mmu::LocalStack::new(Context::Host);
        mmu.write_bytes(&stack, umbra_mmu::Gfn(9).at(0), &[1]).expect("a frame");
        let pages = [umbra_mmu::Gfn(8), umbra_mmu::Gfn(9)];
        mmu.page_out_atomic(None, &pages).expect_err("it would have to be written");
        mmu.page_out_atomic(None, &pages[..1]).expect("there is nothing to do");
        assert_eq!(of(&mmu), "page-out without sleep: 1 of 2 would have blocked\n");
    }

    #[test]
    fn a_suspect_turns_a_pass_into_a_failure_and_no_other_status() {
        assert_eq!(strictly(Status::Pass, true), Status::GuestTlb);
        assert_eq!(strictly(Status::Pass, false), Status::Pass);
        for status in [Status::Guest(1), Status::Incoherent, Status::Failure, Status::Timeout] {
            assert_eq!(strictly(status, true), status);
        }
    }

    #[test]
    fn a_guest_that_fails_fails_whatever_the_witnesses_say() {
        let fail = End::Board(BoardExit::DebugExit(2));
        assert_eq!(judge(&fail, &[region(1, 2)], None, &[]), Status::Guest(2));
    }
}
