//! A vCPU that hardware runs: KVM's, or a model of it.
//!
//! Story: make sure that the hardware has the right root, descriptors and a clean TLB, enter, and act on why the guest
//! left. Each of these is one function below.
//!
//! The decision about a trap ([`Native::on_trap`]) is the same for all vectors: a page fault goes to the MMU;
//! anything else is decided by interpreting the instruction at CS:EIP, since hosts differ in what they raise. What the
//! interpreter does not know is the end. A state that the hardware cannot run ([`can_run`]) is interpreted, instruction
//! by instruction, for as long as it lasts.
//!
//! The FPU's registers stay in the hardware between entries. An instruction that is interpreted and wants them has them
//! fetched; the next entry gives them back. Where this host's KVM does not know FPU instructions, code that uses one will
//! use more: it is interpreted for a stretch ([`STRETCH`]).
//!
//! Holds: the vCPU counts as inside the guest from before its
//! last look at flush requests until after the exit.
//!
//! Locks: none held while the guest runs or sleeps.

use std::sync::Arc;

use umbra_mmu::{Access, AccessKind, Gva, Outcome};

use super::bus::{Aftermath, FpuUse};
use super::ending::End;
use super::flush::Flusher;
use super::hardware::Hardware;
use super::soft::Soft;
use super::tables::NotRefreshed;
use super::vcpu::{Backend, Core, lacking};
use crate::cpu::eflags;
use crate::interp::engine::Extent;
use crate::interp::{Event, Exception, Step, UnknownInstruction, vector};
use crate::kvm::{KvmError, KvmExit, Left, can_run};

/// Page faults at one place in a row that change nothing, after which the instruction is interpreted: some hosts
/// fault for ever on what they cannot do (an access that wraps at 4 GiB).
const SPURIOUS_MAX: u32 = 4;
/// Bits of a page fault's error code.
pub(super) const FAULT_WRITE: u32 = 1 << 1;
pub(super) const FAULT_USER: u32 = 1 << 2;
pub(super) const FAULT_FETCH: u32 = 1 << 4;
/// DR6.BS: the single-step trap.
const DR6_BS: u32 = 1 << 14;
/// Instructions without the FPU after which a stretch of interpreted FPU code ends.
const STRETCH: u32 = 64;
/// And how many it has at most, before the board is looked at again.
const STRETCH_MAX: u32 = 4096;

/// A vCPU that hardware runs, beside its [`Core`].
pub struct Native<H> {
    hardware: H,
    flusher: Arc<Flusher>,
    /// Interprets the guest's kernel, where that does not run natively.
    supervisor: Option<Soft>,
    /// EIP, address and count of the last spurious page faults.
    spurious: (u32, u32, u32),
}

impl<H: Hardware> Backend for Native<H> {
    fn take_kick(&mut self) {
        self.hardware.take_kick();
        if let Some(soft) = &mut self.supervisor {
            soft.take_kick();
        }
    }

    fn run(&mut self, core: &mut Core) -> Option<End> {
        if core.fpu_wanted
            && let Err(error) = self.fetch_fpu(core)
        {
            return Some(refused(core, error));
        }
        if let Some(soft) = &mut self.supervisor
            && core.cpu.cpl < 3
        {
            return soft.slice(core, Extent::Kernel);
        }
        if core.cpu.interrupt_shadow {
            // One instruction that no interrupt may part from the one before it.
            return self.interpret(core, Why::Shadow);
        }
        if can_run(&core.cpu).is_err() {
            return self.interpret(core, Why::CannotRun);
        }
        self.enter(core)
    }
}

impl<H: Hardware> Native<H> {
    /// The vCPU of `hardware`; `supervisor` interprets the guest's kernel, if it is not to run natively.
    pub fn new(hardware: H, flusher: Arc<Flusher>, supervisor: Option<Soft>) -> Native<H> {
        Native { hardware, flusher, supervisor, spurious: (0, 0, 0) }
    }

    /// Enters the guest and acts on its exit.
    fn enter(&mut self, core: &mut Core) -> Option<End> {
        let user = core.cpu.cpl == 3;
        let Some(root) = core.mmu.root_address(&core.mmu_vcpu, user) else {
            return core.make_room();
        };
        if let Err(error) = self.give_fpu(core) {
            return Some(refused(core, error));
        }
        match core.tables.refresh(&core.mmu, &core.mmu_vcpu, &core.cpu, &mut self.hardware) {
            Ok(()) => {}
            Err(NotRefreshed::Kvm(error)) => return Some(refused(core, error)),
            Err(NotRefreshed::Short(shortage)) => return Some(End::Shortage(shortage)),
        }
        let owes = core.enter_hardware();
        if !core.tables.is_current() {
            core.mmu.leave_unrun(&core.mmu_vcpu);
            return None;
        }
        let flushed = if owes { self.flusher.flush(core, &mut self.hardware, root) } else { Ok(false) };
        let left = flushed.and_then(|kicked| match kicked {
            true => Ok(None),
            false => self.hardware.run_guest(core, root).map(Some),
        });
        match left {
            Ok(Some(Left::Out | Left::Guest)) => core.mmu.leave(&core.mmu_vcpu),
            Ok(Some(Left::NotEntered) | None) | Err(_) => core.mmu.leave_unrun(&core.mmu_vcpu),
        }
        let exit = left.and_then(|left| match left {
            Some(left) => self.hardware.take(&mut core.cpu, left),
            None => Ok(KvmExit::Kicked),
        });
        core.stats.entries += 1;
        match exit {
            Ok(KvmExit::Kicked) => {
                core.stats.kicks += 1;
                None
            }
            Ok(KvmExit::Trap { vector, error, cr2 }) => self.on_trap(core, vector, error, cr2),
            Err(error) => Some(refused(core, error)),
        }
    }

    /// Decides what a trap of the hardware means.
    fn on_trap(&mut self, core: &mut Core, vector: u8, error: u32, cr2: u64) -> Option<End> {
        let why = Why::Trap(vector, error);
        if vector == vector::PF {
            core.stats.page_faults += 1;
            // Without the U bit it is an access that the host makes with the wrong rights, not one that the
            // guest's tables could explain; above 4 GiB it is one that wraps.
            return match u32::try_from(cr2) {
                Ok(gva) if error & FAULT_USER != 0 => self.on_page_fault(core, Gva(gva), error),
                _ => self.interpret(core, why),
            };
        }
        core.stats.traps += 1;
        if vector == vector::DB {
            return self.on_debug_trap(core);
        }
        self.interpret(core, why)
    }

    /// A single step or a breakpoint: the hardware alone has seen it, and DR6 has been taken from it where the host
    /// lets us read it.
    fn on_debug_trap(&mut self, core: &mut Core) -> Option<End> {
        let stepped = core.cpu.eflags & eflags::TF != 0;
        if stepped && !self.hardware.has_debug_registers() {
            core.cpu.dr[6] |= DR6_BS;
        }
        core.deliver(Event::Exception(Exception::DB))
    }

    fn on_page_fault(&mut self, core: &mut Core, gva: Gva, error: u32) -> Option<End> {
        let access = access_of(error, core.cpu.cpl == 3);
        match core.mmu.fault_sleeping(&core.mmu_vcpu, gva, access) {
            Err(shortage) => Some(End::Shortage(shortage)),
            Ok(outcome) => self.on_fault(core, gva, error, outcome),
        }
    }

    fn on_fault(&mut self, core: &mut Core, gva: Gva, error: u32, outcome: Outcome) -> Option<End> {
        match outcome {
            // It has slept for the last two.
            Outcome::Fixed | Outcome::Again | Outcome::Gate(_) | Outcome::Need(_) => None,
            Outcome::Spurious if !self.is_stuck_at(core.cpu.eip, gva) => None,
            Outcome::Spurious | Outcome::Mmio(_) | Outcome::Emulate(_) => {
                self.interpret(core, Why::Trap(vector::PF, error))
            }
            // Perhaps an access that wraps at 4 GiB, which some hosts report so: the instruction itself decides.
            Outcome::Guest(fault) if gva.0 == 0 => self.interpret(core, Why::AtZero(fault.into())),
            Outcome::Guest(fault) => core.deliver(Event::Exception(fault.into())),
        }
    }

    /// Counts spurious faults at one place; true when running on has not helped.
    fn is_stuck_at(&mut self, eip: u32, gva: Gva) -> bool {
        let (last, address, count) = self.spurious;
        let again = (last, address) == (eip, gva.0);
        self.spurious = (eip, gva.0, if again { count + 1 } else { 1 });
        again && count >= SPURIOUS_MAX
    }

    /// Executes the instruction at CS:EIP by the interpreter.
    fn interpret(&mut self, core: &mut Core, why: Why) -> Option<End> {
        let (mut step, mut after) = core.interpret();
        if after.fpu == Some(FpuUse::Missing) {
            if let Err(error) = self.fetch_fpu(core) {
                return Some(refused(core, error));
            }
            (step, after) = core.interpret();
        }
        if after.fpu == Some(FpuUse::Used) && matches!(why, Why::Trap(vector::UD, _)) {
            (step, after) = stretch(core, step, after);
        }
        match step {
            Step::Done | Step::Halted => None,
            Step::Exception(exception) => core.deliver(Event::Exception(exception)),
            Step::Again => lacking(after),
            Step::Unknown(instruction) => self.on_unknown(core, instruction, why),
        }
    }

    /// Takes the FPU's registers out of the hardware.
    fn fetch_fpu(&mut self, core: &mut Core) -> Result<(), KvmError> {
        if core.fpu_in_hardware {
            core.cpu.fpu = self.hardware.fpu()?;
        }
        (core.fpu_in_hardware, core.fpu_wanted) = (false, false);
        Ok(())
    }

    /// Puts them back.
    fn give_fpu(&mut self, core: &mut Core) -> Result<(), KvmError> {
        if !core.fpu_in_hardware {
            self.hardware.set_fpu(&core.cpu.fpu)?;
            core.fpu_in_hardware = true;
        }
        Ok(())
    }

    /// What the interpreter does not know is the hardware's to run or to refuse, where it can.
    fn on_unknown(&mut self, core: &mut Core, instruction: UnknownInstruction, why: Why) -> Option<End> {
        let trap = match why {
            Why::Trap(vector, error) => match refusal_of(vector) {
                Some(exception) => return core.deliver(Event::Exception(exception)),
                None => Some((vector, error)),
            },
            Why::AtZero(fault) => return core.deliver(Event::Exception(fault)),
            Why::Shadow if can_run(&core.cpu).is_ok() => return self.enter(core),
            Why::Shadow | Why::CannotRun => None,
        };
        Some(core.unknown(instruction, trap))
    }
}

/// Goes on interpreting while nothing happens.
fn stretch(core: &mut Core, mut step: Step, mut after: Aftermath) -> (Step, Aftermath) {
    let mut left = STRETCH;
    for _ in 0..STRETCH_MAX {
        if step != Step::Done || left == 0 || core.cpu.interrupt_shadow {
            break;
        }
        (step, after) = core.interpret();
        left = if after.fpu.is_some() { STRETCH } else { left - 1 };
    }
    (step, after)
}

fn refused(core: &Core, error: KvmError) -> End {
    End::Backend { error, cpu: Box::new(core.cpu.clone()) }
}

/// What the guest tried, from the hardware's error code and the guest's own privilege.
fn access_of(error: u32, user: bool) -> Access {
    let kind = if error & FAULT_FETCH != 0 {
        AccessKind::Execute
    } else if error & FAULT_WRITE != 0 {
        AccessKind::Write
    } else {
        AccessKind::Read
    };
    Access { kind, user }
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

/// Exceptions that only the hardware can judge, of instructions that run natively.
fn refusal_of(vector: u8) -> Option<Exception> {
    (vector == vector::AC).then_some(Exception::AC)
}
