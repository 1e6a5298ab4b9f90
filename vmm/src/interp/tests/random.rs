//! Random bytes in random states: no panic, and the invariants of the state hold.

use proptest::prelude::*;

use super::super::flat::Page;
use super::super::{Delivered, Event, Step};
use super::machine::*;
use crate::cpu::eflags::{FIXED, VM};
use crate::cpu::{CpuState, Fpu, Seg};

/// A random machine, its memory sown with things that make sense to some instruction.
#[derive(Clone, Debug)]
pub struct Start {
    mode: u8,
    registers: [u32; 8],
    flags: u32,
    control: u32,
    descriptors: Vec<(u32, u32, u16)>,
    pages: Vec<(u32, u8)>,
    seed: u32,
    pub bytes: Vec<u8>,
}

fn register() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => DATA..DATA + 0x2000,
        2 => 0x7f00_u32..0x9000,
        2 => 0_u32..0x100,
        2 => any::<u32>(),
        1 => prop::sample::select(vec![u32::MAX, 0x8000_0000, 0x6ffe, 0x7ffd, 0x1b, 0x1_0006]),
    ]
}

/// Instruction bytes: prefixes, then an opcode of one of the maps, then anything.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop::sample::select(vec![0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65]);
    let prefixes = prop::collection::vec(prefix, 0..3);
    let map = prop_oneof![
        3 => Just(vec![]),
        2 => Just(vec![0x0f]),
        // x87, and most of MMX and SSE.
        1 => (0xd8_u8..=0xdf).prop_map(|escape| vec![escape]),
        1 => (0x50_u8..=0x7f).prop_map(|opcode| vec![0x0f, opcode]),
    ];
    (prefixes, map, prop::collection::vec(any::<u8>(), 12)).prop_map(|(a, b, c)| [a, b, c].concat())
}

pub fn start() -> impl Strategy<Value = Start> {
    let descriptors = prop::collection::vec((0_u32..0x3000, any::<u32>(), any::<u16>()), 6);
    let pages = prop::collection::vec((2_u32..0xb, 0_u8..3), 0..3);
    let rest = (descriptors, pages, any::<u32>(), bytes());
    (0_u8..8, prop::array::uniform8(register()), any::<u32>(), any::<u32>(), rest).prop_map(
        |(mode, registers, flags, control, (descriptors, pages, seed, bytes))| Start {
            mode,
            registers,
            flags,
            control,
            descriptors,
            pages,
            seed,
            bytes,
        },
    )
}

impl Start {
    pub fn machine(&self) -> Machine {
        let mut machine = match self.mode {
            0 => Machine::real(),
            1..=3 => Machine::user(),
            _ => Machine::kernel(),
        };
        self.sow(&mut machine);
        let esp = machine.cpu.gpr[4];
        machine.cpu.gpr = self.registers;
        if self.seed & 3 != 0 {
            machine.cpu.gpr[4] = esp - (self.seed >> 2 & 0xff);
        }
        // Single step, IOPL and NT once in a while.
        let rare = if self.flags >> 28 == 0 { 0x7100 } else { 0 };
        machine.cpu.eflags = FIXED | self.flags & (0x24_0ed5 | rare);
        // AM, NE, TS, EM, MP; SMAP, UMIP, TSD, and SSE most of the time.
        machine.cpu.cr0 |= self.control & 0x4_002e & self.control >> 8;
        machine.cpu.cr4 |= self.control & 0x20_0804 | (self.control | self.flags) & 0x600;
        self.sow_fpu(&mut machine.cpu.fpu);
        machine.bus.place(CODE, &self.bytes);
        machine
    }

    /// An FPU of odd numbers, half of the time with all exceptions masked.
    fn sow_fpu(&self, fpu: &mut Fpu) {
        let masks = if self.seed & 8 == 0 { 0x3f } else { 0 };
        fpu.set_words(self.seed as u16 | masks, (self.flags >> 8) as u16);
        fpu.set_tag_word(self.control as u16);
        assert!(fpu.set_mxcsr(self.flags & 0xffff | u32::from(masks) << 7));
        let mut state = u64::from(self.seed) << 32 | u64::from(self.flags);
        for n in 0..16 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Infinities, small numbers, zeros, anything.
            let value = [0x7f80_0000, 0x3ff0_0000, 0, state][(state >> 60 & 3) as usize];
            let value = u128::from(value) << 64 | u128::from(state.rotate_left(29));
            if n < 8 { fpu.set_st(n, value) } else { fpu.set_xmm(n, value) }
        }
    }

    fn sow(&self, machine: &mut Machine) {
        let mut state = self.seed | 1;
        for address in (DATA..0xc000).step_by(4) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = match state >> 29 {
                0..=2 => u32::from([8_u16, 0x10, 0x1b, 0x23, 0x38, 0x43, 0x48, 0][(state >> 8 & 7) as usize]),
                3..=4 => DATA + (state >> 8 & 0x1fff),
                _ => state,
            };
            machine.bus.place(address, &value.to_le_bytes());
        }
        for (n, (base, limit, attributes)) in self.descriptors.iter().enumerate() {
            // Present, most of them.
            let attributes = attributes | if attributes & 0x300 != 0 { 0x80 } else { 0 };
            machine.set_descriptor(FREE + 8 * n as u16, *base, *limit, attributes);
        }
        for (page, kind) in &self.pages {
            let kind = [Page::Absent, Page::ReadOnly, Page::Supervisor][usize::from(*kind)];
            machine.bus.pages.insert(*page, kind);
        }
    }
}

/// What holds of every state that a step may leave.
pub fn check_state(cpu: &CpuState) -> Result<(), TestCaseError> {
    prop_assert_eq!(cpu.eflags & (FIXED | VM | 0xffc0_8028), FIXED);
    prop_assert!(cpu.seg.iter().all(|segment| segment.attributes & 0x2f00 == 0));
    if cpu.protected() {
        let ss = cpu.segment(Seg::Ss);
        prop_assert_eq!(cpu.segment(Seg::Cs).selector & 3, u16::from(cpu.cpl));
        prop_assert!(ss.unusable || ss.dpl() == cpu.cpl, "{:?}", ss);
    } else {
        prop_assert_eq!(cpu.cpl, 0);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn random_code_never_panics_and_keeps_the_state_legal(start in start()) {
        let mut machine = start.machine();
        // In real mode the other mode's invariants hold from the first far jump on.
        let real = !machine.cpu.protected();
        for _ in 0..40 {
            let step = super::super::step(&mut machine.cpu, &mut machine.bus);
            if real && machine.cpu.protected() {
                break;
            }
            check_state(&machine.cpu)?;
            match step {
                Step::Done => {}
                Step::Exception(exception) => {
                    if machine.deliver(Event::Exception(exception)) != Delivered::Handler {
                        break;
                    }
                    check_state(&machine.cpu)?;
                }
                _ => break,
            }
        }
    }
}
