//! A guest that sends an importer of ours what it likes, by both sockets, with descriptors of all kinds.
//!
//! What must hold: no panic, and each call ends.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use umbra::export::protocol::{Code, Reply, VERSION};
use umbra::import::fuzz::{Said, With, import_from};

#[derive(Arbitrary, Debug)]
enum Step {
    /// Any bytes.
    Raw(Vec<u8>, Way),
    /// A message, with the tag of the next question or another.
    Say { kind: u8, fields: [Field; 3], tag: Option<u8>, way: Way },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Way {
    Plain,
    Line,
    File(u16),
    ByLine,
}

#[derive(Arbitrary, Debug)]
enum Field {
    Small(u8),
    Any(u32),
}

impl Field {
    fn value(&self) -> u32 {
        match self {
            Field::Small(value) => u32::from(*value) % 72,
            Field::Any(value) => *value,
        }
    }
}

fn reply(kind: u8, fields: &[Field; 3]) -> Reply {
    let [a, b, c] = fields.each_ref().map(Field::value);
    match kind % 10 {
        0 => Reply::Welcome { version: VERSION, importer: a, deadline_micros: b, requests_max: c },
        1 => Reply::Made { segment: a },
        2 => Reply::Got { access: a, first: b, pages: c, writable: a % 2 == 1 },
        3 => Reply::Attached { attachment: a },
        4 => Reply::Granted { order: a.into(), pages: b },
        5 => Reply::States(vec![7; a as usize % 2048]),
        6 => Reply::Summed { crc: a },
        7 => Reply::Refused { code: Code::Held, why: "no".into() },
        8 => Reply::Invalidate { order: a.into(), pages: vec![b, c] },
        _ => Reply::Done,
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut next = 0;
    let said: Vec<Said> = steps
        .into_iter()
        .map(|step| {
            let (bytes, way) = match step {
                Step::Raw(bytes, way) => (bytes, way),
                Step::Say { kind, fields, tag, way } => {
                    next += u64::from(tag.is_none());
                    (reply(kind, &fields).encode(tag.map_or(next, u64::from)), way)
                }
            };
            let with = match way {
                Way::Plain => With::Nothing,
                Way::Line => With::TheLine,
                Way::File(pages) => With::File(pages),
                Way::ByLine => With::ByTheLine,
            };
            Said { bytes, with }
        })
        .collect();
    import_from(&said).expect("memory and descriptors");
});
