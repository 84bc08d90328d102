// read() and pread() of a file into fresh buffers of malloc: it is the kernel that touches, on behalf of the reader.
// The file, sparse and unlinked at once, is in the page cache, which is no process' resident memory.
#include <fcntl.h>
#include <malloc.h>

#include "../truth.h"

static struct share shares[] = {{"fill_by_read", 256 * MIB, 0}, {"fill_by_pread", 128 * MIB, 0}};
static unsigned state = 3;
static int file;

static char *buffer_of(size_t bytes) {
    char *memory = (char *)malloc(bytes);
    if (!memory)
        exit(125);
    return memory;
}

NOINLINE void fill_by_read(void) {
    size_t bytes = next_piece(&shares[0], &state);
    if (!bytes)
        return;
    char *memory = buffer_of(bytes);
    if (lseek(file, 0, SEEK_SET) != 0 || read(file, memory, bytes) != (ssize_t)bytes)
        exit(125);
    free(memory);
    STAY("read");
}

NOINLINE void fill_by_pread(void) {
    size_t bytes = next_piece(&shares[1], &state);
    if (!bytes)
        return;
    char *memory = buffer_of(bytes);
    if (pread(file, memory, bytes, 0) != (ssize_t)bytes)
        exit(125);
    free(memory);
    STAY("pread");
}

int main(void) {
    for (int i = 0; i < 2; i++)
        shares[i].want = scaled(shares[i].want);
    char path[] = "/var/tmp/memtrace-truth-XXXXXX";
    file = mkstemp(path);
    if (file < 0 || unlink(path) != 0 || ftruncate(file, 1 << 20) != 0)
        return 125;
    // every buffer a mapping of its own, given back by free; no room in the heap that a small one would come from
    mallopt(M_TOP_PAD, 0);
    mallopt(M_MMAP_THRESHOLD, (int)PAGE);
    while (shares[0].done < shares[0].want || shares[1].done < shares[1].want) {
        fill_by_read();
        fill_by_pread();
    }
    tell("reading", shares, 2);
    return 0;
}
