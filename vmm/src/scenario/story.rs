//! The facts that a case tells on its standard output, a line each, and what follows from them.
//!
//! ```text
//! scenario CASE: begin
//! scenario CASE: WHO holds WHAT
//! scenario CASE: WHO owes WHAT                 it is to bring it
//! scenario CASE: WHO waits for WHAT
//! scenario CASE: WHO lets go of WHAT
//! scenario CASE: saw TEXT
//! scenario CASE: measured NAME = NUMBER UNIT
//! scenario CASE: failed KIND: TEXT
//! scenario CASE: passed
//! ```
//!
//! Who waits for something waits for all who hold or owe it: for a thing of which there are several, each of its holders says so. A set of
//! waiters each of whom waits for what only others of the set hold will never go on.
//!
//! Limits: a line that is no fact is passed over; of what a guest says that is most.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Some wait for each other.
    Deadlock,
    /// Somebody who may not sleep has to.
    Sleep,
    /// A thing is given back as another than it was taken.
    Type,
    /// More are nested than there is room for.
    Nesting,
    /// Things are given back in the wrong order.
    Order,
    /// Somebody reads what is not there, or not there any more.
    Content,
    /// What was done is undone.
    Lost,
    /// There is no more of something.
    Exhausted,
    /// What belongs together is apart.
    Scattered,
    /// A translation has outlived what it was of.
    Incoherent,
    /// What Umbra keeps of its pages does not agree any more.
    Books,
    /// The guest has certainly missed a flush of its own.
    Certain,
    /// It may have.
    Suspect,
    /// Something that no case fears.
    Broken,
}

impl Kind {
    /// All there are.
    pub const ALL: [Kind; 14] = [
        Kind::Deadlock,
        Kind::Sleep,
        Kind::Type,
        Kind::Nesting,
        Kind::Order,
        Kind::Content,
        Kind::Lost,
        Kind::Exhausted,
        Kind::Scattered,
        Kind::Incoherent,
        Kind::Books,
        Kind::Certain,
        Kind::Suspect,
        Kind::Broken,
    ];

    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Deadlock => "deadlock",
            Kind::Sleep => "sleep",
            Kind::Type => "type",
            Kind::Nesting => "nesting",
            Kind::Order => "order",
            Kind::Content => "content",
            Kind::Lost => "lost",
            Kind::Exhausted => "exhausted",
            Kind::Scattered => "scattered",
            Kind::Incoherent => "incoherent",
            Kind::Books => "books",
            Kind::Certain => "certain",
            Kind::Suspect => "suspect",
            Kind::Broken => "broken",
        }
    }

    /// What has happened.
    pub const fn meaning(self) -> &'static str {
        match self {
            Kind::Deadlock => {
                "some wait for each other, and for nobody else: each is named with what it waits for, and who holds or owes that"
            }
            Kind::Sleep => "somebody who may not sleep was about to",
            Kind::Type => {
                "a thing was given back as another than it was taken, or made as another than it is used"
            }
            Kind::Nesting => "more were nested than there was room for",
            Kind::Order => "things were not given back in reverse, and one that was held is gone",
            Kind::Content => "somebody has read what is not there, or not there any more",
            Kind::Lost => "what was done is undone: a store, or a discard",
            Kind::Exhausted => "there was no more of something, for one who may not wait",
            Kind::Scattered => "what belongs together went apart",
            Kind::Incoherent => {
                "a translation has outlived what it was of: the oracle or the ledger found it"
            }
            Kind::Books => "what Umbra keeps of its pages does not agree any more: the audit found it",
            Kind::Certain => {
                "the guest's kernel has missed a flush of a TLB: a CPU uses what was taken away, and is somebody else's by now"
            }
            Kind::Suspect => {
                "it seems to have missed one: who took something away goes on while a CPU holds it; and where it makes that flush, the same seed has no suspect"
            }
            Kind::Broken => "something else broke, which no case fears: a mistake in Umbra",
        }
    }

    fn named(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// A fact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The case begins.
    Begin,
    /// Somebody has something.
    Holds(String, String),
    /// Somebody is to bring something.
    Owes(String, String),
    /// Somebody wants something, and sleeps until it comes.
    Waits(String, String),
    /// Somebody has no longer what he held, or does not wait for it any more.
    LetsGo(String, String),
    /// Something happened.
    Saw(String),
    /// Something was measured.
    Measured(String),
    /// The case has come to harm.
    Failed(Kind, String),
    /// The case is through.
    Passed,
}

impl Fact {
    /// The fact that a line tells of `case`.
    fn of(line: &str, case: &str) -> Option<Fact> {
        let words = line.trim_end().strip_prefix("scenario ")?.strip_prefix(case)?.strip_prefix(": ")?;
        let pair = |by| words.split_once(by).map(|(who, what)| (who.to_owned(), what.to_owned()));
        if let Some(text) = words.strip_prefix("saw ") {
            return Some(Fact::Saw(text.into()));
        }
        if let Some(text) = words.strip_prefix("measured ") {
            return Some(Fact::Measured(text.into()));
        }
        if let Some((kind, text)) = words.strip_prefix("failed ").and_then(|rest| rest.split_once(": ")) {
            return Some(Fact::Failed(Kind::named(kind)?, text.into()));
        }
        match words {
            "begin" => return Some(Fact::Begin),
            "passed" => return Some(Fact::Passed),
            _ => {}
        }
        let holds = || pair(" holds ").map(|(who, what)| Fact::Holds(who, what));
        let owes = || pair(" owes ").map(|(who, what)| Fact::Owes(who, what));
        let waits = || pair(" waits for ").map(|(who, what)| Fact::Waits(who, what));
        let goes = || pair(" lets go of ").map(|(who, what)| Fact::LetsGo(who, what));
        waits().or_else(goes).or_else(holds).or_else(owes)
    }
}

impl Fact {
    /// As a case tells it.
    pub fn words(&self) -> String {
        match self {
            Fact::Begin => "begin".into(),
            Fact::Saw(text) => format!("saw {text}"),
            Fact::Measured(text) => format!("measured {text}"),
            Fact::Failed(kind, text) => format!("failed {}: {text}", kind.name()),
            Fact::Holds(..) | Fact::Owes(..) | Fact::Waits(..) | Fact::LetsGo(..) | Fact::Passed => {
                self.to_string()
            }
        }
    }
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fact::Begin => f.write_str("begins"),
            Fact::Holds(who, what) => write!(f, "{who} holds {what}"),
            Fact::Owes(who, what) => write!(f, "{who} owes {what}"),
            Fact::Waits(who, what) => write!(f, "{who} waits for {what}"),
            Fact::LetsGo(who, what) => write!(f, "{who} lets go of {what}"),
            Fact::Saw(text) => f.write_str(text),
            Fact::Measured(text) => write!(f, "measured: {text}"),
            Fact::Failed(kind, text) => write!(f, "{}: {text}", kind.name()),
            Fact::Passed => f.write_str("passed"),
        }
    }
}

/// All that a case has told, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Story(pub Vec<Fact>);

impl Story {
    /// What `text` tells of `case`.
    pub fn of(text: &str, case: &str) -> Story {
        Story(text.lines().filter_map(|line| Fact::of(line, case)).collect())
    }

    /// What it came to harm by, if it did.
    pub fn failure(&self) -> Option<(Kind, &str)> {
        self.0.iter().find_map(|fact| match fact {
            Fact::Failed(kind, text) => Some((*kind, text.as_str())),
            _ => None,
        })
    }

    /// True where it says that it is through, and nothing else.
    pub fn passed(&self) -> bool {
        self.0.contains(&Fact::Passed) && self.failure().is_none()
    }

    /// Those who will never go on, as it stands at the end: each with what it waits for and who holds that, from one to the next, and
    /// the last waits for one of those before. Empty where everybody may.
    pub fn cycle(&self) -> Vec<Wait<'_>> {
        let (mut holders, mut waiters) =
            (BTreeMap::<&str, BTreeSet<&str>>::new(), BTreeMap::<&str, &str>::new());
        let mut owed = BTreeSet::<&str>::new();
        for fact in &self.0 {
            match fact {
                Fact::Holds(who, what) => {
                    holders.entry(what).or_default().insert(who);
                    waiters.retain(|waiter, wanted| (*waiter, *wanted) != (who, what));
                }
                Fact::Owes(who, what) => {
                    holders.entry(what).or_default().insert(who);
                    owed.insert(what);
                }
                Fact::Waits(who, what) => {
                    waiters.insert(who, what);
                }
                Fact::LetsGo(who, what) => {
                    waiters.retain(|waiter, wanted| (*waiter, *wanted) != (who, what));
                    holders.get_mut(what.as_str()).map(|of| of.remove(who.as_str()));
                }
                _ => {}
            }
        }
        let is_stuck = |waiters: &BTreeMap<&str, &str>, what: &str| {
            holders
                .get(what)
                .is_some_and(|of| !of.is_empty() && of.iter().all(|who| waiters.contains_key(who)))
        };
        loop {
            let before = waiters.len();
            let stuck: Vec<_> = waiters.iter().filter(|(_, what)| is_stuck(&waiters, what)).collect();
            let stuck: BTreeMap<&str, &str> = stuck.into_iter().map(|(who, what)| (*who, *what)).collect();
            waiters = stuck;
            if waiters.len() == before {
                break;
            }
        }
        let mut cycle: Vec<Wait> = Vec::new();
        let mut next = waiters.keys().next().copied();
        while let Some((who, what)) = next.and_then(|who| waiters.get_key_value(who)) {
            // Where there are several holders, one that is not there yet makes the longer tale.
            let of = &holders[what];
            let holder =
                of.iter().find(|holder| cycle.iter().all(|wait| wait.who != **holder) && *holder != who);
            let holder = holder.or_else(|| of.iter().next()).copied().unwrap_or_default();
            cycle.push(Wait { who, what, holder, is_owed: owed.contains(what) });
            next = cycle.iter().all(|wait| wait.who != holder).then_some(holder);
        }
        // Who only waits for one of the cycle is not of it.
        let first = cycle.last().and_then(|last| cycle.iter().position(|wait| wait.who == last.holder));
        cycle.split_off(first.unwrap_or_default())
    }
}

/// One who waits for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait<'a> {
    /// It.
    pub who: &'a str,
    /// For what.
    pub what: &'a str,
    /// Which that one has.
    pub holder: &'a str,
    /// Or is to bring.
    pub is_owed: bool,
}

impl fmt::Display for Wait<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has = if self.is_owed { "owes" } else { "holds" };
        write!(f, "{} waits for {}, which {} {has}", self.who, self.what, self.holder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycle(lines: &[&str]) -> Vec<String> {
        let text: String = lines.iter().map(|line| format!("scenario x: {line}\n")).collect();
        Story::of(&text, "x").cycle().iter().map(Wait::to_string).collect()
    }

    #[test]
    fn lines_are_facts_and_others_are_passed_over() {
        let text = "boot\nscenario x: begin\nscenario y: passed\nscenario x: failed order: A before B\r\nscenario x: nonsense\n\
                    scenario x: failed rubbish: no\nscenario x: saw A holds B\nscenario x: measured n = 3 slots\n";
        let facts = [
            Fact::Begin,
            Fact::Failed(Kind::Order, "A before B".into()),
            Fact::Saw("A holds B".into()),
            Fact::Measured("n = 3 slots".into()),
        ];
        assert_eq!(Story::of(text, "x").0, facts);
        assert!(!Story::of(text, "x").passed());
        assert!(Story::of(text, "y").passed());
    }

    #[test]
    fn two_who_wait_for_each_other_are_a_cycle() {
        let lines = ["a holds one", "b holds two", "a waits for two", "b waits for one"];
        let found = ["a waits for two, which b holds", "b waits for one, which a holds"];
        assert_eq!(cycle(&lines), found);
        // In the other order too.
        assert_eq!(cycle(&[lines[2], lines[3], lines[1], lines[0]]), found);
    }

    #[test]
    fn who_can_go_on_is_in_no_cycle() {
        for lines in [
            &["a holds one", "b waits for one"][..],
            &["a holds one", "b holds two", "a waits for two", "b waits for one", "b lets go of two"],
            &["a holds one", "b holds two", "a waits for two", "b waits for one", "b lets go of one"],
            &["a holds one", "b holds two", "a waits for two", "b waits for one", "b holds one"],
            // Nobody has it: somebody may bring it.
            &["a waits for rain"],
            // One of two holders goes on.
            &["a holds slot", "b holds slot", "a waits for slot"],
        ] {
            assert_eq!(cycle(lines), Vec::<String>::new(), "{lines:?}");
        }
    }

    #[test]
    fn a_thing_of_which_there_are_several_is_waited_for_by_all() {
        let lines = ["a holds slot", "b holds slot", "a waits for slot", "b waits for slot"];
        assert_eq!(cycle(&lines), ["a waits for slot, which b holds", "b waits for slot, which a holds"]);
        let alone = ["a holds lock", "a waits for lock", "z waits for lock"];
        assert_eq!(cycle(&alone), ["a waits for lock, which a holds"]);
        let queue =
            ["a waits for lock", "b holds lock", "b waits for c's", "c holds c's", "c waits for lock"];
        assert_eq!(cycle(&queue), ["b waits for c's, which c holds", "c waits for lock, which b holds"]);
    }
}
