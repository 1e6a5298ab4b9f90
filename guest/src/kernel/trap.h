/* Traps: the frame that every entry builds, and where each goes. */
#ifndef TRAP_H
#define TRAP_H

#include "types.h"

/* Exceptions 0..31, the timer, virtio and what CPUs send each other. */
#define TRAP_STUBS 36

#define TRAP_DIVIDE 0
#define TRAP_NMI 2
#define TRAP_NO_FPU 7
#define TRAP_DOUBLE_FAULT 8
#define TRAP_PAGE_FAULT 14

/* Page-fault error code. */
#define FAULT_P (1u << 0)
#define FAULT_W (1u << 1)
#define FAULT_U (1u << 2)
#define FAULT_RSVD (1u << 3)
#define FAULT_FETCH (1u << 4)

/* What traps.S leaves on the kernel stack. The last two words are there only when the trap came from user mode. */
struct trap_frame {
    u32 edi, esi, ebp, esp_ignored, ebx, edx, ecx, eax;
    u32 es, ds;
    u32 vector, error;
    u32 eip, cs, eflags;
    u32 user_esp, user_ss;
};

extern const void *const trap_stubs[TRAP_STUBS];
extern const char trap_syscall_stub[], trap_spurious_stub[];
/* Where a new task's stack returns to: finishes the switch, then leaves through the frame above it. */
extern const char trap_return_first[];

/* Called by traps.S with interrupts off. */
void trap_dispatch(struct trap_frame *frame);

/* The privilege that the *interrupted* code had, from the frame: the selector that the CPU pushed. */
static inline bool trap_from_user(const struct trap_frame *frame) { return frame->cs & 3; }

const char *trap_name(u32 vector);

#endif
