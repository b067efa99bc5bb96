/*
 * Which heads, columns, vocabulary rows and layers a shard owns.
 *
 * Owns nothing; pure functions of sizes. Must not know ranks, weights or MPI. The lanes are the
 * contract of layout invariance (design section 5): they depend on the model alone, and a shard
 * takes a run of them.
 */
#include "parallel/shard.h"

#include "kernels/log.h"

/* Cuts [start, start + n) into `n_parts` runs as even as can be, earlier ones larger, and writes
 * the borders to borders[0 … n_parts]. */
static void cut_evenly(int64_t *borders, int64_t start, int64_t n, int n_parts)
{
    borders[0] = start;
    for (int i = 0; i < n_parts; i++)
        borders[i + 1] = borders[i] + n / n_parts + (i < n % n_parts);
}

void lanes_of_heads(struct lanes *l, int n_heads, int n_kv_heads)
{
    if (n_kv_heads < 1 || n_heads < n_kv_heads || n_heads % n_kv_heads != 0)
        BUG("%d heads on %d kv heads", n_heads, n_kv_heads);
    int group = n_heads / n_kv_heads;
    int n = LANES_MAX;
    while (n_kv_heads % n != 0 && !(n % n_kv_heads == 0 && group >= n / n_kv_heads))
        n /= 2;
    *l = (struct lanes){.n = n};
    if (n_kv_heads % n == 0) { /* a lane is whole groups */
        cut_evenly(l->start, 0, n_heads, n);
        return;
    }
    int n_per_group = n / n_kv_heads;
    for (int g = 0; g < n_kv_heads; g++)
        cut_evenly(l->start + g * n_per_group, (int64_t)g * group, group, n_per_group);
}

void lanes_of_columns(struct lanes *l, int64_t n)
{
    if (n < 1)
        BUG("%lld columns", (long long)n);
    int n_lanes = LANES_MAX;
    while (n_lanes > n)
        n_lanes /= 2;
    int64_t unit = 128;
    while (n % unit != 0 || n / unit < n_lanes)
        unit /= 2;
    *l = (struct lanes){.n = n_lanes};
    cut_evenly(l->start, 0, n / unit, n_lanes);
    for (int i = 0; i <= n_lanes; i++)
        l->start[i] *= unit;
}

/* The lanes of shard t of T, borders relative to its own first one and multiplied by `scale`; the
 * run they cover goes to *whole, in the units of `all`. */
static struct lanes lanes_of_shard(const struct lanes *all, int t, int T, int64_t scale,
                                   struct range *whole)
{
    struct lanes mine = {.n = all->n / T};
    int first = t * mine.n;
    for (int i = 0; i <= mine.n; i++)
        mine.start[i] = (all->start[first + i] - all->start[first]) * scale;
    whole->start = all->start[first];
    whole->n = all->start[first + mine.n] - all->start[first];
    return mine;
}

int layer_shard_init(struct layer_shard *s, int n_heads, int n_kv_heads, int head_dim,
                     int64_t intermediate, int t, int T, struct error *err)
{
    struct lanes heads, columns;
    if (head_dim < 1 || T < 1 || t < 0 || t >= T)
        BUG("shard %d of %d, head_dim %d", t, T, head_dim);
    lanes_of_heads(&heads, n_heads, n_kv_heads);
    if (heads.n % T != 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "tensor-parallel size %d does not divide the %d lanes that %d heads on %d "
                         "kv heads allow",
                         T, heads.n, n_heads, n_kv_heads);
    lanes_of_columns(&columns, intermediate);
    if (columns.n % T != 0)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "tensor-parallel size %d does not divide the %d lanes that intermediate "
                         "size %lld allows",
                         T, columns.n, (long long)intermediate);
    *s = (struct layer_shard){0};
    s->head_lanes = lanes_of_shard(&heads, t, T, head_dim, &s->heads);
    s->column_lanes = lanes_of_shard(&columns, t, T, 1, &s->columns);
    int64_t group = n_heads / n_kv_heads;
    s->kv_heads.start = s->heads.start / group;
    s->kv_heads.n = (s->heads.start + s->heads.n - 1) / group + 1 - s->kv_heads.start;
    return 0;
}

int32_t layer_shard_kv_of_head(const struct layer_shard *s, int n_heads, int n_kv_heads, int h)
{
    if (h < 0 || h >= s->heads.n)
        BUG("head %d of the shard's %lld", h, (long long)s->heads.n);
    return (int32_t)((s->heads.start + h) / (n_heads / n_kv_heads) - s->kv_heads.start);
}

struct range shard_vocab(int64_t vocab_size, int t, int T)
{
    if (vocab_size < 1 || T < 1 || t < 0 || t >= T)
        BUG("vocabulary of %lld, shard %d of %d", (long long)vocab_size, t, T);
    int64_t n = (vocab_size + T - 1) / T;
    return (struct range){.start = t * n, .n = n};
}

struct range shard_layers(int n_layers, int p, int P)
{
    if (P < 1 || p < 0 || p >= P || n_layers < P)
        BUG("%d layers, stage %d of %d", n_layers, p, P);
    int64_t n = n_layers / P, n_more = n_layers % P;
    return (struct range){.start = p * n + (p < n_more ? p : n_more), .n = n + (p < n_more)};
}
