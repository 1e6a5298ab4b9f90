//! Segments, attachments and connections: who waits for whom, and what is still there when one of them has gone.
//!
//! Story: as in [`super::export`]. A request that takes long is made of a segment that a silent importer has a page of: to remove it
//! takes its deadline, or until it answers.

use std::fs::File;
use std::thread;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use rustix::net::RecvFlags;
use umbra::export::REQUESTS_MAX;
use umbra::export::protocol::{Code, Reply, Request};
use umbra::import::{Attachment, ImportError};

use super::export::{Exporting, FIRST, FOREVER, PAGE, PAGES, Raw};
use super::umbra::SOFT;
use crate::ensure;
use crate::support::{Verdict, case};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    type Body = fn() -> Verdict;
    let bodies: [(&str, Body); 5] = [
        ("segments_that_are_slow_to_go_keep_nobody_from_others", bystander),
        ("segments_can_be_gone_though_a_silent_importer_has_had_them", orphan),
        ("segments_requests_that_wait_are_as_many_as_is_said", queue),
        ("segments_a_page_that_is_given_up_is_so_in_every_attachment", given_up),
        ("segments_nothing_is_read_of_a_guest_that_has_gone", gone),
    ];
    bodies.map(|(name, body)| case(name, &[], body)).into()
}

/// Somebody who makes a segment, and one who has a page of it and says nothing.
struct Slow {
    owner: Raw,
    segment: u32,
    silent: Raw,
    _file: File,
}

impl Slow {
    fn make(guest: &Exporting, first: u32) -> Result<Slow, Failed> {
        let owner = Raw::hello(&guest.path())?;
        let Reply::Made { segment } = owner.ask(Request::Make { first, pages: 4, write: false })? else {
            return Err("no segment".into());
        };
        let silent = Raw::hello(&guest.path())?;
        silent.send(&Request::Get { segment, write: false }.encode(1))?;
        let Some((_, Reply::Got { access, .. }, Some(file))) = umbra::export::receive(&silent.socket)? else {
            return Err("no access".into());
        };
        let Reply::Attached { attachment } = silent.ask(Request::Attach { access, first, pages: 4 })? else {
            return Err("no attachment".into());
        };
        let granted = silent.ask(Request::Fault { attachment, first, pages: 1, write: false })?;
        ensure!(matches!(granted, Reply::Granted { .. }), "{granted:?}");
        Ok(Slow { owner, segment, silent, _file: file.into() })
    }

    /// The owner removes it, and the silent one has been told.
    fn remove(&self) -> Result<u64, Failed> {
        self.owner.send(&Request::Remove { segment: self.segment }.encode(1))?;
        match self.silent.told(RecvFlags::empty())? {
            Some(Reply::Invalidate { order, .. }) => Ok(order),
            other => Err(format!("it is told {other:?}").into()),
        }
    }

    /// It says something after all.
    fn answer(&self, order: u64) -> Verdict {
        self.silent.answer(&Request::Ack { order }.encode(0))
    }
}

fn is_refused(reply: &Reply, wants: Code) -> bool {
    matches!(reply, Reply::Refused { code, .. } if *code == wants)
}

fn bystander() -> Verdict {
    let guest = Exporting::start(SOFT, &["--export-deadline", FOREVER])?;
    let slow = Slow::make(&guest, FIRST)?;
    let order = slow.remove()?;
    // While that is under way, others make segments, use them and remove them.
    let other = guest.importer()?;
    let segment = other.make(FIRST + PAGES, 4, false)?;
    let access = other.get(segment, false)?;
    other.attach(&access, FIRST + PAGES, 4)?.read(FIRST + PAGES, 0, &mut [0; 8])?;
    other.remove(segment)?;
    // What goes is nobody's any more, and its pages are not free yet.
    let gone = other.get(slow.segment, false);
    ensure!(matches!(gone, Err(ImportError::Refused { code: Code::Unknown, .. })), "{gone:?}");
    thread::scope(|scope| -> Verdict {
        // Whoever wants these waits.
        let again = scope.spawn(|| other.make(FIRST, 4, false));
        thread::sleep(Duration::from_millis(50));
        ensure!(!again.is_finished(), "it has pages that others have");
        slow.answer(order)?;
        ensure!(slow.owner.hear()? == Some(Reply::Done), "it is not removed");
        again.join().map_err(|_| "whoever waits has panicked")??;
        Ok(())
    })?;
    drop((slow, other));
    guest.end()
}

/// Whoever has made it goes at once; the silent one does when its time is over.
fn orphan() -> Verdict {
    let guest = Exporting::start(SOFT, &["--export-deadline", "50ms", "--export-policy", "keep"])?;
    let Slow { owner, silent, .. } = Slow::make(&guest, FIRST)?;
    drop(owner);
    let other = guest.importer()?;
    other.make(FIRST, 4, false)?;
    drop((silent, other));
    guest.end()
}

fn queue() -> Verdict {
    let guest = Exporting::start(SOFT, &["--export-deadline", FOREVER])?;
    for more in [0, 1] {
        let slow = Slow::make(&guest, FIRST)?;
        let order = slow.remove()?;
        for tag in 0..REQUESTS_MAX + more {
            slow.owner.send(&Request::Release { access: 99 }.encode(2 + tag as u64))?;
        }
        if more > 0 {
            let last = slow.owner.hear()?.ok_or("it was cut off without a word")?;
            ensure!(is_refused(&last, Code::Limit), "{last:?}");
            slow.owner.is_cut()?;
        }
        slow.answer(order)?;
        if more == 0 {
            ensure!(slow.owner.hear()? == Some(Reply::Done), "it is not removed");
            for _ in 0..REQUESTS_MAX {
                let reply = slow.owner.hear()?.ok_or("it was cut off")?;
                ensure!(is_refused(&reply, Code::Unknown), "{reply:?}");
            }
        }
        drop(slow);
    }
    guest.end()
}

fn bytes(attachment: &Attachment) -> Result<[u8; 4], ImportError> {
    let mut bytes = [0; 4];
    attachment.read(PAGE, 0, &mut bytes)?;
    Ok(bytes)
}

fn given_up() -> Verdict {
    let mut guest = Exporting::start(SOFT, &["--export-deadline", FOREVER])?;
    let importer = guest.importer()?;
    let segment = importer.make(FIRST, PAGES, true)?;
    let access = importer.get(segment, true)?;
    let [one, other] = [importer.attach(&access, FIRST, PAGES)?, importer.attach(&access, PAGE, 1)?];
    one.write(PAGE, 0, b"page")?;
    ensure!(&bytes(&other)? == b"page" && (one.granted(), other.granted()) == (1, 1), "not both have it");
    one.give_up(PAGE, 1)?;
    ensure!((one.granted(), other.granted()) == (0, 0), "the other has it still");
    // It goes, and nobody is told.
    guest.page_out(PAGE)?;
    ensure!(guest.page_outs()?["importers_told"] == 0, "somebody had the page");
    ensure!(&bytes(&other)? == b"page", "the other reads something else");
    // One that detaches leaves the page to the other.
    one.read(PAGE, 0, &mut [0; 4])?;
    drop(one);
    ensure!(other.granted() == 1, "the other has lost it");
    guest.page_out(PAGE)?;
    ensure!(guest.page_outs()?["importers_told"] == 1, "the other was not told");
    ensure!(&bytes(&other)? == b"page", "the other reads something else");
    drop((other, access, importer));
    guest.end()
}

fn gone() -> Verdict {
    let mut guest = Exporting::start(SOFT, &[])?;
    let importers = [guest.importer()?, guest.importer()?];
    let segment = importers[0].make(FIRST, PAGES, true)?;
    let accesses = [importers[0].get(segment, true)?, importers[1].get(segment, true)?];
    let attach = |n: usize| importers[n].attach(&accesses[n], FIRST, PAGES);
    let [mine, theirs] = [attach(0)?, attach(1)?];
    mine.write(PAGE, 0, b"page")?;
    ensure!(&bytes(&mine)? == b"page" && &bytes(&theirs)? == b"page", "it is not there");
    // An importer that has gone has nothing, though an attachment of it is left.
    let [first, second] = importers;
    drop(second);
    let ended = bytes(&theirs);
    ensure!(matches!(ended, Err(ImportError::Ended(_))), "{ended:?}");
    guest.qmp.send("quit", serde_json::json!({}))?;
    guest.running.end()?;
    for read in [
        bytes(&mine).map(drop),
        mine.write(PAGE, 0, b"more"),
        mine.fault(PAGE, 1, umbra::import::Rights::Read).map(drop),
    ] {
        ensure!(matches!(read, Err(ImportError::Ended(_))), "{read:?}");
    }
    ensure!(mine.granted() == 0, "it has a page of a guest that has gone");
    drop((mine, theirs, accesses, first));
    Ok(())
}
