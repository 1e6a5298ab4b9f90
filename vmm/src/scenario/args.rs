//! The command line of `umbra scenario`, and what it asks for.

use std::ops::Range;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use umbra_mmu::Rule;

use super::scenes::Scene;
use super::table::{self, Case, Play, Scenario};
use crate::cli::{RunArgs, parse_rule};
use crate::simulate::args::parse_seeds;
use crate::units::parse_duration;

/// `umbra scenario`.
#[derive(Clone, Debug, Subcommand)]
pub enum ScenarioCommand {
    /// What there is, a line each.
    List,
    /// Play one: pass with its rules in force, or with --bug be caught.
    Run(ScenarioArgs),
}

/// What plays a case of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Player {
    /// The interpreter, in an order that the seed decides.
    Soft,
    /// /dev/kvm, in the order that comes.
    Kvm,
}

/// Options of `umbra scenario run`.
#[derive(Args, Clone, Debug)]
pub struct ScenarioArgs {
    /// A scenario, or one of its cases: NAME/CASE. `umbra scenario list` has the names.
    pub name: String,
    /// Leave each case's rule out, and pass only where that is caught.
    #[arg(long)]
    pub bug: bool,
    /// What runs the guest, where a guest plays.
    #[arg(long, value_enum, default_value_t = Player::Soft)]
    pub backend: Player,
    /// The order in which things happen: 1 if left out.
    #[arg(long, value_name = "N", conflicts_with = "seeds")]
    pub seed: Option<u64>,
    /// Play each case for each seed from A on, B left out.
    #[arg(long, value_name = "A..B", value_parser = parse_seeds)]
    pub seeds: Option<Range<u64>>,
    /// Tell the whole story: the discussion, and everything that happened in the first seed.
    #[arg(long)]
    pub explain: bool,
    /// How long one case may take, in the host's time, before it is said to hang.
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = parse_duration)]
    pub patience: Duration,
}

/// Options of `umbra play`.
#[derive(Args, Clone, Debug)]
pub struct PlayArgs {
    /// The rule that is left out.
    #[arg(long, value_name = "RULE", value_parser = parse_rule)]
    pub without: Option<Rule>,
    /// No guest runs, but this scene.
    #[arg(long, value_enum)]
    pub scene: Option<Scene>,
    /// What else `umbra run` has.
    #[command(flatten)]
    pub run: RunArgs,
}

/// What is to be played.
#[derive(Clone, Debug)]
pub struct Order {
    /// Whose cases.
    pub scenario: &'static Scenario,
    /// Which.
    pub cases: Vec<Case>,
    /// Without their rules.
    pub bug: bool,
    /// By whom.
    pub player: Player,
    /// In which orders.
    pub seeds: Range<u64>,
    /// How much is told.
    pub explain: bool,
    /// How long each may take.
    pub patience: Duration,
}

impl ScenarioArgs {
    /// What they ask for.
    ///
    /// # Errors
    ///
    /// A sentence where there is no such case, or it cannot be played so.
    pub fn order(&self) -> Result<Order, String> {
        let (name, case) = match self.name.split_once('/') {
            Some((name, case)) => (name, Some(case)),
            None => (self.name.as_str(), None),
        };
        let names = || table::SCENARIOS.iter().map(|s| s.name).collect::<Vec<_>>().join(", ");
        let scenario = table::SCENARIOS.iter().find(|scenario| scenario.name == name);
        let scenario =
            scenario.ok_or_else(|| format!("there is no scenario '{name}'; there are {}", names()))?;
        let all = scenario.cases();
        let named: Vec<Case> =
            all.iter().filter(|c| case.is_none_or(|name| name == c.name)).copied().collect();
        if let (Some(case), []) = (case, &named[..]) {
            let cases = all.iter().map(|c| c.name).collect::<Vec<_>>().join(", ");
            return Err(format!("scenario '{name}' has no case '{case}'; it has {cases}"));
        }
        let fits = |c: &Case| {
            let plays = self.backend == Player::Soft || matches!(c.play, Play::Guest { .. });
            plays && (!self.bug || !c.fails.is_empty())
        };
        let cases: Vec<Case> = named.iter().copied().filter(fits).collect();
        if cases.is_empty() {
            return Err(match self.bug && named.iter().all(|c| c.fails.is_empty()) {
                true => format!("'{}' measures, and has no rule that --bug could leave out", self.name),
                false => format!(
                    "'{}' is played by Umbra's own MMU, not by a guest; leave --backend out",
                    self.name
                ),
            });
        }
        if self.backend == Player::Kvm && self.seed.is_some() {
            return Err("--seed is for the interpreter; on kvm things happen in the order that comes (--seeds A..B plays so often)".into());
        }
        let seed = self.seed.unwrap_or(1);
        if seed == u64::MAX {
            return Err(format!("--seed {seed}: the last seed is {}", u64::MAX - 1));
        }
        let seeds = self.seeds.clone().unwrap_or(seed..seed.saturating_add(1));
        Ok(Order {
            scenario,
            cases,
            bug: self.bug,
            player: self.backend,
            seeds,
            explain: self.explain,
            patience: self.patience,
        })
    }
}
