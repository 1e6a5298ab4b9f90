//! A vCPU in hardware and its host, modelled: what runs native code in a simulation.
//!
//! Story: guest code runs as [`super::native`] has it run on KVM, at CPL 3 on the page tables of a root, and leaves by a trap or a kick.
//! The interpreter executes it, and has no other way to memory than the model's own TLB, which nobody fills or flushes but the hardware
//! ([`Hardware::flush`]) or the host ([`ModelHost`]). It remembers all that it has walked, tables too, until it is told to forget: the
//! most hostile hardware that is legal. What it reaches by an entry that should be gone is a [`Violation`], as in a software TLB.
//!
//! ```text
//! instruction --privileged, or goes to another segment of code or stack, or through a gate--> trap: #GP
//!      |
//!   access --by its TLB, or a walk of the shadow--> frame
//!      |       neither allows it ------------------> trap: #PF
//!      +-- slice over: others run; kicked? --------> out
//! ```
//!
//! A host that shadows page tables looks at a present entry once: a flush has it forget nothing, and what it is to forget is taken away from
//! it frame by frame, or all at once.
//!
//! Holds: between the last look at what the host has taken away and an access nobody else runs.
//!
//! Data segments are loaded from the copies of the guest's descriptor tables, as from those in KVM's firmware.
//!
//! Stores do not end what was decoded from their frame, as those of hardware do not.
//!
//! Locks: that of what the host has taken away, a leaf's, never held over anything. Sleeps only between two slices.

use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use umbra_mmu::coherence::{FLUSH_PAGES_MAX, Removals};
use umbra_mmu::sync::sim;
use umbra_mmu::{Access, AccessKind, Gva, Machine, Mfn, Miss, Mpa, Rules, SoftTlb, TlbKind, Violation};

use super::ending::End;
use super::hardware::{DropsRemoved, Hardware};
use super::kick::Attention;
use super::native::{FAULT_FETCH, FAULT_USER, FAULT_WRITE};
use super::simulation;
use super::vcpu::Core;
use crate::cpu::{CpuModel, CpuState, Fpu, Seg, Segment, cr0, eflags};
use crate::interp::{self, Bus, BusError, Exception, Step, Width, vector};
use crate::kvm::descriptors::{Mode, decode, translate};
use crate::kvm::{Doors, KvmError, KvmExit, Left, can_run};

/// The most instructions from one look at others to the next.
const SLICE: u64 = 1 << 14;
/// Frames that the host has taken away, more than which are all: as many as the MMU names.
const GONE_MAX: usize = FLUSH_PAGES_MAX;
/// Flags that are the VMM's while native code runs.
const NOT_ITS_OWN: u32 = eflags::IF | eflags::IOPL;
/// The longest instruction, in bytes.
const INSTRUCTION_MAX: usize = 15;

/// What the host has taken away and a vCPU has not forgotten yet.
#[derive(Debug, Default)]
struct Gone {
    some: AtomicBool,
    removals: Mutex<Removals>,
}

impl Gone {
    fn lock(&self) -> MutexGuard<'_, Removals> {
        self.removals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, removed: &Removals) {
        let mut removals = self.lock();
        removals.pages.extend(&removed.pages);
        removals.all |= removed.all || removals.pages.len() > GONE_MAX;
        if removals.all {
            removals.pages.clear();
        }
        self.some.store(true, Ordering::Release);
    }

    fn is_some(&self) -> bool {
        self.some.load(Ordering::Acquire)
    }

    fn take(&self) -> Removals {
        self.some.store(false, Ordering::Relaxed);
        std::mem::take(&mut self.lock())
    }
}

/// The host of some vCPUs: what it takes away is gone for each before its next access.
#[derive(Clone, Debug)]
pub struct ModelHost(Arc<[Arc<Gone>]>);

impl DropsRemoved for ModelHost {
    fn drop_frame(&self, frame: Mfn) -> Result<(), KvmError> {
        self.drop_removed(&Removals { pages: vec![frame], all: false })
    }

    fn drop_removed(&self, removed: &Removals) -> Result<(), KvmError> {
        self.0.iter().for_each(|gone| gone.add(removed));
        Ok(())
    }
}

/// The vCPU.
pub struct ModelVcpu {
    machine: Machine,
    tlb: SoftTlb,
    shadows: bool,
    gone: Arc<Gone>,
    attention: Attention,
    tables: Tables,
    fpu: Fpu,
    /// The state that the guest left with, and the exception that it left by.
    cpu: CpuState,
    trap: Option<Exception>,
}

/// A descriptor table of the guest's: its own entries, and the bytes of what the CPU sees of them in each mode.
#[derive(Debug, Default)]
struct Table {
    own: Vec<u64>,
    shown: [Vec<u8>; 2],
}

impl Table {
    fn new(bytes: &[u8]) -> Table {
        let own: Vec<_> = bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry)).collect();
        let shown = Mode::ALL.map(|mode| {
            let shown = own.iter().map(|entry| translate(*entry, mode, &Doors::closed()).to_le_bytes());
            shown.flatten().collect()
        });
        Table { own, shown }
    }
}

/// GDT and LDT.
#[derive(Debug, Default)]
struct Tables([Table; 2]);

impl Tables {
    /// `segment`, loaded from here, as the guest sees it.
    fn as_guest(&self, segment: Segment) -> Segment {
        let Segment { selector, base, limit, .. } = segment;
        match self.0[usize::from(selector >> 2 & 1)].own.get(usize::from(selector >> 3)) {
            Some(own) => {
                let own = decode(selector, *own);
                Segment { base, limit, attributes: own.attributes | 1, ..own }
            }
            None => segment,
        }
    }
}

/// Why an instruction is not done.
enum Stop {
    Trap(Exception),
    Violation(Box<Violation>),
}

impl ModelVcpu {
    /// So many vCPUs that see `machine`, and their host, which shadows page tables or does not.
    pub fn create(count: u32, machine: &Machine, shadows: bool) -> (Vec<ModelVcpu>, ModelHost) {
        let vcpu = |_| ModelVcpu {
            machine: machine.clone(),
            // What rules there are is the VMM's to keep, not the hardware's.
            tlb: SoftTlb::new(TlbKind::Sticky, Rules::default()),
            shadows,
            gone: Arc::default(),
            attention: Attention::default(),
            tables: Tables::default(),
            fpu: Fpu::default(),
            cpu: CpuState::flat_protected_mode(0),
            trap: None,
        };
        let vcpus: Vec<_> = (0..count).map(vcpu).collect();
        let host = ModelHost(vcpus.iter().map(|vcpu| Arc::clone(&vcpu.gone)).collect());
        (vcpus, host)
    }

    /// How it is kicked.
    pub fn attention(&self) -> Attention {
        self.attention.clone()
    }

    /// One instruction.
    fn step(&mut self, core: &Core) -> Result<(), Stop> {
        let ModelVcpu { machine, tlb, gone, tables, cpu, .. } = self;
        let mut bus = ModelBus { core, machine, tlb, gone, tables, dropped: 0, violation: None };
        let leaves = leaves_segment(cpu, &mut bus);
        if let Some(violation) = bus.violation.take() {
            return Err(Stop::Violation(violation));
        }
        if leaves {
            return Err(Stop::Trap(Exception::gp(0)));
        }
        match (interp::step(cpu, &mut bus), bus.violation) {
            (_, Some(violation)) => Err(Stop::Violation(violation)),
            (Step::Done, None) => Ok(()),
            (Step::Exception(exception), None) => Err(Stop::Trap(exception)),
            (Step::Unknown(_), None) => Err(Stop::Trap(Exception::UD)),
            // HLT is privileged, and its bus has nothing but a violation to begin again for.
            (Step::Again | Step::Halted, None) => Err(Stop::Trap(Exception::gp(0))),
        }
    }

    /// So many instructions, or fewer where it leaves the guest; and why it does.
    fn slice(&mut self, core: &Core, budget: u64) -> (u64, Option<Left>) {
        for done in 0..budget {
            if self.attention.is_wanted() {
                return (done, Some(Left::Guest));
            }
            match self.step(core) {
                Ok(()) => {}
                Err(Stop::Trap(exception)) => {
                    self.trap = Some(exception);
                    return (done + 1, Some(Left::Out));
                }
                Err(Stop::Violation(violation)) => {
                    core.end(End::Incoherent(violation));
                    return (done, Some(Left::Guest));
                }
            }
        }
        (budget, None)
    }
}

impl Hardware for ModelVcpu {
    fn take_kick(&mut self) {
        self.attention.take();
    }

    fn has_debug_registers(&self) -> bool {
        true
    }

    fn set_descriptors(&mut self, gdt: &[u8], ldt: Option<&[u8]>) -> Result<(), KvmError> {
        self.tables = Tables([gdt, ldt.unwrap_or_default()].map(Table::new));
        Ok(())
    }

    fn fpu(&self) -> Result<Fpu, KvmError> {
        Ok(self.fpu.clone())
    }

    fn set_fpu(&mut self, fpu: &Fpu) -> Result<(), KvmError> {
        self.fpu = fpu.clone();
        Ok(())
    }

    fn flush(&mut self, _: &Core, _: Mpa) -> Result<bool, KvmError> {
        if !self.shadows {
            self.tlb.flush_all();
        }
        Ok(false)
    }

    /// The root must be the one that the MMU has loaded for the vCPU.
    fn run_guest(&mut self, core: &Core, root: Mpa) -> Result<Left, KvmError> {
        can_run(&core.cpu)?;
        let user = core.cpu.cpl == 3;
        debug_assert_eq!(core.mmu.root_address(&core.mmu_vcpu, user), Some(root), "another root is loaded");
        if self.attention.is_wanted() {
            return Ok(Left::NotEntered);
        }
        self.cpu = core.cpu.clone();
        self.cpu.fpu = self.fpu.clone();
        self.cpu.cpl = 3;
        self.cpu.eflags = self.cpu.eflags & !eflags::IOPL | eflags::IF;
        for seg in [Seg::Cs, Seg::Ss] {
            self.cpu.seg[seg as usize].selector |= 3;
        }
        if !user {
            self.cpu.cr0 &= !cr0::AM;
        }
        // No port is anybody's who asks the task's bitmap.
        self.cpu.tr.limit = 0;
        loop {
            let (steps, left) = self.slice(core, sim::slice(SLICE).unwrap_or(SLICE));
            simulation::after_slice(&self.cpu, steps);
            match left {
                Some(left) => return Ok(left),
                None if sim::stays_inside() => {}
                None => return Ok(Left::Guest),
            }
        }
    }

    fn take(&mut self, cpu: &mut CpuState, left: Left) -> Result<KvmExit, KvmError> {
        if !matches!(left, Left::NotEntered) {
            self.fpu = self.cpu.fpu.clone();
            let mut seg = self.cpu.seg;
            for (now, before) in seg.iter_mut().zip(cpu.seg) {
                if *now != before && !now.unusable {
                    *now = self.tables.as_guest(*now);
                }
            }
            // What goes to another of these traps.
            for own in [Seg::Cs, Seg::Ss] {
                seg[own as usize] = cpu.seg[own as usize];
            }
            *cpu = CpuState {
                seg,
                cpl: cpu.cpl,
                eflags: self.cpu.eflags & !NOT_ITS_OWN | cpu.eflags & NOT_ITS_OWN,
                cr0: cpu.cr0,
                tr: cpu.tr,
                fpu: cpu.fpu.clone(),
                ..self.cpu.clone()
            };
        }
        Ok(match self.trap.take() {
            Some(Exception { vector, error, cr2 }) => {
                sim::note(|line| {
                    let _ = write!(line, "trap {vector:#x}");
                });
                KvmExit::Trap { vector, error: error.unwrap_or(0), cr2: cr2.unwrap_or(0).into() }
            }
            None => KvmExit::Kicked,
        })
    }
}

/// True for what goes to another segment of code or stack, which the CPU at CPL 3 would find fault with only sometimes.
fn leaves_segment(cpu: &CpuState, bus: &mut ModelBus<'_>) -> bool {
    const PREFIXES: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
    let mut code = [0; INSTRUCTION_MAX];
    let at = Gva(cpu.segment(Seg::Cs).base.wrapping_add(cpu.eip));
    let here = code.len().min((4096 - at.offset()) as usize);
    if bus.fetch(at, true, &mut code[..here]).is_err() {
        return false;
    }
    let next = Gva(at.0.wrapping_add(here as u32));
    if here < code.len() && bus.fetch(next, true, &mut code[here..]).is_err() {
        code[here..].fill(0x90);
    }
    let Some(first) = code.iter().position(|byte| !PREFIXES.contains(byte)) else { return false };
    let byte = |n: usize| code.get(first + n).copied().unwrap_or(0x90);
    let register = byte(1) >> 3 & 7;
    match byte(0) {
        // POP SS; far CALL, RET, JMP; INT3, INT, INTO, IRET; INT1.
        0x17 | 0x9a | 0xca..=0xcf | 0xea | 0xf1 => true,
        // MOV to SS.
        0x8e => register == 2,
        // Far CALL and JMP by memory.
        0xff => matches!(register, 3 | 5),
        // LSS; SYSENTER, SYSEXIT.
        0x0f => matches!(byte(1), 0xb2 | 0x34 | 0x35),
        _ => false,
    }
}

/// Memory as the hardware reaches it, for one instruction.
struct ModelBus<'a> {
    core: &'a Core,
    machine: &'a Machine,
    tlb: &'a SoftTlb,
    gone: &'a Gone,
    tables: &'a Tables,
    /// How often something has been taken away from it.
    dropped: u32,
    violation: Option<Box<Violation>>,
}

/// Where an access goes: the place, and of one that crosses a page the second page and the bytes in the first.
type Places = (Mpa, Option<(Mpa, u32)>);

impl ModelBus<'_> {
    /// The frame behind `gva`.
    fn reach(&mut self, gva: Gva, kind: AccessKind) -> Result<Mfn, BusError> {
        let access = Access { kind, user: self.core.cpu.cpl == 3 };
        loop {
            self.drop_gone();
            match self.core.mmu.reach_by(&self.core.mmu_vcpu, self.tlb, gva, access) {
                // A walk may have waited for others.
                Ok(_) if self.gone.is_some() => {}
                Ok(mfn) => return Ok(mfn),
                Err(Miss::Fault) => return Err(BusError::Exception(page_fault(gva, kind))),
                Err(Miss::Incoherent(violation)) => {
                    self.violation = Some(violation);
                    return Err(BusError::Again);
                }
            }
        }
    }

    fn drop_gone(&mut self) {
        if !self.gone.is_some() {
            return;
        }
        self.dropped += 1;
        let Removals { pages, all } = self.gone.take();
        match all {
            true => self.tlb.flush_all(),
            false => self.tlb.forget_frames(|mfn| pages.contains(&mfn)),
        }
    }

    fn places(&mut self, gva: Gva, bytes: u32, kind: AccessKind) -> Result<Places, BusError> {
        let room = 4096 - gva.offset();
        loop {
            let first = self.reach(gva, kind)?.at(gva.offset());
            if bytes <= room {
                return Ok((first, None));
            }
            let before = self.dropped;
            let second = self.reach(gva.wrapping_add(room), kind)?.at(0);
            if self.dropped == before {
                return Ok((first, Some((second, room))));
            }
        }
    }

    fn load(&self, (first, second): Places, width: Width) -> u64 {
        let Some((second, room)) = second else { return self.machine.load(first, width.into()) };
        let mut bytes = [0; 8];
        let (here, there) = bytes[..width.bytes() as usize].split_at_mut(room as usize);
        self.machine.read(first, here);
        self.machine.read(second, there);
        u64::from_le_bytes(bytes)
    }

    fn store(&self, (first, second): Places, width: Width, value: u64) {
        let Some((second, room)) = second else { return self.machine.store(first, width.into(), value) };
        let bytes = value.to_le_bytes();
        let (here, there) = bytes[..width.bytes() as usize].split_at(room as usize);
        self.machine.write(first, here);
        self.machine.write(second, there);
    }
}

/// As hardware at CPL 3 raises it, but for P: nobody asks.
fn page_fault(gva: Gva, kind: AccessKind) -> Exception {
    let error = match kind {
        AccessKind::Read => FAULT_USER,
        AccessKind::Write => FAULT_USER | FAULT_WRITE,
        AccessKind::Execute => FAULT_USER | FAULT_FETCH,
    };
    Exception { vector: vector::PF, error: Some(error), cr2: Some(gva.0) }
}

impl ModelBus<'_> {
    /// What the CPU itself reads: of the tables that it has copies of. Whoever wants more is interpreted.
    fn read_table(&self, gva: Gva, width: Width) -> Result<u64, BusError> {
        let cpu = &self.core.cpu;
        let mode = usize::from(Mode::of_cpl(cpu.cpl).user());
        let bytes = width.bytes() as usize;
        let within = |(table, base): (&Table, u32)| {
            let from = table.shown[mode].get(gva.0.wrapping_sub(base) as usize..)?;
            from.get(..bytes)
                .map(|found| found.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)))
        };
        let found = self.tables.0.iter().zip([cpu.gdtr.base, cpu.ldtr.base]).find_map(within);
        found.ok_or(INTERPRET)
    }
}

/// What native code cannot do.
const INTERPRET: BusError = BusError::Exception(Exception::gp(0));

impl Bus for ModelBus<'_> {
    fn read(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        if !access.user {
            return self.read_table(gva, width);
        }
        let places = self.places(gva, width.bytes(), access.kind)?;
        Ok(self.load(places, width))
    }

    fn write(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        if !access.user {
            return Err(INTERPRET);
        }
        let places = self.places(gva, width.bytes(), access.kind)?;
        self.store(places, width, value);
        Ok(())
    }

    fn update(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        if !user {
            return Err(INTERPRET);
        }
        let places = self.places(gva, width.bytes(), AccessKind::Write)?;
        let old = self.load(places, width);
        self.store(places, width, change(old));
        Ok(old)
    }

    fn probe(&mut self, gva: Gva, length: u32, access: Access) -> Result<(), BusError> {
        let mut done = 0;
        while done < length {
            let at = gva.wrapping_add(done);
            self.reach(at, access.kind)?;
            done += 4096 - at.offset();
        }
        Ok(())
    }

    fn fetch(&mut self, gva: Gva, _: bool, buffer: &mut [u8]) -> Result<usize, BusError> {
        let here = buffer.len().min((4096 - gva.offset()) as usize);
        let at = self.reach(gva, AccessKind::Execute)?.at(gva.offset());
        self.machine.read(at, &mut buffer[..here]);
        Ok(here)
    }

    /// Unreachable at CPL 3, with IOPL 0 and no bitmap.
    fn port_in(&mut self, _: u16, _: Width) -> u32 {
        u32::MAX
    }

    fn port_out(&mut self, _: u16, _: Width, _: u32) {}

    fn invalidate_page(&mut self, _: Gva) {}

    fn set_paging(&mut self, _: &CpuState, _: bool) -> Result<(), BusError> {
        Err(INTERPRET)
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32, cpu: &CpuState) -> [u32; 4] {
        let model = CpuModel { vcpus: self.core.mmu.config().vcpus as u8, smap: false };
        model.cpuid(leaf, subleaf, self.core.mmu_vcpu.id() as u8, cpu)
    }

    fn tsc(&mut self) -> u64 {
        self.core.devices.now().0
    }
}
