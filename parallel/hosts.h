/*
 * What ranks tell each other before anything is loaded, and whether it fits together.
 *
 * A job over several hosts can be wrong in ways that no rank sees alone: another build or another
 * checkpoint on one host, a directory that is missing there, shards of one stage on two hosts. Each
 * rank describes itself, all hear all, and every rank comes to the same one sentence. Only
 * hosts_exchange() talks (through launch); the rest is arithmetic on plain data.
 */
#ifndef INTERNVLD_PARALLEL_HOSTS_H
#define INTERNVLD_PARALLEL_HOSTS_H

#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"
#include "parallel/host_memory.h"
#include "parallel/topology.h"

#define HOSTS_VERSION_BYTES 64 // never changes: it is what different builds can still exchange

/* Does a rank compute on a GPU, and is that GPU its own? */
enum device_use { DEVICE_USE_NONE, DEVICE_USE_OWN, DEVICE_USE_SHARED };

/* Of one rank. Plain bytes without pointers; texts end with a zero. */
struct rank_host {
    char host[64];
    char settings[640];        // "NAME=VALUE NAME=VALUE …", must be equal on all ranks
    uint64_t checkpoint_hash;  // of what the model's directory holds
    int32_t n_cores;           // that this process may use
    uint64_t cores_hash;       // which these are
    int32_t n_threads;         // that it will use at most; 0 for the gateway
    struct host_memory memory; // where ranks with its cores say that they are at work
    int32_t n_devices;         // GPUs of the host that this build can use
    char device_name[64];      // of the first of them
    int32_t device_use;        // of enum device_use
    struct error error;        // what this rank met while it looked at its settings
};

/* Collective. all [world] <- everybody's `mine`. Errors: ranks of different versions of internvld
 * (`version` is this one's), which cannot exchange more than that. The same on every rank. */
int hosts_exchange(struct rank_host *all, const struct rank_host *mine, const char *version,
                   int world, struct error *err);
/* Errors, the first found, naming the rank and its host: a rank's own error, settings or a
 * checkpoint unlike rank 0's, fewer GPUs on a host than ranks there that need one, GPUs of
 * several kinds. */
int hosts_check(const struct rank_host *all, int world, struct error *err);
/* How many vision and language ranks, rank `r` among them, compute on the same cores of its host.
 */
int hosts_n_sharing_cores(const struct rank_host *all, int world, int r);
/* The first of these, and how many of them come before rank `r`. */
int hosts_first_sharing_cores(const struct rank_host *all, int r, int *index);
/* Which of its host's GPUs rank `r` computes on: the ranks with a GPU of their own have the first
 * ones, in order; those that share are dealt out over these (over all, where there are none). -1:
 * on none. */
int hosts_device(const struct rank_host *all, int world, int r);
/* Logs what works but is slow: shards of a stage on several hosts, ranks with more threads
 * than their cores. For rank 0. */
void hosts_warn(const struct rank_host *all, const struct topology *t);
/* One line a rank: role, host, which of the host's ranks, threads, device. */
void hosts_print(FILE *f, const struct rank_host *all, const struct topology *t);

#endif
