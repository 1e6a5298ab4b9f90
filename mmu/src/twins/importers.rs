//! Importers in memory: what each has, what it has been told, and two threads of each.
//!
//! Story: one thread asks for pages and uses them ([`Importer::live`]), the other hears that they must be given up
//! ([`Importer::listen`]), so that a telling overtakes a grant. Each importer has a word of its own in every page, and finds what it
//! stored last.
//!
//! Limits: an importer stores, so that its segment must be one that may be written.

use std::collections::VecDeque;
use std::fmt::Write;
use std::io;

use crate::external::{Answers, External, ImporterId, SegmentId};
use crate::frames::Host;
use crate::scope::NoSleep;
use crate::sync::{self, Arc, Monitor, thread};
use crate::{Gfn, Machine, Mfn, Mmu, Width, lock_order};

/// Where an importer's word is in a page: that of importer `n` so many bytes after the first.
const WORDS: u32 = 64;
const WORD: u32 = 8;

/// Draws a number below its argument.
pub type Draw = dyn Fn(u32) -> u32 + Send + Sync;

/// How an importer behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// As it must.
    Honest,
    /// It answers, and keeps the page.
    Lies,
    /// A grant is for good, however old it is.
    Forgets,
}

/// What an importer has, and what it has been told.
#[derive(Debug)]
struct Desk {
    granted: Box<[u64]>,
    told: Box<[u64]>,
    mail: VecDeque<(u64, Vec<Gfn>)>,
    unanswered: Vec<u64>,
    gone: bool,
}

/// All importers of a guest, as its MMU reaches them; and the host of the segments' memory.
#[derive(Clone, Debug)]
pub struct Importers {
    desks: Arc<Vec<Monitor<Desk>>>,
    machine: Machine,
}

impl Importers {
    /// `count` of them, of a guest of `pages` pages in `machine`.
    pub fn new(count: u32, pages: u32, machine: Machine) -> Importers {
        let numbers = || vec![0; pages as usize].into();
        let desk = |_| Desk {
            granted: numbers(),
            told: numbers(),
            mail: VecDeque::new(),
            unanswered: Vec::new(),
            gone: false,
        };
        let desks = (0..count).map(|id| Monitor::new(lock_order::SLEEPERS, desk(id))).collect();
        Importers { desks: Arc::new(desks), machine }
    }
}

impl External for Importers {
    fn tell(&self, order: u64, importer: ImporterId, pages: &[Gfn]) {
        sync::note(|line| {
            let _ = write!(line, "tells importer {} to give {} page(s) up", importer.0, pages.len());
        });
        let desk = &self.desks[importer.0 as usize];
        let mut at = desk.lock();
        if !at.gone {
            at.mail.push_back((order, pages.to_vec()));
            at.unanswered.push(order);
        }
        drop(at);
        desk.notify_all();
    }

    fn wait(&self, order: u64) -> Answers {
        assert!(!NoSleep::is_entered(), "importers: somebody who may not sleep waits for an answer");
        for desk in self.desks.iter() {
            let mut at = desk.lock();
            while at.unanswered.contains(&order) {
                at = at.wait("an answer");
            }
        }
        Answers::default()
    }
}

impl Host for Importers {
    fn give_back(&self, frames: &[Mfn]) -> io::Result<()> {
        frames.iter().for_each(|mfn| self.machine.clear(*mfn));
        Ok(())
    }
}

/// One of them.
#[derive(Debug)]
pub struct Importer<M> {
    /// The MMU that it imports from.
    pub mmu: M,
    /// The others, and itself.
    pub all: Importers,
    /// Its number, from 0.
    pub id: u32,
    /// What it imports.
    pub segment: SegmentId,
    /// What it does with what it is told.
    pub manner: Manner,
}

impl<M: std::ops::Deref<Target = Mmu>> Importer<M> {
    fn desk(&self) -> &Monitor<Desk> {
        &self.all.desks[self.id as usize]
    }

    /// Uses a page that it has, if it has it: adds one to its word.
    fn touch(&self, page: u32, kept: &mut u64) {
        let at = self.mmu.homes_of(Gfn(page)).expect("there are homes").at(WORDS + WORD * self.id);
        let desk = self.desk().lock();
        if desk.granted[page as usize] > desk.told[page as usize] {
            let found = self.all.machine.load(at, Width::B8);
            assert_eq!(found, *kept, "importers: the word of importer {} in page {page}", self.id);
            *kept += 1;
            self.all.machine.store(at, Width::B8, *kept);
            sync::note(|line| {
                let _ = write!(line, "stores {kept} to page {page}");
            });
        }
    }

    /// Asks for pages, uses them and gives them up, `steps` times; then it is gone. Of the segment's pages, which are the guest's first,
    /// there are `pages`. Grants, and what it is told, are up to `pause` on their way.
    ///
    /// # Panics
    ///
    /// When it finds another word than its own: "importers: ..".
    pub fn live(&self, pages: u32, steps: u64, pause: u32, draw: &Draw) {
        let mut kept = vec![0; pages as usize];
        for _ in 0..steps {
            let page = draw(pages);
            let n = page as usize;
            match draw(4) {
                0 => {
                    self.desk().lock().granted[n] = 0;
                    self.mmu.give_up_page(ImporterId(self.id), Gfn(page));
                }
                1 => {
                    // It may be in use where it is for long, or the segment be closed.
                    let importer = ImporterId(self.id);
                    if let Ok(order) = self.mmu.import_page(importer, self.segment, Gfn(page), true) {
                        sync::note(|line| {
                            let _ = write!(line, "is given page {page}");
                        });
                        wait_up_to(pause, draw);
                        let mut desk = self.desk().lock();
                        desk.granted[n] = desk.granted[n].max(order);
                        if self.manner == Manner::Forgets {
                            desk.told[n] = 0;
                        }
                    }
                }
                _ => self.touch(page, &mut kept[n]),
            }
        }
        let mut desk = self.desk().lock();
        desk.gone = true;
        desk.granted.fill(0);
        desk.unanswered.clear();
        drop(desk);
        self.desk().notify_all();
        self.mmu.forget_importer(ImporterId(self.id));
    }

    /// Hears what it must give up, and answers, until it is gone.
    pub fn listen(&self, pause: u32, draw: &Draw) {
        loop {
            wait_up_to(pause, draw);
            let mut desk = self.desk().lock();
            while desk.mail.is_empty() && !desk.gone {
                desk = desk.wait("a letter");
            }
            let Some((order, pages)) = desk.mail.pop_front().filter(|_| !desk.gone) else { return };
            for gfn in pages.iter().filter(|_| self.manner != Manner::Lies) {
                let told = &mut desk.told[gfn.0 as usize];
                *told = order.max(*told);
            }
            desk.unanswered.retain(|asked| *asked != order);
            drop(desk);
            sync::note(|line| {
                let _ = write!(line, "has given {} page(s) up", pages.len());
            });
            self.desk().notify_all();
        }
    }
}

/// Lets others run, so often.
fn wait_up_to(pause: u32, draw: &Draw) {
    (0..draw(pause)).for_each(|_| thread::yield_now());
}
