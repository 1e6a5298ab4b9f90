//! Where the guest's serial output goes, and when its first byte came.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// The moment the process started, near enough: the first call decides.
pub fn process_start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// When the guest's first byte came, in microseconds since [`process_start`]; 0 for not yet.
#[derive(Clone, Debug, Default)]
pub struct FirstByte(Arc<AtomicU64>);

impl FirstByte {
    /// The moment, if it has come.
    pub fn micros(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|at| *at != 0)
    }

    fn note(&self) {
        if self.0.load(Ordering::Relaxed) == 0 {
            self.0.store(process_start().elapsed().as_micros().max(1) as u64, Ordering::Relaxed);
        }
    }
}

/// Standard output for the guest: a line at a time, so that a reader sees whole lines at once.
#[derive(Debug)]
pub struct Console {
    first: FirstByte,
    line: Vec<u8>,
}

/// A line longer than this is passed on in parts.
const LINE_MAX: usize = 1024;

impl Console {
    /// The console, and the note of its first byte.
    pub fn new() -> (Console, FirstByte) {
        let first = FirstByte::default();
        (Console { first: first.clone(), line: Vec::new() }, first)
    }

    fn pass_on(&mut self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(&self.line)?;
        self.line.clear();
        out.flush()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.first.note();
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_MAX {
                self.pass_on()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // The UART flushes after each byte; a line goes out when it is whole, or with the console's end.
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Err(error) = self.pass_on() {
            log::debug!("the guest's last line is lost: {error}");
        }
    }
}
