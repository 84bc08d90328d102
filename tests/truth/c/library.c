// A shared library whose functions touch; it is loaded by dlopen, and calls back into its loader in one of them.
#include "../truth.h"

NOINLINE void library_touch(char *memory, size_t bytes) {
    dirty(memory, bytes);
    STAY("library");
}

NOINLINE void library_calls_back(void (*back)(char *, size_t), char *memory, size_t bytes) {
    back(memory, bytes);
    STAY("back");
}
