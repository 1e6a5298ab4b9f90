//! The rules of coherence that stand in the VMM, each left out: something must notice.
//!
//! Story: the vCPU is a [`Core`] as on KVM, entered and flushed by the same code. In KVM's place is a double that remembers every
//! translation it has walked, until it is told to forget; and in the host's a double that does the same, of tables that KVM would
//! shadow. A scene takes a page away and looks whether anything still leads to its frame.
//!
//! The other rules are left out by `mmu/tests/omissions.rs`.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use umbra_mmu::coherence::Removals;
use umbra_mmu::discard::Discard;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::PageState;
use umbra_mmu::{
    Access, Config, Gfn, Gva, Machine, Mfn, Mmu, Mpa, NoVcpus, Outcome, Rule, Rules, Shootdown, TlbKind,
};

use super::devices::Devices;
use super::ending::{End, Ending};
use super::flush::{DropsRemoved, Flusher, Hardware};
use super::power::PowerOn;
use super::requests::Requests;
use super::stops::Stops;
use super::tables::DescriptorTables;
use super::vcpu::{Core, Surroundings};
use crate::board::{Board, BoardConfig, MEMORY_BYTES_MIN, MemoryMap};
use crate::cpu::CpuState;
use crate::interp::{Bus, Width};
use crate::kvm::KvmError;
use crate::vm::control::News;

const PAGES: u32 = 64;
const PAGE: u32 = 40;
const AT: Gva = Gva(PAGE << 12);
/// Present, and the address, in an entry of any level.
const PRESENT: u64 = 1;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

type Translations = Arc<Mutex<HashMap<u32, Mfn>>>;

/// Remembers where each page is, and walks where it does not know.
struct Double {
    machine: Machine,
    known: Translations,
    /// A flush does nothing: what it knows is of KVM's own tables.
    shadowed: bool,
}

impl Double {
    /// The frame that an access at `gva` reaches.
    fn reach(&self, root: Mpa, gva: Gva) -> Option<Mfn> {
        let page = gva.0 >> 12;
        let mut known = self.known.lock().expect("nobody panics with it");
        if let Some(mfn) = known.get(&page) {
            return Some(*mfn);
        }
        let walk = [39, 30, 21, 12].iter().try_fold(root.0, |table, shift| {
            let index = u64::from(gva.0) >> shift & 511;
            let entry = self.machine.word64(Mpa(table + index * 8)).load(Ordering::Acquire);
            (entry & PRESENT != 0).then_some(entry & ADDRESS)
        });
        let mfn = Mpa(walk?).mfn();
        known.insert(page, mfn);
        Some(mfn)
    }
}

impl Hardware for Double {
    fn flush(&mut self, _: &CpuState, _: Mpa) -> Result<bool, KvmError> {
        if !self.shadowed {
            self.known.lock().expect("nobody panics with it").clear();
        }
        Ok(false)
    }
}

/// Drops translations of the frames that it is told.
struct Host(Translations);

impl DropsRemoved for Host {
    fn drop_removed(&self, removed: &Removals) -> Result<(), KvmError> {
        let gone = |mfn: &Mfn| removed.all || removed.pages.contains(mfn);
        self.0.lock().expect("nobody panics with it").retain(|_, mfn| !gone(mfn));
        Ok(())
    }
}

/// Nobody resets these machines.
struct Never;

impl PowerOn for Never {
    fn power_on(&self, _: &Mmu, _: &Devices, _: &Ending) -> Result<CpuState, End> {
        Err(End::Quit)
    }
}

fn core(mmu: Arc<Mmu>, tlb: Option<TlbKind>) -> Core {
    let memory = MemoryMap::new(MEMORY_BYTES_MIN).expect("a map");
    let config = BoardConfig { memory, vcpus: 1, serial: Box::new(io::sink()), epoch_seconds: 0 };
    let devices = Arc::new(Devices::new(Board::new(config).expect("a board")).expect("a timer"));
    let mut vcpu = mmu.vcpu(0);
    tlb.into_iter().for_each(|kind| vcpu.add_tlb(kind));
    let around = Surroundings {
        mmu,
        ending: Ending::new(Arc::clone(&devices)),
        requests: Arc::new(Requests::new(1)),
        stops: Arc::new(Stops::new(Arc::clone(&devices), Arc::new(News::default()))),
        devices,
        power: Arc::new(Never),
        watches: Arc::default(),
        threads: (0..1).map(|_| AtomicI32::new(0)).collect(),
    };
    Core::new(Some(CpuState::flat_protected_mode(0x2000)), vcpu, around)
}

/// A vCPU on the double, and how it is flushed.
struct World {
    core: Core,
    hardware: Double,
    flusher: Flusher,
}

impl World {
    fn new(rules: Rules, tlb: Option<TlbKind>, shadowed: bool) -> World {
        let config = Config { shadow_pages_max: 64, roots_max: 8, ..Config::of_pages(PAGES) };
        let machine = Machine::anonymous(PAGES + config.table_frames_max());
        let mmu = Arc::new(Mmu::new(machine.clone(), config, Box::new(NoVcpus)).with_rules(rules));
        let hardware = Double { machine, known: Translations::default(), shadowed };
        let host = shadowed.then(|| Box::new(Host(hardware.known.clone())) as Box<dyn DropsRemoved>);
        let flusher = Flusher::by(host, &mmu);
        World { core: core(mmu, tlb), hardware, flusher }
    }

    fn mmu(&self) -> &Mmu {
        &self.core.mmu
    }

    /// Enters as `Native` does, and stays inside.
    fn enter(&mut self) -> Mpa {
        let user = self.core.cpu.cpl == 3;
        let root = self.core.mmu.root_address(&self.core.mmu_vcpu, user).expect("a root");
        if self.core.enter_hardware() {
            let kicked =
                self.flusher.flush(&mut self.core, &mut self.hardware, root).expect("no host refuses");
            assert!(!kicked);
        }
        root
    }

    /// The guest's access to the page in the hardware.
    fn touch(&mut self) -> Mfn {
        for _ in 0..4 {
            let root = self.enter();
            let reached = self.hardware.reach(root, AT);
            self.core.mmu.leave(&self.core.mmu_vcpu);
            if let Some(mfn) = reached {
                return mfn;
            }
            let outcome = self.core.mmu.fault_sleeping(&self.core.mmu_vcpu, AT, Access::write(false));
            assert_eq!(outcome, Ok(Outcome::Fixed));
        }
        panic!("no access to {AT}");
    }

    /// Has an instruction store to the page by interpreting it.
    fn interpret(&mut self) -> Option<String> {
        let (stored, after) =
            self.core.with_bus(None, |_, bus| bus.write(AT, Width::B4, 1, Access::write(false)));
        assert!(stored.is_ok() || after.violation.is_some(), "{stored:?}");
        after.violation.map(|violation| violation.to_string())
    }

    /// Another page has its frame then.
    fn take_away(&self) {
        self.mmu().discard(None, PAGE..PAGE + 1, Discard::Zero, May::Sleep).expect("nothing holds it");
        let other = Gva((PAGE + 1) << 12);
        let outcome = self.mmu().fault_sleeping(&self.core.mmu_vcpu, other, Access::write(false));
        assert_eq!(outcome, Ok(Outcome::Fixed));
    }

    /// What is wrong with the hardware's reaching `mfn`, now that the page has been taken away and touched again.
    fn judge(&self, mfn: Mfn) -> Option<String> {
        let now = self.mmu().p2m().lookup(Gfn(PAGE));
        (now != PageState::Resident(mfn))
            .then(|| format!("hardware reaches {mfn}, where a page was; it is {now:?}"))
    }
}

/// A page that was taken away between two stays in the guest.
fn taken_away(rules: Rules, shadowed: bool) -> Option<String> {
    let mut world = World::new(rules, None, shadowed);
    let first = world.touch();
    assert_eq!(world.judge(first), None);
    world.take_away();
    let second = world.touch();
    world.judge(second)
}

/// The hardware has flushed for both: the software TLB has not what was there before.
fn interpreted_after_the_flush(rules: Rules) -> Option<String> {
    let mut world = World::new(rules, Some(TlbKind::Sticky), false);
    assert_eq!(world.interpret(), None);
    world.take_away();
    world.enter();
    world.core.mmu.leave(&world.core.mmu_vcpu);
    world.interpret()
}

/// The software TLB has flushed for both: the hardware has not what was there before.
fn run_after_the_flush(rules: Rules) -> Option<String> {
    let mut world = World::new(rules, Some(TlbKind::Sticky), false);
    world.touch();
    world.take_away();
    assert_eq!(world.interpret(), None);
    let mfn = world.touch();
    world.judge(mfn)
}

/// Leaves the guest in the place of the second vCPU's thread.
struct Leaves(Arc<OnceLock<Weak<Mmu>>>, Arc<AtomicBool>);

impl Shootdown for Leaves {
    fn kick(&self, vcpu: u32) {
        self.1.store(true, Ordering::SeqCst);
        self.0.get().and_then(Weak::upgrade).iter().for_each(|mmu| mmu.coherence().leave_guest(vcpu));
    }
}

/// A vCPU inside, with a copy of descriptors that another one stores to.
fn descriptors_stored_to(rules: Rules) -> Option<String> {
    let (back, left) = (Arc::new(OnceLock::new()), Arc::new(AtomicBool::new(false)));
    let config = Config { shadow_pages_max: 64, roots_max: 8, vcpus: 2, ..Config::of_pages(PAGES) };
    let machine = Machine::anonymous(PAGES + config.table_frames_max());
    let leaves = Leaves(back.clone(), left.clone());
    let mmu = Arc::new(Mmu::new(machine, config, Box::new(leaves)).with_rules(rules));
    back.set(Arc::downgrade(&mmu)).expect("set once");
    mmu.coherence().enter_guest(1);
    DescriptorTables::new(Arc::default()).stored_to(&mmu, 0);
    (!left.load(Ordering::SeqCst))
        .then(|| "a vCPU runs on with descriptors from before a store to them".into())
}

#[test]
fn every_rule_of_the_vmm_that_is_left_out_is_missed() {
    type Scene = fn(Rules) -> Option<String>;
    let scenes: [(Rule, Scene); 5] = [
        (Rule::FirmwareFlush, |rules| taken_away(rules, false)),
        (Rule::NotifierFlush, |rules| taken_away(rules, true)),
        (Rule::FlushBesideHardware, interpreted_after_the_flush),
        (Rule::HardwareOwesFlush, run_after_the_flush),
        (Rule::ShootdownAtDescriptors, descriptors_stored_to),
    ];
    for (rule, play) in scenes {
        assert_eq!(
            play(Rules::default()),
            None,
            "{}: its scene goes wrong with every rule in force",
            rule.name()
        );
        let why = play(Rules::all_but(rule));
        println!("OMIT {:30} scene: {}", rule.name(), why.as_deref().unwrap_or("NOT MISSED"));
        assert!(why.is_some(), "nothing misses {}", rule.name());
    }
}
