//! The transport, register by register.

use super::super::tests::board;
use super::*;
use umbra_mmu::Gpa;

const SLOT_0: u64 = 0xfeb0_0000;

pub(in super::super) fn spec() -> VirtioSpec {
    let mut config = [0; CONFIG_BYTES_MAX];
    config[..12].copy_from_slice(b"abcdefghijkl");
    VirtioSpec {
        device_id: 2,
        features: 1 << 9,
        queue_sizes: [128, 64, 0, 0],
        config,
        config_bytes: 12,
        config_writable: (4, 8),
    }
}

/// A board with a device in slot 3, whose registers `get` and `put` mean.
fn plugged() -> Board {
    let mut board = board(1);
    assert!(board.plug(3, spec()));
    board
}

impl Board {
    fn slot(&mut self, register: u32) -> u32 {
        self.mmio_read(self.now, 0, Gpa(SLOT_0 + 0x600 + u64::from(register)), Width::B4) as u32
    }

    fn put(&mut self, register: u32, value: u32) {
        let gpa = Gpa(SLOT_0 + 0x600 + u64::from(register));
        self.mmio_write(self.now, 0, gpa, Width::B4, value.into());
    }

    /// As a driver does it, with the first queue.
    fn start(&mut self) {
        for (register, value) in [
            (0x70, 0),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 0xb),
            (0x30, 0),
            (0x38, 16),
            (0x80, 0x1000),
            (0x90, 0x2000),
            (0xa0, 0x3000),
            (0x44, 1),
            (0x70, 0xf),
        ] {
            self.put(register, value);
        }
        assert_eq!((self.slot(0x70), self.slot(0x44)), (0xf, 1));
    }
}

#[test]
fn an_empty_slot_has_a_name_and_no_device() {
    let mut board = plugged();
    for slot in [0u64, 2, 4, 23] {
        let mut read =
            |register| board.mmio_read(Nanos(0), 0, Gpa(SLOT_0 + 512 * slot + register), Width::B4);
        assert_eq!([0, 4, 8, 0xc].map(&mut read), [0x7472_6976, 2, 0, 0x5242_4d55]);
        assert_eq!([0x10, 0x34, 0x70, 0xb0, 0xfc, 0x100].map(&mut read), [0; 6]);
    }
    let before = board.counters().unowned_mmio_writes;
    board.mmio_write(Nanos(0), 0, Gpa(SLOT_0 + 0x70), Width::B4, 1);
    assert_eq!(board.counters().unowned_mmio_writes, before + 1);
}

#[test]
fn a_slot_holds_one_device_and_there_are_24() {
    let mut board = plugged();
    assert!(!board.plug(3, spec()) && !board.plug(24, spec()) && board.plug(23, spec()));
    assert!(Board::is_device(Gpa(SLOT_0 + 0x2fff)) && !Board::is_device(Gpa(SLOT_0 + 0x3000)));
}

#[test]
fn registers_are_aligned_words_and_configuration_is_bytes() {
    let mut board = plugged();
    let at = |register: u64| Gpa(SLOT_0 + 0x600 + register);
    let mut read = |register, width| board.mmio_read(Nanos(0), 0, at(register), width);
    assert_eq!([read(0, Width::B1), read(0, Width::B2), read(2, Width::B4)], [0; 3]);
    assert_eq!(read(0, Width::B8), 2 << 32 | 0x7472_6976);
    assert_eq!(read(0x101, Width::B1), u64::from(b'b'));
    assert_eq!(read(0x103, Width::B2), u64::from(u16::from_le_bytes(*b"de")));
    assert_eq!(read(0x100, Width::B8), u64::from_le_bytes(*b"abcdefgh"));
    assert_eq!(
        read(0x10a, Width::B4),
        0xffff_0000 | u64::from(u16::from_le_bytes(*b"kl")),
        "beyond it: ones"
    );
    for (register, width) in [(0x70, Width::B1), (0x70, Width::B2), (0x70, Width::B8), (0x71, Width::B2)] {
        board.mmio_write(Nanos(0), 0, at(register), width, 1);
    }
    assert_eq!(board.slot(0x70), 0);
    // The driver's part of the configuration, and no other byte.
    board.mmio_write(Nanos(0), 0, at(0x102), Width::B4, 0x3433_3231);
    board.mmio_write(Nanos(0), 0, at(0x106), Width::B8, u64::MAX);
    assert_eq!(board.slot(0x100), u32::from_le_bytes(*b"abcd"));
    assert_eq!(board.slot(0x104), u32::from_le_bytes([b'3', b'4', 0xff, 0xff]));
    assert_eq!(board.slot(0x108), u32::from_le_bytes(*b"ijkl"));
}

#[test]
fn features_are_agreed_on_once_and_only_those_that_were_offered() {
    let mut board = plugged();
    let mut offered = |half| {
        board.put(0x14, half);
        board.slot(0x10)
    };
    assert_eq!([0, 1, 2].map(&mut offered), [1 << 9 | 1 << 28 | 1 << 29, 1, 0]);
    // Without VERSION_1; with a bit that nobody offered.
    for (half, value) in [(0, 1 << 9), (1, 3)] {
        board.put(0x70, 0);
        board.put(0x24, half);
        board.put(0x20, value);
        board.put(0x70, 0xb);
        assert_eq!(board.slot(0x70), 3);
        board.put(0x70, 0xf);
        assert_eq!(board.slot(0x70), 3, "nor does DRIVER_OK stick");
    }
    board.put(0x20, 1);
    board.put(0x70, 0xb);
    assert_eq!(board.slot(0x70), 0xb);
    // Too late.
    board.put(0x24, 0);
    board.put(0x20, 1 << 9);
    board.put(0x70, 0xf);
    assert_eq!(board.virtio_begin(3).map(|snapshot| snapshot.features), Some(F_VERSION_1));
}

#[test]
fn a_queue_is_ready_where_its_size_and_addresses_are_possible() {
    let mut board = plugged();
    board.start();
    board.put(0x80, 0x5000);
    board.put(0x38, 32);
    let queue = board.virtio_begin(3).expect("live").queues[0];
    assert_eq!((queue.size, queue.table, queue.ready), (16, 0x1000, true), "not while it is ready");
    board.virtio_end(Nanos(0), 3, false);
    board.put(0x44, 0);
    for (register, bad, good) in
        [(0x38, 256, 8), (0x38, 12, 8), (0x38, 0, 8), (0x80, 8, 16), (0x90, 1, 2), (0xa0, 2, 4)]
    {
        board.put(register, bad);
        board.put(0x44, 1);
        assert_eq!(board.slot(0x44), 0, "{register:#x} {bad}");
        board.put(register, good);
    }
    board.put(0x84, 7);
    board.put(0x44, 1);
    let again = board.virtio_begin(3).expect("live").queues[0];
    assert_eq!((again.table, again.available, again.used, again.size), (7 << 32 | 16, 2, 4, 8));
    assert_ne!(again.life, queue.life);
    for (queue, most) in [(0, 128), (1, 64), (2, 0), (3, 0), (4, 0), (u32::MAX, 0)] {
        board.put(0x30, queue);
        assert_eq!(board.slot(0x34), most);
    }
    board.put(0x44, 1);
    assert_eq!(board.slot(0x44), 0, "of no queue");
}

#[test]
fn a_notification_names_the_slot_once_and_is_owed_until_the_worker_is_done() {
    let mut board = plugged();
    board.put(0x50, 0);
    assert_eq!((board.take_notifies(), board.virtio_owes()), (0, false), "no driver runs it");
    board.start();
    assert_eq!((board.take_notifies(), board.take_notifies()), (8, 0), "what was there before counts");
    assert!(board.virtio_owes());
    assert!(board.virtio_begin(3).is_some());
    assert!(board.virtio_owes() && board.virtio_begin(3).is_none(), "in hand");
    board.put(0x50, 0);
    assert_eq!(board.take_notifies(), 8, "again meanwhile");
    board.virtio_end(Nanos(0), 3, true);
    assert_eq!((board.take_notifies(), board.virtio_owes()), (0, true), "it comes by itself");
    assert!(board.virtio_begin(3).is_some());
    board.virtio_end(Nanos(0), 3, false);
    assert!(!board.virtio_owes());
    board.put(0x50, 1);
    board.put(0x50, 77);
    assert_eq!(board.take_notifies(), 0, "queues that are not ready");
    board.put(0x104, 1);
    assert_eq!(board.take_notifies(), 8, "the configuration counts");
}

#[test]
fn the_line_follows_the_interrupt_status() {
    let mut board = plugged();
    let level = |board: &Board| board.virtio.line(3);
    board.virtio_used(Nanos(0), 3);
    assert!(!level(&board) && board.slot(0x60) == 0, "no driver");
    board.start();
    board.virtio_used(Nanos(0), 3);
    board.virtio_set_config(Nanos(0), 3, 0, b"A");
    assert!(level(&board) && board.slot(0x60) == 3 && board.slot(0xfc) == 1);
    assert_eq!(board.slot(0x100), u32::from_le_bytes(*b"Abcd"));
    board.put(0x64, 1);
    assert!(level(&board) && board.slot(0x60) == 2);
    board.put(0x64, 2);
    assert!(!level(&board));
    board.virtio_used(Nanos(0), 3);
    board.put(0x70, 0);
    assert!(!level(&board) && board.slot(0x60) == 0);
}

#[test]
fn an_interrupt_reaches_the_second_ioapics_pin() {
    let mut board = plugged();
    board.start();
    for (register, value) in [(0x11 + 2 * 3, 0), (0x10 + 2 * 3, 0x8000 | 0x45)] {
        board.mmio_write(Nanos(0), 0, Gpa(0xfec1_0000), Width::B4, register);
        board.mmio_write(Nanos(0), 0, Gpa(0xfec1_0010), Width::B4, value);
    }
    board.mmio_write(Nanos(0), 0, Gpa(0xfee0_00f0), Width::B4, 0x1ff);
    board.set_gsi(Nanos(0), 27, true);
    assert!(!board.interrupt_pending(0), "the line is the device's");
    board.virtio_used(Nanos(0), 3);
    assert_eq!(board.acknowledge(Nanos(0), 0), Some(0x45));
    board.mmio_write(Nanos(0), 0, Gpa(0xfee0_00b0), Width::B4, 0);
    assert_eq!(board.acknowledge(Nanos(0), 0), Some(0x45), "the level is still up");
    board.put(0x64, 1);
    board.mmio_write(Nanos(0), 0, Gpa(0xfee0_00b0), Width::B4, 0);
    assert_eq!(board.acknowledge(Nanos(0), 0), None);
}

#[test]
fn a_reset_waits_for_the_worker_and_nothing_is_heard_meanwhile() {
    let mut board = plugged();
    board.start();
    let generation = board.virtio_begin(3).expect("live").generation;
    board.put(0x70, 0);
    assert_eq!(board.slot(0x70), 0xf, "not yet");
    board.put(0x70, 1);
    board.put(0x50, 0);
    board.put(0x104, 0);
    board.virtio_used(Nanos(0), 3);
    board.virtio_failed(Nanos(0), 3);
    assert_eq!((board.slot(0x70), board.slot(0x60), board.slot(0x44)), (0xf, 0, 1));
    assert_eq!(board.slot(0x104), u32::from_le_bytes(*b"efgh"));
    board.virtio_end(Nanos(0), 3, true);
    assert_eq!((board.slot(0x70), board.slot(0x44), board.virtio_owes()), (0, 0, false));
    assert!(board.virtio_begin(3).is_none());
    board.start();
    assert_eq!(board.virtio_begin(3).map(|snapshot| snapshot.generation), Some(generation + 2));
}

#[test]
fn a_queue_that_is_taken_back_reads_ready_until_the_worker_lets_go() {
    let mut board = plugged();
    board.start();
    assert!(board.virtio_begin(3).is_some());
    board.put(0x44, 0);
    board.put(0x80, 0x7000);
    board.put(0x44, 1);
    assert_eq!(board.slot(0x44), 1, "the old one");
    board.virtio_end(Nanos(0), 3, false);
    assert_eq!(board.slot(0x44), 0);
    board.put(0x44, 1);
    assert_eq!(board.virtio_begin(3).map(|snapshot| snapshot.queues[0].table), Some(0x1000));
}

#[test]
fn a_device_that_failed_does_nothing_until_it_is_reset() {
    let mut board = plugged();
    board.virtio_failed(Nanos(0), 3);
    assert_eq!(board.slot(0x70), 0, "nobody to tell");
    board.start();
    board.virtio_failed(Nanos(0), 3);
    assert_eq!((board.slot(0x70), board.slot(0x60)), (0x4f, 2));
    board.put(0x50, 0);
    assert!(board.virtio_begin(3).is_none() && !board.virtio_owes());
    board.start();
    assert!(board.virtio_begin(3).is_some());
    board.virtio_end(Nanos(0), 3, false);
    board.put(0x70, 0x80);
    assert!(board.virtio_begin(3).is_none(), "the driver has given up");
}

#[test]
fn a_reset_of_the_board_resets_its_devices() {
    let mut board = plugged();
    board.start();
    board.virtio_used(Nanos(0), 3);
    board.reset(Nanos(5));
    assert_eq!((board.slot(0x70), board.slot(0x60), board.virtio.lines), (0, 0, 0));
    board.start();
    assert!(board.virtio_begin(3).is_some());
    board.reset(Nanos(6));
    assert_eq!(board.slot(0x70), 0xf);
    board.virtio_end(Nanos(6), 3, false);
    assert_eq!(board.slot(0x70), 0);
}
