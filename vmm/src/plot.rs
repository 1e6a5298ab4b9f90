//! Pictures: the SVG of `--plot`, of a run or of `umbra pressure`, which has memory over time; and charts for whoever has other values.
//!
//! Story: two panels over one axis of time. The upper one has memory in MiB, the lower one what happened in a second. Host and
//! guest are in one picture; what a guest does not say has no curve. The picture stands alone: no script, no font, no other file; its colours follow the reader's scheme.
//!
//! Holds: any samples and any title make a well-formed picture of bounded size, with all of it in sight.

use std::fmt::Write;

use umbra_mmu::PAGE_SIZE;

use crate::vm::{Rates, Sample};

/// Size of the picture, in its own units.
const SIZE: (f64, f64) = (900.0, 600.0);
/// Left and right edge of the panels.
const SIDES: (f64, f64) = (84.0, 876.0);
/// Upper and lower edge of each panel.
const MEMORY: (f64, f64) = (76.0, 306.0);
const RATES: (f64, f64) = (350.0, 540.0);
/// Lines of the grid at most, across and along.
const TICKS: (f64, f64) = (10.0, 5.0);
/// From one curve's name to the next, at most.
const LEGEND: f64 = 130.0;
/// Characters of the title that are in sight; all of it is in the picture's name.
const TITLE_MAX: usize = 100;
/// From here on a number is written with an exponent.
const PLAIN_MAX: f64 = 1e7;

/// Edges of a chart's only panel.
const CHART: (f64, f64) = (76.0, 540.0);
/// Colours of a chart; the names of more lines than that have the first ones again.
const COLOURS: usize = 10;

const STYLE: &str = "\
svg{color-scheme:light dark;background:#fff;font:12px system-ui,sans-serif}
.paper{fill:#fff}text{fill:#24292f}.title{font-size:16px;font-weight:600}
.grid{stroke:#d8dee4;fill:none}.frame{stroke:#57606a;fill:none}
.curve{fill:none;stroke-width:1.6;stroke-linecap:round;stroke-linejoin:round}
.resident{stroke:#0969da}.swapped,.swap-outs{stroke:#bc4c00}.free{stroke:#1a7f37}
.budget{stroke:#57606a;stroke-dasharray:8 4}.refaults{stroke:#8250df}.invalidations{stroke:#0a7c86}
.backed{stroke:#953800;stroke-dasharray:2 4}.balloon,.stalls{stroke:#cf222e}
.would-blocks{stroke:#cf222e;stroke-dasharray:2 4}.guest-swapped{stroke:#bc4c00;stroke-dasharray:6 4}
.guest-free,.guest-swap-ins{stroke:#116329;stroke-dasharray:6 4}
.c0{stroke:#0969da}.c1{stroke:#bc4c00}.c2{stroke:#1a7f37}.c3{stroke:#8250df}.c4{stroke:#0a7c86}
.c5{stroke:#cf222e}.c6{stroke:#953800}.c7{stroke:#57606a}.c8{stroke:#bf3989}.c9{stroke:#4d2d00}
.bar.c0{fill:#0969da}.bar.c1{fill:#bc4c00}.bar.c2{fill:#1a7f37}.bar.c3{fill:#8250df}.bar.c4{fill:#0a7c86}
.bar.c5{fill:#cf222e}.bar.c6{fill:#953800}.bar.c7{fill:#57606a}.bar.c8{fill:#bf3989}.bar.c9{fill:#4d2d00}
@media(prefers-color-scheme:dark){
.c9{stroke:#d4a72c}.bar.c9{fill:#d4a72c}
svg{background:#0d1117}.paper{fill:#0d1117}text{fill:#e6edf3}
.grid{stroke:#30363d}.frame{stroke:#8b949e}
.resident{stroke:#58a6ff}.swapped,.swap-outs,.guest-swapped{stroke:#f0883e}.free{stroke:#3fb950}
.budget{stroke:#8b949e}.refaults{stroke:#bc8cff}.invalidations{stroke:#39c5cf}
.backed{stroke:#ffa657}.balloon,.stalls,.would-blocks{stroke:#ff7b72}.guest-free,.guest-swap-ins{stroke:#7ee787}}
";

/// Adds to a picture. A string takes everything.
macro_rules! draw {
    ($picture:expr, $($part:tt)*) => { let _ = writeln!($picture.0, $($part)*); };
}

/// Draws `samples` of a whole run, which are in order of time.
pub fn svg(samples: &[Sample], title: &str) -> String {
    svg_since(samples, title, "the guest's start")
}

/// The same, where the samples' time begins with something else.
pub fn svg_since(samples: &[Sample], title: &str, beginning: &str) -> String {
    let end = samples.last().map_or(0.0, |last| last.at.as_secs_f64());
    let time = Axis::exactly(end, TICKS.0);
    let mut picture = Picture(String::new());
    picture.begin(title);
    picture.panel(&Panel { edges: MEMORY, unit: "memory (MiB)", curves: memory(samples) }, &time);
    picture.panel(&Panel { edges: RATES, unit: "events per second", curves: rates(samples) }, &time);
    picture.times(&time, beginning);
    picture.0.push_str("</svg>\n");
    picture.0
}

/// A picture of one panel. Places in it are parts of its width and height, from its lower left corner; what is beyond an edge is on it.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// What it is of.
    pub title: String,
    /// What goes across, and along.
    pub axes: (String, String),
    /// Where the grid has lines across, with their words.
    pub across: Vec<(f64, String)>,
    /// The same along.
    pub along: Vec<(f64, String)>,
    /// Lines, with what the legend calls them.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
    /// Bars: what the legend calls them, and for each its left, right, lower and upper edge.
    pub bars: Vec<(String, Vec<[f64; 4]>)>,
}

/// Draws it.
pub fn chart(chart: &Chart) -> String {
    let mut picture = Picture(String::new());
    picture.begin(&chart.title);
    let ((left, right), (top, bottom)) = (SIDES, CHART);
    let part = |part: f64| if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 };
    let x = |at: f64| left + part(at) * (right - left);
    let y = |at: f64| bottom - part(at) * (bottom - top);
    for (at, label) in &chart.along {
        draw!(picture, r#"<path class="grid" d="M{left:.1} {:.1}H{right:.1}"/>"#, y(*at));
        picture.text((left - 8.0, y(*at) + 4.0), r#"text-anchor="end""#, label);
    }
    for (at, label) in &chart.across {
        draw!(picture, r#"<path class="grid" d="M{:.1} {top:.1}V{bottom:.1}"/>"#, x(*at));
        picture.text((x(*at), bottom + 18.0), r#"text-anchor="middle""#, label);
    }
    let (width, height, middle) = (right - left, bottom - top, f64::midpoint(top, bottom));
    draw!(picture, r#"<rect class="frame" x="{left}" y="{top}" width="{width}" height="{height}"/>"#);
    let turned = format!(r#"text-anchor="middle" transform="rotate(-90 18 {middle})""#);
    picture.text((18.0, middle), &turned, &chart.axes.1);
    let center = f64::midpoint(left, right);
    picture.text((center, bottom + 42.0), r#"text-anchor="middle""#, &chart.axes.0);
    if chart.lines.is_empty() && chart.bars.is_empty() {
        picture.text((center, middle), r#"text-anchor="middle""#, "no samples");
    }
    for (n, (_, bars)) in chart.bars.iter().enumerate() {
        for [from, to, low, high] in bars {
            let (width, height) = (x(*to) - x(*from), y(*low) - y(*high));
            let (class, x, y) = (COLOUR_CLASSES[n % COLOURS], x(*from), y(*high));
            draw!(
                picture,
                r#"<rect class="bar {class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"/>"#
            );
        }
    }
    let curves = chart.bars.iter().map(|(name, _)| (name, None));
    let curves = curves.chain(chart.lines.iter().map(|(name, points)| (name, Some(points))));
    let curves: Vec<Curve<'_>> = (0..)
        .zip(curves)
        .map(|(n, (name, points))| Curve {
            name,
            class: COLOUR_CLASSES[n % COLOURS],
            points: points.cloned().unwrap_or_default(),
        })
        .collect();
    curves.iter().for_each(|curve| picture.curve(curve, |(at, value)| (x(at), y(value))));
    picture.legend(&curves, top - 14.0);
    picture.0.push_str("</svg>\n");
    picture.0
}

/// Their classes in [`STYLE`].
const COLOUR_CLASSES: [&str; COLOURS] = ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9"];

/// A value over time, in seconds.
struct Curve<'a> {
    /// What the legend calls it.
    name: &'a str,
    /// Its class in [`STYLE`].
    class: &'static str,
    points: Vec<(f64, f64)>,
}

struct Panel {
    edges: (f64, f64),
    unit: &'static str,
    curves: Vec<Curve<'static>>,
}

fn memory(samples: &[Sample]) -> Vec<Curve<'static>> {
    const PER_MIB: f64 = ((1 << 20) / PAGE_SIZE) as f64;
    let curve = |name, class, value: fn(&Sample) -> Option<u64>| {
        let point = |sample: &Sample| Some((sample.at.as_secs_f64(), value(sample)? as f64 / PER_MIB));
        Curve { name, class, points: samples.iter().filter_map(point).collect() }
    };
    let mut budget = curve("budget", "budget", |sample| Some(sample.budget.into()));
    budget.points = steps(&budget.points);
    let host = [
        curve("resident", "resident", |sample| Some(sample.resident.into())),
        curve("swapped", "swapped", |sample| Some(sample.swapped.into())),
        curve("free", "free", |sample| Some(sample.frames_free.into())),
        budget,
        curve("host backs", "backed", |sample| sample.host_backs),
    ];
    let guest = [
        curve("balloon", "balloon", |sample| Some(sample.balloon_actual.into())),
        curve("guest's free", "guest-free", |sample| sample.guest_free),
        curve("guest's swapped", "guest-swapped", |sample| sample.guest_swapped),
    ];
    host.into_iter().chain(said(guest)).collect()
}

/// Those of the curves in which anything happens, or that the guest says anything of.
fn said<const N: usize>(curves: [Curve<'static>; N]) -> impl Iterator<Item = Curve<'static>> {
    // A balloon that holds nothing all the time is none.
    curves.into_iter().filter(|curve| curve.points.iter().any(|point| point.1 > 0.0))
}

/// Each value holds until the next one.
fn steps(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let risers = points.windows(2).flat_map(|pair| [(pair[1].0, pair[0].1), pair[1]]);
    points.first().copied().into_iter().chain(risers).collect()
}

fn rates(samples: &[Sample]) -> Vec<Curve<'static>> {
    let curve = |name, class, value: fn(Rates) -> Option<f64>| {
        // A rate holds for the time that it was taken over.
        let points = samples.windows(2).flat_map(|pair| {
            let rate = Rates::between(&pair[0], &pair[1]).and_then(value);
            rate.into_iter()
                .flat_map(|rate| [(pair[0].at.as_secs_f64(), rate), (pair[1].at.as_secs_f64(), rate)])
        });
        Curve { name, class, points: points.collect() }
    };
    let host = [
        curve("refaults/s", "refaults", |rates| Some(rates.refaults)),
        curve("swap-outs/s", "swap-outs", |rates| Some(rates.swap_outs)),
        curve("invalidations/s", "invalidations", |rates| Some(rates.invalidations)),
        curve("stalls/s", "stalls", |rates| Some(rates.stalls)),
    ];
    // Where nobody asks without sleep, there is nothing to say of it.
    let atomic = [curve("WouldBlocks/s", "would-blocks", |rates| Some(rates.would_blocks))];
    let guest = [curve("guest's swap-ins/s", "guest-swap-ins", |rates| rates.guest_swap_ins)];
    host.into_iter().chain(said(atomic)).chain(said(guest)).collect()
}

/// An axis from 0 on.
struct Axis {
    max: f64,
    step: f64,
}

impl Axis {
    /// One that ends at `max`, or at 1 if that is 0.
    fn exactly(max: f64, ticks: f64) -> Axis {
        let max = if max > 0.0 && max.is_finite() { max } else { 1.0 };
        let raw = max / ticks;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0].into_iter().map(|of| of * power).find(|step| *step >= raw);
        Axis { max, step: step.unwrap_or(10.0 * power) }
    }

    /// One that ends at its first tick from `max` on.
    fn covering(max: f64, ticks: f64) -> Axis {
        let axis = Axis::exactly(max, ticks);
        Axis { max: (axis.max / axis.step - 1e-9).ceil() * axis.step, ..axis }
    }

    /// The ticks, with their words.
    fn ticks(&self) -> impl Iterator<Item = (f64, String)> {
        let last = (self.max / self.step + 1e-9).floor().min(2.0 * TICKS.0) as u32;
        (0..=last).map(|n| (f64::from(n) * self.step, self.label(f64::from(n) * self.step)))
    }

    fn label(&self, value: f64) -> String {
        if value >= PLAIN_MAX {
            return format!("{value:.1e}");
        }
        let places = (-(self.step * 1.000_001).log10().floor()).clamp(0.0, 12.0) as usize;
        format!("{value:.places$}")
    }

    /// Where `value` is between two edges.
    fn place(&self, value: f64, (from, to): (f64, f64)) -> f64 {
        from + (value / self.max).clamp(0.0, 1.0) * (to - from)
    }
}

struct Picture(String);

impl Picture {
    fn begin(&mut self, title: &str) {
        let (width, height) = SIZE;
        let (name, mut short) = (escaped(title), title.to_owned());
        if title.chars().count() > TITLE_MAX {
            short = title.chars().take(TITLE_MAX - 1).chain(['\u{2026}']).collect();
        }
        draw!(
            self,
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">"#
        );
        draw!(self, "<title>{name}</title>\n<style>\n{STYLE}</style>");
        draw!(self, r#"<rect class="paper" width="{width}" height="{height}"/>"#);
        self.text((SIDES.0, 30.0), r#"class="title""#, &short);
    }

    fn panel(&mut self, panel: &Panel, time: &Axis) {
        let (top, bottom) = panel.edges;
        let points = || panel.curves.iter().flat_map(|curve| &curve.points);
        let axis = Axis::covering(points().map(|point| point.1).fold(0.0, f64::max), TICKS.1);
        for (value, label) in axis.ticks() {
            let y = axis.place(value, (bottom, top));
            draw!(self, r#"<path class="grid" d="M{:.1} {y:.1}H{:.1}"/>"#, SIDES.0, SIDES.1);
            self.text((SIDES.0 - 8.0, y + 4.0), r#"text-anchor="end""#, &label);
        }
        for (value, _) in time.ticks() {
            draw!(self, r#"<path class="grid" d="M{:.1} {top:.1}V{bottom:.1}"/>"#, time.place(value, SIDES));
        }
        let (width, height) = (SIDES.1 - SIDES.0, bottom - top);
        draw!(self, r#"<rect class="frame" x="{}" y="{top}" width="{width}" height="{height}"/>"#, SIDES.0);
        let middle = f64::midpoint(top, bottom);
        let turned = format!(r#"text-anchor="middle" transform="rotate(-90 18 {middle})""#);
        self.text((18.0, middle), &turned, panel.unit);
        if points().next().is_none() {
            let center = f64::midpoint(SIDES.0, SIDES.1);
            self.text((center, middle), r#"text-anchor="middle""#, "no samples");
        }
        panel.curves.iter().for_each(|curve| {
            self.curve(curve, |(x, y)| (time.place(x, SIDES), axis.place(y, (bottom, top))))
        });
        self.legend(&panel.curves, top - 14.0);
    }

    fn curve(&mut self, curve: &Curve<'_>, place: impl Fn((f64, f64)) -> (f64, f64)) {
        let placed = curve.points.iter().map(|point| place(*point)).map(|(x, y)| (tenths(x), tenths(y)));
        let mut kept: Vec<(i64, i64)> = Vec::new();
        for point in placed {
            // The middle one of three in a row, or in a column, adds nothing.
            if let [.., a, b] = kept[..]
                && ((a.1 == b.1 && b.1 == point.1 && a.0 <= b.0) || (a == b))
            {
                kept.pop();
            }
            kept.push(point);
        }
        let Some((first, rest)) = kept.split_first() else { return };
        let mut path = format!("M{} {}", units(first.0), units(first.1));
        rest.iter().for_each(|(x, y)| path += &format!("L{} {}", units(*x), units(*y)));
        // A line of no length has round ends: a dot.
        if rest.is_empty() {
            path += "h0";
        }
        draw!(self, r#"<path class="curve {}" d="{path}"/>"#, curve.class);
    }

    fn legend(&mut self, curves: &[Curve<'_>], y: f64) {
        let mut x = SIDES.0;
        let width = LEGEND.min((SIDES.1 - SIDES.0) / curves.len().max(1) as f64);
        for curve in curves {
            draw!(self, r#"<path class="curve {}" d="M{x:.1} {:.1}h24"/>"#, curve.class, y - 4.0);
            self.text((x + 30.0, y), "", curve.name);
            x += width;
        }
    }

    fn times(&mut self, time: &Axis, beginning: &str) {
        for (value, label) in time.ticks() {
            let at = (time.place(value, SIDES), RATES.1 + 18.0);
            self.text(at, r#"text-anchor="middle""#, &label);
        }
        let center = f64::midpoint(SIDES.0, SIDES.1);
        self.text(
            (center, RATES.1 + 42.0),
            r#"text-anchor="middle""#,
            &format!("time since {beginning} (s)"),
        );
    }

    fn text(&mut self, (x, y): (f64, f64), attributes: &str, words: &str) {
        draw!(self, r#"<text x="{x:.1}" y="{y:.1}" {attributes}>{}</text>"#, escaped(words));
    }
}

fn tenths(place: f64) -> i64 {
    (place * 10.0).round() as i64
}

fn units(tenths: i64) -> f64 {
    tenths as f64 / 10.0
}

/// `text` as XML has it; what it cannot have at all becomes U+FFFD.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\t' | '\n' | '\r' => out.push(' '),
            '\0'..=' ' | '\u{fffe}' | '\u{ffff}' if c != ' ' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use roxmltree::{Document, Node};

    use super::*;

    fn at(millis: u64) -> Sample {
        Sample { at: Duration::from_millis(millis), budget: 2048, ..Sample::default() }
    }

    fn has_class(node: &Node, class: &str) -> bool {
        node.attribute("class").is_some_and(|classes| classes.split(' ').any(|one| one == class))
    }

    /// The paths of a curve: the last is the legend's.
    fn paths<'a>(document: &'a Document, class: &str) -> Vec<&'a str> {
        let nodes = document.descendants().filter(|node| has_class(node, class));
        nodes.filter_map(|node| node.attribute("d")).collect()
    }

    /// The numbers of a path.
    fn numbers(path: &str) -> Vec<f64> {
        let parts = path.split(|c: char| c.is_ascii_alphabetic() || c == ' ').filter(|part| !part.is_empty());
        parts.map(|part| part.parse().expect("a number")).collect()
    }

    /// Well-formed, alone, and all of it in sight.
    fn check(text: &str) {
        let document = Document::parse(text).unwrap_or_else(|error| panic!("{error}:\n{text}"));
        let root = document.root_element();
        assert_eq!((root.attribute("width"), root.attribute("height")), (Some("900"), Some("600")));
        for node in root.descendants().filter(Node::is_element) {
            assert!(["svg", "title", "style", "rect", "path", "text"].contains(&node.tag_name().name()));
            assert!(node.attributes().all(|a| !a.name().starts_with("on") && a.name() != "href"), "{node:?}");
            let path = node.attribute("d").map(numbers).unwrap_or_default();
            let places = ["x", "y"].into_iter().filter_map(|name| node.attribute(name));
            let places = places.map(|place| place.parse().expect("a number"));
            assert!(path.into_iter().chain(places).all(|n: f64| (0.0..=900.0).contains(&n)), "{node:?}");
        }
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        for word in ["memory (MiB)", "events per second", "(s)", "prefers-color-scheme", "refaults/s"] {
            assert!(text.contains(word), "{word} is missing:\n{text}");
        }
    }

    #[test]
    fn no_sample_is_an_empty_picture_that_says_so() {
        let text = svg(&[], "nothing");
        check(&text);
        assert_eq!(text.matches("no samples").count(), 2);
    }

    #[test]
    fn one_sample_is_dots_and_no_rates() {
        for sample in [at(0), at(70)] {
            let text = svg(&[sample], "one");
            check(&text);
            let document = Document::parse(&text).expect("XML");
            assert!(paths(&document, "resident")[0].ends_with("h0"));
            assert_eq!((paths(&document, "budget").len(), paths(&document, "refaults").len()), (2, 1));
        }
    }

    #[test]
    fn constant_values_are_two_points() {
        let samples: Vec<_> = (0..100).map(|n| Sample { resident: 7, ..at(n * 50) }).collect();
        let text = svg(&samples, "constant");
        check(&text);
        let document = Document::parse(&text).expect("XML");
        for class in ["resident", "swapped", "budget", "refaults"] {
            let points = numbers(paths(&document, class)[0]);
            assert_eq!((points.len(), points[1]), (4, points[3]), "{class}");
            assert_eq!((points[0], points[2]), SIDES, "{class}");
        }
    }

    #[test]
    fn a_guest_has_the_curves_that_it_says_something_of() {
        let silent = svg(&[at(0), at(1000)], "silent");
        let document = Document::parse(&silent).expect("XML");
        for class in ["balloon", "guest-free", "guest-swap-ins", "guest-swapped", "would-blocks"] {
            assert!(paths(&document, class).is_empty(), "{class}");
        }
        let sample = |n: u64| Sample {
            balloon_actual: 256 * n as u32,
            guest_free: Some(512),
            guest_swap_ins: Some(100 * n),
            guest_swapped: Some(768),
            host_backs: Some(1024),
            frames_used: 1536,
            would_blocks: n,
            gate_waits: n,
            page_waits: n,
            ..at(1000 * n)
        };
        let text = svg_since(&[sample(0), sample(1), sample(2)], "talks", "the command");
        check(&text);
        assert!(text.contains("time since the command (s)"));
        let document = Document::parse(&text).expect("XML");
        let own = ["balloon", "guest-free", "guest-swap-ins", "guest-swapped"];
        for class in own.into_iter().chain(["stalls", "would-blocks", "backed"]) {
            assert_eq!(paths(&document, class).len(), 2, "{class}");
        }
        // 1 MiB a second, of 8: from below to a quarter.
        assert_eq!(numbers(paths(&document, "balloon")[0])[..2], [84.0, 306.0]);
        assert_eq!(numbers(paths(&document, "balloon")[0]).last(), Some(&248.5));
        // What the host says, 4 MiB, and not what it may be backing, 6.
        assert_eq!(numbers(paths(&document, "backed")[0]).last(), Some(&191.0));
    }

    #[test]
    fn the_budget_is_drawn_in_steps() {
        let samples = [at(0), Sample { budget: 1024, ..at(1000) }, at(2000)];
        let document = svg(&samples, "steps");
        let document = Document::parse(&document).expect("XML");
        let points = numbers(paths(&document, "budget")[0]);
        // 8 MiB until 1 s, 4 MiB until 2 s: along, down, along, up.
        let (half, middle) = (191.0, 480.0);
        let corners = [84.0, 76.0, middle, 76.0, middle, half, 876.0, half, 876.0, 76.0];
        assert_eq!(points, corners);
    }

    #[test]
    fn huge_values_stay_in_the_picture() {
        let huge = Sample {
            at: Duration::MAX,
            budget: u32::MAX,
            resident: u32::MAX,
            refaults: u64::MAX,
            gate_waits: u64::MAX,
            page_waits: u64::MAX,
            guest_free: Some(u64::MAX),
            guest_swap_ins: Some(u64::MAX),
            ..Sample::default()
        };
        check(&svg(&[at(0), huge], "huge"));
        let soon = Sample { at: Duration::from_nanos(1), ..huge };
        check(&svg(&[at(0), soon], "soon"));
        check(&svg(&[huge, at(0), huge], "out of order"));
    }

    #[test]
    fn a_title_is_words_whatever_is_in_it() {
        let title = "a<b>&\"c'\u{1}\u{0}\u{ffff}\n]]><script>x</script>";
        let text = svg(&[at(0)], title);
        check(&text);
        let document = Document::parse(&text).expect("XML");
        let name =
            document.descendants().find(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "title")));
        let name = name.and_then(|node| node.text()).expect("a name");
        assert_eq!(name, "a<b>&\"c'\u{fffd}\u{fffd}\u{fffd} ]]><script>x</script>");
        let long = "x".repeat(5000);
        assert!(svg(&[], &long).contains(&format!(">{}\u{2026}<", "x".repeat(TITLE_MAX - 1))));
    }

    #[test]
    fn a_chart_has_what_it_is_given_in_sight_whatever_that_is() {
        let tick = |at, words: &str| (at, words.to_owned());
        let of = Chart {
            title: "a<b>".into(),
            axes: ("across & over".into(), "along".into()),
            across: vec![tick(0.0, "none"), tick(1.0, "all")],
            along: vec![tick(0.5, "half")],
            lines: vec![(
                "steps".into(),
                vec![(0.0, 0.0), (0.5, 2.0), (f64::NAN, f64::INFINITY), (1.0, 0.25)],
            )],
            bars: vec![
                ("low".into(), vec![[0.1, 0.2, 0.0, 0.5]]),
                ("high".into(), vec![[0.1, 0.2, 0.5, 7.0]]),
            ],
        };
        let text = chart(&of);
        let document = Document::parse(&text).unwrap_or_else(|error| panic!("{error}:\n{text}"));
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        for word in ["across &amp; over", "along", "none", "half", "steps", "low", "high"] {
            assert!(text.contains(&format!(">{word}<")), "{word} is missing:\n{text}");
        }
        let number =
            |node: Node, name| node.attribute(name).and_then(|n| n.parse::<f64>().ok()).expect("a number");
        let bars: Vec<_> = document.descendants().filter(|node| has_class(node, "bar")).collect();
        // The lower half, and from there to the edge, beyond which nothing is.
        let edges: Vec<_> = bars.iter().map(|bar| (number(*bar, "y"), number(*bar, "height"))).collect();
        assert_eq!(edges, [(308.0, 232.0), (76.0, 232.0)]);
        let points = numbers(paths(&document, "c2")[0]);
        assert_eq!((points[..2].to_vec(), points[2..4].to_vec()), (vec![84.0, 540.0], vec![480.0, 76.0]));
        assert!(chart(&Chart::default()).contains("no samples"));
    }

    #[test]
    fn ticks_are_round_numbers() {
        let labels = |axis: Axis| axis.ticks().map(|(_, label)| label).collect::<Vec<_>>();
        assert_eq!(labels(Axis::covering(8.0, 5.0)), ["0", "2", "4", "6", "8"]);
        assert_eq!(labels(Axis::covering(8.5, 5.0)), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(labels(Axis::exactly(0.25, 5.0)), ["0.00", "0.05", "0.10", "0.15", "0.20", "0.25"]);
        assert_eq!(labels(Axis::covering(0.0, 5.0)), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(Axis::covering(3e9, 5.0))[1], "1.0e9");
    }

    #[test]
    fn a_full_series_makes_a_picture_of_bounded_size() {
        let sample =
            |n: u64| Sample { resident: (n % 2) as u32 * 2048, refaults: n * n * (n % 3), ..at(n * 50) };
        let samples: Vec<_> = (0..crate::vm::SAMPLES_MAX as u64).map(sample).collect();
        let text = svg(&samples, "full");
        check(&text);
        assert!(text.len() < 400 << 10, "{} bytes", text.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_samples_and_any_title_make_a_picture(
            values in prop::collection::vec(any::<(u64, u32, u32, u64)>(), 0..20),
            title in any::<String>(),
        ) {
            let mut samples: Vec<_> = values.into_iter().map(|(at, pages, budget, count)| Sample {
                at: Duration::from_nanos(at),
                budget,
                resident: pages,
                refaults: count,
                ..Sample::default()
            }).collect();
            samples.sort_unstable_by_key(|sample| sample.at);
            check(&svg(&samples, &title));
        }
    }
}
