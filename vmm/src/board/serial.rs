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
/// Bits of the interrupt identification as vm-superio keeps them.
const RECEIVED: u8 = 0b100;
const SENT: u8 = 0b010;

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
    /// Bytes that the sink did not take.
    pub(super) lost: u64,
}

impl Uart {
    pub(super) fn new(sink: Box<dyn Write + Send>) -> Uart {
        Uart { serial: Serial::new(NoTrigger, sink), input: VecDeque::new(), lost: 0 }
    }

    /// The same port after a reset of the machine: registers as new, sink and waiting input kept.
    pub(super) fn reset(&mut self) {
        let sink = std::mem::replace(self.serial.writer_mut(), Box::new(std::io::sink()));
        self.serial = Serial::new(NoTrigger, sink);
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
        let received = state.interrupt_identification & RECEIVED != 0 && state.interrupt_enable & 1 != 0;
        let sent = state.interrupt_identification & SENT != 0 && state.interrupt_enable & 2 != 0;
        received || sent
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

    /// Shows the most urgent pending interrupt alone, as the chip does, where vm-superio shows all and forgets them.
    /// Reading ends "sent"; "received" lasts until the data is read.
    fn identify(&mut self, value: u8) -> u8 {
        if value & RECEIVED == 0 {
            return value;
        }
        let enabled = self.serial.read(INTERRUPT_ENABLE);
        // Writing the enables again raises what they enable: right for data that is still there, and for "sent"
        // only if it was pending too.
        if value & SENT != 0 || enabled & 2 == 0 {
            self.write_register(INTERRUPT_ENABLE, enabled);
        }
        value & !SENT
    }

    /// Writes register `offset`, 0..=7.
    pub(super) fn write(&mut self, offset: u8, value: u8) {
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
