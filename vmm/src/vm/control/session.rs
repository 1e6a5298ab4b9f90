//! One client's conversation, without its socket: bytes in, bytes out.
//!
//! Story: the socket feeds what has come and calls [`Session::advance`] until nothing more comes of it. A command that
//! may take long comes back as [`Work`], to be done on another thread; the next one is looked at when its answer is there.
//! So answers come in the order of the commands.
//!
//! Limits: [`OUTPUT_MAX`] bytes that the client has not taken.

use std::io::{self, ErrorKind, Write};

use serde_json::Value;

use super::Controls;
use super::commands::{self, Arguments, Command, How};
use super::input::{BadInput, Input};
use super::protocol::{self, Answer, Call, Refusal};

/// The most that is kept for a client that does not read. One that has more coming is dropped.
pub const OUTPUT_MAX: usize = 256 << 10;

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
            self.output.push(event);
        }
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
}

impl Output {
    fn push(&mut self, message: &Value) {
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
        // A burst does not stay with an idle client.
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        Ok(())
    }
}
