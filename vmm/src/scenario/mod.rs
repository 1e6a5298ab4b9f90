//! Discussions of the field's history, alive: `umbra scenario`.
//!
//! Story: a *scenario* is a discussion, and each of its *cases* is a rule that came of it. A case is played by the real code, once
//! with the rule in force, which must pass; with `--bug` that rule is switched off and the case must fail, by exactly the failure that
//! the discussion feared. What happens is told by those whom it happens to, a fact a line ([`story`]); the verdict is this module's
//! own (`judge`): it finds the cycle of those who wait for each other itself, and believes nobody who only says so.
//!
//! ```text
//! umbra scenario run NAME/CASE          umbra play ..  (a process of its own)
//!   table: what is played        --->     a guest: `umbra run` with the case's command line
//!   judge: facts, status         <---     or a scene: Umbra's own MMU between actors of one simulation
//! ```
//!
//! | file | its job |
//! |---|---|
//! | args | the command line |
//! | table | the scenarios, their cases, their stories; docs/scenarios.md is made of it |
//! | guest_rules | the flushes of the guest's kernel; docs/GUEST-RULES.md is made of it |
//! | story | the facts that a case tells, and who waits for whom |
//! | judge | what a case came to |
//! | run | cases in processes of their own, seed by seed |
//! | scenes | cases that Umbra's own MMU plays |
//!
//! Holds: a rule is left out of runs that `umbra play` makes and of no others.

#![forbid(unsafe_code)]

pub mod args;
pub mod guest_rules;
mod judge;
mod run;
mod scenes;
pub mod story;
pub mod table;

pub use args::{PlayArgs, ScenarioArgs, ScenarioCommand};
pub use run::{Report, ScenarioError, run};
pub use scenes::play;
