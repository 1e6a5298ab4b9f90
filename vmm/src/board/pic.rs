//! The pair of 8259A interrupt controllers.
//!
//! Story: ISA lines 0..=15 come in; the master's output goes to LINT0 of the local APICs, or straight to the CPU.
//! A CPU that accepts it asks for the vector, which acknowledges the interrupt.
//!
//! Holds:
//! - BOARD-PIC-1: the vector returned belongs to a line that was requested and unmasked, or is the spurious one
//!   (line 7), for which no in-service bit is set.
//! - The slave's output is the master's line 2, and falls for a moment at each acknowledgement, so that each of its
//!   interrupts is an edge to the master.
//!
//! Limits: an edge stays requested when its line falls again before it is acknowledged (a real 8259A would make it
//! spurious; QEMU and KVM latch it too). ICW1's level bit is ignored, as chip sets with ELCR do.
//!
//! See: Intel 8259A data sheet, operation command words and priority modes.

/// Where the pair's vectors start until a kernel initialises it: as firmware has left it since the PC/AT.
const BASES: [u8; 2] = [0x08, 0x70];
/// ELCR bits that exist: lines 0, 1, 2, 8 and 13 are always edge-triggered.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];
/// The master's line that the slave's output is.
const CASCADE: u8 = 2;

/// Where an initialisation sequence stands: which word the data port expects next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// The mask: the chip is in operation.
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug)]
struct Chip {
    master: bool,
    /// Line levels, requests, masks, in-service bits: bit n is line n.
    lines: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    elcr: u8,
    base: u8,
    /// The line of the lowest priority; the next one has the highest.
    lowest: u8,
    expect: Expect,
    needs_icw4: bool,
    single: bool,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    fully_nested: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
}

impl Chip {
    fn new(master: bool) -> Chip {
        Chip {
            master,
            // The PIT's output is up from the start, and that is no edge.
            lines: u8::from(master),
            irr: 0,
            imr: 0xff,
            isr: 0,
            elcr: 0,
            base: BASES[usize::from(!master)],
            lowest: 7,
            expect: Expect::Mask,
            needs_icw4: false,
            single: false,
            read_isr: false,
            poll: false,
            special_mask: false,
            fully_nested: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
        }
    }

    /// Drives a line: a rising edge, or in level mode the level, is a request.
    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1 << line;
        let was = self.lines & bit != 0;
        self.lines = self.lines & !bit | if level { bit } else { 0 };
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if level && !was {
            self.irr |= bit;
        }
    }

    /// Chooses which lines are level-triggered; those request from now on while they are up.
    fn set_elcr(&mut self, elcr: u8) {
        self.elcr = elcr;
        self.irr = self.irr & !elcr | self.lines & elcr;
    }

    /// How urgent the most urgent line of `set` is: 0 the most, 8 if the set is empty.
    fn rank(&self, set: u8) -> u32 {
        let first = (self.lowest + 1) & 7;
        set.rotate_right(first.into()).trailing_zeros().min(8)
    }

    fn line_of_rank(&self, rank: u32) -> u8 {
        ((u32::from(self.lowest) + 1 + rank) & 7) as u8
    }

    /// The line that the chip interrupts for, if any: unmasked, requested, and more urgent than all in service.
    fn pending(&self) -> Option<u8> {
        let rank = self.rank(self.irr & !self.imr);
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        // In special fully nested mode a more urgent line of the slave may interrupt the slave's own handler.
        if self.fully_nested && self.master {
            in_service &= !(1 << CASCADE);
        }
        (rank < 8 && rank < self.rank(in_service)).then(|| self.line_of_rank(rank))
    }

    /// The CPU accepts `line`.
    fn acknowledge(&mut self, line: u8) {
        let bit = 1 << line;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = line;
        }
    }

    /// ICW1 begins an initialisation. Edge detection starts anew: a line that is up must fall first.
    fn begin_init(&mut self, icw1: u8) {
        let keep = Chip { lines: self.lines, elcr: self.elcr, base: self.base, ..Chip::new(self.master) };
        *self = Chip {
            irr: self.lines & self.elcr,
            imr: 0,
            expect: Expect::Icw2,
            needs_icw4: icw1 & 1 != 0,
            single: icw1 & 2 != 0,
            ..keep
        };
    }

    fn write_command(&mut self, value: u8) {
        match value & 0x18 {
            0x10 | 0x18 => self.begin_init(value),
            0x08 => self.write_ocw3(value),
            _ => self.write_ocw2(value),
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        self.poll = value & 4 != 0;
        if value & 2 != 0 {
            self.read_isr = value & 1 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let line = value & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            1 | 5 => self.end_most_urgent(value >> 5 == 5),
            3 => self.isr &= !(1 << line),
            7 => {
                self.isr &= !(1 << line);
                self.lowest = line;
            }
            6 => self.lowest = line,
            _ => {}
        }
    }

    /// Non-specific end of interrupt. A masked in-service bit is left alone in special mask mode.
    fn end_most_urgent(&mut self, rotate: bool) {
        let visible = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let rank = self.rank(visible);
        if rank < 8 {
            let line = self.line_of_rank(rank);
            self.isr &= !(1 << line);
            if rotate {
                self.lowest = line;
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.expect {
            Expect::Mask => self.imr = value,
            Expect::Icw2 => {
                self.base = value & 0xf8;
                self.expect = if self.single { self.after_icw3() } else { Expect::Icw3 };
            }
            // Who is whose slave is soldered.
            Expect::Icw3 => self.expect = self.after_icw3(),
            Expect::Icw4 => {
                self.fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                self.expect = Expect::Mask;
            }
        }
    }

    fn after_icw3(&self) -> Expect {
        if self.needs_icw4 { Expect::Icw4 } else { Expect::Mask }
    }

    /// A read after a poll command acknowledges like the CPU would.
    fn read_poll(&mut self) -> u8 {
        self.poll = false;
        match self.pending() {
            Some(line) => {
                self.acknowledge(line);
                0x80 | line
            }
            None => 0,
        }
    }

    fn read(&mut self, data_port: bool) -> u8 {
        match (self.poll, data_port) {
            (true, _) => self.read_poll(),
            (false, true) => self.imr,
            (false, false) if self.read_isr => self.isr,
            (false, false) => self.irr,
        }
    }
}

/// The master and the slave.
#[derive(Clone, Debug)]
pub(super) struct PicPair {
    chips: [Chip; 2],
}

impl PicPair {
    /// Both chips with their vectors at 0x08 and 0x70, and every line masked.
    pub(super) fn new() -> PicPair {
        PicPair { chips: [Chip::new(true), Chip::new(false)] }
    }

    /// The slave's output to the master's line 2.
    fn cascade(&mut self) {
        let output = self.chips[1].pending().is_some();
        self.chips[0].set_line(CASCADE, output);
    }

    /// Drives ISA line `line` (0..=15, without 2).
    pub(super) fn set_line(&mut self, line: u8, level: bool) {
        match line {
            CASCADE | 16.. => {}
            0..=7 => self.chips[0].set_line(line, level),
            8..=15 => {
                self.chips[1].set_line(line - 8, level);
                self.cascade();
            }
        }
    }

    /// The master's output, INTR.
    pub(super) fn output(&self) -> bool {
        self.chips[0].pending().is_some()
    }

    /// True if an edge on `line` would be a new request that is not masked.
    pub(super) fn would_matter(&self, line: u8) -> bool {
        let chip = &self.chips[usize::from(line >> 3 & 1)];
        (chip.imr | chip.irr) & (1 << (line & 7)) == 0
    }

    /// The CPU's acknowledgement: the vector of the most urgent interrupt, or a spurious one.
    pub(super) fn acknowledge(&mut self) -> u8 {
        let [master, slave] = &mut self.chips;
        let Some(line) = master.pending() else { return master.base + 7 };
        master.acknowledge(line);
        if line != CASCADE || master.single {
            return master.base + line;
        }
        let line = slave.pending();
        line.into_iter().for_each(|line| slave.acknowledge(line));
        let vector = slave.base + line.unwrap_or(7);
        master.set_line(CASCADE, false);
        self.cascade();
        vector
    }

    /// Reads port 0x20, 0x21, 0xa0, 0xa1, 0x4d0 or 0x4d1.
    pub(super) fn read(&mut self, port: u16) -> u8 {
        let (chip, data_port) = PicPair::decode(port);
        if port >= 0x4d0 {
            return self.chips[chip].elcr;
        }
        let value = self.chips[chip].read(data_port);
        self.cascade();
        value
    }

    /// Writes port 0x20, 0x21, 0xa0, 0xa1, 0x4d0 or 0x4d1.
    pub(super) fn write(&mut self, port: u16, value: u8) {
        let (chip, data_port) = PicPair::decode(port);
        let target = &mut self.chips[chip];
        match (port, data_port) {
            (0x4d0.., _) => target.set_elcr(value & ELCR_WRITABLE[chip]),
            (_, true) => target.write_data(value),
            (_, false) => target.write_command(value),
        }
        self.cascade();
    }

    fn decode(port: u16) -> (usize, bool) {
        match port {
            0x4d0.. => (usize::from(port & 1), false),
            _ => (usize::from(port & 0x80 != 0), port & 1 != 0),
        }
    }
}

#[cfg(test)]
#[path = "pic_tests.rs"]
mod tests;
