//! The guest of a measurement: vCPUs that touch pages, for ever, and do not mind what is in them.
//!
//! Story: contents may be taken away from it at any time, and whatever is taken is mapped again within one round. It is a
//! Multiboot1 kernel of a few instructions, in ELF for the note that its code may run natively. Paging is on, with 4 MiB
//! pages one to one; the first CPU starts all others; each adds one to the first word of every page, in turn. Or it does so once, and
//! halts then: its timer goes on, and interrupts by a vector that its APIC lets nobody have, so that it is not one that nothing could wake.
//!
//! ```text
//!   0x8000     what the other CPUs begin with, in real mode
//!   0x100000   the image
//!   0x102000   the page directory
//!   from base  the pages that are touched
//! ```

use umbra_guest::abi;
use umbra_mmu::PAGE_SIZE;

use crate::vm::BuiltIn;

/// Where it is loaded.
const LOAD: u32 = 0x10_0000;
/// ELF header, two program headers, the note, the Multiboot header, to a multiple of 16.
const HEADERS: usize = 0xa0;
/// Memory below this is not touched: the image and its tables.
pub const BASE_MIN: u64 = 2 << 20;

/// Immediates of [`CODE`]: the first page's address, and how many there are; and how far the jump behind a round goes.
const BASE_AT: usize = 0x5e;
const PAGES_AT: usize = 0x63;
const AGAIN_AT: usize = 0x73;
/// From behind that jump to `halt`.
const TO_HALT: u8 = 0x42;

/// Linked to `LOAD + HEADERS`.
#[rustfmt::skip]
const CODE: [u8; 226] = [
    0xfa,                                     //        cli
    0xfc,                                     //        cld
    0xbf, 0x00, 0x20, 0x10, 0x00,             //        mov edi, 0x102000   ; the directory
    0xb8, 0xe3, 0x00, 0x00, 0x00,             //        mov eax, 0xe3       ; present, writable, A, D, 4 MiB
    0xab,                                     // fill:  stosd
    0x05, 0x00, 0x00, 0x40, 0x00,             //        add eax, 4 << 20
    0x81, 0xff, 0x00, 0x30, 0x10, 0x00,       //        cmp edi, 0x103000
    0x72, 0xf2,                               //        jb fill
    0xbe, 0x20, 0x01, 0x10, 0x00,             //        mov esi, real
    0xbf, 0x00, 0x80, 0x00, 0x00,             //        mov edi, 0x8000
    0xb9, 0x36, 0x00, 0x00, 0x00,             //        mov ecx, end - real
    0xf3, 0xa4,                               //        rep movsb
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x0c, 0x00, // mov dword [0xfee00300], 0xc4500  ; INIT to all others
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0x0c, 0x00, // mov dword [0xfee00300], 0xc4608  ; start-up at page 8
    0xb8, 0x00, 0x20, 0x10, 0x00,             // paged: mov eax, 0x102000
    0x0f, 0x22, 0xd8,                         //        mov cr3, eax
    0x0f, 0x20, 0xe0,                         //        mov eax, cr4
    0x83, 0xc8, 0x10,                         //        or eax, 0x10        ; PSE
    0x0f, 0x22, 0xe0,                         //        mov cr4, eax
    0x0f, 0x20, 0xc0,                         //        mov eax, cr0
    0x0d, 0x00, 0x00, 0x01, 0x80,             //        or eax, 0x80010000  ; PG, WP
    0x0f, 0x22, 0xc0,                         //        mov cr0, eax
    0xeb, 0x00,                               //        jmp round
    0xbe, 0, 0, 0, 0,                         // round: mov esi, base
    0xb9, 0, 0, 0, 0,                         //        mov ecx, pages
    0xff, 0x06,                               // touch: inc dword [esi]
    0x81, 0xc6, 0x00, 0x10, 0x00, 0x00,       //        add esi, 4096
    0x49,                                     //        dec ecx
    0x75, 0xf5,                               //        jnz touch
    0xeb, 0xe9,                               //        jmp round
    0x66, 0xb8, 0x10, 0x00,                   // flat:  mov ax, 0x10
    0x8e, 0xd8,                               //        mov ds, eax
    0x8e, 0xc0,                               //        mov es, eax
    0x8e, 0xd0,                               //        mov ss, eax
    0xeb, 0xbf,                               //        jmp paged
    // 16-bit code, at 0x8000, where CS begins.
    0xfa,                                     // real:  cli
    0x2e, 0x66, 0x0f, 0x01, 0x16, 0x18, 0x00, //        o32 lgdt cs:[gdtr - real]
    0x0f, 0x20, 0xc0,                         //        mov eax, cr0
    0x0c, 0x01,                               //        or al, 1            ; PE
    0x0f, 0x22, 0xc0,                         //        mov cr0, eax
    0x66, 0xea, 0x14, 0x01, 0x10, 0x00, 0x08, 0x00, //  jmp dword 8:flat
    0x17, 0x00, 0x1e, 0x80, 0x00, 0x00,       // gdtr:  23, 0x8000 + gdt - real
    0, 0, 0, 0, 0, 0, 0, 0,                   // gdt:   none, flat code, flat data
    0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xcf, 0x00,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x92, 0xcf, 0x00, // end:
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, // halt: mov dword [0xfee000f0], 0x1ff  ; the APIC is on
    0xc7, 0x05, 0x20, 0x03, 0xe0, 0xfe, 0x20, 0x00, 0x02, 0x00, // mov dword [0xfee00320], 0x20020  ; the timer is periodic
    0xc7, 0x05, 0x80, 0x03, 0xe0, 0xfe, 0x00, 0x00, 0x00, 0x10, // mov dword [0xfee00380], 1 << 28
    0xc7, 0x05, 0x80, 0x00, 0xe0, 0xfe, 0xff, 0x00, 0x00, 0x00, // mov dword [0xfee00080], 0xff  ; the task is above all interrupts
    0xfb,                                     //        sti
    0xf4,                                     // sleep: hlt
    0xeb, 0xfd,                               //        jmp sleep
];

/// The guest that touches `pages` pages from guest-physical `base` on, for ever or until it `halts`.
pub fn image(base: u32, pages: u32, halts: bool) -> BuiltIn {
    let mut code = CODE;
    code[BASE_AT..BASE_AT + 4].copy_from_slice(&base.to_le_bytes());
    code[PAGES_AT..PAGES_AT + 4].copy_from_slice(&pages.to_le_bytes());
    if halts {
        code[AGAIN_AT] = TO_HALT;
    }
    let mut bytes = headers();
    bytes.extend(code);
    BuiltIn { name: if halts { "halt" } else { "touch" }, bytes }
}

/// All that stands before the code. See: System V ABI, chapters 4 and 5; Multiboot specification 0.6.96, section 3.1.
fn headers() -> Vec<u8> {
    const MULTIBOOT: [u32; 3] = [0x1bad_b002, 0, 0u32.wrapping_sub(0x1bad_b002)];
    let size = (HEADERS + CODE.len()) as u32;
    // Magic; 32 bits, little endian, version 1; then ET_EXEC, EM_386.
    let ident = [0x464c_457f, 0x0001_0101, 0, 0, 0x0003_0002, 1];
    // Entry; program headers at 52; no sections; no flags; sizes 52 and 32, two of the latter.
    let rest = [LOAD + HEADERS as u32, 52, 0, 0, 32 << 16 | 52, 40 << 16 | 2, 0];
    let load = [1, 0, LOAD, LOAD, size, size, 7, PAGE_SIZE as u32];
    let note = [4, 116, 0, 0, 28, 0, 4, 4];
    // Name and descriptor have 6 and 8 bytes.
    let kernel = [abi::NOTE_NAME.len() as u32 + 1, 8, abi::NOTE_TYPE_KERNEL];
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let mut name = abi::NOTE_NAME.as_bytes().to_vec();
    name.resize(8, 0);
    let descriptor = [abi::NOTE_VERSION, abi::NOTE_FLAG_CLEAN];
    let mut bytes = [
        words(&ident),
        words(&rest),
        words(&load),
        words(&note),
        words(&kernel),
        name,
        words(&descriptor),
        words(&MULTIBOOT),
    ]
    .concat();
    bytes.resize(HEADERS, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Image;

    #[test]
    fn it_is_a_kernel_that_may_run_natively() {
        let guest = image(0x20_0000, 77, false);
        let image = Image::parse(&guest.bytes).expect("a Multiboot1 kernel");
        assert_eq!(image.entry(), LOAD + HEADERS as u32);
        assert!(image.notes().kernel.is_some_and(|kernel| kernel.clean));
        let code = &guest.bytes[HEADERS..];
        assert_eq!((code[BASE_AT - 1], code[PAGES_AT - 1]), (0xbe, 0xb9), "the immediates of two moves");
        assert_eq!(code[PAGES_AT..PAGES_AT + 4], 77u32.to_le_bytes());
        assert_eq!(code[AGAIN_AT - 1..=AGAIN_AT], [0xeb, 0xe9], "a short jump");
        let halt = AGAIN_AT + 1 + usize::from(TO_HALT);
        assert_eq!((code[halt], code[code.len() - 3]), (0xc7, 0xf4), "to the code that halts");
    }
}
