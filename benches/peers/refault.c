/* What evicting a page and bringing it back costs by the kernel's own means: userfaultfd and madvise.
 *
 *   the owner of the page                      the handler's thread
 *   copy the page out
 *   madvise(MADV_DONTNEED): it is gone
 *   store to it: fault  ---------------------> read the fault
 *                                              UFFDIO_COPY from the copy: the page is there, the owner awake
 *
 * Reads a count of operations a line, does so many on pages in turn, and answers with the nanoseconds of one, on average.
 * What the host forbids is said on standard error, with status 3. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define PAGES 512ul

static unsigned char *pages, *copies;
static int faults;

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(3);
}

static void *handle(void *unused)
{
    struct uffd_msg message;
    while (read(faults, &message, sizeof message) == sizeof message) {
        if (message.event != UFFD_EVENT_PAGEFAULT)
            continue;
        uint64_t at = message.arg.pagefault.address & ~(PAGE - 1);
        struct uffdio_copy copy = {.dst = at, .src = (uintptr_t)copies + (at - (uintptr_t)pages), .len = PAGE};
        if (ioctl(faults, UFFDIO_COPY, &copy))
            fail("UFFDIO_COPY");
    }
    return unused;
}

static int open_userfaultfd(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    return fd;
}

static void set_up(void)
{
    pages = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    copies = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (pages == MAP_FAILED || copies == MAP_FAILED)
        fail("mmap");
    if (madvise(pages, PAGES * PAGE, MADV_NOHUGEPAGE))
        fail("MADV_NOHUGEPAGE");
    memset(pages, 7, PAGES * PAGE);
    faults = open_userfaultfd();
    if (faults < 0)
        fail("userfaultfd");
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register all = {.range = {.start = (uintptr_t)pages, .len = PAGES * PAGE},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(faults, UFFDIO_API, &api) || ioctl(faults, UFFDIO_REGISTER, &all))
        fail("UFFDIO_REGISTER");
    pthread_t handler;
    if ((errno = pthread_create(&handler, NULL, handle, NULL)))
        fail("pthread_create");
}

static void evict_and_touch(unsigned long page)
{
    volatile unsigned char *at = pages + page * PAGE;
    memcpy(copies + page * PAGE, pages + page * PAGE, PAGE);
    if (madvise(pages + page * PAGE, PAGE, MADV_DONTNEED))
        fail("MADV_DONTNEED");
    at[8] = (unsigned char)(at[8] + 1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

int main(void)
{
    unsigned long count;
    set_up();
    while (scanf("%lu", &count) == 1) {
        double begun = now();
        for (unsigned long n = 0; n < count; n++)
            evict_and_touch(n % PAGES);
        printf("%.1f\n", (now() - begun) / (double)count);
        fflush(stdout);
    }
    return 0;
}
