//! What other threads have for the clients: events, and answers of commands that ran apart.
//!
//! Story: whoever has something leaves it here and rings a bell, which wakes the event loop. While nobody listens, nothing
//! is kept.
//!
//! Limits: [`RATE`]: at most one BALLOON_CHANGE in that time, the latest; a balloon moves page by page.
//!
//! Locks: the queue's is a leaf.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use super::protocol;

/// From one BALLOON_CHANGE to the next, at least.
pub const RATE: Duration = Duration::from_secs(1);

/// One piece of news.
#[derive(Debug)]
pub enum Item {
    /// For every client.
    Event(Value),
    /// The same, where the latest is enough.
    Frequent(Value),
    /// For the client of that number, the answer that it waits for.
    Reply(u64, Value),
}

impl Item {
    /// Which event it is.
    pub fn event_name(&self) -> Option<&str> {
        match self {
            Item::Event(event) | Item::Frequent(event) => event["event"].as_str(),
            Item::Reply(..) => None,
        }
    }
}

/// The queue, and its bell.
#[derive(Debug, Default)]
pub struct News {
    waiting: Mutex<Vec<Item>>,
    bell: OnceLock<EventFd>,
}

impl News {
    /// Says that somebody listens from now on.
    ///
    /// # Errors
    ///
    /// When the host has no descriptor left.
    pub fn open(&self) -> io::Result<()> {
        let bell = EventFd::new(libc::EFD_NONBLOCK)?;
        // A second time changes nothing.
        let _ = self.bell.set(bell);
        Ok(())
    }

    /// What becomes readable when there is news.
    pub fn bell(&self) -> Option<RawFd> {
        self.bell.get().map(AsRawFd::as_raw_fd)
    }

    /// Something has happened, just now.
    pub fn event(&self, name: &str, data: Option<Value>) {
        self.push(Item::Event(protocol::event(name, data)));
    }

    /// The guest has given up or taken back memory: `actual` bytes are its own now. For the balloon device, on any thread, as
    /// often as it likes.
    pub fn balloon_changed(&self, actual: u64) {
        self.push(Item::Frequent(protocol::event("BALLOON_CHANGE", Some(json!({ "actual": actual })))));
    }

    /// The machine has been reset.
    pub fn reset(&self, (reason, guest): (&'static str, bool)) {
        self.event("RESET", Some(json!({"guest": guest, "reason": reason})));
    }

    /// The run has ended.
    pub fn shutdown(&self, (reason, guest): (&'static str, bool)) {
        self.event("SHUTDOWN", Some(json!({"guest": guest, "reason": reason})));
    }

    /// What the client of that number waits for.
    pub fn reply(&self, client: u64, reply: Value) {
        self.push(Item::Reply(client, reply));
    }

    /// Takes all there is, and silences the bell.
    pub fn take(&self) -> Vec<Item> {
        if let Some(bell) = self.bell.get() {
            // Silent already is as well.
            let _ = bell.read();
        }
        std::mem::take(&mut *self.lock())
    }

    fn push(&self, item: Item) {
        let Some(bell) = self.bell.get() else { return };
        let mut waiting = self.lock();
        // Of what may come often, one is kept.
        if matches!(item, Item::Frequent(_)) {
            waiting.retain(|other| !matches!(other, Item::Frequent(_)));
        }
        waiting.push(item);
        drop(waiting);
        if let Err(error) = bell.write(1) {
            log::warn!("clients of the control socket hear late: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Item>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds back what comes too often.
#[derive(Debug, Default)]
pub struct Throttle {
    last: Option<Instant>,
    held: Option<Value>,
}

impl Throttle {
    /// Takes an event. Either it may go at once, or it is held for so long, and what was held before is forgotten.
    pub fn offer(&mut self, event: Value, now: Instant) -> Result<Value, Duration> {
        match self.last.map(|last| (last + RATE).saturating_duration_since(now)) {
            Some(wait) if !wait.is_zero() => {
                self.held = Some(event);
                Err(wait)
            }
            _ => {
                (self.last, self.held) = (Some(now), None);
                Ok(event)
            }
        }
    }

    /// What was held, whose time has come.
    pub fn take(&mut self, now: Instant) -> Option<Value> {
        let held = self.held.take()?;
        self.last = Some(now);
        Some(held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_kept_for_nobody() {
        let news = News::default();
        news.event("STOP", None);
        assert!(news.bell().is_none() && news.take().is_empty());
        news.open().expect("a descriptor");
        news.event("STOP", None);
        (0..1000).for_each(|bytes| news.balloon_changed(bytes));
        news.reply(3, json!({}));
        let items = news.take();
        assert_eq!(
            items.iter().map(Item::event_name).collect::<Vec<_>>(),
            [Some("STOP"), Some("BALLOON_CHANGE"), None]
        );
        assert!(news.take().is_empty());
    }

    #[test]
    fn the_first_goes_at_once_and_the_latest_of_the_rest_a_second_later() {
        let (mut throttle, begun) = (Throttle::default(), Instant::now());
        let after = |millis| begun + Duration::from_millis(millis);
        assert_eq!(throttle.offer(json!(1), begun), Ok(json!(1)));
        assert_eq!(throttle.offer(json!(2), after(100)), Err(Duration::from_millis(900)));
        assert_eq!(throttle.offer(json!(3), after(400)), Err(Duration::from_millis(600)));
        assert_eq!(throttle.take(after(1000)), Some(json!(3)));
        assert_eq!(throttle.take(after(1000)), None);
        assert_eq!(throttle.offer(json!(4), after(1500)), Err(Duration::from_millis(500)));
        assert_eq!(throttle.offer(json!(5), after(2000)), Ok(json!(5)));
        assert_eq!(throttle.take(after(2000)), None, "what was held is older than what went");
    }
}
