//! The rules of coherence that stand in the VMM, each left out: something must notice.
//!
//! Story: the vCPU is run by [`Native`] as on KVM, entered and flushed by the same code. In KVM's place is the model of simulations
//! ([`ModelVcpu`]), which keeps every translation it has walked until it is told to forget. A scene takes a page away and stores to it.
//!
//! The other rules are left out by `mmu/tests/omissions.rs`, and these in simulations too (`tests/e2e/seeds.rs`).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use umbra_mmu::discard::Discard;
use umbra_mmu::invalidation::May;
use umbra_mmu::{Access, Config, Gpa, Gva, Machine, Mmu, NoVcpus, Outcome, Rule, Rules, Shootdown, TlbKind};

use super::devices::Devices;
use super::ending::{End, Ending};
use super::flush::Flusher;
use super::hardware::DropsRemoved;
use super::model::ModelVcpu;
use super::native::Native;
use super::power::PowerOn;
use super::requests::Requests;
use super::stops::Stops;
use super::tables::DescriptorTables;
use super::vcpu::{Backend, Core, Surroundings};
use crate::board::{Board, BoardConfig, MEMORY_BYTES_MIN, MemoryMap};
use crate::cpu::CpuState;
use crate::interp::{Bus, Width};
use crate::vm::control::News;

const PAGES: u32 = 64;
const PAGE: u32 = 40;
const AT: Gva = Gva(PAGE << 12);
/// MOV byte [`AT`], 1; HLT. And HLT alone.
const STORE: (u32, [u8; 8]) = (0x2000, [0xc6, 0x05, 0, (AT.0 >> 8) as u8, (AT.0 >> 16) as u8, 0, 1, 0xf4]);
const NOTHING: u32 = STORE.0 + 7;
/// Entries that it takes at most.
const ENTRIES_MAX: u32 = 1000;

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

/// A vCPU on the model, and what runs it.
struct World {
    core: Core,
    native: Native<ModelVcpu>,
}

impl World {
    fn new(rules: Rules, tlb: Option<TlbKind>, shadowed: bool) -> World {
        let config = Config { shadow_pages_max: 64, roots_max: 8, ..Config::of_pages(PAGES) };
        let machine = Machine::anonymous(PAGES + config.table_frames_max());
        let mmu = Arc::new(Mmu::new(machine.clone(), config, Box::new(NoVcpus)).with_rules(rules));
        let (mut vcpus, host) = ModelVcpu::create(1, &machine, shadowed);
        let host = shadowed.then(|| Box::new(host) as Box<dyn DropsRemoved>);
        let flusher = Arc::new(Flusher::new(host, &mmu));
        let core = core(mmu, tlb);
        let code = core.mmu.write_bytes_sleeping(None, core.mmu_vcpu.window(), Gpa(STORE.0.into()), &STORE.1);
        code.expect("memory");
        World { core, native: Native::new(vcpus.remove(0), flusher, None) }
    }

    fn mmu(&self) -> &Mmu {
        &self.core.mmu
    }

    /// Has hardware run the code at `eip` up to its HLT; what is wrong with where that leads.
    fn run(&mut self, eip: u32) -> Option<String> {
        self.core.cpu.eip = eip;
        for _ in 0..ENTRIES_MAX {
            if self.core.cpu.halted {
                break;
            }
            assert!(self.native.run(&mut self.core).is_none(), "nothing else ends it");
            if let Some(end) = self.core.take_end() {
                let End::Incoherent(violation) = end else { panic!("{end:?}") };
                return Some(violation.to_string());
            }
        }
        assert!(std::mem::take(&mut self.core.cpu.halted), "it does not come to its HLT");
        None
    }

    /// A store to the page by hardware, which must be where the page is.
    fn touch(&mut self) -> Option<String> {
        let wrong = self.run(STORE.0);
        if wrong.is_none() {
            let stored = self.mmu().load(self.core.mmu_vcpu.window(), Gpa(AT.0.into()), Width::B1.into());
            assert_eq!(stored, Ok(1), "the store has gone elsewhere, and nobody has said so");
        }
        wrong
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
}

/// A page that was taken away between two stays in the guest.
fn taken_away(rules: Rules, shadowed: bool) -> Option<String> {
    let mut world = World::new(rules, None, shadowed);
    assert_eq!(world.touch(), None);
    world.take_away();
    world.touch()
}

/// The hardware has flushed for both: the software TLB has not what was there before.
fn interpreted_after_the_flush(rules: Rules) -> Option<String> {
    let mut world = World::new(rules, Some(TlbKind::Sticky), false);
    assert_eq!(world.interpret(), None);
    world.take_away();
    assert_eq!(world.run(NOTHING), None);
    world.interpret()
}

/// The software TLB has flushed for both: the hardware has not what was there before.
fn run_after_the_flush(rules: Rules) -> Option<String> {
    let mut world = World::new(rules, Some(TlbKind::Sticky), false);
    assert_eq!(world.touch(), None);
    world.take_away();
    assert_eq!(world.interpret(), None);
    world.touch()
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
