/*
 * quantization_config of every method, wherever it stands; what is refused, by name.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/model/model_files.h"

#define AWQ "\"quant_method\": \"awq\""
#define GPTQ "\"quant_method\": \"gptq\""
#define CT "\"quant_method\": \"compressed-tensors\", "
#define GROUP(weights) CT "\"config_groups\": {\"group_0\": {\"weights\": {" weights "}}}"

/* `object` as the quantization_config of tiny_config. */
static int parse(struct model_config *c, const char *object, struct error *err)
{
    char to[1024];
    snprintf(to, sizeof(to), "\"quantization_config\": {%s}, \"architectures\"", object);
    char *text = config_with("\"architectures\"", to);
    int rc = model_config_parse(c, text, strlen(text), NULL, 0, err);
    free(text);
    return rc;
}

static const struct {
    const char *object;
    struct quantization expected;
    const char *described;
} good[] = {
    {AWQ ", \"bits\": 4, \"group_size\": 64, \"zero_point\": true, \"version\": \"gemm\"",
     {.method = QUANTIZATION_AWQ,
      .bits = 4,
      .group_size = 64,
      .format = WEIGHT_INT4,
      .has_zeros = 1},
     "awq, int4 (groups of 64)"},
    {AWQ ", \"w_bit\": 4, \"q_group_size\": -1, \"version\": \"GEMM\"",
     {.method = QUANTIZATION_AWQ, .bits = 4, .format = WEIGHT_INT4, .has_zeros = 1},
     "awq, int4"},
    {GPTQ ", \"bits\": 8, \"group_size\": 128, \"desc_act\": true, \"sym\": true, "
          "\"dynamic\": {\"-:.*vision.*\": {}}",
     {.method = QUANTIZATION_GPTQ,
      .bits = 8,
      .group_size = 128,
      .format = WEIGHT_INT8,
      .has_zeros = 1,
      .has_order = 1,
      .zeros_less_one = 1},
     "gptq, int8 (groups of 128)"},
    {GPTQ ", \"bits\": 4, \"checkpoint_format\": \"gptq_v2\", \"dynamic\": null",
     {.method = QUANTIZATION_GPTQ,
      .bits = 4,
      .group_size = 128,
      .format = WEIGHT_INT4,
      .has_zeros = 1},
     "gptq, int4 (groups of 128)"},
    {"\"quant_method\": \"bitsandbytes\", \"load_in_4bit\": true, \"load_in_8bit\": false, "
     "\"bnb_4bit_quant_type\": \"nf4\", \"llm_int8_skip_modules\": [\"lm_head\"]",
     {.method = QUANTIZATION_BITSANDBYTES_4BIT,
      .bits = 4,
      .group_size = 64,
      .format = WEIGHT_NF4,
      .with_vision = 1},
     "bitsandbytes, nf4 (groups of 64)"},
    {"\"load_in_8bit\": true, \"llm_int8_skip_modules\": [\"vision_tower\"]",
     {.method = QUANTIZATION_BITSANDBYTES_8BIT, .bits = 8, .format = WEIGHT_INT8_127},
     "bitsandbytes, int8"},
    {GROUP("\"num_bits\": 8, \"type\": \"float\", \"strategy\": \"channel\", "
           "\"group_size\": null, \"actorder\": null") ", \"format\": \"float-quantized\", "
                                                       "\"ignore\": [\"re:.*mlp1.*\", "
                                                       "\"re:.*vision.*\"], "
                                                       "\"sparsity_config\": {}, "
                                                       "\"transform_config\": {}, "
                                                       "\"kv_cache_scheme\": null",
     {.method = QUANTIZATION_COMPRESSED_TENSORS, .bits = 8, .format = WEIGHT_FP8},
     "compressed-tensors, fp8"},
    {GROUP("\"num_bits\": 4, \"type\": \"int\", \"strategy\": \"group\", \"group_size\": 32, "
           "\"symmetric\": false, \"actorder\": \"group\"") ", \"format\": \"pack-quantized\", "
                                                            "\"sparsity_config\": {\"format\": "
                                                            "\"dense\"}",
     {.method = QUANTIZATION_COMPRESSED_TENSORS,
      .bits = 4,
      .group_size = 32,
      .format = WEIGHT_INT4,
      .has_zeros = 1,
      .has_order = 1,
      .with_vision = 1},
     "compressed-tensors, int4 (groups of 32)"},
    {"\"quant_method\": \"fp8\", \"weight_block_size\": [128, 64], "
     "\"activation_scheme\": \"dynamic\", \"modules_to_not_convert\": [\"visual\"]",
     {.method = QUANTIZATION_STORED_FP8,
      .bits = 8,
      .group_size = 64,
      .group_rows = 128,
      .format = WEIGHT_FP8},
     "fp8, fp8 (groups of 64)"},
};

static void reads(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        struct model_config c;
        struct error err = {0};
        char name[64];
        if (parse(&c, good[i].object, &err) != 0)
            fail_msg("%s: %s", good[i].object, err.msg);
        const struct quantization *q = &c.quantization, *e = &good[i].expected;
        if (q->method != e->method || q->bits != e->bits || q->group_size != e->group_size ||
            q->group_rows != e->group_rows || q->format != e->format ||
            q->has_zeros != e->has_zeros || q->has_order != e->has_order ||
            q->zeros_less_one != e->zeros_less_one || q->with_vision != e->with_vision)
            fail_msg("%s was read otherwise", good[i].object);
        assert_string_equal(quantization_describe(q, name, sizeof(name)), good[i].described);
        assert_int_equal(quantization_is_stored(q), 1);
    }
}

static void wherever_it_stands(void **state)
{
    (void)state;
    static const char *const places[][2] = {
        {"\"architectures\"", "\"compression_config\": {" AWQ "}, \"architectures\""},
        {"\"hidden_size\": 32", "\"hidden_size\": 32, \"quantization_config\": {" AWQ "}"},
        {"\"hidden_size\": 32", "\"hidden_size\": 32, \"compression_config\": {" AWQ "}"},
        {"\"architectures\"", "\"llm_config\": {\"quantization_config\": {" AWQ
                              "}}, \"quantization_config\": null, \"architectures\""},
    };
    struct model_config c;
    struct error err = {0};
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        char *text = config_with(places[i][0], places[i][1]);
        if (model_config_parse(&c, text, strlen(text), NULL, 0, &err) != 0)
            fail_msg("%s: %s", places[i][1], err.msg);
        assert_int_equal(c.quantization.method, QUANTIZATION_AWQ);
        free(text);
    }
    char *bad = config_with("\"hidden_size\": 32",
                            "\"hidden_size\": 32, \"quantization_config\": {" AWQ ", \"bits\": 3}");
    assert_int_equal(model_config_parse(&c, bad, strlen(bad), NULL, 0, &err), -1);
    assert_non_null(strstr(err.msg, "config.json: text_config.quantization_config.bits: found 3"));
    free(bad);
    tiny_config_parse(&c);
    assert_int_equal(quantization_is_stored(&c.quantization), 0);
}

static void with_an_option(void **state)
{
    (void)state;
    struct model_config c;
    struct error err = {0};
    assert_int_equal(parse(&c, GPTQ ", \"bits\": 4", &err), 0);
    assert_int_equal(quantization_parse(&c.quantization, "none", 128, &err), 0);
    assert_int_equal(c.quantization.method, QUANTIZATION_GPTQ);
    assert_int_equal(quantization_parse(&c.quantization, "int4", 128, &err), -1);
    assert_non_null(strstr(err.msg, "--quantization int4"));
    assert_non_null(strstr(err.msg, "gptq"));
}

static const struct {
    const char *object, *expected;
} refusals[] = {
    {"", "quant_method: found \"(none)\"; supported: compressed-tensors, awq, gptq"},
    {"\"quant_method\": \"hqq\"", "quant_method: found \"hqq\""},
    {AWQ ", \"version\": \"marlin\"", "version: found \"marlin\""},
    {AWQ ", \"version\": \"gemv\"", "version: found \"gemv\""},
    {AWQ ", \"bits\": 3", "bits: found 3; supported: 4"},
    {AWQ ", \"bits\": 8", "bits: found 8; supported: 4"},
    {AWQ ", \"zero_point\": false", "zero_point: false"},
    {AWQ ", \"group_size\": 0", "group_size: found 0"},
    {AWQ ", \"group_size\": \"128\"", "group_size: found \"128\""},
    {GPTQ ", \"bits\": 3", "bits: found 3; supported: 4, 8"},
    {GPTQ ", \"bits\": 4, \"checkpoint_format\": \"marlin\"",
     "checkpoint_format: found \"marlin\""},
    {GPTQ ", \"bits\": 4, \"is_marlin_format\": true", "is_marlin_format"},
    {GPTQ ", \"bits\": 4, \"dynamic\": {\"+:.*mlp.*\": {\"bits\": 8}}", "dynamic: rule +:.*mlp.*"},
    {"\"quant_method\": \"bitsandbytes\"", "load_in_4bit, load_in_8bit"},
    {"\"load_in_4bit\": true, \"load_in_8bit\": true", "load_in_4bit, load_in_8bit"},
    {"\"load_in_4bit\": true, \"bnb_4bit_quant_type\": \"nf3\"", "bnb_4bit_quant_type"},
    {CT "\"config_groups\": {}", "no group has weights"},
    {GROUP("\"num_bits\": 4, \"type\": \"float\""), "floats of 4 bits"},
    {GROUP("\"num_bits\": 2, \"type\": \"int\""), "num_bits: found 2"},
    {GROUP("\"num_bits\": 8, \"strategy\": \"tensor_group\""), "strategy: found"},
    {GROUP("\"num_bits\": 4, \"strategy\": \"group\""), "group_size: missing"},
    {GROUP("\"num_bits\": 8, \"strategy\": \"block\", \"block_structure\": [128]"),
     "block_structure: found [128]"},
    {GROUP("\"num_bits\": 4") ", \"format\": \"marlin-24\"", "format: found \"marlin-24\""},
    {GROUP("\"num_bits\": 4") ", \"format\": \"nvfp4-pack-quantized\"", "format: found"},
    {GROUP("\"num_bits\": 8") ", \"sparsity_config\": {\"format\": \"sparse-24-bitmask\"}",
     "format: found \"sparse-24-bitmask\""},
    {GROUP("\"num_bits\": 8") ", \"transform_config\": {\"config_groups\": {\"u\": {}}}",
     "transform_config"},
    {"\"quant_method\": \"fp8\", \"weight_block_size\": [128, 0]", "weight_block_size: found"},
    {"\"quant_method\": \"fp8\", \"fmt\": \"e5m2\"", "fmt: found \"e5m2\""},
};

static void refuses(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
        struct model_config c;
        struct error err = {0};
        int rc = parse(&c, refusals[i].object, &err);
        if (rc == 0 || !strstr(err.msg, refusals[i].expected) ||
            !strstr(err.msg, "config.json: quantization_config."))
            fail_msg("%s: rc %d, message \"%s\" lacks \"%s\"", refusals[i].object, rc, err.msg,
                     refusals[i].expected);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(reads),
                                       cmocka_unit_test(wherever_it_stands),
                                       cmocka_unit_test(with_an_option), cmocka_unit_test(refuses)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
