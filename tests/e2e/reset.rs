//! Resets of a running guest: it begins as at power-on, whatever was under way, and nothing of the one before is left.
//!
//! The guest's own checks, Umbra's hashes of its memory and the audit at the end judge the guest that began last.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use super::export::{Exporting, FIRST, PAGES};
use super::qmp::{Client, Running, spent};
use super::umbra::{KVM, SOFT, SOFT_STICKY, Way, status};
use crate::ensure;
use crate::support::host::Need;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Resets in a row that leave nothing behind.
const MANY: u64 = 20;

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let each = [KVM, SOFT].into_iter().flat_map(|way| {
        [
            case(format!("reset_begins_the_guest_anew_{}", way.name), way.needs, move || anew(way)),
            case(format!("reset_of_a_guest_that_stands_lets_it_stand_{}", way.name), way.needs, move || {
                stopped(way)
            }),
            case(
                format!("reset_tells_importers_and_keeps_their_segments_{}", way.name),
                way.needs,
                move || importer(way),
            ),
            case(format!("reset_many_times_leaves_nothing_behind_{}", way.name), way.needs, move || {
                many(way)
            }),
        ]
    });
    let pressed = [KVM, SOFT_STICKY].map(|way| {
        case(format!("reset_under_reclaim_keeps_every_byte_{}", way.name), way.needs, move || pressed(way))
    });
    let balloon = case("reset_empties_the_balloon_and_the_guest_fills_it_again", &[], balloon);
    each.chain(pressed).chain([balloon]).collect()
}

/// Has the machine reset, and waits until it has been.
fn reset(client: &mut Client) -> Verdict {
    client.send("system_reset", json!({}))?;
    let (mut answered, mut told) = (false, false);
    while !(answered && told) {
        let said = client.receive()?;
        if said["event"] == "RESET" {
            let data = json!({"guest": false, "reason": "host-qmp-system-reset"});
            ensure!(said["data"] == data && !told, "another reset: {said}");
            told = true;
        } else if said.get("event").is_none() {
            ensure!(said == json!({"return": {}}), "system_reset: {said}");
            answered = true;
        }
    }
    Ok(())
}

/// What a command returns, whatever events come before.
fn call(client: &mut Client, command: &str, arguments: Value) -> Result<Value, Failed> {
    client.send(command, arguments)?;
    loop {
        let mut said = client.receive()?;
        if said.get("event").is_none() {
            ensure!(said.get("return").is_some(), "{command}: {said}");
            return Ok(said["return"].take());
        }
    }
}

fn memory(client: &mut Client, name: &str) -> Result<u64, Failed> {
    let shown = call(client, "x-memory", json!({}))?;
    Ok(shown[name].as_u64().ok_or_else(|| format!("no {name}: {shown}"))?)
}

/// Waits until a number of `x-memory` is at least `least`.
fn wait_for(client: &mut Client, name: &str, least: u64) -> Verdict {
    let begun = Instant::now();
    while memory(client, name)? < least {
        ensure!(begun.elapsed() < PATIENCE, "{name} does not come to {least}: {}", memory(client, name)?);
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn boots(run: &Outcome) -> usize {
    run.lines().iter().filter(|line| line.starts_with("pager: boot")).count()
}

/// The run has ended so, and the last of so many guests was as it should be.
fn ended(running: Running, end: End, resets: u64) -> Result<Outcome, Failed> {
    let run = running.end()?;
    ensure!(run.end == end && !run.stderr.contains("audit:"), "the guest came to harm:\n{run}");
    ensure!(run.stderr.contains(&format!(" resets={resets}")), "resets are not counted:\n{run}");
    Ok(run)
}

/// Pages that a guest has once it runs.
const RUNS: u64 = 60;

fn anew(way: Way) -> Verdict {
    let append =
        if way.needs.contains(&Need::Kvm) { "workload=mm scale=100" } else { "workload=mm scale=4000" };
    let running = Running::start(way, &["--vcpus", "2", "--mem", "48M", "--append", append])?;
    let mut client = running.client()?;
    for _ in 0..2 {
        wait_for(&mut client, "resident", RUNS)?;
        reset(&mut client)?;
    }
    let run = ended(running, End::Status(0), 2)?;
    // One that was reset early has said nothing.
    ensure!(run.lines().iter().filter(|line| line.starts_with("pager: verdict=PASS")).count() == 1, "{run}");
    Ok(())
}

fn stopped(way: Way) -> Verdict {
    let running = Running::start(way, &["--append", "workload=spin scale=4000"])?;
    let mut client = running.client()?;
    wait_for(&mut client, "resident", RUNS)?;
    client.told("stop", "STOP")?;
    reset(&mut client)?;
    ensure!(
        call(&mut client, "query-status", json!({}))? == json!({"status": "prelaunch", "running": false}),
        "it runs"
    );
    let thread = call(&mut client, "query-cpus-fast", json!({}))?[0]["thread-id"].take();
    let (before, pages) = (spent(&thread)?, memory(&mut client, "resident")?);
    thread::sleep(Duration::from_millis(200));
    ensure!(spent(&thread)? <= before + 2, "the vCPU runs while it is to stand");
    ensure!(memory(&mut client, "resident")? == pages, "the guest touches its memory");
    client.told("cont", "RESUME")?;
    wait_for(&mut client, "resident", RUNS)?;
    call(&mut client, "quit", json!({}))?;
    let run = ended(running, status::QUIT, 1)?;
    ensure!(boots(&run) == 2, "the guest has not begun anew:\n{run}");
    Ok(())
}

/// Disk requests, swap-ins, closed gates: all of it is under way when the reset comes.
fn pressed(way: Way) -> Verdict {
    let slow = way.needs.contains(&Need::Kvm);
    let append = if slow { "workload=mm scale=400 hz=20" } else { "scale=20 work=1" };
    let memory = if slow { ["--frames", "2M", "--low", "512K"] } else { ["--frames", "10M", "--low", "1M"] };
    let running = Running::start(way, &[&["--vcpus", "2", "--append", append][..], &memory].concat())?;
    let mut client = running.client()?;
    for round in 1..=3 {
        wait_for(&mut client, "swapped", 100 * round)?;
        reset(&mut client)?;
        let counters = call(&mut client, "x-counters", json!({}))?;
        ensure!(counters["resets"] == round, "another count: {counters}");
        ensure!(counters["memory"]["swap_outs"].as_u64() > Some(0), "counters have begun anew: {counters}");
    }
    let run = ended(running, End::Status(0), 3)?;
    ensure!(run.lines().iter().filter(|line| line.starts_with("pager: verdict=PASS")).count() == 1, "{run}");
    Ok(())
}

/// They are asked to give their pages up, which are zeros then; the segment is as it was.
fn importer(way: Way) -> Verdict {
    let mut guest = Exporting::start(way, &[])?;
    let writer = guest.importer()?;
    let segment = writer.make(FIRST, PAGES, true)?;
    let access = writer.get(segment, true)?;
    let attachment = writer.attach(&access, FIRST, PAGES)?;
    for page in FIRST..FIRST + PAGES {
        attachment.write(page, 0, b"before")?;
    }
    reset(&mut guest.qmp)?;
    ensure!(writer.stats().pages >= u64::from(PAGES), "nobody asked for the pages: {:?}", writer.stats());
    let mut bytes = [1; 6];
    for page in FIRST..FIRST + PAGES {
        attachment.read(page, 0, &mut bytes)?;
        ensure!(bytes == [0; 6], "page {page:#x} is {bytes:?}");
    }
    attachment.write(FIRST, 0, b"after")?;
    drop((attachment, access, writer));
    guest.end()
}

/// What a process has.
fn owned(process: &Value) -> Result<(usize, usize), Failed> {
    let count = |what| Ok::<_, Failed>(fs::read_dir(format!("/proc/{process}/{what}"))?.count());
    Ok((count("fd")?, count("task")?))
}

/// What the guest has that stands after a reset.
fn left(client: &mut Client) -> Result<[u64; 5], Failed> {
    let shown = call(client, "x-memory", json!({}))?;
    let names = ["resident", "swapped", "ballooned", "pinned", "shadow-pages"];
    let number = |name: &str| shown[name].as_u64().ok_or_else(|| format!("no {name}: {shown}"));
    let [a, b, c, d] = [0, 1, 2, 3].map(|at| number(names[at]));
    Ok([a?, b?, c?, d?, shown["frames-free"].as_u64().ok_or("no frames-free")?])
}

fn many(way: Way) -> Verdict {
    /// Tables of roots keep their frames.
    const ROOTS: u64 = 2 * 128;
    let slow = way.needs.contains(&Need::Kvm);
    let append = if slow { "workload=mm scale=400 hz=20" } else { "" };
    let options = ["--vcpus", "2", "--mem", "48M", "--frames", "8M", "--low", "1M", "--append", append];
    let running = Running::start(way, &options)?;
    let mut client = running.client()?;
    let process = call(&mut client, "query-cpus-fast", json!({}))?[0]["thread-id"].take();
    wait_for(&mut client, "resident", RUNS)?;
    client.told("stop", "STOP")?;
    reset(&mut client)?;
    let (first, had) = (left(&mut client)?, owned(&process)?);
    client.told("cont", "RESUME")?;
    for _ in 2..MANY {
        wait_for(&mut client, "resident", RUNS)?;
        reset(&mut client)?;
    }
    wait_for(&mut client, "resident", RUNS)?;
    client.told("stop", "STOP")?;
    reset(&mut client)?;
    let (last, has) = (left(&mut client)?, owned(&process)?);
    ensure!(first[1..4] == [0; 3] && first[..4] == last[..4], "pages are left behind: {first:?}, {last:?}");
    ensure!(last[4] + ROOTS >= first[4], "frames are lost: {first:?}, {last:?}");
    ensure!(had == has, "descriptors or threads are left behind: {had:?}, {has:?}");
    call(&mut client, "quit", json!({}))?;
    ended(running, status::QUIT, MANY).map(drop)
}

fn balloon() -> Verdict {
    const KEPT: u64 = 40 << 20;
    let running = Running::start(SOFT, &["--mem", "64M", "--append", "scale=4000"])?;
    let mut client = running.client()?;
    call(&mut client, "balloon", json!({ "value": KEPT }))?;
    let actual = |client: &mut Client| -> Result<u64, Failed> {
        Ok(call(client, "query-balloon", json!({}))?["actual"].as_u64().ok_or("no balloon")?)
    };
    let reached = |client: &mut Client| -> Verdict {
        let begun = Instant::now();
        while actual(client)? != KEPT {
            ensure!(begun.elapsed() < PATIENCE, "the guest does not give memory up: {}", actual(client)?);
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    reached(&mut client)?;
    ensure!(memory(&mut client, "ballooned")? > 0, "no page has been given up");
    client.send("stop", json!({}))?;
    while client.receive()?.get("event").is_some() {}
    reset(&mut client)?;
    ensure!(
        actual(&mut client)? == 64 << 20,
        "the guest has less than all of its memory: {}",
        actual(&mut client)?
    );
    ensure!(memory(&mut client, "ballooned")? == 0, "pages are still given up");
    call(&mut client, "cont", json!({}))?;
    reached(&mut client)?;
    call(&mut client, "quit", json!({}))?;
    ended(running, status::QUIT, 1).map(drop)
}
