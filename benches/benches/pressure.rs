//! Guests with less memory than they use, and what Umbra itself takes: whole runs of `umbra`.
//!
//! ```text
//! cargo build --release && cargo bench --bench pressure -- [curve] [idle] [metadata] [cut]
//! ```
//!
//! | figure | what it is | bar |
//! |---|---|---|
//! | curve | guest pages a second as frames go from twice the working set to an eighth; `target/pressure/curve.csv`, `.svg` | no cliff |
//! | swap_write_mean | bytes of a write to swap, sequential workload | 64 KiB |
//! | gate_sleep_max | the vCPU's longest sleep at a gate in those runs | |
//! | idle_16g | most resident memory of a guest of 16 GiB that computes | 150 MiB |
//! | metadata | private memory for a guest of 64 MiB, every page resident and mapped, tables apart | 1.5 % |
//! | cut | the pool's resident memory before and after `--frames` goes from 24M to 8M | falls by 16 MiB |
//!
//! Limits: on the soft backend, where nothing but memory costs. `UMBRA_BIN` names another `umbra`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use umbra::machine::Pool;
use umbra_benches::Effort;
use umbra_benches::peer::quantile;
use umbra_mmu::{
    Access, Config, Context, Flush, Gfn, Gva, LocalStack, Machine, Mmu, Mode, NoVcpus, Outcome, Width,
};

/// What workload `kmap` uses at `scale=100`, in pages, and at most.
const KMAP_PAGES: u32 = 256;
const SCALE_MAX: u32 = 4000;
/// Frames over working set.
const POINTS: [f64; 8] = [2.0, 1.25, 1.0, 0.875, 0.75, 0.5, 0.25, 0.125];
const MIB: u64 = 1 << 20;
/// What 24 MiB of frames are when the background keeps some of them free, and low memory what it may want.
const FULL: u64 = 21 * MIB;

fn main() {
    let smoke = Effort::from_args().batches < 100;
    let named: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|n| n == name);
    if wanted("metadata") {
        metadata();
    }
    let Some(umbra) = umbra() else {
        println!("bench pressure skipped: no umbra beside it: cargo build --release, or set UMBRA_BIN");
        return;
    };
    if wanted("curve") {
        curve(&umbra, smoke);
    }
    if wanted("idle") {
        idle(&umbra);
    }
    if wanted("cut") {
        cut(&umbra);
    }
}

/// `UMBRA_BIN`, or what cargo built beside this program's folder.
fn umbra() -> Option<PathBuf> {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.parent()?.join("umbra"));
    let path = std::env::var_os("UMBRA_BIN").map(PathBuf::from).or_else(beside)?;
    path.is_file().then_some(path)
}

fn command(umbra: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(umbra);
    command.args(["run", "--backend", "soft"]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A run's summary.
fn summary(umbra: &Path, arguments: &[&str]) -> Value {
    let json = tempfile::NamedTempFile::new().expect("a temporary file");
    let run = command(umbra, arguments).arg("--json").arg(json.path()).output().expect("umbra runs");
    assert!(run.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&run.stderr));
    let text = std::fs::read(json.path()).expect("a summary");
    serde_json::from_slice(&text).expect("a summary is JSON")
}

fn number(summary: &Value, pointer: &str) -> f64 {
    summary.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer} in {summary}"))
}

/// One point of the curve.
struct Point {
    frames: u32,
    ratio: f64,
    seconds: f64,
    /// Pages that had to be given a frame: new ones, and those that came back.
    arrivals: f64,
    write_mean: f64,
    gate_max: f64,
}

fn curve(umbra: &Path, smoke: bool) {
    let (scale, rounds) = (SCALE_MAX, if smoke { 1 } else { 5 });
    let pages = KMAP_PAGES * scale / 100;
    let points: Vec<Point> = POINTS.iter().map(|ratio| point(umbra, scale, pages, *ratio, rounds)).collect();
    // Each page is stored to in one pass, and loaded from in another.
    let rate = |point: &Point| 2.0 * f64::from(pages) / point.seconds;
    let mut table = String::from("frames,ratio,seconds,pages_per_second,arrivals,ns_per_arrival\n");
    for point in &points {
        let each = point.seconds * 1e9 / point.arrivals;
        println!(
            "bench curve.{:.3}={:.0} pages/s frames={} arrivals={:.0} each={each:.0} ns rounds={rounds}",
            point.ratio,
            rate(point),
            point.frames,
            point.arrivals
        );
        let _ = writeln!(
            table,
            "{},{},{:.4},{:.0},{:.0},{each:.0}",
            point.frames,
            point.ratio,
            point.seconds,
            rate(point),
            point.arrivals
        );
    }
    let cost: Vec<f64> = points.iter().map(|point| point.seconds * 1e9 / point.arrivals).collect();
    println!("bench curve_arrival_worst_over_first={:.3} x", quantile(&cost, 1.0) / cost[0]);
    let last = &points[points.len() - 1];
    println!("bench swap_write_mean={:.1} KiB frames={}", last.write_mean / 1024.0, last.frames);
    let gate = points.iter().map(|point| point.gate_max).fold(0.0, f64::max);
    println!("bench gate_sleep_max={:.1} us runs={}", gate / 1000.0, points.len() * rounds as usize);
    let folder = umbra.parent().and_then(Path::parent).unwrap_or(Path::new(".")).join("pressure");
    let drawn = svg(&points.iter().map(|point| (point.ratio, rate(point))).collect::<Vec<_>>());
    let kept = std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(folder.join("curve.csv"), table))
        .and_then(|()| std::fs::write(folder.join("curve.svg"), drawn));
    match kept {
        Ok(()) => println!("bench curve is in {}", folder.display()),
        Err(error) => println!("bench curve is not kept: {error}"),
    }
}

fn point(umbra: &Path, scale: u32, pages: u32, ratio: f64, rounds: u32) -> Point {
    let frames = (f64::from(pages) * ratio) as u32;
    let (size, work) = (format!("{}K", frames * 4), format!("workload=kmap scale={scale}"));
    let runs: Vec<Value> =
        (0..rounds).map(|_| summary(umbra, &["--frames", &size, "--low", "2M", "--append", &work])).collect();
    let median = |of: &dyn Fn(&Value) -> f64| quantile(&runs.iter().map(of).collect::<Vec<_>>(), 0.5);
    let back = median(&|run| number(run, "/memory/refaults") + number(run, "/memory/read_ahead"));
    let gates: Vec<f64> = runs.iter().map(|run| number(run, "/faults/gate_nanos_max")).collect();
    Point {
        frames,
        ratio,
        seconds: median(&|run| number(run, "/times/ended") - number(run, "/times/guest_started")) / 1e6,
        arrivals: f64::from(pages) + back,
        write_mean: median(&|run| {
            number(run, "/memory/swap_outs") * 4096.0 / number(run, "/memory/swap_writes").max(1.0)
        }),
        gate_max: quantile(&gates, 1.0),
    }
}

/// The rate over the share of the working set, drawn.
fn svg(points: &[(f64, f64)]) -> String {
    const WIDTH: f64 = 600.0;
    const HEIGHT: f64 = 300.0;
    let most = points.iter().map(|(_, rate)| *rate).fold(1.0, f64::max);
    let at = |(ratio, rate): &(f64, f64)| (ratio / 2.0 * WIDTH, HEIGHT - rate / most * HEIGHT);
    let mut drawn = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"-10 -20 {} {}\" font-size=\"11\">\n",
        WIDTH + 60.0,
        HEIGHT + 50.0
    );
    let line: Vec<String> = points.iter().map(at).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(drawn, "<polyline fill=\"none\" stroke=\"black\" points=\"{}\"/>", line.join(" "));
    for point in points {
        let (x, y) = at(point);
        let _ = writeln!(drawn, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
        let _ = writeln!(drawn, "<text x=\"{x:.1}\" y=\"{:.1}\">{:.0} k/s</text>", y - 6.0, point.1 / 1000.0);
        let _ = writeln!(drawn, "<text x=\"{x:.1}\" y=\"{:.1}\">{}</text>", HEIGHT + 14.0, point.0);
    }
    drawn + "</svg>\n"
}

/// A line of `/proc/PID/status`, in bytes.
fn status_of(process: &str, line: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let rest = status.lines().find_map(|text| text.strip_prefix(line))?;
    Some(rest.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// What a line of a run's status was over time, until it ends.
fn watch(child: &mut Child, line: &str) -> Vec<(Duration, u64)> {
    let (process, begun, mut seen) = (child.id().to_string(), Instant::now(), Vec::new());
    while let Ok(None) = child.try_wait() {
        seen.extend(status_of(&process, line).map(|bytes| (begun.elapsed(), bytes)));
        thread::sleep(Duration::from_micros(500));
    }
    seen
}

fn idle(umbra: &Path) {
    let arguments = ["--mem", "16G", "--append", "workload=spin scale=100"];
    let mut child = command(umbra, &arguments).spawn().expect("umbra runs");
    let most = watch(&mut child, "VmHWM").iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
    println!("bench idle_16g={:.1} MiB", most as f64 / MIB as f64);
}

/// Every page of a guest of 64 MiB resident and mapped once.
fn metadata() {
    const PAGES: u32 = 16 << 10;
    const TABLE_ENTRIES: u32 = 1024;
    let config =
        Config { reserved_frames: 1, shadow_pages_max: 256, roots_max: 16, ..Config::of_pages(PAGES) };
    let own = || status_of("self", "RssAnon").unwrap_or(0);
    let pool = Pool::new(u64::from(PAGES + 1 + config.table_frames_max())).expect("a pool");
    let machine = Machine::new(pool.region());
    let before = own();
    let mmu = Mmu::new(machine, config, Box::new(NoVcpus));
    let window = LocalStack::new(Context::Host);
    let tables = PAGES / TABLE_ENTRIES;
    for n in 0..tables {
        let entry = (n + 1) << 12 | 0x67;
        mmu.store(&window, Gfn(0).at(4 * n), Width::B4, entry.into()).expect("guest memory");
        let entries = (0..TABLE_ENTRIES).flat_map(|at| ((n * TABLE_ENTRIES + at) << 12 | 0x67).to_le_bytes());
        let bytes: Vec<u8> = entries.collect();
        mmu.write_bytes(&window, Gfn(n + 1).at(0), &bytes).expect("guest memory");
    }
    let mut vcpu = mmu.vcpu(0);
    let mode = Mode { paging: true, write_protect: true, ..Mode::default() };
    mmu.set_paging(&mut vcpu, mode, 0, Flush::Yes).expect("no PDPTEs");
    for page in 0..PAGES {
        let outcome = mmu.fault(&vcpu, Gva(page << 12), Access::read(false));
        assert!(matches!(outcome, Outcome::Fixed | Outcome::Emulate(_)), "{outcome:?} at page {page}");
    }
    let usage = mmu.usage();
    let taken = own().saturating_sub(before) as f64;
    println!(
        "bench metadata={:.3} % bytes={taken} a_page={:.1} resident={} shadow_pages={}",
        taken * 100.0 / (f64::from(PAGES) * 4096.0),
        taken / f64::from(PAGES),
        usage.resident,
        usage.shadow_pages
    );
}

/// The pool's resident memory around a cut of `--frames` in the middle of a run. When the middle is, a run without a cut
/// says.
fn cut(umbra: &Path) {
    let swap = tempfile::tempdir().expect("a temporary folder");
    let file = swap.path().join("swap");
    let file = file.to_str().expect("a name in UTF-8");
    let run = |frames: &str| {
        let work = "workload=kmap scale=4000";
        let arguments = ["--frames", frames, "--low", "1M", "--swap", file, "--append", work];
        let mut child = command(umbra, &arguments).spawn().expect("umbra runs");
        watch(&mut child, "RssShmem")
    };
    let whole = run("24M");
    let full = whole.iter().find(|(_, bytes)| *bytes >= FULL).map_or(Duration::ZERO, |(at, _)| *at);
    let end = whole.last().map_or(Duration::ZERO, |(at, _)| *at);
    let at = full + end.saturating_sub(full) / 4;
    let cut = run(&format!("24M@0s,8M@{}ms", at.as_millis()));
    let before = cut.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
    // As it ends, it lets go of everything.
    let after = cut.iter().rev().map(|(_, bytes)| *bytes).find(|bytes| *bytes >= MIB).unwrap_or(0);
    println!(
        "bench cut={:.1} MiB before={:.1} after={:.1} at={} ms of {}",
        before.saturating_sub(after) as f64 / MIB as f64,
        before as f64 / MIB as f64,
        after as f64 / MIB as f64,
        at.as_millis(),
        end.as_millis()
    );
}
