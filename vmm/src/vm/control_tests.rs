//! Tests of the control socket: real sockets and the real event loop, and a stand-in for the vCPU's thread.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use umbra_mmu::{Config, Machine, Mmu, coherence::NoVcpus};

use super::*;
use crate::board::{Board, BoardConfig, MemoryMap};
use crate::vm::events::{EventLoop, Subscriber};

/// A control socket that is being served.
struct Rig {
    dir: tempfile::TempDir,
    ending: Ending,
    requests: Arc<Requests>,
    events: Option<EventLoop>,
}

fn devices() -> Arc<Devices> {
    let memory = MemoryMap::new(2 << 20).expect("a map");
    let config = BoardConfig { memory, vcpus: 1, serial: Box::new(io::sink()), epoch_seconds: 0 };
    let board = Board::new(config).expect("a board");
    Arc::new(Devices::new(board, 1).expect("a timer"))
}

impl Rig {
    fn new() -> Rig {
        let devices = devices();
        let ending = Ending::new(Arc::clone(&devices), 1);
        let requests = Arc::new(Requests::default());
        let controls = Controls {
            ending: ending.clone(),
            requests: Arc::clone(&requests),
            devices: Arc::clone(&devices),
        };
        let dir = tempfile::tempdir().expect("a directory");
        let socket = ControlSocket::bind(&dir.path().join("s"), controls).expect("a socket");
        let others: Vec<Subscriber> = vec![Box::new(socket)];
        let events = EventLoop::start(devices, ending.clone(), None, others).expect("a loop");
        Rig { dir, ending, requests, events: Some(events) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// A client that has taken the greeting.
    fn client(&self) -> Peer {
        let stream = UnixStream::connect(self.path()).expect("a listener");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
        let mut peer = Peer { input: BufReader::new(stream.try_clone().expect("a descriptor")), stream };
        let greeting = peer.receive().expect("a greeting");
        assert!(greeting.pointer("/QMP/version/qemu/major").is_some_and(Value::is_u64));
        peer
    }

    fn negotiated(&self) -> Peer {
        let mut peer = self.client();
        assert_eq!(peer.call("{\"execute\":\"qmp_capabilities\"}"), json!({"return": {}}));
        peer
    }

    /// Answers questions as a vCPU's thread does, until the run ends.
    fn vcpu(&self) -> JoinHandle<()> {
        let (ending, requests) = (self.ending.clone(), Arc::clone(&self.requests));
        thread::spawn(move || {
            let config = Config { shadow_pages_max: 64, roots_max: 8, ..Config::of_pages(16) };
            let mmu = Mmu::new(Machine::anonymous(256), config, Box::new(NoVcpus));
            let vcpu = mmu.vcpu(0);
            while !ending.is_set() {
                requests.serve(&mmu, &vcpu);
                thread::yield_now();
            }
        })
    }
}

struct Peer {
    stream: UnixStream,
    input: BufReader<UnixStream>,
}

impl Peer {
    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).expect("the server reads");
    }

    /// The next line; `None` at the end of the connection.
    fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        let count = self.input.read_line(&mut line).ok()?;
        (count != 0).then(|| serde_json::from_str(&line).expect("JSON"))
    }

    fn call(&mut self, line: &str) -> Value {
        self.send(&format!("{line}\n"));
        self.receive().expect("an answer")
    }

    fn class(&mut self, line: &str) -> String {
        let answer = self.call(line);
        answer.pointer("/error/class").and_then(Value::as_str).expect("an error").to_owned()
    }
}

#[test]
fn commands_before_negotiation_are_refused_and_ids_echoed() {
    let rig = Rig::new();
    let mut peer = rig.client();
    assert_eq!(peer.class("{\"execute\":\"query-status\"}"), "CommandNotFound");
    let answer = peer.call("{\"execute\":\"qmp_capabilities\",\"id\":{\"n\":[1]}}");
    assert_eq!(answer, json!({"return": {}, "id": {"n": [1]}}));
    let answer = peer.call("{\"execute\":\"nonsense\",\"id\":7}");
    assert_eq!(
        (answer["id"].as_u64(), answer["error"]["class"].as_str()),
        (Some(7), Some("CommandNotFound"))
    );
    let listed = peer.call("{\"execute\":\"query-commands\"}");
    assert_eq!(listed["return"].as_array().map(Vec::len), Some(COMMANDS.len()));
}

#[test]
fn every_listed_command_exists() {
    let rig = Rig::new();
    let vcpu = rig.vcpu();
    let mut peer = rig.negotiated();
    // The one that ends the run comes last.
    for name in COMMANDS.into_iter().filter(|name| *name != "quit").chain(["quit"]) {
        let answer = peer.call(&json!({"execute": name, "arguments": {"gva": 4096}}).to_string());
        assert!(answer.get("return").is_some(), "{name}: {answer}");
    }
    vcpu.join().expect("quit ends the vCPU");
    assert!(matches!(rig.ending.take(), Some(End::Quit)));
}

#[test]
fn what_is_no_command_gets_an_error_and_the_connection_stays() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    let deep = "[".repeat(10_000);
    for line in ["x", "7", "[]", "\"a\"", "{}", "{\"execute\":7}", "\u{0}", deep.as_str()] {
        assert_eq!(peer.class(line), "GenericError", "{:.20}", line);
    }
    for gva in ["-1", "4294967296", "\"x\"", "1.5", "null"] {
        let line = format!("{{\"execute\":\"x-explain\",\"arguments\":{{\"gva\":{gva}}}}}");
        assert_eq!(peer.class(&line), "GenericError", "{gva}");
    }
    peer.send("\n \r\n\t\n");
    assert!(peer.call("{\"execute\":\"query-status\"}").get("return").is_some());
}

#[test]
fn a_line_in_pieces_and_lines_together_are_the_same() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    for piece in ["{\"exec", "ute\":\"query-", "status\"", "}\r\n{\"execute\":\"query-version\"}\n"] {
        peer.send(piece);
        thread::sleep(Duration::from_millis(5));
    }
    assert!(peer.receive().is_some_and(|answer| answer["return"]["running"] == true));
    assert!(peer.receive().is_some_and(|answer| answer["return"]["package"].is_string()));
}

#[test]
fn a_line_without_end_costs_the_connection() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    let block = [b'x'; 4096];
    let sent = (0..1000).take_while(|_| peer.stream.write_all(&block).is_ok()).count();
    assert!(sent < 1000, "the server took 4 MB of one line");
    rig.negotiated();
}

#[test]
fn a_client_that_never_reads_is_dropped_and_others_are_served() {
    let rig = Rig::new();
    let mut deaf = rig.negotiated();
    deaf.stream.set_write_timeout(Some(Duration::from_secs(10))).expect("a limit");
    let lines = "{\"execute\":\"query-commands\"}\n".repeat(100);
    let sent = (0..10_000).take_while(|_| deaf.stream.write_all(lines.as_bytes()).is_ok()).count();
    assert!(sent < 10_000, "a million answers went somewhere");
    rig.negotiated();
}

#[test]
fn more_clients_than_the_limit_are_turned_away_and_room_comes_back() {
    let rig = Rig::new();
    let held: Vec<Peer> = (0..CLIENTS_MAX).map(|_| rig.client()).collect();
    for _ in 0..200 {
        let mut stream = UnixStream::connect(rig.path()).expect("a listener");
        assert_eq!(stream.read(&mut [0; 16]).expect("the end"), 0);
    }
    drop(held);
    // The loop sees the ends in its own time.
    for _ in 0..1000 {
        let mut stream = UnixStream::connect(rig.path()).expect("a listener");
        if stream.read(&mut [0; 16]).is_ok_and(|count| count != 0) {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("no room came back");
}

#[test]
fn a_question_that_no_vcpu_answers_ends_the_connection_and_not_the_loop() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    let question = "{\"execute\":\"x-explain\",\"arguments\":{\"gva\":1}}\n";
    peer.send(&question.repeat(20));
    assert!(peer.receive().is_some_and(|answer| answer.get("error").is_some()));
    assert_eq!(peer.receive(), None);
    rig.negotiated();
}

#[test]
fn questions_after_the_end_are_refused_at_once() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    peer.call("{\"execute\":\"quit\"}");
    let answer = peer.call("{\"execute\":\"x-explain\",\"arguments\":{\"gva\":1}}");
    assert!(answer["error"]["desc"].as_str().is_some_and(|text| text.contains("ended")));
}

#[test]
fn socket_paths_in_use_are_left_alone_and_stale_ones_replaced() {
    let mut rig = Rig::new();
    let ending = rig.ending.clone();
    let controls = || Controls { ending: ending.clone(), requests: Arc::default(), devices: devices() };
    assert!(ControlSocket::bind(&rig.path(), controls()).is_err(), "somebody listens there");
    let file = rig.dir.path().join("file");
    fs::write(&file, "precious").expect("a file");
    assert!(ControlSocket::bind(&file, controls()).is_err());
    assert_eq!(fs::read(&file).expect("still there"), b"precious");
    let stale = rig.dir.path().join("stale");
    drop(UnixListener::bind(&stale).expect("a socket"));
    assert!(ControlSocket::bind(&stale, controls()).is_ok());
    assert!(!stale.exists(), "a control socket goes with its run");
    drop(rig.events.take());
    assert!(!rig.path().exists());
}

#[test]
fn a_loop_that_is_dropped_has_dropped_its_subscribers() {
    static GONE: AtomicBool = AtomicBool::new(false);
    struct Witness;
    impl Drop for Witness {
        fn drop(&mut self) {
            GONE.store(true, Ordering::SeqCst);
        }
    }
    impl MutEventSubscriber for Witness {
        fn process(&mut self, _: Events, _: &mut EventOps) {}
        fn init(&mut self, _: &mut EventOps) {}
    }
    let rig = Rig::new();
    let events =
        EventLoop::start(devices(), rig.ending.clone(), None, vec![Box::new(Witness)]).expect("a loop");
    drop(events);
    assert!(GONE.load(Ordering::SeqCst));
}
