/*
 * gpu_bench: a vision rank, through vision_forward(): n tiles of pixels on the host to their
 * features on the host.
 */
#include <stdlib.h>

#include "daemon/model/vision.h"
#include "kernels/log.h"
#include "tests/bench/gpu_bench.h"

#define N_BATCHES 2

static const int32_t batches[N_BATCHES] = {1, 13}, small_batches[N_BATCHES] = {1, 2};
static const float mean[] = {0.485f, 0.456f, 0.406f}, deviation[] = {0.229f, 0.224f, 0.225f};

struct tower {
    struct gpu_bench *bench;
    struct weights weights;
    struct vision_model model;
    struct tile_batch tiles;
    float *features;
};

static void run_tiles(void *arg)
{
    struct tower *t = arg;
    struct capture_list captures = {0};
    vision_forward(&t->model, &t->tiles, t->features, &captures);
}

static void measure(struct tower *t, const struct gpu_format *f, int32_t n)
{
    const struct model_config *config = t->model.config;
    const struct vision_config *v = &config->vision;
    int64_t n_tokens = v->n_patches + 1, n_features = (int64_t)n * config->n_features_per_tile;
    struct gpu_case c = {.part = "vision",
                         .what = "encode",
                         .format = f->name,
                         .n = n,
                         .context = n_tokens,
                         .n_layers = v->n_layers,
                         .run = run_tiles,
                         .arg = t};
    t->tiles.n_tiles = n;
    gpu_case_add(&c, &t->model.patch, (int64_t)n * v->n_patches);
    for (int i = 0; i < v->n_layers; i++) {
        const struct vision_layer *l = &t->model.layers[i];
        const struct linear *linears[] = {&l->qkv, &l->projection, &l->fc1, &l->fc2};
        for (int j = 0; j < 4; j++)
            gpu_case_add(&c, linears[j], n * n_tokens);
        c.flops += 4 * (double)n * (double)(n_tokens * n_tokens) * v->hidden_size;
    }
    gpu_case_add(&c, &t->model.linear_1, n_features);
    gpu_case_add(&c, &t->model.linear_2, n_features);
    gpu_bench_measure(t->bench, &c);
}

static void hold(struct tower *t, const struct gpu_format *f)
{
    struct vision_model *m = &t->model;
    for (int i = 0; i < m->config->vision.n_layers; i++) {
        struct vision_layer *l = &m->layers[i];
        struct linear *linears[] = {&l->qkv, &l->projection, &l->fc1, &l->fc2};
        for (int j = 0; j < 4; j++)
            gpu_codes_hold(t->bench->b, linears[j], f, KIND_VISION_LINEAR);
    }
    gpu_codes_hold(t->bench->b, &m->linear_1, f, KIND_VISION_LINEAR);
    gpu_codes_hold(t->bench->b, &m->linear_2, f, KIND_VISION_LINEAR);
    vision_record(m);
}

/* Random pixels for the largest batch, and room for its features. */
static uint8_t *make_tiles(struct tower *t, int32_t most)
{
    const struct model_config *c = &t->bench->config;
    const struct vision_config *v = &c->vision;
    size_t n = (size_t)most * (size_t)(v->n_channels * v->image_height) * (size_t)v->image_width;
    uint8_t *pixels = xcalloc(n, 1);
    uint32_t state = 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        pixels[i] = (uint8_t)(state >> 24);
    }
    t->tiles = (struct tile_batch){.channels = v->n_channels,
                                   .height = v->image_height,
                                   .width = v->image_width,
                                   .dtype = DTYPE_U8,
                                   .pixels = pixels};
    t->features = xcalloc((size_t)(most * c->n_features_per_tile) * (size_t)c->text.hidden_size,
                          sizeof(float));
    return pixels;
}

void gpu_bench_vision(struct gpu_bench *bench)
{
    struct tower *t = xcalloc(1, sizeof(*t));
    const int32_t *n_tiles = bench->is_small ? small_batches : batches;
    struct error err;

    t->bench = bench;
    if (bench->config.vision.n_channels > 3)
        die("%s: tiles of %d channels are not measured", bench->dir,
            bench->config.vision.n_channels);
    if (weights_open(&t->weights, bench->dir, &bench->config, 1, &err) != 0)
        die("%s", err.msg);
    printf("vision: %d layers: making random weights\n", bench->config.vision.n_layers);
    fflush(stdout);
    vision_init(&t->model, &bench->config, &t->weights, bench->b, DTYPE_BF16,
                n_tiles[N_BATCHES - 1], mean, deviation);
    uint8_t *pixels = make_tiles(t, n_tiles[N_BATCHES - 1]);
    for (int i = 0; i < n_gpu_formats; i++) {
        if (!gpu_bench_wants(bench, &gpu_formats[i]))
            continue;
        printf("vision: %s\n", gpu_formats[i].name);
        fflush(stdout);
        hold(t, &gpu_formats[i]);
        for (int j = 0; j < N_BATCHES; j++)
            measure(t, &gpu_formats[i], n_tiles[j]);
    }
    free(pixels);
    free(t->features);
    vision_release(&t->model);
    weights_release(&t->weights);
    free(t);
}
