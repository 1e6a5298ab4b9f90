//! Swap in a file.
//!
//! Story: `--swap FILE` makes a sparse file for the run. It never has a name, so that nothing is left behind however and whenever
//! the run ends; where the filesystem makes no files without one, its name is taken away as soon as it is open. What is not wanted
//! any more is punched out of it.
//!
//! `--swap-fault` puts a device in front that fails where it is told to: for seeing what comes of it.
//!
//! Holds: every slot is read where it was written; a short read or write is an error, never a guess.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use umbra_mmu::PAGE_SIZE;
use umbra_mmu::swap::{SwapDevice, SwapSlot};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

/// Why a swap file cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "--swap: {what} {path}: {source}; name a file that does not exist, on a filesystem with room and sparse files"
)]
pub struct SwapFileError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// A swap device in a file that has no name any more.
#[derive(Debug)]
pub struct SwapFile {
    file: File,
    slots: u32,
}

impl SwapFile {
    /// Makes the file that `path` stands for, for `slots` pages, without the name.
    ///
    /// # Errors
    ///
    /// When there is something at `path`, or it cannot be made.
    pub fn create(path: &Path, slots: u32) -> Result<SwapFile, SwapFileError> {
        let failed = |what| move |source| SwapFileError { what, path: path.to_owned(), source };
        let file = match nameless(path).map_err(failed("making"))? {
            Some(file) => file,
            None => {
                let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
                let file = file.map_err(failed("making"))?;
                std::fs::remove_file(path).map_err(failed("taking the name away from"))?;
                file
            }
        };
        file.set_len(u64::from(slots) * PAGE_SIZE).map_err(failed("sizing"))?;
        Ok(SwapFile { file, slots })
    }
}

/// A file where `path` says, but for the name; `None` where the filesystem has no such files.
fn nameless(path: &Path) -> io::Result<Option<File>> {
    const MODE: u32 = 0o600;
    if path.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let Some(_) = path.file_name() else { return Ok(None) };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::from_raw_mode(MODE)) {
        Ok(file) => Ok(Some(file.into())),
        // Old kernels take the flag for one that they know.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn offset(slot: u32) -> u64 {
    u64::from(slot) * PAGE_SIZE
}

impl SwapDevice for SwapFile {
    fn slots(&self) -> u32 {
        self.slots
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        self.file.write_all_at(pages, offset(first.0))
    }

    fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(pages, offset(first.0))
    }

    fn discard(&self, slots: Range<u32>) {
        let length = slots.len() as u64 * PAGE_SIZE;
        // Where a filesystem cannot punch holes, the file keeps what it has: it costs room and nothing else.
        if let Err(error) = fallocate(&self.file, FallocateMode::PunchHole, true, offset(slots.start), length)
        {
            log::debug!("punching {} slots out of the swap file: {error}", slots.len());
        }
    }
}

/// Which operation of a swap device fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This read, the first being 1.
    Read(u64),
    /// This write.
    Write(u64),
}

/// As [`parse_fault`] reads it.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Read(number) => write!(f, "read@{number}"),
            Fault::Write(number) => write!(f, "write@{number}"),
        }
    }
}

/// Reads `read@N` or `write@N`.
///
/// # Errors
///
/// A sentence, when it is neither.
pub fn parse_fault(text: &str) -> Result<Fault, String> {
    let parsed = text.split_once('@').and_then(|(what, number)| {
        let number = number.parse().ok().filter(|number| *number > 0)?;
        match what {
            "read" => Some(Fault::Read(number)),
            "write" => Some(Fault::Write(number)),
            _ => None,
        }
    });
    parsed.ok_or_else(|| format!("'{text}' is no operation; write read@N or write@N, the first being 1"))
}

/// A swap device that fails with an I/O error where it is told to.
#[derive(Debug)]
pub struct FailingSwap {
    inner: Box<dyn SwapDevice>,
    faults: Vec<Fault>,
    reads: AtomicU64,
    writes: AtomicU64,
}

impl FailingSwap {
    /// `inner`, but for `faults`.
    pub fn new(inner: Box<dyn SwapDevice>, faults: Vec<Fault>) -> FailingSwap {
        FailingSwap { inner, faults, reads: AtomicU64::new(0), writes: AtomicU64::new(0) }
    }

    fn pass(&self, operation: Fault) -> io::Result<()> {
        if self.faults.contains(&operation) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}

impl SwapDevice for FailingSwap {
    fn slots(&self) -> u32 {
        self.inner.slots()
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        self.pass(Fault::Write(self.writes.fetch_add(1, Ordering::Relaxed) + 1))?;
        self.inner.write(first, pages)
    }

    fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()> {
        self.pass(Fault::Read(self.reads.fetch_add(1, Ordering::Relaxed) + 1))?;
        self.inner.read(first, pages)
    }

    fn discard(&self, slots: Range<u32>) {
        self.inner.discard(slots);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn pages_come_back_the_name_is_gone_and_discarded_slots_cost_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("swap");
        let swap = SwapFile::create(&path, 100).expect("made");
        assert!(!path.exists());
        let pages: Vec<u8> = (0..2 * PAGE_SIZE).map(|n| (n / 5) as u8).collect();
        swap.write(SwapSlot(98), &pages).expect("written");
        let mut back = vec![0; pages.len()];
        swap.read(SwapSlot(98), &mut back).expect("read");
        assert!(back == pages);
        let blocks = || swap.file.metadata().expect("metadata").blocks();
        let before = blocks();
        swap.discard(98..100);
        assert!(blocks() < before, "{} blocks after, {before} before", blocks());
        assert!(swap.read(SwapSlot(99), &mut back).is_err(), "beyond its end");
    }

    #[test]
    fn a_swap_file_has_no_name_at_any_moment() {
        use rustix::fs::inotify;
        let directory = tempfile::tempdir().expect("a directory");
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK).expect("a watch");
        inotify::add_watch(&watch, directory.path(), inotify::WatchFlags::CREATE).expect("a watch");
        let path = directory.path().join("swap");
        SwapFile::create(&path, 1).expect("made");
        let mut space = [std::mem::MaybeUninit::uninit(); 512];
        let seen = inotify::Reader::new(&watch, &mut space).next().map(|_| ());
        assert_eq!(seen, Err(Errno::AGAIN), "a killed run would leave it behind");
        std::fs::write(&path, "mine").expect("written");
        let refused = SwapFile::create(&path, 1).expect_err("it is there");
        assert!(refused.to_string().contains("does not exist"), "{refused}");
    }

    #[test]
    fn a_fault_is_an_operation_and_its_number() {
        assert_eq!(
            (parse_fault("read@1"), parse_fault("write@20")),
            (Ok(Fault::Read(1)), Ok(Fault::Write(20)))
        );
        for text in ["", "read", "read@0", "discard@1", "write@x"] {
            assert!(parse_fault(text).expect_err(text).contains("read@N"));
        }
    }

    #[test]
    fn what_is_there_already_is_left_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("precious");
        std::fs::write(&path, "mine").expect("written");
        let error = SwapFile::create(&path, 1).expect_err("it exists").to_string();
        assert!(error.contains("precious") && error.contains("does not exist"), "{error}");
        assert_eq!(std::fs::read(&path).expect("still there"), b"mine");
    }
}
