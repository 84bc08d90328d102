// Loads a library by dlopen (its path is the first argument) and has it touch; and is called back by it.
// With `unlink` as second argument, both files are deleted while the program runs.
#include <dlfcn.h>
#include <string.h>

#include "../truth.h"

static struct share shares[] = {{"library_touch", 192 * MIB, 0}, {"called_back", 128 * MIB, 0}};
static unsigned state = 5;

NOINLINE void called_back(char *memory, size_t bytes) {
    dirty(memory, bytes);
    STAY("called");
}

int main(int argc, char **argv) {
    if (argc < 2)
        return 125;
    for (int i = 0; i < 2; i++)
        shares[i].want = scaled(shares[i].want);
    void *library = dlopen(argv[1], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 125;
    }
    void (*touch)(char *, size_t) = (void (*)(char *, size_t))dlsym(library, "library_touch");
    void (*back)(void (*)(char *, size_t), char *, size_t) =
        (void (*)(void (*)(char *, size_t), char *, size_t))dlsym(library, "library_calls_back");
    if (!touch || !back)
        return 125;
    if (argc > 2 && strcmp(argv[2], "unlink") == 0 && (unlink(argv[1]) != 0 || unlink(argv[0]) != 0))
        return 125;
    while (shares[0].done < shares[0].want || shares[1].done < shares[1].want) {
        size_t bytes = next_piece(&shares[0], &state);
        if (bytes) {
            char *memory = fresh(bytes);
            touch(memory, bytes);
            munmap(memory, bytes);
        }
        bytes = next_piece(&shares[1], &state);
        if (bytes) {
            char *memory = fresh(bytes);
            back(called_back, memory, bytes);
            munmap(memory, bytes);
        }
    }
    tell("library", shares, 2);
    return 0;
}
