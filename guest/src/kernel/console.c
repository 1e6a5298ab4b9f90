/* The serial console, and printk.
 *
 * Story: COM1 at 0x3f8, polled. Once the line-status register says that the transmitter is empty, its FIFO takes 16
 * bytes without being asked again: every port access is an exit for whoever runs us. */
#include "console.h"

#include "cpu.h"
#include "string.h"
#include "umbra_abi.h"

#define COM1 0x3f8
#define COM_DATA (COM1 + 0)
#define COM_INTERRUPTS (COM1 + 1)
#define COM_FIFO (COM1 + 2)
#define COM_LINE (COM1 + 3)
#define COM_MODEM (COM1 + 4)
#define COM_STATUS (COM1 + 5)
#define LINE_DIVISOR 0x80
#define LINE_8N1 0x03
#define FIFO_ENABLE_CLEAR 0x07
#define MODEM_DTR_RTS 0x03
#define STATUS_TRANSMITTER_EMPTY 0x20
#define FIFO_BYTES 16

void console_init(void)
{
    out8(COM_INTERRUPTS, 0);
    out8(COM_LINE, LINE_DIVISOR);
    out8(COM_DATA, 1); /* divisor 1: 115200 baud */
    out8(COM_INTERRUPTS, 0);
    out8(COM_LINE, LINE_8N1);
    out8(COM_FIFO, FIFO_ENABLE_CLEAR);
    out8(COM_MODEM, MODEM_DTR_RTS);
}

void console_write(const char *text, u32 bytes)
{
    for (u32 i = 0; i < bytes; i++) {
        if (i % FIFO_BYTES == 0)
            while (!(in8(COM_STATUS) & STATUS_TRANSMITTER_EMPTY))
                ;
        out8(COM_DATA, (u8)text[i]);
    }
}

/* One line under construction; flushed when full and at the end. */
struct line {
    char text[128];
    u32 bytes;
};

static void line_put(struct line *line, char c)
{
    if (line->bytes == sizeof(line->text)) {
        console_write(line->text, line->bytes);
        line->bytes = 0;
    }
    line->text[line->bytes++] = c;
}

static void line_digits(struct line *line, const char *digits, u32 count, u32 width, char pad)
{
    for (; width > count; width--)
        line_put(line, pad);
    while (count)
        line_put(line, digits[--count]);
}

static void line_decimal(struct line *line, u32 value, u32 width, char pad)
{
    char digits[10];
    u32 count = 0;
    do
        digits[count++] = (char)('0' + value % 10);
    while ((value /= 10));
    line_digits(line, digits, count, width, pad);
}

static void line_hex(struct line *line, u64 value, u32 width, char pad)
{
    char digits[16];
    u32 count = 0;
    do
        digits[count++] = "0123456789abcdef"[value & 15];
    while ((value >>= 4));
    line_digits(line, digits, count, width, pad);
}

static void line_string(struct line *line, const char *s)
{
    while (*s)
        line_put(line, *s++);
}

void vprintk(const char *format, va_list args)
{
    struct line line = {.bytes = 0};
    for (; *format; format++) {
        if (*format != '%') {
            line_put(&line, *format);
            continue;
        }
        char pad = ' ';
        u32 width = 0, longs = 0;
        if (*++format == '0')
            pad = '0';
        for (; *format >= '0' && *format <= '9'; format++)
            width = width * 10 + (u32)(*format - '0');
        for (; *format == 'l'; format++)
            longs++;
        switch (*format) {
        case 's': line_string(&line, va_arg(args, const char *)); break;
        case 'c': line_put(&line, (char)va_arg(args, int)); break;
        case 'u': line_decimal(&line, va_arg(args, u32), width, pad); break;
        case 'x': line_hex(&line, longs == 2 ? va_arg(args, u64) : va_arg(args, u32), width, pad); break;
        default: line_put(&line, *format); break;
        }
    }
    console_write(line.text, line.bytes);
}

void printk(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vprintk(format, args);
    va_end(args);
}

void debug_exit(u32 status)
{
    out32(DEBUG_EXIT_PORT, status);
    for (;;)
        __asm__ volatile("cli; hlt");
}
