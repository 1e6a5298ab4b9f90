//! Tests of the control socket: real sockets and the real event loop, and a stand-in for the vCPU's thread.

use std::io::{BufRead, BufReader};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread;

use serde_json::json;
use umbra_mmu::{Config, Context, Gfn, LocalStack, Machine, NoVcpus};

use super::*;
use crate::board::{Board, BoardConfig, MemoryMap};
use crate::vm::ending::End;
use crate::vm::events::{EventLoop, Subscriber};
use crate::vm::stops::Duty;

mod clients;
mod memory;
mod run;

/// Longer than anything takes on a busy host.
const LONG: Duration = Duration::from_secs(20);

/// A control socket that is being served.
struct Rig {
    dir: tempfile::TempDir,
    parts: Parts,
    events: Option<EventLoop>,
}

/// What a guest is made of, but for its vCPU.
#[derive(Clone)]
struct Parts {
    ending: Ending,
    requests: Arc<Requests>,
    devices: Arc<Devices>,
    mmu: Arc<Mmu>,
    stops: Arc<Stops>,
    news: Arc<News>,
}

fn devices() -> Arc<Devices> {
    let memory = MemoryMap::new(2 << 20).expect("a map");
    let config = BoardConfig { memory, vcpus: 1, serial: Box::new(io::sink()), epoch_seconds: 0 };
    let board = Board::new(config).expect("a board");
    Arc::new(Devices::new(board).expect("a timer"))
}

impl Parts {
    fn new() -> Parts {
        let devices = devices();
        let config = Config { shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(1024) };
        let mmu = Mmu::new(Machine::anonymous(2048), config, Box::new(NoVcpus));
        let news = Arc::new(News::default());
        Parts {
            ending: Ending::new(Arc::clone(&devices)),
            requests: Arc::new(Requests::new(1)),
            devices: Arc::clone(&devices),
            mmu: Arc::new(mmu.with_swap(Box::new(umbra_mmu::swap::MemorySwap::new(1024)))),
            stops: Arc::new(Stops::new(Arc::clone(&devices), Arc::clone(&news))),
            news,
        }
    }

    fn controls(&self) -> Controls {
        let Parts { ending, requests, devices, mmu, stops, news } = self.clone();
        Controls {
            ending,
            requests,
            devices,
            mmu,
            stops,
            news,
            balloon: None,
            name: None,
            threads: Arc::new([AtomicI32::new(7)]),
            swap: true,
            swap_in_memory: true,
            pool: None,
            answer_wait: Duration::from_millis(300),
            exporter: None,
        }
    }
}

impl Rig {
    fn new() -> Rig {
        Rig::with(|_| {})
    }

    /// With other controls than usual.
    fn with(change: impl FnOnce(&mut Controls)) -> Rig {
        let parts = Parts::new();
        let mut controls = parts.controls();
        change(&mut controls);
        let dir = tempfile::tempdir().expect("a directory");
        let socket = ControlSocket::bind(&dir.path().join("s"), controls).expect("a socket");
        let others: Vec<Subscriber> = vec![Box::new(socket)];
        let events =
            EventLoop::start(Arc::clone(&parts.devices), parts.ending.clone(), None, others).expect("a loop");
        Rig { dir, parts, events: Some(events) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn connect(&self) -> Peer {
        let stream = UnixStream::connect(self.path()).expect("a listener");
        stream.set_read_timeout(Some(LONG)).expect("a limit");
        Peer { input: BufReader::new(stream.try_clone().expect("a descriptor")), stream }
    }

    /// A client that has taken the greeting.
    fn client(&self) -> Peer {
        let mut peer = self.connect();
        let greeting = peer.receive().expect("a greeting");
        assert!(greeting.pointer("/QMP/version/qemu/major").is_some_and(Value::is_u64), "{greeting}");
        peer
    }

    fn negotiated(&self) -> Peer {
        let mut peer = self.client();
        assert_eq!(peer.call("{\"execute\":\"qmp_capabilities\"}"), json!({"return": {}}));
        peer
    }

    /// Does what a vCPU's thread does, but for running a guest, until the run ends.
    fn vcpu(&self) -> JoinHandle<()> {
        let parts = self.parts.clone();
        thread::spawn(move || {
            let vcpu = parts.mmu.vcpu(0);
            while !parts.ending.is_set() {
                parts.requests.serve(&parts.mmu, &vcpu);
                match parts.stops.duty(0) {
                    Duty::Forget => parts.stops.has_forgotten(0),
                    Duty::PowerOn => parts.stops.has_begun_anew(),
                    Duty::Run | Duty::Stand => parts.devices.sleep(0),
                }
            }
            parts.stops.end();
        })
    }

    /// Ends the run as `vm::run` does.
    fn end(&mut self) {
        if let Some(cause) = self.parts.ending.shutdown_cause() {
            self.parts.news.shutdown(cause);
        }
        drop(self.events.take());
    }
}

struct Peer {
    stream: UnixStream,
    input: BufReader<UnixStream>,
}

impl Peer {
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("the server reads");
    }

    /// The next line; `None` at the end of the connection.
    fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        let count = self.input.read_line(&mut line).ok()?;
        (count != 0).then(|| serde_json::from_str(&line).expect("JSON"))
    }

    fn call(&mut self, line: &str) -> Value {
        self.send(format!("{line}\n"));
        self.receive().expect("an answer")
    }

    /// What a command without arguments returns.
    fn ask(&mut self, name: &str) -> Value {
        let mut answer = self.call(&json!({ "execute": name }).to_string());
        assert!(answer.get("return").is_some(), "{name}: {answer}");
        answer["return"].take()
    }

    /// The answer to a command with arguments.
    fn with(&mut self, name: &str, arguments: Value) -> Value {
        self.call(&json!({"execute": name, "arguments": arguments}).to_string())
    }

    /// The name of the next event.
    fn event(&mut self) -> String {
        let event = self.receive().expect("an event");
        assert!(event["timestamp"]["seconds"].is_u64(), "{event}");
        event["event"].as_str().expect("an event").to_owned()
    }
}

/// Class and description of an error.
fn refused(answer: &Value) -> (&str, &str) {
    let part = |name| answer["error"][name].as_str().unwrap_or_else(|| panic!("no error: {answer}"));
    (part("class"), part("desc"))
}
