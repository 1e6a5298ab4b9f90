//! The `umbra` program: the command line, and nothing behind it.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use umbra::cli::{Cli, Command, DoctorArgs, ExplainArgs, RunArgs};
use umbra::import::{self, ImportArgs};
use umbra::measure::{self, MeasureArgs};
use umbra::pressure::{self, End, PressureArgs};
use umbra::scenario::{self, PlayArgs, ScenarioCommand};
use umbra::signals;
use umbra::simulate::{self, SimulateArgs};
use umbra::status::Status;
use umbra::virtio::disk::DiskSource;
use umbra::{child, plot, probe, vm};
use umbra_mmu::Rules;

fn main() -> ExitCode {
    vm::process_start();
    let screen = vm::Screen::default();
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("UMBRA_LOG", "warn"))
        .target(env_logger::Target::Pipe(Box::new(screen.log_lines())))
        .init();
    let code = match Cli::parse().command {
        Command::Run(args) => run(&args, &screen),
        Command::Doctor(args) => doctor(&args),
        Command::Explain(args) => explain(&args),
        Command::Pressure(args) => press(&args),
        Command::Import(args) => import(&args),
        Command::Measure(args) => measure(&args, &screen),
        Command::Simulate(args) => simulate(&args),
        Command::Scenario(command) => scenario(&command),
        Command::Play(args) => play(*args, &screen),
        Command::MeasuredImporter(args) => {
            measure::serve(&args).map_or_else(|error| refuse(&error), |()| Status::Pass.code())
        }
    };
    ExitCode::from(code)
}

/// Says it on standard error. A reader that has gone is no reason to fail.
macro_rules! say {
    ($($part:tt)*) => { let _ = writeln!(io::stderr(), "umbra: {}", format_args!($($part)*)); };
}

fn run(args: &RunArgs, screen: &vm::Screen) -> u8 {
    // Before the run, so that a wrong path costs no run.
    let mut json = match args.json.as_deref().map(vm::JsonSink::open).transpose() {
        Ok(json) => json,
        Err(error) => return refuse(&error),
    };
    let mut plot = match args.plot.as_deref().map(vm::PlotSink::open).transpose() {
        Ok(plot) => plot,
        Err(error) => return refuse(&error),
    };
    if let Err(error) = signals::catch_with_event() {
        return refuse(&error);
    }
    let summary = match vm::run(args, screen) {
        Ok(summary) => summary,
        Err(error) => return refuse(&error),
    };
    if summary.guest_exit != Some(0) {
        say!("{}", summary.end);
    }
    for line in summary.to_string().lines() {
        say!("{line}");
    }
    // A sink that fails keeps nothing from the other.
    let written = [
        json.as_mut().map_or(Ok(()), |json| json.write(&summary)),
        plot.as_mut().map_or(Ok(()), |plot| plot.write(args, &summary)),
    ];
    written.iter().filter_map(|written| written.as_ref().err()).fold(summary.status, |_, error| refuse(error))
}

fn doctor(args: &DoctorArgs) -> u8 {
    let report = probe::Probe::complete();
    let text = if args.json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => text,
            Err(error) => return refuse(&error),
        }
    } else {
        report.to_string()
    };
    let _ = writeln!(io::stdout(), "{}", text.trim_end());
    if report.usable() { Status::Pass.code() } else { Status::Operator.code() }
}

fn explain(args: &ExplainArgs) -> u8 {
    match vm::ask::ask_explain(&args.qmp, args.vcpu, args.gva) {
        Ok(lines) => {
            let mut out = io::stdout().lock();
            let _ = writeln!(out, "gva {:#x}", args.gva);
            lines.iter().for_each(|line| drop(writeln!(out, "  {line}")));
            Status::Pass.code()
        }
        Err(error) => {
            say!("{error}");
            Status::Operator.code()
        }
    }
}

fn press(args: &PressureArgs) -> u8 {
    let order = match args.order() {
        Ok(order) => order,
        Err(error) => {
            say!("{error}");
            return Status::Usage.code();
        }
    };
    let mut sink = match args.plot.as_deref().map(vm::PlotSink::open).transpose() {
        Ok(sink) => sink,
        Err(error) => return refuse(&error),
    };
    if let Err(error) = signals::catch() {
        return refuse(&error);
    }
    let report = match pressure::run(&order, &signals::count) {
        Ok(report) => report,
        Err(error) => {
            say!("{error}");
            return Status::Operator.code();
        }
    };
    match &report.end {
        End::Reached => {}
        End::NotReached(why) => {
            say!("not reached: {why}");
        }
        End::Interrupted(now) => {
            say!("interrupted: {now}");
        }
    }
    say!("{}", report.summary);
    let drawn = sink.as_mut().map_or(Ok(()), |sink| {
        let image = plot::svg_since(report.series.samples(), &report.summary, "the command");
        sink.write_image(&image)
    });
    drawn.err().map_or(report.status().code(), |error| refuse(&error))
}

fn import(args: &ImportArgs) -> u8 {
    match import::command::run_on_stdout(args) {
        Ok(report) => {
            for page in report.wrong.iter().take(8) {
                say!("guest frame {page:#x} is not what the guest's VMM reads there");
            }
            say!("{report}");
            if report.wrong.is_empty() { Status::Pass.code() } else { Status::Witness.code() }
        }
        Err(error) => refuse(&error),
    }
}

fn measure(args: &MeasureArgs, screen: &vm::Screen) -> u8 {
    if let Some([a, b]) = args.compare.as_deref() {
        return compare(a, b);
    }
    let order = match args.order() {
        Ok(order) => order,
        Err(error) => {
            say!("{error}");
            return Status::Usage.code();
        }
    };
    // Before the run, so that a wrong path costs no run.
    let files = match measure::Files::open(&order) {
        Ok(files) => files,
        Err(error) => return refuse(&error),
    };
    if let Err(error) = signals::catch() {
        return refuse(&error);
    }
    let (measured, status) = match measure::run(&order, screen, &signals::count) {
        Ok(measured) => measured,
        Err(error) => return refuse(&error),
    };
    say!("{}", measured.report);
    files.write(&measured).map_or_else(|error| refuse(&error), |()| status.code())
}

fn scenario(command: &ScenarioCommand) -> u8 {
    let args = match command {
        ScenarioCommand::List => {
            let mut out = io::stdout().lock();
            for scenario in scenario::table::SCENARIOS {
                let cases = scenario.cases();
                let _ = writeln!(out, "{:12} {} ({} cases)", scenario.name, scenario.about, cases.len());
                // A reader that has gone is no reason to fail.
                for case in cases {
                    let _ = writeln!(out, "  /{:26} {}", case.name, case.rule);
                }
            }
            return Status::Pass.code();
        }
        ScenarioCommand::Run(args) => args,
    };
    let order = match args.order() {
        Ok(order) => order,
        Err(error) => {
            say!("{error}");
            return Status::Usage.code();
        }
    };
    if let Err(error) = signals::catch() {
        return refuse(&error);
    }
    match scenario::run(&order, &signals::count, &mut io::stdout().lock()) {
        Ok(report) => {
            say!("scenario {}: {report}", args.name);
            report.code()
        }
        Err(error) => refuse(&error),
    }
}

/// A part of a sweep or of a scenario.
fn play(args: PlayArgs, screen: &vm::Screen) -> u8 {
    if !child::die_with_parent() {
        return Status::Quit.code();
    }
    if let Some(scene) = args.scene {
        return scenario::play(scene, &args).unwrap_or_else(|error| refuse(&error));
    }
    if let Some(rule) = args.without {
        let run = &args.run;
        let memory = run.disk.iter().all(|disk| matches!(disk.source, DiskSource::Memory(_)));
        if !run.deterministic || run.image.is_some() || !memory {
            say!(
                "--without {}: for the built-in guest in a simulation alone, with disks in memory",
                rule.name()
            );
            return Status::Usage.code();
        }
        say!("this guest goes without the rule {}: {}", rule.name(), rule.protects());
    }
    let omit = args.without.map(Rules::all_but).or(args.run.omit);
    run(&RunArgs { omit, ..args.run }, screen)
}

fn simulate(args: &SimulateArgs) -> u8 {
    let order = match args.order() {
        Ok(order) => order,
        Err(error) => {
            say!("{error}");
            return Status::Usage.code();
        }
    };
    if let Err(error) = signals::catch() {
        return refuse(&error);
    }
    if order.replay {
        return match simulate::replay(&order, &signals::count, &mut io::stdout().lock()) {
            Ok(ended) => {
                ended.said.lines().for_each(|line| drop(writeln!(io::stderr(), "{line}")));
                ended.outcome.code()
            }
            Err(error) => refuse(&error),
        };
    }
    let report = match simulate::run(&order, &signals::count) {
        Ok(report) => report,
        Err(error) => return refuse(&error),
    };
    if let Some(failed) = &report.failed {
        failed.said.lines().for_each(|line| drop(writeln!(io::stderr(), "  {line}")));
        let fewer = failed.choices.map_or(String::new(), |choices| {
            format!(", and so it does if the seed chooses {choices} times who runs next, and all take turns from then on")
        });
        let (seed, outcome) = (failed.seed, failed.outcome);
        say!("seed {seed}: the run {outcome}{fewer}; this runs it again, and this shows it:");
        order
            .again(failed.seed, failed.choices)
            .iter()
            .for_each(|line| drop(writeln!(io::stderr(), "  {line}")));
    }
    if report.interrupted {
        say!("interrupted");
    }
    say!("{report}");
    report.code()
}

/// Two measurements beside each other, on standard output.
fn compare(a: &Path, b: &Path) -> u8 {
    match measure::compare::read(a).and_then(|first| Ok((first, measure::compare::read(b)?))) {
        Ok((first, second)) => {
            // A reader that has gone is no reason to fail.
            let _ = write!(io::stdout(), "{}", measure::compare::Comparison::new(&first, &second));
            Status::Pass.code()
        }
        Err(error) => refuse(&error),
    }
}

/// Says why, with those causes that the message does not name itself.
fn refuse(error: &dyn std::error::Error) -> u8 {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let words = inner.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = inner.source();
    }
    say!("{text}");
    Status::Operator.code()
}
