//! How TLBs are flushed on this host: at entry by the firmware, or by KVM's own MMU notifier.
//!
//! Story: with two-dimensional paging a rewritten spte is seen after a flush, and the firmware's flush at entry is
//! enough. Without it KVM shadows our tables, trusts its write protection of them, and never looks at a present
//! entry again that a userspace store has changed: then each frame whose spte was removed is dropped by
//! `madvise(MADV_DONTNEED)` on its host page, and when a table was unlinked everything is, by a memory slot that
//! comes and goes.

use std::sync::{Arc, Mutex, PoisonError};

use umbra_mmu::Mmu;

use crate::kvm::shootdown::Notifier;
use crate::kvm::{KvmError, KvmVm};
use crate::probe::Translation;

/// Flushes the TLBs of one VM.
pub struct Flusher {
    /// `None` where a flush at entry is enough.
    notifier: Option<Notifier>,
    /// Held from the taking of a list of removals to their end: a vCPU that finds the list taken may only go on when they are over.
    dropping: Mutex<()>,
}

impl Flusher {
    /// Flushes as this host's KVM needs it.
    pub fn new(translation: Translation, vm: Arc<KvmVm>, mmu: &Mmu) -> Flusher {
        if translation == Translation::FlushSuffices {
            return Flusher { notifier: None, dropping: Mutex::default() };
        }
        mmu.coherence().log_removals();
        Flusher { notifier: Some(Notifier::new(vm)), dropping: Mutex::default() }
    }

    /// True when the vCPU itself must flush as it enters.
    pub fn flushes_at_entry(&self) -> bool {
        self.notifier.is_none()
    }

    /// What must be done before a vCPU enters that owes a flush, beside its own.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn before_entry(&self, mmu: &Mmu) -> Result<(), KvmError> {
        match &self.notifier {
            Some(notifier) => {
                let _dropping = self.dropping.lock().unwrap_or_else(PoisonError::into_inner);
                notifier.drop_removed(&mmu.coherence().take_removals())
            }
            None => Ok(()),
        }
    }
}
