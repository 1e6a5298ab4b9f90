//! The line of `--status`: what a running guest's memory does, on standard error.
//!
//! Story: on a terminal the line is written over itself a few times a second, and gone before the verdict. Elsewhere a line
//! comes each second. Where the guest writes to the same terminal, its output goes through a [`Guarded`] writer, which
//! takes the line away first; log lines go through [`LogLines`], which puts it back after, too.
//!
//! Holds: nobody waits here. A line for which standard error has no room is left out.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use terminal_size::terminal_size_of;
use umbra_mmu::PAGE_SIZE;

use super::series::{Rates, Sample, next_multiple};

/// From one line to the next, on a terminal.
const ON_TERMINAL: Duration = Duration::from_millis(250);
/// And elsewhere.
const PLAIN: Duration = Duration::from_secs(1);
/// What rates are of: the time before the line.
const RATED: Duration = Duration::from_secs(1);
/// Columns of a terminal that does not say.
const COLUMNS: usize = 80;

/// The line about `after`, with the rates since `before`.
fn line(before: &Sample, after: &Sample) -> String {
    let size = |pages: u32| format!("{:.1}M", (u64::from(pages) * PAGE_SIZE) as f64 / f64::from(1 << 20));
    let rates = Rates::between(before, after).unwrap_or_default();
    format!(
        "umbra: {:.1}s  resident {}  swapped {}  free {} of {}  refaults {:.0}/s  invalidations {:.0}/s",
        after.at.as_secs_f64(),
        size(after.resident),
        size(after.swapped),
        size(after.frames_free),
        size(after.budget),
        rates.refaults,
        rates.invalidations,
    )
}

/// What is on the terminal.
#[derive(Debug, Default)]
struct Shown {
    /// The line that is there now.
    line: String,
    /// What others have written has not come to the end of a line.
    mid_line: bool,
}

impl Shown {
    /// What takes the line away.
    fn erase(&mut self) -> String {
        match std::mem::take(&mut self.line).chars().count() {
            0 => String::new(),
            columns => format!("\r{:columns$}\r", ""),
        }
    }

    /// What puts `text` in the place of the line, as much as `columns` have room for; nothing where that would write over
    /// the words of others.
    fn replace(&mut self, text: &str, columns: usize) -> String {
        if self.mid_line {
            return String::new();
        }
        // In the last column the cursor could wrap.
        let text: String = text.chars().take(columns.saturating_sub(1)).collect();
        let before = std::mem::replace(&mut self.line, text).chars().count();
        format!("\r{:before$}", self.line)
    }

    /// Others have written `bytes`, the line being gone.
    fn written(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last() {
            self.mid_line = *last != b'\n';
        }
    }

    /// `bytes` with what takes the line away before them, and what puts it back after.
    fn around(&mut self, bytes: &[u8]) -> Vec<u8> {
        let line = self.line.clone();
        let mut all = self.erase().into_bytes();
        all.extend_from_slice(bytes);
        self.written(bytes);
        if !line.is_empty() {
            all.extend_from_slice(self.replace(&line, usize::MAX).as_bytes());
        }
        all
    }
}

/// A terminal that the line and the guest's output may share.
#[derive(Clone, Debug, Default)]
pub struct Screen(Arc<Mutex<Shown>>);

impl Screen {
    /// Has what goes to `out` take the line away first.
    pub fn guard<W: Write>(&self, out: W) -> Guarded<W> {
        Guarded { out, screen: self.clone() }
    }

    /// A writer of log lines to standard error.
    pub fn log_lines(&self) -> LogLines<io::Stderr> {
        LogLines { out: io::stderr(), screen: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A writer to a terminal that may have the line on it.
#[derive(Debug)]
pub struct Guarded<W> {
    out: W,
    screen: Screen,
}

impl<W: Write> Write for Guarded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut shown = self.screen.lock();
        say(&shown.erase());
        let written = self.out.write(bytes)?;
        self.out.flush()?;
        shown.written(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A writer to the terminal that has the line on it: the line makes room, and is there again after.
#[derive(Debug)]
pub struct LogLines<W> {
    out: W,
    screen: Screen,
}

impl<W: Write> Write for LogLines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut shown = self.screen.lock();
        self.out.write_all(&shown.around(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The line, and when it is due.
#[derive(Debug)]
pub struct LiveLine {
    /// Where standard error is one.
    screen: Option<Screen>,
    /// The samples of the last [`RATED`], and one from before.
    recent: VecDeque<Sample>,
    due: Duration,
}

impl LiveLine {
    /// A line on `screen` if standard error is a terminal, or else lines.
    pub fn new(screen: &Screen) -> LiveLine {
        let screen = io::stderr().is_terminal().then(|| screen.clone());
        let mut line = LiveLine { screen, recent: VecDeque::new(), due: Duration::ZERO };
        line.due = line.period();
        line
    }

    /// From one line to the next.
    pub fn period(&self) -> Duration {
        if self.screen.is_some() { ON_TERMINAL } else { PLAIN }
    }

    /// Shows `sample` if a line is due.
    pub fn show(&mut self, sample: &Sample) {
        let before = self.remember(sample);
        if sample.at < self.due {
            return;
        }
        let text = line(&before, sample);
        self.due = next_multiple(sample.at, self.period());
        if !has_room() {
            return;
        }
        match &self.screen {
            None => say(&format!("{text}\n")),
            Some(screen) => {
                // Held by a guest's output that stands still, there is nothing to be shown.
                let Ok(mut shown) = screen.0.try_lock() else { return };
                say(&shown.replace(&text, columns()));
            }
        }
    }

    /// Keeps a sample, and gives the one that its rates are since: the last that is [`RATED`] old, or the first of all.
    fn remember(&mut self, sample: &Sample) -> Sample {
        let is_old = |other: &Sample| sample.at.saturating_sub(other.at) >= RATED;
        while self.recent.get(1).is_some_and(is_old) {
            self.recent.pop_front();
        }
        self.recent.push_back(*sample);
        self.recent[0]
    }

    /// Takes the line away.
    pub fn erase(&mut self) {
        if let Some(Ok(mut shown)) = self.screen.as_ref().map(|screen| screen.0.try_lock()) {
            say(&shown.erase());
        }
    }
}

fn columns() -> usize {
    terminal_size_of(io::stderr()).map_or(COLUMNS, |(width, _)| width.0.into())
}

/// True where standard error takes a line at once: the event loop must not wait for its reader.
fn has_room() -> bool {
    let mut fd = libc::pollfd { fd: io::stderr().as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd, which lives for the call.
    let ready = unsafe { libc::poll(&mut fd, 1, 0) };
    ready == 1 && fd.revents & libc::POLLOUT != 0
}

/// A reader that has gone is no reason to fail.
fn say(text: &str) {
    if !text.is_empty() {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_sizes_and_rates() {
        let before = Sample { at: Duration::from_millis(2200), refaults: 100, ..Sample::default() };
        let after = Sample {
            at: Duration::from_millis(3200),
            budget: 2048,
            frames_free: 102,
            resident: 1306,
            swapped: 3072,
            refaults: 1334,
            invalidations: 410,
            ..before
        };
        assert_eq!(
            line(&before, &after),
            "umbra: 3.2s  resident 5.1M  swapped 12.0M  free 0.4M of 8.0M  refaults 1234/s  invalidations 410/s"
        );
    }

    #[test]
    fn rates_are_of_the_last_second_however_often_a_line_is_shown() {
        let mut live = LiveLine { screen: None, recent: VecDeque::new(), due: Duration::MAX };
        // 100 refaults in each 50 ms of the first second, then none.
        let sample = |n: u64| Sample {
            at: Duration::from_millis(50 * n),
            refaults: 100 * n.min(20),
            ..Sample::default()
        };
        let mut rate = |n| {
            let rates = Rates::between(&live.remember(&sample(n)), &sample(n));
            rates.map(|rates| rates.refaults)
        };
        let rates: Vec<_> = (0..=60).map(&mut rate).collect();
        assert_eq!(rates[0], None);
        assert_eq!((rates[5], rates[20], rates[30]), (Some(2000.0), Some(2000.0), Some(1000.0)));
        assert_eq!((rates[39], rates[40], rates[60]), (Some(100.0), Some(0.0), Some(0.0)));
        assert!(live.recent.len() <= 22, "{} samples are kept", live.recent.len());
    }

    #[test]
    fn a_log_line_has_a_row_of_its_own_and_the_line_is_there_again() {
        let screen = Screen::default();
        let mut log = LogLines { out: Vec::new(), screen: screen.clone() };
        log.write_all(b"early\n").expect("memory");
        screen.lock().replace("status", 80);
        log.write_all(b"[WARN] look\n").expect("memory");
        assert_eq!(screen.lock().line, "status");
        // The guest has begun a line of its own.
        let mut guest = screen.guard(Vec::new());
        guest.write_all(b"half").expect("memory");
        log.write_all(b" a line\n").expect("memory");
        assert_eq!(log.out, b"early\n\r      \r[WARN] look\n\rstatus a line\n");
        assert_eq!(screen.lock().line, "");
    }

    #[test]
    fn a_line_of_huge_values_or_no_time_is_a_line() {
        let huge = Sample {
            at: Duration::MAX,
            budget: u32::MAX,
            resident: u32::MAX,
            refaults: u64::MAX,
            ..Sample::default()
        };
        for (before, after) in [(Sample::default(), huge), (huge, huge), (huge, Sample::default())] {
            let line = line(&before, &after);
            assert!(line.starts_with("umbra: ") && !line.contains("NaN") && !line.contains("inf"), "{line}");
        }
    }

    #[test]
    fn a_line_covers_the_one_before_and_stays_in_its_row() {
        let mut shown = Shown::default();
        assert_eq!(shown.erase(), "");
        assert_eq!(shown.replace("abcdef", 80), "\rabcdef");
        assert_eq!(shown.replace("abc", 80), "\rabc   ");
        assert_eq!(shown.replace("abcdef", 4), "\rabc");
        assert_eq!(shown.erase(), "\r   \r");
        assert_eq!(shown.erase(), "");
        assert_eq!(shown.replace("abc", 0), "\r");
    }

    #[test]
    fn a_guest_in_the_middle_of_a_line_is_not_written_over() {
        let screen = Screen::default();
        let mut out = screen.guard(Vec::new());
        out.write_all(b"so far").expect("memory");
        assert_eq!(screen.lock().replace("line", 80), "");
        out.write_all(b", so good\n").expect("memory");
        assert_eq!(screen.lock().replace("line", 80), "\rline");
        assert_eq!(out.out, b"so far, so good\n");
    }
}
