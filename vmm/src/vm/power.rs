//! What a machine begins with: its image, its modules, its command line, in memory that nobody has touched.
//!
//! Story: a guest is built and loaded once before it runs ([`Boot::load`]), and once more at each reset ([`PowerOn`]), from what was
//! read at the beginning: what became of the files meanwhile is no matter. A reset has three parts:
//!
//! ```text
//! stops    every vCPU is outside, no device has a request in hand, guest time stands
//! vCPUs    each forgets its own state and paging, on its own thread
//! PowerOn  the first vCPU's thread forgets guest memory, resets the board and the balloon, loads the image
//! ```
//!
//! Holds: nothing that the guest before has asked for is done to the one after: devices stand until it is loaded, and have no ring
//! then. Disks, budget, swap, sockets, segments, counters and the host's wish for the balloon stay as they are.
//!
//! Limits: [`HELD_MAX`] for pages that somebody holds in their places.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use umbra_mmu::{Gpa, Mmu};

use super::devices::Devices;
use super::ending::{End, Ending};
use super::memory::BootMemory;
use super::{BuiltIn, RunError, read_file};
use crate::board::{MemoryMap, firmware_tables};
use crate::boot::notes::Notes;
use crate::boot::{BootRequest, GuestMemorySink, Image, Module};
use crate::cli::RunArgs;
use crate::cpu::CpuState;
use crate::virtio::balloon::Balloon;

/// How long a reset waits for pages that somebody holds in their places: a window, for a moment.
const HELD_MAX: Duration = Duration::from_secs(5);
/// From one look to the next.
const HELD_NAP: Duration = Duration::from_millis(1);

/// Makes a machine anew whose vCPUs and devices stand.
pub trait PowerOn: Send + Sync {
    /// Does so, on the first vCPU's thread, which is outside; where that vCPU begins.
    ///
    /// # Errors
    ///
    /// When the run has to end instead.
    fn power_on(&self, mmu: &Mmu, devices: &Devices, ending: &Ending) -> Result<CpuState, End>;
}

/// What is loaded.
pub struct Boot {
    name: String,
    image: Vec<u8>,
    /// Names and contents.
    modules: Vec<(String, Vec<u8>)>,
    append: String,
    memory: MemoryMap,
    vcpus: u32,
}

impl Boot {
    /// Reads what the command line names. Where it names no image, `image` is taken if there is one.
    ///
    /// # Errors
    ///
    /// When a file cannot be read, the image is none, or there cannot be so much memory.
    pub fn read(args: &RunArgs, image: Option<&BuiltIn>) -> Result<Boot, RunError> {
        let (name, image) = match (&args.image, image) {
            (Some(path), _) => (path.display().to_string(), read_file("image", path)?),
            (None, Some(image)) => (image.name.into(), image.bytes.clone()),
            (None, None) => ("pager".into(), umbra_guest::PAGER.to_vec()),
        };
        // What the operator may have got wrong comes first.
        parse(&name, &image)?;
        let module = |path: &PathBuf| Ok((path.display().to_string(), read_file("module", path)?));
        let modules = args.module.iter().map(module).collect::<Result<_, RunError>>()?;
        let memory = MemoryMap::new(args.mem)?;
        Ok(Boot { name, image, modules, append: args.append.clone(), memory, vcpus: args.vcpus })
    }

    /// The guest's memory.
    pub fn memory(&self) -> MemoryMap {
        self.memory
    }

    /// What the image says of itself.
    ///
    /// # Errors
    ///
    /// As [`Boot::read`].
    pub fn notes(&self) -> Result<Notes, RunError> {
        Ok(*parse(&self.name, &self.image)?.notes())
    }

    /// Puts everything where the guest looks for it, in memory that reads as zeros; where the first vCPU begins.
    ///
    /// # Errors
    ///
    /// When it does not fit, or there is no frame for it.
    pub fn load(&self, mmu: &Mmu) -> Result<CpuState, RunError> {
        let image = parse(&self.name, &self.image)?;
        // As QEMU and GRUB have it, the first word is the kernel's name.
        let command_line = format!("{} {}", self.name, self.append);
        let modules: Vec<_> =
            self.modules.iter().map(|(line, data)| Module { command_line: line, data }).collect();
        let request =
            BootRequest { memory: self.memory, command_line: command_line.trim_end(), modules: &modules };
        let (at, tables) = firmware_tables(self.vcpus as usize);
        let written = BootMemory::new(mmu).write(Gpa(at.into()), &tables);
        written.map_err(|source| RunError::Tables { at, bytes: tables.len(), source })?;
        let entry = image.load(&mut BootMemory::new(mmu), &request);
        Ok(entry.map_err(|source| RunError::Image { name: self.name.clone(), source })?.cpu)
    }
}

fn parse<'a>(name: &str, image: &'a [u8]) -> Result<Image<'a>, RunError> {
    Image::parse(image).map_err(|source| RunError::Image { name: name.to_owned(), source })
}

/// A machine that is loaded again as it was at first.
pub struct Machine {
    boot: Boot,
    balloon: Balloon,
}

impl Machine {
    /// With what is loaded, and the host's side of its balloon.
    pub fn new(boot: Boot, balloon: Balloon) -> Machine {
        Machine { boot, balloon }
    }
}

impl PowerOn for Machine {
    fn power_on(&self, mmu: &Mmu, devices: &Devices, ending: &Ending) -> Result<CpuState, End> {
        // A guest that has ended before it was reset has ended.
        if let Some(exit) = devices.with(|board, _| board.take_exit()) {
            return Err(End::Board(exit));
        }
        devices.with(|board, now| board.reset(now));
        forget(mmu, ending)?;
        self.balloon.reset();
        self.boot.load(mmu).map_err(|error| End::NotReset(error.to_string()))
    }
}

/// Has guest memory forgotten.
fn forget(mmu: &Mmu, ending: &Ending) -> Result<(), End> {
    let deadline = Instant::now() + HELD_MAX;
    while let Err(held) = mmu.forget_guest(0) {
        if ending.is_set() || Instant::now() > deadline {
            return Err(End::NotReset(format!("{held}, and has been for {HELD_MAX:?}")));
        }
        thread::sleep(HELD_NAP);
    }
    Ok(())
}
