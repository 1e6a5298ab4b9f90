/* CRC-32, four bytes at a time: one table per byte position, made at the first call. */
#include "crc32.h"

#define POLYNOMIAL 0xedb88320u /* reflected */

static u32 tables[4][256];

static void make_tables(void)
{
    for (u32 byte = 0; byte < 256; byte++) {
        u32 crc = byte;
        for (u32 bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        tables[0][byte] = crc;
    }
    for (u32 position = 1; position < 4; position++)
        for (u32 byte = 0; byte < 256; byte++) {
            u32 before = tables[position - 1][byte];
            tables[position][byte] = before >> 8 ^ tables[0][before & 0xff];
        }
}

u32 crc32(u32 crc, const void *data, u32 bytes)
{
    if (tables[0][1] == 0)
        make_tables();
    crc = ~crc;
    for (const u32 *word = data, *end = word + bytes / 4; word < end; word++) {
        crc ^= *word;
        crc = tables[3][crc & 0xff] ^ tables[2][crc >> 8 & 0xff] ^ tables[1][crc >> 16 & 0xff] ^ tables[0][crc >> 24];
    }
    return ~crc;
}
