//! What the tests of one vCPU share.

use std::time::Duration;

use umbra::kvm::{Host, KvmExit, Options};
use umbra::probe::scratch::Scratch;
use umbra::probe::watchdog::Watchdog;
use umbra_mmu::Gva;

/// Fails the test where the condition does not hold.
macro_rules! check {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err(format!("{}:{}: {}", file!(), line!(), format!($($what)+)));
        }
    };
}
pub(crate) use check;

/// How a test ends.
pub type Test = Result<(), String>;

/// An error as a test's.
pub fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A small guest with every door closed.
pub fn guest(host: &Host) -> Result<Scratch, String> {
    Scratch::new(host, Options::default()).map_err(text)
}

/// Enters; a guest that does not leave within seconds fails the test.
pub fn enter(scratch: &mut Scratch) -> Result<KvmExit, String> {
    let watchdog = Watchdog::new(Duration::from_secs(10));
    watchdog.watch("a test", scratch.vcpu.kicker());
    scratch.enter().map_err(text)
}

/// Runs `code` at CPL 3.
pub fn run(scratch: &mut Scratch, code: &[u8]) -> Result<KvmExit, String> {
    scratch.load(code, true).map_err(text)?;
    enter(scratch)
}

/// True for a trap of this vector and error code.
pub fn trapped(exit: KvmExit, vector: u8, error: u32) -> bool {
    matches!(exit, KvmExit::Trap { vector: v, error: e, .. } if (v, e) == (vector, error))
}

/// Whatever a host makes of `hlt` and its like: #GP(0) everywhere so far.
pub fn halted(exit: KvmExit) -> bool {
    trapped(exit, 13, 0)
}

/// A page that is not mapped.
pub const ABSENT: Gva = Gva(0x40_0000);
/// Traps everywhere.
pub const HLT: u8 = 0xf4;
