/* Program `access`: does in ring 3 what the kernel's access workload asks for, one access at a time.
 *
 * Story: SYS_PROBE hands back what the last access read and returns with the next order. When an access faults, the kernel
 * does not let the program go on there: it resumes behind the INT, as if SYS_PROBE had been called, with the next order.
 * So the stack pointer is put back at that place (a call that faulted has left its return address). */
#include "user.h"

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    (void)seed, (void)scale, (void)flags;
    __asm__ volatile("mov %%esp, %%esi\n"
                     "1:\tmov %0, %%eax\n\t"
                     "int $0x80\n\t"
                     "mov %%esi, %%esp\n\t"
                     "cmp %1, %%eax\n\t"
                     "je 2f\n\t"
                     "cmp %2, %%eax\n\t"
                     "je 3f\n\t"
                     "cmp %3, %%eax\n\t"
                     "je 4f\n\t"
                     "cmp %4, %%eax\n\t"
                     "jne 5f\n\t"
                     "call *%%ecx\n\t"
                     "jmp 1b\n"
                     "2:\tmov (%%ecx), %%edx\n\t"
                     "jmp 1b\n"
                     "3:\tmov %%edx, (%%ecx)\n\t"
                     "jmp 1b\n"
                     "4:\tincl (%%ecx)\n\t"
                     "jmp 1b\n"
                     "5:"
                     :
                     : "i"(SYS_PROBE), "i"(PROBE_READ), "i"(PROBE_WRITE), "i"(PROBE_MODIFY), "i"(PROBE_EXECUTE)
                     : "eax", "ecx", "edx", "esi", "memory");
    return 0;
}
