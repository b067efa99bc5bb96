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
    [QUANTIZATION_FP8] = "fp8",
    [QUANTIZATION_BITSANDBYTES_FP4] = "bitsandbytes-fp4",
    [QUANTIZATION_BITSANDBYTES_NF4] = "bitsandbytes-nf4",
    [QUANTIZATION_AWQ] = "awq",
    [QUANTIZATION_GPTQ] = "gptq",
    [QUANTIZATION_BITSANDBYTES_4BIT] = "bitsandbytes",
    [QUANTIZATION_BITSANDBYTES_8BIT] = "bitsandbytes",
    [QUANTIZATION_COMPRESSED_TENSORS] = "compressed-tensors",
    [QUANTIZATION_STORED_FP8] = "fp8",
};

int quantization_is_stored(const struct quantization *q)
{
    return q->method > QUANTIZATION_BITSANDBYTES_NF4;
}

int quantization_parse(struct quantization *q, const char *name, int64_t group_size,
                       struct error *err)
{
    if (group_size != 32 && group_size != 64 && group_size != 128)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--quantization-group-size %lld: it must be 32, 64 or 128",
                         (long long)group_size);
    for (int i = QUANTIZATION_NONE; i <= QUANTIZATION_BITSANDBYTES_NF4; i++) {
        if (strcmp(name, names[i]) != 0)
            continue;
        if (quantization_is_stored(q) && i == QUANTIZATION_NONE)
            return 0;
        if (quantization_is_stored(q))
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "--quantization %s: the checkpoint is quantised already "
                             "(quantization_config: %s)",
                             name, names[q->method]);
        *q = (struct quantization){.method = (enum quantization_method)i, .group_size = group_size};
        return 0;
    }
    return error_set(err, ERROR_INVALID_ARGUMENT,
                     "--quantization %.64s: one of none, int8, int4, fp8, bitsandbytes-fp4, "
                     "bitsandbytes-nf4 is expected",
                     name);
}

int quantization_parse_activations(struct quantization *q, const char *name, struct error *err)
{
    char held[QUANTIZATION_BYTES];
    int64_t group, row = 1 << 20; // of any weight
    const enum weight_format f = quantization_format(q, KIND_LANGUAGE_LINEAR, row, &group);
    const int is_int8 = strcmp(name, "int8") == 0;
    if (strcmp(name, "none") == 0)
        return 0;
    if (is_int8 ? !weight_format_is_integer(f) || q->has_order : f != WEIGHT_FP8 || group != row)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--activation-quantization %s: the weights must be %s; these are: %s",
                         name,
                         is_int8 ? "int8 or int4, without desc_act or an order of columns"
                                 : "FP8, with a scale a matrix or a row",
                         quantization_describe(q, held, sizeof(held)));
    q->x_format = is_int8 ? WEIGHT_INT8 : WEIGHT_FP8;
    return 0;
}

const char *quantization_describe(const struct quantization *q, char *buf, size_t n_bytes)
{
    int n = snprintf(buf, n_bytes, "%s", names[q->method]);
    if (quantization_is_stored(q))
        n += snprintf(buf + n, n_bytes - (size_t)n, ", %s", weight_format_name(q->format));
    if (q->group_size && (q->method == QUANTIZATION_INT4 || quantization_is_stored(q)))
        n += snprintf(buf + n, n_bytes - (size_t)n, " (groups of %lld)", (long long)q->group_size);
    if (q->x_format != WEIGHT_FLOAT)
        snprintf(buf + n, n_bytes - (size_t)n, ", activations too");
    return buf;
}

int64_t quantization_flat_group(int64_t in_dim, int64_t group_size)
{
    while (group_size) { // the greatest common divisor
        int64_t rest = in_dim % group_size;
        in_dim = group_size;
        group_size = rest;
    }
    return in_dim;
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
    case QUANTIZATION_FP8:
        return kind == KIND_LM_HEAD || kind == KIND_EMBEDDING ? WEIGHT_FLOAT : WEIGHT_FP8;
    case QUANTIZATION_BITSANDBYTES_FP4:
    case QUANTIZATION_BITSANDBYTES_NF4:
        if (kind == KIND_LM_HEAD || kind == KIND_EMBEDDING)
            return WEIGHT_FLOAT;
        *group_size = quantization_flat_group(in_dim, BITSANDBYTES_GROUP);
        return q->method == QUANTIZATION_BITSANDBYTES_FP4 ? WEIGHT_FP4 : WEIGHT_NF4;
    case QUANTIZATION_BITSANDBYTES_4BIT:
        *group_size = quantization_flat_group(in_dim, q->group_size);
        break;
    default:
        *group_size = q->group_size ? q->group_size : in_dim;
    }
    int is_converted =
        kind == KIND_LANGUAGE_LINEAR || (kind == KIND_VISION_LINEAR && q->with_vision);
    return is_converted ? q->format : WEIGHT_FLOAT;
}
