/*
 * Products on CUDA: weights as they are ([out_dim, in_dim], row-major), cuBLASLt for the sums, one
 * kernel for what follows them. (Sums with quantised bfloat16 weights are cuda_codes.cu's.)
 *
 * Batch invariance. A product's algorithm is asked for once, for PLAN_TOKENS rows whatever the
 * call's own number, with split and stream-k sums forbidden, and kept for every later call: the
 * order over k is then the algorithm's and the same for one row and for thousands. The price is a
 * tile that is not the best one for a single row.
 *
 * Layout invariance (options.deterministic). A row-parallel product computes each lane's sum by its
 * own product into float32 scratch; combine_kernel adds the lanes by the tree of kernels/backend.h.
 * Algorithms are then asked for PLAN_OUT outputs too, so that a shard's smaller out_dim cannot
 * change them. Without it a product's lanes are one sum.
 *
 * Which of a call's parts cuBLASLt does itself: the bias where nothing but a plain store follows,
 * the residual (as C) where nothing else does. Everything else is combine_kernel's; or, where codes
 * are multiplied, of one lane and without an activation, that kernel's; or cuda_fp8.cu's, which has
 * products of FP8 with FP8 whole and cuBLASLt by cuda_blas_multiply().
 */
#include "kernels/cuda_internal.h"

#define PARTS_MAX 4 // of the scratch memory of one call, each rounded()

static const int64_t PLAN_TOKENS = 128, PLAN_OUT = 1024;

/* ---- weights ---- */

/* Rows [first, first + n) of `w`, of any row stride, to `to` in a linear's own type. */
struct conversion {
    char *to;
    enum dtype dtype;
    const struct tensor *w;
    int64_t first, n;
};

static void convert_rows(void *arg, int thread, int n_threads)
{
    const struct conversion *c = (const struct conversion *)arg;
    const struct tensor *w = c->w;
    int64_t n_cols = tensor_n_cols(w), end = c->n * (thread + 1) / n_threads;
    float *wide = (float *)xcalloc((size_t)n_cols, sizeof(float));

    for (int64_t i = c->n * thread / n_threads; i < end; i++) {
        const char *src =
            (const char *)w->data + (size_t)((c->first + i) * w->row_stride) * dtype_size(w->dtype);
        char *dst = c->to + (size_t)(i * n_cols) * dtype_size(c->dtype);
        if (w->dtype == c->dtype) {
            memcpy(dst, src, (size_t)n_cols * dtype_size(c->dtype));
        } else if (c->dtype == DTYPE_F32) {
            tensor_widen((float *)dst, src, w->dtype, n_cols);
        } else {
            tensor_widen(wide, src, w->dtype, n_cols);
            for (int64_t k = 0; k < n_cols; k++)
                ((uint16_t *)dst)[k] = f32_to_bf16(wide[k]);
        }
    }
    free(wide);
}

static size_t weight_bytes(const struct linear *l)
{
    return rounded((size_t)l->out_dim * (size_t)l->in_dim * dtype_size(l->dtype));
}

/* Of the weight itself; a copy of the bias in bfloat16 follows it: cuBLASLt wants it in y's type.
 */
static size_t held_bytes(const struct cuda_state *s, const struct linear *l)
{
    return l->format == WEIGHT_FLOAT ? weight_bytes(l) : cuda_quantized_bytes(s, l);
}

void cuda_weight_alloc(struct backend *b, struct linear *l, size_t n_bytes,
                       const struct tensor *bias)
{
    l->packed_bytes = n_bytes + (bias ? (size_t)l->out_dim * sizeof(uint16_t) : 0);
    l->packed = b->ops->alloc(b, l->packed_bytes);
    l->bias = NULL;
    if (!bias)
        return;
    float *wide = (float *)xcalloc((size_t)l->out_dim, sizeof(float));
    uint16_t *half = (uint16_t *)xcalloc((size_t)l->out_dim, sizeof(uint16_t));
    tensor_widen(wide, bias->data, bias->dtype, l->out_dim);
    for (int64_t i = 0; i < l->out_dim; i++)
        half[i] = f32_to_bf16(wide[i]);
    l->bias = (float *)b->ops->alloc(b, (size_t)l->out_dim * sizeof(float));
    b->ops->upload(b, l->bias, wide, (size_t)l->out_dim * sizeof(float));
    b->ops->upload(b, (char *)l->packed + n_bytes, half, (size_t)l->out_dim * sizeof(uint16_t));
    free(half);
    free(wide);
}

void cuda_linear_pack(struct backend *b, struct linear *l, int64_t first, const struct tensor *w,
                      const struct tensor *bias)
{
    struct cuda_state *s = cuda_state_of(b);
    size_t row_bytes = (size_t)l->in_dim * dtype_size(l->dtype);
    int64_t n_rows = tensor_n_rows(w), rows_at_once = (int64_t)(s->staging_bytes / row_bytes);

    if (rows_at_once < 1)
        BUG("a weight's row of %zu bytes is larger than the staging buffer", row_bytes);
    if (first == 0) {
        l->format = WEIGHT_FLOAT;
        cuda_weight_alloc(b, l, weight_bytes(l), bias);
    }
    for (int64_t row = 0; row < n_rows; row += rows_at_once) {
        int64_t n = n_rows - row < rows_at_once ? n_rows - row : rows_at_once;
        struct conversion c = {cuda_staging_take(s, (size_t)n * row_bytes), l->dtype, w, row, n};
        op_parallel(b, convert_rows, &c);
        cuda_staging_upload(b, (char *)l->packed + (size_t)(first + row) * row_bytes,
                            (const char *)c.to, (size_t)n * row_bytes);
    }
}

void cuda_linear_free(struct backend *b, struct linear *l)
{
    b->ops->free(b, l->packed);
    b->ops->free(b, l->bias);
    b->ops->free(b, l->group_of);
    l->packed = NULL;
    l->bias = NULL;
    l->group_of = NULL;
}

/* ---- one product by cuBLASLt ---- */

static cudaDataType_t blas_type(enum dtype t)
{
    return t == DTYPE_F32 ? CUDA_R_32F : t == DTYPE_F8_E4M3 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
}

/* The alignment in bytes, up to 16, that all operands of a product keep. */
static int product_alignment(const struct product *p)
{
    size_t size = dtype_size(p->type), size_y = dtype_size(p->type_y);
    uintptr_t bits = (uintptr_t)p->w | (uintptr_t)p->x | (uintptr_t)p->y | (uintptr_t)p->residual |
                     (uintptr_t)p->bias | (uintptr_t)p->ld_w * size | (uintptr_t)p->ld_x * size |
                     (uintptr_t)p->ld_y * size_y | 16;

    return (int)(bits & ~(bits - 1));
}

static void describe_product(const struct product *p, int64_t m, int64_t n,
                             cublasLtMatmulDescOpaque_t *desc, cublasLtMatrixLayoutOpaque_t *w,
                             cublasLtMatrixLayoutOpaque_t *x, cublasLtMatrixLayoutOpaque_t *y)
{
    int32_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
    int32_t epilogue = p->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    /* PEDANTIC keeps float32 products out of TF32. */
    cublasComputeType_t compute =
        p->type == DTYPE_F32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;

    CUBLAS_CHECK(cublasLtMatmulDescInit(desc, compute, CUDA_R_32F));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                                sizeof(transposed)));
    CUBLAS_CHECK(
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &plain, sizeof(plain)));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                                sizeof(epilogue)));
    if (p->bias)
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                    &p->bias, sizeof(p->bias)));
    /* Row-major [rows, cols] is cuBLAS's column-major [cols, rows]. */
    CUBLAS_CHECK(
        cublasLtMatrixLayoutInit(w, blas_type(p->type), (uint64_t)p->k, (uint64_t)n, p->ld_w));
    CUBLAS_CHECK(
        cublasLtMatrixLayoutInit(x, blas_type(p->type), (uint64_t)p->k, (uint64_t)m, p->ld_x));
    CUBLAS_CHECK(cublasLtMatrixLayoutInit(y, blas_type(p->type_y), (uint64_t)n, (uint64_t)m,
                                          p->ld_y < n ? n : p->ld_y));
}

static void choose_algorithm(struct cuda_state *s, const struct product *p, int alignment,
                             struct cuda_plan *plan)
{
    int64_t n = s->deterministic ? PLAN_OUT : p->n_whole;
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t w, x, y;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t result;
    uint64_t workspace_bytes = s->workspace_bytes;
    uint32_t no_split = CUBLASLT_REDUCTION_SCHEME_NONE, bytes = (uint32_t)alignment;
    int n_found = 0;

    describe_product(p, PLAN_TOKENS, n, &desc, &w, &x, &y);
    CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference,
                                                      CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &workspace_bytes, sizeof(workspace_bytes)));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        &preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_split, sizeof(no_split)));
    static const cublasLtMatmulPreferenceAttributes_t sides[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4; i++)
        CUBLAS_CHECK(
            cublasLtMatmulPreferenceSetAttribute(&preference, sides[i], &bytes, sizeof(bytes)));
    CUBLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(s->blas, &desc, &w, &x, &y, &y, &preference, 1,
                                                &result, &n_found));
    if (n_found < 1)
        die("cuBLASLt has no algorithm for %lld outputs of %lld inputs (%s, %d-byte alignment)",
            (long long)p->n, (long long)p->k, dtype_name(p->type), alignment);
    plan->algorithm = result.algo;
}

static const struct cuda_plan *plan_for(struct cuda_state *s, const struct product *p)
{
    struct cuda_plan want;

    memset(&want, 0, sizeof(want));
    want.n = p->n_whole;
    want.k = p->k;
    want.ld_w = p->ld_w;
    want.ld_x = p->ld_x;
    want.ld_y = p->ld_y;
    want.type = blas_type(p->type);
    want.type_y = blas_type(p->type_y);
    want.with_bias = p->bias != NULL;
    want.with_residual = p->residual != NULL;
    want.alignment = product_alignment(p);
    for (int i = 0; i < s->n_plans; i++)
        if (!memcmp(&s->plans[i], &want, offsetof(struct cuda_plan, algorithm)))
            return &s->plans[i];
    if (s->n_plans == PLANS_MAX)
        BUG("more than %d shapes of products", PLANS_MAX);
    choose_algorithm(s, p, want.alignment, &want);
    s->plans[s->n_plans] = want;
    return &s->plans[s->n_plans++];
}

void cuda_blas_multiply(struct cuda_state *s, const struct product *p)
{
    const struct cuda_plan *plan = plan_for(s, p);
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t w, x, y;
    float one = 1.0f, beta = p->residual ? 1.0f : 0.0f;

    describe_product(p, p->m, p->n, &desc, &w, &x, &y);
    CUBLAS_CHECK(cublasLtMatmul(s->blas, &desc, &one, p->w, &w, p->x, &x, &beta,
                                p->residual ? p->residual : p->y, &y, p->y, &y, &plan->algorithm,
                                s->workspace, s->workspace_bytes, s->stream));
}

/* ---- lanes, bias, activation, scale, residual ---- */

struct combine {
    int n_parts;
    size_t part_stride; // elements between two parts
    int64_t n_cols, part_ld;
    struct finish finish;
};

template <class P> __device__ __forceinline__ float tree_sum(const P *p, size_t stride, int n)
{
    return n == 1   ? tree_of<1>(p, stride)
           : n == 2 ? tree_of<2>(p, stride)
           : n == 4 ? tree_of<4>(p, stride)
                    : tree_of<8>(p, stride);
}

/* y <- residual + scale * act(sum of parts + bias); one block a row. parts may be y itself. */
template <class T, class P> __global__ void combine_kernel(T *y, const P *parts, struct combine c)
{
    int64_t row = blockIdx.x;

    for (int64_t col = threadIdx.x; col < c.n_cols; col += blockDim.x)
        finish_sum<true>(y, c.finish, row, col,
                         tree_sum(parts + row * c.part_ld + col, c.part_stride, c.n_parts));
}

template <class T, class U>
__global__ void convert_kernel(T *y, const U *x, int64_t x_stride, int64_t n_cols)
{
    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x)
        y[blockIdx.x * n_cols + c] = from_float<T>(to_float(x[blockIdx.x * x_stride + c]));
}

/* One call in pieces of rows that fit the scratch memory. */
struct matmul_call {
    struct tensor *y;
    const struct tensor *x;
    const struct linear *l;
    const struct epilogue *e;
    int n_lanes;         // sums of the reduced dimension: l->n_lanes, or 1
    int converted;       // x must be brought to the weights' type first
    int by_codes;        // cuda_codes.cu multiplies, or cuda_fp8.cu
    int direct;          // the product's result is y, finished
    int into_y;          // the product writes y, combine_kernel finishes it in place
    enum dtype sum_type; // of what the product writes
};

static size_t scratch_per_row(const struct cuda_state *s, const struct matmul_call *c)
{
    size_t n = 0;

    if (c->converted)
        n += (size_t)c->l->in_dim * dtype_size(c->l->dtype);
    if (c->l->x_format == WEIGHT_FP8)
        n += cuda_fp8_row_bytes(s, c->l);
    if (!c->direct && !c->into_y)
        n += (size_t)c->n_lanes * (size_t)c->l->out_dim * dtype_size(c->sum_type);
    return n;
}

static void *row_at(const struct tensor *t, int64_t row)
{
    return (char *)t->data + (size_t)(row * t->row_stride) * dtype_size(t->dtype);
}

/* Of p, whose k is the whole: each lane's own product, `stride` elements of y behind the last's. */
static void multiply_lanes(struct cuda_state *s, const struct matmul_call *c,
                           const struct product *p, int64_t stride)
{
    const struct linear *l = c->l;

    for (int lane = 0; lane < c->n_lanes; lane++) {
        struct product part = *p;
        int64_t start = c->n_lanes == 1 ? 0 : l->lane_start[lane];
        int64_t end = c->n_lanes == 1 ? l->in_dim : l->lane_start[lane + 1];
        part.k = end - start;
        part.w = (const char *)p->w + (size_t)start * dtype_size(l->dtype);
        part.x = (const char *)p->x + (size_t)start * dtype_size(l->dtype);
        part.y = (char *)p->y + (size_t)(lane * stride) * dtype_size(c->sum_type);
        if (part.k > 0)
            cuda_blas_multiply(s, &part);
        else // only of several, whose rows lie one behind the other: what is between is this lane's
            CUDA_CHECK(cudaMemsetAsync(
                part.y, 0, (size_t)((p->m - 1) * p->ld_y + p->n) * sizeof(float), s->stream));
    }
}

/* Of n = out_dim outputs. */
static void multiply_whole(struct cuda_state *s, const struct matmul_call *c,
                           const struct product *p)
{
    const struct linear *l = c->l;
    /* A quantised weight becomes dense a part of its rows at a time. */
    int64_t step = l->format == WEIGHT_FLOAT ? l->out_dim : cuda_dense_rows(s, l);

    for (int64_t row = 0; row < l->out_dim; row += step) {
        struct product part = *p;
        size_t size = dtype_size(c->sum_type);
        part.n = step < l->out_dim - row ? step : l->out_dim - row;
        part.w = l->format == WEIGHT_FLOAT ? l->packed : cuda_expand(s, l, row, part.n);
        part.y = (char *)p->y + (size_t)row * size;
        part.bias = p->bias ? (const char *)p->bias + (size_t)row * size : NULL;
        part.residual = p->residual ? (const char *)p->residual + (size_t)row * size : NULL;
        multiply_lanes(s, c, &part, p->m * l->out_dim);
    }
}

/* Of the call's rows from `first` on. */
static struct finish finish_of(const struct matmul_call *c, int64_t first)
{
    const struct tensor *residual = c->e ? c->e->residual : NULL;
    struct finish f = {};

    f.bias = c->l->bias;
    f.scale = c->e ? c->e->scale : NULL;
    f.act = c->e ? c->e->act : ACTIVATION_NONE;
    f.residual = residual ? row_at(residual, first) : NULL;
    f.residual_stride = residual ? residual->row_stride : 0;
    f.y_stride = c->y->row_stride;
    return f;
}

static void multiply_codes(struct cuda_state *s, const struct matmul_call *c,
                           const struct product *p, int64_t first, char *free_scratch)
{
    struct codes_product by_codes = {};

    by_codes.x = (const bf16 *)p->x;
    by_codes.y = p->y;
    by_codes.type_y = p->type_y;
    by_codes.n_rows = p->m;
    by_codes.x_stride = p->ld_x;
    by_codes.lane_stride = p->m * c->l->out_dim;
    if (c->direct)
        by_codes.finish = finish_of(c, first);
    by_codes.finish.y_stride = p->ld_y;
    if (c->l->x_format == WEIGHT_FP8)
        cuda_fp8_multiply(s, c->l, &by_codes, free_scratch);
    else
        cuda_codes_multiply(s, c->l, &by_codes);
}

static void matmul_rows(struct backend *b, const struct matmul_call *c, int64_t first, int64_t n)
{
    struct cuda_state *s = cuda_state_of(b);
    const struct linear *l = c->l;
    char *free_scratch = s->scratch;
    struct product p = {};

    p.m = n;
    p.n_whole = l->out_dim;
    p.ld_w = l->in_dim;
    p.type = l->dtype;
    p.type_y = c->sum_type;
    p.x = row_at(c->x, first);
    p.ld_x = n > 1 || c->x->row_stride >= l->in_dim ? c->x->row_stride : l->in_dim;
    if (c->converted) {
        WITH_TYPE(
            l->dtype, T,
            WITH_TYPE(c->x->dtype, U,
                      LAUNCH((convert_kernel<T, U>), dim3((unsigned)n), dim3(256), 0, s->stream,
                             (T *)free_scratch, (const U *)p.x, p.ld_x, l->in_dim)));
        p.x = free_scratch;
        p.ld_x = l->in_dim;
        free_scratch += rounded((size_t)(n * l->in_dim) * dtype_size(l->dtype));
    }
    p.y = c->direct || c->into_y ? row_at(c->y, first) : free_scratch;
    p.ld_y = c->direct || c->into_y ? c->y->row_stride : l->out_dim;
    if (c->direct && l->bias)
        p.bias = c->sum_type == DTYPE_F32 ? (const void *)l->bias
                                          : (const char *)l->packed + held_bytes(s, l);
    if (c->direct && c->e && c->e->residual)
        p.residual = row_at(c->e->residual, first);
    if (c->by_codes)
        multiply_codes(s, c, &p, first, free_scratch);
    else
        multiply_whole(s, c, &p);
    if (c->direct)
        return;
    struct combine k = {c->n_lanes, (size_t)(n * l->out_dim), l->out_dim, p.ld_y,
                        finish_of(c, first)};
    WITH_TYPE(c->y->dtype, T,
              WITH_TYPE(c->sum_type, P,
                        LAUNCH((combine_kernel<T, P>), dim3((unsigned)n), dim3(256), 0, s->stream,
                               (T *)row_at(c->y, first), (const P *)p.y, k)));
}

void cuda_matmul(struct backend *b, struct tensor *y, const struct tensor *x,
                 const struct linear *l, const struct epilogue *e)
{
    struct cuda_state *s = cuda_state_of(b);
    struct matmul_call c = {};
    int64_t n = tensor_n_rows(y), step = n;
    int act = e && e->act != ACTIVATION_NONE, scale = e && e->scale, add = e && e->residual;
    /* float32 weights give float32 sums only; residual as C must have y's row stride. */
    int plain_type = l->dtype == DTYPE_BF16 || y->dtype == DTYPE_F32;
    int as_c = !add || (!l->bias && (n == 1 || e->residual->row_stride == y->row_stride));

    c.y = y;
    c.x = x;
    c.l = l;
    c.e = e;
    c.n_lanes = cuda_n_sums(s, l);
    c.converted = x->dtype != l->dtype;
    c.by_codes = l->format != WEIGHT_FLOAT && l->dtype == DTYPE_BF16;
    c.direct =
        l->x_format == WEIGHT_FP8 || (c.n_lanes == 1 && !act && (c.by_codes || (!scale && plain_type && as_c)));
    c.into_y = !c.direct && c.n_lanes == 1 && y->dtype == DTYPE_F32 && !add;
    c.sum_type = c.direct || c.into_y ? y->dtype : DTYPE_F32;
    size_t per_row = scratch_per_row(s, &c);
    if (per_row) {
        step = (int64_t)((s->scratch_bytes - PARTS_MAX * CUDA_BLOCK_BYTES) / per_row);
        if (step < 1)
            BUG("%zu bytes of scratch do not hold one row of a product (%zu bytes)",
                s->scratch_bytes, per_row);
    }
    for (int64_t first = 0; first < n; first += step)
        matmul_rows(b, &c, first, n - first < step ? n - first : step);
}

/* ---- the reduction of comm_nccl ---- */

__global__ void tree_sum_kernel(float *x, const float *parts, int n_parts, size_t n)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;

    if (i < n)
        x[i] = tree_sum(parts + i, n, n_parts);
}

extern "C" void backend_cuda_tree_sum(struct backend *b, float *x, const float *parts, int n_parts,
                                      size_t n)
{
    if (n_parts < 1 || n_parts > LANES_MAX || (n_parts & (n_parts - 1)))
        BUG("a tree of %d parts", n_parts);
    if (n)
        LAUNCH(tree_sum_kernel, dim3(blocks_for((int64_t)n, 256)), dim3(256), 0,
               cuda_state_of(b)->stream, x, parts, n_parts, n);
}
