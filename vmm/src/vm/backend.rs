//! Which backend runs a guest, and why.
//!
//! Story: a [`Plan`] is made before anything else, from the command line and the host's probe; a [`Runner`] is what it
//! takes to carry it out; [`Runner::into_backend`] is what the vCPU's loop runs.

use std::sync::Arc;

use umbra_mmu::{Coherence, Mmu, Vcpu};

use super::RunError;
use super::flush::Flusher;
use super::kick::{Both, Kick};
use super::native::Native;
use super::soft::Soft;
use super::vcpu::Backend;
use crate::cli::{self, RunArgs};
use crate::kvm::shootdown::Notifier;
use crate::kvm::{Host, KvmVcpu, KvmVm, Options};
use crate::machine::Pool;
use crate::probe::{Probe, Quick};

/// The choice of a backend.
pub struct Plan {
    chosen: Chosen,
    /// Why, in a line, where the choice was ours.
    why: Option<String>,
}

enum Chosen {
    /// /dev/kvm, which is like this.
    Kvm(Host, Quick),
    /// The interpreter.
    Soft,
}

impl Plan {
    /// Chooses as the command line has it. `auto` is KVM where it works.
    ///
    /// # Errors
    ///
    /// When KVM was asked for and cannot be used, or does not go with `--deterministic`.
    pub fn make(args: &RunArgs) -> Result<Plan, RunError> {
        let backend = args.backend;
        if args.check_guest_tlb.is_some() {
            let why = || "backend=soft: --check-guest-tlb judges what is interpreted".to_owned();
            return match backend {
                cli::Backend::Kvm => Err(RunError::CheckNeedsSoft),
                cli::Backend::Auto => Ok(Plan { chosen: Chosen::Soft, why: Some(why()) }),
                cli::Backend::Soft => Ok(Plan { chosen: Chosen::Soft, why: None }),
            };
        }
        if args.deterministic {
            return match backend {
                cli::Backend::Kvm => Err(RunError::NotDeterministic),
                _ => Ok(Plan { chosen: Chosen::Soft, why: None }),
            };
        }
        match (backend, (backend != cli::Backend::Soft).then(|| open_kvm(args))) {
            (cli::Backend::Auto, Some(Err(error))) => {
                Ok(Plan { chosen: Chosen::Soft, why: Some(format!("backend=soft: {error}")) })
            }
            (_, Some(opened)) => {
                let (host, probe) = opened?;
                let why = (backend == cli::Backend::Auto).then(|| reason(&probe));
                Ok(Plan { chosen: Chosen::Kvm(host, probe), why })
            }
            (_, None) => Ok(Plan { chosen: Chosen::Soft, why: None }),
        }
    }

    /// What `auto` has chosen and why, in a line.
    pub fn take_reason(&mut self) -> Option<String> {
        self.why.take()
    }

    /// Frames of the machine that the firmware takes.
    ///
    /// # Errors
    ///
    /// When the firmware does not fit so many vCPUs.
    pub fn firmware_frames(&self, vcpus: u32) -> Result<u64, RunError> {
        match self.chosen {
            Chosen::Kvm(..) => Ok(KvmVm::firmware_frames(vcpus)?),
            Chosen::Soft => Ok(0),
        }
    }
}

fn open_kvm(args: &RunArgs) -> Result<(Host, Quick), RunError> {
    // Which shootdown is the faster one matters to guests that lose pages.
    let lose_pages = args.frames.is_some() && args.shootdown == cli::Shootdown::Auto;
    let probe = if lose_pages { Probe::quick_with_shootdowns()? } else { Probe::quick()? };
    Ok((Host::open()?, probe))
}

/// Why KVM: it is there. Where it emulates what soft would interpret, the user should know.
fn reason(probe: &Quick) -> String {
    let faster = if probe.speed.emulated { "; --backend soft is faster here" } else { "" };
    format!("backend=kvm: {}{faster}", probe.verdict())
}

/// What runs the guest's vCPUs.
pub enum Runner {
    /// KVM.
    Kvm {
        /// The VM.
        vm: Arc<KvmVm>,
        /// Its vCPUs, in order.
        vcpus: Vec<KvmVcpu>,
        /// What its KVM is like.
        probe: Quick,
        /// What interprets the guest's kernel, one for each vCPU, if that is not to run natively.
        supervisors: Option<Vec<Soft>>,
    },
    /// The interpreter, one for each vCPU.
    Soft(Vec<Soft>),
}

impl Runner {
    /// Sets up what `plan` needs. `interpret`: KVM runs the guest's user code alone.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn new(plan: Plan, pool: &Arc<Pool>, vcpus: u32, interpret: bool) -> Result<Runner, RunError> {
        let interpreters = || (0..vcpus).map(|_| Soft::default()).collect();
        let Chosen::Kvm(host, probe) = plan.chosen else { return Ok(Runner::Soft(interpreters())) };
        let options = Options { vcpus, ..Options::default() };
        let vm = Arc::new(KvmVm::new(&host, Arc::clone(pool), options)?);
        let vcpus = (0..vcpus).map(|id| vm.create_vcpu(id)).collect::<Result<_, _>>()?;
        Ok(Runner::Kvm { vm, vcpus, probe, supervisors: interpret.then(interpreters) })
    }

    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Runner::Kvm { .. } => "kvm",
            Runner::Soft(_) => "soft",
        }
    }

    /// True where the guest's kernel runs at CPL 3.
    pub fn is_native(&self) -> bool {
        matches!(self, Runner::Kvm { supervisors: None, .. })
    }

    /// Frames at the start of the machine that are the firmware's.
    pub fn reserved_frames(&self) -> u32 {
        match self {
            Runner::Kvm { vm, .. } => vm.first_free_frame().0,
            Runner::Soft(_) => 0,
        }
    }

    /// What every root must hold in the firmware's slot.
    pub fn firmware_entry(&self) -> u64 {
        match self {
            Runner::Kvm { vm, .. } => vm.root_entry().1,
            Runner::Soft(_) => 0,
        }
    }

    /// How each vCPU is kicked, in order.
    pub fn kicks(&self) -> Vec<Box<dyn Kick>> {
        match self {
            Runner::Kvm { vcpus, supervisors: None, .. } => {
                vcpus.iter().map(|kvm| -> Box<dyn Kick> { Box::new(kvm.kicker()) }).collect()
            }
            Runner::Kvm { vcpus, supervisors: Some(softs), .. } => {
                let both = |(kvm, soft): (&KvmVcpu, &Soft)| -> Box<dyn Kick> {
                    Box::new(Both(kvm.kicker(), soft.attention()))
                };
                vcpus.iter().zip(softs).map(both).collect()
            }
            Runner::Soft(softs) => {
                softs.iter().map(|soft| -> Box<dyn Kick> { Box::new(soft.attention()) }).collect()
            }
        }
    }

    /// The VM, where vCPUs are KVM's.
    pub fn vm(&self) -> Option<Arc<KvmVm>> {
        match self {
            Runner::Kvm { vm, .. } => Some(Arc::clone(vm)),
            Runner::Soft(_) => None,
        }
    }

    /// How the host takes frames away from the vCPUs; `None` where it does not know of all their translations.
    pub fn notifier(&self) -> Option<Notifier> {
        match self {
            Runner::Kvm { vm, supervisors: None, .. } => Some(Notifier::new(Arc::clone(vm))),
            Runner::Kvm { supervisors: Some(_), .. } | Runner::Soft(_) => None,
        }
    }

    /// Tells `ledger` how to shoot down, and gives that a name.
    pub fn choose_shootdown(&self, wanted: cli::Shootdown, ledger: &Coherence) -> &'static str {
        const KICK: &str = "kick";
        const NOTIFIER: &str = "notifier";
        let Runner::Kvm { probe, supervisors: None, .. } = self else {
            if wanted == cli::Shootdown::Notifier {
                log::warn!("--shootdown notifier: a vCPU with a software TLB is kicked all the same");
            }
            return KICK;
        };
        match wanted {
            cli::Shootdown::Kick => KICK,
            cli::Shootdown::Auto => {
                ledger.notify_up_to(probe.frames_a_kick);
                if probe.frames_a_kick > 0 { NOTIFIER } else { KICK }
            }
            cli::Shootdown::Notifier => {
                if !probe.notifier_is_complete() {
                    log::warn!(
                        "--shootdown notifier: this KVM emulates guest code at times, and what it has translated for an \
                         instruction in flight the notifier does not take back; --shootdown kick is safe"
                    );
                }
                ledger.prefer_notifier(true);
                NOTIFIER
            }
        }
    }

    /// The MMU's side of vCPU `id`.
    pub fn mmu_vcpu(&self, mmu: &Mmu, id: u32, tlb: cli::Tlb) -> Vcpu {
        match self {
            Runner::Kvm { supervisors, .. } => {
                let mut vcpu = mmu.vcpu(id);
                if supervisors.is_some() {
                    vcpu.add_tlb(tlb.into());
                }
                vcpu
            }
            Runner::Soft(_) => mmu.soft_vcpu(id, tlb.into()),
        }
    }

    /// What the loops of the vCPUs run, in order.
    pub fn into_backends(self, mmu: &Mmu) -> Vec<Box<dyn Backend>> {
        match self {
            Runner::Kvm { vm, vcpus, probe, supervisors } => {
                let flusher = Arc::new(Flusher::new(probe.translation, vm, mmu));
                let mut supervisors = supervisors.unwrap_or_default().into_iter();
                let native = |kvm| -> Box<dyn Backend> {
                    Box::new(Native::new(kvm, Arc::clone(&flusher), supervisors.next()))
                };
                vcpus.into_iter().map(native).collect()
            }
            Runner::Soft(softs) => {
                softs.into_iter().map(|soft| -> Box<dyn Backend> { Box::new(soft) }).collect()
            }
        }
    }
}
