/* What scenes need of memory: an address space without a process, pages in it, and all other memory taken. */
#ifndef SCENE_MEMORY_H
#define SCENE_MEMORY_H

#include "space.h"

#define SCENE_BASE 0x40000000u

/* A space with one anonymous region of `pages` pages from SCENE_BASE on, or with the shared file there. */
void scene_space(struct space *space, u32 pages);
void scene_file_space(struct space *space);
/* Stores to the page as a process would: by the page tables, so that the CPU sets A and D. False when it cannot be had. */
bool scene_store(struct space *space, u32 page, u32 value);
/* What is in it; brought in if need be. */
bool scene_load(struct space *space, u32 page, u32 *value);

/* Takes frames until so many are free, and gives them all back. */
void scene_leave_free(u32 frames);
/* The same, but that there may be fewer. */
void scene_leave_at_most(u32 frames);
void scene_give_back(void);

#endif
