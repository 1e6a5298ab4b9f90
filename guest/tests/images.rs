//! What the images promise, read out of them: a Multiboot1 header, the notes, and code that is clean for CPL 3.

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use object::read::elf::{ElfFile32, ProgramHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol};
use umbra_guest::{PAGER, PAGER_NO_SCOPE, PAGER_OTHER, PAGER_PLAIN, PAGER_TWIN, PAGER_ZEROS, abi};

type Elf = ElfFile32<'static>;

const KERNEL_BASE: u64 = 0xc000_0000;

fn elf(image: &'static [u8]) -> Elf {
    Elf::parse(image).expect("an ELF32 file")
}

/// Every note: (owner, type, descriptor as integers).
fn notes(image: &'static [u8]) -> Vec<(Vec<u8>, u32, Vec<u32>)> {
    let elf = elf(image);
    let mut found = Vec::new();
    for header in elf.elf_program_headers() {
        let Some(mut notes) = header.notes(Endianness::Little, image).expect("sound notes") else { continue };
        while let Some(note) = notes.next().expect("a sound note") {
            let words =
                note.desc().chunks(4).map(|word| u32::from_le_bytes(word.try_into().expect("whole words")));
            found.push((note.name().to_vec(), note.n_type(Endianness::Little).0, words.collect()));
        }
    }
    found
}

fn symbol(image: &'static [u8], name: &str) -> u64 {
    elf(image).symbols().find(|symbol| symbol.name() == Ok(name)).expect(name).address()
}

#[test]
fn every_image_has_a_multiboot_header_in_its_first_8_kib() {
    for image in [PAGER, PAGER_TWIN, PAGER_PLAIN] {
        let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
        let at = (0..8192 - 12).step_by(4).find(|&at| word(at) == 0x1bad_b002).expect("the header's magic");
        assert_eq!(word(at + 4), 3, "flags: page-aligned modules, memory information");
        assert_eq!(word(at).wrapping_add(word(at + 4)).wrapping_add(word(at + 8)), 0);
    }
}

#[test]
fn segments_lie_from_1_mib_and_are_never_writable_and_executable() {
    let elf = elf(PAGER);
    let mut next = 0x10_0000;
    for header in elf
        .elf_program_headers()
        .iter()
        .filter(|header| header.p_type(Endianness::Little) == object::elf::PT_LOAD)
    {
        assert_eq!(header.p_paddr(Endianness::Little), next, "contiguous in physical memory");
        assert_ne!(header.p_flags(Endianness::Little).0 & 3, 3);
        next += header.p_memsz(Endianness::Little).next_multiple_of(4096);
    }
    assert_eq!(elf.entry() >> 20, 1, "the entry is a physical address");
}

#[test]
fn notes_declare_the_clean_kernel_and_the_witness_table() {
    let table = symbol(PAGER, "witness_table");
    let expected = vec![
        (
            abi::NOTE_NAME.as_bytes().to_vec(),
            abi::NOTE_TYPE_KERNEL,
            vec![abi::NOTE_VERSION, abi::NOTE_FLAG_CLEAN],
        ),
        (abi::NOTE_NAME.as_bytes().to_vec(), abi::NOTE_TYPE_WITNESS, vec![(table - KERNEL_BASE) as u32]),
    ];
    assert_eq!(notes(PAGER), expected);
}

#[test]
fn plain_image_has_no_note() {
    assert_eq!(notes(PAGER_PLAIN), []);
}

#[test]
fn twins_differ_from_the_kernel_and_from_each_other() {
    let images = [PAGER, PAGER_TWIN, PAGER_ZEROS, PAGER_OTHER, PAGER_NO_SCOPE];
    for (i, image) in images.iter().enumerate() {
        assert!(images[..i].iter().all(|other| other != image));
        assert_eq!(notes(image).len(), 2);
    }
}

/// What would show CPL 3, or the monitor's tables, to a kernel that runs there; and what this kernel has no state for.
fn unclean(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let shows_the_host = matches!(
        instruction.mnemonic(),
        Pushf
            | Pushfd
            | Popf
            | Popfd
            | Lar
            | Lsl
            | Verr
            | Verw
            | Sgdt
            | Sidt
            | Sldt
            | Str
            | Smsw
            | Lldt
            | Vmcall
            | Vmmcall
            | Sysenter
            | Syscall
            | INVALID
    );
    let reads_cs = (0..instruction.op_count())
        .any(|op| instruction.op_kind(op) == OpKind::Register && instruction.op_register(op) == Register::CS);
    // What fpu.c lends the registers with; FNINIT and FXSAVE only where a workload asks for an FPU.
    let lends_fpu = matches!(instruction.mnemonic(), Fninit | Fxsave | Fxrstor);
    let needs_fpu = !lends_fpu
        && instruction.cpuid_features().iter().any(|feature| {
            !matches!(
                feature,
                CpuidFeature::INTEL8086
                    | CpuidFeature::INTEL186
                    | CpuidFeature::INTEL286
                    | CpuidFeature::INTEL386
                    | CpuidFeature::INTEL486
                    | CpuidFeature::CPUID
                    | CpuidFeature::TSC
                    | CpuidFeature::MSR
                    | CpuidFeature::CMOV
                    | CpuidFeature::MULTIBYTENOP
                    // A no-operation where it is not known.
                    | CpuidFeature::PAUSE
            )
        });
    shows_the_host || reads_cs || needs_fpu
}

fn unclean_in(code: &[u8], address: u64) -> Vec<String> {
    let decoder = Decoder::with_ip(32, code, address, DecoderOptions::NONE);
    decoder
        .into_iter()
        .filter(unclean)
        .map(|found| format!("{:x}: {:?}", found.ip(), found.mnemonic()))
        .collect()
}

#[test]
fn kernel_text_is_clean_as_its_note_says() {
    let elf = elf(PAGER);
    let text = elf.section_by_name(".text").expect(".text");
    let code = text.data().expect("its bytes");
    assert!(code.len() > 16 * 1024, "the whole kernel is looked at");
    assert_eq!(unclean_in(code, text.address()), Vec::<String>::new());
}

#[test]
fn unclean_code_is_found() {
    let samples: [&[u8]; 6] =
        [&[0x9c], &[0x0e], &[0x8c, 0xc8], &[0x0f, 0x01, 0xe0], &[0x0f, 0x02, 0xc0], &[0xd9, 0xe8]];
    for code in samples {
        assert_eq!(unclean_in(code, 0).len(), 1, "{code:x?}");
    }
}
