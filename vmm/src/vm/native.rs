//! A vCPU that runs natively: the loop around the kvm backend.
//!
//! Story: until the run ends: look at requests, give the guest what the board asserts, make sure that the hardware
//! has the right root, descriptors and a clean TLB, enter, and act on why the guest left. Each of these is one
//! function below.
//!
//! The decision about a trap ([`NativeVcpu::on_trap`]) is the same for all vectors: a page fault goes to the MMU;
//! anything else is decided by interpreting the instruction at CS:EIP, since hosts differ in what they raise. What the
//! interpreter does not know is the guest's own exception where hardware alone can judge (FPU), else the end.
//!
//! Holds: between two entries the guest's state is `cpu`, whole. The vCPU counts as inside the guest from before its
//! last look at flush requests until after the exit.
//!
//! Locks: none held while the guest runs or sleeps.

use std::sync::Arc;

use umbra_mmu::{Access, AccessKind, Gva, Mmu, Outcome, Vcpu};

use super::bus::GuestBus;
use super::devices::Devices;
use super::ending::{End, Ending};
use super::flush::Flusher;
use super::requests::Requests;
use super::tables::DescriptorTables;
use crate::cpu::{CpuState, eflags};
use crate::interp::{self, Delivered, Event, Exception, Step, vector};
use crate::kvm::{KvmExit, KvmVcpu};

/// Page faults at one place in a row that change nothing, after which the instruction is interpreted: some hosts
/// fault for ever on what they cannot do (an access that wraps at 4 GiB).
const SPURIOUS_MAX: u32 = 4;

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
    /// TLB flushes made.
    pub flushes: u64,
}

/// One vCPU and all that its loop needs.
pub struct NativeVcpu {
    /// The guest's CPU.
    pub cpu: CpuState,
    /// The MMU's side of it.
    pub mmu_vcpu: Vcpu,
    /// Counters.
    pub stats: VcpuStats,
    kvm: KvmVcpu,
    mmu: Arc<Mmu>,
    devices: Arc<Devices>,
    ending: Ending,
    requests: Arc<Requests>,
    flusher: Arc<Flusher>,
    tables: DescriptorTables,
    /// EIP, address and count of the last spurious page faults.
    spurious: (u32, u32, u32),
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
    /// How this host's TLBs are flushed.
    pub flusher: Arc<Flusher>,
}

impl NativeVcpu {
    /// A vCPU that will start as `cpu` says.
    pub fn new(cpu: CpuState, kvm: KvmVcpu, id: u32, around: Surroundings) -> NativeVcpu {
        let Surroundings { mmu, devices, ending, requests, flusher } = around;
        devices.waker(id).set_kicker(kvm.kicker());
        NativeVcpu {
            cpu,
            mmu_vcpu: mmu.vcpu(id),
            stats: VcpuStats::default(),
            kvm,
            mmu,
            devices,
            ending,
            requests,
            flusher,
            tables: DescriptorTables::default(),
            spurious: (0, 0, 0),
        }
    }

    /// Runs the guest until the run ends.
    pub fn run(&mut self) {
        while !self.ending.is_set() {
            self.kvm.take_kick();
            self.requests.serve(&self.mmu, &self.mmu_vcpu);
            if let Some(end) = self.pass() {
                self.ending.set(end);
            }
        }
    }

    /// One round: interrupts, then the guest, then what it left for.
    fn pass(&mut self) -> Option<End> {
        if let Some(exit) = self.devices.with_as(self.mmu_vcpu.id(), |board, _| board.take_exit()) {
            return Some(End::Board(exit));
        }
        if let Some(end) = self.take_interrupt() {
            return Some(end);
        }
        if self.cpu.halted {
            return self.sleep();
        }
        if self.cpu.interrupt_shadow {
            // One instruction that no interrupt may part from the one before it.
            return self.interpret(None);
        }
        self.enter()
    }

    /// Delivers an NMI or an interrupt that the guest can take now.
    fn take_interrupt(&mut self) -> Option<End> {
        let id = self.mmu_vcpu.id();
        let (ready, nmi_ready) = (self.cpu.interruptible(), !self.cpu.nmi_blocked);
        let (nmi, vector) = self.devices.with_as(id, |board, now| {
            let nmi = nmi_ready && board.take_signals(id as usize).nmi;
            let vector = if ready && !nmi { board.acknowledge(now, id as usize) } else { None };
            (nmi, vector)
        });
        let event = match (nmi, vector) {
            (true, _) => Event::Nmi,
            (false, Some(vector)) => Event::External(vector),
            (false, None) => return None,
        };
        self.cpu.halted = false;
        self.stats.interrupts += 1;
        self.deliver(event)
    }

    /// HLT: waits for something to happen.
    fn sleep(&mut self) -> Option<End> {
        let id = self.mmu_vcpu.id();
        let (ready, takes) = (self.cpu.interruptible(), self.cpu.eflags & eflags::IF != 0);
        let (pending, never) = self
            .devices
            .with_as(id, |board, _| (board.interrupt_pending(id as usize), board.next_deadline().is_none()));
        if ready && pending {
            return None;
        }
        if (never || !takes) && !self.requests.may_come() {
            return Some(End::Stuck(Box::new(self.cpu.clone())));
        }
        self.devices.waker(id).sleep();
        None
    }

    /// Enters the guest and acts on its exit.
    fn enter(&mut self) -> Option<End> {
        let user = self.cpu.cpl == 3;
        let Some(root) = self.mmu.root_address(&self.mmu_vcpu, user) else {
            return Some(End::OutOfFrames(umbra_mmu::Gfn(0)));
        };
        if let Err(error) = self.tables.refresh(&self.mmu, &self.mmu_vcpu, &self.cpu, &mut self.kvm) {
            return Some(self.backend(error));
        }
        let (id, coherence) = (self.mmu_vcpu.id(), self.mmu.coherence());
        let flush = coherence.enter_guest(id).then(|| coherence.begin_flush());
        if flush.is_some()
            && let Err(error) = self.flusher.before_entry(&self.mmu)
        {
            coherence.leave_guest(id);
            return Some(self.backend(error));
        }
        let exit = self.kvm.enter(&mut self.cpu, root, flush.is_some() && self.flusher.flushes_at_entry());
        if let (Some(epoch), Ok(_)) = (flush, &exit) {
            coherence.end_flush(id, epoch);
            self.stats.flushes += 1;
        }
        coherence.leave_guest(id);
        self.stats.entries += 1;
        match exit {
            Ok(KvmExit::Kicked) => {
                self.stats.kicks += 1;
                None
            }
            Ok(KvmExit::Trap { vector, error, cr2 }) => self.on_trap(vector, error, cr2),
            Err(error) => Some(self.backend(error)),
        }
    }

    fn backend(&self, error: crate::kvm::KvmError) -> End {
        End::Backend { error, cpu: Box::new(self.cpu.clone()) }
    }

    /// Decides what a trap of the hardware means.
    fn on_trap(&mut self, vector: u8, error: u32, cr2: u64) -> Option<End> {
        if vector == vector::PF {
            self.stats.page_faults += 1;
            return match u32::try_from(cr2) {
                Ok(gva) => self.on_page_fault(Gva(gva), error),
                Err(_) => self.interpret(Some((vector, error))),
            };
        }
        self.stats.traps += 1;
        if vector == vector::DB {
            // A single step or a breakpoint: the hardware alone has seen it.
            return self.deliver(Event::Exception(Exception::DB));
        }
        self.interpret(Some((vector, error)))
    }

    fn on_page_fault(&mut self, gva: Gva, error: u32) -> Option<End> {
        let access = self.access_of(error);
        match self.mmu.fault(&self.mmu_vcpu, gva, access) {
            Outcome::Fixed | Outcome::Again => None,
            Outcome::Spurious if !self.is_stuck_at(gva) => None,
            Outcome::Spurious | Outcome::Mmio(_) | Outcome::Emulate(_) => {
                self.interpret(Some((vector::PF, error)))
            }
            Outcome::Guest(fault) => {
                self.stats.user_faults += u64::from(access.user);
                self.deliver(Event::Exception(fault.into()))
            }
            Outcome::Gate(gfn) => {
                self.mmu.wait_at_gate(&self.mmu_vcpu, gfn);
                None
            }
            Outcome::Need(gfn) => Some(End::OutOfFrames(gfn)),
        }
    }

    /// What the guest tried, from the hardware's error code and the guest's own privilege.
    fn access_of(&self, error: u32) -> Access {
        let kind = if error & 1 << 4 != 0 {
            AccessKind::Execute
        } else if error & 1 << 1 != 0 {
            AccessKind::Write
        } else {
            AccessKind::Read
        };
        Access { kind, user: self.cpu.cpl == 3 }
    }

    /// Counts spurious faults at one place; true when running on has not helped.
    fn is_stuck_at(&mut self, gva: Gva) -> bool {
        let (eip, address, count) = self.spurious;
        let again = (eip, address) == (self.cpu.eip, gva.0);
        self.spurious = (self.cpu.eip, gva.0, if again { count + 1 } else { 1 });
        again && count >= SPURIOUS_MAX
    }

    /// Executes the instruction at CS:EIP by the interpreter. `trap` is what the hardware raised there.
    fn interpret(&mut self, trap: Option<(u8, u32)>) -> Option<End> {
        self.stats.interpreted += 1;
        let mut bus = GuestBus::new(&self.mmu, &mut self.mmu_vcpu, &self.devices);
        let step = interp::step(&mut self.cpu, &mut bus);
        let after = bus.aftermath();
        if after.descriptors {
            self.tables.invalidate();
        }
        match step {
            Step::Done | Step::Halted => None,
            Step::Exception(exception) => self.deliver(Event::Exception(exception)),
            Step::Again => after.need.map(End::OutOfFrames),
            Step::Unknown(instruction) => match trap {
                Some((raised, _)) if is_the_hardwares(raised) => {
                    self.deliver(Event::Exception(Exception::plain(raised)))
                }
                _ => Some(End::Unknown { instruction, trap, cpu: Box::new(self.cpu.clone()) }),
            },
        }
    }

    fn deliver(&mut self, event: Event) -> Option<End> {
        if let Event::Exception(_) = event {
            self.stats.exceptions += 1;
        }
        loop {
            let mut bus = GuestBus::new(&self.mmu, &mut self.mmu_vcpu, &self.devices);
            let delivered = interp::deliver(&mut self.cpu, &mut bus, event);
            let after = bus.aftermath();
            if after.descriptors {
                self.tables.invalidate();
            }
            return match delivered {
                Delivered::Handler => None,
                Delivered::TripleFault => Some(End::TripleFault(Box::new(self.cpu.clone()))),
                Delivered::Again => match after.need {
                    Some(gfn) => Some(End::OutOfFrames(gfn)),
                    None => continue,
                },
                Delivered::Unknown(instruction) => {
                    Some(End::Unknown { instruction, trap: None, cpu: Box::new(self.cpu.clone()) })
                }
            };
        }
    }
}

/// Exceptions of instructions that run natively and that the interpreter does not execute: #NM, #MF, #AC, #XM.
fn is_the_hardwares(vector: u8) -> bool {
    matches!(vector, 7 | 16 | 17 | 19)
}
