/*
 * Which weights are held in fewer bits (quantization.h).
 */
#include "daemon/model/quantization.h"

#include <stdio.h>
#include <string.h>

static const char *const names[] = {
    [QUANTIZATION_NONE] = "none",
    [QUANTIZATION_INT8] = "int8",
    [QUANTIZATION_INT4] = "int4",
    [QUANTIZATION_BITSANDBYTES_FP4] = "bitsandbytes-fp4",
    [QUANTIZATION_BITSANDBYTES_NF4] = "bitsandbytes-nf4",
};

int quantization_parse(struct quantization *q, const char *name, int64_t group_size,
                       struct error *err)
{
    *q = (struct quantization){.group_size = (int)group_size};
    if (group_size != 32 && group_size != 64 && group_size != 128)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--quantization-group-size %lld: it must be 32, 64 or 128",
                         (long long)group_size);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (strcmp(name, names[i]) == 0) {
            q->method = (enum quantization_method)i;
            return 0;
        }
    return error_set(err, ERROR_INVALID_ARGUMENT,
                     "--quantization %.64s: one of none, int8, int4, bitsandbytes-fp4, "
                     "bitsandbytes-nf4 is expected",
                     name);
}

const char *quantization_describe(const struct quantization *q, char *buf, size_t n_bytes)
{
    if (q->method == QUANTIZATION_INT4)
        snprintf(buf, n_bytes, "int4 (groups of %d)", q->group_size);
    else
        snprintf(buf, n_bytes, "%s", names[q->method]);
    return buf;
}

static int64_t common_divisor(int64_t a, int64_t b)
{
    while (b) {
        int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

enum weight_format quantization_format(const struct quantization *q, enum weight_kind kind,
                                       int64_t in_dim, int64_t *group_size)
{
    *group_size = in_dim;
    if (kind == KIND_OTHER)
        return WEIGHT_FLOAT;
    switch (q->method) {
    case QUANTIZATION_NONE:
        return WEIGHT_FLOAT;
    case QUANTIZATION_INT8:
        return WEIGHT_INT8;
    case QUANTIZATION_INT4:
        if (kind != KIND_LANGUAGE_LINEAR)
            return WEIGHT_INT8;
        *group_size = q->group_size;
        return WEIGHT_INT4;
    case QUANTIZATION_BITSANDBYTES_FP4:
    case QUANTIZATION_BITSANDBYTES_NF4:
        if (kind == KIND_LM_HEAD)
            return WEIGHT_FLOAT;
        /* Groups run over the ends of rows that are no multiple of them: every row is then held in
         * smaller ones that lie in a single group. */
        *group_size = common_divisor(in_dim, BITSANDBYTES_GROUP);
        return q->method == QUANTIZATION_BITSANDBYTES_FP4 ? WEIGHT_FP4 : WEIGHT_NF4;
    }
    return WEIGHT_FLOAT;
}
