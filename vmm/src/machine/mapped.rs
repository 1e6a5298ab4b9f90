//! Mapped windows: views of the pool in which a frame is seen for as long as its window is open, and no longer.
//!
//! Story: the pool is a memory file. Beside KVM's mapping of it there are two of the VMM's own: all of it, of which only the
//! firmware and the tables of the shadow can be touched; and slots of a page each, which show what windows are open upon.
//! A touch of anything else is a SIGSEGV, which is the point: this is for finding code that reaches around the window.
//!
//! Holds: a slot is shown by one window at a time. The host takes as many mappings as we may need, asked before the start.
//!
//! Limits: [`SLOTS`] windows open at once. A window costs two system calls.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use umbra_mmu::{Machine, Mfn, PAGE_SIZE, Views};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::PoolError;

/// Windows open at once: more than the pool's slots and the deepest stacks of all threads.
pub const SLOTS: u32 = 1024;
/// Mappings that a process has anyway, and that its libraries may make.
const OTHER_MAPPINGS: u64 = 4096;
const PAGE: usize = PAGE_SIZE as usize;

/// A file of `bytes` zeros in memory; `name` is for whoever lists a process's files.
///
/// # Errors
/// What the host says.
pub fn memory_file(name: &CStr, bytes: u64) -> io::Result<File> {
    // SAFETY: the name is a C string; the call touches no memory of ours but that.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}

/// The VMM's own views of a pool.
#[derive(Debug)]
pub struct MappedViews {
    file: Arc<File>,
    tables: Arc<MmapRegion>,
    slots: Arc<MmapRegion>,
    /// The files behind the pool: by first frame, how many frames and which.
    homes: RwLock<BTreeMap<u32, (u32, Arc<File>)>>,
    free: Mutex<Vec<u32>>,
}

impl MappedViews {
    /// Views of `file`, of `frames` frames, of which the first `firmware` are always open and up to `tables` others at once.
    ///
    /// # Errors
    /// When the host does not map them, or allows too few mappings.
    pub fn new(file: &Arc<File>, frames: u64, firmware: u64, tables: u64) -> Result<MappedViews, PoolError> {
        let needed = 2 * (tables + u64::from(SLOTS)) + OTHER_MAPPINGS;
        match std::fs::read_to_string("/proc/sys/vm/max_map_count").map(|text| text.trim().parse::<u64>()) {
            Ok(Ok(limit)) if limit < needed => return Err(PoolError::Mappings { needed, limit }),
            _ => {}
        }
        let hidden = |bytes: u64| {
            MmapRegionBuilder::new(usize::try_from(bytes).unwrap_or(usize::MAX))
                .with_mmap_prot(libc::PROT_NONE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        };
        let refused = |source| PoolError::Map { frames, source };
        let whole = hidden(frames * PAGE_SIZE).with_file_offset(FileOffset::from_arc(Arc::clone(file), 0));
        let slots = hidden(u64::from(SLOTS) * PAGE_SIZE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_ANONYMOUS);
        let views = MappedViews {
            file: Arc::clone(file),
            tables: Arc::new(whole.build().map_err(refused)?),
            slots: Arc::new(slots.build().map_err(refused)?),
            homes: RwLock::default(),
            free: Mutex::new((0..SLOTS).rev().collect()),
        };
        if firmware > 0 {
            protect(&views.tables, Mfn(0), firmware as usize, true);
        }
        Ok(views)
    }

    /// All of the pool, closed but for firmware and tables.
    pub fn own(&self) -> Arc<MmapRegion> {
        Arc::clone(&self.tables)
    }

    /// The frames from `first` on are of `file` from now on, or nobody's.
    pub fn set_homes(&self, first: Mfn, pages: u32, file: Option<&Arc<File>>) {
        let mut homes = self.homes.write().unwrap_or_else(PoisonError::into_inner);
        match file {
            Some(file) => homes.insert(first.0, (pages, Arc::clone(file))),
            None => homes.remove(&first.0),
        };
    }

    /// The file that has a frame, and where.
    fn place(&self, frame: Mfn) -> Option<(Arc<File>, u64)> {
        if frame.0 < (self.tables.size() / PAGE) as u32 {
            return Some((Arc::clone(&self.file), frame.at(0).0));
        }
        let homes = self.homes.read().unwrap_or_else(PoisonError::into_inner);
        let (first, (pages, file)) = homes.range(..=frame.0).next_back()?;
        (frame.0 - first < *pages).then(|| (Arc::clone(file), Mfn(frame.0 - first).at(0).0))
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Views for MappedViews {
    fn tables(&self) -> Machine {
        Machine::new(self.own())
    }

    fn open_table(&self, frame: Mfn, open: bool) {
        protect(&self.tables, frame, 1, open);
    }

    fn slots(&self) -> Machine {
        Machine::new(Arc::clone(&self.slots))
    }

    fn show(&self, frame: Mfn) -> Mfn {
        let Some(slot) = self.free().pop() else { panic!("INV-VIEW-2: all {SLOTS} window slots are open") };
        let slot = Mfn(slot);
        let at = page(&self.slots, slot, 1);
        let Some((file, offset)) = self.place(frame) else {
            panic!("INV-FRAME-1: {frame} is neither of the pool nor a home")
        };
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE);
        // SAFETY: the page lies within a mapping of ours that holds nothing but slots, and this slot, just taken off the
        // free list, is no window's: no pointer into it is in use. The file has the frame, as was looked up above.
        let mapped =
            unsafe { libc::mmap(at, PAGE, protection, flags, file.as_raw_fd(), offset as libc::off_t) };
        assert!(mapped == at, "INV-VIEW-2: {frame} cannot be shown: {}", io::Error::last_os_error());
        slot
    }

    fn hide(&self, slot: Mfn) {
        protect(&self.slots, slot, 1, false);
        self.free().push(slot.0);
    }
}

/// Lets pages of a region be touched, or not.
fn protect(region: &MmapRegion, first: Mfn, count: usize, open: bool) {
    let protection = if open { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
    // SAFETY: the pages are mapped, and ours. They are only ever reached by pointers as volatile memory or as atomics; who
    // reaches them while they are closed is killed, which is what closing is for, and breaks no Rust value.
    let done = unsafe { libc::mprotect(page(region, first, count), count * PAGE, protection) };
    assert!(done == 0, "INV-VIEW-2: mprotect of page {first}: {}", io::Error::last_os_error());
}

/// The address of page `first` of a region, which has `count` from there on.
fn page(region: &MmapRegion, first: Mfn, count: usize) -> *mut libc::c_void {
    let offset = first.0 as usize * PAGE;
    assert!(offset + count * PAGE <= region.size(), "INV-VIEW-2: page {first} is not of the region");
    region.as_ptr().wrapping_add(offset).cast()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use umbra_mmu::window::Intent;
    use umbra_mmu::{Config, Context, Gfn, LocalStack, Mmu, NoVcpus, Width};

    use super::*;
    use crate::machine::Pool;

    const FIRMWARE: u64 = 2;
    const TABLES: u64 = 200;

    fn world() -> (Pool, Mmu) {
        let pool = Pool::mapped(1024, 0, FIRMWARE, TABLES).expect("a pool");
        let config = Config {
            low_pages: 16,
            reserved_frames: FIRMWARE as u32,
            shadow_pages_max: 64,
            roots_max: 4,
            ..Config::of_pages(256)
        };
        let views = pool.views().expect("mapped");
        let mmu = Mmu::new(Machine::new(pool.region()), config, Box::new(NoVcpus)).with_views(views);
        (pool, mmu)
    }

    #[test]
    fn windows_show_what_the_hardware_sees() {
        let (pool, mmu) = world();
        let stack = LocalStack::new(Context::Host);
        for gfn in [0, 5, 200].map(Gfn) {
            mmu.store(&stack, gfn.at(8), Width::B8, 0x1234_5678 + u64::from(gfn.0)).expect("memory");
            assert_eq!(mmu.load(&stack, gfn.at(8), Width::B8), Ok(0x1234_5678 + u64::from(gfn.0)));
            let umbra_mmu::p2m::PageState::Resident(mfn) = mmu.p2m().lookup(gfn) else { panic!("resident") };
            let hardware = Machine::new(pool.region());
            assert_eq!(hardware.load(mfn.at(8), Width::B8), 0x1234_5678 + u64::from(gfn.0));

            let map = mmu.take_page(gfn, Intent::Write, None).expect("memory");
            map.store(16, Width::B8, map.load(8, Width::B8) + 1);
            drop(map);
            assert_eq!(hardware.load(mfn.at(16), Width::B8), 0x1234_5679 + u64::from(gfn.0));
        }
        assert_eq!(mmu.window_stats().idle, 3, "slots of the pool stay mapped");
    }

    #[test]
    fn firmware_can_be_written_and_read_at_any_time() {
        let (pool, _mmu) = world();
        pool.write(Mfn(1).at(16), b"firmware").expect("firmware");
        let mut back = [0; 8];
        Machine::new(pool.region()).read(Mfn(1).at(16), &mut back);
        assert_eq!(&back, b"firmware");
    }

    #[test]
    fn a_host_that_allows_too_few_mappings_is_an_error_that_says_so() {
        let error = Pool::mapped(16, 0, 1, 1 << 40).expect_err("too many").to_string();
        assert!(error.contains("--shadow-pages") && error.contains("max_map_count"), "{error}");
    }

    const TOUCH: &str = "UMBRA_TEST_TOUCH";

    /// What [`a_touch_outside_a_window_is_a_crash`] has its child do.
    fn touch(what: &str) {
        let (pool, mmu) = world();
        let stack = LocalStack::new(Context::Host);
        mmu.store(&stack, Gfn(20).at(0), Width::B4, 1).expect("memory");
        let umbra_mmu::p2m::PageState::Resident(mfn) = mmu.p2m().lookup(Gfn(20)) else { panic!("resident") };
        let views = pool.views().expect("mapped");
        match what {
            "released" => {
                let slot = views.show(mfn);
                let slots = views.slots();
                assert_eq!(slots.load(slot.at(0), Width::B4), 1);
                views.hide(slot);
                slots.load(slot.at(0), Width::B4);
            }
            "around" => drop(views.tables().load(mfn.at(0), Width::B4)),
            "low" => drop(pool.load(Mfn(FIRMWARE as u32 + 1).at(0))),
            "within" => {
                let slot = views.show(mfn);
                assert_eq!(views.slots().load(slot.at(0), Width::B4), 1);
                views.hide(slot);
            }
            other => panic!("no touch is called {other}"),
        }
    }

    #[test]
    fn a_touch_outside_a_window_is_a_crash() {
        if let Some(what) = std::env::var_os(TOUCH) {
            return touch(&what.to_string_lossy());
        }
        let run = |what: &str| {
            let name = "machine::mapped::tests::a_touch_outside_a_window_is_a_crash";
            let mut child = Command::new(std::env::current_exe().expect("this test"));
            let ended = child.args(["--exact", name]).env(TOUCH, what).output().expect("a child");
            ended.status
        };
        assert!(run("within").success());
        for what in ["released", "around", "low"] {
            assert_eq!(run(what).signal(), Some(libc::SIGSEGV), "{what}");
        }
    }
}
