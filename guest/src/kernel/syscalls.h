/* System calls: number in EAX, arguments in EBX, ECX and EDX, result in EAX. Shared with the programs. */
#ifndef SYSCALLS_H
#define SYSCALLS_H

#define SYS_EXIT 1        /* status 0..255; does not return */
#define SYS_FORK 2        /* child's pid, 0 in the child, SYS_ERROR when it cannot be */
#define SYS_WAIT 3        /* u32 *status; pid of the child that ended, SYS_ERROR when there is none */
#define SYS_GETPID 4
#define SYS_YIELD 5
#define SYS_WRITE 6       /* text, bytes; to the console */
#define SYS_BRK 7         /* new end of the heap; the end after the call */
#define SYS_MAP 8         /* start, bytes; anonymous and writable */
#define SYS_UNMAP 9       /* start, bytes */
#define SYS_TALLY 10      /* checks, errors; added to the run's */
#define SYS_WITNESS 11    /* name, start, pages; publishes mapped pages and keeps them */
#define SYS_PREEMPTIONS 12 /* how often the caller was switched away against its will */
#define SYS_SLEEP 13      /* timer ticks */

#define SYS_PROBE 14      /* what the read in EDX gave; EAX = what to do next, at the address in ECX (access.c) */
#define SYS_FPU_TAKES 15  /* how often the FPU's registers went to another process */
#define SYS_MEMORY 16     /* frames that there are for tables and pages */
#define SYS_FILE_MAP 17   /* start; maps the shared file from there on, FILE_PAGES_MAX pages of room */
#define SYS_FILE_TRUNCATE 18 /* pages; the file's new length */
#define SYS_FILE_SYNC 19  /* 0 when all of the file is on its disk */
#define SYS_CPUS 20       /* how many there are */
#define SYS_FILE_RESERVE 21 /* page of the file; 0 when it has its place on the disk */
#define SYS_AUDIT 22      /* how much of what reclaim keeps does not hold (audit.c) */
#define SYS_MEET 23       /* 1, or 0 only to ask; how many of its parent's children have met so, or ended */
#define SYS_AGE 24        /* start, pages; takes A from whoever maps these pages' frames. How many had it */
#define SYS_AWAIT_AGE 25  /* (address): until somebody has done that; the word there, as it is then */

/* What SYS_PROBE asks for. */
#define PROBE_END 0
#define PROBE_READ 1
#define PROBE_WRITE 2   /* of EDX */
#define PROBE_MODIFY 3  /* increment */
#define PROBE_EXECUTE 4 /* call */

/* Pages of the shared file, at most. */
#define FILE_PAGES_MAX 1024

#define SYS_ERROR 0xffffffff

/* In the flags that a program starts with. */
#define FLAG_NX 1
#define FLAG_NO_XM 2     /* allow=no-xm */
#define FLAG_MXCSR_ANY 4 /* allow=mxcsr-any */
#define FLAG_FAST 8      /* the CPU can be given much to do */
#define FLAGS_WORK_SHIFT 8 /* from there on: work= */

#endif
