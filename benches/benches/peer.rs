//! The built-in guest's timed workloads on Umbra's backends and on QEMU's TCG, side by side in one run.
//!
//! Story: every contestant runs the same image with the same command line, in turn, round after round, so that the
//! machine's drift hits all alike. The scale of a workload is what keeps QEMU busy for a second; a contestant for which that
//! would take too long gets a smaller one, and the figure says so. A figure is the median of the rounds' rates; a ratio is
//! the median of the rounds' ratios, each within one round.
//!
//! ```text
//! cargo build --release && cargo bench --bench peer -- [--backends soft,kvm] [--workloads spin,sweep] [--rounds 5] [--scale 100]
//!     [--append 'pace=fast nmi=0']
//! ```
//!
//! All have the two disks that the workloads `reclaim` and `disk` want, in memory. `--scale` holds for all contestants, and so do the
//! words of `--append`. A backend that this build or this machine does not have is skipped, with the reason.
//! `UMBRA_BIN` names another `umbra` than the one beside this program. Status 1: a contestant did not pass.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use tempfile::NamedTempFile;
use umbra_benches::peer::{self, Phase, quantile};

const PEER: &str = "tcg";
const BACKENDS: &str = "soft,kvm";
const WORKLOADS: &str = "spin,sweep,storm,mix";
/// The guest's disks: serial number, and bytes.
const DISKS: [(&str, u64); 2] = [("swap", 256 << 20), ("file", 16 << 20)];
/// Where a file is memory.
const MEMORY: &str = "/dev/shm";
const SCALE_MAX: u64 = 1000;
/// What a run of the first contestant should take, and what one of any other may.
const TARGET: Duration = Duration::from_secs(1);
const TARGET_MAX: Duration = Duration::from_secs(10);
/// No run is waited for longer.
const LIMIT: Duration = Duration::from_secs(120);

/// The command line and the environment.
struct Options {
    backends: Vec<String>,
    workloads: Vec<String>,
    rounds: usize,
    scale: Option<u64>,
    /// Further words for the guest.
    append: String,
    smoke: bool,
}

/// Something that runs the guest.
struct Contestant {
    name: String,
    command: Box<dyn Fn(&str) -> Command>,
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("bench peer: {why}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<(), String> {
    let options = Options::from_args()?;
    let image = tempfile::NamedTempFile::new().map_err(|error| format!("no temporary file: {error}"))?;
    std::fs::write(image.path(), umbra_guest::PAGER)
        .map_err(|error| format!("cannot write the image: {error}"))?;
    let disks = DISKS.iter().map(|disk| make_disk(disk.1)).collect::<Result<Vec<_>, _>>()?;
    let contestants = contestants(&options, image.path(), &disks)?;
    options.workloads.iter().try_for_each(|workload| compare(&options, &contestants, workload))
}

impl Options {
    fn from_args() -> Result<Options, String> {
        let list = |text: Option<String>, default: &str| -> Vec<String> {
            text.as_deref().unwrap_or(default).split(',').map(str::to_owned).collect()
        };
        let smoke =
            std::env::args().any(|word| word == "--smoke") || std::env::var_os("UMBRA_BENCH_SMOKE").is_some();
        Ok(Options {
            backends: list(option("--backends"), BACKENDS),
            workloads: list(option("--workloads"), WORKLOADS),
            rounds: number("--rounds")?.unwrap_or(if smoke { 1 } else { 5 }) as usize,
            scale: number("--scale")?,
            append: option("--append").unwrap_or_default(),
            smoke,
        })
    }
}

/// What follows `name` on the command line.
fn option(name: &str) -> Option<String> {
    std::env::args().skip_while(|word| word != name).nth(1)
}

fn number(name: &str) -> Result<Option<u64>, String> {
    let parse = |text: String| text.parse().map_err(|_| format!("{name} takes a number, not {text:?}"));
    option(name).map(parse).transpose()
}

fn make_disk(bytes: u64) -> Result<NamedTempFile, String> {
    let file = NamedTempFile::new_in(MEMORY).and_then(|file| file.as_file().set_len(bytes).map(|()| file));
    file.map_err(|error| format!("no disk of {bytes} bytes in {MEMORY}: {error}"))
}

/// The peer first, then the backends that are there.
fn contestants(options: &Options, image: &Path, disks: &[NamedTempFile]) -> Result<Vec<Contestant>, String> {
    let umbra = umbra()?;
    let mut all = vec![qemu(image, disks)];
    all.extend(options.backends.iter().map(|backend| on_umbra(&umbra, backend, image)));
    all.retain(|contestant| match present(contestant) {
        Ok(()) => true,
        Err(why) => {
            println!("bench peer {} skipped: {why}", contestant.name);
            false
        }
    });
    Ok(all)
}

/// Whether it can run the smallest of the timed workloads.
fn present(contestant: &Contestant) -> Result<(), String> {
    peer::run(&mut (contestant.command)("workload=spin scale=1"), LIMIT).map(drop)
}

fn qemu(image: &Path, disks: &[NamedTempFile]) -> Contestant {
    let image = image.to_owned();
    let drive = |(file, (name, _)): (&NamedTempFile, &(&str, u64))| {
        let drive = format!("if=none,id={name},format=raw,file={}", file.path().display());
        ["-drive".into(), drive, "-device".into(), format!("virtio-blk-device,drive={name},serial={name}")]
    };
    let drives: Vec<String> = disks.iter().zip(&DISKS).flat_map(drive).collect();
    let command = move |words: &str| {
        let mut command = Command::new("qemu-system-i386");
        command.args([
            "-M",
            "microvm",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "64M",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
        command.args(["-display", "none", "-monitor", "none", "-nic", "none"]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
        command.args(["-global", "virtio-mmio.force-legacy=false"]).args(&drives);
        command.args(["-device", "virtio-balloon-device,deflate-on-oom=on,free-page-reporting=on"]);
        command.arg("-kernel").arg(&image).args(["-append", words]);
        command
    };
    Contestant { name: PEER.to_owned(), command: Box::new(command) }
}

fn on_umbra(umbra: &Path, backend: &str, image: &Path) -> Contestant {
    let (umbra, backend, image) = (umbra.to_owned(), backend.to_owned(), image.to_owned());
    let name = backend.clone();
    let command = move |words: &str| {
        let mut command = Command::new(&umbra);
        command.arg("run").arg(&image).args(["--backend", &backend, "--append", words]);
        for (name, bytes) in DISKS {
            command.args(["--disk", &format!("{bytes},id={name}")]);
        }
        command
    };
    Contestant { name, command: Box::new(command) }
}

/// `UMBRA_BIN`, or what cargo built beside this program's folder.
fn umbra() -> Result<PathBuf, String> {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.parent()?.join("umbra"));
    let path = std::env::var_os("UMBRA_BIN").map(PathBuf::from).or_else(beside).unwrap_or_default();
    match path.is_file() {
        true => Ok(path),
        false => Err(format!("{} is not there: cargo build --release, or set UMBRA_BIN", path.display())),
    }
}

/// All rounds of one workload, and its figures.
fn compare(options: &Options, contestants: &[Contestant], workload: &str) -> Result<(), String> {
    let scales = scales(options, contestants, workload)?;
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        let round =
            contestants.iter().zip(&scales).map(|(one, scale)| one.run(workload, &options.append, *scale));
        rounds.push(round.collect::<Result<Vec<_>, _>>()?);
    }
    for (at, (contestant, scale)) in contestants.iter().zip(&scales).enumerate() {
        for phase in 0..rounds[0][at].len() {
            print(contestant, *scale, at, phase, &rounds);
        }
    }
    Ok(())
}

impl Contestant {
    fn run(&self, workload: &str, append: &str, scale: u64) -> Result<Vec<Phase>, String> {
        peer::run(&mut (self.command)(&format!("workload={workload} scale={scale} {append}")), LIMIT)
    }
}

/// A scale for each contestant: the first one's, unless that would take another too long.
fn scales(options: &Options, contestants: &[Contestant], workload: &str) -> Result<Vec<u64>, String> {
    let mut scales = Vec::new();
    for contestant in contestants {
        let fixed = options.scale.or(options.smoke.then_some(1));
        let scale = match (fixed, scales.first()) {
            (Some(scale), _) => scale,
            (None, None) => contestant.scale_for(workload, &options.append, TARGET)?,
            (None, Some(first)) => contestant.scale_for(workload, &options.append, TARGET_MAX)?.min(*first),
        };
        scales.push(scale);
    }
    Ok(scales)
}

impl Contestant {
    /// The scale whose timed phases take about `target`.
    fn scale_for(&self, workload: &str, append: &str, target: Duration) -> Result<u64, String> {
        let seconds = |scale| -> Result<f64, String> {
            Ok(self.run(workload, append, scale)?.iter().map(|phase| phase.took.as_secs_f64()).sum())
        };
        let of = |scale: u64, took: f64| {
            ((scale as f64 * target.as_secs_f64() / took.max(1e-6)) as u64).clamp(1, SCALE_MAX)
        };
        // The first guess is from a run too short to be trusted.
        let guess = (of(1, seconds(1)?) / 10).max(1);
        Ok(of(guess, seconds(guess)?))
    }
}

/// The line of a contestant's phase.
fn print(contestant: &Contestant, scale: u64, at: usize, phase: usize, rounds: &[Vec<Vec<Phase>>]) {
    let first = &rounds[0][at][phase];
    let rates: Vec<f64> = rounds.iter().map(|round| round[at][phase].rate()).collect();
    let ratios: Vec<f64> =
        rounds.iter().map(|round| round[at][phase].rate() / round[0][phase].rate()).collect();
    let decimals = if rates[0] < 1000.0 { 3 } else { 0 };
    println!(
        "bench peer.{}.{}={:.decimals$} {}/s worst={:.decimals$} best={:.decimals$} ratio={:.4} rounds={} scale={scale}",
        first.name,
        contestant.name,
        quantile(&rates, 0.5),
        first.unit,
        quantile(&rates, 0.0),
        quantile(&rates, 1.0),
        quantile(&ratios, 0.5),
        rounds.len(),
    );
}
