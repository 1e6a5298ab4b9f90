//! The block device.
//!
//! Story: a request has a header (what, which sector), data one way, and a status byte. It is checked whole before anything is
//! done; then data moves through a buffer of the device's own, and the disk is asked with nothing of the guest held.
//!
//! Holds: what a driver gets wrong is an error of that request: `IOERR`, or `UNSUPP` where there is no such thing to do. Once a
//! driver that has not asked for FLUSH sees its write done, it is on the disk.
//!
//! Limits: [`REQUEST_BYTES_MAX`] of data, [`RANGES_MAX`] ranges of [`RANGE_SECTORS_MAX`] to discard or to zero.
//!
//! See: VIRTIO 1.2, 5.2.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use umbra_mmu::dma::NoSession;
use umbra_mmu::{Mmu, Shortage};

use super::chain::{Chain, gather, scatter};
use super::disk::{Disk, ID_BYTES, SECTOR_BYTES};
use super::{Device, Served, little_endian};
use crate::board::{CONFIG_BYTES_MAX, VirtioSnapshot, VirtioSpec};

/// The most data of one request.
pub const REQUEST_BYTES_MAX: u64 = 1 << 20;
/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 128;
/// What a driver is told to make its requests of: so many segments, beside header and status, each of so many bytes.
pub const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of one of them.
pub const SEGMENT_BYTES_MAX: u32 = 8 << 10;
const _: () = assert!(SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64 <= REQUEST_BYTES_MAX);
/// Ranges of one request to discard or to zero.
pub const RANGES_MAX: u32 = 16;
/// Sectors of such a range.
pub const RANGE_SECTORS_MAX: u32 = 1 << 17;

const DEVICE_ID: u32 = 2;
const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

/// Features.
const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// What a request is.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// A range may be given back as it is zeroed.
const UNMAP: u32 = 1;

/// Answers.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Why a request gets no OK.
enum Refusal {
    /// IOERR: it makes no sense, or the disk fails.
    Error,
    /// UNSUPP.
    Unsupported,
    /// There is no page for it: the run ends.
    Short(Shortage),
}

impl From<NoSession> for Refusal {
    fn from(why: NoSession) -> Refusal {
        match why {
            NoSession::Refused(_) => Refusal::Error,
            NoSession::Short(short) => Refusal::Short(short),
        }
    }
}

/// What was done of one kind.
#[derive(Debug, Default)]
pub struct Count {
    requests: AtomicU64,
    sectors: AtomicU64,
    errors: AtomicU64,
}

/// [`Count`] for JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct Done {
    pub requests: u64,
    pub sectors: u64,
    pub errors: u64,
}

impl Count {
    fn read(&self) -> Done {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Done { requests: get(&self.requests), sectors: get(&self.sectors), errors: get(&self.errors) }
    }
}

/// What a disk has done so far.
#[derive(Debug, Default)]
pub struct BlkCounters {
    read: Count,
    write: Count,
    flush: Count,
    discard: Count,
    write_zeroes: Count,
    other: Count,
    largest: AtomicU64,
}

/// A disk and its counters, for JSON.
#[derive(Clone, Debug, Serialize)]
pub struct DiskSummary {
    /// What it is called.
    pub id: String,
    /// Its capacity.
    pub bytes: u64,
    /// The guest may not write to it.
    pub read_only: bool,
    /// Requests that read.
    pub read: Done,
    /// Requests that write.
    pub write: Done,
    /// Flushes.
    pub flush: Done,
    /// Discards.
    pub discard: Done,
    /// Requests to make zeros.
    pub write_zeroes: Done,
    /// Everything else: the disk's identifier, and requests that are none.
    pub other: Done,
    /// The most bytes of data of one request.
    pub largest_request: u64,
}

/// Looks at a disk from outside.
#[derive(Clone, Debug)]
pub struct BlkHandle {
    id: String,
    bytes: u64,
    read_only: bool,
    counters: Arc<BlkCounters>,
}

impl BlkHandle {
    /// What there is to say so far.
    pub fn summary(&self) -> DiskSummary {
        let c = &self.counters;
        DiskSummary {
            id: self.id.clone(),
            bytes: self.bytes,
            read_only: self.read_only,
            read: c.read.read(),
            write: c.write.read(),
            flush: c.flush.read(),
            discard: c.discard.read(),
            write_zeroes: c.write_zeroes.read(),
            other: c.other.read(),
            largest_request: c.largest.load(Ordering::Relaxed),
        }
    }
}

/// The device.
pub struct Blk {
    disk: Disk,
    counters: Arc<BlkCounters>,
    /// Data on its way.
    buffer: Vec<u8>,
    /// Writes are on the disk when they are done.
    write_through: bool,
    /// The disk has failed before: said once.
    warned: bool,
}

impl Blk {
    /// A device over `disk`.
    pub fn new(disk: Disk) -> Blk {
        Blk { disk, counters: Arc::default(), buffer: Vec::new(), write_through: true, warned: false }
    }

    /// For whoever wants to know what it does.
    pub fn handle(&self) -> BlkHandle {
        BlkHandle {
            id: self.disk.id().into(),
            bytes: self.disk.sectors() * SECTOR_BYTES,
            read_only: self.disk.is_read_only(),
            counters: Arc::clone(&self.counters),
        }
    }

    /// Serves a request; returns bytes of data that were written to the guest.
    fn request(&mut self, mmu: &Mmu, chain: &Chain, kind: u32, sector: u64) -> Result<(u32, u64), Refusal> {
        let given = chain.read_bytes().saturating_sub(HEADER_BYTES as u64);
        let room = chain.write_bytes().saturating_sub(1);
        if given > REQUEST_BYTES_MAX || room > REQUEST_BYTES_MAX {
            return Err(Refusal::Error);
        }
        self.counters.largest.fetch_max(given.max(room), Ordering::Relaxed);
        match kind {
            // Data one way only.
            IN if given == 0 => self.read(mmu, chain, sector, room),
            OUT if room == 0 => self.write(mmu, chain, sector, given),
            FLUSH if given == 0 && room == 0 => self.flush(),
            GET_ID if given == 0 => self.get_id(mmu, chain, room),
            DISCARD | WRITE_ZEROES if room == 0 => self.ranges(mmu, chain, kind, given),
            IN | OUT | FLUSH | GET_ID | DISCARD | WRITE_ZEROES => Err(Refusal::Error),
            _ => Err(Refusal::Unsupported),
        }
    }

    /// The number of whole sectors in so many bytes, all of which are on the disk.
    fn sectors_of(&self, sector: u64, bytes: u64) -> Result<u64, Refusal> {
        let count = bytes / SECTOR_BYTES;
        if !bytes.is_multiple_of(SECTOR_BYTES) || !self.disk.has(sector, count) {
            return Err(Refusal::Error);
        }
        Ok(count)
    }

    fn read(&mut self, mmu: &Mmu, chain: &Chain, sector: u64, room: u64) -> Result<(u32, u64), Refusal> {
        let count = self.sectors_of(sector, room)?;
        self.buffer.resize(room as usize, 0);
        let read = self.disk.read(sector, &mut self.buffer);
        self.check(read)?;
        scatter(mmu, &chain.write, &self.buffer)?;
        Ok((room as u32, count))
    }

    fn write(&mut self, mmu: &Mmu, chain: &Chain, sector: u64, given: u64) -> Result<(u32, u64), Refusal> {
        let count = self.sectors_of(sector, given)?;
        if self.disk.is_read_only() {
            return Err(Refusal::Error);
        }
        self.take(mmu, chain, given)?;
        let written = self.disk.write(sector, &self.buffer).and_then(|()| self.through());
        self.check(written)?;
        Ok((0, count))
    }

    /// The data that the driver gives.
    fn take(&mut self, mmu: &Mmu, chain: &Chain, given: u64) -> Result<(), Refusal> {
        self.buffer.resize(given as usize, 0);
        Ok(gather(mmu, &chain.read, HEADER_BYTES as u64, &mut self.buffer)?)
    }

    /// Where the driver does not flush, every write is one.
    fn through(&self) -> io::Result<()> {
        if self.write_through { self.disk.sync() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(u32, u64), Refusal> {
        let synced = self.disk.sync();
        self.check(synced)?;
        Ok((0, 0))
    }

    fn get_id(&mut self, mmu: &Mmu, chain: &Chain, room: u64) -> Result<(u32, u64), Refusal> {
        let mut id = [0; ID_BYTES];
        id[..self.disk.id().len()].copy_from_slice(self.disk.id().as_bytes());
        let count = ID_BYTES.min(room as usize);
        scatter(mmu, &chain.write, &id[..count])?;
        Ok((count as u32, 0))
    }

    /// Discard and write-zeroes: all ranges are looked at before anything is done.
    fn ranges(&mut self, mmu: &Mmu, chain: &Chain, kind: u32, given: u64) -> Result<(u32, u64), Refusal> {
        let sane = given != 0
            && given.is_multiple_of(RANGE_BYTES as u64)
            && given <= u64::from(RANGES_MAX) * RANGE_BYTES as u64
            && !self.disk.is_read_only();
        if !sane {
            return Err(Refusal::Error);
        }
        self.take(mmu, chain, given)?;
        let ranges: Vec<Range> = self.buffer.chunks_exact(RANGE_BYTES).map(Range::of).collect();
        let allowed = if kind == WRITE_ZEROES { UNMAP } else { 0 };
        if ranges.iter().any(|range| range.flags & !allowed != 0) {
            return Err(Refusal::Unsupported);
        }
        let here = |range: &Range| {
            range.count <= RANGE_SECTORS_MAX && self.disk.has(range.sector, range.count.into())
        };
        if !ranges.iter().all(here) {
            return Err(Refusal::Error);
        }
        let mut done = Ok(());
        for Range { sector, count, flags } in &ranges {
            done = done.and_then(|()| match kind {
                DISCARD => self.disk.discard(*sector, (*count).into()),
                _ => self.disk.write_zeroes(*sector, (*count).into(), flags & UNMAP != 0),
            });
        }
        let done = done.and_then(|()| self.through());
        self.check(done)?;
        Ok((0, ranges.iter().map(|range| u64::from(range.count)).sum()))
    }

    /// An error of the disk is said once, and is the request's.
    fn check(&mut self, done: io::Result<()>) -> Result<(), Refusal> {
        done.map_err(|error| {
            if !std::mem::replace(&mut self.warned, true) {
                log::warn!(
                    "disk '{}': {error}; the guest's request has failed. Said once, whatever follows",
                    self.disk.id()
                );
            }
            Refusal::Error
        })
    }

    fn count(&self, kind: u32) -> &Count {
        let c = &self.counters;
        match kind {
            IN => &c.read,
            OUT => &c.write,
            FLUSH => &c.flush,
            DISCARD => &c.discard,
            WRITE_ZEROES => &c.write_zeroes,
            _ => &c.other,
        }
    }
}

/// Sectors to discard or to zero.
struct Range {
    sector: u64,
    count: u32,
    flags: u32,
}

impl Range {
    fn of(bytes: &[u8]) -> Range {
        Range { sector: word64(bytes, 0), count: word32(bytes, 8), flags: word32(bytes, 12) }
    }
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    little_endian(&bytes[at..at + 4]) as u32
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    little_endian(&bytes[at..at + 8])
}

impl Device for Blk {
    fn spec(&self) -> VirtioSpec {
        let mut config = [0; CONFIG_BYTES_MAX];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors().to_le_bytes());
        put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
        let mut features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        if self.disk.is_read_only() {
            features |= F_RO;
        } else {
            features |= F_DISCARD | F_WRITE_ZEROES;
            // Discard: sectors, ranges, alignment in sectors. Zeroes: sectors, ranges, may unmap.
            let words = [RANGE_SECTORS_MAX, RANGES_MAX, 1, RANGE_SECTORS_MAX, RANGES_MAX, 1];
            words.iter().enumerate().for_each(|(n, word)| put(36 + 4 * n, &word.to_le_bytes()));
        }
        VirtioSpec {
            device_id: DEVICE_ID,
            features,
            queue_sizes: [QUEUE_SIZE, 0, 0, 0],
            config,
            config_bytes: 60,
            config_writable: (0, 0),
        }
    }

    fn header_bytes(&self) -> usize {
        HEADER_BYTES
    }

    fn is_prompt(&self) -> bool {
        self.disk.is_prompt()
    }

    fn begin_round(&mut self, snapshot: &VirtioSnapshot) {
        self.write_through = snapshot.features & F_FLUSH == 0;
    }

    fn serve(&mut self, mmu: &Mmu, _queue: usize, chain: &Chain) -> Result<Served, Shortage> {
        let header = chain.header.filter(|_| chain.whole && chain.status_at().is_some());
        let kind = header.map_or(u32::MAX, |header| word32(&header, 0));
        let served = match header {
            Some(header) => self.request(mmu, chain, kind, word64(&header, 8)),
            None => Err(Refusal::Error),
        };
        let count = self.count(kind);
        count.requests.fetch_add(1, Ordering::Relaxed);
        let (status, written) = match served {
            Ok((written, sectors)) => {
                count.sectors.fetch_add(sectors, Ordering::Relaxed);
                (OK, written)
            }
            Err(Refusal::Short(short)) => return Err(short),
            Err(refusal) => {
                count.errors.fetch_add(1, Ordering::Relaxed);
                (if matches!(refusal, Refusal::Unsupported) { UNSUPP } else { IOERR }, 0)
            }
        };
        let length = if chain.status_at().is_some() { written + 1 } else { 0 };
        Ok(Served::Done { status: Some(status), length })
    }
}
