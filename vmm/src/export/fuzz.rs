//! The exporter for fuzzers: importers that send any bytes, over a guest without a vCPU, with the sockets' far ends read by nobody but
//! the check, and no event loop and no threads.
//!
//! Holds: it panics exactly if the exporter breaks its word.
//!
//! What it can be refused with, and how: each way in which bytes are no message (cut, bent, raw); *unknown*, *beyond*, *rights* and *limit*
//! by what is asked; *held* by a page that the guest watches; *short* by a swap device that fails. Not here: *version*, the other
//! uses of *malformed* (a second hello, an answer that is not by the line) and of *limit* (connections, requests), which are the
//! socket's (tests/e2e/export.rs has each), and *host*.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use umbra_mmu::external::ImporterId;
use umbra_mmu::frames::Host;
use umbra_mmu::swap::{MemorySwap, SwapDevice, SwapSlot};
use umbra_mmu::{Config, Gfn, Machine, Mfn, Mmu, NoVcpus, Vcpu};

use super::ByHub;
use super::hub::Hub;
use super::protocol::{MESSAGE_MAX, Reply, Request};
use super::segments::Segments;
use super::session::Session;
use crate::cli::ExportPolicy;
use crate::machine::Pool;

/// Pages of the guest.
pub const PAGES: u32 = 64;
/// Frames of its machine.
const FRAMES: u64 = 256;

struct Peer {
    importer: ImporterId,
    session: Session,
    far: OwnedFd,
    line: OwnedFd,
}

/// Swap in memory, until it fails.
#[derive(Debug)]
struct Failing(MemorySwap, Arc<AtomicBool>);

impl Failing {
    fn check(&self) -> io::Result<()> {
        match self.1.load(Ordering::Relaxed) {
            true => Err(io::Error::other("it was told to")),
            false => Ok(()),
        }
    }
}

impl SwapDevice for Failing {
    fn slots(&self) -> u32 {
        self.0.slots()
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        self.check()?;
        self.0.write(first, pages)
    }

    fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()> {
        self.check()?;
        self.0.read(first, pages)
    }

    fn discard(&self, slots: Range<u32>) {
        self.0.discard(slots);
    }
}

/// Importers, and the guest whose memory they want.
pub struct Exchange {
    vcpu: Vcpu,
    watched: BTreeSet<Gfn>,
    swap_fails: Arc<AtomicBool>,
    /// With what requests were refused.
    refused: BTreeSet<u32>,
    mmu: Arc<Mmu>,
    segments: Arc<Segments>,
    hub: Arc<Hub>,
    peers: Vec<Peer>,
}

/// The host behind the pool.
#[derive(Debug)]
struct PoolHost(Arc<Pool>);

impl Host for PoolHost {
    fn give_back(&self, frames: &[Mfn]) -> io::Result<()> {
        frames.iter().try_for_each(|mfn| self.0.give_back(*mfn, 1).map_err(io::Error::other))
    }
}

impl Exchange {
    /// One with so many importers, who are welcome already.
    ///
    /// # Errors
    ///
    /// When the host has no memory or no descriptors.
    pub fn new(importers: usize) -> io::Result<Exchange> {
        let pool = Arc::new(Pool::with_homes(FRAMES, PAGES.into()).map_err(io::Error::other)?);
        let hub = Hub::new(Duration::from_nanos(1), ExportPolicy::Keep, false)?;
        let config = Config {
            low_pages: 4,
            shadow_pages_max: 64,
            roots_max: 4,
            homes: true,
            ..Config::of_pages(PAGES)
        };
        let swap_fails = Arc::new(AtomicBool::new(false));
        let swap = Failing(MemorySwap::new(PAGES), Arc::clone(&swap_fails));
        let mmu = Mmu::new(Machine::new(pool.region()), config, Box::new(NoVcpus))
            .with_swap(Box::new(swap))
            .with_external(Box::new(ByHub(Arc::clone(&hub))))
            .with_host(Box::new(PoolHost(Arc::clone(&pool))));
        let mmu = Arc::new(mmu);
        let segments = Arc::new(Segments::new(Arc::clone(&mmu), pool, None));
        let vcpu = mmu.vcpu(0);
        let (watched, refused) = (BTreeSet::new(), BTreeSet::new());
        let mut exchange =
            Exchange { vcpu, watched, swap_fails, refused, mmu, segments, hub, peers: Vec::new() };
        for _ in 0..importers {
            let peer = exchange.peer()?;
            exchange.peers.push(peer);
        }
        Ok(exchange)
    }

    fn peer(&self) -> io::Result<Peer> {
        let flags = SocketFlags::CLOEXEC;
        let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let (importer, line) = self.hub.welcome(Arc::new(near), None)?;
        let session = Session::new(importer, Arc::clone(&self.mmu), Arc::clone(&self.segments));
        Ok(Peer { importer, session, far, line })
    }

    /// An importer sends a message, by its line if it is an acknowledgement. What is said to it is checked for being messages; who
    /// breaks the protocol is replaced.
    ///
    /// # Errors
    ///
    /// When the host has no descriptors.
    pub fn send(&mut self, which: usize, bytes: &[u8]) -> io::Result<()> {
        let at = which % self.peers.len();
        let peer = &mut self.peers[at];
        let stays = match Request::parse(bytes) {
            Err(why) => {
                assert!(!why.to_string().is_empty());
                assert!(!self.answer(at, bytes), "an importer stays that has said {bytes:?}");
                false
            }
            Ok((_, Request::Ack { .. })) => self.answer(at, bytes),
            Ok((tag, request)) => {
                let (reply, _) = peer.session.serve(request);
                if let Reply::Refused { code, .. } = &reply {
                    self.refused.insert(*code as u32);
                }
                let message = reply.encode(tag);
                assert_eq!(Reply::parse(&message), Ok((tag, reply)));
                self.hub.send(peer.importer, &message)
            }
        };
        self.listen(at);
        if !stays {
            self.hub.part(self.peers[at].importer);
            self.peers[at] = self.peer()?;
        }
        Ok(())
    }

    /// An importer says something by its line. False if it is parted with for it.
    fn answer(&self, at: usize, bytes: &[u8]) -> bool {
        let peer = &self.peers[at];
        let said = rustix::net::send(&peer.line, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        let is_here = self.hub.socket(peer.importer).is_some();
        assert!(said.is_ok() || !is_here, "a line has no room for {} bytes", bytes.len());
        self.hub.hear_all();
        self.hub.socket(peer.importer).is_some()
    }

    /// An importer hears what there is.
    fn listen(&self, at: usize) {
        let mut buffer = [0; MESSAGE_MAX + 1];
        let Peer { far, line, .. } = &self.peers[at];
        for socket in [far, line] {
            while let Ok((read @ 1.., _)) = rustix::net::recv(socket, &mut buffer, RecvFlags::DONTWAIT) {
                let said = Reply::parse(&buffer[..read]);
                assert!(said.is_ok(), "an importer was told {said:?}");
                let wants_it_back = matches!(said, Ok((_, Reply::Invalidate { .. })));
                assert_eq!(wants_it_back, std::ptr::eq(socket, line), "by which socket: {said:?}");
            }
        }
    }

    /// A page is taken away.
    pub fn page_out(&self, page: u32) {
        let done = self.mmu.page_out(None, &[Gfn(page % PAGES)]);
        assert!(done.is_ok() || self.has_failed(), "swap in memory failed: {done:?}");
        (0..self.peers.len()).for_each(|at| self.listen(at));
    }

    /// The guest has a descriptor table in a page, or none any more.
    pub fn watch(&mut self, page: u32) {
        let gfn = Gfn(page % PAGES);
        if self.watched.remove(&gfn) {
            self.mmu.unwatch(gfn);
        } else if self.mmu.watch(&self.vcpu, gfn) == Ok(true) {
            self.watched.insert(gfn);
        }
        (0..self.peers.len()).for_each(|at| self.listen(at));
    }

    /// Swap fails from now on, which is the end of a run.
    pub fn fail_swap(&self) {
        self.swap_fails.store(true, Ordering::Relaxed);
    }

    fn has_failed(&self) -> bool {
        self.swap_fails.load(Ordering::Relaxed)
    }

    /// Everybody goes: nothing must be left of them, but a segment whose pages swap keeps from leaving.
    pub fn end(mut self) {
        let findings = self.mmu.audit();
        assert!(findings.is_empty(), "{findings:?}");
        self.hub.close();
        self.peers.clear();
        let segments = if self.has_failed() { 0 } else { self.segments.count() };
        let pages = self.mmu.imported_pages();
        assert_eq!((pages, segments, self.hub.importers()), (0, 0, 0), "something is left");
        let findings = self.mmu.audit();
        assert!(findings.is_empty(), "{findings:?}");
    }
}

#[cfg(test)]
mod tests {
    use umbra_mmu::PAGE_SIZE;

    use super::super::protocol::Code;
    use super::*;

    #[test]
    fn an_exchange_serves_cuts_and_leaves_nothing() {
        let mut exchange = Exchange::new(2).expect("a guest");
        let mut send =
            |which, request: Request| exchange.send(which, &request.encode(1)).expect("descriptors");
        send(0, Request::Make { first: 8, pages: 8, write: true });
        send(0, Request::Get { segment: 1, write: true });
        send(1, Request::Get { segment: 1, write: false });
        for which in 0..2 {
            send(which, Request::Attach { access: 1, first: 8, pages: 8 });
            send(which, Request::Fault { attachment: 2, first: 8, pages: 8, write: which == 0 });
        }
        assert_eq!(exchange.mmu.imported_pages(), 8);
        exchange.page_out(9);
        assert_eq!((exchange.mmu.imported_pages(), exchange.hub.counts().told), (7, 2));
        exchange.send(1, b"nonsense").expect("descriptors");
        exchange.end();
    }
    #[test]
    fn an_exchange_is_refused_in_every_way_but_the_sockets_own() {
        let mut exchange = Exchange::new(1).expect("a guest");
        let say = |exchange: &mut Exchange, request: Request| {
            exchange.send(0, &request.encode(1)).expect("descriptors");
        };
        exchange.watch(9);
        let fault = |first| Request::Fault { attachment: 2, first, pages: 1, write: false };
        for request in [
            Request::Hello { least: 1, most: 1 },
            Request::Make { first: 8, pages: 8, write: false },
            Request::Get { segment: 1, write: true },
            Request::Get { segment: 1, write: false },
            Request::Attach { access: 1, first: 8, pages: 8 },
            fault(9),
            fault(10),
            fault(16),
            Request::Detach { attachment: 77 },
        ] {
            say(&mut exchange, request);
        }
        // Zeros would not be written.
        crate::virtio::fuzz::poke(&exchange.mmu, 10 * PAGE_SIZE, b"words");
        exchange.page_out(10);
        exchange.fail_swap();
        say(&mut exchange, fault(10));
        for _ in 0..=super::super::session::ACCESSES_MAX {
            say(&mut exchange, Request::Get { segment: 1, write: false });
        }
        let all = [
            Code::Malformed,
            Code::Unknown,
            Code::Beyond,
            Code::Rights,
            Code::Limit,
            Code::Held,
            Code::Short,
        ];
        assert_eq!(exchange.refused, all.map(|code| code as u32).into());
        exchange.end();
    }
}
