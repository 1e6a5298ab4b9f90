//! The guest's descriptor tables, kept translated for the hardware.
//!
//! Story: native guest code loads segments from the firmware's translated copy of the guest's GDT and LDT. The copy
//! is made anew when the guest loads another table, changes its paging, or writes to one of the pages: those are
//! watched, so that a store to them comes back as an emulated one.
//!
//! See: docs/ARCHITECTURE.md, "Segments".

use umbra_mmu::{Access, Gfn, Gva, Mmu, NotReached, Refusal, Shortage, Touch, Vcpu};

use crate::cpu::{CpuState, Segment, TableRegister};
use crate::kvm::{KvmError, KvmVcpu};

/// log2 of the largest page.
const REGION_SHIFT: u32 = 22;

/// What the translated tables were made from.
#[derive(Debug, Default)]
pub struct DescriptorTables {
    gdtr: TableRegister,
    ldtr: Segment,
    watched: Vec<Gfn>,
    current: bool,
}

/// Why the copy could not be made.
#[derive(Debug)]
pub enum NotRefreshed {
    /// A bug in the firmware's layout.
    Kvm(KvmError),
    /// A page of the tables cannot be brought in.
    Short(Shortage),
}

impl From<KvmError> for NotRefreshed {
    fn from(error: KvmError) -> NotRefreshed {
        NotRefreshed::Kvm(error)
    }
}

impl From<Shortage> for NotRefreshed {
    fn from(shortage: Shortage) -> NotRefreshed {
        NotRefreshed::Short(shortage)
    }
}

impl DescriptorTables {
    /// Something may have changed: look again before the next entry.
    pub fn invalidate(&mut self) {
        self.current = false;
    }

    /// True when INVLPG of `gva` may have changed where the tables are: it lies in the same 4 MiB, since that is what
    /// the INVLPG of a large page forgets.
    pub fn contain(&self, gva: Gva) -> bool {
        let covers = |base: u32, limit: u32| {
            let (first, at) = (base >> REGION_SHIFT, gva.0 >> REGION_SHIFT);
            at == first || at == base.wrapping_add(limit) >> REGION_SHIFT
        };
        covers(self.gdtr.base, self.gdtr.limit.into()) || covers(self.ldtr.base, self.ldtr.limit.min(0xffff))
    }

    /// Brings the hardware's copy up to date.
    ///
    /// # Errors
    ///
    /// When a page of the tables cannot be brought in.
    pub fn refresh(
        &mut self,
        mmu: &Mmu,
        vcpu: &Vcpu,
        cpu: &CpuState,
        kvm: &mut KvmVcpu,
    ) -> Result<(), NotRefreshed> {
        if self.current && self.gdtr == cpu.gdtr && self.ldtr == cpu.ldtr {
            return Ok(());
        }
        let mut frames = Vec::new();
        let gdt = read_table(mmu, vcpu, Gva(cpu.gdtr.base), u32::from(cpu.gdtr.limit) + 1, &mut frames)?;
        let has_ldt = !cpu.ldtr.unusable && cpu.ldtr.selector & !3 != 0;
        let ldt = match has_ldt {
            true => {
                let bytes = cpu.ldtr.limit.min(0xffff) + 1;
                Some(read_table(mmu, vcpu, Gva(cpu.ldtr.base), bytes, &mut frames)?)
            }
            false => None,
        };
        self.watch(mmu, vcpu, frames)?;
        kvm.set_descriptors(&gdt, ldt.as_deref())?;
        (self.gdtr, self.ldtr, self.current) = (cpu.gdtr, cpu.ldtr, true);
        Ok(())
    }

    /// Watches `frames` and no others.
    fn watch(&mut self, mmu: &Mmu, vcpu: &Vcpu, mut frames: Vec<Gfn>) -> Result<(), Shortage> {
        frames.sort_unstable();
        frames.dedup();
        self.watched.iter().filter(|old| !frames.contains(old)).for_each(|old| mmu.unwatch(*old));
        for new in &frames {
            if !self.watched.contains(new) {
                mmu.watch(vcpu, *new)?;
            }
        }
        self.watched = frames;
        Ok(())
    }
}

/// The bytes of a table as the CPU would read them, zeros (not present) where it cannot; notes the frames.
fn read_table(
    mmu: &Mmu,
    vcpu: &Vcpu,
    base: Gva,
    bytes: u32,
    frames: &mut Vec<Gfn>,
) -> Result<Vec<u8>, Shortage> {
    let own = Some(vcpu.id());
    let mut table = vec![0; bytes as usize];
    let mut done = 0;
    while done < bytes {
        let at = base.wrapping_add(done);
        let count = (4096 - at.offset()).min(bytes - done);
        let part = &mut table[done as usize..(done + count) as usize];
        match mmu.walk(vcpu, at, Access::read(false), Touch::Look) {
            Ok(t) => match mmu.read_bytes_sleeping(own, vcpu.window(), t.gpa, part) {
                Ok(()) => frames.push(t.gpa.gfn()),
                Err(NotReached::Device(_)) => part.fill(0),
                Err(NotReached::Short(shortage)) => return Err(shortage),
            },
            Err(Refusal::Fault(_)) => {}
            Err(Refusal::Need(gfn)) => {
                mmu.bring_in(own, gfn)?;
                continue;
            }
        }
        done += count;
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invlpg_near_a_table_makes_it_stale_also_across_4_gib() {
        let gdtr = TableRegister { base: 0xffff_ff80, limit: 0xff };
        let ldtr = Segment { base: 0x803f_fff8, limit: 0xf, ..Segment::default() };
        let tables = DescriptorTables { gdtr, ldtr, ..DescriptorTables::default() };
        for inside in [0xffff_f000, 0xffc0_0000, 0, 0x7f, 0x8000_0000, 0x8040_0000] {
            assert!(tables.contain(Gva(inside)), "{inside:#x}");
        }
        for outside in [0xffbf_ffff, 0x40_0000, 0x7fff_ffff, 0x8080_0000] {
            assert!(!tables.contain(Gva(outside)), "{outside:#x}");
        }
    }
}
