//! A guest for fuzzers: one vCPU on the real bus, over a real MMU and a real board, without KVM, threads and files.
//!
//! Holds: nothing here goes by the host's clock. The same calls on two guests give the same answers.

use std::io;

use umbra_mmu::{Config, Machine, Mmu, NoVcpus, TlbKind, Vcpu};

pub use super::bus::{Aftermath, GuestBus};

use super::devices::Devices;
use crate::board::{Board, BoardConfig, MEMORY_BYTES_MIN, MemoryMap, Nanos};
use crate::cpu::CpuState;

/// A guest with an interpreted vCPU.
pub struct Guest {
    /// Its CPU. Whoever changes what paging depends on tells the bus.
    pub cpu: CpuState,
    /// Its MMU.
    pub mmu: Mmu,
    vcpu: Vcpu,
    devices: Devices,
    time: Nanos,
}

impl Guest {
    /// A guest over a machine of `frames` frames, with paging off. `tlb` is how its TLB forgets.
    ///
    /// # Errors
    ///
    /// When the host has no timer descriptor left.
    pub fn new(config: Config, frames: u32, tlb: TlbKind) -> io::Result<Guest> {
        let memory = MemoryMap::new(MEMORY_BYTES_MIN).map_err(io::Error::other)?;
        let board = BoardConfig { memory, vcpus: 1, serial: Box::new(io::sink()), epoch_seconds: 0 };
        let devices = Devices::new(Board::new(board).map_err(io::Error::other)?)?;
        let mmu = Mmu::new(Machine::anonymous(frames), config, Box::new(NoVcpus));
        let vcpu = mmu.soft_vcpu(0, tlb);
        Ok(Guest { cpu: CpuState::flat_protected_mode(0), mmu, vcpu, devices, time: Nanos(0) })
    }

    /// The MMU's side of the vCPU.
    pub fn vcpu(&self) -> &Vcpu {
        &self.vcpu
    }

    /// The vCPU's own time.
    pub fn time(&self) -> Nanos {
        self.time
    }

    /// Calls with the vCPU's bus, as its loop does for a stretch of code or an event.
    pub fn with_bus<R>(
        &mut self,
        call: impl FnOnce(&mut CpuState, &mut GuestBus<'_>) -> R,
    ) -> (R, Aftermath) {
        let mut bus = GuestBus::new(&self.mmu, &mut self.vcpu, &self.devices, Some(self.time));
        let result = call(&mut self.cpu, &mut bus);
        self.time = bus.time();
        (result, bus.into_aftermath())
    }

    /// Calls with the board, `later` nanoseconds on.
    pub fn with_board<R>(&mut self, later: u64, call: impl FnOnce(&mut Board, Nanos) -> R) -> R {
        self.time = self.time.plus(later);
        self.devices.with_at(self.vcpu.id(), self.time, call).0
    }
}
