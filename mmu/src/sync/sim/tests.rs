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

/// Of tests that do not look at it.
const THING: Thing = Thing { sort: Sort::Held, words: "a count", number: None, key: 0 };

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
            count = ours.1.wait(&ours.0, THING, count, "two");
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
            let mut count = lock(&shared.0, THING);
            *count += 1;
            while *count % 2 == 1 {
                count = shared.1.wait(&shared.0, THING, count, "an answer");
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
    let words: Vec<_> = stuck.waiters.iter().map(Waiter::to_string).collect();
    assert_eq!(words, ["first waits for a letter", "second waits for an answer"]);
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

type Act = Box<dyn FnOnce() + Send>;

/// What a simulation of `acts`, on two threads, ends with while a third looks at the time for ever.
fn stuck_of(acts: [(&'static str, Act); 2]) -> Stuck {
    let (tell, told) = channel();
    let on_stuck: OnStuck = Box::new(move |stuck| drop(tell.send(stuck.clone())));
    let sim = Sim::new(3, None, on_stuck);
    thread::spawn(move || {
        let _actor = sim.enter("timer");
        acts.into_iter().for_each(|(name, act)| drop(start(name, act)));
        while sleep(Duration::from_millis(1), "its next look") {}
    });
    told.recv_timeout(Duration::from_secs(60)).expect("a report")
}

fn cycle_of(stuck: &Stuck) -> Vec<String> {
    stuck.cycle.iter().map(Waiter::to_string).collect()
}

/// An invalidation that awaits an importer with a lock held, which that importer wants first.
#[test]
#[cfg(debug_assertions)]
fn who_wait_for_each_other_are_found_at_once_whoever_else_goes_on() {
    use super::super::{Having, Lock, thread::yield_for};
    let bucket = Arc::new(Lock::new(lock_order::BUCKET, ()));
    let theirs = Arc::clone(&bucket);
    let answer = || Thing { sort: Sort::Owed, words: "the answer of importer", number: Some(0), key: 1 };
    let ear = move || {
        let _owes = Having::new(answer());
        sleep(Duration::from_millis(5), "a letter on its way");
        drop(theirs.lock());
    };
    let taker = move || {
        let _bucket = bucket.lock();
        loop {
            yield_for(|| Wait::from("an answer").of(answer()));
        }
    };
    let stuck = stuck_of([("ear", Box::new(ear)), ("taker", Box::new(taker))]);
    let found = [
        "ear waits for lock 'bucket' 1, which taker holds",
        "taker waits for the answer of importer 0, which ear owes",
    ];
    assert_eq!(cycle_of(&stuck), found);
    assert_eq!(stuck.why, Why::EachOther);
    assert!(stuck.now < 6_000_000, "at once: {stuck}");
    let text = stuck.to_string();
    assert!(text.contains("some wait for each other") && text.contains("\n  timer "), "{text}");
}

#[test]
fn who_sleeps_at_a_gate_of_its_own_is_a_cycle_by_itself() {
    let own = || {
        let buckets = crate::bucket::Buckets::new(1024);
        buckets.close(crate::Gfn(5));
        buckets.wait(crate::Gfn(5));
    };
    let stuck = stuck_of([("vcpu 0", Box::new(own)), ("other", Box::new(|| ()))]);
    assert_eq!(cycle_of(&stuck), ["vcpu 0 waits for gate 5, which vcpu 0 holds"]);
    assert_eq!(stuck.why, Why::EachOther);
}

/// As a wake that is lost has it. Who has nothing to do may wait for ever.
#[test]
fn who_waits_for_longer_than_anybody_does_is_found_and_who_has_nothing_to_do_is_not() {
    let idle = || Bed::default().wait_until(None, Wait::idle("work"));
    let lost = || {
        sleep(Duration::from_secs(5), "a while");
        Bed::default().wait_until(None, "a wake that is lost");
    };
    let stuck = stuck_of([("idle", Box::new(idle)), ("sleeper", Box::new(lost))]);
    assert!(matches!(stuck.why, Why::TooLong(_)) && stuck.cycle.is_empty(), "{stuck}");
    let text = stuck.to_string();
    assert!(text.contains("sleeper has waited for longer than 10 s"), "{text}");
    assert!(text.contains("\n  sleeper waits for a wake that is lost, since 5000000000 ns"), "{text}");
}

/// What it looks for has come since it last looked.
#[test]
fn who_has_not_looked_again_waits_for_nobody() {
    use super::super::{Having, thread::yield_for};
    for seed in 0..50 {
        let sim = Sim::new(seed, None, never());
        let actor = sim.enter("main");
        let answered = Arc::new(AtomicU32::new(0));
        let shared = Arc::new((Mutex::new(false), Bed::default()));
        let thing = |words| Thing { sort: Sort::Owed, words, number: None, key: 1 };
        let (theirs, ours) = (Arc::clone(&answered), Arc::clone(&shared));
        let (other, other_thread) = start("other", move || {
            let _owes = Having::new(thing("an answer"));
            sleep(Duration::from_micros(3), "its time");
            theirs.store(1, Ordering::SeqCst);
            let mut has_come = lock(&ours.0, THING);
            while !*has_come {
                has_come = ours.1.wait(&ours.0, THING, has_come, Wait::from("a word").of(thing("a word")));
            }
        });
        let owes = Having::new(thing("a word"));
        while answered.load(Ordering::SeqCst) == 0 {
            yield_for(|| Wait::from("an answer").of(thing("an answer")));
        }
        *lock(&shared.0, THING) = true;
        shared.1.notify_all();
        drop(owes);
        await_end(&other);
        drop(actor);
        other_thread.join().expect("no panic");
    }
}

/// Somebody comes to points while another works, a microsecond at a time; and how the seed drives that.
fn pointed(seed: u64, choices: Option<u64>) -> (Pace, Vec<String>) {
    let text = Text::default();
    let sim = Sim::new(seed, Some(Box::new(text.clone())), never());
    choices.iter().for_each(|choices| sim.limit_choices(*choices));
    let actor = sim.enter("main");
    let (id, thread) = start("a", || {
        for _ in 0..2000 {
            point();
            note(|line| line.push_str("is there"));
        }
    });
    for _ in 0..4000 {
        work(1000);
        note(|line| line.push_str("works"));
    }
    await_end(&id);
    drop(actor);
    thread.join().expect("no panic");
    sim.logged().expect("written");
    (sim.pace(), text.lines())
}

#[test]
fn others_do_much_while_an_actor_stalls() {
    let (mut longest, mut never) = (0, 0);
    for seed in 0..30 {
        let (pace, lines) = pointed(seed, None);
        let stalls = lines.split(|line| line.ends_with("a: stalls")).skip(1);
        let works = stalls.map(|after| after.iter().take_while(|line| line.ends_with("main: works")).count());
        let most = works.max();
        let none = pace.stall_one_in == pace::NEVER;
        assert!(most.is_none() || !none, "seed {seed}: {pace}");
        never += u32::from(none);
        longest = longest.max(most.unwrap_or(0));
    }
    assert!(longest > 100, "{longest} times");
    assert!(never > 0, "some seeds do without");
}

#[test]
fn nobody_stalls_once_all_take_turns() {
    for seed in 0..20 {
        assert!(!pointed(seed, Some(0)).1.iter().any(|line| line.ends_with("stalls")), "seed {seed}");
    }
}
