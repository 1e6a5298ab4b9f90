//! A vCPU: what is the same whoever runs its guest code.
//!
//! Story: until the run ends: look at requests, give the guest what the board asserts, sleep while it is halted, else let
//! the [`Backend`] run guest code until it has something to tell. Two backends exist, `native` (KVM) and `soft` (the
//! interpreter); between their calls the guest's state is [`Core::cpu`], whole.
//!
//! A vCPU but the first begins waiting for a start-up, as it does after an INIT.
//!
//! ```text
//! run: take the kick back --> ended? --> requests --> stopped? --> board: exit, NMI, interrupt --> halted? --> Backend::run
//!        ^                                             stand, reset                                 sleep        |
//!        +--------------------------------------------------------------------------------------------+----------+
//! ```
//!
//! Locks: none held while the guest runs or sleeps.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use umbra_mmu::sync::sim;
use umbra_mmu::{FaultStats, Gpa, Mmu, Rule, Vcpu};

use super::bus::{Aftermath, FpuUse, GuestBus};
use super::devices::{Devices, Nap};
use super::ending::{End, Ending};
use super::power::PowerOn;
use super::requests::Requests;
use super::stops::{Duty, Stops};
use super::tables::{DescriptorTables, Watches};
use crate::board::{Nanos, Signals};
use crate::cpu::{CpuState, eflags};
use crate::interp::engine::Waiting;
use crate::interp::{self, Bus, Delivered, Event, Step, vector};

/// What one vCPU did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuStats {
    /// Entries into the guest.
    pub entries: u64,
    /// Page faults of the hardware.
    pub page_faults: u64,
    /// Other traps.
    pub traps: u64,
    /// Exits by a kick.
    pub kicks: u64,
    /// Instructions interpreted.
    pub interpreted: u64,
    /// Exceptions given to the guest, page faults among them.
    pub exceptions: u64,
    /// Page faults given to the guest's user code.
    pub user_faults: u64,
    /// External interrupts given to the guest.
    pub interrupts: u64,
    /// Full TLB flushes made.
    pub flushes: u64,
}

impl VcpuStats {
    /// What this one and another did.
    pub fn plus(self, other: VcpuStats) -> VcpuStats {
        VcpuStats {
            entries: self.entries + other.entries,
            page_faults: self.page_faults + other.page_faults,
            traps: self.traps + other.traps,
            kicks: self.kicks + other.kicks,
            interpreted: self.interpreted + other.interpreted,
            exceptions: self.exceptions + other.exceptions,
            user_faults: self.user_faults + other.user_faults,
            interrupts: self.interrupts + other.interrupts,
            flushes: self.flushes + other.flushes,
        }
    }
}

/// What runs guest code. It may be made on one thread and run on another.
pub trait Backend: Send {
    /// Takes back the kick that made it leave the guest, or will.
    fn take_kick(&mut self);

    /// Runs guest code from [`Core::cpu`] on, until something happened that the loop should look at. The guest is not
    /// halted.
    fn run(&mut self, core: &mut Core) -> Option<End>;
}

/// What the rest of the machine gives a vCPU.
#[derive(Clone)]
pub struct Surroundings {
    /// The MMU.
    pub mmu: Arc<Mmu>,
    /// The board.
    pub devices: Arc<Devices>,
    /// Where the end is noted.
    pub ending: Ending,
    /// What others want of the vCPU's thread.
    pub requests: Arc<Requests>,
    /// Whether the guest is to run.
    pub stops: Arc<Stops>,
    /// What makes the machine anew.
    pub power: Arc<dyn PowerOn>,
    /// The descriptor tables that native code loads from.
    pub watches: Arc<Watches>,
    /// The threads of the vCPUs, as the kernel counts them.
    pub threads: Arc<[AtomicI32]>,
}

/// One vCPU, but for who runs it.
pub struct Core {
    /// The guest's CPU.
    pub cpu: CpuState,
    /// The MMU's side of it.
    pub mmu_vcpu: Vcpu,
    /// Counters.
    pub stats: VcpuStats,
    /// The MMU.
    pub mmu: Arc<Mmu>,
    /// The board.
    pub devices: Arc<Devices>,
    /// The guest's descriptor tables, as native code needs them.
    pub tables: DescriptorTables,
    /// The vCPU's own time, while it is interpreted: it moves on with its instructions, and never beyond the board's by
    /// much.
    pub time: Nanos,
    /// Where the guest's FPU registers are: in the hardware, or in [`Core::cpu`].
    pub fpu_in_hardware: bool,
    /// An instruction waits for them to be fetched.
    pub fpu_wanted: bool,
    /// A flush that the software TLB has made and the hardware has not.
    pub hardware_owes_flush: bool,
    ending: Ending,
    requests: Arc<Requests>,
    stops: Arc<Stops>,
    power: Arc<dyn PowerOn>,
    threads: Arc<[AtomicI32]>,
    /// It does nothing before another CPU has sent it a start-up.
    waits_for_startup: bool,
    /// What has come and the guest cannot take yet. Like silicon, it remembers one NMI.
    pub waiting: Waiting,
}

impl Core {
    /// A vCPU that will start as `start` says, or where another one has it start.
    pub fn new(start: Option<CpuState>, mmu_vcpu: Vcpu, around: Surroundings) -> Core {
        let Surroundings { mmu, devices, ending, requests, stops, power, watches, threads } = around;
        Core {
            waits_for_startup: start.is_none(),
            cpu: start.unwrap_or_else(|| CpuState::reset(mmu_vcpu.id())),
            mmu_vcpu,
            stats: VcpuStats::default(),
            mmu,
            devices,
            tables: DescriptorTables::new(watches),
            time: Nanos(0),
            fpu_in_hardware: false,
            fpu_wanted: false,
            hardware_owes_flush: false,
            ending,
            requests,
            stops,
            power,
            threads,
            waiting: Waiting::default(),
        }
    }

    /// Runs the guest until the run ends.
    ///
    /// Whoever wants something writes it down first and kicks then. So the kick is taken back first and what was
    /// written is looked at after: the other way round, the kick of one that came in between would be gone.
    pub fn run(&mut self, backend: &mut dyn Backend) {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        self.threads[self.mmu_vcpu.id() as usize].store(thread, Ordering::Relaxed);
        loop {
            backend.take_kick();
            if self.ending.is_set() {
                self.stops.end();
                return self.mmu.rest(&self.mmu_vcpu);
            }
            self.requests.serve(&self.mmu, &self.mmu_vcpu);
            let id = self.mmu_vcpu.id();
            let end = match self.stops.duty(id) {
                Duty::Run => self.pass(backend),
                Duty::Stand => {
                    self.mmu.rest(&self.mmu_vcpu);
                    self.devices.sleep(id);
                    None
                }
                Duty::Forget => {
                    self.forget();
                    self.stops.has_forgotten(id);
                    None
                }
                Duty::PowerOn => self.power_on(),
            };
            if let Some(end) = end {
                self.ending.set(end);
            }
        }
    }

    /// The CPU is as after a reset, and waits for a start-up; nothing of its paging or its tables is left.
    fn forget(&mut self) {
        self.mmu.reset_vcpu(&mut self.mmu_vcpu);
        self.tables.forget(&self.mmu);
        self.cpu = self.after_reset(CpuState::reset(self.mmu_vcpu.id()));
        (self.fpu_in_hardware, self.fpu_wanted) = (false, false);
        (self.waits_for_startup, self.waiting) = (true, Waiting::default());
    }

    /// The first vCPU makes the machine anew, and begins where that says.
    fn power_on(&mut self) -> Option<End> {
        match self.power.power_on(&self.mmu, &self.devices, &self.ending) {
            Ok(start) => {
                self.cpu = self.after_reset(start);
                self.waits_for_startup = false;
                self.stops.has_begun_anew();
                None
            }
            Err(end) => Some(end),
        }
    }

    /// The time-stamp counter begins at 0, on all CPUs at once: guest time stands.
    fn after_reset(&self, mut cpu: CpuState) -> CpuState {
        cpu.msrs.tsc_offset = self.devices.now().0.wrapping_neg();
        cpu
    }

    /// One round: what the board wants, then the guest, then what it left for.
    fn pass(&mut self, backend: &mut dyn Backend) -> Option<End> {
        if let Some(end) = self.heed_board() {
            return Some(end);
        }
        if self.cpu.halted || self.waits_for_startup {
            return self.sleep();
        }
        backend.run(self)
    }

    /// Ends the run where the board says so; delivers an NMI or an interrupt that the guest can take now.
    fn heed_board(&mut self) -> Option<End> {
        let id = self.mmu_vcpu.id() as usize;
        let (exit, signals) =
            self.devices.with_as(id as u32, |board, _| (board.take_exit(), board.take_signals(id)));
        if let Some(exit) = exit {
            return Some(End::Board(exit));
        }
        if signals.init && id == 0 {
            // The boot processor begins anew at the firmware's reset vector, and there is no such firmware.
            return Some(End::Init(Box::new(self.cpu.clone())));
        }
        // Before the state is looked at: what an interrupt found before an INIT is gone after it.
        self.heed_startup(signals);
        let up = !self.waits_for_startup;
        let ready = up && self.cpu.interruptible();
        let nmi_ready = up && !self.cpu.nmi_blocked && !self.cpu.interrupt_shadow;
        self.waiting.nmi |= signals.nmi;
        let nmi_first = nmi_ready && self.waiting.nmi;
        let (vector, pending) = self.devices.with_as(id as u32, |board, now| {
            let vector = if ready && !nmi_first { board.acknowledge(now, id) } else { None };
            (vector, board.interrupt_pending(id))
        });
        // Asked for and not given: nothing to wait for, whatever the board says.
        self.waiting.interrupt = pending && (!ready || vector.is_some());
        let event = match vector {
            _ if nmi_ready && self.waiting.nmi => Event::Nmi,
            Some(vector) => Event::External(vector),
            None => return None,
        };
        self.waiting.nmi &= event != Event::Nmi;
        self.stats.interrupts += 1;
        sim::note(|line| {
            let _ = match event {
                Event::External(vector) => write!(line, "interrupt {vector:#x}"),
                _ => write!(line, "NMI"),
            };
        });
        self.deliver(event)
    }

    /// An INIT, and a start-up after it. One without means nothing to a CPU that runs.
    fn heed_startup(&mut self, signals: Signals) {
        if signals.init {
            let reset = self.cpu.after_init(self.mmu_vcpu.id());
            self.put(reset);
            self.devices.with_as(self.mmu_vcpu.id(), |board, now| {
                board.init_vcpu(now, self.mmu_vcpu.id() as usize);
            });
            (self.waits_for_startup, self.waiting) = (true, Waiting::default());
        }
        if let Some(page) = signals.startup
            && self.waits_for_startup
        {
            self.cpu.start_up(page);
            self.waits_for_startup = false;
        }
    }

    /// The CPU becomes `cpu`, whose paging is off.
    fn put(&mut self, cpu: CpuState) {
        let (done, _) = self.with_bus(None, |_, bus| bus.set_paging(&cpu, true));
        debug_assert!(done.is_ok(), "there is nothing to be loaded with paging off: {done:?}");
        self.tables.invalidate();
        self.cpu = cpu;
    }

    /// HLT: waits for something to happen.
    fn sleep(&mut self) -> Option<End> {
        let id = self.mmu_vcpu.id();
        let open = !self.waits_for_startup && self.cpu.eflags & eflags::IF != 0;
        match self.devices.nap(id, open) {
            Nap::None => return None,
            Nap::ForEver if !self.requests.may_come() => {
                return Some(End::Stuck(Box::new(self.cpu.clone())));
            }
            Nap::ForEver | Nap::Until => {}
        }
        self.mmu.rest(&self.mmu_vcpu);
        self.devices.sleep(id);
        None
    }

    /// Counters of the vCPU and of its side of the MMU.
    pub fn counts(&self) -> (VcpuStats, FaultStats) {
        (self.stats, self.mmu_vcpu.stats())
    }

    /// Ends the run.
    pub fn end(&self, end: End) {
        self.ending.set(end);
    }

    /// Takes the end back.
    #[cfg(test)]
    pub fn take_end(&self) -> Option<End> {
        self.ending.take()
    }

    /// True once the run has ended.
    pub fn has_ended(&self) -> bool {
        self.ending.is_set()
    }

    /// The time that the vCPU's own begins at: guest time, but never earlier than it has already been.
    pub fn catch_up(&mut self) -> Nanos {
        self.time = self.time.max(self.devices.now());
        self.time
    }

    /// Calls with a bus of this vCPU, by real time or by its own, and heeds what came of it.
    pub fn with_bus<R>(
        &mut self,
        time: Option<Nanos>,
        call: impl FnOnce(&mut CpuState, &mut GuestBus<'_>) -> R,
    ) -> (R, Aftermath) {
        let mut bus = GuestBus::new(&self.mmu, &mut self.mmu_vcpu, &self.devices, time);
        if self.fpu_in_hardware {
            bus.without_fpu();
        }
        let result = call(&mut self.cpu, &mut bus);
        if time.is_some() {
            self.time = bus.time();
        }
        let after = bus.into_aftermath();
        self.heed(&after);
        (result, after)
    }

    /// Keeps what was derived from guest memory in step with what an instruction did.
    fn heed(&mut self, after: &Aftermath) {
        if after.descriptors || after.invalidated.is_some_and(|gva| self.tables.contain(gva)) {
            self.tables.invalidate();
        }
        if after.watched {
            self.tables.stored_to(&self.mmu, self.mmu_vcpu.id());
        }
        self.stats.flushes += after.flushes;
        self.fpu_wanted |= after.fpu == Some(FpuUse::Missing);
        self.hardware_owes_flush |= after.flushes > 0 && self.mmu.rules().keep(Rule::HardwareOwesFlush);
    }

    /// Inside the guest from now on, to be run by hardware; says whether that must flush first.
    pub fn enter_hardware(&self) -> bool {
        self.mmu.enter(&self.mmu_vcpu) || self.hardware_owes_flush
    }

    /// Interprets the instruction at CS:EIP.
    pub fn interpret(&mut self) -> (Step, Aftermath) {
        self.stats.interpreted += 1;
        let time = self.own_time();
        self.with_bus(time, |cpu, bus| interp::step(cpu, bus))
    }

    /// The time of a vCPU that has a clock of its own.
    fn own_time(&mut self) -> Option<Nanos> {
        self.mmu_vcpu.tlb().is_some().then(|| self.catch_up())
    }

    /// Gives the guest an exception, interrupt or NMI.
    pub fn deliver(&mut self, event: Event) -> Option<End> {
        if let Event::Exception(exception) = event {
            self.stats.exceptions += 1;
            self.stats.user_faults += u64::from(exception.vector == vector::PF && self.cpu.cpl == 3);
        }
        loop {
            let time = self.own_time();
            let (delivered, after) = self.with_bus(time, |cpu, bus| {
                let delivered = interp::deliver(cpu, bus, event);
                if delivered == Delivered::Handler {
                    bus.event();
                }
                delivered
            });
            match delivered {
                Delivered::Handler => return None,
                Delivered::TripleFault => return Some(End::TripleFault(Box::new(self.cpu.clone()))),
                Delivered::Unknown(instruction) => return Some(self.unknown(instruction, None)),
                Delivered::Again if self.has_ended() => return None,
                Delivered::Again => {
                    if let Some(end) = lacking(after) {
                        return Some(end);
                    }
                }
            }
        }
    }

    /// The end for an instruction that nobody can run.
    pub fn unknown(&self, instruction: interp::UnknownInstruction, trap: Option<(u8, u32)>) -> End {
        End::Unknown { instruction, trap, cpu: Box::new(self.cpu.clone()) }
    }

    /// Makes room for the shadow's own tables; the end where there is none.
    pub fn make_room(&self) -> Option<End> {
        let directory = Gpa(self.cpu.cr3.into()).gfn();
        self.mmu.bring_in(Some(self.mmu_vcpu.id()), directory).err().map(End::Shortage)
    }
}

/// Why an instruction must be run again, where that is the end of the run.
pub fn lacking(after: Aftermath) -> Option<End> {
    match (after.violation, after.finding) {
        (Some(violation), _) => Some(End::Incoherent(violation)),
        (None, Some(finding)) => Some(End::GuestTlb(finding)),
        (None, None) => after.shortage.map(End::Shortage),
    }
}

#[cfg(test)]
#[path = "vcpu_tests.rs"]
mod tests;
