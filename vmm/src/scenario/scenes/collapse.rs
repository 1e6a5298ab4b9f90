//! `collapse`: a range of 2 MiB is gathered again and again, while the vCPU uses its pages and discards some.
//!
//! The vCPU knows what it stored last, and that a page which it has discarded reads as zeros.

use std::io;
use std::sync::Arc;

use umbra_mmu::discard::Discard;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::TABLE_ENTRIES;
use umbra_mmu::sync::{AtomicBool, AtomicU64, Ordering, sim, thread};
use umbra_mmu::twins::{Kick, SoftCpu};
use umbra_mmu::{Config, Gfn, Machine, Mmu, TlbKind};

use super::super::story::Fact;
use super::{Stage, draw};

/// The range, which is the guest's second.
const RANGE: u32 = TABLE_ENTRIES as u32;
/// The pages of it that the vCPU uses: few, so that it meets those that are on their way.
const USED: u32 = 16;
/// Frames beside the block: those that its pages have before, and tables.
const FRAMES: u32 = 2000;
/// What the vCPU does, with all rules in force, and at most without one.
const STEPS: u64 = 4000;
const STEPS_MAX: u64 = 100_000;
/// How often the vCPU lets others run at most between two pages.
const LOOKS: u32 = 4;
/// How often others run at most between two collapses.
const PAUSE: u32 = 16;

/// Plays it.
pub fn play(stage: &Stage) -> io::Result<()> {
    let kicked = Arc::new(AtomicBool::new(false));
    let config = Config { blocks: true, shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(2 * RANGE) };
    let machine = Machine::anonymous(FRAMES + config.block_frames());
    let mmu = Mmu::new(machine, config, Box::new(Kick(kicked.clone()))).with_rules(stage.rules);
    let mmu = Arc::new(mmu);
    let (done, collapsed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (theirs, until, count) = (mmu.clone(), done.clone(), collapsed.clone());
    let gatherer = stage.start("collapse", move || {
        while !until.load(Ordering::SeqCst) {
            (0..draw(PAUSE)).for_each(|_| thread::yield_now());
            let made = theirs.collapse(Gfn(RANGE)).is_ok();
            count.fetch_add(u64::from(made), Ordering::SeqCst);
            sim::note(|line| line.push_str(if made { "the range is huge" } else { "gives up" }));
        }
    })?;
    let mut cpu = SoftCpu::new(mmu.clone(), TlbKind::Sticky, kicked);
    let mut kept = [0; USED as usize];
    let (mut discards, mut refused) = (0, 0);
    let steps = if stage.rules.left_out().is_some() { STEPS_MAX } else { STEPS };
    for step in 1..=steps {
        // What the TLB has is used without a look at anybody else.
        (0..draw(LOOKS)).for_each(|_| thread::yield_now());
        let page = draw(USED);
        let word = &mut kept[page as usize];
        if draw(4) > 0 {
            let found = cpu.load(RANGE + page, 1);
            let after = if *word == 0 { "a discard was lost" } else { "a store was lost" };
            assert_eq!(found, Ok(*word), "{after}: page {page} of the range");
            *word = step;
            assert_eq!(cpu.store(RANGE + page, 1, step), Ok(()), "a store to page {page}");
            continue;
        }
        // As a balloon does, and as somebody who may not wait.
        cpu.leave();
        let may = if draw(2) == 0 { May::Sleep } else { May::NotSleep };
        let gone = mmu.discard(Some(0), [RANGE + page], Discard::Zero, may).is_ok();
        sim::note(|line| line.push_str(if gone { "discards a page" } else { "may not discard a page now" }));
        if gone {
            *word = 0;
        }
        discards += u64::from(gone);
        refused += u64::from(!gone);
    }
    cpu.rest();
    done.store(true, Ordering::SeqCst);
    gatherer.join();
    let wrong = mmu.audit();
    assert!(wrong.is_empty(), "the audit: {}", wrong.join("; "));
    let made = collapsed.load(Ordering::SeqCst);
    assert!(made > 0 && discards > 0, "{made} collapses and {discards} discards: there was nothing to see");
    for measured in [
        format!("times that the range was huge = {made}"),
        format!("discards = {discards}, and {refused} that would have had to wait"),
    ] {
        stage.tell(&Fact::Measured(measured));
    }
    Ok(())
}
