//! Devices behind rings laid by hand.

mod blk;
