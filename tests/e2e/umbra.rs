//! Starting `umbra` as a user does, and what must hold of every run whatever the test is about.
//!
//! Holds: no run panics, dies by a signal or outlives its limit, whatever image and options it was given.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::process::Command;
use std::time::Duration;

use libtest_mimic::Failed;
use tempfile::NamedTempFile;

use crate::support::host::Need;
use crate::support::image;
use crate::support::process::{self, End, Outcome, Said};

/// The exit statuses that are Umbra's own; `umbra --help` and the manual have the table.
pub mod status {
    use crate::support::process::End;

    /// The command line makes no sense.
    pub const USAGE: End = End::Status(2);
    /// An input or the host does not allow the run.
    pub const OPERATOR: End = End::Status(4);
    /// Umbra could not go on.
    pub const FAILURE: End = End::Status(6);
    /// A witness contradicts the guest.
    pub const WITNESS: End = End::Status(8);
    /// `--timeout` was over.
    pub const TIMEOUT: End = End::Status(10);
    /// The guest reset the machine or waits for ever.
    pub const RESET: End = End::Status(12);
    /// Ended by an operator.
    pub const QUIT: End = End::Status(14);
    /// Umbra missed a TLB flush.
    pub const INCOHERENT: End = End::Status(16);
    /// The guest missed a TLB flush.
    pub const GUEST_TLB: End = End::Status(18);
    /// Umbra's threads wait for each other.
    pub const DEADLOCK: End = End::Status(20);
}

/// Longer than any run here takes, also on a busy machine; the rig runs ten times slower, and slower still where both of its
/// machines share two cores with others.
pub fn limit() -> Duration {
    Duration::from_secs(if Need::Rig.met().is_ok() { 600 } else { 90 })
}

/// The program under test: `UMBRA_BIN`, or the one that cargo built with this test.
pub fn program() -> OsString {
    std::env::var_os("UMBRA_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_umbra").into())
}

/// Runs `umbra` with `args` and gives what a user sees.
pub fn umbra<I: IntoIterator<Item: AsRef<OsStr>>>(args: I) -> Result<Outcome, Failed> {
    umbra_heard(args, &Said::default())
}

/// The same for whoever listens to what it says meanwhile.
pub fn umbra_heard<I: IntoIterator<Item: AsRef<OsStr>>>(args: I, said: &Said) -> Result<Outcome, Failed> {
    judge(process::run_heard(Command::new(program()).args(args), limit(), said)?)
}

/// Gives the outcome back unless it shows something that must never happen.
pub fn judge(run: Outcome) -> Result<Outcome, Failed> {
    match run.end {
        End::Signal(signal) => Err(format!("died by signal {signal}:\n{run}").into()),
        End::Overtime => Err(format!("did not end:\n{run}").into()),
        End::Status(_) if run.stderr.contains("panicked at") => Err(format!("panicked:\n{run}").into()),
        End::Status(_) => Ok(run),
    }
}

/// A way to run a guest: options of `umbra run`, and what the machine must have for them.
#[derive(Clone, Copy)]
pub struct Way {
    /// For the test's name.
    pub name: &'static str,
    /// The options.
    pub options: &'static [&'static str],
    /// What they need.
    pub needs: &'static [Need],
}

/// KVM, kernel and user.
pub const KVM: Way = Way { name: "kvm", options: &["--backend", "kvm"], needs: &[Need::Kvm] };
/// KVM for user code alone.
pub const KVM_INTERPRET: Way = Way {
    name: "kvm_interpret",
    options: &["--backend", "kvm", "--supervisor", "interpret"],
    needs: &[Need::Kvm],
};
/// The interpreter.
pub const SOFT: Way = Way { name: "soft", options: &["--backend", "soft"], needs: &[] };
/// The interpreter with a TLB that forgets nothing it need not.
pub const SOFT_STICKY: Way =
    Way { name: "soft_sticky", options: &["--backend", "soft", "--tlb", "sticky"], needs: &[] };
/// The interpreter with a TLB that forgets at random.
pub const SOFT_LOSSY: Way =
    Way { name: "soft_lossy", options: &["--backend", "soft", "--tlb", "lossy"], needs: &[] };
/// All of them.
const WAYS: [Way; 5] = [KVM, KVM_INTERPRET, SOFT, SOFT_STICKY, SOFT_LOSSY];

/// Those that this machine is to show: the nested rig is there for KVM.
pub fn ways() -> impl Iterator<Item = Way> {
    let rig = Need::Rig.met().is_ok();
    WAYS.into_iter().filter(move |way| !rig || way.needs.contains(&Need::Kvm))
}

impl Way {
    /// What a test needs that runs a guest this way and has needs of its own.
    pub fn needs(self, others: &[Need]) -> Vec<Need> {
        self.needs.iter().chain(others).copied().collect()
    }

    /// Runs `umbra run` this way.
    pub fn run(self, args: &[&str]) -> Result<Outcome, Failed> {
        umbra(["run"].iter().chain(self.options).chain(args))
    }

    /// Boots a Multiboot image of `code` this way.
    pub fn boot(self, code: &[u8], options: &[&str]) -> Result<Outcome, Failed> {
        boot(code, &[self.options, options].concat())
    }
}

/// A file with these bytes, for as long as the value lives.
pub fn file_of(bytes: &[u8]) -> Result<NamedTempFile, Failed> {
    let mut file = NamedTempFile::new()?;
    file.write_all(bytes)?;
    Ok(file)
}

/// Boots a Multiboot image of `code` with further options of `umbra run`.
pub fn boot(code: &[u8], options: &[&str]) -> Result<Outcome, Failed> {
    let file = file_of(&image::multiboot(code))?;
    let image = [OsStr::new("run"), file.path().as_os_str()];
    umbra(image.into_iter().chain(options.iter().map(OsStr::new)))
}

/// Checks that the run was refused with one sentence on standard error that has each of `words` in it.
pub fn expect_sentence(run: &Outcome, words: &[&str]) -> Result<(), Failed> {
    let lines: Vec<_> = run.stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    let said = |word: &&str| run.stderr.to_lowercase().contains(&word.to_lowercase());
    crate::ensure!(run.end == status::OPERATOR, "expected {:?}:\n{run}", status::OPERATOR);
    crate::ensure!(lines.len() == 1, "an operator's error is one line, not {}:\n{run}", lines.len());
    crate::ensure!(words.iter().all(said), "the error should name {words:?}:\n{run}");
    crate::ensure!(run.stdout.is_empty(), "standard output belongs to the guest:\n{run}");
    Ok(())
}
