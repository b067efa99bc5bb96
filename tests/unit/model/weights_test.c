/*
 * Weights: three spellings, each way a checkpoint can be wrong, and the bytes a shard reads.
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

#include "daemon/model/weights.h"
#include "kernels/log.h"
#include "tests/unit/model/model_files.h"

static struct model_config config;
static char dir[4096];
static struct backend *backend;

static int set_up(void **state)
{
    (void)state;
    tiny_config_parse(&config);
    make_directory(dir, sizeof(dir));
    backend = backend_cpu_open(3, "scalar");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    backend_close(backend);
    remove_directory(dir);
    return 0;
}

static void open_good(struct weights *w, const struct checkpoint_options *o)
{
    struct error err;
    write_checkpoint(dir, &config, o);
    if (weights_open(w, dir, &config, 0, &err) != 0)
        fail_msg("%s", err.msg);
}

static void all_spellings(void **state)
{
    (void)state;
    static const char vector[] = "vision_tower.encoder.layer.0.layernorm_before.bias";
    for (int n = 0; n < NAMING_COUNT; n++) {
        struct weights w;
        open_good(&w, &(struct checkpoint_options){.naming = (enum weight_naming)n});
        assert_int_equal(w.has_lm_head, 1);
        float *v = weights_vector(&w, backend, vector);
        for (int i = 0; i < 16; i++)
            assert_true(v[i] == checkpoint_value(vector, i));
        op_free(backend, v);
        weights_release(&w);
    }
}

/* y = W x with one-hot x reads a column of W back. */
static void check_linear(struct linear *l, const char *const *names, const struct range *rows,
                         const struct range *columns, int64_t in)
{
    float *x = op_alloc(backend, (size_t)l->in_dim * sizeof(float));
    float *y = op_alloc(backend, (size_t)l->out_dim * sizeof(float));
    struct tensor tx = tensor_2d(x, DTYPE_F32, 1, l->in_dim);
    struct tensor ty = tensor_2d(y, DTYPE_F32, 1, l->out_dim);
    for (int64_t c = 0; c < l->in_dim; c++) {
        int64_t at = 0;
        memset(x, 0, (size_t)l->in_dim * sizeof(float));
        x[c] = 1;
        op_matmul(backend, &ty, &tx, l, NULL);
        for (int part = 0; names[part]; part++) {
            char bias[96];
            snprintf(bias, sizeof(bias), "%.*sbias", (int)(strlen(names[part]) - 6), names[part]);
            for (int64_t r = rows[part].start; r < rows[part].start + rows[part].n; r++, at++) {
                float b = l->bias ? checkpoint_value(bias, r) : 0;
                float w = checkpoint_value(names[part], r * in + columns[part].start + c);
                assert_true(y[at] == w + b);
            }
        }
    }
    op_free(backend, y);
    op_free(backend, x);
}

static void packed_qkv(void **state)
{
    (void)state;
    static const char prefix[] = "vision_tower.encoder.layer.0.attention.";
    static const char *const names[] = {"vision_tower.encoder.layer.0.attention.q_proj.weight",
                                        "vision_tower.encoder.layer.0.attention.k_proj.weight",
                                        "vision_tower.encoder.layer.0.attention.v_proj.weight",
                                        NULL};
    struct range whole[3] = {{0, 16}, {0, 16}, {0, 16}};
    for (int n = 0; n < NAMING_COUNT; n++) {
        struct weights w;
        struct linear l;
        struct weight_parts parts = {prefix, {"q_proj", "k_proj", "v_proj"}, 1};
        open_good(&w, &(struct checkpoint_options){.naming = (enum weight_naming)n});
        weights_linear(&w, backend, &l, DTYPE_F32, &parts, NULL, NULL, NULL);
        check_linear(&l, names, whole, whole, 16);
        op_linear_free(backend, &l);
        weights_release(&w);
    }
}

/* Each shard's slices, and that it reads no more than them. */
static void shards_read_their_own_bytes(void **state)
{
    (void)state;
    static const char prefix[] = "language_model.model.layers.1.";
    static const char *const q[] = {"language_model.model.layers.1.self_attn.q_proj.weight",
                                    "language_model.model.layers.1.self_attn.k_proj.weight",
                                    "language_model.model.layers.1.self_attn.v_proj.weight", NULL};
    static const char *const o[] = {"language_model.model.layers.1.self_attn.o_proj.weight", NULL};
    static const char *const down[] = {"language_model.model.layers.1.mlp.down_proj.weight", NULL};
    struct weights w;
    struct error err;
    open_good(&w, &(struct checkpoint_options){.dtype = "BF16"});
    for (int shard = 0; shard < 4; shard++) {
        struct weight_cut cut;
        struct linear l;
        struct weight_parts parts = {
            prefix, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, 1};
        assert_int_equal(weight_cut_init(&cut, &config.text, shard, 4, &err), 0);
        struct range heads = {shard * 8, 8}, kv = {shard * 4, 4}, all = {0, 32};
        uint64_t before = w.read_bytes;
        weights_linear(&w, backend, &l, DTYPE_F32, &parts, &cut, &config.text, NULL);
        assert_int_equal(w.read_bytes - before, (8 + 4 + 4) * (32 + 1) * 2);
        check_linear(&l, q, (struct range[]){heads, kv, kv}, (struct range[]){all, all, all}, 32);
        op_linear_free(backend, &l);

        parts = (struct weight_parts){prefix, {"self_attn.o_proj"}, 0};
        before = w.read_bytes;
        weights_linear(&w, backend, &l, DTYPE_F32, &parts, &cut, &config.text,
                       &cut.dense.head_lanes);
        assert_int_equal(w.read_bytes - before, 32 * 8 * 2);
        assert_int_equal(l.n_lanes, cut.dense.head_lanes.n);
        check_linear(&l, o, &all, &heads, 32);
        op_linear_free(backend, &l);

        parts = (struct weight_parts){prefix, {"mlp.down_proj"}, 0};
        weights_linear(&w, backend, &l, DTYPE_F32, &parts, &cut, &config.text,
                       &cut.dense.column_lanes);
        check_linear(&l, down, &all, &cut.dense.columns, 48);
        op_linear_free(backend, &l);
    }
    weights_release(&w);
}

static void padded_vocabulary(void **state)
{
    (void)state;
    static const char name[] = "language_model.model.embed_tokens.weight";
    struct weights w;
    open_good(&w, &(struct checkpoint_options){0});
    struct range last = shard_vocab(45, 3, 4); // 45 rows padded to 48
    struct tensor t = weights_table(&w, backend, name, last, DTYPE_BF16);
    const uint16_t *rows = t.data;
    assert_int_equal(t.shape[0], 12);
    for (int64_t i = 0; i < 12 * 32; i++) {
        int64_t row = last.start + i / 32;
        float expected = row < 45 ? checkpoint_value(name, row * 32 + i % 32) : 0;
        assert_true(bf16_to_f32(rows[i]) == expected);
    }
    op_free(backend, t.data);
    weights_release(&w);
}

static void wrong_files(void **state)
{
    (void)state;
    static const struct {
        struct checkpoint_options options;
        const char *expected[3];
    } bad[] = {
        {{.leave_out = "language_model.model.layers.1.mlp.up_proj.weight"},
         {"layers.1.mlp.up_proj.weight", "missing", "[48, 32]"}},
        {{.leave_out = "language_model.lm_head.weight"},
         {"lm_head.weight", "missing", "tie_word_embeddings"}},
        {{.extra = "language_model.model.layers.2.mlp.up_proj.weight"},
         {"layers.2.mlp.up_proj.weight", "not expected", "config.json"}},
        {{.reshape = "vision_tower.embeddings.position_embeddings"},
         {"position_embeddings", "[1, 17, 16]", "found [272]"}},
        {{.reshape = "vision_tower.encoder.layer.0.attention.q_proj.weight",
          .naming = NAMING_OPENGVLAB},
         {"attn.qkv.weight", "[48, 16]", "found [768]"}},
        {{.dtype = "I32"}, {"expected", "found int32", "model.safetensors"}},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct weights w;
        struct error err = {0};
        write_checkpoint(dir, &config, &bad[i].options);
        assert_int_equal(weights_open(&w, dir, &config, 0, &err), -1);
        for (int j = 0; j < 3; j++)
            if (!strstr(err.msg, bad[i].expected[j]))
                fail_msg("\"%s\" lacks \"%s\"", err.msg, bad[i].expected[j]);
    }
}

static void tied_checkpoint(void **state)
{
    (void)state;
    struct weights w;
    config.tie_word_embeddings = 1;
    open_good(&w, &(struct checkpoint_options){.leave_out = "language_model.lm_head.weight"});
    assert_int_equal(w.has_lm_head, 0);
    weights_release(&w);
    open_good(&w, &(struct checkpoint_options){0}); // both: lm_head is used
    assert_int_equal(w.has_lm_head, 1);
    weights_release(&w);
    open_good(&w, &(struct checkpoint_options){
                      .extra = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"});
    weights_release(&w);
    config.tie_word_embeddings = 0;
}

static void dummy_weights(void **state)
{
    (void)state;
    static const char name[] = "language_model.model.embed_tokens.weight";
    struct weights w;
    struct error err;
    assert_int_equal(weights_open(&w, "/nonexistent", &config, 1, &err), 0);
    struct tensor all = weights_table(&w, backend, name, (struct range){0, 45}, DTYPE_F32);
    struct tensor part = weights_table(&w, backend, name, (struct range){30, 10}, DTYPE_F32);
    assert_memory_equal(part.data, (float *)all.data + 30 * 32, 10 * 32 * sizeof(float));
    float *norm = weights_vector(&w, backend, "language_model.model.norm.weight");
    assert_true(norm[0] == 1 && norm[31] == 1);
    op_free(backend, norm);
    op_free(backend, part.data);
    op_free(backend, all.data);
    weights_release(&w);
}

/* Weights larger than the staging memory come in parts; the parts of a stack end anywhere in them.
 */
static void large_weights(void **state)
{
    (void)state;
    enum { ROWS = 1500, COLUMNS = 800 };
    const struct weight_parts parts = {
        "language_model.model.layers.0.", {"mlp.gate_proj", "mlp.up_proj"}, 1};
    struct model_config large = config;
    struct weights w;
    struct error err;
    struct linear whole, stacked;
    large.text.hidden_size = COLUMNS;
    large.text.intermediate_size = ROWS;
    assert_int_equal(weights_open(&w, "/nonexistent", &large, 1, &err), 0);
    weights_linear(&w, backend, &stacked, DTYPE_F32, &parts, NULL, &large.text, NULL);
    float *rows = xcalloc(2 * ROWS * COLUMNS, sizeof(float));
    for (int i = 0; i < 2; i++) {
        const struct weight_spec *s =
            weight_list_find(&w.list, i ? "language_model.model.layers.0.mlp.up_proj.weight"
                                        : "language_model.model.layers.0.mlp.gate_proj.weight");
        for (int64_t r = 0; r < ROWS; r++)
            weights_row(&w, s, r, rows + (i * ROWS + r) * COLUMNS);
    }
    whole = (struct linear){.out_dim = 2 * ROWS, .in_dim = COLUMNS, .n_lanes = 1};
    whole.dtype = DTYPE_F32;
    whole.lane_start[1] = COLUMNS;
    struct tensor all = tensor_2d(rows, DTYPE_F32, 2 * ROWS, COLUMNS);
    op_linear_pack(backend, &whole, &all, NULL);
    assert_int_equal(whole.packed_bytes, stacked.packed_bytes);
    assert_memory_equal(whole.packed, stacked.packed, whole.packed_bytes);
    op_linear_free(backend, &whole);
    op_linear_free(backend, &stacked);
    free(rows);

    large.text.vocab_size = 3 * ROWS;
    weights_release(&w);
    assert_int_equal(weights_open(&w, "/nonexistent", &large, 1, &err), 0);
    const char *name = "language_model.model.embed_tokens.weight";
    struct tensor table = weights_table(&w, backend, name, (struct range){5, 2 * ROWS}, DTYPE_BF16);
    float row[COLUMNS];
    for (int64_t r = 0; r < 2 * ROWS; r += 7) {
        weights_row(&w, weight_list_find(&w.list, name), 5 + r, row);
        for (int64_t k = 0; k < COLUMNS; k++)
            assert_int_equal(((uint16_t *)table.data)[r * COLUMNS + k], f32_to_bf16(row[k]));
    }
    op_free(backend, table.data);
    weights_release(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_spellings),
        cmocka_unit_test(packed_qkv),
        cmocka_unit_test(shards_read_their_own_bytes),
        cmocka_unit_test(padded_vocabulary),
        cmocka_unit_test(wrong_files),
        cmocka_unit_test(tied_checkpoint),
        cmocka_unit_test(dummy_weights),
        cmocka_unit_test(large_weights),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
