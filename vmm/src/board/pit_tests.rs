//! The 8254 against its data sheet.

use super::*;

/// The first nanosecond of a tick.
fn at(tick: u64) -> Nanos {
    Nanos::of_tick(tick, HERTZ)
}

/// A PIT whose counter `number` was given `control`'s mode (two-byte access) at tick 0 and `count` at once, so that
/// counting begins at tick 1.
fn loaded(number: u8, mode: u8, count: u16) -> Pit {
    let mut pit = Pit::new(at(0));
    if number == 2 {
        pit.write_port_61(at(0), 1);
    }
    pit.write(at(0), 0x43, number << 6 | 0x30 | mode << 1);
    let [low, high] = count.to_le_bytes();
    pit.write(at(0), 0x40 + u16::from(number), low);
    pit.write(at(0), 0x40 + u16::from(number), high);
    pit
}

fn read_count(pit: &mut Pit, tick: u64, number: u8) -> u16 {
    pit.advance(at(tick));
    pit.write(at(tick), 0x43, number << 6);
    let port = 0x40 + u16::from(number);
    u16::from_le_bytes([pit.read(at(tick), port), pit.read(at(tick), port)])
}

fn outputs(pit: &Pit, ticks: std::ops::Range<u64>) -> String {
    ticks.map(|tick| if pit.output(at(tick)) { 'H' } else { '_' }).collect()
}

#[test]
fn mode_0_rises_at_the_terminal_count_and_wraps() {
    let mut pit = loaded(0, 0, 4);
    assert_eq!(outputs(&pit, 0..9), "_____HHHH");
    assert_eq!(read_count(&mut pit, 1, 0), 4);
    assert_eq!(read_count(&mut pit, 4, 0), 1);
    assert_eq!(read_count(&mut pit, 5, 0), 0);
    assert_eq!(read_count(&mut pit, 6, 0), 0xffff);
    assert_eq!(pit.next_rise(), None);
}

#[test]
fn mode_0_first_byte_stops_and_the_second_starts_anew() {
    let mut pit = loaded(0, 0, 4);
    pit.advance(at(6));
    pit.write(at(6), 0x40, 3);
    assert!(!pit.output(at(20)));
    pit.write(at(20), 0x40, 0);
    assert_eq!(outputs(&pit, 20..26), "____HH");
}

#[test]
fn mode_2_falls_for_the_last_tick_of_each_period() {
    let mut pit = loaded(0, 2, 4);
    assert_eq!(outputs(&pit, 1..13), "HHH_HHH_HHH_");
    let counts: Vec<u16> = (1..10).map(|tick| read_count(&mut pit, tick, 0)).collect();
    assert_eq!(counts, [4, 3, 2, 1, 4, 3, 2, 1, 4]);
}

#[test]
fn mode_3_is_a_square_wave_also_for_odd_counts() {
    assert_eq!(outputs(&loaded(0, 3, 4), 1..13), "HH__HH__HH__");
    assert_eq!(outputs(&loaded(0, 3, 5), 1..16), "HHH__HHH__HHH__");
    let mut pit = loaded(0, 3, 6);
    let counts: Vec<u16> = (1..8).map(|tick| read_count(&mut pit, tick, 0)).collect();
    assert_eq!(counts, [6, 4, 2, 6, 4, 2, 6]);
}

#[test]
fn mode_4_strobes_once() {
    assert_eq!(outputs(&loaded(0, 4, 3), 0..10), "HHHH_HHHHH");
    let mut pit = loaded(0, 4, 3);
    assert_eq!(pit.next_rise(), Some(at(5)));
    assert!(pit.advance(at(5)));
    assert!(!pit.advance(at(500_000)));
}

#[test]
fn mode_1_counts_from_a_rising_gate() {
    let mut pit = loaded(2, 1, 3);
    let high = |pit: &Pit, tick| pit.read_port_61(at(tick)) & 0x20 != 0;
    assert!(high(&pit, 100));
    pit.write_port_61(at(100), 0);
    assert!(high(&pit, 100));
    pit.write_port_61(at(100), 1);
    assert!(!high(&pit, 100) && !high(&pit, 103) && high(&pit, 104));
}

#[test]
fn gate_stops_mode_0_and_reloads_mode_2() {
    let mut pit = loaded(2, 0, 10);
    pit.write_port_61(at(4), 0);
    assert_eq!(read_count(&mut pit, 50, 2), 7);
    pit.write_port_61(at(50), 1);
    assert_eq!(read_count(&mut pit, 52, 2), 5);
    let mut pit = loaded(2, 2, 10);
    pit.write_port_61(at(4), 0);
    assert!(pit.read_port_61(at(40)) & 0x20 != 0, "output is high while the gate is low");
    pit.write_port_61(at(50), 1);
    assert_eq!(read_count(&mut pit, 52, 2), 9);
}

#[test]
fn calibration_loop_of_port_61_sees_the_output_rise_after_the_count() {
    let mut pit = Pit::new(at(0));
    pit.write_port_61(at(0), 1);
    pit.write(at(0), 0x43, 0xb0);
    pit.write(at(0), 0x42, 0x9c);
    pit.write(at(0), 0x42, 0x2e);
    let first = (0..20_000).find(|&tick| pit.read_port_61(at(tick)) & 0x20 != 0);
    assert_eq!(first, Some(0x2e9c + 1));
}

#[test]
fn rises_are_reported_once_however_late_and_do_not_drift() {
    let mut pit = loaded(0, 2, 1193);
    let mut now = 0;
    let mut rises = 0u64;
    for step in (0..5000u64).map(|i| 1 + i * 104_729 % 3_000_017) {
        now += step;
        rises += u64::from(pit.advance(Nanos(now)));
        let next = pit.next_rise().unwrap();
        assert!(next > Nanos(now));
        assert_eq!((next.ticks(HERTZ) - 1) % 1193, 0);
        assert!(!pit.advance(Nanos(now)));
    }
    assert!(rises > 2000 && rises <= 5000);
}

#[test]
fn new_count_without_a_control_word_waits_for_the_period_to_end() {
    let mut pit = loaded(0, 2, 100);
    pit.advance(at(251));
    pit.write(at(251), 0x40, 7);
    pit.write(at(251), 0x40, 0);
    pit.write(at(251), 0x43, 0b1110_0010);
    assert_eq!(pit.read(at(251), 0x40) & 0x40, 0x40, "null count");
    assert_eq!(pit.next_rise(), Some(at(301)));
    assert!(pit.advance(at(301)));
    assert_eq!(pit.next_rise(), Some(at(308)));
    pit.write(at(301), 0x43, 0b1110_0010);
    assert_eq!(pit.read(at(301), 0x40) & 0x40, 0);
}

#[test]
fn latch_holds_until_read_and_ignores_a_second() {
    let mut pit = loaded(0, 2, 1000);
    pit.write(at(11), 0x43, 0);
    pit.write(at(500), 0x43, 0);
    assert_eq!([pit.read(at(600), 0x40), pit.read(at(700), 0x40)], 990u16.to_le_bytes());
    assert_eq!(read_count(&mut pit, 700, 0), 1000 - 699);
}

#[test]
fn read_back_gives_status_and_then_the_count() {
    let mut pit = loaded(0, 2, 1000);
    pit.write(at(11), 0x43, 0xc2);
    assert_eq!(pit.read(at(11), 0x40), 0xb4);
    assert_eq!([pit.read(at(600), 0x40), pit.read(at(700), 0x40)], 990u16.to_le_bytes());
}

#[test]
fn single_byte_access_and_bcd() {
    let mut pit = Pit::new(at(0));
    pit.write(at(0), 0x43, 0x14);
    pit.write(at(0), 0x40, 200);
    assert_eq!(pit.read(at(11), 0x40), 190);
    pit.write(at(20), 0x43, 0x24);
    pit.write(at(20), 0x40, 2);
    assert_eq!(pit.read(at(21), 0x40), 2);
    pit.write(at(30), 0x43, 0x35);
    pit.write(at(30), 0x40, 0x00);
    pit.write(at(30), 0x40, 0x20);
    assert_eq!(read_count(&mut pit, 32, 0), 0x1999);
}

#[test]
fn count_zero_is_the_longest() {
    let pit = loaded(0, 2, 0);
    assert_eq!(pit.next_rise(), Some(at(65_537)));
}

#[test]
fn one_tick_period_a_century_late_costs_one_step() {
    let mut pit = loaded(0, 2, 1);
    assert!(pit.advance(Nanos(3_000_000_000_000_000_000)));
    assert!(!pit.advance(Nanos(3_000_000_000_000_000_000)));
}

#[test]
fn refresh_bit_of_port_61_toggles() {
    let pit = Pit::new(at(0));
    let toggles = (0..1000).filter(|&t| (pit.read_port_61(at(t)) ^ pit.read_port_61(at(t + 1))) & 0x10 != 0);
    assert_eq!(toggles.count(), 1000 / 18);
}
