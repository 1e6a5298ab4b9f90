//! What a case came to.

use std::fmt;

use super::story::{Kind, Story};
use super::table::Case;
use crate::child::Outcome;
use crate::status::Status;

/// What was to be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// With its rule in force: it went well.
    Passed,
    /// Without: what was feared happened, and was caught. What, in a line each.
    Caught(Vec<String>),
    /// With its rule in force it came to harm, or it did not end.
    Harmed(String),
    /// Without, nothing was caught, or something else.
    Missed(String),
}

impl Verdict {
    /// True where the case is as it should be.
    pub fn is_good(&self) -> bool {
        matches!(self, Verdict::Passed | Verdict::Caught(_))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Passed => f.write_str("passed"),
            Verdict::Caught(_) => f.write_str("caught"),
            Verdict::Harmed(why) => write!(f, "FAILED: {why}"),
            Verdict::Missed(why) => write!(f, "NOT CAUGHT: {why}"),
        }
    }
}

/// Judges a case with its rule in force.
pub fn in_force(outcome: Outcome, story: &Story) -> Verdict {
    match (outcome, story.failure()) {
        (_, Some((kind, text))) => Verdict::Harmed(format!("{}: {text}", kind.name())),
        (Outcome::Status(0), None) if story.passed() => Verdict::Passed,
        (Outcome::Status(0), None) => Verdict::Harmed("it does not say that it is through".into()),
        (outcome, None) => Verdict::Harmed(format!("the run {outcome}")),
    }
}

/// Judges a case without its rule: a run that ends well has caught nothing.
pub fn left_out(case: &Case, outcome: Outcome, story: &Story) -> Verdict {
    let Some((kind, text)) = story.failure() else {
        return Verdict::Missed(format!("the run {outcome}, and tells of no failure"));
    };
    if matches!(outcome, Outcome::Status(0) | Outcome::Hung(_)) {
        return Verdict::Missed(format!("it tells of '{text}', and the run {outcome}"));
    }
    if !case.fails.contains(&kind) {
        let feared: Vec<_> = case.fails.iter().map(|kind| kind.name()).collect();
        return Verdict::Missed(format!(
            "{} was to happen, and {}: {text} did",
            feared.join(" or "),
            kind.name()
        ));
    }
    let mut lines = vec![format!("{}: {text}", kind.name())];
    if kind == Kind::Deadlock {
        let cycle = story.cycle();
        if cycle.is_empty() {
            return Verdict::Missed(format!(
                "it tells of a deadlock, and who waits for whom is no cycle: {text}"
            ));
        }
        lines.extend(cycle.iter().map(|wait| format!("  {wait}")));
    }
    Verdict::Caught(lines)
}

/// Judges a guest that runs without one of Umbra's rules: by how it ended and what Umbra says, for nobody in it knows. Nothing where it
/// passed, or did not end by anything that a rule's absence does: another seed may.
pub fn omission(outcome: Outcome, said: &str) -> Option<Verdict> {
    let found = |words: &[&str]| {
        let line = said.lines().find(|line| words.iter().any(|word| line.contains(word)))?;
        Some(line.trim_start_matches("umbra: ").trim().to_owned())
    };
    let Outcome::Status(code) = outcome else { return None };
    let of = |status: Status| status.code() == code;
    let line = match () {
        () if of(Status::Incoherent) || of(Status::Failure) => found(&["INV-", "importers: "]),
        () if of(Status::Deadlock) => return stuck(said).map(Verdict::Caught),
        () if of(Status::Witness) || of(GUEST_FAILS) || of(GUEST_PANICS) => found(&["verdict=FAIL"]),
        () => None,
    };
    line.map(|line| Verdict::Caught(vec![line]))
}

/// What is said of threads that do not get on: why, and the cycle, if there is one.
fn stuck(said: &str) -> Option<Vec<String>> {
    const WHY: [&str; 4] =
        ["everybody waits", "wait for each other", "has waited for longer than", "gets nowhere"];
    let mut lines = said.lines().skip_while(|line| !WHY.iter().any(|why| line.contains(why)));
    let why = lines.next()?.trim_start_matches("umbra: ").to_owned();
    let mut cycle = lines.skip_while(|line| line.trim() != "the cycle:").skip(1);
    let cycle = std::iter::from_fn(|| cycle.next().filter(|line| line.contains(" waits for ")));
    Some([why].into_iter().chain(cycle.map(|line| format!("  {}", line.trim()))).collect())
}

/// As what the guest's own TLBs were found stale, if they were, and the words for it.
pub fn flush(outcome: Outcome, said: &str) -> Option<(Kind, String)> {
    let found = |words: &str| said.lines().find(|line| line.contains(words));
    if outcome != Outcome::Status(Status::GuestTlb.code()) {
        return None;
    }
    let certain = found("(certain)").map(|line| (Kind::Certain, line));
    let (kind, line) = certain.or_else(|| found("suspect").map(|line| (Kind::Suspect, line)))?;
    Some((kind, format!("{}: {}", kind.name(), line.trim_start_matches("umbra: ").trim())))
}

/// Judges a guest that runs without a flush of its own: a suspect counts where the same seed `with` the flush passes. Nothing where it was
/// not missed: another seed may.
pub fn without_flush<E>(
    outcome: Outcome,
    said: &str,
    with: impl FnOnce() -> Result<Option<Outcome>, E>,
) -> Result<Option<Verdict>, E> {
    let Some((kind, line)) = flush(outcome, said) else { return Ok(None) };
    if kind == Kind::Certain {
        return Ok(Some(Verdict::Caught(vec![line])));
    }
    let Some(outcome) = with()? else { return Ok(None) };
    let told = |how: &str| format!("  where it makes that flush, the same seed {how}");
    Ok(Some(match outcome {
        Outcome::Status(0) => Verdict::Caught(vec![line, told("has no suspect")]),
        _ => Verdict::Missed(format!("{line}\n{}", told(&outcome.to_string()))),
    }))
}

/// The built-in guest has found something wrong, in its work or in its kernel.
const GUEST_FAILS: Status = Status::Guest(1);
const GUEST_PANICS: Status = Status::Guest(3);

#[cfg(test)]
mod tests {
    use super::super::table::{Play, SCENARIOS};
    use super::*;

    fn case() -> Case {
        let all = SCENARIOS.iter().flat_map(|scenario| scenario.cases());
        let case = all.into_iter().find(|case| matches!(case.play, Play::Scene(..)));
        Case { fails: &[Kind::Deadlock], ..case.expect("there are scenes") }
    }

    fn judged(lines: &str, outcome: Outcome) -> Verdict {
        left_out(&case(), outcome, &Story::of(lines, "x"))
    }

    const CYCLE: &str = "scenario x: a holds l\nscenario x: a waits for l\n";

    #[test]
    fn a_deadlock_without_a_cycle_is_not_believed() {
        let failed = "scenario x: failed deadlock: nobody goes on\n";
        let status = Outcome::Status(3);
        assert!(matches!(judged(failed, status), Verdict::Missed(_)));
        let Verdict::Caught(lines) = judged(&format!("{CYCLE}{failed}"), status) else { panic!("a cycle") };
        assert_eq!(lines, ["deadlock: nobody goes on", "  a waits for l, which a holds"]);
        // Nor is a run that ends well, nor one that does not end.
        for outcome in [Outcome::Status(0), Outcome::Hung(std::time::Duration::ZERO)] {
            assert!(matches!(judged(&format!("{CYCLE}{failed}"), outcome), Verdict::Missed(_)));
        }
    }

    #[test]
    fn another_failure_than_the_feared_one_is_none() {
        let other = format!("{CYCLE}scenario x: failed order: first b\n");
        assert!(matches!(judged(&other, Outcome::Status(3)), Verdict::Missed(_)));
        assert!(matches!(judged("scenario x: passed\n", Outcome::Status(3)), Verdict::Missed(_)));
    }

    #[test]
    fn a_rule_is_missed_by_what_comes_of_it_alone() {
        let judged = |outcome, said: &str| omission(outcome, said).is_some();
        let breach = "umbra: INV-TLB-2: vCPU 0 used a stale translation\n";
        assert!(judged(Outcome::Status(Status::Incoherent.code()), breach));
        assert!(judged(Outcome::Status(3), "umbra: verdict=FAIL status=3\n"));
        let cycle = "umbra: at 5 ns some wait for each other, and for nobody else:\n  a waits for l, which a holds, since 3 ns\n  \
                     the cycle:\n    a waits for l, which a holds\n  this is a mistake\n";
        let Some(Verdict::Caught(lines)) = omission(Outcome::Status(Status::Deadlock.code()), cycle) else {
            panic!("a cycle")
        };
        assert_eq!(
            lines,
            ["at 5 ns some wait for each other, and for nobody else:", "  a waits for l, which a holds"]
        );
        for status in
            [Status::Pass, Status::Usage, Status::Operator, Status::Timeout, Status::Quit, Status::Failure]
        {
            assert!(
                !judged(Outcome::Status(status.code()), "umbra: verdict=FAIL, audit, panicked\n"),
                "{status:?}"
            );
        }
        assert!(
            !judged(Outcome::Signal(9), breach) && !judged(Outcome::Hung(std::time::Duration::ZERO), breach)
        );
    }

    #[test]
    fn a_suspect_counts_where_the_flush_made_has_none() {
        let missed = Outcome::Status(Status::GuestTlb.code());
        let judged = |outcome, said: &str, with: Option<u8>| {
            let with = || with.map(|code| Some(Outcome::Status(code))).ok_or("it was run with the flush");
            without_flush(outcome, said, with)
        };
        let certain = "umbra: the guest has missed a TLB flush (certain): x\numbra: suspect: y\n";
        let suspect = "umbra: the guest may have missed a TLB flush (suspect): y\n";
        let Ok(Some(Verdict::Caught(lines))) = judged(missed, certain, None) else { panic!("certain") };
        assert_eq!(lines, ["certain: the guest has missed a TLB flush (certain): x"]);
        let Ok(Some(Verdict::Caught(lines))) = judged(missed, suspect, Some(0)) else { panic!("suspect") };
        assert_eq!(lines[0], "suspect: the guest may have missed a TLB flush (suspect): y");
        assert!(matches!(judged(missed, suspect, Some(18)), Ok(Some(Verdict::Missed(_)))));
        for status in [Status::Pass, Status::Guest(1), Status::Timeout, Status::Failure] {
            assert_eq!(judged(Outcome::Status(status.code()), suspect, None), Ok(None), "{status:?}");
        }
        assert_eq!(judged(missed, "umbra: nothing\n", None), Ok(None));
    }

    #[test]
    fn to_pass_a_case_says_so_and_ends_so() {
        let story = |text| Story::of(text, "x");
        assert_eq!(in_force(Outcome::Status(0), &story("scenario x: passed\n")), Verdict::Passed);
        for (text, status) in
            [("", 0), ("scenario x: passed\n", 3), ("scenario x: passed\nscenario x: failed lost: y\n", 0)]
        {
            assert!(!in_force(Outcome::Status(status), &story(text)).is_good(), "{text} {status}");
        }
    }
}
