//! Runs of this program by itself, each in a process of its own: what it says, how it ends.
//!
//! Holds: dropping one ends it. It ends with its parent, however that ends ([`die_with_parent`], which such a run begins with).
//!
//! Limits: of what it says on standard error the last `SAID_MAX` bytes are kept, of its standard output, where it is kept at all, the
//! first `HEARD_MAX`.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use crate::machine::memory_file;
use crate::status::Status;
use crate::units::format_duration;

/// From one look at running children to the next.
pub const LOOK: Duration = Duration::from_millis(2);
/// Bytes of what one says.
const SAID_MAX: u64 = 16 << 10;
/// Bytes of what its guest says.
const HEARD_MAX: u64 = 1 << 20;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By itself.
    Status(u8),
    /// By a signal.
    Signal(i32),
    /// Not in the time that it had.
    Hung(Duration),
}

impl Outcome {
    fn of(status: ExitStatus) -> Outcome {
        match status.code() {
            Some(code) => Outcome::Status(code as u8),
            None => Outcome::Signal(status.signal().unwrap_or_default()),
        }
    }

    /// The exit status of whoever found it: the run's own, if it has one.
    pub fn code(self) -> u8 {
        match self {
            Outcome::Status(code) => code,
            Outcome::Signal(_) | Outcome::Hung(_) => Status::Failure.code(),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Status(code) => write!(f, "ended with status {code}"),
            Outcome::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Outcome::Hung(limit) => {
                write!(f, "hung: it has not ended in {}, its --patience", format_duration(*limit))
            }
        }
    }
}

/// Tells a run whose it is.
const PARENT: &str = "UMBRA_PARENT";

/// Has this process die when whoever started it as a [`Child`] does; says whether that is there still.
pub fn die_with_parent() -> bool {
    // A host without it leaves what its parent does not kill by itself.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let named = std::env::var(PARENT).ok().and_then(|id| id.parse().ok());
    named.is_none_or(|id: i32| getppid().is_some_and(|parent| parent.as_raw_nonzero().get() == id))
}

/// A running one.
pub struct Child {
    process: std::process::Child,
    said: File,
    heard: Option<File>,
    begun: Instant,
}

impl Child {
    /// Starts this program with `args`. Its standard output is thrown away, but where `keep` says otherwise.
    ///
    /// # Errors
    ///
    /// When the host has no room for it.
    pub fn start(args: impl IntoIterator<Item = OsString>, keep: bool) -> io::Result<Child> {
        let said = memory_file(c"umbra-said", 0)?;
        let heard = keep.then(|| memory_file(c"umbra-heard", 0)).transpose()?;
        let stdout = match &heard {
            Some(heard) => heard.try_clone()?.into(),
            None => Stdio::null(),
        };
        let mut command = Command::new("/proc/self/exe");
        command.env(PARENT, std::process::id().to_string());
        command.args(args).stdin(Stdio::null()).stdout(stdout).stderr(said.try_clone()?);
        Ok(Child { process: command.spawn()?, said, heard, begun: Instant::now() })
    }

    /// How it has ended, if it has.
    ///
    /// # Errors
    ///
    /// When what became of it cannot be told.
    pub fn look(&mut self, patience: Duration) -> io::Result<Option<Outcome>> {
        let status = self.process.try_wait()?;
        let hangs = || (self.begun.elapsed() > patience).then_some(Outcome::Hung(patience));
        Ok(status.map(Outcome::of).or_else(hangs))
    }

    /// Its last words.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn said(&mut self) -> io::Result<String> {
        let bytes = self.said.metadata()?.len();
        text_of(&mut self.said, bytes.saturating_sub(SAID_MAX), SAID_MAX)
    }

    /// What its guest has said; nothing where that is not kept.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn heard(&mut self) -> io::Result<String> {
        self.heard.as_mut().map_or(Ok(String::new()), |heard| text_of(heard, 0, HEARD_MAX))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // One that has ended is not there any more, and has been waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn text_of(file: &mut File, from: u64, most: u64) -> io::Result<String> {
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
