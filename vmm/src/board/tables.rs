//! What firmware leaves in memory for kernels that look for their CPUs: an ACPI MADT, and an MP table for older ones.
//!
//! ```text
//! f0000  RSDP --> RSDT --+
//!          +----> XSDT --+--> MADT
//! f0040  MP floating pointer --> MP configuration table
//! ```
//!
//! Both say the same: the local APICs, the two IOAPICs, that the timer's line 0 is pin 2, and NMI at LINT1. There is no FADT
//! and no AML: power management is not theirs to find.
//!
//! See: ACPI specification 6.5, 5.2.5 to 5.2.12; Intel MultiProcessor Specification 1.4, chapter 4.

use super::{GSI_ISA_END, IOAPIC_PAGES, PIN_OF_GSI_0, ioapic, lapic};
use crate::cpu::cpuid;

/// Where kernels look: the read-only memory of a BIOS, at multiples of 16.
const START: u32 = 0xf_0000;
const RSDP_BYTES: usize = 36;
const MP_POINTER_AT: usize = 0x40;
const FIRST_TABLE_AT: usize = 0x80;

const OEM: &[u8; 6] = b"UMBRA ";
const OEM_TABLE: &[u8; 8] = b"UMBRABRD";
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x20;
/// The only bus, as an MP table counts them.
const ISA: u8 = 0;
/// A destination that means all local APICs.
const ALL: u8 = 0xff;
/// Polarity and trigger as the bus has them.
const AS_THE_BUS: u16 = 0;

/// The tables for `vcpus` CPUs: guest-physical address, and bytes. In memory that firmware calls reserved.
pub fn firmware_tables(vcpus: usize) -> (u32, Vec<u8>) {
    let mut block = Block { bytes: vec![0; FIRST_TABLE_AT] };
    let madt = block.append(&madt(vcpus));
    let rsdt = block.append(&sdt(b"RSDT", 1, &madt.to_le_bytes()));
    let xsdt = block.append(&sdt(b"XSDT", 1, &u64::from(madt).to_le_bytes()));
    let mp = block.append(&mp_table(vcpus));
    block.bytes[..RSDP_BYTES].copy_from_slice(&rsdp(rsdt, xsdt));
    block.bytes[MP_POINTER_AT..MP_POINTER_AT + 16].copy_from_slice(&mp_pointer(mp));
    (START, block.bytes)
}

struct Block {
    bytes: Vec<u8>,
}

impl Block {
    /// Puts a table at the next multiple of 16; gives its address.
    fn append(&mut self, table: &[u8]) -> u32 {
        let at = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(table);
        START + at as u32
    }
}

/// Sets the byte at `at` so that all of `bytes` come to 0.
fn seal(bytes: &mut [u8], at: usize) {
    bytes[at] = 0;
    bytes[at] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
}

fn rsdp(rsdt: u32, xsdt: u32) -> Vec<u8> {
    let mut bytes = b"RSD PTR \0".to_vec();
    bytes.extend_from_slice(OEM);
    bytes.push(2);
    bytes.extend_from_slice(&rsdt.to_le_bytes());
    bytes.extend_from_slice(&(RSDP_BYTES as u32).to_le_bytes());
    bytes.extend_from_slice(&u64::from(xsdt).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    seal(&mut bytes[..20], 8);
    seal(&mut bytes, 32);
    bytes
}

/// A table with the header that all of ACPI's have.
fn sdt(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER_BYTES: usize = 36;
    let mut bytes = signature.to_vec();
    bytes.extend_from_slice(&((HEADER_BYTES + body.len()) as u32).to_le_bytes());
    bytes.extend_from_slice(&[revision, 0]);
    bytes.extend_from_slice(OEM);
    bytes.extend_from_slice(OEM_TABLE);
    bytes.extend_from_slice(&1u32.to_le_bytes());
    bytes.extend_from_slice(b"UMBR");
    bytes.extend_from_slice(&1u32.to_le_bytes());
    bytes.extend_from_slice(body);
    seal(&mut bytes, 9);
    bytes
}

fn madt(vcpus: usize) -> Vec<u8> {
    const PC_AT_COMPATIBLE: u32 = 1;
    const ENABLED: u32 = 1;
    let mut body = (lapic::BASE_ADDRESS as u32).to_le_bytes().to_vec();
    body.extend_from_slice(&PC_AT_COMPATIBLE.to_le_bytes());
    for id in 0..vcpus as u8 {
        body.extend_from_slice(&[0, 8, id, id]);
        body.extend_from_slice(&ENABLED.to_le_bytes());
    }
    for (number, id, page) in ioapics(vcpus) {
        body.extend_from_slice(&[1, 12, id, 0]);
        body.extend_from_slice(&page.to_le_bytes());
        body.extend_from_slice(&(number * ioapic::PINS as u32).to_le_bytes());
    }
    // The timer's interrupt, ISA's 0, is GSI 2.
    body.extend_from_slice(&[2, 10, 0, 0]);
    body.extend_from_slice(&(PIN_OF_GSI_0 as u32).to_le_bytes());
    body.extend_from_slice(&AS_THE_BUS.to_le_bytes());
    // NMI at LINT1 of all processors.
    body.extend_from_slice(&[4, 6, ALL]);
    body.extend_from_slice(&AS_THE_BUS.to_le_bytes());
    body.push(1);
    sdt(b"APIC", 4, &body)
}

/// Number, ID and page of each IOAPIC. Their IDs follow the local APICs'.
fn ioapics(vcpus: usize) -> impl Iterator<Item = (u32, u8, u32)> {
    (0..).zip(IOAPIC_PAGES).map(move |(number, page)| (number, vcpus as u8 + number as u8, page as u32))
}

fn mp_pointer(table: u32) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend_from_slice(&table.to_le_bytes());
    // One paragraph, of version 1.4, with a table, and no IMCR.
    bytes.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    seal(&mut bytes, 10);
    bytes
}

fn mp_table(vcpus: usize) -> Vec<u8> {
    const HEADER_BYTES: usize = 44;
    const USABLE: u8 = 1;
    const BOOT: u8 = 2;
    let mut body = Vec::new();
    let mut entries = 0u16;
    let mut entry = |bytes: &[u8]| {
        body.extend_from_slice(bytes);
        entries += 1;
    };
    for id in 0..vcpus as u8 {
        let mut bytes = vec![0, id, LAPIC_VERSION, USABLE | if id == 0 { BOOT } else { 0 }];
        bytes.extend_from_slice(&cpuid::SIGNATURE.to_le_bytes());
        bytes.extend_from_slice(&cpuid::leaf1_edx::OFFERED.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        entry(&bytes);
    }
    entry(&[&[1, ISA], b"ISA   ".as_slice()].concat());
    for (_, id, page) in ioapics(vcpus) {
        entry(&[&[2, id, IOAPIC_VERSION, USABLE], page.to_le_bytes().as_slice()].concat());
    }
    // ISA's lines, of which 2 only joins the two 8259s, at the first IOAPIC.
    const INT: u8 = 0;
    for line in (0..GSI_ISA_END as u8).filter(|line| *line != 2) {
        let pin = if line == 0 { PIN_OF_GSI_0 as u8 } else { line };
        entry(&[3, INT, 0, 0, ISA, line, vcpus as u8, pin]);
    }
    const NMI: u8 = 1;
    const EXT_INT: u8 = 3;
    entry(&[4, EXT_INT, 0, 0, ISA, 0, 0, 0]);
    entry(&[4, NMI, 0, 0, ISA, 0, ALL, 1]);

    let mut bytes = b"PCMP".to_vec();
    bytes.extend_from_slice(&((HEADER_BYTES + body.len()) as u16).to_le_bytes());
    bytes.extend_from_slice(&[4, 0]);
    bytes.extend_from_slice(b"UMBRA   BOARD       ");
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(&entries.to_le_bytes());
    bytes.extend_from_slice(&(lapic::BASE_ADDRESS as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    debug_assert_eq!(bytes.len(), HEADER_BYTES);
    bytes.extend_from_slice(&body);
    seal(&mut bytes, 7);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::{MemoryMap, RangeKind, VCPUS_MAX};
    use umbra_mmu::Gpa;

    /// Memory with the tables, read the way a kernel does.
    struct Memory(Vec<u8>);

    impl Memory {
        fn at(&self, address: u32, bytes: usize) -> &[u8] {
            let at = (address - START) as usize;
            &self.0[at..at + bytes]
        }

        fn word(&self, address: u32) -> u32 {
            u32::from_le_bytes(self.at(address, 4).try_into().expect("four bytes"))
        }

        /// Where a structure begins that kernels find by its name, at a multiple of 16.
        fn find(&self, name: &[u8]) -> u32 {
            let at = self.0.chunks(16).position(|piece| piece.starts_with(name)).expect("it is there");
            START + 16 * at as u32
        }

        fn sums_to_zero(&self, address: u32, bytes: u32) -> bool {
            self.at(address, bytes as usize).iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
        }

        fn table(&self, address: u32, signature: &[u8; 4]) -> &[u8] {
            let bytes = self.word(address + 4);
            assert_eq!(self.at(address, 4), signature);
            assert!(self.sums_to_zero(address, bytes));
            self.at(address, bytes as usize)
        }
    }

    #[test]
    fn madt_has_each_cpu_by_either_root() {
        for vcpus in [1, 2, VCPUS_MAX] {
            let memory = Memory(firmware_tables(vcpus).1);
            let rsdp = memory.find(b"RSD PTR ");
            assert!(memory.sums_to_zero(rsdp, 20) && memory.sums_to_zero(rsdp, 36));
            let rsdt = memory.table(memory.word(rsdp + 16), b"RSDT").to_vec();
            let xsdt = memory.table(memory.word(rsdp + 24), b"XSDT").to_vec();
            assert_eq!(rsdt[36..40], xsdt[36..40]);
            let madt = memory.table(u32::from_le_bytes(rsdt[36..40].try_into().expect("four")), b"APIC");
            assert_eq!(madt[36..40], 0xfee0_0000u32.to_le_bytes());
            let mut rest = &madt[44..];
            let (mut cpus, mut ioapics) = (Vec::new(), Vec::new());
            while let [kind, length, ..] = *rest {
                match kind {
                    0 => cpus.push((rest[3], rest[4])),
                    1 => ioapics.push((rest[2], rest[8])),
                    _ => {}
                }
                rest = &rest[usize::from(length)..];
            }
            let wanted: Vec<_> = (0..vcpus as u8).map(|id| (id, 1)).collect();
            assert_eq!(cpus, wanted);
            assert_eq!(ioapics, [(vcpus as u8, 0), (vcpus as u8 + 1, 24)]);
        }
    }

    #[test]
    fn mp_table_has_as_many_entries_as_it_says_and_one_boot_processor() {
        for vcpus in [1, 2, VCPUS_MAX] {
            let memory = Memory(firmware_tables(vcpus).1);
            let pointer = memory.find(b"_MP_");
            assert!(memory.sums_to_zero(pointer, 16));
            let table = memory.word(pointer + 4);
            let bytes = memory.word(table + 4) & 0xffff;
            assert_eq!(memory.at(table, 4), b"PCMP");
            assert!(memory.sums_to_zero(table, bytes));
            let mut rest = memory.at(table, bytes as usize)[44..].to_vec();
            let (mut entries, mut cpus) = (0, Vec::new());
            while let Some(kind) = rest.first() {
                if *kind == 0 {
                    cpus.push((rest[1], rest[3]));
                }
                rest.drain(..if *kind == 0 { 20 } else { 8 });
                entries += 1;
            }
            assert_eq!(memory.at(table, 44)[34..36], u16::to_le_bytes(entries));
            let wanted: Vec<_> = (0..vcpus as u8).map(|id| (id, if id == 0 { 3 } else { 1 })).collect();
            assert_eq!(cpus, wanted);
        }
    }

    #[test]
    fn tables_lie_where_firmware_says_that_memory_is_reserved() {
        let (start, bytes) = firmware_tables(VCPUS_MAX);
        let end = Gpa((start as usize + bytes.len()) as u64);
        let map = MemoryMap::new(2 << 20).expect("a map");
        let holds = |range: std::ops::Range<Gpa>| range.start <= Gpa(start.into()) && end <= range.end;
        assert!(map.firmware().any(|(range, kind)| kind == RangeKind::Reserved && holds(range)));
    }
}
