//! The command line of `umbra pressure`, and what it asks for.
//!
//! Holds: an [`Order`] makes sense as far as can be told without the guest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use umbra_mmu::PAGE_SIZE;

use super::plan::{STEP, Shape, Span, SpanError, parse_pages, parse_span};
use crate::cli::parse_plot;
use crate::units::{format_duration, parse_duration, parse_size};

/// How long a guest has for what it is asked, beside the time that the asking takes.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Options of `pressure`.
#[derive(Args, Clone, Debug)]
pub struct PressureArgs {
    /// The socket of the running guest; must be given.
    #[arg(long, value_name = "SOCKET", global = true)]
    pub qmp: Option<PathBuf>,
    /// How long the guest may take until all of it is reached: 10s, and as long as a ramp, a wave or --for takes.
    #[arg(long, value_name = "DURATION", global = true, value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Draw host and guest over the time of the command into FILE, an SVG image.
    #[arg(long, value_name = "FILE.svg", global = true, value_parser = parse_plot)]
    pub plot: Option<PathBuf>,
    /// What is asked of the guest.
    #[command(subcommand)]
    pub what: Pressure,
}

/// What is asked of a guest.
#[derive(Clone, Debug, Subcommand)]
pub enum Pressure {
    /// Have the guest's balloon leave it SIZE of its memory.
    Balloon(LevelArgs),
    /// Give the guest and its tables SIZE of machine memory.
    Frames(LevelArgs),
    /// Discard guest pages: they read as zeros from then on, whatever the guest has there.
    Discard(PagesArgs),
    /// Have guest pages go to swap, those that can be had.
    PageOut(PagesArgs),
}

/// A size over time.
#[derive(Args, Clone, Debug)]
pub struct LevelArgs {
    /// The size, at once.
    #[arg(value_parser = parse_pages, required_unless_present_any = ["ramp", "wave"], conflicts_with_all = ["ramp", "wave"])]
    pub size: Option<u64>,
    /// Go from one size to another, in steps of 100 ms.
    #[arg(long, value_name = "FROM..TO", value_parser = parse_span, requires = "over", conflicts_with = "wave")]
    pub ramp: Option<Span>,
    /// How long the ramp takes.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "ramp")]
    pub over: Option<Duration>,
    /// Change between two sizes, and go back to what there was.
    #[arg(long, value_name = "LOW..HIGH", value_parser = parse_span, requires_all = ["period", "lasts"])]
    pub wave: Option<Span>,
    /// From one low to the next.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "wave")]
    pub period: Option<Duration>,
    /// How long the wave goes on.
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration, requires = "wave")]
    pub lasts: Option<Duration>,
}

/// Pages to take.
#[derive(Args, Clone, Debug)]
pub struct PagesArgs {
    /// Where they begin: a guest-physical address, a whole number of pages, decimal or 0x hexadecimal.
    #[arg(value_parser = parse_gpa)]
    pub gpa: u64,
    /// How many bytes: whole pages.
    #[arg(value_parser = parse_length)]
    pub bytes: u64,
    /// Do not sleep, nor write to swap: where it would have to, it says WouldBlock.
    #[arg(long)]
    pub atomic: bool,
    /// Do it again and again, once in this time.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "lasts")]
    pub every: Option<Duration>,
    /// For how long.
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration, requires = "every")]
    pub lasts: Option<Duration>,
}

fn parse_length(text: &str) -> Result<u64, String> {
    parse_pages(text).map_err(|error| match error {
        SpanError::Zero => format!("'{text}' is no page at all; write a size that is not 0"),
        other => other.to_string(),
    })
}

fn parse_gpa(text: &str) -> Result<u64, String> {
    let gpa = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).map_err(|error| {
            format!("'{text}' is no guest-physical address ({error}); write it like 0x1000000 or 16M")
        })?,
        None => parse_size(text).map_err(|error| error.to_string())?,
    };
    match gpa % PAGE_SIZE {
        0 => Ok(gpa),
        _ => Err(format!("'{text}' is not where a 4 KiB page begins")),
    }
}

/// Which of a guest's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What the balloon leaves it.
    Balloon,
    /// Machine memory.
    Frames,
}

impl Level {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Level::Balloon => "balloon",
            Level::Frames => "frames",
        }
    }
}

/// What becomes of pages that are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They read as zeros.
    Discard,
    /// They go to swap.
    PageOut,
}

impl Way {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Way::Discard => "discard",
            Way::PageOut => "page-out",
        }
    }

    /// As the control socket has it, and what its answer calls the pages that have been taken.
    pub fn command(self) -> (&'static str, &'static str) {
        match self {
            Way::Discard => ("x-discard", "/discarded"),
            Way::PageOut => ("x-page-out", "/freed"),
        }
    }
}

/// Pages to take, once or again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taking {
    /// What becomes of them.
    pub way: Way,
    /// Where they begin.
    pub gpa: u64,
    /// How many bytes.
    pub bytes: u64,
    /// Without sleep.
    pub atomic: bool,
    /// Once in this time, for so long.
    pub again: Option<(Duration, Duration)>,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A size over time.
    Level(Level, Shape),
    /// Pages are taken.
    Take(Taking),
}

/// All that the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order<'a> {
    /// Of whom.
    pub socket: &'a Path,
    /// What.
    pub task: Task,
    /// How long all of it may take.
    pub timeout: Duration,
}

impl PressureArgs {
    /// What they ask for.
    ///
    /// # Errors
    ///
    /// A sentence where that makes no sense.
    pub fn order(&self) -> Result<Order<'_>, String> {
        let socket = self.qmp.as_deref().ok_or("--qmp SOCKET is missing: whose memory is it about?")?;
        let task = match &self.what {
            Pressure::Balloon(level) => Task::Level(Level::Balloon, level.shape()?),
            Pressure::Frames(level) => Task::Level(Level::Frames, level.shape()?),
            Pressure::Discard(pages) => Task::Take(pages.taking(Way::Discard)?),
            Pressure::PageOut(pages) => Task::Take(pages.taking(Way::PageOut)?),
        };
        let length = task.length();
        let timeout = self.timeout.unwrap_or(length.saturating_add(TIMEOUT));
        if timeout.is_zero() || timeout < length {
            return Err(format!(
                "--timeout {} is over before all is asked for, which takes {}; give it longer",
                format_duration(timeout),
                format_duration(length)
            ));
        }
        Ok(Order { socket, task, timeout })
    }
}

impl Task {
    /// How long the asking takes.
    pub fn length(&self) -> Duration {
        match self {
            Task::Level(_, shape) => shape.length(),
            Task::Take(taking) => taking.again.map_or(Duration::ZERO, |(_, lasts)| lasts),
        }
    }
}

impl LevelArgs {
    fn shape(&self) -> Result<Shape, String> {
        match (self.size, self.ramp.zip(self.over), self.wave.zip(self.period).zip(self.lasts)) {
            (Some(size), None, None) => Ok(Shape::Step(size)),
            (None, Some((_, over)), None) if over < STEP => {
                Err(format!("--over {}: a ramp has a step each 100ms; give it more", format_duration(over)))
            }
            (None, Some((span, over)), None) => Ok(Shape::Ramp { span, over }),
            (None, None, Some(((span, period), lasts))) => wave(span, period, lasts),
            _ => Err("give one of SIZE, --ramp with --over, and --wave with --period and --for".into()),
        }
    }
}

fn wave(span: Span, period: Duration, lasts: Duration) -> Result<Shape, String> {
    if span.from > span.to {
        return Err("--wave: the lower size comes first".into());
    }
    if period < 2 * STEP {
        return Err(format!(
            "--period {}: the guest is looked at each 100ms; take 200ms or more",
            format_duration(period)
        ));
    }
    if lasts < period {
        return Err(format!(
            "--for {} ends before the first period of {}; give it longer",
            format_duration(lasts),
            format_duration(period)
        ));
    }
    Ok(Shape::Wave { span, period, lasts })
}

impl PagesArgs {
    fn taking(&self, way: Way) -> Result<Taking, String> {
        let again = self.every.zip(self.lasts);
        if let Some((every, lasts)) = again
            && (every.is_zero() || lasts < every)
        {
            return Err("--every is a time that --for has room for, and not 0".into());
        }
        if self.gpa.checked_add(self.bytes).is_none() {
            return Err("GPA and BYTES go beyond what an address can be".into());
        }
        Ok(Taking { way, gpa: self.gpa, bytes: self.bytes, atomic: self.atomic, again })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    const MIB: u64 = 1 << 20;

    fn parsed(line: &str) -> Result<PressureArgs, String> {
        let cli = Cli::try_parse_from(["umbra", "pressure"].into_iter().chain(line.split_whitespace()));
        match cli.map_err(|error| error.to_string())?.command {
            Command::Pressure(args) => Ok(args),
            _ => Err("another command".into()),
        }
    }

    fn task(line: &str) -> Task {
        let args = parsed(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        args.order().unwrap_or_else(|error| panic!("{line}: {error}")).task
    }

    #[test]
    fn each_way_to_write_it_is_what_it_says() {
        let seconds = Duration::from_secs;
        let span = Span { from: 12 * MIB, to: 24 * MIB };
        let ramp = Shape::Ramp { span: Span { from: 24 * MIB, to: 12 * MIB }, over: seconds(2) };
        let wave = Shape::Wave { span, period: seconds(1), lasts: seconds(4) };
        for (line, want) in [
            ("--qmp s frames 12M", Task::Level(Level::Frames, Shape::Step(12 * MIB))),
            ("balloon 12M --qmp s", Task::Level(Level::Balloon, Shape::Step(12 * MIB))),
            ("--qmp s frames --ramp 24M..12M --over 2s", Task::Level(Level::Frames, ramp)),
            ("--qmp s balloon --wave 12M..24M --period 1s --for 4s", Task::Level(Level::Balloon, wave)),
            (
                "discard 0x1000000 64K --atomic --every 100ms --for 1s --qmp s",
                Task::Take(Taking {
                    way: Way::Discard,
                    gpa: 16 * MIB,
                    bytes: 65536,
                    atomic: true,
                    again: Some((Duration::from_millis(100), seconds(1))),
                }),
            ),
            (
                "--qmp s discard 16M 4096",
                Task::Take(Taking {
                    way: Way::Discard,
                    gpa: 16 * MIB,
                    bytes: 4096,
                    atomic: false,
                    again: None,
                }),
            ),
            (
                "--qmp s page-out 16M 4096 --atomic",
                Task::Take(Taking {
                    way: Way::PageOut,
                    gpa: 16 * MIB,
                    bytes: 4096,
                    atomic: true,
                    again: None,
                }),
            ),
        ] {
            assert_eq!(task(line), want, "{line}");
        }
    }

    #[test]
    fn time_for_it_is_ten_seconds_and_as_long_as_the_asking_takes() {
        let timeout = |line: &str| parsed(line).expect(line).order().expect(line).timeout.as_secs();
        assert_eq!(timeout("--qmp s frames 12M"), 10);
        assert_eq!(timeout("--qmp s frames --ramp 24M..12M --over 2s"), 12);
        assert_eq!(timeout("--qmp s discard 0 4K --every 1s --for 7s"), 17);
        assert_eq!(timeout("--qmp s frames 12M --timeout 3s"), 3);
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_a_sentence() {
        for (line, words) in [
            ("frames 12M", "--qmp"),
            ("--qmp s frames", "required"),
            ("--qmp s", "subcommand"),
            ("--qmp s frames 12MB", "decimal"),
            ("--qmp s frames 5000", "whole number"),
            ("--qmp s balloon 0", "not 0"),
            ("--qmp s frames 12M --ramp 1M..2M --over 1s", "cannot be used with"),
            ("--qmp s frames --ramp 1M..2M", "--over"),
            ("--qmp s frames --ramp 1M..2M --over 10ms", "100ms"),
            ("--qmp s frames --ramp 1M --over 1s", "one size"),
            ("--qmp s frames --over 1s", "--ramp"),
            ("--qmp s frames --wave 1M..2M --period 1s", "--for"),
            ("--qmp s frames --wave 2M..1M --period 1s --for 2s", "lower size comes first"),
            ("--qmp s frames --wave 1M..2M --period 100ms --for 2s", "200ms"),
            ("--qmp s frames --wave 1M..2M --period 3s --for 2s", "first period"),
            (
                "--qmp s frames --wave 1M..2M --period 1s --for 2s --ramp 1M..2M --over 1s",
                "cannot be used with",
            ),
            ("--qmp s frames --wave 1M..2M --period 1s --for 9s --timeout 2s", "give it longer"),
            ("--qmp s frames 12M --timeout 0s", "give it longer"),
            ("--qmp s frames 12M --plot -", "a picture goes to a file"),
            ("--qmp s discard 0x10 4K", "4 KiB page begins"),
            ("--qmp s discard 0xfg000 4K", "guest-physical"),
            ("--qmp s discard 0", "<BYTES>"),
            ("--qmp s discard 16M 0", "'0' is no page at all"),
            ("--qmp s page-out 0x10 4K", "4 KiB page begins"),
            ("--qmp s discard 0 4K --every 1s", "--for"),
            ("--qmp s discard 0 4K --every 2s --for 1s", "has room for"),
            ("--qmp s discard 0xfffffffffffff000 4K", "beyond"),
        ] {
            let refused = parsed(line).and_then(|args| args.order().map(|order| format!("{order:?}")));
            assert!(refused.as_ref().is_err_and(|error| error.contains(words)), "{line}: {refused:?}");
        }
    }
}
