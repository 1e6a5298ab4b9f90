/* The serial console, printk, and the ways in which a run ends. */
#ifndef CONSOLE_H
#define CONSOLE_H

#include "types.h"

void console_init(void);
void console_write(const char *text, u32 bytes);

/* Knows %s %c %u %x and %llx, with a width and a leading 0 for numbers (%08x), and %%. */
void printk(const char *format, ...) __attribute__((format(printf, 1, 2)));
void vprintk(const char *format, va_list args);

/* Writes `status` (STATUS_* of umbra_abi.h) to the debug-exit port. */
void debug_exit(u32 status) __attribute__((noreturn));

#endif
