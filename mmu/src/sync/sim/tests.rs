//! Simulations of a few threads.

use std::sync::mpsc::channel;

use super::*;

/// What a simulation wrote.
#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Text {
    fn lines(&self) -> Vec<String> {
        let bytes = self.0.lock().expect("nobody panics").clone();
        String::from_utf8(bytes).expect("text").lines().map(str::to_owned).collect()
    }
}

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn never() -> OnStuck {
    Box::new(|stuck| panic!("{stuck}"))
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> (ActorId, thread::JoinHandle<()>) {
    let ticket = register(name).expect("a simulation");
    let id = ticket.id();
    let thread = thread::spawn(move || {
        let _actor = ticket.enter();
        work();
    });
    (id, thread)
}

/// Three threads that count, each saying so.
fn counted(seed: u64) -> Vec<String> {
    let text = Text::default();
    let sim = Sim::new(seed, Some(Box::new(text.clone())), never());
    let actor = sim.enter("main");
    let threads: Vec<_> = ["a", "b", "c"]
        .into_iter()
        .map(|name| {
            start(name, move || {
                for n in 0..20 {
                    note(|line| line.push_str(&n.to_string()));
                    point();
                    if n % 7 == 0 {
                        sleep(Duration::from_micros(n), "a while");
                    }
                }
            })
        })
        .collect();
    threads.iter().for_each(|(id, _)| await_end(id));
    drop(actor);
    threads.into_iter().for_each(|(_, thread)| thread.join().expect("no panic"));
    let logged = sim.logged().expect("written");
    assert_eq!(logged.events as usize, text.lines().len());
    // The first line names the seed.
    text.lines().split_off(1)
}

#[test]
fn a_seed_has_one_order_and_seeds_have_many() {
    let first = counted(1);
    for _ in 0..20 {
        assert_eq!(counted(1), first);
    }
    let mut orders: Vec<_> = (1..=20).map(counted).collect();
    orders.sort();
    orders.dedup();
    assert!(orders.len() > 15, "{} orders of 20", orders.len());
}

#[test]
fn time_jumps_to_what_is_waited_for_and_not_beyond() {
    let sim = Sim::new(5, None, never());
    let actor = sim.enter("main");
    let (id, thread) = start("other", || {
        sleep(Duration::from_secs(3600), "an hour");
    });
    let begun = std::time::Instant::now();
    sleep(Duration::from_secs(60), "a minute");
    assert_eq!(now(), Some(60_000_000_000));
    await_end(&id);
    assert_eq!(now(), Some(3_600_000_000_000));
    drop(actor);
    thread.join().expect("no panic");
    assert!(begun.elapsed() < Duration::from_secs(60), "nobody has slept");
}

#[test]
fn a_sleeper_is_woken_by_actors_and_by_other_threads() {
    let sim = Sim::new(7, None, Box::new(|_| ()));
    let actor = sim.enter("main");
    let shared = Arc::new((Mutex::new(0), Bed::default()));
    let ours = Arc::clone(&shared);
    let (id, thread) = start("sleeper", move || {
        let mut count = ours.0.lock().expect("no panic");
        while *count < 2 {
            count = ours.1.wait(&ours.0, count, "two");
        }
    });
    sleep(Duration::from_millis(1), "the sleeper");
    *shared.0.lock().expect("no panic") += 1;
    shared.1.notify_all();
    sleep(Duration::from_millis(1), "the sleeper");
    thread::scope(|scope| {
        let other = || {
            *shared.0.lock().expect("no panic") += 1;
            shared.1.notify_all();
        };
        scope.spawn(other).join().expect("no panic");
    });
    await_end(&id);
    drop(actor);
    thread.join().expect("no panic");
}

/// As a signal's may come, which is no actor's.
#[test]
fn a_wake_by_another_thread_just_before_the_sleep_is_not_lost() {
    const ROUNDS: u32 = 1000;
    let sim = Sim::new(11, None, Box::new(|_| ()));
    let shared = Arc::new((Mutex::new(0), Bed::default()));
    let ours = Arc::clone(&shared);
    let other = thread::spawn(move || {
        let mut count = 0;
        while count < 2 * ROUNDS {
            let mut shared = ours.0.lock().expect("no panic");
            if *shared % 2 == 1 {
                *shared += 1;
                ours.1.notify_all();
            }
            count = *shared;
        }
    });
    let actor = sim.enter("main");
    let (id, sleeper) = start("sleeper", move || {
        for _ in 0..ROUNDS {
            let mut count = lock(&shared.0);
            *count += 1;
            while *count % 2 == 1 {
                count = shared.1.wait(&shared.0, count, "an answer");
            }
        }
    });
    let begun = std::time::Instant::now();
    while has_ended(&id) == Some(false) {
        assert!(begun.elapsed() < Duration::from_secs(20), "the sleeper sleeps on");
        sleep(Duration::from_micros(1), "the sleeper");
    }
    drop(actor);
    [sleeper, other].into_iter().for_each(|thread| thread.join().expect("no panic"));
}

#[test]
fn who_waits_for_ever_is_named_with_what_it_waits_for() {
    let (tell, told) = channel();
    let on_stuck: OnStuck = Box::new(move |stuck| drop(tell.send(stuck.clone())));
    let text = Text::default();
    let sim = Sim::new(3, Some(Box::new(text.clone())), on_stuck);
    // They stay for as long as this process.
    thread::spawn(move || {
        let _actor = sim.enter("first");
        start("second", || while spin("an answer") {});
        Bed::default().wait_until(None, "a letter");
    });
    let stuck = told.recv_timeout(Duration::from_secs(20)).expect("a report");
    let words: Vec<_> = stuck.waiters.iter().map(|w| (w.name.as_str(), w.what)).collect();
    assert_eq!(words, [("first", "a letter"), ("second", "an answer")]);
    assert!(text.lines().last().is_some_and(|line| line.contains("first waits for a letter")));
}

#[test]
fn a_thread_that_panics_hands_the_baton_on() {
    let sim = Sim::new(9, None, never());
    let actor = sim.enter("main");
    let (id, thread) = start("other", || panic!("on purpose"));
    await_end(&id);
    drop(actor);
    assert!(thread.join().is_err());
}
