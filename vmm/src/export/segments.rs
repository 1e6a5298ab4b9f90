//! Segments: a file in memory each, which holds the pages of one range of guest memory that importers have, and nothing else.
//!
//! Story: a segment's file lies behind the machine pool, where its pages have their homes (`umbra_mmu::external`); on kvm it has a
//! memory slot of its own. It cannot change its size, so that nobody who has a descriptor can take memory from under us. Readers get
//! a descriptor of their own, opened for reading.
//!
//! Holds: INV-SEG-1, a segment's file and slot are there before its number is told, and until none of its homes has a page.
//!
//! Locks: one, held while a segment is made or removed, which may sleep; never by the event loop.
//!
//! Limits: [`SEGMENTS_MAX`] segments. Whoever has the descriptor of a segment to write may write all of it, and take pages out of it:
//! the guest then reads zeros there. The same user may open a descriptor again to write, by /proc, once it has changed the file's
//! mode; against that, nothing helps that leaves us the fence.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::SealFlags;
use umbra_mmu::external::{ImporterId, NoSegment, SegmentId};
use umbra_mmu::{Gfn, Mfn, Mmu, PAGE_SIZE, Shortage};

use crate::kvm::{KvmError, KvmVm};
use crate::machine::{Pool, PoolError, memory_file};

/// The most segments at once.
pub const SEGMENTS_MAX: usize = 64;

/// Why there is no segment, or it cannot be removed.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// Too many.
    #[error("there are {SEGMENTS_MAX} segments, the most at once; remove one")]
    Limit,
    /// It cannot be.
    #[error(transparent)]
    None(#[from] NoSegment),
    /// There is none of this number, or it is not the asker's.
    #[error("there is no segment {0} of this importer")]
    NotOwn(u32),
    /// The host refuses.
    #[error("the host gives no memory file for a segment of {pages} pages: {source}")]
    File {
        /// How many.
        pages: u32,
        /// What the host said.
        source: io::Error,
    },
    /// The host refuses.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The host refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its pages cannot be moved away.
    #[error(transparent)]
    Short(#[from] Shortage),
}

/// A segment, for those who have access to it.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its number.
    pub id: SegmentId,
    /// Its first page.
    pub first: Gfn,
    /// How many.
    pub pages: u32,
    /// Importers may write to it.
    pub writable: bool,
    owner: ImporterId,
    file: Arc<File>,
    /// Its memory slot's number among those of segments.
    slot: u32,
}

/// All segments of a guest.
#[derive(Debug)]
pub struct Segments {
    mmu: Arc<Mmu>,
    pool: Arc<Pool>,
    /// Where vCPUs are KVM's.
    vm: Option<Arc<KvmVm>>,
    list: Mutex<Vec<Segment>>,
    /// The run ends: segments stay as they are.
    retired: AtomicBool,
}

impl Segments {
    /// None yet.
    pub fn new(mmu: Arc<Mmu>, pool: Arc<Pool>, vm: Option<Arc<KvmVm>>) -> Segments {
        Segments { mmu, pool, vm, list: Mutex::default(), retired: AtomicBool::new(false) }
    }

    /// The run ends: no segment is removed any more because its importer has gone.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Makes a segment, which is `owner`'s and goes with it.
    ///
    /// # Errors
    ///
    /// When the range is not all memory or another's, or the host refuses.
    pub fn make(
        &self,
        owner: ImporterId,
        first: Gfn,
        pages: u32,
        writable: bool,
    ) -> Result<Segment, SegmentError> {
        let mut list = self.list();
        if list.len() >= SEGMENTS_MAX {
            return Err(SegmentError::Limit);
        }
        let slot = (0..).find(|slot| list.iter().all(|segment| segment.slot != *slot)).unwrap_or_default();
        let id = self.mmu.make_segment(first, pages, writable)?;
        match self.back(first, pages, slot) {
            Ok(file) => {
                let segment = Segment { id, first, pages, writable, owner, file: Arc::new(file), slot };
                list.push(segment.clone());
                Ok(segment)
            }
            Err(error) => {
                self.mmu.forget_segment(id);
                Err(error)
            }
        }
    }

    /// Puts a file where the homes of these pages are.
    fn back(&self, first: Gfn, pages: u32, slot: u32) -> Result<File, SegmentError> {
        let home = self.home(first)?;
        let file = segment_file(pages).map_err(|source| SegmentError::File { pages, source })?;
        let shared = Arc::new(file.try_clone().map_err(|source| SegmentError::File { pages, source })?);
        self.pool.show_homes(home, pages, Some(&shared))?;
        if let Some(vm) = &self.vm
            && let Err(error) = vm.set_homes_slot(slot, home, pages)
        {
            self.pool.show_homes(home, pages, None)?;
            return Err(error.into());
        }
        Ok(file)
    }

    fn home(&self, first: Gfn) -> Result<Mfn, SegmentError> {
        Ok(self.mmu.homes_of(first).ok_or(NoSegment::Closed)?)
    }

    /// Removes a segment of `owner`'s. Every importer loses it.
    ///
    /// # Errors
    ///
    /// When it is not its, or there is no frame for a page of it: it stays, and nobody has access any more.
    pub fn remove(&self, owner: ImporterId, id: u32) -> Result<(), SegmentError> {
        let mut list = self.list();
        let own = |segment: &Segment| segment.id.0 == id && segment.owner == owner;
        let at = list.iter().position(own).ok_or(SegmentError::NotOwn(id))?;
        let Segment { id, first, pages, slot, .. } = list[at];
        self.mmu.close_segment(id)?;
        let home = self.home(first)?;
        if let Some(vm) = &self.vm {
            vm.set_homes_slot(slot, home, 0)?;
        }
        self.pool.show_homes(home, pages, None)?;
        self.mmu.forget_segment(id);
        list.remove(at);
        Ok(())
    }

    /// Removes all segments of an importer that has gone.
    pub fn remove_all_of(&self, owner: ImporterId) {
        if self.retired.load(Ordering::Acquire) {
            return;
        }
        let own: Vec<u32> =
            self.list().iter().filter(|segment| segment.owner == owner).map(|segment| segment.id.0).collect();
        for id in own {
            if let Err(error) = self.remove(owner, id) {
                log::warn!("segment {id} stays, though its importer has gone: {error}");
            }
        }
    }

    /// A segment by its number.
    pub fn find(&self, id: u32) -> Option<Segment> {
        self.list().iter().find(|segment| segment.id.0 == id).cloned()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.list().len()
    }

    fn list(&self) -> MutexGuard<'_, Vec<Segment>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Segment {
    /// A descriptor of its memory, to be read or written too.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn descriptor(&self, write: bool) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        // Opened anew: a duplicate would share its right to write.
        let mut options = OpenOptions::new();
        Ok(match write {
            true => self.file.try_clone()?.into(),
            false => options.read(true).open(path)?.into(),
        })
    }

    /// Is a range of guest frames of it?
    pub fn has(&self, first: u32, pages: u32) -> bool {
        let end = first.checked_add(pages);
        pages > 0 && first >= self.first.0 && end.is_some_and(|end| end <= self.first.0 + self.pages)
    }
}

/// A file of zeros that cannot change its size, and that others may at most read.
fn segment_file(pages: u32) -> io::Result<File> {
    let file = memory_file(c"umbra-segment", u64::from(pages) * PAGE_SIZE)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    file.set_permissions(Permissions::from_mode(0o400))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_segments_file_keeps_its_size_and_is_read_by_readers() {
        let file = segment_file(4).expect("a file");
        assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
        let segment = Segment {
            id: SegmentId(1),
            first: Gfn(8),
            pages: 4,
            writable: true,
            owner: ImporterId(1),
            file: Arc::new(file),
            slot: 0,
        };
        let reader = File::from(segment.descriptor(false).expect("a descriptor"));
        let writer = File::from(segment.descriptor(true).expect("a descriptor"));
        assert!(reader.write_at(b"x", 0).is_err());
        writer.write_at(b"x", 0).expect("a writer");
        let mut byte = [0];
        reader.read_at(&mut byte, 0).expect("a reader");
        assert_eq!(&byte, b"x");
        let inside =
            [(8, 4, true), (8, 5, false), (7, 1, false), (11, 1, true), (8, 0, false), (9, u32::MAX, false)];
        for (first, pages, has) in inside {
            assert_eq!(segment.has(first, pages), has, "{first} {pages}");
        }
    }
}
