//! Random pokes at the board: nothing panics, and the invariants hold; and deadlines miss nothing.

use super::*;

use proptest::prelude::*;

/// One thing that a guest or its surroundings can do to the board.
#[derive(Clone, Debug)]
enum Poke {
    PortIn(u16, Width),
    PortOut(u16, Width, u32),
    Read(u64, Width),
    Write(u64, Width, u64),
    Wait(u64),
    Gsi(u32, bool),
    Input(Vec<u8>),
    /// The few writes without which nothing ever happens: enable, interrupt somebody, start the timer, end.
    Enable,
    Interrupt(u32, u32),
    Timer(u32, u32),
    End,
    Acknowledge,
    Signals,
    Init,
    ApicBase(u64),
    /// What a virtio device's worker does: takes it in hand, says something, lets go.
    Begin(usize),
    Used(usize),
    Configure(usize, usize),
    Failed(usize),
    Done(usize, bool),
    Reset,
}

fn any_width() -> impl Strategy<Value = Width> {
    prop_oneof![Just(Width::B1), Just(Width::B2), Just(Width::B4), Just(Width::B8)]
}

/// Ports and registers that exist, mostly.
fn any_port() -> impl Strategy<Value = u16> {
    let owned = [
        0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x60, 0x64, 0x70, 0x71, 0x92,
        0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd,
    ];
    prop_oneof![20 => proptest::sample::select(owned.to_vec()), 1 => any::<u16>()]
}

fn any_gpa() -> impl Strategy<Value = u64> {
    let lapic = (0u64..0x40).prop_map(|register| LAPIC_PAGE + register * 16);
    let ioapic = proptest::sample::select(vec![0u64, 0x10, 0x40, 0x1_0000, 0x1_0010]);
    let virtio = (0u64..26, 0u64..0x50).prop_map(|(slot, register)| VIRTIO_PAGE + 512 * slot + 4 * register);
    prop_oneof![
        10 => lapic,
        10 => virtio,
        10 => ioapic.prop_map(|offset| IOAPIC_PAGES[0] + offset),
        1 => any::<u64>(),
        1 => ACPI_PAGE..ACPI_PAGE + 0x300,
    ]
}

/// Values in which the fields that matter are small enough to meet each other.
fn any_value() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u8>().prop_map(u32::from),
        any::<u16>().prop_map(u32::from),
        (0x20u32..0x80).prop_map(|vector| vector | 0x8000),
        (0u32..4, 0x20u32..0x60).prop_map(|(shorthand, vector)| shorthand << 18 | 0x4000 | vector),
        (0u32..4).prop_map(|destination| destination << 24),
        (0x20u32..0x60).prop_map(|vector| 0x2_0000 | vector),
        Just(0x1ff),
        any::<u32>(),
    ]
}

/// One of the writes by which a driver gets its device going.
fn start_virtio() -> impl Strategy<Value = Poke> {
    let steps = [(0x70, 0), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 0xb), (0x44, 1), (0x70, 0xf), (0x50, 0)];
    (0u64..3, proptest::sample::select(steps.to_vec())).prop_map(|(slot, (register, value))| {
        Poke::Write(VIRTIO_PAGE + 512 * slot + register, Width::B4, value)
    })
}

fn any_poke() -> impl Strategy<Value = Poke> {
    let wide = any_value().prop_map(u64::from);
    prop_oneof![
        4 => (any_port(), any_width()).prop_map(|(port, width)| Poke::PortIn(port, width)),
        6 => (any_port(), any_width(), any_value()).prop_map(|(port, width, value)| Poke::PortOut(port, width, value)),
        4 => (any_gpa(), any_width()).prop_map(|(gpa, width)| Poke::Read(gpa, width)),
        12 => (any_gpa(), Just(Width::B4), wide).prop_map(|(gpa, width, value)| Poke::Write(gpa, width, value)),
        1 => (any_gpa(), any_width(), any::<u64>()).prop_map(|(gpa, width, value)| Poke::Write(gpa, width, value)),
        3 => (0u64..5_000_000).prop_map(Poke::Wait),
        1 => any::<u64>().prop_map(|nanos| Poke::Wait(nanos >> 8)),
        3 => (0u32..50, any::<bool>()).prop_map(|(gsi, level)| Poke::Gsi(gsi, level)),
        1 => proptest::collection::vec(any::<u8>(), 0..80).prop_map(Poke::Input),
        2 => Just(Poke::Enable),
        8 => (0u32..4, 0x20u32..0x50).prop_map(|(shorthand, vector)| Poke::Interrupt(shorthand, vector)),
        2 => (0x20u32..0x50, 1u32..10_000).prop_map(|(vector, count)| Poke::Timer(vector, count)),
        2 => Just(Poke::End),
        8 => Just(Poke::Acknowledge),
        1 => Just(Poke::Signals),
        1 => Just(Poke::Init),
        2 => (0usize..3).prop_map(Poke::Begin),
        1 => (0usize..3).prop_map(Poke::Used),
        1 => (0usize..3, 0usize..80).prop_map(|(slot, offset)| Poke::Configure(slot, offset)),
        1 => (0usize..3).prop_map(Poke::Failed),
        2 => (0usize..3, any::<bool>()).prop_map(|(slot, more)| Poke::Done(slot, more)),
        3 => start_virtio(),
        1 => any_value().prop_map(|value| Poke::ApicBase(u64::from(value) & 0xfff | 0xfee0_0000)),
        1 => Just(Poke::Reset),
    ]
}

/// What must hold of a vCPU's acknowledgement, judged by the registers alone (BOARD-LAPIC-1 and 2).
fn check_acknowledge(board: &mut Board, vcpu: usize) {
    let visible = board.apic_base(vcpu) & 0x800 != 0;
    let pending = board.interrupt_pending(vcpu);
    let (irr, isr) = match visible {
        true => (board.vectors(vcpu, IRR), board.vectors(vcpu, ISR)),
        false => (vec![], vec![]),
    };
    let priority = if visible { board.get(vcpu, PPR) >> 4 } else { 0 };
    let Some(vector) = board.acknowledge(board.now, vcpu) else {
        return assert!(!pending);
    };
    assert!(pending);
    let after = if visible { board.vectors(vcpu, IRR) } else { vec![] };
    if after.len() + 1 == irr.len() {
        assert_eq!(Some(&vector), irr.last(), "the highest of those pending");
        assert!(u32::from(vector >> 4) > priority && !after.contains(&vector));
        assert_eq!(board.vectors(vcpu, ISR).last(), Some(&vector));
        assert!(isr.iter().all(|in_service| in_service >> 4 < vector >> 4));
    } else {
        assert_eq!(after, irr, "from the 8259");
    }
}

/// What must hold of a board at any time.
fn check_board(board: &mut Board) {
    assert!(board.next_deadline().is_none_or(|deadline| deadline > board.now));
    for slot in 0..3 {
        let gpa = Gpa(VIRTIO_PAGE + 512 * slot + 0x60);
        let status = board.mmio_read(board.now, 0, gpa, Width::B4);
        assert_eq!(board.virtio.line(slot as u32), status != 0, "BOARD-VIRTIO-1");
    }
    for lapic in board.bus.lapics() {
        assert_eq!(lapic.base() & !0x900, LAPIC_PAGE);
    }
    for vcpu in 0..board.bus.lapics().len() {
        if board.apic_base(vcpu) & 0x800 != 0 {
            let lowest = board.vectors(vcpu, IRR).into_iter().chain(board.vectors(vcpu, ISR)).min();
            assert!(lowest.is_none_or(|vector| vector >= 16));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn random_pokes_keep_the_invariants(
        pokes in proptest::collection::vec((0usize..3, any_poke()), 1..300),
    ) {
        let mut board = board(3);
        for slot in 0..2 {
            prop_assert!(board.plug(slot, super::super::virtio::tests::spec()));
        }
        for (vcpu, poke) in pokes {
            let now = board.now;
            match poke {
                Poke::PortIn(port, width) => {
                    let value = board.port_in(now, vcpu, port, width);
                    prop_assert!(u64::from(value) >> (8 * width.bytes().min(4)) == 0);
                }
                Poke::PortOut(port, width, value) => board.port_out(now, vcpu, port, width, value),
                Poke::Read(gpa, width) => {
                    board.mmio_read(now, vcpu, Gpa(gpa), width);
                }
                Poke::Write(gpa, width, value) => board.mmio_write(now, vcpu, Gpa(gpa), width, value),
                Poke::Wait(nanos) => board.advance(now.plus(nanos)),
                Poke::Gsi(gsi, level) => board.set_gsi(now, gsi, level),
                Poke::Input(bytes) => {
                    board.serial_input(now, &bytes);
                }
                Poke::Enable => board.set(vcpu, SVR, 0x1ff),
                Poke::Interrupt(shorthand, vector) => board.set(vcpu, ICR, shorthand << 18 | 0x4000 | vector),
                Poke::Timer(vector, count) => {
                    board.set(vcpu, LVT_TIMER, 0x2_0000 | vector);
                    board.set(vcpu, TIMER_INITIAL, count);
                }
                Poke::End => board.eoi(vcpu),
                Poke::Acknowledge => check_acknowledge(&mut board, vcpu),
                Poke::Signals => {
                    board.take_signals(vcpu);
                }
                Poke::Init => board.init_vcpu(now, vcpu),
                Poke::ApicBase(value) => {
                    let _ = board.set_apic_base(vcpu, value);
                }
                Poke::Begin(slot) => {
                    let begun = board.virtio_begin(slot);
                    prop_assert!(begun.is_none() || board.virtio_owes(), "BOARD-VIRTIO-2");
                }
                Poke::Used(slot) => board.virtio_used(now, slot),
                Poke::Configure(slot, offset) => board.virtio_set_config(now, slot, offset, &[7; 8]),
                Poke::Failed(slot) => board.virtio_failed(now, slot),
                Poke::Done(slot, more) => board.virtio_end(now, slot, more),
                Poke::Reset => board.reset(now),
            }
            check_board(&mut board);
            board.take_notifies();
        }
    }

    /// A board that is asked at its deadlines alone shows the same as one that is asked all the time.
    #[test]
    fn deadlines_miss_nothing(
        initial in 100u32..200_000,
        count in 2u16..,
        periodic in any::<bool>(),
        pit_mode in prop_oneof![Just(2u8), Just(3), Just(0), Just(4)],
    ) {
        let start = |board: &mut Board| {
            board.init_pics(!1);
            board.set(0, SVR, 0x1ff);
            board.set(0, LVT_LINT0, 0x700);
            board.set(0, LVT_TIMER, 0x40 | u32::from(periodic) << 17);
            board.set(0, TIMER_INITIAL, initial);
            board.out(0x43, 0x30 | pit_mode << 1);
            board.out(0x40, count as u8);
            board.out(0x40, (count >> 8) as u8);
        };
        let take = |board: &mut Board, log: &mut Vec<(Nanos, u8)>| {
            while let Some(vector) = board.ack(0) {
                log.push((board.now, vector));
                if vector == 0x40 { board.eoi(0) } else { board.out(0x20, 0x20) }
            }
        };
        let end = Nanos(3_000_000);
        let (mut busy, mut lazy) = (board(1), board(1));
        let (mut all, mut due) = (Vec::new(), Vec::new());
        start(&mut busy);
        start(&mut lazy);
        for now in (0..end.0).step_by(101) {
            busy.advance(Nanos(now));
            take(&mut busy, &mut all);
        }
        while let Some(deadline) = lazy.next_deadline().filter(|&deadline| deadline < end) {
            lazy.advance(deadline);
            take(&mut lazy, &mut due);
        }
        for vector in [0x20, 0x40] {
            let times = |log: &[(Nanos, u8)]| {
                log.iter().filter(|(_, v)| *v == vector).map(|(at, _)| at.0).collect::<Vec<_>>()
            };
            let (all, due) = (times(&all), times(&due));
            // The busy one looks every 101 ns and so is that much late, and may not have come to the last.
            prop_assert!(due.len() - all.len() <= 1, "{} {}", due.len(), all.len());
            for (seen, true_time) in all.iter().zip(&due) {
                prop_assert!(seen >= true_time && seen - true_time < 101);
            }
        }
    }
}
