//! The clock against the calendar and its data sheet.

use super::*;

/// 2026-11-21 07:04:06 UTC, a Saturday.
const EPOCH: i64 = 1_795_244_646;
const SECOND: u64 = NANOS_PER_SECOND;

fn rtc() -> Rtc {
    Rtc::new(EPOCH, &MemoryMap::new(64 << 20).unwrap())
}

fn read(rtc: &mut Rtc, now: u64, index: u8) -> u8 {
    rtc.advance(Nanos(now));
    rtc.select(index);
    rtc.read(Nanos(now))
}

fn write(rtc: &mut Rtc, now: u64, index: u8, value: u8) {
    rtc.advance(Nanos(now));
    rtc.select(index);
    rtc.write(Nanos(now), value);
}

fn time(rtc: &mut Rtc, now: u64) -> Vec<u8> {
    [0x32, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00].map(|index| read(rtc, now, index)).to_vec()
}

#[test]
fn shows_the_epoch_in_bcd_and_moves_with_time() {
    let mut rtc = rtc();
    assert_eq!(time(&mut rtc, 0), [0x20, 0x26, 0x11, 0x21, 0x07, 0x07, 0x04, 0x06]);
    assert_eq!(time(&mut rtc, 17 * 3600 * SECOND), [0x20, 0x26, 0x11, 0x22, 0x01, 0x00, 0x04, 0x06]);
    assert_eq!(read(&mut rtc, 0, 0x37), 0x20);
}

#[test]
fn binary_and_12_hour_modes() {
    let mut rtc = rtc();
    write(&mut rtc, 0, 0x0b, B_BINARY | B_24_HOURS);
    assert_eq!(time(&mut rtc, 0), [20, 26, 11, 21, 7, 7, 4, 6]);
    write(&mut rtc, 0, 0x0b, 0);
    let hours = [(0, 0x07), (5, 0x92), (6, 0x81), (16, 0x91), (17, 0x12), (18, 0x01)];
    for (later, shown) in hours {
        assert_eq!(read(&mut rtc, later * 3600 * SECOND, 0x04), shown, "{later} hours on");
        let hour = rtc.decode_hour(shown);
        assert_eq!(hour, ((7 + later) % 24) as u8);
    }
}

#[test]
fn update_in_progress_is_up_just_before_the_second_ends() {
    let mut rtc = rtc();
    assert_eq!(read(&mut rtc, 0, 0x0a), 0x26);
    assert_eq!(read(&mut rtc, SECOND - 244_141, 0x0a), 0x26);
    assert_eq!(read(&mut rtc, SECOND - 244_140, 0x0a), 0xa6);
    assert_eq!(read(&mut rtc, SECOND, 0x0a), 0x26);
}

#[test]
fn setting_the_clock_takes_effect_when_set_ends() {
    let mut rtc = rtc();
    write(&mut rtc, 0, 0x0b, B_SET | B_24_HOURS);
    for (index, value) in [(0x32, 0x19), (0x09, 0x99), (0x08, 0x12), (0x07, 0x31), (0x04, 0x23), (0x02, 0x59)]
    {
        write(&mut rtc, 5 * SECOND, index, value);
    }
    write(&mut rtc, 5 * SECOND, 0x00, 0x58);
    assert_eq!(read(&mut rtc, 90 * SECOND, 0x00), 0x58, "frozen");
    write(&mut rtc, 100 * SECOND, 0x0b, B_24_HOURS);
    assert_eq!(time(&mut rtc, 101 * SECOND)[..5], [0x19, 0x99, 0x12, 0x31, 0x06]);
    assert_eq!(time(&mut rtc, 102 * SECOND), [0x20, 0x00, 0x01, 0x01, 0x07, 0x00, 0x00, 0x00]);
}

#[test]
fn one_field_can_be_set_while_the_clock_runs() {
    let mut rtc = rtc();
    write(&mut rtc, 10 * SECOND, 0x04, 0x15);
    assert_eq!(time(&mut rtc, 10 * SECOND), [0x20, 0x26, 0x11, 0x21, 0x07, 0x15, 0x04, 0x16]);
}

#[test]
fn memory_sizes_are_those_that_microvm_shows() {
    // As read from QEMU 7.2, -M microvm -m 64M.
    let mut rtc = rtc();
    for (index, value) in [(0x15, 0x80), (0x16, 0x02), (0x17, 0), (0x18, 0xfc), (0x30, 0), (0x31, 0xfc)] {
        assert_eq!(read(&mut rtc, 0, index), value, "{index:#x}");
    }
    assert_eq!((read(&mut rtc, 0, 0x34), read(&mut rtc, 0, 0x35)), (0x00, 0x03));
    assert_eq!(read(&mut rtc, 0, 0x0d), 0x80);
    let mut big = Rtc::new(0, &MemoryMap::new(5 << 30).unwrap());
    assert_eq!((read(&mut big, 0, 0x34), read(&mut big, 0, 0x35)), (0x00, 0xbf));
    assert_eq!((read(&mut big, 0, 0x5b), read(&mut big, 0, 0x5c)), (0x00, 0x80));
    assert_eq!((read(&mut big, 0, 0x17), read(&mut big, 0, 0x18)), (0xff, 0xff));
}

#[test]
fn periodic_interrupt_rises_once_and_falls_when_status_c_is_read() {
    let mut rtc = rtc();
    write(&mut rtc, 0, 0x0b, B_PIE | B_24_HOURS);
    let first = rtc.next_deadline().unwrap();
    assert_eq!(first, Nanos(976_563), "1024 Hz");
    rtc.advance(first);
    assert!(rtc.output());
    assert_eq!(rtc.next_deadline(), None);
    rtc.advance(Nanos(100_000_000));
    assert_eq!(read(&mut rtc, 100_000_000, 0x0c), C_IRQ | C_PERIODIC);
    assert!(!rtc.output());
    assert_eq!(read(&mut rtc, 100_000_000, 0x0c), 0);
    assert_eq!(rtc.next_deadline(), Some(Nanos::of_tick(103, 1024)));
}

#[test]
fn update_interrupt_comes_with_the_second() {
    let mut rtc = rtc();
    write(&mut rtc, 100, 0x0b, B_UIE | B_24_HOURS);
    assert_eq!(rtc.next_deadline(), Some(Nanos(SECOND)));
    rtc.advance(Nanos(SECOND));
    assert_eq!(
        read(&mut rtc, SECOND, 0x0c),
        C_IRQ | C_UPDATE | C_PERIODIC,
        "the periodic flag needs no enable"
    );
    write(&mut rtc, SECOND, 0x0b, B_SET | B_UIE | B_24_HOURS);
    assert_eq!(rtc.next_deadline(), None);
    assert_eq!(
        read(&mut rtc, SECOND, 0x0b),
        B_SET | B_24_HOURS,
        "setting the clock ends its update interrupt"
    );
}

#[test]
fn read_only_registers_stay() {
    let mut rtc = rtc();
    write(&mut rtc, 0, 0x0d, 0);
    write(&mut rtc, 0, 0x0c, 0xff);
    write(&mut rtc, 0, 0x0a, 0xff);
    assert_eq!(read(&mut rtc, 0, 0x0d), 0x80);
    assert_eq!(read(&mut rtc, 0, 0x0c), 0);
    assert_eq!(read(&mut rtc, 0, 0x0a), 0x7f);
    write(&mut rtc, 0, 0x40, 0xab);
    assert_eq!(read(&mut rtc, 0, 0xc0), 0xab, "bit 7 of the index is not part of it");
}

#[test]
fn calendar_agrees_with_counting_days() {
    let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let (mut year, mut month, mut day) = (1600i64, 1u8, 1u8);
    let first = days_of_civil(1600, 1, 1);
    assert_eq!(days_of_civil(1970, 1, 1), 0);
    for days in first..first + 146_097 * 2 {
        assert_eq!(civil_of_days(days), (year, month, day));
        assert_eq!(days_of_civil(year, month.into(), day.into()), days);
        let length = match month {
            2 => 28 + u8::from(leap(year)),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        day += 1;
        if day > length {
            (day, month) = (1, month + 1);
        }
        if month > 12 {
            (month, year) = (1, year + 1);
        }
    }
}
