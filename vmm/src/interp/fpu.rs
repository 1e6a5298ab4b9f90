//! The way to the FPU: which unit an instruction belongs to, whether the guest may use it now, FXSAVE and FXRSTOR.
//!
//! The order of what can be wrong, before an operand is looked at:
//!
//! | | #UD | #NM | #MF |
//! |---|---|---|---|
//! | FWAIT | | CR0.MP and TS | pending |
//! | x87 | | CR0.EM or TS | pending, if it waits |
//! | FXSAVE, FXRSTOR | | CR0.EM or TS | |
//! | MMX | CR0.EM | CR0.TS | pending |
//! | SSE | CR0.EM, or CR4.OSFXSR clear | CR0.TS | pending, where it touches MMX registers |
//!
//! See: Intel SDM vol. 3A, 2.5 (CR0.EM, MP, TS), 12.2 (MMX), 13.1 (SSE); vol. 2, tables 2-18 and on.

use iced_x86::{CpuidFeature, Instruction, Mnemonic};
use umbra_mmu::AccessKind;

use super::wide::Alignment;
use super::{Bus, Core, Exception, Exec, Flow, Leave, ensure};
use crate::cpu::fpu::{IMAGE_BYTES, IMAGE_BYTES_USED};
use crate::cpu::{Fpu, cr0};

impl<B: Bus + ?Sized> Core<'_, B> {
    /// An instruction that is no integer instruction. One of a feature that CPUID never offers is none at all: #UD.
    pub(super) fn execute_fpu(&mut self, i: &Instruction) -> Exec<Flow> {
        use CpuidFeature as F;
        let features = i.cpuid_features();
        let all = |of: &[F]| features.iter().all(|feature| of.contains(feature));
        if i.mnemonic() == Mnemonic::Wait {
            self.wait()
        } else if all(&[F::FPU, F::FPU287, F::FPU387, F::CMOV]) {
            ensure(self.cpu.cr0 & (cr0::EM | cr0::TS) == 0, Exception::NM)?;
            self.bus.want_fpu()?;
            self.x87_control(i)
        } else if all(&[F::FXSR]) {
            ensure(self.cpu.cr0 & (cr0::EM | cr0::TS) == 0, Exception::NM)?;
            self.bus.want_fpu()?;
            if i.mnemonic() == Mnemonic::Fxsave { self.fxsave(i) } else { self.fxrstor(i) }
        } else if all(&[F::MMX, F::SSE, F::SSE2]) {
            self.simd(i)
        } else if all(&[F::INTEL8086, F::INTEL186, F::INTEL286, F::INTEL386, F::INTEL486, F::CPUID]) {
            Err(Leave::Unknown("this instruction"))
        } else {
            Err(Exception::UD.into())
        }
    }

    /// FWAIT.
    fn wait(&mut self) -> Exec<Flow> {
        let away = cr0::MP | cr0::TS;
        ensure(self.cpu.cr0 & away != away, Exception::NM)?;
        self.bus.want_fpu()?;
        self.report_pending()?;
        Ok(Flow::Next)
    }

    /// FXSAVE, with the SSE registers whatever CR4.OSFXSR says. Segmentation wants all 512 bytes, paging those that are
    /// stored.
    fn fxsave(&mut self, i: &Instruction) -> Exec<Flow> {
        self.place(i, IMAGE_BYTES, Alignment::Area, AccessKind::Write)?;
        let image = self.cpu.fpu.image();
        self.store_bytes(i, &image[..IMAGE_BYTES_USED], Alignment::Area)?;
        Ok(Flow::Next)
    }

    /// FXRSTOR; #GP for reserved bits of MXCSR.
    fn fxrstor(&mut self, i: &Instruction) -> Exec<Flow> {
        self.place(i, IMAGE_BYTES, Alignment::Area, AccessKind::Read)?;
        let mut image = [0; IMAGE_BYTES];
        self.load_bytes(i, &mut image[..IMAGE_BYTES_USED], Alignment::Area)?;
        self.cpu.fpu = Fpu::from_image(&image).ok_or(Exception::gp(0))?;
        Ok(Flow::Next)
    }
}
