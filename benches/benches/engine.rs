//! The engine's speed: guest instructions a second in loops of different kinds, beside the plain interpreter's.
//!
//! The bus is what the soft backend's is, without a board: every access goes through the mmu crate's software TLB,
//! paging is on, and code generations are checked.
//!
//! | figure | what the loop does | bar |
//! |---|---|---|
//! | engine_integer | arithmetic, shifts, LEA, compares and branches on registers | 100 M/s |
//! | engine_memory | loads, stores, read-modify-writes, pushes and pops over 64 KiB | 60 M/s |
//! | engine_calls | calls and returns, frames on the stack, indirect jumps | |
//! | engine_strings | REP MOVSD and REP STOSD of 1 KiB, counted in bytes | |
//! | engine_own_page | stores to the page that the loop stands in, which is decoded anew each round | |
//!
//! Each line has the same loop by `step` for comparison.

use std::time::Instant;

use umbra::cpu::{CpuState, cr0};
use umbra::interp::engine::{CodeBus, Engine, Extent, Waiting};
use umbra::interp::{Bus, BusError, Step, Width, step};
use umbra_benches::{Effort, Samples};
use umbra_mmu::{
    Access, CodeFrame, Config, Context, Flush, Gfn, Gva, LocalStack, Machine, Mfn, Miss, Mmu, Mode, NoVcpus,
    Outcome, TlbKind, Vcpu,
};

const GUEST_PAGES: u32 = 1024;
const DIRECTORY: u32 = 1;
const TABLE: u32 = 2;
const CODE: u32 = 0x10_0000;
const DATA: u32 = 0x20_0000;
const STACK: u32 = 0x30_0000;
/// Steps of one batch.
const STEPS: u64 = 100_000;

/// The soft backend's bus, but for devices.
struct TlbBus {
    mmu: Mmu,
    vcpu: Vcpu,
    step: u64,
}

impl TlbBus {
    /// Linear addresses are guest-physical ones, by tables.
    fn new(code: &[u8]) -> TlbBus {
        let config = Config { shadow_pages_max: 64, roots_max: 8, ..Config::of_pages(GUEST_PAGES) };
        let mmu = Mmu::new(Machine::anonymous(GUEST_PAGES + 256), config, Box::new(NoVcpus));
        let window = LocalStack::new(Context::Host);
        let put =
            |gfn: u32, bytes: &[u8]| mmu.write_bytes(&window, Gfn(gfn).at(0), bytes).expect("guest memory");
        put(DIRECTORY, &(TABLE << 12 | 0x67).to_le_bytes());
        let table: Vec<u8> = (0..GUEST_PAGES).flat_map(|page| (page << 12 | 0x67).to_le_bytes()).collect();
        put(TABLE, &table);
        put(CODE >> 12, code);
        let mut vcpu = mmu.soft_vcpu(0, TlbKind::Sized);
        let mode = Mode { paging: true, write_protect: true, ..Mode::default() };
        mmu.set_paging(&mut vcpu, mode, DIRECTORY << 12, Flush::Yes).expect("no PDPTEs");
        mmu.tlb_enter(&vcpu);
        TlbBus { mmu, vcpu, step: 0 }
    }

    #[inline(always)]
    fn by_tlb<T>(
        &mut self,
        gva: Gva,
        access: Access,
        mut make: impl FnMut(&Mmu, &Vcpu) -> Result<T, Miss>,
    ) -> Result<T, BusError> {
        loop {
            match make(&self.mmu, &self.vcpu) {
                Ok(value) => return Ok(value),
                Err(_) => self.fill(gva, access),
            }
        }
    }

    #[cold]
    fn fill(&mut self, gva: Gva, access: Access) {
        let outcome = self.mmu.fault(&self.vcpu, gva, access);
        assert!(matches!(outcome, Outcome::Fixed | Outcome::Spurious), "{outcome:?} at {gva}");
    }
}

impl Bus for TlbBus {
    #[inline(always)]
    fn read(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        self.by_tlb(gva, access, |mmu, vcpu| mmu.tlb_load(vcpu, gva, width.into(), access.user))
    }

    #[inline(always)]
    fn write(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        self.by_tlb(gva, access, |mmu, vcpu| mmu.tlb_store(vcpu, gva, width.into(), value, access.user))
    }

    fn update(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        let update = |mmu: &Mmu, vcpu: &Vcpu| mmu.tlb_update(vcpu, gva, width.into(), user, change);
        self.by_tlb(gva, Access::write(user), update)
    }

    fn probe(&mut self, gva: Gva, _: u32, access: Access) -> Result<(), BusError> {
        self.by_tlb(gva, access, |mmu, vcpu| mmu.tlb_translate(vcpu, gva, access)).map(|_| ())
    }

    fn fill(&mut self, gva: Gva, width: Width, value: u64, count: u32, user: bool) -> bool {
        self.mmu.tlb_fill(&self.vcpu, gva, width.into(), value, count, user).is_ok()
    }

    fn copy(&mut self, from: Gva, to: Gva, length: u32, user: bool) -> bool {
        self.mmu.tlb_copy(&self.vcpu, from, to, length, user) == Ok(true)
    }

    fn fetch(&mut self, gva: Gva, user: bool, buffer: &mut [u8]) -> Result<usize, BusError> {
        let fetch = |mmu: &Mmu, vcpu: &Vcpu| mmu.tlb_fetch(vcpu, gva, user, buffer);
        self.by_tlb(gva, Access::execute(user), fetch)
    }

    fn port_in(&mut self, _: u16, _: Width) -> u32 {
        u32::MAX
    }

    fn port_out(&mut self, _: u16, _: Width, _: u32) {}

    fn invalidate_page(&mut self, gva: Gva) {
        self.mmu.invalidate_page(&self.vcpu, gva);
    }

    fn set_paging(&mut self, _: &CpuState, _: bool) -> Result<(), BusError> {
        Ok(())
    }

    fn cpuid(&mut self, _: u32, _: u32, _: &CpuState) -> [u32; 4] {
        [0; 4]
    }

    fn tsc(&mut self) -> u64 {
        self.step
    }
}

impl CodeBus for TlbBus {
    fn code_frame(&mut self, gva: Gva, user: bool) -> Result<Option<CodeFrame>, BusError> {
        self.by_tlb(gva, Access::execute(user), |mmu, vcpu| mmu.code_frame(vcpu, gva, user)).map(Some)
    }

    #[inline(always)]
    fn code_generation(&self, frame: Mfn) -> u32 {
        self.mmu.code_generation(frame)
    }

    #[inline(always)]
    fn translation_version(&self) -> u64 {
        self.mmu.tlb_version(&self.vcpu)
    }

    #[inline(always)]
    fn is_wanted(&self) -> bool {
        false
    }

    #[inline(always)]
    fn begin(&mut self, step: u64, _eip: u32) {
        self.step = step;
    }

    #[inline(always)]
    fn quick_tag(&self, user: bool) -> u64 {
        self.vcpu.tlb_tag(user)
    }

    #[inline(always)]
    fn quick_read(&self, tag: u64, gva: Gva, width: Width, access: Access) -> Option<u64> {
        self.mmu.tlb_quick_load(&self.vcpu, tag, gva, width.into(), access.kind)
    }

    #[inline(always)]
    fn quick_write(&mut self, tag: u64, gva: Gva, width: Width, value: u64) -> bool {
        self.mmu.tlb_quick_store(&self.vcpu, tag, gva, width.into(), value)
    }

    #[inline(always)]
    fn quick_compare_exchange(&mut self, tag: u64, gva: Gva, expected: u32, new: u32) -> Option<u32> {
        self.mmu.tlb_quick_compare_exchange(&self.vcpu, tag, gva, expected, new)
    }
}

/// Eleven instructions a round, three of them branches.
const INTEGER: &[u8] = &[
    0x89, 0xd8, // mov eax, ebx
    0xc1, 0xe0, 0x05, // shl eax, 5
    0x31, 0xc3, // xor ebx, eax
    0x8d, 0x54, 0xb3, 0x11, // lea edx, [ebx + esi * 4 + 17]
    0x01, 0xd1, // add ecx, edx
    0x83, 0xe2, 0x7f, // and edx, 127
    0x83, 0xfa, 0x64, // cmp edx, 100
    0x72, 0x01, // jb over the next
    0x46, // inc esi
    0x83, 0xef, 0x01, // sub edi, 1
    0x75, 0xe5, // jnz 0
    0xeb, 0xe3, // jmp 0
];

/// Ten instructions a round, seven of which touch memory.
const MEMORY: &[u8] = &[
    0x8b, 0x06, // mov eax, [esi]
    0x03, 0x46, 0x04, // add eax, [esi + 4]
    0x89, 0x86, 0x00, 0x00, 0x01, 0x00, // mov [esi + 0x10000], eax
    0x01, 0x96, 0x00, 0x80, 0x01, 0x00, // add [esi + 0x18000], edx
    0x50, // push eax
    0x0f, 0xb6, 0x56, 0x02, // movzx edx, byte [esi + 2]
    0x5b, // pop ebx
    0x83, 0xc6, 0x14, // add esi, 20
    0x81, 0xe6, 0xff, 0xff, 0x20, 0x00, // and esi, 0x20ffff
    0xeb, 0xde, // jmp 0
];

/// Fifteen instructions a round: a call by displacement and one by register, each with a frame.
const CALLS: &[u8] = &[
    0xe8, 0x09, 0x00, 0x00, 0x00, // call f
    0xbb, 0x0e, 0x00, 0x10, 0x00, // mov ebx, f
    0xff, 0xd3, // call ebx
    0xeb, 0xf2, // jmp 0
    0x55, // f: push ebp
    0x89, 0xe5, // mov ebp, esp
    0x8b, 0x45, 0x04, // mov eax, [ebp + 4]
    0x5d, // pop ebp
    0xc3, // ret
];

/// A page's quarter copied and another filled.
const STRINGS: &[u8] = &[
    0xbe, 0x00, 0x00, 0x20, 0x00, // mov esi, 0x200000
    0xbf, 0x00, 0x00, 0x21, 0x00, // mov edi, 0x210000
    0xb9, 0x00, 0x01, 0x00, 0x00, // mov ecx, 256
    0xf3, 0xa5, // rep movsd
    0xb9, 0x00, 0x01, 0x00, 0x00, // mov ecx, 256
    0xf3, 0xab, // rep stosd
    0xeb, 0xe6, // jmp 0
];
/// Bytes moved by a step of [`STRINGS`]: two KiB in seven.
const STRING_BYTES: f64 = 2048.0 / 7.0;

/// The worst that code can do to its blocks: four instructions a round, the block forgotten each time.
const OWN_PAGE: &[u8] = &[
    0xa3, 0x00, 0x08, 0x10, 0x00, // mov [0x100800], eax
    0x40, // inc eax
    0x01, 0xc3, // add ebx, eax
    0xeb, 0xf6, // jmp 0
];

fn cpu() -> CpuState {
    let mut cpu = CpuState::flat_protected_mode(CODE);
    cpu.cr0 |= cr0::PG | cr0::WP;
    cpu.cr3 = DIRECTORY << 12;
    (cpu.gpr[3], cpu.gpr[4], cpu.gpr[6], cpu.gpr[7]) = (0x1234_5678, STACK, DATA, u32::MAX);
    cpu
}

/// Nanoseconds a step.
fn by_engine(code: &[u8], effort: Effort) -> Samples {
    let (mut cpu, mut bus, mut engine) = (cpu(), TlbBus::new(code), Engine::default());
    measure_steps(effort, || {
        let ran = engine.run(&mut cpu, &mut bus, STEPS, Extent::All, Waiting::default());
        assert_eq!((ran.steps, ran.last), (STEPS, Step::Done));
        STEPS
    })
}

fn by_step(code: &[u8], effort: Effort) -> Samples {
    let (mut cpu, mut bus) = (cpu(), TlbBus::new(code));
    let effort = Effort { batches: effort.batches / 10 };
    measure_steps(effort, || {
        for _ in 0..STEPS / 10 {
            assert_eq!(step(&mut cpu, &mut bus), Step::Done);
        }
        STEPS / 10
    })
}

fn measure_steps(effort: Effort, mut batch: impl FnMut() -> u64) -> Samples {
    let mut samples = Samples::new();
    for _ in 0..effort.batches {
        let start = Instant::now();
        let steps = batch();
        samples.add(start.elapsed(), steps as u32);
    }
    samples
}

fn figure(name: &str, code: &[u8], unit: &str, per_step: f64, effort: Effort) {
    let (engine, plain) = (by_engine(code, effort), by_step(code, effort));
    let rate = |ns: f64| 1000.0 * per_step / ns;
    println!(
        "bench {name}={:.1} {unit} best={:.1} worst={:.1} step={:.1} batches={}",
        rate(engine.median()),
        rate(engine.quantile(0.1)),
        rate(engine.quantile(0.9)),
        rate(plain.median()),
        engine.count(),
    );
}

/// `cargo bench --bench engine -- memory` runs that figure alone.
fn main() {
    let effort = Effort::from_args();
    let named: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let figures: [(&str, &[u8], &str, f64); 5] = [
        ("engine_integer", INTEGER, "M/s", 1.0),
        ("engine_memory", MEMORY, "M/s", 1.0),
        ("engine_calls", CALLS, "M/s", 1.0),
        ("engine_strings", STRINGS, "MB/s", STRING_BYTES),
        ("engine_own_page", OWN_PAGE, "M/s", 1.0),
    ];
    for (name, code, unit, per_step) in figures {
        if named.is_empty() || named.iter().any(|wanted| name.ends_with(wanted.as_str())) {
            figure(name, code, unit, per_step, effort);
        }
    }
}
