//! Roots: the top two tables of a shadow address space, and which of them are loaded.
//!
//! Story: the hardware's CR3 points to a root's PML4. Its entry 0 leads to the PDPT, whose first four entries
//! cover the guest's 4 GiB; its entry 256 leads to the firmware. A root is found again by what it was loaded
//! with, so a CR3 switch back costs a look-up: by the page directory (two-level), by the four PDPTEs (PAE: the
//! registers, not the memory they came from), or by nothing (paging off).
//!
//! Locks: [`lock_order::ROOTS`] for the table. Entries of a PDPT change under the lock of the child linked.
//!
//! Limits: a fixed number of roots; the least recently loaded one that no vCPU has now goes first.

use rustc_hash::FxHashMap;

use crate::Mmu;
use crate::addr::{Gfn, Gpa, Mfn};
use crate::coherence::Removal;
use crate::format::{Mode, Pdpte};
use crate::frames::{Draw, FrameKind};
use crate::rules::Rule;
use crate::shadow::role::effective_mode;
use crate::spte::Spte;
use crate::sync::Ordering;
use crate::tlb::root_tag;
use crate::vcpu::Vcpu;

/// Index of the PML4 entry that maps the firmware.
pub const FIRMWARE_SLOT: u32 = 256;

/// A root that is loaded: its tables will not go away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RootRef {
    pub index: u32,
    pub pml4: Mfn,
    pub pdpt: Mfn,
    /// How many address spaces it has served, this one included.
    pub life: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RootKey {
    mode: Mode,
    user: bool,
    tables: [Option<Gfn>; 4],
}

#[derive(Debug)]
struct Root {
    key: Option<RootKey>,
    tables: RootRef,
    /// How many vCPUs have it loaded.
    loaded: u32,
    used: u64,
    /// Stamp of the last unlinking, which must be covered before the tables serve again.
    dead_at: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Roots {
    by_key: FxHashMap<RootKey, u32>,
    roots: Vec<Root>,
    clock: u64,
}

/// What a search under the lock came to.
enum Search {
    Found(RootRef),
    /// A root was unlinked to make room; its death must be flushed before it is used again.
    Flush,
    NoFrame,
}

impl Mmu {
    /// The root for code of privilege `user`, loaded. `None` when no frame is left for its tables. May shoot
    /// down (sleep) on a miss; the caller holds nothing.
    #[inline]
    pub(crate) fn root(&self, vcpu: &Vcpu, user: bool) -> Option<RootRef> {
        let user = user && vcpu.mode.paging;
        let cell = &vcpu.roots[usize::from(user)];
        if let Some(root) = cell.get() {
            return Some(root);
        }
        let root = self.load_root(root_key(vcpu, user), vcpu.id)?;
        cell.set(Some(root));
        vcpu.tags[usize::from(user)].set(root_tag(root.index));
        if !vcpu.mode.paging {
            vcpu.tags[1].set(root_tag(root.index));
        }
        Some(root)
    }

    /// Lets go of both roots of a vCPU (its CR3, PDPTEs or mode change).
    pub(crate) fn unload_roots(&self, vcpu: &Vcpu) {
        let mut roots = self.roots.lock();
        vcpu.tags.iter().for_each(|tag| tag.set(0));
        for cell in &vcpu.roots {
            if let Some(root) = cell.take() {
                roots.roots[root.index as usize].loaded -= 1;
            }
        }
    }

    /// Every root there is, as (key's user flag, mode, tables); for audits.
    pub(crate) fn live_roots(&self) -> Vec<RootRef> {
        self.roots.lock().roots.iter().filter(|r| r.key.is_some()).map(|r| r.tables).collect()
    }

    /// Unlinks every root that no vCPU has loaded: none of them is found again. Their tables serve others, after a flush.
    pub(crate) fn unlink_roots(&self) {
        let mut roots = self.roots.lock();
        for victim in 0..roots.roots.len() {
            let root = &roots.roots[victim];
            if root.loaded == 0 && root.key.is_some() {
                self.unlink_root(&mut roots, victim);
            }
        }
    }

    fn load_root(&self, key: RootKey, own: u32) -> Option<RootRef> {
        loop {
            match self.search_root(key) {
                Search::Found(root) => return Some(root),
                Search::Flush if !self.rules.keep(Rule::ShootdownBeforeRoot) => {}
                Search::Flush => {
                    self.coherence.shoot_down(Some(own));
                }
                Search::NoFrame => return None,
            }
        }
    }

    fn search_root(&self, key: RootKey) -> Search {
        let mut roots = self.roots.lock();
        roots.clock += 1;
        let now = roots.clock;
        if let Some(index) = roots.by_key.get(&key).copied() {
            let root = &mut roots.roots[index as usize];
            root.loaded += 1;
            root.used = now;
            return Search::Found(root.tables);
        }
        let index = match self.vacant_root(&mut roots) {
            Ok(index) => index,
            Err(stop) => return stop,
        };
        roots.by_key.insert(key, index);
        let root = &mut roots.roots[index as usize];
        (root.key, root.loaded, root.used) = (Some(key), 1, now);
        root.tables.life += 1;
        Search::Found(root.tables)
    }

    /// A root without a key: a covered dead one, a new one, or (after a flush) the least recently used.
    fn vacant_root(&self, roots: &mut Roots) -> Result<u32, Search> {
        let waits = self.rules.keep(Rule::ShootdownBeforeRoot);
        let is_free = |r: &Root| r.key.is_none() && (!waits || self.coherence.covered(r.dead_at));
        let dead = roots.roots.iter().position(is_free);
        if let Some(index) = dead {
            return Ok(index as u32);
        }
        if roots.roots.len() < self.config.roots_max as usize {
            let index = roots.roots.len() as u32;
            let tables = self.build_root(index).ok_or(Search::NoFrame)?;
            roots.roots.push(Root { key: None, tables, loaded: 0, used: 0, dead_at: 0 });
            return Ok(index);
        }
        let idle = roots.roots.iter().enumerate().filter(|(_, r)| r.loaded == 0 && r.key.is_some());
        if let Some((victim, _)) = idle.min_by_key(|(_, r)| r.used) {
            self.unlink_root(roots, victim);
        }
        Err(Search::Flush)
    }

    fn build_root(&self, index: u32) -> Option<RootRef> {
        let pml4 = self.take_frame(FrameKind::Root(index), Draw::Tables)?;
        let Some(pdpt) = self.take_frame(FrameKind::Root(index), Draw::Tables) else {
            self.release_table(pml4);
            return None;
        };
        self.machine.word64(pml4.at(0)).store(Spte::link(pdpt).0, Ordering::Release);
        let firmware = self.machine.word64(pml4.at(FIRMWARE_SLOT * 8));
        firmware.store(self.config.firmware_entry, Ordering::Release);
        Some(RootRef { index, pml4, pdpt, life: 0 })
    }

    fn unlink_root(&self, roots: &mut Roots, victim: usize) {
        let root = &mut roots.roots[victim];
        for index in 0..4 {
            self.unlink(root.tables.pdpt.at(index * 8), true);
        }
        root.dead_at = self.coherence.removal().by(Rule::DebtOfRoot).map_or(0, Removal::stamp_table);
        let key = root.key.take();
        if let Some(key) = key {
            roots.by_key.remove(&key);
        }
    }
}

fn root_key(vcpu: &Vcpu, user: bool) -> RootKey {
    let mode = effective_mode(vcpu.mode, user);
    let tables = if !mode.paging {
        [None; 4]
    } else if mode.pae {
        vcpu.pdptes.map(|p: Pdpte| p.is_present().then(|| p.gfn()))
    } else {
        [Some(Gpa(u64::from(vcpu.cr3)).gfn()), None, None, None]
    };
    RootKey { mode, user, tables }
}
