// Loads a library (its path is the first argument), is called back by it, and there writes over the library's file, then
// cuts it to nothing, touching memory all the while. What it was called from is gone, so it ends there, with 7.
#include <dlfcn.h>
#include <fcntl.h>
#include <string.h>

#include "../truth.h"

static struct share shares[] = {{"over_its_caller", 96 * MIB, 0}};
static const char *path;

NOINLINE void touch_third(unsigned *state) {
    size_t until = shares[0].done + shares[0].want / 3;
    while (shares[0].done < until) {
        size_t bytes = next_piece(&shares[0], state);
        if (!bytes)
            break;
        char *memory = fresh(bytes);
        dirty(memory, bytes);
        munmap(memory, bytes);
    }
    STAY("third");
}

NOINLINE void over_its_caller(char *memory, size_t bytes) {
    (void)memory;
    (void)bytes;
    unsigned state = 53;
    touch_third(&state);
    int library = open(path, O_RDWR);
    char noise[4096];
    for (size_t i = 0; i < sizeof noise; i++)
        noise[i] = (char)(i * 167 + 13);
    for (int page = 0; page < 3; page++)
        if (library < 0 || pwrite(library, noise, sizeof noise, page * 4096) < 0)
            _exit(125);
    touch_third(&state);
    if (ftruncate(library, 0) != 0)
        _exit(125);
    touch_third(&state);
    tell("rewritten", shares, 1);
    _exit(7);
}

int main(int argc, char **argv) {
    if (argc < 2)
        return 125;
    path = argv[1];
    void *library = dlopen(path, RTLD_NOW);
    if (!library)
        return 125;
    void (*back)(void (*)(char *, size_t), char *, size_t) =
        (void (*)(void (*)(char *, size_t), char *, size_t))dlsym(library, "library_calls_back");
    if (!back)
        return 125;
    back(over_its_caller, NULL, 0);
    return 125;
}
