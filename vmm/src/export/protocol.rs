//! The export protocol's messages: what they look like as bytes, and nothing of what they do.
//!
//! Story: each message is one datagram of a SOCK_SEQPACKET socket, all fields little-endian: a header (kind, length of the whole,
//! tag) and a body whose size its kind says. The tag of a request comes back in its reply. docs/export-protocol.md has it all.
//!
//! Holds: parsing allocates no more than a message has bytes, and takes any bytes there are; what it refuses it says in a sentence.

use std::fmt;

/// The version spoken here. The greeting agrees on one.
pub const VERSION: u32 = 2;
/// The longest message, in bytes.
pub const MESSAGE_MAX: usize = 4096;
/// Bytes of a header.
pub const HEADER: usize = 16;
/// Pages of one [`Request::Fault`], at most.
pub const FAULT_MAX: u32 = 64;
/// Pages of one [`Request::Snapshot`], at most.
pub const SNAPSHOT_MAX: u32 = 2048;
/// Pages of one [`Reply::Invalidate`], at most.
pub const INVALIDATE_MAX: usize = umbra_mmu::invalidation::BATCH_MAX;

/// In a page's byte of [`Reply::States`]: where it is (0 zeros, 1 in a frame, 2 in swap, 3 given up by the guest, 4 no memory, 5 on
/// its way).
pub const STATE_KIND: u8 = 7;
/// It may have been written to since its contents were last known.
pub const STATE_DIRTY: u8 = 1 << 3;
/// It is in the segment's own memory.
pub const STATE_HOME: u8 = 1 << 4;
/// Some importer has it.
pub const STATE_IMPORTED: u8 = 1 << 5;

/// What an importer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The first message: versions from `least` to `most` will do.
    Hello {
        /// The least.
        least: u32,
        /// The most.
        most: u32,
    },
    /// Make a segment.
    Make {
        /// Its first guest frame.
        first: u32,
        /// How many.
        pages: u32,
        /// Importers may write to it.
        write: bool,
    },
    /// Remove one's own segment.
    Remove {
        /// Which.
        segment: u32,
    },
    /// Get access to a segment, and a descriptor of its memory.
    Get {
        /// Which.
        segment: u32,
        /// To write too.
        write: bool,
    },
    /// Give an access back, and what is attached by it.
    Release {
        /// Which.
        access: u32,
    },
    /// Attach a part of a segment.
    Attach {
        /// By which access.
        access: u32,
        /// Its first guest frame.
        first: u32,
        /// How many.
        pages: u32,
    },
    /// Detach it.
    Detach {
        /// Which.
        attachment: u32,
    },
    /// Have pages, from the first on.
    Fault {
        /// Of which attachment.
        attachment: u32,
        /// The first guest frame.
        first: u32,
        /// How many, at most [`FAULT_MAX`].
        pages: u32,
        /// To write too.
        write: bool,
    },
    /// Pages are given up.
    GiveUp {
        /// Of which attachment.
        attachment: u32,
        /// The first guest frame.
        first: u32,
        /// How many.
        pages: u32,
    },
    /// Where pages are.
    Snapshot {
        /// By which access.
        access: u32,
        /// The first guest frame.
        first: u32,
        /// How many, at most [`SNAPSHOT_MAX`].
        pages: u32,
    },
    /// The CRC-32 of a page, as the exporter reads it.
    Sum {
        /// By which access.
        access: u32,
        /// The guest frame.
        page: u32,
    },
    /// What was asked for at `order` has been given up. Has no reply.
    Ack {
        /// The order.
        order: u64,
    },
}

/// Why a request was refused, as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// It is no message of this protocol. The connection ends.
    Malformed = 1,
    /// No version in common. The connection ends.
    Version = 2,
    /// What it names does not exist, or is another's.
    Unknown = 3,
    /// It goes past the segment, or the attachment, or what one message may ask for.
    Beyond = 4,
    /// It asks for more than may be had.
    Rights = 5,
    /// There is no room for one more.
    Limit = 6,
    /// A page is held where it is; try again.
    Held = 7,
    /// The guest has no frame for it; try again.
    Short = 8,
    /// The host refuses.
    Host = 9,
}

impl Code {
    const ALL: [Code; 9] = [
        Code::Malformed,
        Code::Version,
        Code::Unknown,
        Code::Beyond,
        Code::Rights,
        Code::Limit,
        Code::Held,
        Code::Short,
        Code::Host,
    ];
}

/// What the exporter says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To [`Request::Hello`], with the line.
    Welcome {
        /// The version from here on.
        version: u32,
        /// The importer's number.
        importer: u32,
        /// How long it may take to answer [`Reply::Invalidate`], in microseconds.
        deadline_micros: u32,
        /// Requests that it may have under way at once.
        requests_max: u32,
    },
    /// To [`Request::Make`].
    Made {
        /// The segment.
        segment: u32,
    },
    /// To [`Request::Get`], with a descriptor of the segment's memory: its byte 0 is the first guest frame's.
    Got {
        /// The access.
        access: u32,
        /// The segment's first guest frame.
        first: u32,
        /// How many it has.
        pages: u32,
        /// Importers may write to it.
        writable: bool,
    },
    /// To [`Request::Attach`].
    Attached {
        /// The attachment.
        attachment: u32,
    },
    /// To [`Request::Fault`].
    Granted {
        /// The clock of it: void, if [`Reply::Invalidate`] has named the page with a greater one.
        order: u64,
        /// How many of the pages asked for, from the first on.
        pages: u32,
    },
    /// To [`Request::Snapshot`]: a byte for each page.
    States(Vec<u8>),
    /// To [`Request::Sum`].
    Summed {
        /// The CRC-32 of its 4096 bytes.
        crc: u32,
    },
    /// To whatever else was done.
    Done,
    /// It was not.
    Refused {
        /// Why.
        code: Code,
        /// Why, in a sentence.
        why: String,
    },
    /// Pages must be given up, and [`Request::Ack`] said. No reply to anything: it comes by the line.
    Invalidate {
        /// The clock of it.
        order: u64,
        /// The guest frames.
        pages: Vec<u32>,
    },
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Shorter than a header, or longer than [`MESSAGE_MAX`].
    Size(usize),
    /// The header's length is another.
    Length {
        /// What it says.
        said: u32,
        /// What came.
        came: usize,
    },
    /// No such kind, or not from this side.
    Kind(u32),
    /// The body has another size than its kind wants.
    Body {
        /// The kind.
        kind: u32,
        /// The body's bytes.
        bytes: usize,
    },
    /// A field has a value that it cannot have.
    Field {
        /// The kind.
        kind: u32,
        /// The value.
        value: u32,
    },
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Malformed::Size(bytes) => {
                write!(f, "a message has {HEADER} to {MESSAGE_MAX} bytes, and this one {bytes}")
            }
            Malformed::Length { said, came } => write!(f, "the header says {said} bytes, and {came} came"),
            Malformed::Kind(kind) => write!(f, "no message from this side is of kind {kind:#x}"),
            Malformed::Body { kind, bytes } => {
                write!(f, "a message of kind {kind:#x} has no body of {bytes} bytes")
            }
            Malformed::Field { kind, value } => {
                write!(f, "no field of a message of kind {kind:#x} can be {value:#x}")
            }
        }
    }
}

const HELLO: u32 = 1;
const MAKE: u32 = 2;
const REMOVE: u32 = 3;
const GET: u32 = 4;
const RELEASE: u32 = 5;
const ATTACH: u32 = 6;
const DETACH: u32 = 7;
const FAULT: u32 = 8;
const GIVE_UP: u32 = 9;
const SNAPSHOT: u32 = 10;
const SUM: u32 = 11;
const ACK: u32 = 12;

const WELCOME: u32 = 0x8001;
const MADE: u32 = 0x8002;
const GOT: u32 = 0x8004;
const ATTACHED: u32 = 0x8006;
const GRANTED: u32 = 0x8008;
const STATES: u32 = 0x800a;
const SUMMED: u32 = 0x800b;
const DONE: u32 = 0x8010;
const REFUSED: u32 = 0x8011;
const INVALIDATE: u32 = 0x8012;

/// A message's kind, tag and body.
struct Parts<'a> {
    kind: u32,
    tag: u64,
    body: &'a [u8],
}

fn word(bytes: &[u8], index: usize) -> u32 {
    let at = index * 4;
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn long(bytes: &[u8], index: usize) -> u64 {
    u64::from(word(bytes, index)) | u64::from(word(bytes, index + 1)) << 32
}

fn split(bytes: &[u8]) -> Result<Parts<'_>, Malformed> {
    if bytes.len() < HEADER || bytes.len() > MESSAGE_MAX {
        return Err(Malformed::Size(bytes.len()));
    }
    let said = word(bytes, 1);
    if said as usize != bytes.len() {
        return Err(Malformed::Length { said, came: bytes.len() });
    }
    Ok(Parts { kind: word(bytes, 0), tag: long(bytes, 2), body: &bytes[HEADER..] })
}

impl Parts<'_> {
    /// The body as so many words, which it must have.
    fn words<const N: usize>(&self) -> Result<[u32; N], Malformed> {
        if self.body.len() != N * 4 {
            return Err(Malformed::Body { kind: self.kind, bytes: self.body.len() });
        }
        Ok(std::array::from_fn(|index| word(self.body, index)))
    }

    fn flag(&self, value: u32) -> Result<bool, Malformed> {
        match value {
            0 | 1 => Ok(value == 1),
            _ => Err(Malformed::Field { kind: self.kind, value }),
        }
    }
}

fn message(kind: u32, tag: u64, body: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len() * 4);
    let length = (HEADER + body.len() * 4) as u32;
    for word in [kind, length, tag as u32, (tag >> 32) as u32].iter().chain(body) {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

impl Request {
    /// Bytes of an acknowledgement.
    pub const ACK_BYTES: usize = HEADER + 8;

    /// The message and its tag.
    ///
    /// # Errors
    ///
    /// When the bytes are no request.
    pub fn parse(bytes: &[u8]) -> Result<(u64, Request), Malformed> {
        let parts = split(bytes)?;
        let request = match parts.kind {
            HELLO => {
                let [least, most] = parts.words()?;
                Request::Hello { least, most }
            }
            MAKE => {
                let [first, pages, write] = parts.words()?;
                Request::Make { first, pages, write: parts.flag(write)? }
            }
            REMOVE => {
                let [segment] = parts.words()?;
                Request::Remove { segment }
            }
            GET => {
                let [segment, write] = parts.words()?;
                Request::Get { segment, write: parts.flag(write)? }
            }
            RELEASE => {
                let [access] = parts.words()?;
                Request::Release { access }
            }
            ATTACH => {
                let [access, first, pages] = parts.words()?;
                Request::Attach { access, first, pages }
            }
            DETACH => {
                let [attachment] = parts.words()?;
                Request::Detach { attachment }
            }
            FAULT => {
                let [attachment, first, pages, write] = parts.words()?;
                Request::Fault { attachment, first, pages, write: parts.flag(write)? }
            }
            GIVE_UP => {
                let [attachment, first, pages] = parts.words()?;
                Request::GiveUp { attachment, first, pages }
            }
            SNAPSHOT => {
                let [access, first, pages] = parts.words()?;
                Request::Snapshot { access, first, pages }
            }
            SUM => {
                let [access, page] = parts.words()?;
                Request::Sum { access, page }
            }
            ACK => {
                let [low, high] = parts.words()?;
                Request::Ack { order: u64::from(low) | u64::from(high) << 32 }
            }
            kind => return Err(Malformed::Kind(kind)),
        };
        Ok((parts.tag, request))
    }

    /// Its bytes.
    pub fn encode(&self, tag: u64) -> Vec<u8> {
        match *self {
            Request::Hello { least, most } => message(HELLO, tag, &[least, most]),
            Request::Make { first, pages, write } => message(MAKE, tag, &[first, pages, write.into()]),
            Request::Remove { segment } => message(REMOVE, tag, &[segment]),
            Request::Get { segment, write } => message(GET, tag, &[segment, write.into()]),
            Request::Release { access } => message(RELEASE, tag, &[access]),
            Request::Attach { access, first, pages } => message(ATTACH, tag, &[access, first, pages]),
            Request::Detach { attachment } => message(DETACH, tag, &[attachment]),
            Request::Fault { attachment, first, pages, write } => {
                message(FAULT, tag, &[attachment, first, pages, write.into()])
            }
            Request::GiveUp { attachment, first, pages } => {
                message(GIVE_UP, tag, &[attachment, first, pages])
            }
            Request::Snapshot { access, first, pages } => message(SNAPSHOT, tag, &[access, first, pages]),
            Request::Sum { access, page } => message(SUM, tag, &[access, page]),
            Request::Ack { order } => message(ACK, tag, &halves(order)),
        }
    }
}

impl Reply {
    /// The message and its tag.
    ///
    /// # Errors
    ///
    /// When the bytes are nothing that an exporter says.
    pub fn parse(bytes: &[u8]) -> Result<(u64, Reply), Malformed> {
        let parts = split(bytes)?;
        let reply = match parts.kind {
            WELCOME => {
                let [version, importer, deadline_micros, requests_max] = parts.words()?;
                Reply::Welcome { version, importer, deadline_micros, requests_max }
            }
            MADE => {
                let [segment] = parts.words()?;
                Reply::Made { segment }
            }
            GOT => {
                let [access, first, pages, writable] = parts.words()?;
                Reply::Got { access, first, pages, writable: parts.flag(writable)? }
            }
            ATTACHED => {
                let [attachment] = parts.words()?;
                Reply::Attached { attachment }
            }
            GRANTED => {
                let [low, high, pages] = parts.words()?;
                Reply::Granted { order: u64::from(low) | u64::from(high) << 32, pages }
            }
            STATES => Reply::States(parts.body.to_vec()),
            SUMMED => {
                let [crc] = parts.words()?;
                Reply::Summed { crc }
            }
            DONE => {
                let [] = parts.words()?;
                Reply::Done
            }
            REFUSED => {
                let value = word(parts.body, 0);
                let code = Code::ALL.into_iter().find(|code| *code as u32 == value);
                let code = code.ok_or(Malformed::Field { kind: REFUSED, value })?;
                let why = parts.body.get(4..).unwrap_or_default();
                Reply::Refused { code, why: String::from_utf8_lossy(why).into_owned() }
            }
            INVALIDATE => {
                let words = parts.body.len() / 4;
                if parts.body.len() % 4 != 0 || words < 2 {
                    return Err(Malformed::Body { kind: INVALIDATE, bytes: parts.body.len() });
                }
                let pages = (2..words).map(|index| word(parts.body, index)).collect();
                Reply::Invalidate { order: long(parts.body, 0), pages }
            }
            kind => return Err(Malformed::Kind(kind)),
        };
        Ok((parts.tag, reply))
    }

    /// Its bytes. A sentence is cut to what a message has room for.
    pub fn encode(&self, tag: u64) -> Vec<u8> {
        match self {
            Reply::Welcome { version, importer, deadline_micros, requests_max } => {
                message(WELCOME, tag, &[*version, *importer, *deadline_micros, *requests_max])
            }
            Reply::Made { segment } => message(MADE, tag, &[*segment]),
            Reply::Got { access, first, pages, writable } => {
                message(GOT, tag, &[*access, *first, *pages, (*writable).into()])
            }
            Reply::Attached { attachment } => message(ATTACHED, tag, &[*attachment]),
            Reply::Granted { order, pages } => {
                let [low, high] = halves(*order);
                message(GRANTED, tag, &[low, high, *pages])
            }
            Reply::States(states) => with_bytes(message(STATES, tag, &[]), states),
            Reply::Summed { crc } => message(SUMMED, tag, &[*crc]),
            Reply::Done => message(DONE, tag, &[]),
            Reply::Refused { code, why } => {
                with_bytes(message(REFUSED, tag, &[*code as u32]), why.as_bytes())
            }
            Reply::Invalidate { order, pages } => {
                let body: Vec<u32> = halves(*order).into_iter().chain(pages.iter().copied()).collect();
                message(INVALIDATE, tag, &body)
            }
        }
    }
}

/// A message with `more` behind it, as far as there is room.
fn with_bytes(mut bytes: Vec<u8>, more: &[u8]) -> Vec<u8> {
    let room = MESSAGE_MAX - bytes.len();
    bytes.extend_from_slice(&more[..more.len().min(room)]);
    let length = bytes.len() as u32;
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn requests() -> Vec<Request> {
        vec![
            Request::Hello { least: 1, most: 7 },
            Request::Make { first: 5, pages: 6, write: true },
            Request::Remove { segment: 3 },
            Request::Get { segment: 3, write: false },
            Request::Release { access: 1 },
            Request::Attach { access: 1, first: 5, pages: 2 },
            Request::Detach { attachment: 9 },
            Request::Fault { attachment: 9, first: 5, pages: 1, write: true },
            Request::GiveUp { attachment: 9, first: 5, pages: 1 },
            Request::Snapshot { access: 1, first: 5, pages: 2 },
            Request::Sum { access: 1, page: 5 },
            Request::Ack { order: u64::MAX - 1 },
        ]
    }

    fn replies() -> Vec<Reply> {
        let mut replies: Vec<_> =
            Code::ALL.into_iter().map(|code| Reply::Refused { code, why: "no".into() }).collect();
        replies.extend([
            Reply::Welcome { version: 1, importer: 2, deadline_micros: 3, requests_max: 4 },
            Reply::Made { segment: 3 },
            Reply::Got { access: 1, first: 5, pages: 6, writable: true },
            Reply::Attached { attachment: 9 },
            Reply::Granted { order: 1 << 40, pages: 3 },
            Reply::States(vec![1, 2, 3]),
            Reply::Summed { crc: 0xdead_beef },
            Reply::Done,
            Reply::Invalidate { order: 1 << 41, pages: vec![5, 6] },
            Reply::Invalidate { order: 1, pages: vec![7; INVALIDATE_MAX] },
        ]);
        replies
    }

    #[test]
    fn every_message_comes_back_as_it_was() {
        for request in requests() {
            assert_eq!(Request::parse(&request.encode(77)), Ok((77, request)));
        }
        for reply in replies() {
            let bytes = reply.encode(u64::MAX);
            assert!(bytes.len() <= MESSAGE_MAX);
            assert_eq!(Reply::parse(&bytes), Ok((u64::MAX, reply)));
        }
    }

    #[test]
    fn a_message_that_is_cut_or_has_more_is_none() {
        for request in requests() {
            let whole = request.encode(1);
            for length in 0..whole.len() {
                assert!(Request::parse(&whole[..length]).is_err(), "{request:?} cut to {length}");
            }
            let mut longer = whole.clone();
            longer.extend_from_slice(&[0; 4]);
            assert!(Request::parse(&longer).is_err());
            longer[4..8].copy_from_slice(&((whole.len() + 4) as u32).to_le_bytes());
            let refused = Request::parse(&longer);
            assert!(matches!(refused, Err(Malformed::Body { .. })), "{request:?}: {refused:?}");
        }
        assert!(Request::parse(&vec![0; MESSAGE_MAX + 1]).is_err());
        assert!(Request::parse(&Reply::Done.encode(1)).is_err(), "an exporter's");
        let mut flag = Request::Get { segment: 1, write: true }.encode(1);
        flag[HEADER + 4] = 2;
        assert!(matches!(Request::parse(&flag), Err(Malformed::Field { value: 2, .. })));
    }

    #[test]
    fn a_long_sentence_is_cut() {
        let bytes = Reply::Refused { code: Code::Host, why: "x".repeat(MESSAGE_MAX) }.encode(1);
        assert_eq!(bytes.len(), MESSAGE_MAX);
        assert!(Reply::parse(&bytes).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_that_encodes_to_them_or_none(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut bytes = bytes;
            if bytes.len() >= HEADER {
                let length = bytes.len() as u32;
                bytes[4..8].copy_from_slice(&length.to_le_bytes());
                bytes[0] %= 14;
                bytes[1..4].fill(0);
            }
            if let Ok((tag, request)) = Request::parse(&bytes) {
                prop_assert_eq!(request.encode(tag), bytes.clone());
            }
            let _ = Reply::parse(&bytes);
        }
    }
}
