/*
 * Included ahead of the sources that open a back end or a group, when they are built for the
 * emulation: their calls of the CPU back end and of comm_mpi become these.
 */
#ifndef INTERNVLD_TESTS_EMULATED_RANK_H
#define INTERNVLD_TESTS_EMULATED_RANK_H

#include <stddef.h>

struct backend;
struct comm;

struct backend *emulated_backend_open(int n_threads, const char *isa);
void emulated_backend_close(struct backend *b);
struct comm *emulated_comm_open(int color, int key, size_t max_bytes);

#endif
