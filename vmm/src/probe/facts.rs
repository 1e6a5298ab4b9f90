//! Facts that need no clock: which trap an instruction raises, and what makes a changed translation seen.

use std::sync::Arc;

use serde::Serialize;
use umbra_mmu::{Gva, Mfn};

use super::ProbeError;
use super::scratch::{ALL, CODE, Scratch};
use crate::kvm::shootdown::Notifier;
use crate::kvm::{KvmError, KvmExit};

/// A page that is not mapped unless a probe maps it.
pub const ABSENT: Gva = Gva(0x40_0000);

/// `hlt`: traps everywhere, with nothing to it.
pub const HLT: [u8; 1] = [0xf4];

/// `mov eax, [ABSENT]; hlt`.
const READ: [u8; 6] = [0xa1, 0, 0, 0x40, 0, 0xf4];

/// What makes this KVM see a changed entry in our page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Translation {
    /// A flush is enough: the CPU walks our tables itself (two-dimensional paging), or KVM walks them each time.
    FlushSuffices,
    /// A flush is not: KVM keeps shadows of our tables and does not see what the VMM stores. Frames must be
    /// dropped through the host's MMU notifier.
    NeedsNotifier,
}

/// Maps the absent page to one frame, reads it in the guest, maps it to another and reads it after a flush.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn translation(scratch: &mut Scratch) -> Result<Translation, ProbeError> {
    const ROUNDS: u32 = 4;
    let frames = two_frames(scratch)?;
    let mut seen = 0;
    for round in 0..=ROUNDS {
        let which = (round % 2) as usize;
        scratch.space.map(ABSENT, frames[which], ALL).map_err(KvmError::from)?;
        seen += u32::from(read_word(scratch)? == which as u32 + 1);
    }
    // Leave it as every host sees it.
    scratch.space.map(ABSENT, frames[0], 0).map_err(KvmError::from)?;
    let notifier = Notifier::new(Arc::clone(&scratch.vm));
    frames.into_iter().try_for_each(|frame| notifier.drop_frame(frame))?;
    Ok(if seen > ROUNDS { Translation::FlushSuffices } else { Translation::NeedsNotifier })
}

/// Two frames, whose first words are 1 and 2.
///
/// # Errors
/// When the scratch pool is used up.
pub fn two_frames(scratch: &mut Scratch) -> Result<[Mfn; 2], KvmError> {
    let frames = [scratch.space.frame()?, scratch.space.frame()?];
    for (number, frame) in frames.into_iter().enumerate() {
        scratch.space.pool().store(frame.at(0), number as u64 + 1)?;
    }
    Ok(frames)
}

fn read_word(scratch: &mut Scratch) -> Result<u32, ProbeError> {
    const WHAT: &str = "a changed translation";
    scratch.load(&READ, true)?;
    let root = scratch.space.root();
    let exit = scratch.vcpu.enter(&mut scratch.cpu, root, true)?;
    expect_trap(WHAT, exit, 13)?;
    Ok(scratch.cpu.gpr[0])
}

/// Insists on a trap of `vector`.
///
/// # Errors
/// On anything else.
pub fn expect_trap(what: &'static str, exit: KvmExit, vector: u8) -> Result<(), ProbeError> {
    match exit {
        KvmExit::Trap { vector: v, .. } if v == vector => Ok(()),
        KvmExit::Kicked => Err(ProbeError::OutOfTime { what }),
        exit => Err(ProbeError::Strange { what, exit }),
    }
}

/// What one instruction does on this host, beside what it does on silicon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TrapRow {
    /// The instruction.
    pub instruction: &'static str,
    /// What silicon does at CPL 3.
    pub silicon: String,
    /// What this host does.
    pub here: String,
    /// True where both are the same.
    pub same: bool,
    /// True where the instruction should run and does not: the interpreter must run it.
    pub interpreted: bool,
}

/// What an instruction does: runs, or raises an exception with an error code.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    Runs,
    Raises(u8, u32),
}

impl std::fmt::Display for Does {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const NAMES: [&str; 20] = [
            "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP",
            "#PF", "15", "#MF", "#AC", "#MC", "#XM",
        ];
        match *self {
            Does::Runs => f.write_str("runs"),
            Does::Raises(vector, error) => {
                match NAMES.get(usize::from(vector)) {
                    Some(name) => f.write_str(name)?,
                    None => write!(f, "vector {vector}")?,
                }
                if matches!(vector, 8 | 10..=14 | 17) { write!(f, "({error:#x})") } else { Ok(()) }
            }
        }
    }
}

const GENERAL: Does = Does::Raises(13, 0);

/// Instruction, code, and what silicon does. One of each kind that the backend meets.
const KINDS: &[(&str, &[u8], Does)] = &[
    ("hlt", &[0xf4], GENERAL),
    ("cli", &[0xfa], GENERAL),
    ("mov eax, cr0", &[0x0f, 0x20, 0xc0], GENERAL),
    ("lgdt", &[0x0f, 0x01, 0x16], GENERAL),
    ("invlpg", &[0x0f, 0x01, 0x3e], GENERAL),
    ("wrmsr", &[0x0f, 0x30], GENERAL),
    ("in al, 0x60", &[0xe4, 0x60], GENERAL),
    ("cpuid", &[0x0f, 0xa2], GENERAL),
    ("rdtsc", &[0x0f, 0x31], GENERAL),
    ("sgdt", &[0x0f, 0x01, 0x06], GENERAL),
    ("far jump to hidden code", &[0xea, 0, 0, 0, 0, 8, 0], Does::Raises(13, 8)),
    ("int 0x80", &[0xcd, 0x80], Does::Raises(13, 0x402)),
    ("int3", &[0xcc], Does::Raises(13, 0x1a)),
    ("ud2", &[0x0f, 0x0b], Does::Raises(6, 0)),
    ("div by 0", &[0xf7, 0xf1], Does::Raises(0, 0)),
    ("read of an absent page", &[0xa1, 0, 0, 0x40, 0], Does::Raises(14, 4)),
    ("write of an absent page", &[0xa3, 0, 0, 0x40, 0], Does::Raises(14, 6)),
    ("inc of an absent page", &[0xff, 0x05, 0, 0, 0x40, 0], Does::Raises(14, 6)),
    ("read across 4 GiB", &[0xa1, 0xfe, 0xff, 0xff, 0xff], GENERAL),
    ("pushf; popf", &[0x9c, 0x9d], Does::Runs),
    ("lock cmpxchg8b", &[0xf0, 0x0f, 0xc7, 0x0e], Does::Runs),
    ("daa", &[0x27], Does::Runs),
    ("lar", &[0x0f, 0x02, 0xc3], Does::Runs),
    ("x87: fld1", &[0xd9, 0xe8], Does::Runs),
    ("MMX: paddb", &[0x0f, 0xfc, 0xc1], Does::Runs),
    ("SSE: movups", &[0x0f, 0x10, 0x06], Does::Runs),
    ("SSE: addps", &[0x0f, 0x58, 0xc1], Does::Runs),
    ("popcnt", &[0xf3, 0x0f, 0xb8, 0xc3], Does::Runs),
];

/// Runs one of each kind.
///
/// # Errors
/// Where the vCPU stops for good.
pub fn traps(scratch: &mut Scratch) -> Result<Vec<TrapRow>, ProbeError> {
    KINDS.iter().map(|&(instruction, code, silicon)| trap(scratch, instruction, code, silicon)).collect()
}

fn trap(
    scratch: &mut Scratch,
    instruction: &'static str,
    code: &[u8],
    silicon: Does,
) -> Result<TrapRow, ProbeError> {
    scratch.load(&[code, &HLT].concat(), true)?;
    let here = match scratch.enter()? {
        KvmExit::Kicked => return Err(ProbeError::OutOfTime { what: instruction }),
        KvmExit::Trap { .. } if scratch.cpu.eip == CODE.0 + code.len() as u32 => Does::Runs,
        KvmExit::Trap { vector, error, .. } => Does::Raises(vector, error),
    };
    Ok(TrapRow {
        instruction,
        silicon: silicon.to_string(),
        here: here.to_string(),
        same: here == silicon,
        interpreted: silicon == Does::Runs && here != Does::Runs,
    })
}
