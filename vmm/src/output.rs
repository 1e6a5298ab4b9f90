//! The files that a command leaves.
//!
//! Story: they are opened before its work, so that a wrong path costs none. What is in one stays until there is something to put in its
//! place: a command that fails takes no earlier result with it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::path::Path;

/// One of them.
#[derive(Debug)]
pub struct OutputFile(File);

impl OutputFile {
    /// Opens the file, or makes an empty one.
    ///
    /// # Errors
    ///
    /// When neither can be done.
    pub fn open(path: &Path) -> io::Result<OutputFile> {
        OpenOptions::new().write(true).create(true).truncate(false).open(path).map(OutputFile)
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
        OutputFile::open("/dev/null".as_ref()).expect("there").replace(b"gone").expect("taken");
        assert!(OutputFile::open(&directory.path().join("no/result")).is_err());
    }
}
