//! An importer's own address space: pages of a segment, which are touched while they are granted.
//!
//! Story: an attachment's part of the segment's file is mapped as a whole, once; the host gives each page a translation when it is
//! touched. A page may be touched from its grant on, unless it has been taken away again by a message that came before the grant did:
//! each says when, by the exporter's clock. Its translation is dropped before it is said that it has been given up. That is all: a
//! mapping of each page's own would cost several times as much to take away, and the host has few.
//!
//! Holds: INV-IMPORT-1, a page is touched only while it is granted, and nothing of ours touches it from before that is said. The host
//! may translate it all the same, since it looks around a page that is touched; the exporter's fence ends that. Nothing here
//! crashes by a page that the host has taken away: it reads as zeros.
//!
//! Locks: one for each area, held for a copy of a page or a change of its rights.

use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use umbra_mmu::PAGE_SIZE;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::machine::advise::drop_translations;

/// Bytes of a page.
pub const PAGE: usize = PAGE_SIZE as usize;

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    granted: Option<Rights>,
    /// When it was last granted and when it was last taken away, by the exporter's clock.
    order: u64,
    taken: u64,
}

/// What a page is granted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// To be read.
    Read,
    /// To be written too.
    Write,
}

/// A page was granted at this time of the exporter's clock, and had not been taken away when it was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted(u64);

/// Part of a segment.
#[derive(Debug)]
pub struct Area {
    region: MmapRegion,
    /// Its first guest frame.
    first: u32,
    pages: Mutex<Vec<Page>>,
}

impl Area {
    /// Room for `pages` pages from guest frame `first` on, which is page `offset` of `file`; to be written too if it is `writable`.
    ///
    /// # Errors
    ///
    /// When the host has no room, or the file has not so many pages or those rights.
    pub fn new(file: File, first: u32, offset: u32, pages: u32, writable: bool) -> io::Result<Area> {
        let at = FileOffset::new(file, u64::from(offset) * PAGE_SIZE);
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let region = MmapRegionBuilder::new(pages as usize * PAGE)
            .with_mmap_prot(protection)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(at)
            .build()
            .map_err(io::Error::other)?;
        Ok(Area { region, first, pages: Mutex::new(vec![Page::default(); pages as usize]) })
    }

    /// Pages were granted at `order`; those that have been taken away since are not.
    pub fn grant(&self, first: u32, count: u32, rights: Rights, order: u64) {
        let mut pages = self.pages();
        for index in (first..first.saturating_add(count)).filter_map(|frame| self.index(frame)) {
            let page = &mut pages[index];
            if page.taken <= order {
                page.granted = if page.granted == Some(Rights::Write) { page.granted } else { Some(rights) };
                page.order = order;
            }
        }
    }

    /// Those of `frames` that are here were taken away at `order`; says how many had been granted.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn take_away(&self, frames: &[u32], order: u64) -> io::Result<u32> {
        let mut pages = self.pages();
        let mut count = 0;
        for index in frames.iter().filter_map(|frame| self.index(*frame)) {
            let page = &mut pages[index];
            page.taken = page.taken.max(order);
            if page.granted.take().is_some() {
                let there = self.region.get_slice(index * PAGE, PAGE).map_err(io::Error::other)?;
                drop_translations(&there)?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// No page is granted any more, nor will be.
    pub fn close(&self) -> io::Result<()> {
        self.pages().fill(Page { granted: None, order: 0, taken: u64::MAX });
        drop_translations(&self.region.as_volatile_slice())
    }

    /// Copies out of a page if it is granted: since when.
    pub fn read(&self, frame: u32, offset: usize, bytes: &mut [u8]) -> Option<Granted> {
        let pages = self.pages();
        let (index, granted) = self.granted_at(&pages, frame, Rights::Read)?;
        let page = self.region.as_volatile_slice();
        let fits = offset.checked_add(bytes.len()).is_some_and(|end| end <= PAGE);
        (fits && page.read_slice(bytes, index * PAGE + offset).is_ok()).then_some(granted)
    }

    /// Copies into a page if it is granted to be written: since when.
    pub fn write(&self, frame: u32, offset: usize, bytes: &[u8]) -> Option<Granted> {
        let pages = self.pages();
        let (index, granted) = self.granted_at(&pages, frame, Rights::Write)?;
        let page = self.region.as_volatile_slice();
        let fits = offset.checked_add(bytes.len()).is_some_and(|end| end <= PAGE);
        (fits && page.write_slice(bytes, index * PAGE + offset).is_ok()).then_some(granted)
    }

    /// Whether the page has not been taken away since then.
    pub fn stands(&self, frame: u32, granted: Granted) -> bool {
        let pages = self.pages();
        self.granted_at(&pages, frame, Rights::Read).is_some_and(|(_, now)| now == granted)
    }

    fn granted_at(&self, pages: &[Page], frame: u32, rights: Rights) -> Option<(usize, Granted)> {
        let index = self.index(frame)?;
        let page = &pages[index];
        let granted = page.granted.is_some_and(|has| has == rights || has == Rights::Write);
        granted.then_some((index, Granted(page.order)))
    }

    /// Pages granted now.
    pub fn granted(&self) -> usize {
        self.pages().iter().filter(|page| page.granted.is_some()).count()
    }

    fn index(&self, frame: u32) -> Option<usize> {
        let index = frame.checked_sub(self.first)? as usize;
        (index < self.region.size() / PAGE).then_some(index)
    }

    fn pages(&self) -> MutexGuard<'_, Vec<Page>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::machine::memory_file;

    fn area() -> (Area, File) {
        let file = memory_file(c"test", 8 * PAGE_SIZE).expect("a file");
        file.write_at(b"five", 5 * PAGE_SIZE).expect("memory");
        (Area::new(file.try_clone().expect("a file"), 102, 2, 4, true).expect("room"), file)
    }

    #[test]
    fn a_granted_page_is_its_segments_and_one_taken_away_is_nothing() {
        let (area, _file) = area();
        let mut bytes = [0; 4];
        assert_eq!(area.read(105, 0, &mut bytes), None);
        area.grant(105, 1, Rights::Read, 10);
        assert_eq!((area.read(105, 0, &mut bytes), &bytes), (Some(Granted(10)), b"five"));
        assert_eq!(area.write(105, 0, b"six "), None, "it was granted to be read");
        assert_eq!(area.take_away(&[1, 105, 106, 999], 11).ok(), Some(1));
        assert_eq!(area.read(105, 0, &mut bytes), None);
        assert_eq!(area.granted(), 0);
    }

    #[test]
    fn a_grant_that_was_overtaken_is_void() {
        let (area, file) = area();
        area.take_away(&[105], 11).expect("nothing is mapped");
        area.grant(104, 2, Rights::Write, 10);
        let read = |frame| area.read(frame, 0, &mut [0; 4]);
        assert_eq!((read(105), read(104)), (None, Some(Granted(10))));
        area.grant(105, 1, Rights::Write, 12);
        let write = |offset| area.write(105, offset, b"last");
        assert_eq!((write(PAGE - 4), write(PAGE - 3), write(usize::MAX)), (Some(Granted(12)), None, None));
        let mut bytes = [0; 4];
        file.read_at(&mut bytes, 6 * PAGE_SIZE - 4).expect("memory");
        assert_eq!(&bytes, b"last");
    }

    /// Whoever has touched a page learns whether it was still its own then.
    #[test]
    fn a_page_that_was_taken_away_and_granted_again_does_not_stand() {
        let (area, _file) = area();
        area.grant(105, 1, Rights::Write, 10);
        let read = area.read(105, 0, &mut [0; 4]).expect("it is granted");
        assert!(area.stands(105, read) && !area.stands(104, read) && !area.stands(999, read));
        area.take_away(&[105], 11).expect("it is mapped");
        assert!(!area.stands(105, read));
        area.grant(105, 1, Rights::Read, 12);
        assert!(!area.stands(105, read));
    }

    #[test]
    fn a_closed_area_has_no_page_and_gets_none() {
        let (area, _file) = area();
        area.grant(105, 1, Rights::Write, 10);
        area.close().expect("it is mapped");
        area.grant(105, 1, Rights::Write, 1 << 60);
        assert_eq!((area.granted(), area.read(105, 0, &mut [0; 4])), (0, None));
    }
}
