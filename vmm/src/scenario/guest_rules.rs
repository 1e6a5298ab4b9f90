//! The flushes of the built-in guest's kernel, each by its name, and a guest in which each matters. docs/GUEST-RULES.md is this table in
//! print.
//!
//! Story: the guest is told `omit=NAME`, and Umbra judges it by `--check-guest-tlb=strict`. A *certain* miss needs no other ground. A
//! *suspect* may be a kernel's way of doing things (it takes accessed bits and waits for nobody, say): in a simulation the same seed is
//! therefore run once more with the flush made, which is the same run up to the place where it is made, and must have no suspect. Then the
//! suspect came of the omission.
//!
//! See: guest/src/kernel/omit.h, which names them; a test compares.

use super::story::Kind;

/// A flush.
#[derive(Clone, Copy, Debug)]
pub struct Flush {
    /// Its name.
    pub name: &'static str,
    /// What it is for.
    pub what: &'static str,
    /// CPUs of the guest in which it matters.
    pub vcpus: u32,
    /// That guest's command line.
    pub append: &'static str,
    /// As what it is caught where it is left out of a run without a seed, most often.
    pub usually: Kind,
}

/// What each has in a simulation beside its CPUs and its command line: a TLB that forgets nothing by itself, and time enough.
pub const OPTIONS: [&str; 5] = ["--tlb", "sticky", "--check-guest-tlb=strict", "--timeout", "1s"];

const SHOOT: &str = "workload=shoot scale=20";
const ACCESS: &str = "workload=access scale=2";

macro_rules! flushes {
    ($($name:literal $vcpus:literal $append:expr, $usually:ident: $what:literal;)*) => {
        /// All there are, in the order of omit.h.
        pub const FLUSHES: &[Flush] = &[$(Flush {
            name: $name,
            what: $what,
            vcpus: $vcpus,
            append: $append,
            usually: Kind::$usually,
        },)*];
    };
}

flushes! {
    "window" 1 "workload=kmap", Certain:
        "a slot of the window leads to the frame that it was given last";
    "pool-local" 1 "workload=kmap", Certain:
        "slots that a sweep of the pool has emptied are forgotten by the CPU that sweeps";
    "pool-remote" 2 "workload=kmap", Suspect:
        "and by all others";
    "drop-local" 1 "workload=shoot scale=1", Suspect:
        "a page that reclaim takes from the space that is loaded here is forgotten before it is written out or freed";
    "drop-remote" 3 SHOOT, Certain:
        "a page taken from a space that another CPU has loaded is asked for there";
    "finish" 3 SHOOT, Certain:
        "that CPU is interrupted";
    "finish-wait" 3 SHOOT, Certain:
        "and awaited, before anything is done with the frames";
    "serve-pages" 3 SHOOT, Certain:
        "a CPU that is asked to forget a few pages does";
    "serve-all" 2 "workload=kmap", Suspect:
        "a CPU that is asked to forget all that is not global does";
    "refresh-trap" 2 "workload=age", Suspect:
        "a CPU that was told that it is stale forgets before its next trap ends";
    "refresh-halt" 2 "workload=age", Suspect:
        "or before it goes on after a halt, through which nobody has asked it";
    "age-local" 1 "workload=age", Suspect:
        "an accessed bit that was taken is set again when the page is used";
    "age-remote" 2 "workload=age", Suspect:
        "the same where another CPU has the space loaded";
    "copy-on-write" 1 "workload=mm", Suspect:
        "the copy takes the shared page's place";
    "fork" 1 "workload=mm", Suspect:
        "the parent stores no more to the pages that it shares with its child";
    "zap-few" 1 "workload=mm", Suspect:
        "pages and tables that are unmapped are forgotten before their frames are free";
    "zap-many" 1 "workload=mm", Certain:
        "the same for more than a few at a time";
    "pointers" 1 "workload=hello", Suspect:
        "PAE: the CPU reads the four top entries again after a new one";
    "access-slot" 1 ACCESS, Suspect:
        "workload access: the entries under test are those that are used";
    "access-close" 1 ACCESS, Suspect:
        "workload access: the slot's page and table are forgotten before they are free";
    "access-pointers" 1 ACCESS, Suspect:
        "workload access, PAE: the top entry under test is the one that is used";
    "storm" 1 "workload=storm scale=1", Certain:
        "workload storm: a slot that was emptied leads nowhere";
}
