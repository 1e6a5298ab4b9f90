/* Quicksort about the middle one of three, insertion for what is short. The deeper call takes the shorter side. */
#include "mix.h"

#define SHORT 12u

static void insertion(u32 *values, u32 count)
{
    for (u32 i = 1; i < count; i++) {
        u32 value = values[i], at = i;
        for (; at && values[at - 1] > value; at--)
            values[at] = values[at - 1];
        values[at] = value;
    }
}

static u32 middle(u32 a, u32 b, u32 c)
{
    if (a > b) {
        u32 swap = a;
        a = b;
        b = swap;
    }
    return c < a ? a : c < b ? c : b;
}

/* Returns n so that no value before n is above one from n on, and both sides have some. */
static u32 split(u32 *values, u32 count)
{
    u32 pivot = middle(values[0], values[count / 2], values[count - 1]), low = 0, high = count - 1;
    while (1) {
        while (values[low] < pivot)
            low++;
        while (values[high] > pivot)
            high--;
        if (low >= high)
            return low ? low : 1;
        u32 swap = values[low];
        values[low++] = values[high];
        values[high--] = swap;
    }
}

void sort(u32 *values, u32 count)
{
    while (count > SHORT) {
        u32 left = split(values, count);
        if (left <= count - left) {
            sort(values, left);
            values += left;
            count -= left;
        } else {
            sort(values + left, count - left);
            count = left;
        }
    }
    insertion(values, count);
}
