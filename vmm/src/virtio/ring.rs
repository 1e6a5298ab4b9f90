//! A queue: chains off it, used entries onto it, through sessions.
//!
//! Holds: taking a chain changes nothing of the guest's; the plan that takes it may run several times and goes back each time.
//! A ring that lies (no memory, an index beyond it) is [`Trouble::Broken`]; a chain that lies is a chain that is not
//! [`Chain::whole`].

use std::sync::atomic::Ordering;

use umbra_mmu::dma::{NoSession, Refused, Session};
use umbra_mmu::{Mmu, Shortage};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryResult, Permissions};

use super::chain::{Chain, HEADER_BYTES_MAX, Part};
use crate::board::{F_EVENT_IDX, QueueConfig};

/// The available ring's flag by which a driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;

/// Why a ring cannot go on.
#[derive(Debug)]
pub enum Trouble {
    /// It is not what a ring can be; what it is, in words.
    Broken(String),
    /// A page cannot be had.
    Short(Shortage),
}

impl From<NoSession> for Trouble {
    fn from(why: NoSession) -> Trouble {
        match why {
            NoSession::Refused(why) => Trouble::Broken(why.to_string()),
            NoSession::Short(short) => Trouble::Short(short),
        }
    }
}

fn broken(why: virtio_queue::Error) -> Trouble {
    Trouble::Broken(why.to_string())
}

/// A queue in use.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    life: u32,
}

/// What a plan has found in a ring.
enum Found {
    Nothing,
    /// Not what a ring can be.
    Broken(String),
    Chain(Chain),
}

impl Ring {
    /// A queue as its driver has set it up, from its beginning. `None` if that makes no queue.
    pub fn new(config: &QueueConfig, features: u64) -> Option<Ring> {
        let mut queue = Queue::new(config.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(config.table)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(config.available)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(config.used)).ok()?;
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        Some(Ring { queue, life: config.life })
    }

    /// True if it is still the one that the driver has set up so.
    pub fn is_of(&self, config: &QueueConfig) -> bool {
        self.life == config.life
    }

    /// Takes the next chain, with the first `header` bytes of what it has to read. `None` if there is none; notifications are on
    /// then.
    ///
    /// # Errors
    ///
    /// When the ring is broken, or a page cannot be had.
    pub fn pop(&mut self, mmu: &Mmu, header: usize) -> Result<Option<Chain>, Trouble> {
        // What comes while notifications are turned on comes without one: a second look finds it.
        for _ in 0..2 {
            let next = self.queue.next_avail();
            let mut found = Found::Nothing;
            let planned = mmu.session(None, |plan| {
                found = self.find(plan, header);
                self.queue.set_next_avail(next);
            });
            match (planned, found) {
                (Err(NoSession::Short(short)), _) => return Err(Trouble::Short(short)),
                (_, Found::Broken(why)) => return Err(Trouble::Broken(why)),
                (planned, Found::Chain(mut chain)) => {
                    self.queue.set_next_avail(next.wrapping_add(1));
                    // Where something of it is no memory, this may not be all of it.
                    chain.whole &= planned.is_ok();
                    return Ok(Some(chain));
                }
                (planned, Found::Nothing) => {
                    let (session, ()) = planned?;
                    if !self.queue.event_idx_enabled()
                        || !self.queue.enable_notification(&session).map_err(broken)?
                    {
                        break;
                    }
                }
            }
        }
        Ok(None)
    }

    /// What the ring has next. An access that fails may be of no account: then this runs again.
    fn find(&mut self, plan: &Session<'_>, header: usize) -> Found {
        if let Err(why) = self.touch(plan) {
            return Found::Broken(why.to_string());
        }
        let size = self.queue.size();
        let mut iter = match self.queue.iter(plan) {
            Ok(iter) => iter,
            Err(why) => return Found::Broken(why.to_string()),
        };
        let Some(descriptors) = iter.next() else { return Found::Nothing };
        let head = descriptors.head_index();
        if head >= size {
            return Found::Broken(format!("descriptor {head} was offered, of {size}"));
        }
        let mut chain = Chain::of(head, descriptors, size);
        chain.header = read_header(plan, &chain.read, header);
        Found::Chain(chain)
    }

    /// The rings: touched first, so that the queue does not find them gone.
    fn touch(&self, plan: &Session<'_>) -> GuestMemoryResult<()> {
        let size = usize::from(self.queue.size());
        plan.touch(GuestAddress(self.queue.avail_ring()), 6 + 2 * size, Permissions::Read)?;
        plan.touch(GuestAddress(self.queue.used_ring()), 6 + 8 * size, Permissions::Write)
    }

    /// Gives a chain back: writes its status byte, where there is one and it is memory, and the used ring's next entry. True if
    /// the driver wants an interrupt.
    ///
    /// # Errors
    ///
    /// As [`Ring::pop`].
    pub fn complete(
        &mut self,
        mmu: &Mmu,
        head: u16,
        status: Option<(u64, u8)>,
        length: u32,
    ) -> Result<bool, Trouble> {
        let opened = mmu.session(None, |plan| {
            let rings = self.touch(plan).is_ok();
            let status = status.map(|(at, _)| plan.touch(GuestAddress(at), 1, Permissions::Write));
            rings && status.is_none_or(|touched| touched.is_ok())
        });
        let mut session = match opened {
            Ok((session, _)) => session,
            Err(NoSession::Refused(Refused::Device(_) | Refused::Wraps { .. })) if status.is_some() => {
                return self.complete(mmu, head, None, 0);
            }
            Err(why) => return Err(why.into()),
        };
        if let Some((at, status)) = status {
            session.write_obj(status, GuestAddress(at)).map_err(|why| Trouble::Broken(why.to_string()))?;
            session.tell();
        }
        self.queue.add_used(&session, head, length).map_err(broken)?;
        self.wants_interrupt(&session)
    }

    fn wants_interrupt(&mut self, session: &Session<'_>) -> Result<bool, Trouble> {
        let wants = self.queue.needs_notification(session).map_err(broken)?;
        if self.queue.event_idx_enabled() {
            return Ok(wants);
        }
        let flags: u16 = session
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|why| Trouble::Broken(why.to_string()))?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }
}

/// The first `count` bytes of what is to be read.
fn read_header(plan: &Session<'_>, parts: &[Part], count: usize) -> Option<[u8; HEADER_BYTES_MAX]> {
    let mut header = [0; HEADER_BYTES_MAX];
    let mut left = &mut header[..count];
    for part in parts {
        if left.is_empty() {
            break;
        }
        let (now, rest) = left.split_at_mut(left.len().min(part.count as usize));
        plan.read_slice(now, GuestAddress(part.at)).ok()?;
        left = rest;
    }
    left.is_empty().then_some(header)
}
