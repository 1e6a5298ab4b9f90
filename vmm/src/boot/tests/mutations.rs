//! Good images with a few bytes or words changed: never a panic, never a write outside memory or over another.

use proptest::prelude::*;

use super::images::{AddressFields, Elf, HEADER_OFFSET, Segment};
use crate::boot::fuzz;

fn originals() -> Vec<Vec<u8>> {
    let segments = vec![
        Segment { vaddr: 0xc010_0000, paddr: 0x10_0000, bytes: vec![0x90; 40], memory: 0x2000 },
        Segment::at(0x8000, vec![0xf4; 16]),
        Segment::at(0x20_0000, vec![1; 8]),
    ];
    let notes = vec![
        ("Umbra", 1, [1u32, 1].map(u32::to_le_bytes).concat()),
        ("Umbra", 2, 0x10_1000u32.to_le_bytes().to_vec()),
    ];
    let elf = Elf { segments, notes, entry: 0xc010_0000, ..Elf::default() };
    let fields = AddressFields { load_end: 0x10_0180, bss_end: 0x10_1000, ..AddressFields::default() };
    let inside = AddressFields { header: 0x10_0000 + HEADER_OFFSET, load_end: 0x10_0100, ..fields };
    vec![elf.build(), Elf { fields: Some(inside), ..elf }.build(), fields.build(0x40, 0x200)]
}

/// Numbers at which checks go wrong, and some that are near what the images have.
fn any_word() -> impl Strategy<Value = u32> {
    let edges = vec![
        0,
        1,
        2,
        31,
        32,
        33,
        52,
        0x7f,
        0x80,
        0xfff,
        0x1000,
        0x8000,
        0x9000,
        0x9fbff,
        0x9fc00,
        0xa_0000,
        0xf_ffff,
        0x10_0000,
        0x10_0001,
        0x20_0000,
        0xff_ffff,
        0x100_0000,
        0x7fff_ffff,
        0x8000_0000,
        0xc010_0000,
        0xffff_f000,
        u32::MAX,
    ];
    prop_oneof![proptest::sample::select(edges), any::<u32>(), (0u32..0x200)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn mutated_images_are_loaded_within_memory_or_refused(
        which in 0usize..3,
        changed in proptest::collection::vec((0usize..0x140, any_word(), 1usize..=4), 0..6),
        length in prop_oneof![8 => Just(usize::MAX), 1 => 0usize..0x400],
        repair in any::<bool>(),
    ) {
        let mut image = originals().swap_remove(which);
        for (offset, value, width) in changed {
            let end = image.len().min(offset + width);
            if let Some(place) = image.get_mut(offset..end) {
                place.copy_from_slice(&value.to_le_bytes()[..place.len()]);
            }
        }
        // Most changes to the Multiboot header would end at its checksum.
        let header = if which == 2 { 0x40 } else { 52 };
        if repair {
            let flags = u32::from_le_bytes(image[header + 4..header + 8].try_into().unwrap());
            let flags = flags & 0x1_0007;
            image[header + 4..header + 8].copy_from_slice(&flags.to_le_bytes());
            let checksum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
            image[header + 8..header + 12].copy_from_slice(&checksum.to_le_bytes());
        }
        image.truncate(length);
        fuzz::image(&image);
    }

    #[test]
    fn any_bytes_are_no_witness_table_or_a_bounded_one(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        magic in any::<bool>(),
        count in 0u32..20,
        pages in proptest::collection::vec(prop_oneof![4 => 0u32..4, 1 => any::<u32>()], 16),
    ) {
        let mut put = |at: usize, value: u32| {
            if let Some(place) = bytes.get_mut(at..at + 4) {
                place.copy_from_slice(&value.to_le_bytes());
            }
        };
        if magic {
            put(0, 0x5242_4d55);
            put(4, count);
            for (region, pages) in pages.into_iter().enumerate() {
                put(8 + 28 * region + 16, pages);
                put(8 + 28 * region + 24, 8 * region as u32);
            }
        }
        fuzz::witnesses(&bytes);
    }
}

#[test]
fn originals_are_good() {
    for image in originals() {
        crate::boot::Image::parse(&image).unwrap();
        fuzz::image(&image);
    }
}
