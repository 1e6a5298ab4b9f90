//! The table of instructions: from a mnemonic to its handler, the integer ones; what it does not know is `fpu`'s.
//!
//! Holds: the decoder has refused LOCK where it is not allowed (#UD), so no handler checks it.

use std::sync::atomic::{Ordering, fence};

use iced_x86::{Code, Instruction, Mnemonic};

use super::bits::BitChange;
use super::string::StringKind;
use super::{Bus, Core, Exception, Exec, Flow, Width, alu, decimal, vector, verify};
use crate::cpu::Seg;
use crate::cpu::eflags::{CF, DF, OF};

/// Does what stands behind every store before it, as other CPUs see them: guest stores are stores of the host, which may
/// otherwise come behind loads.
fn drained<T>(what: impl FnOnce() -> T) -> T {
    fence(Ordering::SeqCst);
    what()
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// Runs one instruction; `next` is the EIP behind it. One table, grouped as the handlers' files are; the user's
    /// half is here and the kernel's in `execute_system`.
    pub(super) fn execute(&mut self, i: &Instruction, next: u32) -> Exec<Flow> {
        use Mnemonic as M;
        match i.mnemonic() {
            // data
            M::Mov => self.mov_any(i),
            M::Movzx => self.move_zero_extended(i),
            M::Movsx => self.move_sign_extended(i),
            M::Movnti => self.mov(i),
            M::Lea => self.load_address(i),
            M::Push => self.push_operand(i),
            M::Pop => self.pop_operand(i),
            M::Pusha => self.push_all(Width::B2),
            M::Pushad => self.push_all(Width::B4),
            M::Popa => self.pop_all(Width::B2),
            M::Popad => self.pop_all(Width::B4),
            M::Pushf => self.push_flags(Width::B2),
            M::Pushfd => self.push_flags(Width::B4),
            M::Popf => self.pop_flags(Width::B2),
            M::Popfd => self.pop_flags(Width::B4),
            M::Enter => {
                self.enter(i, if i.code() == Code::Enterw_imm16_imm8 { Width::B2 } else { Width::B4 })
            }
            M::Leave => self.leave(if i.code() == Code::Leavew { Width::B2 } else { Width::B4 }),
            M::Lahf => self.flags_to_ah(),
            M::Sahf => self.ah_to_flags(),
            M::Salc => self.set_al_from_carry(),
            M::Cbw => self.extend_accumulator(Width::B1, Width::B2),
            M::Cwde => self.extend_accumulator(Width::B2, Width::B4),
            M::Cwd => self.extend_to_pair(Width::B2),
            M::Cdq => self.extend_to_pair(Width::B4),
            M::Xlatb => self.translate(i),
            M::Bound => self.bound(i),
            M::Cmova | M::Cmovae | M::Cmovb | M::Cmovbe | M::Cmove | M::Cmovg | M::Cmovge | M::Cmovl => {
                self.move_conditional(i)
            }
            M::Cmovle | M::Cmovne | M::Cmovno | M::Cmovnp | M::Cmovns | M::Cmovo | M::Cmovp | M::Cmovs => {
                self.move_conditional(i)
            }
            M::Seta | M::Setae | M::Setb | M::Setbe | M::Sete | M::Setg | M::Setge | M::Setl => {
                self.set_condition(i)
            }
            M::Setle | M::Setne | M::Setno | M::Setnp | M::Setns | M::Seto | M::Setp | M::Sets => {
                self.set_condition(i)
            }
            // arith
            M::Add => self.binary(i, alu::add),
            M::Adc => self.binary(i, alu::adc),
            M::Sub => self.binary(i, alu::sub),
            M::Sbb => self.binary(i, alu::sbb),
            M::And => self.binary(i, alu::and),
            M::Or => self.binary(i, alu::or),
            M::Xor => self.binary(i, alu::xor),
            M::Cmp => self.compare(i, alu::sub),
            M::Test => self.compare(i, alu::and),
            M::Inc => self.unary(i, alu::inc),
            M::Dec => self.unary(i, alu::dec),
            M::Neg => self.unary(i, alu::neg),
            M::Not => self.unary(i, alu::not),
            M::Shl | M::Sal => self.shift(i, alu::shl),
            M::Shr => self.shift(i, alu::shr),
            M::Sar => self.shift(i, alu::sar),
            M::Rol => self.shift(i, alu::rol),
            M::Ror => self.shift(i, alu::ror),
            M::Rcl => self.shift(i, alu::rcl),
            M::Rcr => self.shift(i, alu::rcr),
            M::Shld => self.double_shift(i, alu::shld),
            M::Shrd => self.double_shift(i, alu::shrd),
            M::Mul => self.multiply(i, false),
            M::Imul if i.op_count() == 1 => self.multiply(i, true),
            M::Imul => self.multiply_into(i),
            M::Div => self.divide(i),
            M::Idiv => self.divide_signed(i),
            M::Xchg => self.exchange(i),
            M::Xadd => self.exchange_add(i),
            M::Cmpxchg => self.compare_exchange(i),
            M::Cmpxchg8b => self.compare_exchange_8(i),
            M::Daa => self.adjust(decimal::daa),
            M::Das => self.adjust(decimal::das),
            M::Aaa => self.adjust(decimal::aaa),
            M::Aas => self.adjust(decimal::aas),
            M::Aam => self.adjust_multiply(i),
            M::Aad => self.adjust_divide(i),
            M::Clc => self.set_flags(CF, 0),
            M::Stc => self.set_flags(CF, CF),
            M::Cmc => self.set_flags(CF, !self.cpu.eflags & CF),
            M::Cld => self.set_flags(DF, 0),
            M::Std => self.set_flags(DF, DF),
            // bits
            M::Bt => self.bit_test(i, BitChange::Keep),
            M::Bts => self.bit_test(i, BitChange::Set),
            M::Btr => self.bit_test(i, BitChange::Reset),
            M::Btc => self.bit_test(i, BitChange::Complement),
            M::Bsf => self.bit_scan(i, u32::trailing_zeros),
            M::Bsr => self.bit_scan(i, |value| 31 - value.leading_zeros()),
            M::Bswap => self.byte_swap(i),
            // control
            M::Jmp => self.jump(i, next),
            M::Call => self.call(i, next),
            M::Ret => self.ret(i),
            M::Retf => self.far_return(i),
            M::Ja | M::Jae | M::Jb | M::Jbe | M::Je | M::Jg | M::Jge | M::Jl => {
                self.jump_conditional(i, next)
            }
            M::Jle | M::Jne | M::Jno | M::Jnp | M::Jns | M::Jo | M::Jp | M::Js => {
                self.jump_conditional(i, next)
            }
            M::Loop | M::Loope | M::Loopne => self.count_and_jump(i, next),
            M::Jcxz => self.jump_counter_zero(i, next, 0xffff),
            M::Jecxz => self.jump_counter_zero(i, next, u32::MAX),
            // string
            _ => match string_of(i.code()) {
                Some((kind, width)) => self.string(i, kind, width),
                None => self.execute_system(i, next),
            },
        }
    }

    fn execute_system(&mut self, i: &Instruction, next: u32) -> Exec<Flow> {
        use Mnemonic as M;
        match i.mnemonic() {
            // deliver and far
            M::Int => self.software_interrupt(i.immediate8(), next),
            M::Int3 => self.software_interrupt(vector::BP, next),
            M::Into if self.cpu.eflags & OF != 0 => self.software_interrupt(vector::OF, next),
            M::Into => Ok(Flow::Next),
            M::Int1 => self.debug_interrupt(next),
            M::Iret => drained(|| self.interrupt_return(Width::B2)),
            M::Iretd => drained(|| self.interrupt_return(Width::B4)),
            M::Ud0 | M::Ud1 | M::Ud2 | M::Rsm => Err(Exception::UD.into()),
            // load and verify
            M::Lds => self.load_far_pointer(i, Seg::Ds),
            M::Les => self.load_far_pointer(i, Seg::Es),
            M::Lfs => self.load_far_pointer(i, Seg::Fs),
            M::Lgs => self.load_far_pointer(i, Seg::Gs),
            M::Lss => self.load_far_pointer(i, Seg::Ss),
            M::Lldt => self.load_local_table(i),
            M::Ltr => self.load_task_register(i),
            M::Lar => self.inspect(i, verify::access_rights),
            M::Lsl => self.inspect(i, verify::segment_limit),
            M::Verr => self.verify(i, false),
            M::Verw => self.verify(i, true),
            M::Arpl => self.adjust_rpl(i),
            // system
            M::Lgdt => self.load_global_table(i),
            M::Lidt => self.load_interrupt_table(i),
            M::Sgdt => self.store_table(i, self.cpu.gdtr),
            M::Sidt => self.store_table(i, self.cpu.idtr),
            M::Sldt => self.store_selector(i, self.cpu.ldtr.selector),
            M::Str => self.store_selector(i, self.cpu.tr.selector),
            M::Hlt => self.halt(),
            M::Cli => self.close_interrupts(),
            M::Sti => self.open_interrupts(),
            M::Invd | M::Wbinvd => drained(|| self.flush_caches()),
            M::Invlpg => self.invalidate_page(i),
            M::Clflush => self.flush_line(i),
            M::Clac => self.set_alignment_flag(false),
            M::Stac => self.set_alignment_flag(true),
            M::Cpuid => drained(|| self.cpuid()),
            M::Rdtsc => self.read_time_stamp(),
            // No counter is offered, so every index is a wrong one.
            M::Rdpmc => Err(Exception::gp(0).into()),
            // control_regs, msr and io
            M::Clts => self.clear_task_switched(),
            M::Lmsw => self.load_machine_status(i),
            M::Smsw => self.store_machine_status(i),
            M::Rdmsr => self.read_msr(),
            M::Wrmsr => self.write_msr(),
            M::In => self.input(i),
            M::Out => self.output(i),
            // Hints, and what is a hint on a CPU without the feature.
            M::Pause => {
                self.bus.pause();
                Ok(Flow::Next)
            }
            M::Nop | M::Reservednop | M::Endbr32 | M::Endbr64 | M::Rdsspd | M::Cldemote => Ok(Flow::Next),
            M::Mfence => drained(|| Ok(Flow::Next)),
            // Loads are in order among themselves, and so are stores.
            M::Lfence | M::Sfence => Ok(Flow::Next),
            M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 => Ok(Flow::Next),
            M::Prefetch | M::Prefetchw | M::Prefetchwt1 => Ok(Flow::Next),
            _ => self.execute_fpu(i),
        }
    }

    fn set_flags(&mut self, mask: u32, value: u32) -> Exec<Flow> {
        self.cpu.eflags = self.cpu.eflags & !mask | value;
        Ok(Flow::Next)
    }
}

fn string_of(code: Code) -> Option<(StringKind, Width)> {
    use StringKind::{Cmps, Ins, Lods, Movs, Outs, Scas, Stos};
    use Width::{B1, B2, B4};
    Some(match code {
        Code::Movsb_m8_m8 => (Movs, B1),
        Code::Movsw_m16_m16 => (Movs, B2),
        Code::Movsd_m32_m32 => (Movs, B4),
        Code::Cmpsb_m8_m8 => (Cmps, B1),
        Code::Cmpsw_m16_m16 => (Cmps, B2),
        Code::Cmpsd_m32_m32 => (Cmps, B4),
        Code::Stosb_m8_AL => (Stos, B1),
        Code::Stosw_m16_AX => (Stos, B2),
        Code::Stosd_m32_EAX => (Stos, B4),
        Code::Lodsb_AL_m8 => (Lods, B1),
        Code::Lodsw_AX_m16 => (Lods, B2),
        Code::Lodsd_EAX_m32 => (Lods, B4),
        Code::Scasb_AL_m8 => (Scas, B1),
        Code::Scasw_AX_m16 => (Scas, B2),
        Code::Scasd_EAX_m32 => (Scas, B4),
        Code::Insb_m8_DX => (Ins, B1),
        Code::Insw_m16_DX => (Ins, B2),
        Code::Insd_m32_DX => (Ins, B4),
        Code::Outsb_DX_m8 => (Outs, B1),
        Code::Outsw_DX_m16 => (Outs, B2),
        Code::Outsd_DX_m32 => (Outs, B4),
        _ => return None,
    })
}
