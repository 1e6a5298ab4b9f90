//! How a run ends, and the one place where it is decided: the first reason wins.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use umbra_mmu::guest_tlb::Missed;
use umbra_mmu::{Shortage, Violation};

use super::devices::Devices;
use crate::board::BoardExit;
use crate::cpu::CpuState;
use crate::interp::UnknownInstruction;
use crate::kvm::KvmError;

/// Why a run ended.
#[derive(Debug)]
pub enum End {
    /// The guest asked for it.
    Board(BoardExit),
    /// A fault on the way to the guest's double-fault handler.
    TripleFault(Box<CpuState>),
    /// The guest sent its boot processor an INIT.
    Init(Box<CpuState>),
    /// `--timeout` is over.
    Timeout(Duration),
    /// An operator asked for it.
    Quit,
    /// A signal asked for it: SIGINT or SIGTERM.
    Signal,
    /// A reset that an operator asked for could not be made.
    NotReset(String),
    /// An instruction that the host's KVM trapped on and the interpreter does not know.
    Unknown {
        /// What and where.
        instruction: UnknownInstruction,
        /// What the hardware raised: vector and error code.
        trap: Option<(u8, u32)>,
        /// The CPU.
        cpu: Box<CpuState>,
    },
    /// KVM has stopped in a way that has no answer.
    Backend {
        /// What it said.
        error: KvmError,
        /// The CPU, as far as it is known.
        cpu: Box<CpuState>,
    },
    /// A page cannot be had: no frame is left, or swap has failed.
    Shortage(Shortage),
    /// A software TLB used a translation that should have been flushed.
    Incoherent(Box<Violation>),
    /// The guest has used a translation that it should have flushed, or may have (`--check-guest-tlb`).
    GuestTlb(Missed),
    /// One of Umbra's own threads has panicked.
    Panic {
        /// Which.
        thread: &'static str,
        /// What it said.
        why: String,
    },
    /// Every vCPU waits for an interrupt that can never come; the state of one of them.
    Stuck(Box<CpuState>),
}

impl End {
    /// What the guest wrote to its exit port, if that was the end.
    pub fn guest_value(&self) -> Option<u32> {
        match self {
            End::Board(BoardExit::DebugExit(value)) => Some(*value),
            _ => None,
        }
    }

    /// The reason in QMP's words (`ShutdownCause`), and whether it was the guest's doing.
    pub fn shutdown_cause(&self) -> (&'static str, bool) {
        match self {
            End::Board(BoardExit::DebugExit(_) | BoardExit::PowerOff) => ("guest-shutdown", true),
            End::Board(BoardExit::ResetRequested { .. }) | End::TripleFault(_) | End::Init(_) => {
                ("guest-reset", true)
            }
            End::Stuck(_) | End::GuestTlb(_) => ("guest-panic", true),
            End::Quit => ("host-qmp-quit", false),
            // A time limit is what would come of `timeout` around the whole of it.
            End::Signal | End::Timeout(_) => ("host-signal", false),
            End::Unknown { .. }
            | End::Backend { .. }
            | End::Shortage(_)
            | End::Incoherent(_)
            | End::NotReset(_)
            | End::Panic { .. } => ("host-error", false),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Board(BoardExit::DebugExit(value)) => {
                write!(f, "the guest ended with {value} at its exit port")
            }
            End::Board(exit) => write!(f, "the guest asked for {exit:?}; a reset ends the run"),
            End::TripleFault(cpu) => write!(
                f,
                "triple fault: the guest raised an exception that neither its handler nor its double-fault \
                 handler could take. Look at its IDT and stack:\n{cpu}"
            ),
            End::Init(cpu) => {
                write!(
                    f,
                    "the guest sent its boot processor an INIT, which is a reset; a reset ends the run:\n{cpu}"
                )
            }
            End::Timeout(after) => write!(f, "the guest did not end within --timeout {after:?}"),
            End::Quit => write!(f, "ended by the operator"),
            End::Signal => write!(f, "ended by a signal"),
            End::NotReset(why) => write!(f, "resetting the guest: {why}"),
            End::Unknown { instruction, trap, cpu } => {
                write!(f, "{instruction}")?;
                if let Some((vector, error)) = trap {
                    write!(f, " (this host's KVM raised vector {vector}, error {error:#x}, there)")?;
                }
                write!(f, ":\n{cpu}")
            }
            End::Backend { error, cpu } => write!(f, "KVM cannot go on: {error}\nlast known state:\n{cpu}"),
            End::Shortage(shortage) => write!(f, "{shortage}"),
            End::Incoherent(violation) => {
                write!(
                    f,
                    "{violation}\n  a TLB flush was missed; this is a mistake in Umbra, please report it"
                )
            }
            End::GuestTlb(missed) => write!(f, "{missed}"),
            End::Panic { thread, why } => write!(
                f,
                "Umbra's {thread} thread has panicked: {why}. The guest cannot go on without it; this is a mistake in \
                 Umbra, please report it"
            ),
            End::Stuck(cpu) => write!(
                f,
                "the guest halted with interrupts off, or with none that could ever come, and waits for ever:\n{cpu}"
            ),
        }
    }
}

/// Where a run's end is noted.
#[derive(Clone)]
pub struct Ending {
    end: Arc<Mutex<Option<End>>>,
    devices: Arc<Devices>,
}

impl Ending {
    /// Not ended yet.
    pub fn new(devices: Arc<Devices>) -> Ending {
        Ending { end: Arc::default(), devices }
    }

    /// Ends the run, unless it has ended, and makes every vCPU look up.
    pub fn set(&self, end: End) {
        self.lock().get_or_insert(end);
        self.devices.wake_all();
    }

    /// Does the work of one of Umbra's own threads. If it panics, the run ends.
    pub fn watch(&self, thread: &'static str, work: impl FnOnce()) {
        // What the work has left half done is looked at by nobody but the audit.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            self.set(End::Panic { thread, why: words_of(&*panic) });
        }
    }

    /// True once the run has ended.
    pub fn is_set(&self) -> bool {
        self.lock().is_some()
    }

    /// How the end is told to QMP's clients, once there is one.
    pub fn shutdown_cause(&self) -> Option<(&'static str, bool)> {
        self.lock().as_ref().map(End::shutdown_cause)
    }

    /// Takes the reason.
    pub fn take(&self) -> Option<End> {
        self.lock().take()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a panic said.
fn words_of(panic: &(dyn Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it did not say why".into())
}
