//! The image: every byte of the firmware's frames, and the entry by which a root maps them.
//!
//! Story: the backend writes the image once, into the first frames of the machine pool, before any vCPU runs.
//! Holds: FW-1 to FW-3 (see the crate). Limits: [`VCPUS_MAX`] vCPUs.
//!
//! ```text
//!   offset 0   stubs, flush             R-X   2 pages
//!              IDT                      R--   1 page
//!              vCPU 0: TSS and stack    RW-   1 page
//!                      GDT kernel, GDT user, LDT kernel, LDT user   R--   4 x 64 KiB
//!              vCPU 1: ...
//!              page tables: PDPT, PD, PT, PT ...    not mapped
//! ```
//!
//! The CPU never writes a descriptor table: accessed bits are preset and TR is never loaded by LTR.

use std::fmt;

use crate::blob;
use crate::constants::*;
use crate::descriptor;

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const NX: u64 = 1 << 63;

/// Why a [`Layout`] cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutError {
    /// The vCPUs that were asked for.
    pub vcpus: u32,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vCPUs were asked for; 1 to {VCPUS_MAX} are possible", self.vcpus)
    }
}

impl std::error::Error for LayoutError {}

/// Doors of the image that tests open, to see that the attack on each then succeeds. All are closed by default.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageDoors {
    /// U=1 at every level: code at CPL 3 could reach the firmware's pages.
    pub user_pages: bool,
    /// The descriptor at [`CODE_SELECTOR`] has DPL 3 (and the gates use [`SPARE_SELECTOR`]).
    pub user_code_selector: bool,
    /// The I/O map lies within the TSS's limit and permits every port below 512.
    pub io_map: bool,
}

/// Where everything is, for a number of vCPUs.
#[derive(Clone, Debug)]
pub struct Layout {
    vcpus: u32,
    doors: ImageDoors,
}

/// Where one vCPU's part of the image is: offsets within the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuLayout {
    block: u64,
}

impl VcpuLayout {
    /// The TSS.
    pub fn tss(&self) -> u64 {
        self.block + VCPU_TSS
    }

    /// The stack's top: what RSP0 holds.
    pub fn stack_top(&self) -> u64 {
        self.block + VCPU_STACK_TOP
    }

    /// The frame that a stub leaves when it interrupted the guest: [`FRAME_BYTES`] below the stack's top.
    pub fn frame(&self) -> u64 {
        self.stack_top() - FRAME_BYTES
    }

    /// The GDT for guest-user mode or guest-kernel mode.
    pub fn gdt(&self, user: bool) -> u64 {
        self.block + VCPU_TABLES + if user { TABLE_BYTES } else { 0 }
    }

    /// The LDT for guest-user mode or guest-kernel mode.
    pub fn ldt(&self, user: bool) -> u64 {
        self.gdt(user) + 2 * TABLE_BYTES
    }
}

impl Layout {
    /// A layout for `vcpus` vCPUs, every door closed.
    ///
    /// # Errors
    /// When `vcpus` is 0 or above [`VCPUS_MAX`].
    pub fn new(vcpus: u32) -> Result<Layout, LayoutError> {
        Layout::with_doors(vcpus, ImageDoors::default())
    }

    /// A layout with doors opened, for the tests that attack them.
    #[doc(hidden)]
    pub fn with_doors(vcpus: u32, doors: ImageDoors) -> Result<Layout, LayoutError> {
        if (1..=VCPUS_MAX).contains(&vcpus) {
            Ok(Layout { vcpus, doors })
        } else {
            Err(LayoutError { vcpus })
        }
    }

    /// The number of vCPUs.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// 4 KiB frames that the image takes, contiguous in machine memory.
    pub fn frames(&self) -> u64 {
        self.pages_mapped() + 2 + self.page_tables()
    }

    /// Where vCPU `index` (below [`Layout::vcpus`]) has its TSS, stack and descriptor tables.
    pub fn vcpu(&self, index: u32) -> VcpuLayout {
        debug_assert!(index < self.vcpus);
        VcpuLayout { block: VCPUS + u64::from(index) * VCPU_BYTES }
    }

    /// Offset of the TSS's last byte: the limit of the task register.
    pub fn tss_limit(&self) -> u32 {
        const MAP_OF_512_PORTS: u64 = 512 / 8 + 1;
        (TSS_BYTES + if self.doors.io_map { MAP_OF_512_PORTS } else { 0 }) as u32 - 1
    }

    /// The entry that `PML4[256]` of every root must hold, for an image at machine address `base`.
    pub fn pml4_entry(&self, base: u64) -> u64 {
        self.table_entry(base + self.pdpt())
    }

    /// Writes the image for machine address `base` (a multiple of 4096) by calls of `put` with an offset and
    /// bytes. Bytes that are not put are to be zero.
    ///
    /// # Errors
    /// The first error of `put`.
    pub fn write<E>(&self, base: u64, mut put: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        put(STUBS, blob::code())?;
        put(IDT, &self.idt())?;
        for index in 0..self.vcpus {
            let vcpu = self.vcpu(index);
            put(vcpu.tss(), &self.tss(&vcpu))?;
            for user in [false, true] {
                let selectors = vcpu.gdt(user) + u64::from(FIRMWARE_SELECTORS);
                put(selectors, &bytes(&self.firmware_descriptors(&vcpu)))?;
            }
        }
        self.write_page_tables(base, put)
    }

    fn write_page_tables<E>(
        &self,
        base: u64,
        mut put: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (pdpt, pd, pt) = (self.pdpt(), self.pdpt() + PAGE, self.pdpt() + 2 * PAGE);
        put(pdpt, &self.table_entry(base + pd).to_le_bytes())?;
        for table in 0..self.page_tables() {
            put(pd + table * 8, &self.table_entry(base + pt + table * PAGE).to_le_bytes())?;
        }
        for page in 0..self.pages_mapped() {
            put(pt + page * 8, &self.leaf_entry(base, page).to_le_bytes())?;
        }
        Ok(())
    }

    fn pages_mapped(&self) -> u64 {
        (VCPUS + u64::from(self.vcpus) * VCPU_BYTES) / PAGE
    }

    fn page_tables(&self) -> u64 {
        self.pages_mapped().div_ceil(512)
    }

    fn pdpt(&self) -> u64 {
        self.pages_mapped() * PAGE
    }

    fn user_bit(&self) -> u64 {
        if self.doors.user_pages { U } else { 0 }
    }

    fn table_entry(&self, address: u64) -> u64 {
        address | P | W | A | self.user_bit()
    }

    fn leaf_entry(&self, base: u64, page: u64) -> u64 {
        let offset = page * PAGE;
        let in_block = offset.checked_sub(VCPUS).map(|within| within % VCPU_BYTES);
        let rights = match in_block {
            None if offset < CODE_BYTES => 0,
            Some(within) if within < VCPU_TABLES => W | D | NX,
            _ => NX,
        };
        (base + offset) | P | A | rights | self.user_bit()
    }

    fn gate_selector(&self) -> u16 {
        if self.doors.user_code_selector { SPARE_SELECTOR } else { CODE_SELECTOR }
    }

    /// The selector with which the backend enters firmware code.
    pub fn code_selector(&self) -> u16 {
        self.gate_selector()
    }

    fn idt(&self) -> Vec<u8> {
        let stub = |vector| UPPER_BASE + STUBS + vector * STUB_BYTES;
        (0..VECTORS)
            .flat_map(|vector| bytes(&descriptor::interrupt_gate(stub(vector), self.gate_selector())))
            .collect()
    }

    fn tss(&self, vcpu: &VcpuLayout) -> [u8; TSS_BYTES as usize] {
        let mut tss = [0; TSS_BYTES as usize];
        tss[4..12].copy_from_slice(&(UPPER_BASE + vcpu.stack_top()).to_le_bytes());
        tss[102..104].copy_from_slice(&(TSS_BYTES as u16).to_le_bytes());
        tss
    }

    /// The GDT's entries from [`FIRMWARE_SELECTORS`] on: spare, code, TSS (two).
    fn firmware_descriptors(&self, vcpu: &VcpuLayout) -> [u64; 4] {
        let [low, high] = descriptor::tss64(UPPER_BASE + vcpu.tss(), self.tss_limit());
        match self.doors.user_code_selector {
            false => [0, descriptor::code64(0), low, high],
            true => [descriptor::code64(0), descriptor::code64(3), low, high],
        }
    }
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x40_0000;

    fn image(layout: &Layout) -> Vec<u8> {
        let mut image = vec![0; (layout.frames() * PAGE) as usize];
        let put = |offset: u64, bytes: &[u8]| -> Result<(), ()> {
            let at = offset as usize;
            image[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        layout.write(BASE, put).unwrap();
        image
    }

    fn word(image: &[u8], at: u64) -> u64 {
        u64::from_le_bytes(image[at as usize..at as usize + 8].try_into().unwrap())
    }

    /// Walks a linear address; gives the offset it maps to and the entries met on the way.
    fn walk(layout: &Layout, image: &[u8], linear: u64) -> Option<(u64, Vec<u64>)> {
        assert_eq!((linear >> 39 & 511) as usize, PML4_SLOT);
        let mut entries = vec![layout.pml4_entry(BASE)];
        for shift in [30, 21, 12] {
            let table = (entries.last()? & 0x000f_ffff_ffff_f000) - BASE;
            let entry = word(image, table + (linear >> shift & 511) * 8);
            if entry & P == 0 {
                return None;
            }
            entries.push(entry);
        }
        Some(((entries.last()? & 0x000f_ffff_ffff_f000) - BASE, entries))
    }

    #[test]
    fn layout_of_no_or_too_many_vcpus_is_refused() {
        assert_eq!(Layout::new(0).unwrap_err(), LayoutError { vcpus: 0 });
        assert_eq!(Layout::new(VCPUS_MAX + 1).unwrap_err(), LayoutError { vcpus: VCPUS_MAX + 1 });
    }

    #[test]
    fn every_page_is_mapped_where_it_is_without_user_and_never_both_writable_and_executable() {
        for vcpus in [1, 2, 8, VCPUS_MAX] {
            let layout = Layout::new(vcpus).unwrap();
            let image = image(&layout);
            for page in 0..layout.pages_mapped() {
                let (offset, entries) = walk(&layout, &image, UPPER_BASE + page * PAGE).unwrap();
                assert_eq!(offset, page * PAGE);
                assert!(entries.iter().all(|entry| entry & U == 0), "FW-1: page {page}");
                let leaf = entries[3];
                assert_eq!(leaf & NX == 0, page * PAGE < CODE_BYTES, "FW-1: page {page}");
                assert!(leaf & W == 0 || leaf & NX != 0, "FW-1: page {page}");
            }
            assert_eq!(walk(&layout, &image, UPPER_BASE + layout.pages_mapped() * PAGE), None);
        }
    }

    #[test]
    fn only_the_page_of_stack_and_tss_is_writable() {
        let layout = Layout::new(2).unwrap();
        let image = image(&layout);
        let writable: Vec<u64> = (0..layout.pages_mapped())
            .filter(|page| walk(&layout, &image, UPPER_BASE + page * PAGE).unwrap().1[3] & W != 0)
            .collect();
        assert_eq!(writable, [layout.vcpu(0).tss() / PAGE, layout.vcpu(1).tss() / PAGE]);
    }

    #[test]
    fn gates_lead_to_their_stubs_with_dpl_0() {
        let layout = Layout::new(1).unwrap();
        let image = image(&layout);
        for vector in 0..VECTORS {
            let (low, high) = (word(&image, IDT + vector * 16), word(&image, IDT + vector * 16 + 8));
            let offset = low & 0xffff | low >> 48 << 16 | high << 32;
            assert_eq!(offset, UPPER_BASE + STUBS + vector * STUB_BYTES);
            assert_eq!(low >> 16 & 0xffff, u64::from(CODE_SELECTOR));
            assert_eq!(low >> 40 & 0xff, 0x8e, "FW-2: present, DPL 0, interrupt gate");
        }
    }

    #[test]
    fn each_tss_names_its_stack_and_no_io_map() {
        let layout = Layout::new(3).unwrap();
        let image = image(&layout);
        for index in 0..3 {
            let vcpu = layout.vcpu(index);
            assert_eq!(word(&image, vcpu.tss() + 4), UPPER_BASE + vcpu.stack_top());
            let map = u64::from(u16::from_le_bytes(
                image[vcpu.tss() as usize + 102..vcpu.tss() as usize + 104].try_into().unwrap(),
            ));
            assert!(map > u64::from(layout.tss_limit()), "FW-3");
            let descriptor = word(&image, vcpu.gdt(true) + u64::from(TSS_SELECTOR));
            assert_eq!(descriptor >> 16 & 0xff_ffff, (UPPER_BASE + vcpu.tss()) & 0xff_ffff);
            assert_eq!(descriptor >> 45 & 3, 0, "FW-2");
        }
    }

    #[test]
    fn gdts_hold_nothing_but_the_firmwares_own() {
        let layout = Layout::new(2).unwrap();
        let image = image(&layout);
        for user in [false, true] {
            let gdt = layout.vcpu(1).gdt(user);
            for entry in 0..u64::from(FIRMWARE_SELECTORS) / 8 {
                assert_eq!(word(&image, gdt + entry * 8), 0);
            }
            assert_eq!(word(&image, gdt + u64::from(SPARE_SELECTOR)), 0);
            assert_eq!(word(&image, gdt + u64::from(CODE_SELECTOR)), descriptor::code64(0));
        }
    }

    #[test]
    fn blocks_do_not_overlap_and_tables_are_apart() {
        let layout = Layout::new(2).unwrap();
        let (a, b) = (layout.vcpu(0), layout.vcpu(1));
        let places = [a.tss(), a.gdt(false), a.gdt(true), a.ldt(false), a.ldt(true), b.tss(), b.gdt(false)];
        assert!(places.is_sorted_by(|x, y| x < y));
        assert_eq!(a.ldt(true) + TABLE_BYTES, b.tss());
        assert_eq!(a.stack_top(), a.gdt(false));
    }
}
