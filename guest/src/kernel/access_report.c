/* Deviations of the access workload, gathered into classes.
 *
 * Story: a case that did not go as the architecture says is explained, if it can be, by the smallest set of known quirks. Cases
 * with the same explanation, kind, expected and actual result, and wrong flags are one line, which names the axes that all
 * of them share. */
#include "access.h"

#include "boot.h"
#include "check.h"
#include "console.h"

#define CLASSES_MAX 32
#define UNEXPLAINED 0

/* Flags that do not stand as they should after the access. */
#define WRONG_DIR_A 1
#define WRONG_PAGE_A 2
#define WRONG_PAGE_D 4
#define WRONG_ELSE 8   /* another bit of an entry */
#define WRONG_DATA 16  /* CR2, what was read, or what was stored */

struct result {
    bool fault;
    u32 error;
};

struct class {
    u32 quirks; /* what explains it, or UNEXPLAINED */
    u32 kind;
    struct result expected, got;
    u32 wrong;
    u32 shared_axes;
    u32 count;
};

static struct class classes[CLASSES_MAX];
static u32 class_count, case_count, deviation_count, not_listed;

static const char *const axis_names[] = {
#define X(id, name) name,
    AXES(X)
#undef X
};

static const char *const quirk_names[] = {
#define X(id, name) name,
    QUIRKS(X)
#undef X
};

static const char *const wrong_names[] = {"dir-A", "page-A", "page-D", "entry", "data"};

static const char *const kind_names[] = {"", "read", "write", "modify", "execute"};

static u32 explain(const struct access_setup *setup, const struct access_outcome *got)
{
    for (u32 quirks = 1; quirks < 1u << QUIRK_COUNT; quirks++) {
        struct access_outcome odd = access_predict(setup, quirks);
        if (access_agrees(setup, &odd, got))
            return quirks;
    }
    return UNEXPLAINED;
}

static struct result result_of(const struct access_outcome *outcome)
{
    return (struct result){outcome->fault, outcome->fault ? outcome->error : 0};
}

static u32 wrong_flags(const struct access_setup *setup, const struct access_outcome *expected,
                       const struct access_outcome *got)
{
    pte_t directory = (expected->directory ^ got->directory) & ~access_open_flags(setup, expected);
    pte_t table = expected->table ^ got->table, page = setup->large ? directory : table;
    u32 wrong = 0;
    wrong |= !setup->large && directory & PTE_A ? WRONG_DIR_A : 0;
    wrong |= page & PTE_A ? WRONG_PAGE_A : 0;
    wrong |= page & PTE_D ? WRONG_PAGE_D : 0;
    return (directory | table) & ~(pte_t)(PTE_A | PTE_D) ? wrong | WRONG_ELSE : wrong;
}

static bool same_result(struct result a, struct result b) { return a.fault == b.fault && a.error == b.error; }

static bool same_class(const struct class *a, const struct class *b)
{
    return a->quirks == b->quirks && a->kind == b->kind && a->wrong == b->wrong &&
           same_result(a->expected, b->expected) && same_result(a->got, b->got);
}

static void add_to_class(const struct class *found, u32 axes)
{
    for (struct class *class = classes; class < classes + class_count; class ++) {
        if (!same_class(class, found))
            continue;
        class->shared_axes &= axes;
        class->count++;
        return;
    }
    if (class_count == CLASSES_MAX) {
        not_listed++;
        return;
    }
    classes[class_count] = *found;
    classes[class_count].shared_axes = axes;
    classes[class_count].count = 1;
    class_count++;
}

void access_report_case(u32 axes, const struct access_setup *setup, const struct access_outcome *got, bool strayed)
{
    struct access_outcome expected = access_predict(setup, 0);
    case_count++;
    tally.checks++;
    if (access_agrees(setup, &expected, got) && !strayed)
        return;
    deviation_count++;
    struct class found = {.quirks = strayed ? UNEXPLAINED : explain(setup, got),
                          .kind = setup->kind,
                          .expected = result_of(&expected),
                          .got = result_of(got),
                          .wrong = wrong_flags(setup, &expected, got) | (strayed ? WRONG_DATA : 0)};
    if (found.quirks == UNEXPLAINED || found.quirks & ~boot.options.allow)
        tally.errors++;
    add_to_class(&found, axes);
}

/* Names of the set's members with '+' between them; `none` for the empty set. */
static void print_set(u32 set, const char *const *names, u32 count, const char *none)
{
    const char *between = "";
    for (u32 i = 0; i < count; i++) {
        if (!(set & 1u << i))
            continue;
        printk("%s%s", between, names[i]);
        between = "+";
    }
    if (!set)
        printk("%s", none);
}

static void print_result(const char *key, struct result result)
{
    if (result.fault)
        printk(" %s=pf:%02x", key, result.error);
    else
        printk(" %s=ok", key);
}

static void print_class(const struct class *class)
{
    printk("pager: deviation %s+", kind_names[class->kind]);
    print_set(class->shared_axes, axis_names, AXIS_COUNT, "any");
    print_result("expected", class->expected);
    print_result("got", class->got);
    printk(" wrong=");
    print_set(class->wrong, wrong_names, ARRAY_SIZE(wrong_names), "error-code");
    printk(" count=%u class=", class->count);
    print_set(class->quirks, quirk_names, QUIRK_COUNT, "unknown");
    printk("\n");
}

void access_report_print(void)
{
    printk("pager: access format=%s cases=%u deviations=%u\n", paging.pae ? "pae" : "legacy", case_count,
           deviation_count);
    for (const struct class *class = classes; class < classes + class_count; class ++)
        print_class(class);
    if (not_listed)
        printk("pager: deviation others count=%u\n", not_listed);
}
