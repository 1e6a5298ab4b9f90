//! The machine pool: the memory that the VMM really has, seen by KVM as one slot at machine address 0.
//!
//! Story: made once at start-up. The firmware takes its first frames, the MMU hands out the rest; KVM reads guest
//! and shadow memory through the same pages. Nobody else maps it, but for views of the VMM's own where windows are mapped.
//!
//! Holds: the mapping is shared and lives as long as any [`Pool`] handle; a frame that was never written costs the
//! host nothing. Every access is bounds-checked, volatile, and atomic where the caller asks for an atomic.
//!
//! Not here: which frame is whose (the MMU).

#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub(crate) mod advise;
#[allow(unsafe_code)]
mod homes;
#[allow(unsafe_code)]
mod mapped;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use umbra_mmu::{Mfn, Mpa, PAGE_SIZE};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use homes::Shows;
use mapped::MappedViews;
pub use mapped::memory_file;

/// Why the pool cannot be made, or an access to it is not possible.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The host does not give the memory.
    #[error(
        "the host does not map {} MiB for the machine pool: {source}; give the guest less memory (--mem) or raise \
         the limit on address space (ulimit -v)",
        frames / 256
    )]
    Map {
        /// Frames that were asked for.
        frames: u64,
        /// What the host said.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The host gives no file in memory.
    #[error("the host gives no file of {} MiB in memory: {source}; give the guest less memory (--mem)", frames / 256)]
    File {
        /// Frames that were asked for.
        frames: u64,
        /// What the host said.
        source: io::Error,
    },
    /// Mapped windows may need more mappings than a process can have.
    #[error(
        "--window mapped may need {needed} mappings, and vm.max_map_count allows {limit}: give fewer --shadow-pages, or \
         raise it"
    )]
    Mappings {
        /// As many as there may be.
        needed: u64,
        /// As many as there can be.
        limit: u64,
    },
    /// An access beyond the pool.
    #[error("machine address {address} (length {length}) lies beyond the pool of {frames} frames")]
    Outside {
        /// The first byte.
        address: Mpa,
        /// Bytes.
        length: usize,
        /// Frames in the pool.
        frames: u64,
    },
    /// The host does not map the memory of a segment.
    #[error("mapping {pages} homes of exported pages from machine frame {first} on failed: {source}")]
    Homes {
        /// The first.
        first: Mfn,
        /// How many.
        pages: u32,
        /// What the host said.
        source: io::Error,
    },
    /// The host refuses to drop its translations of a frame, or to take frames back.
    #[error("madvise on machine frame {frame} failed: {source}")]
    Advise {
        /// The frame.
        frame: Mfn,
        /// What the host said.
        source: io::Error,
    },
}

/// The machine pool.
#[derive(Debug)]
pub struct Pool {
    /// What it is a mapping of, in memory.
    file: Arc<File>,
    /// It, and behind it the homes of exported pages, each of them nothing until its segment is there.
    region: Arc<MmapRegion>,
    frames: u64,
    /// What VMM code reaches firmware through: the same, where windows are pinned.
    own: Arc<MmapRegion>,
    views: Option<Arc<MappedViews>>,
}

impl Pool {
    /// A pool of `frames` 4 KiB frames, all zero.
    ///
    /// # Errors
    /// When the host does not map it; 0 frames are an error too.
    pub fn new(frames: u64) -> Result<Pool, PoolError> {
        Pool::with_homes(frames, 0)
    }

    /// The same, with room for so many homes behind it.
    ///
    /// # Errors
    /// The same.
    pub fn with_homes(frames: u64, homes: u64) -> Result<Pool, PoolError> {
        let (file, region) = map(frames, homes)?;
        Ok(Pool { file, own: Arc::clone(&region), region, frames, views: None })
    }

    /// The same, for mapped windows: VMM code can touch the first `firmware` frames, and no other but by a window or, up to
    /// `tables` of them at once, as a table of the shadow.
    ///
    /// # Errors
    /// When the host does not map it, or has not as many mappings.
    pub fn mapped(frames: u64, homes: u64, firmware: u64, tables: u64) -> Result<Pool, PoolError> {
        let (file, region) = map(frames, homes)?;
        let views = Arc::new(MappedViews::new(&file, frames, firmware, tables)?);
        Ok(Pool { file, region, own: views.own(), frames, views: Some(views) })
    }

    /// Has the homes from `first` on show `file`, of `pages` pages, or nothing any more. Nothing is in them.
    ///
    /// # Errors
    /// When they are no homes, or the host refuses.
    pub fn show_homes(&self, first: Mfn, pages: u32, file: Option<&Arc<File>>) -> Result<(), PoolError> {
        let refused = |source| PoolError::Homes { first, pages, source };
        if u64::from(first.0) < self.frames {
            return Err(refused(io::ErrorKind::InvalidInput.into()));
        }
        let (offset, length) = (first.at(0).0 as usize, pages as usize * PAGE_SIZE as usize);
        let shows = file.map_or(Shows::Nothing, |file| Shows::Memory(file, 0));
        homes::show(&self.region, offset, length, shows).map_err(refused)?;
        if let Some(views) = &self.views {
            views.set_homes(first, pages, file);
        }
        Ok(())
    }

    /// Bytes of it that the host has memory for, or swap, as the host counts them.
    ///
    /// # Errors
    /// What the host says.
    pub fn backed_bytes(&self) -> io::Result<u64> {
        const BLOCK_BYTES: u64 = 512;
        Ok(self.file.metadata()?.blocks() * BLOCK_BYTES)
    }

    /// The VMM's own views, where windows are mapped.
    pub fn views(&self) -> Option<Arc<MappedViews>> {
        self.views.clone()
    }

    /// The mapping itself, for the mmu crate: as the hardware sees it.
    pub fn region(&self) -> Arc<MmapRegion> {
        Arc::clone(&self.region)
    }

    /// Frames in the pool.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Bytes in the pool.
    pub fn bytes(&self) -> u64 {
        self.frames * PAGE_SIZE
    }

    /// Bytes of the pool and of the homes behind it.
    pub fn bytes_with_homes(&self) -> u64 {
        self.region.size() as u64
    }

    /// The whole pool, homes too where windows are pinned, as VMM code may touch it; its offsets are machine addresses.
    pub fn slice(&self) -> VolatileSlice<'_> {
        self.own.as_volatile_slice()
    }

    /// As the host counts it, and KVM sees it.
    fn pages(&self, first: Mfn, count: u32) -> Result<VolatileSlice<'_>, PoolError> {
        let (address, length) = (first.at(0), count as usize * PAGE_SIZE as usize);
        self.region
            .as_volatile_slice()
            .subslice(address.0 as usize, length)
            .map_err(|_| self.outside(address, length))
    }

    /// The host's address of machine address 0: what a KVM memory slot is told.
    pub fn host_address(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    /// Copies `bytes` to `address`.
    ///
    /// # Errors
    /// When they do not fit the pool.
    pub fn write(&self, address: Mpa, bytes: &[u8]) -> Result<(), PoolError> {
        self.slice().write_slice(bytes, address.0 as usize).map_err(|_| self.outside(address, bytes.len()))
    }

    /// Fills `bytes` from `address`.
    ///
    /// # Errors
    /// When they do not lie in the pool.
    pub fn read(&self, address: Mpa, bytes: &mut [u8]) -> Result<(), PoolError> {
        let length = bytes.len();
        self.slice().read_slice(bytes, address.0 as usize).map_err(|_| self.outside(address, length))
    }

    /// Reads the aligned quadword at `address`, in one piece.
    ///
    /// # Errors
    /// When it is not aligned or does not lie in the pool.
    pub fn load(&self, address: Mpa) -> Result<u64, PoolError> {
        self.quadword(address).map(|word| u64::from_le(word.load(Ordering::SeqCst)))
    }

    /// Writes the aligned quadword at `address`, in one piece.
    ///
    /// # Errors
    /// When it is not aligned or does not lie in the pool.
    pub fn store(&self, address: Mpa, value: u64) -> Result<(), PoolError> {
        self.quadword(address).map(|word| word.store(value.to_le(), Ordering::SeqCst))
    }

    /// Makes the host drop every translation of `frame`, its contents kept: KVM is told by its own MMU notifier, and
    /// every vCPU has flushed what it had of the frame before this returns. The next touch maps it again.
    ///
    /// # Errors
    /// When the frame lies beyond the pool or the host refuses.
    pub fn drop_translations(&self, frame: Mfn) -> Result<(), PoolError> {
        advise::drop_translations(&self.pages(frame, 1)?)
            .map_err(|source| PoolError::Advise { frame, source })
    }

    /// Gives the memory of `count` frames from `first` on back to the host: they read as zeros from now on. KVM is told by
    /// its own MMU notifier.
    ///
    /// # Errors
    /// When the frames lie beyond the pool or the host refuses.
    pub fn give_back(&self, first: Mfn, count: u32) -> Result<(), PoolError> {
        advise::give_back(&self.pages(first, count)?)
            .map_err(|source| PoolError::Advise { frame: first, source })
    }

    fn quadword(&self, address: Mpa) -> Result<&AtomicU64, PoolError> {
        self.own.get_atomic_ref(address.0 as usize).map_err(|_| self.outside(address, 8))
    }

    fn outside(&self, address: Mpa, length: usize) -> PoolError {
        PoolError::Outside { address, length, frames: self.frames() }
    }
}

/// A file in memory of `frames` frames, and a mapping of it, with room for homes behind.
fn map(frames: u64, homes: u64) -> Result<(Arc<File>, Arc<MmapRegion>), PoolError> {
    let bytes = frames.saturating_mul(PAGE_SIZE);
    let file = memory_file(c"umbra-pool", bytes).map_err(|source| PoolError::File { frames, source })?;
    let file = Arc::new(file);
    if homes > 0 && frames > 0 {
        let all =
            usize::try_from(bytes.saturating_add(homes.saturating_mul(PAGE_SIZE))).unwrap_or(usize::MAX);
        let region = homes::reserve(all).map_err(|source| PoolError::Map { frames, source })?;
        let shown = homes::show(&region, 0, bytes as usize, Shows::Memory(&file, 0));
        shown.map_err(|source| PoolError::File { frames, source })?;
        return Ok((file, Arc::new(region)));
    }
    let region = MmapRegionBuilder::new(usize::try_from(bytes).unwrap_or(usize::MAX))
        .with_file_offset(FileOffset::from_arc(Arc::clone(&file), 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(|source| PoolError::Map { frames, source })?;
    Ok((file, Arc::new(region)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_is_zero_and_keeps_what_is_written() {
        let pool = Pool::new(4).unwrap();
        assert_eq!((pool.frames(), pool.load(Mpa(8)).unwrap()), (4, 0));
        pool.write(Mpa(0x1ffc), &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert_eq!(pool.load(Mpa(0x2000)).unwrap(), 0x0807_0605);
    }

    #[test]
    fn access_beyond_the_pool_is_an_error() {
        let pool = Pool::new(1).unwrap();
        assert!(matches!(pool.load(Mpa(0x1000)), Err(PoolError::Outside { length: 8, frames: 1, .. })));
        assert!(matches!(pool.write(Mpa(0xfff), &[0, 0]), Err(PoolError::Outside { .. })));
        assert!(matches!(pool.read(Mpa(u64::MAX), &mut [0]), Err(PoolError::Outside { .. })));
        assert!(matches!(pool.drop_translations(Mfn(1)), Err(PoolError::Outside { .. })));
        assert!(pool.load(Mpa(1)).is_err(), "unaligned");
    }

    #[test]
    fn pool_that_cannot_be_is_an_error_with_a_remedy() {
        for frames in [0, 1 << 50, u64::MAX] {
            assert!(Pool::new(frames).unwrap_err().to_string().contains("--mem"), "{frames}");
        }
    }

    #[test]
    fn frames_given_back_are_zero_and_cost_nothing_and_their_neighbours_stay() {
        let resident = |pool: &Pool| {
            let statm = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
            let start = format!("{:x}-", pool.host_address());
            let mut lines = statm.lines().skip_while(|line| !line.starts_with(&start));
            let rss = lines.find(|line| line.starts_with("Rss:")).expect("the pool's mapping");
            rss.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("a number")
        };
        let pool = Pool::new(16).unwrap();
        (0..16).for_each(|n| pool.store(Mfn(n).at(8), u64::from(n) + 1).unwrap());
        assert_eq!((resident(&pool), pool.backed_bytes().expect("a number")), (64, 64 << 10));
        pool.give_back(Mfn(2), 10).unwrap();
        assert_eq!((resident(&pool), pool.backed_bytes().expect("a number")), (24, 24 << 10));
        for n in 0..16 {
            let kept = if (2..12).contains(&n) { 0 } else { u64::from(n) + 1 };
            assert_eq!(pool.load(Mfn(n).at(8)).unwrap(), kept, "frame {n}");
        }
        assert!(pool.give_back(Mfn(10), 7).is_err());
    }

    #[test]
    fn dropped_translations_keep_the_contents() {
        let pool = Pool::new(2).unwrap();
        pool.store(Mpa(0x1000), 0x1234).unwrap();
        pool.drop_translations(Mfn(1)).unwrap();
        assert_eq!(pool.load(Mpa(0x1000)).unwrap(), 0x1234);
    }
}
