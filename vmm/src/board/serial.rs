//! The serial port at 0x3f8: vm-superio's 16550, with an interrupt line of our own.
//!
//! Story: what the guest sends goes to the sink at once. What an operator types waits in a queue and is handed to
//! the UART one byte at a time, as a UART without a FIFO would receive it, so that each byte raises the line.
//!
//! Holds: the line (IRQ 4) is up exactly while an enabled interrupt is pending, whatever the order in which the
//! guest enables, reads and acknowledges.
//!
//! Limits: a sink that fails loses the byte and is counted; it never stops the guest. A sink that blocks, blocks.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::Write;

use vm_superio::Trigger;
use vm_superio::serial::{Error, NoEvents, Serial};

/// Input bytes that may wait for the guest.
const INPUT_BYTES_MAX: usize = 4096;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const INTERRUPT_IDENTIFICATION: u8 = 2;
const FIFO_CONTROL: u8 = 2;
/// FIFO control: FIFOs on. Interrupt identification: they are.
const FIFO_ENABLE: u8 = 0x01;
const FIFOS_ON: u8 = 0xc0;
/// Bits of the interrupt identification as vm-superio keeps them.
const RECEIVED: u8 = 0b100;
const SENT: u8 = 0b010;

/// What the interrupt identification shows when there is none.
const NONE_PENDING: u8 = 0b001;
const ENABLE_RECEIVED: u8 = 0b01;
const ENABLE_SENT: u8 = 0b10;
const LINE_CONTROL: u8 = 3;
/// Line control: the first two registers are the divisor.
const DIVISOR_LATCH: u8 = 0x80;

/// The bits of the interrupt identification that `enables` lets through.
fn enabled_interrupts(enables: u8) -> u8 {
    let received = if enables & ENABLE_RECEIVED != 0 { RECEIVED } else { 0 };
    let sent = if enables & ENABLE_SENT != 0 { SENT } else { 0 };
    received | sent
}

/// The line is computed from the UART's state; its own signal is not needed.
struct NoTrigger;

impl Trigger for NoTrigger {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// A UART, its sink and its input queue.
pub(super) struct Uart {
    serial: Serial<NoTrigger, NoEvents, Box<dyn Write + Send>>,
    input: VecDeque<u8>,
    /// What the guest last wrote to FIFO control said so. There are no FIFOs, but drivers tell a 16550A by the bits
    /// that answer.
    fifos_on: bool,
    /// Bytes that the sink did not take.
    pub(super) lost: u64,
}

impl Uart {
    pub(super) fn new(sink: Box<dyn Write + Send>) -> Uart {
        Uart { serial: Serial::new(NoTrigger, sink), input: VecDeque::new(), fifos_on: false, lost: 0 }
    }

    /// The same port after a reset of the machine: registers as new, sink and waiting input kept.
    pub(super) fn reset(&mut self) {
        let sink = std::mem::replace(self.serial.writer_mut(), Box::new(std::io::sink()));
        self.serial = Serial::new(NoTrigger, sink);
        self.fifos_on = false;
        self.receive();
    }

    /// Queues input and returns how much of it was taken; the rest is for later.
    pub(super) fn queue(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(INPUT_BYTES_MAX - self.input.len());
        self.input.extend(&bytes[..taken]);
        self.receive();
        taken
    }

    /// Hands the UART the next byte once it holds none.
    fn receive(&mut self) {
        let empty = self.serial.state().in_buffer.is_empty();
        if let Some(&byte) = self.input.front().filter(|_| empty) {
            // In loop-back mode nothing is received.
            if self.serial.enqueue_raw_bytes(&[byte]).is_ok_and(|taken| taken == 1) {
                self.input.pop_front();
            }
        }
    }

    /// The interrupt line, IRQ 4.
    pub(super) fn output(&self) -> bool {
        let state = self.serial.state();
        state.interrupt_identification & enabled_interrupts(state.interrupt_enable) != 0
    }

    /// Reads register `offset`, 0..=7.
    pub(super) fn read(&mut self, offset: u8) -> u8 {
        let value = self.serial.read(offset);
        match offset {
            INTERRUPT_IDENTIFICATION => self.identify(value),
            DATA => {
                self.receive();
                value
            }
            _ => value,
        }
    }

    /// Shows the most urgent pending and enabled interrupt alone, as the chip does, where vm-superio shows all and
    /// forgets them. Reading ends "sent"; "received" lasts until the data is read.
    fn identify(&mut self, value: u8) -> u8 {
        let state = self.serial.state();
        let pending = value & enabled_interrupts(state.interrupt_enable);
        if pending & RECEIVED != 0 && (pending & SENT != 0 || state.interrupt_enable & ENABLE_SENT == 0) {
            self.raise_again(state.interrupt_enable, state.line_control);
        }
        let shown = match pending {
            0 => NONE_PENDING,
            SENT => SENT,
            _ => RECEIVED,
        };
        shown | if self.fifos_on { FIFOS_ON } else { 0 }
    }

    /// Writes the interrupt enables again, which raises what they enable: right for data that is still there, and
    /// for "sent" only if it was pending too.
    fn raise_again(&mut self, enables: u8, line_control: u8) {
        self.write_register(LINE_CONTROL, line_control & !DIVISOR_LATCH);
        self.write_register(INTERRUPT_ENABLE, enables);
        self.write_register(LINE_CONTROL, line_control);
    }

    /// Writes register `offset`, 0..=7.
    pub(super) fn write(&mut self, offset: u8, value: u8) {
        if offset == FIFO_CONTROL {
            self.fifos_on = value & FIFO_ENABLE != 0;
        }
        self.write_register(offset, value);
        self.receive();
    }

    fn write_register(&mut self, offset: u8, value: u8) {
        match self.serial.write(offset, value) {
            Ok(()) => {}
            Err(Error::IOError(error)) => {
                if self.lost == 0 {
                    log::warn!("the guest's serial output is being lost: {error}");
                }
                self.lost += 1;
            }
            Err(Error::Trigger(never)) => match never {},
            // Only input can find the FIFO full.
            Err(Error::FullFifo) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::io;
    use std::sync::{Arc, Mutex};

    const LINE_STATUS: u8 = 5;

    /// A sink that can be looked into, and closed.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(Vec<u8>, bool)>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut sink = self.0.lock().unwrap();
            if sink.1 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            sink.0.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn uart() -> (Uart, Sink) {
        let sink = Sink::default();
        (Uart::new(Box::new(sink.clone())), sink)
    }

    #[test]
    fn output_reaches_the_sink_and_a_failed_sink_is_counted() {
        let (mut uart, sink) = uart();
        b"umbra".iter().for_each(|&byte| uart.write(DATA, byte));
        assert_eq!(sink.0.lock().unwrap().0, b"umbra");
        sink.0.lock().unwrap().1 = true;
        uart.write(DATA, b'!');
        assert_eq!(uart.lost, 1);
        assert_eq!(uart.read(LINE_STATUS) & 0x60, 0x60, "the guest can go on sending");
    }

    #[test]
    fn each_input_byte_raises_the_line_until_it_is_read() {
        let (mut uart, _) = uart();
        uart.write(INTERRUPT_ENABLE, 1);
        assert_eq!(uart.queue(b"ab"), 2);
        for byte in *b"ab" {
            assert!(uart.output());
            assert_eq!(uart.read(INTERRUPT_IDENTIFICATION) & 0xf, 0b100);
            assert!(uart.output(), "identifying is not reading");
            assert_eq!(uart.read(LINE_STATUS) & 1, 1);
            assert_eq!(uart.read(DATA), byte);
        }
        assert!(!uart.output());
        assert_eq!(uart.read(LINE_STATUS) & 1, 0);
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION) & 0xf, 1);
    }

    #[test]
    fn input_that_came_before_the_enable_raises_the_line() {
        let (mut uart, _) = uart();
        uart.queue(b"x");
        assert!(!uart.output());
        uart.write(INTERRUPT_ENABLE, 1);
        assert!(uart.output());
        uart.write(INTERRUPT_ENABLE, 0);
        assert!(!uart.output());
    }

    #[test]
    fn received_is_shown_before_sent_and_both_are_seen() {
        let (mut uart, _) = uart();
        uart.queue(b"x");
        uart.write(INTERRUPT_ENABLE, 3);
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION) & 0xf, 0b100);
        uart.read(DATA);
        assert!(uart.output());
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION) & 0xf, 0b010);
        assert!(!uart.output());
    }

    #[test]
    fn received_alone_does_not_bring_sent_back() {
        let (mut uart, _) = uart();
        uart.write(INTERRUPT_ENABLE, 3);
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION) & 0xf, 0b010);
        uart.queue(b"x");
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION) & 0xf, 0b100);
        uart.read(DATA);
        assert!(!uart.output());
    }

    #[test]
    fn identification_shows_what_is_enabled_also_under_the_divisor_latch() {
        let (mut uart, _) = uart();
        uart.write(INTERRUPT_ENABLE, 2);
        uart.write(INTERRUPT_ENABLE, 0);
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION), 0x01);
        uart.write(LINE_CONTROL, DIVISOR_LATCH | 3);
        uart.write(1, 0x12);
        uart.write(LINE_CONTROL, 3);
        uart.write(INTERRUPT_ENABLE, 1);
        uart.queue(b"x");
        uart.write(LINE_CONTROL, DIVISOR_LATCH | 3);
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION), 0x04);
        assert!(uart.output());
        assert_eq!((uart.read(1), uart.read(LINE_CONTROL)), (0x12, DIVISOR_LATCH | 3));
    }

    #[test]
    fn fifos_show_once_they_are_on() {
        let (mut uart, _) = uart();
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION), 0x01);
        uart.write(FIFO_CONTROL, 0x07);
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION), 0xc1);
        uart.write(FIFO_CONTROL, 0x00);
        assert_eq!(uart.read(INTERRUPT_IDENTIFICATION), 0x01);
    }

    #[test]
    fn input_is_bounded_and_survives_a_reset() {
        let (mut uart, sink) = uart();
        assert_eq!(uart.queue(&[7; 2 * INPUT_BYTES_MAX]), INPUT_BYTES_MAX);
        assert_eq!(uart.queue(&[7; 10]), 1, "one byte is in the UART already");
        uart.write(INTERRUPT_ENABLE, 1);
        uart.reset();
        assert!(!uart.output());
        let mut read = 0;
        while uart.read(LINE_STATUS) & 1 != 0 {
            assert_eq!(uart.read(DATA), 7);
            read += 1;
        }
        assert_eq!(read, INPUT_BYTES_MAX, "all but the byte that the UART held");
        uart.write(DATA, b'.');
        assert_eq!(sink.0.lock().unwrap().0, b".");
    }
}
