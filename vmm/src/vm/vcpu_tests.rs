//! What a vCPU does with what comes from others: no guest code runs here.

use std::io;

use umbra_mmu::{Config, Gpa, Machine, NoVcpus, TlbKind};

use super::*;
use crate::board::{Board, BoardConfig, MEMORY_BYTES_MIN, MemoryMap};
use crate::interp::Width;
use crate::vm::control::News;

const PAGES: u32 = 64;
const CODE: u32 = 0x2000;
/// What the first vCPU writes to its local APIC's interrupt command: INIT, start-up at 10000, NMI, vector 50.
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4610;
const NMI: u32 = 0x4400;
const VECTOR: u32 = 0x4050;

/// A machine whose first vCPU begins in flat code.
struct Flat;

impl PowerOn for Flat {
    fn power_on(&self, _: &Mmu, _: &Devices, _: &Ending) -> Result<CpuState, End> {
        Ok(CpuState::flat_protected_mode(CODE))
    }
}

/// The second of two vCPUs, which runs flat code with interrupts on.
fn second() -> Core {
    let memory = MemoryMap::new(MEMORY_BYTES_MIN).expect("a map");
    let config = BoardConfig { memory, vcpus: 2, serial: Box::new(io::sink()), epoch_seconds: 0 };
    let devices = Arc::new(Devices::new(Board::new(config).expect("a board")).expect("a timer"));
    let config = Config { shadow_pages_max: 64, roots_max: 8, vcpus: 2, ..Config::of_pages(PAGES) };
    let machine = Machine::anonymous(PAGES + config.table_frames_max());
    let mmu = Arc::new(Mmu::new(machine, config, Box::new(NoVcpus)));
    let mut cpu = CpuState::flat_protected_mode(CODE);
    cpu.eflags |= eflags::IF;
    let vcpu = mmu.soft_vcpu(1, TlbKind::Sized);
    let around = Surroundings {
        mmu,
        ending: Ending::new(Arc::clone(&devices)),
        requests: Arc::new(Requests::new(2)),
        stops: Arc::new(Stops::new(Arc::clone(&devices), Arc::new(News::default()))),
        devices,
        power: Arc::new(Flat),
        watches: Arc::default(),
        threads: (0..2).map(|_| AtomicI32::new(0)).collect(),
    };
    let core = Core::new(Some(cpu), vcpu, around);
    write_apic(&core, 1, 0xf0, 0x1ff);
    core
}

fn write_apic(core: &Core, by: usize, register: u64, value: u32) {
    core.devices.with(|board, now| {
        board.mmio_write(now, by, Gpa(0xfee0_0000 + register), Width::B4, value.into());
    });
}

/// The first vCPU sends the second one `command`.
fn send(core: &Core, command: u32) {
    write_apic(core, 0, 0x310, 1 << 24);
    write_apic(core, 0, 0x300, command);
}

fn code_base(core: &Core) -> u32 {
    core.cpu.segment(crate::cpu::Seg::Cs).base
}

#[test]
fn an_interrupt_that_came_before_an_init_is_gone_with_what_it_interrupted() {
    let mut core = second();
    send(&core, VECTOR);
    send(&core, INIT);
    send(&core, STARTUP);
    assert!(core.heed_board().is_none());
    assert_eq!((code_base(&core), core.cpu.eip, core.stats.interrupts), (0x1_0000, 0, 0));
    core.cpu.eflags |= eflags::IF;
    assert!(core.heed_board().is_none());
    assert_eq!((core.cpu.eip, core.stats.interrupts), (0, 0), "nor does it come later");
}

#[test]
fn an_nmi_that_comes_after_an_init_waits_for_the_start_up() {
    let mut core = second();
    send(&core, INIT);
    send(&core, NMI);
    assert!(core.heed_board().is_none());
    assert!(core.waits_for_startup && core.waiting.nmi && core.stats.interrupts == 0);
    send(&core, STARTUP);
    assert!(core.heed_board().is_none());
    assert_eq!(core.stats.interrupts, 1);
}

#[test]
fn a_start_up_for_a_cpu_that_runs_means_nothing() {
    let mut core = second();
    send(&core, STARTUP);
    assert!(core.heed_board().is_none());
    assert_eq!((code_base(&core), core.cpu.eip), (0, CODE));
}

#[test]
fn a_reset_leaves_nothing_of_a_cpu_and_has_the_others_wait_for_a_start_up() {
    let mut core = second();
    core.cpu.gpr[3] = 7;
    core.waiting.nmi = true;
    core.fpu_in_hardware = true;
    core.forget();
    let mut reset = CpuState::reset(1);
    reset.msrs.tsc_offset = core.cpu.msrs.tsc_offset;
    assert_eq!(core.cpu, reset);
    assert!(core.waits_for_startup && !core.waiting.nmi && !core.fpu_in_hardware);
    let tsc = core.devices.now().0.wrapping_add(core.cpu.msrs.tsc_offset);
    assert!(tsc < 10_000_000_000, "the time-stamp counter begins anew: {tsc}");
}
