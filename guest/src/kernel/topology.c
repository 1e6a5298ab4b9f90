/* Which CPUs there are, as the firmware's tables tell.
 *
 *   ACPI       "RSD PTR " -> XSDT or RSDT -> MADT -> an entry of type 0 for each CPU
 *   MP table   "_MP_" -> configuration table -> an entry of type 0 for each CPU, the first of all
 *
 * Story: early.c asks once, with paging off, since the tables may lie anywhere below 4 GiB. The MP table is asked where there is
 * no MADT, as older kernels do it the other way round.
 * Holds: nothing is believed before its checksum is right, and no loop goes beyond a table's length, nor a table beyond
 * TABLE_MAX. This file is linked at its physical address and calls nothing outside itself.
 * See: ACPI 6.5, 5.2.5 to 5.2.12; MultiProcessor Specification 1.4, 4. */
#include "topology.h"

#define EBDA_SEGMENT 0x40e
#define EBDA_SEARCHED 1024
#define BIOS_START 0xe0000
#define BIOS_MP_START 0xf0000
#define BIOS_END 0x100000
#define PARAGRAPH 16
#define TABLE_MAX MIB

#define WORD(a, b, c, d) ((u32)(a) | (u32)(b) << 8 | (u32)(c) << 16 | (u32)(d) << 24)

struct rsdp {
    u32 signature[2];
    u8 checksum, oem[6], revision;
    u32 rsdt;
    /* From revision 2 on. */
    u32 length;
    u64 xsdt;
} __attribute__((packed));
#define RSDP_FIRST_BYTES 20

struct acpi_table {
    u32 signature, length;
    u8 revision, checksum, oem[26];
} __attribute__((packed));

struct madt {
    struct acpi_table header;
    u32 lapic, flags;
    u8 entries[];
} __attribute__((packed));
#define MADT_CPU 0
#define MADT_CPU_BYTES 8
#define MADT_CPU_ENABLED 1

struct mp_pointer {
    u32 signature, table;
    u8 paragraphs, revision, checksum, features[5];
} __attribute__((packed));

struct mp_table {
    u32 signature;
    u16 bytes;
    u8 revision, checksum, id[20];
    u32 oem_table;
    u16 oem_bytes, entry_count;
    u32 lapic, extended;
    u8 entries[];
} __attribute__((packed));
#define MP_CPU 0
#define MP_CPU_BYTES 20
#define MP_CPU_ENABLED 1

struct found {
    u8 *ids;
    u32 count, most;
};

static void add(struct found *found, u8 id)
{
    if (found->count < found->most)
        found->ids[found->count++] = id;
}

static bool sums_to_zero(const void *table, u32 bytes)
{
    const u8 *at = table;
    u8 sum = 0;
    for (u32 i = 0; i < bytes; i++)
        sum = (u8)(sum + at[i]);
    return sum == 0;
}

/* What stands on a paragraph, begins with that word and sums to zero. Next to nothing begins so: a slow CPU comes here too. */
static const void *search(u32 start, u32 end, u32 signature, u32 bytes)
{
    for (const u32 *at = (const u32 *)start; at < (const u32 *)end; at += PARAGRAPH / 4)
        if (*at == signature && sums_to_zero(at, bytes))
            return at;
    return NULL;
}

/* The first KiB of the firmware's data at the end of the first 640 KiB; 0 where there is none. */
static u32 ebda(void)
{
    u32 pointer = EBDA_SEGMENT;
    __asm__("" : "+r"(pointer)); /* so low an address is nothing that the compiler would have read */
    u32 start = *(const u16 *)pointer * PARAGRAPH;
    return start >= 0x1000 && start < BIOS_START ? start : 0;
}

static const void *search_all(u32 bios_start, u32 signature, u32 bytes)
{
    const void *found = NULL;
    if (ebda())
        found = search(ebda(), ebda() + EBDA_SEARCHED, signature, bytes);
    return found ? found : search(bios_start, BIOS_END, signature, bytes);
}

/* ACPI. */

static const struct acpi_table *table_at(u64 address, u32 signature)
{
    const struct acpi_table *table = (const struct acpi_table *)(u32)address;
    if (address == 0 || address >> 32 || table->signature != signature)
        return NULL;
    bool sane = table->length >= sizeof(*table) && table->length <= TABLE_MAX;
    return sane && sums_to_zero(table, table->length) ? table : NULL;
}

static const struct acpi_table *find_listed(const struct acpi_table *list, u32 entry_bytes, u32 signature)
{
    const u8 *entry = (const u8 *)(list + 1), *end = (const u8 *)list + list->length;
    for (; entry + entry_bytes <= end; entry += entry_bytes) {
        u64 address = entry_bytes == 8 ? *(const u64 *)entry : *(const u32 *)entry;
        const struct acpi_table *table = table_at(address, signature);
        if (table)
            return table;
    }
    return NULL;
}

static const struct madt *find_madt(void)
{
    const struct rsdp *rsdp = search_all(BIOS_START, WORD('R', 'S', 'D', ' '), RSDP_FIRST_BYTES);
    if (!rsdp || rsdp->signature[1] != WORD('P', 'T', 'R', ' '))
        return NULL;
    const u32 signature = WORD('A', 'P', 'I', 'C');
    const struct acpi_table *list = rsdp->revision >= 2 ? table_at(rsdp->xsdt, WORD('X', 'S', 'D', 'T')) : NULL;
    if (list)
        return (const struct madt *)find_listed(list, 8, signature);
    list = table_at(rsdp->rsdt, WORD('R', 'S', 'D', 'T'));
    return list ? (const struct madt *)find_listed(list, 4, signature) : NULL;
}

/* An entry is a type, its length, and in one of a CPU: a number, the APIC's id, flags. */
static void read_madt(const struct madt *madt, struct found *found)
{
    const u8 *entry = madt->entries, *end = (const u8 *)madt + madt->header.length;
    for (; entry + 2 <= end && entry[1] >= 2 && entry + entry[1] <= end; entry += entry[1])
        if (entry[0] == MADT_CPU && entry[1] >= MADT_CPU_BYTES && *(const u32 *)(entry + 4) & MADT_CPU_ENABLED)
            add(found, entry[3]);
}

/* MP table. */

/* An entry of a CPU: type, the APIC's id, its version, flags. */
static void read_mp_table(const struct mp_table *table, struct found *found)
{
    if (!table || table->signature != WORD('P', 'C', 'M', 'P') || !sums_to_zero(table, table->bytes))
        return;
    const u8 *entry = table->entries, *end = (const u8 *)table + table->bytes;
    for (; entry + MP_CPU_BYTES <= end && entry[0] == MP_CPU; entry += MP_CPU_BYTES)
        if (entry[3] & MP_CPU_ENABLED)
            add(found, entry[1]);
}

u32 topology_find(u8 *apic_ids, u32 most)
{
    struct found found = {.ids = apic_ids, .most = most};
    const struct madt *madt = find_madt();
    if (madt)
        read_madt(madt, &found);
    const struct mp_pointer *pointer = found.count ? NULL : search_all(BIOS_MP_START, WORD('_', 'M', 'P', '_'), PARAGRAPH);
    if (pointer)
        read_mp_table((const struct mp_table *)pointer->table, &found);
    return found.count;
}
