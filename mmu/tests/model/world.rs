//! An [`Mmu`] and its naive twin, driven in step; the rule of the whole test suite is in [`World::touch`].
//!
//! ```text
//! access --> hardware walks the shadow --ok--> was that translation one the guest's CPU may use?
//!                 |                                     (now, or cached since the last invalidation)
//!               trap --> Mmu::fault --Fixed--> again: now it must be what memory says now
//!                            |--Guest---> the naive walk must fault alike: code, CR2, A and D
//!                            |--Emulate-> Mmu::translate + Mmu::store, as the VMM will
//! ```
//!
//! A CPU here enters and leaves the guest as a backend does: flush requests are looked at on entry alone, and a kick
//! makes it leave.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use umbra_mmu::discard::Discard;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::PageState;
use umbra_mmu::records::Cause;
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::{
    Access, AccessKind, Beyond, Config, Context, Flush, Gfn, Gpa, Gva, LocalStack, Machine, Miss, Mmu, Mode,
    NotLoaded, Outcome, PageFault, Refill, Refusal, Rules, Shootdown, TlbKind, Vcpu, Width,
};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::hardware::{self, Tlb};
use super::memory::Memory;
use super::tlb_rules::TlbRules;
use super::walker::{self, Control, Fault, Kind, Request};

/// A difference between the mmu crate and the naive twin, told in full.
#[derive(Debug)]
pub struct Wrong(pub String);

/// What the CPUs of a world remember translations in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caches {
    /// Hardware, as the naive twin has it: PCIDs, paging-structure caches, nothing flushed but everything.
    Hardware(hardware::Memory),
    /// The mmu's own TLB.
    Soft(TlbKind),
}

/// The sizes of a world.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub guest_pages: u32,
    pub machine_frames: u32,
    pub shadow_pages_max: u32,
    pub vcpus: u32,
    pub tlb: Caches,
}

/// What an access came to within the guest.
enum Reached {
    Memory(u64),
    Fault(PageFault),
    Nothing,
}

#[derive(Debug)]
pub struct Cpu {
    pub vcpu: Vcpu,
    pub control: Control,
    pub rules: TlbRules,
    /// None where the vCPU has a TLB in software.
    tlb: Option<Tlb>,
    /// The privilege whose root is loaded, while it runs guest code.
    running: Option<bool>,
}

#[derive(Debug)]
pub struct World {
    pub mmu: Arc<Mmu>,
    pub memory: Memory,
    pub cpus: Vec<Cpu>,
    machine: Arc<MmapRegion>,
    /// Machine frame -> guest frame.
    owners: HashMap<u64, u64>,
    inside: Arc<[AtomicBool]>,
    closed: Vec<Gfn>,
    /// Frames whose stores the VMM wants to see.
    watched: HashSet<u64>,
}

/// Where the bytes of an access are to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Machine {
        address: u64,
        physical: u64,
    },
    /// Nowhere that the hardware could reach: the VMM makes the access.
    Emulate,
}

/// How an access went, where it went as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Made; what a read gave.
    Value(u64),
    /// The guest was given this fault.
    Fault(Fault),
}

/// A kick makes a CPU leave the guest.
struct Kick {
    mmu: Arc<OnceLock<Weak<Mmu>>>,
    inside: Arc<[AtomicBool]>,
}

impl Shootdown for Kick {
    fn kick(&self, vcpu: u32) {
        if let Some(mmu) = self.mmu.get().and_then(Weak::upgrade) {
            self.inside[vcpu as usize].store(false, Ordering::SeqCst);
            mmu.coherence().leave_guest(vcpu);
        }
    }
}

/// The part of an access that lies in one page: its address, offset in the access, and size.
fn parts(va: u32, size: u32) -> impl Iterator<Item = (u32, u32, u32)> {
    let first = size.min(4096 - (va & 0xfff));
    let second = (va.wrapping_add(first), first, size - first);
    std::iter::once((va, 0, first)).chain((size > first).then_some(second))
}

fn access_of(r: Request) -> Access {
    let kind = match r.kind {
        Kind::Read => AccessKind::Read,
        Kind::Write => AccessKind::Write,
        Kind::Fetch => AccessKind::Execute,
    };
    Access { kind, user: r.user }
}

fn fault_of(fault: PageFault) -> Fault {
    Fault { code: fault.code.bits(), cr2: fault.gva.0 }
}

fn width_of(size: u32) -> Option<Width> {
    [Width::B1, Width::B2, Width::B4, Width::B8].into_iter().find(|w| w.bytes() == size)
}

impl World {
    pub fn new(sizes: Sizes) -> World {
        World::by_rules(sizes, Rules::default())
    }

    /// One whose MMU goes by these rules.
    pub fn by_rules(sizes: Sizes, rules: Rules) -> World {
        let machine =
            Arc::new(MmapRegion::new(sizes.machine_frames as usize * 4096).expect("memory for a test"));
        let config = Config {
            reserved_frames: 2,
            shadow_pages_max: sizes.shadow_pages_max,
            roots_max: 8,
            vcpus: sizes.vcpus,
            ..Config::of_pages(sizes.guest_pages)
        };
        let inside: Arc<[AtomicBool]> = (0..sizes.vcpus).map(|_| AtomicBool::new(false)).collect();
        let kick = Kick { mmu: Arc::default(), inside: inside.clone() };
        let back = kick.mmu.clone();
        let swap = Box::new(MemorySwap::new(sizes.guest_pages));
        let mmu = Mmu::new(Machine::new(machine.clone()), config, Box::new(kick));
        let mmu = Arc::new(mmu.with_swap(swap).with_rules(rules));
        back.set(Arc::downgrade(&mmu)).expect("set once");
        let cpu = |id| Cpu {
            vcpu: match sizes.tlb {
                Caches::Hardware(_) => mmu.vcpu(id),
                Caches::Soft(kind) => mmu.soft_vcpu(id, kind),
            },
            control: Control::default(),
            rules: TlbRules::default(),
            tlb: match sizes.tlb {
                Caches::Hardware(memory) => Some(Tlb::new(memory)),
                Caches::Soft(_) => None,
            },
            running: None,
        };
        World {
            cpus: (0..sizes.vcpus).map(cpu).collect(),
            memory: Memory::new(sizes.guest_pages as usize),
            mmu,
            machine,
            owners: HashMap::new(),
            inside,
            closed: Vec::new(),
            watched: HashSet::new(),
        }
    }

    // ---- What a guest does ----

    pub fn read(&mut self, cpu: usize, va: u32, size: u32, r: Request) -> Result<Done, Wrong> {
        let places = match self.touch_all(cpu, va, size, r)? {
            Ok(places) => places,
            Err(fault) => return Ok(Done::Fault(fault)),
        };
        let mut value = 0;
        for ((part, shift, size), place) in parts(va, size).zip(places) {
            let Place::Machine { address, physical } = place else { continue };
            let mut bytes = [0; 8];
            let slice = self.machine.as_volatile_slice();
            slice.read_slice(&mut bytes[..size as usize], address as usize).expect("within the machine");
            let (got, want) = (u64::from_le_bytes(bytes), self.memory.read(physical, size));
            if got != want {
                let text = format!("read {got:#x}, memory at {physical:#x} has {want:#x}");
                return Err(self.wrong(cpu, part, r, &text));
            }
            value |= got << (8 * shift);
        }
        Ok(Done::Value(value))
    }

    pub fn write(&mut self, cpu: usize, va: u32, size: u32, user: bool, value: u64) -> Result<Done, Wrong> {
        let r = Request { kind: Kind::Write, user };
        let places = match self.touch_all(cpu, va, size, r)? {
            Ok(places) => places,
            Err(fault) => return Ok(Done::Fault(fault)),
        };
        if places.contains(&Place::Emulate) {
            return self.emulate(cpu, va, size, r, value);
        }
        for ((_, shift, size), place) in parts(va, size).zip(places) {
            let Place::Machine { address, physical } = place else { continue };
            let bytes = (value >> (8 * shift)).to_le_bytes();
            let slice = self.machine.as_volatile_slice();
            slice.write_slice(&bytes[..size as usize], address as usize).expect("within the machine");
            self.memory.write(physical, size, value >> (8 * shift));
        }
        Ok(Done::Value(0))
    }

    /// An access that the VMM makes for the guest: the interpreter's road. A read returns what it read.
    pub fn emulate(&mut self, cpu: usize, va: u32, size: u32, r: Request, value: u64) -> Result<Done, Wrong> {
        self.leave(cpu);
        let mut targets = Vec::new();
        for (part, ..) in parts(va, size) {
            let got = loop {
                match self.mmu.translate(&self.cpus[cpu].vcpu, Gva(part), access_of(r)) {
                    Ok(gpa) => break Ok(gpa.0),
                    Err(Refusal::Fault(fault)) => break Err(fault_of(fault)),
                    Err(Refusal::Need(gfn)) => self.bring_in(cpu, gfn),
                }
            };
            match self.expect_walk(cpu, part, r, got)? {
                Ok(physical) => targets.push(physical),
                Err(fault) => return Ok(Done::Fault(fault)),
            }
        }
        let mut read = 0;
        for ((part, shift, size), physical) in parts(va, size).zip(targets) {
            let bits = value >> (8 * shift) & u64::MAX >> (64 - 8 * size);
            read |= self.emulate_part(cpu, part, size, r, physical, bits)? << (8 * shift);
        }
        Ok(Done::Value(read))
    }

    /// Runs on in the guest without an access of note: the hardware may load any translation.
    pub fn speculate(&mut self, cpu: usize, va: u32, user: bool) -> Result<(), Wrong> {
        let root = self.enter(cpu, user)?;
        let Cpu { tlb, vcpu, .. } = &mut self.cpus[cpu];
        match tlb {
            Some(tlb) => tlb.speculate(&self.machine, root, va),
            None => drop(self.mmu.tlb_translate(vcpu, Gva(va), Access::read(user))),
        }
        Ok(())
    }

    /// INVLPG.
    pub fn invalidate(&mut self, cpu: usize, va: u32) {
        self.leave(cpu);
        self.mmu.invalidate_page(&self.cpus[cpu].vcpu, Gva(va));
        let now = self.memory.tick();
        self.cpus[cpu].rules.invalidate(va, now);
    }

    /// A change of control registers; `flush`: one that the SDM says flushes (and loads the PDPTEs).
    pub fn set_control(&mut self, cpu: usize, new: Control, flush: bool) -> Result<(), Wrong> {
        self.leave(cpu);
        let old = self.cpus[cpu].control;
        let loads = flush && new.pg && new.pae;
        let want = if loads { walker::load_pdptes(&self.memory, new.cr3) } else { Ok(old.pdpte) };
        let mode = Mode {
            paging: new.pg,
            pae: new.pae,
            pse: new.pse,
            write_protect: new.wp,
            no_execute: new.nxe,
            smep: new.smep,
            global_pages: new.pge,
        };
        let keeps_global = self.cpus[cpu].tlb.is_none() && new.pge && mode == self.cpus[cpu].vcpu.mode();
        let how = if flush { Flush::Yes } else { Flush::No };
        let got = loop {
            match self.mmu.set_paging(&mut self.cpus[cpu].vcpu, mode, new.cr3, how) {
                Err(NotLoaded::Need(gfn)) => self.bring_in(cpu, gfn),
                got => break got,
            }
        };
        match (want, got) {
            (Ok(pdpte), Ok(())) => {
                self.cpus[cpu].control = Control { pdpte, ..new };
                if flush {
                    let now = self.memory.tick();
                    if keeps_global {
                        self.cpus[cpu].rules.flush_but_global(now);
                    } else {
                        self.cpus[cpu].rules.flush(now);
                    }
                    let horizon = self.cpus.iter().map(|c| c.rules.horizon()).min().unwrap_or(0);
                    self.memory.forget_before(horizon);
                }
                Ok(())
            }
            (Err((index, value)), Err(NotLoaded::Bad(bad))) if (index, value) == (bad.index, bad.value) => {
                Ok(())
            }
            (want, got) => Err(Wrong(format!("PDPTEs of CR3 {:#x}: {got:x?}, naive {want:x?}", new.cr3))),
        }
    }

    // ---- What others do ----

    /// A device writes guest memory (beyond memory: nothing happens).
    pub fn device_write(&mut self, physical: u64, bytes: &[u8]) {
        let written =
            self.mmu.write_bytes_sleeping(None, &LocalStack::new(Context::Host), Gpa(physical), bytes);
        for (n, byte) in bytes.iter().enumerate() {
            self.memory.write(physical + n as u64, 1, u64::from(*byte));
        }
        assert!(written.is_ok() || !self.memory.has(physical + bytes.len() as u64 - 1), "{written:?}");
    }

    /// A store of `size` bytes (4 or 8, aligned) from outside.
    pub fn poke(&mut self, physical: u64, size: u32, value: u64) {
        let width = width_of(size).expect("4 or 8 bytes");
        while let Err(refused) = self.mmu.store(&LocalStack::new(Context::Host), Gpa(physical), width, value)
        {
            let Beyond::Need(gfn) = refused else { panic!("a poke of memory: {refused}") };
            self.mmu.bring_in(None, gfn).expect("there is room");
        }
        self.memory.write(physical, size, value);
    }

    /// A page that is not in memory is brought in, for a CPU that is outside.
    fn bring_in(&mut self, cpu: usize, gfn: Gfn) {
        self.leave(cpu);
        self.mmu.bring_in(Some(cpu as u32), gfn).expect("there is room");
        self.owners.clear();
    }

    /// The VMM sends pages to swap.
    pub fn page_out(&mut self, first: u32, count: u32) {
        let pages: Vec<Gfn> = (first..first + count).map(Gfn).collect();
        self.mmu.page_out(None, &pages).expect("swap has room");
        self.owners.clear();
    }

    /// The VMM wants some frames back, whichever.
    pub fn reclaim(&mut self, count: u32) {
        self.mmu.reclaim(count, Cause::Reclaim, None).expect("swap has room");
        self.owners.clear();
    }

    /// The VMM cuts or raises the budget, and has the background bring it about.
    pub fn set_budget(&mut self, over: u32) {
        let frames = (self.mmu.budget_min() + over).min(self.mmu.budget_max());
        self.mmu.set_budget(frames).expect("within the bounds");
        while self.mmu.background_round().expect("swap has room") {}
        self.owners.clear();
    }

    /// The contents of pages are thrown away, or the pages themselves are.
    pub fn discard(&mut self, first: u32, count: u32, what: Discard) {
        let end = (first + count).min(self.memory.page_count());
        let watched = |gfn: &u32| self.watched.contains(&u64::from(*gfn));
        if (first..end).any(|gfn| watched(&gfn)) {
            return;
        }
        self.open_gates();
        self.mmu.discard(None, first..end, what, May::Sleep).expect("nothing holds them");
        for at in (first..end).flat_map(|gfn| (0..512).map(move |n| (u64::from(gfn) << 12) + n * 8)) {
            if self.memory.word(at) != 0 {
                self.memory.write(at, 8, 0);
            }
        }
        self.owners.clear();
    }

    /// As if every CPU had flushed: for tests whose hardware has no TLB. One in software does flush.
    pub fn forget_past(&mut self) {
        let now = self.memory.tick();
        for cpu in &mut self.cpus {
            cpu.rules.flush(now);
            cpu.vcpu.tlb().inspect(|tlb| tlb.flush_all());
        }
        self.memory.forget_before(now);
    }

    /// The VMM begins to watch the stores to a frame.
    pub fn watch(&mut self, cpu: usize, gfn: u32) -> Result<(), Wrong> {
        self.leave(cpu);
        let done = self.mmu.watch(&self.cpus[cpu].vcpu, Gfn(gfn));
        self.watched.insert(u64::from(gfn));
        match done == Ok(true) && self.mmu.is_watched(Gfn(gfn)) {
            true => Ok(()),
            false => Err(Wrong(format!("frame {gfn:#x} cannot be watched"))),
        }
    }

    /// And ends.
    pub fn unwatch(&mut self, gfn: u32) {
        self.mmu.unwatch(Gfn(gfn));
        self.watched.remove(&u64::from(gfn));
    }

    /// Closes the gate of a frame, until a fault runs into it.
    pub fn close_gate(&mut self, gfn: u32) {
        self.mmu.buckets().close(Gfn(gfn));
        self.closed.push(Gfn(gfn));
    }

    /// Opens every gate.
    pub fn open_gates(&mut self) {
        for gfn in self.closed.drain(..) {
            self.mmu.buckets().open(gfn);
        }
    }

    /// The CPU leaves the guest, as for an exit of any kind.
    pub fn leave(&mut self, cpu: usize) {
        self.cpus[cpu].running = None;
        self.inside[cpu].store(false, Ordering::SeqCst);
        self.mmu.leave(&self.cpus[cpu].vcpu);
    }

    // ---- The checks ----

    /// The audit must find nothing.
    pub fn audit(&self) -> Result<(), Wrong> {
        match self.mmu.audit() {
            findings if findings.is_empty() => Ok(()),
            findings => Err(Wrong(format!("audit: {findings:#?}"))),
        }
    }

    /// All of guest memory must be alike.
    pub fn compare_memory(&self) -> Result<(), Wrong> {
        for (page, words) in self.memory.pages() {
            for (index, want) in words.iter().enumerate() {
                let at = (u64::from(page) << 12) + index as u64 * 8;
                let got = self.guest_word(at);
                if got != *want {
                    return Err(Wrong(format!("memory at {at:#x} is {got:#x}, naive {want:#x}")));
                }
            }
        }
        Ok(())
    }

    /// The word of guest memory at `physical`, straight from the machine; zero where there is no frame.
    pub fn guest_word(&self, physical: u64) -> u64 {
        let gfn = Gfn((physical >> 12) as u32);
        if matches!(self.mmu.p2m().lookup(gfn), PageState::Swapped(_)) {
            let mut word = [0; 8];
            let at = Gpa(physical & !7);
            self.mmu
                .read_bytes_sleeping(None, &LocalStack::new(Context::Host), at, &mut word)
                .expect("memory");
            return u64::from_le_bytes(word);
        }
        match self.mmu.p2m().lookup(gfn) {
            PageState::Resident(mfn) => {
                let at = u64::from(mfn.0) << 12 | physical & 0xff8;
                hardware::word(&self.machine, at).load(Ordering::Acquire)
            }
            _ => 0,
        }
    }

    /// What the shadow allows for `va` right now, by a walk of its own: the machine address.
    pub fn shadow_allows(&self, cpu: usize, va: u32, r: Request) -> Option<u64> {
        let root = self.mmu.root_address(&self.cpus[cpu].vcpu, r.user)?;
        Tlb::new(hardware::Memory::None).access(&self.machine, root.0, va, r.kind).ok()
    }

    /// The guest frame in the machine frame of `address`.
    pub fn physical_of(&mut self, address: u64) -> Option<u64> {
        let frame = address >> 12;
        if !self.owners.contains_key(&frame) {
            let owners = &mut self.owners;
            self.mmu.p2m().for_each_resident(|gfn, mfn| {
                owners.insert(u64::from(mfn.0), u64::from(gfn.0));
            });
        }
        self.owners.get(&frame).map(|gfn| gfn << 12 | address & 0xfff)
    }

    /// Compares a walk of the mmu's with the naive one, which it makes: the result, and A and D on the way.
    pub fn expect_walk(
        &mut self,
        cpu: usize,
        va: u32,
        r: Request,
        got: Result<u64, Fault>,
    ) -> Result<Result<u64, Fault>, Wrong> {
        let control = self.cpus[cpu].control;
        let before = walker::dump(&self.memory, &control, va);
        let want = walker::access(&mut self.memory, &control, va, r);
        if got != want {
            let text = format!("got {got:x?}, naive {want:x?}; before it\n{before}");
            return Err(self.wrong(cpu, va, r, &text));
        }
        for at in walker::entries(&self.memory, &control, va) {
            let (got, want) = (self.guest_word(at.address), self.memory.word(at.address));
            if got != want {
                let text = format!(
                    "the entry at {:#x} is {got:#x}, naive {want:#x}; before it\n{before}",
                    at.address
                );
                return Err(self.wrong(cpu, va, r, &text));
            }
        }
        if let Err(fault) = want {
            let now = self.memory.tick();
            self.cpus[cpu].rules.fault(fault.cr2, now);
        }
        Ok(want)
    }

    /// Everything there is to know about a difference.
    pub fn wrong(&self, cpu: usize, va: u32, r: Request, text: &str) -> Wrong {
        let dump = walker::dump(&self.memory, &self.cpus[cpu].control, va);
        let explained = self.mmu.explain(&self.cpus[cpu].vcpu, Gva(va));
        Wrong(format!("cpu {cpu}, {r:?} at {va:#x}: {text}\nnow {dump}{explained}"))
    }

    // ---- The rule ----

    fn touch_all(
        &mut self,
        cpu: usize,
        va: u32,
        size: u32,
        r: Request,
    ) -> Result<Result<Vec<Place>, Fault>, Wrong> {
        // An instruction whose second page trapped begins again, since its first may have gone meanwhile.
        for _ in 0..4 {
            let mut places = Vec::new();
            let mut trapped = false;
            for (part, ..) in parts(va, size) {
                match self.touch(cpu, part, r, &mut trapped)? {
                    Ok(place) => places.push(place),
                    Err(fault) => return Ok(Err(fault)),
                }
            }
            if !trapped || places.len() == 1 || places.contains(&Place::Emulate) {
                return Ok(Ok(places));
            }
        }
        Err(self.wrong(cpu, va, r, "no progress: the two pages of an access chase each other"))
    }

    /// One access within a page: by the hardware, with the mmu's help.
    fn touch(
        &mut self,
        cpu: usize,
        va: u32,
        r: Request,
        trapped: &mut bool,
    ) -> Result<Result<Place, Fault>, Wrong> {
        let mut fixed = false;
        for _ in 0..3 {
            let outcome = match self.try_reach(cpu, va, r)? {
                Reached::Memory(address) => {
                    return self.judge_success(cpu, va, r, address, fixed).map(Ok);
                }
                Reached::Fault(fault) => Outcome::Guest(fault),
                Reached::Nothing => self.trap(cpu, va, r),
            };
            *trapped = true;
            let got = self.said_by(cpu, va, r, outcome)?;
            let physical = match self.expect_walk(cpu, va, r, got)? {
                Ok(physical) => physical,
                Err(fault) => return Ok(Err(fault)),
            };
            let device = !self.memory.has(physical);
            if outcome == Outcome::Fixed && self.closed.contains(&Gfn((physical >> 12) as u32)) {
                return Err(self.wrong(cpu, va, r, "mapped behind a closed gate"));
            }
            match outcome {
                Outcome::Emulate(_) if r.kind == Kind::Write && !device => return Ok(Ok(Place::Emulate)),
                Outcome::Mmio(_) if device => return Ok(Ok(Place::Emulate)),
                Outcome::Fixed | Outcome::Spurious if !device => fixed = true,
                Outcome::Gate(_) if !self.closed.is_empty() => self.open_gates(),
                _ => return Err(self.wrong(cpu, va, r, &format!("{outcome:?} for {physical:#x}"))),
            }
        }
        Err(self.wrong(cpu, va, r, "fixed, and faults again"))
    }

    /// What the CPU reaches for `va` from within the guest: by itself, or by what is done without leaving.
    fn try_reach(&mut self, cpu: usize, va: u32, r: Request) -> Result<Reached, Wrong> {
        let root = self.enter(cpu, r.user)?;
        if let Some(address) = self.reach(cpu, root, va, r)? {
            return Ok(Reached::Memory(address));
        }
        match self.mmu.tlb_refill(&self.cpus[cpu].vcpu, Gva(va), access_of(r)) {
            // A lossy TLB may have forgotten it again.
            Refill::Done => Ok(self.reach(cpu, root, va, r)?.map_or(Reached::Nothing, Reached::Memory)),
            Refill::Guest(fault) => Ok(Reached::Fault(fault)),
            Refill::Beyond => Ok(Reached::Nothing),
        }
    }

    /// The mmu's answer to a page fault, once what it needs is in memory.
    fn trap(&mut self, cpu: usize, va: u32, r: Request) -> Outcome {
        self.leave(cpu);
        loop {
            match self.mmu.fault(&self.cpus[cpu].vcpu, Gva(va), access_of(r)) {
                Outcome::Need(gfn) => self.bring_in(cpu, gfn),
                outcome => return outcome,
            }
        }
    }

    /// What an outcome says of the walk behind it: where it led, or which fault it ended in.
    fn said_by(
        &self,
        cpu: usize,
        va: u32,
        r: Request,
        outcome: Outcome,
    ) -> Result<Result<u64, Fault>, Wrong> {
        match outcome {
            Outcome::Guest(fault) => Ok(Err(fault_of(fault))),
            Outcome::Emulate(gpa) | Outcome::Mmio(gpa) => Ok(Ok(gpa.0)),
            Outcome::Fixed | Outcome::Spurious | Outcome::Gate(_) => {
                let now = walker::look(&self.memory, &self.cpus[cpu].control, va);
                Ok(now.map(|t| t.physical).ok_or(Fault { code: !0, cr2: va }))
            }
            Outcome::Need(_) | Outcome::Again => {
                Err(self.wrong(cpu, va, r, &format!("fault ended in {outcome:?}")))
            }
        }
    }

    /// What the CPU reaches by itself for `va`: a machine address.
    fn reach(&mut self, cpu: usize, root: u64, va: u32, r: Request) -> Result<Option<u64>, Wrong> {
        let Cpu { tlb, vcpu, .. } = &mut self.cpus[cpu];
        if let Some(tlb) = tlb {
            return Ok(tlb.access(&self.machine, root, va, r.kind).ok());
        }
        match self.mmu.tlb_translate(vcpu, Gva(va), access_of(r)) {
            Ok(mfn) => Ok(Some(mfn.at(va & 0xfff).0)),
            Err(Miss::Fault) => Ok(None),
            Err(Miss::Incoherent(violation)) => Err(self.wrong(cpu, va, r, &violation.to_string())),
        }
    }

    /// The hardware made the access: did it have the right to?
    fn judge_success(
        &mut self,
        cpu: usize,
        va: u32,
        r: Request,
        address: u64,
        fixed: bool,
    ) -> Result<Place, Wrong> {
        let Some(physical) = self.physical_of(address) else {
            return Err(self.wrong(cpu, va, r, &format!("machine address {address:#x} is no guest memory")));
        };
        if r.kind == Kind::Write && self.watched.contains(&(physical >> 12)) {
            return Err(self.wrong(cpu, va, r, "the hardware stored to a watched frame"));
        }
        let Cpu { control, rules, .. } = &self.cpus[cpu];
        let now = walker::look(&self.memory, control, va);
        let current = now.is_some_and(|t| t.physical == physical && t.serves(control, r));
        let legal = current
            || (!fixed
                && rules.permitted(&self.memory, control, va, r).iter().any(|t| t.physical == physical));
        if legal {
            return Ok(Place::Machine { address, physical });
        }
        let text = format!("the hardware reached {physical:#x}, which no translation of this CPU allows");
        Err(self.wrong(cpu, va, r, &text))
    }

    /// Into the guest, with the root for code of privilege `user`: its address.
    fn enter(&mut self, cpu: usize, user: bool) -> Result<u64, Wrong> {
        if self.cpus[cpu].running != Some(user) {
            self.leave(cpu);
        }
        let root = loop {
            match self.mmu.root_address(&self.cpus[cpu].vcpu, user) {
                Some(root) => break root,
                None => self.bring_in(cpu, Gfn(0)),
            }
        };
        if !self.inside[cpu].swap(true, Ordering::SeqCst) {
            let Cpu { vcpu, tlb, running, .. } = &mut self.cpus[cpu];
            *running = Some(user);
            match tlb {
                None => drop(self.mmu.tlb_enter(vcpu)),
                Some(tlb) if self.mmu.enter(vcpu) => {
                    let epoch = self.mmu.coherence().begin_flush();
                    tlb.flush();
                    self.mmu.coherence().end_flush(cpu as u32, epoch);
                }
                Some(_) => {}
            }
        }
        Ok(root.0)
    }

    fn emulate_part(
        &mut self,
        cpu: usize,
        va: u32,
        size: u32,
        r: Request,
        physical: u64,
        value: u64,
    ) -> Result<u64, Wrong> {
        let mut bytes = value.to_le_bytes();
        let bytes = &mut bytes[..size as usize];
        let (mmu, window) = (self.mmu.clone(), LocalStack::new(Context::Host));
        let done = loop {
            let done = match (r.kind, width_of(size)) {
                (Kind::Write, Some(width)) => mmu.store(&window, Gpa(physical), width, value),
                (Kind::Write, None) => mmu.write_bytes(&window, Gpa(physical), bytes),
                _ => mmu.read_bytes(&window, Gpa(physical), bytes),
            };
            match done {
                Err(Beyond::Need(gfn)) => self.bring_in(cpu, gfn),
                done => break done,
            }
        };
        let is_memory = self.memory.has(physical);
        let as_it_should = match done {
            Ok(()) => is_memory,
            Err(Beyond::Device(_)) => !is_memory,
            Err(Beyond::Need(_)) => false,
        };
        if !as_it_should {
            return Err(self.wrong(cpu, va, r, &format!("emulated at {physical:#x}: {done:?}")));
        }
        if r.kind == Kind::Write {
            self.memory.write(physical, size, value);
            return Ok(0);
        }
        let got = bytes.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        let want = self.memory.read(physical, size);
        if is_memory && got != want {
            return Err(self.wrong(cpu, va, r, &format!("emulated read {got:#x}, naive {want:#x}")));
        }
        Ok(got)
    }
}
