/*
 * Agreement before loading: what this rank is and sees, exchanged with the others.
 *
 * Knows which settings must be equal on every rank and what tells one checkpoint from another; how
 * ranks compare is parallel/hosts.h.
 */
#ifndef INTERNVLD_JOB_H
#define INTERNVLD_JOB_H

#include <stdint.h>

#include "daemon/model/device.h"
#include "daemon/options.h"
#include "kernels/error.h"
#include "parallel/hosts.h"

/* This rank's description. `dtype` is the run's, n_pages the KV pages of each language rank; they
 * do not count when error.code is set. */
void job_describe(struct rank_host *mine, const struct options *o, const char *dtype,
                  int32_t n_pages, const struct error *error);
/* What --device means for the job, once all ranks [topology.world] have described themselves: auto
 * is CUDA where every host of a vision or language rank has a GPU that its build can use. Marks in
 * `all` which ranks use one. */
enum device_kind job_choose_device(struct rank_host *all, const struct options *o,
                                   const struct topology *t);
/* With how many threads each rank computes at most: --threads, or one a core, which ranks with the
 * same cores share by who is at work; with a GPU, where they read weights, copy and draw tokens,
 * its cores divided by these ranks, at most 8. */
void job_choose_threads(struct rank_host *all, const struct options *o, const struct topology *t,
                        enum device_kind kind);
/* The same of a rank of a job of `world` ranks that all have the cores of this process. */
int job_planned_threads(const struct options *o, int world, enum device_kind kind);
/* For a rank on the CPU without --threads: `cores` <- what it shares with others. Returns with how
 * many threads it computes at most: its part of the cores, where they cannot be told of. */
int job_share_cores(struct cpu_cores *cores, const struct rank_host *all, const struct topology *t);

#endif
