//! The interpreter's run of a case, and what of it can be compared.

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic};
use umbra::cpu::Seg;
use umbra::interp::{DecodeError, decode};

use super::case::{Blind, Case};
use super::forms::{decode_host, excluded_instance, is_of};
use super::generate::{STABLE_LEAVES, STEPS_MAX};
use super::layout::*;
use super::segments::Ldt;
use super::twin::{End, Twin};

/// The most bytes that one instruction pushes: ENTER with 31 levels.
const PUSHES_MAX: u32 = 4 * 32;

/// OF.
const OVERFLOW: u32 = 0x800;

/// The interpreter's run of a case.
pub struct Run {
    pub end: End,
    /// What was executed, the last one perhaps not retired.
    pub trace: Vec<Code>,
    pub retired_last: bool,
    pub blind: Blind,
}

/// Runs the interpreter on a case from its start.
pub fn interpret(twin: &mut Twin, features: &[CpuidFeature], case: &Case, ldt: &Ldt) -> Run {
    twin.start(case, ldt);
    let end = End::Not("endless".to_string());
    let mut run = Run { end, trace: Vec::new(), retired_last: true, blind: Blind::default() };
    for _ in 0..STEPS_MAX {
        let upcoming = match upcoming(twin, features, &run.blind) {
            Ok(upcoming) => upcoming,
            Err(reason) => {
                run.end = End::Not(reason);
                break;
            }
        };
        run.trace.extend(upcoming.map(|instruction| instruction.code()));
        let (eip, stack) = (twin.cpu.eip, twin.stack_top());
        let end = twin.step();
        // A trap comes after its instruction, a fault before.
        run.retired_last = match &end {
            Some(End::Delivered(outcome)) => upcoming.is_some() && outcome.eip != eip,
            _ => true,
        };
        if let Some(instruction) = upcoming {
            run.look_away(&instruction, stack);
        }
        if let Some(end) = end {
            run.end = end;
            break;
        }
    }
    run
}

impl Run {
    /// Notes what the instruction leaves that is not to be compared. INT3, which ends a case, changes nothing of that.
    fn look_away(&mut self, instruction: &Instruction, stack: u32) {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Int3 => {}
            _ if self.retired_last => {
                let gpr = if instruction.mnemonic() == M::Rdtsc { 0b101 } else { 0 };
                // Of two AMD CPUs that we saw, one leaves the flags of a bit scan as they were, one sets them.
                let open = !is_amd() || matches!(instruction.mnemonic(), M::Bsf | M::Bsr);
                let mut flags = if open { iced_flags(instruction.rflags_undefined()) } else { 0 };
                // By 9 or 17 in all they turn nothing, and Intel's CPUs set OF all the same.
                if !is_amd() && matches!(instruction.mnemonic(), M::Rcl | M::Rcr) {
                    flags |= OVERFLOW;
                }
                self.blind = Blind { gpr, flags, stack: 0..0 };
            }
            // These push more than once, or push and then find a fault.
            M::Enter | M::Pusha | M::Pushad | M::Call => {
                self.blind.stack = stack.wrapping_sub(PUSHES_MAX)..stack;
            }
            M::Popa | M::Popad => self.blind.gpr = !(1 << 4),
            _ => {}
        }
    }
}

/// The instruction at CS:EIP. None where there is none to read. An error where it is not to be compared, as the
/// host's CPU may know one that the interpreter's does not, or where what is `blind` would go on into it.
fn upcoming(twin: &Twin, features: &[CpuidFeature], blind: &Blind) -> Result<Option<Instruction>, String> {
    let cpu = &twin.cpu;
    let cs = cpu.segment(Seg::Cs);
    let offset = cs.base.wrapping_add(cpu.eip).wrapping_sub(CODE) as usize;
    let Some(bytes) = twin.memory.code.get(offset..) else { return Ok(None) };
    let room = u64::from(cs.limit) + 1 - u64::from(cpu.eip.min(cs.limit));
    let bytes = &bytes[..bytes.len().min(15).min(room as usize)];
    let host = decode_host(bytes, cs.big(), cpu.eip);
    let ours = match decode(bytes, cs.big(), cpu.eip) {
        Ok(ours) => ours,
        // How many bytes an encoding that is none has, a CPU decides for itself; UD0 and UD1 too.
        Err(_) if bytes.len() < 15 && is_undefined(bytes, cs.big()) => {
            return Err("#UD, or a fault on bytes that are not there".to_string());
        }
        Err(_) if host.is_invalid() => return Ok(None),
        Err(_) => return Err("only the host knows".to_string()),
    };
    if ours.code() != host.code() || !is_of(host.code(), features) {
        return Err("of other features".to_string());
    }
    if host.mnemonic() == Mnemonic::Cpuid && !STABLE_LEAVES.contains(&cpu.gpr[0]) {
        return Err("CPUID may tell one CPU from another".to_string());
    }
    if !is_amd() && shifts_too_far(&host, cpu.gpr[1]) {
        return Err("SHLD or SHRD of 16 bits by more, whose result is undefined, and AMD's here".to_string());
    }
    if host.mnemonic() != Mnemonic::Int3 && (blind.gpr, blind.flags) != (0, 0) {
        return Err("goes on from the time, or from undefined flags".to_string());
    }
    excluded_instance(&host, bytes).map_or(Ok(Some(ours)), |reason| Err(reason.to_string()))
}

/// True where undefined flags, but for a bit scan's, and the order of faults, but for those of the operands of CMPS, are the
/// interpreter's.
pub fn is_amd() -> bool {
    std::arch::x86_64::__cpuid(0).ecx == u32::from_le_bytes(*b"cAMD")
}

/// SHLD or SHRD of 16 bits by more than these.
fn shifts_too_far(instruction: &Instruction, ecx: u32) -> bool {
    let count = match instruction.code() {
        Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8 => instruction.immediate8(),
        Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL => ecx as u8,
        _ => return false,
    };
    count & 31 > 16
}

/// True where `bytes` can begin no instruction, or UD0 or UD1, whose ModRM byte AMD does not ask for.
fn is_undefined(bytes: &[u8], wide: bool) -> bool {
    let undefined = bytes.windows(2).any(|pair| matches!(pair, [0x0f, 0xff | 0xb9]));
    let mut padded = [0; 15];
    padded[..bytes.len()].copy_from_slice(bytes);
    undefined || decode(&padded, wide, 0) == Err(DecodeError::Invalid)
}

/// iced's flag bits as EFLAGS bits.
fn iced_flags(bits: u32) -> u32 {
    use iced_x86::RflagsBits as R;
    let pairs = [
        (R::OF, OVERFLOW),
        (R::SF, 0x80),
        (R::ZF, 0x40),
        (R::AF, 0x10),
        (R::CF, 1),
        (R::PF, 4),
        (R::DF, 0x400),
    ];
    pairs.iter().filter(|(from, _)| bits & from != 0).fold(0, |flags, (_, to)| flags | to)
}
