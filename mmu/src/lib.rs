//! The emulated MMU: formats, walker, p2m, frames, window, shadow pages, reverse map, gate, coherence.
#![forbid(unsafe_code)]

pub mod access;
pub mod addr;

pub use access::{Access, AccessKind, FaultCode, PageFault};
pub use addr::{Gfn, Gpa, Gva, Mfn, Mpa, PAGE_SHIFT, PAGE_SIZE};
