// What the workloads with known truth share: fresh memory in uneven pieces, touching it inline, and the line that says
// how much each function touched. Compiles as C and as C++.
#ifndef TRUTH_H
#define TRUTH_H

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define PAGE ((size_t)4096)
#define NOINLINE __attribute__((noinline, noclone))
#define INLINE static inline __attribute__((always_inline))

// Pages of one piece: uneven, and without a common period with any sampling quantum.
INLINE size_t piece_pages(unsigned *state) {
    *state = *state * 1103515245u + 12345u;
    return 3 + (*state >> 16) % 190;
}

// Fresh memory, not touched.
INLINE char *fresh(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        exit(125);
    }
    return (char *)memory;
}

// With TRUTH_PACE_US in the environment: one page every so many microseconds, so that another tracer can follow.
INLINE unsigned pace_us(void) {
    static int known = -1;
    if (known < 0) {
        const char *text = getenv("TRUTH_PACE_US");
        known = text ? atoi(text) : 0;
    }
    return (unsigned)known;
}

// With TRUTH_SCALE in the environment: a part of the bytes, 1/TRUTH_SCALE.
INLINE size_t scaled(size_t bytes) {
    const char *text = getenv("TRUTH_SCALE");
    size_t scale = text ? (size_t)atoi(text) : 1;
    return bytes / (scale ? scale : 1);
}

// The first touch of every page, in whatever function this is inlined into.
INLINE void dirty(char *memory, size_t bytes) {
    unsigned pace = pace_us();
    for (size_t at = 0; at < bytes; at += PAGE) {
        *(volatile char *)(memory + at) = 1;
        if (pace)
            usleep(pace);
    }
}

// The end of a function that must stay on the stack while it calls: no tail call, no merging with another function.
#define STAY(text) __asm__ volatile("" ::"r"(text) : "memory")

// What is still to be touched by one function.
struct share {
    const char *name;
    size_t want, done;
};

// The next piece of a share: never more than is left.
INLINE size_t next_piece(struct share *share, unsigned *state) {
    size_t bytes = piece_pages(state) * PAGE, left = share->want - share->done;
    if (bytes > left)
        bytes = left;
    share->done += bytes;
    return bytes;
}

// The truth, as one line of JSON at the end. `touch`: bytes whose innermost function of that list it is. `within`: bytes
// that this function or what it called touched; NULL for none.
INLINE void tell_within(const char *workload, const struct share *shares, size_t count, const char *within, size_t bytes) {
    printf("{\"workload\": \"%s\", \"touch\": {", workload);
    for (size_t i = 0; i < count; i++)
        printf("%s\"%s\": %zu", i ? ", " : "", shares[i].name, shares[i].done);
    printf("}");
    if (within)
        printf(", \"within\": {\"%s\": %zu}", within, bytes);
    printf("}\n");
    fflush(stdout);
}

INLINE void tell(const char *workload, const struct share *shares, size_t count) {
    tell_within(workload, shares, count, NULL, 0);
}

#endif
