//! Paging-structure caches of a software TLB: the links that a `sticky` one goes on using.
//!
//! Story: a CPU remembers not only translations. It remembers the entries that lead to a directory and to a page table, too (SDM
//! vol. 3A, 4.10.3), and goes on from there after they have been unlinked. A miss of a `sticky` TLB comes here: the lowest table
//! that is known for the address is where the walk begins (`Mmu::tlb_find_by_links`).
//!
//! ```text
//! miss --> link to the page table known? ---------------------> its life still that of then? --> spte
//!               no: link to the directory known? --> its life?        no: Incoherent, the run ends with a report
//!                        no: from the root; what is found present is learnt
//! ```
//!
//! Links are forgotten when a CPU would forget them (SDM vol. 3A, 4.10.4.1): all by INVLPG of any address, and by each flush, whether
//! or not global pages go with it; those of one address by a page fault, the shadow's own among them. Without that last a vCPU would
//! fault for ever by a table that is dead and empty.
//!
//! Holds: INV-TLB-3, a link is used only while the table that it led to, and the root that it was found under, have the life
//! (`shadow::pages`, `shadow::roots`) that they had then. A table that has died is empty and may be read; its next life,
//! or the end of its frame, waits until the ledger covers its death: until this vCPU has flushed, or is outside and will as it enters.
//! So with all rules in force the lives are the same. A link to a table that was unlinked and lives on leads to what the guest's own
//! flush, which it owes, has not taken away yet.
//!
//! Locks: none. The vCPU is inside the guest where links are used (INV-SHADOW-5). The life is read behind the link: inside the guest it
//! does not change in between.
//!
//! Limits: the PML4 has one entry below 4 GiB, which never changes: it is not cached.

use std::cell::RefCell;

use rustc_hash::FxHashMap;

use crate::Mmu;
use crate::access::AccessKind;
use crate::addr::{Gva, Mfn};
use crate::frames::FrameKind;
use crate::shadow::RootRef;
use crate::spte::{Spte, l3_index};
use crate::tlb::{Miss, SoftTlb};
use crate::vcpu::Vcpu;
use crate::violation::{Served, StaleLink, Violation};

/// Which entry a link was found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkLevel {
    /// In a directory: it leads to a page table.
    Directory,
    /// In a root: it leads to a directory.
    Root,
}

impl LinkLevel {
    /// Bits of an address below those that choose the entry.
    pub const fn bits(self) -> u32 {
        match self {
            LinkLevel::Directory => 21,
            LinkLevel::Root => 30,
        }
    }

    fn number(self, gva: Gva) -> u32 {
        gva.0 >> self.bits()
    }
}

/// A link as it was found.
#[derive(Clone, Copy, Debug)]
struct CachedLink {
    root: u32,
    /// The life of the root then.
    root_life: u32,
    link: Spte,
    slot: u32,
    /// The life of the table then.
    life: u64,
    /// Fills of the TLB before.
    fills: u64,
}

/// The links that one vCPU knows.
#[derive(Debug, Default)]
pub(crate) struct LinkCache {
    /// By level and number of the region, one for each root.
    links: RefCell<FxHashMap<(LinkLevel, u32), Vec<CachedLink>>>,
}

impl LinkCache {
    fn find(&self, level: LinkLevel, root: RootRef, gva: Gva) -> Option<CachedLink> {
        let links = self.links.borrow();
        links.get(&(level, level.number(gva)))?.iter().find(|known| known.root == root.index).copied()
    }

    fn learn(&self, level: LinkLevel, gva: Gva, new: CachedLink) {
        let mut links = self.links.borrow_mut();
        let known = links.entry((level, level.number(gva))).or_default();
        known.retain(|old| old.root != new.root);
        known.push(new);
    }

    /// Forgets all: INVLPG, and each flush.
    pub fn forget_all(&self) {
        self.links.borrow_mut().clear();
    }

    /// Forgets what leads to `gva` under every root: a page fault. An entry of the guest's directory may be for 4 MiB.
    pub fn forget_address(&self, gva: Gva) {
        let mut links = self.links.borrow_mut();
        let first = LinkLevel::Directory.number(gva) & !1;
        links.remove(&(LinkLevel::Directory, first));
        links.remove(&(LinkLevel::Directory, first + 1));
        links.remove(&(LinkLevel::Root, LinkLevel::Root.number(gva)));
    }

    /// The same under one root: a fault that the shadow raises, and the guest does not see.
    pub fn forget_under(&self, root: RootRef, gva: Gva) {
        let mut links = self.links.borrow_mut();
        for level in [LinkLevel::Directory, LinkLevel::Root] {
            if let Some(known) = links.get_mut(&(level, level.number(gva))) {
                known.retain(|old| old.root != root.index);
            }
        }
    }
}

impl Mmu {
    /// What a miss of a TLB with paging-structure caches comes to: the frame by the tables that it knows the way to, or that the true
    /// ones lead to. After [`Miss::Fault`] the caller has it forget the way ([`LinkCache::forget_under`]).
    #[cold]
    #[inline(never)]
    pub(crate) fn tlb_find_by_links(
        &self,
        vcpu: &Vcpu,
        (tlb, links): (&SoftTlb, &LinkCache),
        root: RootRef,
        gva: Gva,
        kind: AccessKind,
    ) -> Result<Mfn, Miss> {
        let known = self.recall_link(vcpu, (tlb, links), LinkLevel::Directory, root, gva, kind)?;
        let link = match known {
            Some(link) => link,
            None => {
                if let Some(mfn) = self.tlb_walk_large(tlb, root, gva, kind)? {
                    return Ok(mfn);
                }
                let directory =
                    match self.recall_link(vcpu, (tlb, links), LinkLevel::Root, root, gva, kind)? {
                        Some(directory) => directory,
                        None => {
                            let directory = self.spte(root.pdpt.at(l3_index(gva) * 8));
                            self.learn_link((tlb, links), LinkLevel::Root, root, gva, directory)
                                .ok_or(Miss::Fault)?
                        }
                    };
                let table = self.find_link_in(directory, gva).ok_or(Miss::Fault)?;
                self.learn_link((tlb, links), LinkLevel::Directory, root, gva, table).ok_or(Miss::Fault)?
            }
        };
        let entry = self.tlb_walk_below(root, link, gva).ok_or(Miss::Fault)?;
        tlb.take_entry(entry, gva, kind)
    }

    /// Remembers an entry that leads to a table; `None` where it does not.
    fn learn_link(
        &self,
        (tlb, links): (&SoftTlb, &LinkCache),
        level: LinkLevel,
        root: RootRef,
        gva: Gva,
        link: Spte,
    ) -> Option<Spte> {
        let slot = link.is_present().then(|| self.slot_of(link)).flatten()?;
        let (life, fills) = (self.pages.life(slot), tlb.stats().fills);
        let new = CachedLink { root: root.index, root_life: root.life, link, slot, life, fills };
        links.learn(level, gva, new);
        Some(link)
    }

    /// Remembers that the page in `slot`, which the caller has locked, is the page table for `gva`, where links are remembered.
    #[inline]
    pub(crate) fn learn_table(&self, tlb: &SoftTlb, root: RootRef, gva: Gva, slot: u32) {
        if let Some(links) = tlb.links() {
            self.learn_link((tlb, links), LinkLevel::Directory, root, gva, Spte::link(self.pages.mfn(slot)));
        }
    }

    /// The link that is known for `gva` at a level. INV-TLB-3.
    fn recall_link(
        &self,
        vcpu: &Vcpu,
        (tlb, links): (&SoftTlb, &LinkCache),
        level: LinkLevel,
        root: RootRef,
        gva: Gva,
        kind: AccessKind,
    ) -> Result<Option<Spte>, Miss> {
        let Some(known) = links.find(level, root, gva) else { return Ok(None) };
        if known.root_life == root.life && known.life == self.pages.life(known.slot) {
            return Ok(Some(known.link));
        }
        let stale = self.report_link((vcpu, tlb), level, &known, root, gva, kind);
        Err(Miss::Incoherent(Box::new(Violation::Link(stale))))
    }

    /// All that is known of the flush that was missed.
    #[cold]
    fn report_link(
        &self,
        (vcpu, tlb): (&Vcpu, &SoftTlb),
        level: LinkLevel,
        known: &CachedLink,
        root: RootRef,
        gva: Gva,
        kind: AccessKind,
    ) -> StaleLink {
        let mfn = known.link.mfn();
        let (served, lives) = if known.root_life != root.life {
            (Served::Root, (known.root_life.into(), root.life.into()))
        } else {
            // A table that serves again may be a directory now: it is locked alone, so that its level does not matter.
            let key = || self.pages.lock(known.slot, false).key;
            let guest_table = || key().filter(|key| key.role.shadows_table()).map(|key| key.gfn);
            let served = match self.frames.kind(mfn) {
                FrameKind::Shadow(slot) if slot == known.slot => Served::Table(guest_table()),
                _ => Served::Nothing,
            };
            (served, (known.life, self.pages.life(known.slot)))
        };
        StaleLink {
            vcpu: vcpu.id,
            gva,
            kind,
            level,
            root: root.index,
            link: known.link,
            served,
            lives,
            fills: (known.fills, tlb.stats().fills),
            flushed_fills: tlb.flushed_fills(),
            flushed_at: self.coherence.flushed(vcpu.id),
            requested: self.coherence.requested(vcpu.id),
            events: vcpu.events.borrow().trail(gva).take(crate::tlb::TRAIL_MAX).collect(),
        }
    }
}

#[cfg(test)]
#[path = "link_cache_tests.rs"]
mod tests;
