/*
 * A little memory that the ranks of one host share, without a name that a killed job would leave
 * behind.
 *
 * A rank offers some before ranks exchange what they are (hosts.h), and those who heard the offer
 * map it through the file system of processes. It knows nothing of what the memory is for.
 */
#ifndef INTERNVLD_PARALLEL_HOST_MEMORY_H
#define INTERNVLD_PARALLEL_HOST_MEMORY_H

#include <stddef.h>
#include <stdint.h>

/* Plain bytes, to be exchanged; zeroed: nothing is offered. */
struct host_memory {
    int64_t pid;
    int32_t fd; // of that process, open until it ends
    uint64_t device, inode, n_bytes;
};

/* Zeroed memory of this process, once; where there is none, nothing is offered. */
void host_memory_offer(struct host_memory *m, size_t n_bytes);
/* The same memory in this process, until it ends. NULL when it cannot be reached: another host, or
 * processes that do not see each other. */
void *host_memory_map(const struct host_memory *m);

#endif
