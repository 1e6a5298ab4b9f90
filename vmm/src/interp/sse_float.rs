//! SSE and SSE2 floating point: on the host with all exceptions masked, then judged by the guest's masks.
//!
//! How exceptions are told: the host says which it saw. Invalid, denormal and zero-divide come before the computation;
//! where the guest has one of them unmasked, nothing is computed, so overflow, underflow and precision are not noted.
//! Noted exceptions stay in MXCSR, and an unmasked one among them is #XM, or #UD without CR4.OSXMMEXCPT, with the
//! destination as it was.
//!
//! Masked underflow is a result that is tiny and inexact, which is what the host reports; unmasked underflow is any
//! tiny result, so that exact ones are looked for here.
//!
//! See: Intel SDM vol. 1, 11.5 (exceptions), 10.2.3 (MXCSR), 4.9.1.5 (underflow).

use iced_x86::{Instruction, Mnemonic};

use super::{Bus, Core, Exception, Exec, Leave, alu, ensure};
use crate::cpu::cr4;
use crate::host_fpu::{self, Float, Mixed, Operands, Prefix};

/// MXCSR's flags: the exceptions before the computation, and underflow. Their masks are seven bits further up.
const BEFORE: u32 = 0x07;
const UNDERFLOW: u32 = 0x10;
const MASK_SHIFT: u32 = 7;

impl<B: Bus + ?Sized> Core<'_, B> {
    /// A floating-point instruction that is no move.
    pub(super) fn simd_float(&mut self, i: &Instruction) -> Exec {
        if let Some((prefix, opcode)) = mixed_of(i.mnemonic()) {
            return self.convert_mixed(i, Mixed::new(prefix, opcode));
        }
        let op = match (compare_of(i.mnemonic()), float_of(i.mnemonic())) {
            (Some(prefix), _) => Float::compare(prefix, i.immediate8()),
            (_, Some((prefix, opcode))) => Float::new(prefix, opcode),
            _ => return Err(Leave::Unknown("this SSE instruction")),
        };
        let (a, b) = (self.vector(i, 0)?, self.vector(i, 1)?);
        let mxcsr = self.cpu.fpu.mxcsr();
        let mut operands = Operands { a, b, general: b as u32, mxcsr, ..Operands::default() };
        host_fpu::float(op, &mut operands);
        self.judge(operands.mxcsr, tiny(i.mnemonic(), operands.a))?;
        match i.mnemonic() {
            Mnemonic::Comiss | Mnemonic::Comisd | Mnemonic::Ucomiss | Mnemonic::Ucomisd => {
                self.cpu.eflags = self.cpu.eflags & !alu::ARITHMETIC | operands.flags;
                Ok(())
            }
            _ if i.op0_register().is_xmm() => self.set_vector(i, 0, operands.a),
            _ => self.set_vector(i, 0, operands.general.into()),
        }
    }

    /// A conversion from or to an MMX register.
    fn convert_mixed(&mut self, i: &Instruction, op: Mixed) -> Exec {
        let (a, b) = (self.vector(i, 0)?, self.vector(i, 1)?);
        let mxcsr = self.cpu.fpu.mxcsr();
        let mut operands = Operands { a, b, mm: b as u64, mxcsr, ..Operands::default() };
        host_fpu::mixed(op, &mut operands);
        self.judge(operands.mxcsr, false)?;
        let to_mmx = i.op0_register().is_mm();
        self.set_vector(i, 0, if to_mmx { operands.mm.into() } else { operands.a })
    }

    /// Notes what was raised in MXCSR, and faults where it is unmasked. `tiny`: a result is, which the host has not
    /// reported if it was exact.
    fn judge(&mut self, raised: u32, tiny: bool) -> Exec {
        let unmasked = !self.cpu.fpu.mxcsr() >> MASK_SHIFT;
        let noted = if raised & BEFORE & unmasked != 0 {
            raised & BEFORE
        } else if tiny && unmasked & UNDERFLOW != 0 {
            raised | UNDERFLOW
        } else {
            raised
        };
        self.cpu.fpu.raise_simd(noted);
        let reported = self.cpu.cr4 & cr4::OSXMMEXCPT != 0;
        ensure(noted & unmasked & 0x3f == 0, if reported { Exception::XM } else { Exception::UD })
    }
}

/// True where a lane that the instruction computed is denormal.
fn tiny(mnemonic: Mnemonic, result: u128) -> bool {
    use Mnemonic as M;
    let single = |n: u32| (result >> (32 * n)) as u32 & 0x7fff_ffff;
    let double = |n: u32| (result >> (64 * n)) as u64 & (u64::MAX >> 1);
    let singles = |count| (0..count).any(|n| (1..1 << 23).contains(&single(n)));
    let doubles = |count| (0..count).any(|n| (1..1 << 52).contains(&double(n)));
    match mnemonic {
        M::Addps | M::Subps | M::Mulps | M::Divps => singles(4),
        M::Cvtpd2ps => singles(2),
        M::Addss | M::Subss | M::Mulss | M::Divss | M::Cvtsd2ss => singles(1),
        M::Addpd | M::Subpd | M::Mulpd | M::Divpd => doubles(2),
        M::Addsd | M::Subsd | M::Mulsd | M::Divsd => doubles(1),
        _ => false,
    }
}

fn mixed_of(mnemonic: Mnemonic) -> Option<(Prefix, u8)> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Cvtpi2ps => (Prefix::None, 0x2a),
        M::Cvtpi2pd => (Prefix::P66, 0x2a),
        M::Cvttps2pi => (Prefix::None, 0x2c),
        M::Cvttpd2pi => (Prefix::P66, 0x2c),
        M::Cvtps2pi => (Prefix::None, 0x2d),
        M::Cvtpd2pi => (Prefix::P66, 0x2d),
        _ => return None,
    })
}

fn compare_of(mnemonic: Mnemonic) -> Option<Prefix> {
    Some(match mnemonic {
        Mnemonic::Cmpps => Prefix::None,
        Mnemonic::Cmppd => Prefix::P66,
        Mnemonic::Cmpss => Prefix::Pf3,
        Mnemonic::Cmpsd => Prefix::Pf2,
        _ => return None,
    })
}

fn float_of(mnemonic: Mnemonic) -> Option<(Prefix, u8)> {
    use Mnemonic as M;
    use Prefix::{None as Ps, P66 as Pd, Pf2 as Sd, Pf3 as Ss};
    Some(match mnemonic {
        M::Cvtsi2ss => (Ss, 0x2a),
        M::Cvtsi2sd => (Sd, 0x2a),
        M::Cvttss2si => (Ss, 0x2c),
        M::Cvttsd2si => (Sd, 0x2c),
        M::Cvtss2si => (Ss, 0x2d),
        M::Cvtsd2si => (Sd, 0x2d),
        M::Ucomiss => (Ps, 0x2e),
        M::Ucomisd => (Pd, 0x2e),
        M::Comiss => (Ps, 0x2f),
        M::Comisd => (Pd, 0x2f),
        M::Sqrtps => (Ps, 0x51),
        M::Sqrtpd => (Pd, 0x51),
        M::Sqrtss => (Ss, 0x51),
        M::Sqrtsd => (Sd, 0x51),
        M::Rsqrtps => (Ps, 0x52),
        M::Rsqrtss => (Ss, 0x52),
        M::Rcpps => (Ps, 0x53),
        M::Rcpss => (Ss, 0x53),
        M::Addps => (Ps, 0x58),
        M::Addpd => (Pd, 0x58),
        M::Addss => (Ss, 0x58),
        M::Addsd => (Sd, 0x58),
        M::Mulps => (Ps, 0x59),
        M::Mulpd => (Pd, 0x59),
        M::Mulss => (Ss, 0x59),
        M::Mulsd => (Sd, 0x59),
        M::Cvtps2pd => (Ps, 0x5a),
        M::Cvtpd2ps => (Pd, 0x5a),
        M::Cvtss2sd => (Ss, 0x5a),
        M::Cvtsd2ss => (Sd, 0x5a),
        M::Cvtdq2ps => (Ps, 0x5b),
        M::Cvtps2dq => (Pd, 0x5b),
        M::Cvttps2dq => (Ss, 0x5b),
        M::Subps => (Ps, 0x5c),
        M::Subpd => (Pd, 0x5c),
        M::Subss => (Ss, 0x5c),
        M::Subsd => (Sd, 0x5c),
        M::Minps => (Ps, 0x5d),
        M::Minpd => (Pd, 0x5d),
        M::Minss => (Ss, 0x5d),
        M::Minsd => (Sd, 0x5d),
        M::Divps => (Ps, 0x5e),
        M::Divpd => (Pd, 0x5e),
        M::Divss => (Ss, 0x5e),
        M::Divsd => (Sd, 0x5e),
        M::Maxps => (Ps, 0x5f),
        M::Maxpd => (Pd, 0x5f),
        M::Maxss => (Ss, 0x5f),
        M::Maxsd => (Sd, 0x5f),
        M::Cvttpd2dq => (Pd, 0xe6),
        M::Cvtdq2pd => (Ss, 0xe6),
        M::Cvtpd2dq => (Sd, 0xe6),
        _ => return None,
    })
}
