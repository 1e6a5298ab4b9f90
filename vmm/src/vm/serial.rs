//! Where the guest's serial output goes, and when its first byte came.

use std::io::{self, Write};
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use umbra_mmu::sync::sim;

use crate::signals;

/// The moment the process started, near enough: the first call decides.
pub fn process_start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// When the guest's first byte came, in microseconds since [`process_start`]; 0 for not yet.
#[derive(Clone, Debug, Default)]
pub struct FirstByte(Arc<AtomicU64>);

impl FirstByte {
    /// The moment, if it has come.
    pub fn micros(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|at| *at != 0)
    }

    fn note(&self) {
        if self.0.load(Ordering::Relaxed) == 0 {
            self.0.store(process_start().elapsed().as_micros().max(1) as u64, Ordering::Relaxed);
        }
    }
}

/// How often a simulation that waits for the reader looks whether a signal has come.
const SIGNAL_LOOK: Duration = Duration::from_millis(50);
/// Output that waits for its reader, in bytes, beside what is being written; what comes on top is lost, and counted by
/// the UART.
pub const WAITING_MAX: usize = 16 << 20;

/// Where the guest's bytes go: a queue that a thread of its own empties.
///
/// The UART calls in under the board's lock, and there a reader that stands still must hold up neither the vCPU nor
/// the alarm and the time limit behind that lock.
#[derive(Debug)]
pub struct Console {
    first: FirstByte,
    queue: Arc<Queue>,
    /// How long a reader that stands still may hold up the end; `None`: as long as it likes.
    patience: Option<Duration>,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// The thread holds bytes that it has not passed on yet.
    writing: bool,
    /// No more will come.
    closed: bool,
    /// The reader has gone.
    failed: bool,
}

impl Console {
    /// A console that writes to `out`, and the note of its first byte.
    ///
    /// # Errors
    ///
    /// When the host has no thread left.
    pub fn new(
        out: impl Write + Send + 'static,
        patience: Option<Duration>,
    ) -> io::Result<(Console, FirstByte)> {
        let (first, queue) = (FirstByte::default(), Arc::new(Queue::default()));
        let mine = Arc::clone(&queue);
        std::thread::Builder::new().name("console".into()).spawn(move || mine.pass_on(out))?;
        Ok((Console { first: first.clone(), queue, patience }, first))
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Waiting>) -> MutexGuard<'a, Waiting> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread's whole life.
    fn pass_on(&self, mut out: impl Write) {
        let mut state = self.lock();
        loop {
            while state.bytes.is_empty() {
                state.writing = false;
                self.changed.notify_all();
                if state.closed {
                    return;
                }
                state = self.wait(state);
            }
            let bytes = mem::take(&mut state.bytes);
            state.writing = true;
            drop(state);
            let written = out.write_all(&bytes).and_then(|()| out.flush());
            state = self.lock();
            if let Err(error) = written {
                log::debug!("the reader of the guest's output has gone: {error}");
                state.failed = true;
                state.bytes = Vec::new();
            }
        }
    }

    /// Waits until everything is passed on, or until nothing has moved for too long.
    fn drain(&self, patience: Option<Duration>) {
        let mut state = self.lock();
        state.closed = true;
        self.changed.notify_all();
        let busy = |state: &mut Waiting| state.writing || !state.bytes.is_empty();
        match patience {
            None => drop(self.changed.wait_while(state, busy)),
            Some(patience) => {
                let waited = self.changed.wait_timeout_while(state, patience, busy);
                if waited.is_ok_and(|(_, result)| result.timed_out()) {
                    log::warn!("nobody reads the guest's last output; it is lost");
                }
            }
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.first.note();
        let mut state = self.queue.lock();
        if state.failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let full = |state: &Waiting| state.bytes.len() + bytes.len() > WAITING_MAX && !state.failed;
        // What is lost must not hang on how fast its reader is, but where an operator ends the run.
        while sim::is_on() && full(&state) && signals::count() == 0 {
            let waited = self.queue.changed.wait_timeout(state, SIGNAL_LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if full(&state) {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "its reader is too slow"));
        }
        state.bytes.extend_from_slice(bytes);
        // In the middle of its work the thread looks by itself before it sleeps.
        if !state.writing {
            self.queue.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.queue.drain(self.patience);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Passes what it gets on to a test.
    struct Tap(Sender<Vec<u8>>);

    impl Write for Tap {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let told = self.0.send(bytes.to_vec());
            told.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Says that it has been called, and stands still until the other sender has gone.
    struct Stalled(Sender<()>, Receiver<()>);

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.send(());
            let _ = self.1.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn console(out: impl Write + Send + 'static, patience: Option<Duration>) -> (Console, FirstByte) {
        Console::new(out, patience).expect("a thread")
    }

    #[test]
    fn console_dropped_has_passed_everything_on_in_order() {
        let (tap, seen) = channel();
        let (mut console, first) = console(Tap(tap), None);
        assert_eq!(first.micros(), None);
        (0..=255).for_each(|byte| console.write_all(&[byte]).expect("room"));
        assert!(first.micros().is_some());
        drop(console);
        let all: Vec<u8> = seen.try_iter().flatten().collect();
        assert_eq!(all, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn output_without_a_newline_is_passed_on_at_once() {
        let (tap, seen) = channel();
        let (mut console, _) = console(Tap(tap), None);
        console.write_all(b">").expect("room");
        assert_eq!(seen.recv_timeout(Duration::from_secs(10)), Ok(b">".to_vec()));
    }

    #[test]
    fn a_reader_that_stands_still_blocks_neither_the_guest_nor_the_end() {
        let (release, held) = channel();
        let (called, entered) = channel();
        let (mut console, _) = console(Stalled(called, held), Some(Duration::from_millis(10)));
        console.write_all(b"first").expect("room");
        entered.recv().expect("the reader has taken it, and stands still");
        let quarter = vec![b'x'; WAITING_MAX / 4];
        (0..4).for_each(|_| console.write_all(&quarter).expect("room"));
        assert!(console.write_all(b"x").is_err(), "the queue is full");
        drop(console);
        drop(release);
    }

    #[test]
    fn a_reader_that_has_gone_is_said_once_and_nothing_piles_up() {
        let (tap, seen) = channel();
        drop(seen);
        let (mut console, _) = console(Tap(tap), None);
        let deadline = Instant::now() + Duration::from_secs(10);
        while console.write_all(b"x").is_ok() {
            assert!(Instant::now() < deadline, "writes go on succeeding");
            std::thread::yield_now();
        }
        assert!(console.queue.lock().bytes.is_empty());
    }
}
