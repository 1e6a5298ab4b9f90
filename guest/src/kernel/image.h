/* User programs: ELF files embedded in the kernel's image. */
#ifndef IMAGE_H
#define IMAGE_H

#include "space.h"

struct program {
    const char *name;
    const u8 *elf, *end;
};

extern const struct program program_hello, program_mm, program_access, program_spin,
    program_sweep, program_storm, program_mix,
    program_fpu, program_fpu_fresh, program_reclaim, program_shoot, program_age;

/* Makes regions of the program's segments and sets where its heap starts. Nothing is loaded until it is touched. */
bool image_map(struct space *space, const struct program *program, u32 *entry);

#endif
