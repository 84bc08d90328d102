// Eight threads at once in one address space, each with a function of its own.
#include <pthread.h>

#include "../truth.h"

static struct share shares[8] = {
    {"thread_zero", 96 * MIB, 0}, {"thread_one", 100 * MIB, 0},  {"thread_two", 104 * MIB, 0}, {"thread_three", 112 * MIB, 0},
    {"thread_four", 120 * MIB, 0}, {"thread_five", 128 * MIB, 0}, {"thread_six", 144 * MIB, 0}, {"thread_seven", 160 * MIB, 0},
};

#define THREAD(name, index)                                    \
    NOINLINE void *name(void *nothing) {                       \
        unsigned state = 11 + index;                           \
        for (;;) {                                             \
            size_t bytes = next_piece(&shares[index], &state); \
            if (!bytes)                                        \
                return nothing;                                \
            char *memory = fresh(bytes);                       \
            dirty(memory, bytes);                              \
            munmap(memory, bytes);                             \
        }                                                      \
    }

THREAD(thread_zero, 0)
THREAD(thread_one, 1)
THREAD(thread_two, 2)
THREAD(thread_three, 3)
THREAD(thread_four, 4)
THREAD(thread_five, 5)
THREAD(thread_six, 6)
THREAD(thread_seven, 7)

int main(void) {
    void *(*const entries[8])(void *) = {thread_zero, thread_one,  thread_two, thread_three,
                                         thread_four, thread_five, thread_six, thread_seven};
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) {
        shares[i].want = scaled(shares[i].want);
        if (pthread_create(&threads[i], NULL, entries[i], NULL) != 0)
            return 125;
    }
    for (int i = 0; i < 8; i++)
        pthread_join(threads[i], NULL);
    tell("threads", shares, 8);
    return 0;
}
