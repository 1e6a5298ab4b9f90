//! What the model has found, and in words.

use std::fmt;

use super::Site;
use super::tables::{Edit, Loss, Used, Walked};
use crate::access::{Access, AccessKind};
use crate::addr::{Gfn, Gva};
use crate::format::{Gpte, Mode, Rights};

/// How a CPU lets go of what it had begun with its tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LetGo {
    /// It went to user mode.
    User,
    /// It loaded another CR3.
    Cr3,
    /// It halted.
    Halt,
}

/// A flush that the guest has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When, in ticks.
    pub at: u64,
    /// Where.
    pub site: Site,
    /// INVLPG of that page; else of everything that is not global.
    pub page: Option<Gva>,
}

/// What has become of a frame that was taken from an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandedOn {
    /// User code has used it through an entry made since.
    Used(Used),
    /// It became a page table.
    Table {
        /// When.
        at: u64,
        /// Whose walk found that.
        by: Site,
    },
    /// A device wrote to it.
    Device {
        /// When.
        at: u64,
    },
    /// The guest gave it up.
    GivenUp {
        /// When.
        at: u64,
    },
}

/// Why a use is certainly a mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// This CPU has entered another frame there itself, and uses the address.
    OwnEdit,
    /// The old frame is somebody else's.
    HandedOn(HandedOn),
}

/// A flush that the guest certainly has missed: the use of a translation that it has taken away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Who uses it, where.
    pub site: Site,
    /// The address.
    pub gva: Gva,
    /// What for.
    pub access: Access,
    /// The page that the old translation leads to.
    pub gfn: Gfn,
    /// What it allows.
    pub rights: Rights,
    /// It outlives MOV CR3.
    pub global: bool,
    /// Where it was loaded.
    pub loaded: Site,
    /// When, in ticks.
    pub loaded_at: u64,
    /// Nobody has used it since it was forgotten: the CPU may have loaded it by itself, since the entry had A.
    pub assumed: bool,
    /// When it is used.
    pub at: u64,
    /// The paging mode.
    pub mode: Mode,
    /// What the guest's tables say now.
    pub walked: Walked,
    /// The edit that took it away.
    pub departure: Edit,
    /// When the CPU of that edit let go last, if it did.
    pub let_go: Option<u64>,
    /// All edits of the entries since it was loaded, the first first.
    pub edits: Vec<Edit>,
    /// Flushes that this vCPU has made last.
    pub flushes: Vec<Seen>,
    /// Why it is certain.
    pub why: Why,
}

/// An edit whose CPU let go while its old translation was still held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Suspect {
    /// By an entry.
    Held {
        /// The edit.
        edit: Edit,
        /// What it took.
        loss: Loss,
        /// The page.
        gva: Gva,
        /// What the old translation leads to.
        gfn: Gfn,
        /// Who holds it.
        vcpu: u32,
        /// How the editor let go.
        let_go: LetGo,
    },
    /// A table was taken out of its directory, and nothing flushed.
    Table {
        /// The edit.
        edit: Edit,
        /// How its CPU let go.
        let_go: LetGo,
    },
    /// PAE's pointers were stored to, and not loaded.
    Pointers {
        /// The store.
        stored: Site,
        /// How its CPU let go.
        let_go: LetGo,
    },
}

/// What a run ends by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    /// A flush that was certainly missed.
    Certain(Box<Finding>),
    /// The first suspect, where the model is strict.
    Suspect(Box<Suspect>),
}

/// What was found in a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdicts {
    /// Changes of entries that were seen.
    pub edits: u64,
    /// Suspects: a frame was taken away; a right; accessed or dirty bits; a table, from its directory; pointers that were not
    /// loaded.
    pub suspects: [u64; 5],
    /// The first of them.
    pub listed: Vec<Suspect>,
}

impl Verdicts {
    pub(super) fn add(&mut self, suspect: Suspect) {
        let sort = match &suspect {
            Suspect::Held { loss: Loss::Right, .. } => 1,
            Suspect::Held { loss: Loss::Status, .. } => 2,
            Suspect::Held { .. } => 0,
            Suspect::Table { .. } => 3,
            Suspect::Pointers { .. } => 4,
        };
        self.suspects[sort] += 1;
        if self.listed.len() < super::SUSPECTS_LISTED_MAX {
            self.listed.push(suspect);
        }
    }

    /// All suspects.
    pub fn suspects_all(&self) -> u64 {
        self.suspects.iter().sum()
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}, EIP {:#010x}, instruction {}", self.vcpu, self.eip, self.instructions)
    }
}

impl fmt::Display for LetGo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LetGo::User => "went to user mode",
            LetGo::Cr3 => "loaded another CR3",
            LetGo::Halt => "halted",
        })
    }
}

impl fmt::Display for HandedOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HandedOn::Used(used) => write!(
                f,
                "entered at {} at tick {}, and used at {} by user code ({}) at tick {}",
                used.entry, used.entered, used.gva, used.site, used.tick
            ),
            HandedOn::Table { at, by } => write!(f, "became a page table, found by {by} at tick {at}"),
            HandedOn::Device { at } => write!(f, "was written to by a device at tick {at}"),
            HandedOn::GivenUp { at } => write!(f, "was given up to the balloon or discarded at tick {at}"),
        }
    }
}

/// An entry in words.
struct Entry(Mode, u64);

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpte = Gpte(self.1);
        if !gpte.is_present() {
            return write!(f, "absent ({:#x})", self.1);
        }
        write!(f, "frame {} ({:#x})", gpte.gfn(self.0), self.1)
    }
}

impl Finding {
    /// The edit in a few words.
    fn told(&self, edit: &Edit) -> String {
        let (old, new) = (Entry(self.mode, edit.old), Entry(self.mode, edit.new));
        format!("entry at {}: {old} -> {new} by {}, tick {}", edit.entry, edit.site, edit.tick)
    }

    /// The flush that is not there.
    fn missing(&self) -> String {
        let page = self.gva.page();
        match self.departure.site.vcpu == self.site.vcpu {
            true => format!("INVLPG of {page}, or MOV CR3 unless global, by vCPU {}", self.site.vcpu),
            false => format!(
                "an IPI from vCPU {} that makes vCPU {} forget {page}",
                self.departure.site.vcpu, self.site.vcpu
            ),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { site, gva, access, gfn, .. } = self;
        let who = if access.user { "user code" } else { "the kernel" };
        let does = match access.kind {
            AccessKind::Read => "reads",
            AccessKind::Write => "stores",
            AccessKind::Execute => "fetches",
        };
        writeln!(
            f,
            "the guest has missed a TLB flush (certain): {who} {does} at {gva} ({site}), where its TLB may still lead to frame {gfn}"
        )?;
        match self.walked {
            Walked::Page(walk) if walk.gfn == *gfn => {
                writeln!(f, "  its tables now: the same frame, which this access may not use so")?;
            }
            Walked::Page(walk) => writeln!(f, "  its tables now: frame {}", walk.gfn)?,
            _ => writeln!(f, "  its tables now: absent")?,
        }
        let how = if self.assumed { "may have been loaded, for its entry had A, up to" } else { "loaded by" };
        let global = if self.global { ", global" } else { "" };
        writeln!(f, "  old translation: {how} {}, tick {}{global}", self.loaded, self.loaded_at)?;
        writeln!(f, "  edit: {}", self.told(&self.departure))?;
        match self.why {
            Why::OwnEdit => writeln!(
                f,
                "  since then: this vCPU has entered another frame there itself, and nothing has come in between"
            )?,
            Why::HandedOn(handed) => writeln!(f, "  since then: frame {gfn} {handed}")?,
        }
        write!(f, "  missing flush: {}", self.missing())?;
        for edit in self.edits.iter().filter(|edit| **edit != self.departure) {
            write!(f, "\n  tick {}: {}", edit.tick, self.told(edit))?;
        }
        if let Some(at) = self.let_go {
            write!(f, "\n  tick {at}: vCPU {} let go last", self.departure.site.vcpu)?;
        }
        for Seen { at, site, page } in &self.flushes {
            match page {
                Some(page) => write!(f, "\n  tick {at}: INVLPG of {page} by {site}")?,
                None => write!(f, "\n  tick {at}: flush of all that is not global by {site}")?,
            }
        }
        write!(f, "\n  tick {}: the use", self.at)
    }
}

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missed::Certain(finding) => write!(f, "{finding}"),
            Missed::Suspect(suspect) => {
                write!(f, "the guest may have missed a TLB flush (suspect): {suspect}")
            }
        }
    }
}

impl fmt::Display for Suspect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Suspect::Held { edit, loss, gva, gfn, vcpu, let_go } => {
                let lost = match loss {
                    Loss::Frame => "frame",
                    Loss::Right => "right",
                    Loss::Status => "accessed or dirty bit",
                    Loss::None => "nothing",
                };
                write!(
                    f,
                    "{gva}: its {lost} was taken by {} (entry at {}: {:#x} -> {:#x}), whose vCPU {let_go} while vCPU {vcpu} may still \
                     use frame {gfn} there",
                    edit.site, edit.entry, edit.old, edit.new
                )
            }
            Suspect::Table { edit, let_go } => write!(
                f,
                "a table was taken out of its directory by {} (entry at {}: {:#x} -> {:#x}), whose vCPU {let_go} without a flush",
                edit.site, edit.entry, edit.old, edit.new
            ),
            Suspect::Pointers { stored, let_go } => write!(
                f,
                "PAE directory pointers were stored to by {stored}, whose vCPU {let_go} without loading them"
            ),
        }
    }
}
