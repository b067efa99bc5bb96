/*
 * Quantised weights on CUDA: how they are packed (cuda_codes.h), and values made of them: whole
 * rows for embeddings, and for products of float32 linears, which are those with the dense weight
 * to the last bit. Such a weight becomes dense, a part at a time, in memory of the back end just
 * before it is used: that saves memory, and costs a pass over the dense values on top of the dense
 * product's time. bfloat16 linears multiply codes as they are (cuda_codes.cu).
 */
#include "kernels/cuda_codes.h"

static enum code_kind kind_of(enum weight_format format)
{
    switch (format) {
    case WEIGHT_INT8:
    case WEIGHT_INT8_127:
        return CODES_INT8;
    case WEIGHT_FP8:
        return CODES_FP8;
    case WEIGHT_INT4:
        return CODES_INT4;
    case WEIGHT_NF4:
    case WEIGHT_FP4:
        return CODES_TABLE;
    default:
        BUG("weight format %d has no codes", (int)format);
    }
}

static void lay_out_lanes(struct codes *c, const struct cuda_state *s, const struct linear *l)
{
    int bits = 8 * unit_bytes_of(c->kind) / UNIT;

    c->n_lanes = cuda_n_sums(s, l);
    c->lane_start[c->n_lanes] = c->in_dim;
    for (int i = 0; i < c->n_lanes; i++) {
        c->lane_start[i] = i ? (int)l->lane_start[i] : 0;
        int end = i + 1 < c->n_lanes ? (int)l->lane_start[i + 1] : c->in_dim;
        c->lane_at[i + 1] =
            c->lane_at[i] + (int)cuda_codes_lane_bytes(bits, end - c->lane_start[i]);
        if ((c->lane_start[i] + c->group_phase) % UNIT)
            c->groups_of_units = 0;
    }
    c->row_bytes = c->lane_at[c->n_lanes];
}

struct codes cuda_codes_of(const struct cuda_state *s, const struct linear *l)
{
    const char *packed = (const char *)l->packed;
    size_t n_scales = (size_t)(l->out_dim * l->n_groups);
    int is_one = l->n_groups == 1;
    struct codes c = {};

    c.kind = kind_of(l->format);
    c.out_dim = (int)l->out_dim;
    c.in_dim = (int)l->in_dim;
    c.n_groups = (int)l->n_groups;
    c.group_of = is_one ? NULL : l->group_of;
    c.group_size = is_one ? 1 << 30 : (int)l->group_size; // any that no column is behind
    c.group_phase = is_one ? 0 : (int)l->group_phase;
    c.group_shift = -1;
    for (int i = 0; i < 31; i++)
        if (c.group_size == 1 << i)
            c.group_shift = i;
    c.groups_of_units = !c.group_of && c.group_size % UNIT == 0;
    lay_out_lanes(&c, s, l);
    c.zero = l->format == WEIGHT_INT4 ? 8.0f : 0.0f;
    c.factor = l->format == WEIGHT_INT8_127 ? INT8_127_FACTOR : 1.0f;
    if (c.kind == CODES_TABLE)
        memcpy(c.table, weight_format_table(l->format, 0), sizeof(c.table));
    c.n_rows = c.kind == CODES_FP8 ? (c.out_dim + FP8_ROWS - 1) / FP8_ROWS * FP8_ROWS : c.out_dim;
    c.scales_at = rounded((size_t)(c.n_rows * c.row_bytes));
    c.zeros_at = c.scales_at + rounded(n_scales * sizeof(float));
    c.n_bytes = c.zeros_at + (l->has_zeros ? rounded(n_scales) : 0);
    if (packed) {
        c.codes = (const uint8_t *)packed;
        c.scales = (const float *)(packed + c.scales_at);
        c.zeros = l->has_zeros ? (const int8_t *)(packed + c.zeros_at) : NULL;
    }
    return c;
}

size_t cuda_quantized_bytes(const struct cuda_state *s, const struct linear *l)
{
    return cuda_codes_of(s, l).n_bytes;
}

/* ---- packing ---- */

static void pack_row(uint8_t *to, const struct codes *c, const uint8_t *from)
{
    int unit_bytes = unit_bytes_of(c->kind);

    memset(to, 0, (size_t)c->row_bytes);
    for (int lane = 0; lane < c->n_lanes; lane++) {
        int start = c->lane_start[lane], end = c->lane_start[lane + 1];
        for (int k = start; k < end; k += UNIT) {
            int n = end - k < UNIT ? end - k : UNIT;
            uint8_t *unit = to + c->lane_at[lane] + unit_at((k - start) / UNIT, unit_bytes);
            if (unit_bytes == UNIT)
                memcpy(unit, from + k, (size_t)n);
            else
                for (int i = 0; i < n; i++)
                    unit[i / 2] |= (uint8_t)(from[k + i] << i % 2 * 4);
        }
    }
}

/* Rows [first, first + n) of `q` to `to`. */
struct packing {
    uint8_t *to;
    const struct codes *c;
    const struct quantized *q;
    int64_t first, n;
};

static void pack_rows(void *arg, int thread, int n_threads)
{
    const struct packing *p = (const struct packing *)arg;

    for (int64_t i = p->n * thread / n_threads; i < p->n * (thread + 1) / n_threads; i++)
        pack_row(p->to + i * p->c->row_bytes, p->c, p->q->codes + (p->first + i) * p->q->in_dim);
}

/* Memory for the dense values of the largest weight, or as many of its rows as fit. */
static void reserve_dense(struct cuda_state *s, const struct linear *l)
{
    size_t row_bytes = (size_t)l->in_dim * dtype_size(l->dtype);
    size_t want = (size_t)l->out_dim * row_bytes;

    if (want > s->dense_bytes_max)
        want = s->dense_bytes_max > 64 * row_bytes ? s->dense_bytes_max : 64 * row_bytes;
    if (want <= s->dense_bytes)
        return;
    CUDA_CHECK(cudaFree(s->dense));
    CUDA_CHECK(cudaMalloc(&s->dense, want));
    s->dense_bytes = want;
}

/* Memory for a weight as q has parts of it, and what all rows share. */
static void begin_weight(struct backend *b, struct linear *l, const struct quantized *q,
                         const struct tensor *bias)
{
    struct cuda_state *s = cuda_state_of(b);

    l->format = q->format;
    l->n_groups = q->n_groups;
    l->group_size = q->group_size;
    l->group_phase = q->group_phase;
    l->has_zeros = q->zeros != NULL;
    l->group_of = NULL;
    l->packed = NULL;
    if (l->dtype == DTYPE_F32)
        reserve_dense(s, l);
    cuda_weight_alloc(b, l, cuda_codes_of(s, l).n_bytes, bias);
    if (q->group_of) {
        l->group_of = (int32_t *)b->ops->alloc(b, (size_t)l->in_dim * sizeof(int32_t));
        b->ops->upload(b, l->group_of, q->group_of, (size_t)l->in_dim * sizeof(int32_t));
    }
}

void cuda_linear_pack_quantized(struct backend *b, struct linear *l, int64_t first,
                                const struct quantized *q, const struct tensor *bias)
{
    struct cuda_state *s = cuda_state_of(b);

    if (first == 0)
        begin_weight(b, l, q, bias);
    const struct codes c = cuda_codes_of(s, l);
    int64_t at_once = (int64_t)s->staging_bytes / c.row_bytes;
    size_t n_scales = (size_t)(q->out_dim * l->n_groups), before = (size_t)(first * l->n_groups);
    if (at_once < 1)
        BUG("a row of %lld codes is larger than the staging buffer", (long long)l->in_dim);
    for (int64_t row = 0; row < q->out_dim; row += at_once) {
        int64_t n = q->out_dim - row < at_once ? q->out_dim - row : at_once;
        size_t n_bytes = (size_t)(n * c.row_bytes);
        char *part = cuda_staging_take(s, n_bytes);
        struct packing p = {(uint8_t *)part, &c, q, row, n};
        op_parallel(b, pack_rows, &p);
        cuda_staging_upload(b, (char *)l->packed + (first + row) * c.row_bytes, part, n_bytes);
    }
    b->ops->upload(b, (char *)l->packed + c.scales_at + before * sizeof(float), q->scales,
                   n_scales * sizeof(float));
    if (q->zeros)
        b->ops->upload(b, (char *)l->packed + c.zeros_at + before, q->zeros, n_scales);
}

/* ---- values ---- */

/* W[row, lane_start[lane] + in_lane] */
template <enum code_kind KIND>
__device__ __forceinline__ float value_at(const struct codes &c, int64_t row, int lane, int in_lane)
{
    const uint8_t *unit = c.codes + row * c.row_bytes + c.lane_at[lane] +
                          unit_at(in_lane / UNIT, unit_bytes_of(KIND));
    int i = in_lane % UNIT;
    uint32_t code = unit_bytes_of(KIND) == UNIT ? unit[i] : unit[i / 2] >> i % 2 * 4 & 15;
    struct scaling s = scaling_at(c, row, group_at(c, c.lane_start[lane] + in_lane));

    return code_value<KIND>(c, c.table, code, s);
}

/* w [rows, in_dim] <- rows [first, first + gridDim.x); blockIdx.y is the lane. */
template <enum code_kind KIND>
__global__ void expand_kernel(float *w, struct codes c, int64_t first)
{
    int start = c.lane_start[blockIdx.y], n = c.lane_start[blockIdx.y + 1] - start;

    for (int k = threadIdx.x; k < n; k += blockDim.x)
        w[(int64_t)blockIdx.x * c.in_dim + start + k] =
            value_at<KIND>(c, first + blockIdx.x, blockIdx.y, k);
}

int64_t cuda_dense_rows(struct cuda_state *s, const struct linear *l)
{
    int64_t n = (int64_t)(s->dense_bytes / ((size_t)l->in_dim * dtype_size(l->dtype)));

    return n >= l->out_dim ? l->out_dim : n / 64 * 64;
}

const float *cuda_expand(struct cuda_state *s, const struct linear *l, int64_t first, int64_t n)
{
    const struct codes c = cuda_codes_of(s, l);

    WITH_KIND(c.kind, KIND,
              LAUNCH((expand_kernel<KIND>), dim3((unsigned)n, (unsigned)c.n_lanes), dim3(256), 0,
                     s->stream, (float *)s->dense, c, first));
    return (const float *)s->dense;
}

/* y's row i <- the table's row ids[i] - first_row, in the table's type first; zeros where it has
 * none. */
template <enum code_kind KIND, class Y, class T>
__global__ void embed_kernel(Y *y, int64_t y_stride, struct codes c, const int32_t *ids,
                             int32_t first_row)
{
    int64_t row = (int64_t)ids[blockIdx.x] - first_row;

    for (int k = threadIdx.x; k < c.in_dim; k += blockDim.x) {
        int is_here = row >= 0 && row < c.out_dim;
        float v = is_here ? to_float(from_float<T>(value_at<KIND>(c, row, 0, k))) : 0.0f;
        y[blockIdx.x * y_stride + k] = from_float<Y>(v);
    }
}

void cuda_embed_quantized(struct backend *b, struct tensor *y, const struct linear *table,
                          const int32_t *ids, int32_t first_row)
{
    const struct codes c = cuda_codes_of(cuda_state_of(b), table);
    int64_t n = tensor_n_rows(y);

    if (n == 0)
        return;
    WITH_KIND(c.kind, KIND,
              WITH_TYPE(y->dtype, Y,
                        WITH_TYPE(table->dtype, T,
                                  LAUNCH((embed_kernel<KIND, Y, T>), dim3((unsigned)n), dim3(256),
                                         0, cuda_state_of(b)->stream, (Y *)y->data, y->row_stride,
                                         c, ids, first_row))));
}
