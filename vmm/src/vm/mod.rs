//! A guest's whole life: built, booted, run, judged.
//!
//! | file | its job |
//! |---|---|
//! | vcpu | the loop of a vCPU, whoever runs its code |
//! | native | a vCPU that runs by KVM: the decision about every trap |
//! | soft | one that is interpreted |
//! | backend | which of them, and why |
//! | beside | somebody who works on a running guest's memory in this process |
//! | kick | how either is made to leave the guest |
//! | bus | what the interpreter asks for, answered by MMU and board |
//! | tables | the guest's descriptor tables, translated for the hardware |
//! | flush | how this host's TLBs are flushed |
//! | budget, reclaimer, collapser | how many frames there are to be over time; the threads that make frames free, and that gather them |
//! | devices, events | the board behind its lock; the loop that serves descriptors |
//! | virtio | the disks and the balloon: their slots, their threads |
//! | control, ask | the control socket and its client |
//! | requests, stops | questions to a vCPU's thread; whether it is to stand still, or begin anew |
//! | power | what a machine begins with, at first and at a reset |
//! | serial | the guest's output |
//! | series, live | what memory did over time; the line that shows it |
//! | simulation | all of it in an order that a seed decides |
//! | sink | the files that a run leaves |
//! | fuzz | a guest for fuzzers |
//! | ending, witness, summary | why it ended; what Umbra itself saw; the verdict |

pub mod ask;
mod backend;
mod beside;
pub mod budget;

mod bus;
mod collapser;
pub mod control;
mod devices;
mod ending;
mod events;
mod flush;
pub mod fuzz;
mod hardware;
mod kick;
mod live;
mod memory;
mod model;
mod native;
#[cfg(test)]
mod omissions_tests;
mod paging;
mod power;
mod reclaimer;
mod requests;
mod serial;
pub mod series;
pub(crate) mod simulation;
mod sink;
mod soft;
mod stops;
mod stress;
mod summary;
mod tables;
mod vcpu;
mod virtio;
mod witness;

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicI32;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use umbra_mmu::external::External;
use umbra_mmu::frames::Host;
use umbra_mmu::guest_tlb::GuestTlb;
use umbra_mmu::records::Clock;
use umbra_mmu::sync::Having;
use umbra_mmu::sync::sim::{self, Ticket};
use umbra_mmu::twins::Importers;
use umbra_mmu::{BudgetRefused, Config, Context, Gfn, LocalStack, Mfn, Mmu, PAGE_SIZE, SoftTlb};

pub use beside::{Beside, BuiltIn, Companion};
pub use ending::{End, Ending};
pub use events::add;
pub use live::Screen;
pub use serial::process_start;
pub use series::{Rates, SAMPLES_MAX, Sample, Series};
pub use sink::{JsonSink, PlotSink};
pub use summary::Summary;
pub use vcpu::VcpuStats;

use crate::board::{Board, BoardConfig, BoardError, MemoryMap, MemorySizeError};
use crate::boot::notes::Notes;
use crate::boot::{ImageError, MemoryError};
use crate::cli::{GuestCheck, Huge, Locks, RunArgs, Swap, Window};
use crate::cpu::CpuState;
use crate::export::{ByHub, ExportSocket, Exporter, Hub, Segments};
use crate::kvm::{HostError, KvmError};
use crate::machine::{Pool, PoolError};
use crate::probe::ProbeError;
use crate::swap::SwapFileError;
use crate::units::format_duration;
use crate::virtio::disk::{Disk, DiskError, DiskSpec};
use backend::{Plan, Runner};
use budget::{BudgetTimer, Overcommit};
use collapser::Collapser;
use control::{ANSWER_WAIT, ControlSocket, Controls, News};
use devices::Devices;
use events::{EventLoop, Subscriber};
use kick::Kicks;
use live::LiveLine;
use power::{Boot, Machine, PowerOn};
use reclaimer::Reclaimer;
use requests::Requests;
use serial::{Console, FirstByte};
use series::Recorder;
use simulation::Simulation;
use stops::Stops;
use stress::Stress;
use summary::{EventLog, TlbCounts};
use vcpu::{Backend, Core, Surroundings};
use virtio::{GuestBalloon, VirtioDevices};

/// The largest file that is read as an image or a module.
pub const FILE_BYTES_MAX: u64 = 256 << 20;
/// Frames beyond what the guest and its tables can take.
const SPARE_FRAMES: u64 = 64;
/// How long a reader of the guest's output that stands still may hold up the end of a run that has a time limit.
const READER_PATIENCE: Duration = Duration::from_secs(1);

/// Why a guest could not be run at all. Each is a sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A file could not be read.
    #[error("reading {what} {path}: {source}")]
    Read {
        /// "image" or "module".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The guest's flushes are to be judged where hardware runs it.
    #[error(
        "--check-guest-tlb sees what is interpreted, and neither --backend kvm nor model interprets all of it: use --backend soft"
    )]
    CheckNeedsSoft,
    /// A file is too large.
    #[error("{what} {path} is larger than {} MiB, the most that is loaded; is it a disk image?", FILE_BYTES_MAX >> 20)]
    TooLarge {
        /// "image" or "module".
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// No Multiboot1 kernel, or one that does not fit.
    #[error("{name}: {source}")]
    Image {
        /// The image.
        name: String,
        /// Why.
        source: ImageError,
    },
    /// `--mem` makes no sense.
    #[error("--mem: {0}")]
    MemorySize(#[from] MemorySizeError),
    /// `--frames` makes no sense.
    #[error("--frames, at {}: {source}", format_duration(*at))]
    Budget {
        /// The step.
        at: Duration,
        /// Why.
        source: BudgetRefused,
    },
    /// The swap file cannot be made.
    #[error(transparent)]
    Swap(#[from] SwapFileError),
    /// A disk cannot be had.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The tables for the guest's kernel cannot be written.
    #[error("writing {bytes} bytes of ACPI and MP tables to guest-physical {at:#x}: {source}")]
    Tables {
        /// Where.
        at: u32,
        /// How many bytes.
        bytes: usize,
        /// Why.
        source: MemoryError,
    },
    /// /dev/kvm cannot be used.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The probe of the host failed.
    #[error("looking at this host's KVM: {0}")]
    Probe(#[from] ProbeError),
    /// The backend could not be set up.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The machine pool could not be made.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The board could not be made.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The export socket could not be made.
    #[error("--export: listening on {path}: {source}; choose another path, or remove what is there")]
    Export {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The control socket could not be made.
    #[error("--qmp: listening on {path}: {source}; choose another path, or remove what is there")]
    Control {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host ran out of something small.
    #[error("setting up timers and threads: {0}")]
    Setup(io::Error),
    /// KVM runs as it likes.
    #[error(
        "--deterministic: KVM runs guest code in an order and at times that are the host's; leave out --backend kvm to have it \
         interpreted, or name --backend model for what surrounds KVM, with a model in its place"
    )]
    NotDeterministic,
    /// The model's host takes things away at once, which is true where one thread runs at a time.
    #[error(
        "--backend model: it is for simulations alone; add --deterministic, or leave out --backend model"
    )]
    ModelNeedsSimulation,
    /// The event log could not be written.
    #[error("--event-log: writing {path}: {source}; name a file in a folder that exists and has room")]
    EventLog {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The summary could not be written.
    #[error("writing the summary to {path}: {source}")]
    Json {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The plot could not be written.
    #[error(
        "--plot: writing {path}: {source}; name a file in a folder that exists and that you may write to"
    )]
    Plot {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A guest that is ready to start.
struct Guest {
    mmu: Arc<Mmu>,
    devices: Arc<Devices>,
    first_byte: FirstByte,
    start: CpuState,
    /// What makes it anew.
    power: Arc<dyn PowerOn>,
    notes: Notes,
    runner: Runner,
    pool: Arc<Pool>,
    /// How it is made to forget pages.
    shootdown: &'static str,
    /// Why this backend, in a line.
    why: Option<String>,
    overcommit: Overcommit,
    virtio: VirtioDevices,
    exporter: Option<Exporter>,
    /// Of `--stress`.
    importers: Option<Importers>,
    /// Where its output and `--status` meet.
    screen: Screen,
}

/// Runs a guest to its end. `screen` is the terminal, if standard error is one.
///
/// # Errors
///
/// When it could not be started; how a started one ended is in the summary.
pub fn run(args: &RunArgs, screen: &Screen) -> Result<Summary, RunError> {
    let simulation = Simulation::begin(args)?;
    let guest = Guest::build(args, screen, None)?;
    simulation.iter().for_each(Simulation::has_guest);
    let summary = guest.run(args, None)?;
    let event_log = simulation.map(Simulation::end).transpose()?.map(EventLog::from);
    Ok(Summary { event_log, ..summary })
}

/// The same, with somebody who works on its memory while it runs. Where no image is named, `image` is taken if there is one.
///
/// # Errors
///
/// When it could not be started.
pub fn run_beside(
    args: &RunArgs,
    screen: &Screen,
    image: Option<&BuiltIn>,
    companion: &mut dyn Companion,
) -> Result<Summary, RunError> {
    Guest::build(args, screen, image)?.run(args, Some(companion))
}

impl Guest {
    fn build(args: &RunArgs, screen: &Screen, image: Option<&BuiltIn>) -> Result<Guest, RunError> {
        // What the operator may have got wrong comes first.
        let is_pager = args.image.is_none() && image.is_none();
        let boot = Boot::read(args, image)?;
        let (notes, memory) = (boot.notes()?, boot.memory());
        let disks = match is_pager && args.disk.is_empty() {
            true => Disk::open_all(&DiskSpec::built_in())?,
            false => Disk::open_all(&args.disk)?,
        };

        let mut plan = Plan::make(args)?;
        let why = plan.take_reason();
        let overcommit = Overcommit::new(args);
        let config = config_of(args, &memory, &overcommit);
        let pool = Arc::new(build_pool(args, &plan, &config)?);
        let runner = Runner::new(plan, &pool, args.vcpus, args.supervisor.interprets(&notes))?;
        let (devices, first_byte) = build_devices(args, memory, screen)?;
        (0..).zip(runner.kicks()).for_each(|(vcpu, kick)| devices.waker(vcpu).set_kicker(kick));
        let virtio = VirtioDevices::plug(disks, &devices);
        let hub = || Hub::new(args.export_deadline, args.export_policy, args.export_in_turn);
        let hub = args.export.is_some().then(hub).transpose().map_err(RunError::Setup)?;
        let importers = args.stress.then(|| stress::importers(umbra_mmu::Machine::new(pool.region())));
        let outside: Option<Box<dyn External>> = match (&hub, &importers) {
            (Some(hub), _) => Some(Box::new(ByHub(Arc::clone(hub)))),
            (None, Some(importers)) => Some(Box::new(importers.clone())),
            (None, None) => None,
        };
        let mmu = build_mmu(config, &runner, &pool, outside)?.with_rules(args.omit.unwrap_or_default());
        let mmu = match args.check_guest_tlb {
            Some(check) => mmu.with_guest_tlb(check == GuestCheck::Strict),
            None => mmu,
        };
        let mmu = Arc::new(overcommit.apply(mmu, args)?);
        let exporter = hub.map(|hub| {
            let segments = Segments::new(Arc::clone(&mmu), Arc::clone(&pool), runner.vm());
            Exporter { mmu: Arc::clone(&mmu), segments: Arc::new(segments), hub }
        });
        let shootdown = runner.choose_shootdown(args.shootdown, mmu.coherence());
        memory::extent(&memory).1.map(Gfn).for_each(|gfn| {
            mmu.make_device(gfn);
        });

        let start = boot.load(&mmu)?;
        let power = Machine::new(boot, virtio.balloon());
        Ok(Guest {
            mmu,
            devices,
            first_byte,
            start,
            power: Arc::new(power),
            notes,
            runner,
            pool,
            shootdown,
            why,
            overcommit,
            virtio,
            exporter,
            importers,
            screen: screen.clone(),
        })
    }

    fn run(self, args: &RunArgs, companion: Option<&mut dyn Companion>) -> Result<Summary, RunError> {
        if let Some(why) = &self.why {
            // A reader that has gone is no reason to fail.
            let _ = writeln!(io::stderr(), "umbra: {why}");
        }
        if self.runner.is_native() && !self.notes.kernel.is_some_and(|kernel| kernel.clean) {
            log::warn!(
                "this image has no Umbra note, and its kernel runs natively at CPL 3: PUSHF and POPF will not \
                 show or set IF, and MOV from CS, LAR, LSL, VERR and VERW will show the host's view; leave out \
                 --supervisor native to have it interpreted"
            );
        }
        let ending = Ending::new(Arc::clone(&self.devices));
        let news = Arc::new(News::default());
        let devices = Arc::clone(&self.devices);
        let around = Surroundings {
            mmu: Arc::clone(&self.mmu),
            devices: Arc::clone(&devices),
            ending: ending.clone(),
            requests: Arc::new(Requests::new(args.vcpus)),
            stops: Arc::new(Stops::new(devices, Arc::clone(&news))),
            power: Arc::clone(&self.power),
            watches: Arc::default(),
            threads: (0..args.vcpus).map(|_| AtomicI32::new(0)).collect(),
        };
        let (requests, stops) = (Arc::clone(&around.requests), Arc::clone(&around.stops));
        let mut subscribers = self.subscribers(args, &around, &news)?;
        let recorder = self.recorder(args).filter(|_| !args.deterministic);
        if let Some(recorder) = &recorder {
            subscribers.push(Box::new(recorder.timer().map_err(RunError::Setup)?));
        }
        let reclaimer = Reclaimer::start(Arc::clone(&self.mmu), ending.clone()).map_err(RunError::Setup)?;
        let collapser = match args.huge {
            Huge::On => {
                Some(Collapser::start(Arc::clone(&self.mmu), ending.clone()).map_err(RunError::Setup)?)
            }
            Huge::Off => None,
        };
        // A simulation's time is not the event loop's, which has the signals left then.
        let (clock, limit) = match args.deterministic {
            true => (Some(self.start_clock(args, &ending).map_err(RunError::Setup)?), None),
            false => (None, args.timeout),
        };
        let stress =
            |importers: &Importers| Stress::start(Arc::clone(&self.mmu), importers.clone(), ending.clone());
        let stress = self.importers.as_ref().map(stress).transpose().map_err(RunError::Setup)?;
        let events = EventLoop::start(Arc::clone(&self.devices), ending.clone(), limit, subscribers)
            .map_err(RunError::Setup)?;
        let beside = Beside::new(&self, &ending);
        let workers = self.virtio.start(&self.mmu, &ending).map_err(RunError::Setup)?;
        let ways = (self.runner.name(), self.shootdown);
        let mut start = Some(self.start);
        let core =
            |id| Core::new(start.take(), self.runner.mmu_vcpu(&self.mmu, id, args.tlb), around.clone());
        let mut cores: Vec<_> = (0..args.vcpus).map(core).collect();
        let mut backends = self.runner.into_backends(&self.mmu);
        let guest_started = micros();
        let vcpus = || run_vcpus(&mut cores, &mut backends, &ending);
        beside::work_during(companion, &beside, vcpus).map_err(RunError::Setup)?;
        requests.close();
        if let Some(cause) = ending.shutdown_cause() {
            news.shutdown(cause);
        }
        drop(stress);
        drop(collapser);
        drop(clock);
        drop(events);
        // Before the reclaimer: a worker may wait for a frame.
        let (disks, balloon) = workers.finish();
        drop(reclaimer);
        let end = ending.take().unwrap_or(End::Quit);
        // Before the witnesses are heard: they bring pages in.
        let series = recorder.map(|recorder| recorder.finish());
        let judged = judge(ways, &self.mmu, &self.notes, &self.first_byte, &end, &cores, guest_started);
        Ok(Summary { resets: stops.resets(), series, disks, balloon, ..judged })
    }

    /// What the event loop serves beside the board.
    fn subscribers(
        &self,
        args: &RunArgs,
        around: &Surroundings,
        news: &Arc<News>,
    ) -> Result<Vec<Subscriber>, RunError> {
        let mut subscribers: Vec<Subscriber> = Vec::new();
        if let Some(path) = &args.qmp {
            let controls = self.controls(args, around.clone(), Arc::clone(news));
            let socket = ControlSocket::bind(path, controls);
            let socket = socket.map_err(|source| RunError::Control { path: path.clone(), source })?;
            subscribers.push(Box::new(socket));
        }
        if let (Some(path), Some(exporter)) = (&args.export, &self.exporter) {
            let socket = ExportSocket::bind(path, exporter.clone(), around.ending.clone());
            let socket = socket.map_err(|source| RunError::Export { path: path.clone(), source })?;
            subscribers.push(Box::new(socket));
        }
        if let Some(schedule) = &self.overcommit.schedule
            && !args.deterministic
        {
            let timer = BudgetTimer::new(Arc::clone(&self.mmu), schedule).map_err(RunError::Setup)?;
            subscribers.push(Box::new(timer));
        }
        Ok(subscribers)
    }

    /// What has the event loop's timers in a simulation.
    fn start_clock(&self, args: &RunArgs, ending: &Ending) -> io::Result<simulation::Clock> {
        let steps = self.overcommit.schedule.as_ref();
        let steps = steps.map(|steps| BudgetTimer::new(Arc::clone(&self.mmu), steps)).transpose()?;
        simulation::Clock::start(Arc::clone(&self.devices), ending.clone(), args.timeout, steps)
    }

    fn controls(&self, args: &RunArgs, around: Surroundings, news: Arc<News>) -> Controls {
        let Surroundings { mmu, devices, ending, requests, stops, threads, .. } = around;
        Controls {
            ending,
            requests,
            devices,
            mmu,
            stops,
            balloon: Some(Arc::new(GuestBalloon::new(self.virtio.balloon(), args.mem, &news))),
            news,
            name: args.name.clone(),
            threads,
            swap: self.overcommit.schedule.is_some(),
            swap_in_memory: !matches!(args.swap, Some(Swap::File(_))),
            pool: Some(Arc::clone(&self.pool)),
            answer_wait: ANSWER_WAIT,
            exporter: self.exporter.clone(),
        }
    }

    /// What keeps a series, if anybody asks for one.
    fn recorder(&self, args: &RunArgs) -> Option<Recorder> {
        let asked = args.status || args.plot.is_some() || args.json.is_some();
        let live = args.status.then(|| LiveLine::new(&self.screen));
        asked.then(|| {
            let (mmu, pool) = (Arc::clone(&self.mmu), Arc::clone(&self.pool));
            Recorder::start(mmu, pool, self.virtio.balloon(), live)
        })
    }
}

/// Runs all vCPUs until the run ends: the first on this thread, each other on one of its own.
fn run_vcpus(cores: &mut [Core], backends: &mut [Box<dyn Backend>], ending: &Ending) -> io::Result<()> {
    thread::scope(|scope| {
        let mut vcpus = cores.iter_mut().zip(backends);
        let first = vcpus.next();
        let (mut actors, mut started) = (Vec::new(), Ok(()));
        for (core, backend) in vcpus {
            let name = format!("vcpu {}", core.mmu_vcpu.id());
            let ticket = sim::register(&name);
            actors.extend(ticket.as_ref().map(Ticket::id));
            let work = move || {
                let _actor = ticket.map(Ticket::enter);
                run_vcpu(core, &mut **backend, ending);
            };
            started = thread::Builder::new().name(name).spawn_scoped(scope, work).map(drop);
            if started.is_err() {
                ending.set(End::Quit);
                break;
            }
        }
        if let (Some((core, backend)), Ok(())) = (first, &started) {
            run_vcpu(core, &mut **backend, ending);
        }
        // The scope waits for threads, which in a simulation end when it is their turn.
        actors.iter().for_each(sim::await_end);
        started
    })
}

fn run_vcpu(core: &mut Core, backend: &mut dyn Backend, ending: &Ending) {
    let _owes = Having::new(core.mmu.coherence().answer(core.mmu_vcpu.id()));
    ending.watch("vCPU", || core.run(backend));
    // Had it panicked inside the guest, all others would wait for it for ever.
    core.mmu.coherence().leave_guest(core.mmu_vcpu.id());
}

/// The MMU of a guest with `memory`, before there is firmware.
fn config_of(args: &RunArgs, memory: &MemoryMap, overcommit: &Overcommit) -> Config {
    Config {
        guest_pages: memory::extent(memory).0,
        low_pages: overcommit.low_pages,
        reserved_frames: 0,
        shadow_pages_max: args.shadow_pages,
        roots_max: overcommit.roots_max,
        firmware_entry: 0,
        vcpus: args.vcpus,
        homes: args.export.is_some() || args.stress,
        blocks: args.huge == Huge::On,
        one_bucket: args.locks == Locks::One,
    }
}

/// Its machine.
fn build_pool(args: &RunArgs, plan: &Plan, config: &Config) -> Result<Pool, RunError> {
    let (firmware, tables) = (plan.firmware_frames(args.vcpus)?, u64::from(config.table_frames_max()));
    let frames = firmware + args.mem / PAGE_SIZE + tables + SPARE_FRAMES + u64::from(config.block_frames());
    let homes = if config.homes { u64::from(config.guest_pages) } else { 0 };
    // Those of a simulation are memory like any other: no process has them.
    let (frames, homes) = if args.stress { (frames + homes, 0) } else { (frames, homes) };
    Ok(match args.window {
        Window::Pinned => Pool::with_homes(frames, homes)?,
        Window::Mapped => Pool::mapped(frames, homes, firmware, tables)?,
    })
}

/// The board, its serial port being standard output.
fn build_devices(
    args: &RunArgs,
    memory: MemoryMap,
    screen: &Screen,
) -> Result<(Arc<Devices>, FirstByte), RunError> {
    // A run with a time limit ends in time, whether or not anybody reads what the guest has said.
    let patience = args.timeout.map(|_| READER_PATIENCE);
    let console = match args.status && io::stdout().is_terminal() {
        true => Console::new(screen.guard(io::stdout()), patience),
        false => Console::new(io::stdout(), patience),
    };
    let (console, first_byte) = console.map_err(RunError::Setup)?;
    let board = Board::new(BoardConfig {
        memory,
        vcpus: args.vcpus as usize,
        serial: Box::new(console),
        epoch_seconds: epoch_seconds(),
    })?;
    Ok((Arc::new(Devices::new(board).map_err(RunError::Setup)?), first_byte))
}

/// The MMU over the pool, of which the runner's firmware has its part.
fn build_mmu(
    config: Config,
    runner: &Runner,
    pool: &Arc<Pool>,
    outside: Option<Box<dyn External>>,
) -> Result<Mmu, RunError> {
    let config = Config {
        reserved_frames: runner.reserved_frames(),
        firmware_entry: runner.firmware_entry(),
        ..config
    };
    let kicks = Kicks::new(runner.kicks(), runner.notifier()).map_err(RunError::Setup)?;
    let mmu = Mmu::new(umbra_mmu::Machine::new(pool.region()), config, Box::new(kicks))
        .with_clock(Box::new(HostClock))
        .with_host(Box::new(PoolHost(Arc::clone(pool))));
    let mmu = match outside {
        Some(outside) => mmu.with_external(outside),
        None => mmu,
    };
    Ok(match pool.views() {
        Some(views) => mmu.with_views(views),
        None => mmu,
    })
}

fn judge(
    (backend, shootdown): (&'static str, &'static str),
    mmu: &Mmu,
    notes: &Notes,
    first_byte: &FirstByte,
    end: &End,
    cores: &[Core],
    guest_started: u64,
) -> Summary {
    let ended = micros();
    let counts = cores
        .iter()
        .map(Core::counts)
        .reduce(|(ours, faults), (more, others)| (ours.plus(more), faults.plus(others)));
    let (vcpu, faults) = counts.unwrap_or_default();
    let (regions, witness_error) = witness::hear(mmu, &LocalStack::new(Context::Host), notes, end);
    let audit = mmu.audit();
    let status = summary::judge(end, &regions, witness_error.as_deref(), &audit);
    let suspected = mmu.guest_tlb().and_then(GuestTlb::suspected);
    let status = summary::strictly(status, suspected.is_some());
    Summary {
        version: env!("CARGO_PKG_VERSION"),
        backend,
        shootdown,
        verdict: status.verdict(),
        status: status.code(),
        exit: status,
        guest_exit: end.guest_value(),
        end: end.to_string(),
        resets: 0,
        regions,
        witness_error,
        audit,
        vcpus: cores.len(),
        faults: faults.into(),
        tlb: cores
            .iter()
            .filter_map(|core| core.mmu_vcpu.tlb())
            .map(SoftTlb::stats)
            .fold(TlbCounts::default(), TlbCounts::plus),
        vcpu: vcpu.into(),
        memory: summary::Memory::of(mmu),
        guest_tlb: mmu.guest_tlb().map(|model| model.verdicts().into()),
        disks: Vec::new(),
        balloon: Default::default(),
        times: summary::Times { guest_started, first_serial_byte: first_byte.micros(), ended },
        series: None,
        event_log: None,
    }
}

/// The process's own time, which is virtual in a simulation.
#[derive(Debug)]
struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> u64 {
        if let Some(now) = sim::now() {
            return now;
        }
        process_start().elapsed().as_nanos() as u64
    }
}

/// The host behind the pool.
#[derive(Debug)]
struct PoolHost(Arc<Pool>);

impl Host for PoolHost {
    fn give_back(&self, frames: &[Mfn]) -> io::Result<()> {
        let mut frames = frames.to_vec();
        frames.sort_unstable();
        for run in frames.chunk_by(|a, b| a.0 + 1 == b.0) {
            self.0.give_back(run[0], run.len() as u32).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

fn micros() -> u64 {
    process_start().elapsed().as_micros() as u64
}

fn epoch_seconds() -> i64 {
    if sim::is_on() {
        return simulation::EPOCH_SECONDS;
    }
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

fn read_file(what: &'static str, path: &Path) -> Result<Vec<u8>, RunError> {
    let failed = |source| RunError::Read { what, path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(RunError::TooLarge { what, path: path.to_owned() });
    }
    Ok(bytes)
}
