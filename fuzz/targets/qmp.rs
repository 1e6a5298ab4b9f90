//! Several clients of the control socket who send what they like, in what pieces they like.
//!
//! What must hold: no panic, each call ends at once, everything that a client hears is whole lines of one of QMP's kinds, and how
//! bytes are cut makes no difference.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use umbra::vm::control::fuzz::{Conversations, pieces_are_the_whole, words};

const CLIENTS: usize = 3;

/// A value, some of which a command takes.
#[derive(Arbitrary, Debug)]
enum Literal {
    Page(u8),
    Number(i64),
    Large(u64),
    Truth(bool),
    Null,
    List(Vec<u8>),
    Text(String),
}

#[derive(Arbitrary, Debug)]
enum Piece {
    /// Anything.
    Raw(Vec<u8>),
    /// A call of a name that exists, with arguments whose names do.
    Call { name: u8, arguments: Vec<(u8, Literal)>, id: Option<Literal> },
    /// The beginning of one.
    Half { name: u8, length: u8 },
    /// What makes the others be listened to.
    Negotiate,
    /// Begins anew.
    Reset,
}

impl Literal {
    fn text(&self) -> String {
        match self {
            Literal::Page(page) => (u64::from(*page) << 12).to_string(),
            Literal::Number(number) => number.to_string(),
            Literal::Large(number) => number.to_string(),
            Literal::Truth(truth) => truth.to_string(),
            Literal::Null => "null".into(),
            Literal::List(items) => format!("{items:?}"),
            Literal::Text(text) => format!("{text:?}"),
        }
    }
}

fn word(which: u8) -> &'static str {
    words().nth(usize::from(which) % words().count()).unwrap_or_default()
}

impl Piece {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Piece::Raw(bytes) => bytes.clone(),
            Piece::Call { name, arguments, id } => call(*name, arguments, id.as_ref()),
            Piece::Half { name, length } => {
                let mut bytes = call(*name, &[], None);
                bytes.truncate(usize::from(*length));
                bytes
            }
            Piece::Negotiate => b"{\"execute\":\"qmp_capabilities\"}".into(),
            Piece::Reset => vec![0xff],
        }
    }
}

fn call(name: u8, arguments: &[(u8, Literal)], id: Option<&Literal>) -> Vec<u8> {
    let arguments: Vec<_> =
        arguments.iter().map(|(name, value)| format!("\"{}\":{}", word(*name), value.text())).collect();
    let id = id.map_or_else(String::new, |id| format!(",\"id\":{}", id.text()));
    let arguments = arguments.join(",");
    format!("{{\"execute\":\"{}\",\"arguments\":{{{arguments}}}{id}}}", word(name)).into_bytes()
}

fuzz_target!(|program: (u8, Vec<(u8, Piece)>)| {
    let (cut, pieces) = program;
    let mut conversations = Conversations::new(CLIENTS).expect("descriptors");
    let mut all = Vec::new();
    for (client, piece) in pieces {
        let bytes = piece.bytes();
        conversations.send(usize::from(client) % CLIENTS, &bytes);
        all.extend(bytes);
    }
    pieces_are_the_whole(&all, usize::from(cut));
});
