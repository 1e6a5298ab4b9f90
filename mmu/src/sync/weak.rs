//! Atomics for loom: its own, with x86's sequential consistency.
//!
//! Story: loom lets loads see any store that the memory model allows, but takes a sequentially consistent access for
//! no more than an acquiring or releasing one. Protocols here in which each side stores and then looks would all fail.
//! Loom does know what a sequentially consistent *fence* is; so what x86 does is written out: a `SeqCst` store, and every
//! `SeqCst` read-modify-write, is followed by a fence (XCHG and LOCK drain the store buffer); a `SeqCst` load is a load.
//!
//! Holds: nothing is ordered here that x86 does not order. In particular a plain (`Release`) store, then a `SeqCst` load
//! of another word, may pass each other: where that matters the code needs a fence of its own, and a model without it fails.
//!
//! Limits: weaker than `SeqCst` where two readers must agree on the order of two writers' stores (a false alarm is
//! possible, a missed bug is not); stronger where a relaxed load follows a `SeqCst` store, which the language would let
//! pass and x86 does not.

use loom::sync::atomic as weak;
pub use loom::sync::atomic::fence;

use super::Ordering;

/// What follows a store of that order.
#[inline]
fn drain(order: Ordering) {
    if order == Ordering::SeqCst {
        fence(Ordering::SeqCst);
    }
}

macro_rules! atomic {
    ($name:ident, $value:ty) => {
        #[doc = concat!("`std`'s `", stringify!($name), "`, seen by loom.")]
        #[derive(Debug)]
        pub struct $name(weak::$name);

        #[allow(missing_docs)]
        impl $name {
            #[track_caller]
            pub fn new(value: $value) -> $name {
                $name(weak::$name::new(value))
            }

            #[track_caller]
            pub fn load(&self, order: Ordering) -> $value {
                self.0.load(order)
            }

            #[track_caller]
            pub fn store(&self, value: $value, order: Ordering) {
                self.0.store(value, order);
                drain(order);
            }

            #[track_caller]
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                let old = self.0.swap(value, order);
                drain(order);
                old
            }

            #[track_caller]
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                let end = self.0.compare_exchange(current, new, success, failure);
                drain(if end.is_ok() { success } else { failure });
                end
            }

            #[track_caller]
            pub fn compare_exchange_weak(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(current, new, success, failure)
            }
        }

        impl Default for $name {
            fn default() -> $name {
                $name::new(<$value>::default())
            }
        }
    };
}

macro_rules! arithmetic {
    ($name:ident, $value:ty, $($operation:ident),*) => {
        #[allow(missing_docs)]
        impl $name {
            $(
                #[track_caller]
                pub fn $operation(&self, value: $value, order: Ordering) -> $value {
                    let old = self.0.$operation(value, order);
                    drain(order);
                    old
                }
            )*
        }
    };
}

atomic!(AtomicBool, bool);
atomic!(AtomicU32, u32);
atomic!(AtomicU64, u64);
arithmetic!(AtomicBool, bool, fetch_and, fetch_or);
arithmetic!(AtomicU32, u32, fetch_add, fetch_sub, fetch_max, fetch_min, fetch_and, fetch_or);
arithmetic!(AtomicU64, u64, fetch_add, fetch_sub, fetch_max, fetch_min, fetch_and, fetch_or);
