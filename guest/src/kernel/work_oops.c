/* Workload `oops`: a fault in kernel code, to see the dump. */
#include "types.h"
#include "work.h"

void work_oops(void)
{
    u32 nowhere = 0x10;
    __asm__("" : "+r"(nowhere)); /* keep it from the compiler that this is nowhere */
    (void)*(const volatile u32 *)nowhere;
}
