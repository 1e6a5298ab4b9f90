//! Opcode forms: which there are, and random instances of each.
//!
//! A form is one of iced's `Code`s. An instance is made of bytes alone: prefixes and opcode as the form's description
//! has them, then anything that decodes as that form; so operand kinds need no table here.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Instruction, MandatoryPrefix, Mnemonic, OpCodeOperandKind,
    OpCodeTableKind,
};
use umbra::interp::decode;

use super::random::Random;
use super::run::is_amd;

/// The integer features.
pub const INTEGER: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::CLFSH,
    CpuidFeature::CMOV,
    CpuidFeature::CPUID,
    CpuidFeature::CX8,
    CpuidFeature::MSR,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::RDPMC,
    CpuidFeature::TSC,
    CpuidFeature::PREFETCHW,
    CpuidFeature::SMM,
    CpuidFeature::SMAP,
    CpuidFeature::CET_IBT,
];

/// Instructions of SSE and SSE2 that touch no XMM register.
const OF_SSE: [Mnemonic; 8] = [
    Mnemonic::Lfence,
    Mnemonic::Mfence,
    Mnemonic::Movnti,
    Mnemonic::Prefetchnta,
    Mnemonic::Prefetcht0,
    Mnemonic::Prefetcht1,
    Mnemonic::Prefetcht2,
    Mnemonic::Sfence,
];

/// True where the form is of these features, or an integer instruction of SSE.
pub fn is_of(code: Code, features: &[CpuidFeature]) -> bool {
    code.cpuid_features().iter().all(|feature| features.contains(feature))
        || OF_SSE.contains(&code.mnemonic())
}

/// Why an instruction is not compared, where the host's kernel comes between or its values are its own.
pub fn excluded(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    match code.mnemonic() {
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => {
            Some("Linux emulates what UMIP takes from users, with values of its own")
        }
        M::Int1 => Some("under a hypervisor #DB may be raised at it, on the CPU alone it is behind it"),
        M::Wait => Some("an instruction of the FPU"),
        M::Ud0 if code == Code::Ud0 => Some("UD0 without ModRM: the decoder gives the form with it"),
        M::Reservednop => Some("no operation to Intel, #UD to AMD where it is of registers"),
        M::Push | M::Pop if !is_amd() && moves_wide_segment(code) => {
            Some("four bytes of a segment register to AMD, the lower two of them to Intel")
        }
        _ => None,
    }
}

/// PUSH or POP of a segment register as four bytes.
fn moves_wide_segment(code: Code) -> bool {
    use Code as C;
    matches!(code, C::Pushd_ES | C::Pushd_CS | C::Pushd_SS | C::Pushd_DS | C::Pushd_FS | C::Pushd_GS)
        || matches!(code, C::Popd_ES | C::Popd_SS | C::Popd_DS | C::Popd_FS | C::Popd_GS)
}

/// True for forms that ring 3 may not execute, or nobody: of them it is compared that both sides fault the same.
pub fn always_faults(code: Code) -> bool {
    use Mnemonic as M;
    let register = |kind| matches!(kind, &OpCodeOperandKind::cr_reg | &OpCodeOperandKind::dr_reg);
    let moves_system = code.op_code().op_kinds().iter().any(register);
    let port = matches!(code.mnemonic(), M::In | M::Out | M::Insb | M::Insw | M::Insd)
        || matches!(code.mnemonic(), M::Outsb | M::Outsw | M::Outsd);
    let kernel =
        matches!(code.mnemonic(), M::Cli | M::Sti | M::Hlt | M::Clts | M::Lmsw | M::Invd | M::Wbinvd)
            || matches!(
                code.mnemonic(),
                M::Lgdt | M::Lidt | M::Lldt | M::Ltr | M::Invlpg | M::Rdmsr | M::Wrmsr
            )
            || matches!(code.mnemonic(), M::Rdpmc | M::Clac | M::Stac | M::Rsm);
    let nobody = matches!(code.mnemonic(), M::Ud0 | M::Ud1 | M::Ud2);
    moves_system || port || kernel || nobody || matches!(code.mnemonic(), M::Int)
}

/// Why this instance of a form is not compared.
pub fn excluded_instance(instruction: &Instruction, bytes: &[u8]) -> Option<&'static str> {
    let prefixes = &bytes[..instruction.len().saturating_sub(2)];
    match instruction.mnemonic() {
        Mnemonic::Loope | Mnemonic::Loopne if prefixes.iter().any(|byte| matches!(byte, 0xf2 | 0xf3)) => {
            Some("a REP prefix turns LOOPE into LOOPNE and back on AMD, and means nothing to Intel")
        }
        _ => excluded(instruction.code()),
    }
}

/// The forms of `features` that 32-bit mode has.
pub fn forms(features: &[CpuidFeature]) -> Vec<Code> {
    let there = |code: &Code| {
        let info = code.op_code();
        // Forms that need an option of the decoder are those of CPUs long gone.
        let known = info.is_instruction() && info.mode32() && info.decoder_option() == 0;
        known && is_of(*code, features) && excluded(*code).is_none()
    };
    Code::values().filter(there).collect()
}

/// What the host makes of `bytes`: everything that a recent CPU knows.
pub fn decode_host(bytes: &[u8], wide: bool, eip: u32) -> Instruction {
    let bits = if wide { 32 } else { 16 };
    Decoder::with_ip(bits, bytes, u64::from(eip), DecoderOptions::NONE).decode()
}

/// A random instance of `code` where CS's D bit is `wide`. None in the odd case where none was found.
pub fn instance(code: Code, wide: bool, random: &mut Random) -> Option<Vec<u8>> {
    (0..30).find_map(|_| {
        let mut bytes = attempt(code, wide, random);
        let length = decode(&bytes, wide, 0).ok().filter(|i| i.code() == code)?.len();
        bytes.truncate(length);
        (decode_host(&bytes, wide, 0).code() == code).then_some(bytes)
    })
}

fn attempt(code: Code, wide: bool, random: &mut Random) -> Vec<u8> {
    let info = code.op_code();
    let mut bytes = prefixes(code, wide, random);
    match info.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    let mut opcode = info.op_code();
    if info.op_code_len() == 2 {
        bytes.push((opcode >> 8) as u8);
        opcode &= 0xff;
    }
    use OpCodeOperandKind as K;
    let in_opcode = |kind| matches!(kind, &K::r8_opcode | &K::r16_opcode | &K::r32_opcode | &K::sti_opcode);
    if info.op_kinds().iter().any(in_opcode) {
        opcode |= random.below(8);
    }
    bytes.push(opcode as u8);
    bytes.push(modrm(info.group_index(), info.rm_group_index(), random));
    let rest = bytes.len();
    bytes.resize(rest + 11, 0);
    random.fill(&mut bytes[rest..]);
    bytes
}

/// ModRM with what the opcode fixes; [disp32] and registers more often than other forms. Where the opcode has none,
/// it is a random byte like what follows.
fn modrm(group: i32, rm_group: i32, random: &mut Random) -> u8 {
    let any = random.next() as u8;
    let reg = if group >= 0 { (group as u8) << 3 } else { any & 0x38 };
    let rm = if rm_group >= 0 { rm_group as u8 } else { any & 7 };
    let mode = random.pick(&[0, 0x40, 0x80, 0x80, 0xc0, 0xc0]);
    if group < 0 && rm_group < 0 && random.chance(10) {
        return any;
    }
    mode | reg | rm
}

fn prefixes(code: Code, wide: bool, random: &mut Random) -> Vec<u8> {
    let info = code.op_code();
    let mut all = Vec::new();
    // The size that differs from CS's needs a prefix; where there is none it may stand without meaning.
    let mut size = |size: u32, prefix: u8, random: &mut Random| match size {
        16 | 32 => {
            if (size == 32) != wide {
                all.push(prefix);
            }
        }
        _ => {
            if random.chance(10) {
                all.push(prefix);
            }
        }
    };
    size(info.operand_size(), 0x66, random);
    size(info.address_size(), 0x67, random);
    if info.can_use_lock_prefix() && random.chance(30) {
        all.push(0xf0);
    }
    if info.can_use_rep_prefix() && random.chance(50) {
        all.push(0xf3);
    } else if info.can_use_repne_prefix() && random.chance(30) {
        all.push(0xf2);
    }
    if random.chance(20) {
        all.push(random.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
    }
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => all.push(0x66),
        MandatoryPrefix::PF3 => all.push(0xf3),
        MandatoryPrefix::PF2 => all.push(0xf2),
        _ => {}
    }
    let turn = random.below(all.len().max(1) as u32) as usize;
    all.rotate_left(turn);
    all
}
