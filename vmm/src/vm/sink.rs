//! The files that a run leaves: its summary and its plot.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{RunError, Summary};
use crate::cli::RunArgs;
use crate::output::OutputFile;
use crate::plot;

/// Where the summary goes.
#[derive(Debug)]
pub struct JsonSink {
    path: PathBuf,
    /// `None` for standard error.
    file: Option<OutputFile>,
}

impl JsonSink {
    /// Opens `path`, "-" being standard error.
    ///
    /// # Errors
    ///
    /// When the file cannot be made.
    pub fn open(path: &Path) -> Result<JsonSink, RunError> {
        let failed = |source| RunError::Json { path: path.to_owned(), source };
        let is_stderr = path == Path::new("-");
        let file = if is_stderr { None } else { Some(OutputFile::open(path).map_err(failed)?) };
        Ok(JsonSink { path: path.to_owned(), file })
    }

    /// Writes the summary.
    ///
    /// # Errors
    ///
    /// When the file does not take it.
    pub fn write(&mut self, summary: &Summary) -> Result<(), RunError> {
        let failed = |source| RunError::Json { path: self.path.clone(), source };
        let mut text = serde_json::to_string_pretty(summary).map_err(|e| failed(e.into()))?;
        text.push('\n');
        match &mut self.file {
            Some(file) => file.replace(text.as_bytes()),
            None => io::stderr().write_all(text.as_bytes()),
        }
        .map_err(failed)
    }
}

/// Where the plot goes.
#[derive(Debug)]
pub struct PlotSink {
    path: PathBuf,
    file: OutputFile,
}

impl PlotSink {
    /// Opens `path`.
    ///
    /// # Errors
    ///
    /// When the file cannot be made.
    pub fn open(path: &Path) -> Result<PlotSink, RunError> {
        let file =
            OutputFile::open(path).map_err(|source| RunError::Plot { path: path.to_owned(), source })?;
        Ok(PlotSink { path: path.to_owned(), file })
    }

    /// Draws the series of a run with `args`.
    ///
    /// # Errors
    ///
    /// When the file does not take it.
    pub fn write(&mut self, args: &RunArgs, summary: &Summary) -> Result<(), RunError> {
        let samples = summary.series.as_ref().map_or(&[][..], |series| series.samples());
        self.write_image(&plot::svg(samples, &title(args, summary)))
    }

    /// Writes a picture.
    ///
    /// # Errors
    ///
    /// When the file does not take it.
    pub fn write_image(&mut self, image: &str) -> Result<(), RunError> {
        let written = self.file.replace(image.as_bytes());
        written.map_err(|source| RunError::Plot { path: self.path.clone(), source })
    }
}

/// What ran, and how it ended.
fn title(args: &RunArgs, summary: &Summary) -> String {
    let image = args.image.as_deref().and_then(Path::file_name);
    let image = image.map_or("pager".into(), |name| name.to_string_lossy());
    let guest = format!("{image} {}", args.append);
    format!("{} ({}, {})", guest.trim_end(), summary.backend, summary.verdict)
}
