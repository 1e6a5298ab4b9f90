//! Resets of a running guest: it begins as at power-on, whatever was under way, and nothing of the one before is left.
//!
//! The guest's own checks, Umbra's hashes of its memory, the TLB oracle, the ledger and the audit at the end judge the guest that
//! began last.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};
use umbra::import::Manners;

use super::export::{Exporting, FIRST, PAGES};
use super::qmp::{Client, Running, spent};
use super::umbra::{KVM, SOFT, SOFT_STICKY, Way, file_of, status};
use crate::ensure;
use crate::support::host::Need;
use crate::support::image;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// What each guest says once its kernel runs.
const BOOT: &str = "pager: boot ";
/// What one says that has passed.
const PASS: &str = "pager: verdict=PASS";

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
            case(format!("reset_leaves_nothing_on_the_board_{}", way.name), way.needs, move || {
                by_the_guest(way)
            }),
            case(format!("reset_many_times_leaves_nothing_behind_{}", way.name), way.needs, move || {
                many(way)
            }),
        ]
    });
    let pressed = [KVM, SOFT_STICKY].map(|way| {
        case(format!("reset_under_reclaim_keeps_every_byte_{}", way.name), way.needs, move || {
            under_reclaim(way, &[])
        })
    });
    let alone = [
        // Status 18 if the next guest were taken for the one before.
        case("reset_is_no_flush_missed_by_the_guest", &[], || under_reclaim(SOFT, &["--check-guest-tlb"])),
        case("reset_waits_for_a_slow_importer_and_not_for_a_silent_one", &[], slow_importer),
        case("reset_empties_the_balloon_and_the_guest_fills_it_again", &[], balloon),
    ];
    each.chain(pressed).chain(alone).collect()
}

/// Has the machine reset, and waits until it has been; how long that took.
fn reset(client: &mut Client) -> Result<Duration, Failed> {
    let begun = Instant::now();
    client.send("system_reset", json!({}))?;
    let (mut answered, mut told) = (false, None);
    loop {
        let said = client.receive()?;
        if said["event"] == "RESET" {
            let data = json!({"guest": false, "reason": "host-qmp-system-reset"});
            ensure!(said["data"] == data && told.is_none(), "another reset: {said}");
            told = Some(begun.elapsed());
        } else if said.get("event").is_none() {
            ensure!(said == json!({"return": {}}), "system_reset: {said}");
            answered = true;
        }
        if let Some(took) = told.filter(|_| answered) {
            return Ok(took);
        }
    }
}

/// What a command returns, whatever events come before.
fn call(client: &mut Client, command: &str, arguments: Value) -> Result<Value, Failed> {
    let mut said = client.outcome(command, arguments)?;
    ensure!(said.get("return").is_some(), "{command}: {said}");
    Ok(said["return"].take())
}

/// A number of what a command shows.
fn number(client: &mut Client, command: &str, place: &str) -> Result<u64, Failed> {
    let shown = call(client, command, json!({}))?;
    Ok(shown.pointer(place).and_then(Value::as_u64).ok_or_else(|| format!("no {place}: {shown}"))?)
}

/// Waits until a number is at least `least`.
fn wait_for(client: &mut Client, command: &str, place: &str, least: u64) -> Verdict {
    let begun = Instant::now();
    loop {
        let now = number(client, command, place)?;
        if now >= least {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "{place} does not come to {least}: it is {now}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A guest with these options, to which `body` happens. It has ended so, after so many resets, and the one that began last has left
/// nothing that the audit finds.
fn ends(
    way: Way,
    options: &[&str],
    (end, resets): (End, u64),
    body: impl FnOnce(&Running, &mut Client) -> Verdict,
) -> Result<Outcome, Failed> {
    let running = Running::start(way, options)?;
    let mut client = running.client()?;
    let done = body(&running, &mut client);
    if done.is_err() {
        // It may be gone: what it said is wanted.
        drop(client.outcome("quit", json!({})));
    }
    let run = running.end()?;
    done.map_err(|why| format!("{}:\n{run}", why.message().unwrap_or_default()))?;
    ensure!(run.end == end && !run.stderr.contains("audit:"), "the guest came to harm:\n{run}");
    ensure!(run.stderr.contains(&format!(" resets={resets}")), "resets are not counted:\n{run}");
    Ok(run)
}

/// What the guest that began last has said: the one before may have been cut off within a line.
fn last_said(run: &Outcome) -> Vec<String> {
    let text = String::from_utf8_lossy(&run.stdout);
    let last = text.rfind(BOOT).map_or("", |at| &text[at..]);
    last.lines().map(|line| line.trim_end().to_owned()).filter(|line| line.starts_with("pager:")).collect()
}

/// Reset before it says a word, when its kernel has begun, and in the middle of its work; and what the last one says, in which are
/// sums over all that it did, is what one says that was never reset.
fn anew(way: Way) -> Verdict {
    /// After this it is in the middle of its work, and far from its end.
    const WORKS: Duration = Duration::from_millis(20);
    let slow = way.needs.contains(&Need::Kvm);
    let append = if slow { "workload=kmap scale=20 hz=20" } else { "workload=mm scale=4000" };
    let fresh = SOFT.run(&["--mem", "48M", "--append", append])?.result_lines();
    ensure!(fresh.last().is_some_and(|line| line.starts_with(PASS)), "the guest does not pass: {fresh:#?}");
    for vcpus in ["1", "2"] {
        let options = ["--vcpus", vcpus, "--mem", "48M", "--append", append];
        let run = ends(way, &options, (End::Status(0), 3), |running, client| {
            reset(client)?;
            running.hear(BOOT, 1)?;
            reset(client)?;
            running.hear(BOOT, 2)?;
            thread::sleep(WORKS);
            reset(client).map(drop)
        })?;
        ensure!(last_said(&run) == fresh, "{vcpus} vCPUs: another guest than {fresh:#?}:\n{run}");
    }
    Ok(())
}

fn stopped(way: Way) -> Verdict {
    let options = ["--append", "workload=spin scale=4000"];
    let run = ends(way, &options, (status::QUIT, 1), |running, client| {
        running.hear(BOOT, 1)?;
        client.told("stop", "STOP")?;
        reset(client)?;
        let status = call(client, "query-status", json!({}))?;
        ensure!(status == json!({"status": "prelaunch", "running": false}), "it is {status}");
        let thread = call(client, "query-cpus-fast", json!({}))?[0]["thread-id"].take();
        // On a slow host it is some ticks from RESET until its thread sleeps; one that runs has 20 each time.
        let begun = Instant::now();
        loop {
            let (before, pages) = (spent(&thread)?, number(client, "x-memory", "/resident")?);
            thread::sleep(Duration::from_millis(200));
            ensure!(number(client, "x-memory", "/resident")? == pages, "the guest touches its memory");
            let ticks = spent(&thread)? - before;
            if ticks <= 2 {
                break;
            }
            ensure!(begun.elapsed() < PATIENCE, "the vCPU runs for {ticks} ticks while it is to stand");
        }
        ensure!(running.said().matches(BOOT).count() == 1, "the guest says something");
        client.told("cont", "RESUME")?;
        running.hear(BOOT, 2)?;
        call(client, "quit", json!({})).map(drop)
    });
    run.map(drop)
}

/// Disk requests, swap-ins, closed gates: all of it is under way when the reset comes.
fn under_reclaim(way: Way, more: &[&str]) -> Verdict {
    let slow = way.needs.contains(&Need::Kvm);
    let (append, rounds, refaults) =
        if slow { ("workload=kmap scale=60 hz=20", 2, 5) } else { ("scale=200 pace=fast", 3, 500) };
    let memory =
        if slow { ["--frames", "1408K", "--low", "512K"] } else { ["--frames", "3M", "--low", "1M"] };
    let options = [&["--vcpus", "2", "--append", append][..], &memory, more].concat();
    let run = ends(way, &options, (End::Status(0), rounds), |_, client| {
        let mut swapped = 0;
        for round in 1..=rounds {
            let before = number(client, "x-counters", "/memory/refaults")?;
            wait_for(client, "x-counters", "/memory/refaults", before + refaults)?;
            reset(client)?;
            let counters = call(client, "x-counters", json!({}))?;
            ensure!(counters["resets"] == round, "another count: {counters}");
            let outs = counters["memory"]["swap_outs"].as_u64();
            ensure!(outs > Some(swapped), "counters have begun anew, or nothing was swapped: {counters}");
            swapped = outs.unwrap_or(0);
        }
        Ok(())
    })?;
    ensure!(last_said(&run).last().is_some_and(|line| line.starts_with(PASS)), "it does not pass:\n{run}");
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
    ensure!(writer.stats().pages == u64::from(PAGES), "not each was asked for once: {:?}", writer.stats());
    ensure!(number(&mut guest.qmp, "x-memory", "/export/imported")? == 0, "a page is still imported");
    let mut bytes = [1; 6];
    for page in FIRST..FIRST + PAGES {
        attachment.read(page, 0, &mut bytes)?;
        ensure!(bytes == [0; 6], "page {page:#x} is {bytes:?}");
    }
    attachment.write(FIRST, 0, b"after")?;
    drop((attachment, access, writer));
    guest.end()
}

/// The next guest does not begin while an importer has a page of the last: until it says so, or is out of time and fenced.
fn slow_importer() -> Verdict {
    const DELAY: Duration = Duration::from_millis(100);
    const DEADLINE: Duration = Duration::from_millis(500);
    let mut guest = Exporting::start(SOFT, &["--export-deadline", "500ms", "--export-policy", "keep"])?;
    // The first one's segment may still be there when the second has its own.
    for (first, delay, least, late) in [(FIRST, DELAY, DELAY, 0), (FIRST + PAGES, 4 * DEADLINE, DEADLINE, 1)]
    {
        let importer = guest.importer_with(Manners { ack_delay: delay })?;
        let segment = importer.make(first, PAGES, true)?;
        let access = importer.get(segment, true)?;
        let attachment = importer.attach(&access, first, PAGES)?;
        attachment.write(first, 0, b"before")?;
        let took = reset(&mut guest.qmp)?;
        ensure!(took >= least, "a reset took {took:?}, with an importer that takes {delay:?}");
        ensure!(took < PATIENCE, "a reset took {took:?}");
        let shown = call(&mut guest.qmp, "x-memory", json!({}))?;
        ensure!(shown["export"]["imported"] == 0, "a page is still imported: {shown}");
        ensure!(shown["export"]["late"] == late, "not {late} were late: {shown}");
        let mut bytes = [1; 6];
        attachment.read(first, 0, &mut bytes)?;
        ensure!(bytes == [0; 6], "an importer that takes {delay:?} reads {bytes:?}");
    }
    guest.end()
}

/// What a process has: the names of its threads, and what its descriptors are. A command that takes long has a thread for as long.
fn owned(process: &Value) -> Result<(Vec<String>, Vec<String>), Failed> {
    let begun = Instant::now();
    loop {
        let mut threads = Vec::new();
        for entry in fs::read_dir(format!("/proc/{process}/task"))? {
            // It may have ended meanwhile.
            threads.extend(fs::read_to_string(entry?.path().join("comm")).ok());
        }
        if !threads.iter().any(|name| name == "control\n") {
            let links = fs::read_dir(format!("/proc/{process}/fd"))?;
            let link = |entry: std::io::Result<fs::DirEntry>| Ok(fs::read_link(entry?.path())?);
            let files: Result<Vec<_>, Failed> = links.map(link).collect();
            let mut files: Vec<_> = files?.iter().map(|path| path.to_string_lossy().into_owned()).collect();
            threads.sort();
            files.sort();
            return Ok((threads, files));
        }
        ensure!(begun.elapsed() < PATIENCE, "a command does not end: {threads:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What the guest has that stands after a reset, and the frames that are free.
fn left(client: &mut Client) -> Result<([u64; 4], u64), Failed> {
    let shown = call(client, "x-memory", json!({}))?;
    let number = |name: &str| shown[name].as_u64().ok_or_else(|| format!("no {name}: {shown}"));
    let pages = [number("resident")?, number("swapped")?, number("ballooned")?, number("pinned")?];
    Ok((pages, number("frames-free")?))
}

/// Each later in a guest's life than the one before, with reclaim and two vCPUs.
fn many(way: Way) -> Verdict {
    /// Tables of roots keep their frames.
    const ROOTS: u64 = 2 * 128;
    let slow = way.needs.contains(&Need::Kvm);
    let (append, times) =
        if slow { ("workload=mm scale=400 hz=20", 10) } else { ("scale=200 pace=fast", 20) };
    let frames = if slow { ["--frames", "2M", "--low", "512K"] } else { ["--frames", "3M", "--low", "1M"] };
    let options = ["--vcpus", "2", "--mem", "48M", "--append", append];
    let run =
        ends(way, &[&options[..], &frames].concat(), (status::QUIT, times as u64), |running, client| {
            running.hear(BOOT, 1)?;
            let process = call(client, "query-cpus-fast", json!({}))?[0]["thread-id"].take();
            let stand = |client: &mut Client| {
                client.told("stop", "STOP")?;
                reset(client)?;
                Ok::<_, Failed>((left(client)?, owned(&process)?))
            };
            let (first, had) = stand(client)?;
            client.told("cont", "RESUME")?;
            for round in 2..times {
                running.hear(BOOT, round)?;
                thread::sleep(Duration::from_millis(4 * round as u64));
                reset(client)?;
            }
            running.hear(BOOT, times)?;
            let (last, has) = stand(client)?;
            ensure!(
                first.0[1..] == [0; 3] && first.0 == last.0,
                "pages are left behind: {first:?}, {last:?}"
            );
            ensure!(last.1 + ROOTS >= first.1, "frames are lost: {first:?}, {last:?}");
            ensure!(had == has, "descriptors or threads are left behind: {had:?}, {has:?}");
            call(client, "quit", json!({})).map(drop)
        });
    run.map(drop)
}

fn balloon() -> Verdict {
    const KEPT: u64 = 40 << 20;
    let actual = |client: &mut Client| number(client, "query-balloon", "/actual");
    let reached = |client: &mut Client| -> Verdict {
        let begun = Instant::now();
        while actual(client)? != KEPT {
            ensure!(begun.elapsed() < PATIENCE, "the guest does not give memory up: {}", actual(client)?);
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    let options = ["--mem", "64M", "--append", "workload=spin scale=4000"];
    let run = ends(SOFT, &options, (status::QUIT, 1), |_, client| {
        call(client, "balloon", json!({ "value": KEPT }))?;
        reached(client)?;
        ensure!(number(client, "x-memory", "/ballooned")? > 0, "no page has been given up");
        call(client, "stop", json!({}))?;
        reset(client)?;
        let has = actual(client)?;
        ensure!(has == 64 << 20, "the guest has less than all of its memory: {has}");
        ensure!(number(client, "x-memory", "/ballooned")? == 0, "pages are still given up");
        call(client, "cont", json!({}))?;
        reached(client)?;
        call(client, "quit", json!({})).map(drop)
    });
    run.map(drop)
}

/// A small guest finds a board and memory that nobody has touched, and a reset of its own is the end, as it is where nobody has
/// reset it before.
fn by_the_guest(way: Way) -> Verdict {
    let slow = way.needs.contains(&Need::Kvm);
    // The better part of a second.
    let turns = if slow { 1_000_000_u32 } else { 60_000_000 };
    let code = [
        // The UART's scratch register, and a word of memory: 0, or it ends with 9.
        &[0x66, 0xba, 0xff, 0x03][..], //                           mov dx, 0x3ff
        &[0xec, 0x0f, 0xb6, 0xc0],     //                               in al, dx; movzx eax, al
        &[0x0b, 0x05, 0x00, 0x00, 0x20, 0x00], //                   or eax, [0x200000]
        &[0x74, 0x04, 0xb0, 0x09, 0xe6, 0xf4], //                   jz over: mov al, 9; out 0xf4, al
        &[0xb0, 0x5a, 0xee],           //                                     mov al, 0x5a; out dx, al
        &[0xc7, 0x05, 0x00, 0x00, 0x20, 0x00, 0x5a, 0, 0, 0], //    mov dword [0x200000], 0x5a
        &image::print(b"marked"),
        &[0xb9],
        &turns.to_le_bytes(), //                                    mov ecx, turns
        &[0x49, 0x75, 0xfd],  //                                    dec ecx; jnz the dec
        &image::reset_by_port(),
    ];
    let image = file_of(&image::multiboot(&code.concat()))?;
    let run = ends(way, &[&image.path().to_string_lossy()], (status::RESET, 1), |running, client| {
        running.hear("marked", 1)?;
        reset(client)?;
        let told = client.receive()?;
        ensure!(told["data"] == json!({"guest": true, "reason": "guest-reset"}), "another end: {told}");
        Ok(())
    });
    run.map(drop)
}
