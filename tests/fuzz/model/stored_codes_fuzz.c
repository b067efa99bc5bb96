/*
 * A quantised weight "x" [16, 48] in a safetensors file from foreign bytes, as every method reads
 * it: none, an error, or rows whose codes and scales lie inside the bytes.
 */
#include <math.h>
#include <stdlib.h>

#include "daemon/model/stored_codes.h"
#include "kernels/log.h"

#define OUT_DIM 16
#define IN_DIM 48

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Whether stored_codes_rows() would die of numbers that are none: it is not called then. */
static int has_strange_numbers(const struct stored_codes *c)
{
    static const enum stored_part floats[] = {STORED_SCALES, STORED_NESTED_SCALES,
                                              STORED_NESTED_MAP};
    for (int i = 0; i < 3; i++) {
        const struct safetensors_tensor *t = c->parts[floats[i]];
        for (uint64_t at = 0; t && t->dtype != DTYPE_U8 && at < t->n_bytes;
             at += dtype_size(t->dtype)) {
            uint8_t aligned[4] __attribute__((aligned(4)));
            float f;
            memcpy(aligned, t->data + at, dtype_size(t->dtype));
            tensor_widen(&f, aligned, t->dtype, 1);
            if (!(fabsf(f) < 1e18f))
                return 1;
        }
    }
    const struct safetensors_tensor *codes = c->parts[STORED_CODES];
    for (uint64_t i = 0; c->format == WEIGHT_FP8 && i < codes->n_bytes; i++)
        if ((codes->data[i] & 0x7f) == 0x7f)
            return 1;
    return 0;
}

static void read_part(const struct stored_codes *c, struct range rows, struct range columns)
{
    int64_t group_size = stored_codes_group_size(c);
    struct quantized q = {.format = c->format, .out_dim = rows.n, .in_dim = columns.n};
    q.group_size = group_size;
    q.group_phase = c->has_order ? 0 : columns.start % group_size;
    q.n_groups = c->has_order ? c->n_groups
                              : (columns.start + columns.n - 1) / group_size -
                                    columns.start / group_size + 1;
    q.codes = xcalloc((size_t)(rows.n * columns.n), 1);
    q.scales = xcalloc((size_t)(rows.n * q.n_groups), sizeof(float));
    q.zeros = stored_codes_has_zeros(c) ? xcalloc((size_t)(rows.n * q.n_groups), 1) : NULL;
    stored_codes_rows(c, rows, columns, &q, 0);
    for (int64_t k = 0; k < columns.n && c->has_order; k++)
        if (stored_codes_group(c, columns.start + k) >= c->n_groups)
            abort();
    free(q.codes);
    free(q.scales);
    free(q.zeros);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct quantization methods[] = {
        {.method = QUANTIZATION_AWQ, .bits = 4, .group_size = 16, .format = WEIGHT_INT4},
        {.method = QUANTIZATION_GPTQ, .bits = 4, .group_size = 16, .format = WEIGHT_INT4},
        {.method = QUANTIZATION_GPTQ, .bits = 8, .format = WEIGHT_INT8, .zeros_less_one = 1},
        {.method = QUANTIZATION_BITSANDBYTES_4BIT, .bits = 4, .group_size = 64},
        {.method = QUANTIZATION_COMPRESSED_TENSORS, .bits = 4, .group_size = 16},
        {.method = QUANTIZATION_STORED_FP8, .bits = 8, .group_size = 16, .group_rows = 8},
    };
    struct safetensors files;
    struct error err = {0};
    if (safetensors_parse(&files, data, size, "file", &err) != 0)
        return 0;
    for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++) {
        struct stored_codes c;
        err.msg[0] = 0;
        int found = stored_codes_find(&c, &files, "x.weight", OUT_DIM, IN_DIM, &methods[i], &err);
        if (found < 0 && err.msg[0] == 0)
            abort();
        if (found != 1 || has_strange_numbers(&c))
            continue;
        read_part(&c, (struct range){0, OUT_DIM}, (struct range){0, IN_DIM});
        read_part(&c, (struct range){3, 5}, (struct range){7, 30});
    }
    safetensors_release(&files);
    return 0;
}
