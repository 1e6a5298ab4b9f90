/* The command line: key=value words, each known or refused.
 *
 * Story: early.c calls this once, with paging still off, because `paging=` and `lowmem=` decide what page tables to
 * build. Holds: this file is linked at its physical address and so calls nothing outside itself. */
#include "boot.h"
#include "layout.h"
#include "omit.h"
#include "paging.h"

static bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

static u32 word_length(const char *word)
{
    u32 n = 0;
    while (word[n] && !is_space(word[n]))
        n++;
    return n;
}

/* If the word starts with `key`, returns what follows it. */
static const char *value_of(const char *word, const char *key)
{
    for (; *key; word++, key++)
        if (*word != *key)
            return NULL;
    return word;
}

static bool value_is(const char *value, const char *name)
{
    for (; *name; value++, name++)
        if (*value != *name)
            return false;
    return word_length(value) == 0;
}

/* Decimal, without sign, at most `max`. */
static bool parse_number(const char *value, u32 max, u32 *out)
{
    u32 n = 0, digits = word_length(value);
    if (digits == 0 || digits > 9)
        return false;
    for (u32 i = 0; i < digits; i++) {
        if (value[i] < '0' || value[i] > '9')
            return false;
        n = n * 10 + (u32)(value[i] - '0');
    }
    *out = n;
    return n <= max;
}

static bool parse_workload(const char *value, enum workload *out)
{
#define X(id, name)               \
    if (value_is(value, name)) {  \
        *out = WORKLOAD_##id;     \
        return true;              \
    }
    WORKLOADS(X)
#undef X
    return false;
}

static bool quirk_named(const char *name, u32 length, u32 *quirks)
{
#define X(id, text)                                                             \
    if (length == sizeof(text) - 1 && value_of(name, text) == name + length) {  \
        *quirks |= QUIRK_##id;                                                  \
        return true;                                                            \
    }
    QUIRKS(X)
#undef X
    return false;
}

static bool flush_named(const char *name, u32 length, u32 *flushes)
{
#define X(id, text, what)                                                       \
    if (length == sizeof(text) - 1 && value_of(name, text) == name + length) {  \
        *flushes |= 1u << FLUSH_##id;                                           \
        return true;                                                            \
    }
    FLUSHES(X)
#undef X
    return false;
}

/* Names with a comma between two. */
static bool parse_names(const char *value, bool (*named)(const char *name, u32 length, u32 *set), u32 *set)
{
    u32 left = word_length(value);
    *set = 0;
    while (1) {
        u32 length = 0;
        while (length < left && value[length] != ',')
            length++;
        if (!named(value, length, set))
            return false;
        if (length == left)
            return true;
        value += length + 1;
        left -= length + 1;
    }
}

static bool parse_paging(const char *value, bool *legacy)
{
    *legacy = value_is(value, "legacy");
    return *legacy || value_is(value, "pae");
}

static bool parse_pace(const char *value, enum pace *pace)
{
    *pace = value_is(value, "slow") ? PACE_SLOW : value_is(value, "fast") ? PACE_FAST : PACE_AUTO;
    return *pace != PACE_AUTO || value_is(value, "auto");
}

/* False where it does not fit. */
static bool copy_word(const char *word, char *to, u32 bytes)
{
    u32 length = word_length(word);
    if (length >= bytes)
        return false;
    for (u32 i = 0; i < length; i++)
        to[i] = word[i];
    to[length] = 0;
    return true;
}

static bool parse_word(const char *word, struct options *options)
{
    const char *value;
    if ((value = value_of(word, "workload=")))
        return parse_workload(value, &options->workload);
    if ((value = value_of(word, "paging=")))
        return parse_paging(value, &options->legacy);
    if ((value = value_of(word, "seed=")))
        return parse_number(value, 999999999, &options->seed);
    if ((value = value_of(word, "scale=")))
        return parse_number(value, SCALE_MAX, &options->scale) && options->scale > 0;
    if ((value = value_of(word, "lowmem=")))
        return parse_number(value, LOWMEM_MAX, &options->lowmem) && options->lowmem >= LOWMEM_MIN &&
               options->lowmem % 4 == 0;
    if ((value = value_of(word, "nmi=")))
        return parse_number(value, NMI_HZ_MAX, &options->nmi);
    if ((value = value_of(word, "work=")))
        return parse_number(value, WORK_MAX, &options->work);
    if ((value = value_of(word, "cpus=")))
        return parse_number(value, CPUS_MAX, &options->cpus) && options->cpus > 0;
    if ((value = value_of(word, "ram=")))
        return parse_number(value, FRAMES_MAX / (MIB / PAGE_SIZE), &options->ram);
    if ((value = value_of(word, "hz=")))
        return parse_number(value, TIMER_HZ_MAX, &options->hz) && options->hz > 0;
    if ((value = value_of(word, "pace=")))
        return parse_pace(value, &options->pace);
    if ((value = value_of(word, "allow=")))
        return parse_names(value, quirk_named, &options->allow);
    if ((value = value_of(word, "omit=")))
        return parse_names(value, flush_named, &options->omit);
    if ((value = value_of(word, "case=")))
        return copy_word(value, options->case_name, sizeof(options->case_name));
    options->bug |= value_is(word, "bug");
    return value_is(word, "bug");
}

/* The first word may be the image's name: loaders put it there. A name holds no '='. */
static bool is_image_name(const char *word, u32 length)
{
    for (u32 i = 0; i < length; i++)
        if (word[i] == '=')
            return false;
    return true;
}

bool command_line_parse(const char *line, struct options *options, char *bad_word, u32 bad_word_bytes)
{
    options->workload = WORKLOAD_RECLAIM;
    options->legacy = false;
    options->seed = 1;
    options->scale = 100;
    options->lowmem = LOWMEM_DEFAULT;
    options->hz = TIMER_HZ_DEFAULT;
    options->nmi = NMI_HZ_DEFAULT;
    options->ram = 0;
    options->work = 0;
    options->cpus = 0;
    options->pace = PACE_AUTO;
    options->allow = 0;
    options->omit = 0;
    options->case_name[0] = 0;
    options->bug = false;
    bool first = true;
    while (*line) {
        u32 length = word_length(line);
        if (length && !(first && is_image_name(line, length)) && !parse_word(line, options)) {
            u32 kept = min_u32(length, bad_word_bytes - 1);
            for (u32 i = 0; i < kept; i++)
                bad_word[i] = line[i];
            bad_word[kept] = 0;
            return false;
        }
        first = first && !length;
        line += length ? length : 1;
    }
    return true;
}
