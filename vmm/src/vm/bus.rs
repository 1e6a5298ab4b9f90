//! The guest's bus: what the interpreter asks for, answered by the shadow MMU and the board.
//!
//! Story: a vCPU loop makes one of these for each instruction it interprets and each event it delivers.
//!
//! Holds: an access is checked whole, over both of its pages, before any of it is made. Every store reaches the
//! shadow through the mmu crate, so that a store to a page table is applied.
//!
//! Locks: the board's, for one device access at a time; never across a call into the MMU.

use umbra_mmu::{Access, Beyond, Flush, Gfn, Gpa, Gva, Mmu, Refusal, Vcpu};

use super::devices::Devices;
use super::paging::mode_of;
use crate::cpu::{CpuModel, CpuState};
use crate::interp::{Bus, BusError, Exception, Width};

/// What an instruction did that its vCPU's loop must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aftermath {
    /// The guest's descriptor tables may have changed: their translation is stale.
    pub descriptors: bool,
    /// INVLPG: the translation of this page is.
    pub invalidated: Option<Gva>,
    /// [`BusError::Again`] was answered for want of a machine frame for this page.
    pub need: Option<Gfn>,
}

/// One instruction's view of the machine.
pub struct GuestBus<'a> {
    mmu: &'a Mmu,
    vcpu: &'a mut Vcpu,
    devices: &'a Devices,
    aftermath: Aftermath,
}

impl<'a> GuestBus<'a> {
    /// The bus of `vcpu`.
    pub fn new(mmu: &'a Mmu, vcpu: &'a mut Vcpu, devices: &'a Devices) -> GuestBus<'a> {
        GuestBus { mmu, vcpu, devices, aftermath: Aftermath::default() }
    }

    /// What happened.
    pub fn aftermath(&self) -> Aftermath {
        self.aftermath
    }

    fn translate(&mut self, gva: Gva, access: Access) -> Result<Gpa, BusError> {
        self.mmu.translate(self.vcpu, gva, access).map_err(|refusal| match refusal {
            Refusal::Fault(fault) => fault.into(),
            Refusal::Need(gfn) => self.lacks(gfn),
        })
    }

    fn lacks(&mut self, gfn: Gfn) -> BusError {
        self.aftermath.need = Some(gfn);
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
        // Nothing may be wanting any more once the first half is made.
        self.give_frame(first)?;
        self.give_frame(second)?;
        Ok(Places::Two(first, second, room))
    }

    /// Gives memory that has never been touched its frame, so that an access to it will not want one.
    fn give_frame(&mut self, gpa: Gpa) -> Result<(), BusError> {
        match self.mmu.load(self.vcpu.window(), gpa, umbra_mmu::Width::B1) {
            Ok(_) | Err(Beyond::Device(_)) => Ok(()),
            Err(Beyond::Need(gfn)) => Err(self.lacks(gfn)),
        }
    }

    fn load(&mut self, gpa: Gpa, width: Width) -> Result<u64, BusError> {
        match self.mmu.load(self.vcpu.window(), gpa, width.into()) {
            Ok(value) => Ok(value),
            Err(Beyond::Need(gfn)) => Err(self.lacks(gfn)),
            Err(Beyond::Device(gpa)) => {
                let id = self.vcpu.id();
                Ok(self.devices.with_as(id, |board, now| board.mmio_read(now, id as usize, gpa, width)))
            }
        }
    }

    fn store(&mut self, gpa: Gpa, width: Width, value: u64) -> Result<(), BusError> {
        self.aftermath.descriptors |= self.mmu.is_watched(gpa.gfn());
        match self.mmu.store(self.vcpu.window(), gpa, width.into(), value) {
            Ok(()) => Ok(()),
            Err(Beyond::Need(gfn)) => Err(self.lacks(gfn)),
            Err(Beyond::Device(gpa)) => {
                let id = self.vcpu.id();
                self.devices.with_as(id, |board, now| board.mmio_write(now, id as usize, gpa, width, value));
                Ok(())
            }
        }
    }
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

impl Bus for GuestBus<'_> {
    fn read(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
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

    fn write(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        let places = self.places(gva, width.bytes(), access)?;
        if let Places::One(gpa) = places {
            return self.store(gpa, width, value);
        }
        for n in 0..width.bytes() {
            self.store(places.byte(n), Width::B1, value >> (8 * n) & 0xff)?;
        }
        Ok(())
    }

    fn update(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        let Places::One(gpa) = self.places(gva, width.bytes(), Access::write(user))? else {
            // A split over two pages, which no lock of ours spans.
            let old = self.read(gva, width, Access::write(user))?;
            self.write(gva, width, change(old), Access::write(user))?;
            return Ok(old);
        };
        self.aftermath.descriptors |= self.mmu.is_watched(gpa.gfn());
        match self.mmu.update(self.vcpu.window(), gpa, width.into(), change) {
            Ok(old) => Ok(old),
            Err(Beyond::Need(gfn)) => Err(self.lacks(gfn)),
            Err(Beyond::Device(_)) => {
                let old = self.load(gpa, width)?;
                self.store(gpa, width, change(old))?;
                Ok(old)
            }
        }
    }

    fn probe(&mut self, gva: Gva, length: u32, access: Access) -> Result<(), BusError> {
        let mut done = 0;
        while done < length {
            let at = gva.wrapping_add(done);
            let gpa = self.translate(at, access)?;
            self.give_frame(gpa)?;
            done += 4096 - at.offset();
        }
        Ok(())
    }

    fn fetch(&mut self, gva: Gva, user: bool, buffer: &mut [u8]) -> Result<usize, BusError> {
        let gpa = self.translate(gva, Access::execute(user))?;
        // The next page may not be part of the instruction at all. If it is, the interpreter asks again, and only
        // then does that page get its A bit or its fault.
        let here = buffer.len().min((4096 - gva.offset()) as usize);
        match self.mmu.read_bytes(self.vcpu.window(), gpa, &mut buffer[..here]) {
            Ok(()) => {}
            Err(Beyond::Need(gfn)) => return Err(self.lacks(gfn)),
            Err(Beyond::Device(_)) => buffer[..here].fill(0xff),
        }
        Ok(here)
    }

    fn port_in(&mut self, port: u16, width: Width) -> u32 {
        let id = self.vcpu.id();
        self.devices.with_as(id, |board, now| board.port_in(now, id as usize, port, width))
    }

    fn port_out(&mut self, port: u16, width: Width, value: u32) {
        let id = self.vcpu.id();
        self.devices.with_as(id, |board, now| board.port_out(now, id as usize, port, width, value));
    }

    fn invalidate_page(&mut self, gva: Gva) {
        self.mmu.invalidate_page(self.vcpu, gva);
        self.aftermath.invalidated = Some(gva);
    }

    fn set_paging(&mut self, new: &CpuState, flush: bool) -> Result<(), BusError> {
        let wish = if flush { Flush::Yes } else { Flush::No };
        self.aftermath.descriptors |= flush;
        self.mmu
            .set_paging(self.vcpu, mode_of(new), new.cr3, wish)
            .map_err(|_| BusError::Exception(Exception::gp(0)))
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32, cpu: &CpuState) -> [u32; 4] {
        let model = CpuModel { vcpus: self.mmu.config().vcpus as u8, smap: false };
        model.cpuid(leaf, subleaf, self.vcpu.id() as u8, cpu)
    }

    fn tsc(&mut self) -> u64 {
        self.devices.now().0
    }
}

impl From<Width> for umbra_mmu::Width {
    fn from(width: Width) -> umbra_mmu::Width {
        match width {
            Width::B1 => umbra_mmu::Width::B1,
            Width::B2 => umbra_mmu::Width::B2,
            Width::B4 => umbra_mmu::Width::B4,
            Width::B8 => umbra_mmu::Width::B8,
        }
    }
}

#[cfg(test)]
#[path = "bus_tests.rs"]
mod tests;
