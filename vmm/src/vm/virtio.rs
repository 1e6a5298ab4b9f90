//! The guest's virtio devices: their slots, their threads, and their way to the board.
//!
//! Story: disks are plugged in order into the first slots, the balloon behind them, before the guest runs. Each has a thread then,
//! which sleeps until [`Devices`] rings its bell. One that makes nobody wait ([`Device::is_prompt`]) is served by the vCPU that
//! notifies it, and its thread has what that one leaves.
//!
//! Holds: a panic of such a thread, or a page that cannot be had, ends the run. A vCPU that waits for a device looks again once
//! the device has nothing more to do, so that a wait for ever is seen.
//!
//! Limits: [`FINISH_MAX`] for requests under way at the end of the run; a disk that hangs longer is left alone, and named.

#![forbid(unsafe_code)]

use std::io;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use umbra_mmu::sync::sim;
use umbra_mmu::sync::{Having, Thing};
use umbra_mmu::{Mmu, PAGE_SIZE, Shortage};

use super::control::{BalloonControl, News};
use super::devices::{Devices, Prompt};
use super::ending::{End, Ending};
use super::simulation;
use crate::board::VirtioSnapshot;
use crate::virtio::balloon::{Balloon, BalloonDevice, BalloonState};
use crate::virtio::blk::{Blk, BlkHandle, DiskSummary};
use crate::virtio::disk::Disk;
use crate::virtio::worker::{Bell, Worker};
use crate::virtio::{Device, Port};

/// How long the end of the run waits for requests under way.
pub const FINISH_MAX: Duration = Duration::from_secs(5);

/// Rounds that a vCPU makes over a device that it has notified, before it leaves the rest to the device's thread.
const ROUNDS_OF_A_VCPU: usize = 8;

/// A slot of the board behind its lock.
struct SlotPort<D> {
    devices: D,
    slot: usize,
    /// Whose thread this is for: it is not woken.
    vcpu: Option<u32>,
}

impl<D: Deref<Target = Devices> + Send + Sync> Port for SlotPort<D> {
    fn begin(&self) -> Option<VirtioSnapshot> {
        let begun = self.devices.begin_round(self.slot);
        if begun.is_none() {
            self.devices.nudge_sleepers();
        }
        begun
    }

    fn end(&self, used: bool, more: bool) {
        self.devices.end_round(self.slot, self.vcpu, |board, now| {
            if used {
                board.virtio_used(now, self.slot);
            }
            board.virtio_end(now, self.slot, more);
        });
        if !more {
            self.devices.nudge_sleepers();
        }
    }

    fn fail(&self) {
        self.devices.end_round(self.slot, self.vcpu, |board, now| {
            board.virtio_failed(now, self.slot);
            board.virtio_end(now, self.slot, false);
        });
        self.devices.nudge_sleepers();
    }

    fn set_config(&self, offset: usize, bytes: &[u8]) {
        self.devices.with(|board, now| board.virtio_set_config(now, self.slot, offset, bytes));
    }
}

/// A device in its slot.
struct Plugged<D> {
    worker: Arc<Mutex<Worker<D>>>,
    port: Arc<SlotPort<Arc<Devices>>>,
    bell: Arc<Bell>,
}

/// A device in its slot, for who waits until another has served it.
fn in_hand<D>(slot: usize, worker: &Arc<Mutex<Worker<D>>>) -> Thing {
    Thing::held("the device of slot", Some(slot as u32), &**worker)
}

/// The same for the vCPUs that notify it.
struct Noticed<D> {
    worker: Arc<Mutex<Worker<D>>>,
    slot: usize,
    bell: Arc<Bell>,
}

impl<D: Device> Prompt for Noticed<D> {
    fn serve(&self, vcpu: u32, mmu: &Mmu, devices: &Devices) -> Result<(), Shortage> {
        let more = match self.worker.try_lock() {
            Ok(mut worker) => {
                let _has = Having::new(in_hand(self.slot, &self.worker));
                let port = SlotPort { devices, slot: self.slot, vcpu: Some(vcpu) };
                worker.rounds(mmu, &port, ROUNDS_OF_A_VCPU)?
            }
            // Somebody is at it, and may be past what there is now; or a panic has ended the run.
            Err(_) => true,
        };
        if more {
            self.bell.ring();
        }
        Ok(())
    }
}

impl<D: Device + 'static> Plugged<D> {
    fn new(device: D, name: String, slot: usize, devices: &Arc<Devices>) -> Plugged<D> {
        let plugged = devices.with(|board, _| board.plug(slot, device.spec()));
        assert!(plugged, "virtio slot {slot} is free");
        let bell = Arc::new(Bell::default());
        devices.set_bell(slot, Arc::clone(&bell));
        let prompt = device.is_prompt();
        let worker = Arc::new(Mutex::new(Worker::new(device, name)));
        if prompt {
            let (worker, bell) = (Arc::clone(&worker), Arc::clone(&bell));
            devices.set_prompt(slot, Arc::new(Noticed { worker, slot, bell }));
        }
        let port = Arc::new(SlotPort { devices: Arc::clone(devices), slot, vcpu: None });
        Plugged { worker, port, bell }
    }

    fn start(self, thread: &'static str, mmu: &Arc<Mmu>, ending: &Ending) -> io::Result<Thread> {
        let Plugged { worker, port, bell } = self;
        let (mmu, ending, own) = (Arc::clone(mmu), ending.clone(), Arc::clone(&bell));
        let device = in_hand(port.slot, &worker);
        let name = sim::lock(&worker, device).name().to_owned();
        let work = move || {
            ending.watch(thread, || {
                while own.wait() {
                    // Each round by itself: a vCPU that comes meanwhile is not kept.
                    while !own.is_stopped() {
                        let device = in_hand(port.slot, &worker);
                        let mut at_it = sim::lock(&worker, device);
                        let _has = Having::new(device);
                        match at_it.rounds(&mmu, &*port, 1) {
                            Ok(true) => {}
                            Ok(false) => break,
                            Err(short) => return ending.set(End::Shortage(short)),
                        }
                    }
                }
            });
        };
        let thread = simulation::Thread::start(thread, &name, work)?;
        Ok(Thread { name, bell, thread: Some(thread) })
    }
}

/// A running thread; dropping it ends it.
struct Thread {
    name: String,
    bell: Arc<Bell>,
    thread: Option<simulation::Thread>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.bell.stop();
        if let Some(thread) = self.thread.take() {
            thread.join();
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

    /// The host's side of the balloon.
    pub fn balloon(&self) -> Balloon {
        host_side(&self.balloon)
    }

    /// Starts their threads.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn start(self, mmu: &Arc<Mmu>, ending: &Ending) -> io::Result<VirtioThreads> {
        let VirtioDevices { disks, balloon } = self;
        let handle = |disk: &Plugged<Blk>| {
            sim::lock(&disk.worker, in_hand(disk.port.slot, &disk.worker)).device().handle()
        };
        let handles = disks.iter().map(handle).collect();
        let handle = host_side(&balloon);
        let mut threads = vec![balloon.start("balloon", mmu, ending)?];
        for disk in disks {
            threads.push(disk.start("disk", mmu, ending)?);
        }
        Ok(VirtioThreads { threads, disks: handles, balloon: handle })
    }
}

fn host_side(balloon: &Plugged<BalloonDevice>) -> Balloon {
    let port: Arc<dyn Port> = Arc::clone(&balloon.port) as _;
    let device = in_hand(balloon.port.slot, &balloon.worker);
    sim::lock(&balloon.worker, device).device().handle(port, Arc::clone(&balloon.bell))
}

/// The balloon as the control socket has it: in bytes of what the guest keeps.
pub struct GuestBalloon {
    balloon: Balloon,
    memory: u64,
}

impl GuestBalloon {
    /// Of a guest with so many bytes of memory; its changes are told to `news`.
    pub fn new(balloon: Balloon, memory: u64, news: &Arc<News>) -> GuestBalloon {
        let told = Arc::clone(news);
        balloon.on_change(Box::new(move |pages| told.balloon_changed(kept(memory, pages))));
        GuestBalloon { balloon, memory }
    }
}

/// What a guest with `memory` bytes has left of them without so many pages.
fn kept(memory: u64, pages: u32) -> u64 {
    memory.saturating_sub(u64::from(pages) * PAGE_SIZE)
}

impl BalloonControl for GuestBalloon {
    fn set_target(&self, bytes: u64) -> Result<(), String> {
        let pages = self.memory.saturating_sub(bytes) / PAGE_SIZE;
        self.balloon.set_target(u32::try_from(pages).unwrap_or(u32::MAX));
        Ok(())
    }

    fn actual_bytes(&self) -> u64 {
        kept(self.memory, self.balloon.state().actual)
    }

    fn memory_bytes(&self) -> u64 {
        self.memory
    }

    fn pages(&self) -> (u32, u32) {
        let state = self.balloon.state();
        (state.target, state.actual)
    }

    /// The latest that there are; newer ones are asked for.
    fn stats(&self) -> Option<Vec<(&'static str, u64)>> {
        self.balloon.ask_for_stats();
        let state = self.balloon.state();
        let named = state.stats.map(|stats| stats.named());
        // So that who waits for newer ones knows them.
        named.map(|named| named.into_iter().chain([("updates", state.stats_updates)]).collect())
    }
}

/// The same while it runs.
pub struct VirtioThreads {
    threads: Vec<Thread>,
    disks: Vec<BlkHandle>,
    balloon: Balloon,
}

impl VirtioThreads {
    /// Ends the threads; what the devices have done.
    pub fn finish(self) -> (Vec<DiskSummary>, BalloonState) {
        self.finish_within(FINISH_MAX)
    }

    fn finish_within(mut self, limit: Duration) -> (Vec<DiskSummary>, BalloonState) {
        self.threads.iter().for_each(|thread| thread.bell.stop());
        let deadline = Instant::now() + limit;
        for Thread { name, thread, .. } in &mut self.threads {
            let is_busy = || thread.as_ref().is_some_and(|thread| !thread.is_finished());
            // In a simulation every request ends, in a time that has nothing to do with this one.
            while is_busy() && !sim::is_on() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(100));
            }
            if is_busy() && !sim::is_on() {
                log::warn!(
                    "{name}: its request has not ended after {limit:?}, and is not waited for any longer"
                );
                // It ends with the process, or with its request.
                *thread = None;
            }
        }
        self.threads.clear();
        (self.disks.iter().map(BlkHandle::summary).collect(), self.balloon.state())
    }
}

#[cfg(test)]
mod tests {
    use umbra_mmu::{Access, AccessKind, Gpa, Gva, Mmu};

    use super::*;
    use crate::board::{Board, BoardConfig, F_EVENT_IDX, MemoryMap};
    use crate::interp::{Bus, Width};
    use crate::virtio::disk::{DiskSource, DiskSpec, Medium};
    use crate::virtio::fuzz::{self, BUFFERS, Driver, Registers, WRITE};
    use crate::vm::bus::GuestBus;
    use crate::vm::kick::Attention;
    use crate::vm::stops::{Duty, Stops};

    const PATIENCE: Duration = Duration::from_secs(20);

    struct Slot<'d>(&'d Devices, u64);

    impl Slot<'_> {
        fn gpa(&self, register: u32) -> Gpa {
            Gpa(0xfeb0_0000 + 512 * self.1 + u64::from(register))
        }
    }

    impl Registers for Slot<'_> {
        fn read(&self, register: u32) -> u32 {
            self.0.with(|board, now| board.mmio_read(now, 0, self.gpa(register), Width::B4)) as u32
        }

        fn write(&self, register: u32, value: u32) {
            self.0.with(|board, now| board.mmio_write(now, 0, self.gpa(register), Width::B4, value.into()));
        }
    }

    struct Run {
        mmu: Arc<Mmu>,
        devices: Arc<Devices>,
        ending: Ending,
        threads: VirtioThreads,
    }

    fn run(disks: Vec<Disk>) -> Run {
        let board = Board::new(BoardConfig {
            memory: MemoryMap::new(2 << 20).expect("enough"),
            vcpus: 1,
            serial: Box::new(io::sink()),
            epoch_seconds: 0,
        });
        let devices = Arc::new(Devices::new(board.expect("a board")).expect("timers"));
        let ending = Ending::new(Arc::clone(&devices));
        let mmu = Arc::new(fuzz::mmu());
        let threads = VirtioDevices::plug(disks, &devices).start(&mmu, &ending).expect("threads");
        Run { mmu, devices, ending, threads }
    }

    fn memory_disks(count: usize) -> Vec<Disk> {
        let disk =
            DiskSpec { source: DiskSource::Memory(1 << 20), read_only: false, id: None, write_errors: None };
        Disk::open_all(&vec![disk; count]).expect("memory")
    }

    fn wait_for(what: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !what() {
            assert!(Instant::now() < end, "it takes too long");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// A driver of the disk in slot 0. That one begins concerns the disk's thread, which is done with it.
    fn driver_at_rest(run: &Run) -> Driver {
        let mut driver = Driver::default();
        driver.set_up(&run.mmu, &Slot(&run.devices, 0), 0, F_EVENT_IDX);
        wait_for(|| run.devices.with(|board, _| !board.virtio_owes()));
        driver
    }

    /// Offers a request to write a sector of the disk in slot 0.
    fn offer_a_write(run: &Run, driver: &mut Driver) {
        fuzz::poke(&run.mmu, BUFFERS, &[&1u32.to_le_bytes()[..], &[0; 12]].concat());
        let parts = [(BUFFERS, 16, 0), (BUFFERS + 0x1000, 512, 0), (BUFFERS + 0x2000, 1, WRITE)];
        driver.offer_chain(&run.mmu, 0, 1, &parts, false);
    }

    /// The same, and notifies.
    fn write_a_sector(run: &Run, driver: &mut Driver) {
        offer_a_write(run, driver);
        Slot(&run.devices, 0).write(0x50, 0);
    }

    /// Notifies as vCPU 0 does: what it is to serve itself.
    fn notify_as_vcpu(run: &Run) -> u32 {
        let notify = |board: &mut Board, now| {
            board.mmio_write(now, 0, Slot(&run.devices, 0).gpa(0x50), Width::B4, 0);
        };
        run.devices.write_at(0, run.devices.now(), notify).0
    }

    #[test]
    fn disks_come_first_and_the_balloon_behind_them() {
        for count in [0, 2, 8] {
            let run = run(memory_disks(count));
            let ids: Vec<u32> = (0..24).map(|slot| Slot(&run.devices, slot).read(8)).collect();
            let want = [vec![2; count], vec![5], vec![0; 23 - count]].concat();
            assert_eq!(ids, want);
            assert_eq!(run.threads.finish().0.len(), count);
        }
    }

    #[test]
    fn a_disk_serves_on_its_own_thread_and_a_wait_for_it_ends() {
        let run = run(memory_disks(1));
        let (slot, mut driver) = (Slot(&run.devices, 0), Driver::default());
        driver.set_up(&run.mmu, &slot, 0, F_EVENT_IDX);
        for round in 1..100u16 {
            write_a_sector(&run, &mut driver);
            wait_for(|| slot.read(0x60) == 1);
            slot.write(0x64, 1);
            assert_eq!(driver.used(&run.mmu, 0), (round, 1, 1));
            // As a halted vCPU does that nothing else could wake.
            while run.devices.with(|board, _| board.virtio_owes()) {
                run.devices.sleep(0);
            }
        }
        run.threads.balloon.set_target(5);
        assert_eq!(Slot(&run.devices, 1).read(0x100), 5);
        let (disks, balloon) = run.threads.finish();
        assert_eq!((disks[0].write.requests, disks[0].write.errors, balloon.target), (99, 0, 5));
    }

    #[test]
    fn a_vcpu_serves_a_disk_in_memory_itself_and_leaves_what_is_too_much_to_its_thread() {
        let run = run(memory_disks(1));
        let (slot, mut driver) = (Slot(&run.devices, 0), driver_at_rest(&run));
        for round in 1..100u16 {
            offer_a_write(&run, &mut driver);
            assert_eq!(notify_as_vcpu(&run), 1);
            assert_eq!(driver.used(&run.mmu, 0).0, round - 1, "nobody else has been called");
            run.devices.serve(0, &run.mmu, 1).expect("pages");
            assert_eq!(driver.used(&run.mmu, 0).0, round, "it is done when this returns");
            assert_eq!(slot.read(0x60), 1);
            slot.write(0x64, 1);
        }
        wait_for(|| run.devices.with(|board, _| !board.virtio_owes()));
        for _ in 0..ROUNDS_OF_A_VCPU + 3 {
            offer_a_write(&run, &mut driver);
        }
        assert_eq!(notify_as_vcpu(&run), 1);
        run.devices.serve(0, &run.mmu, 1).expect("pages");
        wait_for(|| driver.used(&run.mmu, 0).0 == 99 + ROUNDS_OF_A_VCPU as u16 + 3);
        assert_eq!(run.threads.finish().0[0].write.requests, 99 + ROUNDS_OF_A_VCPU as u64 + 3);
    }

    #[test]
    fn a_vcpu_that_serves_a_disk_leaves_for_what_comes_of_it() {
        let run = run(memory_disks(1));
        let (slot, mut driver) = (Slot(&run.devices, 0), driver_at_rest(&run));
        offer_a_write(&run, &mut driver);
        let (attention, mut vcpu) = (Attention::default(), run.mmu.vcpu(0));
        let mut bus = GuestBus::new(&run.mmu, &mut vcpu, &run.devices, None);
        bus.heed(attention.clone());
        let (notify, store) = (Gva(slot.gpa(0x50).0 as u32), Access { kind: AccessKind::Write, user: false });
        assert_eq!(bus.write(notify, Width::B4, 0, store), Ok(()));
        assert!(attention.is_wanted());
        drop(bus);
        assert_eq!(driver.used(&run.mmu, 0).0, 1, "it has served it");
        run.threads.finish();
    }

    #[test]
    fn a_vcpu_neither_serves_nor_awaits_a_disk_that_may_take_its_time() {
        let bell = Arc::new(Bell::default());
        let run = run(held(&bell));
        let mut driver = Driver::default();
        driver.set_up(&run.mmu, &Slot(&run.devices, 0), 0, 0);
        offer_a_write(&run, &mut driver);
        assert_eq!(notify_as_vcpu(&run), 0);
        wait_for(|| !run.devices.is_quiet());
        bell.ring();
        wait_for(|| driver.used(&run.mmu, 0).0 == 1);
        run.threads.finish();
    }

    /// A medium that does this at each write, and has nothing.
    struct AtWrite<F>(F);

    impl<F: Fn(u64) + Send + 'static> Medium for AtWrite<F> {
        fn read(&self, _offset: u64, _buffer: &mut [u8]) -> io::Result<()> {
            Ok(())
        }

        fn write(&self, offset: u64, _data: &[u8]) -> io::Result<()> {
            (self.0)(offset);
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }

        fn punch(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
            Ok(())
        }

        fn zero(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
            Ok(())
        }
    }

    /// A disk of a few sectors on it.
    fn disk(at_write: impl Fn(u64) + Send + 'static) -> Vec<Disk> {
        vec![Disk::new(Box::new(AtWrite(at_write)), 8, false, "disk0".into())]
    }

    /// One whose writes take their time, until somebody lets them go on.
    fn held(bell: &Arc<Bell>) -> Vec<Disk> {
        let bell = Arc::clone(bell);
        disk(move |_| {
            bell.wait();
        })
    }

    /// The machine is not made anew before the request in hand is done; the one behind it is never served, nor is its ring known.
    #[test]
    fn a_reset_waits_for_the_request_in_hand_and_forgets_the_others() {
        let bell = Arc::new(Bell::default());
        let run = run(held(&bell));
        let stops = Stops::new(Arc::clone(&run.devices), Arc::new(News::default()));
        let mut driver = Driver::default();
        driver.set_up(&run.mmu, &Slot(&run.devices, 0), 0, 0);
        write_a_sector(&run, &mut driver);
        wait_for(|| !run.devices.is_quiet());
        write_a_sector(&run, &mut driver);
        stops.want_reset(("host-qmp-system-reset", false));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(stops.duty(0), Duty::Stand, "a request is under way");
        bell.ring();
        wait_for(|| stops.duty(0) == Duty::Forget);
        stops.has_forgotten(0);
        run.mmu.forget_guest(0).expect("nobody holds a page");
        run.devices.with(|board, now| board.reset(now));
        stops.has_begun_anew();
        bell.ring();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(Slot(&run.devices, 0).read(0x70), 0, "no driver has been here");
        assert_eq!(run.mmu.usage().resident, 0, "memory was touched for the guest that is gone");
        assert_eq!(run.threads.finish().0[0].write.requests, 1);
    }

    #[test]
    fn a_balloon_is_empty_after_a_reset_and_what_is_asked_of_it_stays_asked() {
        let run = run(Vec::new());
        let changes = Arc::new(std::sync::Mutex::new(Vec::new()));
        let told = Arc::clone(&changes);
        run.threads.balloon.on_change(Box::new(move |pages| told.lock().expect("no panic").push(pages)));
        let (slot, mut driver) = (Slot(&run.devices, 0), Driver::default());
        driver.set_up(&run.mmu, &slot, 0, 0);
        run.threads.balloon.set_target(9);
        slot.write(0x104, 5);
        wait_for(|| run.threads.balloon.state().actual == 5);
        wait_for(|| run.devices.is_quiet());
        run.devices.with(|board, now| board.reset(now));
        run.threads.balloon.reset();
        assert_eq!((slot.read(0x100), slot.read(0x104)), (9, 0));
        assert_eq!((run.threads.balloon.state().target, run.threads.balloon.state().actual), (9, 0));
        assert_eq!(*changes.lock().expect("no panic"), [5, 0]);
        // A driver that only gives the device up keeps what it has given.
        driver.set_up(&run.mmu, &slot, 0, 0);
        slot.write(0x104, 3);
        slot.write(0x70, 0);
        assert_eq!(slot.read(0x104), 3);
        run.threads.finish();
    }

    /// The request in hand is done, and no other begins until the guest goes on.
    #[test]
    fn a_guest_stands_when_its_devices_do_and_they_go_on_with_it() {
        let bell = Arc::new(Bell::default());
        let run = run(held(&bell));
        let news = Arc::new(News::default());
        let stops = Stops::new(Arc::clone(&run.devices), Arc::clone(&news));
        let mut driver = Driver::default();
        driver.set_up(&run.mmu, &Slot(&run.devices, 0), 0, 0);
        write_a_sector(&run, &mut driver);
        wait_for(|| !run.devices.is_quiet());
        stops.want();
        assert!((stops.duty(0) != Duty::Run) && !stops.is_standing(), "a request is under way");
        assert!(!stops.wait(Duration::from_millis(20)));
        run.devices.sleep(0);
        bell.ring();
        // As a vCPU does, which the worker wakes.
        run.devices.sleep(0);
        assert!((stops.duty(0) != Duty::Run));
        wait_for(|| (stops.duty(0) != Duty::Run) && stops.is_standing());
        assert_eq!(driver.used(&run.mmu, 0).0, 1);
        write_a_sector(&run, &mut driver);
        bell.ring();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!((driver.used(&run.mmu, 0).0, run.devices.is_quiet()), (1, true), "the guest stands");
        stops.release();
        wait_for(|| driver.used(&run.mmu, 0).0 == 2);
        stops.want();
        wait_for(|| (stops.duty(0) != Duty::Run) && stops.is_standing());
        assert_eq!(run.threads.finish().0[0].write.requests, 2, "the end waits for no guest that stands");
    }

    #[test]
    fn a_disk_that_hangs_does_not_hold_up_the_end_of_the_run() {
        let bell = Arc::new(Bell::default());
        let run = run(held(&bell));
        let mut driver = Driver::default();
        driver.set_up(&run.mmu, &Slot(&run.devices, 0), 0, 0);
        write_a_sector(&run, &mut driver);
        wait_for(|| !run.devices.is_quiet());
        let begun = Instant::now();
        let (disks, _) = run.threads.finish_within(Duration::from_millis(50));
        assert_eq!((disks.len(), begun.elapsed() < PATIENCE / 2), (1, true));
        bell.stop();
        wait_for(|| run.devices.is_quiet());
    }

    #[test]
    fn a_panic_of_a_disks_thread_ends_the_run_with_what_it_said() {
        let run = run(disk(|offset| panic!("the first write is at {offset}")));
        let mut driver = Driver::default();
        driver.set_up(&run.mmu, &Slot(&run.devices, 0), 0, 0);
        write_a_sector(&run, &mut driver);
        wait_for(|| run.ending.is_set());
        let end = run.ending.take().expect("the run has ended").to_string();
        assert!(end.contains("disk thread has panicked: the first write is at 0"), "{end}");
        run.threads.finish();
    }
}
