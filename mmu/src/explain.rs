//! Explain: the chain of reasons behind an address, for people.

use std::fmt;

use crate::Mmu;
use crate::access::Access;
use crate::addr::{Gfn, Gva, Mfn};
use crate::frames::{EXTERNAL, SHADOWED, UNSYNC, UPPER, WATCHED};
use crate::p2m::PageState;
use crate::shadow::role::{effective_mode, leaf_rights, table_key};
use crate::spte::{Spte, l1_index};
use crate::vcpu::Vcpu;
use crate::walk::{PageSize, Refusal, Touch, Translation};

/// Why `gva` is mapped as it is, line by line. The [`fmt::Display`] form is for a terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The address asked for.
    pub gva: Gva,
    /// One sentence a line, in the order of the walk.
    pub lines: Vec<String>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "gva {}", self.gva)?;
        self.lines.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

impl Mmu {
    /// Explains `gva` as `vcpu` sees it. Changes nothing that the guest or the shadow could notice. Called on the
    /// vCPU's thread, or while it is stopped.
    pub fn explain(&self, vcpu: &Vcpu, gva: Gva) -> Explanation {
        let mut lines = vec![describe_mode(vcpu)];
        match self.walk(vcpu, gva, Access::read(false), Touch::Look) {
            Ok(t) => self.explain_translation(vcpu, &t, &mut lines),
            Err(Refusal::Fault(fault)) => {
                lines.push(format!("the guest's tables end in a page fault, error code {:?}", fault.code));
                self.explain_partial(vcpu, gva, &mut lines);
            }
            Err(Refusal::Need(gfn)) => {
                lines.push(format!("the walk needs guest frame {gfn}, which is not in memory now"));
            }
        }
        match vcpu.events.borrow().last(gva) {
            Some((event, ago)) => lines.push(format!("last event on this page: {event:?}, {ago} events ago")),
            None => lines.push("no event on this page among the last ones".into()),
        }
        Explanation { gva, lines }
    }

    fn explain_translation(&self, vcpu: &Vcpu, t: &Translation, lines: &mut Vec<String>) {
        for (name, step) in [("directory", t.directory), ("table", t.table)] {
            let Some(step) = step else { continue };
            let tracked = if self.is_shadowed(step) { ", shadowed" } else { "" };
            lines.push(format!("{name} {} entry {} = {:#x}{tracked}", step.table, step.index, step.gpte.0));
        }
        let size = match t.size {
            PageSize::Direct => "paging is off, so the address is physical",
            PageSize::Small => "a 4 KiB page",
            PageSize::Large => "a large page",
        };
        lines.push(format!("{size}: gpa {}, rights {}, D {}", t.gpa, rights(t), u8::from(t.dirty)));
        self.explain_frame(t.gpa.gfn(), lines);
        for user in [false, true] {
            lines.push(self.explain_spte(vcpu, t, user));
        }
    }

    /// What of the walk there is before it ends.
    fn explain_partial(&self, vcpu: &Vcpu, gva: Gva, lines: &mut Vec<String>) {
        let Some(directory) = vcpu.directory(gva) else {
            lines.push(format!("PDPTE {} is not present", gva.0 >> 30));
            return;
        };
        let index = vcpu.mode.directory_index(gva);
        if let Ok(pde) = self.read_gpte(vcpu, directory, index) {
            lines.push(format!("directory {directory} entry {index} = {:#x}", pde.0));
            if pde.is_present() && !pde.is_large(vcpu.mode) {
                let (table, index) = (pde.gfn(vcpu.mode), vcpu.mode.table_index(gva));
                if let Ok(pte) = self.read_gpte(vcpu, table, index) {
                    lines.push(format!("table {table} entry {index} = {:#x}", pte.0));
                }
            }
        }
    }

    fn explain_frame(&self, gfn: Gfn, lines: &mut Vec<String>) {
        lines.push(match self.p2m.lookup(gfn) {
            PageState::Zero => format!("guest frame {gfn} is all zeros: no machine frame"),
            PageState::Swapped(slot) => format!("guest frame {gfn} is in swap, in slot {}", slot.0),
            PageState::Ballooned => format!("guest frame {gfn} was given up by the guest"),
            PageState::Moving => format!("guest frame {gfn} is changing hands"),
            PageState::Device => format!("guest frame {gfn} is no memory: a device, or nothing"),
            PageState::Resident(mfn) => {
                format!("guest frame {gfn} is in machine frame {mfn}{}", self.marks(mfn))
            }
        });
        if self.buckets.is_closed(gfn) {
            lines.push("its gate is closed: an invalidation is under way".into());
        }
    }

    fn marks(&self, mfn: Mfn) -> String {
        let flags = self.frames.flags(mfn);
        let mut text = String::new();
        for (flag, words) in [
            (SHADOWED, ", a shadowed page table"),
            (UPPER, ", used as a page directory, so every store to it is tracked"),
            (UNSYNC, ", unsync: stores to it are not tracked until the next flush"),
            (WATCHED, ", watched for descriptor changes"),
            (EXTERNAL, ", with importers"),
        ] {
            if flags & flag != 0 {
                text.push_str(words);
            }
        }
        text
    }

    fn explain_spte(&self, vcpu: &Vcpu, t: &Translation, user: bool) -> String {
        let who = if user { "user" } else { "kernel" };
        let Some(root) = vcpu.roots[usize::from(user && vcpu.mode.paging)].get() else {
            return format!("{who} root: not loaded since the last CR3 load");
        };
        let mode = effective_mode(vcpu.mode, user);
        // What the guest's tables allow once D is set.
        let Some(wanted) = leaf_rights(mode, user, t.rights, true) else {
            return format!("{who} root: absent, since it is a supervisor page");
        };
        if let Some(spte) = self.look_at_large(root, t.gva) {
            return format!("{who} root: {spte:?}, by one spte for all of a huge range");
        }
        let Some(slot) = self.find_table(root, t.gva) else {
            return format!("{who} root: no shadow table for this address yet");
        };
        let page = self.pages.lock(slot, false);
        if page.key != table_key(vcpu.mode, user && vcpu.mode.paging, t) {
            return format!("{who} root: its shadow table for this address has just been taken away");
        }
        let spte = self.spte(self.pages.mfn(slot).at(l1_index(t.gva) * 8));
        let reason = match (spte.is_present(), spte.is_writable()) {
            (false, _) => "nobody has touched it since it was last removed",
            (true, true) => "writable",
            (true, false) if !wanted.writable => "read-only, as the guest's tables say",
            (true, false) if !t.dirty => "read-only, so that the first store sets D",
            (true, false) => "read-only, because its stores are tracked",
        };
        let spte = if spte.is_present() { spte } else { Spte::ABSENT };
        format!("{who} root: {spte:?}, {reason}")
    }
}

fn describe_mode(vcpu: &Vcpu) -> String {
    let mode = vcpu.mode;
    if !mode.paging {
        return "paging is off".into();
    }
    let on = |bit, name| if bit { name } else { "" };
    format!(
        "{} paging, CR3 {:#x}{}{}{}{}",
        if mode.pae { "PAE" } else { "two-level" },
        vcpu.cr3,
        on(mode.pse && !mode.pae, ", PSE"),
        on(mode.write_protect, ", WP"),
        on(mode.no_execute, ", NXE"),
        on(mode.smep, ", SMEP"),
    )
}

fn rights(t: &Translation) -> String {
    let letter = |on, letter| if on { letter } else { '-' };
    [letter(t.rights.user(), 'u'), 'r', letter(t.rights.writable(), 'w'), letter(t.rights.executable(), 'x')]
        .iter()
        .collect()
}
