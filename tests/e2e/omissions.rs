//! Whole guests that go without a rule of coherence: Umbra must notice (the table of all rules is in mmu/tests/omissions.rs).
//!
//! Only a build for tests can leave a rule out, which the `umbra` of this test is, unless `UMBRA_BIN` names another. In the rig it
//! names this one.
//!
//! A guest that spins, with no timer, never leaves by itself. Pages are moved under it, to the memory of a segment, and an importer
//! stores to them there. On the rig the CPU has a TLB, and KVM without two-dimensional paging tables of its own, so that what is not
//! taken from them stays:
//!
//! ```text
//! guest                            umbra                             importer
//! spins: flag, then word           take word's page from the guest
//!                                  kick, or drop the frame: left out
//!                                  the page is elsewhere
//!                                                                    word := news, where the page is now
//!                                                                    flag := news
//! flag is news, word is not
//! ```
//!
//! A host without a TLB, as this one's KVM is for 32-bit code, shows the missing kick alone: of a page that the guest does not look
//! at any more, and so has no fault to leave by. With two-dimensional paging what was not dropped is gone at the next exit, of which
//! the host's timer makes one in a few milliseconds.

use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use serde_json::json;
use umbra::import::ImportError;

use super::export::Exporting;
use super::umbra::{KVM, program, status};
use crate::ensure;
use crate::support::host::Need;
use crate::support::process::{self, End, Outcome};
use crate::support::{Verdict, case, image};

/// Where a guest spins: the page of the flag, that of the word, and one that it has done with.
const FLAG: u32 = 0x1000;
const WORD: u32 = FLAG + 1;
const DONE: u32 = FLAG + 2;
/// What is stored there, and how the guest ends that finds it.
const NEWS: u8 = 2;
const ENDS_BY_NEWS: End = End::Status(5);
/// How it ends that does not.
const QUIT: End = End::Status(14);
/// What it says before.
const SPINS: &str = "spins";
/// In which it is well in its loop, and then a time in which what happens at all happens.
const SETTLES: Duration = Duration::from_millis(200);
const ENOUGH: Duration = Duration::from_secs(2);
/// Longer than it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let spinning = vec![
        case("kvm_guest_that_spins_sees_its_pages_replaced", &[Need::Kvm], replaced),
        case("kvm_omission_of_a_kick_keeps_who_wants_a_page_of_a_guest_that_spins", &[Need::Kvm], no_kick),
        case(
            "rig_omission_of_a_drop_leaves_a_guest_that_spins_with_stale_pages",
            &[Need::NoNpt, Need::Kvm],
            no_drop,
        ),
    ];
    match (std::env::var_os("UMBRA_BIN"), Need::Rig.met()) {
        (None, _) => {}
        (Some(_), Ok(())) => return spinning,
        (Some(_), Err(_)) => return Vec::new(),
    }
    let others = vec![
        case("omission_of_a_flush_ends_with_a_report_of_it", &[], report),
        case("omission_of_a_shootdown_is_caught_by_the_ledger", &[], ledger),
        case("kvm_omission_of_a_shootdown_is_caught_by_the_ledger", &[Need::Kvm], ledger_on_kvm),
        case("omission_of_no_rule_passes", &[], nothing),
        case("omission_of_what_is_no_rule_is_a_bad_command_line", &[], no_rule),
    ];
    spinning.into_iter().chain(others).collect()
}

/// What came of a guest that spins.
#[derive(Debug)]
struct Spun {
    /// How it has ended, if it has found anything.
    end: Option<End>,
    /// The importer had the pages to store to.
    stored: bool,
}

/// Runs it, for so long at most.
fn spin(options: &[&str], limit: Duration) -> Result<Spun, Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("image");
    std::fs::write(&path, image::multiboot(&image::spin_on(FLAG << 12, SPINS.as_bytes())))?;
    let path = path.to_str().ok_or("a name that is not UTF-8")?;
    let usual = ["--mem", "32M", "--frames", "32M", "--supervisor", "native", path];
    let mut guest = Exporting::with(KVM, &[&usual, options].concat())?;
    guest.running.hear(SPINS, 1)?;
    thread::sleep(SETTLES);
    let importer = guest.importer()?;
    let segment = importer.make(FLAG, 3, true)?;
    let access = importer.get(segment, true)?;
    let pages = importer.attach(&access, FLAG, 3)?;
    let store = thread::spawn(move || {
        pages.write(DONE, 0, &[NEWS])?;
        // The page of the flag moves before, so that it can be news at once.
        pages.write(FLAG, 64, &[NEWS])?;
        thread::sleep(SETTLES);
        pages.write(WORD, 0, &[NEWS])?;
        // The guest ends by this, and may have before it is known to be there.
        match pages.write(FLAG, 0, &[NEWS]) {
            Err(ImportError::Ended(_)) => Ok(()),
            done => done,
        }
    });
    let begun = Instant::now();
    while !guest.running.has_ended() && begun.elapsed() < limit {
        thread::sleep(Duration::from_millis(1));
    }
    let stored = store.is_finished();
    // It may have ended meanwhile.
    let _ = guest.qmp.send("quit", json!({}));
    let run = guest.running.end()?;
    let store = store.join().map_err(|_| "the importer has panicked")?;
    ensure!(!stored || store.is_ok(), "the importer could not store: {store:?}\n{run}");
    Ok(Spun { end: (run.end != QUIT).then_some(run.end), stored })
}

/// Every rule in force, both ways.
fn replaced() -> Verdict {
    for shootdown in ["kick", "notifier"] {
        let spun = spin(&["--shootdown", shootdown], PATIENCE)?;
        ensure!(spun.end == Some(ENDS_BY_NEWS), "by {shootdown}: {spun:?}");
    }
    Ok(())
}

/// No page is moved before the vCPU has answered, which nobody makes it do.
fn no_kick() -> Verdict {
    let spun = spin(&["--shootdown", "kick", "--omit", "kick-at-shootdown"], ENOUGH)?;
    ensure!(spun.end.is_none() && !spun.stored, "nothing should come of it: {spun:?}");
    Ok(())
}

/// The pages are moved, and the vCPU has them where they were: it never hears the news.
fn no_drop() -> Verdict {
    let spun = spin(&["--shootdown", "notifier", "--omit", "notify-at-shootdown"], ENOUGH)?;
    ensure!(spun.end.is_none() && spun.stored, "the guest should see what was there: {spun:?}");
    Ok(())
}

/// A guest that wants more than its frames, so that its pages come and go; a TLB that keeps what it may.
fn run(options: &[&str]) -> Result<Outcome, libtest_mimic::Failed> {
    let mut command = std::process::Command::new(program());
    command.args(["run", "--tlb", "sticky", "--low", "2M"]).args(options);
    // A bug is an assertion, which panics: here that is what is wanted.
    Ok(process::run(&mut command, std::time::Duration::from_secs(90))?)
}

fn on_soft(omit: &[&str]) -> Result<Outcome, libtest_mimic::Failed> {
    let options = ["--backend", "soft", "--frames", "5M", "--append", "workload=kmap scale=400 seed=1"];
    run(&[&options, omit].concat())
}

fn nothing() -> Verdict {
    let run = on_soft(&[])?;
    ensure!(run.end == End::Status(0), "the guest did not pass:\n{run}");
    Ok(())
}

/// The run stops, and the report has all its parts.
fn report() -> Verdict {
    let run = on_soft(&["--omit", "flush-at-entry"])?;
    ensure!(run.end == status::INCOHERENT, "expected {:?}:\n{run}", status::INCOHERENT);
    ensure!(!run.stderr.contains("panicked"), "a report, and not a panic:\n{run}");
    let words = [
        "INV-TLB-2: vCPU 0 used a stale translation",
        "entry: Spte(",
        "made by fill ",
        "invalidation: ",
        " pages in ",
        "removal at flush clock ",
        "missed flush: one of an epoch above ",
        "events ago",
    ];
    for word in words {
        ensure!(run.stderr.contains(word), "the report should say {word:?}:\n{run}");
    }
    Ok(())
}

fn ledger() -> Verdict {
    let run = on_soft(&["--omit", "shootdown-at-invalidation"])?;
    ensure!(
        run.end == status::FAILURE && run.stderr.contains("INV-COH-1"),
        "the ledger should say so:\n{run}"
    );
    Ok(())
}

/// Only user code is the hardware's, so that it is soon in want of frames; it is stopped long before its end.
fn ledger_on_kvm() -> Verdict {
    let append = "workload=reclaim ram=64 pace=fast seed=1";
    let options = ["--backend", "kvm", "--supervisor", "interpret", "--frames", "4M", "--append", append];
    let run = run(&[&options[..], &["--omit", "shootdown-at-invalidation"]].concat())?;
    ensure!(
        run.end == status::FAILURE && run.stderr.contains("INV-COH-1"),
        "the ledger should say so:\n{run}"
    );
    Ok(())
}

fn no_rule() -> Verdict {
    let run = on_soft(&["--omit", "nonsense"])?;
    ensure!(
        run.end == status::USAGE && run.stderr.contains("docs/RULES.md"),
        "expected {:?}:\n{run}",
        status::USAGE
    );
    Ok(())
}
