//! SSE and SSE2 floating point: on the host with all exceptions masked, then judged by the guest's masks.
//!
//! How exceptions are told: the host says which it saw. Invalid, denormal and zero-divide come before the computation;
//! where the guest has one of them unmasked, nothing is computed, so overflow, underflow and precision are not noted.
//! Noted exceptions stay in MXCSR, and an unmasked one among them is #XM, or #UD without CR4.OSXMMEXCPT, with the
//! destination as it was.
//!
//! Overflow and underflow mean something else where they are unmasked, which `sse_unmasked` finds out.
//!
//! See: Intel SDM vol. 1, 11.5 (exceptions), 10.2.3 (MXCSR), 4.9.1.5 (underflow).

use iced_x86::{Instruction, Mnemonic};

use super::flags::ARITHMETIC;
use super::sse_unmasked::beyond_range;
use super::{Bus, Core, Exception, Exec, Leave, ensure};
use crate::cpu::cr4;
use crate::host_fpu::{self, Float, Mixed, Operands, Prefix};

/// MXCSR's flags: the exceptions before the computation.
const BEFORE: u32 = 0x07;
/// All of them.
const ALL: u32 = 0x3f;
/// Their masks are so many bits further up.
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
        self.judge(beyond_range(i.mnemonic(), [a, b], &operands, mxcsr))?;
        match i.mnemonic() {
            Mnemonic::Comiss | Mnemonic::Comisd | Mnemonic::Ucomiss | Mnemonic::Ucomisd => {
                self.cpu.eflags = self.cpu.eflags & !ARITHMETIC | operands.flags;
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
        self.judge(operands.mxcsr)?;
        let to_mmx = i.op0_register().is_mm();
        self.set_vector(i, 0, if to_mmx { operands.mm.into() } else { operands.a })
    }

    /// The exceptions that MXCSR does not mask, as its flags.
    fn unmasked(&self) -> u32 {
        !self.cpu.fpu.mxcsr() >> MASK_SHIFT & ALL
    }

    /// Notes what was raised in MXCSR, and faults where it is unmasked.
    fn judge(&mut self, raised: u32) -> Exec {
        let unmasked = self.unmasked();
        let noted = if raised & BEFORE & unmasked != 0 { raised & BEFORE } else { raised };
        self.cpu.fpu.raise_simd(noted);
        let reported = self.cpu.cr4 & cr4::OSXMMEXCPT != 0;
        ensure(noted & unmasked == 0, if reported { Exception::XM } else { Exception::UD })
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
