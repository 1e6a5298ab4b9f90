/* Text of a sort: words of a small vocabulary, the first ones more often, with spaces between. */
#include "mix.h"

#define WORDS 64u
#define LETTERS_MIN 2u
#define LETTERS_MASK 7u

/* A word is its number's own random letters. */
static u32 put_word(u8 *text, u32 room, u32 word)
{
    u32 state = word * 0x85ebca6bu + 1, letters = LETTERS_MIN + (random_next(&state) & LETTERS_MASK), put = 0;
    for (; put < letters && put < room; put++)
        text[put] = (u8)('a' + random_next(&state) % 26);
    return put;
}

void text_make(u8 *text, u32 bytes, u32 seed)
{
    u32 state = seed;
    for (u32 at = 0; at < bytes;) {
        u32 one = random_next(&state) % WORDS, other = random_next(&state) % WORDS;
        at += put_word(text + at, bytes - at, one < other ? one : other);
        if (at < bytes)
            text[at++] = ' ';
    }
}
