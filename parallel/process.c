/*
 * /proc, read for the limit on MPI's start and for the parent of mpirun. See process.h.
 */
#include "parallel/process.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHILDREN_BYTES 8192 // of one thread; some thousand children

size_t process_read(const char *path, char *to, size_t n_bytes)
{
    size_t n = 0;
    ssize_t got = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        while (n < n_bytes - 1 && (got = read(fd, to + n, n_bytes - 1 - n)) > 0)
            n += (size_t)got;
        close(fd);
    }
    to[n] = '\0';
    return n;
}

/* The state's letter and the parent. */
static char read_stat(pid_t pid, int *parent)
{
    char path[64], stat[512], state;
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    process_read(path, stat, sizeof(stat));
    const char *name_end = strrchr(stat, ')'); /* the name may hold anything */
    return name_end && sscanf(name_end + 1, " %c %d", &state, parent) == 2 ? state : '\0';
}

char process_state(pid_t pid)
{
    int parent;
    return read_stat(pid, &parent);
}

pid_t process_parent(pid_t pid)
{
    int parent = 0;
    read_stat(pid, &parent);
    return parent;
}

static void count(struct process_children *c, const char *pids)
{
    char *end;
    for (long pid; (pid = strtol(pids, &end, 10)) > 0; pids = end) {
        char state = process_state((pid_t)pid);
        if (state == 'Z' || state == 'X')
            c->n_ended++;
        else if (state != '\0')
            c->n_living++;
    }
}

struct process_children process_children(pid_t pid)
{
    char path[sizeof("/proc//task//children") + 2 * 20], pids[CHILDREN_BYTES];
    struct process_children c = {0};
    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    DIR *threads = opendir(path); /* the kernel lists each thread's own */
    for (struct dirent *e; threads && (e = readdir(threads));) {
        if (e->d_name[0] == '.')
            continue;
        snprintf(path, sizeof(path), "/proc/%d/task/%.19s/children", (int)pid, e->d_name);
        process_read(path, pids, sizeof(pids));
        count(&c, pids);
    }
    if (threads)
        closedir(threads);
    return c;
}
