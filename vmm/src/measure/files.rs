//! The files that a measurement leaves. They are opened before the run, so that a wrong path costs no run.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{Order, Report};

/// A file could not be written, or read.
#[derive(Debug, thiserror::Error)]
#[error("{option} {}: {source}; {remedy}", path.display())]
pub struct FileError {
    option: &'static str,
    path: PathBuf,
    remedy: &'static str,
    source: io::Error,
}

const WRITE: &str = "name a file in a folder that exists and that you may write to";

/// One of them.
#[derive(Debug)]
struct Sink {
    option: &'static str,
    path: PathBuf,
    /// `None` for standard error.
    file: Option<File>,
}

impl Sink {
    fn open(option: &'static str, path: &Path) -> Result<Sink, FileError> {
        let failed = |source| FileError { option, path: path.into(), remedy: WRITE, source };
        let is_stderr = path == Path::new("-");
        let file = if is_stderr { None } else { Some(File::create(path).map_err(failed)?) };
        Ok(Sink { option, path: path.into(), file })
    }

    fn write(&self, bytes: &[u8]) -> Result<(), FileError> {
        let written = match &self.file {
            Some(file) => { file }.write_all(bytes),
            None => io::stderr().write_all(bytes),
        };
        written.map_err(|source| FileError {
            option: self.option,
            path: self.path.clone(),
            remedy: WRITE,
            source,
        })
    }
}

/// All of them.
#[derive(Debug)]
pub struct Files {
    json: Option<Sink>,
}

impl Files {
    /// Opens, and empties, what `order` names.
    ///
    /// # Errors
    ///
    /// When one cannot be made.
    pub fn open(order: &Order) -> Result<Files, FileError> {
        Ok(Files { json: order.json.as_deref().map(|path| Sink::open("--json", path)).transpose()? })
    }

    /// Writes them.
    ///
    /// # Errors
    ///
    /// When one does not take it.
    pub fn write(&self, report: &Report) -> Result<(), FileError> {
        if let Some(json) = &self.json {
            let failed = |source: serde_json::Error| FileError {
                option: json.option,
                path: json.path.clone(),
                remedy: WRITE,
                source: source.into(),
            };
            let mut text = serde_json::to_string_pretty(report).map_err(failed)?;
            text.push('\n');
            json.write(text.as_bytes())?;
        }
        Ok(())
    }
}
