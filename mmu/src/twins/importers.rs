//! Importers in memory: what each has, what it has been told, and two threads of each.
//!
//! Story: one thread asks for pages and uses them ([`Importer::live`]), the other hears that they must be given up
//! ([`Importer::listen`]), so that a telling overtakes a grant. An importer of a segment that may be written has a word of its own in
//! every page, and finds what it stored last. Another looks whether the page is at home, for as long as it has not given it up. Each sees
//! zeros in a home that is nobody's.

use std::collections::VecDeque;
use std::fmt::Write;
use std::io;
use std::ops::{Deref, Range};

use rustc_hash::FxHashMap;

use crate::external::{Answers, External, ImporterId, SegmentId};
use crate::frames::Host;
use crate::p2m::PageState;
use crate::scope::NoSleep;
use crate::sync::{self, Arc, Having, Monitor, Thing, Wait, thread};
use crate::{Gfn, Machine, Mfn, Mmu, Width, lock_order};

/// Where an importer's word is in a page: that of importer `n` so many bytes after the first.
const WORDS: u32 = 64;
const WORD: u32 = 8;

/// What an importer does by chance, and how long it takes.
pub trait Pace: Send + Sync {
    /// A number below `end`, which is not 0.
    fn draw(&self, end: u32) -> u32;

    /// A grant, or what it is told, is on its way.
    fn travel(&self);

    /// Before each step. Others come in anyway at locks, which may be enough.
    fn rest(&self) {}
}

/// Draws numbers by a function; others run so often at most while something is on its way.
#[derive(Clone, Copy, Debug)]
pub struct Yields<D>(pub u32, pub D);

impl<D: Fn(u32) -> u32 + Send + Sync> Pace for Yields<D> {
    fn draw(&self, end: u32) -> u32 {
        self.1(end)
    }

    fn travel(&self) {
        (0..self.draw(self.0)).for_each(|_| thread::yield_now());
    }
}

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
#[derive(Debug, Default)]
struct Desk {
    /// When it was last given each page, and when it was last told to give it up.
    granted: FxHashMap<u32, u64>,
    told: FxHashMap<u32, u64>,
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
    /// `count` of them, of a guest in `machine`.
    pub fn new(count: u32, machine: Machine) -> Importers {
        let desks = (0..count).map(|_| Monitor::new(lock_order::SLEEPERS, Desk::default())).collect();
        Importers { desks: Arc::new(desks), machine }
    }

    /// The answer of an importer. Its ear owes it, and nobody does before that has begun: its other thread, whose death is an answer too,
    /// may wait for the very one who waits for this.
    fn answer(&self, importer: u32) -> Thing {
        Thing::owed("the answer of importer", importer, &self.desks[importer as usize])
    }
}

impl Desk {
    /// It may use the page.
    fn has(&self, page: u32) -> bool {
        self.granted.get(&page) > self.told.get(&page)
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
        for (number, desk) in (0..).zip(self.desks.iter()) {
            let mut at = desk.lock();
            while at.unanswered.contains(&order) {
                at = at.wait(Wait::from("an answer").of(self.answer(number)));
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
    /// It stores to its pages, of a segment that may be written; or it looks where they are.
    pub stores: bool,
    /// What it does with what it is told.
    pub manner: Manner,
}

impl<M: Deref<Target = Mmu>> Importer<M> {
    fn desk(&self) -> &Monitor<Desk> {
        &self.all.desks[self.id as usize]
    }

    /// Uses a page that it has, if it has it: adds one to its word, or looks where it is.
    fn touch(&self, page: u32, kept: &mut u64) {
        let home = self.mmu.homes_of(Gfn(page)).expect("there are homes");
        let desk = self.desk().lock();
        if !desk.has(page) {
            // As one would see it who has kept what was taken from him.
            let is_free = || self.mmu.frames.gfn(home).is_none();
            let bare = !is_free() || self.all.machine.is_zero(home) || !is_free();
            assert!(bare, "importers: importer {} sees what was in page {page}", self.id);
            return;
        }
        if !self.stores {
            // It has not answered, so that the page is at home, or held by who waits for that.
            let state = self.mmu.p2m().lookup(Gfn(page));
            let there = state == PageState::Moving || state == PageState::Resident(home);
            assert!(there, "importers: importer {} has page {page}, which is {state:?}", self.id);
            return;
        }
        let at = home.at(WORDS + WORD * self.id);
        let found = self.all.machine.load(at, Width::B8);
        assert_eq!(found, *kept, "importers: the word of importer {} in page {page}", self.id);
        *kept += 1;
        self.all.machine.store(at, Width::B8, *kept);
        sync::note(|line| {
            let _ = write!(line, "stores {kept} to page {page}");
        });
    }

    /// Asks for pages, uses them and gives them up, `steps` times; then it is gone, whatever it has been told. Its pages are of the
    /// segment.
    ///
    /// # Panics
    ///
    /// When it finds another word than its own, or a page elsewhere: "importers: ..".
    pub fn live(&self, pages: Range<u32>, steps: u64, pace: &dyn Pace) {
        // Also where it panics: others would wait for its answers.
        let _alive = Alive(self);
        let mut kept = vec![0; pages.len()];
        for _ in 0..steps {
            pace.rest();
            let nth = pace.draw(pages.len() as u32);
            let page = pages.start + nth;
            match pace.draw(4) {
                0 => {
                    self.desk().lock().granted.remove(&page);
                    self.mmu.give_up_page(ImporterId(self.id), Gfn(page));
                }
                1 => self.ask(page, pace),
                _ => self.touch(page, &mut kept[nth as usize]),
            }
        }
    }

    /// Asks for a page, which may be in use where it is for long, or of a segment that is closed.
    fn ask(&self, page: u32, pace: &dyn Pace) {
        let given = self.mmu.import_page(ImporterId(self.id), self.segment, Gfn(page), self.stores);
        let Ok(order) = given else { return };
        sync::note(|line| {
            let _ = write!(line, "is given page {page}");
        });
        pace.travel();
        let mut desk = self.desk().lock();
        keep_last(&mut desk.granted, page, order);
        if self.manner == Manner::Forgets {
            desk.told.remove(&page);
        }
    }

    /// It answers nothing any more, and has nothing.
    fn die(&self) {
        let mut desk = self.desk().lock();
        desk.gone = true;
        desk.granted.clear();
        desk.unanswered.clear();
        drop(desk);
        self.desk().notify_all();
        self.mmu.forget_importer(ImporterId(self.id));
    }

    /// Hears what it must give up, and answers, until it is gone.
    pub fn listen(&self, pace: &dyn Pace) {
        let _owes = Having::new(self.all.answer(self.id));
        loop {
            pace.travel();
            let mut desk = self.desk().lock();
            while desk.mail.is_empty() && !desk.gone {
                desk = desk.wait(Wait::idle("a letter"));
            }
            let Some((order, pages)) = desk.mail.pop_front().filter(|_| !desk.gone) else { return };
            for gfn in pages.iter().filter(|_| self.manner != Manner::Lies) {
                keep_last(&mut desk.told, gfn.0, order);
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

/// What comes late is not taken for the last.
fn keep_last(orders: &mut FxHashMap<u32, u64>, page: u32, order: u64) {
    let last = orders.entry(page).or_default();
    *last = order.max(*last);
}

/// An importer that lives until this is dropped.
struct Alive<'a, M: Deref<Target = Mmu>>(&'a Importer<M>);

impl<M: Deref<Target = Mmu>> Drop for Alive<'_, M> {
    fn drop(&mut self) {
        self.0.die();
    }
}
