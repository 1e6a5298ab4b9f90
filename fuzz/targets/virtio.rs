//! virtio devices under random drivers: registers and rings of noise, of which much makes sense, and which change under the device.
//!
//! What must hold: no panic; a round ends (libFuzzer's own limits watch time and memory); after each program the audit finds
//! nothing; nothing is written to the disk that no write asked for, which a disk that is only read shows.
#![no_main]

use std::io;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use umbra::board::{QUEUES_MAX, VirtioSnapshot, VirtioSpec};
use umbra::virtio::balloon::BalloonDevice;
use umbra::virtio::blk::Blk;
use umbra::virtio::chain::Chain;
use umbra::virtio::disk::{Disk, Medium, SECTOR_BYTES};
use umbra::virtio::fuzz::{BUFFERS, Bench, Layout, Part, Registers, poke};
use umbra::virtio::{Device, Served};
use umbra_mmu::{Gfn, Mmu, Shortage};

const SECTORS: u64 = 64;
/// Pages that buffers and rings lie in, and a few that they do not.
const PAGES: u32 = 32;

/// A disk that only checks where it is asked for something.
struct Checked {
    read_only: bool,
}

impl Checked {
    fn check(&self, offset: u64, bytes: u64) -> io::Result<()> {
        assert!(offset + bytes <= SECTORS * SECTOR_BYTES, "{bytes} bytes at {offset}");
        // Some operations fail.
        if offset == 7 * SECTOR_BYTES { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) }
    }

    fn check_write(&self, offset: u64, bytes: u64) -> io::Result<()> {
        assert!(!self.read_only, "a write to a disk that is only read");
        self.check(offset, bytes)
    }
}

impl Medium for Checked {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.check(offset, buffer.len() as u64)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check_write(offset, data.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.check_write(offset, bytes)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.check_write(offset, bytes)?;
        if offset % 1024 == 0 { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }
}

/// A device whose driver stores to rings and buffers while a request is served: once it has been read, and before it is given back.
struct Raced<D> {
    device: D,
    stores: Arc<Mutex<Vec<(u64, [u8; 8])>>>,
}

impl<D> Raced<D> {
    fn race(&self, mmu: &Mmu) {
        if let Some((at, bytes)) = self.stores.lock().expect("one thread").pop() {
            poke(mmu, at, &bytes);
        }
    }
}

impl<D: Device> Device for Raced<D> {
    fn spec(&self) -> VirtioSpec {
        self.device.spec()
    }

    fn header_bytes(&self) -> usize {
        self.device.header_bytes()
    }

    fn begin_round(&mut self, snapshot: &VirtioSnapshot) {
        self.device.begin_round(snapshot);
    }

    fn serve(&mut self, mmu: &Mmu, queue: usize, chain: &Chain) -> Result<Served, Shortage> {
        self.race(mmu);
        let served = self.device.serve(mmu, queue, chain);
        self.race(mmu);
        served
    }

    fn give_back(&mut self) -> Option<(usize, u16)> {
        self.device.give_back()
    }
}

/// An address: mostly in a few pages, which hold rings or buffers.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Buffer { page: u8, offset: u16 },
    Ring { queue: u8, offset: u16 },
    Any(u64),
}

impl Place {
    fn address(self) -> u64 {
        match self {
            Place::Buffer { page, offset } => {
                BUFFERS + (u64::from(page) % u64::from(PAGES) << 12) + u64::from(offset % 4096)
            }
            Place::Ring { queue, offset } => {
                Layout::of(usize::from(queue) % QUEUES_MAX).table + u64::from(offset % 0x6000)
            }
            Place::Any(address) => address,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Descriptor {
    place: Place,
    length: u16,
    /// The length is in pages.
    long: bool,
    write: bool,
}

impl Descriptor {
    fn part(self) -> Part {
        let length = u32::from(self.length) << if self.long { 8 } else { 0 };
        (self.place.address(), length, if self.write { 2 } else { 0 })
    }
}

#[derive(Arbitrary, Clone, Debug)]
enum Operation {
    /// As a sane driver does.
    SetUp {
        features: u64,
        without: u64,
    },
    /// Any register, any value.
    Write {
        register: u8,
        value: u32,
    },
    /// Some of them, and small values.
    Configure {
        queue: u8,
        which: u8,
        value: u16,
    },
    Read {
        register: u16,
    },
    /// A block request that makes sense, and a chain of any descriptors.
    Request {
        kind: u8,
        sector: u8,
        data: Vec<Descriptor>,
        indirect: bool,
    },
    Chain {
        queue: u8,
        first: u8,
        parts: Vec<Descriptor>,
        indirect: bool,
    },
    /// Page numbers, statistics.
    Words {
        queue: u8,
        words: Vec<u16>,
    },
    /// A descriptor, and an entry of the available ring.
    Lay {
        queue: u8,
        index: u8,
        at: Descriptor,
        flags: u8,
        next: u8,
    },
    Offer {
        queue: u8,
        head: u16,
    },
    /// Noise in memory.
    Poke {
        at: Place,
        bytes: [u8; 8],
    },
    /// The same while a request is served.
    Race {
        at: Place,
        bytes: [u8; 8],
    },
    PageOut {
        page: u8,
        count: u8,
    },
    Round,
    Target(u32),
}

fn apply<D: Device>(bench: &mut Bench<Raced<D>>, operation: Operation) {
    let queue_of = |queue: u8| usize::from(queue) % QUEUES_MAX;
    match operation {
        Operation::SetUp { features, without } => bench.set_up(features % (1 << 16), without),
        Operation::Write { register, value } => bench.port.write(u32::from(register) * 4, value),
        Operation::Configure { queue, which, value } => {
            let registers = [0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x90, 0xa0, 0x104];
            bench.port.write(0x30, queue_of(queue) as u32);
            bench.port.write(registers[usize::from(which) % registers.len()], value.into());
        }
        Operation::Read { register } => {
            let _ = bench.port.read(u32::from(register % 0x200) & !3);
        }
        Operation::Request { kind, sector, data, indirect } => {
            let header = [&u32::from(kind % 16).to_le_bytes()[..], &[0; 4], &u64::from(sector).to_le_bytes()];
            bench.poke(BUFFERS, &header.concat());
            let data = data.into_iter().take(8).map(Descriptor::part);
            let parts: Vec<Part> =
                [(BUFFERS, 16, 0)].into_iter().chain(data).chain([(BUFFERS + 0x20, 1, 2)]).collect();
            bench.offer_chain(0, 1, &parts, indirect);
        }
        Operation::Chain { queue, first, parts, indirect } => {
            let parts: Vec<Part> = parts.into_iter().take(16).map(Descriptor::part).collect();
            if !parts.is_empty() {
                bench.offer_chain(queue_of(queue), u16::from(first % 16), &parts, indirect);
            }
        }
        Operation::Words { queue, words } => {
            let bytes: Vec<u8> =
                words.iter().take(512).flat_map(|word| u32::from(*word).to_le_bytes()).collect();
            bench.poke(BUFFERS + 0x100, &bytes);
            bench.offer_chain(queue_of(queue), 2, &[(BUFFERS + 0x100, bytes.len() as u32, 0)], false);
        }
        Operation::Lay { queue, index, at, flags, next } => {
            let (at, length, _) = at.part();
            let part = (at, length, u16::from(flags % 8));
            bench.lay(Layout::of(queue_of(queue)).table, u16::from(index % 16), part, u16::from(next % 17));
        }
        Operation::Offer { queue, head } => bench.offer(queue_of(queue), head % 18),
        Operation::Poke { at: Place::Any(_), .. } | Operation::Race { at: Place::Any(_), .. } => {}
        Operation::Race { at, bytes } => {
            let mut stores = bench.worker.device().stores.lock().expect("one thread");
            stores.push((at.address(), bytes));
        }
        Operation::Poke { at, bytes } => bench.poke(at.address(), &bytes),
        Operation::PageOut { page, count } => {
            let first = ((if page & 1 == 0 { BUFFERS } else { Layout::of(0).table }) >> 12) as u32;
            let first = first + u32::from(page) % PAGES;
            let pages: Vec<Gfn> = (first..first + u32::from(count % 16)).map(Gfn).collect();
            bench.mmu.page_out(None, &pages).expect("memory does not fail");
        }
        Operation::Round => {
            let _ = bench.worker.round(&bench.mmu, &*bench.port).expect("there are frames");
        }
        Operation::Target(pages) => {
            bench.port.board().virtio_set_config(umbra::board::Nanos(0), 0, 0, &pages.to_le_bytes())
        }
    }
}

fn run<D: Device>(device: D, program: Vec<Operation>) {
    let mut bench = Bench::new(Raced { device, stores: Arc::default() });
    bench.set_up(0xffff, 0);
    for operation in program {
        apply(&mut bench, operation);
        // What has been asked for is served: a round takes one request of each ring.
        if bench.port.board().take_notifies() != 0 {
            let _ = bench.worker.round(&bench.mmu, &*bench.port).expect("there are frames");
        }
    }
    for _ in 0..64 {
        if !bench.worker.round(&bench.mmu, &*bench.port).expect("there are frames") {
            break;
        }
    }
    let findings = bench.mmu.audit();
    assert!(findings.is_empty(), "{findings:#?}");
}

fuzz_target!(|input: (u8, Vec<Operation>)| {
    let (device, program) = input;
    let read_only = device & 2 != 0;
    match device & 1 {
        0 => {
            let disk = Disk::new(Box::new(Checked { read_only }), SECTORS, read_only, "disk".into());
            run(Blk::new(disk), program);
        }
        _ => run(BalloonDevice::new(), program),
    }
});
