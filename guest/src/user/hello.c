/* Program `hello`: one line, one page of data for the witness. */
#include "user.h"

static char page[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    (void)scale, (void)flags;
    for (u32 i = 0; i < sizeof(page); i += 64)
        page[i] = (char)(seed + i / 64);
    say("pager: hello from ring 3, process ", getpid(), NULL);
    expect(witness("hello-data\0\0\0\0\0", (u32)page, 1) == 0, "the page is published");
    tally_report();
    return 0;
}
