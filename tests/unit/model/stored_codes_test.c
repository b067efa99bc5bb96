/*
 * Checkpoints that are quantised already: every format's values against its own library's (tests/
 * data/quantized/make.py), any part of them; groups that no shard's border hits; and each way a
 * file can be wrong.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/model/weight_codes.h"
#include "kernels/log.h"
#include "parallel/shard.h"
#include "tests/unit/model/model_files.h"

/* One weight of a file that needs nothing else to be read. */
struct alone {
    struct weights w;
    struct weight_spec spec;
    struct weight_source source;
};

static void alone_init(struct alone *a, const struct safetensors *files, const char *name,
                       int64_t out, int64_t in, const struct quantization *q)
{
    struct error err = {0};
    *a = (struct alone){.spec = {.n_dims = 2, .shape = {out, in}}};
    int found = stored_codes_find(&a->source.codes, files, name, out, in, q, &err);
    if (found != 1)
        fail_msg("%s: %d %s", name, found, err.msg);
    const struct stored_codes *c = &a->source.codes;
    a->source.tensor = c->parts[STORED_CODES];
    a->spec.format = c->format;
    a->spec.group_size = stored_codes_group_size(c);
    a->spec.has_zeros = stored_codes_has_zeros(c);
    a->spec.has_order = c->has_order;
    a->w.list.specs = &a->spec;
    a->w.list.n = 1;
    a->w.sources = &a->source;
}

/* Values [rows.n, columns.n] of that part; the caller frees. */
static float *values_of(const struct alone *a, struct range rows, struct range columns,
                        int n_threads)
{
    struct quantized q = {0};
    uint8_t *codes = xcalloc((size_t)(rows.n * columns.n), 1);
    float *values = xcalloc((size_t)(rows.n * columns.n), sizeof(*values));
    weight_codes_init(&q, &a->w, &a->spec, rows.n, columns, codes);
    struct backend *b = backend_cpu_open(n_threads, "scalar");
    weight_codes_read(&q, 0, &a->w, &a->spec, &a->spec, rows, columns, DTYPE_F32, b);
    backend_close(b);
    for (int64_t n = 0; n < rows.n; n++)
        for (int64_t k = 0; k < columns.n; k++)
            values[n * columns.n + k] = quantized_value(&q, n, k);
    weight_codes_release(&q);
    free(codes);
    return values;
}

/* ---- recorded values ---- */

static const struct quantization
    awq = {.method = QUANTIZATION_AWQ, .bits = 4, .group_size = 16, .format = WEIGHT_INT4},
    awq_rows = {.method = QUANTIZATION_AWQ, .bits = 4, .format = WEIGHT_INT4},
    gptq = {.method = QUANTIZATION_GPTQ,
            .bits = 4,
            .group_size = 16,
            .format = WEIGHT_INT4,
            .zeros_less_one = 1},
    gptq_v2 = {.method = QUANTIZATION_GPTQ, .bits = 4, .group_size = 16, .format = WEIGHT_INT4},
    gptq_8 = {.method = QUANTIZATION_GPTQ,
              .bits = 8,
              .group_size = 16,
              .format = WEIGHT_INT8,
              .zeros_less_one = 1},
    bnb_4 = {.method = QUANTIZATION_BITSANDBYTES_4BIT},
    bnb_8 = {.method = QUANTIZATION_BITSANDBYTES_8BIT},
    ct = {.method = QUANTIZATION_COMPRESSED_TENSORS, .group_size = 16};

static const struct recorded {
    const char *name;
    const struct quantization *q;
    enum weight_format format;
    int out, in;
} recorded[] = {
    {"awq.groups", &awq, WEIGHT_INT4, 16, 48},      {"awq.rows", &awq_rows, WEIGHT_INT4, 16, 48},
    {"gptq.v1", &gptq, WEIGHT_INT4, 16, 48},        {"gptq.v2", &gptq_v2, WEIGHT_INT4, 16, 48},
    {"gptq.order", &gptq, WEIGHT_INT4, 16, 48},     {"gptq.bits8", &gptq_8, WEIGHT_INT8, 16, 48},
    {"bnb.nf4", &bnb_4, WEIGHT_NF4, 5, 80},         {"bnb.fp4", &bnb_4, WEIGHT_FP4, 5, 80},
    {"bnb.nested", &bnb_4, WEIGHT_NF4, 264, 64},    {"bnb.int8", &bnb_8, WEIGHT_INT8_127, 16, 48},
    {"ct.fp8_tensor", &ct, WEIGHT_FP8, 16, 48},     {"ct.fp8_channel", &ct, WEIGHT_FP8, 16, 48},
    {"ct.int8", &ct, WEIGHT_INT8, 16, 48},          {"ct.int8_zeros", &ct, WEIGHT_INT8, 16, 48},
    {"ct.packed8", &ct, WEIGHT_INT8, 16, 48},       {"ct.packed4", &ct, WEIGHT_INT4, 16, 48},
    {"ct.packed4_zeros", &ct, WEIGHT_INT4, 16, 48}, {"ct.packed4_rows", &ct, WEIGHT_INT4, 16, 48},
    {"ct.packed4_order", &ct, WEIGHT_INT4, 16, 48},
};
#define N_RECORDED (sizeof(recorded) / sizeof(recorded[0]))

static void open_recorded(struct safetensors *files)
{
    struct error err;
    if (safetensors_open(files, INTERNVLD_SOURCE_DIR "/tests/data/quantized/stored.safetensors",
                         &err) != 0)
        fail_msg("%s", err.msg);
}

static void check_part(const struct recorded *r, const struct alone *a,
                       const struct safetensors_tensor *expected, struct range rows,
                       struct range columns)
{
    float *values = values_of(a, rows, columns, 3);
    int64_t first = a->source.first_row + rows.start;
    for (int64_t n = 0; n < rows.n && first + n < expected->shape[0]; n++)
        for (int64_t k = 0; k < columns.n; k++) {
            float want, got = values[n * columns.n + k];
            int64_t at = (first + n) * r->in + columns.start + k;
            memcpy(&want, expected->data + (size_t)at * sizeof(want), sizeof(want));
            if (got != want)
                fail_msg("%s [%d, %d]: %.9g, recorded %.9g", r->name, (int)(first + n),
                         (int)(columns.start + k), (double)got, (double)want);
        }
    free(values);
}

static void recorded_values(void **state)
{
    (void)state;
    struct safetensors files;
    open_recorded(&files);
    for (size_t i = 0; i < N_RECORDED; i++) {
        const struct recorded *r = &recorded[i];
        struct alone a;
        char name[64];
        snprintf(name, sizeof(name), "%s.weight", r->name);
        alone_init(&a, &files, name, r->out, r->in, r->q);
        assert_int_equal(a.spec.format, r->format);
        assert_int_equal(a.spec.has_order, strstr(r->name, "order") != NULL);
        snprintf(name, sizeof(name), "%s.values", r->name);
        const struct safetensors_tensor *expected = safetensors_find(&files, name);
        assert_non_null(expected);
        const struct range all = {0, r->in}, odd = {5, r->in - 12};
        check_part(r, &a, expected, (struct range){0, r->out}, all);
        check_part(r, &a, expected, (struct range){3, r->out - 3}, odd); // a shard's
        check_part(r, &a, expected, (struct range){0, r->out - 2}, (struct range){17, 3});
        check_part(r, &a, expected, (struct range){1, 1}, all);
        struct alone third = a; // as k in a packed attn.qkv
        third.w.list.specs = &third.spec;
        third.w.sources = &third.source;
        third.source.first_row = 2;
        third.spec.shape[0] = r->out - 4;
        check_part(r, &third, expected, (struct range){1, r->out - 5}, odd);
        float *one = xcalloc((size_t)r->in, sizeof(*one)), *same = NULL;
        weight_codes_values(&a.w, &a.spec, 2, odd, one);
        same = values_of(&a, (struct range){2, 1}, odd, 1);
        assert_memory_equal(one, same, (size_t)odd.n * sizeof(*one));
        free(one);
        free(same);
        float *past =
            values_of(&a, (struct range){r->out - 1, 3}, all, 2); // rows that there are not
        for (int k = 0; k < r->in; k++)
            assert_true(past[r->in + k] == 0 && past[2 * r->in + k] == 0);
        free(past);
    }
    safetensors_release(&files);
}

/* ---- files made here ---- */

struct made {
    char header[8192];
    uint8_t *data;
    size_t used;
    uint8_t *bytes;
};

static void put(struct made *m, const char *name, const char *dtype, int64_t a, int64_t b,
                const void *data, size_t n_bytes)
{
    size_t n = strlen(m->header);
    char shape[48];
    snprintf(shape, sizeof(shape), b ? "%lld,%lld" : "%lld", (long long)a, (long long)b);
    snprintf(m->header + n, sizeof(m->header) - n,
             "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", n ? "," : "{",
             name, dtype, shape, m->used, m->used + n_bytes);
    m->data = xrealloc(m->data, m->used + n_bytes, 1);
    if (data)
        memcpy(m->data + m->used, data, n_bytes);
    else
        memset(m->data + m->used, 0, n_bytes);
    m->used += n_bytes;
}

static void made_open(struct made *m, struct safetensors *files)
{
    size_t n = 0;
    struct error err;
    strcat(m->header, "}");
    m->bytes = safetensors_bytes(m->header, m->data, m->used, &n);
    if (safetensors_parse(files, m->bytes, n, "made", &err) != 0)
        fail_msg("%s", err.msg);
}

static void made_release(struct made *m, struct safetensors *files)
{
    safetensors_release(files);
    free(m->bytes);
    free(m->data);
    *m = (struct made){.header = ""};
}

/* 29568 = 231 groups of 128: InternVL3-78B's down_proj, whose columns eight shards share. */
static void groups_that_eight_do_not_divide(void **state)
{
    (void)state;
    const int64_t in = 29568, out = 8, n_groups = 231;
    struct made m = {.header = ""};
    struct safetensors files;
    struct alone a;
    struct quantization q = {
        .method = QUANTIZATION_AWQ, .bits = 4, .group_size = 128, .format = WEIGHT_INT4};
    uint32_t *codes = xcalloc((size_t)in, sizeof(*codes));
    uint32_t *zeros = xcalloc((size_t)n_groups, sizeof(*zeros));
    float *scales = xcalloc((size_t)(n_groups * out), sizeof(*scales));
    for (int64_t i = 0; i < in; i++)
        codes[i] = (uint32_t)i * 2654435761u;
    for (int64_t i = 0; i < n_groups; i++)
        zeros[i] = (uint32_t)i * 40503u * 7919u;
    for (int64_t i = 0; i < n_groups * out; i++)
        scales[i] = (float)(i + 1) / 1024;
    put(&m, "d.qweight", "I32", in, 1, codes, (size_t)in * 4);
    put(&m, "d.qzeros", "I32", n_groups, 1, zeros, (size_t)n_groups * 4);
    put(&m, "d.scales", "F32", n_groups, out, scales, (size_t)(n_groups * out) * 4);
    made_open(&m, &files);
    alone_init(&a, &files, "d.weight", out, in, &q);
    float *whole = values_of(&a, (struct range){0, out}, (struct range){0, in}, 2);
    int64_t n_columns = 0;
    for (int t = 0; t < 8; t++) {
        struct layer_shard s;
        struct error err;
        assert_int_equal(layer_shard_init(&s, 64, 8, 128, in, t, 8, &err), 0);
        assert_int_equal(s.columns.start, n_columns);
        assert_int_equal(s.columns.n % 128, 0); // 29 groups, the last shard 28
        float *part = values_of(&a, (struct range){0, out}, s.columns, 1);
        for (int64_t n = 0; n < out; n++)
            assert_memory_equal(part + n * s.columns.n, whole + n * in + s.columns.start,
                                (size_t)s.columns.n * sizeof(float));
        free(part);
        n_columns += s.columns.n;
    }
    assert_int_equal(n_columns, in);
    free(whole);
    free(scales);
    free(zeros);
    free(codes);
    made_release(&m, &files);
}

/* One weight [8, 16] of a file, spoilt: a part that is another, or is not there. */
struct spoilt {
    const char *what, *suffix, *dtype; // dtype NULL: left out
    int64_t a, b;
    const void *data;
    size_t n_bytes;
    const char *expected;
};

struct part {
    const char *suffix, *dtype;
    int64_t a, b;
    const void *data;
    size_t n_bytes;
};

static void check_spoilt(const struct part *parts, int n, const struct spoilt *s,
                         const struct quantization *q)
{
    struct made m = {.header = ""};
    struct safetensors files;
    struct stored_codes c;
    struct error err = {0};
    char name[128];
    for (int i = 0; i < n; i++) {
        int is_spoilt = s && strcmp(parts[i].suffix, s->suffix) == 0;
        snprintf(name, sizeof(name), "x%s", parts[i].suffix);
        if (!is_spoilt)
            put(&m, name, parts[i].dtype, parts[i].a, parts[i].b, parts[i].data, parts[i].n_bytes);
        else if (s->dtype)
            put(&m, name, s->dtype, s->a, s->b, s->data, s->n_bytes);
    }
    made_open(&m, &files);
    int found = stored_codes_find(&c, &files, "x.weight", 8, 16, q, &err);
    assert_int_equal(found, s ? -1 : 1);
    if (s && (!strstr(err.msg, s->expected) || !strstr(err.msg, "x.")))
        fail_msg("%s: \"%s\" lacks \"%s\"", s->what, err.msg, s->expected);
    made_release(&m, &files);
}

static const int32_t bad_order[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2};
static const int32_t negative_order[16] = {-1};

static void wrong_gptq(void **state)
{
    (void)state;
    const struct quantization q = {
        .method = QUANTIZATION_GPTQ, .bits = 4, .group_size = 8, .format = WEIGHT_INT4};
    const struct part parts[] = {
        {".qweight", "I32", 2, 8, NULL, 64},
        {".qzeros", "I32", 2, 1, NULL, 8},
        {".scales", "F16", 2, 8, NULL, 32},
        {".g_idx", "I32", 16, 0, NULL, 64},
    };
    const struct spoilt bad[] = {
        {"shape", ".qweight", "I32", 8, 2, NULL, 64, "[2, 8] is expected, found [8, 2]"},
        {"type", ".qweight", "F32", 2, 8, NULL, 64, "float32 is not a type"},
        {"zeros' shape", ".qzeros", "I32", 1, 2, NULL, 8, "[2, 1] is expected, found [1, 2]"},
        {"no zeros", ".qzeros", NULL, 0, 0, NULL, 0, "has no x.qzeros"},
        {"no scales", ".scales", NULL, 0, 0, NULL, 0, "has no x.scales"},
        {"scales' type", ".scales", "I64", 2, 8, NULL, 128, "int64 is not a type"},
        {"scales' groups", ".scales", "F16", 4, 8, NULL, 64, "[2, 8] is expected"},
        {"order's length", ".g_idx", "I32", 15, 0, NULL, 60, "[16] is expected"},
        {"a group too far", ".g_idx", "I32", 16, 0, bad_order, 64, "column 15 is in group 2"},
        {"no group", ".g_idx", "I32", 16, 0, negative_order, 64, "column 0 is in group -1"},
    };
    check_spoilt(parts, 4, NULL, &q);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        check_spoilt(parts, 4, &bad[i], &q);
}

static void wrong_bitsandbytes(void **state)
{
    (void)state;
    static const char state_name[] = ".weight.quant_state.bitsandbytes__nf4";
#define STATE(text) state_name, "U8", (int64_t)sizeof(text) - 1, 0, text, sizeof(text) - 1
#define GOOD                                                                                       \
    "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float32\", \"shape\": [8, 16], "    \
    "\"nested_blocksize\": 256, \"nested_offset\": 0.5}"
    const struct quantization q = {.method = QUANTIZATION_BITSANDBYTES_4BIT};
    const struct part parts[] = {
        {".weight", "U8", 64, 1, NULL, 64},
        {".weight.absmax", "U8", 2, 0, NULL, 2},
        {".weight.nested_absmax", "F32", 1, 0, NULL, 4},
        {".weight.nested_quant_map", "F32", 256, 0, NULL, 1024},
        {STATE(GOOD)},
    };
    const struct spoilt bad[] = {
        {"shape", ".weight", "U8", 64, 0, NULL, 64, "[64, 1] is expected"},
        {"scales", ".weight.absmax", "U8", 3, 0, NULL, 3, "[2] is expected"},
        {"scales' type", ".weight.absmax", "F32", 2, 0, NULL, 8, "float32 is not a type"},
        {"no nested scales", ".weight.nested_absmax", NULL, 0, 0, NULL, 0, "nested_absmax"},
        {"map", ".weight.nested_quant_map", "F32", 255, 0, NULL, 1020, "[256] is expected"},
        {"no state", state_name, NULL, 0, 0, NULL, 0, "quant_state"},
        {"no JSON", STATE("{\"blocksize\": "), "quant_state"},
        {"other shape", STATE("{\"blocksize\": 64, \"shape\": [16, 8]}"), "its shape"},
        {"no groups", STATE("{\"blocksize\": 0, \"shape\": [8, 16]}"), "blocksize"},
        {"huge groups", STATE("{\"blocksize\": 1e99, \"shape\": [8, 16]}"), "blocksize"},
        {"half nested", STATE("{\"blocksize\": 64, \"shape\": [8, 16], \"nested_offset\": 1}"),
         "nested_blocksize"},
        {"no offset",
         STATE("{\"blocksize\": 64, \"shape\": [8, 16], \"nested_blocksize\": 256, "
               "\"nested_offset\": 1e99}"),
         "nested_offset"},
    };
    check_spoilt(parts, 5, NULL, &q);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        check_spoilt(parts, 5, &bad[i], &q);
    const float map[16] = {1};
    const struct part with_map[] = {parts[0], parts[1],
                                    parts[2], parts[3],
                                    parts[4], {".weight.quant_map", "F32", 16, 0, map, 64}};
    const struct spoilt other = {"other map", ".weight.quant_map",    "F32", 16, 0, map,
                                 sizeof(map), "not the values of nf4"};
    check_spoilt(with_map, 6, &other, &q);
}

static void wrong_compressed(void **state)
{
    (void)state;
    const struct quantization q = {.method = QUANTIZATION_COMPRESSED_TENSORS, .group_size = 8};
    const struct part fp8[] = {{".weight", "F8_E4M3", 8, 16, NULL, 128},
                               {".weight_scale", "BF16", 8, 1, NULL, 16}};
    const struct part packed[] = {{".weight_packed", "I32", 8, 2, NULL, 64},
                                  {".weight_scale", "F16", 8, 2, NULL, 32},
                                  {".weight_zero_point", "I32", 1, 2, NULL, 8},
                                  {".weight_shape", "I64", 2, 0, NULL, 16},
                                  {".weight_g_idx", "I32", 16, 0, NULL, 64}};
    const struct spoilt bad_fp8[] = {
        {"shape", ".weight", "F8_E4M3", 16, 8, NULL, 128, "[8, 16] is expected"},
        {"scales", ".weight_scale", "BF16", 7, 1, NULL, 14, "[8, 1] is expected"},
        {"scales' groups", ".weight_scale", "BF16", 8, 3, NULL, 48, "[8, 2] is expected"},
        {"no scales", ".weight_scale", NULL, 0, 0, NULL, 0, "has no x.weight_scale"},
    };
    const struct spoilt bad_packed[] = {
        {"shape", ".weight_packed", "I32", 8, 3, NULL, 96, "[8, 2] is expected"},
        {"zeros", ".weight_zero_point", "I32", 8, 2, NULL, 64, "[1, 2] is expected"},
        {"zeros' type", ".weight_zero_point", "I8", 1, 2, NULL, 2, "int8 is not a type"},
        {"order", ".weight_g_idx", "I32", 16, 0, bad_order, 64, "column 15 is in group 2"},
        {"shape's shape", ".weight_shape", "I64", 3, 0, NULL, 24, "[2] is expected"},
    };
    check_spoilt(fp8, 2, NULL, &q);
    check_spoilt(packed, 5, NULL, &q);
    for (size_t i = 0; i < sizeof(bad_fp8) / sizeof(bad_fp8[0]); i++)
        check_spoilt(fp8, 2, &bad_fp8[i], &q);
    for (size_t i = 0; i < sizeof(bad_packed) / sizeof(bad_packed[0]); i++)
        check_spoilt(packed, 5, &bad_packed[i], &q);
}

/* E4M3 in blocks: two rows and eight columns share a scale. */
static void fp8_in_blocks(void **state)
{
    (void)state;
    struct quantization q = {
        .method = QUANTIZATION_STORED_FP8, .group_size = 8, .group_rows = 3, .format = WEIGHT_FP8};
    struct made m = {.header = ""};
    struct safetensors files;
    struct alone a;
    uint8_t codes[8 * 16];
    const float scales[3 * 2] = {1, 2, 4, 8, 16, 32};
    memset(codes, 0x38, sizeof(codes)); // 1
    put(&m, "x.weight", "F8_E4M3", 8, 16, codes, sizeof(codes));
    put(&m, "x.weight_scale_inv", "F32", 3, 2, scales, sizeof(scales));
    made_open(&m, &files);
    alone_init(&a, &files, "x.weight", 8, 16, &q);
    float *values = values_of(&a, (struct range){0, 8}, (struct range){3, 13}, 1);
    for (int n = 0; n < 8; n++)
        for (int k = 0; k < 13; k++)
            assert_true(values[n * 13 + k] == scales[n / 3 * 2 + (k + 3) / 8]);
    free(values);
    made_release(&m, &files);
}

/* Reads x.weight [8, 16] in a child; returns its exit status. */
static int status_of_reading(struct made *m, const struct quantization *q)
{
    struct safetensors files;
    struct alone a;
    int status = 0;
    made_open(m, &files);
    alone_init(&a, &files, "x.weight", 8, 16, q);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        fclose(stderr);
        free(values_of(&a, (struct range){0, 8}, (struct range){0, 16}, 1));
        _exit(0);
    }
    waitpid(child, &status, 0);
    made_release(m, &files);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void numbers_that_are_none(void **state)
{
    (void)state;
    const struct quantization q = {.method = QUANTIZATION_COMPRESSED_TENSORS};
    struct made m = {.header = ""};
    uint8_t codes[8 * 16] = {0};
    float scales[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    for (int i = 0; i < 3; i++) {
        codes[77] = i == 1 ? 0xff : 0x7e; // not a number; 448
        const uint32_t infinity = 0x7f800000;
        memcpy(&scales[5], i == 2 ? (const void *)&infinity : &scales[4], 4);
        put(&m, "x.weight", "F8_E4M3", 8, 16, codes, sizeof(codes));
        put(&m, "x.weight_scale", "F32", 8, 1, scales, sizeof(scales));
        assert_int_equal(status_of_reading(&m, &q), i ? 1 : 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(recorded_values),      cmocka_unit_test(groups_that_eight_do_not_divide),
        cmocka_unit_test(wrong_gptq),           cmocka_unit_test(wrong_bitsandbytes),
        cmocka_unit_test(wrong_compressed),     cmocka_unit_test(fp8_in_blocks),
        cmocka_unit_test(numbers_that_are_none)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
