// Ten thousand executable mappings, made of one page of this very file, and then memory is touched. Ends with 7.
#include <fcntl.h>

#include "../truth.h"

static struct share shares[] = {{"among_mappings", 96 * MIB, 0}};

NOINLINE void among_mappings(char *memory, size_t bytes) {
    dirty(memory, bytes);
    STAY("among");
}

int main(void) {
    int own = open("/proc/self/exe", O_RDONLY);
    if (own < 0)
        return 125;
    for (int i = 0; i < 10000; i++)
        // the same page each time: neighbours of one file whose offsets do not follow on are not merged
        if (mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, own, 0) == MAP_FAILED)
            return 125;
    unsigned state = 41;
    while (shares[0].done < shares[0].want) {
        size_t bytes = next_piece(&shares[0], &state);
        char *memory = fresh(bytes);
        among_mappings(memory, bytes);
        munmap(memory, bytes);
    }
    tell("mappings", shares, 1);
    return 7;
}
