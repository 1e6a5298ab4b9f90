//! The board: the guest's devices, at the addresses of QEMU's `microvm`.
//!
//! ```text
//!   UART --- 4 ---+                        +---------+  LINT0
//!   PIT  --- 0 ---+--> GSI 0..15 --------> | 8259 x2 | -------+
//!   RTC  --- 8 ---+      |                 +---------+        v
//!   (virtio-mmio)-+      +-> pins 0..23  +----------+    +---------+
//!                 |          (GSI 0: 2)  | IOAPIC 0 | -> |  LAPIC  | x vCPUs
//!                 +--> GSI 24..47 -----> | IOAPIC 1 | -> |  bus    |
//!                                        +----------+    +---------+
//! ```
//!
//! Story: a vCPU that touches a port or a device's page calls in here with the time; so does the loop that sleeps
//! until [`Board::next_deadline`]. Afterwards [`Board::take_wakes`] says which vCPUs have something to look at, and
//! [`Board::take_notifies`] which virtio devices' workers.
//!
//! Holds: a pure state machine. It has no thread, no clock, no file; the serial sink is its only way out. The same
//! calls give the same answers. Every operation takes bounded time and memory, whatever the guest writes and
//! however late the caller comes: what a timer missed counts as one.
//!
//! Locks: none of its own; whoever shares a board puts it behind one.
//!
//! Differences from QEMU 7.2, found by running the same random register accesses on both; each is the data sheets'
//! rule:
//! - a line that stays up is one edge, also at an IOAPIC and after ICW1; a level is seen also if it rose while the
//!   pin was masked or edge-triggered;
//! - LINT0 in fixed mode gives its own vector, not the 8259's; in special mask mode a non-specific EOI leaves masked
//!   in-service bits alone; a local APIC whose interrupt goes away gives none, not the spurious vector;
//! - what nobody owns reads as ones also in memory; the 8259s begin masked, and reach the boot processor while its
//!   local APIC is disabled; there are ports 0x60, 0x61, 0x64, 0x92 and 0xcf9.
//!
//! Not here: fw_cfg, MSIs, SMIs; what virtio devices do beyond their registers ([`crate::virtio`]).
//!
//! See: Intel SDM vol. 3A chapter 11, the data sheets named in each file; what microvm answers was read from QEMU
//! 7.2 by a probing kernel.

#![forbid(unsafe_code)]

use std::io::Write;
use std::ops::Range;

use umbra_mmu::Gpa;

use crate::interp::{Exception, Width};

mod bus;
mod exits;
mod ioapic;
mod lapic;
mod lapic_timer;
mod memory_map;
mod pic;
mod pit;
mod rtc;
mod serial;
mod tables;
mod time;
mod vectors;
mod virtio;

pub use exits::{BoardExit, ResetCause};
pub use lapic::Signals;
pub use memory_map::{MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, MemoryMap, MemorySizeError, RangeKind};
pub use tables::firmware_tables;
pub use time::Nanos;
pub use virtio::{
    CONFIG_BYTES_MAX, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, QUEUES_MAX, QueueConfig,
    SLOTS as VIRTIO_SLOTS, VirtioSnapshot, VirtioSpec,
};

use bus::ApicBus;
use exits::Exits;
use ioapic::IoApic;
use pic::PicPair;
use pit::Pit;
use rtc::Rtc;
use serial::Uart;
use virtio::VirtioSlots;

/// The most vCPUs of a guest: what a mask of them holds.
pub const VCPUS_MAX: usize = 64;

/// Interrupt lines.
const GSI_PIT: u32 = 0;
const GSI_UART: u32 = 4;
const GSI_RTC: u32 = 8;
/// The first virtio slot's; the others' follow.
const GSI_VIRTIO: u32 = 24;
/// GSIs below this reach the 8259 as well.
const GSI_ISA_END: u32 = 16;
/// The PIT's line goes to this pin of the first IOAPIC.
const PIN_OF_GSI_0: usize = 2;

/// Pages of the devices.
const ACPI_PAGE: u64 = 0xfea0_0000;
const VIRTIO_PAGE: u64 = 0xfeb0_0000;
/// All of them: the slots fill whole pages.
const VIRTIO_BYTES: u64 = virtio::SLOTS as u64 * virtio::SLOT_BYTES;
const IOAPIC_PAGES: [u64; 2] = [0xfec0_0000, 0xfec1_0000];
const LAPIC_PAGE: u64 = lapic::BASE_ADDRESS;
const PAGE_BYTES: u64 = 0x1000;
/// Where the registers lie in the ACPI device's page.
const ACPI_REGISTERS: u32 = 0x200;

/// What a board is made of.
pub struct BoardConfig {
    /// Guest memory, which the CMOS reports.
    pub memory: MemoryMap,
    /// vCPUs, 1..=[`VCPUS_MAX`]. Their numbers are their APIC IDs; number 0 is the boot processor.
    pub vcpus: usize,
    /// Where the serial port's output goes, byte by byte.
    pub serial: Box<dyn Write + Send>,
    /// What the clock shows at guest time zero: seconds since 1970, UTC.
    pub epoch_seconds: i64,
}

/// Why there can be no such board.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BoardError {
    /// Outside 1..=[`VCPUS_MAX`].
    #[error("a guest cannot have {0} vCPUs; choose 1 to {max}", max = VCPUS_MAX)]
    VcpuCount(usize),
}

/// What has happened, for the summary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BoardCounters {
    /// Reads of ports that nobody owns.
    pub unowned_port_reads: u64,
    /// Writes to ports that nobody owns.
    pub unowned_port_writes: u64,
    /// Reads of device addresses that nobody owns.
    pub unowned_mmio_reads: u64,
    /// Writes to device addresses that nobody owns, or of a width that the device does not take.
    pub unowned_mmio_writes: u64,
    /// Interrupts given to vCPUs.
    pub interrupts: u64,
    /// Interrupt commands that local APICs carried out.
    pub ipis: u64,
    /// Bytes that the serial sink did not take.
    pub serial_bytes_lost: u64,
}

/// The guest's devices.
pub struct Board {
    now: Nanos,
    bus: ApicBus,
    ioapics: [IoApic; 2],
    pic: PicPair,
    pit: Pit,
    rtc: Rtc,
    uart: Uart,
    exits: Exits,
    virtio: VirtioSlots,
    counters: BoardCounters,
    /// vCPUs that `take_wakes` has named and that have not acknowledged since.
    woken: u64,
    /// The same of signals, until they are taken.
    called: u64,
}

impl Board {
    /// The devices after power-up, at guest time zero.
    pub fn new(config: BoardConfig) -> Result<Board, BoardError> {
        if !(1..=VCPUS_MAX).contains(&config.vcpus) {
            return Err(BoardError::VcpuCount(config.vcpus));
        }
        Ok(Board {
            now: Nanos(0),
            bus: ApicBus::new(config.vcpus),
            ioapics: [IoApic::new(), IoApic::new()],
            pic: PicPair::new(),
            pit: Pit::new(Nanos(0)),
            rtc: Rtc::new(config.epoch_seconds, &config.memory),
            uart: Uart::new(config.serial),
            exits: Exits::new(),
            virtio: VirtioSlots::new(),
            counters: BoardCounters::default(),
            woken: 0,
            called: 0,
        })
    }

    /// Resets every device. Time, the clock, counters, the serial sink and waiting serial input go on.
    pub fn reset(&mut self, now: Nanos) {
        self.advance(now);
        let ipis_sent = self.bus.ipis_sent;
        self.bus = ApicBus::new(self.vcpus());
        self.bus.ipis_sent = ipis_sent;
        self.ioapics = [IoApic::new(), IoApic::new()];
        self.pic = PicPair::new();
        self.pit = Pit::new(self.now);
        self.rtc.reset();
        self.uart.reset();
        self.exits = Exits::new();
        self.virtio.reset();
        (self.woken, self.called) = (0, 0);
        self.settle();
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> usize {
        self.bus.lapics().len()
    }

    /// True while there are signals for `vcpu` that it has not taken.
    pub fn has_signals(&self, vcpu: usize) -> bool {
        self.bus.lapic(vcpu).is_some_and(|lapic| !lapic.signals().is_empty())
    }

    /// The pages that belong to devices, ascending. The rest of what is not memory belongs to nobody.
    pub fn device_ranges() -> [Range<Gpa>; 5] {
        let page = |page| (page, PAGE_BYTES);
        let [first, second] = IOAPIC_PAGES.map(page);
        [page(ACPI_PAGE), (VIRTIO_PAGE, VIRTIO_BYTES), first, second, page(LAPIC_PAGE)]
            .map(|(at, bytes)| Gpa(at)..Gpa(at + bytes))
    }

    /// True if `gpa` lies in a page of [`Board::device_ranges`].
    pub fn is_device(gpa: Gpa) -> bool {
        Board::device_ranges().iter().any(|range| range.contains(&gpa))
    }

    /// Moves all devices to `now`. Every call with a time does this first; a time before the last one counts as
    /// the last one, since vCPUs may race to be the next.
    pub fn advance(&mut self, now: Nanos) {
        if now <= self.now {
            return;
        }
        self.now = now;
        if self.pit.advance(now) {
            self.drive(GSI_PIT, false);
            self.drive(GSI_PIT, true);
        }
        self.rtc.advance(now);
        self.bus.advance(now);
        self.settle();
    }

    /// When to call [`Board::advance`] next at the latest, later than the last time given. `None`: nothing will
    /// happen by itself that a vCPU could notice.
    pub fn next_deadline(&self) -> Option<Nanos> {
        let pit = self.pit.next_rise().filter(|_| self.edge_would_matter(GSI_PIT));
        let rtc = self.rtc.next_deadline().filter(|_| self.edge_would_matter(GSI_RTC));
        [self.bus.next_deadline(), pit, rtc].into_iter().flatten().min()
    }

    /// True if a rise of an ISA line would reach anything: it is unmasked somewhere and not pending already.
    fn edge_would_matter(&self, gsi: u32) -> bool {
        let pin = self.ioapics[0].on_edge(pin_of(gsi));
        self.pic.would_matter(gsi as u8) || pin.is_some_and(|message| self.bus.would_matter(message))
    }

    /// Brings all lines to what their devices say.
    fn settle(&mut self) {
        self.drive(GSI_PIT, self.pit.output(self.now));
        self.drive(GSI_UART, self.uart.output());
        self.drive(GSI_RTC, self.rtc.output());
        for (gsi, level) in self.virtio.take_changes() {
            self.drive(gsi, level);
        }
        self.bus.set_lint0(self.pic.output());
    }

    fn drive(&mut self, gsi: u32, level: bool) {
        if gsi < GSI_ISA_END {
            self.pic.set_line(gsi as u8, level);
        }
        let bus = &mut self.bus;
        if let Some(ioapic) = self.ioapics.get_mut(gsi as usize / ioapic::PINS) {
            ioapic.set_line(pin_of(gsi), level, &mut |message| bus.send(message));
        }
    }

    /// Drives an interrupt line for a device outside the board: GSI 0..=23 are pins of the first IOAPIC (below 16
    /// lines of the 8259 too), 24..=47 those of the second. Others do nothing, nor do lines that the board's own devices drive.
    pub fn set_gsi(&mut self, now: Nanos, gsi: u32, level: bool) {
        self.advance(now);
        if !matches!(gsi, GSI_PIT | GSI_UART | GSI_RTC) && !self.virtio.drives(gsi) {
            self.drive(gsi, level);
            self.settle();
        }
    }

    /// Gives the serial port input; returns how many bytes it took. The rest can be offered again later.
    pub fn serial_input(&mut self, now: Nanos, bytes: &[u8]) -> usize {
        self.advance(now);
        let taken = self.uart.queue(bytes);
        self.settle();
        taken
    }

    /// Why the run should end, if the guest has asked for it since the last call.
    pub fn take_exit(&mut self) -> Option<BoardExit> {
        self.exits.take()
    }

    /// [`Board::take_exit`] has something to take.
    pub fn wants_exit(&self) -> bool {
        self.exits.is_wished()
    }

    /// Counters of the run so far.
    pub fn counters(&self) -> BoardCounters {
        BoardCounters { ipis: self.bus.ipis_sent, serial_bytes_lost: self.uart.lost, ..self.counters }
    }
}

/// Ports.
impl Board {
    /// Reads a port on behalf of `vcpu`. Ports that nobody owns read as ones. A wide access to a byte-wide device
    /// goes to the ports that follow as well, as the ISA bus does it.
    pub fn port_in(&mut self, now: Nanos, vcpu: usize, port: u16, width: Width) -> u32 {
        self.advance(now);
        let bytes = width.bytes().min(4);
        let Some(low) = self.byte_in(port) else {
            note(&mut self.counters.unowned_port_reads, || format!("vCPU {vcpu} reads port {port:#x}"));
            return u32::MAX >> (32 - 8 * bytes);
        };
        let value = (1..bytes as u16).fold(u32::from(low), |value, at| {
            let byte = self.byte_in(port.wrapping_add(at)).unwrap_or(0xff);
            value | u32::from(byte) << (8 * at)
        });
        self.settle();
        value
    }

    fn byte_in(&mut self, port: u16) -> Option<u8> {
        Some(match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.read(port),
            0x40..=0x43 => self.pit.read(self.now, port),
            0x61 => self.pit.read_port_61(self.now),
            0x60 | 0x64 | 0x92 | 0xcf9 => self.exits.read(port),
            0x71 => self.rtc.read(self.now),
            0xf4..=0xf7 => 0,
            0x3f8..=0x3ff => self.uart.read((port & 7) as u8),
            // The clock's index cannot be read, nor can the ports that kernels write to for the delay.
            0x70 | 0x80 | 0xed => 0xff,
            _ => return None,
        })
    }

    /// Writes a port on behalf of `vcpu`: the low `width` bytes of `value`.
    pub fn port_out(&mut self, now: Nanos, vcpu: usize, port: u16, width: Width, value: u32) {
        self.advance(now);
        let bytes = width.bytes().min(4);
        let value = value & (u32::MAX >> (32 - 8 * bytes));
        if (0xf4..=0xf7).contains(&port) {
            return self.exits.wish(BoardExit::DebugExit(value));
        }
        if !self.byte_out(port, value as u8) {
            note(&mut self.counters.unowned_port_writes, || {
                format!("vCPU {vcpu} writes {value:#x} to port {port:#x}")
            });
            return;
        }
        for at in 1..bytes as u16 {
            self.byte_out(port.wrapping_add(at), (value >> (8 * at)) as u8);
        }
        self.settle();
    }

    /// True if somebody owns the port.
    fn byte_out(&mut self, port: u16, value: u8) -> bool {
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.write(port, value),
            0x40..=0x43 => self.pit.write(self.now, port, value),
            0x61 => self.pit.write_port_61(self.now, value),
            0x60 | 0x64 | 0x92 | 0xcf9 => self.exits.write(port, value),
            0x70 => self.rtc.select(value),
            0x71 => self.rtc.write(self.now, value),
            0x80 | 0xed => {}
            0x3f8..=0x3ff => self.uart.write((port & 7) as u8, value),
            _ => return false,
        }
        true
    }
}

/// Device memory.
impl Board {
    /// Reads device memory on behalf of `vcpu`, zero-extended. What nobody owns reads as ones. The access lies
    /// within a page.
    pub fn mmio_read(&mut self, now: Nanos, vcpu: usize, gpa: Gpa, width: Width) -> u64 {
        self.advance(now);
        let mask = u64::MAX >> (64 - 8 * width.bytes());
        if let Some(offset) = virtio_offset(gpa) {
            return self.virtio.read(offset, width);
        }
        let Some(low) = self.register_in(vcpu, gpa) else {
            note(&mut self.counters.unowned_mmio_reads, || format!("vCPU {vcpu} reads {gpa}"));
            return mask;
        };
        let high = match width {
            Width::B8 => self.register_in(vcpu, Gpa(gpa.0.wrapping_add(4))).unwrap_or(u32::MAX),
            _ => 0,
        };
        let value = u64::from(high) << 32 | u64::from(low);
        (value >> (8 * (gpa.0 & 3))) & mask
    }

    /// The 32-bit register that holds the byte at `gpa`.
    fn register_in(&mut self, vcpu: usize, gpa: Gpa) -> Option<u32> {
        let offset = gpa.offset() & !3;
        match gpa.0 & !(PAGE_BYTES - 1) {
            LAPIC_PAGE => {
                let lapic = self.bus.lapic_mut(vcpu).filter(|lapic| lapic.present())?;
                Some(lapic.read(self.now, offset))
            }
            page if page == IOAPIC_PAGES[0] => Some(self.ioapics[0].read(offset)),
            page if page == IOAPIC_PAGES[1] => Some(self.ioapics[1].read(offset)),
            ACPI_PAGE => Some(0),
            _ => None,
        }
    }

    /// Writes device memory on behalf of `vcpu`: the low `width` bytes of `value`. APICs take aligned 32-bit writes
    /// alone (of a 64-bit one its low half), virtio registers aligned 32-bit ones; others are dropped and counted. The
    /// access lies within a page.
    pub fn mmio_write(&mut self, now: Nanos, vcpu: usize, gpa: Gpa, width: Width, value: u64) {
        self.advance(now);
        let whole = matches!(width, Width::B4 | Width::B8) && gpa.0 & 3 == 0;
        let taken = match (gpa.0 & !(PAGE_BYTES - 1), virtio_offset(gpa)) {
            (_, Some(offset)) => self.virtio.write(offset, width, value),
            (ACPI_PAGE, _) => self.acpi_out(gpa.offset(), width, value),
            _ if whole => self.register_out(vcpu, gpa, value as u32),
            _ => false,
        };
        if !taken {
            note(&mut self.counters.unowned_mmio_writes, || {
                format!("vCPU {vcpu} writes {value:#x} ({} bytes) to {gpa}", width.bytes())
            });
            return;
        }
        self.settle();
    }

    fn acpi_out(&mut self, offset: u32, width: Width, value: u64) -> bool {
        for (at, byte) in (0..width.bytes()).zip(value.to_le_bytes()) {
            if let Some(register) = (offset + at).checked_sub(ACPI_REGISTERS) {
                self.exits.write_acpi(register, byte);
            }
        }
        true
    }

    /// True if somebody owns the register.
    fn register_out(&mut self, vcpu: usize, gpa: Gpa, value: u32) -> bool {
        let offset = gpa.offset();
        match gpa.0 & !(PAGE_BYTES - 1) {
            LAPIC_PAGE if self.bus.lapic(vcpu).is_some_and(|lapic| lapic.present()) => {
                if let Some(vector) = self.bus.write(self.now, vcpu, offset, value) {
                    self.broadcast_eoi(vector);
                }
            }
            page if page == IOAPIC_PAGES[0] => self.ioapic_out(0, offset, value),
            page if page == IOAPIC_PAGES[1] => self.ioapic_out(1, offset, value),
            _ => return false,
        }
        true
    }

    fn ioapic_out(&mut self, number: usize, offset: u32, value: u32) {
        let bus = &mut self.bus;
        self.ioapics[number].write(offset, value, &mut |message| bus.send(message));
    }

    fn broadcast_eoi(&mut self, vector: u8) {
        let bus = &mut self.bus;
        for ioapic in &mut self.ioapics {
            ioapic.end_of_interrupt(vector, &mut |message| bus.send(message));
        }
    }
}

/// Interrupts.
impl Board {
    /// True if `vcpu` has an interrupt to take, should its IF allow. As of the last time given.
    pub fn interrupt_pending(&self, vcpu: usize) -> bool {
        self.bus
            .lapic(vcpu)
            .is_some_and(|lapic| lapic.deliverable().is_some() || lapic.accepts_extint() && self.pic.output())
    }

    /// Gives `vcpu` its most urgent interrupt, which it must now deliver. `None` if there is none.
    pub fn acknowledge(&mut self, now: Nanos, vcpu: usize) -> Option<u8> {
        self.advance(now);
        let lapic = self.bus.lapic_mut(vcpu)?;
        // The 8259 comes first: what it sends has no priority that the local APIC could compare.
        let vector = if lapic.accepts_extint() && self.pic.output() {
            self.pic.acknowledge()
        } else {
            lapic.acknowledge()?
        };
        self.counters.interrupts += 1;
        self.woken &= !(1 << vcpu);
        self.settle();
        Some(vector)
    }

    /// What other CPUs or the operator have asked of `vcpu` beyond interrupts: INIT, start-up, NMI.
    pub fn take_signals(&mut self, vcpu: usize) -> Signals {
        if vcpu < VCPUS_MAX {
            self.called &= !(1 << vcpu);
        }
        self.bus.take_signals(vcpu)
    }

    /// Sends `vcpu` an NMI from outside.
    pub fn raise_nmi(&mut self, vcpu: usize) {
        if let Some(lapic) = self.bus.lapic_mut(vcpu) {
            lapic.deliver(lapic::DeliveryMode::Nmi, 0, false);
        }
    }

    /// Resets `vcpu`'s local APIC, as its INIT does.
    pub fn init_vcpu(&mut self, now: Nanos, vcpu: usize) {
        self.advance(now);
        if let Some(lapic) = self.bus.lapic_mut(vcpu) {
            lapic.init();
        }
    }

    /// vCPUs (bit n: number n) that have an interrupt since they last took one, or a signal, each named once for either: those
    /// that may have to be kicked or woken. One that cannot take its interrupt can take a signal.
    pub fn take_wakes(&mut self) -> u64 {
        let mask = |has: &dyn Fn(usize) -> bool| {
            (0..self.vcpus()).filter(|&vcpu| has(vcpu)).fold(0, |mask, vcpu| mask | 1 << vcpu)
        };
        let (pending, signalled) =
            (mask(&|vcpu| self.interrupt_pending(vcpu)), mask(&|vcpu| self.has_signals(vcpu)));
        let fresh = pending & !self.woken | signalled & !self.called;
        (self.woken, self.called) = (pending, signalled);
        fresh
    }

    /// IA32_APIC_BASE of `vcpu`; 0 if there is no such vCPU.
    pub fn apic_base(&self, vcpu: usize) -> u64 {
        self.bus.lapic(vcpu).map_or(0, |lapic| lapic.base())
    }

    /// Writes IA32_APIC_BASE of `vcpu`. Reserved bits, x2APIC mode and another address than the default fault.
    pub fn set_apic_base(&mut self, vcpu: usize, value: u64) -> Result<(), Exception> {
        let written = self.bus.lapic_mut(vcpu).is_some_and(|lapic| lapic.set_base(value));
        written.then_some(()).ok_or(Exception { vector: 13, error: Some(0), cr2: None })
    }
}

/// Where in the registers of all virtio slots an address lies.
fn virtio_offset(gpa: Gpa) -> Option<u32> {
    gpa.0.checked_sub(VIRTIO_PAGE).filter(|offset| *offset < VIRTIO_BYTES).map(|offset| offset as u32)
}

/// The pin of its IOAPIC that a GSI drives.
fn pin_of(gsi: u32) -> usize {
    if gsi == GSI_PIT { PIN_OF_GSI_0 } else { gsi as usize % ioapic::PINS }
}

/// Counts an access that reached nobody, and says so each time the count doubles.
fn note(counter: &mut u64, what: impl FnOnce() -> String) {
    *counter += 1;
    if counter.is_power_of_two() {
        log::debug!("{}, which nobody owns (number {counter} of its kind)", what());
    }
}

#[cfg(test)]
mod tests;
