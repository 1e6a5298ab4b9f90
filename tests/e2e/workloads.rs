//! The guest kernel's workloads, on Umbra and on QEMU: the same image must print the same result lines.
//!
//! Story: QEMU's lines come from QEMU itself or, in the nested rig, from a folder that `--record` filled on the host.
//! Umbra's must be equal line by line, and the closing line must say what the contract says.
//!
//! Workloads `access` and `fpu` count how a CPU differs from the architecture. The differences are those of the CPU
//! underneath, so they are not compared; on each host only the known ones are allowed ([`Host::quirks`]):
//!
//! | guest runs on | differences | owner |
//! |---|---|---|
//! | QEMU's emulation | `rsvd-no-p`, `rmw-read`, `no-xm`, `mxcsr-any` | TCG |
//! | Umbra in the nested rig | `rmw-read` | TCG, whose SVM machine runs the guest's accesses |
//! | Umbra elsewhere | none | |

use std::fs;
use std::path::Path;

use libtest_mimic::{Failed, Trial};
use umbra_guest::{PAGER, PAGER_NO_SCOPE, PAGER_OTHER, PAGER_PLAIN, PAGER_TWIN, PAGER_ZEROS, abi};

use super::umbra::{KVM, SOFT, Way, file_of, status, umbra, ways};
use crate::ensure;
use crate::support::host::{self, Need};
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case, qemu};

/// A workload, and as much of it as the slowest host does in seconds: a KVM that emulates 32-bit code.
struct Workload {
    name: &'static str,
    scale: u32,
    /// It is there to be timed: the nested rig, where time means nothing, leaves it out.
    timed: bool,
}

const fn tested(name: &'static str) -> Workload {
    Workload { name, scale: 100, timed: false }
}

const fn timed(name: &'static str) -> Workload {
    Workload { name, scale: 1, timed: true }
}

const WORKLOADS: [Workload; 13] = [
    tested("hello"),
    tested("mm"),
    tested("kmap"),
    tested("access"),
    tested("all"),
    tested("fpu"),
    tested("reclaim"),
    timed("disk"),
    timed("spin"),
    timed("sweep"),
    timed("storm"),
    timed("mix"),
    timed("huge"),
];

const PAGINGS: [&str; 2] = ["pae", "legacy"];

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (workload, paging) in all() {
        for way in ways() {
            let name = format!("{}_{}_{paging}_prints_what_qemu_prints", way.name, workload.name);
            trials.push(case(name, &way.needs(&[Need::Peer]), move || same_lines(way, workload, paging)));
        }
    }
    for way in ways() {
        let name = format!("{}_twin_that_damages_a_byte_fails_by_umbras_own_witness", way.name);
        trials.push(case(name, way.needs, move || twin(way)));
    }
    for way in ways() {
        let name = format!("{}_disks_of_each_kind_do_what_they_say", way.name);
        trials.push(case(name, way.needs, move || disks(way)));
    }
    trials.extend([
        case("soft_free_pages_that_are_reported_are_the_hosts_again", &[], || reported(SOFT)),
        case("kvm_free_pages_that_are_reported_are_the_hosts_again", &[Need::Kvm], || reported(KVM)),
        case("peer_free_pages_are_reported", &[Need::Qemu], peer_reported),
        case("image_from_a_file_is_the_built_in_one", &[Need::Kvm], from_file),
        case("image_without_the_note_is_interpreted_and_native_says_what_it_may_miss", &[Need::Kvm], plain),
        case("unknown_words_end_with_the_status_of_a_bad_command_line", &[], unknown_words),
        case("timer_interrupts_as_often_as_asked", &[], timer_rate),
        case("reclaim_counts_and_contents_are_those_of_the_disks", &[], disks_agree),
        case("peer_disks_of_each_kind", &[Need::Qemu], peer_disks),
        case("reclaim_twin_whose_pages_come_back_as_zeros_or_as_others_is_caught", &[], lost_pages),
        case("reclaim_twin_that_allocates_under_a_lock_without_its_scope_is_caught", &[], no_scope),
        case("reclaim_with_too_little_swap_kills_the_largest_and_no_other", &[], too_little_swap),
        case("reclaim_on_a_slow_cpu_does_the_same_with_less", &[], pace),
        case("peer_reclaim_on_slow_disks_kills_nobody", &[Need::Qemu], slow_disks),
        case("peer_unknown_workload_ends_the_same_way", &[Need::Qemu], unknown_workload_on_qemu),
    ]);
    trials
}

fn all() -> impl Iterator<Item = (&'static Workload, &'static str)> {
    let here = |workload: &&Workload| !(workload.timed && Need::Rig.met().is_ok());
    WORKLOADS.iter().filter(here).flat_map(|workload| PAGINGS.map(|paging| (workload, paging)))
}

/// What executes the guest's accesses.
#[derive(Clone, Copy)]
enum Host {
    Qemu,
    Umbra,
}

impl Host {
    /// Known differences of this host's CPU that `workload` finds, as the guest's `allow=` takes them.
    fn quirks(self, workload: &Workload) -> &'static str {
        match (workload.name, self) {
            ("access", Host::Qemu) => "rsvd-no-p,rmw-read",
            ("access", Host::Umbra) if Need::Rig.met().is_ok() => "rmw-read",
            ("fpu", Host::Qemu) => "no-xm,mxcsr-any",
            ("fpu", Host::Umbra) if Need::Rig.met().is_ok() => "no-xm,mxcsr-any",
            _ => "",
        }
    }
}

fn cmdline(workload: &Workload, paging: &str, host: Host) -> String {
    let words = format!("workload={} scale={} paging={paging}", workload.name, workload.scale);
    let words = match host.quirks(workload) {
        "" => words,
        quirks => format!("{words} allow={quirks}"),
    };
    // The rig's own clock runs fast enough for its CPU to look like one that is.
    if workload.name == "reclaim" && Need::Rig.met().is_ok() { format!("{words} pace=slow") } else { words }
}

/// The lines to compare: without what the host's differences make of them.
fn comparable(run: &Outcome) -> Vec<String> {
    let differs = |line: &String| line.starts_with("pager: deviation ") || line.contains(" (fpu) killed: ");
    let lines = run.result_lines().into_iter().filter(|line| !differs(line));
    lines.map(|line| line.split(" deviations=").next().unwrap_or_default().to_owned()).collect()
}

/// Writes what QEMU prints for every workload into `folder`, for a place without QEMU.
pub fn record(folder: &Path) -> Result<(), Failed> {
    fs::create_dir_all(folder)?;
    for (workload, paging) in all() {
        let lines = on_qemu(workload, paging)?;
        fs::write(folder.join(record_of(workload, paging)), lines.join("\n"))?;
    }
    Ok(())
}

fn record_of(workload: &Workload, paging: &str) -> String {
    format!("{}-{paging}.lines", workload.name)
}

/// QEMU's result lines, from the record where there is one.
fn peer_lines(workload: &Workload, paging: &str) -> Result<Vec<String>, Failed> {
    match host::recorded() {
        Some(folder) => {
            let text = fs::read_to_string(folder.join(record_of(workload, paging)))?;
            Ok(text.lines().map(str::to_owned).collect())
        }
        None => on_qemu(workload, paging),
    }
}

fn on_qemu(workload: &Workload, paging: &str) -> Result<Vec<String>, Failed> {
    let image = file_of(PAGER)?;
    let run = qemu::run(image.path(), &cmdline(workload, paging, Host::Qemu), "64M")?;
    ensure!(
        run.end == End::Status(1),
        "the guest did not pass on QEMU (0 written to the exit port is 1):\n{run}"
    );
    check_closing_line(&run, workload, paging)?;
    Ok(comparable(&run))
}

fn same_lines(way: Way, workload: &Workload, paging: &str) -> Verdict {
    let words = cmdline(workload, paging, Host::Umbra);
    let run = way.run(&["--append", &words])?;
    ensure!(run.end == End::Status(0), "the guest did not pass:\n{run}");
    check_closing_line(&run, workload, paging)?;
    let (ours, theirs) = (comparable(&run), peer_lines(workload, paging)?);
    let first = ours.iter().zip(&theirs).position(|(our, their)| our != their);
    ensure!(
        ours == theirs,
        "line {:?} differs, of {} and {}:\n  umbra: {:#?}\n  qemu:  {:#?}\n{run}",
        first,
        ours.len(),
        theirs.len(),
        &ours[first.unwrap_or(0)..],
        &theirs[first.unwrap_or(0)..]
    );
    Ok(())
}

/// `pager: verdict=PASS workload=W paging=P checks=N errors=0`, last of the result lines, with N above zero.
fn check_closing_line(run: &Outcome, workload: &Workload, paging: &str) -> Verdict {
    let lines = run.result_lines();
    let Some(last) = lines.last() else { return Err(format!("no result line:\n{run}").into()) };
    let checks = last
        .strip_prefix(&format!("pager: verdict=PASS workload={} paging={paging} checks=", workload.name))
        .and_then(|rest| rest.strip_suffix(" errors=0"))
        .and_then(|checks| checks.parse::<u64>().ok());
    ensure!(checks.is_some_and(|checks| checks > 0), "the closing line is {last:?}:\n{run}");
    Ok(())
}

fn from_file() -> Verdict {
    let image = file_of(PAGER)?;
    let path = image.path().to_string_lossy().into_owned();
    let (file, built_in) =
        (umbra(["run", &path, "--append", "workload=hello"])?, umbra(["run", "--append", "workload=hello"])?);
    ensure!(file.end == End::Status(0), "the image from a file failed:\n{file}");
    ensure!(file.stdout == built_in.stdout, "the two differ:\n{file}\n{built_in}");
    Ok(())
}

/// The guest finds all its checks right and says so; only who hashes its memory from outside can tell.
fn twin(way: Way) -> Verdict {
    let image = file_of(PAGER_TWIN)?;
    let path = image.path().to_string_lossy().into_owned();
    let run = way.run(&[&path, "--append", "workload=mm"])?;
    let said_pass = run.result_lines().last().is_some_and(|line| line.contains("verdict=PASS"));
    ensure!(said_pass, "the twin itself must say PASS:\n{run}");
    ensure!(run.end == status::WITNESS, "expected {:?}:\n{run}", status::WITNESS);
    Ok(())
}

fn plain() -> Verdict {
    let image = file_of(PAGER_PLAIN)?;
    let path = image.path().to_string_lossy().into_owned();
    for (supervisor, warnings) in [("auto", 0), ("interpret", 0), ("native", 1)] {
        let args = [&path, "--append", "workload=hello", "--supervisor", supervisor];
        let run = KVM.run(&args)?;
        ensure!(run.end == End::Status(0), "the kernel without its note failed:\n{run}");
        let lines = run.stderr.lines().filter(|line| line.contains("natively at CPL 3")).count();
        ensure!(
            lines == warnings,
            "{supervisor}: expected {warnings} lines about what native may miss:\n{run}"
        );
    }
    Ok(())
}

/// What a write of [`abi::STATUS_COMMAND_LINE`] to the exit port ends with, here and on QEMU.
const STATUS_COMMAND_LINE: End = End::Status((abi::STATUS_COMMAND_LINE << 1 | 1) as i32);

const STATUS_FAIL: End = End::Status((abi::STATUS_FAIL << 1 | 1) as i32);
const STATUS_PANIC: End = End::Status((abi::STATUS_PANIC << 1 | 1) as i32);

fn unknown_words() -> Verdict {
    for word in ["workload=nonsense", "hz=0", "hz=1001", "pace=none"] {
        let run = SOFT.run(&["--append", word])?;
        ensure!(run.end == STATUS_COMMAND_LINE, "{word}: expected {STATUS_COMMAND_LINE:?}:\n{run}");
        ensure!(!run.lines().join("\n").contains("verdict=PASS"), "{word}: it claims to have passed:\n{run}");
    }
    Ok(())
}

/// Ten times as many a second, of which a busy machine may lose most.
fn timer_rate() -> Verdict {
    let interrupts = |word: &str| -> Result<u64, Failed> {
        let json = file_of(b"")?;
        let path = json.path().to_string_lossy().into_owned();
        let run = SOFT.run(&["--append", &format!("workload=spin scale=500 {word}"), "--json", &path])?;
        ensure!(run.end == End::Status(0), "{word} did not pass:\n{run}");
        let summary: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        Ok(summary["vcpu"]["interrupts"].as_u64().unwrap_or(0))
    };
    let (few, many) = (interrupts("hz=100")?, interrupts("hz=1000")?);
    ensure!(few >= 2 && (few * 2..few * 20).contains(&many), "{few} at 100 Hz, {many} at 1000 Hz");
    Ok(())
}

fn unknown_workload_on_qemu() -> Verdict {
    let image = file_of(PAGER)?;
    let run = qemu::run(image.path(), "workload=nonsense", "64M")?;
    ensure!(run.end == STATUS_COMMAND_LINE, "expected {STATUS_COMMAND_LINE:?}:\n{run}");
    Ok(())
}

/// Runs an image on soft with the disks that `workload=reclaim` wants.
fn reclaim_of(image: &[u8], append: &str, swap: &str) -> Result<Outcome, Failed> {
    let image = file_of(image)?;
    let path = image.path().to_string_lossy().into_owned();
    let swap = format!("{swap},id=swap");
    SOFT.run(&[&path, "--disk", &swap, "--disk", "16M,id=file", "--append", append])
}

fn lost_pages() -> Verdict {
    for (twin, name) in [(PAGER_ZEROS, "zeros"), (PAGER_OTHER, "others")] {
        for pace in ["fast", "slow"] {
            let run = reclaim_of(twin, &format!("workload=reclaim pace={pace}"), "64M")?;
            let caught = run.result_lines().iter().any(|line| line.ends_with("is not what was written"));
            ensure!(caught && run.end == STATUS_FAIL, "{name}, {pace}: not caught:\n{run}");
        }
    }
    Ok(())
}

fn no_scope() -> Verdict {
    let run = reclaim_of(PAGER_NO_SCOPE, "workload=reclaim", "64M")?;
    let caught = run.result_lines().iter().any(|line| line.contains("mutex->owner != current"));
    ensure!(caught && run.end == STATUS_PANIC, "whoever has the lock should come to wait for itself:\n{run}");
    Ok(())
}

/// Swap and memory together hold less than the processes want.
fn too_little_swap() -> Verdict {
    let run = reclaim_of(PAGER, "workload=reclaim pace=slow", "512K")?;
    let lines = run.result_lines();
    let process =
        |line: &String, before: &str| Some(line.strip_prefix(before)?.split(' ').next()?.to_owned());
    let largest: Vec<_> =
        lines.iter().filter_map(|line| process(line, "pager: out of memory: process ")).collect();
    let mut killed: Vec<_> = lines
        .iter()
        .filter(|line| line.contains(" killed: out of memory"))
        .filter_map(|line| process(line, "pager: process "))
        .collect();
    killed.sort();
    let mut chosen = largest.clone();
    chosen.sort();
    ensure!(!chosen.is_empty() && chosen.len() < 4, "{} processes were to be killed:\n{run}", chosen.len());
    ensure!(killed == chosen, "{chosen:?} were the largest, and {killed:?} were killed:\n{run}");
    ensure!(lines.iter().any(|line| line.ends_with(" wrong=0")), "a page is wrong:\n{run}");
    ensure!(run.end == STATUS_FAIL, "the verdict should say that a process did not end well:\n{run}");
    Ok(())
}

fn pace() -> Verdict {
    let touches = |pace: &str| -> Result<u64, Failed> {
        let run = reclaim_of(PAGER, &format!("workload=reclaim pace={pace}"), "64M")?;
        ensure!(run.end == End::Status(0), "{pace}: the guest did not pass:\n{run}");
        let lines = run.lines();
        let begin = lines.iter().find(|line| line.starts_with("time: begin reclaim"));
        number(begin.ok_or("no phase")?, "touches")
    };
    let (slow, fast, auto) = (touches("slow")?, touches("fast")?, touches("auto")?);
    ensure!(slow < fast && auto == fast, "touches: slow {slow}, fast {fast}, and as measured {auto}");
    Ok(())
}

/// A request in ten milliseconds: what is under way for long is no reason to kill anybody.
fn slow_disks() -> Verdict {
    let image = file_of(PAGER)?;
    let words = "workload=reclaim hz=1000 pace=slow";
    let run = qemu::run_with_disks(image.path(), words, "64M", "throttling.iops-total=100")?;
    ensure!(run.end == End::Status(1), "the guest did not pass:\n{run}");
    Ok(())
}

/// The number behind `name=` in a line.
fn number(line: &str, name: &str) -> Result<u64, Failed> {
    let value = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let value = value.ok_or_else(|| format!("no {name}= in '{line}'"))?;
    Ok(value.parse()?)
}

/// What the guest says that it has read and written, and what its file has, against the disks as they are from outside.
fn disks_agree() -> Verdict {
    let folder = tempfile::tempdir()?;
    let path = |name| folder.path().join(name).to_string_lossy().into_owned();
    let (json, file) = (path("summary.json"), path("file.img"));
    fs::File::create(&file)?.set_len(16 << 20)?;
    let disk = format!("{file},id=file");
    let args = ["--disk", "64M,id=swap", "--disk", &disk, "--append", "workload=reclaim", "--json", &json];
    let run = SOFT.run(&args)?;
    ensure!(run.end == End::Status(0), "the guest did not pass:\n{run}");
    let summary: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json)?)?;
    for (index, name) in ["swap", "file"].into_iter().enumerate() {
        let lines = run.lines();
        let line = lines.iter().find(|line| line.starts_with(&format!("reclaim: disk {name} ")));
        let line = line.ok_or_else(|| format!("no counts of disk {name}:\n{run}"))?;
        let counted = &summary["disks"][index];
        let pairs = [
            ("reads", counted["read"]["requests"].as_u64()),
            ("read_pages", counted["read"]["sectors"].as_u64().map(|sectors| sectors / 8)),
            ("writes", counted["write"]["requests"].as_u64()),
            ("written_pages", counted["write"]["sectors"].as_u64().map(|sectors| sectors / 8)),
            ("flushes", counted["flush"]["requests"].as_u64()),
            ("discards", counted["discard"]["requests"].as_u64()),
        ];
        for (word, theirs) in pairs {
            let ours = number(line, word)?;
            ensure!(Some(ours) == theirs, "{name}: the guest says {word}={ours}, the disk {theirs:?}\n{run}");
        }
    }
    let (pages, sum, claimed) = file_sum(&fs::read(&file)?)?;
    ensure!(pages >= 64, "the file has but {pages} pages");
    ensure!(sum == claimed, "the file's {pages} pages sum up to {sum:#x}, and the guest found {claimed:#x}");
    Ok(())
}

const PAGE: usize = 4096;
/// Of the disk that may only be read, and of those of the other that `workload=disk` discards and makes zeros.
const RO_PAGES: usize = 8;
const DISCARDED: u64 = 512;
const ZEROED: std::ops::Range<usize> = 256..512;

/// A disk whose words are 0, 1, 2.., as the guest expects it of one named `ro`.
fn counting_disk() -> Vec<u8> {
    (0..(RO_PAGES * PAGE / 4) as u32).flat_map(u32::to_le_bytes).collect()
}

/// Discard, zeroes, the name, and a disk that may only be read: by the guest, by what Umbra counts, and by what the files have.
fn disks(way: Way) -> Verdict {
    let folder = tempfile::tempdir()?;
    let path = |name| folder.path().join(name).to_string_lossy().into_owned();
    let (json, swap, ro) = (path("summary.json"), path("swap.img"), path("ro.img"));
    fs::write(&swap, vec![0xa5; 1024 * PAGE])?;
    fs::write(&ro, counting_disk())?;
    let (swap_disk, ro_disk) = (format!("{swap},id=swap"), format!("{ro},ro,id=ro"));
    let args =
        ["--disk", &swap_disk, "--disk", &ro_disk, "--append", "workload=disk scale=1", "--json", &json];
    let run = way.run(&args)?;
    ensure!(run.end == End::Status(0), "the guest did not pass:\n{run}");
    // Zeroes it does not offer, and is not asked for them.
    let line = format!("pager: disk ro pages={RO_PAGES} errors=1 wrong=0");
    ensure!(run.result_lines().contains(&line), "there is no '{line}':\n{run}");
    let summary: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json)?)?;
    let (swap_counts, ro_counts) = (&summary["disks"][0], &summary["disks"][1]);
    for (counts, kind, field, want) in [
        (swap_counts, "discard", "requests", 1),
        (swap_counts, "discard", "sectors", DISCARDED * 8),
        (swap_counts, "write_zeroes", "requests", 1),
        (swap_counts, "write_zeroes", "sectors", ZEROED.len() as u64 * 8),
        (swap_counts, "write_zeroes", "errors", 0),
        (ro_counts, "write", "errors", 1),
        (ro_counts, "write_zeroes", "requests", 0),
        (ro_counts, "read", "sectors", 2 * 8 * RO_PAGES as u64),
    ] {
        let got = counts[kind][field].as_u64();
        ensure!(got == Some(want), "{kind}.{field} is {got:?}, not {want}: {counts}");
    }
    ensure!(fs::read(&ro)? == counting_disk(), "the disk that may only be read has changed");
    let contents = fs::read(&swap)?;
    let zeros = |page: usize| contents[page * PAGE..(page + 1) * PAGE].iter().all(|byte| *byte == 0);
    let pages: Vec<usize> = (0..1024).filter(|page| zeros(*page)).collect();
    ensure!(pages == ZEROED.collect::<Vec<_>>(), "other pages are zeros: {pages:?}");
    Ok(())
}

fn peer_disks() -> Verdict {
    let (image, ro) = (file_of(PAGER)?, file_of(&counting_disk())?);
    let run = qemu::run_with_read_only(image.path(), "workload=disk scale=1", "64M", ro.path())?;
    ensure!(run.end == End::Status(1), "the guest did not pass:\n{run}");
    let read = |line: &String| line.starts_with(&format!("pager: disk ro pages={RO_PAGES} errors="));
    // Zeroes it offers there all the same, and refuses.
    let said = run.result_lines().into_iter().find(read).ok_or_else(|| format!("no disk ro:\n{run}"))?;
    ensure!(number(&said, "errors")? <= 2 && number(&said, "wrong")? == 0, "{said}");
    Ok(())
}

/// Pages that `workload=report` has written to, freed and reported.
const REPORTED: u64 = 512;
/// Free frames that Umbra keeps for the next taker, at most.
const KEPT: u64 = 64;
/// Frames that the guest may have come to use while its free ones went: tables, a stack.
const OTHERS: u64 = 8;

/// Nothing else gives frames back in such a run: where the host comes to back fewer, it is for the reports.
fn reported(way: Way) -> Verdict {
    let json = file_of(b"")?;
    let path = json.path().to_string_lossy().into_owned();
    let run = way.run(&["--append", "workload=report", "--json", &path])?;
    ensure!(run.end == End::Status(0), "the guest did not pass:\n{run}");
    let summary: serde_json::Value = serde_json::from_str(&fs::read_to_string(path)?)?;
    let told = summary["balloon"]["reported"].as_u64().unwrap_or(0);
    let causes = summary["memory"]["invalidations"].as_array();
    let taken = causes.into_iter().flatten().find(|cause| cause["cause"] == "discard");
    let taken = taken.and_then(|cause| cause["pages"].as_u64()).unwrap_or(0);
    ensure!(told >= taken && taken >= REPORTED, "{told} pages reported, of which {taken} had frames:\n{run}");
    let back = summary["memory"]["given_back"].as_u64().unwrap_or(0);
    ensure!(back >= REPORTED - KEPT, "{taken} pages were taken, and {back} frames given back:\n{run}");
    let host = summary["series"]["host_backs"].as_array();
    let host: Vec<u64> = host.into_iter().flatten().filter_map(serde_json::Value::as_u64).collect();
    let drop = host.iter().enumerate().map(|(at, most)| most - host[at..].iter().min().unwrap_or(most)).max();
    // Other frames come into use meanwhile, and hide as many.
    let seen = drop.unwrap_or(0) + OTHERS;
    ensure!(seen >= REPORTED - KEPT, "{back} frames were given back, and the host has backed {host:?}");
    Ok(())
}

fn peer_reported() -> Verdict {
    let image = file_of(PAGER)?;
    let run = qemu::run(image.path(), "workload=report", "64M")?;
    ensure!(run.end == End::Status(1), "the guest did not pass:\n{run}");
    Ok(())
}

/// Pages of the guest's file system that have a block, their sum, and the sum that its superblock says; file.c has the layout.
fn file_sum(disk: &[u8]) -> Result<(usize, u32, u32), Failed> {
    let words = |page: usize| {
        let bytes = &disk[page * PAGE..(page + 1) * PAGE];
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("4"))).collect::<Vec<_>>()
    };
    let superblock = words(0);
    ensure!(superblock[0].to_le_bytes() == *b"UMFS", "there is no superblock");
    let blocks: Vec<u32> = words(2).into_iter().filter(|block| *block != 0).collect();
    let contents = blocks.iter().flat_map(|block| words(*block as usize));
    let sum = contents.fold(0u32, |sum, word| sum.rotate_left(1).wrapping_add(word));
    Ok((blocks.len(), sum, superblock[2]))
}
