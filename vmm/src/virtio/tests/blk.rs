//! The block device: request by request, against a flat disk, and with all that a driver can get wrong.

use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use umbra_mmu::Gfn;

use super::super::blk::{Blk, BlkHandle, REQUEST_BYTES_MAX};
use super::super::disk::{Disk, Medium};
use super::super::fuzz::{BUFFERS, Bench, INDIRECT, Layout, NEXT, PAGES, Part, Registers, WRITE};
use crate::board::{F_EVENT_IDX, F_INDIRECT_DESC};

const SECTORS: u64 = 4096;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x1fff;
const DATA: u64 = BUFFERS + 0x2000;

const F_FLUSH: u64 = 1 << 9;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What a status byte is before there is one.
const NONE: u8 = 0xee;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

/// A flat disk that says what was asked of it, and fails where it is told to.
#[derive(Default)]
struct Flat {
    bytes: Mutex<Vec<u8>>,
    syncs: Mutex<u32>,
    fails: Mutex<Option<i32>>,
    no_holes: bool,
}

impl Flat {
    fn new() -> Arc<Flat> {
        Arc::new(Flat { bytes: Mutex::new(vec![0; (SECTORS * 512) as usize]), ..Flat::default() })
    }

    fn pass(&self) -> io::Result<()> {
        self.fails.lock().expect("sane").map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    fn fail(&self, errno: Option<i32>) {
        *self.fails.lock().expect("sane") = errno;
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.pass()?;
        if self.no_holes {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.bytes.lock().expect("sane")[offset as usize..(offset + bytes) as usize].fill(0);
        Ok(())
    }
}

struct Shared(Arc<Flat>);

impl Medium for Shared {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.pass()?;
        buffer.copy_from_slice(&self.0.bytes.lock().expect("sane")[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.pass()?;
        self.0.bytes.lock().expect("sane")[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.pass()?;
        *self.0.syncs.lock().expect("sane") += 1;
        Ok(())
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.0.zero(offset, bytes)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.0.zero(offset, bytes)
    }
}

struct Guest {
    bench: Bench<Blk>,
    handle: BlkHandle,
    flat: Arc<Flat>,
}

fn guest_of(flat: Arc<Flat>, read_only: bool) -> Guest {
    let disk = Disk::new(Box::new(Shared(Arc::clone(&flat))), SECTORS, read_only, "the-disk".into());
    let device = Blk::new(disk);
    let handle = device.handle();
    let mut bench = Bench::new(device);
    bench.set_up(F_FLUSH, 0);
    Guest { bench, handle, flat }
}

fn guest() -> Guest {
    guest_of(Flat::new(), false)
}

impl Guest {
    fn header(&self, kind: u32, sector: u64) {
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.bench.poke(HEADER, &bytes);
        self.bench.poke(STATUS, &[NONE]);
    }

    /// Offers a chain and serves; the status and the length used.
    fn offer(&mut self, parts: &[Part], indirect: bool) -> (u8, u32) {
        let before = self.bench.used(0).0;
        self.bench.offer_chain(0, 3, parts, indirect);
        self.bench.serve().expect("frames");
        let (index, head, length) = self.bench.used(0);
        assert_eq!((index, head), (before.wrapping_add(1), 3), "one more");
        (self.bench.peek(STATUS, 1)[0], length)
    }

    /// A request with its header, `data` and a status.
    fn ask(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
        self.header(kind, sector);
        let parts = [&[(HEADER, 16, 0)][..], data, &[(STATUS, 1, WRITE)]].concat();
        self.offer(&parts, false)
    }

    fn range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> (u8, u32) {
        let bytes = [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.bench.poke(DATA, &bytes);
        self.ask(kind, 0, &[(DATA, 16, 0)])
    }

    fn is_alive(&self) -> bool {
        self.bench.port.read(0x70) == 0xf
    }
}

#[test]
fn what_is_written_is_read_back_and_is_on_the_disk() {
    let mut guest = guest();
    let bytes: Vec<u8> = (0..0x2400u32).map(|n| (n * 7 / 3) as u8).collect();
    guest.bench.poke(DATA + 0x10, &bytes);
    assert_eq!(guest.ask(OUT, 5, &[(DATA + 0x10, 0x2400, 0)]), (OK, 1));
    assert!(guest.flat.bytes.lock().expect("sane")[5 * 512..][..0x2400] == bytes[..]);
    let split = [(DATA + 0x8001, 3, WRITE), (DATA + 0x9fff, 0x23fd, WRITE)];
    assert_eq!(guest.ask(IN, 5, &split), (OK, 0x2401));
    let back = [guest.bench.peek(DATA + 0x8001, 3), guest.bench.peek(DATA + 0x9fff, 0x23fd)].concat();
    assert!(back == bytes);
    let summary = guest.handle.summary();
    assert_eq!((summary.read.sectors, summary.write.sectors, summary.largest_request), (18, 18, 0x2400));
    assert_eq!(guest.bench.port.read(0x60), 1, "an interrupt");
    assert_eq!(guest.bench.mmu.audit(), Vec::<String>::new());
}

#[test]
fn a_flush_syncs_and_a_driver_that_does_not_flush_has_every_write_synced() {
    let mut guest = guest();
    let syncs = |guest: &Guest| *guest.flat.syncs.lock().expect("sane");
    assert_eq!(guest.ask(OUT, 0, &[(DATA, 512, 0)]), (OK, 1));
    assert_eq!(syncs(&guest), 0);
    assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(syncs(&guest), 1);
    guest.bench.set_up(0, 0);
    assert_eq!(guest.ask(OUT, 0, &[(DATA, 512, 0)]), (OK, 1));
    assert_eq!(syncs(&guest), 2);
}

#[test]
fn the_identifier_is_20_bytes_padded_with_zeros_or_as_many_as_there_is_room_for() {
    let mut guest = guest();
    guest.bench.poke(DATA, &[NONE; 24]);
    assert_eq!(guest.ask(GET_ID, 0, &[(DATA, 24, WRITE)]), (OK, 21));
    assert_eq!(guest.bench.peek(DATA, 24), *b"the-disk\0\0\0\0\0\0\0\0\0\0\0\0\xee\xee\xee\xee");
    assert_eq!(guest.ask(GET_ID, 0, &[(DATA, 3, WRITE)]), (OK, 4));
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeros_also_where_the_disk_knows_no_holes() {
    for no_holes in [false, true] {
        let bytes = Mutex::new(vec![7; (SECTORS * 512) as usize]);
        let mut guest = guest_of(Arc::new(Flat { bytes, no_holes, ..Flat::default() }), false);
        assert_eq!(guest.range(ZEROES, 10, 300, 1), (OK, 1));
        assert_eq!(guest.range(ZEROES, 400, 1, 0), (OK, 1));
        assert_eq!(guest.range(DISCARD, 500, 2, 0), (OK, 1));
        let bytes = guest.flat.bytes.lock().expect("sane").clone();
        let zeros = |from: usize, to: usize| bytes[from * 512..to * 512].iter().all(|byte| *byte == 0);
        assert!(zeros(10, 310) && zeros(400, 401) && bytes[310 * 512] == 7 && bytes[401 * 512] == 7);
        assert_eq!(zeros(500, 502), !no_holes);
    }
}

#[test]
fn ranges_that_make_no_sense_are_refused_before_any_is_touched() {
    let mut guest = guest_of(Flat::new(), false);
    guest.flat.bytes.lock().expect("sane").fill(7);
    for (kind, sector, count, flags, want) in [
        (DISCARD, 0, 1, 1, UNSUPP),
        (ZEROES, 0, 1, 2, UNSUPP),
        (ZEROES, SECTORS, 1, 0, IOERR),
        (DISCARD, u64::MAX, 2, 0, IOERR),
        (ZEROES, 0, u32::MAX, 0, IOERR),
    ] {
        assert_eq!(guest.range(kind, sector, count, flags), (want, 1), "{kind} {sector} {count} {flags}");
    }
    // The second of two, one and a half, none, and one too many.
    let good = [&0u64.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 4]].concat();
    let bad = [&SECTORS.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 4]].concat();
    guest.bench.poke(DATA, &[good.clone(), bad].concat());
    assert_eq!(guest.ask(ZEROES, 0, &[(DATA, 32, 0)]).0, IOERR);
    assert_eq!(guest.ask(ZEROES, 0, &[(DATA, 24, 0)]).0, IOERR);
    assert_eq!(guest.ask(ZEROES, 0, &[]).0, IOERR);
    guest.bench.poke(DATA, &good.repeat(17));
    assert_eq!(guest.ask(ZEROES, 0, &[(DATA, 17 * 16, 0)]).0, IOERR);
    assert!(guest.flat.bytes.lock().expect("sane").iter().all(|byte| *byte == 7));
}

#[test]
fn requests_that_make_no_sense_get_an_error_and_change_nothing() {
    let mut guest = guest();
    let end = u64::from(PAGES) << 12;
    let [read, write] = [0, WRITE];
    let cases: [(u32, u64, &[Part], u8); 16] = [
        (IN, SECTORS, &[(DATA, 512, write)], IOERR),
        (IN, SECTORS - 1, &[(DATA, 1024, write)], IOERR),
        (IN, u64::MAX, &[(DATA, 512, write)], IOERR),
        (OUT, 1 << 55, &[(DATA, 512, read)], IOERR),
        (IN, 0, &[(DATA, 511, write)], IOERR),
        (OUT, 0, &[(DATA, 513, read)], IOERR),
        (IN, 0, &[(DATA, 512, read)], IOERR),
        (OUT, 0, &[(DATA, 512, write)], IOERR),
        (FLUSH, 0, &[(DATA, 512, read)], IOERR),
        (99, 0, &[], UNSUPP),
        (2, 0, &[(DATA, 512, write)], UNSUPP),
        (IN, 0, &[(DATA, REQUEST_BYTES_MAX as u32, write), (DATA, 512, write)], IOERR),
        (OUT, 0, &[(end - 256, 512, read)], IOERR),
        (IN, 0, &[(1 << 52, 512, write)], IOERR),
        (OUT, 0, &[(u64::MAX - 100, 512, read)], IOERR),
        (IN, 0, &[(0xfee0_0000, 512, write)], IOERR),
    ];
    for (kind, sector, data, want) in cases {
        assert_eq!(guest.ask(kind, sector, data), (want, 1), "{kind} {sector} {data:x?}");
    }
    assert!(guest.flat.bytes.lock().expect("sane").iter().all(|byte| *byte == 0));
    assert!(guest.is_alive());
    let summary = guest.handle.summary();
    assert_eq!((summary.read.errors, summary.other.errors), (8, 2));
}

#[test]
fn the_largest_request_is_served() {
    let mut guest = guest();
    let part = (DATA, REQUEST_BYTES_MAX as u32, WRITE);
    assert_eq!(guest.ask(IN, 0, &[part]), (OK, REQUEST_BYTES_MAX as u32 + 1));
}

/// A driver makes requests as large as it is told that it may.
#[test]
fn the_largest_request_that_the_limits_allow_is_served() {
    let mut guest = guest();
    guest.bench.driver.size = 128;
    guest.bench.set_up(F_FLUSH, 0);
    let read = |register| guest.bench.port.read(register);
    guest.bench.port.write(0x14, 0);
    assert_eq!(read(0x10) & 6, 6, "both limits are offered");
    let (segment, segments) = (read(0x108), read(0x10c));
    let data = (0..segments).map(|n| (DATA + u64::from(n * segment), segment, WRITE));
    guest.header(IN, 0);
    let parts: Vec<Part> = [(HEADER, 16, 0)].into_iter().chain(data).chain([(STATUS, 1, WRITE)]).collect();
    assert_eq!(guest.offer(&parts, true), (OK, segment * segments + 1));
}

#[test]
fn chains_that_are_none_are_given_back_with_an_error_where_there_is_a_status() {
    let mut guest = guest();
    let status = (STATUS, 1, WRITE);
    guest.header(IN, 0);
    // No status; nothing at all; a header that is too short, or no memory.
    assert_eq!(guest.offer(&[(HEADER, 16, 0)], false), (NONE, 0));
    assert_eq!(guest.offer(&[(HEADER, 16, 0), (DATA, 0, WRITE)], true), (NONE, 0));
    assert_eq!(guest.offer(&[(HEADER, 15, 0), status], false), (IOERR, 1));
    guest.header(IN, 0);
    assert_eq!(guest.offer(&[(0xfec0_0000, 16, 0), status], false), (IOERR, 1));
    // What is written before what is read.
    guest.header(IN, 0);
    assert_eq!(
        guest.offer(&[(HEADER, 16, 0), (DATA, 512, WRITE), (DATA, 512, 0), status], false),
        (IOERR, 1)
    );
    // A status that is no memory.
    assert_eq!(guest.offer(&[(HEADER, 16, 0), (1 << 40, 1, WRITE)], false), (IOERR, 0));
    let Layout { table, indirect, .. } = Layout::of(0);
    let give_back = |guest: &mut Guest, head: u16| {
        let before = guest.bench.used(0).0;
        guest.bench.offer(0, head);
        guest.bench.serve().expect("frames");
        assert_eq!((guest.bench.used(0).0, guest.bench.used(0).1), (before + 1, head.into()));
    };
    // A loop, a descriptor beyond the table, an indirect table of itself, one that is no memory, of half an entry, of nothing.
    guest.bench.lay(table, 4, (DATA, 512, NEXT), 4);
    give_back(&mut guest, 4);
    guest.bench.lay(table, 4, (DATA, 512, NEXT), 16);
    give_back(&mut guest, 4);
    guest.bench.lay(indirect, 0, (indirect, 16, INDIRECT), 0);
    for (at, bytes) in [(indirect, 16), (1 << 40, 64), (indirect, 8), (indirect, 0), (indirect, 1 << 20)] {
        guest.bench.lay(table, 4, (at, bytes, INDIRECT), 0);
        give_back(&mut guest, 4);
    }
    assert!(guest.is_alive());
    guest.header(IN, 0);
    assert_eq!(guest.ask(IN, 0, &[(DATA, 512, WRITE)]), (OK, 513), "it goes on");
}

#[test]
fn a_ring_that_is_none_makes_the_device_want_a_reset_and_a_reset_heals_it() {
    let Layout { available, .. } = Layout::of(0);
    let lies: [&dyn Fn(&mut Guest); 5] = [
        &|guest| guest.bench.poke(available + 2, &1000u16.to_le_bytes()),
        &|guest| guest.bench.offer(0, 16),
        &|guest| set_address(guest, 0x90, 0xfee0_0000),
        &|guest| set_address(guest, 0xa0, 1 << 40),
        &|guest| set_address(guest, 0x90, 0),
    ];
    let mut guest = guest();
    for (n, lie) in lies.iter().enumerate() {
        lie(&mut guest);
        guest.bench.serve().expect("frames");
        assert_eq!(guest.bench.port.read(0x70), 0x4f, "lie {n}");
        assert_eq!(guest.bench.port.read(0x60) & 2, 2, "lie {n}: it says so");
        guest.bench.set_up(F_FLUSH, 0);
        assert_eq!(guest.ask(IN, 0, &[(DATA, 512, WRITE)]), (OK, 513), "lie {n}: healed");
    }
}

fn set_address(guest: &Guest, register: u32, address: u64) {
    guest.bench.port.write(0x30, 0);
    guest.bench.port.write(0x44, 0);
    guest.bench.port.write(register, address as u32);
    guest.bench.port.write(register + 4, (address >> 32) as u32);
    guest.bench.port.write(0x44, 1);
    assert_eq!(guest.bench.port.read(0x44), 1);
}

#[test]
fn a_disk_that_fails_is_an_error_of_the_request_and_no_more() {
    let mut guest = guest();
    for errno in [libc::EIO, libc::ENOSPC] {
        guest.flat.fail(Some(errno));
        assert_eq!(guest.ask(OUT, 0, &[(DATA, 512, 0)]), (IOERR, 1));
        assert_eq!(guest.ask(IN, 0, &[(DATA, 512, WRITE)]), (IOERR, 1));
        assert_eq!(guest.ask(FLUSH, 0, &[]), (IOERR, 1));
        assert_eq!(guest.range(ZEROES, 0, 1, 0), (IOERR, 1));
        guest.flat.fail(None);
        assert_eq!(guest.ask(OUT, 0, &[(DATA, 512, 0)]), (OK, 1));
    }
    assert_eq!((guest.handle.summary().write.errors, guest.handle.summary().write.requests), (2, 4));
}

#[test]
fn nothing_is_written_to_a_disk_that_may_only_be_read() {
    let mut guest = guest_of(Flat::new(), true);
    guest.bench.poke(DATA, &[7; 512]);
    assert_eq!(guest.ask(OUT, 0, &[(DATA, 512, 0)]), (IOERR, 1));
    assert_eq!(guest.range(DISCARD, 0, 1, 0), (IOERR, 1));
    assert_eq!(guest.range(ZEROES, 0, 1, 0), (IOERR, 1));
    assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(guest.ask(IN, 0, &[(DATA, 512, WRITE)]), (OK, 513));
    assert!(guest.flat.bytes.lock().expect("sane").iter().all(|byte| *byte == 0));
}

#[test]
fn interrupts_come_as_the_driver_wants_them() {
    let mut guest = guest();
    let Layout { available, .. } = Layout::of(0);
    let interrupts = |guest: &mut Guest| {
        guest.bench.port.write(0x64, 3);
        assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1));
        guest.bench.port.read(0x60)
    };
    // By index: used_event says which entry is to be told of.
    guest.bench.poke(available + 4 + 32, &5u16.to_le_bytes());
    assert_eq!(interrupts(&mut guest), 0);
    let used = guest.bench.used(0).0;
    guest.bench.poke(available + 4 + 32, &used.to_le_bytes());
    assert_eq!(interrupts(&mut guest), 1);
    // By the flag.
    guest.bench.set_up(F_FLUSH, F_EVENT_IDX);
    assert_eq!(interrupts(&mut guest), 1);
    guest.bench.poke(available, &1u16.to_le_bytes());
    assert_eq!(interrupts(&mut guest), 0);
}

#[test]
fn requests_in_swapped_memory_are_served_whole() {
    let mut guest = guest();
    let bytes: Vec<u8> = (0..0x10_0000u32).map(|n| (n / 3) as u8).collect();
    guest.bench.poke(DATA, &bytes);
    guest.header(OUT, 0);
    let pages: Vec<Gfn> = (0x100..0x400).map(Gfn).collect();
    assert!(guest.bench.mmu.page_out(None, &pages).expect("room") > 256);
    let parts = [(HEADER, 16, 0), (DATA, 0x10_0000, 0), (STATUS, 1, WRITE)];
    assert_eq!(guest.offer(&parts, true), (OK, 1));
    assert!(guest.flat.bytes.lock().expect("sane")[..0x10_0000] == bytes[..]);
    assert_eq!(guest.bench.mmu.audit(), Vec::<String>::new());
}

/// What a random driver asks for.
#[derive(Clone, Debug)]
struct Asked {
    kind: u32,
    sector: u64,
    sectors: u32,
    cuts: Vec<u32>,
    indirect: bool,
    fill: u8,
}

fn any_asked() -> impl Strategy<Value = Asked> {
    let kind = proptest::sample::select(vec![IN, OUT, OUT, ZEROES, DISCARD]);
    let cuts = proptest::collection::vec(1u32..0x3000, 0..5);
    (kind, 0..SECTORS + 8, 1u32..64, cuts, any::<bool>(), any::<u8>()).prop_map(
        |(kind, sector, sectors, cuts, indirect, fill)| Asked { kind, sector, sectors, cuts, indirect, fill },
    )
}

/// `count` bytes at `DATA`, cut up.
fn parts_of(cuts: &[u32], count: u32, flags: u16) -> Vec<Part> {
    let (mut at, mut left, mut parts) = (DATA, count, Vec::new());
    for cut in cuts.iter().copied().chain([count]) {
        let now = cut.min(left);
        if now > 0 {
            parts.push((at, now, flags));
        }
        // With a gap, so that parts do not just follow each other.
        (at, left) = (at + u64::from(now) + 0x123, left - now);
    }
    parts
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_do_what_a_flat_disk_does(asked in proptest::collection::vec(any_asked(), 1..40)) {
        let mut guest = guest();
        let mut model = vec![0u8; (SECTORS * 512) as usize];
        for Asked { kind, sector, sectors, cuts, indirect, fill } in asked {
            let count = sectors * 512;
            let here = sector + u64::from(sectors) <= SECTORS;
            let want = if here { OK } else { IOERR };
            let place = (sector * 512) as usize..(sector * 512) as usize + count as usize;
            if kind == ZEROES || kind == DISCARD {
                prop_assert_eq!(guest.range(kind, sector, sectors, 0), (want, 1));
                if here {
                    model[place].fill(0);
                }
                continue;
            }
            let data = parts_of(&cuts, count, if kind == IN { WRITE } else { 0 });
            let bytes: Vec<u8> = (0..count).map(|n| (n as u8).wrapping_mul(fill)).collect();
            let mut done = 0;
            for (at, length, _) in &data {
                guest.bench.poke(*at, &bytes[done..done + *length as usize]);
                done += *length as usize;
            }
            guest.header(kind, sector);
            let chain = [&[(HEADER, 16, 0)][..], &data, &[(STATUS, 1, WRITE)]].concat();
            prop_assert_eq!(guest.offer(&chain, indirect).0, want);
            if here && kind == OUT {
                model[place].copy_from_slice(&bytes);
            } else if here {
                let back: Vec<u8> = data.iter().flat_map(|part| guest.bench.peek(part.0, part.1 as usize)).collect();
                prop_assert!(back == model[place]);
            }
        }
        prop_assert!(*guest.flat.bytes.lock().expect("sane") == model);
        prop_assert!(guest.is_alive());
        prop_assert_eq!(guest.bench.mmu.audit(), Vec::<String>::new());
    }
}

#[test]
fn a_driver_without_indirect_tables_is_served_all_the_same() {
    let mut guest = guest();
    guest.bench.set_up(F_FLUSH, F_INDIRECT_DESC);
    assert_eq!(guest.ask(IN, 0, &[(DATA, 512, WRITE)]), (OK, 513));
}
