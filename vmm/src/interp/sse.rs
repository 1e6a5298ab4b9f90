//! MMX, SSE and SSE2: who may use them, moves, and integers. Arithmetic runs on the host (`host_fpu`), one instruction
//! at a time; what is only moved about is moved here.
//!
//! Holds:
//! - An operand of 16 bytes in memory lies on 16 bytes, or it is #GP; only MOVUPS, MOVUPD and MOVDQU lift that.
//! - An instruction that names an MMX register makes the x87 stack look full, once it has completed.
//!
//! Limits: non-temporal stores and fences are stores and nothing, since memory is coherent here.
//!
//! See: Intel SDM vol. 1, chapters 9 to 11; vol. 2, each instruction and tables 2-18 to 2-29 (exceptions).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use umbra_mmu::{Access, AccessKind};

use super::operand::{EDI, in_memory, segment_of};
use super::shuffle::{
    lane, shift_bytes, shuffle_4, shuffle_doubles, shuffle_high, shuffle_low, shuffle_singles, signs,
    with_lane,
};
use super::wide::Alignment;
use super::{Bus, Core, Exception, Exec, Flow, Width, ensure};
use crate::cpu::{cr0, cr4};
use crate::host_fpu::{self, Mmx, Packed, Prefix};

/// The low bits of a value that a move takes.
const DWORD: u128 = u32::MAX as u128;
const QWORD: u128 = u64::MAX as u128;

/// True where an operand of `i` is a register that `of` knows.
fn names(i: &Instruction, of: fn(Register) -> bool) -> bool {
    (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Register && of(i.op_register(op)))
}

/// True for the moves that bear a misaligned operand.
fn bears_misalignment(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu)
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// An instruction of MMX, SSE or SSE2.
    pub(super) fn simd(&mut self, i: &Instruction) -> Exec<Flow> {
        use Mnemonic as M;
        let mmx = names(i, Register::is_mm);
        let sse = names(i, Register::is_xmm) || matches!(i.mnemonic(), M::Ldmxcsr | M::Stmxcsr);
        ensure(self.cpu.cr0 & cr0::EM == 0, Exception::UD)?;
        ensure(!sse || self.cpu.cr4 & cr4::OSFXSR != 0, Exception::UD)?;
        ensure(self.cpu.cr0 & cr0::TS == 0, Exception::NM)?;
        self.bus.want_fpu()?;
        if i.mnemonic() == M::Emms {
            self.report_pending()?;
            self.cpu.fpu.leave_mmx();
            return Ok(Flow::Next);
        }
        if mmx {
            self.report_pending()?;
        }
        self.execute_simd(i)?;
        if mmx {
            self.cpu.fpu.enter_mmx();
        }
        Ok(Flow::Next)
    }

    fn execute_simd(&mut self, i: &Instruction) -> Exec {
        use Mnemonic as M;
        match i.mnemonic() {
            M::Movaps | M::Movapd | M::Movdqa | M::Movups | M::Movupd | M::Movdqu => self.copy(i, u128::MAX),
            M::Movntps | M::Movntpd | M::Movntdq => self.copy(i, u128::MAX),
            M::Movd => self.copy(i, DWORD),
            M::Movq | M::Movntq | M::Movdq2q | M::Movq2dq => self.copy(i, QWORD),
            M::Movss => self.move_scalar(i, 32),
            M::Movsd => self.move_scalar(i, 64),
            M::Movlps | M::Movlpd => self.move_half(i, 0, 0),
            M::Movhps | M::Movhpd => self.move_half(i, 1, 0),
            M::Movhlps => self.move_half(i, 0, 1),
            M::Movlhps => self.move_half(i, 1, 0),
            M::Maskmovq => self.store_masked(i, 8),
            M::Maskmovdqu => self.store_masked(i, 16),
            M::Pshufw => self.shuffle(i, |_, b, order| shuffle_4(b, 16, order)),
            M::Pshufd => self.shuffle(i, |_, b, order| shuffle_4(b, 32, order)),
            M::Pshuflw => self.shuffle(i, |_, b, order| shuffle_low(b, order)),
            M::Pshufhw => self.shuffle(i, |_, b, order| shuffle_high(b, order)),
            M::Shufps => self.shuffle(i, shuffle_singles),
            M::Shufpd => self.shuffle(i, shuffle_doubles),
            M::Pslldq => self.shift_whole(i, true),
            M::Psrldq => self.shift_whole(i, false),
            M::Pextrw => self.extract_word(i),
            M::Pinsrw => self.insert_word(i),
            M::Pmovmskb => self.move_signs(i, 8),
            M::Movmskps => self.move_signs(i, 32),
            M::Movmskpd => self.move_signs(i, 64),
            M::Ldmxcsr => self.load_mxcsr(i),
            M::Stmxcsr => self.store_bytes(i, &self.cpu.fpu.mxcsr().to_le_bytes(), Alignment::Checked(4)),
            mnemonic => match (bits_of(mnemonic), integer_of(mnemonic)) {
                (Some(op), _) => self.combine(i, |a, b| host_fpu::packed(op, a, b)),
                (_, Some(opcode)) if i.op0_register().is_mm() => {
                    let op = Mmx::new(opcode);
                    self.combine(i, |a, b| host_fpu::mmx(op, a as u64, b as u64).into())
                }
                (_, Some(opcode)) => {
                    let op = Packed::integer(opcode);
                    self.combine(i, |a, b| host_fpu::packed(op, a, b))
                }
                _ => self.simd_float(i),
            },
        }
    }

    /// Operand `op`: a register of any kind, memory of the instruction's size, or an immediate; zero-extended.
    pub(super) fn vector(&mut self, i: &Instruction, op: u32) -> Exec<u128> {
        let register = i.op_register(op);
        match i.op_kind(op) {
            OpKind::Register if register.is_xmm() => Ok(self.cpu.fpu.xmm(register.number())),
            OpKind::Register if register.is_mm() => Ok(self.cpu.fpu.mm(register.number()).into()),
            OpKind::Register => Ok(self.register(register).into()),
            OpKind::Memory => {
                let mut bytes = [0; 16];
                let size = i.memory_size().size().min(16);
                self.load_bytes(i, &mut bytes[..size], alignment_of(i, size))?;
                Ok(u128::from_le_bytes(bytes))
            }
            _ => Ok(i.immediate8().into()),
        }
    }

    /// Writes operand `op`, a register of any kind or memory, with as much of `value` as it holds.
    pub(super) fn set_vector(&mut self, i: &Instruction, op: u32, value: u128) -> Exec {
        let register = i.op_register(op);
        if in_memory(i, op) {
            let size = i.memory_size().size().min(16);
            return self.store_bytes(i, &value.to_le_bytes()[..size], alignment_of(i, size));
        }
        if register.is_xmm() {
            self.cpu.fpu.set_xmm(register.number(), value);
        } else if register.is_mm() {
            self.cpu.fpu.set_mm(register.number(), value as u64);
        } else {
            self.set_register(register, value as u32);
        }
        Ok(())
    }

    /// A plain move of the bits in `mask`; the rest of a register is cleared.
    fn copy(&mut self, i: &Instruction, mask: u128) -> Exec {
        let value = self.vector(i, 1)?;
        self.set_vector(i, 0, value & mask)
    }

    /// MOVSS and MOVSD: between registers the rest of the destination stays, from memory it is cleared.
    fn move_scalar(&mut self, i: &Instruction, bits: u32) -> Exec {
        let mut value = self.vector(i, 1)?;
        if !in_memory(i, 0) && !in_memory(i, 1) {
            value = with_lane(self.vector(i, 0)?, 0, bits, value);
        }
        self.set_vector(i, 0, value)
    }

    /// Moves between a half of a register and memory, or half `from` of another; the other half stays.
    fn move_half(&mut self, i: &Instruction, half: u32, from: u32) -> Exec {
        if in_memory(i, 0) {
            let value = self.vector(i, 1)?;
            return self.set_vector(i, 0, lane(value, half, 64));
        }
        let source = self.vector(i, 1)?;
        let value = with_lane(self.vector(i, 0)?, half, 64, lane(source, from, 64));
        self.set_vector(i, 0, value)
    }

    /// MASKMOVQ and MASKMOVDQU: the bytes whose mask byte has its top bit set go to DS:(E)DI. All `size` bytes must be
    /// writable, whatever the mask.
    fn store_masked(&mut self, i: &Instruction, size: u32) -> Exec {
        let (value, mask) = (self.vector(i, 1)?, signs(self.vector(i, 2)?, 8, 8 * size));
        let address = if i.op0_kind() == OpKind::MemorySegDI { 0xffff } else { u32::MAX };
        let offset = self.cpu.gpr[EDI] & address;
        let gva = self.range(segment_of(i.memory_segment()), offset, size, AccessKind::Write)?;
        ensure(gva.0 & 7 == 0 || !self.aligned(), Exception::AC)?;
        let access = Access::write(self.user());
        self.bus.probe(gva, size, access)?;
        for n in (0..size).filter(|n| mask >> n & 1 != 0) {
            self.bus.write(gva.wrapping_add(n), Width::B1, lane(value, n, 8) as u64, access)?;
        }
        self.watch(gva, size, true);
        Ok(())
    }

    /// The result of the first two operands goes into the first.
    fn combine(&mut self, i: &Instruction, of: impl Fn(u128, u128) -> u128) -> Exec {
        let (a, b) = (self.vector(i, 0)?, self.vector(i, 1)?);
        self.set_vector(i, 0, of(a, b))
    }

    /// The same with an immediate for its order.
    fn shuffle(&mut self, i: &Instruction, of: impl Fn(u128, u128, u32) -> u128) -> Exec {
        let order = i.immediate8().into();
        self.combine(i, |a, b| of(a, b, order))
    }

    fn shift_whole(&mut self, i: &Instruction, left: bool) -> Exec {
        self.combine(i, |a, count| shift_bytes(a, left, count as u32))
    }

    fn extract_word(&mut self, i: &Instruction) -> Exec {
        let words = if i.op1_register().is_mm() { 4 } else { 8 };
        let value = lane(self.vector(i, 1)?, u32::from(i.immediate8()) % words, 16);
        self.set_vector(i, 0, value)
    }

    fn insert_word(&mut self, i: &Instruction) -> Exec {
        let words = if i.op0_register().is_mm() { 4 } else { 8 };
        let place = u32::from(i.immediate8()) % words;
        self.combine(i, |old, word| with_lane(old, place, 16, word))
    }

    fn move_signs(&mut self, i: &Instruction, bits: u32) -> Exec {
        let width = if i.op1_register().is_mm() { 64 } else { 128 };
        let value = signs(self.vector(i, 1)?, bits, width);
        self.set_vector(i, 0, value.into())
    }

    /// LDMXCSR: #GP for reserved bits.
    fn load_mxcsr(&mut self, i: &Instruction) -> Exec {
        let mut bytes = [0; 4];
        self.load_bytes(i, &mut bytes, Alignment::Checked(4))?;
        ensure(self.cpu.fpu.set_mxcsr(u32::from_le_bytes(bytes)), Exception::gp(0))
    }
}

/// How a memory operand of `size` bytes has to lie.
fn alignment_of(i: &Instruction, size: usize) -> Alignment {
    match size {
        16 if !bears_misalignment(i.mnemonic()) => Alignment::Always,
        size => Alignment::Checked(size as u32),
    }
}

/// Bits of floating-point operands, moved or combined as they are.
fn bits_of(mnemonic: Mnemonic) -> Option<Packed> {
    use Mnemonic as M;
    let (prefix, opcode) = match mnemonic {
        M::Unpcklps => (Prefix::None, 0x14),
        M::Unpcklpd => (Prefix::P66, 0x14),
        M::Unpckhps => (Prefix::None, 0x15),
        M::Unpckhpd => (Prefix::P66, 0x15),
        M::Andps | M::Andpd => (Prefix::None, 0x54),
        M::Andnps | M::Andnpd => (Prefix::None, 0x55),
        M::Orps | M::Orpd => (Prefix::None, 0x56),
        M::Xorps | M::Xorpd => (Prefix::None, 0x57),
        _ => return None,
    };
    Some(Packed::bits(prefix, opcode))
}

/// The second opcode byte of an integer instruction on MMX or XMM registers. Shifts by an immediate are those by a
/// register with the immediate in it.
fn integer_of(mnemonic: Mnemonic) -> Option<u8> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Punpcklbw => 0x60,
        M::Punpcklwd => 0x61,
        M::Punpckldq => 0x62,
        M::Packsswb => 0x63,
        M::Pcmpgtb => 0x64,
        M::Pcmpgtw => 0x65,
        M::Pcmpgtd => 0x66,
        M::Packuswb => 0x67,
        M::Punpckhbw => 0x68,
        M::Punpckhwd => 0x69,
        M::Punpckhdq => 0x6a,
        M::Packssdw => 0x6b,
        M::Punpcklqdq => 0x6c,
        M::Punpckhqdq => 0x6d,
        M::Pcmpeqb => 0x74,
        M::Pcmpeqw => 0x75,
        M::Pcmpeqd => 0x76,
        M::Psrlw => 0xd1,
        M::Psrld => 0xd2,
        M::Psrlq => 0xd3,
        M::Paddq => 0xd4,
        M::Pmullw => 0xd5,
        M::Psubusb => 0xd8,
        M::Psubusw => 0xd9,
        M::Pminub => 0xda,
        M::Pand => 0xdb,
        M::Paddusb => 0xdc,
        M::Paddusw => 0xdd,
        M::Pmaxub => 0xde,
        M::Pandn => 0xdf,
        M::Pavgb => 0xe0,
        M::Psraw => 0xe1,
        M::Psrad => 0xe2,
        M::Pavgw => 0xe3,
        M::Pmulhuw => 0xe4,
        M::Pmulhw => 0xe5,
        M::Psubsb => 0xe8,
        M::Psubsw => 0xe9,
        M::Pminsw => 0xea,
        M::Por => 0xeb,
        M::Paddsb => 0xec,
        M::Paddsw => 0xed,
        M::Pmaxsw => 0xee,
        M::Pxor => 0xef,
        M::Psllw => 0xf1,
        M::Pslld => 0xf2,
        M::Psllq => 0xf3,
        M::Pmuludq => 0xf4,
        M::Pmaddwd => 0xf5,
        M::Psadbw => 0xf6,
        M::Psubb => 0xf8,
        M::Psubw => 0xf9,
        M::Psubd => 0xfa,
        M::Psubq => 0xfb,
        M::Paddb => 0xfc,
        M::Paddw => 0xfd,
        M::Paddd => 0xfe,
        _ => return None,
    })
}
