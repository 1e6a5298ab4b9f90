//! Two vCPUs on two threads, and a third thread that invalidates, for some seconds (`UMBRA_SECONDS`).
//!
//! Here nothing can be compared step by step. What is checked is what guests and the VMM build on (`model::cpus`), and
//! that afterwards the audit finds nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use umbra_mmu::Mmu;

use crate::model::cpus::{Guest, Kernel};
use crate::model::run::{audit, rng, seconds};

/// Stops everybody when a thread ends, by a panic too: the others would wait for its mail.
struct StopAll(Arc<Kernel>, Arc<Mmu>, u32);

impl Drop for StopAll {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.1.coherence().leave_guest(self.2);
    }
}

fn run(pae: bool) {
    let guest = Guest::new(pae, 64);
    let end = Instant::now() + seconds(2.0);
    let is_over = || guest.kernel.stop.load(Ordering::SeqCst);
    let (mut steps, mut rounds) = ([0; 2], 0);
    std::thread::scope(|scope| {
        let cpus = [0, 1].map(|id| {
            let mut cpu = guest.cpu(id, rng(u64::from(id) + 1));
            let guest = &guest;
            let is_over = &is_over;
            scope.spawn(move || {
                let _stop = StopAll(guest.kernel.clone(), guest.mmu.clone(), id);
                cpu.load_cr3(id);
                while !is_over() && Instant::now() < end {
                    cpu.step();
                }
                cpu.leave();
                cpu.steps
            })
        });
        let mut rng = rng(9);
        while !is_over() {
            guest.invalidate(&mut rng, 64);
            rounds += 1;
            std::thread::sleep(Duration::from_micros(100));
        }
        steps = cpus.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    });
    audit(&guest.mmu);
    let usage = guest.mmu.usage();
    println!("threads: pae {pae}, {steps:?} steps, {rounds} invalidations, {} evictions", usage.evictions);
    assert!(steps.iter().all(|n| *n > 100) && rounds > 10, "{steps:?} steps, {rounds} invalidations");
}

#[test]
fn two_vcpus_and_an_invalidator_keep_every_promise_with_two_level_tables() {
    run(false);
}

#[test]
fn two_vcpus_and_an_invalidator_keep_every_promise_with_pae_tables() {
    run(true);
}
