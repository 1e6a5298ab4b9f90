//! What a test needs of the machine it runs on.
//!
//! `UMBRA_REQUIRE` is a comma-separated list of names of needs. A need that is missing makes its tests ignored, and
//! failed when it is on that list: CI must not go green because a machine lost its /dev/kvm.

use std::process::Command;
use std::sync::OnceLock;

/// Something that not every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A /dev/kvm that opens and speaks the stable API.
    Kvm,
    /// `qemu-system-i386`.
    Qemu,
    /// The nested rig (tests/rig/run), from the inside.
    Rig,
}

impl Need {
    /// The name under which `UMBRA_REQUIRE` knows it.
    pub fn name(self) -> &'static str {
        match self {
            Need::Kvm => "kvm",
            Need::Qemu => "qemu",
            Need::Rig => "rig",
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
            Need::Rig => match std::env::var_os("RIG_NPT") {
                Some(_) => Ok(()),
                None => Err("this is not the nested rig".into()),
            },
        }
    }
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
