//! `superblock`, as it is Umbra's own: swap is a file of a filesystem, whose lock each write takes, and whoever holds that lock wants a
//! frame.
//!
//! ```text
//! writer                                       reclaim, on behalf of the writer or of itself
//! takes the superblock
//! wants a frame: there is none
//! reclaims for itself: a dirty page            writes it out: wants the superblock
//! ```
//!
//! The writer is in [`NoIo`] for as long as it holds the lock: reclaim that it does drops what is clean and writes nothing.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use umbra_mmu::scope::NoIo;
use umbra_mmu::swap::{MemorySwap, SwapDevice, SwapSlot};
use umbra_mmu::sync::{AtomicBool, Monitor};
use umbra_mmu::twins::{Kick, SoftCpu};
use umbra_mmu::{Config, Machine, Mmu, Shortage, TlbKind, lock_order};

use super::super::story::Fact;
use super::{Stage, draw};

/// Pages of the guest; a part of them is only read, and can be dropped without a write.
const PAGES: u32 = 768;
const READ: Range<u32> = 0..192;
/// The budget, and what the machine has.
const FRAMES: u32 = 256;
const MACHINE: u32 = 1024;
/// Times that the lock is taken, and pages that are wanted meanwhile.
const HOLDS: u32 = 200;
const WANTED: u32 = 4;

/// The filesystem's lock, by who holds it.
struct Superblock {
    holder: Monitor<Option<&'static str>>,
    stage: Stage,
}

impl Superblock {
    fn take(&self, who: &'static str) {
        let what = "the superblock".to_owned();
        let mut holder = self.holder.lock();
        while holder.is_some() {
            self.stage.tell(&Fact::Waits(who.into(), what.clone()));
            holder = holder.wait("the superblock");
        }
        *holder = Some(who);
        drop(holder);
        self.stage.tell(&Fact::Holds(who.into(), what));
    }

    fn release(&self, who: &'static str) {
        *self.holder.lock() = None;
        self.holder.notify_all();
        self.stage.tell(&Fact::LetsGo(who.into(), "the superblock".into()));
    }
}

impl std::fmt::Debug for Superblock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Superblock")
    }
}

/// Swap as a file: where a block is has to be looked up.
#[derive(Debug)]
struct File {
    blocks: MemorySwap,
    superblock: Arc<Superblock>,
}

impl SwapDevice for File {
    fn slots(&self) -> u32 {
        self.blocks.slots()
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        // Reclaim that the writer does for itself is the writer.
        let who = if NoIo::is_entered() { "the writer" } else { "reclaim" };
        self.superblock.take(who);
        let done = self.blocks.write(first, pages);
        self.superblock.release(who);
        done
    }

    fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()> {
        self.blocks.read(first, pages)
    }

    fn discard(&self, slots: Range<u32>) {
        self.blocks.discard(slots);
    }
}

/// Plays it.
pub fn play(stage: &Stage) -> io::Result<()> {
    let superblock =
        Arc::new(Superblock { holder: Monitor::new(lock_order::SLEEPERS, None), stage: stage.clone() });
    let file = File { blocks: MemorySwap::new(2 * PAGES), superblock: superblock.clone() };
    let kicked = Arc::new(AtomicBool::new(false));
    let config = Config { shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(PAGES) };
    let mmu = Mmu::new(Machine::anonymous(MACHINE), config, Box::new(Kick(kicked.clone())))
        .with_rules(stage.rules)
        .with_swap(Box::new(file));
    let mmu = Arc::new(mmu);
    let budget = mmu.set_budget(FRAMES);
    assert!(budget.is_ok(), "a budget of {FRAMES} frames: {budget:?}");
    let mut cpu = SoftCpu::new(mmu.clone(), TlbKind::Sized, kicked);
    let (mut kept, mut without) = (vec![0; PAGES as usize], 0);
    for hold in 1..=u64::from(HOLDS) {
        // Outside of the lock anything may be written.
        for _ in 0..WANTED {
            let page = READ.end + draw(PAGES - READ.end);
            kept[page as usize] = hold;
            assert_eq!(cpu.store(page, 1, hold), Ok(()), "a store to page {page}");
        }
        superblock.take("the writer");
        let scope = NoIo::enter();
        for _ in 0..WANTED {
            let page = draw(PAGES);
            match cpu.load(page, 1) {
                // What the scope costs: all that is left would have to be written.
                Err(Shortage::Frames { .. }) => without += 1,
                found => assert_eq!(found, Ok(kept[page as usize]), "page {page}"),
            }
        }
        drop(scope);
        superblock.release("the writer");
    }
    cpu.rest();
    let usage = mmu.usage();
    for measured in [
        format!("pages reclaimed without a write = {} clean, {} zeros", usage.clean_drops, usage.zero_drops),
        format!("pages written = {}", usage.swap_outs),
        format!("times without a frame = {without} of {}", HOLDS * WANTED),
    ] {
        stage.tell(&Fact::Measured(measured));
    }
    Ok(())
}
