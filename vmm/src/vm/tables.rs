//! The guest's descriptor tables, kept translated for the hardware.
//!
//! Story: native guest code loads segments from the firmware's translated copy of the guest's GDT and LDT. The copy
//! is made anew when the guest loads another table, changes its paging, or writes to one of the pages: those are
//! watched, so that a store to them comes back as an emulated one.
//!
//! See: docs/ARCHITECTURE.md, "Segments".

use umbra_mmu::{Access, Beyond, Gfn, Gva, Mmu, Touch, Vcpu};

use crate::cpu::{CpuState, Segment, TableRegister};
use crate::kvm::{KvmError, KvmVcpu};

/// What the translated tables were made from.
#[derive(Debug, Default)]
pub struct DescriptorTables {
    gdtr: TableRegister,
    ldtr: Segment,
    watched: Vec<Gfn>,
    current: bool,
}

impl DescriptorTables {
    /// Something may have changed: look again before the next entry.
    pub fn invalidate(&mut self) {
        self.current = false;
    }

    /// Brings the hardware's copy up to date.
    ///
    /// # Errors
    ///
    /// Only for a bug in the firmware's layout.
    pub fn refresh(
        &mut self,
        mmu: &Mmu,
        vcpu: &Vcpu,
        cpu: &CpuState,
        kvm: &mut KvmVcpu,
    ) -> Result<(), KvmError> {
        if self.current && self.gdtr == cpu.gdtr && self.ldtr == cpu.ldtr {
            return Ok(());
        }
        let mut frames = Vec::new();
        let gdt = read_table(mmu, vcpu, Gva(cpu.gdtr.base), u32::from(cpu.gdtr.limit) + 1, &mut frames);
        let has_ldt = !cpu.ldtr.unusable && cpu.ldtr.selector & !3 != 0;
        let ldt = has_ldt.then(|| {
            let bytes = cpu.ldtr.limit.min(0xffff) + 1;
            read_table(mmu, vcpu, Gva(cpu.ldtr.base), bytes, &mut frames)
        });
        self.watch(mmu, vcpu, frames);
        kvm.set_descriptors(&gdt, ldt.as_deref())?;
        (self.gdtr, self.ldtr, self.current) = (cpu.gdtr, cpu.ldtr, true);
        Ok(())
    }

    /// Watches `frames` and no others.
    fn watch(&mut self, mmu: &Mmu, vcpu: &Vcpu, mut frames: Vec<Gfn>) {
        frames.sort_unstable();
        frames.dedup();
        self.watched.iter().filter(|old| !frames.contains(old)).for_each(|old| mmu.unwatch(*old));
        for new in &frames {
            if !self.watched.contains(new) {
                mmu.watch(vcpu, *new);
            }
        }
        self.watched = frames;
    }
}

/// The bytes of a table as the CPU would read them, zeros (not present) where it cannot; notes the frames.
fn read_table(mmu: &Mmu, vcpu: &Vcpu, base: Gva, bytes: u32, frames: &mut Vec<Gfn>) -> Vec<u8> {
    let mut table = vec![0; bytes as usize];
    let mut done = 0;
    while done < bytes {
        let at = base.wrapping_add(done);
        let count = (4096 - at.offset()).min(bytes - done);
        let part = &mut table[done as usize..(done + count) as usize];
        if let Ok(t) = mmu.walk(vcpu, at, Access::read(false), Touch::Look) {
            match mmu.read_bytes(vcpu.window(), t.gpa, part) {
                Ok(()) => frames.push(t.gpa.gfn()),
                Err(Beyond::Device(_) | Beyond::Need(_)) => part.fill(0),
            }
        }
        done += count;
    }
    table
}
