//! A driver's side by hand, for tests and fuzzers: registers written, rings laid byte by byte, over a real board and a real MMU,
//! without threads.
//!
//! Limits: queue n of the driver has its rings at [`Layout::of`]; its table and its available ring lie over page edges.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use umbra_mmu::swap::MemorySwap;
use umbra_mmu::{Config, Context, Gpa, LocalStack, Machine, Mmu, NoVcpus, Shortage};

use super::worker::Worker;
use super::{Device, Port, little_endian};
use crate::board::{
    Board, BoardConfig, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, MEMORY_BYTES_MIN, MemoryMap, Nanos,
    QUEUES_MAX, VirtioSnapshot,
};
use crate::interp::Width;

/// Pages of the guest.
pub const PAGES: u32 = 1200;
/// Those that stay.
pub const LOW_PAGES: u32 = 8;
/// The first page that drivers have no rings in.
pub const BUFFERS: u64 = 0x20_0000;

/// The first slot's registers.
const SLOT_0: u64 = 0xfeb0_0000;
/// All that every device offers.
const COMMON: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// A table of descriptors.
pub const INDIRECT: u16 = 4;

/// Where a driver's queue lies.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The descriptor table.
    pub table: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// Its indirect tables.
    pub indirect: u64,
}

impl Layout {
    /// That of queue `n`.
    pub fn of(n: usize) -> Layout {
        let base = 0x10_0000 + 0x1_0000 * n as u64;
        Layout { table: base + 0xf80, available: base + 0x2ff0, used: base + 0x4000, indirect: base + 0x6010 }
    }
}

/// A board with one device in its first slot.
pub struct BoardPort(Mutex<Board>);

impl BoardPort {
    /// The board.
    pub fn board(&self) -> MutexGuard<'_, Board> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers for BoardPort {
    fn read(&self, register: u32) -> u32 {
        self.board().mmio_read(Nanos(0), 0, Gpa(SLOT_0 + u64::from(register)), Width::B4) as u32
    }

    fn write(&self, register: u32, value: u32) {
        self.board().mmio_write(Nanos(0), 0, Gpa(SLOT_0 + u64::from(register)), Width::B4, value.into());
    }
}

impl Port for BoardPort {
    fn begin(&self) -> Option<VirtioSnapshot> {
        self.board().virtio_begin(0)
    }

    fn end(&self, used: bool, more: bool) {
        let mut board = self.board();
        if used {
            board.virtio_used(Nanos(0), 0);
        }
        board.virtio_end(Nanos(0), 0, more);
    }

    fn fail(&self) {
        let mut board = self.board();
        board.virtio_failed(Nanos(0), 0);
        board.virtio_end(Nanos(0), 0, false);
    }

    fn set_config(&self, offset: usize, bytes: &[u8]) {
        self.board().virtio_set_config(Nanos(0), 0, offset, bytes);
    }
}

/// A part of a request: address, length, flags.
pub type Part = (u64, u32, u16);

/// A slot's registers, as a driver reaches them.
pub trait Registers {
    /// Reads a register.
    fn read(&self, register: u32) -> u32;
    /// Writes a register.
    fn write(&self, register: u32, value: u32);
}

/// A driver of one device.
#[derive(Clone, Debug)]
pub struct Driver {
    /// Entries of each queue.
    pub size: u16,
    offered: [u16; QUEUES_MAX],
}

impl Default for Driver {
    fn default() -> Driver {
        Driver { size: 16, offered: [0; QUEUES_MAX] }
    }
}

impl Driver {
    /// Resets the device and sets it up with these features beside those that every device has, without `without`; all its
    /// queues.
    pub fn set_up(&mut self, mmu: &Mmu, registers: &dyn Registers, features: u64, without: u64) {
        let features = (features | COMMON) & !without;
        let write = |register, value| registers.write(register, value);
        write(0x70, 0);
        write(0x70, 3);
        for (half, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            write(0x24, half);
            write(0x20, value);
        }
        write(0x70, 0xb);
        for n in 0..QUEUES_MAX {
            write(0x30, n as u32);
            if registers.read(0x34) != 0 {
                self.set_up_queue(mmu, registers, n);
            }
        }
        write(0x70, 0xf);
        self.offered = [0; QUEUES_MAX];
    }

    fn set_up_queue(&self, mmu: &Mmu, registers: &dyn Registers, n: usize) {
        let Layout { table, available, used, .. } = Layout::of(n);
        poke(mmu, available, &[0; 4]);
        poke(mmu, used, &[0; 4]);
        registers.write(0x38, self.size.into());
        for (register, address) in [(0x80, table), (0x90, available), (0xa0, used)] {
            registers.write(register, address as u32);
            registers.write(register + 4, (address >> 32) as u32);
        }
        registers.write(0x44, 1);
    }

    /// Makes a descriptor available.
    pub fn offer(&mut self, mmu: &Mmu, queue: usize, head: u16) {
        let available = Layout::of(queue).available;
        poke(mmu, available + 4 + 2 * u64::from(self.offered[queue] % self.size), &head.to_le_bytes());
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        poke(mmu, available + 2, &self.offered[queue].to_le_bytes());
    }

    /// Makes a chain of these parts available, as descriptors from `first` on or as an indirect table that `first` names.
    pub fn offer_chain(&mut self, mmu: &Mmu, queue: usize, first: u16, parts: &[Part], indirect: bool) {
        let Layout { table, indirect: other, .. } = Layout::of(queue);
        let (into, from) = if indirect { (other, 0) } else { (table, first) };
        for (index, (at, length, flags)) in (from..).zip(parts) {
            let more = if usize::from(index - from) + 1 < parts.len() { NEXT } else { 0 };
            lay(mmu, into, index, (*at, *length, flags | more), index + 1);
        }
        if indirect {
            lay(mmu, table, first, (other, 16 * parts.len() as u32, INDIRECT), 0);
        }
        self.offer(mmu, queue, first);
    }

    /// The used ring's index, and its last entry.
    pub fn used(&self, mmu: &Mmu, queue: usize) -> (u16, u32, u32) {
        let used = Layout::of(queue).used;
        let index = little_endian(&peek(mmu, used + 2, 2)) as u16;
        let entry = peek(mmu, used + 4 + 8 * u64::from(index.wrapping_sub(1) % self.size), 8);
        let (head, length) = entry.split_at(4);
        (index, little_endian(head) as u32, little_endian(length) as u32)
    }
}

/// Stores as the guest would.
///
/// # Panics
///
/// Where there is no memory.
pub fn poke(mmu: &Mmu, at: u64, bytes: &[u8]) {
    mmu.write_bytes_sleeping(None, &LocalStack::new(Context::Host), Gpa(at), bytes).expect("memory");
}

/// Loads as the guest would.
///
/// # Panics
///
/// Where there is no memory.
pub fn peek(mmu: &Mmu, at: u64, count: usize) -> Vec<u8> {
    let (stack, mut bytes) = (LocalStack::new(Context::Host), vec![0; count]);
    mmu.read_bytes_sleeping(None, &stack, Gpa(at), &mut bytes).expect("memory");
    bytes
}

/// Writes a descriptor of a table.
pub fn lay(mmu: &Mmu, table: u64, index: u16, (at, length, flags): Part, next: u16) {
    let bytes = [&at.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
    poke(mmu, table + 16 * u64::from(index), &bytes.concat());
}

/// The memory of a guest for tests: little of it low, the rest with swap behind it.
pub fn mmu() -> Mmu {
    let config =
        Config { low_pages: LOW_PAGES, shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(PAGES) };
    let mmu = Mmu::new(Machine::anonymous(2 * PAGES), config, Box::new(NoVcpus));
    mmu.with_swap(Box::new(MemorySwap::new(2 * PAGES)))
}

/// A guest with a device, its worker, and its driver.
pub struct Bench<D> {
    /// Its MMU.
    pub mmu: Mmu,
    /// Its board.
    pub port: Arc<BoardPort>,
    /// The device's worker.
    pub worker: Worker<D>,
    /// The device's driver.
    pub driver: Driver,
}

impl<D: Device> Bench<D> {
    /// A guest with `device`, whose driver has done nothing yet.
    ///
    /// # Panics
    ///
    /// Where a board of constants cannot be made.
    pub fn new(device: D) -> Bench<D> {
        let memory = MemoryMap::new(MEMORY_BYTES_MIN).expect("the least");
        let board = BoardConfig { memory, vcpus: 1, serial: Box::new(std::io::sink()), epoch_seconds: 0 };
        let mut board = Board::new(board).expect("one vCPU");
        assert!(board.plug(0, device.spec()), "an empty slot");
        let port = Arc::new(BoardPort(Mutex::new(board)));
        let worker = Worker::new(device, "the device".into());
        Bench { mmu: mmu(), port, worker, driver: Driver::default() }
    }

    /// [`Driver::set_up`].
    pub fn set_up(&mut self, features: u64, without: u64) {
        self.driver.set_up(&self.mmu, &*self.port, features, without);
    }

    /// [`poke`].
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        poke(&self.mmu, at, bytes);
    }

    /// [`peek`].
    pub fn peek(&self, at: u64, count: usize) -> Vec<u8> {
        peek(&self.mmu, at, count)
    }

    /// [`lay`].
    pub fn lay(&self, table: u64, index: u16, part: Part, next: u16) {
        lay(&self.mmu, table, index, part, next);
    }

    /// [`Driver::offer`].
    pub fn offer(&mut self, queue: usize, head: u16) {
        self.driver.offer(&self.mmu, queue, head);
    }

    /// [`Driver::offer_chain`].
    pub fn offer_chain(&mut self, queue: usize, first: u16, parts: &[Part], indirect: bool) {
        self.driver.offer_chain(&self.mmu, queue, first, parts, indirect);
    }

    /// [`Driver::used`].
    pub fn used(&self, queue: usize) -> (u16, u32, u32) {
        self.driver.used(&self.mmu, queue)
    }

    /// Rounds until one finds nothing; how many did not.
    ///
    /// # Errors
    ///
    /// When a page cannot be had.
    pub fn serve(&mut self) -> Result<u32, Shortage> {
        let mut rounds = 0;
        while self.worker.round(&self.mmu, &*self.port)? {
            rounds += 1;
        }
        Ok(rounds)
    }
}
