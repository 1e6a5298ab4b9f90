//! The files that a command leaves.
//!
//! Story: they are opened before its work, so that a wrong path costs none. What is in one stays until there is something to put in its
//! place: a command that fails takes no earlier result with it. Each is one option's of one command, for as long as that runs.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, Write};
use std::path::Path;

/// One of them, with an advisory lock (flock) where it is a file.
#[derive(Debug)]
pub struct OutputFile(File);

impl OutputFile {
    /// Opens the file, or makes an empty one.
    ///
    /// # Errors
    ///
    /// When neither can be done, or somebody else has it.
    pub fn open(path: &Path) -> io::Result<OutputFile> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        // A file system without locks has one writer less to tell apart.
        if file.metadata()?.is_file() && matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            let why = "another option, or another command that runs, writes to the same file";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, why));
        }
        Ok(OutputFile(file))
    }

    /// Puts `bytes` in the place of what is there; behind what was sent before, where it is a pipe or a terminal.
    ///
    /// # Errors
    ///
    /// When the file does not take them.
    pub fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let mut file = &self.0;
        if file.metadata()?.is_file() {
            file.set_len(0)?;
            file.rewind()?;
        }
        file.write_all(bytes)
    }

    /// Puts `bytes` behind what was put there last.
    ///
    /// # Errors
    ///
    /// When the file does not take them.
    pub fn append(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.0).write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_file_stays_until_something_takes_its_place() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("result");
        std::fs::write(&path, "a long result of before").expect("written");
        let file = OutputFile::open(&path).expect("there");
        assert_eq!(std::fs::read(&path).expect("there"), b"a long result of before");
        for bytes in [&b"short"[..], b"and again"] {
            file.replace(bytes).expect("taken");
            assert_eq!(std::fs::read(&path).expect("there"), bytes);
        }
        file.append(b" and more").expect("taken");
        assert_eq!(std::fs::read(&path).expect("there"), b"and again and more");
        OutputFile::open("/dev/null".as_ref()).expect("there").replace(b"gone").expect("taken");
        assert!(OutputFile::open(&directory.path().join("no/result")).is_err());
    }

    #[test]
    fn a_file_is_nobody_elses_until_it_is_let_go() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("result");
        let file = OutputFile::open(&path).expect("made");
        let refused = OutputFile::open(&path).expect_err("two would write to it");
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        drop(file);
        OutputFile::open(&path).expect("free");
        let null = || OutputFile::open("/dev/null".as_ref()).expect("for everybody");
        let _both = (null(), null());
    }
}
