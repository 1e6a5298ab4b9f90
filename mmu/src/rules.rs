//! The rules of coherence and of reclaim, each by name: what it protects, and a way to leave it out.
//!
//! Story: every flush, kick, wait, gate check, and note or look at TLB debt stands in the code as
//! `if self.rules.keep(Rule::KickAtShootdown) { .. }`. A guest's MMU can be told to go without one rule (`Mmu::with_rules`): the
//! tests leave out each in turn, and something must notice. A rule that nothing misses is no rule, or its test does not bite.
//! `umbra scenario` does the same for who wants to see what a rule is for.
//!
//! Holds: INV-RULE-1, all rules are in force unless `Mmu::with_rules` says otherwise, and what they cost is the comparison of a byte.
//!
//! Limits: `umbra run --omit` is for tests: a build is, when it has the feature `omissions`, which only dev-dependencies turn on, and
//! debug assertions, which neither a release nor a benchmark has. So is `at_point`.
//!
//! The other side of the table is [`NEEDS_NONE`]: what takes nothing away from a TLB needs no flush.
//!
//! See: docs/RULES.md, which is this table in print, and tests/omissions.rs.

/// True in a build that leaves rules out of any run that is told to.
pub const CAN_OMIT: bool = cfg!(all(feature = "omissions", debug_assertions));

/// What sort of rule it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// A TLB is made to forget, or asked to; the host is made to forget for an importer.
    Flush,
    /// A vCPU is made to leave the guest, an importer to give a page up.
    Kick,
    /// Somebody goes on only when others have answered.
    Wait,
    /// What must be looked at before a mapping is made, or a page taken.
    Gate,
    /// A removal is written down, or what was written down is looked at.
    Debt,
    /// The shadow is brought up to date with the guest's tables.
    Sync,
    /// Decoded code is found stale.
    Code,
    /// What reclaim owes those for whom it makes frames free.
    Reclaim,
}

impl Sort {
    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            Sort::Flush => "flush",
            Sort::Kick => "kick",
            Sort::Wait => "wait",
            Sort::Gate => "gate",
            Sort::Debt => "debt",
            Sort::Sync => "sync",
            Sort::Code => "code",
            Sort::Reclaim => "reclaim",
        }
    }
}

macro_rules! rules {
    ($($rule:ident $name:literal $sort:ident $place:literal: $protects:literal;)*) => {
        /// A rule of coherence.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Rule {
            $(#[doc = $protects] $rule,)*
        }

        impl Rule {
            /// All there are.
            pub const ALL: &'static [Rule] = &[$(Rule::$rule,)*];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self { $(Rule::$rule => $name,)* }
            }

            /// What sort of rule it is.
            pub const fn sort(self) -> Sort {
                match self { $(Rule::$rule => Sort::$sort,)* }
            }

            /// The function that it stands in.
            pub const fn place(self) -> &'static str {
                match self { $(Rule::$rule => $place,)* }
            }

            /// What it protects.
            pub const fn protects(self) -> &'static str {
                match self { $(Rule::$rule => $protects,)* }
            }
        }
    };
}

rules! {
    // What is asked of a vCPU, and what it does then.
    FlushAtEntry "flush-at-entry" Flush "Mmu::tlb_enter":
        "a vCPU with a software TLB that was asked to flush uses nothing from before";
    RequestAtShootdown "request-at-shootdown" Flush "Coherence::shoot_down":
        "a vCPU that is outside flushes before it is back inside";
    RequestWithoutSleep "request-without-sleep" Flush "Unmapped::shoot_down":
        "the same where the caller may not sleep: that the others are outside is no excuse by itself";
    RequestAfterAging "request-after-aging" Flush "Mmu::clear_young":
        "an accessed bit that was cleared comes back when the page is used: what a TLB still has would not set it";
    KickAtShootdown "kick-at-shootdown" Kick "Coherence::shoot_down":
        "a vCPU that never leaves the guest by itself answers all the same";
    KickOfStarving "kick-of-starving" Kick "Mmu::stand_back":
        "a vCPU that has been fed and runs on with its page says so";
    AwaitAnswers "await-answers" Wait "Coherence::shoot_down":
        "nothing changes hands before every vCPU has answered";
    ModeAtEntry "mode-at-entry" Wait "Coherence::enter_guest":
        "a vCPU that runs guest code is not taken for one that is outside";
    AnswerAtLeave "answer-at-leave" Wait "Coherence::leave_guest":
        "a vCPU that was outside for a moment has answered, though nobody saw it there";

    // What the guest asks for.
    FlushAtInvlpg "flush-at-invlpg" Flush "Mmu::forget_address":
        "a software TLB forgets the page of an INVLPG, and of a page fault that the guest sees, and the links to tables";
    FlushOfLargePage "flush-of-large-page" Flush "SoftTlb::flush_page":
        "INVLPG of one address of a large page forgets all of it";
    FlushAtCr3 "flush-at-cr3" Flush "Mmu::set_paging":
        "a software TLB forgets what is not global at MOV CR3";
    FlushAtModeChange "flush-at-mode-change" Flush "Mmu::set_paging":
        "a software TLB forgets everything at a change of CR0, CR4 or EFER that changes paging";
    HardwareFlushAtInvlpg "hardware-flush-at-invlpg" Flush "Mmu::forget_address":
        "hardware flushes as it enters, where INVLPG or a fault finds that something was removed";
    HardwareFlushAtCr3 "hardware-flush-at-cr3" Flush "Mmu::set_paging":
        "the same at a change of control registers";
    AwaitStores "await-stores" Wait "Mmu::await_stores":
        "a store to a page table that another vCPU may have seen is applied before that one flushes";
    DropAtInvlpg "drop-at-invlpg" Sync "Mmu::forget_address":
        "the spte of an INVLPG's page is made anew from the guest's entry of now";
    SyncAtCr3 "sync-at-cr3" Sync "Mmu::set_paging":
        "unsync tables below the loaded roots say what the guest's say after MOV CR3";
    SyncAtLink "sync-at-link" Sync "Mmu::link":
        "an unsync table that is linked anew has no spte that this address never had";
    SyncAtPromotion "sync-at-promotion" Sync "Mmu::get_or_create":
        "an unsync table that becomes a directory too is tracked, and so up to date";
    SyncAtTracking "sync-at-tracking" Sync "Mmu::track_again":
        "a store before the last TLB has forgotten that it may write is not missed";
    ApplyStores "apply-stores" Sync "Mmu::table_written":
        "a store to a tracked table, by the VMM or a device, takes the sptes away that it decides";

    // What must be looked at first.
    GateAtFill "gate-at-fill" Gate "Mmu::set_leaf":
        "no spte of a page is made while it is invalidated, nor by a walk from before";
    MarkAtFill "mark-at-fill" Gate "Mmu::set_leaf":
        "no spte made from now on lets a tracked or watched page be written";
    EntryAtFill "entry-at-fill" Gate "Mmu::map":
        "a leaf is made only while the guest's entry is what the walk has seen";
    PinsAtUnmap "pins-at-unmap" Gate "Hold::take":
        "a page that a window or a device holds stays in its frame";
    PageAfterPin "page-after-pin" Gate "Mmu::pin_page":
        "who pins a frame finds out that its page has just been taken";
    TablesAtUnmap "tables-at-unmap" Gate "Hold::take":
        "a page that is a shadowed table, or watched, stays in its frame";
    GateAtImport "gate-at-import" Gate "Mmu::enter_importer":
        "no importer is entered for a page while it is invalidated, nor by a look from before";
    WakeAtOpen "wake-at-open" Wait "Buckets::open_all":
        "who sleeps at a gate goes on once it has been opened";
    OpenBeforeWait "open-before-wait" Wait "Mmu::swap_in":
        "who has closed a gate sleeps at none, its own among them";

    // Ranges of 2 MiB.
    SplitAtUnmap "split-at-unmap" Gate "Hold::take":
        "a range that loses a page is huge no more, and one that is being gathered does not become so";
    SplitAtProtection "split-at-protection" Gate "Mmu::write_protect":
        "nor does one of whose pages stores must be seen";
    DebtOfSplit "debt-of-split" Debt "Mmu::split_range":
        "a range that was split is in TLBs as a whole still";
    MovingAtDiscard "moving-at-discard" Wait "Mmu::is_discarded":
        "a page that is on its way is not taken for none: who discards it comes again when it has arrived";

    // Who is shot down when.
    ShootdownAtInvalidation "shootdown-at-invalidation" Wait "Unmapped::shoot_down":
        "a page's frame is free only when no vCPU can reach it";
    ShootdownAtTracking "shootdown-at-tracking" Wait "Mmu::shoot_down_protected":
        "no vCPU writes to a page table unseen once it is tracked";
    ShootdownAtWatch "shootdown-at-watch" Wait "Mmu::shoot_down_protected":
        "no vCPU writes to a watched page unseen";
    ShootdownBeforeReuse "shootdown-before-reuse" Wait "Mmu::take_dead_slot":
        "no paging-structure cache leads to a table that serves again";
    ShootdownBeforeGivingBack "shootdown-before-giving-back" Wait "Mmu::give_back_dead":
        "nor to one whose frame is free";
    ShootdownBeforeRoot "shootdown-before-root" Wait "Mmu::vacant_root":
        "nor from a root that serves again to what was below it";

    // Importers.
    TellImporters "tell-importers" Kick "Hold::tell_importers":
        "an importer gives up what is taken away";
    AwaitImporters "await-importers" Wait "Unmapped::shoot_down":
        "a page's contents go elsewhere only when no importer that behaves can reach it";
    AskFirst "ask-first" Wait "Hold::take":
        "who may not sleep learns that an importer has a page before anybody is told";
    FenceHomes "fence-homes" Flush "Mmu::fence_homes":
        "an importer that is late, or lies, reads nothing of what was in a page that has gone";

    // TLB debt.
    DebtOfZap "debt-of-zap" Debt "Mmu::zap_leaf":
        "an spte taken away by an edit, a resynchronisation or an eviction is in TLBs still";
    DebtOfNarrowing "debt-of-narrowing" Debt "Mmu::narrow_leaf":
        "so is one that allows less after a resynchronisation";
    DebtOfFill "debt-of-fill" Debt "Mmu::set_leaf":
        "so is one that a fill replaced by one that allows less";
    DebtOfProtection "debt-of-protection" Debt "Mmu::write_protect":
        "so is one that was write-protected";
    DebtOfUnmap "debt-of-unmap" Debt "Closed::unmap":
        "so are those that an invalidation took away";
    DebtOfUnlink "debt-of-unlink" Debt "Mmu::unlink":
        "so is a table that was unlinked, in paging-structure caches";
    DebtOfEviction "debt-of-eviction" Debt "Mmu::kill":
        "so is a table that was evicted";
    DebtOfRoot "debt-of-root" Debt "Mmu::unlink_root":
        "so is what was below a root that was taken out of use";
    DebtOfPutBack "debt-of-put-back" Debt "Hold::put_back":
        "a page that was put back is in TLBs though it has no spte";
    DebtAtUnmap "debt-at-unmap" Debt "Hold::take":
        "a page that nothing maps any more may be in a TLB all the same";
    DebtAtProtection "debt-at-protection" Debt "Mmu::write_protect":
        "a page without a writable spte may be written to through a TLB all the same";
    RemovalUnderWay "removal-under-way" Debt "Coherence::removed_since":
        "a guest's flush is owed for an spte that is gone and not stamped yet";

    // Reclaim.
    NoIoInScope "no-io-in-scope" Reclaim "Mmu::evict_batch":
        "nothing is written for a thread that holds what the write may want";
    WriteTogether "write-together" Reclaim "Mmu::write_out":
        "pages that are neighbours go to swap as neighbours, in few writes";

    // Decoded code.
    BarrierAtMark "barrier-at-mark" Code "Mmu::code_frame":
        "a store by another vCPU that missed the mark has been made before the code is read";
    CodeAtStore "code-at-store" Code "Frames::code_written":
        "code is decoded again once its page was stored to";
    CodeAtFlush "code-at-flush" Code "SoftTlb::change_version":
        "code found by an address is looked for again once its translation was forgotten";

    // The VMM's.
    FirmwareFlush "firmware-flush" Flush "Flusher::flush":
        "hardware that was asked to flush uses nothing from before, where a flush suffices";
    NotifierFlush "notifier-flush" Flush "Flusher::flush":
        "the same where KVM shadows our tables: the host takes away what was removed";
    FlushBesideHardware "flush-beside-hardware" Flush "Flusher::flush":
        "the software TLB of a vCPU that hardware runs too forgets with it";
    HardwareOwesFlush "hardware-owes-flush" Flush "Core::heed":
        "and hardware forgets with the software TLB";
    NotifyAtShootdown "notify-at-shootdown" Flush "Coherence::shoot_down_frames":
        "a frame that the host is said to have seen to is in no vCPU's TLB";
    BusAtSplit "bus-at-split" Wait "GuestBus::update_locked":
        "no other vCPU is at memory while a locked access is made that no aligned word holds";
    ShootdownAtDescriptors "shootdown-at-descriptors" Wait "DescriptorTables::stored_to":
        "no vCPU runs on with a copy of a descriptor from before a store";
}

/// What needs no flush, no kick and no wait, and why.
pub const NEEDS_NONE: &[(&str, &str)] = &[
    ("a fill of an absent entry", "TLBs do not keep what is not there"),
    ("a fill that allows more", "a TLB with less faults, which forgets the page, and walks again"),
    ("a page read back from swap", "nothing maps it before it is there"),
    ("the end of a watch", "what is read-only still becomes writable by a fault"),
    ("a guest table that goes unsync", "the same"),
    ("an accessed or dirty bit that is set", "no TLB reaches less by it"),
    (
        "a CR3 switch between roots",
        "entries carry the root that they were made under, or are flushed as the guest asked",
    ),
];

impl Rule {
    /// The rule of that name.
    pub fn named(name: &str) -> Option<Rule> {
        Rule::ALL.iter().copied().find(|rule| rule.name() == name)
    }
}

/// Which rules are in force: all, or all but one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    left_out: Option<Rule>,
}

const _: () = assert!(size_of::<Rules>() == 1, "INV-RULE-1");

impl Rules {
    /// True, but for the rule that is left out.
    #[inline(always)]
    pub fn keep(self, rule: Rule) -> bool {
        self.left_out != Some(rule)
    }

    /// All but one: a guest by them is not safe.
    pub const fn all_but(rule: Rule) -> Rules {
        Rules { left_out: Some(rule) }
    }

    /// The one that is left out.
    pub const fn left_out(self) -> Option<Rule> {
        self.left_out
    }
}

#[cfg(all(feature = "omissions", debug_assertions))]
mod points {
    use std::cell::RefCell;

    type Call = Box<dyn FnOnce()>;

    thread_local! {
        static NEXT: RefCell<Option<(u32, Call)>> = const { RefCell::new(None) };
    }

    /// Calls `call` at the `nth` [`crate::sync::point`] that this thread comes to from now on, the first being 1: what another
    /// thread does there, in the one order that a test is about. Locks of the code there are held then.
    pub fn at_point(nth: u32, call: impl FnOnce() + 'static) {
        NEXT.set(Some((nth, Box::new(call))));
    }

    pub(crate) fn pass_point() {
        match NEXT.take() {
            Some((1, call)) => call(),
            Some((nth, call)) => NEXT.set(Some((nth - 1, call))),
            None => {}
        }
    }
}

#[cfg(all(feature = "omissions", debug_assertions))]
pub use points::at_point;
#[cfg(all(feature = "omissions", debug_assertions))]
pub(crate) use points::pass_point;

/// docs/RULES.md.
pub fn as_markdown() -> String {
    let mut text = String::from(
        "# The rules of coherence and of reclaim\n\nEach stands in the code by its name (`mmu/src/rules.rs`, from which this page is made). \
         `cargo test` leaves\nout each in turn and something must notice: see SPECIFICATION.md. `umbra scenario` shows what some of them are for.\n\n\
         | rule | sort | where | protects |\n|---|---|---|---|\n",
    );
    for rule in Rule::ALL {
        let (name, sort) = (rule.name(), rule.sort().name());
        text += &format!("| `{name}` | {sort} | `{}` | {} |\n", rule.place(), rule.protects());
    }
    text += "\n## What needs none\n\n| what | why |\n|---|---|\n";
    NEEDS_NONE.iter().for_each(|(what, why)| text += &format!("| {what} | {why} |\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_found_by_its_name_and_by_no_other() {
        for rule in Rule::ALL {
            assert_eq!(Rule::named(rule.name()), Some(*rule));
        }
        assert_eq!(Rule::named("nonsense"), None);
    }

    #[test]
    fn the_page_in_print_is_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/RULES.md");
        if std::env::var_os("UMBRA_BLESS").is_some() {
            std::fs::write(path, as_markdown()).expect("written");
        }
        let printed = std::fs::read_to_string(path).expect("docs/RULES.md");
        assert!(printed == as_markdown(), "run this test with UMBRA_BLESS=1 to print it anew");
    }
}
