//! The guest's virtio devices: their slots, their threads, and their way to the board.
//!
//! Story: disks are plugged in order into the first slots, the balloon behind them, before the guest runs. Each has a thread then,
//! which sleeps until [`Devices`] rings its bell.
//!
//! Holds: a panic of such a thread, or a page that cannot be had, ends the run.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use umbra_mmu::Mmu;

use super::devices::Devices;
use super::ending::{End, Ending};
use crate::board::VirtioSnapshot;
use crate::virtio::balloon::{Balloon, BalloonDevice, BalloonState};
use crate::virtio::blk::{Blk, BlkHandle, DiskSummary};
use crate::virtio::disk::Disk;
use crate::virtio::worker::{Bell, Worker};
use crate::virtio::{Device, Port};

/// A slot of the board behind its lock.
struct SlotPort {
    devices: Arc<Devices>,
    slot: usize,
}

impl Port for SlotPort {
    fn begin(&self) -> Option<VirtioSnapshot> {
        self.devices.with(|board, _| board.virtio_begin(self.slot))
    }

    fn end(&self, used: bool, more: bool) {
        self.devices.with(|board, now| {
            if used {
                board.virtio_used(now, self.slot);
            }
            board.virtio_end(now, self.slot, more);
        });
    }

    fn fail(&self) {
        self.devices.with(|board, now| {
            board.virtio_failed(now, self.slot);
            board.virtio_end(now, self.slot, false);
        });
    }

    fn set_config(&self, offset: usize, bytes: &[u8]) {
        self.devices.with(|board, now| board.virtio_set_config(now, self.slot, offset, bytes));
    }
}

/// A device in its slot.
struct Plugged<D> {
    worker: Worker<D>,
    port: Arc<SlotPort>,
    bell: Arc<Bell>,
}

impl<D: Device + 'static> Plugged<D> {
    fn new(device: D, name: String, slot: usize, devices: &Arc<Devices>) -> Plugged<D> {
        let plugged = devices.with(|board, _| board.plug(slot, device.spec()));
        assert!(plugged, "virtio slot {slot} is free");
        let bell = Arc::new(Bell::default());
        devices.set_bell(slot, Arc::clone(&bell));
        let port = Arc::new(SlotPort { devices: Arc::clone(devices), slot });
        Plugged { worker: Worker::new(device, name), port, bell }
    }

    fn start(self, thread: &'static str, mmu: &Arc<Mmu>, ending: &Ending) -> io::Result<Thread> {
        let Plugged { mut worker, port, bell } = self;
        let (mmu, ending, own) = (Arc::clone(mmu), ending.clone(), Arc::clone(&bell));
        let work = move || {
            ending.watch(thread, || {
                if let Err(short) = worker.run(&mmu, &*port, &own) {
                    ending.set(End::Shortage(short));
                }
            });
        };
        let thread = std::thread::Builder::new().name(thread.into()).spawn(work)?;
        Ok(Thread { bell, thread: Some(thread) })
    }
}

/// A running thread; dropping it ends it.
struct Thread {
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.bell.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A guest's virtio devices, before it runs.
pub struct VirtioDevices {
    disks: Vec<Plugged<Blk>>,
    balloon: Plugged<BalloonDevice>,
}

impl VirtioDevices {
    /// Puts disks and balloon into the slots of a board that has none in them.
    pub fn plug(disks: Vec<Disk>, devices: &Arc<Devices>) -> VirtioDevices {
        let plug = |(slot, disk): (usize, Disk)| {
            let name = format!("disk '{}'", disk.id());
            Plugged::new(Blk::new(disk), name, slot, devices)
        };
        let disks: Vec<_> = disks.into_iter().enumerate().map(plug).collect();
        let balloon = Plugged::new(BalloonDevice::new(), "balloon".into(), disks.len(), devices);
        VirtioDevices { disks, balloon }
    }

    /// Starts their threads.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn start(self, mmu: &Arc<Mmu>, ending: &Ending) -> io::Result<VirtioThreads> {
        let VirtioDevices { disks, balloon } = self;
        let handles = disks.iter().map(|disk| disk.worker.device().handle()).collect();
        let port: Arc<dyn Port> = Arc::clone(&balloon.port) as _;
        let handle = balloon.worker.device().handle(port, Arc::clone(&balloon.bell));
        let mut threads = vec![balloon.start("balloon", mmu, ending)?];
        for disk in disks {
            threads.push(disk.start("disk", mmu, ending)?);
        }
        Ok(VirtioThreads { threads, disks: handles, balloon: handle })
    }
}

/// The same while it runs.
pub struct VirtioThreads {
    threads: Vec<Thread>,
    disks: Vec<BlkHandle>,
    /// The host's side of the balloon.
    pub balloon: Balloon,
}

impl VirtioThreads {
    /// Ends the threads; what the devices have done.
    pub fn finish(mut self) -> (Vec<DiskSummary>, BalloonState) {
        self.threads.clear();
        (self.disks.iter().map(BlkHandle::summary).collect(), self.balloon.state())
    }
}
