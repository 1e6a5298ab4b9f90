//! Devices behind rings laid by hand.

mod balloon;
mod blk;
mod disk;
mod worker;
