//! The guest's bus: what the interpreter asks for, answered by the shadow MMU and the board.
//!
//! Story: a vCPU loop makes one of these for each instruction or stretch of code it interprets and each event it
//! delivers. A vCPU with a software TLB counts as inside the guest for as long as its bus lives: what the TLB has is
//! reached directly, and for everything else it steps outside, as hardware would trap.
//!
//! ```text
//! access in one page --TLB--> hit: the frame
//!                      |
//!                     miss: Mmu::fault_sleeping --mapped, or there is a chance now--> again
//!                             |-- the guest's fault: to be delivered
//!                             |-- a device, or a store that must be seen: by walk and guest-physical address
//! ```
//!
//! Holds: an access is checked whole, over both of its pages, before any of it is made. Every store that the shadow has
//! to know of reaches it through the mmu crate, so that a store to a page table is applied.
//!
//! [`judge`] is the view of it that the judge of the guest's own flushes has, where there is one.
//!
//! Locks: the board's, for one device access at a time; never across a call into the MMU.

mod judge;

use umbra_mmu::guest_tlb::Missed;
use umbra_mmu::sync::sim;
use umbra_mmu::{
    Access, Beyond, CodeFrame, Flush, Gfn, Gpa, Gva, Mfn, Miss, Mmu, NotLoaded, Outcome, Refill, Refusal,
    Rule, Shortage, Vcpu, Violation,
};

use super::devices::Devices;
use super::kick::{Attention, Kick};
use super::paging::mode_of;
use crate::board::{Board, Nanos};
use crate::cpu::{CpuModel, CpuState};
use crate::interp::engine::{CodeBus, NO_TAG};
use crate::interp::{Bus, BusError, Exception, Width};

/// What an instruction did that its vCPU's loop must know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aftermath {
    /// The guest's descriptor tables may have changed: their translation is stale.
    pub descriptors: bool,
    /// A page of somebody's descriptor tables was stored to.
    pub watched: bool,
    /// INVLPG: the translation of this page is. Of several pages, `descriptors` says so.
    pub invalidated: Option<Gva>,
    /// [`BusError::Again`] was answered because a page cannot be had: the run must end.
    pub shortage: Option<Shortage>,
    /// It was answered because the TLB is incoherent: the run must end.
    pub violation: Option<Box<Violation>>,
    /// It was answered because the guest has missed a flush of its own, certainly or as a strict judge has it: the run must end.
    pub finding: Option<Missed>,
    /// Full flushes of the software TLB on the way.
    pub flushes: u64,
    /// The FPU was used, or it was wanted and hardware has it: [`BusError::Again`] was answered.
    pub fpu: Option<FpuUse>,
}

/// What came of a wish for the FPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FpuUse {
    /// It was there.
    Used,
    /// Hardware has it.
    Missing,
}

/// How far an instruction moves the vCPU's own time: the guest's CPU runs at 1 GHz, and always lags behind real time, with
/// which it catches up at the next slice.
pub const NANOS_PER_INSTRUCTION: u64 = 1;
/// How long an access to a device takes in a simulation: about as long as an exit to a VMM. A guest that waits by asking a device for the
/// time asks that much less often.
const DEVICE_NANOS: u64 = 1000;
/// PAUSEs of one loop after which a vCPU gives its CPU to others: most locks come free before.
const PAUSES_MAX: u32 = 64;
/// Instructions from one PAUSE to the next in a loop that waits. One that takes more keeps its CPU for a slice.
const PAUSE_LOOP_MAX: u64 = 64;
/// Attempts to have an access mapped, after which it is made by walk: each is lost to somebody else's progress.
const ATTEMPTS_MAX: u32 = 8;

/// One instruction's view of the machine.
pub struct GuestBus<'a> {
    mmu: &'a Mmu,
    vcpu: &'a mut Vcpu,
    devices: &'a Devices,
    /// The vCPU's own time; `None`: whatever the time is.
    time: Option<Nanos>,
    /// The step of a stretch of code that began last; `time` is from before the first.
    step: u64,
    /// EIP of that step, or of one before it, and the instructions before the first: for the judge of the guest's flushes.
    eip: u32,
    executed: u64,
    /// There is such a judge.
    judged: bool,
    /// What ends a stretch of code early.
    attention: Option<Attention>,
    /// Hardware has the FPU's registers.
    fpu_in_hardware: bool,
    /// PAUSEs of the loop that it is in, and the count of instructions at the last.
    pauses: u32,
    paused_at: u64,
    aftermath: Aftermath,
}

/// What is to be done about an access that the TLB does not make.
enum Road {
    /// It is mapped now: the TLB again.
    Again,
    /// By walk and guest-physical address.
    Walk,
}

impl<'a> GuestBus<'a> {
    /// The bus of `vcpu`, which is outside the guest. `time` is the vCPU's own, which instructions move on by
    /// `NANOS_PER_INSTRUCTION`; `None` for one that goes by real time.
    pub fn new(mmu: &'a Mmu, vcpu: &'a mut Vcpu, devices: &'a Devices, time: Option<Nanos>) -> GuestBus<'a> {
        let aftermath = Aftermath::default();
        let mut bus = GuestBus {
            mmu,
            vcpu,
            devices,
            time,
            step: 0,
            eip: 0,
            executed: 0,
            judged: mmu.guest_tlb().is_some(),
            attention: None,
            fpu_in_hardware: false,
            pauses: 0,
            paused_at: 0,
            aftermath,
        };
        bus.go_inside();
        bus
    }

    /// What happened; the vCPU is outside again.
    pub fn into_aftermath(mut self) -> Aftermath {
        std::mem::take(&mut self.aftermath)
    }

    /// The vCPU's time, or the time.
    pub fn time(&self) -> Nanos {
        match self.time {
            Some(time) => time.plus(self.step * NANOS_PER_INSTRUCTION),
            None => self.devices.now(),
        }
    }

    /// A run of the engine is over: the next one counts its steps from now.
    pub fn settle(&mut self) {
        self.time = self.time.map(|_| self.time());
        self.executed += self.step;
        self.step = 0;
    }

    /// Time has gone on for others.
    pub fn catch_up(&mut self) {
        self.time = self.time.map(|time| time.max(self.devices.now()));
    }

    /// So many instructions have been executed before this.
    pub fn count_from(&mut self, executed: u64) {
        self.executed = executed;
    }

    /// Hardware has the FPU's registers: an instruction that wants them is answered [`BusError::Again`].
    pub fn without_fpu(&mut self) {
        self.fpu_in_hardware = true;
    }

    /// Lets `attention` end a stretch of code.
    pub fn heed(&mut self, attention: Attention) {
        self.attention = Some(attention);
    }

    fn go_inside(&mut self) {
        if self.vcpu.tlb().is_some() {
            self.aftermath.flushes += u64::from(self.mmu.tlb_enter(self.vcpu));
        } else {
            // There is nothing here to flush: hardware does as it enters. But nobody has the bus.
            self.mmu.coherence().enter_guest(self.vcpu.id());
        }
    }

    fn go_outside(&mut self) {
        if self.vcpu.tlb().is_some() {
            self.mmu.leave(self.vcpu);
        } else {
            self.mmu.coherence().leave_guest(self.vcpu.id());
        }
    }

    /// Calls what may sleep, or shoot down.
    fn outside<R>(&mut self, call: impl FnOnce(&Mmu, &mut Vcpu) -> R) -> R {
        self.go_outside();
        let result = call(self.mmu, self.vcpu);
        self.go_inside();
        result
    }

    /// The TLB does not have it, or may not give it.
    #[cold]
    fn missed(&mut self, gva: Gva, access: Access, miss: Miss) -> Result<Road, BusError> {
        if let Miss::Incoherent(violation) = miss {
            self.aftermath.violation = Some(violation);
            return Err(BusError::Again);
        }
        if self.vcpu.tlb().is_none() {
            return Ok(Road::Walk);
        }
        match self.mmu.tlb_refill(self.vcpu, gva, access) {
            Refill::Done => return Ok(Road::Again),
            Refill::Guest(fault) => return Err(self.fault(fault)),
            Refill::Beyond => {}
        }
        let done = self.outside(|mmu, vcpu| mmu.fault_sleeping(vcpu, gva, access));
        match done.map_err(|shortage| self.lack(shortage))? {
            Outcome::Guest(fault) => Err(self.fault(fault)),
            Outcome::Mmio(_) | Outcome::Emulate(_) => Ok(Road::Walk),
            _ => Ok(Road::Again),
        }
    }

    /// Makes an access of `bytes` at `gva` by the TLB, having it mapped first if need be. `None`: it must be made by walk.
    #[inline]
    fn by_tlb<T>(
        &mut self,
        gva: Gva,
        bytes: u32,
        access: Access,
        mut make: impl FnMut(&Mmu, &Vcpu) -> Result<T, Miss>,
    ) -> Result<Option<T>, BusError> {
        if !in_one_page(gva, bytes) {
            return Ok(None);
        }
        match make(self.mmu, self.vcpu) {
            Ok(value) => Ok(Some(value)),
            Err(miss) => self.after_miss(gva, access, miss, make),
        }
    }

    /// The same, after the TLB had it not.
    fn after_miss<T>(
        &mut self,
        gva: Gva,
        access: Access,
        mut miss: Miss,
        mut make: impl FnMut(&Mmu, &Vcpu) -> Result<T, Miss>,
    ) -> Result<Option<T>, BusError> {
        for _ in 0..ATTEMPTS_MAX {
            match self.missed(gva, access, miss)? {
                Road::Again => {}
                Road::Walk => break,
            }
            match make(self.mmu, self.vcpu) {
                Ok(value) => return Ok(Some(value)),
                Err(again) => miss = again,
            }
        }
        Ok(None)
    }

    #[cold]
    #[inline(never)]
    fn read_after_miss(
        &mut self,
        gva: Gva,
        width: Width,
        access: Access,
        miss: Miss,
    ) -> Result<u64, BusError> {
        let load = |mmu: &Mmu, vcpu: &Vcpu| mmu.tlb_load(vcpu, gva, width.into(), access.user);
        match self.after_miss(gva, access, miss, load)? {
            Some(value) => Ok(value),
            None => self.read_by_walk(gva, width, access),
        }
    }

    #[cold]
    #[inline(never)]
    fn write_after_miss(
        &mut self,
        gva: Gva,
        width: Width,
        value: u64,
        access: Access,
        miss: Miss,
    ) -> Result<(), BusError> {
        let store = |mmu: &Mmu, vcpu: &Vcpu| mmu.tlb_store(vcpu, gva, width.into(), value, access.user);
        match self.after_miss(gva, access, miss, store)? {
            Some(()) => Ok(()),
            None => self.write_by_walk(gva, width, value, access),
        }
    }

    /// An access to a device begins.
    fn reach_device(&mut self) {
        if sim::is_on() {
            sim::pass(DEVICE_NANOS);
            self.time = self.time.map(|time| time.plus(DEVICE_NANOS));
        }
    }

    fn board<R>(&self, call: impl FnOnce(&mut Board, Nanos, usize) -> R) -> R {
        let id = self.vcpu.id();
        let (result, for_itself) =
            self.devices.with_at(id, self.time(), |board, now| call(board, now, id as usize));
        self.call_out(for_itself);
        result
    }

    /// What the vCPU has brought upon itself ends a stretch of code as another's kick does.
    fn call_out(&self, for_itself: bool) {
        if for_itself && let Some(attention) = &self.attention {
            attention.kick();
        }
    }

    fn translate(&mut self, gva: Gva, access: Access) -> Result<Gpa, BusError> {
        loop {
            match self.mmu.translate(self.vcpu, gva, access) {
                Ok(gpa) => return Ok(gpa),
                Err(Refusal::Fault(fault)) => return Err(self.fault(fault)),
                Err(Refusal::Need(gfn)) => self.bring_in(gfn)?,
            }
        }
    }

    /// Has a page brought in; the instruction goes on where it is, or is run again where somebody wants the vCPU: one page may
    /// make another one go, for as long as frames are short.
    fn bring_in(&mut self, gfn: Gfn) -> Result<(), BusError> {
        let brought = self.outside(|mmu, vcpu| mmu.bring_in(Some(vcpu.id()), gfn));
        brought.map_err(|shortage| self.lack(shortage))?;
        if self.is_wanted() { Err(BusError::Again) } else { Ok(()) }
    }

    /// A page cannot be had: the instruction cannot go on.
    fn lack(&mut self, shortage: Shortage) -> BusError {
        self.aftermath.shortage = Some(shortage);
        BusError::Again
    }

    /// The physical places of an access: one, or two where it crosses a page, with the bytes of the first.
    fn places(&mut self, gva: Gva, bytes: u32, access: Access) -> Result<Places, BusError> {
        let room = 4096 - gva.offset();
        let first = self.translate(gva, access)?;
        if bytes <= room {
            return Ok(Places::One(first));
        }
        let second = self.translate(gva.wrapping_add(room), access)?;
        Ok(Places::Two(first, second, room))
    }

    /// Has the page of `gpa` brought in, if it is memory.
    fn bring_in_for(&mut self, gpa: Gpa) -> Result<(), BusError> {
        while let Err(Beyond::Need(gfn)) = self.mmu.load(self.vcpu.window(), gpa, Width::B1.into()) {
            self.bring_in(gfn)?;
        }
        Ok(())
    }

    fn load(&mut self, gpa: Gpa, width: Width) -> Result<u64, BusError> {
        loop {
            match self.mmu.load(self.vcpu.window(), gpa, width.into()) {
                Ok(value) => return Ok(value),
                Err(Beyond::Need(gfn)) => self.bring_in(gfn)?,
                Err(Beyond::Device(gpa)) => {
                    self.reach_device();
                    return Ok(self.board(|board, now, id| board.mmio_read(now, id, gpa, width)));
                }
            }
        }
    }

    /// After a store by walk. Who begins to watch a page reads it after that: either it sees the store, or this the watch.
    fn note_store(&mut self, gpa: Gpa, width: Width) {
        self.aftermath.watched |= self.mmu.is_watched(gpa.gfn());
        if self.judged {
            self.tell_stored(gpa, width.bytes(), false);
        }
    }

    fn store(&mut self, gpa: Gpa, width: Width, value: u64) -> Result<(), BusError> {
        loop {
            match self.mmu.store(self.vcpu.window(), gpa, width.into(), value) {
                Ok(()) => {
                    self.note_store(gpa, width);
                    return Ok(());
                }
                Err(Beyond::Need(gfn)) => self.bring_in(gfn)?,
                Err(Beyond::Device(gpa)) => {
                    self.reach_device();
                    let id = self.vcpu.id();
                    let (noticed, for_itself) = self.devices.write_at(id, self.time(), |board, now| {
                        board.mmio_write(now, id as usize, gpa, width, value);
                    });
                    // What it serves may answer by an interrupt.
                    self.call_out(for_itself || noticed != 0);
                    if noticed != 0 {
                        let devices = self.devices;
                        let served = self.outside(|mmu, vcpu| devices.serve(vcpu.id(), mmu, noticed));
                        served.map_err(|shortage| self.lack(shortage))?;
                    }
                    return Ok(());
                }
            }
        }
    }
}

#[inline(always)]
fn in_one_page(gva: Gva, bytes: u32) -> bool {
    gva.offset() <= 4096 - bytes
}

/// Where an access goes.
#[derive(Clone, Copy)]
enum Places {
    One(Gpa),
    /// First page, second page, bytes in the first.
    Two(Gpa, Gpa, u32),
}

impl Places {
    /// The address of byte `n`.
    fn byte(self, n: u32) -> Gpa {
        match self {
            Places::One(gpa) => Gpa(gpa.0 + u64::from(n)),
            Places::Two(first, _, room) if n < room => Gpa(first.0 + u64::from(n)),
            Places::Two(_, second, room) => Gpa(second.0 + u64::from(n - room)),
        }
    }
}

impl Drop for GuestBus<'_> {
    fn drop(&mut self) {
        self.go_outside();
    }
}

impl GuestBus<'_> {
    fn read_by_walk(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        let places = self.places(gva, width.bytes(), access)?;
        if let Places::One(gpa) = places {
            return self.load(gpa, width);
        }
        let mut value = 0;
        for n in 0..width.bytes() {
            value |= self.load(places.byte(n), Width::B1)? << (8 * n);
        }
        Ok(value)
    }

    fn write_by_walk(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        let places = self.places(gva, width.bytes(), access)?;
        if let Places::One(gpa) = places {
            return self.store(gpa, width, value);
        }
        // Both, before either is stored to: there may be no frame for one of them.
        self.bring_in_for(places.byte(0))?;
        self.bring_in_for(places.byte(width.bytes() - 1))?;
        for n in 0..width.bytes() {
            self.store(places.byte(n), Width::B1, value >> (8 * n) & 0xff)?;
        }
        Ok(())
    }

    fn update_by_walk(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        let Places::One(gpa) = self.places(gva, width.bytes(), Access::write(user))? else {
            // Not locked, or partly a device's.
            let old = self.read(gva, width, Access::write(user))?;
            self.write(gva, width, change(old), Access::write(user))?;
            return Ok(old);
        };
        loop {
            match self.mmu.update(self.vcpu.window(), gpa, width.into(), change) {
                Ok(old) => {
                    self.note_store(gpa, width);
                    return Ok(old);
                }
                Err(Beyond::Need(gfn)) => self.bring_in(gfn)?,
                Err(Beyond::Device(_)) => {
                    let old = self.load(gpa, width)?;
                    self.store(gpa, width, change(old))?;
                    return Ok(old);
                }
            }
        }
    }

    /// A locked access that no aligned word holds: no other vCPU is at its own meanwhile.
    fn update_with_bus(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        self.judge(gva, width.bytes(), Access::write(user))?;
        loop {
            let places = self.places(gva, width.bytes(), Access::write(user))?;
            let done = self.outside(|mmu, vcpu| {
                let _bus = mmu.coherence().lock_bus(vcpu.id());
                match places {
                    Places::One(gpa) => mmu.update(vcpu.window(), gpa, width.into(), change),
                    Places::Two(first, second, _) => {
                        mmu.update_across(vcpu.window(), first, second.gfn(), width.into(), change)
                    }
                }
            });
            match done {
                Ok(old) => {
                    (0..width.bytes()).for_each(|n| self.note_store(places.byte(n), Width::B1));
                    return Ok(old);
                }
                Err(Beyond::Need(gfn)) => self.bring_in(gfn)?,
                // A device's registers are nobody's to lock.
                Err(Beyond::Device(_)) => return self.update_by_walk(gva, width, user, change),
            }
        }
    }

    fn fetch_by_walk(&mut self, gva: Gva, user: bool, buffer: &mut [u8]) -> Result<usize, BusError> {
        let gpa = self.translate(gva, Access::execute(user))?;
        // The next page may not be part of the instruction at all. If it is, the interpreter asks again, and only
        // then does that page get its A bit or its fault.
        let here = buffer.len().min((4096 - gva.offset()) as usize);
        loop {
            match self.mmu.read_bytes(self.vcpu.window(), gpa, &mut buffer[..here]) {
                Ok(()) => return Ok(here),
                Err(Beyond::Need(gfn)) => self.bring_in(gfn)?,
                Err(Beyond::Device(_)) => {
                    buffer[..here].fill(0xff);
                    return Ok(here);
                }
            }
        }
    }
}

/// The common accesses. Where the guest's flushes are judged they have a way of their own: the quick one is as if nobody were.
impl GuestBus<'_> {
    #[inline(always)]
    fn read_now(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        if !in_one_page(gva, width.bytes()) {
            return self.read_by_walk(gva, width, access);
        }
        match self.mmu.tlb_load(self.vcpu, gva, width.into(), access.user) {
            Ok(value) => Ok(value),
            Err(miss) => self.read_after_miss(gva, width, access, miss),
        }
    }

    #[inline(always)]
    fn write_now(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        if !in_one_page(gva, width.bytes()) {
            return self.write_by_walk(gva, width, value, access);
        }
        match self.mmu.tlb_store(self.vcpu, gva, width.into(), value, access.user) {
            Ok(()) => Ok(()),
            Err(miss) => self.write_after_miss(gva, width, value, access, miss),
        }
    }
}

impl Bus for GuestBus<'_> {
    #[inline(always)]
    fn read(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        if self.judged { self.read_judged(gva, width, access) } else { self.read_now(gva, width, access) }
    }

    #[inline(always)]
    fn write(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        match self.judged {
            true => self.write_judged(gva, width, value, access),
            false => self.write_now(gva, width, value, access),
        }
    }

    fn update(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        self.judge(gva, width.bytes(), Access::write(user))?;
        let update = |mmu: &Mmu, vcpu: &Vcpu| mmu.tlb_update(vcpu, gva, width.into(), user, change);
        match self.by_tlb(gva, width.bytes(), Access::write(user), update)? {
            Some(old) => {
                self.tell_of_store(gva, width.bytes(), user);
                Ok(old)
            }
            None => self.update_by_walk(gva, width, user, change),
        }
    }

    fn update_locked(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        let alone = self.mmu.config().vcpus == 1 || !self.mmu.rules().keep(Rule::BusAtSplit);
        if alone || gva.0 % 8 + width.bytes() <= 8 {
            return self.update(gva, width, user, change);
        }
        self.update_with_bus(gva, width, user, change)
    }

    fn probe(&mut self, gva: Gva, length: u32, access: Access) -> Result<(), BusError> {
        let mut done = 0;
        while done < length {
            let at = gva.wrapping_add(done);
            let probe = |mmu: &Mmu, vcpu: &Vcpu| mmu.tlb_translate(vcpu, at, access);
            if self.by_tlb(at, 1, access, probe)?.is_none() {
                self.translate(at, access)?;
            }
            done += 4096 - at.offset();
        }
        Ok(())
    }

    fn fill(&mut self, gva: Gva, width: Width, value: u64, count: u32, user: bool) -> bool {
        let bytes = count * width.bytes();
        if self.judge(gva, bytes, Access::write(user)).is_err() {
            return false;
        }
        let done = self.mmu.tlb_fill(self.vcpu, gva, width.into(), value, count, user).is_ok();
        if done {
            self.tell_of_store(gva, bytes, user);
        }
        done
    }

    fn copy(&mut self, from: Gva, to: Gva, length: u32, user: bool) -> bool {
        let judged = self.judge(from, length, Access::read(user));
        if judged.and_then(|()| self.judge(to, length, Access::write(user))).is_err() {
            return false;
        }
        let done = self.mmu.tlb_copy(self.vcpu, from, to, length, user) == Ok(true);
        if done {
            self.tell_of_store(to, length, user);
        }
        done
    }

    fn fetch(&mut self, gva: Gva, user: bool, buffer: &mut [u8]) -> Result<usize, BusError> {
        self.judge(gva, 1, Access::execute(user))?;
        let fetch = |mmu: &Mmu, vcpu: &Vcpu| mmu.tlb_fetch(vcpu, gva, user, buffer);
        match self.by_tlb(gva, 1, Access::execute(user), fetch)? {
            Some(length) => Ok(length),
            None => self.fetch_by_walk(gva, user, buffer),
        }
    }

    fn port_in(&mut self, port: u16, width: Width) -> u32 {
        self.reach_device();
        self.board(|board, now, id| board.port_in(now, id, port, width))
    }

    fn port_out(&mut self, port: u16, width: Width, value: u32) {
        self.reach_device();
        self.board(|board, now, id| board.port_out(now, id, port, width, value));
    }

    fn invalidate_page(&mut self, gva: Gva) {
        if self.vcpu.is_in_hardware() {
            self.outside(|mmu, vcpu| mmu.invalidate_page(vcpu, gva));
        } else {
            self.mmu.invalidate_page(self.vcpu, gva);
        }
        self.tell_invalidated(gva);
        let before = self.aftermath.invalidated.replace(gva);
        self.aftermath.descriptors |= before.is_some_and(|other| other.page() != gva.page());
    }

    fn set_paging(&mut self, new: &CpuState, flush: bool) -> Result<(), BusError> {
        let mode = mode_of(new);
        // Most often it is the privilege alone, which goes with each access.
        if !flush && mode == self.vcpu.mode() && new.cr3 == self.vcpu.cr3() {
            self.tell_control(new, false);
            return Ok(());
        }
        let wish = if flush { Flush::Yes } else { Flush::No };
        self.aftermath.descriptors |= flush;
        loop {
            match self.outside(|mmu, vcpu| mmu.set_paging(vcpu, mode, new.cr3, wish)) {
                Ok(()) => {
                    self.tell_control(new, flush);
                    return Ok(());
                }
                Err(NotLoaded::Bad(_)) => return Err(BusError::Exception(Exception::gp(0))),
                Err(NotLoaded::Need(gfn)) => self.bring_in(gfn)?,
            }
        }
    }

    fn set_apic_base(&mut self, value: u64) -> bool {
        self.board(|board, _, id| board.set_apic_base(id, value)).is_ok()
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32, cpu: &CpuState) -> [u32; 4] {
        let model = CpuModel { vcpus: self.mmu.config().vcpus as u8, smap: false };
        model.cpuid(leaf, subleaf, self.vcpu.id() as u8, cpu)
    }

    fn pause(&mut self) {
        let now = self.executed + self.step;
        let goes_on = now.saturating_sub(self.paused_at) <= PAUSE_LOOP_MAX;
        self.pauses = if goes_on { self.pauses + 1 } else { 1 };
        self.paused_at = now;
        if self.pauses == PAUSES_MAX {
            self.pauses = 0;
            // There may be more vCPUs than CPUs, and the one that it spins for without one.
            if !sim::pause() {
                std::thread::yield_now();
            }
        }
    }

    fn tsc(&mut self) -> u64 {
        self.time().0
    }

    fn want_fpu(&mut self) -> Result<(), BusError> {
        if self.fpu_in_hardware {
            self.aftermath.fpu = Some(FpuUse::Missing);
            return Err(BusError::Again);
        }
        self.aftermath.fpu = Some(FpuUse::Used);
        Ok(())
    }
}

impl From<Width> for umbra_mmu::Width {
    #[inline(always)]
    fn from(width: Width) -> umbra_mmu::Width {
        match width {
            Width::B1 => umbra_mmu::Width::B1,
            Width::B2 => umbra_mmu::Width::B2,
            Width::B4 => umbra_mmu::Width::B4,
            Width::B8 => umbra_mmu::Width::B8,
        }
    }
}

impl CodeBus for GuestBus<'_> {
    fn code_frame(&mut self, gva: Gva, user: bool) -> Result<Option<CodeFrame>, BusError> {
        self.judge(gva, 1, Access::execute(user))?;
        let mark = |mmu: &Mmu, vcpu: &Vcpu| mmu.code_frame(vcpu, gva, user);
        self.by_tlb(gva, 1, Access::execute(user), mark)
    }

    #[inline(always)]
    fn code_generation(&self, frame: Mfn) -> u32 {
        self.mmu.code_generation(frame)
    }

    #[inline(always)]
    fn translation_version(&self) -> u64 {
        let version = self.mmu.tlb_version(self.vcpu);
        // What the judge found to be so at an edit before may be found otherwise after the next.
        if self.judged {
            return version.wrapping_add(self.model_epoch());
        }
        version
    }

    #[inline(always)]
    fn is_wanted(&self) -> bool {
        self.attention.as_ref().is_some_and(Attention::is_wanted)
    }

    #[inline(always)]
    fn begin(&mut self, step: u64, eip: u32) {
        (self.step, self.eip) = (step, eip);
    }

    #[inline(always)]
    fn quick_tag(&self, user: bool) -> u64 {
        if self.judged { NO_TAG } else { self.vcpu.tlb_tag(user) }
    }

    #[inline(always)]
    fn quick_read(&self, tag: u64, gva: Gva, width: Width, access: Access) -> Option<u64> {
        self.mmu.tlb_quick_load(self.vcpu, tag, gva, width.into(), access.kind)
    }

    #[inline(always)]
    fn quick_write(&mut self, tag: u64, gva: Gva, width: Width, value: u64) -> bool {
        self.mmu.tlb_quick_store(self.vcpu, tag, gva, width.into(), value)
    }

    #[inline(always)]
    fn quick_compare_exchange(&mut self, tag: u64, gva: Gva, expected: u32, new: u32) -> Option<u32> {
        self.mmu.tlb_quick_compare_exchange(self.vcpu, tag, gva, expected, new)
    }
}

#[cfg(test)]
#[path = "bus_tests.rs"]
mod tests;
