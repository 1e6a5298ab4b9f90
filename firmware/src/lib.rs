//! The long-mode firmware: what stands at CPL 0 under a 32-bit guest, and where.
//!
//! Story: the kvm backend runs the whole guest at CPL 3 in compatibility mode. Each exception it raises vectors to
//! one of 256 stubs here, which pushes its vector and does one `out`; the VMM then has the frame and nothing is
//! ever resumed. Besides that there is a flush, and nothing else.
//!
//! ```text
//!   guest, CPL 3, below 4 GiB                  firmware, CPL 0, PML4[256], U=0 at every level
//!   ┌──────────────┐   exception    IDT[v]     ┌───────────────────────────────┐
//!   │ cli          │ ────────────────────────► │ stub v: push 0 (if no error)  │
//!   └──────────────┘  SS:RSP <- TSS.RSP0       │         push v                │
//!                                              │         out TRAP_PORT ────────┼──► exit to the VMM
//!                                              └───────────────────────────────┘
//! ```
//!
//! Holds:
//! - FW-1: no page of the image has U=1 at any level; code is never writable, nothing but code is executable.
//! - FW-2: every gate is an interrupt gate with DPL 0; no descriptor of the image can be used at CPL 3.
//! - FW-3: the I/O map base of every TSS lies past its limit.
//! - FW-4: the numbers that assembly and Rust share are in [`constants`] and nowhere else.
//!
//! Not here: the guest's descriptors (the kvm backend translates them into the GDTs), KVM, memory.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod blob;
pub mod constants;
pub mod descriptor;
pub mod image;

pub use image::{ImageDoors, Layout, LayoutError, VcpuLayout};
