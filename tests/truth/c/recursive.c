// A function that calls itself 200 times before its leaf touches, and two that call each other 60 times before theirs
// does. Frames of uneven size, so that a guess at the next frame is wrong.
#include <alloca.h>
#include <string.h>

#include "../truth.h"

static struct share shares[] = {{"leaf_of_200", 192 * MIB, 0}, {"leaf_of_60", 128 * MIB, 0}};
static unsigned state = 7;

NOINLINE void leaf_of_200(void) {
    size_t bytes = next_piece(&shares[0], &state);
    if (!bytes)
        return;
    char *memory = fresh(bytes);
    dirty(memory, bytes);
    munmap(memory, bytes);
    STAY("200");
}

NOINLINE void leaf_of_60(void) {
    size_t bytes = next_piece(&shares[1], &state);
    if (!bytes)
        return;
    char *memory = fresh(bytes);
    dirty(memory, bytes);
    munmap(memory, bytes);
    STAY("60");
}

NOINLINE int dive(int depth) {
    if (depth == 0) {
        leaf_of_200();
        return 0;
    }
    int below = dive(depth - 1);
    STAY("dive");
    return below + 1;
}

NOINLINE int odd(int depth);

NOINLINE int even(int depth) {
    if (depth == 0) {
        leaf_of_60();
        return 0;
    }
    volatile char local[72];
    local[depth % 72] = 1;
    int below = odd(depth - 1);
    return below + local[depth % 72];
}

// alloca: the frame's size is known at run time only, and the compiler keeps it by a frame register
NOINLINE int odd(int depth) {
    volatile char *local = (volatile char *)alloca((size_t)16 + (size_t)depth * 8);
    local[depth % 16] = 1;
    int below = even(depth - 1);
    return below + local[depth % 16];
}

int main(void) {
    for (int i = 0; i < 2; i++)
        shares[i].want = scaled(shares[i].want);
    int sum = 0;
    while (shares[0].done < shares[0].want || shares[1].done < shares[1].want) {
        sum += dive(200);
        sum += even(60);
    }
    tell_within("recursive", shares, 2, "dive", shares[0].done);
    return sum < 0;
}
