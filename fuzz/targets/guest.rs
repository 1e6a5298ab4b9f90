//! The shadow MMU under the interpreter: random bytes as code, random pages as page tables, on the guest's real bus, with
//! DMA, INVLPG, changes of control registers, evictions and watched frames in between.
//!
//! Every program runs on twins: one is stepped, by a bus that judges each instruction (`journal`), the other run by the
//! engine. What must hold: no panic; the audit finds nothing; the software TLB never uses what should be gone; and
//! while memory suffices the twins agree, in the end about every byte of memory.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use umbra::cpu::{CpuState, Seg, cr0, cr4, efer};
use umbra::interp::engine::{CodeBus, Engine, Extent, Ran, Waiting};
use umbra::interp::{Bus, Delivered, Event, Step, deliver, step};
use umbra::vm::fuzz::{Aftermath, Guest};
use umbra_fuzz::journal::Journal;
use umbra_fuzz::plan::{BYTES, Beginning, Code, Happening, Mode, Paging, Start, Value};
use umbra_fuzz::state;
use umbra_mmu::{Access, Config, Gfn, Gva, Machine, Mmu, NoVcpus, PAGE_SIZE, TlbKind, Width};

/// Guest pages; entries name frames a little beyond them too.
const GUEST_PAGES: u32 = 40;
/// Where page tables are, behind what a plan lays out: PDPT, directory, and a table for each 2 MiB.
const TABLES: u32 = BYTES >> 12;
/// Frames that are enough.
const AMPLE: u32 = GUEST_PAGES + 64;
/// Operations of a program, and steps of one of them.
const OPERATIONS_MAX: usize = 64;
const STEPS_MAX: u8 = 32;
/// Operations between two audits.
const AUDIT_EVERY: usize = 16;

type Page = [u8; PAGE_SIZE as usize];

/// A table entry: a frame of the guest's few, a device, or noise.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Entry {
    frame: u8,
    flags: u8,
    noise: Option<u64>,
}

impl Entry {
    fn bits(self) -> u64 {
        let frame = u64::from(self.frame % (GUEST_PAGES as u8 + 3));
        let present = u64::from(self.frame & 0x80 == 0);
        self.noise.unwrap_or(frame << 12 | u64::from(self.flags & !1) | present)
    }
}

/// Control registers: which of the bits that paging depends on are set, and where its tables are.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Control {
    bits: u8,
    root: u8,
}

impl Control {
    fn apply(self, cpu: &mut CpuState) {
        let bit = |n: u8| self.bits >> n & 1 != 0;
        let choose = |register: u32, bit: u32, set: bool| register & !bit | if set { bit } else { 0 };
        cpu.cr0 = choose(cpu.cr0, cr0::PG, !bit(0) && cpu.protected());
        cpu.cr0 = choose(cpu.cr0, cr0::WP, bit(3));
        cpu.cr4 = choose(cpu.cr4, cr4::PAE, bit(1));
        cpu.cr4 = choose(cpu.cr4, cr4::PSE, bit(2));
        cpu.cr4 = choose(cpu.cr4, cr4::SMEP, bit(5));
        cpu.cr4 = choose(cpu.cr4, cr4::PGE, bit(6));
        cpu.cr4 &= !cr4::SMAP;
        cpu.msrs.efer = if bit(4) { efer::NXE } else { 0 };
        let root = if self.root < 0xc0 { self.root & 1 } else { self.root % GUEST_PAGES as u8 };
        let first = if cpu.cr4 & cr4::PAE != 0 { TABLES } else { TABLES + 1 };
        cpu.cr3 = (first + u32::from(root) * 8) % GUEST_PAGES << 12;
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Operation {
    /// Some steps, from these bytes on.
    Run {
        code: Code,
        steps: u8,
        again_in: Option<u8>,
        /// An interrupt, or an NMI, that waits.
        waiting: u8,
    },
    Happening(Happening),
    /// Begins anew, with memory as it is.
    Anew {
        mode: Mode,
        control: Control,
    },
    Control(Control),
    /// A device, or another CPU, stores somewhere, nearly always to a table.
    Dma {
        table: bool,
        frame: u8,
        index: u16,
        entry: Entry,
        wide: bool,
    },
    Invalidate(Value),
    Evict(u8),
    Watch(u8),
    Unwatch(u8),
    Explain(Value),
    /// Time passes, and an interrupt line is driven.
    Line {
        later_log2: u8,
        gsi: u8,
        level: bool,
    },
}

#[derive(Arbitrary, Clone, Debug)]
struct Program {
    start: Beginning,
    mode: Mode,
    control: Control,
    /// Frames beyond what the tables may take, where they are few.
    spare: Option<u8>,
    /// The TLB forgets nothing it need not. (One that forgets at random would make the twins differ, rightly.)
    sticky: bool,
    operations: Vec<Operation>,
}

/// Some code to run.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    budget: u64,
    waiting: Waiting,
}

impl Stretch {
    /// True where what waits can be taken now.
    fn is_over(self, cpu: &CpuState) -> bool {
        let nmi = !cpu.nmi_blocked && !cpu.interrupt_shadow;
        (self.waiting.interrupt && cpu.interruptible()) || (self.waiting.nmi && nmi)
    }
}

/// One of the two.
struct Twin {
    guest: Guest,
    engine: Engine,
}

impl Twin {
    fn new(program: &Program, start: &Start) -> Twin {
        let config = Config::of_pages(GUEST_PAGES);
        // The limits are raised to the least that works; ask an MMU what that is.
        let least = Mmu::new(Machine::anonymous(4), config, Box::new(NoVcpus)).config().table_frames_max();
        let spare = program.spare.map_or(AMPLE, |spare| 4 + u32::from(spare) % AMPLE);
        let kind = if program.sticky { TlbKind::Sticky } else { TlbKind::Sized };
        let guest = Guest::new(config, least + spare, kind).expect("a timer descriptor");
        let mut twin = Twin { guest, engine: Engine::default() };
        start.lay(&mut |at, bytes| twin.put(at, bytes));
        twin.lay_tables(program.control);
        twin
    }

    /// Stores at a guest-physical address; a machine with few frames has none left at some point.
    fn put(&mut self, at: u32, bytes: &[u8]) {
        for (n, chunk) in (0..).zip(bytes.chunks(PAGE_SIZE as usize)) {
            let gpa = Gfn((at >> 12) + n).at(at & 0xfff);
            let _ = self.guest.mmu.write_bytes(self.guest.vcpu().window(), gpa, chunk);
        }
    }

    /// Tables for both formats would overlap: these are in the format that the program begins with. The first 2 MiB are
    /// mapped one to one, the others to what a random program may need: tables, code, devices.
    fn lay_tables(&mut self, control: Control) {
        let mut cpu = CpuState::flat_protected_mode(0);
        control.apply(&mut cpu);
        let pae = cpu.cr4 & cr4::PAE != 0;
        let mut put = |table: u32, index: u32, entry: u64| {
            let bytes = if pae { 8 } else { 4 };
            let at = (TABLES + table) * 0x1000 + index * bytes;
            self.put(at, &entry.to_le_bytes()[..bytes as usize]);
        };
        let entry = |frame: u32, flags: u64| u64::from(frame) << 12 | flags;
        if pae {
            put(0, 0, entry(TABLES + 1, 1));
            put(0, 3, entry(TABLES + 1, 1));
        }
        // Two-level tables span 4 MiB: their regions share one, each with a place of its own in it.
        for region in 0..4 {
            let (slot, first) = if pae { (region, 0) } else { (region / 2, region % 2 * 512) };
            let table = 2 + if pae { region } else { region / 2 };
            for top in [0, if pae { 0x1f8 } else { 0x3fc }] {
                put(1, top + slot, entry(TABLES + table, 7));
            }
            let pages = if region == 0 { GUEST_PAGES } else { 8 };
            for page in 0..pages {
                let frame = match (region, page) {
                    (0, page) => page,
                    (3, 6) => 0xfec00,
                    (3, 7) => 0xfee00,
                    (region, page) => (8 * region + page) % GUEST_PAGES,
                };
                put(table, first + page, entry(frame, 7));
            }
        }
    }

    /// Tells the MMU of the paging that the CPU has; one that is refused is turned off.
    fn set_paging(&mut self) {
        let (set, _) = self.guest.with_bus(|cpu, bus| bus.set_paging(cpu, true));
        if set.is_err() {
            self.guest.cpu.cr0 &= !cr0::PG;
            let (set, _) = self.guest.with_bus(|cpu, bus| bus.set_paging(cpu, true));
            set.expect("without paging there is nothing to refuse");
        }
    }

    /// Puts bytes where the CPU's linear address leads, by no store of its own.
    fn place_code(&mut self, bytes: &[u8]) {
        let at = Gva(self.guest.cpu.segment(Seg::Cs).base.wrapping_add(self.guest.cpu.eip));
        let access = Access::execute(self.guest.cpu.cpl == 3);
        let Ok(gpa) = self.guest.mmu.translate(self.guest.vcpu(), at, access) else { return };
        let room = (PAGE_SIZE as u32 - gpa.offset()) as usize;
        let bytes = &bytes[..bytes.len().min(room)];
        let _ = self.guest.mmu.write_bytes(self.guest.vcpu().window(), gpa, bytes);
    }

    /// So many steps, each judged.
    fn run_steps(&mut self, stretch: Stretch, mut again_in: Option<u32>) -> (Ran, Aftermath) {
        self.guest.with_bus(|cpu, bus| {
            let (mut steps, mut again) = (0, false);
            while again || steps < stretch.budget && !stretch.is_over(cpu) {
                // Time moves on before the instruction, which may read it; once, however often it must begin again.
                if !again {
                    steps += 1;
                    bus.begin(steps, cpu.eip);
                }
                let before = cpu.clone();
                let mut journal = Journal::new(bus, again_in).sparing_repeats();
                let last = step(cpu, &mut journal);
                journal.judge_step(&before, cpu, &last);
                state::check_handed_on(&before, cpu);
                again = last == Step::Again && again_in.take().is_some();
                if again {
                    continue;
                }
                if last != Step::Done {
                    return Ran { steps, last };
                }
            }
            Ran { steps, last: Step::Done }
        })
    }

    fn run_engine(&mut self, stretch: Stretch) -> (Ran, Aftermath) {
        let engine = &mut self.engine;
        self.guest.with_bus(|cpu, bus| engine.run(cpu, bus, stretch.budget, Extent::All, stretch.waiting))
    }

    fn deliver(&mut self, event: Event) -> (Delivered, Aftermath) {
        let before = self.guest.cpu.clone();
        let (delivered, after) = self.guest.with_bus(|cpu, bus| {
            let mut journal = Journal::new(bus, None);
            let delivered = deliver(cpu, &mut journal, event);
            journal.judge_delivery(&before, cpu, &delivered);
            delivered
        });
        state::check_handed_on(&before, &self.guest.cpu);
        (delivered, after)
    }

    fn audit(&self) {
        let findings = self.guest.mmu.audit();
        assert!(findings.is_empty(), "{findings:#?}");
    }

    fn page(&self, gfn: u32) -> Option<Page> {
        let mut page = [0; PAGE_SIZE as usize];
        let read = self.guest.mmu.read_bytes(self.guest.vcpu().window(), Gfn(gfn).at(0), &mut page);
        read.is_ok().then_some(page)
    }
}

/// What a program did not have to wait for, or must have had a reason to.
fn check_aftermath(after: &Aftermath, waits: bool) {
    if let Some(violation) = &after.violation {
        panic!("{violation}");
    }
    assert!(!waits || after.shortage.is_some(), "it waits for nothing");
}

struct Pair {
    start: Start,
    stepped: Twin,
    engine: Twin,
    /// False once one of them has lacked a frame: from then on they may differ.
    alike: bool,
}

impl Pair {
    fn each(&mut self, mut call: impl FnMut(&mut Twin)) {
        call(&mut self.stepped);
        call(&mut self.engine);
    }

    /// False at the end of the program.
    fn apply(&mut self, operation: Operation) -> bool {
        match operation {
            Operation::Run { code, steps, again_in, waiting } => {
                self.each(|twin| twin.place_code(&code.bytes()));
                let waiting = Waiting { interrupt: waiting & 7 == 1, nmi: waiting & 7 == 2 };
                let stretch = Stretch { budget: u64::from(steps % STEPS_MAX) + 1, waiting };
                return self.run(stretch, again_in.map(u32::from));
            }
            Operation::Happening(happening) => {
                return match happening.event(&self.stepped.guest.cpu) {
                    Some(event) => self.deliver(event),
                    None => true,
                };
            }
            Operation::Anew { mode, control } => {
                let mut cpu = self.start.cpu(mode, Paging::Off);
                control.apply(&mut cpu);
                self.each(|twin| {
                    twin.guest.cpu = cpu.clone();
                    twin.set_paging();
                });
            }
            Operation::Control(control) => self.each(|twin| {
                control.apply(&mut twin.guest.cpu);
                twin.set_paging();
            }),
            Operation::Dma { table, frame, index, entry, wide } => {
                let frame =
                    if table { TABLES + u32::from(frame % 6) } else { u32::from(frame) % GUEST_PAGES };
                let width = if wide { Width::B8 } else { Width::B4 };
                let index = if index & 0xc000 == 0 { index % 512 } else { index % 16 };
                let gpa = Gfn(frame).at(u32::from(index) * width.bytes());
                self.each(|twin| {
                    let _ = twin.guest.mmu.store(twin.guest.vcpu().window(), gpa, width, entry.bits());
                });
            }
            Operation::Invalidate(at) => self.each(|twin| {
                twin.guest.with_bus(|_, bus| bus.invalidate_page(Gva(at.get())));
            }),
            Operation::Evict(count) => self.each(|twin| {
                twin.guest.mmu.evict_shadow(u32::from(count % 16));
            }),
            Operation::Watch(frame) => self.each(|twin| {
                let _ = twin.guest.mmu.watch(twin.guest.vcpu(), Gfn(u32::from(frame) % GUEST_PAGES));
            }),
            Operation::Unwatch(frame) => {
                self.each(|twin| twin.guest.mmu.unwatch(Gfn(u32::from(frame) % GUEST_PAGES)));
            }
            Operation::Explain(at) => self.each(|twin| {
                drop(format!("{:?}", twin.guest.mmu.explain(twin.guest.vcpu(), Gva(at.get()))));
            }),
            Operation::Line { later_log2, gsi, level } => self.each(|twin| {
                let later = 1 << (later_log2 % 40);
                twin.guest.with_board(later, |board, now| board.set_gsi(now, u32::from(gsi) % 48, level));
            }),
        }
        true
    }

    fn run(&mut self, stretch: Stretch, again_in: Option<u32>) -> bool {
        if self.stepped.guest.cpu.halted {
            return true;
        }
        let (one, after_one) = self.stepped.run_steps(stretch, again_in);
        let (two, after_two) = self.engine.run_engine(stretch);
        check_aftermath(&after_one, one.last == Step::Again);
        check_aftermath(&after_two, two.last == Step::Again);
        if !self.agree(&one, &two, after_one.shortage.is_some() || after_two.shortage.is_some()) {
            return false;
        }
        match one.last {
            Step::Exception(exception) => self.deliver(Event::Exception(exception)),
            Step::Unknown(_) => false,
            Step::Done | Step::Halted | Step::Again => true,
        }
    }

    fn deliver(&mut self, event: Event) -> bool {
        let (one, after_one) = self.stepped.deliver(event);
        let (two, after_two) = self.engine.deliver(event);
        check_aftermath(&after_one, one == Delivered::Again);
        check_aftermath(&after_two, two == Delivered::Again);
        self.agree(&one, &two, after_one.shortage.is_some() || after_two.shortage.is_some())
            && one == Delivered::Handler
    }

    /// Compares; false once they may differ.
    fn agree<T: PartialEq + std::fmt::Debug>(&mut self, one: &T, two: &T, lack: bool) -> bool {
        self.alike &= !lack;
        if self.alike {
            assert_eq!(one, two);
            assert_eq!(self.stepped.guest.cpu, self.engine.guest.cpu, "after {one:x?}");
            assert_eq!(self.stepped.guest.time(), self.engine.guest.time());
        }
        self.alike
    }

    fn finish(&mut self) {
        self.each(|twin| twin.audit());
        for gfn in (0..GUEST_PAGES).filter(|_| self.alike) {
            let (one, two) = (self.stepped.page(gfn), self.engine.page(gfn));
            assert!(one == two, "guest page {gfn:#x} differs: {:x?}", difference(one, two));
        }
    }
}

fuzz_target!(|program: Program| {
    let start = program.start.clone().start();
    let twins = [(); 2].map(|()| Twin::new(&program, &start));
    let [stepped, engine] = twins;
    let mut pair = Pair { start, stepped, engine, alike: true };
    pair.apply(Operation::Anew { mode: program.mode, control: program.control });
    for (n, operation) in program.operations.iter().take(OPERATIONS_MAX).enumerate() {
        if !pair.apply(*operation) {
            break;
        }
        if n % AUDIT_EVERY == AUDIT_EVERY - 1 {
            pair.each(|twin| twin.audit());
        }
    }
    pair.finish();
});

/// The first place where two pages differ, with what is there.
fn difference(one: Option<Page>, two: Option<Page>) -> Option<(usize, u8, u8)> {
    let (one, two) = (one?, two?);
    let at = one.iter().zip(&two).position(|(one, two)| one != two)?;
    Some((at, one[at], two[at]))
}
