//! The I/O APIC: 24 pins, each with a redirection entry.
//!
//! Story: devices drive pins through the board's `set_gsi`; a pin becomes a message on the APIC bus; the end of a
//! level-triggered interrupt comes back and sends the next one if the line is still up.
//!
//! Holds: Remote IRR of a level-triggered pin is set exactly while a local APIC has accepted its interrupt and not
//! ended it. An edge at a masked pin is lost, as the data sheet has it.
//!
//! Not here: ExtINT through a pin (the 8259 is reached through LINT0), interrupt remapping.
//!
//! See: Intel 82093AA data sheet; the version register and the EOI register are those of version 0x20, QEMU's.

use super::bus::Message;
use super::lapic::DeliveryMode;

/// Pins of one IOAPIC.
pub(super) const PINS: usize = 24;
const VERSION: u32 = ((PINS as u32 - 1) << 16) | 0x20;

/// Offsets within the page: index, data, and end of interrupt.
const REGISTER_SELECT: u32 = 0x00;
const REGISTER_WINDOW: u32 = 0x10;
const REGISTER_EOI: u32 = 0x40;

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const DELIVERY_STATUS: u64 = 1 << 12;
const LOGICAL: u64 = 1 << 11;
/// Bits that software may write: those defined, without delivery status and Remote IRR.
const WRITABLE: u64 = 0xff00_0000_0001_ffff & !(REMOTE_IRR | DELIVERY_STATUS);

/// An IOAPIC.
#[derive(Clone, Debug)]
pub(super) struct IoApic {
    id: u32,
    select: u8,
    entries: [u64; PINS],
    /// Levels of the pins.
    lines: u32,
}

/// Takes a message to its targets; true if one accepted it.
pub(super) type Send<'a> = &'a mut dyn FnMut(Message) -> bool;

impl IoApic {
    /// An IOAPIC after reset: all pins masked.
    pub(super) fn new() -> IoApic {
        IoApic { id: 0, select: 0, entries: [MASKED; PINS], lines: 0 }
    }

    /// The message that `pin` would send.
    fn message(&self, pin: usize) -> Message {
        let entry = self.entries[pin];
        Message {
            mode: DeliveryMode::of(entry as u32),
            vector: entry as u8,
            level_triggered: self.is_level(pin),
            destination: (entry >> 56) as u8,
            logical: entry & LOGICAL != 0,
        }
    }

    /// Only fixed and lowest-priority interrupts can be level-triggered.
    fn is_level(&self, pin: usize) -> bool {
        let mode = DeliveryMode::of(self.entries[pin] as u32);
        self.entries[pin] & LEVEL != 0 && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority)
    }

    /// What an edge at `pin` would send now, if it is not masked and would not be swallowed.
    pub(super) fn on_edge(&self, pin: usize) -> Option<Message> {
        let entry = *self.entries.get(pin)?;
        (entry & MASKED == 0 && entry & REMOTE_IRR == 0).then(|| self.message(pin))
    }

    /// Drives a pin.
    pub(super) fn set_line(&mut self, pin: usize, level: bool, send: Send<'_>) {
        if pin >= PINS {
            return;
        }
        let rising = level && self.lines & (1 << pin) == 0;
        self.lines = self.lines & !(1 << pin) | u32::from(level) << pin;
        if self.is_level(pin) {
            self.service_level(pin, send);
        } else if rising && self.entries[pin] & MASKED == 0 {
            send(self.message(pin));
        }
    }

    /// Sends the interrupt of a level-triggered pin if its line is up and none is under way.
    fn service_level(&mut self, pin: usize, send: Send<'_>) {
        let idle = self.entries[pin] & (MASKED | REMOTE_IRR) == 0;
        if self.is_level(pin) && idle && self.lines & (1 << pin) != 0 && send(self.message(pin)) {
            self.entries[pin] |= REMOTE_IRR;
        }
    }

    /// The level-triggered interrupt `vector` ended, on a local APIC or by the EOI register.
    pub(super) fn end_of_interrupt(&mut self, vector: u8, send: Send<'_>) {
        for pin in 0..PINS {
            if self.entries[pin] as u8 == vector && self.entries[pin] & REMOTE_IRR != 0 {
                self.entries[pin] &= !REMOTE_IRR;
                self.service_level(pin, send);
            }
        }
    }

    /// Reads the register at `offset` of the page.
    pub(super) fn read(&self, offset: u32) -> u32 {
        match offset {
            REGISTER_SELECT => u32::from(self.select),
            REGISTER_WINDOW => self.read_window(),
            _ => 0,
        }
    }

    fn read_window(&self) -> u32 {
        match self.select {
            0 | 2 => self.id,
            1 => VERSION,
            at @ 0x10..=0x3f => {
                let entry = self.entries[usize::from(at - 0x10) / 2];
                if at & 1 == 0 { entry as u32 } else { (entry >> 32) as u32 }
            }
            _ => 0,
        }
    }

    /// Writes the register at `offset` of the page.
    pub(super) fn write(&mut self, offset: u32, value: u32, send: Send<'_>) {
        match offset {
            REGISTER_SELECT => self.select = value as u8,
            REGISTER_WINDOW => self.write_window(value, send),
            REGISTER_EOI => self.end_of_interrupt(value as u8, send),
            _ => {}
        }
    }

    fn write_window(&mut self, value: u32, send: Send<'_>) {
        match self.select {
            0 => self.id = value & 0x0f00_0000,
            at @ 0x10..=0x3f => self.write_entry(usize::from(at - 0x10) / 2, at & 1 != 0, value, send),
            _ => {}
        }
    }

    fn write_entry(&mut self, pin: usize, high: bool, value: u32, send: Send<'_>) {
        let old = self.entries[pin];
        let written = if high {
            old & 0xffff_ffff | u64::from(value) << 32
        } else {
            old & !0xffff_ffff | u64::from(value)
        };
        self.entries[pin] = written & WRITABLE | old & REMOTE_IRR;
        if self.is_level(pin) {
            self.service_level(pin, send);
        } else {
            // Kernels end a level interrupt that got stuck by making its pin edge-triggered for a moment.
            self.entries[pin] &= !REMOTE_IRR;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Typed, since other crates can compare bytes too.
    const NONE: [u8; 0] = [];

    /// An IOAPIC with a bus that records, and accepts if told to.
    struct Rig {
        ioapic: IoApic,
        sent: Vec<Message>,
        accept: bool,
    }

    impl Rig {
        fn new() -> Rig {
            Rig { ioapic: IoApic::new(), sent: Vec::new(), accept: true }
        }

        fn run(&mut self, act: impl FnOnce(&mut IoApic, Send<'_>)) -> Vec<u8> {
            let (sent, accept) = (&mut self.sent, self.accept);
            act(&mut self.ioapic, &mut |message| {
                sent.push(message);
                accept
            });
            self.sent.drain(..).map(|message| message.vector).collect()
        }

        fn write(&mut self, register: u8, value: u32) -> Vec<u8> {
            self.run(|ioapic, send| {
                ioapic.write(REGISTER_SELECT, register.into(), send);
                ioapic.write(REGISTER_WINDOW, value, send);
            })
        }

        fn read(&mut self, register: u8) -> u32 {
            self.run(|ioapic, send| ioapic.write(REGISTER_SELECT, register.into(), send));
            self.ioapic.read(REGISTER_WINDOW)
        }

        fn line(&mut self, pin: usize, level: bool) -> Vec<u8> {
            self.run(|ioapic, send| ioapic.set_line(pin, level, send))
        }

        fn eoi(&mut self, vector: u8) -> Vec<u8> {
            self.run(|ioapic, send| ioapic.end_of_interrupt(vector, send))
        }
    }

    #[test]
    fn registers_after_reset() {
        let mut rig = Rig::new();
        assert_eq!(rig.read(1), 0x0017_0020);
        assert_eq!(rig.read(0), 0);
        for pin in 0..PINS as u8 {
            assert_eq!((rig.read(0x10 + 2 * pin), rig.read(0x11 + 2 * pin)), (0x1_0000, 0));
        }
        assert_eq!(rig.read(0x40), 0);
    }

    #[test]
    fn read_only_bits_of_an_entry_stay() {
        let mut rig = Rig::new();
        rig.write(0x10, 0xffff_ffff);
        rig.write(0x11, 0xffff_ffff);
        assert_eq!((rig.read(0x10), rig.read(0x11)), (0x0001_afff, 0xff00_0000));
    }

    #[test]
    fn edge_sends_once_for_each_rise() {
        let mut rig = Rig::new();
        rig.write(0x10 + 2 * 4, 0x31);
        assert_eq!(rig.line(4, true), [0x31]);
        assert_eq!(rig.line(4, true), NONE);
        assert_eq!(rig.line(4, false), NONE);
        assert_eq!(rig.line(4, true), [0x31]);
        assert_eq!(rig.eoi(0x31), NONE);
    }

    #[test]
    fn edge_at_a_masked_pin_is_lost() {
        let mut rig = Rig::new();
        assert_eq!(rig.line(4, true), NONE);
        assert_eq!(rig.write(0x10 + 2 * 4, 0x31), NONE);
    }

    #[test]
    fn level_waits_for_its_end_and_comes_again_while_the_line_is_up() {
        let mut rig = Rig::new();
        assert_eq!(rig.line(9, true), NONE);
        assert_eq!(rig.write(0x10 + 2 * 9, 0x8041), [0x41], "unmasked with the line up");
        assert_eq!(rig.read(0x10 + 2 * 9), 0xc041, "Remote IRR");
        assert_eq!(rig.line(9, false), NONE);
        assert_eq!(rig.line(9, true), NONE, "one is under way");
        assert_eq!(rig.eoi(0x40), NONE);
        assert_eq!(rig.eoi(0x41), [0x41]);
        assert_eq!(rig.line(9, false), NONE);
        assert_eq!(rig.eoi(0x41), NONE);
        assert_eq!(rig.read(0x10 + 2 * 9), 0x8041);
    }

    #[test]
    fn level_that_nobody_accepts_is_not_in_service() {
        let mut rig = Rig::new();
        rig.accept = false;
        assert_eq!(rig.write(0x10 + 2 * 9, 0x8041), NONE);
        assert_eq!(rig.line(9, true), [0x41]);
        assert_eq!(rig.read(0x10 + 2 * 9), 0x8041);
        rig.accept = true;
        assert_eq!(rig.write(0x10 + 2 * 9, 0x8041), [0x41]);
    }

    #[test]
    fn eoi_register_ends_a_level_interrupt() {
        let mut rig = Rig::new();
        rig.write(0x10 + 2 * 9, 0x8041);
        rig.line(9, true);
        assert_eq!(rig.run(|ioapic, send| ioapic.write(REGISTER_EOI, 0x41, send)), [0x41]);
    }

    #[test]
    fn switching_to_edge_clears_remote_irr() {
        let mut rig = Rig::new();
        rig.write(0x10 + 2 * 9, 0x8041);
        rig.line(9, true);
        rig.write(0x10 + 2 * 9, 0x1_0041);
        assert_eq!(rig.read(0x10 + 2 * 9), 0x1_0041);
        assert_eq!(rig.write(0x10 + 2 * 9, 0x8041), [0x41]);
    }
}
