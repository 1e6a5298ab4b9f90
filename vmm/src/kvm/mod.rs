//! The kvm backend, below the MMU: a 32-bit guest at CPL 3 of a long-mode vCPU.
//!
//! Story: [`Host`] is /dev/kvm, [`KvmVm`] a VM whose memory is the machine pool, [`KvmVcpu`] one vCPU. The run loop
//! gives [`KvmVcpu::enter`] the guest's architectural state and a root of shadow page tables, and gets back a trap
//! or a kick and the state as it then is. Between exits the state is the VMM's; every entry is rebuilt from it.
//!
//! One trap:
//!
//! ```text
//!   enter ── registers ──► run page ── KVM_RUN ──► guest at CS:EIP, CPL 3, compatibility mode
//!                                                    │ exception
//!                                                  firmware stub: push vector, out
//!   CpuState ◄── frame on the vCPU's stack ◄─ exit ──┘
//! ```
//!
//! Holds: ENT-1 to ENT-4 ([`registers`]), DT-1 to DT-4 ([`descriptors`]), FW-1 to FW-4 (the firmware crate); no
//! KVM_NMI, KVM_INTERRUPT or irqchip is ever used: what the guest is to receive, the VMM writes on its stack.
//!
//! Not here: decoding what trapped, injecting, page tables, when to kick or flush.

#![deny(unsafe_code)]

pub mod descriptors;
mod doors;
pub mod error;
pub mod host;
pub mod kick;
pub mod registers;
mod run_page;
pub mod shootdown;
#[allow(unsafe_code)]
mod sys;
pub mod vcpu;
pub mod vm;

pub use doors::Doors;
#[doc(hidden)]
pub use doors::OpenDoors;
pub use error::{Dump, KvmError, KvmExit, Stop};
pub use host::{Features, Host, HostError};
pub use kick::Kicker;
pub use registers::{CannotRun, can_run};
pub use vcpu::{KvmVcpu, Left};
pub use vm::{KvmVm, Options};
