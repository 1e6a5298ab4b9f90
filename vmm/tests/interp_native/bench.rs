//! Both sides side by side: runs cases, compares, counts, and cuts a failing case down.

use std::collections::BTreeMap;

use iced_x86::{Code, CpuidFeature, Mnemonic};
use umbra::interp::decode;

use super::case::{Case, ENDLESS, Outcome};
use super::layout::USER32_CODE;
use super::run::{Run, interpret, is_amd};
use super::segments::{Globals, Ldt, inspect};
use super::twin::{End, Twin};
use super::worker::{BATCH_MAX, Worker};

/// What has been compared of one form.
#[derive(Clone, Copy, Default)]
pub struct Tally {
    /// Instances that retired.
    pub retired: u32,
    /// Instances that ended their case by a fault or trap of their own.
    pub faulted: u32,
}

pub struct Bench {
    features: &'static [CpuidFeature],
    worker: Worker,
    pub twin: Twin,
    pub tallies: BTreeMap<Code, Tally>,
    pub compared: u64,
    pub retired: u64,
    /// Cases not compared whose difference does not repeat.
    pub unstable: u64,
    /// Cases not compared, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Vectors that cases ended by.
    pub vectors: BTreeMap<u32, u64>,
    /// Vector and error code of the last case compared.
    pub last_end: (u32, u32),
}

/// Two sides that differ.
pub struct Difference {
    /// The last instruction and both vectors: differences of one kind are shown once.
    pub kind: String,
    pub text: String,
}

impl Bench {
    /// None, said aloud, where this kernel has no 32-bit user code.
    pub fn new(features: &'static [CpuidFeature]) -> Option<Bench> {
        if inspect(USER32_CODE).is_none() {
            println!("skipped: this kernel has no 32-bit user code segment");
            return None;
        }
        Some(Bench {
            features,
            worker: Worker::new(),
            twin: Twin::new(&Globals::of_host()),
            tallies: BTreeMap::new(),
            compared: 0,
            retired: 0,
            unstable: 0,
            skipped: BTreeMap::new(),
            vectors: BTreeMap::new(),
            last_end: (0, 0),
        })
    }

    /// Runs cases on both sides. Differences come back cut down.
    pub fn compare(&mut self, ldt: &Ldt, cases: &[Case]) -> Vec<Difference> {
        self.twin.set_ldt(ldt);
        let mut differences = Vec::new();
        for batch in cases.chunks(BATCH_MAX) {
            let mut comparable = Vec::new();
            for case in batch {
                let run = self.interpret(case, ldt);
                match run.end {
                    End::Delivered(ref ours) => comparable.push((case, ours.clone(), run)),
                    End::Not(reason) => *self.skipped.entry(reason).or_default() += 1,
                }
            }
            let cases: Vec<Case> = comparable.iter().map(|(case, ..)| (*case).clone()).collect();
            let natives = self.worker.run(ldt, &cases);
            for ((case, ours, run), native) in comparable.into_iter().zip(natives) {
                match difference(&ours, native.as_ref(), &run) {
                    None => self.count(&ours, &run),
                    Some(_) if !self.differs_again(case, ldt) => self.unstable += 1,
                    Some(_) => differences.push(self.cut_down(case, ldt)),
                }
            }
        }
        differences
    }

    fn count(&mut self, ours: &Outcome, run: &Run) {
        self.compared += 1;
        self.last_end = (ours.vector, ours.error);
        *self.vectors.entry(ours.vector).or_default() += 1;
        let last = run.trace.len().saturating_sub(1);
        for (n, code) in run.trace.iter().enumerate() {
            let tally = self.tallies.entry(*code).or_default();
            if n < last || run.retired_last {
                tally.retired += 1;
                self.retired += 1;
            } else {
                tally.faulted += 1;
            }
        }
    }

    fn interpret(&mut self, case: &Case, ldt: &Ldt) -> Run {
        interpret(&mut self.twin, self.features, case, ldt)
    }

    /// Removes the instructions that a differing case can do without.
    fn cut_down(&mut self, case: &Case, ldt: &Ldt) -> Difference {
        let mut best = case.clone();
        let mut text = self.differs(case, ldt).unwrap_or_default();
        let mut at = 0;
        while at < best.code.len() {
            let wide = ldt.find(best.start.selectors[1]).is_none_or(|entry| entry.wide);
            let length = decode(&best.code[at..], wide, 0).map_or(1, |i| i.len());
            let mut without = best.clone();
            without.code.drain(at..at + length);
            match self.differs(&without, ldt) {
                Some(found) => (best, text) = (without, found),
                None => at += length,
            }
        }
        let wide = ldt.find(best.start.selectors[1]).is_none_or(|entry| entry.wide);
        let text = format!("{}{text}", best.describe(wide));
        let run = self.interpret(&best, ldt);
        let vectors: Vec<&str> =
            text.split("vector ").skip(1).filter_map(|rest| rest.split(' ').next()).collect();
        Difference { kind: format!("{:?} {vectors:?}", run.trace.last()), text }
    }

    /// An interrupt can show in a case: it makes the null selectors 1 to 3 zero. Such a difference does not repeat.
    fn differs_again(&mut self, case: &Case, ldt: &Ldt) -> bool {
        (0..3).all(|_| self.differs(case, ldt).is_some())
    }

    fn differs(&mut self, case: &Case, ldt: &Ldt) -> Option<String> {
        let run = self.interpret(case, ldt);
        let End::Delivered(ours) = &run.end else { return None };
        let native = self.worker.run(ldt, std::slice::from_ref(case)).pop().flatten();
        difference(ours, native.as_ref(), &run)
    }
}

/// Which of two faults comes first, and flags at a fault in REP, differ from maker to maker; which operand of CMPS is looked at
/// first, from one AMD CPU to the next.
fn is_open(run: &Run) -> bool {
    use Mnemonic as M;
    let last = run.trace.last().map(|code| code.mnemonic());
    !is_amd() || matches!(last, Some(M::Cmpsb | M::Cmpsw | M::Cmpsd))
}

fn difference(ours: &Outcome, native: Option<&Outcome>, run: &Run) -> Option<String> {
    match native {
        None => Some("natively the case killed its process".to_string()),
        Some(native) if native.vector == ENDLESS => {
            Some(format!("ours {ours}\nnatively it does not end: {native}"))
        }
        Some(native) if is_open(run) && native.eip == ours.eip && native.faulted() && ours.faulted() => None,
        Some(native) => ours.difference(native, &run.blind),
    }
}
