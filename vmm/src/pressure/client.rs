//! A guest as the control socket shows it: what is set, and what has become of it.
//!
//! Holds: nothing that a server sends is believed beyond its type; what is missing is a sentence, and sums saturate.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use umbra_mmu::PAGE_SIZE;

use super::args::{Level, Taking};
use super::clock::Clock;
use crate::vm::Sample;
use crate::vm::ask::{Connection, PATIENCE, Refused};

/// How often a guest is asked for its statistics.
const STATS_PERIOD: Duration = Duration::from_secs(1);
/// QMP's class of an error where something would have had to sleep.
const WOULD_BLOCK: &str = "WouldBlock";

/// A guest at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Pages and frames, and what has happened so far.
    pub sample: Sample,
    /// The smallest budget, in frames.
    pub budget_min: u32,
    /// The largest.
    pub budget_max: u32,
    /// Frames that the host backs beyond the budget.
    pub over: u32,
    /// Pages on these lists that somebody holds in their frames.
    pub pinned: u32,
    /// Others there that need a slot of swap to go.
    pub dirty: u32,
    /// Frames that reclaim may choose from.
    pub listed: u32,
    /// Slots of swap.
    pub swap_slots: u32,
    /// Of swap that is memory of Umbra's own: pages there.
    pub swap_in_memory: u32,
    /// Bytes of the guest's machine memory that the host says it backs.
    pub host_frames: u64,
    /// Swap has failed.
    pub swap_failed: bool,
    /// The reclaim thread has been woken and has not begun.
    pub wanted: bool,
    /// Pages that reclaim has taken so far.
    pub evicted: u64,
    /// Pages of guest memory, holes among them.
    pub guest_pages: u32,
    /// The balloon, if there is one.
    pub balloon: Option<Kept>,
}

/// What a guest keeps of its memory beside its balloon, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// What it is to keep.
    pub target: u64,
    /// What it has.
    pub actual: u64,
    /// All of its memory.
    pub memory: u64,
}

impl Seen {
    /// Bytes that the host backs, as it says itself.
    pub fn backed(&self) -> u64 {
        self.host_frames
    }

    /// What is asked of the guest now, in bytes.
    pub fn asked(&self, level: Level) -> Option<u64> {
        match level {
            Level::Frames => Some(bytes(self.sample.budget)),
            Level::Balloon => self.balloon.map(|balloon| balloon.target),
        }
    }

    /// What the guest has come to, in bytes.
    pub fn reached(&self, level: Level) -> u64 {
        match level {
            Level::Frames => bytes(self.sample.budget.saturating_add(self.over)),
            Level::Balloon => self.balloon.map_or(0, |balloon| balloon.actual),
        }
    }
}

/// So many pages, in bytes.
pub fn bytes(pages: u32) -> u64 {
    u64::from(pages) * PAGE_SIZE
}

/// What came of one request for pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// So many pages are gone, and so many are left to do.
    Pages(u64, u64),
    /// It would have had to sleep.
    WouldBlock,
    /// It could not be done, and why.
    Refused(String),
}

/// A running guest.
pub struct Guest<'a> {
    connection: Connection<'a>,
    path: &'a Path,
    clock: &'a dyn Clock,
    begun: Duration,
    /// When its statistics are due.
    stats_due: Duration,
    /// Free pages, swap-ins and swap in use as it last said.
    stats: Option<[Option<u64>; 3]>,
}

impl Guest<'_> {
    /// Connects, in `limit` at most and no longer than any answer may take.
    ///
    /// # Errors
    ///
    /// A sentence, as for all that follow: why there is no answer.
    pub fn open<'a>(path: &'a Path, limit: Duration, clock: &'a dyn Clock) -> Result<Guest<'a>, String> {
        let connection = Connection::open(path, limit.min(PATIENCE), PATIENCE)?;
        let (begun, stats_due) = (clock.now(), Duration::ZERO);
        Ok(Guest { connection, path, clock, begun, stats_due, stats: None })
    }

    /// Since the connection was made.
    pub fn time(&self) -> Duration {
        self.clock.now().saturating_sub(self.begun)
    }

    /// Asks for a size in bytes, and gives what is to be reached then.
    ///
    /// # Errors
    ///
    /// The server's own sentence where it refuses.
    pub fn set(&mut self, level: Level, size: u64) -> Result<u64, String> {
        match level {
            Level::Balloon => self.connection.call("balloon", &json!({ "value": size })).map(|_| size),
            Level::Frames => {
                let answer = self.connection.call("x-frames", &json!({ "bytes": size }))?;
                self.number(&answer, "/budget")
            }
        }
    }

    /// Takes `bytes` of the pages that `taking` is about, from `gpa` on.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn take(&mut self, taking: &Taking, gpa: u64, bytes: u64) -> Result<Taken, String> {
        let (command, taken) = taking.way.command();
        let arguments = json!({"gpa": gpa, "bytes": bytes, "atomic": taking.atomic});
        match self.connection.try_call(command, &arguments)? {
            Ok(answer) => Ok(Taken::Pages(self.number(&answer, taken)?, self.number(&answer, "/left")?)),
            Err(Refused { class, .. }) if class == WOULD_BLOCK => Ok(Taken::WouldBlock),
            Err(Refused { desc, .. }) => Ok(Taken::Refused(desc)),
        }
    }

    /// The guest stands still.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn is_paused(&mut self) -> Result<bool, String> {
        let answer = self.connection.call("query-status", &json!({}))?;
        Ok(answer["running"] == false && answer["status"] != "shutdown")
    }

    /// It has sent statistics, as a guest with a driver for its balloon does.
    pub fn has_driver(&self) -> bool {
        self.stats.is_some()
    }

    /// Looks at it.
    ///
    /// # Errors
    ///
    /// When an answer is missing, or not what such a server says.
    pub fn look(&mut self) -> Result<Seen, String> {
        let memory = self.connection.call("x-memory", &json!({}))?;
        let counters = self.connection.call("x-counters", &json!({}))?;
        self.ask_for_stats()?;
        let at = self.time();
        let pages = |path: &str| self.number(&memory, path).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let count = |path: &str| self.number(&counters, path);
        let balloon = memory.get("balloon").filter(|balloon| !balloon.is_null());
        let given = if balloon.is_some() { pages("/balloon/actual")? } else { 0 };
        let balloon = balloon.map(|_| {
            let (memory, target) = (bytes(pages("/balloon/memory")?), bytes(pages("/balloon/target")?));
            let (target, actual) = (memory.saturating_sub(target), memory.saturating_sub(bytes(given)));
            Ok::<_, String>(Kept { target, actual, memory })
        });
        let [guest_free, guest_swap_ins, guest_swapped] = self.stats.unwrap_or_default();
        let host_frames = self.number(&memory, "/host/frames")?;
        let sample = Sample {
            at,
            budget: pages("/budget")?,
            frames_used: pages("/frames-used")?,
            frames_free: pages("/frames-free")?,
            resident: pages("/resident")?,
            swapped: pages("/swapped")?,
            ballooned: pages("/ballooned")?,
            shadow_pages: pages("/shadow-pages")?,
            refaults: self.number(&memory, "/reclaim/refaults")?,
            swap_outs: count("/memory/swap_outs")?,
            swap_writes: count("/memory/swap_writes")?,
            zero_drops: count("/memory/zero_drops")?,
            clean_drops: count("/memory/clean_drops")?,
            invalidations: of_all_causes(&counters, "count"),
            would_blocks: of_all_causes(&counters, "would_block"),
            direct_reclaims: self.number(&memory, "/reclaim/direct")?,
            gate_waits: self.number(&memory, "/reclaim/gate-waits")?,
            page_waits: self.number(&memory, "/reclaim/page-waits")?,
            balloon_actual: given,
            guest_free,
            guest_swap_ins,
            guest_swapped,
            host_backs: Some(host_frames / PAGE_SIZE),
        };
        let dropped = sample.zero_drops.saturating_add(sample.clean_drops);
        Ok(Seen {
            sample,
            budget_min: pages("/budget-min")?,
            budget_max: pages("/budget-max")?,
            over: pages("/reclaim/over-budget")?,
            pinned: pages("/pinned")?,
            dirty: pages("/dirty")?,
            listed: pages("/reclaim/inactive")?.saturating_add(pages("/reclaim/active")?),
            swap_slots: pages("/swap/slots")?,
            swap_in_memory: if memory["swap"]["in-memory"] == true { pages("/swap/used")? } else { 0 },
            host_frames,
            swap_failed: memory["reclaim"]["failed"] == true,
            wanted: memory["reclaim"]["wanted"] == true,
            evicted: sample.swap_outs.saturating_add(dropped),
            guest_pages: pages("/guest-pages")?,
            balloon: balloon.transpose()?,
        })
    }

    fn ask_for_stats(&mut self) -> Result<(), String> {
        if self.time() < self.stats_due {
            return Ok(());
        }
        self.stats_due = self.time() + STATS_PERIOD;
        if let Ok(answer) = self.connection.try_call("x-balloon-stats", &json!({}))? {
            let pages = |name: &str| answer[name].as_u64().map(|bytes| bytes / PAGE_SIZE);
            self.stats = Some(["stat-free-memory", "stat-swap-in", "x-stat-swapped"].map(pages));
        }
        Ok(())
    }

    fn number(&self, answer: &Value, path: &str) -> Result<u64, String> {
        answer.pointer(path).and_then(Value::as_u64).ok_or_else(|| {
            let name = path.trim_start_matches('/');
            format!("{} sent no number for {name}; is it Umbra's?", self.path.display())
        })
    }
}

/// The sum of a count over all causes of invalidation.
fn of_all_causes(counters: &Value, name: &str) -> u64 {
    let causes = counters.pointer("/memory/invalidations").and_then(Value::as_array);
    let counts = causes.into_iter().flatten().filter_map(|cause| cause[name].as_u64());
    counts.fold(0, u64::saturating_add)
}
