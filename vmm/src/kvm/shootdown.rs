//! The two ways to make vCPUs forget a translation.
//!
//! Story: an spte has been removed or narrowed, and until every vCPU has forgotten the old one its frame must not
//! change hands. Which way works depends on how this host's KVM translates, which the probe finds out:
//!
//! | | kick | notifier |
//! |---|---|---|
//! | how | the vCPU leaves the guest and flushes before it is back | the host drops its mapping of the *old* frame |
//! | needs | that a flush makes KVM look at our tables again: two-dimensional paging, or emulation | nothing |
//! | acknowledged by | the vCPU's flush epoch | madvise returning |
//! | per | vCPU | frame; past a ceiling everything at once |
//!
//! Without two-dimensional paging KVM shadows our shadow tables: it sees a store to them only where it has
//! write-protected them, and a store by the VMM goes round that. A flush then changes nothing. What it does notice is
//! the frame below going away (its own MMU notifier) and a memory slot that comes or goes.
//!
//! Not here: which is the default, and when to use either; the kick itself ([`super::kick`]).

use std::sync::Arc;

use umbra_mmu::Mfn;
use umbra_mmu::coherence::Removals;

use super::error::KvmError;
use super::vm::KvmVm;

/// The notifier back end. When a call returns, no vCPU can use what was removed before it.
#[derive(Clone, Debug)]
pub struct Notifier {
    vm: Arc<KvmVm>,
}

impl Notifier {
    /// The notifier of `vm`.
    pub fn new(vm: Arc<KvmVm>) -> Notifier {
        Notifier { vm }
    }

    /// Forgets every translation to `frame`; its contents stay.
    ///
    /// # Errors
    /// When `frame` is not in the pool, or the host refuses.
    pub fn drop_frame(&self, frame: Mfn) -> Result<(), KvmError> {
        Ok(self.vm.pool().drop_translations(frame)?)
    }

    /// Forgets every translation there is.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn drop_all(&self) -> Result<(), KvmError> {
        self.vm.flush_by_slot()
    }

    /// Forgets what was removed.
    ///
    /// # Errors
    /// As the other two.
    pub fn drop_removed(&self, removed: &Removals) -> Result<(), KvmError> {
        if removed.all {
            return self.drop_all();
        }
        removed.pages.iter().try_for_each(|&frame| self.drop_frame(frame))
    }
}
