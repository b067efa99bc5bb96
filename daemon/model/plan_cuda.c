/*
 * What a rank takes of its GPU (plan_cuda.h).
 */
#include "daemon/model/plan_cuda.h"

#include <stdio.h>
#include <string.h>

#include "kernels/cuda_all_reduce.h"
#include "kernels/cuda_backend.h"

uint64_t plan_cuda_block(uint64_t n_bytes)
{
    return (n_bytes + CUDA_BLOCK_BYTES - 1) / CUDA_BLOCK_BYTES * CUDA_BLOCK_BYTES;
}

/* 1 for the bias that a linear keeps beside its weight, and not a norm's or one that is added after
 * an all-reduce. */
static int is_kept_with_weight(const struct weight_spec *s, const struct weight_list *list)
{
    char name[sizeof(s->name)];
    size_t n = strlen(s->name), n_suffix = strlen(".bias");
    if (n < n_suffix || strcmp(s->name + n - n_suffix, ".bias") != 0)
        return 0;
    snprintf(name, sizeof(name), "%.*s.weight", (int)(n - n_suffix), s->name);
    const struct weight_spec *weight = weight_list_find(list, name);
    return weight && weight_spec_is_matrix(weight) &&
           (s->home == HOME_VISION || s->axis != AXIS_WHOLE);
}

/* Codes, scales and zero points, as kernels/cuda_quantized.cu lays them out. */
static uint64_t codes_bytes(const struct weight_spec *s, struct range rows, struct range columns,
                            const struct lanes *lanes, const struct plan_settings *p)
{
    uint64_t row_bytes = 0, n_groups = (uint64_t)weight_spec_groups(s, columns);
    int n_lanes = lanes && p->deterministic ? lanes->n : 1;
    for (int i = 0; i < n_lanes; i++) {
        int64_t n = n_lanes > 1 ? lanes->start[i + 1] - lanes->start[i] : columns.n;
        row_bytes += cuda_codes_lane_bytes(weight_format_bits(s->format), n);
    }
    uint64_t n_rows = (uint64_t)rows.n;
    if (s->format == WEIGHT_FP8)
        n_rows = (n_rows + CUDA_FP8_ROWS - 1) / CUDA_FP8_ROWS * CUDA_FP8_ROWS;
    uint64_t n_bytes = plan_cuda_block(n_rows * row_bytes) +
                       plan_cuda_block((uint64_t)rows.n * n_groups * sizeof(float));
    if (s->has_zeros)
        n_bytes += plan_cuda_block((uint64_t)rows.n * n_groups);
    if (s->has_order)
        n_bytes += plan_cuda_block((uint64_t)columns.n * sizeof(int32_t));
    return n_bytes;
}

uint64_t plan_cuda_weight_bytes(const struct weight_spec *s, const struct weight_list *list,
                                struct range rows, struct range columns, const struct lanes *lanes,
                                const struct plan_settings *p)
{
    const uint64_t n = (uint64_t)(rows.n * columns.n);
    if (s->format != WEIGHT_FLOAT)
        return codes_bytes(s, rows, columns, lanes, p);
    if (weight_spec_is_matrix(s))
        return plan_cuda_block(n * dtype_size(p->dtype));
    if (strcmp(s->name, "vision_tower.embeddings.position_embeddings") == 0)
        return 0; // the host's
    /* cuBLASLt wants a bias in the type of its result: bfloat16 stands behind the weight. */
    uint64_t copy = is_kept_with_weight(s, list) ? plan_cuda_block(n * sizeof(uint16_t)) : 0;
    return copy + plan_cuda_block(n * sizeof(float));
}

static int64_t rows_held(const struct weight_spec *s, const struct weight_cut *cut,
                         const struct text_config *t)
{
    struct range rows = {0, weight_spec_rows(s)}, columns = {0};
    if (s->home != HOME_VISION)
        weight_cut_ranges(cut, t, s, &rows, &columns);
    return rows.n;
}

uint64_t plan_cuda_dense_bytes(const struct weight_spec *s, const struct weight_list *list,
                               const struct weight_cut *cut, const struct text_config *t,
                               enum dtype dtype)
{
    struct range rows = {0}, columns = {0, weight_spec_columns(s)};
    const struct weight_spec *parts[3];
    int64_t n_rows = 0;
    if (s->format == WEIGHT_FLOAT || dtype != DTYPE_F32)
        return 0;
    if (s->home != HOME_VISION)
        weight_cut_ranges(cut, t, s, &rows, &columns);
    for (int i = weight_list_stack(list, s, parts) - 1; i >= 0; i--)
        n_rows += rows_held(parts[i], cut, t);
    uint64_t n = (uint64_t)(n_rows * columns.n) * sizeof(float);
    return n < CUDA_DENSE_BYTES ? plan_cuda_block(n) : CUDA_DENSE_BYTES;
}

uint64_t plan_cuda_fixed_bytes(const struct plan_settings *p, const struct topology *t,
                               const struct model_config *c)
{
    uint64_t n_bytes = CUDA_SCRATCH_BYTES + CUDA_WORKSPACE_BYTES;
    int n_shards = p->layout.tensor_parallel;
    if (t->role == ROLE_LANGUAGE && n_shards > 1 && p->one_shot)
        n_bytes += ALL_REDUCE_MAILBOX_BYTES;
    if (t->role == ROLE_LANGUAGE && n_shards > 1 && p->deterministic)
        n_bytes += plan_cuda_block((uint64_t)n_shards * (uint64_t)p->max_num_batched_tokens *
                                   (uint64_t)c->text.hidden_size * sizeof(float));
    return n_bytes;
}
