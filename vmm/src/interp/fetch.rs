//! Fetching and decoding: from CS:EIP to a decoded instruction.
//!
//! Holds: a decoded instruction is used by its length, operands and branch *displacement* only, so it is the same
//! wherever it is mapped; a cache may keep it by frame.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction};
use umbra_mmu::Gva;

use super::{Bus, Core, Exception, Exec, Leave, ensure};
use crate::cpu::Seg;

/// The longest instruction, in bytes.
pub(super) const INSTRUCTION_BYTES_MAX: usize = 15;

/// TZCNT, LZCNT and WBNOINVD are features that this CPU does not have: without them their encodings are BSF, BSR
/// and WBINVD with a prefix that means nothing.
const OPTIONS: u32 =
    DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::NO_WBNOINVD;

/// Why bytes are not an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// There must be more bytes.
    Short,
    /// Not an instruction: #UD.
    Invalid,
    /// Over 15 bytes: #GP(0).
    TooLong,
}

/// Decodes the instruction that `bytes` begin with. `wide` is CS's D bit, `eip` its address.
pub fn decode(bytes: &[u8], wide: bool, eip: u32) -> Result<Instruction, DecodeError> {
    let mut decoder = Decoder::with_ip(if wide { 32 } else { 16 }, bytes, u64::from(eip), OPTIONS);
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None if instruction.code() != Code::INVALID => Ok(instruction),
        DecoderError::NoMoreBytes => Err(DecodeError::Short),
        _ if decoder.position() >= INSTRUCTION_BYTES_MAX => Err(DecodeError::TooLong),
        _ => Err(DecodeError::Invalid),
    }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// The linear address of an offset in CS.
    pub(super) fn code_address(&self, eip: u32) -> Gva {
        Gva(self.cpu.segment(Seg::Cs).base.wrapping_add(eip))
    }

    /// Reads and decodes the instruction at CS:EIP. Bytes of the next page are asked for only when the instruction
    /// needs them, so that the fault, if any, is where the architecture has it.
    pub(super) fn fetch(&mut self) -> Exec<Instruction> {
        let (eip, user) = (self.cpu.eip, self.user());
        let (limit, wide) = (self.cpu.segment(Seg::Cs).limit, self.cpu.segment(Seg::Cs).big());
        ensure(eip <= limit, Exception::gp(0))?;
        let room = ((limit - eip) as usize).saturating_add(1).min(INSTRUCTION_BYTES_MAX);
        let mut bytes = [0; INSTRUCTION_BYTES_MAX];
        let mut have = 0;
        loop {
            ensure(have < room, Exception::gp(0))?;
            let at = self.code_address(eip.wrapping_add(have as u32));
            match self.bus.fetch(at, user, &mut bytes[have..room])? {
                0 => return Err(Leave::Again),
                more => have = (have + more).min(room),
            }
            match decode(&bytes[..have], wide, eip) {
                Ok(instruction) => return Ok(instruction),
                Err(DecodeError::Short) => {}
                Err(DecodeError::Invalid) => return Err(Exception::UD.into()),
                Err(DecodeError::TooLong) => return Err(Exception::gp(0).into()),
            }
        }
    }
}
