// Memory is touched while the stack pointer points where nothing is mapped. Ends with 7.
#include "../truth.h"

static struct share shares[] = {{"without_a_stack", 96 * MIB, 0}};

NOINLINE void without_a_stack(char *at, size_t bytes, char *nowhere) {
    char *end = at + bytes;
#if defined(__x86_64__)
    __asm__ volatile("mov %%rsp, %%r14\n\t"
                     "mov %[nowhere], %%rsp\n"
                     "1:\tmovb $1, (%[at])\n\t"
                     "add $4096, %[at]\n\t"
                     "cmp %[end], %[at]\n\t"
                     "jb 1b\n\t"
                     "mov %%r14, %%rsp"
                     : [at] "+r"(at)
                     : [end] "r"(end), [nowhere] "r"(nowhere)
                     : "r14", "memory", "cc");
#elif defined(__aarch64__)
    __asm__ volatile("mov x9, sp\n\t"
                     "mov sp, %[nowhere]\n"
                     "1:\tstrb wzr, [%[at]]\n\t"
                     "add %[at], %[at], #4096\n\t"
                     "cmp %[at], %[end]\n\t"
                     "b.lo 1b\n\t"
                     "mov sp, x9"
                     : [at] "+r"(at)
                     : [end] "r"(end), [nowhere] "r"(nowhere)
                     : "x9", "memory", "cc");
#else
#error "no way known here to point the stack pointer elsewhere"
#endif
}

int main(void) {
    // no handler ever runs on it: none of this program's signals is handled
    char *nowhere = fresh(16 * PAGE);
    munmap(nowhere, 16 * PAGE);
    unsigned state = 47;
    while (shares[0].done < shares[0].want) {
        size_t bytes = next_piece(&shares[0], &state);
        char *memory = fresh(bytes);
        without_a_stack(memory, bytes, nowhere + 8 * PAGE);
        munmap(memory, bytes);
    }
    tell("lost", shares, 1);
    return 7;
}
