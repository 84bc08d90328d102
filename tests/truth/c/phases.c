// Three functions, one after the other, each in one large mapping that stays until the function is done: the order in
// which a curve rises. One of them takes its memory from the heap, by brk.
#include <malloc.h>
#include <string.h>

#include "../truth.h"

static struct share shares[] = {{"first_phase", 256 * MIB, 0}, {"heap_phase", 128 * MIB, 0}, {"last_phase", 192 * MIB, 0}};

NOINLINE void first_phase(void) {
    size_t bytes = shares[0].done = shares[0].want;
    char *memory = fresh(bytes);
    dirty(memory, bytes);
    munmap(memory, bytes);
    STAY("first");
}

// 64 pieces below the threshold of mmap, so that they come from the heap; none is given back.
NOINLINE void heap_phase(void) {
    size_t piece = shares[1].want / 64 / PAGE * PAGE;
    for (int i = 0; i < 64; i++) {
        char *memory = malloc(piece);
        if (!memory)
            exit(125);
        for (size_t at = 0; at < piece; at += PAGE)
            *(volatile char *)(memory + at) = 1;
        shares[1].done += piece;
    }
    STAY("heap");
}

NOINLINE void last_phase(void) {
    size_t bytes = shares[2].done = shares[2].want;
    char *memory = fresh(bytes);
    // the C library's own function touches: it has no frame of a caller of ours but this one
    memset(memory, 1, bytes);
    munmap(memory, bytes);
    STAY("last");
}

int main(void) {
    for (int i = 0; i < 3; i++)
        shares[i].want = scaled(shares[i].want);
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    first_phase();
    heap_phase();
    last_phase();
    tell("phases", shares, 3);
    return 0;
}
