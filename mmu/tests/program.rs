//! Guest programs: what a random (or a remembered) guest does, one [`Op`] after the other.

use umbra_mmu::Rules;
use umbra_mmu::discard::Discard;

use crate::model::layout::{self, CR3S, GUEST_PAGES, LOW, LOW_PAGES};
use crate::model::walker::{Control, EntryAt, Kind, Request};
use crate::model::world::{Caches, Sizes, World, Wrong};

/// What the kernel does after it has edited an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Nothing,
    Invlpg,
    LoadCr3,
}

/// A control bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bit {
    Paging,
    Pae,
    Pse,
    Global,
    WriteProtect,
    NoExecute,
    Smep,
}

/// One step. Addresses, frames and values are chosen by small numbers (see layout), so that they collide often and
/// shrink well.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// Guest code makes an access.
    Touch {
        kind: Kind,
        user: bool,
        page: u8,
        offset: u8,
        value: u32,
    },
    /// The same, made by the VMM's interpreter.
    Emulate {
        kind: Kind,
        user: bool,
        page: u8,
        offset: u8,
        value: u32,
    },
    /// The kernel edits the entry that decides a page, through its linear map.
    Edit {
        page: u8,
        level: u8,
        frame: u8,
        bits: u16,
        then: Then,
    },
    /// The kernel takes these bits off the entry, or sets them if it lacks one.
    Toggle {
        page: u8,
        level: u8,
        bits: u16,
        then: Then,
    },
    /// The kernel writes an entry into any low frame, as if it were a table.
    EditIn {
        table: u8,
        page: u8,
        level: u8,
        frame: u8,
        bits: u16,
    },
    /// The kernel fills a page that may be a table with data.
    Wipe {
        frame: u8,
    },
    Invlpg {
        page: u8,
    },
    LoadCr3 {
        which: u8,
    },
    Flip {
        bit: Bit,
    },
    /// Switches format: CR4.PAE and a CR3 that fits, with paging off in between.
    Switch {
        pae: bool,
        which: u8,
    },
    Speculate {
        user: bool,
        page: u8,
    },
    /// A device writes guest memory.
    Dma {
        frame: u8,
        offset: u8,
        length: u8,
        value: u32,
    },
    Watch {
        frame: u8,
    },
    Unwatch {
        frame: u8,
    },
    Evict {
        count: u8,
    },
    /// The CPU uses up shadow pages: paging off, an access to each of so many 2 MiB, paging as before.
    Churn {
        count: u8,
    },
    CloseGate {
        frame: u8,
    },
    /// The VMM sends these pages to swap.
    PageOut {
        frame: u8,
        count: u8,
    },
    /// The VMM takes the least recently used pages' frames.
    Reclaim {
        count: u8,
    },
    /// The budget is so much over the least.
    Budget {
        over: u8,
    },
    /// Pages are discarded, or given up by the guest.
    Discard {
        frame: u8,
        count: u8,
        balloon: bool,
    },
    /// The CPU leaves the guest and comes back, as for an interrupt.
    Exit,
}

/// A program: which CPU does what.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    pub tlb: Caches,
    pub pae: bool,
    /// Every slot for shadow pages has served before: whoever takes one takes a dead page's.
    pub worn: bool,
    pub ops: Vec<(u8, Op)>,
}

/// Operations between two audits.
const AUDIT_EVERY: usize = 64;

impl Program {
    /// Runs the program in a new world, with every check there is.
    pub fn run(&self) -> Result<(), Wrong> {
        self.run_by(Rules::default())
    }

    /// The same on an MMU that goes by these rules.
    pub fn run_by(&self, rules: Rules) -> Result<(), Wrong> {
        let mut runner = Runner::new(self, rules)?;
        for (number, (cpu, op)) in self.ops.iter().enumerate() {
            let cpu = usize::from(*cpu) % runner.world.cpus.len();
            runner.step(cpu, *op).map_err(|Wrong(text)| Wrong(format!("op {number}, {op:?}: {text}")))?;
            if number % AUDIT_EVERY == AUDIT_EVERY - 1 {
                runner.audit(number)?;
            }
        }
        runner.audit(self.ops.len())?;
        runner.world.compare_memory()
    }
}

struct Runner {
    world: World,
}

const KERNEL_READ: Request = Request { kind: Kind::Read, user: false };
/// Shadow pages of a world, as few as there may be.
const SHADOW_PAGES: u32 = 64;

/// Uses every slot once: without paging each 2 MiB takes a page.
fn wear(world: &mut World) -> Result<(), Wrong> {
    for region in 0..SHADOW_PAGES {
        world.read(0, region << 21, 1, KERNEL_READ)?;
    }
    world.mmu.evict_shadow(u32::MAX);
    world.audit()
}

impl Runner {
    fn new(program: &Program, rules: Rules) -> Result<Runner, Wrong> {
        let sizes = Sizes {
            guest_pages: GUEST_PAGES,
            machine_frames: 256,
            shadow_pages_max: SHADOW_PAGES,
            vcpus: 2,
            tlb: program.tlb,
        };
        let mut world = World::by_rules(sizes, rules);
        layout::build(&mut world);
        if program.worn {
            wear(&mut world)?;
        }
        for cpu in 0..2 {
            let base =
                Control { pse: true, pae: program.pae, nxe: program.pae, wp: true, ..Control::default() };
            let cr3 = if program.pae { 0x8000 + 0x20 * cpu } else { 0x1000 * (cpu + 1) };
            world.set_control(cpu as usize, Control { pg: true, cr3, ..base }, true)?;
        }
        Ok(Runner { world })
    }

    fn audit(&mut self, number: usize) -> Result<(), Wrong> {
        self.world.audit().map_err(|Wrong(text)| Wrong(format!("after op {number}: {text}")))
    }

    fn control(&self, cpu: usize) -> Control {
        self.world.cpus[cpu].control
    }

    fn step(&mut self, cpu: usize, op: Op) -> Result<(), Wrong> {
        match op {
            Op::Touch { kind, user, page, offset, value } => {
                let va = layout::page(page) + layout::offset(offset);
                match kind {
                    Kind::Write => self.world.write(cpu, va, 4, user, u64::from(value)),
                    _ => self.world.read(cpu, va, 4, Request { kind, user }),
                }?;
            }
            Op::Emulate { kind, user, page, offset, value } => {
                let va = layout::page(page) + layout::offset(offset);
                self.world.emulate(cpu, va, 4, Request { kind, user }, u64::from(value))?;
            }
            Op::Edit { page, level, frame, bits, then } => {
                let c = self.control(cpu);
                let va = layout::page(page);
                if let Some(at) = layout::entry_for(&self.world.memory, &c, va, level) {
                    self.store_entry(cpu, at, layout::entry(c.pae, frame, bits))?;
                }
                self.then(cpu, va, then)?;
            }
            Op::Toggle { page, level, bits, then } => {
                let c = self.control(cpu);
                let va = layout::page(page);
                if let Some(at) = layout::entry_for(&self.world.memory, &c, va, level) {
                    let mask = layout::entry(c.pae, 0, bits);
                    let old = self.world.memory.read(at.address, at.size);
                    let new = if old & mask == mask { old & !mask } else { old | mask };
                    self.store_entry(cpu, at, new)?;
                }
                self.then(cpu, va, then)?;
            }
            Op::EditIn { table, page, level, frame, bits } => {
                let c = self.control(cpu);
                let table = u32::from(table) % LOW_PAGES;
                let at = layout::entry_in(&c, table, layout::page(page), level);
                self.store_entry(cpu, at, layout::entry(c.pae, frame, bits))?;
            }
            Op::Wipe { frame } => self.wipe(cpu, u32::from(frame) % LOW_PAGES)?,
            Op::Invlpg { page } => self.world.invalidate(cpu, layout::page(page)),
            Op::LoadCr3 { which } => self.load_cr3(cpu, CR3S[usize::from(which) % CR3S.len()])?,
            Op::Flip { bit } => self.flip(cpu, bit)?,
            Op::Switch { pae, which } => self.switch(cpu, pae, which)?,
            Op::Speculate { user, page } => self.world.speculate(cpu, layout::page(page), user)?,
            Op::Dma { frame, offset, length, value } => {
                let page = u64::from(frame) % u64::from(LOW_PAGES);
                let at = (page << 12) + u64::from(layout::offset(offset));
                let bytes = value.to_le_bytes();
                let bytes: Vec<u8> = bytes.iter().copied().cycle().take(usize::from(length)).collect();
                self.world.device_write(at, &bytes);
            }
            Op::Watch { frame } => {
                self.world.watch(cpu, u32::from(frame) % LOW_PAGES)?;
            }
            Op::Unwatch { frame } => self.world.unwatch(u32::from(frame) % LOW_PAGES),
            Op::Evict { count } => {
                self.world.mmu.evict_shadow(u32::from(count));
            }
            Op::Churn { count } => {
                let before = self.control(cpu);
                self.world.set_control(cpu, Control { pg: false, ..before }, true)?;
                for region in 0..u32::from(count) {
                    self.world.read(cpu, region << 21 | 0x3000, 1, KERNEL_READ)?;
                }
                self.world.set_control(cpu, before, true)?;
            }
            Op::CloseGate { frame } => self.world.close_gate(u32::from(frame) % LOW_PAGES),
            Op::PageOut { frame, count } => {
                self.world.page_out(u32::from(frame) % LOW_PAGES, u32::from(count));
            }
            Op::Reclaim { count } => self.world.reclaim(u32::from(count)),
            Op::Budget { over } => self.world.set_budget(u32::from(over)),
            Op::Discard { frame, count, balloon } => {
                let what = if balloon { Discard::Balloon } else { Discard::Zero };
                self.world.discard(u32::from(frame) % LOW_PAGES, u32::from(count), what);
            }
            Op::Exit => self.world.leave(cpu),
        }
        Ok(())
    }

    /// The kernel stores an entry; one of 8 bytes upper half first, as 32-bit kernels do.
    fn store_entry(&mut self, cpu: usize, at: EntryAt, value: u64) -> Result<(), Wrong> {
        if at.address >= u64::from(LOW_PAGES) << 12 {
            return Ok(());
        }
        let base = if self.control(cpu).pg { LOW } else { 0 };
        let va = base + at.address as u32;
        if at.size == 8 {
            self.world.write(cpu, va + 4, 4, false, value >> 32)?;
        }
        self.world.write(cpu, va, 4, false, value & 0xffff_ffff)?;
        Ok(())
    }

    fn wipe(&mut self, cpu: usize, frame: u32) -> Result<(), Wrong> {
        let base = if self.control(cpu).pg { LOW } else { 0 };
        for n in 0..8 {
            let va = base + (frame << 12) + 4 * n;
            self.world.write(cpu, va, 4, false, u64::from(frame * 0x0101_0100 + n))?;
        }
        Ok(())
    }

    fn then(&mut self, cpu: usize, va: u32, then: Then) -> Result<(), Wrong> {
        match then {
            Then::Nothing => {}
            Then::Invlpg => self.world.invalidate(cpu, va),
            Then::LoadCr3 => self.load_cr3(cpu, self.control(cpu).cr3)?,
        }
        Ok(())
    }

    fn load_cr3(&mut self, cpu: usize, cr3: u32) -> Result<(), Wrong> {
        let c = self.control(cpu);
        self.world.set_control(cpu, Control { cr3, ..c }, true)
    }

    fn flip(&mut self, cpu: usize, bit: Bit) -> Result<(), Wrong> {
        let mut c = self.control(cpu);
        match bit {
            Bit::Paging => c.pg = !c.pg,
            Bit::Pae => c.pae = !c.pae,
            Bit::Pse => c.pse = !c.pse,
            Bit::Global => c.pge = !c.pge,
            Bit::WriteProtect => c.wp = !c.wp,
            Bit::NoExecute => c.nxe = !c.nxe,
            Bit::Smep => c.smep = !c.smep,
        }
        // CR0.WP and EFER.NXE neither flush nor load PDPTEs; all others here do (SDM 4.4.1 and 4.10.4.1).
        let flushes = !matches!(bit, Bit::WriteProtect | Bit::NoExecute);
        self.world.set_control(cpu, c, flushes)
    }

    fn switch(&mut self, cpu: usize, pae: bool, which: u8) -> Result<(), Wrong> {
        let c = self.control(cpu);
        let cr3 = if pae { CR3S[2 + usize::from(which) % 3] } else { CR3S[usize::from(which) % 2] };
        self.world.set_control(cpu, Control { pg: false, pae, cr3, ..c }, true)?;
        self.world.set_control(cpu, Control { pg: true, pae, cr3, ..c }, true)
    }
}
