/* The parts of program `mix`, each in a file of its own. */
#ifndef MIX_H
#define MIX_H

#include "types.h"

/* mix_random.c: numbers that depend on `state` alone. */
u32 random_next(u32 *state);

/* mix_text.c: `bytes` bytes that repeat themselves the way text does. */
void text_make(u8 *text, u32 bytes, u32 seed);

/* mix_hash.c: as zlib has them. */
u32 crc32(const u8 *data, u32 bytes);
u32 adler32(const u8 *data, u32 bytes);

/* mix_lz.c: both return the bytes written, 0 when they would be more than `room` or the input makes no sense. */
u32 lz_pack(u8 *to, u32 room, const u8 *from, u32 bytes);
u32 lz_unpack(u8 *to, u32 room, const u8 *from, u32 bytes);

/* mix_sort.c */
void sort(u32 *values, u32 count);

/* mix_vm.c: primes below VM_SIEVE, counted by bytecode. */
#define VM_SIEVE 1024u
#define VM_PRIMES 172u
u32 vm_count_primes(void);

/* mix_matrix.c: whether the product of two random matrices is one. */
bool matrix_product_holds(u32 seed);

#endif
