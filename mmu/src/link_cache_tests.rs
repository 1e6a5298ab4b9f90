//! Paging-structure caches against what they must forget, keep and notice.

use super::*;
use crate::coherence::NoVcpus;
use crate::rules::{Rule, Rules};
use crate::tlb::TlbKind;
use crate::{Access, Config, Machine, Outcome, SHADOW_PAGES_MIN, Width};

/// Pages of what one link is for.
const REGION: u32 = 512;
const AT: Gva = Gva(0);
/// A page of the same region.
const NEXT: Gva = Gva(1 << 12);

fn region(n: u32) -> Gva {
    Gva((n * REGION) << 12)
}

/// A guest without paging, with more regions than there are shadow pages.
fn world(kind: TlbKind, rules: Rules) -> (Mmu, Vcpu) {
    let config = Config::of_pages((SHADOW_PAGES_MIN + 8) * REGION);
    let mmu = Mmu::new(Machine::anonymous(1024), config, Box::new(NoVcpus)).with_rules(rules);
    let vcpu = mmu.soft_vcpu(0, kind);
    (mmu, vcpu)
}

fn fault(mmu: &Mmu, vcpu: &Vcpu, at: Gva) {
    assert_eq!(mmu.fault(vcpu, at, Access::read(false)), Outcome::Fixed, "{at}");
}

/// Both pages are mapped, and the vCPU, inside, has loaded from the first: it knows the table, and not the second page.
fn loaded(kind: TlbKind, rules: Rules) -> (Mmu, Vcpu) {
    let (mmu, vcpu) = world(kind, rules);
    [AT, NEXT].iter().for_each(|at| fault(&mmu, &vcpu, *at));
    mmu.coherence().request_flush(0);
    assert!(mmu.tlb_enter(&vcpu), "it forgets what the faults have taught it");
    assert_eq!(load(&mmu, &vcpu, AT), Ok(0));
    (mmu, vcpu)
}

fn load(mmu: &Mmu, vcpu: &Vcpu, at: Gva) -> Result<u64, Miss> {
    mmu.tlb_load(vcpu, at, Width::B4, false)
}

fn root(vcpu: &Vcpu) -> RootRef {
    vcpu.roots[0].get().expect("loaded")
}

fn links(vcpu: &Vcpu) -> &LinkCache {
    vcpu.tlb.as_ref().and_then(SoftTlb::links).expect("it has some")
}

fn knows(vcpu: &Vcpu, level: LinkLevel, at: Gva) -> bool {
    links(vcpu).find(level, root(vcpu), at).is_some()
}

/// The one directory leads nowhere any more: nothing is stamped.
fn unlink_unseen(mmu: &Mmu, vcpu: &Vcpu) {
    mmu.store_spte(root(vcpu).pdpt.at(0), Spte::ABSENT);
}

#[test]
fn a_table_that_was_unlinked_is_used_until_something_flushes() {
    for (kind, loaded_still) in [(TlbKind::Sticky, Ok(0)), (TlbKind::Sized, Err(Miss::Fault))] {
        let (mmu, vcpu) = loaded(kind, Rules::default());
        unlink_unseen(&mmu, &vcpu);
        assert_eq!(load(&mmu, &vcpu, NEXT), loaded_still, "{kind:?}");
    }
    type Flush = fn(&SoftTlb);
    let flushes: [(&str, Flush); 4] = [
        ("all", SoftTlb::flush_all),
        ("all but global", SoftTlb::flush_all_but_global),
        ("links", SoftTlb::flush_links),
        ("page fault", |tlb| tlb.flush_page(NEXT)),
    ];
    for (name, flush) in flushes {
        let (mmu, vcpu) = loaded(TlbKind::Sticky, Rules::default());
        unlink_unseen(&mmu, &vcpu);
        flush(vcpu.tlb().expect("it has one"));
        assert_eq!(load(&mmu, &vcpu, NEXT), Err(Miss::Fault), "{name}");
    }
}

#[test]
fn invlpg_forgets_all_links_and_a_page_fault_those_of_its_address() {
    let (mmu, vcpu) = loaded(TlbKind::Sticky, Rules::default());
    let far = region(2);
    mmu.leave(&vcpu);
    fault(&mmu, &vcpu, far);
    assert!(knows(&vcpu, LinkLevel::Directory, AT) && knows(&vcpu, LinkLevel::Directory, far));
    vcpu.tlb().expect("it has one").flush_page(far);
    assert!(knows(&vcpu, LinkLevel::Directory, AT) && !knows(&vcpu, LinkLevel::Directory, far));
    mmu.invalidate_page(&vcpu, far);
    assert!(!knows(&vcpu, LinkLevel::Directory, AT) && !knows(&vcpu, LinkLevel::Root, AT));
}

/// A table that has died is empty. The fault forgets it, or the vCPU would fault for ever.
#[test]
fn a_fault_by_a_dead_table_forgets_it() {
    let (mmu, vcpu) = loaded(TlbKind::Sticky, Rules::default());
    mmu.evict_shadow(u32::MAX);
    assert_eq!(load(&mmu, &vcpu, NEXT), Err(Miss::Fault));
    assert!(!knows(&vcpu, LinkLevel::Directory, NEXT) && !knows(&vcpu, LinkLevel::Root, NEXT));
}

/// Shadow pages of other regions take the place of those that the vCPU knows. It leaves for each fault and comes back.
fn crowd(mmu: &Mmu, vcpu: &Vcpu) {
    for n in 2..SHADOW_PAGES_MIN + 8 {
        mmu.leave(vcpu);
        fault(mmu, vcpu, region(n));
        mmu.tlb_enter(vcpu);
    }
}

/// INV-TLB-3: the table serves again, and nobody flushes.
#[test]
fn a_link_that_outlives_its_table_is_reported() {
    for rule in [Rule::DebtOfEviction, Rule::ShootdownBeforeReuse] {
        let (mmu, vcpu) = loaded(TlbKind::Sticky, Rules::all_but(rule));
        crowd(&mmu, &vcpu);
        let end = load(&mmu, &vcpu, NEXT);
        let Err(Miss::Incoherent(violation)) = end else { panic!("without {}: {end:?}", rule.name()) };
        let Violation::Link(stale) = *violation else { panic!("{violation}") };
        assert!(matches!(stale.served, Served::Table(_)) && stale.lives.0 < stale.lives.1, "{stale}");
        assert!(stale.to_string().contains("INV-TLB-3: vCPU 0 used a stale link"), "{stale}");
    }
    let (mmu, vcpu) = loaded(TlbKind::Sticky, Rules::default());
    crowd(&mmu, &vcpu);
    assert_eq!(
        load(&mmu, &vcpu, NEXT),
        Err(Miss::Fault),
        "with the flush that was owed there is nothing to report"
    );
}

/// The same where the frame was given back.
#[test]
fn a_link_that_outlives_its_tables_frame_is_reported() {
    let (mmu, vcpu) = loaded(TlbKind::Sticky, Rules::all_but(Rule::ShootdownBeforeGivingBack));
    mmu.evict_shadow(u32::MAX);
    while mmu.give_back_dead(None) {}
    let end = load(&mmu, &vcpu, NEXT);
    let Err(Miss::Incoherent(violation)) = end else { panic!("{end:?}") };
    assert!(violation.to_string().contains("the table's frame was given back"), "{violation}");
    // With the rule in force it waits for the vCPU.
    let (mmu, vcpu) = loaded(TlbKind::Sticky, Rules::default());
    mmu.evict_shadow(u32::MAX);
    mmu.leave(&vcpu);
    while mmu.give_back_dead(None) {}
    assert!(mmu.tlb_enter(&vcpu));
    assert_eq!(load(&mmu, &vcpu, NEXT), Err(Miss::Fault));
}

/// And where the root serves another address space.
#[test]
fn a_link_that_outlives_its_root_is_reported() {
    let (mmu, vcpu) = loaded(TlbKind::Sticky, Rules::default());
    let other = RootRef { life: root(&vcpu).life + 1, ..root(&vcpu) };
    vcpu.roots[0].set(Some(other));
    let end = load(&mmu, &vcpu, NEXT);
    let Err(Miss::Incoherent(violation)) = end else { panic!("{end:?}") };
    assert!(violation.to_string().contains("serves another address space"), "{violation}");
}
