//! The control socket of a running guest: driven by hand, and by the client that QEMU's people publish.
//!
//! Holds: whatever a test finds, its guest ends at its time limit.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::umbra::{KVM, SOFT, Way, file_of, judge, limit, status, umbra_heard};
use crate::ensure;
use crate::support::host::{self, Need};
use crate::support::process::{self, Outcome, Said};
use crate::support::{Verdict, case, image};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let driven = [KVM, SOFT]
        .map(|way| case(format!("qmp_drives_a_running_guest_{}", way.name), way.needs, move || driven(way)));
    let mut cases = Vec::from(driven);
    cases.push(case("qmp_drives_three_vcpus_of_which_one_runs", &[], several));
    cases.push(case("qmp_time_stands_still_with_the_guest", &[], time_stands_still));
    cases.push(case("qmp_end_of_a_guest_is_told", &[], end_is_told));
    cases.push(case("qmp_package_of_qemu_drives_a_running_guest", &[Need::Qmp], by_package));
    cases
}

/// A guest that runs beside the test.
pub(super) struct Running {
    folder: TempDir,
    said: Said,
    run: thread::JoinHandle<Result<Outcome, Failed>>,
}

impl Running {
    pub(super) fn start(way: Way, options: &[&str]) -> Result<Running, Failed> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("s").to_str().ok_or("a name that is not UTF-8")?.to_owned();
        // Before the one that starts it loses its patience.
        let limit = format!("{}s", limit().as_secs() - 30);
        let mut args = vec!["run".to_owned(), "--qmp".into(), socket, "--timeout".into(), limit];
        args.extend(way.options.iter().chain(options).map(|word| (*word).to_owned()));
        let said = Said::default();
        let heard = said.clone();
        Ok(Running { folder, said, run: thread::spawn(move || umbra_heard(args, &heard)) })
    }

    /// What the guest has said so far.
    pub(super) fn said(&self) -> String {
        self.said.text()
    }

    /// Waits until the guest has said `words` so many times.
    pub(super) fn hear(&self, words: &str, times: usize) -> Verdict {
        let begun = Instant::now();
        while self.said().matches(words).count() < times {
            let waits = begun.elapsed() < PATIENCE && !self.run.is_finished();
            ensure!(waits, "'{words}' was not said {times} times:\n{}", self.said());
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    pub(super) fn client(&self) -> Result<Client, Failed> {
        Client::connect(&self.folder.path().join("s"), || !self.run.is_finished())
    }

    pub(super) fn has_ended(&self) -> bool {
        self.run.is_finished()
    }

    pub(super) fn end(self) -> Result<Outcome, Failed> {
        self.run.join().map_err(|_| "the runner has panicked")?
    }
}

pub(super) struct Client {
    stream: UnixStream,
    input: BufReader<UnixStream>,
}

impl Client {
    /// One of the guest behind `path`, once it listens; it is waited for while it `lives`.
    pub(super) fn connect(path: &Path, mut lives: impl FnMut() -> bool) -> Result<Client, Failed> {
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if begun.elapsed() < PATIENCE && lives() => thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(format!("nobody listens: {error}").into()),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Client { input: BufReader::new(stream.try_clone()?), stream };
        let greeting = client.receive()?;
        ensure!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "no greeting: {greeting}");
        client.call("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    pub(super) fn receive(&mut self) -> Result<Value, Failed> {
        let mut line = String::new();
        self.input.read_line(&mut line)?;
        Ok(serde_json::from_str(&line).map_err(|error| format!("'{line}': {error}"))?)
    }

    pub(super) fn send(&mut self, command: &str, arguments: Value) -> Verdict {
        let command = json!({"execute": command, "arguments": arguments});
        Ok(self.stream.write_all(command.to_string().as_bytes())?)
    }

    /// What a command returns that no event comes before.
    pub(super) fn call(&mut self, command: &str, arguments: Value) -> Result<Value, Failed> {
        self.send(command, arguments)?;
        let mut answer = self.receive()?;
        ensure!(answer.get("return").is_some(), "{command}: {answer}");
        Ok(answer["return"].take())
    }

    /// What a command comes to, an error too, whatever events come before.
    pub(super) fn outcome(&mut self, command: &str, arguments: Value) -> Result<Value, Failed> {
        self.send(command, arguments)?;
        loop {
            let answer = self.receive()?;
            if answer.get("event").is_none() {
                return Ok(answer);
            }
        }
    }

    fn ask(&mut self, command: &str) -> Result<Value, Failed> {
        self.call(command, json!({}))
    }

    fn event(&mut self, name: &str) -> Result<Value, Failed> {
        let event = self.receive()?;
        ensure!(event["event"] == name && event["timestamp"]["seconds"].is_u64(), "no {name}: {event}");
        Ok(event)
    }

    /// A command, and the event that comes before its answer.
    pub(super) fn told(&mut self, command: &str, event: &str) -> Verdict {
        self.send(command, json!({}))?;
        self.event(event)?;
        let answer = self.receive()?;
        ensure!(answer == json!({"return": {}}), "{command}: {answer}");
        Ok(())
    }
}

/// Processor time of a thread, in ticks.
pub(super) fn spent(thread: &Value) -> Result<u64, Failed> {
    let stat = fs::read_to_string(format!("/proc/{thread}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').ok_or("no stat")?;
    let fields: Vec<u64> = fields.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
    Ok(fields[11] + fields[12])
}

fn driven(way: Way) -> Verdict {
    let guest = ["--name", "e2e", "--mem", "32M", "--frames", "32M", "--append", "workload=spin scale=4000"];
    let running = Running::start(way, &guest)?;
    let mut client = running.client()?;
    client.told("stop", "STOP")?;
    ensure!(client.ask("query-status")? == json!({"status": "paused", "running": false}), "it is not paused");
    ensure!(client.ask("query-name")? == json!({"name": "e2e"}), "it has another name");
    let thread = client.ask("query-cpus-fast")?[0]["thread-id"].take();
    let before = spent(&thread)?;
    thread::sleep(Duration::from_millis(500));
    let stood = spent(&thread)? - before;
    ensure!(stood <= 5, "the vCPU ran for {stood} ticks while it stood still");
    memory(&mut client)?;
    let explained = client.call("x-explain", json!({"gva": 0xc010_1000_u32}))?;
    ensure!(explained["lines"].is_array(), "no explanation: {explained}");
    client.told("cont", "RESUME")?;
    ensure!(client.ask("query-status")? == json!({"status": "running", "running": true}), "it does not run");
    let begun = Instant::now();
    while spent(&thread)? < before + 5 {
        ensure!(begun.elapsed() < PATIENCE, "the vCPU does not run on");
        thread::sleep(Duration::from_millis(1));
    }
    client.ask("quit")?;
    let end = client.event("SHUTDOWN")?;
    ensure!(end["data"] == json!({"guest": false, "reason": "host-qmp-quit"}), "another end: {end}");
    let run = running.end()?;
    ensure!(run.end == status::QUIT, "quit ends with another status:\n{run}");
    Ok(())
}

/// One spins, one is halted for good, and one waits for a start-up: all stand still and answer.
fn several() -> Verdict {
    let guest = [image::start_second_cpu(), image::spin()].concat();
    let image = file_of(&image::multiboot(&guest))?;
    let path = image.path().to_str().ok_or("a name that is not UTF-8")?;
    let running = Running::start(SOFT, &["--vcpus", "3", path])?;
    let mut client = running.client()?;
    let threads = |client: &mut Client| -> Result<Vec<Value>, Failed> {
        let cpus = client.ask("query-cpus-fast")?;
        let list = cpus.as_array().ok_or("no list of vCPUs")?;
        let indexes: Vec<_> = list.iter().map(|cpu| cpu["cpu-index"].as_u64()).collect();
        ensure!(indexes == [Some(0), Some(1), Some(2)], "not three vCPUs: {cpus}");
        Ok(list.iter().map(|cpu| cpu["thread-id"].clone()).collect())
    };
    let runs_on = |thread: &Value, from: u64| -> Verdict {
        let begun = Instant::now();
        while spent(thread)? < from + 5 {
            ensure!(begun.elapsed() < PATIENCE, "the first vCPU does not run");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    let ids = loop {
        let ids = threads(&mut client)?;
        if ids.iter().all(|id| *id != json!(0)) {
            break ids;
        }
    };
    ensure!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2], "vCPUs share a thread: {ids:?}");
    runs_on(&ids[0], 0)?;
    client.told("stop", "STOP")?;
    let before = spent(&ids[0])?;
    for vcpu in 0..3 {
        let explained = client.call("x-explain", json!({"gva": 0x8000, "vcpu": vcpu}))?;
        ensure!(explained["vcpu"] == vcpu && explained["lines"].is_array(), "no explanation: {explained}");
    }
    client.send("x-explain", json!({"gva": 0x8000, "vcpu": 3}))?;
    let refused = client.receive()?;
    let words = refused["error"]["desc"].as_str().unwrap_or_default();
    ensure!(words.contains("no vCPU 3") && words.contains("has 3"), "another refusal: {refused}");
    thread::sleep(Duration::from_millis(200));
    ensure!(spent(&ids[0])? <= before + 5, "the first vCPU ran while it stood still");
    client.told("cont", "RESUME")?;
    runs_on(&ids[0], before)?;
    ensure!(threads(&mut client)? == ids, "the vCPUs have other threads");
    // Running or not, halted or not, each answers.
    for vcpu in 0..3 {
        client.call("x-explain", json!({"gva": 0x8000, "vcpu": vcpu}))?;
    }
    client.ask("quit")?;
    client.event("SHUTDOWN")?;
    let run = running.end()?;
    ensure!(run.end == status::QUIT, "quit ends with another status:\n{run}");
    Ok(())
}

/// Budgets, and the commands that show where pages are.
fn memory(client: &mut Client) -> Verdict {
    let frames = client.ask("x-frames")?;
    let least = frames["budget-min"].as_u64().ok_or("no smallest budget")?;
    let cut = client.call("x-frames", json!({ "bytes": least }))?;
    ensure!(cut["budget"] == least, "the budget is not what was asked for: {cut}");
    client.send("x-frames", json!({"bytes": least - 4096}))?;
    let refused = client.receive()?;
    let words = refused["error"]["desc"].as_str().unwrap_or_default();
    ensure!(words.contains(&least.to_string()), "the smallest budget is not named: {refused}");
    client.call("x-page-out", json!({"gpa": 0, "bytes": 32 << 20}))?;
    let shown = client.ask("x-memory")?;
    let number = |name: &str| shown[name].as_u64().unwrap_or(0);
    let sum = ["resident", "swapped", "zero", "ballooned"].map(number).iter().sum::<u64>();
    // Pages of devices are none of these.
    let pages = number("guest-pages");
    ensure!(sum <= pages && sum + 64 > pages && number("budget") == least / 4096, "wrong numbers: {shown}");
    let counters = client.ask("x-counters")?;
    ensure!(counters["memory"]["guest_pages"] == pages, "wrong counters: {counters}");
    Ok(())
}

/// The guest's own clock, by its own report, does not count what it stood still for.
fn time_stands_still() -> Verdict {
    const STOP: Duration = Duration::from_secs(3);
    let running = Running::start(SOFT, &["--append", "workload=spin scale=400 hz=1000"])?;
    let mut client = running.client()?;
    client.told("stop", "STOP")?;
    thread::sleep(STOP);
    client.told("cont", "RESUME")?;
    let end = client.event("SHUTDOWN")?;
    ensure!(end["data"] == json!({"guest": true, "reason": "guest-shutdown"}), "another end: {end}");
    let run = running.end()?;
    ensure!(run.end == process::End::Status(0) && run.took >= STOP, "the guest came to harm:\n{run}");
    let lines = run.lines();
    let counted = lines.iter().find_map(|line| line.strip_prefix("time: end spin.loop tsc1024="));
    let counted: u64 = counted.ok_or("the guest has timed nothing")?.parse()?;
    // The time-stamp counter counts nanoseconds.
    let guest = Duration::from_nanos(counted * 1024);
    ensure!(guest + STOP <= run.took + Duration::from_millis(100), "the guest counted {guest:?}:\n{run}");
    Ok(())
}

fn end_is_told() -> Verdict {
    let running = Running::start(SOFT, &["--append", "workload=spin scale=100"])?;
    let mut client = running.client()?;
    let end = client.event("SHUTDOWN")?;
    ensure!(end["data"] == json!({"guest": true, "reason": "guest-shutdown"}), "another end: {end}");
    running.end().map(drop)
}

/// What the package's own client makes of us. It checks each message's shape itself.
const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import ExecuteError, QMPClient

async def connect(path):
    for _ in range(1000):
        client = QMPClient("umbra")
        try:
            await client.connect(path)
            return client
        except Exception as error:
            last = error
            await asyncio.sleep(0.01)
    raise last

async def main(path):
    qmp = await connect(path)
    with qmp.listener(("STOP", "RESUME", "RESET", "SHUTDOWN")) as events:
        names = {command["name"] for command in await qmp.execute("query-commands")}
        assert {"stop", "cont", "quit", "x-memory"} <= names, names
        await qmp.execute("stop")
        assert (await events.get())["event"] == "STOP"
        assert (await qmp.execute("query-status"))["status"] == "paused"
        try:
            await qmp.execute("balloon", {"value": "much"})
            raise AssertionError("a word is no number")
        except ExecuteError as error:
            assert error.error_class == "GenericError", error
        actual = (await qmp.execute("query-balloon"))["actual"]
        assert await qmp.execute("balloon", {"value": actual}) == {}
        answers = await asyncio.gather(*(qmp.execute("query-name") for _ in range(100)))
        assert answers == [{"name": "packaged"}] * 100, answers
        assert await qmp.execute("system_reset") == {}
        reset = await events.get()
        assert reset["event"] == "RESET", reset
        assert reset["data"] == {"guest": False, "reason": "host-qmp-system-reset"}, reset
        assert (await qmp.execute("query-status"))["status"] == "prelaunch"
        await qmp.execute("cont")
        assert (await events.get())["event"] == "RESUME"
        await qmp.execute("quit")
        end = await events.get()
        assert end["data"] == {"guest": False, "reason": "host-qmp-quit"}, end
    try:
        await qmp.disconnect()
    except EOFError:
        pass
    print("well")

asyncio.run(main(sys.argv[1]))
"#;

fn by_package() -> Verdict {
    let environment = host::take_qmp_client().ok_or("the environment is gone")?;
    let running = Running::start(SOFT, &["--name", "packaged", "--append", "workload=spin scale=4000"])?;
    let script = python(environment.path(), &running.folder.path().join("s"))?;
    ensure!(script.lines() == ["well"], "the client has found a mistake:\n{script}");
    let run = running.end()?;
    ensure!(run.end == status::QUIT, "another end:\n{run}");
    Ok(())
}

fn python(environment: &Path, socket: &Path) -> Result<Outcome, Failed> {
    let mut command = Command::new(environment.join("python/bin/python"));
    judge(process::run(command.args(["-c", SCRIPT]).arg(socket), PATIENCE)?)
}
