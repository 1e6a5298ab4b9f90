//! What the fuzz targets share.
//!
//! | module | what it is |
//! |---|---|
//! | heap | how much memory a call takes |
//! | plan | random CPUs, descriptor tables and code, of which much makes sense |
//! | state | what holds of every CPU state |
//! | journal | a bus that writes down what an instruction did, and judges it |

pub mod heap;
pub mod journal;
pub mod plan;
pub mod state;
