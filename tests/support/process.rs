//! A child process with a time limit, and everything it said.
//!
//! Two threads drain its pipes so that it never blocks on us; the caller's thread waits, and kills it at the limit.
//! Limits: of each pipe the first 4 MiB are kept, so that a child that floods costs no more.

use std::fmt;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bytes kept of each pipe.
const KEPT_MAX: usize = 4 << 20;

/// Lines shown of each pipe under a failed test: the cause stands first, the verdict last.
const SHOWN_FIRST: usize = 6;
const SHOWN_LAST: usize = 40;

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with this status.
    Status(i32),
    /// By this signal, which was not ours.
    Signal(i32),
    /// It ran into the time limit and was killed.
    Overtime,
}

/// What a child did.
#[derive(Debug)]
pub struct Outcome {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub end: End,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
    /// From its start to the first byte on its standard output.
    pub first_byte: Option<Duration>,
}

impl Outcome {
    /// The lines of standard output, without the carriage returns of a serial line.
    pub fn lines(&self) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.stdout);
        text.lines().map(|line| line.trim_end_matches('\r').to_owned()).collect()
    }

    /// The guest's result lines, in order.
    pub fn result_lines(&self) -> Vec<String> {
        self.lines().into_iter().filter(|line| line.starts_with("pager:")).collect()
    }
}

/// Shows a run the way one wants it under a failed test: the command, its end, and most of what it said.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {}\n  ended with {:?} after {:.3?}", self.command, self.end, self.took)?;
        for (name, text) in [("out", &self.lines().join("\n")), ("err", &self.stderr)] {
            let lines: Vec<_> = text.lines().collect();
            let last = lines.len().saturating_sub(SHOWN_LAST).max(SHOWN_FIRST);
            for (number, line) in lines.iter().enumerate() {
                match number {
                    n if n < SHOWN_FIRST || n >= last => writeln!(f, "  {name}| {line}")?,
                    SHOWN_FIRST => writeln!(f, "  {name}| ... {} lines", last - SHOWN_FIRST)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// What a child has said on a pipe so far.
#[derive(Clone, Debug, Default)]
pub struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    /// All of it, as text.
    pub fn text(&self) -> String {
        self.with(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    fn with<R>(&self, call: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        call(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Runs `command` without standard input until it ends or `limit` is over.
pub fn run(command: &mut Command, limit: Duration) -> Result<Outcome, String> {
    run_heard(command, limit, &Said::default())
}

/// The same for whoever listens to its standard output meanwhile.
pub fn run_heard(command: &mut Command, limit: Duration, said: &Said) -> Result<Outcome, String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let shown = show(command);
    let begun = Instant::now();
    let mut child = command.spawn().map_err(|error| format!("cannot start {shown}: {error}"))?;
    let errors = Said::default();
    let stdout = drain(child.stdout.take(), begun, said.clone());
    let stderr = drain(child.stderr.take(), begun, errors.clone());
    let end = wait(&mut child, begun + limit).map_err(|error| format!("cannot await {shown}: {error}"))?;
    let took = begun.elapsed();
    let first_byte = stdout.join().expect("a reader of a pipe does not panic");
    stderr.join().expect("a reader of a pipe does not panic");
    let stdout = said.with(|bytes| bytes.clone());
    let stderr = errors.with(|bytes| String::from_utf8_lossy(bytes).into_owned());
    Ok(Outcome { command: shown, end, stdout, stderr, took, first_byte })
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Waits for the child, and kills it at `deadline`. It is reaped either way.
fn wait(child: &mut Child, deadline: Instant) -> std::io::Result<End> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(end_of(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(End::Overtime);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn end_of(status: ExitStatus) -> End {
    match (status.code(), status.signal()) {
        (Some(code), _) => End::Status(code),
        (None, signal) => End::Signal(signal.unwrap_or(0)),
    }
}

/// Reads a pipe to its end in a thread, and keeps what it says; gives when the first byte came.
fn drain<R: Read + Send + 'static>(
    pipe: Option<R>,
    begun: Instant,
    said: Said,
) -> JoinHandle<Option<Duration>> {
    thread::spawn(move || {
        let mut first = None;
        let mut pipe = pipe?;
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut chunk) {
            first.get_or_insert_with(|| begun.elapsed());
            said.with(|kept| {
                let room = KEPT_MAX - kept.len();
                kept.extend_from_slice(&chunk[..n.min(room)]);
            });
        }
        first
    })
}
