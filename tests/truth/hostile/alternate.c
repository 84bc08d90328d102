// Memory is touched on a stack that was taken from the heap, by makecontext and swapcontext. Ends with 7.
#include <ucontext.h>

#include "../truth.h"

#define STACK ((size_t)256 << 10)

static struct share shares[] = {{"on_another_stack", 96 * MIB, 0}};
static ucontext_t here, there;

NOINLINE void on_another_stack(void) {
    unsigned state = 43;
    while (shares[0].done < shares[0].want) {
        size_t bytes = next_piece(&shares[0], &state);
        char *memory = fresh(bytes);
        dirty(memory, bytes);
        munmap(memory, bytes);
    }
    STAY("another");
}

int main(void) {
    char *stack = (char *)malloc(STACK);
    if (!stack || getcontext(&there) != 0)
        return 125;
    there.uc_stack.ss_sp = stack;
    there.uc_stack.ss_size = STACK;
    there.uc_link = &here;
    makecontext(&there, on_another_stack, 0);
    if (swapcontext(&here, &there) != 0)
        return 125;
    tell("alternate", shares, 1);
    return 7;
}
