//! One client's conversation, without its socket: bytes in, bytes out.
//!
//! Story: the socket feeds what has come and calls [`Session::advance`] until nothing more comes of it. A command that
//! may take long comes back as [`Work`], to be done on another thread; the next one is looked at when its answer is there.
//! So answers come in the order of the commands.
//!
//! Limits: [`OUTPUT_MAX`] bytes that the client has not taken; beyond half of them, of events the latest of each name, so that
//! what others do costs it nothing but events.

use std::io::{self, ErrorKind, Write};

use serde_json::Value;

use super::Controls;
use super::commands::{self, Arguments, Command, How};
use super::input::{BadInput, Input};
use super::protocol::{self, Answer, Call, Refusal};

/// The most that is kept for a client that does not read. One that has more coming is dropped.
pub const OUTPUT_MAX: usize = 256 << 10;

/// Where so much waits for a client, events wait elsewhere: the latest of each name.
const EVENTS_LATE: usize = OUTPUT_MAX / 2;

/// A conversation.
#[derive(Debug)]
pub struct Session {
    input: Input,
    output: Output,
    negotiated: bool,
    /// A command of this client is done on another thread.
    busy: bool,
    /// What it sends cannot be understood any more.
    dismissed: bool,
}

/// What a client's next bytes have brought.
pub enum Next {
    /// Nothing: more must come, or an answer from elsewhere.
    Nothing,
    /// An answer.
    Answered,
    /// A command to be done elsewhere; [`Session::finish`] takes its reply.
    Apart(Work),
}

/// A command that may take long.
pub struct Work {
    command: &'static Command,
    arguments: Arguments,
    id: Option<Value>,
}

impl Work {
    /// Does it. The reply is for [`Session::finish`].
    pub fn run(self, controls: &Controls) -> Value {
        let answer = match controls.ending.is_set() {
            true => Err(Refusal::generic("the run has ended")),
            false => self.command.run(controls, &self.arguments),
        };
        protocol::reply(answer, self.id)
    }

    /// The reply where nobody can do it.
    pub fn refuse(self, why: &str) -> Value {
        protocol::reply(Err(Refusal::generic(why)), self.id)
    }
}

impl Session {
    /// A client that has just come.
    pub fn new() -> Session {
        let mut output = Output::default();
        output.push(&protocol::greeting());
        Session { input: Input::default(), output, negotiated: false, busy: false, dismissed: false }
    }

    /// Takes what the client has sent.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.feed(bytes);
    }

    /// Looks at the next command, if there is one and its turn has come.
    pub fn advance(&mut self, controls: &Controls) -> Next {
        if self.busy || self.dismissed {
            return Next::Nothing;
        }
        match self.input.next() {
            None => Next::Nothing,
            Some(Ok(value)) => self.take(value, controls),
            Some(Err(bad)) => {
                self.dismissed = bad == BadInput::TooLong;
                self.answer(Err(Refusal::generic(bad)), None)
            }
        }
    }

    fn take(&mut self, value: Value, controls: &Controls) -> Next {
        let (id, call) = Call::read(value);
        let found = call.and_then(|call| {
            let command = self.find(&call.name)?;
            Ok((command, Arguments::check(call.arguments, command.arguments)?))
        });
        let (command, arguments) = match found {
            Ok(found) => found,
            Err(refusal) => return self.answer(Err(refusal), id),
        };
        match command.how {
            How::Negotiate => {
                let answer = commands::negotiate(&arguments);
                self.negotiated = answer.is_ok();
                self.answer(answer, id)
            }
            How::AtOnce(_) => self.answer(command.run(controls, &arguments), id),
            How::Apart(_) => {
                self.busy = true;
                Next::Apart(Work { command, arguments, id })
            }
        }
    }

    /// The command of that name, as far as it is to be had in this mode.
    fn find(&self, name: &str) -> Result<&'static Command, Refusal> {
        let command = commands::find(name);
        let negotiates = command.is_some_and(|command| matches!(command.how, How::Negotiate));
        match command {
            _ if !self.negotiated && !negotiates => {
                Err(Refusal::not_found("Expecting capabilities negotiation with 'qmp_capabilities'"))
            }
            Some(_) if self.negotiated && negotiates => {
                Err(Refusal::not_found("Capabilities negotiation is already complete, command ignored"))
            }
            Some(command) => Ok(command),
            None => Err(Refusal::not_found(format!("The command {name} has not been found"))),
        }
    }

    fn answer(&mut self, answer: Answer, id: Option<Value>) -> Next {
        self.output.push(&protocol::reply(answer, id));
        Next::Answered
    }

    /// Takes the reply of what was done elsewhere.
    pub fn finish(&mut self, reply: &Value) {
        self.busy = false;
        self.output.push(reply);
    }

    /// Tells the client of an event, once it has negotiated.
    pub fn tell(&mut self, event: &Value) {
        if self.negotiated {
            self.output.push_event(event);
        }
    }

    /// It may give commands, and hears events.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// A command of this client is being done elsewhere.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Nothing that the client says is listened to any more.
    pub fn is_dismissed(&self) -> bool {
        self.dismissed
    }

    /// What the client has not taken.
    pub fn output(&mut self) -> &mut Output {
        &mut self.output
    }
}

/// What is on its way to a client.
#[derive(Debug, Default)]
pub struct Output {
    bytes: Vec<u8>,
    sent: usize,
    /// Events for when these have been taken, at most one of a name.
    late: Vec<Value>,
}

impl Output {
    /// A message behind all there is.
    fn push(&mut self, message: &Value) {
        self.catch_up();
        self.append(message);
    }

    fn push_event(&mut self, event: &Value) {
        if self.len() < EVENTS_LATE {
            return self.append(event);
        }
        let name = |event: &Value| event["event"].as_str().unwrap_or_default().to_owned();
        let undone = match name(event).as_str() {
            "STOP" => "RESUME",
            "RESUME" => "STOP",
            _ => "",
        };
        // A stop that is over, or a stretch between two, is nothing that is so any more.
        if let Some(at) = self.late.iter().position(|other| name(other) == undone) {
            self.late.remove(at);
            return;
        }
        self.late.retain(|other| name(other) != name(event));
        self.late.push(event.clone());
    }

    /// Late events follow what there is.
    fn catch_up(&mut self) {
        std::mem::take(&mut self.late).iter().for_each(|event| self.append(event));
    }

    fn append(&mut self, message: &Value) {
        self.bytes.extend_from_slice(message.to_string().as_bytes());
        self.bytes.extend_from_slice(b"\r\n");
    }

    /// How much there is.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes as much as `to` takes.
    ///
    /// # Errors
    ///
    /// When it will never take any more.
    pub fn flush(&mut self, to: &mut dyn Write) -> io::Result<()> {
        while !self.is_empty() {
            match to.write(&self.bytes[self.sent..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.bytes.drain(..self.sent);
        self.sent = 0;
        if !self.bytes.is_empty() {
            return Ok(());
        }
        // A burst does not stay with an idle client.
        self.bytes = Vec::new();
        if self.late.is_empty() {
            return Ok(());
        }
        self.catch_up();
        self.flush(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of all events that come of `told` for a client that reads once they are over.
    fn heard(told: &[&str]) -> Vec<String> {
        let mut output = Output::default();
        output.push(&Value::from("x".repeat(EVENTS_LATE)));
        told.iter().for_each(|name| output.push_event(&protocol::event(name, None)));
        let mut bytes = Vec::new();
        output.flush(&mut bytes).expect("memory");
        assert!(output.is_empty() && output.late.is_empty());
        let lines = String::from_utf8(bytes).expect("text");
        let events = lines.lines().skip(1).map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        events.map(|event| event["event"].as_str().expect("a name").to_owned()).collect()
    }

    #[test]
    fn a_client_that_reads_late_hears_the_latest_of_each_and_stop_and_resume_in_turn() {
        assert_eq!(heard(&["STOP", "POWERDOWN", "POWERDOWN", "SHUTDOWN"]), ["STOP", "POWERDOWN", "SHUTDOWN"]);
        assert_eq!(heard(&["STOP", "RESUME", "STOP", "RESUME"]), [""; 0]);
        assert_eq!(heard(&["STOP", "RESUME", "STOP", "POWERDOWN"]), ["STOP", "POWERDOWN"]);
        assert_eq!(heard(&["RESUME", "STOP", "RESUME"]), ["RESUME"]);
    }

    #[test]
    fn a_reply_comes_behind_the_events_before_it() {
        let mut output = Output::default();
        output.push(&Value::from("x".repeat(EVENTS_LATE)));
        output.push_event(&protocol::event("STOP", None));
        output.push(&Value::from("reply"));
        let mut bytes = Vec::new();
        output.flush(&mut bytes).expect("memory");
        let lines = String::from_utf8(bytes).expect("text");
        let lines: Vec<&str> = lines.lines().collect();
        assert!(lines[1].contains("STOP") && lines[2].contains("reply"), "{:?}", &lines[1..]);
    }
}
