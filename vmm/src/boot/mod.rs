//! Booting: Multiboot1 images, what they say about themselves, and the memory they want witnessed.
//!
//! ```text
//!   image ---> header: magic, flags ---> elf: PT_LOAD, notes ---> Image
//!                                 \---> a.out fields         ---/   |
//!   0 ------ 0x9000 ------ 0x9fc00 ... 1 MiB ------------------- ---+------ end of low memory
//!             info block                 kernel | modules, by pages |
//! ```
//!
//! Story: `umbra run` parses the image, checks where everything would go, and only then writes, through a
//! [`GuestMemorySink`] that somebody else implements on the p2m. The vCPU starts from [`Entry`]'s state.
//!
//! Holds: images and guest memory are hostile. Nothing here panics on them, allocates or loops beyond the limits
//! below, or writes outside guest memory; nothing is written at all unless everything fits. No two things that are
//! loaded overlap.
//!
//! Not here: symbols and section headers, drives, the configuration table, APM and video information: their bits in
//! the info structure are clear.
//!
//! See: Multiboot specification 0.6.96.

#![forbid(unsafe_code)]

mod elf;
mod error;
pub mod fuzz;
mod header;
mod image;
mod info;
mod load;
pub mod notes;
mod placement;
pub mod witness;

pub use error::{ImageError, Part};
pub use image::Image;
pub use load::{BootRequest, Entry, GuestMemorySink, MemoryError, Module};

/// The largest image, 256 MiB.
pub const IMAGE_BYTES_MAX: usize = 256 << 20;
/// Where the Multiboot header must lie: within this many bytes from the image's start.
pub const HEADER_SEARCH_BYTES: usize = 8192;
/// The most program headers of an ELF image.
pub const PROGRAM_HEADERS_MAX: usize = 64;
/// The most modules.
pub const MODULES_MAX: usize = 64;
/// The longest command line of the kernel or of a module, without its closing NUL.
pub const COMMAND_LINE_BYTES_MAX: usize = 4096;

#[cfg(test)]
mod tests;
