//! A shadow-only fault of a real guest, end to end, against an empty trap through the same firmware stub.
//!
//! The guest loads from one page after another, none of which has an spte. In an *empty* pass the trap is answered by
//! stepping over the load and nothing else; in a *filled* pass the MMU fixes the fault first, and the load is stepped
//! over just the same; in a *rerun* pass the load runs again after the fix, as in a real run. Passes alternate, so
//! that the machine's drift hits all alike. What a fault costs beyond the trap is filled minus empty.
//!
//! Bar (docs/SPECIFICATION.md): median under 1.5 us.

use std::sync::Arc;
use std::time::{Duration, Instant};

use umbra::cpu::{CpuState, cr0};
use umbra::kvm::{Host, KvmExit, KvmVcpu, KvmVm, Options};
use umbra::machine::Pool;
use umbra_benches::{Effort, Samples};
use umbra_mmu::{
    Access, Config, Context, Flush, Gfn, Gpa, Gva, LocalStack, Machine, Mmu, Mode, NoVcpus, Outcome, Vcpu,
    Width,
};

const PAGES: u32 = 256;
const GUEST_PAGES: u32 = 4096;
const CODE: u32 = 0x10_0000;
const DATA: u32 = 0x40_0000;
const DIRECTORY: u32 = 0x20_0000;
/// MOV EAX, moffs32: opcode and address.
const LOAD_BYTES: u32 = 5;
const CLI: u8 = 0xfa;
/// Flat 4 GiB code and data, DPL 0, accessed.
const GDT: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const PAGE_FAULT: u8 = 14;

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Empty,
    Filled,
    Rerun,
}

struct Guest {
    mmu: Mmu,
    vcpu: Vcpu,
    kvm: KvmVcpu,
    cpu: CpuState,
}

fn main() {
    let effort = Effort::from_args();
    let host = match Host::open() {
        Ok(host) => host,
        Err(error) => {
            println!("bench guest_fault skipped: {error}");
            return;
        }
    };
    let mut guest = Guest::new(&host);
    let rounds = effort.batches.min(400);
    let mut samples = [(); 4].map(|()| Samples::new());
    for _ in 0..rounds {
        let [empty, filled, rerun] = [Pass::Empty, Pass::Filled, Pass::Rerun].map(|pass| guest.pass(pass));
        samples[0].add(empty, PAGES);
        samples[1].add(filled.saturating_sub(empty), PAGES);
        samples[2].add(rerun.saturating_sub(empty), PAGES);
        samples[3].add(filled, PAGES);
    }
    samples[0].print("trap_empty", PAGES);
    samples[3].print("trap_filled", PAGES);
    samples[1].print("guest_fault_minus_trap", PAGES);
    samples[2].print("guest_fault_and_rerun_minus_trap", PAGES);
}

impl Guest {
    fn new(host: &Host) -> Guest {
        let config = Config { shadow_pages_max: 256, roots_max: 16, ..Config::of_pages(GUEST_PAGES) };
        let firmware = KvmVm::firmware_frames(1).expect("one vCPU");
        let frames = firmware + u64::from(GUEST_PAGES + config.table_frames_max());
        let pool = Arc::new(Pool::new(frames).expect("a pool"));
        let vm = KvmVm::new(host, Arc::clone(&pool), Options::default()).expect("a VM");
        let config =
            Config { reserved_frames: vm.first_free_frame().0, firmware_entry: vm.root_entry().1, ..config };
        let mmu = Mmu::new(Machine::new(pool.region()), config, Box::new(NoVcpus));
        write_guest(&mmu);
        let mut vcpu = mmu.vcpu(0);
        let mode = Mode { paging: true, write_protect: true, ..Mode::default() };
        mmu.set_paging(&mut vcpu, mode, DIRECTORY, Flush::Yes).expect("no PDPTEs");
        let mut kvm = vm.create_vcpu(0).expect("a vCPU");
        let gdt: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        kvm.set_descriptors(&gdt, None).expect("descriptor tables");
        let mut cpu = CpuState::flat_protected_mode(CODE);
        cpu.cr0 |= cr0::PG | cr0::WP;
        cpu.cr3 = DIRECTORY;
        Guest { mmu, vcpu, kvm, cpu }
    }

    /// One round over all pages; the time from its first trap to the guest's CLI at the end.
    fn pass(&mut self, pass: Pass) -> Duration {
        for page in 0..PAGES {
            self.mmu.zap_frame(Gfn((DATA >> 12) + page));
        }
        self.mmu.coherence().request_flush(0);
        self.cpu.eip = CODE;
        let mut start = None;
        loop {
            let (vector, error, cr2) = self.enter();
            let start = *start.get_or_insert_with(Instant::now);
            let gva = Gva(cr2 as u32);
            if vector != PAGE_FAULT {
                return start.elapsed();
            }
            let is_data = gva.0 >= DATA;
            if !is_data || pass != Pass::Empty {
                let access = if error & 16 == 0 { Access::read(false) } else { Access::execute(false) };
                let outcome = self.mmu.fault(&self.vcpu, gva, access);
                assert!(matches!(outcome, Outcome::Fixed | Outcome::Spurious), "{outcome:?} at {gva}");
            }
            if is_data && pass != Pass::Rerun {
                self.cpu.eip += LOAD_BYTES;
            }
        }
    }

    fn enter(&mut self) -> (u8, u32, u64) {
        let root = self.mmu.root_address(&self.vcpu, false).expect("frames for a root");
        let coherence = self.mmu.coherence();
        let flush = self.mmu.enter(&self.vcpu).then(|| coherence.begin_flush());
        let exit = self.kvm.enter(&mut self.cpu, root, flush.is_some()).expect("the guest runs");
        if let Some(epoch) = flush {
            coherence.end_flush(0, epoch);
        }
        self.mmu.leave(&self.vcpu);
        match exit {
            KvmExit::Trap { vector, error, cr2 } => (vector, error, cr2),
            KvmExit::Kicked => self.enter(),
        }
    }
}

/// Code, and two-level tables that map it and the data one to one.
fn write_guest(mmu: &Mmu) {
    let window = LocalStack::new(Context::Host);
    let put = |gpa: u32, value: u32| {
        mmu.store(&window, Gpa(gpa.into()), Width::B4, value.into()).expect("guest memory");
    };
    for directory in 0..2 {
        let table = DIRECTORY + 0x1000 * (directory + 1);
        put(DIRECTORY + 4 * directory, table | 0x63);
        for entry in 0..1024 {
            put(table + 4 * entry, (directory << 22 | entry << 12) | 0x63);
        }
    }
    let mut code = Vec::new();
    for page in 0..PAGES {
        code.push(0xa1);
        code.extend((DATA + (page << 12)).to_le_bytes());
    }
    code.push(CLI);
    mmu.write_bytes(&window, Gpa(CODE.into()), &code).expect("guest memory");
}
