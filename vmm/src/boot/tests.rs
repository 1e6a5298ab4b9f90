//! Images built by hand: good ones, hostile ones, and mutations of good ones.

mod images;
mod mutations;
mod witnesses;

use std::error::Error;

use umbra_mmu::Gpa;

use crate::board::MemoryMap;

use super::*;
use images::{AddressFields, Elf, Segment};

/// Guest memory that starts out dirty, from zero on.
struct Memory(Vec<u8>);

impl Memory {
    fn new(bytes: usize) -> Memory {
        Memory(vec![0xcc; bytes])
    }

    fn at(&self, start: u64, bytes: usize) -> &[u8] {
        &self.0[start as usize..][..bytes]
    }

    fn word(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.at(at, 4).try_into().unwrap())
    }

    fn string(&self, at: u32) -> &str {
        let rest = &self.0[at as usize..];
        let end = rest.iter().position(|&byte| byte == 0).unwrap();
        std::str::from_utf8(&rest[..end]).unwrap()
    }
}

impl GuestMemorySink for Memory {
    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        self.0[gpa.0 as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, gpa: Gpa, bytes: u64) -> Result<(), MemoryError> {
        self.0[gpa.0 as usize..][..bytes as usize].fill(0);
        Ok(())
    }
}

const MEMORY: u64 = 8 << 20;

fn request<'a>(command_line: &'a str, modules: &'a [Module<'a>]) -> BootRequest<'a> {
    BootRequest { memory: MemoryMap::new(MEMORY).unwrap(), command_line, modules }
}

fn load(image: &[u8], request: &BootRequest<'_>) -> Result<(Entry, Memory), ImageError> {
    let mut memory = Memory::new(MEMORY as usize);
    let entry = Image::parse(image)?.load(&mut memory, request)?;
    Ok((entry, memory))
}

/// The name of the variant with which an image is refused, and the sentence.
fn refusal(image: &[u8]) -> (String, String) {
    let error = load(image, &request("", &[])).map(|_| ()).expect_err("the image is refused");
    let debug = format!("{error:?}");
    (debug.split([' ', '{', '(']).next().unwrap_or_default().to_string(), error.to_string())
}

#[test]
fn elf_segments_go_to_their_physical_addresses_with_bss_cleared() {
    let image = Elf {
        segments: vec![
            Segment::at(0x10_0000, b"code".to_vec()),
            Segment { vaddr: 0xc020_0000, paddr: 0x20_0000, bytes: b"data".to_vec(), memory: 0x3000 },
        ],
        ..Elf::default()
    };
    let (entry, memory) = load(&image.build(), &request("", &[])).unwrap();
    assert_eq!(memory.at(0x10_0000, 5), b"code\xcc");
    assert_eq!(memory.at(0x20_0000, 4), b"data");
    assert!(memory.at(0x20_0004, 0x3000 - 4).iter().all(|&byte| byte == 0));
    assert_eq!(memory.at(0x20_3000, 1), b"\xcc");
    assert_eq!(entry.kernel, Gpa(0x10_0000)..Gpa(0x20_3000));
}

#[test]
fn entry_state_is_the_specifications() {
    let (entry, _) = load(&Elf::default().build(), &request("", &[])).unwrap();
    assert_eq!((entry.cpu.gpr[0], entry.cpu.gpr[3]), (0x2bad_b002, entry.info.0 as u32));
    assert_eq!((entry.cpu.eip, entry.cpu.cr0 & 0x8000_0001, entry.cpu.eflags & 0x2_0200), (0x10_0000, 1, 0));
}

#[test]
fn entry_point_of_a_higher_half_kernel_is_translated() {
    let high = Segment { vaddr: 0xc010_0000, paddr: 0x10_0000, bytes: vec![0x90; 64], memory: 64 };
    for (given, physical) in [(0xc010_0020, 0x10_0020), (0x10_0020, 0x10_0020)] {
        let image = Elf { segments: vec![high.clone()], entry: given, ..Elf::default() };
        assert_eq!(Image::parse(&image.build()).unwrap().entry(), physical);
    }
}

#[test]
fn info_structure_says_what_microvm_says() {
    let (entry, memory) = load(&Elf::default().build(), &request("workload=mm quiet", &[])).unwrap();
    let info = entry.info.0;
    let field = |offset| memory.word(info + offset);
    assert_eq!(info, 0x9000);
    assert_eq!(field(0), 0x24d);
    assert_eq!((field(4), field(8)), (0x27f, (MEMORY as u32 - 0x10_0000) / 1024));
    assert_eq!(memory.string(field(16)), "workload=mm quiet");
    assert_eq!(field(20), 0);
    assert_eq!(memory.string(field(64)), "Umbra");
    let (length, address) = (field(44), field(48));
    let entries: Vec<[u32; 6]> = (0..length / 24)
        .map(|entry| [0, 4, 8, 12, 16, 20].map(|at| memory.word(u64::from(address + 24 * entry + at))))
        .collect();
    // Size, base, length, type; the first three and the last are QEMU 7.2's, at its size of memory.
    let expected = [
        [20, 0, 0, 0x9fc00, 0, 1],
        [20, 0x9fc00, 0, 0x400, 0, 2],
        [20, 0xf0000, 0, 0x10000, 0, 2],
        [20, 0x10_0000, 0, 0x70_0000, 0, 1],
    ];
    assert_eq!(entries, expected);
    for other in [12, 28, 32, 36, 40, 52, 56, 60, 68, 72, 112] {
        assert_eq!(field(other), 0, "field {other}");
    }
}

#[test]
fn memory_above_4_gib_is_in_the_map() {
    let mut sink = fuzz::CheckedSink::new(MemoryMap::new(5 << 30).unwrap());
    let request = BootRequest { memory: MemoryMap::new(5 << 30).unwrap(), ..request("", &[]) };
    let image = Elf::default().build();
    let info = info::Info { memory: &request.memory, command_line: "", modules: &[] }.build(0x9000);
    assert_eq!(info[116 + 4 * 24..][..24], [20u32, 0, 1, 1 << 31, 0, 1].map(u32::to_le_bytes).concat());
    assert_eq!(info[8..12], (3072u32 * 1024 - 1024).to_le_bytes());
    Image::parse(&image).unwrap().load(&mut sink, &request).unwrap();
}

#[test]
fn modules_lie_on_pages_after_the_kernel_with_their_tails_cleared() {
    let modules = [
        Module { command_line: "initrd root=a", data: &[1; 5000] },
        Module { command_line: "", data: &[] },
        Module { command_line: "second", data: &[2; 4096] },
    ];
    let (entry, memory) = load(&Elf::default().build(), &request("x", &modules)).unwrap();
    let starts: Vec<u64> = entry.modules.iter().map(|range| range.start.0).collect();
    assert_eq!(starts, [0x10_1000, 0x10_3000, 0x10_3000]);
    assert_eq!(memory.at(0x10_1000, 5000), [1; 5000]);
    assert!(memory.at(0x10_1000 + 5000, 0x2000 - 5000).iter().all(|&byte| byte == 0));
    assert_eq!(memory.at(0x10_3000, 4096), [2; 4096]);
    let info = entry.info.0;
    assert_eq!(memory.word(info + 20), 3);
    let list = u64::from(memory.word(info + 24));
    assert_eq!((memory.word(list), memory.word(list + 4)), (0x10_1000, 0x10_1000 + 5000));
    assert_eq!(memory.string(memory.word(list + 8)), "initrd root=a");
    assert_eq!(memory.string(memory.word(list + 2 * 16 + 8)), "second");
}

#[test]
fn modules_come_after_the_kernel_also_when_there_is_room_before_it() {
    let image =
        Elf { segments: vec![Segment::at(0x20_0000, vec![0x90; 5])], entry: 0x20_0000, ..Elf::default() };
    let modules = [Module { command_line: "", data: &[1] }];
    let (entry, _) = load(&image.build(), &request("", &modules)).unwrap();
    assert_eq!(entry.modules, [Gpa(0x20_1000)..Gpa(0x20_1001)]);
}

#[test]
fn kernel_in_conventional_memory_pushes_the_info_block_aside() {
    let image =
        Elf { segments: vec![Segment::at(0x8000, vec![0x90; 0x2001])], entry: 0x8000, ..Elf::default() };
    let (entry, _) = load(&image.build(), &request("", &[])).unwrap();
    assert_eq!(entry.info, Gpa(0xb000));
    let image =
        Elf { segments: vec![Segment::at(0x8000, vec![0x90; 0x97c00])], entry: 0x8000, ..Elf::default() };
    let (entry, _) = load(&image.build(), &request("", &[])).unwrap();
    assert_eq!(entry.info, Gpa(0x10_0000), "conventional memory is full");
}

#[test]
fn largest_legal_request_fits() {
    let line = "x".repeat(COMMAND_LINE_BYTES_MAX);
    let modules = [Module { command_line: &line, data: &[7] }; MODULES_MAX];
    let (entry, memory) = load(&Elf::default().build(), &request(&line, &modules)).unwrap();
    assert_eq!(memory.string(memory.word(entry.info.0 + 16)), line);
    assert_eq!(entry.modules.len(), MODULES_MAX);
}

#[test]
fn address_fields_load_an_image_that_is_not_elf() {
    let fields = AddressFields::default();
    let image = fields.build(0x40, 0x200);
    let (entry, memory) = load(&image, &request("", &[])).unwrap();
    assert_eq!(memory.at(0x10_0000, 0x200), image);
    assert_eq!(entry.cpu.eip, fields.entry);

    // Loading from the header on, part of the file, with a BSS behind it.
    let fields = AddressFields { load: 0x10_0040, load_end: 0x10_0100, bss_end: 0x10_0180, ..fields };
    let image = fields.build(0x40, 0x200);
    let (entry, memory) = load(&image, &request("", &[])).unwrap();
    assert_eq!(memory.at(0x10_0040, 0xc0), &image[0x40..0x100]);
    assert_eq!(memory.at(0x10_0100, 0x81), [&[0; 0x80][..], &[0xcc]].concat());
    assert_eq!(entry.kernel, Gpa(0x10_0040)..Gpa(0x10_0180));
}

#[test]
fn address_fields_win_over_elf_and_its_notes_still_count() {
    let elf = Elf {
        fields: Some(AddressFields {
            header: 0x30_0000 + images::HEADER_OFFSET,
            load: 0x30_0000,
            entry: 0x30_0010,
            ..AddressFields::default()
        }),
        notes: vec![("Umbra", 1, [1u32, 1].map(u32::to_le_bytes).concat())],
        ..Elf::default()
    };
    let image = elf.build();
    let parsed = Image::parse(&image).unwrap();
    assert_eq!(parsed.entry(), 0x30_0010);
    assert!(parsed.notes().kernel.unwrap().clean);
}

#[test]
fn built_in_images_parse_and_say_what_they_are() {
    let pager = Image::parse(umbra_guest::PAGER).unwrap();
    assert!(pager.notes().kernel.unwrap().clean);
    assert!(pager.notes().witness_table.is_some());
    assert_eq!(Image::parse(umbra_guest::PAGER_PLAIN).unwrap().notes(), &notes::Notes::default());
    let (entry, _) = load(umbra_guest::PAGER, &request("workload=hello", &[])).unwrap();
    assert_eq!(entry.cpu.eip, pager.entry());
}

#[test]
fn unaligned_image_bytes_parse_the_same() {
    let image = Elf::default().build();
    for shift in 0..4 {
        let moved = [vec![0; shift], image.clone()].concat();
        assert_eq!(Image::parse(&moved[shift..]).unwrap().entry(), 0x10_0000);
    }
}

#[test]
fn notes_of_ours_must_be_understood_and_others_are_passed_over() {
    let with = |name, note, descriptor: &[u32]| {
        let bytes = descriptor.iter().flat_map(|word| word.to_le_bytes()).collect();
        Elf { notes: vec![("GNU", 3, vec![1, 2, 3]), (name, note, bytes)], ..Elf::default() }.build()
    };
    let parsed = |image: &[u8]| *Image::parse(image).unwrap().notes();
    assert_eq!(parsed(&with("Umbra", 1, &[1, 0])).kernel, Some(notes::KernelNote { clean: false }));
    assert_eq!(parsed(&with("Umbra", 2, &[0x1234])).witness_table, Some(Gpa(0x1234)));
    assert_eq!(parsed(&with("Umbra", 99, &[1])), notes::Notes::default());
    assert_eq!(parsed(&with("Penumbra", 1, &[2])), notes::Notes::default());
    for (note, descriptor) in [(1, &[2u32, 0][..]), (1, &[1]), (1, &[1, 0, 0]), (2, &[]), (2, &[1, 2])] {
        assert_eq!(refusal(&with("Umbra", note, descriptor)).0, "Note", "{note} {descriptor:?}");
    }
}

#[test]
fn header_is_found_up_to_its_limit_and_only_at_multiples_of_4() {
    let place = |at: usize, bytes: usize| {
        let mut image = vec![0; bytes];
        image[at..at + 12].copy_from_slice(&images::header(0));
        Image::parse(&image).map(|_| ()).unwrap_err()
    };
    // Not ELF: once the header is found, that is the complaint.
    assert!(matches!(place(0, 12), ImageError::NoFormat));
    assert!(matches!(place(HEADER_SEARCH_BYTES - 12, 9000), ImageError::NoFormat));
    assert!(matches!(place(HEADER_SEARCH_BYTES - 8, 9000), ImageError::NoHeader { searched: 8192 }));
    assert!(matches!(place(2, 9000), ImageError::NoHeader { .. }));
    assert!(matches!(Image::parse(&[]), Err(ImageError::NoHeader { searched: 0 })));
}

#[test]
fn header_with_a_wrong_checksum_is_passed_over_for_a_right_one() {
    let mut image = Elf::default().build();
    let mut decoy = images::header(0);
    decoy[8] ^= 1;
    let at = images::HEADER_OFFSET as usize;
    image.splice(at..at, decoy);
    assert!(Image::parse(&image).is_err(), "the splice has moved the segments");
    assert!(!matches!(Image::parse(&image), Err(ImageError::Checksum { .. })));
    let mut image = Elf::default().build();
    image[at + 8] ^= 1;
    let (kind, sentence) = refusal(&image);
    assert_eq!(kind, "Checksum");
    assert!(sentence.contains("should be 0xe4524ffb"), "{sentence}");
}

#[test]
fn demands_are_honoured_or_refused() {
    for flags in [0, 1, 2, 3, 4, 7, 1 << 17, 1 << 31] {
        assert!(Image::parse(&Elf { flags, ..Elf::default() }.build()).is_ok(), "{flags:#x}");
    }
    for flags in [1 << 3, 1 << 15, 0xfff8] {
        let (kind, sentence) = refusal(&Elf { flags, ..Elf::default() }.build());
        assert_eq!(kind, "UnknownDemands");
        assert!(sentence.contains(&format!("features {flags:#x}")), "{sentence}");
    }
}

#[test]
fn elf_files_of_other_kinds_are_refused_by_name() {
    let kinds: [(usize, u8, &str); 6] = [
        (4, 2, "64-bit"),
        (5, 2, "big-endian"),
        (16, 3, "position-independent"),
        (16, 1, "object file"),
        (16, 4, "of type 4"),
        (18, 62, "for machine 62"),
    ];
    for (offset, value, words) in kinds {
        let mut image = Elf::default().build();
        image[offset] = value;
        let (kind, sentence) = refusal(&image);
        assert_eq!(kind, "ElfKind");
        assert!(sentence.contains(words), "{sentence}");
    }
}

#[test]
fn damaged_elf_headers_are_refused() {
    let patched = |offset: usize, value: u32, width: usize| {
        let mut image = Elf::default().build();
        image[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]);
        refusal(&image).0
    };
    assert_eq!(patched(28, 0xffff_fff0, 4), "ElfDamaged", "program headers beyond the file");
    assert_eq!(patched(42, 31, 2), "ElfDamaged", "size of a program header");
    assert_eq!(patched(44, 0xffff, 2), "ElfDamaged", "the count is in a section header that is not there");
    assert_eq!(patched(44, 65, 2), "TooManyProgramHeaders");
    assert_eq!(patched(44, 0, 2), "Empty");
    assert_eq!(patched(28, 0, 4), "Empty");
}

#[test]
fn every_truncation_is_refused() {
    let image = Elf::default().build();
    for length in 0..image.len() {
        let kind = refusal(&image[..length]).0;
        assert!(
            ["NoHeader", "ElfDamaged", "BeyondImage", "Empty"].contains(&kind.as_str()),
            "{length}: {kind}"
        );
    }
}

#[test]
fn segments_that_lie_are_refused() {
    let with = |segments: Vec<Segment>| refusal(&Elf { segments, ..Elf::default() }.build());
    let good = || Segment::at(0x10_0000, vec![0x90; 32]);
    assert_eq!(with(vec![Segment { memory: 31, ..good() }]).0, "Shrinks");
    let (kind, sentence) = with(vec![good(), Segment::at(0x10_001f, vec![1])]);
    assert_eq!(kind, "Overlap");
    assert!(sentence.contains("segment 1") && sentence.contains("overlaps segment 0"), "{sentence}");
    for (paddr, memory) in [
        (0x9_f000, 0x1000),
        (0xb_8000, 16),
        (0xf_ffff, 16),
        (MEMORY as u32 - 15, 16),
        (0x10_0010, u32::MAX),
        (0xfee0_0000, 16),
        (u32::MAX, 16),
    ] {
        let segment = Segment { vaddr: 0, paddr, bytes: vec![1], memory };
        let (kind, sentence) = with(vec![Segment { memory: 16, bytes: vec![0x90; 16], ..good() }, segment]);
        assert_eq!(kind, "OutsideMemory", "{paddr:#x}");
        assert!(sentence.contains(&format!("{paddr:#x} to")) && sentence.contains("0x800000"), "{sentence}");
    }
    assert_eq!(with(vec![Segment { memory: 0, bytes: vec![], ..good() }]).0, "Empty");
}

#[test]
fn entry_point_outside_every_segment_is_refused() {
    for entry in [0, 0xf_ffff, 0x10_0020, u32::MAX] {
        let (kind, sentence) = refusal(&Elf { entry, ..Elf::default() }.build());
        assert_eq!(kind, "EntryOutside");
        assert!(sentence.contains(&format!("{entry:#x}")), "{sentence}");
    }
}

#[test]
fn address_fields_that_contradict_each_other_are_refused() {
    let good = AddressFields::default();
    let cases = [
        (AddressFields { load: good.header + 4, ..good }, "HeaderAddresses", "load is above header"),
        (AddressFields { load: 0x0f_f000, ..good }, "HeaderAddresses", "load is before the file"),
        (AddressFields { load_end: 0x0f_ffff, ..good }, "HeaderAddresses", "load end is below load"),
        (AddressFields { bss_end: 0x10_01ff, ..good }, "HeaderAddresses", "bss end is below load end"),
        (AddressFields { bss_end: 0x0f_0000, ..good }, "HeaderAddresses", "bss end is below load end"),
        (AddressFields { load_end: 0x10_0201, ..good }, "BeyondImage", "513 bytes at offset 0x0"),
        (AddressFields { bss_end: u32::MAX, ..good }, "OutsideMemory", "the kernel's body"),
        (AddressFields { entry: 0x10_0200, ..good }, "EntryOutside", "0x100200"),
        (AddressFields { load_end: good.load, ..good }, "EntryOutside", "0x100060"),
    ];
    for (fields, kind, words) in cases {
        let (found, sentence) = refusal(&fields.build(0x40, 0x200));
        assert_eq!(found, kind, "{fields:x?}");
        assert!(sentence.contains(words), "{sentence}");
    }
    assert_eq!(refusal(&good.build(0x40, 0x40 + 31)).0, "HeaderCutOff");
    assert_eq!(refusal(&good.build(HEADER_SEARCH_BYTES - 28, 10_000)).0, "HeaderCutOff");
}

#[test]
fn requests_over_the_limits_are_refused() {
    let image = Elf::default().build();
    let refused = |request: &BootRequest<'_>| load(&image, request).map(|_| ()).unwrap_err();
    let long = "x".repeat(COMMAND_LINE_BYTES_MAX + 1);
    assert!(matches!(refused(&request(&long, &[])), ImageError::CommandLineTooLong { bytes: 4097 }));
    assert!(matches!(refused(&request("a\0b", &[])), ImageError::CommandLineNul { at: 1 }));
    let module = Module { command_line: "a\0", data: &[] };
    assert!(matches!(refused(&request("", &[module])), ImageError::CommandLineNul { at: 1 }));
    let modules = [Module { command_line: "", data: &[] }; MODULES_MAX + 1];
    assert!(matches!(refused(&request("", &modules)), ImageError::TooManyModules { count: 65 }));
    let large = vec![0; MEMORY as usize];
    let module = Module { command_line: "", data: &large };
    let error = refused(&request("", &[module]));
    assert!(matches!(error, ImageError::NoRoom { part: Part::Module(0), .. }), "{error}");
}

#[test]
fn image_over_the_limit_is_refused_unread() {
    let image = vec![0; IMAGE_BYTES_MAX + 1];
    assert!(matches!(Image::parse(&image), Err(ImageError::TooLarge { .. })));
}

#[test]
fn failing_memory_is_named_with_its_cause() {
    struct Broken;
    impl GuestMemorySink for Broken {
        fn write(&mut self, _: Gpa, _: &[u8]) -> Result<(), MemoryError> {
            Err("no frame".into())
        }
        fn zero(&mut self, _: Gpa, _: u64) -> Result<(), MemoryError> {
            Ok(())
        }
    }
    let image = Elf::default().build();
    let error = Image::parse(&image).unwrap().load(&mut Broken, &request("", &[])).unwrap_err();
    assert_eq!(error.to_string(), "writing segment 0 of 32 bytes to guest-physical 0x100000 failed");
    assert_eq!(error.source().unwrap().to_string(), "no frame");
}
