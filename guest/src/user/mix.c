/* Program `mix`: a run makes a piece of text, hashes it, packs and unpacks it, sorts, multiplies matrices and interprets
 * bytecode, over some hundred KiB in all.
 *
 * Holds: nothing is compared with a number of our own making alone: what was unpacked is the text and has its hashes, what was
 * sorted is in order and sums up to the same, a product obeys Freivalds, the primes are as many as there are. */
#include "mix.h"
#include "user.h"

#define PIECE 16384u
#define PIECES 16
#define VALUES 2048u

static u8 texts[PIECES][PIECE], packed[PIECE], unpacked[PIECE];
static u32 values[VALUES];

/* Makes, hashes, packs and unpacks; returns the text's CRC. */
static u32 run_text(u8 *text, u32 seed, u32 *packed_bytes)
{
    text_make(text, PIECE, seed);
    u32 crc = crc32(text, PIECE), adler = adler32(text, PIECE);
    u32 bytes = *packed_bytes = lz_pack(packed, PIECE, text, PIECE);
    expect(bytes > 0 && bytes < PIECE / 4 * 3, "text packs to less than three quarters");
    expect(lz_unpack(unpacked, PIECE, packed, bytes) == PIECE, "what was packed unpacks");
    expect(crc32(unpacked, PIECE) == crc && adler32(unpacked, PIECE) == adler, "both hashes are as before");
    u32 differences = 0;
    for (u32 i = 0; i < PIECE; i++)
        differences += unpacked[i] != text[i];
    expect(differences == 0, "the text is as before");
    return crc;
}

static void run_sort(u32 seed)
{
    u32 state = seed, sum = 0, folded = 0;
    for (u32 i = 0; i < VALUES; i++) {
        values[i] = random_next(&state);
        sum += values[i];
        folded ^= values[i];
    }
    sort(values, VALUES);
    u32 descents = 0;
    for (u32 i = 0; i < VALUES; i++) {
        sum -= values[i];
        folded ^= values[i];
        descents += i && values[i - 1] > values[i];
    }
    expect(descents == 0, "sorted values are in order");
    expect(sum == 0 && folded == 0, "sorted values are those from before");
}

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    (void)flags;
    static const u8 digits[] = "123456789";
    expect(crc32(digits, 9) == 0xcbf43926, "the CRC is the one that everybody has");
    expect(adler32(digits, 9) == 0x091e01de, "the Adler sum is the one that everybody has");
    u32 packed_bytes = 0, crc = 0;
    stopwatch_start("mix.run", "runs", scale);
    for (u32 run = 0; run < scale; run++) {
        u32 key = seed * 1000 + run + 1;
        crc = run_text(texts[run % PIECES], key, &packed_bytes);
        run_sort(key);
        expect(vm_count_primes() == VM_PRIMES, "there are as many primes as there are");
        expect(matrix_product_holds(key), "the product is one");
    }
    stopwatch_stop("mix.run");
    say("pager: mix runs=", scale, " bytes=", PIECE, " packed=", packed_bytes, " crc=", crc, NULL);
    tally_report();
    return 0;
}
