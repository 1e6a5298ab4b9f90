/* What the architecture says about one access.
 *
 * Story: written from the Intel SDM, volume 3A: 4.3 and 4.4 (formats and reserved bits), 4.6 (access rights), 4.7 (error
 * codes), 4.8 (accessed and dirty flags). It looks at raw entries, not at how the case came about. */
#include "access.h"

#include "boot.h"

static bool writes(u32 kind) { return kind == PROBE_WRITE || kind == PROBE_MODIFY; }

/* 4.3, 4.4: what must be 0 in a present entry. Legacy tables have no such bits, a legacy large page has bit 21. PAE has bits
 * 52 to 62, and in a large page 13 to 20; the bits between the physical address width and 52 depend on the CPU, and the
 * workload leaves them alone. */
static pte_t reserved_bits(bool large)
{
    if (!paging.pae)
        return large ? 1u << 21 : 0;
    pte_t high = 0x7ff0000000000000ull;
    return large ? high | 0x1fe000 : high;
}

/* 4.6: the rights are those of all levels together. */
static bool permitted(const struct access_setup *setup, pte_t all, pte_t any)
{
    bool user_page = all & PTE_U, writable = all & PTE_W, executable = !(setup->nx && (any & PTE_NX));
    if (setup->user)
        return user_page && (!writes(setup->kind) || writable) && (setup->kind != PROBE_EXECUTE || executable);
    if (writes(setup->kind))
        return writable || !setup->wp;
    if (setup->kind == PROBE_EXECUTE)
        return executable && !(setup->smep && user_page);
    return true;
}

/* 4.7: the bits that tell of the access. Fetches are told apart only if something could refuse them. */
static u32 error_of_access(const struct access_setup *setup)
{
    u32 error = setup->user ? FAULT_U : 0;
    if (writes(setup->kind))
        error |= FAULT_W;
    if (setup->kind == PROBE_EXECUTE && (setup->nx || setup->smep))
        error |= FAULT_FETCH;
    return error;
}

static void refuse(struct access_outcome *outcome, u32 error)
{
    outcome->fault = true;
    outcome->error = error;
}

/* One level. Returns false if the walk ends here. */
static bool pass(struct access_outcome *outcome, pte_t entry, pte_t reserved, u32 error, u32 quirks)
{
    u32 rsvd = quirks & QUIRK_RSVD_NO_P ? FAULT_RSVD : FAULT_RSVD | FAULT_P;
    if (!(entry & PTE_P))
        refuse(outcome, error);
    else if (entry & reserved)
        refuse(outcome, error | rsvd);
    return !outcome->fault;
}

static struct access_outcome predict(const struct access_setup *setup, u32 quirks)
{
    struct access_outcome outcome = {.directory = setup->directory, .table = setup->table};
    u32 error = error_of_access(setup);
    if (paging.pae && !pass(&outcome, setup->root, 0, error, quirks))
        return outcome;
    if (!pass(&outcome, setup->directory, reserved_bits(setup->large), error, quirks))
        return outcome;
    if (!setup->large && !pass(&outcome, setup->table, reserved_bits(false), error, quirks))
        return outcome;
    pte_t second = setup->large ? setup->directory : setup->table;
    if (!permitted(setup, setup->directory & second, setup->directory | second)) {
        refuse(&outcome, error | FAULT_P);
        return outcome;
    }
    outcome.directory |= PTE_A;
    pte_t *last = setup->large ? &outcome.directory : &outcome.table;
    *last |= PTE_A | (writes(setup->kind) ? PTE_D : 0);
    return outcome;
}

struct access_outcome access_predict(const struct access_setup *setup, u32 quirks)
{
    if (setup->kind != PROBE_MODIFY || !(quirks & QUIRK_RMW_READ))
        return predict(setup, quirks);
    struct access_setup half = *setup;
    half.kind = PROBE_READ;
    struct access_outcome outcome = predict(&half, quirks);
    if (outcome.fault)
        return outcome;
    half.kind = PROBE_WRITE;
    half.directory = outcome.directory;
    half.table = outcome.table;
    return predict(&half, quirks);
}

pte_t access_open_flags(const struct access_setup *setup, const struct access_outcome *expected)
{
    bool walked = (setup->directory & PTE_P) && !(setup->directory & reserved_bits(false));
    return expected->fault && !setup->large && walked ? PTE_A : 0;
}

bool access_agrees(const struct access_setup *setup, const struct access_outcome *expected,
                   const struct access_outcome *got)
{
    pte_t open = access_open_flags(setup, expected);
    return expected->fault == got->fault && (!got->fault || expected->error == got->error) &&
           expected->table == got->table && ((expected->directory ^ got->directory) & ~open) == 0;
}
