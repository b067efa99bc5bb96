/*
 * The tensors of one quantised weight, found and checked (stored_codes.h).
 */
#include "daemon/model/stored_codes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "daemon/model/json.h"
#include "kernels/log.h"

#define STATE_MAX_BYTES 4096 // of a quant_state
#define STATE_MAX_DEPTH 3

/* Sets of types. */
#define TYPE(t) (1u << (t))
#define FLOATS (TYPE(DTYPE_F32) | TYPE(DTYPE_BF16) | TYPE(DTYPE_F16))

struct finder {
    struct stored_codes *c;
    const struct safetensors *files;
    const char *base; // of names: "….q_proj"
    const struct quantization *q;
    struct error *err;
};

static const struct safetensors_tensor *look_up(const struct finder *f, const char *suffix)
{
    char name[320];
    snprintf(name, sizeof(name), "%s%s", f->base, suffix);
    return safetensors_find(f->files, name);
}

/* 0 when the part is there with one of the types, or when it may be absent. */
static int take(struct finder *f, enum stored_part part, const char *suffix, unsigned types,
                int is_optional)
{
    const struct safetensors_tensor *t = look_up(f, suffix);
    f->c->parts[part] = t;
    if (!t && is_optional)
        return 0;
    if (!t)
        return error_set(f->err, ERROR_INVALID_ARGUMENT,
                         "%s: tensor %s has no %s%s beside it, which quantization_config asks for",
                         f->c->parts[STORED_CODES]->file, f->c->parts[STORED_CODES]->name, f->base,
                         suffix);
    if (!(types & TYPE(t->dtype)))
        return error_set(f->err, ERROR_INVALID_ARGUMENT,
                         "%s: tensor %s: %s is not a type that this format has", t->file, t->name,
                         dtype_name(t->dtype));
    return 0;
}

static int expect_shape(const struct finder *f, enum stored_part part, int64_t a, int64_t b)
{
    const struct safetensors_tensor *t = f->c->parts[part];
    return t ? safetensors_expect_shape(t, (const int64_t[]){a, b}, b ? 2 : 1, f->err) : 0;
}

static int64_t divide_up(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit;
}

int32_t stored_codes_group(const struct stored_codes *c, int64_t k)
{
    int32_t group;
    memcpy(&group, c->parts[STORED_ORDER]->data + (size_t)k * sizeof(group), sizeof(group));
    return group;
}

/* g_idx, where there is one: every column's group exists. */
static int check_order(struct finder *f)
{
    struct stored_codes *c = f->c;
    if (!c->parts[STORED_ORDER])
        return 0;
    if (expect_shape(f, STORED_ORDER, c->in_dim, 0) != 0)
        return -1;
    for (int64_t k = 0; k < c->in_dim; k++) {
        int32_t group = stored_codes_group(c, k);
        if (group < 0 || group >= c->n_groups)
            return error_set(f->err, ERROR_INVALID_ARGUMENT,
                             "%s: tensor %s: column %lld is in group %d, there are %lld",
                             c->parts[STORED_ORDER]->file, c->parts[STORED_ORDER]->name,
                             (long long)k, group, (long long)c->n_groups);
        c->has_order |= group != k / c->group_size;
    }
    return 0;
}

static int find_awq_or_gptq(struct finder *f)
{
    struct stored_codes *c = f->c;
    const struct quantization *q = f->q;
    int is_awq = q->method == QUANTIZATION_AWQ;
    int64_t in_word = 32 / q->bits;
    c->layout = is_awq ? STORED_AWQ : STORED_GPTQ;
    c->format = q->format;
    c->bits = q->bits;
    c->group_size = q->group_size ? q->group_size : c->in_dim;
    c->n_groups = divide_up(c->in_dim, c->group_size);
    c->zeros_less_one = q->zeros_less_one;
    if (take(f, STORED_CODES, ".qweight", TYPE(DTYPE_I32), 0) != 0 ||
        take(f, STORED_SCALES, ".scales", FLOATS, 0) != 0 ||
        take(f, STORED_ZEROS, ".qzeros", TYPE(DTYPE_I32), 0) != 0 ||
        take(f, STORED_ORDER, ".g_idx", TYPE(DTYPE_I32), 1) != 0)
        return -1;
    if (c->out_dim % in_word != 0 || (!is_awq && c->in_dim % in_word != 0))
        return error_set(f->err, ERROR_INVALID_ARGUMENT,
                         "%s: tensor %s: a weight of %lld x %lld does not fill whole words of %lld "
                         "codes",
                         c->parts[STORED_CODES]->file, c->parts[STORED_CODES]->name,
                         (long long)c->out_dim, (long long)c->in_dim, (long long)in_word);
    int rc = is_awq ? expect_shape(f, STORED_CODES, c->in_dim, c->out_dim / in_word)
                    : expect_shape(f, STORED_CODES, c->in_dim / in_word, c->out_dim);
    if (rc != 0 || expect_shape(f, STORED_SCALES, c->n_groups, c->out_dim) != 0 ||
        expect_shape(f, STORED_ZEROS, c->n_groups, c->out_dim / in_word) != 0)
        return -1;
    return check_order(f);
}

/* What the scales' shape says of the groups of PACKED and BYTES. */
static int read_groups(struct finder *f)
{
    struct stored_codes *c = f->c;
    const struct safetensors_tensor *s = c->parts[STORED_SCALES];
    const struct quantization *q = f->q;
    c->n_groups = 1;
    c->group_size = c->in_dim;
    c->rows_per_scale = 1;
    if (s->n_bytes == dtype_size(s->dtype)) {
        c->rows_per_scale = c->out_dim;
        return 0;
    }
    if (s->n_dims == 1)
        return expect_shape(f, STORED_SCALES, c->out_dim, 0);
    if (s->n_dims == 2 && s->shape[1] == 1 && !q->group_rows)
        return expect_shape(f, STORED_SCALES, c->out_dim, 1);
    c->rows_per_scale = q->group_rows ? q->group_rows : 1;
    c->group_size = q->group_size ? q->group_size : c->in_dim;
    c->n_groups = divide_up(c->in_dim, c->group_size);
    return expect_shape(f, STORED_SCALES, divide_up(c->out_dim, c->rows_per_scale), c->n_groups);
}

static int find_packed(struct finder *f)
{
    struct stored_codes *c = f->c;
    const struct safetensors_tensor *t = look_up(f, ".weight_packed");
    c->layout = STORED_PACKED;
    c->bits = t->n_dims == 2 && t->shape[1] == divide_up(c->in_dim, 4) ? 8 : 4;
    c->format = c->bits == 8 ? WEIGHT_INT8 : WEIGHT_INT4;
    int64_t in_word = 32 / c->bits;
    if (take(f, STORED_CODES, ".weight_packed", TYPE(DTYPE_I32), 0) != 0 ||
        take(f, STORED_SCALES, ".weight_scale", FLOATS, 0) != 0 ||
        take(f, STORED_ZEROS, ".weight_zero_point", TYPE(DTYPE_I32), 1) != 0 ||
        take(f, STORED_ORDER, ".weight_g_idx", TYPE(DTYPE_I32), 1) != 0 ||
        take(f, STORED_SHAPE, ".weight_shape", TYPE(DTYPE_I64) | TYPE(DTYPE_I32), 1) != 0)
        return -1;
    if (expect_shape(f, STORED_CODES, c->out_dim, divide_up(c->in_dim, in_word)) != 0 ||
        read_groups(f) != 0 ||
        expect_shape(f, STORED_ZEROS, divide_up(c->out_dim, in_word), c->n_groups) != 0 ||
        expect_shape(f, STORED_SHAPE, 2, 0) != 0)
        return -1;
    return check_order(f);
}

/* int8 or E4M3, one a byte: compressed-tensors, fine-grained FP8, LLM.int8(). */
static int find_bytes(struct finder *f)
{
    struct stored_codes *c = f->c;
    int is_llm_int8 = look_up(f, ".SCB") != NULL, is_inverse = !!look_up(f, ".weight_scale_inv");
    const char *scales = is_llm_int8 ? ".SCB" : is_inverse ? ".weight_scale_inv" : ".weight_scale";
    c->layout = STORED_BYTES;
    c->bits = 8;
    if (take(f, STORED_CODES, ".weight", TYPE(DTYPE_I8) | TYPE(DTYPE_F8_E4M3), 0) != 0 ||
        expect_shape(f, STORED_CODES, c->out_dim, c->in_dim) != 0 ||
        take(f, STORED_SCALES, scales, FLOATS, 0) != 0 || read_groups(f) != 0)
        return -1;
    int is_fp8 = c->parts[STORED_CODES]->dtype == DTYPE_F8_E4M3;
    c->format = is_fp8 ? WEIGHT_FP8 : is_llm_int8 ? WEIGHT_INT8_127 : WEIGHT_INT8;
    if (c->format != WEIGHT_INT8)
        return 0;
    if (take(f, STORED_ZEROS, ".weight_zero_point", TYPE(DTYPE_I8), 1) != 0)
        return -1;
    const struct safetensors_tensor *s = c->parts[STORED_SCALES], *z = c->parts[STORED_ZEROS];
    return z ? safetensors_expect_shape(z, s->shape, s->n_dims, f->err) : 0;
}

/* ---- bitsandbytes' 4 bits ---- */

static int refuse_state(const struct finder *f, const char *what)
{
    const struct safetensors_tensor *t = f->c->parts[STORED_STATE];
    return error_set(f->err, ERROR_INVALID_ARGUMENT, "%s: tensor %s: %s", t->file, t->name, what);
}

/* quant_state: {quant_type, blocksize, dtype, shape[, nested_blocksize, nested_offset, …]}. The
 * type of the floats that there were is not kept to: values are float32. */
static int read_state(struct finder *f)
{
    struct stored_codes *c = f->c;
    const struct safetensors_tensor *t = c->parts[STORED_STATE];
    if (t->n_bytes > STATE_MAX_BYTES)
        return refuse_state(f, "too long for a quant_state");
    cJSON *root = json_parse((const char *)t->data, t->n_bytes, STATE_MAX_DEPTH, t->name, f->err);
    if (!root)
        return -1;
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(root, "shape");
    const cJSON *size = cJSON_GetObjectItemCaseSensitive(root, "blocksize");
    const cJSON *nested_size = cJSON_GetObjectItemCaseSensitive(root, "nested_blocksize");
    const cJSON *offset = cJSON_GetObjectItemCaseSensitive(root, "nested_offset");
    int is_nested = nested_size || offset, rc = 0;
    if (cJSON_GetArraySize(shape) != 2 ||
        !json_is_integer(cJSON_GetArrayItem(shape, 0), (int)c->out_dim, (int)c->out_dim) ||
        !json_is_integer(cJSON_GetArrayItem(shape, 1), (int)c->in_dim, (int)c->in_dim))
        rc = refuse_state(f, "its shape is not that of the weight in config.json");
    else if (!json_is_integer(size, 1, 1 << 16))
        rc = refuse_state(f, "blocksize: a number of elements is expected");
    else if (is_nested && (!json_is_integer(nested_size, 1, 1 << 16) || !cJSON_IsNumber(offset) ||
                           !isfinite((float)offset->valuedouble)))
        rc = refuse_state(f, "nested_blocksize, nested_offset: numbers are expected");
    if (rc == 0) {
        c->group_size = size->valueint;
        c->nested_group = is_nested ? nested_size->valueint : 0;
        c->nested_offset = is_nested ? (float)offset->valuedouble : 0;
    }
    cJSON_Delete(root);
    return rc;
}

/* bitsandbytes computes with its own constants, whatever map the file repeats. */
static int check_map(const struct finder *f)
{
    const struct safetensors_tensor *t = f->c->parts[STORED_MAP];
    const float *table = weight_format_table(f->c->format, 0);
    for (int i = 0; t && i < 16; i++) {
        float value;
        memcpy(&value, t->data + (size_t)i * sizeof(value), sizeof(value));
        if (!(fabsf(value - table[i]) < 1e-5f))
            return error_set(f->err, ERROR_INVALID_ARGUMENT, "%s: tensor %s: not the values of %s",
                             t->file, t->name, weight_format_name(f->c->format));
    }
    return 0;
}

static int find_bitsandbytes(struct finder *f)
{
    struct stored_codes *c = f->c;
    int is_nf4 = look_up(f, ".weight.quant_state.bitsandbytes__nf4") != NULL;
    int64_t n = c->out_dim * c->in_dim;
    c->layout = STORED_BITSANDBYTES;
    c->format = is_nf4 ? WEIGHT_NF4 : WEIGHT_FP4;
    c->bits = 4;
    if (take(f, STORED_CODES, ".weight", TYPE(DTYPE_U8), 0) != 0 ||
        expect_shape(f, STORED_CODES, divide_up(n, 2), 1) != 0 ||
        take(f, STORED_STATE,
             is_nf4 ? ".weight.quant_state.bitsandbytes__nf4"
                    : ".weight.quant_state.bitsandbytes__fp4",
             TYPE(DTYPE_U8), 0) != 0 ||
        read_state(f) != 0 || take(f, STORED_MAP, ".weight.quant_map", TYPE(DTYPE_F32), 1) != 0 ||
        expect_shape(f, STORED_MAP, 16, 0) != 0 || check_map(f) != 0)
        return -1;
    c->n_groups = c->in_dim / stored_codes_group_size(c);
    int64_t n_scales = divide_up(n, c->group_size);
    if (take(f, STORED_SCALES, ".weight.absmax", TYPE(c->nested_group ? DTYPE_U8 : DTYPE_F32), 0) !=
            0 ||
        expect_shape(f, STORED_SCALES, n_scales, 0) != 0)
        return -1;
    if (!c->nested_group)
        return 0;
    if (take(f, STORED_NESTED_SCALES, ".weight.nested_absmax", TYPE(DTYPE_F32), 0) != 0 ||
        take(f, STORED_NESTED_MAP, ".weight.nested_quant_map", TYPE(DTYPE_F32), 0) != 0 ||
        expect_shape(f, STORED_NESTED_SCALES, divide_up(n_scales, c->nested_group), 0) != 0)
        return -1;
    return expect_shape(f, STORED_NESTED_MAP, 256, 0);
}

int stored_codes_find(struct stored_codes *c, const struct safetensors *files, const char *name,
                      int64_t out_dim, int64_t in_dim, const struct quantization *q,
                      struct error *err)
{
    char base[256];
    size_t n = strlen(name), suffix = strlen(".weight");
    struct finder f = {c, files, base, q, err};
    *c = (struct stored_codes){.out_dim = out_dim, .in_dim = in_dim, .rows_per_scale = 1};
    if (n < suffix || strcmp(name + n - suffix, ".weight") != 0 || n >= sizeof(base))
        BUG("%s is no name of a weight", name);
    snprintf(base, sizeof(base), "%.*s", (int)(n - suffix), name);
    const struct safetensors_tensor *t = look_up(&f, ".weight");
    int rc, is_awq_or_gptq = q->method == QUANTIZATION_AWQ || q->method == QUANTIZATION_GPTQ;
    if (is_awq_or_gptq && look_up(&f, ".qweight"))
        rc = find_awq_or_gptq(&f);
    else if (look_up(&f, ".weight_packed"))
        rc = find_packed(&f);
    else if (t && (t->dtype == DTYPE_I8 || t->dtype == DTYPE_F8_E4M3))
        rc = find_bytes(&f);
    else if (t && t->dtype == DTYPE_U8 && look_up(&f, ".weight.absmax"))
        rc = find_bitsandbytes(&f);
    else
        return 0;
    return rc == 0 ? 1 : -1;
}

int stored_codes_has_zeros(const struct stored_codes *c)
{
    return c->parts[STORED_ZEROS] != NULL;
}

int64_t stored_codes_group_size(const struct stored_codes *c)
{
    return c->layout == STORED_BITSANDBYTES ? quantization_flat_group(c->in_dim, c->group_size)
                                            : c->group_size;
}
