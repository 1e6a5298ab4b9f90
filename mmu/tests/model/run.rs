//! What all tests of more than one step want: random numbers, time, and the audit at the end.

use proptest::test_runner::{RngAlgorithm, TestRng};
use umbra_mmu::Mmu;

/// Random numbers that are the same in each run.
pub fn rng(seed: u64) -> TestRng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)
}

/// The number in the environment's variable `name`.
pub fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// How long a test by threads runs: `UMBRA_SECONDS`, or the time given.
pub fn seconds(usual: f64) -> std::time::Duration {
    std::time::Duration::from_secs_f64(number("UMBRA_SECONDS").unwrap_or(usual))
}

/// The audit finds nothing, and nobody has a slot of the window's pool.
pub fn audit(mmu: &Mmu) {
    let (findings, stats) = (mmu.audit(), mmu.window_stats());
    assert!(findings.is_empty(), "{findings:#?}");
    assert_eq!((stats.taken, stats.waiters), (0, 0), "{stats:?}");
}
