//! The importer's side for fuzzers: a guest that says what it likes, all of it beforehand, and hangs up.
//!
//! Holds: whatever it is, each call of the library ends, with an error or without, and it does not panic.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use umbra_mmu::PAGE_SIZE;

use super::{Importer, Manners, Rights};
use crate::export::send_with;
use crate::machine::memory_file;

/// Something that the guest says.
#[derive(Clone, Debug)]
pub struct Said {
    /// A message, or none.
    pub bytes: Vec<u8>,
    /// What comes with it.
    pub with: With,
}

/// How something is said.
#[derive(Clone, Copy, Debug)]
pub enum With {
    /// With no descriptor.
    Nothing,
    /// With the importer's end of the line.
    TheLine,
    /// With a file of so many pages.
    File(u16),
    /// By the line.
    ByTheLine,
}

/// What an importer came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Came {
    /// It was welcomed.
    pub welcome: bool,
    /// It has mapped a segment.
    pub attached: bool,
    /// It has read a page.
    pub read: bool,
}

/// An importer that asks for one thing of each kind, of a guest that says these.
///
/// # Errors
///
/// When the host has no descriptors or no memory.
pub fn import_from(said: &[Said]) -> io::Result<Came> {
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let ((ours, guest), (line, guests_line)) = (pair()?, pair()?);
    for Said { bytes, with } in said {
        // What there is no room for is not said.
        let _ = match with {
            With::Nothing => send(&guest, bytes),
            With::ByTheLine => send(&guests_line, bytes),
            With::TheLine => send_with(&guest, bytes, &line),
            With::File(pages) => send_with(&guest, bytes, &file(*pages)?),
        };
    }
    drop(line);
    for socket in [&guest, &guests_line] {
        shutdown(socket, Shutdown::Write)?;
    }
    let mut came = Came::default();
    let Ok(importer) = Importer::greet(ours, Manners::default()) else { return Ok(came) };
    came.welcome = true;
    let segment = importer.make(16, 8, true).unwrap_or(1);
    let Ok(access) = importer.get(segment, true) else { return Ok(came) };
    let (first, pages) = (access.first, access.pages);
    let Ok(attachment) = importer.attach(&access, first, pages) else { return Ok(came) };
    came.attached = true;
    came.read = attachment.read(first, 0, &mut [0; 8]).is_ok();
    let granted = attachment.fault(first, pages, Rights::Write).unwrap_or(0);
    assert!(granted <= pages && attachment.granted() <= pages as usize, "more is granted than there is");
    // Each may fail, and none may do more than that.
    let _ = attachment.write(first, 8, &[1]);
    let _ = attachment.give_up(first, pages);
    let _ = importer.snapshot(&access, first, pages);
    let _ = importer.sum(&access, first);
    drop(attachment);
    let _ = importer.release(access);
    let _ = importer.remove(segment);
    Ok(came)
}

fn send(socket: &OwnedFd, bytes: &[u8]) -> rustix::io::Result<usize> {
    rustix::net::send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

fn file(pages: u16) -> io::Result<OwnedFd> {
    Ok(memory_file(c"fuzz", u64::from(pages) * PAGE_SIZE)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::protocol::{Reply, VERSION};

    const WELCOME: Reply =
        Reply::Welcome { version: VERSION, importer: 1, deadline_micros: 100, requests_max: 16 };

    fn say(tag: u64, reply: &Reply, with: With) -> Said {
        Said { bytes: reply.encode(tag), with }
    }

    /// A guest with a segment of these pages, and a file of so many.
    fn guest(first: u32, pages: u32, file: u16) -> Vec<Said> {
        vec![
            say(1, &WELCOME, With::TheLine),
            say(2, &Reply::Made { segment: 1 }, With::Nothing),
            say(3, &Reply::Got { access: 1, first, pages, writable: true }, With::File(file)),
            say(4, &Reply::Attached { attachment: 2 }, With::Nothing),
            say(5, &Reply::Granted { order: 7, pages: 1 }, With::Nothing),
        ]
    }

    #[test]
    fn a_guest_that_hangs_up_is_not_read_from_whatever_it_has_said_before() {
        let came = import_from(&guest(16, 8, 8)).expect("descriptors");
        assert_eq!(came, Came { welcome: true, attached: true, read: false });
        let mut said = guest(16, 8, 8);
        said.push(say(0, &Reply::Invalidate { order: 9, pages: vec![16] }, With::ByTheLine));
        assert!(!import_from(&said).expect("descriptors").read);
    }

    #[test]
    fn a_segment_that_makes_no_sense_is_not_attached() {
        for (first, pages, file) in [(16, 8, 7), (16, 0, 8), (u32::MAX, 8, 8), (16, u32::MAX, 9)] {
            let came = import_from(&guest(first, pages, file)).expect("descriptors");
            assert_eq!(came, Came { welcome: true, ..Came::default() }, "{first} {pages} {file}");
        }
        assert_eq!(import_from(&[]).expect("descriptors"), Came::default());
    }
}
