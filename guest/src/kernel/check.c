/* Checks that a workload counts, and the closing line. */
#include "check.h"

#include "boot.h"
#include "console.h"
#include "umbra_abi.h"

#define FAILURES_PRINTED_MAX 10

struct tally tally;

void check(bool holds, const char *what)
{
    tally.checks++;
    if (holds)
        return;
    if (tally.errors++ < FAILURES_PRINTED_MAX)
        printk("pager: check failed: %s\n", what);
}

static const char *const workload_names[] = {
#define X(id, name) name,
    WORKLOADS(X)
#undef X
};

void finish(u32 status)
{
    printk("pager: verdict=%s workload=%s paging=%s checks=%u errors=%u\n", status ? "FAIL" : "PASS",
           workload_names[boot.options.workload], boot.options.legacy ? "legacy" : "pae", tally.checks,
           tally.errors);
    debug_exit(status);
}
