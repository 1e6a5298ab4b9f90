//! What other threads want of a vCPU's thread: questions that need its state to stand still.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};

use umbra_mmu::{Explanation, Gva, Mmu, Vcpu};

/// A question.
#[derive(Debug)]
pub enum Request {
    /// Why is this address as it is?
    Explain(Gva, Sender<Explanation>),
}

/// The questions that wait for an answer.
#[derive(Debug, Default)]
pub struct Requests {
    waiting: Mutex<Vec<Request>>,
    open: AtomicBool,
}

impl Requests {
    /// Says that somebody may ask: a guest that waits for ever is then not at its end.
    pub fn open(&self) {
        self.open.store(true, Ordering::Relaxed);
    }

    /// True after [`Requests::open`].
    pub fn may_come(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Leaves a question; the caller wakes the vCPU.
    pub fn push(&self, request: Request) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(request);
    }

    /// Answers all questions; on the vCPU's own thread.
    pub fn serve(&self, mmu: &Mmu, vcpu: &Vcpu) {
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        for request in waiting {
            match request {
                // Whoever asked may have gone; that is its own business.
                Request::Explain(gva, reply) => drop(reply.send(mmu.explain(vcpu, gva))),
            }
        }
    }
}
