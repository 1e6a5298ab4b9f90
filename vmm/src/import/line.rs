//! The line: what the guest wants back is given up, and that is said.
//!
//! Story: one thread listens ([`Line::listen`]) until there is nobody to hear. Only messages to give pages up come by here, and none
//! with a descriptor, so that hearing one is as little as it can be: a guest waits for each. When the line ends, every page is taken
//! away: nobody would tell us any more.
//!
//! The guest does not wait for ever: a process that was stopped, or did not get the host's CPU, for longer than its deadline may find
//! zeros where its pages were. So whoever has touched a page hears first what has come meanwhile ([`Line::catch_up`]), and asks then
//! whether the page had been its own. It had, if nothing has taken it away: it is told before the page goes, and the line is cut
//! before it is told no more.
//!
//! Holds: INV-LINE-1, what is acknowledged has been given up: no page that was named is touched by us before it is granted again.
//! INV-LINE-2, what has come by the line is in it, or is in force, or somebody has the areas locked.
//!
//! Locks: the areas, then an area's own; the stats, a leaf.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
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

#[derive(Debug, Default)]
struct Areas {
    list: Vec<Weak<Area>>,
    /// Nothing comes by the line any more.
    over: bool,
}

/// What there was to hear.
enum Heard {
    Nothing,
    /// Something is in force, and answered.
    Message,
    /// The line has come to its end.
    End,
}

/// Our end of a line, and what is given up by it.
#[derive(Debug)]
pub(super) struct Line {
    socket: OwnedFd,
    manners: Manners,
    areas: Mutex<Areas>,
    stats: Mutex<Stats>,
}

impl Line {
    pub fn new(socket: OwnedFd, manners: Manners) -> Line {
        Line { socket, manners, areas: Mutex::default(), stats: Mutex::default() }
    }

    /// Pages of this area, too, are given up from now on.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn add(&self, area: &Arc<Area>) -> io::Result<()> {
        let mut areas = self.areas();
        areas.list.retain(|area| area.strong_count() > 0);
        areas.list.push(Arc::downgrade(area));
        if areas.over { area.close() } else { Ok(()) }
    }

    /// Takes pages away, wherever they are.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn take_away(&self, frames: &[u32]) -> io::Result<()> {
        self.areas().take_away(frames, 0).map(drop)
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
        loop {
            match self.hear()? {
                Heard::Nothing => self.wait()?,
                Heard::Message => {}
                Heard::End => return Ok(()),
            }
        }
    }

    /// Returns when all that has come by the line until now is in force.
    ///
    /// # Errors
    ///
    /// As of [`Line::listen`].
    pub fn catch_up(&self) -> io::Result<()> {
        while let Heard::Message = self.hear()? {}
        Ok(())
    }

    /// Returns when there may be something to hear.
    fn wait(&self) -> io::Result<()> {
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn hear(&self) -> io::Result<Heard> {
        let mut areas = self.areas();
        if areas.over {
            return Ok(Heard::End);
        }
        let mut buffer = [0; MESSAGE_MAX + 1];
        let heard = match recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Heard::Nothing),
            Ok((0, _)) | Err(Errno::CONNRESET) => None,
            Ok((length, _)) => Some(asked(&buffer[..length])),
            Err(error) => Some(Err(error.into())),
        };
        let began = Instant::now();
        let heard = heard
            .map(|asked| asked.and_then(|(order, frames)| Ok((order, areas.take_away(&frames, order)?))));
        let Some(Ok((order, pages))) = heard else {
            areas.close()?;
            return heard.transpose().map(|_| Heard::End);
        };
        drop(areas);
        self.answer(order, pages, began).map(|()| Heard::Message)
    }

    /// Says that so many pages have been given up.
    fn answer(&self, order: u64, pages: u32, began: Instant) -> io::Result<()> {
        if !self.manners.ack_delay.is_zero() {
            std::thread::sleep(self.manners.ack_delay);
        }
        // Before it is said: whoever sees what comes of it finds it counted.
        self.count(pages, began.elapsed());
        match send(&self.socket, &Request::Ack { order }.encode(0), SendFlags::NOSIGNAL) {
            // Who has hung up meanwhile is heard to have.
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn count(&self, pages: u32, took: Duration) {
        let mut stats = self.locked_stats();
        stats.invalidations += 1;
        stats.pages += u64::from(pages);
        stats.answer_sum += took;
        stats.answer_max = stats.answer_max.max(took);
    }

    fn areas(&self) -> MutexGuard<'_, Areas> {
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locked_stats(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Areas {
    /// Those of `frames` that are anywhere were taken away at `order`: how many had been granted.
    fn take_away(&self, frames: &[u32], order: u64) -> io::Result<u32> {
        self.list.iter().filter_map(Weak::upgrade).map(|area| area.take_away(frames, order)).sum()
    }

    fn close(&mut self) -> io::Result<()> {
        self.over = true;
        self.list.iter().filter_map(Weak::upgrade).try_for_each(|area| area.close())
    }
}

/// Which pages are asked for, and when.
fn asked(message: &[u8]) -> io::Result<(u64, Vec<u32>)> {
    match Reply::parse(message).map_err(|why| io::Error::other(why.to_string()))? {
        (_, Reply::Invalidate { order, pages }) => Ok((order, pages)),
        (_, other) => Err(io::Error::other(format!("{other:?} has come by the line"))),
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

    fn area() -> Arc<Area> {
        let file = memory_file(c"test", 4 * PAGE_SIZE).expect("a file");
        Arc::new(Area::new(file, 100, 0, 4, false).expect("room"))
    }

    #[test]
    fn what_is_asked_for_is_given_up_said_and_counted() {
        let (line, guest) = line();
        let area = area();
        line.add(&area).expect("it is not over");
        area.grant(100, 2, Rights::Read, 5);
        assert!(matches!(line.hear(), Ok(Heard::Nothing)));
        let told = Reply::Invalidate { order: 6, pages: vec![7, 101, 102] }.encode(0);
        send(&guest, &told, SendFlags::NOSIGNAL).expect("room");
        line.catch_up().expect("nobody has hung up");
        let mut buffer = [0; MESSAGE_MAX];
        let (length, _) = recv(&guest, &mut buffer, RecvFlags::empty()).expect("an answer");
        assert_eq!(Request::parse(&buffer[..length]).expect("a message"), (0, Request::Ack { order: 6 }));
        assert_eq!(area.granted(), 1);
        let stats = line.stats();
        assert_eq!((stats.invalidations, stats.pages, stats.answer_max), (1, 1, stats.answer_sum));
    }

    /// Nobody would say any more that a page is wanted back.
    #[test]
    fn nothing_is_granted_once_a_line_is_over() {
        let (line, guest) = line();
        let [before, after] = [area(), area()];
        line.add(&before).expect("it is not over");
        before.grant(100, 2, Rights::Read, 5);
        assert_eq!(end_of(&line, guest, &[]), Ok(()));
        line.add(&after).expect("the host does not mind");
        for area in [before, after] {
            area.grant(100, 2, Rights::Read, 7);
            assert_eq!(area.granted(), 0);
        }
        assert!(matches!(line.hear(), Ok(Heard::End)));
    }

    #[test]
    fn whoever_says_anything_else_by_a_line_is_heard_no_more() {
        let granted = Reply::Granted { order: 1, pages: 1 }.encode(1);
        for (said, why) in [(&granted[..], "Granted"), (b"x", "this one 1"), (&[0; MESSAGE_MAX + 1], "4097")]
        {
            let (line, guest) = line();
            let area = area();
            line.add(&area).expect("it is not over");
            area.grant(100, 2, Rights::Read, 5);
            let end = end_of(&line, guest, &[said]);
            assert_eq!(area.granted(), 0);
            assert!(end.as_ref().is_err_and(|said| said.contains(why)), "{end:?}");
            assert_eq!(line.stats(), Stats::default());
        }
    }
}
