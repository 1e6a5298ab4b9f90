//! Exit statuses: one table for the program, the manual and the tests.
//!
//! A guest that writes `v` to its exit port (0xf4) ends the run with 0 for `v` = 0 and with `(v << 1) | 1` for any
//! other, modulo 256, as QEMU's isa-debug-exit has it: always odd. Umbra's own are even, so they never collide.

/// Why the program ends, as its parent sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The guest ended with 0 and every witness agrees.
    Pass,
    /// The guest ended with this value, not 0.
    Guest(u32),
    /// The command line makes no sense.
    Usage,
    /// An input or the host does not allow the run: an image, a file, /dev/kvm, memory.
    Operator,
    /// Umbra could not go on: an instruction it does not know, a stop of KVM, a breach of its own invariants.
    Failure,
    /// The guest says PASS and a witness of Umbra's own says otherwise.
    Witness,
    /// `--timeout` was over first; of `pressure`: what was asked for was not reached in time.
    Timeout,
    /// The guest reset the machine, or triple-faulted, or waits for ever.
    Reset,
    /// Ended by an operator.
    Quit,
    /// A simulation came to where threads wait for each other, or one for too long, or a vCPU gets nowhere.
    Deadlock,
    /// A flush of a TLB was missed, by Umbra: a software TLB has used what had been handed on.
    Incoherent,
    /// The guest has missed a flush of a TLB of its own: `--check-guest-tlb` is certain, or strict.
    GuestTlb,
}

impl Status {
    /// The process's exit status.
    pub fn code(self) -> u8 {
        match self {
            Status::Pass => 0,
            Status::Guest(value) => (value << 1) as u8 | 1,
            Status::Usage => 2,
            Status::Operator => 4,
            Status::Failure => 6,
            Status::Witness => 8,
            Status::Timeout => 10,
            Status::Reset => 12,
            Status::Quit => 14,
            Status::Incoherent => 16,
            Status::GuestTlb => 18,
            Status::Deadlock => 20,
        }
    }

    /// The verdict's word.
    pub fn verdict(self) -> &'static str {
        match self {
            Status::Pass => "PASS",
            Status::Guest(_) | Status::Witness | Status::GuestTlb => "FAIL",
            Status::Timeout => "TIMEOUT",
            Status::Reset => "RESET",
            Status::Quit => "QUIT",
            Status::Usage | Status::Operator | Status::Failure | Status::Incoherent | Status::Deadlock => {
                "ERROR"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_statuses_are_odd_and_ours_even() {
        for value in 1..=300 {
            assert_eq!(Status::Guest(value).code() % 2, 1);
        }
        assert_eq!(Status::Guest(3).code(), 7);
        let ours = [
            Status::Usage,
            Status::Operator,
            Status::Failure,
            Status::Witness,
            Status::Timeout,
            Status::Reset,
            Status::Quit,
            Status::Incoherent,
            Status::GuestTlb,
            Status::Deadlock,
        ];
        for (at, status) in ours.iter().enumerate() {
            assert!(status.code() != 0 && status.code() % 2 == 0);
            assert!(ours[at + 1..].iter().all(|other| other.code() != status.code()));
        }
    }
}
