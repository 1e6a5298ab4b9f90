/* A product of integer matrices modulo 2^32, and Freivalds' check of it: (A B) x is A (B x) for any vector x. */
#include "mix.h"

#define N 24

static u32 a[N][N], b[N][N], product[N][N];

static void fill(u32 matrix[N][N], u32 *state)
{
    for (u32 i = 0; i < N; i++)
        for (u32 j = 0; j < N; j++)
            matrix[i][j] = random_next(state);
}

static void multiply(void)
{
    for (u32 i = 0; i < N; i++)
        for (u32 j = 0; j < N; j++) {
            u32 sum = 0;
            for (u32 k = 0; k < N; k++)
                sum += a[i][k] * b[k][j];
            product[i][j] = sum;
        }
}

static void apply(u32 matrix[N][N], const u32 *from, u32 *to)
{
    for (u32 i = 0; i < N; i++) {
        to[i] = 0;
        for (u32 j = 0; j < N; j++)
            to[i] += matrix[i][j] * from[j];
    }
}

bool matrix_product_holds(u32 seed)
{
    u32 x[N], once[N], twice[N], direct[N], state = seed;
    fill(a, &state);
    fill(b, &state);
    multiply();
    for (u32 i = 0; i < N; i++)
        x[i] = random_next(&state);
    apply(b, x, once);
    apply(a, once, twice);
    apply(product, x, direct);
    for (u32 i = 0; i < N; i++)
        if (twice[i] != direct[i])
            return false;
    return true;
}
