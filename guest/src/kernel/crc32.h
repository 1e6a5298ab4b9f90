/* CRC-32 as of IEEE 802.3 and zlib. */
#ifndef CRC32_H
#define CRC32_H

#include "types.h"

/* Continues `crc` (0 to start) over `bytes`, a multiple of 4, from an address that is one too. */
u32 crc32(u32 crc, const void *data, u32 bytes);

#endif
