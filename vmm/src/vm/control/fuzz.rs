//! A control socket for fuzzers: several clients' conversations over one guest without a vCPU, without sockets and threads.
//!
//! Holds: it panics exactly if the conversation breaks its word.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::{Config, Machine, Mmu, NoVcpus, PAGE_SIZE};

use super::commands::COMMANDS;
use super::input::{Input, VALUE_MAX};
use super::news::Item;
use super::session::{Next, Session};
use super::{BalloonControl, Controls, News};
use crate::board::{Board, BoardConfig, MEMORY_BYTES_MIN, MemoryMap};
use crate::vm::devices::Devices;
use crate::vm::ending::Ending;
use crate::vm::requests::Requests;
use crate::vm::stops::Stops;

/// Pages of the guest.
const PAGES: u32 = 64;

/// Clients, and the guest that they talk about.
pub struct Conversations {
    sessions: Vec<Session>,
    controls: Controls,
}

/// A balloon whose driver does at once what it is asked.
struct Balloon {
    pages: AtomicU32,
    news: Arc<News>,
}

impl BalloonControl for Balloon {
    fn set_target(&self, bytes: u64) -> Result<(), String> {
        let pages = self.memory_bytes().saturating_sub(bytes) / PAGE_SIZE;
        self.pages.store(pages as u32, Ordering::Relaxed);
        self.news.balloon_changed(self.actual_bytes());
        Ok(())
    }

    fn actual_bytes(&self) -> u64 {
        self.memory_bytes() - u64::from(self.pages().1) * PAGE_SIZE
    }

    fn memory_bytes(&self) -> u64 {
        u64::from(PAGES) * PAGE_SIZE
    }

    fn pages(&self) -> (u32, u32) {
        let pages = self.pages.load(Ordering::Relaxed);
        (pages, pages)
    }

    fn stats(&self) -> Option<Vec<(&'static str, u64)>> {
        self.pages().1.is_multiple_of(2).then(|| vec![("stat-free-memory", self.actual_bytes())])
    }
}

/// Names of commands and of their arguments, for those who want to be understood.
pub fn words() -> impl Iterator<Item = &'static str> {
    COMMANDS.iter().flat_map(|command| {
        std::iter::once(command.name).chain(command.arguments.iter().map(|argument| argument.name))
    })
}

impl Conversations {
    /// So many clients, who have been greeted.
    ///
    /// # Errors
    ///
    /// When the host has no descriptor left.
    pub fn new(clients: usize) -> io::Result<Conversations> {
        let memory = MemoryMap::new(MEMORY_BYTES_MIN).map_err(io::Error::other)?;
        let board = BoardConfig { memory, vcpus: 1, serial: Box::new(io::sink()), epoch_seconds: 0 };
        let devices = Arc::new(Devices::new(Board::new(board).map_err(io::Error::other)?)?);
        let mmu = Mmu::new(Machine::anonymous(4 * PAGES), Config::of_pages(PAGES), Box::new(NoVcpus));
        let news = Arc::new(News::default());
        news.open()?;
        let heard = Arc::clone(&news);
        let controls = Controls {
            ending: Ending::new(Arc::clone(&devices)),
            requests: Arc::new(Requests::new(1)),
            devices: Arc::clone(&devices),
            mmu: Arc::new(mmu.with_swap(Box::new(MemorySwap::new(PAGES)))),
            stops: Arc::new(Stops::new(devices, Arc::clone(&news))),
            news,
            balloon: Some(Arc::new(Balloon { pages: AtomicU32::new(0), news: Arc::clone(&heard) })),
            name: None,
            threads: Arc::new([AtomicI32::new(1)]),
            swap: true,
            swap_in_memory: true,
            pool: None,
            // Nobody is there to answer.
            answer_wait: Duration::ZERO,
            exporter: None,
        };
        Ok(Conversations { sessions: (0..clients).map(|_| Session::new()).collect(), controls })
    }

    /// What a client sends; what all of them hear is checked.
    pub fn send(&mut self, client: usize, bytes: &[u8]) {
        let session = &mut self.sessions[client];
        session.feed(bytes);
        loop {
            match session.advance(&self.controls) {
                Next::Nothing => break,
                Next::Answered => {}
                Next::Apart(work) => session.finish(&work.run(&self.controls)),
            }
        }
        for item in self.controls.news.take() {
            if let Item::Event(event) | Item::Frequent(event) = item {
                self.sessions.iter_mut().for_each(|session| session.tell(&event));
            }
        }
        self.sessions.iter_mut().for_each(check);
    }
}

/// Takes all that a client is to have: whole lines, each an answer, an error, an event or the greeting.
fn check(session: &mut Session) {
    let mut heard = Vec::new();
    assert!(session.output().flush(&mut heard).is_ok() && session.output().is_empty());
    for line in heard.split_inclusive(|byte| *byte == b'\n') {
        let value: Value = serde_json::from_slice(line).expect("a line is JSON");
        let kinds = ["QMP", "return", "error", "event"].iter().filter(|kind| value.get(kind).is_some());
        assert_eq!(kinds.count(), 1, "{value}");
    }
}

/// The same bytes at once and in pieces are the same objects and errors.
pub fn pieces_are_the_whole(bytes: &[u8], piece: usize) {
    let objects = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let (mut input, mut found) = (Input::default(), Vec::new());
        for piece in pieces {
            input.feed(piece);
            found.extend(std::iter::from_fn(|| input.next()));
            assert!(input.kept() <= VALUE_MAX, "more is kept than a value may be long");
        }
        found
    };
    let whole = objects(&mut std::iter::once(bytes));
    assert_eq!(objects(&mut bytes.chunks(piece.max(1))), whole);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversations_that_make_sense_and_none_are_checked() {
        let mut conversations = Conversations::new(3).expect("descriptors");
        for client in 0..3 {
            conversations.send(client, b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"stop\"}x\xff");
            conversations
                .send(client, b"{\"execute\":\"x-discard\",\"arguments\":{\"gpa\":0,\"bytes\":8192}}");
            conversations.send(
                client,
                b"{\"execute\":\"balloon\",\"arguments\":{\"value\":65536}}{\"execute\":\"x-memory\"}",
            );
        }
        assert!(words().any(|word| word == "gpa"));
        pieces_are_the_whole(b"{\"a\":[1]}[]{]\xff{}", 1);
    }
}
