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

/// The questions that wait for an answer, by vCPU; `None` once nobody is there to answer.
#[derive(Debug)]
pub struct Requests {
    waiting: Box<[Mutex<Option<Vec<Request>>>]>,
    open: AtomicBool,
}

impl Requests {
    /// Nobody has asked any of `vcpus` vCPUs.
    pub fn new(vcpus: u32) -> Requests {
        Requests {
            waiting: (0..vcpus).map(|_| Mutex::new(Some(Vec::new()))).collect(),
            open: AtomicBool::new(false),
        }
    }

    /// Says that somebody may ask: a guest that waits for ever is then not at its end.
    pub fn open(&self) {
        self.open.store(true, Ordering::Relaxed);
    }

    /// True after [`Requests::open`].
    pub fn may_come(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Leaves a question for `vcpu`; the caller wakes it. Once the vCPUs have ended it is dropped, and with it its sender.
    pub fn push(&self, vcpu: u32, request: Request) {
        if let Some(waiting) = &mut *self.of(vcpu) {
            waiting.push(request);
        }
    }

    /// The vCPUs have ended: no question is answered any more.
    pub fn close(&self) {
        (0..self.waiting.len() as u32).for_each(|vcpu| *self.of(vcpu) = None);
    }

    /// Answers all questions to the vCPU; on its own thread.
    pub fn serve(&self, mmu: &Mmu, vcpu: &Vcpu) {
        let waiting = self.of(vcpu.id()).as_mut().map(std::mem::take);
        for request in waiting.into_iter().flatten() {
            match request {
                // Whoever asked may have gone; that is its own business.
                Request::Explain(gva, reply) => drop(reply.send(mmu.explain(vcpu, gva))),
            }
        }
    }

    fn of(&self, vcpu: u32) -> MutexGuard<'_, Option<Vec<Request>>> {
        self.waiting[vcpu as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn who_asks_as_the_run_ends_hears_so_at_once() {
        let requests = Requests::new(2);
        let ask = || {
            let (reply, answer) = channel();
            requests.push(1, Request::Explain(Gva(0), reply));
            answer
        };
        let before = ask();
        requests.close();
        assert!(before.recv().is_err() && ask().recv().is_err(), "nobody is left who could answer");
    }
}
