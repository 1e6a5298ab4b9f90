/* User programs: ELF files embedded in the kernel's image.
 *
 * Holds: the programs are linked by program.ld, so every segment starts on a page and shares none. */
#include "image.h"

#include "check.h"

struct elf_header {
    u8 ident[16];
    u16 type, machine;
    u32 version, entry, phoff, shoff, flags;
    u16 ehsize, phentsize, phnum, shentsize, shnum, shstrndx;
};

struct elf_segment {
    u32 type, offset, vaddr, paddr, filesz, memsz, flags, align;
};

#define PT_LOAD 1
#define PF_X 1
#define PF_W 2

#define PROGRAM(id, file)                                                  \
    extern const u8 program_##id##_elf[], program_##id##_elf_end[];        \
    const struct program program_##id = {file, program_##id##_elf, program_##id##_elf_end};

PROGRAM(hello, "hello")
PROGRAM(mm, "mm")
PROGRAM(access, "access")
PROGRAM(spin, "spin")
PROGRAM(sweep, "sweep")
PROGRAM(storm, "storm")
PROGRAM(mix, "mix")
PROGRAM(fpu, "fpu")
PROGRAM(fpu_fresh, "fpu_fresh")
PROGRAM(reclaim, "reclaim")
PROGRAM(shoot, "shoot")
PROGRAM(age, "age")

static bool map_segment(struct space *space, const struct program *program, const struct elf_segment *segment)
{
    ASSERT(segment->vaddr % PAGE_SIZE == 0);
    struct region region = {.start = segment->vaddr,
                            .end = ALIGN_UP(segment->vaddr + segment->memsz, PAGE_SIZE),
                            .image = program->elf + segment->offset,
                            .image_bytes = segment->filesz};
    if (segment->flags & PF_W)
        region.flags |= REGION_WRITE;
    if (segment->flags & PF_X)
        region.flags |= REGION_EXEC;
    space->brk_start = space->brk = max_u32(space->brk, region.end);
    return space_map(space, region);
}

bool image_map(struct space *space, const struct program *program, u32 *entry)
{
    const struct elf_header *header = (const struct elf_header *)program->elf;
    const struct elf_segment *segments = (const struct elf_segment *)(program->elf + header->phoff);
    for (u32 i = 0; i < header->phnum; i++)
        if (segments[i].type == PT_LOAD && segments[i].memsz && !map_segment(space, program, &segments[i]))
            return false;
    *entry = header->entry;
    return true;
}
