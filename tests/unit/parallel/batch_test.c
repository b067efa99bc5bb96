/*
 * Packed messages: what goes in comes out, and what was cut or garbled on the way ends the process
 * by die(), never by a fault. The latter run in children, whose die hook leaves with DIED; under a
 * sanitizer any bad access leaves with something else.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/log.h"
#include "parallel/batch.h"

#define DIED 42
#define DIM 3

/* Two sequences: 3 tokens of a prompt with one feature row, and 1 token of an answer. */
static struct batch example(void)
{
    static const int32_t token_ids[] = {5, 151667, 7, 9};
    static const float positions[] = {0, 1, 1.5f, 40};
    static const int32_t feature_rows[] = {-1, 1, -1, -1}, targets[] = {-1, -1, 7, -1};
    static const uint8_t want_logits[] = {0, 0, 1, 1}, target_tops[] = {0, 0, 2, 0};
    static const int32_t query_start[] = {0, 3, 4}, context_len[] = {3, 41}, rope_len[] = {3, 41};
    static const uint32_t captures[] = {CAPTURE_LOGITS | CAPTURE_EMBEDS, 0};
    static const int32_t page_start[] = {0, 1, 4}, pages[] = {8, 2, 3, 11};
    static const int32_t copy_src[] = {3}, copy_dst[] = {11};
    static const struct sample_row samples[] = {
        {.row = 3,
         .sequence = 1,
         .sampling = {.temperature = 0.5f, .top_p = 1, .seed = 1234567890123, .n_logprobs = 5},
         .candidate = 1,
         .position = 7,
         .history_start = 1,
         .n_prompt = 2,
         .n_output = 2,
         .banned_start = 0,
         .n_banned = 2,
         .bias_start = 0,
         .n_bias = 1}};
    static const int32_t history[] = {1, 2, 3, 4, 5}, banned[] = {6, 7}, bias_ids[] = {8};
    static const float bias_values[] = {-2.5f}, features[] = {1, 2, 3, 4, 5, 6};
    return (struct batch){
        .step_id = 77,
        .n_sequences = 2,
        .n_tokens = 4,
        .n_pages = 4,
        .n_features = 2,
        .n_samples = 1,
        .n_history = 5,
        .n_banned = 2,
        .n_bias = 1,
        .n_copies = 1,
        .feature_dim = DIM,
        .token_ids = token_ids,
        .positions = positions,
        .feature_rows = feature_rows,
        .targets = targets,
        .target_tops = target_tops,
        .want_logits = want_logits,
        .query_start = query_start,
        .context_len = context_len,
        .rope_len = rope_len,
        .captures = captures,
        .page_start = page_start,
        .pages = pages,
        .copy_src = copy_src,
        .copy_dst = copy_dst,
        .samples = samples,
        .history = history,
        .banned = banned,
        .bias_ids = bias_ids,
        .bias_values = bias_values,
        .features = features,
    };
}

#define assert_same_array(a, b, field, n)                                                          \
    do {                                                                                           \
        assert_int_equal((uintptr_t)(b).field % 8, 0);                                             \
        assert_memory_equal((a).field, (b).field, (size_t)(n) * sizeof(*(a).field));               \
    } while (0)

static void check_equal(const struct batch *a, const struct batch *b)
{
    assert_int_equal(b->step_id, a->step_id);
    assert_int_equal(b->n_features, a->n_features);
    assert_int_equal(b->feature_dim, a->feature_dim);
    assert_same_array(*a, *b, token_ids, a->n_tokens);
    assert_same_array(*a, *b, positions, a->n_tokens);
    assert_same_array(*a, *b, feature_rows, a->n_tokens);
    assert_same_array(*a, *b, targets, a->n_tokens);
    assert_same_array(*a, *b, target_tops, a->n_tokens);
    assert_same_array(*a, *b, want_logits, a->n_tokens);
    assert_same_array(*a, *b, query_start, a->n_sequences + 1);
    assert_same_array(*a, *b, context_len, a->n_sequences);
    assert_same_array(*a, *b, rope_len, a->n_sequences);
    assert_same_array(*a, *b, captures, a->n_sequences);
    assert_same_array(*a, *b, page_start, a->n_sequences + 1);
    assert_same_array(*a, *b, pages, a->n_pages);
    assert_same_array(*a, *b, copy_src, a->n_copies);
    assert_same_array(*a, *b, copy_dst, a->n_copies);
    assert_same_array(*a, *b, samples, a->n_samples);
    assert_same_array(*a, *b, history, a->n_history);
    assert_same_array(*a, *b, banned, a->n_banned);
    assert_same_array(*a, *b, bias_ids, a->n_bias);
    assert_same_array(*a, *b, bias_values, a->n_bias);
}

static void test_batch_round_trip(void **state)
{
    (void)state;
    struct batch a = example(), b;
    for (int with_features = 0; with_features < 2; with_features++) {
        struct message *m = batch_pack(&a, with_features);
        assert_int_equal(m->type, CONTROL_BATCH);
        batch_unpack(&b, m);
        check_equal(&a, &b);
        if (with_features)
            assert_same_array(a, b, features, a.n_features * DIM);
        else
            assert_null(b.features);
        message_unref(m);
    }
}

static void test_batch_print(void **state)
{
    (void)state;
    struct batch b = example();
    char *text;
    size_t n;
    FILE *f = open_memstream(&text, &n);
    batch_print(f, &b);
    fclose(f);
    assert_string_equal(
        text,
        "step 77: 2 sequences, 4 tokens, 4 pages, 2 features of 3, 1 page copies\n"
        "  sequence 0: rows 0-2, context 3, positions 0-1.5, features 1, pages 8, captures 0x5\n"
        "  sequence 1: rows 3-3, context 41, positions 40-40, pages 2 3 11, samples row 3 as "
        "candidate 1 token 7 (temperature 0.5, history 2+2, banned 2, biased 1)\n");
    free(text);
}

/* ---- results, tiles, features, introductions ---- */

static const float rows[] = {1, 2, 3, 4, 5, 6, 7};
static const struct captured captured[] = {
    {.name = "inputs_embeds", .owner = 0, .first_row = 0, .n_rows = 3, .n_cols = 2, .data = rows},
    {.name = "logits", .owner = 1, .first_row = 2, .n_rows = 1, .n_cols = 7, .data = rows},
    {.name = "empty", .owner = 1, .first_row = 0, .n_rows = 0, .n_cols = 7, .data = rows},
};

static void check_captured(const struct captured *got, int32_t n)
{
    assert_int_equal(n, 3);
    for (int i = 0; i < 3; i++) {
        const struct captured *c = &captured[i];
        assert_string_equal(got[i].name, c->name);
        assert_int_equal(got[i].owner, c->owner);
        assert_int_equal(got[i].first_row, c->first_row);
        assert_int_equal(got[i].n_rows, c->n_rows);
        assert_int_equal(got[i].n_cols, c->n_cols);
        assert_int_equal((uintptr_t)got[i].data % 8, 0);
        assert_memory_equal(got[i].data, rows, (size_t)(c->n_rows * c->n_cols) * sizeof(float));
    }
}

static struct message *example_result(void)
{
    static const struct sample_result samples[] = {{.sequence = 1,
                                                    .token = {11, -0.25f, 2},
                                                    .n_top = 2,
                                                    .top = {{12, -0.125f, 1}, {11, -0.25f, 2}}}};
    static const struct token_logprob targets[] = {{11, -0.5f, 3}, {12, -0.25f, 1}};
    const struct step_result r = {
        .step_id = 77,
        .stage = 1,
        .n_samples = 1,
        .n_targets = 2,
        .n_captured = 3,
        .compute_ns = 5,
        .wait_ns = 3,
        .samples = samples,
        .targets = targets,
        .captured = captured,
    };
    return step_result_pack(&r);
}

static void test_step_result_round_trip(void **state)
{
    (void)state;
    struct message *m = example_result();
    struct step_result r;
    step_result_unpack(&r, m);
    assert_int_equal(r.step_id, 77);
    assert_int_equal(r.stage, 1);
    assert_int_equal(r.compute_ns, 5);
    assert_int_equal(r.wait_ns, 3);
    assert_int_equal(r.n_samples, 1);
    assert_int_equal(r.samples[0].token.id, 11);
    assert_int_equal(r.samples[0].n_top, 2);
    assert_int_equal(r.samples[0].top[0].id, 12);
    assert_int_equal(r.n_targets, 2);
    assert_int_equal(r.targets[0].rank, 3);
    assert_true(r.targets[1].id == 12 && r.targets[1].logprob == -0.25f);
    check_captured(r.captured, r.n_captured);
    step_result_release(&r);
    step_result_release(&r);
    message_unref(m);
}

static struct message *example_features(void)
{
    const struct feature_result r = {
        .job_id = 9,
        .n_tiles = 1,
        .n_tokens_per_tile = 2,
        .dim = 3,
        .not_finite = (const uint8_t[]){1},
        .n_captured = 3,
        .compute_ns = 8,
        .features = rows,
        .captured = captured,
    };
    return feature_result_pack(&r);
}

static void test_feature_result_round_trip(void **state)
{
    (void)state;
    struct message *m = example_features();
    struct feature_result r;
    feature_result_unpack(&r, m);
    assert_int_equal(r.job_id, 9);
    assert_int_equal(r.n_tiles, 1);
    assert_int_equal(r.n_tokens_per_tile, 2);
    assert_int_equal(r.dim, 3);
    assert_int_equal(r.not_finite[0], 1);
    assert_int_equal(r.compute_ns, 8);
    assert_memory_equal(r.features, rows, 6 * sizeof(float));
    check_captured(r.captured, r.n_captured);
    feature_result_release(&r);
    message_unref(m);
}

/* Tiles and masks that lie one behind the other at t->pixels and t->mask. */
static struct message *pack_together(const struct tile_batch *t)
{
    const void *pixels[4];
    const uint8_t *masks[4];
    size_t n_bytes = (size_t)(t->channels * t->height * t->width) * dtype_size(t->dtype);
    for (int32_t i = 0; i < t->n_tiles; i++) {
        pixels[i] = (const uint8_t *)t->pixels + (size_t)i * n_bytes;
        masks[i] = t->n_mask ? t->mask + i * t->n_mask : NULL;
    }
    return tile_batch_pack(t, pixels, masks);
}

static struct message *example_tiles(enum dtype dtype)
{
    const struct tile_batch t = {
        .job_id = 4,
        .n_tiles = 1,
        .channels = 3,
        .height = 1,
        .width = 2,
        .dtype = dtype,
        .captures = VISION_CAPTURE_LAYER0,
        .pixels = rows,
    };
    return pack_together(&t);
}

/* Tiles that lie apart make the same message as tiles that lie together. */
static void test_tile_batch_gather(void **state)
{
    (void)state;
    const uint8_t together[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    const uint8_t apart[] = {7, 8, 9, 0, 1, 2, 3, 0, 0, 4, 5, 6};
    const void *pixels[] = {apart + 4, apart + 9, apart};
    struct tile_batch t = {.n_tiles = 3,
                           .channels = 3,
                           .height = 1,
                           .width = 1,
                           .dtype = DTYPE_U8,
                           .pixels = together};
    struct message *a = pack_together(&t), *b = tile_batch_pack(&t, pixels, NULL);
    struct tile_batch got;
    assert_int_equal(a->n_bytes, b->n_bytes);
    assert_memory_equal(a->payload, b->payload, a->n_bytes);
    tile_batch_unpack(&got, b);
    assert_memory_equal(got.pixels, together, sizeof(together));
    message_unref(a);
    message_unref(b);
}

/* So do masks; the message's own bytes are what a rank sees. */
static void test_tile_batch_gather_masks(void **state)
{
    (void)state;
    const uint8_t pixels[] = {1, 2, 3, 4}, masks[] = {1, 0, 0, 1, 0, 1};
    const void *pixels_apart[] = {pixels, pixels + 2};
    const uint8_t *masks_apart[] = {masks + 3, masks};
    struct tile_batch t = {.n_tiles = 2,
                           .channels = 1,
                           .height = 1,
                           .width = 2,
                           .dtype = DTYPE_U8,
                           .n_mask = 3,
                           .pixels = pixels,
                           .mask = (const uint8_t[]){1, 0, 1, 1, 0, 0}};
    struct message *a = pack_together(&t), *b = tile_batch_pack(&t, pixels_apart, masks_apart);
    struct tile_batch got;
    assert_int_equal(a->n_bytes, b->n_bytes);
    assert_memory_equal(a->payload, b->payload, a->n_bytes);
    tile_batch_unpack(&got, b);
    assert_int_equal(got.n_mask, 3);
    assert_memory_equal(got.mask, t.mask, 6);
    assert_memory_equal(got.pixels, pixels, 4);
    message_unref(a);
    message_unref(b);
}

static void test_tile_batch_round_trip(void **state)
{
    (void)state;
    const enum dtype types[] = {DTYPE_U8, DTYPE_F32};
    for (int i = 0; i < 2; i++) {
        struct message *m = example_tiles(types[i]);
        struct tile_batch t;
        tile_batch_unpack(&t, m);
        assert_int_equal(t.job_id, 4);
        assert_int_equal(t.n_tiles, 1);
        assert_int_equal(t.channels, 3);
        assert_int_equal(t.height, 1);
        assert_int_equal(t.width, 2);
        assert_int_equal(t.dtype, types[i]);
        assert_int_equal(t.captures, VISION_CAPTURE_LAYER0);
        assert_memory_equal(t.pixels, rows, 6 * dtype_size(types[i]));
        message_unref(m);
    }
}

static struct message *example_info(void)
{
    const struct rank_info r = {
        .rank = 3, .host = "node7", .device = "AVX2, 2 threads", .load_ms = 12};
    return rank_info_pack(&r);
}

static void test_rank_info_round_trip(void **state)
{
    (void)state;
    struct message *m = example_info();
    struct rank_info r;
    rank_info_unpack(&r, m);
    assert_int_equal(r.rank, 3);
    assert_string_equal(r.host, "node7");
    assert_string_equal(r.device, "AVX2, 2 threads");
    assert_int_equal(r.load_ms, 12);
    message_unref(m);
}

static void test_nothing_in_anything(void **state)
{
    (void)state;
    const struct step_result r = {.step_id = 1, .stage = 0};
    struct step_result got;
    struct message *m = step_result_pack(&r);
    step_result_unpack(&got, m);
    assert_int_equal(got.n_captured, 0);
    assert_null(got.captured);
    step_result_release(&got);
    message_unref(m);
}

/* ---- cut and garbled messages ---- */

/* Reads every byte that the view gives access to. */
static unsigned sum_of(const void *p, int64_t n_bytes)
{
    unsigned sum = 0;
    for (int64_t i = 0; i < n_bytes; i++)
        sum += ((const uint8_t *)p)[i];
    return sum;
}

static unsigned use_batch(const struct message *m)
{
    struct batch b;
    batch_unpack(&b, m);
    FILE *f = fopen("/dev/null", "w");
    batch_print(f, &b);
    fclose(f);
    return sum_of(b.bias_values, b.n_bias * 4) + sum_of(b.positions, b.n_tokens * 4) +
           sum_of(b.features, b.features ? (int64_t)b.n_features * b.feature_dim * 4 : 0);
}

static unsigned use_captured(const struct captured *c, int32_t n)
{
    unsigned sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum +=
            (unsigned)strlen(c[i].name) + sum_of(c[i].data, (int64_t)c[i].n_rows * c[i].n_cols * 4);
    return sum;
}

static unsigned use_result(const struct message *m)
{
    struct step_result r;
    step_result_unpack(&r, m);
    unsigned sum = use_captured(r.captured, r.n_captured) +
                   sum_of(r.targets, r.n_targets * (int64_t)sizeof(*r.targets));
    step_result_release(&r);
    return sum;
}

static unsigned use_features(const struct message *m)
{
    struct feature_result r;
    feature_result_unpack(&r, m);
    unsigned sum = use_captured(r.captured, r.n_captured) +
                   sum_of(r.features, (int64_t)r.n_tiles * r.n_tokens_per_tile * r.dim * 4);
    feature_result_release(&r);
    return sum;
}

static unsigned use_tiles(const struct message *m)
{
    struct tile_batch t;
    tile_batch_unpack(&t, m);
    return sum_of(t.pixels, (int64_t)t.n_tiles * t.channels * t.height * t.width *
                                (int64_t)dtype_size(t.dtype));
}

static unsigned use_info(const struct message *m)
{
    struct rank_info r;
    rank_info_unpack(&r, m);
    return (unsigned)(strlen(r.host) + strlen(r.device));
}

static void leave_died(int status)
{
    (void)status;
    _exit(DIED);
}

/* In a child: what it leaves with, -1 when a signal ends it. */
static int in_child(void (*run)(void *), void *arg)
{
    int status;
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr))
            _exit(98);
        log_set_die_hook(leave_died);
        run(arg);
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

struct trial {
    const struct message *whole;
    unsigned (*use)(const struct message *m);
    uint64_t n_kept;
    uint32_t *at; // shared with the child: next mutation
    uint32_t end;
};

static void use_cut(void *arg)
{
    struct trial *t = arg;
    struct message *m = message_new(t->whole->type, t->n_kept);
    memcpy(m->payload, t->whole->payload, t->n_kept);
    t->use(m);
}

/* Mutation i: byte i / 6, changed in one of six ways. Goes on until one dies. */
static void use_garbled(void *arg)
{
    static const uint8_t flips[6] = {0x01, 0x80, 0xff, 0x10, 0x02, 0x7f};
    struct trial *t = arg;
    while (*t->at < t->end) {
        uint32_t i = (*t->at)++;
        struct message *m = message_new(t->whole->type, t->whole->n_bytes);
        memcpy(m->payload, t->whole->payload, m->n_bytes);
        m->payload[i / 6] ^= flips[i % 6];
        t->use(m);
        message_unref(m);
    }
}

static void check_damaged(struct message *m, unsigned (*use)(const struct message *m))
{
    uint32_t *at =
        mmap(NULL, sizeof(*at), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct trial t = {.whole = m, .use = use, .at = at, .end = (uint32_t)m->n_bytes * 6};
    use(m);
    for (t.n_kept = 0; t.n_kept < m->n_bytes; t.n_kept++)
        assert_int_equal(in_child(use_cut, &t), DIED);
    while (*at < t.end) {
        int status = in_child(use_garbled, &t);
        assert_true(status == DIED || status == 0);
    }
    munmap(at, sizeof(*at));
    message_unref(m);
}

static void test_damaged_batch(void **state)
{
    (void)state;
    struct batch b = example();
    check_damaged(batch_pack(&b, 1), use_batch);
}

static void test_damaged_result(void **state)
{
    (void)state;
    check_damaged(example_result(), use_result);
}

static void test_damaged_features(void **state)
{
    (void)state;
    check_damaged(example_features(), use_features);
}

static void test_damaged_tiles(void **state)
{
    (void)state;
    check_damaged(example_tiles(DTYPE_F32), use_tiles);
}

static void test_damaged_info(void **state)
{
    (void)state;
    check_damaged(example_info(), use_info);
}

/* Each of these is a whole message whose indices are wrong; the packer refuses it as our bug, so
 * the view of a good one is edited in place. */
static void break_one(int i, struct batch *b)
{
    switch (i) {
    case 0:
        ((int32_t *)b->query_start)[1] = 5;
        break;
    case 1:
        ((int32_t *)b->query_start)[0] = 1;
        break;
    case 2:
        ((int32_t *)b->page_start)[2] = 3;
        break;
    case 3:
        ((int32_t *)b->pages)[0] = -1;
        break;
    case 4:
        ((int32_t *)b->feature_rows)[0] = 2;
        break;
    case 5:
        ((struct sample_row *)b->samples)[0].row = 2;
        break;
    case 6:
        ((struct sample_row *)b->samples)[0].history_start = INT32_MAX;
        break;
    case 7:
        ((struct sample_row *)b->samples)[0].n_banned = 3;
        break;
    case 8:
        ((struct sample_row *)b->samples)[0].sampling.n_logprobs = TOP_LOGPROBS_MAX + 1;
        break;
    case 9:
        ((int32_t *)b->context_len)[0] = 2;
        break;
    case 10:
        ((uint8_t *)b->want_logits)[0] = 2;
        break;
    case 11:
        ((uint32_t *)b->captures)[0] = 64;
        break;
    }
}
#define N_BROKEN 12

struct broken {
    struct message *m;
    int i;
};

static void use_broken(void *arg)
{
    struct broken *x = arg;
    struct batch b;
    batch_unpack(&b, x->m);
    break_one(x->i, &b);
    batch_unpack(&b, x->m);
}

static void test_wrong_indices(void **state)
{
    (void)state;
    struct batch b = example();
    struct broken x = {.m = batch_pack(&b, 1)};
    for (x.i = 0; x.i < N_BROKEN; x.i++)
        assert_int_equal(in_child(use_broken, &x), DIED);
    message_unref(x.m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batch_round_trip),
        cmocka_unit_test(test_batch_print),
        cmocka_unit_test(test_step_result_round_trip),
        cmocka_unit_test(test_feature_result_round_trip),
        cmocka_unit_test(test_tile_batch_round_trip),
        cmocka_unit_test(test_tile_batch_gather),
        cmocka_unit_test(test_tile_batch_gather_masks),
        cmocka_unit_test(test_rank_info_round_trip),
        cmocka_unit_test(test_nothing_in_anything),
        cmocka_unit_test(test_damaged_batch),
        cmocka_unit_test(test_damaged_result),
        cmocka_unit_test(test_damaged_features),
        cmocka_unit_test(test_damaged_tiles),
        cmocka_unit_test(test_damaged_info),
        cmocka_unit_test(test_wrong_indices),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
