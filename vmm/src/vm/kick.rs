//! How a vCPU that runs guest code is made to leave it.
//!
//! Story: whoever wants something of a vCPU writes it down and kicks; the vCPU's loop takes the kick back before it looks
//! at what was written, so that no kick is lost. One that KVM runs is kicked by its [`Kicker`], one that is interpreted by
//! a flag that its engine reads once a block; one that is both gets both.
//!
//! Where all vCPUs' translations are the hardware's, the host can be had to take single frames away from them instead
//! ([`DropsRemoved`]): that is never right for one that has a TLB of ours too.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use umbra_mmu::{Mfn, Shootdown};

use super::hardware::DropsRemoved;
use crate::barrier;
use crate::kvm::Kicker;

/// Makes one vCPU leave the guest soon; returns at once.
pub trait Kick: Send + Sync {
    /// Kicks. What is wanted was written down before.
    fn kick(&self);
}

impl Kick for Kicker {
    fn kick(&self) {
        Kicker::kick(self);
    }
}

/// The flag of an interpreted vCPU.
#[derive(Clone, Debug, Default)]
pub struct Attention(Arc<AtomicBool>);

impl Attention {
    /// Takes the kick back: before a look at what others have written down.
    pub fn take(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    /// True when somebody has kicked since it was last taken back.
    #[inline]
    pub fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Kick for Attention {
    fn kick(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Both, for a vCPU that hardware runs at times.
pub struct Both(pub Box<dyn Kick>, pub Attention);

impl Kick for Both {
    fn kick(&self) {
        self.1.kick();
        self.0.kick();
    }
}

/// The MMU's way to all vCPUs, by index.
pub struct Kicks {
    kicks: Vec<Box<dyn Kick>>,
    /// `None` where the host does not know of every translation.
    notifier: Option<Box<dyn DropsRemoved>>,
}

impl Kicks {
    /// Kicks by `kicks`, the vCPUs' in order; takes frames away by `notifier`.
    ///
    /// # Errors
    ///
    /// When the host has no barrier for all threads, and there are several vCPUs.
    pub fn new(kicks: Vec<Box<dyn Kick>>, notifier: Option<Box<dyn DropsRemoved>>) -> io::Result<Kicks> {
        if kicks.len() > 1 {
            barrier::prepare()?;
        }
        Ok(Kicks { kicks, notifier })
    }
}

impl Shootdown for Kicks {
    fn kick(&self, vcpu: u32) {
        if let Some(kick) = self.kicks.get(vcpu as usize) {
            kick.kick();
        }
    }

    fn settle_stores(&self) {
        barrier::all_threads();
    }

    fn notify(&self, frames: &mut dyn Iterator<Item = Mfn>) -> bool {
        let Some(notifier) = &self.notifier else { return false };
        for frame in frames {
            if let Err(error) = notifier.drop_frame(frame) {
                log::warn!("vCPUs are kicked instead: {error}");
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kick_stays_until_it_is_taken_back() {
        let attention = Attention::default();
        let kicks = Kicks::new(vec![Box::new(attention.clone())], None).expect("one vCPU needs nothing");
        assert!(!kicks.notify(&mut [Mfn(1)].into_iter()), "the host knows nothing of its TLB");
        assert!(!attention.is_wanted());
        kicks.kick(0);
        kicks.kick(7);
        assert!(attention.is_wanted() && attention.is_wanted());
        attention.take();
        assert!(!attention.is_wanted());
    }
}
