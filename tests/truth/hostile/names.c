// A function whose symbol is renamed to markup and terminal escapes once it is compiled, in a program whose file is
// named likewise. Ends with 7, to see that this is kept.
#include "../truth.h"

static struct share shares[] = {{"renamed_later", 96 * MIB, 0}};

NOINLINE void renamed_later(char *memory, size_t bytes) {
    dirty(memory, bytes);
    STAY("renamed");
}

int main(void) {
    unsigned state = 37;
    while (shares[0].done < shares[0].want) {
        size_t bytes = next_piece(&shares[0], &state);
        char *memory = fresh(bytes);
        renamed_later(memory, bytes);
        munmap(memory, bytes);
    }
    tell("names", shares, 1);
    return 7;
}
