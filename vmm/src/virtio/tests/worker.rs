//! Rounds: a driver that resets, or takes its queue back, while a request is served.

use std::sync::{Arc, Mutex, OnceLock};

use umbra_mmu::{Mmu, Shortage};

use super::super::chain::Chain;
use super::super::fuzz::{BUFFERS, Bench, BoardPort, Registers, WRITE};
use super::super::worker::Bell;
use super::super::{Device, Served};
use crate::board::{CONFIG_BYTES_MAX, VirtioSpec};

/// What happens while a request is served.
type Meanwhile = Box<dyn FnMut(&BoardPort) + Send>;

/// A device in the middle of whose requests something happens.
struct Interrupted {
    port: Arc<OnceLock<Arc<BoardPort>>>,
    meanwhile: Arc<Mutex<Option<Meanwhile>>>,
    served: u32,
}

impl Device for Interrupted {
    fn spec(&self) -> VirtioSpec {
        VirtioSpec {
            device_id: 4,
            features: 0,
            queue_sizes: [16, 16, 0, 0],
            config: [0; CONFIG_BYTES_MAX],
            config_bytes: 0,
            config_writable: (0, 0),
        }
    }

    fn header_bytes(&self) -> usize {
        0
    }

    fn serve(&mut self, _mmu: &Mmu, _queue: usize, _chain: &Chain) -> Result<Served, Shortage> {
        self.served += 1;
        if let (Some(port), Some(meanwhile)) = (self.port.get(), &mut *self.meanwhile.lock().expect("sane")) {
            meanwhile(port);
        }
        Ok(Served::Done { status: None, length: 5 })
    }
}

fn bench(meanwhile: impl FnMut(&BoardPort) + Send + 'static) -> Bench<Interrupted> {
    let port = Arc::new(OnceLock::new());
    let meanwhile: Meanwhile = Box::new(meanwhile);
    let meanwhile = Arc::new(Mutex::new(Some(meanwhile)));
    let mut bench = Bench::new(Interrupted { port: Arc::clone(&port), meanwhile, served: 0 });
    assert!(port.set(Arc::clone(&bench.port)).is_ok());
    bench.set_up(0, 0);
    bench
}

#[test]
fn a_reset_in_the_middle_of_a_request_waits_for_it_and_no_more_is_served() {
    let mut bench = bench(|port| {
        port.write(0x70, 0);
        assert_ne!(port.read(0x70), 0, "not while it is served");
    });
    for _ in 0..3 {
        bench.offer_chain(0, 1, &[(BUFFERS, 16, WRITE)], false);
    }
    assert_eq!(bench.serve(), Ok(1));
    assert_eq!((bench.worker.device().served, bench.port.read(0x70), bench.port.read(0x60)), (1, 0, 0));
    bench.set_up(0, 0);
    bench.offer_chain(0, 2, &[(BUFFERS, 16, WRITE)], false);
    assert_eq!(bench.serve(), Ok(1));
    assert_eq!((bench.worker.device().served, bench.used(0)), (2, (1, 2, 5)), "from the ring's beginning");
}

#[test]
fn a_queue_that_is_taken_back_in_the_middle_of_a_request_is_left_alone_after_it() {
    let mut first = true;
    let mut bench = bench(move |port| {
        if std::mem::take(&mut first) {
            port.write(0x30, 0);
            port.write(0x44, 0);
            assert_eq!(port.read(0x44), 1, "not yet");
        }
    });
    bench.offer_chain(0, 1, &[(BUFFERS, 16, WRITE)], false);
    bench.offer_chain(0, 1, &[(BUFFERS, 16, WRITE)], false);
    assert_eq!(bench.serve(), Ok(1));
    assert_eq!((bench.port.read(0x44), bench.used(0).0), (0, 1));
    bench.offer_chain(1, 1, &[(BUFFERS, 16, WRITE)], false);
    assert_eq!((bench.serve(), bench.used(1).0), (Ok(1), 1), "the other goes on");
}

#[test]
fn all_rings_are_served_in_turn() {
    let mut bench = bench(|_| ());
    for _ in 0..5 {
        bench.offer_chain(0, 1, &[(BUFFERS, 16, WRITE)], false);
        bench.offer_chain(1, 1, &[(BUFFERS, 16, WRITE)], false);
    }
    assert_eq!(bench.worker.round(&bench.mmu, &*bench.port), Ok(true));
    assert_eq!((bench.used(0).0, bench.used(1).0), (1, 1));
    assert_eq!(bench.serve(), Ok(4));
}

#[test]
fn a_bell_that_has_rung_is_heard_later_and_a_stop_is_final() {
    let bell = Bell::default();
    bell.ring();
    bell.ring();
    assert!(bell.wait());
    bell.stop();
    bell.ring();
    assert!(!bell.wait() && !bell.wait() && bell.is_stopped());
}
