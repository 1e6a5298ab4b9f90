//! `--deterministic`: all of a run in an order that a seed decides, in virtual time.
//!
//! Story: the order is [`umbra_mmu::sync::sim`]'s. The thread that builds and runs the guest is its first actor, and each thread of
//! the run another ([`Thread`]). A vCPU hands the baton on after each slice, of a length that the seed decides, and has moved time on
//! by its instructions; by one seed it leaves the guest then, by another it stays inside until it is kicked. In the event loop's place there
//! is a [`Clock`].
//!
//! | source of chance | in a simulation |
//! |---|---|
//! | which thread runs, and where one stalls | the seed's choice, at scheduling points |
//! | time: guest's, records', budget steps, `--timeout`, pauses | virtual: instructions run, devices asked, then jumps to what is waited for |
//! | how long a disk or swap takes | the seed's choice |
//! | the date | [`EPOCH_SECONDS`] and guest time |
//! | hash tables' order | nothing that is done hangs on it |
//! | the console's reader | is waited for |
//! | Ctrl-C, SIGTERM | as ever: such a run is not one that comes again |
//!
//! Not here: other processes that import (`super::stress` has importers of its own), the control socket and so resets, KVM (`super::model` is
//! in its place), `umbra measure`; the command line refuses them.

use std::fmt::Write;
use std::io::{self, BufWriter};
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use umbra_mmu::sync::sim::{self, ActorGuard, ActorId, Logged, Sim, Stuck, Ticket, Why};

use super::RunError;
use super::budget::BudgetTimer;
use super::devices::Devices;
use super::ending::{End, Ending};
use crate::board::Nanos;
use crate::cli::RunArgs;
use crate::cpu::CpuState;
use crate::output::OutputFile;
use crate::status::Status;

/// The date that every simulation begins at: 2000-01-01, 00:00 UTC.
pub const EPOCH_SECONDS: i64 = 946_684_800;

/// The simulation of a run.
pub struct Simulation {
    sim: Arc<Sim>,
    actor: ActorGuard,
    log: Option<PathBuf>,
    has_guest: Arc<AtomicBool>,
}

/// Its event log. What an earlier run left there stays until there is a guest.
struct LogFile {
    file: OutputFile,
    has_guest: Arc<AtomicBool>,
    /// What has been held back; `None` once it was written.
    early: Option<Vec<u8>>,
}

impl io::Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.early {
            None => self.file.append(bytes)?,
            Some(early) => {
                early.extend(bytes);
                if self.has_guest.load(Ordering::Relaxed) {
                    self.file.replace(early)?;
                    self.early = None;
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Simulation {
    /// Begins one, if `args` ask for it: the calling thread is its first actor.
    ///
    /// # Errors
    ///
    /// When the event log can be neither made nor opened.
    pub fn begin(args: &RunArgs) -> Result<Option<Simulation>, RunError> {
        if !args.deterministic {
            return Ok(None);
        }
        let has_guest = Arc::new(AtomicBool::new(false));
        let open = |path: &PathBuf| match OutputFile::open(path) {
            Ok(file) => {
                let log = LogFile { file, has_guest: Arc::clone(&has_guest), early: Some(Vec::new()) };
                Ok(Box::new(BufWriter::new(log)) as Box<dyn io::Write + Send>)
            }
            Err(source) => Err(RunError::EventLog { path: path.clone(), source }),
        };
        let log = args.event_log.as_ref().map(open).transpose()?;
        let sim = Sim::new(args.seed, log, Box::new(give_up));
        args.choices.iter().for_each(|choices| sim.limit_choices(*choices));
        let actor = sim.enter("vcpu 0");
        Ok(Some(Simulation { sim, actor, log: args.event_log.clone(), has_guest }))
    }

    /// There is a guest: its events take the place of an earlier run's.
    pub fn has_guest(&self) {
        self.has_guest.store(true, Ordering::Relaxed);
    }

    /// Ends it: what its log came to.
    ///
    /// # Errors
    ///
    /// When that could not be written.
    pub fn end(self) -> Result<Logged, RunError> {
        let Simulation { sim, actor, log, .. } = self;
        drop(actor);
        sim.logged().map_err(|source| RunError::EventLog { path: log.unwrap_or_default(), source })
    }
}

/// Nobody can go on: nothing can be taken apart, for each thread waits for another.
fn give_up(stuck: &Stuck) {
    let whose = match stuck.why {
        Why::GetsNowhere(_) => {
            "either the guest's handler mends nothing, or this is a mistake in Umbra; please report that with the seed"
        }
        _ => "this is a mistake in Umbra, please report it with the seed",
    };
    let _ = io::Write::write_all(&mut io::stderr(), format!("umbra: {stuck}\n  {whose}\n").as_bytes());
    process::exit(Status::Deadlock.code().into());
}

/// A vCPU has interpreted so many instructions, and is in this state: its slice is over. Nothing without a simulation.
pub fn after_slice(cpu: &CpuState, steps: u64) {
    sim::note(|line| {
        let _ = write!(line, "ran {steps} to {:#x}, state {:08x}", cpu.eip, digest(cpu));
    });
    let nanos = sim::pace().map_or(1, |pace| pace.instruction_nanos);
    sim::work(steps.max(1) * nanos);
}

/// A hash of its registers.
fn digest(cpu: &CpuState) -> u32 {
    let others = [cpu.eip, cpu.eflags, cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, u32::from(cpu.cpl)];
    let mut hasher = crc32fast::Hasher::new();
    cpu.gpr.iter().chain(&others).for_each(|register| hasher.update(&register.to_le_bytes()));
    hasher.finalize()
}

/// A thread of the run's own: an actor, where there is a simulation.
pub struct Thread {
    handle: JoinHandle<()>,
    actor: Option<ActorId>,
}

impl Thread {
    /// Starts it; `actor` is its name in the log.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn start(name: &str, actor: &str, work: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
        let ticket = sim::register(actor);
        let actor = ticket.as_ref().map(Ticket::id);
        let work = move || {
            let _actor = ticket.map(Ticket::enter);
            work();
        };
        Ok(Thread { handle: thread::Builder::new().name(name.into()).spawn(work)?, actor })
    }

    /// True once it has ended.
    pub fn is_finished(&self) -> bool {
        self.actor.as_ref().and_then(sim::has_ended).unwrap_or_else(|| self.handle.is_finished())
    }

    /// Waits for its end, however it ended.
    pub fn join(self) {
        self.actor.iter().for_each(sim::await_end);
        let _ = self.handle.join();
    }
}

/// What turns time into calls: the board's deadlines, the steps of `--frames`, the time limit. Dropping it ends it.
pub struct Clock {
    devices: Arc<Devices>,
    stopped: Arc<AtomicBool>,
    thread: Option<Thread>,
}

impl Clock {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn start(
        devices: Arc<Devices>,
        ending: Ending,
        limit: Option<Duration>,
        budget: Option<BudgetTimer>,
    ) -> io::Result<Clock> {
        let stopped = Arc::new(AtomicBool::new(false));
        let (theirs, until) = (Arc::clone(&devices), Arc::clone(&stopped));
        let serve = move || {
            let own = ending.clone();
            ending.watch("clock", || serve(&theirs, &own, &until, limit, budget));
        };
        Ok(Clock { devices, stopped, thread: Some(Thread::start("clock", "clock", serve)?) })
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.devices.wake_clock();
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

fn serve(
    devices: &Devices,
    ending: &Ending,
    stopped: &AtomicBool,
    mut limit: Option<Duration>,
    mut budget: Option<BudgetTimer>,
) {
    while !stopped.load(Ordering::Relaxed) {
        let step = budget.as_ref().and_then(BudgetTimer::next);
        devices.sleep_as_clock([limit, step].into_iter().flatten().min().map(nanos));
        let now = devices.now();
        if let Some(budget) = &mut budget
            && step.is_some_and(|at| nanos(at) <= now)
        {
            sim::note(|line| line.push_str("the budget changes"));
            budget.step();
        }
        if let Some(after) = limit.take_if(|at| nanos(*at) <= now) {
            ending.set(End::Timeout(after));
        }
    }
}

fn nanos(time: Duration) -> Nanos {
    Nanos(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}
