/* What it costs, by the kernel's own means, to make a vCPU that runs guest code leave it and to know that it has.
 *
 *   the asker                                  the vCPU's thread
 *                                              KVM_RUN: the guest counts
 *   immediate_exit = 1, signal --------------> EINTR
 *   sees it  <-------------------------------- answered += 1; immediate_exit = 0, and in again
 *
 * Reads a count of operations a line, does so many, and answers with the nanoseconds of one, the median. What the host
 * forbids is said on standard error, with status 3. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BYTES 0x10000ul
#define CODE 0x1000
#define COUNTER 0x2000
#define MOST 4096ul

static unsigned char *memory;
static struct kvm_run *run;
static int vcpu;
static atomic_int thread;
static atomic_ulong answered;

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(3);
}

static void on_signal(int number) { (void)number; }

static void *run_guest(void *unused)
{
    atomic_store(&thread, (int)syscall(SYS_gettid));
    for (;;) {
        if (ioctl(vcpu, KVM_RUN, 0) == 0 || errno != EINTR)
            fail("KVM_RUN");
        __atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        atomic_fetch_add(&answered, 1);
    }
    return unused;
}

/* Real mode: inc word [COUNTER]; jmp back. */
static void set_up(void)
{
    static const unsigned char code[] = {0xff, 0x06, COUNTER & 0xff, COUNTER >> 8, 0xeb, 0xfa};
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0)
        fail("/dev/kvm");
    memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region all = {.memory_size = BYTES, .userspace_addr = (uintptr_t)memory};
    if (memory == MAP_FAILED || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &all))
        fail("memory");
    memcpy(memory + CODE, code, sizeof code);
    if ((vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) < 0)
        fail("KVM_CREATE_VCPU");
    run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct kvm_sregs segments;
    struct kvm_regs registers = {.rip = CODE, .rflags = 2};
    if (run == MAP_FAILED || ioctl(vcpu, KVM_GET_SREGS, &segments))
        fail("KVM_GET_SREGS");
    segments.cs.base = segments.cs.selector = 0;
    if (ioctl(vcpu, KVM_SET_SREGS, &segments) || ioctl(vcpu, KVM_SET_REGS, &registers))
        fail("KVM_SET_REGS");
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGRTMIN, &action, NULL);
    pthread_t runner;
    if ((errno = pthread_create(&runner, NULL, run_guest, NULL)))
        fail("pthread_create");
}

static void wait_until_inside(void)
{
    volatile uint16_t *counter = (volatile uint16_t *)(memory + COUNTER);
    for (int steps = 0; steps < 2; steps++)
        for (uint16_t before = *counter; *counter == before;)
            sched_yield();
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static double kick(void)
{
    wait_until_inside();
    unsigned long before = atomic_load(&answered);
    double begun = now();
    __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_tgkill, getpid(), atomic_load(&thread), SIGRTMIN);
    while (atomic_load(&answered) == before)
        sched_yield();
    return now() - begun;
}

static int compare(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

int main(void)
{
    static double times[MOST];
    unsigned long count;
    set_up();
    while (scanf("%lu", &count) == 1 && count > 0 && count <= MOST) {
        for (unsigned long n = 0; n < count; n++)
            times[n] = kick();
        qsort(times, count, sizeof *times, compare);
        printf("%.1f\n", times[count / 2]);
        fflush(stdout);
    }
    return 0;
}
