//! Which backend runs a guest, and why.
//!
//! Story: a [`Plan`] is made before anything else, from the command line and the host's probe; a [`Runner`] is what it
//! takes to carry it out; [`Runner::into_backend`] is what the vCPU's loop runs.

use std::sync::Arc;

use umbra_mmu::{Coherence, Mmu, Vcpu};

use super::RunError;
use super::flush::Flusher;
use super::hardware::{DropsRemoved, Hardware};
use super::kick::{Both, Kick};
use super::model::{ModelHost, ModelVcpu};
use super::native::Native;
use super::soft::Soft;
use super::vcpu::Backend;
use crate::cli::{self, RunArgs};
use crate::kvm::shootdown::Notifier;
use crate::kvm::{Host, KvmVcpu, KvmVm, Options};
use crate::machine::Pool;
use crate::probe::{Probe, Quick, Translation};

/// The choice of a backend.
pub struct Plan {
    chosen: Chosen,
    /// Why, in a line, where the choice was ours.
    why: Option<String>,
}

enum Chosen {
    /// /dev/kvm, which is like this.
    Kvm(Host, Quick),
    /// A model of hardware, on a host of this kind.
    Model(HostKind),
    /// The interpreter.
    Soft,
}

/// What a modelled host does.
#[derive(Clone, Copy, Debug)]
struct HostKind {
    /// It shadows page tables.
    shadows: bool,
    /// It is asked to take frames away, before vCPUs are kicked.
    notifies: bool,
}

impl HostKind {
    /// One of the four, by the seed.
    fn by(seed: u64) -> HostKind {
        HostKind { shadows: seed & 1 != 0, notifies: seed & 2 != 0 }
    }
}

impl Plan {
    /// Chooses as the command line has it. `auto` is KVM where it works.
    ///
    /// # Errors
    ///
    /// When KVM was asked for and cannot be used, or the backend does not go with `--deterministic` or `--check-guest-tlb`.
    pub fn make(args: &RunArgs) -> Result<Plan, RunError> {
        let backend = args.backend;
        let soft = |why| Ok(Plan { chosen: Chosen::Soft, why });
        if args.check_guest_tlb.is_some() {
            let why = || "backend=soft: --check-guest-tlb judges what is interpreted".to_owned();
            return match backend {
                cli::Backend::Kvm | cli::Backend::Model => Err(RunError::CheckNeedsSoft),
                cli::Backend::Auto => soft(Some(why())),
                cli::Backend::Soft => soft(None),
            };
        }
        match (backend, args.deterministic) {
            (cli::Backend::Kvm, true) => return Err(RunError::NotDeterministic),
            (cli::Backend::Model, false) => return Err(RunError::ModelNeedsSimulation),
            (cli::Backend::Model, true) => {
                return Ok(Plan { chosen: Chosen::Model(HostKind::by(args.seed)), why: None });
            }
            (_, true) => return soft(None),
            (_, false) => {}
        }
        match (backend, (backend != cli::Backend::Soft).then(|| open_kvm(args))) {
            (cli::Backend::Auto, Some(Err(error))) => soft(Some(format!("backend=soft: {error}"))),
            (_, Some(opened)) => {
                let (host, probe) = opened?;
                let why = (backend == cli::Backend::Auto).then(|| reason(&probe));
                Ok(Plan { chosen: Chosen::Kvm(host, probe), why })
            }
            (_, None) => soft(None),
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
            Chosen::Model(_) | Chosen::Soft => Ok(0),
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
    /// Hardware.
    Hardware {
        /// Which.
        silicon: Silicon,
        /// What interprets the guest's kernel, one for each vCPU, if that is not to run natively.
        supervisors: Option<Vec<Soft>>,
    },
    /// The interpreter, one for each vCPU.
    Soft(Vec<Soft>),
}

/// Hardware, and its vCPUs in order.
pub enum Silicon {
    /// KVM's.
    Kvm {
        /// The VM.
        vm: Arc<KvmVm>,
        /// Its vCPUs.
        vcpus: Vec<KvmVcpu>,
        /// What its KVM is like.
        probe: Quick,
    },
    /// A model.
    Model(Model),
}

/// Modelled hardware.
pub struct Model {
    vcpus: Vec<ModelVcpu>,
    host: ModelHost,
    kind: HostKind,
}

impl Silicon {
    fn kicks(&self) -> Vec<Box<dyn Kick>> {
        match self {
            Silicon::Kvm { vcpus, .. } => {
                vcpus.iter().map(|kvm| -> Box<dyn Kick> { Box::new(kvm.kicker()) }).collect()
            }
            Silicon::Model(model) => {
                model.vcpus.iter().map(|vcpu| -> Box<dyn Kick> { Box::new(vcpu.attention()) }).collect()
            }
        }
    }
}

impl Runner {
    /// Sets up what `plan` needs. `interpret`: hardware runs the guest's user code alone.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn new(plan: Plan, pool: &Arc<Pool>, vcpus: u32, interpret: bool) -> Result<Runner, RunError> {
        let interpreters = || (0..vcpus).map(|_| Soft::default()).collect();
        let silicon = match plan.chosen {
            Chosen::Soft => return Ok(Runner::Soft(interpreters())),
            Chosen::Model(kind) => {
                let machine = umbra_mmu::Machine::new(pool.region());
                let (vcpus, host) = ModelVcpu::create(vcpus, &machine, kind.shadows);
                Silicon::Model(Model { vcpus, host, kind })
            }
            Chosen::Kvm(host, probe) => {
                let options = Options { vcpus, ..Options::default() };
                let vm = Arc::new(KvmVm::new(&host, Arc::clone(pool), options)?);
                let vcpus = (0..vcpus).map(|id| vm.create_vcpu(id)).collect::<Result<_, _>>()?;
                Silicon::Kvm { vm, vcpus, probe }
            }
        };
        Ok(Runner::Hardware { silicon, supervisors: interpret.then(interpreters) })
    }

    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Runner::Hardware { silicon: Silicon::Kvm { .. }, .. } => "kvm",
            Runner::Hardware { silicon: Silicon::Model(_), .. } => "model",
            Runner::Soft(_) => "soft",
        }
    }

    /// True where the guest's kernel runs at CPL 3.
    pub fn is_native(&self) -> bool {
        matches!(self, Runner::Hardware { supervisors: None, .. })
    }

    /// The VM, where vCPUs are KVM's.
    pub fn vm(&self) -> Option<Arc<KvmVm>> {
        match self {
            Runner::Hardware { silicon: Silicon::Kvm { vm, .. }, .. } => Some(Arc::clone(vm)),
            _ => None,
        }
    }

    /// Frames at the start of the machine that are the firmware's.
    pub fn reserved_frames(&self) -> u32 {
        self.vm().map_or(0, |vm| vm.first_free_frame().0)
    }

    /// What every root must hold in the firmware's slot.
    pub fn firmware_entry(&self) -> u64 {
        self.vm().map_or(0, |vm| vm.root_entry().1)
    }

    /// How each vCPU is kicked, in order.
    pub fn kicks(&self) -> Vec<Box<dyn Kick>> {
        match self {
            Runner::Hardware { silicon, supervisors: None } => silicon.kicks(),
            Runner::Hardware { silicon, supervisors: Some(softs) } => {
                let both =
                    |(kick, soft): (_, &Soft)| -> Box<dyn Kick> { Box::new(Both(kick, soft.attention())) };
                silicon.kicks().into_iter().zip(softs).map(both).collect()
            }
            Runner::Soft(softs) => {
                softs.iter().map(|soft| -> Box<dyn Kick> { Box::new(soft.attention()) }).collect()
            }
        }
    }

    /// How the host takes frames away from the vCPUs; `None` where it does not know of all their translations.
    pub fn notifier(&self) -> Option<Box<dyn DropsRemoved>> {
        match self {
            Runner::Hardware { silicon: Silicon::Kvm { vm, .. }, supervisors: None } => {
                Some(Box::new(Notifier::new(Arc::clone(vm))))
            }
            Runner::Hardware { silicon: Silicon::Model(model), supervisors: None } => {
                Some(Box::new(model.host.clone()))
            }
            Runner::Hardware { supervisors: Some(_), .. } | Runner::Soft(_) => None,
        }
    }

    /// Tells `ledger` how to shoot down, and gives that a name.
    pub fn choose_shootdown(&self, wanted: cli::Shootdown, ledger: &Coherence) -> &'static str {
        const KICK: &str = "kick";
        const NOTIFIER: &str = "notifier";
        let Runner::Hardware { silicon, supervisors: None } = self else {
            if wanted == cli::Shootdown::Notifier {
                log::warn!("--shootdown notifier: a vCPU with a software TLB is kicked all the same");
            }
            return KICK;
        };
        match (wanted, silicon) {
            (cli::Shootdown::Kick, _) => KICK,
            (cli::Shootdown::Auto, Silicon::Kvm { probe, .. }) => {
                ledger.notify_up_to(probe.frames_a_kick);
                if probe.frames_a_kick > 0 { NOTIFIER } else { KICK }
            }
            (cli::Shootdown::Auto, Silicon::Model(model)) => {
                ledger.prefer_notifier(model.kind.notifies);
                if model.kind.notifies { NOTIFIER } else { KICK }
            }
            (cli::Shootdown::Notifier, _) => {
                if let Silicon::Kvm { probe, .. } = silicon
                    && !probe.notifier_is_complete()
                {
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
            Runner::Hardware { supervisors, .. } => {
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
        let (silicon, supervisors) = match self {
            Runner::Hardware { silicon, supervisors } => (silicon, supervisors),
            Runner::Soft(softs) => {
                return softs.into_iter().map(|soft| -> Box<dyn Backend> { Box::new(soft) }).collect();
            }
        };
        match silicon {
            Silicon::Kvm { vm, vcpus, probe } => {
                let shadows = probe.translation != Translation::FlushSuffices;
                let notifier = shadows.then(|| -> Box<dyn DropsRemoved> { Box::new(Notifier::new(vm)) });
                natives(vcpus, Flusher::new(notifier, mmu), supervisors)
            }
            Silicon::Model(Model { vcpus, host, kind }) => {
                let notifier = kind.shadows.then(|| -> Box<dyn DropsRemoved> { Box::new(host) });
                natives(vcpus, Flusher::new(notifier, mmu), supervisors)
            }
        }
    }
}

fn natives<H: Hardware + 'static>(
    vcpus: Vec<H>,
    flusher: Flusher,
    supervisors: Option<Vec<Soft>>,
) -> Vec<Box<dyn Backend>> {
    let (flusher, mut supervisors) = (Arc::new(flusher), supervisors.unwrap_or_default().into_iter());
    let native =
        |vcpu| -> Box<dyn Backend> { Box::new(Native::new(vcpu, Arc::clone(&flusher), supervisors.next())) };
    vcpus.into_iter().map(native).collect()
}
