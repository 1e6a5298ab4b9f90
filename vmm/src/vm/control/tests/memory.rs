//! Commands about the guest's memory.

use umbra_mmu::{Access, Flush, Gva, Mode, Outcome};

use super::*;

/// Gives the first pages contents, and so frames.
fn fill(rig: &Rig, pages: u32) {
    let stack = LocalStack::new(Context::Host);
    for page in 0..pages {
        rig.parts.mmu.write_bytes(&stack, Gfn(page).at(0), &[page as u8 | 1; 64]).expect("a frame");
    }
}

#[test]
fn budget_is_shown_and_set_and_one_too_small_names_the_smallest() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    let shown = peer.ask("x-frames");
    let least = shown["budget-min"].as_u64().expect("a number");
    assert!(shown["budget"].as_u64() > Some(least));
    let set = peer.with("x-frames", json!({"bytes": least}));
    assert_eq!(set["return"]["budget"], least);
    let answer = peer.with("x-frames", json!({"bytes": least - 4096}));
    assert_eq!(refused(&answer).1.matches(&least.to_string()).count(), 1, "{answer}");
    let most = shown["budget-max"].as_u64().expect("a number");
    assert_eq!(shown["budget"], most, "it has all of its machine from the beginning on");
    // Swap has room enough for that; it is too small all the same.
    let answer = peer.with("x-frames", json!({"bytes": 0}));
    assert!(refused(&answer).1.contains(&format!("at least {least},")), "{answer}");
    let answer = peer.with("x-frames", json!({"bytes": most + 4096}));
    let words = format!("more than the machine has: at most {most},");
    assert!(refused(&answer).1.contains(&words), "{answer}");
    let answer = peer.with("x-frames", json!({"bytes": u64::MAX - 4095}));
    assert!(refused(&answer).1.contains(&words), "{answer}");
    assert_eq!(peer.with("x-frames", json!({"bytes": most}))["return"]["budget"], most);
    assert_eq!(peer.with("x-frames", json!({"bytes": least}))["return"]["budget"], least);
    let answer = peer.with("x-frames", json!({"bytes": least + 1}));
    assert_eq!(refused(&answer).1, "Parameter 'bytes' expects a multiple of 4096");
    assert_eq!(rig.parts.mmu.usage().budget, (least / 4096) as u32);
    let bare = Rig::with(|controls| controls.swap = false);
    let answer = bare.negotiated().with("x-frames", json!({"bytes": least}));
    assert!(refused(&answer).1.contains("--frames"), "{answer}");
}

#[test]
fn discard_takes_contents_and_says_how_many() {
    let rig = Rig::new();
    fill(&rig, 100);
    let mut peer = rig.negotiated();
    let answer = peer.with("x-discard", json!({"gpa": 4096, "bytes": 50 * 4096}));
    assert_eq!(answer["return"], json!({"discarded": 50, "left": 0}));
    assert_eq!(rig.parts.mmu.usage().resident, 50);
    let answer = peer.with("x-discard", json!({"gpa": 0, "bytes": 4 << 20, "atomic": true}));
    assert_eq!(answer["return"], json!({"discarded": 1024, "left": 0}));
    assert_eq!(rig.parts.mmu.usage().resident, 0);
    assert_eq!(atomic(&mut peer, "discard"), (2, 0), "512 pages are one request");
}

/// Requests of a cause that might not sleep, and those of them that would have had to.
fn atomic(peer: &mut Peer, cause: &str) -> (u64, u64) {
    let counters = peer.ask("x-counters");
    let causes = counters["memory"]["invalidations"].as_array().expect("causes");
    let of = causes.iter().find(|of| of["cause"] == cause).expect("the cause");
    let count = |name: &str| of[name].as_u64().expect("a number");
    (count("atomic"), count("would_block"))
}

#[test]
fn ranges_that_are_no_pages_of_the_guest_are_refused() {
    let rig = Rig::new();
    let mut peer = rig.negotiated();
    for name in ["x-discard", "x-page-out"] {
        for (gpa, bytes, words) in [
            (1, 4096, "Parameter 'gpa' expects a multiple of 4096"),
            (0, 4095, "Parameter 'bytes' expects a multiple of 4096"),
            (0, (4 << 20) + 4096, "guest memory ends at 0x400000"),
            (u64::MAX - 4095, 4096, "guest memory ends at 0x400000"),
        ] {
            let answer = peer.with(name, json!({"gpa": gpa, "bytes": bytes}));
            assert!(refused(&answer).1.contains(words), "{answer}");
        }
        assert!(
            peer.with(name, json!({"gpa": 4 << 20, "bytes": 0})).get("return").is_some(),
            "nothing is nothing"
        );
    }
}

#[test]
fn pages_go_out_and_memory_says_where_they_are() {
    let rig = Rig::new();
    fill(&rig, 100);
    let mut peer = rig.negotiated();
    let answer = peer.with("x-page-out", json!({"gpa": 0, "bytes": 64 * 4096}));
    assert_eq!(answer["return"], json!({"freed": 64, "left": 0}));
    let memory = peer.ask("x-memory");
    for (name, pages) in
        [("guest-pages", 1024), ("resident", 36), ("swapped", 64), ("zero", 924), ("pinned", 0)]
    {
        assert_eq!(memory[name], pages, "{name}: {memory}");
    }
    assert_eq!(memory["swap"], json!({"slots": 1024, "used": 64, "in-memory": true}));
    assert!(memory["host"]["frames"].is_null(), "this guest's frames are of no pool: {memory}");
    assert!(memory["host"]["resident"].as_u64() > Some(1 << 20), "{memory}");
    let counters = peer.ask("x-counters");
    assert_eq!(counters["memory"]["swap_outs"], 64, "{counters}");
}

/// What has to be written stays where it is; what swap has a copy of, and zeros, go.
#[test]
fn an_atomic_page_out_writes_nothing_and_says_that_it_would_have_had_to() {
    let rig = Rig::new();
    fill(&rig, 100);
    let mut peer = rig.negotiated();
    let answer = peer.with("x-page-out", json!({"gpa": 0, "bytes": 64 * 4096, "atomic": true}));
    assert_eq!(refused(&answer).0, "WouldBlock", "{answer}");
    assert_eq!((rig.parts.mmu.usage().resident, atomic(&mut peer, "page-out")), (100, (1, 1)));
    peer.with("x-page-out", json!({"gpa": 0, "bytes": 64 * 4096}));
    (0..64).for_each(|page| rig.parts.mmu.bring_in(None, Gfn(page)).expect("frames are left"));
    let written = rig.parts.mmu.usage().swap_outs;
    let answer = peer.with("x-page-out", json!({"gpa": 0, "bytes": 64 * 4096, "atomic": true}));
    assert_eq!(answer["return"], json!({"freed": 64, "left": 0}));
    // The one that was written to since is left, and no other.
    (0..64).for_each(|page| rig.parts.mmu.bring_in(None, Gfn(page)).expect("frames are left"));
    rig.parts.mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(9).at(0), &[3]).expect("a frame");
    let answer = peer.with("x-page-out", json!({"gpa": 0, "bytes": 64 * 4096, "atomic": true}));
    assert_eq!(refused(&answer).0, "WouldBlock", "{answer}");
    let usage = rig.parts.mmu.usage();
    assert_eq!((usage.resident, usage.swap_outs), (37, written));
    assert_eq!(atomic(&mut peer, "page-out"), (3, 2));
    assert_eq!(atomic(&mut peer, "discard"), (0, 0), "each cause has its own");
}

/// A vCPU that is inside the guest, and may have what it has mapped in its TLB, is nothing that an atomic discard waits for.
#[test]
fn atomic_discard_would_block_where_a_vcpu_is_inside() {
    let rig = Rig::new();
    fill(&rig, 10);
    let mmu = &rig.parts.mmu;
    let mut vcpu = mmu.vcpu(0);
    // The guest's directory in page 20, its table in page 21, which maps linear page 0 to page 3.
    for (page, entry) in [(20, 21 << 12 | 7), (21, 3 << 12 | 7)] {
        mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(page).at(0), &u32::to_le_bytes(entry))
            .expect("a frame");
    }
    let mode = Mode { paging: true, ..Mode::default() };
    mmu.set_paging(&mut vcpu, mode, 20 << 12, Flush::Yes).expect("a directory");
    let filled = (0..10).any(|_| mmu.fault(&vcpu, Gva(0), Access::read(false)) == Outcome::Fixed);
    assert!(filled, "the page is not mapped");
    mmu.coherence().enter_guest(0);
    let mut peer = rig.negotiated();
    let arguments = json!({"gpa": 0, "bytes": 8 * 4096, "atomic": true});
    let answer = peer.with("x-discard", arguments.clone());
    assert_eq!(refused(&answer).0, "WouldBlock", "{answer}");
    assert_eq!(atomic(&mut peer, "discard"), (1, 1));
    let answer = peer.with("x-page-out", arguments.clone());
    assert_eq!(refused(&answer).0, "WouldBlock", "{answer}");
    assert_eq!((mmu.usage().resident, atomic(&mut peer, "page-out")), (12, (1, 1)));
    mmu.coherence().leave_guest(0);
    assert_eq!(peer.with("x-discard", arguments)["return"]["discarded"], 8);
    // Nor are its tables, which would have to be taken out of the shadow first.
    let answer = peer.with("x-page-out", json!({"gpa": 20 * 4096, "bytes": 2 * 4096, "atomic": true}));
    assert_eq!((refused(&answer).0, mmu.usage().resident), ("WouldBlock", 4), "{answer}");
    let answer = peer.with("x-discard", json!({"gpa": 20 * 4096, "bytes": 2 * 4096, "atomic": true}));
    assert_eq!(refused(&answer).0, "WouldBlock", "{answer}");
    assert_eq!(atomic(&mut peer, "discard"), (3, 2));
}
