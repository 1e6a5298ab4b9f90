//! A bus without paging: linear addresses are offsets into one block of memory. The twin of the real one for tests,
//! fuzzing and benchmarks.
//!
//! Holds: pages can be made absent, read-only or a supervisor's, which faults as paging would; and the bus can be
//! told to answer `Again` at its n-th call, so that restarts can be tried at every point.

use std::collections::{BTreeMap, BTreeSet};

use umbra_mmu::{Access, AccessKind, CodeFrame, FaultCode, Gva, Mfn, PageFault};

use super::bus::{Bus, BusError, Width};
use super::engine::{CodeBus, NO_TAG};
use crate::cpu::CpuState;

/// What a page of a [`FlatBus`] admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// Nothing.
    Absent,
    /// Reads and fetches.
    ReadOnly,
    /// Everything, at CPL 0 to 2.
    Supervisor,
}

/// One access to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortAccess {
    /// A read of so many bytes.
    In(u16, u32),
    /// A write of so many bytes, and what.
    Out(u16, u32, u32),
}

/// Flat memory, with what a test wants to see or to set.
#[derive(Clone, Debug, Default)]
pub struct FlatBus {
    /// The linear address of `memory[0]`.
    pub base: u32,
    /// Memory; everything outside is absent.
    pub memory: Vec<u8>,
    /// Pages (by linear address / 4096) that are not open to everything.
    pub pages: BTreeMap<u32, Page>,
    /// Ports touched, in order.
    pub ports: Vec<PortAccess>,
    /// What ports read as.
    pub port_value: u32,
    /// INVLPGs, in order.
    pub invalidated: Vec<Gva>,
    /// How often `set_paging` was called, and the CPL of its last call.
    pub paging: (u32, u8),
    /// Calls that may fail, so far.
    pub calls: u32,
    /// The call (counting from 0) that answers `Again`.
    pub again_at: Option<u32>,
    /// Pages probed since the last fetch: writes to them do not answer `Again`.
    probed: BTreeSet<u32>,
    /// What the time-stamp counter's source says.
    pub time: u64,
    /// Pages of `memory` that show another page of it: memory under two linear addresses.
    pub aliases: BTreeMap<u32, u32>,
    /// Code generations of pages that code was decoded from, by frame.
    code: BTreeMap<u32, u32>,
    code_clock: u32,
    /// `fill` and `copy` do what they can.
    pub at_once: bool,
    /// The step that the engine began last, added to the time.
    pub step: u64,
    /// A dword that reads as the time, as a device's counter does.
    pub counter: Option<Gva>,
    /// Set: `set_paging` is a #GP, as with reserved bits in a PAE directory pointer.
    pub refuse_paging: bool,
}

/// CPUID.1:EDX of the twin: DE, PSE, TSC, MSR, PAE, MCE, CX8, PGE, CMOV, FXSR, SSE and SSE2.
const FEATURES: u32 = 0x0700_a1fc;

impl FlatBus {
    /// `size` bytes of zeros from linear address `base` on.
    pub fn new(base: u32, size: usize) -> FlatBus {
        FlatBus { base, memory: vec![0; size], port_value: u32::MAX, ..FlatBus::default() }
    }

    /// Copies `bytes` to `address`; what falls outside memory is dropped.
    pub fn place(&mut self, address: u32, bytes: &[u8]) {
        let start = address.wrapping_sub(self.base) as usize;
        if let Some(whole) = start.checked_add(bytes.len()).and_then(|end| self.memory.get_mut(start..end)) {
            return whole.copy_from_slice(bytes);
        }
        for (byte, n) in bytes.iter().zip(0..) {
            if let Some(slot) = self.slot(address.wrapping_add(n)) {
                *slot = *byte;
            }
        }
    }

    /// The little-endian dword at `address`; zeros outside memory.
    pub fn dword(&self, address: u32) -> u32 {
        self.scalar(Gva(address), Width::B4) as u32
    }

    /// The index in `memory` of the byte at `address`.
    fn index(&self, address: u32) -> usize {
        let page = self.aliases.get(&(address >> 12)).copied().unwrap_or(address >> 12);
        (page << 12 | address & 0xfff).wrapping_sub(self.base) as usize
    }

    fn slot(&mut self, address: u32) -> Option<&mut u8> {
        let index = self.index(address);
        self.memory.get_mut(index)
    }

    fn scalar(&self, gva: Gva, width: Width) -> u64 {
        (0..width.bytes()).rev().fold(0, |value, n| {
            let index = self.index(gva.0.wrapping_add(n));
            value << 8 | u64::from(self.memory.get(index).copied().unwrap_or(0))
        })
    }

    /// Counts a call, and lets it fail where it was told to.
    fn call(&mut self) -> Result<(), BusError> {
        let again = self.again_at == Some(self.calls);
        self.calls += 1;
        if again { Err(BusError::Again) } else { Ok(()) }
    }

    fn fault_at(&self, gva: Gva, access: Access) -> Option<PageFault> {
        let inside = self.index(gva.0) < self.memory.len();
        let page = if inside { self.pages.get(&(gva.0 >> 12)).copied() } else { Some(Page::Absent) };
        let write = access.kind == AccessKind::Write;
        let refused = match page {
            None => false,
            Some(Page::Absent) => true,
            Some(Page::ReadOnly) => write,
            Some(Page::Supervisor) => access.user,
        };
        let mut code = FaultCode::empty();
        code.set(FaultCode::PRESENT, page != Some(Page::Absent));
        code.set(FaultCode::WRITE, write);
        code.set(FaultCode::USER, access.user);
        refused.then_some(PageFault { gva, code })
    }

    /// Checks the first and last byte: an access touches at most two pages. The second's fault is at its start.
    fn check(&self, gva: Gva, length: u32, access: Access) -> Result<(), BusError> {
        let last = gva.wrapping_add(length.max(1) - 1);
        let second = if last.page() == gva.page() { None } else { self.fault_at(last.page(), access) };
        match self.fault_at(gva, access).or(second) {
            Some(fault) => Err(fault.into()),
            None => Ok(()),
        }
    }

    /// Nothing special may happen at an access.
    fn is_quick(&self, gva: Gva) -> bool {
        self.again_at.is_none() && self.counter.is_none_or(|at| at.page() != gva.page())
    }

    fn put(&mut self, gva: Gva, width: Width, value: u64) {
        let bytes = value.to_le_bytes();
        self.place(gva.0, &bytes[..width.bytes() as usize]);
        for end in [gva, gva.wrapping_add(width.bytes() - 1)] {
            let frame = self.index(end.0) as u32 >> 12;
            self.code.remove(&frame);
        }
    }
}

impl Bus for FlatBus {
    fn read(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        self.call()?;
        self.check(gva, width.bytes(), access)?;
        if self.counter == Some(gva) {
            return Ok(self.tsc() & u64::MAX >> (64 - width.bits()));
        }
        Ok(self.scalar(gva, width))
    }

    fn write(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        let last = gva.wrapping_add(width.bytes() - 1);
        if ![gva, last].iter().all(|at| self.probed.contains(&at.page().0)) {
            self.call()?;
        }
        self.check(gva, width.bytes(), access)?;
        self.put(gva, width, value);
        Ok(())
    }

    fn update(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        self.call()?;
        self.check(gva, width.bytes(), Access::write(user))?;
        let old = self.scalar(gva, width);
        // A compare-and-swap that loses once: `change` must bear it.
        change(!old & u64::MAX >> (64 - width.bits()));
        let new = change(old);
        self.put(gva, width, new);
        Ok(old)
    }

    fn probe(&mut self, gva: Gva, length: u32, access: Access) -> Result<(), BusError> {
        self.call()?;
        self.check(gva, length, access)?;
        self.probed.extend([gva, gva.wrapping_add(length.max(1) - 1)].map(|at| at.page().0));
        Ok(())
    }

    fn fill(&mut self, gva: Gva, width: Width, value: u64, count: u32, user: bool) -> bool {
        let can = self.at_once && self.check(gva, width.bytes() * count, Access::write(user)).is_ok();
        for n in 0..if can { count } else { 0 } {
            self.put(gva.wrapping_add(n * width.bytes()), width, value);
        }
        can
    }

    fn copy(&mut self, from: Gva, to: Gva, length: u32, user: bool) -> bool {
        let apart = self.index(from.0).abs_diff(self.index(to.0)) >= length as usize;
        let readable = self.check(from, length, Access::read(user)).is_ok();
        let device = self.counter.is_some_and(|at| at.page() == from.page());
        let can = self.at_once
            && !device
            && apart
            && readable
            && self.check(to, length, Access::write(user)).is_ok();
        for n in 0..if can { length } else { 0 } {
            let byte = self.scalar(from.wrapping_add(n), Width::B1);
            self.put(to.wrapping_add(n), Width::B1, byte);
        }
        can
    }

    fn fetch(&mut self, gva: Gva, user: bool, buffer: &mut [u8]) -> Result<usize, BusError> {
        self.call()?;
        self.probed.clear();
        let access = Access::execute(user);
        let mut length = 0;
        for (slot, n) in buffer.iter_mut().zip(0..) {
            let at = gva.wrapping_add(n);
            match self.fault_at(at, access) {
                Some(fault) if n == 0 => return Err(fault.into()),
                Some(_) => break,
                None => *slot = self.scalar(at, Width::B1) as u8,
            }
            length += 1;
        }
        Ok(length)
    }

    fn port_in(&mut self, port: u16, width: Width) -> u32 {
        self.ports.push(PortAccess::In(port, width.bytes()));
        self.port_value
    }

    fn port_out(&mut self, port: u16, width: Width, value: u32) {
        self.ports.push(PortAccess::Out(port, width.bytes(), value));
    }

    fn invalidate_page(&mut self, gva: Gva) {
        self.invalidated.push(gva);
    }

    fn set_paging(&mut self, new: &CpuState, _flush: bool) -> Result<(), BusError> {
        self.call()?;
        if self.refuse_paging {
            return Err(BusError::Exception(super::Exception::gp(0)));
        }
        self.paging = (self.paging.0 + 1, new.cpl);
        Ok(())
    }

    fn cpuid(&mut self, leaf: u32, _subleaf: u32, _cpu: &CpuState) -> [u32; 4] {
        match leaf {
            0 => [7, 0x7263_7355, 0, 0],
            1 => [0x600, 0, 0, FEATURES],
            // SMEP, SMAP; UMIP.
            7 => [0, 1 << 7 | 1 << 20, 1 << 2, 0],
            0x8000_0000 => [0x8000_0001, 0, 0, 0],
            0x8000_0001 => [0, 0, 0, 1 << 20],
            _ => [0; 4],
        }
    }

    fn tsc(&mut self) -> u64 {
        self.time + self.step
    }
}

impl CodeBus for FlatBus {
    fn code_frame(&mut self, gva: Gva, user: bool) -> Result<Option<CodeFrame>, BusError> {
        if let Some(fault) = self.fault_at(gva, Access::execute(user)) {
            return Err(fault.into());
        }
        let frame = self.index(gva.0) as u32 >> 12;
        let clock = &mut self.code_clock;
        let generation = *self.code.entry(frame).or_insert_with(|| {
            *clock += 1;
            *clock
        });
        Ok(Some(CodeFrame { mfn: Mfn(frame), generation }))
    }

    fn code_generation(&self, frame: Mfn) -> u32 {
        self.code.get(&frame.0).copied().unwrap_or(0)
    }

    fn translation_version(&self) -> u64 {
        u64::from(self.paging.0) + self.invalidated.len() as u64
    }

    fn is_wanted(&self) -> bool {
        false
    }

    fn begin(&mut self, step: u64, _eip: u32) {
        self.step = step;
    }

    fn quick_tag(&self, user: bool) -> u64 {
        1 + u64::from(user)
    }

    fn quick_read(&self, tag: u64, gva: Gva, width: Width, access: Access) -> Option<u64> {
        (tag != NO_TAG && self.is_quick(gva) && self.check(gva, width.bytes(), access).is_ok())
            .then(|| self.scalar(gva, width))
    }

    fn quick_write(&mut self, tag: u64, gva: Gva, width: Width, value: u64) -> bool {
        let code = self.code.contains_key(&(self.index(gva.0) as u32 >> 12));
        let quick = tag != NO_TAG && !code && self.is_quick(gva);
        if !quick || self.check(gva, width.bytes(), Access::write(tag == 2)).is_err() {
            return false;
        }
        self.put(gva, width, value);
        true
    }

    fn quick_compare_exchange(&mut self, tag: u64, gva: Gva, expected: u32, new: u32) -> Option<u32> {
        let old = self.quick_read(tag, gva, Width::B4, Access::write(tag == 2))? as u32;
        let now = if old == expected { new } else { old };
        self.quick_write(tag, gva, Width::B4, now.into()).then_some(old)
    }
}
