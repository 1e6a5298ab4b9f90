//! Tests of the guest's bus over a small MMU and a board: no KVM.

use std::io;
use std::time::{Duration, Instant};

use umbra_mmu::discard::Discard;
use umbra_mmu::invalidation::May;
use umbra_mmu::{AccessKind, Config, Machine, Shortage, TlbKind, coherence::NoVcpus};

use super::*;
use crate::board::{Board, BoardConfig, MemoryMap};
use crate::cpu::{cr0, cr4};
use crate::vm::kick::Kick;

/// Guest pages.
const PAGES: u32 = 64;
const WRITE: Access = Access { kind: AccessKind::Write, user: false };
const READ: Access = Access { kind: AccessKind::Read, user: false };

/// A vCPU's software TLB, if it has one.
type Tlb = Option<TlbKind>;
/// Every bus there is.
const TLBS: [Tlb; 3] = [None, Some(TlbKind::Sized), Some(TlbKind::Sticky)];

struct Rig {
    mmu: Mmu,
    vcpu: Vcpu,
    devices: Devices,
}

impl Rig {
    fn with_frames(tlb: Tlb, frames: u32) -> Rig {
        Rig::with(tlb, frames, 1)
    }

    /// Of so many vCPUs, of which all but the first are outside.
    fn with(tlb: Tlb, frames: u32, vcpus: usize) -> Rig {
        let memory = MemoryMap::new(2 << 20).expect("a map");
        let board = BoardConfig { memory, vcpus, serial: Box::new(io::sink()), epoch_seconds: 0 };
        let devices = Devices::new(Board::new(board).expect("a board")).expect("a timer");
        let of_pages = Config::of_pages(PAGES);
        let config = Config { shadow_pages_max: 64, roots_max: 8, vcpus: vcpus as u32, ..of_pages };
        let mmu = Mmu::new(Machine::anonymous(frames), config, Box::new(NoVcpus));
        let vcpu = match tlb {
            Some(kind) => mmu.soft_vcpu(0, kind),
            None => mmu.vcpu(0),
        };
        Rig { mmu, vcpu, devices }
    }

    fn new(tlb: Tlb) -> Rig {
        Rig::with_frames(tlb, 256)
    }

    /// Two-level paging from page 1 by the table in page 2: linear page n is what `pages` says, in order.
    fn paged(tlb: Tlb, pages: &[u32]) -> Rig {
        Rig::new(tlb).with_pages(pages)
    }

    fn with_pages(mut self, pages: &[u32]) -> Rig {
        let rig = &mut self;
        rig.poke(0x1000, 0x2000 | 7);
        for (index, gpte) in pages.iter().enumerate() {
            rig.poke(0x2000 + 4 * index as u32, *gpte);
        }
        let cpu = paging_cpu(0x1000, 0);
        rig.bus().set_paging(&cpu, true).expect("no PDPTEs to refuse");
        self
    }

    fn bus(&mut self) -> GuestBus<'_> {
        GuestBus::new(&self.mmu, &mut self.vcpu, &self.devices, None)
    }

    fn poke(&mut self, gpa: u32, value: u32) {
        let stored = self.mmu.store(self.vcpu.window(), Gpa(gpa.into()), umbra_mmu::Width::B4, value.into());
        stored.expect("memory");
    }

    fn peek(&mut self, gpa: u32) -> u32 {
        let loaded = self.mmu.load(self.vcpu.window(), Gpa(gpa.into()), umbra_mmu::Width::B4);
        loaded.expect("memory") as u32
    }
}

fn paging_cpu(cr3: u32, cr4: u32) -> CpuState {
    let flat = CpuState::flat_protected_mode(0);
    CpuState { cr0: flat.cr0 | cr0::PG, cr3, cr4, ..flat }
}

#[test]
fn a_store_over_two_pages_lands_in_the_frames_of_both() {
    for tlb in TLBS {
        let mut rig = Rig::paged(tlb, &[0x5003, 0x3003]);
        rig.bus().write(Gva(0xffd), Width::B4, 0x4433_2211, WRITE).expect("mapped");
        assert_eq!(rig.peek(0x5ffc) >> 8, 0x33_2211);
        assert_eq!(rig.peek(0x3000), 0x44);
        assert_eq!(rig.bus().read(Gva(0xffd), Width::B4, READ), Ok(0x4433_2211));
        let old = rig.bus().update(Gva(0xffd), Width::B4, false, &mut |old| old + 1);
        assert_eq!(old, Ok(0x4433_2211));
        assert_eq!(rig.bus().read(Gva(0xffd), Width::B4, READ), Ok(0x4433_2212));
    }
}

/// By the bus, where no aligned word holds it.
#[test]
fn a_locked_access_is_made_wherever_it_lies() {
    for tlb in TLBS {
        // Two pages, one at two addresses, and one that is no memory.
        let pages = [0x5003, 0x3003, 0x7003, 0x7003, PAGES << 12 | 3];
        let mut rig = Rig::with(tlb, 256, 2).with_pages(&pages);
        let mut add = |gva: u32, width: Width, before: u64| {
            let mut bus = rig.bus();
            bus.write(Gva(gva), width, before, WRITE).expect("mapped");
            let old = bus.update_locked(Gva(gva), width, false, &mut |old| old + 0x0101);
            (old.expect("mapped"), bus.read(Gva(gva), width, READ).expect("mapped"))
        };
        for gva in [0x8, 0x6, 0x3e, 0xffd, 0xfff, 0x2ffe] {
            assert_eq!(add(gva, Width::B4, 0x1122_33ff), (0x1122_33ff, 0x1122_3500), "{tlb:?}: {gva:#x}");
        }
        for gva in [0x8, 0x3c, 0xff9, 0xfff, 0x2ffc] {
            let (old, new) = (0x1122_3344_ffff_ffff, 0x1122_3345_0000_0100);
            assert_eq!(add(gva, Width::B8, old), (old, new), "{tlb:?}: {gva:#x}");
        }
        assert_eq!(add(0x3ffe, Width::B4, 0).0, 0xffff_0000, "{tlb:?}: what is no memory reads as ones");
    }
}

#[test]
fn a_locked_access_whose_second_page_faults_changes_nothing_and_leaves_the_bus_free() {
    for tlb in TLBS {
        let mut rig = Rig::with(tlb, 256, 2).with_pages(&[0x5003, 0]);
        let refused = rig.bus().update_locked(Gva(0xffe), Width::B4, false, &mut |old| old + 1);
        let Err(BusError::Exception(fault)) = refused else { panic!("{refused:?}") };
        assert_eq!((fault.cr2, fault.error), (Some(0x1000), Some(2)));
        assert_eq!(rig.peek(0x5ffc), 0);
        drop(rig.mmu.coherence().lock_bus(0));
    }
}

#[test]
fn a_store_whose_second_page_faults_changes_nothing() {
    for tlb in TLBS {
        let mut rig = Rig::paged(tlb, &[0x5003, 0]);
        let refused = rig.bus().write(Gva(0xffe), Width::B4, u64::MAX, WRITE);
        let Err(BusError::Exception(fault)) = refused else { panic!("{refused:?}") };
        assert_eq!((fault.cr2, fault.error), (Some(0x1000), Some(2)));
        assert_eq!(rig.peek(0x5ffc), 0);
    }
}

#[test]
fn a_store_whose_second_page_finds_no_frame_changes_nothing_and_says_which() {
    for tlb in TLBS {
        let mut rig = Rig::with_frames(tlb, 2);
        rig.poke(0x5000, 1);
        rig.poke(0x0ffc, 0x1234_5678);
        let mut bus = rig.bus();
        assert_eq!(bus.write(Gva(0xffe), Width::B4, 0, WRITE), Err(BusError::Again));
        let shortage = bus.into_aftermath().shortage;
        assert!(matches!(shortage, Some(Shortage::Frames { gfn: Gfn(1), .. })), "{shortage:?}");
        assert_eq!(rig.peek(0x0ffc), 0x1234_5678);
    }
}

#[test]
fn an_access_at_the_end_of_the_address_space_wraps_to_page_zero() {
    for tlb in TLBS {
        let mut rig = Rig::new(tlb);
        rig.poke(0, 0xddcc_bbaa);
        // Nothing is there below 4 GiB: ones; then memory.
        assert_eq!(rig.bus().read(Gva(0xffff_fffe), Width::B4, READ), Ok(0xbbaa_ffff));
    }
}

#[test]
fn a_local_apic_that_is_switched_off_is_gone_and_it_cannot_be_moved() {
    const VERSION: Gva = Gva(0xfee0_0030);
    let mut rig = Rig::new(None);
    let mut version = |base| {
        let mut bus = rig.bus();
        (bus.set_apic_base(base), bus.read(VERSION, Width::B4, READ).expect("no fault"))
    };
    let on = version(0xfee0_0900);
    assert!(on.0 && on.1 != 0xffff_ffff, "{on:x?}");
    assert_eq!(version(0xfee0_0100), (true, 0xffff_ffff), "nobody answers");
    assert_eq!(version(0xfed0_0900), (false, 0xffff_ffff), "another address");
    assert_eq!(version(0xfee0_0900), on);
}

#[test]
fn what_no_memory_and_no_device_answers_reads_as_ones() {
    for tlb in TLBS {
        let mut rig = Rig::new(tlb);
        assert_eq!(rig.bus().read(Gva(PAGES << 12), Width::B4, READ), Ok(0xffff_ffff));
        rig.bus().write(Gva(PAGES << 12), Width::B4, 0, WRITE).expect("dropped");
        assert_eq!(rig.bus().fetch(Gva(PAGES << 12), false, &mut [0; 4]), Ok(4));
    }
}

#[test]
fn device_pages_reach_the_board_also_by_read_modify_write() {
    for tlb in TLBS {
        const TASK_PRIORITY: Gva = Gva(0xfee0_0080);
        let mut rig = Rig::new(tlb);
        rig.bus().write(TASK_PRIORITY, Width::B4, 0x20, WRITE).expect("the local APIC");
        assert_eq!(rig.bus().update(TASK_PRIORITY, Width::B4, false, &mut |old| old | 0x10), Ok(0x20));
        assert_eq!(rig.bus().read(TASK_PRIORITY, Width::B4, READ), Ok(0x30));
        assert!(!rig.bus().aftermath.descriptors);
    }
}

#[test]
fn a_store_to_a_watched_page_makes_descriptors_stale() {
    for tlb in TLBS {
        let mut rig = Rig::new(tlb);
        assert_eq!(rig.mmu.watch(&rig.vcpu, Gfn(4)), Ok(true));
        let mut bus = rig.bus();
        bus.write(Gva(0x3ff0), Width::B4, 1, WRITE).expect("memory");
        assert!(!bus.aftermath.watched);
        bus.write(Gva(0x3ffe), Width::B4, 1, WRITE).expect("memory");
        assert!(bus.into_aftermath().watched, "by its second half");
        let mut bus = rig.bus();
        bus.update(Gva(0x4008), Width::B4, false, &mut |old| old | 1).expect("memory");
        assert!(bus.aftermath.watched);
    }
}

#[test]
fn reserved_bits_in_a_pdpte_are_a_gp_and_change_nothing() {
    for tlb in TLBS {
        let mut rig = Rig::paged(tlb, &[0x5003]);
        rig.poke(0x5000, 0xabcd);
        rig.poke(0x3000, 0x2000 | 1 << 1 | 1);
        let refused = rig.bus().set_paging(&paging_cpu(0x3000, cr4::PAE), true);
        assert_eq!(refused, Err(BusError::Exception(Exception::gp(0))));
        assert_eq!(rig.bus().read(Gva(0), Width::B4, READ), Ok(0xabcd));
    }
}

#[test]
fn fetching_stops_at_the_page_and_leaves_no_trace_in_the_next() {
    for tlb in TLBS {
        const ACCESSED: u32 = 1 << 5;
        let mut rig = Rig::paged(tlb, &[0x5003, 0x3003]);
        rig.poke(0x5ffc, 0x4433_2211);
        let mut bytes = [0; 15];
        assert_eq!(rig.bus().fetch(Gva(0xffe), false, &mut bytes), Ok(2));
        assert_eq!(bytes[..2], [0x33, 0x44]);
        assert_eq!(rig.peek(0x2000) & ACCESSED, ACCESSED);
        assert_eq!(rig.peek(0x2004) & ACCESSED, 0);
    }
}

#[test]
fn a_probe_checks_each_page_and_a_probe_of_nothing_checks_none() {
    for tlb in TLBS {
        let mut rig = Rig::paged(tlb, &[0x5003, 0x3001]);
        assert_eq!(rig.bus().probe(Gva(0x9000), 0, WRITE), Ok(()));
        assert_eq!(rig.bus().probe(Gva(0xff0), 16, WRITE), Ok(()));
        // The kernel may write to read-only pages while CR0.WP is clear; a user may not.
        assert_eq!(rig.bus().probe(Gva(0xff0), 17, WRITE), Ok(()));
        assert!(rig.bus().probe(Gva(0xff0), 17, Access::write(true)).is_err());
        assert!(rig.bus().probe(Gva(0xff0), 0x2000, READ).is_err());
    }
}

#[test]
fn invlpg_is_told_with_its_address() {
    for tlb in TLBS {
        let mut rig = Rig::paged(tlb, &[0x5003]);
        let mut bus = rig.bus();
        bus.invalidate_page(Gva(0x1234));
        assert_eq!((bus.aftermath.invalidated, bus.aftermath.descriptors), (Some(Gva(0x1234)), false));
    }
}

/// The gate of the page is closed again as soon as it is opened, until the vCPU asks to be let through.
#[test]
fn an_access_that_meets_a_closed_gate_too_often_asks_to_be_let_through() {
    for kind in [TlbKind::Sized, TlbKind::Sticky] {
        let mut rig = Rig::new(Some(kind));
        let (mut bus, page) = (GuestBus::new(&rig.mmu, &mut rig.vcpu, &rig.devices, None), Gfn(5));
        let gates = rig.mmu.buckets();
        gates.close(page);
        let asked = std::thread::scope(|scope| {
            let closer = scope.spawn(|| {
                let end = Instant::now() + Duration::from_secs(20);
                while !gates.is_starving(page) && Instant::now() < end {
                    std::thread::sleep(Duration::from_micros(20));
                    gates.close(page);
                    gates.open(page);
                }
                let asked = gates.is_starving(page);
                gates.open(page);
                asked
            });
            assert_eq!(bus.write(Gva(0x5000), Width::B4, 7, WRITE), Ok(()));
            closer.join().expect("no panic")
        });
        assert!(asked, "{kind:?}: it met closed gates for 20 s");
        drop(bus);
        drop(GuestBus::new(&rig.mmu, &mut rig.vcpu, &rig.devices, None));
        assert!(!gates.is_starving(page), "{kind:?}: it has run with the page");
    }
}

#[test]
fn a_vcpu_that_is_wanted_leaves_when_a_page_has_been_brought_in() {
    let attention = Attention::default();
    let mut rig = Rig::new(None);
    let mut read = |wanted: bool| {
        let gone = rig.mmu.discard(None, 5..6, Discard::Balloon, May::Sleep);
        assert_eq!(gone, Ok(()));
        if wanted {
            attention.kick()
        } else {
            attention.take()
        }
        let mut bus = rig.bus();
        bus.heed(attention.clone());
        let first = bus.read(Gva(0x5000), Width::B4, READ);
        (first, bus.read(Gva(0x5000), Width::B4, READ))
    };
    assert_eq!(read(false), (Ok(0), Ok(0)));
    assert_eq!(read(true), (Err(BusError::Again), Ok(0)), "the page is there when it is back");
}

#[test]
fn a_vcpu_that_brings_something_upon_itself_leaves_for_it() {
    const TO_SELF: u64 = 0x4_4000;
    // By its number, 0: to oneself there is no NMI.
    const TO_FIRST: u64 = 0x4000;
    const NMI: u64 = 0x400;
    let attention = Attention::default();
    let mut rig = Rig::new(None);
    let mut bus = rig.bus();
    bus.heed(attention.clone());
    let mut apic = |register: u32, value: u64| {
        attention.take();
        assert_eq!(bus.write(Gva(0xfee0_0000 + register), Width::B4, value, WRITE), Ok(()));
        attention.is_wanted()
    };
    assert!(!apic(0xf0, 0x1ff), "enabled, and there is nothing for it");
    assert!(apic(0x300, TO_SELF | 0x30));
    assert!(!apic(0x80, 0x10), "it waits as before");
    assert!(apic(0x300, TO_FIRST | NMI));
    attention.take();
    bus.port_out(0xf4, Width::B1, 0);
    assert!(attention.is_wanted(), "the run ends");
}

#[test]
fn pauses_of_one_loop_give_the_cpu_to_others() {
    let sim = sim::Sim::new(1, None, Box::new(|stuck| panic!("{stuck}")));
    let _actor = sim.enter("vcpu 0");
    let mut rig = Rig::new(None);
    let mut bus = rig.bus();
    let mut step = 0;
    // Times that others could run while it paused so often, so many instructions apart.
    let mut given = |times: u32, apart: u64| {
        let before = sim::now();
        for _ in 0..times {
            step += apart;
            bus.begin(step, 0);
            bus.pause();
        }
        sim::now() != before
    };
    assert!(!given(PAUSES_MAX - 1, 3), "most locks come free before");
    assert!(given(1, 3));
    assert!(!given(PAUSES_MAX - 1, PAUSE_LOOP_MAX), "it begins anew");
    assert!(!given(PAUSES_MAX - 1, PAUSE_LOOP_MAX + 1), "none is of the same loop as the one before");
    assert!(!given(PAUSES_MAX - 2, PAUSE_LOOP_MAX));
    assert!(given(1, PAUSE_LOOP_MAX));
}
