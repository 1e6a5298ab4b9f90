//! The client's side of the control socket: what `umbra explain` does, and what `umbra pressure` is made of.
//!
//! Holds: a server that is slow, silent or hostile costs [`PATIENCE`] for the connection and each question, and [`ANSWER_MAX`] bytes,
//! and nothing that it sends reaches the terminal but printable text. An answer is that of the question under way, by its `id`:
//! one that comes too late is passed over.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use super::control::{ANSWER_WAIT, OUTPUT_MAX};

/// How long a question and its answer may take.
pub const PATIENCE: Duration = ANSWER_WAIT.saturating_mul(3);
/// The longest line that is taken from a server.
pub const ANSWER_MAX: usize = OUTPUT_MAX;

/// A connection to a guest that has greeted us: commands may be sent.
pub struct Connection<'a> {
    stream: UnixStream,
    path: &'a Path,
    received: Vec<u8>,
    patience: Duration,
    /// Of the question that is under way.
    deadline: Instant,
    /// And its `id`.
    asked: u64,
}

/// What a server says that does not do a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// QMP's class of the error.
    pub class: String,
    /// The sentence.
    pub desc: String,
}

/// Asks the guest behind `socket` why `gva` is mapped as it is on `vcpu`.
///
/// # Errors
///
/// A sentence that says what went wrong and what to do.
pub fn ask_explain(socket: &Path, vcpu: u32, gva: u32) -> Result<Vec<String>, String> {
    ask(socket, vcpu, gva, PATIENCE)
}

fn ask(socket: &Path, vcpu: u32, gva: u32, patience: Duration) -> Result<Vec<String>, String> {
    let mut connection = Connection::open(socket, patience, patience)?;
    let answer = connection.call("x-explain", &json!({ "gva": gva, "vcpu": vcpu }))?;
    let lines = answer.pointer("/lines").and_then(Value::as_array);
    let lines = lines.ok_or_else(|| format!("{} sent no explanation; is it Umbra's?", socket.display()))?;
    Ok(lines.iter().filter_map(Value::as_str).map(printable).collect())
}

impl Connection<'_> {
    /// Connects, and takes the greeting, all of it in `limit`. Each question may take `patience` from then on.
    ///
    /// # Errors
    ///
    /// A sentence that says what went wrong and what to do.
    pub fn open(path: &Path, limit: Duration, patience: Duration) -> Result<Connection<'_>, String> {
        let deadline = Instant::now() + limit;
        let stream = connect(path, limit).map_err(|error| {
            let path = path.display();
            format!(
                "cannot connect to {path}: {error}; is a guest running that was started with --qmp {path}?"
            )
        })?;
        let mut connection = Connection { stream, path, received: Vec::new(), patience, deadline, asked: 0 };
        let greeting = connection.receive()?;
        if let Some(desc) = greeting.pointer("/error/desc").and_then(Value::as_str) {
            return Err(printable(desc));
        }
        connection.exchange("qmp_capabilities", &json!({}))?.map_err(|refused| refused.desc)?;
        Ok(connection)
    }

    /// Sends a command and returns what its answer returns; events that come in between are passed over.
    ///
    /// # Errors
    ///
    /// A sentence: the server's own where it refuses, else what went wrong.
    pub fn call(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        self.try_call(command, arguments)?.map_err(|refused| refused.desc)
    }

    /// The same, where the server's refusal is an answer too.
    ///
    /// # Errors
    ///
    /// A sentence that says why there is no answer.
    pub fn try_call(&mut self, command: &str, arguments: &Value) -> Result<Result<Value, Refused>, String> {
        self.deadline = Instant::now() + self.patience;
        self.exchange(command, arguments)
    }

    fn exchange(&mut self, command: &str, arguments: &Value) -> Result<Result<Value, Refused>, String> {
        self.asked += 1;
        let command = json!({"execute": command, "arguments": arguments, "id": self.asked});
        let sent = self.time_left().and_then(|left| {
            self.stream.set_write_timeout(Some(left))?;
            self.stream.write_all(format!("{command}\n").as_bytes())
        });
        sent.map_err(|error| self.failed("writing to", &error))?;
        loop {
            let mut answer = self.receive()?;
            // Another's, or an event, which has none.
            if answer["id"] != self.asked {
                continue;
            }
            if let Some(desc) = answer.pointer("/error/desc").and_then(Value::as_str) {
                let class = answer.pointer("/error/class").and_then(Value::as_str).unwrap_or_default();
                return Ok(Err(Refused { class: printable(class), desc: printable(desc) }));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(Ok(value.take()));
            }
        }
    }

    /// The next line, as JSON.
    fn receive(&mut self) -> Result<Value, String> {
        let line = self.line().map_err(|error| self.failed("reading from", &error))?;
        serde_json::from_slice(&line)
            .map_err(|error| format!("{} sent no JSON: {error}", self.path.display()))
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut buffer = [0; 4096];
        let mut seen = 0;
        loop {
            if let Some(end) = self.received[seen..].iter().position(|byte| *byte == b'\n') {
                return Ok(self.received.drain(..=seen + end).collect());
            }
            seen = self.received.len();
            if seen > ANSWER_MAX {
                return Err(io::Error::other(format!("a line of more than {ANSWER_MAX} bytes")));
            }
            self.stream.set_read_timeout(Some(self.time_left()?))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                // A signal is looked at between two questions.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn time_left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }

    fn failed(&self, what: &str, error: &io::Error) -> String {
        let path = self.path.display();
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                format!("{path} did not answer in time; is the guest being debugged or stopped?")
            }
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                format!("{path} closed the connection; has the guest ended?")
            }
            _ => format!("{what} {path}: {error}"),
        }
    }
}

/// Connects, unless so many others wait for it already that it takes too long.
fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket: OwnedFd =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(rustix::io::Errno::AGAIN) => Err(io::Error::other("it takes no connection in time")),
        done => Ok(done.map(|()| UnixStream::from(socket))?),
    }
}

/// A server's text without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    const SHORT: Duration = Duration::from_millis(200);
    /// For what is not about time: no busy host takes so long.
    const LONG: Duration = Duration::from_secs(30);

    fn asked(text: &'static str) -> Result<Vec<String>, String> {
        asked_for(LONG, text, None)
    }

    /// What `ask` says of a server that sends `text` at once, and then `more` again and again.
    fn asked_for(
        patience: Duration,
        text: &'static str,
        more: Option<&'static [u8]>,
    ) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("a socket");
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = stream.write_all(text.as_bytes());
            while more.is_some_and(|more| stream.write_all(more).is_ok()) {
                thread::sleep(Duration::from_micros(100));
            }
            // Until the client goes.
            let _ = io::copy(&mut stream, &mut io::sink());
        });
        let result = ask(&path, 0, 0x1000, patience);
        server.join().expect("the server");
        result
    }

    #[test]
    fn an_explanation_is_found_behind_events_and_made_printable() {
        let lines = asked(
            "{\"QMP\":{}}\n{\"event\":\"X\"}\n{\"return\":{},\"id\":1}\n\
             {\"return\":{\"lines\":[\"a\\u001b[2Jb\",7]},\"id\":2}\n",
        );
        assert_eq!(lines, Ok(vec!["a\u{fffd}[2Jb".to_owned()]));
    }

    #[test]
    fn an_answer_to_another_question_is_passed_over() {
        let lines = asked(
            "{}\n{\"return\":{},\"id\":1}\n{\"return\":{\"lines\":[\"late\"]},\"id\":1}\n\
             {\"error\":{\"desc\":\"late\"},\"id\":\"2\"}\n{\"return\":{\"lines\":[\"ours\"]},\"id\":2}\n",
        );
        assert_eq!(lines, Ok(vec!["ours".to_owned()]));
    }

    /// One that accepts nobody, and has as many waiting as it has room for.
    #[test]
    fn a_server_that_takes_nobody_costs_its_time_and_no_more() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("a socket");
        rustix::net::listen(&listener, 0).expect("less room");
        let begun = Instant::now();
        let waiting = UnixStream::connect(&path).expect("room for one");
        let refused = ask(&path, 0, 0, SHORT);
        assert!(refused.is_err_and(|text| text.contains("cannot connect") && text.contains("in time")));
        assert!(begun.elapsed() < Duration::from_secs(20));
        drop(waiting);
    }

    #[test]
    fn a_server_that_is_not_ours_gets_a_sentence() {
        assert!(asked("hello\n").is_err_and(|text| text.contains("no JSON")));
        let refused = asked("{}\n{\"error\":{\"desc\":\"no\"},\"id\":1}\n");
        assert_eq!(refused, Err("no".to_owned()));
        let strange = asked("{}\n{\"return\":{},\"id\":1}\n{\"return\":[],\"id\":2}\n");
        assert!(strange.is_err_and(|text| text.contains("no explanation")));
    }

    #[test]
    fn a_server_that_dribbles_or_is_silent_costs_its_time_and_no_more() {
        let begun = Instant::now();
        assert!(asked_for(SHORT, "", None).is_err_and(|text| text.contains("in time")));
        assert!(asked_for(SHORT, "", Some(b" ")).is_err_and(|text| text.contains("in time")));
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_server_that_floods_is_cut_off() {
        const FLOOD: [u8; 8192] = [b'x'; 8192];
        assert!(asked_for(LONG, "", Some(&FLOOD)).is_err());
    }

    #[test]
    fn no_server_says_how_to_start_one() {
        let missing = ask(Path::new("/nonexistent/s"), 0, 0, SHORT);
        assert!(missing.is_err_and(|text| text.contains("--qmp")));
    }
}
