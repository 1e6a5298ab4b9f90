//! Peers in C: small programs that do by the kernel's own means what Umbra does by its own.
//!
//! Story: the source is compiled when the bench starts, and the program runs beside it: it reads a count a line, does so
//! many operations and answers with the nanoseconds of one. So Umbra and its peer take turns within one run, and the
//! machine's drift hits both alike.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A running peer; dropping it ends it.
#[derive(Debug)]
pub struct CPeer {
    child: Child,
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    program: PathBuf,
}

impl CPeer {
    /// Compiles `benches/peers/NAME.c` and starts it with `arguments`.
    ///
    /// # Errors
    ///
    /// A sentence: there is no compiler, or the program does not start.
    pub fn start(name: &str, arguments: &[&str]) -> Result<CPeer, String> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("peers/{name}.c"));
        let program = std::env::temp_dir().join(format!("umbra-peer-{name}-{}", std::process::id()));
        let built = Command::new("cc")
            .args(["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
            .args([&program, &source])
            .output()
            .map_err(|error| format!("no C compiler: {error}"))?;
        if !built.status.success() {
            return Err(format!("{}: {}", source.display(), String::from_utf8_lossy(&built.stderr).trim()));
        }
        let mut child = Command::new(&program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        let (questions, answers) = (child.stdin.take(), child.stdout.take());
        let answers = answers.ok_or("the peer has no output")?;
        Ok(CPeer { child, questions, answers: BufReader::new(answers), program })
    }

    /// Has it do `count` operations: nanoseconds of one.
    ///
    /// # Errors
    ///
    /// What the peer said, where it has ended instead.
    pub fn ask(&mut self, count: u32) -> Result<f64, String> {
        let mut answer = String::new();
        let asked = self.questions.as_mut().map(|questions| writeln!(questions, "{count}"));
        let read = self.answers.read_line(&mut answer);
        match (asked, read, answer.trim().parse()) {
            (Some(Ok(())), Ok(_), Ok(nanos)) => Ok(nanos),
            _ => Err(self.last_words()),
        }
    }

    fn last_words(&mut self) -> String {
        let mut words = String::new();
        // Its end closes the pipe; what it has said is all there is.
        drop(self.questions.take());
        if let Some(errors) = &mut self.child.stderr {
            let _ = errors.read_to_string(&mut words);
        }
        format!("the peer gave up: {}", words.trim())
    }
}

impl Drop for CPeer {
    fn drop(&mut self) {
        drop(self.questions.take());
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.program);
    }
}
