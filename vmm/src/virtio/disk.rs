//! The bytes of a disk: a raw file, a block device, or memory.
//!
//! Story: `--disk` names one. It is opened, looked at and locked before the run; then the block device reads and writes it in
//! whole sectors, within its capacity, which does not change.
//!
//! A disk can be told to fail now and then, so that a guest's own way out is seen.
//!
//! Holds: no two guests have a file for writing, nor one while another reads it: by advisory locks, which `flock` honours. A
//! short read or write is an error, never a guess. A punched hole reads as zeros.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroU32;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use umbra_mmu::sync::{sim, transfer};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use crate::machine::memory_file;
use crate::units::parse_size;

/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of an identifier.
pub const ID_BYTES: usize = 20;
/// The most disks of a guest.
pub const DISKS_MAX: usize = 8;
/// Zeros that are written at once, where nothing else makes them.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What `--disk` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Where its bytes are.
    pub source: DiskSource,
    /// The guest may not write to it.
    pub read_only: bool,
    /// What it is called; `disk0`, `disk1`.. by its place if left out.
    pub id: Option<String>,
    /// One write of so many fails.
    pub write_errors: Option<NonZeroU32>,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// In a file, or a block device.
    File(PathBuf),
    /// In memory: so many bytes, zeros at first.
    Memory(u64),
}

impl DiskSpec {
    /// The disks of the built-in guest, where the command line has none: one to swap to and one for its file.
    pub fn built_in() -> Vec<DiskSpec> {
        let memory = |bytes, id: &str| DiskSpec {
            source: DiskSource::Memory(bytes),
            read_only: false,
            id: Some(id.into()),
            write_errors: None,
        };
        vec![memory(256 << 20, "swap"), memory(16 << 20, "file")]
    }
}

/// Reads `FILE[,ro][,id=NAME][,write-errors=N]` or `SIZE[,id=NAME][,write-errors=N]`.
///
/// # Errors
///
/// A sentence, when it is neither.
pub fn parse_disk(text: &str) -> Result<DiskSpec, String> {
    let mut words = text.split(',');
    let first = words.next().unwrap_or_default();
    let source = match parse_size(first) {
        Ok(bytes) => DiskSource::Memory(whole_sectors(first, bytes)?),
        Err(error) if first.starts_with(|first: char| first.is_ascii_digit()) => {
            return Err(format!("{error}; a file whose name begins with a digit is written ./{first}"));
        }
        Err(_) if first.is_empty() => return Err("name a file, or a size".into()),
        Err(_) => DiskSource::File(first.into()),
    };
    let mut spec = DiskSpec { source, read_only: false, id: None, write_errors: None };
    for word in words {
        match word.split_once('=') {
            None if word == "ro" => spec.read_only = true,
            Some(("id", id)) => spec.id = Some(parse_id(id)?),
            Some(("write-errors", count)) => spec.write_errors = Some(parse_write_errors(count)?),
            _ => {
                return Err(format!(
                    "'{word}' is no option of a disk; write ro, id=NAME (a name has no comma) or write-errors=N"
                ));
            }
        }
    }
    if spec.read_only && matches!(spec.source, DiskSource::Memory(_)) {
        return Err("a disk in memory that nobody can write to has nothing on it; leave out ro".into());
    }
    if spec.read_only && spec.write_errors.is_some() {
        return Err("all writes to a disk that is ro fail; leave out ro, or write-errors".into());
    }
    Ok(spec)
}

fn whole_sectors(text: &str, bytes: u64) -> Result<u64, String> {
    match bytes {
        0 => Err(format!("'{text}' is no disk; give it at least a sector, {SECTOR_BYTES} bytes")),
        _ if !bytes.is_multiple_of(SECTOR_BYTES) => Err(format!(
            "'{text}' is no whole number of sectors of {SECTOR_BYTES} bytes; write a size such as 64M"
        )),
        _ => Ok(bytes),
    }
}

fn parse_write_errors(count: &str) -> Result<NonZeroU32, String> {
    count.parse().map_err(|_| {
        format!("'{count}' is no number of writes of which one fails; write one from 1 to {}", u32::MAX)
    })
}

fn parse_id(id: &str) -> Result<String, String> {
    let printable = id.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    if id.is_empty() || id.len() > ID_BYTES || !printable {
        return Err(format!("'{id}' is no name of a disk; write 1 to {ID_BYTES} printable ASCII characters"));
    }
    Ok(id.into())
}

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened or looked at.
    #[error("--disk: {what} {path}: {source}{}", advice(source))]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not something with sectors.
    #[error("--disk: {0} is neither a file nor a block device; name a raw disk image")]
    NotADisk(PathBuf),
    /// It has no whole number of sectors.
    #[error(
        "--disk: {path} has {bytes} bytes, which is no whole number of sectors of {SECTOR_BYTES} bytes, or none; is it a raw disk \
         image? `truncate --size %{SECTOR_BYTES}` makes it longer"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Another has it.
    #[error(
        "--disk: {path} is in use by another guest or program that has it locked; end that, or give both the disk with ro"
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// No memory for it.
    #[error("--disk: the host gives no file of {bytes} bytes in memory: {source}; name a file instead")]
    Memory {
        /// Its length.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// Two of the same name.
    #[error("--disk: two disks are called '{0}'; give each an id= of its own")]
    SameId(String),
    /// More than there can be.
    #[error("--disk: {0} disks are too many; a guest has at most {DISKS_MAX}")]
    TooMany(usize),
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "; make one with `truncate --size 64M FILE`, or write a size for a disk in memory"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; add ,ro if it is only to be read"
        }
        _ => "",
    }
}

/// What a disk is kept on.
pub trait Medium: Send {
    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    ///
    /// When it cannot, all of it.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    ///
    /// When it cannot.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// What was written is kept, whatever happens.
    ///
    /// # Errors
    ///
    /// When it may not be.
    fn sync(&self) -> io::Result<()>;
    /// Gives `bytes` from `offset` on back; they read as zeros then.
    ///
    /// # Errors
    ///
    /// When that cannot be done here: nothing has changed.
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Makes zeros of `bytes` from `offset` on, which stay reserved.
    ///
    /// # Errors
    ///
    /// When that cannot be done here: write them.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()>;
}

impl Medium for File {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        Ok(fallocate(self, FallocateMode::PunchHole, true, offset, bytes)?)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        Ok(fallocate(self, FallocateMode::ZeroRange, true, offset, bytes)?)
    }
}

/// A medium of which one write in so many fails, and changes nothing: which, a simulation's seed draws; else each that makes as many.
struct Failing {
    medium: Box<dyn Medium>,
    one_in: NonZeroU32,
    writes: AtomicU32,
}

impl Failing {
    fn write_fails(&self) -> bool {
        let writes = self.writes.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let one_in = self.one_in.get();
        sim::choose(one_in.into()).map_or(writes.is_multiple_of(one_in), |drawn| drawn == 0)
    }
}

impl Medium for Failing {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.medium.read(offset, buffer)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.write_fails() {
            sim::note(|line| line.push_str("has a disk fail to write"));
            return Err(io::Error::other(format!("one write in {} fails, by write-errors", self.one_in)));
        }
        self.medium.write(offset, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.medium.sync()
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.medium.punch(offset, bytes)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.medium.zero(offset, bytes)
    }
}

/// A disk.
pub struct Disk {
    medium: Box<dyn Medium>,
    sectors: u64,
    read_only: bool,
    prompt: bool,
    id: String,
}

impl Disk {
    /// All disks of a guest, in order.
    ///
    /// # Errors
    ///
    /// When one cannot be had, or two have one name.
    pub fn open_all(specs: &[DiskSpec]) -> Result<Vec<Disk>, DiskError> {
        if specs.len() > DISKS_MAX {
            return Err(DiskError::TooMany(specs.len()));
        }
        let mut disks: Vec<Disk> = Vec::with_capacity(specs.len());
        for (n, spec) in specs.iter().enumerate() {
            let id = spec.id.clone().unwrap_or_else(|| format!("disk{n}"));
            if disks.iter().any(|other| other.id == id) {
                return Err(DiskError::SameId(id));
            }
            let disk = match &spec.source {
                DiskSource::File(path) => Disk::open(path, spec.read_only, id)?,
                DiskSource::Memory(bytes) => Disk::in_memory(*bytes, id)?,
            };
            disks.push(match spec.write_errors {
                Some(one_in) => disk.failing(one_in),
                None => disk,
            });
        }
        Ok(disks)
    }

    /// A disk in a file.
    ///
    /// # Errors
    ///
    /// When it is none, or another has it.
    pub fn open(path: &Path, read_only: bool, id: String) -> Result<Disk, DiskError> {
        let failed = |what| move |source| DiskError::File { what, path: path.to_owned(), source };
        // Looked at first: to open a pipe would be to wait for its other end.
        let kind = std::fs::metadata(path).map_err(failed("opening"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk(path.to_owned()));
        }
        let mut file =
            OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed("opening"))?;
        let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
        locked.map_err(|error| match error {
            TryLockError::WouldBlock => DiskError::Locked { path: path.to_owned() },
            TryLockError::Error(source) => failed("locking")(source),
        })?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed("measuring"))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size { path: path.to_owned(), bytes });
        }
        Ok(Disk::new(Box::new(file), bytes / SECTOR_BYTES, read_only, id))
    }

    /// A disk in memory, all zeros.
    ///
    /// # Errors
    ///
    /// When the host has no room for it.
    pub fn in_memory(bytes: u64, id: String) -> Result<Disk, DiskError> {
        let file = memory_file(c"umbra-disk", bytes).map_err(|source| DiskError::Memory { bytes, source })?;
        Ok(Disk { prompt: true, ..Disk::new(Box::new(file), bytes / SECTOR_BYTES, false, id) })
    }

    /// A disk on any medium.
    pub fn new(medium: Box<dyn Medium>, sectors: u64, read_only: bool, id: String) -> Disk {
        Disk { medium, sectors, read_only, prompt: false, id }
    }

    /// The same, of whose writes one in so many fails.
    pub fn failing(self, one_in: NonZeroU32) -> Disk {
        Disk { medium: Box::new(Failing { medium: self.medium, one_in, writes: AtomicU32::new(0) }), ..self }
    }

    /// Its capacity.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// True if nobody may write to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// True if it never makes anybody wait: it is in memory.
    pub fn is_prompt(&self) -> bool {
        self.prompt
    }

    /// What it is called.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// True if all of these sectors are there.
    pub fn has(&self, sector: u64, count: u64) -> bool {
        sector.checked_add(count).is_some_and(|end| end <= self.sectors)
    }

    /// Reads whole sectors, which are there.
    ///
    /// # Errors
    ///
    /// What the medium says.
    pub fn read(&self, sector: u64, buffer: &mut [u8]) -> io::Result<()> {
        transfer();
        self.medium.read(sector * SECTOR_BYTES, buffer)
    }

    /// Writes whole sectors, which are there.
    ///
    /// # Errors
    ///
    /// What the medium says.
    pub fn write(&self, sector: u64, data: &[u8]) -> io::Result<()> {
        self.writable()?;
        transfer();
        self.medium.write(sector * SECTOR_BYTES, data)
    }

    /// What was written is kept.
    ///
    /// # Errors
    ///
    /// What the medium says.
    pub fn sync(&self) -> io::Result<()> {
        transfer();
        if self.read_only { Ok(()) } else { self.medium.sync() }
    }

    /// Gives sectors back, where the medium can.
    ///
    /// # Errors
    ///
    /// When there is nothing to write to.
    pub fn discard(&self, sector: u64, count: u64) -> io::Result<()> {
        self.writable()?;
        if count != 0
            && let Err(error) = self.medium.punch(sector * SECTOR_BYTES, count * SECTOR_BYTES)
        {
            // It costs room and nothing else.
            log::debug!("disk '{}': punching {count} sectors out: {error}", self.id);
        }
        Ok(())
    }

    /// Makes zeros of sectors; `may_unmap` lets them be given back.
    ///
    /// # Errors
    ///
    /// What the medium says.
    pub fn write_zeroes(&self, sector: u64, count: u64, may_unmap: bool) -> io::Result<()> {
        self.writable()?;
        let (mut offset, mut left) = (sector * SECTOR_BYTES, count * SECTOR_BYTES);
        if left == 0
            || may_unmap && self.medium.punch(offset, left).is_ok()
            || self.medium.zero(offset, left).is_ok()
        {
            return Ok(());
        }
        while left > 0 {
            let now = left.min(ZEROS.len() as u64);
            self.medium.write(offset, &ZEROS[..now as usize])?;
            (offset, left) = (offset + now, left - now);
        }
        Ok(())
    }

    fn writable(&self) -> io::Result<()> {
        if self.read_only { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
    }
}
