//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use umbra_mmu::{Rule, Rules, TlbKind};

use crate::board;
use crate::boot::notes::Notes;
use crate::import::ImportArgs;
use crate::measure::{ImporterArgs, MeasureArgs};
use crate::pressure::PressureArgs;
use crate::scenario::{PlayArgs, ScenarioCommand};
use crate::simulate::SimulateArgs;
use crate::swap::{Fault, parse_fault};
use crate::units::{parse_duration, parse_size};
use crate::virtio::disk::{DiskSpec, parse_disk};
use crate::vm::budget::{Schedule, parse_schedule};

/// Umbra: a KVM-based VMM whose MMU lives in userspace.
///
/// It boots a 32-bit Multiboot1 kernel and runs it on shadow page tables of its own. The guest's serial port is
/// standard output; Umbra's own words go to standard error.
#[derive(Debug, Parser)]
#[command(
    name = "umbra",
    version,
    after_help = "Exit status: 0 when the guest ended with 0 and every witness agrees, (v << 1) | 1 when it ended with v;\n\
                  2 usage, 4 input or host, 6 Umbra could not go on, 8 a witness contradicts the guest, 10 timeout,\n\
                  12 guest reset, 14 ended by an operator, 16 Umbra missed a TLB flush,\n\
                  18 the guest missed one (--check-guest-tlb), 20 Umbra's threads wait for each other (--deterministic).\n\
                  Of pressure: 10 not reached in time, 14 interrupted.\n\n\
                  Set UMBRA_LOG=debug for what Umbra does in detail."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest image and report its verdict.
    ///
    /// Without IMAGE the built-in guest runs. Examples:
    ///
    ///   umbra run
    ///   umbra run --append 'workload=kmap paging=legacy'
    ///   umbra run my-kernel.elf --mem 128M --timeout 30s --json summary.json
    ///   umbra run --mem 64M --frames 24M@0s,8M@2s --status --plot memory.svg
    ///   umbra run my-kernel.elf --disk root.img,ro --disk 64M,id=scratch
    #[command(verbatim_doc_comment)]
    Run(Box<RunArgs>),
    /// Look at this host: what its KVM can do, what it costs, what will be slow or missing.
    Doctor(DoctorArgs),
    /// Ask a running guest's MMU why an address is mapped as it is.
    ///
    /// The guest must have been started with --qmp SOCKET. Example:
    ///
    ///   umbra explain --qmp /tmp/umbra.sock 0xc0101000
    #[command(verbatim_doc_comment)]
    Explain(ExplainArgs),
    /// Put a running guest under memory pressure, and say what came of it.
    ///
    /// The guest must have been started with --qmp SOCKET, and for `frames` with --frames. Examples:
    ///
    ///   umbra pressure --qmp /tmp/umbra.sock frames 12M
    ///   umbra pressure --qmp /tmp/umbra.sock frames --ramp 24M..12M --over 5s --plot ramp.svg
    ///   umbra pressure --qmp /tmp/umbra.sock balloon --wave 32M..64M --period 2s --for 10s
    ///   umbra pressure --qmp /tmp/umbra.sock discard 0x1000000 1M --atomic --every 100ms --for 2s
    #[command(verbatim_doc_comment)]
    Pressure(PressureArgs),
    /// Have pages of a running guest's memory in this process, and give them up when the guest wants them back.
    ///
    /// The guest must have been started with --export SOCKET. Examples:
    ///
    ///   umbra import --export /tmp/umbra.export --make 16M..20M --verify
    ///   umbra import --export /tmp/umbra.export --segment 1 --hold 10s --ack-delay 1ms
    #[command(verbatim_doc_comment)]
    Import(ImportArgs),
    /// Measure how long it takes to take pages from a running guest, phase by phase.
    ///
    /// A guest runs here, and meanwhile its pages are taken, so often a second. Examples:
    ///
    ///   umbra measure
    ///   umbra measure --backend soft --vcpus 2 --causes discard,page-out --rate 2000/s --for 30s
    ///   umbra measure --pages 64 --json before.json
    ///   umbra measure --append 'workload=kmap scale=4000' --causes page-out,reclaim
    #[command(verbatim_doc_comment)]
    Measure(Box<MeasureArgs>),
    /// Run seeds of deterministic runs, until one does not pass.
    ///
    /// Each seed is a run of `umbra run --deterministic`, in a process of its own. The options of the runs come after `--`. Examples:
    ///
    ///   umbra simulate --seeds 0..200
    ///   umbra simulate --seeds 0..1000 --jobs 4 -- --vcpus 4 --check-guest-tlb --append 'workload=kmap'
    ///   umbra simulate --replay 17 | less -S
    #[command(verbatim_doc_comment)]
    Simulate(SimulateArgs),
    /// See a discussion of the field's history come alive: the rule that came of it in force, or with --bug left out and missed.
    ///
    /// Examples:
    ///
    ///   umbra scenario list
    ///   umbra scenario run xpmem-race
    ///   umbra scenario run xpmem-race --bug --explain
    ///   umbra scenario run kmap-series/order --bug --backend kvm
    #[command(verbatim_doc_comment, subcommand)]
    Scenario(ScenarioCommand),
    /// A run of a sweep or a scenario, which starts it and which it dies with.
    #[command(hide = true)]
    Play(Box<PlayArgs>),
    /// An importer of a measurement, which starts it.
    #[command(name = crate::measure::COMMAND, hide = true)]
    MeasuredImporter(ImporterArgs),
}

/// Which backend runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// The best that this host has.
    Auto,
    /// /dev/kvm.
    Kvm,
    /// The interpreter: needs no /dev/kvm.
    Soft,
    /// What surrounds KVM, with a model of its vCPUs and of its host in its place: for --deterministic.
    Model,
}

/// What runs the guest's kernel on the kvm backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Supervisor {
    /// As the image's ELF note says; the interpreter if it has none.
    Auto,
    /// KVM, at CPL 3: fast, and right for kernels that avoid what CPL 3 shows differently.
    Native,
    /// The interpreter: right for any kernel. User code runs natively.
    Interpret,
}

impl Supervisor {
    /// True where guest-kernel code of an image with `notes` is to be interpreted.
    pub fn interprets(self, notes: &Notes) -> bool {
        match self {
            Supervisor::Auto => !notes.kernel.is_some_and(|kernel| kernel.clean),
            Supervisor::Native => false,
            Supervisor::Interpret => true,
        }
    }
}

/// How the interpreter's TLB forgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tlb {
    /// As hardware does.
    Sized,
    /// Never, until it is told to, with paging-structure caches: finds missing flushes.
    Sticky,
    /// At random.
    Lossy,
}

impl From<Tlb> for TlbKind {
    fn from(tlb: Tlb) -> TlbKind {
        match tlb {
            Tlb::Sized => TlbKind::Sized,
            Tlb::Sticky => TlbKind::Sticky,
            Tlb::Lossy => TlbKind::Lossy(LOSSY_SEED),
        }
    }
}

/// How vCPUs are made to forget a page that is taken from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shootdown {
    /// As measured, where both are safe: the notifier for as many frames as it is faster for. Else kicks.
    Auto,
    /// They leave the guest and flush.
    Kick,
    /// The host takes its mapping of the frame away, where frames are few and a vCPU has no software TLB.
    Notifier,
}

/// What becomes of an importer that did not give pages up in time. They are gone from it in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportPolicy {
    /// It may go on.
    Keep,
    /// Its connection ends.
    Drop,
    /// It is killed.
    Kill,
}

/// What VMM code that touches guest memory has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Window {
    /// All of it, mapped once: a window counts, and keeps the frame in place.
    Pinned,
    /// What windows are open upon: a touch of anything else is a crash. Slow: for finding such touches.
    Mapped,
}

/// Whether ranges of guest memory are gathered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Huge {
    /// Every page stays in whatever frame it got.
    Off,
    /// Hot ranges of 2 MiB move to contiguous, aligned frames.
    On,
}

/// Which flushes that a guest misses end its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GuestCheck {
    /// Those that are certain; what is suspect is counted.
    Certain,
    /// Suspects too.
    Strict,
}

/// Locks and gates of the reverse map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Locks {
    /// One for sixteen pages; for each page, where the guest exports memory.
    Many,
    /// One for all: every fill and every invalidation waits for every other.
    One,
}

/// Where a lossy TLB's chance begins.
const LOSSY_SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// Options of `run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Guest image: a Multiboot1 kernel, ELF32 or with the address fields. The built-in guest if left out.
    pub image: Option<PathBuf>,
    /// What runs the guest.
    #[arg(long, value_enum, default_value = "auto")]
    pub backend: Backend,
    /// What runs the guest's kernel where the backend is kvm.
    #[arg(long, value_enum, default_value = "auto")]
    pub supervisor: Supervisor,
    /// How the TLB of interpreted code forgets.
    #[arg(long, value_enum, default_value = "sized")]
    pub tlb: Tlb,
    /// Find TLB flushes that the guest's kernel misses: before each access, ask a model of the guest's own TLBs whether it may still use
    /// a translation that the kernel has taken away. Needs the soft backend, and is several times as slow. A certain miss ends the
    /// run with status 18; suspects are counted, or with --check-guest-tlb=strict the first one does so too.
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "certain")]
    pub check_guest_tlb: Option<GuestCheck>,
    /// How vCPUs are made to forget pages that go to swap, where the backend is kvm.
    #[arg(long, value_enum, default_value = "auto")]
    pub shootdown: Shootdown,
    /// The guest's CPUs, 1 to 64, each on a thread of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=board::VCPUS_MAX as i64))]
    pub vcpus: u32,
    /// Guest memory, 2M to 16G, in whole pages.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size)]
    pub mem: u64,
    /// Machine memory for the guest and its shadow tables, over time: SIZE, or SIZE@TIME,SIZE@TIME,.. from 0s on. Enough for
    /// all of --mem if left out. With less, pages go to swap.
    #[arg(long, value_name = "SIZE[@TIME],..", value_parser = parse_schedule)]
    pub frames: Option<Schedule>,
    /// Guest memory that never goes to swap: the first SIZE of it. 8M, or a quarter of the smallest --frames.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub low: Option<u64>,
    /// Where pages go for which --frames has no room: SIZE of memory, or a new file, which is sparse and gone after the run.
    /// Memory, as much as --mem, if left out.
    #[arg(long, value_name = "FILE|SIZE", requires = "frames", value_parser = parse_swap)]
    pub swap: Option<Swap>,
    /// Have an operation of the swap device fail: read@N or write@N, the first being 1; may be given several times.
    #[arg(long, value_name = "OPERATION", requires = "frames", value_parser = parse_fault)]
    pub swap_fault: Vec<Fault>,
    /// A disk: FILE, a raw image or a block device, or SIZE of memory; with ,ro the guest may only read it, ,id=NAME is what
    /// it sees as the serial number, and with ,write-errors=N one write in N fails. May be given 8 times; the first is the
    /// first virtio slot's. The built-in guest has two in memory if left out, swap and file.
    #[arg(long, value_name = "FILE[,ro][,id=NAME][,write-errors=N]|SIZE[,id=NAME][,write-errors=N]", value_parser = parse_disk)]
    pub disk: Vec<DiskSpec>,
    /// How Umbra's own code touches guest memory.
    #[arg(long, value_enum, default_value = "pinned")]
    pub window: Window,
    /// Whether ranges of 2 MiB of guest memory that are hot and mostly resident are gathered into contiguous frames meanwhile.
    #[arg(long, value_enum, default_value = "off")]
    pub huge: Huge,
    /// Whether each few pages have a lock and a gate of their own, or all have one: to compare.
    #[arg(long, value_enum, default_value = "many")]
    pub locks: Locks,
    /// The guest's command line.
    #[arg(long, value_name = "CMDLINE", default_value = "")]
    pub append: String,
    /// A file to load as a Multiboot module; may be given several times.
    #[arg(long, value_name = "FILE")]
    pub module: Vec<PathBuf>,
    /// The most shadow pages at once; over it the least recently used go.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(64..=1 << 20))]
    pub shadow_pages: u32,
    /// End the run after this long, with status 10.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Write a summary of the run and a series of samples to FILE as JSON; "-" is standard error.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw memory and what became of it over time into FILE, an SVG image.
    #[arg(long, value_name = "FILE.svg", value_parser = parse_plot)]
    pub plot: Option<PathBuf>,
    /// Show what memory does while the guest runs: one line on standard error, or one a second where that is no terminal.
    #[arg(long)]
    pub status: bool,
    /// Listen on a Unix socket for QMP, QEMU's control protocol: stop, cont, quit, query-status, x-memory, x-frames and more;
    /// query-commands lists them, and the manual explains them.
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
    /// Listen on a Unix socket for importers: processes of this user that may have pages of the guest's memory in their own address
    /// space (umbra import is one; the manual has the protocol).
    #[arg(long, value_name = "SOCKET")]
    pub export: Option<PathBuf>,
    /// How long an importer may take to give pages up. They are taken from it then, whatever it does.
    #[arg(long, value_name = "DURATION", default_value = "100ms", requires = "export", value_parser = parse_deadline)]
    pub export_deadline: Duration,
    /// What becomes of an importer that took longer.
    #[arg(long, value_enum, default_value = "drop", requires = "export")]
    pub export_policy: ExportPolicy,
    /// Run everything in an order that --seed decides, in virtual time: the same seed, program and input give the same run. With
    /// the soft backend alone.
    #[arg(long, conflicts_with_all = ["qmp", "export", "status", "plot"])]
    pub deterministic: bool,
    /// What decides the order.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "deterministic")]
    pub seed: u64,
    /// Let the seed choose only so many times who runs next; from then on all take turns. `umbra simulate` finds how few are enough for a
    /// failure.
    #[arg(long, requires = "deterministic", value_name = "N")]
    pub choices: Option<u64>,
    /// Have pages and shadow pages taken away all the time, by somebody who may sleep and by somebody who may not, pages imported, and frames
    /// refused, as the seed says.
    #[arg(long, requires = "deterministic")]
    pub stress: bool,
    /// Write what happens to FILE, a line each, with its virtual time in nanoseconds and whose doing it was.
    #[arg(long, value_name = "FILE", requires = "deterministic")]
    pub event_log: Option<PathBuf>,
    /// Importers are told and awaited one after the other, to see what it would cost.
    #[arg(skip)]
    pub export_in_turn: bool,
    /// The guest's name, for those who ask by QMP.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Go without a rule of coherence (docs/RULES.md): in builds for tests alone.
    #[arg(long, hide = true, value_name = "RULE", value_parser = parse_omission)]
    pub omit: Option<Rules>,
}

fn parse_omission(name: &str) -> Result<Rules, String> {
    match umbra_mmu::rules::CAN_OMIT {
        true => parse_rule(name).map(Rules::all_but),
        false => {
            Err("outside of umbra scenario every rule is kept; only builds for tests can leave one out"
                .into())
        }
    }
}

/// A rule of coherence by its name.
pub(crate) fn parse_rule(name: &str) -> Result<Rule, String> {
    Rule::named(name).ok_or_else(|| "there is no such rule; docs/RULES.md has them".into())
}

/// Where swapped pages are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    /// In memory: at most so many bytes.
    Memory(u64),
    /// In a file of that name, which does not exist yet.
    File(PathBuf),
}

/// A size, or else a path.
fn parse_swap(text: &str) -> Result<Swap, String> {
    match parse_size(text) {
        Ok(bytes) => Ok(Swap::Memory(bytes)),
        Err(error) if text.starts_with(|first: char| first.is_ascii_digit()) => {
            Err(format!("{error}; a file whose name begins with a digit is written ./{text}"))
        }
        Err(_) if text.is_empty() => Err("name a file, or a size".into()),
        Err(_) => Ok(Swap::File(text.into())),
    }
}

/// At most a minute: whoever takes pages away waits so long.
fn parse_deadline(text: &str) -> Result<Duration, String> {
    const MOST: Duration = Duration::from_secs(60);
    match parse_duration(text).map_err(|error| error.to_string())? {
        Duration::ZERO => Err("give importers some time, such as 10ms".into()),
        deadline if deadline > MOST => Err("give importers a minute at most".into()),
        deadline => Ok(deadline),
    }
}

/// A file: standard error is for words, and standard output the guest's.
pub fn parse_plot(text: &str) -> Result<PathBuf, String> {
    match text {
        "" | "-" => {
            Err("a picture goes to a file; name one, such as memory.svg (one called - is ./-)".into())
        }
        path => Ok(path.into()),
    }
}

/// Options of `doctor`.
#[derive(Args, Clone, Debug)]
pub struct DoctorArgs {
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `explain`.
#[derive(Args, Clone, Debug)]
pub struct ExplainArgs {
    /// The socket of the running guest.
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
    /// The CPU whose address space is asked about.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub vcpu: u32,
    /// A guest linear address, decimal or 0x hexadecimal.
    #[arg(value_parser = parse_address)]
    pub gva: u32,
}

fn parse_address(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("'{text}' is no 32-bit address ({error}); write it like 0xc0101000"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn swap_is_a_size_or_a_path() {
        assert_eq!(parse_swap("64M"), Ok(Swap::Memory(64 << 20)));
        assert_eq!(parse_swap("/tmp/swap"), Ok(Swap::File("/tmp/swap".into())));
        assert_eq!(parse_swap("./64M"), Ok(Swap::File("./64M".into())));
        assert!(parse_swap("64MB").expect_err("decimal").contains("./64MB"));
        assert!(parse_swap("").is_err());
    }

    #[test]
    fn a_plot_goes_to_a_file() {
        assert_eq!(parse_plot("./-"), Ok("./-".into()));
        assert!(parse_plot("-").expect_err("no file").contains("./-"));
        assert!(parse_plot("").is_err());
    }

    #[test]
    fn addresses_are_decimal_or_hexadecimal_and_32_bits() {
        assert_eq!(parse_address("0xc0101000"), Ok(0xc010_1000));
        assert_eq!(parse_address("4096"), Ok(4096));
        assert!(parse_address("0x100000000").is_err());
        assert!(parse_address("").is_err());
    }
}
