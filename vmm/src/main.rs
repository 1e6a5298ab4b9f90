//! The `umbra` program: the command line, and nothing behind it.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use umbra::cli::{Cli, Command, ExplainArgs, RunArgs};
use umbra::status::Status;
use umbra::vm;

fn main() -> ExitCode {
    vm::process_start();
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("UMBRA_LOG", "warn")).init();
    let code = match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Explain(args) => explain(&args),
    };
    ExitCode::from(code)
}

fn run(args: &RunArgs) -> u8 {
    match vm::run(args) {
        Ok(summary) => {
            if summary.guest_exit != Some(0) {
                eprintln!("umbra: {}", summary.end);
            }
            eprintln!("umbra: {summary}");
            summary.status
        }
        Err(error) => refuse(&error),
    }
}

fn explain(args: &ExplainArgs) -> u8 {
    match vm::control::ask_explain(&args.qmp, args.gva) {
        Ok(lines) => {
            println!("gva {:#x}", args.gva);
            lines.iter().for_each(|line| println!("  {line}"));
            Status::Pass.code()
        }
        Err(error) => {
            eprintln!("umbra: {error}");
            Status::Operator.code()
        }
    }
}

/// Says why, with the chain of causes.
fn refuse(error: &dyn std::error::Error) -> u8 {
    eprintln!("umbra: {error}");
    Status::Operator.code()
}
