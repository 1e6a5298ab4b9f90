//! The command line of `umbra measure`, and what it asks for.
//!
//! Holds: an [`Order`] makes sense as far as can be told without the guest.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use umbra_mmu::PAGE_SIZE;
use umbra_mmu::invalidation::BATCH_MAX;

use super::causes::{Asked, Targets};
use super::guest;
use super::importers::IMPORTERS_MAX;
use crate::cli::{ExportPolicy, RunArgs};
use crate::units::{format_duration, format_size, parse_duration};
use crate::vm::BuiltIn;
use crate::vm::budget::parse_schedule;

/// The most starts a second.
pub const RATE_MAX: u32 = 100_000;
/// The shortest and the longest measurement.
pub const LASTS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(24 * 3600));
/// The longest warm-up.
pub const WARM_UP_MAX: Duration = Duration::from_secs(3600);
/// Pages that the built-in guest of a measurement touches, if it has them.
const TOUCHED: u64 = 2048;
/// Those of them that importers have, where there are importers.
const IMPORTED: u64 = 512;
/// Its low memory, unless the command line says otherwise: little, so that the budget can be cut.
const LOW: u64 = 1 << 20;
/// All of its memory must have an address of 32 bits.
const TOP: u64 = 3 << 30;

/// Options of `measure`.
#[derive(Args, Clone, Debug)]
#[command(mut_arg("json", |json| json.help("Write what was measured to FILE as JSON; \"-\" is standard error")))]
#[command(mut_arg("image", |image| image.help("Guest image: a Multiboot1 kernel. If left out, and --append as well, a guest whose CPUs touch \
    2048 pages in turn, for ever, and do not mind what is in them")))]
pub struct MeasureArgs {
    /// How pages are taken from the guest, in turn.
    #[arg(long, value_name = "CAUSE,..", value_enum, value_delimiter = ',', help_heading = "Measurement")]
    pub causes: Vec<Asked>,
    /// How often a second that is begun, 1 to 100000, all causes together.
    #[arg(long, value_name = "N/s", default_value = "1000/s", value_parser = parse_rate, help_heading = "Measurement")]
    pub rate: u32,
    /// How many pages are taken at once, 1 to 512.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=BATCH_MAX as i64), help_heading = "Measurement")]
    pub pages: u32,
    /// How long is measured, 200ms to 24h.
    #[arg(long = "for", value_name = "DURATION", default_value = "10s", value_parser = parse_duration, help_heading = "Measurement")]
    pub lasts: Duration,
    /// How long the same is done before, and not counted.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration, help_heading = "Measurement")]
    pub warm_up: Duration,
    /// How many other processes have the pages before they are taken, up to 16; several numbers, such as 0,1,2,4,8, take turns.
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(0..=IMPORTERS_MAX as i64), help_heading = "Measurement")]
    pub importers: Vec<u32>,
    /// How long they take to answer when they are told to give pages up, 10s at most.
    #[arg(long, value_name = "DURATION", requires = "importers", value_parser = parse_duration, help_heading = "Measurement")]
    pub ack_delay: Option<Duration>,
    /// Each importer is awaited before the next one is told, to compare.
    #[arg(long, requires = "importers", help_heading = "Measurement")]
    pub in_turn: bool,
    /// Importers are stopped once they have the pages: they never answer, and their time is --export-deadline.
    #[arg(long, requires = "importers", conflicts_with_all = ["ack_delay", "in_turn"], help_heading = "Measurement")]
    pub stop_importers: bool,
    /// The pages are some that importers have and no vCPU touches.
    #[arg(long, requires = "importers", help_heading = "Measurement")]
    pub untouched: bool,
    /// The guest's CPUs halt, so that whoever takes pages has the host's for himself.
    #[arg(long, requires = "untouched", help_heading = "Measurement")]
    pub halted: bool,
    /// Write the distribution of each measure to a file of its own in the folder DIR, and all of them by interval to intervals.hlog
    /// there, as HdrHistogram's tools read them.
    #[arg(long, value_name = "DIR", help_heading = "Measurement")]
    pub hgrm: Option<PathBuf>,
    /// Write what was measured to FILE as a page with plots.
    #[arg(long, value_name = "FILE", help_heading = "Measurement")]
    pub html: Option<PathBuf>,
    /// Measure nothing: compare what two runs have left by --json.
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"], exclusive = true, help_heading = "Measurement")]
    pub compare: Option<Vec<PathBuf>>,
    /// The guest, and how it runs.
    #[command(flatten)]
    pub run: RunArgs,
}

/// `1000/s`, or `1000`.
fn parse_rate(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix("/s").unwrap_or(text);
    match number.parse::<u32>() {
        Ok(rate) if (1..=RATE_MAX).contains(&rate) => Ok(rate),
        Ok(_) => Err(format!("'{text}' is not between 1/s and {RATE_MAX}/s")),
        Err(error) => {
            Err(format!("'{text}' is no rate ({error}); write a whole number a second, such as 1000/s"))
        }
    }
}

/// All that the command line asks for.
#[derive(Clone, Debug)]
pub struct Order {
    /// How the guest runs.
    pub run: RunArgs,
    /// The guest, where no other is named.
    pub guest: Option<BuiltIn>,
    /// Which pages are taken.
    pub targets: Targets,
    /// Which pages the guest is to have before it begins.
    pub settled: Targets,
    /// How many importers have the pages, in turn; empty where there are none.
    pub importers: Vec<u32>,
    /// How long they take to answer.
    pub ack_delay: Duration,
    /// Each is awaited before the next is told.
    pub in_turn: bool,
    /// They are stopped, and do not answer.
    pub stop_importers: bool,
    /// How, in turn.
    pub causes: Vec<Asked>,
    /// How often a second.
    pub rate: u32,
    /// How many at once.
    pub pages: u32,
    /// How long is measured.
    pub lasts: Duration,
    /// How long not yet.
    pub warm_up: Duration,
    /// Where JSON goes.
    pub json: Option<PathBuf>,
    /// Where distributions go.
    pub hgrm: Option<PathBuf>,
    /// Where the page goes.
    pub html: Option<PathBuf>,
}

impl MeasureArgs {
    /// What they ask for.
    ///
    /// # Errors
    ///
    /// A sentence where that makes no sense.
    pub fn order(&self) -> Result<Order, String> {
        self.check_times()?;
        if self.run.deterministic {
            return Err("--deterministic: what is measured takes the host's time; leave it out".into());
        }
        let (mut run, json) = (self.run.clone(), self.run.json.clone());
        run.json = None;
        let own = run.image.is_none() && run.append.is_empty();
        self.check_importers(own)?;
        let causes = self.causes(own)?;
        run.export_in_turn = self.in_turn;
        if self.stop_importers {
            run.export_policy = ExportPolicy::Keep;
        }
        if run.frames.is_none() {
            // There is room for all: it is for the swap that comes with it.
            let all = parse_schedule(&(run.mem / PAGE_SIZE * PAGE_SIZE).to_string());
            run.frames = Some(all.map_err(|error| format!("--mem: {error}"))?);
        }
        let (guest, settled, targets) = match own {
            true => self.built_in(&mut run)?,
            false => (None, Targets::resident(), Targets::resident()),
        };
        Ok(Order {
            run,
            guest,
            targets,
            settled,
            importers: self.importers.clone(),
            ack_delay: self.ack_delay.unwrap_or_default(),
            in_turn: self.in_turn,
            stop_importers: self.stop_importers,
            causes,
            rate: self.rate,
            pages: self.pages,
            lasts: self.lasts,
            warm_up: self.warm_up,
            json,
            hgrm: self.hgrm.clone(),
            html: self.html.clone(),
        })
    }

    fn check_importers(&self, own: bool) -> Result<(), String> {
        /// The longest that one takes to answer.
        const DELAY_MAX: Duration = Duration::from_secs(10);
        if self.importers.iter().enumerate().any(|(at, count)| self.importers[..at].contains(count)) {
            return Err("--importers: a number is there twice".into());
        }
        if !self.importers.is_empty() && !own {
            return Err(
                "--importers: they have pages of the guest that does not mind; leave out IMAGE and --append, or import from that \
                 guest by umbra import"
                    .into(),
            );
        }
        match self.ack_delay {
            Some(delay) if delay > DELAY_MAX => Err(format!(
                "--ack-delay {} is more than {}",
                format_duration(delay),
                format_duration(DELAY_MAX)
            )),
            _ => Ok(()),
        }
    }

    fn check_times(&self) -> Result<(), String> {
        if !(LASTS.0..=LASTS.1).contains(&self.lasts) {
            return Err(format!(
                "--for {} is not between {} and {}",
                format_duration(self.lasts),
                format_duration(LASTS.0),
                format_duration(LASTS.1)
            ));
        }
        if self.warm_up > WARM_UP_MAX {
            return Err(format!(
                "--warm-up {} is more than {}",
                format_duration(self.warm_up),
                format_duration(WARM_UP_MAX)
            ));
        }
        Ok(())
    }

    /// The causes, each once. Contents are taken away only from a guest that does not mind.
    fn causes(&self, own: bool) -> Result<Vec<Asked>, String> {
        let mut causes: Vec<Asked> = Vec::new();
        for cause in &self.causes {
            if causes.contains(cause) {
                return Err(format!("--causes: {} is there twice", cause.name()));
            }
            causes.push(*cause);
        }
        if let Some(cause) = causes.iter().find(|cause| !own && cause.takes_contents()) {
            return Err(format!(
                "--causes {}: that takes contents away, and this guest may want them; leave out IMAGE and --append for the guest \
                 that does not mind, or take page-out, budget or reclaim",
                cause.name()
            ));
        }
        if causes.contains(&Asked::Revoke) && self.importers.is_empty() {
            return Err("--causes revoke: there is nobody to take pages from; give --importers N too".into());
        }
        if causes.is_empty() {
            causes = match own {
                true if !self.importers.is_empty() => vec![Asked::Revoke, Asked::Discard, Asked::PageOut],
                true => vec![Asked::Discard, Asked::PageOut],
                false => vec![Asked::PageOut],
            };
        }
        Ok(causes)
    }

    /// The guest that comes with the command, in what memory there is; the pages that it touches, and those that are taken.
    fn built_in(&self, run: &mut RunArgs) -> Result<(Option<BuiltIn>, Targets, Targets), String> {
        let low = *run.low.get_or_insert(LOW);
        let base = low.max(guest::BASE_MIN).next_multiple_of(PAGE_SIZE);
        let room = run.mem.min(TOP).saturating_sub(base) / PAGE_SIZE;
        let beyond = if self.untouched { IMPORTED } else { 0 };
        let pages = room.saturating_sub(beyond).min(TOUCHED);
        if pages < u64::from(self.pages).max(u64::from(BATCH_MAX as u32)) {
            return Err(format!(
                "--mem {}: the guest of a measurement needs {} or more above its low memory; give it that, or less --low",
                format_size(run.mem),
                format_size(base + (BATCH_MAX as u64 + beyond) * PAGE_SIZE)
            ));
        }
        let first = (base / PAGE_SIZE) as u32;
        let image = guest::image(base as u32, pages as u32, self.halted);
        let settled = Targets::range(first, pages as u32);
        let targets = match (self.untouched, self.importers.is_empty()) {
            (true, _) => Targets::range(first + pages as u32, IMPORTED as u32),
            (false, false) => Targets::range(first, pages.min(IMPORTED) as u32),
            (false, true) => settled.clone(),
        };
        Ok((Some(image), settled, targets))
    }
}
