//! Importers who send what they like while pages are taken away.
//!
//! What must hold: no panic, each call ends, all that an importer hears is messages of the protocol, the audit finds nothing, and
//! nothing is left of importers that have gone.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use umbra::export::fuzz::Exchange;
use umbra::export::protocol::Request;

const IMPORTERS: usize = 3;

#[derive(Arbitrary, Debug)]
enum Step {
    /// Any bytes.
    Raw(Vec<u8>),
    /// A message of some kind, its fields small or anything.
    Say { kind: u8, fields: [Field; 4] },
    /// The guest wants a page back.
    PageOut(u8),
    /// The same with a word of it changed, and cut or lengthened.
    Bent { kind: u8, fields: [Field; 4], at: u8, value: Field, length: Option<u8> },
    /// The guest has a descriptor table in a page, or none any more.
    Watch(u8),
    /// Swap fails from now on.
    FailSwap,
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

fn request(kind: u8, fields: &[Field; 4]) -> Request {
    let [a, b, c, d] = fields.each_ref().map(Field::value);
    match kind % 12 {
        0 => Request::Hello { least: a, most: b },
        1 => Request::Make { first: a, pages: b, write: c % 2 == 1 },
        2 => Request::Remove { segment: a },
        3 => Request::Get { segment: a, write: b % 2 == 1 },
        4 => Request::Release { access: a },
        5 => Request::Attach { access: a, first: b, pages: c },
        6 => Request::Detach { attachment: a },
        7 => Request::Fault { attachment: a, first: b, pages: c, write: d % 2 == 1 },
        8 => Request::GiveUp { attachment: a, first: b, pages: c },
        9 => Request::Snapshot { access: a, first: b, pages: c },
        10 => Request::Sum { access: a, page: b },
        _ => Request::Ack { order: a.into() },
    }
}

fuzz_target!(|steps: Vec<(u8, Step)>| {
    let mut exchange = Exchange::new(IMPORTERS).expect("memory and descriptors");
    for (which, step) in steps {
        let which = usize::from(which);
        match step {
            Step::Raw(bytes) => exchange.send(which, &bytes).expect("descriptors"),
            Step::Say { kind, fields } => {
                exchange.send(which, &request(kind, &fields).encode(7)).expect("descriptors");
            }
            Step::PageOut(page) => exchange.page_out(page.into()),
            Step::Bent { kind, fields, at, value, length } => {
                let mut bytes = request(kind, &fields).encode(7);
                let at = usize::from(at) * 4 % bytes.len();
                bytes[at..at + 4].copy_from_slice(&value.value().to_le_bytes());
                if let Some(length) = length {
                    bytes.resize(length.into(), 0);
                }
                exchange.send(which, &bytes).expect("descriptors");
            }
            Step::Watch(page) => exchange.watch(page.into()),
            Step::FailSwap => exchange.fail_swap(),
        }
    }
    exchange.end();
});
