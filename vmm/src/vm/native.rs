//! A vCPU that runs natively: the loop around the kvm backend.
//!
//! Story: until the run ends: look at requests, give the guest what the board asserts, make sure that the hardware
//! has the right root, descriptors and a clean TLB, enter, and act on why the guest left. Each of these is one
//! function below.
//!
//! The decision about a trap ([`NativeVcpu::on_trap`]) is the same for all vectors: a page fault goes to the MMU;
//! anything else is decided by interpreting the instruction at CS:EIP, since hosts differ in what they raise. What the
//! interpreter does not know is the guest's own exception where hardware alone can judge (FPU), else the end. A state
//! that the hardware cannot run ([`can_run`]) is interpreted, instruction by instruction, for as long as it lasts.
//!
//! Holds: between two entries the guest's state is `cpu`, whole. The vCPU counts as inside the guest from before its
//! last look at flush requests until after the exit.
//!
//! Locks: none held while the guest runs or sleeps.

use std::sync::Arc;

use umbra_mmu::{Access, AccessKind, Gpa, Gva, Mmu, Outcome, Vcpu};

use super::bus::{Aftermath, GuestBus};
use super::devices::Devices;
use super::ending::{End, Ending};
use super::flush::Flusher;
use super::requests::Requests;
use super::tables::DescriptorTables;
use crate::cpu::{CpuState, eflags};
use crate::interp::{self, Delivered, Event, Exception, Step, UnknownInstruction, vector};
use crate::kvm::{KvmExit, KvmVcpu, can_run};

/// Page faults at one place in a row that change nothing, after which the instruction is interpreted: some hosts
/// fault for ever on what they cannot do (an access that wraps at 4 GiB).
const SPURIOUS_MAX: u32 = 4;
/// Bits of a page fault's error code.
const FAULT_WRITE: u32 = 1 << 1;
const FAULT_USER: u32 = 1 << 2;
const FAULT_FETCH: u32 = 1 << 4;
/// DR6.BS: the single-step trap.
const DR6_BS: u32 = 1 << 14;
/// Vectors of the FPU.
const NM: u8 = 7;
const MF: u8 = 16;
const XM: u8 = 19;

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
    /// An NMI has come that the guest cannot take yet. Like silicon, it remembers one.
    nmi_waits: bool,
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
            nmi_waits: false,
        }
    }

    /// Runs the guest until the run ends.
    ///
    /// Whoever wants something writes it down first and kicks then. So the kick is taken back first and what was
    /// written is looked at after: the other way round, the kick of one that came in between would be gone.
    pub fn run(&mut self) {
        loop {
            self.kvm.take_kick();
            if self.ending.is_set() {
                return;
            }
            self.requests.serve(&self.mmu, &self.mmu_vcpu);
            if let Some(end) = self.pass() {
                self.ending.set(end);
            }
        }
    }

    /// One round: what the board wants, then the guest, then what it left for.
    fn pass(&mut self) -> Option<End> {
        if let Some(end) = self.heed_board() {
            return Some(end);
        }
        if self.cpu.halted {
            return self.sleep();
        }
        if self.cpu.interrupt_shadow {
            // One instruction that no interrupt may part from the one before it.
            return self.interpret(Why::Shadow);
        }
        if can_run(&self.cpu).is_err() {
            return self.interpret(Why::CannotRun);
        }
        self.enter()
    }

    /// Ends the run where the board says so; delivers an NMI or an interrupt that the guest can take now.
    fn heed_board(&mut self) -> Option<End> {
        let (id, ready) = (self.mmu_vcpu.id() as usize, self.cpu.interruptible());
        let nmi_ready = !self.cpu.nmi_blocked && !self.cpu.interrupt_shadow;
        let earlier = self.nmi_waits;
        let (exit, signals, vector) = self.devices.with_as(id as u32, |board, now| {
            let signals = board.take_signals(id);
            let nmi_first = nmi_ready && (signals.nmi || earlier);
            let vector = if ready && !nmi_first { board.acknowledge(now, id) } else { None };
            (board.take_exit(), signals, vector)
        });
        self.nmi_waits |= signals.nmi;
        if let Some(exit) = exit {
            return Some(End::Board(exit));
        }
        if signals.init {
            // The boot processor begins anew at the firmware's reset vector, and there is no such firmware. A
            // start-up without an INIT before it means nothing to a CPU that runs.
            return Some(End::Init(Box::new(self.cpu.clone())));
        }
        let event = match vector {
            _ if nmi_ready && self.nmi_waits => Event::Nmi,
            Some(vector) => Event::External(vector),
            None => return None,
        };
        self.nmi_waits &= event != Event::Nmi;
        self.stats.interrupts += 1;
        self.deliver(event)
    }

    /// HLT: waits for something to happen.
    fn sleep(&mut self) -> Option<End> {
        let id = self.mmu_vcpu.id();
        let open = self.cpu.eflags & eflags::IF != 0;
        let (pending, never) = self
            .devices
            .with_as(id, |board, _| (board.interrupt_pending(id as usize), board.next_deadline().is_none()));
        if open && pending {
            return None;
        }
        if (never || !open) && !self.requests.may_come() {
            return Some(End::Stuck(Box::new(self.cpu.clone())));
        }
        self.devices.waker(id).sleep();
        None
    }

    /// Enters the guest and acts on its exit.
    fn enter(&mut self) -> Option<End> {
        let user = self.cpu.cpl == 3;
        let Some(root) = self.mmu.root_address(&self.mmu_vcpu, user) else {
            return Some(End::OutOfFrames(Gpa(self.cpu.cr3.into()).gfn()));
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
        let why = Why::Trap(vector, error);
        if vector == vector::PF {
            self.stats.page_faults += 1;
            // Without the U bit it is an access that the host makes with the wrong rights, not one that the
            // guest's tables could explain; above 4 GiB it is one that wraps.
            return match u32::try_from(cr2) {
                Ok(gva) if error & FAULT_USER != 0 => self.on_page_fault(Gva(gva), error),
                _ => self.interpret(why),
            };
        }
        self.stats.traps += 1;
        if vector == vector::DB {
            return self.on_debug_trap();
        }
        self.interpret(why)
    }

    /// A single step or a breakpoint: the hardware alone has seen it, and DR6 has been taken from it where the host
    /// lets us read it.
    fn on_debug_trap(&mut self) -> Option<End> {
        let stepped = self.cpu.eflags & eflags::TF != 0;
        if stepped && !self.kvm.features().debug_registers {
            self.cpu.dr[6] |= DR6_BS;
        }
        self.deliver(Event::Exception(Exception::DB))
    }

    fn on_page_fault(&mut self, gva: Gva, error: u32) -> Option<End> {
        let access = self.access_of(error);
        match self.mmu.fault(&self.mmu_vcpu, gva, access) {
            Outcome::Fixed | Outcome::Again => None,
            Outcome::Spurious if !self.is_stuck_at(gva) => None,
            Outcome::Spurious | Outcome::Mmio(_) | Outcome::Emulate(_) => {
                self.interpret(Why::Trap(vector::PF, error))
            }
            // Perhaps an access that wraps at 4 GiB, which some hosts report so: the instruction itself decides.
            Outcome::Guest(fault) if gva.0 == 0 => self.interpret(Why::AtZero(fault.into())),
            Outcome::Guest(fault) => self.deliver(Event::Exception(fault.into())),
            Outcome::Gate(gfn) => {
                self.mmu.wait_at_gate(&self.mmu_vcpu, gfn);
                None
            }
            Outcome::Need(gfn) => Some(End::OutOfFrames(gfn)),
        }
    }

    /// What the guest tried, from the hardware's error code and the guest's own privilege.
    fn access_of(&self, error: u32) -> Access {
        let kind = if error & FAULT_FETCH != 0 {
            AccessKind::Execute
        } else if error & FAULT_WRITE != 0 {
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

    /// Executes the instruction at CS:EIP by the interpreter.
    fn interpret(&mut self, why: Why) -> Option<End> {
        self.stats.interpreted += 1;
        let mut bus = GuestBus::new(&self.mmu, &mut self.mmu_vcpu, &self.devices);
        let step = interp::step(&mut self.cpu, &mut bus);
        let after = bus.aftermath();
        self.heed(&after);
        match step {
            Step::Done | Step::Halted => None,
            Step::Exception(exception) => self.deliver(Event::Exception(exception)),
            Step::Again => after.need.map(End::OutOfFrames),
            Step::Unknown(instruction) => self.on_unknown(instruction, why),
        }
    }

    /// What the interpreter does not know is the hardware's to run or to refuse, where it can.
    fn on_unknown(&mut self, instruction: UnknownInstruction, why: Why) -> Option<End> {
        let trap = match why {
            Why::Trap(vector, error) => match refusal_of(vector) {
                Some(exception) => return self.deliver(Event::Exception(exception)),
                None => Some((vector, error)),
            },
            Why::AtZero(fault) => return self.deliver(Event::Exception(fault)),
            Why::Shadow if can_run(&self.cpu).is_ok() => return self.enter(),
            Why::Shadow | Why::CannotRun => None,
        };
        Some(End::Unknown { instruction, trap, cpu: Box::new(self.cpu.clone()) })
    }

    /// Keeps what was derived from guest memory in step with what an instruction did.
    fn heed(&mut self, after: &Aftermath) {
        if after.descriptors || after.invalidated.is_some_and(|gva| self.tables.contain(gva)) {
            self.tables.invalidate();
        }
    }

    fn deliver(&mut self, event: Event) -> Option<End> {
        if let Event::Exception(exception) = event {
            self.stats.exceptions += 1;
            self.stats.user_faults += u64::from(exception.vector == vector::PF && self.cpu.cpl == 3);
        }
        loop {
            let mut bus = GuestBus::new(&self.mmu, &mut self.mmu_vcpu, &self.devices);
            let delivered = interp::deliver(&mut self.cpu, &mut bus, event);
            let after = bus.aftermath();
            self.heed(&after);
            return match (delivered, after.need) {
                (Delivered::Handler, _) => None,
                (Delivered::TripleFault, _) => Some(End::TripleFault(Box::new(self.cpu.clone()))),
                (Delivered::Again, Some(gfn)) => Some(End::OutOfFrames(gfn)),
                (Delivered::Again, None) if self.ending.is_set() => None,
                (Delivered::Again, None) => continue,
                (Delivered::Unknown(instruction), _) => {
                    Some(End::Unknown { instruction, trap: None, cpu: Box::new(self.cpu.clone()) })
                }
            };
        }
    }
}

/// Why an instruction is interpreted.
#[derive(Clone, Copy, Debug)]
enum Why {
    /// The hardware raised this there: vector, error code.
    Trap(u8, u32),
    /// The hardware reported a fault at address 0, which the guest's tables make this one.
    AtZero(Exception),
    /// It stands in an interrupt shadow.
    Shadow,
    /// The hardware cannot run this state.
    CannotRun,
}

/// Exceptions that only the hardware can judge, of instructions that run natively and that the interpreter does not
/// execute.
fn refusal_of(vector: u8) -> Option<Exception> {
    match vector {
        NM | MF | XM => Some(Exception::plain(vector)),
        vector::AC => Some(Exception::AC),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fpus_exceptions_are_the_hardwares_and_only_alignment_has_an_error_code() {
        assert_eq!(refusal_of(NM), Some(Exception::NM));
        assert_eq!(refusal_of(vector::AC).and_then(|e| e.error), Some(0));
        assert!(refusal_of(MF).is_some_and(|e| e.error.is_none()));
        assert_eq!(refusal_of(vector::UD), None);
        assert_eq!(refusal_of(vector::GP), None);
    }
}
