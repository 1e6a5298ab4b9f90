//! umbra
