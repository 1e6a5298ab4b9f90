//! The smallest guests: Multiboot1 images of a few instructions, written byte by byte.
//!
//! They need no compiler and no guest kernel, so a test says exactly what the machine does and nothing more. The
//! images use the "a.out kludge" of the Multiboot specification (its section 3.1.3): the header itself says where to
//! load and where to start. Code runs in 32-bit protected mode, flat, paging off, interrupts off.

/// Where the images are loaded and where their header is.
const LOAD: u32 = 0x10_0000;
/// The header's size in bytes; the code follows.
const HEADER: u32 = 32;
/// Where the code of an image is.
pub const CODE: u32 = LOAD + HEADER;
/// Multiboot1's magic number and the flag "the address fields are valid".
const MAGIC: u32 = 0x1bad_b002;
const FLAG_ADDRESSES: u32 = 1 << 16;

/// A Multiboot1 image that starts with the first byte of `code`.
pub fn multiboot(code: &[u8]) -> Vec<u8> {
    let checksum = 0u32.wrapping_sub(MAGIC + FLAG_ADDRESSES);
    // Magic, flags, checksum; header_addr, load_addr, load_end_addr (0: the whole file), bss_end_addr, entry_addr.
    let header = [MAGIC, FLAG_ADDRESSES, checksum, LOAD, LOAD, 0, 0, CODE];
    header.iter().flat_map(|word| word.to_le_bytes()).chain(code.iter().copied()).collect()
}

/// Ends through the debug-exit port with `value`: `mov al, value; out 0xf4, al`, then halt for good.
pub fn exit(value: u8) -> Vec<u8> {
    [&[0xb0, value, 0xe6, 0xf4][..], &halt()].concat()
}

/// Prints `text` on the first serial port, awaiting the transmitter before each byte.
pub fn print(text: &[u8]) -> Vec<u8> {
    let byte = |byte: &u8| {
        [
            0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd      line status
            0xec, //                   in al, dx
            0xa8, 0x20, //             test al, 0x20      transmitter empty?
            0x74, 0xfb, //             jz the `in`
            0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
            0xb0, *byte, //            mov al, byte
            0xee,  //                   out dx, al
        ]
    };
    text.iter().flat_map(byte).collect()
}

/// Halts with interrupts off, for ever.
pub fn halt() -> Vec<u8> {
    vec![0xfa, 0xf4, 0xeb, 0xfd] // cli; hlt; jmp the hlt
}

/// Spins for ever.
pub fn spin() -> Vec<u8> {
    vec![0xeb, 0xfe]
}

/// Stores 1 to the first word of three pages from `at` on, prints `text`, and looks at the first two of them for as long as the first
/// is 1; ends through the debug-exit port with what the second was then. It never looks at the third again.
pub fn spin_on(at: u32, text: &[u8]) -> Vec<u8> {
    let pages = [at, at + 0x1000, at + 0x2000].map(u32::to_le_bytes);
    let store = |page: &[u8; 4]| [&[0xc7, 0x05][..], page, &[1, 0, 0, 0]].concat(); // mov dword [page], 1
    let stores: Vec<u8> = pages.iter().flat_map(store).collect();
    // mov eax, [first]; mov edx, [second]
    let loads = [&[0xa1][..], &pages[0], &[0x8b, 0x15], &pages[1]].concat();
    // cmp eax, 1; je the loads; mov al, dl; out 0xf4, al
    let look = [0x83, 0xf8, 0x01, 0x74, 0xf0, 0x88, 0xd0, 0xe6, 0xf4];
    [stores, print(text), loads, look.to_vec(), halt()].concat()
}

/// A fault with an empty interrupt table, then the same again: a triple fault.
pub fn triple_fault() -> Vec<u8> {
    let at = (CODE + 9).to_le_bytes();
    let load_table = [0x0f, 0x01, 0x1d, at[0], at[1], at[2], at[3]]; // lidt [six zero bytes below]
    [&load_table[..], &[0x0f, 0x0b], &[0; 6]].concat() // ud2
}

/// The reset control register: `mov dx, 0xcf9; mov al, 6; out dx, al`, then spin.
pub fn reset_by_port() -> Vec<u8> {
    [&[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee][..], &spin()].concat()
}

/// Has CPU 1 started at a page in low memory, where it stores a word in real mode, and waits for the word.
///
/// The first CPU copies what CPU 1 runs to 0x8000, sends INIT and start-up for page 8 to APIC 1, and polls the word.
pub fn start_second_cpu() -> Vec<u8> {
    const WORD: u8 = 0x5a;
    // mov byte [0x600], WORD; cli; hlt; jmp the hlt: 16-bit code, DS is 0.
    let ap = [0xc6, 0x06, 0x00, 0x06, WORD, 0xfa, 0xf4, 0xeb, 0xfd];
    let mut code = Vec::new();
    for (at, byte) in (0x8000u32..).zip(ap) {
        code.extend([0xc6, 0x05]); // mov byte [at], byte
        code.extend(at.to_le_bytes());
        code.push(byte);
    }
    // APIC 1; then INIT, then start-up at page 8.
    for (register, value) in [(0xfee0_0310u32, 1u32 << 24), (0xfee0_0300, 0x4500), (0xfee0_0300, 0x4608)] {
        code.extend([0xc7, 0x05]); // mov dword [register], value
        code.extend(register.to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    code.extend([0xf3, 0x90]); //                                    pause
    code.extend([0x80, 0x3d, 0x00, 0x06, 0x00, 0x00, WORD]); //      cmp byte [0x600], WORD
    code.extend([0x75, 0xf5]); //                                    jne the pause
    code
}
