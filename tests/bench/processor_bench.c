/*
 * How long the processor takes, on one thread: a picture file to tiles, tiles to normalised patch
 * rows, text to ids. processor_bench.py runs it beside Transformers' processor.
 *
 *   processor_bench DIR PICTURE TEXT ROUNDS
 *
 * DIR holds a checkpoint's processor files, TEXT is UTF-8. One line of JSON a round: the
 * milliseconds of each part, what the picture became, and the megabytes a second of the tokenizer.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "daemon/processor/processor.h"
#include "kernels/backend.h"
#include "kernels/log.h"
#include "tests/parity/processor/reference.h"

#define PATCH 14 // of InternViT
#define BUDGET ((size_t)4 << 30)

static double now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

struct bench {
    struct processor *processor;
    struct backend *backend;
    const char *picture, *text;
    size_t n_picture, n_text;
    float *patches; // [n_tiles * patches a tile, channels * PATCH * PATCH]
    size_t patches_capacity;
};

/* Normalised as the vision rank does it: pixel values, in patch order. */
static void make_patches(struct bench *b, const struct prompt *p)
{
    int64_t n_rows = (int64_t)p->n_tiles * (p->tile_height / PATCH) * (p->tile_width / PATCH);
    int64_t n_columns = (int64_t)p->channels * PATCH * PATCH;
    size_t n_bytes = (size_t)(n_rows * n_columns) * sizeof(float);

    if (n_bytes > b->patches_capacity) {
        b->patches = xrealloc(b->patches, n_bytes, 1);
        b->patches_capacity = n_bytes;
    }
    struct tensor pixels = {.data = p->tiles,
                            .dtype = DTYPE_U8,
                            .n_dims = 4,
                            .shape = {p->n_tiles, p->channels, p->tile_height, p->tile_width},
                            .row_stride = p->tile_width};
    struct tensor patches = tensor_2d(b->patches, DTYPE_F32, n_rows, n_columns);

    op_patchify(b->backend, &patches, &pixels, PATCH, PATCH, processor_mean(b->processor),
                processor_std(b->processor));
}

static void run_round(struct bench *b)
{
    struct content_part part = {.kind = PART_IMAGE,
                                .bytes = (const uint8_t *)b->picture,
                                .n_bytes = b->n_picture,
                                .tiling = {-1, -1, -1, -1}};
    struct chat_message message = {.role = "user", .parts = &part, .n_parts = 1};
    struct conversation c = {.messages = &message, .n_messages = 1};
    struct error err = {0};
    struct arena a;
    struct prompt p;
    int32_t *ids;
    int64_t n_ids;

    arena_init(&a, BUDGET);
    double start = now_ms();

    if (processor_prepare(b->processor, &c, &a, &p, &err))
        die("%s", err.msg);
    double tiled = now_ms();

    make_patches(b, &p);
    double normalised = now_ms();

    if (tokenizer_encode(processor_tokenizer(b->processor), b->text, b->n_text, INT32_MAX, &a, &ids,
                         &n_ids, &err))
        die("%s", err.msg);
    double encoded = now_ms();

    printf("{\"tiles\": %d, \"tiles_ms\": %.3f, \"patches_ms\": %.3f, \"text_mb_per_s\": %.3f}\n",
           p.n_tiles, tiled - start, normalised - tiled,
           (double)b->n_text / 1e3 / (encoded - normalised));
    fflush(stdout);
    arena_release(&a);
}

int main(int argc, char **argv)
{
    struct processor_model model = {.image_token_id = -1,
                                    .image_seq_length = 256,
                                    .n_channels = 3,
                                    .image_height = 448,
                                    .image_width = 448};
    struct processor_limits limits = processor_limits_default();
    struct error err = {0};
    struct bench b = {0};

    if (argc != 5)
        die("usage: processor_bench DIR PICTURE TEXT ROUNDS");
    struct tokenizer *t = tokenizer_open(argv[1], &err);

    if (!t)
        die("%s", err.msg);
    model.image_token_id = tokenizer_token_id(t, "<IMG_CONTEXT>");
    tokenizer_close(t);
    b.processor = processor_open(argv[1], &model, &limits, &err);
    if (!b.processor)
        die("%s", err.msg);
    b.backend = backend_cpu_open(1, NULL);
    b.picture = file_read(argv[2], &b.n_picture);
    b.text = file_read(argv[3], &b.n_text);
    for (int i = 0; i < atoi(argv[4]); i++)
        run_round(&b);
    processor_close(b.processor);
    backend_close(b.backend);
    free((char *)b.picture);
    free((char *)b.text);
    free(b.patches);
    return 0;
}
