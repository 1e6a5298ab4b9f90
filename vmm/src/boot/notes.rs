//! What an image says about itself in ELF notes of the owner "Umbra".
//!
//! Story: type 1 tells whether the kernel's own code may run natively at CPL 3; type 2 where it writes down the
//! memory that it wants witnessed ([`super::witness`]). Notes of other owners, and further types, are passed over.
//!
//! See: `umbra_guest::abi` for the numbers.

use umbra_guest::abi;
use umbra_mmu::Gpa;

use super::ImageError;

/// The kernel's word about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelNote {
    /// Its code avoids what CPL 3 shows differently: `--supervisor native` is right for it.
    pub clean: bool,
}

/// All that an image's notes say. An image without notes says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// Type 1.
    pub kernel: Option<KernelNote>,
    /// Type 2: guest-physical address of the witness table.
    pub witness_table: Option<Gpa>,
}

impl Notes {
    /// Adds a note. One of ours that cannot be understood is an error: the image was built for another Umbra.
    pub(super) fn add(&mut self, name: &[u8], note: u32, descriptor: &[u8]) -> Result<(), ImageError> {
        if name != abi::NOTE_NAME.as_bytes() {
            return Ok(());
        }
        let wrong = |reason: String| Err(ImageError::Note { note, reason });
        let (words, rest) = descriptor.as_chunks::<4>();
        let words: Vec<u32> = words.iter().take(3).map(|&word| u32::from_le_bytes(word)).collect();
        match (note, words.as_slice(), rest.len()) {
            (abi::NOTE_TYPE_KERNEL, &[abi::NOTE_VERSION, flags], 0) => {
                self.kernel = Some(KernelNote { clean: flags & abi::NOTE_FLAG_CLEAN != 0 });
            }
            (abi::NOTE_TYPE_KERNEL, &[version, _], 0) => {
                return wrong(format!("its version is {version}, and {} is known", abi::NOTE_VERSION));
            }
            (abi::NOTE_TYPE_WITNESS, &[address], 0) => self.witness_table = Some(Gpa(address.into())),
            (abi::NOTE_TYPE_KERNEL | abi::NOTE_TYPE_WITNESS, ..) => {
                return wrong(format!("its descriptor has {} bytes", descriptor.len()));
            }
            _ => log::debug!("the image has an Umbra note of type {note}, which is not known"),
        }
        Ok(())
    }
}
