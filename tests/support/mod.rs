//! What the tests that start whole programs share.
//!
//! Story: an end-to-end test is a [`case`] that names what it needs of the machine, builds or picks a guest image,
//! runs `umbra` (and QEMU beside it) through [`process`] and compares what a user would see. Holds: every child has
//! a time limit and is gone when the test ends; a test that could not run is counted as ignored, with the reason,
//! and as failed where the caller insists (`UMBRA_REQUIRE`).

pub mod crowd;
pub mod host;
pub mod image;
pub mod litmus;
pub mod noise;
pub mod pair;
pub mod process;
pub mod qemu;
pub mod remap;
pub mod segments;
pub mod shared;
pub mod spin;
pub mod traps;

use libtest_mimic::{Completion, Failed, Trial};

/// What a test's body returns: a sentence where it failed.
pub type Verdict = Result<(), Failed>;

/// A test that is ignored, with the reason, on a machine that lacks one of `needs`; its kind names them.
pub fn case(
    name: impl Into<String>,
    needs: &[host::Need],
    body: impl FnOnce() -> Verdict + Send + 'static,
) -> Trial {
    let needs = needs.to_vec();
    let kind = needs.iter().map(|need| need.name()).collect::<Vec<_>>().join(", ");
    Trial::ignorable_test(name, move || {
        for need in needs {
            if let Err(reason) = need.met() {
                return match need.is_required() {
                    true => Err(format!("UMBRA_REQUIRE names {}, but {reason}", need.name()).into()),
                    false => Ok(Completion::ignored_with(reason)),
                };
            }
        }
        let verdict = body();
        if let (Err(why), Ok(())) = (&verdict, host::Need::Rig.met()) {
            // The rig may be stopped at its limit before the summary of failures: say it now.
            println!("{}", why.message().unwrap_or_default());
        }
        verdict.map(|()| Completion::Completed)
    })
    .with_kind(kind)
}

/// Ends the test with a sentence when `condition` does not hold.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($sentence:tt)+) => {
        if !$condition {
            return Err(format!($($sentence)+).into());
        }
    };
}
