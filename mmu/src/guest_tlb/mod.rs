//! The guest's own TLB flushes, judged: a model of what its CPUs may still have in their TLBs.
//!
//! Story: with `--check-guest-tlb` the interpreter's bus asks here before each access, and tells of each store, INVLPG, control register
//! and event. The model stands apart from the software TLB and the shadow: it forgets what the *guest* flushes, and never what Umbra
//! drops of its own accord.
//!
//! ```text
//! access --> held? --no--> walk the guest's tables (tables), hold what is there
//!             |yes
//!            does the walk still say so? --yes--> on
//!             |no: the guest has changed an entry, and this CPU has not forgotten the old one
//!            has the old frame been handed on? --no--> legal: the IPI may be under way
//!             |yes
//!            certain (Finding): the run ends
//! ```
//!
//! Holds: INV-GUEST-TLB-1, what is held is what the architecture lets that CPU still use: it is dropped by INVLPG, by MOV CR3 unless it
//! is global, by a change of paging mode, by its own page fault, and by an access that makes the CPU walk anew (a store through a clean
//! entry, an access that the entry does not allow).
//!
//! A stale use is *certain* in two cases:
//! 1. [`Why::OwnEdit`]: the kernel of this CPU itself has entered another frame there and uses the address, with no event in between.
//! 2. [`Why::HandedOn`]: the CPU that edited the entry has let go since (it has been to user mode, switched CR3 or halted), and the old
//!    frame is somebody else's now: it became a page table, a device wrote to it, the guest gave it up, or user code has used it through
//!    an entry made since. While other user entries led to it at the time of the edit, only what came after the last of them is gone
//!    counts. Where a right alone was taken (copy on write), it is the use by user code through another entry that hands it on.
//!
//! *Suspect* is an edit whose CPU lets go while some CPU still holds what it took away (suspects). A strict model has the run end by the
//! first.
//!
//! Locks: a CPU's part, then the tables; below both what reading memory takes. Nothing sleeps.
//!
//! Limits: caches of directory entries are modelled for the editing CPU alone, and for suspects. A kernel that is preempted while it
//! owes a flush, with user threads that race with their own unmapping on a page under a device's hands, may be called certain without
//! a corrupted byte.

mod cpu;
mod report;
mod suspects;
mod tables;
#[cfg(test)]
mod tests;

use crate::access::{Access, AccessKind};
use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE};
use crate::format::{Gpte, Mode};
use crate::lock_order;
use crate::sync::{AtomicBool, AtomicU64, Lock, Ordering};
use crate::vcpu::Vcpu;
use crate::{LocalStack, Mmu};

use cpu::{Cpu, Held};
pub use report::{Finding, HandedOn, LetGo, Missed, Seen, Suspect, Verdicts, Why};
use tables::{Author, Tables, allows};
pub use tables::{Edit, Loss, Memory, Used, Walk, Walked};

/// Suspects that are described; all are counted.
pub const SUSPECTS_LISTED_MAX: usize = 16;
/// Edits of one CPU that wait for it to let go.
const PENDING_MAX: usize = 4096;
/// Flushes of a CPU that are remembered for reports.
const FLUSHES_MAX: usize = 8;
/// Pages of a region.
const REGION_PAGES: usize = 1024;
/// Regions of 4 MiB.
const REGIONS: usize = 1024;

/// Where in the guest's execution something happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// The vCPU.
    pub vcpu: u32,
    /// Its EIP.
    pub eip: u32,
    /// Instructions that it had executed.
    pub instructions: u64,
}

/// How a CPU pages, as the model needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paging {
    /// The mode.
    pub mode: Mode,
    /// The directory of each GiB.
    pub directories: [Option<Gfn>; 4],
    /// Where PAE's four pointers were loaded from.
    pub pointers: Option<Gpa>,
}

impl Paging {
    /// That of a vCPU.
    pub fn of(vcpu: &Vcpu) -> Paging {
        let mode = vcpu.mode();
        let directory = |quarter: u32| vcpu.directory(Gva(quarter << 30));
        Paging {
            mode,
            directories: std::array::from_fn(|quarter| directory(quarter as u32)),
            pointers: (mode.paging && mode.pae).then(|| Gpa(u64::from(vcpu.cr3() & !0x1f))),
        }
    }
}

/// What others look at without the CPU's lock.
#[derive(Debug)]
struct Marks {
    /// Events given to it.
    events: AtomicU64,
    /// When it last let go.
    let_go: AtomicU64,
    halted: AtomicBool,
}

/// The model of a guest's TLBs. Shared by all its vCPUs' threads.
#[derive(Debug)]
pub struct GuestTlb {
    cpus: Box<[Lock<Cpu>]>,
    marks: Box<[Marks]>,
    tables: Lock<Tables>,
    /// Which frames are known tables.
    is_table: Box<[AtomicBool]>,
    /// Counts what happens.
    clock: AtomicU64,
    /// Counts edits.
    epoch: AtomicU64,
    verdicts: Lock<Verdicts>,
    /// Suspects end the run.
    strict: bool,
    /// There are some.
    suspected: AtomicBool,
}

impl GuestTlb {
    /// The model of so many vCPUs, with so many pages of memory.
    pub fn new(vcpus: u32, pages: u32) -> GuestTlb {
        let marks =
            || Marks { events: AtomicU64::new(0), let_go: AtomicU64::new(0), halted: AtomicBool::new(false) };
        GuestTlb {
            cpus: (0..vcpus).map(|_| Lock::new(lock_order::GUEST_CPU, Cpu::new())).collect(),
            marks: (0..vcpus).map(|_| marks()).collect(),
            tables: Lock::new(lock_order::GUEST_TABLES, Tables::new(pages)),
            is_table: (0..pages).map(|_| AtomicBool::new(false)).collect(),
            clock: AtomicU64::new(1),
            epoch: AtomicU64::new(1),
            verdicts: Lock::new(lock_order::GUEST_VERDICTS, Verdicts::default()),
            strict: false,
            suspected: AtomicBool::new(false),
        }
    }

    /// The same, but that a suspect ends the run as what is certain does.
    pub fn strict(self) -> GuestTlb {
        GuestTlb { strict: true, ..self }
    }

    /// The guest has begun anew, and all its vCPUs are outside: none of them holds anything, and nothing is a table. What was found
    /// stays found.
    pub(crate) fn reset(&self) {
        self.cpus.iter().for_each(|cpu| *cpu.lock() = Cpu::new());
        self.marks.iter().for_each(|marks| marks.halted.store(false, Ordering::Release));
        let mut tables = self.tables.lock();
        let edits_seen = tables.edits_seen;
        *tables = Tables::new(self.is_table.len() as u32);
        tables.edits_seen = edits_seen;
        self.is_table.iter().for_each(|known| known.store(false, Ordering::Release));
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// What was found so far.
    pub fn verdicts(&self) -> Verdicts {
        let edits = self.tables.lock().edits_seen;
        Verdicts { edits, ..self.verdicts.lock().clone() }
    }

    fn suspect(&self, suspect: Suspect) {
        self.verdicts.lock().add(suspect);
        self.suspected.store(true, Ordering::Release);
    }

    /// The first suspect, where that is to end the run.
    pub fn suspected(&self) -> Option<Suspect> {
        let ends = self.strict && self.suspected.load(Ordering::Acquire);
        if ends { self.verdicts.lock().listed.first().cloned() } else { None }
    }

    /// Changes whenever an entry does: what was found to agree with the tables before may not any more.
    #[inline]
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn author(&self, site: Site) -> Author {
        let marks = &self.marks[site.vcpu as usize];
        Author {
            site,
            tick: self.tick(),
            events: marks.events.load(Ordering::Relaxed),
            began: marks.let_go.load(Ordering::Relaxed),
        }
    }

    fn is_table(&self, gfn: Gfn) -> bool {
        self.is_table.get(gfn.0 as usize).is_some_and(|known| known.load(Ordering::Acquire))
    }

    /// Tells whoever stores which frames are tables now.
    fn publish(&self, tables: &mut Tables) {
        for (gfn, known) in tables.news.drain(..) {
            if let Some(flag) = self.is_table.get(gfn.0 as usize) {
                flag.store(known, Ordering::Release);
            }
        }
    }

    /// The vCPU of `site` is about to make an access, all of which is in one page. `Some` where it may use a translation that it has
    /// certainly no right to.
    pub fn access(&self, memory: &Memory<'_>, site: Site, gva: Gva, access: Access) -> Option<Box<Finding>> {
        let mut cpu = self.cpus[site.vcpu as usize].lock();
        let mode = cpu.paging.mode;
        if !mode.paging {
            return None;
        }
        let page = gva.0 >> 12;
        let held = cpu.held(page);
        let store = access.kind == AccessKind::Write;
        // Else the CPU walks anew: to set D, or before it faults.
        let serves = held.loaded != 0 && allows(held.rights, mode, access) && (!store || held.dirty);
        let epoch = self.epoch.load(Ordering::Acquire);
        if serves && held.checked == epoch {
            return None;
        }
        let mut tables = self.tables.lock();
        let author = self.author(site);
        let walked = tables.walk(memory, &cpu.paging, gva, &author);
        self.publish(&mut tables);
        match walked {
            Walked::Unknown => None,
            Walked::Page(walk) if serves && walk.gfn == held.gfn && allows(walk.rights, mode, access) => {
                // A right that this access did not want may have gone all the same.
                if held.rights.0 & !walk.rights.0 == 0 {
                    cpu.hold(page, Held { checked: epoch, ..held });
                }
                None
            }
            _ if serves => {
                drop(tables);
                self.judge(&cpu, site, gva, access, &held, walked)
            }
            Walked::Page(walk) if allows(walk.rights, mode, access) => {
                tables.mark(mode, &walk, store);
                self.note_use(&mut tables, mode, &walk, access.user, gva, &author);
                self.publish(&mut tables);
                let Walk { gfn, rights, global, large, leaf, directory, .. } = walk;
                let (eip, instructions) = (site.eip, site.instructions);
                let dirty = walk.dirty || store;
                let loaded = author.tick;
                let held = Held {
                    loaded,
                    checked: epoch,
                    instructions,
                    leaf,
                    directory,
                    gfn,
                    eip,
                    rights,
                    dirty,
                    global,
                    large,
                    assumed: false,
                };
                cpu.hold(page, held);
                None
            }
            // It faults.
            _ => None,
        }
    }

    /// A translation was loaded for user code: whose the frame is now.
    fn note_use(&self, tables: &mut Tables, mode: Mode, walk: &Walk, user: bool, gva: Gva, by: &Author) {
        if !user {
            return;
        }
        if self.is_table(walk.gfn) {
            tables.is_data(walk.gfn, by.tick);
        }
        let leads = |edit: &&Edit| Gpte(edit.new).is_present() && Gpte(edit.new).gfn(mode) == walk.gfn;
        let came = |edit: &&Edit| !Gpte(edit.old).is_present() || Gpte(edit.old).gfn(mode) != walk.gfn;
        let entered =
            tables.edits(walk.leaf).iter().rev().filter(leads).find(came).map_or(0, |edit| edit.tick);
        let used = Used { tick: by.tick, site: by.site, gva, entry: walk.leaf, entered };
        let facts = tables.facts_mut(walk.gfn);
        if facts.used.is_none_or(|before| before.entered <= entered) {
            facts.used = Some(used);
        }
    }

    /// A translation that serves the access, and that the guest's tables do not have any more: is that certainly a mistake?
    fn judge(
        &self,
        cpu: &Cpu,
        site: Site,
        gva: Gva,
        access: Access,
        held: &Held,
        walked: Walked,
    ) -> Option<Box<Finding>> {
        let mode = cpu.paging.mode;
        let tables = self.tables.lock();
        let entries = match walked {
            Walked::Page(walk) => [Some(walk.leaf), Some(walk.directory)],
            Walked::Absent(entry) => [entry, None],
            Walked::Unknown => return None,
        };
        let mut edits: Vec<Edit> =
            entries.into_iter().flatten().flat_map(|entry| tables.edits(entry).to_vec()).collect();
        edits.retain(|edit| edit.tick > held.loaded);
        edits.sort_unstable_by_key(|edit| edit.tick);
        let frame_lost = !matches!(walked, Walked::Page(walk) if walk.gfn == held.gfn);
        let departure = *edits.iter().find(|edit| match frame_lost {
            true => held.large || Gpte(edit.old).gfn(mode) == held.gfn,
            false => Gpte(edit.old).rights(mode).0 & !Gpte(edit.new).rights(mode).0 != 0,
        })?;
        let last = *edits.last()?;
        let kernel = !access.user && !cpu.user;
        let events = self.marks[site.vcpu as usize].events.load(Ordering::Relaxed);
        let own = matches!(walked, Walked::Page(_))
            && frame_lost
            && kernel
            && last.site.vcpu == site.vcpu
            && last.events == events
            && Gpte(last.new).is_present();
        let let_go = self.marks[departure.site.vcpu as usize].let_go.load(Ordering::Relaxed);
        let why = if own {
            Why::OwnEdit
        } else if let_go > departure.tick {
            let facts = tables.facts(held.gfn);
            let handed = match frame_lost {
                true => handed_on(&facts, &departure),
                false => shared_out(&facts, &departure, let_go),
            };
            Why::HandedOn(handed?)
        } else {
            return None;
        };
        Some(Box::new(Finding {
            site,
            gva,
            access,
            gfn: held.gfn,
            rights: held.rights,
            global: held.global,
            loaded: Site { vcpu: site.vcpu, eip: held.eip, instructions: held.instructions },
            loaded_at: held.loaded,
            assumed: held.assumed,
            at: self.tick(),
            mode,
            walked,
            departure,
            let_go: (let_go > departure.tick).then_some(let_go),
            edits,
            flushes: cpu.flushes.clone(),
            why,
        }))
    }

    /// `length` bytes at `gpa`, all in one page, have been stored to by the vCPU of `site`.
    pub fn stored(&self, memory: &Memory<'_>, site: Site, gpa: Gpa, length: u32, user: bool) {
        let mode = {
            let mut cpu = self.cpus[site.vcpu as usize].lock();
            let at =
                cpu.paging.pointers.is_some_and(|at| gpa.0 < at.0 + 32 && gpa.0 + u64::from(length) > at.0);
            if at {
                cpu.pointers_stored = Some(site);
            }
            cpu.paging.mode
        };
        if !self.is_table(gpa.gfn()) {
            let mut bytes = [0; 8];
            if !user && mode.paging && (4..=8).contains(&length) && memory(gpa, &mut bytes[..length as usize])
            {
                self.tables.lock().note_store(mode, gpa, u64::from_le_bytes(bytes), &self.author(site));
            }
            return;
        }
        let (taken, changed) = {
            let mut tables = self.tables.lock();
            let result = tables.refresh(memory, mode, gpa, length, &self.author(site));
            self.publish(&mut tables);
            result
        };
        if changed {
            self.epoch.fetch_add(1, Ordering::AcqRel);
        }
        if !taken.is_empty() {
            let mut cpu = self.cpus[site.vcpu as usize].lock();
            taken.iter().for_each(|taken| self.may_have_loaded(memory, &mut cpu, taken));
            let room = PENDING_MAX.saturating_sub(cpu.pending.len());
            cpu.pending.extend(taken.into_iter().take(room));
        }
    }

    /// A device has written to the page.
    pub fn device_wrote(&self, gfn: Gfn) {
        let tick = self.tick();
        let mut tables = self.tables.lock();
        tables.facts_mut(gfn).device = Some(tick);
        if self.is_table(gfn) {
            // What it has written there nobody has seen: it is to be read anew.
            tables.is_data(gfn, tick);
            self.publish(&mut tables);
            self.epoch.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The guest gives the page up.
    pub fn given_up(&self, gfn: Gfn) {
        let tick = self.tick();
        self.tables.lock().facts_mut(gfn).given_up = Some(tick);
    }

    /// INVLPG.
    pub fn invalidated(&self, site: Site, gva: Gva) {
        let mut cpu = self.cpus[site.vcpu as usize].lock();
        cpu.drop_page(gva.0 >> 12);
        let at = self.tick();
        cpu.note_flush(Seen { at, site, page: Some(gva.page()) });
    }

    /// The vCPU was given a page fault at `gva`: it has forgotten the page.
    pub fn faulted(&self, vcpu: u32, gva: Gva) {
        self.cpus[vcpu as usize].lock().drop_page(gva.0 >> 12);
    }

    /// The vCPU was given an event: what it did before and does now are not one stretch of code.
    pub fn event(&self, vcpu: u32) {
        let marks = &self.marks[vcpu as usize];
        marks.events.fetch_add(1, Ordering::Relaxed);
        marks.halted.store(false, Ordering::Release);
    }

    /// Paging, CR3 or the privilege have become these. `flush`: the architecture has flushed all that is not global.
    pub fn control(&self, memory: &Memory<'_>, site: Site, paging: Paging, flush: bool, user: bool) {
        let how = {
            let mut cpu = self.cpus[site.vcpu as usize].lock();
            let before = std::mem::replace(&mut cpu.paging, paging);
            if before.mode.pae != paging.mode.pae {
                let mut tables = self.tables.lock();
                tables.forget_all();
                self.publish(&mut tables);
            }
            if flush || before.mode != paging.mode {
                cpu.drop_all_but(before.mode == paging.mode && paging.mode.global_pages);
                cpu.pointers_stored = None;
                let at = self.tick();
                cpu.note_flush(Seen { at, site, page: None });
            }
            let was_user = std::mem::replace(&mut cpu.user, user);
            match () {
                () if user && !was_user => Some(LetGo::User),
                () if before.directories != paging.directories => Some(LetGo::Cr3),
                () => None,
            }
        };
        if let Some(how) = how {
            self.let_go(memory, site, how);
        }
    }

    /// The vCPU has executed HLT.
    pub fn halted(&self, memory: &Memory<'_>, site: Site) {
        self.marks[site.vcpu as usize].halted.store(true, Ordering::Release);
        self.let_go(memory, site, LetGo::Halt);
    }
}

/// Whose the frame has become since it was taken away from an entry.
fn handed_on(facts: &tables::Facts, departure: &Edit) -> Option<HandedOn> {
    let since = if departure.shared { facts.free.max(departure.tick) } else { departure.tick };
    if departure.shared && facts.free < departure.tick {
        return None;
    }
    if let Some(at) = facts.given_up.filter(|at| *at > since) {
        return Some(HandedOn::GivenUp { at });
    }
    if let Some((at, by)) = facts.table.filter(|(at, _)| *at > since) {
        return Some(HandedOn::Table { at, by });
    }
    let used = facts.used.filter(|used| used.entered > since && used.entry != departure.entry);
    if let Some(used) = used {
        return Some(HandedOn::Used(used));
    }
    facts.device.filter(|at| *at > since).map(|at| HandedOn::Device { at })
}

/// Whether somebody else uses a frame that an entry may not be written through any more.
fn shared_out(facts: &tables::Facts, departure: &Edit, let_go: u64) -> Option<HandedOn> {
    let used = facts.used?;
    let other = used.entry != departure.entry && !departure.shared;
    (other && used.entered > departure.began && used.tick > departure.tick && let_go > departure.tick)
        .then_some(HandedOn::Used(used))
}

impl Mmu {
    /// The same, with a judge of the guest's own flushes, strict or not. Before anything uses it.
    pub fn with_guest_tlb(self, strict: bool) -> Mmu {
        let model = GuestTlb::new(self.config.vcpus, self.config.guest_pages);
        let model = if strict { model.strict() } else { model };
        Mmu { guest_tlb: Some(Box::new(model)), ..self }
    }

    /// The judge of the guest's own flushes, if there is one.
    #[inline]
    pub fn guest_tlb(&self) -> Option<&GuestTlb> {
        self.guest_tlb.as_deref()
    }

    /// Reads memory for the model: what is not at hand it does without.
    pub fn read_at_hand(&self, window: &LocalStack, gpa: Gpa, buffer: &mut [u8]) -> bool {
        self.read_bytes(window, gpa, buffer).is_ok()
    }

    /// Where a store at `gva` has just gone to by `vcpu`'s TLB; `None` where it has forgotten that.
    pub fn tlb_place(&self, vcpu: &Vcpu, gva: Gva, user: bool) -> Option<Gpa> {
        let mfn = self.tlb_translate(vcpu, gva, Access::write(user)).ok()?;
        let gfn = self.frames.gfn(mfn)?;
        Some(Gpa(u64::from(gfn.0) * PAGE_SIZE + u64::from(gva.offset())))
    }
}
