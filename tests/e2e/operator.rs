//! An operator's pressure on a guest that runs: `umbra pressure`, by the control socket.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use serde_json::Value;
use tempfile::TempDir;

use super::pressure::env;
use super::umbra::{SOFT, SOFT_STICKY, expect_sentence, program, status, umbra};
use crate::ensure;
use crate::support::noise::Noise;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case, image};

/// How long a guest may take to listen, on a busy machine too.
const LISTENS: Duration = Duration::from_secs(30);

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    vec![
        case("soft_guest_is_pressed_by_budget_balloon_and_discards", &[], pressed),
        case("pressure_that_makes_no_sense_is_refused_before_anything_is_sent", &[], refused),
        case("pressure_that_is_interrupted_sets_the_guest_back", &[], interrupted),
        case("run_that_is_interrupted_ends_with_its_summary", &[], stopped_by_signal),
        case("soft_sticky_pressed_by_balloon_and_budget_keeps_every_byte", &[], both),
        case("soft_guest_in_want_takes_back_what_a_balloon_beyond_its_means_has", &[], in_want),
        case("soft_guest_without_swap_outlives_a_balloon_beyond_its_means", &[], without_swap),
    ]
}

/// A guest that only spins; it ends with the value.
struct Running {
    child: Child,
    folder: TempDir,
}

impl Running {
    fn start() -> Result<Running, Failed> {
        Running::start_with(tempfile::tempdir()?, &["--append", "workload=spin scale=4000"])
    }

    /// One without a driver for its balloon.
    fn start_deaf() -> Result<Running, Failed> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("image");
        std::fs::write(&path, image::multiboot(&image::spin()))?;
        let path = path.to_string_lossy().into_owned();
        Running::start_with(folder, &[&path])
    }

    fn start_with(folder: TempDir, guest: &[&str]) -> Result<Running, Failed> {
        let socket = folder.path().join("qmp");
        let options =
            ["--backend", "soft", "--mem", "32M", "--frames", "24M", "--low", "1M", "--timeout", "80s"];
        let child = Command::new(program())
            .arg("run")
            .args(options)
            .args(guest)
            .arg("--qmp")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut running = Running { child, folder };
        let end = Instant::now() + LISTENS;
        while !socket.exists() {
            ensure!(Instant::now() < end, "nobody listens at {}", socket.display());
            ensure!(running.child.try_wait()?.is_none(), "the guest has ended at once");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(running)
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    fn press(&self, line: &str) -> Result<Outcome, Failed> {
        press(&self.socket(), line)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn press(socket: &Path, line: &str) -> Result<Outcome, Failed> {
    let socket = socket.to_string_lossy().into_owned();
    umbra(["pressure", "--qmp", &socket].into_iter().chain(line.split_whitespace()))
}

/// Checks the end and that the last line of standard error has each of `words`.
fn expect(run: &Outcome, end: End, words: &[&str]) -> Verdict {
    let last = run.stderr.lines().last().unwrap_or_default();
    ensure!(run.end == end, "expected {end:?}:\n{run}");
    ensure!(words.iter().all(|word| last.contains(word)), "the last line should have {words:?}:\n{run}");
    ensure!(run.stdout.is_empty(), "there is something on standard output:\n{run}");
    Ok(())
}

fn pressed() -> Verdict {
    let guest = Running::start()?;
    let pass = End::Status(0);
    expect(&guest.press("frames 12M")?, pass, &["umbra: frames: from 24M to 12M in ", "the host backs "])?;
    let plot = guest.folder.path().join("wave.svg");
    let wave = format!("frames --wave 8M..10M --period 4s --for 4s --plot {}", plot.display());
    expect(&guest.press(&wave)?, pass, &["frames: from 12M to 12M in ", "meanwhile"])?;
    let picture = std::fs::read_to_string(plot)?;
    roxmltree::Document::parse(&picture)?;
    for words in ["curve budget", "curve backed", "curve stalls", "time since the command"] {
        ensure!(picture.contains(words), "the plot does not have {words}:\n{picture}");
    }
    expect(&guest.press("frames --ramp 12M..16M --over 300ms")?, pass, &["frames: from 12M to 16M in "])?;
    expect(
        &guest.press("discard 16M 64K --atomic --every 50ms --for 200ms")?,
        pass,
        &["WouldBlock", "pages in "],
    )?;
    expect(
        &guest.press("page-out 16M 64K --atomic")?,
        pass,
        &["page-out: ", "in 1 round, WouldBlock 0 times"],
    )?;
    expect(&guest.press("page-out 8M 4M")?, pass, &["page-out: ", "in 1 round, WouldBlock 0 times"])?;
    expect(&guest.press("balloon 24M")?, pass, &["balloon: from 32M to 24M in "])?;
    let deaf_guest = Running::start_deaf()?;
    for line in ["balloon --wave 16M..24M --period 200ms --for 400ms", "balloon 16M --timeout 400ms"] {
        let deaf = deaf_guest.press(line)?;
        expect(&deaf, status::TIMEOUT, &["balloon: from 32M to 32M in "])?;
        ensure!(deaf.stderr.contains("the guest does not answer"), "it should say why:\n{deaf}");
    }
    expect_sentence(&guest.press("frames 1M")?, &["frames 1M", "smallest budget"])?;
    expect_sentence(&guest.press("frames 1G")?, &["frames 1G", "largest budget"])?;
    expect_sentence(&guest.press("balloon 64M")?, &["balloon 64M", "32M of memory"])
}

fn refused() -> Verdict {
    let nobody = Path::new("/nonexistent/qmp");
    for line in [
        "frames",
        "frames 12MB",
        "frames 5000",
        "frames --wave 12M..8M --period 1s --for 2s",
        "frames --ramp 12M..8M",
        "balloon 0",
        "balloon 8M --plot -",
        "discard 1 4K",
        "discard 0 4K --every 1s",
        "discard 16M 0",
        "frames 12M --timeout 0s",
    ] {
        let run = press(nobody, line)?;
        ensure!(run.end == status::USAGE, "'{line}' should be a usage error:\n{run}");
        ensure!(!run.stderr.contains("connect"), "'{line}' was sent to somebody:\n{run}");
    }
    let run = umbra(["pressure", "frames", "12M"])?;
    ensure!(run.end == status::USAGE && run.stderr.contains("--qmp"), "whose memory?\n{run}");
    expect_sentence(&press(nobody, "frames 12M")?, &["/nonexistent/qmp", "--qmp"])
}

/// Ctrl-C in the middle of a wave.
fn interrupted() -> Verdict {
    let guest = Running::start()?;
    let wave = ["frames", "--wave", "8M..10M", "--period", "400ms", "--for", "60s"];
    let mut command = Command::new("timeout");
    command.args(["--preserve-status", "--signal=INT", "2"]).arg(program());
    command.args(["pressure", "--qmp"]).arg(guest.socket()).args(wave);
    let run = crate::support::process::run(&mut command, LISTENS)?;
    ensure!(run.end == End::Status(14), "an operator has ended it:\n{run}");
    ensure!(run.stderr.contains("frames set back to 24M: the guest is at 24M now"), "how is it now?\n{run}");
    expect(&guest.press("frames 24M")?, End::Status(0), &["frames: from 24M to 24M in "])
}

/// Ctrl-C leaves what the run has come to, and nothing that the next one would trip over.
fn stopped_by_signal() -> Verdict {
    let folder = tempfile::tempdir()?;
    let path = |name| folder.path().join(name).to_string_lossy().into_owned();
    let (socket, json) = (path("qmp"), path("summary.json"));
    let mut command = Command::new("timeout");
    command.args(["--preserve-status", "--signal=INT", "2"]).arg(program());
    command.args(["run", "--backend", "soft", "--append", "workload=spin scale=4000"]);
    command.args(["--qmp", &socket, "--json", &json]);
    let run = crate::support::process::run(&mut command, LISTENS)?;
    ensure!(run.end == End::Status(14), "a signal has ended it:\n{run}");
    ensure!(run.stderr.contains("ended by a signal"), "it says so:\n{run}");
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(json)?)?;
    ensure!(summary["status"] == 14 && summary["audit"].as_array().is_some_and(Vec::is_empty), "{summary}");
    ensure!(!Path::new(&socket).exists(), "the socket is still there");
    Ok(())
}

/// Two reclaimers at once: the guest's, which its balloon presses, and Umbra's, which the budget presses. `UMBRA_SEEDS` guests.
fn both() -> Verdict {
    for seed in 1..=env("UMBRA_SEEDS", 1) {
        pressed_from_both_sides(seed).map_err(|why| {
            let why = why.message().unwrap_or_default().to_owned();
            format!("seed {seed}: {why}")
        })?;
    }
    Ok(())
}

/// A guest with these options, and a balloon that it is told to fill in waves, for as long as it runs; the balloon has moved.
fn waved(options: &[&str], wave: &str) -> Result<Outcome, Failed> {
    let folder = tempfile::tempdir()?;
    let path = |name| folder.path().join(name).to_string_lossy().into_owned();
    let (socket, json) = (path("qmp"), path("summary.json"));
    let run = thread::scope(|scope| {
        let presser = scope.spawn(|| {
            let end = Instant::now() + LISTENS;
            while !Path::new(&socket).exists() && Instant::now() < end {
                thread::sleep(Duration::from_millis(1));
            }
            // It ends when the guest does, which is then gone.
            press(Path::new(&socket), wave)
        });
        let rest = ["--mem", "32M", "--qmp", &socket, "--json", &json, "--timeout", "80s"];
        let run = SOFT.run(&[options, &rest].concat());
        drop(presser.join());
        run
    })?;
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    let inflated = summary["balloon"]["inflated"].as_u64();
    ensure!(inflated.is_some_and(|pages| pages > 0), "the balloon has not moved:\n{run}");
    Ok(run)
}

/// Swap and what the balloon leaves are less than the guest's processes want.
fn in_want() -> Verdict {
    let append = "workload=reclaim ram=32 scale=1 nmi=200";
    let options = ["--disk", "30M,id=swap", "--disk", "16M,id=file", "--append", append];
    let run = waved(&options, "balloon --wave 4M..16M --period 700ms --for 70s")?;
    ensure!(run.end == End::Status(0), "the guest failed:\n{run}");
    let lines = run.lines();
    let line = lines.iter().find(|line| line.starts_with("reclaim: balloon ")).ok_or("no counts")?;
    ensure!(!line.contains(" for_want=0 "), "it was never in want:\n{run}");
    Ok(())
}

/// Nothing that it has can go anywhere, and the balloon is to have more than there is.
fn without_swap() -> Verdict {
    let run = waved(&["--append", "workload=storm scale=400"], "balloon 2M --timeout 3s")?;
    ensure!(run.end == End::Status(0), "the guest failed:\n{run}");
    Ok(())
}

fn pressed_from_both_sides(seed: u64) -> Verdict {
    let (folder, mut noise) = (tempfile::tempdir()?, Noise::new(seed));
    let path = |name| folder.path().join(name).to_string_lossy().into_owned();
    let (socket, json) = (path("qmp"), path("summary.json"));
    let append = format!("workload=reclaim ram=64 scale=1 seed={seed} nmi=200");
    let mut frames = "16M@0s".to_owned();
    for step in 1..60 {
        frames += &format!(",{}M@{}ms", 10 + noise.below(22), step * 300 + noise.below(200));
    }
    let options = ["--mem", "64M", "--frames", &frames, "--low", "1M", "--append", &append];
    let rest = ["--qmp", &socket, "--json", &json, "--timeout", "80s"];
    let wave = format!(
        "balloon --wave {}M..48M --period {}ms --for 70s",
        24 + noise.below(12),
        200 + noise.below(600)
    );
    let run = thread::scope(|scope| {
        let presser = scope.spawn(|| {
            let end = Instant::now() + LISTENS;
            while !Path::new(&socket).exists() && Instant::now() < end {
                thread::sleep(Duration::from_millis(1));
            }
            // It ends when the guest does, which is then gone.
            press(Path::new(&socket), &wave)
        });
        let run = SOFT_STICKY.run(&[&options[..], &rest].concat());
        drop(presser.join());
        run
    })?;
    ensure!(run.end == End::Status(0), "the guest failed:\n{run}");
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(json)?)?;
    let number = |place: &str| summary.pointer(place).and_then(Value::as_u64).unwrap_or(0);
    for place in ["/balloon/inflated", "/balloon/deflated", "/memory/refaults", "/memory/swap_outs"] {
        ensure!(number(place) > 0, "{place} is 0: no pressure:\n{run}");
    }
    let audit = summary["audit"].as_array().map(Vec::len);
    ensure!(audit == Some(0), "the audit has found {:?}\n{run}", summary["audit"]);
    Ok(())
}
