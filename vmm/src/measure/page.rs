//! A measurement as a page: one file of HTML, with its plots in it.
//!
//! | plot | what is in it |
//! |---|---|
//! | percentiles of a cause | how many of a hundred were as short, for each phase and for the whole |
//! | over time | the median of each cause's total, interval by interval, and its p99 |
//! | phases, stacked | the mean of each phase, one on the other, by how many importers were told; or by cause, where there were none |
//!
//! Holds: nothing in it is fetched from elsewhere, runs, or is markup that the report has brought along.

use std::fmt::Write;

use super::collect::{IMPORTERS, KICKED, RESPONSE, SERVICE, TOTAL};
use super::report::{CauseReport, Report, Times, show};
use crate::plot::{Chart, chart, escaped};

/// Nines that percentile curves end with: 99.999 %.
const NINES: f64 = 5.0;

/// The page.
pub fn html(report: &Report) -> String {
    let mut page = String::new();
    let title = format!("Umbra: {} on {}", report.setting.guest, report.setting.backend);
    let title = escaped(&title);
    // A string takes everything.
    let _ = writeln!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>{title}</title>\n<style>{STYLE}</style></head>\n\
         <body>\n<h1>{title}</h1>"
    );
    let setting = &report.setting;
    let facts = [
        format!("{} vCPU(s), who forget by {}", setting.vcpus, setting.shootdown),
        format!("{} of {} page(s), {}/s", setting.causes.join(", "), setting.pages, setting.rate),
        setting.of_importers(),
        slowest(report),
        format!(
            "{} of {} starts begun, {} late",
            report.starts.begun, report.starts.planned, report.starts.late
        ),
        report.end.clone(),
    ];
    let skips = if setting.importers.is_empty() { 2..4 } else { 0..0 };
    let _ = writeln!(page, "<ul>");
    for (_, fact) in facts.iter().enumerate().filter(|(n, _)| !skips.contains(n)) {
        let _ = writeln!(page, "<li>{}</li>", escaped(fact));
    }
    let _ = writeln!(page, "</ul>");
    for chart_of in charts(report) {
        let _ = writeln!(page, "<figure>\n{}</figure>", chart(&chart_of));
    }
    let _ = writeln!(page, "<h2>All of it</h2>\n<pre>{}</pre>\n</body>\n</html>", pre(&report.to_string()));
    page
}

const STYLE: &str = "\
:root{color-scheme:light dark}body{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
figure{margin:1.5rem 0}svg{max-width:100%;height:auto}pre{overflow-x:auto;font-size:12px}";

/// Lines stay lines.
fn pre(text: &str) -> String {
    text.lines().map(escaped).collect::<Vec<_>>().join("\n")
}

/// Whom the others waited for, in words.
fn slowest(report: &Report) -> String {
    match report.slowest.iter().max_by_key(|one| one.count) {
        Some(one) => format!(
            "slowest: {}, {} times; waited for {} at p50 and {} at most beyond the vCPUs",
            one.name,
            one.count,
            show(one.p50),
            show(one.max)
        ),
        None => "no importer was waited for alone".into(),
    }
}

fn charts(report: &Report) -> Vec<Chart> {
    let shown = |cause: &&CauseReport| cause.invalidations > 0 && !cause.cause.starts_with("other-");
    let mut charts: Vec<Chart> =
        report.causes.iter().filter(shown).chain(&report.told).map(percentiles).collect();
    charts.push(over_time(report));
    charts.push(stacked(report));
    charts
}

/// A scale of powers of ten over the times of some lines, in nanoseconds.
struct Decades {
    from: i32,
    to: i32,
}

impl Decades {
    fn over(times: impl Iterator<Item = u64>) -> Decades {
        let (least, most) =
            times.map(|nanos| nanos.max(1)).fold((u64::MAX, 1), |(a, b), n| (a.min(n), b.max(n)));
        let from = (least.min(most) as f64).log10().floor() as i32;
        Decades { from, to: ((most as f64).log10().ceil() as i32).max(from + 1) }
    }

    fn place(&self, nanos: u64) -> f64 {
        ((nanos.max(1) as f64).log10() - f64::from(self.from)) / f64::from(self.to - self.from)
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        (self.from..=self.to)
            .filter_map(|power| 10u64.checked_pow(power.max(0) as u32))
            .map(|nanos| (self.place(nanos), show(nanos)))
            .collect()
    }
}

fn percentiles(cause: &CauseReport) -> Chart {
    let phases = || cause.phases.iter().filter(|times| times.count > 0);
    let scale = Decades::over(phases().flat_map(|times| &times.curve).map(|point| point.nanos));
    let line = |times: &Times| {
        let point = |point: &super::report::Point| {
            // The longest of n is as far as n reaches.
            let rest = (1.0 - point.quantile).max(1.0 / (times.count as f64 + 1.0));
            (-rest.log10() / NINES, scale.place(point.nanos))
        };
        (times.name.clone(), times.curve.iter().map(point).collect())
    };
    let words = ["0", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %"];
    Chart {
        title: format!("{}: percentiles by phase", cause.cause),
        axes: ("as short were".into(), "time".into()),
        across: (0..).zip(words).map(|(n, words)| (f64::from(n) / NINES, words.into())).collect(),
        along: scale.ticks(),
        lines: phases().map(line).collect(),
        bars: Vec::new(),
    }
}

fn over_time(report: &Report) -> Chart {
    let totals = || {
        let named = |cause: &'_ CauseReport, name: &str| {
            cause.phases.iter().find(|times| times.name == name && !times.intervals.is_empty()).cloned()
        };
        let of = report.causes.iter().chain(&report.told);
        of.filter_map(move |cause| named(cause, TOTAL).map(|times| (cause.cause.clone(), times)))
    };
    let all = || totals().flat_map(|(_, times)| times.intervals);
    let scale = Decades::over(all().flat_map(|interval| [interval.p50, interval.p99]));
    let end = report.nanos.max(1) as f64;
    let lines = totals().flat_map(|(cause, times)| {
        let line = |value: fn(&super::report::Slice) -> u64| {
            times.intervals.iter().map(|one| (one.at as f64 / end, scale.place(value(one)))).collect()
        };
        [(format!("{cause} p50"), line(|one| one.p50)), (format!("{cause} p99"), line(|one| one.p99))]
    });
    let seconds = |n: u32| {
        let part = f64::from(n) / 4.0;
        (part, format!("{:.1}", part * end / 1e9))
    };
    Chart {
        title: "Totals over time".into(),
        axes: ("time since the measurement began (s)".into(), "time".into()),
        across: (0..=4).map(seconds).collect(),
        along: scale.ticks(),
        lines: lines.collect(),
        bars: Vec::new(),
    }
}

/// The parts of an invalidation; all else is made of them.
fn is_part(name: &str) -> bool {
    ![TOTAL, KICKED, IMPORTERS, SERVICE, RESPONSE].contains(&name)
}

fn stacked(report: &Report) -> Chart {
    let by_told = !report.told.is_empty();
    let groups: Vec<&CauseReport> =
        if by_told { report.told.iter().collect() } else { report.causes.iter().collect() };
    let groups: Vec<_> = groups.into_iter().filter(|group| group.invalidations > 0).collect();
    let parts = |group: &CauseReport| -> Vec<(String, f64)> {
        let parts = group.phases.iter().filter(|times| is_part(&times.name));
        parts.map(|times| (times.name.clone(), times.mean.max(0.0))).collect()
    };
    let sum = |group: &&CauseReport| parts(group).iter().map(|part| part.1).sum::<f64>();
    let most = groups.iter().map(sum).fold(1.0, f64::max);
    let mut bars: Vec<(String, Vec<[f64; 4]>)> = Vec::new();
    let width = 1.0 / groups.len().max(1) as f64;
    for (n, group) in groups.iter().enumerate() {
        let (mut low, left) = (0.0, (n as f64 + 0.2) * width);
        for (name, mean) in parts(group) {
            let bar = [left, left + 0.6 * width, low / most, (low + mean) / most];
            match bars.iter_mut().find(|(other, _)| *other == name) {
                Some((_, of_part)) => of_part.push(bar),
                None => bars.push((name, vec![bar])),
            }
            low += mean;
        }
    }
    let name = |group: &CauseReport| group.cause.trim_start_matches("told-").to_owned();
    let across = groups.iter().enumerate().map(|(n, group)| ((n as f64 + 0.5) * width, name(group)));
    let of = if by_told { "importers told" } else { "cause" };
    Chart {
        title: format!("Means of phases, {} vCPU(s); {}", report.setting.vcpus, slowest(report)),
        axes: (of.into(), "mean, one phase on the other".into()),
        across: across.collect(),
        along: (0..=4u32).map(|n| (f64::from(n) / 4.0, show((f64::from(n) / 4.0 * most) as u64))).collect(),
        lines: Vec::new(),
        bars,
    }
}

#[cfg(test)]
mod tests {
    use roxmltree::Document;

    use super::super::report::tests::example;
    use super::*;

    /// The pictures of a page: well-formed, each.
    fn pictures(page: &str) -> Vec<&str> {
        let pictures: Vec<&str> = page
            .match_indices("<svg")
            .map(|(at, _)| &page[at..at + page[at..].find("</svg>").expect("its end") + "</svg>".len()])
            .collect();
        for picture in &pictures {
            Document::parse(picture).unwrap_or_else(|error| panic!("{error}:\n{picture}"));
        }
        pictures
    }

    #[test]
    fn a_page_has_its_plots_in_it_and_fetches_nothing() {
        let page = html(&example());
        // A cause, two counts of importers, over time, stacked.
        assert_eq!(pictures(&page).len(), 5);
        for word in
            ["percentiles by phase", "Totals over time", "importers told", "slowest: importer 3", "99.999 %"]
        {
            assert!(page.contains(word), "{word} is missing");
        }
        let foreign = page.replace("http://www.w3.org/2000/svg", "");
        for fetches in ["http", "src=", "href", "url(", "@import", "<script", "<link"] {
            assert!(!foreign.contains(fetches), "{fetches}");
        }
    }

    #[test]
    fn phases_are_stacked_one_on_the_other() {
        let chart = stacked(&example());
        let names: Vec<_> = chart.bars.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["gate", "unmap", "tell", "shootdown", "external", "finish"]);
        for group in 0..2 {
            let edges: Vec<_> = chart.bars.iter().map(|(_, bars)| bars[group]).collect();
            assert!(edges.windows(2).all(|pair| (pair[0][3] - pair[1][2]).abs() < 1e-9), "{edges:?}");
            assert!((edges[5][3] - 1.0).abs() < 1e-9, "the tallest reaches the top");
        }
    }

    #[test]
    fn what_a_report_says_is_words_and_an_empty_one_is_a_page() {
        let mut report = example();
        report.setting.guest = "<script>alert(1)</script>".into();
        report.end = "</pre><img src=x>".into();
        let page = html(&report);
        assert!(!page.contains("<script") && !page.contains("<img"), "{page}");
        (report.causes, report.told, report.slowest) = Default::default();
        assert!(pictures(&html(&report)).iter().all(|picture| picture.contains("no samples")));
    }
}
