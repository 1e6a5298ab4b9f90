//! The mmu crate's hot paths, with no hardware: fill, refill, window, INVLPG, CR3 load, tracked store, two threads.
//!
//! Bars (docs/SPECIFICATION.md): fill median under 250 ns, refill under 120 ns, window hit under 15 ns, two threads at
//! least 1.8 times one.

use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use umbra_benches::{Effort, Samples, measure};
use umbra_mmu::{
    Access, Config, Flush, Gpa, Gva, LocalStack, Machine, Mmu, Mode, NoVcpus, Outcome, Vcpu, Width,
};

/// Pages in the range that is mapped and unmapped: one page table's.
const PAGES: u32 = 512;
const GUEST_PAGES: u32 = 16 << 10;
/// Bits of a guest's entry: present, writable, accessed, dirty.
const MAPPED: u64 = 0x63;

/// Where vCPU `n` has its tables and data, in guest-physical pages.
fn base(n: u32) -> u32 {
    0x100 + n * 0x1000
}

fn directory(n: u32) -> Gpa {
    Gpa(u64::from(base(n)) << 12)
}

fn table(n: u32) -> Gpa {
    Gpa(u64::from(base(n) + 1) << 12)
}

fn world(vcpus: u32) -> Mmu {
    let config = Config {
        guest_pages: GUEST_PAGES,
        reserved_frames: 1,
        shadow_pages_max: 1024,
        roots_max: 64,
        firmware_entry: 0,
        vcpus,
    };
    Mmu::new(Machine::anonymous(GUEST_PAGES + 4096), config, Box::new(NoVcpus))
}

/// vCPU `n` with two-level tables of its own that map `PAGES` pages at 0x400000.
fn address_space(mmu: &Mmu, n: u32) -> Vcpu {
    let mut vcpu = mmu.vcpu(n);
    let window = LocalStack::new();
    let put = |gpa: Gpa, value: u64| mmu.store(&window, gpa, Width::B4, value).expect("guest memory");
    put(Gpa(directory(n).0 + 4), table(n).0 | MAPPED);
    for page in 0..PAGES {
        let frame = u64::from(base(n) + 0x10 + page) << 12;
        put(Gpa(table(n).0 + 4 * u64::from(page)), frame | MAPPED);
    }
    let mode = Mode { paging: true, write_protect: true, ..Mode::default() };
    mmu.set_paging(&mut vcpu, mode, directory(n).0 as u32, Flush::Yes)
        .expect("two-level tables have no PDPTEs");
    vcpu
}

fn gva(page: u32) -> Gva {
    Gva(0x40_0000 + (page << 12))
}

fn touch_all(mmu: &Mmu, vcpu: &Vcpu) {
    for page in 0..PAGES {
        let outcome = mmu.fault(vcpu, gva(page), Access::read(false));
        assert!(matches!(outcome, Outcome::Fixed | Outcome::Spurious), "{outcome:?}");
    }
}

/// Takes all sptes of the range away, as an invalidation would: each frame is unmapped through its reverse map.
fn zap_all(mmu: &Mmu, n: u32) {
    for page in 0..PAGES {
        mmu.zap_frame(umbra_mmu::Gfn(base(n) + 0x10 + page));
    }
}

fn main() {
    let effort = Effort::from_args();
    fills(effort);
    window(effort);
    invlpg(effort);
    control_registers(effort);
    threads(effort);
}

fn fills(effort: Effort) {
    let mmu = world(1);
    let vcpu = address_space(&mmu, 0);
    touch_all(&mmu, &vcpu);
    measure(effort, PAGES, || zap_all(&mmu, 0), || touch_all(&mmu, &vcpu)).print("fill", PAGES);
    touch_all(&mmu, &vcpu);
    measure(effort, PAGES, || {}, || touch_all(&mmu, &vcpu)).print("refill_known", PAGES);
}

fn window(effort: Effort) {
    let mmu = world(1);
    let stack = LocalStack::new();
    let calls = 4096;
    let at = directory(0);
    mmu.store(&stack, at, Width::B4, 1).expect("guest memory");
    let hit = || {
        (0..calls).for_each(|_| {
            let _ = black_box(mmu.load(&stack, black_box(at), Width::B4));
        })
    };
    measure(effort, calls, || {}, hit).print("window_load", calls);
}

fn invlpg(effort: Effort) {
    let mmu = world(1);
    let vcpu = address_space(&mmu, 0);
    touch_all(&mmu, &vcpu);
    let all = || (0..PAGES).for_each(|page| mmu.invalidate_page(&vcpu, gva(page)));
    measure(effort, PAGES, || {}, all).print("invlpg_unchanged", PAGES);
    measure(effort, PAGES, || zap_all(&mmu, 0), all).print("invlpg_prefill", PAGES);
}

fn control_registers(effort: Effort) {
    let mmu = world(2);
    let (mut vcpu, other) = (address_space(&mmu, 0), address_space(&mmu, 1));
    touch_all(&mmu, &vcpu);
    let mode = vcpu.mode();
    let calls = 64;
    let mut switch = || {
        for n in 0..calls {
            let cr3 = directory(n & 1).0 as u32;
            mmu.set_paging(&mut vcpu, mode, cr3, Flush::Yes).expect("no PDPTEs");
        }
    };
    measure(effort, calls, || {}, &mut switch).print("cr3_load", calls);
    // Make the table unsync by a store fault, as a guest's first edit does.
    let window = LocalStack::new();
    let store = Gpa(table(1).0 + 8);
    let stores = || {
        for _ in 0..calls {
            mmu.store(&window, store, Width::B4, 0).expect("guest memory");
        }
    };
    touch_all(&mmu, &other);
    measure(effort, calls, || {}, stores).print("tracked_store", calls);
}

/// Fills on two threads, each in an address space of its own, against one.
fn threads(effort: Effort) {
    let rounds = effort.batches.min(400);
    let alone = fills_per_second(1, rounds);
    let both = fills_per_second(2, rounds);
    println!("bench fill_threads_2_over_1={:.2} x alone={alone:.0}/s both={both:.0}/s", both / alone);
}

fn fills_per_second(count: u32, rounds: u32) -> f64 {
    let mmu = Arc::new(world(2));
    let barrier = Arc::new(Barrier::new(count as usize));
    let workers: Vec<_> = (0..count)
        .map(|n| {
            let (mmu, barrier) = (Arc::clone(&mmu), Arc::clone(&barrier));
            std::thread::spawn(move || {
                let vcpu = address_space(&mmu, n);
                touch_all(&mmu, &vcpu);
                barrier.wait();
                let mut samples = Samples::new();
                for _ in 0..rounds {
                    zap_all(&mmu, n);
                    let start = Instant::now();
                    touch_all(&mmu, &vcpu);
                    samples.add(start.elapsed(), PAGES);
                }
                1e9 / samples.median()
            })
        })
        .collect();
    workers.into_iter().map(|worker| worker.join().expect("a worker does not panic")).sum()
}
