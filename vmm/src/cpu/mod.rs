//! The architectural CPU: the state that is the VMM's between any two exits.

pub mod state;

pub use state::{CpuState, Msrs, Seg, Segment, TableRegister, cr0, cr4, efer, eflags};
