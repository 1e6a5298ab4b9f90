//! The control socket: QMP, as far as there is something to control.
//!
//! Story: a subscriber of the event loop. It greets each client, takes one JSON object a line, and answers in QMP's
//! shape: a greeting, `qmp_capabilities` first, `return` or `error` with the command's `id` echoed.
//!
//! Holds: a client that is slow, silent or hostile costs its own connection. Reads and writes never block; a client
//! that does not read its answers is dropped.
//!
//! Limits: [`CLIENTS_MAX`] clients, [`LINE_MAX`] bytes a line, [`ANSWER_WAIT`] for a vCPU's answer.
//!
//! See: QEMU, docs/interop/qmp-spec.rst.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde_json::{Value, json};
use umbra_mmu::Gva;

use super::devices::Devices;
use super::ending::{End, Ending};
use super::events::add;
use super::requests::{Request, Requests};

/// The most clients at once; more are turned away.
pub const CLIENTS_MAX: usize = 8;
/// The longest line a client may send.
pub const LINE_MAX: usize = 64 << 10;
/// How long a vCPU may take to answer a question.
pub const ANSWER_WAIT: Duration = Duration::from_secs(1);

const COMMANDS: [&str; 6] =
    ["qmp_capabilities", "query-commands", "query-status", "query-version", "quit", "x-explain"];

/// What commands act on.
pub struct Controls {
    /// Where an end is noted.
    pub ending: Ending,
    /// Questions to the vCPU.
    pub requests: Arc<Requests>,
    /// To wake it.
    pub devices: Arc<Devices>,
}

/// The socket and its clients.
pub struct ControlSocket {
    path: PathBuf,
    listener: UnixListener,
    clients: Vec<Client>,
    controls: Controls,
}

struct Client {
    stream: UnixStream,
    line: Vec<u8>,
    negotiated: bool,
    /// To be disconnected after its answer.
    dismissed: bool,
}

/// A QMP error: class and description.
struct Refusal(&'static str, String);

impl Refusal {
    fn reply(&self) -> Value {
        json!({"error": {"class": self.0, "desc": self.1}})
    }
}

impl ControlSocket {
    /// Listens at `path`. A socket that nobody listens on any more is replaced; anything else there is left alone.
    ///
    /// # Errors
    ///
    /// When the path is taken or cannot be made.
    pub fn bind(path: &Path, controls: Controls) -> io::Result<ControlSocket> {
        let stale = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
            && UnixStream::connect(path).is_err();
        if stale {
            fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        controls.requests.open();
        Ok(ControlSocket { path: path.to_owned(), listener, clients: Vec::new(), controls })
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let Ok((stream, _)) = self.listener.accept() else { return };
        if self.clients.len() >= CLIENTS_MAX || stream.set_nonblocking(true).is_err() {
            return;
        }
        let mut client = Client { stream, line: Vec::new(), negotiated: false, dismissed: false };
        let version = version();
        if client.send(&json!({"QMP": {"version": version, "capabilities": []}})) {
            add(ops, Events::new(&client.stream, EventSet::IN));
            self.clients.push(client);
        }
    }

    fn serve(&mut self, fd: RawFd, ops: &mut EventOps) {
        // Of an event that was on its way when its client went: nothing is left to do.
        let Some(at) = self.clients.iter().position(|c| c.stream.as_raw_fd() == fd) else { return };
        if !self.clients[at].receive(&self.controls) {
            let client = self.clients.swap_remove(at);
            let _ = ops.remove(Events::empty(&client.stream));
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl MutEventSubscriber for ControlSocket {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.listener.as_raw_fd() {
            self.accept(ops);
        } else {
            self.serve(events.fd(), ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        add(ops, Events::new(&self.listener, EventSet::IN));
    }
}

impl Client {
    /// Takes what has come and answers whole lines. False when the client is to go.
    fn receive(&mut self, controls: &Controls) -> bool {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => self.line.extend_from_slice(&buffer[..count]),
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            if !line.trim_ascii().is_empty() && !self.answer(&line, controls) {
                return false;
            }
        }
        self.line.len() <= LINE_MAX
    }

    fn answer(&mut self, line: &[u8], controls: &Controls) -> bool {
        let parsed = serde_json::from_slice::<Value>(line).ok().filter(Value::is_object);
        let Some(request) = parsed else {
            return self.send(&Refusal("GenericError", "that line is no JSON object".into()).reply());
        };
        let id = request.get("id").cloned();
        let result = self.execute(&request, controls);
        let mut reply = match result {
            Ok(value) => json!({ "return": value }),
            Err(refusal) => refusal.reply(),
        };
        if let Some(id) = id {
            reply["id"] = id;
        }
        self.send(&reply) && !self.dismissed
    }

    fn execute(&mut self, request: &Value, controls: &Controls) -> Result<Value, Refusal> {
        let command = request.get("execute").and_then(Value::as_str);
        let command = command.ok_or_else(|| Refusal("GenericError", "'execute' names no command".into()))?;
        if !self.negotiated && command != "qmp_capabilities" {
            let text = format!("send qmp_capabilities before {command}");
            return Err(Refusal("CommandNotFound", text));
        }
        match command {
            "qmp_capabilities" => {
                self.negotiated = true;
                Ok(json!({}))
            }
            "query-version" => Ok(version()),
            "query-status" => Ok(json!({"status": "running", "running": true, "singlestep": false})),
            "query-commands" => Ok(COMMANDS.iter().map(|name| json!({ "name": name })).collect()),
            "quit" => {
                controls.ending.set(End::Quit);
                Ok(json!({}))
            }
            "x-explain" => self.explain(request, controls),
            other => {
                Err(Refusal("CommandNotFound", format!("there is no command {other}; see query-commands")))
            }
        }
    }

    /// Asks the vCPU. The event loop waits for it meanwhile, so a client whose question went unanswered is heard no
    /// further: what it has sent already may be a thousand questions more.
    fn explain(&mut self, request: &Value, controls: &Controls) -> Result<Value, Refusal> {
        let gva = request.pointer("/arguments/gva").and_then(Value::as_u64);
        let gva = gva.and_then(|gva| u32::try_from(gva).ok());
        let gva =
            gva.ok_or_else(|| Refusal("GenericError", "x-explain takes a 32-bit number 'gva'".into()))?;
        if controls.ending.is_set() {
            return Err(Refusal("GenericError", "the run has ended".into()));
        }
        let (reply, answer) = mpsc::channel();
        controls.requests.push(Request::Explain(Gva(gva), reply));
        controls.devices.waker(0).wake();
        let explanation = answer.recv_timeout(ANSWER_WAIT).map_err(|_| {
            self.dismissed = true;
            Refusal("GenericError", format!("the vCPU did not answer within {ANSWER_WAIT:?}; connect anew"))
        })?;
        Ok(json!({ "gva": gva, "lines": explanation.lines }))
    }

    /// False when the client does not take it.
    fn send(&mut self, message: &Value) -> bool {
        let mut text = message.to_string();
        text.push_str("\r\n");
        self.stream.write_all(text.as_bytes()).is_ok()
    }
}

fn version() -> Value {
    let part = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "qemu": {
            "major": part(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": part(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": part(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("umbra ", env!("CARGO_PKG_VERSION")),
    })
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
