/*
 * The inner loops over one row: activations, norms, softmax, rope, roundings. Compiled once per
 * instruction set (CPU_VECTOR_OPS names the table it exports).
 *
 * Element-wise code is the same arithmetic at every vector width; sums go through struct sum16. So
 * all instruction sets give the same bits. It knows no threads and no tensors.
 */
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

static void epilogue(float *y, const float *x, int64_t n, const float *bias, enum activation act,
                     const float *scale, const float *residual)
{
    for (int64_t i = 0; i < n; i += VF_N) {
        vf v = load_at(x, i, n);
        if (bias)
            v += load_at(bias, i, n);
        if (act != ACTIVATION_NONE)
            v = activate(v, act);
        if (scale)
            v *= load_at(scale, i, n);
        if (residual)
            v += load_at(residual, i, n);
        store_at(y, i, n, v);
    }
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

static void gated(float *y, const float *gate, const float *up, int64_t n, enum activation act)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(y, i, n, activate(load_at(gate, i, n), act) * load_at(up, i, n));
}

static void rms_norm(float *y, const float *x, const float *weight, int64_t n, float eps)
{
    struct sum16 sum = {{{0}}};
    for (int64_t i = 0; i < n; i += VF_N) {
        vf v = load_at(x, i, n);
        int part = (int)(i / VF_N % BLOCK_VECTORS);
        sum.v[part] = vf_fma(v, v, sum.v[part]);
    }
    float inverse = 1.0f / sqrtf(sum16_total(&sum) / (float)n + eps);
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(y, i, n, load_at(weight, i, n) * (load_at(x, i, n) * inverse));
}

static void layer_norm(float *y, const float *x, const float *weight, const float *bias, int64_t n,
                       float eps)
{
    struct sum16 sum = {{{0}}}, squares = {{{0}}};
    for (int64_t i = 0; i < n; i += VF_N)
        sum.v[i / VF_N % BLOCK_VECTORS] += load_at(x, i, n);
    float mean = sum16_total(&sum) / (float)n;
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
    float inverse = 1.0f / sqrtf(sum16_total(&squares) / (float)n + eps);
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
    if (first >= lo && first + VF_N <= hi)
        return x;
    float kept[VF_N];
    vf_store(kept, x);
    for (int i = 0; i < VF_N; i++) {
        if (first + i < lo || first + i >= hi)
            kept[i] = -INFINITY;
    }
    return vf_load(kept);
}

static float softmax_step(float *scores, int64_t lo, int64_t hi, float scale, struct softmax *s)
{
    const int64_t first = lo / 16 * 16, end = (hi + 15) / 16 * 16;
    vf largest = vf_set(s->m);
    for (int64_t i = first; i < end; i += VF_N) {
        vf v = mask_outside(vf_load(scores + i) * scale, i, lo, hi);
        vf_store(scores + i, v);
        largest = vf_max(v, largest);
    }
    float lanes[VF_N];
    vf_store(lanes, largest);
    float m = lanes[0];
    for (int i = 1; i < VF_N; i++)
        m = lanes[i] > m ? lanes[i] : m;

    struct sum16 sum = {{{0}}};
    for (int64_t i = first; i < end; i += 16) {
        for (int j = 0; j < BLOCK_VECTORS; j++) {
            vf p = vf_exp(vf_load(scores + i + j * VF_N) - m);
            vf_store(scores + i + j * VF_N, p);
            sum.v[j] += p;
        }
    }
    float correction = vf_exp(vf_set(s->m - m))[0];
    s->l = s->l * correction + sum16_total(&sum);
    s->m = m;
    return correction;
}

static void to_bf16(uint16_t *dst, const float *src, int64_t n)
{
    int64_t i = 0;
    for (; i + VF_N <= n; i += VF_N) {
        vu u = vf_round_bf16(vf_load(src + i)) >> 16;
        *(vh_memory *)(dst + i) = __builtin_convertvector(u, vh);
    }
    for (; i < n; i++)
        dst[i] = f32_to_bf16(src[i]);
}

static void round_bf16(float *dst, const float *src, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(dst, i, n, (vf)vf_round_bf16(load_at(src, i, n)));
}

static void exponential(float *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += VF_N)
        store_at(y, i, n, vf_exp(load_at(x, i, n)));
}

const struct cpu_vector_ops CPU_VECTOR_OPS = {
    .epilogue = epilogue,
    .add = add,
    .multiply = multiply,
    .divide = divide,
    .gated = gated,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .rotate = rotate,
    .softmax_step = softmax_step,
    .to_bf16 = to_bf16,
    .round_bf16 = round_bf16,
    .exp = exponential,
};
