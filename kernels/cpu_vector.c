/*
 * The inner loops over one row: activations, norms, softmax, rope, roundings. Compiled once per
 * instruction set (CPU_VECTOR_OPS names the table it exports).
 *
 * Element-wise code is the same arithmetic at every vector width; sums go through struct sum16. So
 * all instruction sets give the same bits. It knows no threads and no tensors.
 */
#include <float.h>

#include "kernels/cpu_isa.h"
#include "kernels/cpu_simd.h"

/* x in [i, i + VF_N) of a row of n; elements past n read as 0. */
ALWAYS_INLINE vf load_at(const float *p, int64_t i, int64_t n)
{
    return n - i >= VF_N ? vf_load(p + i) : vf_load_n(p + i, n - i);
}

ALWAYS_INLINE void store_at(float *p, int64_t i, int64_t n, vf x)
{
    if (n - i >= VF_N)
        vf_store(p + i, x);
    else
        vf_store_n(p + i, x, n - i);
}

/* Those of a last part are rounded as the others are, which may take denormals for 0. */
ALWAYS_INLINE void store_bf16_at(uint16_t *p, int64_t i, int64_t n, vf x)
{
    vh h = vf_to_bf16(x);
    if (n - i >= VF_N)
        *(vh_memory *)(p + i) = h;
    else
        memcpy(p + i, &h, (size_t)(n - i) * sizeof(*p));
}

ALWAYS_INLINE vf sigmoid(vf x)
{
    return 1.0f / (1.0f + vf_exp(-x));
}

/* tanh form of GELU: 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
ALWAYS_INLINE vf gelu_tanh(vf x)
{
    vf u = x + 0.044715f * (x * x * x);
    return x * sigmoid(u * 1.5957691216f);
}

ALWAYS_INLINE vf activate(vf x, enum activation act)
{
    switch (act) {
    case ACTIVATION_GELU:
        return 0.5f * x * (1.0f + vf_erf(x * 0.70710678118f));
    case ACTIVATION_GELU_TANH:
        return gelu_tanh(x);
    case ACTIVATION_QUICK_GELU:
        return x * sigmoid(1.702f * x);
    case ACTIVATION_RELU:
        return vf_max(vf_set(0.0f), x); // a NaN stays one
    case ACTIVATION_SILU:
        return x / (1.0f + vf_exp(-x));
    case ACTIVATION_NONE:
        break;
    }
    return x;
}

/* Columns from i on of row r, as many as there are before n. */
ALWAYS_INLINE void finish_at(const struct finish *f, int64_t r, int64_t i, int64_t n,
                             enum activation act)
{
    vf v = load_at(f->x + r * f->x_row, i, n);
    if (f->bias)
        v += load_at(f->bias, i, n);
    v = activate(v, act);
    if (f->up) {
        vf up = load_at(f->up + r * f->x_row, i, n);
        if (f->up_bias)
            up += load_at(f->up_bias, i, n);
        v *= up;
    }
    if (f->scale)
        v *= load_at(f->scale, i, n);
    if (f->residual)
        v += load_at(f->residual + r * f->residual_row, i, n);
    if (f->rounds)
        store_bf16_at((uint16_t *)f->y + r * f->y_row, i, n, v);
    else
        store_at((float *)f->y + r * f->y_row, i, n, v);
}

/* Whole vectors. */
ALWAYS_INLINE void finish_rows(const struct finish *f, const enum activation act)
{
    for (int64_t r = 0; r < f->n_rows; r++) {
        for (int64_t i = 0; i + VF_N <= f->n; i += VF_N)
            finish_at(f, r, i, i + VF_N, act);
    }
}

static void finish(const struct finish *f)
{
    switch (f->act) { // a loop of its own for each
    case ACTIVATION_NONE:
        finish_rows(f, ACTIVATION_NONE);
        break;
    case ACTIVATION_GELU:
        finish_rows(f, ACTIVATION_GELU);
        break;
    case ACTIVATION_GELU_TANH:
        finish_rows(f, ACTIVATION_GELU_TANH);
        break;
    case ACTIVATION_QUICK_GELU:
        finish_rows(f, ACTIVATION_QUICK_GELU);
        break;
    case ACTIVATION_RELU:
        finish_rows(f, ACTIVATION_RELU);
        break;
    case ACTIVATION_SILU:
        finish_rows(f, ACTIVATION_SILU);
        break;
    }
    for (int64_t r = 0; f->n % VF_N > 0 && r < f->n_rows; r++)
        finish_at(f, r, f->n / VF_N * VF_N, f->n, f->act);
}

static void add(float *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(y, i, n, load_at(y, i, n) + load_at(x, i, n));
}

static void multiply(float *y, float x, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(y, i, n, load_at(y, i, n) * x);
}

static void divide(float *y, const float *x, float d, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(y, i, n, load_at(x, i, n) / d);
}

static void rms_norm(float *y, const float *x, const float *weight, int64_t n, float eps)
{
    struct sum16 sum = {{{0}}};
    for (int64_t i = 0; i < n; i += VF_N) {
        vf v = load_at(x, i, n);
        int part = (int)(i / VF_N % BLOCK_VECTORS);
        sum.v[part] = vf_fma(v, v, sum.v[part]);
    }
    float inverse = 1.0f / sqrtf(sum16_total(sum) / (float)n + eps);
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(y, i, n, load_at(weight, i, n) * (load_at(x, i, n) * inverse));
}

static void layer_norm(float *y, const float *x, const float *weight, const float *bias, int64_t n,
                       float eps)
{
    struct sum16 sum = {{{0}}}, squares = {{{0}}};
    for (int64_t i = 0; i < n; i += VF_N)
        sum.v[i / VF_N % BLOCK_VECTORS] += load_at(x, i, n);
    float mean = sum16_total(sum) / (float)n;
    for (int64_t i = 0; i < n; i += VF_N) {
        vf d = load_at(x, i, n) - mean;
        if (n - i < VF_N) { // what lies past the row is not mean away from it
            float tail[VF_N];
            vf_store(tail, d);
            d = vf_load_n(tail, n - i);
        }
        int part = (int)(i / VF_N % BLOCK_VECTORS);
        squares.v[part] = vf_fma(d, d, squares.v[part]);
    }
    float inverse = 1.0f / sqrtf(sum16_total(squares) / (float)n + eps);
    for (int64_t i = 0; i < n; i += VF_N) {
        vf v = (load_at(x, i, n) - mean) * inverse;
        store_at(y, i, n, v * load_at(weight, i, n) + load_at(bias, i, n));
    }
}

static void rotate(float *x1, float *x2, const float *cosines, const float *sines, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N) {
        vf a = load_at(x1, i, n), b = load_at(x2, i, n);
        vf c = load_at(cosines, i, n), s = load_at(sines, i, n);
        store_at(x1, i, n, a * c - b * s);
        store_at(x2, i, n, b * c + a * s);
    }
}

/* -infinity outside [lo, hi), for the elements from `first` on. */
ALWAYS_INLINE vf mask_outside(vf x, int64_t first, int64_t lo, int64_t hi)
{
    vi i;
    for (int j = 0; j < VF_N; j++)
        i[j] = j;
    int64_t n = first + VF_N;
    vi inside =
        (i >= (int32_t)(lo < n ? lo - first : VF_N)) & (i < (int32_t)(hi < n ? hi - first : VF_N));
    return vf_select(inside, x, vf_set(-INFINITY));
}

/* Masks [lo, hi), to whole blocks; returns the largest of them. */
ALWAYS_INLINE float softmax_largest(float *scores, int64_t lo, int64_t hi)
{
    vf largest = vf_set(-INFINITY);
    for (int64_t i = lo / 16 * 16; i < (hi + 15) / 16 * 16; i += VF_N) {
        vf v = vf_load(scores + i);
        if (i < lo || i + VF_N > hi) {
            v = mask_outside(v, i, lo, hi);
            vf_store(scores + i, v);
        }
        largest = vf_max(v, largest);
    }
    return vf_largest(largest);
}

ALWAYS_INLINE float softmax_exp(float *scores, int64_t lo, int64_t hi, float scale, float m)
{
    struct sum16 sum = {{{0}}};
    for (int64_t i = lo / 16 * 16; i < (hi + 15) / 16 * 16; i += 16) {
        for (int j = 0; j < BLOCK_VECTORS; j++) {
            vf p = vf_exp2_falling(vf_load(scores + i + j * VF_N) * scale - m);
            vf_store(scores + i + j * VF_N, p);
            sum.v[j] += p;
        }
    }
    return sum16_total(sum);
}

/* In three passes over the rows, so that one row's reductions overlap with the next's. */
static void softmax_step(float *scores, int64_t row_stride, int n_rows, const int64_t *lo,
                         const int64_t *hi, float scale, struct softmax *s, float *correction)
{
    float fall[16] = {0}, sums[TILE_ROWS_MAX] = {0};
    int any_falls = 0;
    for (int r = 0; r < n_rows; r++) {
        correction[r] = 1.0f;
        if (lo[r] == hi[r])
            continue;
        float m = softmax_largest(scores + r * row_stride, lo[r], hi[r]) * scale;
        if (m > s[r].m) {
            fall[r] = s[r].m - m;
            s[r].m = m;
            any_falls = 1;
        }
    }
    for (int r = 0; r < n_rows; r++) {
        if (lo[r] < hi[r])
            sums[r] = softmax_exp(scores + r * row_stride, lo[r], hi[r], scale, s[r].m);
    }
    if (any_falls) {
        for (int r = 0; r < 16; r += VF_N)
            vf_store(fall + r, vf_exp2_falling(vf_load(fall + r)));
        memcpy(correction, fall, (size_t)n_rows * sizeof(float));
    }
    for (int r = 0; r < n_rows; r++)
        s[r].l = s[r].l * correction[r] + sums[r];
}

static void columns_largest(float *largest, const float *x, int64_t x_row, int64_t n_rows,
                            int64_t n)
{
    for (int64_t j = 0; j < n; j += VF_N) {
        vf most = vf_load(largest + j);
        for (int64_t i = 0; i < n_rows; i++)
            most = vf_max(vf_load(x + i * x_row + j), most);
        vf_store(largest + j, most);
    }
}

/* As vf_round_bf16(), of what is between 0 and 1: where one is a NaN, so is its query's sum, and no
 * matter what becomes of it here. */
ALWAYS_INLINE vu round_exp(vf x)
{
#if defined(__AVX512BF16__)
    return vf_round_bf16(x);
#else
    vu u = (vu)x;
    return (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
#endif
}

/* Keys i and, where there is one, i + 1; i is even. */
ALWAYS_INLINE void columns_exp_pair(const struct softmax_columns *c, int64_t i, const int has_odd,
                                    const enum columns_form form)
{
    const float *scores = c->scores + i * c->row;
    float *sums = c->sums + i % 16 * c->row;
    uint32_t *to = (uint32_t *)c->p + (form == COLUMNS_BF16_PAIRS ? i / 2 : i) * c->row;
    for (int64_t j = 0; j < c->n; j += VF_N) {
        const vf m = vf_load(c->m + j);
        vf even = vf_exp2_falling(vf_load(scores + j) * c->scale - m), odd = vf_set(0.0f);
        vf_store(sums + j, vf_load(sums + j) + even);
        if (has_odd) {
            odd = vf_exp2_falling(vf_load(scores + c->row + j) * c->scale - m);
            vf_store(sums + c->row + j, vf_load(sums + c->row + j) + odd);
        }
        if (form == COLUMNS_BF16_PAIRS) {
            *(vu_memory *)(to + j) = vf_pair_bf16(even, odd);
        } else if (form == COLUMNS_ROUNDED) {
            *(vu_memory *)(to + j) = round_exp(odd);
            *(vu_memory *)(to + c->row + j) = round_exp(even);
        } else {
            *(vu_memory *)(to + j) = (vu)even;
            if (has_odd)
                *(vu_memory *)(to + c->row + j) = (vu)odd;
        }
    }
}

ALWAYS_INLINE void columns_exp_as(const struct softmax_columns *arg, const enum columns_form form)
{
    const struct softmax_columns c = *arg; // what is stored through pointers does not touch
    int64_t i = 0;
    for (; i + 2 <= c.n_keys; i += 2)
        columns_exp_pair(&c, i, 1, form);
    if (i < c.n_keys)
        columns_exp_pair(&c, i, 0, form);
}

static void columns_exp(const struct softmax_columns *c)
{
    if (c->form == COLUMNS_BF16_PAIRS)
        columns_exp_as(c, COLUMNS_BF16_PAIRS);
    else if (c->form == COLUMNS_ROUNDED)
        columns_exp_as(c, COLUMNS_ROUNDED);
    else
        columns_exp_as(c, COLUMNS_F32);
}

/* The tree of sum16_total(). */
static void columns_total(float *sums, int64_t row, int64_t n)
{
    for (int half = 8; half >= 1; half /= 2) {
        for (int i = 0; i < half; i++)
            add(sums + i * row, sums + (i + half) * row, n);
    }
}

static void to_bf16(uint16_t *dst, const float *src, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_bf16_at(dst, i, n, load_at(src, i, n));
}

static void pair_bf16(uint32_t *dst, const float *even, const float *odd, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N) {
        vu pairs = vf_pair_bf16(load_at(even, i, n), odd ? load_at(odd, i, n) : vf_set(0.0f));
        store_at((float *)dst, i, n, (vf)pairs);
    }
}

static void round_bf16(float *dst, const float *src, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(dst, i, n, (vf)vf_round_bf16(load_at(src, i, n)));
}

static void round_bf16_odd_first(float *dst, const float *src, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(dst, i, n + n % 2, vf_swap((vf)vf_round_bf16(load_at(src, i, n)), 1));
}

/* Four by four; what is left of rows or columns goes one by one. */
static void transpose(uint32_t *dst, int64_t dst_row, const uint32_t *src, int64_t src_row,
                      int64_t n_rows, int64_t n)
{
    typedef uint32_t v4 __attribute__((vector_size(16), aligned(4), may_alias));
    int64_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        const uint32_t *from = src + r * src_row;
        int64_t j = 0;
        for (; j + 4 <= n; j += 4) {
            v4 a = *(const v4 *)(from + j), b = *(const v4 *)(from + src_row + j);
            v4 c = *(const v4 *)(from + 2 * src_row + j);
            v4 d = *(const v4 *)(from + 3 * src_row + j);
            v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            v4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
            uint32_t *to = dst + j * dst_row + r;
            *(v4 *)to = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
            *(v4 *)(to + dst_row) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
            ab = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            *(v4 *)(to + 2 * dst_row) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
            *(v4 *)(to + 3 * dst_row) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
        }
        for (; j < n; j++) {
            for (int i = 0; i < 4; i++)
                dst[j * dst_row + r + i] = from[i * src_row + j];
        }
    }
    for (; r < n_rows; r++) {
        for (int64_t j = 0; j < n; j++)
            dst[j * dst_row + r] = src[r * src_row + j];
    }
}

static void exponential(float *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(y, i, n, vf_exp(load_at(x, i, n)));
}

static void exp2_falling(float *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(y, i, n, vf_exp2_falling(load_at(x, i, n)));
}

static void multiply_by(float *x, const float *by, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(x, i, n, load_at(x, i, n) * load_at(by, i, n));
}

/* x in [i, i + VF_N) of a row of n of float32 or bfloat16; elements past n read as 0. */
ALWAYS_INLINE vf load_either_at(const void *x, enum dtype dtype, int64_t i, int64_t n)
{
    if (dtype == DTYPE_F32)
        return load_at(x, i, n);
    vh halves = {0};
    if (n - i >= VF_N)
        halves = *(const vh_memory *)((const uint16_t *)x + i);
    else
        memcpy(&halves, (const uint16_t *)x + i, (size_t)(n - i) * sizeof(uint16_t));
    return (vf)(__builtin_convertvector(halves, vu) << 16);
}

/* Magnitudes are compared as integers: in the order of floats, infinity and NaNs above all. Four
 * vectors of them, of which none waits for the one before. */
ALWAYS_INLINE float code_scale_of(const void *x, const enum dtype dtype, int64_t n)
{
    vi largest[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * VF_N <= n; i += 4 * VF_N) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const vf v = load_either_at(x, dtype, i + j * VF_N, n);
            largest[j] = vi_max(largest[j], (vi)v & 0x7fffffff);
        }
    }
    for (; i < n; i += VF_N)
        largest[0] = vi_max(largest[0], (vi)load_either_at(x, dtype, i, n) & 0x7fffffff);
    vi m = vi_max(vi_max(largest[0], largest[1]), vi_max(largest[2], largest[3]));
#pragma GCC unroll 4
    for (int step = VF_N / 2; step >= 1; step /= 2)
        m = vi_max(m, (vi)vf_swap((vf)m, step));
    const float most = ((vf)m)[0], scale = most / 127.0f;
    if (!(most <= FLT_MAX))
        return NAN;
    return scale < FLT_MIN ? 0.0f : scale;
}

static float code_scale(const void *x, enum dtype dtype, int64_t n)
{
    return dtype == DTYPE_F32 ? code_scale_of(x, DTYPE_F32, n) : code_scale_of(x, DTYPE_BF16, n);
}

/* A whole number below 2^22 added to 1.5 * 2^23 is the sum's lower bits. */
ALWAYS_INLINE void codes_of(int8_t *dst, const void *x, const enum dtype dtype, int64_t n,
                            float scale)
{
    typedef int8_t vb __attribute__((vector_size(VF_N)));
    typedef int8_t vb_memory __attribute__((vector_size(VF_N), aligned(1), may_alias));
    for (int64_t i = 0; i < n; i += VF_N) {
        vi sums = (vi)(load_either_at(x, dtype, i, n) / scale + 12582912.0f) - 0x4b400000;
        *(vb_memory *)(dst + i) = __builtin_convertvector(sums, vb);
    }
}

static void codes(int8_t *dst, const void *x, enum dtype dtype, int64_t n, float scale)
{
    const int64_t last = (n - 1) / 16 * 16;
    memset(dst + last, 0, 16);
    if (!(scale > 0.0f))
        memset(dst, 0, (size_t)last);
    else if (dtype == DTYPE_F32)
        codes_of(dst, x, DTYPE_F32, n, scale);
    else
        codes_of(dst, x, DTYPE_BF16, n, scale);
}

const struct cpu_vector_ops CPU_VECTOR_OPS = {
    .finish = finish,
    .add = add,
    .multiply = multiply,
    .divide = divide,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .rotate = rotate,
    .softmax_step = softmax_step,
    .columns_largest = columns_largest,
    .columns_exp = columns_exp,
    .columns_total = columns_total,
    .to_bf16 = to_bf16,
    .pair_bf16 = pair_bf16,
    .round_bf16 = round_bf16,
    .round_bf16_odd_first = round_bf16_odd_first,
    .transpose = transpose,
    .exp = exponential,
    .exp2_falling = exp2_falling,
    .multiply_by = multiply_by,
    .code_scale = code_scale,
    .codes = codes,
};
