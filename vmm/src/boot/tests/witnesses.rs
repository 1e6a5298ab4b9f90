//! Witness tables, honest and not.

use umbra_mmu::Gpa;

use crate::boot::MemoryError;
use crate::boot::witness::{Witness, WitnessError, check};

const TABLE: u32 = 0x1000;
const LIST: u32 = 0x2000;

/// Sixteen pages, page n full of n, with a table of one region: pages 9, 3 and 9 again.
struct Guest(Vec<u8>);

impl Guest {
    fn new() -> Guest {
        let mut guest = Guest((0..16).flat_map(|page| [page; 4096]).collect());
        guest.put(TABLE, &[0x5242_4d55, 1]);
        guest.region(0, b"stack\0\0\0garbage!", 3, 0xdead_beef, LIST);
        guest.put(LIST, &[9, 3, 9]);
        guest
    }

    fn put(&mut self, at: u32, words: &[u32]) {
        let bytes = words.iter().flat_map(|word| word.to_le_bytes());
        self.0.splice(at as usize..at as usize + 4 * words.len(), bytes);
    }

    fn region(&mut self, number: u32, name: &[u8; 16], pages: u32, crc32: u32, list: u32) {
        let at = TABLE + 8 + 28 * number;
        self.0[at as usize..][..16].copy_from_slice(name);
        self.put(at + 16, &[pages, crc32, list]);
    }

    fn check(&self) -> Result<Vec<Witness>, WitnessError> {
        check(Gpa(TABLE.into()), &mut |gpa, buffer| {
            let start = usize::try_from(gpa.0)?;
            let source = self.0.get(start..).and_then(|rest| rest.get(..buffer.len()));
            buffer.copy_from_slice(source.ok_or(MemoryError::from("beyond memory"))?);
            Ok(())
        })
    }
}

/// CRC-32 a bit at a time, by its definition.
fn crc32(bytes: impl Iterator<Item = u8>) -> u32 {
    !bytes.fold(u32::MAX, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| if crc & 1 != 0 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 },
        )
    })
}

#[test]
fn region_is_hashed_in_the_order_of_its_list() {
    let mut guest = Guest::new();
    let computed = crc32([9, 3, 9].into_iter().flat_map(|page| [page; 4096]));
    let found = guest.check().unwrap();
    assert_eq!(found, [Witness { name: "stack".into(), pages: 3, claimed: 0xdead_beef, computed }]);
    assert!(!found[0].agrees());
    guest.region(0, b"0123456789abcdef", 3, computed, LIST);
    let found = guest.check().unwrap();
    assert!(found[0].agrees());
    assert_eq!(found[0].name, "0123456789abcdef", "a name of full length has no NUL");
    guest.0[9 * 4096 + 17] ^= 1;
    assert!(!guest.check().unwrap()[0].agrees());
}

#[test]
fn long_lists_are_read_piece_by_piece() {
    let mut guest = Guest::new();
    let gfns: Vec<u32> = (0..1000).map(|i| 3 + i % 13).collect();
    guest.0.extend([0; 8192]);
    guest.put(16 * 4096 + 8, &gfns);
    let list = 16 * 4096 + 8;
    guest.region(0, b"long\0\0\0\0\0\0\0\0\0\0\0\0", 1000, 0, list);
    let expected = crc32(gfns.iter().flat_map(|&gfn| [gfn as u8; 4096]));
    assert_eq!(guest.check().unwrap()[0].computed, expected);
}

#[test]
fn no_regions_and_empty_regions_are_fine() {
    let mut guest = Guest::new();
    guest.region(0, &[0; 16], 0, 0, u32::MAX);
    assert!(guest.check().unwrap()[0].agrees(), "the checksum of nothing is 0");
    guest.put(TABLE, &[0x5242_4d55, 0]);
    assert_eq!(guest.check().unwrap(), []);
}

#[test]
fn lies_are_refused_with_their_numbers() {
    let mut guest = Guest::new();
    guest.put(TABLE, &[0x1234]);
    assert!(matches!(guest.check(), Err(WitnessError::NoTable { found: 0x1234, .. })));
    guest.put(TABLE, &[0x5242_4d55, 17]);
    assert!(matches!(guest.check(), Err(WitnessError::TooManyRegions { count: 17 })));
    guest.put(TABLE, &[0x5242_4d55, 2]);
    guest.region(1, b"\x1b[2Jevil\0\0\0\0\0\0\0\0", u32::MAX, 0, LIST);
    let error = guest.check().unwrap_err().to_string();
    assert!(error.contains("'?[2Jevil' claims 4294967295 pages"), "{error}");
    guest.region(1, b"far\0\0\0\0\0\0\0\0\0\0\0\0\0", 1, 0, u32::MAX);
    let error = guest.check().unwrap_err().to_string();
    assert_eq!(error, "reading the frame list of witness region 'far' at guest-physical 0xffffffff failed");
    guest.put(LIST, &[u32::MAX]);
    let error = guest.check().unwrap_err().to_string();
    assert_eq!(error, "reading a frame of witness region 'stack' at guest-physical 0xffffffff000 failed");
}

#[test]
fn pages_are_limited_over_all_regions() {
    let mut guest = Guest::new();
    guest.put(TABLE, &[0x5242_4d55, 2]);
    guest.region(0, b"a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 2, 0, LIST);
    guest.region(1, b"b\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 0xffff, 0, LIST);
    assert!(matches!(guest.check(), Err(WitnessError::TooManyPages { pages: 0xffff, .. })));
}
