// The library that the Python workload calls through ctypes.
#include "../truth.h"

NOINLINE size_t touch_for_left(size_t pages) {
    char *memory = fresh(pages * PAGE);
    dirty(memory, pages * PAGE);
    munmap(memory, pages * PAGE);
    return pages * PAGE;
}

// not the same code: a linker may fold equal functions
NOINLINE size_t touch_for_right(size_t pages) {
    char *memory = fresh(pages * PAGE);
    dirty(memory, pages * PAGE);
    STAY("right");
    munmap(memory, pages * PAGE);
    return pages * PAGE;
}
