//! The naive twin: what the architecture says, written straight from the manual.
//!
//! Story: the mmu crate is right when a guest cannot tell its shadow tables from a CPU of its own. This is that
//! CPU, as plainly as it can be written, and a second one that walks the *shadow* tables as the real hardware
//! will. Tests drive both in step and compare at every access; those by threads have only the second.
//!
//! | file | what it is |
//! |---|---|
//! | memory | guest memory as an array of words, and what each word was before |
//! | walker | the guest's paging, from the SDM |
//! | tlb_rules | which translations a CPU may still use: what INVLPG, MOV CR3 and a fault forget |
//! | hardware | the CPU under the guest: walks shadow tables in machine memory, with a TLB that never forgets by itself |
//! | world | an `Mmu`, all of the above, and the rule that ties them together |
//! | cpus | two CPUs of a guest kernel that remaps its pages, for tests by threads |
//! | layout | the guest that the tests run: where its tables and pages are |
//! | run | random numbers, time, the audit |
//!
//! Holds: nothing of the twin calls into the mmu crate; `world` and `cpus` do only through what a backend calls.
//! Formats, constants, address arithmetic: all written again.

pub mod cpus;
pub mod hardware;
pub mod layout;
pub mod memory;
pub mod run;
pub mod tlb_rules;
pub mod walker;
pub mod world;
