//! Roles: under which rules a shadow page was built. Two roles never share a page.
//!
//! Story: the same guest table may be shadowed several times: for kernel and user, under other control bits,
//! below directory entries of different rights. [`Key`] = (guest frame, role) tells them apart.
//!
//! Holds: a role holds everything that an spte of the page depends on beside the guest's entry itself, the p2m
//! and the flags of the frame mapped. What cannot matter is normalised away, so that pages are shared: WP and
//! SMEP bind only supervisor code, PSE only directories, PGE nothing.
//!
//! See: KVM, Documentation/virt/kvm/x86/mmu.rst, "role".

use crate::addr::{Gfn, Gva};
use crate::format::{Gpte, Mode, Rights};
use crate::walk::{PageSize, Translation};

/// What a shadow page shadows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// A guest page directory: entries are links.
    Directory,
    /// A guest page table: entries are leaves.
    Table,
    /// 1 GiB of untranslated guest-physical space: entries are links to `Linear` pages.
    DirectDirectory,
    /// 2 MiB of contiguous guest-physical space: a large page's part, or paging off.
    Linear,
}

/// The rules a shadow page was built under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Role {
    /// What it shadows.
    pub shape: Shape,
    /// The guest's mode, normalised to what matters to this page.
    pub mode: Mode,
    /// For guest-user code: supervisor pages are absent.
    pub user: bool,
    /// Which part of a two-level guest table it covers: 0..4 of a directory, 0..2 of a table.
    pub quadrant: u8,
    /// For `Table`, the rights above it; for `Linear`, the rights of its sptes (W and X alone).
    pub rights: Rights,
}

/// What identifies a shadow page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The guest table, or the first frame covered by a page that shadows none.
    pub gfn: Gfn,
    /// Its role.
    pub role: Role,
}

/// What a leaf spte is to allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafRights {
    /// Stores, as far as the guest's tables go (tracking may still forbid them).
    pub writable: bool,
    /// Fetches.
    pub executable: bool,
    /// The guest's entry has G.
    pub global: bool,
}

/// Mode bits that matter to code of one privilege: WP and SMEP bind supervisor code alone.
#[inline]
pub(crate) fn effective_mode(mode: Mode, user: bool) -> Mode {
    if !mode.paging {
        return Mode::default();
    }
    Mode {
        write_protect: mode.write_protect || user,
        smep: mode.smep && !user,
        pse: mode.pse && !mode.pae,
        no_execute: mode.no_execute && mode.pae,
        global_pages: false,
        ..mode
    }
}

/// What a page of `rights` and D = `dirty` allows to code of the privilege `user`; `None`: nothing at all. Not global:
/// whoever has the guest's entry at hand adds that.
#[inline]
pub(crate) fn leaf_rights(mode: Mode, user: bool, rights: Rights, dirty: bool) -> Option<LeafRights> {
    if user && !rights.user() {
        return None;
    }
    Some(LeafRights {
        writable: dirty && (rights.writable() || (!user && !mode.write_protect)),
        executable: rights.executable() && (user || !(mode.smep && rights.user())),
        global: false,
    })
}

impl Role {
    /// True for a page that shadows a guest table, which must be watched.
    pub fn shadows_table(&self) -> bool {
        matches!(self.shape, Shape::Directory | Shape::Table)
    }

    /// True for a page whose entries are links.
    pub fn is_directory(&self) -> bool {
        matches!(self.shape, Shape::Directory | Shape::DirectDirectory)
    }

    /// What the guest's entry grants in a `Table` page of this role: the frame and the rights of the leaf spte
    /// it justifies, if it justifies one.
    pub(crate) fn leaf_of(&self, gpte: Gpte) -> Option<(Gfn, LeafRights)> {
        let mode = self.mode;
        if !gpte.is_present() || !gpte.is_accessed() || gpte.has_reserved_bits(mode, false) {
            return None;
        }
        let rights = self.rights.and(gpte.rights(mode));
        let leaf = leaf_rights(mode, self.user, rights, gpte.is_dirty())?;
        Some((gpte.gfn(mode), LeafRights { global: gpte.is_global(), ..leaf }))
    }

    /// The guest entry that decides spte `index` of this page: its index in the guest's table.
    pub(crate) fn guest_index(&self, index: u32) -> u32 {
        match (self.shape, self.mode.pae) {
            (_, true) => index,
            (Shape::Table, false) => u32::from(self.quadrant) * 512 + index,
            (_, false) => u32::from(self.quadrant) * 256 + index / 2,
        }
    }

    /// The sptes of this page that guest entry `guest_index` decides: first index and count (0, 1 or 2).
    pub(crate) fn shadow_indexes(&self, guest_index: u32) -> (u32, u32) {
        let (per_page, each) = match (self.shape, self.mode.pae) {
            (_, true) => return (guest_index, 1),
            (Shape::Table, false) => (512, 1),
            (_, false) => (256, 2),
        };
        if guest_index / per_page != u32::from(self.quadrant) {
            return (0, 0);
        }
        (guest_index % per_page * each, each)
    }
}

/// The key of the second-level page for `gva`: `directory` is the guest's page directory.
#[inline]
pub(crate) fn directory_key(mode: Mode, user: bool, directory: Gfn, gva: Gva) -> Key {
    let quarter = (gva.0 >> 30) as u8;
    let mode = effective_mode(mode, user);
    if !mode.paging {
        let role =
            Role { shape: Shape::DirectDirectory, mode, user: false, quadrant: 0, rights: Rights::ALL };
        return Key { gfn: Gfn(u32::from(quarter) << 18), role };
    }
    let quadrant = if mode.pae { 0 } else { quarter };
    Key { gfn: directory, role: Role { shape: Shape::Directory, mode, user, quadrant, rights: Rights::ALL } }
}

/// The key of the first-level page for a translation; `None` when code of this privilege may not touch it.
#[inline]
pub(crate) fn table_key(mode: Mode, user: bool, t: &Translation) -> Option<Key> {
    let mode = effective_mode(mode, user);
    if let (PageSize::Small, Some(step)) = (t.size, t.table) {
        let quadrant = if mode.pae { 0 } else { (t.gva.0 >> 21 & 1) as u8 };
        let mode = Mode { pse: false, ..mode };
        let role = Role { shape: Shape::Table, mode, user, quadrant, rights: t.upper };
        return Some(Key { gfn: step.table, role });
    }
    let leaf = leaf_rights(mode, user, t.rights, t.dirty)?;
    let mut rights = 0;
    if leaf.writable {
        rights |= Rights::WRITE;
    }
    if leaf.executable {
        rights |= Rights::EXECUTE;
    }
    let gfn = Gfn(t.gpa.gfn().0 & !0x1ff);
    let role = Role {
        shape: Shape::Linear,
        mode: Mode::default(),
        user: false,
        quadrant: 0,
        rights: Rights(rights),
    };
    Some(Key { gfn, role })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(shape: Shape, pae: bool, quadrant: u8) -> Role {
        Role {
            shape,
            mode: Mode { paging: true, pae, ..Mode::default() },
            user: false,
            quadrant,
            rights: Rights::ALL,
        }
    }

    #[test]
    fn guest_and_shadow_indexes_are_each_others_inverse() {
        for (shape, pae, quadrants) in [
            (Shape::Directory, false, 4),
            (Shape::Table, false, 2),
            (Shape::Directory, true, 1),
            (Shape::Table, true, 1),
        ] {
            for quadrant in 0..quadrants {
                let role = role(shape, pae, quadrant);
                for index in 0..512 {
                    let (first, count) = role.shadow_indexes(role.guest_index(index));
                    assert!((first..first + count).contains(&index), "{role:?} {index}");
                }
            }
        }
    }

    #[test]
    fn a_guest_entry_of_another_quadrant_decides_nothing_here() {
        assert_eq!(role(Shape::Directory, false, 0).shadow_indexes(256), (0, 0));
        assert_eq!(role(Shape::Table, false, 1).shadow_indexes(511), (0, 0));
    }

    #[test]
    fn user_roles_ignore_what_binds_supervisors() {
        let base = Mode { paging: true, pae: true, ..Mode::default() };
        let a = effective_mode(Mode { smep: true, ..base }, true);
        let b = effective_mode(Mode { write_protect: true, ..base }, true);
        assert_eq!(a, b);
        assert_ne!(effective_mode(Mode { smep: true, ..base }, false), effective_mode(base, false));
    }
}
