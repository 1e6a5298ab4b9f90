//! The TLB against what it must forget, keep and notice.

use super::*;
use crate::coherence::NoVcpus;
use crate::frames::WATCHED;
use crate::p2m::PageState;
use crate::{Config, Machine, Outcome, Width};

const PAGE: Gva = Gva(0x3000);

/// A guest without paging: linear addresses are physical ones.
fn world(kind: TlbKind) -> (Mmu, Vcpu) {
    let config = Config { shadow_pages_max: 64, roots_max: 8, ..Config::of_pages(64) };
    let mmu = Mmu::new(Machine::anonymous(256), config, Box::new(NoVcpus));
    let vcpu = mmu.soft_vcpu(0, kind);
    (mmu, vcpu)
}

/// As a backend makes a store: through the TLB, with a fault where that does not do.
fn store(mmu: &Mmu, vcpu: &Vcpu, gva: Gva, value: u64) -> Result<(), Miss> {
    for _ in 0..2 {
        mmu.tlb_enter(vcpu);
        match mmu.tlb_store(vcpu, gva, Width::B4, value, false) {
            Err(Miss::Fault) => {
                mmu.coherence().leave_guest(0);
                assert_eq!(mmu.fault(vcpu, gva, Access::write(false)), Outcome::Fixed);
            }
            done => return done,
        }
    }
    Err(Miss::Fault)
}

#[test]
fn a_store_after_a_fault_goes_by_the_tlb_and_is_loaded_back() {
    for kind in [TlbKind::Sized, TlbKind::Sticky, TlbKind::Lossy(7)] {
        let (mmu, vcpu) = world(kind);
        for n in 0..200 {
            let gva = Gva(PAGE.0 + n * 4 % 4096);
            assert_eq!(store(&mmu, &vcpu, gva, u64::from(n)), Ok(()), "{kind:?}");
            assert_eq!(mmu.tlb_load(&vcpu, gva, Width::B4, false), Ok(u64::from(n)), "{kind:?}");
        }
        let fills = vcpu.tlb().map_or(0, |tlb| tlb.stats().fills);
        let forgetful = matches!(kind, TlbKind::Lossy(_));
        assert_eq!(fills > 1, forgetful, "{kind:?} filled {fills} times for one page");
    }
}

/// INV-TLB-2: the frame changes hands and nobody flushes.
#[test]
fn a_translation_that_outlives_its_page_is_reported() {
    let (mmu, vcpu) = world(TlbKind::Sticky);
    assert_eq!(store(&mmu, &vcpu, PAGE, 1), Ok(()));
    let PageState::Resident(mfn) = mmu.p2m().lookup(Gfn(3)) else { panic!("the page has a frame") };
    mmu.zap_frame(Gfn(3));
    assert!(mmu.p2m.claim(Gfn(3), PageState::Resident(mfn)).is_some());
    assert_eq!(mmu.tlb_load(&vcpu, PAGE, Width::B4, false), Ok(1), "it may, until the page has moved on");
    assert!(mmu.p2m.transition(Gfn(3), PageState::Moving, PageState::Zero));
    mmu.p2m.advance_mapping_generation(Gfn(3));
    let Err(Miss::Incoherent(violation)) = mmu.tlb_load(&vcpu, PAGE, Width::B4, false) else {
        panic!("a stale translation was used")
    };
    let Violation::Translation(violation) = *violation else { panic!("{violation}") };
    assert_eq!((violation.gfn, violation.spte.mfn(), violation.gva), (Gfn(3), mfn, PAGE));
    assert!(violation.removed_at >= violation.flushed_at, "{violation}");
    assert!(violation.to_string().contains("frame"), "{violation}");
    // With the flush that was owed there is nothing to report.
    mmu.coherence().leave_guest(0);
    mmu.coherence().shoot_down(Some(0));
    assert!(mmu.tlb_enter(&vcpu));
    assert_eq!(mmu.tlb_load(&vcpu, PAGE, Width::B4, false), Err(Miss::Fault));
}

/// INV-TLB-2 of write permission: a store is reported, a load is none of its business.
#[test]
fn a_write_translation_that_outlives_its_permission_is_reported_when_it_stores() {
    let (mmu, vcpu) = world(TlbKind::Sticky);
    assert_eq!(store(&mmu, &vcpu, PAGE, 1), Ok(()));
    let PageState::Resident(mfn) = mmu.p2m().lookup(Gfn(3)) else { panic!("the page has a frame") };
    let bucket = mmu.buckets().lock(Gfn(3));
    mmu.frames.change_flags(mfn, 0, WATCHED);
    let protected = mmu.write_protect(&bucket, Gfn(3), mfn).expect("a flush is owed");
    drop(bucket);
    // Until the flush is made, or forgotten as here, the vCPU may well store: on hardware too it would.
    assert_eq!(mmu.tlb_store(&vcpu, PAGE, Width::B4, 1, false), Ok(()));
    mmu.finish_protected(&protected);
    assert_eq!(mmu.tlb_load(&vcpu, PAGE, Width::B4, false), Ok(1));
    let stored = mmu.tlb_store(&vcpu, PAGE, Width::B4, 2, false);
    let Err(Miss::Incoherent(violation)) = stored else { panic!("stored: {stored:?}") };
    assert!(violation.to_string().contains("write permission"), "{violation}");
}

#[test]
fn code_is_stale_once_its_frame_is_stored_to_by_whoever() {
    let (mmu, vcpu) = world(TlbKind::Sized);
    assert_eq!(store(&mmu, &vcpu, PAGE, 0x90), Ok(()));
    let mark = || mmu.code_frame(&vcpu, PAGE, false).expect("mapped");
    let first = mark();
    assert_eq!(mark(), first, "marked once");
    assert_eq!(mmu.code_generation(first.mfn), first.generation);
    assert_eq!(mmu.tlb_store(&vcpu, Gva(PAGE.0 + 100), Width::B1, 0, false), Ok(()));
    assert_eq!(mmu.code_generation(first.mfn), 0);
    let second = mark();
    assert_ne!(second.generation, first.generation);
    mmu.write_bytes(vcpu.window(), Gfn(3).at(8), &[1]).expect("memory");
    assert_eq!(mmu.code_generation(second.mfn), 0, "by a device");
}

/// Counts the barriers that it is asked for.
#[derive(Clone, Default)]
struct Barriers(crate::sync::Arc<crate::sync::AtomicU32>);

impl crate::Shootdown for Barriers {
    fn kick(&self, _vcpu: u32) {}

    fn settle_stores(&self) {
        self.0.fetch_add(1, crate::sync::Ordering::SeqCst);
    }
}

#[test]
fn who_finds_a_mark_whose_barrier_is_under_way_makes_one_too() {
    let config = Config { shadow_pages_max: 64, roots_max: 8, vcpus: 2, ..Config::of_pages(64) };
    let barriers = Barriers::default();
    let mmu = Mmu::new(Machine::anonymous(256), config, Box::new(barriers.clone()));
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sized);
    assert_eq!(store(&mmu, &vcpu, PAGE, 0x90), Ok(()));
    let PageState::Resident(mfn) = mmu.p2m.lookup(Gfn(PAGE.0 >> 12)) else { panic!("stored to") };
    let made = || barriers.0.load(crate::sync::Ordering::SeqCst);
    // Another vCPU is in the middle of it.
    let mark = mmu.frames.mark_code(mfn);
    let code = mmu.code_frame(&vcpu, PAGE, false).expect("mapped");
    assert_eq!((made(), code.mfn), (1, mfn));
    assert_eq!(mmu.code_generation(mfn), code.generation);
    assert_eq!(mmu.frames.settle_code(mfn, mark), code.generation, "both have decoded the same");
    assert_eq!(mmu.code_frame(&vcpu, PAGE, false), Ok(code));
    assert_eq!(made(), 1, "once it has ended nobody needs another");
}

#[test]
fn a_quick_exchange_wants_an_entry_that_may_be_stored_by_and_no_code_behind_it() {
    let (mmu, vcpu) = world(TlbKind::Sized);
    let exchange =
        |expected, new| mmu.tlb_quick_compare_exchange(&vcpu, vcpu.tlb_tag(false), PAGE, expected, new);
    assert_eq!(exchange(0, 1), None, "nothing is known of the page");
    assert_eq!(store(&mmu, &vcpu, PAGE, 5), Ok(()));
    assert_eq!((exchange(5, 7), exchange(5, 9)), (Some(5), Some(7)));
    assert_eq!(mmu.tlb_load(&vcpu, PAGE, Width::B4, false), Ok(7), "not what it was compared with: it stays");
    let code = mmu.code_frame(&vcpu, PAGE, false).expect("mapped");
    assert_eq!(exchange(7, 9), None, "whoever decoded it is to hear of a store");
    assert_eq!(mmu.code_generation(code.mfn), code.generation);
    let (mmu, vcpu) = world(TlbKind::Sized);
    mmu.write_bytes(vcpu.window(), Gfn(3).at(0), &[0]).expect("memory");
    let PageState::Resident(mfn) = mmu.p2m().lookup(Gfn(3)) else { panic!("the page has a frame") };
    mmu.frames.change_flags(mfn, 0, WATCHED);
    assert_eq!(mmu.fault(&vcpu, PAGE, Access::read(false)), Outcome::Fixed);
    mmu.tlb_enter(&vcpu);
    assert_eq!(mmu.tlb_load(&vcpu, PAGE, Width::B4, false), Ok(0));
    assert_eq!(
        mmu.tlb_quick_compare_exchange(&vcpu, vcpu.tlb_tag(false), PAGE, 0, 1),
        None,
        "it is read-only"
    );
}

/// One by load and store would lose some.
#[test]
fn quick_exchanges_of_two_vcpus_lose_nothing() {
    const ROUNDS: u32 = 100_000;
    let config = Config { shadow_pages_max: 64, roots_max: 8, vcpus: 2, ..Config::of_pages(64) };
    let mmu = Mmu::new(Machine::anonymous(256), config, Box::new(NoVcpus));
    std::thread::scope(|scope| {
        for id in 0..2 {
            let mmu = &mmu;
            scope.spawn(move || {
                let vcpu = mmu.soft_vcpu(id, TlbKind::Sized);
                mmu.tlb_enter(&vcpu);
                while mmu.tlb_store(&vcpu, Gva(PAGE.0 + 64 + 4 * id), Width::B4, 1, false).is_err() {
                    mmu.coherence().leave_guest(id);
                    mmu.fault(&vcpu, PAGE, Access::write(false));
                    mmu.tlb_enter(&vcpu);
                }
                let (mut done, mut seen) = (0, 0);
                while done < ROUNDS {
                    let quick =
                        mmu.tlb_quick_compare_exchange(&vcpu, vcpu.tlb_tag(false), PAGE, seen, seen + 1);
                    let old = quick.expect("nobody takes the page");
                    done += u32::from(old == seen);
                    seen = old + u32::from(old == seen);
                }
                mmu.coherence().leave_guest(id);
            });
        }
    });
    let mut sum = [0; 4];
    let window = crate::LocalStack::new(crate::Context::Host);
    mmu.read_bytes(&window, Gfn(3).at(0), &mut sum).expect("memory");
    assert_eq!(u32::from_le_bytes(sum), 2 * ROUNDS);
}
