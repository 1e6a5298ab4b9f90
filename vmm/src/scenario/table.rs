//! The scenarios: what each is about, its cases, its story. docs/scenarios.md is this table in print.

use umbra_mmu::Rule;

use super::guest_rules::{FLUSHES, Flush};
use super::scenes::Scene;
use super::story::Kind;
use crate::simulate::args::OPTIONS;

/// A discussion.
#[derive(Debug)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// Who wrote what about it, when.
    pub source: &'static str,
    /// In a line.
    pub about: &'static str,
    /// What it was about, in paragraphs.
    pub tale: &'static [&'static str],
    /// Who plays.
    pub played_by: &'static str,
    cases: &'static [Case],
}

/// A rule that came of it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Its name, within the scenario.
    pub name: &'static str,
    /// What must hold.
    pub rule: &'static str,
    /// What is left out with `--bug`, and what comes of it.
    pub bug: &'static str,
    /// How that shows, one way or another; nothing where the case only measures.
    pub fails: &'static [Kind],
    /// What is played.
    pub play: Play,
}

/// What plays a case.
#[derive(Clone, Copy, Debug)]
pub enum Play {
    /// The built-in guest: its workload, and its CPUs.
    Guest(&'static str, u32),
    /// Umbra's own MMU, with a rule of Umbra's that can be left out.
    Scene(Scene, Option<Rule>),
    /// The built-in guest, by [`options`] and [`STRESS`], without a rule of Umbra's.
    Omission(Rule),
    /// The built-in guest, without a flush of its own.
    Flush(&'static Flush),
}

impl Play {
    /// It may take several seeds until what is left out is missed.
    pub fn tries(self) -> u64 {
        if matches!(self, Play::Omission(..) | Play::Flush(..)) { SEEDS_MAX } else { 1 }
    }
}

/// Seeds within which a rule that is left out must be missed.
pub const SEEDS_MAX: u64 = 200;

/// What a guest has that misses rules of Umbra's, beside the options of every sweep: pages come and go all the time. One that does not get on
/// for so long, in its own time, never will.
pub const STRESS: [&str; 3] = ["--stress", "--timeout", "60s"];

/// What a guest has whose ranges of 2 MiB are gathered, and split as pages are taken away.
const HUGE: [&str; 14] = [
    "--vcpus",
    "2",
    "--mem",
    "24M",
    "--low",
    "4M",
    "--frames",
    "40M",
    "--huge",
    "on",
    "--tlb",
    "sticky",
    "--append",
    "workload=huge scale=10",
];

/// What a guest has for whose tables there is little room: shadow pages come and go as its pages do.
const CROWDED: [&str; 14] = [
    "--vcpus",
    "2",
    "--mem",
    "16M",
    "--low",
    "1M",
    "--frames",
    "3M@0s,2M@1ms",
    "--shadow-pages",
    "64",
    "--tlb",
    "sticky",
    "--append",
    "workload=mm scale=2",
];

/// What a guest has whose disks read and write pages that are wanted elsewhere.
const DISKS: [&str; 16] = [
    "--vcpus",
    "2",
    "--mem",
    "24M",
    "--disk",
    "64M,id=swap",
    "--disk",
    "16M,id=file",
    "--low",
    "1M",
    "--frames",
    "4M@0s,2500K@1ms",
    "--tlb",
    "sticky",
    "--append",
    "workload=reclaim pace=slow ram=9",
];

/// Whether it misses `rule`: not, where nothing that it does in so short a time depends on it. Those are left out by tests of their own.
fn is_missed(rule: Rule) -> bool {
    matches!(
        rule,
        Rule::FlushAtEntry
            | Rule::RequestAtShootdown
            | Rule::AwaitAnswers
            | Rule::ModeAtEntry
            | Rule::FlushAtCr3
            | Rule::SyncAtCr3
            | Rule::ApplyStores
            | Rule::GateAtFill
            | Rule::MarkAtFill
            | Rule::TablesAtUnmap
            | Rule::ShootdownAtInvalidation
            | Rule::ShootdownAtTracking
            | Rule::DebtOfProtection
            | Rule::DebtOfUnmap
            | Rule::DebtAtProtection
            | Rule::DebtOfZap
            | Rule::DebtAtUnmap
            | Rule::TellImporters
            | Rule::AwaitImporters
            | Rule::GateAtImport
            | Rule::FenceHomes
            | Rule::SplitAtUnmap
            | Rule::DebtOfSplit
            | Rule::SyncAtLink
            | Rule::AskFirst
            | Rule::FlushAtInvlpg
            | Rule::DropAtInvlpg
            | Rule::WakeAtOpen
            | Rule::OpenBeforeWait
            | Rule::PageAfterPin
            | Rule::PinsAtUnmap
    ) || hardware(rule).is_some()
}

/// What a guest has that hardware runs, modelled, all of it or its user code.
const NATIVE: [&str; 4] = ["--backend", "model", "--supervisor", "native"];
const SUPERVISED: [&str; 4] = ["--backend", "model", "--supervisor", "interpret"];

/// What runs the guest where `rule` is hardware's.
fn hardware(rule: Rule) -> Option<&'static [&'static str; 4]> {
    match rule {
        Rule::FirmwareFlush | Rule::NotifierFlush | Rule::NotifyAtShootdown | Rule::HardwareFlushAtCr3 => {
            Some(&NATIVE)
        }
        Rule::FlushBesideHardware | Rule::HardwareOwesFlush | Rule::HardwareFlushAtInvlpg => {
            Some(&SUPERVISED)
        }
        _ => None,
    }
}

/// Options of a guest that misses `rule`, beside [`STRESS`].
pub fn options(rule: Rule) -> Vec<&'static str> {
    let guest: &[&str] = match rule {
        Rule::SplitAtUnmap | Rule::DebtOfSplit => &HUGE,
        Rule::SyncAtLink => &CROWDED,
        Rule::PinsAtUnmap => &DISKS,
        _ => &OPTIONS,
    };
    [hardware(rule).map_or(&[][..], |options| options), guest].concat()
}

impl Scenario {
    /// Its cases.
    pub fn cases(&self) -> Vec<Case> {
        match self.name {
            RULES => Rule::ALL.iter().filter_map(|rule| omission(*rule)).collect(),
            GUEST_RULES => FLUSHES.iter().map(flush).collect(),
            _ => self.cases.to_vec(),
        }
    }
}

fn omission(rule: Rule) -> Option<Case> {
    is_missed(rule).then(|| Case {
        name: rule.name(),
        rule: rule.protects(),
        bug: rule.place(),
        fails: &[Kind::Incoherent, Kind::Content, Kind::Deadlock, Kind::Sleep],
        play: Play::Omission(rule),
    })
}

fn flush(flush: &'static Flush) -> Case {
    Case {
        name: flush.name,
        rule: flush.what,
        bug: "the guest's kernel goes without that flush",
        fails: &[Kind::Certain, Kind::Suspect],
        play: Play::Flush(flush),
    }
}

const RULES: &str = "rules";
const GUEST_RULES: &str = "guest-rules";

const fn guest(
    name: &'static str,
    workload: &'static str,
    rule: &'static str,
    bug: &'static str,
    fails: &'static [Kind],
) -> Case {
    Case { name, rule, bug, fails, play: Play::Guest(workload, 2) }
}

const fn scene(
    name: &'static str,
    scene: Scene,
    left_out: Option<Rule>,
    rule: &'static str,
    bug: &'static str,
    fails: &'static [Kind],
) -> Case {
    Case { name, rule, bug, fails, play: Play::Scene(scene, left_out) }
}

/// All there are.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "kmap-series",
        source: "Hugh Dickins to Andrea Arcangeli, linux-kernel, 2002, about page tables in high memory",
        about: "pools of kernel mappings that tasks take in turn, and wait for each other",
        tale: &[
            "A 32-bit kernel reaches most of its memory through a small pool of mappings. A task that finds the pool empty sleeps until \
             another lets a mapping go. Once page tables live in high memory too, a task holds one mapping while it wants the next, and \
             the pool can be full of mappings whose holders all wait for one more.",
            "The patch under discussion split the pool into series, one for data and two for page tables, so that each kind waits only \
             for its own. The reply doubts it: a page that has been mapped for one series is found and kept by another, so the series \
             mix; some code takes data first and a table second, other code the other way round; one mapping is taken with a spinlock \
             held, where nobody may sleep; a new table is cleared through the data series, and starts its life in the wrong one; and \
             reclaim, which everybody waits for in the end, walks page tables. What is enough is one pool with a mapping to spare for \
             each CPU and one more, and page tables that are reached without it.",
        ],
        played_by: "the guest's kernel: its pool, its page-table accessors, its reclaim",
        cases: &[
            guest(
                "order",
                "series",
                "who wants two mappings takes them in one order, or holds none while it waits",
                "some take data first and some tables first: each of two holds what the other waits for",
                &[Kind::Deadlock],
            ),
            guest(
                "spinlock",
                "series",
                "with a spinlock held nobody takes a mapping that may have to be waited for",
                "the second table of a copy is mapped from the pool under the first one's lock",
                &[Kind::Sleep],
            ),
            guest(
                "border",
                "series",
                "a mapping that was made for one kind of use is not kept by another that it was not counted for",
                "the pool hands out a page's old mapping, whichever series it was made for: a series with room by its count has none",
                &[Kind::Deadlock, Kind::Exhausted],
            ),
            guest(
                "clear",
                "series",
                "a new page table is cleared through the window that tables are reached by",
                "it is cleared through the data pool, and stays mapped there",
                &[Kind::Type, Kind::Exhausted, Kind::Deadlock],
            ),
            guest(
                "walker",
                "series",
                "page tables are never reached through a pool that reclaim needs",
                "walkers hold all mappings and wait for frames; reclaim waits for a mapping",
                &[Kind::Deadlock],
            ),
            guest(
                "spare",
                "series",
                "where each of N holders may want one more, N + 1 mappings are enough",
                "there are N",
                &[Kind::Deadlock, Kind::Exhausted],
            ),
        ],
    },
    Scenario {
        name: "kmap-stack",
        source: "Hugh Dickins, Ingo Molnar, Peter Zijlstra, linux-kernel, 16 June 2009, about NMI types for kmap_atomic",
        about: "short mappings by typed slots, or by a stack that nests",
        tale: &[
            "Mappings that must not sleep had a slot of each CPU for each purpose, named by a type. A profiler's NMI handler walks the \
             user's stack, wants such mappings, and may come while the same types are in use: new types for it, or another design?",
            "The other design is a stack: a mapping goes on top, and is released from there. Types fall away, and with them the wrong \
             type; nesting is free; fewer slots are needed, since most types exclude each other. What types gave must be had in another \
             way: the intent, and the proof that the deepest nesting fits, which is the sum of the deepest of task, softirq, interrupt \
             and NMI, whether or not that sum was ever met. And there may be code that maps A, maps B and unmaps A first.",
        ],
        played_by: "the guest's kernel: its window, with NMIs by the local APIC",
        cases: &[
            guest(
                "type",
                "stack",
                "a mapping is released as what it was taken as",
                "it is released by another type: somebody else's mapping is gone",
                &[Kind::Type],
            ),
            guest(
                "overflow",
                "stack",
                "the stack has room for the deepest task, interrupt and NMI at once",
                "the NMI's share is not counted",
                &[Kind::Nesting],
            ),
            guest(
                "order",
                "stack",
                "mappings are released in reverse: a release out of order is caught",
                "the check is left out: A, B, then A is released first, and B's slot is reused under its holder",
                &[Kind::Order],
            ),
            guest(
                "switch",
                "stack",
                "a context that is switched away finds its mappings when it is back",
                "its window is not saved and restored: it reads another's page",
                &[Kind::Content],
            ),
            guest("slots", "stack", "a stack needs fewer slots than types do, for the same work", "", &[]),
        ],
    },
    Scenario {
        name: "xpmem-race",
        source: "a reply to Christoph Lameter's patch 5/6 of mmu notifiers for XPmem, linux-kernel, 19 February 2008",
        about: "pages that other processes map, and the moment between two unmappings",
        tale: &[
            "Other processes, on other machines even, may have a page in their own page tables. Before the kernel frees it they must be \
             told, and must have answered, which takes sleep; but the places that unmap hold spinlocks. The patch adds a reverse map of \
             its own, called after the kernel's, and a page flag so that only pages which really are out there pay for it.",
            "The reply: between the unmapping from the kernel's page tables and the unmapping from the driver's, a fault may map the page \
             again, and the page may be exported again. Then somebody has a view of it that nobody will ever take back. What any sane TLB \
             needs is that no new mapping can be made until the old one is flushed everywhere. In Umbra that is the gate: closed before \
             the first unmapping, looked at where a mapping is made, opened when the page has changed hands.",
        ],
        played_by: "Umbra's own MMU: a vCPU, two importers, and somebody who takes pages away",
        cases: &[
            scene(
                "fault-between",
                Scene::Importers,
                Some(Rule::GateAtFill),
                "no fault maps a page while it is taken away",
                "the fill looks neither at the gate nor once more at where the page is: the vCPU has a frame that is another page's, or nobody's",
                &[Kind::Incoherent, Kind::Content, Kind::Books],
            ),
            scene(
                "export-between",
                Scene::Importers,
                Some(Rule::GateAtImport),
                "nor is it exported meanwhile",
                "importers are entered without a look at the gate: one has a page that has gone, and nobody will tell it",
                &[Kind::Content],
            ),
            scene(
                "untold",
                Scene::Importers,
                Some(Rule::TellImporters),
                "a page is taken from importers as from page tables",
                "they are not told",
                &[Kind::Content],
            ),
            scene(
                "unawaited",
                Scene::Importers,
                Some(Rule::AwaitImporters),
                "and it is gone only when they have answered",
                "nobody waits for the answers: what an importer stores last is lost",
                &[Kind::Content],
            ),
            scene(
                "atomic",
                Scene::Atomic,
                Some(Rule::AskFirst),
                "who may not sleep learns that somebody would have to be awaited, before anybody is told",
                "the question is left out: it sleeps",
                &[Kind::Sleep],
            ),
            scene("mark", Scene::Mark, None, "a page that nobody has imported costs no message", "", &[]),
        ],
    },
    Scenario {
        name: "superblock",
        source: "Stephen C. Tweedie, linux-mm, 9 January 1999, answering Linus Torvalds, about arca-vm",
        about: "reclaim that writes, for somebody who holds the lock that the write needs",
        tale: &[
            "A task allocates a block of a filesystem: it takes the superblock's lock and reads the bitmap, for which it needs memory. \
             There is none, so it reclaims; reclaim finds a dirty page of a mapped file and writes it, which needs a block, which needs \
             the superblock's lock. The task waits for itself. The background thread is no help: it blocks on the same lock, and with it \
             everybody who waits for memory. A large write to a mapped file does the same with the inode's lock.",
            "Cures that were weighed: a recursive lock, which lets the inner call see what the outer has half changed; dropping the lock \
             to do I/O, and looking again, which everybody who holds it would have to do around each allocation; a flag of the task that \
             keeps its reclaim from I/O; a flag that lets it use the reserve and not reclaim at all. And for the inode, a lock of its \
             own against truncation, since pages that vanish during their write-out were the only reason to take the inode's.",
        ],
        played_by: "the guest's kernel, its files and its reclaim; `umbra-swap`: Umbra's own reclaim, with swap in a file",
        cases: &[
            guest(
                "direct",
                "superblock",
                "a task that holds the superblock reclaims without I/O",
                "its reclaim writes, and waits for the lock that it holds",
                &[Kind::Deadlock],
            ),
            guest(
                "kswapd",
                "superblock",
                "nor does it wait for a thread that may be waiting for that lock",
                "the background thread waits for the lock, and the holder for the background thread",
                &[Kind::Deadlock],
            ),
            guest(
                "inode",
                "superblock",
                "page-out does not take the lock of the inode that is written to",
                "a large write to a mapped file waits for its own page's write-out",
                &[Kind::Deadlock],
            ),
            guest(
                "truncate",
                "superblock",
                "a page's blocks stay as long as it is written out",
                "the truncate lock is not taken: the page's blocks are freed under the write",
                &[Kind::Content, Kind::Lost],
            ),
            guest(
                "recursive",
                "superblock",
                "who takes the superblock finds it whole",
                "a recursive lock lets the holder's own reclaim in, which sees what the holder has half changed",
                &[Kind::Content],
            ),
            guest(
                "cures",
                "superblock",
                "the cures compared: what each leaves unreclaimed, how often it starts again",
                "",
                &[],
            ),
            scene(
                "umbra-swap",
                Scene::Superblock,
                Some(Rule::NoIoInScope),
                "reclaim writes nothing for who holds what the write may want",
                "the scope is not looked at",
                &[Kind::Deadlock],
            ),
        ],
    },
    Scenario {
        name: "clustering",
        source: "Stephen C. Tweedie, linux-mm, 9 January 1999, the same letter",
        about: "when pages are written to swap: as they are found, or together",
        tale: &[
            "Where the scan of page tables begins the write of each page that it finds, neighbours in memory get neighbouring places on \
             the disk, but each is a write of its own, between others. Where the scan only marks pages, and they are written when memory \
             is really wanted, they are written together. The thread found the first to cost all locality of reference.",
        ],
        played_by: "Umbra's own reclaim and swap; `clustering`: the guest's",
        cases: &[
            scene(
                "write-out",
                Scene::Locality,
                Some(Rule::WriteTogether),
                "pages that are neighbours go to swap as neighbours, in few writes",
                "each page is written as it is found",
                &[Kind::Scattered],
            ),
            guest(
                "clustering",
                "superblock",
                "the guest's own swap: writes, and reads that bring neighbours, by both ways",
                "",
                &[],
            ),
        ],
    },
    Scenario {
        name: "collapse",
        source: "David Hildenbrand, Dev Jain and others, linux-mm, November 2024, about khugepaged without the mmap lock",
        about: "a page table that is taken apart under those who walk it",
        tale: &[
            "A background thread makes one large page of many small ones: it detaches the table, copies the pages, and puts a large \
             entry in. It holds the address space's lock for all of that. Could it do with less? Then others look at the upper entry \
             meanwhile, and find it empty. Some take the lock and look again; but much code takes empty for `there is nothing`, and \
             does nothing: a discard that comes in the middle is lost, and memory that was given up is there again.",
            "What would do is a state that is neither: every walker that meets it backs off or waits. In Umbra an upper entry is \
             nothing, a table, huge, or moving, and pages on their way are moving one by one, behind their gates: no lock is held over \
             the copy.",
        ],
        played_by: "Umbra's own MMU: a thread that gathers, and a vCPU that uses and discards pages",
        cases: &[
            scene(
                "discard",
                Scene::Collapse,
                Some(Rule::MovingAtDiscard),
                "a discard that meets a page on its way waits, or says that it would have to",
                "a page on its way is taken for none: the discard is told done, and the page comes back with what it had",
                &[Kind::Lost],
            ),
            scene(
                "taken",
                Scene::Collapse,
                Some(Rule::SplitAtUnmap),
                "who takes a page of a huge range takes the range apart first",
                "the range stays huge: it is mapped large with a frame that is no page's any more",
                &[Kind::Lost, Kind::Content, Kind::Incoherent],
            ),
            scene(
                "split",
                Scene::Collapse,
                Some(Rule::DebtOfSplit),
                "a range that is taken apart is in TLBs as a whole, and owes a flush for each of its pages",
                "no flush is owed: a TLB goes on with the large entry",
                &[Kind::Lost, Kind::Content, Kind::Incoherent],
            ),
        ],
    },
    Scenario {
        name: RULES,
        source: "mmu/src/rules.rs; docs/RULES.md",
        about: "Umbra's own rules, each left out of a whole guest",
        tale: &[
            "Each flush, kick, wait, check of a gate and note of debt in Umbra's code has a name. A guest that goes without one runs on \
             until the oracle, the ledger, an assertion, the audit or the guest itself finds something wrong. The order in which things \
             happen matters, so that seeds are tried until one finds it.",
        ],
        played_by: "a whole guest, interpreted; rules of hardware and of a few exact moments are left out by tests alone",
        cases: &[],
    },
    Scenario {
        name: GUEST_RULES,
        source: "guest/src/kernel/omit.h; docs/GUEST-RULES.md",
        about: "the flushes of the built-in guest's kernel, each left out",
        tale: &[
            "What Umbra holds itself to it can hold a guest to. Each flush of a TLB in the built-in guest's kernel has a name, and \
             `--check-guest-tlb=strict` has Umbra judge whether it is made. Most flushes that are missed do no harm in most runs: the frame \
             is nobody else's yet. Such a miss is a suspect. By itself that proves nothing, for a kernel may know what it does; but the \
             same seed with the flush made is the same run up to there, and has no suspect.",
        ],
        played_by: "the built-in guest, interpreted, with a TLB that forgets nothing by itself",
        cases: &[],
    },
];

/// docs/scenarios.md.
pub fn as_markdown() -> String {
    let mut text = String::from(
        "# Scenarios\n\nDiscussions of the field's history, each as something that you can run. \
         `vmm/src/scenario/table.rs` is where this page is made from.\n\n\
         ```\numbra scenario list\numbra scenario run NAME[/CASE] [--bug] [--backend soft|kvm] [--seed N | --seeds A..B] [--explain]\n```\n\n\
         Without `--bug` the rule is in force, and the case passes. With it the rule is switched off, in the code that every run uses, and the \
         case passes only if what the discussion feared happens and is caught. `caught` is followed by the diagnosis: for a deadlock, \
         who waits for whom, as Umbra has found it from what each party holds and wants; a case that only says that it is stuck is not \
         believed. `--explain` tells everything that happened, in order. A rule is left out of runs that a scenario makes and of no \
         others: `umbra run` has no such option.\n\n\
         A case of the guest's is played by the built-in guest, on the interpreter in an order that the seed decides, or with \
         `--backend kvm` in the order that comes. The others are played by Umbra's own MMU between threads of one simulation.\n",
    );
    for scenario in SCENARIOS {
        text +=
            &format!("\n## {}\n\n*{}.* Played by {}.\n", scenario.name, scenario.source, scenario.played_by);
        for paragraph in scenario.tale {
            text += &format!("\n{paragraph}\n");
        }
        let name = scenario.name;
        if name != RULES && name != GUEST_RULES {
            text += &format!(
                "\n```\numbra scenario run {name}\numbra scenario run {name} --bug --explain\n```\n"
            );
        }
        if scenario.name == RULES {
            text += &format!(
                "\n`umbra scenario run {RULES}/NAME --bug`, with NAME from [RULES.md](RULES.md): {} of {} rules. ",
                scenario.cases().len(),
                Rule::ALL.len()
            );
            text += &format!("A rule is missed within {SEEDS_MAX} seeds.\n");
            continue;
        }
        if name == GUEST_RULES {
            text += &format!(
                "\n`umbra scenario run {name}/NAME --bug`, with NAME from [GUEST-RULES.md](GUEST-RULES.md): all {} flushes. ",
                scenario.cases().len()
            );
            text += &format!("A flush is missed within {SEEDS_MAX} seeds.\n");
            continue;
        }
        text += "\n| case | rule | with `--bug` | caught as |\n|---|---|---|---|\n";
        for case in scenario.cases() {
            let kinds: Vec<_> = case.fails.iter().map(|kind| kind.name()).collect();
            let bug = if case.fails.is_empty() { "(it measures)" } else { case.bug };
            text += &format!("| `{}` | {} | {bug} | {} |\n", case.name, case.rule, kinds.join(", "));
        }
    }
    text += "\n## What a case is caught as\n\n| word | what has happened |\n|---|---|\n";
    for kind in Kind::ALL {
        text += &format!("| {} | {} |\n", kind.name(), kind.meaning());
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_page_is_the_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/scenarios.md");
        if std::env::var_os("UMBRA_BLESS").is_some() {
            std::fs::write(path, as_markdown()).expect("docs/scenarios.md");
        }
        let printed = std::fs::read_to_string(path).expect("docs/scenarios.md");
        assert!(printed == as_markdown(), "docs/scenarios.md is another: UMBRA_BLESS=1 prints it anew");
    }

    #[test]
    fn cases_have_names_of_their_own_and_those_that_measure_leave_nothing_out() {
        for scenario in SCENARIOS {
            let cases = scenario.cases();
            let names: BTreeSet<_> = cases.iter().map(|case| case.name).collect();
            assert_eq!(names.len(), cases.len(), "{}", scenario.name);
            for case in cases {
                assert_eq!(case.fails.is_empty(), case.bug.is_empty(), "{}/{}", scenario.name, case.name);
            }
        }
    }
}
