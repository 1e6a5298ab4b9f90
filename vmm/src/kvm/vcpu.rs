//! One vCPU: entering the guest and coming back.
//!
//! Story: [`KvmVcpu::enter`] is the whole of it. Direct entry: the registers that KVM_RUN is to start with are
//! written to the run page and marked dirty, the firmware runs only at traps.
//!
//! A kick can land in three places, and each has its answer:
//!
//! ```text
//!   before the guest            nothing ran: the state is what it was           Kicked
//!   in the guest                read the state back                             Kicked
//!   in the firmware, or an      an exception is in flight that nobody has seen:
//!   exception is being          change nothing, run on to the `out`             Trap
//!   delivered
//! ```
//!
//! Holds: when `enter` returns, the `CpuState` is exact; nothing of the guest is left in the vCPU but its FPU.
//!
//! See: [`super::registers`] for what is entered with.

use std::sync::Arc;

use kvm_bindings::{kvm_debugregs, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use umbra_firmware::constants::{
    CODE_BYTES, FLUSH, FLUSH_END, FLUSH_PORT, FRAME_BYTES, TRAP_PORT, UPPER_BASE,
};
use umbra_mmu::Mpa;

use super::descriptors::{Mode, Tables, decode};
use super::error::{Dump, KvmError, KvmExit, Stop};
use super::host::Features;
use super::kick::{KickDoor, Kicker};
use super::registers::{
    EntryPlan, can_run, flags_from_hardware, gprs_from_hardware, null_segment, regs_to_hardware, slot,
    unchanged,
};
use super::sys::{self, MachineVm};
use super::vm::call;
use crate::cpu::fpu::{IMAGE_BYTES, IMAGE_BYTES_USED};
use crate::cpu::{CpuState, Fpu, Seg, Segment};

/// One vCPU. It belongs to the thread that enters it; others reach it through its [`Kicker`].
#[derive(Debug)]
pub struct KvmVcpu {
    // Before `machine`: the vCPU goes before the memory that it may use.
    fd: VcpuFd,
    machine: Arc<MachineVm>,
    plan: EntryPlan,
    tables: Tables,
    door: Arc<KickDoor>,
    cpuid_faults: bool,
    /// Registers as KVM reset them: what an entry does not name.
    reset: kvm_sregs,
    /// The segment registers of the last entry, to see which of them the guest loaded.
    entered: kvm_sregs,
    root: Mpa,
    debug: [u64; 5],
    late_kicks: u64,
}

/// Where the image of 32-bit code has FCS and FDS, and that of 64-bit code, which KVM's is, the upper halves of FIP and
/// FDP.
const SELECTORS: [usize; 2] = [12, 20];

fn without_selectors(image: &mut [u8; IMAGE_BYTES]) {
    for at in SELECTORS {
        image[at..at + 4].fill(0);
    }
}

/// How a run of the vCPU ended.
#[derive(Debug)]
#[must_use]
pub enum Left {
    /// A stub's `out`, with the firmware's registers in the run page.
    Out,
    /// A kick, with the guest's registers in the run page.
    Guest,
    /// A kick before KVM took the registers.
    NotEntered,
}

/// What a stub leaves on its stack.
struct Frame {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

impl KvmVcpu {
    pub(super) fn new(
        fd: VcpuFd,
        machine: Arc<MachineVm>,
        plan: EntryPlan,
        tables: Tables,
        reset: kvm_sregs,
        door: Arc<KickDoor>,
        cpuid_faults: bool,
    ) -> Result<KvmVcpu, KvmError> {
        let root = Mpa(0);
        let vcpu = KvmVcpu {
            fd,
            machine,
            plan,
            tables,
            door,
            cpuid_faults,
            reset,
            entered: reset,
            root,
            debug: NO_BREAKPOINTS,
            late_kicks: 0,
        };
        // A reset vCPU has FCW 0x40, which a program that never executes FNINIT would see; KVM's sets MXCSR itself.
        vcpu.fd
            .set_fpu(&kvm_fpu { fcw: 0x37f, ..kvm_fpu::default() })
            .map_err(|error| call("KVM_SET_FPU", error))?;
        Ok(vcpu)
    }

    /// A handle by which any thread can make this vCPU leave the guest.
    pub fn kicker(&self) -> Kicker {
        Kicker::new(Arc::clone(&self.door))
    }

    /// Takes back kicks that have not been seen. A loop that does so before it looks for requests saves an entry
    /// that would only return.
    pub fn take_kick(&self) -> bool {
        self.door.page().take_request()
    }

    /// Kicks that came while an exception was in flight, and were answered by that trap.
    pub fn late_kicks(&self) -> u64 {
        self.late_kicks
    }

    /// What this host's KVM lets the vCPU have.
    pub fn features(&self) -> Features {
        self.plan.features
    }

    /// True where CPUID traps. Otherwise the guest sees the table that KVM has.
    pub fn cpuid_faults(&self) -> bool {
        self.cpuid_faults
    }

    /// The guest's descriptor tables, each of limit + 1 bytes, changed or may have: translate them. `ldt` is `None`
    /// while LDTR is null.
    ///
    /// # Errors
    /// Only where the firmware's image is not in the pool, which is a bug.
    pub fn set_descriptors(&mut self, gdt: &[u8], ldt: Option<&[u8]>) -> Result<(), KvmError> {
        Ok(self.tables.set(self.machine.pool(), gdt, ldt)?)
    }

    /// The guest's FPU, which stays in the vCPU between entries. KVM keeps no FCS and FDS: they read as zeros.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn fpu(&self) -> Result<Fpu, KvmError> {
        let state = self.fd.get_xsave().map_err(|error| call("KVM_GET_XSAVE", error))?;
        let mut image = [0; IMAGE_BYTES];
        for (bytes, word) in image.as_chunks_mut::<4>().0.iter_mut().zip(&state.region) {
            *bytes = word.to_le_bytes();
        }
        without_selectors(&mut image);
        Ok(Fpu::from_hardware(&image))
    }

    /// Sets the guest's FPU.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_fpu(&mut self, fpu: &Fpu) -> Result<(), KvmError> {
        const XSTATE_BV: usize = 512 / 4;
        const X87_AND_SSE: u32 = 3;
        let mut state = self.fd.get_xsave().map_err(|error| call("KVM_GET_XSAVE", error))?;
        let mut image = fpu.image();
        without_selectors(&mut image);
        for (word, bytes) in state.region.iter_mut().zip(image[..IMAGE_BYTES_USED].as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        state.region[XSTATE_BV] |= X87_AND_SSE;
        sys::set_xsave(&self.fd, &state).map_err(|source| KvmError::Call { what: "KVM_SET_XSAVE", source })
    }

    /// Runs the guest from `cpu` on the page tables at `root`, whose entry for the firmware must be there, until it
    /// traps or is kicked. With `flush` the TLB is flushed first; it has been whenever this returns `Ok`.
    ///
    /// A `root` other than the last one's flushes too: KVM rebuilds its own MMU for a CR3 that it is given.
    ///
    /// On return `cpu` is the guest's state. `interrupt_shadow` stays only where the very instruction under it
    /// trapped; a caller to whom a kick under it matters interprets that one instruction instead.
    ///
    /// # Errors
    /// [`KvmError::CannotRun`] where the interpreter must run this state (nothing has changed then);
    /// [`KvmError::Stopped`] with a dump where the vCPU stopped in a way that has no answer.
    pub fn enter(&mut self, cpu: &mut CpuState, root: Mpa, flush: bool) -> Result<KvmExit, KvmError> {
        if flush {
            can_run(cpu)?;
            if self.flush(cpu, root)? {
                return Ok(KvmExit::Kicked);
            }
        }
        let left = self.run_guest(cpu, root)?;
        self.take(cpu, left)
    }

    /// The first half of [`KvmVcpu::enter`], without a flush: from its return on the guest runs no code, and who waits for
    /// that can be told before [`KvmVcpu::take`], the other half, which must follow.
    ///
    /// # Errors
    /// As [`KvmVcpu::enter`].
    pub fn run_guest(&mut self, cpu: &CpuState, root: Mpa) -> Result<Left, KvmError> {
        can_run(cpu)?;
        self.load(cpu, root)?;
        self.run_to_exit()
    }

    /// Takes the guest's state and says why it left.
    ///
    /// An exception that a kick has caught in flight is delivered first. KVM puts it in before any guest code, and what is
    /// delivered to is the firmware.
    ///
    /// # Errors
    /// As [`KvmVcpu::enter`].
    pub fn take(&mut self, cpu: &mut CpuState, mut left: Left) -> Result<KvmExit, KvmError> {
        while matches!(left, Left::Guest) && self.exception_in_flight()? {
            self.late_kicks += 1;
            left = self.run_to_exit()?;
        }
        match left {
            Left::Out => self.take_trap(cpu),
            Left::Guest => {
                self.take_guest(cpu)?;
                Ok(KvmExit::Kicked)
            }
            Left::NotEntered => Ok(KvmExit::Kicked),
        }
    }

    /// Flushes the vCPU's TLB for `root` and does not run the guest: for a caller that must say at once that it has
    /// flushed. True where a kick came meanwhile (it has been taken back).
    ///
    /// # Errors
    /// As [`KvmVcpu::enter`].
    pub fn flush(&mut self, cpu: &CpuState, root: Mpa) -> Result<bool, KvmError> {
        self.run_firmware(FLUSH, cpu, root)
    }

    /// Enters and leaves without doing anything: what an exit costs. True where a kick came meanwhile.
    ///
    /// # Errors
    /// As [`KvmVcpu::enter`].
    pub fn bounce(&mut self, cpu: &CpuState, root: Mpa) -> Result<bool, KvmError> {
        self.run_firmware(FLUSH_END, cpu, root)
    }

    fn run_firmware(&mut self, offset: u64, cpu: &CpuState, root: Mpa) -> Result<bool, KvmError> {
        self.root = root;
        let (mut regs, mut sregs) = (kvm_regs::default(), self.reset);
        self.plan.firmware(offset, cpu, root, &mut regs, &mut sregs);
        self.write_registers(&regs, &sregs);
        let mut kicked = false;
        loop {
            match self.run()? {
                Some((FLUSH_PORT, true)) if self.in_firmware() => return Ok(kicked),
                Some((TRAP_PORT, true)) => return Err(self.firmware_fault()),
                Some((port, write)) => return Err(self.stopped(Stop::GuestIo { port, write })),
                None if self.fd.get_kvm_run().kvm_dirty_regs == 0 && !self.in_firmware() => {
                    return Err(self.stopped(Stop::Escaped));
                }
                None => kicked = true,
            }
        }
    }

    fn load(&mut self, cpu: &CpuState, root: Mpa) -> Result<(), KvmError> {
        self.root = root;
        let stale = [cpu.segment(Seg::Cs), cpu.segment(Seg::Ss)];
        self.tables.mask_stale(self.machine.pool(), Mode::of_cpl(cpu.cpl), stale)?;
        self.load_debug(cpu)?;
        let (mut regs, mut sregs) = (kvm_regs::default(), self.reset);
        regs_to_hardware(&self.plan, cpu, &mut regs);
        self.plan.guest_sregs(cpu, root, self.tables.ldt_limit(), &mut sregs);
        self.write_registers(&regs, &sregs);
        self.entered = sregs;
        Ok(())
    }

    fn write_registers(&mut self, regs: &kvm_regs, sregs: &kvm_sregs) {
        let page = self.fd.sync_regs_mut();
        page.regs = *regs;
        page.sregs = *sregs;
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
    }

    /// The guest's hardware breakpoints, where it has any on.
    fn load_debug(&mut self, cpu: &CpuState) -> Result<(), KvmError> {
        const ENABLED: u32 = 0xff;
        const GENERAL_DETECT: u32 = 1 << 13;
        let wanted = match cpu.dr[7] & ENABLED {
            0 => NO_BREAKPOINTS,
            _ => [cpu.dr[0], cpu.dr[1], cpu.dr[2], cpu.dr[3], cpu.dr[7] & !GENERAL_DETECT].map(u64::from),
        };
        if wanted == self.debug || !self.plan.features.debug_registers {
            return Ok(());
        }
        self.debug = wanted;
        self.write_debug()
    }

    fn write_debug(&self) -> Result<(), KvmError> {
        const DR6_CLEAR: u64 = 0xffff_0ff0;
        let [db @ .., dr7] = self.debug;
        let registers = kvm_debugregs { db, dr6: DR6_CLEAR, dr7, ..kvm_debugregs::default() };
        self.fd.set_debug_regs(&registers).map_err(|error| call("KVM_SET_DEBUGREGS", error))
    }

    /// A #DB's reasons, added to the guest's DR6.
    fn take_debug(&mut self, cpu: &mut CpuState) -> Result<(), KvmError> {
        const REASONS: u32 = 0xe00f;
        if self.plan.features.debug_registers {
            let now = self.fd.get_debug_regs().map_err(|error| call("KVM_GET_DEBUGREGS", error))?;
            cpu.dr[6] |= now.dr6 as u32 & REASONS;
            self.write_debug()?;
        }
        Ok(())
    }

    /// Runs until a stub's `out` or a kick that may be answered.
    fn run_to_exit(&mut self) -> Result<Left, KvmError> {
        loop {
            match self.run()? {
                Some((TRAP_PORT, true)) if self.in_firmware() => return Ok(Left::Out),
                Some((port, write)) => return Err(self.stopped(Stop::GuestIo { port, write })),
                None if self.fd.get_kvm_run().kvm_dirty_regs != 0 => return Ok(Left::NotEntered),
                None if self.in_firmware() => self.late_kicks += 1,
                None if self.privileged() => return Err(self.stopped(Stop::Escaped)),
                None => return Ok(Left::Guest),
            }
        }
    }

    /// One KVM_RUN: the port (and whether it was written) of an I/O exit, or `None` where a signal or a kick ended
    /// it. Kicks are taken back.
    fn run(&mut self) -> Result<Option<(u16, bool)>, KvmError> {
        self.door.enter();
        let result = self.fd.run();
        self.door.leave();
        let stop = match result {
            Ok(VcpuExit::IoOut(port, _)) => return Ok(Some((port, true))),
            Ok(VcpuExit::IoIn(port, _)) => return Ok(Some((port, false))),
            Ok(VcpuExit::Intr) => None,
            Ok(exit) => Some(stop_of(&exit)),
            Err(error) if error.errno() == libc::EINTR => None,
            Err(error) => Some(Stop::RunFailed(error.to_string())),
        };
        match stop {
            None => {
                self.door.page().take_request();
                Ok(None)
            }
            Some(Stop::InternalError(_)) => {
                let suberror = self.door.page().internal_error();
                Err(self.stopped(Stop::InternalError(suberror)))
            }
            Some(stop) => Err(self.stopped(stop)),
        }
    }

    fn privileged(&mut self) -> bool {
        self.fd.sync_regs_mut().sregs.cs.dpl != 3
    }

    fn in_firmware(&mut self) -> bool {
        let rip = self.fd.sync_regs_mut().regs.rip;
        self.privileged() && rip.wrapping_sub(UPPER_BASE) < CODE_BYTES
    }

    /// True where KVM holds an exception that the guest has raised and nobody has seen.
    fn exception_in_flight(&self) -> Result<bool, KvmError> {
        if !self.plan.features.events {
            return Ok(false);
        }
        let events = self.fd.get_vcpu_events().map_err(|error| call("KVM_GET_VCPU_EVENTS", error))?;
        Ok(events.exception.injected != 0 || events.exception.pending != 0)
    }

    /// Reads the frame that a stub left, and with it the guest's state.
    fn take_trap(&mut self, cpu: &mut CpuState) -> Result<KvmExit, KvmError> {
        let frame = self.read_frame()?;
        let (entered, synced) = (self.entered, *self.fd.sync_regs_mut());
        let same_eip = cpu.eip == frame.rip as u32;
        cpu.gpr = gprs_from_hardware(&synced.regs);
        cpu.gpr[4] = frame.rsp as u32;
        cpu.eip = frame.rip as u32;
        cpu.eflags = flags_from_hardware(frame.rflags, cpu.eflags);
        cpu.interrupt_shadow &= same_eip;
        self.take_privileged(cpu, Seg::Cs, entered.cs.selector, frame.cs as u16)?;
        self.take_privileged(cpu, Seg::Ss, entered.ss.selector, frame.ss as u16)?;
        self.take_data(cpu, &synced.sregs);
        if frame.vector == 1 {
            self.take_debug(cpu)?;
        }
        Ok(KvmExit::Trap { vector: frame.vector as u8, error: frame.error as u32, cr2: synced.sregs.cr2 })
    }

    /// Reads the guest's state where a kick stopped it.
    fn take_guest(&mut self, cpu: &mut CpuState) -> Result<(), KvmError> {
        let (mut entered, mut synced) = (self.entered, *self.fd.sync_regs_mut());
        cpu.gpr = gprs_from_hardware(&synced.regs);
        cpu.eip = synced.regs.rip as u32;
        cpu.eflags = flags_from_hardware(synced.regs.rflags, cpu.eflags);
        cpu.interrupt_shadow = false;
        for seg in [Seg::Cs, Seg::Ss] {
            let (before, now) = (*slot(&mut entered, seg), *slot(&mut synced.sregs, seg));
            self.take_privileged(cpu, seg, before.selector, now.selector)?;
        }
        self.take_data(cpu, &synced.sregs);
        Ok(())
    }

    /// CS or SS, by its selector: where that is another than was entered with, the guest has loaded it from its
    /// own tables as they are now; where it is the same, it holds what it held (DT-4).
    fn take_privileged(
        &mut self,
        cpu: &mut CpuState,
        seg: Seg,
        before: u16,
        now: u16,
    ) -> Result<(), KvmError> {
        if before == now {
            return Ok(());
        }
        let selector = now & !3 | u16::from(cpu.cpl);
        match self.tables.find(selector) {
            Some(descriptor) => {
                cpu.seg[seg as usize] = accessed(decode(selector, descriptor));
                Ok(())
            }
            None => {
                let what = format!("{seg:?} holds selector {now:#x}, for which the guest has no descriptor");
                Err(self.stopped(Stop::Unexpected(what)))
            }
        }
    }

    fn take_data(&self, cpu: &mut CpuState, sregs: &kvm_sregs) {
        let before = &self.entered;
        let registers = [
            (Seg::Ds, &before.ds, &sregs.ds),
            (Seg::Es, &before.es, &sregs.es),
            (Seg::Fs, &before.fs, &sregs.fs),
            (Seg::Gs, &before.gs, &sregs.gs),
        ];
        for (seg, before, now) in registers {
            if !unchanged(before, now) {
                cpu.seg[seg as usize] = self.loaded(now);
            }
        }
    }

    /// A data segment register that the guest loaded by itself, as it sees it: base and limit are the hardware's,
    /// the attributes those of its own descriptor.
    fn loaded(&self, now: &kvm_segment) -> Segment {
        match self.tables.find(now.selector) {
            Some(descriptor) if now.unusable == 0 && now.present != 0 => {
                let own = accessed(decode(now.selector, descriptor));
                Segment { base: now.base as u32, limit: now.limit, ..own }
            }
            _ => null_segment(now.selector),
        }
    }

    fn read_frame(&mut self) -> Result<Frame, KvmError> {
        let rsp = self.fd.sync_regs_mut().regs.rsp;
        let words = self.read_words(rsp)?;
        let [vector, error, rip, cs, rflags, guest_rsp, ss] = words;
        if rip >= UPPER_BASE || cs & 3 == 0 {
            return Err(self.stopped(Stop::FirmwareFault { vector, error, rip }));
        }
        if rsp != UPPER_BASE + self.plan.layout.frame() || vector > 255 || ss & 3 != 3 {
            return Err(self.stopped(Stop::BadFrame { frame: words, rsp }));
        }
        Ok(Frame { vector, error, rip, cs, rflags, rsp: guest_rsp, ss })
    }

    /// Seven quadwords from the vCPU's stack; zeros where `rsp` is not in it.
    fn read_words(&self, rsp: u64) -> Result<[u64; 7], KvmError> {
        let stack = UPPER_BASE + self.plan.layout.tss()..=UPPER_BASE + self.plan.layout.frame();
        let mut words = [0; (FRAME_BYTES / 8) as usize];
        if stack.contains(&rsp) && rsp.is_multiple_of(8) {
            let first = self.plan.image.0 + (rsp - UPPER_BASE);
            for (number, word) in words.iter_mut().enumerate() {
                *word = self.machine.pool().load(Mpa(first + number as u64 * 8))?;
            }
        }
        Ok(words)
    }

    fn firmware_fault(&mut self) -> KvmError {
        match self.read_frame() {
            Err(error) => error,
            Ok(Frame { vector, error, rip, .. }) => self.stopped(Stop::FirmwareFault { vector, error, rip }),
        }
    }

    fn stopped(&mut self, why: Stop) -> KvmError {
        let synced = self.fd.sync_regs_mut();
        let dump = Dump { regs: synced.regs, sregs: synced.sregs, root: self.root };
        KvmError::Stopped { vcpu: self.plan.index, why, dump: Box::new(dump) }
    }
}

/// DR0 to DR3 and DR7 with nothing enabled.
const NO_BREAKPOINTS: [u64; 5] = [0, 0, 0, 0, 0x400];

fn accessed(segment: Segment) -> Segment {
    Segment { attributes: segment.attributes | 1, ..segment }
}

fn stop_of(exit: &VcpuExit<'_>) -> Stop {
    match exit {
        VcpuExit::MmioRead(address, data) => {
            Stop::Hole { address: *address, length: data.len(), write: false }
        }
        VcpuExit::MmioWrite(address, data) => {
            Stop::Hole { address: *address, length: data.len(), write: true }
        }
        VcpuExit::InternalError => Stop::InternalError(0),
        VcpuExit::Shutdown => Stop::Shutdown,
        VcpuExit::FailEntry(reason, _) => Stop::FailEntry(*reason),
        other => Stop::Unexpected(format!("{other:?}")),
    }
}
