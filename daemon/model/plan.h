/*
 * The memory of every rank, before anything is allocated.
 *
 * Pure arithmetic over the config, the layout and the settings: the base of `internvld --plan`, and
 * where the number of KV pages comes from. The total of a rank is the most memory that it holds
 * with every page and the largest step in use, whatever the requests: on the CPU VmHWM of its
 * process, within 2 % where weights and pages are most of it; with on_cuda what it allocates on its
 * GPU (plan_cuda.h), within 1 %. Not in it: what waiting requests keep in the gateway, and captured
 * tensors on their way.
 */
#ifndef INTERNVLD_MODEL_PLAN_H
#define INTERNVLD_MODEL_PLAN_H

#include <stdio.h>

#include "daemon/model/config.h"
#include "kernels/error.h"
#include "parallel/topology.h"

struct weight_list;

struct plan_settings {
    struct layout layout;
    const struct weight_list *weights; // as the files hold them; NULL: as the config lets expect
    enum dtype dtype;                  // F32 or BF16
    enum dtype kv_dtype;               // of the pages: the same, or I8
    enum dtype activation_dtype;       // device_activation_dtype()
    int on_cuda;                       // vision and language ranks each have a GPU
    int deterministic, one_shot;       // with on_cuda: as in struct device_options
    int vision_share_gpu;              // with on_cuda: vision ranks are on language ranks' GPUs
    int n_threads;                     // of a language rank, which draw tokens
    int32_t page_size;                 // tokens
    uint64_t kv_budget_bytes;          // for KV pages, of each language rank
    int32_t max_model_len;             // tokens of one sequence
    int32_t max_num_seqs, max_num_batched_tokens, max_vision_tiles;
    uint64_t vision_cache_bytes, media_store_bytes; // of the gateway
    const char *cpu_isa;                            // backend_cpu_open()'s
};

struct plan_rank {
    struct topology topology;
    uint64_t weight_bytes;
    uint64_t scratch_bytes; // of steps, on CUDA also the back end's; the gateway's: its caches
    uint64_t page_bytes;    // of one KV page over the rank's layers; 0 for others
    uint64_t kv_bytes;      // n_pages * page_bytes
    uint64_t process_bytes; // the program, its libraries, their buffers
    int on_device;          // 1: all but process_bytes is its GPU's memory; then that has what
                            // steps keep on the host
};
/* Of the host's memory, and of the rank's GPU. */
uint64_t plan_rank_host_bytes(const struct plan_rank *r);
uint64_t plan_rank_device_bytes(const struct plan_rank *r);

struct plan {
    struct plan_settings settings;
    struct plan_rank *ranks; // [n_ranks]
    int n_ranks;
    int32_t n_pages; // the minimum over ranks of budget / page_bytes, the same on every rank
};

/* Errors: a layout the model's heads or layers cannot take, a page size that is no multiple of 16,
 * heads that int8 pages cannot hold, a budget that does not hold one sequence of max_model_len. */
int plan_make(struct plan *p, const struct model_config *c, const struct plan_settings *s,
              struct error *err);
void plan_release(struct plan *p); // accepts a zeroed struct
/* A table, one line a rank, the KV capacity in tokens, and whether a host with so much memory can
 * hold all ranks, or one. */
void plan_print(FILE *f, const struct plan *p, const struct model_config *c, uint64_t host_bytes);

#endif
