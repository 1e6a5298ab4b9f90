//! A page that comes and goes, while somebody uses it.
//!
//! ```text
//! a store through a window              whoever takes frames
//! map, store, unmap                     the page is Moving
//! tell the frame's code                 pinned, or swap is full: it is put back
//! ```
//!
//! A frame that goes takes what was decoded from it along. One that stays must be told of every store, also of those that
//! come to an end while it is on its way.

use std::sync::Arc;

use umbra_mmu::p2m::PageState;
use umbra_mmu::sync::thread;
use umbra_mmu::{Access, Config, Gfn, Gva, LocalStack, Machine, Mfn, Mmu, NoVcpus, Outcome, TlbKind, Vcpu};

use super::explore;

/// The page in question.
const PAGE: Gfn = Gfn(1);

/// A guest of a few pages with paging off. Swap has no room.
fn mmu() -> Mmu {
    let config = Config {
        guest_pages: 4,
        low_pages: 0,
        reserved_frames: 0,
        shadow_pages_max: 64,
        roots_max: 4,
        firmware_entry: 0,
        vcpus: 1,
    };
    let mmu = Mmu::new(Machine::anonymous(32), config, Box::new(NoVcpus));
    mmu.write_bytes(&LocalStack::new(), PAGE.at(0), &[1]).expect("a frame");
    mmu
}

fn frame(mmu: &Mmu) -> Mfn {
    match mmu.p2m().lookup(PAGE) {
        PageState::Resident(mfn) => mfn,
        state => panic!("the page is {state:?}"),
    }
}

/// Has the page's frame marked as one that code was decoded from.
fn decode(mmu: &Mmu, vcpu: &Vcpu) {
    let at = Gva(PAGE.at(0).0 as u32);
    assert_eq!(mmu.fault(vcpu, at, Access::execute(false)), Outcome::Fixed);
    mmu.tlb_enter(vcpu);
    let code = mmu.code_frame(vcpu, at, false).expect("it is mapped");
    mmu.coherence().leave_guest(0);
    assert_ne!(mmu.code_generation(code.mfn), 0);
}

#[test]
fn a_store_to_a_page_that_is_put_back_ends_the_code_decoded_from_it() {
    explore(|| {
        let mmu = Arc::new(mmu());
        decode(&mmu, &mmu.soft_vcpu(0, TlbKind::Sized));
        let other = mmu.clone();
        let taker = thread::spawn(move || assert_eq!(other.page_out(None, &[PAGE]), Ok(0)));
        mmu.write_bytes_sleeping(None, &LocalStack::new(), PAGE.at(8), &[1]).expect("memory");
        taker.join().expect("no panic");
        assert_eq!(mmu.code_generation(frame(&mmu)), 0, "code that was stored to would run on");
    });
}
