/*
 * gpu_bench: weights of a loaded model turned into codes, in place.
 *
 * Random codes of the right shape and format take as long to multiply as real ones and are made in
 * a moment, where quantising a model's floats takes minutes.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"
#include "tests/bench/gpu_bench.h"

const struct gpu_format gpu_formats[] = {
    {"bfloat16", {.method = QUANTIZATION_NONE}},
    {"fp8", {.method = QUANTIZATION_FP8}},
    {"fp8-fp8", {.method = QUANTIZATION_FP8, .x_format = WEIGHT_FP8}},
    {"int4", {.method = QUANTIZATION_INT4, .group_size = 128}},
};
const int n_gpu_formats = (int)(sizeof(gpu_formats) / sizeof(gpu_formats[0]));

/* n codes of 0 … 15 or 0 … 255; of FP8 none that is a NaN. */
static void fill_codes(uint8_t *codes, int64_t n, enum weight_format format)
{
    const uint8_t mask = weight_format_bits(format) == 4 ? 15 : 255;
    uint64_t state = 0x9e3779b97f4a7c15u;

    for (int64_t i = 0; i < n; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        codes[i] = (uint8_t)(state >> 32) & mask;
        if (format == WEIGHT_FP8 && (codes[i] & 0x7f) == 0x7f)
            codes[i] ^= 1;
    }
}

/* So that values are of the size that a trained matrix of so many columns has. */
static float scale_for(enum weight_format format, int64_t in_dim)
{
    return 1.0f / ((weight_format_bits(format) == 4 ? 8.0f : 128.0f) * sqrtf((float)in_dim));
}

void gpu_codes_hold(struct backend *b, struct linear *l, const struct gpu_format *f,
                    enum weight_kind kind)
{
    int64_t group = 0;
    enum weight_format format = quantization_format(&f->quantization, kind, l->in_dim, &group);
    struct tensor bias = {0};

    if (format == WEIGHT_FLOAT)
        return;
    int64_t n_groups = (l->in_dim + group - 1) / group, n_codes = l->out_dim * l->in_dim;
    struct quantized q = {.format = format,
                          .out_dim = l->out_dim,
                          .in_dim = l->in_dim,
                          .n_groups = n_groups,
                          .group_size = group,
                          .codes = xcalloc((size_t)n_codes, 1),
                          .scales = xcalloc((size_t)(l->out_dim * n_groups), sizeof(float))};
    fill_codes(q.codes, n_codes, format);
    for (int64_t i = 0; i < l->out_dim * n_groups; i++)
        q.scales[i] = scale_for(format, l->in_dim);
    if (l->bias) {
        size_t n_bytes = (size_t)l->out_dim * sizeof(float);
        bias = tensor_1d(xcalloc(n_bytes, 1), DTYPE_F32, l->out_dim);
        op_download(b, bias.data, l->bias, n_bytes);
    }
    op_linear_free(b, l);
    l->x_format = format == WEIGHT_FP8 ? f->quantization.x_format : WEIGHT_FLOAT;
    op_linear_pack_quantized(b, l, &q, bias.data ? &bias : NULL);
    op_sync(b);
    free(bias.data);
    free(q.codes);
    free(q.scales);
}
