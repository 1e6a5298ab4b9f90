//! The x87 instructions that compute, load or store: which bytes they are, and where their operand is.
//!
//! See: Intel SDM vol. 2, appendix B.17; tables A-7 to A-22 (escape opcodes).

use iced_x86::{Code, Instruction, OpKind, Register};

use crate::host_fpu::X87;

/// Where the operand is that is not ST(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// None, or another stack register.
    Registers,
    /// Read from memory.
    Load,
    /// Written to memory.
    Store,
}

/// One instruction: its bytes, its routine on the host, its operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) escape: u8,
    pub(super) modrm: u8,
    pub(super) routine: X87,
    pub(super) place: Place,
}

/// A form without its operand: escape byte, and ModRM (C0 to FF, the register in its low bits added later) or /digit.
#[derive(Clone, Copy)]
enum Row {
    /// ST(i) in the low bits of ModRM.
    Stack(u8, u8),
    /// No operand but the top of the stack.
    Fixed(u8, u8),
    Load(u8, u8),
    Store(u8, u8),
}

/// The form of `i`, where it is such an instruction.
pub(super) fn form_of(i: &Instruction) -> Option<Form> {
    let (escape, modrm, place) = match memory_row(i.code()).or_else(|| register_row(i.code()))? {
        Row::Stack(escape, modrm) => (escape, modrm | stack_register(i), Place::Registers),
        Row::Fixed(escape, modrm) => (escape, modrm, Place::Registers),
        Row::Load(escape, digit) => (escape, memory_modrm(i) | digit << 3, Place::Load),
        Row::Store(escape, digit) => (escape, memory_modrm(i) | digit << 3, Place::Store),
    };
    let routine = match place {
        Place::Registers => X87::registers(escape, modrm),
        Place::Load | Place::Store => X87::memory(escape, modrm >> 3 & 7),
    };
    Some(Form { escape, modrm, routine, place })
}

/// The number of the operand that is ST(i): the last one, or the first where the last is ST(0).
fn stack_register(i: &Instruction) -> u8 {
    let number = |op| match i.op_kind(op) {
        OpKind::Register => (i.op_register(op) as usize).wrapping_sub(Register::ST0 as usize) as u8 & 7,
        _ => 0,
    };
    (0..i.op_count()).map(number).fold(0, |all, n| all | n)
}

/// The mod and r/m fields of a memory operand, as far as the decoder's operand tells: of two encodings of one address
/// the shorter.
fn memory_modrm(i: &Instruction) -> u8 {
    use Register as R;
    let (base, index) = (i.memory_base(), i.memory_index());
    let rm = match (base, index) {
        (R::BX, R::SI) => 0,
        (R::BX, R::DI) => 1,
        (R::BP, R::SI) => 2,
        (R::BP, R::DI) => 3,
        (R::SI, R::None) => 4,
        (R::DI, R::None) => 5,
        (R::BP, R::None) => 6,
        (R::BX, R::None) => 7,
        (R::None, R::None) if i.memory_displ_size() == 2 => return 6,
        (R::None, R::None) => return 5,
        (R::None, _) => return 4,
        (R::ESP, _) => 4,
        (base, R::None) => (base.number() & 7) as u8,
        _ => 4,
    };
    let displacement = match i.memory_displ_size() {
        0 => 0,
        1 => 0x40,
        _ => 0x80,
    };
    displacement | rm
}

fn memory_row(code: Code) -> Option<Row> {
    use Code as C;
    use Row::{Load, Store};
    Some(match code {
        C::Fadd_m32fp => Load(0xd8, 0),
        C::Fmul_m32fp => Load(0xd8, 1),
        C::Fcom_m32fp => Load(0xd8, 2),
        C::Fcomp_m32fp => Load(0xd8, 3),
        C::Fsub_m32fp => Load(0xd8, 4),
        C::Fsubr_m32fp => Load(0xd8, 5),
        C::Fdiv_m32fp => Load(0xd8, 6),
        C::Fdivr_m32fp => Load(0xd8, 7),
        C::Fld_m32fp => Load(0xd9, 0),
        C::Fst_m32fp => Store(0xd9, 2),
        C::Fstp_m32fp => Store(0xd9, 3),
        C::Fiadd_m32int => Load(0xda, 0),
        C::Fimul_m32int => Load(0xda, 1),
        C::Ficom_m32int => Load(0xda, 2),
        C::Ficomp_m32int => Load(0xda, 3),
        C::Fisub_m32int => Load(0xda, 4),
        C::Fisubr_m32int => Load(0xda, 5),
        C::Fidiv_m32int => Load(0xda, 6),
        C::Fidivr_m32int => Load(0xda, 7),
        C::Fild_m32int => Load(0xdb, 0),
        C::Fist_m32int => Store(0xdb, 2),
        C::Fistp_m32int => Store(0xdb, 3),
        C::Fld_m80fp => Load(0xdb, 5),
        C::Fstp_m80fp => Store(0xdb, 7),
        C::Fadd_m64fp => Load(0xdc, 0),
        C::Fmul_m64fp => Load(0xdc, 1),
        C::Fcom_m64fp => Load(0xdc, 2),
        C::Fcomp_m64fp => Load(0xdc, 3),
        C::Fsub_m64fp => Load(0xdc, 4),
        C::Fsubr_m64fp => Load(0xdc, 5),
        C::Fdiv_m64fp => Load(0xdc, 6),
        C::Fdivr_m64fp => Load(0xdc, 7),
        C::Fld_m64fp => Load(0xdd, 0),
        C::Fst_m64fp => Store(0xdd, 2),
        C::Fstp_m64fp => Store(0xdd, 3),
        C::Fiadd_m16int => Load(0xde, 0),
        C::Fimul_m16int => Load(0xde, 1),
        C::Ficom_m16int => Load(0xde, 2),
        C::Ficomp_m16int => Load(0xde, 3),
        C::Fisub_m16int => Load(0xde, 4),
        C::Fisubr_m16int => Load(0xde, 5),
        C::Fidiv_m16int => Load(0xde, 6),
        C::Fidivr_m16int => Load(0xde, 7),
        C::Fild_m16int => Load(0xdf, 0),
        C::Fist_m16int => Store(0xdf, 2),
        C::Fistp_m16int => Store(0xdf, 3),
        C::Fbld_m80bcd => Load(0xdf, 4),
        C::Fild_m64int => Load(0xdf, 5),
        C::Fbstp_m80bcd => Store(0xdf, 6),
        C::Fistp_m64int => Store(0xdf, 7),
        _ => return None,
    })
}

fn register_row(code: Code) -> Option<Row> {
    use Code as C;
    use Row::{Fixed, Stack};
    Some(match code {
        C::Fadd_st0_sti => Stack(0xd8, 0xc0),
        C::Fmul_st0_sti => Stack(0xd8, 0xc8),
        C::Fcom_st0_sti => Stack(0xd8, 0xd0),
        C::Fcomp_st0_sti => Stack(0xd8, 0xd8),
        C::Fsub_st0_sti => Stack(0xd8, 0xe0),
        C::Fsubr_st0_sti => Stack(0xd8, 0xe8),
        C::Fdiv_st0_sti => Stack(0xd8, 0xf0),
        C::Fdivr_st0_sti => Stack(0xd8, 0xf8),
        C::Fld_sti => Stack(0xd9, 0xc0),
        C::Fxch_st0_sti => Stack(0xd9, 0xc8),
        C::Fnop => Fixed(0xd9, 0xd0),
        C::Fstpnce_sti => Stack(0xd9, 0xd8),
        C::Fchs => Fixed(0xd9, 0xe0),
        C::Fabs => Fixed(0xd9, 0xe1),
        C::Ftst => Fixed(0xd9, 0xe4),
        C::Fxam => Fixed(0xd9, 0xe5),
        C::Fld1 => Fixed(0xd9, 0xe8),
        C::Fldl2t => Fixed(0xd9, 0xe9),
        C::Fldl2e => Fixed(0xd9, 0xea),
        C::Fldpi => Fixed(0xd9, 0xeb),
        C::Fldlg2 => Fixed(0xd9, 0xec),
        C::Fldln2 => Fixed(0xd9, 0xed),
        C::Fldz => Fixed(0xd9, 0xee),
        C::F2xm1 => Fixed(0xd9, 0xf0),
        C::Fyl2x => Fixed(0xd9, 0xf1),
        C::Fptan => Fixed(0xd9, 0xf2),
        C::Fpatan => Fixed(0xd9, 0xf3),
        C::Fxtract => Fixed(0xd9, 0xf4),
        C::Fprem1 => Fixed(0xd9, 0xf5),
        C::Fdecstp => Fixed(0xd9, 0xf6),
        C::Fincstp => Fixed(0xd9, 0xf7),
        C::Fprem => Fixed(0xd9, 0xf8),
        C::Fyl2xp1 => Fixed(0xd9, 0xf9),
        C::Fsqrt => Fixed(0xd9, 0xfa),
        C::Fsincos => Fixed(0xd9, 0xfb),
        C::Frndint => Fixed(0xd9, 0xfc),
        C::Fscale => Fixed(0xd9, 0xfd),
        C::Fsin => Fixed(0xd9, 0xfe),
        C::Fcos => Fixed(0xd9, 0xff),
        C::Fcmovb_st0_sti => Stack(0xda, 0xc0),
        C::Fcmove_st0_sti => Stack(0xda, 0xc8),
        C::Fcmovbe_st0_sti => Stack(0xda, 0xd0),
        C::Fcmovu_st0_sti => Stack(0xda, 0xd8),
        C::Fucompp => Fixed(0xda, 0xe9),
        C::Fcmovnb_st0_sti => Stack(0xdb, 0xc0),
        C::Fcmovne_st0_sti => Stack(0xdb, 0xc8),
        C::Fcmovnbe_st0_sti => Stack(0xdb, 0xd0),
        C::Fcmovnu_st0_sti => Stack(0xdb, 0xd8),
        C::Fucomi_st0_sti => Stack(0xdb, 0xe8),
        C::Fcomi_st0_sti => Stack(0xdb, 0xf0),
        C::Fadd_sti_st0 => Stack(0xdc, 0xc0),
        C::Fmul_sti_st0 => Stack(0xdc, 0xc8),
        C::Fcom_st0_sti_DCD0 => Stack(0xdc, 0xd0),
        C::Fcomp_st0_sti_DCD8 => Stack(0xdc, 0xd8),
        C::Fsubr_sti_st0 => Stack(0xdc, 0xe0),
        C::Fsub_sti_st0 => Stack(0xdc, 0xe8),
        C::Fdivr_sti_st0 => Stack(0xdc, 0xf0),
        C::Fdiv_sti_st0 => Stack(0xdc, 0xf8),
        C::Ffree_sti => Stack(0xdd, 0xc0),
        C::Fxch_st0_sti_DDC8 => Stack(0xdd, 0xc8),
        C::Fst_sti => Stack(0xdd, 0xd0),
        C::Fstp_sti => Stack(0xdd, 0xd8),
        C::Fucom_st0_sti => Stack(0xdd, 0xe0),
        C::Fucomp_st0_sti => Stack(0xdd, 0xe8),
        C::Faddp_sti_st0 => Stack(0xde, 0xc0),
        C::Fmulp_sti_st0 => Stack(0xde, 0xc8),
        C::Fcomp_st0_sti_DED0 => Stack(0xde, 0xd0),
        C::Fcompp => Fixed(0xde, 0xd9),
        C::Fsubrp_sti_st0 => Stack(0xde, 0xe0),
        C::Fsubp_sti_st0 => Stack(0xde, 0xe8),
        C::Fdivrp_sti_st0 => Stack(0xde, 0xf0),
        C::Fdivp_sti_st0 => Stack(0xde, 0xf8),
        C::Ffreep_sti => Stack(0xdf, 0xc0),
        C::Fxch_st0_sti_DFC8 => Stack(0xdf, 0xc8),
        C::Fstp_sti_DFD0 => Stack(0xdf, 0xd0),
        C::Fstp_sti_DFD8 => Stack(0xdf, 0xd8),
        C::Fucomip_st0_sti => Stack(0xdf, 0xe8),
        C::Fcomip_st0_sti => Stack(0xdf, 0xf0),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interp::decode;

    /// Decodes `bytes` and looks the form up.
    fn form(bytes: &[u8], wide: bool) -> Option<Form> {
        form_of(&decode(bytes, wide, 0).ok()?)
    }

    #[test]
    fn every_escape_decodes_to_its_own_bytes() {
        let mut found = 0;
        for (escape, modrm) in (0xd8..=0xdf_u8).flat_map(|escape| (0..=0xff_u8).map(move |m| (escape, m))) {
            for wide in [false, true] {
                // A SIB byte with a base and an index, where one is asked for; displacements of no matter.
                let Some(form) = form(&[escape, modrm, 0x08, 1, 2, 3, 4], wide) else { continue };
                found += 1;
                assert_eq!((form.escape, form.modrm), (escape, modrm), "{wide}");
                assert_eq!(form.place == Place::Registers, modrm >= 0xc0, "{escape:x} {modrm:x}");
            }
        }
        assert!(found > 3000, "{found}");
    }
}
