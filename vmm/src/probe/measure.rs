//! Costs, by the clock: medians over many of the same.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::ProbeError;
use super::facts::{HLT, expect_trap};
use super::scratch::Scratch;
use crate::kvm::KvmExit;

/// What something costs, over some samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// The median, in nanoseconds.
    pub median_ns: u64,
    /// Nine in ten are below this, in nanoseconds.
    pub p90_ns: u64,
    /// Samples taken.
    pub samples: u32,
}

impl Cost {
    /// The cost over `samples`; nothing where there are none.
    pub fn of(mut samples: Vec<Duration>) -> Cost {
        samples.sort_unstable();
        let at = |tenths: usize| {
            let sample = samples.get(samples.len().saturating_sub(1) * tenths / 10).copied();
            u64::try_from(sample.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
        };
        Cost { median_ns: at(5), p90_ns: at(9), samples: samples.len() as u32 }
    }

    /// A cost of `total` in which each sample did `number` of the thing.
    fn each(self, number: u64) -> Cost {
        Cost { median_ns: self.median_ns / number, p90_ns: self.p90_ns / number, ..self }
    }

    /// Without what `part` costs.
    fn without(self, part: Cost) -> Cost {
        Cost {
            median_ns: self.median_ns.saturating_sub(part.median_ns),
            p90_ns: self.p90_ns.saturating_sub(part.median_ns),
            ..self
        }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = |ns: u64| ns as f64 / 1000.0;
        write!(f, "{:.2} us (p90 {:.2})", micros(self.median_ns), micros(self.p90_ns))
    }
}

/// How fast 32-bit code runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speed {
    /// Instructions a second in a loop of two.
    pub instructions_per_second: f64,
    /// So slow that KVM must be emulating it.
    pub emulated: bool,
}

impl Speed {
    /// Below this an instruction costs more than any CPU, and any decent binary translator, needs for one.
    const NATIVE_MIN: f64 = 20e6;

    fn new(instructions: u64, took: Duration) -> Speed {
        let instructions_per_second = instructions as f64 / took.as_secs_f64().max(1e-9);
        Speed { instructions_per_second, emulated: instructions_per_second < Speed::NATIVE_MIN }
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} million instructions a second", self.instructions_per_second / 1e6)
    }
}

/// Times `samples` calls of `body`, after a tenth of that to warm up; fewer where they take too long.
///
/// # Errors
/// The first of `body`'s.
pub fn times(
    samples: u32,
    mut body: impl FnMut() -> Result<(), ProbeError>,
) -> Result<Vec<Duration>, ProbeError> {
    const LONG: Duration = Duration::from_millis(300);
    const SAMPLES_MIN: usize = 20;
    let started = Instant::now();
    let mut taken = Vec::with_capacity(samples as usize);
    for _ in 0..samples / 10 {
        body()?;
    }
    while taken.len() < samples as usize && (taken.len() < SAMPLES_MIN || started.elapsed() < LONG) {
        let begun = Instant::now();
        body()?;
        taken.push(begun.elapsed());
    }
    Ok(taken)
}

fn run(scratch: &mut Scratch, what: &'static str) -> Result<(), ProbeError> {
    expect_trap(what, scratch.enter()?, 13)
}

/// From the VMM into the firmware and back, nothing done there.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn exit(scratch: &mut Scratch, samples: u32) -> Result<Cost, ProbeError> {
    let root = scratch.space.root();
    Ok(Cost::of(times(samples, || match scratch.vcpu.bounce(&scratch.cpu, root)? {
        true => Err(ProbeError::OutOfTime { what: "an exit" }),
        false => Ok(()),
    })?))
}

/// The same with a flush there.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn flush(scratch: &mut Scratch, samples: u32) -> Result<Cost, ProbeError> {
    let root = scratch.space.root();
    Ok(Cost::of(times(samples, || match scratch.vcpu.flush(&scratch.cpu, root)? {
        true => Err(ProbeError::OutOfTime { what: "a flush" }),
        false => Ok(()),
    })?))
}

/// Into the guest and back by an instruction that traps at once.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn trap(scratch: &mut Scratch, samples: u32) -> Result<Cost, ProbeError> {
    scratch.load(&HLT, true)?;
    Ok(Cost::of(times(samples, || run(scratch, "a trap"))?))
}

/// Into the guest and back by a page fault.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn page_fault(scratch: &mut Scratch, samples: u32) -> Result<Cost, ProbeError> {
    const READ_ABSENT: [u8; 5] = [0xa1, 0, 0, 0x40, 0];
    scratch.load(&READ_ABSENT, true)?;
    Ok(Cost::of(times(samples, || expect_trap("a page fault", scratch.enter()?, 14))?))
}

/// A trap through a root other than the last one's, as at each system call.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn change_of_root(scratch: &mut Scratch, samples: u32) -> Result<Cost, ProbeError> {
    scratch.load(&HLT, true)?;
    let other = scratch.second_root()?;
    let roots = [scratch.space.root(), other];
    let mut turn = 0;
    let samples = times(samples, || {
        turn ^= 1;
        let exit = scratch.vcpu.enter(&mut scratch.cpu, roots[turn], false)?;
        expect_trap("a change of root", exit, 13)
    })?;
    Ok(Cost::of(samples))
}

/// `dec ecx; jnz` `rounds` times, then `hlt`.
fn count_down(scratch: &mut Scratch, rounds: u32) -> Result<Duration, ProbeError> {
    scratch.load(&[0x49, 0x75, 0xfd, 0xf4], true)?;
    scratch.cpu.gpr[1] = rounds;
    let begun = Instant::now();
    run(scratch, "the speed of 32-bit code")?;
    Ok(begun.elapsed())
}

/// The speed, from some hundred instructions; from more where these took too little time to tell, or no more than a trap does, which
/// takes twice as long once in a while.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn quick_speed(scratch: &mut Scratch) -> Result<Speed, ProbeError> {
    const FEW: u32 = 400;
    const MANY: u32 = 20_000;
    const SURELY_EMULATED_MAX: f64 = Speed::NATIVE_MIN / 4.0;
    let empty = least(scratch, 1)?;
    let speed = |full: Duration, rounds: u32| {
        // Where the loop hides in the noise of a trap, a lower bound.
        Speed::new(u64::from(rounds) * 2, full.saturating_sub(empty).max(full / 10))
    };
    let few = least(scratch, FEW)?;
    let first = speed(few, FEW);
    match first.instructions_per_second < SURELY_EMULATED_MAX && few > 2 * empty {
        true => Ok(first),
        false => Ok(speed(least(scratch, MANY)?, MANY)),
    }
}

/// The shortest of a few.
fn least(scratch: &mut Scratch, rounds: u32) -> Result<Duration, ProbeError> {
    let mut least = count_down(scratch, rounds)?;
    for _ in 0..2 {
        least = least.min(count_down(scratch, rounds)?);
    }
    Ok(least)
}

/// The speed, from as many instructions as take some tens of milliseconds.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn speed(scratch: &mut Scratch) -> Result<Speed, ProbeError> {
    const LONG: Duration = Duration::from_millis(30);
    let mut rounds = 1000;
    loop {
        let took = count_down(scratch, rounds)?;
        if took > LONG || rounds > 1 << 28 {
            return Ok(Speed::new(u64::from(rounds) * 2, took));
        }
        rounds *= 4;
    }
}

/// `rep stosd` over a page, per doubleword.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn store_string(scratch: &mut Scratch, samples: u32) -> Result<Cost, ProbeError> {
    const DOUBLEWORDS: u32 = 1024;
    let empty = trap(scratch, samples)?;
    let cost = Cost::of(times(samples, || {
        scratch.load(&[0xf3, 0xab, 0xf4], true)?;
        scratch.cpu.gpr[1] = DOUBLEWORDS;
        run(scratch, "rep stosd")
    })?);
    Ok(cost.without(empty).each(u64::from(DOUBLEWORDS)))
}

/// A kick that is there before the entry: KVM_RUN without a guest.
///
/// # Errors
/// Where the vCPU does anything else.
pub fn refused_entry(scratch: &mut Scratch, samples: u32) -> Result<Cost, ProbeError> {
    scratch.load(&HLT, true)?;
    let kicker = scratch.vcpu.kicker();
    Ok(Cost::of(times(samples, || {
        kicker.kick();
        match scratch.enter()? {
            KvmExit::Kicked => Ok(()),
            exit => Err(ProbeError::Strange { what: "an entry under a kick", exit }),
        }
    })?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_is_median_and_ninth_decile() {
        let cost = Cost::of((1..=11).rev().map(Duration::from_micros).collect());
        assert_eq!((cost.median_ns, cost.p90_ns, cost.samples), (6000, 10_000, 11));
        assert_eq!(Cost::of(vec![]), Cost { median_ns: 0, p90_ns: 0, samples: 0 });
        assert_eq!(cost.each(1000).median_ns, 6);
        let small = Cost { median_ns: 7000, p90_ns: 8000, samples: 1 };
        assert_eq!((cost.without(small).median_ns, cost.without(small).p90_ns), (0, 3000));
    }

    #[test]
    fn speed_tells_emulation_from_execution() {
        assert!(Speed::new(2000, Duration::from_micros(1300)).emulated);
        assert!(!Speed::new(2000, Duration::from_micros(20)).emulated);
        assert!(!Speed::new(2000, Duration::ZERO).emulated);
    }
}
