//! virtio devices: what serves the rings whose registers the board has.
//!
//! Story: a driver notifies, the board says so, and the device's worker wakes, or the vCPU serves the device itself (`worker`). One
//! request of each ring is served after the other until there is none. A request is served in sessions (`umbra_mmu::dma`), each of
//! which has all its pages or waits with none, and none of which is open while a disk is waited for:
//!
//! ```text
//!   parse      a session's plan takes the chain from the ring and says in owned words what it is; nothing stays pinned
//!   data out   guest memory to a buffer, at most 32 pages at a time
//!   I/O        with nothing held
//!   data in    the buffer to guest memory, at most 32 pages at a time; the shadow is told of each
//!   complete   the status byte, then the used ring
//! ```
//!
//! | file | its job |
//! |---|---|
//! | ring | a queue: chains off it, used entries onto it |
//! | chain | a request's parts, owned; its data to and fro |
//! | worker | rounds over a device's rings; what its thread sleeps on |
//! | disk | the bytes of a disk: a file, or memory |
//! | blk | the block device |
//! | balloon | the balloon device |
//! | fuzz | a driver's side by hand, for tests and fuzzers |
//!
//! Holds: VIRTIO-PIN-1, nothing of the guest is pinned over a disk's I/O nor over a discard. Time and memory of a request are
//! bounded, whatever the guest wrote; what is wrong with a request is its own affair, what is wrong with a ring the device's,
//! which then wants a reset. A page that cannot be had (`Shortage`) ends the run.
//!
//! Not here: registers (`board::virtio`), threads and the board's lock (`vm`).
//!
//! See: Virtual I/O Device (VIRTIO) version 1.2, 2.7, 5.2 and 5.5.

#![forbid(unsafe_code)]

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod disk;
pub mod fuzz;
mod ring;
pub mod worker;

#[cfg(test)]
mod tests;

use umbra_mmu::{Mmu, Shortage};

use crate::board::{VirtioSnapshot, VirtioSpec};
use chain::Chain;

/// A device's side of its slot: the board, behind whatever lock it has.
pub trait Port: Send + Sync {
    /// Takes the device in hand. `None` where no driver runs it.
    fn begin(&self) -> Option<VirtioSnapshot>;
    /// Lets go: the driver has something used, if `used`; the worker comes again by itself, if `more`.
    fn end(&self, used: bool, more: bool);
    /// Lets go of a device whose rings are broken.
    fn fail(&self);
    /// Writes the device's configuration.
    fn set_config(&self, offset: usize, bytes: &[u8]);
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It goes back to the driver, with this status byte, where there is one to write, and so many bytes written.
    Done {
        /// The last byte of what the driver lets be written.
        status: Option<u8>,
        /// Bytes written, the status among them.
        length: u32,
    },
    /// The device keeps it, and gives it back by [`Device::give_back`].
    Kept,
}

/// A device behind its rings. What it is handed has been taken from the ring, and is owned.
pub trait Device: Send {
    /// What it is for its driver.
    fn spec(&self) -> VirtioSpec;

    /// Bytes that each request begins with, to be read with the chain; at most [`chain::HEADER_BYTES_MAX`].
    fn header_bytes(&self) -> usize;

    /// Its requests wait for nothing but the guest's own pages, so that who notifies it may serve them too.
    fn is_prompt(&self) -> bool {
        false
    }

    /// A round begins.
    fn begin_round(&mut self, _snapshot: &VirtioSnapshot) {}

    /// Serves a request of a queue. Called with nothing held; may sleep.
    ///
    /// # Errors
    ///
    /// When a page of the guest cannot be had.
    fn serve(&mut self, mmu: &Mmu, queue: usize, chain: &Chain) -> Result<Served, Shortage>;

    /// A request that was kept and goes back now: its queue and its head.
    fn give_back(&mut self) -> Option<(usize, u16)> {
        None
    }
}

/// The number that up to eight bytes are.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}
