/*
 * The definition of each op as a plain loop; see op_naive.h.
 */
#include "tests/op/op_naive.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "kernels/draw_best.h"
#include "kernels/log.h"

static const float *row(const struct tensor *t, int64_t i)
{
    return (const float *)t->data + i * t->row_stride;
}

double naive_activation(double x, enum activation act)
{
    switch (act) {
    case ACTIVATION_GELU:
        return 0.5 * x * (1 + erf(x / sqrt(2)));
    case ACTIVATION_GELU_TANH:
        return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case ACTIVATION_QUICK_GELU:
        return x / (1 + exp(-1.702 * x));
    case ACTIVATION_RELU:
        return x > 0 ? x : 0;
    case ACTIVATION_SILU:
        return x / (1 + exp(-x));
    case ACTIVATION_NONE:
        break;
    }
    return x;
}

static double rounded(float x, int bf16)
{
    return bf16 ? bf16_to_f32(f32_to_bf16(x)) : x;
}

void naive_matmul(float *y, const struct tensor *x, const struct tensor *w, int bf16,
                  const float *bias, enum activation act, const float *scale,
                  const struct tensor *residual)
{
    int64_t n_out = w->shape[0], n_in = w->shape[1];
    for (int64_t m = 0; m < x->shape[0]; m++) {
        for (int64_t n = 0; n < n_out; n++) {
            double sum = 0;
            for (int64_t k = 0; k < n_in; k++)
                sum += rounded(row(x, m)[k], bf16) * rounded(row(w, n)[k], bf16);
            sum = naive_activation(sum + (bias ? bias[n] : 0), act);
            sum *= scale ? scale[n] : 1;
            y[m * n_out + n] = (float)(sum + (residual ? row(residual, m)[n] : 0));
        }
    }
}

void naive_rms_norm(float *y, const struct tensor *x, const float *weight, float eps)
{
    int64_t n = tensor_n_cols(x);
    for (int64_t i = 0; i < tensor_n_rows(x); i++) {
        double sum = 0;
        for (int64_t j = 0; j < n; j++)
            sum += (double)row(x, i)[j] * row(x, i)[j];
        for (int64_t j = 0; j < n; j++)
            y[i * n + j] = (float)(row(x, i)[j] / sqrt(sum / (double)n + eps) * weight[j]);
    }
}

void naive_layer_norm(float *y, const struct tensor *x, const float *weight, const float *bias,
                      float eps)
{
    int64_t n = tensor_n_cols(x);
    for (int64_t i = 0; i < tensor_n_rows(x); i++) {
        double mean = 0, sum = 0;
        for (int64_t j = 0; j < n; j++)
            mean += row(x, i)[j] / (double)n;
        for (int64_t j = 0; j < n; j++)
            sum += (row(x, i)[j] - mean) * (row(x, i)[j] - mean);
        for (int64_t j = 0; j < n; j++)
            y[i * n + j] =
                (float)((row(x, i)[j] - mean) / sqrt(sum / (double)n + eps) * weight[j] + bias[j]);
    }
}

void naive_rope(float *y, const struct tensor *x, const float *cos, const float *sin, int head_dim)
{
    int64_t n = tensor_n_cols(x), half = head_dim / 2;
    for (int64_t i = 0; i < tensor_n_rows(x); i++) {
        for (int64_t j = 0; j < n; j++) {
            int64_t d = j % head_dim, at = i * half + d % half;
            double other = d < half ? -row(x, i)[j + half] : row(x, i)[j - half];
            y[i * n + j] = (float)(row(x, i)[j] * (double)cos[at] + other * sin[at]);
        }
    }
}

void naive_attend(float *out, float *probs, const float *q, const float *k, const float *v,
                  int64_t n, int64_t stride, int head_dim, double scale)
{
    double *p = xcalloc((size_t)n, sizeof(*p));
    double largest = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) {
        for (int d = 0; d < head_dim; d++)
            p[j] += (double)q[d] * k[j * stride + d] * scale;
        largest = p[j] > largest ? p[j] : largest;
    }
    for (int64_t j = 0; j < n; j++)
        sum += p[j] = exp(p[j] - largest);
    for (int d = 0; d < head_dim; d++) {
        double o = 0;
        for (int64_t j = 0; j < n; j++)
            o += p[j] / sum * v[j * stride + d];
        out[d] = (float)o;
    }
    for (int64_t j = 0; probs && j < n; j++)
        probs[j] = (float)(p[j] / sum);
    free(p);
}

float naive_codes(int8_t *codes, const float *x, int n)
{
    float largest = 0;
    int is_finite = 1;
    for (int i = 0; i < n; i++) {
        largest = fmaxf(largest, fabsf(x[i]));
        is_finite = is_finite && isfinite(x[i]);
    }
    float scale = !is_finite ? NAN : largest / 127 < FLT_MIN ? 0 : largest / 127;
    for (int i = 0; i < n; i++)
        codes[i] = scale > 0 ? (int8_t)rintf(x[i] / scale) : 0;
    return scale;
}

struct top_k naive_top_k(const float *logits, int vocab, float temperature)
{
    struct top_k best = {.finite = 1, .n = vocab < TOP_K ? vocab : TOP_K};
    uint8_t *taken = xcalloc((size_t)vocab, 1);
    double sum = 0;
    for (int k = 0; k < best.n; k++) {
        int at = -1;
        for (int i = 0; i < vocab; i++)
            if (!taken[i] && (at < 0 || logits[i] > logits[at]))
                at = i;
        taken[at] = 1;
        best.ids[k] = at;
        best.values[k] = logits[at];
    }
    for (int i = 0; i < vocab; i++) {
        sum += exp((double)logits[i] - best.values[0]);
        best.weight_sum += exp((double)(logits[i] / temperature) - best.values[0] / temperature);
    }
    best.log_sum = best.values[0] + log(sum);
    free(taken);
    return best;
}

struct drawn naive_draw(const struct draw_params *p, const struct top_k *best, int vocab)
{
    struct draw_list list;
    for (int32_t k = 0; p->temperature > 0 && k < best->n; k++)
        list.weights[k] = draw_weight(best, k, p->temperature);
    return draw_best(&list, p, best, vocab);
}
