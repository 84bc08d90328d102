// Huge pages: one byte of each 2 MiB is written, and 2 MiB become resident, by whoever wrote the first byte.
#include <stdint.h>

#include "../truth.h"

#define HUGE (2 * MIB)

static struct share shares[] = {{"huge_by_two", 192 * MIB, 0}, {"huge_by_six", 384 * MIB, 0}};

// Huge pages to touch; the mapping that they were cut out of goes back with them.
static void touch_all(char *memory, size_t bytes) __attribute__((always_inline));
static inline void touch_all(char *memory, size_t bytes) {
    for (size_t at = 0; at < bytes; at += HUGE)
        *(volatile char *)(memory + at + 4321) = 1;
}

static char *aligned(size_t bytes, char **whole) {
    *whole = fresh(bytes + HUGE);
    char *memory = (char *)(((uintptr_t)*whole + HUGE - 1) / HUGE * HUGE);
    if (madvise(memory, bytes, MADV_HUGEPAGE) != 0)
        exit(125);
    return memory;
}

NOINLINE void huge_by_two(void) {
    char *whole, *memory = aligned(HUGE, &whole);
    touch_all(memory, HUGE);
    shares[0].done += HUGE;
    munmap(whole, 2 * HUGE);
    STAY("two");
}

NOINLINE void huge_by_six(void) {
    char *whole, *memory = aligned(3 * HUGE, &whole);
    touch_all(memory, 3 * HUGE);
    shares[1].done += 3 * HUGE;
    munmap(whole, 4 * HUGE);
    STAY("six");
}

int main(void) {
    while (shares[0].done < shares[0].want || shares[1].done < shares[1].want) {
        if (shares[0].done < shares[0].want)
            huge_by_two();
        if (shares[1].done < shares[1].want)
            huge_by_six();
    }
    tell("huge", shares, 2);
    return 0;
}
