//! The ways out: debug exit, resets, power-off.
//!
//! Story: a guest ends its run by a value at port 0xf4 (QEMU's isa-debug-exit), asks for a reset through the reset
//! control register (0xcf9), the keyboard controller, port 0x92 or the ACPI device, or for power-off through the
//! latter. The first wish is kept until it is taken.
//!
//! Holds: address line 20 is always on; a guest may ask for it off and will read that it is on.
//!
//! Not here: a keyboard. The controller answers what kernels ask of it while they look for one.

/// How a guest asked for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetCause {
    /// Port 0xcf9, bit 2.
    ControlRegister,
    /// Command 0xfe at port 0x64, or the reset bit of the controller's output port.
    KeyboardController,
    /// Port 0x92, bit 0.
    Port92,
    /// 0x42 at the ACPI device's reset register.
    Acpi,
}

/// Why the board wants the run to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoardExit {
    /// The value written to port 0xf4, zero-extended.
    DebugExit(u32),
    /// The guest wants to be reset.
    ResetRequested {
        /// By which door.
        by: ResetCause,
    },
    /// The guest has shut itself down.
    PowerOff,
}

/// What the keyboard controller's data port expects next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Nothing,
    CommandByte,
    OutputPort,
}

/// Status: data is there to be read; self-test passed; the last write was a command; not locked.
const STATUS_DATA: u8 = 0x01;
const STATUS_SELF_TEST: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
/// The controller's output port: not resetting, address line 20 on.
const OUTPUT_PORT: u8 = 0x03;

/// All of it.
#[derive(Clone, Debug)]
pub(super) struct Exits {
    wish: Option<BoardExit>,
    reset_control: u8,
    data: Option<u8>,
    last_data: u8,
    command_byte: u8,
    expect: Expect,
    last_was_command: bool,
}

impl Exits {
    pub(super) fn new() -> Exits {
        Exits {
            wish: None,
            reset_control: 0,
            data: None,
            last_data: 0,
            command_byte: 0x65,
            expect: Expect::Nothing,
            last_was_command: false,
        }
    }

    pub(super) fn take(&mut self) -> Option<BoardExit> {
        self.wish.take()
    }

    pub(super) fn is_wished(&self) -> bool {
        self.wish.is_some()
    }

    pub(super) fn wish(&mut self, exit: BoardExit) {
        self.wish.get_or_insert(exit);
    }

    fn reset(&mut self, by: ResetCause) {
        self.wish(BoardExit::ResetRequested { by });
    }

    /// Reads port 0x60, 0x64, 0x92 or 0xcf9.
    pub(super) fn read(&mut self, port: u16) -> u8 {
        match port {
            0x60 => {
                self.last_data = self.data.take().unwrap_or(self.last_data);
                self.last_data
            }
            0x64 => self.status(),
            0x92 => 0x02,
            _ => self.reset_control,
        }
    }

    fn status(&self) -> u8 {
        let flag = |on, bit| if on { bit } else { 0 };
        STATUS_SELF_TEST
            | STATUS_UNLOCKED
            | flag(self.data.is_some(), STATUS_DATA)
            | flag(self.last_was_command, STATUS_COMMAND)
    }

    /// Writes port 0x60, 0x64, 0x92 or 0xcf9.
    pub(super) fn write(&mut self, port: u16, value: u8) {
        match port {
            0x60 => self.write_data(value),
            0x64 => self.write_command(value),
            0x92 if value & 1 != 0 => self.reset(ResetCause::Port92),
            0x92 => {}
            _ => {
                // Bit 1 chooses the kind of reset and is kept, bit 2 does it.
                self.reset_control = value & 0x0a;
                if value & 4 != 0 {
                    self.reset(ResetCause::ControlRegister);
                }
            }
        }
    }

    fn write_command(&mut self, value: u8) {
        self.last_was_command = true;
        self.expect = Expect::Nothing;
        match value {
            0x20 => self.data = Some(self.command_byte),
            0x60 => self.expect = Expect::CommandByte,
            0xaa => self.data = Some(0x55),
            // The keyboard's lines are in order.
            0xab => self.data = Some(0x00),
            0xad => self.command_byte |= 0x10,
            0xae => self.command_byte &= !0x10,
            0xd0 => self.data = Some(OUTPUT_PORT),
            0xd1 => self.expect = Expect::OutputPort,
            // Pulses the output port's bits that are clear; bit 0 is the CPU's reset.
            0xf0..=0xff if value & 1 == 0 => self.reset(ResetCause::KeyboardController),
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.last_was_command = false;
        match std::mem::replace(&mut self.expect, Expect::Nothing) {
            Expect::CommandByte => self.command_byte = value,
            Expect::OutputPort if value & 1 == 0 => self.reset(ResetCause::KeyboardController),
            // To the keyboard, and there is none.
            Expect::OutputPort | Expect::Nothing => {}
        }
    }

    /// Writes byte `offset` of the ACPI device's registers: sleep control, sleep status, reset.
    pub(super) fn write_acpi(&mut self, offset: u32, value: u8) {
        match (offset, value) {
            // Sleep enable, and sleep type 5.
            (0, value) if value & 0x20 != 0 && value >> 2 & 7 == 5 => self.wish(BoardExit::PowerOff),
            (2, 0x42) => self.reset(ResetCause::Acpi),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_door_to_reset_says_which_it_was() {
        let doors: [(&[(u16, u8)], ResetCause); 5] = [
            (&[(0xcf9, 0x02), (0xcf9, 0x06)], ResetCause::ControlRegister),
            (&[(0x64, 0xfe)], ResetCause::KeyboardController),
            (&[(0x64, 0xd1), (0x60, 0x02)], ResetCause::KeyboardController),
            (&[(0x64, 0xf0)], ResetCause::KeyboardController),
            (&[(0x92, 0x03)], ResetCause::Port92),
        ];
        for (writes, by) in doors {
            let mut exits = Exits::new();
            writes.iter().for_each(|&(port, value)| exits.write(port, value));
            assert_eq!(exits.take(), Some(BoardExit::ResetRequested { by }));
            assert_eq!(exits.take(), None);
        }
    }

    #[test]
    fn what_is_no_reset_is_none() {
        let mut exits = Exits::new();
        for (port, value) in
            [(0xcf9, 0x02), (0x64, 0xff), (0x92, 0x02), (0x64, 0xd1), (0x60, 0x03), (0x60, 0xfe)]
        {
            exits.write(port, value);
            assert_eq!(exits.take(), None, "{port:#x} {value:#x}");
        }
        assert_eq!((exits.read(0xcf9), exits.read(0x92)), (0x02, 0x02));
    }

    #[test]
    fn acpi_device_powers_off_and_resets() {
        let mut exits = Exits::new();
        exits.write_acpi(0, 0x14);
        exits.write_acpi(0, 0x20);
        exits.write_acpi(2, 0x41);
        assert_eq!(exits.take(), None);
        exits.write_acpi(0, 0x34);
        exits.write_acpi(2, 0x42);
        assert_eq!(exits.take(), Some(BoardExit::PowerOff), "the first wish counts");
        exits.write_acpi(2, 0x42);
        assert_eq!(exits.take(), Some(BoardExit::ResetRequested { by: ResetCause::Acpi }));
    }

    #[test]
    fn keyboard_controller_answers_a_probe() {
        let mut exits = Exits::new();
        assert_eq!(exits.read(0x64), 0x14);
        exits.write(0x64, 0xaa);
        assert_eq!(exits.read(0x64), 0x1d);
        assert_eq!((exits.read(0x60), exits.read(0x60)), (0x55, 0x55), "the latch keeps its last byte");
        assert_eq!(exits.read(0x64), 0x1c);
        exits.write(0x64, 0x60);
        exits.write(0x60, 0x47);
        exits.write(0x64, 0xad);
        exits.write(0x64, 0x20);
        assert_eq!(exits.read(0x60), 0x57);
    }
}
