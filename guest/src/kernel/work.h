/* The workloads. Each prints its result lines and counts its checks. */
#ifndef WORK_H
#define WORK_H

void work_hello(void);
void work_mm(void);
void work_kmap(void);
void work_access(void);
void work_spin(void);
void work_sweep(void);
void work_storm(void);
void work_mix(void);
void work_fpu(void);
void work_reclaim(void);
void work_disk(void);
void work_shoot(void);
void work_age(void);
void work_report(void);
void work_series(void);
void work_stack(void);
void work_superblock(void);
void work_huge(void);
/* Reads through a null pointer in kernel code: what a kernel fault looks like. */
void work_oops(void);

#endif
