//! Data movement: MOV and its kin, PUSH and POP, frames, flags to and from the stack.

use iced_x86::{Code, ConditionCode, Instruction, OpKind, Register};
use umbra_mmu::AccessKind;

use super::flags::ARITHMETIC;
use super::operand::{EAX, EBP, EBX, ECX, EDI, EDX, ESI, ESP, in_memory, merge, segment_of, width_of};
use super::stack::Stack;
use super::{Bus, Core, Exception, Exec, Flow, Leave, Width, ensure};
use crate::cpu::eflags::{AC, CF, DF, FIXED, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM};
use crate::cpu::{Seg, cr4};

/// The most levels ENTER can nest.
const ENTER_LEVELS_MAX: u32 = 31;

/// A condition's low four opcode bits.
pub(super) fn condition_bits(code: ConditionCode) -> u32 {
    match code {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g | ConditionCode::None => 15,
    }
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// True where the condition of a Jcc, SETcc, CMOVcc, LOOPE or LOOPNE holds.
    pub(super) fn condition(&self, i: &Instruction) -> bool {
        self.arithmetic_flags().meet(condition_bits(i.condition_code()))
    }

    /// MOV between general registers, memory and immediates.
    pub(super) fn mov(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = width_of(i, 0);
        let value = self.read(i, 1, width)?;
        self.write(i, 0, width, value)?;
        Ok(Flow::Next)
    }

    /// MOV in all its forms.
    pub(super) fn mov_any(&mut self, i: &Instruction) -> Exec<Flow> {
        match i.code() {
            Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg => self.mov_from_segment(i),
            Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 => {
                let selector = self.read_selector(i, 1)?;
                self.load_segment_register(segment_of(i.op0_register()), selector)
            }
            Code::Mov_r32_cr => self.mov_from_control(i),
            Code::Mov_cr_r32 => self.mov_to_control(i),
            Code::Mov_r32_dr => self.mov_from_debug(i),
            Code::Mov_dr_r32 => self.mov_to_debug(i),
            _ => self.mov(i),
        }
    }

    /// A 16-bit operand, of a register's low half where the encoding names a 32-bit one.
    pub(super) fn read_selector(&mut self, i: &Instruction, op: u32) -> Exec<u16> {
        Ok(self.read(i, op, Width::B2)? as u16)
    }

    /// Writes a 16-bit value: zero-extended to a 32-bit register, two bytes to memory.
    pub(super) fn write_selector(&mut self, i: &Instruction, op: u32, value: u16) -> Exec<Flow> {
        self.write(i, op, Width::B2, value.into())?;
        Ok(Flow::Next)
    }

    fn mov_from_segment(&mut self, i: &Instruction) -> Exec<Flow> {
        let selector = self.cpu.segment(segment_of(i.op1_register())).selector;
        self.write_selector(i, 0, selector)
    }

    /// MOVZX.
    pub(super) fn move_zero_extended(&mut self, i: &Instruction) -> Exec<Flow> {
        let value = self.read(i, 1, width_of(i, 1))?;
        self.write(i, 0, width_of(i, 0), value)?;
        Ok(Flow::Next)
    }

    /// MOVSX.
    pub(super) fn move_sign_extended(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = width_of(i, 1);
        let value = width.extend(self.read(i, 1, width)?);
        self.write(i, 0, width_of(i, 0), value)?;
        Ok(Flow::Next)
    }

    /// LEA: the offset, no access.
    pub(super) fn load_address(&mut self, i: &Instruction) -> Exec<Flow> {
        let (_, offset) = self.effective(i);
        self.set_register(i.op0_register(), offset);
        Ok(Flow::Next)
    }

    /// SETcc.
    pub(super) fn set_condition(&mut self, i: &Instruction) -> Exec<Flow> {
        let value = u32::from(self.condition(i));
        self.write(i, 0, Width::B1, value)?;
        Ok(Flow::Next)
    }

    /// CMOVcc: the source is read, and may fault, whatever the condition.
    pub(super) fn move_conditional(&mut self, i: &Instruction) -> Exec<Flow> {
        let value = self.read(i, 1, width_of(i, 1))?;
        if self.condition(i) {
            self.set_register(i.op0_register(), value);
        }
        Ok(Flow::Next)
    }

    /// XLAT: AL indexes a table at (E)BX. The decoder gives it as an operand with AL for its index.
    pub(super) fn translate(&mut self, i: &Instruction) -> Exec<Flow> {
        let value = self.read(i, 0, Width::B1)?;
        self.set_accumulator(Width::B1, value);
        Ok(Flow::Next)
    }

    /// CBW, CWDE, CWD, CDQ: `from` is extended into the next wider place.
    pub(super) fn extend_accumulator(&mut self, from: Width, to: Width) -> Exec<Flow> {
        let value = from.extend(self.accumulator(from));
        self.set_accumulator(to, value);
        Ok(Flow::Next)
    }

    pub(super) fn extend_to_pair(&mut self, width: Width) -> Exec<Flow> {
        let negative = self.accumulator(width) & width.sign() != 0;
        let high = if negative { u32::MAX } else { 0 };
        self.cpu.gpr[EDX] = merge(self.cpu.gpr[EDX], high, width.mask());
        Ok(Flow::Next)
    }

    /// LAHF.
    pub(super) fn flags_to_ah(&mut self) -> Exec<Flow> {
        self.set_register(Register::AH, self.cpu.eflags & 0xd5 | FIXED);
        Ok(Flow::Next)
    }

    /// SAHF.
    pub(super) fn ah_to_flags(&mut self) -> Exec<Flow> {
        let ah = self.register(Register::AH);
        self.cpu.eflags = self.cpu.eflags & !0xd5 | ah & 0xd5;
        Ok(Flow::Next)
    }

    /// SALC: AL is all CF. Undocumented, and on every CPU.
    pub(super) fn set_al_from_carry(&mut self) -> Exec<Flow> {
        let value = if self.cpu.eflags & CF != 0 { 0xff } else { 0 };
        self.set_accumulator(Width::B1, value);
        Ok(Flow::Next)
    }

    /// PUSH of a register, memory, immediate or segment register.
    pub(super) fn push_operand(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = if i.stack_pointer_increment() == -2 { Width::B2 } else { Width::B4 };
        let value = match i.op0_kind() {
            // Zero-extended, as AMD does it; Intel leaves the upper half of the slot alone.
            OpKind::Register if i.op0_register().is_segment_register() => {
                self.cpu.segment(segment_of(i.op0_register())).selector.into()
            }
            // Immediates are sign-extended to the operand size, which the decoder has done.
            OpKind::Register | OpKind::Memory => self.read(i, 0, width)?,
            _ => i.try_immediate(0).unwrap_or(0) as u32 & width.mask(),
        };
        self.push(width, value)?;
        Ok(Flow::Next)
    }

    /// POP to a register, memory or segment register.
    pub(super) fn pop_operand(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = if i.stack_pointer_increment() == 2 { Width::B2 } else { Width::B4 };
        if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() {
            return self.pop_segment(segment_of(i.op0_register()), width);
        }
        let value = self.top(width)?;
        let before = self.cpu.gpr[ESP];
        // A destination that is based on ESP sees it moved already; POP ESP overwrites it.
        self.release(width.bytes());
        let written = self.write(i, 0, width, value);
        if written.is_err() {
            self.cpu.gpr[ESP] = before;
        }
        written.map(|()| Flow::Next)
    }

    /// POP SS moves SP or ESP as the *old* SS has it.
    pub(super) fn pop_segment(&mut self, seg: Seg, width: Width) -> Exec<Flow> {
        let selector = self.top(width)? as u16;
        let pointer = self.stack().above(width.bytes());
        let flow = self.load_segment_register(seg, selector)?;
        self.cpu.gpr[ESP] = pointer;
        Ok(flow)
    }

    /// PUSHA and PUSHAD.
    pub(super) fn push_all(&mut self, width: Width) -> Exec<Flow> {
        let stack = self.stack();
        let values = self.cpu.gpr;
        self.cpu.gpr[ESP] = self.push_frame(&stack, &values, width)?;
        Ok(Flow::Next)
    }

    /// POPA and POPAD; ESP's slot is skipped.
    pub(super) fn pop_all(&mut self, width: Width) -> Exec<Flow> {
        let stack = self.stack();
        let mut values = [0; 8];
        for (value, n) in values.iter_mut().zip(0..) {
            *value = self.peek(&stack, n * width.bytes(), width)?;
        }
        for (register, value) in [EDI, ESI, EBP, ESP, EBX, EDX, ECX, EAX].into_iter().zip(values) {
            if register != ESP {
                self.cpu.gpr[register] = merge(self.cpu.gpr[register], value, width.mask());
            }
        }
        self.release(8 * width.bytes());
        Ok(Flow::Next)
    }

    /// ENTER: pushes (E)BP, copies the enclosing frames' pointers, makes room. The copies are all read before the
    /// first push, so that it can be run again; each push is probed where it would be made, so that faults come in
    /// order.
    pub(super) fn enter(&mut self, i: &Instruction, width: Width) -> Exec<Flow> {
        let (room, level) = (u32::from(i.immediate16()), u32::from(i.immediate8_2nd()) & ENTER_LEVELS_MAX);
        let stack = self.stack();
        let (old, bytes) = (self.cpu.gpr[EBP], width.bytes());
        let pushes = level + 1;
        let pointer = stack.below(bytes);
        let mut frame = [0; ENTER_LEVELS_MAX as usize + 1];
        for n in 0..pushes {
            let (done, from) = (&frame[..n as usize], old.wrapping_sub(n * bytes));
            frame[n as usize] = match n {
                0 => old,
                _ if n == level => pointer,
                _ => self.enclosing_frame(&stack, done, from, width)?,
            };
            self.probe_stack(stack.below((n + 1) * bytes), 1, width, AccessKind::Write)?;
        }
        // The last word of the room must be writable too.
        let last = stack.below(pushes * bytes + room);
        self.probe_stack(last, 1, width, AccessKind::Write)?;
        self.push_frame(&stack, &frame[..pushes as usize], width)?;
        self.cpu.gpr[EBP] = merge(old, pointer, width.mask());
        self.cpu.gpr[ESP] = last;
        Ok(Flow::Next)
    }

    /// Reads a frame pointer at SS:`from`, bytes that ENTER itself is pushing (`pushed`, the first one first)
    /// included.
    fn enclosing_frame(&mut self, stack: &Stack, pushed: &[u32], from: u32, width: Width) -> Exec<u32> {
        let (mask, bytes) = (stack.mask(), width.bytes());
        let mut value = self.load(Seg::Ss, from & mask, width)?.to_le_bytes();
        for (byte, n) in value.iter_mut().zip(0..bytes) {
            // How far below the old top of the stack this byte lies, counting from 1.
            let depth = stack.pointer.wrapping_sub(from.wrapping_add(n)) & mask;
            if let Some(word) = pushed.get((depth.wrapping_sub(1) / bytes) as usize) {
                *byte = word.to_le_bytes()[((bytes - depth % bytes) % bytes) as usize];
            }
        }
        Ok(u32::from_le_bytes(value))
    }

    /// LEAVE: ESP from EBP, then POP EBP.
    pub(super) fn leave(&mut self, width: Width) -> Exec<Flow> {
        let mask = self.stack_mask();
        let frame = self.cpu.gpr[EBP];
        let value = self.load(Seg::Ss, frame & mask, width)?;
        self.cpu.gpr[ESP] = merge(self.cpu.gpr[ESP], frame, mask);
        self.release(width.bytes());
        self.cpu.gpr[EBP] = merge(frame, value, width.mask());
        Ok(Flow::Next)
    }

    /// PUSHF and PUSHFD: RF and VM read as zero.
    pub(super) fn push_flags(&mut self, width: Width) -> Exec<Flow> {
        self.push(width, self.cpu.eflags & !(RF | VM))?;
        Ok(Flow::Next)
    }

    /// POPF and POPFD: what the privilege does not cover stays silently as it was.
    pub(super) fn pop_flags(&mut self, width: Width) -> Exec<Flow> {
        let value = self.top(width)?;
        let writable = self.writable_flags() & width.mask() & !(RF | VM | VIF | VIP);
        let flags = self.cpu.eflags & !(writable | RF) | value & writable;
        self.commit_flags(flags)?;
        self.release(width.bytes());
        Ok(Flow::Next)
    }

    /// The flags that POPF and IRET may write at this privilege, VM and RF included.
    pub(super) fn writable_flags(&self) -> u32 {
        const ALWAYS: u32 = ARITHMETIC | TF | DF | NT | AC | ID | RF;
        let interrupt = if self.cpu.cpl <= self.cpu.iopl() { IF } else { 0 };
        let rest = if self.cpu.cpl == 0 { IOPL | VIF | VIP | VM } else { 0 };
        ALWAYS | interrupt | rest
    }

    /// Sets EFLAGS, telling the bus where AC means something to paging.
    pub(super) fn commit_flags(&mut self, flags: u32) -> Exec {
        if (flags ^ self.cpu.eflags) & AC != 0 && self.cpu.cr4 & cr4::SMAP != 0 {
            let next = crate::cpu::CpuState { eflags: flags, ..self.cpu.clone() };
            self.bus.set_paging(&next, false)?;
        }
        self.cpu.eflags = flags;
        Ok(())
    }

    /// BOUND: the index against a pair in memory.
    pub(super) fn bound(&mut self, i: &Instruction) -> Exec<Flow> {
        let width = width_of(i, 0);
        let signed = |value| width.extend(value) as i32;
        let index = signed(self.register(i.op0_register()));
        if !in_memory(i, 1) {
            return Err(Leave::Fault(Exception::UD));
        }
        let (seg, offset) = self.effective(i);
        let lower = self.load(seg, offset, width)?;
        let upper = self.load(seg, offset.wrapping_add(width.bytes()), width)?;
        ensure((signed(lower)..=signed(upper)).contains(&index), Exception::BR)?;
        Ok(Flow::Next)
    }
}
