//! Blocks, and how they are found: by linear address while nothing has been flushed, else by frame.
//!
//! Story: a block is a way through code: straight on, and along the jumps and calls that are always taken and stay in the page.
//!
//! Holds: arenas are made once and filled from the front; when one is full everything is forgotten. A block lies in one
//! page, or is one instruction that begins in a page and ends in the next. Its key is where its bytes are, not where they
//! are mapped: displacements are relative, so it is the same wherever that is.

use iced_x86::Instruction;
use umbra_mmu::{CodeFrame, Gva, Mfn};

use super::CodeBus;
use super::run::Run;
use super::translate::{After, Op, translate};
use crate::interp::Leave;
use crate::interp::fetch::{DecodeError, INSTRUCTION_BYTES_MAX, decode};

/// Ops of one block at most.
const OPS_MAX: usize = 64;
/// Ops of all blocks.
const OPS: usize = 1 << 17;
/// Instructions that are kept as such.
const INSTRUCTIONS: usize = 1 << 15;
/// Blocks.
const BLOCKS: usize = 1 << 14;
/// Entries of the table of blocks by frame, and of the jump cache; powers of two.
const TABLE: usize = 1 << 15;
const JUMPS: usize = 1 << 12;
const PAGE: u32 = 4096;
const NO_BLOCK: u32 = u32::MAX;

/// Code without a choice of ways but to leave it, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Where its bytes are.
    pub frame: Mfn,
    /// The frame's code generation when they were read.
    pub generation: u32,
    /// Where the last of them are, if that is in another page; [`NO_TAIL`] otherwise.
    pub tail: CodeFrame,
    /// Ops.
    pub count: u16,
    /// Offset, from its start, of what comes when all its ops are through.
    pub next: i16,
    first: u32,
    /// Offset in the page, and CS's D bit above.
    place: u32,
}

/// A block that lies in one page.
pub const NO_TAIL: CodeFrame = CodeFrame { mfn: Mfn(0), generation: 0 };

/// What a jump once led to.
#[derive(Clone, Copy, Debug)]
struct Jump {
    gva: Gva,
    /// Privilege and D bit; [`NO_MODE`] for nothing.
    mode: u32,
    version: u64,
    block: Block,
}

const NO_MODE: u32 = u32::MAX;
const NOWHERE: Jump = Jump {
    gva: Gva(0),
    mode: NO_MODE,
    version: 0,
    block: Block { frame: Mfn(0), generation: 0, tail: NO_TAIL, count: 0, next: 0, first: 0, place: 0 },
};

/// All blocks of one vCPU.
#[derive(Debug)]
pub struct Cache {
    ops: Vec<Op>,
    instructions: Vec<Instruction>,
    blocks: Vec<Block>,
    table: Box<[u32]>,
    jumps: Box<[Jump; JUMPS]>,
}

/// The mode of code by which blocks are found beside its address.
pub fn mode_of(user: bool, wide: bool) -> u32 {
    u32::from(user) | u32::from(wide) << 1
}

fn place_of(gva: Gva, wide: bool) -> u32 {
    gva.offset() | u32::from(wide) << 12
}

fn slot_of(frame: Mfn, place: u32) -> usize {
    (frame.0.wrapping_mul(0x9e37_79b1) ^ place.wrapping_mul(0x85eb_ca6b)) as usize >> 8 & (TABLE - 1)
}

fn jump_of(gva: Gva) -> usize {
    (gva.0 ^ gva.0 >> 12) as usize & (JUMPS - 1)
}

/// An empty jump cache. Its length is part of its type, so that looking into it is not checked each time.
fn jumps() -> Box<[Jump; JUMPS]> {
    let all: Box<[Jump]> = vec![NOWHERE; JUMPS].into();
    all.try_into().unwrap_or_else(|_| Box::new([NOWHERE; JUMPS]))
}

impl Cache {
    pub fn new() -> Cache {
        Cache {
            ops: Vec::with_capacity(OPS),
            instructions: Vec::with_capacity(INSTRUCTIONS),
            blocks: Vec::with_capacity(BLOCKS),
            table: vec![NO_BLOCK; TABLE].into(),
            jumps: jumps(),
        }
    }

    /// The block that code at `gva` was in when last looked for under `version`.
    #[inline(always)]
    pub fn jump(&self, gva: Gva, mode: u32, version: u64) -> Option<&Block> {
        let jump = &self.jumps[jump_of(gva)];
        let same = jump.gva == gva && jump.version == version && jump.mode == mode;
        if same { Some(&jump.block) } else { None }
    }

    /// Notes what [`Cache::jump`] is to find.
    pub fn remember(&mut self, gva: Gva, mode: u32, version: u64, block: Block) {
        self.jumps[jump_of(gva)] = Jump { gva, mode, block, version };
    }

    /// The block whose code is in `frame` where `gva` is mapped, as it is now.
    pub fn find(&self, frame: CodeFrame, gva: Gva, wide: bool) -> Option<u32> {
        let place = place_of(gva, wide);
        let number = self.table[slot_of(frame.mfn, place)];
        let block = self.blocks.get(number as usize)?;
        let same = block.frame == frame.mfn && block.generation == frame.generation && block.place == place;
        same.then_some(number)
    }

    pub fn block(&self, number: u32) -> Block {
        self.blocks[number as usize]
    }

    #[inline]
    pub fn ops(&self, block: &Block) -> &[Op] {
        &self.ops[block.first as usize..][..usize::from(block.count)]
    }

    /// The first `count` ops of a block that has more, as a block.
    pub fn cut(&self, block: &Block, count: u16) -> Block {
        let last = usize::from(count).checked_sub(1).and_then(|last| self.ops(block).get(last));
        last.map_or(*block, |op| Block { count, next: op.next(), ..*block })
    }

    /// The instruction of a generic op.
    pub fn instruction(&self, op: &Op) -> &Instruction {
        &self.instructions[op.imm as usize]
    }

    /// Decodes the block at `gva`, whose bytes are in `frame`; `None` where there is not even one instruction.
    pub fn build<B: CodeBus>(
        &mut self,
        run: &mut Run<'_, B>,
        frame: CodeFrame,
        gva: Gva,
    ) -> Result<Option<u32>, Leave> {
        self.make_room();
        let (first, mut at, mut count, mut tail) = (self.ops.len(), 0, 0, NO_TAIL);
        while count < OPS_MAX && tail == NO_TAIL {
            let instruction = match fetch(run, gva, at) {
                Ok(Fetched::Whole(instruction)) => instruction,
                Ok(Fetched::Cut) if count == 0 => match fetch_over(run, gva)? {
                    Some((instruction, frame)) => {
                        tail = frame;
                        instruction
                    }
                    None => break,
                },
                // Nobody has come to it yet.
                Err(_) if count > 0 => break,
                Err(leave) => return Err(leave),
                Ok(Fetched::Cut | Fetched::Nothing) => break,
            };
            at += instruction.len() as i32;
            let mut op = translate(&instruction, count as u8, at as i16, self.instructions.len() as u32);
            if count + 1 < OPS_MAX && tail == NO_TAIL {
                op.follow(|to| (0..PAGE as i32).contains(&(gva.offset() as i32 + to)));
            }
            at = op.next().into();
            if let Some(before) = self.ops[first..].last_mut() {
                before.join(&op);
            }
            if op.is_generic() {
                self.instructions.push(instruction);
            }
            self.ops.push(op);
            count += 1;
            if !matches!(op.after, After::Next | After::There) {
                break;
            }
        }
        if count == 0 {
            return Ok(None);
        }
        for at in first + 1..self.ops.len() {
            self.ops[at - 1].then = self.ops[at].handler;
        }
        let place = place_of(gva, run.wide);
        let number = self.blocks.len() as u32;
        self.blocks.push(Block {
            frame: frame.mfn,
            generation: frame.generation,
            tail,
            count: count as u16,
            next: at as i16,
            first: first as u32,
            place,
        });
        self.table[slot_of(frame.mfn, place)] = number;
        Ok(Some(number))
    }

    /// Forgets everything where an arena could overflow.
    fn make_room(&mut self) {
        let full = self.ops.len() + OPS_MAX > OPS
            || self.instructions.len() + OPS_MAX > INSTRUCTIONS
            || self.blocks.len() == BLOCKS;
        if full {
            self.ops.clear();
            self.instructions.clear();
            self.blocks.clear();
            self.table.fill(NO_BLOCK);
            self.jumps.fill(NOWHERE);
        }
    }
}

/// What there is at an address.
enum Fetched {
    Whole(Instruction),
    /// An instruction goes on behind the page.
    Cut,
    /// No instruction.
    Nothing,
}

/// The instruction `at` bytes behind `gva`, in the page of `gva`.
fn fetch<B: CodeBus>(run: &mut Run<'_, B>, gva: Gva, at: i32) -> Result<Fetched, Leave> {
    let room = PAGE - gva.offset().wrapping_add(at as u32);
    let at = at as u32;
    let mut bytes = [0; INSTRUCTION_BYTES_MAX];
    let wanted = bytes.len().min(room as usize);
    if wanted == 0 {
        return Ok(Fetched::Nothing);
    }
    let length = run.core.bus.fetch(gva.wrapping_add(at), run.user, &mut bytes[..wanted])?;
    Ok(match decode(&bytes[..length], run.wide, at) {
        Ok(instruction) => Fetched::Whole(instruction),
        Err(DecodeError::Short) => Fetched::Cut,
        Err(DecodeError::Invalid | DecodeError::TooLong) => Fetched::Nothing,
    })
}

/// The instruction at `gva` that ends in the next page, and the frame of that; `None` where a step must find out what is
/// wrong with it.
fn fetch_over<B: CodeBus>(run: &mut Run<'_, B>, gva: Gva) -> Result<Option<(Instruction, CodeFrame)>, Leave> {
    let room = PAGE - gva.offset();
    let (next, user) = (gva.wrapping_add(room), run.user);
    // Behind the last EIP there is no code.
    if run.core.cpu.eip.checked_add(room).is_none() {
        return Ok(None);
    }
    let Ok(Some(tail)) = run.core.bus.code_frame(next, user) else { return Ok(None) };
    let mut bytes = [0; INSTRUCTION_BYTES_MAX];
    let Some((head, rest)) = bytes.split_at_mut_checked(room as usize) else { return Ok(None) };
    let read = run.core.bus.fetch(gva, user, head)? + run.core.bus.fetch(next, user, rest)?;
    let instruction = decode(&bytes[..read], run.wide, 0).ok();
    Ok(instruction.filter(|i| i.len() > room as usize && read == bytes.len()).map(|i| (i, tail)))
}
