//! Segments: a file in memory each, which holds the pages of one range of guest memory that importers have, and nothing else.
//!
//! Story: a segment's file lies behind the machine pool, where its pages have their homes (`umbra_mmu::external`); on kvm it has a
//! memory slot of its own. It cannot change its size, so that nobody who has a descriptor can take memory from under us. Readers get
//! a descriptor of their own, opened for reading.
//!
//! Holds: INV-SEG-1, a segment's file and slot are there before its number is told, and until none of its homes has a page. INV-SEG-2, an
//! importer that is slow to leave a segment keeps nobody from another.
//!
//! Locks: one, held while a segment is made, and not while its pages leave it; never by the event loop. In it a leaf, who has gone.
//!
//! Limits: [`SEGMENTS_MAX`] segments. Whoever has the descriptor of a segment to write may write all of it, and take pages out of it:
//! the guest then reads zeros there. The same user may open a descriptor again to write, by /proc, once it has changed the file's
//! mode; against that, nothing helps that leaves us the fence.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::SealFlags;
use umbra_mmu::external::{ImporterId, NoSegment, NotClosed, SegmentId};
use umbra_mmu::{Gfn, Mfn, Mmu, PAGE_SIZE};

use crate::kvm::{KvmError, KvmVm};
use crate::machine::{Pool, PoolError, memory_file};

/// The most segments at once.
pub const SEGMENTS_MAX: usize = 64;

/// Whoever waits for a segment to go looks at least so often whether there is still a reason: the event loop says so with no lock
/// held, which may be missed.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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
    NotClosed(#[from] NotClosed),
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
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Whoever asks for it has access.
    Open,
    /// Somebody removes it.
    Closing,
    /// It could not be removed: nobody has access.
    Stuck,
    /// The same, and whoever has made it has gone.
    Orphaned,
}

/// All segments of a guest.
#[derive(Debug)]
pub struct Segments {
    mmu: Arc<Mmu>,
    pool: Arc<Pool>,
    /// Where vCPUs are KVM's.
    vm: Option<Arc<KvmVm>>,
    list: Mutex<Vec<Segment>>,
    /// What those sleep on who wait for a segment to go.
    changed: Condvar,
    /// Importers that have gone, and whose segments are still to.
    gone: Mutex<BTreeSet<ImporterId>>,
    /// The run ends: segments stay as they are.
    retired: AtomicBool,
}

impl Segments {
    /// None yet.
    pub fn new(mmu: Arc<Mmu>, pool: Arc<Pool>, vm: Option<Arc<KvmVm>>) -> Segments {
        Segments {
            mmu,
            pool,
            vm,
            list: Mutex::default(),
            changed: Condvar::new(),
            gone: Mutex::default(),
            retired: AtomicBool::new(false),
        }
    }

    /// The run ends: no segment is removed any more because its importer has gone.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// This importer has gone, and [`Segments::remove_all_of`] is to follow. Waits for nobody.
    pub fn leave(&self, owner: ImporterId) {
        self.gone().insert(owner);
    }

    /// Makes a segment, which is `owner`'s and goes with it. Waits for others that are about to go to make room. May sleep.
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
        self.remove_orphans();
        let mut list = self.list();
        let id = loop {
            if list.len() >= SEGMENTS_MAX {
                return Err(SegmentError::Limit);
            }
            match self.mmu.make_segment(first, pages, writable) {
                Err(NoSegment::Overlaps { other, .. })
                    if self.is_going(&list, other) && self.is_here(owner) =>
                {
                    let waited = self.changed.wait_timeout(list, LOOK_AGAIN);
                    list = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                made => break made?,
            }
        };
        let slot = (0..).find(|slot| list.iter().all(|segment| segment.slot != *slot)).unwrap_or_default();
        match self.back(first, pages, slot) {
            Ok(file) => {
                let segment = Segment {
                    id,
                    first,
                    pages,
                    writable,
                    owner,
                    file: Arc::new(file),
                    slot,
                    stage: Stage::Open,
                };
                list.push(segment.clone());
                Ok(segment)
            }
            Err(error) => {
                self.mmu.forget_segment(id);
                Err(error)
            }
        }
    }

    /// It has not gone. Who has waits for nobody: two might else wait for each other.
    fn is_here(&self, importer: ImporterId) -> bool {
        !self.gone().contains(&importer) && !self.retired.load(Ordering::Acquire)
    }

    /// Somebody is about to remove it.
    fn is_going(&self, list: &[Segment], id: SegmentId) -> bool {
        let segment = list.iter().find(|segment| segment.id == id);
        let is_going = |segment: &Segment| match segment.stage {
            Stage::Closing => true,
            Stage::Open | Stage::Stuck => self.gone().contains(&segment.owner),
            Stage::Orphaned => false,
        };
        segment.is_some_and(is_going)
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

    /// Removes a segment of `owner`'s. Every importer loses it. May sleep.
    ///
    /// # Errors
    ///
    /// When it is not its, or a page of it cannot leave it now: it stays, nobody has access any more, and the call can be made again.
    pub fn remove(&self, owner: ImporterId, id: u32) -> Result<(), SegmentError> {
        let own = |segment: &Segment| segment.id.0 == id && segment.owner == owner;
        self.remove_first(Stage::Stuck, own).unwrap_or(Err(SegmentError::NotOwn(id)))
    }

    /// Removes the first segment that nobody removes yet and that is `such`; `None` if there is none. Where it cannot be removed,
    /// this is its stage then.
    fn remove_first(
        &self,
        failed: Stage,
        such: impl Fn(&Segment) -> bool,
    ) -> Option<Result<(), SegmentError>> {
        let mut list = self.list();
        let segment = list.iter_mut().find(|segment| segment.stage != Stage::Closing && such(segment))?;
        segment.stage = Stage::Closing;
        let (id, first, pages, slot) = (segment.id, segment.first, segment.pages, segment.slot);
        drop(list);
        let closed = self.mmu.close_segment(id).map_err(SegmentError::from);
        let mut list = self.list();
        let removed = closed.and_then(|()| self.unback(first, pages, slot));
        match &removed {
            Ok(()) => {
                self.mmu.forget_segment(id);
                list.retain(|segment| segment.id != id);
            }
            Err(_) => {
                let stays = list.iter_mut().find(|segment| segment.id == id);
                stays.into_iter().for_each(|segment| segment.stage = failed);
            }
        }
        self.changed.notify_all();
        Some(removed)
    }

    /// Takes the file away from where the homes of these pages are, none of which has a page.
    fn unback(&self, first: Gfn, pages: u32, slot: u32) -> Result<(), SegmentError> {
        let home = self.home(first)?;
        if let Some(vm) = &self.vm {
            vm.set_homes_slot(slot, home, 0)?;
        }
        Ok(self.pool.show_homes(home, pages, None)?)
    }

    /// Removes all segments of an importer that has gone. One that cannot be removed now is when another is made. May sleep.
    pub fn remove_all_of(&self, owner: ImporterId) {
        if self.retired.load(Ordering::Acquire) {
            return;
        }
        let own = |segment: &Segment| segment.owner == owner && segment.stage != Stage::Orphaned;
        while let Some(removed) = self.remove_first(Stage::Orphaned, own) {
            if let Err(error) = removed {
                log::warn!("a segment stays though its importer has gone, until another is made: {error}");
            }
        }
        self.gone().remove(&owner);
    }

    /// Tries again to remove what nobody owns.
    fn remove_orphans(&self) {
        let orphans: Vec<SegmentId> =
            self.list().iter().filter(|one| one.stage == Stage::Orphaned).map(|one| one.id).collect();
        for id in orphans {
            self.remove_first(Stage::Orphaned, |one| one.id == id && one.stage == Stage::Orphaned);
        }
    }

    /// A segment by its number, if it can be had.
    pub fn find(&self, id: u32) -> Option<Segment> {
        self.list().iter().find(|one| one.id.0 == id && one.stage == Stage::Open).cloned()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.list().len()
    }

    fn gone(&self) -> MutexGuard<'_, BTreeSet<ImporterId>> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
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

    use umbra_mmu::window::Intent;
    use umbra_mmu::{Config, Machine, NoVcpus};

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
            stage: Stage::Open,
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

    /// A device has a page of a segment whose owner has gone: it stays, and goes when the device is done.
    #[test]
    fn a_segment_that_cannot_go_with_its_owner_goes_when_the_next_is_made() {
        const PAGES: u32 = 64;
        let pool = Arc::new(Pool::with_homes(256, PAGES.into()).expect("memory"));
        let config = Config {
            low_pages: 4,
            shadow_pages_max: 64,
            roots_max: 4,
            homes: true,
            ..Config::of_pages(PAGES)
        };
        let mmu = Arc::new(Mmu::new(Machine::new(pool.region()), config, Box::new(NoVcpus)));
        let segments = Segments::new(Arc::clone(&mmu), pool, None);
        let (gone, next) = (ImporterId(1), ImporterId(2));
        let segment = segments.make(gone, Gfn(8), 4, false).expect("it is memory");
        mmu.import_page(gone, segment.id, Gfn(8), false).expect("there are frames");
        let pinned = mmu.try_take_page(Gfn(8), Intent::Write).expect("it is at home").pass_on();
        segments.remove_all_of(gone);
        assert_eq!(segments.count(), 1, "its page cannot leave it");
        assert!(segments.find(segment.id.0).is_none(), "nobody has access any more");
        assert!(matches!(segments.remove(next, segment.id.0), Err(SegmentError::NotOwn(_))));
        drop(pinned);
        let made = segments.make(next, Gfn(8), 4, false).expect("the other has gone");
        assert_eq!((segments.count(), mmu.audit()), (1, Vec::new()));
        assert!(segments.remove(next, made.id.0).is_ok() && segments.count() == 0);
    }
}
