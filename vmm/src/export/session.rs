//! What one importer has, and what comes of its requests.
//!
//! Story: each importer has a thread that serves its requests in order, and may sleep for a page; what it answers to being told
//! does not come by here ([`super::hub`]). When it goes, whatever it had goes with it.
//!
//! Holds: INV-SESSION-1, an importer is entered only for pages that one of its attachments covers. INV-SESSION-2, nothing that it
//! sends is an index or a size before it was compared with what it has.
//!
//! Limits: [`ACCESSES_MAX`], [`ATTACHMENTS_MAX`].

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use umbra_mmu::external::{ImporterId, NotClosed, NotImported};
use umbra_mmu::{Context, Gfn, LocalStack, Mmu, PAGE_SIZE};

use super::protocol::{
    Code, FAULT_MAX, Reply, Request, SNAPSHOT_MAX, STATE_DIRTY, STATE_HOME, STATE_IMPORTED,
};
use super::segments::{Segment, SegmentError, Segments};

/// Accesses of one importer at once.
pub const ACCESSES_MAX: usize = 64;
/// Attachments of one importer at once.
pub const ATTACHMENTS_MAX: usize = 256;

#[derive(Debug)]
struct Access {
    segment: Segment,
    write: bool,
}

#[derive(Clone, Copy, Debug)]
struct Attachment {
    access: u32,
    first: u32,
    pages: u32,
}

impl Attachment {
    fn has(&self, first: u32, pages: u32) -> bool {
        let end = first.checked_add(pages);
        pages > 0 && first >= self.first && end.is_some_and(|end| end <= self.first + self.pages)
    }
}

/// One importer's.
#[derive(Debug)]
pub struct Session {
    importer: ImporterId,
    mmu: Arc<Mmu>,
    segments: Arc<Segments>,
    accesses: BTreeMap<u32, Access>,
    attachments: BTreeMap<u32, Attachment>,
    /// The last number given out.
    last: u32,
}

/// Why not, as the importer hears it.
struct Refusal(Code, String);

type Served = Result<(Reply, Option<OwnedFd>), Refusal>;

fn beyond(what: &str) -> Refusal {
    Refusal(Code::Beyond, format!("the pages are not all of {what}, or too many for one message"))
}

fn unknown(what: &str, number: u32) -> Refusal {
    Refusal(Code::Unknown, format!("this importer has no {what} {number}"))
}

impl From<SegmentError> for Refusal {
    fn from(error: SegmentError) -> Refusal {
        let code = match &error {
            SegmentError::Limit => Code::Limit,
            SegmentError::None(_) => Code::Beyond,
            SegmentError::NotOwn(_) => Code::Unknown,
            SegmentError::NotClosed(NotClosed::Short(_)) => Code::Short,
            SegmentError::NotClosed(NotClosed::Held { .. }) => Code::Held,
            SegmentError::File { .. } | SegmentError::Pool(_) | SegmentError::Kvm(_) => Code::Host,
        };
        Refusal(code, error.to_string())
    }
}

impl From<NotImported> for Refusal {
    fn from(error: NotImported) -> Refusal {
        let code = match &error {
            NotImported::NoSegment(_) => Code::Unknown,
            NotImported::Beyond { .. } | NotImported::Device(_) => Code::Beyond,
            NotImported::ReadOnly(_) => Code::Rights,
            NotImported::Held { .. } => Code::Held,
            NotImported::Short(_) => Code::Short,
        };
        Refusal(code, error.to_string())
    }
}

impl Session {
    /// That of an importer who has nothing yet.
    pub fn new(importer: ImporterId, mmu: Arc<Mmu>, segments: Arc<Segments>) -> Session {
        Session { importer, mmu, segments, accesses: BTreeMap::new(), attachments: BTreeMap::new(), last: 0 }
    }

    /// Does what is asked for: the reply, and a descriptor that goes with it. May sleep.
    pub fn serve(&mut self, request: Request) -> (Reply, Option<OwnedFd>) {
        let served = match request {
            Request::Make { first, pages, write } => self.make(first, pages, write),
            Request::Remove { segment } => self.remove(segment),
            Request::Get { segment, write } => self.get(segment, write),
            Request::Release { access } => self.release(access),
            Request::Attach { access, first, pages } => self.attach(access, first, pages),
            Request::Detach { attachment } => self.detach(attachment),
            Request::Fault { attachment, first, pages, write } => self.fault(attachment, first, pages, write),
            Request::GiveUp { attachment, first, pages } => self.give_up(attachment, first, pages),
            Request::Snapshot { access, first, pages } => self.snapshot(access, first, pages),
            Request::Sum { access, page } => self.sum(access, page),
            Request::Hello { .. } | Request::Ack { .. } => {
                Err(Refusal(Code::Malformed, "that has no place here".into()))
            }
        };
        served.unwrap_or_else(|Refusal(code, why)| (Reply::Refused { code, why }, None))
    }

    fn make(&mut self, first: u32, pages: u32, write: bool) -> Served {
        let made = self.segments.make(self.importer, Gfn(first), pages, write)?;
        Ok((Reply::Made { segment: made.id.0 }, None))
    }

    fn remove(&mut self, segment: u32) -> Served {
        self.segments.remove(self.importer, segment)?;
        Ok((Reply::Done, None))
    }

    fn get(&mut self, number: u32, write: bool) -> Served {
        if self.accesses.len() >= ACCESSES_MAX {
            return Err(Refusal(Code::Limit, format!("an importer has {ACCESSES_MAX} accesses at most")));
        }
        let segment = self.segments.find(number).ok_or_else(|| {
            let why = "a segment is there for as long as whoever has made it";
            Refusal(Code::Unknown, format!("this guest exports no segment {number}; {why}"))
        })?;
        if write && !segment.writable {
            return Err(Refusal(Code::Rights, format!("segment {number} is for readers")));
        }
        let descriptor = segment.descriptor(write);
        let descriptor = descriptor
            .map_err(|error| Refusal(Code::Host, format!("no descriptor of segment {number}: {error}")))?;
        let (first, pages, writable) = (segment.first.0, segment.pages, segment.writable);
        let access = self.number();
        self.accesses.insert(access, Access { segment, write });
        Ok((Reply::Got { access, first, pages, writable }, Some(descriptor)))
    }

    fn release(&mut self, access: u32) -> Served {
        self.accesses.remove(&access).ok_or_else(|| unknown("access", access))?;
        let by = |attachment: &Attachment| attachment.access == access;
        let gone: Vec<u32> =
            self.attachments.iter().filter(|(_, a)| by(a)).map(|(number, _)| *number).collect();
        for attachment in gone {
            self.detach(attachment)?;
        }
        Ok((Reply::Done, None))
    }

    fn attach(&mut self, access: u32, first: u32, pages: u32) -> Served {
        if self.attachments.len() >= ATTACHMENTS_MAX {
            let why = format!("an importer has {ATTACHMENTS_MAX} attachments at most");
            return Err(Refusal(Code::Limit, why));
        }
        let Some(from) = self.accesses.get(&access) else { return Err(unknown("access", access)) };
        if !from.segment.has(first, pages) {
            return Err(beyond("the segment"));
        }
        let attachment = self.number();
        self.attachments.insert(attachment, Attachment { access, first, pages });
        Ok((Reply::Attached { attachment }, None))
    }

    fn detach(&mut self, number: u32) -> Served {
        let attachment = self.attachments.remove(&number).ok_or_else(|| unknown("attachment", number))?;
        self.let_go(attachment.first, attachment.pages);
        Ok((Reply::Done, None))
    }

    fn fault(&mut self, number: u32, first: u32, pages: u32, write: bool) -> Served {
        let attachment = self.attachments.get(&number).ok_or_else(|| unknown("attachment", number))?;
        if !attachment.has(first, pages) || pages > FAULT_MAX {
            return Err(beyond("the attachment"));
        }
        let access = self.accesses.get(&attachment.access);
        let access = access.ok_or_else(|| unknown("access", attachment.access))?;
        if write && !access.write {
            return Err(Refusal(Code::Rights, "the access is for reading".into()));
        }
        let segment = access.segment.id;
        let mut granted = None;
        for (count, page) in (1..).zip(first..first + pages) {
            match self.mmu.import_page(self.importer, segment, Gfn(page), write) {
                // The least clock of all stands for them: too early a one is void, and asked for again.
                Ok(order) => granted = Some((granted.map_or(order, |(least, _)| least), count)),
                Err(why) if granted.is_none() => return Err(why.into()),
                Err(_) => break,
            }
        }
        let (order, pages) = granted.ok_or_else(|| beyond("the attachment"))?;
        Ok((Reply::Granted { order, pages }, None))
    }

    fn give_up(&mut self, number: u32, first: u32, pages: u32) -> Served {
        let attachment = self.attachments.get(&number).ok_or_else(|| unknown("attachment", number))?;
        if !attachment.has(first, pages) {
            return Err(beyond("the attachment"));
        }
        (first..first + pages).for_each(|page| self.mmu.give_up_page(self.importer, Gfn(page)));
        Ok((Reply::Done, None))
    }

    fn snapshot(&mut self, access: u32, first: u32, pages: u32) -> Served {
        let segment = &self.accesses.get(&access).ok_or_else(|| unknown("access", access))?.segment;
        if !segment.has(first, pages) || pages > SNAPSHOT_MAX {
            return Err(beyond("the segment"));
        }
        let state = |page| {
            let report = self.mmu.page_report(Gfn(page));
            let mut byte = report.kind;
            for (is, flag) in
                [(report.dirty, STATE_DIRTY), (report.home, STATE_HOME), (report.imported, STATE_IMPORTED)]
            {
                byte |= if is { flag } else { 0 };
            }
            byte
        };
        Ok((Reply::States((first..first + pages).map(state).collect()), None))
    }

    fn sum(&mut self, access: u32, page: u32) -> Served {
        let segment = &self.accesses.get(&access).ok_or_else(|| unknown("access", access))?.segment;
        if !segment.has(page, 1) {
            return Err(beyond("the segment"));
        }
        let mut bytes = [0; PAGE_SIZE as usize];
        let window = LocalStack::new(Context::Host);
        let read = self.mmu.read_bytes_sleeping(None, &window, Gfn(page).at(0), &mut bytes);
        read.map_err(|error| Refusal(Code::Short, error.to_string()))?;
        Ok((Reply::Summed { crc: crc32fast::hash(&bytes) }, None))
    }

    /// Lets go of the pages of a range that no attachment covers.
    fn let_go(&self, first: u32, pages: u32) {
        for page in first..first + pages {
            if !self.attachments.values().any(|attachment| attachment.has(page, 1)) {
                self.mmu.give_up_page(self.importer, Gfn(page));
            }
        }
    }

    /// A number that nothing of this importer's has.
    fn number(&mut self) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1);
            let taken = self.accesses.contains_key(&self.last) || self.attachments.contains_key(&self.last);
            if !taken {
                return self.last;
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.mmu.forget_importer(self.importer);
        self.segments.remove_all_of(self.importer);
    }
}
