//! The guest's descriptor tables, kept translated for the hardware.
//!
//! Story: native guest code loads segments from the firmware's translated copy of the guest's GDT and LDT. The copy
//! is made anew when the guest loads another table, changes its paging, or writes to one of the pages: those are
//! watched, so that a store to them comes back as an emulated one. Whichever vCPU stores, all others leave the guest before
//! it goes on, and none enters with a copy from before:
//!
//! ```text
//! vCPU that stores                     another
//! the store                            stores' := stores; read the tables    (refresh)
//! stores += 1                          mode := inside                        (enter)
//! shoot down: who is inside leaves     stores' = stores? else leave again    (is_current)
//! ```
//!
//! See: docs/ARCHITECTURE.md, "Segments".

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use umbra_mmu::{Access, Gfn, Gva, Mmu, NotReached, Refusal, Rule, Shortage, Touch, Vcpu};

use super::hardware::Hardware;
use crate::cpu::{CpuState, Segment, TableRegister};
use crate::kvm::KvmError;

/// log2 of the largest page.
const REGION_SHIFT: u32 = 22;

/// The pages of all vCPUs' tables: who watches which, and how often one of them was stored to.
///
/// Locks: a leaf's, but for what the MMU takes to end a watch.
#[derive(Debug, Default)]
pub struct Watches {
    watchers: Mutex<HashMap<Gfn, u32>>,
    stores: AtomicU64,
}

impl Watches {
    /// Watches `gfn` for one more vCPU. May sleep.
    fn add(&self, mmu: &Mmu, vcpu: &Vcpu, gfn: Gfn) -> Result<(), Shortage> {
        // Counted first, so that nobody ends the watch meanwhile.
        *self.lock().entry(gfn).or_default() += 1;
        let watched = mmu.watch(vcpu, gfn);
        if watched.is_err() {
            self.remove(mmu, gfn);
        }
        watched.map(drop)
    }

    /// And for one less.
    fn remove(&self, mmu: &Mmu, gfn: Gfn) {
        let mut watchers = self.lock();
        let Some(count) = watchers.get_mut(&gfn) else { return };
        *count -= 1;
        if *count == 0 {
            watchers.remove(&gfn);
            mmu.unwatch(gfn);
        }
    }

    fn stores(&self) -> u64 {
        self.stores.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Gfn, u32>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the translated tables of a vCPU were made from.
#[derive(Debug, Default)]
pub struct DescriptorTables {
    gdtr: TableRegister,
    ldtr: Segment,
    watched: Vec<Gfn>,
    current: bool,
    watches: Arc<Watches>,
    /// [`Watches::stores`] before they were read.
    stores: u64,
}

/// Why the copy could not be made.
#[derive(Debug)]
pub enum NotRefreshed {
    /// A bug in the firmware's layout.
    Kvm(KvmError),
    /// A page of the tables cannot be brought in.
    Short(Shortage),
}

impl From<KvmError> for NotRefreshed {
    fn from(error: KvmError) -> NotRefreshed {
        NotRefreshed::Kvm(error)
    }
}

impl From<Shortage> for NotRefreshed {
    fn from(shortage: Shortage) -> NotRefreshed {
        NotRefreshed::Short(shortage)
    }
}

impl DescriptorTables {
    /// Nothing translated yet.
    pub fn new(watches: Arc<Watches>) -> DescriptorTables {
        DescriptorTables { watches, ..DescriptorTables::default() }
    }

    /// Something may have changed: look again before the next entry.
    pub fn invalidate(&mut self) {
        self.current = false;
    }

    /// There are no tables any more: none of their pages is watched.
    pub fn forget(&mut self, mmu: &Mmu) {
        self.watched.drain(..).for_each(|gfn| self.watches.remove(mmu, gfn));
        self.current = false;
    }

    /// True when nobody has stored to any table since the copy was made. For a vCPU that counts as inside the guest.
    pub fn is_current(&self) -> bool {
        self.stores == self.watches.stores()
    }

    /// The vCPU `own`, which is outside, has stored to a page of somebody's tables: no vCPU uses a copy from before when this
    /// returns. Sleeps for vCPUs in the guest, if there is another.
    pub fn stored_to(&mut self, mmu: &Mmu, own: u32) {
        self.watches.stores.fetch_add(1, Ordering::SeqCst);
        if mmu.config().vcpus > 1 && mmu.rules().keep(Rule::ShootdownAtDescriptors) {
            mmu.coherence().shoot_down(Some(own));
        }
    }

    /// True when INVLPG of `gva` may have changed where the tables are: it lies in the same 4 MiB, since that is what
    /// the INVLPG of a large page forgets.
    pub fn contain(&self, gva: Gva) -> bool {
        let covers = |base: u32, limit: u32| {
            let (first, at) = (base >> REGION_SHIFT, gva.0 >> REGION_SHIFT);
            at == first || at == base.wrapping_add(limit) >> REGION_SHIFT
        };
        covers(self.gdtr.base, self.gdtr.limit.into()) || covers(self.ldtr.base, self.ldtr.limit.min(0xffff))
    }

    /// Brings the hardware's copy up to date.
    ///
    /// # Errors
    ///
    /// When a page of the tables cannot be brought in.
    pub fn refresh(
        &mut self,
        mmu: &Mmu,
        vcpu: &Vcpu,
        cpu: &CpuState,
        hardware: &mut impl Hardware,
    ) -> Result<(), NotRefreshed> {
        if self.current && self.is_current() && self.gdtr == cpu.gdtr && self.ldtr == cpu.ldtr {
            return Ok(());
        }
        let (gdt, ldt) = loop {
            self.stores = self.watches.stores();
            let mut frames = Vec::new();
            let gdt = read_table(mmu, vcpu, Gva(cpu.gdtr.base), u32::from(cpu.gdtr.limit) + 1, &mut frames)?;
            let has_ldt = !cpu.ldtr.unusable && cpu.ldtr.selector & !3 != 0;
            let ldt_bytes = cpu.ldtr.limit.min(0xffff) + 1;
            let ldt = has_ldt
                .then(|| read_table(mmu, vcpu, Gva(cpu.ldtr.base), ldt_bytes, &mut frames))
                .transpose()?;
            // What was not watched yet may have been stored to unseen since it was read.
            if self.watch(mmu, vcpu, frames)? {
                break (gdt, ldt);
            }
        };
        hardware.set_descriptors(&gdt, ldt.as_deref())?;
        (self.gdtr, self.ldtr, self.current) = (cpu.gdtr, cpu.ldtr, true);
        Ok(())
    }

    /// Watches `frames` and no others; true where they were watched before.
    fn watch(&mut self, mmu: &Mmu, vcpu: &Vcpu, mut frames: Vec<Gfn>) -> Result<bool, Shortage> {
        frames.sort_unstable();
        frames.dedup();
        let (kept, gone) = self.watched.drain(..).partition::<Vec<_>, _>(|old| frames.contains(old));
        self.watched = kept;
        gone.into_iter().for_each(|old| self.watches.remove(mmu, old));
        let new: Vec<_> = frames.into_iter().filter(|frame| !self.watched.contains(frame)).collect();
        for frame in &new {
            self.watches.add(mmu, vcpu, *frame)?;
            self.watched.push(*frame);
        }
        Ok(new.is_empty())
    }
}

/// The bytes of a table as the CPU would read them, zeros (not present) where it cannot; notes the frames.
fn read_table(
    mmu: &Mmu,
    vcpu: &Vcpu,
    base: Gva,
    bytes: u32,
    frames: &mut Vec<Gfn>,
) -> Result<Vec<u8>, Shortage> {
    let own = Some(vcpu.id());
    let mut table = vec![0; bytes as usize];
    let mut done = 0;
    while done < bytes {
        let at = base.wrapping_add(done);
        let count = (4096 - at.offset()).min(bytes - done);
        let part = &mut table[done as usize..(done + count) as usize];
        match mmu.walk(vcpu, at, Access::read(false), Touch::Look) {
            Ok(t) => match mmu.read_bytes_sleeping(own, vcpu.window(), t.gpa, part) {
                Ok(()) => frames.push(t.gpa.gfn()),
                Err(NotReached::Device(_)) => part.fill(0),
                Err(NotReached::Short(shortage)) => return Err(shortage),
            },
            Err(Refusal::Fault(_)) => {}
            Err(Refusal::Need(gfn)) => {
                mmu.bring_in(own, gfn)?;
                continue;
            }
        }
        done += count;
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invlpg_near_a_table_makes_it_stale_also_across_4_gib() {
        let gdtr = TableRegister { base: 0xffff_ff80, limit: 0xff };
        let ldtr = Segment { base: 0x803f_fff8, limit: 0xf, ..Segment::default() };
        let tables = DescriptorTables { gdtr, ldtr, ..DescriptorTables::default() };
        for inside in [0xffff_f000, 0xffc0_0000, 0, 0x7f, 0x8000_0000, 0x8040_0000] {
            assert!(tables.contain(Gva(inside)), "{inside:#x}");
        }
        for outside in [0xffbf_ffff, 0x40_0000, 0x7fff_ffff, 0x8080_0000] {
            assert!(!tables.contain(Gva(outside)), "{outside:#x}");
        }
    }
}
