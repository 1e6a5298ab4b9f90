//! Guest memory as an array of 8-byte words, with the past of every word.
//!
//! Holds: `now` rises with every event. A past value carries the half-open time in which it stood. Memory beyond
//! the end reads as zeros and forgets what is stored there.

use std::collections::HashMap;

/// A value a word once had, and when: `from..until`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Past {
    pub value: u64,
    pub from: u64,
    pub until: u64,
}

#[derive(Debug, Default)]
struct Life {
    since: u64,
    past: Vec<Past>,
}

#[derive(Debug)]
pub struct Memory {
    pages: Vec<Option<Box<[u64; 512]>>>,
    lives: HashMap<u64, Life>,
    now: u64,
}

/// A time after every event.
pub const NEVER: u64 = u64::MAX;

impl Memory {
    pub fn new(pages: usize) -> Memory {
        Memory { pages: (0..pages).map(|_| None).collect(), lives: HashMap::new(), now: 1 }
    }

    /// True for an address that is memory.
    pub fn has(&self, address: u64) -> bool {
        address >> 12 < self.pages.len() as u64
    }

    /// How many pages there are.
    pub fn page_count(&self) -> u32 {
        self.pages.len() as u32
    }

    /// The time of a new event.
    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// The word that holds the byte at `address`.
    pub fn word(&self, address: u64) -> u64 {
        let page = self.pages.get((address >> 12) as usize).and_then(Option::as_ref);
        page.map_or(0, |page| page[(address >> 3 & 511) as usize])
    }

    fn set_word(&mut self, address: u64, value: u64) {
        let old = self.word(address);
        if !self.has(address) || old == value {
            return;
        }
        let now = self.tick();
        let life = self.lives.entry(address >> 3).or_default();
        life.past.push(Past { value: old, from: life.since, until: now });
        life.since = now;
        let page = self.pages[(address >> 12) as usize].get_or_insert_with(|| Box::new([0; 512]));
        page[(address >> 3 & 511) as usize] = value;
    }

    /// `size` bytes (at most 8) from `address`, little-endian.
    pub fn read(&self, address: u64, size: u32) -> u64 {
        let byte = |i| self.word(address + i) >> ((address + i) % 8 * 8) & 0xff;
        (0..u64::from(size)).map(|i| byte(i) << (8 * i)).sum()
    }

    /// Stores the low `size` bytes of `value` at `address`: one event for each word that changes.
    pub fn write(&mut self, address: u64, size: u32, value: u64) {
        let mut done = 0;
        while done < u64::from(size) {
            let at = address + done;
            let count = (8 - at % 8).min(u64::from(size) - done);
            let mask = (u64::MAX >> (64 - 8 * count)) << (at % 8 * 8);
            let bits = (value >> (8 * done)) << (at % 8 * 8);
            self.set_word(at, self.word(at) & !mask | bits & mask);
            done += count;
        }
    }

    /// The values that `size` bytes (4 or 8, aligned) at `address` had at `since` or later, the newest first.
    pub fn past(&self, address: u64, size: u32, since: u64) -> Vec<Past> {
        let life = self.lives.get(&(address >> 3));
        let current = Past { value: self.word(address), from: life.map_or(0, |l| l.since), until: NEVER };
        let older = life.into_iter().flat_map(|l| l.past.iter().rev().copied());
        let all = std::iter::once(current).chain(older.take_while(|p| p.until > since));
        let part = |p: Past| Past { value: if size == 8 { p.value } else { half(p.value, address) }, ..p };
        all.map(part).collect()
    }

    /// Drops what stood only before `time`: no CPU may use it any more.
    pub fn forget_before(&mut self, time: u64) {
        self.lives.retain(|_, life| {
            life.past.retain(|p| p.until > time);
            life.since > time || !life.past.is_empty()
        });
    }

    /// Every page that was ever stored to, as (number, words).
    pub fn pages(&self) -> impl Iterator<Item = (u32, &[u64; 512])> {
        self.pages.iter().enumerate().filter_map(|(n, page)| Some((n as u32, &**page.as_ref()?)))
    }
}

fn half(word: u64, address: u64) -> u64 {
    if address & 4 == 0 { word & 0xffff_ffff } else { word >> 32 }
}
