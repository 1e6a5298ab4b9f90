//! Whole guests that go without a rule of coherence: Umbra must notice (the table of all rules is in mmu/tests/omissions.rs).
//!
//! Only a build for tests can leave a rule out, which the `umbra` of this test is, unless `UMBRA_BIN` names another.

use libtest_mimic::Trial;

use super::umbra::{program, status};
use crate::ensure;
use crate::support::host::Need;
use crate::support::process::{self, End, Outcome};
use crate::support::{Verdict, case};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    if std::env::var_os("UMBRA_BIN").is_some() {
        return Vec::new();
    }
    vec![
        case("omission_of_a_flush_ends_with_a_report_of_it", &[], report),
        case("omission_of_a_shootdown_is_caught_by_the_ledger", &[], ledger),
        case("kvm_omission_of_a_shootdown_is_caught_by_the_ledger", &[Need::Kvm], ledger_on_kvm),
        case("omission_of_no_rule_passes", &[], nothing),
        case("omission_of_what_is_no_rule_is_a_bad_command_line", &[], no_rule),
    ]
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
