//! An event log as a timeline: a line for each event, a column for each actor.
//!
//! ```text
//!          us  vcpu 0      vcpu 1      reclaim
//!       0.000  begins
//!      12.345  ran 3 to 0x100020
//!      12.345  |           begins
//!      20.001  |           |           waits for work
//! ```
//!
//! Story: a column has a bar while its actor lives. What happens stands in its actor's column, over those to the right. Slices of a
//! vCPU that nothing comes between are one. What Umbra says of the whole has a line without columns.
//!
//! Holds: any text can be shown: a line that is none of an event log is there as it is.

use std::io::{self, BufRead, Write};

/// Characters of a column, at least, and between two.
const COLUMN_MIN: usize = 8;
const GAP: usize = 2;
/// Characters of the time.
const TIME: usize = 14;
/// Whose lines are about the whole.
const WHOLE: &str = "umbra";
/// Bytes of a line that are looked at.
const LINE_MAX: u64 = 64 << 10;

/// Who takes part, in the order in which they begin.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Actors(Vec<String>);

/// A line of a log.
struct Line<'l> {
    nanos: u64,
    /// None for the whole.
    actor: Option<usize>,
    what: &'l str,
}

/// Slices of one vCPU.
struct Slices {
    actor: usize,
    nanos: u64,
    count: u64,
    steps: u64,
    to: String,
}

impl Actors {
    /// Those of a log.
    pub fn of(mut log: impl BufRead) -> io::Result<Actors> {
        let mut actors = Vec::new();
        let mut line = String::new();
        while next_line(&mut log, &mut line)? {
            let name = line.split_once(' ').and_then(|(_, rest)| rest.strip_suffix(": begins"));
            if let Some(name) = name.filter(|name| !actors.iter().any(|other| other == name)) {
                actors.push(name.to_owned());
            }
        }
        Ok(Actors(actors))
    }

    /// Writes the timeline of the log that they are of.
    pub fn write(&self, mut log: impl BufRead, out: &mut impl Write) -> io::Result<()> {
        let mut live = vec![false; self.0.len()];
        let head: String = self.0.iter().map(|name| format!("{name:0$}", width_of(name))).collect();
        writeln!(out, "{:>TIME$}  {}", "us", head.trim_end())?;
        let (mut text, mut slices) = (String::new(), None::<Slices>);
        while next_line(&mut log, &mut text)? {
            let Some(line) = self.parse(&text) else {
                self.end_slices(&live, &mut slices, out)?;
                writeln!(out, "{text}")?;
                continue;
            };
            if let (Some(actor), Some((steps, to))) = (line.actor, slice_of(line.what)) {
                if slices.as_ref().is_some_and(|slices| slices.actor != actor) {
                    self.end_slices(&live, &mut slices, out)?;
                }
                let so_far = slices.take().map_or((0, 0), |slices| (slices.count, slices.steps));
                let (count, steps) = (so_far.0 + 1, steps.saturating_add(so_far.1));
                slices = Some(Slices { actor, nanos: line.nanos, count, steps, to: to.to_owned() });
                continue;
            }
            self.end_slices(&live, &mut slices, out)?;
            match line.actor {
                Some(actor) => {
                    live[actor] = true;
                    self.row(&live, actor, line.nanos, line.what, out)?;
                    live[actor] = line.what != "ends";
                }
                // Who waits for what is a part for each.
                None => line
                    .what
                    .split(';')
                    .try_for_each(|part| writeln!(out, "{:>TIME$}  {}", micros(line.nanos), part.trim()))?,
            }
        }
        self.end_slices(&live, &mut slices, out)?;
        out.flush()
    }

    fn parse<'l>(&self, text: &'l str) -> Option<Line<'l>> {
        let (nanos, rest) = text.split_once(' ')?;
        let nanos = nanos.parse().ok()?;
        let said_by = |name: &str| rest.strip_prefix(name)?.strip_prefix(": ");
        let named = self.0.iter().enumerate().filter_map(|(n, name)| Some((n, said_by(name)?)));
        // Of two names the longer is meant: less is left of the line.
        if let Some((actor, what)) = named.min_by_key(|(_, what)| what.len()) {
            return Some(Line { nanos, actor: Some(actor), what });
        }
        said_by(WHOLE).map(|what| Line { nanos, actor: None, what })
    }

    fn end_slices(&self, live: &[bool], slices: &mut Option<Slices>, out: &mut impl Write) -> io::Result<()> {
        let Some(Slices { actor, nanos, count, steps, to }) = slices.take() else { return Ok(()) };
        let what = match count {
            1 => format!("ran {steps} to {to}"),
            _ => format!("ran {steps} to {to}, in {count} slices"),
        };
        self.row(live, actor, nanos, &what, out)
    }

    fn row(
        &self,
        live: &[bool],
        actor: usize,
        nanos: u64,
        what: &str,
        out: &mut impl Write,
    ) -> io::Result<()> {
        // Characters so far, and where the column begins.
        let (mut row, mut at, mut start) = (String::new(), 0, 0);
        for (n, name) in self.0.iter().enumerate() {
            let mark = match n == actor {
                true => what,
                false if live[n] && (start > at || at == 0) => "|",
                false => "",
            };
            if !mark.is_empty() {
                row.extend(std::iter::repeat_n(' ', start - at));
                row.push_str(mark);
                at = start + mark.chars().count();
            }
            start += width_of(name);
        }
        writeln!(out, "{:>TIME$}  {row}", micros(nanos))
    }
}

fn width_of(name: &str) -> usize {
    name.chars().count().max(COLUMN_MIN) + GAP
}

/// `ran N to EIP, ..`
fn slice_of(what: &str) -> Option<(u64, &str)> {
    let (steps, to) = what.strip_prefix("ran ")?.split_once(" to ")?;
    Some((steps.parse().ok()?, to.split_once(',').map_or(to, |(to, _)| to)))
}

fn micros(nanos: u64) -> String {
    format!("{}.{:03}", nanos / 1000, nanos % 1000)
}

/// The next line without its end; false where there is none.
fn next_line(log: &mut impl BufRead, line: &mut String) -> io::Result<bool> {
    let mut bytes = Vec::new();
    let read = io::Read::take(log, LINE_MAX).read_until(b'\n', &mut bytes)?;
    line.clear();
    line.push_str(String::from_utf8_lossy(&bytes).trim_end_matches('\n'));
    Ok(read > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(log: &str) -> String {
        let mut out = Vec::new();
        let actors = Actors::of(log.as_bytes()).expect("memory");
        actors.write(log.as_bytes(), &mut out).expect("memory");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn each_actor_has_a_column_and_slices_that_nothing_comes_between_are_one() {
        let log = "0 umbra: seed 1; switches 1 in 4\n\
                   0 vcpu 0: begins\n\
                   0 a disk: with a colon: begins\n\
                   10 vcpu 0: ran 5 to 0x10, state 00000000\n\
                   20 vcpu 0: ran 7 to 0x20, state 00000001\n\
                   1234 a disk: with a colon: waits for its bell\n\
                   2000 vcpu 0: ran 1 to 0x30, state 00000002\n\
                   3000 vcpu 0: ends\n\
                   4000 a disk: with a colon: ends\n\
                   5000 umbra: everybody waits:;  vcpu 0 waits for a lock\n";
        let want = [
            "            us  vcpu 0    a disk: with a colon",
            "         0.000  seed 1",
            "         0.000  switches 1 in 4",
            "         0.000  begins",
            "         0.000  |         begins",
            "         0.020  ran 12 to 0x20, in 2 slices",
            "         1.234  |         waits for its bell",
            "         2.000  ran 1 to 0x30",
            "         3.000  ends      |",
            "         4.000            ends",
            "         5.000  everybody waits:",
            "         5.000  vcpu 0 waits for a lock",
            "",
        ];
        assert_eq!(timeline(log).split('\n').collect::<Vec<_>>(), want);
    }

    #[test]
    fn what_is_no_event_is_there_as_it_is() {
        for line in
            ["", "nonsense", "x vcpu 0: begins", "0 nobody: begins to", "99999999999999999999 vcpu 0: ends"]
        {
            assert!(
                timeline(&format!("0 vcpu 0: begins\n{line}\n")).ends_with(&format!("\n{line}\n")),
                "{line}"
            );
        }
        assert_eq!(timeline("").lines().count(), 1);
    }
}
