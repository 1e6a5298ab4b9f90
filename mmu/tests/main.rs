//! Tests of the mmu crate from outside, one program: against a naive twin, bit by bit, at random, and by threads.
//!
//! | module | what it tests | how to run more of it |
//! |---|---|---|
//! | matrix | every combination of entry bits, control bits and access | all of them always |
//! | property | random guest programs | `UMBRA_OPS=10000000 cargo test -p umbra-mmu --test model property` |
//! | regressions | programs that once failed | |
//! | dma | sessions of devices: rule by rule, by threads, against a flat memory | `UMBRA_SECONDS=60 cargo test -p umbra-mmu --test model dma` |
//! | ring | a virtio ring through sessions | `UMBRA_SECONDS=60 cargo test -p umbra-mmu --test model ring` |
//! | pressure | more guest memory than frames: by threads, by failing swap, rule by rule | `UMBRA_SECONDS=60 cargo test -p umbra-mmu --test model pressure` |
//! | collapse | ranges gathered while others use them | `UMBRA_DISCARDS=1000000 cargo test -p umbra-mmu --test model collapse` |
//! | omissions | each rule of coherence left out, and noticed | |
//! | threads | two vCPUs on two threads | `UMBRA_SECONDS=600 cargo test -p umbra-mmu --test model threads` |
//! | interleave | the same on shuttle's threads | its header |
#![forbid(unsafe_code)]

#[cfg(not(any(loom, shuttle)))]
mod collapse;
mod dma;
#[cfg(shuttle)]
mod interleave;
mod matrix;
mod model;
#[cfg(not(any(loom, shuttle)))]
mod omissions;
mod pressure;
mod program;
mod property;
mod regressions;
mod ring;
mod threads;
