//! Clients that are many, slow, silent or hostile.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;

use super::*;

const STATUS: &str = "{\"execute\":\"query-status\"}";

#[test]
fn what_is_no_command_gets_an_error_and_the_connection_stays() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    let deep = "[".repeat(10_000);
    for line in ["x", "7", "[]", "\"a\"", "{}", "{\"execute\":7}", "\u{0}", deep.as_str()] {
        assert_eq!(refused(&peer.call(line)).0, "GenericError", "{line:.20}");
    }
    peer.send("\n \r\n\t\n");
    peer.ask("query-status");
}

#[test]
fn pieces_and_commands_together_are_the_same() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    let id = "{\"execute\":\n\"query-status\",\"id\":\"\u{20ac}\"}".as_bytes();
    let inside = id.len() - 4;
    for piece in [
        &id[..9],
        &id[9..inside],
        &id[inside..],
        b"{\"execute\":\"query-version\"}{\"exec",
        b"ute\":\"query-name\"}",
    ] {
        peer.send(piece);
        thread::sleep(Duration::from_millis(5));
    }
    assert!(peer.receive().is_some_and(|answer| answer["id"] == "\u{20ac}"));
    assert!(peer.receive().is_some_and(|answer| answer["return"]["package"].is_string()));
    assert_eq!(peer.receive(), Some(json!({"return": {}})));
}

#[test]
fn one_byte_at_a_time_is_slow_and_right() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    for _ in 0..20 {
        STATUS.bytes().for_each(|byte| peer.send([byte]));
        assert!(peer.receive().is_some_and(|answer| answer["return"]["running"] == true));
    }
}

#[test]
fn a_byte_of_0xff_begins_anew() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    peer.send(b"{\"execute\":\"query-st\xff");
    assert!(peer.receive().is_some_and(|answer| refused(&answer).1.contains("0xff")));
    peer.ask("query-status");
}

#[test]
fn half_an_object_and_silence_cost_nobody_anything() {
    let rig = Rig::new();
    let mut silent: Vec<Peer> = (0..CLIENTS_MAX - 1).map(|_| rig.negotiated()).collect();
    silent.iter_mut().for_each(|peer| peer.send("{\"execute\":\"query-"));
    let mut peer = rig.negotiated();
    (0..50).for_each(|_| drop(peer.ask("query-status")));
    for peer in &mut silent {
        peer.send("status\"}");
        assert!(peer.receive().is_some_and(|answer| answer["return"]["running"] == true));
    }
}

#[test]
fn ten_thousand_commands_in_a_row_are_answered_in_order() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    let mut stream = peer.stream.try_clone().expect("a descriptor");
    let sender = thread::spawn(move || {
        for id in 0..10_000 {
            let line = format!("{{\"execute\":\"query-status\",\"id\":{id}}}");
            stream.write_all(line.as_bytes()).expect("the server reads");
        }
    });
    for id in 0..10_000 {
        assert_eq!(peer.receive().expect("an answer")["id"], id);
    }
    sender.join().expect("all are sent");
}

#[test]
fn a_huge_string_is_told_so_and_costs_the_connection() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    peer.send("{\"execute\":\"");
    let block = [b'x'; 4096];
    let sent = (0..1000).take_while(|_| peer.stream.write_all(&block).is_ok()).count();
    assert!(sent < 1000, "the server took 4 MB of one string");
    assert!(peer.receive().is_some_and(|answer| refused(&answer).1.contains("size limit")));
    assert_eq!(peer.receive(), None);
    rig.negotiated();
}

#[test]
fn a_client_that_never_reads_is_dropped_and_others_are_served() {
    let rig = Rig::new();
    let (mut deaf, mut other) = (rig.negotiated(), rig.negotiated());
    deaf.stream.set_write_timeout(Some(LONG)).expect("a limit");
    let lines = "{\"execute\":\"query-commands\"}\n".repeat(100);
    let mut served = 0;
    let sent = (0..10_000).take_while(|_| {
        other.ask("query-status");
        served += 1;
        deaf.stream.write_all(lines.as_bytes()).is_ok()
    });
    assert!(sent.count() < 1000, "a hundred thousand answers went somewhere");
    assert!(served > 0);
}

#[test]
fn a_client_that_reads_late_gets_all_that_the_bound_allows() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    // More than the host keeps for it, and less than that and the bound.
    let count = 220;
    (0..count).for_each(|_| peer.send("{\"execute\":\"query-commands\"}"));
    thread::sleep(Duration::from_millis(100));
    assert!((0..count).all(|_| peer.receive().is_some_and(|answer| answer["return"].is_array())));
    peer.ask("query-status");
}

#[test]
fn a_client_that_goes_in_the_middle_of_an_answer_leaves_nothing_behind() {
    let mut rig = Rig::new();
    for round in 0..50 {
        let mut peer = rig.negotiated();
        peer.send("{\"execute\":\"query-commands\"}".repeat(200));
        if round % 2 == 0 {
            assert!(peer.receive().is_some());
        }
    }
    rig.negotiated().ask("query-status");
    rig.end();
}

#[test]
fn a_client_that_has_said_all_still_gets_its_answers() {
    let rig = Rig::new();
    let vcpu = rig.vcpu();
    let mut peer = rig.negotiated();
    peer.send("{\"execute\":\"x-explain\",\"arguments\":{\"gva\":1}}{\"execute\":\"query-status\"}");
    peer.stream.shutdown(std::net::Shutdown::Write).expect("a socket");
    assert!(peer.receive().is_some_and(|answer| answer["return"]["lines"].is_array()));
    assert!(peer.receive().is_some_and(|answer| answer["return"]["running"] == true));
    assert_eq!(peer.receive(), None);
    rig.parts.ending.set(End::Quit);
    vcpu.join().expect("the vCPU ends");
}

#[test]
fn more_clients_than_the_limit_are_told_so_and_room_comes_back() {
    let rig = Rig::new();
    let held: Vec<Peer> = (0..CLIENTS_MAX).map(|_| rig.negotiated()).collect();
    for _ in 0..200 {
        let mut peer = rig.connect();
        assert!(
            peer.receive().is_some_and(|answer| refused(&answer).1.starts_with("8 clients are connected"))
        );
        assert_eq!(peer.receive(), None);
    }
    drop(held);
    // The loop sees the ends in its own time.
    for _ in 0..1000 {
        if rig.connect().receive().is_some_and(|answer| answer.get("QMP").is_some()) {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("no room came back");
}

#[test]
fn clients_that_never_negotiate_keep_nobody_out() {
    let rig = Rig::new();
    let mut held: Vec<Peer> = (0..CLIENTS_MAX).map(|_| rig.client()).collect();
    let mut others: Vec<Peer> = (0..CLIENTS_MAX).map(|_| rig.negotiated()).collect();
    assert!(held.iter_mut().all(|peer| peer.receive().is_none()), "they have made room");
    others.iter_mut().for_each(|peer| drop(peer.ask("query-status")));
}

#[test]
fn a_client_that_sleeps_while_others_make_events_hears_the_latest_and_stays() {
    let rig = Rig::new();
    let (mut sleeps, mut floods) = (rig.negotiated(), rig.negotiated());
    let lines = "{\"execute\":\"system_powerdown\"}".repeat(100);
    for _ in 0..100 {
        floods.send(&lines);
        let mut answers = 0;
        while answers < 100 {
            answers += u32::from(floods.receive().expect("a line").get("return").is_some());
        }
    }
    sleeps.send(STATUS);
    let mut events = 0;
    while sleeps.receive().expect("it is still connected").get("return").is_none() {
        events += 1;
    }
    assert!(0 < events && events < 10_000, "{events} events of 10 000");
}

#[test]
fn commands_of_clients_that_have_gone_keep_nobody_from_theirs() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    for _ in 0..100 {
        let mut other = rig.connect();
        // It may be turned away.
        let _ = other.stream.write_all(
            b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"x-explain\",\"arguments\":{\"gva\":1}}",
        );
    }
    for _ in 0..20 {
        peer.ask("x-memory");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn idle_clients_cost_nothing() {
    let rig = Rig::new();
    let _idle: Vec<Peer> = (0..CLIENTS_MAX).map(|_| rig.negotiated()).collect();
    let spent = || {
        let tasks = fs::read_dir("/proc/self/task").expect("proc").flatten();
        let named = |task: &fs::DirEntry| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "events\n")
        };
        let ticks = |task: fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            let fields: Vec<u64> =
                stat.split_whitespace().skip(13).take(2).filter_map(|n| n.parse().ok()).collect();
            fields.iter().sum::<u64>()
        };
        // Loops of other tests may be busy: the idlest is ours, or as idle as ours.
        tasks.filter(named).map(ticks).min().unwrap_or(0)
    };
    let before = spent();
    thread::sleep(Duration::from_millis(300));
    assert!(spent() <= before + 5, "the loop is busy with nothing");
}

#[test]
fn socket_is_this_users_from_the_first_moment_on() {
    let rig = Rig::new();
    let mode = fs::metadata(rig.path()).expect("a socket").mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn socket_paths_in_use_are_left_alone_and_stale_ones_replaced() {
    let mut rig = Rig::new();
    let parts = rig.parts.clone();
    assert!(ControlSocket::bind(&rig.path(), parts.controls()).is_err(), "somebody listens there");
    let file = rig.dir.path().join("file");
    fs::write(&file, "precious").expect("a file");
    assert!(ControlSocket::bind(&file, parts.controls()).is_err());
    assert_eq!(fs::read(&file).expect("still there"), b"precious");
    let stale = rig.dir.path().join("stale");
    drop(UnixListener::bind(&stale).expect("a socket"));
    assert!(ControlSocket::bind(&stale, parts.controls()).is_ok());
    assert!(!stale.exists(), "a control socket goes with its run");
    rig.end();
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
    let ending = Ending::new(devices());
    let events = EventLoop::start(devices(), ending, None, vec![Box::new(Witness)]).expect("a loop");
    drop(events);
    assert!(GONE.load(Ordering::SeqCst));
}
