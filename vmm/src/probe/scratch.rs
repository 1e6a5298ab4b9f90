//! A guest of a few bytes: one vCPU under page tables built by hand.
//!
//! Story: the probe and the tests of the kvm backend put some machine code into a page, enter it and look at how it
//! leaves. There is no MMU here: the tables are plain ones, and every page is at CPL 3 like a shadow page table's.
//!
//! ```text
//!   0x0010_0000  code            0x0020_0000  data            0x0008_f000  stack (ESP at its end)
//! ```

use std::sync::Arc;

use umbra_mmu::{Gva, Mfn, Mpa};

use crate::cpu::{CpuState, Seg};
use crate::kvm::descriptors::decode;
use crate::kvm::{Host, KvmError, KvmExit, KvmVcpu, KvmVm, Options};
use crate::machine::{Pool, PoolError};

/// Where the code is.
pub const CODE: Gva = Gva(0x10_0000);
/// A page of data.
pub const DATA: Gva = Gva(0x20_0000);
/// The end of the stack.
pub const STACK_END: Gva = Gva(0x9_0000);

/// Selector of the kernel's code.
pub const KERNEL_CODE: u16 = 0x08;
/// Selector of the kernel's data.
pub const KERNEL_DATA: u16 = 0x10;
/// Selector of user code.
pub const USER_CODE: u16 = 0x1b;
/// Selector of user data.
pub const USER_DATA: u16 = 0x23;

/// The flat descriptors behind these selectors.
pub const GDT: [u64; 5] =
    [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_fb00_0000_ffff, 0x00cf_f300_0000_ffff];

/// Entry bit P.
pub const PRESENT: u64 = 1;
/// Entry bit R/W.
pub const WRITABLE: u64 = 2;
/// Entry bit U/S.
pub const USER: u64 = 4;
/// Entry bits A and D.
pub const ACCESSED_DIRTY: u64 = 0x60;
/// Entry bit XD.
pub const NO_EXECUTE: u64 = 1 << 63;
/// A leaf that allows everything.
pub const ALL: u64 = PRESENT | WRITABLE | USER | ACCESSED_DIRTY;

/// Frames for tables and pages, beyond the firmware's.
const FRAMES: u64 = 256;

/// The memory of a small guest: tables and pages, handed out one after the other.
#[derive(Debug)]
pub struct Space {
    pool: Arc<Pool>,
    next: Mfn,
    root: Mpa,
}

impl Space {
    /// A space in `pool` from frame `first` on, with the entry `root_entry` in its root.
    ///
    /// # Errors
    /// When the pool is too small.
    pub fn new(pool: Arc<Pool>, first: Mfn, root_entry: (usize, u64)) -> Result<Space, PoolError> {
        let mut space = Space { pool, next: first, root: Mpa(0) };
        space.root = space.frame()?.at(0);
        let (index, entry) = root_entry;
        space.pool.store(Mpa(space.root.0 + index as u64 * 8), entry)?;
        Ok(space)
    }

    /// The root.
    pub fn root(&self) -> Mpa {
        self.root
    }

    /// The pool.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// A frame that nobody has, zeroed.
    ///
    /// # Errors
    /// When the pool is used up.
    pub fn frame(&mut self) -> Result<Mfn, PoolError> {
        let frame = self.next;
        self.pool.write(frame.at(0), &[0; 4096])?;
        self.next = Mfn(frame.0 + 1);
        Ok(frame)
    }

    /// The address of the leaf entry for `gva`; the tables above it are made where they are not there.
    ///
    /// # Errors
    /// When the pool is used up.
    pub fn entry(&mut self, gva: Gva) -> Result<Mpa, PoolError> {
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let mut table = self.root.0;
        for shift in [39, 30, 21] {
            let entry = Mpa(table + (u64::from(gva.0) >> shift & 511) * 8);
            if self.pool.load(entry)? & PRESENT == 0 {
                let new = self.frame()?.at(0).0;
                self.pool.store(entry, new | PRESENT | WRITABLE | USER | 0x20)?;
            }
            table = self.pool.load(entry)? & ADDRESS;
        }
        Ok(Mpa(table + u64::from(gva.0 >> 12 & 511) * 8))
    }

    /// Maps the page of `gva` to `frame` with `bits`.
    ///
    /// # Errors
    /// When the pool is used up.
    pub fn map(&mut self, gva: Gva, frame: Mfn, bits: u64) -> Result<(), PoolError> {
        let entry = self.entry(gva)?;
        self.pool.store(entry, frame.at(0).0 | bits)
    }

    /// Maps a new frame at the page of `gva` with every right, and says which.
    ///
    /// # Errors
    /// When the pool is used up.
    pub fn page(&mut self, gva: Gva) -> Result<Mfn, PoolError> {
        let frame = self.frame()?;
        self.map(gva, frame, ALL)?;
        Ok(frame)
    }
}

/// A small guest on one vCPU.
#[derive(Debug)]
pub struct Scratch {
    /// The vCPU.
    pub vcpu: KvmVcpu,
    /// The state that the next entry runs.
    pub cpu: CpuState,
    /// Its memory.
    pub space: Space,
    /// The frame of the code page.
    pub code: Mfn,
    /// The frame of the data page.
    pub data: Mfn,
    /// The VM.
    pub vm: Arc<KvmVm>,
}

impl Scratch {
    /// A guest with the usual pages and descriptors, at CPL 3, about to run an empty code page.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(host: &Host, options: Options) -> Result<Scratch, KvmError> {
        let firmware = KvmVm::firmware_frames(options.vcpus)?;
        let pool = Arc::new(Pool::new(firmware + FRAMES * u64::from(options.vcpus))?);
        let vm = Arc::new(KvmVm::new(host, pool, options)?);
        Scratch::on(vm, 0)
    }

    /// A guest of its own on vCPU `index` of `vm`, whose pool is as large as [`Scratch::new`] makes it.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn on(vm: Arc<KvmVm>, index: u32) -> Result<Scratch, KvmError> {
        let first = Mfn(vm.first_free_frame().0 + index * FRAMES as u32);
        let mut space = Space::new(Arc::clone(vm.pool()), first, vm.root_entry())?;
        let (code, data) = (space.page(CODE)?, space.page(DATA)?);
        space.page(Gva(STACK_END.0 - 1))?;
        let vcpu = vm.create_vcpu(index)?;
        let mut scratch = Scratch { vcpu, cpu: state(true), space, code, data, vm };
        scratch.set_gdt(&GDT)?;
        Ok(scratch)
    }

    /// Gives the guest this GDT.
    ///
    /// # Errors
    /// As [`KvmVcpu::set_descriptors`].
    pub fn set_gdt(&mut self, gdt: &[u64]) -> Result<(), KvmError> {
        self.vcpu.set_descriptors(&table_bytes(gdt), None)
    }

    /// Puts `bytes` at the start of the code page, and the guest there: at CPL 3, or at virtual CPL 0.
    ///
    /// # Errors
    /// When they are longer than the pool.
    pub fn load(&mut self, bytes: &[u8], user: bool) -> Result<(), KvmError> {
        self.cpu = state(user);
        Ok(self.space.pool().write(self.code.at(0), bytes)?)
    }

    /// Enters where the guest is.
    ///
    /// # Errors
    /// As [`KvmVcpu::enter`].
    pub fn enter(&mut self) -> Result<KvmExit, KvmError> {
        self.vcpu.enter(&mut self.cpu, self.space.root, false)
    }

    /// Loads and enters `bytes` at CPL 3.
    ///
    /// # Errors
    /// As [`KvmVcpu::enter`].
    pub fn run(&mut self, bytes: &[u8]) -> Result<KvmExit, KvmError> {
        self.load(bytes, true)?;
        self.enter()
    }

    /// Another root, with the same tables under it.
    ///
    /// # Errors
    /// When the pool is used up.
    pub fn second_root(&mut self) -> Result<Mpa, KvmError> {
        let other = self.space.frame()?.at(0);
        for entry in 0..512 {
            let value = self.space.pool().load(Mpa(self.space.root.0 + entry * 8))?;
            self.space.pool().store(Mpa(other.0 + entry * 8), value)?;
        }
        Ok(other)
    }

    /// The quadword at `offset` of the data page.
    ///
    /// # Errors
    /// When it is not aligned.
    pub fn data_word(&self, offset: u32) -> Result<u64, PoolError> {
        self.space.pool().load(self.data.at(offset))
    }
}

/// A table's bytes.
pub fn table_bytes(table: &[u64]) -> Vec<u8> {
    table.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Flat segments at CPL 3 or 0, at the start of the code page, ESP at the stack's end, EDI and ESI at the data.
pub fn state(user: bool) -> CpuState {
    let mut cpu = CpuState::flat_protected_mode(CODE.0);
    let (code, data) = if user { (USER_CODE, USER_DATA) } else { (KERNEL_CODE, KERNEL_DATA) };
    for segment in &mut cpu.seg {
        *segment = decode(data, GDT[usize::from(data >> 3)]);
    }
    cpu.seg[Seg::Cs as usize] = decode(code, GDT[usize::from(code >> 3)]);
    cpu.cpl = if user { 3 } else { 0 };
    cpu.cr0 |= crate::cpu::cr0::PG;
    cpu.cr4 = crate::cpu::cr4::OSFXSR;
    cpu.gpr[4] = STACK_END.0;
    (cpu.gpr[6], cpu.gpr[7]) = (DATA.0, DATA.0);
    cpu
}
