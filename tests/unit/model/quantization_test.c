/*
 * Quantisation at load: which weights, bitsandbytes' own values, the same values for every cut, and
 * a plan that is what the weights take.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/language.h"
#include "daemon/model/plan.h"
#include "daemon/model/vision.h"
#include "daemon/model/weight_codes.h"
#include "kernels/log.h"
#include "tests/unit/model/model_files.h"

enum { N_METHODS = 6 };
static const char *const methods[N_METHODS] = {
    "none", "int8", "int4", "fp8", "bitsandbytes-fp4", "bitsandbytes-nf4"};

static void formats_by_kind(void **state)
{
    (void)state;
    static const enum weight_format expected[][4] = {
        /* language, vision, lm_head, embedding */
        {WEIGHT_FLOAT, WEIGHT_FLOAT, WEIGHT_FLOAT, WEIGHT_FLOAT},
        {WEIGHT_INT8, WEIGHT_INT8, WEIGHT_INT8, WEIGHT_INT8},
        {WEIGHT_INT4, WEIGHT_INT8, WEIGHT_INT8, WEIGHT_INT8},
        {WEIGHT_FP8, WEIGHT_FP8, WEIGHT_FLOAT, WEIGHT_FLOAT},
        {WEIGHT_FP4, WEIGHT_FP4, WEIGHT_FLOAT, WEIGHT_FLOAT},
        {WEIGHT_NF4, WEIGHT_NF4, WEIGHT_FLOAT, WEIGHT_FLOAT},
    };
    struct quantization q = {0};
    struct error err;
    int64_t group;
    for (int i = 0; i < N_METHODS; i++) {
        assert_int_equal(quantization_parse(&q, methods[i], 32, &err), 0);
        for (int kind = 0; kind < 4; kind++)
            assert_int_equal(quantization_format(
                                 &q, (enum weight_kind)(KIND_LANGUAGE_LINEAR + kind), 96, &group),
                             expected[i][kind]);
        assert_int_equal(quantization_format(&q, KIND_OTHER, 96, &group), WEIGHT_FLOAT);
    }
    assert_int_equal(quantization_format(&q, KIND_LANGUAGE_LINEAR, 96, &group), WEIGHT_NF4);
    assert_int_equal(group, 32); // groups of 64 over rows of 96: every 32 columns lie in one
    assert_int_equal(quantization_parse(&q, "int3", 32, &err), -1);
    assert_non_null(strstr(err.msg, "int3"));
    assert_int_equal(quantization_parse(&q, "int4", 48, &err), -1);
    assert_non_null(strstr(err.msg, "32, 64 or 128"));
}

/* Activations follow FP8 weights of one scale a row, and no others. */
static void activations_follow_fp8(void **state)
{
    (void)state;
    struct quantization q = {.method = QUANTIZATION_COMPRESSED_TENSORS, .format = WEIGHT_FP8};
    struct error err;
    char text[QUANTIZATION_BYTES];
    assert_int_equal(quantization_parse_activations(&q, "none", &err), 0);
    assert_int_equal(q.x_format, WEIGHT_FLOAT);
    assert_int_equal(quantization_parse_activations(&q, "fp8", &err), 0);
    assert_int_equal(q.x_format, WEIGHT_FP8);
    assert_string_equal(quantization_describe(&q, text, sizeof(text)),
                        "compressed-tensors, fp8, activations too");
    assert_int_equal(quantization_parse_activations(
                         &(struct quantization){.method = QUANTIZATION_FP8}, "fp8", &err),
                     0);
    const struct quantization others[] = {
        {.method = QUANTIZATION_NONE},
        {.method = QUANTIZATION_INT8},
        {.method = QUANTIZATION_COMPRESSED_TENSORS, .format = WEIGHT_INT8},
        {.method = QUANTIZATION_STORED_FP8,
         .format = WEIGHT_FP8,
         .group_size = 128,
         .group_rows = 128},
    };
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
        q = others[i];
        assert_int_equal(quantization_parse_activations(&q, "fp8", &err), -1);
        assert_non_null(strstr(err.msg, quantization_describe(&q, text, sizeof(text))));
        assert_int_equal(q.x_format, WEIGHT_FLOAT);
    }
}

/* And in int8 integers whose groups are in order. */
static void activations_follow_integers(void **state)
{
    (void)state;
    const struct quantization integers[] = {
        {.method = QUANTIZATION_INT8},
        {.method = QUANTIZATION_INT4, .group_size = 32},
        {.method = QUANTIZATION_AWQ, .format = WEIGHT_INT4, .group_size = 128, .has_zeros = 1},
        {.method = QUANTIZATION_GPTQ, .format = WEIGHT_INT8, .group_size = 64, .has_zeros = 1},
        {.method = QUANTIZATION_BITSANDBYTES_8BIT, .format = WEIGHT_INT8_127},
        {.method = QUANTIZATION_COMPRESSED_TENSORS, .format = WEIGHT_INT4, .group_size = 128},
    };
    const struct quantization others[] = {
        {.method = QUANTIZATION_NONE},
        {.method = QUANTIZATION_FP8},
        {.method = QUANTIZATION_BITSANDBYTES_NF4},
        {.method = QUANTIZATION_BITSANDBYTES_4BIT, .format = WEIGHT_NF4, .group_size = 64},
        {.method = QUANTIZATION_GPTQ, .format = WEIGHT_INT4, .group_size = 32, .has_order = 1},
    };
    struct quantization q;
    struct error err;
    char text[QUANTIZATION_BYTES];
    for (size_t i = 0; i < sizeof(integers) / sizeof(integers[0]); i++) {
        q = integers[i];
        assert_int_equal(quantization_parse_activations(&q, "int8", &err), 0);
        assert_int_equal(q.x_format, WEIGHT_INT8);
    }
    assert_string_equal(quantization_describe(&q, text, sizeof(text)),
                        "compressed-tensors, int4 (groups of 128), activations too");
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
        q = others[i];
        assert_int_equal(quantization_parse_activations(&q, "int8", &err), -1);
        assert_non_null(strstr(err.msg, "int8 or int4, without desc_act"));
        assert_non_null(strstr(err.msg, quantization_describe(&q, text, sizeof(text))));
        assert_int_equal(q.x_format, WEIGHT_FLOAT);
    }
}

/* `columns` of rows [first, rows) of one recorded weight against bitsandbytes' values. */
static void check_recorded(const struct safetensors *files, const char *name,
                           enum quantization_method method, int64_t first_row, struct range columns)
{
    char full[96];
    snprintf(full, sizeof(full), "%s.weight", name);
    struct weight_source source = {.tensor = safetensors_find(files, full)};
    snprintf(full, sizeof(full), "%s.values", name);
    const struct safetensors_tensor *values = safetensors_find(files, full);
    assert_non_null(source.tensor);
    assert_non_null(values);
    struct weight_spec spec = {.n_dims = 2, .shape = {values->shape[0], values->shape[1]}};
    struct quantization method_only = {.method = method};
    spec.format =
        quantization_format(&method_only, KIND_LANGUAGE_LINEAR, spec.shape[1], &spec.group_size);
    struct weights w = {.list = {.specs = &spec, .n = 1}, .sources = &source};
    struct range rows = {first_row, spec.shape[0] - first_row};
    if (columns.n == 0)
        columns.n = spec.shape[1] - columns.start;
    uint8_t *codes = xcalloc((size_t)(rows.n * columns.n), 1);
    struct quantized q = {0};
    weight_codes_init(&q, &w, &spec, rows.n, columns, codes);
    struct backend *b = backend_cpu_open(3, "scalar");
    weight_codes_read(&q, 0, &w, &spec, &spec, rows, columns, DTYPE_F32, b);
    backend_close(b);
    for (int64_t n = 0; n < rows.n; n++)
        for (int64_t k = 0; k < columns.n; k++) {
            int64_t at = (rows.start + n) * spec.shape[1] + columns.start + k;
            float want, got = quantized_value(&q, n, k);
            memcpy(&want, values->data + (size_t)at * sizeof(want), sizeof(want));
            if (got != want)
                fail_msg("%s [%d, %d]: %.9g, bitsandbytes has %.9g", name, (int)(rows.start + n),
                         (int)(columns.start + k), (double)got, (double)want);
        }
    weight_codes_release(&q);
    free(codes);
}

static void bitsandbytes_values(void **state)
{
    (void)state;
    static const char *const shapes[] = {"even", "across_rows", "odd_rest"};
    struct safetensors files;
    struct error err;
    if (safetensors_open(&files,
                         INTERNVLD_SOURCE_DIR "/tests/data/quantized/bitsandbytes.safetensors",
                         &err) != 0)
        fail_msg("%s", err.msg);
    for (int i = 0; i < 6; i++) {
        char name[48];
        int is_fp4 = i >= 3;
        enum quantization_method m =
            is_fp4 ? QUANTIZATION_BITSANDBYTES_FP4 : QUANTIZATION_BITSANDBYTES_NF4;
        snprintf(name, sizeof(name), "%s.%s", is_fp4 ? "fp4" : "nf4", shapes[i % 3]);
        check_recorded(&files, name, m, 0, (struct range){0, 0});
        check_recorded(&files, name, m, 2, (struct range){0, 33}); // a shard's rows and columns
        check_recorded(&files, name, m, 1, (struct range){37, 0});
    }
    safetensors_release(&files);
}

/* Of a checkpoint with an lm_head and of one whose embedding serves as it. */
static void of_both(void (*check)(const char *dir, const struct model_config *config))
{
    struct checkpoint_options tied = {.leave_out = "language_model.lm_head.weight"};
    char dir[4096];
    struct model_config c;
    tiny_config_parse(&c);
    make_directory(dir, sizeof(dir));
    write_checkpoint(dir, &c, &(struct checkpoint_options){0});
    check(dir, &c);
    c.tie_word_embeddings = 1;
    write_checkpoint(dir, &c, &tied);
    check(dir, &c);
    remove_directory(dir);
}

/* The language model and vision tower take what the plan says, up to blocks of sixteen rows. */
static void check_plan(const char *dir, const struct model_config *config)
{
    static const float mean[3] = {0, 0, 0}, std[3] = {1, 1, 1};
    struct error err;
    struct model_config c = *config;
    for (int i = 0; i < N_METHODS; i++) {
        struct plan plan;
        struct weights w;
        struct vision_model vision;
        struct language_model language;
        struct backend *b = backend_cpu_open(2, NULL);
        struct plan_settings s = {.layout = {1, 1, 1}, .dtype = DTYPE_F32, .page_size = 16};
        s.kv_budget_bytes = 1 << 20;
        s.max_model_len = 64;
        s.max_num_seqs = s.max_vision_tiles = 4;
        s.max_num_batched_tokens = 32;
        struct language_limits limits = {32, 4, 64, 16, 8, DTYPE_F32};
        assert_int_equal(quantization_parse(&c.quantization, methods[i], 32, &err), 0);
        assert_int_equal(plan_make(&plan, &c, &s, &err), 0);
        assert_int_equal(weights_open(&w, dir, &c, 0, &err), 0);
        vision_init(&vision, &c, &w, b, DTYPE_F32, 2, mean, std);
        language_init(&language, &c, &w, b, DTYPE_F32, &plan.ranks[2].topology, NULL, &limits);
        uint64_t planned[2] = {plan.ranks[1].weight_bytes, plan.ranks[2].weight_bytes};
        printf("  %-18s vision %llu bytes, planned %llu; language%s %llu, planned %llu\n",
               methods[i], (unsigned long long)vision.weight_bytes, (unsigned long long)planned[0],
               c.tie_word_embeddings ? ", tied" : "", (unsigned long long)language.weight_bytes,
               (unsigned long long)planned[1]);
        assert_in_range(vision.weight_bytes, planned[0], planned[0] * 5 / 4);
        assert_in_range(language.weight_bytes, planned[1], planned[1] * 5 / 4);
        language_release(&language);
        vision_release(&vision);
        weights_release(&w);
        backend_close(b);
        plan_release(&plan);
    }
}

static void plan_is_what_is_taken(void **state)
{
    (void)state;
    of_both(check_plan);
}

/* --activation-quantization int8: of all products but the convolution's. Rows of an embedding that
 * is no lm_head are looked up. */
static void check_rounded(const char *dir, const struct model_config *config)
{
    static const float mean[3] = {0, 0, 0}, std[3] = {1, 1, 1};
    struct error err;
    struct weights w;
    struct vision_model vision;
    struct language_model language;
    struct topology t;
    struct model_config c = *config;
    struct language_limits limits = {32, 4, 64, 16, 8, DTYPE_BF16};
    struct backend *b = backend_cpu_open(2, NULL);
    c.quantization = (struct quantization){
        .method = QUANTIZATION_INT4, .group_size = 32, .x_format = WEIGHT_INT8};
    assert_int_equal(topology_init(&t, 2, 3, &(struct layout){1, 1, 1}, &err), 0);
    assert_int_equal(weights_open(&w, dir, &c, 0, &err), 0);
    vision_init(&vision, &c, &w, b, DTYPE_BF16, 2, mean, std);
    assert_int_equal(vision.patch.x_format, WEIGHT_FLOAT);
    assert_int_equal(w.n_products - w.n_x_rounded, 1);
    language_init(&language, &c, &w, b, DTYPE_BF16, &t, NULL, &limits);
    assert_int_equal(w.n_products - w.n_x_rounded, 1);
    assert_int_equal(language.lm_head.x_format, WEIGHT_INT8);
    assert_int_equal(language.embedding_codes.x_format,
                     c.tie_word_embeddings ? WEIGHT_INT8 : WEIGHT_FLOAT);
    language_release(&language);
    vision_release(&vision);
    weights_release(&w);
    backend_close(b);
}

static void products_that_round(void **state)
{
    (void)state;
    of_both(check_rounded);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(formats_by_kind),
                                       cmocka_unit_test(activations_follow_fp8),
                                       cmocka_unit_test(activations_follow_integers),
                                       cmocka_unit_test(bitsandbytes_values),
                                       cmocka_unit_test(plan_is_what_is_taken),
                                       cmocka_unit_test(products_that_round)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
