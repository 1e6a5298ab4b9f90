//! The engine: the interpreter at speed, by blocks of decoded instructions.
//!
//! Story: [`Engine::run`] does what as many calls of [`super::step`] would do, and is checked against that. It decodes
//! code that has no choice of ways once into blocks, kept by the *frame* that the code stands in; what is hot has handlers of its own
//! (`ops`), everything else is executed as [`super::step`] would.
//!
//! ```text
//! EIP --jump cache--> block --ops--> next EIP
//!         |             ^
//!        miss           | frame and code generation still those of the block?
//!         +--> CodeBus::code_frame --> table of blocks, or decode
//! ```
//!
//! Its jobs, one file each: (1) here, the loop; (2) `cache`, blocks and how they are found; (3) `translate`, from an
//! instruction to an op; (4) `run`, `ops` and `table`: what handlers work on, the handlers, and their numbers.
//!
//! Holds:
//! - INV-ENGINE-1: after `n` steps the state is what `n` calls of `step` leave, bit for bit, and so is what the bus was
//!   asked to change. A budget is never overrun.
//! - INV-ENGINE-2: a block runs only while its frame's code generation is the one it was decoded at. A store to the frame
//!   of the block that runs ends the block behind the instruction that stored.
//! - INV-ENGINE-3: no allocation while code runs that has been decoded before.
//!
//! Limits: the quick way to memory is for flat data segments of base 0, and an operand through FS, GS or CS never takes it.
//! Blocks are for the plain state (`is_plain`): no single-stepping, breakpoints, alignment checks, interrupt
//! shadow, or code segment with a limit or a base within a page. Any other is stepped until it is plain again.

mod cache;
mod ops;
mod run;
mod table;
#[cfg(test)]
mod tests;
mod translate;

use umbra_mmu::{Access, CodeFrame, Gva, Mfn};

use super::{Bus, BusError, Core, Leave, Step, Width, step};
use crate::cpu::{CpuState, Seg, cr0, eflags};
use cache::{Block, Cache, NO_TAIL, mode_of};
use run::{Next, Run};
use table::go_on;
use translate::{After, Op};

/// A bus that the engine can run on: it knows where code stands, and when that changes.
pub trait CodeBus: Bus {
    /// The frame behind `gva`, for a fetch by code of privilege `user`, marked as one that code is decoded from. `None`
    /// where there is no memory, or none that can be marked.
    fn code_frame(&mut self, gva: Gva, user: bool) -> Result<Option<CodeFrame>, BusError>;

    /// The code generation of a frame now: another than was given out once somebody has stored to it.
    fn code_generation(&self, frame: Mfn) -> u32;

    /// Changes whenever a translation may have changed: what was learnt by linear address before is void.
    fn translation_version(&self) -> u64;

    /// True when somebody wants the vCPU to leave; asked once a block.
    fn is_wanted(&self) -> bool;

    /// The run's step number `step` begins, counted from 1, with the instruction at `eip`: told before anything that may read the
    /// time, and at the end of the run.
    fn begin(&mut self, step: u64, eip: u32);

    /// What accesses of privilege `user` are known by for [`CodeBus::quick_read`], [`NO_TAG`] where there is nothing; asked
    /// once a block.
    fn quick_tag(&self, user: bool) -> u64;

    /// [`Bus::read`] of an aligned operand, where that takes nothing but a look at what is known already; `None` asks for
    /// the whole way, and nothing has happened. `access` may be a store's, for what is to be stored to next.
    fn quick_read(&self, tag: u64, gva: Gva, width: Width, access: Access) -> Option<u64>;

    /// [`Bus::write`] likewise; false where it has not been made, as where code has been decoded from that frame.
    fn quick_write(&mut self, tag: u64, gva: Gva, width: Width, value: u64) -> bool;

    /// [`Bus::update_locked`] of an aligned word likewise: `new` takes the place of `expected`, else nothing changes. What was there.
    fn quick_compare_exchange(&mut self, tag: u64, gva: Gva, expected: u32, new: u32) -> Option<u32>;
}

/// A tag that no access goes by.
pub const NO_TAG: u64 = 0;

/// Which code is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    All,
    /// Code at CPL 0 to 2: the run ends before the first instruction at CPL 3.
    Kernel,
}

impl Extent {
    fn covers(self, cpu: &CpuState) -> bool {
        self == Extent::All || cpu.cpl < 3
    }
}

/// What waits until the guest's CPU can take it: a run ends before the first instruction where it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// An external interrupt: for IF, and the end of an interrupt shadow.
    pub interrupt: bool,
    /// An NMI: for the IRET of the one before.
    pub nmi: bool,
}

impl Waiting {
    /// True where `cpu` can take it now. What decides this changes only between two stretches of blocks.
    fn can_be_taken(self, cpu: &CpuState) -> bool {
        (self.interrupt && cpu.interruptible()) || (self.nmi && !cpu.nmi_blocked && !cpu.interrupt_shadow)
    }
}

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Steps made: instructions, those that faulted among them, and parts of string instructions.
    pub steps: u64,
    /// How the last one ended; [`Step::Done`] where the budget, the extent or somebody's wish ended the run.
    pub last: Step,
}

/// The blocks of one vCPU.
#[derive(Debug)]
pub struct Engine {
    cache: Cache,
}

impl Default for Engine {
    fn default() -> Engine {
        Engine { cache: Cache::new() }
    }
}

/// How a block ended.
enum End {
    /// Its last op is behind us, or a branch was taken: on to the next block.
    Over,
    /// The same, and segments, privilege or mode may have changed.
    Changed,
    /// The run ends.
    Stop(Step),
}

impl Engine {
    /// Executes at most `budget` steps of the code that `extent` covers, up to where what is `waiting` can be taken.
    pub fn run<B: CodeBus>(
        &mut self,
        cpu: &mut CpuState,
        bus: &mut B,
        budget: u64,
        extent: Extent,
        waiting: Waiting,
    ) -> Ran {
        let (mut steps, mut last) = (0, Step::Done);
        while last == Step::Done
            && steps < budget
            && extent.covers(cpu)
            && !waiting.can_be_taken(cpu)
            && !bus.is_wanted()
        {
            last = if is_plain(cpu) {
                self.run_plain(cpu, bus, budget, &mut steps)
            } else {
                single(cpu, bus, &mut steps)
            };
        }
        if steps > 0 {
            bus.begin(steps, cpu.eip);
        }
        Ran { steps, last }
    }

    /// Runs blocks until the state may no longer be what it was at the start.
    fn run_plain<B: CodeBus>(
        &mut self,
        cpu: &mut CpuState,
        bus: &mut B,
        budget: u64,
        steps: &mut u64,
    ) -> Step {
        let mut run = Run::new(Core::new(cpu, bus));
        let step = self.run_blocks(&mut run, budget, steps);
        run.put_flags();
        step
    }

    fn run_blocks<B: CodeBus>(&mut self, run: &mut Run<'_, B>, budget: u64, steps: &mut u64) -> Step {
        let mode = mode_of(run.user, run.wide);
        while *steps < budget && !run.core.bus.is_wanted() {
            let gva = run.core.code_address(run.core.cpu.eip);
            run.version = run.core.bus.translation_version();
            let found;
            let block = match self.cache.jump(gva, mode, run.version) {
                Some(block) if is_current(block, run.core.bus) => block,
                _ => match self.find(run, gva) {
                    Ok(Some(block)) => {
                        found = block;
                        &found
                    }
                    Ok(None) => return run.with_flags(|run| single(run.core.cpu, run.core.bus, steps)),
                    Err(leave) => return left(run, leave, steps),
                },
            };
            let part;
            let block = if u64::from(block.count) > budget - *steps {
                part = self.cache.cut(block, (budget - *steps) as u16);
                &part
            } else {
                block
            };
            run.enter(block, *steps);
            let end = if run.core.cpu.eflags & eflags::RF == 0 {
                let next = go_on(run, self.cache.ops(block));
                // As most blocks end.
                if next == Next::Jumped {
                    *steps += u64::from(run.last) + 1;
                    continue;
                }
                self.end_block(run, block, next, steps)
            } else {
                self.resume(run, block, steps)
            };
            match end {
                End::Over => {}
                End::Changed => return Step::Done,
                End::Stop(step) => return step,
            }
        }
        Step::Done
    }

    /// The first instruction of `block`, behind an IRET from a fault: RF, which no breakpoint asks for, goes when it has
    /// retired.
    #[cold]
    #[inline(never)]
    fn resume<B: CodeBus>(&self, run: &mut Run<'_, B>, block: &Block, steps: &mut u64) -> End {
        let first = self.cache.cut(block, 1);
        let Some(op) = self.cache.ops(&first).first() else { return End::Over };
        let next = go_on(run, self.cache.ops(&first));
        let end = self.end_block(run, &first, next, steps);
        // A generic op has seen to it.
        if !op.is_generic() && !matches!(end, End::Stop(_)) {
            run.core.cpu.eflags &= !eflags::RF;
        }
        end
    }

    /// The block at CS:EIP, linear address `gva`, where the jump cache has it not; `None` where one instruction must be stepped.
    #[cold]
    #[inline(never)]
    fn find<B: CodeBus>(&mut self, run: &mut Run<'_, B>, gva: Gva) -> Result<Option<Block>, Leave> {
        let (wide, version) = (run.wide, run.version);
        let Some(frame) = run.core.bus.code_frame(gva, run.user)? else { return Ok(None) };
        let number = match self.cache.find(frame, gva, wide) {
            Some(number) if ends_there(run, &self.cache.block(number), gva) => number,
            _ => match self.cache.build(run, frame, gva)? {
                Some(number) => number,
                None => return Ok(None),
            },
        };
        // Finding it may have forgotten translations itself, which makes this one older, not wrong.
        let block = self.cache.block(number);
        self.cache.remember(gva, mode_of(run.user, wide), version, block);
        Ok(Some(block))
    }

    /// The block that `run` has entered has come to `next`: goes on with it where it can.
    #[inline(never)]
    fn end_block<B: CodeBus>(
        &self,
        run: &mut Run<'_, B>,
        block: &Block,
        mut next: Next,
        steps: &mut u64,
    ) -> End {
        let ops = self.cache.ops(block);
        loop {
            if next == Next::Through {
                *steps += u64::from(block.count);
                run.core.cpu.eip = run.at(block.next);
                return End::Over;
            }
            let op = &ops[usize::from(run.last)];
            match next {
                Next::Generic => {
                    if let Some(end) = self.run_generic(run, op) {
                        *steps += u64::from(op.number) + 1;
                        return end;
                    }
                    next = go_on(run, &ops[usize::from(op.number) + 1..]);
                    continue;
                }
                Next::Stale => run.core.cpu.eip = run.at(op.end),
                Next::Left => run.core.cpu.eip = run.at(op.begin()),
                _ => {}
            }
            *steps += u64::from(op.number) + 1;
            return if next == Next::Left { End::Stop(run.stopped()) } else { End::Over };
        }
    }

    /// An op without a handler; `None` where the block goes on behind it.
    fn run_generic<B: CodeBus>(&self, run: &mut Run<'_, B>, op: &Op) -> Option<End> {
        run.tell(op);
        run.core.cpu.eip = run.at(op.begin());
        let step = run.with_flags(|run| run.core.run(self.cache.instruction(op)));
        let through = run.core.cpu.eip == run.at(op.end);
        match step {
            Step::Done if op.after == After::Next && through && run.is_current() => None,
            Step::Done if op.after == After::Block => Some(End::Over),
            Step::Done => Some(End::Changed),
            step => Some(End::Stop(step)),
        }
    }
}

/// True while nobody has stored to where `block` was read from.
#[inline(always)]
fn is_current<B: CodeBus>(block: &Block, bus: &B) -> bool {
    bus.code_generation(block.frame) == block.generation
        && (block.tail == NO_TAIL || bus.code_generation(block.tail.mfn) == block.tail.generation)
}

/// The next instruction could not be fetched.
#[cold]
fn left<B: CodeBus>(run: &mut Run<'_, B>, leave: Leave, steps: &mut u64) -> Step {
    *steps += 1;
    run.core.bus.begin(*steps, run.core.cpu.eip);
    run.core.stopped(leave)
}

/// True where the last bytes of `block`, which begins at `gva`, still are in the frame where they were read.
fn ends_there<B: CodeBus>(run: &mut Run<'_, B>, block: &Block, gva: Gva) -> bool {
    let next = gva.page().wrapping_add(1 << 12);
    block.tail == NO_TAIL
        || run.core.bus.code_frame(next, run.user).is_ok_and(|frame| frame == Some(block.tail))
}

/// One call of [`step`].
fn single<B: CodeBus>(cpu: &mut CpuState, bus: &mut B, steps: &mut u64) -> Step {
    *steps += 1;
    bus.begin(*steps, cpu.eip);
    step(cpu, bus)
}

/// True where blocks do what steps do: nothing has to be looked at between two instructions.
fn is_plain(cpu: &CpuState) -> bool {
    let aligned = cpu.cpl == 3 && cpu.eflags & eflags::AC != 0 && cpu.cr0 & cr0::AM != 0;
    cpu.eflags & (eflags::TF | eflags::VM) == 0
        && cpu.dr[7] & 0xff == 0
        && !cpu.interrupt_shadow
        && !cpu.halted
        && !aligned
        && cpu.segment(Seg::Cs).limit == u32::MAX
        // So that EIP wraps between two pages, not within one.
        && Gva(cpu.segment(Seg::Cs).base).offset() == 0
}
