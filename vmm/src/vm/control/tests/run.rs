//! What commands and events say about the run.

use super::super::commands::COMMANDS;
use super::*;

#[test]
fn commands_before_negotiation_are_refused_and_ids_echoed() {
    let rig = Rig::new();
    let mut peer = rig.client();
    for name in ["query-status", "nonsense"] {
        let answer = peer.call(&json!({"execute": name, "id": "a"}).to_string());
        let words = "Expecting capabilities negotiation with 'qmp_capabilities'";
        assert_eq!((refused(&answer), &answer["id"]), (("CommandNotFound", words), &json!("a")));
    }
    let oob = peer.with("qmp_capabilities", json!({"enable": ["oob"]}));
    assert_eq!(refused(&oob), ("GenericError", "Capability oob not available"));
    for id in [json!({"n": [1]}), json!(null), json!(-7), json!("\u{e9}"), json!(false), json!(u64::MAX)] {
        let answer = peer.call(&json!({"execute": "nonsense", "id": id}).to_string());
        assert_eq!(answer["id"], id);
    }
    let answer = peer.call("{\"execute\":\"qmp_capabilities\",\"id\":{\"n\":[1]}}");
    assert_eq!(answer, json!({"return": {}, "id": {"n": [1]}}));
    let again = peer.call("{\"execute\":\"qmp_capabilities\"}");
    assert_eq!(
        refused(&again),
        ("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
    );
    let answer = peer.call("{\"execute\":\"nonsense\",\"id\":7}");
    assert_eq!((refused(&answer).1, &answer["id"]), ("The command nonsense has not been found", &json!(7)));
}

#[test]
fn wrong_arguments_and_members_are_refused_and_nothing_is_done() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    for (line, words) in [
        ("{\"execute\":\"quit\",\"arguments\":{\"x\":1}}", "Parameter 'x' is unexpected"),
        ("{\"execute\":\"quit\",\"x\":1}", "QMP input member 'x' is unexpected"),
        ("{\"exec-oob\":\"quit\"}", "QMP input member 'exec-oob' is unexpected"),
        ("{\"execute\":\"x-explain\"}", "Parameter 'gva' is missing"),
        (
            "{\"execute\":\"x-explain\",\"arguments\":{\"gva\":4294967296}}",
            "Parameter 'gva' expects a 32-bit address",
        ),
    ] {
        assert_eq!(refused(&peer.call(line)), ("GenericError", words));
    }
    assert!(!rig.parts.ending.is_set());
}

#[test]
fn every_listed_command_exists() {
    let rig = Rig::with(|controls| controls.balloon = Some(Arc::new(Balloon::default())));
    let vcpu = rig.vcpu();
    let mut peer = rig.negotiated();
    let listed = peer.ask("query-commands");
    let names: Vec<&str> =
        listed.as_array().expect("a list").iter().filter_map(|c| c["name"].as_str()).collect();
    assert_eq!(names, COMMANDS.iter().map(|command| command.name).collect::<Vec<_>>());
    let given = json!({"gva": 4096, "gpa": 0, "bytes": 8192, "value": 4096});
    for command in COMMANDS {
        let ends = ["qmp_capabilities", "quit", "x-frames"].contains(&command.name);
        if ends {
            continue;
        }
        let mut arguments = json!({});
        for argument in command.arguments.iter().filter(|argument| !argument.optional) {
            arguments[argument.name] = given[argument.name].clone();
        }
        peer.send(json!({"execute": command.name, "arguments": arguments}).to_string());
        let answer =
            std::iter::repeat_with(|| peer.receive().expect("an answer")).find(|a| a.get("event").is_none());
        assert!(
            answer.as_ref().is_some_and(|answer| answer.get("return").is_some()),
            "{}: {answer:?}",
            command.name
        );
    }
    rig.parts.ending.set(End::Quit);
    vcpu.join().expect("quit ends the vCPU");
}

#[test]
fn queries_say_what_the_run_is() {
    let rig = Rig::with(|controls| controls.name = Some("n\u{e4}me".into()));
    let mut peer = rig.negotiated();
    assert_eq!(peer.ask("query-name"), json!({"name": "n\u{e4}me"}));
    assert_eq!(peer.ask("query-status"), json!({"status": "running", "running": true}));
    let cpu = peer.ask("query-cpus-fast")[0].take();
    assert_eq!(
        (&cpu["cpu-index"], &cpu["thread-id"], &cpu["target"], &cpu["props"]),
        (&json!(0), &json!(7), &json!("i386"), &json!({}))
    );
    assert!(
        peer.ask("query-version")["package"].as_str().is_some_and(|package| package.starts_with("umbra "))
    );
    assert_eq!(Rig::new().negotiated().ask("query-name"), json!({}));
}

#[test]
fn stop_and_cont_are_told_to_all_and_before_they_are_answered() {
    let rig = Rig::new();
    let vcpu = rig.vcpu();
    let (mut one, mut two, mut deaf) = (rig.negotiated(), rig.negotiated(), rig.client());
    for _ in 0..3 {
        one.send("{\"execute\":\"stop\"}{\"execute\":\"stop\"}{\"execute\":\"query-status\"}");
        assert_eq!(one.event(), "STOP");
        assert!((0..2).all(|_| one.receive() == Some(json!({"return": {}}))));
        assert!(one.receive().is_some_and(|answer| answer["return"]["status"] == "paused"));
        // Questions are answered all the same.
        assert!(one.with("x-explain", json!({"gva": 0}))["return"]["lines"].is_array());
        one.send("{\"execute\":\"cont\"}{\"execute\":\"cont\"}");
        assert_eq!(one.event(), "RESUME");
        assert!((0..2).all(|_| one.receive() == Some(json!({"return": {}}))));
        assert_eq!((two.event().as_str(), two.event().as_str()), ("STOP", "RESUME"));
        assert_eq!(one.ask("query-status")["status"], "running");
    }
    // Who has not negotiated hears nothing.
    assert_eq!(deaf.call("{\"execute\":\"qmp_capabilities\"}"), json!({"return": {}}));
    one.ask("quit");
    vcpu.join().expect("the vCPU ends");
}

#[test]
fn a_stop_that_no_vcpu_heeds_is_an_error_in_time() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    let (class, words) = ("GenericError", "did not stand still");
    let answer = peer.call("{\"execute\":\"stop\"}");
    assert!(refused(&answer).0 == class && refused(&answer).1.contains(words), "{answer}");
}

/// A way to end a run.
type Way = fn(&mut Peer, &Rig);

#[test]
fn every_end_is_told_with_its_reason_and_the_connection_ends_then() {
    let ends: [(&str, Way); 3] = [
        ("host-qmp-quit", |peer, _| drop(peer.ask("quit"))),
        ("host-signal", |_, rig| rig.parts.ending.set(End::Timeout(LONG))),
        ("guest-shutdown", |_, rig| {
            rig.parts.ending.set(End::Board(crate::board::BoardExit::DebugExit(0)));
        }),
    ];
    for (reason, end) in ends {
        let mut rig = Rig::new();
        let mut peers = [rig.negotiated(), rig.negotiated()];
        end(&mut peers[0], &rig);
        assert_eq!(peers[1].ask("query-status")["status"], "shutdown");
        rig.end();
        for peer in &mut peers {
            let event = peer.receive().expect("the end");
            let guest = reason.starts_with("guest");
            assert_eq!(
                (&event["event"], &event["data"]),
                (&json!("SHUTDOWN"), &json!({"guest": guest, "reason": reason}))
            );
            assert_eq!(peer.receive(), None);
        }
    }
}

#[test]
fn a_reset_is_told_to_all_and_a_guest_that_stands_stands_on() {
    let rig = Rig::new();
    let vcpu = rig.vcpu();
    let (mut one, mut two) = (rig.negotiated(), rig.negotiated());
    let reset = |one: &mut Peer, two: &mut Peer| {
        // The event may overtake the answer: it comes from another thread.
        one.send("{\"execute\":\"system_reset\"}");
        let both = [one.receive(), one.receive()].map(|said| said.expect("both"));
        assert!(both.contains(&json!({"return": {}})), "{both:?}");
        let event = two.receive().expect("an event");
        assert_eq!(event["event"], "RESET");
        assert_eq!(event["data"], json!({"guest": false, "reason": "host-qmp-system-reset"}));
    };
    reset(&mut one, &mut two);
    assert_eq!(one.ask("query-status"), json!({"status": "running", "running": true}));
    one.send("{\"execute\":\"stop\"}");
    assert_eq!((one.event().as_str(), two.event().as_str()), ("STOP", "STOP"));
    assert_eq!(one.receive(), Some(json!({"return": {}})));
    assert_eq!(one.ask("query-status")["status"], "paused");
    reset(&mut one, &mut two);
    assert_eq!(one.ask("query-status"), json!({"status": "prelaunch", "running": false}));
    one.send("{\"execute\":\"cont\"}");
    assert_eq!((one.event().as_str(), two.event().as_str()), ("RESUME", "RESUME"));
    assert_eq!(one.receive(), Some(json!({"return": {}})));
    assert_eq!(one.ask("query-status")["status"], "running");
    assert_eq!(one.ask("x-counters")["resets"], 2);
    assert!(!rig.parts.ending.is_set());
    one.ask("quit");
    vcpu.join().expect("the vCPU ends");
}

#[test]
fn powerdown_is_told_and_ends_nothing() {
    let rig = Rig::new();
    let (mut one, mut two) = (rig.negotiated(), rig.negotiated());
    one.send("{\"execute\":\"system_powerdown\"}");
    assert_eq!(two.event(), "POWERDOWN");
    let answers = [one.receive(), one.receive()].map(|answer| answer.expect("both"));
    assert!(answers.iter().any(|answer| answer["event"] == "POWERDOWN"));
    assert!(answers.contains(&json!({"return": {}})));
    assert!(!rig.parts.ending.is_set());
}

#[test]
fn a_question_that_no_vcpu_answers_keeps_nobody_else_waiting() {
    let rig = Rig::with(|controls| controls.answer_wait = Duration::from_secs(2));
    let (mut patient, mut other) = (rig.negotiated(), rig.negotiated());
    let begun = Instant::now();
    patient.send("{\"execute\":\"x-explain\",\"arguments\":{\"gva\":1}}{\"execute\":\"query-status\"}");
    (0..100).for_each(|_| drop(other.ask("query-status")));
    assert!(begun.elapsed() < Duration::from_secs(2), "the loop waited for the vCPU");
    let answer = patient.receive().expect("an answer");
    assert!(refused(&answer).1.contains("did not answer"), "{answer}");
    assert!(patient.receive().is_some_and(|answer| answer["return"]["running"] == true), "in order");
}

#[test]
fn questions_after_the_end_are_refused_at_once() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    peer.ask("quit");
    let answer = peer.with("x-explain", json!({"gva": 1}));
    assert_eq!(refused(&answer).1, "the run has ended");
}

/// A balloon that does at once what it is told.
#[derive(Default)]
struct Balloon {
    actual: AtomicU64,
}

impl BalloonControl for Balloon {
    fn set_target(&self, bytes: u64) -> Result<(), String> {
        if !bytes.is_multiple_of(4096) {
            return Err("no whole pages".into());
        }
        self.actual.store(bytes, Ordering::SeqCst);
        Ok(())
    }

    fn actual_bytes(&self) -> u64 {
        self.actual.load(Ordering::SeqCst)
    }

    fn memory_bytes(&self) -> u64 {
        32 << 20
    }

    fn pages(&self) -> (u32, u32) {
        (7, 5)
    }

    fn stats(&self) -> Option<Vec<(&'static str, u64)>> {
        (self.actual_bytes() != 0).then(|| vec![("stat-free-memory", 3)])
    }
}

#[test]
fn balloon_is_asked_where_there_is_one() {
    let mut peer = Rig::new().negotiated_alone();
    for name in ["query-balloon", "x-balloon-stats"] {
        let answer = peer.1.call(&json!({ "execute": name }).to_string());
        assert_eq!(refused(&answer), ("DeviceNotActive", "No balloon device has been activated"));
    }
    let rig = Rig::with(|controls| controls.balloon = Some(Arc::new(Balloon::default())));
    let mut peer = rig.negotiated();
    assert!(refused(&peer.call("{\"execute\":\"x-balloon-stats\"}")).1.contains("no statistics"));
    for value in [0, -4096] {
        let answer = peer.with("balloon", json!({ "value": value }));
        assert_eq!(refused(&answer), ("GenericError", "Parameter 'target' expects a size"));
    }
    assert_eq!(refused(&peer.with("balloon", json!({"value": 1}))).1, "no whole pages");
    assert_eq!(peer.with("balloon", json!({"value": 8192})), json!({"return": {}}));
    assert_eq!(peer.ask("query-balloon"), json!({"actual": 8192}));
    assert_eq!(peer.ask("x-memory")["balloon"], json!({"target": 7, "actual": 5, "memory": 8192}));
    assert_eq!(peer.ask("x-balloon-stats"), json!({"stat-free-memory": 3}));
}

impl Rig {
    fn negotiated_alone(self) -> (Rig, Peer) {
        let peer = self.negotiated();
        (self, peer)
    }
}

#[test]
fn balloon_changes_come_once_a_second_and_the_latest() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    let begun = Instant::now();
    (1..=1000).for_each(|bytes| rig.parts.news.balloon_changed(bytes));
    let mut actual = || peer.receive().and_then(|event| event["data"]["actual"].as_u64()).expect("a change");
    let first = actual();
    if first < 1000 {
        assert_eq!(actual(), 1000);
        assert!(begun.elapsed() >= Duration::from_millis(900));
    }
}

#[test]
fn a_job_of_a_client_that_has_gone_ends_before_the_loop_does() {
    static DONE: Mutex<u32> = Mutex::new(0);
    struct Slow;
    impl BalloonControl for Slow {
        fn set_target(&self, _: u64) -> Result<(), String> {
            Ok(())
        }
        fn actual_bytes(&self) -> u64 {
            *DONE.lock().expect("no panic") += 1;
            0
        }
        fn memory_bytes(&self) -> u64 {
            0
        }
        fn pages(&self) -> (u32, u32) {
            (0, 0)
        }
        fn stats(&self) -> Option<Vec<(&'static str, u64)>> {
            None
        }
    }
    let mut rig = Rig::with(|controls| controls.balloon = Some(Arc::new(Slow)));
    for _ in 1..CLIENTS_MAX {
        let mut peer = rig.negotiated();
        peer.send("{\"execute\":\"x-explain\",\"arguments\":{\"gva\":1}}");
    }
    rig.negotiated().ask("query-balloon");
    rig.end();
    assert_eq!(*DONE.lock().expect("no panic"), 1);
    assert_eq!(Arc::strong_count(&rig.parts.requests), 1, "a job is left behind");
}
