//! The board behind its lock, with real time, an alarm for its next deadline, and the means to wake vCPUs.
//!
//! Story: vCPU loops and the event loop reach the board through [`Devices::with`] alone. After each call the
//! alarm is set to the board's next deadline if that changed, and vCPUs that have something to look at are woken; so are
//! the workers of virtio devices, by their bells.
//!
//! Guest time is real time less what the guest has stood still for ([`Devices::freeze`] to [`Devices::thaw`]): no timer of
//! the board finds itself late after that.
//!
//! Locks: the board's lock is a leaf: nothing else is taken under it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use umbra_mmu::sync::sim::{self, Bed};
use umbra_mmu::sync::{Thing, Wait};
use umbra_mmu::{Mmu, Shortage};
use vmm_sys_util::timerfd::TimerFd;

use super::kick::Kick;
use crate::board::{Board, Nanos, VIRTIO_SLOTS, VirtioSnapshot};
use crate::virtio::worker::Bell;

/// How a sleeping or running vCPU is made to look up.
#[derive(Default)]
pub struct Waker {
    kicker: OnceLock<Box<dyn Kick>>,
    woken: Mutex<bool>,
    changed: Bed,
}

impl Waker {
    /// How the vCPU is made to leave the guest.
    pub fn set_kicker(&self, kicker: Box<dyn Kick>) {
        let first = self.kicker.set(kicker);
        debug_assert!(first.is_ok(), "a vCPU has one kicker");
    }

    /// Makes the vCPU leave the guest, or end its sleep.
    pub fn wake(&self) {
        *lock(&self.woken) = true;
        self.changed.notify_all();
        if let Some(kicker) = self.kicker.get() {
            kicker.kick();
        }
    }

    /// Ends the vCPU's sleep, or its next one, without making it leave the guest.
    fn nudge(&self) {
        *lock(&self.woken) = true;
        self.changed.notify_all();
    }

    /// Sleeps until woken; for the vCPU's own thread. A wake since the last sleep ends it at once.
    fn sleep(&self) {
        let mut woken = lock(&self.woken);
        while !*woken {
            let thing = Thing::held("a waker", None, &self.woken);
            woken = self.changed.wait(&self.woken, thing, woken, Wait::idle("a wake"));
        }
        *woken = false;
    }
}

/// The board and what surrounds it.
pub struct Devices {
    state: Mutex<State>,
    started: Instant,
    /// Nanoseconds that the guest has stood still, those of now left out. Changed with the state locked, as is the next.
    stood: AtomicU64,
    /// The time at which guest time stands, or [`GOING`].
    frozen: AtomicU64,
    /// Slots whose workers have their devices in hand. Changed with the state locked, too.
    in_hand: AtomicU32,
    alarm: RawFd,
    /// What a simulation's clock sleeps on.
    clock: Bed,
    wakers: Box<[Waker]>,
    /// By slot: what the virtio devices' workers sleep on.
    bells: [OnceLock<Arc<Bell>>; VIRTIO_SLOTS],
    /// By slot: the devices that who notifies them serves himself.
    prompt: [OnceLock<Arc<dyn Prompt>>; VIRTIO_SLOTS],
}

/// A device whose requests the vCPU that notifies it serves itself.
pub trait Prompt: Send + Sync {
    /// Serves what there is, or has another do so. For the thread of `vcpu`, which is outside the guest; may sleep, for pages
    /// of the guest's.
    ///
    /// # Errors
    ///
    /// When one cannot be had: the run cannot go on.
    fn serve(&self, vcpu: u32, mmu: &Mmu, devices: &Devices) -> Result<(), Shortage>;
}

/// Guest time goes on.
const GOING: u64 = u64::MAX;

/// What a vCPU that has nothing to run is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nap {
    /// Look at the board again: there is something for it.
    None,
    /// Sleep: somebody may wake it.
    Until,
    /// No vCPU runs, and nothing can wake one.
    ForEver,
}

/// What a call of the board has come to.
struct Called<R> {
    result: R,
    /// The slots whose devices it has notified.
    notifies: u32,
    /// The vCPU that called has an interrupt or a signal by it, or the guest wants the run to end.
    for_caller: bool,
}

struct State {
    board: Board,
    /// The latest time that the board was told: it never goes back, though callers' clocks may differ a little.
    latest: Nanos,
    timer: TimerFd,
    /// What the timer is set to.
    deadline: Option<Nanos>,
    /// By vCPU: that it sleeps, and whether an interrupt would wake it.
    asleep: Box<[Option<bool>]>,
}

impl Devices {
    /// Guest time begins now.
    ///
    /// # Errors
    ///
    /// When the host has no timer descriptor left.
    pub fn new(board: Board) -> io::Result<Devices> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let vcpus = board.vcpus();
        Ok(Devices {
            alarm: timer.as_raw_fd(),
            clock: Bed::new(),
            state: Mutex::new(State {
                board,
                latest: Nanos(0),
                timer,
                deadline: None,
                asleep: vec![None; vcpus].into(),
            }),
            started: Instant::now(),
            stood: AtomicU64::new(0),
            frozen: AtomicU64::new(GOING),
            in_hand: AtomicU32::new(0),
            wakers: (0..vcpus).map(|_| Waker::default()).collect(),
            bells: Default::default(),
            prompt: Default::default(),
        })
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> u32 {
        self.wakers.len() as u32
    }

    /// Guest time.
    pub fn now(&self) -> Nanos {
        match self.frozen.load(Ordering::SeqCst) {
            GOING => Nanos(self.elapsed().saturating_sub(self.stood.load(Ordering::SeqCst))),
            frozen => Nanos(frozen),
        }
    }

    fn elapsed(&self) -> u64 {
        if let Some(now) = sim::now() {
            return now;
        }
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Guest time stands still from now on, no alarm rings, and no worker begins a round. For a vCPU's thread that is about to
    /// do so too.
    pub fn freeze(&self) {
        let mut state = lock(&self.state);
        let now = self.now().max(state.latest);
        self.frozen.store(now.0, Ordering::SeqCst);
        if let Err(error) = state.timer.clear() {
            log::warn!("silencing the board's timer: {error}");
        }
        state.deadline = None;
    }

    /// Guest time goes on from where it stands, and workers with it.
    pub fn thaw(&self) {
        {
            let mut state = lock(&self.state);
            let frozen = self.frozen.load(Ordering::SeqCst);
            if frozen != GOING {
                self.stood.store(self.elapsed().saturating_sub(frozen), Ordering::SeqCst);
                self.frozen.store(GOING, Ordering::SeqCst);
            }
            self.set_alarm(&mut state);
        }
        // What they were to look at meanwhile they have left alone.
        self.ring_bells(u32::MAX);
    }

    fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::SeqCst) != GOING
    }

    /// A worker begins a round over its device, unless guest time stands still.
    pub fn begin_round(&self, slot: usize) -> Option<VirtioSnapshot> {
        self.with(|board, _| {
            if self.is_frozen() {
                return None;
            }
            let begun = board.virtio_begin(slot)?;
            self.in_hand.fetch_or(1 << slot, Ordering::SeqCst);
            Some(begun)
        })
    }

    /// It has ended one, and `call` tells the board; on the thread of `vcpu`, if that is any, which is not woken. Whoever waits for the
    /// guest to stand still is told by its vCPUs.
    pub fn end_round(&self, slot: usize, vcpu: Option<u32>, call: impl FnOnce(&mut Board, Nanos)) {
        let caller = vcpu.map(|vcpu| vcpu as usize);
        self.call_and_ring(caller, self.now(), |board, now| {
            call(board, now);
            self.in_hand.fetch_and(!(1 << slot), Ordering::SeqCst);
        });
        if self.is_frozen() {
            self.wake_all();
        }
    }

    /// No worker has its device in hand. Where guest time stands still, none takes it.
    pub fn is_quiet(&self) -> bool {
        self.in_hand.load(Ordering::SeqCst) == 0
    }

    /// What the worker of a virtio device sleeps on.
    pub fn set_bell(&self, slot: usize, bell: Arc<Bell>) {
        let first = self.bells[slot].set(bell);
        debug_assert!(first.is_ok(), "a slot has one worker");
    }

    /// Has [`Devices::write_at`] name the slot to whoever notifies it.
    pub fn set_prompt(&self, slot: usize, device: Arc<dyn Prompt>) {
        let first = self.prompt[slot].set(device);
        debug_assert!(first.is_ok(), "a slot has one device");
    }

    /// Calls the board with the time, then sets the alarm and wakes whom it concerns.
    pub fn with<R>(&self, call: impl FnOnce(&mut Board, Nanos) -> R) -> R {
        self.call_and_ring(None, self.now(), call)
    }

    /// The same on the thread of `vcpu`, which is not woken: it looks at the board before it enters or sleeps.
    pub fn with_as<R>(&self, vcpu: u32, call: impl FnOnce(&mut Board, Nanos) -> R) -> R {
        self.call_and_ring(Some(vcpu as usize), self.now(), call)
    }

    /// The same in the midst of guest code, at `now`, which the vCPU's own clock says: it lies behind guest time, and not far. Also
    /// whether there is something for the vCPU to look at now, outside: an interrupt, a signal, or the end of the run.
    pub fn with_at<R>(&self, vcpu: u32, now: Nanos, call: impl FnOnce(&mut Board, Nanos) -> R) -> (R, bool) {
        let Called { result, notifies, for_caller } = self.call(Some(vcpu as usize), now, call);
        self.ring_bells(notifies);
        (result, for_caller)
    }

    /// The same for a write to a device. Slots that it notifies and the caller is to serve, by [`Devices::serve`].
    pub fn write_at(&self, vcpu: u32, now: Nanos, write: impl FnOnce(&mut Board, Nanos)) -> (u32, bool) {
        let Called { notifies, for_caller, .. } = self.call(Some(vcpu as usize), now, write);
        let is_prompt = |slot: &usize| notifies & 1 << slot != 0 && self.prompt[*slot].get().is_some();
        let prompt = (0..VIRTIO_SLOTS).filter(is_prompt).fold(0, |slots, slot| slots | 1 << slot);
        self.ring_bells(notifies & !prompt);
        (prompt, for_caller)
    }

    /// Serves the devices of `slots`, on the thread of `vcpu`, which is outside the guest. May sleep.
    ///
    /// # Errors
    ///
    /// When a page of the guest cannot be had: the run cannot go on.
    pub fn serve(&self, vcpu: u32, mmu: &Mmu, slots: u32) -> Result<(), Shortage> {
        let named = self.prompt.iter().enumerate().filter(|(slot, _)| slots & 1 << slot != 0);
        named.filter_map(|(_, device)| device.get()).try_for_each(|device| device.serve(vcpu, mmu, self))
    }

    fn call_and_ring<R>(
        &self,
        caller: Option<usize>,
        now: Nanos,
        call: impl FnOnce(&mut Board, Nanos) -> R,
    ) -> R {
        let Called { result, notifies, .. } = self.call(caller, now, call);
        self.ring_bells(notifies);
        result
    }

    fn call<R>(
        &self,
        caller: Option<usize>,
        now: Nanos,
        call: impl FnOnce(&mut Board, Nanos) -> R,
    ) -> Called<R> {
        let mut state = lock(&self.state);
        let now = now.max(state.latest);
        state.latest = now;
        let result = call(&mut state.board, now);
        let (wakes, notifies) = (state.board.take_wakes(), state.board.take_notifies());
        let for_caller = caller.is_some_and(|vcpu| wakes & 1 << vcpu != 0 || state.board.wants_exit());
        self.set_alarm(&mut state);
        drop(state);
        for (vcpu, waker) in self.wakers.iter().enumerate() {
            if wakes & 1 << vcpu != 0 && caller != Some(vcpu) {
                waker.wake();
            }
        }
        Called { result, notifies, for_caller }
    }

    /// Has a vCPU look once more whether anything could still wake one, where all sleep. Each that comes to sleep later looks
    /// itself.
    pub fn nudge_sleepers(&self) {
        let all_sleep = lock(&self.state).asleep.iter().all(Option::is_some);
        if all_sleep && let Some(waker) = self.wakers.first() {
            waker.nudge();
        }
    }

    fn ring_bells(&self, slots: u32) {
        if slots == 0 {
            return;
        }
        let named = self.bells.iter().enumerate().filter(|(slot, _)| slots & 1 << slot != 0);
        named.filter_map(|(_, bell)| bell.get()).for_each(|bell| bell.ring());
    }

    /// Makes every vCPU leave the guest, or end its sleep.
    pub fn wake_all(&self) {
        self.wakers.iter().for_each(Waker::wake);
    }

    /// Sleeps until somebody wakes `vcpu`, on whose thread this is. A wake since the last sleep ends it at once.
    pub fn sleep(&self, vcpu: u32) {
        self.waker(vcpu).sleep();
        lock(&self.state).asleep[vcpu as usize] = None;
    }

    /// What `vcpu` is to do, which has nothing to run; `open` where an interrupt would wake it, and not only an NMI or an INIT.
    /// If it is [`Nap::Until`], [`Devices::sleep`] comes next.
    pub fn nap(&self, vcpu: u32, open: bool) -> Nap {
        let mut state = lock(&self.state);
        state.asleep[vcpu as usize] = Some(open);
        let State { board, asleep, .. } = &*state;
        // Who sleeps and has not been woken yet has its reason on the board.
        let woken = |id: usize, open: bool| board.has_signals(id) || open && board.interrupt_pending(id);
        let idle = board.next_deadline().is_none() && !board.virtio_owes();
        let hopeless = |(id, asleep): (usize, &Option<bool>)| {
            asleep.is_some_and(|open| !woken(id, open) && (!open || idle))
        };
        if woken(vcpu as usize, open) {
            state.asleep[vcpu as usize] = None;
            return Nap::None;
        }
        if asleep.iter().enumerate().all(hopeless) { Nap::ForEver } else { Nap::Until }
    }

    /// The waker of one vCPU.
    pub fn waker(&self, vcpu: u32) -> &Waker {
        &self.wakers[vcpu as usize]
    }

    /// A descriptor that becomes readable at the board's next deadline. It lives as long as this does.
    pub fn alarm_fd(&self) -> RawFd {
        self.alarm
    }

    /// The alarm has gone off: lets the board catch up and sets the alarm anew, which also makes it silent.
    pub fn alarm_rang(&self) {
        {
            let mut state = lock(&self.state);
            if let Err(error) = state.timer.clear() {
                log::warn!("silencing the board's timer: {error}");
            }
            state.deadline = None;
        }
        self.with(|board, now| board.advance(now));
    }

    /// Sleeps, in a simulation, until the board's next deadline, `until` or a call of [`Devices::wake_clock`], whichever comes
    /// first, or until the deadline is another; lets the board catch up if it has come.
    pub fn sleep_as_clock(&self, until: Option<Nanos>) {
        let deadline = lock(&self.state).deadline;
        let first = [deadline, until].into_iter().flatten().min();
        if first.is_none_or(|first| first > self.now()) {
            self.clock.wait_until(first.map(|first| first.0), Wait::idle("the next timer"));
        }
        if deadline.is_some_and(|deadline| deadline <= self.now()) {
            self.alarm_rang();
        }
    }

    /// Ends the clock's sleep.
    pub fn wake_clock(&self) {
        self.clock.notify_all();
    }

    fn set_alarm(&self, state: &mut State) {
        let next = state.board.next_deadline();
        if self.is_frozen() || state.deadline == next {
            return;
        }
        if sim::is_on() {
            state.deadline = next;
            self.clock.notify_all();
            return;
        }
        let set = match next {
            // A delay of zero would disarm the timer: what is due rings at once.
            Some(at) => {
                let delay = Duration::from_nanos(at.since(self.now()).max(1));
                state.timer.reset(delay, None)
            }
            None => state.timer.clear(),
        };
        match set {
            Ok(()) => state.deadline = next,
            Err(error) => log::warn!("setting the board's timer: {error}; the guest's timers may be late"),
        }
    }
}

/// Takes a lock; a thread that panicked with it leaves the guest to be ended, not this one to panic too.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    use super::*;
    use crate::board::{BoardConfig, MemoryMap};
    use crate::interp::Width;
    use crate::vm::ending::{End, Ending};
    use crate::vm::events::EventLoop;
    use umbra_mmu::Gpa;

    const LONG: Duration = Duration::from_secs(10);
    const VECTOR: u64 = 0x40;

    fn devices() -> Arc<Devices> {
        devices_of(1)
    }

    fn devices_of(vcpus: usize) -> Arc<Devices> {
        let memory = MemoryMap::new(2 << 20).expect("a map");
        let config = BoardConfig { memory, vcpus, serial: Box::new(io::sink()), epoch_seconds: 0 };
        Arc::new(Devices::new(Board::new(config).expect("a board")).expect("a timer"))
    }

    fn apic(devices: &Devices, register: u64, value: u64) {
        let gpa = Gpa(0xfee0_0000 + register);
        devices.with_as(0, |board, now| board.mmio_write(now, 0, gpa, Width::B4, value));
    }

    /// The local APIC's timer, by 1: `mode` 0 is one shot, 1 << 17 periodic.
    fn start_timer(devices: &Devices, mode: u64, count: u64) {
        apic(devices, 0xf0, 0x1ff);
        apic(devices, 0x3e0, 0xb);
        apic(devices, 0x320, VECTOR | mode);
        apic(devices, 0x380, count);
    }

    /// A thread that sleeps as a halted vCPU does and says when it is awake.
    fn sleeper(devices: &Arc<Devices>) -> Receiver<()> {
        let (tell, told) = channel();
        let devices = Arc::clone(devices);
        thread::spawn(move || {
            devices.sleep(0);
            let _ = tell.send(());
        });
        told
    }

    /// What has happened before a vCPU, the first of two, comes to sleep.
    #[derive(Clone, Copy)]
    enum Before {
        /// The other has come to sleep, and an interrupt would wake it, or not.
        OtherSleeps(bool),
        OtherHasInterrupt,
        OtherHasNmi,
        OtherWasWoken,
        HasInterrupt,
        HasNmi,
        TimerRuns,
    }

    impl Before {
        fn happen(self, devices: &Devices) {
            let interrupt = |target: u64, command: u64| {
                // By the other's hand: the first one's own would need no waking.
                devices.with_as(1, |board, now| {
                    let apic = Gpa(0xfee0_0000);
                    (0..2).for_each(|id| board.mmio_write(now, id, Gpa(apic.0 + 0xf0), Width::B4, 0x1ff));
                    board.mmio_write(now, 1, Gpa(apic.0 + 0x310), Width::B4, target << 24);
                    board.mmio_write(now, 1, Gpa(apic.0 + 0x300), Width::B4, command);
                });
            };
            match self {
                Before::OtherSleeps(open) => drop(devices.nap(1, open)),
                Before::OtherHasInterrupt => interrupt(1, 0x4000 | VECTOR),
                Before::OtherHasNmi => interrupt(1, 0x4400),
                Before::OtherWasWoken => {
                    devices.waker(1).wake();
                    devices.sleep(1);
                }
                Before::HasInterrupt => interrupt(0, 0x4000 | VECTOR),
                Before::HasNmi => interrupt(0, 0x4400),
                Before::TimerRuns => start_timer(devices, 1 << 17, 1 << 30),
            }
        }
    }

    #[test]
    fn a_nap_is_for_ever_only_where_nobody_is_left_to_end_it() {
        use Before::*;
        let (open, shut) = (true, false);
        let table: &[(&[Before], bool, Nap)] = &[
            // The other runs, and may send something.
            (&[], open, Nap::Until),
            (&[], shut, Nap::Until),
            (&[OtherSleeps(open), OtherWasWoken], shut, Nap::Until),
            // Nobody runs, and nothing is to come.
            (&[OtherSleeps(open)], open, Nap::ForEver),
            (&[OtherSleeps(shut)], shut, Nap::ForEver),
            (&[OtherSleeps(shut)], open, Nap::ForEver),
            // Something is to come: it must find one who heeds it.
            (&[TimerRuns, OtherSleeps(shut)], open, Nap::Until),
            (&[TimerRuns, OtherSleeps(open)], shut, Nap::Until),
            (&[TimerRuns, OtherSleeps(shut)], shut, Nap::ForEver),
            // The other is about to wake.
            (&[OtherSleeps(open), OtherHasInterrupt], shut, Nap::Until),
            (&[OtherSleeps(shut), OtherHasInterrupt], shut, Nap::ForEver),
            (&[OtherSleeps(shut), OtherHasNmi], shut, Nap::Until),
            // This one has its own reason not to sleep.
            (&[OtherSleeps(shut), HasInterrupt], open, Nap::None),
            (&[OtherSleeps(shut), HasInterrupt], shut, Nap::ForEver),
            (&[OtherSleeps(shut), HasNmi], shut, Nap::None),
            (&[HasNmi], open, Nap::None),
        ];
        for (row, (before, open, nap)) in table.iter().enumerate() {
            let devices = devices_of(2);
            before.iter().for_each(|event| event.happen(&devices));
            assert_eq!(devices.nap(0, *open), *nap, "row {row}");
        }
    }

    #[test]
    fn a_wake_before_the_sleep_ends_it_at_once_and_only_once() {
        let devices = devices();
        devices.waker(0).wake();
        assert_eq!(sleeper(&devices).recv_timeout(LONG), Ok(()));
        let second = sleeper(&devices);
        assert!(second.recv_timeout(Duration::from_millis(20)).is_err());
        devices.waker(0).wake();
        assert_eq!(second.recv_timeout(LONG), Ok(()));
    }

    #[test]
    fn an_interrupt_raised_by_another_thread_wakes_and_ones_own_does_not() {
        const TO_SELF: u64 = 0x4_4000;
        let devices = devices();
        apic(&devices, 0xf0, 0x1ff);
        apic(&devices, 0x300, TO_SELF | VECTOR);
        assert!(!*lock(&devices.waker(0).woken));
        assert!(devices.with_as(0, |board, now| board.acknowledge(now, 0)).is_some());
        devices.with(|board, _| board.raise_nmi(0));
        assert!(*lock(&devices.waker(0).woken));
    }

    #[test]
    fn a_timer_that_runs_out_wakes_its_sleeping_vcpu_each_time() {
        let devices = devices();
        let ending = Ending::new(Arc::clone(&devices));
        let events = EventLoop::start(Arc::clone(&devices), ending, None, Vec::new()).expect("a loop");
        start_timer(&devices, 1 << 17, 1_000_000);
        for round in 0..3 {
            // It may have run out while the one before was being handled: who comes to sleep looks first.
            if !devices.with_as(0, |board, _| board.interrupt_pending(0)) {
                assert_eq!(sleeper(&devices).recv_timeout(LONG), Ok(()), "round {round}");
            }
            let vector = devices.with_as(0, |board, now| board.acknowledge(now, 0));
            assert_eq!(vector.map(u64::from), Some(VECTOR), "round {round}");
            apic(&devices, 0xb0, 0);
        }
        drop(events);
    }

    #[test]
    fn a_deadline_in_the_past_rings_and_is_disarmed_when_there_is_none() {
        let devices = devices();
        start_timer(&devices, 0, 1);
        thread::sleep(Duration::from_millis(2));
        devices.alarm_rang();
        assert!(devices.with_as(0, |board, _| board.interrupt_pending(0)));
        assert_eq!(lock(&devices.state).deadline, None);
        assert!(*lock(&devices.waker(0).woken));
    }

    #[test]
    fn time_that_the_guest_stands_still_is_no_guest_time_and_rings_no_alarm() {
        const STOP: Duration = Duration::from_millis(300);
        let devices = devices();
        let ending = Ending::new(Arc::clone(&devices));
        let events = EventLoop::start(Arc::clone(&devices), ending, None, Vec::new()).expect("a loop");
        devices.freeze();
        start_timer(&devices, 0, 1_000_000);
        let frozen = devices.now();
        thread::sleep(STOP);
        assert_eq!(devices.now(), frozen);
        assert!(!devices.with_as(0, |board, _| board.interrupt_pending(0)), "an alarm has rung");
        let asleep = sleeper(&devices);
        devices.thaw();
        devices.thaw();
        assert!(devices.now().since(frozen) < STOP.as_nanos() as u64, "the stop was made up for");
        assert_eq!(asleep.recv_timeout(LONG), Ok(()), "the alarm is lost");
        drop(events);
    }

    #[test]
    fn a_time_limit_ends_the_run_and_wakes_who_sleeps() {
        let devices = devices();
        let ending = Ending::new(Arc::clone(&devices));
        let asleep = sleeper(&devices);
        let limit = Duration::from_millis(5);
        let events = EventLoop::start(devices, ending.clone(), Some(limit), Vec::new()).expect("a loop");
        assert_eq!(asleep.recv_timeout(LONG), Ok(()));
        ending.set(End::Quit);
        assert!(matches!(ending.take(), Some(End::Timeout(after)) if after == limit), "the first end stays");
        drop(events);
    }
}
