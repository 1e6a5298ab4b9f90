/* A machine of eight registers and a memory of bytes, interpreted; its program is the sieve of Eratosthenes. */
#include "mix.h"

enum op {
    SET,   /* a = b */
    ADD,   /* a = b + c, registers */
    LOAD,  /* a = memory[b] */
    STORE, /* memory[a] = b */
    JNZ,   /* to c if a is not 0 */
    JGE,   /* to c if a >= b */
    JMP,   /* to c */
    HALT,
};

struct instruction {
    u8 op, a, b, c;
};

enum { ONE, LIMIT, I, J, COUNT, MARK, REGISTERS = 8 };

static const struct instruction sieve[] = {
    {SET, ONE, 1, 0},
    {SET, COUNT, 0, 0},
    {SET, I, 2, 0},
    {JGE, I, LIMIT, 13}, /* 3: the next number */
    {LOAD, MARK, I, 0},
    {JNZ, MARK, 0, 11},
    {ADD, COUNT, COUNT, ONE},
    {ADD, J, I, I},
    {JGE, J, LIMIT, 11}, /* 8: its multiples */
    {STORE, J, ONE, 0},
    {JMP, 0, 0, 14},
    {ADD, I, I, ONE}, /* 11 */
    {JMP, 0, 0, 3},
    {HALT, 0, 0, 0}, /* 13 */
    {ADD, J, J, I},
    {JMP, 0, 0, 8},
};

static u8 memory[VM_SIEVE];

static void step(const struct instruction *instruction, u32 *r, u32 *next)
{
    u32 a = instruction->a, b = instruction->b, c = instruction->c;
    switch (instruction->op) {
    case SET: r[a] = b; break;
    case ADD: r[a] = r[b] + r[c]; break;
    case LOAD: r[a] = memory[r[b] % VM_SIEVE]; break;
    case STORE: memory[r[a] % VM_SIEVE] = (u8)r[b]; break;
    case JNZ: *next = r[a] ? c : *next; break;
    case JGE: *next = r[a] >= r[b] ? c : *next; break;
    case JMP: *next = c; break;
    }
}

u32 vm_count_primes(void)
{
    u32 r[REGISTERS] = {[LIMIT] = VM_SIEVE};
    for (u32 i = 0; i < VM_SIEVE; i++)
        memory[i] = 0;
    for (u32 at = 0; sieve[at].op != HALT;) {
        const struct instruction *instruction = &sieve[at++];
        step(instruction, r, &at);
    }
    return r[COUNT];
}
