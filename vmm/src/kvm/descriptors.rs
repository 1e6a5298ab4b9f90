//! Descriptor translation: the guest's GDT and LDT as compatibility mode at CPL 3 may see them.
//!
//! Story: the guest's kernel runs at CPL 3, so its DPL 0 descriptors would not load. The vCPU therefore has tables
//! of its own, two of each (one per guest mode), in the firmware's image; this module fills them from the guest's
//! whenever those may have changed. [`translate`] is the rule, [`Tables`] the bookkeeping.
//!
//! ```text
//!                         guest-kernel mode (CPL 0)      guest-user mode (CPL 3)
//!   data, DPL 0..2        DPL 3                          hidden
//!   data, DPL 3           as it is                       as it is
//!   code, DPL 0           DPL 3                          hidden
//!   code, DPL 1, 2        hidden                         hidden
//!   code, DPL 3           hidden: IRET to user traps     as it is
//!   conforming code       hidden (1)                     DPL 3 (2)
//!   L=1, S=0, P=0         hidden                         hidden
//! ```
//!
//! Bit L of a data descriptor means nothing and is cleared. (1) A return to it with RPL 3 is a return to user mode, which must trap. (2) At CPL 3 any DPL of it will do.
//!
//! Holds:
//! - DT-1: nothing translated has L=1, S=0, DPL below 3 or A=0. (A preset means that no load writes the table; the
//!   guest's own descriptor does not get its A bit from a native load.)
//! - DT-2: what is hidden is zero. Using it is #GP, whereupon the VMM looks at the guest's own table and decides.
//! - DT-3: entries from [`FIRMWARE_SELECTORS`] on are the firmware's and are never written here.
//! - DT-4: while a CPL's tables are loaded, the descriptor of a CS or SS whose hidden part is older than the table is
//!   hidden (see [`Tables::mask_stale`]), so that a trap frame's selector always names one hidden part.

use umbra_firmware::VcpuLayout;
use umbra_firmware::constants::FIRMWARE_SELECTORS;
use umbra_firmware::descriptor::bits;
use umbra_mmu::Mpa;

use crate::cpu::Segment;
use crate::machine::{Pool, PoolError};

use super::doors::Doors;

/// In which of its two worlds the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Virtual CPL 0.
    Kernel,
    /// Virtual CPL 3.
    User,
}

impl Mode {
    /// Both.
    pub const ALL: [Mode; 2] = [Mode::Kernel, Mode::User];

    /// The mode of virtual privilege level `cpl`.
    pub fn of_cpl(cpl: u8) -> Mode {
        if cpl == 3 { Mode::User } else { Mode::Kernel }
    }

    /// True for [`Mode::User`].
    pub fn user(self) -> bool {
        self == Mode::User
    }
}

/// The guest's `descriptor` as the CPU may see it in `mode`; 0 hides it.
pub fn translate(descriptor: u64, mode: Mode, doors: &Doors) -> u64 {
    let open = doors.open();
    if descriptor & bits::PRESENT == 0 {
        return 0;
    }
    if descriptor & bits::SEGMENT == 0 {
        return if open.system_descriptors { descriptor } else { 0 };
    }
    let (long, code) = (descriptor & bits::LONG != 0, descriptor & bits::CODE != 0);
    if !visible(descriptor, mode) || (long && code && !open.long_code) {
        return 0;
    }
    let shown = descriptor | bits::DPL | bits::ACCESSED;
    if code { shown } else { shown & !bits::LONG }
}

fn visible(descriptor: u64, mode: Mode) -> bool {
    let code = descriptor & bits::CODE != 0;
    let conforming = code && descriptor & bits::CONFORMING != 0;
    let dpl = descriptor >> 45 & 3;
    match mode {
        Mode::Kernel => !code || (!conforming && dpl == 0),
        Mode::User => conforming || dpl == 3,
    }
}

/// The segment register that loading `selector` with `descriptor` gives, as the guest sees it.
pub fn decode(selector: u16, descriptor: u64) -> Segment {
    let low_limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let limit = if descriptor & bits::GRANULAR != 0 { low_limit << 12 | 0xfff } else { low_limit };
    Segment {
        selector,
        base: (descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000) as u32,
        limit,
        attributes: (descriptor >> 40) as u16 & 0xf0ff,
        unusable: false,
    }
}

/// Bit 2 of a selector: the table is the LDT.
const TABLE_INDICATOR: u16 = 4;

/// A place in the translated tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    mode: Mode,
    local: bool,
    index: usize,
}

/// One vCPU's translated tables: what the guest's own hold, and which entries are masked now.
#[derive(Debug)]
pub struct Tables {
    layout: VcpuLayout,
    image: Mpa,
    doors: Doors,
    gdt: Vec<u64>,
    ldt: Option<Vec<u64>>,
    masked: Vec<Place>,
}

impl Tables {
    /// Empty tables for the vCPU at `layout` of the image at `image`.
    pub fn new(layout: VcpuLayout, image: Mpa, doors: Doors) -> Tables {
        Tables { layout, image, doors, gdt: Vec::new(), ldt: None, masked: Vec::new() }
    }

    /// The guest's tables are now `gdt` and `ldt` (of limit + 1 bytes; a descriptor that is not whole is none).
    /// Entries that did not change are not written.
    ///
    /// # Errors
    /// When the image does not lie in `pool`, which is a bug.
    pub fn set(&mut self, pool: &Pool, gdt: &[u8], ldt: Option<&[u8]>) -> Result<(), PoolError> {
        let old = std::mem::replace(&mut self.gdt, parse(gdt));
        self.write_changes(pool, false, &old, &self.gdt)?;
        let old = std::mem::replace(&mut self.ldt, ldt.map(parse));
        let (old, new) = (old.as_deref().unwrap_or_default(), self.ldt.as_deref().unwrap_or_default());
        self.write_changes(pool, true, old, new)
    }

    /// The limit for LDTR while the guest has an LDT.
    pub fn ldt_limit(&self) -> Option<u32> {
        let entries = self.ldt.as_ref()?.len();
        (entries > 0).then(|| entries as u32 * 8 - 1)
    }

    /// The guest's own descriptor for `selector`, if its table holds one.
    pub fn find(&self, selector: u16) -> Option<u64> {
        let table = if local(selector) { self.ldt.as_deref()? } else { &self.gdt };
        if selector & !3 == 0 { None } else { table.get(index(selector)).copied() }
    }

    /// Hides the descriptors of those of `loaded` (CS and SS) whose hidden part is not what their selector would
    /// load now, and shows those that were hidden before. Usually there are none and nothing is written.
    ///
    /// # Errors
    /// When the image does not lie in `pool`, which is a bug.
    pub fn mask_stale(&mut self, pool: &Pool, mode: Mode, loaded: [&Segment; 2]) -> Result<(), PoolError> {
        while let Some(place) = self.masked.pop() {
            let table = if place.local { self.ldt.as_deref().unwrap_or_default() } else { &self.gdt };
            let descriptor = table.get(place.index).copied().unwrap_or(0);
            self.write(pool, place, translate(descriptor, place.mode, &self.doors))?;
        }
        for segment in loaded {
            if self.stale(mode, segment) {
                let selector = segment.selector;
                let place = Place { mode, local: local(selector), index: index(selector) };
                self.write(pool, place, 0)?;
                self.masked.push(place);
            }
        }
        Ok(())
    }

    fn stale(&self, mode: Mode, loaded: &Segment) -> bool {
        let Some(descriptor) = self.find(loaded.selector) else { return false };
        translate(descriptor, mode, &self.doors) != 0
            && !same_hidden_part(loaded, &decode(loaded.selector, descriptor))
    }

    fn write_changes(&self, pool: &Pool, local: bool, old: &[u64], new: &[u64]) -> Result<(), PoolError> {
        for index in 0..old.len().max(new.len()) {
            let now = new.get(index).copied().unwrap_or(0);
            if old.get(index).copied().unwrap_or(0) != now {
                for mode in Mode::ALL {
                    let place = Place { mode, local, index };
                    self.write(pool, place, translate(now, mode, &self.doors))?;
                }
            }
        }
        Ok(())
    }

    fn write(&self, pool: &Pool, place: Place, descriptor: u64) -> Result<(), PoolError> {
        let null = !place.local && place.index == 0;
        if null || (!place.local && place.index >= usize::from(FIRMWARE_SELECTORS) / 8) {
            return Ok(());
        }
        let user = place.mode.user();
        let table = if place.local { self.layout.ldt(user) } else { self.layout.gdt(user) };
        pool.store(Mpa(self.image.0 + table + place.index as u64 * 8), descriptor)
    }
}

fn local(selector: u16) -> bool {
    selector & TABLE_INDICATOR != 0
}

fn index(selector: u16) -> usize {
    usize::from(selector >> 3)
}

fn parse(table: &[u8]) -> Vec<u64> {
    table.as_chunks::<8>().0.iter().take(8192).map(|bytes| u64::from_le_bytes(*bytes)).collect()
}

/// True where two loads of one selector left the same: base, limit, type but for A, D/B.
fn same_hidden_part(a: &Segment, b: &Segment) -> bool {
    a.base == b.base && a.limit == b.limit && a.kind() | 1 == b.kind() | 1 && a.big() == b.big()
}

#[cfg(test)]
mod tests {
    use umbra_firmware::Layout;
    use umbra_firmware::constants::{CODE_SELECTOR, TSS_SELECTOR};

    use super::*;
    use crate::kvm::doors::OpenDoors;

    const FLAT_KERNEL_CODE: u64 = 0x00cf_9a00_0000_ffff;
    const FLAT_KERNEL_DATA: u64 = 0x00cf_9200_0000_ffff;
    const FLAT_USER_CODE: u64 = 0x00cf_fa00_0000_ffff;
    const FLAT_USER_DATA: u64 = 0x00cf_f200_0000_ffff;

    fn closed(descriptor: u64, mode: Mode) -> u64 {
        translate(descriptor, mode, &Doors::closed())
    }

    /// What the table in the module's header says, written down a second time.
    fn expected(kind: u64, segment: bool, dpl: u64, present: bool, long: bool, mode: Mode) -> Option<u64> {
        let code = kind & 8 != 0;
        let conforming = code && kind & 4 != 0;
        if !present || !segment || (long && code) {
            return None;
        }
        let shown = match (mode, code, conforming) {
            (Mode::Kernel, false, _) => true,
            (Mode::Kernel, true, true) => false,
            (Mode::Kernel, true, false) => dpl == 0,
            (Mode::User, _, true) => true,
            (Mode::User, _, false) => dpl == 3,
        };
        shown.then_some(kind | 1)
    }

    #[test]
    fn matrix_every_descriptor_type_in_both_modes() {
        let mut shown = 0;
        for case in 0..1u64 << 9 {
            let (kind, segment, dpl) = (case & 15, case & 16 != 0, case >> 5 & 3);
            let (present, long) = (case & 128 != 0, case & 256 != 0);
            // Base 0x12345678, limit 0xabcde, G, D/B and AVL set: what must pass through unchanged.
            let rest = 0x12da_0034_5678_bcde | u64::from(long) << 53;
            let descriptor =
                rest | kind << 40 | u64::from(segment) << 44 | dpl << 45 | u64::from(present) << 47;
            for mode in Mode::ALL {
                let want = expected(kind, segment, dpl, present, long, mode)
                    .map_or(0, |kind| rest & !bits::LONG | kind << 40 | 1 << 44 | 3 << 45 | 1 << 47);
                assert_eq!(closed(descriptor, mode), want, "{descriptor:#018x} {mode:?}");
                shown += usize::from(want != 0);
            }
        }
        // 16 types: 8 data, 4 code, 4 conforming code, some shown at some DPL; the count guards the matrix itself.
        assert_eq!(shown, (32 * 2 + 4) + (8 * 2 + 4 + 16));
    }

    #[test]
    fn flat_descriptors_of_a_usual_kernel() {
        assert_eq!(closed(FLAT_KERNEL_CODE, Mode::Kernel), 0x00cf_fb00_0000_ffff);
        assert_eq!(closed(FLAT_KERNEL_DATA, Mode::Kernel), 0x00cf_f300_0000_ffff);
        assert_eq!(closed(FLAT_USER_CODE, Mode::Kernel), 0);
        assert_eq!(closed(FLAT_USER_DATA, Mode::Kernel), 0x00cf_f300_0000_ffff);
        assert_eq!(closed(FLAT_KERNEL_CODE, Mode::User), 0);
        assert_eq!(closed(FLAT_KERNEL_DATA, Mode::User), 0);
        assert_eq!(closed(FLAT_USER_CODE, Mode::User), 0x00cf_fb00_0000_ffff);
        assert_eq!(closed(FLAT_USER_DATA, Mode::User), 0x00cf_f300_0000_ffff);
    }

    #[test]
    fn decode_takes_a_descriptor_apart() {
        let segment = decode(0x33, 0x12da_f334_5678_bcde);
        assert_eq!((segment.base, segment.limit), (0x1234_5678, 0xabcd_efff));
        assert_eq!((segment.attributes, segment.dpl(), segment.big()), (0xd0f3, 3, true));
        assert_eq!(decode(0, 0x0040_9200_0000_0067).limit, 0x67);
    }

    struct Fixture {
        pool: Pool,
        tables: Tables,
        layout: VcpuLayout,
        image: Mpa,
    }

    fn fixture() -> Fixture {
        let layout = Layout::new(1).unwrap();
        let image = Mpa(0x1000);
        let pool = Pool::new(layout.frames() + 1).unwrap();
        layout.write(image.0, |offset, bytes| pool.write(Mpa(image.0 + offset), bytes)).unwrap();
        let layout = layout.vcpu(0);
        Fixture { pool, tables: Tables::new(layout, image, Doors::closed()), layout, image }
    }

    impl Fixture {
        fn set(&mut self, gdt: &[u64], ldt: Option<&[u64]>) {
            let bytes = |table: &[u64]| table.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
            self.tables.set(&self.pool, &bytes(gdt), ldt.map(bytes).as_deref()).unwrap();
        }

        fn gdt(&self, mode: Mode, selector: u16) -> u64 {
            let table = self.image.0 + self.layout.gdt(mode.user());
            self.pool.load(Mpa(table + u64::from(selector & !7))).unwrap()
        }

        fn ldt(&self, mode: Mode, selector: u16) -> u64 {
            let table = self.image.0 + self.layout.ldt(mode.user());
            self.pool.load(Mpa(table + u64::from(selector & !7))).unwrap()
        }
    }

    #[test]
    fn tables_follow_the_guests() {
        let mut f = fixture();
        f.set(&[0, FLAT_KERNEL_CODE, FLAT_KERNEL_DATA, FLAT_USER_CODE], Some(&[FLAT_USER_DATA]));
        assert_ne!(f.gdt(Mode::Kernel, 0x08), 0);
        assert_eq!(f.gdt(Mode::User, 0x08), 0);
        assert_ne!(f.gdt(Mode::User, 0x18), 0);
        assert_ne!(f.ldt(Mode::User, 0x04), 0, "entry 0 of an LDT is an entry like others");
        assert_eq!(f.tables.ldt_limit(), Some(7));
        assert_eq!(f.tables.find(0x1b), Some(FLAT_USER_CODE));
        assert_eq!(f.tables.find(0x07), Some(FLAT_USER_DATA));
        f.set(&[0, FLAT_KERNEL_DATA], None);
        assert_eq!(f.gdt(Mode::Kernel, 0x08), 0x00cf_f300_0000_ffff);
        assert_eq!((f.gdt(Mode::User, 0x18), f.ldt(Mode::User, 0x04)), (0, 0), "what is gone is hidden");
        assert_eq!((f.tables.ldt_limit(), f.tables.find(0x07), f.tables.find(0x18)), (None, None, None));
    }

    #[test]
    fn null_descriptor_and_halves_are_none() {
        let mut f = fixture();
        f.set(&[FLAT_USER_DATA, FLAT_USER_DATA], None);
        assert_eq!((f.gdt(Mode::User, 0), f.tables.find(0), f.tables.find(3)), (0, None, None));
        let mut table = FLAT_USER_DATA.to_le_bytes().repeat(2);
        table.truncate(15);
        f.tables.set(&f.pool, &table, Some(&[])).unwrap();
        assert_eq!((f.gdt(Mode::User, 8), f.tables.ldt_limit()), (0, None));
    }

    #[test]
    fn firmware_selectors_survive_a_full_table() {
        let mut f = fixture();
        let before: Vec<u64> =
            (0..4).map(|entry| f.gdt(Mode::User, FIRMWARE_SELECTORS + entry * 8)).collect();
        f.set(&vec![FLAT_USER_CODE; 8192], None);
        assert_ne!(f.gdt(Mode::User, FIRMWARE_SELECTORS - 8), 0);
        let after: Vec<u64> = (0..4).map(|entry| f.gdt(Mode::User, FIRMWARE_SELECTORS + entry * 8)).collect();
        assert_eq!(before, after, "DT-3");
        f.set(&[], None);
        assert_ne!(f.gdt(Mode::User, CODE_SELECTOR) | f.gdt(Mode::User, TSS_SELECTOR), 0);
        assert_eq!(f.gdt(Mode::User, FIRMWARE_SELECTORS - 8), 0);
    }

    #[test]
    fn stale_cs_or_ss_is_masked_and_unmasked() {
        let mut f = fixture();
        f.set(&[0, FLAT_KERNEL_CODE, FLAT_KERNEL_DATA], None);
        let (cs, ss) = (decode(8, FLAT_KERNEL_CODE | bits::ACCESSED), decode(0x10, FLAT_KERNEL_DATA));
        f.tables.mask_stale(&f.pool, Mode::Kernel, [&cs, &ss]).unwrap();
        assert_ne!(f.gdt(Mode::Kernel, 0x10), 0, "the A bit alone makes nothing stale");
        f.set(&[0, FLAT_KERNEL_CODE, FLAT_KERNEL_DATA | 0x1000 << 16], None);
        f.tables.mask_stale(&f.pool, Mode::Kernel, [&cs, &ss]).unwrap();
        assert_eq!(f.gdt(Mode::Kernel, 0x10), 0, "DT-4");
        assert_ne!(f.gdt(Mode::Kernel, 0x08), 0);
        let reloaded = decode(0x10, FLAT_KERNEL_DATA | 0x1000 << 16);
        f.tables.mask_stale(&f.pool, Mode::Kernel, [&cs, &reloaded]).unwrap();
        assert_ne!(f.gdt(Mode::Kernel, 0x10), 0);
    }

    #[test]
    fn open_doors_let_pass_what_they_name_and_no_more() {
        let gate = 0x0000_ec00_0008_0000;
        let long = 0x00af_fb00_0000_ffff;
        let gates = Doors::opened(OpenDoors { system_descriptors: true, ..OpenDoors::default() });
        let longs = Doors::opened(OpenDoors { long_code: true, ..OpenDoors::default() });
        assert_eq!(translate(gate, Mode::User, &gates), gate);
        assert_eq!(translate(long, Mode::User, &gates), 0);
        assert_eq!(translate(long, Mode::User, &longs), long);
        assert_eq!(translate(gate, Mode::User, &longs), 0);
    }
}
