//! How TLBs are flushed on this host: at entry by the firmware, or by KVM's own MMU notifier.
//!
//! Story: with two-dimensional paging a rewritten spte is seen after a flush, and the firmware's flush at entry is
//! enough. Without it KVM shadows our tables, trusts its write protection of them, and never looks at a present
//! entry again that a userspace store has changed: then each frame whose spte was removed is dropped by
//! `madvise(MADV_DONTNEED)` on its host page, and when a table was unlinked everything is, by a memory slot that
//! comes and goes.

use std::sync::Arc;

use umbra_mmu::{Mmu, Shootdown};

use super::devices::Devices;
use crate::kvm::{KvmError, KvmVm};

/// Which shootdown a host needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Flush at entry; other vCPUs are kicked.
    Kick,
    /// KVM's MMU notifier.
    Notifier,
}

/// Flushes.
pub struct Flusher {
    method: Method,
    vm: Arc<KvmVm>,
}

impl Flusher {
    /// Flushes by `method`.
    pub fn new(method: Method, vm: Arc<KvmVm>, mmu: &Mmu) -> Flusher {
        if method == Method::Notifier {
            mmu.coherence().log_removals();
        }
        Flusher { method, vm }
    }

    /// True when the vCPU itself must flush as it enters.
    pub fn flushes_at_entry(&self) -> bool {
        self.method == Method::Kick
    }

    /// What must be done before a vCPU enters that owes a flush, beside its own.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn before_entry(&self, mmu: &Mmu) -> Result<(), KvmError> {
        if self.method == Method::Kick {
            return Ok(());
        }
        let removals = mmu.coherence().take_removals();
        if removals.all {
            return self.vm.flush_by_slot();
        }
        for mfn in removals.pages {
            self.vm.pool().drop_translations(mfn)?;
        }
        Ok(())
    }
}

/// Makes vCPUs leave the guest, for [`umbra_mmu::Coherence::shoot_down`].
pub struct Kicks(pub Arc<Devices>);

impl Shootdown for Kicks {
    fn kick(&self, vcpu: u32) {
        self.0.waker(vcpu).wake();
    }
}
