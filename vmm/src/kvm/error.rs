//! What the kvm backend returns: exits, errors, and the dump that goes with an error.

use std::fmt;
use std::io;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use umbra_firmware::LayoutError;
use umbra_mmu::Mpa;

use super::host::HostError;
use super::registers::CannotRun;
use crate::machine::PoolError;

/// Why the guest stopped running, where that is nothing unusual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmExit {
    /// The guest raised an exception. Nothing has been delivered to it; EIP is as the CPU saved it.
    ///
    /// A #PF whose error code has no U bit, below 4 GiB, is no fault of the page tables: some hosts (TCG) make the
    /// stack accesses of IRET, RETF and far CALL with the kernel's rights, and SMAP refuses those. Interpret the
    /// instruction; repairing nothing and going back would repeat it for ever.
    Trap {
        /// The vector. Hosts differ in which one an instruction raises: decode at CS:EIP and decide.
        vector: u8,
        /// The error code, 0 for vectors without one.
        error: u32,
        /// What the hardware's CR2 holds: the address of a #PF. Above 4 GiB, or 0, where an access wrapped at
        /// 4 GiB: such an instruction must be interpreted.
        cr2: u64,
    },
    /// Somebody kicked the vCPU (or a signal came). The guest can go on where it is.
    Kicked,
}

/// Why the backend cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// KVM itself is not usable.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The pool is not usable.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The firmware's image cannot be made.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The pool is too small for the firmware.
    #[error(
        "the firmware of {vcpus} vCPUs takes {needed} frames; the pool has {frames}: make the pool larger"
    )]
    PoolTooSmall {
        /// vCPUs asked for.
        vcpus: u32,
        /// Frames the image takes.
        needed: u64,
        /// Frames in the pool.
        frames: u64,
    },
    /// The VM was not made for so many vCPUs.
    #[error("there is no vCPU {index}: the VM was made for {vcpus}")]
    NoSuchVcpu {
        /// The vCPU asked for.
        index: u32,
        /// vCPUs that there can be.
        vcpus: u32,
    },
    /// A call to KVM failed.
    #[error("KVM: {what} failed: {source}")]
    Call {
        /// The call.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The guest's state must be run by the interpreter.
    #[error("the vCPU cannot run natively: {0}")]
    CannotRun(#[from] CannotRun),
    /// The vCPU stopped in a way that has no answer.
    #[error("vCPU {vcpu} stopped: {why}\n{dump}")]
    Stopped {
        /// Its index.
        vcpu: u32,
        /// What happened.
        why: Stop,
        /// Its registers.
        dump: Box<Dump>,
    },
}

/// What stopped a vCPU for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An exception in the firmware itself.
    FirmwareFault {
        /// The vector.
        vector: u64,
        /// The error code.
        error: u64,
        /// Where.
        rip: u64,
    },
    /// A stub left a frame that no guest at CPL 3 can cause.
    BadFrame {
        /// The quadwords at RSP: vector, error code, RIP, CS, RFLAGS, RSP, SS.
        frame: [u64; 7],
        /// RSP at the exit.
        rsp: u64,
    },
    /// Code runs at CPL 0 that is not the firmware's.
    Escaped,
    /// The guest did I/O by itself.
    GuestIo {
        /// The port.
        port: u16,
        /// OUT rather than IN.
        write: bool,
    },
    /// A translation led to an address that is not in the pool.
    Hole {
        /// The address.
        address: u64,
        /// Bytes.
        length: usize,
        /// A write rather than a read.
        write: bool,
    },
    /// KVM met an instruction or a state that it cannot handle (its suberror).
    InternalError(u32),
    /// Triple fault.
    Shutdown,
    /// The processor refused the state (its reason).
    FailEntry(u64),
    /// KVM_RUN failed.
    RunFailed(String),
    /// An exit that nothing here can cause.
    Unexpected(String),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::FirmwareFault { vector, error, rip } => {
                write!(f, "exception {vector} (error code {error:#x}) in the firmware at {rip:#x}")
            }
            Stop::BadFrame { frame, rsp } => write!(f, "impossible exception frame {frame:x?} at {rsp:#x}"),
            Stop::Escaped => f.write_str("code that is not the firmware's runs at CPL 0"),
            Stop::GuestIo { port, write } => {
                let direction = if *write { "OUT to" } else { "IN from" };
                write!(f, "the guest executed an {direction} port {port:#x} itself")
            }
            Stop::Hole { address, length, write } => {
                let what = if *write { "write to" } else { "read of" };
                write!(f, "{what} {length} bytes at machine address {address:#x}, which is not in the pool")
            }
            Stop::InternalError(suberror) => write!(f, "KVM internal error, suberror {suberror}"),
            Stop::Shutdown => f.write_str("triple fault"),
            Stop::FailEntry(reason) => write!(f, "the processor refused the state, reason {reason:#x}"),
            Stop::RunFailed(error) => write!(f, "KVM_RUN failed: {error}"),
            Stop::Unexpected(exit) => write!(f, "unexpected exit {exit}"),
        }
    }
}

/// The hardware's registers at an exit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dump {
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
    /// The root that the entry asked for.
    pub root: Mpa,
}

impl fmt::Display for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Dump { regs: r, sregs: s, root } = self;
        writeln!(f, "  rip {:#x} rflags {:#x} (hardware registers, root {root})", r.rip, r.rflags)?;
        writeln!(f, "  rax {:#x} rcx {:#x} rdx {:#x} rbx {:#x}", r.rax, r.rcx, r.rdx, r.rbx)?;
        writeln!(f, "  rsp {:#x} rbp {:#x} rsi {:#x} rdi {:#x}", r.rsp, r.rbp, r.rsi, r.rdi)?;
        let names = ["cs", "ss", "ds", "es", "fs", "gs", "ldt", "tr"];
        let segments = [&s.cs, &s.ss, &s.ds, &s.es, &s.fs, &s.gs, &s.ldt, &s.tr];
        for (name, segment) in names.into_iter().zip(segments) {
            write_segment(f, name, segment)?;
        }
        writeln!(f, "  gdt {:#x}+{:#x} idt {:#x}+{:#x}", s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit)?;
        write!(f, "  cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}", s.cr0, s.cr2, s.cr3, s.cr4, s.efer)
    }
}

fn write_segment(f: &mut fmt::Formatter<'_>, name: &str, s: &kvm_segment) -> fmt::Result {
    write!(f, "  {name:3} {:#06x} base {:#x} limit {:#x}", s.selector, s.base, s.limit)?;
    match s.unusable {
        0 => {
            writeln!(f, " type {:#x} s {} dpl {} p {} l {} db {}", s.type_, s.s, s.dpl, s.present, s.l, s.db)
        }
        _ => writeln!(f, " unusable"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dump_names_every_register() {
        let text = Dump { root: Mpa(0x1234_5000), ..Dump::default() }.to_string();
        let names = "rip rflags rax rcx rdx rbx rsp rbp rsi rdi cs ss ds es fs gs ldt tr gdt idt cr0 cr2 cr3 cr4 efer";
        for name in names.split(' ') {
            assert!(text.contains(&format!("{name} ")), "{name} in {text}");
        }
        assert!(text.contains("0x12345000"));
    }
}
