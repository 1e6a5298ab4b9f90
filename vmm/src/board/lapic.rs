//! One vCPU's local APIC, in xAPIC mode.
//!
//! Story: a vCPU reads and writes its registers at 0xfee00000; the bus ([`super::bus`]) brings it messages from
//! IOAPICs and other local APICs; the vCPU's loop asks what is deliverable and acknowledges it.
//!
//! Holds:
//! - BOARD-LAPIC-1: `acknowledge` returns only a vector that was in IRR, and moves it to ISR.
//! - BOARD-LAPIC-2: it does so only if the vector's class is above the processor priority, so ISR's highest
//!   vector always belongs to the interrupt in service that is the most recent and not yet ended.
//! - No vector below 16 is ever in IRR or ISR.
//!
//! Not here: x2APIC and TSC-deadline mode (CPUID does not offer them), EOI-broadcast suppression, another address
//! than 0xfee00000.
//!
//! See: Intel SDM vol. 3A, chapter 11.

use super::lapic_timer::ApicTimer;
use super::time::Nanos;
use super::vectors::VectorSet;

/// Version 0x14 with six LVT entries, as QEMU has it.
const VERSION: u32 = 0x0005_0014;
/// The first vector that an APIC may carry; those below are errors.
const VECTOR_MIN: u8 = 16;

/// Bits of IA32_APIC_BASE that a guest may set: BSP, the global enable, and the default address.
const BASE_BSP: u64 = 1 << 8;
const BASE_ENABLE: u64 = 1 << 11;
/// Where local APICs are, and stay.
pub(super) const BASE_ADDRESS: u64 = 0xfee0_0000;

const LVT_MASKED: u32 = 1 << 16;
const LVT_PERIODIC: u32 = 1 << 17;
const SVR_ENABLE: u32 = 1 << 8;

/// Bits of the error status register.
mod esr {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Entries of the local vector table, in the order of their registers from 0x320 on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lvt {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

impl Lvt {
    /// The entry whose register is at `offset`, 0x320..=0x370.
    fn at(offset: u32) -> Lvt {
        use Lvt::*;
        [Timer, Thermal, Performance, Lint0, Lint1, Error][((offset - 0x320) >> 4) as usize % 6]
    }

    /// Bits that software may write; delivery status and remote IRR are the hardware's.
    fn writable(self) -> u32 {
        match self {
            Lvt::Timer => LVT_PERIODIC | LVT_MASKED | 0xff,
            Lvt::Thermal | Lvt::Performance => LVT_MASKED | 0x7ff,
            Lvt::Lint0 | Lvt::Lint1 => LVT_MASKED | 0xa7ff,
            Lvt::Error => LVT_MASKED | 0xff,
        }
    }
}

/// How a message is to be delivered: bits 8..=10 of an ICR, a redirection entry or an LVT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    Reserved,
    Nmi,
    Init,
    StartUp,
    ExtInt,
}

impl DeliveryMode {
    /// Decodes bits 8..=10 of `register`.
    pub(super) fn of(register: u32) -> DeliveryMode {
        use DeliveryMode::*;
        [Fixed, LowestPriority, Smi, Reserved, Nmi, Init, StartUp, ExtInt][(register >> 8) as usize & 7]
    }
}

/// What other CPUs have asked of this one and the board cannot do itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    /// INIT: reset this vCPU to wait for a start-up, and tell the board with `init_vcpu`. Comes before `startup`.
    pub init: bool,
    /// Start-up: if this vCPU waits for one, it begins in real mode at `vector << 12`.
    pub startup: Option<u8>,
    /// A non-maskable interrupt.
    pub nmi: bool,
}

impl Signals {
    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Signals::default()
    }
}

/// What a register write asks of the rest of the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// A level-triggered interrupt ended: tell the IOAPICs.
    Eoi(u8),
    /// An interrupt command was written; the low half is given, the destination is [`Lapic::icr_destination`].
    Send(u32),
}

/// A local APIC.
#[derive(Clone, Debug)]
pub(super) struct Lapic {
    id: u8,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    lvt: [u32; 6],
    icr: [u32; 2],
    /// What a read of the ESR shows, and what has happened since it was last written.
    esr: u32,
    esr_pending: u32,
    timer: ApicTimer,
    lint0: bool,
    signals: Signals,
}

impl Lapic {
    /// A local APIC after power-up. `id` is also the vCPU's number; number 0 is the boot processor.
    pub(super) fn new(id: u8) -> Lapic {
        let bsp = if id == 0 { BASE_BSP } else { 0 };
        Lapic {
            id,
            base: BASE_ADDRESS | BASE_ENABLE | bsp,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            lvt: [LVT_MASKED; 6],
            icr: [0; 2],
            esr: 0,
            esr_pending: 0,
            timer: ApicTimer::new(),
            lint0: false,
            signals: Signals::default(),
        }
    }

    /// What INIT does: everything as after power-up but the ID and IA32_APIC_BASE. An NMI or start-up that has
    /// come since is kept.
    pub(super) fn init(&mut self) {
        let signals = Signals { init: false, ..self.signals };
        let lint0 = self.lint0;
        *self = Lapic { base: self.base, signals, lint0, ..Lapic::new(self.id) };
    }

    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE; false if the value is one that faults with #GP(0). Going through "disabled" resets
    /// the APIC.
    pub(super) fn set_base(&mut self, value: u64) -> bool {
        if value & !(BASE_ADDRESS | BASE_ENABLE | BASE_BSP) != 0 || value & !0xfff != BASE_ADDRESS {
            return false;
        }
        let was = self.present();
        self.base = value;
        if was && !self.present() {
            self.init();
        }
        true
    }

    /// Globally enabled in IA32_APIC_BASE.
    pub(super) fn present(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    /// Enabled by software in the spurious-interrupt register as well.
    pub(super) fn enabled(&self) -> bool {
        self.present() && self.svr & SVR_ENABLE != 0
    }

    fn lvt(&self, which: Lvt) -> u32 {
        self.lvt[which as usize]
    }

    /// True if the 8259's output reaches this CPU as INTR. While the APIC is disabled either way, the boot
    /// processor's LINT0 pin is INTR, so that a kernel which knows the 8259 alone works without touching it.
    pub(super) fn accepts_extint(&self) -> bool {
        if !self.enabled() {
            return self.id == 0;
        }
        let lint0 = self.lvt(Lvt::Lint0);
        lint0 & LVT_MASKED == 0 && DeliveryMode::of(lint0) == DeliveryMode::ExtInt
    }

    /// True if a message for `destination` is meant for this APIC.
    pub(super) fn matches(&self, destination: u8, logical: bool) -> bool {
        if !self.present() {
            return false;
        }
        if destination == 0xff || !logical {
            return destination == 0xff || destination == self.id;
        }
        let mine = (self.ldr >> 24) as u8;
        match self.dfr >> 28 {
            0xf => mine & destination != 0,
            0 => mine >> 4 == destination >> 4 && mine & destination & 0xf != 0,
            _ => false,
        }
    }

    /// The class (0..=15) that arbitration for lowest priority compares: of the task, or of what it has pending or
    /// in service.
    pub(super) fn arbitration_priority(&self) -> u8 {
        let highest = self.irr.highest().max(self.isr.highest()).unwrap_or(0);
        self.tpr.max(highest) >> 4
    }

    /// The processor priority register.
    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// Takes an interrupt message. True if it was accepted (an already pending vector absorbs it).
    pub(super) fn accept(&mut self, vector: u8, level_triggered: bool) -> bool {
        if vector < VECTOR_MIN {
            self.error(esr::RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        if !self.enabled() {
            return false;
        }
        self.irr.insert(vector);
        self.tmr.set(vector, level_triggered);
        true
    }

    /// Takes a message of any kind. True if it was accepted.
    pub(super) fn deliver(&mut self, mode: DeliveryMode, vector: u8, level_triggered: bool) -> bool {
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                return self.accept(vector, level_triggered);
            }
            DeliveryMode::Nmi => self.signals.nmi = true,
            DeliveryMode::Init => self.signals = Signals { init: true, ..Signals::default() },
            DeliveryMode::StartUp => self.signals.startup = Some(vector),
            // No system-management mode, and the 8259 is reached through LINT0 alone.
            DeliveryMode::Smi | DeliveryMode::ExtInt | DeliveryMode::Reserved => return false,
        }
        true
    }

    pub(super) fn signals(&self) -> Signals {
        self.signals
    }

    pub(super) fn take_signals(&mut self) -> Signals {
        std::mem::take(&mut self.signals)
    }

    /// True if `vector` waits in IRR, so that another of it would change nothing.
    pub(super) fn pending(&self, vector: u8) -> bool {
        self.irr.contains(vector)
    }

    /// The interrupt that the CPU would be given now.
    pub(super) fn deliverable(&self) -> Option<u8> {
        if !self.enabled() {
            return None;
        }
        self.irr.highest().filter(|vector| vector >> 4 > self.ppr() >> 4)
    }

    /// Gives the CPU its interrupt: from IRR to ISR.
    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        Some(vector)
    }

    /// The 8259's output, wired to LINT0. Only edges matter here: ExtINT is asked for by level.
    pub(super) fn set_lint0(&mut self, level: bool) {
        let rising = level && !self.lint0;
        self.lint0 = level;
        if rising {
            self.deliver_local(Lvt::Lint0);
        }
    }

    fn deliver_local(&mut self, which: Lvt) {
        let entry = self.lvt(which);
        if entry & LVT_MASKED != 0 || !self.enabled() {
            return;
        }
        let mode = match which {
            Lvt::Timer | Lvt::Error => DeliveryMode::Fixed,
            _ => DeliveryMode::of(entry),
        };
        match mode {
            DeliveryMode::Fixed | DeliveryMode::Nmi => {
                self.deliver(mode, entry as u8, false);
            }
            _ => {}
        }
    }

    /// Notes an error, and raises the error interrupt when it is the first of its kind since the ESR was written.
    /// An illegal vector in the error entry itself is noted and goes no further.
    fn error(&mut self, bit: u32) {
        if self.esr_pending & bit != 0 {
            return;
        }
        self.esr_pending |= bit;
        if self.lvt(Lvt::Error) as u8 >= VECTOR_MIN {
            self.deliver_local(Lvt::Error);
        } else if self.lvt(Lvt::Error) & LVT_MASKED == 0 {
            self.esr_pending |= esr::RECEIVE_ILLEGAL_VECTOR;
        }
    }

    /// An interrupt command that this APIC may not send as it is.
    pub(super) fn refuse_to_send(&mut self) {
        self.error(esr::SEND_ILLEGAL_VECTOR);
    }

    /// The destination field of the interrupt command register.
    pub(super) fn icr_destination(&self) -> u8 {
        (self.icr[1] >> 24) as u8
    }

    /// Moves the timer to `now`.
    pub(super) fn advance(&mut self, now: Nanos) {
        let periodic = self.lvt(Lvt::Timer) & LVT_PERIODIC != 0;
        if self.timer.advance(now, periodic) {
            self.deliver_local(Lvt::Timer);
        }
    }

    /// When the timer will next change something that the CPU can notice by itself. A masked timer, or one whose
    /// interrupt is pending already, has nothing to say.
    pub(super) fn next_deadline(&self) -> Option<Nanos> {
        let entry = self.lvt(Lvt::Timer);
        let silent = entry & LVT_MASKED != 0 || !self.enabled() || self.irr.contains(entry as u8);
        if silent || (entry as u8) < VECTOR_MIN { None } else { self.timer.expiry() }
    }

    /// Reads the register at `offset` (0..0x1000), 32 bits. [`Lapic::advance`] to `now` comes first.
    pub(super) fn read(&mut self, now: Nanos, offset: u32) -> u32 {
        match offset & !0xf {
            0x020 => u32::from(self.id) << 24,
            0x030 => VERSION,
            0x080 => u32::from(self.tpr),
            0x090 => u32::from(self.arbitration_priority()) << 4,
            0x0a0 => u32::from(self.ppr()),
            0x0b0 | 0x0c0 => 0,
            0x0d0 => self.ldr,
            0x0e0 => self.dfr,
            0x0f0 => self.svr,
            at @ 0x100..=0x170 => self.isr.word((at >> 4) as usize & 7),
            at @ 0x180..=0x1f0 => self.tmr.word((at >> 4) as usize & 7),
            at @ 0x200..=0x270 => self.irr.word((at >> 4) as usize & 7),
            0x280 => self.esr,
            0x300 => self.icr[0],
            0x310 => self.icr[1],
            at @ 0x320..=0x370 => self.lvt(Lvt::at(at)),
            0x380 => self.timer.initial(),
            0x390 => self.timer.current(now),
            0x3e0 => self.timer.divide(),
            _ => {
                self.error(esr::ILLEGAL_REGISTER);
                0
            }
        }
    }

    /// Writes the register at `offset` (0..0x1000), 32 bits. [`Lapic::advance`] to `now` comes first.
    pub(super) fn write(&mut self, now: Nanos, offset: u32, value: u32) -> Effect {
        match offset & !0xf {
            0x080 => self.tpr = value as u8,
            0x0b0 => return self.end_of_interrupt(),
            0x0d0 => self.ldr = value & 0xff00_0000,
            0x0e0 => self.dfr = value | 0x0fff_ffff,
            0x0f0 => self.write_svr(value),
            0x280 => self.esr = std::mem::take(&mut self.esr_pending),
            0x300 => {
                self.icr[0] = value & 0x000c_cfff;
                return Effect::Send(self.icr[0]);
            }
            0x310 => self.icr[1] = value & 0xff00_0000,
            at @ 0x320..=0x370 => self.write_lvt(Lvt::at(at), value),
            0x380 => self.timer.start(now, value),
            0x3e0 => self.timer.set_divide(now, value),
            // Read-only: ID (its number is the vCPU's), version, priorities, IRR, ISR, TMR, current count.
            0x020 | 0x030 | 0x090..=0x0a0 | 0x0c0 | 0x100..=0x270 | 0x390 => {}
            _ => self.error(esr::ILLEGAL_REGISTER),
        }
        Effect::None
    }

    fn write_lvt(&mut self, which: Lvt, value: u32) {
        let forced = if self.enabled() { 0 } else { LVT_MASKED };
        self.lvt[which as usize] = value & which.writable() | forced;
    }

    /// Disabling by software masks the whole local vector table.
    fn write_svr(&mut self, value: u32) {
        self.svr = value & 0x3ff;
        if !self.enabled() {
            self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
        }
    }

    fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.remove(vector);
        if self.tmr.contains(vector) { Effect::Eoi(vector) } else { Effect::None }
    }
}
