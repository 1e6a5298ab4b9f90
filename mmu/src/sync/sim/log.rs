//! What happens in a simulation, a line each, counted and hashed; and written, if somebody wants it.
//!
//! Holds: once it could not be written nothing more is, and the error is kept.

use std::fmt::Write as _;
use std::io::{self, Write};

/// What the log came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// Lines.
    pub events: u64,
    /// A hash of all of them: FNV-1a, 64 bits.
    pub hash: u64,
    /// Virtual nanoseconds.
    pub nanos: u64,
}

/// The log of a simulation.
pub(super) struct Log {
    out: Option<Box<dyn Write + Send>>,
    /// Why no more is written.
    pub failed: Option<io::Error>,
    /// So far.
    pub logged: Logged,
    line: String,
}

impl Log {
    /// An empty one.
    pub fn new(out: Option<Box<dyn Write + Send>>) -> Log {
        let logged = Logged { events: 0, hash: 0xcbf2_9ce4_8422_2325, nanos: 0 };
        Log { out, failed: None, logged, line: String::new() }
    }

    /// A line of `actor`'s, at `now`.
    pub fn write(&mut self, now: u64, actor: &str, say: impl FnOnce(&mut String)) {
        self.line.clear();
        let _ = write!(self.line, "{now} {actor}: ");
        say(&mut self.line);
        self.line.push('\n');
        self.logged.events += 1;
        self.logged.nanos = now;
        for byte in self.line.bytes() {
            self.logged.hash = (self.logged.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if let Some(out) = &mut self.out
            && let Err(error) = out.write_all(self.line.as_bytes())
        {
            (self.out, self.failed) = (None, Some(error));
        }
    }

    /// Writes all that there is.
    pub fn flush(&mut self) {
        if let Some(out) = &mut self.out
            && let Err(error) = out.flush()
        {
            (self.out, self.failed) = (None, Some(error));
        }
    }
}
