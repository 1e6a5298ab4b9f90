//! A virtio ring in memory that comes and goes, run by the real `virtio-queue` through sessions: a device that answers each
//! request with what it was sent, changed.
//!
//! The driver's side is bytes laid by hand, as a guest would lay them.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::RngExt;
use proptest::test_runner::TestRng;
use umbra_mmu::dma::{NoSession, PAGES_MAX, Refused, Session};
use umbra_mmu::{Gfn, Gpa, Mmu};
use virtio_queue::{Queue, QueueT, Reader, Writer};
use vm_memory::{GuestAddress, GuestMemoryResult, Permissions};

use crate::dma::{PAGES, mmu, page_out, peek, poke};
use crate::model::run::{audit, rng, seconds};

const SIZE: u16 = 16;
/// The descriptor table lies over a page edge, and so does the available ring's array.
const TABLE: u64 = 0x6_4f80;
const AVAILABLE: u64 = 0x6_6ff0;
const USED: u64 = 0x6_8000;
/// Where the driver has its indirect tables and its buffers.
const INDIRECT: u64 = 0x6_a010;
const BUFFERS: u32 = 0x80;
const BUFFER_PAGES: u32 = PAGES - BUFFERS;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_TABLE: u16 = 4;

/// The device.
struct Echo {
    queue: Queue,
    plans: u32,
}

/// A chain, ready to be read and written.
struct Request<'s> {
    head: u16,
    reader: Reader<'s>,
    writer: Writer<'s>,
}

impl Echo {
    fn new() -> Echo {
        let mut queue = Queue::new(SIZE).expect("a power of two");
        queue.try_set_desc_table_address(GuestAddress(TABLE)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(USED)).expect("aligned");
        queue.set_ready(true);
        Echo { queue, plans: 0 }
    }

    /// The rings: what is touched first, so that the queue does not find them gone and say so in the log.
    fn touch_rings(&self, memory: &Session<'_>) -> GuestMemoryResult<()> {
        memory.touch(GuestAddress(self.queue.avail_ring()), 6 + 2 * usize::from(SIZE), Permissions::Read)?;
        memory.touch(GuestAddress(self.queue.used_ring()), 6 + 8 * usize::from(SIZE), Permissions::Write)
    }

    /// The next chain, if there is one that is good.
    fn pop<'s>(&mut self, memory: &'s Session<'_>) -> Option<Request<'s>> {
        let chain = self.queue.pop_descriptor_chain(memory)?;
        let (reader, writer) = (chain.clone().reader(memory).ok()?, chain.clone().writer(memory).ok()?);
        Some(Request { head: chain.head_index(), reader, writer })
    }

    /// Serves one request; false where there is none.
    fn serve(&mut self, mmu: &Mmu) -> Result<bool, NoSession> {
        self.serve_after(mmu, || {})
    }

    /// With something that happens between plan and run.
    fn serve_after(&mut self, mmu: &Mmu, between: impl FnOnce()) -> Result<bool, NoSession> {
        let next = self.queue.next_avail();
        let (mut session, planned) = mmu.session(None, |memory| {
            self.plans += 1;
            let planned = self.touch_rings(memory).is_ok() && self.pop(memory).is_some();
            self.queue.set_next_avail(next);
            planned
        })?;
        between();
        if !planned {
            return Ok(false);
        }
        let request = self.pop(&session);
        if let Some(why) = session.refused() {
            return Err(why.into());
        }
        let Some(Request { head, mut reader, mut writer }) = request else { return Ok(false) };
        let mut sent = Vec::new();
        reader.read_to_end(&mut sent).expect("a reader of memory at hand");
        sent.iter_mut().for_each(|byte| *byte ^= 0x5a);
        let count = sent.len().min(writer.available_bytes());
        writer.write_all(&sent[..count]).expect("a writer of memory at hand");
        session.tell();
        self.queue.add_used(&session, head, count as u32).expect("planned");
        assert!(self.queue.needs_notification(&session).expect("planned"));
        Ok(true)
    }
}

/// The guest's side.
struct Driver<'m> {
    mmu: &'m Mmu,
    offered: u16,
}

type Part = (u64, u32, u16);

impl<'m> Driver<'m> {
    fn new(mmu: &'m Mmu) -> Driver<'m> {
        Driver { mmu, offered: 0 }
    }

    fn lay(&self, table: u64, index: u16, (at, length, flags): Part, next: u16) {
        let bytes = [&at.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        poke(self.mmu, table + 16 * u64::from(index), &bytes.concat());
    }

    fn lay_chain(&self, table: u64, parts: &[Part]) {
        for (index, (at, length, flags)) in parts.iter().enumerate() {
            let more = if index + 1 < parts.len() { NEXT } else { 0 };
            self.lay(table, index as u16, (*at, *length, flags | more), index as u16 + 1);
        }
    }

    fn offer(&mut self, head: u16) {
        poke(self.mmu, AVAILABLE + 4 + 2 * u64::from(self.offered % SIZE), &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        poke(self.mmu, AVAILABLE + 2, &self.offered.to_le_bytes());
    }

    fn offer_chain(&mut self, parts: &[Part], indirect: bool) {
        if indirect {
            self.lay_chain(INDIRECT, parts);
            self.lay(TABLE, 7, (INDIRECT, 16 * parts.len() as u32, INDIRECT_TABLE), 0);
            self.offer(7);
        } else {
            self.lay_chain(TABLE, parts);
            self.offer(0);
        }
    }

    /// The last entry of the used ring, and how many there were.
    fn used(&self) -> (u16, u32, u32) {
        let index = u16::from_le_bytes(peek(self.mmu, USED + 2, 2).try_into().expect("2"));
        let entry = peek(self.mmu, USED + 4 + 8 * u64::from(index.wrapping_sub(1) % SIZE), 8);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("4"));
        (index, word(0), word(4))
    }
}

fn fresh() -> (Mmu, Echo) {
    (mmu(64), Echo::new())
}

#[test]
fn a_queue_is_valid_though_nothing_of_it_is_in_memory() {
    let (mmu, echo) = fresh();
    poke(&mmu, TABLE, &[1; 0x5000]);
    page_out(&mmu, 0x64..0x70);
    let (session, valid) = mmu.session(None, |memory| echo.queue.is_valid(memory)).expect("it only asked");
    assert!(valid && mmu.window_stats().taken == 0);
    drop(session);
    audit(&mmu);
}

#[test]
fn chains_direct_and_indirect_over_several_swapped_pages_are_answered() {
    let (mmu, mut echo) = fresh();
    let mut driver = Driver::new(&mmu);
    let sent: Vec<u8> = (0..0x2345u32).map(|n| (n * 7) as u8).collect();
    let (to, from) = (0x8_0f00, 0x9_0ffe);
    let parts = [(to, 0x1001, 0), (to + 0x1001, 0x1344, 0), (from, 2, WRITE), (from + 0x3000, 0x3000, WRITE)];
    for (turn, indirect) in [(1, false), (2, true)] {
        poke(&mmu, to, &sent);
        driver.offer_chain(&parts, indirect);
        assert!(page_out(&mmu, 0x60..0xa0) > 5);
        echo.plans = 0;
        assert_eq!(echo.serve(&mmu), Ok(true));
        assert!((2..=8).contains(&echo.plans), "{} plans", echo.plans);
        assert_eq!(driver.used(), (turn, if indirect { 7 } else { 0 }, 0x2345));
        let answer = [peek(&mmu, from, 2), peek(&mmu, from + 0x3000, 0x2343)].concat();
        assert!(answer.iter().zip(&sent).all(|(got, sent)| *got == *sent ^ 0x5a));
    }
    assert_eq!(echo.serve(&mmu), Ok(false), "no more");
    audit(&mmu);
}

#[test]
fn a_chain_of_something_else_than_memory_or_of_too_much_is_an_error_and_changes_nothing() {
    let (mmu, mut echo) = fresh();
    let mut driver = Driver::new(&mmu);
    let end = u64::from(PAGES) << 12;
    // With two pages of the available ring, and one each of the used ring and the table.
    let all = PAGES_MAX << 12;
    let cases: [(Part, Refused); 4] = [
        ((end - 16, 32, WRITE), Refused::Device(Gpa(end))),
        ((1 << 52, 32, WRITE), Refused::Device(Gpa(1 << 52))),
        ((u64::MAX - 15, 32, WRITE), Refused::Wraps { at: Gpa(u64::MAX - 15), count: 32 }),
        ((0x8_0000, all, WRITE), Refused::TooMany { gfn: Gfn(0x80 + PAGES_MAX - 4), max: PAGES_MAX }),
    ];
    for (part, want) in cases {
        driver.offer_chain(&[(0x9_0000, 8, 0), part], false);
        page_out(&mmu, 0x60..0xa0);
        let next = echo.queue.next_avail();
        assert_eq!(echo.serve(&mmu), Err(want.into()), "{part:x?}");
        assert_eq!((echo.queue.next_avail(), driver.used().0), (next, 0), "still there");
        echo.queue.set_next_avail(next.wrapping_add(1));
    }
    // An indirect table that leads to itself, and a table's chain that leads back: both end.
    driver.lay(INDIRECT, 0, (INDIRECT, 16, INDIRECT_TABLE), 0);
    driver.lay(TABLE, 0, (INDIRECT, 16, INDIRECT_TABLE), 0);
    driver.offer(0);
    assert_eq!(echo.serve(&mmu), Ok(true), "an empty chain");
    driver.lay(TABLE, 0, (0x9_0000, 4096, NEXT), 0);
    driver.offer(0);
    assert_eq!(echo.serve(&mmu), Ok(true), "sixteen times the same page");
    audit(&mmu);
}

#[test]
fn a_ring_that_changes_between_plan_and_run_is_an_error_and_no_more() {
    let (mmu, mut echo) = fresh();
    let mut driver = Driver::new(&mmu);
    driver.offer_chain(&[(0x8_0000, 8, 0), (0x8_1000, 8, WRITE)], false);
    let other = 0x8_2000u64;
    let got = echo.serve_after(&mmu, || driver.lay(TABLE, 1, (other, 8, WRITE), 0));
    assert_eq!(got, Err(Refused::NotPlanned(Gpa(other).gfn()).into()));
    assert_eq!((driver.used().0, peek(&mmu, other, 8)), (0, vec![0; 8]));
    audit(&mmu);
}

/// Parts of a request in the driver's buffers, at most so many bytes each way.
fn random_chain(rng: &mut TestRng) -> Vec<Part> {
    let mut page = BUFFERS + rng.random_range(0..BUFFER_PAGES - PAGES_MAX);
    let (read, written) = (rng.random_range(1..6), rng.random_range(1..6));
    (0..read + written)
        .map(|n| {
            let (offset, length) = (rng.random_range(0..4096u32), rng.random_range(1..0x3000u32));
            let at = (u64::from(page) << 12) + u64::from(offset);
            page += (offset + length).div_ceil(4096);
            (at, length, if n < read { 0 } else { WRITE })
        })
        .collect()
}

/// Requests of every shape while others take the pages away: all are answered, to the byte.
#[test]
fn random_chains_under_pressure_are_answered_to_the_byte() {
    let (mmu, mut echo) = fresh();
    mmu.set_budget(mmu.budget_min() + 40).expect("enough");
    let (over, end) = (AtomicBool::new(false), Instant::now() + seconds(0.5));
    let served = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = rng(3);
            while !over.load(Ordering::SeqCst) {
                let first = rng.random_range(0x60..PAGES - 64);
                page_out(&mmu, first..first + 64);
                page_out(&mmu, 0x60..0x70);
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let device = scope.spawn(|| {
            let (mut driver, mut rng, mut served) = (Driver::new(&mmu), rng(4), 0);
            while Instant::now() < end {
                serve_random(&mut driver, &mut echo, &mut rng);
                served += 1;
            }
            served
        });
        let served = device.join();
        over.store(true, Ordering::SeqCst);
        served.expect("no wrong byte")
    });
    println!("ring: {served} requests in {} plans, {:?}", echo.plans, mmu.window_stats());
    assert!(served > 100 && echo.plans > served, "{served} requests in {} plans", echo.plans);
    audit(&mmu);
}

fn serve_random(driver: &mut Driver<'_>, echo: &mut Echo, rng: &mut TestRng) {
    let parts = random_chain(rng);
    let total = |flags| parts.iter().filter(|part| part.2 == flags).map(|part| part.1).sum::<u32>();
    let mut sent = vec![0; total(0) as usize];
    rng.fill(&mut sent[..]);
    let mut left = &sent[..];
    for (at, length, _) in parts.iter().filter(|part| part.2 == 0) {
        let (part, rest) = left.split_at(*length as usize);
        poke(driver.mmu, *at, part);
        left = rest;
    }
    driver.offer_chain(&parts, rng.random_range(0..2) == 0);
    assert_eq!(echo.serve(driver.mmu), Ok(true));
    let count = total(0).min(total(WRITE));
    assert_eq!(driver.used().2, count);
    let written = parts.iter().filter(|part| part.2 == WRITE);
    let answer: Vec<u8> =
        written.flat_map(|(at, length, _)| peek(driver.mmu, *at, *length as usize)).collect();
    let mut pairs = answer.iter().zip(&sent).take(count as usize);
    assert!(pairs.all(|(got, sent)| *got == *sent ^ 0x5a), "{parts:x?}");
}
