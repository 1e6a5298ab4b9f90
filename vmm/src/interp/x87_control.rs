//! x87 control: the control and status words, FNINIT, FNCLEX, and the environment and state in memory.
//!
//! Holds: instructions that do not wait (FN...) work with an exception pending; the others report it first.
//!
//! The environment has four formats, by operand size and mode; the words in order:
//!
//! | | 16-bit | 32-bit (each word in a dword of its own) |
//! |---|---|---|
//! | protected | FCW FSW FTW FIP FCS FDP FDS | FCW FSW FTW FIP, FCS with FOP above, FDP, FDS |
//! | real | FCW FSW FTW, linear FIP 15:0, 19:16 over FOP, linear FDP 15:0, 19:16 | the same with 31:16 over FOP |
//!
//! In 32-bit formats the unused upper halves are stored as ones.
//!
//! See: Intel SDM vol. 1, 8.1.10 (figures 8-9 to 8-12).

use iced_x86::{Code, Instruction};

use super::wide::Alignment;
use super::{Bus, Core, Exec, Flow, Width};
use crate::cpu::Fpu;
use crate::cpu::fpu::Pointers;

/// Bytes of the eight registers behind an environment.
const REGISTERS_BYTES: usize = 80;
/// Bytes of a register there.
const REGISTER_BYTES: usize = 10;

/// The format of an environment in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Format {
    /// 32-bit operand size.
    wide: bool,
    protected: bool,
}

impl Format {
    /// Bytes of a field.
    fn step(self) -> usize {
        if self.wide { 4 } else { 2 }
    }

    /// Bytes of the environment.
    fn bytes(self) -> usize {
        7 * self.step()
    }

    fn fields(self, fpu: &Fpu) -> [u32; 7] {
        let p = fpu.pointers();
        let words = [fpu.control(), fpu.status(), fpu.tag_word()].map(|word| u32::from(word) | 0xffff_0000);
        let pointers = if self.protected {
            let opcode = if self.wide { u32::from(p.opcode) << 16 } else { 0 };
            [p.ip, u32::from(p.cs) | opcode, p.dp, u32::from(p.ds) | 0xffff_0000]
        } else {
            let (ip, dp) = (linear(p.cs, p.ip), linear(p.ds, p.dp));
            // 16-bit: bits 19:16 of an address come into bits 15:12, 32-bit: 31:16 into 27:12.
            let high = |address: u32| address >> 16 << 12;
            [ip | 0xffff_0000, high(ip) | u32::from(p.opcode), dp | 0xffff_0000, high(dp)]
        };
        [words[0], words[1], words[2], pointers[0], pointers[1], pointers[2], pointers[3]]
    }

    /// Loads the environment; the physical registers keep their contents.
    fn load(self, fpu: &mut Fpu, fields: [u32; 7]) {
        let [control, status, tags, a, b, c, d] = fields;
        fpu.set_top(status as u16 >> 11);
        fpu.set_words(control as u16, status as u16);
        fpu.set_tag_word(tags as u16);
        let opcode = (if self.protected { b >> 16 } else { b } & 0x7ff) as u16;
        let high = |field: u32| field >> 12 << 16 & if self.wide { u32::MAX } else { 0x000f_ffff };
        fpu.set_pointers(if self.protected {
            Pointers { opcode, ip: a, cs: b as u16, dp: c, ds: d as u16 }
        } else {
            Pointers { opcode, ip: a & 0xffff | high(b), cs: 0, dp: c & 0xffff | high(d), ds: 0 }
        });
    }
}

/// What real mode's formats hold of a pointer.
fn linear(selector: u16, offset: u32) -> u32 {
    (u32::from(selector) << 4).wrapping_add(offset)
}

impl<B: Bus + ?Sized> Core<'_, B> {
    /// The control instructions, and whatever else does not touch a value.
    pub(super) fn x87_control(&mut self, i: &Instruction) -> Exec<Flow> {
        match i.code() {
            Code::Fninit => self.cpu.fpu.init(),
            Code::Fnclex => self.cpu.fpu.clear_exceptions(),
            // Interrupts of the 8087's, the 80287's protected mode: nothing has come of them.
            Code::Fneni | Code::Fndisi | Code::Fnsetpm => {}
            Code::Fnstsw_AX => {
                let status = self.cpu.fpu.status();
                self.set_accumulator(Width::B2, status.into());
            }
            Code::Fnstsw_m2byte => return self.store_word(i, self.cpu.fpu.status()),
            Code::Fnstcw_m2byte => return self.store_word(i, self.cpu.fpu.control()),
            Code::Fnstenv_m14byte | Code::Fnstenv_m28byte => return self.store_environment(i),
            Code::Fnsave_m94byte | Code::Fnsave_m108byte => return self.save_state(i),
            Code::Fldcw_m2byte => {
                self.report_pending()?;
                let (seg, offset) = self.effective(i);
                let control = self.load(seg, offset, Width::B2)? as u16;
                self.cpu.fpu.set_control(control);
            }
            Code::Fldenv_m14byte | Code::Fldenv_m28byte => return self.load_environment(i),
            Code::Frstor_m94byte | Code::Frstor_m108byte => return self.restore_state(i),
            _ => return self.x87(i),
        }
        Ok(Flow::Next)
    }

    fn store_word(&mut self, i: &Instruction, word: u16) -> Exec<Flow> {
        let (seg, offset) = self.effective(i);
        self.store(seg, offset, Width::B2, word.into())?;
        Ok(Flow::Next)
    }

    fn format(&self, i: &Instruction) -> Format {
        let wide = matches!(
            i.code(),
            Code::Fnstenv_m28byte | Code::Fldenv_m28byte | Code::Fnsave_m108byte | Code::Frstor_m108byte
        );
        Format { wide, protected: self.cpu.protected() }
    }

    /// The environment as it goes to memory, with room for the registers behind it.
    fn environment(&self, format: Format) -> [u8; 28 + REGISTERS_BYTES] {
        let mut bytes = [0; 28 + REGISTERS_BYTES];
        let step = format.step();
        for (field, n) in format.fields(&self.cpu.fpu).into_iter().zip(0..) {
            bytes[n * step..][..step].copy_from_slice(&field.to_le_bytes()[..step]);
        }
        bytes
    }

    /// FNSTENV: stores, then masks all exceptions.
    fn store_environment(&mut self, i: &Instruction) -> Exec<Flow> {
        let format = self.format(i);
        let bytes = self.environment(format);
        self.store_bytes(i, &bytes[..format.bytes()], Alignment::Checked(format.step() as u32))?;
        let masked = self.cpu.fpu.control() | 0x3f;
        self.cpu.fpu.set_control(masked);
        Ok(Flow::Next)
    }

    /// FNSAVE: stores, then FNINIT.
    fn save_state(&mut self, i: &Instruction) -> Exec<Flow> {
        let format = self.format(i);
        let mut bytes = self.environment(format);
        for n in 0..8 {
            let value = self.cpu.fpu.st(n).to_le_bytes();
            bytes[format.bytes() + n * REGISTER_BYTES..][..REGISTER_BYTES].copy_from_slice(&value[..10]);
        }
        let length = format.bytes() + REGISTERS_BYTES;
        self.store_bytes(i, &bytes[..length], Alignment::Checked(format.step() as u32))?;
        self.cpu.fpu.init();
        Ok(Flow::Next)
    }

    fn load_fields(format: Format, bytes: &[u8]) -> [u32; 7] {
        let step = format.step();
        std::array::from_fn(|n| {
            let mut field = [0; 4];
            field[..step].copy_from_slice(&bytes[n * step..][..step]);
            u32::from_le_bytes(field)
        })
    }

    /// FLDENV.
    fn load_environment(&mut self, i: &Instruction) -> Exec<Flow> {
        self.report_pending()?;
        let format = self.format(i);
        let mut bytes = [0; 28];
        let bytes = &mut bytes[..format.bytes()];
        self.load_bytes(i, bytes, Alignment::Checked(format.step() as u32))?;
        format.load(&mut self.cpu.fpu, Self::load_fields(format, bytes));
        Ok(Flow::Next)
    }

    /// FRSTOR.
    fn restore_state(&mut self, i: &Instruction) -> Exec<Flow> {
        self.report_pending()?;
        let format = self.format(i);
        let mut bytes = [0; 28 + REGISTERS_BYTES];
        let bytes = &mut bytes[..format.bytes() + REGISTERS_BYTES];
        self.load_bytes(i, bytes, Alignment::Checked(format.step() as u32))?;
        format.load(&mut self.cpu.fpu, Self::load_fields(format, bytes));
        for n in 0..8 {
            let register = &bytes[format.bytes() + n * REGISTER_BYTES..][..REGISTER_BYTES];
            let value = register.iter().rev().fold(0, |value, byte| value << 8 | u128::from(*byte));
            self.cpu.fpu.set_st(n, value);
        }
        Ok(Flow::Next)
    }
}
