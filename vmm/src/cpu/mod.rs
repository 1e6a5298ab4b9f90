//! The architectural CPU: the state that is the VMM's between any two exits.

pub mod cpuid;
mod dump;
pub mod fpu;
pub mod state;

pub use cpuid::CpuModel;
pub use fpu::Fpu;
pub use state::{CpuState, Msrs, Seg, Segment, TableRegister, cr0, cr4, efer, eflags};
