//! The line: what the guest wants back is given up, and that is said.
//!
//! Story: one thread listens ([`Line::listen`]) until there is nobody to hear. Only messages to give pages up come by here, and none
//! with a descriptor, so that hearing one is as little as it can be: a guest waits for each.
//!
//! Holds: INV-LINE-1, what is acknowledged has been given up: no page that was named is touched by us before it is granted again.
//!
//! Locks: the areas, then an area's own; the stats, a leaf.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::area::Area;
use crate::export::protocol::{MESSAGE_MAX, Reply, Request};

/// How an importer behaves when it is asked to give pages up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manners {
    /// It takes so long before it says that it has.
    pub ack_delay: Duration,
}

/// What has come to an importer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests to give pages up.
    pub invalidations: u64,
    /// Pages that they named and that were granted.
    pub pages: u64,
    /// The longest that it took from a message's arrival until the answer was about to be sent.
    pub answer_max: Duration,
    /// All answers together.
    pub answer_sum: Duration,
}

/// Our end of a line, and what is given up by it.
#[derive(Debug)]
pub(super) struct Line {
    socket: OwnedFd,
    manners: Manners,
    areas: Mutex<Vec<Weak<Area>>>,
    stats: Mutex<Stats>,
}

impl Line {
    pub fn new(socket: OwnedFd, manners: Manners) -> Line {
        Line { socket, manners, areas: Mutex::default(), stats: Mutex::default() }
    }

    /// Pages of this area, too, are given up from now on.
    pub fn add(&self, area: &Arc<Area>) {
        let mut areas = self.areas();
        areas.retain(|area| area.strong_count() > 0);
        areas.push(Arc::downgrade(area));
    }

    /// What has come so far.
    pub fn stats(&self) -> Stats {
        *self.locked_stats()
    }

    /// Ends it: whoever listens returns.
    pub fn hang_up(&self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Gives up what is asked for, until one of us hangs up.
    ///
    /// # Errors
    ///
    /// When something else comes, or the host refuses.
    pub fn listen(&self) -> io::Result<()> {
        let mut buffer = [0; MESSAGE_MAX + 1];
        loop {
            match recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(()),
                Ok((length, _)) => self.heed(&buffer[..length])?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn heed(&self, message: &[u8]) -> io::Result<()> {
        match Reply::parse(message).map_err(|why| io::Error::other(why.to_string()))? {
            (_, Reply::Invalidate { order, pages }) => self.give_up(order, &pages),
            (_, other) => Err(io::Error::other(format!("{other:?} has come by the line"))),
        }
    }

    /// Gives pages up, and says so.
    fn give_up(&self, order: u64, frames: &[u32]) -> io::Result<()> {
        let began = Instant::now();
        let mut pages = 0;
        for area in self.areas().iter().filter_map(Weak::upgrade) {
            pages += area.take_away(frames, order)?;
        }
        if !self.manners.ack_delay.is_zero() {
            std::thread::sleep(self.manners.ack_delay);
        }
        // Before it is said: whoever sees what comes of it finds it counted.
        self.count(pages, began.elapsed());
        send(&self.socket, &Request::Ack { order }.encode(0), SendFlags::NOSIGNAL)?;
        Ok(())
    }

    fn count(&self, pages: u32, took: Duration) {
        let mut stats = self.locked_stats();
        stats.invalidations += 1;
        stats.pages += u64::from(pages);
        stats.answer_sum += took;
        stats.answer_max = stats.answer_max.max(took);
    }

    fn areas(&self) -> MutexGuard<'_, Vec<Weak<Area>>> {
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locked_stats(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use umbra_mmu::PAGE_SIZE;

    use super::super::Rights;
    use super::*;
    use crate::machine::memory_file;

    fn line() -> (Arc<Line>, OwnedFd) {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("sockets");
        (Arc::new(Line::new(ours, Manners::default())), theirs)
    }

    /// What a line's thread returns, having been told this.
    fn end_of(line: &Line, guest: OwnedFd, told: &[&[u8]]) -> Result<(), String> {
        for message in told {
            send(&guest, message, SendFlags::NOSIGNAL).expect("room");
        }
        let _ = shutdown(&guest, Shutdown::Write);
        line.listen().map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_asked_for_is_given_up_said_and_counted() {
        let (line, guest) = line();
        let file = memory_file(c"test", 4 * PAGE_SIZE).expect("a file");
        let area = Arc::new(Area::new(file, 100, 0, 4, false).expect("room"));
        line.add(&area);
        area.grant(100, 2, Rights::Read, 5);
        let told = Reply::Invalidate { order: 6, pages: vec![7, 101, 102] }.encode(0);
        let far = guest.try_clone().expect("a descriptor");
        assert_eq!(end_of(&line, guest, &[&told]), Ok(()));
        let mut buffer = [0; MESSAGE_MAX];
        let (length, _) = recv(&far, &mut buffer, RecvFlags::empty()).expect("an answer");
        assert_eq!(Request::parse(&buffer[..length]).expect("a message"), (0, Request::Ack { order: 6 }));
        assert_eq!(area.granted(), 1);
        let stats = line.stats();
        assert_eq!((stats.invalidations, stats.pages, stats.answer_max), (1, 1, stats.answer_sum));
    }

    #[test]
    fn whoever_says_anything_else_by_a_line_is_heard_no_more() {
        let granted = Reply::Granted { order: 1, pages: 1 }.encode(1);
        for (said, why) in [(&granted[..], "Granted"), (b"x", "this one 1"), (&[0; MESSAGE_MAX + 1], "4097")]
        {
            let (line, guest) = line();
            let end = end_of(&line, guest, &[said]);
            assert!(end.as_ref().is_err_and(|said| said.contains(why)), "{end:?}");
            assert_eq!(line.stats(), Stats::default());
        }
    }
}
