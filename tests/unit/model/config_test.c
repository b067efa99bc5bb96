/*
 * config.json: what is read, what is refused and in which words.
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

static void reads_every_field(void **state)
{
    (void)state;
    struct model_config c;
    tiny_config_parse(&c);
    assert_int_equal(c.text.architecture, TEXT_QWEN2);
    assert_int_equal(c.text.head_dim, 4);
    assert_int_equal(c.text.attention_bias, 1);
    assert_int_equal(c.text.output_bias, 0);
    assert_int_equal(c.vision.n_patches, 16);
    assert_int_equal(c.vision.head_dim, 8);
    assert_int_equal(c.vision.use_qk_norm, 1);
    assert_int_equal(c.vision.norm_type, NORM_LAYER_NORM);
    assert_int_equal(c.vision.use_mean_pooling, 1);
    assert_int_equal(c.feature_layer, VISION_FEATURE_LAST);
    assert_int_equal(c.n_features_per_tile, 4);
    assert_int_equal(c.downsample_k, 2);
    assert_int_equal(c.image_token_id, 40);
    assert_int_equal(c.n_eos, 1);
    assert_int_equal(c.eos_token_ids[0], 2);
    assert_int_equal(c.bos_token_id, 1);
    assert_int_equal(c.pad_token_id, -1);
    assert_int_equal(c.stored_dtype, DTYPE_F32);
    assert_int_equal(c.do_sample, 0);
    assert_true(c.text.rope.theta == 1e6f);
}

static void parse_changed(struct model_config *c, const char *from, const char *to)
{
    struct error err = {0};
    char *text = config_with(from, to);
    if (model_config_parse(c, text, strlen(text), NULL, 0, &err) != 0)
        fail_msg("%s", err.msg);
    free(text);
}

static void old_and_new_spellings(void **state)
{
    (void)state;
    struct model_config c;
    parse_changed(&c, "\"dtype\": \"float32\"", "\"torch_dtype\": \"bfloat16\"");
    assert_int_equal(c.stored_dtype, DTYPE_BF16);
    parse_changed(
        &c, "\"rope_parameters\": {\"rope_theta\": 1000000.0, \"rope_type\": \"default\"}",
        "\"rope_theta\": 5000.0, \"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2.0}");
    assert_int_equal(c.text.rope.type, ROPE_DYNAMIC);
    assert_true(c.text.rope.theta == 5000 && c.text.rope.factor == 2);
    assert_int_equal(c.text.rope.original_max_positions, 256);
    parse_changed(&c, "[56, 56]", "56");
    assert_int_equal(c.vision.image_width, 56);
    parse_changed(&c, "\"tie_word_embeddings\": false,", "");
    assert_int_equal(c.tie_word_embeddings, 1); // the top-level default
    parse_changed(&c, "\"vision_feature_layer\": -1", "\"vision_feature_layer\": -2");
    assert_int_equal(c.feature_layer, 0);
    parse_changed(&c, "\"vision_feature_layer\": -1", "\"vision_feature_layer\": 1");
    assert_int_equal(c.feature_layer, 1);
}

static void other_architectures(void **state)
{
    (void)state;
    struct model_config c;
    parse_changed(&c, "\"qwen2\"", "\"qwen3\", \"head_dim\": 10");
    assert_int_equal(c.text.architecture, TEXT_QWEN3);
    assert_int_equal(c.text.head_dim, 10);
    assert_int_equal(c.text.use_qk_norm, 1);
    assert_int_equal(c.text.attention_bias, 0);
    parse_changed(&c, "\"qwen2\"", "\"llama\", \"attention_bias\": true, \"mlp_bias\": true");
    assert_int_equal(c.text.output_bias, 1);
    assert_int_equal(c.text.mlp_bias, 1);
    assert_int_equal(c.text.head_dim, 4);
    parse_changed(&c, "\"qwen2\"",
                  "\"qwen3_moe\", \"num_local_experts\": 6, \"num_experts_per_tok\": 2, "
                  "\"moe_intermediate_size\": 16, \"mlp_only_layers\": [1]");
    assert_int_equal(c.text.n_experts, 6);
    assert_int_equal(text_config_layer_kind(&c.text, 0), LAYER_MOE);
    assert_int_equal(text_config_layer_kind(&c.text, 1), LAYER_DENSE);
}

static void windows(void **state)
{
    (void)state;
    struct model_config c;
    parse_changed(&c, "\"qwen2\"",
                  "\"qwen2\", \"sliding_window\": 8, \"use_sliding_window\": false");
    assert_int_equal(c.text.sliding_window, 0);
    parse_changed(&c, "\"qwen2\"",
                  "\"qwen2\", \"sliding_window\": 8, \"use_sliding_window\": true, "
                  "\"max_window_layers\": 1, \"layer_types\": [\"full_attention\", "
                  "\"sliding_attention\"]");
    assert_int_equal(c.text.sliding_window, 8);
    assert_int_equal(c.text.first_window_layer, 1);
}

/* Each change is refused, by a sentence that has `expected` in it. */
static const struct {
    const char *from, *to, *expected;
} refusals[] = {
    {"\"model_type\": \"internvl\"", "\"model_type\": \"llava\"", "supported: internvl"},
    {"InternVLForConditionalGeneration", "LlavaModel", "supported: InternVLForConditional"},
    {"\"qwen2\"", "\"gpt_oss\"", "supported: qwen2, qwen3, qwen3_moe, llama"},
    {"\"qwen2\"", "\"internlm2\"", "supported: qwen2, qwen3, qwen3_moe, llama"},
    {"\"qwen2\"", "\"internlm3\"", "supported: qwen2, qwen3, qwen3_moe, llama"},
    {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 0", "text_config.num_hidden_layers"},
    {"\"num_hidden_layers\": 1,", "\"num_hidden_layers\": 0,", "vision_config.num_hidden_layers"},
    {"\"num_attention_heads\": 8", "\"num_attention_heads\": 0", "text_config.num_attention_heads"},
    {"\"num_attention_heads\": 2,", "\"num_attention_heads\": 3,", "num_attention_heads 3"},
    {"\"num_key_value_heads\": 4", "\"num_key_value_heads\": 0", "an integer from 1"},
    {"\"vocab_size\": 45", "\"vocab_size\": 0", "vocab_size: found 0"},
    {"\"vocab_size\": 45", "\"vocab_size\": 40", "image_token_id: found 40"},
    {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": -1e-06", "rms_norm_eps: found -1e-06"},
    {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": \"1e-06\"", "a number from 0"},
    {"\"max_position_embeddings\": 256", "\"max_position_embeddings\": 0", "an integer from 1"},
    {"\"qwen2\"", "\"qwen3\", \"head_dim\": 7", "an even number"},
    {"\"norm_type\"", "\"layer_norm_eps\": -1e-06, \"norm_type\"", "layer_norm_eps: found -1e-06"},
    {"\"norm_type\"", "\"layer_scale_init_value\": \"0.1\", \"norm_type\"",
     "layer_scale_init_value"},
    {"\"norm_type\"", "\"use_mask_token\": 1, \"norm_type\"", "true or false"},
    {"[14, 14]", "0", "patch_size"},
    {"[14, 14]", "-14", "patch_size"},
    {"[14, 14]", "[14, 0]", "patch_size"},
    {"[14, 14]", "[14]", "patch_size"},
    {"[14, 14]", "\"14\"", "patch_size"},
    {"[14, 14]", "[57, 57]", "smaller than one patch"},
    {"\"num_channels\": 3", "\"num_channels\": 0", "num_channels: found 0"},
    {"\"num_channels\": 3", "\"num_channels\": 5", "an integer from 1 to 4"},
    {"\"internvl_vision\"", "\"clip\"", "vision_config.model_type"},
    {"\"layer_norm\"", "\"group_norm\"", "layer_norm, rms_norm"},
    {"\"gelu\"", "\"mish\"", "gelu, gelu_new"},
    {"\"dtype\": \"float32\"", "\"dtype\": \"float64\"", "float32, bfloat16, float16"},
    {"\"hidden_size\": 32", "\"hidden_size\": 30", "not a multiple of num_attention_heads"},
    {"\"hidden_size\": 32", "\"hidden_size\": \"32\"", "an integer from"},
    {"\"hidden_size\": 32", "\"hidden_size\": 1e30", "an integer from"},
    {"\"hidden_size\": 32,", "", "hidden_size: missing"},
    {"\"num_key_value_heads\": 4", "\"num_key_value_heads\": 3", "not a multiple"},
    {"\"downsample_ratio\": 0.5", "\"downsample_ratio\": 0.7", "one over a whole number"},
    {"\"downsample_ratio\": 0.5", "\"downsample_ratio\": 0", "a number from"},
    {"[56, 56]", "[70, 70]", "not a square whose side"},
    {"[56, 56]", "[56, 56, 56]", "[height, width] pair"},
    {"\"image_seq_length\": 4", "\"image_seq_length\": 256", "becomes 4 tokens"},
    {"\"vision_feature_layer\": -1", "\"vision_feature_layer\": 0", "not 0"},
    {"\"vision_feature_layer\": -1", "\"vision_feature_layer\": [-1]", "one number"},
    {"\"vision_feature_layer\": -1", "\"vision_feature_layer\": -3", "one number from -2 to 1"},
    {"\"default\",", "\"cls\",", "default, full"},
    {"\"rope_type\": \"default\"", "\"rope_type\": \"llama3\"", "default, dynamic, linear, yarn"},
    {"\"rope_type\": \"default\"", "\"rope_type\": \"linear\"", "factor: missing"},
    {"\"architectures\"", "\"quantization_config\": {}, \"architectures\"", "quant_method"},
    {"\"vision_config\"", "\"vision\"", "vision_config: missing"},
    {"\"eos_token_id\": 2", "\"eos_token_id\": 45", "below vocab_size 45"},
    {"\"eos_token_id\": 2", "\"eos_token_id\": [1,2,3,4,5,6,7,8,9]", "up to 8 ids"},
    {"\"image_token_id\": 40", "\"image_token_id\": -1", "an integer from"},
    {"\"qwen2\"", "\"qwen2\", \"layer_types\": [\"sliding_attention\", \"full_attention\"]",
     "after sliding attention"},
    {"\"qwen2\"", "\"qwen2\", \"layer_types\": [\"full_attention\"]", "1 entries for 2 layers"},
};

static void refuses(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
        struct model_config c;
        struct error err = {0};
        char *text = config_with(refusals[i].from, refusals[i].to);
        int rc = model_config_parse(&c, text, strlen(text), NULL, 0, &err);
        if (rc == 0 || !strstr(err.msg, refusals[i].expected) || !strstr(err.msg, "config.json"))
            fail_msg("%s: rc %d, message \"%s\" lacks \"%s\"", refusals[i].to, rc, err.msg,
                     refusals[i].expected);
        assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
        free(text);
    }
}

static void every_truncation_is_refused(void **state)
{
    (void)state;
    for (size_t n = 0; n < strlen(tiny_config); n++) {
        struct model_config c;
        struct error err;
        char *text = malloc(n + 1); // exact size, so that a sanitiser sees an overrun
        memcpy(text, tiny_config, n);
        assert_int_equal(model_config_parse(&c, text, n, NULL, 0, &err), -1);
        free(text);
    }
}

static void deep_nesting_is_refused(void **state)
{
    (void)state;
    struct model_config c;
    struct error err;
    static char text[100000];
    memset(text, '[', sizeof(text));
    assert_int_equal(model_config_parse(&c, text, sizeof(text), NULL, 0, &err), -1);
    assert_non_null(strstr(err.msg, "deep"));
}

static void generation_config(void **state)
{
    (void)state;
    static const char gen[] =
        "{\"eos_token_id\": [2, 3], \"do_sample\": true, \"temperature\": 0.7, "
        "\"top_k\": 20, \"top_p\": 0.8, \"max_new_tokens\": 64, "
        "\"repetition_penalty\": 1.05, \"pad_token_id\": 0}";
    struct model_config c;
    struct error err;
    assert_int_equal(
        model_config_parse(&c, tiny_config, strlen(tiny_config), gen, strlen(gen), &err), 0);
    assert_int_equal(c.n_eos, 2);
    assert_int_equal(c.eos_token_ids[1], 3);
    assert_int_equal(c.do_sample, 1);
    assert_int_equal(c.top_k, 20);
    assert_int_equal(c.max_new_tokens, 64);
    assert_int_equal(c.pad_token_id, 0);
    assert_true(c.temperature == 0.7f && c.top_p == 0.8f);
    static const char bad[] = "{\"top_p\": 3}";
    assert_int_equal(
        model_config_parse(&c, tiny_config, strlen(tiny_config), bad, strlen(bad), &err), -1);
    assert_non_null(strstr(err.msg, "generation_config.json: top_p"));
}

static void dtypes(void **state)
{
    (void)state;
    struct model_config c;
    struct error err;
    enum dtype t = DTYPE_U8;
    tiny_config_parse(&c);
    assert_int_equal(model_dtype_parse(&c, "auto", &t, &err), 0);
    assert_int_equal(t, DTYPE_F32);
    assert_int_equal(model_dtype_parse(&c, "bfloat16", &t, &err), 0);
    assert_int_equal(t, DTYPE_BF16);
    assert_int_equal(model_dtype_parse(&c, "float16", &t, &err), -1);
    assert_non_null(strstr(err.msg, "overflow"));
    assert_int_equal(model_dtype_parse(&c, "int8", &t, &err), -1);
}

static void missing_directory(void **state)
{
    (void)state;
    struct model_config c;
    struct error err;
    assert_int_equal(model_config_load(&c, "/nonexistent", &err), -1);
    assert_int_equal(err.code, ERROR_NOT_FOUND);
    assert_non_null(strstr(err.msg, "config.json"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_every_field),
        cmocka_unit_test(old_and_new_spellings),
        cmocka_unit_test(other_architectures),
        cmocka_unit_test(windows),
        cmocka_unit_test(refuses),
        cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(deep_nesting_is_refused),
        cmocka_unit_test(generation_config),
        cmocka_unit_test(dtypes),
        cmocka_unit_test(missing_directory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
