// Three functions inside one another that each touch memory of their own, in small uneven pieces that alternate.
// Each round gives its pieces back.
#include "../truth.h"

static struct share shares[] = {
    {"outer_touch", 128 * MIB, 0}, {"middle_touch", 192 * MIB, 0}, {"inner_touch", 256 * MIB, 0}};
static unsigned state = 1;

NOINLINE void inner_touch(void) {
    size_t bytes = next_piece(&shares[2], &state);
    if (!bytes)
        return;
    char *memory = fresh(bytes);
    dirty(memory, bytes);
    munmap(memory, bytes);
    STAY("inner");
}

NOINLINE void middle_touch(void) {
    size_t bytes = next_piece(&shares[1], &state);
    char *memory = bytes ? fresh(bytes) : NULL;
    dirty(memory, bytes / PAGE / 2 * PAGE);
    inner_touch();
    if (bytes) {
        size_t half = bytes / PAGE / 2 * PAGE;
        dirty(memory + half, bytes - half);
        munmap(memory, bytes);
    }
    STAY("middle");
}

NOINLINE void outer_touch(void) {
    size_t bytes = next_piece(&shares[0], &state);
    char *memory = bytes ? fresh(bytes) : NULL;
    dirty(memory, bytes);
    middle_touch();
    if (bytes)
        munmap(memory, bytes);
    STAY("outer");
}

int main(void) {
    for (int i = 0; i < 3; i++)
        shares[i].want = scaled(shares[i].want);
    while (shares[0].done < shares[0].want || shares[1].done < shares[1].want || shares[2].done < shares[2].want)
        outer_touch();
    tell_within("nested", shares, 3, "outer_touch", shares[0].done + shares[1].done + shares[2].done);
    return 0;
}
