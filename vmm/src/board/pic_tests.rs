//! The 8259A pair against its data sheet.

use super::*;

/// Initialised as kernels do: vectors 0x20 and 0x28, everything unmasked.
fn ready() -> PicPair {
    ready_with(0x01)
}

fn ready_with(icw4: u8) -> PicPair {
    let mut pic = PicPair::new();
    pic.set_line(0, false);
    for (command, base, icw3) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
        pic.write(command, 0x11);
        pic.write(command + 1, base);
        pic.write(command + 1, icw3);
        pic.write(command + 1, icw4);
    }
    pic
}

fn pulse(pic: &mut PicPair, line: u8) {
    pic.set_line(line, true);
    pic.set_line(line, false);
}

fn isr(pic: &mut PicPair) -> [u8; 2] {
    pic.write(0x20, 0x0b);
    pic.write(0xa0, 0x0b);
    [pic.read(0x20), pic.read(0xa0)]
}

fn irr(pic: &mut PicPair) -> [u8; 2] {
    pic.write(0x20, 0x0a);
    pic.write(0xa0, 0x0a);
    [pic.read(0x20), pic.read(0xa0)]
}

#[test]
fn before_initialisation_everything_is_masked() {
    let mut pic = PicPair::new();
    pic.set_line(0, true);
    assert_eq!(irr(&mut pic), [0, 0], "the PIT's line is up from the start");
    pic.set_line(0, false);
    pulse(&mut pic, 0);
    assert!(!pic.output());
    assert_eq!((pic.read(0x21), pic.read(0xa1)), (0xff, 0xff));
    assert_eq!(irr(&mut pic), [1, 0]);
}

#[test]
fn masks_hold_requests_back_and_keep_them() {
    let mut pic = ready();
    pic.write(0x21, 0x08);
    pulse(&mut pic, 3);
    assert!(!pic.output());
    pic.write(0x21, 0);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x23);
}

#[test]
fn a_more_urgent_line_nests_and_a_less_urgent_one_waits_for_its_end() {
    let mut pic = ready();
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x24);
    pulse(&mut pic, 5);
    assert!(!pic.output());
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x21);
    assert_eq!(isr(&mut pic), [0x12, 0]);
    pic.write(0x20, 0x20);
    assert_eq!(isr(&mut pic), [0x10, 0], "the non-specific end takes the most urgent");
    assert!(!pic.output());
    pic.write(0x20, 0x20);
    assert_eq!(pic.acknowledge(), 0x25);
}

#[test]
fn specific_end_takes_the_line_it_names() {
    let mut pic = ready();
    pulse(&mut pic, 4);
    pic.acknowledge();
    pulse(&mut pic, 1);
    pic.acknowledge();
    pic.write(0x20, 0x64);
    assert_eq!(isr(&mut pic), [0x02, 0]);
}

#[test]
fn slave_comes_in_at_the_masters_line_2() {
    let mut pic = ready();
    pulse(&mut pic, 3);
    pulse(&mut pic, 14);
    pulse(&mut pic, 8);
    assert_eq!(pic.acknowledge(), 0x28, "8 before 14 before 3");
    assert_eq!(isr(&mut pic), [0x04, 0x01]);
    assert!(!pic.output(), "the master holds its line 2, and 3 behind it");
    pic.write(0xa0, 0x20);
    pic.write(0x20, 0x20);
    assert_eq!(pic.acknowledge(), 0x2e);
    pic.write(0xa0, 0x20);
    pic.write(0x20, 0x20);
    assert_eq!(pic.acknowledge(), 0x23);
}

#[test]
fn slave_interrupt_that_becomes_due_at_its_own_end_is_an_edge_again() {
    let mut pic = ready();
    pulse(&mut pic, 10);
    assert_eq!(pic.acknowledge(), 0x2a);
    pulse(&mut pic, 11);
    // The order of the two ends does not matter.
    pic.write(0x20, 0x20);
    assert!(!pic.output());
    pic.write(0xa0, 0x20);
    assert_eq!(pic.acknowledge(), 0x2b);
}

#[test]
fn special_fully_nested_mode_lets_the_slave_nest_in_itself() {
    for (icw4, nests) in [(0x11, true), (0x01, false)] {
        let mut pic = ready_with(icw4);
        pulse(&mut pic, 12);
        assert_eq!(pic.acknowledge(), 0x2c);
        pulse(&mut pic, 9);
        assert_eq!(pic.output(), nests);
    }
}

#[test]
fn request_that_goes_away_is_spurious_and_not_in_service() {
    let mut pic = ready();
    pic.write(0x4d0, 0x20);
    pic.set_line(5, true);
    assert!(pic.output());
    pic.set_line(5, false);
    assert_eq!(pic.acknowledge(), 0x27);
    assert_eq!(isr(&mut pic), [0, 0]);
}

#[test]
fn slaves_spurious_interrupt_leaves_the_masters_line_in_service() {
    let mut pic = ready();
    pic.write(0x4d1, 0x02);
    pic.set_line(9, true);
    pic.set_line(9, false);
    assert_eq!(pic.acknowledge(), 0x2f);
    assert_eq!(isr(&mut pic), [0x04, 0]);
}

#[test]
fn level_triggered_line_asks_again_after_its_end() {
    let mut pic = ready();
    pic.write(0x4d1, 0x02);
    pic.set_line(9, true);
    assert_eq!(pic.acknowledge(), 0x29);
    assert!(!pic.output());
    pic.write(0xa0, 0x20);
    pic.write(0x20, 0x20);
    assert_eq!(pic.acknowledge(), 0x29);
    pic.set_line(9, false);
    pic.write(0xa0, 0x20);
    pic.write(0x20, 0x20);
    assert!(!pic.output());
}

#[test]
fn lines_that_are_always_edge_triggered_stay_so() {
    let mut pic = ready();
    pic.write(0x4d0, 0xff);
    pic.write(0x4d1, 0xff);
    assert_eq!((pic.read(0x4d0), pic.read(0x4d1)), (0xf8, 0xde));
}

#[test]
fn initialisation_forgets_edges_that_are_up() {
    let mut pic = ready();
    pic.set_line(4, true);
    pic.write(0x20, 0x11);
    for word in [0x20, 4, 1] {
        pic.write(0x21, word);
    }
    assert!(!pic.output());
    pic.set_line(4, false);
    pic.set_line(4, true);
    assert_eq!(pic.acknowledge(), 0x24);
}

#[test]
fn without_icw4_three_words_and_single_two_words_end_the_initialisation() {
    let mut pic = PicPair::new();
    pic.write(0x20, 0x10);
    pic.write(0x21, 0x40);
    pic.write(0x21, 4);
    pic.write(0x21, 0xa5);
    assert_eq!(pic.read(0x21), 0xa5);
    pic.write(0x20, 0x12);
    pic.write(0x21, 0x40);
    pic.write(0x21, 0x5a);
    assert_eq!(pic.read(0x21), 0x5a);
}

#[test]
fn automatic_end_leaves_nothing_in_service() {
    let mut pic = ready_with(0x03);
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x24);
    assert_eq!(isr(&mut pic), [0, 0]);
    pulse(&mut pic, 4);
    assert!(pic.output());
}

#[test]
fn slave_that_goes_on_asking_while_it_is_acknowledged_is_an_edge_again() {
    let mut pic = ready_with(0x03);
    pulse(&mut pic, 9);
    pulse(&mut pic, 10);
    assert_eq!(pic.acknowledge(), 0x29);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x2a);
}

#[test]
fn rotation_makes_the_served_line_the_least_urgent() {
    let mut pic = ready();
    pulse(&mut pic, 3);
    assert_eq!(pic.acknowledge(), 0x23);
    pic.write(0x20, 0xa0);
    pulse(&mut pic, 3);
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x24);
    pic.write(0x20, 0xe0 | 4);
    assert_eq!(pic.acknowledge(), 0x23);
    pic.write(0x20, 0x63);
    // Set priority: 6 the least urgent, so 7 comes before 0.
    pic.write(0x20, 0xc6);
    pulse(&mut pic, 0);
    pulse(&mut pic, 7);
    assert_eq!(pic.acknowledge(), 0x27);
}

#[test]
fn rotation_on_automatic_end_is_switched_by_its_own_commands() {
    let mut pic = ready_with(0x03);
    pic.write(0x20, 0x80);
    pulse(&mut pic, 0);
    assert_eq!(pic.acknowledge(), 0x20);
    pulse(&mut pic, 0);
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x21);
    pic.write(0x20, 0x00);
    assert_eq!(pic.acknowledge(), 0x20);
    pulse(&mut pic, 1);
    pulse(&mut pic, 2 + 1);
    assert_eq!(pic.acknowledge(), 0x23, "2 is the most urgent still, 1 the least");
}

#[test]
fn special_mask_mode_lets_less_urgent_lines_through() {
    let mut pic = ready();
    pulse(&mut pic, 2 + 1);
    assert_eq!(pic.acknowledge(), 0x23);
    pic.write(0x21, 0x08);
    pulse(&mut pic, 6);
    assert!(!pic.output());
    pic.write(0x20, 0x68);
    assert_eq!(pic.acknowledge(), 0x26);
    pic.write(0x20, 0x20);
    assert_eq!(isr(&mut pic), [0x08, 0], "the masked one is left to a specific end");
    pic.write(0x20, 0x63);
    assert_eq!(isr(&mut pic), [0, 0]);
}

#[test]
fn poll_acknowledges_on_the_next_read() {
    let mut pic = ready();
    pulse(&mut pic, 5);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20), 0x85);
    assert!(!pic.output());
    assert_eq!(isr(&mut pic), [0x20, 0]);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20), 0);
}
