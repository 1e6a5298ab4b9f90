/* Regions of memory whose contents somebody outside shall confirm.
 *
 * Story: the table lies in low memory at an address that an ELF note names. The guest writes down which frames make up a region
 * and what CRC it found there itself; whoever runs the guest reads the frames on his own and compares. Layout: src/abi.rs.
 * In the twin image, witness_seal damages one byte after all checks: only the outside can tell. */
#include "witness.h"

#include "crc32.h"
#include "frames.h"
#include "string.h"
#include "window.h"

struct witness_region {
    char name[WITNESS_NAME_BYTES];
    u32 pages;
    u32 crc32;
    u32 gfn_list; /* physical address */
};

struct witness_table {
    u32 magic;
    u32 count;
    struct witness_region regions[WITNESS_REGIONS_MAX];
};

_Static_assert(offsetof(struct witness_table, magic) == WITNESS_OFFSET_MAGIC, "");
_Static_assert(offsetof(struct witness_table, count) == WITNESS_OFFSET_COUNT, "");
_Static_assert(offsetof(struct witness_table, regions) == WITNESS_OFFSET_REGIONS, "");
_Static_assert(sizeof(struct witness_region) == WITNESS_REGION_BYTES, "");
_Static_assert(offsetof(struct witness_region, name) == WITNESS_REGION_NAME, "");
_Static_assert(offsetof(struct witness_region, pages) == WITNESS_REGION_PAGES, "");
_Static_assert(offsetof(struct witness_region, crc32) == WITNESS_REGION_CRC32, "");
_Static_assert(offsetof(struct witness_region, gfn_list) == WITNESS_REGION_GFN_LIST, "");

/* note.S has its address. */
struct witness_table witness_table = {.magic = WITNESS_MAGIC};
static u32 gfn_lists[WITNESS_REGIONS_MAX][WITNESS_PAGES_MAX];

static u32 checksum(const u32 *frames, u32 count)
{
    u32 crc = 0;
    for (u32 i = 0; i < count; i++) {
        void *page = kmap_local(frames[i], "witness");
        crc = crc32(crc, page, PAGE_SIZE);
        kunmap_local(page);
    }
    return crc;
}

bool witness_publish(const char *name, const u32 *frames, u32 count)
{
    if (witness_table.count == WITNESS_REGIONS_MAX || count > WITNESS_PAGES_MAX)
        return false;
    struct witness_region *region = &witness_table.regions[witness_table.count];
    u32 *list = gfn_lists[witness_table.count];
    for (u32 i = 0; i < count; i++) {
        frame_get(frames[i]);
        list[i] = frames[i];
    }
    memcpy(region->name, name, sizeof(region->name));
    region->pages = count;
    region->crc32 = checksum(frames, count);
    region->gfn_list = low_physical(list);
    witness_table.count++;
    return true;
}

u32 witness_frames(void)
{
    u32 frames = 0;
    for (u32 i = 0; i < witness_table.count; i++)
        frames += witness_table.regions[i].pages;
    return frames;
}

#ifdef WITNESS_TWIN
void witness_seal(void)
{
    for (u32 i = 0; i < witness_table.count; i++) {
        if (witness_table.regions[i].pages == 0)
            continue;
        u8 *page = kmap_local(gfn_lists[i][0], "twin");
        page[1234] ^= 0x10;
        kunmap_local(page);
        return;
    }
}
#else
void witness_seal(void) {}
#endif
