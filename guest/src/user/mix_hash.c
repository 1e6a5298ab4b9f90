/* CRC-32 by a table of bytes, made at the first call; Adler-32 with its remainder taken once in a block. */
#include "mix.h"

#define POLYNOMIAL 0xedb88320u /* reflected */
#define ADLER_MODULUS 65521u
#define ADLER_BLOCK 5552u /* the most bytes before 32 bits overflow */

static u32 table[256];

static void make_table(void)
{
    for (u32 byte = 0; byte < 256; byte++) {
        u32 crc = byte;
        for (u32 bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        table[byte] = crc;
    }
}

u32 crc32(const u8 *data, u32 bytes)
{
    if (table[1] == 0)
        make_table();
    u32 crc = ~0u;
    for (u32 i = 0; i < bytes; i++)
        crc = crc >> 8 ^ table[(crc ^ data[i]) & 0xff];
    return ~crc;
}

u32 adler32(const u8 *data, u32 bytes)
{
    u32 low = 1, high = 0;
    for (u32 at = 0; at < bytes;) {
        for (u32 end = min_u32(bytes, at + ADLER_BLOCK); at < end; at++) {
            low += data[at];
            high += low;
        }
        low %= ADLER_MODULUS;
        high %= ADLER_MODULUS;
    }
    return high << 16 | low;
}
