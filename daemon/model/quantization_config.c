/*
 * A quantised checkpoint's quantization_config (quantization_config.h).
 */
#include "daemon/model/quantization_config.h"

#include <string.h>

#define LARGEST_GROUP (1 << 20)

/* The lists of what is left as it was, under every method's name for them: does one of them speak
 * of the vision tower ("vision_tower", "re:.*vision.*", "visual")? */
static int leaves_vision_out(const struct reader *r)
{
    static const char *const keys[] = {"modules_to_not_convert", "llm_int8_skip_modules", "ignore"};
    for (int i = 0; i < 3; i++) {
        const cJSON *list = reader_get(r, keys[i]), *v = NULL;
        cJSON_ArrayForEach(v, list)
        {
            if (cJSON_IsString(v) && strstr(v->valuestring, "vis"))
                return 1;
        }
    }
    return 0;
}

/* Columns of a group; -1, a whole row, becomes 0. */
static int64_t read_group_size(const struct reader *r, const char *key, int fallback)
{
    int n = reader_int(r, key, fallback, -1, LARGEST_GROUP);
    if (n == 0)
        reader_refuse(r, "%s: found 0; columns, or -1 for a whole row, are expected", key);
    return n > 0 ? n : 0;
}

/* Only 4 and, where `with_8`, 8 bits. */
static void read_bits(struct quantization *q, const struct reader *r, const char *key, int with_8)
{
    q->bits = reader_int(r, key, 4, 1, 64);
    q->format = q->bits == 8 ? WEIGHT_INT8 : WEIGHT_INT4;
    if (q->bits != 4 && !(with_8 && q->bits == 8))
        reader_refuse(r, "%s: found %d; supported: %s", key, q->bits, with_8 ? "4, 8" : "4");
}

/* 1 when `key` holds an object, a list or a string that is not empty. */
static int says_something(const struct reader *r, const char *key)
{
    const cJSON *v = reader_get(r, key);
    return cJSON_IsTrue(v) || (v && v->child) || (cJSON_IsString(v) && v->valuestring[0]);
}

static void read_awq(struct quantization *q, const struct reader *r)
{
    static const char *const versions[] = {"gemm", "GEMM", NULL};
    q->method = QUANTIZATION_AWQ;
    read_bits(q, r, reader_get(r, "w_bit") ? "w_bit" : "bits", 0);
    q->group_size =
        read_group_size(r, reader_get(r, "q_group_size") ? "q_group_size" : "group_size", 128);
    reader_word(r, "version", versions, "gemm");
    if (!reader_bool(r, "zero_point", 1))
        reader_refuse(r, "zero_point: false; AWQ is supported with zero points only");
    q->has_zeros = 1;
}

/* GPTQModel's rules for single modules: "-:PATTERN" leaves some out, which the files show. */
static void check_dynamic(const struct reader *r)
{
    const cJSON *rules = reader_get(r, "dynamic"), *v = NULL;
    char buf[64];
    cJSON_ArrayForEach(v, rules)
    {
        if (v->string && strncmp(v->string, "-:", 2) != 0)
            reader_refuse(r, "dynamic: rule %s: settings of single modules are not supported",
                          json_printable(v->string, buf, sizeof(buf)));
    }
}

static void read_gptq(struct quantization *q, const struct reader *r)
{
    static const char *const formats[] = {"gptq", "gptq_v2", NULL};
    q->method = QUANTIZATION_GPTQ;
    read_bits(q, r, "bits", 1);
    q->group_size = read_group_size(r, "group_size", 128);
    q->zeros_less_one = reader_word(r, "checkpoint_format", formats, "gptq") == 0;
    q->has_order = reader_bool(r, "desc_act", 0);
    q->has_zeros = 1;
    if (reader_bool(r, "is_marlin_format", 0))
        reader_refuse(r, "is_marlin_format: true; supported: checkpoint_format gptq, gptq_v2");
    check_dynamic(r);
}

static void read_bitsandbytes(struct quantization *q, const struct reader *r)
{
    static const char *const types[] = {"fp4", "nf4", NULL};
    int is_4_bit = reader_bool(r, "load_in_4bit", reader_bool(r, "_load_in_4bit", 0));
    int is_8_bit = reader_bool(r, "load_in_8bit", reader_bool(r, "_load_in_8bit", 0));
    if (is_4_bit == is_8_bit)
        reader_refuse(r, "load_in_4bit, load_in_8bit: one of them must be true");
    q->method = is_4_bit ? QUANTIZATION_BITSANDBYTES_4BIT : QUANTIZATION_BITSANDBYTES_8BIT;
    q->bits = is_4_bit ? 4 : 8;
    q->group_size = is_4_bit ? BITSANDBYTES_GROUP : 0;
    q->format = !is_4_bit                                                  ? WEIGHT_INT8_127
                : reader_word(r, "bnb_4bit_quant_type", types, "fp4") == 1 ? WEIGHT_NF4
                                                                           : WEIGHT_FP4;
    q->with_vision = !leaves_vision_out(r);
}

/* [rows, columns] that share a scale. */
static void read_block(struct quantization *q, const struct reader *r, const char *key)
{
    const cJSON *v = reader_get(r, key);
    const cJSON *rows = cJSON_GetArrayItem(v, 0), *columns = cJSON_GetArrayItem(v, 1);
    char buf[48];
    if (cJSON_GetArraySize(v) != 2 || !json_is_integer(rows, 1, LARGEST_GROUP) ||
        !json_is_integer(columns, 1, LARGEST_GROUP)) {
        reader_refuse(r, "%s: found %s; [rows, columns] are expected", key,
                      v ? json_shown(v, buf, sizeof(buf)) : "nothing");
        return;
    }
    q->group_rows = rows->valueint;
    q->group_size = columns->valueint;
}

static void read_fp8(struct quantization *q, const struct reader *r)
{
    static const char *const formats[] = {"e4m3", "float8_e4m3fn", NULL};
    q->method = QUANTIZATION_STORED_FP8;
    q->format = WEIGHT_FP8;
    q->bits = 8;
    reader_word(r, "fmt", formats, "e4m3");
    if (reader_get(r, "weight_block_size"))
        read_block(q, r, "weight_block_size");
    q->with_vision = !leaves_vision_out(r);
}

/* A group's weights: QuantizationArgs. */
static void read_weight_args(struct quantization *q, const struct reader *r)
{
    static const char *const types[] = {"int", "float", NULL};
    static const char *const strategies[] = {"tensor", "channel", "group", "block", NULL};
    int is_float = reader_word(r, "type", types, "int") == 1;
    read_bits(q, r, "num_bits", 1);
    if (is_float && q->bits != 8)
        reader_refuse(r, "type: floats of %d bits; supported: 8 bits (E4M3)", q->bits);
    q->format = is_float ? WEIGHT_FP8 : q->format;
    int has_group = reader_int(r, "group_size", -1, -1, LARGEST_GROUP) > 0;
    const char *fallback = has_group ? "group" : "tensor";
    int strategy = reader_word(r, "strategy", strategies, fallback);
    if (strategy == 2)
        q->group_size = read_group_size(r, "group_size", READER_REQUIRED);
    if (strategy == 3)
        read_block(q, r, "block_structure");
    q->has_zeros = !reader_bool(r, "symmetric", 1);
    const char *order = reader_get(r, "actorder") && !cJSON_IsBool(reader_get(r, "actorder"))
                            ? reader_string(r, "actorder", "")
                            : "";
    q->has_order = strcmp(order, "group") == 0 || strcmp(order, "dynamic") == 0;
}

static void read_compressed_tensors(struct quantization *q, const struct reader *r)
{
    static const char *const formats[] = {"pack-quantized",  "int-quantized",   "float-quantized",
                                          "naive-quantized", "mixed-precision", NULL};
    static const char *const dense[] = {"dense", NULL};
    struct quantization first = {.method = QUANTIZATION_NONE};
    const cJSON *group = NULL;
    reader_word(r, "format", formats, "naive-quantized");
    struct reader sparsity = reader_sub(r, "sparsity_config", r->where);
    if (sparsity.object)
        reader_word(&sparsity, "format", dense, "dense");
    if (says_something(r, "transform_config"))
        reader_refuse(r, "transform_config: rotations of activations are not supported");
    cJSON_ArrayForEach(group, reader_get(r, "config_groups"))
    {
        struct reader g = *r;
        g.object = group;
        struct reader weights = reader_sub(&g, "weights", r->where);
        struct quantization read = {.method = QUANTIZATION_COMPRESSED_TENSORS};
        if (!weights.object)
            continue;
        if (reader_get(&g, "format"))
            reader_word(&g, "format", formats, "");
        read_weight_args(&read, &weights);
        if (first.method == QUANTIZATION_NONE)
            first = read;
    }
    if (first.method == QUANTIZATION_NONE)
        reader_refuse(r, "config_groups: no group has weights");
    *q = first;
    q->with_vision = !leaves_vision_out(r);
}

static void read_method(struct quantization *q, const struct reader *r)
{
    static const char *const methods[] = {"compressed-tensors", "awq", "gptq",
                                          "bitsandbytes",       "fp8", NULL};
    static void (*const readers[])(struct quantization *, const struct reader *) = {
        read_compressed_tensors, read_awq, read_gptq, read_bitsandbytes, read_fp8};
    /* Files older than the key are bitsandbytes' or, with config_groups, compressed-tensors'. */
    const char *fallback = reader_get(r, "config_groups") ? methods[0]
                           : reader_get(r, "load_in_4bit") || reader_get(r, "load_in_8bit")
                               ? methods[3]
                               : "(none)";
    int i = reader_word(r, "quant_method", methods, fallback);
    if (!*r->failed)
        readers[i](q, r);
}

void quantization_config_read(struct quantization *q, const struct reader *root)
{
    static const struct {
        const char *parent, *key, *where;
    } places[] = {
        {NULL, "quantization_config", "config.json: quantization_config."},
        {NULL, "compression_config", "config.json: compression_config."},
        {"text_config", "quantization_config", "config.json: text_config.quantization_config."},
        {"text_config", "compression_config", "config.json: text_config.compression_config."},
        {"llm_config", "quantization_config", "config.json: llm_config.quantization_config."},
        {"llm_config", "compression_config", "config.json: llm_config.compression_config."},
    };
    *q = (struct quantization){.method = QUANTIZATION_NONE};
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        struct reader parent = *root;
        if (places[i].parent)
            parent = reader_sub(root, places[i].parent, root->where);
        struct reader found = reader_sub(&parent, places[i].key, places[i].where);
        if (!found.object || *root->failed)
            continue;
        read_method(q, &found);
        return;
    }
}
