//! The board under random accesses: any port, any device register, any width, at any time.
//!
//! What must hold: no panic, no arithmetic overflow, and each call ends at once (libFuzzer's own limits watch time and
//! memory). The same calls on a second board give the same answers. A deadline lies ahead, so that whoever waits for it
//! gets on.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use umbra::board::{Board, BoardConfig, MemoryMap, Nanos};
use umbra::interp::Width;
use umbra::virtio::Device;
use umbra::virtio::balloon::BalloonDevice;
use umbra_mmu::Gpa;

const VCPUS: usize = 3;

/// Ports and pages that belong to somebody; a random address would miss them nearly always.
const PORTS: [u16; 14] =
    [0x20, 0x40, 0x43, 0x60, 0x61, 0x70, 0x71, 0x92, 0xa0, 0xf4, 0x3f8, 0x3fc, 0x4d0, 0xcf9];
const PAGES: [u64; 5] = [0xfea0_0000, 0xfeb0_0000, 0xfec0_0000, 0xfec1_0000, 0xfee0_0000];

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Port {
    Owned { which: u8, further: u8 },
    Any(u16),
}

/// An address in device memory.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    /// A register at a multiple of 16 bytes, as APICs have them.
    Register { page: u8, number: u8 },
    /// Anywhere in a device's page, misaligned or not.
    Offset { page: u8, offset: u16 },
    /// Anywhere.
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Operation {
    PortIn(Port),
    PortOut(Port, u32),
    MmioRead(Place),
    MmioWrite(Place, u64),
    Advance,
    /// Waits for the next deadline.
    Wait,
    Pending,
    Line {
        gsi: u8,
        level: bool,
    },
    Serial([u8; 3]),
    Acknowledge,
    Signals,
    Init,
    Nmi,
    /// What a virtio device's worker does.
    Worker(u8),
    ApicBase(u64),
    Reset,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Step {
    /// Nanoseconds since the step before, as a power of two, so that one byte reaches from now to centuries.
    later_log2: u8,
    vcpu: u8,
    width: u8,
    operation: Operation,
}

fn board() -> Board {
    let memory = MemoryMap::new(64 << 20).expect("64 MiB is a fine size");
    let config =
        BoardConfig { memory, vcpus: VCPUS, serial: Box::new(std::io::sink()), epoch_seconds: 1_000_000_000 };
    let mut board = Board::new(config).expect("three vCPUs are allowed");
    assert!(board.plug(1, BalloonDevice::new().spec()), "an empty slot");
    board
}

fn port(port: Port) -> u16 {
    match port {
        Port::Owned { which, further } => PORTS[usize::from(which) % PORTS.len()] + u16::from(further % 8),
        Port::Any(port) => port,
    }
}

/// The address, where `width` stays within its page.
fn address(place: Place, width: Width) -> Gpa {
    let page = |page: u8| PAGES[usize::from(page) % PAGES.len()];
    let last = 4096 - u64::from(width.bytes());
    let address = match place {
        Place::Register { page: n, number } => page(n) + u64::from(number) * 16,
        Place::Offset { page: n, offset } => page(n) + u64::from(offset) % 4096,
        Place::Any(address) => address % (1 << 52),
    };
    Gpa(address & !0xfff | (address & 0xfff).min(last))
}

/// One step; what it answered, for the comparison.
fn apply(board: &mut Board, now: Nanos, step: Step) -> u64 {
    // One vCPU more than there is: the board must stand a wrong number too.
    let vcpu = usize::from(step.vcpu) % (VCPUS + 1);
    let width = [Width::B1, Width::B2, Width::B4, Width::B8][usize::from(step.width) % 4];
    match step.operation {
        Operation::PortIn(at) => return board.port_in(now, vcpu, port(at), width).into(),
        Operation::PortOut(at, value) => board.port_out(now, vcpu, port(at), width, value),
        Operation::MmioRead(at) => return board.mmio_read(now, vcpu, address(at, width), width),
        Operation::MmioWrite(at, value) => board.mmio_write(now, vcpu, address(at, width), width, value),
        Operation::Advance | Operation::Wait => board.advance(now),
        Operation::Pending => return u64::from(board.interrupt_pending(vcpu)) | board.apic_base(vcpu) << 1,
        Operation::Line { gsi, level } => board.set_gsi(now, u32::from(gsi) % 64, level),
        Operation::Serial(bytes) => return board.serial_input(now, &bytes) as u64,
        Operation::Acknowledge => return board.acknowledge(now, vcpu).map_or(256, u64::from),
        Operation::Signals => return u64::from(board.take_signals(vcpu).is_empty()),
        Operation::Init => board.init_vcpu(now, vcpu),
        Operation::Nmi => board.raise_nmi(vcpu),
        Operation::Worker(what) => match what % 5 {
            0 => return board.virtio_begin(1).map_or(0, |snapshot| snapshot.features),
            1 => board.virtio_used(now, 1),
            2 => board.virtio_set_config(now, 1, 0, &[what; 4]),
            3 => board.virtio_failed(now, 1),
            _ => board.virtio_end(now, 1, what & 0x80 != 0),
        },
        Operation::ApicBase(value) => return u64::from(board.set_apic_base(vcpu, value).is_ok()),
        Operation::Reset => board.reset(now),
    }
    0
}

fuzz_target!(|steps: Vec<Step>| {
    let mut boards = [board(), board()];
    let mut latest = Nanos(0);
    for step in steps {
        let now = match step.operation {
            Operation::Pending
            | Operation::Signals
            | Operation::Nmi
            | Operation::Worker(_)
            | Operation::ApicBase(_) => latest,
            Operation::Wait => boards[0].next_deadline().unwrap_or(latest),
            // vCPUs race to be the next: one may come with a time that is over.
            _ if step.later_log2 & 0x80 != 0 => Nanos(latest.0 >> (step.later_log2 % 8)),
            _ => latest.plus(1 << (step.later_log2 % 64)),
        };
        latest = latest.max(now);
        let [one, two] = boards.each_mut().map(|board| {
            let answer = apply(board, now, step);
            let told = (board.take_wakes(), board.take_notifies());
            (answer, told, board.next_deadline(), board.take_exit(), board.counters())
        });
        assert_eq!(one, two, "the same calls gave different answers at {step:?}");
        assert!(
            one.2.is_none_or(|deadline| deadline > latest || deadline == Nanos(u64::MAX)),
            "{:?} is over at {latest:?}: {step:?}",
            one.2
        );
    }
});
