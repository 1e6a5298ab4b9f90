//! Every form of the FPU's instructions, and random cases of each.

use iced_x86::{Code, CpuidFeature, Encoder, Instruction, MemorySize, OpCodeOperandKind, OpKind, Register};
use umbra::cpu::Fpu;

use super::arena::{DATA, DATA_MIDDLE, DATA_SIZE, INSTRUCTION};
use super::values::Random;
use super::{Case, is_amd};

/// Features whose instructions are compared, all that an instruction needs being among them.
const FEATURES: [CpuidFeature; 10] = [
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU287XL_ONLY,
    CpuidFeature::FPU387,
    CpuidFeature::FPU387SL_ONLY,
    CpuidFeature::FXSR,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::CMOV,
];

/// All forms of 32-bit code. CMOV alone is an integer feature; with the FPU it is FCMOV and FCOMI.
pub fn codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|code| {
        let features = code.cpuid_features();
        let fpu =
            features.iter().all(|feature| FEATURES.contains(feature)) && features != [CpuidFeature::CMOV];
        fpu && !features.is_empty() && code.op_code().mode32()
    })
}

/// An instruction of `code` with random operands. Memory operands lie at ESI (MASKMOVQ's at EDI), aligned as they should
/// be, most of the time.
pub fn instruction(code: Code, random: &mut Random) -> Instruction {
    let mut i = Instruction::new();
    i.set_code(code);
    let operands = code.op_code().op_kinds();
    for (kind, op) in operands.iter().zip(0..) {
        set_operand(&mut i, op, *kind, random);
    }
    i
}

fn set_operand(i: &mut Instruction, op: u32, kind: OpCodeOperandKind, random: &mut Random) {
    use OpCodeOperandKind as K;
    let n = random.below(8) as u32;
    let memory = random.below(2) == 0;
    let register = match kind {
        K::st0 => Register::ST0,
        K::ax => Register::AX,
        K::sti_opcode => Register::ST0 + n,
        K::r32_reg | K::r32_rm => Register::EAX + n,
        K::mm_reg | K::mm_rm => Register::MM0 + n,
        K::xmm_reg | K::xmm_rm => Register::XMM0 + n,
        K::r32_or_mem if !memory => Register::EAX + n,
        K::mm_or_mem if !memory => Register::MM0 + n,
        K::xmm_or_mem if !memory => Register::XMM0 + n,
        K::mem | K::r32_or_mem | K::mm_or_mem | K::xmm_or_mem => return set_memory(i, op, random),
        K::imm8 => {
            i.set_op_kind(op, OpKind::Immediate8);
            i.set_immediate8(random.next() as u8);
            return;
        }
        K::seg_rDI => {
            i.set_op_kind(op, OpKind::MemorySegEDI);
            return;
        }
        other => panic!("{other:?} of {:?}", i.code()),
    };
    i.set_op_kind(op, OpKind::Register);
    i.set_op_register(op, register);
}

fn set_memory(i: &mut Instruction, op: u32, random: &mut Random) {
    let aligned = if random.once_in(4) { 0 } else { 15 };
    let displacement = (random.next() as i8 & !aligned).clamp(-128, 112);
    i.set_op_kind(op, OpKind::Memory);
    i.set_memory_base(Register::ESI);
    i.set_memory_displ_size(1);
    i.set_memory_displacement64(displacement as u32 as u64);
}

/// A random case of `code`.
pub fn case(code: Code, random: &mut Random) -> Case {
    let i = instruction(code, random);
    let mut encoder = Encoder::new(32);
    encoder.encode(&i, INSTRUCTION.into()).unwrap_or_else(|error| panic!("{code:?}: {error}"));
    let mut gpr = [0; 8].map(|_| random.integer() as u32);
    gpr[4] = DATA + 0x200;
    gpr[6] = DATA_MIDDLE;
    gpr[7] = DATA_MIDDLE + random.below(64) as u32;
    let mut memory: Vec<u8> = (0..DATA_SIZE / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    let at = DATA_MIDDLE.wrapping_add(i.memory_displacement32()).wrapping_sub(DATA) as usize;
    fill(i.memory_size(), &mut memory[at % (DATA_SIZE - 512)..][..512], random);
    // CPUs differ in what they hold to be misaligned, where they may.
    let alignment = if is_amd() && random.once_in(16) { 1 << 18 } else { 0 };
    let flags = random.next() as u32 & 0x8d5 | alignment;
    Case { bytes: encoder.take_buffer(), gpr, flags, memory, fpu: fpu(random) }
}

/// Makes an operand of its kind at the start of `bytes`.
fn fill(size: MemorySize, bytes: &mut [u8], random: &mut Random) {
    let mut put = |value: u128, at: usize, length: usize| {
        bytes[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
    };
    match size {
        MemorySize::Float32 => put(random.single().into(), 0, 4),
        MemorySize::Float64 => put(random.double().into(), 0, 8),
        MemorySize::Float80 => put(random.extended(), 0, 10),
        MemorySize::Bcd => put(random.decimal(), 0, 10),
        MemorySize::Int16 | MemorySize::Int32 | MemorySize::Int64 => put(random.integer().into(), 0, 8),
        MemorySize::FpuEnv14 | MemorySize::FpuState94 => {
            (0..8).for_each(|n| put(random.extended(), 14 + 10 * n, 10));
        }
        MemorySize::FpuEnv28 | MemorySize::FpuState108 => {
            (0..8).for_each(|n| put(random.extended(), 28 + 10 * n, 10));
        }
        MemorySize::Fxsave_512Byte => {
            let image = fpu(random).image();
            (0..32).for_each(|n| {
                put(u128::from_le_bytes(std::array::from_fn(|k| image[16 * n + k])), 16 * n, 16)
            });
            if random.once_in(8) {
                put(reserved(random), 24, 4);
            }
        }
        MemorySize::UInt32 => {
            put(if random.once_in(4) { reserved(random) } else { mxcsr(random).into() }, 0, 4)
        }
        _ => put(random.vector(), 0, 16),
    }
}

/// Any bits for MXCSR but one, which some CPUs have and ours does not.
fn reserved(random: &mut Random) -> u128 {
    (random.next() & !(1 << 17)).into()
}

fn mxcsr(random: &mut Random) -> u32 {
    let masked = if random.below(3) == 0 { 0 } else { 0x1f80 };
    random.next() as u32 & 0xffff | masked
}

/// A random FPU: mostly full, mostly masked, in all roundings and precisions.
fn fpu(random: &mut Random) -> Fpu {
    let mut fpu = Fpu::default();
    fpu.set_top(random.below(8) as u16);
    let masked = if random.below(3) == 0 { 0 } else { 0x3f };
    // Half of those with exceptions unmasked have none pending.
    let flags = if random.below(2) == 0 { 0x477f } else { 0x4700 };
    let status = random.next() as u16 & flags | fpu.top() << 11;
    fpu.set_words(random.next() as u16 & 0x0f3f | masked, status);
    let empty = if random.below(3) == 0 { random.next() as u16 } else { 0 };
    fpu.set_tag_word(empty);
    for n in 0..8 {
        fpu.set_st(
            n,
            if random.once_in(8) { 0xffff << 64 | u128::from(random.next()) } else { random.extended() },
        );
        fpu.set_xmm(n, random.vector());
    }
    assert!(fpu.set_mxcsr(mxcsr(random)));
    fpu
}
