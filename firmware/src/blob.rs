//! The code: 256 stubs and a flush, assembled with the program and copied into the image as bytes.
//!
//! Story: `out` exits to the VMM, which rebuilds the vCPU's whole state at its next entry; so no stub has a way
//! back. The bytes between stubs are `int3`: should one ever be resumed, it raises an exception whose saved CS is
//! the firmware's, which the backend reports as the bug that it is.

use crate::constants::{ERROR_VECTORS, FLUSH, FLUSH_PORT, STUB_BYTES, STUBS, TRAP_PORT};

core::arch::global_asm!(
    ".pushsection .rodata.umbra_firmware, \"a\", @progbits",
    ".p2align 4",
    // Global, since the reference may end up in another object file than this; hidden, since it is nobody else's.
    ".globl umbra_firmware_start, umbra_firmware_end",
    ".hidden umbra_firmware_start, umbra_firmware_end",
    "umbra_firmware_start:",
    ".org umbra_firmware_start + {stubs}, 0xcc",
    ".set umbra_vector, 0",
    ".rept 256",
    ".org umbra_firmware_start + {stubs} + umbra_vector * {stub_bytes}, 0xcc",
    // Vectors from 32 on never have an error code; the shift below must not see them.
    ".if umbra_vector >= 32",
    "push 0",
    ".elseif (({error_vectors} >> umbra_vector) & 1) == 0",
    "push 0",
    ".endif",
    // push imm32, so that every stub has the same form.
    ".byte 0x68",
    ".long umbra_vector",
    "out {trap_port}, al",
    ".set umbra_vector, umbra_vector + 1",
    ".endr",
    ".org umbra_firmware_start + {flush}, 0xcc",
    "mov rax, cr3",
    "mov cr3, rax",
    "nop",
    "out {flush_port}, al",
    ".byte 0xcc",
    "umbra_firmware_end:",
    ".popsection",
    stubs = const STUBS,
    stub_bytes = const STUB_BYTES,
    error_vectors = const ERROR_VECTORS,
    trap_port = const TRAP_PORT,
    flush = const FLUSH,
    flush_port = const FLUSH_PORT,
);

unsafe extern "C" {
    static umbra_firmware_start: u8;
    static umbra_firmware_end: u8;
}

/// The code's bytes, from [`STUBS`] to the end of the flush stub.
pub fn code() -> &'static [u8] {
    // SAFETY: both symbols are defined above in one section, start before end, so they delimit one allocated
    // object in read-only memory that lives as long as the program; nobody writes it; u8 needs no alignment and
    // has no invalid values.
    unsafe {
        let start = &raw const umbra_firmware_start;
        let end = &raw const umbra_firmware_end;
        core::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::constants::{CODE_BYTES, FLUSH_END, VECTORS};

    #[test]
    fn code_fits_its_pages() {
        assert!(code().len() as u64 > FLUSH && code().len() as u64 <= CODE_BYTES, "{}", code().len());
    }

    #[test]
    fn every_stub_pushes_its_vector_and_leaves() {
        for vector in 0..VECTORS {
            let at = (STUBS + vector * STUB_BYTES) as usize;
            let mut stub = &code()[at..at + STUB_BYTES as usize];
            let has_error = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
            if !has_error {
                assert_eq!(&stub[..2], [0x6a, 0x00], "vector {vector}: push 0");
                stub = &stub[2..];
            }
            assert_eq!(stub[0], 0x68, "vector {vector}: push imm32");
            assert_eq!(stub[1..5], (vector as u32).to_le_bytes(), "vector {vector}");
            assert_eq!(stub[5..7], [0xe6, TRAP_PORT as u8], "vector {vector}: out");
            assert!(stub[7..].iter().all(|&byte| byte == 0xcc), "vector {vector}: nothing more");
        }
    }

    #[test]
    fn flush_reloads_cr3_and_leaves() {
        let expected = [0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0x90, 0xe6, FLUSH_PORT as u8, 0xcc];
        assert_eq!(code()[FLUSH as usize..], expected);
        assert_eq!(code()[FLUSH_END as usize], 0x90);
    }
}
