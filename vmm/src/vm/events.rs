//! The one event loop: the board's alarm, the time limit, and whatever else has a descriptor.
//!
//! Story: a thread of its own turns descriptors into calls. Holds: it never touches a vCPU; it tells the board or
//! the [`Ending`], which wake whom it concerns.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::devices::Devices;
use super::ending::{End, Ending};
use crate::signals;

/// Something with descriptors that the loop serves.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// The running loop; dropping it ends it.
pub struct EventLoop {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts the loop over the board's alarm, a time limit and `others`.
    ///
    /// # Errors
    ///
    /// When the host has no descriptor or thread left.
    pub fn start(
        devices: Arc<Devices>,
        ending: Ending,
        timeout: Option<Duration>,
        others: Vec<Subscriber>,
    ) -> io::Result<EventLoop> {
        let stop = EventFd::new(libc::EFD_NONBLOCK)?;
        let mut manager = EventManager::<Subscriber>::new().map_err(io::Error::other)?;
        manager.add_subscriber(Box::new(Alarm { devices }));
        if let Some(limit) = timeout {
            manager.add_subscriber(Box::new(TimeLimit::new(limit, ending.clone())?));
        }
        if let Some(event) = signals::event() {
            manager.add_subscriber(Box::new(Signals { event, ending: ending.clone() }));
        }
        others.into_iter().for_each(|other| {
            manager.add_subscriber(other);
        });
        let end = stop.try_clone()?;
        let stopped = Arc::new(std::sync::atomic::AtomicBool::new(false));
        manager.add_subscriber(Box::new(Stop { end, stopped: Arc::clone(&stopped) }));
        let serve = move || {
            while !stopped.load(std::sync::atomic::Ordering::Acquire) {
                if let Err(error) = manager.run() {
                    log::error!("the event loop ends, and with it the guest's timers: {error}");
                    return;
                }
            }
        };
        let watched = move || ending.watch("event", serve);
        let thread = std::thread::Builder::new().name("events".into()).spawn(watched)?;
        Ok(EventLoop { stop, thread: Some(thread) })
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let told = self.stop.write(1);
        if let (Ok(()), Some(thread)) = (told, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

struct Alarm {
    devices: Arc<Devices>,
}

impl MutEventSubscriber for Alarm {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.devices.alarm_rang();
    }

    fn init(&mut self, ops: &mut EventOps) {
        add(ops, Events::new_raw(self.devices.alarm_fd(), EventSet::IN));
    }
}

struct TimeLimit {
    timer: TimerFd,
    limit: Duration,
    ending: Ending,
}

impl TimeLimit {
    fn new(limit: Duration, ending: Ending) -> io::Result<TimeLimit> {
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        timer.reset(limit.max(Duration::from_nanos(1)), None).map_err(io::Error::from)?;
        Ok(TimeLimit { timer, limit, ending })
    }
}

impl MutEventSubscriber for TimeLimit {
    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        self.ending.set(End::Timeout(self.limit));
        let _ = ops.remove(Events::empty_raw(self.timer.as_raw_fd()));
    }

    fn init(&mut self, ops: &mut EventOps) {
        add(ops, Events::new_raw(self.timer.as_raw_fd(), EventSet::IN));
    }
}

/// Ctrl-C and its like.
struct Signals {
    event: &'static EventFd,
    ending: Ending,
}

impl MutEventSubscriber for Signals {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.event.read();
        self.ending.set(End::Signal);
    }

    fn init(&mut self, ops: &mut EventOps) {
        add(ops, Events::new_raw(self.event.as_raw_fd(), EventSet::IN));
    }
}

struct Stop {
    end: EventFd,
    stopped: Arc<std::sync::atomic::AtomicBool>,
}

impl MutEventSubscriber for Stop {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.stopped.store(true, std::sync::atomic::Ordering::Release);
    }

    fn init(&mut self, ops: &mut EventOps) {
        add(ops, Events::new_raw(self.end.as_raw_fd(), EventSet::IN));
    }
}

/// Adds a descriptor; a failure is the host's and costs only what the descriptor is for.
pub fn add(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.add(events) {
        log::error!("watching descriptor {}: {error}", events.fd());
    }
}
