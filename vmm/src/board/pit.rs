//! The 8254 interval timer, with what port 0x61 shows of it.
//!
//! Story: counter 0 drives IRQ 0, counter 1 once refreshed memory, counter 2 is gated by port 0x61 and is what
//! kernels calibrate against. Each counter's output and count are functions of the 1.193182 MHz ticks since its
//! count was loaded; nothing ticks.
//!
//! Holds: counter 0's rises lie at whole periods from its load, however late it is asked; those missed between two
//! questions count as one.
//!
//! See: Intel 8254 data sheet, mode definitions and read-back command.

use super::time::Nanos;

/// The input clock in hertz: a third of the NTSC colour carrier, as in every PC.
pub(super) const HERTZ: u64 = 1_193_182;

/// How the two bytes of a count go through a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ByteOrder {
    Low,
    High,
    LowThenHigh,
}

/// One counter.
#[derive(Clone, Debug)]
struct Counter {
    /// 0..=5.
    mode: u8,
    order: ByteOrder,
    bcd: bool,
    gate: bool,
    /// The count in effect, 1..=0x10000 (or 10000 in BCD); `None` after a control word until one is written.
    count: Option<u64>,
    /// A count that takes effect at the end of the running period.
    next_count: Option<u64>,
    /// The tick at which counting began, or would have if the gate had been up ever since.
    start: u64,
    /// The tick at which a low gate stopped the counting.
    stopped: Option<u64>,
    /// In modes 1 and 5: a gate edge has come since the control word.
    triggered: bool,
    /// The first byte of a two-byte write.
    low_written: Option<u8>,
    /// The next read of a two-byte count gives the high byte.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    /// As after power-up: mode 3, 65536, counting from `tick` on if the gate is up.
    fn new(tick: u64, gate: bool) -> Counter {
        Counter {
            mode: 3,
            order: ByteOrder::LowThenHigh,
            bcd: false,
            gate,
            count: Some(0x10000),
            next_count: None,
            start: tick,
            stopped: (!gate).then_some(tick),
            triggered: false,
            low_written: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Modes that count only after a rising gate.
    fn waits_for_gate(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Ticks since the load, standing still where the counter does.
    fn elapsed(&self, tick: u64) -> u64 {
        self.stopped.unwrap_or(tick).saturating_sub(self.start)
    }

    /// Lets a waiting count take over once the period that it waits for has ended by `tick`.
    fn take_over(&mut self, tick: u64) {
        let (Some(count), Some(next)) = (self.count, self.next_count) else { return };
        if self.is_periodic() && self.stopped.is_none() && self.elapsed(tick) >= count {
            self.start += count;
            self.count = Some(next);
            self.next_count = None;
        }
    }

    /// The output pin at `tick`.
    fn output(&self, tick: u64) -> bool {
        let Some(count) = self.count else { return self.mode != 0 };
        let elapsed = self.elapsed(tick);
        match self.mode {
            0 => elapsed >= count,
            1 => !self.triggered || elapsed >= count,
            2 => !self.gate || elapsed % count != count - 1,
            3 => !self.gate || elapsed % count < count.div_ceil(2),
            5 => !self.triggered || elapsed != count,
            _ => elapsed != count,
        }
    }

    /// Rises of the output in all the time before `tick`, as far as they come from counting.
    fn rises(&self, tick: u64) -> u64 {
        let Some(count) = self.count else { return 0 };
        let elapsed = self.elapsed(tick);
        match self.mode {
            _ if self.waits_for_gate() && !self.triggered => 0,
            2 | 3 => elapsed / count,
            4 | 5 => u64::from(elapsed > count),
            _ => u64::from(elapsed >= count),
        }
    }

    /// The tick of the next rise after `tick`.
    fn next_rise(&self, tick: u64) -> Option<u64> {
        let count = self.count?;
        let done = self.rises(tick);
        let running = self.stopped.is_none() && (self.triggered || !self.waits_for_gate());
        let after = match self.mode {
            2 | 3 => count.saturating_mul(done + 1),
            4 | 5 => count + 1,
            _ => count,
        };
        (running && (self.is_periodic() || done == 0)).then(|| self.start.saturating_add(after))
    }

    /// The counting element at `tick`, 16 bits.
    fn value(&self, tick: u64) -> u16 {
        let Some(count) = self.count else { return 0 };
        let elapsed = self.elapsed(tick);
        let modulus = if self.bcd { 10_000 } else { 0x10000 };
        let value = match self.mode {
            2 => count - elapsed % count,
            3 => {
                let half = count.div_ceil(2);
                let phase = elapsed % count;
                (count & !1).saturating_sub(2 * if phase < half { phase } else { phase - half })
            }
            _ if self.waits_for_gate() && !self.triggered => count,
            _ => count % modulus + modulus - elapsed % modulus,
        } % modulus;
        if self.bcd { to_bcd(value as u16) } else { value as u16 }
    }

    fn write_control(&mut self, tick: u64, value: u8) {
        let gate = self.gate;
        *self = Counter {
            // Modes 6 and 7 are 2 and 3.
            mode: match value >> 1 & 7 {
                mode @ 6..=7 => mode - 4,
                mode => mode,
            },
            order: match value >> 4 & 3 {
                1 => ByteOrder::Low,
                2 => ByteOrder::High,
                _ => ByteOrder::LowThenHigh,
            },
            bcd: value & 1 != 0,
            count: None,
            ..Counter::new(tick, gate)
        };
    }

    fn write(&mut self, tick: u64, value: u8) {
        let count = match self.order {
            ByteOrder::Low => u16::from(value),
            ByteOrder::High => u16::from(value) << 8,
            ByteOrder::LowThenHigh => match self.low_written.take() {
                Some(low) => u16::from_le_bytes([low, value]),
                None => {
                    self.low_written = Some(value);
                    // In mode 0 the first byte stops the counting.
                    if self.mode == 0 {
                        self.count = None;
                    }
                    return;
                }
            },
        };
        let count = match (self.bcd, from_bcd(count), count) {
            (true, 0, _) => 10_000,
            (true, count, _) => count.into(),
            (false, _, 0) => 0x10000,
            (false, _, count) => count.into(),
        };
        self.load(tick, count);
    }

    /// Takes a new count. The first one after a control word, and any one in modes 0 and 4, is loaded at the next
    /// tick; in the other modes a running period ends first.
    fn load(&mut self, tick: u64, count: u64) {
        let running = self.triggered || !self.waits_for_gate();
        match self.count {
            Some(old) if running && !matches!(self.mode, 0 | 4) => {
                if self.is_periodic() {
                    self.start += self.elapsed(tick) / old * old;
                }
                self.next_count = Some(count);
            }
            _ => {
                self.count = Some(count);
                self.start = tick + 1;
                self.stopped = (!self.gate && !self.waits_for_gate()).then_some(self.start);
            }
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched_count.unwrap_or_else(|| self.value(tick));
        let [low, high] = value.to_le_bytes();
        if self.order == ByteOrder::LowThenHigh {
            self.read_high = !self.read_high;
            if self.read_high {
                return low;
            }
        }
        self.latched_count = None;
        if self.order == ByteOrder::Low { low } else { high }
    }

    /// Latches the count; a latch that has not been read out stays.
    fn latch_count(&mut self, tick: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(tick));
        }
    }

    fn latch_status(&mut self, tick: u64) {
        let order = match self.order {
            ByteOrder::Low => 1,
            ByteOrder::High => 2,
            ByteOrder::LowThenHigh => 3,
        };
        let null_count = self.count.is_none() || self.next_count.is_some() || tick < self.start;
        let status = u8::from(self.output(tick)) << 7
            | u8::from(null_count) << 6
            | order << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }

    /// Drives the gate.
    fn set_gate(&mut self, tick: u64, gate: bool) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate) {
            // A rising gate starts the one-shot anew, and the periodic modes.
            (1..=3 | 5, true) => {
                self.triggered = self.count.is_some();
                self.count = self.next_count.take().or(self.count);
                self.start = tick + 1;
                self.stopped = None;
            }
            (1 | 5, false) => {}
            (_, true) => {
                if let Some(stopped) = self.stopped.take() {
                    self.start += tick.saturating_sub(stopped);
                }
            }
            (_, false) => self.stopped = Some(tick.max(self.start)),
        }
    }
}

fn from_bcd(value: u16) -> u16 {
    (0..4).rev().fold(0, |sum, digit| sum * 10 + (value >> (4 * digit) & 0xf))
}

fn to_bcd(value: u16) -> u16 {
    (0..4).fold(0, |sum, digit| sum | (value / 10u16.pow(digit) % 10) << (4 * digit))
}

/// The three counters and port 0x61.
#[derive(Clone, Debug)]
pub(super) struct Pit {
    counters: [Counter; 3],
    /// The tick up to which counter 0's rises have been reported.
    reported: u64,
    speaker: bool,
}

impl Pit {
    /// As after power-up at `now`: all counters in mode 3 with 65536, counter 2's gate down.
    pub(super) fn new(now: Nanos) -> Pit {
        let tick = now.ticks(HERTZ);
        let counters = [true, true, false].map(|gate| Counter::new(tick, gate));
        Pit { counters, reported: tick, speaker: false }
    }

    /// Moves to `now`; true if counter 0's output rose on the way.
    pub(super) fn advance(&mut self, now: Nanos) -> bool {
        let tick = now.ticks(HERTZ).max(self.reported);
        let timer = &self.counters[0];
        let rose = timer.rises(tick) > timer.rises(self.reported);
        self.counters.iter_mut().for_each(|counter| counter.take_over(tick));
        self.reported = tick;
        rose
    }

    /// Counter 0's output, which is IRQ 0.
    pub(super) fn output(&self, now: Nanos) -> bool {
        self.counters[0].output(now.ticks(HERTZ))
    }

    /// When counter 0's output next rises.
    pub(super) fn next_rise(&self) -> Option<Nanos> {
        self.counters[0].next_rise(self.reported).map(|tick| Nanos::of_tick(tick, HERTZ))
    }

    /// Reads port 0x40..=0x43. [`Pit::advance`] to `now` comes first, here and below.
    pub(super) fn read(&mut self, now: Nanos, port: u16) -> u8 {
        match self.counters.get_mut(usize::from(port & 3)) {
            Some(counter) => counter.read(now.ticks(HERTZ)),
            None => 0,
        }
    }

    /// Writes port 0x40..=0x43.
    pub(super) fn write(&mut self, now: Nanos, port: u16, value: u8) {
        let tick = now.ticks(HERTZ);
        match self.counters.get_mut(usize::from(port & 3)) {
            Some(counter) => counter.write(tick, value),
            None => self.write_control(tick, value),
        }
    }

    fn write_control(&mut self, tick: u64, value: u8) {
        match (self.counters.get_mut(usize::from(value >> 6)), value >> 4 & 3) {
            (Some(counter), 0) => counter.latch_count(tick),
            (Some(counter), _) => counter.write_control(tick, value),
            (None, _) => self.read_back(tick, value),
        }
    }

    /// The read-back command: its bits 4 and 5 ask, when clear, for the status and the count.
    fn read_back(&mut self, tick: u64, value: u8) {
        for (number, counter) in self.counters.iter_mut().enumerate() {
            if value & (2 << number) == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                counter.latch_count(tick);
            }
            if value & 0x10 == 0 {
                counter.latch_status(tick);
            }
        }
    }

    /// Reads port 0x61: counter 2's gate and output, the speaker, and the memory refresh that toggles every 15 us.
    pub(super) fn read_port_61(&self, now: Nanos) -> u8 {
        let tick = now.ticks(HERTZ);
        u8::from(self.counters[2].gate)
            | u8::from(self.speaker) << 1
            | (((tick / 18) & 1) as u8) << 4
            | u8::from(self.counters[2].output(tick)) << 5
    }

    /// Writes port 0x61.
    pub(super) fn write_port_61(&mut self, now: Nanos, value: u8) {
        self.speaker = value & 2 != 0;
        self.counters[2].set_gate(now.ticks(HERTZ), value & 1 != 0);
    }
}

#[cfg(test)]
#[path = "pit_tests.rs"]
mod tests;
