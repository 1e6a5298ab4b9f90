/* What programs use. See user.h. */
#include "user.h"

#define LINE_BYTES 160

struct line {
    char text[LINE_BYTES];
    u32 bytes;
};

static u32 checks, errors;

static void put_text(struct line *line, const char *text)
{
    for (; *text && line->bytes < LINE_BYTES - 1; text++)
        line->text[line->bytes++] = *text;
}

static void put_number(struct line *line, u32 value)
{
    char digits[11];
    u32 at = sizeof(digits) - 1;
    digits[at] = 0;
    do
        digits[--at] = (char)('0' + value % 10);
    while ((value /= 10));
    put_text(line, digits + at);
}

void say(const char *text, ...)
{
    struct line line;
    line.bytes = 0;
    va_list args;
    va_start(args, text);
    put_text(&line, text);
    while (1) {
        put_number(&line, va_arg(args, u32));
        text = va_arg(args, const char *);
        if (!text)
            break;
        put_text(&line, text);
    }
    va_end(args);
    line.text[line.bytes++] = '\n';
    write(line.text, line.bytes);
}

static u64 time_stamp(void)
{
    u64 value;
    __asm__ volatile("rdtsc" : "=A"(value));
    return value;
}

static u64 started;

void stopwatch_start(const char *phase, const char *unit, u32 count)
{
    struct line line;
    line.bytes = 0;
    put_text(&line, "time: begin ");
    put_text(&line, phase);
    put_text(&line, " ");
    put_text(&line, unit);
    put_text(&line, "=");
    put_number(&line, count);
    line.text[line.bytes++] = '\n';
    write(line.text, line.bytes);
    started = time_stamp();
}

void stopwatch_stop(const char *phase)
{
    u32 kilocounts = (u32)((time_stamp() - started) >> 10);
    struct line line;
    line.bytes = 0;
    put_text(&line, "time: end ");
    put_text(&line, phase);
    put_text(&line, " tsc1024=");
    put_number(&line, kilocounts);
    line.text[line.bytes++] = '\n';
    write(line.text, line.bytes);
}

void expect(bool holds, const char *what)
{
    checks++;
    if (holds)
        return;
    struct line line;
    line.bytes = 0;
    put_text(&line, "pager: check failed: ");
    put_text(&line, what);
    line.text[line.bytes++] = '\n';
    if (errors++ < 3)
        write(line.text, line.bytes);
}

void tally_report(void)
{
    system_call(SYS_TALLY, checks, errors, 0);
    tally_forget();
}

void tally_forget(void) { checks = errors = 0; }
