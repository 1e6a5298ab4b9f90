//! The shape of what goes over the wire: greeting, commands, answers, errors, events.
//!
//! Holds: errors have QEMU's classes and, where QEMU has the error too, its words; clients match on both.
//!
//! See: QEMU, docs/interop/qmp-spec.rst, qapi/qmp-dispatch.c.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

/// The class of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Whatever has no class of its own.
    Generic,
    /// There is no such command, or not now.
    CommandNotFound,
    /// A device is not there.
    DeviceNotActive,
    /// Ours: a caller that may not sleep would have had to.
    WouldBlock,
}

impl Class {
    fn name(self) -> &'static str {
        match self {
            Class::Generic => "GenericError",
            Class::CommandNotFound => "CommandNotFound",
            Class::DeviceNotActive => "DeviceNotActive",
            Class::WouldBlock => "WouldBlock",
        }
    }
}

/// A command that is not done, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub class: Class,
    /// For people.
    pub desc: String,
}

impl Refusal {
    /// One of no particular class.
    pub fn generic(desc: impl ToString) -> Refusal {
        Refusal { class: Class::Generic, desc: desc.to_string() }
    }

    /// There is no such command now.
    pub fn not_found(desc: impl ToString) -> Refusal {
        Refusal { class: Class::CommandNotFound, desc: desc.to_string() }
    }
}

/// What a handler returns.
pub type Answer = Result<Value, Refusal>;

/// A command as a client has it. Nothing but its shape has been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Which.
    pub name: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
}

impl Call {
    /// Reads an object: its `id`, if it has one, and the rest of it.
    pub fn read(value: Value) -> (Option<Value>, Result<Call, Refusal>) {
        let Value::Object(mut members) = value else {
            return (None, Err(Refusal::generic("QMP input must be a JSON object")));
        };
        let id = members.remove("id");
        (id, Call::of(members))
    }

    fn of(mut members: Map<String, Value>) -> Result<Call, Refusal> {
        let refused = |text: &str| Err(Refusal::generic(text));
        let (name, arguments) = (members.remove("execute"), members.remove("arguments"));
        if let Some((member, _)) = members.iter().next() {
            return refused(&format!("QMP input member '{member}' is unexpected"));
        }
        let arguments = match arguments {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return refused("QMP input member 'arguments' must be an object"),
        };
        match name {
            Some(Value::String(name)) => Ok(Call { name, arguments }),
            Some(_) => refused("QMP input member 'execute' must be a string"),
            None => refused("QMP input lacks member 'execute'"),
        }
    }
}

/// What the server says first.
pub fn greeting() -> Value {
    json!({"QMP": {"version": version(), "capabilities": []}})
}

/// Umbra's version, where clients look for QEMU's.
pub fn version() -> Value {
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

/// The answer to a command.
pub fn reply(answer: Answer, id: Option<Value>) -> Value {
    let mut reply = match answer {
        Ok(value) => json!({ "return": value }),
        Err(Refusal { class, desc }) => json!({"error": {"class": class.name(), "desc": desc}}),
    };
    if let Some(id) = id {
        reply["id"] = id;
    }
    reply
}

/// An event that happens now.
pub fn event(name: &str, data: Option<Value>) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
    match data {
        Some(data) => json!({"event": name, "data": data, "timestamp": timestamp}),
        None => json!({"event": name, "timestamp": timestamp}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_read_and_its_id_also_where_it_is_wrong() {
        let (id, call) = Call::read(json!({"execute": "a", "arguments": {"x": 1}, "id": [null]}));
        let call = call.expect("a call");
        assert_eq!(
            (id, call.name.as_str(), call.arguments["x"].as_u64()),
            (Some(json!([null])), "a", Some(1))
        );
        for (value, words) in [
            (json!({"id": 1}), "lacks member 'execute'"),
            (json!({"id": 1, "execute": 7}), "'execute' must be a string"),
            (json!({"id": 1, "execute": "a", "arguments": []}), "'arguments' must be an object"),
            (json!({"id": 1, "execute": "a", "extra": 1}), "'extra' is unexpected"),
            (json!({"id": 1, "exec-oob": "a"}), "'exec-oob' is unexpected"),
        ] {
            let (id, call) = Call::read(value);
            assert_eq!(id, Some(json!(1)));
            assert!(call.is_err_and(|refusal| refusal.desc.contains(words)), "{words}");
        }
    }

    #[test]
    fn replies_and_events_have_their_shape() {
        assert_eq!(reply(Ok(json!({})), None), json!({"return": {}}));
        let refused = reply(Err(Refusal::not_found("no")), Some(Value::Null));
        assert_eq!(refused, json!({"error": {"class": "CommandNotFound", "desc": "no"}, "id": null}));
        let event = event("STOP", None);
        assert!(event["timestamp"]["seconds"].as_u64().is_some_and(|seconds| seconds > 1 << 30));
        assert!(event["timestamp"]["microseconds"].as_u64().is_some_and(|micros| micros < 1_000_000));
        assert!(event.get("data").is_none());
    }
}
