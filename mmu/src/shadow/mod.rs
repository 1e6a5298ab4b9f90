//! Shadow page tables: what the hardware walks instead of the guest's own.
//!
//! | file | its job |
//! |---|---|
//! | role | what a page is a shadow of, and under which rules |
//! | pages | the slots and the cache |
//! | roots | the top two levels, and what is loaded |
//! | link | making pages, linking them below each other, killing and evicting them |
//! | leaf | leaf sptes: the one place that makes them, and the one that takes them away |
//! | refill | the leaves that a software TLB misses, without a walk from the top |
//! | stores | stores to guest memory that are not applied yet |
//! | track | stores to shadowed tables; unsync tables and their resynchronisation |

pub(crate) mod large;
pub(crate) mod leaf;
pub(crate) mod link;
pub(crate) mod pages;
pub(crate) mod refill;
pub mod role;
pub(crate) mod roots;
pub(crate) mod stores;
pub(crate) mod track;

pub(crate) use roots::{RootRef, Roots};
