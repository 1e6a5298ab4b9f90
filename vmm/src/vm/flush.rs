//! How TLBs are flushed on this host: at entry by the firmware, or by KVM's own MMU notifier.
//!
//! Story: with two-dimensional paging a rewritten spte is seen after a flush, and the firmware's flush at entry is
//! enough. Without it KVM shadows our tables, trusts its write protection of them, and never looks at a present
//! entry again that a userspace store has changed: then each frame whose spte was removed is dropped by
//! `madvise(MADV_DONTNEED)` on its host page, and when a table was unlinked everything is, by a memory slot that
//! comes and goes.

use std::sync::{Mutex, PoisonError};

use umbra_mmu::{Mmu, Mpa, Rule};

use super::hardware::{DropsRemoved, Hardware};
use super::vcpu::Core;
use crate::kvm::KvmError;

/// Flushes the TLBs of one VM.
pub struct Flusher {
    /// `None` where a flush at entry is enough.
    notifier: Option<Box<dyn DropsRemoved>>,
    /// Held from the taking of a list of removals to their end: a vCPU that finds the list taken may only go on when they are over.
    dropping: Mutex<()>,
}

impl Flusher {
    /// Flushes by `notifier`, or at entry where there is none.
    pub fn new(notifier: Option<Box<dyn DropsRemoved>>, mmu: &Mmu) -> Flusher {
        if notifier.is_some() {
            mmu.coherence().log_removals();
        }
        Flusher { notifier, dropping: Mutex::default() }
    }

    /// Makes the flush that the vCPU of `core`, which counts as inside the guest, owes, and says so at once: whoever waits for it
    /// would else wait for the guest's next exit. True where a kick came meanwhile.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn flush(&self, core: &mut Core, hardware: &mut dyn Hardware, root: Mpa) -> Result<bool, KvmError> {
        let (id, coherence) = (core.mmu_vcpu.id(), core.mmu.coherence());
        let epoch = coherence.begin_flush();
        let rules = core.mmu.rules();
        if rules.keep(Rule::NotifierFlush) {
            self.before_entry(&core.mmu)?;
        }
        let flushes = self.notifier.is_none() && rules.keep(Rule::FirmwareFlush);
        let kicked = flushes && hardware.flush(core, root)?;
        if rules.keep(Rule::FlushBesideHardware) {
            core.mmu_vcpu.tlb().inspect(|tlb| tlb.flush_all());
        }
        coherence.end_flush(id, epoch);
        core.hardware_owes_flush = false;
        core.stats.flushes += 1;
        Ok(kicked)
    }

    /// What must be done before a vCPU enters that owes a flush, beside its own.
    fn before_entry(&self, mmu: &Mmu) -> Result<(), KvmError> {
        match &self.notifier {
            Some(notifier) => {
                let _dropping = self.dropping.lock().unwrap_or_else(PoisonError::into_inner);
                notifier.drop_removed(&mmu.coherence().take_removals())
            }
            None => Ok(()),
        }
    }
}
