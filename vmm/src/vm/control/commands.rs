//! The commands: one table, from which `query-commands` comes and by which arguments are checked.
//!
//! Holds: a handler has its arguments in the table's types, and no others. One that is done at once neither sleeps nor takes
//! long; what may do either is done *apart*, on a thread of its own.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use serde_json::{Map, Value, json};
use umbra_mmu::Gva;

use super::protocol::{self, Answer, Class, Refusal};
use super::{Controls, memory};
use crate::vm::ending::End;
use crate::vm::requests::Request;
use crate::vm::stops::Gait;

/// How long a vCPU may take to answer a question, or to stand still.
pub const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// A command.
#[derive(Debug)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// What it takes.
    pub arguments: &'static [Argument],
    /// What does it.
    pub how: How,
}

/// What an argument is called, and what it may be.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// It may be left out.
    pub optional: bool,
}

/// The type of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number from 0 to 2^64 - 1.
    Unsigned,
    /// A number from -2^63 on.
    Integer,
    /// True or false.
    Boolean,
    /// An array.
    Array,
}

type Handler = fn(&Controls, &Arguments) -> Answer;

/// Where a command is done.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// By the session: it is what the others wait for.
    Negotiate,
    /// On the event loop's thread.
    AtOnce(Handler),
    /// On a thread of its own.
    Apart(Handler),
}

const fn must(name: &'static str, kind: Kind) -> Argument {
    Argument { name, kind, optional: false }
}

const fn may(name: &'static str, kind: Kind) -> Argument {
    Argument { name, kind, optional: true }
}

const fn command(name: &'static str, arguments: &'static [Argument], how: How) -> Command {
    Command { name, arguments, how }
}

const RANGE: [Argument; 2] = [must("gpa", Kind::Unsigned), must("bytes", Kind::Unsigned)];

/// All commands, in order of name.
pub const COMMANDS: &[Command] = &[
    command("balloon", &[must("value", Kind::Integer)], How::AtOnce(balloon)),
    command("cont", &[], How::Apart(cont)),
    command("qmp_capabilities", &[may("enable", Kind::Array)], How::Negotiate),
    command("query-balloon", &[], How::AtOnce(query_balloon)),
    command("query-commands", &[], How::AtOnce(query_commands)),
    command("query-cpus-fast", &[], How::AtOnce(query_cpus_fast)),
    command("query-name", &[], How::AtOnce(query_name)),
    command("query-status", &[], How::AtOnce(query_status)),
    command("query-version", &[], How::AtOnce(|_, _| Ok(protocol::version()))),
    command("quit", &[], How::AtOnce(quit)),
    command("stop", &[], How::Apart(stop)),
    command("system_powerdown", &[], How::AtOnce(system_powerdown)),
    command("system_reset", &[], How::AtOnce(system_reset)),
    command("x-balloon-stats", &[], How::AtOnce(balloon_stats)),
    command("x-counters", &[], How::AtOnce(memory::counters)),
    command("x-discard", &[RANGE[0], RANGE[1], may("atomic", Kind::Boolean)], How::Apart(memory::discard)),
    command("x-explain", &[must("gva", Kind::Unsigned), may("vcpu", Kind::Unsigned)], How::Apart(explain)),
    command("x-frames", &[may("bytes", Kind::Unsigned)], How::AtOnce(memory::frames)),
    command("x-memory", &[], How::Apart(memory::memory)),
    command("x-page-out", &[RANGE[0], RANGE[1], may("atomic", Kind::Boolean)], How::Apart(memory::page_out)),
];

/// The command of that name.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

impl Command {
    /// Does it.
    pub fn run(&self, controls: &Controls, arguments: &Arguments) -> Answer {
        match self.how {
            How::Negotiate => negotiate(arguments),
            How::AtOnce(handler) | How::Apart(handler) => handler(controls, arguments),
        }
    }
}

/// Arguments that are what a command takes.
#[derive(Debug)]
pub struct Arguments(Map<String, Value>);

impl Arguments {
    /// Checks a client's arguments against a command's.
    ///
    /// # Errors
    ///
    /// For the first that is missing, of another type, or unknown.
    pub fn check(given: Map<String, Value>, known: &[Argument]) -> Result<Arguments, Refusal> {
        for argument in known {
            let name = argument.name;
            match given.get(name) {
                Some(value) => argument.kind.check(name, value)?,
                None if argument.optional => {}
                None => return Err(Refusal::generic(format!("Parameter '{name}' is missing"))),
            }
        }
        let unknown = given.keys().find(|name| known.iter().all(|argument| argument.name != *name));
        match unknown {
            Some(name) => Err(Refusal::generic(format!("Parameter '{name}' is unexpected"))),
            None => Ok(Arguments(given)),
        }
    }

    /// The argument of that name, a [`Kind::Unsigned`].
    pub fn unsigned(&self, name: &str) -> Option<u64> {
        self.0.get(name).and_then(Value::as_u64)
    }

    /// The same, which must be there.
    ///
    /// # Errors
    ///
    /// When the table does not say so.
    pub fn number(&self, name: &str) -> Result<u64, Refusal> {
        self.unsigned(name).ok_or_else(|| Refusal::generic(format!("Parameter '{name}' is missing")))
    }

    /// The argument of that name, a [`Kind::Boolean`]; false if left out.
    pub fn flag(&self, name: &str) -> bool {
        self.0.get(name).and_then(Value::as_bool).unwrap_or(false)
    }
}

impl Kind {
    fn check(self, name: &str, value: &Value) -> Result<(), Refusal> {
        let (good, expected) = match self {
            Kind::Unsigned if value.is_i64() && !value.is_u64() => {
                return Err(Refusal::generic(format!("Parameter '{name}' expects uint64")));
            }
            Kind::Unsigned => (value.is_u64(), "integer"),
            Kind::Integer => (value.is_i64(), "integer"),
            Kind::Boolean => (value.is_boolean(), "boolean"),
            Kind::Array => (value.is_array(), "array"),
        };
        match good {
            true => Ok(()),
            false => {
                Err(Refusal::generic(format!("Invalid parameter type for '{name}', expected: {expected}")))
            }
        }
    }
}

/// `qmp_capabilities`: there are none to be enabled.
pub fn negotiate(arguments: &Arguments) -> Answer {
    let enable = arguments.0.get("enable").and_then(Value::as_array);
    match enable.and_then(|enable| enable.first()) {
        None => Ok(json!({})),
        Some(Value::String(name)) if name == "oob" => {
            Err(Refusal::generic(format!("Capability {name} not available")))
        }
        Some(Value::String(name)) => {
            Err(Refusal::generic(format!("Parameter 'enable[0]' does not accept value '{name}'")))
        }
        Some(_) => Err(Refusal::generic("Invalid parameter type for 'enable[0]', expected: string")),
    }
}

fn query_commands(_: &Controls, _: &Arguments) -> Answer {
    Ok(COMMANDS.iter().map(|command| json!({ "name": command.name })).collect())
}

fn query_name(controls: &Controls, _: &Arguments) -> Answer {
    Ok(controls.name.as_ref().map_or_else(|| json!({}), |name| json!({ "name": name })))
}

fn query_status(controls: &Controls, _: &Arguments) -> Answer {
    let status = match () {
        () if controls.ending.is_set() => "shutdown",
        () => match controls.stops.gait() {
            Gait::Running => "running",
            Gait::Paused => "paused",
            Gait::Prelaunch => "prelaunch",
        },
    };
    Ok(json!({"status": status, "running": status == "running"}))
}

fn query_cpus_fast(controls: &Controls, _: &Arguments) -> Answer {
    let vcpu = |(index, thread): (usize, &AtomicI32)| {
        json!({
            "cpu-index": index,
            "qom-path": format!("/machine/unattached/device[{index}]"),
            "thread-id": thread.load(Ordering::Relaxed),
            "target": "i386",
            "props": {},
        })
    };
    Ok(controls.threads.iter().enumerate().map(vcpu).collect())
}

fn stop(controls: &Controls, _: &Arguments) -> Answer {
    controls.stops.want();
    match controls.stops.wait(controls.answer_wait) {
        true => Ok(json!({})),
        false => Err(Refusal::generic(format!(
            "the vCPUs did not stand still within {:?}; they will as soon as they can, and STOP says when",
            controls.answer_wait
        ))),
    }
}

/// Apart only so that RESUME goes before the answer, as it does in QEMU.
fn cont(controls: &Controls, _: &Arguments) -> Answer {
    controls.stops.release();
    Ok(json!({}))
}

fn quit(controls: &Controls, _: &Arguments) -> Answer {
    controls.ending.set(End::Quit);
    Ok(json!({}))
}

/// Answered at once: RESET says when it is done.
fn system_reset(controls: &Controls, _: &Arguments) -> Answer {
    controls.stops.want_reset(("host-qmp-system-reset", false));
    Ok(json!({}))
}

/// The guest has no power button, so that there is nobody to press it for; clients are told that somebody has.
fn system_powerdown(controls: &Controls, _: &Arguments) -> Answer {
    controls.news.event("POWERDOWN", None);
    Ok(json!({}))
}

fn explain(controls: &Controls, arguments: &Arguments) -> Answer {
    let Ok(gva) = u32::try_from(arguments.number("gva")?) else {
        return Err(Refusal::generic("Parameter 'gva' expects a 32-bit address"));
    };
    let vcpus = controls.devices.vcpus();
    let vcpu = arguments.unsigned("vcpu").unwrap_or(0);
    let Some(vcpu) = u32::try_from(vcpu).ok().filter(|vcpu| *vcpu < vcpus) else {
        return Err(Refusal::generic(format!("there is no vCPU {vcpu}; the guest has {vcpus}, from 0 on")));
    };
    let (reply, answer) = mpsc::channel();
    controls.requests.push(vcpu, Request::Explain(Gva(gva), reply));
    controls.devices.waker(vcpu).wake();
    let explanation = answer.recv_timeout(controls.answer_wait).map_err(|error| match error {
        RecvTimeoutError::Timeout => {
            Refusal::generic(format!("vCPU {vcpu} did not answer within {:?}", controls.answer_wait))
        }
        RecvTimeoutError::Disconnected => Refusal::generic("the run has ended"),
    })?;
    Ok(json!({ "gva": gva, "vcpu": vcpu, "lines": explanation.lines }))
}

/// The balloon device, which a guest may not have, or not use yet.
fn device(controls: &Controls) -> Result<&dyn super::BalloonControl, Refusal> {
    controls.balloon.as_deref().ok_or_else(|| Refusal {
        class: Class::DeviceNotActive,
        desc: "No balloon device has been activated".into(),
    })
}

fn balloon(controls: &Controls, arguments: &Arguments) -> Answer {
    let device = device(controls)?;
    match arguments.unsigned("value") {
        None | Some(0) => Err(Refusal::generic("Parameter 'target' expects a size")),
        Some(bytes) => device.set_target(bytes).map(|()| json!({})).map_err(Refusal::generic),
    }
}

fn query_balloon(controls: &Controls, _: &Arguments) -> Answer {
    Ok(json!({"actual": device(controls)?.actual_bytes()}))
}

fn balloon_stats(controls: &Controls, _: &Arguments) -> Answer {
    let stats = device(controls)?.stats();
    let stats = stats.ok_or_else(|| Refusal::generic("the guest has reported no statistics"))?;
    Ok(Value::Object(stats.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_the_manual_has_all_of_it() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.name < b.name));
        let manual = include_str!("../../../../docs/manual.md");
        for command in COMMANDS {
            let first = |line: &&str| {
                line.split('|').nth(1).is_some_and(|cell| cell.contains(&format!("`{}`", command.name)))
            };
            let row = manual.lines().find(first);
            let row = row.unwrap_or_else(|| panic!("the manual has no {}", command.name));
            for argument in command.arguments {
                let name = argument.name;
                assert!(
                    row.contains(&format!("`{name}`")),
                    "{}: the manual does not name {name}",
                    command.name
                );
            }
        }
    }

    #[test]
    fn arguments_are_refused_as_qemu_does() {
        let known = [must("n", Kind::Unsigned), may("b", Kind::Boolean), may("i", Kind::Integer)];
        let refused = |value: Value| {
            let Value::Object(given) = value else { panic!("no object") };
            Arguments::check(given, &known).err().map(|refusal| refusal.desc)
        };
        assert_eq!(refused(json!({"n": 1, "b": true, "i": -1})), None);
        assert_eq!(refused(json!({"n": u64::MAX})), None);
        for (given, words) in [
            (json!({}), "Parameter 'n' is missing"),
            (json!({"n": "1"}), "Invalid parameter type for 'n', expected: integer"),
            (json!({"n": 1.5}), "Invalid parameter type for 'n', expected: integer"),
            (json!({"n": null}), "Invalid parameter type for 'n', expected: integer"),
            (json!({"n": -1}), "Parameter 'n' expects uint64"),
            (json!({"n": 1, "b": 1}), "Invalid parameter type for 'b', expected: boolean"),
            (json!({"n": 1, "i": u64::MAX}), "Invalid parameter type for 'i', expected: integer"),
            (json!({"n": 1, "x": 1}), "Parameter 'x' is unexpected"),
        ] {
            assert_eq!(refused(given), Some(words.to_owned()));
        }
    }

    #[test]
    fn no_capability_can_be_enabled() {
        let enable = |value: Value| {
            let given = Map::from_iter([("enable".to_owned(), value)]);
            negotiate(&Arguments(given)).map_err(|refusal| refusal.desc)
        };
        assert_eq!(enable(json!([])), Ok(json!({})));
        assert_eq!(enable(json!(["oob"])), Err("Capability oob not available".into()));
        assert!(enable(json!(["x"])).is_err_and(|desc| desc.contains("does not accept value 'x'")));
        assert!(enable(json!([1])).is_err_and(|desc| desc.contains("expected: string")));
    }
}
