//! What other threads want of a vCPU's thread: questions that need its state to stand still.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, PoisonError};

use umbra_mmu::{Explanation, Gva, Mmu, Vcpu};

/// A question.
#[derive(Debug)]
pub enum Request {
    /// Why is this address as it is?
    Explain(Gva, Sender<Explanation>),
}

/// The questions that wait for an answer, by vCPU.
#[derive(Debug)]
pub struct Requests {
    waiting: Box<[Mutex<Vec<Request>>]>,
    open: AtomicBool,
}

impl Requests {
    /// Nobody has asked any of `vcpus` vCPUs.
    pub fn new(vcpus: u32) -> Requests {
        Requests { waiting: (0..vcpus).map(|_| Mutex::default()).collect(), open: AtomicBool::new(false) }
    }

    /// Says that somebody may ask: a guest that waits for ever is then not at its end.
    pub fn open(&self) {
        self.open.store(true, Ordering::Relaxed);
    }

    /// True after [`Requests::open`].
    pub fn may_come(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Leaves a question for `vcpu`; the caller wakes it.
    pub fn push(&self, vcpu: u32, request: Request) {
        self.of(vcpu).push(request);
    }

    /// Answers all questions to the vCPU; on its own thread.
    pub fn serve(&self, mmu: &Mmu, vcpu: &Vcpu) {
        let waiting = std::mem::take(&mut *self.of(vcpu.id()));
        for request in waiting {
            match request {
                // Whoever asked may have gone; that is its own business.
                Request::Explain(gva, reply) => drop(reply.send(mmu.explain(vcpu, gva))),
            }
        }
    }

    fn of(&self, vcpu: u32) -> MutexGuard<'_, Vec<Request>> {
        self.waiting[vcpu as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
