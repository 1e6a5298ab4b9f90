//! Umbra's own look at what the guest says it has computed.
//!
//! Story: at its exit the guest has published a table of named regions with the CRC-32 it believes each has. Umbra
//! reads table and regions through the window and hashes them itself. The guest's word alone is never the verdict.

use umbra_mmu::{Gpa, LocalStack, Mmu};

use super::ending::End;
use crate::boot::notes::Notes;
use crate::boot::witness::{self, Witness};

/// The regions of a guest that ended by its exit port, or why they cannot be read. None where the image announces no
/// table.
pub fn hear(mmu: &Mmu, window: &LocalStack, notes: &Notes, end: &End) -> (Vec<Witness>, Option<String>) {
    let (Some(table), Some(_)) = (notes.witness_table, end.guest_value()) else {
        return (Vec::new(), None);
    };
    let mut read = |gpa: Gpa, buffer: &mut [u8]| Ok(mmu.read_bytes_sleeping(None, window, gpa, buffer)?);
    match witness::check(table, &mut read) {
        Ok(regions) => (regions, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    }
}
