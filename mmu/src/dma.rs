//! Sessions: guest memory as `vm-memory`'s traits have it, for the time of one request of a device.
//!
//! Story: a device's code (`virtio-queue` and whatever stands on it) takes a `GuestMemory` and expects of it that it is there.
//! Guest memory here comes and goes. A [`Session`] has the pages of one request, each pinned through the window's pool
//! ([`crate::pool`]), and is a `GuestMemory` of exactly these. Which pages they are stands in guest memory itself: a ring leads
//! to descriptors, those to buffers. So a request has two parts, and [`Mmu::session`] runs the first:
//!
//! ```text
//!   plan   may run several times   reads the ring, touches all that the request will read and write; changes nothing
//!     a page it touches is taken as it is touched, if it is in memory and there is a slot. If not, the access fails, and after
//!     the plan all pages are let go of; then, with nothing held, that page is brought in or a slot awaited; then all pages
//!     touched so far are taken, in order of their numbers, all or none; and the plan runs again
//!   run    once                    with the session that comes of it: no page is missing, none is added
//! ```
//!
//! Most plans run once. What a plan made of an access that failed is of no account, for it runs again; so it may swallow the
//! error, as `virtio-queue` does. One that pops from a queue goes back in it, and the run pops for good; one that touches the
//! rings first spares the log what the queue says of rings that are not there. The guest may change both in between: then the run
//! is refused what was not planned, and [`Session::refused`] says so.
//!
//! A slice that is handed out to be written counts as written, all of it and nothing else, and the shadow is told when the
//! session goes. A guest that polls its ring may see earlier that its request is done, and use as code or as a page table what
//! has been read for it: a device tells of the data ([`Session::tell`]) before it says that they are there.
//!
//! Why not by `vm-memory`'s `Bitmap`, which hears of stores through a slice: a slice has the bitmap that its memory was mapped
//! with, safe code cannot give it another, and who passes a slice's pointer to the host tells it nothing.
//!
//! Holds: INV-DMA-1, what a session reaches is pinned from its plan on. INV-POOL-2: nothing is held where it sleeps, which is
//! between two plans. A plan itself never sleeps, nor does a session that is dropped.
//!
//! Progress: each plan runs with all pages of the one before and those that it lacked, of which there are [`PAGES_MAX`] at most.
//! Who finds the pool full, or pages gone that it has brought in [`PATIENCE`] times, takes a turn (`pool::Turn`).
//!
//! Locks: none held by whoever calls [`Mmu::session`], and nothing mapped; a vCPU that calls it is outside.
//!
//! Limits: [`PAGES_MAX`] pages, the rings' among them; larger requests are for the device to split. A thread has one session
//! at a time; it may give it to another ([`Session::pass_on`]).

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::iter::FusedIterator;
use std::ops::Range;

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryResult, Permissions,
    VolatileSlice,
};

use crate::Mmu;
use crate::addr::{Gfn, Gpa, PAGE_SHIFT, PAGE_SIZE};
use crate::p2m::PageState;
use crate::pool::{self, NotTaken, PersistentMap, Turn};
use crate::reclaim::Shortage;
use crate::window::Intent;

/// The most pages of one session, or as many as the pool has slots: a request of 128 KiB, its header, its status and its rings;
/// and some slots are left for others.
pub const PAGES_MAX: u32 = 48;
/// How often a session may find pages gone that it had brought in, before it takes a turn.
pub const PATIENCE: u32 = 8;

/// Why an access through a session fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No memory there: a device or nothing.
    #[error("guest-physical address {0} is not memory")]
    Device(Gpa),
    /// The range is longer than what is left of all addresses.
    #[error("{count} bytes from guest-physical address {at} on go past the last address there is")]
    Wraps {
        /// Its first byte.
        at: Gpa,
        /// Its length.
        count: u64,
    },
    /// More pages than a session may have.
    #[error(
        "a request wants guest frame {gfn} beside {max} others, and one may have {max} at once (at most {PAGES_MAX}, and no \
         more than the window's pool has slots); it has to be split"
    )]
    TooMany {
        /// The page that is too many.
        gfn: Gfn,
        /// The limit.
        max: u32,
    },
    /// The plan did not touch the page.
    #[error("guest frame {0} is not among those that the request was planned with")]
    NotPlanned(Gfn),
    /// Not in memory, or no slot for it: the plan will run again.
    #[error("guest frame {0} is not at hand yet")]
    Absent(Gfn),
}

impl From<Refused> for GuestMemoryError {
    fn from(why: Refused) -> GuestMemoryError {
        match why {
            Refused::Device(at) => GuestMemoryError::InvalidGuestAddress(GuestAddress(at.0)),
            Refused::Wraps { .. } => GuestMemoryError::GuestAddressOverflow,
            _ => GuestMemoryError::IOError(io::Error::other(why)),
        }
    }
}

/// Why there is no session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSession {
    /// The plan touched what cannot be reached, whatever it made of that.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A page cannot be brought in.
    #[error(transparent)]
    Short(#[from] Shortage),
}

/// A page that a plan has touched.
#[derive(Clone, Copy, Debug)]
struct Want {
    gfn: Gfn,
    intent: Intent,
}

/// The pages of one request, pinned; and while it is planned, the pages so far.
#[derive(Debug)]
pub struct Session<'m> {
    mmu: &'m Mmu,
    /// Filled from the front. Each stays where it is: slices borrow from it.
    held: Box<[OnceCell<PersistentMap<'m>>]>,
    /// Touched, and not to be had without sleep.
    absent: RefCell<Vec<Want>>,
    refused: Cell<Option<Refused>>,
    planned: bool,
}

impl Mmu {
    /// Runs `plan` until it has touched only what is at hand; returns the session that has it all, and what the plan made of it.
    /// `plan` may run several times: it changes nothing but what the next one sets right. Called with no lock held and
    /// nothing mapped, by a vCPU (`own`) that is outside or by another thread; may sleep between plans.
    ///
    /// # Errors
    ///
    /// When the plan was refused an access for good, or a page cannot be brought in.
    pub fn session<'m, P>(
        &'m self,
        own: Option<u32>,
        mut plan: impl FnMut(&Session<'m>) -> P,
    ) -> Result<(Session<'m>, P), NoSession> {
        pool::assert_none_held();
        let mut wants = Vec::new();
        loop {
            let mut session = self.take_all(own, &wants)?;
            let planned = plan(&session);
            if !session.absent.get_mut().is_empty() {
                wants = session.wants();
                continue;
            }
            if let Some(why) = session.refused.get() {
                return Err(why.into());
            }
            session.planned = true;
            return Ok((session, planned));
        }
    }

    /// Takes these pages, all or none; sleeps, holding nothing, until it has them.
    fn take_all(&self, own: Option<u32>, wants: &[Want]) -> Result<Session<'_>, NoSession> {
        let (mut lost, mut turn) = (0, None);
        loop {
            match Session::try_new(self, wants, turn.as_ref()) {
                Ok(session) => return Ok(session),
                Err(NotTaken::Device(gfn)) => return Err(Refused::Device(gfn.at(0)).into()),
                Err(NotTaken::Need(_)) => lost += 1,
                Err(NotTaken::Full) => lost = PATIENCE,
            }
            if lost >= PATIENCE {
                turn.get_or_insert_with(|| Turn::wait(self, wants.iter().map(|want| want.gfn).collect()));
            }
            for want in wants {
                if !matches!(self.p2m.lookup(want.gfn), PageState::Resident(_)) {
                    self.bring_in(own, want.gfn)?;
                }
            }
            turn.iter().for_each(Turn::claim);
        }
    }
}

impl<'m> Session<'m> {
    /// One that has these pages; never sleeps. The slots of what it could take come back when it could not take all.
    fn try_new(mmu: &'m Mmu, wants: &[Want], turn: Option<&Turn<'m>>) -> Result<Session<'m>, NotTaken> {
        let max = PAGES_MAX.min(mmu.pool.size);
        let session = Session {
            mmu,
            held: (0..max).map(|_| OnceCell::new()).collect(),
            absent: RefCell::default(),
            refused: Cell::new(None),
            planned: false,
        };
        for (place, want) in session.held.iter().zip(wants) {
            let map = match turn {
                Some(turn) => turn.try_take_page(want.gfn, want.intent)?,
                None => mmu.try_take_page(want.gfn, want.intent)?,
            };
            place.get_or_init(|| map);
        }
        Ok(session)
    }

    /// Sees to it that a range can be read, or with [`Permissions::Write`] written too: for a plan, of what the run will use.
    ///
    /// # Errors
    ///
    /// When it cannot. For a plan that is over, then; whether it runs again, [`Mmu::session`] knows.
    pub fn touch(&self, at: GuestAddress, count: usize, access: Permissions) -> GuestMemoryResult<()> {
        Ok(self.noted(self.reach(at, count, intent_of(access)))?)
    }

    /// The first access that was refused for good, told to a caller who may have swallowed it.
    pub fn refused(&self) -> Option<Refused> {
        self.refused.get()
    }

    /// Tells the shadow what was written so far: before the guest is told that it is there. No slice is in use, says the
    /// borrow; what is written later is told when the session goes.
    pub fn tell(&mut self) {
        self.held.iter_mut().filter_map(OnceCell::get_mut).for_each(PersistentMap::tell);
    }

    /// Says that the session goes to another thread: the one that opened it does not hold it any more, and may open another.
    #[must_use]
    pub fn pass_on(mut self) -> Session<'m> {
        for place in &mut self.held {
            *place = place.take().map(PersistentMap::pass_on).map_or_else(OnceCell::new, OnceCell::from);
        }
        self
    }

    /// Notes what was refused for good.
    fn noted(&self, reached: Result<(), Refused>) -> Result<(), Refused> {
        if let Err(why) = reached
            && !matches!(why, Refused::Absent(_))
        {
            self.refused.set(self.refused.get().or(Some(why)));
        }
        reached
    }

    fn pages(&self) -> impl Iterator<Item = &PersistentMap<'m>> {
        self.held.iter().map_while(OnceCell::get)
    }

    fn find(&self, gfn: Gfn) -> Option<&PersistentMap<'m>> {
        self.pages().find(|map| map.gfn() == gfn)
    }

    /// All pages touched so far, in order. They are let go of.
    fn wants(self) -> Vec<Want> {
        let mut wants = self.absent.take();
        wants.extend(self.pages().map(|map| Want { gfn: map.gfn(), intent: map.intent() }));
        wants.sort_unstable_by_key(|want| want.gfn);
        wants
    }

    /// Touches every page of a range, those behind an absent one too, so that they are brought in together.
    fn reach(&self, at: GuestAddress, count: usize, intent: Intent) -> Result<(), Refused> {
        let mut reached = Ok(());
        for gfn in self.frames_of(at, count)? {
            match self.reach_page(Gfn(gfn), intent) {
                Err(why @ Refused::Absent(_)) => reached = Err(why),
                done => done?,
            }
        }
        reached
    }

    fn reach_page(&self, gfn: Gfn, intent: Intent) -> Result<(), Refused> {
        if let Some(map) = self.find(gfn) {
            if intent == Intent::Write {
                map.make_writable();
            }
            return Ok(());
        }
        if self.planned {
            return Err(Refused::NotPlanned(gfn));
        }
        if let Some(want) = self.absent.borrow_mut().iter_mut().find(|want| want.gfn == gfn) {
            if intent == Intent::Write {
                want.intent = intent;
            }
            return Err(Refused::Absent(gfn));
        }
        let taken = self.pages().count();
        let max = self.held.len();
        if taken + self.absent.borrow().len() == max {
            return Err(Refused::TooMany { gfn, max: max as u32 });
        }
        match self.mmu.try_take_page(gfn, intent) {
            Ok(map) => {
                self.held[taken].get_or_init(|| map);
                Ok(())
            }
            Err(NotTaken::Device(gfn)) => Err(Refused::Device(gfn.at(0))),
            Err(NotTaken::Need(_) | NotTaken::Full) => {
                self.absent.borrow_mut().push(Want { gfn, intent });
                Err(Refused::Absent(gfn))
            }
        }
    }

    /// The frames of a range, all of them memory by their numbers.
    fn frames_of(&self, at: GuestAddress, count: usize) -> Result<Range<u32>, Refused> {
        let (at, count) = (at.0, count as u64);
        let end = at.checked_add(count).ok_or(Refused::Wraps { at: Gpa(at), count })?;
        let memory = u64::from(self.mmu.p2m.pages()) << PAGE_SHIFT;
        if count == 0 {
            return Ok(0..0);
        }
        if end > memory {
            return Err(Refused::Device(Gpa(at.max(memory))));
        }
        Ok((at >> PAGE_SHIFT) as u32..end.div_ceil(PAGE_SIZE) as u32)
    }
}

impl GuestMemory for Session<'_> {
    /// There is none: [`GuestMemory::physical_memory`] says so.
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    /// True where all is memory. Asks, and touches nothing: a queue so checks whole rings.
    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        let is_memory = |gfn| !matches!(self.mmu.p2m.lookup(Gfn(gfn)), PageState::Device);
        self.frames_of(addr, count).is_ok_and(|mut frames| frames.all(is_memory))
    }

    /// One slice for each page. All of the range is at hand, or none of it is handed out.
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, ()>> {
        let intent = intent_of(access);
        self.noted(self.reach(addr, count, intent))?;
        Ok(Slices { session: self, at: addr.0, left: count, intent })
    }
}

fn intent_of(access: Permissions) -> Intent {
    if access.has_write() { Intent::Write } else { Intent::Read }
}

/// The slices of a range that is at hand.
struct Slices<'a, 'm> {
    session: &'a Session<'m>,
    at: u64,
    left: usize,
    intent: Intent,
}

impl<'a> Iterator for Slices<'a, '_> {
    type Item = GuestMemoryResult<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let at = Gpa(self.at);
        let count = self.left.min((PAGE_SIZE - u64::from(at.offset())) as usize);
        (self.at, self.left) = (self.at + count as u64, self.left - count);
        let page = self.session.find(at.gfn()).ok_or(Refused::NotPlanned(at.gfn()));
        let slice = page
            .map_err(GuestMemoryError::from)
            .and_then(|map| Ok(map.slice(at.offset(), count as u32, self.intent)?));
        if slice.is_err() {
            self.left = 0;
        }
        Some(slice)
    }
}

impl FusedIterator for Slices<'_, '_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a, '_> {}
