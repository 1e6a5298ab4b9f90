//! Disks on files: what is one, who has it, what it is called.

use std::fs::{self, File};
use std::num::NonZeroU32;

use tempfile::{TempDir, tempdir};

use super::super::disk::{Disk, DiskError, DiskSource, DiskSpec, parse_disk};

fn image(directory: &TempDir, name: &str, bytes: u64) -> DiskSpec {
    let path = directory.path().join(name);
    File::create(&path).and_then(|file| file.set_len(bytes)).expect("a file");
    DiskSpec { source: DiskSource::File(path), read_only: false, id: None, write_errors: None }
}

fn open(spec: &DiskSpec) -> Result<Disk, DiskError> {
    Ok(Disk::open_all(std::slice::from_ref(spec))?.remove(0))
}

fn words(spec: &DiskSpec) -> String {
    open(spec).err().expect("refused").to_string()
}

#[test]
fn a_disk_is_a_file_or_a_size_with_options() {
    let disk = |source, read_only, id: Option<&str>| DiskSpec {
        source,
        read_only,
        id: id.map(Into::into),
        write_errors: None,
    };
    let file = |path: &str| DiskSource::File(path.into());
    assert_eq!(parse_disk("root.img"), Ok(disk(file("root.img"), false, None)));
    assert_eq!(parse_disk("./64M,ro,id=a b"), Ok(disk(file("./64M"), true, Some("a b"))));
    assert_eq!(parse_disk("64M,id=x"), Ok(disk(DiskSource::Memory(64 << 20), false, Some("x"))));
    let failing = DiskSpec { write_errors: NonZeroU32::new(9), ..disk(file("a"), false, None) };
    assert_eq!(parse_disk("a,write-errors=9"), Ok(failing));
    for (text, word) in [
        ("", "name a file"),
        (",ro", "name a file"),
        ("0", "at least a sector"),
        ("1000", "whole number of sectors"),
        ("64MB", "./64MB"),
        ("64M,ro", "leave out ro"),
        ("a,rw", "no option"),
        ("a,id=", "no name"),
        ("a,id=123456789012345678901", "20 printable"),
        ("a,id=\u{e4}", "no name"),
        ("a,id=x\ty", "no name"),
        ("64M,write-errors=0", "no number of writes"),
        ("64M,write-errors=", "no number of writes"),
        ("64M,write-errors", "no option"),
        ("a,write-errors=4,ro", "leave out ro"),
    ] {
        let error = parse_disk(text).expect_err(text);
        assert!(error.contains(word), "'{text}': {error}");
    }
}

#[test]
fn names_are_given_in_order_and_no_two_are_the_same() {
    let memory = |id: Option<&str>| DiskSpec {
        source: DiskSource::Memory(512),
        read_only: false,
        id: id.map(Into::into),
        write_errors: None,
    };
    let disks = Disk::open_all(&[memory(None), memory(Some("x")), memory(None)]).expect("memory");
    assert_eq!(disks.iter().map(Disk::id).collect::<Vec<_>>(), ["disk0", "x", "disk2"]);
    let same = Disk::open_all(&[memory(Some("disk1")), memory(None)]).err().expect("refused");
    assert!(same.to_string().contains("'disk1'"), "{same}");
    let many = Disk::open_all(&vec![memory(None); 9]).err().expect("refused");
    assert!(many.to_string().contains("at most 8"), "{many}");
}

#[test]
fn what_is_no_disk_is_refused_in_a_sentence() {
    let directory = tempdir().expect("a directory");
    let of = |path: &std::path::Path| DiskSpec {
        source: DiskSource::File(path.into()),
        read_only: true,
        id: None,
        write_errors: None,
    };
    assert!(words(&image(&directory, "short", 1000)).contains("1000 bytes"));
    assert!(words(&image(&directory, "empty", 0)).contains("0 bytes"));
    assert!(words(&of(directory.path())).contains("neither a file nor a block device"));
    assert!(words(&of("/dev/null".as_ref())).contains("neither a file nor a block device"));
    assert!(words(&of(&directory.path().join("nothing"))).contains("truncate"));
}

#[test]
fn two_may_read_a_disk_and_one_may_write_to_it() {
    let directory = tempdir().expect("a directory");
    let spec = image(&directory, "disk", 1024);
    let reader = DiskSpec { read_only: true, ..spec.clone() };
    let writing = open(&spec).expect("free");
    assert!(words(&spec).contains("in use by another") && words(&reader).contains("in use by another"));
    drop(writing);
    let reading = (open(&reader).expect("free"), open(&reader).expect("shared"));
    assert!(words(&spec).contains("in use by another"));
    drop(reading);
    open(&spec).expect("free again");
}

#[test]
fn a_disk_keeps_what_is_written_and_gives_back_what_is_discarded() {
    let directory = tempdir().expect("a directory");
    let spec = image(&directory, "disk", 1 << 20);
    let memory =
        DiskSpec { source: DiskSource::Memory(1 << 20), read_only: false, id: None, write_errors: None };
    for spec in [&spec, &memory] {
        let disk = open(spec).expect("a disk");
        assert_eq!(disk.sectors(), 2048);
        disk.write(0, &[7; 0x10000]).expect("written");
        disk.sync().expect("synced");
        disk.discard(0, 64).expect("discarded");
        disk.write_zeroes(64, 3, true).expect("zeroed");
        disk.write_zeroes(70, 1, false).expect("zeroed");
        let mut back = vec![1; 0x10000];
        disk.read(0, &mut back).expect("read");
        let zeros = |from: usize, to: usize| back[from * 512..to * 512].iter().all(|byte| *byte == 0);
        // That holes can be had is the filesystem's affair.
        assert!(zeros(64, 67) && zeros(70, 71) && back[67 * 512] == 7 && back[71 * 512] == 7);
        assert!(disk.read(2047, &mut [0; 1024]).is_err(), "a short read is an error");
    }
}

#[test]
fn a_file_that_has_become_short_is_an_error_and_one_that_is_only_read_stays_as_it_is() {
    let directory = tempdir().expect("a directory");
    let spec = DiskSpec { read_only: true, ..image(&directory, "disk", 4096) };
    let disk = open(&spec).expect("a disk");
    assert!(disk.write(0, &[1; 512]).is_err() && disk.discard(0, 1).is_err());
    assert!(disk.write_zeroes(0, 1, true).is_err() && disk.sync().is_ok());
    let DiskSource::File(path) = &spec.source else { unreachable!() };
    assert_eq!(fs::read(path).expect("there"), [0; 4096]);
    File::options().write(true).open(path).and_then(|file| file.set_len(512)).expect("cut");
    assert!(disk.read(0, &mut [0; 512]).is_ok() && disk.read(0, &mut [0; 1024]).is_err());
}

#[test]
fn a_disk_that_is_to_fail_fails_each_so_many_writes_and_nothing_else() {
    let disk =
        Disk::in_memory(1 << 20, "disk".into()).expect("memory").failing(NonZeroU32::new(3).expect("3"));
    let written: Vec<bool> = (0..7).map(|sector| disk.write(sector, &[7; 512]).is_ok()).collect();
    assert_eq!(written, [true, true, false, true, true, false, true]);
    let mut back = [0; 7 * 512];
    disk.read(0, &mut back).expect("read");
    let there: Vec<bool> = back.chunks(512).map(|sector| sector == [7; 512]).collect();
    assert_eq!(there, written, "a write that failed has changed nothing");
    assert!(disk.sync().is_ok() && disk.discard(0, 1).is_ok() && disk.write_zeroes(1, 1, true).is_ok());
}
