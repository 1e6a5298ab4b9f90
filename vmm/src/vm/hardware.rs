//! What runs guest code natively, as far as the rest of the VMM knows it: a vCPU, and the host that it runs on.
//!
//! Story: there are two of each, KVM's ([`KvmVcpu`], [`Notifier`]) and those of a simulation, which are a model
//! ([`super::model`]). [`super::native`] and [`super::flush`] are the same for both.

use umbra_mmu::coherence::Removals;
use umbra_mmu::{Mfn, Mpa};

use super::vcpu::Core;
use crate::cpu::{CpuState, Fpu};
use crate::kvm::shootdown::Notifier;
use crate::kvm::{KvmError, KvmExit, KvmVcpu, Left};

/// A vCPU in hardware. It belongs to the thread that enters it.
pub trait Hardware: Send {
    /// Takes back kicks that have not been seen.
    fn take_kick(&mut self);

    /// True where a #DB has its reasons in DR6.
    fn has_debug_registers(&self) -> bool;

    /// The guest's descriptor tables, each of limit + 1 bytes, changed or may have. `ldt` is `None` while LDTR is null.
    ///
    /// # Errors
    ///
    /// As [`KvmVcpu::set_descriptors`].
    fn set_descriptors(&mut self, gdt: &[u8], ldt: Option<&[u8]>) -> Result<(), KvmError>;

    /// The guest's FPU, which stays in the hardware between entries.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    fn fpu(&self) -> Result<Fpu, KvmError>;

    /// Sets the guest's FPU.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    fn set_fpu(&mut self, fpu: &Fpu) -> Result<(), KvmError>;

    /// Forgets every translation, and runs no guest code; the vCPU of `core` is to run next, by `root`. True where a kick came
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// As [`KvmVcpu::flush`].
    fn flush(&mut self, core: &Core, root: Mpa) -> Result<bool, KvmError>;

    /// Runs the guest from the state of `core`, on the page tables at `root`, until it traps or is kicked.
    ///
    /// # Errors
    ///
    /// As [`KvmVcpu::run_guest`].
    fn run_guest(&mut self, core: &Core, root: Mpa) -> Result<Left, KvmError>;

    /// Takes the guest's state and says why it left.
    ///
    /// # Errors
    ///
    /// As [`KvmVcpu::take`].
    fn take(&mut self, cpu: &mut CpuState, left: Left) -> Result<KvmExit, KvmError>;
}

impl Hardware for KvmVcpu {
    fn take_kick(&mut self) {
        KvmVcpu::take_kick(self);
    }

    fn has_debug_registers(&self) -> bool {
        self.features().debug_registers
    }

    fn set_descriptors(&mut self, gdt: &[u8], ldt: Option<&[u8]>) -> Result<(), KvmError> {
        KvmVcpu::set_descriptors(self, gdt, ldt)
    }

    fn fpu(&self) -> Result<Fpu, KvmError> {
        KvmVcpu::fpu(self)
    }

    fn set_fpu(&mut self, fpu: &Fpu) -> Result<(), KvmError> {
        KvmVcpu::set_fpu(self, fpu)
    }

    fn flush(&mut self, core: &Core, root: Mpa) -> Result<bool, KvmError> {
        KvmVcpu::flush(self, &core.cpu, root)
    }

    fn run_guest(&mut self, core: &Core, root: Mpa) -> Result<Left, KvmError> {
        KvmVcpu::run_guest(self, &core.cpu, root)
    }

    fn take(&mut self, cpu: &mut CpuState, left: Left) -> Result<KvmExit, KvmError> {
        KvmVcpu::take(self, cpu, left)
    }
}

/// The host, where it takes translations away. When a call returns, no vCPU can use what was removed before it.
pub trait DropsRemoved: Send + Sync {
    /// Forgets every translation to `frame`; its contents stay.
    ///
    /// # Errors
    ///
    /// As [`Notifier::drop_frame`].
    fn drop_frame(&self, frame: Mfn) -> Result<(), KvmError>;

    /// Forgets what was removed.
    ///
    /// # Errors
    ///
    /// As [`Notifier::drop_removed`].
    fn drop_removed(&self, removed: &Removals) -> Result<(), KvmError>;
}

impl DropsRemoved for Notifier {
    fn drop_frame(&self, frame: Mfn) -> Result<(), KvmError> {
        Notifier::drop_frame(self, frame)
    }

    fn drop_removed(&self, removed: &Removals) -> Result<(), KvmError> {
        Notifier::drop_removed(self, removed)
    }
}
