//! The command line: help, options that make no sense, images that are none, a host without KVM.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use libtest_mimic::{Failed, Trial};

use super::umbra::{expect_sentence, file_of, judge, program, status, umbra};
use crate::ensure;
use crate::support::host::Need;
use crate::support::process::{self, End, Outcome};
use crate::support::{Verdict, case, image};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    vec![
        case("help_shows_the_commands", &[], help),
        case("run_help_shows_the_options", &[], run_help),
        case("version_is_the_packages", &[], version),
        case("option_that_makes_no_sense_is_refused", &[], bad_options),
        case("plot_to_standard_error_is_refused", &[], plot_to_standard_error),
        case("image_that_is_none_is_refused_in_a_sentence", &[Need::Kvm], no_images),
        case("image_cut_short_is_refused_or_runs_but_never_breaks", &[Need::Kvm], cut_images),
        case("output_pipe_that_closes_does_not_break_the_run", &[Need::Kvm], closed_pipe),
        case("kvm_that_may_not_be_opened_says_what_to_do", &[Need::Kvm, Need::Root], forbidden_kvm),
        case("kvm_that_is_missing_says_what_to_do", &[Need::Root], missing_kvm),
        case("auto_without_kvm_runs_soft_and_says_why", &[Need::Root], auto_without_kvm),
        case("json_summary_has_the_verdict_and_the_counts", &[Need::Kvm], json),
        case("json_that_cannot_be_written_is_refused", &[Need::Kvm], json_nowhere),
    ]
}

fn help() -> Verdict {
    let run = umbra(["--help"])?;
    let text = run.lines().join("\n");
    ensure!(run.end == End::Status(0), "help is no failure:\n{run}");
    for word in ["run", "explain", "pressure", "Exit status"] {
        ensure!(text.contains(word), "--help does not name {word}:\n{run}");
    }
    Ok(())
}

fn run_help() -> Verdict {
    let run = umbra(["run", "--help"])?;
    let text = run.lines().join("\n");
    for word in ["--mem", "--append", "--timeout", "--json", "--plot", "--status", "--backend"] {
        ensure!(text.contains(word), "run --help does not name {word}:\n{run}");
    }
    Ok(())
}

fn version() -> Verdict {
    let run = umbra(["--version"])?;
    ensure!(run.lines() == [concat!("umbra ", env!("CARGO_PKG_VERSION"))], "not the version:\n{run}");
    Ok(())
}

fn bad_options() -> Verdict {
    let cases: [&[&str]; 8] = [
        &["run", "--no-such-option"],
        &["run", "--mem", "12Q"],
        &["run", "--mem", "-1"],
        &["run", "--mem", "99999999999999999999T"],
        &["run", "--timeout", "soon"],
        &["run", "--backend", "magic"],
        &["no-such-command"],
        &["run", "one", "two"],
    ];
    for args in cases {
        let run = umbra(args)?;
        ensure!(run.end == status::USAGE, "{args:?} should be a usage error:\n{run}");
        ensure!(!run.stderr.trim().is_empty(), "{args:?} failed without a word:\n{run}");
    }
    Ok(())
}

fn plot_to_standard_error() -> Verdict {
    let run = umbra(["run", "--plot", "-", "--append", "workload=hello"])?;
    ensure!(run.end == status::USAGE, "--plot - should be a usage error:\n{run}");
    for words in ["--plot <FILE.svg>", "a picture goes to a file"] {
        ensure!(run.stderr.contains(words), "the refusal does not say '{words}':\n{run}");
    }
    Ok(())
}

fn run_image(image: &OsStr) -> Result<Outcome, Failed> {
    umbra([OsStr::new("run"), image, OsStr::new("--timeout"), OsStr::new("5s")])
}

fn no_images() -> Verdict {
    expect_sentence(&run_image("/no/such/image".as_ref())?, &["/no/such/image"])?;
    expect_sentence(&run_image("/proc".as_ref())?, &["/proc"])?;
    for bytes in [&b""[..], b"This is no kernel.\n", &[0; 65536], b"\x7fELF"] {
        let file = file_of(bytes)?;
        expect_sentence(&run_image(file.path().as_os_str())?, &[&file.path().to_string_lossy()])?;
    }
    // A 64-bit ELF file with no Multiboot header: this very program.
    expect_sentence(&run_image(&program())?, &[&program().to_string_lossy()])
}

/// Each length of a tiny image, header and code: what is missing shows in the header or at run time.
fn cut_images() -> Verdict {
    let whole = image::multiboot(&image::exit(0));
    for length in 0..whole.len() {
        let file = file_of(&whole[..length])?;
        let run =
            umbra([OsStr::new("run"), file.path().as_os_str(), "--timeout".as_ref(), "100ms".as_ref()])?;
        ensure!(length >= 32 || run.end != End::Status(0), "{length} bytes are no image:\n{run}");
        if length < 32 {
            expect_sentence(&run, &[])?;
        }
    }
    Ok(())
}

/// The reader of the guest's serial line goes away, as `| head` does.
fn closed_pipe() -> Verdict {
    let file = file_of(&image::multiboot(&[image::print(&[b'x'; 2000]), image::exit(0)].concat()))?;
    let mut command = Command::new("sh");
    command.args(["-c", r#""$0" run "$1" --timeout 20s | true"#]).arg(program()).arg(file.path());
    judge(process::run(&mut command, Duration::from_secs(60))?)?;
    Ok(())
}

/// A copy of `umbra` that every user may start.
fn public_copy() -> Result<(tempfile::TempDir, std::path::PathBuf), Failed> {
    let folder = tempfile::tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let copy = folder.path().join("umbra");
    fs::copy(program(), &copy)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    Ok((folder, copy))
}

fn forbidden_kvm() -> Verdict {
    let (_folder, copy) = public_copy()?;
    let mut command = Command::new(copy);
    command.args(["run", "--backend", "kvm"]).uid(65534).gid(65534).stdin(Stdio::null());
    let run = judge(process::run(&mut command, Duration::from_secs(20))?)?;
    expect_sentence(&run, &["/dev/kvm", "group"])
}

fn missing_kvm() -> Verdict {
    let mut command = Command::new("unshare");
    let script = r#"mount -t tmpfs none /dev && exec "$0" run --backend kvm"#;
    command.args(["--mount", "sh", "-c", script]).arg(program());
    let run = judge(process::run(&mut command, Duration::from_secs(20))?)?;
    expect_sentence(&run, &["/dev/kvm", "modprobe"])
}

fn auto_without_kvm() -> Verdict {
    let mut command = Command::new("unshare");
    let script = r#"mount -t tmpfs none /dev && exec "$0" run --append workload=hello"#;
    command.args(["--mount", "sh", "-c", script]).arg(program());
    let run = judge(process::run(&mut command, Duration::from_secs(20))?)?;
    ensure!(run.end == End::Status(0), "the guest failed:\n{run}");
    let said = run.stderr.lines().filter(|line| line.contains("backend=soft: ")).count();
    ensure!(said == 1 && run.stderr.contains("/dev/kvm"), "it should say why in one line:\n{run}");
    Ok(())
}

fn json() -> Verdict {
    let file = file_of(b"")?;
    let path = file.path().to_string_lossy().into_owned();
    let run = umbra(["run", "--append", "workload=hello", "--json", &path])?;
    ensure!(run.end == End::Status(0), "hello failed:\n{run}");
    let summary: serde_json::Value = serde_json::from_slice(&fs::read(file.path())?)?;
    ensure!(summary["verdict"] == "PASS", "the verdict is {}", summary["verdict"]);
    ensure!(summary["status"] == 0, "the status is {}", summary["status"]);
    ensure!(summary["backend"] == "kvm", "the backend is {}", summary["backend"]);
    Ok(())
}

fn json_nowhere() -> Verdict {
    let run = umbra(["run", "--append", "workload=hello", "--json", "/no/such/folder/summary.json"])?;
    ensure!(run.end == status::OPERATOR, "expected {:?}:\n{run}", status::OPERATOR);
    ensure!(run.stderr.contains("/no/such/folder/summary.json"), "the file is not named:\n{run}");
    Ok(())
}
