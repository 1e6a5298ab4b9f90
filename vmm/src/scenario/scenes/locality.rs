//! `clustering`: pages go to swap and come back, all in the order of their addresses, and the transfers are counted.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use umbra_mmu::swap::{MemorySwap, SwapDevice, SwapSlot};
use umbra_mmu::sync::{AtomicBool, AtomicU64, Ordering, sim};
use umbra_mmu::twins::{Kick, SoftCpu};
use umbra_mmu::{Config, Machine, Mmu, PAGE_SIZE, TlbKind};

use super::super::story::{Fact, Kind};
use super::Stage;

/// Pages of the guest, of which no more than the frames are there at a time.
const PAGES: u32 = 512;
const FRAMES: u32 = 192;
/// Times that the guest goes over its memory.
const ROUNDS: u64 = 3;
/// Pages of a write below which they have lost their neighbours.
const TOGETHER_MIN: f64 = 4.0;

/// A device that counts: transfers, and their pages.
#[derive(Debug, Default)]
struct Count {
    transfers: AtomicU64,
    pages: AtomicU64,
}

impl Count {
    fn transfer(&self, bytes: usize) {
        self.transfers.fetch_add(1, Ordering::Relaxed);
        self.pages.fetch_add(bytes as u64 / PAGE_SIZE, Ordering::Relaxed);
    }

    /// Transfers, pages, and pages of a transfer.
    fn result(&self) -> (u64, u64, f64) {
        let (transfers, pages) = (self.transfers.load(Ordering::Relaxed), self.pages.load(Ordering::Relaxed));
        (transfers, pages, pages as f64 / transfers.max(1) as f64)
    }
}

#[derive(Debug)]
struct Counted {
    blocks: MemorySwap,
    reads: Arc<Count>,
    writes: Arc<Count>,
}

impl SwapDevice for Counted {
    fn slots(&self) -> u32 {
        self.blocks.slots()
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        self.writes.transfer(pages.len());
        self.blocks.write(first, pages)
    }

    fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()> {
        self.reads.transfer(pages.len());
        self.blocks.read(first, pages)
    }

    fn discard(&self, slots: Range<u32>) {
        self.blocks.discard(slots);
    }
}

/// Plays it.
pub fn play(stage: &Stage) -> io::Result<()> {
    let (reads, writes) = (Arc::new(Count::default()), Arc::new(Count::default()));
    let machine = Machine::anonymous(FRAMES + 64);
    let kicked = Arc::new(AtomicBool::new(false));
    let config = Config { shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(PAGES) };
    let mmu = Mmu::new(machine, config, Box::new(Kick(kicked.clone()))).with_rules(stage.rules).with_swap(
        Box::new(Counted {
            blocks: MemorySwap::new(2 * PAGES),
            reads: reads.clone(),
            writes: writes.clone(),
        }),
    );
    let mmu = Arc::new(mmu);
    let mut cpu = SoftCpu::new(mmu.clone(), TlbKind::Sized, kicked);
    for round in 1..=ROUNDS {
        for page in 0..PAGES {
            let kept = u64::from(page) << 32 | (round - 1);
            let found = cpu.load(page, 1);
            assert!(found == Ok(kept) || round == 1, "page {page} in round {round}: {found:?}");
            let stored = cpu.store(page, 1, u64::from(page) << 32 | round);
            assert_eq!(stored, Ok(()), "the store to page {page}");
        }
    }
    cpu.rest();
    let refaults = mmu.usage().refaults;
    let ((writes, written, a_write), (reads, read, a_read)) = (writes.result(), reads.result());
    let micros = sim::now().unwrap_or_default() / 1000;
    for measured in [
        format!("writes = {writes} for {written} pages, {a_write:.1} pages each"),
        format!("reads = {reads} for {read} pages, {a_read:.1} pages each"),
        format!("faults that had to read = {refaults} of {}", u64::from(PAGES) * ROUNDS),
        format!("time = {micros} virtual us"),
    ] {
        stage.tell(&Fact::Measured(measured));
    }
    if a_write < TOGETHER_MIN {
        let text = format!(
            "neighbours go to swap one by one: {a_write:.1} pages a write, where at least {TOGETHER_MIN} are gathered"
        );
        stage.fail(Kind::Scattered, &text);
    }
    Ok(())
}
