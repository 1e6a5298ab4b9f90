//! A bus that writes down what an instruction does to the machine, makes it wait at a chosen call, and judges
//! INV-INTERP-1: what does not complete has changed nothing.

use umbra::cpu::{CpuState, eflags};
use umbra::interp::{Bus, BusError, Delivered, Exception, Step, Width, decode, vector};
use umbra_mmu::{Access, Gva};

/// More calls than any step makes: some thousand iterations of a string instruction, of a few calls each.
const CALLS_MAX: u32 = 20_000;
/// Attempts of one delivery: the event, a fault of it, a double fault; and a page fault on the way to any but the last.
const ATTEMPTS_MAX: usize = 4;
/// The most slots of a frame: a call gate's 31 parameters and four registers.
const FRAME_MAX: usize = 35;
/// MXCSR's exception flags.
const SIMD_FLAGS: u32 = 0x3f;
const PAGE_BYTES: u32 = 4096;
/// ECX and its kin in `CpuState::gpr`.
const ECX: usize = 1;

/// Something done to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Write,
    /// A read-modify-write, with old and new value.
    Update(Gva, Width, u64, u64),
    /// IN, OUT or INVLPG.
    Outside,
}

/// A bus around another.
pub struct Journal<'a, B> {
    bus: &'a mut B,
    /// The call, counted from here, that answers `Again` although the other bus would not.
    again_in: Option<u32>,
    /// Repeated string instructions do not wait.
    spares_repeats: bool,
    calls: u32,
    effects: Vec<Effect>,
    /// The last call was `set_paging`, and it was refused.
    paging_refused: bool,
    /// `set_paging` has succeeded: nothing may follow.
    committed: bool,
    /// The first bytes that were fetched.
    code: Vec<u8>,
    /// Pages probed: writes to them do not wait.
    probed: Vec<Gva>,
}

impl<'a, B: Bus> Journal<'a, B> {
    /// An empty journal.
    pub fn new(bus: &'a mut B, again_in: Option<u32>) -> Journal<'a, B> {
        Journal {
            bus,
            again_in,
            spares_repeats: false,
            calls: 0,
            effects: Vec::new(),
            paging_refused: false,
            committed: false,
            code: Vec::new(),
            probed: Vec::new(),
        }
    }

    /// Lets no repeated string instruction wait: where it is interrupted by that decides how many steps it takes.
    pub fn sparing_repeats(self) -> Self {
        Journal { spares_repeats: true, ..self }
    }

    /// Before each call of the bus.
    fn count(&mut self) {
        assert!(!self.committed, "a bus call after paging was set");
        self.calls += 1;
        assert!(self.calls < CALLS_MAX, "an instruction does not end");
        self.paging_refused = false;
    }

    /// Before each call that may fail.
    fn call(&mut self) -> Result<(), BusError> {
        self.count();
        match &mut self.again_in {
            Some(0) if self.spares_repeats && is_repeated(&self.code) => Ok(()),
            Some(0) => Err(BusError::Again),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// True where every update is that of a descriptor's A bit in a table of `cpu`.
    fn sets_accessed_bits_only(&self, cpu: &CpuState, effects: &[Effect]) -> bool {
        let tables = [(cpu.gdtr.base, u32::from(cpu.gdtr.limit)), (cpu.ldtr.base, cpu.ldtr.limit)];
        effects.iter().all(|effect| match *effect {
            Effect::Update(gva, Width::B1, old, new) => {
                new == old | 1 && tables.iter().any(|(base, limit)| gva.0.wrapping_sub(*base) <= *limit)
            }
            _ => false,
        })
    }

    /// Panics unless what was done is nothing, or one of the things that an instruction that did not complete may do.
    fn check_traces(&self, before: &CpuState, attempts: usize) {
        let (writes, updates): (Vec<_>, Vec<_>) =
            self.effects.iter().partition(|effect| matches!(effect, Effect::Write));
        assert!(self.sets_accessed_bits_only(before, &updates), "not A bits: {updates:x?}");
        // A frame is pushed, to where nothing is in use, before the privilege changes; that may fail.
        assert!(writes.is_empty() || self.paging_refused || attempts > 1, "stores of what did not complete");
        assert!(writes.len() <= attempts * FRAME_MAX);
    }

    /// Judges a step that went from `before` to `after`.
    pub fn judge_step(&self, before: &CpuState, after: &CpuState, step: &Step) {
        match step {
            Step::Done | Step::Halted => return,
            Step::Exception(exception) if is_trap(before, exception) => return,
            _ => {}
        }
        let mut expected = before.clone();
        if let Step::Exception(exception) = step {
            // What silicon changes too: DR6; MXCSR's flags; the end of NMI blocking by an IRET that faults.
            expected.nmi_blocked &= after.nmi_blocked;
            if exception.vector == vector::DB {
                expected.dr[6] |= after.dr[6] & 0xe00f;
            }
            if matches!(exception.vector, vector::XM | vector::UD) {
                expected.fpu.raise_simd(after.fpu.mxcsr() & SIMD_FLAGS);
            }
        }
        let iterations = self.iterations(before, after);
        if iterations == 0 {
            assert_eq!(expected, *after, "{step:?} of {:02x?} has changed the CPU", self.code);
            return self.check_traces(before, 1);
        }
        for register in [0, ECX, 6, 7] {
            expected.gpr[register] = after.gpr[register];
        }
        let compared = 0xcd5 & !eflags::DF;
        expected.eflags = expected.eflags & !compared | after.eflags & compared;
        assert_eq!(expected, *after, "{step:?} has changed more than a string instruction's registers");
        // An iteration has at most two effects: a port and a store.
        assert!(
            self.effects.len() <= 2 * iterations as usize,
            "stores of an iteration that did not complete"
        );
    }

    /// Finished iterations, of a string instruction.
    fn iterations(&self, before: &CpuState, after: &CpuState) -> u32 {
        let done = before.gpr[ECX].wrapping_sub(after.gpr[ECX]) & 0xffff;
        if is_repeated(&self.code) { done } else { 0 }
    }

    /// Judges a delivery that went from `before` to `after`.
    pub fn judge_delivery(&self, before: &CpuState, after: &CpuState, delivered: &Delivered) {
        let frames = self.effects.iter().filter(|effect| !matches!(effect, Effect::Update(..))).count();
        match delivered {
            Delivered::Handler => {
                assert!(frames >= 3 && frames <= ATTEMPTS_MAX * 6, "{frames} slots in frames");
                let code = after.segment(umbra::cpu::Seg::Cs);
                assert!(!after.protected() || after.eip <= code.limit, "a handler outside its segment");
                assert!(!after.halted && !after.interrupt_shadow);
                assert_eq!(after.eflags & (eflags::TF | eflags::RF | eflags::VM), 0, "a handler's flags");
                return;
            }
            Delivered::TripleFault => {
                assert_eq!(CpuState { cr2: after.cr2, ..before.clone() }, *after, "a triple fault");
            }
            Delivered::Again | Delivered::Unknown(_) => {
                assert_eq!(before, after, "{delivered:?} has changed the CPU");
            }
        }
        self.check_traces(before, ATTEMPTS_MAX);
    }
}

/// True for a string instruction with REP or REPNE, whose encodings are the same in 16-bit and 32-bit code.
fn is_repeated(code: &[u8]) -> bool {
    decode(code, true, 0)
        .is_ok_and(|i| i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix()))
}

/// A #DB that follows an instruction which has retired.
fn is_trap(before: &CpuState, exception: &Exception) -> bool {
    let traced = before.eflags & eflags::TF != 0 || before.dr[7] & 0xff != 0;
    exception.vector == vector::DB && traced
}

impl<B: Bus> Bus for Journal<'_, B> {
    fn read(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError> {
        self.call()?;
        self.bus.read(gva, width, access)
    }

    fn write(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError> {
        let last = gva.wrapping_add(width.bytes() - 1);
        if [gva, last].iter().all(|at| self.probed.contains(&at.page())) {
            self.count();
        } else {
            self.call()?;
        }
        self.bus.write(gva, width, value, access)?;
        self.effects.push(Effect::Write);
        Ok(())
    }

    fn update(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        self.call()?;
        let mut new = 0;
        let old = self.bus.update(gva, width, user, &mut |old| {
            new = change(old);
            new
        })?;
        self.effects.push(Effect::Update(gva, width, old, new));
        Ok(old)
    }

    fn probe(&mut self, gva: Gva, length: u32, access: Access) -> Result<(), BusError> {
        self.call()?;
        self.bus.probe(gva, length, access)?;
        for page in [gva.page(), gva.wrapping_add(length.max(1) - 1).page()] {
            if !self.probed.contains(&page) {
                self.probed.push(page);
            }
        }
        Ok(())
    }

    fn fill(&mut self, gva: Gva, width: Width, value: u64, count: u32, user: bool) -> bool {
        self.count();
        assert!(gva.offset() + count * width.bytes() <= PAGE_BYTES, "a fill over a page's end");
        let made = self.bus.fill(gva, width, value, count, user);
        self.effects.extend(std::iter::repeat_n(Effect::Write, if made { count as usize } else { 0 }));
        made
    }

    fn copy(&mut self, from: Gva, to: Gva, length: u32, user: bool) -> bool {
        self.count();
        assert!(from.offset().max(to.offset()) + length <= PAGE_BYTES, "a copy over a page's end");
        let made = self.bus.copy(from, to, length, user);
        self.effects.extend(std::iter::repeat_n(Effect::Write, usize::from(made)));
        made
    }

    fn fetch(&mut self, gva: Gva, user: bool, buffer: &mut [u8]) -> Result<usize, BusError> {
        self.call()?;
        let length = self.bus.fetch(gva, user, buffer)?;
        assert!(length >= 1 && length <= buffer.len());
        // A second fetch is for the rest; one to describe what is unknown begins anew.
        if self.code.len() < 15 {
            self.code.extend(&buffer[..length]);
        }
        Ok(length)
    }

    fn port_in(&mut self, port: u16, width: Width) -> u32 {
        self.count();
        self.effects.push(Effect::Outside);
        self.bus.port_in(port, width)
    }

    fn port_out(&mut self, port: u16, width: Width, value: u32) {
        self.count();
        self.effects.push(Effect::Outside);
        self.bus.port_out(port, width, value);
    }

    fn invalidate_page(&mut self, gva: Gva) {
        self.count();
        self.effects.push(Effect::Outside);
        self.bus.invalidate_page(gva);
    }

    fn set_paging(&mut self, new: &CpuState, flush: bool) -> Result<(), BusError> {
        let result = self.call().and_then(|()| self.bus.set_paging(new, flush));
        self.paging_refused = result.is_err();
        self.committed = result.is_ok();
        result
    }

    fn set_apic_base(&mut self, value: u64) -> bool {
        self.count();
        let taken = self.bus.set_apic_base(value);
        self.effects.extend(std::iter::repeat_n(Effect::Outside, usize::from(taken)));
        taken
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32, cpu: &CpuState) -> [u32; 4] {
        self.count();
        self.bus.cpuid(leaf, subleaf, cpu)
    }

    fn tsc(&mut self) -> u64 {
        self.count();
        self.bus.tsc()
    }

    fn want_fpu(&mut self) -> Result<(), BusError> {
        self.call()?;
        self.bus.want_fpu()
    }
}
