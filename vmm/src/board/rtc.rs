//! The MC146818 clock with its CMOS memory, at ports 0x70 and 0x71.
//!
//! Story: kernels read the time of day and the memory sizes, some also set the clock or take its periodic and
//! update interrupts (IRQ 8). The time is that of the epoch handed to the board, plus guest time.
//!
//! Not here: the alarm; the divider's reset.
//!
//! See: Motorola MC146818A data sheet; QEMU's microvm for what the memory-size bytes hold.

use super::memory_map::MemoryMap;
use super::time::{NANOS_PER_SECOND, Nanos};

const SECONDS: usize = 0x00;
const MINUTES: usize = 0x02;
const HOURS: usize = 0x04;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const STATUS_A: usize = 0x0a;
const STATUS_B: usize = 0x0b;
const STATUS_C: usize = 0x0c;
const STATUS_D: usize = 0x0d;
const CENTURY: usize = 0x32;
const CENTURY_PS2: usize = 0x37;
/// Bytes of CMOS memory.
const CMOS_BYTES: usize = 128;

/// Status A: an update is in progress.
const A_UIP: u8 = 0x80;
/// Status B: the clock is being set; interrupt enables; binary mode; 24-hour mode.
const B_SET: u8 = 0x80;
const B_PIE: u8 = 0x40;
const B_UIE: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
/// Status C: an interrupt is asserted; it is periodic, or of the update.
const C_IRQ: u8 = 0x80;
const C_PERIODIC: u8 = 0x40;
const C_UPDATE: u8 = 0x10;

/// How long before the second ends UIP is up: eight ticks of the 32768 Hz crystal.
const UPDATE_NANOS: u64 = 8 * NANOS_PER_SECOND / 32_768;

/// The clock and its memory.
#[derive(Clone, Debug)]
pub(super) struct Rtc {
    index: usize,
    cmos: [u8; CMOS_BYTES],
    /// Seconds since 1970 at guest time zero.
    epoch: i64,
    /// Up to when the flags of status C are true.
    advanced: Nanos,
}

impl Rtc {
    /// A clock that shows `epoch` seconds since 1970 at guest time zero, and `memory`'s sizes.
    pub(super) fn new(epoch: i64, memory: &MemoryMap) -> Rtc {
        let mut cmos = [0; CMOS_BYTES];
        cmos[STATUS_A] = 0x26;
        cmos[STATUS_B] = B_24_HOURS;
        cmos[STATUS_D] = 0x80;
        let low = memory.below_4g();
        let mut put = |at: usize, bytes: usize, value: u64| {
            cmos[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        let extended = (low.saturating_sub(1 << 20) >> 10).min(0xffff);
        put(0x15, 2, (low >> 10).min(640));
        put(0x17, 2, extended);
        put(0x30, 2, extended);
        put(0x34, 2, (low.saturating_sub(16 << 20) >> 16).min(0xffff));
        put(0x5b, 3, (memory.above_4g() >> 16).min(0xff_ffff));
        Rtc { index: 0, cmos, epoch, advanced: Nanos(0) }
    }

    /// What a reset does: interrupts off. Time and memory are on the battery.
    pub(super) fn reset(&mut self) {
        self.index = 0;
        self.cmos[STATUS_B] &= !(B_PIE | B_UIE);
        self.cmos[STATUS_C] = 0;
    }

    fn seconds(&self, now: Nanos) -> i64 {
        self.epoch.saturating_add((now.0 / NANOS_PER_SECOND) as i64)
    }

    fn status_b(&self, bit: u8) -> bool {
        self.cmos[STATUS_B] & bit != 0
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b(B_BINARY) { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b(B_BINARY) { value } else { (value >> 4) * 10 + (value & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        match (self.status_b(B_24_HOURS), hour) {
            (true, _) => self.encode(hour),
            (false, ..12) => self.encode((hour + 11) % 12 + 1),
            (false, _) => self.encode((hour + 11) % 12 + 1) | 0x80,
        }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.status_b(B_24_HOURS) {
            return self.decode(value);
        }
        let afternoon = if value & 0x80 != 0 { 12 } else { 0 };
        self.decode(value & 0x7f) % 12 + afternoon
    }

    /// Puts the time at `now` into the time bytes.
    fn show_time(&mut self, now: Nanos) {
        let date = Date::of_seconds(self.seconds(now));
        self.cmos[SECONDS] = self.encode(date.second);
        self.cmos[MINUTES] = self.encode(date.minute);
        self.cmos[HOURS] = self.encode_hour(date.hour);
        self.cmos[WEEKDAY] = self.encode(date.weekday);
        self.cmos[DAY] = self.encode(date.day);
        self.cmos[MONTH] = self.encode(date.month);
        self.cmos[YEAR] = self.encode(date.year.rem_euclid(100) as u8);
        let century = self.encode(date.year.div_euclid(100).rem_euclid(100) as u8);
        self.cmos[CENTURY] = century;
        self.cmos[CENTURY_PS2] = century;
    }

    /// Takes the time from the time bytes. Fields out of range spill into the next, as a calendar's do.
    fn set_time(&mut self, now: Nanos) {
        let field = |at: usize| i64::from(self.decode(self.cmos[at]));
        let year = field(CENTURY) * 100 + field(YEAR);
        let days = days_of_civil(year, field(MONTH).clamp(1, 12), field(DAY));
        let hour = i64::from(self.decode_hour(self.cmos[HOURS]));
        let seconds = days * 86_400 + hour * 3600 + field(MINUTES) * 60 + field(SECONDS);
        self.epoch = seconds - (now.0 / NANOS_PER_SECOND) as i64;
    }

    /// Interrupts a second that the rate bits of status A ask for.
    fn periodic_hertz(&self) -> Option<u64> {
        match self.cmos[STATUS_A] & 0xf {
            0 => None,
            // The two fastest taps of the chip's divider are the two next ones again.
            rate @ 1..=2 => Some(32_768 >> (rate + 6)),
            rate => Some(32_768 >> (rate - 1)),
        }
    }

    /// Moves to `now`: raises the flags of status C.
    pub(super) fn advance(&mut self, now: Nanos) {
        let (from, to) = (self.advanced, now.max(self.advanced));
        if self.periodic_hertz().is_some_and(|hertz| to.ticks(hertz) > from.ticks(hertz)) {
            self.cmos[STATUS_C] |= C_PERIODIC;
        }
        if to.ticks(1) > from.ticks(1) && !self.status_b(B_SET) {
            self.cmos[STATUS_C] |= C_UPDATE;
        }
        self.advanced = to;
    }

    /// The interrupt line, IRQ 8: up until status C is read.
    pub(super) fn output(&self) -> bool {
        self.cmos[STATUS_C] & self.cmos[STATUS_B] & (C_PERIODIC | C_UPDATE) != 0
    }

    /// When the interrupt line next rises.
    pub(super) fn next_deadline(&self) -> Option<Nanos> {
        if self.output() {
            return None;
        }
        let next = |hertz| Nanos::of_tick(self.advanced.ticks(hertz) + 1, hertz);
        let periodic = self.periodic_hertz().filter(|_| self.status_b(B_PIE)).map(next);
        let update = (self.status_b(B_UIE) && !self.status_b(B_SET)).then(|| next(1));
        periodic.into_iter().chain(update).min()
    }

    /// Selects the byte that port 0x71 shows; bit 7 (NMI mask) is ignored.
    pub(super) fn select(&mut self, value: u8) {
        self.index = usize::from(value) % CMOS_BYTES;
    }

    fn is_time(&self) -> bool {
        matches!(self.index, SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY | CENTURY_PS2)
    }

    /// Reads port 0x71. [`Rtc::advance`] to `now` comes first, here and below.
    pub(super) fn read(&mut self, now: Nanos) -> u8 {
        if self.is_time() && !self.status_b(B_SET) {
            self.show_time(now);
        }
        match self.index {
            STATUS_A => self.cmos[STATUS_A] | if self.updating(now) { A_UIP } else { 0 },
            STATUS_C => {
                let irq = if self.output() { C_IRQ } else { 0 };
                std::mem::take(&mut self.cmos[STATUS_C]) | irq
            }
            at => self.cmos[at],
        }
    }

    fn updating(&self, now: Nanos) -> bool {
        !self.status_b(B_SET) && now.0 % NANOS_PER_SECOND >= NANOS_PER_SECOND - UPDATE_NANOS
    }

    /// Writes port 0x71.
    pub(super) fn write(&mut self, now: Nanos, value: u8) {
        match self.index {
            STATUS_A => self.cmos[STATUS_A] = value & !A_UIP,
            STATUS_B => self.write_status_b(now, value),
            STATUS_C | STATUS_D => {}
            at if self.is_time() => self.write_time(now, at, value),
            at => self.cmos[at] = value,
        }
    }

    fn write_time(&mut self, now: Nanos, at: usize, value: u8) {
        let running = !self.status_b(B_SET);
        if running {
            self.show_time(now);
        }
        self.cmos[at] = value;
        if at == CENTURY_PS2 {
            self.cmos[CENTURY] = value;
        }
        if running {
            self.set_time(now);
        }
    }

    /// SET freezes the time bytes; its end starts the clock from what they then hold.
    fn write_status_b(&mut self, now: Nanos, value: u8) {
        match (self.status_b(B_SET), value & B_SET != 0) {
            (false, true) => {
                self.show_time(now);
                // The chip clears the update interrupt's enable with it.
                self.cmos[STATUS_B] = value & !B_UIE;
            }
            (true, false) => {
                self.cmos[STATUS_B] = value;
                self.set_time(now);
            }
            _ => self.cmos[STATUS_B] = value,
        }
    }
}

/// A broken-down time.
#[derive(Debug, PartialEq, Eq)]
struct Date {
    year: i64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Date {
    /// From seconds since 1970, in UTC without leap seconds.
    fn of_seconds(seconds: i64) -> Date {
        let days = seconds.div_euclid(86_400);
        let second = seconds.rem_euclid(86_400);
        let (year, month, day) = civil_of_days(days);
        Date {
            year,
            month,
            day,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            hour: (second / 3600) as u8,
            minute: (second / 60 % 60) as u8,
            second: (second % 60) as u8,
        }
    }
}

/// Days in the 400 years after which the Gregorian calendar repeats.
const DAYS_OF_400_YEARS: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const DAYS_TO_1970: i64 = 719_468;

/// Days from the first of March to the first of the month `m` months later: 0, 31, 61, 92, 122, 153 and so on.
fn days_before_month(m: i64) -> i64 {
    (153 * m + 2) / 5
}

/// Days since 1970 of a date. Years begin in March here, so that the leap day is a year's last.
fn days_of_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let in_era = year.rem_euclid(400);
    let before_year = in_era * 365 + in_era / 4 - in_era / 100;
    let before_month = days_before_month((month + 9) % 12);
    year.div_euclid(400) * DAYS_OF_400_YEARS + before_year + before_month + day - 1 - DAYS_TO_1970
}

/// The year, month (1..=12) and day (1..=31) of a number of days since 1970.
fn civil_of_days(days: i64) -> (i64, u8, u8) {
    let days = days + DAYS_TO_1970;
    let in_era = days.rem_euclid(DAYS_OF_400_YEARS);
    // Take the leap days away, and the rest divides evenly.
    let leap_days = in_era / 1460 - in_era / 36_524 + in_era / 146_096;
    let year = (in_era - leap_days) / 365;
    let in_year = in_era - (year * 365 + year / 4 - year / 100);
    let month = (5 * in_year + 2) / 153;
    let day = in_year - days_before_month(month) + 1;
    let year = days.div_euclid(DAYS_OF_400_YEARS) * 400 + year + i64::from(month >= 10);
    (year, ((month + 2) % 12 + 1) as u8, day as u8)
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
