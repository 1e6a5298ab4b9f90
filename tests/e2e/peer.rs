//! What we take for granted of QEMU's `microvm`, tested before anything is compared with it.
//!
//! When one of these fails, QEMU changed or the harness is wrong, and a difference elsewhere says nothing of Umbra.

use std::io::Write;

use libtest_mimic::Trial;
use tempfile::NamedTempFile;

use crate::ensure;
use crate::support::host::Need;
use crate::support::process::End;
use crate::support::{Verdict, case, image, qemu};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    vec![
        case("peer_exit_port_write_v_ends_with_2v_plus_1", &[Need::Qemu], exit_port),
        case("peer_serial_bytes_come_out_unchanged", &[Need::Qemu], serial),
        case("peer_triple_fault_ends_the_run", &[Need::Qemu], triple_fault),
    ]
}

fn boot(code: &[u8]) -> Result<crate::support::process::Outcome, String> {
    let mut file = NamedTempFile::new().map_err(|error| format!("no temporary file: {error}"))?;
    file.write_all(&image::multiboot(code)).map_err(|error| format!("cannot write the image: {error}"))?;
    qemu::run(file.path(), "", "64M")
}

fn exit_port() -> Verdict {
    for value in [0, 1, 3, 127] {
        let run = boot(&image::exit(value))?;
        let want = End::Status(i32::from(value) << 1 | 1);
        ensure!(run.end == want, "wrote {value}, expected {want:?}:\n{run}");
    }
    Ok(())
}

fn serial() -> Verdict {
    let bytes: Vec<u8> = (0..=255).collect();
    let run = boot(&[image::print(&bytes), image::exit(0)].concat())?;
    ensure!(run.stdout == bytes, "{} bytes came out, and not the 256 that went in:\n{run}", run.stdout.len());
    Ok(())
}

fn triple_fault() -> Verdict {
    let run = boot(&image::triple_fault())?;
    ensure!(run.end == End::Status(0), "with -no-reboot a reset ends QEMU with status 0:\n{run}");
    Ok(())
}
