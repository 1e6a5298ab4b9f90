//! The engine against its model: the same random programs by [`Engine::run`], a random number of steps at a time, and by
//! as many calls of [`step`]; CPU, memory, ports and what the bus was told must be alike after each run.
//!
//! `UMBRA_CASES=n` runs n programs. A failure prints its seed, which `UMBRA_SEED=n` runs first.

mod delivery;

use super::*;
use crate::cpu::{Segment, TableRegister, cr4};
use crate::interp::flat::{FlatBus, Page};

/// Programs of a run that nobody asked to be longer.
const PROGRAMS: u64 = 3000;
/// Runs of the engine in one program.
const RUNS: u32 = 24;
/// Where things are, all in [`SIZE`] bytes from 0.
const CODE: u32 = 0x1000;
const DATA: u32 = 0x4000;
const STACK: u32 = 0x6800;
const GDT: u32 = 0x7000;
const SIZE: u32 = 0x8000;
/// A linear page that shows the second page of code.
const ALIAS: u32 = 0x9000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as u32
    }

    fn below(&mut self, n: u32) -> u32 {
        self.next() % n
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }

    /// An address that means something, or any number.
    fn value(&mut self) -> u32 {
        match self.below(8) {
            0 => CODE + self.below(0x2000),
            1 => ALIAS + self.below(0x1000),
            2..=4 => DATA + self.below(0x2000),
            5 => self.below(64),
            6 => self.pick(&[0x7fff_ffff, 0x8000_0000, u32::MAX, 0x7fff, 0x8000, 0xffff]),
            _ => self.next(),
        }
    }
}

/// One-byte opcodes of data instructions and near branches.
const ONE: &[u8] = &[
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x08, 0x09, 0x0a, 0x0b, 0x10, 0x11, 0x13, 0x19, 0x1b, 0x20, 0x21,
    0x23, 0x28, 0x29, 0x2a, 0x2b, 0x2d, 0x30, 0x31, 0x32, 0x33, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x40,
    0x41, 0x43, 0x47, 0x48, 0x4a, 0x4e, 0x50, 0x51, 0x53, 0x56, 0x58, 0x5a, 0x5f, 0x60, 0x61, 0x68, 0x69,
    0x6a, 0x6b, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x7c, 0x7d, 0x7e, 0x80, 0x81, 0x83, 0x84, 0x85,
    0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8d, 0x8f, 0x90, 0x91, 0x93, 0x98, 0x99, 0x9c, 0x9d, 0x9e, 0x9f,
    0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0xb0,
    0xb4, 0xb8, 0xb9, 0xbb, 0xbe, 0xc0, 0xc1, 0xc2, 0xc3, 0xc6, 0xc7, 0xc8, 0xc9, 0xd0, 0xd1, 0xd2, 0xd3,
    0xe0, 0xe1, 0xe2, 0xe3, 0xe8, 0xe9, 0xeb, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf, 0x9b, 0xf5,
    0xf6, 0xf7, 0xf8, 0xf9, 0xfc, 0xfd, 0xfe, 0xff,
];
/// Second bytes of two-byte opcodes of the same kinds.
const TWO: &[u8] = &[
    0x10, 0x11, 0x28, 0x29, 0x2a, 0x2d, 0x51, 0x54, 0x58, 0x59, 0x6e, 0x6f, 0x77, 0x7e, 0x7f, 0xae, 0xd6,
    0xef, 0xfc, 0x1f, 0x31, 0x40, 0x42, 0x44, 0x45, 0x47, 0x4c, 0x4f, 0x80, 0x82, 0x84, 0x85, 0x8f, 0x90,
    0x92, 0x94, 0x95, 0x9c, 0x9f, 0xa2, 0xa3, 0xa4, 0xa5, 0xab, 0xac, 0xad, 0xaf, 0xb0, 0xb1, 0xb3, 0xb6,
    0xb7, 0xba, 0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc3, 0xc7, 0xc8, 0xcb, 0xcf,
];
/// The kernel's, and those that change what blocks rely on.
const SYSTEM: &[&[u8]] = &[
    &[0xfa],
    &[0xfb],
    &[0x0f, 0x20, 0xc0],
    &[0x0f, 0x22, 0xc0],
    &[0x0f, 0x22, 0xd8],
    &[0x0f, 0x01, 0x3e],
    &[0x8e, 0xd8],
    &[0x8e, 0xc1],
    &[0x8e, 0xd2],
    &[0x07],
    &[0x17],
    &[0x1f],
    &[0x06],
    &[0x8c, 0xd8],
    &[0x0f, 0x20, 0xd2],
    &[0x16],
    &[0x0f, 0xa0],
    &[0x0f, 0xa9],
    &[0x8e, 0xe3],
    &[0xcd, 0x30],
    &[0xcc],
    &[0xcf],
    &[0xea, 0x10, 0x10, 0, 0, 0x08, 0],
    &[0xf4],
    &[0xec],
    &[0xef],
    &[0x0f, 0x06],
    &[0x0f, 0x0b],
];

/// Bytes of one instruction, mostly a sensible one.
fn instruction(random: &mut Random) -> Vec<u8> {
    if random.one_in(24) {
        return (0..1 + random.below(6)).map(|_| random.next() as u8).collect();
    }
    if random.one_in(16) {
        return random.pick(SYSTEM).to_vec();
    }
    let mut bytes = Vec::new();
    for (prefix, odds) in [(0x66, 8), (0x67, 40), (0xf0, 24), (0xf3, 16), (0xf2, 32), (0x2e, 40), (0x36, 40)]
    {
        if random.one_in(odds) {
            bytes.push(prefix);
        }
    }
    if random.one_in(48) {
        // Has a handler of its own.
        bytes.extend([0xf0, 0x0f, 0xb1]);
    } else if random.one_in(3) {
        bytes.extend([0x0f, random.pick(TWO)]);
    } else {
        bytes.push(random.pick(ONE));
    }
    // ModRM, SIB, displacement and immediate, as far as the opcode has them; small branches and displacements.
    bytes.push(random.next() as u8);
    for _ in 0..8 {
        bytes.push(if random.one_in(3) { random.next() as u8 } else { 0 });
    }
    let length = decode_length(&bytes);
    bytes.truncate(length);
    bytes
}

fn decode_length(bytes: &[u8]) -> usize {
    crate::interp::decode(bytes, true, 0).map_or(bytes.len().min(3), |i| i.len())
}

/// A flat descriptor of 4 GiB, or one of `limit` bytes.
fn descriptor(access: u8, limit: Option<u16>) -> [u8; 8] {
    match limit {
        None => [0xff, 0xff, 0, 0, 0, access, 0xcf, 0],
        Some(limit) => [limit as u8, (limit >> 8) as u8, 0, 0, 0, access, 0x40, 0],
    }
}

fn bus(random: &mut Random) -> FlatBus {
    let mut bus = FlatBus::new(0, SIZE as usize);
    bus.aliases.insert(ALIAS >> 12, (CODE >> 12) + 1);
    let mut at = CODE;
    while at < CODE + 0x2000 {
        let bytes = instruction(random);
        bus.place(at, &bytes);
        at += bytes.len() as u32;
    }
    for n in (DATA..GDT).step_by(4) {
        let value = random.value();
        bus.place(n, &value.to_le_bytes());
    }
    let entries = [
        [0; 8],
        descriptor(0x9b, None),
        descriptor(0x93, None),
        descriptor(0x93, Some(0x5fff)),
        descriptor(0xfb, None),
        descriptor(0xf3, None),
        descriptor(0x97, Some(0x3fff)),
    ];
    entries.iter().zip(0..).for_each(|(entry, n)| bus.place(GDT + 8 * n, entry));
    if random.one_in(4) {
        let page = random.pick(&[Page::Absent, Page::ReadOnly, Page::Supervisor]);
        bus.pages.insert((DATA >> 12) + random.below(2), page);
    }
    bus
}

fn cpu(random: &mut Random) -> CpuState {
    let mut cpu = CpuState::flat_protected_mode(CODE + random.below(0x1800));
    cpu.gpr = [0; 8].map(|_| random.value());
    cpu.gpr[4] = STACK - random.below(64) * 4;
    cpu.gdtr = TableRegister { base: GDT, limit: 7 * 8 - 1 };
    cpu.eflags |= random.next() & 0xcd5;
    cpu.cr4 |= if random.one_in(2) { cr4::OSFXSR | cr4::OSXMMEXCPT } else { 0 };
    if random.one_in(3) {
        (cpu.cpl, cpu.eflags) = (3, cpu.eflags | 0x200);
        for (segment, selector) in cpu.seg.iter_mut().zip([0x2b, 0x23, 0x2b, 0x2b, 0x2b, 0]) {
            (segment.selector, segment.attributes) = (selector, segment.attributes | 0x60);
        }
    }
    cpu.nmi_blocked = random.one_in(4);
    if random.one_in(8) {
        cpu.eflags |= random.pick(&[eflags::TF, eflags::RF, eflags::AC, eflags::DF]);
        cpu.cr0 |= cr0::AM;
    }
    if random.one_in(16) {
        (cpu.dr[0], cpu.dr[7]) = (DATA + random.below(64), 0x000f_0401);
    }
    if random.one_in(8) {
        cpu.seg[3] = Segment { limit: 0x4fff, ..cpu.seg[3] };
    }
    if random.one_in(16) {
        cpu.seg[1] = Segment { limit: 0x2fff, ..cpu.seg[1] };
    }
    cpu
}

/// As the engine, by steps.
fn model(cpu: &mut CpuState, bus: &mut FlatBus, budget: u64, extent: Extent, waiting: Waiting) -> Ran {
    let mut steps = 0;
    while steps < budget && extent.covers(cpu) && !waiting.can_be_taken(cpu) {
        steps += 1;
        bus.begin(steps, cpu.eip);
        let last = step(cpu, bus);
        if last != Step::Done {
            return Ran { steps, last };
        }
    }
    Ran { steps, last: Step::Done }
}

fn lockstep(seed: u64, engine: &mut Engine) -> u64 {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut ours = (cpu(&mut random), bus(&mut random));
    // A counter that is seen to go on, as devices are.
    ours.1.counter = random.one_in(2).then(|| Gva(DATA + random.below(0x400) * 4));
    let mut theirs = (ours.0.clone(), ours.1.clone());
    // What the model does one by one, in string instructions too.
    ours.1.at_once = true;
    let mut steps = 0;
    for run in 0..RUNS {
        let budget = if random.one_in(4) { 1 } else { 1 + u64::from(random.below(80)) };
        let extent = if random.one_in(8) { Extent::Kernel } else { Extent::All };
        let waiting = Waiting { interrupt: random.one_in(3), nmi: random.one_in(16) };
        let before = ours.0.clone();
        let got = engine.run(&mut ours.0, &mut ours.1, budget, extent, waiting);
        let want = model(&mut theirs.0, &mut theirs.1, budget, extent, waiting);
        let context = || format!("seed {seed}, run {run} of {budget} from EIP {:#x}:\n{before}", before.eip);
        assert_eq!(got, want, "{}", context());
        assert_eq!(ours.0, theirs.0, "{}", context());
        assert!(ours.1.memory == theirs.1.memory, "memory differs: {}", context());
        assert_eq!(ours.1.ports, theirs.1.ports, "{}", context());
        assert_eq!(ours.1.step, theirs.1.step, "time: {}", context());
        steps += got.steps;
        if got.last != Step::Done {
            let eip = CODE + random.below(0x1f00);
            for cpu in [&mut ours.0, &mut theirs.0] {
                (cpu.eip, cpu.halted) = (eip, false);
            }
        }
    }
    steps
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn random_programs_end_as_by_steps() {
    let first = number("UMBRA_SEED", 1);
    let seeds = first..first + number("UMBRA_CASES", PROGRAMS);
    let steps: u64 = seeds.map(|seed| lockstep(seed, &mut Engine::default())).sum();
    println!("engine: {steps} steps alike");
    assert!(steps > 50 * number("UMBRA_CASES", PROGRAMS), "programs end too early: {steps} steps");
}

/// mov byte [next + 1], 7; next: mov al, 1; hlt: the store changes the instruction behind it, in the same block.
fn self_modifying(target: u32) -> Vec<u8> {
    let mut bytes = vec![0xc6, 0x05];
    bytes.extend(target.to_le_bytes());
    bytes.extend([7, 0xb0, 1, 0xf4]);
    bytes
}

#[test]
fn a_store_into_the_running_block_is_seen_by_the_next_instruction_also_through_an_alias() {
    for at in [0x2008, ALIAS + 8] {
        let mut bus = FlatBus::new(0, SIZE as usize);
        bus.aliases.insert(ALIAS >> 12, 2);
        bus.place(0x2000, &self_modifying(at));
        let mut engine = Engine::default();
        for round in 0..3 {
            let mut cpu = CpuState::flat_protected_mode(0x2000);
            let ran = engine.run(&mut cpu, &mut bus, 100, Extent::All, Waiting::default());
            assert_eq!((ran.last, ran.steps, cpu.gpr[0] & 0xff), (Step::Halted, 3, 7), "round {round}");
            bus.place(0x2008, &[1]);
        }
    }
}

/// The same by an instruction without a handler of its own: stosb; mov al, 1; hlt.
#[test]
fn a_store_by_a_generic_op_into_the_running_block_is_seen_by_the_next_instruction() {
    let mut bus = FlatBus::new(0, SIZE as usize);
    bus.place(0x2000, &[0xaa, 0xb0, 1, 0xf4]);
    let mut cpu = CpuState::flat_protected_mode(0x2000);
    (cpu.gpr[0], cpu.gpr[7]) = (7, 0x2002);
    let ran = Engine::default().run(&mut cpu, &mut bus, 100, Extent::All, Waiting::default());
    assert_eq!((ran.last, ran.steps, cpu.gpr[0] & 0xff), (Step::Halted, 3, 7));
}

/// LOCK CMPXCHG by its handler: aligned, by a register and by an index, and across two words, the long way.
#[test]
fn a_locked_exchange_compares_with_eax_and_says_in_zf_what_came_of_it() {
    use crate::cpu::eflags::ZF;
    // lock cmpxchg [ebx], ecx; lock cmpxchg [esi + edi * 2], ecx; hlt
    let code = [0xf0, 0x0f, 0xb1, 0x0b, 0xf4, 0xf0, 0x0f, 0xb1, 0x0c, 0x7e, 0xf4];
    for (entry, offset, there) in (0..2).flat_map(|n| [(n, 0, 7), (n, 0, 8), (n, 2, 7), (n, 3, 8)]) {
        let mut bus = FlatBus::new(0, SIZE as usize);
        bus.place(CODE, &code);
        bus.place(DATA + offset, &u32::to_le_bytes(there));
        let mut cpu = CpuState::flat_protected_mode(CODE + 5 * entry);
        (cpu.gpr[0], cpu.gpr[1], cpu.gpr[3]) = (7, 9, DATA + offset);
        (cpu.gpr[6], cpu.gpr[7]) = (DATA + offset - 8, 4);
        let ran = Engine::default().run(&mut cpu, &mut bus, 100, Extent::All, Waiting::default());
        assert_eq!((ran.last, ran.steps), (Step::Halted, 2));
        let now = bus.dword(DATA + offset);
        let equal = there == 7;
        assert_eq!((cpu.gpr[0], now), if equal { (7, 9) } else { (8, 8) }, "{entry} at {offset}");
        assert_eq!(cpu.eflags & ZF != 0, equal, "{entry} at {offset}");
    }
}

#[test]
fn a_budget_is_met_exactly_wherever_it_ends_in_a_block() {
    // inc eax, twenty times; jmp back.
    let mut bus = FlatBus::new(0, SIZE as usize);
    bus.place(CODE, &[&[0x40; 20][..], &[0xeb, 0xea]].concat());
    for budget in 1..100 {
        let mut cpu = CpuState::flat_protected_mode(CODE);
        let ran = Engine::default().run(&mut cpu, &mut bus, budget, Extent::All, Waiting::default());
        assert_eq!(ran, Ran { steps: budget, last: Step::Done });
        assert_eq!(u64::from(cpu.gpr[0]), budget - budget / 21);
    }
}

#[test]
fn full_arenas_are_emptied_and_filled_again() {
    let mut bus = FlatBus::new(0, 1 << 20);
    // A page of INCs, entered at every byte: each entry is a block of its own.
    bus.place(0, &vec![0x40; 1 << 20]);
    let mut engine = Engine::default();
    for n in 0..40_000 {
        let mut cpu = CpuState::flat_protected_mode(n * 13 % 0xf_0000);
        let ran = engine.run(&mut cpu, &mut bus, 64, Extent::All, Waiting::default());
        assert_eq!((ran.steps, cpu.gpr[0]), (64, 64));
    }
}

/// nop; sti; nop; cli; hlt: what waits is taken behind the shadow of STI, in the one place where it can be.
#[test]
fn a_run_ends_where_a_waiting_interrupt_can_be_taken() {
    let mut bus = FlatBus::new(0, SIZE as usize);
    bus.place(CODE, &[0x90, 0xfb, 0x90, 0xfa, 0xf4]);
    let mut cpu = CpuState::flat_protected_mode(CODE);
    let waiting = Waiting { interrupt: true, nmi: false };
    let ran = Engine::default().run(&mut cpu, &mut bus, 100, Extent::All, waiting);
    assert_eq!((ran.last, ran.steps, cpu.eip), (Step::Done, 3, CODE + 3));
}

/// mov al, 7, whose second byte would be fetched at EIP 0: beyond the segment's limit, though in the same page where the
/// segment's base lies within one.
#[test]
fn an_instruction_over_the_wrap_of_eip_is_a_gp_where_the_base_of_cs_lies_within_a_page() {
    let mut bus = FlatBus::new(0, SIZE as usize);
    bus.place(CODE + 0x7ff, &[0xb0, 7, 0xf4]);
    let mut cpu = CpuState::flat_protected_mode(u32::MAX);
    cpu.seg[1].base = CODE + 0x800;
    let mut theirs = (cpu.clone(), bus.clone());
    let got = Engine::default().run(&mut cpu, &mut bus, 10, Extent::All, Waiting::default());
    let want = model(&mut theirs.0, &mut theirs.1, 10, Extent::All, Waiting::default());
    let refused = Ran { steps: 1, last: Step::Exception(crate::interp::Exception::gp(0)) };
    assert_eq!((got, want, cpu), (refused, refused, theirs.0));
}

/// The counter read by MOV, in the middle of a block and by a fast handler, says which step it is.
#[test]
fn a_device_that_shows_the_time_is_read_at_the_time_of_the_step() {
    // inc ebx; inc ebx; mov eax, [DATA]; inc ebx; mov ecx, [DATA]; hlt
    let mut bus = FlatBus::new(0, SIZE as usize);
    let load = |opcode: &[u8]| [opcode, &DATA.to_le_bytes()].concat();
    bus.place(CODE, &[&[0x43, 0x43][..], &load(&[0xa1]), &[0x43], &load(&[0x8b, 0x0d]), &[0xf4]].concat());
    (bus.time, bus.counter) = (100, Some(Gva(DATA)));
    let mut cpu = CpuState::flat_protected_mode(CODE);
    assert_eq!(Engine::default().run(&mut cpu, &mut bus, 40, Extent::All, Waiting::default()).steps, 6);
    assert_eq!((cpu.gpr[0], cpu.gpr[1]), (103, 105));
}

/// `Again` at each call of the bus in turn, by fast handlers and while decoding: run again, the end is the same.
#[test]
fn a_run_that_had_to_wait_at_any_point_ends_the_same() {
    // mov eax, [esi]; add [esi+4], eax; push eax; call f; hlt; f: pop ecx; push ecx; cmp eax, [esi+4]; ret
    let code = [
        &[0x8b, 0x06, 0x01, 0x46, 0x04, 0x50, 0xe8, 1, 0, 0, 0, 0xf4][..],
        &[0x59, 0x51, 0x3b, 0x46, 0x04, 0xc3],
    ]
    .concat();
    let run = |again_at: Option<u32>| {
        let mut bus = FlatBus::new(0, SIZE as usize);
        bus.place(CODE, &code);
        bus.place(DATA, &[1, 2, 3, 4, 5, 6, 7, 8]);
        bus.again_at = again_at;
        let mut cpu = CpuState::flat_protected_mode(CODE);
        (cpu.gpr[4], cpu.gpr[6]) = (STACK, DATA);
        let (mut engine, mut waits) = (Engine::default(), 0);
        loop {
            match engine.run(&mut cpu, &mut bus, 40, Extent::All, Waiting::default()).last {
                Step::Again => waits += 1,
                last => return (cpu, bus.memory, last, waits),
            }
        }
    };
    let (cpu, memory, last, waits) = run(None);
    assert_eq!((last, waits), (Step::Halted, 0));
    let waits: u32 = (0..40)
        .map(|call| {
            let again = run(Some(call));
            assert!((&again.0, &again.1, again.2) == (&cpu, &memory, Step::Halted), "call {call}");
            again.3
        })
        .sum();
    assert!(waits >= 9, "the bus is called for each load, store and first fetch: {waits}");
}

/// inc eax; nop; and `mov ebx, imm32` across the page's end, run again and again: its tail is stored to, and then mapped
/// elsewhere.
#[test]
fn an_instruction_over_two_pages_is_what_both_of_them_say_now() {
    let mut bus = FlatBus::new(0, SIZE as usize);
    let start = CODE + 0xffb;
    bus.place(start, &[0x40, 0x90, 0xbb, 1, 2]);
    bus.place(start + 5, &[3, 4, 0xf4]);
    bus.place(DATA, &[7, 8, 0xf4]);
    let mut engine = Engine::default();
    let mut run = |bus: &mut FlatBus| {
        let mut cpu = CpuState::flat_protected_mode(start);
        let ran = engine.run(&mut cpu, bus, 10, Extent::All, Waiting::default());
        assert_eq!((ran.steps, ran.last, cpu.gpr[0]), (4, Step::Halted, 1));
        cpu.gpr[3]
    };
    assert_eq!((run(&mut bus), run(&mut bus)), (0x0403_0201, 0x0403_0201));
    assert_eq!(bus.write(Gva(start + 6), Width::B1, 9, Access::write(false)), Ok(()));
    assert_eq!((run(&mut bus), run(&mut bus)), (0x0903_0201, 0x0903_0201));
    bus.aliases.insert((start + 5) >> 12, DATA >> 12);
    bus.invalidate_page(Gva(start + 5));
    assert_eq!((run(&mut bus), run(&mut bus)), (0x0807_0201, 0x0807_0201));
}
