//! Atomics for loom: its own, with x86's sequential consistency.
//!
//! Story: loom lets loads see any store that the memory model allows, but takes a sequentially consistent access for
//! no more than an acquiring or releasing one. Protocols here in which each side stores and then looks would all fail.
//! Loom does know what a sequentially consistent *fence* is; so one follows each `SeqCst` access. After stores and
//! read-modify-writes that is what x86 does (XCHG and LOCK drain the store buffer). After loads it makes that two readers
//! agree on the order of two writers' stores, which x86's have by themselves.
//!
//! Holds: nothing passes here what x86 does not let pass, and a plain (`Release`) store, then a `SeqCst` load of another
//! word, do: where that matters the code needs a fence of its own, and a model without it fails.
//!
//! Limits: a plain store is seen by all once a `SeqCst` load after it is done, where x86 would let a *second* load pass the
//! store too. A relaxed load does not pass a `SeqCst` store before it, which the language would allow and x86 does not.

use loom::sync::atomic as weak;
pub use loom::sync::atomic::fence;

use super::Ordering;

/// What follows an access of that order.
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
                let value = self.0.load(order);
                drain(order);
                value
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
            pub fn fetch_update(
                &self,
                set: Ordering,
                fetch: Ordering,
                mut change: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                let mut old = self.load(fetch);
                while let Some(new) = change(old) {
                    match self.compare_exchange(old, new, set, fetch) {
                        Ok(_) => return Ok(old),
                        Err(now) => old = now,
                    }
                }
                Err(old)
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
