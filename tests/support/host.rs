//! What a test needs of the machine it runs on.
//!
//! `UMBRA_REQUIRE` is a comma-separated list of names of needs. A need that is missing makes its tests ignored, and
//! failed when it is on that list: CI must not go green because a machine lost its /dev/kvm.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use tempfile::TempDir;

use super::process;

/// Something that not every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A /dev/kvm that opens and speaks the stable API.
    Kvm,
    /// `qemu-system-i386`.
    Qemu,
    /// The result lines that QEMU prints: QEMU itself, or its lines recorded before (`UMBRA_RECORDED`).
    Peer,
    /// The nested rig (tests/rig/run), from the inside.
    Rig,
    /// The same with a KVM that shadows our tables with its own.
    NoNpt,
    /// A build without debug assertions, whose times mean something.
    Release,
    /// The superuser, who can become another user and give a child file systems of its own.
    Root,
    /// A Python with the package `qemu.qmp`, in an environment of its own that is made on the spot.
    Qmp,
}

impl Need {
    /// The name under which `UMBRA_REQUIRE` knows it.
    pub fn name(self) -> &'static str {
        match self {
            Need::Kvm => "kvm",
            Need::Qemu | Need::Peer => "qemu",
            Need::Rig => "rig",
            Need::NoNpt => "npt=0",
            Need::Release => "release",
            Need::Root => "root",
            Need::Qmp => "qmp",
        }
    }

    /// Whether the caller insists on it.
    pub fn is_required(self) -> bool {
        let list = std::env::var("UMBRA_REQUIRE").unwrap_or_default();
        list.split(',').any(|name| name.trim() == self.name())
    }

    /// Whether this machine has it; otherwise what is missing, in a clause.
    pub fn met(self) -> Result<(), String> {
        match self {
            Need::Kvm => kvm(),
            Need::Qemu => qemu(),
            Need::Peer if recorded().is_some() => Ok(()),
            Need::Peer => qemu(),
            Need::Rig => match std::env::var_os("RIG_NPT") {
                Some(_) => Ok(()),
                None => Err("this is not the nested rig".into()),
            },
            Need::NoNpt => match std::env::var("RIG_NPT").as_deref() {
                Ok("0") => Ok(()),
                _ => Err("this is not the nested rig with npt=0".into()),
            },
            Need::Release if cfg!(debug_assertions) => Err("times mean something only with --release".into()),
            Need::Release => Ok(()),
            Need::Root => match std::fs::metadata("/proc/self") {
                Ok(myself) if myself.uid() == 0 => Ok(()),
                _ => Err("only the superuser can become another user".into()),
            },
            Need::Qmp => qmp_client(),
        }
    }
}

/// The folder with QEMU's lines, `WORKLOAD-PAGING.lines`, where QEMU itself is not at hand.
pub fn recorded() -> Option<PathBuf> {
    std::env::var_os("UMBRA_RECORDED").map(PathBuf::from)
}

/// The folder with the environment that [`Need::Qmp`] has found or made; for one test, with which it goes.
pub fn take_qmp_client() -> Option<TempDir> {
    QMP_CLIENT.lock().ok()?.take()
}

static QMP_CLIENT: Mutex<Option<TempDir>> = Mutex::new(None);

fn qmp_client() -> Result<(), String> {
    /// A registry that does not answer is one that is missing.
    const LIMIT: Duration = Duration::from_secs(120);
    let folder = tempfile::tempdir().map_err(|error| format!("there is no folder for it: {error}"))?;
    let run = |command: &mut Command, what: &str| {
        let run = process::run(command, LIMIT)?;
        let last = run.stderr.lines().last().unwrap_or_default().to_owned();
        match run.end {
            process::End::Status(0) => Ok(()),
            end => Err(format!("{what} ended with {end:?}: {last}")),
        }
    };
    let environment = folder.path().join("python");
    run(Command::new("python3").args(["-m", "venv"]).arg(&environment), "python3 -m venv")?;
    let mut pip = Command::new(environment.join("bin/pip"));
    run(pip.args(["install", "--quiet", "--retries", "1", "qemu.qmp>=0.0.3"]), "pip install qemu.qmp")?;
    *QMP_CLIENT.lock().map_err(|_| "another test has panicked")? = Some(folder);
    Ok(())
}

fn kvm() -> Result<(), String> {
    match kvm_ioctls::Kvm::new() {
        Ok(kvm) if kvm.get_api_version() == 12 => Ok(()),
        Ok(kvm) => Err(format!("/dev/kvm speaks API version {}, not 12", kvm.get_api_version())),
        Err(error) => Err(format!("/dev/kvm cannot be opened: {error}")),
    }
}

fn qemu() -> Result<(), String> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    let probe = || match Command::new("qemu-system-i386").arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("qemu-system-i386 --version ended with {}", output.status)),
        Err(error) => Err(format!("qemu-system-i386 cannot be started: {error}")),
    };
    FOUND.get_or_init(probe).clone()
}
