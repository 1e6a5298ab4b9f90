//! The board as a whole: local APICs, wiring, time.

use super::*;

mod random;

const ID: u64 = 0x20;
const TPR: u64 = 0x80;
const PPR: u64 = 0xa0;
const EOI: u64 = 0xb0;
const LDR: u64 = 0xd0;
const DFR: u64 = 0xe0;
const SVR: u64 = 0xf0;
const ISR: u64 = 0x100;
const TMR: u64 = 0x180;
const IRR: u64 = 0x200;
const ESR: u64 = 0x280;
const ICR: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_ERROR: u64 = 0x370;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_CURRENT: u64 = 0x390;
const TIMER_DIVIDE: u64 = 0x3e0;

/// Typed, since other crates can compare bytes too.
const NONE: [u8; 0] = [];

pub(super) fn board(vcpus: usize) -> Board {
    Board::new(BoardConfig {
        memory: MemoryMap::new(64 << 20).unwrap(),
        vcpus,
        serial: Box::new(std::io::sink()),
        epoch_seconds: 1_795_244_646,
    })
    .unwrap()
}

/// A board whose local APICs are all enabled, in flat logical mode with a bit each.
fn enabled(vcpus: usize) -> Board {
    let mut board = board(vcpus);
    for vcpu in 0..vcpus {
        board.set(vcpu, SVR, 0x1ff);
        board.set(vcpu, LDR, 1 << (24 + vcpu));
    }
    board
}

/// Shorthands of the tests: registers of the local APIC, pins of the first IOAPIC, all at the board's own time.
impl Board {
    fn get(&mut self, vcpu: usize, register: u64) -> u32 {
        self.mmio_read(self.now, vcpu, Gpa(LAPIC_PAGE + register), Width::B4) as u32
    }

    fn set(&mut self, vcpu: usize, register: u64, value: u32) {
        self.mmio_write(self.now, vcpu, Gpa(LAPIC_PAGE + register), Width::B4, value.into());
    }

    fn ipi(&mut self, from: usize, to: u8, command: u32) {
        self.set(from, ICR_HIGH, u32::from(to) << 24);
        self.set(from, ICR, command);
    }

    fn redirect(&mut self, pin: u32, low: u32, destination: u32) {
        for (register, value) in [(0x11 + 2 * pin, destination << 24), (0x10 + 2 * pin, low)] {
            self.mmio_write(self.now, 0, Gpa(IOAPIC_PAGES[0]), Width::B4, register.into());
            self.mmio_write(self.now, 0, Gpa(IOAPIC_PAGES[0] + 0x10), Width::B4, value.into());
        }
    }

    fn out(&mut self, port: u16, value: u8) {
        self.port_out(self.now, 0, port, Width::B1, value.into());
    }

    fn inb(&mut self, port: u16) -> u8 {
        self.port_in(self.now, 0, port, Width::B1) as u8
    }

    fn ack(&mut self, vcpu: usize) -> Option<u8> {
        let pending = self.interrupt_pending(vcpu);
        let vector = self.acknowledge(self.now, vcpu);
        assert_eq!(pending, vector.is_some());
        vector
    }

    fn eoi(&mut self, vcpu: usize) {
        self.set(vcpu, EOI, 0);
    }

    /// Vectors 0x20 and 0x28, and the given mask.
    fn init_pics(&mut self, mask: u16) {
        for (port, base, icw3, mask) in [(0x20, 0x20, 4, mask as u8), (0xa0, 0x28, 2, (mask >> 8) as u8)] {
            self.out(port, 0x11);
            [base, icw3, 1, mask].into_iter().for_each(|word| self.out(port + 1, word));
        }
    }

    fn vectors(&mut self, vcpu: usize, first: u64) -> Vec<u8> {
        let words: Vec<u32> = (0..8).map(|word| self.get(vcpu, first + 16 * word)).collect();
        (0..=255u8).filter(|&v| words[usize::from(v / 32)] & (1 << (v % 32)) != 0).collect()
    }
}

#[test]
fn lapic_registers_after_power_up_are_those_of_microvm() {
    // As read from QEMU 7.2, -M microvm, at a Multiboot kernel's entry.
    let mut board = board(2);
    let shown = [(0x30, 0x0005_0014), (DFR, u32::MAX), (SVR, 0xff)];
    for (register, value) in shown.into_iter().chain((0x320..=0x370).step_by(16).map(|r| (r, 0x1_0000))) {
        assert_eq!(board.get(0, register), value, "{register:#x}");
    }
    assert_eq!((board.get(0, ID), board.get(1, ID)), (0, 1 << 24));
    assert_eq!((board.apic_base(0), board.apic_base(1)), (0xfee0_0900, 0xfee0_0800));
}

#[test]
fn lapic_nests_by_class_and_ends_in_order() {
    let mut board = enabled(1);
    for vector in [0x31, 0x45, 0x32, 0x47] {
        board.ipi(0, 0, vector);
    }
    assert_eq!(board.vectors(0, IRR), [0x31, 0x32, 0x45, 0x47]);
    assert_eq!(board.ack(0), Some(0x47));
    assert_eq!(board.ack(0), None, "0x45 is of the same class");
    assert_eq!(board.get(0, PPR), 0x40);
    board.ipi(0, 0, 0x90);
    assert_eq!(board.ack(0), Some(0x90));
    assert_eq!(board.vectors(0, ISR), [0x47, 0x90]);
    board.eoi(0);
    assert_eq!(board.vectors(0, ISR), [0x47], "the end is of the highest in service");
    assert_eq!(board.ack(0), None);
    board.eoi(0);
    assert_eq!(board.ack(0), Some(0x45));
    board.eoi(0);
    assert_eq!(board.ack(0), Some(0x32));
    board.eoi(0);
    assert_eq!(board.ack(0), Some(0x31));
    board.eoi(0);
    board.eoi(0);
    assert_eq!((board.vectors(0, ISR), board.vectors(0, IRR)), (vec![], vec![]));
}

#[test]
fn task_priority_holds_back_its_class_and_those_below() {
    let mut board = enabled(1);
    board.set(0, TPR, 0x41);
    board.ipi(0, 0, 0x4f);
    assert_eq!((board.get(0, PPR), board.ack(0)), (0x41, None));
    board.ipi(0, 0, 0x50);
    assert_eq!(board.ack(0), Some(0x50));
    assert_eq!(board.get(0, PPR), 0x50);
    board.eoi(0);
    board.set(0, TPR, 0x30);
    assert_eq!(board.ack(0), Some(0x4f));
}

#[test]
fn vector_pending_while_in_service_comes_again() {
    let mut board = enabled(1);
    board.ipi(0, 0, 0x50);
    assert_eq!(board.ack(0), Some(0x50));
    board.ipi(0, 0, 0x50);
    board.ipi(0, 0, 0x50);
    assert_eq!((board.vectors(0, IRR), board.vectors(0, ISR)), (vec![0x50], vec![0x50]));
    board.eoi(0);
    assert_eq!(board.ack(0), Some(0x50));
    board.eoi(0);
    assert_eq!(board.ack(0), None);
}

#[test]
fn software_disable_masks_the_vector_table_and_takes_nothing() {
    let mut board = enabled(2);
    board.set(0, LVT_TIMER, 0x2_0040);
    board.set(0, SVR, 0xff);
    assert_eq!(board.get(0, LVT_TIMER), 0x3_0040);
    board.set(0, LVT_TIMER, 0x40);
    assert_eq!(board.get(0, LVT_TIMER), 0x1_0040, "masked while disabled");
    board.ipi(1, 0, 0x50);
    assert_eq!(board.vectors(0, IRR), NONE);
    board.ipi(1, 0, 0x4400);
    assert!(board.take_signals(0).nmi, "NMIs still come");
    board.set(0, SVR, 0x1ff);
    assert_eq!(board.get(0, LVT_TIMER), 0x1_0040);
}

#[test]
fn physical_and_logical_destinations() {
    let mut board = enabled(4);
    let received = |board: &mut Board| (0..4).filter(|&vcpu| board.ack(vcpu).is_some()).collect::<Vec<_>>();
    let eoi_all = |board: &mut Board| (0..4).for_each(|vcpu| board.eoi(vcpu));
    let cases: [(u8, u32, &[usize]); 7] = [
        (2, 0x50, &[2]),
        (9, 0x50, &[]),
        (0xff, 0x50, &[0, 1, 2, 3]),
        (0b1010, 0x850, &[1, 3]),
        (0, 0x4_0050, &[1]),
        (0, 0x8_0050, &[0, 1, 2, 3]),
        (0, 0xc_0050, &[0, 2, 3]),
    ];
    for (to, command, targets) in cases {
        board.ipi(1, to, command);
        assert_eq!(received(&mut board), targets, "{to:#x} {command:#x}");
        eoi_all(&mut board);
    }
    // Clusters: vCPUs 0 and 1 in cluster 2, 2 and 3 in cluster 3.
    for vcpu in 0..4 {
        board.set(vcpu, DFR, 0);
        board.set(vcpu, LDR, [0x2100_0000, 0x2200_0000, 0x3100_0000, 0x3200_0000][vcpu]);
    }
    let cases: [(u8, &[usize]); 4] = [(0x23, &[0, 1]), (0x32, &[3]), (0x41, &[]), (0xff, &[0, 1, 2, 3])];
    for (to, targets) in cases {
        board.ipi(0, to, 0x850);
        assert_eq!(received(&mut board), targets, "cluster {to:#x}");
        eoi_all(&mut board);
    }
}

#[test]
fn lowest_priority_goes_to_the_one_with_the_least_to_do() {
    let mut board = enabled(3);
    board.set(0, TPR, 0x50);
    board.set(2, TPR, 0x20);
    board.ipi(1, 1, 0x60);
    board.ipi(0, 0b111, 0x970);
    assert_eq!(
        (board.vectors(0, IRR), board.vectors(1, IRR), board.vectors(2, IRR)),
        (vec![], vec![0x60], vec![0x70])
    );
}

#[test]
fn init_startup_and_nmi_are_reported_and_not_executed() {
    let mut board = enabled(3);
    board.ipi(0, 1, 0x8500);
    assert!(board.take_signals(1).is_empty(), "INIT de-assert does nothing");
    board.ipi(0, 1, 0x4500);
    board.ipi(0, 1, 0x8500);
    board.ipi(0, 1, 0x4608);
    board.ipi(0, 2, 0x4400);
    assert_eq!(board.take_wakes(), 0b110);
    assert_eq!(board.take_signals(0), Signals::default());
    assert_eq!(board.take_signals(1), Signals { init: true, startup: Some(8), nmi: false });
    assert_eq!(board.take_signals(1), Signals::default());
    assert_eq!(board.get(1, SVR), 0x1ff, "INIT is the vCPU's to obey");
    board.init_vcpu(Nanos(0), 1);
    assert_eq!((board.get(1, SVR), board.get(1, ID), board.apic_base(1)), (0xff, 1 << 24, 0xfee0_0800));
    assert_eq!(board.take_signals(2), Signals { nmi: true, ..Signals::default() });
    board.ipi(0, 1, 0x4608);
    board.ipi(0, 1, 0x4500);
    assert_eq!(board.take_signals(1), Signals { init: true, ..Signals::default() }, "INIT comes last");
    assert_eq!(board.take_wakes(), 0);
}

#[test]
fn errors_are_latched_by_a_write_and_interrupt_once() {
    let mut board = enabled(1);
    board.set(0, LVT_ERROR, 0x55);
    board.ipi(0, 0, 0x0f);
    assert_eq!(board.get(0, ESR), 0);
    assert_eq!(board.ack(0), Some(0x55));
    board.eoi(0);
    board.ipi(0, 0, 0x0e);
    assert_eq!(board.ack(0), None, "the same error again, and the ESR not written since");
    assert_eq!(board.get(0, 0x3f0), 0);
    assert_eq!(board.ack(0), Some(0x55));
    board.eoi(0);
    board.set(0, ESR, 0);
    assert_eq!(board.get(0, ESR), 0xa0);
    board.set(0, ESR, 0);
    assert_eq!(board.get(0, ESR), 0);
}

#[test]
fn illegal_vector_in_the_error_entry_itself_ends_there() {
    let mut board = enabled(1);
    board.set(0, LVT_ERROR, 0x05);
    board.get(0, 0x3f0);
    board.set(0, ESR, 0);
    assert_eq!((board.get(0, ESR), board.ack(0)), (0xc0, None));
}

#[test]
fn timer_one_shot_interrupts_once_at_its_time() {
    let mut board = enabled(1);
    board.set(0, LVT_TIMER, 0x40);
    board.set(0, TIMER_DIVIDE, 3);
    board.set(0, TIMER_INITIAL, 1000);
    assert_eq!(board.next_deadline(), Some(Nanos(16_000)));
    board.advance(Nanos(15_999));
    assert_eq!((board.get(0, TIMER_CURRENT), board.ack(0)), (1, None));
    board.advance(Nanos(16_000));
    assert_eq!((board.get(0, TIMER_CURRENT), board.ack(0)), (0, Some(0x40)));
    assert_eq!(board.next_deadline(), None);
}

#[test]
fn timer_periodic_coalesces_and_stays_on_its_grid() {
    let mut board = enabled(1);
    board.set(0, LVT_TIMER, 0x2_0040);
    board.set(0, TIMER_DIVIDE, 0xb);
    board.set(0, TIMER_INITIAL, 1000);
    let mut taken = 0;
    for now in (0..1_000_000).step_by(3700) {
        board.advance(Nanos(now));
        if board.ack(0).is_some() {
            board.eoi(0);
            taken += 1;
        }
        let deadline = board.next_deadline().unwrap();
        assert!(deadline.0.is_multiple_of(1000) && deadline.0 > now && deadline.0 <= now + 1000);
    }
    assert_eq!(taken, 1_000_000 / 3700);
}

#[test]
fn timer_whose_interrupt_is_pending_or_masked_sets_no_deadline() {
    let mut board = enabled(1);
    board.set(0, LVT_TIMER, 0x2_0040);
    board.set(0, TIMER_DIVIDE, 0xb);
    board.set(0, TIMER_INITIAL, 1);
    board.advance(Nanos(10));
    assert_eq!(board.next_deadline(), None, "one nanosecond's period cannot keep the host awake");
    assert_eq!(board.acknowledge(Nanos(500), 0), Some(0x40));
    assert_eq!(board.next_deadline(), Some(Nanos(501)));
    board.set(0, LVT_TIMER, 0x3_0040);
    assert_eq!(board.next_deadline(), None);
    assert_eq!(board.get(0, TIMER_CURRENT), 1);
}

#[test]
fn timer_switched_from_periodic_to_one_shot_stops_at_the_next_end() {
    let mut board = enabled(1);
    board.set(0, LVT_TIMER, 0x2_0040);
    board.set(0, TIMER_DIVIDE, 0xb);
    board.set(0, TIMER_INITIAL, 100);
    board.advance(Nanos(250));
    assert_eq!(board.ack(0), Some(0x40));
    board.eoi(0);
    board.set(0, LVT_TIMER, 0x40);
    board.advance(Nanos(900));
    assert_eq!((board.ack(0), board.get(0, TIMER_CURRENT)), (Some(0x40), 0));
}

#[test]
fn pit_reaches_the_8259_as_line_0_and_the_ioapic_as_pin_2() {
    let mut board = board(1);
    board.init_pics(!1);
    board.redirect(2, 0x60, 0);
    [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)].into_iter().for_each(|(port, value)| board.out(port, value));
    let tick = |n| Nanos::of_tick(n, pit::HERTZ);
    assert_eq!(board.next_deadline(), Some(tick(1194)));
    board.advance(tick(1194));
    assert_eq!(board.ack(0), Some(0x20), "through the 8259, while the APIC is disabled");
    board.out(0x20, 0x20);
    board.set(0, SVR, 0x1ff);
    board.advance(tick(1194 + 1193));
    assert_eq!(board.ack(0), Some(0x60), "through the IOAPIC");
    board.eoi(0);
    assert_eq!(board.ack(0), None, "LINT0 is masked now");
    board.set(0, LVT_LINT0, 0x700);
    assert_eq!(board.ack(0), Some(0x20));
}

#[test]
fn interrupts_of_the_8259_come_before_those_of_the_local_apic() {
    let mut board = enabled(1);
    board.init_pics(!0x20);
    board.set(0, LVT_LINT0, 0x700);
    board.set(0, TPR, 0x80);
    board.ipi(0, 0, 0x90);
    board.set_gsi(Nanos(0), 5, true);
    assert_eq!((board.ack(0), board.ack(0)), (Some(0x25), Some(0x90)), "ExtINT knows no priority");
}

#[test]
fn masked_pit_sets_no_deadline() {
    let mut board = board(1);
    assert_eq!(board.next_deadline(), None);
    board.init_pics(!1);
    assert!(board.next_deadline().is_some());
    let first = board.next_deadline().unwrap();
    board.advance(first);
    assert!(board.interrupt_pending(0));
    assert_eq!(board.next_deadline(), None, "requested and not yet taken");
}

#[test]
fn lint0_as_fixed_or_nmi_takes_the_rise_of_the_8259() {
    let mut board = enabled(1);
    board.init_pics(0xffff);
    board.set(0, LVT_LINT0, 0x77);
    board.out(0x21, 0xdf);
    board.set_gsi(Nanos(0), 5, true);
    assert_eq!(board.ack(0), Some(0x77));
    board.eoi(0);
    assert_eq!(board.ack(0), None);
    board.set(0, LVT_LINT0, 0x400);
    board.out(0x21, 0xff);
    board.out(0x21, 0xdf);
    assert!(board.take_signals(0).nmi);
}

#[test]
fn level_interrupt_goes_round_through_the_end_broadcast() {
    let mut board = enabled(2);
    board.redirect(10, 0x8061, 1);
    board.set_gsi(Nanos(0), 10, true);
    assert_eq!(board.take_wakes(), 0b10);
    assert_eq!(board.ack(1), Some(0x61));
    assert_eq!(board.vectors(1, TMR), [0x61]);
    assert_eq!(board.ack(1), None);
    board.eoi(1);
    assert_eq!(board.ack(1), Some(0x61), "the line is still up");
    board.set_gsi(Nanos(0), 10, false);
    board.eoi(1);
    assert_eq!(board.ack(1), None);
}

#[test]
fn second_ioapic_has_gsi_24_and_up() {
    let mut board = enabled(1);
    for (register, value) in [(0x11, 0), (0x10, 0x70)] {
        board.mmio_write(Nanos(0), 0, Gpa(IOAPIC_PAGES[1]), Width::B4, register);
        board.mmio_write(Nanos(0), 0, Gpa(IOAPIC_PAGES[1] + 0x10), Width::B4, value);
    }
    board.set_gsi(Nanos(0), 48, true);
    board.set_gsi(Nanos(0), u32::MAX, true);
    assert_eq!(board.ack(0), None);
    board.set_gsi(Nanos(0), 24, true);
    assert_eq!(board.ack(0), Some(0x70));
}

#[test]
fn serial_input_interrupts_through_line_4() {
    let mut board = board(1);
    board.init_pics(!0x10);
    board.out(0x3f9, 1);
    assert_eq!(board.serial_input(Nanos(5), b"k"), 1);
    assert_eq!(board.take_wakes(), 1);
    assert_eq!(board.ack(0), Some(0x24));
    assert_eq!(board.inb(0x3f8), b'k');
}

#[test]
fn clock_interrupt_comes_through_the_slave() {
    let mut board = board(1);
    board.init_pics(!0x104);
    board.out(0x70, 0x0b);
    board.out(0x71, 0x42);
    let due = board.next_deadline().unwrap();
    board.advance(due);
    assert_eq!(board.ack(0), Some(0x28));
    board.out(0x70, 0x0c);
    assert_eq!(board.inb(0x71), 0xc0);
}

#[test]
fn wakes_name_a_vcpu_once_until_it_takes_its_interrupt() {
    let mut board = enabled(2);
    board.ipi(0, 1, 0x50);
    assert_eq!((board.take_wakes(), board.take_wakes()), (2, 0));
    assert_eq!(board.ack(1), Some(0x50));
    board.eoi(1);
    board.ipi(0, 1, 0x50);
    assert_eq!(board.take_wakes(), 2, "taken and raised again between two questions");
}

#[test]
fn a_vcpu_that_has_an_interrupt_waiting_is_named_for_a_signal() {
    let mut board = enabled(2);
    board.ipi(0, 1, 0x50);
    assert_eq!(board.take_wakes(), 2);
    for _ in 0..2 {
        board.raise_nmi(1);
        assert_eq!((board.take_wakes(), board.take_wakes()), (2, 0));
        assert!(board.take_signals(1).nmi);
        assert_eq!(board.take_wakes(), 0, "its interrupt is known");
    }
}

#[test]
fn debug_exit_takes_every_width() {
    for (width, value) in [(Width::B1, 0xefu32), (Width::B2, 0xbeef), (Width::B4, 0xdead_beef)] {
        let mut board = board(1);
        board.port_out(Nanos(0), 0, 0xf4, width, 0xdead_beef);
        assert_eq!(board.take_exit(), Some(BoardExit::DebugExit(value)));
        assert_eq!(board.take_exit(), None);
    }
}

#[test]
fn acpi_page_powers_off() {
    let mut board = board(1);
    board.mmio_write(Nanos(0), 0, Gpa(0xfea0_0200), Width::B1, 0x34);
    assert_eq!(board.take_exit(), Some(BoardExit::PowerOff));
}

#[test]
fn dword_to_the_pci_address_port_is_no_reset() {
    let mut board = board(1);
    board.port_out(Nanos(0), 0, 0xcf8, Width::B4, 0x8000_ffff);
    assert_eq!(board.take_exit(), None);
    assert_eq!(board.port_in(Nanos(0), 0, 0xcfc, Width::B4), u32::MAX);
}

#[test]
fn what_nobody_owns_reads_as_ones_and_is_counted() {
    let mut board = board(1);
    assert_eq!(board.port_in(Nanos(0), 0, 0x300, Width::B2), 0xffff);
    assert_eq!(board.mmio_read(Nanos(0), 0, Gpa(0xfeb0_3000), Width::B4), 0xffff_ffff);
    assert_eq!(board.mmio_read(Nanos(0), 0, Gpa(0xf_0000_0000), Width::B8), u64::MAX);
    board.port_out(Nanos(0), 0, 0x300, Width::B1, 0);
    board.mmio_write(Nanos(0), 0, Gpa(0xfeb0_3000), Width::B4, 0);
    board.mmio_write(Nanos(0), 0, Gpa(LAPIC_PAGE + TPR), Width::B1, 0x20);
    assert_eq!(board.get(0, TPR), 0, "APICs take aligned 32-bit writes alone");
    let counters = board.counters();
    assert_eq!((counters.unowned_port_reads, counters.unowned_mmio_reads), (1, 2));
    assert_eq!((counters.unowned_port_writes, counters.unowned_mmio_writes), (1, 2));
}

#[test]
fn wide_port_access_goes_to_the_ports_that_follow() {
    let mut board = board(1);
    assert_eq!(board.port_in(Nanos(0), 0, 0x3fd, Width::B4), 0xff00_b060);
}

#[test]
fn narrow_reads_of_an_apic_register_give_its_bytes() {
    let mut board = board(2);
    assert_eq!(board.mmio_read(Nanos(0), 1, Gpa(LAPIC_PAGE + 0x23), Width::B1), 1);
    assert_eq!(board.mmio_read(Nanos(0), 1, Gpa(LAPIC_PAGE + 0x32), Width::B2), 5);
}

#[test]
fn apic_base_faults_on_what_it_does_not_have_and_hides_the_apic_when_off() {
    let mut board = board(1);
    for value in [0xfee0_0d00, 0xfee0_1900, 0xfee0_0901, 0x10_fee0_0900] {
        assert!(board.set_apic_base(0, value).is_err(), "{value:#x}");
    }
    assert!(board.set_apic_base(7, 0xfee0_0900).is_err());
    board.set(0, SVR, 0x1ff);
    board.set_apic_base(0, 0xfee0_0100).unwrap();
    assert_eq!(board.get(0, SVR), u32::MAX);
    board.set_apic_base(0, 0xfee0_0900).unwrap();
    assert_eq!(board.get(0, SVR), 0xff, "as after power-up");
}

#[test]
fn reset_is_power_up_but_for_time() {
    let mut board = enabled(2);
    board.init_pics(0);
    board.set(0, LVT_TIMER, 0x2_0040);
    board.set(0, TIMER_INITIAL, 1000);
    board.ipi(0, 1, 0x4500);
    board.reset(Nanos(5_000_000));
    assert_eq!((board.next_deadline(), board.take_wakes()), (None, 0));
    assert_eq!((board.get(0, SVR), board.inb(0x21)), (0xff, 0xff));
    assert_eq!(board.now, Nanos(5_000_000));
}

#[test]
fn vcpus_outside_the_limits_are_refused() {
    for vcpus in [0, VCPUS_MAX + 1] {
        let config = BoardConfig {
            memory: MemoryMap::new(2 << 20).unwrap(),
            vcpus,
            serial: Box::new(std::io::sink()),
            epoch_seconds: 0,
        };
        assert_eq!(Board::new(config).err(), Some(BoardError::VcpuCount(vcpus)));
    }
}
