//! Suspects: who still holds what was taken away, when whoever took it lets go.
//!
//! Story: a suspect is an edit whose CPU lets go while some CPU still holds what it took away. A CPU that halts then, or is in
//! its kernel, is asked later: when it goes to user mode, or halts again. For an accessed bit that was taken, which nobody waits for,
//! it may go to user mode twice. Entries of the kernel that became absent are no suspects: to flush them late is what windows do. A
//! table that was taken out of its directory is suspect if the CPU that did it has flushed nothing at all since.
//!
//! Speculation: an entry with A may be in the TLB of a CPU that never used it. This is assumed of the CPU that edits it, which is why
//! a copy on write needs its INVLPG though the fault had the CPU forget the page.
//!
//! Locks: a CPU's part, then the tables, as everywhere in the model.

use super::cpu::{Cpu, Held, Owed};
use super::report::{LetGo, Suspect};
use super::tables::{Author, Loss, Memory, Taken, Walked};
use super::{GuestTlb, PENDING_MAX, Site};
use crate::addr::{Gfn, Gva};
use crate::format::Gpte;
use crate::sync::Ordering;

/// How often a CPU may go to user mode with an accessed bit that another has taken: it may have been behind its look, and an NMI looks
/// at nothing.
pub(super) const GRACE: u32 = 2;

impl GuestTlb {
    /// A CPU may load a translation that nobody has asked for, from an entry with A: that of the editor itself has, if it could.
    pub(super) fn may_have_loaded(&self, memory: &Memory<'_>, cpu: &mut Cpu, taken: &Taken) {
        let Taken { edit, loss, first_page: page, pages } = *taken;
        let old = Gpte(edit.old);
        let takes = loss == Loss::Frame || loss == Loss::Right;
        if !takes || pages != 1 || !old.is_accessed() || cpu.held(page).loaded != 0 {
            return;
        }
        let mode = cpu.paging.mode;
        let author = Author { site: edit.site, tick: edit.tick, events: edit.events, began: edit.began };
        let mut tables = self.tables.lock();
        let (leaf, directory) = tables.entries_for(memory, &cpu.paging, Gva(page << 12), &author);
        self.publish(&mut tables);
        let Some(directory) = directory.filter(|_| leaf == Some(edit.entry)) else { return };
        let held = Held {
            loaded: edit.tick - 1,
            checked: 0,
            instructions: edit.site.instructions,
            leaf: edit.entry,
            directory,
            gfn: old.gfn(mode),
            eip: edit.site.eip,
            rights: old.rights(mode).and(tables.rights_at(mode, directory)),
            dirty: old.is_dirty(),
            global: old.is_global() && mode.global_pages,
            large: false,
            assumed: true,
        };
        cpu.hold(page, held);
    }

    /// Whatever the vCPU had begun with its tables should be over.
    pub(super) fn let_go(&self, memory: &Memory<'_>, site: Site, how: LetGo) {
        let tick = self.tick();
        self.marks[site.vcpu as usize].let_go.store(tick, Ordering::Relaxed);
        let (pending, pointers) = {
            let mut cpu = self.cpus[site.vcpu as usize].lock();
            self.settle(memory, &mut cpu, site, how);
            let pointers = if how == LetGo::User { cpu.pointers_stored.take() } else { None };
            (std::mem::take(&mut cpu.pending), pointers)
        };
        if let Some(stored) = pointers {
            self.suspect(Suspect::Pointers { stored, let_go: how });
        }
        for taken in &pending {
            if let Some(suspect) = self.still_held(memory, site, taken, how) {
                self.suspect(suspect);
            }
        }
    }

    /// What others have left to this CPU to forget.
    fn settle(&self, memory: &Memory<'_>, cpu: &mut Cpu, site: Site, how: LetGo) {
        let events = self.marks[site.vcpu as usize].events.load(Ordering::Relaxed);
        for mut owed in std::mem::take(&mut cpu.owed) {
            let Some((gva, gfn)) = self.owes(memory, cpu, site, &owed.taken) else { continue };
            let due = match how {
                LetGo::User => true,
                // It looks when it goes on, and halts again after that.
                LetGo::Halt => owed.taken.loss == Loss::Frame && owed.events != events,
                LetGo::Cr3 => false,
            };
            if due && owed.grace == 0 {
                let Owed { taken: Taken { edit, loss, .. }, let_go, .. } = owed;
                self.suspect(Suspect::Held { edit, loss, gva, gfn, vcpu: site.vcpu, let_go });
            } else {
                owed.grace = owed.grace.saturating_sub(u32::from(due));
                cpu.owed.push(owed);
            }
        }
    }

    /// Who still holds what an edit of `site`'s vCPU has taken away.
    fn still_held(&self, memory: &Memory<'_>, site: Site, taken: &Taken, how: LetGo) -> Option<Suspect> {
        let Taken { edit, loss, .. } = *taken;
        for (vcpu, marks) in (0..).zip(&self.marks) {
            let own = vcpu == site.vcpu;
            let mut cpu = self.cpus[vcpu as usize].lock();
            let Some((gva, gfn)) = self.owes(memory, &cpu, site, taken) else {
                if own && self.caches_table(memory, &cpu, site, taken) {
                    return Some(Suspect::Table { edit, let_go: how });
                }
                continue;
            };
            let halted = marks.halted.load(Ordering::Acquire);
            // It may have just been woken, and not have looked yet.
            let looks = halted || !cpu.user;
            if own || !(looks || loss == Loss::Status) {
                return Some(Suspect::Held { edit, loss, gva, gfn, vcpu, let_go: how });
            }
            // It may look at what it has missed before it goes on; for an accessed bit nobody is asked: the next trap does.
            if cpu.owed.len() < PENDING_MAX {
                let events = marks.events.load(Ordering::Relaxed);
                let grace = if loss == Loss::Status { GRACE } else { 0 };
                cpu.owed.push(Owed { taken: *taken, let_go: how, events, grace });
            }
        }
        None
    }

    /// A page, and its frame, that the CPU still holds by the entry that has been edited.
    fn owes(&self, memory: &Memory<'_>, cpu: &Cpu, site: Site, taken: &Taken) -> Option<(Gva, Gfn)> {
        for page in taken.first_page..taken.first_page + taken.pages {
            let held = cpu.held(page);
            if held.loaded == 0 || held.loaded > taken.edit.tick || !held.came_by(taken.edit.entry) {
                continue;
            }
            let gva = Gva(page << 12);
            let walked = {
                let mut tables = self.tables.lock();
                let walked = tables.walk(memory, &cpu.paging, gva, &self.author(site));
                self.publish(&mut tables);
                walked
            };
            let owed = match (taken.loss, walked) {
                (_, Walked::Unknown) | (Loss::None, _) => false,
                (Loss::Status, Walked::Page(walk)) => walk.gfn == held.gfn,
                (Loss::Right, Walked::Page(walk)) => {
                    walk.gfn == held.gfn && held.rights.0 & !walk.rights.0 != 0
                }
                (Loss::Frame, Walked::Page(walk)) => walk.gfn != held.gfn,
                (Loss::Frame, Walked::Absent(_)) => held.rights.user(),
                (_, Walked::Absent(_)) => false,
            };
            if owed {
                return Some((gva, held.gfn));
            }
        }
        None
    }

    /// The CPU that has taken a table out of its own directory has flushed nothing since, and may still walk through it.
    fn caches_table(&self, memory: &Memory<'_>, cpu: &Cpu, site: Site, taken: &Taken) -> bool {
        let Taken { edit, loss, first_page, pages } = *taken;
        let old = Gpte(edit.old);
        if loss != Loss::Frame || pages == 1 || !old.is_accessed() || cpu.flushed > edit.tick {
            return false;
        }
        let mut tables = self.tables.lock();
        let gva = Gva(first_page << 12);
        let (_, directory) = tables.entries_for(memory, &cpu.paging, gva, &self.author(site));
        self.publish(&mut tables);
        directory == Some(edit.entry)
    }
}
