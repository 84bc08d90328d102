// Preloaded into `memtrace doctor`: asks the verifier how many instructions it processed for each program.
//
// Kernels before 5.16 do not keep that number, but every one of them says it in the verifier's log when asked.
// Appends "NAME processed N insns ..." to the file that MEMTRACE_VERIFIER_LOG names; NAME has at most 15 bytes.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/bpf.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

#define STATISTICS 4

static char verifier_log[64 * 1024];

long syscall(long number, ...) {
    static long (*next)(long, ...);
    if (!next) {
        *(void **)&next = dlsym(RTLD_NEXT, "syscall");
    }
    long args[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) {
        args[i] = va_arg(list, long);
    }
    va_end(list);

    // The caller's attributes may be longer than those of the headers this was built with.
    union {
        union bpf_attr attr;
        char bytes[4096];
    } copy = {0};
    int ours = 0;
    unsigned long size = args[2];
    if (number == SYS_bpf && args[0] == BPF_PROG_LOAD && size <= sizeof copy) {
        memcpy(&copy, (void *)args[1], size);
        // Who asks for a log of its own keeps it.
        if (copy.attr.log_level == 0) {
            ours = 1;
            verifier_log[0] = 0;
            copy.attr.log_level = STATISTICS;
            copy.attr.log_buf = (unsigned long)verifier_log;
            copy.attr.log_size = sizeof verifier_log;
            args[1] = (long)&copy;
        }
    }
    long result = next(number, args[0], args[1], args[2], args[3], args[4], args[5]);
    const char *line = ours && result >= 0 ? strstr(verifier_log, "processed ") : NULL;
    const char *path = getenv("MEMTRACE_VERIFIER_LOG");
    FILE *file = line && path ? fopen(path, "a") : NULL;
    if (file) {
        fprintf(file, "%.16s %.*s\n", copy.attr.prog_name, (int)strcspn(line, "\n"), line);
        fclose(file);
    }
    return result;
}
