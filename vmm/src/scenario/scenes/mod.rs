//! Cases that Umbra's own MMU plays: no guest, but threads of one simulation around a real [`umbra_mmu::Mmu`].
//!
//! Story: a scene runs *lives*, each with an MMU of its own, until something goes wrong or it has had enough. Each party checks what
//! it can know by itself: a vCPU and an importer find what they stored last; nobody asks the MMU.
//!
//! Holds: the same seed is the same scene. The first thing that goes wrong ends the process: nothing that comes after it counts.

mod collapse;
mod importers;
mod locality;
mod superblock;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::{Arc, Mutex, PoisonError};

use clap::ValueEnum;
use umbra_mmu::Rules;
use umbra_mmu::sync::sim::{self, Sim, Stuck};

use super::args::PlayArgs;
use super::story::{Fact, Kind};
use crate::status::Status;
use crate::vm::simulation::Thread;

/// Lines of what happened last that are told of a failure.
const TAIL: usize = 24;

/// Which scene.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scene {
    /// A vCPU, two importers, and somebody who takes pages away from all of them.
    Importers,
    /// The same, by somebody who may not sleep.
    Atomic,
    /// What the mark of imported frames saves.
    Mark,
    /// Pages go to swap and come back.
    Locality,
    /// A range is gathered into one block, and discarded from.
    Collapse,
    /// Swap is on a filesystem, and whoever holds its lock wants a frame.
    Superblock,
}

impl Scene {
    /// Its name, which it tells its facts under.
    pub fn name(self) -> &'static str {
        match self {
            Scene::Importers => "importers",
            Scene::Atomic => "atomic",
            Scene::Mark => "mark",
            Scene::Collapse => "collapse",
            Scene::Locality => "locality",
            Scene::Superblock => "superblock",
        }
    }
}

/// Plays a scene, in this process; returns the exit status.
///
/// # Errors
///
/// When the host has no thread left.
pub fn play(scene: Scene, args: &PlayArgs) -> io::Result<u8> {
    let rules = args.without.map_or_else(Rules::default, Rules::all_but);
    let stage = Stage { name: scene.name(), rules, tail: Tail::default() };
    // What a panic says is told as a fact.
    std::panic::set_hook(Box::new(|_| {}));
    let stuck = stage.clone();
    let sim =
        Sim::new(args.run.seed, Some(Box::new(stage.tail.clone())), Box::new(move |s| stuck.is_stuck(s)));
    args.run.choices.iter().for_each(|choices| sim.limit_choices(*choices));
    let actor = sim.enter("main");
    stage.tell(&Fact::Begin);
    let done = catch_unwind(AssertUnwindSafe(|| match scene {
        Scene::Importers => importers::play(&stage),
        Scene::Atomic => importers::play_atomic(&stage),
        Scene::Mark => importers::play_mark(&stage),
        Scene::Collapse => collapse::play(&stage),
        Scene::Locality => locality::play(&stage),
        Scene::Superblock => superblock::play(&stage),
    }));
    match done {
        Ok(done) => done?,
        Err(panic) => stage.panicked("main", &*panic),
    }
    stage.tell(&Fact::Passed);
    drop(actor);
    Ok(Status::Pass.code())
}

/// What a scene plays on.
#[derive(Clone)]
struct Stage {
    name: &'static str,
    rules: Rules,
    tail: Tail,
}

impl Stage {
    /// Tells a fact.
    fn tell(&self, fact: &Fact) {
        // Whoever does not listen any more need not.
        let _ = writeln!(io::stdout(), "scenario {}: {}", self.name, fact.words());
    }

    /// Starts an actor's thread.
    fn start(&self, name: &str, act: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
        let (stage, own) = (self.clone(), name.to_owned());
        Thread::start("scene", name, move || {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(act)) {
                stage.panicked(&own, &*panic);
            }
        })
    }

    /// Something went wrong: that is the end of the scene.
    fn fail(&self, kind: Kind, text: &str) -> ! {
        for line in self.tail.lines() {
            self.tell(&Fact::Saw(line));
        }
        self.tell(&Fact::Failed(kind, text.lines().collect::<Vec<_>>().join("; ")));
        process::exit(Status::Failure.code().into())
    }

    fn panicked(&self, who: &str, panic: &(dyn std::any::Any + Send)) -> ! {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
        let kind = match () {
            () if text.contains("INV-TLB-") || text.contains("INV-COH-1") => Kind::Incoherent,
            () if text.contains("was lost") => Kind::Lost,
            () if text.contains("may not sleep waits") || text.contains("INV-WAIT-2") => Kind::Sleep,
            () if text.starts_with("the audit: ") => Kind::Books,
            () if text.contains("importers: ") || text.contains("the vCPU's word") => Kind::Content,
            () => Kind::Broken,
        };
        self.fail(kind, &format!("{who}: {text}"))
    }

    fn is_stuck(&self, stuck: &Stuck) {
        // Who has something is told before who waits for it, as a case does.
        for waiter in &stuck.waiters {
            let Some(what) = &waiter.what else { continue };
            for holder in &waiter.holders {
                let has = if waiter.is_owed { Fact::Owes } else { Fact::Holds };
                self.tell(&has(holder.clone(), what.clone()));
            }
        }
        for waiter in &stuck.waiters {
            waiter.what.iter().for_each(|what| self.tell(&Fact::Waits(waiter.name.clone(), what.clone())));
        }
        let first = stuck.to_string();
        self.fail(Kind::Deadlock, first.lines().next().unwrap_or_default().trim_end_matches(':'));
    }
}

/// A number below `end`, which the seed decides.
fn draw(end: u32) -> u32 {
    sim::choose(u64::from(end)).unwrap_or_default() as u32
}

/// The last lines of the simulation's log.
#[derive(Clone, Debug, Default)]
struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

impl Write for Tail {
    /// A line, as the log has it: "TIME WHO: WHAT".
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(bytes);
        let line = line.trim_end().split_once(' ').map_or("", |(_, rest)| rest);
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Who waits for a turn tells nothing of the story.
        if !line.is_empty() && !line.ends_with("waits for a lock") {
            tail.push_back(line.to_owned());
        }
        let over = tail.len().saturating_sub(TAIL);
        tail.drain(..over);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
