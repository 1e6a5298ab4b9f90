//! Bytes from a client, cut into JSON objects.
//!
//! Story: a client sends a stream of values, in whatever pieces: several in one, one in several, cut in the middle of a
//! character. Each byte is looked at once: brackets and strings say where a value ends, and only then is it parsed.
//!
//! Holds: after an error the next `{`, or whatever follows the next control character, begins a new value. The byte 0xff is
//! never right in UTF-8: it ends whatever there was, wherever it stands, and is itself an error. So a client that does not know what
//! its predecessor has sent says 0xff, reads up to the error, and is understood from then on. No object that is taken has a key twice.
//!
//! Limits: [`VALUE_MAX`] bytes and [`NESTING_MAX`] levels in a value.
//!
//! See: QEMU, qobject/json-lexer.c and json-streamer.c.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// The longest value that a client may send.
pub const VALUE_MAX: usize = 64 << 10;
/// The deepest; less than what serde_json takes.
pub const NESTING_MAX: u32 = 100;

/// Why bytes are no object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadInput {
    /// Something else.
    #[error("QMP input must be a JSON object")]
    NoObject,
    /// 0xff.
    #[error("JSON parse error, stray 0xff; what came before it is forgotten")]
    Reset,
    /// A control character where there can be none.
    #[error("JSON parse error, stray control character {0:#04x}")]
    Control(u8),
    /// Too deep.
    #[error("JSON nesting depth limit exceeded; at most {NESTING_MAX} levels")]
    TooDeep,
    /// Too long. The rest of it is not waited for: nobody knows how long that is.
    #[error("JSON value size limit exceeded; at most {VALUE_MAX} bytes; connect anew")]
    TooLong,
    /// Not JSON.
    #[error("JSON parse error, {0}")]
    Syntax(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Between two values.
    #[default]
    Between,
    /// After an error.
    Skipping,
    /// In a value, outside its strings.
    Inside,
    /// In a string.
    Text,
    /// After a backslash in a string.
    Escaped,
}

/// What a byte has brought.
enum Found {
    Nothing,
    /// A value begins with it.
    Begin,
    /// A value ends with it.
    End,
    Bad(BadInput),
}

/// What a client has sent and nobody has taken.
#[derive(Debug, Default)]
pub struct Input {
    bytes: Vec<u8>,
    /// Where the value begins.
    start: usize,
    /// What has been looked at.
    seen: usize,
    state: State,
    depth: u32,
}

impl Input {
    /// Takes what has come.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next object, or the next error; `None` when more must come.
    pub fn next(&mut self) -> Option<Result<Value, BadInput>> {
        while let Some(byte) = self.bytes.get(self.seen).copied() {
            self.seen += 1;
            match self.step(byte) {
                Found::Nothing if self.is_inside() && self.seen - self.start > VALUE_MAX => {
                    self.forget(State::Skipping);
                    return Some(Err(BadInput::TooLong));
                }
                Found::Nothing => {}
                Found::Begin => self.start = self.seen - 1,
                Found::End => return Some(parse(&self.bytes[self.start..self.seen])),
                Found::Bad(bad) => return Some(Err(bad)),
            }
        }
        self.trim();
        None
    }

    /// Bytes that are kept.
    pub fn kept(&self) -> usize {
        self.bytes.len()
    }

    /// Drops what has been looked at and is part of no value.
    fn trim(&mut self) {
        let done = if self.is_inside() { self.start } else { self.seen };
        self.bytes.drain(..done);
        (self.start, self.seen) = (0, self.seen - done);
    }

    fn forget(&mut self, state: State) {
        self.state = state;
        self.depth = 0;
    }

    fn is_inside(&self) -> bool {
        matches!(self.state, State::Inside | State::Text | State::Escaped)
    }

    fn step(&mut self, byte: u8) -> Found {
        if byte == 0xff {
            self.forget(State::Between);
            return Found::Bad(BadInput::Reset);
        }
        match self.state {
            State::Between => self.between(byte),
            State::Skipping => self.skip(byte),
            State::Inside => self.inside(byte),
            State::Text | State::Escaped => self.text(byte),
        }
    }

    fn between(&mut self, byte: u8) -> Found {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => Found::Nothing,
            b'{' | b'[' => self.begin(),
            0..0x20 => Found::Bad(BadInput::Control(byte)),
            _ => {
                self.forget(State::Skipping);
                Found::Bad(BadInput::NoObject)
            }
        }
    }

    fn skip(&mut self, byte: u8) -> Found {
        match byte {
            b'{' => return self.begin(),
            b'\t' => {}
            0..0x20 => self.state = State::Between,
            _ => {}
        }
        Found::Nothing
    }

    fn begin(&mut self) -> Found {
        (self.state, self.depth) = (State::Inside, 1);
        Found::Begin
    }

    fn inside(&mut self, byte: u8) -> Found {
        match byte {
            b'{' | b'[' if self.depth == NESTING_MAX => {
                self.forget(State::Skipping);
                return Found::Bad(BadInput::TooDeep);
            }
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            b'"' => self.state = State::Text,
            b'\t' | b'\r' | b'\n' => {}
            0..0x20 => return self.stray(byte),
            _ => {}
        }
        if self.depth == 0 {
            self.forget(State::Between);
            return Found::End;
        }
        Found::Nothing
    }

    fn text(&mut self, byte: u8) -> Found {
        self.state = match byte {
            0..0x20 => return self.stray(byte),
            _ if self.state == State::Escaped => State::Text,
            b'\\' => State::Escaped,
            b'"' => State::Inside,
            _ => State::Text,
        };
        Found::Nothing
    }

    fn stray(&mut self, byte: u8) -> Found {
        self.forget(State::Between);
        Found::Bad(BadInput::Control(byte))
    }
}

fn parse(bytes: &[u8]) -> Result<Value, BadInput> {
    match serde_json::from_slice(bytes) {
        Ok(Unique(value)) if value.is_object() => Ok(value),
        Ok(_) => Err(BadInput::NoObject),
        Err(error) => Err(BadInput::Syntax(error.to_string())),
    }
}

/// A value in which no object has a key twice: `serde_json` would take the last, and QEMU refuses it.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unique, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Unique(value)) = seq.next_element()? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if members.contains_key(&key) {
                return Err(A::Error::custom("duplicate key"));
            }
            let Unique(value) = map.next_value()?;
            members.insert(key, value);
        }
        Ok(members.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// All that comes of `pieces`.
    fn all(pieces: &[&[u8]]) -> Vec<Result<Value, BadInput>> {
        let mut input = Input::default();
        let mut found = Vec::new();
        for piece in pieces {
            input.feed(piece);
            found.extend(std::iter::from_fn(|| input.next()));
        }
        assert!(input.kept() <= VALUE_MAX, "{} bytes are kept", input.kept());
        found
    }

    #[test]
    fn pieces_make_no_difference() {
        let text = "  {\"a\":\"\u{e9}}\\\"{\",\n \"b\":[{}]}{\"c\":\r\n1}\t{}".as_bytes();
        let whole = all(&[text]);
        assert_eq!(whole, [Ok(json!({"a": "\u{e9}}\"{", "b": [{}]})), Ok(json!({"c": 1})), Ok(json!({}))]);
        for at in 0..text.len() {
            assert_eq!(all(&[&text[..at], &text[at..]]), whole, "cut at {at}");
        }
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(all(&bytes), whole);
    }

    #[test]
    fn an_error_costs_one_answer_and_the_next_object_is_understood() {
        let good = Ok(json!({"a": 1}));
        let control = |byte| Err(BadInput::Control(byte));
        for (bad, error) in [
            (&b"x\n"[..], Err(BadInput::NoObject)),
            (b"7 ", Err(BadInput::NoObject)),
            (b"\"a\"", Err(BadInput::NoObject)),
            (b"[1]", Err(BadInput::NoObject)),
            (b"}", Err(BadInput::NoObject)),
            (b"\xff", Err(BadInput::Reset)),
            (b"{\"a\":\xff", Err(BadInput::Reset)),
            (b"{\"bad \xff", Err(BadInput::Reset)),
            (b"\0", control(0)),
            (b"{\x01", control(1)),
            (b"{\"execute\":\"n\", \"id\":\"\n", control(10)),
        ] {
            assert_eq!(all(&[bad, b"{\"a\":1}"]), [error, good.clone()], "{bad:?}");
        }
        for twice in [&b"{\"a\":1,\"a\":1}"[..], b"{\"b\":[{\"a\":1,\"\\u0061\":2}]}"] {
            let found = all(&[twice, b"{\"a\":1}"]);
            let words = "JSON parse error, duplicate key";
            assert!(
                matches!(&found[..], [Err(bad), Ok(_)] if bad.to_string().starts_with(words)),
                "{twice:?}: {found:?}"
            );
        }
        let apart = b"{\"a\":{\"a\":1},\"b\":[{\"a\":1},{\"a\":-2.5}]}";
        assert_eq!(all(&[apart]), [Ok(json!({"a": {"a": 1}, "b": [{"a": 1}, {"a": -2.5}]}))]);
        for bad in [&b"{]"[..], b"{\"a\"}", b"{,}", b"{\"a\":nul}", b"{\"\xc3\x28\":1}", b"{\"a\":1e999}"] {
            let found = all(&[bad, b"{\"a\":1}"]);
            assert!(matches!(found[..], [Err(BadInput::Syntax(_)), Ok(_)]), "{bad:?}: {found:?}");
        }
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let nested =
            |levels: usize| format!("{{\"a\":{}{}}}", "[".repeat(levels - 1), "]".repeat(levels - 1));
        let most = NESTING_MAX as usize;
        assert!(matches!(all(&[nested(most).as_bytes()])[..], [Ok(_)]));
        assert_eq!(all(&[nested(most + 1).as_bytes()]), [Err(BadInput::TooDeep)]);
        assert_eq!(all(&["[".repeat(100_000).as_bytes()]), [Err(BadInput::TooDeep)]);
        let long = |length: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(length - 8));
        assert!(matches!(all(&[long(VALUE_MAX).as_bytes()])[..], [Ok(_)]));
        let pieces = long(4 * VALUE_MAX);
        let pieces: Vec<&[u8]> = pieces.as_bytes().chunks(1000).collect();
        assert_eq!(all(&pieces)[0], Err(BadInput::TooLong));
    }
}
