//! The APIC bus: all local APICs, and how a message finds those it is meant for.
//!
//! Story: an IOAPIC pin, an interrupt command or an end of interrupt becomes a message here; the message reaches
//! every local APIC that its destination matches, or one of them when it asks for the lowest priority.
//!
//! Holds: INIT, start-up and NMI change nothing here but the target's [`Signals`]; whoever runs the vCPU takes
//! and obeys them.
//!
//! See: Intel SDM vol. 3A, 11.6.2 (determining the destination).

use super::lapic::{DeliveryMode, Effect, Lapic, Signals};
use super::time::Nanos;

/// An interrupt on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) mode: DeliveryMode,
    pub(super) vector: u8,
    pub(super) level_triggered: bool,
    /// An APIC ID, or a set of logical ones.
    pub(super) destination: u8,
    pub(super) logical: bool,
}

/// Whom an interrupt command means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shorthand {
    None,
    Itself,
    All,
    Others,
}

/// The local APICs, by vCPU number.
pub(super) struct ApicBus {
    lapics: Vec<Lapic>,
    /// Interrupt commands that were carried out.
    pub(super) ipis_sent: u64,
}

impl ApicBus {
    /// `vcpus` local APICs (1..=64) after power-up, each with its vCPU's number for an ID.
    pub(super) fn new(vcpus: usize) -> ApicBus {
        ApicBus { lapics: (0..vcpus).map(|id| Lapic::new(id as u8)).collect(), ipis_sent: 0 }
    }

    pub(super) fn lapic(&self, vcpu: usize) -> Option<&Lapic> {
        self.lapics.get(vcpu)
    }

    pub(super) fn lapic_mut(&mut self, vcpu: usize) -> Option<&mut Lapic> {
        self.lapics.get_mut(vcpu)
    }

    pub(super) fn lapics(&self) -> &[Lapic] {
        &self.lapics
    }

    /// Moves all timers to `now`.
    pub(super) fn advance(&mut self, now: Nanos) {
        self.lapics.iter_mut().for_each(|lapic| lapic.advance(now));
    }

    pub(super) fn next_deadline(&self) -> Option<Nanos> {
        self.lapics.iter().filter_map(Lapic::next_deadline).min()
    }

    /// The 8259's output changed.
    pub(super) fn set_lint0(&mut self, level: bool) {
        self.lapics.iter_mut().for_each(|lapic| lapic.set_lint0(level));
    }

    /// Delivers a message. True if at least one local APIC accepted it.
    pub(super) fn send(&mut self, message: Message) -> bool {
        let Message { mode, vector, level_triggered, destination, logical } = message;
        if mode == DeliveryMode::LowestPriority {
            let target = self
                .lapics
                .iter_mut()
                .filter(|lapic| lapic.enabled() && lapic.matches(destination, logical))
                .min_by_key(|lapic| lapic.arbitration_priority());
            return target.is_some_and(|lapic| lapic.deliver(mode, vector, level_triggered));
        }
        let mut accepted = false;
        for lapic in self.lapics.iter_mut().filter(|lapic| lapic.matches(destination, logical)) {
            accepted |= lapic.deliver(mode, vector, level_triggered);
        }
        accepted
    }

    /// True if [`ApicBus::send`] of a fixed message would find a target that does not have it pending already.
    pub(super) fn would_matter(&self, message: Message) -> bool {
        let lapics = self.lapics.iter();
        let mut targets = lapics.filter(|lapic| lapic.matches(message.destination, message.logical));
        match message.mode {
            DeliveryMode::Fixed => targets.any(|lapic| !lapic.pending(message.vector)),
            _ => targets.next().is_some(),
        }
    }

    /// Writes a local APIC's register; an interrupt command is carried out. Returns the vector of a
    /// level-triggered interrupt that ended, for the IOAPICs.
    pub(super) fn write(&mut self, now: Nanos, vcpu: usize, offset: u32, value: u32) -> Option<u8> {
        match self.lapics.get_mut(vcpu)?.write(now, offset, value) {
            Effect::None => None,
            Effect::Eoi(vector) => Some(vector),
            Effect::Send(command) => {
                self.send_command(vcpu, command);
                None
            }
        }
    }

    /// Carries out an interrupt command of `from`.
    fn send_command(&mut self, from: usize, command: u32) {
        use Shorthand::*;
        let mode = DeliveryMode::of(command);
        let vector = command as u8;
        let deassert = command & (1 << 14) == 0;
        let shorthand = [None, Itself, All, Others][(command >> 18) as usize & 3];
        let has_vector = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        // "INIT level de-assert" only synchronised arbitration IDs, which nobody has had since the Pentium 4.
        if mode == DeliveryMode::Init && deassert {
            return;
        }
        if has_vector && vector < 16 {
            return self.lapics[from].refuse_to_send();
        }
        self.ipis_sent += 1;
        let message = Message {
            mode,
            vector,
            level_triggered: false,
            destination: self.lapics[from].icr_destination(),
            logical: command & (1 << 11) != 0,
        };
        match shorthand {
            None => {
                self.send(message);
            }
            Itself if has_vector => {
                self.lapics[from].deliver(mode, vector, false);
            }
            Itself => {}
            All | Others => self.send_to_all(message, (shorthand == Others).then_some(from)),
        }
    }

    fn send_to_all(&mut self, message: Message, except: Option<usize>) {
        for (number, lapic) in self.lapics.iter_mut().enumerate() {
            if Some(number) != except && lapic.present() {
                lapic.deliver(message.mode, message.vector, false);
            }
        }
    }

    pub(super) fn take_signals(&mut self, vcpu: usize) -> Signals {
        self.lapics.get_mut(vcpu).map(Lapic::take_signals).unwrap_or_default()
    }
}
