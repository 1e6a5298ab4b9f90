//! Fitting one instruction to the registers: where its operands point, what it loads, where it goes.
//!
//! Everything here is done mostly, not always: what does not fit faults, and faults are compared too.

use iced_x86::{Code, ConstantOffsets, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use umbra::cpu::{Seg, Segment, eflags};

use super::generate::{Builder, FLAGS, STABLE_LEAVES, base_of};
use super::layout::*;
use super::segments::{Entry, local};

const EAX: usize = 0;
const ECX: usize = 1;
const EDX: usize = 2;
const ESP: usize = 4;
const EBP: usize = 5;
const ESI: usize = 6;
const EDI: usize = 7;

/// An instruction under way.
pub struct Fit<'a, 'b> {
    builder: &'a mut Builder<'b>,
    bytes: Vec<u8>,
    instruction: Instruction,
    offsets: ConstantOffsets,
    /// CS's D bit.
    wide: bool,
    /// Registers as they will be.
    gpr: [u32; 8],
    /// Code that makes them so.
    moves: Vec<u8>,
    /// Bytes that a branch jumps over.
    filler: Vec<u8>,
}

impl<'a, 'b> Fit<'a, 'b> {
    pub fn new(builder: &'a mut Builder<'b>, bytes: Vec<u8>) -> Self {
        let cpu = &builder.twin.cpu;
        let (wide, gpr) = (cpu.segment(Seg::Cs).big(), cpu.gpr);
        let mut decoder = Decoder::new(if wide { 32 } else { 16 }, &bytes, DecoderOptions::NONE);
        let instruction = decoder.decode();
        let offsets = decoder.get_constant_offsets(&instruction);
        Fit { builder, bytes, instruction, offsets, wide, gpr, moves: Vec::new(), filler: Vec::new() }
    }

    /// Moves before the instruction, the instruction, bytes behind it.
    pub fn finish(mut self) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        if self.chance(95) {
            self.operands();
        }
        (self.moves, self.bytes, self.filler)
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.builder.random.chance(percent)
    }

    fn below(&mut self, n: u32) -> u32 {
        self.builder.random.below(n)
    }

    fn segment(&self, seg: Seg) -> Segment {
        *self.builder.twin.cpu.segment(seg)
    }

    /// Emits MOV r32, imm32.
    fn set(&mut self, register: usize, value: u32) {
        self.gpr[register] = value;
        if !self.wide {
            self.moves.push(0x66);
        }
        self.moves.push(0xb8 | register as u8);
        self.moves.extend(value.to_le_bytes());
    }

    /// A general register's value, by its name.
    fn value(&self, register: Register) -> u32 {
        let full = self.gpr[register.full_register32().number() & 7];
        match register {
            Register::None => 0,
            r if r.is_gpr32() => full,
            r if r.is_gpr16() => full & 0xffff,
            Register::AH | Register::CH | Register::DH | Register::BH => full >> 8 & 0xff,
            _ => full & 0xff,
        }
    }

    /// Sets what `register` names, as far as its width goes.
    fn set_named(&mut self, register: Register, value: u32) {
        let index = register.full_register32().number() & 7;
        let value = if register.is_gpr16() { self.gpr[index] & 0xffff_0000 | value & 0xffff } else { value };
        self.set(index, value);
    }

    fn operands(&mut self) {
        use Mnemonic as M;
        let i = self.instruction;
        self.stack();
        self.strings();
        match i.mnemonic() {
            M::Bt | M::Bts | M::Btr | M::Btc => self.bit_index(),
            M::Div | M::Idiv if self.chance(60) => {
                let small = self.below(200);
                self.set(EDX, small);
            }
            M::Cpuid => {
                let leaf = self.builder.random.pick(&STABLE_LEAVES);
                self.set(EAX, leaf);
            }
            M::Loop | M::Loope | M::Loopne => {
                let count = self.below(6);
                self.set(ECX, count);
            }
            _ => {}
        }
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        let linear = if memory && i.mnemonic() != M::Lea { self.aim() } else { None };
        self.loads(linear);
        self.branches(linear);
    }

    /// The stack pointer, and the frame pointer of ENTER and LEAVE.
    fn stack(&mut self) {
        let i = self.instruction;
        let frame = matches!(i.mnemonic(), Mnemonic::Enter | Mnemonic::Leave);
        if i.stack_pointer_increment() == 0 && !frame {
            return;
        }
        let inside = self.stack_top().wrapping_sub(DATA + 0x100) < 0x1d00;
        if !inside && self.chance(90) || self.chance(10) {
            self.point_to_stack(ESP);
        }
        if frame && self.chance(90) {
            self.point_to_stack(EBP);
        }
        match i.mnemonic() {
            Mnemonic::Enter if self.chance(80) => {
                let (room, level) = (self.offsets.immediate_offset(), self.offsets.immediate_offset2());
                self.bytes[room + 1] &= 1;
                self.bytes[level] &= if self.chance(70) { 3 } else { 0x3f };
            }
            // What RET releases.
            Mnemonic::Ret | Mnemonic::Retf if i.op_count() == 1 && self.chance(80) => {
                let at = self.offsets.immediate_offset();
                self.bytes[at + 1] = 0;
            }
            Mnemonic::Popf | Mnemonic::Popfd => {
                let flags = self.flags();
                self.poke_stack(0, &flags.to_le_bytes());
            }
            _ => {}
        }
    }

    fn stack_top(&self) -> u32 {
        let ss = self.segment(Seg::Ss);
        let mask = if ss.big() { u32::MAX } else { 0xffff };
        ss.base.wrapping_add(self.gpr[ESP] & mask)
    }

    fn point_to_stack(&mut self, register: usize) {
        let linear = match self.below(10) {
            0 => DATA_READ_ONLY + self.below(24) - 8,
            1 => DATA + self.below(40),
            2 => DATA + 0x1000 + self.below(40) - 20,
            n => DATA + 0x200 + (self.below(0x1800) & if n < 8 { !3 } else { !0 }),
        };
        let ss = self.segment(Seg::Ss);
        let offset = linear.wrapping_sub(ss.base);
        if ss.big() {
            self.set(register, offset);
        } else if offset <= 0xffff {
            let upper = self.gpr[register] & 0xffff_0000;
            self.set(register, upper | offset);
        }
    }

    fn poke_stack(&mut self, above: u32, bytes: &[u8]) {
        let at = self.stack_top().wrapping_add(above);
        self.builder.poke(at, bytes);
    }

    /// Flags for POPF and IRET: those of arithmetic, others once in a while.
    fn flags(&mut self) -> u32 {
        let mut flags = self.builder.random.next() & FLAGS;
        for (bit, percent) in [(eflags::DF, 15), (eflags::AC, 5), (eflags::TF, 4), (eflags::NT, 3)] {
            flags |= if self.chance(percent) { bit } else { 0 };
        }
        if self.chance(5) { self.builder.random.next() & !eflags::TF } else { flags }
    }

    /// ESI, EDI and ECX of string instructions.
    fn strings(&mut self) {
        let i = self.instruction;
        for n in 0..i.op_count() {
            let (register, seg) = match i.op_kind(n) {
                OpKind::MemorySegSI | OpKind::MemorySegESI => (ESI, segment_of(i.memory_segment())),
                OpKind::MemoryESDI | OpKind::MemoryESEDI => (EDI, Seg::Es),
                _ => continue,
            };
            let small = matches!(i.op_kind(n), OpKind::MemorySegSI | OpKind::MemoryESDI);
            let linear = self.target(4);
            let offset = linear.wrapping_sub(self.segment(seg).base);
            if !small {
                self.set(register, offset);
            } else if offset <= 0xffff {
                let upper = self.gpr[register] & 0xffff_0000;
                self.set(register, upper | offset);
            }
        }
        if (i.has_rep_prefix() || i.has_repne_prefix()) && i.is_string_instruction() && self.chance(90) {
            let count = if self.chance(80) { self.below(40) } else { self.below(6000) };
            self.set(ECX, count);
        }
    }

    /// A register's index into a string of bits, within the data.
    fn bit_index(&mut self) {
        let i = self.instruction;
        if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register && self.chance(90) {
            let index = self.below(16384).wrapping_sub(8192);
            self.set_named(i.op1_register(), index);
        }
    }

    /// A linear address for an operand of `size` bytes: in the data, at its edges, or somewhere else.
    fn target(&mut self, size: u32) -> u32 {
        let random = &mut *self.builder.random;
        let any = DATA + random.below(DATA_SIZE as u32);
        match random.below(40) {
            0 => DATA_READ_ONLY.wrapping_sub(random.below(size + 4)),
            1 => (DATA + DATA_SIZE as u32).wrapping_sub(random.below(size + 4)),
            2 => (DATA + random.below(8)).wrapping_sub(random.below(size + 4)),
            3 => DATA + 0x1000 + random.below(8) - 4,
            4 => any,
            5 => random.pick(&[CODE, CODE + 0x800, random_edge(any)]),
            6..24 => DATA + (random.below(0x2000 - 64) & !7),
            _ => DATA + random.below(0x2000 - 64),
        }
    }

    /// Points the memory operand to a target, by its displacement or else its base. Returns where it points.
    fn aim(&mut self) -> Option<u32> {
        let i = self.instruction;
        let size = i.memory_size().size().max(1) as u32;
        let segment = self.segment(segment_of(i.memory_segment()));
        let (base, index) = (i.memory_base(), i.memory_index());
        let displacement = self.offsets.displacement_size();
        let small = base.is_gpr16() || index.is_gpr16() || (base == Register::None && displacement == 2);
        let mask = if small { 0xffff } else { u32::MAX };
        let linear = self.target(size);
        let offset = linear.wrapping_sub(segment.base);
        if offset & !mask != 0 {
            return None;
        }
        let indexed = self.value(index).wrapping_mul(i.memory_index_scale());
        let full = if small { 2 } else { 4 };
        if displacement == full {
            let rest = offset.wrapping_sub(indexed).wrapping_sub(self.value(base)) & mask;
            let at = self.offsets.displacement_offset();
            self.bytes[at..at + full].copy_from_slice(&rest.to_le_bytes()[..full]);
            return Some(linear);
        }
        let based = base != Register::None && base.full_register32() != index.full_register32();
        if !based || base == Register::ESP && self.chance(80) {
            return None;
        }
        let value = offset.wrapping_sub(indexed).wrapping_sub(i.memory_displacement32()) & mask;
        self.set_named(base, value);
        Some(linear)
    }

    /// A selector for `seg`, of a kind that it can be loaded with, or not.
    fn selector(&mut self, seg: Seg) -> u16 {
        let usable: fn(&Entry) -> bool = match seg {
            Seg::Cs => {
                |entry| entry.is_code() && !entry.absent && entry.base.wrapping_sub(CODE - 0x3000) <= 0x3000
            }
            Seg::Ss => Entry::writable,
            _ => Entry::readable,
        };
        let (ldt, random) = (self.builder.ldt, &mut *self.builder.random);
        let usual = if seg == Seg::Cs { USER32_CODE } else { USER_DATA };
        match random.below(20) {
            0..12 => ldt.any(random, usable).unwrap_or(usual),
            12..15 => usual,
            15..17 => local(random.below(LDT_ENTRIES as u32 + 1) as usize) & !3 | random.below(4) as u16,
            17 => random.below(4) as u16,
            18 => random.below(0x80) as u16,
            _ => random.next() as u16,
        }
    }

    /// What a far transfer goes to: behind this instruction, in some code segment.
    fn far_target(&mut self) -> (u16, u32) {
        let selector = self.selector(Seg::Cs);
        let offset = self.behind().wrapping_sub(base_of(selector, self.builder.ldt));
        (selector, offset)
    }

    /// The linear address behind this instruction.
    fn behind(&self) -> u32 {
        self.builder.end() + (self.moves.len() + self.bytes.len()) as u32
    }

    /// The same as an offset in CS.
    fn next_eip(&self) -> u32 {
        self.behind().wrapping_sub(self.segment(Seg::Cs).base)
    }

    /// A 16-bit source operand becomes `value`.
    fn give_word(&mut self, op: u32, linear: Option<u32>, value: u16) {
        match self.instruction.op_kind(op) {
            OpKind::Register => {
                let register = self.instruction.op_register(op);
                let upper = self.value(register.full_register32()) & 0xffff_0000;
                self.set_named(register, upper | u32::from(value));
            }
            _ => {
                if let Some(linear) = linear {
                    self.builder.poke(linear, &value.to_le_bytes());
                }
            }
        }
    }

    /// What loads segment registers or looks at descriptors; BOUND's pair.
    fn loads(&mut self, linear: Option<u32>) {
        use Mnemonic as M;
        let i = self.instruction;
        match i.mnemonic() {
            M::Mov if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() => {
                let selector = self.selector(segment_of(i.op0_register()));
                self.give_word(1, linear, selector);
            }
            M::Pop if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() => {
                let selector = self.selector(segment_of(i.op0_register()));
                self.poke_stack(0, &selector.to_le_bytes());
            }
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
                let selector = self.selector(if i.mnemonic() == M::Lss { Seg::Ss } else { Seg::Ds });
                let width = i.op0_register().size() as u32;
                if let Some(linear) = linear {
                    self.builder.poke(linear.wrapping_add(width), &selector.to_le_bytes());
                }
            }
            M::Lar | M::Lsl => {
                let selector = self.selector(Seg::Ds);
                self.give_word(1, linear, selector);
            }
            M::Verr | M::Verw | M::Arpl => {
                let selector = self.selector(Seg::Ds);
                self.give_word(0, linear, selector);
            }
            M::Bound if self.chance(80) => {
                let index = self.value(i.op0_register());
                let width = i.op0_register().size();
                let pair = [index.wrapping_sub(self.below(3)), index.wrapping_add(self.below(3))];
                let bytes: Vec<u8> = pair.iter().flat_map(|v| v.to_le_bytes()[..width].to_vec()).collect();
                if let Some(linear) = linear {
                    self.builder.poke(linear, &bytes);
                }
            }
            _ => {}
        }
    }

    /// Where transfers go.
    fn branches(&mut self, linear: Option<u32>) {
        use Mnemonic as M;
        let i = self.instruction;
        match i.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 => return self.relative(),
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                let (selector, offset) = self.far_target();
                let width = if i.op0_kind() == OpKind::FarBranch16 { 2 } else { 4 };
                let at = self.bytes.len() - 2 - width;
                self.bytes[at..at + width].copy_from_slice(&offset.to_le_bytes()[..width]);
                self.bytes[at + width..].copy_from_slice(&selector.to_le_bytes());
                return;
            }
            _ => {}
        }
        match i.mnemonic() {
            M::Jmp | M::Call => self.indirect(linear),
            M::Ret => {
                let eip = self.next_eip();
                self.poke_stack(0, &eip.to_le_bytes());
            }
            M::Retf | M::Iret | M::Iretd => self.far_return(),
            _ => {}
        }
    }

    fn indirect(&mut self, linear: Option<u32>) {
        let i = self.instruction;
        match i.code() {
            Code::Jmp_m1616 | Code::Call_m1616 | Code::Jmp_m1632 | Code::Call_m1632 => {
                let (selector, offset) = self.far_target();
                let width = if matches!(i.code(), Code::Jmp_m1616 | Code::Call_m1616) { 2 } else { 4 };
                if let Some(linear) = linear {
                    self.builder.poke(linear, &offset.to_le_bytes()[..width]);
                    self.builder.poke(linear.wrapping_add(width as u32), &selector.to_le_bytes());
                }
            }
            _ if i.op0_kind() == OpKind::Register => {
                // The MOV lies before the instruction, and so moves what is behind it.
                let length = if self.wide { 5 } else { 6 };
                let eip = self.next_eip().wrapping_add(length);
                self.set_named(i.op0_register(), eip);
            }
            _ => {
                let eip = self.next_eip();
                if let Some(linear) = linear {
                    self.builder.poke(linear, &eip.to_le_bytes()[..i.memory_size().size()]);
                }
            }
        }
    }

    fn far_return(&mut self) {
        let (selector, offset) = self.far_target();
        let flags = self.flags();
        let small = matches!(self.instruction.code(), Code::Retfw | Code::Retfw_imm16 | Code::Iretw);
        let width = if small { 2 } else { 4 };
        let frame = [offset, selector.into(), flags];
        let slots = if matches!(self.instruction.mnemonic(), Mnemonic::Retf) { 2 } else { 3 };
        for (value, n) in frame.into_iter().zip(0..slots) {
            self.poke_stack(n * width as u32, &value.to_le_bytes()[..width]);
        }
    }

    /// A relative branch: forward over some bytes, back to an instruction (conditional ones alone, so that most
    /// loops end), or anywhere.
    fn relative(&mut self) {
        let i = self.instruction;
        let width = match i.code().op_code().op0_kind() {
            iced_x86::OpCodeOperandKind::br16_1 | iced_x86::OpCodeOperandKind::br32_1 => 1,
            iced_x86::OpCodeOperandKind::br16_2 => 2,
            _ => 4,
        };
        let always = matches!(i.mnemonic(), Mnemonic::Jmp | Mnemonic::Call);
        let displacement = match self.below(10) {
            0..7 => {
                let length = self.below(9) as usize;
                self.filler.resize(length, 0);
                self.builder.random.fill(&mut self.filler);
                length as i32
            }
            7 | 8 if !always && !self.builder.starts.is_empty() => {
                let n = self.below(self.builder.starts.len() as u32) as usize;
                let from = self.behind() - CODE - self.builder.case.at;
                self.builder.starts[n] as i32 - from as i32
            }
            _ => return,
        };
        let at = self.bytes.len() - width;
        self.bytes[at..].copy_from_slice(&displacement.to_le_bytes()[..width]);
    }
}

/// Segment register by name.
fn segment_of(register: Register) -> Seg {
    match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}

/// An address where sums wrap, or the one given.
fn random_edge(any: u32) -> u32 {
    if any & 1 == 0 { u32::MAX - (any >> 1 & 7) } else { any }
}
