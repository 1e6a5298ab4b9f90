//! How far it is: a bar on a terminal, elsewhere a line a second.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// From one line to the next, where there is no terminal.
const PLAIN: Duration = Duration::from_secs(1);
/// How often a bar is drawn in a second, at most.
const BAR_HZ: u8 = 10;
/// The length of the way, in steps of the bar.
const WAY: u64 = 1000;

/// What shows it.
pub struct Progress {
    bar: Option<ProgressBar>,
    /// When a line is due.
    due: Duration,
}

impl Progress {
    /// A bar if standard error is a terminal, or else lines.
    pub fn on_stderr() -> Progress {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(WAY), ProgressDrawTarget::stderr_with_hz(BAR_HZ));
            // Without a style it is drawn as the library likes.
            if let Ok(style) = ProgressStyle::with_template("[{bar:24}] {wide_msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Progress { bar, due: PLAIN }
    }

    /// Shows `words`, and how much of the way is done, from 0 to 1.
    pub fn show(&mut self, at: Duration, done: f64, words: impl FnOnce() -> String) {
        match &self.bar {
            Some(bar) => {
                bar.set_position((done.clamp(0.0, 1.0) * WAY as f64) as u64);
                bar.set_message(words());
            }
            None if at >= self.due => {
                self.due = at + PLAIN;
                // A reader that has gone is no reason to fail.
                let _ = writeln!(io::stderr(), "umbra: {:.1}s  {}", at.as_secs_f64(), words());
            }
            None => {}
        }
    }
}

/// The bar goes, whatever the end is.
impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
