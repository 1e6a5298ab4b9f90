/* Compression: back references to what came before, found by a hash of four bytes.
 *
 *   0..127   n      the next n + 1 bytes as they are
 *   128..255 n d d  n - 128 + 4 bytes, copied from d bytes back (low byte first); the copy may overlap what it makes */
#include "mix.h"

#define RUN_MAX 128u
#define MATCH_MIN 4u
#define MATCH_MAX (127u + MATCH_MIN)
#define DISTANCE_MAX 0xffffu
#define HASH_BITS 11

struct sink {
    u8 *to;
    u32 room, at;
    bool full;
};

static void put(struct sink *sink, u32 byte)
{
    if (sink->at == sink->room)
        sink->full = true;
    else
        sink->to[sink->at++] = (u8)byte;
}

static void put_run(struct sink *sink, const u8 *from, u32 bytes)
{
    while (bytes) {
        u32 part = min_u32(bytes, RUN_MAX);
        put(sink, part - 1);
        for (u32 i = 0; i < part; i++)
            put(sink, from[i]);
        from += part;
        bytes -= part;
    }
}

static void put_match(struct sink *sink, u32 length, u32 distance)
{
    put(sink, 128 + length - MATCH_MIN);
    put(sink, distance & 0xff);
    put(sink, distance >> 8);
}

static u32 hash(const u8 *at)
{
    u32 four = at[0] | (u32)at[1] << 8 | (u32)at[2] << 16 | (u32)at[3] << 24;
    return four * 2654435761u >> (32 - HASH_BITS);
}

static u32 match_length(const u8 *early, const u8 *late, u32 most)
{
    u32 length = 0;
    while (length < most && early[length] == late[length])
        length++;
    return length;
}

u32 lz_pack(u8 *to, u32 room, const u8 *from, u32 bytes)
{
    static u32 seen[1u << HASH_BITS]; /* where a hash was seen last, plus 1 */
    struct sink sink = {.to = to, .room = room};
    u32 at = 0, run = 0; /* where the bytes begin that no reference covers yet */
    for (u32 i = 0; i < ARRAY_SIZE(seen); i++)
        seen[i] = 0;
    while (at + MATCH_MIN <= bytes) {
        u32 *slot = &seen[hash(from + at)], before = *slot;
        *slot = at + 1;
        u32 distance = before ? at + 1 - before : 0, length = 0;
        if (distance && distance <= DISTANCE_MAX)
            length = match_length(from + at - distance, from + at, min_u32(bytes - at, MATCH_MAX));
        if (length < MATCH_MIN) {
            at++;
            continue;
        }
        put_run(&sink, from + run, at - run);
        put_match(&sink, length, distance);
        run = at += length;
    }
    put_run(&sink, from + run, bytes - run);
    return sink.full ? 0 : sink.at;
}

u32 lz_unpack(u8 *to, u32 room, const u8 *from, u32 bytes)
{
    struct sink sink = {.to = to, .room = room};
    for (u32 at = 0; at < bytes && !sink.full;) {
        u32 token = from[at++], length = token < 128 ? token + 1 : token - 128 + MATCH_MIN;
        if (bytes - at < (token < 128 ? length : 2))
            return 0;
        if (token < 128) {
            for (; length; length--)
                put(&sink, from[at++]);
            continue;
        }
        u32 distance = from[at] | (u32)from[at + 1] << 8;
        at += 2;
        if (distance == 0 || distance > sink.at)
            return 0;
        for (; length && !sink.full; length--)
            put(&sink, to[sink.at - distance]);
    }
    return sink.full ? 0 : sink.at;
}
