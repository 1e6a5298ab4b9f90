//! An importer's own address space: pages of a segment, mapped one by one as they are granted, and unmapped as they are taken.
//!
//! Story: address space for all of an attachment is reserved, and shows nothing. A page that is granted is mapped there from the
//! segment's file, unless it has been taken away again by a message that came before the grant did: each says when, by the
//! exporter's clock.
//!
//! Holds: INV-IMPORT-1, a page is touched only while it is mapped, and unmapped before that is said. Nothing here crashes by a page
//! that the host has taken away: it reads as zeros.
//!
//! Locks: one for each area, held for a copy of a page or a change of its mappings.

use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use umbra_mmu::PAGE_SIZE;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::machine::homes::{Shows, reserve, show};

/// Bytes of a page.
pub const PAGE: usize = PAGE_SIZE as usize;

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    mapped: Option<Rights>,
    /// The last time that it was taken away, by the exporter's clock.
    taken: u64,
}

/// What a page is mapped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// To be read.
    Read,
    /// To be written too.
    Write,
}

/// Part of a segment.
#[derive(Debug)]
pub struct Area {
    region: MmapRegion,
    file: File,
    /// Its first guest frame, and where in the file that is, in pages.
    first: u32,
    offset: u32,
    pages: Mutex<Vec<Page>>,
}

impl Area {
    /// Reserves room for `pages` pages from guest frame `first` on, which is page `offset` of `file`.
    ///
    /// # Errors
    ///
    /// When the host has no room.
    pub fn new(file: File, first: u32, offset: u32, pages: u32) -> io::Result<Area> {
        let region = reserve(pages as usize * PAGE).map_err(io::Error::other)?;
        Ok(Area { region, file, first, offset, pages: Mutex::new(vec![Page::default(); pages as usize]) })
    }

    /// Maps pages that were granted at `order`; those that have been taken away since stay as they are.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn grant(&self, first: u32, count: u32, rights: Rights, order: u64) -> io::Result<()> {
        let mut pages = self.pages();
        for index in (first..first + count).filter_map(|frame| self.index(frame)) {
            let page = &mut pages[index];
            if page.taken > order || page.mapped == Some(Rights::Write) || page.mapped == Some(rights) {
                continue;
            }
            let from = (u64::from(self.offset) + index as u64) * PAGE_SIZE;
            let what = match rights {
                Rights::Read => Shows::Read(&self.file, from),
                Rights::Write => Shows::Write(&self.file, from),
            };
            show(&self.region, index * PAGE, PAGE, what)?;
            page.mapped = Some(rights);
        }
        Ok(())
    }

    /// Unmaps those of `frames` that are here, which were taken away at `order`; says how many were mapped.
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
            if page.mapped.take().is_some() {
                show(&self.region, index * PAGE, PAGE, Shows::Nothing)?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// Copies out of a page if it is mapped; false if not.
    pub fn read(&self, frame: u32, offset: usize, bytes: &mut [u8]) -> bool {
        let pages = self.pages();
        let Some(index) = self.index(frame).filter(|index| pages[*index].mapped.is_some()) else {
            return false;
        };
        let page = self.region.as_volatile_slice();
        offset + bytes.len() <= PAGE && page.read_slice(bytes, index * PAGE + offset).is_ok()
    }

    /// Copies into a page if it is mapped to be written; false if not.
    pub fn write(&self, frame: u32, offset: usize, bytes: &[u8]) -> bool {
        let pages = self.pages();
        let writable = |index: &usize| pages[*index].mapped == Some(Rights::Write);
        let Some(index) = self.index(frame).filter(writable) else { return false };
        let page = self.region.as_volatile_slice();
        offset + bytes.len() <= PAGE && page.write_slice(bytes, index * PAGE + offset).is_ok()
    }

    /// Pages mapped now.
    pub fn mapped(&self) -> usize {
        self.pages().iter().filter(|page| page.mapped.is_some()).count()
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
        (Area::new(file.try_clone().expect("a file"), 102, 2, 4).expect("room"), file)
    }

    #[test]
    fn a_granted_page_is_its_segments_and_one_taken_away_is_nothing() {
        let (area, _file) = area();
        let mut bytes = [0; 4];
        assert!(!area.read(105, 0, &mut bytes));
        area.grant(105, 1, Rights::Read, 10).expect("the host maps it");
        assert!(area.read(105, 0, &mut bytes) && &bytes == b"five");
        assert!(!area.write(105, 0, b"six "), "it was granted to be read");
        assert_eq!(area.take_away(&[1, 105, 106, 999], 11).ok(), Some(1));
        assert!(!area.read(105, 0, &mut bytes));
        assert_eq!(area.mapped(), 0);
    }

    #[test]
    fn a_grant_that_was_overtaken_is_void() {
        let (area, file) = area();
        area.take_away(&[105], 11).expect("nothing is mapped");
        area.grant(104, 2, Rights::Write, 10).expect("the host maps one");
        assert!(!area.read(105, 0, &mut [0; 4]) && area.read(104, 0, &mut [0; 4]));
        area.grant(105, 1, Rights::Write, 12).expect("the host maps it");
        assert!(area.write(105, PAGE - 4, b"last") && !area.write(105, PAGE - 3, b"last"));
        let mut bytes = [0; 4];
        file.read_at(&mut bytes, 6 * PAGE_SIZE - 4).expect("memory");
        assert_eq!(&bytes, b"last");
    }
}
