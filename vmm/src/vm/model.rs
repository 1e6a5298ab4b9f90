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

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use umbra_mmu::coherence::Removals;
use umbra_mmu::sync::sim;
use umbra_mmu::{Access, AccessKind, Gva, Machine, Mfn, Miss, Mpa, Rules, SoftTlb, TlbKind, Violation};

use super::ending::End;
use super::hardware::{DropsRemoved, Hardware};
use super::kick::Attention;
use super::native::{FAULT_FETCH, FAULT_USER, FAULT_WRITE};
use super::simulation;
use super::vcpu::Core;
use crate::cpu::{CpuModel, CpuState, Fpu, Seg, Segment, eflags};
use crate::interp::{self, Bus, BusError, Exception, Step, Width, vector};
use crate::kvm::{KvmError, KvmExit, Left, can_run};

/// The most instructions from one look at others to the next.
const SLICE: u64 = 1 << 14;
/// In a descriptor: accessed, its privilege level, and where its attributes begin.
const ACCESSED: u64 = 1 << 40;
const DPL: u64 = 3 << 45;
const ATTRIBUTES: u32 = 40;
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
        removals.all |= removed.all;
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

/// Copies of the guest's descriptor tables, GDT and LDT.
#[derive(Debug, Default)]
struct Tables([Vec<u8>; 2]);

impl Tables {
    /// The descriptor that begins so many bytes from the start of a table.
    fn descriptor(&self, table: usize, at: usize) -> Option<u64> {
        let bytes = self.0[table].get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// As [`Tables::descriptor`], as code at CPL 3 is to find it: accessed, and the kernel's own where it is the kernel.
    fn shown(&self, table: usize, at: usize, kernel: bool) -> Option<u64> {
        let own = if kernel { DPL } else { 0 };
        Some(self.descriptor(table, at)? | ACCESSED | own)
    }

    /// `segment`, loaded from here, with the privilege that the guest gave it.
    fn as_guest(&self, segment: Segment) -> Segment {
        let (table, at) = (usize::from(segment.selector >> 2 & 1), usize::from(segment.selector & !7));
        let dpl = self.descriptor(table, at).unwrap_or(DPL) & DPL;
        let attributes = segment.attributes & !(DPL >> ATTRIBUTES) as u16 | (dpl >> ATTRIBUTES) as u16;
        Segment { attributes, ..segment }
    }
}

/// Why an instruction is not done.
enum Stop {
    Trap(Exception),
    Violation(Box<Violation>),
}

impl ModelVcpu {
    /// So many vCPUs that see `machine`, and their host, which shadows page tables or does not.
    pub fn some(count: u32, machine: &Machine, shadows: bool) -> (Vec<ModelVcpu>, ModelHost) {
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
        if leaves_segment(cpu, &mut bus) {
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
        self.tables = Tables([gdt.to_vec(), ldt.unwrap_or_default().to_vec()]);
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

    /// The root is the one that the MMU has loaded for the vCPU.
    fn run_guest(&mut self, core: &Core, _: Mpa) -> Result<Left, KvmError> {
        can_run(&core.cpu)?;
        if self.attention.is_wanted() {
            return Ok(Left::NotEntered);
        }
        self.cpu = core.cpu.clone();
        self.cpu.fpu = self.fpu.clone();
        self.cpu.cpl = 3;
        self.cpu.eflags &= !eflags::IOPL;
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
            *cpu = CpuState {
                seg,
                cpl: cpu.cpl,
                eflags: self.cpu.eflags | cpu.eflags & eflags::IOPL,
                tr: cpu.tr,
                fpu: cpu.fpu.clone(),
                ..self.cpu.clone()
            };
        }
        Ok(match self.trap.take() {
            Some(Exception { vector, error, cr2 }) => {
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
        // POP SS; far CALL, RET, JMP; INT3, INT, INTO, IRET.
        0x17 | 0x9a | 0xca..=0xcf | 0xea => true,
        // MOV to SS.
        0x8e => register == 2,
        // Far CALL and JMP by memory.
        0xff => matches!(register, 3 | 5),
        // LSS; SYSENTER, SYSEXIT.
        0x0f => matches!(byte(1), 0xb2 | 0x34 | 0x35),
        _ => false,
    }
}

/// Memory as the hardware reaches it, for one instruction. It has nothing else.
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
    /// What the CPU itself reads: a descriptor, of a table that it has a copy of.
    fn descriptor(&self, gva: Gva) -> Option<u64> {
        let (cpu, kernel) = (&self.core.cpu, self.core.cpu.cpl == 0);
        let bases = [cpu.gdtr.base, cpu.ldtr.base];
        let shown = |(table, base)| self.tables.shown(table, gva.0.wrapping_sub(base) as usize, kernel);
        bases.into_iter().enumerate().find_map(shown)
    }
}

impl Bus for ModelBus<'_> {
    fn read(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        if !access.user
            && let Some(descriptor) = self.descriptor(gva)
        {
            return Ok(descriptor);
        }
        let places = self.places(gva, width.bytes(), access.kind)?;
        Ok(self.load(places, width))
    }

    fn write(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        let places = self.places(gva, width.bytes(), access.kind)?;
        self.store(places, width, value);
        Ok(())
    }

    fn update(
        &mut self,
        gva: Gva,
        width: Width,
        _: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
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
        Err(BusError::Exception(Exception::gp(0)))
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32, cpu: &CpuState) -> [u32; 4] {
        let model = CpuModel { vcpus: self.core.mmu.config().vcpus as u8, smap: false };
        model.cpuid(leaf, subleaf, self.core.mmu_vcpu.id() as u8, cpu)
    }

    fn tsc(&mut self) -> u64 {
        self.core.devices.now().0
    }
}
