//! Random CPUs, descriptor tables and code, of which much makes sense.
//!
//! ```text
//! 0 real-mode vectors | 0x1000 GDT | 0x1800 LDT | 0x2000 TSS | 0x3000 IDT | 0x4000 handlers | 0x5000 code
//! 0x6000 data ... | 0x8000 stacks, a page for each ring | 0xc000 data ... 0x10000
//! ```
//!
//! Holds: a state that is made here has no reserved bit set, and where its plan overrides no segment register it is
//! consistent (`state::inconsistency`).

use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};
use umbra::cpu::fpu::IMAGE_BYTES;
use umbra::cpu::{CpuState, Fpu, Seg, Segment, TableRegister, cr0, efer, eflags};
use umbra::interp::Event;

use crate::state::CR4;

/// Bytes of memory that a plan lays out, from linear address 0.
pub const BYTES: u32 = 0x10000;
/// Where code starts.
pub const CODE: u32 = 0x5000;
/// Where data are.
pub const DATA: u32 = 0x6000;
const GDT: u32 = 0x1000;
const LDT: u32 = 0x1800;
const TSS: u32 = 0x2000;
const IDT: u32 = 0x3000;
const HANDLERS: u32 = 0x4000;
const STACKS: u32 = 0x8000;

/// What is sown: start and bytes.
const SOWN: [(u32, u32); 7] = [
    (0, 0x400),
    (HANDLERS, 0x180),
    (CODE, 0x800),
    (DATA, 0x1000),
    (STACKS + 0x700, 0x200),
    (STACKS + 0x3700, 0x200),
    (BYTES - 0x100, 0x100),
];

/// Bytes that are enough to make a start of.
const START_BYTES: usize = 1024;

/// Descriptors that every GDT has: code and data for each ring, 32 bits and 16; then a TSS and an LDT.
const FLAT: u16 = 1;
const TASK: u16 = FLAT + 16;
const LOCAL: u16 = TASK + 1;
/// The plan's own come after those, and fill the LDT.
const OWN: u16 = LOCAL + 1;
const OWN_COUNT: u16 = 8;

/// A number that often means something.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Value {
    /// In the data.
    Data(u16),
    /// In the tables, or in the code.
    Below(u16),
    /// A page of another part of linear memory: 2 MiB apart, or at the top.
    Far { region: u8, page: u8, offset: u16 },
    /// Right behind what is laid out.
    Beyond(u16),
    /// A selector.
    Selector(Selector),
    /// Few.
    Small(u8),
    /// About to overflow, or to leave a page or memory.
    Edge(u8),
    /// Anything.
    Any(u32),
}

impl Value {
    /// The number.
    pub fn get(self) -> u32 {
        const EDGES: [u32; 10] =
            [0, u32::MAX, 0x7fff_ffff, 0x8000_0000, 0xffff, 0x6ffe, 0x7ffd, 0xfffe, 0xffff_fff9, 0xfff];
        match self {
            Value::Data(offset) => DATA + u32::from(offset) % (BYTES - DATA),
            Value::Below(offset) => u32::from(offset) % DATA,
            Value::Far { region, page, offset } => {
                let top = if region & 0x80 != 0 { 0xff00_0000 } else { 0 };
                top | u32::from(region % 4) << 21 | u32::from(page % 8) << 12 | u32::from(offset % 0x1000)
            }
            Value::Beyond(offset) => BYTES + u32::from(offset),
            Value::Selector(selector) => selector.get().into(),
            Value::Small(value) => value.into(),
            Value::Edge(which) => EDGES[usize::from(which) % EDGES.len()],
            Value::Any(value) => value,
        }
    }
}

/// A selector of a descriptor that there is, nearly always.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Selector {
    index: u8,
    low: u8,
}

impl Selector {
    fn get(self) -> u16 {
        let rights = u16::from(self.low & 7);
        let local = rights & 4 != 0;
        let count = if local { OWN_COUNT } else { OWN + OWN_COUNT + 1 };
        let index = u16::from(self.index);
        // One in sixteen, anything.
        let index = if self.low >> 4 == 15 { index } else { index % count };
        index << 3 | rights
    }
}

/// A descriptor of the plan's own.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Descriptor {
    /// Code, data, or a system segment by its type.
    Segment { access: u8, flags: u8, base: Value, limit: Value },
    /// Any gate.
    Gate { access: u8, selector: Selector, offset: Value, parameters: u8 },
    /// Anything.
    Any(u64),
}

impl Descriptor {
    fn bytes(self) -> [u8; 8] {
        match self {
            // Present, nearly always.
            Descriptor::Segment { access, flags, base, limit } => {
                let access = access ^ 0x80;
                segment(base.get(), limit.get(), u16::from(flags & 0xf0) << 8 | u16::from(access))
            }
            Descriptor::Gate { access, selector, offset, parameters } => {
                let kind = [0xc, 0x4, 0x5, 0xe, 0xf, 0x6, 0x7, 0xc][usize::from(access) % 8];
                gate(selector.get(), offset.get(), kind | access & 0x60 | !access & 0x80, parameters & 31)
            }
            Descriptor::Any(value) => value.to_le_bytes(),
        }
    }
}

fn segment(base: u32, limit: u32, attributes: u16) -> [u8; 8] {
    let low = limit & 0xffff | base << 16;
    let attributes = u32::from(attributes) << 8;
    let high = base >> 16 & 0xff | base & 0xff00_0000 | limit & 0xf_0000 | attributes & 0x00f0_ff00;
    (u64::from(high) << 32 | u64::from(low)).to_le_bytes()
}

fn gate(selector: u16, offset: u32, access: u8, parameters: u8) -> [u8; 8] {
    let low = u32::from(selector) << 16 | offset & 0xffff;
    let high = offset & 0xffff_0000 | u32::from(access) << 8 | u32::from(parameters);
    (u64::from(high) << 32 | u64::from(low)).to_le_bytes()
}

/// A segment register as no load would make it.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Override {
    selector: Selector,
    base: Value,
    limit: Value,
    attributes: u16,
    unusable: bool,
}

impl Override {
    fn segment(self) -> Segment {
        Segment {
            selector: self.selector.get(),
            base: self.base.get(),
            limit: self.limit.get(),
            attributes: self.attributes & 0xd0ff,
            unusable: self.unusable,
        }
    }
}

/// Where a CPU begins: real mode, or protected mode with 16-bit or 32-bit segments of any ring.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Mode(u8);

impl Mode {
    fn ring(self) -> u8 {
        self.0 & 3
    }

    fn is_narrow(self) -> bool {
        self.0 & 4 != 0
    }

    fn is_real(self) -> bool {
        self.0 >> 3 & 7 == 0
    }
}

/// How a CPU begins, in whatever mode.
#[derive(Arbitrary, Clone, Debug)]
pub struct Start {
    registers: [Value; 8],
    flags: u32,
    cr0: u32,
    cr4: u32,
    no_execute: bool,
    breakpoints: Option<([Value; 4], u32)>,
    overrides: Option<(u8, Override)>,
    descriptors: [Descriptor; OWN_COUNT as usize],
    gates: Vec<(u8, Descriptor)>,
    /// Limits of GDT, IDT and TSS, where they are not what they should be.
    limits: Option<(u8, Value)>,
    task16: bool,
    /// The image that the FPU holds, where it is not as after reset: grown from this.
    fpu: Option<u32>,
    odd: u8,
    seed: u32,
}

/// A start that is spelt out, or one of four thousand million in few bytes.
#[derive(Arbitrary, Clone, Debug)]
pub enum Beginning {
    /// Grown from a seed.
    Seeded(u32),
    /// Spelt out.
    Spelt(Box<Start>),
}

impl Beginning {
    /// The start.
    pub fn start(self) -> Start {
        match self {
            Beginning::Spelt(start) => *start,
            Beginning::Seeded(seed) => {
                let bytes: Vec<u8> = noise(seed).take(START_BYTES).collect();
                Start::arbitrary(&mut Unstructured::new(&bytes)).expect("bytes enough for a start")
            }
        }
    }
}

/// Bytes of noise.
fn noise(seed: u32) -> impl Iterator<Item = u8> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    })
}

/// An FXSAVE image with numbers of each kind in its registers: noise, and in places all zeros or all ones.
fn image(seed: u32) -> [u8; IMAGE_BYTES] {
    let mut noise = noise(seed);
    let mut bytes = [0; IMAGE_BYTES];
    for chunk in bytes.chunks_exact_mut(2) {
        let fill = match noise.next() {
            Some(0..0x30) => Some(0),
            Some(0x30..0x60) => Some(0xff),
            _ => None,
        };
        chunk.fill_with(|| fill.or_else(|| noise.next()).unwrap_or(0));
    }
    // MXCSR has 16 bits.
    bytes[26..28].fill(0);
    bytes
}

/// What a plan may leave to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// CR0.PG and the like are bits like others.
    Free,
    /// They stay clear, for the target to set.
    Off,
}

impl Start {
    /// Puts memory down.
    pub fn lay(&self, place: &mut dyn FnMut(u32, &[u8])) {
        self.sow(place);
        self.tables(place);
    }

    /// The CPU, in this mode.
    pub fn cpu(&self, mode: Mode, paging: Paging) -> CpuState {
        let mut cpu = CpuState::flat_protected_mode(CODE);
        cpu.gdtr = TableRegister { base: GDT, limit: 8 * (OWN + OWN_COUNT) - 1 };
        cpu.idtr = TableRegister { base: IDT, limit: 0x7ff };
        cpu.ldtr = Segment {
            selector: LOCAL << 3,
            base: LDT,
            limit: u32::from(8 * OWN_COUNT - 1),
            attributes: 0x82,
            unusable: false,
        };
        let kind = if self.task16 { 0x83 } else { 0x8b };
        cpu.tr = Segment { selector: TASK << 3, base: TSS, limit: 0xff, attributes: kind, unusable: false };
        self.segments(&mut cpu, mode);
        self.control(&mut cpu, paging);
        if let Some(fpu) = self.fpu.and_then(|seed| Fpu::from_image(&image(seed))) {
            cpu.fpu = fpu;
        }
        for (register, value) in cpu.gpr.iter_mut().zip(self.registers) {
            *register = value.get();
        }
        if self.odd & 7 != 0 {
            cpu.gpr[4] = STACKS + 0x1000 * u32::from(cpu.cpl) + 0x800 - 4 * u32::from(self.odd >> 3);
        }
        cpu
    }

    fn segments(&self, cpu: &mut CpuState, mode: Mode) {
        if mode.is_real() {
            let segment = Segment { limit: 0xffff, attributes: 0x93, ..Segment::default() };
            cpu.seg = [segment; 6];
            cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
            cpu.cr0 &= !cr0::PE;
        } else {
            let (ring, narrow) = (mode.ring(), mode.is_narrow());
            let index = FLAT + 4 * u16::from(ring) + 2 * u16::from(narrow);
            let big = if narrow { 0 } else { 1 << 14 };
            let flat = |index: u16, kind: u16| Segment {
                selector: index << 3 | u16::from(ring),
                base: 0,
                limit: u32::MAX,
                attributes: 0x8090 | big | u16::from(ring) << 5 | kind,
                unusable: false,
            };
            cpu.seg = [flat(index + 1, 3); 6];
            cpu.seg[Seg::Cs as usize] = flat(index, 11);
            cpu.cpl = ring;
        }
        if let Some((which, segment)) = self.overrides {
            cpu.seg[usize::from(which) % 6] = segment.segment();
        }
    }

    fn control(&self, cpu: &mut CpuState, paging: Paging) {
        // Single step, NT, VM and RF once in a while; IOPL and the rest as it comes.
        let rare = if self.flags >> 24 & 3 == 0 { eflags::TF | eflags::RF } else { 0 };
        let rarer = match self.flags >> 26 {
            0x3f if cpu.cpl == 3 => eflags::NT | eflags::VM,
            0x3f => eflags::NT,
            _ => 0,
        };
        cpu.eflags = eflags::FIXED | self.flags & (0x0024_3ed5 | rare | rarer);
        // The FPU is there, nearly always.
        let away = self.cr0 & self.cr0 >> 8 & self.cr0 >> 12 & (cr0::EM | cr0::TS);
        cpu.cr0 |= away | self.cr0 & (cr0::MP | cr0::NE | cr0::WP | cr0::AM | cr0::CD);
        cpu.cr4 = self.cr4 & CR4;
        if self.no_execute {
            cpu.msrs.efer = efer::NXE;
        }
        if paging == Paging::Free && cpu.protected() {
            cpu.cr0 |= self.cr0 & cr0::PG;
        }
        if let Some((addresses, control)) = self.breakpoints {
            for (register, value) in cpu.dr.iter_mut().zip(addresses) {
                *register = value.get();
            }
            cpu.dr[7] = control & 0xffff_23ff | 0x400;
        }
        cpu.nmi_blocked = self.odd & 0x40 != 0;
        cpu.interrupt_shadow = self.odd & 0x80 != 0;
        let Some((which, limit)) = self.limits else { return };
        match which % 4 {
            0 => cpu.gdtr.limit = limit.get() as u16,
            1 => cpu.idtr.limit = limit.get() as u16,
            2 => cpu.tr.limit = limit.get(),
            _ => cpu.ldtr.limit = limit.get(),
        }
    }

    /// Words that make sense to some instruction: handlers, code, data and stacks, and a real-mode vector table.
    fn sow(&self, place: &mut dyn FnMut(u32, &[u8])) {
        let mut state = self.seed | 1;
        let mut word = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let choice = state >> 8;
            match state >> 29 {
                0..=2 => u32::from(Selector { index: choice as u8, low: (choice >> 8) as u8 }.get()),
                3..=4 => DATA + choice % (BYTES - DATA),
                5 => CODE + choice % 0x1000,
                _ => state,
            }
        };
        for (start, bytes) in SOWN {
            let words: Vec<u8> = (0..bytes / 4).flat_map(|_| word().to_le_bytes()).collect();
            place(start, &words);
        }
    }

    fn tables(&self, place: &mut dyn FnMut(u32, &[u8])) {
        let mut put = |table: u32, index: u16, bytes: [u8; 8]| place(table + 8 * u32::from(index), &bytes);
        for ring in 0..4 {
            for (n, big) in [(0, 1 << 14), (2, 0)] {
                let attributes = 0x8090 | big | ring << 5;
                put(GDT, FLAT + 4 * ring + n, segment(0, 0xfffff, attributes | 10));
                put(GDT, FLAT + 4 * ring + n + 1, segment(0, 0xfffff, attributes | 2));
            }
        }
        put(GDT, TASK, segment(TSS, 0xff, 0x8b));
        put(GDT, LOCAL, segment(LDT, u32::from(8 * OWN_COUNT - 1), 0x82));
        for (n, descriptor) in (0..).zip(self.descriptors) {
            put(GDT, OWN + n, descriptor.bytes());
            put(LDT, n, descriptor.bytes());
        }
        for vector in 0..=255_u16 {
            let access = if vector % 8 == 3 { 0xee } else { 0x8e };
            put(IDT, vector, gate(FLAT << 3, HANDLERS + u32::from(vector), access, 0));
        }
        for (vector, descriptor) in &self.gates {
            put(IDT, u16::from(*vector % 64), descriptor.bytes());
        }
        self.task(place);
    }

    /// Stacks for the inner rings.
    fn task(&self, place: &mut dyn FnMut(u32, &[u8])) {
        for ring in 0..3_u16 {
            let pointer = STACKS + 0x1000 * u32::from(ring) + 0x800;
            let selector = (FLAT + 4 * ring + 1) << 3 | ring;
            if self.task16 {
                let at = TSS + 2 + 4 * u32::from(ring);
                place(at, &(pointer as u16).to_le_bytes());
                place(at + 2, &selector.to_le_bytes());
            } else {
                let at = TSS + 4 + 8 * u32::from(ring);
                place(at, &pointer.to_le_bytes());
                place(at + 4, &selector.to_le_bytes());
            }
        }
        // Some ports are open, some are not, and most lie behind the limit.
        place(TSS + 0x66, &0x68_u16.to_le_bytes());
        place(TSS + 0x68, &self.seed.to_le_bytes());
    }
}

/// What is to stand at CS:EIP.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Code {
    /// What is there.
    Keep,
    /// Prefixes, an opcode of one of the maps, anything.
    Shaped { prefixes: [u8; 2], map: u8, opcode: u8, rest: [u8; 9] },
    /// What few random bytes are: the kernel's instructions, and transfers between segments and rings.
    System { which: u8, prefix: u8, operand: Value, selector: Selector, modrm: u8 },
    /// x87, MMX, SSE and SSE2.
    Fpu { prefix: u8, opcode: u8, modrm: u8, rest: [u8; 5] },
    /// Anything.
    Bytes([u8; 12]),
}

impl Code {
    /// The bytes, none for [`Code::Keep`].
    pub fn bytes(self) -> Vec<u8> {
        match self {
            Code::Keep => Vec::new(),
            Code::Bytes(bytes) => bytes.to_vec(),
            Code::Fpu { prefix, opcode, modrm, rest } => {
                let escape = opcode & 0x80 == 0;
                let prefix = [0x66, 0xf2, 0xf3, 0x67].get(usize::from(prefix) % if escape { 16 } else { 6 });
                let mut bytes: Vec<u8> = prefix.copied().into_iter().collect();
                match opcode & 0x7f {
                    opcode if escape => bytes.push(0xd8 | opcode & 7),
                    opcode if opcode < 0x40 => bytes
                        .extend([0x0f, [0x10, 0x28, 0x2c, 0xae][usize::from(opcode) % 4] | opcode >> 2 & 3]),
                    opcode if opcode < 0x60 => bytes.extend([0x0f, 0x50 + (opcode & 0x1f)]),
                    opcode => bytes.extend([0x0f, 0xc0 | opcode & 0x1f | opcode << 1 & 0x20]),
                }
                bytes.push(modrm);
                bytes.extend(rest);
                bytes
            }
            Code::Shaped { prefixes, map, opcode, rest } => {
                const PREFIXES: [u8; 11] = [0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65];
                let prefix = |n: &u8| PREFIXES.get(usize::from(*n) % 32).copied();
                let mut bytes: Vec<u8> = prefixes.iter().filter_map(prefix).collect();
                match map % 8 {
                    0..=3 => {}
                    4..=6 => bytes.push(0x0f),
                    _ => bytes.extend([0x0f, 0x38]),
                }
                bytes.push(opcode);
                bytes.extend(rest);
                bytes
            }
            Code::System { which, prefix, operand, selector, modrm } => {
                const OPCODES: [&[u8]; 32] = [
                    &[0x0f, 0x00],
                    &[0x0f, 0x01],
                    &[0x0f, 0x02],
                    &[0x0f, 0x03],
                    &[0x0f, 0x06],
                    &[0x0f, 0x20],
                    &[0x0f, 0x21],
                    &[0x0f, 0x22],
                    &[0x0f, 0x23],
                    &[0x0f, 0x30],
                    &[0x0f, 0x32],
                    &[0x0f, 0xb2],
                    &[0x0f, 0xc7],
                    &[0x63],
                    &[0x8c],
                    &[0x8e],
                    &[0x9a],
                    &[0xea],
                    &[0xca],
                    &[0xcb],
                    &[0xcd],
                    &[0xcf],
                    &[0xff],
                    &[0x9d],
                    &[0x1f],
                    &[0x17],
                    &[0xc8],
                    &[0xf4],
                    &[0xf3, 0x6c],
                    &[0xf3, 0xa5],
                    &[0xf2, 0xae],
                    &[0xf3, 0xab],
                ];
                let size = [0x66, 0x67].get(usize::from(prefix) % 8);
                let mut bytes: Vec<u8> = size.copied().into_iter().collect();
                let opcode = OPCODES[usize::from(which) % OPCODES.len()];
                bytes.extend(opcode);
                if !matches!(opcode, [0x9a] | [0xea]) {
                    bytes.push(modrm);
                }
                bytes.extend(operand.get().to_le_bytes());
                bytes.extend(selector.get().to_le_bytes());
                bytes
            }
        }
    }
}

/// Something that comes from outside between two instructions.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Happening {
    /// Nothing.
    Nothing,
    /// An external interrupt, where one may come.
    Interrupt(u8),
    /// An NMI, where one may come.
    Nmi,
    /// A whole exception, as another engine would report it.
    Exception(u8, Option<u16>),
}

impl Happening {
    /// The event, where `cpu` can take it now.
    pub fn event(self, cpu: &CpuState) -> Option<Event> {
        use umbra::interp::{Exception, vector};
        match self {
            Happening::Interrupt(vector) if cpu.interruptible() => Some(Event::External(vector)),
            Happening::Nmi if !cpu.nmi_blocked => Some(Event::Nmi),
            Happening::Exception(vector, address) => {
                let coded = matches!(vector & 31, vector::DF | vector::TS..=vector::PF | vector::AC);
                let error = coded.then_some(0);
                Some(Event::Exception(Exception { vector: vector & 31, error, cr2: address.map(u32::from) }))
            }
            _ => None,
        }
    }
}
