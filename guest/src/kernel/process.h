/* Running one program to its end, from a kernel thread. */
#ifndef PROCESS_H
#define PROCESS_H

#include "image.h"

/* Runs the program and checks that it left no frame behind but those it published. Returns its status. */
u32 process_run(const struct program *program);

#endif
