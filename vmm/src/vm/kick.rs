//! How a vCPU that runs guest code is made to leave it.
//!
//! Story: whoever wants something of a vCPU writes it down and kicks; the vCPU's loop takes the kick back before it looks
//! at what was written, so that no kick is lost. One that KVM runs is kicked by its [`Kicker`], one that is interpreted by
//! a flag that its engine reads once a block; one that is both gets both.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use umbra_mmu::Shootdown;

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

/// Both, for a vCPU that KVM runs at times.
#[derive(Clone, Debug)]
pub struct Both(pub Kicker, pub Attention);

impl Kick for Both {
    fn kick(&self) {
        self.1.kick();
        self.0.kick();
    }
}

/// The MMU's way to all vCPUs, by index.
pub struct Kicks(Vec<Box<dyn Kick>>);

impl Kicks {
    /// Kicks by `kicks`, the vCPUs' in order.
    pub fn new(kicks: Vec<Box<dyn Kick>>) -> Kicks {
        Kicks(kicks)
    }
}

impl Shootdown for Kicks {
    fn kick(&self, vcpu: u32) {
        if let Some(kick) = self.0.get(vcpu as usize) {
            kick.kick();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kick_stays_until_it_is_taken_back() {
        let attention = Attention::default();
        let kicks = Kicks::new(vec![Box::new(attention.clone())]);
        assert!(!attention.is_wanted());
        kicks.kick(0);
        kicks.kick(7);
        assert!(attention.is_wanted() && attention.is_wanted());
        attention.take();
        assert!(!attention.is_wanted());
    }
}
