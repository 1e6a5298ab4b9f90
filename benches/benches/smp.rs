//! How a guest gains by a second CPU: whole runs of `umbra` on the soft backend, by turns with one vCPU, with two, and two guests of
//! one vCPU side by side, which is all that the host's second CPU can give.
//!
//! ```text
//! cargo build --release && cargo bench --bench smp -- [work=N]
//! ```
//!
//! | figure | what it is | bar |
//! |---|---|---|
//! | reclaim_1, reclaim_2 | the time of workload `reclaim` between its two lines, by the guest's clock; the median | |
//! | reclaim_gain | the first over the second | 1.7 |
//! | reclaim_apart | the time of each of two guests that have nothing to do with each other | |
//! | host_gain | what two such do in the time that one takes alone | |
//! | line_round_trip | how long a cache line takes to the other CPU and back, beside each round; the median, and the extremes: what two vCPUs share costs that, and a host that is itself a guest may have another from one second to the next | |
//!
//! The guest is built in, or the image in `UMBRA_GUEST`, so that two kernels can be compared. `work=N` is the workload's own.
//!
//! Limits: a host with fewer than three idle CPUs lends the disks' threads what vCPUs would have. `UMBRA_BIN` names another `umbra`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use umbra_benches::Effort;
use umbra_benches::peer::quantile;

const ROUNDS: u32 = 15;

fn main() {
    let smoke = Effort::from_args().batches < 100;
    let options: Vec<String> = std::env::args().skip(1).filter(|arg| arg.contains('=')).collect();
    let Some(umbra) = umbra() else {
        println!("bench smp skipped: no umbra beside it: cargo build --release, or set UMBRA_BIN");
        return;
    };
    let append = format!("workload=reclaim {}", options.join(" "));
    let run = |vcpus| milliseconds(&umbra, vcpus, append.trim_end());
    let (mut one, mut two, mut apart, mut line) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..if smoke { 1 } else { ROUNDS } {
        line.extend(line_round_trip());
        one.push(run("1"));
        two.push(run("2"));
        std::thread::scope(|scope| {
            let other = scope.spawn(|| run("1"));
            apart.push(run("1"));
            apart.push(other.join().expect("no panic"));
        });
    }
    let [one, two, apart] = [one, two, apart].map(|times| quantile(&times, 0.5));
    println!("reclaim_1     {one:.1} ms");
    println!("reclaim_2     {two:.1} ms");
    println!("reclaim_gain  {:.2}", one / two);
    println!("reclaim_apart {apart:.1} ms");
    println!("host_gain     {:.2}", 2.0 * one / apart);
    let [least, median, most] = [0.0, 0.5, 1.0].map(|part| quantile(&line, part));
    println!("line_round_trip {median:.0} ns ({least:.0} to {most:.0})");
}

/// Nanoseconds that a word takes to a thread on another CPU and back; nothing where there is none.
fn line_round_trip() -> Option<f64> {
    const TRIPS: u32 = 20_000;
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1) {
        return None;
    }
    let word = AtomicU32::new(0);
    let wait_for = |value| {
        while word.load(Ordering::Acquire) != value {
            std::hint::spin_loop();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for trip in 0..=TRIPS {
                wait_for(2 * trip + 1);
                word.store(2 * trip + 2, Ordering::Release);
            }
        });
        let go = |trip| {
            word.store(2 * trip + 1, Ordering::Release);
            wait_for(2 * trip + 2);
        };
        go(0);
        let start = Instant::now();
        (1..=TRIPS).for_each(go);
        Some(start.elapsed().as_nanos() as f64 / f64::from(TRIPS))
    })
}

fn umbra() -> Option<PathBuf> {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.parent()?.join("umbra"));
    let path = std::env::var_os("UMBRA_BIN").map(PathBuf::from).or_else(beside)?;
    path.is_file().then_some(path)
}

/// What one run's workload took.
fn milliseconds(umbra: &Path, vcpus: &str, append: &str) -> f64 {
    let mut command = Command::new(umbra);
    command.args(["run", "--backend", "soft", "--vcpus", vcpus, "--append", append]);
    if let Some(image) = std::env::var_os("UMBRA_GUEST") {
        command.args(["--disk", "256M,id=swap", "--disk", "16M,id=file"]).arg(image);
    }
    let run = command.stdin(Stdio::null()).output().expect("umbra runs");
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{append}, {vcpus} vCPUs: {text}{}", String::from_utf8_lossy(&run.stderr));
    let kilocounts = text.lines().find_map(|line| line.strip_prefix("time: end reclaim tsc1024="));
    // A count of the guest's clock is a nanosecond.
    kilocounts.and_then(|count| count.parse::<f64>().ok()).expect("the workload says how long it took")
        * 1024.0
        / 1e6
}
