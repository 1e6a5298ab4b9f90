//! virtio-mmio: the transport of up to [`SLOTS`] virtio devices, version 2.
//!
//! Story: a driver finds a slot, agrees on features, says where its rings are, and notifies. That much is registers, and is
//! here. What rings hold is served by a worker outside the board, one for each device: [`Board::take_notifies`] names the slots
//! whose worker has something to look at; the worker takes a [`VirtioSnapshot`] ([`Board::virtio_begin`]), serves one request of
//! each ring, says what it has used ([`Board::virtio_used`]), and lets go ([`Board::virtio_end`]).
//!
//! ```text
//! driver                                worker
//! Status := 0                           begin .. (serving a request)
//!   not yet: reads as it was              no interrupt from here on
//! Status reads as it was ...
//!                                       end: the reset is done
//! Status reads 0
//! ```
//!
//! Holds: BOARD-VIRTIO-1, the line of a slot is up exactly while its interrupt status is not 0. BOARD-VIRTIO-2, between a
//! notification and the moment at which its worker has found nothing more, [`Board::virtio_owes`] is true. BOARD-VIRTIO-3, once
//! Status reads 0, or QueueReady after 0 was written, no worker has a ring of this slot, or that ring, in its hands.
//!
//! Limits: features that were not offered, a queue that is too large, no power of two or misaligned, and writes that come too
//! late do not stick. Nothing here reads guest memory.
//!
//! Not here: legacy devices, shared memory, the reset of a single queue.
//!
//! See: Virtual I/O Device (VIRTIO) version 1.2, 4.2. An empty slot is as QEMU's.

use super::{Board, GSI_VIRTIO, Nanos};
use crate::interp::Width;

/// Slots of virtio devices.
pub const SLOTS: usize = 24;
/// The most queues of a device.
pub const QUEUES_MAX: usize = 4;
/// The most bytes of a device's configuration.
pub const CONFIG_BYTES_MAX: usize = 64;

/// Feature bits of every device.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Notifications both ways go by index.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Not a legacy device: required.
pub const F_VERSION_1: u64 = 1 << 32;
/// What every device offers.
const FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// Bytes of a slot's registers.
pub(super) const SLOT_BYTES: u64 = 0x200;
const CONFIG: u32 = 0x100;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"UMBR");

/// Registers.
mod register {
    pub const MAGIC: u32 = 0x00;
    pub const VERSION: u32 = 0x04;
    pub const DEVICE_ID: u32 = 0x08;
    pub const VENDOR_ID: u32 = 0x0c;
    pub const DEVICE_FEATURES: u32 = 0x10;
    pub const DEVICE_FEATURES_SEL: u32 = 0x14;
    pub const DRIVER_FEATURES: u32 = 0x20;
    pub const DRIVER_FEATURES_SEL: u32 = 0x24;
    pub const QUEUE_SEL: u32 = 0x30;
    pub const QUEUE_NUM_MAX: u32 = 0x34;
    pub const QUEUE_NUM: u32 = 0x38;
    pub const QUEUE_READY: u32 = 0x44;
    pub const QUEUE_NOTIFY: u32 = 0x50;
    pub const INTERRUPT_STATUS: u32 = 0x60;
    pub const INTERRUPT_ACK: u32 = 0x64;
    pub const STATUS: u32 = 0x70;
    /// Low and high halves of three addresses: descriptor table, driver area, device area.
    pub const QUEUE_ADDRESSES: [u32; 6] = [0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4];
    /// Length and base of a shared memory region: there is none, which reads as ones.
    pub const SHARED_MEMORY: [u32; 4] = [0xb0, 0xb4, 0xb8, 0xbc];
    pub const CONFIG_GENERATION: u32 = 0xfc;
}

/// Bits of Status.
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;
const FAILED: u32 = 0x80;
/// Those that a driver sets: ACKNOWLEDGE and DRIVER too.
const DRIVERS_OWN: u32 = 1 | 2 | DRIVER_OK | FEATURES_OK | FAILED;

/// Bits of InterruptStatus.
const USED: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

/// What a device is, for its driver.
#[derive(Clone, Copy, Debug)]
pub struct VirtioSpec {
    /// Its kind: 2 is a block device, 5 a balloon.
    pub device_id: u32,
    /// Features beside those of every device.
    pub features: u64,
    /// The largest size of each queue, powers of two; queues behind the first 0 do not exist.
    pub queue_sizes: [u16; QUEUES_MAX],
    /// Its configuration.
    pub config: [u8; CONFIG_BYTES_MAX],
    /// How much of that there is.
    pub config_bytes: usize,
    /// Bytes of it that the driver writes.
    pub config_writable: (usize, usize),
}

/// A queue as its driver has set it up: claims, of which nothing has been checked but size and alignment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    /// It may be used.
    pub ready: bool,
    /// Entries, a power of two.
    pub size: u16,
    /// The descriptor table.
    pub table: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// Another number each time that the queue begins anew.
    pub life: u32,
}

/// What a worker goes by for one round.
#[derive(Clone, Copy, Debug)]
pub struct VirtioSnapshot {
    /// The features that device and driver agree on.
    pub features: u64,
    /// How often the device has been reset.
    pub generation: u32,
    /// Its queues.
    pub queues: [QueueConfig; QUEUES_MAX],
    /// Its configuration, with what the driver has written there.
    pub config: [u8; CONFIG_BYTES_MAX],
}

/// A queue and what a driver may still change of it.
#[derive(Clone, Copy, Debug, Default)]
struct Queue {
    config: QueueConfig,
    size_max: u16,
    size: u32,
    /// Not ready any more, but a worker may have it in hand.
    lingers: bool,
}

impl Queue {
    fn reset(&mut self) {
        *self = Queue {
            config: QueueConfig { life: self.config.life, ..QueueConfig::default() },
            size: self.size_max.into(),
            size_max: self.size_max,
            lingers: false,
        };
    }

    /// True where nothing keeps its addresses and its size from being set.
    fn is_open(&self) -> bool {
        !self.config.ready && !self.lingers
    }

    fn set_address(&mut self, half: usize, value: u32) {
        if !self.is_open() {
            return;
        }
        let address = match half / 2 {
            0 => &mut self.config.table,
            1 => &mut self.config.available,
            _ => &mut self.config.used,
        };
        let shift = 32 * (half % 2);
        *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    fn set_ready(&mut self, ready: bool, busy: bool) {
        let config = &mut self.config;
        if !ready {
            self.lingers |= config.ready && busy;
            config.ready = false;
            return;
        }
        let aligned = config.table.is_multiple_of(16)
            && config.available.is_multiple_of(2)
            && config.used.is_multiple_of(4);
        let sized = self.size.is_power_of_two() && self.size <= self.size_max.into();
        if self.is_open() && aligned && sized {
            self.config.size = self.size as u16;
            self.config.ready = true;
            self.config.life = self.config.life.wrapping_add(1);
        }
    }
}

/// A slot with a device in it.
#[derive(Clone, Debug)]
struct Slot {
    spec: VirtioSpec,
    config: [u8; CONFIG_BYTES_MAX],
    config_generation: u32,
    status: u32,
    interrupt: u32,
    driver_features: u64,
    /// Which half of the features, and which queue, the driver looks at.
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    queues: [Queue; QUEUES_MAX],
    generation: u32,
    /// A worker has it in hand.
    busy: bool,
    /// It is to be reset once the worker lets go.
    resetting: bool,
    /// A worker has to look at it.
    owes: bool,
}

impl Slot {
    fn new(spec: VirtioSpec) -> Slot {
        let mut slot = Slot {
            spec,
            config: spec.config,
            config_generation: 0,
            status: 0,
            interrupt: 0,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            queues: spec.queue_sizes.map(|size_max| Queue { size_max, ..Queue::default() }),
            generation: 0,
            busy: false,
            resetting: false,
            owes: false,
        };
        slot.queues.iter_mut().for_each(Queue::reset);
        slot
    }

    fn features(&self) -> u64 {
        self.spec.features | FEATURES
    }

    /// The driver may use it, and it may use the driver's rings.
    fn is_live(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK && !self.resetting
    }

    /// The driver gives it up. Its configuration stays: what the host has written there holds on.
    fn reset(&mut self) {
        (self.interrupt, self.owes) = (0, false);
        if self.busy {
            self.resetting = true;
            return;
        }
        (self.status, self.resetting) = (0, false);
        (self.driver_features, self.device_features_sel, self.driver_features_sel) = (0, 0, 0);
        self.queue_sel = 0;
        self.queues.iter_mut().for_each(Queue::reset);
        self.generation = self.generation.wrapping_add(1);
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_sel as usize)
    }

    fn half(value: u64, half: u32) -> u32 {
        match half {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        }
    }

    fn read(&self, register: u32) -> u32 {
        match register {
            register::DEVICE_ID => self.spec.device_id,
            register::DEVICE_FEATURES => Slot::half(self.features(), self.device_features_sel),
            register::QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.size_max.into()),
            register::QUEUE_READY => self.queue().map_or(0, |q| u32::from(q.config.ready || q.lingers)),
            register::INTERRUPT_STATUS => self.interrupt,
            register::STATUS => self.status,
            register::CONFIG_GENERATION => self.config_generation,
            _ if register::SHARED_MEMORY.contains(&register) => u32::MAX,
            _ => 0,
        }
    }

    fn write(&mut self, register: u32, value: u32) {
        if self.resetting {
            return;
        }
        let busy = self.busy;
        match register {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => self.notify(value),
            register::INTERRUPT_ACK => self.interrupt &= !value,
            register::STATUS => self.set_status(value),
            _ => {
                let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return };
                let half = register::QUEUE_ADDRESSES.iter().position(|at| *at == register);
                match register {
                    register::QUEUE_NUM if queue.is_open() => queue.size = value,
                    register::QUEUE_READY => queue.set_ready(value & 1 != 0, busy),
                    _ => half.into_iter().for_each(|half| queue.set_address(half, value)),
                }
            }
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        let shift = match self.driver_features_sel {
            sel @ 0..=1 if self.status & FEATURES_OK == 0 => 32 * sel,
            _ => return,
        };
        self.driver_features = self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    /// Bits are set, never taken away, but by a reset.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let agreed = self.driver_features & !self.features() == 0 && self.driver_features & F_VERSION_1 != 0;
        let was = self.status;
        self.status |= value & DRIVERS_OWN & !(DRIVER_OK | FEATURES_OK);
        if agreed {
            self.status |= value & FEATURES_OK;
        }
        if self.status & FEATURES_OK != 0 {
            self.status |= value & DRIVER_OK;
        }
        // What was offered before counts as notified now.
        self.owes |= self.status & !was & DRIVER_OK != 0 && self.is_live();
    }

    fn notify(&mut self, queue: u32) {
        let ready = self.queues.get(queue as usize).is_some_and(|queue| queue.config.ready);
        self.owes |= ready && self.is_live();
    }

    fn read_config(&self, at: usize) -> u8 {
        if at < self.spec.config_bytes { self.config[at] } else { 0xff }
    }

    fn write_config(&mut self, at: usize, byte: u8) {
        let (first, end) = self.spec.config_writable;
        if (first..end.min(self.spec.config_bytes)).contains(&at) && !self.resetting {
            self.config[at] = byte;
            self.owes |= self.is_live();
        }
    }

    fn begin(&mut self) -> Option<VirtioSnapshot> {
        self.owes = false;
        if !self.is_live() || self.busy {
            return None;
        }
        self.busy = true;
        let queues = self.queues.map(|queue| queue.config);
        let (features, generation) = (self.driver_features, self.generation);
        Some(VirtioSnapshot { features, generation, queues, config: self.config })
    }

    fn end(&mut self, more: bool) {
        self.busy = false;
        self.queues.iter_mut().for_each(|queue| queue.lingers = false);
        if self.resetting {
            self.reset();
        }
        self.owes |= more && self.is_live();
    }

    /// Raises an interrupt, if there is a driver to take it.
    fn interrupt(&mut self, cause: u32) {
        if self.status & DRIVER_OK != 0 && !self.resetting {
            self.interrupt |= cause;
        }
    }
}

/// All slots.
pub(super) struct VirtioSlots {
    slots: [Option<Box<Slot>>; SLOTS],
    /// Slots whose line is up.
    lines: u32,
    /// Slots that `take_notifies` has named since they began to owe.
    told: u32,
}

impl VirtioSlots {
    pub(super) fn new() -> VirtioSlots {
        VirtioSlots { slots: std::array::from_fn(|_| None), lines: 0, told: 0 }
    }

    /// Every device as after power-up, but for what the host has written to its configuration; one in a worker's hands, once that
    /// has let go.
    pub(super) fn reset(&mut self) {
        for slot in self.slots.iter_mut().flatten() {
            let (first, end) = slot.spec.config_writable;
            slot.config[first..end].copy_from_slice(&slot.spec.config[first..end]);
            slot.reset();
        }
        (self.lines, self.told) = (0, 0);
    }

    /// True if a device drives the line.
    pub(super) fn drives(&self, gsi: u32) -> bool {
        let slot = gsi.checked_sub(GSI_VIRTIO).and_then(|slot| self.slots.get(slot as usize));
        slot.is_some_and(Option::is_some)
    }

    /// Lines that have changed since the last call, with their levels.
    pub(super) fn take_changes(&mut self) -> impl Iterator<Item = (u32, bool)> + use<> {
        let up = self.mask(|slot| slot.interrupt != 0);
        let changed = up ^ std::mem::replace(&mut self.lines, up);
        let slots = (0..SLOTS as u32).filter(move |slot| changed & 1 << slot != 0);
        slots.map(move |slot| (GSI_VIRTIO + slot, up & 1 << slot != 0))
    }

    /// The level of a slot's line.
    #[cfg(test)]
    pub(super) fn line(&self, slot: u32) -> bool {
        self.lines & 1 << slot != 0
    }

    fn mask(&self, of: impl Fn(&Slot) -> bool) -> u32 {
        let slots = self.slots.iter().enumerate();
        slots.fold(0, |mask, (n, slot)| mask | u32::from(slot.as_deref().is_some_and(&of)) << n)
    }

    fn slot_mut(&mut self, slot: usize) -> Option<&mut Slot> {
        self.slots.get_mut(slot)?.as_deref_mut()
    }

    /// `offset` bytes into the first slot's registers.
    pub(super) fn read(&self, offset: u32, width: Width) -> u64 {
        let (slot, at) = ((u64::from(offset) / SLOT_BYTES) as usize, offset % SLOT_BYTES as u32);
        let Some(place) = self.slots.get(slot) else { return u64::MAX >> (64 - width.bits()) };
        let device = place.as_deref();
        if at >= CONFIG {
            let byte = |n: u32| match device {
                Some(slot) => slot.read_config((at - CONFIG + n) as usize),
                None => 0,
            };
            return (0..width.bytes()).fold(0, |value, n| value | u64::from(byte(n)) << (8 * n));
        }
        let read = |at| match (at, device) {
            (register::MAGIC, _) => MAGIC,
            (register::VERSION, _) => VERSION,
            (register::VENDOR_ID, _) => VENDOR,
            (_, Some(slot)) => slot.read(at),
            (_, None) => 0,
        };
        match width {
            Width::B4 if at % 4 == 0 => read(at).into(),
            Width::B8 if at % 8 == 0 => u64::from(read(at + 4)) << 32 | u64::from(read(at)),
            _ => 0,
        }
    }

    /// True if somebody takes it: of the registers, aligned 32-bit writes.
    pub(super) fn write(&mut self, offset: u32, width: Width, value: u64) -> bool {
        let (slot, at) = ((u64::from(offset) / SLOT_BYTES) as usize, offset % SLOT_BYTES as u32);
        let Some(slot) = self.slot_mut(slot) else { return false };
        if at >= CONFIG {
            let bytes = value.to_le_bytes();
            (0..width.bytes()).for_each(|n| slot.write_config((at - CONFIG + n) as usize, bytes[n as usize]));
            return true;
        }
        let whole = width == Width::B4 && at % 4 == 0;
        if whole {
            slot.write(at, value as u32);
        }
        whole
    }
}

/// virtio devices.
impl Board {
    /// Puts a device into a slot, before the guest runs. False where there is no such slot, or it is taken.
    pub fn plug(&mut self, slot: usize, spec: VirtioSpec) -> bool {
        debug_assert!(
            spec.config_bytes <= CONFIG_BYTES_MAX,
            "a configuration of {} bytes",
            spec.config_bytes
        );
        let spec = VirtioSpec { config_bytes: spec.config_bytes.min(CONFIG_BYTES_MAX), ..spec };
        match self.virtio.slots.get_mut(slot) {
            Some(place @ None) => place.insert(Box::new(Slot::new(spec))),
            _ => return false,
        };
        true
    }

    /// Slots (bit n: number n) whose worker has something to look at, each named once until it has begun.
    pub fn take_notifies(&mut self) -> u32 {
        let owing = self.virtio.mask(|slot| slot.owes);
        owing & !std::mem::replace(&mut self.virtio.told, owing)
    }

    /// True while the worker of any device has something to do, or to look at: an interrupt may come of that.
    pub fn virtio_owes(&self) -> bool {
        self.virtio.mask(|slot| slot.owes || slot.busy) != 0
    }

    /// A worker takes a device in hand, until [`Board::virtio_end`]. `None` if no driver runs it.
    pub fn virtio_begin(&mut self, slot: usize) -> Option<VirtioSnapshot> {
        let begun = self.virtio.slot_mut(slot)?.begin();
        self.virtio.told &= !(1 << slot);
        begun
    }

    /// The worker lets go. `more` says that it will begin again by itself.
    pub fn virtio_end(&mut self, now: Nanos, slot: usize, more: bool) {
        self.virtio_change(now, slot, |slot| slot.end(more));
        if more {
            self.virtio.told |= 1 << slot & self.virtio.mask(|slot| slot.owes);
        }
    }

    /// The driver has something in its used rings.
    pub fn virtio_used(&mut self, now: Nanos, slot: usize) {
        self.virtio_change(now, slot, |slot| slot.interrupt(USED));
    }

    /// Writes a device's configuration and says so. What goes beyond it is dropped.
    pub fn virtio_set_config(&mut self, now: Nanos, slot: usize, offset: usize, bytes: &[u8]) {
        self.virtio_change(now, slot, |slot| {
            for (place, byte) in slot.config[..slot.spec.config_bytes].iter_mut().skip(offset).zip(bytes) {
                *place = *byte;
            }
            slot.config_generation = slot.config_generation.wrapping_add(1);
            slot.interrupt(CONFIG_CHANGED);
        });
    }

    /// A device cannot go on with its rings: it wants to be reset, and does nothing until it is.
    pub fn virtio_failed(&mut self, now: Nanos, slot: usize) {
        self.virtio_change(now, slot, |slot| {
            if !slot.resetting && slot.status != 0 {
                slot.status |= NEEDS_RESET;
                slot.interrupt(CONFIG_CHANGED);
            }
        });
    }

    fn virtio_change(&mut self, now: Nanos, slot: usize, change: impl FnOnce(&mut Slot)) {
        self.advance(now);
        if let Some(slot) = self.virtio.slot_mut(slot) {
            change(slot);
            self.settle();
        }
    }
}

#[cfg(test)]
#[path = "virtio_tests.rs"]
pub(super) mod tests;
