/*
 * Who is who: the role of a rank as a pure function of (rank, world, layout). No MPI here.
 *
 *   rank 0            gateway
 *   ranks 1 … V       vision, data-parallel over tiles
 *   then P·T ranks    language: stage-major, so the T shards of one stage are neighbours (same
 * host)
 *
 *   V=1 P=2 T=2:   0 gateway | 1 vision | 2 stage0/shard0  3 stage0/shard1 | 4 stage1/shard0  5
 * stage1/shard1
 */
#ifndef INTERNVLD_PARALLEL_TOPOLOGY_H
#define INTERNVLD_PARALLEL_TOPOLOGY_H

#include "kernels/error.h"

enum role { ROLE_GATEWAY, ROLE_VISION, ROLE_LANGUAGE };

struct layout {
    int n_vision;          // V >= 1
    int tensor_parallel;   // T in {1, 2, 4, 8}
    int pipeline_parallel; // P >= 1
};

struct topology {
    int rank, world;
    struct layout layout;
    enum role role;
    int vision_index; // 0 … V-1, -1 for others
    int stage, shard; // -1 for others
};

int layout_world(const struct layout *l); // 1 + V + P·T
/* 1 where there is more than one language rank: then tensors go from rank to rank. */
int layout_shares_tensors(const struct layout *l);
/* Errors: T not in {1,2,4,8}, V or P < 1, rank out of range, or world != layout_world(): one
 * sentence with the sum. */
int topology_init(struct topology *t, int rank, int world, const struct layout *l,
                  struct error *err);
int topology_vision_rank(const struct topology *t, int vision_index);
int topology_language_rank(const struct topology *t, int stage, int shard);
const char *role_name(enum role r); // "gateway", "vision", "language"
/* "vision 0", "language stage 1 shard 0", "gateway": written into buf, returned. */
const char *topology_describe(const struct topology *t, int rank, char *buf, int n_bytes);

#endif
