//! The report of `umbra doctor`: what was found, and what it means in words.
//!
//! Holds: the advice is made from the facts alone ([`DoctorReport::advice`]), so that what is printed and what is in
//! the JSON cannot differ.

use std::fmt;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;

use super::facts::{self, Translation, TrapRow};
use super::live::{Live, ShootdownRow};
use super::measure::{self, Cost, Speed};
use super::scratch::Scratch;
use super::watchdog::Watchdog;
use super::{ProbeError, Quick};
use crate::kvm::{Features, Host, KvmError, Options};

/// What /dev/kvm says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KvmFacts {
    /// KVM_GET_API_VERSION.
    pub api_version: i32,
    /// Capabilities that matter here, with what KVM_CHECK_EXTENSION answers.
    pub capabilities: Vec<(&'static str, i32)>,
    /// What a vCPU can have.
    pub features: Features,
    /// CPUID traps.
    pub cpuid_faults: bool,
}

/// One cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CostRow {
    /// What was done.
    pub what: &'static str,
    /// What it cost.
    pub cost: Cost,
}

/// Everything that the complete probe found. What is missing was not reached; [`DoctorReport::problem`] says why.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DoctorReport {
    /// Why KVM cannot be used, or why the probe ended early.
    pub problem: Option<String>,
    /// What /dev/kvm says of itself.
    pub kvm: Option<KvmFacts>,
    /// One trap of each kind.
    pub traps: Vec<TrapRow>,
    /// What makes a changed translation seen.
    pub translation: Option<Translation>,
    /// Each shootdown, and none at all.
    pub shootdowns: Vec<ShootdownRow>,
    /// How fast 32-bit code runs.
    pub speed: Option<Speed>,
    /// What things cost.
    pub costs: Vec<CostRow>,
    /// How long the probe took, in milliseconds.
    pub took_ms: u64,
    /// What all this means, and what to do.
    pub advice: Vec<String>,
}

impl DoctorReport {
    /// True where the kvm backend works here.
    pub fn usable(&self) -> bool {
        self.problem.is_none()
    }

    /// What the facts mean for a user.
    fn advise(&self) -> Vec<String> {
        let mut advice = Vec::new();
        if let Some(problem) = &self.problem {
            advice.push(format!("The kvm backend cannot be used: {problem}. Guests run on --backend soft."));
            return advice;
        }
        if let Some(speed) = self.speed.filter(|speed| speed.emulated) {
            advice.push(format!(
                "Slow: this KVM emulates 32-bit code, {speed}. Keep workloads to some ten million \
                 instructions, or take --backend soft, which is faster here."
            ));
        }
        let missing = self.traps.iter().filter(|row| row.interpreted).map(|row| row.instruction);
        let missing: Vec<_> = missing.collect();
        if !missing.is_empty() {
            advice.push(format!(
                "Missing: this KVM does not run {}. They are interpreted, one trap for each; code with the FPU, a \
                 stretch at a time.",
                missing.join(", ")
            ));
        }
        self.advise_on_memory(&mut advice);
        self.advise_on_holes(&mut advice);
        if advice.is_empty() {
            advice.push("Nothing is slow and nothing is missing: guests run at full speed here.".into());
        }
        advice
    }

    fn advise_on_memory(&self, advice: &mut Vec<String>) {
        let row = |name| self.shootdowns.iter().find(|row| row.name == name);
        match (row("kick").map(ShootdownRow::works), row("notifier").map(ShootdownRow::works)) {
            (Some(false), Some(true)) => advice.push(
                "Slow: this KVM has no two-dimensional paging, so that each page Umbra takes from a guest costs a \
                 madvise instead of a share of one kick. Load kvm_intel with ept=1 or kvm_amd with npt=1 where the \
                 CPU has it."
                    .into(),
            ),
            (_, Some(false)) => advice.push(
                "Missing: this KVM does not forget a page when the host drops it. Taking memory from a guest is not \
                 safe here; report this kernel."
                    .into(),
            ),
            (Some(false), None) => advice.push("Missing: no shootdown works here.".into()),
            _ => {}
        }
    }

    fn advise_on_holes(&self, advice: &mut Vec<String>) {
        let Some(kvm) = &self.kvm else { return };
        let mut hole = |closed: bool, text: &str| {
            if !closed {
                advice.push(text.into());
            }
        };
        hole(
            kvm.features.umip,
            "Missing: UMIP. SGDT, SIDT, SLDT, STR and SMSW show a guest the firmware's values; for kernels that use \
             them to find out where they run, use --supervisor interpret.",
        );
        hole(
            kvm.cpuid_faults,
            "Missing: CPUID faulting. Guests see this KVM's CPUID, not Umbra's; what they find there may differ from \
             one host to the next.",
        );
        hole(
            kvm.features.smep && kvm.features.smap,
            "Missing: SMEP or SMAP. The firmware is guarded by page permissions and closed descriptors alone.",
        );
        hole(
            kvm.features.events,
            "Missing: KVM_CAP_VCPU_EVENTS. A kick in the middle of an exception may make a guest fault twice, \
             harmlessly.",
        );
    }
}

/// Runs the complete probe in a thread of its own, and gives up on it some time after `limit`.
pub fn examine(limit: Duration) -> DoctorReport {
    const AFTER_THE_KICK: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    let shared = Arc::new(Mutex::new(DoctorReport::default()));
    let watchdog = Arc::new(Watchdog::new(limit));
    let (done, wait) = mpsc::channel();
    thread::spawn({
        let (shared, watchdog) = (Arc::clone(&shared), Arc::clone(&watchdog));
        move || {
            let result = fill(&shared, &watchdog);
            // Nobody waits any more where the time was up.
            let _ = done.send(result);
        }
    });
    let result = match wait.recv_timeout(limit + AFTER_THE_KICK) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(ProbeError::Stuck { what: watchdog.what(), limit }),
        Err(RecvTimeoutError::Disconnected) => Err(ProbeError::OutOfTime { what: watchdog.what() }),
    };
    let mut report = shared.lock().unwrap_or_else(PoisonError::into_inner).clone();
    report.problem = result.err().map(|error| error.to_string());
    report.took_ms = begun.elapsed().as_millis() as u64;
    report.advice = report.advise();
    report
}

/// Fills the report, step by step, so that what was found before something failed is in it.
fn fill(shared: &Mutex<DoctorReport>, watchdog: &Watchdog) -> Result<(), ProbeError> {
    let note = |change: &mut dyn FnMut(&mut DoctorReport)| {
        change(&mut shared.lock().unwrap_or_else(PoisonError::into_inner));
    };
    let host = Host::open().map_err(KvmError::from)?;
    let mut scratch = Scratch::new(&host, Options::default())?;
    let facts = kvm_facts(host.kvm(), &scratch);
    note(&mut |report| report.kvm = Some(facts.clone()));

    watchdog.watch("the kinds of traps", scratch.vcpu.kicker());
    let traps = facts::traps(&mut scratch)?;
    note(&mut |report| report.traps = traps.clone());

    watchdog.watch("the speed of 32-bit code", scratch.vcpu.kicker());
    let speed = measure::speed(&mut scratch)?;
    note(&mut |report| report.speed = Some(speed));

    watchdog.watch("a changed translation", scratch.vcpu.kicker());
    let translation = facts::translation(&mut scratch)?;
    note(&mut |report| report.translation = Some(translation));

    watchdog.watch("what things cost", scratch.vcpu.kicker());
    for (what, measure) in COSTS {
        let cost = measure(&mut scratch, SAMPLES)?;
        note(&mut |report| report.costs.push(CostRow { what, cost }));
    }

    watchdog.watch("the shootdowns", scratch.vcpu.kicker());
    let mut live = Live::start(scratch)?;
    let rows = shootdowns(&mut live, &mut |row| note(&mut |report| report.shootdowns.push(row)));
    // What the vCPU's own thread met says more than that its answer was missing.
    live.stop()?;
    rows
}

const SAMPLES: u32 = 300;

/// Something to measure, so many times.
type Measure = fn(&mut Scratch, u32) -> Result<Cost, ProbeError>;

const COSTS: [(&str, Measure); 7] = [
    ("an entry that a kick refuses", measure::refused_entry),
    ("an exit", measure::exit),
    ("a flush, exit included", measure::flush),
    ("a trap", measure::trap),
    ("a page fault", measure::page_fault),
    ("a trap through another root", measure::change_of_root),
    ("rep stosd, per doubleword", measure::store_string),
];

fn shootdowns(live: &mut Live, note: &mut dyn FnMut(ShootdownRow)) -> Result<(), ProbeError> {
    const TIMES: u32 = 100;
    const NOTHING_FOR: Duration = Duration::from_millis(10);
    note(live.nothing(TIMES, NOTHING_FOR)?);
    note(live.kick(TIMES)?);
    note(live.notifier(TIMES)?);
    note(live.slot(TIMES)?);
    Ok(())
}

fn kvm_facts(kvm: &Kvm, scratch: &Scratch) -> KvmFacts {
    let capabilities = [
        ("KVM_CAP_SYNC_REGS", Cap::SyncRegs),
        ("KVM_CAP_IMMEDIATE_EXIT", Cap::ImmediateExit),
        ("KVM_CAP_SYNC_MMU", Cap::SyncMmu),
        ("KVM_CAP_READONLY_MEM", Cap::ReadonlyMem),
        ("KVM_CAP_VCPU_EVENTS", Cap::VcpuEvents),
        ("KVM_CAP_DEBUGREGS", Cap::Debugregs),
        ("KVM_CAP_NR_MEMSLOTS", Cap::NrMemslots),
        ("KVM_CAP_NR_VCPUS", Cap::NrVcpus),
        ("KVM_CAP_MAX_VCPUS", Cap::MaxVcpus),
    ];
    KvmFacts {
        api_version: kvm.get_api_version(),
        capabilities: capabilities.map(|(name, cap)| (name, kvm.check_extension_int(cap))).to_vec(),
        features: scratch.vcpu.features(),
        cpuid_faults: scratch.vcpu.cpuid_faults(),
    }
}

impl fmt::Display for DoctorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(kvm) = &self.kvm {
            write_kvm(f, kvm)?;
        }
        if !self.traps.is_empty() {
            writeln!(f, "\nTraps at privilege level 3 (* differs from silicon)")?;
        }
        for row in &self.traps {
            let mark = if row.same { ' ' } else { '*' };
            writeln!(f, "  {mark} {:<26} {:<12} silicon: {}", row.instruction, row.here, row.silicon)?;
        }
        self.write_memory(f)?;
        if let Some(speed) = self.speed {
            let how = if speed.emulated { "emulated by KVM" } else { "run by the CPU" };
            writeln!(f, "\nSpeed\n    32-bit code is {how}: {speed}")?;
        }
        for row in &self.costs {
            writeln!(f, "    {:<30} {}", row.what, row.cost)?;
        }
        writeln!(f, "\nWhat this means ({} ms)", self.took_ms)?;
        self.advice.iter().try_for_each(|line| writeln!(f, "  - {line}"))
    }
}

fn write_kvm(f: &mut fmt::Formatter<'_>, kvm: &KvmFacts) -> fmt::Result {
    let word = |has: bool| if has { "yes" } else { "no" };
    writeln!(f, "KVM\n    API version {}", kvm.api_version)?;
    for (name, value) in &kvm.capabilities {
        writeln!(f, "    {name:<30} {value}")?;
    }
    let Features { smep, smap, umip, events: _, debug_registers: _ } = kvm.features;
    let rows = [("SMEP", smep), ("SMAP", smap), ("UMIP", umip), ("CPUID faulting", kvm.cpuid_faults)];
    rows.iter().try_for_each(|(name, has)| writeln!(f, "    {name:<30} {}", word(*has)))
}

impl DoctorReport {
    fn write_memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(translation) = self.translation else { return Ok(()) };
        let how = match translation {
            Translation::FlushSuffices => "seen after a flush",
            Translation::NeedsNotifier => "not seen after a flush: KVM shadows Umbra's tables",
        };
        writeln!(f, "\nMemory\n    a changed page-table entry is {how}")?;
        for row in &self.shootdowns {
            write!(f, "    {:<12} seen {:>3} of {:>3} times", row.name, row.seen, row.tried)?;
            match row.name {
                Live::NOTHING => writeln!(f, ", without any exit or flush")?,
                _ => writeln!(f, ", {}", row.cost)?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Quick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.verdict())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, seen: u32) -> ShootdownRow {
        ShootdownRow { name, seen, tried: 100, cost: Cost::of(vec![Duration::from_micros(5)]) }
    }

    /// A host on which nothing is slow and nothing is missing.
    fn good() -> DoctorReport {
        let features = Features { smep: true, smap: true, umip: true, events: true, debug_registers: true };
        DoctorReport {
            kvm: Some(KvmFacts { api_version: 12, capabilities: vec![], features, cpuid_faults: true }),
            translation: Some(Translation::FlushSuffices),
            shootdowns: vec![row("kick", 100), row("notifier", 100)],
            speed: Some(Speed { instructions_per_second: 3e9, emulated: false }),
            ..DoctorReport::default()
        }
    }

    fn one_line(report: &DoctorReport) -> String {
        let advice = report.advise();
        assert_eq!(advice.len(), 1, "{advice:?}");
        advice[0].clone()
    }

    #[test]
    fn good_host_gets_one_good_word() {
        assert!(one_line(&good()).starts_with("Nothing is slow"));
    }

    #[test]
    fn each_shortcoming_has_its_own_line() {
        let mut slow = good();
        slow.speed = Some(Speed { instructions_per_second: 1.5e6, emulated: true });
        assert!(one_line(&slow).contains("1.5 million instructions a second. Keep workloads"));
        let mut shadowed = good();
        shadowed.shootdowns = vec![row("kick", 0), row("notifier", 100)];
        assert!(one_line(&shadowed).contains("npt=1"));
        let mut broken = good();
        broken.shootdowns = vec![row("kick", 100), row("notifier", 99)];
        assert!(one_line(&broken).contains("not safe here"));
        type Fault = (fn(&mut KvmFacts), &'static str);
        let faults: [Fault; 5] = [
            (|kvm| kvm.features.umip = false, "UMIP"),
            (|kvm| kvm.features.smap = false, "SMAP"),
            (|kvm| kvm.features.smep = false, "SMEP"),
            (|kvm| kvm.features.events = false, "KVM_CAP_VCPU_EVENTS"),
            (|kvm| kvm.cpuid_faults = false, "CPUID faulting"),
        ];
        for (fault, word) in faults {
            let mut report = good();
            report.kvm.as_mut().map(fault);
            assert!(one_line(&report).contains(word), "{word}");
        }
    }

    #[test]
    fn unusable_host_says_why_and_nothing_else() {
        let report = DoctorReport { problem: Some("no device".into()), ..good() };
        assert!(!report.usable() && one_line(&report).contains("cannot be used: no device"));
    }

    #[test]
    fn printed_report_names_what_differs() {
        let mut report = good();
        report.traps = vec![TrapRow {
            instruction: "daa",
            silicon: "runs".into(),
            here: "#UD".into(),
            same: false,
            interpreted: true,
        }];
        report.advice = report.advise();
        let text = report.to_string();
        for part in ["* daa", "silicon: runs", "API version 12", "does not run daa", "seen 100 of 100"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
