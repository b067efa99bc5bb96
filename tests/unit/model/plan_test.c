/*
 * The memory plan: sums that do not depend on the layout, pages, refusals; and rope's growing base.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/plan.h"
#include "daemon/model/rope.h"
#include "daemon/model/vision.h"
#include "daemon/model/weight_list.h"
#include "tests/unit/model/model_files.h"

static struct plan_settings settings(int v, int t, int p)
{
    return (struct plan_settings){.layout = {v, t, p},
                                  .dtype = DTYPE_F32,
                                  .kv_dtype = DTYPE_F32,
                                  .page_size = 16,
                                  .kv_budget_bytes = 1 << 20,
                                  .max_model_len = 64,
                                  .max_num_seqs = 4,
                                  .max_num_batched_tokens = 32,
                                  .max_vision_tiles = 2,
                                  .vision_cache_bytes = 123456};
}

static void weights_add_up(void **state)
{
    (void)state;
    struct model_config c;
    struct plan one, many;
    struct error err;
    tiny_config_parse(&c);
    struct plan_settings s = settings(1, 1, 1), m = settings(2, 2, 2);
    assert_int_equal(plan_make(&one, &c, &s, &err), 0);
    assert_int_equal(one.n_ranks, 3);
    assert_int_equal(one.ranks[0].weight_bytes, 0);
    assert_int_equal(one.ranks[0].scratch_bytes, 123456); // the vision cache
    /* One layer: 2 * 32 norms, qkv 64 * 32 + 64, o 32 * 32, MLP 3 * 48 * 32; embedding, head, norm.
     */
    uint64_t layer = 64 + 64 * 32 + 64 + 32 * 32 + 3 * 48 * 32;
    assert_int_equal(one.ranks[2].weight_bytes, 4 * (2 * layer + 2 * 45 * 32 + 32));
    assert_int_equal(one.ranks[2].page_bytes, 2 * 2 * 4 * 4 * 16 * 4);
    assert_int_equal(one.n_pages, (1 << 20) / (2 * 2 * 4 * 4 * 16 * 4));
    assert_int_equal(plan_make(&many, &c, &m, &err), 0);
    assert_int_equal(many.n_ranks, 7);
    assert_int_equal(many.ranks[1].weight_bytes, one.ranks[1].weight_bytes);
    assert_int_equal(many.ranks[3].page_bytes, one.ranks[2].page_bytes / 4);
    assert_int_equal(many.n_pages, 4 * one.n_pages);
    uint64_t sum = 0, norms = 4 * (2 * 2 * 32 + 32), padding = 4 * 2 * 32; // one row of 46 twice
    for (int i = 3; i < 7; i++)
        sum += many.ranks[i].weight_bytes;
    assert_int_equal(sum, one.ranks[2].weight_bytes + norms + padding); // norms are on both shards
    plan_release(&many);
    plan_release(&one);
}

/* On a GPU every block is whole units of 256 bytes, and a bias stands beside its weight twice. */
static void counts_a_gpu(void **state)
{
    (void)state;
    const uint64_t back_end = (uint64_t)(256 + 32) << 20;
    struct model_config c;
    struct plan host, plan, tree;
    struct error err;
    tiny_config_parse(&c);
    struct plan_settings s = settings(1, 2, 1);
    s.dtype = s.kv_dtype = s.activation_dtype = DTYPE_BF16;
    assert_int_equal(plan_make(&host, &c, &s, &err), 0);
    s.on_cuda = 1;
    assert_int_equal(plan_make(&plan, &c, &s, &err), 0);
    s.deterministic = s.one_shot = 1;
    assert_int_equal(plan_make(&tree, &c, &s, &err), 0);
    /* A shard of a layer: norms; q 16 x 32, k and v 8 x 32 with biases in float32 and bfloat16; o
     * 32 x 16; gate, up and down of 32 of the 48 columns. Embedding and head 23 x 32; the last
     * norm. */
    uint64_t layer = 2 * 256 + 1024 + 2 * 512 + 3 * (256 + 256) + 1024 + 3 * 2048;
    assert_int_equal(plan.ranks[2].weight_bytes, 2 * layer + 2 * 1536 + 256);
    assert_int_equal(plan.ranks[2].kv_bytes, host.ranks[2].kv_bytes);
    assert_int_equal(plan.ranks[2].scratch_bytes % 256, 0);
    assert_true(plan.ranks[2].scratch_bytes > back_end);
    assert_true(plan.ranks[2].scratch_bytes < back_end + host.ranks[2].scratch_bytes + 256);
    assert_int_equal(tree.ranks[2].scratch_bytes - plan.ranks[2].scratch_bytes,
                     2 * 32 * 32 * 4 + (2 << 20)); // gathered parts; the mailbox
    assert_int_equal(tree.ranks[1].scratch_bytes, plan.ranks[1].scratch_bytes);
    assert_int_equal(plan_rank_device_bytes(&plan.ranks[2]), plan.ranks[2].weight_bytes +
                                                                 plan.ranks[2].kv_bytes +
                                                                 plan.ranks[2].scratch_bytes);
    assert_int_equal(plan_rank_host_bytes(&plan.ranks[2]), plan.ranks[2].process_bytes);
    assert_int_equal(plan_rank_device_bytes(&plan.ranks[0]), 0);
    assert_int_equal(plan_rank_host_bytes(&plan.ranks[0]), plan_rank_host_bytes(&host.ranks[0]));
    assert_int_equal(plan_rank_device_bytes(&host.ranks[2]), 0);
    plan_release(&tree);
    plan_release(&plan);
    plan_release(&host);
}

/* Parts of one linear that the files hold unlike each other are all held as floats. */
static void counts_parts_that_are_unlike(void **state)
{
    (void)state;
    struct model_config c;
    struct plan alike, unlike;
    struct weight_list list;
    struct error err;
    struct plan_settings s = settings(1, 1, 1);
    tiny_config_parse(&c);
    c.quantization.method = QUANTIZATION_INT8;
    weight_list_init(&list, &c);
    s.weights = &list;
    assert_int_equal(plan_make(&alike, &c, &s, &err), 0);
    for (int i = 0; i < list.n; i++)
        if (strcmp(list.specs[i].name, "language_model.model.layers.0.self_attn.k_proj.weight") ==
            0)
            list.specs[i].format = WEIGHT_FLOAT;
    assert_int_equal(plan_make(&unlike, &c, &s, &err), 0);
    assert_int_equal(unlike.ranks[2].weight_bytes - alike.ranks[2].weight_bytes,
                     64 * 32 * 4 - (64 * 32 + 64 * 4)); // q, k, v; codes and scales
    plan_release(&unlike);
    plan_release(&alike);
    weight_list_release(&list);
}

static void refuses(void **state)
{
    (void)state;
    struct model_config c;
    struct plan p;
    struct error err;
    tiny_config_parse(&c);
    struct plan_settings s = settings(1, 1, 3); // two layers
    assert_int_equal(plan_make(&p, &c, &s, &err), -1);
    assert_non_null(strstr(err.msg, "only 2 layers"));
    s = settings(1, 3, 1);
    assert_int_equal(plan_make(&p, &c, &s, &err), -1);
    s = settings(1, 1, 1);
    s.page_size = 24;
    assert_int_equal(plan_make(&p, &c, &s, &err), -1);
    assert_non_null(strstr(err.msg, "multiple of 16"));
    s = settings(1, 1, 1);
    s.kv_budget_bytes = 1000;
    assert_int_equal(plan_make(&p, &c, &s, &err), -1);
    assert_non_null(strstr(err.msg, "one sequence of 64 tokens needs 4"));
    s = settings(1, 1, 1);
    s.kv_dtype = DTYPE_I8;
    assert_int_equal(plan_make(&p, &c, &s, &err), -1);
    assert_non_null(strstr(err.msg, "heads have 4 dimensions, a multiple of 16"));
}

/* Int8: a byte a value and a float a token and kv head, in a page of two layers and four kv heads.
 */
static void counts_int8_pages(void **state)
{
    (void)state;
    struct model_config c;
    struct plan p;
    struct error err;
    char *text = NULL;
    size_t n = 0;
    tiny_config_parse(&c);
    c.text.head_dim = 16;
    struct plan_settings s = settings(1, 1, 1);
    s.kv_dtype = DTYPE_I8;
    s.kv_budget_bytes = 1000000;
    assert_int_equal(plan_make(&p, &c, &s, &err), 0);
    assert_int_equal(p.ranks[2].page_bytes, 2 * 2 * 4 * 16 * (16 + 4));
    assert_int_equal(p.n_pages, 1000000 / (2 * 2 * 4 * 16 * (16 + 4)));
    FILE *f = open_memstream(&text, &n);
    plan_print(f, &p, &c, (uint64_t)1 << 40);
    fclose(f);
    assert_non_null(strstr(text, "KV: 195 pages of 16 tokens = 3120 tokens in int8\n"));
    free(text);
    plan_release(&p);
}

static void prints_a_table(void **state)
{
    (void)state;
    struct model_config c;
    struct plan p;
    struct error err;
    char *text = NULL;
    size_t n = 0;
    tiny_config_parse(&c);
    struct plan_settings s = settings(1, 2, 1);
    assert_int_equal(plan_make(&p, &c, &s, &err), 0);
    FILE *f = open_memstream(&text, &n);
    plan_print(f, &p, &c, (uint64_t)1 << 20);
    fclose(f);
    assert_non_null(strstr(text, "4 ranks = 1 gateway + 1 vision + 1 x 2 language"));
    assert_non_null(strstr(text, "pages of 16 tokens"));
    assert_non_null(strstr(text, " tokens in float32\n"));
    assert_non_null(strstr(text, "not even the largest rank fits"));
    free(text);
    f = open_memstream(&text, &n);
    plan_print(f, &p, &c, (uint64_t)1 << 40);
    fclose(f);
    assert_non_null(strstr(text, "all ranks fit on it"));
    assert_null(strstr(text, "GPU"));
    free(text);
    plan_release(&p);
    s.on_cuda = 1;
    assert_int_equal(plan_make(&p, &c, &s, &err), 0);
    f = open_memstream(&text, &n);
    plan_print(f, &p, &c, (uint64_t)1 << 40);
    fclose(f);
    assert_non_null(strstr(text, "host MiB      GPU MiB\n"));
    assert_non_null(strstr(text, "GPU: 0.3 GiB on the fullest"));
    free(text);
    plan_release(&p);
}

static void dynamic_rope_grows_past_the_maximum(void **state)
{
    (void)state;
    struct rope_config c = {
        .type = ROPE_DYNAMIC, .theta = 10000, .factor = 2, .original_max_positions = 100};
    float short_freq[8], grown[8];
    rope_frequencies(&c, 16, 100, short_freq);
    rope_frequencies(&c, 16, 200, grown); // base * (2 * 200 / 100 - 1)^(16/14)
    double base = 10000 * pow(3, 16.0 / 14);
    for (int i = 0; i < 8; i++) {
        assert_true(fabs(short_freq[i] * pow(10000, i / 8.0) - 1) < 1e-6);
        assert_true(fabs(grown[i] * pow(base, i / 8.0) - 1) < 1e-6);
    }
}

static void tile_sizes(void **state)
{
    (void)state;
    struct model_config c;
    struct error err;
    tiny_config_parse(&c); // 56 x 56 native, patches of 14
    assert_int_equal(vision_check_size(&c, 3, 56, 56, &err), 0);
    assert_int_equal(vision_check_size(&c, 3, 112, 112, &err), 0);
    assert_int_equal(vision_check_size(&c, 3, 112, 126, &err), -1); // 72 of at most 64 patches
    assert_int_equal(vision_check_size(&c, 1, 56, 56, &err), -1);
    assert_int_equal(vision_check_size(&c, 3, 13, 56, &err), -1);
    assert_int_equal(vision_check_size(&c, 3, 1 << 20, 27, &err), -1);
    assert_int_equal(model_config_n_features(&c, 56, 56), 4);
    assert_int_equal(model_config_n_features(&c, 84, 84), 9);
    assert_int_equal(model_config_n_features(&c, 28, 112), 4); // 2 x 8 seen as 4 x 4
    assert_int_equal(model_config_n_features(&c, 70, 70), 0);  // odd side
    assert_int_equal(model_config_n_features(&c, 56, 84), 0);  // no square
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(weights_add_up),
        cmocka_unit_test(counts_a_gpu),
        cmocka_unit_test(counts_parts_that_are_unlike),
        cmocka_unit_test(refuses),
        cmocka_unit_test(counts_int8_pages),
        cmocka_unit_test(prints_a_table),
        cmocka_unit_test(dynamic_rope_grows_past_the_maximum),
        cmocka_unit_test(tile_sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
