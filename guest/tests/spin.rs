//! The number that workload `spin` prints is right only if its loop has as many instructions as `spin_loop.h` says.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use object::read::elf::ElfFile32;
use object::{Endianness, Object, ObjectSection, ObjectSymbol};
use umbra_guest::PAGER;

/// `SPIN_TURN` and `SPIN_CALL`.
const TURN: u32 = 16;
const CALL: u32 = 18;

/// PUSH EBX, ESI, EDI; MOV ECX, [ESP+16]; MOV EBX, [ESP+20]: how the loop's function starts, and nothing else.
const START: [u8; 11] = [0x53, 0x56, 0x57, 0x8b, 0x4c, 0x24, 0x10, 0x8b, 0x5c, 0x24, 0x14];

/// The program `spin`, as it lies in the kernel's image.
fn program() -> &'static [u8] {
    let elf = ElfFile32::<Endianness>::parse(PAGER).expect("an ELF32 file");
    let address = |name| elf.symbols().find(|symbol| symbol.name() == Ok(name)).expect(name).address();
    let (start, end) = (address("program_spin_elf"), address("program_spin_elf_end"));
    let rodata = elf.section_by_name(".rodata").expect(".rodata");
    rodata.data_range(start, end - start).expect("a sound section").expect("the program's bytes")
}

/// Instructions from the start of the function to its RET, with one turn of the loop; `eighth` is whether its one other
/// branch is taken.
fn path(code: &[u8], eighth: bool) -> u32 {
    let at = |ip: u64| -> Instruction {
        Decoder::with_ip(32, &code[ip as usize..], ip, DecoderOptions::NONE).decode()
    };
    let (mut ip, mut count) = (0, 0);
    loop {
        let instruction = at(ip);
        count += 1;
        assert!(count < 1000, "the function ends");
        ip = match (instruction.flow_control(), instruction.mnemonic()) {
            (FlowControl::Return, _) => return count,
            (FlowControl::UnconditionalBranch, _) => instruction.near_branch_target(),
            (FlowControl::ConditionalBranch, Mnemonic::Je) if eighth => instruction.near_branch_target(),
            (FlowControl::ConditionalBranch, Mnemonic::Je | Mnemonic::Jne) | (FlowControl::Next, _) => {
                instruction.next_ip()
            }
            other => panic!("{other:?} does not belong there"),
        };
    }
}

#[test]
fn spin_loop_has_as_many_instructions_as_it_says() {
    let program = program();
    let starts: Vec<usize> = (0..program.len()).filter(|&at| program[at..].starts_with(&START)).collect();
    assert_eq!(starts.len(), 1, "one function starts like the loop's");
    for eighth in [false, true] {
        assert_eq!(path(&program[starts[0]..], eighth), CALL + TURN, "eighth: {eighth}");
    }
}
